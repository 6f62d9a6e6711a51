"""Measures of speed and memory, each printed as one table by `beacon-memory bench`."""
