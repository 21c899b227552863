#!/usr/bin/env python3
"""HTTP/1.1, both directions, as a specification: bytes in, what must happen, what is recorded.

Outcomes
    refuse    that status in Elasticsearch's error shape, `Connection: close`, a lingering close, 0 bytes upstream, one
              pair of records with `Rejected: code` and what was received (16 KiB at most, no credentials) in Body
    relay     exactly the named requests reach the upstream, serialised from the parsed fields
    bad       (responses) the client gets 502, and the upstream connection is thrown away
    abort     (responses) the head was already sent: cut off without a last chunk, `Error:` in the response record

Held in every case: requests that the upstream parsed = request records without `Rejected`; every request record has its
one response record; h11 (in the upstream and in the client here) and Node's parser read the forwarded bytes as one
request with the method, target and body of its record.

A request case is sent in one segment, byte by byte, split at random, and with a valid request behind it; a response
case whole, byte by byte and split at random. The parsers alone are fed the same pieces and must not care.

    python3 test_protocol.py --fuzz SECONDS [--seed N]     mutations of valid messages, see the last section
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import errno
import fcntl
import http.client
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h11
import pytest

import es_proxy
from test_es_proxy import (
    PATIENCE,
    Record,
    Running,
    nothing_left,
    pairs,
    parse_line,
    proxy_process,
    running_proxy,
)

KIB = 1024
MIB = 1024 * KIB
MAX_BODY = 64 * KIB  # --max-body of the proxy that the tables run through
SECRET = base64.b64encode(b"elastic:TOP-SECRET")  # must never be in a log
EVIL = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"

# == Building blocks of the tables ===============================================================================

STATUS = {
    "bad-request-line": 400, "bad-target": 400, "bad-field": 400, "bad-host": 400, "bad-connection": 400,
    "bad-framing": 400, "bad-chunk": 400, "bad-trailer": 400, "incomplete-request": 400, "method-not-allowed": 405,
    "request-timeout": 408, "body-too-large": 413, "target-too-long": 414, "bad-expectation": 417,
    "head-too-large": 431, "trailers-too-large": 431, "coding-not-implemented": 501, "bad-version": 505,
    "max-forwards": 200,
}  # fmt: skip


def ask(line: bytes = b"GET / HTTP/1.1", *fields: bytes, host: bytes | None = b"Host: a", body: bytes = b"") -> bytes:
    """A request: its line, Host, more field lines, body."""
    lines = [line, *([] if host is None else [host]), *fields]
    return b"".join(item + b"\r\n" for item in lines) + b"\r\n" + body


def get(*fields: bytes, host: bytes | None = b"Host: a") -> bytes:
    """A GET of / with these field lines."""
    return ask(b"GET / HTTP/1.1", *fields, host=host)


def post(*fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    """A POST to / with these field lines and body."""
    return ask(b"POST / HTTP/" + version, *fields, body=body)


def chunked(body: bytes, *fields: bytes) -> bytes:
    """A POST to / with `body` as the bytes of its chunked coding."""
    return post(b"Transfer-Encoding: chunked", *fields, body=body)


@dataclasses.dataclass(frozen=True)
class Want:
    """A request that must reach the upstream; `fields` are its field lines behind Host, when the case is about them."""

    method: bytes = b"GET"
    target: bytes = b"/"
    body: bytes = b""
    fields: tuple[bytes, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One request case: what the client sends, what reaches the upstream, and the code of what is refused."""

    id: str
    data: bytes
    want: tuple[Want, ...]
    code: str = ""
    status: int = 0
    end: bool = False  # the client finishes sending behind `data`
    closes: bool = False  # the proxy closes after the last response without being asked

    @property
    def lasts(self) -> bool:
        """Whether the connection takes another request."""
        return not (self.code or self.closes or self.end)


def refuse(case: str, data: bytes, code: str, *before: Want, end: bool = False) -> Row:
    """A row whose request is refused with `code`, after those `before` it were served."""
    return Row(case, data, before, code, STATUS[code], end, closes=True)


def relay(case: str, data: bytes, *want: Want, end: bool = False, closes: bool = False) -> Row:
    """A row whose requests are forwarded: one GET of / unless said otherwise."""
    return Row(case, data, want or (Want(),), end=end, closes=closes)


FOLLOW = b"GET /follow HTTP/1.1\r\nHost: a\r\n\r\n"
ROWS: list[Row] = []

CONTROLS = [bytes((code,)) for code in (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F)]
ODD_SPACES = [b"\t", b"\v", b"\f", b"\r", b"\x85", b"\xa0", b"\x1c", b"\x1d", b"\x1e", b"\x1f"]

# == The two peers ===============================================================================================


def split(data: bytes, way: str, rng: random.Random) -> list[bytes]:
    """`data` in pieces: whole, bytes (long data: byte by byte at both ends), or random."""
    if way == "bytes":
        edge = 1024
        if len(data) <= 4 * edge:
            return [data[at : at + 1] for at in range(len(data))]
        ends = (split(data[:edge], way, rng), split(data[-edge:], way, rng))
        return [*ends[0], data[edge:-edge], *ends[1]]
    if way == "random" and len(data) > 1:
        cuts = sorted({0, len(data), *(rng.randrange(1, len(data)) for _ in range(rng.randint(1, 8)))})
        return [data[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [data]


def ready(sock: socket.socket) -> socket.socket:
    """Settings of every socket here: pieces go out as they are, nothing waits for ever."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(PATIENCE)
    return sock


def reset(sock: socket.socket) -> None:
    """Make the close of `sock` a reset."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@dataclasses.dataclass
class Seen:
    """A request as the upstream's strict parser read it, with its bytes and the number of its connection."""

    raw: bytes
    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    connection: int

    @property
    def lines(self) -> tuple[bytes, ...]:
        """The field lines behind Host, byte by byte."""
        head = self.raw.partition(b"\r\n\r\n")[0]
        return tuple(line for line in head.split(b"\r\n")[1:] if not line.lower().startswith(b"host:"))


class Incoming:
    """One upstream connection, read by h11 in the server's role."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.unread = b""
        self.error: h11.RemoteProtocolError | None = None

    def next(self, head_only: bool = False) -> Seen | None:
        """The next request (with `head_only`, without waiting for its body); None at the end. `unread` is left over."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * MIB)
        raw = bytearray(self.unread)
        body = bytearray()
        head: h11.Request | None = None
        if raw:
            parser.receive_data(bytes(raw))
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as error:
                self.error, self.unread = error, bytes(raw)
                return None
            if event is h11.NEED_DATA:
                data = self._receive()
                if not data:
                    self.unread = bytes(raw)
                    return None
                raw += data
                parser.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            if isinstance(event, h11.EndOfMessage) or (head_only and head is not None):
                assert head is not None
                self.unread = parser.trailing_data[0] if not head_only else b""
                raw = raw[: len(raw) - len(self.unread)]
                fields = [(bytes(name), bytes(value)) for name, value in head.headers.raw_items()]
                return Seen(bytes(raw), head.method, head.target, fields, bytes(body), self.number)

    def _receive(self) -> bytes:
        try:
            return self.sock.recv(256 * KIB)
        except OSError:
            return b""


Answer = Callable[[Incoming, Seen], bool]  # answers a request; whether the connection is kept


def own_answer(seen: Seen, *fields: bytes) -> bytes:
    """A response that names the request it answers."""
    body = json.dumps({"target": seen.target.decode("latin-1"), "length": len(seen.body)}).encode()
    head = (b"HTTP/1.1 200 OK", b"Content-Type: application/json", b"Content-Length: %d" % len(body), *fields)
    return b"".join(line + b"\r\n" for line in head) + b"\r\n" + (b"" if seen.method == b"HEAD" else body)


def answer_own(incoming: Incoming, seen: Seen) -> bool:
    """Send `own_answer` and keep the connection."""
    incoming.sock.sendall(own_answer(seen))
    return True


class Upstream:
    """A raw upstream: a thread a connection, every request parsed by h11, recorded, then answered by `answer`."""

    def __init__(self, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.answer: Answer = answer_own
        self.greeting = b""  # sent before anything was read
        self.head_only = False  # answer before the body is there
        self.keep = True  # keep what was recorded
        self.seen: list[Seen] = []
        self.count = 0  # requests, kept or not
        self.faults: list[str] = []  # what was no request, or came behind one unasked
        self.ended = threading.Semaphore(0)  # released for each connection that is over
        self._context = context
        self._lock = threading.Lock()  # guards all lists and counts
        self._sockets: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._numbers = itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._threads.append(threading.Thread(target=self._accept, name="upstream"))
        self._threads[0].start()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            number = next(self._numbers)
            thread = threading.Thread(target=self._serve, args=(ready(sock), number), name=f"upstream-{number}")
            with self._lock:
                self._sockets[number] = sock
                self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            with contextlib.suppress(OSError):
                if self._context is not None:
                    sock = self._context.wrap_socket(sock, server_side=True)
                    sock.settimeout(PATIENCE)
                with sock:
                    self._converse(Incoming(sock, number))
        finally:
            sock.close()
            with self._lock:
                del self._sockets[number]
            self.ended.release()

    def _converse(self, incoming: Incoming) -> None:
        if self.greeting:
            incoming.sock.sendall(self.greeting)
        while (seen := incoming.next(self.head_only)) is not None:
            with self._lock:
                self.count += 1
                if self.keep:
                    self.seen.append(seen)
                if incoming.unread:
                    self.faults.append(f"bytes behind a request: {incoming.unread!r}")
            if self.keep and len(seen.raw) < 64 * KIB and not self.head_only:
                FORWARDED.append(seen)
            if not self.answer(incoming, seen):
                return
        if incoming.unread or incoming.error:
            with self._lock:
                self.faults.append(f"no request: {incoming.unread!r}, {incoming.error}")

    def take(self) -> list[Seen]:
        """What was recorded since the last call; fails when there were bytes that are no request."""
        with self._lock:
            assert not self.faults, self.faults
            seen, self.seen = self.seen, []
        return seen

    def close(self) -> None:
        """Stop listening, cut all connections, wait for the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(PATIENCE)
        with self._lock:
            for sock in self._sockets.values():
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread of the upstream hangs"


FORWARDED: list[Seen] = []  # all of this module, for Node's parser


@dataclasses.dataclass
class Reply:
    """A response as the client's h11 read it; `complete` is False when the stream ended inside it."""

    status: int
    fields: list[tuple[bytes, bytes]]
    reason: bytes
    body: bytes
    interim: list[int]
    complete: bool

    def values(self, name: bytes) -> list[bytes]:
        """The values of a field, by its name in lower case."""
        return [value for key, value in self.fields if key.lower() == name]


class Client:
    """One raw connection to the proxy, whose responses h11 reads in the client's role."""

    def __init__(self, proxy: tuple[str, int], source: str = "", receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        try:
            if receive_buffer:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source:
                self.sock.bind((source, 0))
            ready(self.sock).connect(proxy)
        except BaseException:
            self.sock.close()
            raise
        self._left = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *pieces: bytes) -> None:
        """Send each piece in a segment of its own."""
        for piece in pieces:
            self.sock.sendall(piece)

    def finish(self) -> None:
        """Send no more; still listen."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def receive(self) -> bytes:
        """What comes next, empty at the end of the stream (a reset is one)."""
        if self._left:
            data, self._left = self._left, b""
            return data
        try:
            return self.sock.recv(256 * KIB)
        except ConnectionError:
            return b""
        except TimeoutError:
            raise AssertionError("the proxy neither answers nor closes") from None

    def rest(self) -> bytes:
        """Everything until the end of the stream."""
        return b"".join(iter(self.receive, b""))

    def next(self, method: bytes = b"GET") -> Reply | None:
        """The next response, to a request with `method`; None when the stream ends instead."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=16 * MIB)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        reply = Reply(0, [], b"", b"", [], False)
        body = bytearray()
        begun = False
        while True:
            try:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    data = self.receive()
                    if not data and not begun:
                        return None
                    begun = True
                    parser.receive_data(data)
            except h11.RemoteProtocolError:
                assert not self.receive(), "the proxy's response is not HTTP/1.1"
                break
            if isinstance(event, h11.InformationalResponse):
                reply.interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                reply.status, reply.reason = event.status_code, event.reason
                reply.fields = [(bytes(name), bytes(value)) for name, value in event.headers.raw_items()]
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                reply.complete = isinstance(event, h11.EndOfMessage)
                self._left = parser.trailing_data[0]
                break
        reply.body = bytes(body)
        return reply


class Lab:
    """A running proxy between raw peers, and what its log and its upstream have new."""

    def __init__(self, proxy: Running, upstream: Upstream) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.pairs: list[tuple[Record, Record]] = []  # all of them so far
        self._log = open(proxy.log, "rb")

    def client(self, source: str = "", receive_buffer: int = 0) -> Client:
        """A new connection to the proxy."""
        return Client((self.proxy.host, self.proxy.port), source, receive_buffer)

    def news(self, retried: int = 0) -> tuple[list[Seen], list[tuple[Record, Record]]]:
        """Requests that reached the upstream since the last call, and pairs of records; their counts agree."""
        lines = self._log.read().decode("ascii")
        assert not lines or lines.endswith("\n"), "a record is not whole"
        assert SECRET.decode() not in lines
        fresh = pairs([parse_line(line) for line in lines.split("\n")[:-1]])
        self.pairs += fresh
        seen = self.upstream.take()
        forwarded = [request for request, _ in fresh if "Rejected" not in request.marks]
        assert len(seen) == len(forwarded) + retried, "requests upstream != requests on record"
        assert all(SECRET not in request.body for request, _ in fresh)
        return seen, fresh

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A case's failure stays its own: what it left unread is not the next one's."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(AssertionError):
                self.news()
            self.upstream.seen.clear()
            raise

    def close(self) -> None:
        """Close the log."""
        self._log.close()


@contextlib.contextmanager
def laboratory(directory: Path, context: ssl.SSLContext | None = None, **changes: Any) -> Iterator[Lab]:
    """A proxy with these changes to its configuration, and an upstream; nothing of them is left at the end."""
    with nothing_left(), shared_laboratory(directory, context, **changes) as lab:
        yield lab


@contextlib.contextmanager
def shared_laboratory(directory: Path, context: ssl.SSLContext | None = None, **changes: Any) -> Iterator[Lab]:
    """The same beside others that come and go, so that it can't be told what is left of whom."""
    with Upstream(context=context) as upstream:
        with running_proxy(upstream.port, directory / "audit.log", **changes) as proxy:
            lab = Lab(proxy, upstream)
            try:
                yield lab
            finally:
                lab.close()
        assert not upstream.faults, upstream.faults


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """All tests of this file together leave no thread and no descriptor."""
    with nothing_left():
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The proxy that the request tables run through."""
    with shared_laboratory(tmp_path_factory.mktemp("lab"), max_body_bytes=MAX_BODY) as lab:
        yield lab
        lab.news()
        forwarded = [request for request, _ in lab.pairs if "Rejected" not in request.marks]
        assert lab.upstream.count == len(forwarded)


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that no event tells (the kernel's queues, a process's log)."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


# == How a row is tried ==========================================================================================

WAYS = ("whole", "bytes", "random", "followed")


def try_row(lab: Lab, row: Row, way: str) -> None:
    """Send a row's bytes one way through the proxy and check everything that can be seen from outside."""
    want = list(row.want)
    data = row.data
    if way == "followed":
        data += FOLLOW
        want += [Want(target=b"/follow")] if row.lasts else []
    with lab.client() as client:
        # After the last response of a `Connection: close` nobody needs to listen; after a refusal the proxy has to.
        with contextlib.suppress(ConnectionError) if row.closes and not row.code else contextlib.nullcontext():
            client.send(*split(data, way, random.Random(f"{row.id} {way}")))
        if row.end:
            client.finish()
        replies = [client.next(item.method) for item in want]
        refusal = client.next(b"HEAD" if row.data.startswith(b"HEAD ") else b"GET") if row.code else None
        if row.lasts:
            client.finish()
        assert client.rest() == b"", "bytes behind the last response"
    seen, fresh = lab.news()
    assert [(item.method, item.target, item.body) for item in seen] == [
        (item.method, item.target, item.body) for item in want
    ]
    assert len(fresh) == len(want) + bool(row.code), "pairs of records"
    for item, arrived, reply, pair in zip(want, seen, replies, fresh[: len(want)], strict=True):
        check_relayed(lab, item, arrived, reply, pair, expects=b"100-continue" in row.data.lower())
    if row.code:
        assert "Rejected" in fresh[-1][0].marks
        check_refused(row.code, row.status, data, refusal, fresh[-1], whole=way in ("whole", "followed"))


def check_relayed(
    lab: Lab, want: Want, seen: Seen, reply: Reply | None, pair: tuple[Record, Record], expects: bool
) -> None:
    """The request that arrived, its record and its answer are those of `want`."""
    request, response = pair
    target = request.path + (b"" if request.query is None else b"?" + request.query)
    assert (request.method, target, request.body) == (want.method, want.target, want.body)
    assert [value for name, value in seen.fields if name.lower() == b"host"] == [b"127.0.0.1:%d" % lab.upstream.port]
    assert seen.raw.startswith(b"%b %b HTTP/1.1\r\n" % (want.method, want.target))
    if want.fields is not None:
        assert seen.lines == want.fields
    assert reply is not None and reply.complete and reply.status == response.status == 200
    assert set(reply.interim) <= ({100} if expects else set())
    if want.method != b"HEAD":
        assert json.loads(reply.body) == {"target": want.target.decode("latin-1"), "length": len(want.body)}
    assert response.size == len(reply.body) and not response.marks


def check_refused(
    code: str, status: int, data: bytes | None, reply: Reply | None, pair: tuple[Record, Record], whole: bool = True
) -> None:
    """The answer to a refused request, and its two records; `data` is None for a sound one that finds no room."""
    request, response = pair
    assert reply is not None and reply.complete, "no whole answer"
    assert request.marks["Rejected"] == code
    assert reply.status == response.status == status
    assert reply.values(b"connection") == [b"close"]
    assert bool(reply.values(b"allow")) == (status in (200, 405))
    assert response.marks == ({"Error": code} if status >= 400 else {})
    if reply.body:
        document = json.loads(reply.body)
        error = document["error"]
        assert (document["status"], error["code"]) == (status, code)
        assert error["root_cause"][0]["type"] == error["type"]
        assert error["reason"] and error["root_cause"][0]["reason"] == error["reason"]
    else:
        assert status < 400 or (data or b"").startswith(b"HEAD ")
    if data is not None:
        check_received(data, request.body, whole)


def check_received(data: bytes, body: bytes, whole: bool) -> None:
    """What a refused request's record has in Body is what was received, from its beginning, credentials blanked."""
    assert 0 < len(body) <= 16 * KIB and body != es_proxy.PLACEHOLDER
    likeness = b".*".join(map(re.escape, body.split(es_proxy.PLACEHOLDER)))
    assert re.search(likeness, data, re.DOTALL), "Body is not what was received"
    if whole and len(data) <= 16 * KIB:
        assert re.search(likeness + rb"\Z", data, re.DOTALL), "Body is cut though it was all there"


# == The parser alone ============================================================================================


@dataclasses.dataclass
class Parsed:
    """What a reader made of its input; equal, however the input was split."""

    messages: list[tuple[object, ...]]
    error: tuple[str, int] | None  # code and status
    rest: str  # idle or unfinished


PARSER_LIMITS = es_proxy.Limits()


def parse_requests(pieces: Iterable[bytes], keep: list[es_proxy.Request] | None = None) -> Parsed:
    """Feed a RequestReader; the requests go to `keep` as well."""
    reader = es_proxy.RequestReader(PARSER_LIMITS, MAX_BODY, es_proxy.MemoryBudget(64 * MIB))
    parsed = Parsed([], None, "")
    try:
        for piece in pieces:
            reader.feed(piece)
            while (request := reader.next()) is not None:
                assert request.body is not None
                body = bytes(request.body.whole())
                fields = [(name, value) for _, name, value in request.fields]
                parsed.messages.append(
                    (request.method, request.target, request.minor, fields, body, request.keep_alive)
                )
                if keep is not None:
                    keep.append(request)
        reader.end()
    except es_proxy.ProxyError as error:
        parsed.error = (error.code, error.status)
    parsed.rest = "idle" if reader.idle else "unfinished"
    return parsed


def parse_response(pieces: Iterable[bytes], method: bytes, ends: bool) -> tuple[Parsed, es_proxy.Response | None]:
    """Feed a ResponseReader, with the stream's end behind the pieces if it `ends`; also the head."""
    reader = es_proxy.ResponseReader(PARSER_LIMITS, method)
    body = bytearray()
    error = None
    try:
        for piece in pieces:
            reader.feed(piece)
            if reader.head is not None and not reader.complete:
                for part in reader.body():
                    body += part
        if ends and not reader.complete:
            reader.end()
    except es_proxy.ProxyError as caught:
        error = (caught.code, caught.status)
    head = reader.head
    message = () if head is None else (head.status, head.minor, head.reason, head.fields, head.keep_alive)
    # With an error behind it, how much of a body came out before depends on the pieces; that it is refused doesn't.
    parsed = Parsed([message, (bytes(body) if error is None else b"",)], error, "")
    if error is None:
        parsed.rest = f"complete, surplus {reader.surplus}" if reader.complete else "unfinished"
    return parsed, head


def splits(data: bytes, seed: str) -> Iterator[list[bytes]]:
    """Byte by byte, then three times at random."""
    yield [data[at : at + 1] for at in range(len(data))]
    for number in range(3):
        yield split(data, "random", random.Random(f"{seed} {number}"))


# == 1. Request line: white space ================================================================================

ROWS += [
    refuse(f"01-{sep.hex()}-after-method", ask(b"GET" + sep + b"/ HTTP/1.1"), "bad-request-line") for sep in ODD_SPACES
]
ROWS += [
    refuse(f"01-{sep.hex()}-after-target", ask(b"GET /" + sep + b"HTTP/1.1"), code)
    for sep in ODD_SPACES
    for code in ["bad-request-line" if sep == b"\r" else "bad-target"]
]
ROWS += [
    refuse("01-two-spaces-after-method", ask(b"GET  / HTTP/1.1"), "bad-request-line"),
    refuse("01-two-spaces-after-target", ask(b"GET /  HTTP/1.1"), "bad-request-line"),
    refuse("01-space-and-tab", ask(b"GET \t/ HTTP/1.1"), "bad-request-line"),
    refuse("01-leading-space", ask(b" GET / HTTP/1.1"), "bad-request-line"),
    refuse("01-leading-tab", ask(b"\tGET / HTTP/1.1"), "bad-request-line"),
    refuse("01-trailing-space", ask(b"GET / HTTP/1.1 "), "bad-request-line"),
    refuse("01-trailing-tab", ask(b"GET / HTTP/1.1\t"), "bad-request-line"),
    refuse("01-trailing-word", ask(b"GET / HTTP/1.1 x"), "bad-request-line"),
    refuse("01-trailing-version", ask(b"GET / HTTP/1.1 HTTP/1.1"), "bad-request-line"),
    refuse("01-credentials-are-blanked", get(b"Authorization: Basic " + SECRET, b"X : y"), "bad-field"),
]

# == 2. Request line: ends and missing parts =====================================================================

ROWS += [
    refuse("02-space-in-target", ask(b"GET /a b HTTP/1.1"), "bad-request-line"),
    refuse("02-cr-only", b"GET / HTTP/1.1\rHost: a\r\r", "bad-request-line"),
    refuse("02-lf-only", b"GET / HTTP/1.1\nHost: a\n\n", "bad-request-line"),
    refuse("02-lf-after-request-line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", "bad-request-line"),
    refuse("02-lf-cr", b"GET / HTTP/1.1\n\rHost: a\n\r\n\r", "bad-request-line"),
    refuse("02-cr-cr-lf", b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", "bad-request-line"),
    refuse("02-http-0.9", b"GET /\r\n", "bad-request-line"),
    refuse("02-http-0.9-empty-line", b"GET /\r\n\r\n", "bad-request-line"),
    refuse("02-http-0.9-space", b"GET / \r\n\r\n", "bad-request-line"),
    refuse("02-http-0.9-lf", b"GET /\n", "bad-request-line"),
    refuse("02-method-alone", b"GET\r\n\r\n", "bad-request-line"),
    refuse("02-no-target", ask(b"GET HTTP/1.1"), "bad-request-line"),
    refuse("02-no-version", ask(b"GET / "), "bad-request-line"),
]

# == 3. Empty lines before a request =============================================================================

ROWS += [
    relay("03-one-empty-line", b"\r\n" + get()),
    relay("03-one-between-requests", get() + b"\r\n" + get(), Want(), Want()),
    relay("03-one-after-the-last", get() + b"\r\n"),
    refuse("03-two-empty-lines", b"\r\n\r\n" + get(), "bad-request-line"),
    refuse("03-two-between-requests", get() + b"\r\n\r\n" + get(), "bad-request-line", Want()),
    refuse("03-empty-lines-only", b"\r\n" * 40, "bad-request-line"),
    refuse("03-bare-lf", b"\n" + get(), "bad-request-line"),
    refuse("03-bare-cr", b"\r" + get(), "bad-request-line"),
    refuse("03-cr-cr-lf", b"\r\r\n" + get(), "bad-request-line"),
    refuse("03-line-with-a-space", b" \r\n" + get(), "bad-request-line"),
]


def test_03_empty_lines_do_not_restart_the_deadline_of_a_head(tmp_path: Path) -> None:
    """An empty line begins a request: from there the head has head_seconds."""
    with laboratory(tmp_path, limits={"head_seconds": 0.2}) as lab, lab.client() as client:
        client.send(b"\r\n")
        reply = client.next()
        ((request, _),) = lab.news()[1]
    assert reply is not None and reply.status == 408
    assert request.marks == {"Rejected": "request-timeout"}


# == 4. Version ==================================================================================================

ROWS += [
    refuse(f"04-{name}", ask(b"GET / " + version), "bad-request-line")
    for name, version in (
        ("minor-of-two-digits", b"HTTP/1.11"), ("major-of-two-digits", b"HTTP/01.1"), ("no-minor", b"HTTP/1"),
        ("no-minor-digit", b"HTTP/1."), ("no-major", b"HTTP/.1"), ("lower-case", b"http/1.1"), ("mixed", b"Http/1.1"),
        ("space-inside", b"HTTP/ 1.1"), ("space-before-slash", b"HTTP /1.1"), ("nul-behind", b"HTTP/1.1\0"),
        ("huge", b"HTTP/4294967295.255"), ("arabic-digits", "HTTP/\u0661.\u0661".encode()), ("comma", b"HTTP/1,1"),
        ("plus", b"HTTP/+1.1"), ("minus", b"HTTP/1.-1"), ("other-name", b"HTTPS/1.1"), ("letter", b"HTTP/1.x"),
        ("word-behind", b"HTTP/1.1x"), ("vt-behind", b"HTTP/1.1\v"), ("no-slash", b"HTTP1.1"), ("icy", b"ICY/1.1"),
    )
]  # fmt: skip
ROWS += [
    refuse("04-before-the-fields-are-too-many", ask(b"GET / HTTP/9.9", *[b"X: y"] * 101), "bad-version"),
    refuse("04-before-the-line-ends", b"GET / HTTP/ ", "bad-request-line"),
    refuse("04-before-the-line-ends-after-an-empty-line", b"\r\nGET / HTTP/ HTTP/1.-1", "bad-request-line"),
]
ROWS += [
    refuse(f"04-{version.decode()}", ask(b"GET / HTTP/" + version), "bad-version")
    for version in (b"2.0", b"9.9", b"0.9", b"3.0", b"2.1")
]
ROWS += [relay(f"04-{version.decode()}", ask(b"GET / HTTP/" + version)) for version in (b"1.2", b"1.9")]

# == 5. Method ===================================================================================================

ROWS += [
    refuse(f"05-byte-{byte.hex()}", ask(b"G" + byte + b"T / HTTP/1.1"), "bad-request-line")
    for byte in (*CONTROLS, *(bytes((code,)) for code in b'"(),/:;<=>?@[\\]{}\x80\x85\xa0\xe9\xff'))
]
ROWS += [
    refuse("05-empty", ask(b" / HTTP/1.1"), "bad-request-line"),
    refuse("05-before-the-line-ends", b"G]", "bad-request-line"),
    refuse("05-quoted", ask(b'"GET" / HTTP/1.1'), "bad-request-line"),
    refuse("05-100-kb", ask(b"G" * 100_000 + b" / HTTP/1.1"), "bad-request-line"),
    relay("05-lower-case", ask(b"get / HTTP/1.1"), Want(b"get")),
    relay("05-mixed-case", ask(b"Get / HTTP/1.1"), Want(b"Get")),
    relay("05-unknown", ask(b"FOO / HTTP/1.1"), Want(b"FOO")),
    relay("05-all-token-characters", ask(b"!#$%&'*+-.^_`|~09Az / HTTP/1.1"), Want(b"!#$%&'*+-.^_`|~09Az")),
]

# == 6. Bytes that a target can't have ===========================================================================

ROWS += [
    refuse(f"06-byte-{byte.hex()}", ask(b"GET /a" + byte + b"b HTTP/1.1"), "bad-target")
    for byte in (*CONTROLS, b"\t", b"\x80", b"\x85", b"\xa0", b"\xad", b"\xff", "\u00e9".encode(), b"#")
]
ROWS += [
    refuse("06-before-the-line-ends", b"GET /a#", "bad-target"),
    refuse("06-fragment", ask(b"GET /#top HTTP/1.1"), "bad-target"),
    refuse("06-fragment-after-query", ask(b"GET /?q#top HTTP/1.1"), "bad-target"),
    refuse("06-nul-in-query", ask(b"GET /?\0 HTTP/1.1"), "bad-target"),
    refuse("06-utf-8-in-query", ask("GET /?\u540d HTTP/1.1".encode()), "bad-target"),
]

# == 7. Targets that look odd but are sound: forwarded and recorded byte by byte ==================================

ROWS += [
    relay(f"07-{name}", ask(b"GET " + target + b" HTTP/1.1"), Want(target=target))
    for name, target in (
        ("two-slashes", b"//x"), ("three-slashes", b"///"), ("dots", b"/a/../b"), ("dot", b"/./a/."),
        ("coded-dots", b"/%2e%2e/%2E"), ("coded-crlf", b"/%0d%0aX:%20y"), ("coded-nul", b"/%00"),
        ("backslash", b"/a\\b"),
        ("percent-alone", b"/%"), ("no-hex", b"/%zz"), ("odd-characters", b"/<a>{b}|\"c\"^`d'"), ("colon-at", b"/:@x"),
        ("question-marks", b"/a?b?c?"), ("empty-query", b"/a?"), ("query-alone", b"/?"), ("semicolon", b"/a;b=c,d"),
        ("star", b"/*/_search"), ("date-math", b"/%3Clogs-%7Bnow%2Fd%7D%3E/_search?q=a+b%20c&pretty"),
        ("none", b"/None"),
        ("dash", b"/-"), ("url-inside", b"/http://b/x"), ("user-inside", b"/http://u:p@b/x"),
        ("record-words", b"/Status:?Body:"),
    )
]  # fmt: skip

# == 8. Targets that are neither a path nor a URL, and methods that are not for us ================================

ROWS += [
    refuse(f"08-{name}", ask(line + b" HTTP/1.1"), "bad-target")
    for name, line in (
        ("get-star", b"GET *"), ("post-star", b"POST *"), ("star-path", b"OPTIONS */t"), ("two-stars", b"OPTIONS **"),
        ("word", b"GET admin"), ("options-word", b"OPTIONS admin"), ("authority", b"GET host:80"),
        ("options-authority", b"OPTIONS host:80"), ("port", b"GET :80"), ("query", b"GET ?a"), ("dot", b"GET ../a"),
        ("backslash", b"GET \\a"), ("star-query", b"OPTIONS *?a"),
    )
]  # fmt: skip
ROWS += [
    relay("08-options-star", ask(b"OPTIONS * HTTP/1.1"), Want(b"OPTIONS", b"*")),
    relay("08-options-path", ask(b"OPTIONS /a HTTP/1.1"), Want(b"OPTIONS", b"/a")),
    refuse("08-connect", ask(b"CONNECT a:80 HTTP/1.1"), "method-not-allowed"),
    refuse("08-connect-path", ask(b"CONNECT / HTTP/1.1"), "method-not-allowed"),
    refuse("08-trace", ask(b"TRACE / HTTP/1.1"), "method-not-allowed"),
    refuse("08-trace-max-forwards", ask(b"TRACE / HTTP/1.1", b"Max-Forwards: 0"), "method-not-allowed"),
]

# == 9. Absolute targets =========================================================================================

ROWS += [
    relay(f"09-{name}", ask(b"GET " + target + b" HTTP/1.1", host=b"Host: " + host), Want(target=sent))
    for name, target, host, sent in (
        ("same-host", b"http://a/x", b"a", b"/x"), ("upper-case-scheme", b"HTTP://a/x", b"a", b"/x"),
        ("host-in-other-case", b"http://A/x", b"a", b"/x"), ("https", b"https://a/x", b"a", b"/x"),
        ("no-path", b"http://a", b"a", b"/"), ("query-alone", b"http://a?q", b"a", b"/?q"),
        ("port", b"http://a:80/x", b"a:80", b"/x"), ("address", b"http://[::1]:9200/x", b"[::1]:9200", b"/x"),
        ("url-inside", b"http://a/http://b", b"a", b"/http://b"), ("two-slashes", b"http://a//x", b"a", b"//x"),
    )
]  # fmt: skip
ROWS += [
    relay("09-options-server", ask(b"OPTIONS http://a HTTP/1.1"), Want(b"OPTIONS", b"*")),
    relay("09-in-1.0", ask(b"GET http://a/x HTTP/1.0", host=None), Want(target=b"/x"), closes=True),
]
ROWS += [
    refuse(f"09-{name}", ask(b"GET " + target + b" HTTP/1.1", host=b"Host: " + host), "bad-host")
    for name, target, host in (
        ("other-host", b"http://b/x", b"a"), ("user", b"http://u@a/x", b"a"), ("user-in-both", b"http://u@a/x", b"u@a"),
        ("bad-port", b"http://a:80x/", b"a"), ("bad-port-in-both", b"http://a:80x/", b"a:80x"),
        ("unclosed", b"http://[::1/", b"a"), ("unclosed-in-both", b"http://[::1/", b"[::1"),
        ("other-port", b"http://a:81/x", b"a:80"), ("port-in-one", b"http://a:80/x", b"a"),
        ("no-host", b"http:///x", b"a"), ("nothing-behind", b"http://", b"a"), ("backslash", b"http://a\\b/x", b"a"),
    )
]  # fmt: skip
ROWS += [
    refuse("09-other-scheme", ask(b"GET ftp://a/x HTTP/1.1"), "bad-target"),
    refuse("09-one-slash", ask(b"GET http:/a/x HTTP/1.1"), "bad-target"),
    refuse("09-no-scheme", ask(b"GET a/x HTTP/1.1"), "bad-target"),
]

# == 10. Length of the request line, and what is not HTTP =========================================================


def client_hello() -> bytes:
    """What a TLS client says first."""
    context = ssl.create_default_context()
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="a").do_handshake()
    return out.read()


LONGEST_TARGET = b"/" + b"x" * (8 * KIB - len("GET / HTTP/1.1"))

ROWS += [
    relay("10-longest-line", ask(b"GET " + LONGEST_TARGET + b" HTTP/1.1"), Want(target=LONGEST_TARGET)),
    refuse("10-one-byte-more", ask(b"GET " + LONGEST_TARGET + b"x HTTP/1.1"), "target-too-long"),
    refuse("10-100-kb", ask(b"GET /" + b"x" * 100_000 + b" HTTP/1.1"), "target-too-long"),
    refuse("10-endless", b"GET /" + b"x" * 100_000, "target-too-long"),
    refuse("10-client-hello", client_hello(), "bad-request-line"),
    refuse("10-http-2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "bad-version"),
    refuse("10-ssh", b"SSH-2.0-OpenSSH_9.0\r\n", "bad-request-line"),
    refuse("10-smtp", b"EHLO\r\n", "bad-request-line"),
    refuse("10-socks", b"\x05\x01\x00", "bad-request-line"),
    refuse("10-json", b'{"query":{}}\n', "bad-request-line"),
    refuse("10-nuls", b"\0" * 100, "bad-request-line"),
    refuse("10-response", b"HTTP/1.1 200 OK\r\n\r\n", "bad-request-line"),
]
ROWS += [refuse(f"10-random-{seed}", random.Random(seed).randbytes(200), "bad-request-line") for seed in range(6)]

# == 11. Control characters and line ends in fields ==============================================================

ROWS += [refuse(f"11-value-{byte.hex()}", get(b"X: a" + byte + b"b"), "bad-field") for byte in CONTROLS]
ROWS += [
    refuse("11-lf-between-fields", get(b"X: a\nY: b"), "bad-field"),
    refuse("11-lf-after-host", b"GET / HTTP/1.1\r\nHost: a\n\r\n", "bad-field"),
    refuse("11-lf-at-the-end", b"GET / HTTP/1.1\r\nHost: a\r\n\n", "bad-field"),
    refuse("11-two-lf", b"GET / HTTP/1.1\r\nHost: a\n\n", "bad-field"),
    refuse("11-lf-first", b"GET / HTTP/1.1\r\n\nHost: a\r\n\r\n", "bad-field"),
    refuse("11-cr-in-value", get(b"X: a\rb"), "bad-field"),
    refuse("11-cr-at-value-end", get(b"X: a\r"), "bad-field"),
    refuse("11-cr-in-name", get(b"X\r: a"), "bad-field"),
    refuse("11-cr-before-value", get(b"X:\ra"), "bad-field"),
    refuse("11-cr-hides-a-field", get(b"X: a\rContent-Length: 5"), "bad-field"),
    refuse("11-cr-at-the-end", b"GET / HTTP/1.1\r\nHost: a\r\n\rX", "bad-field"),
]

# == 12. Bytes >= 0x80 in values that frame nothing ==============================================================

ROWS += [
    relay(f"12-{name}", get(line), Want(fields=(line,)))
    for name, line in (
        ("80", b"X: \x80"), ("85-around", b"X: \x85v\x85"), ("a0-around", b"X: \xa0v\xa0"), ("ff", b"X: \xff\xfe"),
        ("utf-8", "X: \u540d\u00e9".encode()), ("agent", b"User-Agent: \xe9\xff"), ("opaque-id", b"X-Opaque-Id: \xa0"),
        ("cookie", b"Cookie: \xad"),
    )
]  # fmt: skip


def test_12_such_bytes_are_recorded_escaped(lab: Lab) -> None:
    """The log stays ASCII; what it holds can be unescaped to the very bytes."""
    with lab.client() as client:
        client.send(get(b"User-Agent: a\xe9 b\xff", b"X-Opaque-Id: \xa0x\x85", b"Connection: close"))
        assert client.next() is not None
    (_,), ((request, _),) = lab.news()
    assert request.agent == b"a\xe9 b\xff" and r"a\xe9 b\xff" in request.line
    assert request.marks["Opaque-Id"] == r"\xa0x\x85"


# == 13. The form of a field line ================================================================================

ROWS += [
    refuse(f"13-{sep.hex()}-before-colon-of-{line.partition(b':')[0].decode()}", data, "bad-field")
    for sep in (b" ", b"\t", b"\x85", b"\xa0", b"\xad")
    for line in (b"Host: a", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: y")
    for data in [
        ask(
            b"POST / HTTP/1.1",
            line.replace(b":", sep + b":"),
            host=None if line[:1] == b"H" else b"Host: a",
            body=b"hello",
        )
    ]
]
ROWS += [
    refuse("13-empty-name", get(b": x"), "bad-field"),
    refuse("13-colon-alone", get(b":"), "bad-field"),
    refuse("13-no-colon", get(b"foo"), "bad-field"),
    refuse("13-no-colon-and-much-behind", get(b"foo") + b"x" * 20_000, "bad-field"),
    refuse("13-no-colon-and-too-many", get(b"foo", *[b"X: y"] * 101), "bad-field"),
    refuse("13-no-colon-first", ask(b"GET / HTTP/1.1", host=b"Host"), "bad-field"),
    refuse("13-folded-space", get(b"X: a", b" b"), "bad-field"),
    refuse("13-folded-tab", get(b"X: a", b"\tb"), "bad-field"),
    refuse("13-folded-content-length", post(b"Content-Length:", b" 5", body=b"hello"), "bad-field"),
    refuse("13-folded-transfer-encoding", chunked(b"0\r\n\r\n", b" , gzip"), "bad-field"),
    refuse("13-space-line", get(b" "), "bad-field"),
    refuse("13-tab-line", get(b"\t"), "bad-field"),
    refuse("13-space-first", ask(b"GET / HTTP/1.1", host=b" Host: a"), "bad-field"),
    refuse("13-tab-first", ask(b"GET / HTTP/1.1", host=b"\tHost: a"), "bad-field"),
    refuse("13-space-line-first", ask(b"GET / HTTP/1.1", host=b" ") + get(), "bad-field"),
    relay("13-empty-value", get(b"X:"), Want(fields=(b"X: ",))),
    relay("13-no-space", get(b"X:y"), Want(fields=(b"X: y",))),
    relay("13-many-spaces", get(b"X: \t y \t"), Want(fields=(b"X: y",))),
    relay("13-colons-in-value", get(b"X:: y:"), Want(fields=(b"X: : y:",))),
    relay(
        "13-order-case-repeats", get(b"x: 1", b"B: 2", b"X: 3", b"b:"), Want(fields=(b"x: 1", b"B: 2", b"X: 3", b"b: "))
    ),
]

# == 14. Every byte at every place of a field line: only tokens in a name, only OWS around a value, get through ====

FIELDS_14 = {b"Host": b"a", b"Content-Length": b"5", b"Transfer-Encoding": b"chunked", b"X": b"y"}
PLACES_14: dict[str, Callable[[bytes, bytes, bytes], bytes]] = {
    "first": lambda name, byte, value: byte + name + b": " + value,
    "middle": lambda name, byte, value: name[:1] + byte + name[1:] + b": " + value,
    "last": lambda name, byte, value: name[:-1] + byte + b": " + value,
    "before-colon": lambda name, byte, value: name + byte + b": " + value,
    "before-value": lambda name, byte, value: name + b":" + byte + value,
    "after-value": lambda name, byte, value: name + b": " + value + byte,
}
TOKEN_14 = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
HOST_14 = re.compile(rb"(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+(?::[0-9]{1,5})?")


def expect_14(line: bytes) -> tuple[int, str]:
    """What must become of `POST`, Host, this line and the body `hello`: requests forwarded, code of what is refused."""
    name, colon, value = line.partition(b":")
    if not colon or not name or not TOKEN_14.issuperset(name) or re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value):
        return 0, "bad-field"
    name, value = name.lower(), value.strip(b" \t")
    if name == b"content-length":
        if not re.fullmatch(b"[0-9]+", value):
            return 0, "bad-framing"
        return (1, "") if int(value) == 5 else (0, "incomplete-request")
    if name == b"transfer-encoding":
        return (1, "bad-request-line") if value == b"chunked" else (0, "bad-framing")
    if name == b"host":
        return (1, "incomplete-request") if HOST_14.fullmatch(value) else (0, "bad-host")
    return 1, ""  # not a field that frames: then what stands in for the body is read as the next request


@pytest.mark.parametrize("name", FIELDS_14, ids=bytes.decode)
@pytest.mark.parametrize("place", PLACES_14)
def test_14_every_byte(lab: Lab, name: bytes, place: str) -> None:
    """The 256 inputs for one field and one place, through the parser in all splits and through the proxy."""
    behind = {b"Content-Length": b"hello", b"Transfer-Encoding": b"0\r\n\r\nhello\r\n"}.get(name, b"")
    for code in range(256):
        line = PLACES_14[place](name, bytes((code,)), FIELDS_14[name])
        fields = [line] if name == b"Host" else [b"Host: a", line]
        data = ask(b"POST / HTTP/1.1", *fields, host=None, body=behind)
        forwarded, refused = expect_14_with_host(name, line, behind)
        whole = parse_requests([data])
        assert (len(whole.messages), whole.error[0] if whole.error else "") == (forwarded, refused), line
        for pieces in splits(data, line.hex()):
            assert parse_requests(pieces) == whole, line
        rng = random.Random(line)
        with lab.client() as client:
            client.send(*split(data, WAYS[code % 3], rng))
            client.finish()
            client.rest()
        seen, fresh = lab.news()
        codes = [pair[0].marks.get("Rejected", "") for pair in fresh]
        assert codes == [""] * forwarded + [refused] * bool(refused), line
        kept, _, value = line.partition(b":")
        value = b"5" if kept.lower() == b"content-length" else value.strip(b" \t")
        assert [item.lines for item in seen] == [() if name == b"Host" else (kept + b": " + value,)] * forwarded
        assert [item.body for item in seen] == [b"hello" if kept.lower() == b"content-length" else b""] * forwarded


def expect_14_with_host(name: bytes, line: bytes, behind: bytes) -> tuple[int, str]:
    """The same for the whole request: Host must be left, and bytes that are no body any more are no request either."""
    forwarded, refused = expect_14(line)
    got = line.partition(b":")[0].lower()
    if name == b"Host":
        if refused != "bad-field" and got != b"host":
            return 0, "bad-host"
        return (1, "") if forwarded else (forwarded, refused)
    if got == b"host" and forwarded:
        return 0, "bad-host"  # a second one
    if forwarded and got != name.lower() and behind:
        return 1, "incomplete-request" if behind == b"hello" else "bad-request-line"
    return forwarded, refused


# == 15. Names that another parser could take for one that frames ================================================

ROWS += [
    refuse(f"15-{name}", post(line, body=b"hello"), "bad-field")
    for name, line in (
        ("underscore-length", b"Content_Length: 5"), ("underscore-coding", b"Transfer_Encoding: chunked"),
        ("underscore-lower", b"content_length: 5"), ("space-length", b"Content Length: 5"),
        ("space-coding", b"Transfer Encoding: chunked"), ("percent-coding", b"Transfer-%45ncoding: chunked"),
        ("percent-length", b"%43ontent-Length: 5"), ("percent-lower", b"content%2dlength: 5"),
        ("percent-dash", b"Content%2DLength: 5"), ("percent-underscore", b"Content%5FLength: 5"),
        ("from", b"From x: y"),
    )
]  # fmt: skip
ROWS += [
    refuse("15-from-first", ask(b"GET / HTTP/1.1", host=b"From x: y"), "bad-field"),
    relay("15-dot", get(b"Content.Length: 5"), Want(fields=(b"Content.Length: 5",))),
    relay("15-underscore-elsewhere", get(b"x_y: 5"), Want(fields=(b"x_y: 5",))),
    relay("15-prefix", get(b"X-Content-Length: 5"), Want(fields=(b"X-Content-Length: 5",))),
]

# == 16. Host ====================================================================================================

ROWS += [
    refuse(f"16-{name}", ask(b"GET / HTTP/1.1", host=b"Host:" + value), "bad-host")
    for name, value in (
        ("list", b" a, b"), ("list-without-space", b" a,b"), ("empty", b""), ("spaces", b"  \t"), ("path", b" a/x"),
        ("user", b" u@a"), ("port-letters", b" a:x"), ("port-empty", b" a:"), ("port-too-high", b" a:65536"),
        ("port-six-digits", b" a:000080"), ("port-negative", b" a:-1"), ("two-ports", b" a:80:80"),
        ("unclosed", b" [::1"),
        ("unopened", b" ::1]"), ("bare-address", b" ::1"), ("behind-address", b" [::1]x"), ("empty-brackets", b" []"),
        ("space", b" a b"), ("fragment", b" a#"), ("query", b" a?"), ("backslash", b" a\\b"), ("url", b" http://a"),
        ("non-ascii", b" \xe9"), ("port-alone", b" :80"), ("quoted", b' "a"'),
    )
]  # fmt: skip
ROWS += [
    refuse("16-missing", ask(host=None), "bad-host"),
    refuse("16-missing-with-field", ask(b"GET / HTTP/1.1", b"X: y", host=None), "bad-host"),
    refuse("16-two-equal", get(b"Host: a"), "bad-host"),
    refuse("16-two-different", get(b"Host: b"), "bad-host"),
    refuse("16-two-in-other-case", get(b"hOST: a"), "bad-host"),
    refuse("16-two-in-1.0", ask(b"GET / HTTP/1.0", b"Host: b"), "bad-host"),
    relay("16-missing-in-1.0", ask(b"GET / HTTP/1.0", host=None), closes=True),
    relay("16-name", ask(host=b"Host: es-1.example.org:9200")),
    relay("16-address", ask(host=b"Host: 127.0.0.1")),
    relay("16-address-6", ask(host=b"Host: [::1]:9200")),
    relay("16-highest-port", ask(host=b"Host: a:65535")),
]

# == 17. Limits of the header section, and its end missing =======================================================


def section(size: int) -> bytes:
    """A GET whose field lines take `size` bytes with their line ends."""
    return get(b"X: " + b"x" * (size - len("Host: a\r\nX: \r\n")))


ROWS += [
    relay("17-100-fields", get(*[b"X: y"] * 99), Want(fields=(b"X: y",) * 99)),
    refuse("17-101-fields", get(*[b"X: y"] * 100), "head-too-large"),
    refuse("17-1000-fields", get(*[b"X: y"] * 999), "head-too-large"),
    relay("17-largest-section", section(16 * KIB)),
    refuse("17-one-byte-more", section(16 * KIB + 1), "head-too-large"),
    refuse("17-100-kb-name", get(b"x" * 100_000 + b": y"), "head-too-large"),
    refuse("17-100-kb-value", get(b"X: " + b"x" * 100_000), "head-too-large"),
    refuse("17-endless-value", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000, "head-too-large"),
    refuse("17-endless-fields", b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 10_000, "head-too-large"),
    refuse("17-ends-in-the-line", b"GET / HT", "incomplete-request", end=True),
    refuse("17-ends-in-a-name", b"GET / HTTP/1.1\r\nHo", "incomplete-request", end=True),
    refuse("17-ends-in-a-value", b"GET / HTTP/1.1\r\nHost: a", "incomplete-request", end=True),
    refuse("17-ends-before-the-empty-line", b"GET / HTTP/1.1\r\nHost: a\r\n", "incomplete-request", end=True),
    refuse("17-ends-in-the-empty-line", b"GET / HTTP/1.1\r\nHost: a\r\n\r", "incomplete-request", end=True),
    refuse("17-ends-in-the-second", get() + b"GET / HT", "incomplete-request", Want(), end=True),
    Row("17-ends-before-it-began", b"\r\n", (), end=True, closes=True),
]


def test_17_a_stream_that_ends_at_any_byte_forwards_nothing(lab: Lab) -> None:
    """Every prefix of a POST is recorded as incomplete and goes nowhere."""
    data = post(b"Content-Length: 5", body=b"hello")
    for length in range(1, len(data)):
        with lab.client() as client:
            client.send(data[:length])
            client.finish()
            client.rest()
        seen, ((request, response),) = lab.news()
        assert not seen
        assert (request.marks, response.status) == ({"Rejected": "incomplete-request"}, 400)
        assert request.body == data[:length]


# == 18. Half a close ============================================================================================

ROWS += [
    relay("18-after-get", get(), end=True),
    relay("18-after-post", post(b"Content-Length: 5", body=b"hello"), Want(b"POST", body=b"hello"), end=True),
    relay("18-after-two", get() * 2, Want(), Want(), end=True),
]

# == 19. Content-Length that is not a number =====================================================================

ROWS += [
    refuse(f"19-{name}", post(b"Content-Length: " + value, body=b"hello"), "bad-framing")
    for name, value in (
        ("plus-sign", b"+5"), ("minus-zero", b"-0"), ("minus-one", b"-1"), ("underscore", b"1_0"), ("quoted", b'"5"'),
        ("semicolon", b"5;"), ("letter", b"5Z"), ("hex", b"0x5"), ("octal", b"0o5"), ("fraction", b"5.0"),
        ("exponent", b"5e0"), ("two-words", b"5 5"), ("empty", b""), ("superscript", "\u00b2".encode()),
        ("latin-1-superscript", b"\xb2"), ("arabic", "\u0663".encode()), ("fullwidth", "\uff15".encode()),
        ("85-before", b"\x855"), ("85-behind", b"5\x85"), ("a0-before", b"\xa05"), ("a0-behind", b"5\xa0"),
        ("hex-letter", b"a"), ("word", b"five"), ("single-quoted", b"'5'"), ("tab-inside", b"5\t5"),
        ("brackets", b"(5)"),
    )
]  # fmt: skip
ROWS += [
    refuse(f"19-{byte.hex()}-{side}", post(b"Content-Length: " + value, body=b"hello"), "bad-field")
    for byte in (b"\0", b"\v", b"\f", b"\r", b"\x1c", b"\x7f")
    for side, value in (("before", byte + b"5"), ("behind", b"5" + byte))
]

# == 20. Content-Length: lists, repeats, size ====================================================================

ROWS += [
    refuse("20-list-equal", post(b"Content-Length: 5, 5", body=b"hello"), "bad-framing"),
    refuse("20-list-different", post(b"Content-Length: 5, 6", body=b"hello"), "bad-framing"),
    refuse("20-list-empty-member", post(b"Content-Length: 5,", body=b"hello"), "bad-framing"),
    refuse("20-two-equal", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), "bad-framing"),
    refuse("20-two-different", post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello"), "bad-framing"),
    refuse("20-two-in-other-case", post(b"Content-Length: 5", b"CONTENT-LENGTH: 5", body=b"hello"), "bad-framing"),
    refuse("20-two-on-get", get(b"Content-Length: 0", b"Content-Length: 0"), "bad-framing"),
    relay("20-leading-zeros", post(b"Content-Length: 005", body=b"hello"),
          Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",))),
    refuse("20-20-digits", post(b"Content-Length: 99999999999999999999", body=b"hello"), "body-too-large"),
    refuse("20-2-to-64", post(b"Content-Length: 18446744073709551616", body=EVIL), "body-too-large"),
    refuse("20-2-to-64-and-5", post(b"Content-Length: 18446744073709551621", body=b"hello"), "body-too-large"),
    refuse("20-5000-digits", post(b"Content-Length: " + b"9" * 5000, body=b"hello"), "bad-framing"),
    refuse("20-5000-zeros", post(b"Content-Length: " + b"0" * 5000 + b"5", body=b"hello"), "bad-framing"),
    refuse("20-one-byte-over-the-limit", post(b"Content-Length: %d" % (MAX_BODY + 1), body=EVIL), "body-too-large"),
    relay("20-at-the-limit", post(b"Content-Length: %d" % MAX_BODY, body=b"x" * MAX_BODY),
          Want(b"POST", body=b"x" * MAX_BODY)),
]  # fmt: skip

# == 21. Content-Length: white space, and less than was promised =================================================

ROWS += [
    relay(f"21-{name}", post(line, body=b"hello"), Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",)))
    for name, line in (
        ("tab-before", b"Content-Length:\t5"), ("space-behind", b"Content-Length: 5 "),
        ("tab-behind", b"Content-Length: 5\t"),
        ("many", b"Content-Length: \t 5 \t "), ("none", b"Content-Length:5"),
    )
]  # fmt: skip
ROWS += [
    refuse("21-ends-too-early", post(b"Content-Length: 10", body=b"hello"), "incomplete-request", end=True),
    refuse("21-ends-without-a-byte", post(b"Content-Length: 10"), "incomplete-request", end=True),
    refuse("21-ends-one-byte-early", post(b"Content-Length: 6", body=b"hello"), "incomplete-request", end=True),
]

# == 22. Transfer-Encoding: chunked, however it is written =======================================================

HELLO_CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"
ROWS += [
    relay(f"22-{name}", post(line, body=HELLO_CHUNKED),
          Want(b"POST", body=b"hello", fields=(b"Transfer-Encoding: chunked",)))
    for name, line in (
        ("plain", b"Transfer-Encoding: chunked"), ("capital", b"Transfer-Encoding: Chunked"),
        ("upper-case", b"Transfer-Encoding: CHUNKED"), ("tab-before", b"Transfer-Encoding:\tchunked"),
        ("space-behind", b"Transfer-Encoding: chunked "), ("many", b"Transfer-Encoding: \t chunked\t \t"),
        ("no-space", b"Transfer-Encoding:chunked"),
    )
]  # fmt: skip
ROWS += [
    relay("22-name-in-other-case", post(b"tRANSFER-eNCODING: chunked", body=HELLO_CHUNKED),
          Want(b"POST", body=b"hello", fields=(b"tRANSFER-eNCODING: chunked",))),
]  # fmt: skip

# == 23. Transfer-Encoding: everything else ======================================================================

ROWS += [
    refuse(f"23-{byte.hex()}-{side}", post(b"Transfer-Encoding: " + value, body=HELLO_CHUNKED), code)
    for byte, code in (
        (b"\v", "bad-field"), (b"\f", "bad-field"), (b"\0", "bad-field"), (b"\r", "bad-field"), (b"\x7f", "bad-field"),
        (b"\x1c", "bad-field"), (b"\x85", "bad-framing"), (b"\xa0", "bad-framing"), (b"\xff", "bad-framing"),
    )
    for side, value in (("before", byte + b"chunked"), ("behind", b"chunked" + byte))
]  # fmt: skip
ROWS += [
    refuse(f"23-{name}", post(b"Transfer-Encoding: " + value, body=HELLO_CHUNKED), "bad-framing")
    for name, value in (
        ("comma-before", b",chunked"), ("comma-behind", b"chunked,"), ("twice", b"chunked, chunked"),
        ("x-behind", b"chunked, xchunked"), ("gzip-behind", b"chunked, gzip"), ("identity", b"identity"),
        ("empty", b""),
        ("identity-before", b"identity, chunked"), ("identity-behind", b"chunked, identity"), ("xchunked", b"xchunked"),
        ("chunkedx", b"chunkedx"), ("quoted", b'"chunked"'), ("single-quoted", b"'chunked'"),
        ("extension", b"chunked;ext=1"),
        ("encoded-word", b"=?utf-8?q?chunked?="), ("gzip", b"gzip"), ("two-words", b"chunked chunked"), ("comma", b","),
        ("kelvin", "chun\u212aed".encode()), ("trailers", b"chunked trailers"), ("x-before", b"x, chunked"),
        ("coded-colon", b": chunked"), ("tab-inside", b"chun\tked"),
    )
]  # fmt: skip
ROWS += [
    refuse("23-two-fields", chunked(HELLO_CHUNKED, b"Transfer-Encoding: chunked"), "bad-framing"),
    refuse("23-two-fields-gzip", chunked(HELLO_CHUNKED, b"Transfer-Encoding: gzip"), "bad-framing"),
    refuse("23-two-fields-identity-first", post(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked",
                                                body=HELLO_CHUNKED), "bad-framing"),
    refuse("23-two-fields-empty", chunked(HELLO_CHUNKED, b"Transfer-Encoding:"), "bad-framing"),
    refuse("23-gzip-chunked", post(b"Transfer-Encoding: gzip, chunked", body=HELLO_CHUNKED), "coding-not-implemented"),
    refuse("23-deflate-chunked", post(b"Transfer-Encoding: deflate , chunked", body=HELLO_CHUNKED),
           "coding-not-implemented"),
]  # fmt: skip

# == 24. Transfer-Encoding in HTTP/1.0, and what only sounds like it =============================================

ROWS += [
    refuse("24-http-1.0", post(b"Transfer-Encoding: chunked", body=HELLO_CHUNKED, version=b"1.0"), "bad-framing"),
    refuse("24-http-1.0-keep-alive", post(b"Transfer-Encoding: chunked", b"Connection: keep-alive", body=HELLO_CHUNKED,
                                          version=b"1.0"), "bad-framing"),
    refuse("24-http-1.0-identity", post(b"Transfer-Encoding: identity", version=b"1.0"), "bad-framing"),
    relay("24-content-encoding", get(b"Content-Encoding: chunked"), Want(fields=(b"Content-Encoding: chunked",))),
    relay("24-x-transfer-encoding", get(b"X-Transfer-Encoding: chunked"),
          Want(fields=(b"X-Transfer-Encoding: chunked",))),
]  # fmt: skip

# == 25. Content-Length together with Transfer-Encoding ==========================================================

ROWS += [
    refuse(
        f"25-{length.decode() or 'empty'}-{coding.decode() or 'empty'}-{order}",
        post(*lines, body=HELLO_CHUNKED),
        "bad-framing",
    )
    for length in (b"0", b"5", b"15", b"x", b"")
    for coding in (b"chunked", b"identity", b"gzip", b"")
    for order, lines in (
        ("length-first", (b"Content-Length: " + length, b"Transfer-Encoding: " + coding)),
        ("coding-first", (b"Transfer-Encoding: " + coding, b"Content-Length: " + length)),
    )
]
ROWS += [
    refuse(
        "25-apart",
        post(b"Content-Length: 5", b"X: y", b"Transfer-Encoding: chunked", body=HELLO_CHUNKED),
        "bad-framing",
    ),
    refuse("25-on-get", get(b"Content-Length: 0", b"Transfer-Encoding: chunked"), "bad-framing"),
]

# == 26. Smuggling: every hidden pair of the two ==================================================================

CL_TE = b"0\r\n\r\n" + EVIL
TE_CL = b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL), EVIL)
HIDDEN_CODING = (
    ("plain", b"Transfer-Encoding: chunked", "bad-framing"), ("tab", b"Transfer-Encoding:\tchunked", "bad-framing"),
    ("case", b"tRANSFER-eNCODING: cHUNKED", "bad-framing"),
    ("space-colon", b"Transfer-Encoding : chunked", "bad-field"),
    ("space-first", b" Transfer-Encoding: chunked", "bad-field"), ("vt", b"Transfer-Encoding:\vchunked", "bad-field"),
    ("x", b"Transfer-Encoding: xchunked", "bad-framing"), ("quoted", b'Transfer-Encoding: "chunked"', "bad-framing"),
    ("two", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "bad-framing"),
    ("two-x-first", b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked", "bad-framing"),
    ("lf", b"X: y\nTransfer-Encoding: chunked", "bad-field"), ("cr", b"X: y\rTransfer-Encoding: chunked", "bad-field"),
    ("underscore", b"Transfer_Encoding: chunked", "bad-field"), ("nul", b"Transfer-Encoding\0: chunked", "bad-field"),
    ("percent", b"Transfer-%45ncoding: chunked", "bad-field"),
    ("folded", b"Transfer-Encoding:\r\n chunked", "bad-field"),
    ("fold-hides", b"Foo: bar\r\n Transfer-Encoding: chunked", "bad-field"),
    ("identity", b"Transfer-Encoding: chunked, identity", "bad-framing"),
    ("identity-first", b"Transfer-Encoding: identity, chunked", "bad-framing"),
    ("comma", b"Transfer-Encoding: ,chunked", "bad-framing"),
    ("nul-behind", b"Transfer-Encoding: chunked\0", "bad-field"),
    ("encoded", b"Transfer-Encoding: =?utf-8?q?chunked?=", "bad-framing"),
    ("a0", b"Transfer-Encoding\xa0: chunked", "bad-field"),
    ("extension", b"Transfer-Encoding: chunked;x=y", "bad-framing"),
    ("lf-value", b"Transfer-Encoding:\nchunked", "bad-field"),
)  # fmt: skip
for hidden, line_26, code_26 in HIDDEN_CODING:
    ROWS += [
        refuse(f"26-cl-te-{hidden}", post(b"Content-Length: %d" % len(CL_TE), line_26, body=CL_TE), code_26),
        refuse(f"26-te-cl-{hidden}", post(line_26, b"Content-Length: 4", body=TE_CL), code_26),
    ]
ROWS += [
    refuse(f"26-length-{name}", post(b"Content-Length: 0", line, body=EVIL), code)
    for name, line, code in (
        ("plus", b"Content-Length: +5", "bad-framing"), ("space-colon", b"Content-Length : 44", "bad-field"),
        ("underscore", b"Content_Length: 44", "bad-field"), ("fold", b" Content-Length: 44", "bad-field"),
        ("lf", b"X: y\nContent-Length: 44", "bad-field"), ("cr", b"X: y\rContent-Length: 44", "bad-field"),
        ("vt", b"Content-Length\v: 44", "bad-field"), ("other-case", b"content-length: 44", "bad-framing"),
    )
]  # fmt: skip

# == 27. One request's body is not the next request ==============================================================

POSTED = Want(b"POST", body=b"hello")
ROWS += [
    relay("27-length-0-then-get", post(b"Content-Length: 0") + get(), Want(b"POST"), Want()),
    relay("27-no-length-then-get", post() + get(), Want(b"POST"), Want()),
    relay("27-body-that-looks-like-a-request", post(b"Content-Length: %d" % len(EVIL), body=EVIL) + get(),
          Want(b"POST", body=EVIL), Want()),
    relay("27-chunk-that-looks-like-a-request", chunked(TE_CL) + get(), Want(b"POST", body=EVIL), Want()),
]  # fmt: skip
ROWS += [
    relay(f"27-{method.decode().lower()}-{framing}-then-get",
          ask(method + b" /_search HTTP/1.1", field, body=body) + get(), Want(method, b"/_search", b"hello"), Want())
    for method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"PUT", b"PATCH")
    for framing, field, body in (
        ("length", b"Content-Length: 5", b"hello"), ("chunked", b"Transfer-Encoding: chunked", HELLO_CHUNKED)
    )
]  # fmt: skip

# == 28. Pipelining ==============================================================================================


def numbered(count: int) -> tuple[bytes, tuple[Want, ...]]:
    """So many requests with a number each, GET and POST in turn."""
    data, want = b"", []
    for number in range(count):
        method, body = (b"POST", b"%d" % number) if number % 2 else (b"GET", b"")
        data += ask(
            b"%b /%d HTTP/1.1" % (method, number), *([b"Content-Length: %d" % len(body)] if body else []), body=body
        )
        want.append(Want(method, b"/%d" % number, body))
    return data, tuple(want)


ROWS += [relay(f"28-{count}-requests", numbered(count)[0], *numbered(count)[1]) for count in (2, 10, 100)]
ROWS += [
    refuse("28-valid-malformed-valid", get() + get(b"X : y") + EVIL, "bad-field", Want()),
    refuse("28-valid-garbage-valid", get() + b"\0\0\0" + EVIL, "bad-request-line", Want()),
    refuse("28-valid-smuggling-valid", get() + post(b"Content-Length: 4", b"Transfer-Encoding: chunked",
                                                    body=TE_CL) + EVIL,
           "bad-framing", Want()),
    relay("28-close-then-request", get(b"Connection: close") + EVIL, Want(fields=()), closes=True),
    relay("28-close-then-garbage", get(b"Connection: close") + b"\0\0\0", closes=True),
    relay("28-close-in-a-list", get(b"Connection: x, Close") + EVIL, closes=True),
    relay("28-1.0-then-request", ask(b"GET / HTTP/1.0") + EVIL, closes=True),
    relay("28-1.0-keep-alive", ask(b"GET / HTTP/1.0", b"Connection: keep-alive") + get(), Want(), Want()),
    relay("28-1.0-keep-alive-and-close", ask(b"GET / HTTP/1.0", b"Connection: keep-alive, close") + EVIL, closes=True),
]  # fmt: skip

# == 29. A refused request's body is not a request ===============================================================

ROWS += [
    refuse("29-after-413", post(b"Content-Length: %d" % (MAX_BODY + 1), body=EVIL * 3), "body-too-large"),
    refuse("29-after-413-all-of-it", post(b"Content-Length: 1000000", body=EVIL * 20_000), "body-too-large"),
    refuse("29-after-400", post(b"Content-Length: %d" % len(EVIL), b"X : y", body=EVIL), "bad-field"),
    refuse(
        "29-after-405", ask(b"TRACE / HTTP/1.1", b"Content-Length: %d" % len(EVIL), body=EVIL), "method-not-allowed"
    ),
    refuse("29-after-417", post(b"Expect: x", b"Content-Length: %d" % len(EVIL), body=EVIL), "bad-expectation"),
    refuse("29-after-501", post(b"Transfer-Encoding: gzip, chunked", body=EVIL), "coding-not-implemented"),
    refuse("29-after-a-bad-chunk", chunked(b"Z\r\n" + EVIL), "bad-chunk"),
]


def test_29_silence_inside_a_body_ends_the_connection(tmp_path: Path) -> None:
    """Head and part of a body, then nothing: R408 when the body's deadline has passed."""
    with laboratory(tmp_path, limits={"body_silence_seconds": 0.2}) as lab:
        for data in (post(b"Content-Length: 10", body=b"hello"), chunked(b"a\r\nhello"), post(b"Content-Length: 1")):
            with lab.client() as client:
                client.send(data)
                reply = client.next()
                assert client.rest() == b""
            (pair,) = lab.news()[1]
            check_refused("request-timeout", 408, data, reply, pair)


# == 30. Connection may not name what frames or routes ===========================================================

ROWS += [
    refuse(f"30-{name.decode().lower()}", get(b"Connection: " + name), "bad-connection")
    for name in (
        b"Content-Length",
        b"Transfer-Encoding",
        b"Host",
        b"Authorization",
        b"close, Content-Length",
        b"x,HOST",
    )
]
ROWS += [
    refuse(
        "30-length-with-body",
        post(b"Connection: content-length", b"Content-Length: 5", body=b"hello"),
        "bad-connection",
    ),
    refuse("30-two-fields", get(b"Connection: x", b"Connection: host"), "bad-connection"),
]

# == 31. Chunk sizes =============================================================================================

ROWS += [
    relay(f"31-{name}", chunked(coded), Want(b"POST", body=body, fields=(b"Transfer-Encoding: chunked",)))
    for name, coded, body in (
        ("one", HELLO_CHUNKED, b"hello"), ("upper-case", b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
        ("lower-case", b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
        ("zeros", b"005\r\nhello\r\n0\r\n\r\n", b"hello"),
        ("terminator-00", b"5\r\nhello\r\n00\r\n\r\n", b"hello"), ("empty", b"0\r\n\r\n", b""),
        ("16-digits", b"0000000000000005\r\nhello\r\n0000000000000000\r\n\r\n", b"hello"),
        ("many", b"1\r\nh\r\n1\r\ne\r\n3\r\nllo\r\n0\r\n\r\n", b"hello"),
        ("crlf-inside", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    )
]  # fmt: skip
ROWS += [
    refuse(f"31-size-{name}", chunked(size + b"\r\nhello\r\n0\r\n\r\n"), "bad-chunk")
    for name, size in (
        ("0x5", b"0x5"), ("plus", b"+5"), ("minus", b"-1"), ("underscore", b"1_0"), ("space-before", b" 5"),
        ("space-behind", b"5 "), ("tab-before", b"\t5"), ("tab-behind", b"5\t"), ("empty", b""), ("letter", b"Z"),
        ("17-digits", b"00000000000000005"), ("quoted", b'"5"'), ("nul", b"5\0"), ("vt", b"\v5"), ("a0", b"5\xa0"),
        ("fullwidth", "\uff15".encode()), ("comma", b"5,5"), ("dot", b"5.0"), ("word", b"five"), ("h", b"5h"),
    )
]  # fmt: skip

# == 32. Chunk framing ===========================================================================================

ROWS += [
    refuse(f"32-{name}", chunked(coded), "bad-chunk")
    for name, coded in (
        ("lf-after-size", b"5\nhello\r\n0\r\n\r\n"), ("cr-after-size", b"5\rhello\r\n0\r\n\r\n"),
        ("lf-after-data", b"5\r\nhello\n0\r\n\r\n"), ("cr-after-data", b"5\r\nhello\r0\r\n\r\n"),
        ("lf-after-zero", b"5\r\nhello\r\n0\n\r\n"), ("cr-after-zero", b"5\r\nhello\r\n0\r\r\n"),
        ("cr-cr-lf", b"5\r\r\nhello\r\n0\r\n\r\n"), ("longer", b"5\r\nhello!\r\n0\r\n\r\n"),
        ("shorter", b"6\r\nhello\r\n0\r\n\r\n"), ("see-this", b"4\r\nSEE-THIS\r\n0\r\n\r\n"),
        ("no-end-of-data", b"5\r\nhello0\r\n\r\n"), ("lf-cr-after-data", b"5\r\nhello\n\r0\r\n\r\n"),
        ("empty-line-before-size", b"\r\n5\r\nhello\r\n0\r\n\r\n"),
        ("empty-line-after-data", b"5\r\nhello\r\n\r\n0\r\n\r\n"),
        ("x-after-zero", b"5\r\nhello\r\n0x\r\n\r\n"), ("request-behind-data", b"5\r\nhello\r\n" + EVIL),
    )
]  # fmt: skip
ROWS += [
    refuse(f"32-{name}", chunked(b"5\r\nhello\r\n0\r\n" + end), "bad-trailer")
    for name, end in (
        ("terminator-lf", b"\n"),
        ("terminator-cr-x", b"\rX"),
        ("terminator-cr-cr", b"\r\r"),
        ("nul", b"\0\r\n"),
    )
]
ROWS += [
    refuse("32-terminator-cr", chunked(b"5\r\nhello\r\n0\r\n\r"), "incomplete-request", end=True),
    refuse("32-terminator-none", chunked(b"5\r\nhello\r\n0\r\n"), "incomplete-request", end=True),
]

# == 33. Chunk extensions ========================================================================================

ROWS += [
    relay(f"33-{name}", chunked(b"5" + extension + b"\r\nhello\r\n0" + extension + b"\r\n\r\n"), POSTED)
    for name, extension in (
        ("name", b";a"), ("value", b";a=b"), ("quoted", b';a="b"'), ("two", b";a=b;c"),
        ("quoted-semicolon", b';a=";5"'),
        ("quoted-escape", b';a="\\""'), ("longest", b";" + b"x" * 255),
    )
]  # fmt: skip
ROWS += [
    refuse(f"33-{name}", chunked(b"5" + extension + b"\r\nhello\r\n0\r\n\r\n"), "bad-chunk")
    for name, extension in (
        ("nul", b";a=\0"), ("cr", b";a=\rb"), ("lf", b";a=\nb"), ("del", b";a=\x7f"), ("quoted-crlf", b';a="\r\n"'),
        ("unterminated", b';a="b'), ("quoted-nul", b';a="\0"'), ("too-long", b";" + b"x" * 256),
        ("far-too-long", b";" + b"x" * 9000),
        ("empty-name", b";"), ("no-value", b";a="), ("space", b" ;a"), ("space-behind", b";a "),
        ("space-inside", b"; a"),
        ("behind-quotes", b';a="b"c'), ("equals-first", b";=b"), ("comma", b",a"), ("two-cr", b";a\r\r"),
    )
]  # fmt: skip

# == 34. Trailer fields ==========================================================================================


def trailed(*lines: bytes) -> bytes:
    """`hello`, chunked, with these trailer lines."""
    return chunked(b"5\r\nhello\r\n0\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n")


DROPPED = Want(b"POST", body=b"hello", fields=(b"Transfer-Encoding: chunked",))
ROWS += [
    relay("34-one", trailed(b"X-Checksum: abc"), DROPPED),
    relay("34-two", trailed(b"X: y", b"X: z"), DROPPED),
    relay("34-looks-like-a-request-header", trailed(b"X-Opaque-Id: forged"), DROPPED),
    relay("34-100", trailed(*[b"X: y"] * 100), DROPPED),
    relay("34-announced", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n", b"Trailer: X"), DROPPED),
    refuse("34-101", trailed(*[b"X: y"] * 101), "trailers-too-large"),
    refuse("34-too-large", trailed(b"X: " + b"x" * 17_000), "trailers-too-large"),
    refuse("34-endless", chunked(b"0\r\n" + b"X: y\r\n" * 5000), "trailers-too-large"),
]
ROWS += [
    refuse(f"34-{line.partition(b':')[0].decode().lower()}", trailed(line), "bad-trailer")
    for line in (
        b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: b", b"Authorization: Basic " + SECRET,
        b"Content-Encoding: gzip",
        b"Content-Type: x/y", b"Connection: close", b"Expect: 100-continue", b"TE: trailers", b"Trailer: X",
    )
]  # fmt: skip
ROWS += [
    refuse("34-malformed-and-too-many", trailed(b": y", *[b"X: y"] * 101), "bad-trailer"),
    refuse("34-lf-and-too-many", trailed(b"X: y\nX: y", *[b"X: y"] * 101), "bad-trailer"),
    refuse("34-too-many-and-malformed", trailed(*[b"X: y"] * 101, b": y"), "trailers-too-large"),
    refuse("34-malformed-and-much-behind", trailed(b": y") + b"x" * 20_000, "bad-trailer"),
    refuse("34-no-colon", trailed(b"foo"), "bad-trailer"),
    refuse("34-request", trailed(b"GET /evil HTTP/1.1"), "bad-trailer"),
    refuse("34-space-before-colon", trailed(b"X : y"), "bad-trailer"),
    refuse("34-folded", trailed(b"X: y", b" z"), "bad-trailer"),
    refuse("34-space-first", trailed(b" X: y"), "bad-trailer"),
    refuse("34-nul", trailed(b"X: \0"), "bad-trailer"),
    refuse("34-cr", trailed(b"X: \ry"), "bad-trailer"),
    refuse("34-lf", trailed(b"X: y\nZ: z"), "bad-trailer"),
    refuse("34-empty-name", trailed(b": y"), "bad-trailer"),
    refuse("34-length-in-other-case", trailed(b"CONTENT-LENGTH: 5"), "bad-trailer"),
    refuse("34-host-in-other-case", trailed(b"X: y", b"hOST: b"), "bad-trailer"),
    relay("34-underscore-length", trailed(b"Content_Length: 5"), DROPPED),
]

# == 35. Chunked bodies without an end, of many chunks, over the limit ============================================

ROWS += [
    refuse(f"35-ends-{name}", chunked(coded), "incomplete-request", end=True)
    for name, coded in (
        ("without-a-byte", b""), ("in-a-size", b"5"), ("after-cr", b"5\r"), ("after-size", b"5\r\n"),
        ("in-data", b"5\r\nhel"),
        ("after-data", b"5\r\nhello"), ("after-data-cr", b"5\r\nhello\r"), ("before-zero", b"5\r\nhello\r\n"),
        ("after-zero", b"5\r\nhello\r\n0"), ("after-zero-line", b"0\r\n"), ("in-a-trailer", b"0\r\nX: y\r\n"),
    )
]  # fmt: skip
ROWS += [
    refuse("35-one-chunk-over-the-limit", chunked(b"%x\r\n" % (MAX_BODY + 1)), "body-too-large"),
    refuse("35-sum-over-the-limit", chunked(b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n"), "body-too-large"),
    refuse("35-2-to-64-minus-1", chunked(b"FFFFFFFFFFFFFFFF\r\n" + EVIL), "body-too-large"),
    relay("35-at-the-limit", chunked(b"%x\r\n" % MAX_BODY + b"x" * MAX_BODY + b"\r\n0\r\n\r\n"),
          Want(b"POST", body=b"x" * MAX_BODY)),
    relay("35-1000-chunks", chunked(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n"), Want(b"POST", body=b"x" * 1000)),
]  # fmt: skip


def test_35_a_million_chunks_of_one_byte_take_linear_time(tmp_path: Path) -> None:
    """Quadratic work on 6 MB would not end while anybody waits; a tenth of it goes through the proxy as well."""
    data = chunked(b"1\r\nx\r\n" * 1_000_000 + b"0\r\n\r\n")
    reader = es_proxy.RequestReader(PARSER_LIMITS, 2 * MIB, es_proxy.MemoryBudget(64 * MIB))
    for start in range(0, len(data), 7001):
        assert (request := reader.next()) is None
        reader.feed(data[start : start + 7001])
    request = reader.next()
    assert request is not None and request.body is not None and request.body.whole() == b"x" * 1_000_000
    with laboratory(tmp_path, max_body_bytes=2 * MIB) as lab, lab.client() as client:
        client.send(chunked(b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"))
        reply = client.next()
        (seen,), ((recorded, _),) = lab.news()
    assert reply is not None and reply.status == 200
    assert seen.body == recorded.body == b"x" * 100_000


# == 36. Expect: 100-continue ====================================================================================

EXPECT = b"Expect: 100-continue"
ROWS += [
    relay("36-with-the-body", post(EXPECT, b"Content-Length: 5", body=b"hello"),
          Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",))),
    relay("36-other-case", post(b"expect: 100-Continue", b"Content-Length: 5", body=b"hello"),
          Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",))),
    relay("36-chunked", chunked(HELLO_CHUNKED, EXPECT), DROPPED),
    relay("36-without-a-body", get(EXPECT), Want(fields=())),
    refuse("36-too-large", post(EXPECT, b"Content-Length: %d" % (MAX_BODY + 1), body=EVIL), "body-too-large"),
    refuse("36-bad-framing", post(EXPECT, b"Content-Length: +5", body=b"hello"), "bad-framing"),
]  # fmt: skip


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"], ids=["length", "chunked"])
def test_36_the_proxy_answers_100_itself_once_the_head_is_acceptable(lab: Lab, framing: bytes) -> None:
    """Nothing has gone upstream, and nothing is on record, when the client is told to go on."""
    with lab.client() as client:
        client.send(post(EXPECT, framing))
        assert client.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert lab.news() == ([], [])
        client.send(b"hello" if framing == b"Content-Length: 5" else HELLO_CHUNKED)
        reply = client.next()
    (seen,), _ = lab.news()
    assert reply is not None and (reply.status, reply.interim) == (200, [])
    assert seen.body == b"hello" and seen.lines == (framing,)


def test_36_no_100_for_what_is_refused(lab: Lab) -> None:
    """Too large: 413 at once, and what comes instead of a body is not read as a request."""
    head = post(EXPECT, b"Content-Length: %d" % (MAX_BODY + 1))
    with lab.client() as client:
        client.send(head)
        reply = client.next()
        client.send(EVIL)
        assert client.rest() == b""
    seen, (pair,) = lab.news()
    assert not seen and reply is not None and reply.interim == []
    check_refused("body-too-large", 413, head, reply, pair)


# == 37. Other expectations ======================================================================================

ROWS += [
    refuse(f"37-{name}", post(*lines, b"Content-Length: 5", body=b"hello"), "bad-expectation")
    for name, lines in (
        ("word", (b"Expect: x",)), ("list", (b"Expect: 100-continue, x",)), ("twice", (EXPECT, EXPECT)),
        ("empty", (b"Expect:",)),
        ("parameter", (b"Expect: 100-continue;q=1",)), ("200-ok", (b"Expect: 200-ok",)),
        ("two", (EXPECT, b"Expect: x")),
    )
]  # fmt: skip
ROWS += [
    refuse("37-folded", post(b"Expect:", b" 100-continue", b"Content-Length: 5", body=b"hello"), "bad-field"),
    relay("37-in-1.0", post(EXPECT, b"Content-Length: 5", body=b"hello", version=b"1.0"),
          Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",)), closes=True),
    relay("37-other-in-1.0", post(b"Expect: x", b"Content-Length: 5", body=b"hello", version=b"1.0"),
          Want(b"POST", body=b"hello", fields=(b"Content-Length: 5",)), closes=True),
]  # fmt: skip

# == 38. The upstream answers before it has the whole body =======================================================


@pytest.mark.parametrize("status", [413, 429, 401])
@pytest.mark.parametrize("then", ["closes", "waits", "resets"])
def test_38_an_early_answer_is_relayed_and_sending_stops(tmp_path: Path, status: int, then: str) -> None:
    """The upstream reads the head only; its answer comes through, its connection is thrown away, the client's isn't."""
    size = 32 * MIB
    with laboratory(tmp_path, threads=1) as lab, lab.client() as client:
        released = threading.Event()

        def early(incoming: Incoming, seen: Seen) -> bool:
            lab.upstream.answer = answer_own
            lab.upstream.head_only = False
            incoming.sock.sendall(b"HTTP/1.1 %d Early\r\nContent-Length: 2\r\n\r\n{}" % status)
            if then == "waits":  # The body fills the socket's buffers, until the proxy gives the connection up.
                assert released.wait(PATIENCE)
            elif then == "resets":
                assert released.wait(PATIENCE)
                reset(incoming.sock)
            else:
                incoming.sock.shutdown(socket.SHUT_WR)
                assert released.wait(PATIENCE)
            return False

        lab.upstream.answer = early
        lab.upstream.head_only = True
        client.send(post(b"Content-Length: %d" % size), b"x" * size)
        reply = client.next()
        released.set()
        assert reply is not None and (reply.status, reply.body) == (status, b"{}")
        client.send(get())
        after = client.next()
        assert after is not None and after.status == 200
        seen, ((request, response), _) = lab.news()
        assert len(request.body) == size and response.status == status
        assert seen[0].connection != seen[1].connection


# == 39. Hop-by-hop fields of requests ===========================================================================

ROWS += [
    relay(f"39-{line.partition(b':')[0].decode().lower()}", get(b"A: 1", line, b"B: 2"),
          Want(fields=(b"A: 1", b"B: 2")))
    for line in (
        b"Connection: keep-alive", b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: trailers",
        b"Upgrade: h2c", b"Trailer: X", b"Proxy-Authorization: Basic eA==", b"HTTP2-Settings: AAMAAABk",
    )
]  # fmt: skip
ROWS += [
    relay("39-named-in-connection", get(b"Connection: X-A, x-b", b"X-A: 1", b"X-B: 2", b"X-C: 3"),
          Want(fields=(b"X-C: 3",))),
    relay("39-named-twice", get(b"Connection: X-A", b"X-A: 1", b"Connection: X-B", b"X-B: 2"), Want(fields=())),
    relay("39-named-but-absent", get(b"Connection: X-A", b"X-B: 2"), Want(fields=(b"X-B: 2",))),
    relay("39-upgrade-is-not-honoured", get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x"),
          Want(fields=(b"Sec-WebSocket-Key: x",))),
    relay("39-empty-list", get(b"Connection: ,, ,", b"X: y"), Want(fields=(b"X: y",))),
]  # fmt: skip

# == 40. Max-Forwards, Via, HTTP/1.0 =============================================================================

ROWS += [
    refuse("40-options-0", ask(b"OPTIONS * HTTP/1.1", b"Max-Forwards: 0"), "max-forwards"),
    refuse("40-options-0-path", ask(b"OPTIONS /a HTTP/1.1", b"Max-Forwards: 0"), "max-forwards"),
    relay(
        "40-options-5",
        ask(b"OPTIONS * HTTP/1.1", b"Max-Forwards: 5"),
        Want(b"OPTIONS", b"*", fields=(b"Max-Forwards: 4",)),
    ),
    relay("40-get-0", get(b"Max-Forwards: 0"), Want(fields=(b"Max-Forwards: 0",))),
    relay("40-via-is-kept-not-added", get(b"Via: 1.1 x"), Want(fields=(b"Via: 1.1 x",))),
    relay("40-no-via", get(), Want(fields=())),
    relay("40-1.0", ask(b"GET / HTTP/1.0"), Want(fields=()), closes=True),
    relay("40-1.0-keep-alive", ask(b"GET / HTTP/1.0", b"Connection: Keep-Alive"), Want(fields=())),
    relay("40-1.1-close", get(b"Connection: CLOSE"), Want(fields=()), closes=True),
]

# == 41. Host, Accept-Encoding, Authorization ====================================================================

ROWS += [
    relay(
        "41-host-keeps-its-place",
        ask(b"GET / HTTP/1.1", b"Host: other:9200", b"B: 2", host=b"A: 1"),
        Want(fields=(b"A: 1", b"B: 2")),
    ),
    relay("41-nothing-is-added", get(), Want(fields=())),
    relay("41-accept-encoding-is-kept", get(b"Accept-Encoding: br"), Want(fields=(b"Accept-Encoding: br",))),
    relay(
        "41-authorization", get(b"Authorization: Basic " + SECRET), Want(fields=(b"Authorization: Basic " + SECRET,))
    ),
    refuse("41-authorization-refused", get(b"Authorization: Basic " + SECRET, b"Host: b"), "bad-host"),
    refuse("41-authorization-bad-chunk", chunked(b"Z\r\n", b"Authorization: Basic " + SECRET), "bad-chunk"),
]


# == All rows of 1 to 41 =========================================================================================


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_request(lab: Lab, row: Row) -> None:
    """One row of the tables above, through the parser alone in all splits, and through the proxy in four ways."""
    whole = parse_requests([row.data])
    for pieces in splits(row.data, row.id):
        assert parse_requests(pieces) == whole
    for way in WAYS:
        if way != "followed" or not row.end:  # Behind a stream's end nothing follows.
            with lab.alone():
                try_row(lab, row, way)


# == How a response is tried =====================================================================================


@dataclasses.dataclass(frozen=True)
class Response:
    """One response case: the upstream's bytes, what it does then, and what becomes of it."""

    id: str
    raw: bytes
    outcome: str  # relay, bad, abort
    method: bytes = b"GET"
    then: str = "wait"  # the upstream waits for more, closes, or resets
    status: int = 200
    body: bytes = b""
    fields: tuple[bytes, ...] | None = None  # the client's field lines, when the case is about them
    reused: bool = True  # the upstream connection carries the next request
    code: str = ""
    reason: bytes | None = None


def answer(*fields: bytes, body: bytes = b"", line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """A response: its line, its field lines, its body."""
    return b"".join(item + b"\r\n" for item in (line, *fields)) + b"\r\n" + body


def sized(body: bytes, *fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """A response with a Content-Length."""
    return answer(b"Content-Length: %d" % len(body), *fields, body=body, line=line)


def coded(body: bytes, *fields: bytes) -> bytes:
    """A response with `body` as the bytes of its chunked coding."""
    return answer(b"Transfer-Encoding: chunked", *fields, body=body)


def relayed(case: str, raw: bytes, body: bytes = b"", **more: Any) -> Response:
    """A row whose response reaches the client with `body`, and whose connection is used again unless said otherwise."""
    return Response(case, raw, "relay", body=body, **more)


def bad(
    case: str, raw: bytes, then: str = "wait", code: str = "upstream-malformed", method: bytes = b"GET"
) -> Response:
    """A row for which the client gets 502 before a byte of the upstream's, and the connection is thrown away."""
    return Response(case, raw, "bad", method, then, 502, reused=False, code=code)


def abort(case: str, raw: bytes, code: str, then: str = "wait") -> Response:
    """A row whose response breaks inside its body: cut off, or 502 when nothing of it was sent yet."""
    return Response(case, raw, "abort", then=then, reused=False, code=code)


RESPONSES: list[Response] = []


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The proxy that the response tables run through; one thread, so that its upstream connection is the same again."""
    with shared_laboratory(tmp_path_factory.mktemp("stage"), threads=1) as stage:
        yield stage


def scripted(row: Response, way: str, done: threading.Event) -> Answer:
    """What the upstream does: `row` for /case, its own answer for the request behind it."""
    rng = random.Random(f"{row.id} {way}")

    def answer_as_scripted(incoming: Incoming, seen: Seen) -> bool:
        if seen.target != b"/case":
            return answer_own(incoming, seen)
        try:
            for piece in split(row.raw, way, rng):
                incoming.sock.sendall(piece)
        except OSError:
            pass  # The proxy has given this up; that is what the case is about.
        finally:
            done.set()
        if row.then == "reset":
            reset(incoming.sock)
        return row.then == "wait"

    return answer_as_scripted


def try_response(stage: Lab, row: Response, way: str) -> None:
    """Play a row one way, then ask for something else on the same client connection, or a new one if it was cut."""
    done = threading.Event()
    stage.upstream.answer = scripted(row, way, done)
    with stage.client() as client:
        client.send(ask(row.method + b" /case HTTP/1.1"))
        reply = client.next(row.method)
        assert done.wait(PATIENCE)
        assert reply is not None, "no answer at all"
        if reply.complete:
            check_next_answer(client)
            client.finish()
        assert client.rest() == b""
    if not reply.complete:
        with stage.client() as client:
            check_next_answer(client)
    seen, ((_, response), (_, after)) = stage.news()
    assert [item.target for item in seen] == [b"/case", b"/next"]
    assert (seen[0].connection == seen[1].connection) == row.reused, "whether the upstream connection was used again"
    assert after.status == 200 and not after.marks
    assert "Attempts" not in response.marks
    check_outcome(row, reply, response)


def check_next_answer(client: Client) -> None:
    """The next request gets its own answer."""
    client.send(ask(b"GET /next HTTP/1.1"))
    reply = client.next()
    assert reply is not None and reply.complete and reply.status == 200
    assert json.loads(reply.body)["target"] == "/next"


def check_outcome(row: Response, reply: Reply, response: Record) -> None:
    """What the client got and what is on record, for each of the three outcomes."""
    assert response.status == reply.status
    if row.outcome == "relay":
        assert reply.complete and (reply.status, reply.body) == (row.status, row.body)
        assert response.size == len(row.body) and not response.marks and reply.interim == []
        if row.fields is not None:
            assert tuple(name + b": " + value for name, value in reply.fields) == row.fields
        if row.reason is not None:
            assert reply.reason == row.reason
        return
    assert response.marks == {"Error": row.code}
    if reply.complete or row.outcome == "bad":
        assert reply.complete and reply.status == 502
        if row.method != b"HEAD":
            document = json.loads(reply.body)
            assert (document["status"], document["error"]["code"]) == (502, row.code)
    else:
        assert reply.status == 200 and response.size == len(reply.body)


# == 42. Framing of responses that two parsers could read differently ============================================

RESPONSES += [
    bad(f"42-length-{name}", answer(b"Content-Length: " + value, body=b"hello"))
    for name, value in (
        ("word", b"foo"), ("plus", b"+5"), ("underscore", b"1_0"), ("minus", b"-1"), ("empty", b""),
        ("list-equal", b"5, 5"),
        ("list-different", b"5, 6"), ("two-words", b"5 5"), ("hex", b"0x5"), ("fraction", b"5.0"), ("semicolon", b"5;"),
        ("quoted", b'"5"'), ("superscript", "\u00b2".encode()), ("a0", b"\xa05"), ("5000-digits", b"9" * 5000),
        ("vt", b"\v5"), ("21-digits", b"1" + b"0" * 20),
    )
]  # fmt: skip
RESPONSES += [
    bad(f"42-coding-{name}", answer(b"Transfer-Encoding: " + value, body=HELLO_CHUNKED))
    for name, value in (
        ("gzip", b"gzip"), ("unknown", b"xchunked"), ("doubled", b"chunked, chunked"), ("list", b"gzip, chunked"),
        ("identity", b"identity"), ("empty", b""), ("comma-before", b",chunked"), ("comma-behind", b"chunked,"),
        ("vt", b"\vchunked"),
        ("a0", b"\xa0chunked"), ("quoted", b'"chunked"'), ("extension", b"chunked;x=y"),
    )
]  # fmt: skip
RESPONSES += [
    bad("42-two-equal-lengths", answer(b"Content-Length: 5", b"Content-Length: 5", body=b"hello")),
    bad("42-two-different-lengths", answer(b"Content-Length: 5", b"content-length: 6", body=b"hello")),
    bad("42-two-codings", coded(HELLO_CHUNKED, b"Transfer-Encoding: chunked")),
    bad("42-length-and-coding", coded(HELLO_CHUNKED, b"Content-Length: 15")),
    bad("42-coding-and-length", answer(b"Content-Length: 15", b"Transfer-Encoding: chunked", body=HELLO_CHUNKED)),
    bad("42-coding-in-1.0", answer(b"Transfer-Encoding: chunked", body=HELLO_CHUNKED, line=b"HTTP/1.0 200 OK")),
    relayed("42-length", sized(b"hello"), b"hello", fields=(b"Content-Length: 5",)),
    relayed("42-length-0", sized(b"")),
    relayed("42-chunked", coded(HELLO_CHUNKED), b"hello", fields=(b"Transfer-Encoding: chunked",)),
    relayed("42-chunked-in-capitals", answer(b"Transfer-Encoding: CHUNKED", body=HELLO_CHUNKED), b"hello"),
    relayed("42-chunked-with-trailers", coded(b"5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n"), b"hello"),
    relayed("42-chunked-empty", coded(b"0\r\n\r\n")),
    relayed("42-no-space", answer(b"Content-Length:5", body=b"hello"), b"hello"),
]

# == 43. Bodies that break off ===================================================================================

RESPONSES += [
    abort(f"43-{name}-{then}s", raw, f"upstream-{'reset' if then == 'reset' else 'closed'}", then)
    for then in ("close", "reset")
    for name, raw in (
        ("5-of-50", answer(b"Content-Length: 50", body=b"hello")), ("0-of-50", answer(b"Content-Length: 50")),
        ("49-of-50", answer(b"Content-Length: 50", body=b"x" * 49)), ("no-last-chunk", coded(b"5\r\nhello\r\n")),
        ("in-a-chunk", coded(b"5\r\nhel")), ("in-a-size", coded(b"5\r\nhello\r\n5")),
        ("in-the-end", coded(b"5\r\nhello\r\n0\r\n")),
        ("in-the-end-cr", coded(b"5\r\nhello\r\n0\r\n\r")), ("no-chunk", coded(b"")),
    )
]  # fmt: skip
RESPONSES += [
    abort(f"43-chunk-{name}", coded(b"5\r\nhello\r\n" + chunk + b"\r\n0\r\n\r\n"), "upstream-malformed")
    for name, chunk in (
        ("hex-prefix", b"0x5\r\nhello"), ("plus", b"+5\r\nhello"), ("minus", b"-1\r\nhello"), ("empty", b"\r\nhello"),
        ("underscore", b"1_0\r\nhello"), ("space", b" 5\r\nhello"), ("17-digits", b"0" * 16 + b"5\r\nhello"),
        ("letter", b"Z\r\n"),
        ("data-too-long", b"4\r\nhello"), ("data-too-short", b"6\r\nhello"), ("lf-after-size", b"5\nhello"),
        ("cr", b"5\rhello"),
        ("long-extension", b"5;" + b"x" * 300 + b"\r\nhello"),
    )
]  # fmt: skip
RESPONSES += [
    abort("43-bad-trailer", coded(b"5\r\nhello\r\n0\r\nfoo\r\n\r\n"), "upstream-malformed"),
    abort("43-length-in-trailer", coded(b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n"), "upstream-malformed"),
]

# == 44. Interim responses =======================================================================================

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
RESPONSES += [
    relayed("44-100", CONTINUE + sized(b"hello"), b"hello"),
    relayed("44-102", b"HTTP/1.1 102 Processing\r\n\r\n" + sized(b"hello"), b"hello"),
    relayed("44-103", HINTS + sized(b"hello"), b"hello"),
    relayed("44-all-three", CONTINUE + b"HTTP/1.1 102 Processing\r\n\r\n" + HINTS + coded(HELLO_CHUNKED), b"hello"),
    relayed("44-with-a-length", b"HTTP/1.1 103 x\r\nContent-Length: 5\r\n\r\n" + sized(b"hello"), b"hello"),
    relayed("44-32", HINTS * 32 + sized(b"hello"), b"hello"),
    relayed("44-head", HINTS + answer(b"Content-Length: 5"), method=b"HEAD"),
    relayed("44-204", HINTS + answer(line=b"HTTP/1.1 204 No Content"), status=204),
    bad("44-33", HINTS * 33 + sized(b"hello")),
    bad("44-101", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    bad("44-101-behind-100", CONTINUE + b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + sized(b"hello")),
    bad("44-malformed", b"HTTP/1.1 100 Continue\r\nfoo\r\n\r\n" + sized(b"hello")),
    bad("44-nothing-behind", CONTINUE, "close", "upstream-closed"),
    bad("44-nothing-behind-reset", CONTINUE * 2, "reset", "upstream-reset"),
    relayed("44-behind-the-response", sized(b"hello") + CONTINUE, b"hello", reused=False),
    relayed("44-behind-a-chunked-response", coded(HELLO_CHUNKED) + HINTS, b"hello", reused=False),
]


@pytest.mark.parametrize("greeting", [CONTINUE, HINTS * 3, CONTINUE[:9]], ids=["100", "three-103", "a-part-of-100"])
def test_44_an_interim_response_may_come_before_the_request_was_read(tmp_path: Path, greeting: bytes) -> None:
    """It is skipped, and the request behind it gets its own answer, on the same upstream connection."""
    with laboratory(tmp_path, threads=1) as lab, lab.client() as client:
        lab.upstream.greeting = greeting
        rest = CONTINUE[9:] if greeting == CONTINUE[:9] else b""

        def answer_behind(incoming: Incoming, seen: Seen) -> bool:
            lab.upstream.answer = answer_own
            incoming.sock.sendall(rest + own_answer(seen))
            return True

        lab.upstream.answer = answer_behind
        for number in range(2):
            client.send(ask(b"GET /%d HTTP/1.1" % number))
            reply = client.next()
            assert reply is not None and reply.status == 200
            assert json.loads(reply.body)["target"] == f"/{number}"
        seen, _ = lab.news()
        # Told before it had asked, the proxy may not trust the connection any more; it never mixes the answers up.
        assert len(seen) == 2


# == 45. Bytes behind a complete response ========================================================================

FORGED = sized(b'{"target":"forged"}')
RESPONSES += [
    relayed(f"45-{name}", raw + extra, body, reused=False)
    for name, raw, body, extra in (
        ("length-and-a-response", sized(b"hello"), b"hello", FORGED),
        ("length-and-a-byte", sized(b"hello"), b"hello", b"x"),
        ("length-and-crlf", sized(b"hello"), b"hello", b"\r\n"),
        ("chunked-and-a-response", coded(HELLO_CHUNKED), b"hello", FORGED),
        ("chunked-and-a-byte", coded(HELLO_CHUNKED), b"hello", b"\0"),
        ("empty-and-a-response", sized(b""), b"", FORGED),
    )
]  # fmt: skip


@pytest.mark.parametrize("extra", [FORGED, b"x", b"\r\n", CONTINUE], ids=["response", "byte", "crlf", "interim"])
@pytest.mark.parametrize("raw", [sized(b"hello"), coded(HELLO_CHUNKED)], ids=["length", "chunked"])
def test_45_bytes_that_come_later_are_never_the_next_answer(stage: Lab, raw: bytes, extra: bytes) -> None:
    """They come when the client has its response already: the connection is found readable, and thrown away."""
    has_response, extra_sent = threading.Event(), threading.Event()

    def late(incoming: Incoming, _: Seen) -> bool:
        stage.upstream.answer = answer_own
        incoming.sock.sendall(raw)
        assert has_response.wait(PATIENCE)
        incoming.sock.sendall(extra)
        extra_sent.set()
        return True

    stage.upstream.answer = late
    with stage.client() as client:
        client.send(ask(b"GET /case HTTP/1.1"))
        reply = client.next()
        assert reply is not None and reply.body == b"hello"
        has_response.set()
        assert extra_sent.wait(PATIENCE)
        check_next_answer(client)
    seen, ((_, first), (_, second)) = stage.news()
    assert seen[0].connection != seen[1].connection
    assert not first.marks and not second.marks


# == 46. Responses that have no body, whatever they say ==========================================================

RESPONSES += [
    relayed("46-204", answer(line=b"HTTP/1.1 204 No Content"), status=204, fields=()),
    relayed("46-204-with-body", sized(b"hello", line=b"HTTP/1.1 204 No Content"), status=204, fields=(), reused=False),
    relayed("46-204-length-0", sized(b"", line=b"HTTP/1.1 204 No Content"), status=204, fields=()),
    relayed("46-204-chunked", answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 No Content",
                                     body=HELLO_CHUNKED),
            status=204, fields=(), reused=False),
    relayed("46-304", answer(b"ETag: x", line=b"HTTP/1.1 304 Not Modified"), status=304, fields=(b"ETag: x",)),
    relayed("46-304-length", answer(b"Content-Length: 5", line=b"HTTP/1.1 304 Not Modified"), status=304,
            fields=(b"Content-Length: 5",)),
    relayed("46-304-with-body", sized(b"hello", line=b"HTTP/1.1 304 Not Modified"), status=304, reused=False),
    relayed("46-304-chunked", answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 304 Not Modified"), status=304,
            fields=()),
    relayed("46-304-chunked-with-body", answer(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 304 x",
                                               body=HELLO_CHUNKED),
            status=304, fields=(), reused=False),
    relayed("46-head", answer(b"Content-Length: 5"), method=b"HEAD", fields=(b"Content-Length: 5",)),
    relayed("46-head-large", answer(b"Content-Length: 1000000000000"), method=b"HEAD",
            fields=(b"Content-Length: 1000000000000",)),
    relayed("46-head-chunked", answer(b"Transfer-Encoding: chunked"), method=b"HEAD",
            fields=(b"Transfer-Encoding: chunked",)),
    relayed("46-head-without-framing", answer(b"X: y"), method=b"HEAD", fields=(b"X: y",)),
    relayed("46-head-with-body", sized(b"hello"), method=b"HEAD", fields=(b"Content-Length: 5",), reused=False),
    relayed("46-head-with-chunked-body", coded(HELLO_CHUNKED), method=b"HEAD", reused=False),
    relayed("46-head-404", answer(b"Content-Length: 5", line=b"HTTP/1.1 404 Not Found"), method=b"HEAD", status=404),
    bad("46-head-bad-length", answer(b"Content-Length: +5"), method=b"HEAD"),
]  # fmt: skip

# == 47. Status lines and fields that are malformed ==============================================================

RESPONSES += [
    bad(f"47-line-{name}", sized(b"hello", line=line))
    for name, line in (
        ("plus", b"HTTP/1.1 +200 OK"), ("underscore", b"HTTP/1.1 2_00 OK"), ("http-2", b"HTTP/2 200 OK"),
        ("http-2.0", b"HTTP/2.0 200 OK"),
        ("http-0.9", b"HTTP/0.9 200 OK"), ("lower-case", b"http/1.1 200 OK"), ("icy", b"ICY 200 OK"),
        ("two-digits", b"HTTP/1.1 20 OK"),
        ("four-digits", b"HTTP/1.1 2000 OK"), ("000", b"HTTP/1.1 000 OK"), ("600", b"HTTP/1.1 600 OK"),
        ("word", b"HTTP/1.1 OK"),
        ("two-spaces", b"HTTP/1.1  200 OK"), ("tab", b"HTTP/1.1\t200 OK"),
        ("no-space-before-reason", b"HTTP/1.1 200OK"),
        ("nul-in-reason", b"HTTP/1.1 200 O\0K"), ("cr-in-reason", b"HTTP/1.1 200 O\rK"),
        ("lf-in-reason", b"HTTP/1.1 200 O\nK"),
        ("minor-of-two-digits", b"HTTP/1.11 200 OK"), ("leading-space", b" HTTP/1.1 200 OK"),
        ("superscript", "HTTP/1.1 20\u00b2 OK".encode()),
        ("request", b"GET / HTTP/1.1"), ("html", b"<html>"), ("empty-line-first", b"\r\nHTTP/1.1 200 OK"),
        ("minus", b"HTTP/1.1 -20 OK"),
    )
]  # fmt: skip
RESPONSES += [
    bad(f"47-field-{name}", sized(b"hello", line))
    for name, line in (
        ("no-colon", b"foo"), ("space-before-colon", b"X : y"), ("tab-before-colon", b"X\t: y"), ("nul", b"X: \0"),
        ("cr", b"X: a\rb"),
        ("folded", b"X: a\r\n b"), ("folded-tab", b"X: a\r\n\tb"), ("empty-name", b": y"), ("lf", b"X: a\nY: b"),
        ("del", b"X: \x7f"),
        ("space-line", b" "), ("control", b"X: \x01"), ("a0-in-name", b"X\xa0: y"), ("space-in-name", b"X Y: z"),
        ("vt", b"X: \v"),
    )
]  # fmt: skip
RESPONSES += [
    bad("47-lf-only", b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello"),
    bad("47-folded-first", answer(b" X: y", b"Content-Length: 0")),
    bad("47-http-0.9-body", b"hello\r\n"),
    bad("47-binary", b"\x15\x03\x01\x00\x02\x02\x28"),
    bad("47-nothing", b"", "close", "upstream-closed", b"POST"),
    bad("47-nothing-reset", b"", "reset", "upstream-reset", b"POST"),
    bad("47-half-a-line", b"HTTP/1.1 20", "close", "upstream-closed"),
    bad("47-half-a-head", b"HTTP/1.1 200 OK\r\nContent-Le", "close", "upstream-closed"),
    bad("47-no-empty-line", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n", "close", "upstream-closed"),
    relayed("47-no-reason", sized(b"hello", line=b"HTTP/1.1 200"), b"hello"),
    relayed("47-empty-reason", sized(b"hello", line=b"HTTP/1.1 200 "), b"hello"),
    relayed("47-599", sized(b"hello", line=b"HTTP/1.1 599 x"), b"hello", status=599),
]

# == 48. Large heads, and lengths that nothing follows ===========================================================

MANY_WARNINGS = tuple(b'Warning: 299 Elasticsearch-8 "[%d] is deprecated"' % number for number in range(200))
RESPONSES += [
    relayed("48-200-fields", sized(b"hello", *MANY_WARNINGS), b"hello", fields=(b"Content-Length: 5", *MANY_WARNINGS)),
    relayed(
        "48-1000-fields",
        answer(*[b"X: y"] * 999, b"Content-Length: 0"),
        fields=(*[b"X: y"] * 999, b"Content-Length: 0"),
    ),
    relayed("48-60-kb-value", sized(b"", b"X: " + b"x" * 60_000)),
    bad("48-1001-fields", answer(*[b"X: y"] * 1000, b"Content-Length: 0")),
    bad("48-65-kib-line", sized(b"hello", b"X: " + b"x" * 65 * KIB)),
    bad("48-65-kib-status-line", sized(b"hello", line=b"HTTP/1.1 200 " + b"x" * 65 * KIB)),
    bad("48-65-kib-without-an-end", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 65 * KIB),
    bad("48-many-fields-without-an-end", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 11_000),
]


def resident_bytes(pid: int | str = "self") -> int:
    """What a process has in memory now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("no VmRSS")


def test_48_endless_fields_are_given_up_in_bounded_memory(stage: Lab) -> None:
    """The upstream would go on for ever; it is cut off."""
    sent = 0

    def endless(incoming: Incoming, _: Seen) -> bool:
        nonlocal sent
        stage.upstream.answer = answer_own
        try:
            incoming.sock.sendall(b"HTTP/1.1 200 OK\r\n")
            while sent < 1 << 40:
                incoming.sock.sendall(b"X: y\r\n" * 1000)
                sent += 6000
        except OSError:
            return False
        raise AssertionError("nobody stops this")

    stage.upstream.answer = endless
    before = resident_bytes()
    with stage.client() as client:
        client.send(ask(b"GET /case HTTP/1.1"))
        reply = client.next()
        assert reply is not None and reply.status == 502
        check_next_answer(client)
    assert resident_bytes() - before < 16 * MIB
    _, ((_, response), _) = stage.news()
    assert response.marks == {"Error": "upstream-malformed"}


def test_48_a_huge_length_costs_no_memory(tmp_path: Path) -> None:
    """Content-Length 10^12, a little data, then silence: 504 is too late, so it is cut off after --upstream-timeout."""
    with laboratory(tmp_path, upstream_timeout_seconds=0.6) as lab, lab.client() as client:
        quiet = threading.Event()

        def promise(incoming: Incoming, _: Seen) -> bool:
            incoming.sock.sendall(answer(b"Content-Length: 1000000000000", body=b"hello"))
            assert quiet.wait(PATIENCE)
            return False

        lab.upstream.answer = promise
        before = resident_bytes()
        client.send(get())
        reply = client.next()
        quiet.set()
        assert reply is not None and not reply.complete and reply.body == b"hello"
        assert resident_bytes() - before < 16 * MIB
        _, ((_, response),) = lab.news()
        assert response.status == 200 and response.marks == {"Error": "upstream-timeout"}


# == 49. Responses that end with their connection ================================================================

RESPONSES += [
    relayed(
        "49-until-close",
        answer(body=b"hello"),
        b"hello",
        then="close",
        fields=(b"Transfer-Encoding: chunked",),
        reused=False,
    ),
    relayed("49-until-close-empty", answer(b"X: y"), then="close", reused=False),
    relayed(
        "49-connection-close",
        sized(b"hello", b"Connection: close"),
        b"hello",
        fields=(b"Content-Length: 5",),
        reused=False,
    ),
    relayed("49-1.0-length", sized(b"hello", line=b"HTTP/1.0 200 OK"), b"hello", reused=False),
    relayed(
        "49-1.0-keep-alive", sized(b"hello", b"Connection: keep-alive", line=b"HTTP/1.0 200 OK"), b"hello", reused=True
    ),
    relayed("49-1.0-until-close", answer(body=b"hello", line=b"HTTP/1.0 200 OK"), b"hello", then="close", reused=False),
    relayed("49-until-close-looks-chunked", answer(body=HELLO_CHUNKED), HELLO_CHUNKED, then="close", reused=False),
    abort("49-until-close-reset", answer(body=b"hello"), "upstream-reset", "reset"),
]


@dataclasses.dataclass
class Certificates:
    """A server's TLS context, and the file of the CA that vouches for 127.0.0.1."""

    server: ssl.SSLContext
    ca: str
    cert: str
    key: str


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made for this module."""
    trustme = pytest.importorskip("trustme", reason="certificates are made with trustme")
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(context)
    made = Certificates(context, *(str(directory / name) for name in ("ca.pem", "cert.pem", "key.pem")))
    authority.cert_pem.write_to_path(made.ca)
    issued.private_key_pem.write_to_path(made.key)
    for blob in issued.cert_chain_pems:
        blob.write_to_path(made.cert, append=True)
    return made


@pytest.mark.parametrize(
    ("raw", "notify", "complete"),
    [
        (answer(body=b"hello"), True, True),
        (answer(body=b"hello"), False, False),
        (sized(b"hello"), False, True),
        (coded(HELLO_CHUNKED), False, True),
        (coded(b"5\r\nhello\r\n"), True, False),
        (answer(b"Content-Length: 50", body=b"hello"), True, False),
        (answer(b"Content-Length: 50", body=b"hello"), False, False),
    ],
    ids=[
        "until-close-notify",
        "until-close-cut",
        "length-cut",
        "chunked-cut",
        "chunked-notify",
        "short-notify",
        "short-cut",
    ],
)
def test_49_the_end_of_a_tls_stream_must_be_said(
    tmp_path: Path, certificates: Certificates, raw: bytes, notify: bool, complete: bool
) -> None:
    """A body that ends with its connection is whole only when close_notify came: anybody can cut a TCP connection."""

    def say_and_leave(incoming: Incoming, _: Seen) -> bool:
        incoming.sock.sendall(raw)
        if notify:
            assert isinstance(incoming.sock, ssl.SSLSocket)
            with contextlib.suppress(OSError):
                incoming.sock.unwrap()
        return False

    with laboratory(tmp_path, certificates.server, upstream_tls=True, ca=certificates.ca) as lab:
        lab.upstream.answer = say_and_leave
        with lab.client() as client:
            client.send(get())
            reply = client.next()
            assert reply is not None and reply.complete == complete and reply.body == b"hello"
            if not complete:
                assert client.rest() == b""
        _, ((_, response),) = lab.news()
        assert response.marks == ({} if complete else {"Error": "upstream-closed"})


@pytest.mark.parametrize(
    ("raw", "whole"),
    [
        (coded(HELLO_CHUNKED), True),
        (answer(body=b"hello"), True),
        (sized(b"hello"), True),
        (coded(b"5\r\nhello\r\n"), False),
    ],
    ids=["chunked", "until-close", "length", "broken"],
)
def test_49_a_client_of_http_1_0_is_never_sent_chunks(tmp_path: Path, raw: bytes, whole: bool) -> None:
    """Its body ends with the connection, by FIN when it is whole and by reset when it isn't."""
    with laboratory(tmp_path) as lab:

        def say_and_leave(incoming: Incoming, _: Seen) -> bool:
            incoming.sock.sendall(raw)
            return False

        lab.upstream.answer = say_and_leave
        with lab.client() as client:
            client.send(ask(b"GET / HTTP/1.0", b"Connection: keep-alive" if raw == sized(b"hello") else b"A: b"))
            client.finish()
            if not whole:
                with pytest.raises(ConnectionResetError):
                    list(iter(lambda: client.sock.recv(KIB), b""))
            else:
                head, _, body = client.rest().partition(b"\r\n\r\n")
                kept = raw == sized(b"hello")
                assert (b"Connection: keep-alive" if kept else b"Connection: close") in head.split(b"\r\n")
                assert b"chunked" not in head.lower() and body == b"hello"
        _, ((_, response),) = lab.news()
        assert bool(response.marks) != whole


# == 50. Upstreams that can't be reached, keep silent, or go away =================================================


def ask_once(lab: Running, data: bytes = get()) -> tuple[Reply | None, tuple[Record, Record]]:
    """One request; its reply and its only pair of records."""
    with Client((lab.host, lab.port)) as client:
        client.send(data)
        reply = client.next()
        client.finish()
        client.rest()
    (pair,) = lab.pairs()
    return reply, pair


def check_unreachable(proxy: Running, status: int, code: str, attempts: str | None) -> None:
    """The answer and the record of a request whose upstream isn't there."""
    reply, (request, response) = ask_once(proxy)
    assert reply is not None and reply.complete
    assert reply.status == response.status == status and json.loads(reply.body)["error"]["code"] == code
    assert response.marks == ({"Error": code} | ({"Attempts": attempts} if attempts else {}))
    assert not request.marks


def test_50_refused(tmp_path: Path) -> None:
    """Nobody listens: one more try, then 502."""
    with nothing_left():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with running_proxy(port, tmp_path / "audit.log") as proxy:
            check_unreachable(proxy, 502, "upstream-refused", "2")


def test_50_black_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is neither made nor refused: a listener whose backlog is full does not answer."""
    monkeypatch.setattr(es_proxy, "CONNECT_SECONDS", 0.2)
    with nothing_left(), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            assert filler.connect_ex(address) in (0, errno.EINPROGRESS)
        with running_proxy(address[1], tmp_path / "audit.log") as proxy:
            check_unreachable(proxy, 502, "upstream-unreachable", "2")


def test_50_unknown_name(tmp_path: Path) -> None:
    """RFC 6761 6.4: a name in .invalid never exists."""
    with nothing_left(), running_proxy(9200, tmp_path / "audit.log", upstream_host="es.invalid") as proxy:
        check_unreachable(proxy, 502, "upstream-unknown-name", None)


def test_50_bad_certificate(tmp_path: Path, certificates: Certificates) -> None:
    """Not signed by whom we trust: nothing is sent."""
    with laboratory(tmp_path, certificates.server, upstream_tls=True) as lab:
        check_unreachable(lab.proxy, 502, "upstream-certificate", None)
        assert lab.upstream.count == 0
        lab.upstream.faults.clear()


def test_50_no_tls(tmp_path: Path, certificates: Certificates) -> None:
    """The upstream speaks plain HTTP."""
    with nothing_left(), Upstream() as upstream:
        upstream.greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        with running_proxy(upstream.port, tmp_path / "audit.log", upstream_tls=True, ca=certificates.ca) as proxy:
            check_unreachable(proxy, 502, "upstream-tls", "2")
        assert upstream.count == 0


@pytest.mark.parametrize("method", [b"GET", b"POST"], ids=bytes.decode)
def test_50_silence(tmp_path: Path, method: bytes) -> None:
    """Connected, read, and never answered: 504, never a second try."""
    with laboratory(tmp_path, upstream_timeout_seconds=0.6) as lab:
        told = threading.Event()
        lab.upstream.answer = lambda *_: not told.wait(PATIENCE)
        reply, (_, response) = ask_once(lab.proxy, ask(method + b" / HTTP/1.1"))
        told.set()
        assert reply is not None and reply.status == response.status == 504
        assert response.marks == {"Error": "upstream-timeout"} and lab.upstream.count == 1


# == 51. A client that leaves ====================================================================================


@pytest.mark.parametrize("leave", ["close", "reset"])
def test_51_the_upstream_is_closed_at_once_when_the_client_leaves_mid_response(tmp_path: Path, leave: str) -> None:
    """While the body flows: Elasticsearch sees the connection go and cancels the search."""
    with laboratory(tmp_path) as lab:

        def flow(incoming: Incoming, _: Seen) -> bool:
            incoming.sock.sendall(answer(b"Content-Length: 1000000000000"))
            with contextlib.suppress(OSError):
                while True:
                    incoming.sock.sendall(b"x" * 64 * KIB)
            return False

        lab.upstream.answer = flow
        with lab.client() as client:
            client.send(get())
            taken = len(client.receive())
            if leave == "reset":
                reset(client.sock)
        assert lab.upstream.ended.acquire(timeout=PATIENCE)
        until(lambda: b"Error:" in lab.proxy.log.read_bytes(), "the response's record")
        _, ((_, response),) = lab.news()
        assert response.marks["Error"] == "client-gone" and response.status == 200
        assert taken - 1000 < int(response.marks["Sent"]) <= response.size


@pytest.mark.parametrize("begun", [False, True], ids=["before-the-head", "mid-response"])
def test_51_a_silent_upstream_is_closed_too(tmp_path: Path, begun: bool) -> None:
    """A long search: nothing flows when the client resets its connection."""
    with laboratory(tmp_path) as lab, lab.client() as client:
        asked = threading.Event()

        def search(incoming: Incoming, _: Seen) -> bool:
            if begun:
                incoming.sock.sendall(answer(b"Content-Length: 50", body=b"hello"))
            asked.set()
            return True  # and wait for the proxy to close

        lab.upstream.answer = search
        client.send(get())
        assert asked.wait(PATIENCE)
        if begun:
            assert b"hello" in client.receive()
        reset(client.sock)
        client.sock.close()
        assert lab.upstream.ended.acquire(timeout=PATIENCE)
        until(lambda: b"Error:" in lab.proxy.log.read_bytes(), "the response's record")
        _, ((_, response),) = lab.news()
        assert response.marks == ({"Error": "client-gone"} | ({"Sent": "5"} if begun else {}))
        assert response.status == (200 if begun else 499)


# == 39, 52. What is removed from a response, and what is untouched ===============================================

RESPONSES += [
    relayed(f"39-response-{line.partition(b':')[0].decode().lower()}", answer(b"A: 1", line, b"Content-Length: 0"),
            fields=(b"A: 1", b"Content-Length: 0"))
    for line in (
        b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: x", b"Upgrade: h2c", b"Trailer: X",
        b"Proxy-Authenticate: Basic", b"Connection: keep-alive",
    )
]  # fmt: skip
RESPONSES += [
    relayed("39-response-named-in-connection", sized(b"hello", b"Connection: X-A", b"X-A: 1", b"X-B: 2"), b"hello",
            fields=(b"Content-Length: 5", b"X-B: 2")),
    relayed("39-response-names-its-length", sized(b"hello", b"Connection: Content-Length"), b"hello",
            fields=(b"Content-Length: 5",)),
    relayed("52-product", sized(b"{}", b"X-elastic-product: Elasticsearch"), b"{}",
            fields=(b"Content-Length: 2", b"X-elastic-product: Elasticsearch")),
    relayed("52-repeats-order-case", sized(b"", b"warning: 1", b"Set-Cookie: a", b"Warning: 2", b"Set-Cookie: b"),
            fields=(b"Content-Length: 0", b"warning: 1", b"Set-Cookie: a", b"Warning: 2", b"Set-Cookie: b")),
    relayed("52-gzip", sized(b"\x1f\x8b\x08\0\xff", b"Content-Encoding: gzip"), b"\x1f\x8b\x08\0\xff",
            fields=(b"Content-Length: 5", b"Content-Encoding: gzip")),
    relayed("52-gzip-chunked", coded(b"5\r\n\x1f\x8b\x08\0\xff\r\n0\r\n\r\n", b"Content-Encoding: gzip"),
            b"\x1f\x8b\x08\0\xff"),
    relayed("52-reason", sized(b"", line=b"HTTP/1.1 429 Too Many (really)"), status=429, reason=b"Too Many (really)"),
    relayed("52-reason-of-other-bytes", sized(b"", line=b"HTTP/1.1 200 \xc3\xa9\tx"), reason=b"\xc3\xa9\tx"),
    relayed("52-value-bytes", sized(b"", b"X: \xa0\x85\xff"), fields=(b"Content-Length: 0", b"X: \xa0\x85\xff")),
    relayed("52-empty-value", sized(b"", b"X:"), fields=(b"Content-Length: 0", b"X: ")),
    relayed("52-www-authenticate", sized(b"", b"WWW-Authenticate: Basic", line=b"HTTP/1.1 401 Unauthorized"),
            status=401,
            fields=(b"Content-Length: 0", b"WWW-Authenticate: Basic")),
    relayed("52-via-date-server", sized(b"", b"Via: 1.1 x", b"Date: now", b"Server: y"),
            fields=(b"Content-Length: 0", b"Via: 1.1 x", b"Date: now", b"Server: y")),
]  # fmt: skip

# == All rows of 42 to 52 ========================================================================================


@pytest.mark.parametrize("row", RESPONSES, ids=[row.id for row in RESPONSES])
def test_response(stage: Lab, row: Response) -> None:
    """One row of the tables above, through the parser alone in all splits, and through the proxy in three ways."""
    ends = row.then != "wait"
    whole, _ = parse_response([row.raw], row.method, ends)
    if len(row.raw) <= 8 * KIB:
        for pieces in splits(row.raw, row.id):
            assert parse_response(pieces, row.method, ends)[0] == whole
    for way in WAYS[:3]:
        with stage.alone():
            try_response(stage, row, way)


# == 53. Idle upstream connections that are no good any more =====================================================


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"], ids=bytes.decode)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_53_closed_while_idle(tmp_path: Path, certificates: Certificates, method: bytes, how: str, tls: bool) -> None:
    """The next request goes out on a fresh connection; the client notices nothing, the record neither."""

    def answer_and_leave(incoming: Incoming, seen: Seen) -> bool:
        answer_own(incoming, seen)
        if seen.target == b"/0":
            assert has_response.wait(PATIENCE)
            if how == "reset":
                reset(incoming.sock)
            return False
        return True

    has_response = threading.Event()
    settings: dict[str, Any] = {"upstream_tls": True, "ca": certificates.ca} if tls else {}
    context = certificates.server if tls else None
    with laboratory(tmp_path, context, threads=1, **settings) as lab, lab.client() as client:
        lab.upstream.answer = answer_and_leave
        for number in range(2):
            client.send(ask(method + b" /%d HTTP/1.1" % number, b"Content-Length: 0"))
            reply = client.next()
            assert reply is not None and reply.status == 200
            assert json.loads(reply.body)["target"] == f"/{number}"
            has_response.set()
            if not number:
                assert lab.upstream.ended.acquire(timeout=PATIENCE)
        seen, ((_, first), (_, second)) = lab.news()
        assert [item.connection for item in seen] == [1, 2]
        assert not first.marks and not second.marks


def test_53_idle_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After REUSE_SECONDS a connection is not trusted any more, though nothing is known against it."""
    with laboratory(tmp_path, threads=1) as lab, lab.client() as client:
        for seconds, connection in ((60.0, 1), (60.0, 1), (0.0, 2)):
            monkeypatch.setattr(es_proxy, "REUSE_SECONDS", seconds)
            check_next_answer(client)
            (seen,), ((_, response),) = lab.news()
            assert seen.connection == connection and not response.marks


# == 54, 55. Connections that die under a request ================================================================


@dataclasses.dataclass
class Dying:
    """An upstream connection that answers its first request and dies under /case, with `raw` of an answer sent."""

    upstream: Upstream
    raw: bytes
    how: str = "close"
    first: bool = False  # already under the first request of the connection
    asked: int = 0  # requests for /case

    def __call__(self, incoming: Incoming, seen: Seen) -> bool:
        """Answer or die; only the first /case dies."""
        if seen.target != b"/case":
            return answer_own(incoming, seen)
        self.asked += 1
        if self.asked > 1:
            return answer_own(incoming, seen)
        incoming.sock.sendall(self.raw)
        if self.how == "reset":
            reset(incoming.sock)
        return False


def ask_dying(lab: Lab, dying: Dying, method: bytes) -> tuple[Reply | None, list[Seen], tuple[Record, Record]]:
    """Warm the connection up (unless it is to die at once), then ask for /case over it; what came of that."""
    lab.upstream.answer = dying
    with lab.client() as client:
        if not dying.first:
            check_next_answer(client)
            lab.news()
        client.send(ask(method + b" /case HTTP/1.1", b"Content-Length: 0"))
        reply = client.next(method)
        client.finish()
        client.rest()
    seen, (pair,) = lab.news(retried=max(0, dying.asked - 1))
    return reply, seen, pair


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS"], ids=bytes.decode)
def test_54_what_only_reads_is_sent_once_more(tmp_path: Path, method: bytes, how: str) -> None:
    """A reused connection died before a byte of the response: one retry on a fresh one, one pair of records."""
    with laboratory(tmp_path, threads=1) as lab:
        reply, seen, (request, response) = ask_dying(lab, Dying(lab.upstream, b"", how), method)
        assert reply is not None and reply.complete and reply.status == response.status == 200
        assert [(item.method, item.target) for item in seen] == [(method, b"/case")] * 2
        assert seen[0].connection != seen[1].connection
        assert response.marks == {"Attempts": "2"} and not request.marks


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"PATCH", b"get", b"PROPFIND"], ids=bytes.decode)
def test_55_what_may_write_is_not(tmp_path: Path, method: bytes, how: str) -> None:
    """The same race: 502, and the upstream saw it once."""
    with laboratory(tmp_path, threads=1) as lab:
        reply, seen, (_, response) = ask_dying(lab, Dying(lab.upstream, b"", how), method)
        assert reply is not None and reply.complete and reply.status == response.status == 502
        assert len(seen) == 1
        assert response.marks == {"Error": "upstream-reset" if how == "reset" else "upstream-closed"}


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"], ids=bytes.decode)
def test_55_the_first_request_of_a_connection_is_not_sent_again(tmp_path: Path, method: bytes) -> None:
    """A fresh connection that dies at once is not the race of an idle one."""
    with laboratory(tmp_path, threads=1) as lab:
        reply, seen, (_, response) = ask_dying(lab, Dying(lab.upstream, b"", first=True), method)
        assert reply is not None and reply.status == 502 and len(seen) == 1
        assert response.marks == {"Error": "upstream-closed"}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "raw", [sized(b"hello"), coded(HELLO_CHUNKED), HINTS + sized(b"hello")], ids=["length", "chunked", "103"]
)
def test_55_one_byte_of_a_response_and_it_is_not_sent_again(tmp_path: Path, raw: bytes, how: str) -> None:
    """The upstream goes away at every possible byte: 502 while the client has nothing, cut off later; asked once."""
    with laboratory(tmp_path, threads=1) as lab:
        for length in range(1, len(raw) + 1):
            reply, seen, (_, response) = ask_dying(lab, Dying(lab.upstream, raw[:length], how), b"GET")
            assert len(seen) == 1 and reply is not None, length
            assert reply.status == response.status
            if length == len(raw):
                assert reply.complete and (reply.status, reply.body) == (200, b"hello")
                continue
            assert response.marks == {"Error": "upstream-reset" if how == "reset" else "upstream-closed"}, length
            assert reply.complete == (reply.status == 502)
            if reply.status == 200:
                assert b"hello".startswith(reply.body)


def test_55_a_connection_that_can_not_be_made_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent, so it is safe for every method."""
    connect = http.client.HTTPConnection.connect
    refusals = [ConnectionRefusedError(errno.ECONNREFUSED, "refused")]

    def refused_once(self: Any) -> None:
        if refusals:
            raise refusals.pop()
        connect(self)

    with laboratory(tmp_path) as lab:
        monkeypatch.setattr(http.client.HTTPConnection, "connect", refused_once)
        reply, (_, response) = ask_once(lab.proxy, post(b"Content-Length: 5", body=b"hello"))
        assert reply is not None and reply.status == 200
        assert response.marks == {"Attempts": "2"}
        assert lab.upstream.count == 1


# == 56. The upstream restarts under traffic =====================================================================


class Traffic:
    """Clients that ask for numbers, and the answers they must not get."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.stop = threading.Event()
        self.served = [0] * 4  # by client
        self.errors: list[str] = []
        self.threads = [threading.Thread(target=self._client, args=(index,)) for index in range(len(self.served))]
        for thread in self.threads:
            thread.start()

    def _client(self, index: int) -> None:
        number = 0
        while not self.stop.is_set():
            with Client(self.address) as client:
                while not self.stop.is_set():
                    number += 1
                    method = (b"GET", b"POST")[number % 2]
                    target = f"/{index}/{number}"
                    client.send(ask(b"%b %b HTTP/1.1" % (method, target.encode()), b"Content-Length: 0"))
                    reply = client.next()
                    if reply is None or not reply.complete:
                        break
                    if reply.status == 200:
                        if json.loads(reply.body)["target"] != target:
                            self.errors.append(f"{target} got {reply.body!r}")
                        self.served[index] += 1
                    elif reply.status != 502:
                        self.errors.append(f"{target} got {reply.status}")

    def wait(self) -> None:
        """Until every client has been served once more."""
        before = list(self.served)
        until(
            lambda: all(now > then for now, then in zip(self.served, before, strict=True)),
            "every client is served again",
        )


def test_56_no_answers_are_mixed_up_when_the_upstream_restarts(tmp_path: Path) -> None:
    """It goes and comes back on its port while four clients ask; writes are never sent twice."""
    upstream = Upstream()
    gone = [upstream]
    with nothing_left(), running_proxy(upstream.port, tmp_path / "audit.log") as proxy:
        traffic = Traffic((proxy.host, proxy.port))
        for _ in range(8):
            traffic.wait()
            upstream.close()
            upstream = Upstream(upstream.port)
            gone.append(upstream)
        traffic.wait()
        traffic.stop.set()
        for thread in traffic.threads:
            thread.join(PATIENCE)
        assert not traffic.errors
        upstream.close()
        seen = [item for one in gone for item in one.seen]
        writes = [item.target for item in seen if item.method == b"POST"]
        assert len(set(writes)) == len(writes), "a write was sent twice"
        recorded = {request.path for request, _ in proxy.pairs()}
        assert {item.target for item in seen} <= recorded


# == 57. Slow clients ============================================================================================


def trickle(client: Client, begin: bytes, drip: bytes) -> bytes:
    """Send `begin`, then a drip now and then, until the proxy says something; all it says."""
    client.send(begin)
    deadline = time.monotonic() + PATIENCE
    while not select.select([client.sock], [], [], 0.02)[0]:
        assert time.monotonic() < deadline, "no deadline fires"
        with contextlib.suppress(ConnectionError):
            client.send(drip)
    return client.rest()


@pytest.mark.parametrize("begin", [b"G", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n", b"GET / HTTP/1.1\r\n"])
def test_57_the_deadline_of_a_head_fires_although_bytes_come(tmp_path: Path, begin: bytes) -> None:
    """One byte now and then keeps nothing open."""
    with laboratory(tmp_path, limits={"head_seconds": 0.3}) as lab, lab.client() as client:
        assert trickle(client, begin, b"x").startswith(b"HTTP/1.1 408 ")
        _, ((request, response),) = lab.news()
        assert request.marks == {"Rejected": "request-timeout"} and response.status == 408


@pytest.mark.parametrize(
    ("framing", "drip"), [(b"Content-Length: 60000", b"x"), (b"Transfer-Encoding: chunked", b"1\r\nx\r\n")]
)
def test_57_the_rate_of_a_body_is_enforced_although_bytes_come(tmp_path: Path, framing: bytes, drip: bytes) -> None:
    """Never silent for body_silence_seconds, but slower than body_rate_bytes."""
    limits = {"body_silence_seconds": 0.2, "body_rate_bytes": 1e9}
    with laboratory(tmp_path, limits=limits) as lab, lab.client() as client:
        assert trickle(client, post(framing), drip).startswith(b"HTTP/1.1 408 ")
        _, ((request, response),) = lab.news()
        assert request.marks == {"Rejected": "request-timeout"} and response.status == 408


def test_57_who_says_nothing_is_let_go_quietly(tmp_path: Path) -> None:
    """No answer, no record: before the first request, and after one."""
    with laboratory(tmp_path, limits={"keepalive_seconds": 0.2}) as lab:
        with lab.client() as client:
            assert client.rest() == b""
        assert lab.news() == ([], [])
        with lab.client() as client:
            client.send(get())
            assert client.next() is not None
            assert client.rest() == b""
        assert len(lab.news()[1]) == 1


def test_57_a_client_that_does_not_leave_after_an_error_is_left(tmp_path: Path) -> None:
    """The lingering close has an end: linger_seconds, though bytes still come."""
    with laboratory(tmp_path, limits={"linger_seconds": 0.3}) as lab, lab.client() as client:
        client.send(b"\0")
        assert client.next() is not None and client.rest() == b""

        def refused() -> bool:
            try:
                client.send(b"x")
            except ConnectionError:
                return True
            return False

        until(refused, "the proxy closes")
        assert len(lab.news()[1]) == 1


def test_57_while_hundreds_dawdle_others_are_served(tmp_path: Path) -> None:
    """Slow heads, slow bodies and silence hold no thread: with two threads, the others' requests complete meanwhile."""
    with laboratory(tmp_path, threads=2) as lab, contextlib.ExitStack() as stack:
        dawdlers = [stack.enter_context(lab.client()) for _ in range(300)]
        for number, client in enumerate(dawdlers):
            client.send((b"", b"GET / HT", post(b"Content-Length: 10", body=b"hello"), chunked(b"5\r\nhe"))[number % 4])
        for number in range(50):
            with lab.client() as client:
                client.send(ask(b"GET /%d HTTP/1.1" % number))
                reply = client.next()
                assert reply is not None and json.loads(reply.body)["target"] == f"/{number}"
        assert not select.select([client.sock for client in dawdlers], [], [], 0)[0], "a dawdler was let go"
        assert len(lab.news()[1]) == 50
        dawdlers[2].send(b"world")
        late = dawdlers[2].next()
        assert late is not None and late.status == 200
        for client in dawdlers:
            reset(client.sock)


def test_57_a_stalled_handshake_delays_nobody_and_ends(tmp_path: Path, certificates: Certificates) -> None:
    """A part of a ClientHello, then nothing: others shake hands meanwhile; its deadline fires, without a record."""
    hello = client_hello()
    trust = ssl.create_default_context(cafile=certificates.ca)
    settings: dict[str, Any] = {"listen_tls": True, "cert": certificates.cert, "key": certificates.key, "threads": 2}
    with laboratory(tmp_path, limits={"head_seconds": 1.0}, **settings) as lab, contextlib.ExitStack() as stack:
        stallers = [stack.enter_context(lab.client()) for _ in range(60)]
        for number, client in enumerate(stallers):
            client.send(hello[: 1 + number * 4])
        with lab.client() as client, trust.wrap_socket(client.sock, server_hostname="127.0.0.1") as client.sock:
            client.send(get())
            reply = client.next()
            assert reply is not None and reply.status == 200
        assert not any(client.rest() for client in stallers)
        assert len(lab.news()[1]) == 1


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many descriptors as this process may have, for the time of a test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_57_ten_thousand_idle_connections(tmp_path: Path, many_files: int) -> None:
    """As many as the descriptors allow, over several source addresses: they cost descriptors, requests are served."""
    count = min(10_000, many_files - 2000)
    words = ["127.0.0.1", "0", "127.0.0.1", "0", "--no-tls", "--audit-log", str(tmp_path / "audit.log")]
    with nothing_left(), Upstream() as upstream, contextlib.ExitStack() as stack:
        words[1] = str(upstream.port)
        process, port, _ = stack.enter_context(proxy_process(*words, "--workers", "1"))
        idle = [stack.enter_context(Client(("127.0.0.1", port), f"127.0.0.{2 + n % 8}")) for n in range(count)]
        files = f"/proc/{process.pid}/fd"
        until(lambda: len(os.listdir(files)) >= count, "all are accepted")
        for number in range(40):
            client = idle[number * (count // 40)]
            client.send(ask(b"GET /%d HTTP/1.1" % number))
            reply = client.next()
            assert reply is not None and json.loads(reply.body)["target"] == f"/{number}"
        assert resident_bytes(process.pid) < 40 * MIB + count * 8 * KIB
        for client in idle:
            reset(client.sock)
            client.sock.close()
        until(lambda: len(os.listdir(files)) < 100, "all are closed")
        assert upstream.count == 40


# == 58. Slow readers and many uploads ===========================================================================


@pytest.mark.parametrize("slowness", ["stall", "rate"])
def test_58_a_client_that_reads_too_slowly_is_let_go(tmp_path: Path, slowness: str) -> None:
    """100 MB for a client that takes nothing, or a byte at a time: closed, in constant memory, on record."""
    limits = (
        {"write_stall_seconds": 0.3} if slowness == "stall" else {"write_grace_seconds": 0.2, "write_rate_bytes": 1e12}
    )
    with laboratory(tmp_path, limits=limits) as lab, lab.client(receive_buffer=4096) as client:

        def flow(incoming: Incoming, _: Seen) -> bool:
            with contextlib.suppress(OSError):
                incoming.sock.sendall(answer(b"Content-Length: 100000000"))
                for piece in [b"x" * 100_000] * 1000:
                    incoming.sock.sendall(piece)
            return False

        lab.upstream.answer = flow
        before = resident_bytes()
        client.send(get())
        if slowness == "rate":
            with contextlib.suppress(ConnectionError):
                while client.sock.recv(1):
                    pass
        assert lab.upstream.ended.acquire(timeout=PATIENCE)
        until(lambda: b"Error:" in lab.proxy.log.read_bytes(), "the response's record")
        assert resident_bytes() - before < 24 * MIB
        _, ((_, response),) = lab.news()
        assert response.marks["Error"] == "client-gone" and int(response.marks["Sent"]) < 100_000_000


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("limits", [{"memory_body_bytes": 1000}, {"memory_total_bytes": 1000}], ids=["body", "total"])
def test_58_a_body_beyond_its_memory_goes_to_a_file(tmp_path: Path, framing: str, limits: dict[str, int]) -> None:
    """Forwarded and recorded to the byte all the same."""
    body = random.Random(58).randbytes(1_000_000)
    data = post(b"Content-Length: %d" % len(body), body=body)
    if framing == "chunked":
        data = chunked(b"".join(b"%x\r\n%b\r\n" % (len(body) // 10, body[at::10]) for at in range(10)) + b"0\r\n\r\n")
        body = b"".join(body[at::10] for at in range(10))
    with laboratory(tmp_path, limits=limits) as lab, lab.client() as client:
        for _ in range(2):  # The memory that was taken has been given back.
            client.send(data)
            reply = client.next()
            assert reply is not None and reply.status == 200
            (seen,), ((request, _),) = lab.news()
            assert seen.body == request.body == body


def unread_by(port: int) -> int:
    """Bytes that the kernel holds for whoever listens on `port` (and for nobody else)."""
    total = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].endswith(f":{port:04X}") and words[3] == "01":
            total += int(words[4].partition(":")[2], 16)
    return total


def unsent(clients: list[Client]) -> int:
    """Bytes that the kernel still holds on the way to the proxy."""
    return sum(struct.unpack("i", fcntl.ioctl(client.sock, termios.TIOCOUTQ, b"\0" * 4))[0] for client in clients)


def test_58_many_slow_uploads_are_held_in_bounded_memory(tmp_path: Path, many_files: int) -> None:
    """1000 uploads of 100 MB that stop after 64 KiB: beyond memory_total_bytes they lie in files."""
    count = min(1000, many_files // 4)
    with laboratory(tmp_path, limits={"memory_total_bytes": 4 * MIB}) as lab, contextlib.ExitStack() as stack:
        before = resident_bytes()
        clients = [stack.enter_context(lab.client()) for _ in range(count)]
        part = b"x" * (64 * KIB)
        for client in clients:
            client.send(post(b"Content-Length: 100000000"), part)
        until(lambda: unsent(clients) == 0 and unread_by(lab.proxy.port) == 0, "the proxy has taken all of it")
        assert resident_bytes() - before < 32 * MIB
        with lab.client() as client:
            client.send(get())
            reply = client.next()
        assert reply is not None and reply.status == 200
        for client in clients:
            reset(client.sock)
            client.sock.close()
        until(lambda: len(rejections(lab)) == count, "all of them are on record as incomplete")
        assert set(rejections(lab)) == {"incomplete-request"}
        assert len(lab.news()[0]) == 1


def rejections(lab: Lab) -> list[str]:
    """Codes of what was rejected, where the response is on record too."""
    text = lab.proxy.log.read_bytes().decode()
    return re.findall(r" Error: (\S+)", text)


# == 59. Limits of connections, descriptors and threads ==========================================================


def test_59_over_the_connection_limit(tmp_path: Path) -> None:
    """One too many gets 503 for its request, on record; those within the limit are served, and room is room again."""
    with laboratory(tmp_path, max_connections=3) as lab, contextlib.ExitStack() as stack:
        within = [stack.enter_context(lab.client()) for _ in range(3)]
        for client in within:
            client.send(get())
            reply = client.next()
            assert reply is not None and reply.status == 200
        lab.news()
        with lab.client() as client:
            client.send(post(b"Content-Length: 5", body=b"hello"))
            reply = client.next()
            assert reply is not None and client.rest() == b""
        seen, (pair,) = lab.news()
        assert not seen and pair[0].body == b"hello"
        check_refused("too-many-connections", 503, None, reply, pair)
        within[0].send(get())
        again = within[0].next()
        assert again is not None and again.status == 200
        within[1].finish()
        assert within[1].rest() == b""
        with lab.client() as client:
            client.send(get())
            fresh = client.next()
        assert fresh is not None and fresh.status == 200
        assert len(lab.news()[0]) == 2


def test_59_no_more_descriptors(tmp_path: Path) -> None:
    """EMFILE in accept: it backs off and says so, serves those it has, and takes the others when some have left."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))

    words = ["127.0.0.1", "0", "127.0.0.1", "0", "--no-tls", "--audit-log", str(tmp_path / "audit.log")]
    words += ["--threads", "1", "--max-connections", "1000", "--workers", "1"]
    with nothing_left(), Upstream() as upstream, contextlib.ExitStack() as stack:
        words[1] = str(upstream.port)
        process, port, lines = stack.enter_context(proxy_process(*words, preexec_fn=few_files))
        clients = [stack.enter_context(Client(("127.0.0.1", port)))]

        def served(client: Client) -> bool:
            client.send(get())
            reply = client.next()
            return reply is not None and reply.status == 200

        assert served(clients[0])
        clients += [stack.enter_context(Client(("127.0.0.1", port))) for _ in range(200)]
        until(lambda: any("no more connections can be taken" in line for line in lines), "it says so")
        used = sum(map(float, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        assert served(clients[0])
        waiting = clients[-1]
        waiting.send(get())
        assert served(clients[0])
        assert not select.select([waiting.sock], [], [], 0)[0], "it was taken although there was no room"
        for client in clients[1:150]:
            client.sock.close()
        reply = waiting.next()
        assert reply is not None and reply.status == 200
        spent = sum(map(float, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        assert spent - used < os.sysconf("SC_CLK_TCK"), "it spins"
    assert not any("Traceback" in line or "internal error" in line for line in lines)


def test_59_no_thread_to_be_had(tmp_path: Path) -> None:
    """All threads wait for the upstream: after queue_seconds a request gets 503, on record; then all is well again."""
    with laboratory(tmp_path, threads=1, limits={"queue_seconds": 0.2}) as lab:
        asked, release = threading.Event(), threading.Event()

        def hang(incoming: Incoming, seen: Seen) -> bool:
            asked.set()
            assert release.wait(PATIENCE)
            return answer_own(incoming, seen)

        lab.upstream.answer = hang
        with lab.client() as first, lab.client() as second:
            first.send(get())
            assert asked.wait(PATIENCE)
            second.send(post(b"Content-Length: 5", body=b"hello"))
            reply = second.next()
            assert second.rest() == b""
            release.set()
            served = first.next()
            assert served is not None and served.status == 200
        _, ((_, response), refused) = lab.news()
        assert response.status == 200 and refused[0].body == b"hello"
        check_refused("no-thread", 503, None, reply, refused)
        with lab.client() as client:
            client.send(get())
            after = client.next()
        assert after is not None and after.status == 200
        assert len(lab.news()[0]) == 1


# == 60. Resets, and a burst =====================================================================================

STAGES = {
    "after-connect": b"",
    "in-the-request-line": b"GET / HT",
    "in-a-field": b"GET / HTTP/1.1\r\nHost: a\r\nX",
    "before-the-body": post(b"Content-Length: 5"),
    "waiting-for-100": post(EXPECT, b"Content-Length: 5"),
    "in-the-body": post(b"Content-Length: 10", body=b"hello"),
    "in-a-chunk": chunked(b"5\r\nhe"),
    "after-an-error": b"\0\0\0",
    "after-a-request": get(),
    "after-two-requests": get() * 2,
    "after-a-request-and-a-half": get() + b"GET / HT",
}


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("point", STAGES)
def test_60_a_reset_at_any_stage_leaves_nothing(
    tmp_path: Path, certificates: Certificates, capfd: pytest.CaptureFixture[str], point: str, tls: bool
) -> None:
    """Reset by the client: every record has its partner, nothing is said of bugs, the next client is served."""
    settings: dict[str, Any] = {"listen_tls": True, "cert": certificates.cert, "key": certificates.key} if tls else {}
    trust = ssl.create_default_context(cafile=certificates.ca)
    with laboratory(tmp_path, **settings) as lab:
        for _ in range(5):
            with lab.client() as client, contextlib.ExitStack() as stack:
                if tls:
                    client.sock = stack.enter_context(trust.wrap_socket(client.sock, server_hostname="127.0.0.1"))
                client.send(STAGES[point])
                reset(client.sock)
        with lab.client() as client, contextlib.ExitStack() as stack:
            if tls:
                client.sock = stack.enter_context(trust.wrap_socket(client.sock, server_hostname="127.0.0.1"))
            client.send(ask(b"GET /after HTTP/1.1"))
            reply = client.next()
            assert reply is not None and json.loads(reply.body)["target"] == "/after"
    assert lab.upstream.count == sum("Rejected" not in request.marks for request, _ in lab.proxy.pairs())
    said = capfd.readouterr().err
    assert "Traceback" not in said and "internal error" not in said


@pytest.mark.parametrize("when", ["before-the-head", "mid-response"])
def test_60_a_reset_while_the_upstream_works(tmp_path: Path, capfd: pytest.CaptureFixture[str], when: str) -> None:
    """The client is gone when the answer comes: recorded, and the upstream's connection ended."""
    with laboratory(tmp_path) as lab:
        asked, left = threading.Event(), threading.Event()

        def late(incoming: Incoming, _: Seen) -> bool:
            if when == "mid-response":
                incoming.sock.sendall(answer(b"Content-Length: 1000000", body=b"x" * 1000))
            asked.set()
            assert left.wait(PATIENCE)
            with contextlib.suppress(OSError):
                incoming.sock.sendall(sized(b"x" * 999_000) if when == "before-the-head" else b"x" * 999_000)
            return True

        lab.upstream.answer = late
        with lab.client() as client:
            client.send(get())
            assert asked.wait(PATIENCE)
            if when == "mid-response":
                assert client.receive()
            reset(client.sock)
        left.set()
        until(lambda: b"Error: client-gone" in lab.proxy.log.read_bytes(), "the response's record")
        assert len(lab.news()[1]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "internal error" not in said


class ClosedMeanwhile:
    """A session whose descriptor the poller's thread closes (its deadline, a stop) just when a worker parks it."""

    deadline = float("inf")
    idle = True

    def advance(self, _: es_proxy.Wake) -> bool:
        """Go on."""
        return True

    def fileno(self) -> int:
        """A descriptor that is closed by now."""
        one, other = socket.socketpair()
        with one, other:
            return one.fileno()

    def cut(self) -> None:
        """Nothing to cut."""

    def close(self) -> None:
        """Nothing to close."""


def test_60_a_session_that_is_closed_while_it_is_parked_costs_no_thread(tmp_path: Path) -> None:
    """The worker that parks it goes on to the next session instead of dying of EBADF."""
    with laboratory(tmp_path) as lab:
        lab.proxy.proxy.server.advance(ClosedMeanwhile(), es_proxy.Wake.READABLE)
        with lab.client() as client:
            check_next_answer(client)
        assert len(lab.news()[0]) == 1


def test_60_200_connects_at_once(lab: Lab) -> None:
    """None is refused, all are served."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(200)]
        for sock in socks:
            sock.setblocking(False)
            assert sock.connect_ex((lab.proxy.host, lab.proxy.port)) in (0, errno.EINPROGRESS)
        for sock in socks:
            assert select.select([], [sock], [], PATIENCE)[1]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            sock.sendall(get(b"Connection: close"))
        for sock in socks:
            sock.settimeout(PATIENCE)
            assert sock.recv(KIB).startswith(b"HTTP/1.1 200 ")
    seen, fresh = lab.news()
    assert len(seen) == len(fresh) == 200


# == A second opinion ============================================================================================

NODE = r"""
const http = require('http'), {Duplex} = require('stream'), lines = require('fs').readFileSync(0, 'latin1').split('\n');
console.log(JSON.stringify(http.METHODS));
const server = http.createServer({maxHeaderSize: 1 << 24, insecureHTTPParser: false, requireHostHeader: true});
server.maxHeadersCount = 0;
server.maxRequestsPerSocket = 0;
server.timeout = server.requestTimeout = server.headersTimeout = server.keepAliveTimeout = 0;
let found;
server.on('request', (request, response) => {
  const pieces = [];
  request.on('data', piece => pieces.push(piece));
  request.on('end', () => {
    found.requests.push([request.method, request.url, request.rawHeaders, Buffer.concat(pieces).toString('base64')]);
    response.end();
  });
});
server.on('clientError', (error, socket) => { found.error = error.code; socket.destroy(); });
server.on('upgrade', (_, socket) => { found.error = 'upgrade'; socket.destroy(); });
server.on('connect', (_, socket) => { found.error = 'connect'; socket.destroy(); });
(async () => {
  for (const line of lines) {
    if (!line) continue;
    found = {requests: [], error: ''};
    await new Promise(done => {
      const stream = new Duplex({read() {}, write(_1, _2, next) { next(); }});
      stream.on('close', done);
      server.emit('connection', stream);
      stream.push(Buffer.from(line, 'base64'));
      stream.push(null);
    });
    console.log(JSON.stringify(found));
  }
  process.exit(0);
})();
"""


def test_node_reads_every_forwarded_request_as_we_recorded_it(lab: Lab) -> None:
    """Whatever went to an upstream of this module: Node's parser finds one request with the same parts."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    if len(FORWARDED) < len(ROWS):  # This test was chosen alone.
        for row in ROWS:
            with lab.alone():
                try_row(lab, row, "whole")
    distinct = list({(seen.raw, seen.target): seen for seen in FORWARDED}.values())
    assert len(distinct) > 100
    words = b"".join(base64.b64encode(seen.raw) + b"\n" for seen in distinct)
    output = subprocess.run([node, "-e", NODE], input=words, capture_output=True, check=True, timeout=120).stdout
    methods, *found = map(json.loads, output.splitlines())
    assert len(found) == len(distinct)
    for seen, reading in zip(distinct, found, strict=True):
        if seen.method.decode() not in methods:  # Node knows a list of methods and no others.
            continue
        assert not reading["error"] and len(reading["requests"]) == 1, (seen.raw, reading)
        ((method, url, headers, body),) = reading["requests"]
        assert (method.encode(), url.encode(), base64.b64decode(body)) == (seen.method, seen.target, seen.body)
        names = [name.encode("latin-1").lower() for name in headers[::2]]
        assert names == [name.lower() for name, _ in seen.fields]


def test_the_tables_are_complete() -> None:
    """At least 400 inputs, every one with a name of its own."""
    names = [row.id for row in ROWS] + [row.id for row in RESPONSES]
    assert len(names) >= 400
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    assert {int(name[:2]) for name in names} >= set(range(1, 53)) - {14, 29, 38, 45, 50, 51}


# == The fuzzer ==================================================================================================
# Each input comes from the seed and its own number alone, so what is printed can be made again:
#     python3 test_protocol.py --fuzz 60 --seed 7 --only 1234

INTERESTING = (
    b"\0", b"\t", b"\n", b"\v", b"\f", b"\r", b" ", b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\r\n", b"\x1c", b"\x7f",
    b"\x85", b"\xa0",
    b"\xff", b":", b",", b";", b'"', b"_", b"-", b"+", b"0", b"0x", b"%", b"#", b"*", b"/", b"\\", b"[", b"]", b"@",
    b"=",
    b"chunked", b"gzip", b"close", b"100-continue", b"HTTP/1.1", b"HTTP/1.0", b"GET ", b"http://a", EVIL, b"0\r\n\r\n",
    b"5\r\nhello\r\n",
)  # fmt: skip
LINES = (
    b"Host: a", b"Host: b", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 99999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip", b"Connection: close", b"Connection: keep-alive", b"Connection: x, content-length",
    b"Expect: 100-continue",
    b"X: y", b"Content_Length: 5", b"Transfer-%45ncoding: chunked", b" folded", b"Trailer: X", b"TE: trailers",
    b"Upgrade: h2c",
    b"Max-Forwards: 0", b"X-Forwarded-For: 1.2.3.4", b"Authorization: Basic eDp5", b"User-Agent: a: b Status: 200",
)  # fmt: skip
Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    """One bit of one byte."""
    at = rng.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Something interesting, anywhere."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(INTERESTING) + data[at:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """The same, over what was there."""
    at = rng.randrange(len(data))
    piece = rng.choice(INTERESTING)
    return data[:at] + piece + data[at + len(piece) :]


def remove(rng: random.Random, data: bytes) -> bytes:
    """A few bytes."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 1, 2, 5, 20)) :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """The end."""
    return data[: rng.randrange(1, len(data) + 1)]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """A piece, once more behind itself."""
    start, stop = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:stop] + data[start:stop] + data[stop:]


def rearrange(rng: random.Random, data: bytes) -> bytes:
    """Lines doubled, removed, exchanged, or one more."""
    lines = data.split(b"\r\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        lines.insert(other, lines[one])
    elif kind == 1:
        del lines[one]
    elif kind == 2:
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(LINES))
    return b"\r\n".join(lines)


def count_wrong(rng: random.Random, data: bytes) -> bytes:
    """A number, a little or much different."""
    numbers = list(re.finditer(rb"[0-9a-fA-F]+", data))
    if not numbers:
        return data
    match = rng.choice(numbers)
    digits = match[0]
    changed = rng.choice(
        (b"%d" % rng.randrange(40), b"0" + digits, digits + b"0", b"+" + digits, digits + b" ", b"-1", b"%x" % 2**64)
    )
    return data[: match.start()] + changed + data[match.end() :]


def recase(rng: random.Random, data: bytes) -> bytes:
    """A piece in the other case."""
    start = rng.randrange(len(data))
    stop = start + rng.randrange(1, 20)
    return data[:start] + data[start:stop].swapcase() + data[stop:]


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    insert,
    insert,
    overwrite,
    remove,
    truncate,
    repeat,
    rearrange,
    rearrange,
    count_wrong,
    recase,
)


def read_one(raw: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
    """Method, target, body of the request that h11 reads, and the bytes behind it; None when it is none."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MIB)
    body = bytearray()
    head: h11.Request | None = None
    try:
        parser.receive_data(raw)
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return head.method, head.target, bytes(body), parser.trailing_data[0]
            else:
                return None
    except h11.RemoteProtocolError:
        return None


def read_answer(raw: bytes, method: bytes) -> tuple[int, bytes] | None:
    """Status and body of the response that h11 reads; None when it is none, or not exactly one."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MIB)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    status, body = 0, bytearray()
    try:
        parser.receive_data(raw)
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return None if parser.trailing_data[0] else (status, bytes(body))
            else:
                return None
    except h11.RemoteProtocolError:
        return None


class Fuzzer:
    """Mutations of the tables' rows against the parsers alone and, with a `lab`, some of them through a proxy."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tried = {"requests": 0, "responses": 0, "through the proxy": 0, "forwarded": 0, "relayed": 0}
        self._requests = [row.data.replace(SECRET, b"eDp5") for row in ROWS if len(row.data) < 2 * KIB]
        self._responses = [row.raw for row in RESPONSES if 0 < len(row.raw) < 2 * KIB]
        self._requests += [get(), post(b"Content-Length: 5", body=b"hello"), chunked(HELLO_CHUNKED), get() * 2] * 40
        self._responses += [sized(b"hello"), coded(HELLO_CHUNKED), HINTS + sized(b"hello"), answer(body=b"hello")] * 20

    def make(self, index: int) -> tuple[str, bytes, random.Random]:
        """Input `index`: request or response, its bytes, and the generator for what is done with them."""
        rng = random.Random(f"{self.seed} {index}")
        kind = "requests" if index % 3 else "responses"
        base = self._requests if kind == "requests" else self._responses
        data = rng.choice(base)
        if rng.random() < 0.2:
            data += rng.choice(base)
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            data = rng.choice(MUTATIONS)(rng, data or b"x")
        return kind, data or b"x", rng

    def try_one(self, index: int, lab: Lab | None) -> None:
        """Make and try an input; raises whatever shows that something is wrong."""
        kind, data, rng = self.make(index)
        self.tried[kind] += 1
        if kind == "requests":
            self._try_request(data, rng)
        else:
            self._try_response(data, rng)
        if lab is not None:
            self.tried["through the proxy"] += 1
            (self._send_request if kind == "requests" else self._send_response)(lab, data, rng)

    def _try_request(self, data: bytes, rng: random.Random) -> None:
        kept: list[es_proxy.Request] = []
        whole = parse_requests([data], kept)
        for _ in range(2):
            parsed = parse_requests(split(data, "random", rng))
            assert parsed == whole, f"split: {parsed}, whole: {whole}"
        assert parse_requests(split(data, "bytes", rng)) == whole, f"byte by byte it is not {whole}"
        for request in kept:
            self.tried["forwarded"] += 1
            assert request.body is not None
            body = bytes(request.body.whole())
            wire = es_proxy.request_head(request, b"up:9200")
            if request.chunked:
                wire += (es_proxy.chunk(body) if body else b"") + es_proxy.LAST_CHUNK
            else:
                wire += body
            assert read_one(wire) == (request.method, request.target, body, b""), f"h11 reads {wire!r} differently"
        theirs = read_one(data.removeprefix(b"\r\n"))
        if kept and theirs is not None:
            assert kept[0].body is not None
            ours = (kept[0].method, bytes(kept[0].body.whole()))
            assert ours == (theirs[0], theirs[2]), f"h11 reads what came in as {theirs}"

    def _try_response(self, data: bytes, rng: random.Random) -> None:
        method = rng.choice((b"GET", b"GET", b"POST", b"HEAD"))
        ends = rng.random() < 0.5
        whole, head = parse_response([data], method, ends)
        for way in ("random", "random", "bytes"):
            parsed, _ = parse_response(split(data, way, rng), method, ends)
            assert parsed == whole, f"{way}: {parsed}, whole: {whole}"
        if head is None or whole.error is not None or not whole.rest.startswith("complete"):
            return
        self.tried["relayed"] += 1
        ((body,),) = whole.messages[1:]
        assert isinstance(body, bytes)
        until_close = isinstance(head.decoder, es_proxy.UntilCloseDecoder)
        wire = es_proxy.response_head(head, b"Transfer-Encoding: chunked\r\n" if until_close else None, b"")
        if until_close or isinstance(head.decoder, es_proxy.ChunkedDecoder):
            wire += (es_proxy.chunk(body) if body else b"") + es_proxy.LAST_CHUNK
        else:
            wire += body
        assert read_answer(wire, method) == (head.status, body), f"h11 reads {wire!r} differently"

    def _send_request(self, lab: Lab, data: bytes, rng: random.Random) -> None:
        lab.upstream.answer = answer_own
        with lab.client() as client:
            with contextlib.suppress(ConnectionError):  # It may have been closed after `Connection: close`.
                client.send(*split(data, rng.choice(("whole", "random", "bytes")), rng))
            client.finish()
            client.rest()
        self._check_counts(lab)

    def _send_response(self, lab: Lab, data: bytes, rng: random.Random) -> None:
        closed = threading.Event()

        def say(incoming: Incoming, _: Seen) -> bool:
            lab.upstream.answer = answer_own
            with contextlib.suppress(OSError):
                for piece in split(data, rng.choice(("whole", "random", "bytes")), rng):
                    incoming.sock.sendall(piece)
            incoming.sock.close()
            closed.set()
            return False

        lab.upstream.answer = say
        with lab.client() as client:
            client.send(get())
            client.finish()
            client.rest()
        # Bytes that are still on their way when the connection is used again would be an answer nobody can tell apart.
        assert closed.wait(PATIENCE)
        self._check_counts(lab)

    @staticmethod
    def _check_counts(lab: Lab) -> None:
        """The three counts, and that the next client is served."""
        seen, fresh = lab.news()
        recorded = [request for request, _ in fresh if "Rejected" not in request.marks]
        for item, request in zip(seen, recorded, strict=True):
            target = request.path + (b"" if request.query is None else b"?" + request.query)
            assert (item.method, item.target, item.body) == (request.method, target, request.body)
        lab.upstream.answer = answer_own
        with lab.client() as client:
            client.send(FOLLOW)
            reply = client.next()
            assert reply is not None and reply.complete and json.loads(reply.body)["target"] == "/follow"
            client.finish()
            assert client.rest() == b""
        assert len(lab.news()[0]) == 1

    def report(self, index: int, error: BaseException) -> str:
        """How to make the input of a find again."""
        kind, data, _ = self.make(index)
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f" at line {where.tb_lineno} of {where.tb_frame.f_code.co_filename}" if where else ""
        return (
            f"FOUND in {kind}: seed {self.seed} input {index} (--seed {self.seed} --only {index})\n"
            f"{data!r}\n{type(error).__name__}{line}: {error}"
        )


def test_fuzz_a_little(lab: Lab) -> None:
    """A few thousand inputs from a fixed seed at the parsers, some of them through the proxy."""
    fuzzer = Fuzzer(seed=1)
    for index in range(4000):
        try:
            with lab.alone():
                fuzzer.try_one(index, lab if index % 20 == 0 else None)
        except Exception as error:
            pytest.fail(fuzzer.report(index, error))
    assert fuzzer.tried["forwarded"] > 300 and fuzzer.tried["relayed"] > 100, "the mutations leave nothing sound"


def fuzz(seconds: float, seed: int, only: int | None, keep_going: bool) -> int:
    """Try inputs for so long; 1 on a find, which is printed."""
    fuzzer = Fuzzer(seed)
    deadline = time.monotonic() + seconds
    finds = 0
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="es-proxy-fuzz-"))
        lab = stack.enter_context(laboratory(Path(directory), max_body_bytes=MAX_BODY, threads=1))
        for index in itertools.count() if only is None else [only]:
            if only is None and time.monotonic() >= deadline:
                break
            try:
                with lab.alone():
                    fuzzer.try_one(index, lab if index % 20 < 2 or only is not None else None)
            except Exception as error:
                print(fuzzer.report(index, error), flush=True)
                finds += 1
                if not keep_going:
                    break
            FORWARDED.clear()
            lab.pairs.clear()
    print(f"seed {seed}: " + ", ".join(f"{count} {what}" for what, count in fuzzer.tried.items()) + f", {finds} finds")
    return 1 if finds else 0


def main() -> int:
    """The fuzzer's command line."""
    parser = argparse.ArgumentParser(description="Fuzz es_proxy's parsers and a running proxy.")
    parser.add_argument("--fuzz", metavar="SECONDS", type=float, required=True, help="for how long")
    parser.add_argument("--seed", metavar="N", type=int, help="default: a new one, which is printed")
    parser.add_argument("--only", metavar="INDEX", type=int, help="just this input")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first find")
    words = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if words.seed is None else words.seed
    return fuzz(words.fuzz, seed, words.only, words.keep_going)


if __name__ == "__main__":
    sys.exit(main())
