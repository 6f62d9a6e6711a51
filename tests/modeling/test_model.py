from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from stock_behind import eager, stock_reading
from tiny_models import (
    BOS,
    FAMILIES,
    MODELS,
    VOCAB,
    reference_read,
    some_ids,
    tiny_base,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    train,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.documents import Text, content_hash
from beacon_memory.errors import AdapterError, ConfigError, InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import read_kv_file, stage_kv_file

# how documents are read before they are composed: ours, the paper's, and beacons after words
COMPOSED: list[dict[str, Any]] = [
    {},
    {"beacon_attn": "full-coverage", "beacon_embed": "learned", "beacon_sink_size": 0},
    {"beacon_placement": "salient-words"},
]

every_raw_memory = pytest.mark.parametrize("compression", ["beacon", "select"])
every_family = pytest.mark.parametrize("family", FAMILIES)
every_model = pytest.mark.parametrize("name", MODELS)


def config(window: int = 8, **settings: Any) -> BeaconConfig:
    return BeaconConfig(beacon_window=window, beacon_ratio=(2, 4), **settings)


def stock_and_ours(name: str, beacon_config: BeaconConfig) -> tuple[Any, BeaconModel]:
    """A stock model, and one with the same weights that carries beacons."""
    family, overrides = MODELS[name]
    tokenizer = tiny_tokenizer()
    return tiny_base(family, **overrides), tiny_model(family, beacon_config, tokenizer=tokenizer, **overrides)


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def answer(model: BeaconModel, memory: MemoryKV, question: list[int]) -> Tensor:
    """Logits [1, tokens, vocab] of a question that the base reads behind a memory."""
    logits: Tensor = model.base(torch.tensor([question]), past_key_values=MemoryCache([model.prefix(memory)])).logits
    return logits


def padded() -> dict[str, Tensor]:
    """Two prompts of different lengths, padded on the left."""
    rows = [some_ids(9, seed=1), [0] * 4 + some_ids(5, seed=2)]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    }


class TestStockModel:
    """The base behaves as the stock model if a call uses no beacons, although they are installed."""

    @every_model
    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    def test_a_single_window_without_beacons_has_the_stock_logits(self, name: str, attn: str) -> None:
        stock, ours = stock_and_ours(name, config(16, beacon_attn=attn))
        ids = torch.tensor([some_ids(16, seed=1), some_ids(16, seed=2)])
        close(ours(ids).logits, stock(ids).logits)

    @every_model
    def test_logits_are_those_of_sdpa(self, name: str) -> None:
        stock, ours = stock_and_ours(name, config())
        assert stock.config._attn_implementation == "sdpa"
        ids = torch.tensor([some_ids(20)])
        assert torch.equal(ours.base(ids).logits, stock(ids).logits)
        real = padded()["attention_mask"].bool()
        assert torch.equal(ours.base(**padded()).logits[real], stock(**padded()).logits[real])

    @every_model
    @pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
    def test_generate_is_that_of_sdpa(self, name: str, how: dict[str, Any]) -> None:
        stock, ours = stock_and_ours(name, config())
        texts, models = [], (stock, ours.base)
        model: Any
        for model in models:
            torch.manual_seed(0)
            texts.append(model.generate(**padded(), max_new_tokens=12, pad_token_id=0, **how).tolist())
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("compression", list(BUILT_IN))
    def test_a_pass_that_fails_leaves_it_as_it_was(self, compression: str) -> None:
        stock, ours = stock_and_ours("llama", config())

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = ours.base.model.layers[1].self_attn.o_proj.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            BeaconCompressor(ours).compress_one(Work(some_ids(8), [2]), compression=compression)
        hook.remove()
        ids = torch.tensor([some_ids(20)])
        assert torch.equal(ours.base(ids).logits, stock(ids).logits)

    @pytest.mark.parametrize("compression", ["beacon", "hybrid"])
    def test_threads_that_compress_do_not_disturb_it(self, compression: str) -> None:
        stock, ours = stock_and_ours("llama", config())
        ids, documents = torch.tensor([some_ids(20)]), [Work(some_ids(30, seed=n), [2, 4, 4, 2]) for n in range(30)]
        with torch.no_grad():
            expected = stock(ids).logits
        alone = [one for _, one in BeaconCompressor(ours).compress(enumerate(documents), compression=compression)]
        compressed: list[Any] = []

        def work() -> None:
            compressor = BeaconCompressor(ours, rows_per_pass=8)
            compressed.extend(one for _, one in compressor.compress(enumerate(documents), compression=compression))

        worker = Thread(target=work)
        worker.start()
        same, rounds = True, 0
        with torch.no_grad():
            while worker.is_alive() or rounds == 0:
                same &= torch.equal(ours.base(ids).logits, expected)
                rounds += 1
        worker.join()
        assert same
        assert len(compressed) == len(alone)
        for ours_then, ours_alone in zip(compressed, alone, strict=True):
            close(ours_then.kv.keys, ours_alone.kv.keys)


class TestRawMemory:
    """Ratio 0 keeps the K/V of raw tokens, so behind them the stock model must answer as behind the tokens."""

    def stored(self, model: BeaconModel, ids: list[int], folder: Path, compression: str) -> MemoryKV:
        """K/V of the tokens, once through a file."""
        document = BeaconCompressor(model).compress_one(Work(ids, [0]), compression=compression)
        text = "the text that the tokens are of"
        spans = (WindowSpan(len(ids), 0, 0, len(text), document.kv.span),)
        header = DocumentHeader(
            "a", content_hash(text), len(ids), spans, tuple(ids), compression, document.kv.span, model.fingerprint
        )
        read = read_kv_file(stage_kv_file(folder, header, document.kv, Text(text)).path)
        assert read.header.fingerprint == model.fingerprint
        return read.memory()

    @every_model
    @every_raw_memory
    def test_behind_the_sink_it_is_the_text_itself(self, name: str, compression: str, tmp_path: Path) -> None:
        stock, ours = stock_and_ours(name, config(16))
        document, question = some_ids(11, seed=1), some_ids(5, seed=2)
        sink = MemoryKV.of(BeaconCompressor(ours).sink)
        memory = MemoryKV.concat([sink, self.stored(ours, document, tmp_path, compression)])
        expected = stock(torch.tensor([[BOS, *document, *question]])).logits[:, -5:]
        close(answer(ours, memory, question), expected)

    @every_model
    @every_raw_memory
    def test_behind_another_memory_it_stands_at_later_positions(
        self, name: str, compression: str, tmp_path: Path
    ) -> None:
        stock, ours = stock_and_ours(name, config(16, beacon_sink_size=0))
        first, second, question = some_ids(11, seed=1), some_ids(7, seed=2), some_ids(5, seed=3)
        memory = MemoryKV.concat([self.stored(ours, ids, tmp_path, compression) for ids in (first, second)])
        seen = torch.ones(23, 23).tril()
        seen[11:18, :11] = 0  # the second document does not see the first
        mask = torch.zeros(23, 23).masked_fill(seen == 0, float("-inf"))[None, None]
        expected = stock(torch.tensor([[*first, *second, *question]]), attention_mask=mask).logits[:, -5:]
        close(answer(ours, memory, question), expected)


class TestComposition:
    """Documents compressed in the pass that asks behind them, and several questions at once."""

    DOCUMENTS = ((some_ids(19, seed=1), [2, 4, 0]), (some_ids(6, seed=2), [4]))
    BRANCHES = (some_ids(5, seed=3), some_ids(1, seed=4), some_ids(9, seed=5))

    def in_one_pass(self, model: BeaconModel, branches: Sequence[list[int]]) -> tuple[MemoryKV, list[Tensor]]:
        """The memory behind which the branches stand, and the logits of each."""
        sink = model.sink_ids
        pieces = [Piece(Cursor(), model.cut(Cursor(), sink, iter([0]), tail="close"))] if sink else []
        start, prefix = Cursor(memory=len(sink)), range(len(pieces))
        for ids, ratios in self.DOCUMENTS:
            pieces.append(Piece(start, model.cut(start, ids, iter(ratios), tail="close"), behind=prefix))
        slots = len(sink) + sum(len(window.kept) for piece in pieces[len(sink) :] for window in piece.windows)
        windows = [Window(slots, 0, tuple(ids), (), 0, (), 0, finished=False) for ids in branches]
        pieces.append(Piece(Cursor(memory=slots), windows, behind=range(len(pieces))))
        layout = BeaconLayout.build(pieces, model.config)
        output = model.run(layout, model.empty_kv(), keep=layout.memories[-1])
        lengths = [len(ids) for ids in branches]
        return MemoryKV.of(output.kept), list(model.head(output.hidden[-sum(lengths) :]).split(lengths))

    @every_family
    @pytest.mark.parametrize("settings", COMPOSED, ids=str)
    def test_it_is_the_stock_model_behind_documents_compressed_one_by_one(
        self, family: str, settings: dict[str, Any]
    ) -> None:
        model = tiny_model(family, config(**settings), tokenizer=tiny_tokenizer())
        compressor = BeaconCompressor(model)
        stored = [compressor.compress_one(Work(*one), compression="beacon").kv for one in self.DOCUMENTS]
        expected = MemoryKV.concat([MemoryKV.of(compressor.sink), *stored])
        memory, logits = self.in_one_pass(model, self.BRANCHES)
        close(memory.keys, expected.keys)
        close(memory.values, expected.values)
        for ids, ours in zip(self.BRANCHES, logits, strict=True):
            close(ours, answer(model, expected, ids)[0])

    @pytest.mark.parametrize("settings", COMPOSED, ids=str)
    def test_branches_do_not_see_each_other(self, settings: dict[str, Any]) -> None:
        model = tiny_model("llama", config(**settings), tokenizer=tiny_tokenizer())
        _, together = self.in_one_pass(model, self.BRANCHES)
        for number, ours in enumerate(together):
            close(ours, self.in_one_pass(model, self.BRANCHES[number : number + 1])[1][0])


class TestForward:
    @every_family
    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    @pytest.mark.parametrize("embed", ["last-token", "learned"])
    def test_windows_behind_beacons_have_the_logits_of_the_method(self, family: str, attn: str, embed: str) -> None:
        model = tiny_model(family, config(beacon_attn=attn, beacon_embed=embed, beacon_sink_size=0))
        ids, ratios = some_ids(22), [2, 4, 0]  # the last window is read raw
        logits = model(torch.tensor([ids]), ratios=[iter(ratios[:2])]).logits
        close(logits[0], model.head(reference_read(model, ids, ratios).hidden))

    @every_model
    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    def test_a_raw_window_is_the_stock_model_reading_behind_the_memory(self, name: str, attn: str) -> None:
        _, ours = stock_and_ours(name, config(beacon_attn=attn, beacon_sink_size=0))
        document, question = some_ids(16, seed=1), some_ids(6, seed=2)
        compressed = BeaconCompressor(ours).compress_one(Work(document, [2, 4]), compression="beacon")
        read = ours(torch.tensor([document + question]), ratios=[iter([2, 4])]).logits
        close(read[0, 16:], stock_reading(eager(name), question, compressed.kv).logits)
        close(read[:, 16:], answer(ours, compressed.kv, question))

    @every_family
    def test_rows_of_a_batch_do_not_see_each_other(self, family: str) -> None:
        model = tiny_model(family, config(), tokenizer=None)
        ids = torch.tensor([some_ids(29, seed=1), some_ids(29, seed=2)])
        ratios = [[2, 4, 8], [4, 4, 2]]
        together = model(ids, ratios=[iter(ratio) for ratio in ratios]).logits
        alone = [model(ids[i : i + 1], ratios=[iter(ratios[i])]).logits for i in (0, 1)]
        close(together, torch.cat(alone))

    def test_loss_is_the_mean_over_the_next_tokens_that_have_a_label(self) -> None:
        model = tiny_model("llama", config())
        ids = torch.tensor([some_ids(20, seed=1), some_ids(20, seed=2)])
        labels = ids.clone()
        labels[0, :15] = labels[1, 7] = -100
        output = model(ids, labels=labels)
        predicted = [(output.logits[row, at - 1], labels[row, at]) for row in (0, 1) for at in range(1, 20)]
        losses = [cross_entropy(logits, label) for logits, label in predicted if label != -100]
        assert len(losses) == 5 + 18
        close(output.loss, torch.stack(losses).mean(), atol=1e-5)

    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_gradient(self, attn: str, reentrant: bool) -> None:
        ids = torch.tensor([some_ids(40)])
        gradients: list[dict[str, Any]] = []
        calls: list[bool] = []
        for checkpointing in (False, True):
            model = tiny_model("llama", config(beacon_attn=attn, beacon_param=("q", "k", "v", "o"))).train()
            if checkpointing:
                model.base.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.base.model.layers[0].mlp.register_forward_pre_hook(
                lambda *_, again=checkpointing: calls.append(again)
            )
            loss = model(ids, labels=ids, ratios=[iter([2, 4, 2, 4])]).loss
            loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_beacon_parameters()})
        assert calls == [False, True, True]
        for name, gradient in gradients[0].items():
            close(gradients[1][name], gradient, atol=1e-6)
        assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > 4

    def test_only_the_beacons_are_trained(self) -> None:
        model = tiny_model("qwen2", config()).train()
        ids = torch.tensor([some_ids(30)])
        model(ids, labels=ids).loss.backward()
        trained = {id(parameter) for _, parameter in model.named_beacon_parameters()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == trained
        assert {id(p) for p in model.parameters() if p.grad is not None} <= trained


class TestUntrained:
    @every_family
    def test_a_beacon_begins_as_the_token_before_it(self, family: str) -> None:
        model = tiny_model(family, config(), trained=False)
        ids = some_ids(16)
        compressor = BeaconCompressor(model)
        beacons, raw = (compressor.compress_one(Work(ids, [r, r]), compression="beacon").kv for r in (4, 0))
        for of_beacons, of_tokens in zip(beacons.layer(0), raw.layer(0), strict=True):
            close(of_beacons[0], of_tokens[0][3::4])
            close(of_beacons[1], of_tokens[1][3::4])

    @pytest.mark.parametrize(("init", "eos", "token"), [("eos", 2, 2), ("eos", [9, 2], 9), ("bos", 2, BOS)])
    def test_a_learned_vector_begins_as_the_eos_or_bos(self, init: str, eos: Any, token: int) -> None:
        settings = config(beacon_embed="learned", beacon_embed_init=init)
        model = tiny_model("llama", settings, trained=False, eos_token_id=eos)
        embedding: Any = model.base.get_input_embeddings()
        assert torch.equal(model.beacon_embed, embedding.weight[token])

    @pytest.mark.parametrize(
        ("placement", "given", "lacks"),
        [
            ("salient", (), "token_salience"),
            ("salient-words", (), "token_salience"),
            ("salient-words", ("token_starts_word",), "token_salience"),
            ("salient-words", ("token_salience",), "token_starts_word"),
        ],
    )
    def test_salient_placement_needs_something_of_each_token(
        self, placement: str, given: tuple[str, ...], lacks: str
    ) -> None:
        of_tokens = {name: torch.ones(VOCAB) for name in given}
        with pytest.raises(ConfigError, match=f"beacon_placement='{placement}' needs {lacks}"):
            BeaconModel(tiny_base("llama"), config(beacon_placement=placement), **of_tokens)

    @pytest.mark.parametrize("name", ["token_salience", "token_starts_word"])
    def test_what_is_given_of_tokens_is_given_of_all(self, name: str) -> None:
        of_tokens = {one: torch.ones(VOCAB) for one in ("token_salience", "token_starts_word")} | {name: torch.ones(7)}
        with pytest.raises(AdapterError, match=rf"{name} has 7 entries.*{VOCAB}"):
            BeaconModel(tiny_base("llama"), config(beacon_placement="salient-words"), **of_tokens)

    def test_text_cannot_be_read_without_a_tokenizer(self) -> None:
        with pytest.raises(InputError, match="tokenizer"):
            _ = tiny_model("llama", config()).tokenizer


class TestCompression:
    """The compression of a text that is added without one."""

    def test_untrained_beacons_leave_it_to_chosen_tokens(self) -> None:
        assert tiny_model("llama", config(), trained=False).compression == "select"

    @pytest.mark.parametrize("compression", ["auto", *BUILT_IN])
    @pytest.mark.parametrize("adapter", [False, True])
    def test_an_adapter_brings_beacons_unless_its_settings_say_otherwise(
        self, compression: str, adapter: bool, tmp_path: Path
    ) -> None:
        settings = config(beacon_compression=compression)
        base, folder = tiny_checkpoint(tmp_path / "base", tiny_base("llama")), tmp_path / "adapter"
        train(BeaconModel.from_pretrained(base, config=settings)).save_adapter(folder)
        how: dict[str, Any] = {"adapter": folder} if adapter else {"config": settings}
        model = BeaconModel.from_pretrained(base, **how)
        of_auto = "beacon" if adapter else "select"
        assert model.compression == (of_auto if compression == "auto" else compression)
        assert BeaconCompressor(model).compression("auto") == model.compression

    def test_an_adapter_that_is_loaded_later_brings_beacons_too(self, tmp_path: Path) -> None:
        train(tiny_model("llama", config(), tokenizer=tiny_tokenizer())).save_adapter(tmp_path)
        model = tiny_model("llama", config(), trained=False)
        model.load_adapter(tmp_path)
        assert (model.adapter, model.compression) == (str(tmp_path), "beacon")


class TestSalience:
    SALIENCE = (1.0, 2.0, 4.0, 8.0, 0.5)
    STARTS = (True, False, True, False, True)

    def salience(self, placement: str, ids: list[int]) -> list[float]:
        base = tiny_base("llama", vocab_size=5, bos_token_id=1, eos_token_id=2)
        starts = torch.tensor(self.STARTS) if placement == "salient-words" else None
        settings = config(beacon_placement=placement)
        model = BeaconModel(base, settings, token_salience=torch.tensor(self.SALIENCE), token_starts_word=starts)
        return model.salience(ids)

    def test_of_a_token_it_is_the_token_s_own(self) -> None:
        assert self.salience("salient", [3, 0, 1]) == [8.0, 1.0, 2.0]

    def test_of_a_word_it_is_the_sum_over_the_root_of_its_length(self) -> None:
        assert self.salience("salient-words", [0, 4, 1, 2, 3, 3, 2]) == pytest.approx(
            [1.0, *[2.5 / 2**0.5] * 2, *[20 / 3**0.5] * 3, 4.0]
        )
        assert self.salience("salient-words", [0, 2, 0]) == pytest.approx([1.0, 4.0, 1.0])

    def test_a_window_may_begin_inside_a_word(self) -> None:
        assert self.salience("salient-words", [3, 1, 2]) == pytest.approx([10 / 2**0.5] * 2 + [4.0])


@every_family
def test_shapes_of_what_is_kept(family: str) -> None:
    model = tiny_model(family, config())
    stock = tiny_base(family)(torch.tensor([some_ids(3)])).past_key_values
    assert model.kv_shape == (len(stock.layers), *stock.layers[0].keys.shape[1::2])
    assert model.empty_kv().keys.shape == (*model.kv_shape[:2], 0, model.kv_shape[2])
