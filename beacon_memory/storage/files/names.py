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
    "base_of",
    "check_name",
    "file_name",
    "file_stem",
    "hash_id",
    "new_temp",
    "number_of",
    "segment_name",
    "stem_of",
    "temps_in",
    "version_of",
]

# Nothing else that a catalog or a bucket names becomes a path of this machine.
FILE_NAME = re.compile(r"kv/\w[\w-]{0,63}/\w[\w.-]{0,199}", re.ASCII)
NUMBERED = re.compile(r"(kv/[0-9a-f]{2}/[0-9a-f]{32}-[0-9a-f]{12})(?:-([0-9a-f]{12}))?\.(safetensors|json)")
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


def file_name(id: str, number: int) -> str:
    """Return the name of a document's K/V file with this number."""
    return segment_name(file_stem(id), number)


def number_of(name: str) -> str:
    """Return the number of a file from its name: 12 characters in front of the ending."""
    return name.rpartition(".")[0][-12:]


def segment_name(file: str, number: int) -> str:
    """Return the name of a segment with this number, of the document whose first K/V file is `file`."""
    return f"{file.removesuffix('.safetensors')}-{number:012x}.safetensors"


def base_of(name: str) -> str:
    """Return the name of the first K/V file of the document that a segment is of; of another file, the name itself."""
    numbered = NUMBERED.fullmatch(name)
    return f"{numbered[1]}.{numbered[3]}" if numbered and numbered[2] else name


def stem_of(name: str) -> str:
    """Return the beginning of a file's name that all files of its document have; see `file_stem`."""
    return name.partition("-")[0]


def version_of(name: str) -> int:
    """Return the number of a file as one that compares, 0 if its name has none: that of a later file is higher."""
    return int(number_of(name), 16) if NUMBERED.fullmatch(name) else 0


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
