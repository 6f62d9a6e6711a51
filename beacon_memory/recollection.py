"""The stored documents, as far as they stand in front of a question: chosen, and loaded."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeVar

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import BeaconModel, require_made
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.catalog.words import words
from beacon_memory.storage.files.kv_file import StoredIndex
from beacon_memory.storage.reading import READ_TRIES
from beacon_memory.storage.store import MemoryStore

from .conversation import Messages, turns_of
from .documents import SESSION_TAG, content_hash
from .errors import ConflictError, DocumentNotFoundError
from .evidence import words_together
from .hot import HotMemories
from .load_once import LoadOnce
from .lookup import gist_slots, sections_of_entries
from .picking import (
    PASSAGES_EACH,
    Passage,
    Pick,
    Picker,
    Query,
    asked_about,
    in_context,
    last_question,
    pick,
    telling,
)
from .question import Question
from .recall import DEFAULT_SLOTS, Budget, Indexes, Portion, level_counts, portions, slots_of_passages
from .results import Evidence, Place

__all__ = ["Recollection", "undisturbed"]

_Read = TypeVar("_Read")


class Recollection:
    """Chooses what is loaded for a question, and loads it, out of one namespace of a store.

    The model is loaded when it is first needed.
    """

    def __init__(
        self, store: MemoryStore, load_once: LoadOnce, hot: HotMemories, indexes: Indexes, picker: Picker
    ) -> None:
        self.store = store
        self._load_once, self._hot, self._indexes, self._picker = load_once, hot, indexes, picker

    @property
    def _compressor(self) -> BeaconCompressor:
        return self._load_once()[0]

    @property
    def _model(self) -> BeaconModel:
        return self._compressor.model

    @property
    def slot_bytes(self) -> int:
        """Return the bytes that a slot of all heads takes when it is loaded."""
        return math.prod(self._model.kv_shape[:2]) * self.entry_bytes

    @property
    def entry_bytes(self) -> int:
        """Return the bytes that one entry takes: key, value, and a byte for its place."""
        return int(2 * self._model.kv_shape[-1] * self._model.kv_dtype.itemsize + 1)

    def choose(self, question: Question, room: int) -> list[Portion]:
        """Choose what is loaded for a question: of which documents, and how much of each."""
        budget = None if question.budget is None else Budget.of(question.budget)
        rows, passages = self._chosen(question)
        found = self._indexed(rows)
        slots = room - max(0, len(found) - 1)  # what each takes is rounded up
        if budget is not None:
            slots = min(slots, budget.slots_for(sum(row.tokens for row, _ in found), self.slot_bytes))
            return self._within(found, slots, slots, question, passages)
        folded = [one for one in found if SESSION_TAG in one[0].tags]
        others = [one for one in found if SESSION_TAG not in one[0].tags]
        remembered = self._remembered(folded, min(question.session_budget, slots), question)
        left = slots - sum(one.slots for one in remembered)
        chosen = [*self._within(others, left, min(left, DEFAULT_SLOTS), question, passages), *remembered]
        places = {row.id: place for place, (row, _) in enumerate(found)}
        return sorted(chosen, key=lambda portion: places[portion.row.id])

    def _indexed(self, rows: Iterable[DocumentRow]) -> list[tuple[DocumentRow, StoredIndex]]:
        """Return documents with the indexes of their files; raises FingerprintMismatchError for another model's."""
        found = [self._indexes.get(self.store, row) for row in rows]
        for row, index in found:
            require_made(self._model, index.header.fingerprint, row.id, row.precision)
        return found

    def _remembered(
        self, folded: Sequence[tuple[DocumentRow, StoredIndex]], slots: int, question: Question
    ) -> list[Portion]:
        """Choose what is loaded of a conversation: the passages that tell of the question, and no others.

        So much is loaded of what resembles them that a small reader would take one for the other. Where no passage
        tells of it, all share the budget.
        """
        if _slots(folded) == 0:
            return []
        passages = self._passages(question, [row.id for row, _ in folded])
        kept = telling(itertools.chain.from_iterable(passages.values()))
        if not kept:
            return _portions(folded, {}, slots)
        by_document = {row.id: [one for one in kept if one.document == row.id] for row, _ in folded}
        return portions(folded, by_document, min(slots, slots_of_passages(folded, by_document)))

    def _within(
        self,
        found: Sequence[tuple[DocumentRow, StoredIndex]],
        slots: int,
        enough: int,
        question: Question,
        passages: Mapping[str, Sequence[Passage]],
    ) -> list[Portion]:
        """Choose what is loaded of documents within so many memory slots: all if it fits, else where the question is.

        enough:   slots that are loaded where passages are found.
        passages: that documents were found by.
        """
        if not found:
            return []
        if _slots(found) > enough:
            passages = self._passages(question, [row.id for row, _ in found])
        if any(one.score > 0 for of_document in passages.values() for one in of_document):
            slots = enough
        return _portions(found, passages, slots)

    def _chosen(self, question: Question) -> tuple[list[DocumentRow], Mapping[str, Sequence[Passage]]]:
        """Return the rows of the documents that are named, or of those that are found, with the passages found."""
        fingerprint = self._model.fingerprint.digest
        if question.ids is not None:
            named = [question.ids] if isinstance(question.ids, str) else question.ids
            return [self.store.row(id, fingerprint) for id in named], {}
        picks = self.picks(question.messages, question.limit, fingerprint)
        if not picks:
            known = any(self.query("", 1).documents())
            advice = "matches the question; name documents by id" if known else "is stored yet; add some"
            raise DocumentNotFoundError(f"no document {advice}")
        return [one.row for one in picks], {one.id: one.passages for one in picks}

    def _passages(self, question: Question, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """Return the passages of some documents that a question is about, by their ids."""
        wanted, fingerprint = PASSAGES_EACH * len(ids), self._model.fingerprint.digest
        found: dict[str, list[Passage]] = {id: [] for id in ids}
        for passage in in_context(
            (self._picker(self.query(text, wanted, fingerprint, tuple(ids))), weight)
            for text, weight in asked_about(question.messages)
        ):
            if passage.document in found:
                found[passage.document].append(passage)
        return found

    def picks(self, question: Messages, limit: int, fingerprint: str | None = None) -> list[Pick]:
        """Return documents that a question is about, the best first; fingerprint: of the versions that are wanted."""
        query = self.query(last_question(question), PASSAGES_EACH * limit, fingerprint)
        return pick(self._picker, query, limit)

    def query(
        self, text: str, passages: int, fingerprint: str | None = None, ids: tuple[str, ...] | None = None
    ) -> Query:
        """Return what a picker is asked."""
        return Query(text, self.store, passages, lambda: self._model, fingerprint, ids, self._looked_up)

    def _looked_up(self, question: str, ids: Sequence[str]) -> list[Passage]:
        """Return the passages of documents, scored by attention; those of the first ones that fit the model."""
        positions, sink = self._model.max_positions, self._compressor.sink.slots

        def gist() -> list[Portion]:
            rows = [self.store.row(id, self._model.fingerprint.digest) for id in ids]
            fit = rows[: sum(tokens <= positions for tokens in accumulate(row.tokens for row in rows))]
            found = self._indexed(fit)
            return portions(found, {}, gist_slots(sum(row.tokens for row in fit))) if found else []

        loaded, prefix, _ = self.loaded(gist, positions)
        if not loaded:
            return []
        sections = [(one.row.id, section) for one in loaded for section in one.index.header.sections]
        lowest = [level for one in loaded for level in one.lowest or ()]
        counts = [level_counts(one.index) for one in loaded]
        of_entries = sections_of_entries(counts, lowest, self._load_once()[2].layers, sink)
        scores = self._load_once()[2].relevance(question, prefix, of_entries, len(sections))
        return [Passage(id, one.start, one.stop, score) for (id, one), score in zip(sections, scores, strict=True)]

    def evidence(self, question: Question, loaded: Sequence[Portion]) -> Evidence | None:
        """Return what speaks for an answer before there is one; None without documents, and with tools."""
        if not loaded or question.tools:
            return None
        asked = last_question(question.messages)
        places = self.store.places_of_words(asked, [one.row.id for one in loaded])
        said = [words(str(turn.get("content") or "")) for turn in turns_of(question.messages)[:-1]]
        return Evidence(words_together(places, (source for one in loaded for source in one.sources), said))

    def warm(self, id: str, room: int) -> Place:
        """Make the whole memory of a document ready, and return where it was."""

        def whole() -> list[Portion]:
            row = self.store.row(id, self._model.fingerprint.digest)
            return portions([self._indexes.get(self.store, row)], {}, None)

        _, _, (place,) = self.loaded(whole, room)
        return place

    def loaded(
        self, choose: Callable[[], list[Portion]], room: int, said: Sequence[int] = ()
    ) -> tuple[list[Portion], Prefix, tuple[Place, ...]]:
        """Load what is chosen; returns it, it as a prefix behind the sink, and where each document's memory was.

        It is chosen anew if a document is replaced meanwhile.
        said: tokens that stand between the sink and the documents, if there are any of these.
        """

        def load() -> tuple[list[Portion], Prefix, tuple[Place, ...]]:
            started, loaded = time.monotonic(), choose()
            prefix, found = self._prefix(loaded, room, said)
            places = (self._place(one.row, place, started) for one, place in zip(loaded, found, strict=True))
            return loaded, prefix, tuple(places)

        return undisturbed(load)

    def _prefix(self, loaded: Sequence[Portion], room: int, said: Sequence[int]) -> tuple[Prefix, tuple[Place, ...]]:
        wanted: list[tuple[Hashable, Callable[[], MemoryKV | QuantizedKV]]]
        wanted = [("sink", lambda: MemoryKV.of(self._compressor.sink))]
        if loaded and said:
            key = "said", content_hash(repr([*said]))  # sizes of memories are known by their keys for long
            wanted.append((key, partial(self._compressor.read_raw, MemoryKV.of(self._model.empty_kv()), said)))
        # the best match nearest to the question, as within a document
        placed = sorted(enumerate(loaded), key=lambda numbered: numbered[1].best)
        wanted += [((*self._version(one.row), one.key), partial(self._load, one)) for _, one in placed]
        prefix, found = self._hot.prefix(self._model, wanted, room)
        for one in loaded:
            self.store.uses.add(one.row.id)
        places = {number: place for (number, _), place in zip(placed, found[len(found) - len(placed) :], strict=True)}
        return prefix, tuple(places[number] for number in range(len(loaded)))

    def _place(self, row: DocumentRow, found: Place, since: float) -> Place:
        """Return where a memory was, given where it was found: files come to this machine with their index."""
        return "remote" if found == "cold" and self.store.files.downloaded(row.files, since) else found

    def _version(self, row: DocumentRow) -> tuple[str | int, ...]:
        """Return what tells the K/V of a row from those of every other document, and of every other time."""
        place = str(self.store.folder.absolute())
        return place, row.file, row.content_hash, row.fingerprint, row.bytes, row.updated_at

    def _load(self, portion: Portion) -> MemoryKV | QuantizedKV:
        return portion.load(self.store, self._model.device, self._model.dtype)


def undisturbed(read: Callable[[], _Read]) -> _Read:
    """Read documents, again if one of them is replaced meanwhile; raises ConflictError if that happens too often."""
    for _ in range(READ_TRIES):
        with contextlib.suppress(ConflictError):
            return read()
    raise ConflictError(f"documents were replaced {READ_TRIES} times while they were being read; try again")


def _portions(
    found: Sequence[tuple[DocumentRow, StoredIndex]], passages: Mapping[str, Sequence[Passage]], slots: int
) -> list[Portion]:
    return portions(found, passages, None if _slots(found) <= slots else slots)


def _slots(found: Sequence[tuple[DocumentRow, StoredIndex]]) -> int:
    return sum(row.slots for row, _ in found)
