"""Read a chapter once, keep a part of its keys and values, and answer questions from that alone.

    python examples/01_compress_and_ask.py

The chapter is the first of Treasure Island by Robert Louis Stevenson (1883, public domain).
"""

import argparse
import tempfile
from pathlib import Path

from beacon_memory import BeaconMemory

CHAPTER = Path(__file__).with_name("treasure_island_chapter_1.txt")
RATIOS = (0, 2, 4, 8, 16)  # 0 keeps the K/V of every token
QUESTIONS = (
    "Who told the captain that rum would kill him?",
    "What is the name of the inn?",
    "What song did the captain sing?",
)


def main() -> None:
    """Add the chapter at several ratios, and ask the same questions of each and of no document at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="folder of the store (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, BeaconMemory(arguments.store or temporary) as memory:
        text = CHAPTER.read_text(encoding="utf-8")
        for ratio in RATIOS:
            added = memory.add(f"ratio {ratio}", text, {"author": "Stevenson"}, ratio=ratio)
            print(f"{added.id}: {added.tokens:,} tokens in {added.slots:,} slots, {added.bytes / 1e6:.1f} MB")
        for question in QUESTIONS:
            print(f"\nQ: {question}")
            for ids in (*([f"ratio {ratio}"] for ratio in RATIOS), []):
                answer = memory.ask(question, ids, budget="x1", max_new_tokens=32)  # all of it
                print(f"{ids[0] if ids else 'no document':12} {answer.text}")


if __name__ == "__main__":
    main()
