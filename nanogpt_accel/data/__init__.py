"""Convert a corpus to token files: sources -> documents -> token ids -> token files.

The input is the data section of a recipe. The output is a data folder with train.bin, val.bin, tokenizer.json and
manifest.json. A Dataset opens this folder. To add a corpus or a file format, see README.md in this package.
"""
