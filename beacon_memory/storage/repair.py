"""Verifying a store and repairing it.

    for problem in verify(store):
        print(problem.kind, problem.document, problem.message)
    left = [problem for problem in repair(store) if not problem.mended]

A store does not know of this module, which works on its parts: catalog, files, settings. docs/store.md lists the kinds
of problems, and how each is mended.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from beacon_memory.documents import Label, Text
from beacon_memory.errors import (
    BeaconMemoryError,
    ConflictError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    MismatchedFileError,
    MissingFileError,
    StoreError,
)
from beacon_memory.storage.catalog.check import find_flaws, mend_catalog
from beacon_memory.storage.catalog.rows import DamagedRow, DocumentRow
from beacon_memory.storage.files.access import Files, read_file
from beacon_memory.storage.files.durable import identity, unlink
from beacon_memory.storage.files.kv_file import StoredFile, read_header, read_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, label_name, read_label
from beacon_memory.storage.files.marks import mark_of, marked_labels
from beacon_memory.storage.files.names import (
    EVERYWHERE,
    NUMBERED,
    base_of,
    file_stem,
    number_of,
    stem_of,
    temps_in,
    version_of,
)
from beacon_memory.storage.files.segments import joined_files
from beacon_memory.storage.files.stored_kv import precision_of, stored_bytes

from .leftovers import suspected_files, unnamed_files
from .parts import CATALOG, named
from .publishing import label_beside, write_label
from .reading import read_files
from .records import label_of, row_of
from .settings import COPY, adopt_copy, copy_is_newer, keep_copy, read_copy
from .store import MemoryStore
from .unfinished import remove_unfinished, stale_unfinished

__all__ = ["PUT_ASIDE", "Problem", "ProblemKind", "repair", "verify"]

PUT_ASIDE = "damaged-"  # begins the names of catalogs that could not be mended

Mend = Callable[[], object] | None
Holding = contextlib.AbstractContextManager[None]
ProblemKind = Literal[
    "damaged-catalog",
    "damaged-row",
    "damaged-text",
    "missing-file",
    "damaged-file",
    "mismatched-file",
    "stale-label",
    "lost-row",
    "orphan-file",
    "stale-temp",
]
RECOMPRESSED = frozenset({"missing-file", "damaged-file", "mismatched-file"})  # kinds that only a model can mend

_NAMED = re.compile(r"kv/[0-9a-f]{2}/[0-9a-f]{32}-[0-9a-f]{8,12}\.safetensors")  # those of older stores have 8

_STALE_SECONDS = 60  # after which a copy of the settings, written without a lock, has its name, or its writer is dead


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in a store.

    document: id of the document, None if it cannot be told or if it is no document's.
    path:     of the file, below the store's folder, or of the catalog; None if it is none.
    message:  what is wrong, for people.
    mended:   whether `repair` has mended it.
    """

    kind: ProblemKind
    document: str | None
    path: str | None
    message: str
    mended: bool = False


def verify(store: MemoryStore) -> list[Problem]:
    """Read every file in full, compare it with its row, and return what is wrong; [] for a sound store."""
    return [problem for problem, _ in _look(store, store.parts.locks.looking())]


def repair(store: MemoryStore) -> list[Problem]:
    """Do what `verify` does, and mend what can be mended without a model; returns all problems.

    Rows and texts are made anew from their files, and what follows from them from the rows. Files that a crash left are
    removed; files whose rows were lost with a catalog get rows again. A catalog that cannot be read is put aside, and a
    new one made from the files. Nothing that may be the only copy is ever removed.
    """
    try:
        store.parts.catalog()
    except MismatchedFileError as error:  # nothing is damaged: folders have to change places
        return [Problem("damaged-catalog", None, store.parts.catalog_path, str(error))]
    except CorruptFileError:
        pass
    done = _mend_catalog(store)
    for problem, mend in _look(store, store.parts.locks.tidying()):
        mended = False
        if mend is not None:
            with contextlib.suppress(BeaconMemoryError, FileNotFoundError):
                mend()
                mended = True
        done.append(replace(problem, mended=mended))
    if store.parts.begun:
        _settle(store)
    return [replace(problem, mended=problem.mended or _found_again(store, problem)) for problem in done]


def _mend_catalog(store: MemoryStore) -> list[Problem]:
    """Make a catalog readable again, or else put it aside; returns what was wrong with it."""
    found = left = _flaws(store)
    if found:
        with contextlib.suppress(CorruptFileError):
            mend_catalog(store.parts.catalog(), store.parts.kept_properties)
            store.close()  # some damage shows when a database is opened
            left = _flaws(store)
    if left and store.parts.shared:  # of which there are no copies to make it anew from
        return [Problem("damaged-catalog", None, store.parts.catalog_path, one) for one in left]
    if left:
        with store.parts.locks.tidying():
            if left := _flaws(store):  # another process may have put it aside by now
                fate = _put_aside(store, store.folder / CATALOG)
                left = [f"{one}; {fate}" for one in left]
    return [Problem("damaged-catalog", None, store.parts.catalog_path, one, mended=True) for one in left or found]


def _put_aside(store: MemoryStore, path: Path) -> str:
    """Rename a catalog's files and let the store begin a new one; returns what was done, for the problem's message."""
    carried = store.parts.kept_properties | _carried(store)
    store.close()
    aside = path.with_name(f"{PUT_ASIDE}{int(time.time() * 1000)}.sqlite3")
    try:
        for end in ("-wal", "-shm", ""):  # a new database must never be given the log of another one
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; see to the permissions of its folder") from error
    catalog = store.parts.catalog(create=True)
    with catalog.transaction():
        for name, value in carried.items():
            catalog.properties.set(name, value)
    fate = f"it was put aside as {aside.name}, and a new one is made from the files"
    return fate + ("" if carried else "; its settings could not be read, so they are those of a new store")


def _flaws(store: MemoryStore) -> list[str]:
    """Return what is wrong with a catalog, its single rows and texts apart."""
    try:
        catalog = store.parts.catalog(create=store.parts.begun)  # one that was lost begins anew
        found = find_flaws(catalog)
        for _ in itertools.chain(catalog.documents.scan(), catalog.conversations.scan()):
            pass
        _ = catalog.file_names.named(), store.files
    except (CorruptFileError, InputError) as error:  # InputError: of settings that nobody can have made
        return [str(error)]
    return found


def _carried(store: MemoryStore) -> dict[str, Any]:
    """Return the identity and settings of a catalog that is to be put aside, as far as they can be read."""
    with contextlib.suppress(BeaconMemoryError):
        return store.parts.catalog().properties.sound_and_damaged()[0]
    return {}


def _look(store: MemoryStore, holding: Holding) -> Iterator[tuple[Problem, Mend]]:
    """Yield all problems, each with a function that mends it, to be called before the next problem is asked for.

    holding: holds off writers, while it is entered.
    """
    if not store.parts.begun:
        return
    try:
        yield from _look_at_all(store, holding)
    except (CorruptFileError, InputError) as error:  # as in `_flaws`: what is wrong with files is said one by one
        yield Problem("damaged-catalog", None, store.parts.catalog_path, str(error)), None


def _look_at_all(store: MemoryStore, holding: Holding) -> Iterator[tuple[Problem, Mend]]:
    """Look at catalog, documents, versions, copy of the settings, labels, conversations and unnamed files."""
    catalog = store.parts.catalog()
    for message in find_flaws(catalog):
        yield Problem("damaged-catalog", None, store.parts.catalog_path, message), None
    for row in catalog.documents.scan():
        if isinstance(row, DamagedRow):
            yield Problem("damaged-row", row.id, None, row.message), partial(_remake_row, store, row)
        else:
            yield from _look_at(store, row)
    for row in catalog.versions.scan():
        yield from _look_at_version(store, row)
    files = store.files
    # Nearly all labels and files are found sound here, so that few must be looked at again while all writers wait
    suspects = [row.id for row in catalog.documents.scan() if _label_flaw(store, row)]
    unnamed, conversations = suspected_files(catalog, files), store.conversations.suspected()
    with holding:
        yield from _look_at_copy(store)
        for id in suspects:
            yield from _look_at_label(store, id)
        for flaw in store.conversations.flaws(conversations):
            yield Problem(flaw.kind, None, str(flaw.path), flaw.message), flaw.mend
        temps = [*files.temps(), *store.conversations.temps(), *temps_in(store.folder, idle=_STALE_SECONDS)]
        if temps:  # one may be the mark of a file that came after the others were listed
            unnamed |= suspected_files(catalog, files)
        yield from _look_at_unnamed(store, unnamed, temps)
        for folder in stale_unfinished(store.folder):
            message = f"{folder.name} is what was read of a document that nobody has gone on with for a week"
            yield Problem("stale-temp", None, str(folder), message), partial(remove_unfinished, folder)


def _look_at(store: MemoryStore, row: DocumentRow) -> Iterator[tuple[Problem, Mend]]:
    """Look at a document's file and text."""
    id, file = row.id, None
    try:
        row, file = store.read(id)
    except (DocumentNotFoundError, ConflictError):  # removed, or expired, since the rows were listed; or always new
        return
    except CorruptFileError as error:
        kinds: dict[type, ProblemKind] = {MissingFileError: "missing-file", MismatchedFileError: "mismatched-file"}
        yield Problem(kinds.get(type(error), "damaged-file"), id, _unreadable(store, row), str(error)), None
    try:
        store.parts.catalog().documents.text(id)
    except DocumentNotFoundError:
        return
    except CorruptFileError as error:
        mend = partial(_remake_text, store, row, file) if file is not None else None
        yield Problem("damaged-text", id, None, str(error)), mend


def _unreadable(store: MemoryStore, row: DocumentRow) -> str:
    """Return the name of the one of a document's files that is not as it was written, the first if none can be told."""
    for name in row.segments:
        try:
            read_file(store.files, name, read_kv_file)
        except (CorruptFileError, FileNotFoundError):
            return name
    return row.file


def _look_at_version(store: MemoryStore, row: DocumentRow | DamagedRow) -> Iterator[tuple[Problem, Mend]]:
    """Look at K/V that are kept for readers with another model; damaged ones are dropped."""
    catalog = store.parts.catalog()
    if isinstance(row, DamagedRow):
        yield Problem("damaged-row", row.id, None, row.message), partial(catalog.versions.forget, row)
        return
    flaw = ""
    try:
        read_files(store.files, row, store.namespace)
    except FileNotFoundError:
        flaw = "is missing"
    except CorruptFileError as error:
        flaw = str(error)
    if flaw and row.file in catalog.file_names.named(row.id):
        message = f"{row.file}, kept for readers with another model, {flaw}"
        drop = partial(catalog.versions.drop, row.id, row.fingerprint)  # its files are leftovers then
        yield Problem("damaged-file", row.id, row.file, message), drop


def _look_at_copy(store: MemoryStore) -> Iterator[tuple[Problem, Mend]]:
    """Look at the copy of the settings, which must agree with the catalog."""
    catalog, path = store.parts.catalog(), store.folder / COPY
    if catalog.shared:
        return
    properties = dict(catalog.properties.all())
    if copy_is_newer(catalog, store.folder):
        message = "the copy of the settings is newer than the catalog"
        yield Problem("stale-label", None, str(path), message), partial(adopt_copy, catalog, store.folder)
    elif read_copy(store.folder) != properties and (identity(path) or len(properties) > 1):  # more than the identity
        message = "the copy of the settings is missing, damaged, or says something else than the catalog"
        yield Problem("stale-label", None, str(path), message), partial(keep_copy, catalog, store.folder)


def _label_flaw(store: MemoryStore, row: DocumentRow | DamagedRow) -> str | None:
    """Return what is wrong with a document's label file, which must agree with its row; None if nothing."""
    if isinstance(row, DamagedRow):
        return None
    try:
        stored = read_file(store.files, label_name(row.file), read_label)
        if not _agrees(store, stored, row) and store.parts.shared:
            stored = label_beside(store.parts, row.file)
    except FileNotFoundError:
        return "is missing"
    except CorruptFileError as error:
        return str(error)
    if _agrees(store, stored, row):
        return None
    return "is newer than the catalog" if _is_newer(store, stored, row) else "says something else than the catalog"


def _agrees(store: MemoryStore, stored: StoredLabel, row: DocumentRow) -> bool:
    """Tell whether a label says what a row says."""
    return replace(stored, updated_at="") == replace(label_of(row, store.namespace), updated_at="")


def _is_newer(store: MemoryStore, stored: StoredLabel, row: DocumentRow) -> bool:
    """Tell whether a label was committed, but its row is one of before: the catalog has lost its last commits."""
    if store.parts.shared:  # it keeps its own word
        return False
    own = (stored.id, stored.namespace) == (row.id, store.namespace)
    return own and stored.updated_at > row.updated_at and number_of(row.file) not in marked_labels(store.files)


def _look_at_label(store: MemoryStore, id: str) -> Iterator[tuple[Problem, Mend]]:
    """Look at the label file of a document, while nobody writes."""
    row = store.parts.catalog().documents.get(id)
    if row is not None and (flaw := _label_flaw(store, row)):
        name = label_name(row.file)
        yield Problem("stale-label", id, name, f"the label of {id!r} {flaw}"), partial(_settle_label, store, row)


def _settle_label(store: MemoryStore, row: DocumentRow) -> None:
    """Let row and label file of a document say the same: what the file says if it is newer, else what the row says."""
    with contextlib.suppress(CorruptFileError, FileNotFoundError):
        stored = label_beside(store.parts, row.file)
        if _is_newer(store, stored, row):
            row = replace(row.labelled(stored.label), created_at=stored.created_at, updated_at=stored.updated_at)
            store.parts.catalog().documents.update(row)
            return
    write_label(store.parts, row)


def _look_at_unnamed(store: MemoryStore, suspected: set[str], temps: Sequence[Path]) -> Iterator[tuple[Problem, Mend]]:
    """Look at the files that no row names, while nobody writes: leftovers go, and others get a row again.

    temps: temporary files, which go last, since they tell what is a leftover.
    """
    catalog, files = store.parts.catalog(), store.files
    lost: dict[str, list[str]] = {}
    for name, left in unnamed_files(catalog, files, suspected):
        if left:
            message = f"{name} has no row: it was replaced or removed, or a crash came before its row"
            yield Problem("orphan-file", None, name, message), partial(_remove, files, name)
        elif (place := _place_of(name)) and not files.present([place]):
            message = f"{name} lies in another file's folder"
            yield Problem("orphan-file", _owner_of(files, name)[0], name, message), partial(_move, files, name, place)
        elif place and name.endswith(".json"):
            message = f"{name} lies in another file's folder, and there is a label in its place"
            yield Problem("orphan-file", None, name, message), partial(_remove, files, name)
        elif NUMBERED.fullmatch(name):
            lost.setdefault(stem_of(name), []).append(name)
        else:
            message = f"{name} has no row and is not of a form that could get one; if it is not yours, remove it"
            yield Problem("orphan-file", None, name, message), None
    for names in lost.values():
        documents = [name for name in names if name.endswith(".safetensors")]
        if not documents:
            message = f"{names[-1]} is a label without K/V; if those cannot be brought back, remove it"
            yield Problem("orphan-file", None, names[-1], message), None
            continue
        name = max(documents, key=version_of)
        id, namespace = _owner_of(files, name)
        if namespace not in (None, store.namespace):
            message = f"{name} is of {named(namespace)}: somebody moved or copied it; move it back, or remove it"
            yield Problem("orphan-file", None, name, message), None
            continue
        message = f"{name} has no row, and the catalog is damaged or of another time: the row was lost"
        yield Problem("lost-row", id, name, message), partial(_adopt, store, names)
    sync_removals = functools.cache(partial(files.sync, EVERYWHERE))
    for path in temps:
        message = f"{path} is temporary: a crash left it"
        yield Problem("stale-temp", None, str(path), message), partial(_remove_temp, path, sync_removals)


def _place_of(name: str) -> str | None:
    """Return the name of a file where it should lie, if somebody has moved it to another folder; None if nobody has."""
    stem = stem_of(name).rpartition("/")[2]
    place = f"kv/{stem[:2]}/{name.rpartition('/')[2]}"
    return place if NUMBERED.fullmatch(name) and place != name else None


def _move(files: Files, name: str, place: str) -> None:
    """Move a file to its place."""
    files.publish(files.fetch(name), place)
    _remove(files, name)


def _owner_of(files: Files, name: str) -> tuple[str, str] | tuple[None, None]:
    """Return id and namespace of the document that a file belongs to, None if it cannot be read."""
    with contextlib.suppress(StoreError, FileNotFoundError):
        header = read_file(files, name, read_header)
        return header.id, header.namespace
    return None, None


def _remake_row(store: MemoryStore, damaged: DamagedRow) -> None:
    """Make a damaged row anew from the files that it names or, if these cannot be read, from those of the same id.

    If none can, and the text has the hash that stands in the row, the row is kept with the values that it has now: it
    is needed to compress the text again, and what is wrong in it is overwritten then.
    """
    catalog = store.parts.catalog()
    names = _files_of(store, file_stem(damaged.id)) | ({damaged.file} if _NAMED.fullmatch(damaged.file) else set())
    # its own file first, with all that follows it, for the row may no longer tell its segments
    ordered = sorted(names, key=lambda name: (base_of(name) == damaged.file, version_of(name)))
    file: StoredFile | None = None
    try:
        row, file = _best(store, ordered, ordered)
    except CorruptFileError:
        row = damaged.believed()
    with catalog.transaction():
        text = catalog.texts.find(row.id, row.content_hash) if file is None else file.text
        if text is None:
            raise CorruptFileError(f"neither file nor text of {row.id!r} can be read")
        catalog.documents.forget(damaged)
        catalog.documents.put(row, Text(text))


def _files_of(store: MemoryStore, stem: str) -> set[str]:
    """Return the names of all files of a document but those that were being written when a process was killed."""
    files, begun = store.files, store.parts.catalog().file_names.begun()
    own = (name for name in files.names() if stem_of(name) == stem and number_of(name) not in begun)
    return {name for name in own if identity(mark_of(files, name)) is None}


def _remake_text(store: MemoryStore, row: DocumentRow, file: StoredFile) -> None:
    """Write the text of a document's file into the catalog."""
    catalog = store.parts.catalog()
    with catalog.transaction():
        now = catalog.documents.require(row.id)
        if now.files == row.files:  # else it was replaced since, text and all
            catalog.documents.put(now, Text(file.text))


def _adopt(store: MemoryStore, names: list[str]) -> None:
    """Give lost files of one document a row again: the latest that can be read, unless there are later ones by now."""
    catalog, files = store.parts.catalog(), store.files
    row, file = _best(store, sorted(names, key=version_of), _files_of(store, stem_of(names[0])))
    with catalog.transaction():
        now = catalog.documents.get(row.id)
        if now is None or version_of(now.files[-1]) < version_of(row.files[-1]):
            row = catalog.documents.put(row, Text(file.text))
            catalog.properties.set("last", max(catalog.properties.count("last"), version_of(row.files[-1])))
            write_label(store.parts, row)
            names = [*names, *([*now.files, label_name(now.file)] if now else [])]
            now = row
    for name in {*names} - {*now.files, label_name(now.file)}:
        if version_of(name) < version_of(now.files[-1]):  # a later one cannot be read now, but perhaps some day
            files.remove(name)


def _best(store: MemoryStore, names: Sequence[str], others: Iterable[str]) -> tuple[DocumentRow, StoredFile]:
    """Read the last of these files that can be read with all that it continues, and is of this namespace.

    others: files of the document that they may continue.

    Returns a row for it, and all of the document. Raises CorruptFileError if none can be read.
    """
    read = functools.cache(partial(_read_own, store))
    for last in reversed([name for name in names if name.endswith(".safetensors")]):
        found = {last: file} if (file := read(last)) else {}
        same = (one for one in others if base_of(one) == base_of(last) and one.endswith(".safetensors"))
        before = sorted(same, key=version_of, reverse=True)
        for name in before:  # each file was written after those that it continues
            if file is not None and file.behind and (earlier := read(name)) and earlier.root == file.behind:
                file = found[name] = earlier
        if file is not None and not file.behind:
            with contextlib.suppress(CorruptFileError):
                return _row_for(store, [*found][::-1], joined_files([*found.values()][::-1]))
    raise CorruptFileError(f"none of {', '.join(names)} can be read")


def _read_own(store: MemoryStore, name: str) -> StoredFile | None:
    """Read a K/V file; returns None if that cannot be, or if it is of another document or namespace than its name."""
    with contextlib.suppress(CorruptFileError, FileNotFoundError):
        file = read_file(store.files, name, read_kv_file)
        if stem_of(name) == file_stem(file.header.id) and file.header.namespace == store.namespace:
            return file
    return None


def _row_for(store: MemoryStore, names: Sequence[str], file: StoredFile) -> tuple[DocumentRow, StoredFile]:
    """Return the row of a document whose files have these names and hold this, with the label beside them."""
    header = file.header
    label, created_at = Label(), header.created_at
    with contextlib.suppress(CorruptFileError, FileNotFoundError):
        beside = label_beside(store.parts, names[0])
        if (beside.id, beside.namespace) == (header.id, header.namespace):
            label, created_at = beside.label, beside.created_at
    row = row_of(names[0], file.root, header, precision_of(file.kv), stored_bytes(file.kv), label, created_at)
    return replace(row, segments=tuple(names[1:])), file


def _remove(files: Files, name: str) -> None:
    if not files.remove(name):
        raise StoreError(f"{name} cannot be removed")


def _remove_temp(path: Path, sync_removals: Callable[[], object]) -> None:
    """Remove a temporary file, which may be the mark of a file that is gone but could still come back."""
    sync_removals()
    if not unlink(path):
        raise StoreError(f"{path} cannot be removed")


def _found_again(store: MemoryStore, problem: Problem) -> bool:
    """Tell whether a document can be read again, because a later file of it was found whose row was lost."""
    if problem.kind in RECOMPRESSED and problem.document is not None:
        with contextlib.suppress(BeaconMemoryError):
            return bool(store.read(problem.document))
    return False


def _settle(store: MemoryStore) -> None:
    """Let the catalog forget the numbers of files that are gone, also of those whose removal nobody has synced."""
    names = store.parts.catalog().file_names
    if names.unsettled() or names.begun():
        with store.parts.locks.tidying():  # both are read in here: a writer who is killed leaves file and number behind
            there = {number for name in store.files.names() for number in (number_of(base_of(name)), number_of(name))}
            if gone := (names.unsettled() | names.begun()) - there:
                store.files.sync(EVERYWHERE)
                names.settle(gone)
