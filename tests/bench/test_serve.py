"""The benchmark of a server runs what it says, here with a tiny model and two clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.bench import serve


def test_a_server_is_measured_beside_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path, tiny_base("llama", max_position_embeddings=4096))
    monkeypatch.setattr(serve, "_ROUNDS", 2)
    monkeypatch.setattr(serve, "_NEW_TOKENS", 4)
    added, speed, slowest = serve.run(str(model), None, "cpu", "auto", clients=2)
    theirs, ours = (float(part.split(" ms")[0]) for part in added.detail.split(" / "))
    assert added.value == pytest.approx(theirs - ours, abs=0.2)
    assert min(theirs, ours, speed.value) > 0
    assert slowest.value >= 1
