"""The files of a store in its own folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from beacon_memory.errors import StoreError

from .durable import (
    entries,
    is_folder,
    is_link,
    is_there,
    make_folder,
    move_into_place,
    refuse_links,
    sync_folder,
    unlink,
)
from .names import EVERYWHERE, TEMP_PREFIX, check_name, temps_in

__all__ = ["LocalFiles"]

_STAGED = "kv/any"  # a name in the folder that files are written in


class LocalFiles:
    """Keep files below a folder: `Files` that are written beside their place and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def staging(self) -> Path:
        """Return the folder to write in, on the disk where the files will lie, since they are renamed."""
        return self.folder / "kv"

    def make_staging(self) -> Path:
        """Create that folder if it is missing, and return it; raises StoreError."""
        refuse_links(self.folder, self.staging)
        make_folder(self.staging, self.folder)
        return self.staging

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:
        """Rename a staged file and sync the folder, unless `more` follow; raises StoreError."""
        try:
            path = self.fetch(name)
            make_folder(path.parent, self.folder)
            move_into_place(temp, path, more=more)
        finally:
            unlink(temp)

    def fetch(self, name: str) -> Path:
        """Return the path of a file, which may be missing; raises CorruptFileError for what is no name of a file.

        So it does for a file in a folder that is a link.
        """
        path = self.folder / check_name(name)
        refuse_links(self.folder, path.parent)
        return path

    def refresh(self, name: str) -> bool:  # noqa: ARG002  # of no file
        """Return False: there is no other copy."""
        return False

    def downloaded(self, names: Iterable[str], since: float) -> bool:  # noqa: ARG002  # they are here
        """Return False: no file comes from elsewhere."""
        return False

    def remove(self, name: str) -> bool:
        """Remove a file if it exists; returns False if it cannot be removed now."""
        try:
            return unlink(self.fetch(name))
        except StoreError:
            return False

    def sync(self, names: Iterable[str]) -> None:
        """Sync the folders of removed files; raises StoreError."""
        try:
            for folder in {(self.folder / name).parent for name in names}:
                if is_folder(folder):
                    sync_folder(folder)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be synced: {error.strerror}; see to the disk") from error

    def present(self, names: Iterable[str]) -> set[str]:
        """Return those of these names that there is something of."""
        return {name for name in names if is_there(self.folder / name)}

    def erase(self, names: Iterable[str]) -> None:
        """Remove files, then all temporary ones, marks among them; raises StoreError if something is left."""
        self._require_gone([name for name in names if not self.remove(name)])
        self.sync(EVERYWHERE)
        self._require_gone([str(temp) for temp in self.temps() if not unlink(temp)])
        self.sync([*EVERYWHERE, _STAGED])

    def names(self) -> Iterator[str]:
        """Yield the names of all files, sorted; raises StoreError if they cannot be listed.

        A folder that is a link is not followed: its own name is yielded, which no file has.
        """
        if is_link(self.staging):
            yield "kv"
        for folder in self._folders():
            if is_link(folder):
                yield f"kv/{folder.name}"
                continue
            for entry in entries(folder):
                if not entry.name.startswith(TEMP_PREFIX):
                    yield f"kv/{folder.name}/{entry.name}"

    def temps(self) -> Iterator[Path]:
        """Yield the temporary files that a crash left, in any folder; raises StoreError if they cannot be listed."""
        for folder in (self.staging, *self._folders()):
            if not is_link(folder):
                yield from temps_in(folder)

    def _folders(self) -> list[Path]:
        """Return the folders of files; none if they lie behind a link."""
        if is_link(self.staging):
            return []
        return [Path(one.path) for one in entries(self.staging) if one.is_dir()]

    def _require_gone(self, left: list[str]) -> None:
        if left:
            raise StoreError(f"{self.folder}: {', '.join(left)} cannot be removed; see to permissions, and try again")
