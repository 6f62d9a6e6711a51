"""The commands that show stored documents, and change their labels and ids."""

import contextlib
import json
from typing import TYPE_CHECKING, Annotated

import typer

from beacon_memory.documents import KEEP
from beacon_memory.errors import CorruptFileError, InputError

from .help import Commands
from .options import (
    AsJson,
    Namespace,
    Store,
    expiry,
    open_store,
)
from .terminal import (
    document_fields,
    print_as_it_is,
    print_fields,
    print_json,
    print_rows,
    remarks,
    reported,
    row_fields,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["app"]

app = Commands()

_STORED = "What is stored"

Ids = Annotated[list[str], typer.Argument(help="Ids of the documents.", metavar="id")]
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
    prefix: Annotated[str, typer.Option(help="Only ids that begin with this.", show_default=False)] = "",
    after: Annotated[str, typer.Option(help="Only ids after this one: page by page.", show_default=False)] = "",
    limit: Annotated[int | None, typer.Option(help="Most documents to list.", min=1, show_default="all")] = None,
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


def _pairs(given: "Iterable[str]") -> dict[str, object]:
    """Parse KEY=VALUE texts; values may be JSON."""
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
            print_as_it_is(documents.text(id))


@app.command(rich_help_panel=_STORED)
def remove(ids: Ids, store: Store = None, namespace: Namespace = "", as_json: AsJson = False) -> None:
    """Remove documents: all that are named, or none if one of them is not stored.

    With --json one object a line: id, status.
    """
    with reported("documents not named as removed are still there"):
        documents = open_store(store, namespace)
        for id in ids:  # all must exist before the first goes
            with contextlib.suppress(CorruptFileError):  # a document that is damaged beyond repair can be removed
                documents.row(id)
        for id in dict.fromkeys(ids):
            documents.delete(id)
            say(as_json, {"id": id, "status": "removed"})


@app.command(rich_help_panel=_STORED)
def erase(
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of the documents.", metavar="id", show_default="only what was removed before"),
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Remove documents with all traces of them, and of what was removed, replaced or pushed out before.

    Of documents that remove forgets, words can stay in the catalog and its log for long. This writes the catalog anew.

    With --json one object a line: id, status.
    """
    from beacon_memory.storage.erasing import erase as erase_from

    with reported("repeat the command, without those ids that are gone"):
        erase_from(open_store(store, namespace), ids or ())
        for id in dict.fromkeys(ids or ()):
            say(as_json, {"id": id, "status": "erased"})


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
        str | None, typer.Option(help="New metadata, a JSON object that replaces the old.", metavar="JSON")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="New tags, which replace the old; repeat it for several.")
    ] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Take all tags off.")] = False,
    pin: Annotated[
        bool | None, typer.Option("--pin/--no-pin", help="Whether a quota must never evict it.", show_default=False)
    ] = None,
    ttl: Annotated[str | None, typer.Option(help="Time to live from now: 90m, 12h, 30d, 8w, or never.")] = None,
    store: Store = None,
    namespace: Namespace = "",
    as_json: AsJson = False,
) -> None:
    """Change a document's metadata, tags, pin or time to live; all others stay.

    With --json one object: id, compression, precision, tokens, slots, bytes, ratios, metadata, tags, pinned,
    expires_at, created_at, updated_at, used_at, file, fingerprint.
    """
    with reported():
        if tag and no_tags:
            raise InputError("--tag and --no-tags contradict each other")
        if (metadata, pin, ttl) == (None, None, None) and not (tag or no_tags):
            raise InputError("nothing is to be changed: give --metadata, --tag, --no-tags, --pin, --no-pin or --ttl")
        try:
            values = KEEP if metadata is None else json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--metadata must be a JSON object, got {metadata!r}: {error}") from None
        row = open_store(store, namespace).update(
            id,
            metadata=values,
            tags=() if no_tags else tag or KEEP,
            pinned=KEEP if pin is None else pin,
            expires_at=KEEP if ttl is None else None if ttl == "never" else expiry(ttl),
        )
        print_fields(document_fields(row), as_json)
