"""Keys and values of memories: their form, their precision, the model they belong to, and their positions.

Tensors only: nothing here knows transformers, files or a catalog.
"""
