"""A conversation of bounded size: recent turns as they are, older ones folded into the memory of documents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beacon_memory.compression.ratio import AUTO_RATIOS
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import read_checked, stage_checked
from beacon_memory.storage.files.durable import move_into_place, unlink
from beacon_memory.storage.files.locks import alone
from beacon_memory.storage.files.names import hash_id

from .documents import SESSION_TAG, Document, check_id, content_hash
from .errors import CorruptFileError, DocumentNotFoundError, InputError
from .memory import BeaconMemory
from .results import Answer

__all__ = ["Session", "Turn"]

Turn = dict[str, str]


@dataclass(slots=True)
class _State:
    """What is kept of a session beside its documents.

    turns:   recent turns, not folded.
    parts:   numbers of the first and the last of its documents.
    folding: how many of the turns are being folded, the number of the document, and the sha256 that its text will have
             then. A crash in the middle of it is told by that: if the text is there, they are folded.
    """

    turns: list[Turn] = field(default_factory=list)
    parts: tuple[int, int] = (1, 0)
    folding: tuple[int, int, str] | None = None


class Session:
    """A conversation under an id, kept in the store of `memory` from the first turn on.

    recent: tokens of turns that are kept as they are. When there are more, the oldest are folded until half of that is
            left: they become the end of a document, `<id>/1`, tagged `session`. When that has as many tokens as a
            window of the model, or as there are slots, the next one begins, so that a fold takes no longer in a long
            conversation than in a short one.
    slots:  memory slots that these documents may take. When they need more, one is compressed twice as strongly, the
            older, the sooner; if it is compressed as strongly as can be, the oldest is forgotten.

    Several threads and processes may take part in one session. Raises InputError for bounds below 1.
    """

    def __init__(self, memory: BeaconMemory, id: str, *, recent: int = 512, slots: int = 1024) -> None:
        if recent < 1 or slots < 1:
            raise InputError(f"recent={recent} and slots={slots} must be at least 1")
        self.memory = memory
        self.id = check_id(id)
        self.recent, self.slots = recent, slots

    @property
    def turns(self) -> list[Turn]:
        """The recent turns, as dicts with `role` and `content`, oldest first."""
        return self._read().turns

    @property
    def ids(self) -> list[str]:
        """The documents that older turns were folded into, oldest first: what to load in front of the recent ones."""
        return [row.id for row in self._rows(self._read())]

    def add(self, turns: Sequence[Mapping[str, str]]) -> None:
        """Let the conversation go on; folds older turns if there are too many. What was added survives a crash."""
        new = [_turn(turn) for turn in turns]
        with self._alone():
            state = self._read()
            state.turns += new
            self._write(state)
            self._fold(state)

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer behind the whole conversation, and add question and answer to it; options: see `BeaconMemory.ask`."""
        asked = {"role": "user", "content": question}
        state = self._read()
        answer = self.memory.ask([*state.turns, asked], [row.id for row in self._rows(state)], **options)
        self.add([asked, {"role": "assistant", "content": answer.text}])
        return answer

    def clear(self) -> None:
        """Forget the conversation."""
        with self._alone():
            for row in self.memory.list(prefix=f"{self.id}/", tags=[SESSION_TAG]):
                if row.id.rpartition("/")[0] == self.id:
                    self._forget(row.id)
            unlink(self._path)

    @property
    def _path(self) -> Path:
        return self.memory.store.folder / "sessions" / f"{hash_id(self.id)}.json"

    @property
    def _window(self) -> int:
        return self.memory.model.config.beacon_window

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return alone(self._path.with_suffix(".lock"), f"the session {self.id!r} is being written by another")

    def _id(self, part: int) -> str:
        return f"{self.id}/{part}"  # no other session has documents of these ids

    def _rows(self, state: _State) -> list[DocumentRow]:
        first, last = state.parts
        found = []
        for part in range(first, last + 1):
            with contextlib.suppress(DocumentNotFoundError):
                found.append(self.memory.show(self._id(part)))
        return [row for row in found if SESSION_TAG in row.tags]

    def _fold(self, state: _State) -> None:
        sizes = [len(self.memory.compressor.tokenize(_line(turn)).ids) for turn in state.turns]
        if sum(sizes) <= self.recent:
            return
        count = next(n for n in range(1, len(sizes) + 1) if sum(sizes[n:]) <= self.recent // 2)
        while count < len(sizes) and state.turns[count]["role"] != "user":
            count += 1  # what is left begins with a question
        folded = "".join(map(_line, state.turns[:count]))
        rows = self._rows(state)
        first, part = state.parts
        if rows and rows[-1].id == self._id(part) and rows[-1].tokens < min(self._window, self.slots):
            before = self._text(part)
        else:
            before, part = "", part + 1
            while self._id(part) in self.memory.store:  # a document of somebody else
                part += 1
        state.folding = (count, part, content_hash(before + folded))
        self._write(state)
        if before:
            self.memory.append(self._id(part), folded)
        else:
            self.memory.add_many([Document(self._id(part), folded, tags=[SESSION_TAG])], ratio=AUTO_RATIOS[0])
        state = _State(state.turns[count:], (first, part))
        self._write(state)
        self._bound(state)

    def _bound(self, state: _State) -> None:
        """Keep the memory of the documents within the slots."""
        rows = self._rows(state)
        while sum(row.slots for row in rows) > self.slots:
            # the last one still grows
            row = max(rows[:-1] or rows, key=lambda row: row.slots * (len(rows) - rows.index(row)))
            stronger = [ratio for ratio in AUTO_RATIOS if max(row.ratios) < ratio <= self._window]
            text = self.memory.store.text(row.id)
            if stronger:
                self.memory.add(row.id, text, ratio=stronger[0])
            elif len(rows) > 1:
                self._forget(rows[0].id)
            else:
                half = text[text.find("\n", len(text) // 2) + 1 :] or text[len(text) // 2 :]
                self.memory.add(row.id, half, ratio=max(row.ratios))
            rows = self._rows(state)
        if rows and rows[0].id != self._id(state.parts[0]):
            first = int(rows[0].id.rpartition("/")[2])
            self._write(_State(state.turns, (first, state.parts[1])))

    def _forget(self, id: str) -> None:
        with contextlib.suppress(DocumentNotFoundError):
            self.memory.remove(id)

    def _text(self, part: int) -> str:
        """The text of a document, "" if there is none."""
        try:
            return self.memory.store.text(self._id(part))
        except DocumentNotFoundError:
            return ""

    def _read(self) -> _State:
        try:
            fields = read_checked(self._path)
            turns, (first, last) = [_turn(turn) for turn in fields["turns"]], fields["parts"]
            count, part, expected = fields["folding"] or (0, last, "")
        except FileNotFoundError:
            return _State()
        except (CorruptFileError, ValueError, KeyError, TypeError, InputError) as error:
            raise CorruptFileError(f"{self._path} is no session ({error}); remove it, or call clear()") from error
        if expected and content_hash(self._text(part)) == expected:
            return _State(turns[count:], (first, part))
        return _State(turns, (first, last))

    def _write(self, state: _State) -> None:
        temp = stage_checked(self._path.parent, {"id": self.id, **asdict(state)}, f"the session {self.id!r}")
        move_into_place(temp, self._path)


def _turn(turn: Mapping[str, str]) -> Turn:
    kept = {"role": turn.get("role"), "content": turn.get("content")}
    if not all(isinstance(value, str) for value in kept.values()):
        raise InputError(f"a turn must have the texts 'role' and 'content', got {dict(turn)!r}")
    return kept  # type: ignore[return-value]  # just checked


def _line(turn: Mapping[str, str]) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}\n"
