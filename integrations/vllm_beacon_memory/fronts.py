"""Fronts of prompts: the sink and memories, as placeholders for vLLM and as K/V for its cache.

To vLLM, each slot of a memory is a token of the prompt whose keys and values are in the cache already. The ids of
these tokens mean nothing: they are drawn from a hash of what the slots hold, as the salt of vLLM's prefix cache is, so
two memories have different ones, and the cache takes none for another. Slot j has position j, and the prompt follows.

vLLM's cache has the same tokens in all heads. So only K/V that are uniform can stand there: sections of which every
head of every layer has every token, and beacons.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from beacon_memory.errors import ConflictError, DocumentNotFoundError, InputError
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.rope import apply_rotation
from beacon_memory.picking import DEFAULT_LIMIT, PASSAGES_EACH, Passage, Query, find_picker, pick
from beacon_memory.recall import DEFAULT_SLOTS, Budget, Indexes, Portion, portions
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.kv_file import StoredIndex
from beacon_memory.storage.reading import read_document_part
from beacon_memory.storage.store import MemoryStore

from .model_folder import ModelFolder

__all__ = ["PARAMETER", "SALT", "Front", "Fronts", "Part", "places_in_blocks"]

PARAMETER = "beacon_memory"  # the name of ours among the `kv_transfer_params` of a request
SALT = "beacon_memory:"  # what the `cache_salt` of a request with a memory begins with

Found = tuple[DocumentRow, StoredIndex]


@dataclass(frozen=True, slots=True)
class Part:
    """A document, or some of its sections.

    root:     the hash that stands for its files, so for all of its K/V.
    sections: their numbers in the order in which they stand; None for all.
    """

    id: str
    root: str
    sections: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """Tell what stands in front of a prompt.

        llm.generate(front.prompt(ids), SamplingParams(extra_args={"kv_transfer_params": front.kv_transfer_params}))

    parts: documents, one behind another; the sink is in front of them.
    slots: that all of it takes, the sink included: tokens and positions of vLLM.
    model: the folder of the model.
    """

    parts: tuple[Part, ...]
    slots: int
    model: ModelFolder

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        """Return the parameter of a request that tells the connector what to load."""
        return {PARAMETER: [asdict(part) for part in self.parts]}

    @property
    def cache_salt(self) -> str:
        """Return the salt of vLLM's prefix cache, a hash of what stands here and of the model that made it."""
        told = json.dumps([[asdict(part) for part in self.parts], self.model.fingerprint.to_dict()], sort_keys=True)
        return SALT + hashlib.sha256(told.encode()).hexdigest()

    @property
    def token_ids(self) -> list[int]:
        """Return the placeholders, a token id for each slot."""
        drawn = hashlib.shake_256(self.cache_salt.encode()).digest(4 * self.slots)
        return [number % self.model.vocab_size for number in struct.unpack(f"<{self.slots}I", drawn)]

    def prompt(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return a prompt of vLLM: the token ids of a conversation in the model's chat template, behind the memory.

        The bos token that a template may set is left out: it stands in front of the memory. Raises InputError for no
        ids.
        """
        bos = [*self.model.leading_bos]
        own = [*ids][len(bos) :] if self.slots and bos and [*ids][: len(bos)] == bos else [*ids]
        if not own:
            raise InputError("ids=[] is no prompt: something has to follow the memory")
        return {"prompt_token_ids": self.token_ids + own, "cache_salt": self.cache_salt}


class Fronts:
    """Put documents in front of prompts: those of a store, read for the model in a folder.

        fronts = Fronts("my-store", "model-folder")
        fronts.of(["lease"])
        fronts.about("Who pays the rent?", budget=512)

    store: as `MemoryStore` takes it. model: a folder that `write_model_folder` wrote. namespace: of the documents.
    """

    def __init__(
        self, store: str | os.PathLike[str] | MemoryStore, model: str | Path | ModelFolder, namespace: str = ""
    ) -> None:
        self.model = model if isinstance(model, ModelFolder) else ModelFolder.read(model)
        opened = store if isinstance(store, MemoryStore) else MemoryStore(store)
        self.store = opened.within(namespace) if namespace else opened
        self._indexes = Indexes()

    def of(self, ids: Sequence[str]) -> Front:
        """Return whole documents, one behind another; no ids give the sink alone, as answers without documents have it.

        Raises DocumentNotFoundError, FingerprintMismatchError for a document that another model compressed, and
        InputError for one whose heads keep different tokens.
        """
        if isinstance(ids, str):
            raise InputError(f"ids={ids!r} must be several; put the id into a list")
        return self._front([Part(id, self._row(id).root) for id in ids])

    def about(
        self,
        question: str,
        ids: Sequence[str] | None = None,
        *,
        budget: int | str = DEFAULT_SLOTS,
        limit: int = DEFAULT_LIMIT,
    ) -> Front:
        """Return the passages that a question is about, whole ones, as many as a budget holds; the best stands last.

        ids: of documents; without them full-text search chooses up to `limit`. Documents that fit are taken whole.
        budget: as `BeaconMemory.ask` has it. Raises as `of`, and InputError if not one passage fits the budget.
        """
        found, passages = self._chosen(question, ids, limit)
        for row, index in found:
            _require_uniform(row.id, index, range(len(index.counts)))
        layers, heads, head_dim = self.model.kv_shape
        tokens = sum(row.tokens for row, _ in found)
        slots = Budget.of(budget).slots_for(tokens, 4 * layers * heads * head_dim)
        documents = sorted(portions(found, passages, None), key=lambda portion: portion.best)
        if sum(row.slots for row, _ in found) <= slots:
            return self._front([Part(one.row.id, one.row.root) for one in documents])
        chosen = _best_sections(documents, slots)
        if not any(chosen):
            raise InputError(
                f"budget={budget!r}: no whole passage of {[row.id for row, _ in found]} that matches the question "
                "fits; allow more"
            )
        numbered = zip(documents, chosen, strict=True)
        return self._front([Part(one.row.id, one.row.root, sections) for one, sections in numbered if sections])

    def requested(self, parameters: Mapping[str, Any] | None) -> Front:
        """Return what the `kv_transfer_params` of a request name.

        Raises InputError if they name nothing that can be, ConflictError if a document was replaced since, and as `of`.
        """
        given = (parameters or {}).get(PARAMETER)
        return self._front([_part(one) for one in given] if isinstance(given, list) else _refuse(given))

    def load(
        self, parts: Sequence[Part], start: int, stop: int, *, device: torch.device | str = "cpu", dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Read the K/V of the slots from `start` to below `stop`, and of the files not much more.

        Returns keys, rotated to the positions of their slots, and values, [layers, kv_heads, stop - start, head_dim]
        each, compared with their hashes. Raises ConflictError if a document was replaced, and CorruptFileError.
        """
        layers, heads, head_dim = self.model.kv_shape
        shape = (layers, heads, stop - start, head_dim)
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        at = self.model.sink.slots
        sink = self.model.sink[start : min(stop, at)]
        keys[:, :, : sink.slots], values[:, :, : sink.slots] = sink.keys, sink.values
        for part in parts:
            row, index = self._found(part)
            begins: dict[int, int] = {}  # the slot at which each section begins that is wanted
            for number in _numbers(part, index):
                first, at = at, at + index.header.sections[number].size
                if first < stop and at > start:
                    begins[number] = first
            if begins:
                _require_uniform(row.id, index, [*begins])
                slots, *read = self._read(row, index, begins, device, dtype)
                wanted = (slots >= start) & (slots < stop)
                for whole, own in zip((keys, values), read, strict=True):
                    whole[:, :, slots[wanted] - start] = own[:, :, wanted]
        cos, sin = self.model.rope.table(torch.arange(start, stop, device=device))
        return apply_rotation(keys, cos, sin), values

    def _read(
        self,
        row: DocumentRow,
        index: StoredIndex,
        begins: Mapping[int, int],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read uniform sections of a document: the slot of each of their tokens, keys before RoPE, and values."""
        sections = index.header.sections
        file = read_document_part(
            self.store.parts, row, [0 if number in begins else LEVELS for number in range(len(sections))]
        )
        memory = file.memory(device, dtype)
        shape = (*self.model.kv_shape[:2], -1)
        slots = torch.cat([torch.arange(sections[one].size) + begins[one] for one in sorted(begins)]).to(device)
        return slots, memory.keys.unflatten(0, shape), memory.values.unflatten(0, shape)

    def _front(self, parts: Sequence[Part]) -> Front:
        """Check that parts can stand in front of a prompt, and count their slots."""
        slots = self.model.sink.slots
        for part in parts:
            _, index = self._found(part)
            numbers = _numbers(part, index)
            _require_uniform(part.id, index, numbers)
            slots += sum(index.header.sections[number].size for number in numbers)
        return Front(tuple(parts), slots, self.model)

    def _row(self, id: str) -> DocumentRow:
        return self.store.row(id, self.model.fingerprint.digest)

    def _indexed(self, row: DocumentRow) -> Found:
        row, index = self._indexes.get(self.store, row)
        self.model.fingerprint.require(index.header.fingerprint, row.id)
        return row, index

    def _found(self, part: Part) -> Found:
        """Return row and index of a document; raises ConflictError if it is not the one that is meant any more."""
        row, index = self._indexed(self._row(part.id))
        if row.root != part.root:
            raise ConflictError(f"document {part.id!r} was replaced since this was made of it; make it anew")
        return row, index

    def _chosen(
        self, question: str, ids: Sequence[str] | None, limit: int
    ) -> tuple[list[Found], dict[str, list[Passage]]]:
        """Return documents, and the passages of each that share words with a question."""
        picker, fingerprint = find_picker("text"), self.model.fingerprint.digest
        if ids is None:
            picks = pick(picker, Query(question, self.store, PASSAGES_EACH * limit, _no_model, fingerprint), limit)
            if not picks:
                raise DocumentNotFoundError("no document matches the question; name documents by id")
            return [self._indexed(one.row) for one in picks], {one.id: [*one.passages] for one in picks}
        query = Query(question, self.store, PASSAGES_EACH * len(ids), _no_model, fingerprint, tuple(ids))
        passages: dict[str, list[Passage]] = {id: [] for id in ids}
        for passage in picker(query):
            passages[passage.document].append(passage)
        return [self._indexed(self._row(id)) for id in ids], passages


def places_in_blocks(blocks: Sequence[int], size: int, start: int, stop: int) -> Tensor:
    """Return where the slots from `start` to below `stop` lie in a cache of blocks, [stop - start] int64.

    blocks: ids of those that a request has, the first one for slots 0 to size - 1; a block may be filled in part.
    """
    slots = torch.arange(start, stop)
    return torch.tensor(blocks, dtype=torch.int64)[slots // size] * size + slots % size


def _no_model() -> NoReturn:
    raise InputError("vLLM has the model; full-text search needs none")


def _refuse(given: object) -> NoReturn:
    raise InputError(
        f"kv_transfer_params[{PARAMETER!r}]={given!r} must be a list of documents, as in `Front.kv_transfer_params`"
    )


def _part(given: object) -> Part:
    """Read one document of a request."""
    if not isinstance(given, dict) or given.keys() != {"id", "root", "sections"}:
        _refuse(given)
    sections = given["sections"]
    numbers = sections is None or (isinstance(sections, list | tuple) and all(type(one) is int for one in sections))
    if not numbers or not isinstance(given["id"], str) or not isinstance(given["root"], str):
        _refuse(given)
    return Part(given["id"], given["root"], None if sections is None else tuple(sections))


def _numbers(part: Part, index: StoredIndex) -> Sequence[int]:
    """Return the numbers of the sections of a part; raises InputError for those that the document does not have."""
    count = len(index.counts)
    if part.sections is None:
        return range(count)
    if len({*part.sections}) < len(part.sections) or not all(0 <= one < count for one in part.sections):
        raise InputError(f"sections={list(part.sections)} must be different ones of the {count} of {part.id!r}")
    return part.sections


def _require_uniform(id: str, index: StoredIndex, numbers: Sequence[int]) -> None:
    """Raise InputError unless every head has every position of some sections."""
    sizes = torch.tensor([index.header.sections[number].size for number in numbers], dtype=torch.int64)
    held = index.counts.sum(1, dtype=torch.int64)[torch.tensor([*numbers], dtype=torch.int64)]
    if not bool((held == sizes[:, None, None]).all()):
        heads = held.sum(0)
        raise InputError(
            f"document {id!r} cannot stand in vLLM's cache: its heads keep {int(heads.min())} to {int(heads.max())} of "
            f"{int(sizes.sum())} positions, each its own, and there all heads have the same tokens; add it with "
            "ratio=0 or 1, which keep every token, or with compression='beacon' and a ratio at which no head drops any"
        )


def _best_sections(documents: Sequence[Portion], slots: int) -> list[tuple[int, ...]]:
    """Return of each document the sections that match a question best and fit into slots.

    The best one stands last; equally good ones keep the order of the text.
    """
    ranked = [
        (relevance, document, section)
        for document, portion in enumerate(documents)
        for section, relevance in enumerate(portion.relevance)
        if relevance > 0
    ]
    ranked.sort(key=lambda one: -one[0])
    ends = accumulate(documents[document].index.header.sections[section].size for _, document, section in ranked)
    taken = [one for one, end in zip(ranked, ends, strict=True) if end <= slots]
    taken.sort(key=lambda one: (one[0], one[2]))
    return [tuple(section for _, of, section in taken if of == document) for document in range(len(documents))]
