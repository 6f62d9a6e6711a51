"""LangChain's own standard tests: on tiny models for all that the adapter does, and on the real default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import new_class
from typing import Annotated, Any, ClassVar

import langchain_tests.integration_tests.chat_models as standard
import pytest
import torch
from langchain_beacon_memory import BeaconMemoryRetriever, ChatBeaconMemory
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.utils.function_calling import tool_example_to_messages
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_samples import HERMES, OWLS, ROOF, WELL, Lesson, babbling_model, calling, filled_memory, taught_model
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as OldBaseModel
from pydantic.v1 import Field as OldField
from typing_extensions import TypedDict

from beacon_memory import BeaconMemory

STANDARD: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(autouse=True)
def _memory(request: pytest.FixtureRequest) -> None:
    """The memory that a class names, where its properties find it."""
    request.cls.memory = request.getfixturevalue(request.cls.memory_fixture)


@pytest.fixture(scope="module")
def babbling(tmp_path_factory: pytest.TempPathFactory) -> BeaconMemory:
    return filled_memory(tmp_path_factory.mktemp("babbling"), babbling_model(HERMES))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BeaconMemory]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield filled_memory(tmp_path_factory.mktemp("taught"), taught_model(lessons()))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> BeaconMemory:
    memory = BeaconMemory(tmp_path_factory.mktemp("default"))
    memory.add("roof", ROOF, ratio=2)
    return memory


def lessons() -> list[Lesson]:
    """What the standard tests expect a model to know, in their own words: it learns prompts by heart."""

    @tool
    def get_weather(location: str) -> str:
        """Get the weather at a location."""
        return location

    @tool("get_weather")
    def get_weather_there(location: str) -> str:
        """Get weather at a location."""
        return location

    @tool
    def my_adder_tool(a: int, b: int) -> int:
        """Tool that adds two integers.

        Takes two integers, a and b, and returns their sum.
        """
        return a + b

    def joke(base: Any, field: Any, **punchline: Any) -> Any:
        def fill(space: dict[str, Any]) -> None:
            space |= {"__module__": __name__, "__doc__": "Joke to tell user."}
            space["__annotations__"] = {"setup": str, "punchline": str | None if punchline else str}
            space["setup"] = field(description="question to set up a joke")
            space["punchline"] = field(description="answer to resolve the joke", **punchline)

        return new_class("Joke", (base,), exec_body=fill)

    class JokeDict(TypedDict):
        """Joke to tell user."""

        setup: Annotated[str, ..., "question to set up a joke"]
        punchline: Annotated[str | None, None, "answer to resolve the joke"]

    greeting = ChatPromptTemplate.from_messages([("human", "Hello. Please respond in the style of {answer_style}.")])
    greeting_generator = greeting.as_tool(
        name="greeting_generator", description="Generate a greeting in a particular style of speaking."
    )
    strict, optional = joke(BaseModel, Field), joke(BaseModel, Field, default=None)
    old = joke(OldBaseModel, OldField)
    schemas = [strict, strict.model_json_schema(), optional.model_json_schema(), old, old.schema()]
    told, parts = "Tell me a joke about cats.", {"setup": "Why do cats purr?", "punchline": "They are small motors."}
    as_json = " Return the result as a JSON with 'setup' and 'punchline' keys. Return nothing other than JSON."
    magic, none, customer = standard.magic_function, standard.magic_function_no_args, standard.unicode_customer
    addends: Any = my_adder_tool.args_schema
    few_shots = tool_example_to_messages(
        "What is 1 + 2", [addends(a=1, b=2)], tool_outputs=['{"result": 3}'], ai_response='{"result": 3}'
    )
    asked: list[tuple[str, list[Any], str]] = [
        ("Hello", [], "Hello to you, it is a fine day."),
        ("hi", [], "And hello to you"),
        (told + as_json, [], json.dumps(parts)),
        *((told, [schema], calling("Joke", **parts)) for schema in schemas),
        (told, [standard._get_joke_class("typeddict")[0]], calling("JokeDict", **parts)),
        (told, [JokeDict], calling("JokeDict", **parts)),
        ("Give me the setup to a joke about cats, no punchline.", [optional], calling("Joke", setup=parts["setup"])),
        ("Give me a joke about cats, include the punchline.", [optional], calling("Joke", **parts)),
        ("What is the value of magic_function(3)? Use the tool.", [magic], calling("magic_function", input=3)),
        ("Hello!", [magic, get_weather_there], calling("magic_function", input=1)),
        ("Hello!", [magic], calling("magic_function", input=1)),
        (
            "What is the value of magic_function_no_args()? Use the tool.",
            [none],
            "It is a tool that I can use.\n" + calling("magic_function_no_args"),
        ),
        (
            "Using the tool, generate a Pirate greeting.",
            [greeting_generator],
            calling("greeting_generator", answer_style="Pirate"),
        ),
        (
            "What is the weather in San Francisco, CA?",
            [get_weather],
            calling("get_weather", location="San Francisco, CA"),
        ),
        (
            "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
            [customer],
            calling("unicode_customer", customer_name="你好啊集团", description="a Chinese technology company"),
        ),
        (
            "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
            [customer],
            calling("unicode_customer", customer_name="こんにちは株式会社", description="a Japanese company"),
        ),
    ]
    return [
        *(([HumanMessage(question)], tools, answer) for question, tools, answer in asked),
        ([*few_shots, HumanMessage("What is 3 + 4")], [my_adder_tool], calling("my_adder_tool", a=3, b=4)),
    ]


class TestUnit(ChatModelUnitTests):
    memory_fixture = "babbling"
    memory: ClassVar[BeaconMemory]

    @property
    def chat_model_class(self) -> type[ChatBeaconMemory]:
        return ChatBeaconMemory

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"memory": self.memory}

    @property
    def supports_model_override(self) -> bool:
        return False  # a memory has one model


class _Integration(ChatModelIntegrationTests):
    memory: ClassVar[BeaconMemory]

    @property
    def chat_model_class(self) -> type[ChatBeaconMemory]:
        return ChatBeaconMemory

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"memory": self.memory} | STANDARD

    @property
    def supports_model_override(self) -> bool:
        return False  # a memory has one model

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        model = ChatBeaconMemory(**self.chat_model_params, document_ids=["roof"])
        return sum(model.stream("Hello"), start=next(model.stream(""))) if stream else model.invoke("Hello")


class TestIntegration(_Integration):
    """A model that was taught the answers: whether the adapter offers tools and reads calls as it should."""

    memory_fixture = "taught"

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}

    @property
    def supports_json_mode(self) -> bool:
        return True


@pytest.mark.slow
class TestIntegrationOfTheDefaultModel(_Integration):
    """Its chat template has no place for tools, and the jokes that the suite lets it fill in take it minutes."""

    memory_fixture = "default"

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return super().chat_model_params | {"max_tokens": 8}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestRetriever(RetrieversIntegrationTests):
    memory_fixture = "babbling"
    memory: ClassVar[BeaconMemory]

    @property
    def retriever_constructor(self) -> type[BeaconMemoryRetriever]:
        return BeaconMemoryRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"memory": self.memory}

    @property
    def retriever_query_example(self) -> str:
        return "What of the roof, the well and the owls?"


class TestRetrieverOverAVectorStore(TestRetriever):
    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
        ids = [{"document_id": id} for id in ("roof", "well", "owls")]
        vectors.add_texts([ROOF, WELL, OWLS], ids)
        return super().retriever_constructor_params | {"inner": vectors.as_retriever()}
