"""The words that BM25 counts, cut and stemmed as SQLite's full-text index does it: by that index itself, in memory.

So a question finds the same passages in PostgreSQL as in SQLite, and scores them alike.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence

__all__ = ["tokens_of"]


class _Tokenizer(threading.local):
    """An empty index in memory, one for each thread."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.db.execute(
            """
            CREATE VIRTUAL TABLE texts USING fts5(
                text, content = '', tokenize = "porter unicode61 categories 'L* M* N* Co'"
            )
            """
        )
        self.db.execute("CREATE VIRTUAL TABLE tokens USING fts5vocab('texts', 'instance')")


_tokenizer = _Tokenizer()


def tokens_of(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of texts, each in its order; the texts are in their `indexed_form`."""
    found: list[list[str]] = [[] for _ in texts]
    db = _tokenizer.db
    db.execute("BEGIN")
    try:
        db.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", enumerate(texts))
        for text, term in db.execute("SELECT doc, term FROM tokens ORDER BY doc, offset"):
            found[text].append(term)
    finally:
        db.rollback()
    return found
