"""The command line as its users see it: texts, JSON, exit codes. A tiny model stands in for a downloaded one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_samples import Run, lines
from command_page import json_fields, sections
from installed import install
from old_formats import write_old_store
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import BeaconModel, __version__

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards.\n"
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron.\n"


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name}: {ROOF}", encoding="utf-8")


def test_add_file_prints_what_machines_need(run: Run, model: Path) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    result = run("add", "roof.txt", "--ratio", "8", "--json")
    (added,) = lines(result)
    layers, heads, head_dim = BeaconModel.from_pretrained(model).kv_shape
    slot_bytes = layers * heads * (2 * head_dim * 4 + 1)  # keys and values in float32, and where they stand
    assert result.exit_code == 0
    assert list(added) == json_fields("add")
    assert added | {"seconds": 0} == {
        "id": "roof.txt",
        "status": "added",
        "tokens": len(ROOF),
        "slots": -(-len(ROOF) // 8),
        "bytes": -(-len(ROOF) // 8) * slot_bytes,
        "ratios": [8],
        "compression": "select",
        "precision": "float32",
        "seconds": 0,
        "evicted": [],
    }
    assert isinstance(added["seconds"], float)
    assert lines(run("add", "roof.txt", "--ratio", "8", "--json"))[0]["status"] == "unchanged"


@pytest.mark.parametrize("compression", ["beacon", "select", "hybrid"])
def test_compression_that_add_is_told_is_shown_wherever_a_document_is(run: Run, compression: str) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    arguments = ["add", "roof.txt", "--ratio", "4", "--compression", compression]
    slots = -(-len(ROOF) // 4)
    assert f"added roof.txt: {len(ROOF)} tokens in {slots} slots ({compression}, " in run(*arguments).stdout
    (again,) = lines(run(*arguments, "--json"))
    assert (again["status"], again["compression"], again["slots"]) == ("unchanged", compression, slots)
    assert lines(run("list", "--json"))[0]["compression"] == compression
    assert compression in run("list").stdout
    assert json.loads(run("show", "roof.txt", "--json").stdout)["compression"] == compression
    assert f"compression  {compression}\n" in run("show", "roof.txt").stdout


def test_only_another_compression_makes_add_compress_again(run: Run) -> None:
    write("a.txt")
    statuses = [
        (added["status"], added["compression"])
        for name in ("auto", "select", "beacon", "beacon", "hybrid", "auto")
        for added in lines(run("add", "a.txt", "--compression", name, "--json"))
    ]
    assert statuses == [
        ("added", "select"),
        ("unchanged", "select"),
        ("replaced", "beacon"),
        ("unchanged", "beacon"),
        ("replaced", "hybrid"),
        ("replaced", "select"),
    ]
    assert run("verify").exit_code == 0


def test_question_is_answered_from_documents_of_every_compression_at_once(run: Run) -> None:
    write("beacon.txt", "select.txt", "hybrid.txt")
    for name in ("beacon", "select", "hybrid"):
        assert run("add", f"{name}.txt", "--ratio", "4", "--compression", name).exit_code == 0
    documents = [part for name in ("beacon", "select", "hybrid") for part in ("--doc", f"{name}.txt")]
    (answer,) = lines(run("ask", "Who?", *documents, "--max-new-tokens", "4", "--json"))
    assert answer["ids"] == ["beacon.txt", "select.txt", "hybrid.txt"]
    assert answer["slots"] == 1 + sum(int(str(row["slots"])) for row in lines(run("list", "--json")))


def test_tokens_can_be_chosen_by_the_attention_to_be_expected(run: Run) -> None:
    write("a.txt", "b.txt")
    (repeat,) = lines(run("add", "a.txt", "--compression", "select", "--json"))
    (expected,) = lines(run("add", "b.txt", "--compression", "select", "--score", "expected", "--json"))
    assert (expected["status"], expected["slots"], expected["bytes"]) == ("added", repeat["slots"], repeat["bytes"])


@pytest.mark.parametrize("option", ["--compression", "--score"])
def test_compression_or_score_that_there_is_not_is_wrong_usage_and_nothing_is_stored(run: Run, option: str) -> None:
    write("a.txt")
    run("add", "a.txt")
    before = run("list", "--json").stdout
    result = run("add", "a.txt", option, "best")
    assert result.exit_code == 2
    assert "compression='best' must be" in result.stderr or "'best' is not one of 'repeat'" in result.stderr
    assert run("list", "--json").stdout == before


def test_precision_that_add_is_told_is_what_the_document_is_kept_in(run: Run) -> None:
    write("a.txt")
    sizes = [
        (added["status"], added["precision"], added["bytes"])
        for name in ("float32", "int8", "auto", "int4", "bfloat16")
        for added in lines(run("add", "a.txt", "--precision", name, "--json"))
    ]
    assert [size[:2] for size in sizes] == [
        ("added", "float32"),
        ("unchanged", "int8"),  # converted, which needs no pass
        ("unchanged", "int8"),
        ("unchanged", "int4"),
        ("replaced", "bfloat16"),  # compressed anew
    ]
    assert sizes[0][2] > sizes[4][2] > sizes[1][2] == sizes[2][2] > sizes[3][2]
    assert "(select, bfloat16, " in run("add", "a.txt").stdout


def test_add_labels_documents_and_leaves_what_it_is_not_told(run: Run) -> None:
    write("a.txt")
    run("add", "a.txt", "--tag", "farm", "--tag", "2031", "--pin", "--ttl", "30d")
    (first,) = lines(run("list", "--json"))
    assert (first["tags"], first["pinned"]) == (["2031", "farm"], True)
    assert 29 < (datetime.fromisoformat(str(first["expires_at"])) - datetime.now(UTC)).total_seconds() / 86400 <= 30
    run("label", "a.txt", "--metadata", '{"year": 2031, "path": "elsewhere"}')
    assert lines(run("add", "a.txt", "--no-pin", "--json"))[0]["status"] == "unchanged"
    (again,) = lines(run("list", "--json"))
    kept = {"metadata": {"year": 2031, "path": str(Path("a.txt").absolute())}, "pinned": False}
    changing = {"updated_at": again["updated_at"], "used_at": again["used_at"]}
    assert again == first | kept | changing


@pytest.mark.parametrize("ttl", ["soon", "never", "0d", "1.5h", "30", "-1d", "", "9999999w", "9" * 20 + "d", "٣d"])
def test_time_to_live_that_cannot_be_is_refused_before_the_model_is_loaded(run: Run, ttl: str) -> None:
    write("a.txt")
    result = run("add", "a.txt", "--ttl", ttl, "--model", "absent")
    assert result.exit_code == 1
    assert f"--ttl must be a whole number with s, m, h, d or w, such as 90m, 12h or 30d, got {ttl!r}" in result.stderr


def test_document_whose_time_to_live_is_over_is_gone(run: Run) -> None:
    write("a.txt", "b.txt")
    run("add", "a.txt", "--ttl", "1s")
    run("add", "b.txt")
    time.sleep(1.01)
    assert [row["id"] for row in lines(run("list", "--json"))] == ["b.txt"]
    assert run("ask", "Who?", "--doc", "a.txt").exit_code == 1
    assert lines(run("add", "a.txt", "--json"))[0]["status"] == "added"


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


def test_add_tells_what_it_evicted_to_keep_the_quota(run: Run) -> None:
    for name in "abcd":  # of one size
        Path(f"{name}.txt").write_text(f"{name} {ROOF}", encoding="utf-8")
    (added,) = lines(run("add", "a.txt", "--ratio", "2", "--json"))
    run("settings", "--quota", str(int(str(added["bytes"])) * 2))
    run("add", "b.txt", "--ratio", "2", "--pin")
    told = run("add", "c.txt", "--ratio", "2")
    assert "evicted a.txt: unused for longest, and the quota is used up" in told.stderr
    assert lines(run("add", "d.txt", "--ratio", "2", "--json"))[0]["evicted"] == ["c.txt"]
    run("label", "d.txt", "--pin")
    refused = run("add", "a.txt", "--ratio", "2")
    assert refused.exit_code == 1
    assert "failed a.txt: 'a.txt' takes" in refused.stderr
    assert [row["id"] for row in lines(run("list", "--json"))] == ["b.txt", "d.txt"]


def test_append_goes_on_with_a_document(run: Run) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    Path("well.txt").write_text(WELL, encoding="utf-8")
    run("add", "roof.txt", "--ratio", "4", "--tag", "farm", "--precision", "int8")
    (appended,) = lines(run("append", "roof.txt", "well.txt", "--json"))
    assert list(appended) == json_fields("append")
    assert (appended["status"], appended["tokens"], appended["ratios"]) == ("appended", len(ROOF + WELL), [0, 4])
    assert "appended roof.txt: " in run("append", "roof.txt", "-", piped="It never froze.\n").stdout
    assert run("show", "roof.txt", "--text").stdout == f"{ROOF}{WELL}It never froze.\n"
    assert lines(run("append", "roof.txt", "-", "--json", piped=""))[0]["status"] == "unchanged"
    (compacted,) = lines(run("compact", "--json"))
    assert list(compacted) == json_fields("compact")
    assert (compacted["id"], compacted["status"], compacted["ratios"]) == ("roof.txt", "compacted", [4])
    assert "unchanged roof.txt: " in run("compact", "roof.txt").stdout
    assert run("compact", "nowhere.txt").exit_code == 1
    (row,) = lines(run("list", "--json"))
    assert (row["tags"], row["precision"]) == (["farm"], "int8")
    Path("whole.txt").write_text(run("show", "roof.txt", "--text").stdout, encoding="utf-8")
    (whole,) = lines(run("add", "whole.txt", "--ratio", "4", "--precision", "int8", "--json"))
    assert (row["tokens"], row["slots"], row["bytes"]) == (whole["tokens"], whole["slots"], whole["bytes"])
    assert run("verify").exit_code == 0


def test_append_goes_on_with_the_score_that_it_is_told(run: Run) -> None:
    write("a.txt")
    run("add", "a.txt", "--score", "expected")
    assert run("append", "a.txt", "-", "--score", "expected", piped=WELL).exit_code == 0
    assert run("compact", "a.txt", "--score", "expected").exit_code == 0
    text = run("show", "a.txt", "--text").stdout
    again = run("add", "-", "--id", "a.txt", "--score", "expected", "--json", piped=text)
    assert lines(again)[0]["status"] == "unchanged"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "a.txt"], "no document 'absent' is stored; did you mean"),
        (["absent.txt", "absent.txt"], "'absent.txt' cannot be read: No such file or directory"),
        (["a.txt", "."], "'.' cannot be read: Is a directory"),
    ],
)
def test_append_that_cannot_be_leaves_the_document_as_it_was(run: Run, arguments: list[str], message: str) -> None:
    write("a.txt")
    run("add", "a.txt", "--id", "absent.txt")
    run("add", "a.txt")
    before = run("list", "--json").stdout
    result = run("append", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert run("list", "--json").stdout == before


def test_add_takes_folders_globs_and_standard_input(run: Run) -> None:
    write("notes/a.md", "notes/deep/b.txt", "notes/.hidden/c.txt", "logs/d.txt", "logs/e.txt")
    added = lines(run("add", "notes", "logs/*.txt", "--json"))
    assert [one["id"] for one in added] == ["notes/a.md", "notes/deep/b.txt", "logs/d.txt", "logs/e.txt"]
    (piped,) = lines(run("add", "-", "--id", "piped", "--json", piped=WELL))
    assert (piped["id"], piped["tokens"]) == ("piped", len(WELL))


def test_add_removes_what_is_gone_from_a_folder_if_told_to(run: Run, tmp_path: Path) -> None:
    write("notes/stays.md", "notes/goes.md", "notes/old/moves.md", "notes/odd.xls", "notes-2/a.md", "b.md")
    run("add", "notes", "notes-2", "b.md")
    run("add", "notes/goes.md", "--id", "any id")
    run("add", "-", "--id", "notes/piped", piped=WELL)
    for name in ("notes/goes.md", "notes-2/a.md", "b.md"):
        Path(name).unlink()
    Path("notes/old").rename("notes/new")
    before = [str(row["id"]) for row in lines(run("list", "--json"))]
    gone = ["any id", "notes/goes.md", "notes/old/moves.md"]

    dry = run("add", "notes", "--prune", "--dry-run", "--json")
    assert [one for one in lines(dry) if one["status"] != "skipped"] == [{"id": id, "status": "gone"} for id in gone]
    assert [row["id"] for row in lines(run("list", "--json"))] == before
    assert run("add", "notes", "--prune", "--dry-run").stdout == "".join(f"gone {id}\n" for id in gone)

    absolute = str(tmp_path / "notes-2" / ".." / "notes")
    result = run("add", absolute, "--prune", "--json")
    assert result.exit_code == 0
    statuses = [(one["id"], one["status"]) for one in lines(result) if one["status"] != "skipped"]
    added = [f"{absolute}/new/moves.md", f"{absolute}/stays.md"]
    assert statuses == [*((id, "removed") for id in gone), *((id, "added") for id in added)]
    kept = {id for id in before if id not in gone}
    assert {row["id"] for row in lines(run("list", "--json"))} == {*kept, *added}
    assert run("add", "notes", "--prune", "--dry-run").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty", "--prune"], "there is no text in 'empty', so nothing is removed"),
        (["notes", "empty", "--prune"], "there is no text in 'empty', so nothing is removed"),
        (["notes/a.md", "--prune"], "gone from a folder, and 'notes/a.md' is none"),
        (["notes", "notes/*.md", "--prune", "--dry-run"], "gone from a folder, and 'notes/*.md' is none"),
        (["notes", "--dry-run"], "--dry-run shows what --prune would remove, or --ray would compress"),
        (["notes", "--prune", "--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["absent", "--prune"], "'absent' does not exist"),
    ],
)
def test_add_that_cannot_know_what_is_gone_removes_nothing(run: Run, arguments: list[str], message: str) -> None:
    write("notes/a.md", "notes/b.md", "empty/c.md")
    run("add", "notes", "empty")
    before = run("list", "--json").stdout
    Path("notes/b.md").unlink()
    Path("empty/c.md").unlink()
    result = run("add", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert run("list", "--json").stdout == before


def test_add_names_one_document(run: Run) -> None:
    write("a.txt", "b.txt")
    assert lines(run("add", "a.txt", "--id", "any text / at all", "--json"))[0]["id"] == "any text / at all"
    result = run("add", "a.txt", "b.txt", "--id", "one")
    assert result.exit_code == 1
    assert "--id 'one' names one document, but 2 texts" in result.stderr


def test_add_says_what_it_skips_and_why(run: Run) -> None:
    write("notes/a.md", "notes/b.xls")
    result = run("add", "notes")
    assert result.exit_code == 0
    assert "skipped notes/b.xls: .xls files are not read; convert it to plain text or Markdown, HTML" in result.stderr
    assert "added notes/a.md" in result.stdout
    nothing = run("add", "notes/b.xls")
    assert nothing.exit_code == 1
    assert "nothing to add" in nothing.stderr


def test_add_goes_on_after_a_bad_document_and_fails_at_the_end(run: Run) -> None:
    write("a.txt", "c.txt")
    Path("b.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").touch()
    result = run("add", ".", "--json")
    statuses = {one["id"]: one["status"] for one in lines(result)}
    assert statuses == {"a.txt": "added", "b.txt": "failed", "c.txt": "added", "empty.txt": "failed"}
    assert result.exit_code == 1


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


def test_interrupted_add_keeps_what_was_finished_and_can_be_repeated(run: Run, model: Path, tmp_path: Path) -> None:
    for number in range(40):
        Path(f"{number:02}.txt").write_text(f"{number} {ROOF * 12}", encoding="utf-8")
    command = [sys.executable, "-m", "beacon_memory", "add", ".", "--ratio", "8", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ, text=True) as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        child.send_signal(signal.SIGINT)
        _, complaint = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in complaint
    assert "Traceback" not in complaint
    stored = {row["id"] for row in lines(run("list", "--json"))}
    assert first["id"] in stored
    assert len(stored) < 40
    assert run("verify").exit_code == 0
    again = lines(run("add", ".", "--ratio", "8", "--json"))
    assert {one["id"] for one in again if one["status"] == "unchanged"} == stored
    assert len(lines(run("list", "--json"))) == 40


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
