"""Where the repository is, and the text that its examples read."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CHAPTER", "ROOT"]

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "examples" / "treasure_island_chapter_1.txt").read_text(encoding="utf-8")
