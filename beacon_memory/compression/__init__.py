"""Texts to memories: by beacons, by chosen tokens, or by both.

Nothing here knows where a memory is stored, or what it is asked.
"""
