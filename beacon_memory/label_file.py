"""A document's label as a small file beside its K/V, so that a lost catalog loses nothing.

A JSON object: `format`, `id`, `created_at`, the fields of a `Label`, and `sha256` of all these. Unlike a K/V file it is
replaced when the label changes; while the catalog is there, the row is what counts.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from .document import Label, check_id
from .durable import make_folder, sync_file
from .errors import CorruptFileError, InputError, StoreError
from .files import TEMP_PREFIX

__all__ = ["StoredLabel", "label_name", "read_label", "stage_label"]

_FORMAT = 1
_LONGEST = 64 << 20  # bytes


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """What is known of a document beside its K/V and text."""

    id: str
    created_at: str
    label: Label


def label_name(file: str) -> str:
    """The name of the label beside a K/V file."""
    return file.removesuffix(".safetensors") + ".json"


def stage_label(folder: Path, stored: StoredLabel) -> Path:
    """Write and sync a temporary file into a folder.

    Raises InputError for a label that would be too long to be read, StoreError if it cannot be written.
    """
    fields = {"format": _FORMAT, "id": stored.id, "created_at": stored.created_at, **asdict(stored.label)}
    text = json.dumps({**fields, "sha256": _seal(fields)})
    if len(text) > _LONGEST:
        raise InputError(f"the label of {stored.id!r} would take {len(text):,} bytes; keep less in its metadata")
    make_folder(folder)
    temp = folder / f"{TEMP_PREFIX}-{secrets.token_hex(8)}"
    try:
        temp.write_text(text, encoding="utf-8")
        sync_file(temp)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise StoreError(f"the label of {stored.id!r} could not be written into {folder}: {error.strerror}") from error
    return temp


def read_label(path: Path) -> StoredLabel:
    """Read a label; raises FileNotFoundError, or CorruptFileError for anything that `stage_label` did not write."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > _LONGEST:
            raise ValueError("it is no plain file, or too long")
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("sha256") != _seal(fields) or fields.pop("format") != _FORMAT:
            raise ValueError("its hash differs")
        id, created_at = check_id(fields.pop("id")), fields.pop("created_at")
        if not isinstance(created_at, str) or not created_at.isascii():
            raise ValueError(f"created_at is {created_at!r}")
        return StoredLabel(id, created_at, Label(**fields))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError) as error:
        raise CorruptFileError(f"{path} is not a label ({error}); `beacon-memory repair` writes it anew") from error


def _seal(fields: object) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
