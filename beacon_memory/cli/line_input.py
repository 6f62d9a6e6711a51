"""Lines that a person types: edited, completed and recalled where the terminal can do that."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

__all__ = ["LineInput"]

_DELIMITERS = " \t\n"  # so that a path is completed as a whole


class LineInput:
    """Reads lines from standard input, by Python's `readline` on a terminal.

    history:  lines that the arrow keys go back to, oldest first.
    complete: returns what the word that is being typed may become: of the line so far, and the word.
    """

    def __init__(self, prompt: str, history: Iterable[str], complete: Callable[[str, str], list[str]]) -> None:
        self._prompt = prompt if sys.stdin is not None and sys.stdin.isatty() else ""
        self._complete = complete
        self._choices: list[str] = []
        if self._prompt and (readline := _readline()) is not None:
            self._editor = readline
            readline.set_completer_delims(_DELIMITERS)
            readline.set_completer(self._choice)
            libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
            for line in history:
                with contextlib.suppress(UnicodeEncodeError, ValueError):  # what the terminal could not have sent
                    readline.add_history(line)

    def read(self) -> str | None:
        """Return the next line; None at the end of input. Raises KeyboardInterrupt at Ctrl-C."""
        if sys.stdin is None:
            return None
        try:
            return input(self._prompt)
        except EOFError:
            return None

    def _choice(self, word: str, number: int) -> str | None:
        """Return one of the completions of a word after the other, as readline asks for them."""
        if number == 0:
            line = self._editor.get_line_buffer()[: self._editor.get_endidx()]
            self._choices = self._complete(line, word)
        return self._choices[number] if number < len(self._choices) else None


def _readline() -> ModuleType | None:
    """Return the module, or None where Python has none, as on Windows."""
    try:
        import readline
    except ImportError:
        return None
    return readline
