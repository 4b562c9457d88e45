"""Data of other formats on its way into a dataset: found, cut into parts, read as record batches.

A *piece* is a file, or a range of one, that can be read by itself; a *part* is a run of pieces that
one process reads at a time. Nothing here unpickles anything.
"""
