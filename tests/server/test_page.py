"""The page of the server: its examples run, in their order, on an empty store."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from repository import ROOT
from servers import running

from beacon_memory import BeaconMemory, BeaconModel

PAGE = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def test_examples_run(model: BeaconModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 5
    with running(BeaconMemory(tmp_path / "store", model, reserve=100)) as server:
        names: dict[str, object] = {"URL": server.url}
        for block in blocks:
            exec(compile(block, "server.md", "exec", dont_inherit=True), names)  # noqa: S102  # our own document
            for job in server.service.jobs.list(""):  # what the reader of the page would wait for
                while not server.service.jobs.get(job.id, "").status.ended:
                    time.sleep(0.02)
    said = capsys.readouterr().out
    assert "event: done" in said
    assert "['lease'] False" in said
    assert "memory slots were loaded" in said
