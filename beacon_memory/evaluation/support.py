"""The task `support`: whether an answer tells that what was asked is not in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory

from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.question import Question
from beacon_memory.results import Answer, Evidence

from .baselines import BATCH
from .items import SupportItems, SupportQuestion
from .journal import Journal, Record
from .metrics import contains
from .run import Progress

__all__ = ["support_records"]


def support_records(
    items: SupportItems,
    model: BeaconModel,
    journal: Journal,
    *,
    budget: int | str,
    max_new_tokens: int,
    progress: Progress = lambda *_: None,
) -> list[Record]:
    """Store the documents, ask each question of its document, and record what the evidence of the answer says.

    Three ways to tell are compared: by the `words` of the question, by the `likelihood` of the answer, and `both`, as
    `Answer.supported` does. Their scores, each over the questions that it is about:

    precision:   of those that are said not to be in memory, how many are not.
    recall:      of those that are not in memory, of how many that is said.
    false alarm: of those that are in memory, of how many that is said.
    right:       of those that are in memory, to how many the answer holds a right one, whatever is said of it.

    budget: of each question, see `BeaconMemory.ask`.
    """
    records: list[Record] = []
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with TemporaryDirectory() as folder, BeaconMemory(folder, model) as memory:
        memory.add_many(list(items.texts.items()), ratio=2)
        for start in range(0, len(items.asked), BATCH):
            batch = items.asked[start : start + BATCH]
            done = [journal.of(name, [one.id for one in batch]) for name in ("words", "likelihood", "both")]
            kept = [record for records in done if records is not None for record in records]
            if None in done:
                questions = [Question(one.question, one.document, budget=budget, options=options) for one in batch]
                answers = memory.ask_many(questions)
                kept = [record for pair in zip(batch, answers, strict=True) for record in _records(*pair, model)]
                journal.add(kept)
            records += kept
            for record in kept:
                progress(record.baseline, len(items.asked))
    return records


def _records(asked: SupportQuestion, answer: Answer, model: BeaconModel) -> Iterator[Record]:
    evidence = answer.evidence or Evidence(0.0)
    denied = {
        "words": not evidence.relevant,
        "likelihood": not evidence.sure,
        "both": answer.supported is False,
    }
    for name, said in denied.items():
        yield Record(
            baseline=name,
            item=asked.id,
            group="",
            prediction=answer.text,
            scores={**_scores(asked, answer, said), "words": evidence.words, "likelihood": evidence.likelihood or 0.0},
            kv_bytes=answer.usage.slots * model.slot_bytes,
            seconds=answer.seconds,
        )


def _scores(asked: SupportQuestion, answer: Answer, denied: bool) -> Mapping[str, float]:
    precision = {"precision": float(not asked.answers)} if denied else {}
    if not asked.answers:
        return precision | {"recall": float(denied)}
    return precision | {"false alarm": float(denied), "right": contains(answer.text, asked.answers)}
