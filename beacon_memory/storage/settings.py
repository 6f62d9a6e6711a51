"""The settings of a store or namespace, kept in its catalog, with a copy in a file beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from beacon_memory.documents import KEEP, Keep, Precision, PrecisionRule, given_of, utc_after, utc_now
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.backend import FilesBackend, open_backend, url_of
from beacon_memory.storage.files.cached import CachedFiles
from beacon_memory.storage.files.checked_json import read_checked, stage_checked
from beacon_memory.storage.files.durable import move_into_place
from beacon_memory.storage.files.local import LocalFiles

__all__ = ["COPY", "Settings", "adopt_copy", "copy_is_newer", "keep_copy", "keeping_copy", "open_files", "read_copy"]

COPY = "settings.json"

_CHANGED_AT = "settings_at"  # the property that tells when settings were changed last

_MOST = 2**63 - 1  # that SQLite keeps


@dataclass(frozen=True, slots=True)
class Settings:
    """How a store, or a namespace of it, keeps its documents.

    precision:   what K/V are kept in where `put` does not say: a `Precision`, or `auto` for what they were computed in.
    quota:       bytes that all K/V may take together, None for no bound. To make room for a new document, those are
                 removed that were not used for longest; pinned ones never.
    files:       URL of the backend where K/V files lie, such as s3://bucket/prefix; None for the store's folder.
    cache_bytes: bytes of remote files that are kept on this machine, those used last.

    Raises InputError, which names the setting, for a value that it cannot have.
    """

    precision: Precision | Literal[PrecisionRule.AUTO] = PrecisionRule.AUTO
    quota: int | None = None
    files: str | None = None
    cache_bytes: int = 10_000_000_000

    def __post_init__(self) -> None:
        auto = self.precision == PrecisionRule.AUTO
        object.__setattr__(self, "precision", PrecisionRule.AUTO if auto else Precision(self.precision))
        if self.quota is not None and (type(self.quota) is not int or not 1 <= self.quota <= _MOST):
            raise InputError(f"quota={self.quota!r} must be a number of bytes from 1 to 2^63 - 1, or None for no bound")
        if type(self.cache_bytes) is not int or not 0 <= self.cache_bytes <= _MOST:
            raise InputError(f"cache_bytes={self.cache_bytes!r} must be a number of bytes from 0 to 2^63 - 1")
        if self.files is not None and "://" not in self.files:
            raise InputError(f"files={self.files!r} must be a URL such as s3://bucket/prefix")

    @classmethod
    def of(cls, catalog: Catalog) -> Settings:
        """Return the settings that a catalog holds; raises CorruptFileError if they are damaged."""
        known = catalog.properties.all()
        return cls(**{field.name: known[field.name] for field in fields(cls) if field.name in known})

    @staticmethod
    def never_changed(catalog: Catalog) -> bool:
        """Tell whether a catalog has had no settings but those of a new store."""
        return _changed_at(catalog.properties.all()) == ""

    def changed(
        self,
        precision: str | Keep = KEEP,
        quota: int | Keep | None = KEEP,
        files: str | Keep | None = KEEP,
        cache_bytes: int | Keep = KEEP,
    ) -> Settings:
        """Return the same settings with other values, where they are given."""
        given = {"precision": precision, "quota": quota, "files": files, "cache_bytes": cache_bytes}
        return replace(self, **given_of(given))  # type: ignore[arg-type]  # by name

    def write(self, catalog: Catalog) -> None:
        """Write these settings into a catalog, and that they are newer than those it has."""
        last = catalog.properties.get(_CHANGED_AT)
        catalog.properties.set(_CHANGED_AT, utc_after(last) if last else utc_now())
        for field in fields(self):
            value = getattr(self, field.name)
            catalog.properties.set(field.name, str(value) if isinstance(value, str) else value)

    def below(self, folder: PurePath) -> Settings:
        """Return the same settings for a namespace, whose files lie in `folder` of the store's place."""
        return replace(self, files=f"{self.files.rstrip('/')}/{folder.as_posix()}") if self.files else self


def keep_copy(catalog: Catalog, folder: Path) -> None:
    """Write a catalog's properties into a file beside it, from which `repair` takes them if the catalog is lost.

    A catalog that many machines share has no copy, for each of them would have one of another time.
    """
    if catalog.shared:
        return
    properties = dict(catalog.properties.all())
    move_into_place(stage_checked(folder, properties, "the copy of the settings"), folder / COPY)


@contextlib.contextmanager
def keeping_copy(catalog: Catalog, folder: Path) -> Iterator[None]:
    """Write the copy anew from the catalog if what is done inside fails, and has changed the copy by then."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError):  # then `repair` finds a copy that is newer
            if copy_is_newer(catalog, folder):
                keep_copy(catalog, folder)
        raise


def copy_is_newer(catalog: Catalog, folder: Path) -> bool:
    """Tell whether the copy is of a later change than the catalog, which has lost its last commits then."""
    if catalog.shared:
        return False
    copy, own = read_copy(folder), catalog.properties.all()
    return copy.get("identity") == own.get("identity") and _changed_at(copy) > _changed_at(own)


def adopt_copy(catalog: Catalog, folder: Path) -> None:
    """Write what the copy says into the catalog."""
    copy = read_copy(folder)
    with catalog.transaction():
        for name in {*copy, *catalog.properties.all()}:
            catalog.properties.set(name, copy.get(name))


def _changed_at(properties: Mapping[str, Any]) -> str:
    return str(properties.get(_CHANGED_AT) or "")


def read_copy(folder: Path) -> dict[str, Any]:
    """Return the properties that `keep_copy` wrote; none if the file is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, CorruptFileError):
        return read_checked(folder / COPY)
    return {}


def open_files(settings: Settings, folder: Path, identity: str, given: FilesBackend | str | None = None) -> Files:
    """Open the files of a store in `folder`, wherever they are.

    identity: of the catalog, for which a backend is reserved.
    given:    the backend, or its URL, that the store was opened with; the settings must name the same.

    Raises StoreError if they name another one, or if the backend belongs to another store; MissingDependencyError if
    the backend is not installed.
    """
    if given is not None and url_of(given) != (settings.files or "").rstrip("/"):
        there = settings.files or "in its folder"
        raise StoreError(
            f"the files of the store {folder} are {there}, not in {url_of(given)}: open it without `files`; only an "
            f"empty store can be given another place, by configure(files=...)"
        )
    if settings.files is None:
        return LocalFiles(folder)
    backend = open_backend(settings.files) if given is None or isinstance(given, str) else given
    files = CachedFiles(backend, folder / "cache", settings.cache_bytes)
    files.claim(identity)
    return files
