"""A document's label as a small file beside its K/V, so that a lost catalog loses nothing.

A JSON object: `format`, `id`, `namespace`, `created_at`, `updated_at`, the fields of a `Label`, and `sha256` of all
these. Unlike a K/V file it is replaced when the label changes. The row counts, unless the file is newer: then the
catalog has lost what was committed last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from beacon_memory.documents import Label, check_id, check_namespace
from beacon_memory.errors import CorruptFileError, InputError

from .checked_json import read_checked, stage_checked

__all__ = ["StoredLabel", "label_name", "read_label", "stage_label"]


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """Hold the label of a document, with its id, the namespace that it is in, and its time of creation.

    updated_at: of the row that it was written for. Later rows have later ones.
    """

    id: str
    namespace: str
    created_at: str
    label: Label
    updated_at: str


def label_name(file: str) -> str:
    """Return the name of the label of a K/V file."""
    return file.removesuffix(".safetensors") + ".json"


def stage_label(folder: Path, stored: StoredLabel) -> Path:
    """Write a label into a temporary file, and sync it; raises as `stage_checked`."""
    times = {"created_at": stored.created_at, "updated_at": stored.updated_at}
    fields = {"id": stored.id, "namespace": stored.namespace, **times, **asdict(stored.label)}
    return stage_checked(folder, fields, f"the label of {stored.id!r}")


def read_label(path: Path) -> StoredLabel:
    """Read a label; raises FileNotFoundError, or CorruptFileError for anything that `stage_label` did not write."""
    fields = read_checked(path)
    try:
        id, namespace = check_id(fields.pop("id")), check_namespace(fields.pop("namespace"))
        times = fields.pop("created_at"), fields.pop("updated_at")
        if not all(isinstance(time, str) and time.isascii() for time in times):
            raise ValueError(f"created_at and updated_at are {times!r}")
        return StoredLabel(id, namespace, times[0], Label(**fields), times[1])
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise CorruptFileError(f"{path} is no label ({error}); `beacon-memory repair` writes it anew") from error
