"""The commands that look after a store."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import BeaconMemoryError, CorruptFileError, InputError
from .options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Precision,
    Score,
    ScoreOption,
    Store,
    expiry,
    open_memory,
    open_store,
    size,
)
from .terminal import (
    compressing,
    counting,
    document_fields,
    print_fields,
    print_json,
    print_rows,
    remarks,
    reported,
    row_fields,
    say,
    say_evicted,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .results import Added, Document
    from .upkeep import Problem

__all__ = ["app"]

app = typer.Typer()

_STORED = "What is stored"
_STORE = "The store"

Replace = Annotated[bool, typer.Option("--replace", help="Let documents take the place of stored ones.")]
Ids = Annotated[list[str], typer.Argument(help="Ids of the documents.", metavar="id")]
IdsOrAll = Annotated[list[str] | None, typer.Argument(help="Ids of the documents.", metavar="id", show_default="all")]
Docs = Annotated[
    list[str] | None,
    typer.Option(help="Id of a document; repeat it for several.", metavar="ID", show_default="all"),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Only with this value in the metadata: JSON, else a text; repeat it for several keys.", metavar="KEY=VALUE"
    ),
]


@app.command("list", rich_help_panel=_STORED)
def list_documents(
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; repeated, with all of them.")] = None,
    where: Where = None,
    prefix: Annotated[str, typer.Option(help="Only ids that begin so.", show_default=False)] = "",
    after: Annotated[str, typer.Option(help="Only ids behind this one: page by page.", show_default=False)] = "",
    limit: Annotated[int | None, typer.Option(help="At most so many.", min=1, show_default="all")] = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """List the stored documents by id.

    With --json one object a line: id, compression, precision, tokens, slots, bytes, ratios, metadata, tags, pinned,
    expires_at, created_at, updated_at, used_at.
    """
    with reported():
        metadata = _pairs(where or ())
        documents = open_store(store, namespace)
        rows = documents.list(tags=tag or (), metadata=metadata, prefix=prefix, after=after, limit=limit)
        if as_json:
            for row in rows:
                print_json(row_fields(row))
        elif rows:
            print_rows(rows)
        elif documents.totals().documents:
            remarks().print("no document is like that; without filters, list shows all")
        else:
            remarks().print("nothing is stored yet; add documents with: beacon-memory add PATH")


def _pairs(given: Iterable[str]) -> dict[str, object]:
    """Keys and values, which may be JSON."""
    pairs: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key in pairs:
            raise InputError(f"--where must be KEY=VALUE, each key once, got {text!r}")
        try:
            pairs[key] = json.loads(value)
        except (ValueError, RecursionError):
            pairs[key] = value
    return pairs


@app.command(rich_help_panel=_STORED)
def show(
    id: Annotated[str, typer.Argument(help="Id of the document.")],
    text: Annotated[bool, typer.Option("--text", help="Print the source text instead.")] = False,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Show what is known of a document, or its text.

    With --json one object: id, compression, precision, tokens, slots, bytes, ratios, metadata, tags, pinned,
    expires_at, created_at, updated_at, used_at, file, fingerprint. With --text: id, text.
    """
    with reported():
        documents = open_store(store, namespace)
        if not text:
            print_fields(document_fields(documents.row(id)), as_json)
        elif as_json:
            print_json({"id": id, "text": documents.text(id)})
        else:
            typer.echo(documents.text(id), nl=False)


@app.command(rich_help_panel=_STORED)
def remove(ids: Ids, store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Forget documents: all of those named, or none if one is not stored.

    With --json one object a line: id, status.
    """
    with reported("what was not named as removed is there"):
        documents = open_store(store, namespace)
        for id in ids:  # all must exist before the first goes
            with contextlib.suppress(CorruptFileError):  # one that is damaged beyond repair may go
                documents.row(id)
        for id in dict.fromkeys(ids):
            documents.delete(id)
            say(as_json, {"id": id, "status": "removed"})


@app.command(rich_help_panel=_STORED)
def rename(
    id: Annotated[str, typer.Argument(help="Id of the document.")],
    new_id: Annotated[str, typer.Argument(help="Its new id, which no other document may have.")],
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Give a document another id; its K/V, text and label stay.

    With --json one object: id, status.
    """
    with reported("the document has its old id"):
        row = open_store(store, namespace).rename(id, new_id)
        say(as_json, {"id": row.id, "status": "renamed"})


@app.command(rich_help_panel=_STORED)
def label(
    id: Annotated[str, typer.Argument(help="Id of the document.")],
    metadata: Annotated[
        str | None, typer.Option(help="New metadata as a whole, a JSON object.", metavar="JSON")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="New tags as a whole; repeat it for several.")] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Take all tags off.")] = False,
    pin: Annotated[
        bool | None, typer.Option("--pin/--no-pin", help="Whether a quota must never evict it.", show_default=False)
    ] = None,
    ttl: Annotated[str | None, typer.Option(help="Time to live from now: 90m, 12h, 30d, 8w, or never.")] = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Change a document's metadata, tags, pin or time to live; what is not given stays.

    With --json one object: id, compression, precision, tokens, slots, bytes, ratios, metadata, tags, pinned,
    expires_at, created_at, updated_at, used_at, file, fingerprint.
    """
    with reported():
        if tag and no_tags:
            raise InputError("--tag and --no-tags contradict each other")
        changes: dict[str, Any] = {"tags": tag or None, "pinned": pin}
        changes = {name: value for name, value in changes.items() if value is not None}
        changes |= {"tags": ()} if no_tags else {}
        changes |= {} if ttl is None else {"expires_at": None if ttl == "never" else expiry(ttl)}
        if metadata is not None:
            try:
                changes["metadata"] = json.loads(metadata)
            except (ValueError, RecursionError) as error:
                raise InputError(f"--metadata must be a JSON object, got {metadata!r}: {error}") from None
        if not changes:
            raise InputError("nothing is to be changed: give --metadata, --tag, --no-tags, --pin, --no-pin or --ttl")
        print_fields(document_fields(open_store(store, namespace).update(id, **changes)), as_json)


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
        Precision | None,
        typer.Option(help="What K/V of new documents are kept in; auto: as computed. For stored ones see quantize."),
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
        changes: dict[str, Any] = {"precision": precision.value} if precision else {}
        changes |= {} if quota is None else {"quota": size("--quota", quota)}
        changes |= {} if files is None else {"files": None if files == "none" else files}
        changes |= {} if cache is None else {"cache_bytes": size("--cache", cache) or 0}
        print_fields(asdict(documents.configure(**changes) if changes else documents.settings), as_json)


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
        if precision is Precision.AUTO:
            raise InputError("auto is no precision to convert to; choose float32, bfloat16, float16, int8 or int4")
        documents = open_store(store, namespace)
        rows = documents.list() if not ids else [documents.row(id) for id in dict.fromkeys(ids)]
        with counting(len(rows)) as done:
            for row in rows:
                try:
                    now = documents.convert(row.id, precision.value)
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
    with reported():
        documents = open_store(store, namespace)
        problems = documents.verify()
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


@app.command("export", rich_help_panel=_STORE)
def export_archive(
    path: Annotated[Path, typer.Argument(help="Archive to write, a file that does not exist yet.")],
    doc: Docs = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Write documents, with all that is known of them, into one file, for a backup or another store.

    With --json one object: documents, path.
    """
    from .archive import export_documents

    with reported("nothing was written"):
        documents = open_store(store, namespace)
        with counting(len(doc) if doc else documents.totals().documents) as done:
            count = export_documents(documents, path, doc or None, lambda _: done())
        print_fields({"documents": count, "path": str(path)}, as_json)


@app.command("import", rich_help_panel=_STORE)
def import_archive(
    path: Annotated[Path, typer.Argument(help="Archive that `export` wrote.")],
    replace: Replace = False,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Take all documents of an archive into the store.

    The archive is checked as a whole before anything is stored.

    With --json one object: documents, path.
    """
    from .archive import import_documents

    with reported("repeat the command with --replace to go on"):
        documents = open_store(store, namespace)
        with counting(None) as done:
            count = import_documents(
                documents,
                path,
                replace=replace,
                on_document=lambda _: done(),
                on_evicted=lambda row: say_evicted(row.id),
            )
        print_fields({"documents": count, "path": str(path)}, as_json)


@app.command(rich_help_panel=_STORE)
def copy(
    target: Annotated[
        Path, typer.Argument(help="Folder of the store to copy into; this one, to copy into another namespace.")
    ],
    doc: Docs = None,
    to_namespace: Annotated[str, typer.Option(help="Namespace to copy into.", show_default="none")] = "",
    replace: Replace = False,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Copy documents into another store or namespace.

    With --json one object: documents, path.
    """
    from .archive import copy_documents

    with reported("repeat the command with --replace to go on"):
        source = open_store(store, namespace)
        into = open_store(target, to_namespace)
        with counting(len(doc) if doc else source.totals().documents) as done:
            count = copy_documents(
                source,
                into,
                doc or None,
                replace=replace,
                on_document=lambda _: done(),
                on_evicted=lambda row: say_evicted(row.id),
            )
        print_fields({"documents": count, "path": str(target)}, as_json)
