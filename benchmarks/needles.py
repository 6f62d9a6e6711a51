"""Adds one long document, with facts hidden at ten depths, and asks for each of them.

    python benchmarks/needles.py novels.jsonl.gz STORE --tokens 1000000

The data are JSON lines `{"text": ...}`. The text is made from them, always the same, and lies in STORE with all that is
measured; repeat the command after an interruption, and the reading goes on where it was. It prints a table, and JSON
with --json. Needs the extra: pip install 'beacon-memory[eval]'.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from beacon_memory import Answer, BeaconMemory
from beacon_memory.evaluation.items import Item, read_texts
from beacon_memory.evaluation.metrics import contains
from beacon_memory.evaluation.needles import needle_document

DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
ID = "haystack"


def main() -> None:
    """Make the text, add it in a process of its own, ask, and print what was measured."""
    options = _options()
    options.store.mkdir(parents=True, exist_ok=True)
    items = _items(options)
    added = _add(options)
    memory = BeaconMemory(options.store / "store", score=options.score)
    memory.model  # noqa: B018  # loads it, so that no answer waits for that
    asked = {budget: [_ask(memory, item, budget) for item in items] for budget in options.budgets}
    if options.json:
        print(json.dumps({"added": added, "asked": asked}))
        return
    print(f"| a text of {added['tokens']:,} tokens | |\n|---|---|")
    for name, value in added.items():
        print(f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |")
    titles = ("budget", "slots", "loaded", "found", "first token, s", "answer, s", "found at depths")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for budget, answers in asked.items():
        found, loaded = ([one["depth"] for one in answers if one[what]] for what in ("found", "loaded"))
        slots, first, seconds = (
            statistics.median(one[name] for one in answers) for name in ("slots", "first_token", "seconds")
        )
        depths = ", ".join(found)
        print(
            f"| {budget} | {slots:,.0f} | {len(loaded)} of {len(answers)} | {len(found)} of {len(answers)} | "
            f"{first:.2f} | {seconds:.2f} | {depths} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="JSON lines with texts, plain or gzipped")
    parser.add_argument("store", type=Path, help="folder for the text and the store")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the text (default 1000000)")
    parser.add_argument("--precision", default="int4", help="what to keep the K/V in (default int4)")
    parser.add_argument("--ratio", default="auto", help="tokens per slot (default auto)")
    parser.add_argument("--score", default="expected", help="how tokens are chosen (default expected)")
    parser.add_argument(
        "--budgets", nargs="+", default=["none", "50", "100", "500", "1000", "x1"], help="as for `ask`, or none"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def _items(options: argparse.Namespace) -> list[Item]:
    """Return the questions; the text is written into the store's folder unless it is there."""
    path = options.store / f"{options.tokens}.json"
    if not path.exists():
        from transformers import AutoTokenizer

        from beacon_memory.modeling.default_model import ensure_default_model
        from beacon_memory.modeling.text_tokens import text_tokens

        tokenizer = AutoTokenizer.from_pretrained(ensure_default_model())
        texts = [text for _, text in read_texts(options.data)]
        made = needle_document(
            texts, tokens=options.tokens, depths=DEPTHS, count=lambda text: len(text_tokens(tokenizer, text)[0])
        )
        (options.store / f"{options.tokens}.txt").write_text("\n".join(made[0].context), encoding="utf-8")
        asked = [(one.id, one.question, one.answers, one.group) for one in made]
        path.write_text(json.dumps(asked), encoding="utf-8")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Item(id, (), question, tuple(answers), ("contains",), group) for id, question, answers, group in rows]


def _add(options: argparse.Namespace) -> dict[str, object]:
    """Add the text by the command line; returns what it says, with the seconds and the RAM that it took at most."""
    text = options.store / f"{options.tokens}.txt"
    command = [sys.executable, "-m", "beacon_memory", "add", str(text), "--id", ID, "--json"]
    command += ["--store", str(options.store / "store"), "--precision", options.precision]
    command += ["--ratio", options.ratio, "--score", options.score]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}it ended with status {done.returncode}; repeat the command to go on")
    added = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    kept = ("status", "tokens", "slots", "bytes", "precision", "compression")
    seconds = round(time.perf_counter() - started, 1)
    return {name: added[name] for name in kept} | {"seconds of this run": seconds, "most bytes in RAM": peak}


def _ask(memory: BeaconMemory, item: Item, budget: str) -> dict[str, object]:
    """Ask one question; returns whether the fact's passage was loaded and is in the answer, and what that took."""
    place = memory.store.text(ID).index(item.answers[0])
    answer: Answer = memory.ask(item.question, ID, budget=None if budget == "none" else budget, max_new_tokens=32)
    return {
        "depth": item.group,
        "loaded": any(source.start <= place < source.stop for source in answer.sources),
        "found": bool(contains(answer.text, item.answers)),
        "answer": answer.text,
        "slots": answer.usage.slots,
        "first_token": answer.time_to_first_token,
        "seconds": answer.seconds,
    }


if __name__ == "__main__":
    main()
