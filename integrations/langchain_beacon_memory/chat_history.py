"""BeaconChatMessageHistory: a conversation of bounded size, kept in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from beacon_memory import BeaconMemory, Session
from beacon_memory.picking import SESSION_BUDGET
from beacon_memory.session import RECENT, SESSION_SLOTS

from .chat_model import ChatBeaconMemory
from .messages import from_session_turns, to_session_turn

__all__ = ["BeaconChatMessageHistory", "behind_history"]

_PREFIX = "session/"  # so that the id of a session is not by chance that of a document


class BeaconChatMessageHistory(BaseChatMessageHistory):
    """Keep the messages of a session: old ones are folded into stored documents, recent ones stay as they are.

    It is kept in the store from the first message on. Recent messages come back as they were added, with all of their
    fields (what JSON cannot hold, as text); of folded ones, role, text and tool calls are what the model remembers.

    session_id: any text. Whoever may choose it reads that conversation: take it, and the namespace, from what your
                program knows of the user.
    memory, namespace: where it is kept; the model that continues it must have the same.
    recent:     tokens of messages that stay as they are. When there are more, the oldest are folded until half is left,
                or the last exchange alone.
    slots:      memory slots that the folded ones may take in the store; beyond, the older are compressed more strongly,
                and in the end the oldest are forgotten.
    budget:     how many of these slots a question loads, where it is about them. `BeaconHistoryMiddleware` and
                `behind_history` see to it; who loads `document_ids` otherwise gives it as `session_budget`.
    system:     tokens of system messages that stay in force in front of the recent ones, however old they are.

    More on these bounds: `Session`. Messages that cannot be added leave the conversation as it was.
    """

    def __init__(
        self,
        session_id: str,
        memory: BeaconMemory,
        *,
        namespace: str | None = None,
        recent: int = RECENT,
        slots: int = SESSION_SLOTS,
        budget: int = SESSION_BUDGET,
        system: int = 512,
    ) -> None:
        super().__init__()
        self.session_id = session_id
        self.memory = memory if namespace is None else memory.within(namespace)
        id = f"{_PREFIX}{session_id}"
        self.session = Session(self.memory, id, recent=recent, slots=slots, budget=budget, system=system)

    @property
    def namespace(self) -> str:
        """The namespace in which it is kept."""
        return self.memory.store.namespace

    @property
    def document_ids(self) -> list[str]:
        """The documents that older messages were folded into, to be loaded in front of the recent ones."""
        return self.session.ids

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # as in LangChain's own example
        """The messages that are kept as they are: system messages that stay in force, then recent ones."""
        return from_session_turns(self.session.turns)

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Let the conversation go on; folds older messages if there are too many."""
        self.session.add([to_session_turn(message) for message in messages])

    def clear(self) -> None:
        """Forget the conversation."""
        self.session.clear()


def behind_history(model: ChatBeaconMemory) -> Runnable[LanguageModelInput, AIMessage]:
    """Return the model behind what the message history of a run has folded; for `RunnableWithMessageHistory`.

        RunnableWithMessageHistory(behind_history(model), lambda id: BeaconChatMessageHistory(id, memory))

    It may also be the last part of a chain. Documents of the model itself are loaded in front, or those that it finds.
    """
    return RunnableLambda(_BehindHistory(model).bound, name="behind_history")


@dataclass(frozen=True)
class _BehindHistory:
    """The step of `behind_history`. It is a method, so that a chain with it can be pickled."""

    model: ChatBeaconMemory

    def bound(self, asked: LanguageModelInput, config: RunnableConfig) -> Any:
        history: BeaconChatMessageHistory = config["configurable"]["message_history"]
        own = self.model.own_documents(self.model._convert_input(asked).to_messages(), history.namespace)
        ids = list(dict.fromkeys([*own, *history.document_ids]))
        budget = history.session.budget
        return self.model.bind(document_ids=ids, session_budget=budget, namespace=history.namespace)
