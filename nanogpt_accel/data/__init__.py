"""Convert a corpus to token files: sources -> documents -> token ids -> token files.

In: a recipe's data section. Out: a folder with train.bin, val.bin, tokenizer.json, manifest.json; opened as a Dataset.
To add a corpus, add an entry to a table at the top of sources.py; to add a file format, add a reader to readers.py.
"""
