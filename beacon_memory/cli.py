"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, cli_eval
from .errors import BeaconMemoryError, InputError
from .options import Adapter, AsJson, Compression, Device, Dtype, DtypeOption, Model, Score, Store
from .terminal import (
    answer_fields,
    note_usage,
    print_fields,
    print_json,
    print_rows,
    remarks,
    reported,
    row_fields,
    say,
)

if TYPE_CHECKING:
    from .memory import BeaconMemory
    from .results import Added
    from .sources import Source
    from .store import MemoryStore

__all__ = ["app", "main"]

app = typer.Typer(
    help="""Long-term memory for local language models.

    [bold]add[/bold] reads documents once and stores them compressed, [bold]ask[/bold] answers from them without
    reading them again.

    The default model is embedded; --model and --adapter name others, from a folder or the Hugging Face hub.""",
    epilog="Example: beacon-memory add notes/ && beacon-memory ask 'What did we decide about the roof?'",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_eval.app, name="eval")


def default_store() -> Path:
    """The store of a user who names none."""
    import platformdirs

    return platformdirs.user_data_path("beacon-memory") / "store"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"beacon-memory {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def add(
    paths: Annotated[
        list[str], typer.Argument(help="Text or markdown files, folders, globs, or - for standard input.")
    ],
    id: Annotated[str | None, typer.Option(help="Id of the document.", show_default="its path as given")] = None,
    ratio: Annotated[
        str,
        typer.Option(help="Tokens per memory slot: 2, 4, 8, 16, 32; or auto, the smallest that fits the model."),
    ] = "auto",
    compression: Annotated[
        Compression,
        typer.Option(
            help="beacon: beacons of the adapter; select: K/V of the tokens that each head needs, works without an "
            "adapter; hybrid: both; auto: what the adapter asks for, select without one."
        ),
    ] = Compression.AUTO,
    score: Annotated[
        Score,
        typer.Option(
            help="How select and hybrid choose tokens: repeat, by what heads read of them while the model repeats the "
            "text; expected, by the attention to be expected, which is worse and saves a pass."
        ),
    ] = Score.REPEAT,
    store: Store = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Read documents once and store them compressed.

    A document that is stored already and has not changed is skipped, so an interrupted run can just be repeated.
    With --json one object a line: id, status, tokens, slots, bytes, ratios, compression, seconds.
    """
    from .sources import find_sources

    with reported():
        chosen: int | str = int(ratio) if ratio.lstrip("-").isdigit() else ratio
        sources, skipped = find_sources(paths, id)
        for one in skipped:
            say(as_json, {"id": one.path.as_posix(), "status": "skipped", "reason": one.reason})
        if not sources:
            raise InputError("there is nothing to add: no text or markdown file was found")
        memory = _memory(store, model, adapter, device, dtype, score)
        failed = _add_all(memory, sources, chosen, compression.value, as_json)
    if failed:
        raise typer.Exit(1)


def _add_all(memory: BeaconMemory, sources: list[Source], ratio: int | str, compression: str, as_json: bool) -> int:
    """Add all sources behind a progress bar; returns how many could not be."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .results import Document
    from .results import Progress as Advance
    from .sources import read_source

    failed: list[str] = []

    def failure(document: Document, error: BeaconMemoryError) -> None:
        failed.append(document.id)
        bar.advance(whole)
        say(as_json, {"id": document.id, "status": "failed", "reason": str(error)})

    def documents() -> Iterator[Document]:
        for source in sources:
            try:
                text = read_source(source)
            except InputError as error:
                failure(Document(source.id, ""), error)
                continue
            yield Document(source.id, text, {"path": str(source.path.absolute())} if source.path else None)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    memory.compressor  # noqa: B018  # load the model before the bar shows
    # with standard output in a pipe rich would send what is printed there to the bar's console
    with Progress(*columns, console=remarks(), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        estimate = sum(source.size for source in sources) // 4  # about four bytes a token, until all are tokenized
        tokens = bar.add_task("tokens", total=max(1, estimate))
        whole = bar.add_task("documents", total=len(sources))

        def advanced(progress: Advance) -> None:
            last = bar.tasks[whole].remaining == 1
            bar.update(
                tokens, completed=progress.tokens, total=progress.begun if last else max(estimate, progress.begun)
            )

        def stored(added: Added) -> None:
            bar.advance(whole)
            say(as_json, asdict(added))

        memory.add_many(documents(), ratio, compression, progress=advanced, on_added=stored, on_error=failure)
    return len(failed)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    doc: Annotated[
        list[str] | None, typer.Option(help="Id of a document to answer from; repeat it for several.", metavar="ID")
    ] = None,
    limit: Annotated[int, typer.Option(help="Without --doc: how many documents full-text search may pick.", min=1)] = 3,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample; 0 is greedy.", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this mass.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer at this text; repeat it for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    store: Store = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Answer a question from stored documents, without reading them again.

    With --json one object: answer, ids, slots, prompt_tokens, generated_tokens, time_to_first_token, seconds.
    """
    from .results import Answer

    with reported():
        if stream and as_json:
            raise InputError("--stream prints text and --json one object: choose one")
        memory = _memory(store, model, adapter, device, dtype)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        options |= {k: v for k, v in {"temperature": temperature, "top_p": top_p}.items() if v is not None}
        if stream:
            for piece in memory.stream(question, doc or None, limit=limit, stop=stop, seed=seed, **options):
                if isinstance(piece, Answer):
                    typer.echo()
                    note_usage(piece)
                else:
                    typer.echo(piece, nl=False)
            return
        answer = memory.ask(question, doc or None, limit=limit, stop=stop, seed=seed, **options)
        if as_json:
            print_json(answer_fields(answer))
        else:
            typer.echo(answer.text)
            note_usage(answer)


@app.command("list")
def list_documents(store: Store = None, as_json: AsJson = False) -> None:
    """List the stored documents. With --json one object a line."""
    with reported():
        rows = _store(store).list()
        if as_json:
            for row in rows:
                print_json(row_fields(row))
        elif rows:
            print_rows(rows)
        else:
            remarks().print("nothing is stored yet; add documents with: beacon-memory add PATH")


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="Id of the document.")],
    text: Annotated[bool, typer.Option("--text", help="Print the source text instead.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known of a document."""
    with reported():
        documents = _store(store)
        row = documents.row(id)
        if text:
            typer.echo(documents.text(id), nl=False)
        else:
            fields = row_fields(row) | {"file": str(documents.folder / row.file), "fingerprint": row.fingerprint}
            print_fields(fields, as_json)


@app.command()
def remove(
    ids: Annotated[list[str], typer.Argument(help="Ids of the documents.", metavar="ID...")],
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Forget documents."""
    with reported():
        documents = _store(store)
        for row in [documents.row(id) for id in dict.fromkeys(ids)]:  # all must exist before the first goes
            documents.delete(row.id)
            say(as_json, {"id": row.id, "status": "removed"})


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove files that a crash left behind.")] = False,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Read every stored file in full and report what is wrong; exits with 1 if something is."""
    with reported():
        documents = _store(store)
        problems = documents.verify(repair=repair)
        for problem in problems:
            fields = asdict(problem) | {"path": str(problem.path) if problem.path else None}
            print_json(fields) if as_json else typer.echo(f"{problem.kind}: {problem.message}")
        if not as_json:
            remarks().print(f"{len(documents.list())} documents, {len(problems)} problems")
    if any(not problem.removed for problem in problems):
        raise typer.Exit(1)


@app.command()
def info(
    store: Store = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Show model, adapter, device and store."""
    with reported():
        memory = _memory(store, model, adapter, device, dtype)
        loaded, rows = memory.model, memory.list()
        fields = {
            "model": loaded.base.config.name_or_path,
            "adapter": loaded.adapter,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "positions": loaded.max_positions,
            "window": loaded.config.beacon_window,
            "ratios": list(loaded.config.beacon_ratio),
            "compression": loaded.compression,
            "fingerprint": loaded.fingerprint.digest,
            "store": str(memory.store.folder),
            "documents": len(rows),
            "bytes": sum(row.bytes for row in rows),
        }
        print_fields(fields, as_json)


@app.command()
def bench(
    tokens: Annotated[int, typer.Option(help="Length of the document, in tokens.", min=256)] = 8000,
    ratio: Annotated[int, typer.Option(help="Ratio at which speed is measured.", min=1)] = 8,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory against the stock model, on this machine, as one table."""
    with reported():
        from . import bench as measure

        _quiet()
        figures = measure.run(model, adapter, device, dtype.value, tokens=tokens, ratio=ratio)
        if as_json:
            print_json([asdict(figure) for figure in figures])
        else:
            typer.echo(measure.table(figures))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="TOML file, or a shipped recipe by its name: default, paper.")],
    output: Annotated[Path, typer.Argument(help="Folder for checkpoints, logs and the finished adapter.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data files that the recipe names.",
            show_default="the recipe's own folder",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    r"""Train an adapter as a recipe says, and print its folder.

    An interrupted run can just be repeated: the same command goes on from the last checkpoint.
    Needs the extra: pip install 'beacon-memory\[train]'. With --json one object: adapter.
    """
    with reported("repeat the command to go on from the last checkpoint"):
        from . import training

        settings, file = training.read_recipe(recipe)
        if data is None and recipe in training.shipped_recipes():
            raise InputError(f"the recipe {recipe!r} is shipped without its data; name their folder with --data")
        run = training.train  # refuses before anything is loaded if the extra is not installed
        _quiet()
        adapter = run(settings, file.parent, data or file.parent, output, device)
        print_json({"adapter": str(adapter)}) if as_json else typer.echo(adapter)


def _memory(
    store: Path | None,
    model: str | None,
    adapter: str | None,
    device: str | None,
    dtype: Dtype,
    score: Score = Score.REPEAT,
) -> BeaconMemory:
    from .memory import BeaconMemory

    _quiet()
    return BeaconMemory(store or default_store(), model, adapter, device=device, dtype=dtype.value, score=score.value)


def _store(store: Path | None) -> MemoryStore:
    from .store import MemoryStore

    return MemoryStore(store or default_store())


def _quiet() -> None:
    """No progress bars for loading weights, which take no time worth showing."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Entry point of the command `beacon-memory`."""
    app()
