"""The LangChain components on the embedded default model: the examples, and the code of their page."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from beacon_memory.documents import SESSION_TAG
from beacon_memory.storage.store import MemoryStore

pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(ROOT / "examples" / name)
    monkeypatch.setattr("sys.argv", [path, *arguments])
    runpy.run_path(path, run_name="__main__")


def test_agent_calls_tools_and_folds_its_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("02_langchain_agent.py", "--turns=8", f"--store={tmp_path}", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)   (.*?[.?]) ['\"](.*)['\"]$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [*range(1, 9)]
    assert (rows[1][4], rows[1][5]) == ("Weigh crate 1.", "57 kg")  # what the tool said
    assert float(rows[-1][1]) > float(rows[0][1]) > 0
    assert re.search(r"^turns +1 to +8: +[\d.]+ s a turn, at most [\d.]+ s$", printed, re.MULTILINE)
    # of turns that were folded; how a processor rounds in 16 bits decides which of so weak a model's answers are right
    assert re.search(r"^[a-z ]+ +[12]   (\w+) +answer: '.*\1.*'$", printed, re.MULTILINE)
    with MemoryStore(tmp_path) as store:
        (row,) = store.list()
        assert row.tags == (SESSION_TAG,)
        assert "brought crate 1, which is full of barley." in store.text(row.id)
        assert row.slots < row.tokens


def test_chunk_ids_replace_chunk_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("04_replace_rag_chunks.py", f"--store={tmp_path}", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    rows = re.findall(r"^chunk (texts|ids) +(\d+) +([\d.]+) +([\d.]+) s +['\"](.*)['\"]$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["texts", "ids"] * 3
    for stuffed, loaded in zip(rows[::2], rows[1::2], strict=True):
        assert int(stuffed[1]) > 20 * int(loaded[1])
        assert float(stuffed[2]) > 3 * float(loaded[2])
    assert all("Admiral Benbow" in row[4] for row in rows[:2])


def test_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "langchain.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(code, "langchain.md", "exec"), names)  # noqa: S102  # our own document
    names["memory"].close()
    given, found, documents = capsys.readouterr().out.splitlines()
    assert "Ada Flint" in given
    assert "Ada Flint" in found
    assert "'document_id': 'lease'" in documents
