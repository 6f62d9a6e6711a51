"""Attention to prefixes and own tokens apart, merged, is one softmax over both; on every path there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from devices import IndexedAnywhere
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix, Section
from beacon_memory.kv.prefix import _blocks as blocks_of
from beacon_memory.kv.rope import Rope
from beacon_memory.modeling import prefix_attention
from beacon_memory.modeling.prefix_attention import PrefixBatch, attend_behind

KV_HEADS, GROUPS, DIM = 3, 2, 8
ROPE = Rope(torch.tensor([1.0, 0.1, 0.01, 0.001]), scaling=1.2)
ROWS = pytest.mark.parametrize("rows", [1, 2, 7])


def ragged(counts: Sequence[int], span: int, seed: int) -> MemoryKV:
    """One layer of random K/V: each head has so many entries at random positions."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(1, len(counts), span, dtype=torch.bool)
    for head, count in enumerate(counts):
        kept[0, head, torch.randperm(span, generator=generator)[:count]] = True
    keys, values = (torch.randn(1, len(counts), span, DIM, generator=generator) for _ in "kv")
    return MemoryKV.chosen(BeaconKV(keys, values), kept)


def section(counts: Sequence[int], span: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> Section:
    return Section.of(ragged(counts, span, seed).to(dtype=dtype), ROPE)


def a_batch(dtype: torch.dtype = torch.float32) -> list[Prefix | None]:
    """Prefixes of one to three sections, shared by neighbours and by others, none, and heads without entries."""
    parts = [
        section(counts, span=29, seed=seed, dtype=dtype)
        for seed, counts in enumerate([(1, 1, 1), (15, 15, 15), (19, 0, 13), (2, 17, 17)])
    ]
    one, two, three = (Prefix(chosen, ROPE) for chosen in (parts[1:2], parts[:3], [parts[0], parts[3]]))
    return [two, one, None, one, three, three, two]


def inputs(batch: int, rows: int, own: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as stock attention modules hand them over: views of [batch, tokens, heads, dim]."""
    generator = torch.Generator().manual_seed(batch + rows)
    shapes = [(batch, rows, KV_HEADS * GROUPS, DIM), (batch, own, KV_HEADS, DIM), (batch, own, KV_HEADS, DIM)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def one_softmax(prefixes: Sequence[Prefix | None], query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """The definition, in float64: query head by query head, over the keys of its memory and its own tokens."""
    output = torch.zeros(*query.shape, dtype=torch.float64)
    for row, prefix in enumerate(prefixes):
        for head in range(query.shape[1]):
            keys, values = [key[row, head // GROUPS].double()], [value[row, head // GROUPS].double()]
            for heads, its_keys, its_values in prefix.blocks(0) if prefix else ():
                if heads.start <= head // GROUPS < heads.stop:
                    keys.append(its_keys[head // GROUPS - heads.start].double())
                    values.append(its_values[head // GROUPS - heads.start].double())
            scores = query[row, head].double() @ torch.cat(keys).T / math.sqrt(DIM)
            own = scores[:, : key.shape[2]].masked_fill(~seen[row], -math.inf)
            weights = torch.cat((own, scores[:, key.shape[2] :]), dim=1).softmax(-1).nan_to_num()
            output[row, head] = weights @ torch.cat(values)
    return output


def causal(batch: int, rows: int, own: int) -> Tensor:
    return torch.ones(batch, rows, own, dtype=torch.bool).tril(own - rows)


def padded(batch: int, rows: int, own: int) -> Tensor:
    """Causal, behind padding on the left, which is 0, 1, 2, ... tokens long; rows of padding see nothing."""
    return causal(batch, rows, own) & (torch.arange(own) >= torch.arange(batch)[:, None, None])


def slow_varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most: int, longest: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """What `varlen_attn` does on CUDA: each sequence by itself, +inf for the log-sum-exp of no keys."""
    output, sums = torch.zeros_like(query), torch.full((1, len(query)), math.inf)
    for (start, stop), (first, last) in zip(
        *([*zip(ends.tolist(), ends.tolist()[1:], strict=False)] for ends in (queries, keys)), strict=True
    ):
        assert stop - start <= most
        assert last - first <= longest
        if last > first:
            scores = query[start:stop, 0].float() @ key[first:last, 0].float().T * options["scale"]
            output[start:stop, 0] = (scores.softmax(-1) @ value[first:last, 0].float()).to(output.dtype)
            sums[0, start:stop] = scores.logsumexp(-1)
    assert (stop, last) == (len(query), len(key))
    return output, sums


@pytest.fixture(params=["flash on CPU", "products", "products by parts", "varlen", "padded"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to attend; those of other devices here, on the CPU."""
    if request.param.startswith("products"):
        monkeypatch.setattr(prefix_attention, "_by_flash_on_cpu", prefix_attention._by_products)
    if request.param == "products by parts":
        monkeypatch.setattr(prefix_attention, "_MOST_SCORES", 100)
    if request.param == "varlen":
        monkeypatch.setattr(prefix_attention, "_layout", lambda *_: prefix_attention._Packed)
        monkeypatch.setattr(prefix_attention, "varlen_attn", slow_varlen)
    if request.param == "padded":
        monkeypatch.setattr(prefix_attention, "_layout", lambda *_: prefix_attention._Padded)
    return str(request.param)


@ROWS
@pytest.mark.parametrize("mask", [causal, padded])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_it_is_one_softmax_over_memory_and_own_tokens(path: str, rows: int, mask: Any, kind: str) -> None:
    prefixes = a_batch()
    query, key, value = inputs(len(prefixes), rows, rows + 3)
    seen = mask(len(prefixes), rows, rows + 3)
    given = seen[:, None] if kind == "bool" else torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None]
    output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, given, None, 0.0)
    expected = one_softmax(prefixes, query, key, value, seen)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


@ROWS
@pytest.mark.parametrize("own", [0, 4])
def test_without_a_mask_it_is_causal(path: str, rows: int, own: int) -> None:
    prefixes = a_batch()
    query, key, value = inputs(len(prefixes), rows, rows + own)
    output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, None, None, 0.0)
    expected = one_softmax(prefixes, query, key, value, causal(len(prefixes), rows, rows + own))
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


@ROWS
@pytest.mark.parametrize("chosen", [[1], [0], [5], [1, 1, 1], [0, 0], [3, 2], [0, 4]], ids=str)
def test_batches_of_every_kind(path: str, rows: int, chosen: list[int]) -> None:
    prefixes = [a_batch()[number] for number in chosen]
    prefixes = [prefixes[chosen.index(number)] for number in chosen]  # the same number is the same prefix
    query, key, value = inputs(len(prefixes), rows, rows)
    output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, None, None, 0.0)
    expected = one_softmax(prefixes, query, key, value, causal(len(prefixes), rows, rows))
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


@ROWS
def test_bf16_is_as_close_as_its_rounding(path: str, rows: int) -> None:
    prefixes = a_batch(torch.bfloat16)
    query, key, value = inputs(len(prefixes), rows, rows + 3, torch.bfloat16)
    output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, None, None, 0.0)
    assert output.dtype == torch.bfloat16
    expected = one_softmax(prefixes, query, key, value, causal(len(prefixes), rows, rows + 3))
    assert float((output.double() - expected).norm() / expected.norm()) < 0.01


def test_scores_far_apart_do_not_overflow(path: str) -> None:
    prefixes = a_batch()
    query, key, value = inputs(len(prefixes), 1, 4)
    for factor in (-300.0, 300.0):
        output = attend_behind(PrefixBatch(prefixes), 0, query * factor, key, value, None, None, 0.0)
        expected = one_softmax(prefixes, query * factor, key, value, causal(len(prefixes), 1, 4))
        torch.testing.assert_close(output.double(), expected, atol=1e-3, rtol=0)


@ROWS
def test_gradients_are_those_of_one_softmax(rows: int) -> None:
    memories = [ragged(counts, 12, seed) for seed, counts in enumerate([(5, 5, 5), (9, 0, 3)])]
    for memory in memories:
        memory.keys.requires_grad_()
        memory.values.requires_grad_()
    sections = [Section.of(memory, ROPE) for memory in memories]
    prefixes = [Prefix(sections, ROPE), None, Prefix(sections[:1], ROPE)]
    given = [part.detach().requires_grad_() for part in inputs(3, rows, rows + 2)]
    seen = padded(3, rows, rows + 2)
    leaves = [*given, *(part for memory in memories for part in (memory.keys, memory.values))]
    output = attend_behind(PrefixBatch(prefixes), 0, *given, seen[:, None], None, 0.0)  # type: ignore[arg-type]
    expected = one_softmax(prefixes, *given, seen)  # type: ignore[arg-type]
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        merged = attend_behind(PrefixBatch(prefixes), 0, *given, seen[:, None], None, 0.0)  # type: ignore[arg-type]
    torch.testing.assert_close(merged, output.detach(), atol=2e-6, rtol=1e-5)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad((one * weight).sum(), leaves, retain_graph=True) for one in (output, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert float(other.abs().max()) > 0.01
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_memory_that_is_trained_has_a_gradient_behind_a_frozen_model() -> None:
    memory = ragged((5, 2, 0), 12, 0)
    memory.values.requires_grad_()
    batch = PrefixBatch([Prefix([Section.of(memory, ROPE)], ROPE)])
    assert attend_behind(batch, 0, *inputs(1, 1, 2), None, None, 0.0).requires_grad  # type: ignore[arg-type]


def test_dropout_is_that_of_joined_attention() -> None:
    prefixes = a_batch()
    query, key, value = inputs(len(prefixes), 3, 3)
    torch.manual_seed(0)
    output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, None, None, 0.999)
    assert float((output == 0).float().mean()) > 0.5


def test_rows_in_the_same_order_keep_what_was_laid_out() -> None:
    batch = PrefixBatch(a_batch())
    assert batch.of_rows(range(7)) is batch
    assert batch.of_rows([6, 3, 2, 1, 5, 4, 0]) is batch  # other rows, but the same memories
    moved = batch.of_rows([4, 0])
    assert [*moved.prefixes] == [batch.prefixes[4], batch.prefixes[0]]


@pytest.mark.parametrize("path", ["flash on CPU", "products", "varlen"], indirect=True)
def test_a_memory_is_not_copied(path: str) -> None:
    """Neither for a step nor for the batch, also where several rows share it."""
    prefix = Prefix([section((5, 2, 7))], ROPE)
    held, seen = prefix.sections[0], []
    name = "varlen_attn" if path == "varlen" else "_by_flash_on_cpu"
    attend = getattr(prefix_attention, name)

    def noting(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((key, value))
        found: tuple[Tensor, Tensor] = attend(query, key, value, *args, **options)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_attention, name, noting)
        attend_behind(PrefixBatch([prefix] * 4), 0, *inputs(4, 1, 2), None, None, 0.0)  # type: ignore[arg-type]
    of_memory = [
        pair for pair in seen if pair[0].untyped_storage().data_ptr() == held.keys.untyped_storage().data_ptr()
    ]
    assert sum(key.numel() for key, _ in of_memory) == held.keys.numel()
    assert all(v.untyped_storage().data_ptr() == held.values.untyped_storage().data_ptr() for _, v in of_memory)


@ROWS
@pytest.mark.parametrize("layout", [prefix_attention._Packed, prefix_attention._Padded])
def test_no_devices_are_mixed_on_cuda(monkeypatch: pytest.MonkeyPatch, rows: int, layout: type) -> None:
    """Tensors without data refuse to be mixed with those of another device, on any machine."""
    monkeypatch.setattr(prefix_attention, "_layout", lambda *_: layout)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode(), IndexedAnywhere():
        rope, sections = Rope(empty(DIM // 2, dtype=torch.float32)), []
        for counts in [(1, 1, 1), (15, 15, 15), (19, 0, 13)]:
            keys, values = (empty(sum(counts), DIM) for _ in "kv")
            sections.append(Section(keys, values, (counts,), 12, (blocks_of(counts, keys, values),)))
        one, two = Prefix(sections[2:], rope), Prefix(sections, rope)
        batches: list[list[Prefix | None]] = [[one], [two], [one, None, two, one]]
        for prefixes in batches:
            batch = len(prefixes)
            query = empty(batch, KV_HEADS * GROUPS, rows, DIM)
            key, value = (empty(batch, KV_HEADS, rows + 2, DIM) for _ in "kv")
            for mask in (None, empty(batch, 1, rows, rows + 2, dtype=torch.bool)):
                output = attend_behind(PrefixBatch(prefixes), 0, query, key, value, mask, None, 0.0)
                assert (output.device.type, output.shape, output.dtype) == ("cuda", query.shape, torch.bfloat16)
