"""Choosing the documents of a question: a picker finds passages, and one rule makes documents of them.

A picker is a function or an object that is called with a `Query` and returns scored passages. `text` finds them by
the words that they share with the question; `attention` does so, too, and where words do not tell, it asks what the
model looks up when it reads the question. Others are installed as entry points of the group `beacon_memory.pickers`, or
handed to `BeaconMemory(store, picker=...)` as they are. What is made of the passages is the same for all:

* a document counts by its best passage, and must reach half the score of the best document;
* a text that is stored under several ids counts once: under the best one, of equally good ones that written last;
* what conversations were folded into (`Session`) is never chosen;
* a store of one text needs no passage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from beacon_memory.storage.catalog.passages import split_passages

from .conversation import Messages, turns_of
from .documents import SESSION_TAG
from .errors import ConfigError, DocumentNotFoundError, InputError
from .evidence import words_together
from .ranking import TELLING, joined

if TYPE_CHECKING:
    from beacon_memory.modeling.model import BeaconModel
    from beacon_memory.storage.catalog.rows import DocumentRow
    from beacon_memory.storage.store import MemoryStore

__all__ = [
    "DEFAULT_LIMIT",
    "SESSION_BUDGET",
    "Passage",
    "Pick",
    "Picker",
    "Query",
    "asked_about",
    "excerpts",
    "find_picker",
    "fitting",
    "in_context",
    "last_question",
    "pick",
    "telling",
]

DEFAULT_LIMIT = 3  # documents that a question without ids may load
SESSION_BUDGET = 1024  # memory slots that a question may load of what conversations were folded into
PASSAGES_EACH = (
    50  # passages that a picker is asked for, for each document that is wanted; of one text it needs no more
)
_WEAKEST = 0.5  # of the best passage's score: what a document must reach to be loaded beside it
_RESEMBLING = 0.7  # of the best passage's score: what is below it resembles what is asked for, and leads astray
_CONTEXT = (1.0, 0.4, 0.2)  # what the user's last turn counts for, and what the ones before it
_GROUP = "beacon_memory.pickers"


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a stored document that a picker found: the characters from `start` to `stop`.

    score: above 0, higher is better; a document with less than half the score of the best one is left out.
    """

    document: str
    start: int
    stop: int
    score: float


@dataclass(frozen=True, slots=True)
class Query:
    """A question, and where a picker may look for passages.

    text:  the question.
    store: the documents, of one namespace; ids of others lead nowhere.
    limit: passages that are enough, the best ones; more than `PASSAGES_EACH` of one text crowd others out.
    load:  loads the model, or returns it if it is loaded; see `model`.
    fingerprint: of the model that will read the documents, if it is known.
    ids:   the documents whose passages are wanted; None for any.
    look:  see `looked_up`.
    """

    text: str
    store: MemoryStore
    limit: int
    load: Callable[[], BeaconModel] = field(repr=False)
    fingerprint: str | None = None
    ids: tuple[str, ...] | None = None
    look: Callable[[str, Sequence[str]], Iterable[Passage]] = field(default=lambda _text, _ids: (), repr=False)

    @property
    def model(self) -> BeaconModel:
        """The model that will answer, with its tokenizer; loaded when it is first asked for."""
        return self.load()

    def documents(self) -> Iterator[DocumentRow]:
        """Iterate over the rows of the documents by id; those that conversations were folded into are left out.

        With `ids` it is over the rows of these.
        """
        if self.ids is not None:
            yield from (self.store.row(id, self.fingerprint) for id in self.ids)
            return
        after = ""
        while rows := self.store.list(after=after, limit=100):
            yield from (row for row in rows if SESSION_TAG not in row.tags)
            after = rows[-1].id

    def looked_up(self, ids: Sequence[str]) -> Iterable[Passage]:
        """Return all passages of some documents, scored by how much of its attention the model gives them.

        The question is read for that behind a weak memory of the documents; of those that do not fit the model's
        positions there is none.
        """
        return self.look(self.text, ids)

    def passages(self, id: str) -> Iterator[tuple[int, int, str]]:
        """Iterate over a document's passages of about 300 characters: start, stop and text of each."""
        text = self.store.text(id)
        for start, stop in split_passages(text):
            yield start, stop, text[start:stop]


class Picker(Protocol):
    """Find the passages that may answer a question. Provisional: later versions may ask for more.

    The passages come in any order; those without a score above 0 are ignored. Example: the newest documents first.

        def newest(query):
            for row in query.documents():
                yield Passage(row.id, 0, 300, datetime.fromisoformat(row.updated_at).timestamp())
    """

    def __call__(self, query: Query, /) -> Iterable[Passage]:
        """Return passages with their scores."""


@dataclass(frozen=True, slots=True)
class Pick:
    """A document that was chosen for a question, with its passages, the best one first."""

    row: DocumentRow
    passages: tuple[Passage, ...]

    @property
    def id(self) -> str:
        """The document's id."""
        return self.row.id

    @property
    def best(self) -> Passage:
        """The passage that the document counts by."""
        return self.passages[0]


def by_words(query: Query) -> Iterator[Passage]:
    """Find passages that share words with the question, by BM25; the picker `text`."""
    if query.ids is None:
        hits = query.store.search(query.text, query.limit, per_text=PASSAGES_EACH, conversations=False)
    else:
        hits = query.store.search(query.text, query.limit, documents=query.ids)
    for hit in hits:
        yield Passage(hit.document, hit.start, hit.stop, hit.score)


def by_attention(query: Query) -> Iterator[Passage]:
    """Find passages by words and, where these do not tell, by the model's attention, too; the picker `attention`.

    Attention chooses among the passages of documents that are given: which documents a question is about, words say. It
    is not asked where no word is found: such a question is often about no passage, but about all of them.
    """
    words = [*by_words(query)]
    told = words_together(query.store.places_of_words(query.text, query.ids), words) if words and query.ids else 1.0
    if told > TELLING:
        yield from words
        return
    looked = [*query.looked_up(query.ids or ())]
    read = {passage.document for passage in looked}
    found = [*looked, *(passage for passage in words if passage.document not in read)]
    by_document: dict[str, list[Passage]] = {}
    for passage in words:
        by_document.setdefault(passage.document, []).append(passage)
    worded = [
        max((one.score for one in by_document.get(passage.document, ()) if _within(passage, one)), default=0.0)
        for passage in found
    ]
    attended = [passage.score if passage.document in read else 0.0 for passage in found]
    for passage, score in zip(found, joined(worded, attended, told), strict=True):
        yield replace(passage, score=score)


def _within(inner: Passage, outer: Passage) -> bool:
    """Tell whether the middle of a passage is in another one."""
    return outer.start <= (inner.start + inner.stop) // 2 < outer.stop


_BUILT_IN: Mapping[str, Picker] = {"text": by_words, "attention": by_attention}


def find_picker(picker: str | Picker) -> Picker:
    """Return the picker of a name, built in or installed; one that is no name is returned as it is.

    An entry point names what makes a picker when it is called without arguments: a class, or a function.
    Raises ConfigError for a name that is not known, or for a picker that cannot be made.
    """
    if not isinstance(picker, str):
        return _checked(picker)
    if picker in _BUILT_IN:
        return _BUILT_IN[picker]
    installed = {one.name: one for one in entry_points(group=_GROUP)}
    if picker not in installed:
        known = ", ".join(map(repr, sorted({*_BUILT_IN, *installed})))
        raise ConfigError(f"picker={picker!r} must be one of {known}; others are packages that install one")
    try:
        made: Any = installed[picker].load()()
    except Exception as error:  # somebody else's code
        raise ConfigError(f"picker={picker!r}, {installed[picker].value}, cannot be loaded: {error!r}") from error
    return _checked(made)


def _checked(picker: Any) -> Picker:
    if not callable(picker):
        raise ConfigError(f"picker={picker!r} must be a name, or something to call with a Query that returns passages")
    checked: Picker = picker
    return checked


def pick(picker: Picker, query: Query, limit: int = DEFAULT_LIMIT) -> list[Pick]:
    """Choose up to `limit` documents for a question, best first; [] if no passage was found."""
    if limit < 1:
        raise InputError(f"limit={limit} must be at least 1")
    found: dict[str, list[Passage]] = {}
    for passage in picker(query):
        if passage.score > 0:
            found.setdefault(passage.document, []).append(passage)
    ranked = [sorted(passages, key=_score, reverse=True) for passages in found.values()]
    picks: dict[str, Pick] = {}  # by the hashes of their texts
    weakest = 0.0
    for passages in sorted(ranked, key=lambda passages: passages[0].score, reverse=True):
        score = passages[0].score
        if score < weakest:
            break
        try:
            row = query.store.row(passages[0].document, query.fingerprint)
        except DocumentNotFoundError:  # removed since it was found
            continue
        if SESSION_TAG in row.tags:
            continue
        same = picks.get(row.content_hash)
        newer = same is not None and same.best.score == score and _written(row) > _written(same.row)
        if newer or (same is None and len(picks) < limit):
            picks[row.content_hash] = Pick(row, tuple(passages))
        # when there are enough, those as good as the last one may still be newer copies
        weakest = score if len(picks) == limit else weakest or _WEAKEST * score
    return [*picks.values()] or _only_document(query)


def fitting(rows: Sequence[DocumentRow], room: int) -> list[DocumentRow]:
    """Leave out documents that do not fit whole into `room` memory slots beside those in front of them.

    The first one stays in any case.
    """
    kept = list(rows[:1])
    for row in rows[1:]:
        if sum(one.slots for one in (*kept, row)) <= room:
            kept.append(row)
    return kept


def excerpts(store: MemoryStore, picks: Iterable[Pick]) -> Iterator[tuple[Pick, str]]:
    """Read the best passage of each document; one that was removed since is left out."""
    for one in picks:
        try:
            text = store.text(one.id)
        except DocumentNotFoundError:
            continue
        yield one, text[one.best.start : one.best.stop]


def last_question(messages: Messages) -> str:
    """Return what to search for: the text of the user's last turn in a conversation, or of its last turn.

    Raises InputError for what is no conversation.
    """
    turns = turns_of(messages)
    return str(([turn for turn in turns if turn["role"] == "user"] or turns)[-1].get("content") or "")


def asked_about(messages: Messages) -> list[tuple[str, float]]:
    """Return what a conversation asks about: the texts of the user's last turns, the last one first, with weights.

    The last turn is the question; those before it say what it is about where it does not ("And who signed it?").
    """
    asked = [str(turn.get("content") or "") for turn in turns_of(messages) if turn["role"] == "user"]
    texts = asked[: -len(_CONTEXT) - 1 : -1] or [last_question(messages)]
    return [*zip(texts, _CONTEXT, strict=False)]


def in_context(found: Iterable[tuple[Iterable[Passage], float]]) -> list[Passage]:
    """Join the passages that were found for several texts, each with its weight, the question's first.

    The best passage of each text counts as much as that of the question, times the weight of the text; a passage that
    several have found counts for all of them.
    """
    scores: dict[tuple[str, int, int], float] = {}
    first = 0.0
    for passages, weight in found:
        kept = [one for one in passages if one.score > 0]
        best = max(map(_score, kept), default=0.0)
        first = first or best
        for one in kept:
            place = (one.document, one.start, one.stop)
            scores[place] = scores.get(place, 0.0) + one.score * (weight * (first / best))
    return [Passage(*place, score) for place, score in scores.items()]


def telling(passages: Iterable[Passage]) -> list[Passage]:
    """Leave out passages that only resemble the best one: a small reader takes one for the other."""
    found = [*passages]
    weakest = _RESEMBLING * max(map(_score, found), default=0.0)
    return [one for one in found if one.score >= weakest]


def _only_document(query: Query) -> list[Pick]:
    """Choose the only text of a store by its beginning; [] if there are none, or several."""
    newest: DocumentRow | None = None
    for row in query.documents():
        if newest is not None and row.content_hash != newest.content_hash:
            return []
        newest = row if newest is None else max(newest, row, key=_written)
    if newest is None:
        return []
    stop = next((stop for _, stop, _ in query.passages(newest.id)), 0)
    return [Pick(query.store.row(newest.id, query.fingerprint), (Passage(newest.id, 0, stop, 0.0),))]


def _written(row: DocumentRow) -> tuple[str, str]:
    return row.updated_at, row.id


def _score(passage: Passage) -> float:
    return passage.score
