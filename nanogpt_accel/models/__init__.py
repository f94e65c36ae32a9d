"""Find, load, export and import models, convert them to and from stock architectures, and generate text.

In: a run, a checkpoint, another model folder or a Hub id. Out: a GPT, or a model folder that other tools load.
To add a stock architecture, add its config and weight names to stock.py.
"""
