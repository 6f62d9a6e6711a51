"""Items to evaluate on, read from gzipped or plain JSON lines. Every error names file and line."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from beacon_memory.documents import check_utf8
from beacon_memory.errors import InputError

from .metrics import LEVAL_JUDGED, LEVAL_METRICS, LONGBENCH_METRICS, METRICS

__all__ = [
    "Item",
    "LongItems",
    "SupportItems",
    "SupportQuestion",
    "read_kv_retrieval",
    "read_long",
    "read_longbench",
    "read_qa",
    "read_support",
    "read_texts",
]

T = TypeVar("T")
Row = Mapping[str, Any]

QA_METRICS = ("f1", "exact_match", "contains")

# Questions of those data sets whose `input` is not a complete question.
_LONGBENCH_QUESTIONS = {
    "qasper": "{input} If the article does not say, answer: unanswerable.",
    "gov_report": "Write a one-page summary of this report.",
    "multi_news": "Write a one-page summary of these news.",
    "trec": "Which type does the last question have? Answer as in the examples.\n{input}",
    "samsum": "Summarize this dialogue in a few short sentences.\n{input}",
    "passage_retrieval_en": "{input}\n\nWhich paragraph is this an abstract of? Answer like this: Paragraph 1",
    "passage_count": "How many different paragraphs are there, if each is counted once? Answer with the number only.",
    "lcc": "Write the next line of this code.",
    "repobench-p": "Write the next line of this code.\n{input}",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A question about a text.

    id:      name of the document and number of the question.
    context: passages of the text, in their order; it is these, joined by line ends.
    answers: right answers; for `classification` the right class, then the other ones.
    metrics: names in METRICS, the main one first.
    group:   group in tables of results: a category, a task, or a needle's length and depth.
    """

    id: str
    context: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    metrics: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True, slots=True)
class SupportQuestion:
    """A question about a document; without answers it asks for what is not in it.

    document: its key in `SupportItems.texts`.
    """

    id: str
    document: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SupportItems:
    """Texts of documents by name, and questions about what is in them and what is not."""

    texts: Mapping[str, str]
    asked: tuple[SupportQuestion, ...]


@dataclass(frozen=True, slots=True)
class LongItems:
    """Items on long documents, and the number of questions that were left out.

    left_out: number of questions of the whole file by reason: `no answer` (LoCoMo's adversarial questions), `judged by
              LLM` and `judged by human` (L-Eval has the same documents again with questions that have a metric).
    """

    items: tuple[Item, ...]
    left_out: Mapping[str, int]


def read_qa(
    path: str | Path,
    *,
    context_tokens: int,
    count: Callable[[str], int],
    limit: int | None = None,
    seed: int = 0,
    where: Mapping[str, str] | None = None,
) -> list[Item]:
    """Read rows `{context, question, answers, title}`; an item has the right context among others of the same title.

    The others are tried in random order and taken if they fit, so that all together have up to `context_tokens` tokens,
    counted by `count`. The right context is alone if it is longer, or has no title. The random choice depends only on
    `seed` and on the item's id.

    limit: draw so many rows at random, equally many of each `source`, which is also the group.
    where: keep only rows with these values.

    Raises InputError if no row is kept.
    """
    contexts: dict[str, dict[str, None]] = {}
    rows: list[tuple[str, Item]] = []  # with the title
    numbers: Counter[str] = Counter()
    for line, row in _rows(path):
        document = str(row.get("doc_id") or row.get("title") or "question")
        numbers[document] += 1
        if not _chosen(row, where or {}, line):
            continue
        title, context = str(row.get("title") or ""), _text(row, "context", line)
        contexts.setdefault(title, {})[context] = None
        name, source = f"{document} {numbers[document]}", str(row.get("source") or "")
        question, answers = _text(row, "question", line), _answers(row, line)
        rows.append((title, Item(name, (context,), question, answers, QA_METRICS, source)))
    if not rows:
        raise InputError(f"{path} has no row" + (f" with {dict(where)}" if where else ""))

    @cache
    def tokens(passage: str) -> int:
        return count("\n" + passage)

    items = []
    for title, item in _sample(rows, limit, seed, lambda row: row[1].group):
        rng, (right,) = random.Random(f"{seed} {item.id}"), item.context
        others = [other for other in contexts[title] if title and other != right]
        passages, left = [right], context_tokens - tokens(right)
        for other in rng.sample(others, len(others)):
            if tokens(other) <= left:
                passages.append(other)
                left -= tokens(other)
        rng.shuffle(passages)
        items.append(replace(item, context=tuple(passages)))
    return items


def read_long(path: str | Path, *, limit: int | None = None, questions: int | None = None, seed: int = 0) -> LongItems:
    """Read rows `{doc_id, context, qa: [{question, answers, category?}], sessions?, task?, metric?}`.

    Each question becomes an item. Its passages are the sessions, if there are any, else the lines that are not blank;
    its group is the category, else the task; its metrics are those of QA, or the one that `metric` names, as in L-Eval
    or METRICS.

    limit:     draw so many documents at random, equally many of each task.
    questions: draw at most so many questions of each document.
    """
    documents: list[tuple[str, list[Item]]] = []  # with the task
    left_out: Counter[str] = Counter()
    for line, row in _rows(path):
        document, task, metric = _text(row, "doc_id", line), str(row.get("task") or ""), row.get("metric")
        asked = _list(row, "qa", line, dict)
        if metric in LEVAL_JUDGED:
            left_out[f"judged by {metric}"] += len(asked)
            continue
        metrics: tuple[str, ...] = QA_METRICS if metric is None else (LEVAL_METRICS.get(str(metric), str(metric)),)
        if not METRICS.keys() >= {*metrics}:
            known = ", ".join([*LEVAL_METRICS, *LEVAL_JUDGED, *METRICS])
            raise InputError(f"{line}: 'metric' is {metric!r}, but must be one of {known}")
        passages = tuple(_list(row, "sessions", line, str)) if row.get("sessions") else _lines(row, line)
        items = [
            Item(
                f"{document} {number}",
                passages,
                _text(one, "question", line),
                _answers(one, line),
                metrics,
                str(one.get("category") or task),
            )
            for number, one in enumerate(asked, start=1)
            if one.get("answers")
        ]
        left_out["no answer"] += len(asked) - len(items)
        if items:
            documents.append((task, _sample(items, questions, f"{seed} {document}")))
    chosen = _sample(documents, limit, seed, lambda document: document[0])
    return LongItems(tuple(item for _, items in chosen for item in items), dict(+left_out))


def read_support(
    path: str | Path,
    *,
    limit: int | None = None,
    documents: int | None = None,
    seed: int = 0,
    where: Mapping[str, str] | None = None,
) -> SupportItems:
    """Read questions about what is in a document, and about as many that ask for what is not.

    Rows of `read_long` have both: questions without answers, such as LoCoMo's adversarial ones, ask for what is not
    there. Of rows of `read_qa`, the contexts of a title are a document, and every other question drawn is asked of the
    document of another title.

    limit:     most questions of each kind, drawn at random. documents: most documents, likewise.
    where:     keep only rows with these values.

    Raises InputError if there is no question of one of the kinds.
    """
    rows = [(line, row) for line, row in _rows(path) if _chosen(row, where or {}, line)]
    texts, asked = _of_documents(rows) if all("qa" in row for _, row in rows) else _of_titles(rows)
    kept = {*_sample([*texts], documents, seed)}
    asked = [one for one in asked if one.document in kept]
    if len({bool(one.answers) for one in asked}) == 1 and len(kept) > 1:
        asked = _crossed(asked, [*kept], seed)
    kinds = [[one for one in asked if bool(one.answers) is kind] for kind in (True, False)]
    if not all(kinds):
        raise InputError(f"{path} must have questions with answers and without, or documents of several titles")
    drawn = [one for kind in kinds for one in _sample(kind, limit, seed)]
    used = {one.document for one in drawn}
    return SupportItems({name: text for name, text in texts.items() if name in used}, tuple(drawn))


def _of_documents(rows: Sequence[tuple[str, Row]]) -> tuple[dict[str, str], list[SupportQuestion]]:
    """Return texts and questions of rows as `read_long` has them."""
    texts: dict[str, str] = {}
    asked: list[SupportQuestion] = []
    for line, row in rows:
        name = _text(row, "doc_id", line)
        texts[name] = "\n\n".join(_list(row, "sessions", line, str) if row.get("sessions") else _lines(row, line))
        for number, one in enumerate(_list(row, "qa", line, dict), start=1):
            answers = _answers(one, line) if one.get("answers") else ()
            asked.append(SupportQuestion(f"{name} {number}", name, _text(one, "question", line), answers))
    return texts, asked


def _of_titles(rows: Sequence[tuple[str, Row]]) -> tuple[dict[str, str], list[SupportQuestion]]:
    """Return texts and questions of rows as `read_qa` has them."""
    contexts: dict[str, dict[str, None]] = {}
    asked: list[SupportQuestion] = []
    for line, row in rows:
        title = _text(row, "title", line)
        contexts.setdefault(title, {})[_text(row, "context", line)] = None
        asked.append(
            SupportQuestion(f"{title} {len(asked) + 1}", title, _text(row, "question", line), _answers(row, line))
        )
    return {title: "\n\n".join(texts) for title, texts in contexts.items()}, asked


def _crossed(asked: Sequence[SupportQuestion], documents: Sequence[str], seed: int) -> list[SupportQuestion]:
    """Ask half of the questions of a document that they are not about."""
    rng = random.Random(seed)
    crossed = {*rng.sample(range(len(asked)), len(asked) // 2)}
    return [
        replace(one, document=rng.choice([name for name in documents if name != one.document]), answers=())
        if number in crossed
        else one
        for number, one in enumerate(asked)
    ]


def read_longbench(path: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Read LongBench's rows (arXiv 2308.14508), `{input, context, answers, all_classes, dataset, _id}`.

    Rows of LongBench-E have the same form. The question is `input`, completed by the instruction of the task; passages
    are the lines that are not blank; the group is the data set. `limit` draws so many rows at random, equally many of
    each data set. Raises InputError for the Chinese data sets.
    """
    items: list[Item] = []
    for line, row in _rows(path):
        dataset = _text(row, "dataset", line).removesuffix("_e")
        if dataset not in LONGBENCH_METRICS:
            known = ", ".join(LONGBENCH_METRICS)
            raise InputError(
                f"{line}: data set {dataset!r} has no metric here (Chinese ones are left out); use {known}"
            )
        metric, answers = LONGBENCH_METRICS[dataset], _answers(row, line)
        if metric == "classification":
            if len(answers) > 1:
                raise InputError(f"{line}: 'answers' is {answers!r}, but {dataset!r} must have one right class")
            answers += tuple(name for name in _list(row, "all_classes", line, str) if name != answers[0])
        question = _LONGBENCH_QUESTIONS.get(dataset, "{input}")
        if "{input}" in question:
            question = question.format(input=_text(row, "input", line))
        items.append(
            Item(
                f"{dataset} {row.get('_id') or len(items) + 1}",
                _lines(row, line),
                question,
                answers,
                (metric,),
                dataset,
            )
        )
    return _sample(items, limit, seed, lambda item: item.group)


def read_kv_retrieval(path: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """Read rows `{doc_id, context, question, answers}` that ask for the value of a key; each line is such a pair.

    Passages are the lines. The group is the fifth of the text that has the value: `0-20 %` to `80-100 %`.
    """
    items = []
    for line, row in _rows(path):
        passages, answers = _lines(row, line), _answers(row, line)
        place = next((place for place, pair in enumerate(passages) if answers[0] in pair), None)
        if place is None:
            raise InputError(f"{line}: the answer {answers[0]!r} is not in 'context'")
        fifth = 20 * (5 * place // len(passages))
        name, group = _text(row, "doc_id", line), f"{fifth}-{fifth + 20} %"
        items.append(Item(name, passages, _text(row, "question", line), answers, ("contains",), group))
    return _sample(items, limit, seed)


def read_texts(path: str | Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Read the first `limit` rows `{id, text}` as (id, text); the id of a row without one is its number."""
    rows = islice(enumerate(_rows(path), start=1), limit)
    return [(str(row.get("id") or number), _text(row, "text", line)) for number, (line, row) in rows]


def _rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place, `FILE, line N`. Raises InputError for a line that is not a JSON object."""
    path, number = Path(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: {row!r} is not a JSON object")
                check_utf8(row, f"{path}, line {number}: the row")
                yield f"{path}, line {number}", row
    except FileNotFoundError as error:
        raise InputError(f"the data file {path} does not exist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, line {number + 1}: cannot be read: {error}") from error


def _sample(
    things: Sequence[T], limit: int | None, seed: int | str, kind: Callable[[T], str] = lambda _: ""
) -> list[T]:
    """Draw `limit` things at random, equally many of each kind; keeps their order. A larger limit only adds things."""
    if limit is None:
        return list(things)
    if limit < 1:
        raise InputError(f"limit={limit}, but must be 1 or more")
    shuffled: dict[str, list[int]] = {}
    for number in random.Random(seed).sample(range(len(things)), len(things)):
        shuffled.setdefault(kind(things[number]), []).append(number)
    turns = (number for turn in zip_longest(*shuffled.values()) for number in turn if number is not None)
    return [things[number] for number in sorted(islice(turns, limit))]


def _lines(row: Row, line: str) -> tuple[str, ...]:
    return tuple(one for one in _text(row, "context", line).split("\n") if one.strip())


def _answers(row: Row, line: str) -> tuple[str, ...]:
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise InputError(f"{line}: 'answers' is {answers!r}, but must be one or more texts")
    return tuple(answers)


def _list(row: Row, key: str, line: str, kind: type[T]) -> list[T]:
    found = row.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, kind) for one in found):
        raise InputError(f"{line}: {key!r} is {found!r:.200}, but must be a list of one or more {kind.__name__}")
    return found


def _text(row: Row, key: str, line: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{line}: {key!r} is {text!r:.200}, but must be a text that is not empty")
    return text


def _chosen(row: Row, where: Mapping[str, str], line: str) -> bool:
    if missing := where.keys() - row.keys():
        raise InputError(f"{line}: {min(missing)!r} is missing, by which rows are chosen")
    return all(row[key] == value for key, value in where.items())
