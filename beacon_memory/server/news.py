"""News for clients that watch a job: threads tell of it, and event loops wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator

__all__ = ["News"]

_HEARTBEAT = 15.0  # seconds without news after which a watcher is woken all the same, to send a sign of life


class News:
    """Wake those who watch something when a thread tells of it; to be made where the event loop runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._ended = False

    def tell(self, name: str) -> None:
        """Wake who watches this; from any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(self._wake, name)

    def end(self) -> None:
        """Let all who watch stop; in the event loop."""
        self._ended = True
        for name in self._watchers:
            self._wake(name)

    def _wake(self, name: str) -> None:
        for watcher in self._watchers.get(name, ()):
            watcher.set()

    async def of(self, name: str) -> AsyncGenerator[bool, None]:
        """Yield at once, and then whenever there may be news of this: True, or False after a while without any."""
        news = asyncio.Event()
        self._watchers[name].add(news)
        try:
            told = True
            while not self._ended:
                yield told
                try:
                    async with asyncio.timeout(_HEARTBEAT):
                        await news.wait()
                    told = True
                except TimeoutError:
                    told = False
                news.clear()
        finally:
            self._watchers[name].discard(news)
            if not self._watchers[name]:
                del self._watchers[name]
