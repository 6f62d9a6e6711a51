"""Options that several commands share, the stores and models that they name, and sizes and times as texts."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.documents import Precision, PrecisionRule
from beacon_memory.errors import ConfigError, InputError

from . import process

if TYPE_CHECKING:
    from beacon_memory.memory import BeaconMemory
    from beacon_memory.storage.store import MemoryStore

__all__ = [
    "PRECISION",
    "Adapter",
    "AsJson",
    "CompressionOption",
    "Device",
    "Dtype",
    "DtypeOption",
    "Model",
    "Namespace",
    "Picker",
    "Score",
    "ScoreOption",
    "Store",
    "expiry",
    "file_given",
    "folder_given",
    "name_given",
    "open_memory",
    "open_store",
    "path_given",
    "quiet",
    "read_schema",
    "size",
    "template_arguments",
]


class Dtype(StrEnum):
    """The dtype that the model computes in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Score(StrEnum):
    """The score by which tokens are chosen."""

    AUTO = "auto"
    REPEAT = "repeat"
    EXPECTED = "expected"


def _installed(name: str) -> str:
    """Refuse a compression method that is not installed; the built-in ones are known without importing them."""
    if name not in ("auto", "beacon", "select", "hybrid"):
        from beacon_memory.compression.methods.registry import find

        try:
            find(name)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def name_given(text: str) -> str:
    """Refuse an empty text where a name is needed: a script that names an unset variable passes it on."""
    if not text:
        raise typer.BadParameter("it is empty, as if a variable were not set.")
    return text


def path_given(text: str | Path) -> Path:
    """Return a path; refuses an empty text, which Python takes for the current folder."""
    if text == "":
        raise typer.BadParameter("it is empty, as if a variable were not set; the current folder is '.'.")
    return Path(text)


def store_given(text: str | Path) -> str | Path:
    """Return the URL of a store in a database, or the path of its folder."""
    return text if isinstance(text, str) and "://" in text else path_given(text)


def file_given(text: str | Path) -> Path:
    """Return the path of a file to read."""
    if _there(text).is_dir():
        raise typer.BadParameter(f"{str(text)!r} is a folder.")
    return Path(text)


def folder_given(text: str | Path) -> Path:
    """Return the path of a folder to read."""
    if not _there(text).is_dir():
        raise typer.BadParameter(f"{str(text)!r} is no folder.")
    return Path(text)


def _there(text: str | Path) -> Path:
    if not (found := path_given(text)).exists():
        raise typer.BadParameter(f"{str(text)!r} does not exist.")
    return found


Store = Annotated[
    Any,  # str | Path | None: typer takes no unions
    typer.Option(
        envvar="BEACON_MEMORY_STORE",
        help="Folder of the store, or the URL of a PostgreSQL database that many machines share.",
        show_default="the user's data folder",
        parser=store_given,
        metavar="DIR",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        envvar="BEACON_MEMORY_NAMESPACE", help="Part of the store to work in; it sees no other.", show_default="none"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        envvar="BEACON_MEMORY_MODEL",
        help="Base model: folder, GGUF file or hub name.",
        show_default="the embedded one",
        parser=name_given,
        metavar="NAME",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        envvar="BEACON_MEMORY_ADAPTER",
        help="Beacon adapter for it: folder or hub name.",
        parser=name_given,
        metavar="NAME",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cuda, cpu, ...", show_default="the fastest", parser=name_given, metavar="NAME"
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="What to compute in; auto: as the model was saved, or float32 on a processor that is slower in 16 bits.",
    ),
]
CompressionOption = Annotated[
    str,
    typer.Option(
        "--compression",
        help="beacon: beacons of the adapter; select: K/V of the tokens that each head needs, works without an "
        "adapter; hybrid: both; the name of another method that is installed; auto: what the adapter asks for, select "
        "without one.",
        callback=_installed,
    ),
]
ScoreOption = Annotated[
    Score,
    typer.Option(
        "--score",
        help="How select and hybrid choose tokens. repeat: by the attention that they get while the model repeats the "
        "text; expected: by a prediction of that, which saves a pass; auto: expected if the adapter has a probe for "
        "it, else repeat; what is appended, as the document before it.",
    ),
]
Picker = Annotated[
    str,
    typer.Option(
        envvar="BEACON_MEMORY_PICKER",
        help="How documents and their passages are found. text: by the words that they share with the question; "
        "attention: where words do not tell which passages are meant, also by what the model looks up, which takes a "
        "little longer; or the name of an installed picker.",
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
_MOST_BYTES = 2**63 - 1  # the largest number that a catalog can hold


def expiry(ttl: str) -> str:
    """Return the end of a time to live, such as 90m, 12h or 30d from now, as ISO 8601 in UTC.

    Raises InputError for any other text.
    """
    written = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", ttl)
    try:
        if written is not None:
            return (datetime.now(UTC) + timedelta(seconds=int(written[1]) * _SECONDS[written[2]])).isoformat()
    except OverflowError:  # after the year 9999
        pass
    raise InputError(f"--ttl must be a whole number with s, m, h, d or w, such as 90m, 12h or 30d, got {ttl!r}")


def size(option: str, text: str) -> int | None:
    """Return the bytes of a size such as 500MB or 10GB (powers of 1,000), or None for `none`.

    Raises InputError for any other text.
    """
    if text == "none":
        return None
    written = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)b?", text.lower())
    bytes_ = int(Decimal(written[1]) * _BYTES[written[2]]) if written else _MOST_BYTES + 1
    if bytes_ > _MOST_BYTES:
        raise InputError(f"{option} must be bytes, such as 500MB, 10GB or 2TB, or none, got {text!r}")
    return bytes_


def template_arguments(text: str | None) -> Any:
    """Return what --chat-template-kwargs hands to a chat template; raises InputError for what is no JSON."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"--chat-template-kwargs must be a JSON object, got {text!r}: {error}") from error


def read_schema(path: Path) -> Any:
    """Return the JSON schema that --schema names; raises InputError for a file that has none."""
    try:
        schema = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--schema {path} cannot be read as JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InputError(f'--schema {path} must be a JSON object such as {{"type": "object"}}, got {schema!r:.100}')
    return schema


def default_store() -> Path:
    """Return the folder of the store that is used if none is named."""
    import platformdirs

    return platformdirs.user_data_path("beacon-memory") / "store"


def open_store(store: str | Path | None, namespace: str) -> MemoryStore:
    """Open the store that a command names, without a model."""
    from beacon_memory.storage.store import MemoryStore

    process.imported()
    return MemoryStore(store or default_store(), namespace)


def open_memory(
    store: str | Path | None,
    namespace: str,
    model: str | None,
    adapter: str | None,
    device: str | None,
    dtype: Dtype,
    score: Score = Score.AUTO,
    picker: str = "attention",
) -> BeaconMemory:
    """Open the store that a command names, with a model."""
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
        picker=picker,
    )


def quiet() -> None:
    """Switch off the progress bars of loading weights, which takes little time; after what loads them was imported."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    process.imported()
