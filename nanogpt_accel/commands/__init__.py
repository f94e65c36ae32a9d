"""The commands of `nanogpt-accel`, one file each. `train` is in nanogpt_accel/train.py.

In: the command-line arguments after the command's name. Out: text or JSON on the terminal. All mistakes in the
arguments are reported together, with exit status 2. To add a command, add a file here and a line to __main__.py.
"""
