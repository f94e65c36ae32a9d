"""Models in other forms: load them, export to stock architectures, import nanoGPT's checkpoints, generate text.

In: a run, a checkpoint, another model folder or a Hub id. Out: a GPT, or a folder that any tool loads.
To add a stock architecture, add its config and weight names to stock.py.
"""
