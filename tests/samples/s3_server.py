"""A server that speaks S3, and a line to it that breaks when told to."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from dataclasses import dataclass
from typing import Any, Literal

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "library"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class S3Server:
    """A bucket behind a port of this machine."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it reports every request
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self.address = self._moto.get_host_and_port()
        keys = dict(zip(("aws_access_key_id", "aws_secret_access_key", "region_name"), KEYS.values(), strict=True))
        self.client: Any = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.address[1]}", **keys)
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        self._moto.stop()

    def objects(self) -> dict[str, bytes]:
        """What lies in the bucket."""
        return {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in self._keys()}

    def parts(self) -> dict[str, str]:
        """The uploads that were begun and neither ended nor given up: each id, and of what."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return {upload["UploadId"]: upload["Key"] for upload in found}

    def clear(self) -> None:
        for key in self._keys():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        for upload, key in self.parts().items():
            self.client.abort_multipart_upload(Bucket=BUCKET, Key=key, UploadId=upload)

    def _keys(self) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a request whose first line holds `request`.

    hang up: at once; busy: it is answered 503; upload: the line breaks after `after` bytes of it; answer: after `after`
    bytes of the answer's body; stall: no more follows those, and the line stays open.
    """

    how: Literal["none", "hang up", "busy", "upload", "answer", "stall"]
    request: str = ""
    after: int = 0


class Line:
    """Passes the connections to its port on to a server, which takes one request from each.

    requests: the first line of each request so far
    faults:   what is still to happen, once each
    always:   what happens to every request that none of `faults` is for
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._closed = threading.Event()
        self.address = self._socket.getsockname()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        _hang_up(self._socket)
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._socket.accept()[:1], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            request = client.recv(2**16)
            line = request.partition(b"\r\n")[0].decode()
            self.requests.append(line)
            fault = self._fault(line) or Fault("none")
            if fault.how == "busy":
                client.sendall(_BUSY)
            if fault.how in {"busy", "hang up"}:
                return
            with socket.create_connection(self._server) as server:
                threading.Thread(target=_upload, args=(client, server, request, fault), daemon=True).start()
                answer = b""
                while b"\r\n\r\n" not in answer and (more := server.recv(2**16)):
                    answer += more
                body = answer.find(b"\r\n\r\n") + 4
                _pass_on(server, client, answer, body + fault.after if fault.how in {"answer", "stall"} else None)
                if fault.how == "stall":
                    self._closed.wait()
                _hang_up(client)  # closing is not enough while the other thread reads from it

    def _fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.request in line:
                self.faults.remove(fault)
                return fault
        return self.always if self.always and self.always.request in line else None


def _upload(client: socket.socket, server: socket.socket, request: bytes, fault: Fault) -> None:
    _pass_on(client, server, request, fault.after if fault.how == "upload" else None)
    if fault.how == "upload":
        _hang_up(client)
        _hang_up(server)


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _pass_on(source: socket.socket, target: socket.socket, data: bytes, limit: int | None) -> None:
    """Send `data` and what follows it from the source, up to `limit` bytes."""
    with contextlib.suppress(OSError):
        while data:
            target.sendall(data[:limit])
            if limit is not None and (limit := limit - len(data)) <= 0:
                return
            data = source.recv(2**16)
