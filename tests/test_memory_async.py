"""Answers for an event loop: the same as in threads, together, and gone when nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from event_loop import awake_during
from langchain_samples import babbling_model, filled_memory, in_words

from beacon_memory import Answer, BeaconMemory, DocumentNotFoundError, Question
from beacon_memory.generation.decode_loop import Ticket


@pytest.fixture
def memory(tmp_path: Path) -> BeaconMemory:
    return filled_memory(tmp_path, babbling_model())


async def streamed(memory: BeaconMemory, question: Question) -> tuple[str, Answer]:
    pieces: list[str] = []
    async for piece in memory.astream(question):
        if isinstance(piece, Answer):
            return "".join(pieces), piece
        pieces.append(piece)
    raise AssertionError("no answer came")


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.005)


async def test_streamed_answers_are_those_of_ask(memory: BeaconMemory) -> None:
    options = in_words(memory) | {"max_new_tokens": 12}
    questions = [Question("Who?", ids, options=options) for ids in (["roof"], ["well"], [], ["owls", "roof"])]
    wanted = [memory.ask("Who?", one.ids, **options) for one in questions]
    got = await asyncio.gather(*(streamed(memory, one) for one in questions))
    assert [answer.text for _, answer in got] == [answer.text for answer in wanted]
    assert [text.strip() for text, _ in got] == [answer.text for answer in wanted]
    assert [answer.ids for _, answer in got] == [answer.ids for answer in wanted]


async def test_the_event_loop_goes_on_while_answers_come(memory: BeaconMemory) -> None:
    question = Question("Who?", ["roof"], options=in_words(memory) | {"max_new_tokens": 60})
    assert await awake_during(streamed(memory, question)) > 0.05


async def test_answer_that_nobody_waits_for_any_more_frees_its_place(memory: BeaconMemory) -> None:
    question = Question("Who?", ["roof"], options=in_words(memory) | {"max_new_tokens": 3000})
    pieces = memory.astream(question)
    await anext(pieces)
    assert len(memory._loop._rows) == 1
    await pieces.aclose()
    await until(memory._loop._is_idle)


async def test_answer_that_is_left_while_its_memory_is_loaded_is_never_decoded(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = asyncio.Event(), asyncio.Event()
    here, asked, submit = asyncio.get_running_loop(), memory._asked, memory._submit
    submitted: list[int] = []

    def slowly(question: Question) -> object:
        here.call_soon_threadsafe(loading.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), here).result()
        return asked(question)

    def noting(one: Any) -> Ticket:
        submitted.append(1)
        return submit(one)

    monkeypatch.setattr(memory, "_asked", slowly)
    monkeypatch.setattr(memory, "_submit", noting)
    task = asyncio.create_task(streamed(memory, Question("Who?", ["roof"], options=in_words(memory))))
    await loading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await until(lambda: submitted == [1])
    await until(memory._loop._is_idle)
    assert memory._loop._rows == []


async def test_what_cannot_be_asked_raises_as_ask_does(memory: BeaconMemory) -> None:
    with pytest.raises(DocumentNotFoundError, match="'barn'"):
        await streamed(memory, Question("Who?", ["barn"]))


@pytest.mark.parametrize(("options", "ended"), [({}, False), ({"stop": ["a"]}, True)])
def test_answer_tells_whether_it_was_cut_off(memory: BeaconMemory, options: dict[str, object], ended: bool) -> None:
    assert memory.ask("Who?", ["roof"], max_new_tokens=40, **in_words(memory), **options).ended is ended  # type: ignore[arg-type]


def test_answer_that_the_model_ends_is_not_cut_off(memory: BeaconMemory) -> None:
    whole = memory.ask("Who?", ["roof"], max_new_tokens=4, suppress_tokens=list(range(3, 262)), eos_token_id=2)
    assert whole.ended
