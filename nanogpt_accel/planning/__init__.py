"""Requirements of a run: parameters, FLOPs, memory, communication, and one table of hardware.

In: the shape of a model and a batch. Out: bytes, FLOPs and seconds; nothing is run.
To add a GPU, add a row to hardware.py.
"""
