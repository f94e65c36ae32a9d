"""Small shared tools that know nothing about models: command lines, field types, files, text.

In and out: plain values. These files import nothing heavy at the top.
Add something here only if two folders need it.
"""
