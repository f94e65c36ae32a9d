"""Checkpoints and the run folder: save, verify, find, resume, prune.

In: a model, an optimizer, the training state. Out: runs/NAME/checkpoint-000500/, which `from_pretrained` loads.
To store another value in every checkpoint, add a field to TrainState in train.py.
"""
