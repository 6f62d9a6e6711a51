"""The commands that serve a store to other programs, and make keys for these."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.errors import InputError
from beacon_memory.server.keys import Right, add_key, read_keys, remove_key

from .help import Commands
from .options import (
    Adapter,
    Device,
    Dtype,
    DtypeOption,
    Model,
    Namespace,
    Picker,
    Store,
    file_given,
    name_given,
    open_memory,
    path_given,
    size,
)
from .terminal import print_line, reported, shown

if TYPE_CHECKING:
    from beacon_memory.memory import BeaconMemory
    from beacon_memory.server.settings import ServerSettings

__all__ = ["app"]

app = Commands()
keys = Commands(help="Make, list and remove the keys by which programs are let in to a server.", no_args_is_help=True)
app.add_typer(keys, name="keys")

File = Annotated[
    Path,
    typer.Argument(help="File of the keys; `add` makes it.", parser=path_given, metavar="FILE"),
]
Name = Annotated[str, typer.Argument(help="Name of the key, for the log of the server.", parser=name_given)]


def _replicas(text: str) -> tuple[int, int]:
    """Return the least and the most replicas that a user names, as 2 or 1-4."""
    written = re.fullmatch(r"([1-9][0-9]{0,3})(?:-([1-9][0-9]{0,3}))?", text)
    least, most = (int(written[1]), int(written[2] or written[1])) if written else (1, 0)
    if most < least:
        raise typer.BadParameter(f"{text!r} is neither a number of replicas, as 2, nor from how many to how many, 1-4.")
    return least, most


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.", parser=name_given, metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            envvar="BEACON_MEMORY_API_KEYS",
            help="File of keys, see `keys add`: each program works in the namespace of its own.",
            show_default="none: only programs of this machine are let in",
            parser=file_given,
            metavar="FILE",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web site whose pages may call, as https://example.org; repeat it for several."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.", metavar="SIZE")] = "32MB",
    max_running: Annotated[int, typer.Option(help="Most answers that are decoded together.", min=1, max=32)] = 32,
    max_waiting: Annotated[int, typer.Option(help="Most requests that wait for these; others get 429.", min=0)] = 64,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster that is to serve: `auto` for the one that runs here, `local` to start one.",
            show_default="none: this process serves",
            parser=name_given,
            metavar="ADDRESS",
        ),
    ] = None,
    replicas: Annotated[
        Any,
        typer.Option(
            help="With --ray: how many servers answer, or from how many to how many, as 1-4.",
            show_default="1",
            parser=_replicas,
            metavar="N[-N]",
        ),
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    picker: Picker = "attention",
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Serve the store to other programs, as OpenAI's API with memories.

    Documents are compressed in the background, questions of many programs decoded together. It ends at Ctrl-C, when the
    answers that are running have ended. With --ray several servers of a cluster share the work. Needs the extra:
    pip install 'beacon-memory[server]', with --ray 'beacon-memory[ray,server]'.
    """
    with reported("jobs that wait go on with the next server"):
        if replicas is not None and ray is None:
            raise InputError("--replicas are those of a cluster: give --ray, too")
        from beacon_memory.server.settings import ServerSettings

        settings = ServerSettings(
            host=host,
            port=port,
            keys=api_keys and api_keys.absolute(),
            origins=tuple(allow_origin or ()),
            most_body=size("--max-body", max_body) or 0,
            most_running=max_running,
            most_waiting=max_waiting,
        )
        memory = open_memory(store, namespace, model, adapter, device, dtype, picker=picker)
        if ray is None:
            from beacon_memory.server import run

            run.serve(memory, settings, _listening)
        else:
            _serve_on_cluster(ray, memory, settings, *replicas or (1, 1))


def _serve_on_cluster(
    address: str, memory: "BeaconMemory", settings: "ServerSettings", min_replicas: int, max_replicas: int
) -> None:
    if settings.port == 0:
        raise InputError("--port 0 is for one server; the proxies of a cluster need a port that is the same on all")
    if settings.keys is not None:
        read_keys(settings.keys)  # raises before anything is started
    from .cluster import connected

    with connected(address):
        from beacon_memory.distributed.serving import application, serve_on_cluster

        served = application(memory, settings, min_replicas, max_replicas)
        serve_on_cluster(served, settings, _listening)


def _listening(url: str) -> None:
    print_line(f"listening on {url}")


@keys.command("add")
def add(
    file: File,
    name: Name,
    namespace: Annotated[
        str, typer.Option(help="Namespace of the store that the key is bound to.", show_default="none")
    ] = "",
    right: Annotated[
        list[Right] | None,
        typer.Option(
            help="read: ask, list, search; write: store, label, remove; admin: both, and metrics. Repeatable.",
            show_default="read and write",
        ),
    ] = None,
) -> None:
    """Make a key and print it: it stands nowhere else, for the file has only its hash."""
    with reported("no key was made"):
        print_line(add_key(file, name, namespace, right or (Right.READ, Right.WRITE)))


@keys.command("list")
def list_keys(file: File) -> None:
    """List the keys of a file: name, namespace, rights and when it was made."""
    with reported():
        for key in read_keys(file):
            print_line(f"{shown(key.name)}  {key.namespace or '-'}  {','.join(key.rights)}  {key.created_at[:16]}")


@keys.command("remove")
def remove(file: File, name: Name) -> None:
    """Remove a key: running servers refuse it from then on."""
    with reported("the key is still there"):
        remove_key(file, name)
        print_line(f"removed {name}")
