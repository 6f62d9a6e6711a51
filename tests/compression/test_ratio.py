from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_memory.compression.ratio import AUTO_RATIOS, auto_ratio, positions_needed, window_ratios
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CapacityError, ConfigError
from beacon_memory.modeling.ratio_mix import mixed_ratios


def config(
    window: int = 32, *, attn: str = "hidden", sink: int = 1, ratios: tuple[int, ...] = (2, 4, 8)
) -> BeaconConfig:
    return BeaconConfig(beacon_window=window, beacon_attn=attn, beacon_sink_size=sink, beacon_ratio=ratios)


class TestAuto:
    @pytest.mark.parametrize(
        ("tokens", "ratio"), [(1, 2), (254, 2), (255, 4), (508, 4), (509, 8), (1016, 8), (1017, 16), (4064, 32)]
    )
    def test_the_smallest_ratio_that_fits_is_taken(self, tokens: int, ratio: int) -> None:
        # 160 positions less 32 in reserve less 1 of the sink: 127 slots
        assert auto_ratio(tokens, config(), max_positions=160, reserve=32) == ratio

    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    @given(tokens=st.integers(1, 3000), positions=st.integers(40, 400), reserve=st.integers(0, 64))
    def test_what_is_taken_fits_and_no_smaller_one_does(
        self, attn: str, tokens: int, positions: int, reserve: int
    ) -> None:
        settings = config(attn=attn)
        fits = [
            ratio
            for ratio in AUTO_RATIOS
            if positions_needed(tokens, window_ratios(tokens, ratio, settings), settings, reserve) <= positions
        ]
        if fits:
            assert auto_ratio(tokens, settings, positions, reserve) == min(fits)
        else:
            with pytest.raises(CapacityError):
                auto_ratio(tokens, settings, positions, reserve)

    def test_a_document_that_no_ratio_fits_is_refused_with_the_numbers(self) -> None:
        with pytest.raises(CapacityError) as refused:
            auto_ratio(100_000, config(), max_positions=500, reserve=64)
        # 3125 slots, the sink and the reserve
        for number in ("100000", "32", "3190", "64", "500"):
            assert number in str(refused.value)
        assert isinstance(refused.value, ValueError)

    def test_ratios_above_the_window_are_not_tried(self) -> None:
        small = config(window=8, ratios=(2,))
        assert auto_ratio(800, small, max_positions=120, reserve=8) == 8
        with pytest.raises(CapacityError, match="ratio 8"):
            auto_ratio(8000, small, max_positions=120, reserve=8)

    def test_a_window_of_one_token_can_only_be_kept_at_ratio_one(self) -> None:
        assert auto_ratio(10, config(window=1, ratios=(1,)), max_positions=20, reserve=8) == 1


class TestPositions:
    def test_a_document_takes_its_slots_the_sink_and_the_reserve(self) -> None:
        assert positions_needed(64, [2, 4], config(), reserve=100) == 1 + 16 + 8 + 100

    def test_while_a_window_is_compressed_all_its_tokens_have_positions(self) -> None:
        assert positions_needed(64, [8, 8], config(), reserve=0) == 1 + 4 + 32
        assert positions_needed(64, [8, 8], config(attn="full-coverage"), reserve=0) == 1 + 4 + 32 + 4

    @pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
    def test_a_short_last_window_does_not_hide_what_the_one_before_it_took(self, attn: str) -> None:
        whole = positions_needed(64, [2, 2], config(attn=attn), reserve=0)
        assert positions_needed(65, [2, 2, 2], config(attn=attn), reserve=0) >= whole


class TestWindows:
    def test_one_ratio_is_that_of_every_window(self) -> None:
        assert window_ratios(65, 4, config()) == [4, 4, 4]

    def test_a_list_has_one_ratio_for_each_window(self) -> None:
        assert window_ratios(65, [4, 0, 16], config()) == [4, 0, 16]
        assert window_ratios(32, (3,), config()) == [3]

    @pytest.mark.parametrize("ratio", [[4], [4, 4], [4] * 4, []])
    def test_a_list_of_another_length_is_refused_with_the_numbers(self, ratio: list[int]) -> None:
        with pytest.raises(ConfigError, match=rf"{len(ratio)} windows.*65 tokens make 3 windows"):
            window_ratios(65, ratio, config())

    @pytest.mark.parametrize("ratio", [-1, True, [4, 4, -1], [4, 4, "4"], [4, 4, 2.0]])
    def test_a_ratio_out_of_range_is_refused(self, ratio: Any) -> None:
        with pytest.raises(ConfigError, match="beacon_ratio="):
            window_ratios(65, ratio, config())

    @pytest.mark.parametrize("ratio", [2.5, None])
    def test_what_is_neither_number_nor_list_is_refused(self, ratio: Any) -> None:
        with pytest.raises(ConfigError, match="ratio"):
            window_ratios(65, ratio, config())

    @pytest.mark.parametrize(
        ("tokens", "ratios", "slots"),
        [
            (1, [32], 1),
            (32, [4], 8),
            (33, [4, 4], 9),
            (65, [2, 0, 8], 49),
            (31, [3], 11),
            (32, [0], 32),
            (33, [99, 99], 2),
        ],
    )
    def test_slots_of_a_document(self, tokens: int, ratios: list[int], slots: int) -> None:
        reserve = 10_000  # more than reading any window takes
        assert positions_needed(tokens, ratios, config(), reserve) == 1 + slots + reserve


class TestMixes:
    def mix(self, name: str, ratios: tuple[int, ...] = (2, 4, 8), *, tokens: int = 100, seed: int = 42) -> list[int]:
        settings = BeaconConfig(beacon_window=32, beacon_ratio=ratios, beacon_ratio_mix=name)
        return list(islice(mixed_ratios(settings, tokens, max_positions=64, seed=seed), 40))

    @pytest.mark.parametrize("name", ["step-random", "instance-random", "sequence", "adapt-16"])
    def test_a_single_ratio_is_always_taken(self, name: str) -> None:
        assert self.mix(name, (5,)) == [5] * 40

    def test_sequence_takes_them_in_turn(self) -> None:
        assert self.mix("sequence", (4, 2, 8))[:5] == [4, 2, 8, 4, 2]

    def test_step_random_draws_anew_for_each_window(self) -> None:
        assert set(self.mix("step-random")) == {2, 4, 8}

    def test_instance_random_draws_once_for_a_sequence(self) -> None:
        drawn = {tuple(self.mix("instance-random", seed=seed)) for seed in range(40)}
        assert drawn == {(2,) * 40, (4,) * 40, (8,) * 40}

    @pytest.mark.parametrize("name", ["step-random", "instance-random"])
    def test_random_ratios_follow_from_the_seed(self, name: str) -> None:
        assert self.mix(name, seed=7) == self.mix(name, seed=7)
        assert len({tuple(self.mix(name, seed=seed)) for seed in range(20)}) > 1

    @pytest.mark.parametrize(("tokens", "ratio"), [(10, 2), (80, 2), (81, 4), (144, 4), (145, 8), (9000, 8)])
    def test_adapt_takes_the_smallest_ratio_with_room_for_more(self, tokens: int, ratio: int) -> None:
        assert self.mix("adapt-16", (8, 2, 4), tokens=tokens) == [ratio] * 40

    @pytest.mark.parametrize("name", ["step-random", "instance-random", "sequence", "adapt-0"])
    def test_ratios_that_do_not_divide_the_window_are_never_drawn(self, name: str) -> None:
        assert set(self.mix(name, (3, 4, 5, 8))) <= {4, 8}
