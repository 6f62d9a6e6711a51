"""Keep the K/V files of a store in one SQLite database: `MemoryStore(folder, files="sqlite:///home/me/notes")`."""

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from beacon_memory import StoreError


class SQLiteFiles:
    """A files backend in which each file, of up to 1 GB, is a row."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = Path(self.url.removeprefix("sqlite://"))

    def within(self, folder: str) -> "SQLiteFiles":
        return SQLiteFiles(f"{self.url}/{folder}")

    def claim(self, owner: str) -> str:
        self._run("INSERT OR IGNORE INTO files VALUES ('owner', ?)", owner.encode())
        return self._bytes("owner").decode()

    def publish(self, source: Path, name: str) -> None:
        self._run("INSERT OR REPLACE INTO files VALUES (?, ?)", name, source.read_bytes())

    def fetch(self, name: str, target: Path) -> None:
        target.write_bytes(self._bytes(name))

    def read(self, name: str, start: int, length: int) -> bytes:
        return self._bytes(name, start + 1, length)

    def remove(self, name: str) -> None:
        self._run("DELETE FROM files WHERE name = ?", name)

    def sync(self, names: Iterable[str]) -> None:
        pass  # what SQLite has committed is on disk

    def names(self) -> list[str]:
        return [name for (name,) in self._run("SELECT name FROM files")]

    def _bytes(self, name: str, first: int = 1, length: int = 2**30) -> bytes:
        for (data,) in self._run("SELECT substr(data, ?, ?) FROM files WHERE name = ?", first, length, name):
            return data or b""  # of nothing SQLite makes NULL
        raise FileNotFoundError(name)

    def _run(self, sql: str, *values: object) -> list[tuple]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(self.folder / "files.sqlite3", timeout=60)) as db, db:
                db.executescript("PRAGMA secure_delete = ON; CREATE TABLE IF NOT EXISTS files (name PRIMARY KEY, data)")
                return db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.url}: {error}") from error
