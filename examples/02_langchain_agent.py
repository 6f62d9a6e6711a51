"""An agent with tools talks for many turns, and its K/V stay bounded: old turns are folded into a stored memory.

    python examples/02_langchain_agent.py              # 24 turns
    python examples/02_langchain_agent.py --turns 200

The embedded model has 135 million parameters and was not trained to call tools, so which tool to call is scripted here;
everything else is an ordinary LangChain agent. With a model that calls tools, leave `ScriptedChoice` out. Needs the
extra `langchain`.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_beacon_memory import BeaconChatMessageHistory, BeaconHistoryMiddleware, ChatBeaconMemory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolCall
from langchain_core.tools import tool

from beacon_memory import BeaconMemory

PERIOD = 40  # turns that are summed up together
GOODS = ("larch boards", "barley", "lamp oil", "wool", "honey", "iron nails", "clay jars", "rope")
SHIPS = ("Ombrelline", "Tavershaw", "Corvina", "Dunmore", "Esperance", "Fulmar", "Galatea")


@tool
def weigh(crate: int) -> str:
    """Weigh a crate."""
    return f"The scales show {20 + crate * 37 % 60} kg."


@tool
def add(numbers: list[int]) -> str:
    """Add numbers."""
    return f"The sum is {sum(numbers)}."


class ScriptedChoice(AgentMiddleware):
    """Chooses the tool in place of the model; the model itself answers without tools."""

    def wrap_model_call(
        self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]
    ) -> ModelResponse | AIMessage:
        """Call a tool if a person just asked for something that a tool does, else let the model answer."""
        asked = request.messages[-1]
        numbers = [int(number) for number in re.findall(r"\d+", asked.text)]
        if asked.type == "human" and asked.text.startswith("Weigh"):
            return AIMessage("", tool_calls=[ToolCall(name="weigh", args={"crate": numbers[0]}, id="weigh")])
        if asked.type == "human" and asked.text.startswith("Add"):
            return AIMessage("", tool_calls=[ToolCall(name="add", args={"numbers": numbers}, id="add")])
        return handler(request.override(tools=[]))


def say(turn: int) -> str:
    """What the person says: a crate comes in, is weighed, and something is added."""
    crate = turn // 3 + 1
    return (
        f"The ship {ship_of(crate)} brought crate {crate}, which is full of {GOODS[crate % len(GOODS)]}.",
        f"Weigh crate {crate}.",
        f"Add {crate} and {turn}.",
    )[turn % 3]


def ship_of(crate: int) -> str:
    """Which ship brings a crate."""
    return SHIPS[crate % len(SHIPS)]


def main() -> None:
    """Talk, print what the conversation takes as it is and folded, and ask what it is remembered of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=24, help="how long to talk (default: %(default)s)")
    parser.add_argument("--store", help="folder of the store; the conversation goes on if there is one already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, BeaconMemory(Path(arguments.store or temporary)) as memory:
        model = ChatBeaconMemory(memory=memory, max_tokens=16, temperature=0)
        history = BeaconChatMessageHistory("harbour", memory, recent=256)
        agent = create_agent(model, [weigh, add], middleware=[ScriptedChoice(), BeaconHistoryMiddleware(history)])
        slot = memory.model.slot_bytes
        said: list[BaseMessage] = []
        took: list[float] = []
        print("turn   raw K/V MB   folded K/V MB   seconds   what was said")
        for turn in range(arguments.turns):
            started = time.perf_counter()
            state = agent.invoke({"messages": [HumanMessage(say(turn))]})
            took.append(time.perf_counter() - started)
            said += state["messages"]
            answer = state["messages"][-1]
            raw = model.get_num_tokens_from_messages(said) * slot
            folded = (answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]) * slot
            print(f"{turn + 1:4} {raw / 1e6:12.1f} {folded / 1e6:15.1f} {took[-1]:9.1f}   {say(turn)} {answer.text!r}")
        print()
        for first in range(0, len(took), PERIOD):
            some = took[first : first + PERIOD]
            turns = f"turns {first + 1:3} to {first + len(some):3}"
            print(f"{turns}: {statistics.mean(some):5.1f} s a turn, at most {max(some):.1f} s")
        print("\nWhich ship brought the ... of crate ...?")
        last = arguments.turns // 3
        for crate in range(last, max(0, last - len(GOODS)), -1):  # the last ones with these goods
            goods = GOODS[crate % len(GOODS)]
            question = HumanMessage(f"Which ship brought the {goods}?")
            answer = model.invoke([*history.messages, question], document_ids=history.document_ids)
            print(f"{goods:12} {crate:5}   {ship_of(crate):10}   answer: {answer.text!r}")


if __name__ == "__main__":
    main()
