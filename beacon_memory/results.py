"""Results of a BeaconMemory: documents that were added, answers, progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "LEAST_LIKELIHOOD",
    "LEAST_WORDS",
    "NOT_IN_MEMORY",
    "Added",
    "Answer",
    "Evidence",
    "ExplainedPassage",
    "ExplainedWord",
    "Explanation",
    "LoadedDocument",
    "Place",
    "Progress",
    "SourcePassage",
    "Status",
    "ToolCall",
    "UnreadCall",
    "Usage",
]

NOT_IN_MEMORY = "That is not in memory."  # what `ask` answers where it abstains
# Below these an answer is not supported. Chosen on questions that were asked of the right article and of a wrong one.
LEAST_WORDS = 0.42
LEAST_LIKELIHOOD = 0.33

Status = Literal["added", "replaced", "unchanged", "appended", "compacted", "recompressed"]
# Where a document's memory was: in object storage, in its file on this machine, or ready in RAM or on the device.
Place = Literal["remote", "cold", "ram", "device"]


@dataclass(frozen=True, slots=True)
class Added:
    """The result of adding a document.

    status:  `added`, `replaced`, `appended`, `compacted`, `recompressed`, or `unchanged` if the same text was
             stored already, compressed in the same way.
    tokens:  raw tokens. slots: memory slots they were compressed to. bytes: of its K/V.
    ratios:  raw tokens per memory slot, each value that occurs.
    compression: the name of the method, such as `beacon`, `select` or `hybrid`.
    precision:   in which its K/V are kept.
    seconds: since the document before it was done.
    evicted: ids of documents that had to go to keep the quota.
    """

    id: str
    status: Status
    tokens: int
    slots: int
    bytes: int
    ratios: tuple[int, ...]
    compression: str
    precision: str
    seconds: float
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Count the tokens that were compressed, and those of all documents that were begun."""

    tokens: int
    begun: int


@dataclass(frozen=True, slots=True)
class LoadedDocument:
    """Tell what was loaded of a document for a question.

    place:    where its memory was.
    slots:    that it takes, the mean over heads.
    bytes:    of its keys, values and places in the dtype of the checkpoint, as a budget counts them.
    passages: of which something was loaded.
    """

    id: str
    place: Place
    slots: int
    bytes: int
    passages: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Count the memory slots loaded (sink included, the mean over heads), and the tokens of prompt and answer.

    documents: what was loaded of each, in the order of the answer's ids.
    """

    slots: int
    prompt_tokens: int
    generated_tokens: int
    documents: tuple[LoadedDocument, ...] = ()


@dataclass(frozen=True, slots=True)
class SourcePassage:
    """A passage that an answer was given from: the characters from `start` to `stop` of a document's text.

    relevance: score of the question's search; 0 for one that was loaded for want of a better use of the budget, or
               because everything was.
    loaded:    the share of its K/V that was loaded, the mean over heads; 1 for all tokens in all heads.
    """

    document: str
    start: int
    stop: int
    relevance: float
    loaded: float


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: an id of its own, the tool's name, and the arguments."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UnreadCall:
    """A call that cannot be read: what stands between the tags, all of it with the tags, and why."""

    inside: str
    text: str
    error: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Signs that an answer is in memory; see `Answer.supported`.

    words:      the share of the question's words that one passage has of which something was loaded, 0 to 1; question
                words, such as "where", do not count.
    likelihood: the geometric mean of the probabilities that the model gave the tokens of the answer, 0 to 1; None for
                beams, of which it is not known.
    """

    words: float
    likelihood: float | None = None

    @property
    def relevant(self) -> bool:
        """Whether something was loaded that the question is about."""
        return self.words >= LEAST_WORDS

    @property
    def sure(self) -> bool:
        """Whether the model was sure of its answer."""
        return self.likelihood is None or self.likelihood >= LEAST_LIKELIHOOD


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, with the documents that it was given from.

    text: as the model wrote it, calls of tools included.
    parts: the texts and calls that it is made of, in their order; without tools it is all text.
    ids: documents, in the order in which they were named or picked.
    time_to_first_token, seconds: from the question on, loading K/V from disk included, loading the model not.
    sources: the passages of which something was loaded, in the order of documents and their texts.
    evidence: what speaks for the answer; None without documents, and with tools.
    ended: whether the model, or a stop string, ended it; False if it was cut off at `max_new_tokens` or `max_time`.
    """

    text: str
    parts: tuple[str | ToolCall | UnreadCall, ...]
    ids: tuple[str, ...]
    usage: Usage
    time_to_first_token: float
    seconds: float
    sources: tuple[SourcePassage, ...] = ()
    evidence: Evidence | None = None
    ended: bool = True

    @property
    def supported(self) -> bool | None:
        """Whether what was asked seems to be in memory: False if nothing relevant was loaded or the model was unsure.

        It errs: see docs/evaluation.md for how often. None where there is no evidence.
        """
        return None if self.evidence is None else self.evidence.relevant and self.evidence.sure

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ExplainedWord:
    """A word: the characters from `start` to `stop` of a document's text, and the share of its K/V that is loaded."""

    start: int
    stop: int
    loaded: float


@dataclass(frozen=True, slots=True)
class ExplainedPassage:
    """A passage with what would be loaded of it.

    relevance, loaded: as of `SourcePassage`; loaded is 0 for a passage of which nothing is.
    slots, bytes: memory slots that this takes, the mean over heads, and bytes in the model's dtype.
    words: of the passage; () if nothing is loaded, or if its K/V are those of beacons, which stand for several words.
    """

    document: str
    start: int
    stop: int
    text: str
    relevance: float
    loaded: float
    slots: float
    bytes: int
    words: tuple[ExplainedWord, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """The passages that would be loaded for a question.

    ids: documents in the order in which they would be loaded.
    slots, bytes: of all that would be loaded, the sink not counted; beacons that stand behind whole windows (`hybrid`)
           count here, and in no passage.
    passages: all of these documents, in the order of documents and texts, those of which nothing is loaded, too.
    """

    question: str
    ids: tuple[str, ...]
    slots: int
    bytes: int
    passages: tuple[ExplainedPassage, ...]
