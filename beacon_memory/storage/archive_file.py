"""An archive of documents and conversations: a plain tar file, without compression, since K/V do not shrink.

    beacon-memory.json               format, and the number of documents that were asked for
    documents/<number>.safetensors   K/V and text as a store keeps them, see `kv_file`
    documents/<number>.json          the label, see `label_file`
    conversations/<number>.json      a conversation, see `conversation_file`
    manifest.json                    for each of these its size and sha256, and a sha256 of the list

The manifest comes last, so an archive that was cut has none. An archive is read as if somebody had written it to do
harm: whatever an export does not write is refused before any of it is kept in memory.

Why not zip: its list of files stands at the end, and Python reads all of it before anything can be refused, which takes
more than 400 MB of memory for a hostile file of 47 MB; and bytes between its members belong to nobody. A tar file of
this form is a chain in which each byte is accounted for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.files.checked_json import json_checksum

__all__ = [
    "FORMAT",
    "HEAD",
    "MANIFEST",
    "Contents",
    "Member",
    "add_file",
    "add_json",
    "checked_contents",
    "corrupt",
    "pieces",
]

FORMAT = 1
HEAD, MANIFEST = "beacon-memory.json", "manifest.json"
_MEMBER = re.compile(r"(documents/\d{9}\.(safetensors|json)|conversations/\d{9}\.json)")
_PIECE = 1 << 20  # bytes read at a time
_LISTED = 256  # bytes of a manifest for each file, at most


@dataclass(frozen=True, slots=True)
class Member:
    """Locate a file in an archive: its name, where its bytes begin, how many they are, and their sha256."""

    name: str
    start: int
    size: int
    sha256: str

    @property
    def listed(self) -> list[object]:
        """Return the line of the manifest for it."""
        return [self.name, self.size, self.sha256]


@dataclass(frozen=True, slots=True)
class Contents:
    """Locate all of an archive: K/V file and label of each document, and its conversations."""

    documents: list[tuple[Member, Member]]
    conversations: list[Member]


def add_file(tar: tarfile.TarFile, name: str, path: Path) -> Member:
    """Copy a file of this machine into an archive."""
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        tar.addfile(info, file)
    return Member(name, 0, info.size, digest)


def add_json(tar: tarfile.TarFile, name: str, value: object) -> None:
    """Write a value as JSON into an archive."""
    data = json.dumps(value).encode()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and size of each file of an archive; raises TarError for anything else that tar allows.

    Each header is parsed by `tarfile`, but the walk from one to the next is ours: `tarfile` follows whatever headers
    say, reads any length of them into memory, and even goes backwards.
    """
    end, place = os.fstat(file.fileno()).st_size, 0
    while True:
        file.seek(place)
        block = file.read(tarfile.BLOCKSIZE)
        if not any(block):  # two such blocks are the mark of the end
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        start = place + tarfile.BLOCKSIZE
        if member.type != tarfile.REGTYPE:
            raise tarfile.ReadError(f"{member.name!r} is not a plain file")
        if not 0 <= member.size <= end - start:
            raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, which are not there")
        yield member.name, start, member.size
        place = start + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def checked_contents(file: IO[bytes], path: Path) -> Contents:
    """Read a whole archive and return where its contents lie; raises CorruptFileError."""
    found: list[Member] = []
    manifest: Any = None
    try:
        for number, (name, start, size) in enumerate(_members(file)):
            if number == 0 and name == HEAD:
                head = _json(file, start, size, _PIECE)
                if not isinstance(head, dict) or head.get("format") != FORMAT:
                    raise corrupt(path, "it is of another format; upgrade beacon_memory, or export it again")
            elif number and manifest is None and name == MANIFEST:
                manifest = _json(file, start, size, _LISTED * (len(found) + 1))
            elif number and manifest is None and _MEMBER.fullmatch(name):
                found.append(Member(name, start, size, _digest(file, start, size)))
            else:
                raise corrupt(path, f"it holds {name!r}, which no export writes there")
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise corrupt(path, str(error)) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to the disk") from error
    listed = [entry.listed for entry in found]
    if not isinstance(manifest, dict) or manifest != {"files": listed, "sha256": json_checksum(listed)}:
        raise corrupt(path, "what it holds is not what its manifest lists, or it was cut")
    return _numbered(found, path)


def _numbered(found: list[Member], path: Path) -> Contents:
    """Return documents and conversations in the order of their numbers; raises CorruptFileError for any other order."""
    documents = [entry for entry in found if entry.name.startswith("documents/")]
    conversations = [entry for entry in found if entry.name.startswith("conversations/")]
    pairs = list(zip(documents[::2], documents[1::2], strict=False))
    numbered = [f"documents/{number:09}{end}" for number in range(len(pairs)) for end in (".safetensors", ".json")]
    if [entry.name for entry in documents] != numbered:
        raise corrupt(path, "its documents are not numbered as an export does it")
    if [entry.name for entry in conversations] != [f"conversations/{n:09}.json" for n in range(len(conversations))]:
        raise corrupt(path, "its conversations are not numbered as an export does it")
    return Contents(pairs, conversations)


def pieces(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    """Yield the bytes of a part of a file."""
    file.seek(start)
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise tarfile.ReadError("it ends too early")
        size -= len(piece)
        yield piece


def _json(file: IO[bytes], start: int, size: int, longest: int) -> Any:
    if size > longest:
        raise tarfile.ReadError(f"{size} bytes are too many for what it should say of its documents")
    return json.loads(b"".join(pieces(file, start, size)))


def _digest(file: IO[bytes], start: int, size: int) -> str:
    hasher = hashlib.sha256()
    for piece in pieces(file, start, size):
        hasher.update(piece)
    return hasher.hexdigest()


def corrupt(path: Path, flaw: str) -> CorruptFileError:
    """Return the error for an archive that cannot be imported."""
    return CorruptFileError(f"{os.fspath(path)} cannot be imported: {flaw}")
