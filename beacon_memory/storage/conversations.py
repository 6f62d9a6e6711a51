"""Conversations of a store: rows of the catalog, each with a copy in a file beside it.

    folder/sessions/<hash of id>.json  the copy of one

The row is committed before its copy is written, and removed after it was put aside. So a copy is never newer than its
row, nor without one, unless the catalog has lost what was committed. A catalog that many machines share has no copies.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from beacon_memory.conversation import Conversation
from beacon_memory.documents import utc_after, utc_now
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.catalog.rows import DamagedRow
from beacon_memory.storage.files.conversation_file import read_conversation, stage_conversation
from beacon_memory.storage.files.durable import (
    entries,
    is_folder,
    is_link,
    make_folder,
    move_into_place,
    refuse_links,
    sync_folder,
    unlink,
)
from beacon_memory.storage.files.names import TEMP_PREFIX, hash_id, temps_in

from .parts import StoreParts, named

__all__ = ["ConversationFlaw", "StoredConversations"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConversationFlaw:
    """Something that is wrong with a conversation, its row or its copy.

    path:    of the copy.
    message: what is wrong, for people.
    mend:    mends it while nobody writes; None if nothing can.
    """

    kind: Literal["damaged-row", "damaged-file", "stale-label", "lost-row"]
    path: Path
    message: str
    mend: Callable[[], object] | None


class StoredConversations:
    """The conversations of a namespace: each is the old one or the new one, whatever happens while it is written."""

    def __init__(self, parts: StoreParts) -> None:
        self._parts = parts

    def ids(self) -> list[str]:
        """Return the ids of all conversations, sorted."""
        return self._parts.catalog().conversations.ids()

    def get(self, id: str) -> Conversation | None:
        """Return a conversation, None if there is none; raises CorruptFileError if it is damaged.

        One without a row is read from its copy: the catalog was lost, or the file is of before there were rows.
        """
        kept = self._parts.catalog().conversations.get(id)
        if kept is None and not self._parts.shared:
            with contextlib.suppress(FileNotFoundError):
                return self._copy(self._folder / _name(id))
        return kept

    def put(self, conversation: Conversation) -> Conversation:
        """Write a conversation, new or in place of what it was; returns it as it is now, with its times.

        Who writes what follows from what was read, does both `alone`. Raises InputError if it is too long to be kept,
        or StoreError; then nothing has changed.
        """
        with self._parts.writing(create=True) as catalog:
            old = self.get(conversation.id)
            created = old.created_at if old else conversation.created_at
            changed = utc_after(old.updated_at) if old and old.updated_at else utc_now()
            conversation = replace(conversation, created_at=created or changed, updated_at=changed)
            if self._parts.shared:
                catalog.conversations.put(conversation)
                return conversation
            temp = self._stage(conversation)
            try:
                catalog.conversations.put(conversation)
            except BaseException:
                unlink(temp)
                raise
            try:
                move_into_place(temp, self._path(conversation.id))
            except StoreError as error:  # it is stored, and `repair` writes the copy
                _logger.warning("the conversation %r has no copy until `repair`: %s", conversation.id, error)
        return conversation

    def remove(self, id: str) -> None:
        """Remove a conversation, damaged or not, if there is one. Its documents stay. Raises StoreError."""
        with self._parts.writing() as catalog:
            if self._parts.shared:
                catalog.conversations.remove(id)
                return
            path = self._path(id)
            aside = path.with_name(f"{TEMP_PREFIX}-{secrets.token_hex(8)}")
            try:
                path.rename(aside)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StoreError(f"{path} cannot be removed: {error.strerror}; see to permissions") from error
            try:
                self._sync_folder()  # or a power cut could bring back a copy that seems to have lost its row
                catalog.conversations.remove(id)
            except BaseException:
                with contextlib.suppress(StoreError, OSError):
                    if id in catalog.conversations.ids():  # the failure may have followed the commit
                        aside.rename(path)
                raise
            unlink(aside)

    @contextlib.contextmanager
    def alone(self, id: str) -> Iterator[None]:
        """Let nobody else change a conversation; raises StoreError if somebody does for more than 120 seconds."""
        self._make_folder()
        name = self._path(id).with_suffix(".lock").relative_to(self._parts.folder).as_posix()
        with self._parts.locks.alone(name, f"the session {id!r} is being written by another"):
            yield

    def temps(self) -> Iterator[Path]:
        """Yield the temporary files that a crash left, provided that nobody is writing to the store."""
        if not is_link(self._folder):
            yield from temps_in(self._folder)

    def erase_temps(self) -> None:
        """Remove all temporary files, so that no power cut brings them back; raises StoreError if one is left.

        Nobody may be writing.
        """
        if left := [str(temp) for temp in self.temps() if not unlink(temp)]:
            raise StoreError(f"{', '.join(left)} cannot be removed; see to permissions, and try again")
        self._sync_folder()

    def suspected(self) -> set[Path]:
        """Return the copies of which something is wrong, or that others are only writing now."""
        return {flaw.path for flaw in self.flaws()}

    def flaws(self, among: Container[Path] | None = None) -> Iterator[ConversationFlaw]:
        """Yield what is wrong with conversations, or with those of these copies. Nobody may be writing."""
        known = set()
        for row in self._parts.catalog().conversations.scan():
            path = self._folder / _name(row.id)
            if self._parts.shared:
                if isinstance(row, DamagedRow) and (among is None or path in among):
                    yield ConversationFlaw("damaged-row", path, row.message, None)
                continue
            known.add(path)
            if (among is None or path in among) and (flaw := self._flaw_of(row, path)):
                yield flaw
        if self._parts.shared or is_link(self._folder):
            return
        for entry in entries(self._folder):
            path = Path(entry.path)
            if path.suffix == ".json" and path not in known and (among is None or path in among):
                yield self._flaw_without_row(path)

    def _flaw_of(self, row: Conversation | DamagedRow, path: Path) -> ConversationFlaw | None:
        """Return what is wrong with a row or its copy, None if nothing."""
        copy: Conversation | None = None
        try:
            copy, state = self._copy(path), "says something else than the catalog"
        except (CorruptFileError, FileNotFoundError) as error:
            state = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        if isinstance(row, DamagedRow):
            if copy is not None:
                return ConversationFlaw("damaged-row", path, row.message, partial(self._restore, copy, row))
            return ConversationFlaw("damaged-row", path, f"{row.message}; its copy {state}", None)
        if copy == row:
            return None
        mend = partial(self._keep_copy, row)
        if copy is not None and copy.updated_at > row.updated_at:
            state, mend = "is newer than the catalog", partial(self._restore, copy)
        return ConversationFlaw("stale-label", path, f"the copy of the conversation {row.id!r} {state}", mend)

    def _flaw_without_row(self, path: Path) -> ConversationFlaw:
        """Return what is wrong with a copy that has no row."""
        try:
            copy = self._copy(path)
        except (CorruptFileError, FileNotFoundError) as error:
            message = f"{error}; if it cannot be brought back, remove it"
            return ConversationFlaw("damaged-file", path, message, None)
        message = f"the conversation {copy.id!r} has no row, and the catalog is damaged or of another time"
        return ConversationFlaw("lost-row", path, message, partial(self._restore, copy))

    def _restore(self, copy: Conversation, damaged: DamagedRow | None = None) -> None:
        """Write the row of a conversation as its copy has it."""
        catalog = self._parts.catalog()
        with catalog.transaction():
            if damaged is not None:
                catalog.conversations.forget(damaged)
            catalog.conversations.put(copy)

    def _keep_copy(self, conversation: Conversation) -> None:
        move_into_place(self._stage(conversation), self._path(conversation.id))

    def _stage(self, conversation: Conversation) -> Path:
        self._make_folder()
        return stage_conversation(self._folder, conversation, self._parts.namespace)

    def _copy(self, path: Path) -> Conversation:
        """Read a copy; raises FileNotFoundError, or CorruptFileError if it is damaged or of another conversation."""
        refuse_links(self._parts.folder, path.parent)
        copy, namespace = read_conversation(path)
        if _name(copy.id) != path.name:
            raise CorruptFileError(f"{path} is of another conversation, {copy.id!r}")
        if namespace != self._parts.namespace:
            raise CorruptFileError(f"{path} is of {named(namespace)}: somebody moved or copied it")
        return copy

    @property
    def _folder(self) -> Path:
        return self._parts.folder / "sessions"

    def _path(self, id: str) -> Path:
        refuse_links(self._parts.folder, self._folder)
        return self._folder / _name(id)

    def _sync_folder(self) -> None:
        try:
            if is_folder(self._folder):
                sync_folder(self._folder)
        except OSError as error:
            raise StoreError(f"{self._folder} cannot be written: {error.strerror}; see to the disk") from error

    def _make_folder(self) -> None:
        self._parts.make_folder()
        refuse_links(self._parts.folder, self._folder)
        make_folder(self._folder, self._parts.folder)


def _name(id: str) -> str:
    """Return the name of the copy of a conversation."""
    return f"{hash_id(id)}.json"
