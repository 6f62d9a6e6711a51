"""The process of a command. It is the command's own, so it may be set up in ways that a library must not choose."""

from __future__ import annotations

import gc
import os

__all__ = ["begin", "end", "imported"]

# How threads wait for others: they look for some microseconds, and then sleep. The first is GNU's OpenMP's own, which
# goes before the second, by which those of others sleep at once.
_WAITING = {"GOMP_SPINCOUNT": "3000", "OMP_WAIT_POLICY": "passive"}
_CHOSEN = (*_WAITING, "KMP_BLOCKTIME")  # if the user's environment has one of these, it stays as it is


def begin() -> None:
    """Set up a process, before anything heavy is imported.

    Threads that wait for others soon sleep: if they look on and on, as torch has them do, two commands on one machine
    take the processors from each other; if they sleep at once, waking them takes longer than what a layer of a small
    model computes. No garbage is looked for until `imported`.
    """
    if not any(name in os.environ for name in _CHOSEN):
        os.environ |= _WAITING
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
