"""Functional tests of es-proxy, and the few tools that all test files share (the first section).

Every test starts what it needs on port 0 of loopback and takes it down again; `nothing_left_behind` holds it to that.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import es_proxy
from mock_es import MockES

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds until something that must happen is said not to; nothing waits this long when all is well

# -- Shared tools ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """One line of the log, unescaped; `marks` by key. `body` is decoded, `status` and `size` are numbers."""

    kind: str  # request, response or event
    id: str
    user: bytes
    path: bytes
    query: bytes | None
    method: bytes
    source: str
    agent: bytes
    body: bytes
    status: int
    duration: float
    size: int
    marks: dict[str, str]
    line: str


def parse_line(line: str) -> Record:
    """A line of the log, or AssertionError when it is none."""
    event = es_proxy.EVENT.fullmatch(line)
    if event:
        marks = dict(re.findall(r" ([A-Z][A-Za-z0-9-]*): (\S+)", event["marks"]))
        return Record("event", event["event"], b"", b"", None, b"", "", b"", b"", 0, 0.0, 0, marks, line)
    match = es_proxy.RECORD.fullmatch(line)
    assert match, f"not a record: {line[:500]!r}"

    def value(name: str) -> bytes:
        text = match[name].encode()
        return text if text in es_proxy.STAND_INS else es_proxy.unescape(text)

    return Record(
        kind="response" if match["status"] else "request",
        id=match["id"],
        user=value("user"),
        path=value("path"),
        query=None if match["query"] == "None" else value("query"),
        method=value("method"),
        source=match["source"],
        agent=value("agent"),
        body=base64.b64decode(match["body"] or "", validate=True),
        status=int(match["status"] or 0),
        duration=float(match["duration"] or 0),
        size=int(match["size"] or 0),
        marks=dict(re.findall(r" ([A-Z][A-Za-z0-9-]*): (\S+)", match["marks"])),
        line=line,
    )


def read_log(path: Path) -> list[Record]:
    """All lines of a log; the file must end with a line end."""
    text = path.read_bytes().decode("ascii")
    assert text == "" or text.endswith("\n"), "the log ends in the middle of a line"
    return [parse_line(line) for line in text.split("\n")[:-1]]


def pairs(records: list[Record]) -> list[tuple[Record, Record]]:
    """Request and response records joined by id, in order of the requests; fails unless each has exactly one partner."""
    requests = [record for record in records if record.kind == "request"]
    responses = [record for record in records if record.kind == "response"]
    by_id = {record.id: record for record in responses}
    assert len(by_id) == len(responses), "a response was recorded twice"
    assert sorted(by_id) == sorted(record.id for record in requests), "a record has no partner"
    return [(record, by_id[record.id]) for record in requests]


class Running:
    """A proxy inside this process, served by a thread of its own."""

    def __init__(self, config: es_proxy.Config) -> None:
        self.config = config
        self.proxy = es_proxy.Proxy(config)
        self.host, self.port = self.proxy.address
        self.log = Path(config.audit_log)
        self._thread = threading.Thread(target=self.proxy.serve, name="proxy")
        self._thread.start()

    def records(self) -> list[Record]:
        """What the log holds now. Whoever has a whole response finds its record here."""
        return read_log(self.log)

    def pairs(self) -> list[tuple[Record, Record]]:
        """The log's pairs, now."""
        return pairs(self.records())

    def connect(self) -> socket.socket:
        """A raw connection to the proxy."""
        return socket.create_connection((self.host, self.port), timeout=PATIENCE)

    def ask(self, data: bytes) -> bytes:
        """Send raw bytes, finish sending, and read until the proxy closes."""
        with self.connect() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def request(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One request by http.client on a connection of its own: status and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request(method, target, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stop(self) -> None:
        """Stop it and wait until it has."""
        self.proxy.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the proxy did not stop"


def read_all(sock: socket.socket) -> bytes:
    """Everything until the end of the stream; what came before a reset counts."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def make_config(upstream_port: int, log: Path, **changes: Any) -> es_proxy.Config:
    """A plain HTTP configuration on loopback; `limits` may be a dict of changes."""
    limits = changes.pop("limits", {})
    if isinstance(limits, dict):
        limits = es_proxy.Limits(**limits)
    values: dict[str, Any] = {
        "upstream_host": "127.0.0.1",
        "upstream_port": upstream_port,
        "listen_host": "127.0.0.1",
        "listen_port": 0,
        "listen_tls": False,
        "upstream_tls": False,
        "audit_log": str(log),
        "drain_seconds": 5.0,
        "limits": limits,
    }
    return es_proxy.Config(**{**values, **changes})


@contextlib.contextmanager
def running_proxy(upstream_port: int, log: Path, **changes: Any) -> Iterator[Running]:
    """A proxy in this process, stopped at the end, whose log must then hold whole pairs only."""
    running = Running(make_config(upstream_port, log, **changes))
    try:
        yield running
    finally:
        running.stop()
    running.pairs()


@contextlib.contextmanager
def proxy_process(*words: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], int, list[str]]]:
    """es_proxy.py as a program: the process, its port, and the lines of stderr so far. Ended by SIGTERM at the end."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "es_proxy.py"), *words], stderr=subprocess.PIPE, **options
    )
    assert process.stderr is not None
    lines: list[str] = []
    for raw in process.stderr:
        lines.append(raw.decode())
        match = re.search(r" listening on https?://\S+:(\d+)", lines[-1])
        if match:
            break
    else:
        process.wait(PATIENCE)
        process.stderr.close()
        raise AssertionError(f"it did not start: {lines}")
    reader = threading.Thread(target=lambda: lines.extend(raw.decode() for raw in process.stderr or ()))
    reader.start()
    try:
        yield process, int(match[1]), lines
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(PATIENCE)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails when threads or descriptors are left behind."""
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads left behind: {left}"
    assert len(os.listdir("/proc/self/fd")) <= files, "descriptors left behind"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test of this file leaves no thread and no descriptor behind."""
    with nothing_left():
        yield


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the audit log goes."""
    return tmp_path / "audit.log"


@pytest.fixture
def upstream() -> Iterator[MockES]:
    """A stand-in Elasticsearch."""
    with MockES() as mock:
        yield mock


# -- The way of a request ----------------------------------------------------------------------------------------


def test_a_request_is_relayed_and_recorded_as_a_pair(upstream: MockES, log: Path) -> None:
    """The main job: one search, one response, two lines with the same id."""
    body = b'{"query":{"match_all":{}},"size":3}'
    with running_proxy(upstream.port, log) as proxy:
        status, answer = proxy.request(
            "POST", "/books/_search?pretty", body, {"Content-Type": "application/json", "User-Agent": "test/1"}
        )
        ((request, response),) = proxy.pairs()
    assert status == 200
    assert (request.method, request.path, request.query, request.body) == (b"POST", b"/books/_search", b"pretty", body)
    assert (request.user, request.source, request.agent) == (b"anonymous", "127.0.0.1", b"test/1")
    assert (response.status, response.size) == (200, len(answer))
    assert upstream.requests[0].body == body
