"""Lists of an index on a device: what is kept there, brought there ahead of a search, and scanned there, exactly.

`devices` says what a device must do; `simulated` is one that keeps time by a model, `cuda` is a GPU (or any device of
torch). `cache` decides which lists lie in its pages, `hybrid` scans those beside the CPU, `lookahead` predicts what a
coming search will probe, and `retriever` puts the four together. Importing this package loads nothing.
"""
