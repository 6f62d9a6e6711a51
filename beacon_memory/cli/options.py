"""Options that several commands share, what is opened by them, and how sizes and times are written."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.documents import Precision, PrecisionRule
from beacon_memory.errors import InputError

if TYPE_CHECKING:
    from beacon_memory.memory import BeaconMemory
    from beacon_memory.storage.store import MemoryStore

__all__ = [
    "PRECISION",
    "Adapter",
    "AsJson",
    "Compression",
    "Device",
    "Dtype",
    "DtypeOption",
    "Model",
    "Namespace",
    "Score",
    "ScoreOption",
    "Store",
    "expiry",
    "open_memory",
    "open_store",
    "quiet",
    "size",
]


class Dtype(StrEnum):
    """What the model computes in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Compression(StrEnum):
    """What becomes of a text."""

    AUTO = "auto"
    BEACON = "beacon"
    SELECT = "select"
    HYBRID = "hybrid"


class Score(StrEnum):
    """How tokens are chosen."""

    REPEAT = "repeat"
    EXPECTED = "expected"


Store = Annotated[
    Path | None,
    typer.Option(envvar="BEACON_MEMORY_STORE", help="Folder of the store.", show_default="the user's data folder"),
]
Namespace = Annotated[
    str,
    typer.Option(
        envvar="BEACON_MEMORY_NAMESPACE", help="Part of the store to work in; it sees no other.", show_default="none"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(envvar="BEACON_MEMORY_MODEL", help="Base model: folder or hub name.", show_default="the embedded one"),
]
Adapter = Annotated[
    str | None,
    typer.Option(envvar="BEACON_MEMORY_ADAPTER", help="Beacon adapter for it: folder or hub name."),
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cuda, cpu, ...", show_default="the fastest")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What to compute in; auto: as the model was saved.")]
ScoreOption = Annotated[
    Score,
    typer.Option(
        "--score",
        help="How select and hybrid choose tokens: repeat, by what heads read of them while the model repeats the "
        "text; expected, by the attention to be expected, which is worse and saves a pass.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _precision(text: str) -> Precision | PrecisionRule:
    """Return the precision that a user names, or `auto`."""
    try:
        return PrecisionRule.AUTO if text == PrecisionRule.AUTO else Precision(text)
    except InputError:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, _PRECISIONS))}.") from None


_PRECISIONS = (PrecisionRule.AUTO.value, *(one.value for one in Precision))
# How typer reads an option that takes a precision or `auto`
PRECISION: dict[str, Any] = {"parser": _precision, "metavar": f"[{'|'.join(_PRECISIONS)}]"}

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_MOST_BYTES = 2**63 - 1  # that a catalog can hold as a number


def expiry(ttl: str) -> str:
    """When a time to live such as 90m, 12h or 30d from now is over, as ISO 8601 in UTC; else raises InputError."""
    written = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", ttl)
    try:
        if written is not None:
            return (datetime.now(UTC) + timedelta(seconds=int(written[1]) * _SECONDS[written[2]])).isoformat()
    except OverflowError:  # after the year 9999
        pass
    raise InputError(f"--ttl must be a whole number with s, m, h, d or w, such as 90m, 12h or 30d, got {ttl!r}")


def size(option: str, text: str) -> int | None:
    """Bytes of a size such as 500MB or 10GB (powers of 1,000), None for `none`; else raises InputError."""
    if text == "none":
        return None
    written = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)b?", text.lower())
    bytes_ = int(Decimal(written[1]) * _BYTES[written[2]]) if written else _MOST_BYTES + 1
    if bytes_ > _MOST_BYTES:
        raise InputError(f"{option} must be bytes, such as 500MB, 10GB or 2TB, or none, got {text!r}")
    return bytes_


def default_store() -> Path:
    """The store of a user who names none."""
    import platformdirs

    return platformdirs.user_data_path("beacon-memory") / "store"


def open_store(store: Path | None, namespace: str) -> MemoryStore:
    """The store that a command names, without a model."""
    from beacon_memory.storage.store import MemoryStore

    return MemoryStore(store or default_store(), namespace)


def open_memory(
    store: Path | None,
    namespace: str,
    model: str | None,
    adapter: str | None,
    device: str | None,
    dtype: Dtype,
    score: Score = Score.REPEAT,
) -> BeaconMemory:
    """The store that a command names, with its model."""
    from beacon_memory.memory import BeaconMemory

    quiet()
    return BeaconMemory(
        store or default_store(),
        model,
        adapter,
        namespace=namespace,
        device=device,
        dtype=dtype.value,
        score=score.value,
    )


def quiet() -> None:
    """No progress bars for loading weights, which take no time worth showing."""
    from transformers.utils import logging

    logging.disable_progress_bar()
