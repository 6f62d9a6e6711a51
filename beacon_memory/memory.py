"""BeaconMemory: documents in, answers out."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import itertools
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.scoring import check_score
from beacon_memory.compression.work import Ratio
from beacon_memory.generation.decode_loop import DecodeLoop, Ticket
from beacon_memory.generation.generate import Request, generate, require_room
from beacon_memory.generation.options import DEFAULT_MAX_NEW_TOKENS, generation_config
from beacon_memory.generation.prompt import chat_prompt, said_before
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage import erasing, repair
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.repair import RECOMPRESSED, Problem
from beacon_memory.storage.store import MemoryStore

from .asked import Asked
from .conversation import Messages
from .documents import Document
from .errors import BeaconMemoryError, InputError
from .explain import explained
from .hot import HotMemories
from .ingest import Ingestion
from .load_once import LoadOnce, ModelSource
from .picking import (
    DEFAULT_LIMIT,
    SESSION_BUDGET,
    Pick,
    Picker,
    find_picker,
    fitting,
    last_question,
)
from .question import Question
from .recall import Indexes
from .recollection import Recollection, undisturbed
from .results import Added, Answer, Explanation, LoadedDocument, Place, Progress

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

__all__ = ["BeaconMemory"]

_Read = TypeVar("_Read")
_Named = TypeVar("_Named", bound="str | Path | BeaconModel | None")


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
    score:   how `select` and `hybrid` choose tokens: `repeat`, or `expected`, a prediction that saves a pass; `auto`:
             `expected` if the adapter has a probe for it, else `repeat`; what is appended, as the document before it.
    hot_bytes: of memories that stay ready for attention after a question, on the device and in RAM each; by default a
             quarter of what is free there. Quantized ones count with their bits. `warm` makes them ready before.
    picker:  how documents are found for a question that names none, and passages in those that are loaded in part:
             `text`, by the words that they share with it; `attention`, where words do not tell which passages are
             meant, also by what the model looks up when it reads the question, which takes it a short pass more; the
             name of an installed picker, or a `Picker`.

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
        score: str = "auto",
        hot_bytes: int | None = None,
        picker: str | Picker = "attention",
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
    def source(self) -> ModelSource:
        """The names that another process loads the same model by; raises InputError if a loaded one has none."""
        return self._load_once.source

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
        asked: dict[Ticket, tuple[int, Asked]] = {}
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

    def _stream(self, asked: Asked) -> Generator[str | Answer]:
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

        def begin() -> tuple[Asked, Ticket | None]:
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
    def _recollection(self) -> Recollection:
        return Recollection(self.store, self._load_once, self._hot, self._indexes, self._picker)

    def _submit(self, asked: Asked) -> Ticket:
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
        asked, recollection = Question(question, ids, budget, session_budget, limit=limit), self._recollection
        _, _, room = self._prompted(asked)

        def tokenized(text: str) -> Sequence[tuple[int, int]]:
            return self.compressor.tokenize(text).offsets

        def tell() -> Explanation:
            loaded = recollection.choose(asked, room)
            passages = [explained(one, self.store, tokenized, recollection.slot_bytes) for one in loaded]
            return Explanation(
                question=last_question(question),
                ids=tuple(one.row.id for one in loaded),
                slots=sum(one.slots for one in loaded),
                bytes=sum(one.slots for one in loaded) * recollection.slot_bytes,
                passages=tuple(itertools.chain.from_iterable(passages)),
            )

        return undisturbed(tell)

    def _asked(self, question: Question) -> Asked:
        """Check a question, choose its documents and load them."""
        model = self.model  # loading it, when it is first needed, is no part of an answer's time
        started = time.perf_counter()
        prompt, config, room = self._prompted(question)
        # a small reader answers from what stands nearest to the question, so memories do, not what was said before
        said = 0
        if question.ids != []:  # else there is nothing to stand in front of
            said = said_before(model, question.messages, prompt, **self._template(question))
        recollection, beside = self._recollection, room + self.compressor.sink.slots + said
        loaded, prefix, places = recollection.loaded(lambda: recollection.choose(question, room), beside, prompt[:said])
        said = said if loaded else 0
        documents = tuple(
            LoadedDocument(one.row.id, place, one.slots, one.entries * recollection.entry_bytes, len(one.sources))
            for one, place in zip(loaded, places, strict=True)
        )
        evidence = recollection.evidence(question, loaded)
        request = Request(prefix, prompt[said:])
        return Asked(question, loaded, documents, said, evidence, request, config, model.tokenizer, started)

    def _template(self, question: Question) -> dict[str, Any]:
        """Return how a question is put into the model's chat template, see `chat_prompt`."""
        return {
            "behind_memory": bool(self.compressor.sink.slots) or question.ids != [],
            "tools": question.tools,
            "chat_template_kwargs": question.chat_template_kwargs,
        }

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
        prompt = chat_prompt(model, question.messages, **self._template(question))
        require_room(model, slots, len(prompt), new_tokens)
        return prompt, config, model.max_positions - slots - len(prompt) - new_tokens

    def pick(self, question: Messages, limit: int = DEFAULT_LIMIT, room: int | None = None) -> builtins.list[Pick]:
        """Choose up to `limit` documents for a question, as `ask` does without ids: best first, [] if nothing is found.

            [pick.id for pick in memory.pick("Who pays the rent?")]

        A document counts by its best passage, and must reach half the score of the best document. A text that is stored
        under several ids counts once. What conversations were folded into (`Session`) is never chosen. A store of one
        text needs no passage. room: memory slots at hand; documents that do not fit beside better ones are left out.
        """
        picks = self._recollection.picks(question, limit)
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

    def warm(self, ids: str | Sequence[str]) -> tuple[Place, ...]:
        """Make the memories of documents ready, so that the next question about one opens no file.

        Returns where each was: `remote`, in object storage; `cold`, in its file on this machine; in `ram`; or on the
        `device`. As much is kept as `hot_bytes` allows, the last ones first.

        Raises DocumentNotFoundError, CorruptFileError or FingerprintMismatchError.
        """
        room, recollection = self.room("") + self.compressor.sink.slots, self._recollection
        return tuple(recollection.warm(id, room) for id in ([ids] if isinstance(ids, str) else ids))

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


def _cancel_begun(beginning: asyncio.Future[tuple[Asked, Ticket | None]]) -> None:
    """Cancel an answer that was begun after nobody waited for it any more."""
    if not beginning.cancelled() and beginning.exception() is None and (ticket := beginning.result()[1]) is not None:
        ticket.cancel()
