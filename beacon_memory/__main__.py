"""`python -m beacon_memory` is the command `beacon-memory`."""

from .cli import main

main()
