"""The commands that look after a store, without a model: see test_add.py and test_main.py for what needs one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_samples import Run, lines, runner
from command_page import json_fields
from kv_samples import TEXT, sample
from postgres_server import PostgresServer
from store_samples import files, put
from traces import ID, put_secret, traces
from typer.testing import Result

from beacon_memory.documents import Label
from beacon_memory.storage.store import MemoryStore

COMMAND = [sys.executable, "-m", "beacon_memory"]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store")


@pytest.fixture
def run(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, for a model that there is not."""
    return runner(store.root, "absent/folder/of/a/model", monkeypatch)


def label(store: MemoryStore, id: str, **fields: object) -> None:
    header, kv = sample(id)
    store.put(header, kv, TEXT, Label(**fields))  # type: ignore[arg-type]


def refused(result: Result) -> str:
    """Return the message of a command that failed, in one line."""
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class TestList:
    @pytest.fixture(autouse=True)
    def _documents(self, store: MemoryStore) -> None:
        label(store, "notes/a", metadata={"year": 2031, "author": "Ada Flint"}, tags=["farm", "old"])
        label(store, "notes/b", metadata={"year": "2031", "draft": True, "of": ["a"]}, tags=["farm"])
        label(store, "n%c", metadata={"year": 2032, "equation": "a=b"})

    @pytest.mark.parametrize(
        ("filters", "ids"),
        [
            ([], ["n%c", "notes/a", "notes/b"]),
            (["--tag", "farm"], ["notes/a", "notes/b"]),
            (["--tag", "farm", "--tag", "old"], ["notes/a"]),
            (["--where", "year=2031"], ["notes/a"]),
            (["--where", 'year="2031"'], ["notes/b"]),
            (["--where", "author=Ada Flint"], ["notes/a"]),
            (["--where", "draft=true"], ["notes/b"]),
            (["--where", "equation=a=b"], ["n%c"]),
            (["--where", "year=2031", "--where", "author=Ada"], []),
            (["--prefix", "notes/"], ["notes/a", "notes/b"]),
            (["--prefix", "n%"], ["n%c"]),
            (["--limit", "2"], ["n%c", "notes/a"]),
            (["--limit", "2", "--after", "notes/a"], ["notes/b"]),
            (
                ["--tag", "farm", "--prefix", "notes", "--where", "year=2031", "--after", "n%c", "--limit", "1"],
                ["notes/a"],
            ),
        ],
    )
    def test_shows_what_meets_all_conditions(self, run: Run, filters: list[str], ids: list[str]) -> None:
        assert [row["id"] for row in lines(run("list", *filters, "--json"))] == ids
        shown = run("list", *filters)
        assert [id for id in ("n%c", "notes/a", "notes/b") if id in shown.stdout] == ids
        assert shown.stderr == ("" if ids else "no document is like that; without filters, list shows all\n")

    def test_tells_machines_what_the_page_says(self, run: Run) -> None:
        assert [list(row) for row in lines(run("list", "--json"))] == [json_fields("list")] * 3
        (row,) = lines(run("list", "--tag", "old", "--json"))
        assert row["metadata"] == {"year": 2031, "author": "Ada Flint"}
        assert (row["tags"], row["pinned"], row["expires_at"]) == (["farm", "old"], False, None)
        times = [datetime.fromisoformat(str(row[name])) for name in ("created_at", "updated_at", "used_at")]
        assert all(timedelta(0) <= datetime.now(UTC) - time < timedelta(minutes=1) for time in times)

    def test_shows_long_ids_whole_where_there_is_no_terminal(self, run: Run, store: MemoryStore) -> None:
        put(store, "long/" * 100)
        assert "long/" * 100 in run("list").stdout

    def test_shows_control_characters_as_escapes(self, run: Run, store: MemoryStore) -> None:
        evil = "a\x1b]0;x\x07\x1b[2J\nb\r\u202e\x9b31m"
        label(store, evil, tags=(evil,), metadata={evil: evil})
        told = [run(*command, *json) for json in ([], ["--json"]) for command in (["list"], ["show", evil])]
        for result in [*told, run("verify"), run("show", "\x1b[2J"), run("rename", evil, f"{evil}c")]:
            assert not set(result.stdout + result.stderr) & set("\x1b\x07\r\x9b\u202e")
        assert r"a\u001b]0;x\u0007\u001b[2J\u000ab\u000d\u202e\u009b31m" in told[0].stdout
        assert lines(told[2])[0]["id"] == lines(told[3])[0]["id"] == evil
        assert lines(told[3])[0]["metadata"] == {evil: evil}

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            (["year"], "--where must be KEY=VALUE, each key once, got 'year'"),
            (["year=1", "year=2"], "--where must be KEY=VALUE, each key once, got 'year=2'"),
            (['of=["a"]'], "metadata of=['a']: only a text, number, true, false or null can be looked for"),
        ],
    )
    def test_refuses_values_that_cannot_be_looked_for(self, run: Run, where: list[str], message: str) -> None:
        assert refused(run("list", *(part for one in where for part in ("--where", one)))) == message


def test_show_tells_machines_what_the_page_says(run: Run, store: MemoryStore) -> None:
    put(store, "a", year=2031)
    (shown,) = lines(run("show", "a", "--json"))
    assert list(shown) == json_fields("show")
    assert shown["fingerprint"] == store.row("a").fingerprint
    assert lines(run("show", "a", "--text", "--json")) == [{"id": "a", "text": TEXT}]
    for_people = run("show", "a").stdout
    assert 'metadata     {"year": 2031}\n' in for_people
    assert "pinned       false\nexpires_at   none\n" in for_people


def test_a_terminal_is_not_given_the_control_characters_of_a_text(run: Run, store: MemoryStore) -> None:
    text = "one\n\ttwo \x1b[2J\x9b31m\n"
    put(store, text=text)
    assert run("show", "doc", "--text").stdout == text
    main, side = pty.openpty()
    command = [*COMMAND, "show", "doc", "--text", "--store", str(store.root)]
    assert subprocess.run(command, stdout=side, check=True).returncode == 0
    os.close(side)
    told = os.read(main, 10_000).decode()
    os.close(main)
    assert told.replace("\r", "") == "one\n\ttwo \\u001b[2J\\u009b31m\n".replace("\t", told[5 : told.index("two")])


def test_output_that_cannot_be_written_is_an_error_in_one_line(run: Run, store: MemoryStore) -> None:
    put(store, "a")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "show", "a"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


class TestLabel:
    def test_changes_what_it_is_told_and_nothing_else(self, run: Run, store: MemoryStore) -> None:
        label(store, "a", metadata={"year": 2031}, tags=["farm"])
        before = store.row("a").label
        (shown,) = lines(run("label", "a", "--pin", "--json"))
        assert list(shown) == json_fields("label")
        assert store.row("a").label == Label(before.metadata, before.tags, True)
        run("label", "a", "--tag", "new", "--tag", "old", "--no-pin")
        assert store.row("a").label == Label(before.metadata, ["new", "old"])
        run("label", "a", "--metadata", '{"draft": true}', "--no-tags")
        assert store.row("a").label == Label({"draft": True})
        run("label", "a", "--ttl", "12h")
        expires_at = datetime.fromisoformat(str(store.row("a").expires_at))
        assert abs(expires_at - datetime.now(UTC) - timedelta(hours=12)) < timedelta(minutes=1)
        run("label", "a", "--ttl", "never")
        assert store.row("a").label == Label({"draft": True})
        assert store.text("a") == TEXT

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "nothing is to be changed: give --metadata, --tag, --no-tags, --pin, --no-pin or --ttl"),
            (["--tag", "x", "--no-tags"], "--tag and --no-tags contradict each other"),
            (["--tag", ""], "a tag must be a text that is not empty, got ''"),
            (["--metadata", "year: 2031"], "--metadata must be a JSON object, got 'year: 2031': Expecting value"),
            (["--metadata", "[" * 100_000], "--metadata must be a JSON object, got '[["),
            (["--metadata", "[2031]"], "metadata must be a dict with text keys, got [2031]"),
            (["--metadata", '{"year": NaN}'], "metadata['year'] is nan"),
            (["--ttl", ""], "--ttl must be a whole number with s, m, h, d or w"),
            (["--ttl", "soon"], "--ttl must be a whole number with s, m, h, d or w"),
        ],
    )
    def test_refuses_what_cannot_be_kept(self, run: Run, store: MemoryStore, options: list[str], message: str) -> None:
        label(store, "a", tags=["farm"])
        before = store.row("a")
        assert refused(run("label", "a", *options)).startswith(message)
        assert store.row("a") == before

    def test_of_a_document_that_there_is_not_suggests_others(self, run: Run, store: MemoryStore) -> None:
        put(store, "notes/roof")
        message = "no document 'notes/rof' is stored; did you mean 'notes/roof'?"
        assert refused(run("label", "notes/rof", "--pin")) == message


def test_rename_keeps_all_but_the_id(run: Run, store: MemoryStore) -> None:
    label(store, "a", tags=["farm"], pinned=True)
    put(store, "b")
    before = store.row("a").label
    assert refused(run("rename", "a", "b")) == "'b' is the id of another document; remove that first, or choose another"
    assert refused(run("rename", "a", "")).startswith("a document id must not be empty")
    assert refused(run("rename", "x", "y")).startswith("no document 'x' is stored")
    (renamed,) = lines(run("rename", "a", "any text / at all", "--json"))
    assert list(renamed) == json_fields("rename")
    assert renamed == {"id": "any text / at all", "status": "renamed"}
    assert [row.id for row in store.list()] == ["any text / at all", "b"]
    assert store.row("any text / at all").label == before
    assert store.text("any text / at all") == TEXT
    assert run("rename", "b", "c").stdout == "renamed c\n"
    assert run("verify").exit_code == 0


def test_remove_tells_machines_what_the_page_says(run: Run, store: MemoryStore) -> None:
    for id in "abc":
        put(store, id)
    assert [list(one) for one in lines(run("remove", "c", "a", "--json"))] == [json_fields("remove")] * 2
    assert [row.id for row in store.list()] == ["b"]
    assert len(files(store)) == 1


def test_erase_removes_documents_with_what_was_removed_before(run: Run, store: MemoryStore) -> None:
    for id in "abc":
        put(store, id)
    put_secret(store)
    assert [list(one) for one in lines(run("erase", "c", "a", "--json"))] == [json_fields("erase")] * 2
    assert [row.id for row in store.list()] == [ID, "b"]
    assert refused(run("erase", "b", "absent")).startswith("no document 'absent' is stored")
    assert [row.id for row in store.list()] == [ID, "b"]
    assert run("remove", ID).exit_code == 0
    assert traces(store.root)
    assert run("erase").stdout == ""
    assert traces(store.root) == set()
    assert run("erase", "b").stdout == "erased b\n"
    assert store.list() == []


def test_expire_frees_the_room_of_documents_whose_time_is_over(run: Run, store: MemoryStore) -> None:
    label(store, "b", expires_at="2999-01-01T00:00:00+00:00")
    label(store, "a", expires_at=datetime.now(UTC).isoformat())
    assert [row["id"] for row in lines(run("list", "--json"))] == ["b"]
    assert len(files(store)) == 2
    (expired,) = lines(run("expire", "--json"))
    assert list(expired) == json_fields("expire")
    assert expired == {"id": "a", "status": "expired"}
    assert len(files(store)) == 1
    assert run("expire").stdout == ""


def test_namespaces_lists_what_each_holds(run: Run, store: MemoryStore) -> None:
    assert run("namespaces").stdout == ""
    put(store.within("café"), "a")
    put(store.within("café"), "b")
    put(store.within("bob"), "c")
    found = lines(run("namespaces", "--json"))
    assert [list(one) for one in found] == [json_fields("namespaces")] * len(found)
    named = {str(one["namespace"]): (one["documents"], one["bytes"]) for one in found if one["namespace"]}
    bytes_ = store.within("bob").row("c").bytes
    assert named == {"bob": (1, bytes_), "café": (2, 2 * bytes_)}
    assert "café: 2 documents, 0.0 MB\n" in run("namespaces").stdout


class TestSettings:
    def test_are_shown_and_changed_one_by_one(self, run: Run) -> None:
        (shown,) = lines(run("settings", "--json"))
        assert list(shown) == json_fields("settings")
        assert shown == {"precision": "auto", "quota": None, "files": None, "cache_bytes": 10**10}
        run("settings", "--precision", "int8")
        assert lines(run("settings", "--quota", "1.5GB", "--json")) == [
            shown | {"precision": "int8", "quota": 15 * 10**8}
        ]
        assert lines(run("settings", "--quota", "none", "--json")) == [shown | {"precision": "int8"}]
        assert "quota        none\n" in run("settings").stdout

    def test_showing_them_creates_nothing(self, run: Run, store: MemoryStore) -> None:
        run("settings")
        assert not store.root.exists()

    def test_are_what_a_new_namespace_begins_with(self, run: Run) -> None:
        run("settings", "--precision", "int8", "--quota", "1MB")
        run("settings", "--precision", "int4", "--namespace", "alice")
        run("settings", "--precision", "float16")
        (alice,) = lines(run("settings", "--namespace", "alice", "--json"))
        assert (alice["precision"], alice["quota"]) == ("int4", 10**6)

    @pytest.mark.parametrize(
        ("written", "bytes_"),
        [("500", 500), ("2kb", 2000), ("1.5 MB", 1_500_000), ("9223372036854775807", 2**63 - 1), ("2T", 2 * 10**12)],
    )
    def test_sizes_are_in_powers_of_a_thousand(self, run: Run, written: str, bytes_: int) -> None:
        assert lines(run("settings", "--quota", written, "--cache", written, "--json"))[0]["quota"] == bytes_
        assert lines(run("settings", "--json"))[0]["cache_bytes"] == bytes_

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--quota", "", "--quota must be bytes, such as 500MB, 10GB or 2TB, or none, got ''"),
            ("--quota", "much", "--quota must be bytes, such as 500MB, 10GB or 2TB, or none, got 'much'"),
            ("--quota", "-1", "--quota must be bytes"),
            ("--quota", "9223372036854775808", "--quota must be bytes"),
            ("--quota", "9" * 400 + "TB", "--quota must be bytes"),
            ("--quota", "0", "quota=0 must be a number of bytes from 1 to"),
            ("--cache", "10 apples", "--cache must be bytes"),
            ("--files", "bucket/prefix", "files='bucket/prefix' must be a URL such as s3://bucket/prefix"),
            ("--files", "", "files='' must be a URL such as s3://bucket/prefix"),
        ],
    )
    def test_that_cannot_be_are_refused(self, run: Run, option: str, value: str, message: str) -> None:
        before = run("settings").stdout
        assert refused(run("settings", option, value)).startswith(message)
        assert run("settings").stdout == before

    def test_say_where_files_lie(self, run: Run, store: MemoryStore, tmp_path: Path) -> None:
        url = (tmp_path / "bucket").as_uri()
        put(store, "a")
        assert "only an empty store can be given another place" in refused(run("settings", "--files", url))
        run("settings", "--files", url, "--cache", "none", "--store", "remote")
        assert run("copy", "remote").exit_code == 0
        assert len(list((tmp_path / "bucket" / "kv").rglob("*.safetensors"))) == 1
        assert run("show", "a", "--text", "--store", "remote").stdout == TEXT
        assert run("verify", "--store", "remote").exit_code == 0


class TestQuantize:
    def test_keeps_documents_in_less(self, run: Run, store: MemoryStore) -> None:
        label(store, "a", tags=["farm"])
        put(store, "b")
        bytes_ = store.row("a").bytes
        (one,) = lines(run("quantize", "int4", "b", "b", "--json"))
        assert list(one) == json_fields("quantize")
        assert one == {"id": "b", "status": "converted", "precision": "int4", "bytes": store.row("b").bytes}
        assert run("quantize", "int4").stdout == "converted a: int4, 0.0 MB\nunchanged b: int4, 0.0 MB\n"
        assert [row.precision for row in store.list()] == ["int4", "int4"]
        assert store.row("a").bytes < bytes_
        assert store.row("a").tags == ("farm",)
        assert run("verify").exit_code == 0

    def test_goes_on_after_a_document_that_cannot_be_and_fails_at_the_end(self, run: Run, store: MemoryStore) -> None:
        for id in "abc":
            put(store, id)
        store.convert("a", "int4")
        path = store.root / store.row("b").file
        path.write_bytes(path.read_bytes()[:-9])
        result = run("quantize", "int8", "--json")
        assert result.exit_code == 1
        assert [one["status"] for one in lines(result)] == ["failed", "failed", "converted"]
        assert str(lines(result)[0]["reason"]).startswith("int4 K/V hold no more than that")
        assert store.row("a").precision == "int4"

    def test_refuses_what_is_no_precision_or_no_document(self, run: Run, store: MemoryStore) -> None:
        put(store, "a")
        unusable = run("quantize", "auto")
        assert (unusable.exit_code, "'auto' is not one of 'float32'" in unusable.stderr) == (2, True)
        assert refused(run("quantize", "int8", "a", "b")).startswith("no document 'b' is stored")
        assert store.row("a").precision == "bfloat16"
        assert run("quantize", "int2").exit_code == 2


class TestVerifyAndRepair:
    def test_of_a_sound_store_find_nothing(self, run: Run, store: MemoryStore) -> None:
        assert run("verify").exit_code == 0  # nor of one that there is not
        put(store, "a")
        for command, remark in (
            ("verify", "documents: 1, conversations: 0, all sound\n"),
            ("repair", "problems: 0, mended: 0\n"),
        ):
            result = run(command)
            assert (result.exit_code, result.stdout, result.stderr) == (0, "", remark)
            assert run(command, "--json").output == ""

    def test_tell_what_is_wrong_and_mend_it_without_a_model(self, run: Run, store: MemoryStore) -> None:
        put(store, "a")
        label(store, "b", tags=["farm"])
        (store.root / store.row("b").file).with_suffix(".json").unlink()
        (store.root / "kv" / ".tmp-1").write_bytes(b"left by a crash")
        found = run("verify", "--json")
        assert found.exit_code == 1
        assert [list(problem) for problem in lines(found)] == [json_fields("verify")] * 2
        assert [(one["kind"], one["document"]) for one in lines(found)] == [("stale-label", "b"), ("stale-temp", None)]
        told = run("verify")
        assert told.stdout.startswith("stale-label: the label of 'b' is missing\nstale-temp: ")
        assert told.stderr == "problems: 2; `beacon-memory repair` mends what can be mended\n"
        mended = run("repair", "--json")
        assert mended.exit_code == 0
        assert [one["mended"] for one in lines(mended)] == [True, True]
        assert run("verify").exit_code == 0

    def test_with_what_only_a_model_could_mend_fail(self, run: Run, store: MemoryStore) -> None:
        put(store, "a")
        files(store)[0].unlink()
        result = run("repair")
        assert result.exit_code == 1
        assert result.stdout.startswith("missing-file: ")
        assert "it could not be compressed anew: " in result.stdout
        assert result.stderr == "problems: 1, mended: 0\n"
        shown = run("show", "a", "--text")  # it may be a text that was replaced: its file was the proof
        assert (shown.exit_code, shown.stdout) == (1, "")
        assert "is missing; `beacon-memory repair`" in shown.stderr
        assert store.parts.catalog().documents.text("a") == TEXT

    @pytest.mark.parametrize("harm", ["gone", "overwritten"])
    def test_make_a_lost_catalog_anew_with_all_labels(self, run: Run, store: MemoryStore, harm: str) -> None:
        label(store, "a", tags=["farm"], pinned=True, metadata={"year": 2031})
        label(store, "b", expires_at="2999-01-01T00:00:00+00:00")
        before = lines(run("list", "--json"))
        store.close()
        catalog = store.root / "catalog.sqlite3"
        for path in store.root.glob("catalog.sqlite3*"):
            path.unlink()
        if harm == "overwritten":
            catalog.write_bytes(b"no database" * 1000)
        assert run("verify").exit_code == 1
        assert run("repair").exit_code == 0
        changing = {"updated_at": "", "used_at": ""}
        assert [row | changing for row in lines(run("list", "--json"))] == [row | changing for row in before]
        assert [row["id"] for row in lines(run("list", "--tag", "farm", "--json"))] == ["a"]
        assert run("show", "a", "--text").stdout == TEXT
        assert run("verify").exit_code == 0

    def test_look_at_one_namespace(self, run: Run, store: MemoryStore) -> None:
        put(store, "a")
        put(store.within("alice"), "a")
        files(store.within("alice"))[0].unlink()
        assert run("verify").exit_code == 0
        assert run("verify", "--namespace", "alice").exit_code == 1


class TestArchives:
    @pytest.fixture(autouse=True)
    def _documents(self, store: MemoryStore) -> None:
        label(store, "a", tags=["farm"], pinned=True, metadata={"year": 2031})
        put(store, "b")
        store.convert("b", "int8")

    def test_export_and_import_carry_all_that_is_known(self, run: Run) -> None:
        exported = run("export", "new/all.tar", "--json")
        assert lines(exported) == [{"documents": 2, "path": "new/all.tar"}]
        assert exported.stderr == ""
        imported = run("import", "new/all.tar", "--namespace", "alice", "--json")
        assert lines(imported) == [{"documents": 2, "path": "new/all.tar"}]
        assert list(lines(imported)[0]) == json_fields("export") == json_fields("import")
        ours, theirs = lines(run("list", "--json")), lines(run("list", "--namespace", "alice", "--json"))
        changing = {"updated_at": "", "used_at": ""}
        assert [row | changing for row in theirs] == [row | changing for row in ours]
        assert run("show", "b", "--text", "--namespace", "alice").stdout == TEXT
        assert run("verify", "--namespace", "alice").exit_code == 0

    def test_export_writes_chosen_documents_into_a_new_file(self, run: Run, tmp_path: Path) -> None:
        assert "documents    1\n" in run("export", "one.tar", "--doc", "b", "--doc", "b").stdout
        assert refused(run("export", "one.tar")) == "one.tar exists; remove it, or choose another name"
        assert refused(run("export", "x.tar", "--doc", "x")).startswith("no document 'x' is stored")
        assert run("import", "one.tar", "--store", "other").exit_code == 0
        assert [row["id"] for row in lines(run("list", "--store", "other", "--json"))] == ["b"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one.tar", "other", "store"]

    def test_import_replaces_documents_only_when_told(self, run: Run, store: MemoryStore) -> None:
        run("export", "all.tar")
        store.delete("b")
        store.update("a", tags=["newer"])
        message = "'a' would replace stored documents: allow that with replace, or remove them first"
        assert refused(run("import", "all.tar")) == message
        assert [(row.id, row.tags) for row in store.list()] == [("a", ("newer",))]
        assert run("import", "all.tar", "--replace").exit_code == 0
        assert [(row.id, row.tags) for row in store.list()] == [("a", ("farm",)), ("b", ())]

    def test_import_takes_nothing_from_an_archive_that_is_not_whole(self, run: Run, tmp_path: Path) -> None:
        run("export", "all.tar")
        whole = (tmp_path / "all.tar").read_bytes()
        for name, data in (("cut", whole[: len(whole) // 2]), ("damaged", whole.replace(b"red house", b"rat house"))):
            (tmp_path / name).write_bytes(data)
            assert name in refused(run("import", name, "--store", "other"))
            assert lines(run("list", "--store", "other", "--json")) == []
        assert refused(run("import", "absent.tar")).startswith("absent.tar ")

    def test_copy_carries_documents_to_other_stores_and_namespaces(self, run: Run, store: MemoryStore) -> None:
        copied = run("copy", "other", "--doc", "a", "--json")
        assert lines(copied) == [{"documents": 1, "path": "other"}]
        assert list(lines(copied)[0]) == json_fields("copy")
        assert copied.stderr == ""
        assert run("copy", str(store.root), "--to-namespace", "alice").exit_code == 0
        assert store.within("alice").row("a").label == store.row("a").label
        assert refused(run("copy", "other")).startswith("'a' would replace stored documents")
        assert run("copy", "other", "--replace").exit_code == 0
        assert [row["id"] for row in lines(run("list", "--store", "other", "--json"))] == ["a", "b"]
        assert refused(run("copy", str(store.root))).endswith(
            "cannot be copied into itself; name another store or namespace"
        )
        assert refused(run("copy", "third", "--doc", "x")).startswith("no document 'x' is stored")


class TestShared:
    """A store in PostgreSQL, named by its URL."""

    def test_documents_go_into_a_database_and_back(
        self, run: Run, store: MemoryStore, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        url, there = postgres.new_database(), (tmp_path / "files").as_uri()
        for id in ("a", "b"):
            label(store, id, metadata={"of": id}, tags=["farm"])
        assert refused(run("copy", url)).startswith(f"{url} has no place for K/V files that all machines reach")
        assert lines(run("settings", "--files", there, "--store", url, "--json"))[0]["files"] == there
        copied = run("copy", url, "--json")
        assert lines(copied) == [{"documents": 2, "path": url}]
        assert [row["id"] for row in lines(run("list", "--tag", "farm", "--store", url, "--json"))] == ["a", "b"]
        assert run("label", "b", "--pin", "--store", url).exit_code == 0
        assert run("verify", "--store", url).exit_code == 0
        assert run("copy", str(tmp_path / "back"), "--store", url).exit_code == 0
        with MemoryStore(tmp_path / "back") as back:
            assert back.row("a").label == store.row("a").label
            assert back.row("b").pinned
            assert back.read("a")[1].text == TEXT
        assert refused(run("list", "--store", "mysql://host/db")).startswith("mysql://... is no store")


class TestInterrupted:
    """By Ctrl-C, as a process of its own."""

    COUNT = 60

    @pytest.fixture(autouse=True)
    def _documents(self, store: MemoryStore) -> None:
        for number in range(self.COUNT):
            put(store, f"{number:02}")

    def test_quantize_can_be_repeated_and_speaks_json_into_a_pipe_all_the_time(
        self, run: Run, store: MemoryStore
    ) -> None:
        terminal, bar = pty.openpty()
        command = [*COMMAND, "quantize", "int8", "--json"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=bar, env=environment, text=True) as child:
            assert child.stdout is not None
            first = json.loads(child.stdout.readline())
            child.send_signal(signal.SIGINT)
            child.wait(timeout=60)
        told = os.read(terminal, 1 << 16).decode()
        os.close(bar)
        os.close(terminal)
        assert child.returncode == 130
        assert "interrupted; repeat the command to go on" in told
        done = [row.id for row in store.list() if row.precision == "int8"]
        assert first["id"] in done
        assert len(done) < self.COUNT
        assert run("verify").output == f"documents: {self.COUNT}, conversations: 0, all sound\n"
        again = lines(run("quantize", "int8", "--json"))
        assert [one["id"] for one in again if one["status"] == "unchanged"] == done
        assert {row.precision for row in store.list()} == {"int8"}

    def test_import_can_be_repeated(self, run: Run, store: MemoryStore, tmp_path: Path) -> None:
        run("export", "all.tar")
        other = MemoryStore(tmp_path / "other")
        command = [*COMMAND, "import", "all.tar", "--store", "other"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            while child.poll() is None and len(other.list()) < 3:
                time.sleep(0.001)
            child.send_signal(signal.SIGINT)
            _, told = child.communicate(timeout=60)
        assert child.returncode == 130
        assert told == "\ninterrupted; repeat the command with --replace to go on\n"
        assert 0 < len(other.list()) < self.COUNT
        assert run("verify", "--store", "other").exit_code == 0
        assert run("import", "all.tar", "--store", "other", "--replace").exit_code == 0
        assert [row.id for row in other.list()] == [row.id for row in store.list()]
        assert run("verify", "--store", "other").exit_code == 0
