"""Speed of a store that holds many documents: the figures of `beacon-memory bench store`.

The documents are made up: their words are invented, but as frequent as words are in real texts. Their rows are the ones
that `MemoryStore.put` would have written; only some documents have files.
"""

from __future__ import annotations

import itertools
import math
import mmap
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beacon_memory.documents import Label, Text, content_hash, utc_now
from beacon_memory.kv.fingerprint import Fingerprint
from beacon_memory.kv.levels import LEVELS, level_of, levels_of
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.durable import sync_file
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import read_kv_file
from beacon_memory.storage.files.names import file_name
from beacon_memory.storage.files.segments import joined_headers, joined_kv
from beacon_memory.storage.files.stored_kv import precision_of, stored_bytes
from beacon_memory.storage.records import row_of
from beacon_memory.storage.store import MemoryStore

from .measuring import Figure

__all__ = [
    "ROW_MB",
    "Sample",
    "document",
    "fill",
    "looking_up",
    "made_up",
    "picking",
    "putting",
    "questions",
    "run",
    "samples",
    "texts",
    "vocabulary",
]

_WORDS = 50_000  # of the invented language
_LENGTH, _SPREAD = 112, 30  # mean and standard deviation of a text's words: about 600 characters, two passages
_SENTENCE = 14  # words
_BATCH = 10_000  # rows to a transaction
_SHAPE = (30, 3, 64)  # layers, kv heads and head_dim of the K/V
_PAGE = 100  # rows
_LOOKUPS = 300  # of each kind
_PUTS = 40
_OPENINGS = 11
_LOADS = 15
_TURN, _TURNS, _APPENDS = 20, (1, 200, 1000), 32  # tokens of a turn, turns of a document, and how many are added
ROW_MB, _PUT_MB, _LOAD_MB, _PART_MB = 0.2, 3, (20, 200), 50  # K/V of a document
_STRATA = ((1, 100), (100, 3000), (3000, _WORDS))  # very common, medium and rare words, by rank


@dataclass(frozen=True, slots=True)
class Sample:
    """A document without K/V."""

    id: str
    text: str
    label: Label


def run(rows: int) -> list[Figure]:
    """Measure all figures in a store of `rows` documents; a million take some 2.5 GB of disk and 10 minutes."""
    with tempfile.TemporaryDirectory(prefix="beacon-memory-") as folder:
        with MemoryStore(folder) as store:
            fill(store, rows)
            _read_through(store.folder / "catalog.sqlite3")
            figures = [*looking_up(store), picking(store), putting(store)]
        loading = [_loading(Path(folder), size) for size in _LOAD_MB]
        appending = [_appending(Path(folder), turns) for turns in _TURNS]
        return [*figures, _opening(Path(folder)), *appending, *loading, *_reading_parts(Path(folder))]


def _read_through(path: Path) -> None:
    """Read a file, so that it is in the system's page cache, like the catalog of a store in use."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def vocabulary() -> list[str]:
    """Return the words of the invented language, the most frequent first; frequent words are short."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        count = 1 + (len(words) >= 100) + (len(words) >= 2000)
        words["".join(draw.choices(syllables, k=count)) + draw.choice("lnrt  ").strip()] = None
    return list(words)


def samples(rows: int) -> Iterator[Sample]:
    """Yield made-up documents: texts of one passage, labels with tags and values of different frequency."""
    draw = random.Random(1)
    for number, text in enumerate(texts(rows)):
        tags = [f"one-in-{share}" for share in (2, 10, 100, 1000, 10_000) if draw.randrange(share) == 0]
        metadata = {
            "year": draw.randrange(1950, 2030),
            "language": draw.choices(("en", "de", "fr"), (90, 9, 1))[0],
            "author": f"author {min(9_999, int(draw.paretovariate(0.5)))}",
        }
        yield Sample(f"folder-{draw.randrange(1000):03}/note-{number:07}", text, Label(metadata, tags))


def texts(count: int) -> Iterator[str]:
    """Yield texts of the invented language."""
    draw = np.random.default_rng(2)
    words = np.array(vocabulary(), dtype=object)
    shares = np.cumsum(1 / np.arange(1, len(words) + 1))  # Zipf's law
    for length in np.clip(draw.normal(_LENGTH, _SPREAD, count).astype(int), _SENTENCE, 2 * _LENGTH):
        chosen = words[np.searchsorted(shares, draw.random(length) * shares[-1])]
        sentences = (" ".join(chosen[at : at + _SENTENCE]).capitalize() for at in range(0, length, _SENTENCE))
        yield ". ".join(sentences) + "."


def fill(store: MemoryStore, rows: int) -> None:
    """Add the rows of made-up documents to a store, their files being empty; with a progress bar on standard error."""
    catalog = store.parts.catalog(create=True)
    for number in range(256):  # a store with so many documents has all of these folders
        (store.folder / "kv" / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    for batch in made_up(store, rows, _BATCH):
        with catalog.transaction():
            for row, text in batch:
                catalog.documents.put(row, Text(text))
                (store.folder / row.file).touch()


def made_up(store: MemoryStore, rows: int, batch: int) -> Iterator[list[tuple[DocumentRow, str]]]:
    """Yield rows of made-up documents with their texts, so many at a time; with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    names = store.parts.catalog(create=True).file_names
    header, kv = document("any", "", ROW_MB)
    like = row_of("", "", header, precision_of(kv), stored_bytes(kv), Label(), utc_now())
    progress = iter(track(samples(rows), "documents", rows, console=Console(stderr=True), transient=True))
    while some := list(itertools.islice(progress, batch)):
        number = names.take_number()  # one for all: the ids keep the names of their files apart
        yield [(_row(like, one, number), one.text) for one in some]


def _row(like: DocumentRow, sample: Sample, number: int) -> DocumentRow:
    label = sample.label
    return replace(
        like,
        id=sample.id,
        file=file_name(sample.id, number),
        content_hash=content_hash(sample.text),
        metadata=label.metadata,
        tags=tuple(label.tags),
    )


def document(id: str, text: str, megabytes: float) -> tuple[DocumentHeader, MemoryKV]:
    """Return a header and random K/V, in bfloat16, of about `megabytes`."""
    layers, heads, dim = _SHAPE
    slots = math.ceil(megabytes * 1e6 / (layers * heads * dim * 2 * 2))
    keys, values = (torch.randn(layers, heads, slots, dim).to(torch.bfloat16) for _ in range(2))
    windows = (WindowSpan(8 * slots, 8, 0, len(text), slots),)
    fingerprint = Fingerprint(base="base", adapter="adapter", tokenizer="tokenizer", config="config", rope="rope")
    header = DocumentHeader(id, content_hash(text), 8 * slots, windows, (), "beacon", slots, fingerprint)
    return header, MemoryKV.of(BeaconKV(keys, values))


def questions() -> Iterator[str]:
    """Yield made-up questions of 3 to 10 words; rare, medium and very common words are equally likely."""
    draw, words = random.Random(3), vocabulary()
    while True:
        strata = draw.choices(_STRATA, k=draw.randint(3, 10))
        ranks = (math.exp(draw.uniform(math.log(low), math.log(high))) for low, high in strata)
        yield " ".join(words[int(rank) - 1] for rank in ranks)


def looking_up(store: MemoryStore) -> Iterator[Figure]:
    """Measure how long finding rows takes, by their ids and by their labels."""
    draw = random.Random(4)
    folders = [f"folder-{draw.randrange(1000):03}/" for _ in range(_LOOKUPS)]
    ids = [row.id for folder in folders for row in store.list(after=folder, limit=1)]
    yield _timed("get by id", "under 5", [partial(store.row, id) for id in ids])

    def listing(what: str, **filters: Callable[[str], object]) -> Figure:
        pages: list[dict[str, Any]] = [{name: choose(folder) for name, choose in filters.items()} for folder in folders]
        return _timed(f"list {_PAGE}, {what}", "under 5", [partial(store.list, limit=_PAGE, **page) for page in pages])

    def tags(_: str) -> list[str]:
        return [f"one-in-{draw.choice((2, 10, 100, 1000))}"]

    def metadata(_: str) -> dict[str, object]:
        return {"language": draw.choice(("en", "de", "fr"))}

    yield listing("from any id on", after=str)
    yield listing("of a tag", after=str, tags=tags)
    yield listing("of a tag and a value", after=str, tags=tags, metadata=metadata)
    yield listing("of a prefix", prefix=str)


def picking(store: MemoryStore) -> Figure:
    """Measure how long finding passages takes."""
    asked = itertools.islice(questions(), _LOOKUPS)
    return _timed("pick 10 passages for a question", "under 50", [partial(store.search, one) for one in asked])


def putting(store: MemoryStore) -> Figure:
    """Measure how much longer a put takes than writing and syncing the bytes of its file."""
    text = next(texts(1))
    beyond, alone = [], []
    for number in range(_PUTS):
        header, kv = document(f"put-{number}", text, _PUT_MB)
        started = time.perf_counter()
        row = store.put(header, kv, text, Label({"number": number}, ["put"]))
        took = time.perf_counter() - started
        path = store.files.fetch(row.file)
        data, other = path.read_bytes(), path.with_name("alone")
        started = time.perf_counter()
        other.write_bytes(data)
        sync_file(other)
        alone.append(1000 * (time.perf_counter() - started))
        beyond.append(1000 * took - alone[-1])
        other.unlink()
    detail = f"{_PUTS} puts, beyond {statistics.median(alone):.3g} ms for writing and syncing {_PUT_MB} MB alone"
    return Figure("put, beyond writing, ms", statistics.median(beyond), "under 10", detail)


def _appending(folder: Path, turns: int) -> Figure:
    """Measure appends to a document of so many turns, kept at ratio 8, and what writing it whole would take.

    All but what the model does: reading the text that there is, and storing what is new.
    """
    draw, words = random.Random(6), vocabulary()[: _STRATA[1][1]]
    layers, heads, dim = _SHAPE

    def turn() -> str:
        return " ".join(draw.choices(words, k=_TURN * 3 // 4)) + ".\n"

    def grown(store: MemoryStore) -> tuple[DocumentHeader, MemoryKV, Text]:
        """Return header and K/V of a turn more, and the whole text with it."""
        before, added = store.text("talk"), Text(turn())
        whole = Text(before + added.value)
        window = WindowSpan(_TURN, 0, len(before), len(whole.value), _TURN, due=8)
        one = replace(header, content_hash=added.sha256, tokens=_TURN, windows=(window,), span=_TURN)
        return one, MemoryKV.of(BeaconKV(*torch.randn(2, layers, heads, _TURN, dim).to(torch.bfloat16))), whole

    def append(store: MemoryStore) -> float:
        started = time.perf_counter()
        one, kv, whole = grown(store)
        store.append(store.row("talk"), one, kv, whole)
        return 1000 * (time.perf_counter() - started)

    def rewrite(store: MemoryStore) -> float:
        started = time.perf_counter()
        row, file = store.read("talk")
        one, kv, whole = grown(store)
        store.put(joined_headers([file.header, one], whole.sha256), joined_kv([file.kv, kv]), whole, replacing=row)
        return 1000 * (time.perf_counter() - started)

    with MemoryStore(folder / f"{turns} turns") as store:
        text = "".join(turn() for _ in range(turns))
        header, kv = document("talk", text, math.ceil(turns * _TURN / 8) * layers * heads * dim * 4 / 1e6)
        store.put(header, kv, text)
        times = [append(store) for _ in range(_APPENDS)]
        whole = statistics.median(rewrite(store) for _ in range(_PUTS // 8 or 1))
    detail = f"{_APPENDS} appends of {_TURN} tokens, {statistics.mean(times):.3g} in the mean; {whole:.3g} as one file"
    return Figure(f"append to a document of {turns} turns, ms", statistics.median(times), "under 20", detail)


def _opening(folder: Path) -> Figure:
    def opened() -> None:
        with MemoryStore(folder) as store:
            store.list(limit=1)

    return _timed("open, with a first row", "under 100", [opened] * _OPENINGS)


def _loading(folder: Path, megabytes: int) -> Figure:
    """Measure how fast a document is loaded and checked, compared with copying its file out of a memory map."""
    with MemoryStore(folder / "loading") as store:
        header, kv = document("document", "", megabytes)
        path = store.folder / store.put(header, kv, "").file
        size = path.stat().st_size
        buffer = np.zeros(size, np.uint8)

        def copy() -> None:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                np.copyto(buffer, np.frombuffer(mapped, np.uint8))

        pairs = [(_milliseconds(partial(store.get, "document")), _milliseconds(copy)) for _ in range(_LOADS)]
    loaded, copied = (statistics.median(times) for times in zip(*pairs, strict=True))
    detail = f"{size / loaded / 1e6:.3g} / {size / copied / 1e6:.3g} GB/s"
    return Figure(f"load {megabytes} MB: rate / copying out of a memory map", copied / loaded, "at least 0.5", detail)


def _reading_parts(folder: Path) -> Iterator[Figure]:
    """Measure how long reading parts of a document takes, compared with the whole; its file is in the page cache."""
    layers, heads, dim = _SHAPE
    tokens = math.ceil(_PART_MB * 1e6 / (layers * heads * dim * 2))
    levels = levels_of(torch.rand(layers, heads, tokens), tokens)
    keys, values = (torch.randn(layers, heads, tokens, dim).to(torch.bfloat16) for _ in range(2))
    kv = MemoryKV.chosen(BeaconKV(keys, values), levels >= level_of(2), levels)
    window = WindowSpan(tokens, 2, 0, 0, tokens)
    header = replace(document("part", "", 0)[0], tokens=tokens, windows=(window,), span=tokens, compression="select")
    sections = header.section_count
    some = set(random.Random(5).sample(range(sections), max(1, sections // 16)))
    parts = {
        "a quarter of the entries": [level_of(8)] * sections,
        "all of one section in 16": [0 if section in some else LEVELS for section in range(sections)],
    }
    with MemoryStore(folder / "parts") as store:
        path = store.folder / store.put(header, kv, "").file
        for what, lowest in parts.items():
            read = partial(read_kv_file, path, lambda *_, lowest=lowest: lowest)
            pairs = [(_milliseconds(partial(read_kv_file, path)), _milliseconds(read)) for _ in range(_LOADS)]
            whole, part = (statistics.median(times) for times in zip(*pairs, strict=True))
            share = len(read().kv.keys) / len(kv.keys)
            detail = f"{share:.3g} of the entries, {part:.3g} ms of {whole:.3g} for {_PART_MB} MB"
            yield Figure(f"read {what}: time / that of the whole", part / whole, "under 0.5", detail)


def _timed(name: str, bound: str, calls: Sequence[Callable[[], object]]) -> Figure:
    times = sorted(map(_milliseconds, calls))
    detail = f"{len(times)} calls, 95% of them under {times[math.ceil(0.95 * len(times)) - 1]:.3g}"
    return Figure(f"{name}, ms", statistics.median(times), bound, detail)


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)
