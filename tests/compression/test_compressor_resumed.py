"""A compression that goes on where an earlier one stopped is the compression of the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressor_samples import (
    DOCUMENTS,
    WINDOW,
    assert_same,
    by_choice,
    compress,
    every_compression,
    every_method,
    every_score,
    model_of,
)
from kv_samples import same
from tiny_models import MODELS, some_ids, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import CompressedDocument, Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel

WORK = Work(some_ids(29, seed=29), (2, 0, 4, 3))  # three windows, and 5 tokens


def read(model: BeaconModel, work: Work, windows: int, compression: str = "beacon", **options: Any) -> Work:
    """A document whose first windows were read, and the rest not yet."""
    if not windows:
        return work
    size = windows * model.config.beacon_window
    (document,) = compress(model, [Work(work.ids[:size], work.ratios[:windows])], compression, **options)
    return replace(work, read=document.kv, windows=windows)


def memory_of(work: Work) -> MemoryKV:
    """What was read of a document before."""
    assert work.read is not None
    return work.read


def resumed(model: BeaconModel, **how: Any) -> Iterator[tuple[CompressedDocument, CompressedDocument]]:
    """A document read in two goes, the first of some windows, and at once."""
    (whole,) = compress(model, [WORK], **how)
    for windows in (0, 1, 2, 3):
        work = read(model, WORK, windows, **how)
        (document,) = compress(model, [work], **how)
        if windows:
            before = memory_of(work)
            assert same(document.kv.between(0, before.span), before)
        assert (document.tokens, document.windows) == (whole.tokens, whole.windows)
        yield document, whole


@every_method
def test_beacons_are_those_of_the_whole_text(attn: str, embed: str, placement: str, sink: int) -> None:
    for document, whole in resumed(model_of("llama", attn, embed, placement, sink)):
        assert_same(document.kv, whole.kv)


@pytest.mark.parametrize("name", MODELS)
@every_compression
def test_every_model_goes_on(name: str, compression: str) -> None:
    family, overrides = MODELS[name]
    model = tiny_model(family, BeaconConfig(beacon_window=WINDOW), **overrides)
    for document, whole in resumed(model, compression=compression):
        assert_same(document.kv, whole.kv)


@every_score
@pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
@pytest.mark.parametrize("sink", [0, 1])
def test_chosen_tokens_are_those_of_the_whole_text_bit_for_bit(score: str, attn: str, sink: int) -> None:
    for document, whole in resumed(model_of(attn=attn, sink=sink), compression="select", score=score):
        assert same(document.kv, whole.kv)


@every_score
@pytest.mark.parametrize("embed", ["last-token", "learned"])
@pytest.mark.parametrize("placement", ["end", "salient", "salient-words"])
@pytest.mark.parametrize("sink", [0, 1])
def test_a_hybrid_memory_is_that_of_the_whole_text_bit_for_bit(
    score: str, embed: str, placement: str, sink: int
) -> None:
    model = model_of("llama", "hidden", embed, placement, sink)
    for document, whole in resumed(model, compression="hybrid", score=score):
        assert same(document.kv, whole.kv)


@every_compression
def test_a_text_that_ended_within_a_window_goes_on_from_its_last_full_one(compression: str) -> None:
    model = model_of()
    (stored,) = compress(model, [Work(WORK.ids[:19], (2, 0, 8))], compression)
    full = stored.kv.between(0, sum(window.span for window in stored.windows[:2]))
    (whole,), (document,) = (compress(model, [one], compression) for one in (WORK, replace(WORK, read=full, windows=2)))
    assert_same(document.kv, whole.kv)
    short = Work(WORK.ids[:5], (3,))
    (whole,), (document,) = (
        compress(model, [one], compression) for one in (short, replace(short, read=full.between(0, 0)))
    )
    assert_same(document.kv, whole.kv)


@every_compression
def test_windows_may_come_one_by_one(compression: str) -> None:
    model, ids, ratios = model_of(), some_ids(80, seed=80), [2, 4, 0, 3, 2, 8, 1, 2, 4, 4]
    work = Work([], [])
    for windows in range(1, 11):
        work = replace(work, ids=ids[: windows * WINDOW], ratios=ratios[:windows])
        (document,) = compress(model, [work], compression)
        work = replace(work, read=document.kv, windows=windows)
    (whole,) = compress(model, [Work(ids, ratios)], compression)
    assert_same(document.kv, whole.kv)
    assert document.windows == whole.windows


@every_compression
@pytest.mark.parametrize("rows", [1, 20, 4096])
def test_documents_that_go_on_share_passes_with_others(rows: int, compression: str) -> None:
    model = model_of()
    alone = compress(model, compression=compression)
    before = [0, 0, 1, 1, 0, 2]  # windows: of the third document all
    works = [read(model, work, windows, compression) for work, windows in zip(DOCUMENTS, before, strict=True)]
    together = compress(model, [*works, *works[::-1]], compression, rows_per_pass=rows)
    for document, expected in zip(together, [*alone, *alone[::-1]], strict=True):
        assert_same(document.kv, expected.kv)
        assert (document.tokens, document.windows) == (expected.tokens, expected.windows)


@by_choice
@every_score
@pytest.mark.parametrize("ratios", [[4] * 10, [4, 2, 0, 8, 16, 2, 2, 4, 0, 4]], ids=["even", "uneven"])
def test_a_memory_is_interpolated_as_if_it_had_been_read_now(compression: str, score: str, ratios: list[int]) -> None:
    config, how = BeaconConfig(beacon_window=16), {"compression": compression, "score": score}
    model = tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=80)
    work = Work(some_ids(153, seed=3), ratios)
    (whole,) = compress(model, [work], **how)
    assert whole.kv.span > 80
    for windows in (1, 4, 7, 9):
        (document,) = compress(model, [read(model, work, windows, **how)], **how)
        assert same(document.kv, whole.kv)


@pytest.mark.parametrize(("compression", "rows"), [("beacon", 8 + 2 + 5 + 2), ("select", 26), ("hybrid", 26 + 1 + 1)])
def test_windows_that_were_read_are_not_read_again(compression: str, rows: int) -> None:
    model, steps = model_of(), []
    passes: list[int] = []
    compressor = BeaconCompressor(model)
    assert compressor.sink.slots == 1
    work = read(model, WORK, 2, compression)
    hook = model.base.model.register_forward_pre_hook(
        lambda _module, _args, how: passes.append(how["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        compressor.compress_one(work, steps.append, compression=compression)
    finally:
        hook.remove()
    assert sum(passes) == rows  # of the last 13 tokens, which `select` and `hybrid` read twice
    assert sum(steps) == 13


@every_compression
@every_score
def test_a_document_that_was_all_read_takes_no_pass(compression: str, score: str) -> None:
    model, events = model_of(), []
    compressor = BeaconCompressor(model, score=score)
    assert compressor.sink.slots == 1
    work = read(model, Work(WORK.ids[:24], WORK.ratios[:3]), 3, compression)

    def documents() -> Iterator[Work]:
        yield work
        events.append("next")

    hook = model.base.model.register_forward_pre_hook(lambda *_: events.append("pass"))
    try:
        for _, document in compressor.compress(enumerate(documents()), events.append, compression=compression):
            assert same(document.kv, memory_of(work))
            assert (document.tokens, len(document.windows)) == (24, 3)
            events.append("done")
    finally:
        hook.remove()
    assert events == ["done", "next"]


@pytest.mark.parametrize("rows", [1, 4096])
def test_a_document_that_was_all_read_keeps_its_place(rows: int) -> None:
    model = model_of()
    done = read(model, Work(WORK.ids[:8], [2]), 1)
    documents = compress(model, [done, WORK, done, done, WORK, done], rows_per_pass=rows)
    assert [document.tokens for document in documents] == [8, 29, 8, 8, 29, 8]


@every_compression
def test_a_memory_of_another_dtype_goes_on_in_that_of_the_model(compression: str) -> None:
    model = model_of()
    work = read(model, WORK, 2, compression)
    (document,) = compress(model, [replace(work, read=memory_of(work).to(dtype=torch.bfloat16))], compression)
    assert document.kv.keys.dtype == document.kv.values.dtype == torch.float32


# spans of the first two windows, of the first three, and of the second at ratio 8 together with the first
@pytest.mark.parametrize(
    ("compression", "span", "longer", "other"), [("beacon", 12, 14, 5), ("select", 16, 24, 16), ("hybrid", 17, 26, 18)]
)
def test_a_memory_that_is_not_that_of_the_windows_is_refused(
    compression: str, span: int, longer: int, other: int
) -> None:
    model = model_of()
    work = read(model, WORK, 2, compression)
    kv, spans, entries = memory_of(work), f"read spans {span} positions, but", "read has .* entries of window"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"windows": 4}, "windows=4 cannot have been read before: the document has 3 full ones"),
        ({"windows": -1}, "windows=-1 cannot have been read before"),
        ({"windows": 3}, f"{spans} the first 3 windows take {longer}"),
        ({"windows": 0}, f"{spans} the first 0 windows take 0"),
        ({"read": None}, f"read spans 0 positions, but the first 2 windows take {span}"),
        ({"read": kv.interpolated(span - 1)}, f"read spans {span - 1} positions"),
        ({"read": replace(kv, span=span + 1)}, f"read spans {span + 1} positions"),
        (
            {"read": replace(kv, positions=kv.positions.clamp(max=3))},
            f"{entries} 0, which at ratio 2 leaves 24 in 6 heads",
        ),
        (
            {"ratios": (2, 8, 4, 3)},
            f"{entries} 1, which at ratio 8" if span == other else f"{spans} the first 2 windows take {other}",
        ),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            compress(model, [replace(work, **change)], compression)


def test_beacons_go_on_from_equally_many_slots_in_every_head_only() -> None:
    model = model_of()
    work = read(model, WORK, 1)
    counts = memory_of(work).counts.clone()
    counts[0] += torch.tensor([1, -1])
    with pytest.raises(InputError, match="of 4 positions with 3 to 5 entries in a head is no stack"):
        compress(model, [replace(work, read=replace(memory_of(work), counts=counts))])
