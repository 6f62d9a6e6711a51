"""A conversation in a terminal, as a person has it, and through pipes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_samples import Run, runner
from pseudo_terminal import END, INTERRUPT, TAB, UP, PseudoTerminal
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import MemoryStore, Session

LEASE = "The lease of the mill ends on 3 May 2031. The rent is paid by the miller, Ada Flint.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of which a word comes out every few tokens."""
    base = tiny_base("llama", max_position_embeddings=4096, seed=7)
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), base)


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(tmp_path / "store", model, monkeypatch)


@contextmanager
def conversation(*options: str) -> Iterator[PseudoTerminal]:
    with PseudoTerminal([sys.executable, "-m", "beacon_memory", "chat", *options], os.environ) as terminal:
        terminal.expect("/help shows what you can do")
        yield terminal
        enter(terminal, END)
        assert terminal.ended() == 0, terminal.screen


def enter(terminal: PseudoTerminal, keys: str) -> None:
    """Types when the prompt is there: keys that edit a line mean something else before."""
    terminal.expect("\n> ")
    terminal.type(keys)


def turns(store: Path) -> list[dict[str, str]]:
    kept = MemoryStore(store).conversations.get("chat")
    return [] if kept is None else [dict(turn) for turn in kept.turns]


def test_a_person_adds_a_file_asks_and_sees_why(run: Run, tmp_path: Path) -> None:
    Path("lease of the mill.txt").write_text(LEASE, encoding="utf-8")
    with conversation("--max-new-tokens", "8") as terminal:
        enter(terminal, "/why\n")
        terminal.expect("error: nothing was answered yet")
        enter(terminal, "/docs\n")
        terminal.expect("nothing is stored yet")
        enter(terminal, f"/add lea{TAB}\n")
        terminal.expect("added lease of the mill.txt:")
        enter(terminal, "/docs\n")
        terminal.expect("lease of the mill.txt")
        enter(terminal, "Who pays the rent?\n")
        enter(terminal, "/why\n")
        costs = terminal.expect("first token after")
        assert "lease of the mill.txt:" in costs
        assert "read from its file" in costs
        assert "8 generated tokens" in costs
        terminal.expect("of the question's words are in one passage")
        assert "Ada Flint." in terminal.expect("shades: how much of a word is loaded")
    user, assistant = turns(tmp_path / "store")
    assert user == {"role": "user", "content": "Who pays the rent?"}
    assert assistant["role"] == "assistant"


def test_ctrl_c_stops_an_answer_and_not_the_program(run: Run, tmp_path: Path) -> None:
    Path("lease.txt").write_text(LEASE, encoding="utf-8")
    run("add", "lease.txt")
    with conversation("--max-new-tokens", "3000") as terminal:
        enter(terminal, "Who pays?\n")
        terminal.expect("Who pays?")
        terminal.more()
        terminal.type(INTERRUPT)
        terminal.expect("stopped; /quit or Ctrl-D ends the conversation")
        enter(terminal, "half a line")
        terminal.expect("half a line")
        terminal.type_until(INTERRUPT, "stopped")  # readline misses a signal that comes before it waits for keys again
        enter(terminal, "/docs\n")
        terminal.expect("lease.txt")
    user, assistant = turns(tmp_path / "store")
    assert user["content"] == "Who pays?"
    assert 0 < len(assistant["content"]) < 2000  # what was said was kept


def test_a_conversation_goes_on_until_it_is_cleared(run: Run, tmp_path: Path) -> None:
    run("chat", "--max-new-tokens", "2", piped="Who are you?\n")
    with conversation("--max-new-tokens", "2") as terminal:
        assert "the conversation 'chat' goes on" in terminal.screen
        enter(terminal, UP)
        terminal.expect("Who are you?")
        terminal.type("\n")
        enter(terminal, "/docs\n")
        assert [turn["content"] for turn in turns(tmp_path / "store")][::2] == ["Who are you?"] * 2
        enter(terminal, "/clear\n")
        terminal.expect("begins anew")
    assert turns(tmp_path / "store") == []


def test_tab_completes_commands(run: Run) -> None:
    with conversation() as terminal:
        enter(terminal, f"/he{TAB}\n")
        terminal.expect("Anything else is a question")


def test_lines_of_a_pipe_are_answered_one_after_another(run: Run, tmp_path: Path) -> None:
    Path("lease.txt").write_text(LEASE, encoding="utf-8")
    said = run("chat", "--max-new-tokens", "4", piped="/add lease.txt\nWho pays the rent?\n\n/nothing\n/quit\nlost\n")
    assert said.exit_code == 0
    assert "added lease.txt:" in said.stdout
    assert ">" not in said.stdout.split("\n")[0]
    assert "error: /nothing is no command; /help shows those there are" in said.stderr
    user, assistant = turns(tmp_path / "store")
    assert user["content"] == "Who pays the rent?"
    assert assistant["content"] in said.stdout


def test_a_question_that_tells_of_no_document_is_about_those_of_the_one_before(run: Run, tmp_path: Path) -> None:
    Path("lease.txt").write_text(LEASE, encoding="utf-8")
    Path("owls.txt").write_text("Two barn owls nest above the hayloft.\n", encoding="utf-8")
    said = run(
        "chat", "--max-new-tokens", "2", piped="/add lease.txt owls.txt\nWho pays the rent?\nAnd why so?\n/why\n"
    )
    loaded = [line.partition(":")[0] for line in said.stdout.splitlines() if re.match(r"\S+: \d+ slots, ", line)]
    assert loaded == ["lease.txt"]


def test_only_named_documents_are_answered_from(run: Run) -> None:
    for name, text in (("lease.txt", LEASE), ("owls.txt", "Two barn owls nest above the hayloft.\n")):
        Path(name).write_text(text, encoding="utf-8")
        run("add", name)
    said = run("chat", "--doc", "owls.txt", "--max-new-tokens", "2", piped="Who pays the rent?\n/why\n")
    assert "owls.txt: " in said.stdout
    assert "lease.txt: " not in said.stdout
    refused = run("chat", "--doc", "howls.txt", piped="Who?\n")
    assert refused.exit_code == 1
    assert "no document 'howls.txt' is stored; did you mean 'owls.txt'" in refused.stderr


def test_a_file_that_cannot_be_added_is_told_and_the_conversation_goes_on(run: Run) -> None:
    Path("photo.jpg").write_bytes(b"\xff\xd8\xff")
    piped = "/add\n/add nowhere.txt\n/add 'half\n/add -\n/add .\nWho?\n"
    said = run("chat", "--max-new-tokens", "2", piped=piped)
    assert said.exit_code == 0
    told = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1].split()[0] for line in told] == ["/add", "'nowhere.txt'", "/add", "/add", "there"]
    assert "skipped photo.jpg" in said.stderr


def test_what_is_too_long_is_refused_and_nothing_of_it_is_kept(run: Run, tmp_path: Path) -> None:
    said = run("chat", piped="word " * 3000 + "\n")
    assert said.exit_code == 0
    assert "error: " in said.stderr
    assert turns(tmp_path / "store") == []


def test_folding_that_is_interrupted_loses_no_turn(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Session.add

    def interrupted(self: Session, added: list[dict[str, str]], *, fold: bool = True) -> None:
        if fold:
            raise KeyboardInterrupt
        whole(self, added, fold=fold)

    monkeypatch.setattr(Session, "add", interrupted)
    assert run("chat", "--max-new-tokens", "2", piped="Who?\nAnd when?\n").exit_code == 0
    assert [turn["content"] for turn in turns(tmp_path / "store")][::2] == ["Who?", "And when?"]
