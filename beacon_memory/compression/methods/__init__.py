"""Compression methods: how a text becomes memory slots, one file for each, and the door for those of others.

A method knows the model and the window in front of it; where a memory is stored, and what it is asked, it does not.
"""

from .method import CompressionMethod, Plan, Reader
from .scored import ReadWindow, ScoredMethod

__all__ = ["CompressionMethod", "Plan", "ReadWindow", "Reader", "ScoredMethod"]
