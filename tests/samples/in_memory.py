"""Folders in memory, where syncing costs nothing, for tests that kill processes or simulate what is on a disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")


def folder_in_memory() -> Path:
    """Make a folder in memory where there is one; whoever asks for it removes it."""
    return Path(tempfile.mkdtemp(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
