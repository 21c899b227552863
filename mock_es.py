"""mock_es: a stand-in Elasticsearch in one file, for tests, load runs and the demonstration of es_proxy.

    python3 mock_es.py [--port N] [--host H] [--tls CERT KEY] [--user NAME:PASSWORD]...
    python3 mock_es.py --demo [--once]

It answers as Elasticsearch does where a client can tell the difference (shapes, statuses, headers, content types),
remembers documents in memory, and breaks on purpose where a test asks it to. It does not analyse, score or aggregate:
every query matches everything, save `ids`. It knows nothing of es_proxy, which only the demonstration starts.

In a test::

    with MockES(users={"elastic": "changeme"}) as mock:
        ...                                         # requests to mock.url
        first, second = mock.wait_for_requests(2)
        assert first.raw == b"GET / HTTP/1.1\\r\\n..."

Under load, in a process of its own::

    with MockProcess() as mock:
        ...                                         # requests to mock.url
        assert mock.stats()["requests"] == 100_000

What it answers
---------------
/  _cluster/health  _cat/indices (text, ?format=json)  _search (size, from, ids, search_after)  _search/scroll  _pit
_msearch  _count  _mget  _bulk  _doc  _create  _update  _source  _mapping  _settings  _refresh, and index create, get,
exists, delete. Any other endpoint is acknowledged: {"acknowledged":true}. An index without remembered documents is
searched as if it held 10 000 (VIRTUAL_DOCUMENTS), so that sizes can be checked without indexing anything. At most
256 MiB of documents are remembered; beyond that the oldest are forgotten.

Requests are read tolerantly (a bare LF ends a line, the first of two lengths counts): a stand-in that refused what a
proxy let through would hide the proxy's mistake. What can't be read at all is answered with 400 and kept in
MockES.broken.

Faults, by path
---------------
Every method will do. Sizes are in bytes, times in milliseconds; the number is the default. Bodies of N bytes are those
of big_body(N), whose digest is big_sha256(N).

    /_mock/slow?ms=100                 answers after a pause; nobody else waits
    /_mock/silence                     never answers, until the client leaves
    /_mock/big?bytes=1048576           a long body with Content-Length, in constant memory
    /_mock/chunked?bytes=1048576&chunk=65536          the same, chunked
    /_mock/drip?bytes=10&ms=100        a body with Content-Length, one byte at a time
    /_mock/no-length?bytes=1000&abort=0               a body that ends with the connection; abort=1: in TLS without
                                       close_notify
    /_mock/http10?bytes=1000           HTTP/1.0 with Content-Length, then close
    /_mock/status?code=200             that status; from 400 on an error in Elasticsearch's shape; 204, 304: no body
    /_mock/100?n=1&ms=0                n interim responses, ms apart (0: all in one write), then the final one;
                                       also /_mock/102 and /_mock/103
    /_mock/101                         101 Switching Protocols, then nothing more until the client leaves
    /_mock/early?code=413&linger=1000  answers on the request's head alone, half-closes, discards what comes for at most
                                       linger ms, closes; linger=0: closes at once, which resets
    /_mock/extra?ms=0                  a complete response, and ms later a second one that nobody asked for
    /_mock/close-before-response       closes instead of answering
    /_mock/close-reused                closes instead of answering, unless it is the connection's first request
    /_mock/close-after?ms=100          answers, keeps alive, and closes the idle connection ms later
    /_mock/close-mid-head              half a head
    /_mock/close-mid-body?bytes=1000&sent=500         half a body that had Content-Length
    /_mock/chunked-truncated?bytes=1000               chunks without the last one
    /_mock/reset-mid-body?bytes=1000&sent=500&ms=50   half a body, ms later a reset (RST)
    /_mock/raw?piece=0&ms=0&close=1    the request's body, verbatim, is the response: in pieces of that many bytes (0:
                                       whole), ms apart; close=0: keeps the connection, for what comes behind it
    /_mock/echo                        the request's body as body
    /_mock/headers                     the request's fields as JSON, [[name, value], ...]
    /_mock/sink                        reads any body, keeps and answers only {"length": n, "sha256": hex}
    /_mock/stats                       {"requests", "connections", "open", "bytes"} since the start; itself not counted

Map: Constants, HTTP messages, Answers, Documents, Elasticsearch, Recording, Faults, Connections, Servers,
Demonstration, Command line. A name stands above its use.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import functools
import gzip
import hashlib
import hmac
import http.client
import itertools
import json
import os
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Object: TypeAlias = "dict[str, JSON]"
Fields: TypeAlias = "tuple[tuple[bytes, bytes], ...]"

# == Constants =========================================================================================================

VERSION = "8.15.0"  # what it claims to be: official clients of 7.14 and later accept it
CLUSTER_NAME = "mock_es"
CLUSTER_UUID = "bW9ja19lcyBjbHVzdGVyIA"
DEFAULT_PORT = 9200
BACKLOG_CONNECTIONS = 1024  # a burst of 200 clients must not be refused by the stand-in
MAX_HEAD_BYTES = 1 << 20  # far above any proxy's limit, so that the limit under test is the proxy's
KEPT_BODY_BYTES = 1 << 20  # longer bodies are recorded by length and SHA-256 only
READ_AHEAD_BYTES = 1 << 20  # pipelined bytes held while a response is under way; then reading pauses
GZIP_ABOVE_BYTES = 1024  # a shorter answer is never compressed
BLOCK_BYTES = 1 << 16  # unit of big_body
REMEMBERED_BYTES = 256 << 20  # documents in memory, by source length
VIRTUAL_DOCUMENTS = 10_000  # hits of an index without remembered documents
RESULT_WINDOW = 10_000  # from + size at most, as index.max_result_window
OPEN_CONTEXTS = 500  # scrolls and points in time, as search.max_open_scroll_context; then the oldest goes
KNOWN_REQUESTS = 1024  # whole requests whose answer is at hand, see Backend.known
KNOWN_REQUEST_BYTES = 4096
KNOWN_ANSWERS_BYTES = 64 << 20  # of all answers at hand together
LINGER_SECONDS = 1.0  # that a refused client has to read its answer
START_SECONDS = 15.0  # a program that doesn't serve by then won't
STOP_SECONDS = 10.0  # a program that still runs then is killed

REASONS: Mapping[int, str] = {status.value: status.phrase for status in HTTPStatus}
PRODUCT = (b"X-elastic-product", b"Elasticsearch")
CHALLENGE = 'Basic realm="security" charset="UTF-8"'
CLOSE = (b"connection", b"close")
BODILESS: frozenset[int] = frozenset({204, 304})

# == HTTP messages =====================================================================================================
# From bytes to requests. Knows no socket, no time, no Elasticsearch. Runs in the loop's thread.

HEAD_END = re.compile(rb"\r?\n\r?\n")
REQUEST_LINE = re.compile(rb"(\S+)[ \t]+(\S.*?)[ \t]+HTTP/(\d\.\d)[ \t]*")
ORIGIN = re.compile(rb"https?://[^/?]*", re.IGNORECASE)
LENGTH = re.compile(rb"[0-9]{1,18}")
SEPARATORS = re.compile(rb"[ \t]*[,;][ \t]*")
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")


class BadRequestError(Exception):
    """The bytes can't be read as a request; `status` is the answer."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """A request's head, parsed once; shared by all requests with the same bytes, hence immutable."""

    method: bytes
    target: bytes
    version: bytes  # b"1.1"
    fields: Fields  # in order, names as they came, values without surrounding whitespace
    path: str  # percent-decoded
    parts: tuple[str, ...]  # the path's segments, each percent-decoded after splitting, without empty ones
    query: Mapping[str, str]
    lookup: Mapping[bytes, bytes]  # lower-case name -> first value
    length: int | None  # of the body, in bytes; None: chunked
    keep_alive: bool

    def first(self, name: bytes) -> bytes:
        """Return the first field of that lower-case name, b"" when there is none."""
        return self.lookup.get(name, b"")

    def names(self, name: bytes, token: bytes) -> bool:
        """Tell whether a comma-separated field holds `token` (lower case)."""
        value = self.lookup.get(name)
        return value is not None and token in SEPARATORS.split(value.lower())


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came; `body` is de-chunked but not gunzipped.

    A record of a body above KEPT_BODY_BYTES has an empty `body` and only the head in `raw`;
    `length` and `sha256` tell the truth about every body.
    """

    head: Head
    body: bytes
    length: int  # of the body, in bytes, without chunk framing
    digest: str | None  # SHA-256 in hex where it had to be computed on the way, see sha256
    raw: bytes  # exactly as received, framing and all
    connection: int  # number of the connection it came on, from 1

    @property
    def method(self) -> bytes:
        return self.head.method

    @property
    def target(self) -> bytes:
        return self.head.target

    @property
    def version(self) -> bytes:
        """The protocol version, b"1.1" or b"1.0"."""
        return self.head.version

    @property
    def fields(self) -> Fields:
        """Header fields as (name, value), in the order and casing they came."""
        return self.head.fields

    @property
    def sha256(self) -> str:
        """The body's SHA-256 in hex."""
        return self.digest or hashlib.sha256(self.body).hexdigest()

    def values(self, name: bytes) -> list[bytes]:
        """Return every value of a field, whatever its casing, in order."""
        return [value for key, value in self.head.fields if key.lower() == name.lower()]


def body_length(lookup: Mapping[bytes, bytes]) -> int | None:
    """Return the body's length in bytes, None for chunked (RFC 9112 6.3: Transfer-Encoding overrides a length)."""
    if b"chunked" in lookup.get(b"transfer-encoding", b"").lower():
        return None
    length = lookup.get(b"content-length", b"0")
    if not LENGTH.fullmatch(length):
        raise BadRequestError(f"invalid Content-Length {length[:40]!r}")
    return int(length)


@functools.lru_cache(maxsize=512)
def parse_head(raw: bytes) -> Head:
    """Parse a head (without its empty lines). Cached: a client under load sends the same one again and again."""
    first, *lines = raw.split(b"\n")
    match = REQUEST_LINE.fullmatch(first.rstrip(b"\r"))
    if match is None:
        raise BadRequestError(f"invalid request line {first[:80]!r}")
    method, target, version = match.groups()
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        name, colon, value = line.rstrip(b"\r").partition(b":")
        if not colon:
            raise BadRequestError(f"header line without a colon {line[:80]!r}")
        fields.append((name, value.strip(b" \t")))
    lookup = {name.strip().lower(): value for name, value in reversed(fields)}
    path, _, query = ORIGIN.sub(b"", target, count=1).decode("latin-1").partition("?")
    persistence = lookup.get(b"connection", b"").lower()
    return Head(
        method=method,
        target=target,
        version=version,
        fields=tuple(fields),
        path=unquote(path),
        parts=tuple(unquote(part) for part in path.split("/") if part),
        query=dict(parse_qsl(query, keep_blank_values=True)) if query else {},
        lookup=lookup,
        length=body_length(lookup),
        keep_alive=b"keep-alive" in persistence if version == b"1.0" else b"close" not in persistence,
    )


class Body:
    """A body on its way in: all of it, and from KEPT_BODY_BYTES on its SHA-256; when `discard`, then only that."""

    def __init__(self, discard: bool) -> None:
        self.length = 0
        self._discard = discard
        self._pieces: list[bytes] = []
        self._hash: hashlib._Hash | None = None

    @property
    def long(self) -> bool:
        return self._hash is not None

    def add(self, piece: bytes) -> None:
        self.length += len(piece)
        if self._hash is not None:
            self._hash.update(piece)
        if self._hash is None or not self._discard:
            self._pieces.append(piece)
        if self._hash is None and self.length > KEPT_BODY_BYTES:
            self._hash = hashlib.sha256(b"".join(self._pieces))
            if self._discard:
                self._pieces.clear()

    def content(self) -> bytes:
        return b"".join(self._pieces)

    def digest(self) -> str | None:
        return self._hash.hexdigest() if self._hash is not None else None


class RequestReader:
    """Reads one request after the other from bytes as they come.

    read_head() and then read_body() until each has something to return; both return None while bytes are missing.
    """

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self._buffer = b""
        self._begin()

    def _begin(self) -> None:
        self._head: Head | None = None
        self._body = Body(discard=False)
        self._raw: list[bytes] = []  # the head, then the framed body as long as that is short
        self._left = 0  # bytes still missing of the body, or of the chunk
        self._chunk_ends = False  # the line end behind a chunk's data is next
        self._trailer = False  # the last chunk was seen

    def feed(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data

    @property
    def empty(self) -> bool:
        """Nothing of a request is waiting."""
        return self._head is None and not self._buffer

    @property
    def buffered(self) -> int:
        """Bytes received but not yet read as part of a request."""
        return len(self._buffer)

    @property
    def in_body(self) -> bool:
        return self._head is not None

    def rest(self) -> bytes:
        """Return what was received of an unfinished request."""
        return b"".join(self._raw) + self._buffer

    def read_head(self) -> Head | None:
        """Return the next request's head. Raises BadRequestError."""
        begin = len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))
        end = HEAD_END.search(self._buffer, begin)
        if end is None:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadRequestError(f"head of more than {MAX_HEAD_BYTES} bytes", 431)
            return None
        head = parse_head(self._buffer[begin : end.start()])
        self._take(end.end())
        self._head = head
        self._left = head.length or 0
        if head.path == "/_mock/sink":
            self._body = Body(discard=True)
        return head

    def read_body(self) -> Request | None:
        """Return the request once its body is whole. Raises BadRequestError on broken chunks."""
        head = self._head
        if head is None:
            return None
        if not (self._read_chunks() if head.length is None else self._read_length()):
            return None
        return self.take_request()

    def take_request(self) -> Request:
        """Return the request with what there is of its body, and begin the next one."""
        head, body = self._head, self._body
        assert head is not None, "no head was read"
        request = Request(head, body.content(), body.length, body.digest(), b"".join(self._raw), self._connection)
        self._begin()
        return request

    def _take(self, count: int) -> None:
        """Move `count` bytes from the buffer to the raw bytes."""
        taken, self._buffer = (self._buffer, b"") if count == len(self._buffer) else self._cut(count)
        if self._body.long:
            del self._raw[1:]
        else:
            self._raw.append(taken)

    def _cut(self, count: int) -> tuple[bytes, bytes]:
        return self._buffer[:count], self._buffer[count:]

    def _read_length(self) -> bool:
        if self._left and self._buffer:
            piece = self._buffer[: self._left]
            self._left -= len(piece)
            self._body.add(piece)
            self._take(len(piece))
        return not self._left

    def _read_chunks(self) -> bool:
        """Read chunks, extensions and trailers (RFC 9112 7.1); True at the end. Linear in the bytes."""
        at, done = 0, False
        while not done:
            if self._left:
                piece = self._buffer[at : at + self._left]
                self._body.add(piece)
                self._left -= len(piece)
                at += len(piece)
                if self._left:
                    break
                self._chunk_ends = True
            end = self._buffer.find(b"\n", at)
            if end < 0:
                break
            done = self._read_chunk_line(self._buffer[at:end].rstrip(b"\r"))
            at = end + 1
        self._take(at)
        return done

    def _read_chunk_line(self, line: bytes) -> bool:
        """Read a line of the framing; True for the last one."""
        if self._trailer:
            return not line
        if self._chunk_ends:
            if line:
                raise BadRequestError(f"chunk longer than its size: {line[:40]!r}")
            self._chunk_ends = False
            return False
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise BadRequestError(f"invalid chunk size {line[:40]!r}")
        self._left = int(match[1], 16)
        self._trailer = not self._left
        return False


# == Answers ===========================================================================================================
# From values to bytes, in Elasticsearch's shapes. Knows no socket and no documents.

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would build one a call
VENDORED = re.compile(rb"application/vnd\.elasticsearch\+(?:x-nd)?json\s*;\s*compatible-with\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Response:
    """An ordinary answer, before the request decides about gzip, keep-alive and content type."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    fields: Fields = ()
    repeatable: bool = False  # the same bytes get the same answer until a document changes


class ElasticError(Exception):
    """A failure in Elasticsearch's terms; `details` are further members of the error object."""

    def __init__(self, status: int, kind: str, reason: str, **details: JSON) -> None:
        super().__init__(reason)
        self.status = status
        self.cause: Object = {"type": kind, "reason": reason, **details}

    def response(self) -> Response:
        return answer({"error": {"root_cause": [self.cause], **self.cause}, "status": self.status}, self.status)


def dump(value: JSON) -> bytes:
    return ENCODER.encode(value).encode("utf-8", "surrogatepass")


def answer(value: JSON, status: int = 200, *, repeatable: bool = False) -> Response:
    return Response(status, dump(value), repeatable=repeatable)


def load(data: bytes) -> JSON:
    """Parse JSON. Raises ElasticError: 400 parse_exception, which is what clients know for it."""
    try:
        value: JSON = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ElasticError(400, "parse_exception", f"Failed to parse content: {error}") from None
    return value


def load_object(data: bytes) -> Object:
    """Parse a JSON object. Raises ElasticError."""
    return as_object(load(data))


def as_object(value: JSON) -> Object:
    if not isinstance(value, dict):
        raise ElasticError(400, "parse_exception", f"Expected an object but got {dump(value)[:80]!r}")
    return value


def as_list(value: JSON) -> list[JSON]:
    return value if isinstance(value, list) else [] if value is None else [value]


def as_number(value: JSON, name: str, default: int) -> int:
    """Return a whole number that isn't negative, from JSON or a query string. Raises ElasticError."""
    if value is None:
        return default
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value), re.ASCII):
        raise ElasticError(400, "illegal_argument_exception", f"[{name}] must be a whole number from 0, got [{value}]")
    return int(str(value))


def head_bytes(status: int, fields: Iterable[tuple[bytes, bytes]] = (), version: str = "1.1") -> bytes:
    """Serialise a response's head, the empty line included."""
    lines = [f"HTTP/{version} {status} {REASONS.get(status, 'Unknown')}".encode()]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join([*lines, b"", b""])


def media_type(response: Response, accept: bytes) -> bytes:
    """Return the answer's Content-Type: the vendored one to clients that ask for it, in the version they ask for."""
    match = VENDORED.search(accept)
    if match and response.content_type == b"application/json":
        return b"application/vnd.elasticsearch+json;compatible-with=" + match[1]
    return response.content_type


def serialise(request: Request, response: Response, keep_alive: bool) -> bytes:
    """Turn an answer into the bytes for this request: pretty, gzip, HEAD and persistence as it asks."""
    head, body = request.head, response.body
    if head.query.get("pretty", "false") != "false" and response.content_type == b"application/json":
        body = json.dumps(json.loads(body), ensure_ascii=False, indent=2).encode() + b"\n"
    fields = [PRODUCT, *response.fields]
    if len(body) > GZIP_ABOVE_BYTES and head.names(b"accept-encoding", b"gzip"):
        body = gzip.compress(body, compresslevel=1, mtime=0)
        fields.append((b"content-encoding", b"gzip"))
    if response.status not in BODILESS:
        fields.append((b"content-type", media_type(response, head.first(b"accept"))))
        fields.append((b"content-length", b"%d" % len(body)))
    if not keep_alive:
        fields.append(CLOSE)
    elif head.version == b"1.0":
        fields.append((b"connection", b"keep-alive"))
    silent = head.method == b"HEAD" or response.status in BODILESS
    return head_bytes(response.status, fields) + (b"" if silent else body)


# == Documents =========================================================================================================
# What is remembered: indices, documents and open search contexts. Knows no HTTP. Used by the loop's thread only.


@dataclass(slots=True)  # not frozen, as Row: that would triple the cost of making one
class Document:
    """A remembered document. The source stays as it came, bit by bit: spliced into answers, never re-serialised."""

    source: bytes
    version: int
    seq_no: int


@dataclass(slots=True)
class Row:
    """A document and where it is; what searches return."""

    index: str
    id: str
    document: Document


@dataclass(slots=True)
class Index:
    """An index: documents by id, in the order they were first written."""

    documents: dict[str, Document] = field(default_factory=dict)
    mappings: Object = field(default_factory=dict)
    settings: Object = field(default_factory=dict)


@dataclass(slots=True)
class Context:
    """An open scroll or point in time: its rows, frozen, and how far it was read."""

    rows: list[Row]
    size: int = 0
    position: int = 0


def missing_index(name: str) -> ElasticError:
    details: Object = {"resource.type": "index_or_alias", "resource.id": name, "index_uuid": "_na_", "index": name}
    return ElasticError(404, "index_not_found_exception", f"no such index [{name}]", **details)


@functools.lru_cache(maxsize=VIRTUAL_DOCUMENTS)
def virtual_row(index: str, number: int) -> Row:
    """Return a document that nobody wrote, the same each time."""
    source = b'{"number":%d,"title":"virtual document %d"}' % (number, number)
    return Row(index, f"virtual-{number}", Document(source, 1, number))


class Store:
    """All indices. Every change raises `generation`."""

    def __init__(self) -> None:
        self.indices: dict[str, Index] = {}
        self.generation = 0
        self._sequence = itertools.count()
        self._ids = itertools.count(1)
        self._contexts: dict[str, Context] = {}
        self._source_bytes = 0

    def clear(self) -> None:
        self.indices.clear()
        self._contexts.clear()
        self._source_bytes = 0
        self.generation += 1

    def new_id(self) -> str:
        """Return an id for a document without one: 20 characters, as Elasticsearch's, but the same in every run."""
        return f"auto-{next(self._ids):015d}"

    # -- indices

    def create_index(self, name: str) -> Index:
        """Add an index. Raises ElasticError when the name is impossible or taken."""
        if name != name.lower() or name in (".", "..") or re.search(r'[\\/*?"<>| ,#:]|^[-_+]', name):
            raise ElasticError(400, "invalid_index_name_exception", f"Invalid index name [{name}]", index=name)
        if name in self.indices:
            reason = f"index [{name}] already exists"
            raise ElasticError(400, "resource_already_exists_exception", reason, index=name)
        self.generation += 1
        return self.indices.setdefault(name, Index())

    def delete_index(self, name: str) -> None:
        index = self.indices.pop(name)
        self._source_bytes -= sum(len(document.source) for document in index.documents.values())
        self.generation += 1

    def resolve(self, expression: str | None, *, strict: bool = True) -> list[str]:
        """Return the existing indices that an expression (`a,b*`, `_all`) names. Raises ElasticError when `strict`."""
        names: dict[str, None] = {}
        for part in (expression or "_all").split(","):
            pattern = "*" if part == "_all" else part
            if "*" in pattern:
                names |= {name: None for name in self.indices if fnmatchcase(name, pattern)}
            elif pattern in self.indices:
                names[pattern] = None
            elif strict:
                raise missing_index(part)
        return list(names)

    # -- documents

    def get(self, index: str, identifier: str) -> Document | None:
        found = self.indices.get(index)
        return found.documents.get(identifier) if found else None

    def put(self, index: str, identifier: str, source: bytes) -> Document:
        """Write a document, creating its index when it must."""
        home = self.indices.get(index) or self.create_index(index)
        old = home.documents.get(identifier)
        new = Document(source, old.version + 1 if old else 1, next(self._sequence))
        home.documents[identifier] = new
        self._source_bytes += len(source) - (len(old.source) if old else 0)
        self.generation += 1
        if self._source_bytes > REMEMBERED_BYTES:
            self._forget()
        return new

    def remove(self, index: str, identifier: str) -> Document | None:
        home = self.indices.get(index)
        old = home.documents.pop(identifier, None) if home else None
        if old is None:
            return None
        self._source_bytes -= len(old.source)
        self.generation += 1
        return Document(b"", old.version + 1, next(self._sequence))

    def _forget(self) -> None:
        """Drop the oldest documents of each index in turn until the rest fits."""
        for name, index in list(self.indices.items()):
            while index.documents and self._source_bytes > REMEMBERED_BYTES:
                self.remove(name, next(iter(index.documents)))

    # -- searches

    def count(self, expression: str | None) -> int:
        """Return how many rows there are; a missing index is one without documents."""
        names = self.resolve(expression, strict=False)
        return sum(len(self.indices[name].documents) for name in names) or VIRTUAL_DOCUMENTS

    def rows(self, expression: str | None, start: int = 0, stop: int | None = None) -> list[Row]:
        """Return rows start to stop of an expression's documents; virtual ones where none are remembered.

        Costs as much as it skips and returns, not as much as there is: a search must stay cheap while bulks go on.
        """
        names = self.resolve(expression, strict=False)
        if any(self.indices[name].documents for name in names):
            every = (Row(name, key, each) for name in names for key, each in self.indices[name].documents.items())
            return list(itertools.islice(every, start, stop))
        end = VIRTUAL_DOCUMENTS if stop is None else min(stop, VIRTUAL_DOCUMENTS)
        home = (expression or "virtual").split(",")[0]
        return [virtual_row(home, number) for number in range(start, end)]

    def open_context(self, rows: list[Row], size: int = 0, position: int = 0) -> str:
        """Freeze rows for a scroll or a point in time; the oldest context makes room."""
        if len(self._contexts) >= OPEN_CONTEXTS:
            del self._contexts[next(iter(self._contexts))]
        identifier = base64.urlsafe_b64encode(b"mock_es context %012d" % next(self._ids)).decode()
        self._contexts[identifier] = Context(rows, size, position)
        return identifier

    def context(self, identifier: JSON) -> Context:
        """Return an open context. Raises ElasticError."""
        context = self._contexts.get(str(identifier))
        if context is None:
            reason = f"No search context found for id [{identifier}]"
            raise ElasticError(404, "search_context_missing_exception", reason)
        return context

    def close_contexts(self, identifiers: Iterable[JSON]) -> int:
        """Close contexts, `_all` for every one, and return how many there were."""
        wanted = [str(each) for each in identifiers]
        closed = list(self._contexts) if "_all" in wanted else [each for each in wanted if each in self._contexts]
        for each in closed:
            del self._contexts[each]
        return len(closed)


# == Elasticsearch =====================================================================================================
# The endpoints: from a request to an answer. Knows no socket. Runs in the loop's thread.

SHARDS: Mapping[str, JSON] = {"total": 1, "successful": 1, "failed": 0}
NDJSON_END = ElasticError(400, "illegal_argument_exception", "The bulk request must be terminated by a newline [\\n]")


@dataclass(slots=True)
class Call:
    """A request as an endpoint sees it."""

    method: str  # HEAD is GET here; serialise() leaves the body out
    target: str
    index: str | None  # what stands before the endpoint in the path
    rest: tuple[str, ...]  # what follows it
    query: Mapping[str, str]
    body: bytes  # gunzipped
    json_body: bool  # by its Content-Type

    def object(self) -> Object:
        """Parse the body, {} when there is none. Raises ElasticError."""
        return load_object(self.body) if self.body.strip() else {}

    def required_index(self) -> str:
        if self.index is None:
            raise no_handler(self.target, self.method)
        return self.index


Handler: TypeAlias = Callable[[Call], Response]


def no_handler(target: str, method: str) -> ElasticError:
    reason = f"no handler found for uri [{target}] and method [{method}]"
    return ElasticError(400, "illegal_argument_exception", reason)


def invalid_request(reason: str) -> ElasticError:
    return ElasticError(400, "action_request_validation_exception", f"Validation Failed: 1: {reason};")


def gunzipped(request: Request) -> bytes:
    """Return the body as meant. Raises ElasticError when it claims gzip and isn't."""
    if not request.head.names(b"content-encoding", b"gzip"):
        return request.body
    try:
        return gzip.decompress(request.body)
    except (OSError, EOFError, zlib.error) as error:
        raise ElasticError(400, "parse_exception", f"Failed to decompress content: {error}") from None


def write_result(index: str, identifier: str, document: Document | None, result: str) -> Object:
    """Return the answer to one write; `document` is None where there was nothing to write to."""
    return {
        "_index": index,
        "_id": identifier,
        "_version": document.version if document else 1,
        "result": result,
        "_shards": dict(SHARDS),
        "_seq_no": document.seq_no if document else 0,
        "_primary_term": 1,
    }


def get_result(index: str, identifier: str, document: Document | None) -> bytes:
    """Return the JSON of a document got, found or not."""
    where: Object = {"_index": index, "_id": identifier}
    if document is None:
        return dump({**where, "found": False})
    where.update({"_version": document.version, "_seq_no": document.seq_no, "_primary_term": 1, "found": True})
    return dump(where)[:-1] + b',"_source":' + document.source + b"}"


def hit_json(row: Row, with_source: bool, sort_values: int) -> bytes:
    """Return the JSON of one hit. Its sort values are all its sequence number: there is only one order."""
    where = b'{"_index":%b,"_id":%b' % (dump(row.index), dump(row.id))
    sort = b",".join([b"%d" % row.document.seq_no] * sort_values)
    score = b',"_score":null,"sort":[%b]' % sort if sort_values else b',"_score":1.0'
    return where + score + (b',"_source":%b}' % row.document.source if with_source else b"}")


def search_json(total: int, hits: Iterable[bytes], extra: bytes = b"") -> bytes:
    """Return the JSON of a search's answer, `extra` members first.

    Put together from bytes, for this is what load runs ask for; `took` never varies, so that equal requests get equal
    bytes.
    """
    head = b'{%b"took":1,"timed_out":false,"_shards":{"total":1,"successful":1,"skipped":0,"failed":0}' % extra
    found = b'"total":{"value":%d,"relation":"eq"},"max_score":1.0,"hits":[%b]' % (total, b",".join(hits))
    return b'%b,"hits":{%b}}' % (head, found)


def page_of(query: Mapping[str, str], body: Object) -> tuple[int, int]:
    """Return (from, size) of a search, the query string first. Raises ElasticError outside the result window."""
    start = as_number(query.get("from", body.get("from")), "from", 0)
    size = as_number(query.get("size", body.get("size")), "size", 10)
    if start + size > RESULT_WINDOW:
        reason = f"Result window is too large, from + size must be less than or equal to: [{RESULT_WINDOW}]"
        raise ElasticError(400, "illegal_argument_exception", f"{reason} but was [{start + size}]")
    return start, size


def merged(old: Object, new: Object) -> Object:
    """Merge a partial document into a whole one, object by object, as _update does."""
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def ndjson_lines(body: bytes) -> list[bytes]:
    """Split an NDJSON body. Raises ElasticError when it is empty or lacks its last newline."""
    if not body.strip():
        raise ElasticError(400, "parse_exception", "request body is required")
    if not body.endswith(b"\n"):
        raise NDJSON_END
    return body.split(b"\n")[:-1]


class Cluster:
    """What Elasticsearch would answer."""

    def __init__(self, version: str) -> None:
        self.store = Store()
        self._version = version
        self._roots: Mapping[bool, tuple[str, Handler]] = {
            False: ("GET", self._info),
            True: ("GET PUT DELETE", self._index),
        }
        self._routes: Mapping[str, tuple[str, Handler]] = {
            "_bulk": ("POST PUT", self._bulk),
            "_cat": ("GET", self._cat),
            "_cluster": ("GET POST PUT", self._cluster),
            "_count": ("GET POST", self._count),
            "_create": ("POST PUT", self._create),
            "_doc": ("GET POST PUT DELETE", self._doc),
            "_mapping": ("GET POST PUT", self._mapping),
            "_mappings": ("GET POST PUT", self._mapping),
            "_mget": ("GET POST", self._mget),
            "_msearch": ("GET POST", self._msearch),
            "_pit": ("POST DELETE", self._pit),
            "_refresh": ("GET POST", self._refresh),
            "_search": ("GET POST DELETE", self._search),
            "_settings": ("GET PUT", self._settings),
            "_source": ("GET", self._source),
            "_update": ("POST", self._update),
        }

    def answer(self, request: Request) -> Response:
        """Answer a request; failures are answers too."""
        try:
            return self._dispatch(request)
        except ElasticError as error:
            return error.response()

    def _dispatch(self, request: Request) -> Response:
        head, parts = request.head, request.head.parts
        named = bool(parts) and (not parts[0].startswith("_") or parts[0] == "_all")
        endpoint = parts[int(named)] if len(parts) > named else ""
        call = Call(
            method="GET" if head.method == b"HEAD" else head.method.decode("latin-1"),
            target=head.target.decode("latin-1"),
            index=parts[0] if named else None,
            rest=parts[named + 1 :],
            query=head.query,
            body=gunzipped(request),
            json_body=b"json" in head.first(b"content-type") and b"ndjson" not in head.first(b"content-type"),
        )
        if endpoint:
            allowed, handler = self._routes.get(endpoint, (call.method, self._acknowledge))
        else:
            allowed, handler = self._roots[named]
        if call.method not in allowed.split():
            return self._wrong_method(call, allowed.split())
        return handler(call)

    def _wrong_method(self, call: Call, allowed: list[str]) -> Response:
        names = ", ".join(sorted(allowed))
        allow = (b"Allow", ",".join(sorted(allowed)).encode())
        reason = f"Incorrect HTTP method for uri [{call.target}] and method [{call.method}], allowed: [{names}]"
        return replace(answer({"error": reason, "status": 405}, 405), fields=(allow,))

    # -- cluster

    def _info(self, _: Call) -> Response:
        version: Object = {
            "number": self._version,
            "build_flavor": "default",
            "build_type": "tar",
            "build_hash": "0" * 40,
            "build_date": "2024-08-05T10:05:34.233336849Z",
            "build_snapshot": False,
            "lucene_version": "9.11.1",
            "minimum_wire_compatibility_version": "7.17.0",
            "minimum_index_compatibility_version": "7.0.0",
        }
        about: Object = {"name": "mock", "cluster_name": CLUSTER_NAME, "cluster_uuid": CLUSTER_UUID, "version": version}
        return answer({**about, "tagline": "You Know, for Search"}, repeatable=True)

    def _cluster(self, call: Call) -> Response:
        if call.rest[:1] != ("health",):
            return self._acknowledge(call)
        shards = len(self.store.indices)
        health: Object = {"cluster_name": CLUSTER_NAME, "status": "green", "timed_out": False}
        health.update(dict.fromkeys(("number_of_nodes", "number_of_data_nodes"), 1))
        health.update(dict.fromkeys(("active_primary_shards", "active_shards"), shards))
        zeros = ("relocating", "initializing", "unassigned", "delayed_unassigned")
        health.update({f"{name}_shards": 0 for name in zeros})
        health.update(dict.fromkeys(("number_of_pending_tasks", "number_of_in_flight_fetch"), 0))
        health.update({"task_max_waiting_in_queue_millis": 0, "active_shards_percent_as_number": 100.0})
        return answer(health, repeatable=True)

    def _cat(self, call: Call) -> Response:
        if call.rest[:1] != ("indices",):
            return Response(200, b"", b"text/plain; charset=UTF-8")
        columns = ("health", "status", "index", "pri", "rep", "docs.count", "store.size")
        table: list[tuple[str, ...]] = []
        for name in self.store.resolve(call.rest[1] if len(call.rest) > 1 else None):
            documents = self.store.indices[name].documents
            size = sum(len(document.source) for document in documents.values())
            table.append(("green", "open", name, "1", "0", str(len(documents)), f"{size}b"))
        if call.query.get("format") == "json":
            return answer([dict(zip(columns, row, strict=True)) for row in table])
        if call.query.get("v", "false") != "false":
            table.insert(0, columns)
        text = "".join(" ".join(row) + "\n" for row in table)
        return Response(200, text.encode(), b"text/plain; charset=UTF-8")

    def _acknowledge(self, call: Call) -> Response:
        """Answer every endpoint that isn't modelled, once its body is at least JSON."""
        if call.json_body and call.body.strip():
            load(call.body)
        return answer({"acknowledged": True})

    # -- indices

    def _index(self, call: Call) -> Response:
        name = call.required_index()
        if call.method == "PUT":
            body = call.object()
            index = self.store.create_index(name)
            index.mappings = as_object(body.get("mappings") or {})
            index.settings = as_object(body.get("settings") or {})
            return answer({"acknowledged": True, "shards_acknowledged": True, "index": name})
        names = self.store.resolve(name)
        if call.method == "DELETE":
            for each in names:
                self.store.delete_index(each)
            return answer({"acknowledged": True})
        found: Object = {}
        for each in names:
            index = self.store.indices[each]
            found[each] = {"aliases": {}, "mappings": index.mappings, "settings": {"index": index.settings}}
        return answer(found)

    def _mapping(self, call: Call) -> Response:
        names = self.store.resolve(call.index)
        if call.method == "GET":
            return answer({name: {"mappings": self.store.indices[name].mappings} for name in names})
        body = call.object()
        for name in names:
            index = self.store.indices[name]
            index.mappings = merged(index.mappings, body)
        return answer({"acknowledged": True})

    def _settings(self, call: Call) -> Response:
        names = self.store.resolve(call.index)
        if call.method == "GET":
            return answer({name: {"settings": {"index": self.store.indices[name].settings}} for name in names})
        body = call.object()
        for name in names:
            index = self.store.indices[name]
            index.settings = merged(index.settings, as_object(body.get("index", body)))
        return answer({"acknowledged": True})

    def _refresh(self, call: Call) -> Response:
        self.store.resolve(call.index)
        return answer({"_shards": dict(SHARDS)})

    # -- documents

    def _doc(self, call: Call) -> Response:
        index = call.required_index()
        if not call.rest:
            if call.method != "POST":
                return self._wrong_method(call, ["POST"])
            return self._written(index, self.store.new_id(), call)
        identifier = "/".join(call.rest)
        if call.method == "GET":
            document = self.store.get(index, identifier)
            if document is None and index not in self.store.indices:
                raise missing_index(index)
            return Response(200 if document else 404, get_result(index, identifier, document))
        if call.method == "DELETE":
            return self._answer_write(*self._delete(index, identifier))
        if call.query.get("op_type") == "create":
            return self._create(call)
        return self._written(index, identifier, call)

    def _create(self, call: Call) -> Response:
        index = call.required_index()
        identifier = "/".join(call.rest) or self.store.new_id()
        self._refuse_existing(index, identifier)
        return self._written(index, identifier, call)

    def _written(self, index: str, identifier: str, call: Call) -> Response:
        if not call.body.strip():
            raise ElasticError(400, "parse_exception", "request body is required")
        return self._answer_write(*self._put(index, identifier, call.body.strip()))

    def _update(self, call: Call) -> Response:
        index, identifier = call.required_index(), "/".join(call.rest)
        return self._answer_write(*self._change(index, identifier, call.object()))

    def _source(self, call: Call) -> Response:
        index, identifier = call.required_index(), "/".join(call.rest)
        document = self.store.get(index, identifier)
        if document is None:
            reason = f"Document not found [{index}]/[{identifier}]"
            raise ElasticError(404, "resource_not_found_exception", reason)
        return Response(200, document.source)

    def _mget(self, call: Call) -> Response:
        body = call.object()
        wanted = [as_object(each) for each in as_list(body.get("docs"))]
        wanted += [{"_id": each} for each in as_list(body.get("ids"))]
        places = [(str(each.get("_index", call.index)), str(each.get("_id"))) for each in wanted]
        found = [get_result(index, identifier, self.store.get(index, identifier)) for index, identifier in places]
        return Response(200, b'{"docs":[' + b",".join(found) + b"]}")

    def _answer_write(self, status: int, result: Object) -> Response:
        return answer(result, status)

    # -- single writes, shared by documents and bulk; each returns (status, answer)

    def _put(self, index: str, identifier: str, source: bytes) -> tuple[int, Object]:
        try:
            load_object(source)
        except ElasticError as error:
            raise ElasticError(400, "document_parsing_exception", f"failed to parse: {error}") from None
        document = self.store.put(index, identifier, source)
        created = document.version == 1
        return (201 if created else 200), write_result(index, identifier, document, "created" if created else "updated")

    def _delete(self, index: str, identifier: str) -> tuple[int, Object]:
        gone = self.store.remove(index, identifier)
        if gone is None:
            return 404, write_result(index, identifier, None, "not_found")
        return 200, write_result(index, identifier, gone, "deleted")

    def _change(self, index: str, identifier: str, body: Object) -> tuple[int, Object]:
        """Update a document by a partial one, or insert the upsert. A script runs as if it changed nothing."""
        old = self.store.get(index, identifier)
        if old is None:
            upsert = body.get("doc") if body.get("doc_as_upsert") else body.get("upsert")
            if upsert is None:
                reason = f"[{identifier}]: document missing"
                raise ElasticError(404, "document_missing_exception", reason, index=index)
            return self._put(index, identifier, dump(as_object(upsert)))
        before = load_object(old.source)
        after = merged(before, as_object(body.get("doc") or {}))
        if after == before:
            return 200, write_result(index, identifier, old, "noop")
        return self._put(index, identifier, dump(after))

    def _refuse_existing(self, index: str, identifier: str) -> None:
        document = self.store.get(index, identifier)
        if document is not None:
            reason = f"[{identifier}]: version conflict, document already exists (current version [{document.version}])"
            raise ElasticError(409, "version_conflict_engine_exception", reason, index=index)

    # -- bulk

    def _bulk(self, call: Call) -> Response:
        """Carry out a bulk: one item per action, each with its own status. Blank lines between actions are skipped."""
        items: list[JSON] = []
        failed = False
        lines = iter(enumerate(ndjson_lines(call.body), start=1))
        for number, line in lines:
            if not line.strip():
                continue
            action, meta = self._bulk_action(number, line)
            source = b"" if action == "delete" else next(lines, (0, b""))[1]
            index, identifier = meta.get("_index", call.index), meta.get("_id")
            if index is None:
                raise invalid_request("index is missing")
            status, item = self._bulk_item(action, str(index), None if identifier is None else str(identifier), source)
            failed = failed or "error" in item
            items.append({action: {**item, "status": status}})
        return answer({"errors": failed, "took": 1, "items": items})

    def _bulk_action(self, number: int, line: bytes) -> tuple[str, Object]:
        """Parse an action line. Raises ElasticError for the whole bulk, as Elasticsearch does."""
        with contextlib.suppress(ElasticError, ValueError):  # said below, once for every way to be wrong
            ((action, meta),) = load_object(line).items()
            if action in ("index", "create", "update", "delete"):
                return action, as_object(meta)
        reason = f"Malformed action/metadata line [{number}], expected one of [create, delete, index, update]"
        raise ElasticError(400, "illegal_argument_exception", reason)

    def _bulk_item(self, action: str, index: str, identifier: str | None, source: bytes) -> tuple[int, Object]:
        """Carry out one action; what fails becomes the item's error."""
        name = identifier if identifier is not None else self.store.new_id()
        try:
            if action == "delete":
                return self._delete(index, name)
            if action == "update":
                return self._change(index, name, load_object(source))
            if action == "create":
                self._refuse_existing(index, name)
            return self._put(index, name, source.strip())
        except ElasticError as error:
            return error.status, {"_index": index, "_id": name, "error": error.cause}

    # -- searches

    def _search(self, call: Call) -> Response:
        if call.rest[:1] == ("scroll",):
            return self._scroll(call)
        if call.rest[:1] == ("point_in_time",):  # OpenSearch's name for _pit
            return self._pit(call)
        if call.method == "DELETE":
            return self._wrong_method(call, ["GET", "POST"])
        body = load_object(call.query["source"].encode()) if "source" in call.query else call.object()
        if "scroll" in call.query:
            return self._open_scroll(call, body)
        return Response(200, self._found(call.index, call.query, body), repeatable="pit" not in body)

    def _found(self, index: str | None, query: Mapping[str, str], body: Object) -> bytes:
        """Return the JSON of a search's answer. Raises ElasticError."""
        start, size = page_of(query, body)
        with_source = body.get("_source") is not False and query.get("_source") != "false"
        sort_values = len(as_list(body.get("sort")))
        ids = as_object(as_object(body.get("query") or {}).get("ids") or {}).get("values")
        if ids is None and "pit" not in body and "search_after" not in body:
            total, page = self.store.count(index), self.store.rows(index, start, start + size)
        else:
            rows = self._ordered(index, body)
            total = len(rows)
            if ids is not None:
                wanted = {str(each) for each in as_list(ids)}
                rows = [row for row in rows if row.id in wanted]
                total = len(rows)
            after = as_list(body.get("search_after"))
            if after:
                last = as_number(after[0], "search_after", 0)
                rows = [row for row in rows if row.document.seq_no > last]
            page = rows[start : start + size]
            sort_values = sort_values or int("pit" in body)
        extra = b'"pit_id":%b,' % dump(as_object(body["pit"]).get("id")) if "pit" in body else b""
        return search_json(total, [hit_json(row, with_source, sort_values) for row in page], extra)

    def _ordered(self, index: str | None, body: Object) -> list[Row]:
        """Return all rows of a search in the one order there is, from its point in time if it names one."""
        rows = self.store.context(as_object(body["pit"]).get("id")).rows if "pit" in body else self.store.rows(index)
        return sorted(rows, key=lambda row: row.document.seq_no)

    def _open_scroll(self, call: Call, body: Object) -> Response:
        _, size = page_of(call.query, body)
        rows = self.store.rows(call.index)
        identifier = self.store.open_context(rows, size, size)
        hits = [hit_json(row, True, len(as_list(body.get("sort")))) for row in rows[:size]]
        return Response(200, search_json(len(rows), hits, b'"_scroll_id":%b,' % dump(identifier)))

    def _scroll(self, call: Call) -> Response:
        """Return the next page of a scroll, or close it. The id stands in the path, the query or the body."""
        body = call.object()
        given = as_list(body.get("scroll_id") or call.query.get("scroll_id")) + list(call.rest[1:])
        if call.method == "DELETE":
            return answer({"succeeded": True, "num_freed": self.store.close_contexts(given or ["_all"])})
        if not given:
            raise invalid_request("scrollId is missing")
        context = self.store.context(given[0])
        page = context.rows[context.position : context.position + context.size]
        context.position += len(page)
        hits = [hit_json(row, True, 0) for row in page]
        return Response(200, search_json(len(context.rows), hits, b'"_scroll_id":%b,' % dump(given[0])))

    def _pit(self, call: Call) -> Response:
        if call.method == "DELETE":
            body = call.object()
            given = as_list(body.get("id")) + as_list(body.get("pit_id")) + list(call.rest[1:])
            return answer({"succeeded": True, "num_freed": self.store.close_contexts(given)})
        identifier = self.store.open_context(self.store.rows(call.required_index()))
        return answer({"id": identifier, "pit_id": identifier, "_shards": dict(SHARDS)})

    def _count(self, call: Call) -> Response:
        call.object()
        return answer({"count": self.store.count(call.index), "_shards": {**SHARDS, "skipped": 0}}, repeatable=True)

    def _msearch(self, call: Call) -> Response:
        lines = ndjson_lines(call.body)
        responses: list[bytes] = []
        for header, body in zip(lines[::2], lines[1::2], strict=False):
            named = as_list(load_object(header).get("index") if header.strip() else None) or as_list(call.index)
            index = ",".join(str(each) for each in named) or None
            try:
                responses.append(self._found(index, {}, load_object(body))[:-1] + b',"status":200}')
            except ElasticError as error:
                responses.append(error.response().body)
        return Response(200, b'{"took":1,"responses":[' + b",".join(responses) + b"]}")


# == Recording =========================================================================================================
# What was received. The only state that the loop's thread shares with the test's: one lock guards all of it.


@dataclass(frozen=True, slots=True)
class Stats:
    """Totals since the start."""

    requests: int
    connections: int  # ever accepted (in TLS: handshake done)
    open: int
    bytes: int  # received, of whatever kind


class Recorder:
    """Counts always, keeps requests when `keep`. `_changed` guards every attribute and is never held for long."""

    def __init__(self, keep: bool) -> None:
        self._changed = threading.Condition()
        self._keep = keep
        self._requests: list[Request] = []
        self._broken: list[bytes] = []
        self._since_clear = 0
        self._total = 0
        self._connections = 0
        self._open = 0
        self._bytes = 0

    def connected(self) -> int:
        """Count a connection and return its number."""
        with self._changed:
            self._connections += 1
            self._open += 1
            self._changed.notify_all()
            return self._connections

    def disconnected(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def received(self, count: int) -> None:
        with self._changed:
            self._bytes += count

    def add(self, request: Request, connection: int) -> None:
        """Record a request, before it is answered."""
        kept = request
        if self._keep and (request.digest is not None or request.connection != connection):
            long = request.digest is not None
            kept = replace(request, body=b"" if long else request.body, connection=connection)
        with self._changed:
            self._total += 1
            self._since_clear += 1
            if self._keep:
                self._requests.append(kept)
            self._changed.notify_all()

    def add_broken(self, raw: bytes) -> None:
        with self._changed:
            if self._keep:
                self._broken.append(raw)
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._requests.clear()
            self._broken.clear()
            self._since_clear = 0

    def requests(self) -> list[Request]:
        with self._changed:
            return list(self._requests)

    def broken(self) -> list[bytes]:
        with self._changed:
            return list(self._broken)

    def stats(self) -> Stats:
        with self._changed:
            return Stats(self._total, self._connections, self._open, self._bytes)

    def wait_for_requests(self, count: int, timeout: float) -> None:
        """Wait until `count` requests came since the last clear(). Raises TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._since_clear >= count, timeout):
                raise TimeoutError(f"{self._since_clear} of {count} requests after {timeout} s")

    def wait_for_open(self, count: int, timeout: float) -> None:
        """Wait until exactly `count` connections are open. Raises TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == count, timeout):
                raise TimeoutError(f"{self._open} connections open, not {count}, after {timeout} s")


# == Faults ============================================================================================================
# Answers that no healthy server gives: one coroutine per path, see the docstring's table. Runs in the loop's thread;
# a connection that is lost cancels it.


def big_body(size: int) -> Iterator[bytes]:
    """Yield a body of `size` bytes that differs in every block, so that lost, doubled or swapped pieces show."""
    filler = bytes(range(32, 127)) * (BLOCK_BYTES // 95 + 1)
    for number, start in enumerate(range(0, size, BLOCK_BYTES)):
        block = b"%015x\n" % number + filler[: BLOCK_BYTES - 16]
        yield block if size - start >= BLOCK_BYTES else block[: size - start]


def big_sha256(size: int) -> str:
    """Return the SHA-256 of big_body(size) in hex, in constant memory."""
    digest = hashlib.sha256()
    for block in big_body(size):
        digest.update(block)
    return digest.hexdigest()


def pieces(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Cut a stream into pieces of `size` bytes, the last one shorter."""
    rest = b""
    for block in blocks:
        data = rest + block
        whole = len(data) // size * size
        yield from (data[at : at + size] for at in range(0, whole, size))
        rest = data[whole:]
    if rest:
        yield rest


@dataclass(slots=True)
class Exchange:
    """One request and the means to answer it by hand."""

    request: Request
    transport: asyncio.Transport
    writable: asyncio.Event  # clear while the client doesn't read
    eof: asyncio.Event  # set once the client has closed its side
    first: bool  # nothing was asked on this connection before
    stats: Callable[[], Stats]
    keep_alive: bool  # a fault that ends the connection sets it False

    def number(self, name: str, default: int) -> int:
        """Return a number from the query string. Raises ElasticError."""
        return as_number(self.request.head.query.get(name), name, default)

    async def pause(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)

    async def write(self, data: bytes) -> None:
        """Send bytes, and wait while the client doesn't read."""
        self.transport.write(data)
        await self.writable.wait()
        await asyncio.sleep(0)  # a client that keeps up would otherwise leave no turn to the others

    async def write_head(self, status: int, *fields: tuple[bytes, bytes], version: str = "1.1") -> None:
        closing = () if self.keep_alive else (CLOSE,)
        await self.write(head_bytes(status, (PRODUCT, *fields, *closing), version))

    async def write_body(self, body: Iterable[bytes], milliseconds: int = 0) -> None:
        """Send a body piece by piece, each after a pause; none to HEAD."""
        if self.request.method == b"HEAD":
            return
        for piece in body:
            if milliseconds:
                await self.pause(milliseconds)
            await self.write(piece)

    async def send(self, response: Response) -> None:
        await self.write(serialise(self.request, response, self.keep_alive))

    async def client_leaves(self, milliseconds: int | None = None) -> None:
        """Wait until the client has closed its side, at most so long."""
        seconds = None if milliseconds is None else milliseconds / 1000
        with contextlib.suppress(asyncio.TimeoutError):  # that it stays is one of the two outcomes waited for
            await asyncio.wait_for(self.eof.wait(), seconds)

    def half_close(self) -> None:
        if self.transport.can_write_eof():  # TLS can't
            self.transport.write_eof()

    def abort(self) -> None:
        """Close without ado: unsent bytes are dropped, TLS sends no close_notify."""
        self.keep_alive = False
        self.transport.abort()

    def reset(self) -> None:
        """Close with a TCP reset."""
        peer = self.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()


Fault: TypeAlias = Callable[[Exchange], Awaitable[None]]
OCTETS = (b"content-type", b"application/octet-stream")


def content_length(size: int) -> tuple[bytes, bytes]:
    return (b"content-length", b"%d" % size)


async def fault_slow(exchange: Exchange) -> None:
    milliseconds = exchange.number("ms", 100)
    await exchange.pause(milliseconds)
    await exchange.send(answer({"took": milliseconds}))


async def fault_silence(exchange: Exchange) -> None:
    exchange.keep_alive = False
    await exchange.client_leaves()


async def fault_big(exchange: Exchange) -> None:
    size = exchange.number("bytes", 1 << 20)
    await exchange.write_head(200, OCTETS, content_length(size))
    await exchange.write_body(big_body(size))


async def fault_chunked(exchange: Exchange) -> None:
    size, chunk = exchange.number("bytes", 1 << 20), max(1, exchange.number("chunk", BLOCK_BYTES))
    await exchange.write_head(200, OCTETS, (b"transfer-encoding", b"chunked"))
    framed = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces(big_body(size), chunk))
    # Small chunks share a write: a million of one byte is a test of the reader, not of this loop.
    together = iter(lambda: b"".join(itertools.islice(framed, max(1, BLOCK_BYTES // chunk))), b"")
    await exchange.write_body(itertools.chain(together, [b"0\r\n\r\n"]))


async def fault_chunked_truncated(exchange: Exchange) -> None:
    size = exchange.number("bytes", 1000)
    await exchange.write_head(200, OCTETS, (b"transfer-encoding", b"chunked"))
    await exchange.write_body(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in big_body(size))
    exchange.keep_alive = False


async def fault_drip(exchange: Exchange) -> None:
    size, milliseconds = exchange.number("bytes", 10), exchange.number("ms", 100)
    await exchange.write_head(200, OCTETS, content_length(size))
    await exchange.write_body(pieces(big_body(size), 1), milliseconds)


async def fault_no_length(exchange: Exchange) -> None:
    size = exchange.number("bytes", 1000)
    exchange.keep_alive = False
    await exchange.write_head(200, OCTETS)
    await exchange.write_body(big_body(size))
    if exchange.number("abort", 0):
        exchange.abort()


async def fault_http10(exchange: Exchange) -> None:
    size = exchange.number("bytes", 1000)
    exchange.keep_alive = False
    await exchange.write_head(200, OCTETS, content_length(size), version="1.0")
    await exchange.write_body(big_body(size))


def status_response(code: int) -> Response:
    """Return an answer of that status. Raises ElasticError where it can't be a final one."""
    if not 200 <= code <= 999:
        raise ElasticError(400, "illegal_argument_exception", f"[code] must be from 200 to 999, got [{code}]")
    if code in BODILESS:
        return Response(code, b"")
    if code < 400:
        return answer({"status": code}, code)
    return ElasticError(code, "mock_exception", f"asked to fail with {code}").response()


async def fault_status(exchange: Exchange) -> None:
    await exchange.send(status_response(exchange.number("code", 200)))


async def fault_interim(exchange: Exchange) -> None:
    """Send interim responses (RFC 9110 15.2) of the status that the path names, then the final one."""
    status, count, milliseconds = int(exchange.request.head.parts[1]), exchange.number("n", 1), exchange.number("ms", 0)
    fields = [(b"link", b"</style.css>; rel=preload")] if status == 103 else []
    interim = head_bytes(status, fields)
    final = serialise(exchange.request, answer({"interim": count}), exchange.keep_alive)
    if milliseconds:
        for _ in range(count):
            await exchange.write(interim)
            await exchange.pause(milliseconds)
        await exchange.write(final)
    else:
        await exchange.write(interim * count + final)


async def fault_101(exchange: Exchange) -> None:
    exchange.keep_alive = False
    await exchange.write(head_bytes(101, [(b"upgrade", b"websocket"), (b"connection", b"upgrade")]))
    await exchange.client_leaves()


async def fault_early(exchange: Exchange) -> None:
    linger = exchange.number("linger", 1000)
    response = status_response(exchange.number("code", 413))
    exchange.keep_alive = False
    await exchange.send(response)
    if linger:
        exchange.half_close()
        await exchange.client_leaves(linger)


async def fault_extra(exchange: Exchange) -> None:
    milliseconds = exchange.number("ms", 0)
    asked = serialise(exchange.request, answer({"extra": False}), exchange.keep_alive)
    extra = head_bytes(200, (PRODUCT, (b"content-type", b"application/json"), content_length(14))) + b'{"extra":true}'
    if milliseconds:
        await exchange.write(asked)
        await exchange.pause(milliseconds)
        await exchange.write(extra)
    else:
        await exchange.write(asked + extra)


async def fault_close_before_response(exchange: Exchange) -> None:
    exchange.keep_alive = False


async def fault_close_reused(exchange: Exchange) -> None:
    if exchange.first:
        await exchange.send(answer({"reused": False}))
    else:
        exchange.keep_alive = False


async def fault_close_after(exchange: Exchange) -> None:
    milliseconds = exchange.number("ms", 100)
    await exchange.send(answer({"closing": True}))
    await exchange.pause(milliseconds)
    exchange.keep_alive = False


async def fault_close_mid_head(exchange: Exchange) -> None:
    exchange.keep_alive = False
    await exchange.write(b"HTTP/1.1 200 OK\r\nX-elastic-product: Elastic")


async def half_body(exchange: Exchange) -> None:
    """Send a head that promises more than follows."""
    size, sent = exchange.number("bytes", 1000), exchange.number("sent", 500)
    await exchange.write_head(200, OCTETS, content_length(size))
    await exchange.write_body(big_body(min(size, sent)))


async def fault_close_mid_body(exchange: Exchange) -> None:
    await half_body(exchange)
    exchange.keep_alive = False


async def fault_reset_mid_body(exchange: Exchange) -> None:
    await half_body(exchange)
    await exchange.pause(exchange.number("ms", 50))  # a reset may overtake what the client hasn't read yet
    exchange.reset()


async def fault_raw(exchange: Exchange) -> None:
    script = exchange.request.body
    size, milliseconds = exchange.number("piece", 0) or len(script) or 1, exchange.number("ms", 0)
    exchange.keep_alive = not exchange.number("close", 1)
    for number, piece in enumerate(pieces([script], size)):
        if number:
            await exchange.pause(milliseconds)
        await exchange.write(piece)


async def fault_echo(exchange: Exchange) -> None:
    kind = exchange.request.head.first(b"content-type") or OCTETS[1]
    body = exchange.request.body
    await exchange.write_head(200, (b"content-type", kind), content_length(len(body)))
    await exchange.write_body([body] if body else [])


async def fault_headers(exchange: Exchange) -> None:
    fields = exchange.request.fields
    await exchange.send(answer([[name.decode("latin-1"), value.decode("latin-1")] for name, value in fields]))


async def fault_sink(exchange: Exchange) -> None:
    await exchange.send(answer({"length": exchange.request.length, "sha256": exchange.request.sha256}))


async def fault_stats(exchange: Exchange) -> None:
    stats = exchange.stats()
    totals: Object = {"requests": stats.requests, "connections": stats.connections}
    await exchange.send(answer({**totals, "open": stats.open, "bytes": stats.bytes}))


async def fault_unknown(exchange: Exchange) -> None:
    await exchange.send(ElasticError(404, "resource_not_found_exception", "no such fault").response())


EARLY = "/_mock/early"
STATS = "/_mock/stats"
FAULTS: Mapping[str, Fault] = {
    "/_mock/100": fault_interim,
    "/_mock/101": fault_101,
    "/_mock/102": fault_interim,
    "/_mock/103": fault_interim,
    "/_mock/big": fault_big,
    "/_mock/chunked": fault_chunked,
    "/_mock/chunked-truncated": fault_chunked_truncated,
    "/_mock/close-after": fault_close_after,
    "/_mock/close-before-response": fault_close_before_response,
    "/_mock/close-mid-body": fault_close_mid_body,
    "/_mock/close-mid-head": fault_close_mid_head,
    "/_mock/close-reused": fault_close_reused,
    "/_mock/drip": fault_drip,
    EARLY: fault_early,
    "/_mock/echo": fault_echo,
    "/_mock/extra": fault_extra,
    "/_mock/headers": fault_headers,
    "/_mock/http10": fault_http10,
    "/_mock/no-length": fault_no_length,
    "/_mock/raw": fault_raw,
    "/_mock/reset-mid-body": fault_reset_mid_body,
    "/_mock/silence": fault_silence,
    "/_mock/sink": fault_sink,
    "/_mock/slow": fault_slow,
    STATS: fault_stats,
    "/_mock/status": fault_status,
}

# == Connections =======================================================================================================
# One protocol object a connection: reads, answers, lets a fault take over. Runs in the loop's thread.


class Backend:
    """What the connections of one server share."""

    def __init__(self, version: str, users: Mapping[str, str], record: bool) -> None:
        self.cluster = Cluster(version)
        self.recorder = Recorder(record)
        self.connections: set[Connection] = set()
        # The fast path: a whole request, byte for byte, and its answer. Dropped when any document changes.
        self.known: dict[bytes, tuple[bytes, Request]] = {}
        self._known_bytes = 0
        self._users = {name.encode(): password.encode() for name, password in users.items()}

    def answer(self, request: Request) -> bytes:
        """Return the answer to a request, as bytes for the wire."""
        store, head = self.cluster.store, request.head
        before = store.generation
        response = self.denial(head) or self.cluster.answer(request)
        data = serialise(request, response, head.keep_alive)
        if store.generation != before:
            self.known.clear()
            self._known_bytes = 0
        elif response.repeatable and head.keep_alive and len(request.raw) <= KNOWN_REQUEST_BYTES:
            self._remember(request, data)
        return data

    def _remember(self, request: Request, data: bytes) -> None:
        if len(self.known) >= KNOWN_REQUESTS or self._known_bytes > KNOWN_ANSWERS_BYTES:
            self.known.clear()
            self._known_bytes = 0
        self.known[request.raw] = data, request
        self._known_bytes += len(data)

    def clear_documents(self, done: threading.Event) -> None:
        """Forget every document and index; called from another thread by way of the loop."""
        self.cluster.store.clear()
        self.known.clear()
        done.set()

    def denial(self, head: Head) -> Response | None:
        """Return the 401 for a request without the right name and password; None where it may pass."""
        if not self._users:
            return None
        scheme, _, token = head.first(b"authorization").partition(b" ")
        uri = head.target.decode("latin-1")
        if not token:
            reason = f"missing authentication credentials for REST request [{uri}]"
        elif scheme.lower() != b"basic":
            reason = f"unable to authenticate with provided credentials for REST request [{uri}]"
        else:
            name, password = basic_credentials(token)
            known = self._users.get(name)
            if known is not None and hmac.compare_digest(known, password):
                return None
            reason = f"unable to authenticate user [{name.decode('utf-8', 'replace')}] for REST request [{uri}]"
        denied = ElasticError(401, "security_exception", reason, header={"WWW-Authenticate": [CHALLENGE]}).response()
        return replace(denied, fields=((b"WWW-Authenticate", CHALLENGE.encode()),))


def basic_credentials(token: bytes) -> tuple[bytes, bytes]:
    """Return (name, password) of a Basic token, empty ones when it can't be decoded."""
    try:
        name, _, password = base64.b64decode(token.strip(), validate=True).partition(b":")
    except binascii.Error:
        return b"", b""
    return name, password


class Connection(asyncio.Protocol):
    """One client. At most one response is under way; what is pipelined behind it waits."""

    _transport: asyncio.Transport
    _reader: RequestReader

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._recorder = backend.recorder
        self._known = backend.known
        self._number = 0
        self._served = 0
        self._task: asyncio.Task[None] | None = None  # the fault that has the connection, if any
        self._writable = asyncio.Event()
        self._writable.set()
        self._eof = asyncio.Event()
        self._deaf = False  # what still comes is discarded

    # -- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._number = self._recorder.connected()
        self._reader = RequestReader(self._number)
        self._backend.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._recorder.received(len(data))
        if self._deaf:
            return
        if self._ready() and self._reader.empty:
            known = self._known.get(data)
            if known is not None:
                response, request = known
                self._recorder.add(request, self._number)
                self._served += 1
                self._transport.write(response)
                return
        self._reader.feed(data)
        self._advance()
        if self._reader.buffered > READ_AHEAD_BYTES and not self._ready():
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Keep the client's half-closed connection for the answers still due to it (TLS knows no such thing)."""
        self._eof.set()
        if self._ready():
            self._transport.close()
        return self._transport.get_extra_info("sslcontext") is None

    def connection_lost(self, _: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        rest = b"" if self._deaf else self._reader.rest()
        if rest:
            self._recorder.add_broken(rest)
        self._backend.connections.discard(self)
        self._recorder.disconnected()
        self._transport.close()  # asyncio of Python 3.10 calls a TLS transport that its peer closed unclosed.

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        self._advance()

    # -- called by the server

    def abort(self) -> None:
        self._transport.abort()

    # -- the way of a request

    def _ready(self) -> bool:
        """Tell whether the next request may be read: the one before it is answered and the answer is on its way."""
        return self._task is None and self._writable.is_set() and not self._transport.is_closing()

    def _advance(self) -> None:
        """Answer every whole request that is waiting."""
        try:
            while self._ready():
                if not self._reader.in_body and not self._read_head():
                    break
                request = self._reader.read_body()
                if request is None:
                    break
                self._serve(request)
        except BadRequestError as error:
            self._refuse(error)
        if self._ready():
            self._transport.resume_reading()
            if self._eof.is_set():
                self._transport.close()

    def _read_head(self) -> bool:
        """Read a head and do what can't wait for its body; False when there is no head or the answer is under way."""
        head = self._reader.read_head()
        if head is None:
            return False
        if head.path == EARLY:
            self._deaf = True
            self._serve(self._reader.take_request())
            return False
        if head.names(b"expect", b"100-continue") and head.version != b"1.0" and not self._reader.buffered:
            self._transport.write(head_bytes(100))
        return True

    def _serve(self, request: Request) -> None:
        head, first = request.head, not self._served
        self._served += 1
        if head.path != STATS:
            self._recorder.add(request, self._number)
        if head.path.startswith("/_mock/") and self._backend.denial(head) is None:
            exchange = Exchange(
                request, self._transport, self._writable, self._eof, first, self._recorder.stats, head.keep_alive
            )
            fault = FAULTS.get(head.path, fault_unknown)
            self._task = asyncio.get_running_loop().create_task(self._run(fault, exchange))
            return
        self._transport.write(self._backend.answer(request))
        if not head.keep_alive:
            self._transport.close()

    async def _run(self, fault: Fault, exchange: Exchange) -> None:
        """Give the connection to a fault, and take it back or close it."""
        try:
            try:
                await fault(exchange)
            except ElasticError as error:  # a parameter that is none; raised before anything was sent
                await exchange.send(error.response())
        except BaseException:
            self._transport.abort()  # cancelled, or a mistake in the fault: don't leave the client hanging
            raise
        self._task = None
        if exchange.keep_alive:
            self._advance()
        else:
            self._transport.close()

    def _refuse(self, error: BadRequestError) -> None:
        """Answer what can't be read with an error, and close without the reset that unread bytes would cause."""
        self._recorder.add_broken(self._reader.rest())
        self._deaf = True
        body = ElasticError(error.status, "parse_exception", str(error)).response().body
        kind = (b"content-type", b"application/json")
        self._transport.write(head_bytes(error.status, (PRODUCT, kind, content_length(len(body)), CLOSE)) + body)
        self._task = asyncio.get_running_loop().create_task(self._linger())

    async def _linger(self) -> None:
        if self._transport.can_write_eof():  # TLS can't
            self._transport.write_eof()
        with contextlib.suppress(asyncio.TimeoutError):  # a client that stays is closed all the same
            await asyncio.wait_for(self._eof.wait(), LINGER_SECONDS)
        self._transport.close()


# == Servers ===========================================================================================================
# The stand-in as a thread of a test, and as a process of its own. Only this room starts and stops anything.


class Listener(socket.socket):
    """A listening socket that knows what it accepted: the loop tells no one about a TLS handshake that never ends."""

    accepted: weakref.WeakSet[socket.socket]

    @classmethod
    def open(cls, host: str, port: int) -> Listener:
        """Listen. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        plain = socket.create_server((host, port), family=family, backlog=BACKLOG_CONNECTIONS)
        listener = cls(plain.family, plain.type, plain.proto, plain.detach())
        listener.accepted = weakref.WeakSet()
        return listener

    def accept(self) -> tuple[socket.socket, object]:
        client, address = super().accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves it out where proto is 0.
        self.accepted.add(client)
        return client, address


class MockES:
    """A stand-in Elasticsearch in a thread of this process, while its `with` block lasts.

    `port` 0 takes a free one; `tls` is (certificate, key), paths of PEM files; with `users` (name to password) every
    request needs Basic authentication; without `record` requests are counted but not kept (with it a long run should
    clear() now and then). Once the block is left there is no thread, socket or port of it. Safe to use from any thread.
    """

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        tls: tuple[str, str] | None = None,
        users: dict[str, str] | None = None,
        record: bool = True,
        *,
        version: str = VERSION,
    ) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._backend = Backend(version, users or {}, record)
        self._recorder = self._backend.recorder
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event

    def __enter__(self) -> MockES:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what it saw

    @property
    def url(self) -> str:
        return url_of(self.host, self.port, self._tls is not None)

    @property
    def requests(self) -> list[Request]:
        """Requests since the last clear(), in the order in which they were whole. A copy."""
        return self._recorder.requests()

    @property
    def broken(self) -> list[bytes]:
        """What came since the last clear() and was no whole request: broken heads and chunks, and cut-off requests."""
        return self._recorder.broken()

    @property
    def connections(self) -> int:
        """Connections ever accepted; in TLS those whose handshake was done."""
        return self._recorder.stats().connections

    def stats(self) -> Stats:
        """Return totals since the start; clear() doesn't touch them."""
        return self._recorder.stats()

    def clear(self, *, documents: bool = False) -> None:
        """Forget recorded requests; the documents too, if asked."""
        self._recorder.clear()
        if documents:
            done = threading.Event()
            self._loop.call_soon_threadsafe(self._backend.clear_documents, done)
            done.wait(STOP_SECONDS)

    def wait_for_requests(self, count: int, timeout: float = 10.0) -> list[Request]:
        """Wait until `count` requests came since the last clear() and return them. Raises TimeoutError (seconds)."""
        self._recorder.wait_for_requests(count, timeout)
        return self.requests

    def wait_for_open(self, count: int, timeout: float = 10.0) -> None:
        """Wait until exactly `count` connections are open. Raises TimeoutError (seconds)."""
        self._recorder.wait_for_open(count, timeout)

    # -- life

    def start(self) -> None:
        """Listen and serve. Raises OSError (also ssl.SSLError) when it can't."""
        context = None
        if self._tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
        listener = Listener.open(self.host, self.port)
        self.port = int(listener.getsockname()[1])
        serving = threading.Event()
        life = functools.partial(self._live, listener, context, serving)
        self._thread = threading.Thread(target=life, name=f"mock_es:{self.port}", daemon=True)
        self._thread.start()
        serving.wait()

    def stop(self) -> None:
        """Close every connection and the port; return when nothing is left. May be called twice."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None

    def _live(self, listener: Listener, context: ssl.SSLContext | None, serving: threading.Event) -> None:
        """The life of the thread."""
        asyncio.run(self._serve(listener, context, serving))

    async def _serve(self, listener: Listener, context: ssl.SSLContext | None, serving: threading.Event) -> None:
        """Run the server until stop()."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(ignore_lost_peers)
        self._stopping = asyncio.Event()
        server = await self._loop.create_server(
            lambda: Connection(self._backend), sock=listener, ssl=context, backlog=BACKLOG_CONNECTIONS
        )
        serving.set()
        await self._stopping.wait()
        # asyncio loses a socket whose server closes between its accept and its transport: let those have their turn.
        self._loop.remove_reader(listener)
        await asyncio.sleep(0)
        server.close()
        for connection in list(self._backend.connections):
            connection.abort()
        await close_all(listener.accepted)


async def close_all(sockets: Iterable[socket.socket]) -> None:
    """Wait until the loop has closed sockets; it does so by itself once they are shut down, within a few turns."""
    deadline = time.monotonic() + STOP_SECONDS
    for each in list(sockets):
        with contextlib.suppress(OSError):  # already closed, or never connected
            each.shutdown(socket.SHUT_RDWR)
    while any(each.fileno() >= 0 for each in list(sockets)) and time.monotonic() < deadline:
        await asyncio.sleep(0.001)


def ignore_lost_peers(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Handle the loop's errors: a peer that goes away or garbles TLS is what tests do; everything else is shown."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def url_of(host: str, port: int, tls: bool) -> str:
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class MockProcess:
    """The stand-in as a process of its own: load on it shares no interpreter with the test. It keeps no records."""

    def __init__(self, tls: tuple[str, str] | None = None, users: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, str(Path(__file__).resolve()), "--port", "0"]
        self._command += ["--tls", *tls] if tls else []
        for name, password in (users or {}).items():
            self._command += ["--user", f"{name}:{password}"]
        self._process: subprocess.Popen[str]
        self._authorization = "".join(f"{name}:{password}" for name, password in list((users or {}).items())[:1])
        self.port = 0
        self.url = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> MockProcess:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        try:
            self.url, self.port = self._wait_until_serving()
        except BaseException:  # nobody calls __exit__ when __enter__ fails
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _wait_until_serving(self) -> tuple[str, int]:
        """Return the URL and port of its one line. Raises RuntimeError."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if readable else ""
        match = re.search(r"listening on (https?://\S+:(\d+))$", line.rstrip())
        if match is None:
            raise RuntimeError(f"mock_es did not start, it said {line!r}")
        return match[1], int(match[2])

    def stats(self) -> dict[str, int]:
        """Ask it for its totals: requests, connections, open, bytes. The asking connection is among the open ones."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)
        if self.url.startswith("https"):
            context = ssl._create_unverified_context()  # the test's own certificate on loopback
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=START_SECONDS, context=context)
        with contextlib.closing(connection):
            connection.request("GET", STATS, headers=basic_header(self._authorization))
            stats: dict[str, int] = json.loads(connection.getresponse().read())
        return stats

    def _end(self) -> None:
        end_process(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()


def basic_header(credentials: str) -> dict[str, str]:
    """Return the Authorization header of `name:password`, none for an empty string."""
    return {"Authorization": "Basic " + base64.b64encode(credentials.encode()).decode()} if credentials else {}


def end_process(process: subprocess.Popen[str]) -> None:
    """End a process by its id, kindly first."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# == Demonstration =====================================================================================================
# es_proxy at work: five requests through it, and what its log says of them. Starts it as a program, knows its command
# line, its first line and the format of its records, nothing else.

USER = "elastic"
PASSWORD = "changeme"
SERVING = re.compile(r"listening on https?://\S*?:(\d+)")
RECORD = re.compile(
    r"(?P<time>\S+) ID: (?P<id>[0-9a-f-]{36}) User: (?P<user>\S*) Path: (?P<path>\S*) Query: (?P<query>\S*)"
    r" Method: (?P<method>\S*) Source: (?P<source>\S*) Agent: (?P<agent>.*?)"
    r" (?:Body: (?P<body>[A-Za-z0-9+/=]*)|Status: (?P<status>\S+) Duration: (?P<duration>\S+) Size: (?P<size>\S+))"
    r"(?P<marks>(?: [A-Z][A-Za-z0-9-]*: \S*)*)"
)
POLL_SECONDS = 0.2  # a person watches
RECORD_SECONDS = 5.0  # records are there before the response is; this only bounds a failure


class DemoError(Exception):
    """The demonstration can't go on; one line for a person."""


@dataclass(frozen=True)
class Step:
    """One request of the demonstration."""

    title: str
    method: str
    target: str
    status: int  # that it must get
    user: str  # that its records must name
    body: bytes = b""
    password: str = PASSWORD
    raw: bytes = b""  # sent as it is instead, where http.client would refuse to


BULK = b"""\
{"index":{"_index":"books","_id":"1"}}
{"title":"The Trial","year":1925}
{"index":{"_index":"books","_id":"2"}}
{"title":"The Castle","year":1926}
{"delete":{"_index":"books","_id":"2"}}
"""
QUERY = b'{"query":{"match_all":{}},"size":2}'
STEPS = (
    Step("Cluster info", "GET", "/", 200, USER),
    Step("A bulk of three actions", "POST", "/_bulk?refresh=true", 200, USER, BULK),
    Step("A search, GET with a body", "GET", "/books/_search", 200, USER, QUERY),
    Step("A wrong password", "GET", "/books/_search", 401, USER, QUERY, "wrong"),
    Step("A broken request", "GET", "/bad request", 400, "", raw=b"GET /bad request HTTP/1.1\r\nHost: demo\r\n\r\n"),
)


@dataclass(frozen=True)
class Record:
    """One line of the log and its fields."""

    line: str
    fields: Mapping[str, str]

    @property
    def is_request(self) -> bool:
        return "body" in self.fields


class Log:
    """Reads a growing file line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_records(self) -> list[Record]:
        """Return the records of the whole lines that were added; events are left out."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        matches = [(line, RECORD.fullmatch(line)) for line in whole.decode("ascii", "replace").splitlines()]
        return [Record(line, {k: v for k, v in m.groupdict().items() if v is not None}) for line, m in matches if m]

    def wait_for(self, count: int) -> list[Record]:
        """Return at least `count` new records, or what came within RECORD_SECONDS."""
        records = self.new_records()
        deadline = time.monotonic() + RECORD_SECONDS
        while len(records) < count and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)
            records += self.new_records()
        return records


class Screen:
    """Prints for people; colours only on a terminal and without NO_COLOR (no-color.org)."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def title(self, number: int, step: Step, status: int) -> None:
        ends = self.paint(str(status), "32" if status < 400 else "31")
        self.say(f"\n{self.paint(f'{number}. {step.title}', '1')}: {step.method} {step.target} -> {ends}")

    def record(self, record: Record) -> None:
        """Print a record as it is in the file, the body it holds beneath."""
        self.say(re.sub(r"(?<= )([A-Z][A-Za-z0-9-]*:)(?= )", lambda match: self.paint(match[1], "36"), record.line))
        body = base64.b64decode(record.fields.get("body", ""))
        for line in readable(body):
            self.say(self.paint("    | ", "2") + line)


def readable(body: bytes) -> list[str]:
    """Return a body as lines for a person: one JSON document indented, otherwise the text as it is."""
    text = body.decode("utf-8", "backslashreplace").rstrip()
    with contextlib.suppress(ValueError):  # NDJSON and everything else stays as it came
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.splitlines()]


class Proxy:
    """es_proxy as a program between a free port and the stand-in, its log in `directory`."""

    def __init__(self, upstream_port: int, directory: Path) -> None:
        program = Path(__file__).resolve().with_name("es_proxy.py")
        if not program.exists():
            raise DemoError(f"there is no {program.name} beside {Path(__file__).name}")
        self.log = directory / "audit.log"
        self._messages = directory / "messages"
        upstream = ["127.0.0.1", str(upstream_port)]
        options = ["--no-tls", "--audit-log", str(self.log)]
        self._command = [sys.executable, str(program), *upstream, "127.0.0.1", "0", *options]
        self._process: subprocess.Popen[str]
        self.port = 0

    def __enter__(self) -> Proxy:
        with self._messages.open("w") as messages:
            # A session of its own: Ctrl-C is for the demonstration, which then stops the proxy once.
            self._process = subprocess.Popen(self._command, stderr=messages, text=True, start_new_session=True)
        try:
            self.port = self._wait_until_serving()
        except BaseException:  # nobody calls __exit__ when __enter__ fails
            end_process(self._process)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_process(self._process)

    def _wait_until_serving(self) -> int:
        """Return the port that it says it listens on. Raises DemoError."""
        deadline = time.monotonic() + START_SECONDS
        while not (match := SERVING.search(self.messages())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"the proxy did not start: {self.messages().strip() or 'it said nothing'}")
            time.sleep(POLL_SECONDS / 10)
        return int(match[1])

    def messages(self) -> str:
        """Return what it said to its operator."""
        return self._messages.read_text(errors="replace")

    def check_alive(self) -> None:
        """Raises DemoError once the proxy has ended."""
        if self._process.poll() is not None:
            raise DemoError(f"the proxy ended with {self._process.returncode}: {self.messages().strip()}")


def send(step: Step, port: int) -> int:
    """Send a step's request to the proxy and return the status."""
    if step.raw:
        with socket.create_connection(("127.0.0.1", port), START_SECONDS) as client:
            client.sendall(step.raw)
            with http.client.HTTPResponse(client) as response:
                response.begin()
                response.read()
                return response.status
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    kind = "application/x-ndjson" if step.target.startswith("/_bulk") else "application/json"
    headers = basic_header(f"{USER}:{step.password}") | {"User-Agent": "demo"}
    headers |= {"Content-Type": kind} if step.body else {}
    with contextlib.closing(connection):
        connection.request(step.method, step.target, body=step.body or None, headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status


def check(step: Step, status: int, records: list[Record]) -> None:
    """Hold a step to its one pair of records. Raises DemoError."""
    wanted = [
        (status == step.status, f"got {status}, not {step.status}"),
        (len(records) == 2, f"has {len(records)} records, not a pair"),
    ]
    if len(records) == 2:
        request, response = (each.fields for each in records)
        wanted += [
            ("body" in request and "status" in response, "has no request record followed by a response record"),
            (request["id"] == response["id"], "has two records with different ids"),
            (response.get("status") == str(status), f"is recorded with status {response.get('status')}, not {status}"),
            (request["user"] == step.user or not step.user, f"is recorded for user {request['user']}, not {step.user}"),
            (base64.b64decode(request.get("body", "")) == step.body or bool(step.raw), "is recorded with another body"),
        ]
    for holds, complaint in wanted:
        if not holds:
            raise DemoError(f"{step.title} ({step.method} {step.target}) {complaint}")


def demonstrate(once: bool) -> None:
    """Show the proxy at work, until Ctrl-C or `once`. Raises DemoError when a request lacks its records."""
    screen = Screen()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="es-proxy-demo-")))
        mock = stack.enter_context(MockES(users={USER: PASSWORD}, record=False))
        proxy = stack.enter_context(Proxy(mock.port, directory))
        screen.say(f"Elasticsearch (a stand-in) on {mock.url}, es_proxy on http://127.0.0.1:{proxy.port}")
        screen.say(f"Records in {proxy.log}")
        log = Log(proxy.log)
        for number, step in enumerate(STEPS, start=1):
            status = send(step, proxy.port)
            records = log.wait_for(2)
            screen.title(number, step, status)
            for record in records:
                screen.record(record)
            check(step, status, records)
        summary = screen.paint(f"{len(STEPS)} requests, {len(STEPS)} pairs of records.", "1")
        screen.say(f"\n{summary} Try it yourself:\n")
        screen.say(
            f"  curl -u {USER}:{PASSWORD} -H 'Content-Type: application/json' -d '{QUERY.decode()}'"
            f" 'http://127.0.0.1:{proxy.port}/books/_search?pretty'\n"
        )
        if not once:
            follow(screen, log, proxy)


def follow(screen: Screen, log: Log, proxy: Proxy) -> None:
    """Show new records until Ctrl-C."""
    screen.say("New records appear here. Ctrl-C ends it.\n")
    while True:
        time.sleep(POLL_SECONDS)
        proxy.check_alive()
        for record in log.new_records():
            screen.record(record)


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupted(*_: object) -> None:
    """Make each ending the one that cleans up; a second one must not cut that short."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_demo(once: bool) -> int:
    """Run the demonstration and return the exit status."""
    for number in ENDINGS:
        signal.signal(number, interrupted)
    try:
        demonstrate(once)
    except KeyboardInterrupt:
        return 130 if once else 0  # Ctrl-C is the way out of the one and a failure of the other
    except BrokenPipeError:  # whoever read this has seen enough; nor must the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, OSError, http.client.HTTPException) as error:
        print(f"mock_es: demonstration failed: {error}", file=sys.stderr)
        return 1
    return 0


# == Command line ======================================================================================================


def name_and_password(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not name or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:PASSWORD")
    return name, password


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mock_es.py", description="A stand-in Elasticsearch.")
    parser.add_argument("--port", type=port_number, default=DEFAULT_PORT, help="port, 0 for a free one (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="serve TLS with this pair of PEM files")
    user = parser.add_argument("--user", type=name_and_password, action="append", metavar="NAME:PASSWORD")
    user.default, user.help = [], "require Basic authentication (may be repeated)"
    parser.add_argument("--demo", action="store_true", help="show es_proxy at work, until Ctrl-C")
    parser.add_argument("--once", action="store_true", help="with --demo: check the records and end")
    options = parser.parse_args(arguments)
    if options.once and not options.demo:
        parser.error("--once belongs to --demo")
    return options


def run_server(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT and return the exit status."""
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before the thread, which inherits it: they come to sigwait only
    try:
        tls = (options.tls[0], options.tls[1]) if options.tls else None
        with MockES(options.port, options.host, tls, dict(options.user), record=False) as mock:
            print(f"mock_es listening on {mock.url}", flush=True)
            signal.sigwait(ends)
    except OSError as error:
        print(f"mock_es: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    return run_demo(options.once) if options.demo else run_server(options)


if __name__ == "__main__":
    sys.exit(main())
