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
from beacon_memory.errors import CorruptFileError, InputError, MismatchedFileError
from beacon_memory.storage.catalog.catalog import Catalog
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
from beacon_memory.storage.files.locks import renew_in_forks, tidying, writing
from beacon_memory.storage.files.names import hash_id

from .settings import Settings, keep_copy, open_files, read_copy

__all__ = ["CATALOG", "StoreParts", "folder_of", "named", "namespace_names"]

CATALOG = "catalog.sqlite3"


class StoreParts:
    """The folder, catalog, settings and files of a namespace ("" is the one outside of all others).

    given: the backend of the whole store's files, or its URL, if the store was opened with one.

    The folder is created by the first write. Before that, the catalog reads as empty.
    """

    def __init__(
        self, root: str | os.PathLike[str], namespace: str = "", given: FilesBackend | str | None = None
    ) -> None:
        if not os.fspath(root):
            raise InputError("a store needs a folder, got an empty path; the current folder is '.'")
        self.root = Path(root).absolute()  # the same one wherever this process goes
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

    @property
    def open_catalog(self) -> Catalog | None:
        """The catalog, if it is open."""
        with self._opening:
            return self._catalog

    def catalog(self, *, create: bool = False) -> Catalog:
        """Return the catalog; an empty one in memory if there is none yet, unless `create`."""
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
        if not create and not identity(self.folder):
            yield self._nothing
            return
        self.make_folder()
        with writing(self.folder):
            yield self.catalog(create=create)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Catalog]:
        """Wait until nobody writes, and let nobody write while the catalog that is yielded is changed."""
        self.make_folder()
        with tidying(self.folder):
            yield self.catalog(create=True)

    @property
    def settings(self) -> Settings:
        """The settings as they are now, whichever process changed them."""
        if self.namespace and not identity(self.folder / CATALOG):
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
            if not kept and self._backend is not None:
                catalog.properties.set("files", url_of(self._backend))
            if not kept and (self.namespace or self._backend is not None):
                keep_copy(catalog, self.folder)

    @property
    def kept_properties(self) -> dict[str, Any]:
        """The copy of the catalog's properties; none if it is missing, damaged, or of another namespace."""
        kept = read_copy(self.folder)
        return kept if kept.get("namespace", "") == self.namespace else {}

    @property
    def _first_settings(self) -> Settings:
        """The settings that a new namespace begins with: those of the store."""
        with contextlib.closing(StoreParts(self.root)) as whole:
            return whole.settings.below(self.folder.relative_to(self.root))

    @functools.cached_property
    def _nothing(self) -> Catalog:
        """An empty catalog in memory, for a store that was never written to."""
        return SQLiteCatalog(":memory:")


def folder_of(root: Path, namespace: str) -> Path:
    """Return the folder of a namespace of the store in `root`."""
    return root / "namespaces" / hash_id(namespace) if namespace else root


def named(namespace: str) -> str:
    """Return what to call a namespace in a message."""
    return f"the namespace {namespace!r}" if namespace else "the store outside of all namespaces"


def namespace_names(root: Path) -> list[str]:
    """Return the names of all namespaces that were ever written to, sorted; "" is the one outside of all others."""
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
