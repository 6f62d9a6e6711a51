"""A PostgreSQL server of the tests' own, behind a socket in a folder of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

_LOCALE = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}


def installed() -> Path | None:
    """The folder of the server's programs, None if it is not installed."""
    kept = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = shutil.which("initdb")
    return kept[-1].parent if kept else Path(found).resolve().parent if found else None


class PostgresServer:
    """A server that is started when it is made; root lets the user postgres run it, as the server demands."""

    def __init__(self, primary: PostgresServer | None = None) -> None:
        """primary: the server whose standby this one is, which has what that one has acknowledged."""
        programs = installed()
        if programs is None:
            pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
        self._programs = programs
        self._user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        if self._user:
            shutil.chown(self.folder, "postgres", "postgres")
        self.data = self.folder / "data"
        self._numbers = itertools.count()
        if primary is None:
            initdb = ["-D", self.data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
            self._run("initdb", *initdb)
            self.start()
        else:
            # a checkpoint is spread over minutes, unless it is asked to be fast
            backup = ["-D", self.data, "-h", primary.folder, "-U", "postgres", "-R", "-c", "fast", "--no-sync"]
            self._run("pg_basebackup", *backup)
            self.start()
            primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.execute("SELECT pg_reload_conf()")

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=_LOCALE, capture_output=True, text=True, check=False, **self._user
        )
        assert done.returncode == 0, done.stderr + done.stdout

    def start(self) -> None:
        # The machine is never cut off, so nothing needs to reach the disk
        options = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "max_connections": 200,
        }
        given = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        log = (self.folder / "log").open("ab")
        command = [str(self._programs / "postgres"), "-D", str(self.data), *given]
        self._server = subprocess.Popen(
            command, cwd=self.folder, env=_LOCALE, stdout=log, stderr=log, start_new_session=True, **self._user
        )
        log.close()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                assert self._server.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self, *, crash: bool = False) -> None:
        """End it: all connections are cut; with `crash`, as if it had been killed."""
        self._run("pg_ctl", "-D", self.data, "-m", "immediate" if crash else "fast", "-w", "stop")
        self._server.wait(timeout=60)

    def promote(self) -> None:
        """Let a standby take the place of its primary."""
        self._run("pg_ctl", "-D", self.data, "-w", "promote")

    def close(self) -> None:
        if self._server.poll() is None:
            self.stop(crash=True)
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Create an empty database; returns its URL."""
        name = f"test{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, sql: str, url: str | None = None) -> list[tuple[object, ...]]:
        """Execute a statement as an administrator."""
        with psycopg.connect(url or self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(sql)  # type: ignore[call-overload]  # no literal
            return cursor.fetchall() if cursor.description else []

    def terminate(self, url: str) -> int:
        """Cut all connections to a database; returns how many there were."""
        name = conninfo_to_dict(url)["dbname"]
        own = f"datname = '{name}' AND pid <> pg_backend_pid()"
        return len(self.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {own}"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; each test takes a database of its own."""
    server = PostgresServer()
    yield server
    server.close()
