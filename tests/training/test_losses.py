from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import BOS, some_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_samples import LORA, a_model, a_sample, with_answers

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training.loading import SelectedMemory
from beacon_memory.training.losses import TrainingModel
from beacon_memory.training.samples import Branch, Loaded, Sample
from beacon_memory.training.start import trained_parameters

SETTINGS: list[dict[str, Any]] = [
    {},
    {"beacon_attn": "full-coverage", "beacon_embed": "learned", "beacon_sink_size": 0},
    {"beacon_placement": "salient-words"},
]
COMPOSED = a_sample(
    [some_ids(19, seed=1), some_ids(5, seed=2)], [[2, 4, 0], [4]], (some_ids(9, seed=3), 6), (some_ids(4, seed=4), 1)
)
ALONE = a_sample([some_ids(3, seed=5)], [[4]], (some_ids(7, seed=6), 2))
LONG = a_sample([some_ids(19, seed=1)], [[2, 4, 2]], (some_ids(9, seed=3), 6), (some_ids(4, seed=4), 1))

every_method = pytest.mark.parametrize("settings", SETTINGS, ids=str)
with_and_without_lora = pytest.mark.parametrize("lora", [None, LORA], ids=["no LoRA", "lora"])


def behind(model: BeaconModel, sample: Sample, branch: Branch, compression: str = "beacon") -> Tensor:
    """Logits that predict a branch's labels: documents compressed one by one, then the stock model behind them."""
    compressor = BeaconCompressor(model)
    documents = [Work(*one) for one in zip(sample.parts, sample.ratios, strict=True)]
    memories = [compressor.compress_one(one, compression=compression).kv for one in documents]
    prefix = model.prefix(MemoryKV.concat([MemoryKV.of(compressor.sink), *memories]))
    cache = MemoryCache([prefix], config=model.base.config)
    logits = model.base(torch.tensor([branch.ids]), past_key_values=cache).logits[0]
    return logits[branch.labelled - 1 : -1]  # type: ignore[no-any-return]


def losses_behind(model: BeaconModel, sample: Sample, compression: str = "beacon") -> Tensor:
    """The cross-entropy of each label."""
    each = []
    for branch in sample.branches:
        labels = torch.tensor(branch.ids[branch.labelled :])
        each.append(cross_entropy(behind(model, sample, branch, compression), labels, reduction="none"))
    return torch.cat(each)


def divergence(model: BeaconModel, sample: Sample) -> Tensor:
    """KL(full || compressed) of each label, where the stock model reads the full text."""
    each = []
    for branch in sample.branches:
        text = [id for part in sample.parts for id in part]
        logits = model.base(torch.tensor([[BOS, *text, *branch.ids]])).logits[0]
        full = torch.softmax(logits[len(text) + branch.labelled : -1], -1)
        each.append((full * (full.log() - torch.log_softmax(behind(model, sample, branch), -1))).sum(-1))
    return torch.cat(each)


def loss(model: BeaconModel, *samples: Sample, **weights: float) -> Tensor:
    with torch.no_grad():
        return TrainingModel(model, **weights)(samples).loss


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


class TestLabels:
    @every_method
    @with_and_without_lora
    def test_it_is_that_of_the_stock_model_behind_documents_compressed_one_by_one(
        self, settings: dict[str, Any], lora: Any
    ) -> None:
        model = a_model(lora, **settings)
        with torch.no_grad():
            expected = [losses_behind(model, one) for one in (COMPOSED, ALONE)]
            ours = TrainingModel(model)([COMPOSED, ALONE])
        close(ours.loss, torch.cat(expected).mean())
        close(ours.labels, torch.stack([one.mean() for one in expected]))

    def test_it_is_on_answers_alone(self) -> None:
        model = a_model()
        seen: list[int] = []
        hook = model.base.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        loss(model, COMPOSED, ALONE)
        hook.remove()
        assert seen == [3 + 3 + 5]  # the head is run where there is a label, and nowhere else

    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    def test_on_all_text_it_is_the_loss_of_language_modelling(self, attn: str) -> None:
        model = a_model(beacon_attn=attn, beacon_sink_size=0)
        ids = some_ids(29)
        text = a_sample([ids], [[2, 4, 2, 4]], label_text=True)
        given = torch.tensor([ids])
        with torch.no_grad():
            close(loss(model, text), model(given, labels=given, ratios=[iter([2, 4, 2])]).loss)

    def test_text_and_branch_are_labelled_together(self) -> None:
        model = a_model(beacon_sink_size=0)
        ids = some_ids(16)
        with torch.no_grad():
            text = TrainingModel(model)([a_sample([ids], [[2, 4]], label_text=True)]).loss
            branch = TrainingModel(model)([a_sample([ids], [[2, 4]], (some_ids(4), 1))]).loss
            both = TrainingModel(model)([a_sample([ids], [[2, 4]], (some_ids(4), 1), label_text=True)]).loss
        close(both, (15 * text + 3 * branch) / 18)

    def test_weights_are_factors(self) -> None:
        model = a_model()
        close(loss(model, LONG, label_weight=3.0), 3 * loss(model, LONG))
        mixed = loss(model, LONG, label_weight=2.0, distill_weight=0.5)
        close(mixed, 2 * loss(model, LONG) + 0.5 * loss(model, LONG, label_weight=0.0, distill_weight=1.0))


class TestHybrid:
    """Documents of one window, whose beacons stand behind chosen tokens."""

    WINDOW = a_sample([some_ids(8, seed=1)], [[2]], (some_ids(9, seed=3), 6), (some_ids(4, seed=4), 1))
    SHORT = a_sample([some_ids(5, seed=2)], [[4]], (some_ids(7, seed=6), 2))

    @pytest.mark.parametrize("settings", [{}, {"beacon_sink_size": 0}, {"beacon_placement": "salient-words"}], ids=str)
    @with_and_without_lora
    def test_it_is_that_of_the_stock_model_behind_hybrid_memories(self, settings: dict[str, Any], lora: Any) -> None:
        model = a_model(lora, **settings)
        with torch.no_grad():
            expected = [losses_behind(model, one, "hybrid") for one in (self.WINDOW, self.SHORT)]
            ours = TrainingModel(model, compression="hybrid")([self.WINDOW, self.SHORT])
        close(ours.labels, torch.stack([one.mean() for one in expected]))
        assert abs(float(ours.loss - loss(model, self.WINDOW, self.SHORT))) > 0.01

    def test_gradient_reaches_the_beacons(self) -> None:
        model = a_model(LORA)
        TrainingModel(model.train(), compression="hybrid")([self.WINDOW]).loss.backward()
        gradients = {name: parameter.grad for name, parameter in trained_parameters(model)}
        for kind in ("beacon_k_proj", "beacon_v_proj", ".lora_"):
            assert any(kind in name and gradient is not None and gradient.any() for name, gradient in gradients.items())


class TestSelected:
    """Branches behind what is loaded of selected memories; what learns is the LoRA of answers."""

    PARTS: tuple[tuple[int, ...], ...] = (tuple(some_ids(40, seed=1)), tuple(some_ids(15, seed=2)))

    def sample(self, *loaded: Loaded) -> Sample:
        branches = [Branch(tuple(some_ids(4 + number, seed=3 + number)), 2, one) for number, one in enumerate(loaded)]
        return Sample("qa", self.PARTS, (), tuple(branches))

    def expected(self, model: BeaconModel, sample: Sample, memory: MemoryKV) -> Tensor:
        """The mean cross-entropy of the first branch behind a memory."""
        branch = sample.branches[0]
        cache = MemoryCache([model.prefix(memory)], config=model.base.config)
        logits = model.base(torch.tensor([branch.ids]), past_key_values=cache).logits[0]
        return cross_entropy(logits[branch.labelled - 1 : -1], torch.tensor(branch.ids[branch.labelled :]))

    @pytest.mark.parametrize("ratio", [0, 2, 4, 8])
    def test_it_is_that_of_the_stock_model_behind_the_documents_as_they_are_stored(self, ratio: int) -> None:
        model = with_answers(a_model(beacon_window=64))
        compressor = BeaconCompressor(model)
        works = [Work(ids, compressor.ratios(len(ids), ratio, "select")) for ids in self.PARTS]
        parts = [compressor.compress_one(work, compression="select").kv for work in works]
        memory = MemoryKV.concat([MemoryKV.of(compressor.sink), *parts])
        sample = self.sample(Loaded(ratio))
        with torch.no_grad():
            ours = TrainingModel(model, compression="select")([sample])
            close(ours.loss, self.expected(model, sample, memory))

    def test_each_branch_follows_what_it_has_loaded(self) -> None:
        model = with_answers(a_model())
        every = [Loaded(0), Loaded(8), Loaded(4, "what"), Loaded(8)]
        together = self.sample(*every)
        with torch.no_grad():
            ours = TrainingModel(model, compression="select")([together]).loss
            alone = [
                TrainingModel(model, compression="select")([replace(together, branches=(branch,))]).loss
                * (len(branch.ids) - branch.labelled)
                for branch in together.branches
            ]
        labels = sum(len(branch.ids) - branch.labelled for branch in together.branches)
        close(ours, torch.stack(alone).sum() / labels)

    def test_what_is_loaded_for_a_question_is_of_the_passages_that_match_it(self) -> None:
        model = a_model(beacon_window=256)
        tokens = model.tokenizer("a mill by the river " * 4 + "and the red barn " * 4)["input_ids"]
        memory = SelectedMemory(model, Sample("qa", (tuple(tokens),), (), ()))
        assert len(memory.pieces) == 2
        sink = len(model.sink_ids)
        found, blind = memory.prefix(Loaded(8, "Which barn?")), memory.prefix(Loaded(8))
        assert (found.span - sink, blind.span - sink) == (len(memory.pieces[1]), len(tokens))
        assert found.slots <= blind.slots

    def test_only_the_lora_of_answers_gets_a_gradient(self) -> None:
        model = with_answers(a_model())
        model.requires_grad_(False)
        for _, parameter in trained_parameters(model):
            parameter.requires_grad_(True)
        TrainingModel(model.train(), compression="select")([self.sample(Loaded(0), Loaded(4))]).loss.backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient
        assert all(name.endswith((".up", ".down")) for name in with_gradient)

    def test_the_teacher_sees_everything(self) -> None:
        model = with_answers(a_model())
        whole, part = self.sample(Loaded(0)), self.sample(Loaded(8))
        with torch.no_grad():
            distilled = [
                TrainingModel(model, 0.0, 1.0, compression="select")([sample]).loss for sample in (whole, part)
            ]
        assert abs(float(distilled[0])) < 1e-6
        assert float(distilled[1]) > 1e-3


class TestDistillation:
    @with_and_without_lora
    def test_it_is_the_divergence_from_the_stock_model_reading_the_full_text(self, lora: Any) -> None:
        model = a_model(lora)
        with torch.no_grad():
            expected = divergence(model, LONG).mean()
        assert float(expected) > 0.01
        close(loss(model, LONG, label_weight=0.0, distill_weight=1.0), expected)

    def test_parts_are_read_as_one_text(self) -> None:
        model = a_model()
        with torch.no_grad():
            expected = divergence(model, COMPOSED).mean()
        close(loss(model, COMPOSED, label_weight=0.0, distill_weight=1.0), expected)

    @pytest.mark.parametrize("sink", [0, 1])
    def test_there_is_none_where_nothing_is_compressed(self, sink: int) -> None:
        model = a_model(beacon_sink_size=sink)
        raw = a_sample([[BOS, *some_ids(18)]], [[0, 0, 0]], (some_ids(9), 3))
        assert float(loss(model, raw, label_weight=0.0, distill_weight=1.0)) == pytest.approx(0, abs=1e-6)

    def test_it_may_be_on_all_text(self) -> None:
        model = a_model()
        text = a_sample([some_ids(19)], [[2, 4, 2]], (some_ids(9), 1), label_text=True)
        assert float(loss(model, text, label_weight=0.0, distill_weight=1.0)) > 0.01

    def test_the_full_reading_is_not_trained(self) -> None:
        model = a_model(LORA)
        raw = a_sample([some_ids(18)], [[0, 0, 0]], (some_ids(9), 3))
        TrainingModel(model, label_weight=0.0, distill_weight=1.0)([raw]).loss.backward()
        gradients = [p.grad for _, p in trained_parameters(model) if p.grad is not None]
        assert gradients
        assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients)


class TestGradient:
    def backward(self, model: BeaconModel, *samples: Sample, **weights: float) -> dict[str, Tensor | None]:
        TrainingModel(model.train(), **weights)(samples).loss.backward()
        return {name: parameter.grad for name, parameter in trained_parameters(model)}

    def test_it_reaches_beacons_and_lora_and_nothing_else(self) -> None:
        model = a_model(LORA)
        gradients = self.backward(model, COMPOSED)
        assert sum(".lora_" in name for name in gradients) == 2 * 3 * 3
        for name, gradient in gradients.items():
            unused = "layers.2" in name and "beacon_q" in name  # the last layer's beacons are asked by no row for more
            assert unused or (gradient is not None and bool(gradient.any())), name
        trained = {id(parameter) for _, parameter in trained_parameters(model)}
        assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained

    def test_a_sample_without_beacons_trains_nothing_and_does_not_fail(self) -> None:
        model = a_model()
        raw = a_sample([some_ids(18)], [[0, 0, 0]], (some_ids(9), 3))
        short = a_sample([some_ids(5)], [[2]], label_text=True)
        for one in (raw, short):
            assert not any(gradient is not None and gradient.any() for gradient in self.backward(model, one).values())

    @every_method
    def test_checkpointing_does_not_change_it(self, settings: dict[str, Any]) -> None:
        gradients, calls = [], []
        for checkpointing in (False, True):
            model = a_model(LORA, **settings)
            if checkpointing:
                model.base.activation_checkpointing_enable({"use_reentrant": False})
            model.base.model.layers[1].mlp.register_forward_pre_hook(
                lambda *_, again=checkpointing: calls.append(again)
            )
            gradients.append(self.backward(model, COMPOSED, ALONE))
        assert calls == [False, True, True]
        for name, gradient in gradients[0].items():
            if gradient is not None:
                close(gradients[1][name], gradient)  # type: ignore[arg-type]
