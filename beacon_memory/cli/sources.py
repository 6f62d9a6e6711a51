"""The texts that `beacon-memory add` reads: files, folders, globs and standard input."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from beacon_memory.documents import PATH
from beacon_memory.errors import InputError, MissingDependencyError, UnreadableFileError, UnsupportedFormatError
from beacon_memory.formats.kinds import find_format
from beacon_memory.formats.reading import read_text

if TYPE_CHECKING:
    from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = ["Skipped", "Source", "find_gone", "find_sources", "read_source"]


STDIN = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """A text to read: its document id, and its file (None for standard input)."""

    id: str
    path: Path | None

    @property
    def size(self) -> int:
        """Return the bytes to read; 0 if that is not known before, as of standard input."""
        try:
            return self.path.stat().st_size if self.path is not None else 0
        except OSError:  # `read_source` will say what is wrong
            return 0


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that is skipped, and the reason."""

    path: Path
    reason: str


def find_sources(paths: Iterable[str], id: str | None = None) -> tuple[list[Source], list[Skipped]]:
    """Find the texts of files, folders (with all subfolders, but without hidden files), globs and `-`.

    The id of a document is its path as given, or `id` if there is only one text. Raises InputError for a path that does
    not exist, for standard input without an id, and for an id with several texts.
    """
    sources: list[Source] = []
    skipped: list[Skipped] = []
    for path in paths:
        if path == STDIN:
            if id is None:
                raise InputError("a text from standard input has no name of its own: give it one with --id")
            sources.append(Source(id, None))
            continue
        for found in _find(path):
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            try:
                find_format(name=found.name).require_packages()
            except (UnsupportedFormatError, MissingDependencyError) as error:
                skipped.append(Skipped(found, str(error)))
            else:
                sources.append(Source(found.as_posix(), found))
    skipped = list(dict.fromkeys(skipped))
    if id is None:
        return list(dict.fromkeys(sources)), skipped
    if len(sources) > 1:
        raise InputError(f"--id {id!r} names one document, but {len(sources)} texts were found")
    return [Source(id, source.path) for source in sources], skipped


def find_gone(folders: Iterable[str], sources: Iterable[Source], rows: Iterable[DocumentRow]) -> list[str]:
    """Find the documents whose texts were read from files of these folders that are not there any more.

    sources: what `find_sources` found there. rows: of the documents that are stored.

    Returns their ids. Raises InputError for what is no folder, and for a folder without any text: it may be the mount
    point of a disk that is not there.
    """
    found = [_normal(source.path) for source in sources if source.path is not None]
    roots = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"--prune removes what is gone from a folder, and {folder!r} is none")
        roots.append(_normal(Path(folder)))
        if not any(path.is_relative_to(roots[-1]) for path in found):
            raise InputError(
                f"there is no text in {folder!r}, so nothing is removed: is it the right folder, and its disk there? "
                "`beacon-memory remove` removes documents by their ids"
            )
    gone = []
    for row in rows:
        path = row.metadata.get(PATH)
        if isinstance(path, str) and any(_normal(Path(path)).is_relative_to(root) for root in roots):
            try:
                Path(path).stat()
            except (FileNotFoundError, NotADirectoryError):
                gone.append(row.id)
            except (OSError, ValueError):  # whether it is there cannot be told
                continue
    return gone


def _normal(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # without `..`, but links stay as they were typed


def _find(path: str) -> Iterator[Path | Skipped]:
    """Yield the files of one argument, and what is skipped; one that is named itself is read whatever it is."""
    if Path(path).is_dir():
        yield from _below(Path(path))
    elif Path(path).exists():
        yield Path(path)
    else:
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207  # as typed
        if not matches:
            raise InputError(f"{path!r} does not exist" + (", nothing matches it" if glob.has_magic(path) else ""))
        for match in matches:
            yield from _met(Path(match))


def _below(folder: Path) -> Iterator[Path | Skipped]:
    """Yield what is in a folder and its subfolders, in the order of names; hidden ones are left out."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        yield Skipped(folder, f"it cannot be listed: {error.strerror}")
        return
    for path in inside:
        if not path.name.startswith("."):
            yield from _met(path)


def _met(path: Path) -> Iterator[Path | Skipped]:
    """Yield what was not named but found: a file, those of a folder, or the reason to skip anything else."""
    try:
        kind = path.stat().st_mode
    except OSError as error:
        lost = path.is_symlink() and isinstance(error, FileNotFoundError)
        yield Skipped(path, "it links to nothing" if lost else f"it cannot be reached: {error.strerror}")
        return
    if stat.S_ISREG(kind):
        yield path
    elif not stat.S_ISDIR(kind):
        yield Skipped(path, "it is neither a file nor a folder")
    elif path.is_symlink():
        yield Skipped(path, "it links to a folder, and such links are not followed; name that folder, too")
    else:
        yield from _below(path)


def read_source(source: Source) -> str:
    """Read the text of a source; raises InputError if that is not possible; see `read_text`."""
    try:
        source.id.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{source.id!r} is not UTF-8, so it can be no id; rename the file, or add it by itself, with --id"
        ) from None
    if source.path is None and sys.stdin is None:
        raise InputError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if source.path is None else source.path.read_bytes()
        return read_text(data, name="" if source.path is None else source.path.name)
    except OSError as error:
        raise InputError(f"{source.id!r} cannot be read: {error.strerror}") from error
    except UnreadableFileError as error:
        raise UnreadableFileError(f"{source.id!r} cannot be read: {error}") from error
