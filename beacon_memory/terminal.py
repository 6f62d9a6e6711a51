"""How the command line speaks: lines for people on the terminal, JSON for machines, exit codes for scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from .errors import BeaconMemoryError

if TYPE_CHECKING:
    from rich.console import Console

    from .catalog import DocumentRow
    from .results import Answer

__all__ = [
    "answer_fields",
    "note_usage",
    "print_fields",
    "print_json",
    "print_line",
    "print_rows",
    "remarks",
    "reported",
    "row_fields",
    "say",
]


def remarks() -> Console:
    """The console for what stands beside a command's output: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_line(text: str, *, err: bool = False) -> None:
    """One line at once; unlike `typer.echo` above a progress bar, if there is one."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def print_json(fields: object) -> None:
    """One JSON value on one line."""
    print_line(json.dumps(fields, ensure_ascii=False))


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer as flat JSON fields."""
    return {
        "answer": answer.text,
        "ids": list(answer.ids),
        **asdict(answer.usage),
        "time_to_first_token": answer.time_to_first_token,
        "seconds": answer.seconds,
    }


def note_usage(answer: Answer) -> None:
    """What an answer rests on, beside it."""
    usage = answer.usage
    remarks().print(
        f"from {', '.join(answer.ids)}: {usage.slots:,} slots, {usage.prompt_tokens} prompt and "
        f"{usage.generated_tokens} generated tokens, first token after {answer.time_to_first_token:.2f} s",
        style="dim",
        markup=False,
    )


def row_fields(row: DocumentRow) -> dict[str, Any]:
    """A catalog row as JSON fields."""
    names = ("id", "compression", "tokens", "slots", "bytes", "ratios", "metadata", "created_at", "updated_at")
    return {name: getattr(row, name) for name in names}


def print_rows(rows: Sequence[DocumentRow]) -> None:
    """A table of documents."""
    from rich import print as rich_print
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "compression", box=None, pad_edge=False)
    for name in ("tokens", "slots", "ratio", "size"):
        table.add_column(name, justify="right")
    table.add_column("stored")
    for row in rows:
        ratios = "/".join(map(str, row.ratios))
        size, stored = f"{row.bytes / 1e6:.1f} MB", row.updated_at[:16].replace("T", " ")
        table.add_row(escape(row.id), row.compression, f"{row.tokens:,}", f"{row.slots:,}", ratios, size, stored)
    rich_print(table)


def print_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    """Fields as one JSON object, or one on a line."""
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else value
        typer.echo(f"{name:12} {shown}")


def say(as_json: bool, fields: Mapping[str, Any]) -> None:
    """What became of one document: a JSON line, or a line for people (on standard error if something is wrong)."""
    if as_json:
        print_json(fields)
        return
    what = f"{fields['status']} {fields['id']}"
    if "reason" in fields:
        print_line(f"{what}: {fields['reason']}", err=True)
    elif "tokens" in fields:
        print_line(
            f"{what}: {fields['tokens']:,} tokens in {fields['slots']:,} slots "
            f"({fields['compression']}, {fields['bytes'] / 1e6:.1f} MB), {fields['seconds']:.1f} s"
        )
    else:
        print_line(what)


@contextmanager
def reported(interrupted: str = "whatever was finished is stored") -> Iterator[None]:
    """End a command with a message and an exit code instead of a traceback.

    interrupted: what to say after Ctrl-C.
    """
    try:
        yield
    except BeaconMemoryError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {interrupted}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
