"""The files of a store, in a folder or in a backend, each whole from the moment in which it is seen.

Nothing here knows SQL: a file describes itself.
"""
