"""The output of the command line: lines for people on the terminal, JSON for machines, exit codes for scripts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beacon_memory.errors import BeaconMemoryError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from beacon_memory.results import Answer
    from beacon_memory.results import Progress as Advance
    from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = [
    "CompressingBar",
    "answer_fields",
    "compressing",
    "counting",
    "document_fields",
    "note_sources",
    "note_usage",
    "prepare_streams",
    "print_as_it_is",
    "print_fields",
    "print_json",
    "print_line",
    "print_rows",
    "print_text",
    "remarks",
    "reported",
    "row_fields",
    "say",
    "say_evicted",
    "say_gone",
    "shown",
]

_LINES = "\n\t"
_SPEED_SECONDS = 600  # of which an estimate is made: a pass may take many, and each as long as any other
_MOST_SOURCES = 20  # passages that are shown
_PIPE_COLUMNS = 10_000  # so that no line is broken in a pipe
_STDERR = 2  # the last number of a standard stream
# What moves the cursor, changes colours or turns the direction: an id may be any text, and so may what a model answers
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters, but those to keep, as JSON escapes: \u001b."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)


def prepare_streams() -> None:
    """Let standard output and error take any text, and put the null device in the place of streams that are closed.

    A character that their encoding lacks is written as an escape.
    """
    # the number of a closed stream goes to the next file that is opened, and whatever a library writes there with it
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for good
        else:
            stream.reconfigure(errors="backslashreplace")


def remarks() -> Console:
    """Return the console for remarks that are not part of a command's output: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_line(text: str = "", *, keep: str = "", err: bool = False) -> None:
    """Print one line at once, see `shown`. Unlike `typer.echo`, this works while a progress bar is shown."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{shown(text, keep)}\n")
    stream.flush()


def print_text(text: str) -> None:
    """Print a text of any lines: into a pipe as it is, on a terminal see `shown`."""
    sys.stdout.write(shown(text, keep=_LINES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_as_it_is(text: str) -> None:
    """Print a text as `print_text` does; raises InputError if the output's encoding lacks one of its characters."""
    try:
        text.encode(_encoding())
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds {text[error.start]!a}, which {error.encoding}, the encoding of standard output, lacks; "
            "set PYTHONIOENCODING=utf-8, or use --json"
        ) from None
    print_text(text)


def print_json(fields: object) -> None:
    """Print one JSON value on one line, with JSON's escapes for characters that the output's encoding lacks."""
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode(_encoding())
    except UnicodeEncodeError:
        line = json.dumps(fields)
    print_line(line)


def _encoding() -> str:
    return sys.stdout.encoding or "utf-8"


def answer_fields(answer: Answer) -> dict[str, Any]:
    """Return an answer as flat JSON fields."""
    return {
        "answer": answer.text,
        "ids": list(answer.ids),
        **asdict(answer.usage),
        "time_to_first_token": answer.time_to_first_token,
        "seconds": answer.seconds,
        "sources": [asdict(source) for source in answer.sources],
        "supported": answer.supported,
        "evidence": None if answer.evidence is None else asdict(answer.evidence),
    }


def note_usage(answer: Answer) -> None:
    """Print the documents that an answer comes from, its costs, and whether it is in doubt."""
    usage, doubt = answer.usage, "; it is perhaps not in memory" if answer.supported is False else ""
    remarks().print(
        f"from {shown(', '.join(answer.ids))}: {usage.slots:,} slots, {usage.prompt_tokens} prompt and "
        f"{usage.generated_tokens} generated tokens, first token after {answer.time_to_first_token:.2f} s{doubt}",
        style="dim",
        markup=False,
    )


def note_sources(answer: Answer, text_of: Callable[[str], str]) -> None:
    """Print the passages that an answer was given from, the most relevant first, and how much of each was loaded.

    text_of: the text of a document.
    """
    texts = {id: text_of(id) for id in answer.ids}
    ranked = sorted(answer.sources, key=lambda source: (source.relevance, source.loaded), reverse=True)
    for source in ranked[:_MOST_SOURCES]:
        excerpt = " ".join(texts[source.document][source.start : source.stop].split())
        place = f"{shown(source.document)} {source.start}-{source.stop}, {source.loaded:.0%} loaded"
        if source.relevance:
            place += f", relevance {source.relevance:.1f}"
        remarks().print(f"  {place}: {shown(excerpt)}", style="dim", markup=False)
    if len(ranked) > _MOST_SOURCES:
        remarks().print(f"  and {len(ranked) - _MOST_SOURCES} more passages", style="dim", markup=False)


def row_fields(row: DocumentRow) -> dict[str, Any]:
    """Return the fields of a document that `list` prints as JSON."""
    hidden = ("file", "segments", "content_hash", "fingerprint", "method", "root")
    used_at = datetime.fromtimestamp(row.used_at, UTC).isoformat() if row.used_at else None
    return {name: value for name, value in asdict(row).items() if name not in hidden} | {"used_at": used_at}


def document_fields(row: DocumentRow) -> dict[str, Any]:
    """Return the fields of a document that `show` prints as JSON."""
    return row_fields(row) | {"file": row.file, "fingerprint": row.fingerprint}


def print_rows(rows: Sequence[DocumentRow]) -> None:
    """Print a table of documents."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("id", overflow="fold")  # never shortened, so that ids can be copied
    table.add_column("compression")
    table.add_column("kept in")
    for name in ("tokens", "slots", "ratio", "size"):
        table.add_column(name, justify="right")
    table.add_column("stored", no_wrap=True)
    for row in rows:
        ratios = "/".join(map(str, row.ratios))
        size, stored = f"{row.bytes / 1e6:.1f} MB", row.updated_at[:16].replace("T", " ")
        table.add_row(
            escape(shown(row.id)),
            row.compression,
            row.precision,
            f"{row.tokens:,}",
            f"{row.slots:,}",
            ratios,
            size,
            stored,
        )
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)


def print_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    """Print fields as one JSON object, or one per line."""
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        told = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
        print_line(f"{name:12} {told}")


def say(as_json: bool, fields: Mapping[str, Any]) -> None:
    """Print the result for one document: a JSON line, or a line for people (on standard error if it has failed)."""
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
    """Print that a document was evicted to keep a quota."""
    print_line(f"evicted {id}: unused for longest, and the quota is used up", err=True)


def say_gone(id: str) -> None:
    """Print that a document was left out, since somebody removed it meanwhile."""
    print_line(f"left out {id}: it was removed, or has expired, before its turn", err=True)


class CompressingBar:
    """A progress bar for compressing documents."""

    def __init__(self, bar: Progress, documents: int, estimate: int) -> None:
        self._bar, self._estimate = bar, estimate
        self._tokens = bar.add_task("tokens", total=max(1, estimate))
        self._whole = bar.add_task("documents", total=documents)

    def document(self) -> None:
        """Count one document as done."""
        self._bar.advance(self._whole)

    def tokens(self, progress: Advance) -> None:
        """Show how many tokens are read. Their total is an estimate until the last document has begun."""
        last = self._bar.tasks[self._whole].remaining == 1
        total = progress.begun if last else max(self._estimate, progress.begun)
        read = last and progress.tokens == progress.begun
        doing = "storing" if read else "tokens"  # which takes a while, too, for a long document
        self._bar.update(self._tokens, description=doing, completed=progress.tokens, total=total)


@contextmanager
def compressing(documents: int, estimate: int) -> Iterator[CompressingBar]:
    """Show a progress bar on standard error, for documents that have about `estimate` tokens together."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        yield CompressingBar(bar, documents, estimate)


@contextmanager
def counting(documents: int | None) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error; yields a function to call for each document that is done."""
    with _bar() as bar:
        task = bar.add_task("documents", total=documents)
        yield lambda: bar.advance(task)


@contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error; yields a function to call with how many are read, and will be."""
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on standard error that is shown only if that is a terminal."""
    from rich.progress import Progress

    console = remarks()
    # if standard output is a pipe, rich would print to the bar's console what belongs into the pipe
    redirect = sys.stdout.isatty()
    return Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=redirect,
        disable=not console.is_terminal,
        speed_estimate_period=_SPEED_SECONDS,
    )


@contextmanager
def reported(interrupted: str = "whatever was finished is stored") -> Iterator[None]:
    """End a command with a message and an exit code instead of a traceback.

    interrupted: message after Ctrl-C.
    """
    try:
        yield
    except BeaconMemoryError as error:
        print_line(f"error: {error}", keep=_LINES, err=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print_line(f"\ninterrupted; {interrupted}", keep=_LINES, err=True)
        raise SystemExit(130) from None
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # else the program that reads the output has ended
            print_line(f"error: {error}", keep=_LINES, err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the rest of the output can be written
        raise SystemExit(1) from None
