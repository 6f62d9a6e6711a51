"""A stock transformers model that can also read with beacons and answer with a memory as its prefix.

Nothing here knows how a document is compressed, or where it is stored.
"""
