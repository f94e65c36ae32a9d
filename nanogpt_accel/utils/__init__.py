"""Small helpers that do not depend on models: command lines, field types, files, text.

In and out: plain values. Importing these files does not import torch or transformers, so it is fast.
Add something here only if two folders need it.
"""
