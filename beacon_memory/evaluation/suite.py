"""All tasks on a folder of data. `docs/results` is made by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from beacon_memory.errors import InputError

from .report import read_result, write_report, write_result
from .run import Result, model_identity
from .tasks import Evaluation

__all__ = ["run_suite"]

_MAIN = ("full", "none", *(f"{way}:{ratio}" for way in ("bm25", "zoom", "select-expected") for ratio in (8, 16)))
_BEACONS = ("beacon:2", "beacon:4", "beacon:8", "beacon:16", "beacon:32")
_SQUAD = (*_MAIN, "select-expected:2", "select-expected:4", "select:4", "select:8", *_BEACONS[:4])
_OTHERS = (
    *("full", "base", "truncated:4", "bm25:4", "beacon:8", "hybrid:4", "hybrid:8", "select:4", "select:8"),
    *("expected:4", "snapkv:4", "kvzip:4", "kvzip:8", "cskv:2", "cskv:4", "cskv:8"),
)
_COMPOSED = tuple(f"{way}:{count}" for way in ("select-expected:8", "zoom:8", "beacon:2") for count in (1, 2, 4, 8))


@dataclass(frozen=True, slots=True)
class _Task:
    """A task of the suite: its name, data file and baselines, and the function that runs it with a limit of items."""

    name: str
    file: str
    names: Sequence[str]
    run: Callable[[Evaluation, Path, int], Result]


def _qa(name: str, source: str, names: Sequence[str]) -> _Task:
    return _Task(
        name,
        "qa_dev",
        names,
        lambda e, data, limit: e.qa(data, context_tokens=768, limit=limit, where={"source": source}, task=name),
    )


def _needle(name: str, *, other_words: bool) -> _Task:
    lengths, depths = (500, 1000, 2000, 4000, 8000), (0, 0.25, 0.5, 0.75, 1)
    return _Task(
        name,
        "paul_graham_essays",
        ("full", "bm25:16", "zoom:16", "look:16", "select-expected:4", "select-expected:16"),
        lambda e, data, limit: e.needle(
            data,
            lengths=lengths,
            depths=depths,
            repeats=max(1, limit // 200),
            other_words=other_words,
            task=name,
        ),
    )


_TASKS = (
    _qa("qa-squad", "squad_v1.1", _SQUAD),
    _qa("qa-others", "squad_v1.1", _OTHERS),
    _qa("qa-composed", "squad_v1.1", _COMPOSED),
    _qa("qa-fairytale", "fairytaleqa", _MAIN),
    _Task(
        "ppl",
        "paul_graham_essays",
        ("full", "none", "base", "truncated:8", *_BEACONS),
        lambda e, data, limit: e.ppl(data, context_tokens=768, continuation_tokens=256, limit=limit),
    ),
    _Task(
        "retention",
        "paul_graham_essays",
        ("base", "full"),
        lambda e, data, limit: e.ppl(data, context_tokens=128, continuation_tokens=128, limit=limit, task="retention"),
    ),
    _Task(
        "articles",
        "squad_articles",
        _MAIN,
        lambda e, data, limit: e.long(data, limit=None, questions=max(1, limit // 5), task="articles"),
    ),
    _Task(
        "locomo",
        "locomo",
        _MAIN,
        lambda e, data, limit: e.long(data, limit=3, questions=max(1, limit // 3), task="locomo"),
    ),
    _Task(
        "leval",
        "leval",
        _MAIN,
        lambda e, data, limit: e.long(data, limit=max(1, limit // 20), questions=20, task="leval"),
    ),
    _Task("longbench", "longbench", _MAIN, lambda e, data, limit: e.longbench(data, limit=limit)),
    _Task("kv", "kv_retrieval", _MAIN, lambda e, data, limit: e.kv_retrieval(data, limit=max(1, limit // 8))),
    _needle("needle", other_words=False),
    _needle("needle-other-words", other_words=True),
)


def run_suite(
    evaluation: Evaluation, data: Path, output: Path, limit: int, say: Callable[[str], None], only: Sequence[str] = ()
) -> list[Path]:
    """Run every task whose data is there, or those named in `only`, and write a page; returns the files of the page.

    With `only`, what the page tells of other tasks stays.

    limit: number of items of a task; some tasks take a share of it.
    say:   called with one line for each task.

    A task is not run again if `output` has its result for the same model and settings. Raises InputError for an unknown
    task, and if there is nothing to run.
    """
    names = [task.name for task in _TASKS]
    if unknown := sorted(set(only) - set(names)):
        raise InputError(f"there is no task {', '.join(unknown)}; name one of {', '.join(names)}")
    results = []
    for task in _TASKS:
        file, kept = data / f"{task.file}.jsonl.gz", output / f"{task.name}.json"
        result = read_result(kept) if kept.exists() else None
        named = task.name in (only or names)
        if result is not None and (not named or _same_run(result, evaluation, task.names, limit)):
            say(f"{task.name}: kept")
            results.append(result)
        elif not named:
            say(f"{task.name}: left out")
        elif not file.exists():
            say(f"{task.name}: left out, {file.name} is not there")
        else:
            say(f"{task.name}: {len(task.names)} baselines")
            result = task.run(replace(evaluation, names=task.names, output=kept), file, limit)
            result = replace(result, settings={**result.settings, "limit": limit})
            write_result(result, kept)
            results.append(result)
    if not results:
        files = sorted({f"{task.file}.jsonl.gz" for task in _TASKS if task.name in (only or names)})
        raise InputError(f"there is nothing to report: {data} holds none of {', '.join(files)}")
    return write_report(results, output, f"beacon-memory eval report DATA {output.as_posix()}")


def _same_run(result: Result, evaluation: Evaluation, names: Sequence[str], limit: int) -> bool:
    model = evaluation.model
    now = {
        **model_identity(model),
        "baselines": list(names),
        "limit": limit,
        "seed": evaluation.seed,
    }
    then = {**result.provenance, **result.settings}
    return all(then.get(name) == value for name, value in now.items())
