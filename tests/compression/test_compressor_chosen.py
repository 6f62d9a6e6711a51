"""`select` and `hybrid`: K/V of chosen tokens, window by window, each behind the memory of those before it."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from compressor_samples import DOCUMENTS, WINDOW, assert_same, by_choice, compress, every_score, model_of
from kv_samples import same
from stock_behind import best, eager, slow_repeated, stock_reading
from tiny_models import BOS, MODELS, some_ids, some_probe, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods import ReadWindow
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.compression.methods.scored import ScoredMethod
from beacon_memory.compression.methods.select import Select
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.repetition import PIECE

IDS = some_ids(21, seed=21)
RATIOS = (2, 4, 3)


def chosen(model: BeaconModel, ids: Any = IDS, ratios: Any = RATIOS, **how: Any) -> MemoryKV:
    (document,) = compress(model, [Work(ids, ratios)], **how)
    return document.kv


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_the_method_written_out(name: str) -> None:
    family, overrides = MODELS[name]
    stock, config = eager(name), BeaconConfig(beacon_window=WINDOW)
    model = tiny_model(family, config, tokenizer=tiny_tokenizer(), **overrides)
    parts = [MemoryKV.of(stock_reading(stock, [BOS]).kv)]
    for number, ratio in enumerate(RATIOS):
        window, prefix = IDS[number * WINDOW : (number + 1) * WINDOW], MemoryKV.concat(parts)
        kv = stock_reading(stock, window, prefix).kv
        scores = slow_repeated(stock, prefix, kv, window)
        parts.append(MemoryKV.chosen(kv, best(scores, -(-len(window) // ratio))))
    assert_same(chosen(model, compression="select"), MemoryKV.concat(parts[1:]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("compression", "ratio"), [("select", 0), ("select", 1), ("hybrid", 0)])
@every_score
def test_all_tokens_kept_are_the_text_itself(name: str, compression: str, ratio: int, score: str) -> None:
    family, overrides = MODELS[name]
    config = BeaconConfig(beacon_window=WINDOW)
    model = tiny_model(family, config, tokenizer=tiny_tokenizer(), **overrides)
    compressor = BeaconCompressor(model, score=score)
    document = compressor.compress_one(Work(IDS, [ratio] * 3), compression=compression)
    stock, question = eager(name), some_ids(5, seed=2)
    memory = MemoryKV.concat([MemoryKV.of(compressor.sink), document.kv])
    with torch.no_grad():
        cache = MemoryCache([model.prefix(memory)])
        ours = model.base(torch.tensor([question]), past_key_values=cache).logits[0]
    full = stock_reading(stock, [BOS, *IDS, *question]).logits[-5:]
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=0)


@by_choice
@every_score
@pytest.mark.parametrize("sink", [0, 1])
def test_a_text_in_one_go_is_its_windows_one_by_one(compression: str, score: str, sink: int) -> None:
    model = model_of(sink=sink)
    compressor = BeaconCompressor(model, score=score)
    whole = compressor.compress_one(Work(IDS, RATIOS), compression=compression)
    parts, method = [MemoryKV.of(compressor.sink)], BUILT_IN[compression](compressor)
    assert isinstance(method, Select)
    for number, ratio in enumerate(RATIOS):
        window, prefix = IDS[number * WINDOW : (number + 1) * WINDOW], model.prefix(MemoryKV.concat(parts))
        with torch.no_grad():
            parts += method.read_windows([(prefix, window, ratio)])
    assert_same(whole.kv, MemoryKV.concat(parts[1:]))


@by_choice
@every_score
def test_a_window_is_chosen_from_by_what_stands_before_it_alone(compression: str, score: str) -> None:
    how, model = {"compression": compression, "score": score}, model_of()
    two = chosen(model, IDS[:16], [2, 4], **how)
    three = chosen(model, [*IDS[:16], *some_ids(5, seed=1)], [2, 4, 3], **how)
    other = chosen(model, [*some_ids(8, seed=1), *IDS[8:16]], [2, 4], **how)
    alone = chosen(model, IDS[8:16], [4], **how)
    for layer in range(3):
        for ours, longer in zip(two.layer(layer), three.layer(layer), strict=True):
            for part, of_longer in zip(ours, longer, strict=True):
                torch.testing.assert_close(of_longer[: len(part)], part, atol=1e-4, rtol=0)
    for changed in (other.values, torch.cat([torch.zeros_like(two.values[: -len(alone.values)]), alone.values])):
        assert changed.shape == two.values.shape
        assert not torch.allclose(changed, two.values, atol=1e-2)


@by_choice
@every_score
def test_order_and_company_of_documents_change_nothing(compression: str, score: str) -> None:
    how, model = {"compression": compression, "score": score}, model_of()
    together, backwards = compress(model, **how), compress(model, DOCUMENTS[::-1], rows_per_pass=1, **how)[::-1]
    for document, one, other in zip(DOCUMENTS, together, backwards, strict=True):
        (alone,) = compress(model, [document], **how)
        assert alone.windows == one.windows == other.windows
        for kv in (one.kv, other.kv):
            assert_same(kv, alone.kv)


@by_choice
@pytest.mark.parametrize("rows", [1, 18, 4096])
def test_documents_come_in_order_and_as_soon_as_they_are_read(compression: str, rows: int) -> None:
    events: list[str] = []

    def documents() -> Iterator[Work]:
        for number in range(4):
            events.append(f"take {number}")
            yield Work(some_ids(8, seed=number), [2])  # 8 rows, or 9 with a beacon

    compressor = BeaconCompressor(model_of(), rows_per_pass=rows)
    for number, _ in compressor.compress(enumerate(documents()), compression=compression):
        events.append(f"give {number}")
    expected = {
        1: "take 0, give 0, take 1, give 1, take 2, give 2, take 3, give 3",  # a full pass waits for no other
        18: {
            "select": "take 0, take 1, take 2, give 0, give 1, take 3, give 2, give 3",
            "hybrid": "take 0, take 1, give 0, give 1, take 2, take 3, give 2, give 3",
        }[compression],
        4096: "take 0, take 1, take 2, take 3, give 0, give 1, give 2, give 3",
    }
    assert ", ".join(events) == expected[rows]


@by_choice
@pytest.mark.parametrize(("rows", "expected"), [(1, [8, 8, 5, 3]), (4096, [11, 8, 5])])
def test_progress_is_told_of_every_pass(compression: str, rows: int, expected: list[int]) -> None:
    steps: list[int] = []
    documents = [Work(IDS, RATIOS), Work(some_ids(3), [2])]
    compressor = BeaconCompressor(model_of(), rows_per_pass=rows)
    list(compressor.compress(enumerate(documents), steps.append, compression=compression))
    assert steps == expected


@by_choice
@every_score
@pytest.mark.parametrize("rows", [1, 13, 20, 33])
@pytest.mark.parametrize("sink", [0, 1])
def test_the_size_of_a_pass_changes_nothing(compression: str, score: str, rows: int, sink: int) -> None:
    how, model = {"compression": compression, "score": score}, model_of(sink=sink)
    works = [*DOCUMENTS, *DOCUMENTS[::-1]]
    for work, parts in zip(works, compress(model, works, rows_per_pass=rows, **how), strict=True):
        (alone,) = compress(model, [work], **how)
        assert_same(parts.kv, alone.kv)
        assert parts.windows == alone.windows


@pytest.mark.parametrize("name", MODELS)
@by_choice
@every_score
def test_windows_of_several_pieces_and_ragged_memories_share_passes(name: str, compression: str, score: str) -> None:
    family, overrides = MODELS[name]
    config = BeaconConfig(beacon_window=PIECE + 40)
    model = tiny_model(family, config, tokenizer=tiny_tokenizer(), **overrides)
    how = {"compression": compression, "score": score}
    works = [
        Work(some_ids(tokens, seed=tokens), ratios)
        for tokens, ratios in {PIECE + 90: [4, 8], 700: [8, 2, 4], 30: [4]}.items()
    ]
    for work, together in zip(works, compress(model, works, **how), strict=True):
        (alone,) = compress(model, [work], rows_per_pass=1, **how)
        assert_same(together.kv, alone.kv)


@by_choice
@every_score
def test_passes_have_no_more_rows_than_they_may(compression: str, score: str) -> None:
    model, rows = model_of(), []
    compressor = BeaconCompressor(model, score=score, rows_per_pass=30)
    if score == "expected":
        list(compressor.compress([(0, Work(some_ids(8), [2]))], compression=compression))  # what is measured once
    hook = model.base.model.register_forward_pre_hook(
        lambda _module, _args, how: rows.append(how["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        list(compressor.compress(enumerate([*DOCUMENTS, *DOCUMENTS]), compression=compression))
    finally:
        hook.remove()
    assert max(rows) <= 30
    assert max(rows) > 20  # of windows of 8


@by_choice
def test_no_more_documents_wait_than_a_pass_has_room_for(compression: str) -> None:
    taken: list[int] = []

    def documents() -> Iterator[tuple[int, Work]]:
        for number in range(30):
            taken.append(number)
            yield number, Work(some_ids(80, seed=1), [4] * 10) if number == 0 else Work(some_ids(8), [4])

    compressed = BeaconCompressor(model_of(), rows_per_pass=36).compress(documents(), compression=compression)
    assert next(compressed)[0] == 0
    assert len(taken) == {"select": 5, "hybrid": 4}[compression]  # four in a pass, and the next if there is room left
    assert [number for number, _ in compressed] == list(range(1, 30))


@by_choice
@every_score
def test_the_last_layer_is_not_computed_beyond_its_keys_and_values(compression: str, score: str) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the last layer was computed to its end")

    model = model_of()
    last = model.base.model.layers[-1]
    hooks = [part.register_forward_hook(refuse) for part in (last.self_attn.o_proj, last.mlp, model.base.model.norm)]
    try:
        assert len(compress(model, compression=compression, score=score)) == len(DOCUMENTS)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("compression", "ratio", "span"), [("select", 4, 160), ("hybrid", 4, 170), ("select", 2, 160)])
def test_a_text_longer_than_the_model_s_positions_is_read_behind_the_last_windows_that_fit(
    compression: str, ratio: int, span: int
) -> None:
    small, large = (
        tiny_model("llama", BeaconConfig(beacon_window=16), tokenizer=tiny_tokenizer(), max_position_embeddings=n)
        for n in (80, 512)
    )
    ids, ratios = some_ids(160, seed=3), [ratio] * 10
    ours, roomy = (chosen(model, ids, ratios, compression=compression) for model in (small, large))
    assert ours.span == roomy.span == span
    assert ours.slots == roomy.slots == 160 // ratio
    method, room = BUILT_IN[compression](BeaconCompressor(small)), 80 - 16 - 16  # the window is read and repeated
    assert isinstance(method, Select)
    sink, parts = MemoryKV.of(method.reader.sink), []
    for number in range(10):
        prefix = MemoryKV.concat([sink, *parts[-2:]])
        assert prefix.span <= room
        assert number < 2 or room < prefix.span + span // 10  # a third one would not fit
        with torch.no_grad():
            window = ids[16 * number : 16 * (number + 1)]
            parts += method.read_windows([(small.prefix(prefix), window, ratio)])
    assert_same(ours, MemoryKV.concat(parts))
    assert not torch.equal(ours.counts, roomy.counts)


def test_a_window_that_leaves_no_room_for_another_one_is_read_behind_one_that_is_interpolated() -> None:
    model = tiny_model("llama", BeaconConfig(beacon_window=16), tokenizer=tiny_tokenizer(), max_position_embeddings=40)
    ids = some_ids(48, seed=3)
    ours, method = chosen(model, ids, [2] * 3, compression="select"), Select(BeaconCompressor(model))
    sink, parts = MemoryKV.of(method.reader.sink), []
    for number in range(3):
        prefix = MemoryKV.concat([sink, *parts[-1:]], 8).interpolated(8)  # as many as reading and repeating leave
        with torch.no_grad():
            parts += method.read_windows([(model.prefix(prefix), ids[16 * number : 16 * (number + 1)], 2)])
    assert_same(ours, MemoryKV.concat(parts))


@by_choice
def test_a_window_of_a_long_text_is_read_behind_a_bounded_part_of_its_memory(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", BeaconConfig(beacon_window=16), tokenizer=tiny_tokenizer(), max_position_embeddings=512)
    seen: list[tuple[int, int]] = []
    read = ScoredMethod.read_windows

    def spied(method: ScoredMethod, windows: Any) -> list[MemoryKV]:
        seen.extend((prefix.slots, prefix.span) for prefix, _, _ in windows)
        return read(method, windows)

    monkeypatch.setattr(ScoredMethod, "read_windows", spied)
    ids, memories, views = some_ids(160, seed=3), [], []
    for bound in (2048, 10**9, 72, 20):
        monkeypatch.setattr("beacon_memory.compression.selection._VIEW", bound)
        memories.append(chosen(model, ids, [2] * 10, compression=compression))
        views.append(seen.copy())
        seen.clear()
    usual, *unbounded, bounded = memories
    for memory, view in zip(unbounded, views[1:], strict=False):  # the memory in front of the last has 72 slots
        assert_same(memory, usual)
        assert view == views[0]
    assert [slots for slots, _ in views[0]] == [1 + 8 * number for number in range(10)]
    if compression == "select":  # of all windows something is seen; beacons are never left out
        assert [span for _, span in views[3]] == [span for _, span in views[0]]
    assert max(slots for slots, _ in views[3]) <= 1 + 20
    assert bounded.slots == usual.slots
    assert not torch.equal(bounded.values, usual.values)


@by_choice
@every_score
def test_questions_do_not_change_what_is_chosen(compression: str, score: str) -> None:
    """A memory is made before anybody asks: no argument takes a question, and none leaves a trace."""
    taken = set(signature(BeaconCompressor.__init__).parameters) | set(signature(Select.read_windows).parameters)
    taken |= set(signature(BeaconCompressor.compress).parameters) | set(signature(Work).parameters)
    taken |= set(signature(ReadWindow).parameters)
    assert taken == {
        *("self", "model", "rows_per_pass", "reserve", "score"),
        *("works", "progress", "compression"),
        *("ids", "ratios", "read", "windows", "parts"),
        *("prefix", "ids", "kv", "watch"),
    }
    compressor = BeaconCompressor(model_of(), score=score)
    before, after = [], []
    for memories in (before, after):
        work = Work(IDS, RATIOS)
        memories.append(compressor.compress_one(work, compression=compression).kv)
        request = Request(memories[0], some_ids(5, seed=len(after)))
        generate(compressor.model, [request], generation_config(compressor.model, None, {"max_new_tokens": 3}))
    assert same(before[0], after[0])


def test_expected_scores_are_measured_once_on_a_text_of_our_own() -> None:
    model, passes = model_of(), []
    compressor = BeaconCompressor(model, score="expected")
    assert compressor.sink.slots == 1
    hook = model.base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        list(compressor.compress(((n, Work(some_ids(8, seed=n), [2])) for n in range(3)), compression="select"))
    finally:
        hook.remove()
    assert len(passes) == 2 + 1  # our text read and repeated, then a pass for all windows


def test_scores_differ() -> None:
    kept = [chosen(model_of(), compression="select", score=score) for score in ("repeat", "expected")]
    assert not torch.equal(kept[0].positions, kept[1].positions)


def test_what_a_free_score_is_depends_on_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = model_of(), some_probe(model_of())
    assert BeaconCompressor(model).score == "repeat"
    monkeypatch.setattr(model, "probe", probe)
    free, fixed = BeaconCompressor(model), BeaconCompressor(model, score="repeat")
    assert (free.score, fixed.score) == ("expected", "repeat")
    assert free.parameters("select") == {"score": "expected", "probe": probe.digest}
    assert free.choosing_as({"score": "repeat"}).parameters("select") == {"score": "repeat"}
    for method in (None, {}, {"score": "guess"}, {"score": "expected"}):
        assert free.choosing_as(method) is free
        assert fixed.choosing_as(method) is fixed


@pytest.mark.parametrize("score", ["question", "", None])
def test_an_unknown_score_is_refused(score: Any) -> None:
    with pytest.raises(ConfigError, match=f"score={score!r} must be 'auto' or one of 'repeat', 'expected'"):
        BeaconCompressor(model_of(), score=score)


def test_without_a_word_it_is_the_model_s_own() -> None:
    model = model_of()
    assert model.compression == "select"
    own = BeaconCompressor(model).compress_one(Work(IDS, RATIOS))
    assert same(own.kv, chosen(model, compression="select"))
