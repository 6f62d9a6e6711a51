from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from training_samples import QA, TEXT, TEXTS, write_rows

from beacon_memory.errors import InputError
from beacon_memory.training import DataSource
from beacon_memory.training.rows import Context, Question, contexts_by_title, load_rows, texts

PASSAGE = {"context": "The mill is old.", "question": "How old?", "answers": ["very"]}


def read(data: Path, source: DataSource, rows: list[Any]) -> Any:
    """Write rows to the file of `source`, and read them from there."""
    write_rows(data / source.path, rows)
    found = load_rows(source, data)
    return texts(found, source.where) if source.kind == "text" else contexts_by_title(found, source.where)


class TestTexts:
    def test_they_come_in_the_order_of_the_file_plain_or_gzipped(self, data: Path) -> None:
        packed = gzip.compress((data / "text.jsonl").read_bytes())
        (data / "packed.jsonl.gz").write_bytes(packed)
        for name in ("text.jsonl", "packed.jsonl.gz"):
            assert texts(load_rows(DataSource(path=name, kind="text"), data), {}) == TEXTS

    def test_only_those_that_the_recipe_chooses(self, data: Path) -> None:
        rows = [{"text": "a", "year": 1, "lang": "en"}, {"text": "b", "year": 2, "lang": "en"}]
        source = DataSource(path="text.jsonl", kind="text", where={"lang": "en", "year": 2})
        assert read(data, source, rows) == ["b"]

    def test_rows_that_are_not_chosen_may_lack_everything(self, data: Path) -> None:
        source = DataSource(path="text.jsonl", kind="text", where={"lang": "en"})
        assert read(data, source, [{"text": "a", "lang": "en"}, {"text": None, "lang": "de"}]) == ["a"]

    def test_a_name_that_is_no_file_is_a_data_set_of_the_hub(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, str]] = []

        def load(name: str, *, split: str) -> Dataset:
            asked.append((name, split))
            return Dataset.from_list([{"text": "a"}, {"text": ""}])

        monkeypatch.setattr("beacon_memory.training.rows.load_dataset", load)
        rows = load_rows(DataSource(path="some/data", kind="text", split="dev"), data)
        assert asked == [("some/data", "dev")]
        with pytest.raises(InputError, match="some/data, line 2: 'text' is ''"):
            texts(rows, {})


class TestQuestions:
    def test_contexts_of_one_title_are_grouped(self, data: Path) -> None:
        rows = [{**PASSAGE, "title": "a"}, {**PASSAGE, "title": "b"}, {**PASSAGE, "title": "a", "context": "New."}]
        asked = (Question("How old?", ("very",)),)
        assert read(data, QA, rows) == {
            "a": [Context("The mill is old.", asked), Context("New.", asked)],
            "b": [Context("The mill is old.", asked)],
        }

    def test_questions_on_one_context_are_gathered(self, data: Path) -> None:
        rows = [PASSAGE, {**PASSAGE, "question": "Since when?", "answers": [" 1802 ", "ever"]}]
        (context,) = read(data, QA, rows)["The mill is old."]
        assert [one.question for one in context.questions] == ["How old?", "Since when?"]
        assert context.questions[1].answers == ("1802", "ever")

    def test_a_row_may_have_several_and_an_answer_be_one_text(self, data: Path) -> None:
        asked = [{"question": "How old?", "answers": "very"}, {"question": "Is it?", "answers": "yes"}]
        (context,) = read(data, QA, [{"context": "The mill is old.", "qa": asked}])["The mill is old."]
        assert context.questions == (Question("How old?", ("very",)), Question("Is it?", ("yes",)))


class TestErrors:
    @pytest.mark.parametrize(
        ("source", "bad", "complaint"),
        [
            (TEXT, {"other": "a"}, "'text' is None"),
            (TEXT, {"text": " \n"}, "'text' is ' .n', but must be a text that is not empty"),
            (QA, {**PASSAGE, "context": ""}, "'context' is ''"),
            (QA, {**PASSAGE, "question": None}, "'question' is None"),
            (QA, {**PASSAGE, "answers": []}, r"'answers' is \[\], but must be one or more texts"),
            (QA, {**PASSAGE, "answers": ["yes", ""]}, r"'answers' is \['yes', ''\]"),
            (QA, {**PASSAGE, "answers": None}, "'answers' is None"),
        ],
    )
    def test_they_name_file_and_line(self, data: Path, source: DataSource, bad: dict[str, Any], complaint: str) -> None:
        good = {"text": "a"} if source is TEXT else PASSAGE
        with pytest.raises(InputError, match=rf"{source.path}, line 3: {complaint}"):
            read(data, source, [good, good, bad])

    @pytest.mark.parametrize(
        ("asked", "complaint"),
        [([], r"'qa' is \[\]"), ([{"question": "Why?"}], "'answers' is None"), ("Why?", "'qa' is 'Why.'")],
    )
    def test_a_context_needs_questions_with_answers(self, data: Path, asked: Any, complaint: str) -> None:
        with pytest.raises(InputError, match=rf"qa\.jsonl, line 1: {complaint}"):
            read(data, QA, [{"context": "The mill is old.", "qa": asked}])

    def test_a_key_to_choose_by_must_be_there(self, data: Path) -> None:
        with pytest.raises(InputError, match=r"text\.jsonl, line 1: 'lang' is missing, by which the recipe chooses"):
            read(data, DataSource(path="text.jsonl", kind="text", where={"lang": "en"}), [{"text": "a"}])

    @pytest.mark.parametrize("broken", ['{"text": "b"', "[1]", '{"text": "b"} tail'])
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_line_that_is_no_json_object_is_named(self, data: Path, broken: str, packed: bool) -> None:
        name = "text.jsonl.gz" if packed else "text.jsonl"
        content = f"{json.dumps({'text': 'a'})}\n\n{broken}\n".encode()
        (data / name).write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(InputError, match=rf"{name}, line 3: not a JSON object"):
            load_rows(DataSource(path=name, kind="text"), data)

    def test_a_file_in_another_encoding_is_named(self, data: Path) -> None:
        (data / "text.jsonl").write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
        with pytest.raises(InputError, match=r"text\.jsonl is not in UTF-8"):
            texts(load_rows(TEXT, data), {})

    def test_a_damaged_or_empty_file_is_named(self, data: Path) -> None:
        (data / "cut.jsonl.gz").write_bytes(gzip.compress((data / "text.jsonl").read_bytes())[:-20])
        (data / "empty.jsonl").touch()
        for name in ("cut.jsonl.gz", "empty.jsonl"):
            with pytest.raises(InputError, match=rf"{name}"):
                load_rows(DataSource(path=name, kind="text"), data)

    def test_a_file_that_is_not_there_is_named(self, data: Path) -> None:
        with pytest.raises(InputError, match=r"the data file .*absent\.jsonl does not exist"):
            load_rows(DataSource(path="absent.jsonl", kind="text"), data)

    def test_a_name_that_is_neither_file_nor_on_the_hub_is_refused(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match=r"'no-one/no-data' is neither a file in .* nor on the hub"):
            load_rows(DataSource(path="no-one/no-data", kind="text"), data)
