"""An addon for mitmproxy that records what es-proxy records: a line for each request, a line for each response.

mitmdump --mode reverse:http://127.0.0.1:UPSTREAM -s mitm_addon.py     (BENCH_LOG=PATH in the environment)

Large responses are streamed, requests are read whole. mitmproxy is not imported: what is used of it stands below.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Mapping
from typing import Protocol

STREAM_ABOVE_BYTES = 1024 * 1024


class Message(Protocol):
    """What a request and a response of mitmproxy have in common."""

    headers: Mapping[str, str]
    raw_content: bytes | None
    stream: bool


class Request(Message, Protocol):
    """mitmproxy.http.Request."""

    method: str
    path: str


class Response(Message, Protocol):
    """mitmproxy.http.Response."""

    status_code: int


class Client(Protocol):
    """mitmproxy.connection.Client."""

    peername: tuple[str, int]


class Flow(Protocol):
    """mitmproxy.http.HTTPFlow."""

    id: str
    request: Request
    response: Response
    client_conn: Client


def user_of(headers: Mapping[str, str]) -> str:
    """The name in Basic credentials."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return "anonymous"
    return base64.b64decode(value).partition(b":")[0].decode("latin-1")


class Audit:
    """The addon: one unbuffered line for each event."""

    def __init__(self) -> None:
        self._log = open(os.environ["BENCH_LOG"], "ab", buffering=0)
        self._started: dict[str, float] = {}

    def _write(self, flow: Flow, **more: str | int | float) -> None:
        path, _, query = flow.request.path.partition("?")
        record = {
            "time": time.time(),
            "id": flow.id,
            "user": user_of(flow.request.headers),
            "path": path,
            "query": query,
            "method": flow.request.method,
            "source": flow.client_conn.peername[0],
            "agent": flow.request.headers.get("user-agent", ""),
            **more,
        }
        self._log.write(json.dumps(record).encode() + b"\n")

    def request(self, flow: Flow) -> None:
        """Called with the whole request, before it is forwarded."""
        self._started[flow.id] = time.monotonic()
        self._write(flow, body=base64.b64encode(flow.request.raw_content or b"").decode())

    def responseheaders(self, flow: Flow) -> None:
        """Called with the head of the response."""
        flow.response.stream = int(flow.response.headers.get("content-length", "0")) > STREAM_ABOVE_BYTES

    def response(self, flow: Flow) -> None:
        """Called when the response is complete."""
        duration = time.monotonic() - self._started.pop(flow.id, time.monotonic())
        size = int(flow.response.headers.get("content-length", "0"))
        self._write(flow, status=flow.response.status_code, duration=round(duration, 3), size=size)

    def error(self, flow: Flow) -> None:
        """Called instead of response when a side broke off."""
        self._started.pop(flow.id, None)


addons = [Audit()]
