"""Convert a corpus to token files: sources -> documents -> token ids -> token files.

The input is the data section of a recipe. The output is a data folder with train.bin, val.bin, tokenizer.json and
manifest.json, which is opened as a Dataset. To add a corpus or a file format, see README.md.
"""
