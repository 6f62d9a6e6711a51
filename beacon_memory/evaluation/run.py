"""Runs of baselines over items, and their results."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

from beacon_memory.errors import InputError
from beacon_memory.kv.fingerprint import digest_json
from beacon_memory.modeling.lora import lora_digest
from beacon_memory.modeling.model import BeaconModel

from .baselines import BATCH, Baseline
from .items import Item
from .journal import Journal, Record
from .metrics import METRICS, Interval, bootstrap, paired_difference

__all__ = ["Progress", "Result", "Row", "model_identity", "run_continuations", "run_items", "run_records"]

# Figures depend on the versions of these.
PACKAGES = ("beacon-memory", "torch", "transformers", "peft", "kvpress", "bm25s", "rouge-score")
# Called after each answer with the name of its baseline, and how many answers that will give.
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """The means of one baseline over all items, or over those of one group.

    group:    '' for all items.
    scores:   mean by metric, with a 95 % bootstrap interval over the items that have it.
    kv_bytes, seconds: means for an item.
    cut:      number of items whose text did not fit.
    """

    baseline: str
    group: str
    items: int
    scores: Mapping[str, Interval]
    kv_bytes: float
    seconds: float
    cut: int


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one task: its settings, its provenance (versions, model, machine), means and single records."""

    task: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: Sequence[Row]
    records: Sequence[Record]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that can be written as JSON."""
        return asdict(self)


def run_items(
    task: str,
    baselines: Sequence[Baseline],
    items: Sequence[Item],
    settings: Mapping[str, Any],
    model: BeaconModel,
    *,
    max_new_tokens: int,
    output: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Let each baseline answer all items, and score the answers.

    output: see `Journal`: a run that was interrupted goes on where it stopped. Raises InputError if there are no items.
    """
    if not items:
        raise InputError(f"task {task!r} has no items: none fits {dict(settings)}")
    provenance = _provenance(model)
    journal = _journal(output, task, settings, provenance)
    records: list[Record] = []
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    for _, reading_alike in groupby(baselines, key=lambda baseline: baseline.reading):
        group = list(reading_alike)
        for batch, baseline in product(batches, group):
            done = journal.of(baseline.name, [item.id for item in batch])
            if done is None:
                done = _answered(baseline, batch, max_new_tokens)
                journal.add(done)
            records += done
            for _ in done:
                progress(baseline.name, len(items))
        for baseline in group:
            baseline.forget()
    return Result(task, dict(settings), provenance, _summary(records), records)


def _answered(baseline: Baseline, batch: Sequence[Item], max_new_tokens: int) -> list[Record]:
    """Return the scored answers of a baseline to a batch of items."""
    records = []
    for item, outcome in zip(batch, baseline.answer(batch, max_new_tokens), strict=True):
        scores = {name: METRICS[name](outcome.text, item.answers) for name in item.metrics}
        records.append(
            Record(
                baseline=baseline.name,
                item=item.id,
                group=item.group,
                prediction=outcome.text,
                scores={"score": scores[item.metrics[0]], **scores},
                kv_bytes=outcome.kv_bytes,
                seconds=outcome.seconds,
                cut=outcome.cut,
            )
        )
    return records


def run_continuations(
    task: str,
    baselines: Sequence[Baseline],
    texts: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    settings: Mapping[str, Any],
    model: BeaconModel,
    *,
    output: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Score how well each baseline predicts the continuation of a text.

    texts: (name, token ids of the text, token ids of its continuation).

    If `full` and `none` are among the baselines, and the text helps at all, each row also has `gap closed`: the share
    of the difference between these two that a baseline makes up, (nll of none - nll) / (nll of none - nll of full), on
    means over texts. output: see `Journal`.

    Raises InputError if there are no texts, or for a baseline that needs a question.
    """
    if not texts:
        raise InputError(f"task {task!r} has no texts: none is as long as {dict(settings)} asks for")
    if asking := [baseline.name for baseline in baselines if baseline.asks_first]:
        raise InputError(f"task {task!r} asks no questions, which {', '.join(asking)} must know: leave them out")
    provenance = _provenance(model)
    journal = _journal(output, task, settings, provenance)
    records: list[Record] = []
    for baseline in baselines:
        for name, context, continuation in texts:
            done = journal.of(baseline.name, [name])
            if done is None:
                started = time.perf_counter()
                nll = baseline.score(context, continuation)
                seconds = time.perf_counter() - started
                done = [Record(baseline.name, name, "", "", {"nll": nll}, 0, seconds)]
                journal.add(done)
            records += done
            progress(baseline.name, len(texts))
        baseline.forget()
    rows = _with_gap_closed(_summary(records), records)
    return Result(task, dict(settings), provenance, rows, records)


def run_records(
    task: str,
    settings: Mapping[str, Any],
    model: BeaconModel,
    make: Callable[[Journal], list[Record]],
    *,
    output: Path | None = None,
) -> Result:
    """Return the result of a task that makes its records itself, with a journal to go on from; see `run_items`."""
    provenance = _provenance(model)
    records = make(_journal(output, task, settings, provenance))
    return Result(task, dict(settings), provenance, _summary(records), records)


def _journal(output: Path | None, task: str, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> Journal:
    """Open the journal of a run; which baselines there are, and on which machine it began, does not matter."""
    return Journal(output, {"task": task, **settings, **provenance, "baselines": None, "machine": None})


def _summary(records: Sequence[Record]) -> list[Row]:
    """Return the means of each baseline over all records and, if there are several groups, over each group."""
    groups = {record.group for record in records}
    named = sorted(groups - {""}, key=_with_numbers) if len(groups) > 1 else []
    rows = []
    for name in dict.fromkeys(record.baseline for record in records):
        of_name = [record for record in records if record.baseline == name]
        rows.append(_row(name, "", of_name))
        rows += [_row(name, group, [record for record in of_name if record.group == group]) for group in named]
    return rows


def _with_numbers(group: str) -> list[tuple[float, str]]:
    """Return a key that sorts groups by the numbers in their names: `500 0.5` before `1000 0`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", group)
    return [(float(part), "") if index % 2 else (0.0, part) for index, part in enumerate(parts)]


def _row(name: str, group: str, records: Sequence[Record]) -> Row:
    metrics = dict.fromkeys(metric for record in records for metric in record.scores)
    return Row(
        baseline=name,
        group=group,
        items=len(records),
        scores={m: bootstrap([record.scores[m] for record in records if m in record.scores]) for m in metrics},
        kv_bytes=sum(record.kv_bytes for record in records) / len(records),
        seconds=sum(record.seconds for record in records) / len(records),
        cut=sum(record.cut for record in records),
    )


def _with_gap_closed(rows: list[Row], records: Sequence[Record]) -> list[Row]:
    nll = {row.baseline: [r.scores["nll"] for r in records if r.baseline == row.baseline] for row in rows}
    if not {"full", "none"} <= nll.keys():
        return rows
    gap = paired_difference(nll["none"], nll["full"], resamples=1).mean
    if gap <= 0:
        return rows
    closed = []
    for row in rows:
        gained = paired_difference(nll["none"], nll[row.baseline])
        share = Interval(gained.mean / gap, gained.low / gap, gained.high / gap)
        closed.append(replace(row, scores={**row.scores, "gap closed": share}))
    return closed


def model_identity(model: BeaconModel) -> dict[str, str | None]:
    """Return what tells a model from others with the same name; None for what it has not."""
    return {
        "base": model.fingerprint.base,
        "adapter": model.fingerprint.adapter,
        "settings": digest_json(model.config.to_dict()),
        "probe": None if model.probe is None else model.probe.digest,
        "answers": None if model.answers is None else lora_digest(model.answers),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _provenance(model: BeaconModel) -> dict[str, Any]:
    """Return what the figures depend on: versions, commit, model and machine."""
    return {
        **{name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(Path(__file__).parents[1]),
        "model": Path(str(model.base.config.name_or_path)).name,
        **{name: value for name, value in model_identity(model).items() if value is not None},
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the commit of a folder, with a + if the tree has changes; None if the folder is not in git."""
    output = ""
    for arguments in (["ls-files", "--error-unmatch", "."], ["describe", "--always", "--abbrev=12", "--dirty=+"]):
        try:
            output = subprocess.run(
                ["git", *arguments],  # whichever git the user has
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
    return output.strip()
