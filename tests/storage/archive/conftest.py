from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive_samples import CREATED, IDS
from kv_samples import TEXT, sample

from beacon_memory.documents import Label
from beacon_memory.storage.archive import export_documents
from beacon_memory.storage.store import MemoryStore


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    """A store with three documents of different labels and precisions, which no test changes."""
    labels = (Label({"a": [1, {"b": None}]}), Label(tags=("x", "y"), pinned=True), Label(expires_at="2099-01-01T00Z"))
    with MemoryStore(tmp_path_factory.mktemp("stores") / "source") as store:
        for id, label, precision in zip(IDS, labels, ("auto", "int8", "int4"), strict=True):
            text = f"{TEXT} {id}"
            store.put(*sample(id, text), text, label, precision=precision, created_at=CREATED)
        yield store


@pytest.fixture(scope="module")
def exported(source: MemoryStore) -> bytes:
    path = source.root.with_name("archive.tar")
    assert export_documents(source, path) == 3
    return path.read_bytes()


@pytest.fixture
def archive(exported: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "archive.tar"
    path.write_bytes(exported)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "target") as store:
        yield store


@pytest.fixture
def changing(source: MemoryStore, tmp_path: Path) -> Iterator[MemoryStore]:
    """The same as `source`, for a test to change."""
    source.close()
    shutil.copytree(source.root, tmp_path / "changing")
    with MemoryStore(tmp_path / "changing") as store:
        yield store
