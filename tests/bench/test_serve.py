"""The benchmark of a server runs what it says, here with a tiny model and two clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.bench import serve, soak


def test_a_server_is_measured_beside_the_library_and_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(tmp_path, tiny_base("llama", max_position_embeddings=4096))
    monkeypatch.setattr(serve, "_ROUNDS", 2)
    monkeypatch.setattr(serve, "_NEW_TOKENS", 4)
    monkeypatch.setattr(soak, "_BETWEEN_DOCUMENTS", 0.5)
    monkeypatch.setattr(soak, "_MOST_PATIENT", 0.1)
    figures = serve.run(str(model), None, "cpu", "auto", clients=4, minutes=0.05)
    added, command, speed, slowest, errors, wrong, growth = figures
    theirs, ours = (float(part.split(" ms")[0]) for part in added.detail.split(" / "))
    assert added.value == pytest.approx(theirs - ours, abs=0.2)
    assert min(theirs, ours, speed.value) > 0
    assert slowest.value >= 1
    assert command.value > 0.01, "a process takes longer than that to begin"
    assert (errors.value, wrong.value) == (0, 0), errors.detail
    answered, _refused, left = (int(part.split()[0].replace(",", "")) for part in errors.detail.split(", ")[:3])
    assert min(answered, left) > 3
    assert wrong.detail == f"of {answered:,}"
    assert 0.9 < growth.value < 1.5
