"""One forward pass over training samples, and the loss on what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from beacon_memory.compression.scoring import repeated
from beacon_memory.compression.selection import best, read_raw, read_sink
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, slots_of
from beacon_memory.modeling.model import BeaconModel

from .samples import Sample

__all__ = ["Losses", "TrainingModel"]


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What one pass over samples gives.

    loss:   what is minimised, the mean over all labels.
    labels: [samples] mean cross-entropy of each sample's labels, without gradient.
    """

    loss: Tensor
    labels: Tensor


class TrainingModel(nn.Module):
    """A BeaconModel whose forward is the loss of samples: what a Trainer, or DDP, wraps.

    label_weight:   of the cross-entropy of the labels.
    distill_weight: of KL(full || compressed) over the labels: the distribution of the same model, LoRA included,
                    when it reads the full text, without gradient, against the one behind the compressed memory.
    hybrid:         branches see chosen tokens beside the beacons, as in a `hybrid` memory: the beacons learn the rest.
                    A sample has one part then, of one window. The K/V of chosen tokens are without gradient.
    """

    def __init__(
        self, model: BeaconModel, label_weight: float = 1.0, distill_weight: float = 0.0, *, hybrid: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.hybrid = hybrid
        self.label_weight, self.distill_weight = label_weight, distill_weight

    def forward(self, samples: Sequence[Sample]) -> Losses:
        """Loss of the samples, all in one pass; further ones, for distillation and chosen tokens, have no gradient."""
        prefixes = [self._chosen(sample) for sample in samples] if self.hybrid else []
        plan = _plan(self.model, samples, prefixes)
        ids = torch.tensor(plan.ids, device=self.model.device)
        logits = self._logits(plan)
        each = cross_entropy(logits, ids, reduction="none")
        loss = self.label_weight * each.mean()
        if self.distill_weight:
            with torch.no_grad():
                full = self._logits(_plan(self.model, [_uncompressed(one, self.model) for one in samples]))
            divergence = kl_div(log_softmax(logits, -1), log_softmax(full, -1), log_target=True, reduction="batchmean")
            loss = loss + self.distill_weight * divergence
        if torch.is_grad_enabled() and not loss.requires_grad:  # read uncompressed and without a LoRA
            loss = loss + 0 * self.model.beacon_embed.sum()
        of = torch.tensor(plan.samples, device=each.device)
        sums = torch.zeros(len(samples), device=each.device).index_add_(0, of, each.detach())
        return Losses(loss, sums / torch.bincount(of, minlength=len(samples)).clamp(min=1))

    def _logits(self, plan: _Plan) -> Tensor:
        """[labels, vocab] float32: the head runs on rows that have a label, and on no other."""
        layout = BeaconLayout.build(plan.pieces, self.model.config)
        hidden = self.model.run(layout, self.model.empty_kv(), keep=[], prefixes=plan.prefixes).hidden
        return self.model.head(hidden[torch.tensor(plan.rows, device=hidden.device)]).float()

    @torch.no_grad()
    def _chosen(self, sample: Sample) -> Prefix:
        """The sink and the chosen tokens of a sample's only part, in front of its beacons."""
        model = self.model
        sink = MemoryKV.of(read_sink(model))
        behind = model.prefix(sink)
        (ids,), ((ratio,),) = sample.parts, sample.ratios
        raw = read_raw(model, behind, ids)
        budget = slots_of(len(ids), ratio) - slots_of(len(ids), ratio * model.config.beacon_hybrid_factor)
        chosen = MemoryKV.chosen(raw, best(repeated(model, behind, raw, ids), budget))
        return model.prefix(MemoryKV.concat([sink, chosen]))


def _uncompressed(sample: Sample, model: BeaconModel) -> Sample:
    """The same sample with its parts read as one text whose K/V are all kept."""
    lead = 0 if model.sink_ids else len(model.leading_bos)
    text = tuple(id for number, part in enumerate(sample.parts) for id in part[lead if number else 0 :])
    windows = -(-len(text) // model.config.beacon_window)
    return replace(sample, parts=(text,), ratios=((0,) * windows,))


@dataclass(slots=True)
class _Plan:
    """A pass over some samples, and for each label the raw row that predicts it, its token id and its sample."""

    pieces: list[Piece] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    read: int = 0
    prefixes: list[Prefix | None] = field(default_factory=list)

    def add(
        self, cursor: Cursor, windows: Sequence[Window], behind: Sequence[int], prefix: Prefix | None = None
    ) -> int:
        """Read a piece after those before, perhaps behind chosen tokens; returns its number."""
        self.pieces.append(Piece(cursor, windows, behind))
        self.prefixes.append(prefix)
        self.read += sum(len(window.new_ids) for window in windows)
        return len(self.pieces) - 1

    def label(self, first_row: int, tokens: Sequence[int], labelled: int, sample: int) -> None:
        """Let tokens[labelled:], read from `first_row` on, be predicted, each by the row before it."""
        self.rows.extend(range(first_row + labelled - 1, first_row + len(tokens) - 1))
        self.ids.extend(tokens[labelled:])
        self.samples.extend([sample] * (len(tokens) - labelled))


def _plan(model: BeaconModel, samples: Sequence[Sample], prefixes: Sequence[Prefix] = ()) -> _Plan:
    """Lay all samples out in one pass: the sink once, the parts behind it, the branches behind their parts.

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
            # what nothing stands behind needs no beacons in its last window, as in BeaconModel.forward
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
