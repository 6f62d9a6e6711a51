"""Compression methods from outside the package: found, used, stored under their name, and missed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cli_samples import lines, runner
from compressor_samples import WINDOW, model_of
from repository import ROOT
from tiny_models import some_ids, tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer, train

from beacon_memory import BeaconMemory, ConfigError, Document, InputError
from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods import CompressionMethod, ReadWindow, ScoredMethod, registry
from beacon_memory.compression.selection import read_raw
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.evaluation.baseline_names import baselines
from beacon_memory.evaluation.baselines import Compressed
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel

TEXT = "In the year 1700 the miller of Wend sold seven sacks of flour, and kept the eighth. " * 2


def make_model() -> BeaconModel:
    config = BeaconConfig(beacon_window=WINDOW)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model()


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


class Site:
    """A folder of installed packages, with the example as the package `knorm-demo`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        info = folder / "knorm_demo-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: knorm-demo\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[beacon_memory.compression]\nknorm = compression_method:KeyNorm\nbroken = no_such_module:Method\n"
        )
        shutil.copy(ROOT / "examples" / "extend" / "compression_method.py", folder)
        monkeypatch.syspath_prepend(folder)

    def uninstall(self) -> None:
        shutil.rmtree(self.folder / "knorm_demo-1.0.dist-info")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "site", monkeypatch)


def positions_of(memory: MemoryKV, layer: int, head: int) -> list[int]:
    return [int(position) for position in memory.layer(layer)[head][2]]


def test_installed_method_keeps_the_entries_that_it_scores_highest(site: Site) -> None:
    model, ids = model_of(), some_ids(WINDOW, seed=1)
    compressor = BeaconCompressor(model)
    kv = compressor.compress_one(Work(ids, [4]), compression="knorm").kv
    with torch.no_grad():
        raw = read_raw(model, model.prefix(MemoryKV.of(compressor.sink)), ids)
    smallest = raw.keys.norm(dim=-1).argsort(dim=-1)[..., : WINDOW // 4].sort(dim=-1).values
    assert kv.span == WINDOW
    for layer, heads in enumerate(smallest.tolist()):
        assert [positions_of(kv, layer, head) for head in range(len(heads))] == heads


def test_installed_method_works_wherever_a_built_in_one_does(site: Site, memory: BeaconMemory) -> None:
    added = memory.add("doc", TEXT[:70], ratio=4, compression="knorm")
    assert (added.status, added.compression, memory.show("doc").compression) == ("added", "knorm", "knorm")
    assert memory.add("doc", TEXT[:70], ratio=4, compression="knorm").status == "unchanged"
    assert memory.append("doc", TEXT[70:]).status == "appended"
    memory.add("whole", TEXT, ratio=4, compression="knorm")
    grown, whole = (memory.store.get(id) for id in ("doc", "whole"))
    assert torch.equal(grown.kv.positions, whole.kv.positions)
    assert grown.header.method == whole.header.method == {"package": "knorm-demo"}
    assert memory.ask("Who kept it?", "doc", max_new_tokens=2).ids == ("doc",)
    assert memory.verify() == []


def test_memories_of_a_method_that_is_gone_still_answer(site: Site, memory: BeaconMemory) -> None:
    memory.add("doc", TEXT, ratio=4, compression="knorm")
    before = memory.ask("Who kept it?", "doc", max_new_tokens=4).text
    site.uninstall()
    with BeaconMemory(memory.store.root, memory.model, reserve=100) as later:
        assert later.ask("Who kept it?", "doc", max_new_tokens=4).text == before
        assert later.show("doc").compression == "knorm"
        assert later.verify() == []
        assert later.store.rename("doc", "other").compression == "knorm"


def test_only_what_compresses_is_refused_without_the_method_and_told_what_to_install(
    site: Site, memory: BeaconMemory
) -> None:
    memory.add("doc", TEXT, ratio=4, compression="knorm")
    memory.add("plain", TEXT, ratio=4, compression="select")
    row = memory.show("doc")
    site.uninstall()
    missing = "compression='knorm' comes with a package that is missing: `pip install knorm-demo`"
    with pytest.raises(ConfigError, match=missing):
        memory.append("doc", "more")
    renewing = BeaconMemory(memory.store.root, train(make_model(), seed=7), reserve=100)
    failed: dict[str, str] = {}
    with pytest.raises(ConfigError, match=missing):
        renewing.recompress()

    def note(document: Document, error: Exception) -> None:
        failed[document.id] = str(error)

    assert [one.id for one in renewing.recompress(on_error=note)] == ["plain"]
    assert failed == {"doc": missing}
    with pytest.raises(ConfigError, match=r"'knorm' must be 'auto' or one of .*: 'beacon', 'select', 'hybrid'"):
        memory.add("new", TEXT, compression="knorm")
    assert memory.show("doc") == row


def test_command_line_takes_any_installed_method(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", max_position_embeddings=4096)
    run = runner(tmp_path / "store", tiny_checkpoint(tmp_path / "model", base), monkeypatch)
    Path("doc.txt").write_text(TEXT)
    (added,) = lines(run("add", "doc.txt", "--ratio", "4", "--compression", "knorm", "--json"))
    assert (added["status"], added["compression"]) == ("added", "knorm")
    site.uninstall()
    assert lines(run("ask", "Who kept it?", "--doc", "doc.txt", "--max-new-tokens", "2", "--json"))
    refused = run("add", "doc.txt", "--compression", "knorm")
    assert refused.exit_code == 2
    assert "'hybrid'" in refused.stderr


def test_broken_method_is_refused_with_its_package(site: Site) -> None:
    with pytest.raises(ConfigError, match="no_such_module:Method of the package 'knorm-demo'"):
        registry.find("broken")


def test_every_installed_method_is_a_baseline(site: Site, model: BeaconModel) -> None:
    (one,) = baselines(["knorm:4@int8"], model)
    assert isinstance(one, Compressed)
    assert (one.compression, one.ratio, one.bits) == ("knorm", 4, 8)


def test_method_can_be_registered_for_a_process(model: BeaconModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    class First(ScoredMethod):
        def scores(self, windows: Sequence[ReadWindow]) -> list[torch.Tensor]:
            return [-torch.arange(len(window.ids)).expand(window.kv.keys.shape[:-1]) for window in windows]

    registry.register("first", First)
    assert registry.names()[:3] == ("beacon", "select", "hybrid")
    assert "first" in registry.names()
    kv = BeaconCompressor(model).compress_one(Work(some_ids(WINDOW), [4]), compression="first").kv
    assert positions_of(kv, 0, 0) == [0, 1]
    assert BeaconCompressor(model).parameters("first") == {}
    for name in ("select", "auto", "First", "a b", ""):
        with pytest.raises(ConfigError, match="cannot be called"):
            registry.register(name, First)


def test_scores_of_another_shape_are_refused(model: BeaconModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class OfTokens(ScoredMethod):
        def scores(self, windows: Sequence[ReadWindow]) -> list[torch.Tensor]:
            return [torch.zeros(len(window.ids)) for window in windows]

    monkeypatch.setattr(registry, "_registered", {"flat": OfTokens})
    with pytest.raises(ConfigError, match=r"OfTokens.scores gave scores of shape \[8\].* \[3, 2, 8\]"):
        BeaconCompressor(model).compress_one(Work(some_ids(WINDOW), [4]), compression="flat")


@pytest.mark.parametrize("name", list(registry.BUILT_IN))
def test_documents_before_an_error_are_finished_first(model: BeaconModel, name: str) -> None:
    def works() -> Iterator[tuple[str, Work]]:
        yield "a", Work(some_ids(WINDOW), [4])
        yield "b", Work(some_ids(WINDOW), [4])
        raise InputError("no more")

    compressed = BeaconCompressor(model).compress(works(), compression=name)
    assert [next(compressed)[0], next(compressed)[0]] == ["a", "b"]
    with pytest.raises(InputError, match="no more"):
        next(compressed)


@pytest.mark.parametrize("name", list(registry.BUILT_IN))
def test_built_in_methods_pass_by_the_same_door(name: str) -> None:
    method: CompressionMethod = registry.find(name)(BeaconCompressor(model_of()))
    assert method.span(WINDOW, 4) == {"beacon": 2, "select": WINDOW, "hybrid": WINDOW + 1}[name]
    assert registry.package_of(name) is None
