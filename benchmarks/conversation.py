"""How much a session knows of a long conversation: facts that were told once, asked for at its end.

    python benchmarks/conversation.py                     # 100 facts in 200 exchanges, the embedded model
    python benchmarks/conversation.py --ask 25 --json answers.json

Each fact is one plain sentence of a person, among exchanges that say nothing worth keeping. The question shares some
words with the sentence: who it is about, and what of them. An answer is right if the value occurs in it. Every question
is asked of the conversation as it is at the end. Prints how many are known, and what a question loads.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from beacon_memory import BeaconMemory, Session
from beacon_memory.session import RECENT

NAMES = (
    "Ottilie Brandt", "Marcus Hale", "Ingrid Solheim", "Pavel Novotny", "Leila Haddad", "Tomas Ferreira",
    "Greta Lindqvist", "Yusuf Demir", "Clara Whitfield", "Hugo Marchetti", "Amara Okafor", "Nils Bergstrom",
    "Rosa Delgado", "Kenji Mori", "Edith Lawson", "Viktor Petrov", "Salma Rahimi", "Oscar Jennings", "Freya Andersen",
    "Dario Conti",
)  # fmt: skip
# What is said, what is asked, and the values; {name} is who it is about.
KINDS = (
    ("The dentist of {name} is called Doctor {value}.", "What is the dentist of {name} called?",
     ("Ashdown", "Birch", "Carrow", "Dunstan", "Elwood", "Farrow", "Gilmore", "Hartnell", "Ibsen", "Jessop")),
    ("{name} was born in {value}.", "Where was {name} born?",
     ("Lisbon", "Tallinn", "Bergen", "Krakow", "Palermo", "Utrecht", "Nairobi", "Quito", "Dublin", "Kyoto")),
    ("{name} drives a {value} van.", "What colour is the van that {name} drives?",
     ("red", "green", "yellow", "white", "black", "purple", "orange", "silver", "brown", "blue")),
    ("{name} plays the {value} in an orchestra.", "Which instrument does {name} play in the orchestra?",
     ("oboe", "cello", "harp", "trumpet", "viola", "bassoon", "clarinet", "tuba", "flute", "timpani")),
    ("{name} keeps a {value} as a pet.", "Which pet does {name} keep?",
     ("tortoise", "parrot", "ferret", "hedgehog", "goose", "rabbit", "gecko", "donkey", "canary", "hamster")),
    ("{name} works as a {value}.", "What does {name} work as?",
     ("plumber", "botanist", "notary", "baker", "surveyor", "tailor", "geologist", "violin maker", "pilot",
      "beekeeper")),
    ("{name} is moving to {value} next spring.", "Where is {name} moving to next spring?",
     ("Toronto", "Vienna", "Santiago", "Helsinki", "Marseille", "Glasgow", "Seville", "Prague", "Osaka", "Bruges")),
    ("{name} is allergic to {value}.", "What is {name} allergic to?",
     ("walnuts", "shrimp", "celery", "penicillin", "lupins", "mustard", "sesame", "strawberries", "latex", "peaches")),
    ("{name} paid {value} euros for a bicycle.", "How many euros did {name} pay for the bicycle?",
     ("140", "265", "310", "475", "520", "685", "730", "890", "915", "1050")),
    ("{name} hid the spare key under the {value}.", "Where did {name} hide the spare key?",
     ("flowerpot", "doormat", "rain barrel", "garden bench", "birdbath", "woodpile", "beehive", "dustbin", "staircase",
      "wheelbarrow")),
)  # fmt: skip
CHAT = (
    "It has been raining here since the morning.",
    "I had lentil soup for lunch today.",
    "The tram was late again, so I walked.",
    "Do you think it is too early for tea?",
    "I should tidy up my desk one of these days.",
    "The neighbours are building something very loud.",
    "I slept badly, the moon was so bright.",
    "My coffee has gone cold while we were talking.",
    "There is a good film on tonight, I hear.",
    "I cannot find my umbrella anywhere.",
)
REPLIES = ("Thank you for telling me.", "I see.", "That is good to know.", "I understand.", "All right.")


@dataclass(frozen=True)
class Fact:
    """A sentence that is said once, a question about it, and the value that a right answer has."""

    said: str
    question: str
    value: str


def facts(count: int, seed: int) -> list[Fact]:
    """Make up facts: each person has several, each value is of one person."""
    rng, made = random.Random(seed), []
    for said, question, values in KINDS:
        for name, value in zip(rng.sample(NAMES, len(values)), values, strict=True):
            made.append(Fact(said.format(name=name, value=value), question.format(name=name), value))
    return rng.sample(made, count)


def main() -> None:
    """Hold the conversation, ask for each fact, and print what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=100, help="how many facts (at most and by default %(default)s)")
    parser.add_argument("--exchanges", type=int, default=200, help="of person and model (default: %(default)s)")
    parser.add_argument("--ask", type=int, help="how many of the facts to ask for (default: all of them)")
    parser.add_argument("--recent", type=int, default=RECENT, help="tokens kept as text (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=1024, help="slots that a question loads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the facts and their places (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all answers to this file")
    given = parser.parse_args()
    told = facts(given.facts, given.seed)
    rng = random.Random(given.seed)
    places = dict(zip(sorted(rng.sample(range(given.exchanges), given.facts)), told, strict=True))
    with tempfile.TemporaryDirectory() as store, BeaconMemory(store) as memory:
        session = Session(memory, "conversation", recent=given.recent, budget=given.budget)
        memory.compressor  # noqa: B018  # loading the model is no part of the time
        started = time.perf_counter()
        for exchange in range(given.exchanges):
            said = places[exchange].said if exchange in places else rng.choice(CHAT)
            session.add([{"role": "user", "content": said}, {"role": "assistant", "content": rng.choice(REPLIES)}])
        seconds, rows = time.perf_counter() - started, [memory.show(id) for id in session.ids]
        print(
            f"{given.exchanges} exchanges, {given.facts} facts, added in {seconds:.0f} s; folded: "
            f"{len(rows)} documents, {sum(row.tokens for row in rows):,} tokens in "
            f"{sum(row.slots for row in rows):,} slots, {sum(row.bytes for row in rows) / 1e6:.1f} MB on disk"
        )
        asked = told[: given.ask]
        answers = [session.ask(fact.question, keep=False, max_new_tokens=24, temperature=0) for fact in asked]
    right = [fact.value.lower() in answer.text.lower() for fact, answer in zip(asked, answers, strict=True)]
    loaded = [answer.usage.slots for answer in answers]
    prompts, took = [answer.usage.prompt_tokens for answer in answers], [answer.seconds for answer in answers]
    print(
        f"known: {sum(right)} of {len(asked)}; a question loads {statistics.mean(loaded):.0f} slots, at most "
        f"{max(loaded)} ({max(loaded) * memory.model.slot_bytes / 1e6:.1f} MB), beside {statistics.mean(prompts):.0f} "
        f"tokens of prompt, and takes {statistics.mean(took):.1f} s"
    )
    if given.json:
        rows = [
            asdict(fact) | {"answer": answer.text, "right": hit}
            for fact, answer, hit in zip(asked, answers, right, strict=True)
        ]
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
