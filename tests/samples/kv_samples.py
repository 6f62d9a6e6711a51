"""Small documents with random K/V, as a compressor would hand them to the store, and processes that store them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

from beacon_memory.documents import Text, content_hash
from beacon_memory.kv.fingerprint import Fingerprint
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV

FINGERPRINT = Fingerprint(base="base", adapter="adapter", tokenizer="tokenizer", config="config", rope="rope")
TEXT = "The red house stands on the hill. A blue boat lies in the harbour."

_CHILD = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from kv_samples import TEXT, same, sample
from beacon_memory.documents import Text
from beacon_memory.storage import store
from beacon_memory.storage.files import kv_file
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.store import MemoryStore
folder = Path(sys.argv[1])
"""


def stack(slots: int, *, dtype: torch.dtype = torch.float32) -> BeaconKV:
    """Random K/V of 2 layers and 3 kv heads with head_dim 4."""
    return BeaconKV(torch.randn(2, 3, slots, 4).to(dtype), torch.randn(2, 3, slots, 4).to(dtype))


def memory(span: int, entries: int, *, dtype: torch.dtype = torch.float32) -> MemoryKV:
    """Random K/V as of `stack`, of which every head has kept what chance gave it, `entries` all together."""
    kept = torch.zeros(6 * span, dtype=torch.bool)
    kept[torch.randperm(6 * span)[:entries]] = True
    return MemoryKV.chosen(stack(span, dtype=dtype), kept.view(2, 3, span))


def sample(
    id: str = "doc", text: str = TEXT, *, dtype: torch.dtype = torch.bfloat16
) -> tuple[DocumentHeader, MemoryKV]:
    """A header of two windows, 4 slots of ratio 2 and 2 of ratio 4 for an incomplete unit, and K/V of all levels."""
    windows = (WindowSpan(8, 2, 0, len(text) // 2, 8), WindowSpan(5, 4, len(text) // 2, len(text), 5))
    method = {"score": "repeat"}
    header = DocumentHeader(id, content_hash(text), 13, windows, (7, 8, 9, 10, 11), "select", 13, FINGERPRINT, method)
    kv = memory(13, 6 * header.slots, dtype=dtype)
    return header, replace(kv, levels=torch.randperm(len(kv.keys)).remainder(LEVELS).to(torch.uint8))


def write_kv_file(path: Path, header: DocumentHeader, kv: StoredKV | WindowedKV, text: str = TEXT) -> None:
    """Write a file under its name at once."""
    stage_kv_file(path.parent, header, kv, Text(text)).path.replace(path)


def same(ours: StoredKV, theirs: StoredKV) -> bool:
    """Equal bit for bit, in dtypes too."""
    names = ["keys", "values", "positions", "counts"]
    if isinstance(ours, QuantizedKV):
        names += ["groups", "key_scales", "key_zeros", "value_scales", "value_zeros"]
    if ours.levels is not None:
        names += ["levels"]
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in names]
    same_kind = type(ours) is type(theirs) and ours.span == theirs.span
    same_kind &= (ours.levels is None) == (theirs.levels is None)
    return same_kind and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """Start a Python process that runs `script`, with `folder`, `sample` and the modules of the store at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD + textwrap.dedent(script), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process: its exit status, output and errors."""
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err
