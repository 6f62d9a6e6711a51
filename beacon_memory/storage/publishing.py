"""Writing the files of a document in step with its row.

A K/V file is complete and on disk before a row names it, and is removed only after the commit of the row that took its
place. So a crash leaves at worst files that no row names, which `repair` removes:

    with publisher.new_file(header, kv, text) as new:  # the file is on disk
        with new.catalog.transaction():
            new.superseded += ...                      # files that no row names after the commit
            new.catalog.documents.put(row, text)
            publisher.write_label(row)
                                                       # the commit is on disk
    # superseded files are gone
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from beacon_memory.documents import Text, check_id
from beacon_memory.errors import StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.durable import unlink
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, label_name, stage_label
from beacon_memory.storage.files.marks import lay_mark, sync_mark
from beacon_memory.storage.files.names import file_stem, number_of
from beacon_memory.storage.files.stored_kv import StoredKV

from .parts import StoreParts

__all__ = ["NewFile", "Publisher"]


@dataclass(frozen=True, slots=True)
class NewFile:
    """A K/V file on disk that no row names yet.

    catalog:    to write the row into.
    name:       of the file.
    superseded: names of files to remove when the row is committed.
    """

    catalog: Catalog
    name: str
    superseded: list[str] = field(default_factory=list)


class Publisher:
    """The files of documents: written before their rows, removed after them."""

    def __init__(self, parts: StoreParts) -> None:
        self._parts = parts

    @contextlib.contextmanager
    def new_file(self, header: DocumentHeader, kv: StoredKV, text: Text) -> Iterator[NewFile]:
        """Write a K/V file for a row that is committed inside; if anything raises there, the file is removed."""
        with self._parts.writing(create=True) as catalog:
            files = self._parts.files
            name = f"{file_stem(check_id(header.id))}-{catalog.file_names.take_number():012x}.safetensors"
            mark = lay_mark(files, name)
            new = NewFile(catalog, name)
            try:
                temp = stage_kv_file(files.staging, header, kv, text)
                try:
                    sync_mark(mark)
                    files.publish(temp, name, more=True)  # its label follows
                finally:
                    unlink(temp)
                yield new
            except BaseException:
                with contextlib.suppress(StoreError):  # then the catalog cannot tell, and verify finds the file
                    # the failure may have followed the commit
                    if name in catalog.file_names.named(header.id) or self.remove([name]):
                        unlink(mark)
                raise
            unlink(mark)
            self.remove(new.superseded)

    def write_label(self, row: DocumentRow) -> None:
        """Write the label of a document into the file beside its K/V."""
        files = self._parts.files
        temp = stage_label(files.staging, StoredLabel(row.id, row.created_at, row.label))
        files.publish(temp, label_name(row.file))

    def remove(self, names: Sequence[str]) -> bool:
        """Remove K/V files that no row names, with their labels, so that no power cut brings them back.

        Returns False if some are left, or may come back: then `verify` finds them, since the catalog, or the mark of a
        file that never had a row, says until this is done that they must go. Raises nothing: the change that made the
        files superfluous is committed already.
        """
        try:
            files = self._parts.files
            gone = [name for name in names if files.remove(name) and files.remove(label_name(name))]
            files.sync(gone)
        except StoreError:  # also of a catalog that does not know where the files are
            return False
        if gone:
            with contextlib.suppress(StoreError):  # then `repair` does
                self._parts.catalog().file_names.settle(map(number_of, gone))
        return len(gone) == len(names)
