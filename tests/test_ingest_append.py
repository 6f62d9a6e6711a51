"""Documents that are appended to: each becomes that of the whole text, and little of it is read again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ingest_samples import TEXT, WINDOW, assert_same, kv_of, make_model
from tiny_models import some_probe, train
from upkeep_samples import flip

from beacon_memory import (
    BeaconMemory,
    CapacityError,
    Document,
    DocumentNotFoundError,
    FingerprintMismatchError,
    InputError,
)
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import GROUP
from beacon_memory.modeling.model import BeaconModel

every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model()


@pytest.fixture(scope="module")
def other_model() -> BeaconModel:
    """A model with another adapter, whose K/V no reader of `model` may use."""
    return train(make_model(), seed=7)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


def rows_read(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The raw tokens of each pass of the model from now on."""
    read: list[int] = []
    decode = memory.model._decode

    def counted(ids: list[int], *args: Any, **options: Any) -> Any:
        read.append(len(ids))
        return decode(ids, *args, **options)

    monkeypatch.setattr(memory.model, "_decode", counted)
    return read


@every_compression
@pytest.mark.parametrize("cut", [1, 31, 32, 33, 64, 150])
def test_appended_document_is_that_of_the_whole_text(memory: BeaconMemory, compression: str, cut: int) -> None:
    memory.add("grown", TEXT[:cut], {"year": 1700}, ratio=4, compression=compression)
    added = memory.append("grown", TEXT[cut:])
    assert memory.compact("grown").status == "unchanged"  # windows are full, so all of them were compressed
    whole = memory.add("whole", TEXT, ratio=4, compression=compression)
    assert added.status == "appended"
    assert (added.tokens, added.slots, added.bytes, added.ratios) == (
        whole.tokens,
        whole.slots,
        whole.bytes,
        whole.ratios,
    )
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))
    grown, expected = (memory.store.get(id).header for id in ("grown", "whole"))
    assert (grown.windows, grown.tail_ids, grown.method) == (expected.windows, expected.tail_ids, expected.method)
    assert memory.store.text("grown") == TEXT
    assert memory.show("grown").metadata == {"year": 1700}
    assert memory.verify() == []


@every_compression
def test_many_small_appends_come_to_the_same(memory: BeaconMemory, compression: str) -> None:
    memory.add("grown", TEXT[:7], ratio=2, compression=compression)
    for at in range(7, 205, 13):
        memory.append("grown", TEXT[at : min(205, at + 13)])
    assert memory.compact("grown").status == "compacted"
    memory.add("whole", TEXT[:205], ratio=2, compression=compression)
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))
    assert len(list((memory.store.folder / "kv").rglob("*.safetensors"))) == 2


def test_a_document_whose_tokens_were_others_is_read_anew(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT[:20] + "</s>" + TEXT[20:200]
    with monkeypatch.context() as patched:  # control tokens of a text were read as such once

        def tokenized(tokenizer: Any, text: str) -> Any:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return encoded["input_ids"], encoded["offset_mapping"]

        patched.setattr("beacon_memory.compression.compressor.text_tokens", tokenized)
        assert memory.add("grown", text, ratio=4).tokens == 201
    memory.append("grown", " More.")
    added = memory.compact("grown")
    whole = memory.add("whole", text + " More.", ratio=4)
    assert added.tokens == whole.tokens == 210
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))


@every_compression
def test_appending_reads_the_new_tokens_alone_until_a_window_is_full(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    memory.add("grown", TEXT[: 2 * WINDOW + 10], ratio=4, compression=compression)
    before = memory.store.get("grown")
    read = rows_read(memory, monkeypatch)
    memory.append("grown", TEXT[2 * WINDOW + 10 : 2 * WINDOW + 15])
    added = memory.append("grown", TEXT[2 * WINDOW + 15 : 2 * WINDOW + 22])
    assert read == [5, 7]
    assert (added.tokens, added.slots, added.ratios) == (2 * WINDOW + 22, 8 + 8 + 3 + 12, (0, 4))
    after = memory.store.get("grown")
    assert [(one.tokens, one.ratio, one.due) for one in after.header.windows[2:]] == [
        (10, 4, None),
        (5, 0, 4),
        (7, 0, 4),
    ]
    assert_same(after.kv.between(0, before.kv.span), before.kv, exact=True)
    assert memory.ask("Who sold flour?", "grown", max_new_tokens=3).ids == ("grown",)
    assert memory.verify() == []
    assert memory.append("grown", TEXT[2 * WINDOW + 22 : 3 * WINDOW]).ratios == (4,)
    assert memory.compact("grown").status == "unchanged"
    memory.add("whole", TEXT[: 3 * WINDOW], ratio=4, compression=compression)
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"), exact=compression != "beacon")
    assert memory.store.get("grown").header.windows == memory.store.get("whole").header.windows


@every_compression
def test_compacted_document_is_that_of_the_whole_text(memory: BeaconMemory, compression: str) -> None:
    memory.add("grown", TEXT[: 2 * WINDOW], {"year": 1700}, ratio=4, compression=compression)
    memory.append("grown", TEXT[2 * WINDOW : 2 * WINDOW + 6])
    memory.append("grown", TEXT[2 * WINDOW + 6 : 2 * WINDOW + 11])
    compacted = memory.compact("grown")
    whole = memory.add("whole", TEXT[: 2 * WINDOW + 11], ratio=4, compression=compression)
    assert compacted == replace(whole, id="grown", status="compacted", seconds=compacted.seconds)
    assert memory.compact("grown").status == "unchanged"
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"), exact=compression != "beacon")  # which shares passes
    grown, expected = (memory.store.get(id).header for id in ("grown", "whole"))
    assert (grown.windows, grown.tail_ids) == (expected.windows, expected.tail_ids)
    assert (memory.show("grown").metadata, memory.store.text("grown")) == ({"year": 1700}, TEXT[: 2 * WINDOW + 11])


def test_appended_tokens_are_read_at_their_places(memory: BeaconMemory) -> None:
    memory.add("grown", TEXT[: WINDOW + 3], ratio=0, compression="select")
    for at in range(WINDOW + 3, 2 * WINDOW - 1, 4):
        memory.append("grown", TEXT[at : min(2 * WINDOW - 1, at + 4)])
    assert len(memory.store.get("grown").header.windows) == 9
    memory.add("whole", TEXT[: 2 * WINDOW - 1], ratio=0, compression="select")
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))


def test_text_behind_which_no_positions_are_free_is_compressed_at_once(model: BeaconModel, tmp_path: Path) -> None:
    free = 1 + len(TEXT[:70]) // 2 + 3
    with BeaconMemory(tmp_path, model, reserve=model.max_positions - free) as memory:
        memory.add("grown", TEXT[:70], ratio=2, compression="beacon")
        assert memory.append("grown", TEXT[70:73]).ratios == (0, 2)
        assert memory.append("grown", TEXT[73:76]).ratios == (2,)
        with pytest.raises(CapacityError, match="use a higher ratio"):
            memory.append("grown", TEXT[76:77])
        memory.add("long", TEXT[:70], ratio=2, compression="select")  # which may be of any length
        assert memory.append("long", TEXT[70:90]).ratios == (0, 2)


def test_adding_what_was_appended_compacts_it(memory: BeaconMemory) -> None:
    memory.add("grown", TEXT[:70], ratio=4)
    memory.append("grown", TEXT[70:80])
    added = memory.add_many([Document("grown", TEXT[:80], tags=["x"])], ratio=4)[0]
    assert (added.status, added.ratios, memory.show("grown").tags) == ("compacted", (4,), ("x",))
    assert memory.add("grown", TEXT[:80], ratio=4).status == "unchanged"
    memory.append("grown", TEXT[80:85])
    assert memory.add("grown", TEXT[:85], ratio=2).status == "replaced"  # it was due at another ratio
    memory.append("grown", TEXT[85:90])
    assert memory.add("grown", TEXT[:89], ratio=2).status == "replaced"
    memory.add("raw", TEXT[:64], ratio=0)
    memory.append("raw", TEXT[64:70], ratio=8)
    assert memory.add("raw", TEXT[:70], ratio=0).status == "replaced"  # though all its windows are at this ratio now


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_appended_is_recompressed_at_the_ratio_that_it_is_due_at(memory: BeaconMemory, lost: bool) -> None:
    memory.add("grown", TEXT[:64], ratio=4, compression="select")
    memory.append("grown", TEXT[64:70], ratio=None if lost else 8)
    row = memory.show("grown")
    path = memory.store.folder / row.file
    if lost:
        path.unlink()
    else:
        flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))  # the first tensor
    assert [problem.mended for problem in memory.repair()] == [True]
    windows = memory.store.get("grown").header.windows
    assert [one.ratio for one in windows] == [4, 4, 4 if lost else 8]
    memory.add("whole", TEXT[:70], ratio=[4, 4, windows[2].ratio], compression="select")
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_document_is_appended_to_within_its_error(memory: BeaconMemory, precision: str) -> None:
    for id, kept in (("grown", precision), ("plain", "float32")):
        memory.add(id, TEXT[: WINDOW + 9], ratio=2, compression="select", precision=kept)
        memory.append(id, TEXT[WINDOW + 9 : WINDOW + 20])
    row, file = memory.store.read("grown")
    raw, plain = (kv_of(memory, id).between(WINDOW + 9, WINDOW + 20) for id in ("grown", "plain"))
    first = slice(int(raw.counts[0].sum()))  # of other layers, what was read behind the memory differs, too
    scales = file.kv.value_scales[file.kv.positions >= WINDOW + 9].float()  # type: ignore[union-attr]  # it is quantized
    assert row.precision == precision
    assert ((raw.values - plain.values).abs()[first] <= 0.51 * scales[first, None]).all()
    memory.append("grown", TEXT[WINDOW + 20 : WINDOW + 25])
    assert_same(kv_of(memory, "grown").between(WINDOW + 9, WINDOW + 20), raw, exact=True)  # no drift
    assert memory.verify() == []
    memory.compact("grown")
    memory.add("whole", TEXT[: WINDOW + 25], ratio=2, compression="select", precision=precision)
    assert [one.ratio for one in memory.store.get("grown").header.windows] == [2, 2]
    assert kv_of(memory, "grown").counts.sum() == kv_of(memory, "whole").counts.sum()


def test_only_the_last_window_is_read_again(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.add("grown", TEXT[: 5 * WINDOW + 10], ratio=4, compression="beacon")
    before = kv_of(memory, "grown")
    read = rows_read(memory, monkeypatch)
    memory.append("grown", TEXT[5 * WINDOW + 10 : 6 * WINDOW])
    assert read == [WINDOW]
    finished = 5 * WINDOW // 4
    after = kv_of(memory, "grown").between(0, finished)
    assert torch.equal(after.keys, before.between(0, finished).keys)  # bit for bit
    read.clear()
    memory.append("grown", TEXT[6 * WINDOW : 6 * WINDOW + 5])
    assert read == [5]


def test_text_that_is_tokenized_differently_behind_the_end_is_read_from_there(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Merging:
        """A tokenizer that reads "ab" as one token, so that a text may end within one."""

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            ids, offsets, at = [], [], 0
            while at < len(text):
                size = 2 if text.startswith("ab", at) else 1
                ids.append(len(text) % 1 + 5 + (size == 2) * 60 + ord(text[at]) % 50)
                offsets.append((at, at + size))
                at += size
            return {"input_ids": ids, "offset_mapping": offsets}

    text = "x" * (WINDOW - 1) + "a" + "b" + "y" * 20
    merging = Merging()

    def merged(_: Any, text: str) -> Any:
        encoded = merging(text)
        return encoded["input_ids"], encoded["offset_mapping"]

    monkeypatch.setattr("beacon_memory.compression.compressor.text_tokens", merged)
    memory.add("grown", text[:WINDOW], ratio=4, compression="select")
    assert memory.append("grown", text[WINDOW:]).tokens == len(text)  # "b" is a token of its own
    assert memory.compact("grown").tokens == len(text) - 1
    memory.add("whole", text, ratio=4, compression="select")
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))


def test_new_windows_take_the_ratio_that_is_given(memory: BeaconMemory) -> None:
    memory.add("grown", TEXT[:70], ratio=[2, 4, 8], compression="select")
    memory.append("grown", TEXT[70:140], ratio=16)
    assert [window.ratio for window in memory.store.get("grown").header.windows] == [2, 4, 8, 16, 16]
    memory.append("grown", TEXT[140:170])
    assert [window.ratio for window in memory.store.get("grown").header.windows] == [2, 4, 8, 16, 16, 16]
    memory.append("grown", TEXT[170 : 6 * WINDOW], ratio=32)  # no window begins with that
    memory.append("grown", TEXT[6 * WINDOW : 200], ratio=2)
    memory.append("grown", TEXT[200:205], ratio=32)
    memory.compact("grown")
    memory.append("grown", TEXT[205 : 7 * WINDOW + 3])
    memory.compact("grown")
    assert [window.ratio for window in memory.store.get("grown").header.windows] == [2, 4, 8, 16, 16, 16, 2, 2]


def test_appending_nothing_changes_nothing(memory: BeaconMemory) -> None:
    memory.add("grown", TEXT[:70], ratio=2)
    before = memory.show("grown")
    assert memory.append("grown", "").status == "unchanged"
    assert memory.show("grown") == before


def test_what_cannot_be_appended_leaves_the_document_as_it_was(
    memory: BeaconMemory, other_model: BeaconModel, tmp_path: Path
) -> None:
    with pytest.raises(DocumentNotFoundError, match="'grown'"):
        memory.append("grown", "text")
    memory.add("grown", TEXT[:70], ratio=2, compression="beacon")
    before, kv = memory.show("grown"), kv_of(memory, "grown")
    with pytest.raises(CapacityError, match=r"document 'grown': .* use a higher ratio"):
        memory.append("grown", TEXT * 5)
    with pytest.raises(InputError, match="surrogate"):
        memory.append("grown", "\ud800")
    with pytest.raises(FingerprintMismatchError, match="another adapter"):
        BeaconMemory(tmp_path / "store", other_model, reserve=100).append("grown", "more")
    assert memory.show("grown") == before
    assert torch.equal(kv_of(memory, "grown").keys, kv.keys)
    assert memory.store.text("grown") == TEXT[:70]


def test_append_goes_on_from_what_somebody_else_stored_meanwhile(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add("grown", TEXT[:40], ratio=2, compression="select")
    compress, raced = memory.compressor.compress, []

    def racing(*args: Any, **options: Any) -> Any:
        if not raced:
            raced.append(True)
            memory.append("grown", TEXT[40:80])
        return compress(*args, **options)

    monkeypatch.setattr(memory.compressor, "compress", racing)
    memory.append("grown", TEXT[80:120])
    assert memory.store.text("grown") == TEXT[:120]
    memory.add("whole", TEXT[:120], ratio=2, compression="select")
    assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))


def test_chosen_tokens_of_another_score_are_read_again(model: BeaconModel, tmp_path: Path) -> None:
    with BeaconMemory(tmp_path / "store", model, score="expected", reserve=100) as cheap:
        cheap.add("grown", TEXT[:70], ratio=4, compression="select")
    with BeaconMemory(tmp_path / "store", model, score="repeat", reserve=100) as memory:
        memory.append("grown", TEXT[70:])
        memory.add("whole", TEXT, ratio=4, compression="select")
        assert_same(kv_of(memory, "grown"), kv_of(memory, "whole"))
        assert memory.store.get("grown").header.method == {"score": "repeat"}


def test_what_is_appended_is_chosen_as_the_document_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.probe = some_probe(model)
    for score in ("expected", "repeat"):
        with BeaconMemory(tmp_path / score, model, score=score, reserve=100) as memory:
            memory.add("grown", TEXT[:70], ratio=4, compression="select")
            memory.add("whole", TEXT[:90], ratio=4, compression="select")
            whole = kv_of(memory, "whole")
        with BeaconMemory(tmp_path / score, model, reserve=100) as memory:
            read = rows_read(memory, monkeypatch)
            memory.append("grown", TEXT[70:90])
            memory.compact("grown")
            assert max(read) == 26  # of the last window, not from its beginning
            assert_same(kv_of(memory, "grown"), whole)
            assert (memory.store.get("grown").header.method or {})["score"] == score


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_document_grows_without_drifting(memory: BeaconMemory, precision: str) -> None:
    memory.add("grown", TEXT[:WINDOW], ratio=1, compression="select", precision=precision)
    bits = {"int8": 8, "int4": 4}[precision]
    finished: dict[int, MemoryKV] = {}
    for at in range(WINDOW, 8 * WINDOW, WINDOW):
        memory.append("grown", TEXT[at : at + WINDOW])
        finished[at + WINDOW] = kv_of(memory, "grown")
    row, file = memory.store.read("grown")
    assert (row.precision, file.kv.bits) == (precision, bits)  # type: ignore[union-attr]  # it is quantized
    last = kv_of(memory, "grown")
    for size in range(GROUP, 8 * WINDOW, GROUP):  # groups of keys that were full by then
        assert torch.equal(last.between(0, size).keys, finished[size].between(0, size).keys)
    for size, then in finished.items():  # values have a scale for each token
        assert torch.equal(last.between(0, size).values, then.values)
    assert memory.verify() == []
    assert memory.ask("Who sold flour?", "grown", max_new_tokens=3).ids == ("grown",)
