"""The commands that manage a store."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.documents import KEEP, Precision
from beacon_memory.errors import BeaconMemoryError

from .help import Commands
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
    print_line,
    remarks,
    reported,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from beacon_memory.documents import Document
    from beacon_memory.results import Added
    from beacon_memory.storage.catalog.rows import DocumentRow
    from beacon_memory.storage.repair import Problem
    from beacon_memory.storage.store import MemoryStore


__all__ = ["app"]

app = Commands()

_STORE = "The store"

IdsOrAll = Annotated[list[str] | None, typer.Argument(help="Ids of the documents.", metavar="id", show_default="all")]


@app.command(rich_help_panel=_STORE)
def expire(store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Remove documents whose time to live is over.

    No other command shows them any more, but they take room until this command, or until a document is added.

    With --json one object a line: id, status.
    """
    with reported():
        for id in open_store(store, namespace).expire():
            say(as_json, {"id": id, "status": "expired"})


@app.command(rich_help_panel=_STORE)
def namespaces(store: Store = None, as_json: AsJson = False) -> None:
    """List the namespaces of a store, with what each holds.

    With --json one object a line: namespace, documents, bytes, conversations.
    """
    with reported():
        documents = open_store(store, "")
        for name in documents.namespaces():
            kept = documents.within(name).totals()
            if as_json:
                print_json({"namespace": name, **asdict(kept)})
            else:
                talks = f", {kept.conversations:,} conversations" if kept.conversations else ""
                print_line(f"{name or '(none)'}: {kept.documents:,} documents, {kept.bytes / 1e6:,.1f} MB{talks}")


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
    """Show or change the settings of a store, or of a namespace of it.

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
    """Convert stored K/V to another precision; int8 takes about half of 16 bits, int4 a quarter.

    Documents that have this precision already are left alone: after Ctrl-C, repeat the command. To get the lost
    precision back, documents have to be compressed again, with add.

    With --json one object a line: id, status, precision, bytes.
    """
    with reported("repeat the command to go on"):
        documents = open_store(store, namespace)

        def convert(row: "DocumentRow") -> dict[str, Any]:
            now = documents.convert(row.id, precision)
            status = "unchanged" if now.file == row.file else "converted"
            return {"id": row.id, "status": status, "precision": now.precision, "bytes": now.bytes}

        failed = _each(documents, ids, convert, as_json)
    if failed:
        raise typer.Exit(1)


def _each(
    documents: "MemoryStore", ids: list[str] | None, change: "Callable[[DocumentRow], dict[str, Any]]", as_json: bool
) -> int:
    """Change each of some documents, or of all, and tell what came of it; returns how many have failed."""
    failed = 0
    rows = documents.list() if not ids else [documents.row(id) for id in dict.fromkeys(ids)]
    with counting(len(rows)) as done:
        for row in rows:
            try:
                fields = change(row)
            except BeaconMemoryError as error:
                failed += 1
                fields = {"id": row.id, "status": "failed", "reason": str(error)}
            say(as_json, fields)
            done()
    return failed


@app.command(rich_help_panel=_STORE)
def compact(
    ids: IdsOrAll = None,
    score: ScoreOption = Score.AUTO,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Compress what was appended to documents and is still kept token by token.

    Of each document only the last window is read. Documents that are compact already are left alone: after Ctrl-C,
    repeat the command.

    With --json one object a line: id, status, tokens, slots, bytes, ratios, compression, precision, seconds, evicted.
    """
    with reported("repeat the command to go on"):
        memory = open_memory(store, namespace, model, adapter, device, dtype, score)
        failed = _each(memory.store, ids, lambda row: asdict(memory.compact(row.id)), as_json)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=_STORE)
def verify(store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Read every stored byte and report all problems; exits with 1 if there are any.

    Nothing is changed. With --namespace, that namespace is checked, else all that is outside of namespaces.

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
            kept = documents.totals()
            remarks().print(f"documents: {kept.documents}, conversations: {kept.conversations}, all sound")
    if problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=_STORE)
def repair(
    score: ScoreOption = Score.AUTO,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Repair the problems that `verify` finds; exits with 1 if some are left.

    Rows and texts are made again from the files. Lost or damaged files are compressed again from the texts; only for
    this the model is loaded. Leftovers of a crash are removed.

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


def _tell(problems: "list[Problem]", as_json: bool) -> None:
    for problem in problems:
        if as_json:
            print_json(asdict(problem))
        else:
            print_line(f"{problem.kind}{' (mended)' if problem.mended else ''}: {problem.message}")


@app.command(rich_help_panel=_STORE)
def recompress(
    ids: IdsOrAll = None,
    score: ScoreOption = Score.AUTO,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Compress stored texts again whose K/V are of another model or adapter than this one.

    Documents that are up to date are left alone: after Ctrl-C, repeat the command. Programs that have the old model
    loaded can use the old K/V until all documents are compressed again.

    With --json one object a line: id, status, tokens, slots, bytes, ratios, compression, precision, seconds, evicted.
    """
    failed: list[str] = []
    with reported("repeat the command to go on"):
        memory = open_memory(store, namespace, model, adapter, device, dtype, score)
        rows = memory.list() if not ids else [memory.show(id) for id in dict.fromkeys(ids)]
        current = memory.model.fingerprint.digest
        due = [row for row in rows if row.fingerprint != current]
        with compressing(len(due), sum(row.tokens for row in due)) as bar:

            def failure(document: "Document", error: BeaconMemoryError) -> None:
                failed.append(document.id)
                bar.document()
                say(as_json, {"id": document.id, "status": "failed", "reason": str(error)})

            def stored(added: "Added") -> None:
                bar.document()
                say(as_json, asdict(added))

            done = memory.recompress([row.id for row in due], progress=bar.tokens, on_added=stored, on_error=failure)
        if not as_json:
            remarks().print(f"{len(done)} recompressed, {len(rows) - len(due)} were up to date")
    if failed:
        raise typer.Exit(1)
