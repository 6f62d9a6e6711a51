"""Files that no row names: leftovers, and those that have lost their row."""

from __future__ import annotations

from collections.abc import Iterator

from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.durable import identity
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.files.marks import mark_of
from beacon_memory.storage.files.names import base_of, number_of, stem_of, version_of

__all__ = ["suspected_files", "unnamed_files"]


def suspected_files(catalog: Catalog, files: Files) -> set[str]:
    """Return the names of files that no row names; while others write, some of them are only on their way."""
    names = set(files.names())
    return names - _named(catalog.file_names.named())  # read after the files, which are there before their rows


def unnamed_files(catalog: Catalog, files: Files, suspected: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield those of the suspected files that are there and that no row names, sorted. Nobody may be writing.

    With each it is told whether it is a leftover: if the catalog says so, of a segment by the first file, if its mark
    does, or if its document has a later one. Any other was written for a catalog that is no longer there, or after
    the backup that this one was restored from, or its row was damaged.
    """
    catalog.sync()  # or what is removed now could be named by the row that a power cut brings back
    unsettled, begun = catalog.file_names.unsettled(), catalog.file_names.begun()
    named: set[str] = set()
    latest: dict[str, int] = {}
    for stem in set(map(stem_of, suspected)):
        of_document = catalog.file_names.beginning(stem)
        named |= of_document
        latest[stem] = max(map(version_of, of_document), default=0)
    for name in sorted(files.present(suspected) - _named(named)):
        left = number_of(base_of(name)) in unsettled or number_of(name) in begun
        left = left or identity(mark_of(files, name)) is not None
        yield name, left or 0 < version_of(name) < latest[stem_of(name)]


def _named(files: set[str]) -> set[str]:
    """Return the names of K/V files and of their labels."""
    return files | {label_name(base_of(name)) for name in files}
