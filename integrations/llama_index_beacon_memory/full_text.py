"""Which documents a question is about, by the full text of the store."""

from __future__ import annotations

from beacon_memory import BeaconMemory
from beacon_memory.storage.catalog.full_text import PassageHit
from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = ["search"]

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
    room = max_slots
    for hit, row in memory.matches(question, _HITS * limit):
        if len(found) == limit or (found and hit.score < _WEAKEST * found[0][0].score):
            break
        if room is None or not found or row.slots <= room:
            found.append((hit, row))
            room = None if room is None else room - row.slots
    return found
