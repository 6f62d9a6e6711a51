"""The metadata of a K/V file.

One metadata entry `beacon_memory` is a JSON object:

    format    version of this form, an integer
    header    a DocumentHeader
    tensors   dtype and shape of each tensor under its name
    index     the XXH3 hash (128 bits) of the tensors that tell of the others, the hashes of these among them
    behind    of a segment: the root of the file that it continues
    sha256    of those above: the root, which stands for every byte of the file but the text, which has its own

Files of other formats are refused: those of older ones held the K/V in an order in which no part can be read apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beacon_memory.errors import CorruptFileError, InputError

from .checked_json import json_checksum
from .header import DocumentHeader

__all__ = ["ENTRY", "FORMAT_VERSION", "LONGEST_HEADER", "KVMetadata", "corrupt", "read_metadata"]

FORMAT_VERSION = 5
ENTRY = "beacon_memory"
LONGEST_HEADER = 32 << 20  # bytes; a window takes some hundreds
_LONGEST_ENTRY = LONGEST_HEADER // 4  # as JSON in JSON each quotation mark takes more
_REMEDY = "run `beacon-memory verify` to list every damaged file, and `beacon-memory repair` to mend them"
_LONGEST_FLAW = 500  # characters of an error message: it may quote what somebody wrote to do harm


@dataclass(frozen=True, slots=True)
class KVMetadata:
    """Hold what a file says of itself.

    tensors: dtype and shape of each, as `{"dtype": "torch.bfloat16", "shape": [120, 64]}`.
    index:   XXH3 of the tensors that tell of the others, in hexadecimal.
    behind:  the root of the file that a segment continues, "" for a file that is no segment.
    """

    header: DocumentHeader
    tensors: Mapping[str, Mapping[str, Any]]
    index: str
    behind: str = ""

    @property
    def described(self) -> dict[str, Any]:
        """Return the JSON object without its hash."""
        described = {"format": FORMAT_VERSION, "header": asdict(self.header), "tensors": dict(self.tensors)}
        behind = {"behind": self.behind} if self.behind else {}
        return {**described, "index": self.index, **behind}

    @property
    def root(self) -> str:
        """Return the hash that stands for the whole file, in hexadecimal."""
        return json_checksum(self.described)

    def entry(self) -> str:
        """Return the entry as it is written; raises InputError if it would be too long to be read."""
        entry = json.dumps({**self.described, "sha256": self.root})
        if len(entry) > _LONGEST_ENTRY:
            raise InputError(f"the header of {self.header.id!r} would take {len(entry)} bytes; split the document")
        return entry


def read_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[KVMetadata, str]:
    """Read the metadata of a file and its root, and check version and hash; raises CorruptFileError."""
    entry = _checked(path, metadata)
    try:
        header, behind = DocumentHeader.from_dict(entry["header"]), str(entry.get("behind", ""))
        return KVMetadata(header, dict(entry["tensors"]), str(entry["index"]), behind), str(entry["sha256"])
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
        InputError,
        CorruptFileError,
    ) as error:
        raise corrupt(path, f"its header cannot be read ({error})") from error


def _checked(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object in the metadata of a file, its version and hash checked."""
    if ENTRY not in metadata:
        raise corrupt(path, f"it has no metadata entry {ENTRY!r}, so beacon_memory did not write it")
    if len(metadata[ENTRY]) > _LONGEST_ENTRY:
        raise corrupt(path, f"its metadata entry {ENTRY!r} is longer than any of ours")
    try:
        entry = json.loads(metadata[ENTRY])
        sound = isinstance(entry, dict) and entry.get("sha256") == json_checksum(
            {name: value for name, value in entry.items() if name != "sha256"}
        )
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its metadata entry {ENTRY!r} is not JSON ({error})") from error
    version = entry.get("format") if isinstance(entry, dict) else None
    if type(version) is not int or version < 1:
        raise corrupt(path, f"its metadata entry {ENTRY!r} states no format version")
    if version > FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format {version}, written by a newer beacon_memory; this one reads format {FORMAT_VERSION}: "
            "upgrade beacon_memory, or add the document again with this version"
        )
    if version < FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format {version} of an older beacon_memory, which this one does not read: "
            "`beacon-memory recompress` makes such files anew from the texts that the store keeps"
        )
    if not sound:
        raise corrupt(path, "its header is damaged: the hash of the header differs")
    return dict(entry)


def corrupt(path: Path, flaw: str) -> CorruptFileError:
    """Return the error for a file that cannot be used, and what can be done about it."""
    shown = "".join(char if char.isprintable() else "?" for char in flaw[:_LONGEST_FLAW])
    return CorruptFileError(f"{path} cannot be used: {shown}; {_REMEDY}")
