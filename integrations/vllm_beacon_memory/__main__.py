"""`python -m vllm_beacon_memory FOLDER`: write a model as a folder that vLLM loads."""

from __future__ import annotations

from typing import Annotated

import typer

from beacon_memory.errors import BeaconMemoryError

from .model_folder import write_model_folder


def main(
    folder: Annotated[str, typer.Argument(help="The folder to write.")],
    model: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub name of the base model.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder or hub name of its adapter.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Write a model as a folder that vLLM loads, its LoRAs merged; by default the embedded one."""
    try:
        write_model_folder(folder, model, adapter, dtype=dtype)
    except BeaconMemoryError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
