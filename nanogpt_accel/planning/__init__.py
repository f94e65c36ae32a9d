"""Estimate the parameters, FLOPs, memory and communication time of a run.

In: the shape of a model and of a batch. Out: bytes, FLOPs and seconds, without running the model.
To add a GPU, add a row to the table in hardware.py.
"""
