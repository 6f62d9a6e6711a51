"""The tasks: each has its items, and a longest answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beacon_memory.modeling.model import BeaconModel

from .baseline_names import baselines
from .items import Item, read_kv_retrieval, read_long, read_longbench, read_qa, read_support, read_texts
from .needles import needle_items
from .pieces import token_ids
from .run import Progress, Result, run_continuations, run_items, run_records
from .support import support_records

__all__ = ["Evaluation"]

_SHORT = 16  # tokens of an answer whose likelihood is looked at


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Tasks on one model.

    names:    names of the baselines, see `baseline_names`.
    seed:     seed of all random choices.
    progress: see `Progress`.
    output:   the file that the result will be written to, if any; see `Journal`.

    Every task raises InputError for data that cannot be used, for data of which no item is left, and for an unknown
    baseline.
    """

    model: BeaconModel
    names: Sequence[str]
    seed: int = 0
    progress: Progress = lambda *_: None
    output: Path | None = None

    def qa(
        self, data: Path, *, context_tokens: int, limit: int | None, where: Mapping[str, str], task: str = "qa"
    ) -> Result:
        """Ask questions about passages of one title, the right one among them."""
        items = read_qa(
            data, context_tokens=context_tokens, count=self._count, limit=limit, seed=self.seed, where=where
        )
        settings = {"context_tokens": context_tokens, "limit": limit, "where": dict(where)}
        return self._answers(task, items, data, settings, max_new_tokens=48)

    def long(self, data: Path, *, limit: int | None, questions: int | None, task: str = "long") -> Result:
        """Ask many questions about each of `limit` long documents or conversations."""
        read = read_long(data, limit=limit, questions=questions, seed=self.seed)
        settings = {"documents": limit, "questions": questions, "left_out": dict(read.left_out)}
        return self._answers(task, read.items, data, settings, max_new_tokens=64)

    def longbench(self, data: Path, *, limit: int | None, task: str = "longbench") -> Result:
        """Ask the questions of LongBench, each data set with its own metric."""
        items = read_longbench(data, limit=limit, seed=self.seed)
        return self._answers(task, items, data, {"limit": limit}, max_new_tokens=128)

    def kv_retrieval(self, data: Path, *, limit: int | None, task: str = "kv") -> Result:
        """Ask for the value of one key among many pairs of random strings."""
        items = read_kv_retrieval(data, limit=limit, seed=self.seed)
        return self._answers(task, items, data, {"limit": limit}, max_new_tokens=64)

    def needle(
        self,
        data: Path,
        *,
        lengths: Sequence[int],
        depths: Sequence[float],
        repeats: int = 1,
        other_words: bool = False,
        task: str = "needle",
    ) -> Result:
        """Ask for a fact at each depth of texts of each length, `repeats` times, in its own words or in others."""
        texts = [text for _, text in read_texts(data)]
        items = needle_items(
            texts,
            lengths=lengths,
            depths=depths,
            count=self._count,
            seed=self.seed,
            repeats=repeats,
            other_words=other_words,
        )
        settings = {
            "lengths": list(lengths),
            "depths": list(depths),
            "repeats": repeats,
            "other_words": other_words or None,
        }
        return self._answers(task, items, data, settings, max_new_tokens=32)

    def support(
        self,
        data: Path,
        *,
        limit: int | None,
        documents: int | None,
        budget: int | str,
        where: Mapping[str, str],
        task: str = "support",
    ) -> Result:
        """Ask for what is in a document and for what is not, and tell the two apart."""
        items = read_support(data, limit=limit, documents=documents, seed=self.seed, where=where)
        settings = {"limit": limit, "documents": documents, "budget": budget, "where": dict(where)}
        return run_records(
            task,
            self._settings(data, {**settings, "max_new_tokens": _SHORT}),
            self.model,
            lambda journal: support_records(
                items, self.model, journal, budget=budget, max_new_tokens=_SHORT, progress=self.progress
            ),
            output=self.output,
        )

    def ppl(
        self, data: Path, *, context_tokens: int, continuation_tokens: int, limit: int | None, task: str = "ppl"
    ) -> Result:
        """Score the prediction of a text's continuation from the memory of its beginning.

        The first `limit` texts that are long enough are taken.
        """
        texts = []
        for name, text in read_texts(data):
            ids = token_ids(self.model.tokenizer, text)[: context_tokens + continuation_tokens]
            if len(ids) == context_tokens + continuation_tokens:
                texts.append((name, ids[:context_tokens], ids[context_tokens:]))
            if len(texts) == limit:
                break
        settings = {"context_tokens": context_tokens, "continuation_tokens": continuation_tokens, "limit": limit}
        return run_continuations(
            task,
            baselines(self.names, self.model),
            texts,
            self._settings(data, settings),
            self.model,
            output=self.output,
            progress=self.progress,
        )

    def _answers(
        self, task: str, items: Sequence[Item], data: Path, settings: Mapping[str, object], *, max_new_tokens: int
    ) -> Result:
        return run_items(
            task,
            baselines(self.names, self.model),
            items,
            self._settings(data, {**settings, "max_new_tokens": max_new_tokens}),
            self.model,
            max_new_tokens=max_new_tokens,
            output=self.output,
            progress=self.progress,
        )

    def _settings(self, data: Path, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings that a result depends on, as they are written down; without those that are not set."""
        chosen = {name: value for name, value in settings.items() if value not in (None, {})}
        return {"data": data.name, **chosen, "seed": self.seed, "baselines": list(self.names)}

    def _count(self, text: str) -> int:
        return len(token_ids(self.model.tokenizer, text))
