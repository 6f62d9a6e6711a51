"""How the command line speaks: lines for people on the terminal, JSON for machines, exit codes for scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from beacon_memory.errors import BeaconMemoryError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from beacon_memory.results import Answer
    from beacon_memory.results import Progress as Advance
    from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = [
    "answer_fields",
    "compressing",
    "counting",
    "document_fields",
    "note_usage",
    "print_fields",
    "print_json",
    "print_line",
    "print_rows",
    "remarks",
    "reported",
    "row_fields",
    "say",
    "say_evicted",
]

_PIPE_COLUMNS = 10_000  # where nobody looks, no line is broken


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
    """What `list` prints of a document as JSON."""
    hidden = ("file", "content_hash", "fingerprint", "method")
    used_at = datetime.fromtimestamp(row.used_at, UTC).isoformat() if row.used_at else None
    return {name: value for name, value in asdict(row).items() if name not in hidden} | {"used_at": used_at}


def document_fields(row: DocumentRow) -> dict[str, Any]:
    """What `show` prints of a document as JSON."""
    return row_fields(row) | {"file": row.file, "fingerprint": row.fingerprint}


def print_rows(rows: Sequence[DocumentRow]) -> None:
    """A table of documents."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("id", overflow="fold")  # whole: ids are to be copied
    table.add_column("compression")
    table.add_column("kept in")
    for name in ("tokens", "slots", "ratio", "size"):
        table.add_column(name, justify="right")
    table.add_column("stored", no_wrap=True)
    for row in rows:
        ratios = "/".join(map(str, row.ratios))
        size, stored = f"{row.bytes / 1e6:.1f} MB", row.updated_at[:16].replace("T", " ")
        table.add_row(
            escape(row.id), row.compression, row.precision, f"{row.tokens:,}", f"{row.slots:,}", ratios, size, stored
        )
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)


def print_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    """Fields as one JSON object, or one on a line."""
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        shown = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
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
            f"({fields['compression']}, {fields['precision']}, {fields['bytes'] / 1e6:.1f} MB), "
            f"{fields['seconds']:.1f} s"
        )
        for id in fields["evicted"]:
            say_evicted(id)
    elif "bytes" in fields:
        print_line(f"{what}: {fields['precision']}, {fields['bytes'] / 1e6:.1f} MB")
    else:
        print_line(what)


def say_evicted(id: str) -> None:
    """What had to go to keep a quota."""
    print_line(f"evicted {id}: unused for longest, and the quota is used up", err=True)


class CompressingBar:
    """Progress of compressing documents."""

    def __init__(self, bar: Progress, documents: int, estimate: int) -> None:
        self._bar, self._estimate = bar, estimate
        self._tokens = bar.add_task("tokens", total=max(1, estimate))
        self._whole = bar.add_task("documents", total=documents)

    def document(self) -> None:
        """One document is done."""
        self._bar.advance(self._whole)

    def tokens(self, progress: Advance) -> None:
        """Some tokens are read. How many there are to read is known when the last document was begun."""
        last = self._bar.tasks[self._whole].remaining == 1
        total = progress.begun if last else max(self._estimate, progress.begun)
        self._bar.update(self._tokens, completed=progress.tokens, total=total)


@contextmanager
def compressing(documents: int, estimate: int) -> Iterator[CompressingBar]:
    """A progress bar on standard error, for so many documents of about so many tokens together."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        yield CompressingBar(bar, documents, estimate)


@contextmanager
def counting(documents: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, for so many documents; yields what is to be called for each that is done."""
    with _bar() as bar:
        task = bar.add_task("documents", total=documents)
        yield lambda: bar.advance(task)


def _bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on standard error if that is a terminal, else none."""
    from rich.progress import Progress

    console = remarks()
    # with standard output in a pipe rich would send what is printed there to the bar's console
    redirect = sys.stdout.isatty()
    return Progress(
        *columns, console=console, transient=True, redirect_stdout=redirect, disable=not console.is_terminal
    )


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
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # else only the reader of our output has gone
            typer.echo(f"error: {error}", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest of it can be written
        raise typer.Exit(1) from None
