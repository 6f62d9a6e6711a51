"""The facade on a tiny model: what is stored, what is skipped, what is refused, what is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer, train

from beacon_memory import (
    Added,
    Answer,
    BeaconMemory,
    BeaconMemoryError,
    CapacityError,
    ConfigError,
    Document,
    DocumentNotFoundError,
    FingerprintMismatchError,
    InputError,
    MemoryStore,
    Progress,
    Question,
)
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.config import BeaconConfig
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards.\n\n"
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron.\n\n"
OWLS = "Two barn owls nest above the hayloft every spring and leave in October.\n\n"
SHORT: dict[str, Any] = {"max_new_tokens": 6}

every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))


def make_model(*, compression: str = "auto", **overrides: Any) -> BeaconModel:
    settings = BeaconConfig(beacon_window=32, beacon_compression=compression)
    return tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=1024, **overrides)


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model()


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> BeaconMemory:
    return BeaconMemory(tmp_path / "store", model, reserve=100)


def test_a_store_with_files_elsewhere_takes_the_place_of_a_folder(model: BeaconModel, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=(tmp_path / "files").as_uri()) as store:
        memory = BeaconMemory(store, model, namespace="alice", reserve=100)
        memory.add("roof", ROOF, ratio=4)
        assert memory.ask("Who?", "roof", **SHORT).ids == ("roof",)
        assert memory.store.settings.files.startswith((tmp_path / "files").as_uri())  # type: ignore[union-attr]
        assert [row.id for row in BeaconMemory(store, model).list()] == []


def test_model_and_adapter_are_the_folders_that_were_named_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "base", tiny_base("llama", max_position_embeddings=1024))
    BeaconModel.from_pretrained(tmp_path / "base").save_adapter(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    memory = BeaconMemory("store", "base", "adapter", reserve=100)
    monkeypatch.chdir(tmp_path / "elsewhere")
    memory.add("roof", ROOF, ratio=4)
    assert memory.model.adapter == str(tmp_path / "adapter")
    assert (tmp_path / "store").is_dir()


@every_compression
def test_added_document_is_described_as_it_is_stored(memory: BeaconMemory, compression: str) -> None:
    added = memory.add("roof", ROOF, {"year": 2024}, ratio=4, compression=compression)
    row = memory.show("roof")
    assert (added.id, added.status, added.ratios, added.compression) == ("roof", "added", (4,), compression)
    assert added.tokens == len(ROOF)  # the tiny tokenizer has one token for each byte
    assert added.slots == sum(-(-min(32, len(ROOF) - at) // 4) for at in range(0, len(ROOF), 32))
    layers, heads, head_dim = memory.model.kv_shape
    assert added.bytes == layers * heads * added.slots * (2 * head_dim * 4 + 1)  # keys and values in float32, places
    assert (row.tokens, row.slots, row.bytes, row.metadata) == (added.tokens, added.slots, added.bytes, {"year": 2024})
    assert row.compression == memory.store.get("roof").header.compression == compression
    assert memory.store.text("roof") == ROOF


def test_header_says_where_each_window_lies_and_how_the_text_goes_on(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    header = memory.store.get("roof").header
    assert [(w.start, w.stop) for w in header.windows] == [(0, 32), (32, 64), (64, len(ROOF))]
    assert memory.model.tokenizer.decode(header.tail_ids) == ROOF[64:]


@every_compression
def test_unchanged_document_is_not_compressed_again(
    memory: BeaconMemory, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = memory.add("roof", ROOF, ratio=4, compression=compression)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(memory.model, "run", fail)
    again = memory.add("roof", ROOF, ratio=4, compression=compression)
    assert (again.status, again.compression, again.seconds) == ("unchanged", compression, 0.0)
    assert (again.tokens, again.slots, again.bytes) == (first.tokens, first.slots, first.bytes)
    assert memory.add("roof", ROOF, {"new": True}, ratio=4, compression=compression).status == "unchanged"
    assert memory.show("roof").metadata == {"new": True}


@pytest.mark.parametrize("change", ["text", "ratio", "compression"])
def test_changed_document_is_compressed_again(memory: BeaconMemory, change: str) -> None:
    memory.add("roof", ROOF, {"year": 2024}, ratio=4, compression="beacon")
    text, ratio = (WELL if change == "text" else ROOF), (2 if change == "ratio" else 4)
    compression = "select" if change == "compression" else "beacon"
    assert memory.add("roof", text, ratio=ratio, compression=compression).status == "replaced"
    assert memory.verify() == []
    assert (memory.show("roof").metadata, memory.show("roof").compression) == ({"year": 2024}, compression)


def test_compression_is_the_models_own_unless_one_is_named(memory: BeaconMemory, tmp_path: Path) -> None:
    assert memory.add("roof", ROOF, ratio=4).compression == "select"  # beacons that no adapter brought
    assert memory.add("roof", ROOF, ratio=4, compression="select").status == "unchanged"
    for wanted in BUILT_IN:
        asking = BeaconMemory(tmp_path / wanted, make_model(compression=wanted), reserve=100)
        assert asking.add("roof", ROOF, ratio=4).compression == wanted
        assert asking.add("roof", ROOF, ratio=4, compression="auto").status == "unchanged"
        assert asking.add("roof", ROOF, ratio=4, compression="beacon").compression == "beacon"


def test_compression_that_there_is_not_is_refused_and_the_store_left_as_it_was(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    before = memory.list()
    known = (
        r"compression='beacons' must be 'auto' or one of the methods that are installed: 'beacon', 'select', 'hybrid'"
    )
    with pytest.raises(ConfigError, match=known):
        memory.add("roof", WELL, compression="beacons")
    with pytest.raises(ConfigError, match=known):
        memory.add_many([("well", WELL)], compression="beacons")
    assert memory.list() == before
    assert memory.store.text("roof") == ROOF


def test_score_that_there_is_not_is_refused_at_once(model: BeaconModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"score='guess' must be 'auto' or one of 'repeat', 'expected'"):
        BeaconMemory(tmp_path / "store", model, score="guess")


@pytest.mark.parametrize("compression", ["select", "hybrid"])
def test_score_decides_which_tokens_are_kept_and_not_how_many(
    model: BeaconModel, tmp_path: Path, compression: str
) -> None:
    stored = []
    for score in ("repeat", "expected"):
        memory = BeaconMemory(tmp_path / score, model, reserve=100, score=score)
        memory.add("roof", ROOF, ratio=4, compression=compression)
        assert memory.ask("Who?", "roof", **SHORT).usage.generated_tokens > 0
        stored.append(memory.store.get("roof").kv)
    repeat, expected = stored
    assert len(repeat.positions) == len(expected.positions)
    assert not torch.equal(repeat.positions, expected.positions)


def test_another_model_recompresses_on_add_and_is_refused_on_ask(memory: BeaconMemory, tmp_path: Path) -> None:
    memory.add("roof", ROOF, ratio=4)
    other = BeaconMemory(tmp_path / "store", train(make_model(), seed=7), reserve=100)
    with pytest.raises(FingerprintMismatchError, match=r"'roof'.*another adapter than the loaded model has; load"):
        other.ask("Who?", "roof", **SHORT)
    assert other.add("roof", ROOF, ratio=4).status == "replaced"
    other.ask("Who?", "roof", **SHORT)


@pytest.mark.parametrize(("made", "asked"), [("bfloat16", "float16"), ("float16", "bfloat16"), ("float16", "float32")])
def test_a_document_of_the_same_model_in_float16_is_refused_for_that_reason(
    tmp_path: Path, made: str, asked: str
) -> None:
    base, adapter = tiny_checkpoint(tmp_path / "base", tiny_base("llama").bfloat16()), tmp_path / "adapter"
    trained = tiny_model("llama", BeaconConfig(beacon_window=32), tokenizer=tiny_tokenizer()).bfloat16()
    with torch.no_grad():
        for _, parameter in trained.named_beacon_parameters():
            parameter.mul_(1e-6)
    trained.save_adapter(adapter)

    def opened(dtype: str) -> BeaconMemory:
        return BeaconMemory(tmp_path / "store", base, adapter, device="cpu", dtype=dtype, reserve=100)

    opened(made).add("roof", ROOF, ratio=4)
    message = "another adapter .* or with the same in another dtype: one of the two was loaded in float16"
    with pytest.raises(FingerprintMismatchError, match=message):
        opened(asked).ask("Who?", "roof")
    with pytest.raises(FingerprintMismatchError, match=message):
        opened(asked).append("roof", "More.")


def test_answer_is_the_stock_models_behind_sink_and_documents_in_the_order_given(memory: BeaconMemory) -> None:
    for (id, text), compression in zip({"roof": ROOF, "well": WELL, "owls": OWLS}.items(), BUILT_IN, strict=True):
        memory.add(id, text, ratio=2, compression=compression)
    model = memory.model
    prompt = chat_prompt(model, "Who?", behind_memory=True)
    for ids in (["roof", "well", "owls"], ["owls", "well", "roof"], ["well"], ["owls", "roof"], []):
        parts = [MemoryKV.of(memory.compressor.sink), *(memory.store.get(id).kv for id in ids)]
        request = Request(MemoryKV.concat(parts), prompt)
        ((expected,),) = generate(model, [request], generation_config(model, None, SHORT))
        answer = memory.ask("Who?", ids, **SHORT)
        assert (answer.text, answer.ids) == (expected.text, tuple(ids))
        assert answer.usage.slots == 1 + sum(memory.show(id).slots for id in ids)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.generated_tokens == len(expected.tokens)
        assert 0 < answer.time_to_first_token <= answer.seconds


def test_what_was_said_before_stands_in_front_of_documents_and_the_question_behind_them(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=2)
    memory.add("well", WELL, ratio=2)
    model = memory.model
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    for turns in ([*said, question], [system, *said, question]):
        prompt = chat_prompt(model, turns, behind_memory=True)
        before = chat_prompt(model, turns[:-1], behind_memory=True, answered=False)
        assert prompt[: len(before)] == before
        read = memory.compressor.read_raw(MemoryKV.of(model.empty_kv()), before)
        parts = [MemoryKV.of(memory.compressor.sink), read, *(memory.store.get(id).kv for id in ("roof", "well"))]
        request = Request(MemoryKV.concat(parts), prompt[len(before) :])
        ((expected,),) = generate(model, [request], generation_config(model, None, SHORT))
        for _ in range(2):  # the second time nothing is read again
            answer = memory.ask(turns, ["roof", "well"], **SHORT)
            assert answer.text == expected.text
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.usage.slots == 1 + sum(memory.show(id).slots for id in ("roof", "well"))


def test_what_the_system_says_and_a_conversation_without_documents_stay_in_the_prompt(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=2)
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    cases: list[tuple[list[dict[str, str]], list[str]]] = [([system, question], ["roof"]), ([*said, question], [])]
    for turns, ids in cases:
        asked = memory._asked(Question(turns, ids))
        assert [*asked.request.prompt] == chat_prompt(memory.model, turns, behind_memory=True)


def test_stream_ends_with_the_answer_that_ask_gives(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=2)
    *pieces, answer = memory.stream("Who?", "roof", **SHORT)
    assert isinstance(answer, Answer)
    assert "".join(map(str, pieces)).strip() == answer.text == memory.ask("Who?", "roof", **SHORT).text


def counted(answer: Answer) -> tuple[int, int, int]:
    """Slots and tokens, without where the memories were."""
    return answer.usage.slots, answer.usage.prompt_tokens, answer.usage.generated_tokens


def test_many_questions_are_answered_in_order_as_each_by_itself(memory: BeaconMemory) -> None:
    memory.add_many([Document("roof", ROOF), Document("well", WELL), Document("owls", OWLS)], ratio=2)
    turns = [{"role": "user", "content": "Who mended the roof?"}]
    options = {"max_new_tokens": 9, "temperature": 1.2}
    questions = [
        Question("How deep is the well?", options=SHORT),
        Question(turns, "roof", seed=3, options=options),
        Question(turns, ["roof", "owls"], stop="e", options={"max_new_tokens": 12}),
        Question("Who?", [], options=SHORT),
    ]
    answers = memory.ask_many(iter(questions))
    alone = [
        memory.ask("How deep is the well?", **SHORT),
        memory.ask(turns, "roof", seed=3, **options),
        memory.ask(turns, ["roof", "owls"], stop="e", max_new_tokens=12),
        memory.ask("Who?", [], **SHORT),
    ]
    assert [one.text for one in answers] == [one.text for one in alone]
    assert [one.ids for one in answers] == [("well",), ("roof",), ("roof", "owls"), ()]
    assert [counted(one) for one in answers] == [counted(one) for one in alone]
    assert all(0 < one.time_to_first_token <= one.seconds for one in answers)
    assert memory.ask_many([]) == []


def test_questions_without_options_are_texts_and_conversations(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=2)
    memory.model.base.generation_config.eos_token_id, before = None, memory.model.base.generation_config.eos_token_id
    try:
        answers = memory.ask_many(["Who?", [{"role": "user", "content": "Who?"}]])
    finally:
        memory.model.base.generation_config.eos_token_id = before
    assert [one.usage.generated_tokens for one in answers] == [256, 256]
    assert answers[0].text == answers[1].text
    with pytest.raises(InputError, match="questions='Who\\?' must be several"):
        memory.ask_many("Who?")


def test_a_question_that_cannot_be_asked_ends_the_others(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=2)
    for bad, error in (
        (Question("Who?", "attic"), DocumentNotFoundError),
        (Question("Who?", "roof", options={"max_new_tokens": 5000}), CapacityError),
        (Question("Who?", "roof", options={"num_beams": 2}), InputError),
    ):
        with pytest.raises(error):
            memory.ask_many([Question("Who?", "roof", options={"max_new_tokens": 200}), bad])
        assert memory._loop._is_idle()


def test_questions_on_the_same_documents_attend_to_them_together(memory: BeaconMemory) -> None:
    memory.add_many([("roof", ROOF), ("well", WELL)], ratio=2)
    seen = []
    hook = memory.model.base.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    memory.ask_many([Question(f"Who, {n}?", ["roof", "well"], options=SHORT) for n in range(4)])
    hook.remove()
    parts = [part for cache in seen for batch, owners, _ in cache._groups if len(owners) == 4 for part in batch._parts]
    assert parts
    assert all(len(part.rows) == 4 for part in parts)


def test_streams_that_are_open_at_once_are_decoded_together(memory: BeaconMemory) -> None:
    memory.add_many([("roof", ROOF), ("well", WELL)], ratio=2)
    expected = [memory.ask("Who?", id, **SHORT).text for id in ("roof", "well")]
    batches = []
    hook = memory.model.base.register_forward_pre_hook(
        lambda _module, _args, kwargs: batches.append(len(kwargs["logits_to_keep"])), with_kwargs=True
    )
    streams = [memory.stream("Who?", id, **SHORT) for id in ("roof", "well")]
    with ThreadPoolExecutor() as threads:
        begin = threading.Barrier(2)

        def read(stream: Iterator[str | Answer]) -> Answer:
            begin.wait()
            *_, last = stream
            assert isinstance(last, Answer)
            return last

        answers = [*threads.map(read, streams)]
    hook.remove()
    assert [one.text for one in answers] == expected
    assert max(batches) == 2
    assert len(batches) < 12


def picked(memory: BeaconMemory, question: Any, **options: Any) -> list[str]:
    return [pick.id for pick in memory.pick(question, **options)]


def test_question_without_ids_picks_documents_by_their_passages(memory: BeaconMemory) -> None:
    memory.add_many([Document("roof", ROOF), Document("well", WELL), Document("owls", OWLS)], ratio=4)
    assert picked(memory, "How deep is the well?") == ["well"]
    assert memory.ask("Who mended the roof?", **SHORT).ids[0] == "roof"
    assert set(picked(memory, "What of the barn?", limit=5)) == {"roof", "owls"}
    assert len(picked(memory, "What of the barn?", limit=1)) == 1


def test_question_that_matches_nothing_is_refused_with_advice(memory: BeaconMemory) -> None:
    with pytest.raises(DocumentNotFoundError, match="add some"):
        memory.ask("Who?", **SHORT)
    memory.add("roof", ROOF, ratio=4)
    assert picked(memory, "Zebras?") == ["roof"]  # the only document there is
    memory.add("well", WELL, ratio=4)
    with pytest.raises(DocumentNotFoundError, match="name documents by id"):
        memory.ask("Zebras?", **SHORT)


def test_documents_that_do_not_fit_beside_better_ones_are_not_picked(memory: BeaconMemory) -> None:
    memory.add("large", OWLS * 8, ratio=1)
    memory.add("small", "A barn for owls.", ratio=1)
    best, other = picked(memory, "barn owls", room=10_000)
    assert picked(memory, "barn owls", room=memory.show(best).slots + memory.show(other).slots) == [best, other]
    assert picked(memory, "barn owls", room=memory.show(best).slots + memory.show(other).slots - 1) == [best]


def test_of_memories_that_do_not_fit_together_a_part_is_loaded(memory: BeaconMemory) -> None:
    for id in ("a", "b"):
        memory.add(id, ROOF * 7, ratio=1)
    assert 2 * memory.show("a").slots > memory.model.max_positions
    answer = memory.ask("What?", ["a", "b"], **SHORT)
    assert answer.ids == ("a", "b")
    assert {one.document for one in answer.sources} == {"a", "b"}
    assert 0.9 * memory.room("What?", **SHORT) < answer.usage.slots <= 1 + memory.room("What?", **SHORT)


def test_a_question_that_leaves_no_room_is_refused_before_any_document_is_read(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add("roof", ROOF, ratio=4)
    monkeypatch.setattr("beacon_memory.storage.reading.read_file", lambda *_: pytest.fail("a document was read"))
    with pytest.raises(CapacityError, match=r"1 positions of memory, \d+ prompt tokens .*has 1024"):
        memory.ask("Who? " * 210, "roof", **SHORT)


def test_spans_that_do_not_fit_together_are_interpolated_and_answers_still_come(memory: BeaconMemory) -> None:
    for id, text in (("a", ROOF * 7), ("b", WELL * 7)):
        memory.add(id, text, ratio=4, compression="select")
    spans = [memory.store.get(id).header.span for id in ("a", "b")]
    assert sum(spans) > memory.model.max_positions > 1 + sum(memory.show(id).slots for id in ("a", "b"))
    answer = memory.ask("Who?", ["a", "b"], budget="x1", **SHORT)
    assert answer.usage.generated_tokens > 0
    assert answer.usage.slots == 1 + sum(memory.show(id).slots for id in ("a", "b"))


def test_document_too_long_for_the_model_is_refused_with_the_numbers(memory: BeaconMemory) -> None:
    with pytest.raises(CapacityError, match=r"document 'long': 7900 tokens at ratio 4 .*has 1024.*higher ratio"):
        memory.add("long", ROOF * 100, ratio=4, compression="beacon")
    assert memory.list() == []


def test_auto_takes_the_smallest_ratio_that_leaves_room_to_methods_that_need_it(memory: BeaconMemory) -> None:
    for compression, ratio in (("beacon", 4), ("select", 2)):
        assert memory.add("short", ROOF, compression=compression).ratios == (2,)
        assert memory.add("long", ROOF * 30, compression=compression).ratios == (ratio,)


def test_ratio_may_differ_from_window_to_window(memory: BeaconMemory) -> None:
    added = memory.add("roof", ROOF, ratio=[2, 4, 8])
    assert added.ratios == (2, 4, 8)
    assert added.slots == 16 + 8 + 2
    assert memory.add("roof", ROOF, ratio=[2, 4, 8]).status == "unchanged"
    assert memory.add("roof", ROOF, ratio=[8, 4, 2]).status == "replaced"


@pytest.mark.parametrize(
    ("id", "text", "ratio", "error", "message"),
    [
        ("", ROOF, 4, InputError, "empty"),
        ("roof", "", 4, InputError, "document 'roof': the document is empty or blank"),
        ("roof", " \n\u3000\t", 4, InputError, "document 'roof': the document is empty or blank"),
        ("roof", ROOF, "high", ConfigError, "ratio='high'"),
        ("roof", ROOF, -2, ConfigError, "-2"),
        ("roof", ROOF, [2, 4], ConfigError, "names 2 windows"),
        ("roof", "lone \ud800", 4, InputError, "surrogate"),
    ],
)
def test_bad_documents_are_refused_and_nothing_is_stored(
    memory: BeaconMemory, id: str, text: str, ratio: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        memory.add(id, text, ratio=ratio)
    assert memory.list() == []


def test_bad_document_among_many_stops_after_those_before_it(memory: BeaconMemory) -> None:
    documents = [Document("roof", ROOF), Document("none", ""), Document("well", WELL)]
    with pytest.raises(InputError, match="'none'"):
        memory.add_many(documents, ratio=4)
    assert [row.id for row in memory.list()] == ["roof"]


@every_compression
def test_bad_document_among_many_can_be_reported_and_the_others_go_on(memory: BeaconMemory, compression: str) -> None:
    failed: list[tuple[str, BeaconMemoryError]] = []
    progress: list[Progress] = []
    told: list[Added] = []
    memory.add("owls", OWLS, ratio=4, compression=compression)
    documents = [Document("owls", OWLS), Document("roof", ROOF), Document("none", ""), Document("well", WELL)]
    added = memory.add_many(
        documents,
        ratio=4,
        compression=compression,
        progress=progress.append,
        on_added=told.append,
        on_error=lambda document, error: failed.append((document.id, error)),
    )
    assert [(one.id, one.status) for one in added] == [("owls", "unchanged"), ("roof", "added"), ("well", "added")]
    assert told == added
    assert [id for id, _ in failed] == ["none"]
    assert progress[-1] == Progress(tokens=len(ROOF + WELL), begun=len(ROOF + WELL))


@every_compression
def test_documents_are_stored_as_soon_as_they_are_done(memory: BeaconMemory, compression: str) -> None:
    """Interrupted while a later document is read, the earlier ones stay."""
    memory.compressor.rows_per_pass = 40

    def documents() -> Any:
        yield Document("roof", ROOF)
        yield Document("well", WELL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memory.add_many(documents(), ratio=4, compression=compression)
    assert [row.id for row in memory.list()] == ["roof"]  # the other one waits for more to share its passes
    assert memory.verify() == []
    again = memory.add_many([("roof", ROOF), ("well", WELL)], ratio=4, compression=compression)
    assert [one.id for one in again if one.status == "unchanged"] == ["roof"]


def test_removed_document_is_gone(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    memory.remove("roof")
    assert memory.list() == []
    with pytest.raises(DocumentNotFoundError, match="roof"):
        memory.ask("Who?", "roof", **SHORT)


def test_erased_document_leaves_no_words(memory: BeaconMemory) -> None:
    for id in ("roof", "well"):
        memory.add(id, ROOF + " Zymurgy is taught there.", ratio=4)
    memory.remove("roof")
    memory.erase("well")
    assert memory.list() == []
    left = b"".join(path.read_bytes() for path in memory.store.root.rglob("*") if path.is_file())
    assert b"zymurg" not in left.lower()


def test_bfloat16_memory_is_stored_in_bfloat16(tmp_path: Path) -> None:
    half = make_model()
    half.to(torch.bfloat16)
    memory = BeaconMemory(tmp_path, half, reserve=100)
    memory.add("roof", ROOF, ratio=4)
    stored = memory.store.get("roof").kv
    assert (stored.keys.dtype, stored.positions.dtype) == (torch.bfloat16, torch.int32)
    assert memory.ask("Who?", "roof", **SHORT).usage.generated_tokens > 0


def test_text_without_utf8_form_is_refused_wherever_it_comes_in(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    bad = "lone \ud800"
    tool = {"type": "function", "function": {"name": "look", "description": bad}}
    turns = [{"role": "user", "content": bad}]
    calls = [{"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": [bad]}}}]}]
    asked: list[Callable[[], Any]] = [
        *(partial(ask, asked, "roof") for ask in (memory.ask, memory.stream) for asked in (bad, turns, calls)),
        *(partial(ask, question) for ask in (memory.ask, memory.pick, memory.room) for question in (bad, turns)),
        partial(memory.ask, "Who?", bad),
        partial(memory.ask, "Who?", "roof", stop=[bad]),
        partial(memory.ask, "Who?", "roof", stop_strings=bad),
        partial(memory.ask, "Who?", "roof", tools=[tool]),
        partial(memory.append, "roof", bad),
    ]
    for ask in asked:
        with pytest.raises(InputError, match=r"lone surrogate '\\ud800' at character 5"):
            ask()
    assert memory.store.text("roof") == ROOF


@pytest.mark.parametrize(
    "question", [7, None, b"Who?", [], {}, ["Who?"], [{"content": "Who?"}], [{"role": 1, "content": "Who?"}]]
)
def test_what_is_no_question_is_refused(memory: BeaconMemory, question: Any) -> None:
    memory.add("roof", ROOF, ratio=4)
    for ask in (memory.ask, memory.pick, memory.room):
        with pytest.raises(InputError, match="must be a text, or dicts with 'role' and 'content' texts"):
            ask(question)
    for tools in (7, [7], "look"):
        with pytest.raises(InputError, match="must be JSON schemas of functions"):
            memory.ask("Who?", "roof", tools=tools)  # type: ignore[arg-type]  # wrong on purpose


def test_options_that_ask_cannot_honour_are_refused(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    with pytest.raises(InputError, match="num_return_sequences=2"):
        memory.ask("Who?", "roof", num_beams=2, num_return_sequences=2)
    with pytest.raises(InputError, match="num_beams=2"):
        memory.stream("Who?", "roof", num_beams=2)
    with pytest.raises(InputError, match="unknown generation options: max_tokens=3"):
        memory.ask("Who?", "roof", max_tokens=3)


def test_beams_answer_through_ask(memory: BeaconMemory) -> None:
    memory.add("roof", ROOF, ratio=4)
    assert memory.ask("Who?", "roof", num_beams=3, **SHORT).usage.generated_tokens > 0


def test_pairs_of_id_and_text_are_documents_too(memory: BeaconMemory) -> None:
    added = memory.add_many({"roof": ROOF, "well": WELL}.items(), ratio=4)
    assert [one.id for one in added] == ["roof", "well"]
    assert memory.store.text("well") == WELL


def test_a_question_reads_the_row_of_each_document_once(memory: BeaconMemory) -> None:
    for id, text in (("roof", ROOF), ("well", WELL)):
        memory.add(id, text, ratio=4)
    statements: list[str] = []
    with memory.store.parts.catalog().connections.use() as db:
        db.conn.set_trace_callback(statements.append)
        assert memory.ask("Who mended the roof?", ["roof", "well"], **SHORT).ids == ("roof", "well")
        db.conn.set_trace_callback(None)
    rows = [one for one in statements if "content_hash" in one and "FROM documents" in one]
    assert [sum(f"'{id}'" in row for row in rows) for id in ("roof", "well")] == [1, 1]
