"""What stands in front of a prompt of vLLM: placeholders, and K/V as vLLM's own model has them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BOS, MODELS, VOCAB, some_ids, tiny_base, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_beacon_memory import Front, Fronts, write_model_folder
from vllm_beacon_memory.fronts import SALT, Part, places_in_blocks
from vllm_beacon_memory.model_folder import ModelFolder
from vllm_samples import LEASE, tiny_setting

from beacon_memory.errors import ConflictError, DocumentNotFoundError, FingerprintMismatchError, InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.cache import MemoryCache

Setting = tuple[BeaconMemory, Fronts]
PROMPT = some_ids(7, seed=3)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    memory, model = tiny_setting(tmp_path_factory.mktemp("vllm"))
    return memory, Fronts(memory.store, model)


@pytest.fixture
def fronts(setting: Setting) -> Fronts:
    return setting[1]


def stock_logits(fronts: Fronts, front: Front) -> Tensor:
    """The logits of a prompt as vLLM computes them: a stock model of the folder, K/V in its cache, positions behind."""
    base: Any = AutoModelForCausalLM.from_pretrained(fronts.model.path, dtype=torch.float32)
    keys, values = fronts.load(front.parts, 0, front.slots, dtype=torch.float32)
    cache = DynamicCache()
    for layer, (own_keys, own_values) in enumerate(zip(keys, values, strict=True)):
        cache.update(own_keys[None], own_values[None], layer)
    with torch.no_grad():
        return base(torch.tensor([PROMPT]), past_key_values=cache).logits[0]  # type: ignore[no-any-return]


def our_logits(memory: BeaconMemory, ids: Sequence[str]) -> Tensor:
    """The same by our own path, behind whole documents."""
    parts = [MemoryKV.of(memory.compressor.sink), *(memory.store.get(id).kv for id in ids)]
    cache = MemoryCache([memory.model.prefix(*parts)], config=memory.model.base.config)
    with torch.no_grad():
        return memory.model.base(torch.tensor([PROMPT]), past_key_values=cache).logits[0]  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize(
    "ids", [["lease"], ["owls"], ["beacons"], ["appended"], ["owls", "beacons", "lease"], []], ids="+".join
)
def test_a_stock_model_behind_them_says_what_ours_does(setting: Setting, ids: list[str]) -> None:
    memory, fronts = setting
    front = fronts.of(ids)
    ours = our_logits(memory, ids)
    torch.testing.assert_close(stock_logits(fronts, front), ours, atol=2e-4, rtol=1e-4)
    assert front.slots == 1 + sum(memory.store.row(id).slots for id in ids)
    assert not torch.allclose(ours, our_logits(memory, ["lease" if ids != ["lease"] else "owls"]), atol=0.1)


@pytest.mark.parametrize("name", [*MODELS])
def test_so_does_one_of_every_family(name: str, tmp_path: Path) -> None:
    family, settings = MODELS[name]
    base = tiny_checkpoint(tmp_path / "base", tiny_base(family, **settings))
    write_model_folder(tmp_path / "model", base, dtype="float32")
    memory = BeaconMemory(tmp_path / "store", base, device="cpu", dtype="float32", reserve=16)
    memory.add("lease", LEASE[:60], ratio=0)
    memory.add("owls", LEASE[60:99], ratio=0)
    fronts = Fronts(memory.store, tmp_path / "model")
    ours = our_logits(memory, ["owls", "lease"])
    torch.testing.assert_close(stock_logits(fronts, fronts.of(["owls", "lease"])), ours, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions_are_loaded_in_the_dtype_of_the_cache(setting: Setting, precision: str) -> None:
    memory, fronts = setting
    memory.add(precision, LEASE, ratio=1, compression="select", precision=precision)
    exact, other = (
        fronts.load(fronts.of([id]).parts, 0, 100, dtype=dtype)
        for id, dtype in (("lease", torch.float32), (precision, torch.bfloat16))
    )
    for one, rounded in zip(exact, other, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), one, atol=0.1, rtol=0.05)


def test_slots_that_the_cache_lacks_are_loaded_alone(fronts: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
    front = fronts.of(["owls", "lease"])
    whole = fronts.load(front.parts, 0, front.slots, dtype=torch.float32)
    read: list[str] = []
    own = Fronts._read
    monkeypatch.setattr(Fronts, "_read", lambda self, row, *args: read.append(row.id) or own(self, row, *args))
    last = front.slots - 1
    for start, stop in [(0, 1), (1, 2), (16, 32), (128, 160), (160, 161), (last, front.slots), (100, front.slots)]:
        for part, all_of_it in zip(fronts.load(front.parts, start, stop, dtype=torch.float32), whole, strict=True):
            assert torch.equal(part, all_of_it[:, :, start:stop])
    read.clear()
    fronts.load(front.parts, last, front.slots, dtype=torch.float32)
    assert read == ["lease"]


def test_sections_stand_in_the_order_that_is_given(setting: Setting) -> None:
    memory, fronts = setting
    row = memory.store.row("lease")
    sections = memory.store.get("lease").header.sections
    assert len(sections) > 3
    front = fronts.requested({"beacon_memory": [{"id": "lease", "root": row.root, "sections": [3, 1]}]})
    assert front.slots == 1 + sections[3].size + sections[1].size
    _, values = fronts.load(front.parts, 1, front.slots, dtype=torch.float32)
    stored = memory.store.get("lease").kv.stack().values
    places = [*range(sections[3].first, sections[3].first + sections[3].size)]
    places += range(sections[1].first, sections[1].first + sections[1].size)
    assert torch.equal(values, stored[:, :, places].to(torch.float32))


class TestAbout:
    def test_whole_passages_are_chosen_within_the_budget(self, setting: Setting) -> None:
        memory, fronts = setting
        front = fronts.about("Who pays the rent?", ["lease"], budget=250)
        (part,) = front.parts
        sections = memory.store.get("lease").header.sections
        assert part.sections is not None
        assert 150 < front.slots == 1 + sum(sections[number].size for number in part.sections) <= 251
        text = "".join(LEASE[sections[number].start : sections[number].stop] for number in part.sections)
        assert "Ada Flint, on the first day of each month" in text
        assert "Ducks" not in text

    def test_the_best_passage_stands_last(self, setting: Setting) -> None:
        memory, fronts = setting
        found = memory.store.search("Does the miller pay for the ducks on the pond?", 2, documents=["lease"])
        front = fronts.about("Does the miller pay for the ducks on the pond?", ["lease", "owls"], budget=460)
        assert [part.id for part in front.parts][-1] == "lease"
        sections = memory.store.get("lease").header.sections
        first, last = (sections[(front.parts[-1].sections or ())[place]] for place in (0, -1))
        assert found[0].start <= last.start < found[0].stop
        assert not found[0].start <= first.start < found[0].stop

    def test_documents_are_found_by_their_words(self, setting: Setting) -> None:
        memory, fronts = setting
        memory.within("farm").add("cows", "Six cows graze behind the barn.", ratio=0, compression="select")
        farm = Fronts(memory.store.place, fronts.model, "farm")
        assert [part.id for part in farm.about("Which cows graze?").parts] == ["cows"]

    def test_what_fits_is_taken_whole(self, fronts: Fronts) -> None:
        assert fronts.about("Where do owls nest?", ["owls"], budget=4000) == fronts.of(["owls"])

    def test_a_budget_without_room_for_a_passage_is_refused(self, fronts: Fronts) -> None:
        with pytest.raises(InputError, match=r"budget=1: no whole passage of \['lease'\] that matches"):
            fronts.about("Who pays the rent?", ["lease"], budget=1)

    def test_nothing_found_is_said(self, fronts: Fronts) -> None:
        with pytest.raises(DocumentNotFoundError, match="no document matches the question"):
            fronts.about("xyzzy")


class TestPlaceholders:
    def test_each_memory_has_ids_and_a_salt_of_its_own(self, fronts: Fronts) -> None:
        made = [fronts.of(ids) for ids in ([], ["lease"], ["owls"], ["beacons"], ["lease", "owls"], ["owls", "lease"])]
        made.append(fronts.about("Who pays the rent?", ["lease"], budget=250))
        assert len({front.cache_salt for front in made}) == len(made)
        assert len({tuple(front.token_ids[:16]) for front in made}) == len(made)
        for front in made:
            assert len(front.token_ids) == front.slots
            assert all(0 <= id < VOCAB for id in front.token_ids)
            assert front.cache_salt.startswith(SALT)

    def test_the_same_memory_has_the_same_ones(self, setting: Setting) -> None:
        memory, fronts = setting
        again = Fronts(memory.store.place, fronts.model.path).of(["lease"])
        assert again.token_ids == fronts.of(["lease"]).token_ids
        assert again.cache_salt == fronts.of(["lease"]).cache_salt

    def test_a_document_that_is_replaced_has_others(self, setting: Setting) -> None:
        memory, fronts = setting
        memory.add("changing", "The well is deep.", ratio=0, compression="select")
        before = fronts.of(["changing"])
        memory.add("changing", "The well is dry..", ratio=0, compression="select")
        after = fronts.of(["changing"])
        assert before.slots == after.slots
        assert before.token_ids != after.token_ids
        assert before.cache_salt != after.cache_salt

    def test_so_has_another_model(self, fronts: Fronts) -> None:
        other = replace(fronts.model, fingerprint=replace(fronts.model.fingerprint, adapter="other"))
        assert replace(fronts.of(["lease"]), model=other).cache_salt != fronts.of(["lease"]).cache_salt

    def test_a_prompt_stands_behind_them_without_its_bos(self, fronts: Fronts) -> None:
        front = fronts.of(["lease"])
        assert fronts.model.leading_bos == (BOS,)
        expected = {"prompt_token_ids": front.token_ids + PROMPT, "cache_salt": front.cache_salt}
        assert front.prompt(PROMPT) == front.prompt([BOS, *PROMPT]) == expected

    def test_without_a_sink_and_documents_there_are_none(self, fronts: Fronts) -> None:
        bare = Fronts(fronts.store, replace(fronts.model, sink=fronts.model.sink[:0])).of([])
        assert bare.slots == 0
        assert bare.prompt([BOS, *PROMPT]) == {"prompt_token_ids": [BOS, *PROMPT], "cache_salt": bare.cache_salt}

    def test_a_prompt_must_follow(self, fronts: Fronts) -> None:
        with pytest.raises(InputError, match=r"ids=\[\] is no prompt"):
            fronts.of(["lease"]).prompt([BOS])

    def test_parameters_travel_as_json(self, fronts: Fronts) -> None:
        for front in (fronts.of([]), fronts.of(["lease"]), fronts.about("Who pays the rent?", ["lease"], budget=250)):
            sent = json.loads(json.dumps(front.kv_transfer_params))
            assert fronts.requested(sent) == front
            assert fronts.requested(sent).cache_salt == front.cache_salt


def test_slots_lie_where_the_blocks_of_the_request_are() -> None:
    assert places_in_blocks([5, 2, 9], 4, 0, 10).tolist() == [20, 21, 22, 23, 8, 9, 10, 11, 36, 37]
    assert places_in_blocks([5, 2, 9], 4, 3, 6).tolist() == [23, 8, 9]
    assert places_in_blocks([5], 4, 2, 2).tolist() == []


class TestRefusals:
    @pytest.mark.parametrize(
        "ask", [lambda fronts: fronts.of(["ragged"]), lambda fronts: fronts.about("rent", ["ragged"])]
    )
    def test_heads_with_different_tokens(self, fronts: Fronts, ask: Any) -> None:
        with pytest.raises(InputError, match=r"document 'ragged' cannot stand in vLLM's cache: its heads keep \d+ to"):
            ask(fronts)

    def test_an_id_that_is_not_stored(self, fronts: Fronts) -> None:
        with pytest.raises(DocumentNotFoundError):
            fronts.of(["gone"])

    def test_one_id_instead_of_several(self, fronts: Fronts) -> None:
        with pytest.raises(InputError, match="ids='lease' must be several"):
            fronts.of("lease")

    def test_documents_of_another_model(self, setting: Setting) -> None:
        memory, fronts = setting
        other = replace(fronts.model, fingerprint=replace(fronts.model.fingerprint, rope="other"))
        with pytest.raises(FingerprintMismatchError, match="compressed with another rope"):
            Fronts(memory.store, other).of(["lease"])

    def test_a_document_that_was_replaced_since(self, setting: Setting) -> None:
        memory, fronts = setting
        memory.add("short", "The well is deep.", ratio=0, compression="select")
        front = fronts.of(["short"])
        memory.add("short", "The well is dry.", ratio=0, compression="select")
        for use in (
            lambda: fronts.requested(front.kv_transfer_params),
            lambda: fronts.load(front.parts, 0, front.slots, dtype=torch.float32),
        ):
            with pytest.raises(ConflictError, match="'short' was replaced since"):
                use()

    @pytest.mark.parametrize(
        "given",
        [
            None,
            "lease",
            [7],
            [{"id": "lease"}],
            [{"id": "lease", "root": 5, "sections": None}],
            [{"id": "lease", "root": "", "sections": ["0"]}],
        ],
    )
    def test_parameters_that_name_nothing(self, fronts: Fronts, given: object) -> None:
        with pytest.raises(InputError, match="must be a list of documents"):
            fronts.requested({"beacon_memory": given})

    @pytest.mark.parametrize("sections", [[0, 0], [-1], [10_000]])
    def test_sections_that_there_are_not(self, setting: Setting, sections: list[int]) -> None:
        memory, fronts = setting
        part = {"id": "lease", "root": memory.store.row("lease").root, "sections": sections}
        with pytest.raises(InputError, match="must be different ones of the"):
            fronts.requested({"beacon_memory": [part]})


def test_reading_a_store_imports_no_transformers(setting: Setting) -> None:
    memory, fronts = setting
    script = (
        "import sys, torch; from vllm_beacon_memory import Fronts; fronts = Fronts(sys.argv[1], sys.argv[2]); "
        "front = fronts.about('Who pays the rent?', ['lease']); fronts.load(front.parts, 0, 9, dtype=torch.float32); "
        "sys.exit(bool({'transformers', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(memory.store.root), str(fronts.model.path)]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_front_tells_its_documents(fronts: Fronts) -> None:
    assert fronts.of(["lease", "owls"]).parts == (
        Part("lease", fronts.store.row("lease").root),
        Part("owls", fronts.store.row("owls").root),
    )
    assert isinstance(fronts.of([]).model, ModelFolder)


def test_the_store_may_be_named_by_its_path(setting: Setting, tmp_path: Path) -> None:
    memory, fronts = setting
    assert Fronts(str(memory.store.root), str(fronts.model.path)).of(["lease"]).slots == fronts.of(["lease"]).slots
