"""Compute what a run needs: parameters, FLOPs, memory and communication.

Input: the shape of a model and of a batch. Output: bytes, FLOPs and seconds, without running the model.
To add a GPU, add a row to hardware.py.
"""
