"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Adapter", "AsJson", "Compression", "Device", "Dtype", "DtypeOption", "Model", "Score", "Store"]


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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
