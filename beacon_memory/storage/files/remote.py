"""Object storage, such as S3, as a files backend.

    <url>/.beacon-memory         the id of the one store that these files belong to
    <url>/kv/<folder>/<file>     an object for each file

An object is seen whole or not at all. Needs obstore and tenacity (the `remote` extra). obstore reads credentials,
region and endpoint from the environment, in variables AWS_..., GOOGLE_... or AZURE_...; AWS_ALLOW_HTTP=true allows a
connection without TLS.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from beacon_memory.errors import InputError, MissingDependencyError, StoreError

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

__all__ = ["ObjectStorage"]

_CLAIM = ".beacon-memory"

_PIECE_BYTES = 64 * 2**20  # asked for at a time: each piece has tries of its own
_CHUNK_BYTES = 2**20  # held in memory while downloading
_PART_BYTES = 5 * 2**20  # of an upload, the least that S3 takes
_MOST_PARTS = 10_000  # that S3 takes
_PARTS_AT_ONCE = 4  # held in memory while uploading; they share the uplink, and each must get through in read_timeout

# obstore repeats requests that fail or are answered 5xx, and goes on with the rest of a body that was cut or stalled
# while downloading. It does not repeat one whose short answer was cut (to list, to delete, to end an upload), which
# `_try` does. With these a server that is down is reported after about 10 s, and one that accepts and says nothing
# after about 3 minutes.
_RETRIES: RetryConfig = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
}
_TRIES = 3
_PAUSE_SECONDS = 1.0
_CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "15m"}  # timeout: of a piece or part as a whole
# What users may set for the connection, as AWS_ALLOW_HTTP; obstore reads these only when it is given no client options
_CLIENT_KEYS = (*_CLIENT, "allow_http", "allow_invalid_certificates", "root_certificate", "proxy_url", "proxy_excludes")
_ENVIRONMENT = {"s3": "AWS_", "gcs": "GOOGLE_", "azure": "AZURE_"}

_Result = TypeVar("_Result")


class ObjectStorage:
    """Keep files in object storage; a `FilesBackend`. Failures of network and server are retried, then StoreError.

    url: s3://bucket/prefix, gs://bucket/prefix or az://container/prefix

    Raises InputError for a URL that cannot be used, MissingDependencyError without obstore.
    """

    def __init__(self, url: str) -> None:
        self._store = _open(url)
        self.url = url.rstrip("/")

    def within(self, folder: str) -> ObjectStorage:
        """Return the backend of a longer prefix."""
        return ObjectStorage(f"{self.url}/{folder}")

    def claim(self, owner: str) -> str:
        """Reserve the URL for a store unless one has reserved it already; returns the id of the one that has it."""
        holder = self._owner()
        if holder is None:
            self._try("claiming the url", functools.partial(self._create_claim, owner.encode()))
            holder = self._owner()  # another store may have been first
        return (holder or b"").decode(errors="replace")

    def publish(self, source: Path, name: str) -> None:
        """Upload a file. If that fails, the old object is still there; the new one, if only the last answer was lost.

        A process that is killed meanwhile may leave parts of an upload in the bucket, unseen: let a lifecycle rule of
        the bucket remove uploads that were never completed.
        """
        part = max(_PART_BYTES, -(-source.stat().st_size // _MOST_PARTS))
        put = functools.partial(self._store.put, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)
        self._try(f"uploading {name}", lambda: put(name, source))

    def fetch(self, name: str, target: Path) -> None:
        """Download a file, piece by piece, each with tries of its own; raises FileNotFoundError or StoreError."""
        with target.open("wb") as file:
            size, version = 1, None  # until the first answer tells
            while (start := file.tell()) < size:
                meta = self._try(f"reading {name}", functools.partial(self._piece, name, file, start, version))
                if meta is None:
                    raise self._missing(name)
                size, version = meta["size"], meta["e_tag"]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Download a part of a file; raises FileNotFoundError or StoreError."""

        def part() -> bytes | None:
            result = self._get(name, {"range": (start, start + length)})
            return None if result is None else bytes(result.bytes())

        found = self._try(f"reading {name}", part)
        if found is None:
            raise self._missing(name)
        return found

    def remove(self, name: str) -> None:
        """Delete an object if it exists."""
        self._try(f"removing {name}", functools.partial(self._delete, name))

    def sync(self, names: Iterable[str]) -> None:
        """Do nothing: what object storage has answered lasts."""

    def names(self) -> list[str]:
        """List the names of all objects below `kv/`."""
        return self._try("listing", self._list)

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{name}")

    def _try(self, doing: str, act: Callable[[], _Result]) -> _Result:
        """Return what `act` returns, which can be repeated from its start; raises StoreError if that does not help."""
        from obstore.exceptions import BaseError, GenericError, InvalidPathError
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

        retrying = Retrying(
            retry=retry_if_exception_type((GenericError, OSError)),
            stop=stop_after_attempt(_TRIES),
            wait=wait_fixed(_PAUSE_SECONDS),
            reraise=True,
        )
        try:
            return retrying(act)
        except (BaseError, OSError) as error:
            foreign = isinstance(error, InvalidPathError)
            advice = "remove that object" if foreign else "check url, credentials and network, and try again"
            raise StoreError(f"{self.url}: {doing} failed: {_cause(error)}; {advice}") from error

    def _get(self, name: str, options: GetOptions) -> GetResult | None:
        """Request an object; returns None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._store.get(name, options=options)
        return None

    def _owner(self) -> bytes | None:
        """Return the id of the store that claimed the URL, None if none has."""

        def read() -> bytes | None:
            result = self._get(_CLAIM, {})
            return None if result is None else bytes(result.bytes())

        return self._try("asking whose it is", read)

    def _create_claim(self, owner: bytes) -> None:
        from obstore.exceptions import AlreadyExistsError

        with contextlib.suppress(AlreadyExistsError):  # perhaps by a try of ours whose answer was lost
            self._store.put(_CLAIM, owner, mode="create")

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.delete(name)

    def _list(self) -> list[str]:
        return [found["path"] for page in self._store.list("kv") for found in page]

    def _piece(self, name: str, file: BinaryIO, start: int, version: str | None) -> ObjectMeta | None:
        """Write one piece of an object, from `start` on, into a file; returns None if there is no such object.

        version: the one that must be read, so that all pieces are of one; None for any
        """
        file.seek(start)
        file.truncate()  # what a try before left
        options: GetOptions = {"if_match": version} if version else {}
        if start:  # not at first, since an empty object has no range
            options["range"] = (start, start + _PIECE_BYTES)
        result = self._get(name, options)
        if result is None:
            return None
        stop = min(start + _PIECE_BYTES, result.meta["size"])
        for chunk in result.stream(_CHUNK_BYTES):
            file.write(chunk)
            if file.tell() >= stop:
                break
        if file.tell() < stop:
            raise OSError(f"the answer ended at byte {file.tell()} instead of {stop}")
        return result.meta


def _open(url: str) -> ObjectStore:
    """Return the store that a URL names, without asking it anything yet."""
    try:
        import tenacity  # noqa: F401  # asked for at once rather than in the middle of a write
        from obstore import parse_scheme
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise MissingDependencyError(
            "a store in object storage needs obstore and tenacity: pip install 'beacon-memory[remote]'"
        ) from error
    try:
        place = urlsplit(url)
        if place.password or place.query or place.fragment:  # not shown: they may be secrets
            raise InputError("the url of a store names a place only: give credentials in the environment")
        scheme = parse_scheme(url) if "://" in url else "none"
        if scheme == "memory":
            return from_url(url)
        if scheme in _ENVIRONMENT:
            names = {key: _ENVIRONMENT[scheme] + key.upper() for key in _CLIENT_KEYS}
            given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
            return from_url(url, client_options=cast("ClientConfig", {**_CLIENT, **given}), retry_config=_RETRIES)
        raise ValueError("it names no object storage")
    except InputError:
        raise
    except (BaseError, OSError, ValueError) as error:
        example = "s3://bucket/prefix"
        raise InputError(
            f"url is {url!r}, which cannot be used: {_cause(error)}; give one such as {example}"
        ) from error


def _cause(error: Exception) -> str:
    """Return the message of obstore's error, without its rendering of the Rust object."""
    return str(error).partition("\n\nDebug source")[0].strip()
