"""The benchmark of fresh processes runs what it says, here with a tiny model and one round."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.bench import start
from beacon_memory.errors import InputError


def test_a_fresh_answer_is_measured_beside_bare_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path, tiny_base("llama", max_position_embeddings=4096))
    monkeypatch.setattr(start, "_ROUNDS", 1)
    answered, ended, processor, alone, together = start.run(str(model), None, "cpu", "auto")
    assert answered.name.endswith("until the answer stands there")
    least, longest = (float(figure.detail.split(" s / ")[0]) for figure in (answered, ended))
    assert 0 < least <= longest
    assert all(figure.value > 0 for figure in (processor, alone, together))


def test_a_model_without_weights_to_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder with safetensors"):
        start.run(str(tmp_path), None, None, "auto")
