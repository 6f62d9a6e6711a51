"""The command line as its users see it: texts, JSON, exit codes. A tiny model stands in for a downloaded one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_samples import ROOF, WELL, Run, lines, write
from command_page import json_fields, sections
from installed import install
from old_formats import write_old_store
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import __version__


def test_question_is_answered_from_documents_of_every_compression_at_once(run: Run) -> None:
    write("beacon.txt", "select.txt", "hybrid.txt")
    for name in ("beacon", "select", "hybrid"):
        assert run("add", f"{name}.txt", "--ratio", "4", "--compression", name).exit_code == 0
    documents = [part for name in ("beacon", "select", "hybrid") for part in ("--doc", f"{name}.txt")]
    (answer,) = lines(run("ask", "Who?", *documents, "--max-new-tokens", "4", "--json"))
    assert answer["ids"] == ["beacon.txt", "select.txt", "hybrid.txt"]
    assert answer["slots"] == 1 + sum(int(str(row["slots"])) for row in lines(run("list", "--json")))


def test_namespaces_see_nothing_of_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt", "b.txt")
    run("add", "a.txt", "--namespace", "alice")
    monkeypatch.setenv("BEACON_MEMORY_NAMESPACE", "bob")
    run("add", "b.txt")
    assert [row["id"] for row in lines(run("list", "--json"))] == ["b.txt"]
    assert [row["id"] for row in lines(run("list", "--json", "--namespace", "alice"))] == ["a.txt"]
    assert lines(run("list", "--json", "--namespace", "")) == []
    refused = run("ask", "Who?", "--doc", "a.txt")
    assert refused.exit_code == 1
    assert "no document 'a.txt' is stored" in refused.stderr
    assert lines(run("ask", "Who?", "--max-new-tokens", "2", "--json"))[0]["ids"] == ["b.txt"]
    assert json.loads(run("info", "--json").stdout)["namespace"] == "bob"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "absent.txt"], "'absent.txt' does not exist"),
        (["add", "*.nothing"], "nothing matches it"),
        (["add", "-"], "--id"),
        (["add", "a.txt", "--ratio", "much"], "ratio='much'"),
        (["add", "a.txt", "--ratio", "²"], "ratio='²'"),
        (["add", "a.txt", "--ratio", "--8"], "ratio='--8'"),
        (["add", "a.txt", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["ask", "Who?", "--doc", "absent"], "'absent'"),
        (["ask", "Who?", "--stream", "--json"], "choose one"),
        (["ask", "Who?", "--chat-template-kwargs", "{"], "--chat-template-kwargs must be a JSON object, got '{'"),
        (["ask", "Who?", "--chat-template-kwargs", "[]"], "chat_template_kwargs=[] must be a dict"),
        (["ask", "Who?", "--chat-template-kwargs", '{"absent": 1}'], "absent=1 is not known to the model's chat templ"),
        (["ask", "Who?", "--schema", "absent.json"], "--schema absent.json cannot be read as JSON"),
        (["ask", "Who?", "--schema", "a.txt"], "--schema a.txt cannot be read as JSON"),
        (["ask", "Who?", "--schema", "list.json"], "--schema list.json must be a JSON object"),
        (["ask", "Who?", "--schema", "object.json", "--abstain"], "abstain and a schema do not go together"),
        (["ask", "Who?", "--budget", "much"], "budget='much' must be a number of memory slots, bytes as '64MB'"),
        (["ask", "Who?", "--picker", "absent"], "picker='absent' must be one of 'attention', 'text'"),
        (["ask", "Who?", "--model", "absent/folder/of/a/model"], "cannot be loaded"),
        (["show", "absent"], "'absent'"),
        (["remove", "absent"], "'absent'"),
        (["bench", "race", "--contestants", "selekt:4"], "unknown contestant 'selekt:4'"),
        (["bench", "race", "--lengths", "much"], "--lengths is 'much', but must be numbers"),
        (["bench", "race", "--write", "absent.md"], "the page 'absent.md' cannot be read"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(run: Run, arguments: list[str], message: str) -> None:
    write("a.txt")
    Path("list.json").write_text("[]", encoding="utf-8")
    Path("object.json").write_text("{}", encoding="utf-8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", ""],
        ["add", "a.txt", ""],
        ["add", "a.txt", "--store", ""],
        ["add", "a.txt", "--model", ""],
        ["add", "a.txt", "--adapter", ""],
        ["add", "a.txt", "--device", ""],
        ["append", "a.txt", ""],
        ["export", ""],
        ["import", ""],
        ["copy", ""],
        ["train", "", "output"],
        ["train", "default", ""],
        ["train", "default", "output", "--data", ""],
        ["eval", "qa", "--data", ""],
        ["eval", "qa", "--data", "a.txt", "--json", ""],
        ["eval", "report", ""],
        ["eval", "report", ".", ""],
    ],
)
def test_an_empty_name_is_wrong_usage_and_no_current_folder(run: Run, arguments: list[str]) -> None:
    write("a.txt")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "it is empty, as if a variable were not set" in " ".join(result.stderr.replace("│", " ").split())
    assert [path.name for path in Path.cwd().iterdir()] == ["a.txt"]


def test_ask_prints_what_machines_need(run: Run) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    run("add", "roof.txt", "--ratio", "4")
    result = run("ask", "Who mended the roof?", "--max-new-tokens", "5", "--json")
    (answer,) = lines(result)
    assert result.exit_code == 0
    assert list(answer) == json_fields("ask")
    assert answer["ids"] == ["roof.txt"]
    assert answer["slots"] == 1 + -(-len(ROOF) // 4)


def test_ask_takes_an_installed_picker_by_its_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from beacon_memory import Passage\n\ndef make():\n    return lambda query: [Passage('b.txt', 0, 1, 1.0)]\n"
    install(tmp_path / "site", monkeypatch, "elsewhere", code, b="elsewhere:make")
    Path("a.txt").write_text(ROOF, encoding="utf-8")
    Path("b.txt").write_text(WELL, encoding="utf-8")
    run("add", "a.txt", "b.txt", "--ratio", "2")
    question = ["ask", "Who mended the roof?", "--max-new-tokens", "2", "--json"]
    assert lines(run(*question))[0]["ids"] == ["a.txt"]
    assert lines(run(*question, "--picker", "b"))[0]["ids"] == ["b.txt"]
    monkeypatch.setenv("BEACON_MEMORY_PICKER", "b")
    assert lines(run(*question))[0]["ids"] == ["b.txt"]


def test_ask_answers_the_same_streamed_or_not(run: Run) -> None:
    for name, text in (("roof.txt", ROOF), ("well.txt", WELL)):
        Path(name).write_text(text, encoding="utf-8")
    run("add", "roof.txt", "well.txt", "--ratio", "4")
    question = ["ask", "How deep is the well?", "--max-new-tokens", "8", "--doc", "well.txt", "--doc", "roof.txt"]
    whole, streamed = run(*question), run(*question, "--stream")
    assert whole.exit_code == streamed.exit_code == 0
    assert whole.stdout.strip() == streamed.stdout.strip()
    assert "from well.txt, roof.txt" in whole.stderr


def test_ask_answers_in_json_of_a_schema(run: Run) -> None:
    write("a.txt")
    Path("schema.json").write_text('{"enum": ["slate", "thatch"]}', encoding="utf-8")
    run("add", "a.txt")
    asked = ("ask", "What is the roof made of?", "--schema", "schema.json")
    assert json.loads(run(*asked).stdout) in ("slate", "thatch")
    assert run(*asked, "--stream").stdout == run(*asked).stdout


def test_ask_notes_what_it_used_for_the_quota_to_go_by(run: Run) -> None:
    write("a.txt", "b.txt")
    run("add", "a.txt", "b.txt")
    added = {row["id"]: row["used_at"] for row in lines(run("list", "--json"))}
    time.sleep(1.01)  # use is noted in seconds
    run("ask", "Who?", "--doc", "a.txt", "--max-new-tokens", "2")
    asked = {row["id"]: row["used_at"] for row in lines(run("list", "--json"))}
    assert asked["a.txt"] > added["a.txt"]
    assert asked["b.txt"] == added["b.txt"]


def test_list_show_remove(run: Run, tmp_path: Path) -> None:
    assert "nothing is stored yet" in run("list").stderr
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    run("add", "roof.txt", "--ratio", "4")
    assert "roof.txt" in run("list").stdout
    (row,) = lines(run("list", "--json"))
    assert (row["id"], row["tokens"]) == ("roof.txt", len(ROOF))
    shown = json.loads(run("show", "roof.txt", "--json").stdout)
    assert (tmp_path / "store" / shown["file"]).is_file()
    assert shown["metadata"] == {"path": str(Path("roof.txt").absolute())}
    assert run("show", "roof.txt", "--text").stdout == ROOF
    assert run("remove", "roof.txt", "absent").exit_code == 1
    assert lines(run("list", "--json")) != []
    assert run("remove", "roof.txt").exit_code == 0
    assert lines(run("list", "--json")) == []


class TestRecompress:
    @pytest.fixture
    def other(self, tmp_path: Path) -> str:
        return str(tiny_checkpoint(tmp_path / "other", tiny_base("llama", max_position_embeddings=4096, seed=1)))

    def test_makes_documents_of_another_model_anew(self, run: Run, other: str) -> None:
        write("a.txt", "b.txt")
        run("add", "a.txt", "--ratio", "8", "--compression", "beacon", "--tag", "farm")
        run("add", "b.txt", "--precision", "int8")
        refused = run("ask", "Who?", "--doc", "a.txt", "--model", other)
        assert refused.exit_code == 1
        before = lines(run("list", "--json"))
        (one,) = lines(run("recompress", "a.txt", "a.txt", "--model", other, "--json"))
        assert list(one) == json_fields("recompress")
        assert (one["status"], one["ratios"], one["compression"]) == ("recompressed", [8], "beacon")
        assert run("ask", "Who?", "--doc", "a.txt", "--max-new-tokens", "2").exit_code == 0  # with the old model, still
        rest = run("recompress", "--model", other)
        assert "recompressed b.txt: " in rest.stdout
        assert "1 recompressed, 1 were up to date" in rest.stderr
        assert run("ask", "Who?", "--model", other, "--max-new-tokens", "2").exit_code == 0
        assert run("ask", "Who?", "--doc", "a.txt").exit_code == 1
        changing = {"updated_at": "", "used_at": ""}
        assert [row | changing for row in lines(run("list", "--json"))] == [row | changing for row in before]
        assert run("verify").exit_code == 0

    def test_of_a_document_that_there_is_not_changes_nothing(self, run: Run, other: str) -> None:
        write("a.txt")
        run("add", "a.txt")
        before = run("list", "--json").stdout
        result = run("recompress", "a.txt", "b.txt", "--model", other)
        assert result.exit_code == 1
        assert "no document 'b.txt' is stored; did you mean 'a.txt'?" in result.stderr
        assert run("list", "--json").stdout == before


def test_recompress_makes_files_of_an_older_format_anew(run: Run, tmp_path: Path) -> None:
    write_old_store(tmp_path / "store", {"a.txt": "The red house stands on the hill.", "b.txt": "A boat lies there."})
    assert [row["id"] for row in lines(run("list", "--json"))] == ["a.txt", "b.txt"]
    assert run("show", "b.txt", "--text").stdout == "A boat lies there."
    refused = run("ask", "Who?", "--doc", "a.txt")
    assert refused.exit_code == 1
    assert "`beacon-memory recompress`" in " ".join(refused.stderr.split())
    assert {problem["kind"] for problem in lines(run("verify", "--json"))} == {"damaged-file", "stale-label"}
    assert "2 recompressed" in run("recompress").stderr
    assert run("verify").exit_code == 0
    assert run("ask", "Who?", "--doc", "a.txt", "--max-new-tokens", "2").exit_code == 0
    assert "0 recompressed, 2 were up to date" in run("recompress").stderr


def test_repair_compresses_what_was_lost_anew(run: Run, tmp_path: Path) -> None:
    write("a.txt", "b.txt")
    run("add", "a.txt", "b.txt", "--ratio", "4", "--tag", "farm")
    before = lines(run("list", "--json"))
    for file in (tmp_path / "store" / "kv").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert [problem["kind"] for problem in lines(run("verify", "--json"))] == ["damaged-file"] * 2
    without = run("repair", "--json", "--model", "absent/folder/of/a/model")
    assert without.exit_code == 1
    assert [problem["mended"] for problem in lines(without)] == [False, False]
    assert "it could not be compressed anew: " in str(lines(without)[0]["message"])
    mended = run("repair", "--json")
    assert mended.exit_code == 0
    assert [list(problem) for problem in lines(mended)] == [json_fields("repair")] * 2
    assert [problem["mended"] for problem in lines(mended)] == [True, True]
    assert run("verify").exit_code == 0
    changing = {"updated_at": "", "used_at": ""}
    assert [row | changing for row in lines(run("list", "--json"))] == [row | changing for row in before]


def test_info_names_model_adapter_device_and_store(run: Run, model: Path, tmp_path: Path) -> None:
    shown = json.loads(run("info", "--json", "--device", "cpu", "--dtype", "float32").stdout)
    assert list(shown) == json_fields("info")
    assert (shown["model"], shown["adapter"]) == (str(model), "untrained")
    assert (shown["device"], shown["dtype"], shown["positions"]) == ("cpu", "float32", 4096)
    assert (shown["store"], shown["documents"]) == (str(tmp_path / "store"), 0)
    assert shown["compression"] == "select"  # without an adapter


def test_help_names_every_command_and_version_is_printed(run: Run) -> None:
    shown = run("--help").stdout
    for command in filter(None, sections()):
        assert command in shown
        assert run(command, "--help").exit_code == 0
    assert run("--version").stdout == f"beacon-memory {__version__}\n"


def test_help_answers_at_once_without_torch() -> None:
    script = "import sys; from beacon_memory.cli.main import app; app(['--help'], standalone_mode=False)"
    check = f"{script}; sys.exit(bool({{'torch', 'transformers', 'rich'}} & set(sys.modules)))"
    seconds = []
    for _ in range(6):
        before = os.times()
        subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
        after = os.times()  # of the processor, which others may be using, too
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(seconds) < 0.3


def test_json_reaches_a_pipe_while_the_bar_shows_on_a_terminal(run: Run) -> None:
    write("a.txt")
    terminal, bar = pty.openpty()
    command = [sys.executable, "-m", "beacon_memory", "add", "a.txt", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=bar, env={**os.environ, "TERM": "xterm"}, check=True)
    os.close(bar)
    os.close(terminal)
    assert json.loads(done.stdout)["id"] == "a.txt"


def test_store_that_cannot_be_created_is_an_error_in_one_line(run: Run) -> None:
    write("a.txt")
    result = run("add", "a.txt", "--store", "/proc/store")
    assert result.exit_code == 1
    assert "the folder /proc/store cannot be created" in result.stderr


def test_a_document_named_twice_is_removed_once(run: Run) -> None:
    write("a.txt")
    run("add", "a.txt")
    assert lines(run("remove", "a.txt", "a.txt", "--json")) == [{"id": "a.txt", "status": "removed"}]


def test_a_budget_is_spent_where_the_question_is_and_sources_show_where(run: Run) -> None:
    rest = "Nobody in the village could tell us any more of it, whomever we have asked. " * 3 + "\n\n"
    names = ("otter", "badger", "heron", "raven")
    text = "".join(f"The {name} is found behind the mill. {rest}" for name in names)
    Path("animals.txt").write_text(text, encoding="utf-8")
    run("add", "animals.txt", "--ratio", "2")
    question = ["ask", "What about the heron?", "--doc", "animals.txt", "--max-new-tokens", "2"]
    (whole,) = lines(run(*question, "--budget", "x1", "--json"))
    (part,) = lines(run(*question, "--budget", "x8", "--json"))
    assert list(part) == list(whole) == json_fields("ask")
    assert part["slots"] - 1 <= -(-len(text) // 8) < whole["slots"]
    assert {source["relevance"] for source in whole["sources"]} == {0.0}
    best = max(part["sources"], key=lambda source: source["relevance"])
    assert best.keys() == {"document", "start", "stop", "relevance", "loaded"}
    assert "heron" in text[best["start"] : best["stop"]]
    for more in ([], ["--stream"]):
        shown = run(*question, "--budget", "x8", "--sources", *more)
        assert f"{part['answer']}\n" in shown.stdout
        _, first, *others = shown.stderr.splitlines()
        share = f"{best['loaded']:.0%} loaded, relevance {best['relevance']:.1f}: "
        assert " ".join(first.split()).startswith(f"animals.txt {best['start']}-{best['stop']}, {share}")
        assert len([line for line in others if "% loaded" in line]) == len(part["sources"]) - 1
    assert "loaded" not in run(*question, "--budget", "x8").stderr
