from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_memory.documents import (
    Label,
    Precision,
    PrecisionRule,
    Text,
    check_id,
    choose_precision,
    content_hash,
    utc_now,
)
from beacon_memory.errors import BeaconMemoryError, DocumentNotFoundError, InputError, MissingDependencyError


@pytest.mark.parametrize("kind", [BeaconMemoryError, InputError, DocumentNotFoundError, MissingDependencyError])
def test_a_message_that_quotes_too_much_is_cut(kind: type[BeaconMemoryError]) -> None:
    assert str(kind("no room; remove something")) == "no room; remove something"
    message = str(kind(f"no document {'x' * 10**6!r} is stored; list() shows the ids there are"))
    assert len(message) < 2000
    assert message.startswith("no document 'xxx")
    assert message.endswith("xxx' is stored; list() shows the ids there are")


def test_metadata_are_copied() -> None:
    given = {"tags": ["a"], "pair": (1, 2), "odd": "\ud800", "\udc00": None}
    copy = Label(given).metadata
    given["tags"].append("b")  # type: ignore[union-attr]  # a list
    assert copy == {"tags": ["a"], "pair": [1, 2], "odd": "\ud800", "\udc00": None}


def _loop() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["again"] = loop
    return loop


def _nested(levels: int) -> dict[str, object]:
    value: object = 1
    for level in range(levels - 1):
        value = [value] if level % 2 else {"a": value}
    return {"a": value}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {"b": [1, {2}]}}, r"metadata\['a'\]\['b'\]\[1\] is \{2\} of type set"),
        ({1: "a"}, "the key 1 of type int"),
        ({"a": {None: 1}}, r"metadata\['a'\] has the key None"),
        ({"a": float("nan")}, "is nan of type float"),
        ({"a": b"x"}, "is b'x' of type bytes"),
        ({"a": 10**5000}, "cannot be written as JSON"),
        ([("a", 1)], "must be a dict"),
        ("text", "must be a dict"),
        (_loop(), "contains itself"),
        (_nested(101), "nested more than 100 levels deep"),
        (_nested(100_000), "nested more than 100 levels deep"),
        ({str(n): n for n in range(10_001)}, "10,001 keys, and 10,000 are the most"),
    ],
)
def test_metadata_that_json_cannot_hold_are_refused(metadata: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Label(metadata)


def test_metadata_of_any_depth_that_is_allowed_can_be_copied() -> None:
    label = Label(_nested(100))
    assert asdict(deepcopy(label))["metadata"] == _nested(100)


def test_tags_are_sorted_and_kept_once() -> None:
    assert Label(tags=["b", "a", "b"]).tags == ("a", "b")
    assert Label(tags={"b", "a"}) == Label(tags=("a", "b"))


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("abc", r"the one text 'abc'; write \['abc'\]"),
        ([""], "not empty, got ''"),
        ([1], "got 1"),
        ([None], "got None"),
        (["\ud800"], "a tag holds the lone surrogate"),
        (None, "tags must be several texts, got None"),
        (7, "tags must be several texts, got 7"),
        (map(str, itertools.count()), "a document can have 10,000 tags, got more"),
    ],
)
def test_what_are_no_tags_is_refused(tags: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Label(tags=tags)


@pytest.mark.parametrize("pinned", [1, None, "yes"])
def test_a_pin_is_true_or_false(pinned: Any) -> None:
    with pytest.raises(InputError, match="pinned must be true or false, got"):
        Label(pinned=pinned)


@pytest.mark.parametrize(
    ("time", "kept"),
    [
        (None, None),
        ("2031-05-03T00:00:00Z", "2031-05-03T00:00:00.000+00:00"),
        ("2031-05-03T00:00:00.1234567+02:00", "2031-05-02T22:00:00.123+00:00"),
        ("2031-05-03T00:00:00-11:30", "2031-05-03T11:30:00.000+00:00"),
        ("0999-01-01T00:00:00+00:00", "0999-01-01T00:00:00.000+00:00"),
    ],
)
def test_a_time_is_kept_in_utc_to_the_millisecond(time: str | None, kept: str | None) -> None:
    assert Label(expires_at=time).expires_at == kept


@pytest.mark.parametrize("time", ["", "tomorrow", "2031-05-03", "2031-05-03T00:00:00", 5, "9999-12-31T23:59:59-12:00"])
def test_what_is_no_moment_is_refused(time: Any) -> None:
    with pytest.raises(InputError, match="a time must be ISO 8601 with an offset"):
        Label(expires_at=time)


@given(st.lists(st.datetimes(timezones=st.timezones()), min_size=2, max_size=2))
def test_later_times_sort_behind_earlier_ones(times: list[Any]) -> None:
    try:
        first, second = (Label(expires_at=time.isoformat()).expires_at for time in times)
    except InputError:  # an offset with seconds, or a time that UTC has no year for
        return
    assert first is not None
    assert second is not None
    if abs((times[0] - times[1]).total_seconds()) >= 0.001:
        assert (first < second) == (times[0] < times[1])


def test_now_is_a_time_that_can_be_kept() -> None:
    before = utc_now()
    assert Label(expires_at=before).expires_at == before <= utc_now()


@given(st.text(min_size=1))
def test_any_text_is_an_id(id: str) -> None:
    assert check_id(id) == id


@pytest.mark.parametrize(
    ("id", "message"), [("", "empty"), ("a\udc80", "surrogate"), (7, "must be a str"), (b"a", "str")]
)
def test_what_is_no_id_is_refused(id: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_id(id)


def test_a_text_without_utf8_form_has_no_hash() -> None:
    assert content_hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(InputError, match="surrogate '\\\\ud800' at character 3"):
        content_hash("abc\ud800")
    with pytest.raises(InputError, match="decode bytes first"):
        content_hash(b"abc")  # type: ignore[arg-type]  # wrong on purpose


def test_a_precision_knows_its_bits_and_takes_no_more_than_the_one_before() -> None:
    assert [(one.value, one.bits) for one in Precision] == [
        ("float32", 32),
        ("bfloat16", 16),
        ("float16", 16),
        ("int8", 8),
        ("int4", 4),
    ]
    assert [one for one in Precision if one.quantized] == [Precision.INT8, Precision.INT4]


@pytest.mark.parametrize("precision", Precision)
def test_a_precision_is_found_by_its_name(precision: Precision) -> None:
    assert Precision(precision.value) is Precision(precision) is choose_precision(precision.value) is precision


@pytest.mark.parametrize("rule", PrecisionRule)
def test_a_rule_can_be_chosen_in_place_of_a_precision(rule: PrecisionRule) -> None:
    assert choose_precision(rule.value) is rule


@pytest.mark.parametrize("precision", ["int2", "", None, "Float32"])
def test_another_precision_is_refused(precision: Any) -> None:
    for choose in (Precision, choose_precision):
        with pytest.raises(InputError, match="must be one of float32, bfloat16, float16, int8, int4"):
            choose(precision)


def test_a_label_is_changed_in_what_is_given() -> None:
    label = Label({"a": 1}, ["x"], True, "2031-05-03T00:00:00+00:00")
    assert label.changed() == label
    assert label.changed(expires_at=None) == Label({"a": 1}, ["x"], True)
    assert label.changed({"b": 2}, ["y"], False) == Label({"b": 2}, ["y"], False, "2031-05-03T00:00:00+00:00")
    with pytest.raises(InputError, match="pinned must be true or false, got None"):
        label.changed(pinned=None)  # type: ignore[arg-type]  # wrong on purpose


def test_text_carries_its_hash() -> None:
    text = Text("Über den Dächern")
    assert (text.value, text.sha256) == ("Über den Dächern", content_hash("Über den Dächern"))
    assert Text.of(text) is text
    assert Text.of("Über den Dächern") == text
    with pytest.raises(InputError, match="lone surrogate"):
        Text("abc\ud800")
    with pytest.raises(InputError, match="must be a str, got bytes"):
        Text(b"abc")  # type: ignore[arg-type]  # wrong on purpose
