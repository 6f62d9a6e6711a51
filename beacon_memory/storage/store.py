"""Where documents live: for each a K/V file, its label beside it, and a catalog row, written and removed as one.

    folder/catalog.sqlite3                               the rows, source texts and their full-text index, and settings
    folder/settings.json                                 a copy of the settings, once there are any
    folder/sessions/<hash of id>.json                    a copy of the row of a conversation
    folder/kv/<2 hex>/<hash of id>-<number>.safetensors  K/V and text, a new file for each version of a document
    folder/kv/<2 hex>/<hash of id>-<number>-<number>.safetensors  a segment: K/V and text of what was appended
    folder/kv/<2 hex>/<hash of id>-<number>.json         its label
    folder/unfinished/<hash>/                            what was read of a long document that is not stored yet
    folder/namespaces/<hash of name>/                    the same once more for each namespace

A file is complete and on disk before a row names it, and is removed only after the commit of the row that replaced it.
So a reader sees the old version or the new one, and a crash leaves at worst files that no row names.

`MemoryStore` is the front. Behind it are `parts` (what a store is made of), `reading`, `publishing` (files in step with
rows), `conversations` and `eviction`; `repair` checks and mends a store from outside.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from beacon_memory.documents import (
    KEEP,
    Keep,
    Label,
    Precision,
    PrecisionRule,
    Text,
    check_id,
    choose_precision,
    utc_after,
    utc_now,
)
from beacon_memory.errors import ConflictError, CorruptFileError, InputError, StoreError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.full_text import PassageHit
from beacon_memory.storage.catalog.rows import DocumentRow, Totals
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.backend import FilesBackend
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import StoredFile, StoredIndex
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.files.segments import joined_headers, joined_kv
from beacon_memory.storage.files.stored_kv import (
    StoredKV,
    WindowedKV,
    not_finite,
    precision_of,
    require_finite,
    stored_bytes,
    with_precision,
)

from .appending import check_appended, taken_in
from .conversations import StoredConversations
from .eviction import UseLog, delete_expired, make_room
from .parts import StoreParts, namespace_names
from .publishing import NewFile, Publisher, Segment
from .reading import READ_TRIES, find_row, read_document, read_document_index, require_file
from .records import row_of
from .settings import Settings, keep_copy, keeping_copy
from .unfinished import UnfinishedDocument

__all__ = ["MemoryStore", "StoredDocument", "put_row", "taken"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocument:
    """A document as it was stored: its catalog row, its file's header and its K/V."""

    row: DocumentRow
    header: DocumentHeader
    kv: MemoryKV


class MemoryStore:
    """Documents in a folder, or in a database, safe to use from several threads and processes at a time.

        with MemoryStore("store") as store:
            store.put(header, kv, text)
            store.update("a.txt", tags=["math"])
            document = store.get("a.txt", device="cuda")

    place:     the folder, or the URL of a PostgreSQL database that many machines share: postgresql://host/database.
    namespace: a part of the store with documents, settings and quota of its own, which no other part sees; "" is the
               one outside of all others.
    files:     where K/V files lie, if not in the folder: a URL, such as s3://bucket/prefix, or a `FilesBackend`. The
               store remembers the URL: opened again it needs `files` only if no installed backend has its scheme.

    cache:     for a store in a database, the folder where this machine keeps what it used last.

    root is the folder of the whole store on this machine, folder that of the namespace, both absolute; place is what
    the store is opened by. The first write creates it, and before that the store reads as empty. conversations has
    those that `Session` keeps here. parts is for modules that check or mend a store, uses for those that use a
    document without reading its file.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        namespace: str = "",
        *,
        files: FilesBackend | str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.parts = StoreParts(place, namespace, files, cache)
        self.root, self.folder = self.parts.root, self.parts.folder
        self.namespace = self.parts.namespace
        self._publisher = Publisher(self.parts)
        self.uses = UseLog(self.parts)
        self.conversations = StoredConversations(self.parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., MemoryStore], tuple[object, ...]]:
        """Pickle where it lies: what comes out is a store of its own on the same folder."""
        return partial(MemoryStore, files=self.parts.given, cache=self._cache), (self.place, self.namespace)

    def __deepcopy__(self, memo: object) -> MemoryStore:
        """Return the store itself, which threads may share."""
        return self

    def close(self) -> None:
        """Close the catalog; the next use opens it again."""
        self.uses.flush()
        self.parts.close()

    def within(self, namespace: str) -> MemoryStore:
        """Return the same store in another namespace, which the first write creates."""
        same = namespace == self.namespace
        return self if same else MemoryStore(self.place, namespace, files=self.parts.given, cache=self._cache)

    def namespaces(self) -> builtins.list[str]:
        """Return the names of all namespaces that were ever written to, sorted."""
        return namespace_names(self.parts)

    @property
    def place(self) -> str:
        """The folder of the whole store, or the URL of its database."""
        return self.parts.url or str(self.root)

    @property
    def _cache(self) -> Path | None:
        return self.root if self.parts.shared else None

    @property
    def settings(self) -> Settings:
        """How documents are kept, as it is now, whichever process changed it; see `configure`."""
        return self.parts.settings

    def configure(
        self,
        *,
        precision: str | Keep = KEEP,
        quota: int | Keep | None = KEEP,
        files: str | Keep | None = KEEP,
        cache_bytes: int | Keep = KEEP,
    ) -> Settings:
        """Change the `Settings` that are given; returns all. Those of "" are what a new namespace begins with.

        Raises InputError for a value that cannot be, or to move the files of a store that has documents.
        """
        with contextlib.ExitStack() as held:
            if files is not KEEP:  # whoever is writing goes on where it has begun, so wait for the end of it
                catalog = held.enter_context(self.parts.alone())
            else:
                catalog = held.enter_context(self.parts.writing(create=True))
            held.enter_context(keeping_copy(catalog, self.folder))
            held.enter_context(catalog.transaction())
            now = Settings.of(catalog)
            settings = now.changed(precision, quota, files, cache_bytes)
            if settings.files is None and self.parts.shared:
                raise InputError("files: those of a store in a database lie where all machines reach them, give a URL")
            if settings.files != now.files:
                if catalog.properties.count("documents"):
                    raise InputError(
                        "files: only an empty store can be given another place; copy this one into a new one"
                    )
                self.parts.open_files(settings, catalog)  # raises if it is no place
            settings.write(catalog)
            keep_copy(catalog, self.folder)
        return settings

    @property
    def files(self) -> Files:
        """The place where the K/V files lie."""
        return self.parts.files

    def totals(self) -> Totals:
        """Count the documents of this namespace, the bytes of their K/V, and its conversations."""
        catalog = self.parts.catalog()
        properties = catalog.properties
        return Totals(properties.count("documents"), properties.count("bytes"), catalog.conversations.count())

    def __contains__(self, id: object) -> bool:
        try:
            return isinstance(id, str) and self.parts.catalog().documents.get(id) is not None
        except InputError:  # not a possible id, so none that is stored
            return False

    def row(self, id: str, fingerprint: str | None = None) -> DocumentRow:
        """Return the catalog row of a document; raises DocumentNotFoundError with similar ids.

        fingerprint: of the model that shall read the K/V; while a document is recompressed for another model, the row
        of the version that is kept for this one.
        """
        return find_row(self.parts.catalog(), id, fingerprint)

    def list(
        self,
        *,
        prefix: str = "",
        tags: Iterable[str] = (),
        metadata: Mapping[str, object] | None = None,
        after: str = "",
        limit: int | None = None,
    ) -> builtins.list[DocumentRow]:
        """Return the rows of documents in the order of their ids, all or those that the filters let through.

        prefix:   only of ids that begin with it.
        tags:     only of documents that have all of them.
        metadata: only of documents that have all of these values: a text, number, true, false or None, each at the top
                  of their metadata.
        after, limit: only so many rows, of ids that come after this one: page by page.
        """
        return self.parts.catalog().documents.list(
            prefix=prefix, tags=tags, metadata=metadata, after=after, limit=limit
        )

    def text(self, id: str) -> str:
        """Return the source text of a document; raises DocumentNotFoundError, or CorruptFileError if it is damaged.

        It is damaged, too, if the K/V file that lay beside it is gone: then it may have been replaced or removed.
        """
        text = self.parts.catalog().documents.text(id)
        require_file(self.parts, id)
        return text

    def search(
        self,
        query: str,
        limit: int = 10,
        *,
        per_text: int | None = None,
        conversations: bool = True,
        documents: Sequence[str] | None = None,
    ) -> builtins.list[PassageHit]:
        """Return the passages that share words with `query`, best first by BM25; any text is a safe query.

        per_text: at most so many passages of a text. Of documents with the same text, only the one whose row was
                  written last is found.
        conversations: whether to find what conversations were folded into, too.
        documents: only passages of the documents with these ids.

        What words are, and how many passages are looked at, see `full_text.search`. Raises InputError for another limit
        than 1, 2, ..., and CorruptFileError if the text of a document that was found is damaged; see `text`.
        """
        hits = self.parts.catalog().texts.search(
            query, limit, per_text=per_text, conversations=conversations, documents=documents
        )
        for id in dict.fromkeys(hit.document for hit in hits):
            require_file(self.parts, id)
        return hits

    def places_of_words(self, query: str, documents: Sequence[str]) -> dict[str, builtins.list[tuple[str, int, int]]]:
        """Return for each word that `search` looks for where it is in documents; see `full_text.places_of_words`."""
        return self.parts.catalog().texts.places_of_words(query, documents)

    def get(
        self,
        document: str | DocumentRow,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> StoredDocument:
        """Read a document, its K/V onto `device`, dequantized there; dtype: see `StoredFile.memory`.

        document:    its id, or the row that `row` returned, which is then not read again. If the document was replaced
                     since, the row is read anew.
        fingerprint: see `row`.

        Raises DocumentNotFoundError with similar ids, or CorruptFileError if its file is missing, damaged in any byte
        or of another document. Whether the loaded model can use the K/V is for the caller to ask of
        `header.fingerprint`.
        """
        row, file = self.read(document, fingerprint)
        self.uses.add(row.id)
        return StoredDocument(row, file.header, file.memory(device, dtype))

    def index(self, row: DocumentRow) -> tuple[DocumentRow, StoredIndex]:
        """Return what could be read of a document, given by its row, and its row; see `read_document_index`."""
        return read_document_index(self.parts, row)

    def has_file(self, row: DocumentRow) -> bool:
        """Tell whether the first file that a row names is there; raises StoreError."""
        return self.files.fetch(row.file).exists()

    def read(self, document: str | DocumentRow, fingerprint: str | None = None) -> tuple[DocumentRow, StoredFile]:
        """Return a document's row and its whole file, compared with each other; takes and raises as `get`."""
        return read_document(self.parts, document, fingerprint)

    def put(
        self,
        header: DocumentHeader,
        kv: StoredKV | WindowedKV,
        text: Text | str,
        label: Label | None = None,
        *,
        precision: str = PrecisionRule.AUTO,
        created_at: str | None = None,
        replacing: DocumentRow | None = None,
        only_new: bool = False,
        keep_version: bool = False,
        on_evicted: Callable[[DocumentRow], None] = lambda _: None,
    ) -> DocumentRow:
        """Store a document, or replace the one of the same id; returns its row.

        text:         a Text is not checked and hashed again.
        label:        without one a replaced document keeps its own.
        precision:    a `Precision` to keep the K/V in; `as-is`: the one they are in; `auto`: what the settings say.
        created_at:   of a document that was created elsewhere, ISO 8601, UTC.
        replacing:    the row whose K/V the document must still have, else ConflictError: it was changed meanwhile.
        only_new:     refuse a document that is stored already, with an InputError.
        keep_version: keep the replaced K/V for readers whose model made them, see `drop_versions`.
        on_evicted:   called with each document that had to go for this one, see `Settings.quota`.

        Raises InputError if header, K/V, text and label do not fit together or cannot be stored, QuotaError if there is
        no room. Then, and if anything else fails, everything stays as it was.
        """
        text = Text.of(text)
        header, kv = self.fitting(header, kv, text, precision)
        if self.settings.quota is not None:
            self.uses.flush()  # eviction goes by it
        with self._publisher.new_file(header, kv, text) as new:
            old = new.catalog.documents.get(header.id)
            if only_new and old is not None:
                raise taken([header.id])
            if replacing is not None:
                _require_unchanged(replacing, old)
            quota = self.settings.quota  # read again: in step with this commit
            row, evicted = put_row(
                new, header, precision_of(kv), text, label, quota, created_at=created_at, keep_version=keep_version
            )
            self._publisher.write_label(row)
        for one in evicted:
            on_evicted(one)
        return row

    def fitting(
        self, header: DocumentHeader, kv: StoredKV | WindowedKV, text: Text, precision: str = PrecisionRule.AUTO
    ) -> tuple[DocumentHeader, StoredKV | WindowedKV]:
        """Return header and K/V as they are written into a file of this namespace; takes and raises as `put`."""
        if header.windows and max(window.stop for window in header.windows) > len(text.value):
            raise InputError(f"a window of {header.id!r} ends after the text's {len(text.value)} characters")
        chosen = choose_precision(precision)
        if chosen is PrecisionRule.AUTO:
            chosen = self.settings.precision
        kv = with_precision(kv, chosen, header.window_starts) if isinstance(chosen, Precision) else kv
        if not isinstance(kv, WindowedKV):  # whose windows are looked at when their turn comes
            require_finite(header.id, kv)
        return replace(header, namespace=self.namespace), kv

    def unfinished(self, decides: Mapping[str, object]) -> UnfinishedDocument:
        """Return the memories of the first windows of a document, for who reads it and puts the others behind them.

        Takes and raises as `UnfinishedDocument`.
        """
        self.parts.make_folder()
        return UnfinishedDocument(self.folder, decides)

    def append(
        self,
        row: DocumentRow,
        header: DocumentHeader,
        kv: StoredKV,
        text: Text | str,
        *,
        on_evicted: Callable[[DocumentRow], None] = lambda _: None,
    ) -> DocumentRow:
        """Put K/V behind those of a document, in the precision of these; returns its new row. The label stays.

        row:    of the document, which must still have these K/V, else ConflictError.
        header: of what is appended alone; only its windows tell where they lie in the whole text.
        text:   the whole text as it is then.

        What is written is a segment. It takes in those before it, from the last one on, as long as they have fewer than
        twice as many slots as it has by then; if that are all, the document is written anew as one file.

        `on_evicted` and errors as in `put`; InputError, too, if the text is not that of the row with what the header is
        of behind it, or the K/V were made in another way.
        """
        text = Text.of(text)
        check_appended(row, header, text.value)
        if self.settings.quota is not None:
            self.uses.flush()  # eviction goes by it
        kv = with_precision(kv, row.precision, header.window_starts)
        if flaw := not_finite(kv):
            raise InputError(f"{row.id!r} cannot grow: {flaw}; keep it in bfloat16")
        header = replace(header, namespace=self.namespace)
        try:
            before, behind = taken_in(self.files, row, header.slots)
        except FileNotFoundError as error:
            raise _changed(row.id) from error
        kept = row.files[: len(row.files) - len(before)]
        whole = joined_kv([*(file.kv for file in before), kv])
        headers = [*(file.header for file in before), header]
        if not kept:
            joined = joined_headers(headers, text.sha256)
            return self.put(joined, whole, text, precision=row.precision, replacing=row, on_evicted=on_evicted)
        own = Text(text.value[headers[0].windows[0].start :])
        with self._publisher.new_file(
            joined_headers(headers, own.sha256), whole, own, Segment(row.file, behind)
        ) as new:
            new.superseded.extend(delete_expired(new.catalog)[1])
            now = _require_unchanged(row, new.catalog.documents.get(row.id))
            new.superseded.extend([*new.catalog.versions.drop(row.id), *row.files[len(kept) :]])
            grown = replace(
                now,
                content_hash=text.sha256,
                tokens=now.tokens + header.tokens,
                slots=now.slots + header.slots,
                bytes=now.bytes + stored_bytes(kv),
                ratios=tuple(sorted({*now.ratios, *header.ratios})),
                updated_at=utc_after(now.updated_at),
                used_at=int(time.time()),
                root=new.root,
                segments=(*kept[1:], new.name),
            )
            evicted, gone = make_room(new.catalog, grown, self.settings.quota)
            new.superseded.extend(gone)
            new.catalog.documents.append(grown, text)
        for one in evicted:
            on_evicted(one)
        return grown

    def update(
        self,
        id: str,
        *,
        metadata: Mapping[str, object] | Keep = KEEP,
        tags: Iterable[str] | Keep = KEEP,
        pinned: bool | Keep = KEEP,
        expires_at: str | Keep | None = KEEP,
    ) -> DocumentRow:
        """Change the parts of a document's `Label` that are given; returns its new row. Metadata change as a whole.

        Raises DocumentNotFoundError, or InputError for a value that cannot be kept.
        """
        with self.parts.writing() as catalog, contextlib.ExitStack() as marked, catalog.transaction():
            row = catalog.documents.require(id)
            label = row.label.changed(metadata, tags, pinned, expires_at)
            row = replace(row.labelled(label), updated_at=utc_after(row.updated_at))
            marked.enter_context(self._publisher.new_label(catalog, row))  # until the transaction has ended
            catalog.documents.update(row)
            self._publisher.write_label(row)
        return row

    def rename(self, id: str, new_id: str) -> DocumentRow:
        """Give a document another id; returns its new row. Raises InputError if the new id is taken."""
        old, file = self.read(id)
        header = replace(file.header, id=check_id(new_id))
        text = Text(file.text)
        with self._publisher.new_file(header, file.kv, text) as new:
            documents = new.catalog.documents
            new.superseded.extend(delete_expired(new.catalog)[1])
            if documents.get(new_id) is not None:
                raise InputError(f"{new_id!r} is the id of another document; remove that first, or choose another")
            now = documents.require(id)
            _require_unchanged(old, now)
            new.superseded.extend([*new.catalog.versions.drop(id), *old.files])
            row = row_of(new.name, new.root, header, precision_of(file.kv), new.nbytes, now.label, now.created_at)
            row = replace(row, used_at=now.used_at)
            documents.rename(id, row)
            self._publisher.write_label(row)
        return row

    def convert(self, id: str, precision: str) -> DocumentRow:
        """Keep a document's K/V in another `Precision`; returns its row.

        Raises InputError if the K/V as they are hold less than that, DocumentNotFoundError or CorruptFileError.
        """
        wanted = Precision(precision)
        for _ in range(READ_TRIES):
            row, file = self.read(id)
            if precision_of(file.kv) is wanted:
                return row
            kv = with_precision(file.kv, wanted, file.header.window_starts)
            with contextlib.suppress(ConflictError):
                return self.put(file.header, kv, file.text, precision=wanted, replacing=row, keep_version=True)
        raise StoreError(f"document {id!r} was replaced {READ_TRIES} times while it was being converted; try again")

    def delete(self, id: str) -> None:
        """Remove a document, also one whose row is damaged beyond repair; raises DocumentNotFoundError."""
        with self.parts.writing() as catalog:
            with catalog.transaction():
                with contextlib.suppress(CorruptFileError):
                    catalog.documents.require(id)
                gone = catalog.documents.delete(id)
            self._publisher.remove([name for name in gone if name.startswith(file_stem(id))])  # a damaged row names any

    def expire(self) -> builtins.list[str]:
        """Remove the documents whose time is over; returns their ids. They could not be seen any more before."""
        with self.parts.writing() as catalog:
            with catalog.transaction():
                ids, gone = delete_expired(catalog)
            self._publisher.remove(gone)
        return ids

    def drop_versions(self) -> int:
        """Remove all K/V that were kept for readers with another model; returns how many."""
        with self.parts.writing() as catalog:
            gone = catalog.versions.drop()
            self._publisher.remove(gone)
        return len(gone)


def put_row(
    new: NewFile,
    header: DocumentHeader,
    precision: Precision,
    text: Text,
    label: Label | None,
    quota: int | None,
    *,
    created_at: str | None = None,
    keep_version: bool = False,
) -> tuple[DocumentRow, builtins.list[DocumentRow]]:
    """Write the row of a new file, and make way and room for it; within a transaction.

    Returns the row, whose label is still to be written, and those of documents that had to go for it; see
    `MemoryStore.put`.
    """
    catalog = new.catalog
    new.superseded.extend(delete_expired(catalog)[1])
    old = catalog.documents.get(header.id)
    label = label or (old.label if old else Label())
    created_at = old.created_at if old else created_at or utc_now()
    row = row_of(new.name, new.root, header, precision, new.nbytes, label, created_at)
    new.superseded.extend(_supersede(catalog, old, row, keep_version))
    evicted, gone = make_room(catalog, row, quota)
    new.superseded.extend(gone)
    return catalog.documents.put(row, text), evicted


def taken(ids: Sequence[str], what: str = "documents") -> InputError:
    """Return the error for documents, or something else, that are stored already and must not be replaced."""
    named = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return InputError(f"{named} would replace stored {what}: allow that with replace, or remove them first")


def _require_unchanged(row: DocumentRow, now: DocumentRow | None) -> DocumentRow:
    """Return the row of a document as it is now; raises ConflictError if it has other K/V than a row of it said."""
    if now is None or now.files != row.files:
        raise _changed(row.id)
    return now


def _changed(id: str) -> ConflictError:
    return ConflictError(f"document {id!r} was changed or removed meanwhile; read it again and try again")


def _supersede(catalog: Catalog, old: DocumentRow | None, row: DocumentRow, keep_version: bool) -> builtins.list[str]:
    """Make way for a document's new row: drop or keep the K/V that it had; returns the files to remove.

    keep_version: whether readers with another model may go on with what the document had. They may not if its text has
    changed.
    """
    if old is None or not keep_version or old.content_hash != row.content_hash:
        return catalog.versions.drop(row.id) + ([*old.files] if old else [])
    gone = catalog.versions.drop(row.id, row.fingerprint)
    if old.fingerprint == row.fingerprint:
        return [*gone, *old.files]
    return gone + catalog.versions.keep(old)
