from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BOS, EOS
from training_samples import LORA, QA, TEXT, TEXTS, a_model, a_recipe, a_stage, question_rows, write_rows

from beacon_memory.errors import ConfigError, InputError
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training import DataSource, Stage
from beacon_memory.training.samples import Sample, SampleSet


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return a_model()


def samples(model: BeaconModel, data: Path, stage: Stage, count: int = 40, **recipe: Any) -> list[Sample]:
    return list(islice(SampleSet(model, a_recipe(None, stage, **recipe), stage, data, count), count))


def text_of(model: BeaconModel, *ids: int) -> str:
    text: str = model.tokenizer.decode(list(ids))
    return text


class TestDraws:
    def test_its_number_decides_a_sample(self, model: BeaconModel, data: Path) -> None:
        stage = a_stage(parts=(1, 2), ratios=(2, 4, 0))
        drawn = SampleSet(model, a_recipe(), stage, data, 40)
        again = SampleSet(model, a_recipe(), stage, data, 99)
        assert [drawn[i] for i in (3, 0, 17)] == [again[i] for i in (3, 0, 17)]
        assert drawn[3] == drawn[3]
        assert len({drawn[i] for i in range(40)}) > 30

    def test_so_do_the_seed_and_the_name_of_the_stage(self, model: BeaconModel, data: Path) -> None:
        first = samples(model, data, a_stage())
        assert first == samples(model, data, a_stage(steps=9, learning_rate=1.0))
        assert first != samples(model, data, a_stage(name="second"))
        assert first != samples(model, data, a_stage(), seed=1)

    def test_sources_are_drawn_by_weight(self, model: BeaconModel, data: Path) -> None:
        often = DataSource(path="qa.jsonl", kind="qa", weight=9)
        kinds = [sample.kind for sample in samples(model, data, a_stage(data=(TEXT, often)), 200)]
        assert 5 < kinds.count("text") < 40

    def test_each_window_has_a_ratio_of_its_own_or_the_document_has_one(self, model: BeaconModel, data: Path) -> None:
        for one in samples(model, data, a_stage(ratios=(2, 4, 0))):
            assert [len(ratios) for ratios in one.ratios] == [-(-len(part) // 8) for part in one.parts]
        drawn = samples(model, data, a_stage(ratios=(2, 4, 0), ratio_per="document", parts=(2,)))
        assert {sample.ratio for sample in drawn} == {2, 4, 0}
        assert any(one.ratio is None for one in samples(model, data, a_stage(ratios=(2, 4, 0))))

    def test_ratios_are_those_of_the_adapter_unless_the_stage_has_some(self, model: BeaconModel, data: Path) -> None:
        found = {ratio for one in samples(model, data, a_stage()) for part in one.ratios for ratio in part}
        assert found == {2, 4}

    def test_a_document_begins_with_bos_unless_there_is_a_sink(self, model: BeaconModel, data: Path) -> None:
        stage = a_stage(parts=(2,))
        assert not any(part[0] == BOS for one in samples(model, data, stage) for part in one.parts)
        without = samples(a_model(beacon_sink_size=0), data, stage)
        assert all(part[0] == BOS for one in without for part in one.parts)


class TestTexts:
    def test_what_follows_a_stretch_is_predicted(self, model: BeaconModel, data: Path) -> None:
        for one in samples(model, data, a_stage(data=(TEXT,))):
            (part,), (branch,) = one.parts, one.branches
            assert any(text_of(model, *part, *branch.ids) in text for text in TEXTS)
            assert (one.kind, len(branch.ids), branch.labelled) == ("text", 8, 1)
            assert 12 <= len(part) <= 40

    def test_a_stretch_begins_with_a_word(self, model: BeaconModel, data: Path) -> None:
        for one in samples(model, data, a_stage(data=(TEXT,), tokens=(4, 6), continuation=2)):
            assert any(f" {text_of(model, *one.parts[0])}" in f" {text}" for text in TEXTS)

    def test_parts_follow_each_other(self, model: BeaconModel, data: Path) -> None:
        drawn = samples(model, data, a_stage(data=(TEXT,), parts=(1, 3)))
        assert {len(one.parts) for one in drawn} == {1, 3}
        for one in drawn:
            joined = text_of(model, *(id for part in one.parts for id in part))
            assert any(joined in text for text in TEXTS)

    def test_all_of_a_text_may_be_labelled(self, model: BeaconModel, data: Path) -> None:
        for one in samples(model, data, a_stage(data=(TEXT,), label_text=True, continuation=0)):
            assert (one.label_text, one.branches) == (True, ())
            assert 12 <= len(one.parts[0]) <= 40

    @pytest.mark.parametrize("how", [{"continuation": 2}, {"continuation": 0, "label_text": True}])
    def test_every_sample_predicts_something(self, model: BeaconModel, data: Path, how: dict[str, Any]) -> None:
        write_rows(data / "text.jsonl", [{"text": "x" * 90 + " "}, {"text": "ab c"}])  # no word begins in the first
        for one in samples(model, data, a_stage(data=(TEXT,), tokens=(2, 3), **how), 200):
            labels = sum(len(part) - 1 for part in one.parts) if one.label_text else 0
            assert labels + sum(len(branch.ids) - branch.labelled for branch in one.branches) > 0

    def test_a_file_of_texts_that_are_too_short_is_refused(self, model: BeaconModel, data: Path) -> None:
        with pytest.raises(InputError, match=r"text\.jsonl: no text is as long as the 308 tokens.*stage 'first'"):
            samples(model, data, a_stage(tokens=(300, 400)))


class TestQuestions:
    def test_answers_are_predicted_from_passages_of_one_title(self, model: BeaconModel, data: Path) -> None:
        rows = question_rows()
        for sample in samples(model, data, a_stage(data=(QA,), tokens=(40, 80), branches=2)):
            text = text_of(model, *(id for part in sample.parts for id in part))
            (title,) = {row["title"] for row in rows if row["context"] in text}
            assert all(row["title"] == title for row in rows if row["context"] in text)
            assert 1 <= len(sample.branches) <= 2
            for branch in sample.branches:
                prompt, answer = branch.ids[: branch.labelled], branch.ids[branch.labelled :]
                asked = [pair for row in rows if row["context"] in text for pair in row["qa"]]
                same = [one for one in asked if chat_prompt(model, one["question"], behind_memory=True) == list(prompt)]
                assert answer[-1] == EOS
                assert any(text_of(model, *answer[:-1]) in one["answers"] for one in same)

    def test_what_they_follow_is_drawn_for_each_or_shared(self, data: Path) -> None:
        stage = a_stage(data=(QA,), tokens=(40, 80), branches=6, compression="select", ratios=(0, 4, 8), zoomed=0.5)
        drawn = samples(a_model(), data, stage, answers=LORA)
        loaded = [[branch.loaded for branch in sample.branches if branch.loaded is not None] for sample in drawn]
        assert all(len(one) == len(sample.branches) for one, sample in zip(loaded, drawn, strict=True))
        assert all(len({each.ratio for each in one if not each.question}) <= 2 for one in loaded)
        asked = [each for one in loaded for each in one if each.question]
        assert {each.ratio for each in asked} == {4, 8}
        assert 0.3 < len(asked) / sum(map(len, loaded)) < 0.7
        assert {each.question for each in asked} <= {pair["question"] for row in question_rows() for pair in row["qa"]}

    def test_passages_are_cut_where_one_begins(self, model: BeaconModel, data: Path) -> None:
        drawn = samples(model, data, a_stage(data=(QA,), tokens=(100, 120), parts=(2,)))
        assert {len(one.parts) for one in drawn} == {2}
        assert all(text_of(model, *one.parts[1]).startswith("\nBarn") for one in drawn)

    def test_a_passage_shorter_than_a_unit_is_a_document(self, model: BeaconModel, data: Path) -> None:
        write_rows(data / "qa.jsonl", [{"context": "A.", "question": "What?", "answers": ["A"]}])
        (one,) = samples(model, data, a_stage(data=(QA,), ratios=(32,)), 1)
        assert (one.ratios, len(one.parts[0])) == (((32,),), 2)

    def test_rows_must_be_found(self, model: BeaconModel, data: Path) -> None:
        source = DataSource(path="qa.jsonl", kind="qa", where={"title": "no title"})
        with pytest.raises(InputError, match=r"qa\.jsonl: there are no rows with {'title': 'no title'}"):
            samples(model, data, a_stage(data=(source,)))

    def test_a_tokenizer_without_what_questions_need_is_refused(self, data: Path) -> None:
        model = a_model()
        model.tokenizer.eos_token = None
        with pytest.raises(InputError, match="no eos token"):
            samples(model, data, a_stage())
        model.tokenizer.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            samples(model, data, a_stage())


def test_documents_of_hybrid_memories_must_fit_a_window(model: BeaconModel, data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tokens=\[4, 9\] of stage 'first' must fit beacon_window=8: hybrid memories"
    ):
        samples(model, data, a_stage(compression="hybrid", tokens=(4, 9)))
    drawn = samples(model, data, a_stage(compression="hybrid", tokens=(4, 8)))
    assert max(len(part) for one in drawn for part in one.parts) <= 8
