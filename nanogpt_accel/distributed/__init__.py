"""Processes and devices: the Accelerator, launcher checks, stop signals, sharded state, CPU kernels.

In: the launcher's environment variables and the train section of a recipe. Out: one Accelerator per process, with the
same settings on all ranks. To support another kind of sharding, add it to sharding.py.
"""
