"""The training loss: one forward pass over samples, and the loss on the tokens that they predict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from beacon_memory.compression.methods import ReadWindow
from beacon_memory.compression.scoring import repeated
from beacon_memory.compression.selection import best, read_raw, read_sink
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, slots_of
from beacon_memory.modeling.model import BeaconModel

from .loading import SelectedMemory
from .samples import Branch, Loaded, Sample

__all__ = ["Losses", "TrainingModel"]


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The losses of one pass over samples.

    loss:   the loss to minimise, a mean over all labels.
    labels: [samples] mean cross-entropy over the labels of each sample, without gradient.
    """

    loss: Tensor
    labels: Tensor


class TrainingModel(nn.Module):
    """A module whose `forward` computes the loss of samples. A Trainer, or DDP, wraps it.

    label_weight:   weight of the cross-entropy of the labels.
    distill_weight: weight of KL(full || compressed) over the labels. `full` is the distribution of the same model, LoRA
                    included, when it reads the full text, without gradient; `compressed` is the one when it reads the
                    compressed memory instead.
    compression:    `beacon`. With `hybrid`, branches see chosen tokens and beacons, so that beacons learn what the
                    chosen tokens lack. Each sample must have one part, of one window. The K/V of chosen tokens have no
                    gradient. With `select`, each branch sees what it has `loaded` of a selected memory, and nothing of
                    the memory has a gradient: what learns is the LoRA of answers.
    """

    def __init__(
        self, model: BeaconModel, label_weight: float = 1.0, distill_weight: float = 0.0, compression: str = "beacon"
    ) -> None:
        super().__init__()
        self.model = model
        self.hybrid, self.select = compression == "hybrid", compression == "select"
        self.label_weight, self.distill_weight = label_weight, distill_weight

    def forward(self, samples: Sequence[Sample]) -> Losses:
        """Compute the losses of samples in one pass. Distillation and chosen tokens take more, without gradient."""
        memories = [SelectedMemory(self.model, sample) for sample in samples] if self.select else []
        prefixes = [self._chosen(sample) for sample in samples] if self.hybrid else []
        plan = _behind_selected(samples, memories) if memories else _plan(self.model, samples, prefixes)
        ids = torch.tensor(plan.ids, device=self.model.device)
        logits = self._logits(plan)
        each = cross_entropy(logits, ids, reduction="none")
        loss = self.label_weight * each.mean()
        if self.distill_weight:
            with torch.no_grad():
                whole = [_uncompressed(one, self.model, select=self.select) for one in samples]
                full = self._logits(_behind_selected(whole, memories) if memories else _plan(self.model, whole))
            divergence = kl_div(log_softmax(logits, -1), log_softmax(full, -1), log_target=True, reduction="batchmean")
            loss = loss + self.distill_weight * divergence
        if torch.is_grad_enabled() and not loss.requires_grad:  # if all is uncompressed and there is no LoRA
            loss = loss + 0 * self.model.beacon_embed.sum()
        of = torch.tensor(plan.samples, device=each.device)
        sums = torch.zeros(len(samples), device=each.device).index_add_(0, of, each.detach())
        return Losses(loss, sums / torch.bincount(of, minlength=len(samples)).clamp(min=1))

    def _logits(self, plan: _Plan) -> Tensor:
        """Compute the logits of the rows that have a label, [labels, vocab] float32; the head runs on no others."""
        layout = BeaconLayout.build(plan.pieces, self.model.config)
        hidden = self.model.run(
            layout, self.model.empty_kv(), keep=[], prefixes=plan.prefixes, answers=self.select
        ).hidden
        return self.model.head(hidden[torch.tensor(plan.rows, device=hidden.device)]).float()

    @torch.no_grad()
    def _chosen(self, sample: Sample) -> Prefix:
        """Return the sink and the chosen tokens of a sample's only part, as the prefix of its beacons."""
        model = self.model
        sink = MemoryKV.of(read_sink(model))
        sink_prefix = model.prefix(sink)
        (ids,), ((ratio,),) = sample.parts, sample.ratios
        raw = read_raw(model, sink_prefix, ids)
        budget = slots_of(len(ids), ratio) - slots_of(len(ids), ratio * model.config.beacon_hybrid_factor)
        (scores,) = repeated(model, [ReadWindow(model, sink_prefix, ids, raw, None)])
        chosen = MemoryKV.chosen(raw, best(scores, budget))
        return model.prefix(MemoryKV.concat([sink, chosen]))


def _uncompressed(sample: Sample, model: BeaconModel, *, select: bool) -> Sample:
    """Return the same sample with its parts joined to one text whose K/V are all kept.

    select: whether it has a selected memory, of which everything is loaded then.
    """
    if select:
        return replace(sample, branches=tuple(replace(branch, loaded=Loaded(0)) for branch in sample.branches))
    lead = 0 if model.sink_ids else len(model.leading_bos)
    text = tuple(id for number, part in enumerate(sample.parts) for id in part[lead if number else 0 :])
    windows = -(-len(text) // model.config.beacon_window)
    return replace(sample, parts=(text,), ratios=((0,) * windows,))


@dataclass(slots=True)
class _Plan:
    """A pass over samples, and their labels.

    rows, ids, samples: for each label the number of the raw row that predicts it, its token id, and the number of its
                        sample.
    read:               how many raw rows there are so far.
    """

    pieces: list[Piece] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    read: int = 0
    prefixes: list[Prefix | None] = field(default_factory=list)

    def add(
        self, cursor: Cursor, windows: Sequence[Window], behind: Sequence[int], prefix: Prefix | None = None
    ) -> int:
        """Add a piece, perhaps with chosen tokens as its prefix; returns its number."""
        self.pieces.append(Piece(cursor, windows, behind))
        self.prefixes.append(prefix)
        self.read += sum(len(window.new_ids) for window in windows)
        return len(self.pieces) - 1

    def label(self, first_row: int, tokens: Sequence[int], labelled: int, sample: int) -> None:
        """Make tokens[labelled:] labels, each predicted by the row before it; tokens[0] is read at `first_row`."""
        self.rows.extend(range(first_row + labelled - 1, first_row + len(tokens) - 1))
        self.ids.extend(tokens[labelled:])
        self.samples.extend([sample] * (len(tokens) - labelled))


def _behind_selected(samples: Sequence[Sample], memories: Sequence[SelectedMemory]) -> _Plan:
    """Plan one pass over the branches of all samples; those that load the same stand side by side behind it."""
    plan = _Plan()
    for number, (sample, memory) in enumerate(zip(samples, memories, strict=True)):
        together: dict[Loaded, list[Branch]] = defaultdict(list)
        for branch in sample.branches:
            together[branch.loaded or Loaded(0)].append(branch)
        for loaded, branches in together.items():
            row = plan.read
            for branch in branches:
                plan.label(row, branch.ids, branch.labelled, number)
                row += len(branch.ids)
            plan.add(Cursor(), [Window.behind(0, branch.ids) for branch in branches], (), memory.prefix(loaded))
    return plan


def _plan(model: BeaconModel, samples: Sequence[Sample], prefixes: Sequence[Prefix] = ()) -> _Plan:
    """Plan one pass over all samples. The sink is read once; parts follow it, and branches follow their parts.

    prefixes: for hybrid memories, the sink and the chosen tokens of each sample.
    """
    plan = _Plan()
    sink = model.sink_ids
    first = [plan.add(Cursor(), model.cut(Cursor(), sink, iter([0]), tail="close"), ())] if sink else []
    start = Cursor(memory=len(sink))
    factor = model.config.beacon_hybrid_factor if prefixes else 1
    for number, sample in enumerate(samples):
        composed, slots = ([], 0) if prefixes else (list(first), len(sink))
        for part, ratios in zip(sample.parts, sample.ratios, strict=True):
            if sample.label_text:
                plan.label(plan.read, part, 1, number)
            # where no branch follows, the last window needs no beacons, as in BeaconModel.forward
            tail = "close" if sample.branches else "raw"
            windows = model.cut(start, part, (factor * ratio for ratio in ratios), tail=tail)
            composed.append(plan.add(start, windows, first))
            slots += sum(slots_of(len(window.ids), window.ratio) for window in windows)
        row = plan.read
        for branch in sample.branches:
            plan.label(row, branch.ids, branch.labelled, number)
            row += len(branch.ids)
        if sample.branches:
            windows = [Window.behind(slots, branch.ids) for branch in sample.branches]
            plan.add(Cursor(memory=slots), windows, composed, prefixes[number] if prefixes else None)
    return plan
