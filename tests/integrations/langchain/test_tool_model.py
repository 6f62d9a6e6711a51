"""An agent with a real model that calls tools: the one in the folder that BEACON_MEMORY_TOOL_MODEL names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_beacon_memory import BeaconChatMessageHistory, BeaconHistoryMiddleware, ChatBeaconMemory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool

from beacon_memory import BeaconMemory

FOLDER = os.environ.get("BEACON_MEMORY_TOOL_MODEL", "")
PROMPT = "You are a helpful assistant. When a tool has answered, tell the user in a sentence what it said."
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not FOLDER,
        reason="set BEACON_MEMORY_TOOL_MODEL to the folder of a model that calls tools, as Qwen2.5-Coder-1.5B-Instruct",
    ),
]


def test_agent_calls_a_tool_answers_from_its_result_and_remembers_both(tmp_path: Path) -> None:
    asked: list[str] = []

    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        asked.append(city)
        return f"In {city} it is 17 degrees, with hail in the evening."

    with BeaconMemory(tmp_path, FOLDER) as memory:
        model = ChatBeaconMemory(memory=memory, max_tokens=60, temperature=0)
        history = BeaconChatMessageHistory("ada", memory)
        agent: Any = create_agent(
            model,
            [get_weather],
            system_prompt=PROMPT,
            middleware=[BeaconHistoryMiddleware(history)],
        )
        said = agent.invoke({"messages": [HumanMessage("What is the weather in Paris?")]})["messages"]
        assert {*asked} == {"Paris"}  # small models may call more than once
        assert [message.type for message in said] == ["human", *["ai", "tool"] * len(asked), "ai"]
        assert all(word in said[-1].content for word in ("17", "hail"))
        assert history.messages == said
        chunks = list(model.bind_tools([get_weather]).stream("What is the weather in Oslo?"))
        added: Any = sum(chunks[1:], start=chunks[0])
        assert isinstance(added, AIMessage)
        assert (added.content, [call["args"] for call in added.tool_calls]) == ("", [{"city": "Oslo"}])
