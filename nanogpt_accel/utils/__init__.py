"""Small helpers that do not depend on models: command lines, field types, files, text.

In and out: plain values. These files do not import torch or transformers at the top.
Add something here only if two folders need it.
"""
