from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from beacon_memory.errors import InputError
from beacon_memory.evaluation.items import (
    Item,
    read_kv_retrieval,
    read_long,
    read_longbench,
    read_qa,
    read_support,
    read_texts,
)
from beacon_memory.evaluation.metrics import METRICS

ROWS = 24


def words(text: str) -> int:
    return len(text.split())


def write(path: Path, *rows: Any) -> Path:
    """JSON lines, gzipped if the name says so; a row that is bytes stands as it is."""
    lines = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def qa_row(number: int, title: str = "Rivers", source: str = "wiki") -> dict[str, Any]:
    context = f"{title} {number} is {'very ' * (number % 7)}long."
    question, answers = f"Which is river {number}?", [f"{title} {number}"]
    return {
        "source": source, "doc_id": f"{title}-{number}", "title": title, "context": context, "question": question,
        "answers": answers,
    }  # fmt: skip


@pytest.fixture
def rivers(tmp_path: Path) -> Path:
    """12 contexts of 4 to 10 words under one title, each asked about twice; one context under another."""
    rows = [qa_row(number % 12) for number in range(ROWS)]
    return write(tmp_path / "qa.jsonl.gz", *rows, qa_row(1, "Lakes", "atlas"))


def read_rivers(path: Path, tokens: int = 30, **options: Any) -> list[Item]:
    return read_qa(path, context_tokens=tokens, count=words, **options)


class TestQuestionsAmongDistractors:
    def test_the_right_context_is_always_there_among_others_of_its_title(self, rivers: Path) -> None:
        *items, lake = read_rivers(rivers)
        for item in items:
            assert qa_row(int(item.answers[0].split()[1]))["context"] in item.context
            assert all(passage.startswith("Rivers") for passage in item.context)
            assert len(item.context) > 1
            assert len(set(item.context)) == len(item.context)
        assert lake.context == (qa_row(1, "Lakes")["context"],)

    @pytest.mark.parametrize("tokens", [11, 30, 45])
    def test_the_tokens_are_filled_as_far_as_a_context_fits(self, rivers: Path, tokens: int) -> None:
        contexts = {qa_row(number)["context"] for number in range(12)}
        for item in read_rivers(rivers, tokens)[:ROWS]:
            used = words("\n".join(item.context))
            assert used <= tokens
            assert all(used + words(other) > tokens for other in contexts - {*item.context})

    def test_the_line_ends_between_passages_count(self, rivers: Path) -> None:
        for item in read_qa(rivers, context_tokens=100, count=len):
            assert len("\n".join(item.context)) <= 100

    def test_a_context_that_is_too_long_stands_alone(self, rivers: Path) -> None:
        assert all(len(item.context) == 1 for item in read_rivers(rivers, 3))

    def test_contexts_without_title_are_not_mixed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "qa.jsonl", *({**qa_row(number), "title": ""} for number in range(5)))
        assert [len(item.context) for item in read_rivers(path)] == [1] * 5

    def test_the_right_context_may_stand_anywhere(self, rivers: Path) -> None:
        positions = {
            item.context.index(qa_row(int(item.answers[0].split()[1]))["context"]) for item in read_rivers(rivers)[:-1]
        }
        assert positions >= {0, 1, 2}

    def test_an_item_does_not_depend_on_the_limit(self, rivers: Path) -> None:
        every = read_rivers(rivers)
        assert len({item.id for item in every}) == len(every) == ROWS + 1
        some, more = read_rivers(rivers, limit=5), read_rivers(rivers, limit=9)
        assert len(some) == 5
        assert [item for item in more if item in some] == some
        assert [item for item in every if item in more] == more

    def test_seeds_give_other_rows_and_other_distractors(self, rivers: Path) -> None:
        first, second = read_rivers(rivers, limit=5, seed=1), read_rivers(rivers, limit=5, seed=2)
        assert first == read_rivers(rivers, limit=5, seed=1)
        assert [item.id for item in first] != [item.id for item in second]
        assert read_rivers(rivers, seed=1)[0].context != read_rivers(rivers, seed=2)[0].context

    def test_a_limit_draws_evenly_from_the_sources(self, tmp_path: Path) -> None:
        rows = [qa_row(number, source="abc"[number % 10 // 4]) for number in range(20)]  # 8 of a, 8 of b, 4 of c
        path = write(tmp_path / "qa.jsonl", *rows)
        assert Counter(item.group for item in read_rivers(path, limit=9)) == {"a": 3, "b": 3, "c": 3}
        assert Counter(item.group for item in read_rivers(path, limit=18)) == {"a": 7, "b": 7, "c": 4}

    def test_where_keeps_rows_with_these_values(self, rivers: Path) -> None:
        assert [item.answers for item in read_rivers(rivers, where={"source": "atlas"})] == [("Lakes 1",)]
        with pytest.raises(InputError, match=rf"{rivers} has no row with .*oceans"):
            read_rivers(rivers, where={"source": "oceans"})

    def test_its_metrics_are_those_of_question_answering(self, rivers: Path) -> None:
        assert {item.metrics for item in read_rivers(rivers)} == {("f1", "exact_match", "contains")}


def long_row(number: int, **more: Any) -> dict[str, Any]:
    qa = [{"question": f"Question {one}?", "answers": [f"answer {one}"]} for one in range(6)]
    return {"doc_id": f"doc-{number}", "context": f"Head {number}\n\nFirst.\n \nSecond.", "qa": qa, **more}


class TestLongDocuments:
    def test_each_question_is_an_item_on_all_paragraphs(self, tmp_path: Path) -> None:
        items = read_long(write(tmp_path / "long.jsonl.gz", long_row(1, task="articles"))).items
        assert [item.id for item in items] == [f"doc-1 {number}" for number in range(1, 7)]
        metrics = ("f1", "exact_match", "contains")
        assert items[1] == Item(
            "doc-1 2", ("Head 1", "First.", "Second."), "Question 1?", ("answer 1",), metrics, "articles"
        )

    def test_sessions_are_the_passages_and_categories_the_groups(self, tmp_path: Path) -> None:
        sessions = ["[Session 1]\nA: hello", "[Session 2]\nB: bye"]
        qa = [{"question": "Who?", "answers": ["A"], "category": "temporal"}, {"question": "What?", "answers": ["bye"]}]
        row = long_row(1, sessions=sessions, qa=qa, task="talk")
        first, second = read_long(write(tmp_path / "long.jsonl", row)).items
        assert first.context == tuple(sessions)
        assert (first.group, second.group) == ("temporal", "talk")

    def test_questions_without_answer_are_left_out_and_counted(self, tmp_path: Path) -> None:
        asked = [
            {"question": "Who?", "answers": []},
            {"question": "What?", "answers": ["bye"]},
            {"question": "When?", "adversarial_answer": "now"},
        ]
        path = write(tmp_path / "long.jsonl", long_row(1, qa=asked), long_row(2, qa=asked[:1]), long_row(3))
        read = read_long(path, limit=1)
        assert read.left_out == {"no answer": 3}
        assert {item.id for item in read_long(path).items} == {"doc-1 2", *(f"doc-3 {one}" for one in range(1, 7))}

    def test_the_metric_is_the_one_that_the_row_names(self, tmp_path: Path) -> None:
        names = ["exam", "rouge", "f1", "contains"]
        rows = [long_row(number, metric=name) for number, name in enumerate(names)]
        items = read_long(write(tmp_path / "long.jsonl", *rows)).items
        assert [item.metrics for item in items[::6]] == [("exam",), ("rouge_l",), ("f1",), ("contains",)]

    def test_documents_for_other_judges_are_left_out_and_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "long.jsonl", long_row(1, metric="LLM"), long_row(2, metric="human"), long_row(3))
        read = read_long(path)
        assert read.left_out == {"judged by LLM": 6, "judged by human": 6}
        assert {item.id.split()[0] for item in read.items} == {"doc-3"}

    def test_an_unknown_metric_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"long.jsonl, line 1: 'metric' is 'bleu'.*exam"):
            read_long(write(tmp_path / "long.jsonl", long_row(1, metric="bleu")))

    def test_limits_draw_documents_evenly_from_tasks_and_questions_from_each(self, tmp_path: Path) -> None:
        rows = [long_row(number, task="ab"[number % 5 // 4]) for number in range(10)]  # 8 of a, 2 of b
        path = write(tmp_path / "long.jsonl", *rows)
        every, some = read_long(path).items, read_long(path, limit=4, questions=3, seed=5).items
        for seed in range(5):
            drawn = read_long(path, limit=4, questions=3, seed=seed).items
            assert Counter(item.group for item in drawn) == {"a": 6, "b": 6}
        assert set(Counter(item.id.split()[0] for item in some).values()) == {3}
        assert some == tuple(item for item in every if item in some)  # in the order of the file
        assert some == read_long(path, limit=4, questions=3, seed=5).items
        assert some != read_long(path, limit=4, questions=3, seed=6).items
        assert len({item.id.split()[1] for item in some}) > 3  # not the same questions of each


def longbench_row(dataset: str, **more: Any) -> dict[str, Any]:
    row = {"input": "Which?", "context": "One.\nTwo.", "answers": ["One"], "all_classes": None, "length": 2}
    return {**row, "dataset": dataset, "language": "en", "_id": "f00", **more}


class TestLongBench:
    def test_a_row_becomes_an_item(self, tmp_path: Path) -> None:
        (item,) = read_longbench(write(tmp_path / "lb.jsonl", longbench_row("hotpotqa_e", answers=["One", "1"])))
        assert item == Item("hotpotqa f00", ("One.", "Two."), "Which?", ("One", "1"), ("f1",), "hotpotqa")

    def test_tasks_without_input_say_what_they_want(self, tmp_path: Path) -> None:
        rows = [longbench_row("gov_report", input=""), longbench_row("lcc", input="")]
        report, code = read_longbench(write(tmp_path / "lb.jsonl", *rows))
        assert (report.metrics, code.metrics) == (("rouge_l",), ("code_similarity",))
        assert "summary" in report.question
        assert "next line" in code.question

    def test_instructions_go_with_the_input_as_it_is(self, tmp_path: Path) -> None:
        (item,) = read_longbench(write(tmp_path / "lb.jsonl", longbench_row("repobench-p", input="f = {x}")))
        assert item.question.endswith("\nf = {x}")

    def test_classes_reach_the_metric(self, tmp_path: Path) -> None:
        row = longbench_row("trec", answers=["Date"], all_classes=["City", "Date", "Food"])
        (item,) = read_longbench(write(tmp_path / "lb.jsonl", row))
        assert item.answers == ("Date", "City", "Food")
        assert METRICS[item.metrics[0]]("Date or Food", item.answers) == 1 / 2

    @pytest.mark.parametrize("more", [{"all_classes": None}, {"answers": ["Date", "Food"], "all_classes": ["Date"]}])
    def test_a_classification_needs_classes_and_one_right_one(self, tmp_path: Path, more: Mapping[str, Any]) -> None:
        with pytest.raises(InputError, match=r"lb.jsonl, line 1: '(all_classes|answers)' is"):
            read_longbench(write(tmp_path / "lb.jsonl", longbench_row("trec", **more)))

    @pytest.mark.parametrize("dataset", ["dureader", "lsht", "squad"])
    def test_data_sets_without_metric_are_refused(self, tmp_path: Path, dataset: str) -> None:
        with pytest.raises(InputError, match=rf"lb.jsonl, line 2: data set '{dataset}'.*Chinese.*hotpotqa"):
            read_longbench(write(tmp_path / "lb.jsonl", longbench_row("qasper"), longbench_row(dataset)))


class TestKeysAndValues:
    def row(self, place: int) -> dict[str, Any]:
        """Ten pairs, the one that is asked for at `place`, between braces."""
        pairs = [f'"key {number}": "value {number}"' for number in range(10)]
        context = "\n".join(["{", *pairs, "}"])
        answers = [f"value {place}"]
        return {"doc_id": f"kv-{place}", "context": context, "question": f"key {place}?", "answers": answers}

    def test_passages_are_lines_and_groups_tell_where_the_value_stands(self, tmp_path: Path) -> None:
        items = read_kv_retrieval(write(tmp_path / "kv.jsonl.gz", self.row(0), self.row(5), self.row(9)))
        assert [len(item.context) for item in items] == [12] * 3
        assert "\n".join(items[0].context) == self.row(0)["context"]
        assert [item.group for item in items] == ["0-20 %", "40-60 %", "80-100 %"]
        assert {item.metrics for item in items} == {("contains",)}

    def test_a_limit_draws_rows_in_their_order(self, tmp_path: Path) -> None:
        path = write(tmp_path / "kv.jsonl", *map(self.row, range(10)))
        ids = [item.id for item in read_kv_retrieval(path, limit=4)]
        assert len(ids) == 4
        assert ids == sorted(ids)
        assert ids != [item.id for item in read_kv_retrieval(path, limit=4, seed=1)]

    def test_a_value_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"kv.jsonl, line 1: .*'nowhere'"):
            read_kv_retrieval(write(tmp_path / "kv.jsonl", {**self.row(1), "answers": ["nowhere"]}))


def test_texts_have_their_id_or_their_number(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", {"id": "clara", "text": "One."}, {"text": "Two."}, {"text": "Three."})
    assert read_texts(path, 2) == [("clara", "One."), ("2", "Two.")]
    assert len(read_texts(path)) == 3


READERS: list[tuple[Callable[[Path], Any], dict[str, Any]]] = [
    (read_rivers, qa_row(1)),
    (read_long, long_row(1)),
    (read_longbench, longbench_row("qasper")),
    (read_kv_retrieval, {"doc_id": "kv", "context": "a: b", "question": "a?", "answers": ["b"]}),
    (read_texts, {"text": "One."}),
]


@pytest.mark.parametrize(("read", "row"), READERS)
class TestErrors:
    """Each lora, given a good row and a bad one."""

    @pytest.mark.parametrize("bad", [b'{"text": ', b"\xff", b"[1]", b"", b"{}", b'{"text": "\\ud800"}'])
    @pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
    def test_a_bad_row_is_named(
        self, read: Callable[[Path], Any], row: dict[str, Any], tmp_path: Path, name: str, bad: bytes
    ) -> None:
        with pytest.raises(InputError, match=rf"{name}, line 2: "):
            read(write(tmp_path / name, row, bad))

    def test_a_field_that_is_missing_or_of_another_kind_is_named(
        self, read: Callable[[Path], Any], row: dict[str, Any], tmp_path: Path
    ) -> None:
        read(write(tmp_path / "data.jsonl", row))
        for key in row.keys() & {"context", "question", "answers", "qa", "text", "dataset"}:
            for value in (None, "", 7, [], [7]):
                path = write(tmp_path / "data.jsonl", row, {**row, key: value})
                with pytest.raises(InputError, match=rf"data.jsonl, line 2: '{key}' is .*, but must be"):
                    read(path)

    def test_a_file_that_is_cut_off_is_named_with_the_line(
        self, read: Callable[[Path], Any], row: dict[str, Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path / "data.jsonl.gz", row)
        path.write_bytes(path.read_bytes()[:-8])  # without its checksum
        with pytest.raises(InputError, match=r"data.jsonl.gz, line 2: cannot be read"):
            read(path)

    def test_a_file_that_is_damaged_is_named_with_the_line(
        self, read: Callable[[Path], Any], row: dict[str, Any], tmp_path: Path
    ) -> None:
        path = write(tmp_path / "data.jsonl.gz", row)
        path.write_bytes(path.read_bytes()[:10] + b"\xff" * 20)  # a header, and what no compressor writes
        with pytest.raises(InputError, match=r"data.jsonl.gz, line 1: cannot be read"):
            read(path)


@pytest.mark.parametrize("read", [read for read, _ in READERS])
def test_a_file_that_does_not_exist_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl does not exist"):
        read(tmp_path / "nowhere.jsonl")


def test_bad_answers_of_a_long_document_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", long_row(1), long_row(2, qa=[{"question": "Who?", "answers": [7]}]))
    with pytest.raises(InputError, match=r"long.jsonl, line 2: 'answers' is \[7\]"):
        read_long(path)


def test_a_row_without_the_key_of_where_is_refused(rivers: Path) -> None:
    with pytest.raises(InputError, match=rf"{rivers}, line 1: 'split' is missing"):
        read_rivers(rivers, where={"split": "dev"})


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(rivers: Path, limit: int) -> None:
    with pytest.raises(InputError, match=f"limit={limit}"):
        read_rivers(rivers, limit=limit)


def test_questions_of_titles_are_asked_of_their_own_and_of_other_documents(tmp_path: Path) -> None:
    rows = [
        {"title": title, "context": f"{title} {n}", "question": f"{title} {n}?", "answers": [str(n)]}
        for title in ("Rivers", "Hills", "Towns")
        for n in range(10)
    ]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = read_support(file, limit=8, seed=1)
    assert items.texts["Hills"] == "\n\n".join(f"Hills {n}" for n in range(10))
    own = [one for one in items.asked if one.answers]
    others = [one for one in items.asked if not one.answers]
    assert (len(own), len(others)) == (8, 8)
    assert all(one.question.startswith(one.document) for one in own)
    assert not any(one.question.startswith(one.document) for one in others)
    assert {one.id for one in own}.isdisjoint(one.id for one in others)
    assert read_support(file, limit=8, seed=1) == items
    two = read_support(file, documents=2)
    assert len(two.texts) == 2
    assert {one.document for one in two.asked} == two.texts.keys()


def test_questions_without_answers_ask_for_what_is_not_there(tmp_path: Path) -> None:
    qa = [{"question": "Where?", "answers": ["here"]}, {"question": "Who?", "answers": []}]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"doc_id": "talk", "sessions": ["One.", "Two."], "context": "", "qa": qa}))
    items = read_support(file)
    assert items.texts == {"talk": "One.\n\nTwo."}
    assert [(one.id, one.document, one.answers) for one in items.asked] == [
        ("talk 1", "talk", ("here",)),
        ("talk 2", "talk", ()),
    ]
    file.write_text(json.dumps({"doc_id": "talk", "context": "One.", "qa": qa[:1]}))
    with pytest.raises(InputError, match="must have questions with answers and without"):
        read_support(file)
