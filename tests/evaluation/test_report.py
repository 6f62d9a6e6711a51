from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import Fake, an_item, saved_model

from beacon_memory.errors import InputError, MissingDependencyError
from beacon_memory.evaluation.journal import Record
from beacon_memory.evaluation.metrics import Interval
from beacon_memory.evaluation.plots import draw_heat_map, draw_ratios
from beacon_memory.evaluation.report import markdown, read_result, write_report, write_result
from beacon_memory.evaluation.run import Result, Row, run_continuations, run_items


def a_row(baseline: str, group: str = "", **more: Any) -> Row:
    scores = {"score": Interval(0.5, 0.25, 0.75), "f1": Interval(0.5, 0.25, 0.75), "contains": Interval(0, 0, 1)}
    return Row(**{"baseline": baseline, "group": group, "items": 4, "scores": scores, "kv_bytes": 2_500_000,
                  "seconds": 1.254, "cut": 0, **more})  # fmt: skip


def a_result(*rows: Row, task: str = "qa") -> Result:
    settings = {"data": "qa.jsonl.gz", "limit": 4, "seed": 0, "baselines": ["full", "none"]}
    return Result(task, settings, {"torch": "2.13.0", "commit": None}, list(rows), [])


def some_items() -> list[Any]:
    return [an_item(id=str(number), group="ab"[number % 2]) for number in range(4)]


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5_000


class TestFiles:
    @pytest.mark.parametrize("kind", ["items", "continuations"])
    def test_what_is_written_is_read_again(self, kind: str, tmp_path: Path) -> None:
        if kind == "items":
            result = run_items("qa", [Fake("a"), Fake("cheat")], some_items(), {"limit": 4}, saved_model(),
                               max_new_tokens=8)  # fmt: skip
        else:
            field = [Fake("none", nll={1: 2.0}), Fake("full", nll={1: 1.5})]
            result = run_continuations("ppl", field, [("é", [1], [2, 3])], {"lengths": [1, 2]}, saved_model())
        file = tmp_path / "new" / "folder" / "result.json"
        write_result(result, file)
        assert read_result(file) == result
        assert [path.name for path in file.parent.iterdir()] == ["result.json"]

    @pytest.mark.parametrize(
        "damage",
        [lambda text: text[:50], lambda _: "", lambda _: "[]", lambda _: '{"rows": [1]}', lambda _: '{"rows": 1}',
         lambda text: text.replace('"mean"', '"middle"'), lambda text: text.replace('"cut"', '"cat"'),
         lambda text: text.replace('"scores": {', '"scores": [{', 1)],
    )  # fmt: skip
    def test_a_damaged_file_is_named(self, damage: Any, tmp_path: Path) -> None:
        file = tmp_path / "result.json"
        write_result(a_result(a_row("full")), file)
        file.write_text(damage(file.read_text()))
        with pytest.raises(InputError, match=r"result.json is no evaluation result: .*; remove it to run its task"):
            read_result(file)

    @pytest.mark.parametrize("content", [b"\xff\xfe", None])
    def test_one_that_is_no_text_or_not_there_too(self, content: bytes | None, tmp_path: Path) -> None:
        file = tmp_path / "result.json"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=r"result.json is no evaluation result"):
            read_result(file)

    def test_a_file_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"cannot be written to .*file/result.json: .*name another file"):
            write_result(a_result(a_row("full")), tmp_path / "file" / "result.json")


def a_record(baseline: str, item: str, score: float, prediction: str = "", kv_bytes: int = 100) -> Record:
    return Record(baseline, item, "", prediction, {"score": score, "f1": score}, kv_bytes, 1.0)


class TestCostOfQuantizing:
    def test_is_the_difference_item_by_item(self) -> None:
        records = [
            *(a_record("select:2", item, score, "one") for item, score in (("a", 0.5), ("b", 1.0))),
            *(a_record("select:2@int8", item, score, item, 54) for item, score in (("a", 0.5), ("b", 0.5))),
            *(a_record("beacon:2", item, score, "one") for item, score in (("a", 0.0), ("b", 0.0))),
            *(a_record("beacon:2@int8", item, score, "one", 55) for item, score in (("a", 0.5), ("b", 0.0))),
            *(a_record("beacon:2@int4", item, 0.0, "one", 29) for item in "ab"),
            *(a_record("beacon:4@int4", item, 0.0, "one", 29) for item in "ab"),  # not with itself unquantized
        ]
        shown = markdown(replace(a_result(a_row("select:2")), records=records)).splitlines()[4:]
        assert [re.sub(r" \(.*?\)", "", line) for line in shown] == [
            "| quantized - as it is | score | other answers | K/V |",
            "| --- | --- | --- | --- |",
            "| select:2@int8 | -0.2500 | 2 of 2 | 0.540 |",
            "| beacon:2@int8 | +0.2500 | 0 of 2 | 0.550 |",
            "| beacon:2@int4 | +0.0000 | 0 of 2 | 0.290 |",
            "| all @int8 | +0.0000 |  |  |",
            "| all @int4 | +0.0000 |  |  |",
        ]
        assert "-0.2500 (-0.5000 to +0.0000)" in shown[2]
        assert "+0.0000 (-0.2500 to +0.2500)" in shown[5]  # an item's mean first: +0.25 and -0.25

    def test_of_continuations_is_one_of_their_losses(self) -> None:
        field = [Fake("select:2", nll={1: 2.0}), Fake("select:2@int4", nll={1: 2.5})]
        shown = markdown(run_continuations("ppl", field, [("é", [1], [2, 3])], {}, saved_model()))
        assert (
            "| quantized - as it is | nll |\n| --- | --- |\n| select:2@int4 | +0.5000 (+0.5000 to +0.5000) |" in shown
        )


class TestDifferences:
    def test_are_from_the_full_text_and_from_passages_at_the_same_ratio_item_by_item(self) -> None:
        scores = {"full": (0.5, 1.0), "bm25:4": (1.0, 1.0), "select:4": (0.5, 0.5), "select:8": (0.0, 0.0)}
        records = [a_record(name, item, score) for name, both in scores.items() for item, score in zip("ab", both)]  # noqa: B905
        shown = markdown(replace(a_result(a_row("full")), records=records)).splitlines()[4:]
        assert [re.sub(r" \(.*?\)", "", line) for line in shown] == [
            "| score | - full | - bm25 at the same R |",
            "| --- | --- | --- |",
            "| bm25:4 | +0.2500 |  |",
            "| select:4 | -0.2500 | -0.5000 |",
            "| select:8 | -0.7500 |  |",
        ]
        assert "-0.2500 (-0.5000 to +0.0000)" in shown[3]

    def test_are_left_out_where_there_is_no_rival(self) -> None:
        records = [a_record(name, "a", 0.5) for name in ("select:4", "bm25:8", "select:8@int8")]
        assert "- full" not in markdown(replace(a_result(a_row("select:4")), records=records))


class TestMarkdown:
    def test_one_line_for_each_baseline(self) -> None:
        shown = markdown(a_result(a_row("full"), a_row("beacon:4", kv_bytes=625_000, seconds=0.5)))
        assert shown.splitlines() == [
            "| baseline | items | f1 | contains | K/V | seconds |",
            "| --- | --- | --- | --- | --- | --- |",
            "| full | 4 | 0.500 (0.250 to 0.750) | 0.000 (0.000 to 1.000) | 2.50 MB | 1.25 |",
            "| beacon:4 | 4 | 0.500 (0.250 to 0.750) | 0.000 (0.000 to 1.000) | 0.62 MB | 0.50 |",
        ]

    def test_a_line_for_each_group_below(self) -> None:
        other = {"score": Interval(0.125, 0, 1), "f1": Interval(0.125, 0, 1)}
        rows = [a_row("full"), a_row("full", "a", items=3), a_row("full", "b", items=1)]
        rows += [replace(row, baseline="none", scores=other) for row in rows]
        assert markdown(a_result(*rows)).splitlines()[4:] == [
            "",
            "| score | items | full | none |",
            "| --- | --- | --- | --- |",
            "| a | 3 | 0.500 | 0.125 |",
            "| b | 1 | 0.500 | 0.125 |",
        ]

    def test_the_score_is_shown_where_items_have_different_metrics(self) -> None:
        mixed = {"score": Interval(0.5, 0, 1), "f1": Interval(0.25, 0, 1), "number": Interval(0.75, 0, 1)}
        nothing = dict.fromkeys(mixed, Interval(0, 0, 0))
        head, *_ = markdown(a_result(a_row("none", scores=nothing), a_row("full", scores=mixed))).splitlines()
        assert head == "| baseline | items | score | f1 | number | K/V | seconds |"

    def test_cuts_are_shown_where_there_are_any(self) -> None:
        head, _, full, none = markdown(a_result(a_row("full", cut=3), a_row("none"))).splitlines()
        assert head.endswith("| seconds | cut |")
        assert full.endswith("| 1.25 | 3 |")
        assert none.endswith("| 1.25 | 0 |")

    def test_continuations_have_no_size(self) -> None:
        scores = {"nll": Interval(2.5, 2.25, 2.75), "gap closed": Interval(0.5, 0.25, 0.625)}
        assert markdown(a_result(a_row("full", scores=scores, kv_bytes=0))).splitlines() == [
            "| baseline | items | nll | gap closed | seconds |",
            "| --- | --- | --- | --- | --- |",
            "| full | 4 | 2.500 (2.250 to 2.750) | 0.500 (0.250 to 0.625) | 1.25 |",
        ]


class TestPlots:
    def test_ratios_are_drawn_beside_full_text_and_none(self, tmp_path: Path) -> None:
        names = ("full", "none", "base", "beacon:2", "beacon:8", "beacon:4:2", "truncated:4")
        assert draw_ratios(a_result(*(a_row(name) for name in names)), tmp_path / "plot.png")
        assert is_picture(tmp_path / "plot.png")

    def test_where_there_is_no_ratio_there_is_no_plot(self, tmp_path: Path) -> None:
        assert not draw_ratios(a_result(a_row("full"), a_row("base")), tmp_path / "plot.png")
        assert not draw_heat_map(a_result(a_row("full"), task="needle"), tmp_path / "plot.png")
        assert list(tmp_path.iterdir()) == []

    def test_needles_are_drawn_by_length_and_depth(self, tmp_path: Path) -> None:
        groups = ("", "500 0.0", "500 0.5", "1000 0.0", "1000 0.5")
        result = a_result(*(a_row(name, group) for name in ("full", "beacon:4") for group in groups), task="needle")
        assert draw_heat_map(result, tmp_path / "plot.png")
        assert is_picture(tmp_path / "plot.png")

    def test_the_lines_are_the_scores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.figure import Figure

        drawn: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        scores = {2: 0.75, 8: 0.25}
        rows = [a_row("full", scores={"gap closed": Interval(1, 1, 1)})]
        for ratio, score in scores.items():
            rows.append(a_row(f"beacon:{ratio}:2", scores={"gap closed": Interval(score, score, score)}))
        draw_ratios(a_result(*rows), tmp_path / "plot.png")
        (axes,) = drawn[0].axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["full", "beacon, 2 documents"]
        (line,) = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]  # type: ignore[arg-type]
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == scores  # type: ignore[arg-type]
        assert axes.get_ylabel() == "gap closed"

    @pytest.mark.parametrize("draw", [draw_ratios, draw_heat_map])
    def test_without_matplotlib_it_says_how_to_get_it(
        self, draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'beacon-memory\[eval\]'"):
            draw(a_result(a_row("beacon:4"), a_row("beacon:4", "1 0")), tmp_path / "plot.png")


def test_the_page_has_a_section_for_each_task_with_its_table_and_plot(tmp_path: Path) -> None:
    record = Record("full", "1", "", "said", {"score": 1.0}, 0, 0.0)
    needle = a_result(a_row("full"), a_row("full", "500 0.0"), task="needle")
    results = [replace(a_result(a_row("full"), a_row("beacon:4")), records=[record]), needle]
    retention = a_result(a_row("full"), task="retention")
    files = write_report([*results, retention], tmp_path / "results", "beacon-memory eval report")
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in files] == ["README.md", "qa.png", "needle.png"]
    assert all(is_picture(file) for file in files[1:])
    assert page.startswith(
        "# Results\n\nWritten by `beacon-memory eval report`, with the `--limit` and `--seed` of each task; "
        "not to be edited.\n\nMade with torch 2"
    )
    for result in (*results, retention):
        assert f"## {result.task}\n\ndata qa.jsonl.gz, limit 4, seed 0.\n\n| baseline" in page
        assert f"\n\n{markdown(result)}\n" in page
    assert "![qa](qa.png)" in page
    assert "![retention]" not in page
    assert "said" not in page


def test_tasks_of_different_origin_each_say_theirs(tmp_path: Path) -> None:
    first = a_result(a_row("full"))
    write_report([first, replace(first, task="kv", provenance={"torch": "2.14.0"})], tmp_path, "command")
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## qa\n\ndata qa.jsonl.gz, limit 4, seed 0. Made with torch 2.13.0, commit None.\n" in page
    assert "## kv\n\ndata qa.jsonl.gz, limit 4, seed 0. Made with torch 2.14.0.\n" in page
