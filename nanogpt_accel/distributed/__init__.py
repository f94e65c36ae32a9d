"""Processes and devices: the Accelerator, launcher checks, stop signals, sharded state, CPU kernels.

In: the launcher's environment and a recipe's train section. Out: one Accelerator and what all ranks agreed on.
To support another way to shard, add it to sharding.py.
"""
