"""Files of keys: hashes alone, for their owner alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from beacon_memory.errors import ConfigError, InputError
from beacon_memory.server.keys import Keys, Right, add_key, read_keys, remove_key
from beacon_memory.server.settings import ServerSettings


def test_key_names_its_caller_and_stands_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    tokens = {name: add_key(file, name, f"of-{name}", [Right.WRITE, Right.READ]) for name in ("ada", "bob")}
    keys = Keys(file)
    for name, token in tokens.items():
        caller = keys.caller(token)
        assert caller is not None
        assert (caller.name, caller.namespace) == (name, f"of-{name}")
        assert caller.may(Right.WRITE)
        assert not caller.may(Right.ADMIN)
        assert token not in file.read_text(encoding="utf-8")
        assert len(token) > 40
    assert keys.caller("") is keys.caller("none") is None
    assert file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_admin_has_all_rights(tmp_path: Path) -> None:
    token = add_key(tmp_path / "k", "ada", "", [Right.ADMIN])
    caller = Keys(tmp_path / "k").caller(token)
    assert caller is not None
    assert all(map(caller.may, Right))


def test_name_is_taken_once_and_removed_by_name(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "ada", "", [Right.READ])
    with pytest.raises(InputError, match="has a key of the name 'ada'"):
        add_key(file, "ada", "", [Right.READ])
    with pytest.raises(InputError, match="no key of the name 'bob'; it has 'ada'"):
        remove_key(file, "bob")
    remove_key(file, "ada")
    assert read_keys(file) == []


@pytest.mark.parametrize(
    ("name", "namespace", "rights", "said"),
    [("", "", [Right.READ], "name"), ("a\nb", "", [Right.READ], "name"), ("a", "", [], "needs a right")],
)
def test_key_that_cannot_be_is_refused(
    tmp_path: Path, name: str, namespace: str, rights: list[Right], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        add_key(tmp_path / "k", name, namespace, rights)
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": [{}]}', '{"keys": 1}', '{"keys": [{"rights": ["all"]}]}'])
def test_file_that_is_none_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="no file of keys"):
        Keys(tmp_path / "k")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_server_without_keys_listens_to_this_machine_alone(host: str) -> None:
    with pytest.raises(ConfigError, match="without keys anybody"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, keys=Path("keys.json")).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_has_several_names(host: str) -> None:
    assert ServerSettings(host=host).host == host
