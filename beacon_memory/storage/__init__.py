"""Documents on disk: files that hold the truth, a catalog that finds them, and what keeps the two in step.

Nothing here imports transformers: a stored document needs no model.
"""
