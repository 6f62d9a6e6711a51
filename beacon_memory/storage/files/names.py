"""Names of a store's files: paths below it with forward slashes, such as kv/0f/0f3a-0123456789ab.safetensors."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from beacon_memory.errors import CorruptFileError

from .durable import create_file, entries, status

__all__ = [
    "EVERYWHERE",
    "FILE_NAME",
    "NUMBERED",
    "TEMP_PREFIX",
    "check_name",
    "file_stem",
    "hash_id",
    "new_temp",
    "number_of",
    "stem_of",
    "temps_in",
    "version_of",
]

# Nothing else that a catalog or a bucket names becomes a path of this machine.
FILE_NAME = re.compile(r"kv/\w[\w-]{0,63}/\w[\w.-]{0,199}", re.ASCII)
NUMBERED = re.compile(r"kv/[0-9a-f]{2}/[0-9a-f]{32}-([0-9a-f]{12})\.(safetensors|json)")
# A name in each folder that files lie in: who syncs all of these has synced whatever was removed.
EVERYWHERE = tuple(f"kv/{number:02x}/any" for number in range(256))
TEMP_PREFIX = ".tmp"  # safetensors names its own temporary files so, too: one pattern finds what a crash left


def check_name(name: str) -> str:
    """Return a name that a store may have given a file; raises CorruptFileError for any other.

    A catalog or a bucket that somebody else wrote may name any file of this machine, such as ../../etc/passwd.
    """
    if not FILE_NAME.fullmatch(name):
        raise CorruptFileError(f"{name!r} is no name of a store's file, such as kv/0f/0f3a.safetensors; refused")
    return name


def hash_id(id: str) -> str:
    """Hash an id, which is any text, into 32 hexadecimal digits for the name of a file or folder."""
    return hashlib.sha256(id.encode()).hexdigest()[:32]


def file_stem(id: str) -> str:
    """Return the beginning of the names of all files of a document; a hyphen and a number follow it."""
    return f"kv/{hash_id(id)[:2]}/{hash_id(id)}"


def number_of(name: str) -> str:
    """Return the number of a document's version from the name of its file: 12 characters in front of the ending."""
    return name.rpartition(".")[0][-12:]


def stem_of(name: str) -> str:
    """Return the beginning of a file's name that all files of its document have; see `file_stem`."""
    return name.partition("-")[0]


def version_of(name: str) -> int:
    """Return the number of a document's version from the name of its file, 0 if it has none: a later one is higher."""
    numbered = NUMBERED.fullmatch(name)
    return int(numbered[1], 16) if numbered else 0


def temps_in(folder: Path, *, idle: float = 0.0) -> Iterator[Path]:
    """Yield the temporary files in a folder, sorted; raises StoreError if it cannot be listed.

    idle: only of those that nobody has written to for so many seconds.
    """
    for entry in entries(folder):
        if entry.name.startswith(TEMP_PREFIX):
            path = Path(entry.path)
            found = status(path) if idle else None  # none, too, if it has just got its name
            if not idle or (found and time.time() - found.st_mtime > idle):
                yield path


def new_temp(folder: Path) -> Path:
    """Create an empty temporary file in a folder; raises StoreError."""
    temp = folder / f"{TEMP_PREFIX}-{secrets.token_hex(8)}"
    create_file(temp)
    return temp
