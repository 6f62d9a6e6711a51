"""A conversation of bounded size: recent turns as they are, older ones folded into the memory of a document."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .document import SESSION_TAG, check_id, content_hash
from .durable import make_folder, sync_file, sync_folder
from .errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from .files import TEMP_PREFIX, hash_id, unlink
from .locks import alone
from .memory import BeaconMemory
from .ratio import AUTO_RATIOS
from .results import Answer, Document

__all__ = ["Session", "Turn"]

Turn = dict[str, str]


@dataclass(slots=True)
class _State:
    """What is kept of a session beside its document.

    turns:   recent turns, not folded.
    folding: how many of them are being folded, and the sha256 that the document's text will have then. A crash in the
             middle of it is told by that: if the text is there, they are folded.
    """

    turns: list[Turn] = field(default_factory=list)
    folding: tuple[int, str] | None = None


class Session:
    """A conversation under an id, kept in the store of `memory` from the first turn on.

    recent: tokens of turns that are kept as they are. When there are more, the oldest are folded until half of that is
            left: they become the end of a document with the same id, tagged `session`.
    slots:  memory slots that this document may take. When it needs more it is compressed twice as strongly, and when
            that goes no further its older half is forgotten.

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
        """The document that older turns were folded into, if any: what to load in front of the recent ones."""
        return [self.id] if self.id in self.memory.store else []

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
        answer = self.memory.ask([*self.turns, asked], self.ids, **options)
        self.add([asked, {"role": "assistant", "content": answer.text}])
        return answer

    def clear(self) -> None:
        """Forget the conversation."""
        with self._alone():
            with contextlib.suppress(DocumentNotFoundError):
                self.memory.remove(self.id)
            unlink(self._path)

    @property
    def _path(self) -> Path:
        return self.memory.store.folder / "sessions" / f"{hash_id(self.id)}.json"

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return alone(self._path.with_suffix(".lock"), f"the session {self.id!r} is being written by another")

    def _fold(self, state: _State) -> None:
        sizes = [len(self.memory.compressor.tokenize(_line(turn)).ids) for turn in state.turns]
        if sum(sizes) <= self.recent:
            return
        count = next(n for n in range(1, len(sizes) + 1) if sum(sizes[n:]) <= self.recent // 2)
        while count < len(sizes) and state.turns[count]["role"] != "user":
            count += 1  # what is left begins with a question
        folded = "".join(map(_line, state.turns[:count]))
        before = self._text()
        state.folding = (count, content_hash(before + folded))
        self._write(state)
        if before:
            self.memory.append(self.id, folded)
        else:
            self.memory.add_many([Document(self.id, folded, tags=[SESSION_TAG])], ratio=AUTO_RATIOS[0])
        self._write(_State(state.turns[count:]))
        self._bound(before + folded)

    def _bound(self, text: str) -> None:
        """Keep the document's memory within its slots."""
        row = self.memory.show(self.id)
        while row.slots > self.slots:
            stronger = [ratio for ratio in AUTO_RATIOS if ratio > max(row.ratios)]
            if not stronger:
                text = text[text.find("\n", len(text) // 2) + 1 :] or text[len(text) // 2 :]
            self.memory.add(self.id, text, ratio=stronger[0] if stronger else AUTO_RATIOS[-1])
            row = self.memory.show(self.id)

    def _text(self) -> str:
        try:
            return self.memory.store.text(self.id)
        except DocumentNotFoundError:
            return ""

    def _read(self) -> _State:
        try:
            fields = json.loads(self._path.read_text(encoding="utf-8"))
            if fields.pop("sha256") != _seal(fields) or fields["id"] != self.id:
                raise ValueError("its hash differs")
            state = _State([_turn(turn) for turn in fields["turns"]], fields["folding"] and tuple(fields["folding"]))
        except FileNotFoundError:
            return _State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise CorruptFileError(f"{self._path} is no session ({error}); remove it, or call clear()") from error
        if state.folding is not None:
            count, expected = state.folding
            return _State(state.turns[count:] if content_hash(self._text()) == expected else state.turns)
        return state

    def _write(self, state: _State) -> None:
        fields = {"id": self.id, "turns": state.turns, "folding": state.folding and list(state.folding)}
        temp = self._path.with_name(f"{TEMP_PREFIX}-{secrets.token_hex(8)}")
        try:
            make_folder(temp.parent)
            temp.write_text(json.dumps({**fields, "sha256": _seal(fields)}), encoding="utf-8")
            sync_file(temp)
            temp.replace(self._path)
            sync_folder(temp.parent)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}") from error
        finally:
            unlink(temp)


def _turn(turn: Mapping[str, str]) -> Turn:
    kept = {"role": turn.get("role"), "content": turn.get("content")}
    if not all(isinstance(value, str) for value in kept.values()):
        raise InputError(f"a turn must have the texts 'role' and 'content', got {dict(turn)!r}")
    return kept  # type: ignore[return-value]  # just checked


def _line(turn: Mapping[str, str]) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}\n"


def _seal(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
