"""Memories stay ready after a question: read once, never stale, within their bytes, for all threads."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from behind_memory import places
from kv_samples import memory as some_memory
from tiny_models import tiny_model, tiny_tokenizer, train

from beacon_memory import BeaconMemory, CorruptFileError, DocumentNotFoundError, InputError
from beacon_memory.config import BeaconConfig
from beacon_memory.hot import HotMemories
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Section
from beacon_memory.kv.quantize import quantized
from beacon_memory.kv.rope import Rope
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.store import MemoryStore

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards.\n\n"
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron.\n\n"
SHORT: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    settings = BeaconConfig(beacon_window=32)
    return tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=1024)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> BeaconMemory:
    """A store of two documents, and a memory that has not loaded any."""
    BeaconMemory(tmp_path, model, reserve=100).add_many([("roof", ROOF), ("well", WELL)], ratio=2)
    return BeaconMemory(tmp_path, model, reserve=100)


def fresh(memory: BeaconMemory) -> BeaconMemory:
    return BeaconMemory(memory.store.folder, memory.model, reserve=100)


def ask(memory: BeaconMemory, *ids: str) -> tuple[str, tuple[str, ...]]:
    """The answer, and where the memories were."""
    answer = memory.ask("Who?", list(ids), **SHORT)
    return answer.text, places(answer)


def test_the_second_question_opens_no_file_and_answers_the_same(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, sources = ask(memory, "roof")
    assert sources == ("cold",)
    monkeypatch.setattr(memory.store, "read", lambda *_: pytest.fail("a file was read"))
    assert ask(memory, "roof") == (first, ("ram",))


def test_another_choice_of_documents_finds_those_that_are_ready(memory: BeaconMemory) -> None:
    ask(memory, "roof")
    for ids, sources in ((("well", "roof"), ("cold", "ram")), (("roof", "well", "roof"), ("ram", "ram", "ram"))):
        text, found = ask(memory, *ids)
        assert (text, found) == (ask(fresh(memory), *ids)[0], sources)


def test_warm_says_where_memories_were(memory: BeaconMemory) -> None:
    assert memory.warm("roof") == ("cold",)
    assert memory.warm(["well", "roof"]) == ("cold", "ram")
    assert ask(memory, "roof", "well")[1] == ("ram", "ram")
    with pytest.raises(DocumentNotFoundError, match="rof"):
        memory.warm("rof")


def test_what_object_storage_had_to_send_is_told_apart_from_what_its_cache_has(
    model: BeaconModel, tmp_path: Path
) -> None:
    place = (tmp_path / "bucket").as_uri()

    def opened() -> BeaconMemory:
        store = MemoryStore(tmp_path / "store", files=place)
        return BeaconMemory(store, model, reserve=100)

    opened().add_many([("roof", ROOF), ("well", WELL)], ratio=2)
    assert ask(opened(), "roof", "well")[1] == ("cold", "cold")  # what was published stays in the cache
    shutil.rmtree(tmp_path / "store" / "cache")
    asking = opened()
    assert [ask(asking, "roof")[1] for _ in range(2)] == [("remote",), ("ram",)]
    assert ask(opened(), "roof", "well")[1] == ("cold", "remote")
    assert ask(opened(), "roof", "well")[1] == ("cold", "cold")


def test_a_changed_document_is_never_served_stale(memory: BeaconMemory) -> None:
    other = fresh(memory)  # another process, as far as the first one knows
    for change in (
        lambda: other.add("roof", WELL, ratio=2),
        lambda: other.add("roof", ROOF, ratio=4),
        lambda: other.append("roof", WELL),
        lambda: other.store.convert("roof", "int8"),
        lambda: (other.remove("roof"), other.add("roof", WELL, ratio=2)),
    ):
        memory.warm("roof")
        assert memory.warm("roof") == ("ram",)
        change()
        assert ask(memory, "roof") == (ask(fresh(memory), "roof")[0], ("cold",))
    memory.remove("roof")
    with pytest.raises(DocumentNotFoundError):
        memory.ask("Who?", "roof", **SHORT)


def test_a_store_made_anew_in_the_same_folder_shares_nothing_with_the_old_one(
    model: BeaconModel, tmp_path: Path
) -> None:
    asking = BeaconMemory(tmp_path / "store", model, reserve=100)
    asking.add("roof", ROOF, ratio=2)
    asking.warm("roof")
    asking.close()
    (tmp_path / "store").rename(tmp_path / "old")
    asking.add("roof", WELL, ratio=2)
    assert ask(asking, "roof")[1] == ("cold",)


def test_namespaces_share_the_room_and_not_their_documents(memory: BeaconMemory) -> None:
    memory.warm("roof")
    with memory.within("alice") as alice:
        alice.add("roof", WELL, ratio=2)
        text, sources = ask(alice, "roof")
        assert sources == ("cold",)
        assert text == ask(fresh(memory).within("alice"), "roof")[0]
    assert memory.warm("roof") == ("ram",)
    with memory.within("alice") as alice:
        assert alice.warm("roof") == ("ram",)


def test_another_adapter_dtype_or_rotation_finds_nothing_ready(tmp_path: Path) -> None:
    settings = BeaconConfig(beacon_window=32)
    model = tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=1024)
    asking = BeaconMemory(tmp_path / "store", model, reserve=100)
    asking.add("roof", ROOF, ratio=2, compression="select")
    asking.warm("roof")
    model.to(torch.bfloat16)
    assert ask(asking, "roof")[1] == ("cold",)
    model.to(torch.float32)  # its frequencies were rounded meanwhile
    assert asking.warm("roof") == ("cold",)
    train(model, seed=3).save_adapter(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter")
    asking.recompress()
    assert asking.warm("roof") == ("cold",)


def test_interpolated_memories_stay_ready_for_prompts_of_about_that_length(memory: BeaconMemory) -> None:
    memory.add_many([("a", ROOF * 7), ("b", WELL * 7)], ratio=4, compression="select")
    assert sum(memory.store.get(id).header.span for id in ("a", "b")) > memory.model.max_positions
    first = memory.ask("Who?", ["a", "b"], **SHORT)
    again = [places(memory.ask(f"Who{mark}", ["a", "b"], **SHORT)) for mark in ("!?", "?")]
    assert places(first) == ("cold", "cold")
    assert again == [("ram", "ram")] * 2
    assert ask(memory, "a", "b")[0] == first.text
    assert places(memory.ask("Who? " * 30, ["a", "b"], **SHORT)) == ("cold", "cold")  # much less room


def test_no_room_keeps_nothing_and_answers_all_the_same(memory: BeaconMemory) -> None:
    small = BeaconMemory(memory.store.folder, memory.model, reserve=100, hot_bytes=0)
    assert ask(small, "roof") == ask(small, "roof") == (ask(memory, "roof")[0], ("cold",))
    with pytest.raises(InputError, match="hot_bytes=-1"):
        BeaconMemory(memory.store.folder, memory.model, hot_bytes=-1)


def test_those_used_longest_ago_go_first(memory: BeaconMemory) -> None:
    memory.add("both", ROOF + WELL, ratio=2)
    size = sum(memory.store.get(id).kv.keys.nbytes * 2 for id in ("roof", "well")) + 1000  # the sink's
    small = BeaconMemory(memory.store.folder, memory.model, reserve=100, hot_bytes=size)
    small.warm(["roof", "well"])
    assert small.warm("roof") == ("ram",)
    small.add("third", "A short one.", ratio=1)
    small.warm("third")
    assert small.warm("roof") == ("ram",)
    assert small.warm("well") == ("cold",)
    assert small._hot._places[torch.device("cpu")].used <= size


def test_a_file_that_cannot_be_read_leaves_everything_as_it_was(memory: BeaconMemory) -> None:
    memory.warm("well")
    file = memory.store.folder / memory.show("roof").file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(CorruptFileError):
            memory.ask("Who?", ["well", "roof"], **SHORT)
    file.write_bytes(whole)
    assert ask(memory, "well", "roof")[1] == ("ram", "cold")


def test_what_is_ready_does_not_hang_on_its_file(memory: BeaconMemory) -> None:
    expected, _ = ask(memory, "roof")
    file = memory.store.folder / memory.show("roof").file
    file.write_bytes(bytes(file.stat().st_size))  # in place: what is mapped would change
    assert ask(memory, "roof") == (expected, ("ram",))


def test_a_use_is_noted_though_no_file_is_opened(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(memory.store.uses, "add", used.append)
    ask(memory, "roof")
    ask(memory, "roof")
    assert used == ["roof", "roof"]


def test_threads_wait_for_the_one_that_loads(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    read, threads, found = memory.store.read, 6, []
    together = threading.Barrier(threads)

    def slowly(*given: Any) -> Any:
        reads.append(given[0].id)
        return read(*given)

    def work(number: int) -> None:
        together.wait()
        ids = ["roof", "well"] if number % 2 else ["well", "roof"]  # either order, and none waits in a circle
        found.append((ids, memory.ask("Who?", ids, **SHORT).text))

    reads: list[str] = []
    monkeypatch.setattr(memory.store, "read", slowly)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(reads) == ["roof", "well"]
    assert all(text == ask(memory, *ids)[0] for ids, text in found)
    assert len(found) == threads


def test_what_leaves_the_device_is_kept_in_ram_and_comes_back(
    model: BeaconModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is `meta`, whose tensors have no bytes to copy: a second place on any machine."""

    def moved(section: Section, device: torch.device) -> Section:
        keys, values = (torch.empty_like(part, device=device) for part in (section.keys, section.values))
        return Section._laid_out(keys, values, section.counts, section.span)

    monkeypatch.setattr(Section, "to", moved)
    elsewhere: Any = SimpleNamespace(
        fingerprint=model.fingerprint,
        device=torch.device("meta"),
        dtype=torch.float32,
        rope=Rope(torch.ones(2)),
        max_positions=1024,
    )
    one = some_memory(9, 30)
    size = 2 * one.keys.nbytes
    hot = HotMemories(2 * size)

    def source(key: str) -> str:
        ((section, found),) = hot.sections(elsewhere, [(key, lambda: one)], 100)
        assert section.keys.device.type == "meta"
        return found

    assert [source(key) for key in "abab"] == ["cold", "cold", "device", "device"]
    assert [source(key) for key in "cab"] == ["cold", "ram", "ram"]
    assert [source(key) for key in "dec"] == ["cold", "cold", "cold"]  # what had to go from RAM, too
    assert {place.used for place in hot._places.values()} == {2 * size}


def of_real_size(slots: int = 64) -> MemoryKV:
    """Random K/V of 2 layers and 3 kv heads whose heads are as large as those of real models."""
    return MemoryKV.of(BeaconKV(torch.randn(2, 3, slots, 64).bfloat16(), torch.randn(2, 3, slots, 64).bfloat16()))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.5625), (4, 0.3125)])
def test_quantized_memories_are_kept_in_their_bits(model: BeaconModel, bits: int, share: float) -> None:
    kv = of_real_size()
    packed = quantized(kv, bits)
    hot = HotMemories(4 * kv.nbytes)
    ((section, first),) = hot.sections(reader := like(model), [("a", lambda: packed)], 1000)
    used = hot._places[torch.device("cpu")].used
    assert (first, used / section.nbytes) == ("cold", pytest.approx(share, abs=0.01))
    plain = Section.of(packed.dequantized(torch.bfloat16), reader.rope)
    assert torch.equal(section.keys, plain.keys)
    assert torch.equal(section.values, plain.values)
    names = [str(number) for number in range(int(3.5 / share))]
    for name in names:
        hot.sections(reader, [(name, lambda: packed)], 1000)
    found = [hot.sections(reader, [(name, lambda: packed)], 1000)[0][1] for name in names]
    assert found == ["ram"] * len(names)  # where 4 of them would fit in 16 bits


def like(model: BeaconModel) -> Any:
    """A model with heads of a real size, as far as memories are made ready for it."""
    return SimpleNamespace(
        fingerprint=model.fingerprint,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        rope=Rope(1 / 10000 ** (torch.arange(32) / 32)),
        max_positions=1024,
    )


def test_a_quantized_memory_is_dequantized_once_for_all_who_use_it_and_not_kept_so(model: BeaconModel) -> None:
    packed, hot, reader = quantized(of_real_size(), 4), HotMemories(10**9), like(model)
    one, other = (hot.sections(reader, [("a", lambda: packed)], 1000)[0][0] for _ in range(2))
    assert one is other
    kept = weakref.ref(one)
    del one, other
    gc.collect()
    assert kept() is None
    ((_, place),) = hot.sections(reader, [("a", lambda: pytest.fail("it was loaded again"))], 30)
    assert place == "ram"  # also where there is less room, and it is interpolated


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("budget", [None, "x4"])
def test_a_quantized_document_answers_as_its_numbers_do(
    model: BeaconModel, tmp_path: Path, precision: str, budget: str | None
) -> None:
    store = BeaconMemory(tmp_path / "packed", model, reserve=100)
    store.add("roof", ROOF + WELL, ratio=2, precision=precision, compression="select")
    first, again = (store.ask("Who?", "roof", budget=budget, **SHORT) for _ in range(2))
    assert (places(first), places(again)) == (("cold",), ("ram",))
    assert first.text == again.text
    gc.collect()
    assert not store._hot._in_use  # the answers are there, and nobody uses the numbers any more
    document = store.store.get("roof", dtype=model.dtype)
    with BeaconMemory(tmp_path / "plain", model, reserve=100) as plain:
        header = replace(document.header, namespace="")
        plain.store.put(header, document.kv, store.store.text("roof"), precision="as-is")
        assert plain.ask("Who?", "roof", budget=budget, **SHORT).text == first.text
