"""Middleware for `create_agent`: documents for a run, and a conversation of bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NotRequired, cast

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import OmitFromOutput, PrivateStateAttr
from langchain_core.messages import AnyMessage, RemoveMessage
from langgraph.runtime import Runtime

from beacon_memory import InputError
from beacon_memory.picking import last_question

from .chat_history import BeaconChatMessageHistory
from .chat_model import ChatBeaconMemory
from .messages import to_turns
from .retriever import BeaconMemoryRetriever

__all__ = ["BeaconHistoryMiddleware", "BeaconMemoryMiddleware"]


class DocumentsState(AgentState[Any]):
    """State of an agent whose runs may be given documents.

    document_ids: of the run that begins; taken out of the state then, so that no later run has them.
    loaded_document_ids: of the run, given or found.
    """

    document_ids: NotRequired[Annotated[list[str] | None, OmitFromOutput]]
    loaded_document_ids: NotRequired[Annotated[list[str], PrivateStateAttr]]


class BeaconMemoryMiddleware(AgentMiddleware[Any, Any, Any]):
    """Load documents in front of the model for each run of an agent.

        create_agent(model, tools, middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))])

    A run may be given documents, `agent.invoke({"messages": [...], "document_ids": ["lease"]})`, for this run alone;
    else the retriever looks for some with the last human message, once a run. The model must be a `ChatBeaconMemory` of
    the same memory; documents of its own stay in front.

    retriever: or a function that makes one for a run, for example in the namespace of a user that the run's context
               names: `lambda runtime: BeaconMemoryRetriever(memory=memory, namespace=runtime.context.user)`.
    """

    state_schema = DocumentsState

    def __init__(self, retriever: BeaconMemoryRetriever | Callable[[Runtime[Any]], BeaconMemoryRetriever]) -> None:
        super().__init__()
        self.retriever = retriever

    def _retriever(self, runtime: Runtime[Any]) -> BeaconMemoryRetriever:
        return self.retriever if isinstance(self.retriever, BeaconMemoryRetriever) else self.retriever(runtime)

    def before_agent(self, state: DocumentsState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Decide which documents to load."""
        if (given := state.get("document_ids")) is not None:
            return _loading(given)
        retriever, question = self._retriever(runtime), last_question(to_turns(state["messages"]))
        return _loading(retriever.ids(retriever.invoke(question)))

    async def abefore_agent(self, state: DocumentsState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Decide which documents to load."""
        if (given := state.get("document_ids")) is not None:
            return _loading(given)
        retriever, question = self._retriever(runtime), last_question(to_turns(state["messages"]))
        return _loading(retriever.ids(await retriever.ainvoke(question)))

    def _loaded(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        retriever, state = self._retriever(request.runtime), cast(DocumentsState, request.state)
        ids = state.get("loaded_document_ids", [])
        return _with_documents(request, retriever.searched, ids)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Load the documents."""
        return handler(self._loaded(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Load the documents."""
        return await handler(self._loaded(request))


def _loading(ids: list[str]) -> dict[str, Any]:
    return {"document_ids": None, "loaded_document_ids": ids}


class HistoryState(AgentState[Any]):
    """State of an agent whose conversation is kept elsewhere."""

    kept_message_ids: NotRequired[Annotated[list[str], PrivateStateAttr]]


class BeaconHistoryMiddleware(AgentMiddleware[Any, Any, Any]):
    """Keep the conversation of an agent in a `BeaconChatMessageHistory`, whatever its length.

        create_agent(model, tools, middleware=[BeaconHistoryMiddleware(BeaconChatMessageHistory("ada", memory))])

    Each run is given its new messages only. The model reads them behind the recent messages of the history, with the
    folded ones loaded as memory; when the run ends they are added to it. A checkpointer is not needed; with one, the
    state holds the messages of the last run.

    history: or a function that makes one for a run, for example for the user that the run's context names.
    """

    state_schema = HistoryState

    def __init__(self, history: BeaconChatMessageHistory | Callable[[Runtime[Any]], BeaconChatMessageHistory]) -> None:
        super().__init__()
        self.history = history

    def _history(self, runtime: Runtime[Any]) -> BeaconChatMessageHistory:
        return self.history if isinstance(self.history, BeaconChatMessageHistory) else self.history(runtime)

    def before_agent(self, state: HistoryState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Drop from the state what the history has."""
        kept = set(state.get("kept_message_ids", []))
        return {"messages": [RemoveMessage(id=one.id) for one in state["messages"] if one.id in kept and one.id]}

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Put the history in front."""
        return handler(self._remembering(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Put the history in front."""
        return await handler(await asyncio.to_thread(self._remembering, request))

    def _remembering(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        history = self._history(request.runtime)
        messages = cast(list[AnyMessage], history.messages)
        request = request.override(messages=[*messages, *request.messages])
        if isinstance(request.model, ChatBeaconMemory) and "document_ids" not in request.model_settings:
            own = request.model.own_documents(request.messages, history.namespace)
            settings = {**request.model_settings, "document_ids": own}
            request = request.override(model_settings=settings)
        settings = {**request.model_settings, "session_budget": history.session.budget}
        return _with_documents(request.override(model_settings=settings), history.namespace, history.document_ids)

    def after_agent(self, state: HistoryState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Add the messages of the run to the history."""
        self._history(runtime).add_messages(state["messages"])
        return {"kept_message_ids": [message.id for message in state["messages"]]}

    async def aafter_agent(self, state: HistoryState, runtime: Runtime[Any]) -> dict[str, Any]:
        """Add the messages of the run to the history."""
        return await asyncio.to_thread(self.after_agent, state, runtime)


def _with_documents(request: ModelRequest[Any], namespace: str, ids: Sequence[str]) -> ModelRequest[Any]:
    """Return the request with documents behind those that are loaded anyway."""
    settings = request.model_settings
    if settings.get("namespace", namespace) != namespace:
        raise InputError(
            f"a model call loads documents of one namespace, not of {settings['namespace']!r} and {namespace!r}; give "
            "all middleware of an agent the same"
        )
    others = settings.get("document_ids", getattr(request.model, "document_ids", ())) or ()
    loaded = {"document_ids": list(dict.fromkeys([*others, *ids])), "namespace": namespace}
    return request.override(model_settings={**settings, **loaded})
