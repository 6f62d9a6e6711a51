"""Keys and values of memories: what they are, in how many bits, for which model, at which positions.

Tensors only: nothing here knows transformers, files or a catalog.
"""
