"""The command that fits the choice of tokens to a model and to one's own texts."""

from pathlib import Path
from typing import Annotated

import typer

from beacon_memory.errors import BeaconMemoryError, InputError

from .help import Commands
from .options import Adapter, AsJson, Device, Dtype, DtypeOption, Model, name_given, path_given, quiet
from .terminal import print_json, print_line, reading, reported, say

__all__ = ["app"]

app = Commands()


@app.command()
def calibrate(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders or globs, as of add: texts like those to be added.", parser=name_given),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the adapter that comes of it.", parser=path_given, metavar="DIR")
    ],
    windows: Annotated[
        int, typer.Option(help="Most windows of text to read, drawn at random; each is read twice.", min=8)
    ] = 300,
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Fit what --score expected chooses by to a model and your texts, and print the folder of the adapter.

    `add --score expected` reads a text once and predicts which tokens `repeat` would keep. This fits the prediction to
    what `repeat` keeps of texts, and says how much better it is on others; it also notes which heads look answers up,
    for --picker attention. The adapter holds what the one before held, too: name it with --adapter, and stores that are
    there can be used with it.

    With --json one object: adapter, windows, compared, share, before.
    """
    with reported("nothing was written"):
        from beacon_memory.compression.calibration import COMPARED_AT, calibrate
        from beacon_memory.compression.compressor import BeaconCompressor
        from beacon_memory.lookup import Lookup
        from beacon_memory.modeling.model import UNTRAINED, BeaconModel

        from .adding import found_sources
        from .sources import read_source

        if output.exists() and not output.is_dir():
            raise InputError(f"{output} is a file; name a folder for the adapter")
        texts = []
        for source in found_sources(paths, None, as_json):
            try:
                texts.append(read_source(source))
            except BeaconMemoryError as error:
                say(as_json, {"id": source.id, "status": "failed", "reason": str(error)})
        if not texts:
            raise InputError("there is nothing to calibrate with: no file that can be read was found")
        quiet()
        loaded = BeaconModel.from_pretrained(model, adapter, device=device, dtype=dtype.value)
        with reading("windows") as progress:
            found = calibrate(BeaconCompressor(loaded), texts, windows, progress)
        heads = Lookup(loaded).found() if loaded.tokenizer.chat_template else ()  # without, nothing can be asked
        trained = loaded.adapter != UNTRAINED
        loaded.save_adapter(output, probe=found.probe, lookup_heads=heads, trained=trained)
        if as_json:
            fields = {"windows": found.windows, "compared": found.compared, "share": found.share}
            print_json({"adapter": str(output), **fields, "before": found.before})
        else:
            print_line(
                f"of what repeat keeps at ratio {COMPARED_AT}, expected keeps {found.share:.0%} now and kept "
                f"{found.before:.0%} before ({found.compared} windows that nothing was fitted to)"
            )
            print_line(str(output))
