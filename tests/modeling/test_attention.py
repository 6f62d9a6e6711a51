"""A prefix is attended to as the text itself would be, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from stock_behind import eager, some_kept, stock_reading
from tiny_models import MODELS, some_ids, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Block, Section
from beacon_memory.modeling import prefix_attention
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, after
from beacon_memory.modeling.model import BeaconModel

TEXT, QUESTION = some_ids(20, seed=1), some_ids(6, seed=2)

every_model = pytest.mark.parametrize("name", MODELS)


def both(name: str) -> tuple[PreTrainedModel, BeaconModel]:
    """A stock model and one with the same weights that carries beacons."""
    family, overrides = MODELS[name]
    config = BeaconConfig(beacon_window=64, beacon_sink_size=0)
    return eager(name), tiny_model(family, config, tokenizer=tiny_tokenizer(), **overrides)


def uneven(stock: PreTrainedModel, ids: Sequence[int] = TEXT, *, seed: int = 0) -> MemoryKV:
    """Of a text what chance leaves each head."""
    kv = stock_reading(stock, ids).kv
    return MemoryKV.chosen(kv, some_kept((kv.keys.shape[0], kv.keys.shape[1]), len(ids), seed=seed))


def answer(model: BeaconModel, memory: MemoryKV, ids: Sequence[int] = QUESTION) -> Tensor:
    """Logits of tokens that the base reads behind a memory."""
    cache = MemoryCache([model.prefix(memory)])
    with torch.no_grad():
        logits: Tensor = model.base(torch.tensor([list(ids)]), past_key_values=cache).logits
    return logits[0]


@torch.no_grad()
def run(model: BeaconModel, memories: Sequence[MemoryKV | None], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same in one pass of our own, each row behind its memory."""
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, ids)]) for ids in rows], model.config)
    prefixes = [None if memory is None else model.prefix(memory) for memory in memories]
    hidden = model.run(layout, model.empty_kv(), [], prefixes=prefixes).hidden
    return list(model.head(hidden).split([len(ids) for ids in rows]))


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@every_model
def test_uneven_heads_answer_as_the_full_text_masked_head_by_head(name: str) -> None:
    stock, model = both(name)
    kv = stock_reading(stock, TEXT).kv
    kept = some_kept((kv.keys.shape[0], kv.keys.shape[1]), len(TEXT))
    unseen = torch.zeros(*kept.shape[:2], len(TEXT) + 6, len(TEXT) + 6, dtype=torch.bool)
    unseen[:, :, len(TEXT) :, : len(TEXT)] = ~kept[:, :, None]
    expected = stock_reading(stock, TEXT + QUESTION, unseen=unseen).logits[len(TEXT) :]
    memory = MemoryKV.chosen(kv, kept)
    close(answer(model, memory), expected)
    close(run(model, [memory], [QUESTION])[0], expected)
    assert not torch.allclose(expected, stock_reading(stock, TEXT + QUESTION).logits[len(TEXT) :], atol=1e-2)


@every_model
def test_a_memory_of_all_tokens_answers_as_the_full_text(name: str) -> None:
    stock, model = both(name)
    memory, expected = MemoryKV.of(stock_reading(stock, TEXT).kv), stock_reading(stock, TEXT + QUESTION).logits[-6:]
    close(answer(model, memory), expected)
    close(run(model, [memory], [QUESTION])[0], expected)


@every_model
def test_a_memory_behind_another_is_the_text_at_later_positions(name: str) -> None:
    stock, model = both(name)
    texts = [TEXT, some_ids(9, seed=3)]
    readings = [stock_reading(stock, ids).kv for ids in texts]
    kept = [some_kept((3, 2), len(ids), seed=seed, share=0.6) for seed, ids in enumerate(texts)]
    unseen = torch.zeros(3, 2, 35, 35, dtype=torch.bool)
    unseen[:, :, 20:29, :20] = True  # the second text does not see the first
    unseen[:, :, 29:, :29] = ~torch.cat(kept, dim=-1)[:, :, None]
    expected = stock_reading(stock, [*TEXT, *texts[1], *QUESTION], unseen=unseen).logits[29:]
    memory = MemoryKV.concat([MemoryKV.chosen(kv, one) for kv, one in zip(readings, kept, strict=True)])
    close(answer(model, memory), expected)
    close(run(model, [memory], [QUESTION])[0], expected)


@every_model
def test_memories_that_are_ready_stand_behind_one_another_as_if_joined(name: str) -> None:
    stock, model = both(name)
    parts = [uneven(stock), uneven(stock, some_ids(9, seed=3), seed=1).interpolated(7), uneven(stock, seed=2)]
    joined = model.prefix(MemoryKV.concat(parts))
    apart = model.prefix(parts[0], *(Section.of(part, model.rope) for part in parts[1:]))
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, QUESTION)])], model.config)
    hidden: list[Tensor] = []
    heard: list[list[Tensor]] = []

    def watch(_layer: int, _sequence: int, _query: Tensor, _key: Tensor, _memory: int, prefix: Sequence[Block]) -> None:
        heard[-1].extend(torch.cat(head, dim=-1) for _, *parts in prefix for head in zip(*parts, strict=True))

    for prefix in (joined, apart):
        heard.append([])
        with torch.no_grad():
            hidden.append(model.run(layout, model.empty_kv(), [], prefixes=[prefix], watch=watch).hidden)
            hidden.append(model.base.model(torch.tensor([QUESTION]), past_key_values=MemoryCache([prefix]))[0][0])
    for one in hidden[1:]:
        close(one, hidden[0])
    for one, other in zip(*heard, strict=True):
        close(one, other)


@every_model
@pytest.mark.parametrize("span", [19, 13, 8])
def test_a_interpolated_memory_has_fractional_positions(name: str, span: int) -> None:
    stock, model = both(name)
    memory = uneven(stock)
    expected = stock_reading(
        stock, QUESTION, replace(memory, positions=memory.positions * (span / 20), span=span)
    ).logits
    close(answer(model, memory.interpolated(span)), expected)
    close(run(model, [memory.interpolated(span)], [QUESTION])[0], expected)
    assert not torch.allclose(expected, stock_reading(stock, QUESTION, memory).logits, atol=1e-2)


@every_model
def test_every_generated_token_sees_its_own_memory_and_no_padding(name: str) -> None:
    stock, model = both(name)
    memories = [
        uneven(stock),
        MemoryKV.of(model.empty_kv()),
        uneven(stock, some_ids(33, seed=4), seed=1).interpolated(30),
    ]
    prompts = [some_ids(4, seed=5), some_ids(7, seed=6), some_ids(1, seed=7)]
    longest = max(map(len, prompts))
    base: Any = model.base
    output = base.generate(
        torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        past_key_values=MemoryCache([model.prefix(memory) for memory in memories], config=base.config),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, (memory, prompt) in enumerate(zip(memories, prompts, strict=True)):
        made = output.sequences[row, longest:].tolist()
        expected = stock_reading(stock, [*prompt, *made], memory).logits[len(prompt) - 1 : -1]
        close(torch.stack([step[row] for step in output.logits]), expected)


@pytest.mark.parametrize("padding", [0, 3])
def test_copies_of_a_row_keep_its_memory_and_may_be_reordered(padding: int) -> None:
    stock, model = both("llama")
    memories = [uneven(stock), uneven(stock, some_ids(15, seed=4), seed=1)]
    cache = MemoryCache([model.prefix(memory) for memory in memories])
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([[0] * padding + QUESTION] * 4)
    mask = torch.tensor([[0] * padding + [1] * 6] * 4)
    positions = torch.tensor([[0] * padding + list(range(6))] * 4)
    step = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        logits = model.base(rows, past_key_values=cache, **step).logits[:, padding:]
        close(logits, torch.stack([answer(model, memories[row]) for row in (0, 0, 1, 1)]))
        cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
        step = {"attention_mask": torch.cat((mask, mask[:, -1:]), dim=1), "position_ids": positions[:, -1:] + 1}
        logits = model.base(torch.tensor([[9]] * 4), past_key_values=cache, **step).logits[:, 0]
    close(logits, torch.stack([answer(model, memories[row], [*QUESTION, 9])[-1] for row in (1, 0, 1, 0)]))


@every_model
def test_sequences_of_one_pass_have_memories_of_their_own_or_none(name: str) -> None:
    stock, model = both(name)
    memories = [uneven(stock), None, uneven(stock, some_ids(15, seed=4), seed=1), MemoryKV.of(model.empty_kv())]
    rows = [some_ids(3 + number, seed=number) for number in range(4)]
    for memory, ids, logits in zip(memories, rows, run(model, memories, rows), strict=True):
        close(logits, stock_reading(stock, ids, memory).logits)


@every_model
def test_slots_of_the_pass_come_after_the_prefix_and_before_the_rows(name: str) -> None:
    stock, model = both(name)
    memory, between = uneven(stock), some_ids(9, seed=3)
    expected = stock_reading(stock, between + QUESTION, memory).logits
    start = Cursor()
    (raw,) = model.cut(start, between, iter([0]), tail="close")
    layout = BeaconLayout.build([Piece(start, [raw, Window.behind(9, QUESTION)])], model.config)
    with torch.no_grad():
        close(model.head(model.run(layout, model.empty_kv(), [], prefixes=[model.prefix(memory)]).hidden), expected)


@every_model
def test_a_window_read_token_by_token_stays_behind_its_memory(name: str) -> None:
    stock, model = both(name)
    memory, logits = uneven(stock), []
    prefix, cursor, past = model.prefix(memory), Cursor(), model.empty_kv()
    for token in QUESTION:
        (window,) = model.cut(cursor, [token], iter([0]))
        layout = BeaconLayout.build([Piece(cursor, [window])], model.config)
        with torch.no_grad():
            output = model.run(layout, past, layout.unfinished[0], prefixes=[prefix])
        logits.append(model.head(output.hidden)[0])
        cursor, past = after(cursor, window), output.kept
    close(torch.stack(logits), stock_reading(stock, QUESTION, memory).logits)


@pytest.mark.parametrize("ids", [QUESTION, some_ids(40, seed=5)], ids=len)
def test_bf16_is_close_to_float32(ids: list[int]) -> None:
    stock, model = both("llama")
    memory = uneven(stock)
    exact = answer(model, memory, ids)
    model.to(torch.bfloat16)
    for rounded in (answer(model, memory, ids), run(model, [memory], [ids])[0]):
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.float() - exact).norm() / exact.norm()) < 0.1


def test_masks_of_uneven_heads_begin_where_their_tensor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory-efficient kernels of CUDA refuse a mask that begins at an address that is not aligned, or fail."""
    stock, model = both("llama")
    attend, offsets = prefix_attention.scaled_dot_product_attention, []

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        offsets.append(mask.storage_offset())
        return attend(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(prefix_attention, "scaled_dot_product_attention", noting)
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, QUESTION)])], model.config)
    model.base.requires_grad_(True)  # then keys and values are joined
    model.run(layout, model.empty_kv(), [], prefixes=[model.prefix(uneven(stock))])
    assert set(offsets) == {0}
