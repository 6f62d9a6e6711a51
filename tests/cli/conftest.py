from __future__ import annotations

from pathlib import Path

import pytest
from cli_samples import Run, runner
from postgres_server import postgres  # noqa: F401  # a fixture
from tiny_models import tiny_base, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), tiny_base("llama", max_position_embeddings=4096))


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(tmp_path / "store", model, monkeypatch)
