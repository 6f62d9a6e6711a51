"""The parts of one namespace of a store: its folder, catalog, settings and files, each opened when it is first needed.

`MemoryStore` is made of these, and `repair` works on them one by one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beacon_memory.documents import check_namespace
from beacon_memory.errors import CorruptFileError, InputError, MismatchedFileError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.postgres.catalog import PostgresCatalog, check_url, is_url, namespaces_at, schema_of
from beacon_memory.storage.catalog.postgres.connections import PostgresConnections
from beacon_memory.storage.catalog.postgres.locks import PostgresLocks
from beacon_memory.storage.catalog.postgres.migrations import exists
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.backend import FilesBackend, check_scheme, url_of, within
from beacon_memory.storage.files.durable import (
    create_file,
    entries,
    identity,
    is_folder,
    is_link,
    make_folder,
    refuse_links,
    status,
)
from beacon_memory.storage.files.locks import FolderLocks, Locks, renew_in_forks
from beacon_memory.storage.files.names import hash_id

from .settings import Settings, keep_copy, open_files, read_copy

__all__ = ["CATALOG", "StoreParts", "folder_of", "named", "namespace_names"]

CATALOG = "catalog.sqlite3"


class StoreParts:
    """The folder, catalog, settings and files of a namespace ("" is the one outside of all others).

    place: the folder of the store, or the URL of the database that many machines share.
    given: the backend of the whole store's files, or its URL, if the store was opened with one.
    cache: where this machine keeps its part of a store in a database, by default in the user's folder for caches.

    The first write creates folder and catalog. Before that, the catalog reads as empty.
    """

    def __init__(
        self,
        place: str | os.PathLike[str],
        namespace: str = "",
        given: FilesBackend | str | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if not os.fspath(place):
            raise InputError("a store needs a folder, got an empty path; the current folder is '.'")
        self.url = check_url(str(place)) if is_url(place) else None
        if cache is not None and self.url is None:
            raise InputError(f"cache={os.fspath(cache)!r} is for a store in a database; one in a folder has its own")
        # the same folder wherever this process goes
        self.root = Path(place if self.url is None else cache or _cache_of(self.url)).absolute()
        self.namespace = check_namespace(namespace)
        self.folder = folder_of(self.root, self.namespace)
        refuse_links(self.root, self.folder)
        if identity(self.root) and not is_folder(self.root):
            raise InputError(f"{self.root} is a file; a store needs a folder, or a path where it can create one")
        if isinstance(given, str):
            check_scheme(given)
        self.given = given
        below = self.folder.relative_to(self.root).as_posix()
        self._backend = within(given, below) if given is not None and namespace else given
        self._opening = threading.Lock()
        self._catalog: Catalog | None = None
        self._opened: tuple[int, int] | None = None
        self._files: tuple[tuple[str | None, int], Files] | None = None
        self._connections: PostgresConnections | None = None
        renew_in_forks(self)

    def _renew(self) -> None:
        """Replace the lock, which a thread may have held when this process was forked; see `renew_in_forks`."""
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close the catalog; the next use opens it again."""
        with self._opening:
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None
            if self._connections is not None:
                self._connections.close()

    @property
    def shared(self) -> bool:
        """Whether many machines share the catalog."""
        return self.url is not None

    @property
    def catalog_path(self) -> str:
        """Where the catalog is, as messages say it."""
        return self.url or str(self.folder / CATALOG)

    @property
    def begun(self) -> bool:
        """Whether anybody has written to the namespace."""
        return self._there() if self.shared else identity(self.folder) is not None

    @property
    def locks(self) -> Locks:
        """The locks that all share who write to the namespace."""
        if self.url is None:
            return FolderLocks(self.folder)
        return PostgresLocks(self.connections)

    @property
    def connections(self) -> PostgresConnections:
        """The connections to the database of a catalog that many machines share."""
        if self._connections is None:
            self._connections = PostgresConnections(str(self.url), schema_of(self.namespace))
        return self._connections

    def _there(self) -> bool:
        """Tell whether there is a catalog."""
        if self.url is None:
            return identity(self.folder / CATALOG) is not None
        return self._catalog is not None or exists(self.connections)

    @property
    def open_catalog(self) -> Catalog | None:
        """The catalog, if it is open."""
        with self._opening:
            return self._catalog

    def catalog(self, *, create: bool = False) -> Catalog:
        """Return the catalog; an empty one in memory if there is none yet, unless `create`."""
        if self.shared:
            return self._shared_catalog(create)
        path = self.folder / CATALOG
        with self._opening:
            found = status(path)
            there = (found.st_dev, found.st_ino) if found else None
            begun = found is not None and found.st_size > 0  # an empty one is what a killed process left
            if self._catalog is not None and there != self._opened:  # somebody removed it, or put it aside
                self._catalog.close()
                self._catalog = None
            if self._catalog is None:
                if not create and not begun:
                    return self._nothing
                self.make_folder()
                create_file(path)  # SQLite would let others read it; the log beside it has the same rights
                self._catalog = SQLiteCatalog(path)
                self._opened = identity(path)
                if not begun or self._is_bare(self._catalog):
                    self._begin(self._catalog)
                self._require_own(self._catalog)
            return self._catalog

    def _shared_catalog(self, create: bool) -> Catalog:
        with self._opening:
            if self._catalog is None:
                begun = self._there()
                if not create and not begun:
                    return self._nothing
                catalog = PostgresCatalog(self.connections)
                if not begun or self._is_bare(catalog):
                    self._begin(catalog)
                self._catalog = catalog
                self._require_own(catalog)
            return self._catalog

    def _require_own(self, catalog: Catalog) -> None:
        """Raise MismatchedFileError, and close the catalog, if it is that of another namespace."""
        try:
            of = str(catalog.properties.get("namespace") or "")
        except CorruptFileError:  # which those who read them learn
            return
        if of != self.namespace:
            catalog.close()
            self._catalog = None
            raise MismatchedFileError(
                f"{self.folder / CATALOG} is of {named(of)}, not of {named(self.namespace)}: folders were swapped or "
                f"copied; move each back to where it belongs ({named(of)} lies in {folder_of(self.root, of)})"
            )

    def make_folder(self) -> None:
        """Create the folder if it is missing; raises StoreError."""
        make_folder(self.root)
        make_folder(self.folder, self.root)

    @contextlib.contextmanager
    def writing(self, *, create: bool = False) -> Iterator[Catalog]:
        """Keep `repair` from tidying up while the catalog that is yielded is written to.

        create: also a store that was never written to; without it, that yields an empty catalog in memory.
        """
        if not create and not self.begun:
            yield self._nothing
            return
        self.make_folder()
        with self.locks.writing():
            yield self.catalog(create=create)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Catalog]:
        """Wait until nobody writes, and let nobody write while the catalog that is yielded is changed."""
        self.make_folder()
        with self.locks.tidying():
            yield self.catalog(create=True)

    @property
    def settings(self) -> Settings:
        """The settings as they are now, whichever process changed them."""
        if self.namespace and not self._there():
            return self._first_settings
        return Settings.of(self.catalog())

    @property
    def files(self) -> Files:
        """The place where the K/V files lie now, by the settings."""
        if self._backend is not None:
            self.catalog(create=True)  # a new one remembers where the files are
        settings = self.settings
        place = settings.files, settings.cache_bytes
        opened = self._files  # another thread may open others meanwhile
        if opened is None or opened[0] != place:
            if self.shared and settings.files is None:
                raise StoreError(
                    f"{self.url} has no place for K/V files that all machines reach: name one when the store is "
                    f"opened, MemoryStore(..., files='s3://bucket/prefix'), or with `beacon-memory settings --files`"
                )
            if self.shared:
                self.make_folder()
            catalog = self.catalog(create=settings.files is not None)
            owner = str(catalog.properties.get("identity"))
            opened = self._files = place, open_files(settings, self.folder, owner, self._backend)
        return opened[1]

    def open_files(self, settings: Settings, catalog: Catalog) -> Files:
        """Open the files where new settings have them; raises if they cannot be there."""
        if settings.files is not None and self._backend is None:
            check_scheme(settings.files)
        return open_files(settings, self.folder, str(catalog.properties.get("identity")), self._backend)

    def _is_bare(self, catalog: Catalog) -> bool:
        """Tell whether a catalog says nothing of itself: its first writer was killed, or all that it held is lost."""
        with contextlib.suppress(CorruptFileError):  # which those who read them learn
            if self.namespace:
                return catalog.properties.get("namespace") is None
            if catalog.properties.find_count("documents") == 0 and Settings.never_changed(catalog):
                return self.kept_properties not in ({}, dict(catalog.properties.all()))
        return False

    def _begin(self, catalog: Catalog) -> None:
        """Write the first properties of a new catalog: those of a lost one, or the name and settings of a namespace.

        Nothing is written if somebody else has done so meanwhile: by now there may be other settings, and documents.
        """
        with catalog.transaction():
            named_by_now = catalog.properties.get("namespace") is not None
            if named_by_now or catalog.properties.count("documents") or not Settings.never_changed(catalog):
                return
            kept = self.kept_properties
            if kept:
                for name, value in kept.items():
                    catalog.properties.set(name, value)
            elif self.namespace:
                catalog.properties.set("namespace", self.namespace)
                self._first_settings.write(catalog)
            if not kept and self._backend is not None and catalog.properties.get("files") is None:
                catalog.properties.set("files", url_of(self._backend))
            if not kept and (self.namespace or self._backend is not None):
                keep_copy(catalog, self.folder)

    @property
    def kept_properties(self) -> dict[str, Any]:
        """The copy of the catalog's properties; none if it is missing, damaged, or of another namespace."""
        kept = {} if self.shared else read_copy(self.folder)
        return kept if kept.get("namespace", "") == self.namespace else {}

    @property
    def _first_settings(self) -> Settings:
        """The settings that a new namespace begins with: those of the store."""
        with contextlib.closing(StoreParts(self.url or self.root, cache=self.root if self.url else None)) as whole:
            return whole.settings.below(self.folder.relative_to(self.root))

    @functools.cached_property
    def _nothing(self) -> Catalog:
        """An empty catalog in memory, for a store that was never written to."""
        return SQLiteCatalog(":memory:")


def _cache_of(url: str) -> Path:
    """Return the folder of this machine for a store in a database."""
    import platformdirs

    return platformdirs.user_cache_path("beacon-memory") / "stores" / hash_id(url)


def folder_of(root: Path, namespace: str) -> Path:
    """Return the folder of a namespace of the store in `root`."""
    return root / "namespaces" / hash_id(namespace) if namespace else root


def named(namespace: str) -> str:
    """Return what to call a namespace in a message."""
    return f"the namespace {namespace!r}" if namespace else "the store outside of all namespaces"


def namespace_names(parts: StoreParts) -> list[str]:
    """Return the names of all namespaces of a store that were ever written to, sorted; "" is outside of all others."""
    if parts.url is not None:
        return namespaces_at(parts.url)
    root = parts.root
    found = [""] if identity(root / CATALOG) else []
    refuse_links(root, root / "namespaces")
    for folder in entries(root / "namespaces"):
        path = Path(folder.path, CATALOG)
        if is_link(Path(folder.path)) or not identity(path):
            continue
        try:
            with contextlib.closing(SQLiteCatalog(path)) as catalog:
                name = catalog.properties.get("namespace")  # none if its first writer was killed
        except CorruptFileError:  # which those who use it learn
            name = read_copy(path.parent).get("namespace")
        found += [str(name)] if name else []
    return sorted(found)
