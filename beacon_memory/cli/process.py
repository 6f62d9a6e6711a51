"""The process of a command. It is the command's own, so it may be set up in ways that a library must not choose."""

from __future__ import annotations

import gc
import os

__all__ = ["begin", "end", "imported"]

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def begin() -> None:
    """Set up a process, before anything heavy is imported.

    Threads that wait for others sleep, unless the user's environment says how they are to wait: while they spin, two
    commands on one machine take the processors from each other. No garbage is looked for until `imported`.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    gc.disable()


def imported() -> None:
    """Look for garbage again, if `begin` was called, but not among what was imported, which stays to the end.

    Torch and transformers make more than a million objects. Python looks through all of them, again and again, while
    they are made, and that takes a fifth of the time.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def end() -> None:
    """Let the process end at once: Python's last look for garbage would take longer than a short answer."""
    gc.freeze()
