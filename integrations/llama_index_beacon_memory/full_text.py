"""Which documents a question is about, by the full text of the store."""

from __future__ import annotations

import contextlib

from beacon_memory import BeaconMemory, DocumentNotFoundError
from beacon_memory.catalog import DocumentRow, PassageHit
from beacon_memory.document import SESSION_TAG

__all__ = ["is_conversation", "search"]

_HITS = 50  # passages to look at for each document that is wanted
_WEAKEST = 0.5  # of the best passage's score: what a document must reach to be loaded beside it


def search(
    memory: BeaconMemory, question: str, limit: int, max_slots: int | None = None
) -> list[tuple[PassageHit, DocumentRow]]:
    """The best passages of up to `limit` documents, one of each, best first, with the documents' rows.

    A document must reach half the score of the best. max_slots: memory slots that all of them together may take; one
    that does not fit beside better ones is left out. What has the tag `session`, which folded conversations have, is
    none of them.
    """
    found: list[tuple[PassageHit, DocumentRow]] = []
    seen: set[str] = set()
    room = max_slots
    for hit in memory.store.search(question, _HITS * limit):
        if len(found) == limit or (found and hit.score < _WEAKEST * found[0][0].score):
            break
        if hit.document in seen:
            continue
        seen.add(hit.document)
        with contextlib.suppress(DocumentNotFoundError):  # removed in this moment
            row = memory.show(hit.document)
            if not is_conversation(row) and (room is None or not found or row.slots <= room):
                found.append((hit, row))
                room = None if room is None else room - row.slots
    return found


def is_conversation(row: DocumentRow) -> bool:
    """Whether a document is what a `Session` folded."""
    return SESSION_TAG in row.tags
