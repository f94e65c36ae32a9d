"""Small shared tools that know nothing about models: command lines, field types, files, text.

In and out: plain values. Nothing heavy is imported at the top of these files.
Add something here only if two folders need it.
"""
