from __future__ import annotations

import gc
import subprocess
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import Fake, an_item, baseline, saved_model

from beacon_memory import __version__
from beacon_memory.errors import InputError
from beacon_memory.evaluation.baseline_names import baselines
from beacon_memory.evaluation.baselines import Compressed
from beacon_memory.evaluation.items import Item
from beacon_memory.evaluation.metrics import METRICS, Interval, bootstrap
from beacon_memory.evaluation.run import Result, Row, _commit, run_continuations, run_items

# What each metric takes for a right answer.
RIGHT: dict[str, tuple[str, ...]] = {
    "classification": ("river", "lake", "sea"),
    "number": ("Paragraph 7",),
    "exam": ("AC",),
    "code_similarity": ("return self.rivers[0]",),
}


def an_item_of(metric: str) -> Item:
    return an_item(id=metric, answers=RIGHT.get(metric, ("the Amber river",)), metrics=(metric,), group=metric)


def items(count: int, group: str = "") -> list[Item]:
    return [
        an_item(id=f"{group}{number}", answers=("right",), metrics=("contains", "f1"), group=group)
        for number in range(count)
    ]


def run(field: list[Any], asked: list[Item], **options: Any) -> Result:
    return run_items("task", field, asked, {"limit": 3}, saved_model(), max_new_tokens=8, **options)


def row(result: Result, name: str, group: str = "") -> Row:
    (found,) = (row for row in result.rows if (row.baseline, row.group) == (name, group))
    return found


class TestAnswers:
    def test_who_cheats_scores_1_on_every_metric(self) -> None:
        result = run([Fake("cheat")], [an_item_of(metric) for metric in METRICS])
        assert {record.item: record.scores for record in result.records} == {
            metric: {"score": 1.0, metric: 1.0} for metric in METRICS
        }
        assert set(row(result, "cheat").scores.values()) == {Interval(1.0, 1.0, 1.0)}

    def test_who_is_silent_scores_0_on_every_metric(self) -> None:
        result = run([Fake("silent")], [an_item_of(metric) for metric in METRICS])
        assert set(row(result, "silent").scores.values()) == {Interval(0.0, 0.0, 0.0)}

    def test_who_sees_nothing_scores_what_none_scores(self) -> None:
        blind = baseline("truncated:1000")
        blind.read = baseline("none").read
        asked = [an_item(f"Where does river {number} rise?", id=str(number)) for number in range(3)]
        result = run([baseline("none"), blind, baseline("full")], asked)
        said = {
            name: [one.prediction for one in result.records if one.baseline == name]
            for name in ("none", blind.name, "full")
        }
        assert said["none"] == said[blind.name] != said["full"]
        assert row(result, "none").scores == row(result, blind.name).scores

    def test_a_record_says_all_there_is(self) -> None:
        (record,) = run([Fake("some", {"1": "nothing right"})], [an_item(id="1", group="a")]).records
        assert (record.baseline, record.item, record.group, record.prediction) == ("some", "1", "a", "nothing right")
        assert record.scores == {"score": 0.0, "f1": 0.0, "contains": 0.0}
        assert (record.kv_bytes, record.seconds, record.cut) == (8000, 0.5, True)

    def test_items_are_answered_in_batches_and_progress_hears_of_each(self) -> None:
        heard: list[str] = []
        field = [Fake("one"), Fake("two")]
        result = run(field, items(19), progress=lambda name, _: heard.append(name))
        assert [one.batches for one in field] == [[8, 8, 3]] * 2
        assert heard == ["one"] * 19 + ["two"] * 19
        assert [record.item for record in result.records] == [str(number) for number in range(19)] * 2

    def test_means_have_intervals_over_items(self) -> None:
        said = {str(number): "right" if number < 3 else "right or wrong" for number in range(10)}
        mean = row(run([Fake("some", said)], items(10)), "some")
        f1s = [1.0] * 3 + [2 / 4] * 7
        assert mean.scores == {"score": bootstrap([1.0] * 10), "contains": bootstrap([1.0] * 10), "f1": bootstrap(f1s)}
        assert mean.scores["f1"].mean == pytest.approx(0.65)
        assert (mean.items, mean.group, mean.kv_bytes, mean.seconds, mean.cut) == (10, "", 8000, 0.5, 10)

    def test_groups_have_rows_of_their_own_sorted_by_their_numbers(self) -> None:
        asked = [item for group in ("1000 0", "500 0.5", "500 0.25") for item in items(2, group)]
        result = run([Fake("some", {"500 0.51": "right"})], asked)
        assert [row.group for row in result.rows] == ["", "500 0.25", "500 0.5", "1000 0"]
        assert [row.scores["score"].mean for row in result.rows] == pytest.approx([1 / 6, 0, 0.5, 0])
        assert [row.items for row in result.rows] == [6, 2, 2, 2]

    def test_one_group_is_no_group(self) -> None:
        assert [row.group for row in run([Fake("some")], items(3, "squad")).rows] == [""]

    def test_a_metric_that_few_items_have_is_their_mean(self) -> None:
        asked = [*items(3), an_item_of("number")]
        scores = row(run([Fake("cheat", {"0": "wrong"})], asked), "cheat").scores
        assert {name: score.mean for name, score in scores.items()} == pytest.approx(
            {"score": 0.75, "contains": 2 / 3, "f1": 2 / 3, "number": 1.0}
        )

    def test_baselines_that_differ_in_bits_alone_read_each_text_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, compress = [], Compressed.memories

        def counting(self: Compressed, documents: Any, *arguments: Any) -> Any:
            read.append(self.ratio)
            time.sleep(0.1)
            return compress(self, documents, *arguments)

        monkeypatch.setattr(Compressed, "memories", counting)
        asked = [an_item("Which one?", id=str(number), context=(f"River {number} is long.",)) for number in range(9)]
        field = baselines(["beacon:2@int4", "beacon:2", "beacon:2@int8", "beacon:4", "beacon:4@int8"], saved_model())
        result = run(field, asked)
        assert read == [2] * 9 + [4] * 9
        assert [row.baseline for row in result.rows] == [one.name for one in field]
        assert [record.item for record in result.records if record.baseline == "beacon:4"] == [i.id for i in asked]
        assert all(record.seconds > 0.1 for record in result.records)  # each has the time that reading took
        for one in field:
            alone = run([baseline(one.name)], asked)
            assert [(r.prediction, r.kv_bytes) for r in alone.records] == [
                (r.prediction, r.kv_bytes) for r in result.records if r.baseline == one.name
            ]
        assert len(read) == 18 + 5 * 9

    def test_what_is_loaded_of_one_memory_needs_one_reading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, compress = [], Compressed.memories

        def counting(self: Compressed, documents: Any, ratio: int, compression: str) -> Any:
            read.append(ratio)
            return compress(self, documents, ratio, compression)

        monkeypatch.setattr(Compressed, "memories", counting)
        field = baselines(["nested:4", "zoom:4", "zoom:8", "select:2", "slice:4"], saved_model())
        run(field, [an_item(question, id=question) for question in ("One?", "Two?")])
        assert read == [2, 1]

    def test_what_was_read_is_let_go_of(self) -> None:
        field = baselines(["beacon:2", "beacon:2@int8", "full"], saved_model())
        memories = []
        for one in field:
            one.answer([an_item()], 1)
            memories.append(weakref.ref(vars(one)["_last"][1].kv.keys))
        run(field, [an_item()])
        gc.collect()
        assert [memory() for memory in memories] == [None] * 3
        assert all(vars(one)["_last"] is None for one in field)

    def test_no_items_are_an_error(self) -> None:
        with pytest.raises(InputError, match=r"task 'task' has no items: none fits {'limit': 3}"):
            run([Fake("some")], [])


class TestContinuations:
    TEXTS = tuple((str(number), [number, 9], [9, 9, 9]) for number in range(4))

    def run(self, *field: Any) -> Result:
        return run_continuations("ppl", list(field), self.TEXTS, {}, saved_model())

    def fake(self, name: str, *nll: float) -> Fake:
        return Fake(name, nll=dict(enumerate(nll)))

    FULL, NONE, HALF = (1.0, 2.0, 3.0, 2.0), (3.0, 4.0, 5.0, 4.0), (2.0, 3.0, 3.0, 4.0)

    def test_none_has_closed_nothing_of_the_gap_and_full_all_of_it(self) -> None:
        result = self.run(self.fake("none", *self.NONE), self.fake("full", *self.FULL), self.fake("half", *self.HALF))
        closed = {row.baseline: row.scores["gap closed"] for row in result.rows}
        assert closed["none"] == Interval(0.0, 0.0, 0.0)
        assert closed["full"] == Interval(1.0, 1.0, 1.0)
        gained = bootstrap([1.0, 1.0, 2.0, 0.0])  # none - half, of a gap of 2
        assert closed["half"] == Interval(gained.mean / 2, gained.low / 2, gained.high / 2)
        assert closed["half"].mean == 0.5
        assert row(result, "half").scores["nll"] == bootstrap(self.HALF)

    def test_the_gap_is_one_of_means_over_texts(self) -> None:
        nll = {"none": (2.0, 9.0, 2.0, 2.0), "full": (1.0, 2.0, 2.0, 2.0), "some": (2.0, 7.0, 2.0, 2.0)}
        result = self.run(*(self.fake(name, *values) for name, values in nll.items()))
        assert row(result, "some").scores["gap closed"].mean == pytest.approx(2 / 8)

    @pytest.mark.parametrize("names", [("full", "half"), ("none", "half")])
    def test_without_both_ends_there_is_no_gap(self, names: tuple[str, ...]) -> None:
        result = self.run(*(self.fake(name, *self.HALF) for name in names))
        assert [list(row.scores) for row in result.rows] == [["nll"]] * 2

    @pytest.mark.parametrize("full", [NONE, (4.0, 5.0, 6.0, 5.0)])
    def test_a_text_that_does_not_help_leaves_no_gap_to_close(self, full: tuple[float, ...]) -> None:
        result = self.run(self.fake("none", *self.NONE), self.fake("full", *full))
        assert [list(row.scores) for row in result.rows] == [["nll"]] * 2

    def test_records_have_the_nll_of_each_text(self) -> None:
        heard: list[str] = []
        result = run_continuations(
            "ppl",
            [self.fake("half", *self.HALF)],
            self.TEXTS,
            {},
            saved_model(),
            progress=lambda name, _: heard.append(name),
        )
        assert [(one.item, one.scores) for one in result.records] == [
            (str(number), {"nll": nll}) for number, nll in enumerate(self.HALF)
        ]
        assert heard == ["half"] * 4

    def test_real_baselines_lie_between_their_ends(self) -> None:
        texts = [("text", [20, 30, 40] * 20, [50, 60, 70])]
        field = [baseline(name) for name in ("none", "full", "beacon:4")]
        scores = run_continuations("ppl", field, texts, {}, saved_model()).rows[2].scores
        assert scores["nll"].mean == field[2].score(*texts[0][1:])

    def test_who_needs_a_question_is_refused_before_anything_is_scored(self) -> None:
        with pytest.raises(InputError, match="task 'ppl' asks no questions, which bm25:4 must know"):
            self.run(Fake("first"), baseline("bm25:4"))  # the first has no scores to give

    def test_no_texts_are_an_error(self) -> None:
        with pytest.raises(InputError, match=r"task 'ppl' has no texts: none is as long as {'context_tokens': 5}"):
            run_continuations("ppl", [Fake("some")], [], {"context_tokens": 5}, saved_model())


def test_a_result_says_what_its_figures_rest_on() -> None:
    result = run([Fake("some")], items(1))
    model = saved_model()
    assert (result.task, result.settings) == ("task", {"limit": 3})
    found = dict(result.provenance)
    assert found["beacon-memory"] == __version__
    assert (found["base"], found["adapter"]) == (model.fingerprint.base, model.fingerprint.adapter)
    assert found["model"] == Path(model.base.config.name_or_path).name  # its folder is nobody else's business
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert {"torch", "transformers", "kvpress", "bm25s", "commit", "machine"} <= found.keys()


class TestCommit:
    def git(self, folder: Path, *arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    def test_outside_git_there_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert _commit(tmp_path) is None
        monkeypatch.setenv("PATH", "")
        assert _commit(Path(__file__).parent) is None  # not even git

    def test_inside_it_is_named_with_a_plus_if_something_was_changed(self, tmp_path: Path) -> None:
        self.git(tmp_path, "init")
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "module.py").write_text("1")
        assert _commit(tmp_path / "package") is None  # not kept by git
        self.git(tmp_path, "add", ".")
        self.git(tmp_path, "commit", "-m", "first")
        commit = _commit(tmp_path / "package")
        assert commit is not None
        assert len(commit) == 12
        (tmp_path / "package" / "module.py").write_text("2")
        assert _commit(tmp_path / "package") == f"{commit}+"

    def test_in_a_folder_that_git_ignores_there_is_none(self, tmp_path: Path) -> None:
        self.git(tmp_path, "init")
        (tmp_path / "venv").mkdir()
        (tmp_path / "venv" / "module.py").write_text("1")
        (tmp_path / ".gitignore").write_text("venv\n")
        self.git(tmp_path, "add", ".")
        self.git(tmp_path, "commit", "-m", "first")
        assert _commit(tmp_path / "venv") is None
