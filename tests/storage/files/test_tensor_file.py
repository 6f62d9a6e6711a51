"""Files that are written piece by piece are those that `safetensors` writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beacon_memory.storage.files.tensor_file import TensorFile


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_the_file_is_that_of_safetensors(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    numbers = torch.randint(0, 200, (rows, 3))
    tensors = {
        "keys": numbers.to(dtype),
        "values": numbers.flip(1).to(dtype).contiguous(),
        "places": numbers[:, 0].to(torch.uint8).contiguous(),
        "counts": torch.tensor([[5, 6]], dtype=torch.uint8),
    }
    metadata = {"beacon_memory": '{"id": "Größe \\" 1"}'}
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    ours = tmp_path / "ours"
    ours.touch()
    with TensorFile(ours, {name: (one.dtype, one.shape) for name, one in tensors.items()}, metadata) as file:
        for name in sorted(tensors, reverse=True):
            for part in tensors[name].split(2):
                file.append(name, part)
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_are_replaced_by_others_of_the_same_length(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    with TensorFile(path, {"keys": (torch.uint8, (2,))}, {"hash": "000"}) as file:
        file.append("keys", torch.tensor([1, 2], dtype=torch.uint8))
        assert b"".join(file.read("keys")) == b"\x01\x02"
        before = path.stat().st_size
        file.describe({"hash": "abc"})
        with pytest.raises(ValueError, match="cannot take the place"):
            file.describe({"hash": "a" * 20})
    assert path.stat().st_size == before
    assert b'"abc"' in path.read_bytes()
