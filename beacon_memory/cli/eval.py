"""The commands `beacon-memory eval ...`, which compare compressed memory with other ways to answer."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .help import Commands
from .options import Adapter, Device, Dtype, DtypeOption, Model, file_given, folder_given, path_given, quiet
from .terminal import print_line, print_text, remarks, reported

if TYPE_CHECKING:
    from beacon_memory.evaluation.run import Result
    from beacon_memory.evaluation.tasks import Evaluation

__all__ = ["app"]

app = Commands(
    help="""Compare compressed memory with other ways to answer, on the same items and the same model.

    Baselines, separated by commas; all with one R have the same K/V budget:

    \b
    full, none                     the whole text, uncompressed; no text
    base                           without LoRA, the whole text in its prompt
    truncated:R                    the first 1/R of the text
    bm25:R                         passages that match, 1/R of the text
    beacon:R                       beacons, R tokens for each
    select:R, select-expected:R    K/V of the tokens that each head needs
    hybrid:R                       both, beacons and chosen tokens
    zoom:R, slice:R                passages that match, of select:2 or of all K/V
    nested:R                       select:R, out of select:2
    beacon:R:N, select:R:N, ...    the same, the text cut into N parts, composed
    select:R@int8, ...@int4, ...   the same, the K/V quantized
    expected:R, snapkv:R, kvzip:R  1/R of the K/V, selected by kvpress

    With --json, answers are kept beside the file as they come: repeat an interrupted command, and it goes on.

    Needs the extra: pip install 'beacon-memory[eval]'.""",
    epilog="Example: beacon-memory eval qa --data qa.jsonl.gz --baselines full,none,beacon:4 --json out.json",
    no_args_is_help=True,
)


def _output(text: str) -> Path:
    """Return the path of a file to write, which is found out now and not at the end of an evaluation."""
    if path_given(text).is_dir():
        raise typer.BadParameter(f"{text!r} is a folder.")
    return Path(text)


Data = Annotated[Path, typer.Option(help="JSON lines, plain or gzipped.", parser=file_given, metavar="FILE")]
Limit = Annotated[int | None, typer.Option(help="Most items, chosen at random.", min=1, show_default="all")]
Texts = Annotated[int | None, typer.Option(help="Most texts, the first ones.", min=1, show_default="all")]
Baselines = Annotated[str, typer.Option(help="Names separated by commas.")]
Output = Annotated[
    Path | None,
    typer.Option("--json", help="Write everything, single answers too, to this file.", parser=_output, metavar="FILE"),
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Where = Annotated[
    list[str] | None, typer.Option(help="Only rows with this value, as KEY=VALUE; repeat it for several keys.")
]

_ANSWERS = "full,none,truncated:4,bm25:4,beacon:2,select:2,select:4,select:8"
_TEXTS = "full,none,truncated:8,beacon:2,beacon:4,beacon:8,beacon:16,beacon:32"


@app.command()
def qa(
    data: Data,
    context_tokens: Annotated[int, typer.Option(help="Tokens of text for each question.", min=1)] = 768,
    limit: Limit = None,
    baselines: Baselines = _ANSWERS,
    json: Output = None,
    seed: Seed = 0,
    where: Where = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Answer questions about passages of one title: F1, exact match, contains.

    Rows: context, question, answers, title. Each question is asked of its own context among others of the same title,
    in random order, up to --context-tokens.
    """
    chosen = _conditions(where)
    with _evaluation(baselines, seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.qa(data, context_tokens=context_tokens, limit=limit, where=chosen))


@app.command()
def long(
    data: Data,
    limit: Annotated[int | None, typer.Option(help="Most documents.", min=1, show_default="all")] = None,
    questions: Annotated[
        int | None, typer.Option(help="Most questions on a document.", min=1, show_default="all")
    ] = None,
    baselines: Baselines = _ANSWERS,
    json: Output = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Answer many questions about long documents and conversations: articles, LoCoMo, L-Eval.

    Rows: doc_id, context (or sessions), qa (a list of question, answers, category). If the K/V of a text do not fit the
    model's positions, a baseline reads only its beginning and its end; the table says how often.
    """
    with _evaluation(baselines, seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.long(data, limit=limit, questions=questions))


@app.command()
def longbench(
    data: Data,
    limit: Limit = None,
    baselines: Baselines = _ANSWERS,
    json: Output = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Answer the questions of LongBench, each data set with its own metric."""
    with _evaluation(baselines, seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.longbench(data, limit=limit))


@app.command()
def kv(
    data: Data,
    limit: Limit = None,
    baselines: Baselines = _ANSWERS,
    json: Output = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Retrieve the value of one key among many pairs of random strings."""
    with _evaluation(baselines, seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.kv_retrieval(data, limit=limit))


@app.command()
def needle(
    data: Data,
    lengths: Annotated[str, typer.Option(help="Tokens of text, separated by commas.")] = "1000,2000,4000",
    depths: Annotated[
        str, typer.Option(help="Where the needle is, 0 to 1, separated by commas.")
    ] = "0,0.25,0.5,0.75,1",
    repeats: Annotated[int, typer.Option(help="Needles for each length and depth.", min=1)] = 1,
    other_words: Annotated[
        bool, typer.Option("--other-words", help="Ask for the needle in words that do not stand in it.")
    ] = False,
    baselines: Baselines = "full,beacon:2,beacon:4,beacon:8",
    json: Output = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Find a needle in a haystack: one sentence at some depth of long texts. Rows: text."""
    tokens, shares = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
    with _evaluation(baselines, seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.needle(data, lengths=tokens, depths=shares, repeats=repeats, other_words=other_words))


@app.command()
def support(
    data: Data,
    limit: Annotated[int | None, typer.Option(help="Most questions of each kind.", min=1, show_default="all")] = None,
    documents: Annotated[int | None, typer.Option(help="Most documents.", min=1, show_default="all")] = None,
    budget: Annotated[str, typer.Option(help="What a question loads, as of ask.")] = "512",
    where: Where = None,
    json: Output = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Tell answers that are in memory from those that are not: precision, recall, false alarms.

    Rows as of long, whose questions without answers are not in memory; or as of qa: half of the questions are then
    asked of the document of another title.
    """
    chosen = _conditions(where)
    with _evaluation("", seed, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.support(data, limit=limit, documents=documents, budget=budget, where=chosen))


@app.command()
def ppl(
    data: Data,
    context_tokens: Annotated[int, typer.Option(help="Tokens that are compressed.", min=1)] = 768,
    continuation_tokens: Annotated[int, typer.Option(help="Tokens behind them that are predicted.", min=2)] = 256,
    limit: Texts = None,
    baselines: Baselines = _TEXTS,
    json: Output = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Predict the continuation of a text, in nats per token. Rows: text.

    If full and none are among the baselines, the table also says how much of the difference between these two each one
    makes up. Baselines that need a question (bm25) cannot be used.
    """
    with _evaluation(baselines, 0, model, adapter, device, dtype, json) as (evaluation, done):
        done(evaluation.ppl(data, context_tokens=context_tokens, continuation_tokens=continuation_tokens, limit=limit))


@app.command()
def retention(
    data: Data,
    context_tokens: Annotated[int, typer.Option(help="Tokens that are read.", min=1)] = 128,
    continuation_tokens: Annotated[int, typer.Option(help="Tokens behind them that are predicted.", min=2)] = 128,
    limit: Texts = None,
    json: Output = None,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Check that the model still predicts short texts, uncompressed, as well as its base. Rows: text.

    Without a LoRA both are equal to the last bit; with one, the difference is the cost of the LoRA.
    """
    with _evaluation("base,full", 0, model, adapter, device, dtype, json) as (evaluation, done):
        done(
            evaluation.ppl(
                data,
                context_tokens=context_tokens,
                continuation_tokens=continuation_tokens,
                limit=limit,
                task="retention",
            )
        )


@app.command()
def report(
    data: Annotated[Path, typer.Argument(help="Folder of evaluation data.", parser=folder_given)],
    output: Annotated[Path, typer.Argument(help="Folder for tables, plots and JSON.", parser=path_given)] = Path(
        "docs/results"
    ),
    limit: Annotated[int, typer.Option(help="Most items of a task; some take a share of it.", min=1)] = 100,
    only: Annotated[list[str] | None, typer.Option(help="Run only this task; repeat it for several.")] = None,
    seed: Seed = 0,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Run all tasks on a folder of data, write tables and plots, and print the page's name.

    Files, each optional: qa_dev, squad_articles, locomo, leval, kv_retrieval, paul_graham_essays and longbench, all
    .jsonl.gz. A task is not run again if its JSON is there already, with the same settings and model, nor an answer
    that was given before an interruption: repeat the command, and it goes on.
    """
    from beacon_memory.evaluation.suite import run_suite

    with _evaluation("", seed, model, adapter, device, dtype, None, _GOES_ON) as (evaluation, _):
        files = run_suite(evaluation, data, output, limit, lambda line: remarks().print(line, markup=False), only or ())
        print_line(str(files[0]))


_SAID_EVERY = 30.0  # seconds
_GOES_ON = "repeat the command to go on"
Done = Callable[["Result"], None]
Number = TypeVar("Number", int, float)


@contextmanager
def _evaluation(
    names: str,
    seed: int,
    model: str | None,
    adapter: str | None,
    device: str | None,
    dtype: Dtype,
    output: Path | None,
    interrupted: str | None = None,
) -> "Iterator[tuple[Evaluation, Done]]":
    """Load the model and show progress; a result that is given to `done` is printed, and written to `output`."""
    with reported(interrupted or (_GOES_ON if output else "nothing was written")):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        from beacon_memory.evaluation.report import markdown, write_result
        from beacon_memory.evaluation.tasks import Evaluation
        from beacon_memory.modeling.model import BeaconModel

        quiet()
        loaded = BeaconModel.from_pretrained(model, adapter, device=device, dtype=dtype.value)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = remarks()
        shown = console.is_terminal
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not shown) as bar:
            bars: dict[str, TaskID] = {}
            said = time.monotonic()

            def advance(name: str, total: int) -> None:
                nonlocal said
                if name not in bars:
                    bars[name] = bar.add_task(name, total=total)
                bar.advance(bars[name])
                if not shown and time.monotonic() - said > _SAID_EVERY:  # a file shows no bar
                    said = time.monotonic()
                    print_line(f"{name}: {bar.tasks[bars[name]].completed:.0f} of {total}", err=True)

            def done(result: "Result") -> None:
                bar.stop()
                print_text(f"{markdown(result)}\n")
                if output is not None:
                    write_result(result, output)

            chosen = [name.strip() for name in names.split(",") if name.strip()]
            yield Evaluation(loaded, chosen, seed, advance, output), done


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be numbers separated by commas", param_hint=option) from error


def _conditions(where: list[str] | None) -> Mapping[str, str]:
    chosen = dict(one.partition("=")[::2] for one in where or ())
    if not all(key and value for key, value in chosen.items()):
        raise typer.BadParameter(f"{where!r} must each be KEY=VALUE", param_hint="--where")
    return chosen
