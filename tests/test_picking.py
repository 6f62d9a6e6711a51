"""Choosing documents: what is made of the passages that a picker finds, and which pickers there are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from catalog_samples import add
from installed import install
from repository import ROOT
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import (
    BeaconMemory,
    ConfigError,
    Document,
    DocumentNotFoundError,
    Passage,
    Query,
)
from beacon_memory.config import BeaconConfig
from beacon_memory.documents import SESSION_TAG
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.picking import asked_about, excerpts, find_picker, fitting, in_context, last_question

SHORT: dict[str, Any] = {"max_new_tokens": 4}
TEXTS = {"roof": "The roof is of larch.", "well": "The well is deep.", "owls": "The owls leave in autumn."}


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    settings = BeaconConfig(beacon_window=32)
    return tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=512)


class Scores:
    """A picker whose passages are known; it notes what it is asked."""

    def __init__(self, *scores: tuple[str, float]) -> None:
        self.scores = scores
        self.asked: list[Query] = []

    def __call__(self, query: Query) -> Iterator[Passage]:
        self.asked.append(query)
        for start, (id, score) in enumerate(self.scores):
            yield Passage(id, start, start + 3, score)


def filled(folder: Path, model: BeaconModel | None, picker: Any, texts: dict[str, str] = TEXTS) -> BeaconMemory:
    memory = BeaconMemory(folder, model, reserve=50, picker=picker)
    memory.add_many([Document(id, text) for id, text in texts.items()], ratio=2)
    return memory


def picked(memory: BeaconMemory, question: Any = "?", **options: Any) -> list[str]:
    return [pick.id for pick in memory.pick(question, **options)]


def test_documents_come_in_the_order_of_their_best_passages(model: BeaconModel, tmp_path: Path) -> None:
    picker = Scores(("well", 5.0), ("owls", 7.0), ("well", 9.0), ("owls", 6.0))
    well, owls = filled(tmp_path, model, picker).pick("Who?")
    assert [well.id, owls.id] == ["well", "owls"]
    assert [passage.score for passage in well.passages] == [9.0, 5.0]
    assert (well.best, owls.best) == (Passage("well", 2, 5, 9.0), Passage("owls", 1, 4, 7.0))
    assert picker.asked[0].text == "Who?"


def test_document_with_less_than_half_the_best_score_is_left_out(model: BeaconModel, tmp_path: Path) -> None:
    assert picked(filled(tmp_path, model, Scores(("roof", 4.9), ("well", 10.0), ("owls", 5.0)))) == ["well", "owls"]


@pytest.mark.parametrize("score", [0.0, -1.0, math.nan])
def test_passage_without_a_score_above_zero_is_none(model: BeaconModel, tmp_path: Path, score: float) -> None:
    assert picked(filled(tmp_path, model, Scores(("roof", score), ("well", 0.1)))) == ["well"]


def test_what_a_picker_finds_elsewhere_or_in_a_conversation_is_left_out(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, Scores(("talk", 99.0), ("gone", 98.0), ("../bob/key", 97.0), ("roof", 1.0)))
    memory.add_many([Document("talk", "The roof, you said?", tags=[SESSION_TAG])], ratio=2)
    memory.within("bob").add("gone", "Of another namespace.", ratio=2)
    assert picked(memory) == ["roof"]
    assert {row.id for row in memory._recollection.query("", 1).documents()} == set(TEXTS)


def test_rules_about_documents_hold_however_many_passages_others_have(model: BeaconModel, tmp_path: Path) -> None:
    manual = "The manual of the pump. " + "Prime it before use. " * 10
    book = "\n\n".join(f"Page {n} on the pump. " + "The pump runs and runs. " * 35 for n in range(80))
    memory = filled(tmp_path, model, "text", {"well": "The well has a pump.", "manual": manual})
    catalog = memory.store.parts.catalog()
    row = add(catalog, "book", book)  # the model has no room for it, but it can be picked
    (memory.store.folder / row.file).touch()
    for n in range(60):
        add(catalog, f"talk/{n}", f"The pump, the pump! {n}", tags=(SESSION_TAG,))
    assert sorted(picked(memory, "What of the pump?")) == ["book", "manual", "well"]
    assert picked(memory, "What of the pump?", limit=1) == picked(memory, "What of the pump?")[:1]
    (one, *_) = [pick for pick in memory.pick("What of the pump?") if pick.id == "book"]
    assert 1 < len(one.passages) <= 50


@pytest.mark.parametrize("picker", ["text", Scores(("a", 4.0), ("b", 4.0), ("c", 4.0), ("well", 3.0), ("a", 2.0))])
def test_text_under_several_ids_takes_one_place_under_its_newest_row(
    model: BeaconModel, tmp_path: Path, picker: Any
) -> None:
    copies = dict.fromkeys("abc", "Larch pump, larch pump.")
    memory = filled(tmp_path, model, picker, {**copies, "well": "A pump, a larch.", "owls": TEXTS["owls"]})
    assert picked(memory, "Where is the larch pump?", limit=2) == ["c", "well"]
    memory.store.update("a", tags=["moved"])
    assert picked(memory, "Where is the larch pump?", limit=2) == ["a", "well"]
    assert picked(memory, "Where is the larch pump?", limit=1) == ["a"]
    for id in ("a", "well"):
        memory.remove(id)
    assert picked(memory, "Where is the larch pump?") == ["c"]


def test_names_that_are_question_words_find_documents(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, "text", {"may": "The fair is in May.", "june": "The race is in June."})
    assert memory.ask("What happens in May?", **SHORT).ids == memory.ask("what happens in may", **SHORT).ids == ("may",)
    assert picked(memory, "What is in the cellar?") == []


def test_words_of_sentences_without_spaces_find_documents(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(
        tmp_path, model, "text", {"rent": "磨坊的租金由磨坊主艾达支付。", "roof": "谷仓的屋顶是三月修好的。"}
    )
    assert picked(memory, "谁支付租金？") == picked(memory, "租金") == ["rent"]  # noqa: RUF001 -- this mark is meant


def test_only_document_needs_no_passage_and_counts_by_its_beginning(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, Scores(), {"roof": TEXTS["roof"]})
    (only,) = memory.pick("Zebras?")
    assert only.passages == (Passage("roof", 0, len(TEXTS["roof"]), 0.0),)
    assert [text for _, text in excerpts(memory.store, [only])] == [TEXTS["roof"]]
    memory.add("moved", TEXTS["roof"], ratio=2)
    assert picked(memory, "Zebras?") == ["moved"]
    memory.add("well", TEXTS["well"], ratio=2)
    assert memory.pick("Zebras?") == []


def test_excerpt_is_the_best_passage_and_a_removed_document_has_none(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, Scores(("well", 2.0), ("roof", 3.0)))
    picks = memory.pick("?")
    memory.remove("well")
    assert [(pick.id, text) for pick, text in excerpts(memory.store, picks)] == [("roof", TEXTS["roof"][1:4])]


def test_picker_is_asked_in_the_namespace_of_the_memory(model: BeaconModel, tmp_path: Path) -> None:
    picker = Scores(("roof", 1.0))
    memory = filled(tmp_path, model, picker)
    assert picked(memory.within("bob")) == []
    assert picker.asked[-1].store.namespace == "bob"
    assert picker.asked[-1].model is model


def test_picker_can_read_documents_and_their_passages(model: BeaconModel, tmp_path: Path) -> None:
    picker = Scores()
    memory = filled(tmp_path, model, picker, {"short": "One."})
    memory.add("long", "A sentence of some length. " * 60, ratio=8)
    memory.pick("?")
    (query,) = picker.asked
    assert [row.id for row in query.documents()] == ["long", "short"]
    pieces = list(query.passages("long"))
    assert len(pieces) > 1
    assert "".join(text for _, _, text in pieces) == memory.store.text("long")
    assert all(memory.store.text("long")[start:stop] == text for start, stop, text in pieces)


def test_found_documents_share_what_there_is_and_named_ones_are_loaded_in_part(
    model: BeaconModel, tmp_path: Path
) -> None:
    long = {id: f"{id} " * 110 for id in ("one", "two", "six")} | {"four": "four"}
    memory = filled(tmp_path, model, Scores(("one", 9.0), ("two", 8.0), ("six", 7.0), ("four", 6.0)), long)
    assert 2 * memory.show("two").slots < model.max_positions < sum(row.slots for row in memory.list())
    answer = memory.ask("Which?", limit=4, **SHORT)
    assert answer.ids == ("one", "two", "six", "four")
    assert answer.usage.slots <= 1 + memory.room("Which?", **SHORT)
    assert memory.ask("Which?", list(long), **SHORT).ids == tuple(long)
    assert memory.ask("Which?", limit=4, budget="x4", **SHORT).ids == ("one", "two", "six", "four")
    assert memory.ask("Which?", list(long), budget="x4", **SHORT).ids == tuple(long)


def test_room_is_what_a_question_and_its_answer_leave(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, "text", {"roof": "larch " * 150})
    slots = memory.show("roof").slots
    spare = memory.room("Which?", max_new_tokens=4) - slots
    assert memory.ask("Which?", "roof", max_new_tokens=4 + spare, eos_token_id=None, stop=["e"]).ids == ("roof",)
    more = memory.ask("Which?", "roof", max_new_tokens=5 + spare, eos_token_id=None, stop=["e"])
    assert more.usage.slots <= slots  # with the sink: a slot had to go


def test_something_is_always_left_to_answer_from(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, "text")
    rows = memory.list()
    assert fitting(rows, rows[0].slots) == fitting(rows, 0) == rows[:1]
    assert fitting(rows, rows[0].slots + rows[1].slots) == rows[:2]


def test_conversation_is_searched_for_by_its_last_question(model: BeaconModel, tmp_path: Path) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Are there owls?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How deep is the well?"},
    ]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    later = [*turns, called, {"role": "tool", "content": "roof"}]
    memory = filled(tmp_path, model, "text")
    assert picked(memory, turns) == picked(memory, later) == ["well"]
    assert last_question([{"role": "system", "content": "Be brief."}]) == "Be brief."


def test_nothing_found_is_an_error_where_an_answer_is_wanted(model: BeaconModel, tmp_path: Path) -> None:
    memory = filled(tmp_path, model, Scores())
    with pytest.raises(DocumentNotFoundError, match="no document matches the question; name documents by id"):
        memory.ask("?", **SHORT)


def test_unknown_picker_is_refused_at_once_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"picker='texts' must be one of 'attention', 'text'"):
        BeaconMemory(tmp_path, picker="texts")
    with pytest.raises(ConfigError, match=r"picker=7 must be a name, or something to call"):
        find_picker(7)  # type: ignore[arg-type]


def test_installed_picker_is_found_by_its_name(
    model: BeaconModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from beacon_memory import Passage\n\ndef make():\n    return lambda query: [Passage('owls', 0, 1, 1.0)]\n"
    points = {"owls": "outside:make", "broken": "outside:absent", "number": "outside:int"}
    install(tmp_path / "site", monkeypatch, "outside", code, **points)
    assert picked(filled(tmp_path / "store", model, "owls"), "Where is the roof?") == ["owls"]
    with pytest.raises(ConfigError, match=r"must be one of 'attention', 'broken', 'number', 'owls', 'text'"):
        find_picker("hawks")
    with pytest.raises(ConfigError, match=r"picker='broken', outside:absent, cannot be loaded: AttributeError"):
        find_picker("broken")


def test_example_of_a_picker_runs_from_outside_the_package(
    model: BeaconModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (ROOT / "examples" / "extend" / "picker.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40
    install(tmp_path / "site", monkeypatch, "picker", code, embeddings="picker:ByEmbeddings")
    texts = {"sums": "17 + 25 = 42", "owls": "owls hoot", "wells": "WELLS ARE DEEP"}
    filled(tmp_path / "store", model, "text", texts)
    by_words = BeaconMemory(tmp_path / "store", model)
    by_likeness = BeaconMemory(tmp_path / "store", model, picker="embeddings")
    for question, document in (("3 + 9 = 12", "sums"), ("WELLL DEEEP", "wells"), ("owlz", "owls")):
        best = by_likeness.pick(question)[0]
        assert (best.id, best.best.stop) == (document, len(texts[document]))
        assert by_words.pick(question) == []
    assert by_likeness.ask("3 + 9 = 12", **SHORT).ids[0] == "sums"
    assert by_likeness.within("bob").pick("3 + 9 = 12") == []


def test_picker_on_its_page_runs(model: BeaconModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending" / "pickers.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "pickers.md", "exec"), names)  # noqa: S102  # our own document
    memory = filled(tmp_path / "store", model, names["newest"])
    assert sorted(picked(memory)) == sorted(TEXTS)  # all of them are from today


def test_a_conversation_asks_about_the_last_turns_of_the_user() -> None:
    turns = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "Be brief."),
            ("user", "first"),
            ("user", "second"),
            ("assistant", "yes"),
            ("user", "third"),
            ("assistant", "no"),
            ("user", "fourth"),
            ("assistant", "so"),
        )
    ]
    assert asked_about(turns) == [("fourth", 1.0), ("third", 0.4), ("second", 0.2)]
    assert asked_about(turns[:2]) == [("first", 1.0)]
    assert asked_about("Where?") == [("Where?", 1.0)]
    assert asked_about(turns[:1]) == [("Be brief.", 1.0)]


def found(**scores: float) -> list[Passage]:
    return [Passage(id, 0, 10, score) for id, score in scores.items()]


def test_what_turns_before_the_question_find_counts_for_less_whatever_their_scores() -> None:
    joined = {one.document: one.score for one in in_context([(found(a=4, b=2), 1.0), (found(b=90, c=45, d=0), 0.5)])}
    assert joined == {"a": 4.0, "b": 2.0 + 0.5 * 4, "c": 0.25 * 4}


def test_where_the_question_finds_nothing_the_turns_before_it_decide() -> None:
    joined = {one.document: one.score for one in in_context([(found(), 1.0), (found(a=6, b=3), 0.5)])}
    assert joined == {"a": 3.0, "b": 1.5}
    assert in_context([([], 1.0), ([], 0.5)]) == []


@pytest.mark.parametrize(
    ("question", "ids", "looks"),
    [
        ("Is the roof of larch?", ("roof", "well"), False),
        ("How steep is the roof towards the garden?", ("roof", "well"), True),  # one of three words
        ("Who sang?", ("roof", "well"), False),  # no word: it may be about all of them
        ("How steep is the roof towards the garden?", None, False),  # words say which documents
    ],
)
def test_the_model_is_asked_where_words_do_not_tell(
    model: BeaconModel, tmp_path: Path, question: str, ids: tuple[str, ...] | None, looks: bool
) -> None:
    asked: list[Sequence[str]] = []

    def look(_text: str, ids: Sequence[str]) -> list[Passage]:
        asked.append(ids)
        return [Passage("roof", 0, 23, 0.1), Passage("well", 0, 17, 0.9)]

    store = filled(tmp_path, model, "text").store
    query = Query(question, store, 50, lambda: model, None, ids, look)
    by_words, found = ([*find_picker(name)(query)] for name in ("text", "attention"))
    assert asked == [ids] * looks
    if looks:
        assert [one.document for one in by_words] == ["roof"]
        assert [(one.document, one.score > 0) for one in found] == [("roof", True), ("well", True)]
    else:
        assert found == by_words
