"""`python -m beacon_memory` is the command `beacon-memory`."""

from .cli.main import main

main()
