from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_memory.errors import CorruptFileError
from beacon_memory.storage.files.names import check_name, file_stem, hash_id, number_of

NAME = f"{file_stem('doc')}-0123456789ab.safetensors"


@given(st.text(min_size=1), st.text(min_size=1))
def test_ids_become_different_plain_names(one: str, other: str) -> None:
    assert (hash_id(one) == hash_id(other)) == (one == other)
    folder, _, stem = file_stem(one).removeprefix("kv/").partition("/")
    assert stem == hash_id(one)
    assert stem.startswith(folder)
    assert int(stem, 16) < 16**32


def test_the_number_of_a_file_is_that_of_its_label() -> None:
    assert number_of(NAME) == number_of(NAME.replace("safetensors", "json")) == "0123456789ab"


def test_only_names_of_a_store_are_let_through() -> None:
    assert check_name(NAME) == NAME
    with pytest.raises(CorruptFileError, match=r"'kv/\.\./\.\./x' is no name of a store's file"):
        check_name("kv/../../x")
