"""API keys: random texts that name a caller, a namespace and rights. The file of them holds their hashes alone.

    token = add_key(Path("keys.json"), "alice", "alice", [Right.READ, Right.WRITE])
    Keys(Path("keys.json")).caller(token).namespace  # alice

A key has 256 random bits, so its sha256 tells nothing of it, and need not be slow.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from beacon_memory.documents import check_namespace, check_utf8, utc_now
from beacon_memory.errors import ConfigError, InputError, StoreError

__all__ = ["Caller", "Key", "Keys", "Right", "add_key", "read_keys", "remove_key"]

_OPENING = "bm-"
_MOST_NAME = 100  # characters: the name stands in each line of the log


class Right(StrEnum):
    """A right of a caller; `admin` has the others, too."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sends a request: a name for the log, the namespace to work in, and the rights in it."""

    name: str
    namespace: str
    rights: frozenset[Right]

    def may(self, right: Right) -> bool:
        """Tell whether the caller has a right."""
        return right in self.rights or Right.ADMIN in self.rights


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its file has it.

    name: of the caller. sha256: of the key, in hexadecimal.
    """

    name: str
    namespace: str
    rights: tuple[Right, ...]
    sha256: str
    created_at: str

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > _MOST_NAME or not self.name.isprintable():
            raise InputError(f"the name of a key must be 1 to {_MOST_NAME} printable characters, got {self.name!r}")
        check_utf8(self.name, "the name of a key")
        check_namespace(self.namespace)
        if not self.rights:
            raise InputError(f"the key {self.name!r} needs a right: {', '.join(Right)}")

    @property
    def caller(self) -> Caller:
        """Whoever has the key."""
        return Caller(self.name, self.namespace, frozenset(self.rights))


def add_key(file: Path, name: str, namespace: str, rights: Iterable[Right]) -> str:
    """Add a key to a file, which is made if it is missing; returns the key itself, which stands nowhere else.

    Raises InputError if the name is taken or cannot be one, ConfigError if the file cannot be read.
    """
    keys = read_keys(file) if file.exists() else []
    if any(key.name == name for key in keys):
        raise InputError(f"{str(file)!r} has a key of the name {name!r}; remove that first, or choose another")
    token = _OPENING + secrets.token_urlsafe(32)
    chosen = tuple(right for right in Right if right in {*rights})
    _write(file, [*keys, Key(name, namespace, chosen, _sha256(token), utc_now())])
    return token


def remove_key(file: Path, name: str) -> None:
    """Remove a key, which running servers refuse from then on; raises InputError if there is none of this name."""
    keys = read_keys(file)
    kept = [key for key in keys if key.name != name]
    if kept == keys:
        known = ", ".join(repr(key.name) for key in keys) or "none"
        raise InputError(f"{str(file)!r} has no key of the name {name!r}; it has {known}")
    _write(file, kept)


def read_keys(file: Path) -> list[Key]:
    """Read a file of keys; raises ConfigError for what is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["keys"]
        return [Key(**{**one, "rights": tuple(Right(right) for right in one["rights"])}) for one in found]
    except OSError as error:
        raise ConfigError(f"the file of keys {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{str(file)!r} is no file of keys: {error}; make one with `beacon-memory keys add`"
        ) from error


class Keys:
    """The keys of a file, read again whenever that has changed, so that a removed key is refused at once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._state: tuple[int, ...] | None = None
        self._keys: Sequence[Key] = ()
        self._renew()

    def caller(self, token: str) -> Caller | None:
        """Return whoever has a key; None if nobody has. It takes as long for any text.

        Raises ConfigError if the file cannot be read any more.
        """
        self._renew()
        given, found = _sha256(token).encode(), None
        for key in self._keys:  # all of them, found or not
            if hmac.compare_digest(key.sha256.encode(), given):
                found = key.caller
        return found

    def _renew(self) -> None:
        try:
            status = self._file.stat()
        except OSError as error:
            raise ConfigError(f"the file of keys {str(self._file)!r} cannot be read: {error.strerror}") from error
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if state != self._state:
            self._keys = read_keys(self._file)
            self._state = state


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


def _write(file: Path, keys: Sequence[Key]) -> None:
    """Replace a file of keys, for this user alone; who reads it meanwhile sees the old one or the new one."""
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2, ensure_ascii=False)
    temp = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as written:
            written.write(text + "\n")
            written.flush()
            os.fsync(written.fileno())
        temp.replace(file)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise StoreError(f"the file of keys {str(file)!r} cannot be written: {error.strerror}") from error
