"""A model for conversations, their turns, and all that a session holds of one."""

from __future__ import annotations

from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconModel, Session
from beacon_memory.config import BeaconConfig


def make_model(positions: int = 2048) -> BeaconModel:
    config = BeaconConfig(beacon_window=32)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=positions)


def exchange(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]


def line(turn: dict[str, str]) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}\n"


def whole(session: Session) -> str:
    """The conversation from its first turn on."""
    return "".join([*map(session.memory.store.text, session.ids), *map(line, session.turns)])
