"""What the command line prints where standard streams are closed or full, or have an encoding that lacks characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import Run, lines
from rich.progress import Progress

from beacon_memory.cli.terminal import CompressingBar
from beacon_memory.results import Progress as Advance

TEXT = "The café of Łódź, said Ada Flint, has a roof of larch boards.\n"


def command(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a process of its own; shell: redirections, such as `>&-`."""
    script = f'exec "$0" -m beacon_memory "$@" {shell}'
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    return subprocess.run(
        ["sh", "-c", script, sys.executable, *arguments], capture_output=True, check=False, env=environment
    )


def write(*names: str) -> None:
    for name in names:
        Path(name).write_text(TEXT, encoding="utf-8")


def test_a_character_that_the_terminal_lacks_is_an_escape_and_ends_nothing(run: Run) -> None:
    write("a ł b.txt", os.fsdecode(b"caf\xe9.txt"), "z.txt")
    added = command("add", ".", "--pin", PYTHONIOENCODING="ascii")
    assert [line.split(b":")[0] for line in added.stdout.splitlines()] == [rb"added a \u0142 b.txt", b"added z.txt"]
    assert added.stderr.splitlines() == [
        rb"failed caf\udce9.txt: 'caf\udce9.txt' is not UTF-8, so it can be no id; rename the file, or add it by "
        rb"itself, with --id"
    ]
    assert added.returncode == 1
    listed = command("list", PYTHONIOENCODING="ascii")
    assert rb"a \u0142 b.txt " in listed.stdout
    assert listed.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_is_whole_in_any_encoding(run: Run, encoding: str) -> None:
    write("a ł é.txt")
    run("add", "a ł é.txt")
    shown = command("list", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(shown.stdout.decode(encoding)) == lines(run("list", "--json"))[0]


def test_a_text_is_shown_as_it_was_stored_or_not_at_all(run: Run) -> None:
    write("a.txt")
    run("add", "a.txt")
    refused = command("show", "a.txt", "--text", PYTHONIOENCODING="latin-1")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert rb"'\u0141', which latin-1, the encoding of standard output, lacks; set PYTHONIOENCODING" in refused.stderr


def test_a_file_whose_name_is_no_utf_8_is_reported_and_the_others_are_added(run: Run) -> None:
    write("a.txt", os.fsdecode(b"caf\xe9.txt"), "z.txt")
    added = command("add", ".", "--json")
    assert (added.returncode, added.stderr) == (1, b"")
    said = [json.loads(line) for line in added.stdout.decode().splitlines()]
    assert {one["id"]: one["status"] for one in said} == {
        "a.txt": "added",
        os.fsdecode(b"caf\xe9.txt"): "failed",
        "z.txt": "added",
    }
    assert lines(run("add", os.fsdecode(b"caf\xe9.txt"), "--id", "café", "--json"))[0]["id"] == "café"
    assert {row["id"] for row in lines(run("list", "--json"))} == {"a.txt", "café", "z.txt"}
    assert run("verify").stdout == ""


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_obstacle(run: Run, closed: str) -> None:
    write("a.txt", "b.txt")
    for arguments in (["add", "a.txt", "b.txt"], ["list"]):
        done = command(*arguments, shell=closed)
        assert (done.returncode, done.stderr) == (0, b""), arguments
    assert len(lines(run("list", "--json"))) == 2


def test_what_is_written_to_a_closed_stream_gets_into_no_file(run: Run) -> None:
    script = (
        "import os, sys; from beacon_memory.cli.terminal import prepare_streams; prepare_streams(); "
        "file = open('kept', 'w'); file.write('kept'); file.flush(); print('lost'); os.write(1, b'lost'); "
        "os.write(2, b'lost'); sys.stderr.write('lost'); os.system('echo lost; echo lost >&2')"
    )
    subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script], check=True)
    assert Path("kept").read_text(encoding="utf-8") == "kept"


def test_closed_standard_input_is_no_text(run: Run) -> None:
    done = command("add", "-", "--id", "a", shell="<&-")
    assert done.returncode == 1
    assert done.stderr == b"failed a: standard input is closed\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_an_error_in_one_line(run: Run, arguments: list[str]) -> None:
    done = command(*arguments, shell=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


def test_a_reader_that_has_ended_is_no_error(run: Run) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" -m beacon_memory --version | true', sys.executable], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("before", [0, 500_000])
def test_the_estimate_of_a_long_document_tells_the_truth(before: int) -> None:
    """Also if half of it was read before, which took no time now, and passes take longer than a second."""
    clock = [0.0]
    progress = Progress(get_time=lambda: clock[0], speed_estimate_period=600, disable=True)
    bar = CompressingBar(progress, documents=1, estimate=800_000)
    for tokens in range(before + 4_000, 1_000_000, 4_000):
        clock[0] += 40
        bar.tokens(Advance(tokens, 1_000_000))
        left = progress.tasks[0].time_remaining
        if tokens > before + 8_000:
            assert left == pytest.approx((1_000_000 - tokens) / 100, rel=0.01)
    bar.tokens(Advance(1_000_000, 1_000_000))
    assert progress.tasks[0].description == "storing"
