"""A budget of a question: it is kept, spent where the question is, and only what is loaded is read."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from behind_memory import places
from damage import parts
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer, train

from beacon_memory import (
    Answer,
    BeaconMemory,
    CapacityError,
    CorruptFileError,
    FingerprintMismatchError,
    InputError,
    Passage,
    Query,
)
from beacon_memory.config import BeaconConfig
from beacon_memory.hot import HotMemories
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.recall import DEFAULT_SLOTS, Budget
from beacon_memory.recollection import Recollection
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.files.kv_file import read_index

ANIMALS = ("otter", "badger", "heron", "weasel", "falcon", "salmon", "beaver", "raven")
PLANTS = ("fern", "moss", "clover", "thistle")
WINDOW = 64
SHORT: dict[str, Any] = {"max_new_tokens": 4}


def about(names: tuple[str, ...]) -> str:
    """Paragraphs that are a passage each, of which every one has a word of its own."""
    rest = "It is seen by day and by night, and nobody in the village could tell us much more of it. " * 2
    return "".join(f"The {name} is found behind the mill. {rest}\n\n" for name in names)


TEXTS = {"animals": about(ANIMALS), "plants": about(PLANTS)}


def make_model(positions: int) -> BeaconModel:
    settings = BeaconConfig(beacon_window=WINDOW)
    return tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=positions)


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model(4096)


@pytest.fixture(scope="module")
def filled(model: BeaconModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "store"
    with BeaconMemory(folder, model, reserve=100) as memory:
        memory.add_many(list(TEXTS.items()), ratio=2)
    return folder


@pytest.fixture
def memory(filled: Path, model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(shutil.copytree(filled, tmp_path / "store"), model, reserve=100) as memory:
        yield memory


def index_of(memory: BeaconMemory, id: str) -> Any:
    return read_index(memory.store.folder / memory.show(id).file)


def check(memory: BeaconMemory, answer: Answer) -> None:
    """Sources are in order, within their texts, and add up to what was loaded."""
    where = [(answer.ids.index(one.document), one.start, one.stop) for one in answer.sources]
    assert where == sorted(where)
    entry = 2 * memory.model.kv_shape[-1] * 4 + 1  # bytes in float32
    for one in answer.usage.documents:
        assert one.passages == sum(source.document == one.id for source in answer.sources)
        assert one.slots == math.ceil(one.bytes / entry / math.prod(memory.model.kv_shape[:2]))
    slots = 1.0  # of the sink
    for id in answer.ids:
        text, sections = memory.store.text(id), index_of(memory, id).header.sections
        sizes = {(section.start, section.stop): section.size for section in sections}
        assert len(sizes) == len(sections)
        for one in (source for source in answer.sources if source.document == id):
            assert 0 <= one.start < one.stop <= len(text)
            assert 0 < one.loaded <= 1
            slots += one.loaded * sizes[one.start, one.stop]
    assert answer.usage.slots == math.ceil(round(slots, 6))


def best(memory: BeaconMemory, answer: Answer) -> str:
    """The text of the most relevant source."""
    source = max(answer.sources, key=lambda one: one.relevance)
    assert source.relevance > 0
    return memory.store.text(source.document)[source.start : source.stop]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (500, Budget(slots=500)),
        ("500", Budget(slots=500)),
        ("64MB", Budget(nbytes=64_000_000)),
        (" 1.5 GiB ", Budget(nbytes=3 << 29)),
        ("10kb", Budget(nbytes=10_000)),
        ("x16", Budget(ratio=16.0)),
        ("X 2.5", Budget(ratio=2.5)),
        ("x1", Budget(ratio=1.0)),
    ],
)
def test_a_budget_is_a_number_of_slots_or_bytes_or_a_ratio(budget: int | str, expected: Budget) -> None:
    assert Budget.of(budget) == expected


@pytest.mark.parametrize(
    "budget", [0, -1, "0", "-5", True, 2.5, "", "x", "x0", "x0.5", "x-2", "0MB", "64TB", "MB", "some", "16x", [8], None]
)
def test_what_is_no_budget_is_refused_with_those_that_are(memory: BeaconMemory, budget: Any) -> None:
    with pytest.raises(InputError, match=r"budget=.* must be a number of memory slots, bytes as '64MB', or a ratio"):
        Budget.of(budget)
    if budget is not None:
        with pytest.raises(InputError, match="budget="):
            memory.ask("Where is the otter?", "animals", budget=budget, **SHORT)


def test_a_budget_says_how_many_slots_it_allows() -> None:
    assert Budget.of(70).slots_for(1000, 64) == 70
    assert Budget.of("x16").slots_for(1000, 64) == 63
    assert Budget.of("1kB").slots_for(1000, 64) == 15


@pytest.mark.parametrize("ids", ["animals", ["plants", "animals"]], ids=["one document", "two documents"])
@pytest.mark.parametrize("budget", ["x2.5", "x4", "x8", "x64", 300, 41, 1, "200KB"])
def test_no_more_is_loaded_than_the_budget_allows(memory: BeaconMemory, budget: int | str, ids: Any) -> None:
    answer = memory.ask("Where is the otter?", ids, budget=budget, **SHORT)
    layers, kv_heads, head_dim = memory.model.kv_shape
    slot_bytes = layers * kv_heads * (2 * head_dim * 4 + 1)  # keys and values in float32, and a place
    tokens = sum(memory.show(id).tokens for id in answer.ids)
    allowed = Budget.of(budget).slots_for(tokens, slot_bytes)
    assert allowed < sum(memory.show(id).slots for id in answer.ids)
    assert answer.usage.slots - 1 <= allowed
    if allowed > 200:
        assert answer.usage.slots > allowed / 2
        assert "otter" in best(memory, answer)
    assert answer.usage.generated_tokens > 0
    check(memory, answer)


def test_without_a_budget_so_many_slots_are_loaded_where_the_question_is(memory: BeaconMemory) -> None:
    answer = memory.ask("Where is the otter?", "animals", **SHORT)
    asked = memory.ask("Where is the otter?", "animals", budget=DEFAULT_SLOTS, **SHORT)
    assert (answer.text, answer.sources, answer.usage.slots) == (asked.text, asked.sources, asked.usage.slots)
    assert DEFAULT_SLOTS - 50 < answer.usage.slots <= 1 + DEFAULT_SLOTS < memory.show("animals").slots
    check(memory, answer)


@pytest.mark.parametrize("question", ["Where is the yak?", "?"])
def test_without_a_budget_all_that_fits_is_loaded_where_nothing_is_found(memory: BeaconMemory, question: str) -> None:
    assert memory.ask(question, "animals", **SHORT).usage.slots == 1 + memory.show("animals").slots


def test_with_a_large_budget_all_is_loaded(memory: BeaconMemory) -> None:
    whole = memory.ask("Where is the otter?", "animals", budget="x1", **SHORT)
    for budget in (100_000, "1GB"):
        answer = memory.ask("Where is the otter?", "animals", budget=budget, **SHORT)
        assert answer.text == whole.text
        assert answer.usage.slots == 1 + memory.show("animals").slots
        assert {one.relevance for one in answer.sources} == {0.0}
        assert "".join(TEXTS["animals"][one.start : one.stop] for one in answer.sources) == TEXTS["animals"]
        check(memory, answer)


def test_a_question_that_matches_nothing_is_answered_from_all_of_a_named_document(memory: BeaconMemory) -> None:
    answer = memory.ask("Zebras?", "animals", budget="x8", **SHORT)
    assert {one.relevance for one in answer.sources} == {0.0}
    assert len(answer.sources) > len(ANIMALS)
    assert answer.usage.slots - 1 <= math.ceil(len(TEXTS["animals"]) / 8)
    check(memory, answer)


@pytest.mark.parametrize("name", ["otter", "weasel", "raven", "moss"])
def test_the_budget_is_spent_where_the_question_is(memory: BeaconMemory, name: str) -> None:
    """Both of documents that are named, and of those that are found."""
    id = "plants" if name in PLANTS else "animals"
    for ids in (None, id, ["plants", "animals"]):
        answer = memory.ask(f"What about the {name}?", ids, budget="x8", **SHORT)
        assert id in answer.ids
        assert name in best(memory, answer)
        relevant = [one.loaded for one in answer.sources if one.relevance == max(s.relevance for s in answer.sources)]
        assert min(relevant) > sum(one.loaded for one in answer.sources) / len(answer.sources)
        check(memory, answer)


@pytest.mark.parametrize("name", ["otter", "moss"])
def test_the_document_that_matches_best_stands_nearest_to_the_question(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    placed: list[str] = []
    sections = HotMemories.sections

    def noted(hot: HotMemories, model: BeaconModel, wanted: Any, room: int) -> Any:
        placed[:] = [key[1] for key, _ in wanted if key != "sink"]
        return sections(hot, model, wanted, room)

    monkeypatch.setattr(HotMemories, "sections", noted)
    other, best_id = ("animals", "plants") if name in PLANTS else ("plants", "animals")
    for ids in ([other, best_id], [best_id, other]):
        answer = memory.ask(f"What about the {name}?", ids, **SHORT)
        assert answer.ids == tuple(ids)
        assert placed == [memory.show(other).file, memory.show(best_id).file]


@pytest.mark.parametrize("ids", [None, "animals"])
def test_a_picker_of_ones_own_says_where_the_budget_is_spent(filled: Path, model: BeaconModel, ids: str | None) -> None:
    asked: list[Query] = []

    def picker(query: Query) -> Iterator[Passage]:
        asked.append(query)
        for row in query.documents():
            for start, stop, text in query.passages(row.id):
                if "raven" in text:
                    yield Passage(row.id, start, stop, 3.0)
        yield Passage("plants", 0, 10, 2.0)

    with BeaconMemory(filled, model, reserve=100, picker=picker) as memory:
        answer = memory.ask("Where is the otter?", ids, budget="x8", limit=1, **SHORT)
        assert answer.ids == ("animals",)
        assert "raven" in best(memory, answer)
        sought = [] if ids else [("Where is the otter?", None)]  # first documents, then passages of them
        assert [(query.text, query.ids) for query in asked] == [*sought, ("Where is the otter?", ("animals",))]


def test_streams_and_many_questions_have_budgets_too(memory: BeaconMemory) -> None:
    from beacon_memory import Question

    asked = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    *_, streamed = memory.stream("Where is the otter?", "animals", budget="x8", **SHORT)
    (one,) = memory.ask_many([Question("Where is the otter?", "animals", "x8", options=SHORT)])
    for answer in (streamed, one):
        assert isinstance(answer, Answer)
        assert (answer.text, answer.sources, answer.usage.slots) == (asked.text, asked.sources, asked.usage.slots)


def test_documents_larger_than_the_model_has_positions_are_stored_and_zoomed(tmp_path: Path) -> None:
    with BeaconMemory(tmp_path, make_model(512), reserve=100) as memory:
        added = memory.add("animals", TEXTS["animals"])
        assert (added.status, added.ratios) == ("added", (2,))
        assert added.slots > memory.model.max_positions
        memory.add_many([("plants", TEXTS["plants"]), ("more", about(("newt", "toad", "crane")))])
        for ids in ("animals", ["plants", "animals", "more"], None):
            answer = memory.ask("Where is the raven?", ids, **SHORT)
            room = memory.room("Where is the raven?", **SHORT)
            assert room / 2 < answer.usage.slots - 1 <= room
            assert "raven" in best(memory, answer)
            check(memory, answer)
        with pytest.raises(CapacityError, match=r"document 'beacons': .*has 512"):
            memory.add("beacons", TEXTS["animals"], ratio=2, compression="beacon")


def test_the_next_question_about_the_same_passages_opens_no_file(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    assert places(first) == ("cold",)
    monkeypatch.setattr("beacon_memory.storage.reading.read_file", lambda *_: pytest.fail("a file was read"))
    again = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    assert (again.text, again.sources, places(again)) == (first.text, first.sources, ("ram",))


def test_only_what_is_loaded_is_read(memory: BeaconMemory) -> None:
    """The last rows of a file are those that compression drops first, of the last passage."""
    path = memory.store.folder / memory.show("animals").file
    whole = path.read_bytes()
    head, _, data = parts(whole)
    for name in ("keys", "values"):
        flipped = bytearray(whole)
        flipped[len(whole) - len(data) + head[name]["data_offsets"][1] - 1] ^= 1
        path.write_bytes(flipped)
        assert memory.ask("Where is the otter?", "animals", budget="x8", **SHORT).usage.documents
        for question, budget in (("Where is the raven?", "x3"), ("Where is the otter?", "x1")):
            with pytest.raises(CorruptFileError, match="hash differs"):
                memory.ask(question, "animals", budget=budget, **SHORT)


@pytest.mark.parametrize("budget", [None, "x8"])
def test_a_document_that_is_replaced_while_it_is_read_is_chosen_anew(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch, budget: str | None
) -> None:
    other = BeaconMemory(memory.store.folder, memory.model, reserve=100)
    text, choose, chosen = about(("newt", "otter", "toad")), Recollection.choose, []

    def replaced_after(*given: Any) -> Any:
        chosen.append(choose(*given))
        if len(chosen) == 1:
            other.add("animals", text, ratio=2)
        return chosen[-1]

    monkeypatch.setattr(Recollection, "choose", replaced_after)
    answer = memory.ask("Where is the otter?", "animals", budget=budget, **SHORT)
    assert len(chosen) == 2
    fresh = BeaconMemory(memory.store.folder, memory.model, reserve=100)
    expected = fresh.ask("Where is the otter?", "animals", budget=budget, **SHORT)
    assert (answer.text, answer.sources) == (expected.text, expected.sources)
    check(memory, answer)


def test_a_document_that_is_replaced_between_two_questions_is_read_anew(memory: BeaconMemory) -> None:
    memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    memory.add("animals", about(("newt", "otter", "toad")), ratio=2)
    answer = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    assert places(answer) == ("cold",)
    assert "otter" in best(memory, answer)
    check(memory, answer)


def test_a_part_of_what_another_model_has_read_is_refused(memory: BeaconMemory, tmp_path: Path) -> None:
    other = make_model(4096)
    train(other, seed=3).save_adapter(tmp_path / "adapter")
    other.load_adapter(tmp_path / "adapter")
    asking = BeaconMemory(memory.store.folder, other, reserve=100)
    with pytest.raises(FingerprintMismatchError, match="animals"):
        asking.ask("Where is the otter?", "animals", budget="x8", **SHORT)


def test_sections_end_where_passages_end(memory: BeaconMemory) -> None:
    """So what a question is about is loaded, and little else."""
    for id, text in TEXTS.items():
        index = index_of(memory, id)
        sections, windows = index.header.sections, range(0, len(text), WINDOW)
        edges = {*windows, *(start for start, _ in split_passages(text))}
        assert [one.start for one in sections] == sorted(edges)
        assert [one.stop for one in sections] == [*sorted(edges)[1:], len(text)]
        assert all(one.size == one.stop - one.start for one in sections)  # a token of this model is a character
        assert len(index.counts) == len(sections)
    appended = memory.append("plants", about(("lichen", "heather")))
    header = index_of(memory, "plants").header
    text = memory.store.text("plants")
    assert appended.tokens == len(text)
    edges = {*range(0, len(text), WINDOW), *(start for start, _ in split_passages(text))}
    assert [one.start for one in header.sections] == sorted(edges)


def test_a_pickled_memory_has_no_indexes_with_it(filled: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", tiny_base("llama", max_position_embeddings=4096))
    with BeaconMemory(tmp_path / "store", tmp_path / "base", reserve=100) as memory:
        small = len(pickle.dumps(memory))
        memory.add("animals", TEXTS["animals"], ratio=2)
        answer = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
        written = pickle.dumps(memory)
        assert len(written) < small + 100
        again = pickle.loads(written)  # noqa: S301  # our own
        assert again.ask("Where is the otter?", "animals", budget="x8", **SHORT).sources == answer.sources


def test_sources_are_plain_values(memory: BeaconMemory) -> None:
    from dataclasses import asdict

    answer = memory.ask("Where is the otter?", "animals", budget="x8", **SHORT)
    for one in answer.sources:
        assert json.loads(json.dumps(asdict(one))) == asdict(one)
        assert set(asdict(one)) == {"document", "start", "stop", "relevance", "loaded"}
