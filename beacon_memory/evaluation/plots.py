"""Plots of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from beacon_memory.errors import MissingDependencyError

from .metrics import Interval
from .run import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_heat_map", "draw_ratios"]

_LEVEL = {"full": "-", "none": ":", "base": "--"}  # line styles of the baselines without a ratio


def draw_ratios(result: Result, file: Path) -> bool:
    """Draw scores over ratios, and level lines for baselines without one; returns False if none has a ratio."""
    rows = [row for row in result.rows if not row.group]
    metric = "gap closed" if any("gap closed" in row.scores for row in rows) else next(iter(rows[0].scores))
    lines: dict[str, dict[int, Interval]] = {}
    for row in rows:
        kind, *numbers = row.baseline.split(":")
        if numbers:
            name = f"{kind}, {numbers[1]} documents" if numbers[1:] else kind
            lines.setdefault(name, {})[int(numbers[0])] = row.scores[metric]
    if not lines:
        return False
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for name, points in lines.items():
        ratios = sorted(points)
        of_ratio = [points[ratio] for ratio in ratios]
        ends = [[max(0, one.mean - one.low) for one in of_ratio], [max(0, one.high - one.mean) for one in of_ratio]]
        axes.errorbar(ratios, [one.mean for one in of_ratio], yerr=ends, marker="o", capsize=3, label=name)
    for row in rows:
        if row.baseline in _LEVEL:
            style = _LEVEL[row.baseline]
            axes.axhline(row.scores[metric].mean, color="gray", linestyle=style, label=row.baseline)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({ratio for points in lines.values() for ratio in points}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens of text for each slot of K/V")
    axes.set_ylabel(metric)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    return True


def draw_heat_map(result: Result, file: Path) -> bool:
    """Draw a map of each baseline, depth of the needle against length of the text; returns False without groups.

    Groups have names `LENGTH DEPTH`, see `needle_items`.
    """
    names = list(dict.fromkeys(row.baseline for row in result.rows))
    of: dict[tuple[str, float, float], float] = {}
    for row in result.rows:
        if row.group:
            length, depth = map(float, row.group.split())
            of[row.baseline, length, depth] = row.scores["score"].mean
    if not of:
        return False
    lengths, depths = sorted({length for _, length, _ in of}), sorted({depth for _, _, depth in of})
    figure = _figure(2.2 * len(names) + 1, 3)
    maps = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(maps, names, strict=True):
        grid = [[of[name, length, depth] for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize="small")
        axes.set_xticks(range(len(lengths)), [f"{length:g}" for length in lengths], rotation=90, fontsize="x-small")
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize="x-small")
    maps[0].set_ylabel("depth of the needle")
    figure.supxlabel("tokens of text", fontsize="small")
    figure.colorbar(image, ax=maps.tolist(), label="found")
    figure.savefig(file, dpi=120)
    return True


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, width and height in inches, that needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'beacon-memory[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")
