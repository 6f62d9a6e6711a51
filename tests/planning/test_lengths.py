from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from beacon_memory.errors import InputError
from beacon_memory.planning.lengths import by_characters, by_tokenizer, evenly, made_up, planned, read_rows, shares


def test_documents_are_shared_out_by_weights_and_none_is_lost() -> None:
    assert shares("1000:6,4000:3,16000:1", 1000) == [(1000, 600), (4000, 300), (16000, 100)]
    assert shares("10,20,30", 100) == [(10, 33), (20, 34), (30, 33)]
    assert shares("10:1,20:1000", 3) == [(20, 3)]
    assert evenly(7, 2) == [4, 3]


def test_a_text_is_measured_with_its_passages() -> None:
    text = "The mill has two wheels. " * 40
    found = planned("mill", text, by_characters(4))
    assert found.tokens == len(text) / 4
    assert found.offsets[-1][1] == found.text_bytes == len(text)
    assert found.breaks[0] == 0
    assert len(found.breaks) > 1
    with pytest.raises(InputError, match="'none' is empty"):
        planned("none", "", by_characters(4))


def test_a_made_up_text_has_the_tokens_that_it_shall_have() -> None:
    assert made_up(4000).tokens == 4000
    assert made_up(4000).text_bytes == 16000


def test_rows_of_json_lines_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps(row) for row in ({"id": "a", "text": "one"}, {"text": "two"}))
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    assert [*read_rows(tmp_path / "a.jsonl")] == [("a", "one"), ("a.jsonl:2", "two")]
    assert [text for _, text in read_rows(tmp_path / "a.jsonl.gz")] == ["one", "two"]
    (tmp_path / "bad.jsonl").write_text('{"text": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 of .* must be an object with a text"):
        [*read_rows(tmp_path / "bad.jsonl")]


@pytest.mark.slow
def test_tokens_are_counted_as_the_embedded_model_reads_them() -> None:
    from beacon_memory.compression.compressor import BeaconCompressor
    from beacon_memory.modeling.model import BeaconModel
    from beacon_memory.planning.models import planned_model

    text = Path(__file__).read_text(encoding="utf-8") + " naïve 🦉 <|im_start|>user\nhello<|im_end|>"
    compressor = BeaconCompressor(BeaconModel.from_pretrained())
    file = planned_model(None).tokenizer
    assert file is not None
    there = compressor.tokenize(text)
    counted = by_tokenizer(file)(text)
    assert (list(counted.ids), list(counted.offsets)) == (there.ids, there.offsets)
