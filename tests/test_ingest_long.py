"""Documents of many windows: kept on disk while they are read, and gone on with where they were interrupted."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crashing import fork, wait
from kv_samples import same
from tiny_models import tiny_model, tiny_tokenizer, train

from beacon_memory import BeaconMemory, BeaconModel, Progress
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.unfinished import UnfinishedDocument

WINDOW = 8
TEXT = "".join(f"In the year {year} the miller of Wend sold {year % 97} sacks of flour. " for year in range(1700, 1716))

every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    config = BeaconConfig(beacon_window=WINDOW)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=2048)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


def windows_in(memory: BeaconMemory) -> list[Path]:
    """What is on disk of a document that is not stored yet."""
    return sorted((memory.store.folder / "unfinished").rglob("*.safetensors"))


def add(memory: BeaconMemory, progress: Callable[[Progress], None] = lambda _: None, **how: object) -> list[Progress]:
    """Add the text; returns what was told of the progress."""
    told: list[Progress] = []

    def note(one: Progress) -> None:
        told.append(one)
        progress(one)

    memory.add_many([("long", TEXT)], ratio=2, progress=note, **how)  # type: ignore[arg-type]
    return told


def until(windows: int, stop: Callable[[], object]) -> Callable[[Progress], None]:
    """Return a progress that ends the reading after so many windows."""

    def progress(one: Progress) -> None:
        if one.tokens >= windows * WINDOW:
            stop()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


@every_compression
@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_a_document_that_was_interrupted_goes_on_where_it_was(
    model: BeaconModel, memory: BeaconMemory, tmp_path: Path, compression: str, precision: str
) -> None:
    how = {"compression": compression, "precision": precision}
    rows = memory.compressor.rows_per_pass = 24 if compression == "beacon" else memory.compressor.rows_per_pass
    with pytest.raises(KeyboardInterrupt):
        add(memory, until(20, interrupt), **how)
    there = len(windows_in(memory))
    assert 18 <= there < len(TEXT) // WINDOW
    assert memory.list() == []
    told = add(memory, **how)
    assert told[0].tokens > there * WINDOW  # it has counted what was read before
    assert told[-1].tokens == told[-1].begun == memory.show("long").tokens
    assert windows_in(memory) == []
    with BeaconMemory(tmp_path / "at once", model, reserve=100) as other:
        other.compressor.rows_per_pass = rows
        add(other, **how)
        ours, theirs = memory.store.read("long")[1], other.store.read("long")[1]
    assert same(ours.kv, theirs.kv)
    assert isinstance(ours.kv, QuantizedKV) == (precision == "int4")
    assert (ours.header.windows, ours.header.span) == (theirs.header.windows, theirs.header.span)
    assert memory.verify() == []


def test_a_killed_process_has_left_its_windows(memory: BeaconMemory) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    memory.close()
    assert wait(fork(lambda: add(memory, until(20, die)))) == -signal.SIGKILL
    assert len(windows_in(memory)) >= 19
    told = add(memory)
    assert told[0].tokens > 19 * WINDOW
    assert memory.verify() == []


def test_the_memory_on_disk_is_the_one_in_ram(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    add(memory)
    on_disk = memory.store.get("long").kv
    monkeypatch.setattr("beacon_memory.preparing._MOST_IN_RAM", 10**6)
    memory.remove("long")
    add(memory)
    assert same(on_disk, memory.store.get("long").kv)


def test_a_recompression_that_was_interrupted_goes_on_where_it_was(memory: BeaconMemory, model: BeaconModel) -> None:
    add(memory)
    config = BeaconConfig(beacon_window=WINDOW)
    other = train(tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=2048), seed=7)
    with BeaconMemory(memory.store.folder, other, reserve=100) as renewing:
        with pytest.raises(KeyboardInterrupt):
            renewing.recompress(progress=until(20, interrupt))
        assert renewing.show("long").fingerprint == model.fingerprint.digest
        told: list[Progress] = []
        renewing.recompress(progress=told.append)
        assert told[0].tokens > 19 * WINDOW
        assert renewing.show("long").fingerprint == other.fingerprint.digest
        assert windows_in(renewing) == []


def test_another_text_model_or_ratio_begins_anew(memory: BeaconMemory) -> None:
    with pytest.raises(KeyboardInterrupt):
        add(memory, until(20, interrupt))
    told: list[Progress] = []
    memory.add_many([("long", TEXT)], ratio=4, progress=told.append)
    assert told[0].tokens == WINDOW
    assert windows_in(memory)  # of the other ratio: for a week, somebody may come back to it


def test_what_is_read_does_not_stay_in_ram(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window sees the last ones that fit the positions of the model, and no other is held."""
    monkeypatch.setattr(memory.model, "max_positions", 64)
    made: list[weakref.ref[torch.Tensor]] = []
    append = UnfinishedDocument.append

    def noted(document: UnfinishedDocument, one: MemoryKV) -> None:
        made.append(weakref.ref(one.keys))
        append(document, one)

    monkeypatch.setattr(UnfinishedDocument, "append", noted)
    held: list[int] = []
    add(memory, lambda _: held.append(sum(one() is not None for one in made)), compression="select")
    assert len(held) > 60
    assert 64 // WINDOW <= max(held) <= 64 // WINDOW + 3
