"""Measurements of speed and memory, which `beacon-memory bench` prints as a table."""
