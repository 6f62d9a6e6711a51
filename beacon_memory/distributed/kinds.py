"""The kinds of sources that a cluster reads beside plain files: tables, and what has a URL. Imports nothing heavy."""

from __future__ import annotations

__all__ = ["is_of_cluster", "is_of_lines", "is_parquet"]


def is_parquet(source: str) -> bool:
    """Tell whether a source is Parquet, by its name."""
    return source.endswith(".parquet")


def is_of_lines(source: str) -> bool:
    """Tell whether a source is of JSON lines, by its name."""
    return source.endswith((".jsonl", ".jsonl.gz"))


def is_of_cluster(source: str) -> bool:
    """Tell whether a source is a table or has a URL, so that only a cluster reads it."""
    return "://" in source or is_parquet(source) or is_of_lines(source)
