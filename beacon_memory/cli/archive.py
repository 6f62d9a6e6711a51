"""The commands that move documents between stores and archives."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .help import Commands
from .options import (
    AsJson,
    Namespace,
    Store,
    open_store,
    path_given,
    store_given,
)
from .terminal import (
    counting,
    print_fields,
    reported,
    say_evicted,
    say_gone,
)

__all__ = ["app"]

app = Commands()

_STORE = "The store"

Replace = Annotated[bool, typer.Option("--replace", help="Let them take the place of stored ones.")]
Docs = Annotated[
    list[str] | None,
    typer.Option(help="Id of a document; repeat it for several.", metavar="ID", show_default="all"),
]


@app.command("export", rich_help_panel=_STORE)
def export_archive(
    path: Annotated[Path, typer.Argument(help="Archive to write, a file that does not exist yet.", parser=path_given)],
    doc: Docs = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Write documents, with all that is known of them, into one file, for a backup or another store.

    Without --doc, conversations go with them.

    With --json one object: documents, path.
    """
    from beacon_memory.storage.archive import export_documents

    with reported("nothing was written"):
        documents = open_store(store, namespace)
        with counting(len(doc) if doc else documents.totals().documents) as done:
            count = export_documents(documents, path, doc or None, on_document=lambda _: done(), on_gone=say_gone)
        print_fields({"documents": count, "path": str(path)}, as_json)


@app.command("import", rich_help_panel=_STORE)
def import_archive(
    path: Annotated[Path, typer.Argument(help="Archive that `export` wrote.", parser=path_given)],
    replace: Replace = False,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Take all documents and conversations of an archive into the store.

    The archive is checked as a whole before anything is stored.

    With --json one object: documents, path.
    """
    from beacon_memory.storage.archive import import_documents

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
        Any,  # str | Path: typer takes no unions
        typer.Argument(
            help="Folder or URL of the store to copy into; this one, to copy into another namespace.",
            parser=store_given,
            metavar="target",
        ),
    ],
    doc: Docs = None,
    to_namespace: Annotated[str, typer.Option(help="Namespace to copy into.", show_default="none")] = "",
    replace: Replace = False,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Copy documents into another store or namespace; without --doc, with all conversations.

    With --json one object: documents, path.
    """
    from beacon_memory.storage.archive import copy_documents

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
                on_gone=say_gone,
                on_evicted=lambda row: say_evicted(row.id),
            )
        print_fields({"documents": count, "path": str(target)}, as_json)
