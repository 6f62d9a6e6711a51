"""A stock transformers model that can also read with beacons, and answer behind a memory.

Nothing here knows how a document is compressed, or where it is stored.
"""
