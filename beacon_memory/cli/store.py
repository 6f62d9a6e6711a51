"""The commands that look after a store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from beacon_memory.documents import KEEP, Precision
from beacon_memory.errors import BeaconMemoryError

from .options import (
    PRECISION,
    Adapter,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Score,
    ScoreOption,
    Store,
    open_memory,
    open_store,
    size,
)
from .terminal import (
    compressing,
    counting,
    print_fields,
    print_json,
    remarks,
    reported,
    say,
)

if TYPE_CHECKING:
    from beacon_memory.documents import Document
    from beacon_memory.results import Added
    from beacon_memory.storage.repair import Problem


__all__ = ["app"]

app = typer.Typer()

_STORE = "The store"

IdsOrAll = Annotated[list[str] | None, typer.Argument(help="Ids of the documents.", metavar="id", show_default="all")]


@app.command(rich_help_panel=_STORE)
def expire(store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Free the room of documents whose time to live is over.

    They are not seen any more, but take room until this, or until the next document is stored.

    With --json one object a line: id, status.
    """
    with reported():
        for id in open_store(store, namespace).expire():
            say(as_json, {"id": id, "status": "expired"})


@app.command(rich_help_panel=_STORE)
def namespaces(store: Store = None, as_json: AsJson = False) -> None:
    """List the namespaces of a store, with what each holds.

    With --json one object a line: namespace, documents, bytes.
    """
    with reported():
        documents = open_store(store, "")
        for name in documents.namespaces():
            kept = documents.within(name).totals()
            if as_json:
                print_json({"namespace": name, **asdict(kept)})
            else:
                typer.echo(f"{name or '(none)'}: {kept.documents:,} documents, {kept.bytes / 1e6:,.1f} MB")


@app.command(rich_help_panel=_STORE)
def settings(
    precision: Annotated[
        str | None,
        typer.Option(
            **PRECISION,
            help="What K/V of new documents are kept in; auto: as computed. For stored ones see quantize.",
        ),
    ] = None,
    quota: Annotated[
        str | None,
        typer.Option(
            help="Bytes that all K/V may take, such as 10GB, or none for no bound. For a new document, those go that "
            "are not pinned and were not used for longest."
        ),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option(
            help="Object storage for the files of a store that is still empty, such as s3://bucket/prefix; none: its "
            "folder."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Room for files from object storage on this machine, such as 10GB.")
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Show how a store, or a namespace of it, keeps its documents, or change that.

    A new namespace begins with the settings of the store.

    With --json one object: precision, quota, files, cache_bytes.
    """
    with reported():
        documents = open_store(store, namespace)
        if precision is quota is files is cache is None:
            now = documents.settings
        else:
            now = documents.configure(
                precision=KEEP if precision is None else precision,
                quota=KEEP if quota is None else size("--quota", quota),
                files=KEEP if files is None else None if files == "none" else files,
                cache_bytes=KEEP if cache is None else size("--cache", cache) or 0,
            )
        print_fields(asdict(now), as_json)


@app.command(rich_help_panel=_STORE)
def quantize(
    precision: Annotated[
        Precision, typer.Argument(help="What to keep the K/V in; those in int8 can only become int4.")
    ],
    ids: IdsOrAll = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Keep stored K/V in another precision; int8 takes about half of the 16-bit ones, int4 a quarter.

    What is kept so already is left alone: after Ctrl-C, repeat the command. There is no way back but to compress the
    documents anew, with add.

    With --json one object a line: id, status, precision, bytes.
    """
    failed = 0
    with reported("repeat the command to go on"):
        documents = open_store(store, namespace)
        rows = documents.list() if not ids else [documents.row(id) for id in dict.fromkeys(ids)]
        with counting(len(rows)) as done:
            for row in rows:
                try:
                    now = documents.convert(row.id, precision)
                except BeaconMemoryError as error:
                    failed += 1
                    say(as_json, {"id": row.id, "status": "failed", "reason": str(error)})
                else:
                    status = "unchanged" if now.file == row.file else "converted"
                    say(as_json, {"id": row.id, "status": status, "precision": now.precision, "bytes": now.bytes})
                done()
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=_STORE)
def verify(store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Read every stored byte and report what is wrong; exits with 1 if something is.

    Changes nothing. With --namespace that namespace, without it what lies outside all of them.

    With --json one object a line: kind, document, path, message, mended.
    """
    from beacon_memory.storage.repair import verify as look_through

    with reported():
        documents = open_store(store, namespace)
        problems = look_through(documents)
        _tell(problems, as_json)
        if problems and not as_json:
            remarks().print(f"problems: {len(problems)}; `beacon-memory repair` mends what can be mended")
        elif not as_json:
            remarks().print(f"documents: {documents.totals().documents}, all sound")
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=_STORE)
def repair(
    score: ScoreOption = Score.REPEAT,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Mend what `verify` finds; exits with 1 if something is left.

    Rows and texts are made anew from the files, lost or damaged files are compressed anew from the texts (only for this
    the model is loaded), and what a crash left is removed.

    With --json one object a line: kind, document, path, message, mended.
    """
    with reported("repeat the command to go on"):
        problems = open_memory(store, namespace, model, adapter, device, dtype, score).repair()
        _tell(problems, as_json)
        left = [problem for problem in problems if not problem.mended]
        if not as_json:
            remarks().print(f"problems: {len(problems)}, mended: {len(problems) - len(left)}")
    if left:
        raise typer.Exit(1)


def _tell(problems: list[Problem], as_json: bool) -> None:
    for problem in problems:
        if as_json:
            print_json(asdict(problem))
        else:
            typer.echo(f"{problem.kind}{' (mended)' if problem.mended else ''}: {problem.message}")


@app.command(rich_help_panel=_STORE)
def recompress(
    ids: IdsOrAll = None,
    score: ScoreOption = Score.REPEAT,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Make the K/V of another model or adapter anew with this one, from the stored texts.

    Documents that are up to date are left alone: after Ctrl-C, repeat the command. Programs that have the old model
    loaded go on with the old K/V until all documents are renewed.

    With --json one object a line: id, status, tokens, slots, bytes, ratios, compression, precision, seconds, evicted.
    """
    failed: list[str] = []
    with reported("repeat the command to go on"):
        memory = open_memory(store, namespace, model, adapter, device, dtype, score)
        rows = memory.list() if not ids else [memory.show(id) for id in dict.fromkeys(ids)]
        current = memory.model.fingerprint.digest
        due = [row for row in rows if row.fingerprint != current]
        with compressing(len(due), sum(row.tokens for row in due)) as bar:

            def failure(document: Document, error: BeaconMemoryError) -> None:
                failed.append(document.id)
                bar.document()
                say(as_json, {"id": document.id, "status": "failed", "reason": str(error)})

            def stored(added: Added) -> None:
                bar.document()
                say(as_json, asdict(added))

            done = memory.recompress([row.id for row in due], progress=bar.tokens, on_added=stored, on_error=failure)
        if not as_json:
            remarks().print(f"{len(done)} recompressed, {len(rows) - len(due)} were up to date")
    if failed:
        raise typer.Exit(1)
