"""Find, load, import and export models, convert them from and to stock architectures, and generate text.

In: a run, a checkpoint, another model folder or a Hub id. Out: a GPT, or a model folder or file for other tools.
To add a stock architecture, add its config and weight names to stock.py.
"""
