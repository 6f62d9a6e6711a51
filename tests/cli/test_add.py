"""`add` and `append` as their users see them: what is kept and how, replaced, removed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_samples import ROOF, WELL, Run, lines, write
from command_page import json_fields

from beacon_memory import BeaconModel


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


def test_tokens_can_be_chosen_by_the_attention_to_be_expected(run: Run) -> None:
    write("a.txt", "b.txt")
    (repeat,) = lines(run("add", "a.txt", "--compression", "select", "--score", "repeat", "--json"))
    (expected,) = lines(run("add", "b.txt", "--compression", "select", "--score", "expected", "--json"))
    assert (expected["status"], expected["slots"], expected["bytes"]) == ("added", repeat["slots"], repeat["bytes"])


@pytest.mark.parametrize("option", ["--compression", "--score"])
def test_compression_or_score_that_there_is_not_is_wrong_usage_and_nothing_is_stored(run: Run, option: str) -> None:
    write("a.txt")
    run("add", "a.txt")
    before = run("list", "--json").stdout
    result = run("add", "a.txt", option, "best")
    assert result.exit_code == 2
    assert "compression='best' must be" in result.stderr or "'best' is not one of 'auto', 'repeat'" in result.stderr
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
