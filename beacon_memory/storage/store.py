"""Where documents live: for each a K/V file, its label beside it, and a catalog row, written and removed as one.

    folder/catalog.sqlite3                               the rows, source texts and their full-text index, and settings
    folder/settings.json                                 a copy of the settings, once there are any
    folder/kv/<2 hex>/<hash of id>-<number>.safetensors  K/V and text, a new file for each version of a document
    folder/kv/<2 hex>/<hash of id>-<number>.json         its label
    folder/namespaces/<hash of name>/                    the same once more for each namespace

A file is complete and on disk before a row names it, and is removed only after the commit of the row that replaced it.
So a reader sees the old version or the new one, and a crash leaves at worst files that no row names.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from beacon_memory.documents import Label, check_id, content_hash, utc_now
from beacon_memory.errors import (
    ConflictError,
    CorruptFileError,
    InputError,
    MismatchedFileError,
    MissingFileError,
    QuotaError,
    StoreError,
)
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.catalog.catalog import Catalog, PassageHit
from beacon_memory.storage.catalog.rows import DocumentRow, Totals
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.backend import FilesBackend, check_scheme, url_of, within
from beacon_memory.storage.files.durable import identity, make_folder, unlink
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file, stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, label_name, stage_label
from beacon_memory.storage.files.locks import renew_in_forks, writing
from beacon_memory.storage.files.marks import lay_mark
from beacon_memory.storage.files.names import file_stem, hash_id, number_of
from beacon_memory.storage.files.stored_kv import StoredKV, precision_of, with_precision

from .records import difference_of, row_of
from .repair import Problem, repair, verify
from .settings import Settings, keep_copy, open_files, read_copy

__all__ = ["MemoryStore", "StoredDocument"]

_CATALOG = "catalog.sqlite3"
_READ_TRIES = 5  # times that a document may be replaced while it is being read
_NOTE_SECONDS = 60  # how often a process notes in the catalog which documents it used
_BATCH = 100  # documents that are looked at together for eviction


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocument:
    """A document as it was stored: its catalog row, its file's header and its K/V."""

    row: DocumentRow
    header: DocumentHeader
    kv: MemoryKV


class MemoryStore:
    """A folder of documents, safe to use from several threads and processes at a time.

    namespace: a part of the store with documents, settings and quota of its own, which no other part sees.

    files:     where K/V files lie, if not in the folder: a URL, such as s3://bucket/prefix, or a `FilesBackend`. The
               store remembers the URL: opened again it needs `files` only if no installed backend has its scheme.

    The folder is created by the first write; before, the store reads as empty.
    """

    def __init__(
        self, folder: str | os.PathLike[str], namespace: str = "", *, files: FilesBackend | str | None = None
    ) -> None:
        self.root = Path(folder)
        self.namespace = namespace if namespace == "" else check_id(namespace)
        self.folder = self.root / "namespaces" / hash_id(namespace) if namespace else self.root
        if identity(self.root) and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; a store needs a folder, or a path where it can create one")
        if isinstance(files, str):
            check_scheme(files)
        self._backend = files
        self._given = within(files, self.folder.relative_to(self.root).as_posix()) if files and namespace else files
        self._opening = threading.Lock()
        self._catalog: Catalog | None = None
        self._opened: tuple[int, int] | None = None
        self._files: tuple[Settings, Files] | None = None
        self._used: dict[str, int] = {}
        self._noted = time.monotonic()
        renew_in_forks(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _renew(self) -> None:
        """See `renew_in_forks`."""
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close the catalog; the next use opens it again."""
        self._note_use()
        with self._opening:
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None

    def within(self, namespace: str) -> MemoryStore:
        """The same store in another namespace, created by the first write; "" is the one outside all others."""
        return self if namespace == self.namespace else MemoryStore(self.root, namespace, files=self._backend)

    def namespaces(self) -> builtins.list[str]:
        """The names of all namespaces that were ever written to, sorted."""
        found = [""] if identity(self.root / _CATALOG) else []
        for path in self.root.glob(f"namespaces/*/{_CATALOG}"):
            try:
                with contextlib.closing(Catalog(path)) as catalog:
                    name = catalog.read_property("namespace")  # none if it was killed at birth
            except CorruptFileError:  # which its own users learn
                name = read_copy(path.parent).get("namespace")
            found += [str(name)] if name else []
        return sorted(found)

    @property
    def settings(self) -> Settings:
        """How documents are kept, see `configure`."""
        if self.namespace and not identity(self.folder / _CATALOG):
            return self._first_settings
        return Settings.of(self.catalog())

    def configure(self, **changes: Any) -> Settings:
        """Change some of the `Settings`; returns all. Those of "" are what a new namespace begins with.

        Raises InputError for a value that cannot be, or to move the files of a store that has documents.
        """
        with self._writing(create=True) as catalog, catalog.transaction():
            settings = replace(self.settings, **changes)
            if settings.files != self.settings.files and catalog.count("documents"):
                raise InputError("files: only an empty store can be given another place; copy this one into a new one")
            if settings.files != self.settings.files:
                if settings.files is not None and self._given is None:
                    check_scheme(settings.files)
                owner = str(catalog.read_property("identity"))
                open_files(settings, self.folder, owner, self._given)  # refuses what cannot be used
            settings.write(catalog)
            keep_copy(catalog, self.folder)
        return settings

    def totals(self) -> Totals:
        """How much is stored in this namespace."""
        catalog = self.catalog()
        return Totals(catalog.count("documents"), catalog.count("bytes"))

    def __contains__(self, id: object) -> bool:
        try:
            return isinstance(id, str) and self.catalog().get(id) is not None
        except InputError:  # not a possible id, so none that is stored
            return False

    def get(
        self,
        id: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> StoredDocument:
        """Read a document, its K/V onto `device`, dequantized there; dtype: see `StoredFile.memory`.

        fingerprint: which version to prefer, if the document is being recompressed for another model.

        Raises DocumentNotFoundError with similar ids, or CorruptFileError if its file is missing, damaged in any byte
        or of another document. Whether the loaded model can use the K/V is for the caller to ask of
        `header.fingerprint`.
        """
        row, file = self.read(id, fingerprint)
        self._use(id)
        return StoredDocument(row, file.header, file.memory(device, dtype))

    def read(self, id: str, fingerprint: str | None = None) -> tuple[DocumentRow, StoredFile]:
        """A document's row and its whole file, compared with each other; raises as `get`."""
        for attempt in range(_READ_TRIES):
            row = self.row(id, fingerprint)
            try:
                file = read_kv_file(self.files.fetch(row.file))
            except FileNotFoundError:
                # replaced since, or, of remote files, dropped from the cache just now
                if attempt and self.row(id, fingerprint).file == row.file:
                    raise MissingFileError(
                        f"{row.file} of {id!r} is missing; `beacon-memory repair` mends it"
                    ) from None
                continue
            if difference := difference_of(row, file):
                raise MismatchedFileError(f"{row.file} {difference}; `beacon-memory repair` mends it")
            return row, file
        raise StoreError(f"document {id!r} was replaced {_READ_TRIES} times while it was being read; try again")

    def row(self, id: str, fingerprint: str | None = None) -> DocumentRow:
        """The catalog row of a document; raises DocumentNotFoundError with similar ids. fingerprint: see `get`."""
        catalog = self.catalog()
        row = catalog.require(id)
        if fingerprint is not None and row.fingerprint != fingerprint:
            version = catalog.version(id, fingerprint)
            return version.labelled(row.label) if version else row
        return row

    def list(self, **filters: Any) -> builtins.list[DocumentRow]:
        """The rows of documents by id, without their texts; filters: see `Catalog.list`."""
        return self.catalog().list(**filters)

    def text(self, id: str) -> str:
        """The source text of a document; raises DocumentNotFoundError."""
        return self.catalog().text(id)

    def search(self, query: str, limit: int = 10) -> builtins.list[PassageHit]:
        """The passages of all documents that share words with `query`, best first; see `full_text.search`."""
        return self.catalog().search(query, limit)

    def put(
        self,
        header: DocumentHeader,
        kv: StoredKV,
        text: str,
        label: Label | None = None,
        *,
        precision: str = "auto",
        created_at: str | None = None,
        replacing: str | None = None,
        keep_version: bool = False,
        on_evicted: Callable[[DocumentRow], None] = lambda _: None,
    ) -> DocumentRow:
        """Store a document, or replace the one of the same id; returns its row.

        label:        without one a replaced document keeps its own.
        precision:    what to keep the K/V in; `as-is`: what they are in; `auto`: what the settings say.
        created_at:   of a document that was created elsewhere, ISO 8601, UTC.
        replacing:    the K/V file that the document must still have, else ConflictError: it was changed meanwhile.
        keep_version: keep the replaced K/V for readers whose model made them, see `drop_versions`.
        on_evicted:   told of each document that had to go for this one, see `Settings.quota`.

        Raises InputError if header, K/V, text and label do not fit together or cannot be stored, QuotaError if there is
        no room. Then, and if anything else fails, everything stays as it was.
        """
        if header.windows and max(window.stop for window in header.windows) > len(text):
            raise InputError(f"a window of {header.id!r} ends after the text's {len(text)} characters")
        content_hash(text)  # refuses what has no UTF-8 form
        settings = self.settings
        if settings.quota is not None:
            self._note_use()  # eviction goes by it
        if precision == "auto":
            precision = settings.precision
        kv = kv if precision in ("auto", "as-is") else with_precision(kv, precision)
        evicted: builtins.list[DocumentRow] = []
        with self._new_file(header, kv, text) as (catalog, file, gone), catalog.transaction():
            gone.extend(self._expire(catalog)[1])
            old = catalog.get(header.id)
            if replacing is not None and (old is None or old.file != replacing):
                raise ConflictError(f"document {header.id!r} was changed or removed meanwhile; read it again")
            label = label or (old.label if old else Label())
            row = row_of(file, StoredFile(header, kv, None), label, old.created_at if old else created_at or utc_now())
            if old is None or not keep_version or old.content_hash != row.content_hash:
                gone.extend(catalog.drop_versions(header.id) + ([old.file] if old else []))
            else:
                gone.extend(catalog.drop_versions(header.id, row.fingerprint))
                if old.fingerprint == row.fingerprint:
                    gone.append(old.file)
                else:
                    gone.extend(catalog.keep_version(old))
            evicted += self._make_room(catalog, row, gone)
            row = catalog.put(row, text)
            self._publish_label(row)
        for one in evicted:
            on_evicted(one)
        return row

    def update(self, id: str, **changes: Any) -> DocumentRow:
        """Change the label of a document: `metadata` (as a whole), `tags`, `pinned`, `expires_at`; returns its new row.

        Raises DocumentNotFoundError, or InputError for a value that cannot be kept.
        """
        published = False
        with self._writing() as catalog:
            try:
                with catalog.transaction():
                    row = catalog.require(id)
                    label = replace(row.label, **changes)
                    row = replace(row.labelled(label), updated_at=utc_now())
                    catalog.update(row)
                    published = True
                    self._publish_label(row)
            except BaseException:
                if published:
                    with contextlib.suppress(StoreError):
                        self._publish_label(catalog.require(id))
                raise
        return row

    def rename(self, id: str, new_id: str) -> DocumentRow:
        """Give a document another id; returns its new row. Raises InputError if the new id is taken."""
        old, file = self.read(id)
        header = replace(file.header, id=check_id(new_id))
        text = self._text(id, file)
        with self._new_file(header, file.kv, text) as (catalog, name, gone), catalog.transaction():
            gone.extend(self._expire(catalog)[1])
            if catalog.get(new_id) is not None:
                raise InputError(f"{new_id!r} is the id of another document; remove that first, or choose another")
            now = catalog.require(id)
            if now.file != old.file:
                raise ConflictError(f"document {id!r} was changed or removed meanwhile; try again")
            gone.extend([*catalog.drop_versions(id), old.file])
            row = row_of(name, StoredFile(header, file.kv, None), now.label, now.created_at)
            row = replace(row, used_at=now.used_at)
            catalog.rename(id, row)
            self._publish_label(row)
        return row

    def convert(self, id: str, precision: str) -> DocumentRow:
        """Keep a document's K/V in another precision; returns its row.

        Raises InputError if the K/V as they are hold less than that, DocumentNotFoundError or CorruptFileError.
        """
        for _ in range(_READ_TRIES):
            row, file = self.read(id)
            if precision_of(file.kv) == precision:
                return row
            kv = with_precision(file.kv, precision)
            with contextlib.suppress(ConflictError):
                text = self._text(id, file)
                return self.put(file.header, kv, text, precision=precision, replacing=row.file, keep_version=True)
        raise StoreError(f"document {id!r} was replaced {_READ_TRIES} times while it was being converted; try again")

    def delete(self, id: str) -> None:
        """Remove a document, also one whose row is damaged beyond repair; raises DocumentNotFoundError."""
        with self._writing() as catalog:
            with catalog.transaction():
                with contextlib.suppress(CorruptFileError):
                    catalog.require(id)
                gone = catalog.delete(id)
            self._remove([name for name in gone if name.startswith(file_stem(id))])  # a damaged row may name any

    def expire(self) -> builtins.list[str]:
        """Remove the documents whose time is over; returns their ids. They could not be seen any more before."""
        with self._writing() as catalog:
            with catalog.transaction():
                ids, gone = self._expire(catalog)
            self._remove(gone)
        return ids

    def drop_versions(self) -> int:
        """Remove all K/V that were kept for readers with another model; returns how many."""
        with self._writing() as catalog:
            gone = catalog.drop_versions()
            self._remove(gone)
        return len(gone)

    def catalog(self, *, create: bool = False) -> Catalog:
        """The catalog: for the modules that keep the store in order, not for its users."""
        path = self.folder / _CATALOG
        with self._opening:
            there = identity(path)
            if self._catalog is not None and there != self._opened:  # somebody removed it, or put it aside
                self._catalog.close()
                self._catalog = None
            if self._catalog is None:
                if not create and not there:
                    return self._nothing
                make_folder(self.folder)
                self._catalog = Catalog(path)
                self._opened = there or identity(path)
                if not there or (
                    self.namespace and self._catalog.read_property("namespace") is None
                ):  # killed at birth
                    self._begin(self._catalog)
            return self._catalog

    @property
    def files(self) -> Files:
        """The files: for the modules that keep the store in order, not for its users."""
        if self._given is not None:
            self.catalog(create=True)  # a new one remembers where the files are
        settings = self.settings  # another process may have changed them
        if self._files is None or self._files[0] != settings:
            catalog = self.catalog(create=settings.files is not None)
            owner = str(catalog.read_property("identity"))
            self._files = settings, open_files(settings, self.folder, owner, self._given)
        return self._files[1]

    def verify(self) -> builtins.list[Problem]:
        """Read every file in full, compare everything with everything; see `upkeep.verify`."""
        return verify(self)

    def repair(self) -> builtins.list[Problem]:
        """Mend what can be mended without a model; see `upkeep.repair`."""
        return repair(self)

    def _begin(self, catalog: Catalog) -> None:
        """What a catalog is born with: what a lost one said of itself, or the name and settings of a namespace."""
        with catalog.transaction():
            if kept := read_copy(self.folder):
                for name, value in kept.items():
                    catalog.write_property(name, value)
            elif self.namespace:
                catalog.write_property("namespace", self.namespace)
                self._first_settings.write(catalog)
            if not kept and self._given is not None:
                catalog.write_property("files", url_of(self._given))
            if not kept and (self.namespace or self._given is not None):
                keep_copy(catalog, self.folder)

    @property
    def _first_settings(self) -> Settings:
        """What a namespace begins with."""
        with self.within("") as whole:
            return whole.settings.below(self.folder.relative_to(self.root))

    @functools.cached_property
    def _nothing(self) -> Catalog:
        """What a store that was never written to reads as; leaves nothing on disk."""
        return Catalog(":memory:")

    @contextlib.contextmanager
    def _writing(self, *, create: bool = False) -> Iterator[Catalog]:
        """The catalog, while nobody tidies up; create: also of a store that was never written to."""
        if not create and not identity(self.folder):
            yield self._nothing
            return
        with writing(self.folder):
            yield self.catalog(create=create)

    @contextlib.contextmanager
    def _new_file(
        self, header: DocumentHeader, kv: StoredKV, text: str
    ) -> Iterator[tuple[Catalog, str, builtins.list[str]]]:
        """A K/V file for what is committed inside; yields the catalog, its name, and a list of files to remove then."""
        gone: builtins.list[str] = []
        with self._writing(create=True) as catalog:
            files = self.files
            file = f"{file_stem(check_id(header.id))}-{catalog.take_number():012x}.safetensors"
            mark = lay_mark(files, file)
            try:
                files.publish(stage_kv_file(files.staging, header, kv, text), file, more=True)  # its label follows
                yield catalog, file, gone
            except BaseException:
                with contextlib.suppress(StoreError):  # then the catalog cannot tell, and verify finds the file
                    if file in catalog.files(header.id) or self._remove([file]):  # the failure may follow the commit
                        unlink(mark)
                raise
            unlink(mark)
            self._remove(gone)

    @staticmethod
    def _expire(catalog: Catalog) -> tuple[builtins.list[str], builtins.list[str]]:
        """Delete the rows of documents whose time is over; returns their ids and files."""
        ids = catalog.expired(utc_now())
        return ids, [file for id in ids for file in catalog.delete(id)]

    def _make_room(self, catalog: Catalog, row: DocumentRow, gone: builtins.list[str]) -> Iterator[DocumentRow]:
        """Delete the rows of documents that were not used for longest until a quota is kept with `row`."""
        quota = self.settings.quota
        if quota is None:
            return
        old = catalog.get(row.id)
        room = quota - row.bytes + (old.bytes if old else 0)
        while (over := catalog.count("bytes") - room) > 0:
            victims = [one for one in catalog.least_used(_BATCH) if one.id != row.id]
            if not victims:
                raise QuotaError(
                    f"{row.id!r} takes {row.bytes:,} bytes, and with all that is pinned that is {over:,} more than the "
                    f"quota of {quota:,}; unpin or remove documents, raise the quota, or compress more strongly"
                )
            for victim in victims:
                if catalog.count("bytes") > room:
                    gone.extend(catalog.delete(victim.id))
                    yield victim

    def _text(self, id: str, file: StoredFile) -> str:
        """The text of the version of a document that a file holds."""
        return self.text(id) if file.text_bytes is None else file.text

    def _publish_label(self, row: DocumentRow) -> None:
        files = self.files
        temp = stage_label(files.staging, StoredLabel(row.id, row.created_at, row.label))
        files.publish(temp, label_name(row.file))

    def _remove(self, names: Sequence[str]) -> bool:
        """Remove files that no row names, with their labels; False if some are left, which `verify` finds.

        Raises nothing: what made the files superfluous is committed.
        """
        gone: builtins.list[str] = []
        with contextlib.suppress(StoreError):  # of a catalog that does not know where the files are
            files = self.files
            gone.extend(name for name in names if files.remove(name) and files.remove(label_name(name)))
        if gone:
            with contextlib.suppress(StoreError):  # then `repair` does
                files.sync(gone)
                self.catalog().settle(map(number_of, gone))
        return len(gone) == len(names)

    def _use(self, id: str) -> None:
        """Note that a document was used. The catalog learns it now and then: no reading may wait for a write."""
        with self._opening:
            self._used[id] = int(time.time())
            due = time.monotonic() - self._noted > _NOTE_SECONDS
        if due:
            self._note_use()

    def _note_use(self) -> None:
        with self._opening:
            used, self._used, self._noted = self._used, {}, time.monotonic()
            catalog = self._catalog
        noted = False
        if used and catalog is not None:
            with contextlib.suppress(StoreError):  # of a store that cannot be written, reading must go on
                noted = catalog.touch(used)
        if not noted:
            with self._opening:
                self._used = used | self._used
