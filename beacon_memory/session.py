"""A conversation of bounded size: recent turns are kept as text, older ones as compressed documents."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beacon_memory.compression.ratio import AUTO_RATIOS
from beacon_memory.generation.tool_calls import with_calls_as_text
from beacon_memory.modeling.layout import document_slots
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.conversations import StoredConversations

from .conversation import Conversation
from .documents import SESSION_TAG, Document, check_id, check_utf8, content_hash
from .errors import CapacityError, CorruptFileError, DocumentNotFoundError, InputError, StoreError
from .memory import BeaconMemory
from .picking import SESSION_BUDGET
from .results import Answer

__all__ = ["RECENT", "SESSION_SLOTS", "Session", "Turn"]

Turn = dict[str, Any]

RECENT = 256  # tokens of a conversation that stay text: more of them mislead a small reader
SESSION_SLOTS = 8192  # memory slots that a conversation may take in a store: at ratio 2, some 60,000 characters

_logger = logging.getLogger(__name__)
_STANDING = "system"  # the role of turns that stay in force


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The tokens of recent turns and of system turns that a model has positions for, and the slots of documents."""

    recent: int
    system: int
    slots: int


@dataclass(slots=True)
class _Part:
    """A document of a session, as it shall be.

    number:   the last part of its id. tokens, slots, ratio: of its memory.
    text:     of one that is still to be stored. grows: whether the begin of it is stored already.
    """

    number: int
    tokens: int
    slots: int
    ratio: int
    text: str = ""
    grows: bool = False


class Session:
    """A conversation under an id, kept in the store of `memory` from its first turn on.

    recent: how many tokens of turns are kept as text. When there are more, the oldest turns are folded until half of
            that is left, or the last exchange alone if it fits: their text is appended to a document, `<id>/1`, tagged
            `session`. When this document has as many tokens as a window of the model, or as `slots`, the next one,
            `<id>/2`, begins. So folding takes no longer in a long conversation than in a short one. What takes more
            than `slots` becomes several documents, compressed as strongly as it takes for all of them to fit.
    slots:  how many memory slots these documents may take in the store. When they need more, one document is compressed
            twice as strongly, older ones sooner. If that one cannot be compressed further, the oldest is removed.
    budget: how many of these slots a question may load: those of the exchanges that it is about. The two turns of the
            user before it count, too, for less.
    system: how many tokens of system turns stay in force: they are not folded but stand in front of the recent turns,
            each text once. Those that do not fit beside newer ones are folded as others are.

    If the model has fewer positions than `recent`, `budget`, `system` and `reserve` take together, `recent` and
    `system` shrink in proportion. Several threads and processes may use the same session. Raises InputError for bounds
    below 1, or `system` below 0.
    """

    def __init__(
        self,
        memory: BeaconMemory,
        id: str,
        *,
        recent: int = RECENT,
        slots: int = SESSION_SLOTS,
        budget: int = SESSION_BUDGET,
        system: int = 512,
    ) -> None:
        if min(recent, slots, budget) < 1 or system < 0:
            raise InputError(
                f"recent={recent}, slots={slots} and budget={budget} must be at least 1, and system={system} at least 0"
            )
        self.memory = memory
        self.id = check_id(id)
        self.recent, self.slots, self.budget, self.system = recent, slots, budget, system

    @property
    def turns(self) -> list[Turn]:
        """Return the turns that are kept as text, as they were added: system turns, then recent ones, oldest first."""
        return [*map(dict, self._now()[0].turns)]

    @property
    def ids(self) -> list[str]:
        """Return the ids of the documents with the older turns, oldest first; load them before the recent turns."""
        return [row.id for row in self._now()[1].values()]

    def add(self, turns: Sequence[Mapping[str, Any]], *, fold: bool = True) -> None:
        """Add turns to the conversation, and fold older ones if there are too many. Added turns survive a crash.

        A turn has the texts `role` and `content`, and what else chat templates know or JSON can hold: `tool_calls`,
        `tool_call_id`, `name`, ... All of it is kept until the turn is folded; folded are its role, its text and its
        calls.
        fold: whether to fold now what is too much, which needs the model, or with turns that are added later.

        Raises InputError for anything else, and what `BeaconMemory.add` raises, for example QuotaError if the store is
        full, or CapacityError if the model has no positions beside `reserve`; then the conversation is as it was.
        """
        new = [_turn(turn) for turn in turns]
        with self._conversations.alone(self.id):
            before, rows = self._now()
            said: list[Turn] = [*map(dict, before.turns), *new]
            if not fold:
                self._conversations.put(replace(before, turns=said))
                return
            bounds = self._bounds()
            stay = self._staying(said, bounds)
            left = [said[n] for n in stay]
            gone = [said[n] for n in sorted({*range(len(said))}.difference(stay))]
            kept = {*map(_line, left)}
            text = "".join(_line(turn) for turn in gone if not (_stands(turn) and _line(turn) in kept))
            if text:
                self._fold(before, rows, said, stay, text, bounds.slots)
            else:
                self._conversations.put(replace(before, turns=left))

    def ask(self, question: str, ids: Sequence[str] = (), *, keep: bool = True, **options: Any) -> Answer:
        """Answer a question from the whole conversation, and add both to it. For `options` see `BeaconMemory.ask`.

        ids:  other documents to answer from.
        keep: False for a question that is no part of the conversation: it stays as it was.
        """
        messages, loaded, options = self._asked(question, ids, options)
        answer = self.memory.ask(messages, loaded, **options)
        if keep:
            self._answered(question, answer)
        return answer

    def stream(
        self, question: str, ids: Sequence[str] = (), *, keep: bool = True, **options: Any
    ) -> Generator[str | Answer]:
        """Like `ask`, but yields pieces of the answer as they come, and the whole Answer last, when both are added.

        Of an answer that is not taken to its end, nothing is added.
        """
        messages, loaded, options = self._asked(question, ids, options)
        with contextlib.closing(self.memory.stream(messages, loaded, **options)) as pieces:
            for piece in pieces:
                if keep and isinstance(piece, Answer):
                    self._answered(question, piece)
                yield piece

    def _asked(
        self, question: str, ids: Sequence[str], options: Mapping[str, Any]
    ) -> tuple[list[Mapping[str, Any]], list[str], dict[str, Any]]:
        """Return how the memory is asked: messages, ids and options."""
        state, rows = self._now()
        loaded = [*ids, *(row.id for row in rows.values())]
        return [*state.turns, _said(question)], loaded, {"session_budget": self.budget, **options}

    def _answered(self, question: str, answer: Answer) -> None:
        self.add([_said(question), {"role": "assistant", "content": answer.text}])

    def clear(self) -> None:
        """Remove the conversation and its documents."""
        with self._conversations.alone(self.id):
            self._keep((1, 0))
            self._conversations.remove(self.id)

    @property
    def _conversations(self) -> StoredConversations:
        return self.memory.store.conversations

    @property
    def _window(self) -> int:
        return self.memory.model.config.beacon_window

    def _id(self, part: int) -> str:
        return f"{self.id}/{part}"  # no other session has documents with these ids

    def _now(self) -> tuple[Conversation, dict[int, DocumentRow]]:
        """Return the conversation as it is now, with the rows of its documents by their numbers, oldest first."""
        catalog = self.memory.store.parts.catalog()
        with catalog.reading():
            kept = self._conversations.get(self.id) or Conversation(self.id)
            if kept.folding is not None:
                stay, parts, expected = kept.folding
                last = catalog.documents.get(self._id(parts[1]))
                if last is not None and last.content_hash == expected:  # all is folded
                    kept = replace(kept, turns=[kept.turns[n] for n in stay], parts=parts, folding=None)
            first, end = kept.parts
            found = {part: catalog.documents.get(self._id(part)) for part in range(first, end + 1)}
        try:
            kept = replace(kept, turns=[*map(_turn, kept.turns)], folding=None)
        except InputError as error:
            raise CorruptFileError(f"the session {self.id!r} cannot be read ({error}); call clear()") from error
        return kept, {part: row for part, row in found.items() if row is not None and SESSION_TAG in row.tags}

    def _bounds(self) -> _Bounds:
        """Return the bounds of this session, as far as the model has positions for them."""
        model = self.memory.model
        free = model.max_positions - model.config.beacon_sink_size - self.memory.compressor.reserve
        if free < 1:  # nothing can be folded; so much the longer are turns kept
            return _Bounds(self.recent, self.system, 0)
        share = min(1.0, free / (self.recent + self.system + min(self.budget, self.slots)))
        return _Bounds(int(self.recent * share), int(self.system * share), self.slots)

    def _staying(self, turns: Sequence[Turn], bounds: _Bounds) -> list[int]:
        """Return which turns stay as text: system turns that stay in force, and recent turns."""
        sizes = [self._count(_line(turn)) for turn in turns]
        front = next((n for n, turn in enumerate(turns) if not _stands(turn)), len(turns))
        recent = front
        if sum(sizes[front:]) > bounds.recent:
            exchanges = [n for n in range(front, len(turns)) if turns[n]["role"] == "user"]  # where each begins
            left = [n for n in exchanges if sum(sizes[n:]) <= bounds.recent // 2]
            last = [n for n in exchanges[-1:] if sum(sizes[n:]) <= bounds.recent]
            recent = [*left, *last, len(turns)][0]
        elif sum(sizes[:front]) <= bounds.system:
            return [*range(len(turns))]
        standing: dict[str, int] = {}
        room = bounds.system
        for n in reversed(range(recent)):
            text = turns[n]["content"]
            if _stands(turns[n]) and text not in standing and sizes[n] <= room:
                standing[text] = n
                room -= sizes[n]
        return [*sorted(standing.values()), *range(recent, len(turns))]

    def _fold(
        self,
        before: Conversation,
        rows: Mapping[int, DocumentRow],
        said: Sequence[Turn],
        stay: list[int],
        text: str,
        slots: int,
    ) -> None:
        """Fold a text, so that of all turns those of `stay` are left. If that fails, `before` holds.

        rows: of the documents that there are, by their numbers.
        """
        stored = [_Part(n, row.tokens, row.slots, max(row.ratios)) for n, row in rows.items()]
        parts = self._bounded([*stored, *self._new(stored, before.parts[1], text, slots)], slots)
        new = [part for part in parts if part.text]
        last = new[-1]
        left = replace(before, turns=[said[n] for n in stay], parts=(parts[0].number, last.number))
        folding = replace(before, turns=said, folding=(stay, left.parts, content_hash(last.text)))
        try:
            for part in parts:  # what is stored already, first: the conversation stays the same by that
                if not part.text and part.ratio > max(rows[part.number].ratios):
                    self.memory.add(self._id(part.number), self._text(part.number), ratio=part.ratio)
            self._conversations.put(folding)
            for part in new:
                self._store(part)
        except BaseException:
            if self._text(last.number) != last.text:
                for part in new:
                    if not part.grows:
                        self._forget(self._id(part.number))
                if before == Conversation(self.id):
                    self._conversations.remove(self.id)
                else:
                    self._conversations.put(before)
            raise
        try:  # the turns are folded; what is left to do is done with the next fold, if not now
            self._conversations.put(left)
            self._keep(left.parts)
        except StoreError as error:
            _logger.warning("the session %r could not be tidied up, the next fold does it: %s", self.id, error)

    def _new(self, stored: Sequence[_Part], number: int, text: str, slots: int) -> list[_Part]:
        """Return the documents that a text becomes; the last stored one comes again if it grows by it.

        number: of the last document that there was, whether or not it is still stored. Raises CapacityError if there
        are no slots.
        """
        if slots < 1:
            model, reserve = self.memory.model, self.memory.compressor.reserve
            raise CapacityError(
                f"the model has {model.max_positions} positions, and reserve={reserve} leaves too few of them for the "
                f"older turns of the session {self.id!r}; open the BeaconMemory with a smaller reserve"
            )
        size, ratio = min(self._window, slots), AUTO_RATIOS[0]
        last = stored[-1] if stored and stored[-1].number == number else None
        if last is not None and last.tokens < size and last.ratio == ratio:
            whole = self._text(number) + text
            if self._fits(tokens := self._count(whole), ratio, slots):
                return [_Part(number, tokens, self._slots(tokens, ratio), ratio, whole, grows=True)]
        texts = [text] if self._fits(self._count(text), ratio, slots) else [*self._pieces(text, size)]
        counts = [self._count(piece) for piece in texts]
        usable = [one for one in AUTO_RATIOS if one <= self._window]
        ratio = next((one for one in usable if sum(self._slots(n, one) for n in counts) <= slots), usable[-1])
        parts = []
        for tokens, piece in zip(counts, texts, strict=True):
            number += 1
            while self._id(number) in self.memory.store and SESSION_TAG not in self.memory.show(self._id(number)).tags:
                number += 1  # a document that is not part of the session
            parts.append(_Part(number, tokens, self._slots(tokens, ratio), ratio, piece))
        return parts

    def _bounded(self, parts: Sequence[_Part], slots: int) -> list[_Part]:
        """Return the documents that are left, compressed so strongly that they take no more than `slots`."""
        kept = list({part.number: part for part in parts}.values())
        while sum(part.slots for part in kept) > slots and len(kept) > 1:
            # the last document is still growing, so others come first
            part = kept[max(range(len(kept) - 1), key=lambda n: kept[n].slots * (len(kept) - n))]
            stronger = [ratio for ratio in AUTO_RATIOS if part.ratio < ratio <= self._window]
            if stronger:
                part.ratio, part.slots = stronger[0], self._slots(part.tokens, stronger[0])
            else:
                del kept[0]
        return kept

    def _pieces(self, text: str, size: int) -> Iterator[str]:
        """Cut a text into pieces of about `size` tokens at most, at the end of a line or word where there is one."""
        while text:
            stop = min(len(text), 8 * size)  # characters, of which a token seldom has more
            offsets = self.memory.compressor.tokenize(text[:stop]).offsets
            if len(offsets) > size:
                stop = max(1, offsets[size][0])
            if stop < len(text):
                ends = (text.rfind(end, stop // 2, stop) + 1 for end in ("\n", " "))
                stop = next(filter(None, ends), stop)
            yield text[:stop]
            text = text[stop:]

    def _fits(self, tokens: int, ratio: int, slots: int) -> bool:
        """Tell whether a document of so many tokens may be one, in these slots and for the model."""
        try:
            self.memory.compressor.ratios(tokens, ratio)
        except CapacityError:
            return False
        return self._slots(tokens, ratio) <= slots

    def _slots(self, tokens: int, ratio: int) -> int:
        return document_slots(tokens, ratio, self._window)

    def _count(self, text: str) -> int:
        return len(self.memory.compressor.tokenize(text).ids)

    def _store(self, part: _Part) -> None:
        document = Document(self._id(part.number), part.text, tags=[SESSION_TAG])
        self.memory.add_many([document], ratio=part.ratio)

    def _keep(self, parts: tuple[int, int]) -> None:
        """Remove all documents of the session but those from the first to the last of `parts`."""
        for row in self.memory.list(prefix=f"{self.id}/", tags=[SESSION_TAG]):
            id, _, number = row.id.rpartition("/")
            if id == self.id and number.isdecimal() and not parts[0] <= int(number) <= parts[1]:
                self._forget(row.id)

    def _forget(self, id: str) -> None:
        with contextlib.suppress(DocumentNotFoundError):
            self.memory.remove(id)

    def _text(self, part: int) -> str:
        """Return the text of a document, or "" if there is none."""
        try:
            return self.memory.store.text(self._id(part))
        except DocumentNotFoundError:
            return ""


def _turn(turn: Mapping[str, Any]) -> Turn:
    """Return a turn with all of its fields, as the store will give them back."""
    try:
        kept: Turn = json.loads(json.dumps(dict(turn)))
        if kept.get("tool_calls"):  # templates take such a turn without a text
            kept["content"] = kept.get("content") or ""
        if not all(isinstance(kept[name], str) for name in ("role", "content")):
            raise TypeError("one of them is no text")
        _line(kept)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        needed = "the texts 'role' and 'content', and no more than JSON and chat templates know"
        raise InputError(f"a turn must have {needed}; {turn!r} has not: {error!r}") from error
    check_utf8(kept, "the turn")
    return kept


def _said(question: str) -> Turn:
    return {"role": "user", "content": question}


def _stands(turn: Turn) -> bool:
    return bool(turn["role"] == _STANDING)


def _line(turn: Turn) -> str:
    return f"{turn['role'].capitalize()}: {with_calls_as_text(turn)['content']}\n"
