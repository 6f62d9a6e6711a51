"""The index of a store: a row for each document, its text in passages, and their full-text index.

Nothing here imports torch: the catalog holds no tensors.
"""
