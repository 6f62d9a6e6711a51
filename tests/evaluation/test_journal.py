"""A run that is interrupted goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import Fake, an_item, saved_model

from beacon_memory.errors import InputError
from beacon_memory.evaluation.baselines import Outcome
from beacon_memory.evaluation.items import Item
from beacon_memory.evaluation.journal import journal_file
from beacon_memory.evaluation.report import read_result, write_result
from beacon_memory.evaluation.run import Result, run_continuations, run_items

ITEMS = [an_item(id=str(number), answers=("right",)) for number in range(20)]
SAID = {item.id: "right" for item in ITEMS[::3]}


class Interrupted(Fake):
    """Answer some batches, until Ctrl-C."""

    def __init__(self, name: str, said: dict[str, str], batches: int) -> None:
        super().__init__(name, said)
        self.left = batches

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().answer(items, max_new_tokens)


def run(output: Path | None, *field: Any, settings: int = 3, **options: Any) -> Result:
    return run_items(
        "task", field, ITEMS, {"limit": settings}, saved_model(), max_new_tokens=8, output=output, **options
    )


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A result's file, whose run was interrupted after one baseline and a batch of another."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.json", Fake("one", SAID), Interrupted("two", SAID, 1))
    return tmp_path / "out.json"


def test_it_goes_on_with_the_batch_that_was_interrupted(output: Path) -> None:
    one, two, heard = Fake("one", SAID), Fake("two", SAID), []
    result = run(output, one, two, progress=lambda name, total: heard.append((name, total)))
    assert (one.batches, two.batches) == ([], [8, 4])
    assert heard == [("one", 20)] * 20 + [("two", 20)] * 20
    whole = run(None, Fake("one", SAID), Fake("two", SAID))
    assert (result.records, result.rows) == (whole.records, whole.rows)


def test_answers_are_kept_until_the_result_is_written(output: Path) -> None:
    result = run(output, Fake("one", SAID), Fake("two", SAID))
    assert journal_file(output).exists()
    write_result(result, output)
    assert not journal_file(output).exists()
    assert read_result(output) == result


def test_another_run_does_not_take_them(output: Path) -> None:
    kept = journal_file(output).read_bytes()
    with pytest.raises(InputError, match=r"out\.json\.answers\.jsonl holds the answers of another run.*remove it"):
        run(output, Fake("one", SAID), settings=4)
    assert journal_file(output).read_bytes() == kept


def test_a_run_of_other_baselines_takes_those_that_it_has(output: Path) -> None:
    def run_of(*field: Fake) -> Result:
        return run_items("task", field, ITEMS, {"limit": 3, "baselines": [one.name for one in field]}, saved_model(),
                         max_new_tokens=8, output=output)  # fmt: skip

    one, three = Fake("one", SAID), Fake("three", SAID)
    assert [row.baseline for row in run_of(one, three).rows] == ["one", "three"]
    assert (one.batches, three.batches) == ([], [8, 8, 4])


def test_half_a_line_is_cut_off(output: Path) -> None:
    kept = journal_file(output).read_bytes()
    journal_file(output).write_bytes(kept[:-9])
    two = Fake("two", SAID)
    result = run(output, Fake("one", SAID), two)
    assert two.batches == [8, 8, 4]  # the batch has lost an answer
    assert result.records == run(None, Fake("one", SAID), Fake("two", SAID)).records


def test_a_file_that_is_no_journal_is_refused(output: Path) -> None:
    journal_file(output).write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="cannot be used"):
        run(output, Fake("one", SAID))
    journal_file(output).unlink()
    journal_file(output).mkdir()
    with pytest.raises(InputError, match="cannot be used"):
        run(output, Fake("one", SAID))


def test_continuations_go_on_too(tmp_path: Path) -> None:
    texts = [(str(number), [number], [number, number]) for number in range(3)]
    scored: list[int] = []

    class Scoring(Fake):
        def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
            scored.append(context[0])
            if scored == [0, 1, 2]:
                raise KeyboardInterrupt
            return float(len(continuation))

    def go() -> Result:
        return run_continuations("ppl", [Scoring("half")], texts, {}, saved_model(), output=tmp_path / "out.json")

    with pytest.raises(KeyboardInterrupt):
        go()
    assert [record.scores["nll"] for record in go().records] == [2.0] * 3
    assert scored == [0, 1, 2, 2]
