from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import BeaconMemoryError, ConfigError

PUBLISHED_KEYS = {
    "beacon_window",
    "beacon_stride",
    "beacon_attn",
    "beacon_ratio",
    "beacon_ratio_mix",
    "beacon_param",
    "beacon_embed_init",
    "beacon_sink_size",
    "beacon_attend_prev",
    "beacon_pos",
    "beacon_parallel_window",
}
OWN_KEYS = {
    "beacon_embed",
    "beacon_placement",
    "beacon_compression",
    "beacon_dense_ratio",
    "beacon_hybrid_factor",
}

configs = st.builds(
    BeaconConfig,
    beacon_window=st.integers(32, 4096),
    beacon_ratio=st.lists(st.integers(0, 32), min_size=1, max_size=6).map(tuple),
    beacon_ratio_mix=st.sampled_from(["step-random", "instance-random", "sequence", "adapt-0", "adapt-1024"]),
    beacon_param=st.lists(st.sampled_from("qkvo"), unique=True).map(tuple),
    beacon_attn=st.sampled_from(["hidden", "full-coverage"]),
    beacon_embed=st.sampled_from(["last-token", "learned"]),
    beacon_embed_init=st.sampled_from(["eos", "bos"]),
    beacon_placement=st.sampled_from(["end", "salient", "salient-words"]),
    beacon_sink_size=st.integers(0, 32),
    beacon_compression=st.sampled_from(["auto", *BUILT_IN]),
    beacon_dense_ratio=st.integers(0, 32),
    beacon_hybrid_factor=st.integers(2, 32),
)


@given(config=configs)
def test_settings_survive_a_dict_and_json(config: BeaconConfig) -> None:
    settings = config.to_dict()
    assert BeaconConfig.from_dict(settings) == config
    assert BeaconConfig.from_dict(json.loads(json.dumps(settings))) == config


@given(config=configs)
def test_a_dict_has_the_published_key_names(config: BeaconConfig) -> None:
    assert set(config.to_dict()) == PUBLISHED_KEYS | OWN_KEYS
    assert config.to_dict()["beacon_stride"] == config.beacon_window


def test_absent_keys_mean_what_they_mean_in_published_checkpoints() -> None:
    config = BeaconConfig.from_dict({"model_type": "llama", "hidden_size": 64})
    assert config == BeaconConfig(
        beacon_window=1024,
        beacon_ratio=(2, 4, 8, 16, 32),
        beacon_ratio_mix="step-random",
        beacon_param=(),
        beacon_attn="full-coverage",
        beacon_embed="learned",
        beacon_embed_init="eos",
        beacon_placement="end",
        beacon_sink_size=0,
        beacon_compression="auto",
        beacon_dense_ratio=0,
        beacon_hybrid_factor=4,
    )


def test_new_adapters_start_with_our_settings() -> None:
    config = BeaconConfig()
    assert (config.beacon_attn, config.beacon_embed) == ("hidden", "last-token")
    assert (config.beacon_placement, config.beacon_param, config.beacon_sink_size) == ("end", ("q", "k", "v"), 1)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BeaconConfig().beacon_window = 8  # type: ignore[misc]


def test_keys_of_other_software_are_left_alone() -> None:
    assert BeaconConfig.from_dict({"beacon_window": 64, "beacon_ratio": [4], "window": -1}).beacon_window == 64


@pytest.mark.parametrize(
    ("key", "value"), [("beacon_parallel_window", 1), ("beacon_parallel_window", 3), ("beacon_attend_prev", False)]
)
def test_published_keys_without_effect_are_accepted(key: str, value: object) -> None:
    assert BeaconConfig.from_dict({key: value}) == BeaconConfig.from_dict({})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beacon_window", 0),
        ("beacon_window", -1),
        ("beacon_window", "1024"),
        ("beacon_window", 64.0),
        ("beacon_window", True),
        ("beacon_window", None),
        ("beacon_ratio", []),
        ("beacon_ratio", 4),
        ("beacon_ratio", "4"),
        ("beacon_ratio", None),
        ("beacon_ratio", [2, -1]),
        ("beacon_ratio", [2.5]),
        ("beacon_ratio", ["2"]),
        ("beacon_ratio", [True]),
        ("beacon_ratio_mix", "random"),
        ("beacon_ratio_mix", "adapt-"),
        ("beacon_ratio_mix", "adapt-1k"),
        ("beacon_ratio_mix", None),
        ("beacon_param", "qkv"),
        ("beacon_param", ["q", "x"]),
        ("beacon_param", ["q", "q"]),
        ("beacon_param", ["q_proj"]),
        ("beacon_attn", "segmentation"),
        ("beacon_attn", None),
        ("beacon_embed", "mean"),
        ("beacon_embed_init", "pad"),
        ("beacon_placement", "start"),
        ("beacon_sink_size", -1),
        ("beacon_sink_size", 1.5),
        ("beacon_sink_size", 2048),
        ("beacon_compression", "No method"),
        ("beacon_compression", None),
        ("beacon_hybrid_factor", 1),
        ("beacon_hybrid_factor", 4.0),
        ("beacon_stride", 512),
        ("beacon_stride", "1024"),
        ("beacon_pos", "append"),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        BeaconConfig.from_dict({key: value})
    offending = value[-1] if isinstance(value, list) and value and key == "beacon_ratio" else value
    assert key in str(refused.value)
    assert repr(offending) in str(refused.value) or (offending == [] and "()" in str(refused.value))
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, BeaconMemoryError)


@pytest.mark.parametrize(("key", "value"), [("beacon_attn", []), ("beacon_embed", {}), ("beacon_param", [["q"]])])
def test_a_value_of_a_wrong_json_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        BeaconConfig.from_dict({key: value})


def test_an_unknown_key_is_refused_by_name_and_value() -> None:
    with pytest.raises(ConfigError, match=r"'beacon_windows'.*1024"):
        BeaconConfig.from_dict({"beacon_windows": 1024})


@pytest.mark.parametrize(
    ("window", "ratios", "usable"),
    [
        (32, (2, 4, 8), (2, 4, 8)),
        (32, (8, 2, 4, 0), (8, 2, 4, 0)),
        (32, (3, 4, 5), (4,)),
        (32, (3,), (3,)),
        (32, (16, 64, 32), (16, 32)),
        (32, (64,), (64,)),
        (30, (2, 4, 15), (2, 15)),
    ],
)
def test_of_several_ratios_those_that_divide_the_window_are_usable(
    window: int, ratios: tuple[int, ...], usable: tuple[int, ...]
) -> None:
    assert BeaconConfig(beacon_window=window, beacon_ratio=ratios).usable_ratios == usable


def test_several_ratios_of_which_none_divides_the_window_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[3, 5\].*beacon_window=32"):
        _ = BeaconConfig(beacon_window=32, beacon_ratio=(3, 5)).usable_ratios


@pytest.mark.parametrize("ratio", [-1, 2.0, "2", True, None])
def test_require_ratio_refuses_what_no_window_can_be_compressed_by(ratio: Any) -> None:
    with pytest.raises(ConfigError, match="beacon_ratio="):
        BeaconConfig(beacon_window=32).require_ratio(ratio)


@pytest.mark.parametrize("ratio", [0, 1, 3, 32, 33])
def test_require_ratio_hands_any_other_back(ratio: int) -> None:
    assert BeaconConfig(beacon_window=32).require_ratio(ratio) == ratio


def test_an_unknown_switch_of_published_code_is_accepted_only_while_it_is_off() -> None:
    assert BeaconConfig.from_dict({"beacon_skip_first": None}) == BeaconConfig.from_dict({})
    with pytest.raises(ConfigError, match=r"beacon_skip_first.*5"):
        BeaconConfig.from_dict({"beacon_skip_first": 5})
