"""Documents that live on: renewed for another model, kept in fewer bytes, mended from their texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ingest_samples import TEXT, WINDOW, assert_same, kv_of, make_model
from store_samples import kept_text
from tiny_models import train

from beacon_memory import (
    BeaconMemory,
    CorruptFileError,
    Document,
    DocumentNotFoundError,
    FingerprintMismatchError,
    InputError,
    QuotaError,
    StoreError,
)
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.modeling.model import BeaconModel


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


def test_adding_with_another_score_compresses_anew(model: BeaconModel, tmp_path: Path) -> None:
    with BeaconMemory(tmp_path / "store", model, score="expected", reserve=100) as cheap:
        cheap.add("doc", TEXT, ratio=4, compression="select")
        assert cheap.add("doc", TEXT, ratio=4, compression="select").status == "unchanged"
    with BeaconMemory(tmp_path / "store", model, score="repeat", reserve=100) as memory:
        assert memory.add("doc", TEXT, ratio=4, compression="select").status == "replaced"


@pytest.mark.parametrize("ratio", [4, [2, 4, 8]])
def test_a_score_that_is_left_free_reads_nothing_anew(model: BeaconModel, tmp_path: Path, ratio: Any) -> None:
    for score in ("expected", "repeat"):
        with BeaconMemory(tmp_path / "store", model, score=score, reserve=100) as memory:
            memory.add("doc", TEXT[:70], ratio=ratio, compression="select")
        with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
            assert memory.add("doc", TEXT[:70], ratio=ratio, compression="select").status == "unchanged"
            assert memory.show("doc").method == {"score": score}


def test_text_is_hashed_once_on_its_way_to_the_file(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    sha256 = hashlib.sha256

    def counted(data: bytes = b"", **options: Any) -> Any:
        hashed.append(bytes(data))
        return sha256(data, **options)

    monkeypatch.setattr(hashlib, "sha256", counted)
    memory.add("doc", TEXT, ratio=2)
    assert hashed.count(TEXT.encode()) == 1


def test_unchanged_text_is_known_without_its_k_v(memory: BeaconMemory) -> None:
    memory.add("doc", TEXT[:70], ratio=2, compression="select")
    memory.add("mixed", TEXT[:70], ratio=[2, 4, 8], compression="select")
    for id in ("doc", "mixed"):
        path = memory.store.folder / memory.show(id).file
        data = path.read_bytes()
        path.write_bytes(data[:-5] + b"flips")  # which reading all of it would find
    assert memory.add("doc", TEXT[:70], ratio=2, compression="select").status == "unchanged"
    assert memory.add("mixed", TEXT[:70], ratio=[2, 4, 8], compression="select").status == "unchanged"
    assert [problem.kind for problem in memory.verify()] == ["damaged-file", "damaged-file"]
    assert memory.add("mixed", TEXT[:70], ratio=[4, 2, 8], compression="select").status == "replaced"
    assert memory.add("doc", TEXT[:70], ratio=4, compression="select").status == "replaced"
    assert memory.verify() == []


def test_text_whose_file_is_missing_is_compressed_anew(memory: BeaconMemory) -> None:
    row = memory.show(memory.add("doc", TEXT[:70], ratio=2).id)
    (memory.store.folder / row.file).unlink()
    assert memory.add("doc", TEXT[:70], ratio=2).status == "replaced"
    assert memory.verify() == []


def test_row_without_the_method_s_parameters_is_told_by_its_file(model: BeaconModel, tmp_path: Path) -> None:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        memory.add("doc", TEXT[:70], ratio=2, compression="select")
        row = memory.show("doc")
        assert row.method == {"score": "repeat"}
        memory.store.parts.catalog().documents.update(replace(row, method=None))
        assert memory.add("doc", TEXT[:70], ratio=2, compression="select").status == "unchanged"
        with BeaconMemory(tmp_path / "store", model, score="expected", reserve=100) as other:
            assert other.add("doc", TEXT[:70], ratio=2, compression="select").status == "replaced"


def test_precision_is_chosen_for_a_document_or_for_the_store(memory: BeaconMemory) -> None:
    plain = memory.add("plain", TEXT, ratio=2)
    eight = memory.add("eight", TEXT, ratio=2, precision="int8")
    memory.store.configure(precision="int4")
    four = memory.add("four", TEXT, ratio=2)
    assert [one.precision for one in (plain, eight, four)] == ["float32", "int8", "int4"]
    assert plain.bytes > 2.5 * eight.bytes > 3 * four.bytes
    assert memory.add("four", TEXT, ratio=2).status == "unchanged"
    assert memory.add("plain", TEXT, ratio=2).precision == "int4"  # converted, not read again
    assert memory.add("eight", TEXT, ratio=2, precision="float16").status == "replaced"  # finer than what was kept
    with pytest.raises(InputError, match="precision='int2' must be one of float32"):
        memory.add("two", TEXT, precision="int2")
    assert "two" not in memory.store


def test_what_is_computed_in_float32_for_speed_alone_is_kept_as_the_checkpoint_is(tmp_path: Path) -> None:
    model = make_model()
    model.base.config.dtype = torch.bfloat16  # as if it had been saved so, and the processor were slow in 16 bits
    with BeaconMemory(tmp_path, model, reserve=100) as memory:
        assert memory.add("plain", TEXT, ratio=2).precision == "bfloat16"
        assert memory.append("plain", "It rained.").precision == "bfloat16"
        assert memory.add("fine", TEXT, ratio=2, precision="float32").precision == "float32"
        assert memory.ask("Who sold flour?", "plain", max_new_tokens=3).ids == ("plain",)


def test_labels_are_set_with_documents_and_kept_by_new_texts(memory: BeaconMemory) -> None:
    document = Document("doc", TEXT, {"a": 1}, tags=["x"], pinned=True, expires_at="2999-01-01T00:00:00+01:00")
    memory.add_many([document], ratio=2)
    row = memory.show("doc")
    assert (row.metadata, row.tags, row.pinned, row.expires_at) == (
        {"a": 1},
        ("x",),
        True,
        "2998-12-31T23:00:00.000+00:00",
    )
    memory.add("doc", TEXT + "more", ratio=2)
    assert memory.show("doc").label == row.label
    assert memory.add_many([Document("doc", TEXT + "more", tags=["y"])], ratio=2)[0].status == "unchanged"
    assert (memory.show("doc").tags, memory.show("doc").pinned) == (("y",), True)
    assert [one.id for one in memory.list(tags=["y"])] == ["doc"]


def test_evicted_documents_are_named(memory: BeaconMemory) -> None:
    first = memory.add("first", TEXT, ratio=2)
    memory.store.configure(quota=first.bytes + 10)
    assert memory.add("second", TEXT, ratio=2).evicted == ("first",)
    with pytest.raises(QuotaError, match="'third' takes"):
        memory.add("third", TEXT * 2, ratio=2)
    assert [row.id for row in memory.list()] == ["second"]


def test_document_without_room_does_not_keep_others_out(memory: BeaconMemory) -> None:
    memory.store.configure(quota=memory.add("first", TEXT, ratio=2).bytes + 10)
    failed: list[str] = []
    added = memory.add_many(
        [("big", TEXT * 2), ("small", TEXT[:50])], ratio=2, on_error=lambda document, _: failed.append(document.id)
    )
    assert ([one.id for one in added], failed) == (["small"], ["big"])


def test_namespaces_share_the_model_and_nothing_else(memory: BeaconMemory) -> None:
    alice, bob = memory.within("alice"), memory.within("bob")
    alice.add("doc", "The key lies under the blue stone.", ratio=2)
    bob.add("doc", "The key was thrown into the sea.", ratio=2)
    assert alice.model is bob.model is memory.model
    assert (alice.store.text("doc"), bob.store.text("doc")) != (bob.store.text("doc"), alice.store.text("doc"))
    assert memory.list() == []
    with pytest.raises(DocumentNotFoundError, match="no document is stored yet"):
        memory.ask("Where is the key?", max_new_tokens=1)
    bob.remove("doc")
    with pytest.raises(DocumentNotFoundError):
        bob.ask("Where is the key?", "doc", max_new_tokens=1)
    assert alice.ask("Where is the key?", "doc", max_new_tokens=1).ids == ("doc",)
    assert alice.within("") is not alice
    assert memory.store.namespaces() == ["alice", "bob"]


def test_recompress_renews_what_another_model_made(
    memory: BeaconMemory, other_model: BeaconModel, tmp_path: Path
) -> None:
    for compression in BUILT_IN:
        memory.add(compression, TEXT, {"of": compression}, ratio=4, compression=compression)
    memory.add("mixed", TEXT[:70], ratio=[2, 4, 8], compression="select", precision="float16")
    renewing = BeaconMemory(tmp_path / "store", other_model, reserve=100)
    with pytest.raises(FingerprintMismatchError):
        renewing.ask("Who?", "select", max_new_tokens=1)
    before = {row.id: row for row in memory.list()}
    done = renewing.recompress()
    assert {one.id for one in done} == {*BUILT_IN, "mixed"}
    assert {one.status for one in done} == {"recompressed"}
    for row in renewing.list():
        old = before[row.id]
        assert row.fingerprint == other_model.fingerprint.digest
        for name in ("compression", "precision", "ratios", "tokens", "slots", "label", "created_at", "content_hash"):
            assert getattr(row, name) == getattr(old, name), name
        renewing.ask("Who?", row.id, max_new_tokens=1)
    assert [w.ratio for w in renewing.store.get("mixed").header.windows] == [2, 4, 8]
    fresh = BeaconMemory(tmp_path / "fresh", other_model, reserve=100)
    fresh.add("select", TEXT, ratio=4, compression="select")
    assert_same(kv_of(renewing, "select"), kv_of(fresh, "select"))
    assert renewing.recompress() == []
    assert renewing.verify() == []
    assert len(list((memory.store.folder / "kv").rglob("*.safetensors"))) == 4


def test_readers_of_the_old_model_go_on_until_all_is_renewed(
    memory: BeaconMemory, other_model: BeaconModel, tmp_path: Path
) -> None:
    memory.add_many([("a", TEXT[:60]), ("b", TEXT[60:120]), ("c", TEXT[120:180])], ratio=2)
    expected = {id: kv_of(memory, id) for id in "abc"}
    renewing = BeaconMemory(tmp_path / "store", other_model, reserve=100)
    renewing.compressor.rows_per_pass = 1  # for one document each

    def read_all(_: Any) -> None:
        for id in "abc":
            old = memory.store.get(id, fingerprint=memory.model.fingerprint.digest)
            assert torch.equal(old.kv.keys, expected[id].keys)
            memory.ask("What?", id, max_new_tokens=1)

    def interrupt(progress: Any) -> None:
        if progress.tokens > 60:  # in the second document
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renewing.recompress(progress=interrupt, on_added=read_all)
    assert memory.verify() == []
    assert len({row.fingerprint for row in memory.list()}) == 2  # some are renewed
    assert len(renewing.recompress(on_added=read_all)) == 2  # those that were left
    with pytest.raises(FingerprintMismatchError, match="another adapter"):
        memory.ask("What?", "a", max_new_tokens=1)
    assert memory.store.totals().bytes == sum(row.bytes for row in memory.list())
    assert memory.verify() == []


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "swapped"])
def test_repair_compresses_damaged_documents_anew(memory: BeaconMemory, damage: str) -> None:
    memory.add("doc", TEXT, {"a": 1}, ratio=[4] * (-(-len(TEXT) // WINDOW) - 1) + [2], compression="select")
    memory.add("other", TEXT[:50], ratio=2)
    expected, row = kv_of(memory, "doc"), memory.show("doc")
    path = memory.store.folder / row.file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        other = (memory.store.folder / memory.show("other").file).read_bytes()
        path.write_bytes({"flipped": data[:-5] + b"flips", "cut": data[:-9], "swapped": other}[damage])
    for use in (lambda: memory.ask("Who?", "doc"), lambda: memory.append("doc", "more")):
        with pytest.raises(CorruptFileError, match="repair"):
            use()
    (problem,) = memory.repair()
    assert (problem.document, problem.mended) == ("doc", True)
    assert memory.verify() == []
    mended = kv_of(memory, "doc")
    assert mended.span == expected.span
    if damage == "flipped":  # the header still told the ratios of the windows
        assert_same(mended, expected)
    assert memory.show("doc").label == row.label
    assert memory.store.text("doc") == TEXT


def test_repair_says_what_it_cannot_mend(memory: BeaconMemory, tmp_path: Path) -> None:
    memory.add("doc", TEXT * 2, ratio=2, compression="beacon")
    (memory.store.folder / memory.show("doc").file).unlink()
    small = BeaconMemory(tmp_path / "store", make_model(max_position_embeddings=128), reserve=100)
    (problem,) = small.repair()
    assert not problem.mended
    assert "could not be compressed anew" in problem.message
    assert kept_text(memory.store) == TEXT * 2


def test_store_that_nothing_can_be_written_to_still_answers(memory: BeaconMemory, monkeypatch: Any) -> None:
    memory.add("doc", TEXT, ratio=2)

    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("read-only")

    monkeypatch.setattr("beacon_memory.storage.catalog.documents.Documents.touch", refuse)
    assert memory.ask("Who?", "doc", max_new_tokens=1).ids == ("doc",)
    memory.close()
