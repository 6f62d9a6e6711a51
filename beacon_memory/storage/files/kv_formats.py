"""The metadata of a K/V file, in the present format and in older ones.

One metadata entry `beacon_memory` is a JSON object:

    format    version of this form, an integer
    header    a DocumentHeader
    tensors   dtype and shape of each tensor under its name, `xxh3`, the XXH3 hash (128 bits) of all, and of quantized
              ones `rotated`
    sha256    of the three above, so that a damaged header is noticed whenever it is read

Older files are still read. In format 3 nothing is rotated. In format 2 nothing is quantized, there is no text, windows
have no span of their own, nothing says how tokens were chosen, and a `sha256` is in the place of `xxh3`. In format 1 a
file is a stack of beacons, `keys` and `values` [layers, kv_heads, slots, head_dim], with one dtype and shape for both,
and neither compression nor span in the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from beacon_memory.errors import CorruptFileError, InputError

from .checked_json import json_checksum
from .header import DocumentHeader, WindowSpan

__all__ = ["ENTRY", "FORMAT_VERSION", "LONGEST_ENTRY", "LONGEST_HEADER", "SCALES", "corrupt", "read_entry"]

FORMAT_VERSION = 4
ENTRY = "beacon_memory"
LONGEST_HEADER = 32 << 20  # bytes; a window takes about a hundred
LONGEST_ENTRY = LONGEST_HEADER // 4  # as JSON in JSON each quotation mark takes more
SCALES = ("key_scales", "key_zeros", "value_scales", "value_zeros")
_PLAIN = ("counts", "keys", "places", "values")
_REMEDY = "run `beacon-memory verify` to list every damaged file, and `beacon-memory repair` to mend them"
_LONGEST_FLAW = 500  # characters of an error message: it may quote what somebody wrote to do harm


def read_entry(path: Path, metadata: Mapping[str, str]) -> tuple[DocumentHeader, dict[str, Any]]:
    """Read the metadata of a file in any format, and check version and checksum; raises CorruptFileError.

    Returns the header and a description of the tensors: dtype and shape of each under its name, their hash as `xxh3`
    or `sha256`, and `rotated` of quantized ones.
    """
    entry = _checked(path, metadata)
    version = entry["format"]
    try:
        header, tensors = entry["header"], entry["tensors"]
        if version == 1:
            form = {"dtype": tensors["dtype"], "shape": tensors["shape"]}
            header = {**header, "compression": "beacon", "span": form["shape"][2]}
            described = {"keys": form, "values": form, "sha256": tensors["sha256"]}
        elif version == 2:
            described = {name: tensors[name] for name in (*_PLAIN, "sha256")}
        else:
            scales = SCALES if "key_scales" in tensors else ()
            rotated = ("rotated",) if scales and version > 3 else ()
            described = {name: tensors[name] for name in (*_PLAIN, *scales, "text", "xxh3", *rotated)}
        if version < 3:
            header = {**header, "windows": _with_spans(header), "method": None}
        return DocumentHeader.from_dict(header), described
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError, InputError, CorruptFileError) as error:
        raise corrupt(path, f"its header cannot be read ({error})") from error


def _checked(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON object in the metadata of a file, its version and checksum checked."""
    if ENTRY not in metadata:
        raise corrupt(path, f"it has no metadata entry {ENTRY!r}, so beacon_memory did not write it")
    if len(metadata[ENTRY]) > LONGEST_ENTRY:
        raise corrupt(path, f"its metadata entry {ENTRY!r} is longer than any of ours")
    try:
        entry = json.loads(metadata[ENTRY])
        sound = isinstance(entry, dict) and entry.pop("sha256", None) == json_checksum(entry)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"its metadata entry {ENTRY!r} is not JSON ({error})") from error
    version = entry.get("format") if isinstance(entry, dict) else None
    if type(version) is not int or version < 1:
        raise corrupt(path, f"its metadata entry {ENTRY!r} states no format version")
    if version > FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format {version}, written by a newer beacon_memory; this one reads formats up to "
            f"{FORMAT_VERSION}: upgrade beacon_memory, or add the document again with this version"
        )
    if not sound:
        raise corrupt(path, "its header is damaged: the digest of the header differs")
    return dict(entry)


def _with_spans(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the windows of an older header the span that each takes; of `hybrid` the last one has that of all."""
    windows = [WindowSpan(**window, span=0) for window in header["windows"]]
    by_compression = {"beacon": [one.slots for one in windows], "select": [one.tokens for one in windows]}
    spans = by_compression.get(header["compression"], [0] * (len(windows) - 1) + [header["span"]] * bool(windows))
    return [asdict(window) | {"span": span} for window, span in zip(windows, spans, strict=True)]


def corrupt(path: Path, flaw: str) -> CorruptFileError:
    """Return the error for a file that cannot be used, and what can be done about it."""
    shown = "".join(char if char.isprintable() else "?" for char in flaw[:_LONGEST_FLAW])
    return CorruptFileError(f"{path} cannot be used: {shown}; {_REMEDY}")
