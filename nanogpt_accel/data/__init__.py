"""From a corpus to token files: sources -> documents -> token ids -> token files.

In: a recipe's data section. Out: a folder with train.bin, val.bin, tokenizer.json and manifest.json, as a Dataset.
To add a corpus, add an entry to a table at the top of sources.py; to add a file format, a reader to readers.py.
"""
