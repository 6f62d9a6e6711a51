"""Writing the files of a document in step with its row.

A K/V file is complete and on disk before a row names it, and is removed only after the commit of the row that took its
place. So a crash leaves at worst files that no row names, which `repair` removes:

    with publisher.new_file(header, kv, text) as new:  # the file is on disk, and a transaction has begun
        new.superseded += ...                          # files that no row names after the commit
        new.catalog.documents.put(row, text)
        publisher.write_label(row)
    # the commit is on disk, superseded files are gone
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from beacon_memory.documents import Text, check_id
from beacon_memory.errors import ConflictError, CorruptFileError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.connections import may_come_back
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.access import Files, read_file
from beacon_memory.storage.files.durable import unlink
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, label_name, read_label, stage_label
from beacon_memory.storage.files.marks import lay_label_mark, lay_mark, sync_mark
from beacon_memory.storage.files.names import base_of, file_name, number_of, segment_name
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV

from .parts import StoreParts
from .records import label_of

__all__ = ["NewFile", "Publisher", "Segment", "label_beside", "write_label"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a new segment belongs.

    file:   name of the first K/V file of its document.
    behind: root of the file that it continues.
    """

    file: str
    behind: str


@dataclass(frozen=True, slots=True)
class NewFile:
    """A K/V file on disk that no row names yet.

    catalog:    to write the row into.
    name, root, nbytes: of the file, see `StagedFile`.
    superseded: names of files to remove when the row is committed.
    """

    catalog: Catalog
    name: str
    root: str
    nbytes: int
    superseded: list[str] = field(default_factory=list)


class Publisher:
    """The files of documents: written before their rows, removed after them."""

    def __init__(self, parts: StoreParts) -> None:
        self._parts = parts

    @contextlib.contextmanager
    def new_file(
        self, header: DocumentHeader, kv: StoredKV | WindowedKV, text: Text, segment: Segment | None = None
    ) -> Iterator[NewFile]:
        """Write a K/V file, and begin a transaction for its row; if anything raises there, the file is removed.

        Unless it is a segment, its label follows. Raises ConflictError if files have another place by then.
        """
        with self._parts.writing(create=True) as catalog:
            place = self._parts.settings.files
            files = self._parts.files
            number = catalog.file_names.take_number()
            name = file_name(check_id(header.id), number)
            if segment is not None:
                name = segment_name(segment.file, number)
            mark = lay_mark(files, name)
            try:
                staged = stage_kv_file(files.staging, header, kv, text, segment.behind if segment else "")
                try:
                    sync_mark(mark)
                    files.publish(staged.path, name, more=segment is None)
                finally:
                    unlink(staged.path)
                with catalog.transaction():
                    if self._parts.settings.files != place:
                        raise ConflictError(f"the files of {self._parts.folder} have got another place; try again")
                    new = NewFile(catalog, name, staged.root, staged.nbytes)
                    yield new
            except BaseException as error:
                with contextlib.suppress(StoreError):  # then the catalog cannot tell, and verify finds the file
                    if may_come_back(error):
                        catalog.overwrite()
                    # the failure may have followed the commit
                    if name in catalog.file_names.named(header.id) or self._remove(files, [name]):
                        unlink(mark)
                raise
            unlink(mark)
            self.remove(new.superseded)

    def reserve(self, ids: Sequence[str]) -> list[str]:
        """Take names for new K/V files of documents, which others write; each is marked as on its way."""
        with self._parts.writing(create=True) as catalog:
            files = self._parts.files
            names = [file_name(check_id(id), catalog.file_names.take_number()) for id in ids]
            marks = [lay_mark(files, name) for name in names]
            if marks:
                sync_mark(marks[-1])  # and all others, which lie in the same folder
        return names

    @contextlib.contextmanager
    def new_label(self, catalog: Catalog, row: DocumentRow) -> Iterator[None]:
        """Mark the label of a document as one that may not be its row's, until what is done inside is committed.

        If anything raises, the label is written as the catalog has it.
        """
        mark = lay_label_mark(self._parts.files, row.file)
        try:
            sync_mark(mark)  # else a power cut could leave the label without it
            yield
        except BaseException:
            with contextlib.suppress(StoreError):  # then the mark stays, and `repair` does
                now = catalog.documents.get(row.id)
                if now is not None and not self._has_label(now):
                    self.write_label(now)
                unlink(mark)
            raise
        unlink(mark)

    def _has_label(self, row: DocumentRow) -> bool:
        """Tell whether the label file of a row says what the row says."""
        try:
            stored = label_beside(self._parts, row.file)
            return stored == label_of(row, self._parts.namespace)
        except (CorruptFileError, FileNotFoundError):
            return False

    def write_label(self, row: DocumentRow) -> None:
        """Write the label of a document into the file beside its K/V."""
        write_label(self._parts, row)

    def remove(self, names: Sequence[str]) -> bool:
        """Remove K/V files that no row names, with their labels, so that no power cut brings them back.

        Returns False if some are left, or may come back: then `verify` finds them, since the catalog, or the mark of a
        file that never had a row, says until this is done that they must go. Raises nothing: the change that made the
        files superfluous is committed already.
        """
        with contextlib.suppress(StoreError):  # of a catalog that does not know where the files are
            return self._remove(self._parts.files, names)
        return not names

    def _remove(self, files: Files, names: Sequence[str]) -> bool:
        first = {name for name in names if base_of(name) == name}
        gone = [name for name in names if files.remove(name) and (name not in first or files.remove(label_name(name)))]
        try:
            files.sync(gone)
        except StoreError:
            return False
        settled = first - {base_of(name) for name in names if name not in gone}  # they and all of their segments
        if settled:
            with contextlib.suppress(StoreError):  # then `repair` does
                self._parts.catalog().file_names.settle(map(number_of, settled))
        return len(gone) == len(names)


def label_beside(parts: StoreParts, file: str) -> StoredLabel:
    """Read the label of a document as it is now, by the name of its K/V file.

    A label keeps its name when it changes, so where many machines share a store, the cache of one may have an old one.

    Raises FileNotFoundError or CorruptFileError.
    """
    if parts.shared:
        parts.files.refresh(label_name(file))
    return read_file(parts.files, label_name(file), read_label)


def write_label(parts: StoreParts, row: DocumentRow) -> None:
    """Write the label of a document, as its row has it, into the file beside its K/V."""
    files = parts.files
    files.publish(stage_label(files.staging, label_of(row, parts.namespace)), label_name(row.file))
