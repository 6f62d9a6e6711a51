"""The command that serves a memory to agents over the Model Context Protocol."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beacon_memory.errors import InputError, MissingDependencyError

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
    open_memory,
)
from .terminal import print_line, reported

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from beacon_memory.memory import BeaconMemory

__all__ = ["app"]

app = Commands()


@app.command()
def mcp(
    http: Annotated[
        bool, typer.Option("--http", help="Serve by HTTP, to many, instead of by standard streams.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Of --http: address to listen at; one that others reach needs --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of --http: port to listen at; 0 is a free one.", min=0, max=65535)] = 8322,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Of --http: file with the token that clients must send as a bearer.", parser=file_given, metavar="FILE"
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Offer only search, ask and list: nothing can be changed.")
    ] = False,
    picker: Picker = "attention",
    store: Store = None,
    namespace: Namespace = "",
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Serve the memory to agents as tools of the Model Context Protocol: remember, append, search, ask, list, forget.

    A host of agents, such as a desktop assistant or an editor, starts this command and talks to it by standard streams.
    Needs the extra: pip install 'beacon-memory[mcp]'.
    """
    with reported("what was remembered is stored"):
        if find_spec("mcp") is None:
            raise MissingDependencyError("serving agents needs the package mcp; run: pip install 'beacon-memory[mcp]'")
        if token_file is not None and not http:
            raise InputError("--token-file is for --http: standard streams belong to the host that started the command")
        from beacon_memory.mcp.server import http_app, mcp_server

        def memory() -> "BeaconMemory":
            return opened.result()

        server = mcp_server(memory, read_only=read_only)
        app = http_app(server, host, None if token_file is None else _token(token_file)) if http else None
        with ThreadPoolExecutor(1) as opening:  # imports take seconds, and a host waits for its first answer
            opened = opening.submit(open_memory, store, namespace, model, adapter, device, dtype, picker=picker)
            try:
                if app is None:
                    server.run("stdio")
                else:
                    opened.result().compressor  # noqa: B018  # load the model before anybody may ask
                    _serve(app, host, port)
            finally:
                if opened.exception() is None:
                    opened.result().close()  # it notes uses


def _token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token cannot be read from {str(file)!r}: {error}") from error


def _serve(application: "ASGIApp", host: str, port: int) -> None:
    """Serve until the process is interrupted or terminated; port 0 is a free one."""
    import uvicorn

    from beacon_memory.mcp.server import HTTP_PATH

    config = uvicorn.Config(application, host=host, port=port, log_level="warning")
    with config.bind_socket() as listening:
        listening.listen(config.backlog)  # who reads the line below may call at once, and waits until uvicorn has begun
        name = f"[{host}]" if ":" in host else host
        print_line(f"serving at http://{name}:{listening.getsockname()[1]}{HTTP_PATH}; Ctrl-C ends it", err=True)
        uvicorn.Server(config).run(sockets=[listening])
