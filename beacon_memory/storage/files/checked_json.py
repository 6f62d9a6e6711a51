"""Small JSON files with a checksum of their own, so that damage to them is noticed."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beacon_memory.errors import CorruptFileError, InputError, StoreError

from .durable import make_folder, sync_file
from .names import new_temp

__all__ = ["json_checksum", "read_checked", "stage_checked"]

_FORMAT = 1
_LONGEST = 64 << 20  # bytes


def stage_checked(folder: Path, fields: Mapping[str, Any], what: str) -> Path:
    """Write fields with their checksum into a temporary file, and sync it; `what` is the subject of errors.

    Raises InputError for what would be too long to be read, StoreError if it cannot be written.
    """
    fields = {"format": _FORMAT, **fields}
    text = json.dumps({**fields, "sha256": json_checksum(fields)})
    if len(text) > _LONGEST:
        raise InputError(f"{what} would take {len(text):,} bytes; keep less in its metadata")
    make_folder(folder)
    temp = new_temp(folder)
    try:
        temp.write_text(text, encoding="utf-8")
        sync_file(temp)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise StoreError(f"{what} could not be written into {folder}: {error.strerror}") from error
    return temp


def read_checked(path: Path) -> dict[str, Any]:
    """Read the fields of a file; raises FileNotFoundError, or CorruptFileError if they are not as written.

    Raises StoreError if the machine cannot read it.
    """
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LONGEST:
            raise ValueError("it is no plain file, or too long")
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("sha256") != json_checksum(fields) or fields.pop("format") != _FORMAT:
            raise ValueError("its hash differs")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); `beacon-memory repair` writes it anew") from error
    return fields


def json_checksum(fields: object) -> str:
    """Return the sha256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
