"""The commands of `nanogpt-accel`, one file each; `train` is in train.py.

In: the words after the command's name. Out: what it prints. Mistakes are reported together, with exit status 2.
To add a command, add a file here and a line to __main__.py.
"""
