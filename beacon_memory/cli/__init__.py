"""The command line `beacon-memory`. Nothing heavy is imported before a command runs.

Everything that a command does is done by the library; here are only words, options and exit codes.
"""
