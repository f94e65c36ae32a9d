"""Estimate the parameters, FLOPs, memory, communication time and loss of a run.

In: the shape of a model and of a batch, or finished runs. Out: bytes, FLOPs, seconds, losses. Only coordinate_check.py
runs a model. To add a GPU, add a row to the table in hardware.py.
"""
