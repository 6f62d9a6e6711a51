"""A conversation of bounded size: recent turns are kept as text, older ones as compressed documents."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beacon_memory.compression.ratio import AUTO_RATIOS
from beacon_memory.generation.tool_calls import with_calls_as_text
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import read_checked, stage_checked
from beacon_memory.storage.files.durable import move_into_place, unlink
from beacon_memory.storage.files.locks import alone
from beacon_memory.storage.files.names import hash_id

from .documents import SESSION_TAG, Document, check_id, check_utf8, content_hash
from .errors import CorruptFileError, DocumentNotFoundError, InputError
from .memory import BeaconMemory
from .results import Answer

__all__ = ["Session", "Turn"]

Turn = dict[str, Any]


@dataclass(slots=True)
class _State:
    """The part of a session that is kept in its own file, beside its documents.

    turns:   recent turns, which are not folded yet.
    parts:   numbers of the first and the last of its documents.
    folding: set while turns are folded: how many turns, the number of the document that they go into, and the sha256 of
             its text after that. After a crash, this hash tells whether the document has the turns already.
    """

    turns: list[Turn] = field(default_factory=list)
    parts: tuple[int, int] = (1, 0)
    folding: tuple[int, int, str] | None = None


class Session:
    """A conversation under an id, kept in the store of `memory` from its first turn on.

    recent: how many tokens of turns are kept as text. When there are more, the oldest turns are folded until half of
            that is left: their text is appended to a document, `<id>/1`, tagged `session`. When this document has as
            many tokens as a window of the model, or as `slots`, the next one, `<id>/2`, begins. So folding takes no
            longer in a long conversation than in a short one.
    slots:  how many memory slots these documents may take. When they need more, one document is compressed twice as
            strongly, older ones sooner. If that one cannot be compressed further, the oldest is removed.

    Several threads and processes may use the same session. Raises InputError for bounds below 1.
    """

    def __init__(self, memory: BeaconMemory, id: str, *, recent: int = 512, slots: int = 1024) -> None:
        if recent < 1 or slots < 1:
            raise InputError(f"recent={recent} and slots={slots} must be at least 1")
        self.memory = memory
        self.id = check_id(id)
        self.recent, self.slots = recent, slots

    @property
    def turns(self) -> list[Turn]:
        """Return the recent turns as they were added, as dicts with `role`, `content` and the like, oldest first."""
        return self._read().turns

    @property
    def ids(self) -> list[str]:
        """Return the ids of the documents with the older turns, oldest first; load them before the recent turns."""
        return [row.id for row in self._rows(self._read())]

    def add(self, turns: Sequence[Mapping[str, Any]]) -> None:
        """Add turns to the conversation, and fold older ones if there are too many. Added turns survive a crash.

        A turn has the texts `role` and `content`, and what else chat templates know or JSON can hold: `tool_calls`,
        `tool_call_id`, `name`, ... All of it is kept until the turn is folded; folded are its role, its text and its
        calls. Raises InputError for anything else; then nothing has changed.
        """
        new = [_turn(turn) for turn in turns]
        with self._alone():
            state = self._read()
            state.turns += new
            self._write(state)
            self._fold(state)

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer a question from the whole conversation, and add both to it. For `options` see `BeaconMemory.ask`."""
        asked = {"role": "user", "content": question}
        state = self._read()
        answer = self.memory.ask([*state.turns, asked], [row.id for row in self._rows(state)], **options)
        self.add([asked, {"role": "assistant", "content": answer.text}])
        return answer

    def clear(self) -> None:
        """Remove the conversation and its documents."""
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
        return f"{self.id}/{part}"  # no other session has documents with these ids

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
            count += 1  # so that the turns that are left begin with a question
        folded = "".join(map(_line, state.turns[:count]))
        rows = self._rows(state)
        first, part = state.parts
        if rows and rows[-1].id == self._id(part) and rows[-1].tokens < min(self._window, self.slots):
            before = self._text(part)
        else:
            before, part = "", part + 1
            while self._id(part) in self.memory.store:  # a document that is not part of the session
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
        """Compress or remove documents until they take no more than `slots` memory slots."""
        rows = self._rows(state)
        while sum(row.slots for row in rows) > self.slots:
            # the last document is still growing, so others come first
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
        """Return the text of a document, or "" if there is none."""
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


def _turn(turn: Mapping[str, Any]) -> Turn:
    """Return a turn with all of its fields, as its file will give them back."""
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


def _line(turn: Turn) -> str:
    return f"{turn['role'].capitalize()}: {with_calls_as_text(turn)['content']}\n"
