"""What `explain` shows, in the terminal, as JSON, and as a page that a hostile document cannot change."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_samples import Run
from command_page import json_fields

from beacon_memory.cli.explanation_page import pieces
from beacon_memory.results import ExplainedPassage, ExplainedWord

REST = "It is seen by day and by night, and nobody in the village could tell us much more of it. " * 2
TEXT = "".join(f"The {name} is found behind the mill. {REST}\n\n" for name in ("otter", "badger", "heron", "weasel"))
HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u0007 & the heron --loaded:1\"'>"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def animals(run: Run) -> None:
    Path("animals.txt").write_text(TEXT, encoding="utf-8")
    assert run("add", "animals.txt", "--ratio", "2").exit_code == 0


def test_json_has_what_would_be_loaded(run: Run, animals: None) -> None:
    result = run("explain", "Where is the heron?", "animals.txt", "--budget", "100", "--json")
    explained = json.loads(result.stdout)
    assert list(explained) == json_fields("explain")
    assert "".join(passage["text"] for passage in explained["passages"]) == TEXT
    assert 0 < explained["slots"] <= 100
    best = max(explained["passages"], key=lambda passage: passage["relevance"])
    assert "heron" in best["text"]
    assert best["words"]


def test_the_terminal_shows_what_is_loaded_and_counts_the_rest(run: Run, animals: None) -> None:
    result = run("explain", "Where is the heron?", "--budget", "60")
    assert result.exit_code == 0
    assert result.stdout.startswith("animals.txt\n")
    assert "The heron is found behind the mill." in result.stdout
    assert "The otter" not in result.stdout
    assert "passages: nothing loaded" in result.stdout
    assert "relevance" in result.stdout


def test_the_page_is_whole_and_has_the_text_that_is_not_loaded_too(run: Run, animals: None) -> None:
    result = run("explain", "Where is the heron?", "animals.txt", "--budget", "60", "--html", "page.html")
    assert (result.exit_code, result.stdout) == (0, "")
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    for name in ("otter", "badger", "heron", "weasel"):
        assert f"The {name} is found behind the mill." in page.text
    assert {"script", "img", "link", "iframe"}.isdisjoint(page.tags)
    assert {"src", "href"}.isdisjoint(page.attributes)
    assert "prefers-color-scheme: dark" in page.text
    assert "details" in page.tags


def test_a_document_cannot_change_the_page(run: Run) -> None:
    Path("evil<b>.txt").write_text(f"{HOSTILE}\n" + "heron " * 3, encoding="utf-8")
    assert run("add", "evil<b>.txt", "--ratio", "2").exit_code == 0
    assert run("explain", "Where is <i>the heron</i>?", "evil<b>.txt", "--html", "page.html").exit_code == 0
    source = Path("page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert {"script", "img", "b", "i"}.isdisjoint(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "evil<b>.txt" in page.text
    assert "\u202e" not in source
    assert "\x07" not in source


def test_a_page_that_cannot_be_written_is_refused(run: Run, animals: None) -> None:
    result = run("explain", "Where is the heron?", "animals.txt", "--html", "nowhere/page.html")
    assert result.exit_code == 1
    assert "the page cannot be written to nowhere/page.html" in result.stderr


def test_pieces_make_up_the_passage() -> None:
    words = (ExplainedWord(10, 13, 0.5), ExplainedWord(14, 17, 1.0))
    passage = ExplainedPassage("a", 10, 19, "abc def .", 0.0, 0.3, 3.0, 30, words)
    assert [*pieces(passage)] == [("abc", 0.5), (" ", 0.0), ("def", 1.0), (" .", 0.0)]
    beacons = ExplainedPassage("a", 10, 19, "abc def .", 0.0, 0.3, 3.0, 30)
    assert [*pieces(beacons)] == [("abc def .", 0.3)]
