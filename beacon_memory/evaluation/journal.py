"""The records of a run that is not over yet, in a file, so that an interrupted run can go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beacon_memory.errors import InputError

__all__ = ["Journal", "Record", "journal_file"]


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one baseline on one item.

    scores: by metric, from 0 to 1; `score` is the item's main one. For a continuation: `nll`, in nats per token.
    kv_bytes, seconds, cut: see Outcome; for a continuation only the seconds are measured.
    """

    baseline: str
    item: str
    group: str
    prediction: str
    scores: Mapping[str, float]
    kv_bytes: int
    seconds: float
    cut: bool = False


class Journal:
    """Keep records as lines of JSON, behind a first line that says of which run they are.

    output: the file that the result will be written to; the records lie beside it until then. None keeps nothing.
    run:    what the records depend on. A file of another run is not used: InputError says so.
    """

    def __init__(self, output: Path | None, run: Mapping[str, Any]) -> None:
        self._file = None if output is None else journal_file(output)
        self._records: dict[tuple[str, str], Record] = {}
        if self._file is None:
            return
        first = json.dumps(run, sort_keys=True, ensure_ascii=False)
        lines = _whole_lines(self._file)
        if not lines:
            self._append([first])
        elif lines[0] != first:
            raise InputError(
                f"{self._file} holds the answers of another run (other settings, model or versions); "
                "remove it to begin anew, or write to another file"
            )
        records = [Record(**json.loads(line)) for line in lines[1:]]
        self._records = {(record.baseline, record.item): record for record in records}

    def of(self, baseline: str, items: Sequence[str]) -> list[Record] | None:
        """Return the records of a baseline on these items; None unless all of them are kept."""
        found = [self._records.get((baseline, item)) for item in items]
        return None if None in found else [record for record in found if record is not None]

    def add(self, records: Sequence[Record]) -> None:
        """Keep more records. Raises InputError if they cannot be written."""
        self._append([json.dumps(asdict(record), ensure_ascii=False) for record in records])

    def _append(self, lines: Sequence[str]) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise InputError(f"answers cannot be kept in {self._file}: {error.strerror}; name another file") from error


def journal_file(output: Path) -> Path:
    """Return the file in which a run keeps its records until its result is written to `output`."""
    return output.with_name(f"{output.name}.answers.jsonl")


def _whole_lines(file: Path) -> list[str]:
    """Return the lines of a file, none if it is not there; a last line that was interrupted is cut off."""
    try:
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(file, len(whole))
        return whole.decode().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be used: {error}; remove it, or write to another file") from error
