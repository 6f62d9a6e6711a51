"""Results as files, tables and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from beacon_memory.errors import InputError

from .journal import Record, journal_file
from .metrics import Interval, bootstrap
from .plots import draw_heat_map, draw_ratios
from .run import Result, Row

__all__ = ["markdown", "read_result", "write_report", "write_result"]


def write_result(result: Result, file: Path) -> None:
    """Write a result, with all records, as JSON, and remove its journal. Raises InputError if that cannot be done."""
    half = file.with_name(f"{file.name}.part")  # so that nobody reads half a result
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        half.replace(file)
        journal_file(file).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"the result cannot be written to {file}: {error.strerror}; name another file") from error


def read_result(file: Path) -> Result:
    """Read a result that `write_result` has written. Raises InputError for any other file."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            Row(**{**row, "scores": {name: Interval(**score) for name, score in row["scores"].items()}})
            for row in given["rows"]
        ]
        records = [Record(**record) for record in given["records"]]
        return Result(given["task"], given["settings"], given["provenance"], rows, records)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no evaluation result: {error!r}; remove it to run its task again") from error


def markdown(result: Result) -> str:
    """Return a result as markdown tables.

    The first has the scores with their intervals, and the K/V and the time for an item. Others show the differences
    from the full text and from retrieval, the cost of quantization and the scores by group, where there are any.
    """
    lines = _by_baseline([row for row in result.rows if not row.group])
    if differences := _by_rival(result):
        lines += ["", *differences]
    if costs := _by_precision(result):
        lines += ["", *costs]
    if groups := [row for row in result.rows if row.group]:
        lines += ["", *_by_group(groups)]
    return "\n".join(lines)


def _by_baseline(rows: Sequence[Row]) -> list[str]:
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.scores))
    if not any(_says_more(row) for row in rows):
        metrics = [metric for metric in metrics if metric != "score"]
    sized, cut = any(row.kv_bytes for row in rows), any(row.cut for row in rows)
    head = ["baseline", "items", *metrics, *["K/V"] * sized, "seconds", *["cut"] * cut]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row.baseline, str(row.items), *(_interval(row.scores.get(metric)) for metric in metrics)]
        cells += [f"{row.kv_bytes / 1e6:.2f} MB"] * sized + [f"{row.seconds:.2f}"] + [str(row.cut)] * cut
        lines.append(_line(cells))
    return lines


def _says_more(row: Row) -> bool:
    """Return whether `score` differs from every single metric, because items have different main metrics."""
    score = row.scores.get("score")
    return score is not None and score not in [row.scores[name] for name in row.scores if name != "score"]


def _by_rival(result: Result) -> list[str]:
    """Return a table of the differences from the full text, and from BM25 passages at the same ratio, item by item."""
    scores = {
        name: [one.scores["score"] for one in result.records if one.baseline == name and "score" in one.scores]
        for name in _names(result.records)
        if "@" not in name
    }
    rivals = {name: f"bm25:{name.partition(':')[2]}" for name in scores}
    columns = {
        "- full": {name: "full" for name in scores if name != "full" and scores.get("full")},
        "- bm25 at the same R": {name: bm25 for name, bm25 in rivals.items() if name != bm25 and scores.get(bm25)},
    }
    columns = {head: pairs for head, pairs in columns.items() if pairs}
    named = [name for name in scores if any(name in pairs for pairs in columns.values())]
    if not named:
        return []
    lines = [_line(["score", *columns]), _line(["---"] * (1 + len(columns)))]
    for name in named:
        others = [pairs.get(name) for pairs in columns.values()]
        cells = [
            _difference([ours - theirs for ours, theirs in zip(scores[name], scores[other], strict=True)])
            if other is not None
            else ""
            for other in others
        ]
        lines.append(_line([name, *cells]))
    return lines


def _by_group(rows: Sequence[Row]) -> list[str]:
    """Return a table of main scores, with a line for each group and a column for each baseline."""
    names = list(dict.fromkeys(row.baseline for row in rows))
    groups = dict.fromkeys(row.group for row in rows)
    of = {(row.baseline, row.group): row for row in rows}
    lines = [_line(["score", "items", *names]), _line(["---"] * (2 + len(names)))]
    for group in groups:
        scores = [f"{of[name, group].scores['score'].mean:.3f}" for name in names]
        lines.append(_line([group, str(of[names[0], group].items), *scores]))
    return lines


def _by_precision(result: Result) -> list[str]:
    """Return a table of the differences between quantized baselines and the same ones without quantization.

    The last lines are means over all baselines of one precision. They are means of each item first, so that the
    interval is one over items.
    """
    of = {name: [one for one in result.records if one.baseline == name] for name in _names(result.records)}
    base = {name: name.partition("@")[0] for name in of if "@" in name}
    pairs = {name: (of[name], of[plain]) for name, plain in base.items() if plain in of}
    if not pairs:
        return []
    metric = "score" if "score" in result.records[0].scores else next(iter(result.records[0].scores))
    sized = any(record.kv_bytes for record in result.records)
    head = ["quantized - as it is", metric, *["other answers", "K/V"] * sized]
    lines = [_line(head), _line(["---"] * len(head))]
    gained = {
        name: [one.scores[metric] - other.scores[metric] for one, other in zip(*both, strict=True)]
        for name, both in pairs.items()
    }
    for name, (quantized, whole) in pairs.items():
        cells = [name, _difference(gained[name])]
        if sized:
            changed = sum(one.prediction != other.prediction for one, other in zip(quantized, whole, strict=True))
            share = sum(one.kv_bytes for one in quantized) / sum(one.kv_bytes for one in whole)
            cells += [f"{changed} of {len(whole)}", f"{share:.3f}"]
        lines.append(_line(cells))
    for precision in dict.fromkeys(name.partition("@")[2] for name in pairs):
        of_items = zip(*(gained[name] for name in pairs if name.endswith(f"@{precision}")), strict=True)
        mean = _difference([fmean(of_item) for of_item in of_items])
        lines.append(_line([f"all @{precision}", mean, *["", ""] * sized]))
    return lines


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.baseline for record in records))


def _difference(gained: Sequence[float]) -> str:
    found = bootstrap(gained)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _interval(score: Interval | None) -> str:
    return "" if score is None else f"{score.mean:.3f} ({score.low:.3f} to {score.high:.3f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(results: Sequence[Result], folder: Path, command: str) -> list[Path]:
    """Write results as one page of tables and plots, `README.md`; returns the files.

    command: the command that makes the page again, with the limit and seed of each task. Raises MissingDependencyError
    without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "README.md"]
    written_by = f"Written by `{command}`, with the `--limit` and `--seed` of each task; not to be edited."
    lines = ["# Results", "", written_by, ""]
    origins = [_listed(result.provenance) for result in results]
    if shared := len(set(origins)) == 1:
        lines += [f"Made with {origins[0]}.", ""]
    for result, origin in zip(results, origins, strict=True):
        settings = _listed({name: value for name, value in result.settings.items() if name != "baselines"})
        lines += [f"## {result.task}", "", f"{settings}." + ("" if shared else f" Made with {origin}."), ""]
        lines += [markdown(result), ""]
        plot = folder / f"{result.task}.png"
        if draw_heat_map(result, plot) if result.task == "needle" else draw_ratios(result, plot):
            lines += [f"![{result.task}]({plot.name})", ""]
            written.append(plot)
    written[0].write_text("\n".join(lines), encoding="utf-8")
    return written


def _listed(properties: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in properties.items())
