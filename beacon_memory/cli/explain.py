"""The command that shows what would be loaded for a question."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .explanation_page import write_page
from .explanation_text import print_explanation
from .help import Commands
from .options import (
    Adapter,
    AsJson,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Picker,
    Store,
    open_memory,
    path_given,
)
from .terminal import print_json, reported

__all__ = ["app"]

app = Commands()


@app.command()
def explain(
    question: Annotated[str, typer.Argument(help="The question.")],
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids of documents.", metavar="id", show_default="those that are found")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="As of ask: slots, bytes as 64MB, or a ratio as x16.", show_default="all that fits the model"
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write it as a page of HTML instead.", parser=path_given, metavar="FILE")
    ] = None,
    limit: Annotated[int, typer.Option(help="Without ids: how many documents may be picked.", min=1)] = 3,
    picker: Picker = "attention",
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Show the text of what ask would load for a question, each word shaded by how much of it is loaded.

    With --json one object: question, ids, slots, bytes, passages.
    """
    with reported("nothing was written"):
        memory = open_memory(store, namespace, model, adapter, device, dtype, picker=picker)
        explanation = memory.explain(question, ids or None, budget=budget, limit=limit)
        if html is not None:
            write_page(explanation, html)
        if as_json:
            print_json(asdict(explanation))
        elif html is None:
            print_explanation(explanation)
