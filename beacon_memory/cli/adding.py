"""Adding what was found of files, folders and globs, with a progress bar and a line for each document."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from beacon_memory.documents import PATH, Document
from beacon_memory.errors import BeaconMemoryError, DocumentNotFoundError

from .sources import Source, find_sources, read_source
from .terminal import compressing, say

if TYPE_CHECKING:
    from beacon_memory.memory import BeaconMemory
    from beacon_memory.results import Added

    from .remote import RemoteMemory

__all__ = ["add_sources", "found_sources", "remove_gone"]


def found_sources(paths: Sequence[str], id: str | None, as_json: bool) -> list[Source]:
    """Find the texts that a command names, as `find_sources`, and say what is skipped."""
    sources, skipped = find_sources(paths, id)
    for one in skipped:
        say(as_json, {"id": one.path.as_posix(), "status": "skipped", "reason": one.reason})
    return sources


def remove_gone(memory: BeaconMemory, gone: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Remove documents whose files are gone, or only name them, and say so."""
    for id in gone:
        if not dry_run:
            memory.remove(id)
        say(as_json, {"id": id, "status": "gone" if dry_run else "removed"})


def add_sources(
    memory: BeaconMemory | RemoteMemory,
    sources: Sequence[Source],
    label: Mapping[str, Any],
    how: tuple[int | str, str, str] = ("auto", "auto", "auto"),
    as_json: bool = False,
) -> int:
    """Add all sources, and say what became of each; returns how many have failed.

    label: tags, pinned and expires_at of the documents, as far as they are given. how: ratio, compression, precision.
    """
    failed: list[str] = []

    def failure(document: Document, error: BeaconMemoryError) -> None:
        failed.append(document.id)
        bar.document()
        say(as_json, {"id": document.id, "status": "failed", "reason": str(error)})

    def documents() -> Iterator[Document]:
        for source in sources:
            try:
                text, metadata = read_source(source), _metadata(memory, source)
            except BeaconMemoryError as error:
                failure(Document(source.id, ""), error)
                continue
            yield Document(source.id, text, metadata, **label)

    def stored(added: Added) -> None:
        bar.document()
        say(as_json, asdict(added))

    estimate = sum(source.size for source in sources) // 4  # about four bytes a token, until all are tokenized
    with compressing(len(sources), estimate) as bar:
        memory.add_many(documents(), *how, progress=bar.tokens, on_added=stored, on_error=failure)
    return len(failed)


def _metadata(memory: BeaconMemory | RemoteMemory, source: Source) -> dict[str, object] | None:
    """Return the metadata that a document has already, with the path that its text is read from now."""
    if source.path is None:
        return None
    path: dict[str, object] = {PATH: str(source.path.absolute())}
    with contextlib.suppress(DocumentNotFoundError):
        return {**memory.show(source.id).metadata, **path}
    return path
