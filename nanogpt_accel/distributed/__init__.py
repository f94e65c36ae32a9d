"""Processes and devices: the Accelerator, launcher checks, stop signals, sharded state, CPU kernels.

In: the launcher's environment and the train section of a recipe. Out: one Accelerator, with the same settings on all
ranks. To support another kind of sharding, add it to sharding.py.
"""
