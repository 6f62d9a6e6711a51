"""Rows of training data. They are checked, and every error names file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from beacon_memory.errors import InputError

from .recipe import DataSource

__all__ = ["Context", "Question", "Rows", "contexts_by_title", "load_rows", "texts"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the answers that count as right."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """A passage and the questions that it answers."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """A data set with its name. Iterating gives each row, together with its file and line for use in errors."""

    data: Dataset
    name: str

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        try:
            for number, row in enumerate(self.data, start=1):
                yield f"{self.name}, line {number}", row
        except UnicodeDecodeError as error:  # texts are decoded here, one by one
            raise InputError(f"{self.name} is not in UTF-8: {error}") from error


def load_rows(source: DataSource, folder: Path) -> Rows:
    """Load the rows of a file in `folder`, or of a data set of the hub. Raises InputError if that is not possible."""
    path = folder / source.path
    is_file = path.is_file()
    if not is_file and path.suffix in (".gz", ".jsonl", ".json"):
        raise InputError(f"the data file {path} does not exist")
    if is_file and not path.stat().st_size:
        raise InputError(f"the data file {path} is empty")
    try:
        if is_file:
            data = load_dataset("json", data_files=str(path), split="train")
        else:
            data = load_dataset(source.path, split=source.split)
    except DatasetGenerationError as error:
        found = _broken_line(path) if is_file else None
        raise InputError(found or f"{path} cannot be read: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, OSError, EOFError, ValueError) as error:
        if is_file:
            raise InputError(f"{path} cannot be read: {error}") from error
        raise InputError(
            f"the data set {source.path!r} is neither a file in {folder} nor on the hub: {error}"
        ) from error
    return Rows(data, str(path) if is_file else source.path)


def _broken_line(path: Path) -> str | None:
    """Return an error message for the first line of a file that is not a JSON object, or None if all lines are."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(_parsed(line), dict):
                    return f"{path}, line {number}: not a JSON object"
    except (OSError, EOFError):
        return None
    return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def texts(rows: Rows, where: Mapping[str, Any]) -> list[str]:
    """Return the `text` of all rows. Raises InputError, with file and line, for a row without one."""
    return [_text(row, "text", line) for line, row in rows if _chosen(row, where, line)]


def contexts_by_title(rows: Rows, where: Mapping[str, Any]) -> dict[str, list[Context]]:
    """Return contexts with their questions, grouped by title, in the order of the rows.

    A context without a title is a group of its own. Raises InputError, with file and line, for a missing key, an empty
    text or a context without questions.
    """
    questions: dict[tuple[str, str], list[Question]] = {}
    for line, row in rows:
        if not _chosen(row, where, line):
            continue
        context = _text(row, "context", line)
        title = row.get("title") or context
        questions.setdefault((title, context), []).extend(_questions(row, line))
    grouped: dict[str, list[Context]] = {}
    for (title, context), found in questions.items():
        grouped.setdefault(title, []).append(Context(context, tuple(found)))
    return grouped


def _questions(row: Mapping[str, Any], line: str) -> list[Question]:
    asked = row["qa"] if row.get("qa") is not None else [row]
    if not isinstance(asked, list) or not asked or not all(isinstance(one, Mapping) for one in asked):
        raise InputError(f"{line}: 'qa' is {asked!r}, but must be a list of questions with answers")
    return [_question(one, line) for one in asked]


def _question(row: Mapping[str, Any], line: str) -> Question:
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{line}: 'answers' is {answers!r}, but must be one or more texts")
    return Question(_text(row, "question", line), tuple(one.strip() for one in answers))


def _text(row: Mapping[str, Any], key: str, line: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{line}: {key!r} is {text!r}, but must be a text that is not empty")
    return text


def _chosen(row: Mapping[str, Any], where: Mapping[str, Any], line: str) -> bool:
    for key, value in where.items():
        if key not in row:
            raise InputError(f"{line}: {key!r} is missing, by which the recipe chooses rows")
        if row[key] != value:
            return False
    return True
