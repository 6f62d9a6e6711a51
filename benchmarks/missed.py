"""Answers to the questions whose words lead astray: no answer is in the two passages that BM25 finds first.

    beacon-memory eval qa --data qa_dev.jsonl.gz --where source=squad_v1.1 --limit 400 --json found.json \
        --baselines full,bm25:16,zoom:16,look:16,select-expected:16
    python benchmarks/missed.py qa_dev.jsonl.gz found.json

Prints the mean F1 of each baseline on these questions, and on the others. Takes results of the embedded model, with the
options above; several files may be named, whose baselines are told together.
"""

import argparse
import json
import statistics
from pathlib import Path

from beacon_memory import BeaconModel
from beacon_memory.evaluation.items import Item, read_qa
from beacon_memory.evaluation.pieces import passage_ids, token_ids
from beacon_memory.ranking import rank_passages
from beacon_memory.zoom import chunks

_FIRST = 2  # passages in which the answer is sought


def missed(item: Item, model: BeaconModel) -> bool:
    """Tell whether no answer is in the passages that match the question best."""
    pieces = [piece for passage in passage_ids(model.tokenizer, item.context) for piece in chunks(passage)]
    texts = [str(model.tokenizer.decode(list(piece))) for piece in pieces]
    first = " ".join(texts[number] for number in rank_passages(texts, item.question)[:_FIRST]).casefold()
    return not any(answer.casefold() in first for answer in item.answers)


def main() -> None:
    """Read the results, and print the two means of each baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the data that was asked of")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of `eval qa` or `eval report` on it")
    args = parser.parse_args()
    model = BeaconModel.from_pretrained()
    scores: dict[str, dict[str, float]] = {}
    settings = {}
    for file in args.results:
        result = json.loads(file.read_text(encoding="utf-8"))
        settings = result["settings"]
        for one in result["records"]:
            scores.setdefault(one["baseline"], {})[one["item"]] = one["scores"]["f1"]
    items = read_qa(
        args.data,
        context_tokens=settings["context_tokens"],
        count=lambda text: len(token_ids(model.tokenizer, text)),
        limit=settings["limit"],
        seed=settings["seed"],
        where=settings["where"],
    )
    astray = {item.id for item in items if missed(item, model)}
    print(f"{len(astray)} of {len(items)} questions are missed")
    for name, found in scores.items():
        parts = [[score for item, score in found.items() if (item in astray) == wanted] for wanted in (True, False)]
        print(f"{name:20} {' '.join(f'{statistics.mean(part):.3f}' for part in parts)}")


if __name__ == "__main__":
    main()
