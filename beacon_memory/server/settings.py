"""Settings of a server: where it listens, whom it lets in, and what bounds its work."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from beacon_memory.errors import ConfigError

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Say how a server runs.

    host, port:      where it listens; port 0 takes any that is free.
    keys:            file of the API keys, see `keys`; without one, only programs of this machine are let in.
    origins:         web sites whose pages may call it; none by default, and only the server's own page then.
    most_body:       bytes of a request's body.
    most_running:    answers that are decoded at a time.
    most_waiting:    requests that wait for one of these to end; more are refused with 429.
    most_wait:       seconds that one of them waits before it is refused, too.
    most_jobs:       documents of a namespace that wait to be compressed; more are refused with 429.
    shutdown:        seconds that running answers have to end when the server is stopped.

    Raises ConfigError for a bound below 1, and for a host that others can reach without keys.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    origins: tuple[str, ...] = ()
    most_body: int = 32_000_000
    most_running: int = 32
    most_waiting: int = 64
    most_wait: float = 60.0
    most_jobs: int = 1000
    shutdown: int = 30

    def __post_init__(self) -> None:
        for name in ("most_body", "most_running", "most_jobs", "shutdown"):
            if (given := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={given} must be at least 1")
        if self.most_waiting < 0 or self.most_wait <= 0:
            raise ConfigError(f"most_waiting={self.most_waiting} and most_wait={self.most_wait} must not be negative")
        if self.keys is None and not _is_loopback(self.host):
            raise ConfigError(
                f"host={self.host!r} can be reached from other machines, and without keys anybody could read and "
                "change the store: name a file of keys (--api-keys), made with `beacon-memory keys add`, or listen on "
                "127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
