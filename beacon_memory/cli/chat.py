"""The command for a conversation in the terminal."""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.documents import SESSION_TAG
from beacon_memory.errors import BeaconMemoryError, InputError

from .explanation_text import print_explanation
from .help import Commands
from .line_input import LineInput
from .options import (
    Adapter,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Picker,
    Store,
    name_given,
    open_memory,
    template_arguments,
)
from .terminal import print_line, print_rows, print_text, remarks, reported, say, shown

if TYPE_CHECKING:
    from beacon_memory.question import Question
    from beacon_memory.results import Answer
    from beacon_memory.session import Session
    from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = ["app"]

app = Commands()

_MOST_LISTED = 50  # documents that /docs shows
_PLACES = {
    "remote": "fetched from object storage",
    "cold": "read from its file",
    "ram": "ready in RAM",
    "device": "ready on the device",
}


@app.command()
def chat(
    session: Annotated[
        str, typer.Option(help="Name of the conversation; it goes on where it was.", parser=name_given, metavar="NAME")
    ] = "chat",
    doc: Annotated[
        list[str] | None,
        typer.Option(
            help="Id of a document to answer from; repeat it for several.",
            metavar="ID",
            show_default="those that are found for each question",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="How much of all memories to load, as of ask: slots, bytes as 64MB, or a ratio as x16.",
            show_default="where the question is",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Without --doc: how many documents may be picked.", min=1)] = 3,
    picker: Picker = "attention",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample; 0 is greedy.", min=0.0)] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="What else the model's chat template knows: '{\"enable_thinking\": false}'."),
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Talk with the documents: answers come as they are written, and the conversation is kept.

    A line that begins with / is a command: /add FILE, /docs, /why (what the last answer was given from), /clear, /help,
    /quit. Ctrl-C stops an answer, Ctrl-D ends.
    """
    with reported("the conversation is stored"):
        options = {"max_new_tokens": max_new_tokens} | ({} if temperature is None else {"temperature": temperature})
        template = template_arguments(chat_template_kwargs)
        with open_memory(store, namespace, model, adapter, device, dtype, picker=picker) as memory:
            from beacon_memory.question import Question
            from beacon_memory.session import Session

            how = Question("", budget=budget, limit=limit, chat_template_kwargs=template, options=options)
            memory.compressor  # noqa: B018  # load the model before a question waits for it
            Chat(Session(memory, session), doc or [], how).run()


class Chat:
    """A conversation with a person in the terminal.

    ids: documents that each answer is given from; if there are none, they are found for each question.
    how: how each question is asked.
    """

    def __init__(self, session: Session, ids: list[str], how: Question) -> None:
        self.session, self.memory = session, session.memory
        self._named, self._how = ids, replace(how, session_budget=session.budget)
        self._found: list[str] = []  # for the question before
        self._last: tuple[Sequence[Mapping[str, Any]], Answer] | None = None  # what was asked, and the answer
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/add": (self._add, "FILE...: read files, folders or globs, and remember them"),
            "/docs": (self._docs, "the documents that are stored"),
            "/why": (self._why, "which documents and passages the last answer was given from, and what they cost"),
            "/clear": (self._clear, "forget this conversation, and begin anew; documents stay"),
            "/help": (self._help, "this list"),
            "/quit": (lambda _: None, "end; so does Ctrl-D"),
        }

    def run(self) -> None:
        """Read lines and answer them, until there are no more."""
        said = self.session.turns
        for id in self._named:
            self.memory.show(id)
        _remark(
            f"documents in memory: {self.memory.store.totals().documents}"
            + (f"; the conversation {self.session.id!r} goes on" if said or self.session.ids else "")
            + "; /help shows what you can do"
        )
        typed = LineInput("> ", (turn["content"] for turn in said if turn["role"] == "user"), self._completions)
        while True:
            try:
                line = typed.read()
                if line is None or line.strip() == "/quit":
                    break
                self._take(line.strip())
            except KeyboardInterrupt:
                print_line()
                _remark("stopped; /quit or Ctrl-D ends the conversation")

    def _take(self, line: str) -> None:
        """Answer a question, or do what a command says; an error is told, and the conversation goes on."""
        try:
            if not line.startswith("/"):
                if line:
                    self._ask(line)
                return
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise InputError(f"{name} is no command; /help shows those there are")
            self._commands[name][0](rest.strip())
        except BeaconMemoryError as error:
            print_line(f"error: {error}", keep="\n", err=True)

    def _ask(self, question: str) -> None:
        import asyncio

        ids = self._named or self._picked(question)
        messages = [*self.session.turns, {"role": "user", "content": question}]
        pieces: list[str] = []
        try:
            answer = asyncio.run(self._said(messages, [*ids, *self.session.ids], pieces))
        except KeyboardInterrupt:
            if pieces:
                self._keep(question, "".join(pieces))  # what was said was said
            raise
        print_line()
        if answer.supported is False:
            _remark("perhaps this is not in memory; /why shows what the answer was given from")
        self._last = messages, answer
        self._keep(question, answer.text)

    async def _said(self, messages: Sequence[Mapping[str, Any]], ids: list[str], pieces: list[str]) -> Answer:
        """Print an answer as it comes, and note its pieces; returns the whole.

        The model runs in a thread: so Ctrl-C stops the answer between two steps of the model, never within one.
        """
        from beacon_memory.results import Answer

        asked = replace(self._how, messages=messages, ids=ids)
        async with contextlib.aclosing(self.memory.astream(asked)) as stream:
            async for piece in stream:
                if isinstance(piece, Answer):
                    return piece
                pieces.append(piece)
                print_text(piece)
        raise AssertionError("a stream ends with its answer")

    def _picked(self, question: str) -> list[str]:
        """Return the documents that a question is about; those of the one before, if its words tell of none."""
        picked = [pick.id for pick in self.memory.pick(question, self._how.limit)]
        self._found = picked or [id for id in self._found if id in self.memory.store]
        return self._found

    def _keep(self, question: str, answer: str) -> None:
        """Add both to the conversation; folding what is too old may be interrupted, and is done later then."""
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        self.session.add(turns, fold=False)
        self.session.add([])

    def _add(self, rest: str) -> None:
        from .adding import add_sources
        from .sources import find_sources

        try:
            paths = [os.path.expanduser(path) for path in shlex.split(rest)]  # noqa: PTH111  # stays as typed otherwise
        except ValueError as error:
            raise InputError(f"/add {rest}: {error}; put quotes around a name with spaces") from error
        if not paths:
            raise InputError("/add needs the name of a file, folder or glob, such as: /add notes.txt")
        if "-" in paths:
            raise InputError("/add reads files; standard input is this conversation")
        sources, skipped = find_sources(paths)
        for one in skipped:
            say(False, {"id": one.path.as_posix(), "status": "skipped", "reason": one.reason})
        if not sources:
            raise InputError("there is nothing to add: no file that can be read was found")
        add_sources(self.memory, sources, {})
        if self._named:
            self._named += [one.id for one in sources if one.id not in self._named and one.id in self.memory.store]

    def _docs(self, _: str) -> None:
        rows = [*islice(self._documents(), _MOST_LISTED + 1)]
        if rows:
            print_rows(rows[:_MOST_LISTED])
        else:
            _remark("nothing is stored yet; add documents with: /add FILE")
        if len(rows) > _MOST_LISTED:
            _remark("and more; beacon-memory list shows all")

    def _documents(self) -> Iterator[DocumentRow]:
        """Iterate over the rows of all documents but those that conversations were folded into."""
        after = ""
        while rows := self.memory.list(after=after, limit=_MOST_LISTED):
            yield from (row for row in rows if SESSION_TAG not in row.tags)
            after = rows[-1].id

    def _why(self, _: str) -> None:
        if self._last is None:
            raise InputError("nothing was answered yet")
        messages, answer = self._last
        _print_costs(answer)
        if answer.ids:
            how = self._how
            explanation = self.memory.explain(
                messages, answer.ids, budget=how.budget, session_budget=how.session_budget
            )
            print_explanation(explanation)

    def _clear(self, _: str) -> None:
        self.session.clear()
        self._found, self._last = [], None
        _remark("this conversation begins anew")

    def _help(self, _: str) -> None:
        for name, (_command, help_) in self._commands.items():
            print_line(f"{name:6} {help_}")
        print_line("Anything else is a question. Ctrl-C stops an answer, Tab completes commands and names of files.")

    def _completions(self, line: str, word: str) -> list[str]:
        if line.lstrip() == word:
            return [f"{name} " for name in self._commands if word and name.startswith(word)]
        if not line.startswith("/add "):
            return []
        found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(word))}*"))  # noqa: PTH111, PTH207  # as typed
        return [f"{path}/" if os.path.isdir(path) else shlex.quote(path) for path in found]  # noqa: PTH112


def _print_costs(answer: Answer) -> None:
    """Print what was loaded for an answer, what it cost, and what speaks for it."""
    usage, evidence = answer.usage, answer.evidence
    for one in usage.documents:
        costs = f"{one.slots:,} slots, {one.bytes / 1e6:.1f} MB, {one.passages} passages"
        print_line(f"{one.id}: {costs}, {_PLACES[one.place]}")
    if not answer.ids:
        print_line("no document was loaded: none has a word of the question")
    print_line(
        f"in all {usage.slots:,} slots, {usage.prompt_tokens} prompt and {usage.generated_tokens} generated tokens, "
        f"first token after {answer.time_to_first_token:.2f} s, the whole after {answer.seconds:.2f} s"
    )
    if evidence is not None:
        sure = "" if evidence.likelihood is None else f", the model was {evidence.likelihood:.0%} sure of its tokens"
        print_line(f"{evidence.words:.0%} of the question's words are in one passage{sure}")


def _remark(text: str) -> None:
    remarks().print(shown(text), style="dim", markup=False)
