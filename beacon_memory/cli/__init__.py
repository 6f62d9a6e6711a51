"""The command line `beacon-memory`. Nothing heavy is imported before a command runs.

The library does all the work; here are only options, messages and exit codes.
"""
