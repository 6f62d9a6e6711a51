"""Which texts `add` finds, and what it says of all else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_samples import HTML, pdf

from beacon_memory.cli.sources import Source, find_sources, read_source
from beacon_memory.errors import InputError
from beacon_memory.formats import kinds


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes/b.txt", "notes/a.md", "notes/deep/c.txt", "notes/.hidden/d.txt", "elsewhere/e.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name, encoding="utf-8")


def found(*paths: str) -> tuple[list[str], dict[str, str]]:
    sources, skipped = find_sources(paths)
    return [source.id for source in sources], {one.path.as_posix(): one.reason for one in skipped}


def strange() -> dict[str, str]:
    """What may lie in a folder beside files, with a word of the reason to skip it."""
    Path("notes/link").symlink_to("../elsewhere")
    Path("notes/back").symlink_to("..")
    Path("notes/lost.txt").symlink_to("nowhere.txt")
    Path("notes/ring").symlink_to("ring")
    os.mkfifo("notes/pipe")
    return {
        "notes/back": "links to a folder",
        "notes/link": "links to a folder",
        "notes/lost.txt": "links to nothing",
        "notes/pipe": "neither a file nor a folder",
        "notes/ring": "cannot be reached",
    }


def test_all_that_is_passed_over_below_a_folder_is_named_with_the_reason() -> None:
    expected = strange()
    Path("notes/file.txt").symlink_to("../elsewhere/e.txt")
    ids, skipped = found("notes")
    assert ids == ["notes/a.md", "notes/b.txt", "notes/deep/c.txt", "notes/file.txt"]
    assert list(skipped) == list(expected)
    assert all(expected[name] in reason for name, reason in skipped.items())


def test_a_glob_that_matches_what_cannot_be_read_finds_the_rest() -> None:
    expected = strange()
    ids, skipped = found("notes/*")
    assert ids == ["notes/a.md", "notes/b.txt", "notes/deep/c.txt"]
    assert list(skipped) == list(expected)


def test_what_is_named_itself_is_read_whatever_it_is() -> None:
    Path("link").symlink_to("elsewhere")
    os.mkfifo("pipe")
    assert found("link", "pipe") == (["link/e.txt", "pipe"], {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_named() -> None:
    Path("notes/deep").chmod(0)
    ids, skipped = found("notes")
    Path("notes/deep").chmod(0o755)
    assert (ids, list(skipped)) == (["notes/a.md", "notes/b.txt"], ["notes/deep"])


def test_a_file_that_is_gone_by_now_says_so_when_it_is_read() -> None:
    source = Source("gone.txt", Path("gone.txt"))
    assert source.size == 0
    with pytest.raises(InputError, match=r"'gone\.txt' cannot be read: No such file"):
        read_source(source)


def test_files_of_all_formats_are_found_and_read() -> None:
    Path("notes/page.html").write_bytes(HTML)
    Path("notes/Report.PDF").write_bytes(pdf("The lease ends in 2031."))
    Path("notes/table.xls").write_bytes(b"1")
    ids, skipped = found("notes")
    assert ids == ["notes/Report.PDF", "notes/a.md", "notes/b.txt", "notes/deep/c.txt", "notes/page.html"]
    assert skipped["notes/table.xls"].startswith(".xls files are not read")
    assert read_source(Source("x", Path("notes/Report.PDF"))) == "The lease ends in 2031."
    assert read_source(Source("x", Path("notes/page.html"))).startswith("# The mill")


def test_a_file_that_is_damaged_is_named_with_the_reason() -> None:
    Path("a.pdf").write_bytes(b"%PDF-")
    with pytest.raises(InputError, match=r"'a\.pdf' cannot be read: it is no PDF file, or it is damaged"):
        read_source(Source("a.pdf", Path("a.pdf")))


def test_what_needs_an_extra_that_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("notes/page.html").write_bytes(HTML)
    monkeypatch.setattr(kinds, "find_spec", lambda _: None)
    ids, skipped = found("notes")
    assert ids == ["notes/a.md", "notes/b.txt", "notes/deep/c.txt"]
    assert "pip install 'beacon-memory[formats]'" in skipped["notes/page.html"]
