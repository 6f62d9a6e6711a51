"""BeaconMemory: documents in, answers out."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import itertools
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.scoring import check_score
from beacon_memory.compression.work import Ratio
from beacon_memory.generation.decode_loop import DecodeLoop, Ticket
from beacon_memory.generation.generate import Generation, Request, generate, require_room
from beacon_memory.generation.options import DEFAULT_MAX_NEW_TOKENS, generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.generation.tool_calls import read_answer
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import BeaconModel, require_made
from beacon_memory.storage import erasing, repair
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.catalog.words import words
from beacon_memory.storage.files.kv_file import StoredIndex
from beacon_memory.storage.reading import READ_TRIES
from beacon_memory.storage.repair import RECOMPRESSED, Problem
from beacon_memory.storage.store import MemoryStore

from .conversation import Messages, turns_of
from .documents import SESSION_TAG, Document
from .errors import BeaconMemoryError, ConflictError, DocumentNotFoundError, InputError
from .evidence import words_together
from .explain import explained
from .hot import HotMemories
from .ingest import Ingestion
from .load_once import LoadOnce, ModelSource
from .lookup import Lookup, gist_slots, sections_of_entries
from .picking import (
    DEFAULT_LIMIT,
    PASSAGES_EACH,
    SESSION_BUDGET,
    Passage,
    Pick,
    Picker,
    Query,
    asked_about,
    find_picker,
    fitting,
    in_context,
    last_question,
    pick,
    telling,
)
from .question import Question
from .recall import DEFAULT_SLOTS, Budget, Indexes, Portion, level_counts, portions, slots_of_passages
from .results import NOT_IN_MEMORY, Added, Answer, Evidence, Explanation, LoadedDocument, Place, Progress, Usage

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

__all__ = ["BeaconMemory"]

_Read = TypeVar("_Read")
_Named = TypeVar("_Named", bound="str | Path | BeaconModel | None")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """Hold a question that is ready to be answered."""

    question: Question
    loaded: Sequence[Portion]
    documents: tuple[LoadedDocument, ...]
    evidence: Evidence | None
    request: Request
    config: GenerationConfig
    tokenizer: Any
    started: float

    @property
    def refused(self) -> Answer | None:
        """The answer to a question that is abstained from before anything is generated; None to any other."""
        if not self.question.abstain or self.evidence is None or self.evidence.relevant:
            return None
        return self.answer(Generation((), NOT_IN_MEMORY, time.perf_counter()))

    def shown(self, piece: str | Generation | None) -> Iterator[str | Answer]:
        """Yield what a stream shows for a piece of the generated text, or for all of it; None: nothing is generated."""
        if isinstance(piece, str):
            if not self.question.abstain:  # else it is only known at the end whether it is the answer
                yield piece
            return
        answer = self.refused if piece is None else self.answer(piece)
        if answer is not None:
            if self.question.abstain:
                yield answer.text
            yield answer

    def answer(self, generation: Generation) -> Answer:
        """Return the answer of which a text was generated."""
        now = time.perf_counter()
        parts = read_answer(
            self.tokenizer,
            generation.text,
            generation.tokens,
            prompt=self.request.prompt,
            stops=self.config.stop_strings or (),
            tools=self.question.tools,
        )
        evidence = self.evidence
        if evidence is not None and generation.likelihoods:
            evidence = replace(evidence, likelihood=math.exp(fmean(generation.likelihoods)))
        answer = Answer(
            text=generation.text,
            parts=parts,
            ids=tuple(one.row.id for one in self.loaded),
            usage=Usage(self.request.memory.slots, len(self.request.prompt), len(generation.tokens), self.documents),
            time_to_first_token=generation.first_token_at - self.started,
            seconds=now - self.started,
            sources=tuple(source for one in self.loaded for source in one.sources),
            evidence=evidence,
            ended=generation.ended,
        )
        if self.question.abstain and answer.supported is False:
            return replace(answer, text=NOT_IN_MEMORY, parts=(NOT_IN_MEMORY,), ended=True)
        return answer


def _wherever(name: _Named) -> _Named | Path:
    """Return the absolute path of what is there, and the same wherever this process goes before it is loaded."""
    return Path(name).absolute() if name and isinstance(name, (str, Path)) and Path(name).exists() else name


class BeaconMemory:
    """Long-term memory of a local language model: each document is read once and answers from then on.

    store:   folder of the documents, created when first written to, or the URL of a PostgreSQL database; or a
             MemoryStore, for one with files elsewhere.
    model:   folder, GGUF file or hub name of the base model, or a loaded BeaconModel; by default the embedded one.
    adapter: folder or hub name of a beacon adapter for it.
    namespace: the part of the store to work in, which sees no other's documents; see `within`.
    reserve: positions of the model that `ratio="auto"` leaves free behind a document for question and answer.
    score:   how `select` and `hybrid` choose tokens: `repeat`, or `expected`, which is worse and saves a pass.
    hot_bytes: of memories that stay ready for attention after a question, on the device and in RAM each; by default a
             quarter of what is free there. Quantized ones count with their bits. `warm` makes them ready before.
    picker:  how documents are found for a question that names none: `text`, by the words that they share with it,
             `attention`, by what the model looks up when it reads the question, too, which takes it a short pass more;
             the name of an installed picker, or a `Picker`.

    A copy shares model and store. Pickled, it holds the names of both, and opens them again.

    The model is loaded when it is first needed: listing, searching and removing do without. What needs no model at all
    is found at `store`: labels, renaming, settings, precision.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | MemoryStore,
        model: str | Path | BeaconModel | None = None,
        adapter: str | Path | None = None,
        *,
        namespace: str = "",
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        reserve: int = 1024,
        score: str = "repeat",
        hot_bytes: int | None = None,
        picker: str | Picker = "text",
    ) -> None:
        if isinstance(model, BeaconModel) and (adapter is not None or device is not None):
            raise InputError("adapter and device belong to a model that is still to be loaded, and this one is")
        check_score(score)
        self._picker = find_picker(picker)
        opened = store if isinstance(store, MemoryStore) else MemoryStore(store)
        self.store = opened.within(namespace) if namespace else opened
        model, adapter = _wherever(model), _wherever(adapter)
        self._load_once = LoadOnce(ModelSource(model, adapter, device, dtype, reserve, score))
        self._hot = HotMemories(hot_bytes)
        self._indexes = Indexes()

    def __deepcopy__(self, memo: object) -> BeaconMemory:
        """Return a copy that shares model and store, as `within` does."""
        return copy.copy(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store's catalog."""
        self.store.close()

    def within(self, namespace: str) -> BeaconMemory:
        """The same model and store in another namespace; "" is the one outside all others."""
        other = copy.copy(self)
        other.store = self.store.within(namespace)
        return other

    @contextlib.contextmanager
    def in_namespace(self, namespace: str | None) -> Iterator[BeaconMemory]:
        """Open the memory in a namespace, None for its own; what was opened for that is closed behind it."""
        if namespace is None or namespace == self.store.namespace:
            yield self
            return
        with self.within(namespace) as other:
            yield other

    @property
    def compressor(self) -> BeaconCompressor:
        """The compressor, and with it the loaded model."""
        return self._load_once()[0]

    @property
    def model(self) -> BeaconModel:
        """The loaded model."""
        return self.compressor.model

    @property
    def _ingestion(self) -> Ingestion:
        return Ingestion(self.store, self.compressor)

    def add(
        self,
        id: str,
        text: str,
        metadata: Mapping[str, object] | None = None,
        ratio: Ratio = "auto",
        compression: str = "auto",
        precision: str = "auto",
    ) -> Added:
        """Compress a document and store it under `id`, in place of what was there.

        ratio: raw tokens per memory slot (2, 4, 8, ...); `auto` for the smallest that fits the model; or a list with
        one for each window. compression: `beacon`, `select` (K/V of chosen tokens; needs no adapter), `hybrid` (both),
        the name of another method, or `auto`, the model's own. precision: what to keep the K/V in, a `Precision`,
        or `auto`, what the store's settings say. A text that is stored already, compressed in the same way by the same
        model, is left as it is.
        Raises ConfigError, InputError or CapacityError if it cannot be compressed, or ConflictError while another
        process adds the same long text; then nothing has changed.
        """
        document = Document(id, text, metadata)
        return self.add_many([document], ratio=ratio, compression=compression, precision=precision)[0]

    def add_many(
        self,
        documents: Iterable[Document | tuple[str, str]],
        ratio: Ratio = "auto",
        compression: str = "auto",
        precision: str = "auto",
        *,
        progress: Callable[[Progress], None] = lambda _: None,
        on_added: Callable[[Added], None] = lambda _: None,
        on_error: Callable[[Document, BeaconMemoryError], None] | None = None,
    ) -> builtins.list[Added]:
        """Add many documents, or pairs of id and text, compressed together; each is stored as soon as it is done.

        They are stored in a thread while the next are computed, and those of a list are tokenized in one, too.
        Returns what became of each, in the order in which they were done. Interrupted, it has lost only what was
        unfinished, and of a document of more than 16 windows nothing: run it again with the same documents, and those
        that are stored are skipped. `on_error` is told of a
        document that cannot be compressed or stored, and the others go on; without it the error is raised, after all
        documents in front of it were stored.
        """
        return self._ingestion.add_many(documents, ratio, compression, precision, progress, on_added, on_error)

    def append(self, id: str, text: str, ratio: int | None = None) -> Added:
        """Let a stored document go on: the new text is read behind its memory, and nothing else.

        All tokens of the new text are kept until a window of the model is full with them. Then this window is read
        anew and compressed, so that the memory is that of the whole text; so it is if there is no room for all tokens.
        `compact` does that at once.

        ratio: of new windows; by default that of the last one. How it was compressed and what it is kept in stay.
        Raises DocumentNotFoundError, FingerprintMismatchError if another model compressed it, or CapacityError if it
        becomes too long; then nothing has changed.
        """
        return self._ingestion.append(id, text, ratio)

    def compact(self, id: str) -> Added:
        """Compress what was appended to a document and is still kept token by token, as `add` compresses a whole text.

        Only its last window is read for that. Returns `unchanged` as status where there is nothing to do. Raises as
        `append`; then nothing has changed.
        """
        return self._ingestion.compact(id)

    def recompress(
        self,
        ids: Iterable[str] | None = None,
        *,
        progress: Callable[[Progress], None] = lambda _: None,
        on_added: Callable[[Added], None] = lambda _: None,
        on_error: Callable[[Document, BeaconMemoryError], None] | None = None,
    ) -> builtins.list[Added]:
        """Compress all documents that another model or adapter compressed anew from their texts, or some of them.

        So are those whose files are of a format that is not read any more.

        Ratios, compression, precision and label stay. Interrupted, just run it again. Readers with the old model go on
        with the old K/V until all documents are renewed.
        """
        rows = self.list() if ids is None else [self.show(id) for id in ids]
        current = self.model.fingerprint.digest
        due = [row for row in rows if row.fingerprint != current or not row.root]
        done = self._ingestion.recompress(due, progress, on_added, on_error, keep_versions=True)
        if all(row.fingerprint == current for row in self.list()):
            self.store.drop_versions()
        return done

    def ask(
        self,
        question: Messages,
        ids: str | Sequence[str] | None = None,
        *,
        budget: int | str | None = None,
        session_budget: int = SESSION_BUDGET,
        abstain: bool = False,
        limit: int = DEFAULT_LIMIT,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from the memory of some documents.

        question: a text, or a conversation as dicts with `role` and `content`, as the model's chat template takes them.
        ids:      documents to answer from; None chooses up to `limit`, see `pick`. They stand in this order, but those
                  in which passages are found behind the others, the best match last.
        abstain:  whether to answer `NOT_IN_MEMORY` where the answer is not supported, see `Answer.supported`.
        budget:   how much of their memories is loaded: a number of slots, bytes as "64MB", or a ratio as "x16", a slot
                  for 16 tokens. It is spent where the question is, see `zoom`. By default 256 slots are loaded where
                  passages are found, else all that fits the model's positions.
        session_budget: without a `budget`, how many slots are loaded of what conversations were folded into
                  (`Session`), where the question is, beside those of other documents.
        stop:     strings at which the answer ends. seed: of sampling.
        schema:   a JSON schema: the answer is JSON that meets it, unless max_new_tokens cuts it off. Neither tools, nor
                  `abstain`, nor beams go with it.
        tools:    JSON schemas of functions that the model may call, for chat templates that have a place for them;
                  `Answer.parts` has the calls.
        chat_template_kwargs: what else the chat template knows, such as {"enable_thinking": False} for Qwen3.
        options:  as for transformers' `generate`: max_new_tokens (256), temperature, top_p, num_beams, ...

        Raises DocumentNotFoundError, CapacityError (before any work) if prompt and answer exceed the model's positions,
        or FingerprintMismatchError for a document that another model compressed.
        """
        how = (session_budget, abstain, limit, stop, seed, schema, tools, chat_template_kwargs, options)
        asked = self._asked(Question(question, ids, budget, *how))
        if (refused := asked.refused) is not None:
            return refused
        if (asked.config.num_beams or 1) > 1:
            ((generation, *_),) = generate(self.model, [asked.request], asked.config, seed=seed)
            return asked.answer(generation)
        ticket = self._submit(asked)
        try:
            return asked.answer(ticket.result())
        finally:
            ticket.cancel()  # for who does not wait for it any more

    def ask_many(self, questions: Iterable[Messages | Question]) -> builtins.list[Answer]:
        """Answer many questions, decoded together; returns the answers in their order.

        A question is a text, a conversation, or a `Question` with documents and options of its own:

            memory.ask_many([Question("Who pays the rent?", "lease"), Question("Who signed?", "lease", seed=1)])

        Each is answered as by `ask`, but for rounding, and none may have beams. Questions are taken, and their memories
        loaded, as far as there is room beside those that are being answered. Raises what `ask` raises, for the first
        question that cannot be asked or answered.
        """
        if isinstance(questions, str):
            raise InputError(f"questions={questions!r} must be several; ask one by ask")
        asked: dict[Ticket, tuple[int, _Asked]] = {}
        answers: dict[int, Answer] = {}

        def submitted() -> Iterator[Ticket]:
            for number, question in enumerate(questions):
                one = self._asked(question if isinstance(question, Question) else Question(question))
                if (refused := one.refused) is not None:
                    answers[number] = refused
                    continue
                ticket = self._submit(one)
                asked[ticket] = number, one
                yield ticket

        for ticket in self._loop.as_finished(submitted()):
            number, one = asked[ticket]
            answers[number] = one.answer(ticket.result())
        return [answers[number] for number in sorted(answers)]

    def stream(
        self,
        question: Messages,
        ids: str | Sequence[str] | None = None,
        *,
        budget: int | str | None = None,
        session_budget: int = SESSION_BUDGET,
        abstain: bool = False,
        limit: int = DEFAULT_LIMIT,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator[str | Answer]:
        """Like `ask`, but yields pieces of the answer as they come, and the whole Answer last.

        Tokens are generated while somebody waits for a piece. All questions that are being answered at a time, streamed
        or not and in whatever thread, are decoded together.
        """
        how = (session_budget, abstain, limit, stop, seed, schema, tools, chat_template_kwargs, options)
        asked = self._asked(Question(question, ids, budget, *how))
        if (asked.config.num_beams or 1) > 1:
            raise InputError(f"num_beams={asked.config.num_beams} cannot be streamed: beams are only known at the end")
        return self._stream(asked)

    def _stream(self, asked: _Asked) -> Generator[str | Answer]:
        if asked.refused is not None:
            yield from asked.shown(None)
            return
        with contextlib.closing(iter(self._submit(asked))) as pieces:
            for piece in pieces:
                yield from asked.shown(piece)

    async def astream(
        self, question: Messages | Question, threads: Executor | None = None
    ) -> AsyncGenerator[str | Answer, None]:
        """Like `stream`, for an event loop, which goes on meanwhile; one thread decodes all that are asked at a time.

            async for piece in memory.astream(Question("Who pays the rent?", "lease")): ...

        threads: where memories are loaded; by default in those of the event loop. Who ends the iteration early, or is
        cancelled, cancels the answer: its place is free after the step that is under way.
        """
        whole = question if isinstance(question, Question) else Question(question)
        left = threading.Event()

        def begin() -> tuple[_Asked, Ticket | None]:
            if left.is_set():  # before its turn came
                raise InputError("nobody waits for this answer any more")
            asked = self._asked(whole)
            return asked, None if asked.refused else self._submit(asked)

        beginning = asyncio.get_running_loop().run_in_executor(threads, begin)
        try:
            asked, ticket = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            left.set()
            beginning.add_done_callback(_cancel_begun)
            raise
        if ticket is None:
            for shown in asked.shown(None):
                yield shown
            return
        async with contextlib.aclosing(aiter(ticket)) as pieces:
            async for piece in pieces:
                for shown in asked.shown(piece):
                    yield shown

    @property
    def _loop(self) -> DecodeLoop:
        return self._load_once()[1]

    @property
    def _lookup(self) -> Lookup:
        return self._load_once()[2]

    def _submit(self, asked: _Asked) -> Ticket:
        return self._loop.submit(asked.request, asked.config, seed=asked.question.seed, schema=asked.question.schema)

    def explain(
        self,
        question: Messages,
        ids: str | Sequence[str] | None = None,
        *,
        budget: int | str | None = None,
        session_budget: int = SESSION_BUDGET,
        limit: int = DEFAULT_LIMIT,
    ) -> Explanation:
        """Tell what `ask` would load for a question, passage by passage and word by word; nothing is answered.

            for passage in memory.explain("Who pays the rent?", "lease", budget="x8").passages:
                print(f"{passage.loaded:.0%} {passage.relevance:.1f} {passage.text}")

        The arguments are those of `ask`, and so are the errors.
        """
        asked = Question(question, ids, budget, session_budget, limit=limit)
        _, _, room = self._prompted(asked)

        def tokenized(text: str) -> Sequence[tuple[int, int]]:
            return self.compressor.tokenize(text).offsets

        def tell() -> Explanation:
            loaded = self._recalled(asked, room)
            passages = [explained(one, self.store, tokenized, self._slot_bytes) for one in loaded]
            return Explanation(
                question=last_question(question),
                ids=tuple(one.row.id for one in loaded),
                slots=sum(one.slots for one in loaded),
                bytes=sum(one.slots for one in loaded) * self._slot_bytes,
                passages=tuple(itertools.chain.from_iterable(passages)),
            )

        return _undisturbed(tell)

    @property
    def _slot_bytes(self) -> int:
        """Return the bytes that a slot of all heads takes when it is loaded."""
        return math.prod(self.model.kv_shape[:2]) * self._entry_bytes

    @property
    def _entry_bytes(self) -> int:
        """Return the bytes that one entry takes: key, value, and a byte for its place."""
        return int(2 * self.model.kv_shape[-1] * self.model.kv_dtype.itemsize + 1)

    def _asked(self, question: Question) -> _Asked:
        """Check a question, choose its documents and load them."""
        model = self.model  # loading it, when it is first needed, is no part of an answer's time
        started = time.perf_counter()
        prompt, config, room = self._prompted(question)
        loaded, prefix, places = self._loaded(lambda: self._recalled(question, room), room + self.compressor.sink.slots)
        documents = tuple(
            LoadedDocument(one.row.id, place, one.slots, one.entries * self._entry_bytes, len(one.sources))
            for one, place in zip(loaded, places, strict=True)
        )
        evidence = self._evidence(question, loaded)
        return _Asked(question, loaded, documents, evidence, Request(prefix, prompt), config, model.tokenizer, started)

    def _evidence(self, question: Question, loaded: Sequence[Portion]) -> Evidence | None:
        """Return what speaks for an answer before there is one; None without documents, and with tools."""
        if not loaded or question.tools:
            return None
        asked = last_question(question.messages)
        places = self.store.places_of_words(asked, [one.row.id for one in loaded])
        said = [words(str(turn.get("content") or "")) for turn in turns_of(question.messages)[:-1]]
        return Evidence(words_together(places, (source for one in loaded for source in one.sources), said))

    def _prompted(self, question: Question) -> tuple[Sequence[int], GenerationConfig, int]:
        """Return the prompt of a question, how it is answered, and the memory slots that the model has left."""
        model = self.model
        config = generation_config(model, question.stop, question.options)
        if (config.num_return_sequences or 1) > 1:
            raise InputError(f"num_return_sequences={config.num_return_sequences}: ask gives one answer; ask again")
        if question.schema is not None:
            beside = {"tools": question.tools, "abstain": question.abstain, "num_beams": (config.num_beams or 1) > 1}
            if given := [name for name, value in beside.items() if value]:
                raise InputError(f"{given[0]} and a schema do not go together: leave one of them out")
        new_tokens, slots = config.max_new_tokens or 0, self.compressor.sink.slots
        prompt = chat_prompt(
            model,
            question.messages,
            behind_memory=bool(slots) or question.ids != [],
            tools=question.tools,
            chat_template_kwargs=question.chat_template_kwargs,
        )
        require_room(model, slots, len(prompt), new_tokens)
        return prompt, config, model.max_positions - slots - len(prompt) - new_tokens

    def _recalled(self, question: Question, room: int) -> builtins.list[Portion]:
        """Choose what is loaded for a question: of which documents, and how much of each."""
        budget = None if question.budget is None else Budget.of(question.budget)
        rows, passages = self._chosen(question)
        found = self._indexed(rows)
        slots = room - max(0, len(found) - 1)  # what each takes is rounded up
        if budget is not None:
            slots = min(slots, budget.slots_for(sum(row.tokens for row, _ in found), self._slot_bytes))
            return self._within(found, slots, slots, question, passages)
        folded = [one for one in found if SESSION_TAG in one[0].tags]
        others = [one for one in found if SESSION_TAG not in one[0].tags]
        remembered = self._remembered(folded, min(question.session_budget, slots), question)
        left = slots - sum(one.slots for one in remembered)
        chosen = [*self._within(others, left, min(left, DEFAULT_SLOTS), question, passages), *remembered]
        places = {row.id: place for place, (row, _) in enumerate(found)}
        return sorted(chosen, key=lambda portion: places[portion.row.id])

    def _indexed(self, rows: Iterable[DocumentRow]) -> builtins.list[tuple[DocumentRow, StoredIndex]]:
        """Return documents with the indexes of their files; raises FingerprintMismatchError for another model's."""
        found = [self._indexes.get(self.store, row) for row in rows]
        for row, index in found:
            require_made(self.model, index.header.fingerprint, row.id, row.precision)
        return found

    def _remembered(
        self, folded: Sequence[tuple[DocumentRow, StoredIndex]], slots: int, question: Question
    ) -> builtins.list[Portion]:
        """Choose what is loaded of a conversation: the passages that tell of the question, and no others.

        So much is loaded of what resembles them that a small reader would take one for the other. Where no passage
        tells of it, all share the budget.
        """
        if _slots(folded) == 0:
            return []
        passages = self._passages(question, [row.id for row, _ in folded])
        kept = telling(itertools.chain.from_iterable(passages.values()))
        if not kept:
            return self._within(folded, slots, slots, question, passages)
        by_document = {row.id: [one for one in kept if one.document == row.id] for row, _ in folded}
        return portions(folded, by_document, min(slots, slots_of_passages(folded, by_document)))

    def _within(
        self,
        found: Sequence[tuple[DocumentRow, StoredIndex]],
        slots: int,
        enough: int,
        question: Question,
        passages: Mapping[str, Sequence[Passage]] | None,
    ) -> builtins.list[Portion]:
        """Choose what is loaded of documents within so many memory slots: all if it fits, else where the question is.

        enough:   slots that are loaded where passages are found.
        passages: that were found for it; None if nobody has looked for them yet.
        """
        if not found:
            return []
        whole = _slots(found)
        if passages is None:
            passages = self._passages(question, [row.id for row, _ in found]) if whole > enough else {}
        if any(one.score > 0 for of_document in passages.values() for one in of_document):
            slots = enough
        return portions(found, passages, None if whole <= slots else slots)

    def _chosen(self, question: Question) -> tuple[builtins.list[DocumentRow], Mapping[str, Sequence[Passage]] | None]:
        """Return the rows of the documents that are named, or of those that are found, with the passages found."""
        fingerprint = self.model.fingerprint.digest
        if question.ids is not None:
            named = [question.ids] if isinstance(question.ids, str) else question.ids
            return [self.store.row(id, fingerprint) for id in named], None
        picks = self._picks(question.messages, question.limit, fingerprint)
        if not picks:
            known = any(self._query("", 1).documents())
            advice = "matches the question; name documents by id" if known else "is stored yet; add some"
            raise DocumentNotFoundError(f"no document {advice}")
        return [one.row for one in picks], {one.id: one.passages for one in picks}

    def _passages(self, question: Question, ids: Sequence[str]) -> dict[str, builtins.list[Passage]]:
        """Return the passages of some documents that a question is about, by their ids."""
        wanted, fingerprint = PASSAGES_EACH * len(ids), self.model.fingerprint.digest
        found: dict[str, builtins.list[Passage]] = {id: [] for id in ids}
        for passage in in_context(
            (self._picker(self._query(text, wanted, fingerprint, tuple(ids))), weight)
            for text, weight in asked_about(question.messages)
        ):
            if passage.document in found:
                found[passage.document].append(passage)
        return found

    def pick(self, question: Messages, limit: int = DEFAULT_LIMIT, room: int | None = None) -> builtins.list[Pick]:
        """Choose up to `limit` documents for a question, as `ask` does without ids: best first, [] if nothing is found.

            [pick.id for pick in memory.pick("Who pays the rent?")]

        A document counts by its best passage, and must reach half the score of the best document. A text that is stored
        under several ids counts once. What conversations were folded into (`Session`) is never chosen. A store of one
        text needs no passage. room: memory slots at hand; documents that do not fit beside better ones are left out.
        """
        picks = self._picks(question, limit)
        if room is None:
            return picks
        kept = {row.id for row in fitting([one.row for one in picks], room)}
        return [one for one in picks if one.id in kept]

    def room(
        self,
        question: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> int:
        """Return the memory slots that the model has left for documents beside a question and its answer."""
        prompt = chat_prompt(
            self.model, question, behind_memory=True, tools=tools, chat_template_kwargs=chat_template_kwargs
        )
        return self.model.max_positions - self.compressor.sink.slots - len(prompt) - max_new_tokens

    def _picks(self, question: Messages, limit: int, fingerprint: str | None = None) -> builtins.list[Pick]:
        query = self._query(last_question(question), PASSAGES_EACH * limit, fingerprint)
        return pick(self._picker, query, limit)

    def _query(
        self, text: str, passages: int, fingerprint: str | None = None, ids: tuple[str, ...] | None = None
    ) -> Query:
        return Query(text, self.store, passages, lambda: self.model, fingerprint, ids, self._looked_up)

    def _looked_up(self, question: str, ids: Sequence[str]) -> builtins.list[Passage]:
        """Return the passages of documents, scored by attention; those of the first ones that fit the model."""
        positions, sink = self.model.max_positions, self.compressor.sink.slots

        def gist() -> builtins.list[Portion]:
            rows = [self.store.row(id, self.model.fingerprint.digest) for id in ids]
            fit = rows[: sum(tokens <= positions for tokens in accumulate(row.tokens for row in rows))]
            found = self._indexed(fit)
            return portions(found, {}, gist_slots(sum(row.tokens for row in fit))) if found else []

        loaded, prefix, _ = self._loaded(gist, positions)
        if not loaded:
            return []
        sections = [(one.row.id, section) for one in loaded for section in one.index.header.sections]
        lowest = [level for one in loaded for level in one.lowest or ()]
        counts = [level_counts(one.index) for one in loaded]
        of_entries = sections_of_entries(counts, lowest, self._lookup.layers, sink)
        scores = self._lookup.relevance(question, prefix, of_entries, len(sections))
        return [Passage(id, one.start, one.stop, score) for (id, one), score in zip(sections, scores, strict=True)]

    def warm(self, ids: str | Sequence[str]) -> tuple[Place, ...]:
        """Make the memories of documents ready, so that the next question about one opens no file.

        Returns where each was: `cold`, in its file; in `ram`; or on the `device`. As much is kept as `hot_bytes`
        allows, the last ones first. Raises DocumentNotFoundError, CorruptFileError or FingerprintMismatchError.
        """
        room = self.room("") + self.compressor.sink.slots
        return tuple(self._warm(id, room) for id in ([ids] if isinstance(ids, str) else ids))

    def _warm(self, id: str, room: int) -> Place:
        def whole() -> builtins.list[Portion]:
            row = self.store.row(id, self.model.fingerprint.digest)
            return portions([self._indexes.get(self.store, row)], {}, None)

        _, _, (place,) = self._loaded(whole, room)
        return place

    def _loaded(
        self, choose: Callable[[], builtins.list[Portion]], room: int
    ) -> tuple[builtins.list[Portion], Prefix, tuple[Place, ...]]:
        """Load what is chosen; returns it, it as a prefix behind the sink, and where each document's memory was.

        It is chosen anew if a document is replaced meanwhile.
        """

        def load() -> tuple[builtins.list[Portion], Prefix, tuple[Place, ...]]:
            loaded = choose()
            return loaded, *self._prefix(loaded, room)

        return _undisturbed(load)

    def _prefix(self, loaded: Sequence[Portion], room: int) -> tuple[Prefix, tuple[Place, ...]]:
        wanted: builtins.list[tuple[Hashable, Callable[[], MemoryKV | QuantizedKV]]]
        wanted = [("sink", lambda: MemoryKV.of(self.compressor.sink))]
        # the best match nearest to the question, as within a document
        placed = sorted(enumerate(loaded), key=lambda numbered: numbered[1].best)
        wanted += [((*self._version(one.row), one.key), partial(self._load, one)) for _, one in placed]
        prefix, (_, *found) = self._hot.prefix(self.model, wanted, room)
        for one in loaded:
            self.store.uses.add(one.row.id)
        places = {number: place for (number, _), place in zip(placed, found, strict=True)}
        return prefix, tuple(places[number] for number in range(len(loaded)))

    def _version(self, row: DocumentRow) -> tuple[str | int, ...]:
        """Return what tells the K/V of a row from those of every other document, and of every other time."""
        place = str(self.store.folder.absolute())
        return place, row.file, row.content_hash, row.fingerprint, row.bytes, row.updated_at

    def _load(self, portion: Portion) -> MemoryKV | QuantizedKV:
        return portion.load(self.store, self.model.device, self.model.dtype)

    def list(
        self,
        *,
        prefix: str = "",
        tags: Iterable[str] = (),
        metadata: Mapping[str, object] | None = None,
        after: str = "",
        limit: int | None = None,
    ) -> builtins.list[DocumentRow]:
        """Return the rows of stored documents in the order of their ids; filters: see `MemoryStore.list`."""
        return self.store.list(prefix=prefix, tags=tags, metadata=metadata, after=after, limit=limit)

    def show(self, id: str) -> DocumentRow:
        """Return the row of a document; raises DocumentNotFoundError."""
        return self.store.row(id)

    def remove(self, id: str) -> None:
        """Forget a document; raises DocumentNotFoundError. Traces of it stay in the store until `erase`."""
        self.store.delete(id)

    def erase(self, *ids: str) -> None:
        """Remove documents with all traces of them, and of all that was removed before; see `storage.erasing.erase`."""
        erasing.erase(self.store, ids)

    def verify(self) -> builtins.list[Problem]:
        """Return what is wrong with the store; see `storage.repair.verify`."""
        return repair.verify(self.store)

    def repair(self) -> builtins.list[Problem]:
        """Mend what `verify` finds; documents whose files are lost or damaged are compressed anew from their texts."""
        return [self._recompressed(problem) for problem in repair.repair(self.store)]

    def _recompressed(self, problem: Problem) -> Problem:
        if problem.mended or problem.kind not in RECOMPRESSED or problem.document is None:
            return problem
        try:
            row = self.show(problem.document)
            self._ingestion.recompress([row], lambda _: None, lambda _: None, None, keep_versions=False)
        except BeaconMemoryError as error:
            return replace(problem, message=f"{problem.message}; it could not be compressed anew: {error}")
        return replace(problem, mended=True)


def _cancel_begun(beginning: asyncio.Future[tuple[_Asked, Ticket | None]]) -> None:
    """Cancel an answer that was begun after nobody waited for it any more."""
    if not beginning.cancelled() and beginning.exception() is None and (ticket := beginning.result()[1]) is not None:
        ticket.cancel()


def _undisturbed(read: Callable[[], _Read]) -> _Read:
    """Read documents, again if one of them is replaced meanwhile; raises ConflictError if that happens too often."""
    for _ in range(READ_TRIES):
        with contextlib.suppress(ConflictError):
            return read()
    raise ConflictError(f"documents were replaced {READ_TRIES} times while they were being read; try again")


def _slots(found: Sequence[tuple[DocumentRow, StoredIndex]]) -> int:
    return sum(row.slots for row, _ in found)
