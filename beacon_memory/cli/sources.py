"""Which texts `beacon-memory add` means: files, folders, globs and standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from beacon_memory.errors import InputError

__all__ = ["Skipped", "Source", "find_sources", "read_source"]

STDIN = "-"
TEXT_SUFFIXES = frozenset({"", ".text", ".txt", ".markdown", ".md", ".rst"})


@dataclass(frozen=True, slots=True)
class Source:
    """A text that is to be read: its document id, and its file (None for standard input)."""

    id: str
    path: Path | None

    @property
    def size(self) -> int:
        """Bytes to be read, as far as known beforehand."""
        return self.path.stat().st_size if self.path is not None else 0


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was passed over, and why."""

    path: Path
    reason: str


def find_sources(paths: Iterable[str], id: str | None = None) -> tuple[list[Source], list[Skipped]]:
    """The texts behind files, folders (with all below them, hidden files left out), globs and `-`.

    A document's id is its path as given, or `id`, which then must belong to a single text. Raises InputError for a path
    that does not exist, standard input without an id, or an id for several texts.
    """
    sources: list[Source] = []
    skipped: list[Skipped] = []
    for path in paths:
        if path == STDIN:
            if id is None:
                raise InputError("a text from standard input has no name of its own: give it one with --id")
            sources.append(Source(id, None))
            continue
        for file in _files(path):
            if file.suffix.lower() in TEXT_SUFFIXES:
                sources.append(Source(file.as_posix(), file))
            else:
                skipped.append(Skipped(file, f"{file.suffix} is neither text nor markdown; convert it first"))
    if id is None:
        return list(dict.fromkeys(sources)), skipped
    if len(sources) > 1:
        raise InputError(f"--id {id!r} names one document, but {len(sources)} texts were found")
    return [Source(id, source.path) for source in sources], skipped


def _files(path: str) -> list[Path]:
    """The files that one argument stands for."""
    if Path(path).is_dir():
        below = sorted(file for file in Path(path).rglob("*") if file.is_file())
        return [f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if Path(path).exists():
        return [Path(path)]
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207  # as typed
    if not matches:
        raise InputError(f"{path!r} does not exist" + (", nothing matches it" if glob.has_magic(path) else ""))
    return [file for match in matches for file in _files(match)]


def read_source(source: Source) -> str:
    """The text of a source; raises InputError if it cannot be read or is not UTF-8 text."""
    try:
        data = sys.stdin.buffer.read() if source.path is None else source.path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{source.id!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source.id!r} is not UTF-8 text (byte {error.start}); convert it first") from error
    if "\0" in text:
        raise InputError(f"{source.id!r} holds NUL characters: it is a binary file, not text")
    return text
