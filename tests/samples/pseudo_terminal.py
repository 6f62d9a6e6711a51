"""A program on a terminal that a test types at and reads from."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Self

_COLUMNS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")  # colours and movements of the cursor
INTERRUPT, END, TAB, UP = "\x03", "\x04", "\t", "\x1b[A"


class PseudoTerminal:
    """Runs a command with a terminal of its own; what it has shown is `screen`, without colours."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.screen = ""
        self._seen = 0
        self._process, self._terminal = pty.fork()
        if self._process == 0:  # the child: another program from here on
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it runs behind it ignore Ctrl-C
            os.execvpe(command[0], [*command], {**environment, "TERM": "xterm", "COLUMNS": "200"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:  # a test has failed
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._terminal)

    def type(self, text: str) -> None:
        """Types keys; a line ends with a line feed."""
        os.write(self._terminal, text.encode())

    def expect(self, text: str, seconds: float = 120) -> str:
        """Waits until something is shown behind what was expected before; returns all up to it."""
        assert self._shown(text, seconds), f"{text!r} was not shown, but: {self.screen[self._seen :]!r}"
        end = self.screen.index(text, self._seen) + len(text)
        shown = self.screen[self._seen : end]
        self._seen = end
        return shown

    def type_until(self, keys: str, text: str) -> None:
        """Types keys, and again whenever seconds go by, until something is shown."""
        for _ in range(20):
            self.type(keys)
            if self._shown(text, 5):
                break
        self.expect(text, 0)

    def more(self, seconds: float = 120) -> None:
        """Waits until anything is shown behind what was expected before."""
        until = time.monotonic() + seconds
        while not self.screen[self._seen :].strip():
            assert self._read(until - time.monotonic()), "nothing more was shown"

    def ended(self, seconds: float = 60) -> int:
        """Waits for the end of the program; returns its exit code."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass
        assert time.monotonic() < until, f"the program did not end: {self.screen!r}"
        _, status = os.waitpid(self._process, 0)
        self._process = 0
        return os.waitstatus_to_exitcode(status)

    def _shown(self, text: str, seconds: float) -> bool:
        """Reads until something is shown behind what was expected before; False if it is not in time, or ever."""
        until = time.monotonic() + seconds
        while text not in self.screen[self._seen :]:
            if not self._read(until - time.monotonic()):
                return False
        return True

    def _read(self, seconds: float) -> bool:
        """Reads what is shown; False if nothing comes in time, or ever."""
        ready, _, _ = select.select([self._terminal], [], [], max(0.0, seconds))
        try:
            read = os.read(self._terminal, 65536) if ready else b""
        except OSError:  # the program has ended
            return False
        self.screen += _COLUMNS.sub("", read.decode(errors="replace"))
        return bool(read)
