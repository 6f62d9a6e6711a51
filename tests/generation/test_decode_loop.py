"""Requests that are decoded together: each gets what it gets alone by `generate`, whatever the others do."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
import time
from typing import Any

import pytest
import torch
from behind_memory import compressed, greedy, make_model, no_memory, printable_part
from tiny_models import MODELS, VOCAB, some_ids

from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.errors import CapacityError, InputError
from beacon_memory.generation import decode_loop
from beacon_memory.generation.decode_loop import DecodeLoop, Ticket
from beacon_memory.generation.generate import Generation, Request, generate
from beacon_memory.modeling.model import BeaconModel

# Options that each look at other things: at the prompt, at the answer so far, at its length, or draw at random.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.7, "min_new_tokens": 3},
    {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.3},
    {"suppress_tokens": [35], "begin_suppress_tokens": [145]},
    {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 35},
    {"guidance_scale": 1.5},
    {"watermarking_config": {"bias": 3.0}, "typical_p": 0.9},
    {"forced_eos_token_id": 2, "min_p": 0.01},
]


def mixed_requests(model: BeaconModel, count: int = len(OPTIONS)) -> list[Request]:
    """Requests behind memories of each kind, of one memory in common, and of none."""
    shared = model.prefix(compressed(model, some_ids(45, seed=7), 3))
    memories = [compressed(model, some_ids(50, seed=n), 2 + n, kind) for n, kind in enumerate(BUILT_IN)]
    behind = [*memories, shared, no_memory(model), shared]
    return [Request(behind[n % len(behind)], some_ids(2 + 3 * n, seed=20 + n)) for n in range(count)]


def steps(loop: DecodeLoop, ticket: Ticket, count: int) -> None:
    loop.wait(lambda: ticket.done or len(ticket.tokens) >= count)


@pytest.mark.parametrize("name", MODELS)
def test_each_request_gets_what_it_gets_alone_with_options_of_its_own(name: str) -> None:
    model = make_model(name)
    requests = mixed_requests(model)
    configs = [greedy(model, **{"max_new_tokens": 5 + n, **options}) for n, options in enumerate(OPTIONS)]
    loop = DecodeLoop(model)
    tickets = [
        loop.submit(request, config, seed=n) for n, (request, config) in enumerate(zip(requests, configs, strict=True))
    ]
    alone = [
        generate(model, [request], config, seed=n)[0][0]
        for n, (request, config) in enumerate(zip(requests, configs, strict=True))
    ]
    assert [ticket.result().tokens for ticket in tickets] == [one.tokens for one in alone]
    assert [ticket.result().text for ticket in tickets] == [one.text for one in alone]


def test_requests_join_and_leave_while_others_are_decoded() -> None:
    model = make_model()
    requests = mixed_requests(model)
    configs = [greedy(model, max_new_tokens=4 + 3 * (n % 4)) for n in range(len(requests))]
    loop = DecodeLoop(model, max_rows=3)
    tickets = []
    for request, config in zip(requests, configs, strict=True):
        tickets.append(loop.submit(request, config))
        steps(loop, tickets[0], len(tickets))
    for ticket, request, config in zip(tickets, requests, configs, strict=True):
        assert ticket.result().tokens == generate(model, [request], config)[0][0].tokens


def test_a_sample_is_the_same_whoever_else_is_decoded() -> None:
    model = make_model()
    one, *others = mixed_requests(model)
    config = greedy(model, temperature=1.5)
    alone = DecodeLoop(model).submit(one, config, seed=3).result()
    loop = DecodeLoop(model)
    state = torch.get_rng_state()
    before = [loop.submit(other, config, seed=n) for n, other in enumerate(others)]
    again = loop.submit(one, config, seed=3).result()
    other = loop.submit(one, config, seed=4).result()
    assert alone.tokens == again.tokens != other.tokens
    assert all(ticket.result().tokens for ticket in before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_prompt_is_read_over_several_steps_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(decode_loop, "_MOST_READ", 7)
    requests = [Request(compressed(model, some_ids(40, seed=n), 4), some_ids(5 + 20 * n)) for n in range(3)]
    loop, config = DecodeLoop(model), greedy(model)
    tickets = [loop.submit(request, config) for request in requests]
    steps(loop, tickets[0], 4)
    assert [len(ticket.tokens) for ticket in tickets] == [4, 0, 0]
    for ticket, request in zip(tickets, requests, strict=True):
        assert ticket.result().tokens == generate(model, [request], config)[0][0].tokens


def test_no_more_are_decoded_at_a_time_than_there_is_room_for() -> None:
    model = make_model()
    requests = mixed_requests(model, 6)
    config = greedy(model)
    slot = 2 * model.empty_kv().keys.new_empty(model.kv_shape).nbytes
    needed = [(len(request.prompt) + 12) * slot for request in requests]
    most = []
    for bounds in ({"max_rows": 2}, {"max_bytes": sum(needed[:3])}, {"max_bytes": 1}):
        loop = DecodeLoop(model, **bounds)
        tickets = [loop.submit(request, config) for request in requests]
        steps(loop, tickets[0], 1)
        most.append(sum(bool(ticket.tokens) for ticket in tickets))
        assert all(len(ticket.result().tokens) == 12 for ticket in tickets)
    assert most == [2, 3, 1]
    for bounds in ({"max_rows": 0}, {"max_bytes": 0}):
        with pytest.raises(InputError, match="must be at least 1"):
            DecodeLoop(model, **bounds)


def test_memories_are_not_copied() -> None:
    model = make_model()
    request = mixed_requests(model)[0]
    prefix = model.prefix(request.memory)  # type: ignore[arg-type]  # one that is no prefix yet
    seen = []
    loop = DecodeLoop(model)
    tickets = [loop.submit(Request(prefix, some_ids(3 + n)), greedy(model)) for n in range(2)]
    model.base.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
    )
    steps(loop, tickets[1], 2)
    keys = {block[1].data_ptr() for block in prefix.sections[0].blocks[0]}
    batches = [batch for cache in seen for batch, _, _ in cache._groups]
    assert all(
        section is prefix.sections[0] for batch in batches for part in batch._parts for section in [part.section]
    )
    assert {block[1].data_ptr() for batch in batches for block in batch._parts[0].section.blocks[0]} == keys


def test_pieces_make_up_the_text_and_never_show_a_stop_string() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    *pieces, last = DecodeLoop(model).submit(request, greedy(model, max_new_tokens=40))
    assert isinstance(last, Generation)
    assert "".join(map(str, pieces)).strip() == last.text
    stop = printable_part(model, last.tokens)
    config = greedy(model, stop=stop, max_new_tokens=40)
    *pieces, ended = DecodeLoop(model).submit(request, config)
    assert isinstance(ended, Generation)
    assert "".join(map(str, pieces)).strip() == ended.text == last.text[: last.text.index(stop)].strip()
    assert ended.tokens == generate(model, [request], config)[0][0].tokens


def test_a_text_is_given_out_while_it_is_generated() -> None:
    model = make_model()
    request = mixed_requests(model)[0]
    others = [[token] for token in range(VOCAB) if model.tokenizer.decode([token]) != " "]
    ticket = DecodeLoop(model).submit(request, greedy(model, bad_words_ids=others))
    pieces = iter(ticket)
    assert next(pieces) == " "
    assert len(ticket.tokens) == 1
    pieces.close()
    assert ticket.done


def test_a_cancelled_request_leaves_with_what_it_has() -> None:
    model = make_model()
    requests, config = mixed_requests(model), greedy(model)
    loop = DecodeLoop(model, max_rows=1)
    tickets = [loop.submit(request, config) for request in requests[:3]]
    steps(loop, tickets[0], 4)
    for ticket in tickets[:2]:
        ticket.cancel()
    expected = generate(model, [requests[0]], config)[0][0].tokens
    assert tickets[0].result().tokens == expected[:4]
    assert tickets[1].result() == Generation((), "", 0.0, ended=False)
    assert tickets[2].result().tokens == generate(model, [requests[2]], config)[0][0].tokens
    tickets[2].cancel()
    assert len(tickets[2].result().tokens) == 12
    assert not loop._rows
    assert not loop._waiting
    assert not loop._batch


def test_an_error_of_one_request_leaves_the_others_alone() -> None:
    model = make_model()
    requests, config = mixed_requests(model, 4), greedy(model)
    loop = DecodeLoop(model)
    first = loop.submit(requests[0], config)
    steps(loop, first, 3)
    unread = loop.submit(Request(requests[1].memory, [VOCAB + 5]), config)  # no such token: the forward pass fails
    unpicked = loop.submit(requests[2], greedy(model, suppress_tokens=[*range(VOCAB)], do_sample=True))
    last = loop.submit(requests[3], config)
    with pytest.raises(IndexError):
        unread.result()
    with pytest.raises(InputError, match="no token to sample from"):
        list(unpicked)
    for ticket, request in ((first, requests[0]), (last, requests[3])):
        assert ticket.result().tokens == generate(model, [request], config)[0][0].tokens


def test_what_cannot_be_decoded_is_refused_before_it_joins() -> None:
    model = make_model(max_position_embeddings=64)
    loop, memory = DecodeLoop(model), compressed(model, some_ids(60), 2, "beacon")
    with pytest.raises(CapacityError, match=r"31 positions of memory, 30 prompt tokens and 12 .* need 73 .* has 64"):
        loop.submit(Request(memory, some_ids(30)), greedy(model))
    with pytest.raises(InputError, match="num_beams=2: answers that are decoded with others"):
        loop.submit(Request(memory, some_ids(3)), greedy(model, num_beams=2))
    with pytest.raises(InputError, match="the prompt is empty"):
        loop.submit(Request(memory, []), greedy(model))
    assert not loop._waiting


def test_time_for_an_answer_counts_from_when_it_joins() -> None:
    model = make_model()
    requests = mixed_requests(model, 2)
    loop = DecodeLoop(model, max_rows=1)
    first = loop.submit(requests[0], greedy(model))
    second = loop.submit(requests[1], greedy(model, max_time=0.2))
    steps(loop, first, 2)
    time.sleep(0.3)
    assert len(second.result().tokens) > 1
    third = loop.submit(requests[0], greedy(model, max_time=0.0001))
    assert len(third.result().tokens) == 1


def test_tickets_come_as_they_are_done_and_are_taken_as_there_is_room() -> None:
    model = make_model()
    requests = mixed_requests(model, 5)
    lengths = [9, 2, 4, 6, 1]
    loop, taken = DecodeLoop(model, max_rows=2), []

    def submitted() -> Any:
        for request, length in zip(requests, lengths, strict=True):
            taken.append(loop.submit(request, greedy(model, max_new_tokens=length)))
            yield taken[-1]

    done = []
    for ticket in loop.as_finished(submitted()):
        done.append(len(ticket.result().tokens))
        assert sum(not one.done for one in taken) <= 2
    assert sorted(done) == sorted(lengths)
    assert done[0] == 2
    left = loop.as_finished(loop.submit(request, greedy(model, max_new_tokens=5)) for request in requests)
    next(left)
    left.close()  # type: ignore[attr-defined]  # it is a generator
    assert not loop._rows


def test_threads_share_a_loop() -> None:
    model = make_model()
    requests, config = mixed_requests(model), greedy(model)
    loop, batches = DecodeLoop(model), []
    model.base.register_forward_pre_hook(
        lambda _module, _args, kwargs: batches.append(kwargs["logits_to_keep"].shape[0]), with_kwargs=True
    )
    begin = threading.Barrier(len(requests))
    found: dict[int, tuple[int, ...]] = {}

    def ask(n: int) -> None:
        ticket = loop.submit(requests[n], config)
        begin.wait()
        *_, last = ticket
        assert isinstance(last, Generation)
        found[n] = last.tokens

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert batches == [len(requests)] * 12
    assert [found[n] for n in range(len(requests))] == [
        DecodeLoop(model).submit(request, config).result().tokens for request in requests
    ]


def test_an_event_loop_goes_on_while_requests_are_decoded() -> None:
    model = make_model()
    requests, config = mixed_requests(model), greedy(model, max_new_tokens=20)
    loop = DecodeLoop(model)

    async def read(request: Request) -> Generation:
        *pieces, last = [piece async for piece in loop.submit(request, config)]
        assert isinstance(last, Generation)
        assert "".join(map(str, pieces)).strip() == last.text
        return last

    async def tick() -> int:
        ticks = 0
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(0)
                ticks += 1
        return ticks

    async def main() -> tuple[list[Generation], int]:
        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(*map(read, requests))
        ticking.cancel()
        return answers, await ticking

    for _ in range(2):  # the thread of the first time has ended
        answers, ticks = asyncio.run(main())
        assert ticks > 20
        assert [one.tokens for one in answers] == [generate(model, [one], config)[0][0].tokens for one in requests]
        wait_until(lambda: not [one for one in threading.enumerate() if one.name == "beacon-memory-decode"])


def test_a_task_that_is_cancelled_takes_its_request_along() -> None:
    model = make_model(max_position_embeddings=8192)
    request = mixed_requests(model)[0]
    loop = DecodeLoop(model)

    async def main() -> Ticket:
        ticket = loop.submit(request, greedy(model, max_new_tokens=4000))

        async def read() -> None:
            async with contextlib.aclosing(aiter(ticket)) as pieces:  # type: ignore[type-var]  # it is a generator
                async for _ in pieces:
                    pass

        task = asyncio.create_task(read())
        while not ticket.tokens:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        return ticket

    ticket = asyncio.run(main())
    assert ticket.done
    assert 0 < len(ticket.result().tokens) < 4000
    wait_until(lambda: loop._is_idle() and not loop._driven_in_background)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_a_process_that_was_forked_begins_with_an_empty_loop() -> None:
    model = make_model()
    requests, config = mixed_requests(model, 2), greedy(model)
    loop = DecodeLoop(model)
    ticket = loop.submit(requests[0], config)
    steps(loop, ticket, 2)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(1)
        try:
            ticket.result()
        except InputError as error:
            queue.put(str(error))
        queue.put(loop.submit(requests[1], config).result().tokens)

    with loop._changed:  # as another thread may hold it
        process = context.Process(target=child)
        process.start()
    assert "submit it anew" in queue.get()
    assert queue.get() == generate(model, [requests[1]], config)[0][0].tokens
    process.join(10)
    assert ticket.result().tokens == generate(model, [requests[0]], config)[0][0].tokens


def wait_until(reached: Any) -> None:
    stop = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < stop
        time.sleep(0.01)
