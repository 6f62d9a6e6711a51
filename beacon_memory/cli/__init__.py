"""The command line `beacon-memory`. Nothing heavy is imported before a command runs.

The library does all the work; here are only options, messages and exit codes. Modules that hold commands do without
`from __future__ import annotations`: typer would evaluate the annotations of all commands, thrice, before it does
anything.
"""
