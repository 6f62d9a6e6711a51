"""Files that no row names: leftovers, and those that have lost their row."""

from __future__ import annotations

from collections.abc import Iterator

from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.files.marks import mark_of
from beacon_memory.storage.files.names import number_of, stem_of, version_of

__all__ = ["unnamed_files"]


def unnamed_files(catalog: Catalog, files: Files) -> Iterator[tuple[str, bool]]:
    """Yield the names of files that no row names, sorted, each with whether it is a leftover. Nobody may be writing.

    A file is a leftover if the catalog says so, if its mark does, or if its document has a later one. Any other was
    written for a catalog that is no longer there, or after the backup that this one was restored from, or its row was
    damaged.
    """
    catalog.sync()  # or what is removed now could be named by the row that a power cut brings back
    named, unsettled = catalog.file_names.named(), catalog.file_names.unsettled()
    latest: dict[str, int] = {}
    for name in named:
        latest[stem_of(name)] = max(latest.get(stem_of(name), 0), version_of(name))
    for name in sorted(set(files.names()) - named - {label_name(name) for name in named}):
        left = number_of(name) in unsettled or mark_of(files, name).exists()
        yield name, left or 0 < version_of(name) < latest.get(stem_of(name), 0)
