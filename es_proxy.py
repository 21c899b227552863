#!/usr/bin/env python3
"""es-proxy: an audit proxy for Elasticsearch and OpenSearch.

    es_proxy.py REMOTE_HOST REMOTE_PORT LOCAL_HOST LOCAL_PORT [options]

It stands between clients and a coordinator node, relays every request and every response unchanged, and writes an
audit record of each, tied together by a UUID, for people who must later find out who did what. It is this one file,
Python 3.10 or newer and nothing but the standard library: copy it, run it.

Use
===
1. TLS on both sides is the default. The listener shows --cert and --key; the upstream's certificate is verified
   against the system's store, or against --ca, or against --ca-fingerprint. `--no-tls` means plain HTTP on both sides,
   `--tls listen` and `--tls upstream` mean TLS on that side only.
2. Records go to standard output, or to --audit-log PATH. Messages for the operator go to standard error, one line
   each, and never into the records.
3. One line on standard error says what is served, once it truly is. Bad options and everything that prevents a start
   are one line as well, and exit status 2.
4. SIGTERM or SIGINT: no new connections, what is in flight is finished within --drain seconds, exit status 0.
   A second one: what is still in flight is cut off (and recorded as cut off), exit status 0.
5. `es_proxy.py --help` lists every option with its default.

The way of a request
====================
    Server (one poller thread)     accept -> park -> readable -> ready queue (FIFO)
      worker thread takes it       Session.advance: read what is there -> RequestReader
                                     incomplete -> park again, no thread held
                                     complete   -> Relay.exchange
        AuditLog.request           the record is in the log             <- nothing goes upstream before this
        Upstream.request           per-thread http.client connection
        Relay._relay_response      piece by piece; the last piece waits
        AuditLog.response          the record is in the log             <- no client holds a whole response before this
        last piece to the client   pipelined bytes left -> again; else park

A thread is held only by a complete request: a slow or silent client costs a parked socket and its buffer. A request is
read whole before it goes on (up to 1 MiB in memory, beyond that in an unlinked temporary file in TMPDIR), a response
is streamed in constant memory.

The record
==========
Two lines for each request, ASCII, one write each:

    TIMESTAMP ID: UUID User: USER Path: /path Query: QUERY Method: GET Source: IP Agent: AGENT Body: BASE64 [marks]
    TIMESTAMP ID: UUID User: USER Path: /path Query: QUERY Method: GET Source: IP Agent: AGENT Status: 200 \
Duration: 0.005s Size: 1234 [marks]

TIMESTAMP is UTC with microseconds. UUID (version 4) is the same on both lines. Body is the request's body as it came.
Duration runs from forwarding to the last byte of the response, Size is the number of bytes of the response's body.
No query is `None`, no credentials is `anonymous`, credentials that can't be decoded are `malformed`, and a request too
broken to have a field has `-` there. User is what the client claims to be: the Basic name, or `apikey:ID`,
`service:NAMESPACE/SERVICE/TOKEN`, `jwt:SUB`, `bearer:` and 16 hex digits of the token's SHA-256, `aws:ACCESS_KEY_ID`,
`cert:CN` (a client certificate, when there is nothing else) or `SCHEME:-`. It is never the secret.

Every byte outside 0x21-0x7E and every backslash is written \\xHH; a space stays only in Agent; a colon before a space
or at a value's end is \\x3a, and a value that reads like a stand-in (`None`, `anonymous`, `malformed`, `-`) has its
first byte escaped. So nothing that a client sends can look like a field, a line or a stand-in.

Marks come at the end, only where something is out of the ordinary, in this order:
    request     Run-As: NAME       the user the client asks to act as
                Forwarded: VALUE   an X-Forwarded-For or Forwarded header (relayed, not believed)
                Opaque-Id: ID      the client's X-Opaque-Id
                Body-Bytes: N Body-SHA256: HEX   of the whole body, where Body is cut by --audit-body
                Redacted: N        values in the recorded body or query that are known to be secrets were replaced by
                                   ::es_redacted::, in the record only
                Rejected: CODE     not forwarded; Body holds what was received, at most 16 KiB, without what may be
                                   a credential
    response    Error: CODE        what went wrong (see "Error codes" in README)
                Attempts: N        more than one connection to the upstream was tried
                Sent: N            bytes of the body delivered when the client left early

The log has lines without an ID too: `TIMESTAMP Event: NAME ...` with start, stop, reopen (after a rotation), gap (Lost
records since Since could not be written), recovered (a torn last line was closed off), removed and truncated (somebody
did that to the file), worker-lost, insecure-upstream, no-redact.

With --audit-format ecs each of these lines is a JSON object in Elastic Common Schema instead, with flat dotted keys;
bytes that are no UTF-8, and backslashes, are \\xHH in its strings.

The log file
============
1. kill -HUP goes on in the file that has the log's name now: rename it, then send the signal (logrotate does). If the
   new one can't be opened, the old one stays in use.
2. When a record can't be written, the request is refused with 503 and nothing goes upstream; it recovers by itself, and
   an `Event: gap` is on record. With --audit-on-failure pass requests are relayed all the same, and counted.
3. A record survives the death of this process once it is written, a power failure only with --audit-sync always: then
   each request's record is on the disk before the request is forwarded; requests that wait together share an fsync.
4. With --workers N that many processes share the listener and the log. One that ends is replaced.

Promises
========
1. A request reaches the upstream only after its record is in the log.
2. A client gets the last byte of a response only after the response's record is in the log.
3. Every request record has exactly one response record, unless the process was killed.
4. Records are whole lines; one that can't be written is a request refused with 503, and the gap is on record.
5. No value can forge a field or a line.
6. Bodies are relayed bit by bit, the order, case and repeats of header fields are kept, targets are untouched.
7. What one HTTP parser could read differently from another is refused, in both directions.

What is changed on the way: hop-by-hop fields are removed (RFC 9110 7.6.1), Host names the upstream, Expect is answered
here, chunk extensions and trailer fields are dropped. Via is not added.

Limits
======
Request line 8 KiB, header section 16 KiB and 100 fields (responses: 64 KiB, 1000), body --max-body; 20 s for a head,
60 s of silence and at least 500 B/s for a body, 60 s of no progress when a client doesn't read, 75 s idle, 5 s to
connect upstream, --upstream-timeout of silence there. What is over a limit is answered in Elasticsearch's error shape.

Security
========
1. Run it as a user of its own. It needs no privilege but reading the key and appending to the log.
2. The log holds request bodies: treat it like the data itself. It is created with mode 0640; a symbolic link, a file
   others can write to, and a log another es-proxy is writing are refused.
3. A client that learns the addresses of the nodes (sniffing) can walk around any proxy: let a firewall close them.

Map of this file
================
Constants, Errors, Configuration, HTTP messages, Transport, Audit, Upstream, Relay, Server, Supervisor, Command line.
A room uses only the rooms above it.
"""

from __future__ import annotations

import argparse
import binascii
import codecs
import collections
import contextlib
import dataclasses
import enum
import errno
import fcntl
import functools
import hashlib
import http.client
import ipaddress
import itertools
import json
import mmap
import os
import posixpath
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NoReturn, Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

# == Constants ==================================================================================================
# What is fixed: sizes in bytes and times in seconds, the unit in each name, with whose precedent it follows.
# What an operator or a test may change is in Configuration. No thread, no input or output here.

__version__ = "0.1.0"

KIB = 1024
MIB = 1024 * KIB

RECEIVE_BYTES = 64 * KIB  # One read: a whole small request with its body, and four full TLS records.
RELAY_BYTES = 256 * KIB  # One read of a large body: beyond this fewer calls no longer pay (measured 35 ms per 100 MB).
SEND_JOIN_BYTES = 64 * KIB  # A head and a body up to this go out in one call; beyond it copying costs more.
RECEIVES_PER_TURN = 32  # An upload faster than us yields its thread after 2 MiB, so that others get theirs.
REJECTED_BODY_BYTES = 16 * KIB  # How much of a refused request its record keeps: a whole header section.

LISTEN_BACKLOG = 1024  # socketserver's 5 refuses bursts; the kernel cuts this to net.core.somaxconn.
OVERFLOW_CONNECTIONS = 64  # Beyond --max-connections so many are let in to be told (503); the rest wait outside.
SPARE_FILES = 64  # Descriptors kept back from connections: log, listener, poller, interpreter, name resolution.
THREADS_AT_START = 8  # Measured best against a fast upstream: 8 to 16; more only add switches between threads.
THREAD_IDLE_SECONDS = 10.0  # An extra worker thread leaves after this long without work.
GROW_WAIT_SECONDS = 0.005  # A ready request that waits longer than this is a reason for another thread ...
GROW_BELOW_CPU = 0.75  # ... unless the process already uses this share of a processor: then threads make it worse.
ACCEPT_PAUSE_SECONDS = 0.1  # After EMFILE and its like: long enough not to spin, short enough not to be noticed.

WATCH_SECONDS = 0.5  # While an upstream is silent, this often: has the client left, are we told to stop?
CONNECT_SECONDS = 5.0  # Envoy's connect_timeout; per address of the upstream, TLS included.
REUSE_SECONDS = 60.0  # nginx's keepalive_timeout for upstreams; Elasticsearch itself never closes idle connections.

DEFAULT_CERT = "/usr/local/tls/cert_wildcard.pem"
DEFAULT_KEY = "/usr/local/tls/keys/cert_wildcard_key.pem"
TLS_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # Mozilla "intermediate" for TLS 1.2; TLS 1.3 brings its own.

Buffer = bytes | bytearray | memoryview
WireBody = bytes | mmap.mmap

# == Errors =====================================================================================================
# Everything that can go wrong on the way of a request, as one tree, and how an operator is told. Each error has the
# status a client gets, a stable code for the record, and a reason for people. Knows nothing of where it is raised.
#
#   ProxyError
#     RequestError         the client's request is refused, 4xx, 501, 505: nothing of it went upstream
#     OverloadError        503: no room, no thread, no time
#     AuditError           503: the record can't be written, so nothing is forwarded (500 once the upstream has acted)
#     UpstreamError        502 or 504: the upstream can't be reached, or doesn't speak HTTP/1.1
#     ClientGoneError           the client left; 499 stands in the record only, nobody is there to read it
#     InternalError        500: a bug of ours, still answered and recorded
#   StartError             not on the way of a request: nothing can be served, exit status 2


class ProxyError(Exception):
    """A request ends here: `status` for the client, `code` for the record, `reason` for people."""

    status = 500

    def __init__(self, code: str, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        if status is not None:
            self.status = status


class RequestError(ProxyError):
    """The request breaks a rule of RFC 9110, RFC 9112 or a limit."""

    status = 400


class OverloadError(ProxyError):
    """The request is sound, but there is no room, no thread or no time for it."""

    status = 503


class AuditError(ProxyError):
    """The record can't be written."""

    status = 503


class UpstreamError(ProxyError):
    """The upstream can't be reached, keeps silent, or answers what isn't HTTP/1.1."""

    status = 502


class ClientGoneError(ProxyError):
    """The client left before its response was complete."""

    status = 499  # nginx's number for it


class InternalError(ProxyError):
    """A bug of es-proxy itself."""

    status = 500


class StartError(Exception):
    """Nothing can be served; the text names the cause and the remedy."""


def say(text: str) -> None:
    """Tell the operator one line on standard error; control characters are made visible, a closed stderr is ignored."""
    line = "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text)
    with contextlib.suppress(OSError, ValueError):  # Nobody listens: no reason to stop relaying.
        os.write(2, f"es-proxy: {line}\n".encode("utf-8", "backslashreplace"))


class Notice:
    """Something that may happen often and is said rarely: once in `interval_seconds`, with how often since."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval_seconds = interval_seconds
        self._lock = threading.Lock()  # guards the two below
        self._next = 0.0  # monotonic
        self._unsaid = 0

    def say(self, text: str) -> None:
        """Say it, or count it."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            self._next = now + self._interval_seconds
        say(text + (f" (and {unsaid} more since the last such message)" if unsaid else ""))


# == Configuration ==============================================================================================
# What an operator chose, frozen, one comment a field: unit and consequence. Knows neither argparse nor sockets.


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what peers may do, in seconds and bytes. Not options: tests shrink them, operators don't."""

    request_line_bytes: int = 8 * KIB  # RFC 9112 3 asks for at least 8000; Elasticsearch itself takes 4 kB. More: 414.
    request_head_bytes: int = 16 * KIB  # Header section; Elasticsearch's http.max_header_size is 16 kB. More: 431.
    request_fields: int = 100  # HAProxy's tune.http.maxhdr is 101. More: 431.
    response_head_bytes: int = 64 * KIB  # Elasticsearch repeats Warning for each deprecated setting. More: 502.
    response_fields: int = 1000  # The same.
    interim_responses: int = 32  # 1xx in front of one response. More: 502.
    head_seconds: float = 20.0  # Whole head, TLS handshake included, from the first byte (Apache's RequestReadTimeout).
    body_silence_seconds: float = 60.0  # Silence inside a body (nginx's client_body_timeout). More: 408.
    body_rate_bytes: float = 500.0  # Bytes/s a body must average after body_silence_seconds (Apache's MinRate).
    write_stall_seconds: float = 60.0  # A client that takes nothing for this long is let go (nginx's send_timeout).
    write_rate_bytes: float = 4.0 * KIB  # Bytes per second a client must take on average, after write_grace_seconds:
    write_grace_seconds: float = 30.0  # a slow reader holds a thread.
    keepalive_seconds: float = 75.0  # Idle between requests (nginx's keepalive_timeout).
    linger_seconds: float = 5.0  # Reading on after an error, so that it arrives (nginx's lingering_timeout).
    queue_seconds: float = 30.0  # Ready, but no thread for this long: 503 (HAProxy's timeout queue).
    memory_body_bytes: int = MIB  # A request body up to this stays in memory, beyond it goes to a temporary file.
    memory_total_bytes: int = 64 * MIB  # All unfinished bodies together; beyond it even small ones go to files.


@dataclasses.dataclass(frozen=True)
class Config:
    """One running proxy, as the command line gave it."""

    upstream_host: str  # Name or address of the coordinator node; sent to it as Host and SNI.
    upstream_port: int
    listen_host: str  # Name or address to listen on.
    listen_port: int  # 0: any free one; the start message names it.
    listen_tls: bool = True  # Clients speak TLS to us.
    upstream_tls: bool = True  # We speak TLS to the upstream.
    cert: str = DEFAULT_CERT  # PEM chain shown to clients.
    key: str = DEFAULT_KEY  # Its private key, not encrypted.
    client_ca: str | None = None  # PEM bundle; when set, a client without a certificate from it is refused.
    ca: str | None = None  # PEM bundle the upstream must be signed by; None: the system's store.
    ca_fingerprint: str | None = None  # SHA-256 in lower-case hex of a certificate in the upstream's chain; pins it.
    insecure: bool = False  # True: anyone may pretend to be the upstream.
    audit_log: str = "-"  # Path, or - for standard output.
    audit_format: str = "text"  # text or ecs.
    audit_pass: bool = False  # When a record can't be written: relay and count the loss, instead of refusing (503).
    audit_sync: bool = False  # fsync before a request is forwarded: survives a power failure, costs one per group.
    audit_body_bytes: int | None = None  # Bytes of a request body that are recorded; None: all of it.
    workers: int = 1  # Processes that serve; one Python process uses little more than one processor.
    threads: int = 256  # Most requests in flight; each holds a thread and a connection to the upstream.
    max_connections: int = 0  # Most client connections; 0: as many as the file descriptors allow.
    max_body_bytes: int = 100 * MIB  # Elasticsearch's http.max_content_length. Larger: 413.
    upstream_timeout_seconds: float = 300.0  # Silence allowed while waiting for the upstream. Longer: 504.
    drain_seconds: float = 30.0  # How long a stop waits for requests in flight.
    redact: bool = True  # Secrets known to travel in bodies are not recorded.
    portable: bool = False  # Tests: do without what only Linux has.
    limits: Limits = Limits()

    def digest(self) -> str:
        """SHA-256 in hex of everything above, so that the log shows when the configuration changed."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()


# == HTTP messages ==============================================================================================
# HTTP/1.1 (RFC 9112) as bytes in, messages out, and back. This room does not know about connections: it is fed what
# arrived, in pieces of any size, and either has a message, wants more, or raises. It never asks what time it is.
# Run by whichever thread holds the message. What the RFC leaves to interpretation is an error here.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_FIELD_BLOCK = rb"((?:" + _TOKEN + rb":" + _VALUE + rb"\r\n)*)\r\n"
# One expression checks a whole head: no byte is looked at twice, and what it takes has only one reading. No two
# neighbouring parts can match the same byte, so a mismatch costs linear time as well.
_REQUEST_HEAD = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~]+) HTTP/([0-9])\.([0-9])\r\n" + _FIELD_BLOCK)
_RESPONSE_HEAD = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: (" + _VALUE + rb"))?\r\n" + _FIELD_BLOCK)
_FIELD_LINE = re.compile(_TOKEN + rb":" + _VALUE)
_METHOD = re.compile(_TOKEN)
_TARGET = re.compile(rb"[!\"$-~]+")
_DIGITS_TO_0 = bytes.maketrans(b"123456789", b"000000000")
_BROKEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")  # What no head may hold anywhere.
_DIGITS = re.compile(rb"[0-9]{1,40}")  # int() itself takes "+5", "1_0" and other scripts' digits.
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})((?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb"|\"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]"
    rb"|\\[\t\x20-\x7e\x80-\xff])*\"))?)*)\r\n"
)
_CHUNK_LINE_BYTES = 16 + 256 + 2  # Size, extensions nobody uses, line end.
_AUTHORITY = re.compile(rb"(?:(?:[A-Za-z0-9._~-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_ABSOLUTE = re.compile(rb"[Hh][Tt][Tt][Pp][Ss]?://([^/?]*)(.*)")
_PERCENT = re.compile(rb"%([0-9a-f]{2})")

Field = tuple[bytes, bytes, bytes]  # name in lower case, name as it came, value without the white space around it

# Names a request's head is asked for after it was read; everything else is only carried along.
_ASKED_FOR = frozenset(
    b"host content-length transfer-encoding connection expect max-forwards authorization user-agent content-type"
    b" content-encoding traceparent x-opaque-id es-security-runas-user opendistro_security_impersonate_as"
    b" x-forwarded-for forwarded".split()
)
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection te upgrade trailer proxy-authorization proxy-authenticate"
    b" http2-settings".split()
)
_FRAMING_NAMES = frozenset((b"content-length", b"transfer-encoding"))
# Naming one of these in Connection asks the next hop to lose it: an attack, never a need.
_NOT_HOP_BY_HOP = _FRAMING_NAMES | {b"host", b"authorization"}
_NOT_IN_TRAILERS = _NOT_HOP_BY_HOP | {b"content-encoding", b"content-type", b"connection", b"expect", b"te", b"trailer"}
_REGISTERED_CODINGS = frozenset((b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress"))  # RFC 9112 7.2
_NO_FIELDS: tuple[bytes, ...] = ()


class Budget(Protocol):
    """Counts bytes held in memory by all unfinished bodies together; safe to call from any thread."""

    def take(self, count: int) -> bool:
        """Ask for `count` more bytes; False when there are none."""

    def give(self, count: int) -> None:
        """Return `count` bytes."""


class Body:
    """A message body held whole: in memory up to a bound, beyond it in an unlinked temporary file."""

    __slots__ = ("size", "_pieces", "_file", "_memory_bytes", "_budget", "_taken")

    def __init__(self, memory_bytes: int, budget: Budget | None = None) -> None:
        self.size = 0
        self._pieces: list[Buffer] = []
        self._file: IO[bytes] | None = None
        self._memory_bytes = memory_bytes
        self._budget = budget
        self._taken = 0

    def append(self, piece: Buffer) -> None:
        """Add bytes, which must stay as they are. Raises OverloadError when there is no room on disk."""
        count = len(piece)
        if self._file is None:
            if self.size + count <= self._memory_bytes and (self._budget is None or self._budget.take(count)):
                self._taken += count
                self._pieces.append(piece)
                self.size += count
                return
            self._spill()
        self._write(piece)
        self.size += count

    def _spill(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0, prefix="es-proxy-")
        except OSError as error:
            raise self._no_room(error) from None
        for piece in self._pieces:
            self._write(piece)
        self._pieces.clear()
        self._give_back()

    def _give_back(self) -> None:
        if self._budget is not None:
            self._budget.give(self._taken)
        self._taken = 0

    def _write(self, piece: Buffer) -> None:
        assert self._file is not None
        view = memoryview(piece)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            raise self._no_room(error) from None

    @staticmethod
    def _no_room(error: OSError) -> OverloadError:
        return OverloadError(
            "no-room-for-body",
            f"a request body can't be kept in a temporary file: {error.strerror}; make room in {tempfile.gettempdir()}"
            " or set TMPDIR",
        )

    @property
    def spooled(self) -> bool:
        """Whether the body lies in a temporary file."""
        return self._file is not None

    def whole(self) -> WireBody:
        """All of it as one buffer: bytes, or a map of the temporary file that costs no heap."""
        if self._file is not None:
            return mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        if len(self._pieces) == 1 and isinstance(self._pieces[0], bytes):
            return self._pieces[0]
        joined = b"".join(self._pieces)
        self._pieces = [joined]
        return joined

    def pieces(self) -> Iterator[Buffer]:
        """All of it: at once, or in pieces of RELAY_BYTES when it lies in a file; can be asked for again."""
        if self._file is None:
            yield bytes(self.whole())  # A million one-byte chunks become one piece.
            return
        offset = 0
        while offset < self.size:
            piece = os.pread(self._file.fileno(), min(RELAY_BYTES, self.size - offset), offset)
            if not piece:
                raise InternalError("spool-lost", "the temporary file of a request body is shorter than was written")
            offset += len(piece)
            yield piece

    def close(self) -> None:
        """Let go of memory and file."""
        self._pieces.clear()
        self._give_back()
        if self._file is not None:
            self._file.close()
            self._file = None


class LengthDecoder:
    """A body of a known number of bytes (RFC 9112 6.2)."""

    __slots__ = ("remaining",)
    chunked = False

    def __init__(self, length: int) -> None:
        self.remaining = length

    @property
    def complete(self) -> bool:
        """Whether all of the body was decoded."""
        return not self.remaining

    def decode(self, data: bytes) -> tuple[list[Buffer], bytes]:
        """Body bytes found in `data`, and what lies behind the body."""
        count = self.remaining
        if count >= len(data):
            self.remaining = count - len(data)
            return ([data] if data else []), b""
        self.remaining = 0
        return ([data[:count]] if count else []), data[count:]


class UntilCloseDecoder:
    """A response body that ends with its connection (RFC 9112 6.3, step 8)."""

    __slots__ = ("complete",)
    chunked = False

    def __init__(self) -> None:
        self.complete = False

    def decode(self, data: bytes) -> tuple[list[Buffer], bytes]:
        """All of `data` is body."""
        return [data], b""


def too_large(max_bytes: int) -> RequestError:
    """The error for a body over --max-body, in bytes."""
    return RequestError("body-too-large", f"the body is larger than {max_bytes} bytes (--max-body)", 413)


def too_many_fields(limits: Limits, trailer: bool = False) -> RequestError:
    """The error for a header or trailer section over its limits."""
    return RequestError(
        "trailers-too-large" if trailer else "head-too-large",
        f"the section has more than {limits.request_head_bytes} bytes or {limits.request_fields} fields",
        431,
    )


def what_is_wrong(line: bytes) -> str:
    name, colon, _ = line.partition(b":")
    if line[:1] in b" \t":
        return "a header field is folded over two lines, or the first one begins with white space"
    if not colon:
        return "a header line has no colon"
    if name != name.rstrip():
        return "white space stands between a field's name and its colon"
    if not _METHOD.fullmatch(name):
        return "a field's name holds a character that is not allowed there"
    return "a field's value holds a control character"


class ChunkedDecoder:
    """The chunked transfer coding (RFC 9112 7.1). Extensions and trailer fields are checked, then dropped.

    `max_bytes` bounds the decoded body: more raises RequestError `body-too-large` with status 413.
    """

    __slots__ = (
        "complete", "_remaining", "_state", "_partial", "_total", "_max_bytes", "_limits", "_trailer_bytes",
        "_trailer_fields",
    )  # fmt: skip
    chunked = True

    def __init__(self, limits: Limits, max_bytes: int | None = None) -> None:
        self.complete = False
        self._limits = limits
        self._max_bytes = max_bytes
        self._total = 0
        self._remaining = 0
        self._state: Callable[[bytes, int, list[Buffer]], int] = self._size_line
        self._trailer_bytes = 0
        self._trailer_fields = 0
        self._partial = b""  # The beginning of a line: never more than its bound.

    def decode(self, data: bytes) -> tuple[list[Buffer], bytes]:
        """Body bytes found in `data`, and what lies behind the body once it is complete."""
        pieces: list[Buffer] = []
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position = 0
        while not self.complete and position < len(data):
            after = self._state(data, position, pieces)
            if after < 0:
                self._partial = data[position:]
                return pieces, b""
            position = after
        return pieces, (data[position:] if self.complete else b"")

    # Each state takes what it can at `position` and returns the position behind it, or -1 for more bytes.

    def _size_line(self, data: bytes, position: int, _pieces: list[Buffer]) -> int:
        match = _CHUNK_LINE.match(data, position)
        if match is None:
            return self._incomplete_size_line(data, position)
        if match.end() - position > _CHUNK_LINE_BYTES or len(match[2]) > 256:
            raise RequestError("bad-chunk", "a chunk extension is longer than 256 bytes")
        self._remaining = int(match[1], 16)
        self._total += self._remaining
        if self._max_bytes is not None and self._total > self._max_bytes:
            raise too_large(self._max_bytes)
        self._state = self._data if self._remaining else self._trailer_line
        return match.end()

    @staticmethod
    def _incomplete_size_line(data: bytes, position: int) -> int:
        line = data[position : position + _CHUNK_LINE_BYTES + 1]
        if b"\n" in line or len(line) > _CHUNK_LINE_BYTES or _BROKEN.search(line):
            raise RequestError("bad-chunk", "a chunk does not begin with its size in hexadecimal and CRLF")
        # Without its end a line can still be told to be hopeless: it must begin with up to 16 digits, then ; or CR.
        if not re.match(rb"[0-9A-Fa-f]{1,16}(?:[;\r]|\Z)", line):
            raise RequestError("bad-chunk", "a chunk does not begin with its size in hexadecimal")
        return -1

    def _data(self, data: bytes, position: int, pieces: list[Buffer]) -> int:
        piece = data[position : position + self._remaining]
        pieces.append(piece)
        self._remaining -= len(piece)
        if not self._remaining:
            self._state = self._data_end
        return position + len(piece)

    def _data_end(self, data: bytes, position: int, _pieces: list[Buffer]) -> int:
        end = data[position : position + 2]
        if end == b"\r\n":
            self._state = self._size_line
            return position + 2
        if end != b"\r":
            raise RequestError("bad-chunk", "a chunk's data does not end with CRLF where its size says")
        return -1

    def _trailer_line(self, data: bytes, position: int, _pieces: list[Buffer]) -> int:
        limits = self._limits
        end = data.find(b"\n", position) + 1
        line = data[position : end or len(data)]
        broken = _BROKEN.search(line)
        if self._trailer_bytes + (broken.start() if broken else len(line)) > limits.request_head_bytes + 2:
            raise too_many_fields(limits, trailer=True)
        if broken:
            raise RequestError(
                "bad-trailer", "a control character, or a bare CR or LF, stands among the trailer fields"
            )
        if not end:
            return -1
        if line == b"\r\n":
            self.complete = True
            return end
        self._trailer_bytes += len(line)
        self._trailer_fields += 1
        if self._trailer_bytes > limits.request_head_bytes + 2 or self._trailer_fields > limits.request_fields:
            raise too_many_fields(limits, trailer=True)
        if not _FIELD_LINE.fullmatch(line[:-2]):
            raise RequestError("bad-trailer", what_is_wrong(line[:-2]))
        if line.partition(b":")[0].lower() in _NOT_IN_TRAILERS:
            raise RequestError("bad-trailer", "a trailer field may not frame or route the message")
        return end


Decoder = LengthDecoder | ChunkedDecoder | UntilCloseDecoder


class Request:
    """One request, its fields as an ordered list; `target` is the origin form, or `*`."""

    __slots__ = ("method", "target", "minor", "fields", "values", "body", "keep_alive", "chunked", "dropped")

    def __init__(self, method: bytes, target: bytes, minor: int, fields: list[Field]) -> None:
        self.method = method
        self.target = target
        self.minor = minor  # 0 for HTTP/1.0, else 1
        self.fields = fields
        self.values: dict[bytes, list[bytes]] = {}  # of _ASKED_FOR, by name in lower case
        for lower, _, value in fields:
            if lower in _ASKED_FOR:
                self.values.setdefault(lower, []).append(value)
        self.body: Body | None = None
        self.keep_alive = bool(minor)
        self.chunked = False
        self.dropped: frozenset[bytes] = HOP_BY_HOP

    def value(self, name: bytes) -> bytes | None:
        """The value of a field of _ASKED_FOR, repeats joined with a comma (RFC 9110 5.2); None when there is none."""
        values = self.values.get(name)
        if values is None:
            return None
        return values[0] if len(values) == 1 else b", ".join(values)


def split_list(values: list[bytes] | tuple[bytes, ...]) -> list[bytes]:
    """Members of a comma-separated field in lower case, empty ones left out (RFC 9110 5.6.1)."""
    return [member for value in values for part in value.split(b",") if (member := part.strip(b" \t").lower())]


def _connection(request: Request) -> None:
    """RFC 9110 7.6.1: what Connection says of persistence, and which fields it asks to be dropped."""
    options = split_list(request.values.get(b"connection", _NO_FIELDS))
    if not options:
        return
    if not _NOT_HOP_BY_HOP.isdisjoint(options):
        raise RequestError("bad-connection", "Connection names a field that must reach the other side")
    if b"close" in options:
        request.keep_alive = False
    elif b"keep-alive" in options:
        request.keep_alive = True
    request.dropped = HOP_BY_HOP.union(options)


def _host(request: Request) -> None:
    """RFC 9112 3.2: exactly one sound Host in HTTP/1.1; RFC 9112 3.2.2: an absolute target must agree with it."""
    hosts = request.values.get(b"host", _NO_FIELDS)
    if len(hosts) > 1:
        raise RequestError("bad-host", "there is more than one Host field")
    if not hosts:
        if request.minor:
            raise RequestError("bad-host", "there is no Host field")
    elif not _authority_is_sound(hosts[0]):
        raise RequestError("bad-host", "Host is not the name or address of a host with an optional port")
    if request.target[:1] == b"/":
        return
    if request.target == b"*":
        if request.method != b"OPTIONS":
            raise RequestError("bad-target", "only OPTIONS may ask for *")
        return
    absolute = _ABSOLUTE.fullmatch(request.target)
    if absolute is None:
        raise RequestError("bad-target", "the target is neither a path nor an http URL")
    if not _authority_is_sound(absolute[1]) or (hosts and hosts[0].lower() != absolute[1].lower()):
        raise RequestError("bad-host", "the URL's host is malformed, or not the one in Host")
    path = absolute[2]
    if not path and request.method == b"OPTIONS":
        request.target = b"*"
    else:
        request.target = path if path.startswith(b"/") else b"/" + path


def _authority_is_sound(authority: bytes) -> bool:
    match = _AUTHORITY.fullmatch(authority)
    return match is not None and (match[1] is None or int(match[1]) <= 65535)


def _method(request: Request) -> None:
    """RFC 9110 9.3.6, 9.3.8: what a reverse proxy for Elasticsearch has no use for."""
    if request.method in (b"CONNECT", b"TRACE"):
        raise RequestError("method-not-allowed", f"{request.method.decode()} is not for this server", 405)
    if request.method == b"OPTIONS" and request.value(b"max-forwards") == b"0":
        raise RequestError("max-forwards", "the client asked for an answer from here", 200)  # RFC 9110 7.6.2


def request_framing(request: Request, limits: Limits, max_bytes: int) -> Decoder | None:
    """RFC 9112 6.3 for requests; None when there is no body. Raises RequestError."""
    codings = request.values.get(b"transfer-encoding", _NO_FIELDS)
    lengths = request.values.get(b"content-length", _NO_FIELDS)
    # Step 3: both at once is how requests are smuggled. The RFC lets a server refuse; so it does.
    if codings and lengths:
        raise RequestError("bad-framing", "Content-Length and Transfer-Encoding stand side by side")
    # Step 4: chunked, once, last and alone.
    if codings:
        if not request.minor:
            raise RequestError("bad-framing", "Transfer-Encoding in an HTTP/1.0 request")
        members = [part.strip(b" \t").lower() for part in codings[0].split(b",")]
        if len(codings) > 1 or members[-1] != b"chunked" or not _REGISTERED_CODINGS.issuperset(members[:-1]):
            raise RequestError("bad-framing", "Transfer-Encoding is not chunked")
        if len(members) > 1:
            raise RequestError("coding-not-implemented", "no transfer coding but chunked is implemented", 501)
        request.chunked = True
        return ChunkedDecoder(limits, max_bytes)
    # Step 7: no length is no body.
    if not lengths:
        return None
    # Steps 5 and 6: one length, of digits only.
    if len(lengths) > 1 or not _DIGITS.fullmatch(lengths[0]):
        raise RequestError("bad-framing", "Content-Length is not one decimal number")
    length = int(lengths[0])
    if length > max_bytes:
        raise too_large(max_bytes)
    return LengthDecoder(length)


def _look_alikes(names: Iterator[bytes]) -> None:
    """Refuse a name that another parser might take for a framing field: `_` for `-`, or percent-encoded."""
    for name in names:
        plain = _PERCENT.sub(lambda match: bytes((int(match[1], 16),)), name).lower().replace(b"_", b"-")
        if plain != name and plain in _FRAMING_NAMES:
            raise RequestError("bad-field", "a field's name could be taken for one that frames the message")


class RequestReader:
    """Turns the bytes of one client connection into requests, resumable at any byte.

    `feed` it what arrived, then call `next` until it returns None. Raises RequestError (and is of no use afterwards)
    or OverloadError. `received` then holds the beginning of what was refused.
    """

    __slots__ = ("_limits", "_max_body_bytes", "_budget", "_buffer", "_scanned", "_request", "_decoder", "_received",
                 "_blank_line", "expects_continue")  # fmt: skip

    def __init__(self, limits: Limits, max_body_bytes: int, budget: Budget) -> None:
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._budget = budget
        self._buffer = b""
        self._scanned = 0  # so much of the buffer is known to be the beginning of a head
        self._blank_line = False  # the one empty line before a request was already skipped (RFC 9112 2.2)
        self._request: Request | None = None  # its head was read, its body is not complete
        self._decoder: Decoder | None = None
        self._received = b""
        self.expects_continue = False  # the client waits for 100 Continue

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has arrived."""
        return self._request is None and not self._buffer and not self._blank_line

    @property
    def buffered(self) -> bool:
        """Whether bytes wait that `next` has not looked at."""
        return bool(self._buffer)

    @property
    def body(self) -> Body | None:
        """The unfinished body while one is being read."""
        return self._request.body if self._request is not None else None

    @property
    def received(self) -> bytes:
        """The first REJECTED_BODY_BYTES of the message in hand, as they came."""
        return (self._received or self._buffer)[:REJECTED_BODY_BYTES]

    def feed(self, data: bytes) -> None:
        """Take what arrived."""
        self._buffer = self._buffer + data if self._buffer else data
        if self._request is not None and len(self._received) < REJECTED_BODY_BYTES:
            self._received += data[: REJECTED_BODY_BYTES - len(self._received)]

    def next(self) -> Request | None:
        """The next whole request, or None for more bytes."""
        if self._request is None and not self._next_head():
            return None
        request = self._request
        assert request is not None
        if self._decoder is not None:
            self._next_body(request)
            if not self._decoder.complete:
                return None
        self._request = self._decoder = None
        self._received = b""
        self.expects_continue = False
        return request

    def end(self) -> None:
        """The stream has ended. Raises RequestError when that is in the middle of a request."""
        if self._request is not None or self._buffer:
            raise RequestError("incomplete-request", "the connection ended in the middle of a request")

    def salvage(self) -> Request | None:
        """What can be said of a refused request: its head when that was sound, else its request line, else None."""
        if self._request is not None:
            return self._request
        match = re.match(rb"(" + _TOKEN + rb") ([!-~]+) ", self._received or self._buffer)
        return Request(match[1], match[2], 1, []) if match else None

    def _next_head(self) -> bool:
        buffer = self._buffer
        if not buffer:
            return False
        match = None
        if not self._scanned or buffer.find(b"\r\n\r\n", max(0, self._scanned - 3)) >= 0:
            match = _REQUEST_HEAD.match(buffer)
        if match is None:
            return self._incomplete_head()
        self._received = buffer  # Until the body is there: if the rest is refused, the record shows this.
        self._request = request = self._new_request(match)
        self._check(request)
        self._buffer = buffer[match.end() :]
        self._received = buffer[:REJECTED_BODY_BYTES] if self._decoder is not None else b""
        self._scanned = 0
        self._blank_line = False
        return True

    def _new_request(self, match: re.Match[bytes]) -> Request:
        method, target, major, minor, block = match.groups()
        lines = block.split(b"\r\n")
        lines.pop()
        limits = self._limits
        if match.start(5) - 2 > limits.request_line_bytes:
            raise line_too_long(method + b" ", limits)
        if major != b"1":
            raise RequestError("bad-version", "only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        if len(block) > limits.request_head_bytes or len(lines) > limits.request_fields:
            raise too_many_fields(limits)
        fields = []
        for line in lines:
            name, _, value = line.partition(b":")
            fields.append((name.lower(), name, value.strip(b" \t")))
        if b"_" in block or b"%" in block:
            _look_alikes(field[0] for field in fields)
        return Request(method, target, 0 if minor == b"0" else 1, fields)

    def _check(self, request: Request) -> None:
        """Everything about a head that isn't its syntax; sets up the body."""
        _method(request)
        _host(request)
        _connection(request)
        self._decoder = request_framing(request, self._limits, self._max_body_bytes)
        self._expect(request)
        request.body = Body(self._limits.memory_body_bytes, self._budget)

    def _expect(self, request: Request) -> None:
        """RFC 9110 10.1.1."""
        expectations = request.values.get(b"expect")
        if expectations is None or not request.minor:
            return
        if len(expectations) > 1 or expectations[0].lower() != b"100-continue":
            raise RequestError("bad-expectation", "Expect is not 100-continue", 417)
        self.expects_continue = self._decoder is not None

    def _incomplete_head(self) -> bool:
        """The buffer is no head: say why, or wait for more (False)."""
        buffer = self._buffer
        if buffer.startswith(b"\r\n") and not self._blank_line:
            self._blank_line = True
            self._buffer = buffer[2:]
            self._scanned = 0
            return self._next_head()
        fresh = buffer[max(0, self._scanned - 1) :]
        # The request line is looked at as it grows, fields line by line: so what is wrong is found in any split alike.
        if b"\n" not in buffer or b"\n" in fresh or _BROKEN.search(fresh) or self._outgrown(buffer):
            explain_head(buffer, self._limits)
        self._scanned = len(buffer)
        return False

    def _outgrown(self, buffer: bytes) -> bool:
        """Whether a limit is passed already, though the line or the section has not ended."""
        limits = self._limits
        if len(buffer) <= limits.request_line_bytes:
            return False
        return len(buffer) > limits.request_line_bytes + limits.request_head_bytes + 8 or b"\n" not in buffer

    def _next_body(self, request: Request) -> None:
        assert self._decoder is not None and request.body is not None
        pieces, self._buffer = self._decoder.decode(self._buffer)
        for piece in pieces:
            request.body.append(piece)
        if self._buffer or self._decoder.complete:
            self.expects_continue = False


def explain_head(buffer: bytes, limits: Limits) -> None:
    """Raise the RequestError that says why `buffer` can't become a request's head; return if more bytes can help.

    What is wrong at the first byte that is wrong decides, so that the answer does not depend on how the bytes arrived.
    """
    line, end, section = buffer.partition(b"\n")
    explain_request_line((line + end)[: limits.request_line_bytes + 2])
    if len(line) - (line[-1:] == b"\r") > limits.request_line_bytes:
        raise line_too_long(line, limits)
    if end:
        explain_fields(section, limits)


def line_too_long(line: bytes, limits: Limits) -> RequestError:
    """The error for a request line over its limit."""
    if b" " not in line[: limits.request_line_bytes]:
        return RequestError("bad-request-line", "no method is that long")
    return RequestError("target-too-long", f"the request line is longer than {limits.request_line_bytes} bytes", 414)


def explain_request_line(line: bytes) -> None:
    """RFC 9112 3, from left to right; `line` has its line end, or is the beginning of a line."""
    method = _METHOD.match(line)
    if method is None:
        if line != b"\r":  # An empty line before the request may be on its way.
            raise RequestError("bad-request-line", "this is not the beginning of an HTTP/1.1 request")
        return
    position = method.end()
    if line[position : position + 1] not in (b"", b" "):
        raise RequestError("bad-request-line", "the method holds a character that is not allowed there")
    target = _TARGET.match(line, position + 1)
    if target is None:
        if len(line) > position + 1:
            raise RequestError("bad-request-line", "there is no target one space behind the method")
        return
    position = target.end()
    after = line[position : position + 1]
    if after in (b"\r", b"\n"):
        raise RequestError("bad-request-line", "there is no version: HTTP/0.9 is not spoken here")
    if after not in (b"", b" "):
        raise RequestError("bad-target", "the target holds a byte that must be percent-encoded")
    version = line[position + 1 :]
    if not b"HTTP/0.0\r\n".startswith(version.translate(_DIGITS_TO_0)):
        raise RequestError("bad-request-line", "the target is not followed by one space, HTTP/, two digits and CRLF")
    if version.endswith(b"\n") and not version.startswith(b"HTTP/1"):
        raise RequestError("bad-version", "only HTTP/1.0 and HTTP/1.1 are spoken here", 505)


def explain_fields(section: bytes, limits: Limits) -> None:
    """Raise the RequestError for the first thing wrong in what there is of a header section (RFC 9112 5).

    Returns if more bytes can make it one.
    """
    broken = _BROKEN.search(section)
    at = broken.start() if broken else len(section)
    position = 0
    for number, line in enumerate(section.split(b"\r\n")[:-1], 1):
        position += len(line) + 2
        if position - 2 > at:
            break
        if position > limits.request_head_bytes + 2 or (line and number > limits.request_fields):
            raise too_many_fields(limits)
        if line and not _FIELD_LINE.fullmatch(line):
            raise RequestError("bad-field", what_is_wrong(line))
    if at > limits.request_head_bytes + 2:
        raise too_many_fields(limits)
    if broken:
        raise RequestError("bad-field", "a control character, or a bare CR or LF, stands among the fields")


class Response:
    """The head of one response; `fields` as in Request, `decoder` for its body (None: no body)."""

    __slots__ = ("minor", "status", "reason", "fields", "decoder", "keep_alive", "dropped", "connection")

    def __init__(self, minor: int, status: int, reason: bytes | None, fields: list[Field]) -> None:
        self.minor = minor
        self.status = status
        self.reason = reason
        self.fields = fields
        self.decoder: Decoder | None = None
        self.connection = split_list([value for lower, _, value in fields if lower == b"connection"])
        self.keep_alive = b"close" not in self.connection and (bool(minor) or b"keep-alive" in self.connection)
        self.dropped = HOP_BY_HOP.union(self.connection) - _FRAMING_NAMES if self.connection else HOP_BY_HOP


def response_framing(response: Response, method: bytes, limits: Limits) -> Decoder | None:
    """RFC 9112 6.3 for responses; None when there is no body. Raises UpstreamError."""
    codings = [value for lower, _, value in response.fields if lower == b"transfer-encoding"]
    lengths = [value for lower, _, value in response.fields if lower == b"content-length"]
    if len(lengths) > 1 or (lengths and not (_DIGITS.fullmatch(lengths[0]) and len(lengths[0]) < 20)):
        raise _malformed("Content-Length is not one decimal number, or no number that anything has so many of")
    if codings and (lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or not response.minor):
        raise _malformed("Transfer-Encoding is not chunked, alone and in HTTP/1.1")
    # Step 1: no body, whatever the fields say.
    if method == b"HEAD" or response.status in (204, 304):
        return None
    if codings:
        return ChunkedDecoder(limits)
    if lengths:
        return LengthDecoder(int(lengths[0]))
    return UntilCloseDecoder()


def _malformed(reason: str) -> UpstreamError:
    return UpstreamError("upstream-malformed", f"the upstream's response is not HTTP/1.1: {reason}")


class ResponseReader:
    """Turns the bytes of an upstream connection into one response to a request with `method`.

    `feed` it what arrived; `head` is None until the response's head is there, `body` gives what can be decoded.
    Raises UpstreamError.
    """

    __slots__ = ("_limits", "_method", "_buffer", "_interim", "head", "complete")

    def __init__(self, limits: Limits, method: bytes) -> None:
        self._limits = limits
        self._method = method
        self._buffer = b""
        self._interim = 0
        self.head: Response | None = None
        self.complete = False

    @property
    def started(self) -> bool:
        """Whether any byte of an answer has arrived."""
        return bool(self._buffer or self._interim or self.head)

    @property
    def surplus(self) -> bool:
        """Whether bytes arrived behind the complete response: the connection can't be used again."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take what arrived; looks for the head as long as there is none."""
        self._buffer = self._buffer + data if self._buffer else data
        while self.head is None:
            match = _RESPONSE_HEAD.match(self._buffer)
            if match is None:
                self._incomplete_head()
                return
            self._buffer = self._buffer[match.end() :]
            self._take_head(match)

    def _take_head(self, match: re.Match[bytes]) -> None:
        minor, status, reason, block = match.groups()
        lines = block.split(b"\r\n")
        lines.pop()
        if match.end() - match.start() > self._limits.response_head_bytes or len(lines) > self._limits.response_fields:
            raise _malformed("its header section is over the limit")
        if status[:1] == b"1":
            # RFC 9110 15.2: any number of interim responses; 101 would mean another protocol, which nobody asked for.
            self._interim += 1
            if status == b"101" or self._interim > self._limits.interim_responses:
                raise _malformed("it switches protocols, or sends interim responses without end")
            return
        fields = []
        for line in lines:
            name, _, value = line.partition(b":")
            fields.append((name.lower(), name, value.strip(b" \t")))
        head = Response(0 if minor == b"0" else 1, int(status), reason, fields)
        head.decoder = response_framing(head, self._method, self._limits)
        self.head = head
        self.complete = head.decoder is None or head.decoder.complete

    def _incomplete_head(self) -> None:
        buffer = self._buffer
        if len(buffer) > self._limits.response_head_bytes:
            raise _malformed("its header section is over the limit")
        if _BROKEN.search(buffer):
            raise _malformed("its head holds a control character or a bare CR or LF")
        if not b"HTTP/0.0 ".startswith(buffer[:9].translate(_DIGITS_TO_0)) or not b"HTTP/1".startswith(buffer[:6]):
            raise _malformed("it does not begin with HTTP/1")
        if b"\r\n\r\n" in buffer or not _response_can_become(buffer):
            raise _malformed("its status line or a header field is malformed")

    def body(self) -> list[Buffer]:
        """Pieces of the body among what was fed; `complete` says whether that was the last of it."""
        assert self.head is not None
        decoder = self.head.decoder
        if decoder is None or not self._buffer:
            return []
        try:
            pieces, self._buffer = decoder.decode(self._buffer)
        except RequestError as error:
            raise _malformed(error.reason) from None
        self.complete = decoder.complete
        return pieces

    def direct(self, count: int) -> None:
        """Note that `count` bytes of a LengthDecoder's body were taken past this reader."""
        assert self.head is not None and isinstance(self.head.decoder, LengthDecoder)
        self.head.decoder.remaining -= count
        self.complete = self.head.decoder.complete

    def end(self) -> None:
        """The stream has ended, as a body that is delimited by it must. Raises UpstreamError for all others."""
        if self.head is not None and isinstance(self.head.decoder, UntilCloseDecoder):
            self.complete = self.head.decoder.complete = True
        elif not self.complete:
            raise UpstreamError("upstream-closed", "the upstream closed the connection in the middle of its response")


def _response_can_become(buffer: bytes) -> bool:
    """Whether the complete lines of an incomplete response head are sound."""
    lines = buffer.split(b"\r\n")
    if len(lines) == 1:
        return True
    return bool(_RESPONSE_HEAD.match(lines[0] + b"\r\n\r\n")) and all(map(_FIELD_LINE.fullmatch, lines[1:-1]))


def request_head(request: Request, host: bytes) -> bytes:
    """Serialise a request's head for the upstream `host`, from the parsed fields (RFC 9112 3, 5)."""
    parts = [b"%b %b HTTP/1.1\r\n" % (request.method, request.target)]
    if b"host" not in request.values:
        parts.append(b"Host: %b\r\n" % host)
    dropped = request.dropped
    for lower, name, value in request.fields:
        if lower in dropped or lower == b"expect":
            continue
        if lower == b"host":
            value = host
        elif lower == b"transfer-encoding":
            value = b"chunked"
        elif lower == b"content-length":
            value = b"%d" % int(value)
        elif lower == b"max-forwards" and request.method == b"OPTIONS" and _DIGITS.fullmatch(value):
            value = b"%d" % (int(value) - 1)  # RFC 9110 7.6.2
        parts.append(b"%b: %b\r\n" % (name, value))
    parts.append(b"\r\n")
    return b"".join(parts)


def response_head(response: Response, framing: bytes | None, connection: bytes) -> bytes:
    """Serialise a response's head for the client.

    `framing` is the field line to frame the body with instead of the upstream's own; None leaves that. `connection` is
    a field line or empty.
    """
    reason = b" " + response.reason if response.reason is not None else b""
    parts = [b"HTTP/1.1 %d%b\r\n" % (response.status, reason)]
    dropped = response.dropped
    for lower, name, value in response.fields:
        if lower in dropped:
            continue
        if lower in _FRAMING_NAMES:
            # RFC 9112 6.1, 6.3: a 204 has neither, a 304 no transfer coding; some clients would wait for a body.
            bodiless = response.status == 204 or (lower == b"transfer-encoding" and response.status == 304)
            if framing is not None or bodiless:
                continue
            value = b"chunked" if lower == b"transfer-encoding" else b"%d" % int(value)
        parts.append(b"%b: %b\r\n" % (name, value))
    parts += (framing or b"", connection, b"\r\n")
    return b"".join(parts)


def chunk(piece: Buffer) -> bytes:
    """One chunk of a chunked body (RFC 9112 7.1)."""
    return b"".join((b"%x\r\n" % len(piece), piece, b"\r\n"))


LAST_CHUNK = b"0\r\n\r\n"


def error_response(error: ProxyError, exchange_id: str, head_only: bool, close: bool) -> tuple[bytes, bytes]:
    """Head and body of a response of our own, in the shape of Elasticsearch's errors: clients raise what they know."""
    cause = {"type": "es_proxy_exception", "reason": error.reason}
    document = {"error": {"root_cause": [cause], **cause, "code": error.code, "audit_id": exchange_id}}
    body = b"" if error.status < 400 else json.dumps({**document, "status": error.status}).encode() + b"\n"
    head = (
        f"HTTP/1.1 {error.status} {http.client.responses.get(error.status, 'Error')}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        + ("Allow: GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS\r\n" if error.status in (200, 405) else "")
        + ("Connection: close\r\n" if close else "")
        + "\r\n"
    )
    return head.encode(), b"" if head_only else body


# == Transport ==================================================================================================
# The only place that reads from and writes to sockets, plain or TLS, with its deadlines. It does not know which peer
# it talks to, nor what the bytes mean. A stream belongs to one thread at a time.


class Wake(enum.Enum):
    """Why a session is handed to a worker."""

    READABLE = "bytes, or the end of the stream, have arrived"
    EXPIRED = "its deadline has passed"
    OVERDUE = "it was ready for so long without a thread that its request is refused"
    STOPPED = "the time to finish what it had begun is over"


class Deadline:
    """A point in monotonic time, `seconds` from now; None is never."""

    __slots__ = ("_at",)

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 when it has passed, infinity when there is none."""
        return float("inf") if self._at is None else max(0.0, self._at - time.monotonic())


class MemoryBudget:
    """Counts the bytes that unfinished bodies hold in memory, over all connections of the process."""

    __slots__ = ("_lock", "_free")

    def __init__(self, total_bytes: int) -> None:
        self._lock = threading.Lock()  # guards _free
        self._free = total_bytes

    def take(self, count: int) -> bool:
        """Ask for `count` more bytes; False when there are none."""
        with self._lock:
            if count > self._free:
                return False
            self._free -= count
            return True

    def give(self, count: int) -> None:
        """Return `count` bytes."""
        if count:
            with self._lock:
                self._free += count


class ParkedStream:
    """A non-blocking socket that may be left alone for long: reads what is there, writes with limited patience.

    `sent` counts the bytes the kernel has taken. Raises OSError when the connection is broken, TimeoutError when the
    peer takes nothing, or too little, for too long.
    """

    __slots__ = ("sock", "sent", "_tls", "_limits", "_waited", "_taken")

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.sent = 0
        self._tls: ssl.SSLSocket | None = None
        self._limits = limits
        self._waited = 0.0  # seconds this response has waited for the peer
        self._taken = 0  # bytes the peer took meanwhile

    def peek(self) -> bytes | None:
        """The first byte that waits, left where it is; None for nothing yet, empty for the end of the stream."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Take the server's part of a handshake from here on; `handshake` carries it out."""
        self._tls = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False,
                                        suppress_ragged_eofs=False)  # fmt: skip
        self.sock = self._tls

    def handshake(self) -> bool:
        """One step; True when it is complete, False when the peer has to send more. Raises ssl.SSLError, OSError."""
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self._wait_writable(1.0)  # A few kilobytes into an empty socket buffer: all but impossible.
            return False
        return True

    def certificate_name(self) -> bytes | None:
        """The common name in the peer's verified certificate, in UTF-8, or None."""
        certificate = self._tls.getpeercert() if self._tls is not None else None
        subject = certificate.get("subject", ()) if certificate else ()
        for relative_name in subject:
            for attribute in relative_name:
                if attribute[0] == "commonName":
                    return attribute[1].encode()
        return None

    def tls_facts(self) -> dict[str, object]:
        """Version, cipher and the peer's certificate, under their names in ECS."""
        assert self._tls is not None
        cipher = self._tls.cipher()
        facts: dict[str, object] = {"tls.established": True}
        if cipher is not None:
            facts["tls.cipher"] = cipher[0]
            facts["tls.version"] = cipher[1].removeprefix("TLSv")
            facts["tls.version_protocol"] = "tls"
        certificate = self._tls.getpeercert()
        if certificate:
            attributes = itertools.chain.from_iterable(certificate.get("subject", ()))
            facts["tls.client.subject"] = ", ".join("=".join(map(str, attribute)) for attribute in attributes)
        return facts

    def receive(self) -> bytes | None:
        """What is there, RECEIVE_BYTES at most; None for nothing yet, empty for the end of the stream."""
        try:
            return self.sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        except ssl.SSLEOFError:  # It left without close_notify; requests have lengths, so nothing is mistaken.
            return b""

    def pending(self) -> bool:
        """Whether decrypted bytes wait here, which no poller can see."""
        return self._tls is not None and self._tls.pending() > 0

    def gone(self) -> bool:
        """Whether the peer has reset the connection. One that has only finished sending is still there."""
        poll = select.poll()
        poll.register(self.sock.fileno(), 0)
        return bool(poll.poll(0))

    def send(self, data: Buffer) -> None:
        """Write all of `data`."""
        count = self._send_some(data)
        if count < len(data):
            self._send_rest(memoryview(data)[count:])

    def _send_some(self, data: Buffer) -> int:
        try:
            count = self.sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        self.sent += count
        return count

    def new_pace(self) -> None:
        """Begin to judge anew how fast the peer takes what it is sent."""
        self._waited = 0.0
        self._taken = 0

    def _send_rest(self, view: memoryview) -> None:
        limits = self._limits
        while view:
            began = time.monotonic()
            self._wait_writable(limits.write_stall_seconds)
            count = self._send_some(view)
            view = view[count:]
            self._waited += time.monotonic() - began
            self._taken += count
            if self._taken < (self._waited - limits.write_grace_seconds) * limits.write_rate_bytes:
                raise TimeoutError("the peer reads too slowly")

    def _wait_writable(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLOUT)
        if not poll.poll(seconds * 1000):
            raise TimeoutError("the peer does not read")

    def finish(self) -> None:
        """Say that nothing more will be sent; the peer may still be heard."""
        with contextlib.suppress(OSError, ValueError):  # It may have left already: all the better.
            if self._tls is not None:
                self._tls.unwrap()  # Sends close_notify; that the peer's has not come yet raises SSLWantReadError.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def break_off(self) -> None:
        """Make what was sent so far recognisable as incomplete: a reset, and in TLS no close_notify."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def cut(self) -> None:
        """From another thread: let whoever reads or writes here fail at once."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class WaitingStream:
    """A blocking socket that one thread reads and writes in slices of WATCH_SECONDS, so that it can look up in between.

    A plain socket has the kernel's timeouts (SO_RCVTIMEO, SO_SNDTIMEO), which cost no call. A TLS socket would repeat a
    read that timed out in the kernel for ever, so it has Python's, as has every socket where `portable` asks for them.
    """

    __slots__ = ("sock", "_tls", "_poll")

    def __init__(self, sock: socket.socket, portable: bool) -> None:
        self.sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        if self._tls is not None or portable or sys.platform != "linux":
            sock.settimeout(WATCH_SECONDS)
        else:
            slice_timeval = struct.pack("ll", int(WATCH_SECONDS), int(WATCH_SECONDS % 1 * 1e6))
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, slice_timeval)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, slice_timeval)

    def readable(self) -> bool:
        """Whether anything waits: an answer, a close, or in TLS a session ticket."""
        return bool(self._poll.poll(0)) or (self._tls is not None and self._tls.pending() > 0)

    def receive(self, size: int = RECEIVE_BYTES) -> bytes | None:
        """What arrives within a slice; None for nothing, empty for the end of the stream. Raises OSError."""
        try:
            return self.sock.recv(size)
        except (BlockingIOError, TimeoutError):
            return None

    def receive_into(self, buffer: memoryview) -> int | None:
        """The same into `buffer`; the number of bytes, 0 at the end of the stream, None for nothing."""
        try:
            return self.sock.recv_into(buffer)
        except (BlockingIOError, TimeoutError):
            return None

    def send_some(self, data: Buffer) -> int:
        """Write a part of `data` within a slice; the number of bytes taken."""
        try:
            return self.sock.send(data)
        except (BlockingIOError, TimeoutError):
            return 0

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def listener_context(config: Config) -> ssl.SSLContext:
    """The TLS context for clients (Mozilla "intermediate"). Raises StartError naming the file at fault."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    for option, path in (("--cert", config.cert), ("--key", config.key)):
        _check_readable(option, path)
    try:
        context.load_cert_chain(config.cert, config.key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise StartError(
            f"--cert {config.cert} and --key {config.key} are not a PEM certificate and its unencrypted private key: "
            f"{error}"
        ) from None
    if config.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authorities(context, "--client-ca", config.client_ca)
    return context


def _no_password() -> bytes:
    raise ValueError("the key is encrypted; a daemon has nobody to ask for the password, decrypt it with openssl pkey")


def _check_readable(option: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise StartError(
            f"{option} {path}: {error.strerror}; name a readable PEM file, or use --no-tls or --tls"
        ) from None


def _load_authorities(context: ssl.SSLContext, option: str, path: str) -> None:
    _check_readable(option, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"{option} {path} is not a PEM file with CA certificates: {error}") from None


def upstream_context(config: Config) -> ssl.SSLContext:
    """The TLS context towards the upstream; one with a fingerprint still lacks its anchor. Raises StartError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if config.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif config.ca is not None:
        _load_authorities(context, "--ca", config.ca)
    elif config.ca_fingerprint is None:
        context.load_default_certs()
    return context


def presented_chain(sock: ssl.SSLSocket) -> list[bytes]:
    """The certificates the peer sent, DER, not verified."""
    if hasattr(sock, "get_unverified_chain"):  # Python 3.13
        return list(sock.get_unverified_chain())
    der = 2  # _ssl.ENCODING_DER; 3.10 to 3.12 have the method on the inner object only.
    inner = sock._sslobj  # type: ignore[attr-defined]
    return [certificate.public_bytes(der) for certificate in inner.get_unverified_chain()]


def pinned_context(sock: ssl.SSLSocket, fingerprint: str) -> ssl.SSLContext | None:
    """A context that trusts only what has this SHA-256 in the chain that `sock` was shown; None when nothing has.

    A CA is pinned as the one authority, and the host's name is checked. A server's own certificate is pinned as itself,
    whatever names it has. Either way a new handshake proves it: what `sock` was shown is not trusted by itself.
    """
    chain = presented_chain(sock)
    for certificate in chain:
        if hashlib.sha256(certificate).hexdigest() == fingerprint:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["http/1.1"])
            context.check_hostname = certificate != chain[0]
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.load_verify_locations(cadata=certificate)
            return context
    return None


# == Audit ======================================================================================================
# What is recorded of a request, how it is written so that it can't be forged, and the log it is written to. Text and
# bytes only: it does not know how the request came or where it went. Run by the worker thread that has the request.
#
# A text record, in this order (the grammar is in the docstring above; RECORD parses it):
#   request    timestamp, id, user, path, query, method, source, agent, body, marks
#   response   timestamp, id, user, path, query, method, source, agent, status, duration, size, marks

RECORD = re.compile(
    r"(?P<timestamp>\S+) ID: (?P<id>\S+) User: (?P<user>\S*) Path: (?P<path>\S*) Query: (?P<query>\S*)"
    r" Method: (?P<method>\S*) Source: (?P<source>\S*) Agent: (?P<agent>(?:[^:]|:(?! ))*?)"
    r" (?:Body: (?P<body>[A-Za-z0-9+/=]*)"
    r"|Status: (?P<status>[0-9]{3}) Duration: (?P<duration>[0-9]+\.[0-9]{3})s Size: (?P<size>[0-9]+))"
    r"(?P<marks>(?: (?!ID: )[A-Z][A-Za-z0-9-]*: \S+)*)"
)
EVENT = re.compile(r"(?P<timestamp>\S+) Event: (?P<event>\S+)(?P<marks>(?: [A-Z][A-Za-z0-9-]*: \S+)*)")

STAND_INS = frozenset((b"None", b"anonymous", b"malformed", b"-"))
_TO_ESCAPE = re.compile(rb"[^!-\[\]-~]|:\Z")  # outside 0x21-0x7E, a backslash, a colon at the end
_AGENT_TO_ESCAPE = re.compile(rb"[^ -\[\]-~]|:(?= |\Z)|\A | \Z")  # the same, but a space may stay inside
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
ECS_VERSION = "8.11.0"  # of the Elastic Common Schema
UNZIPPED_BYTES = 256 * MIB  # What a gzip body may unfold to in an ECS record; beyond it the record keeps the gzip.


def _hex_escape(match: re.Match[bytes]) -> bytes:
    return b"\\x%02x" % match[0][0]


def escape(value: bytes) -> bytes:
    """A value as one word of printable ASCII that can't be taken for a field, nor for a stand-in."""
    if value in STAND_INS:
        return b"\\x%02x" % value[0] + value[1:]
    return _TO_ESCAPE.sub(_hex_escape, value) if _TO_ESCAPE.search(value) else value


def escape_agent(value: bytes) -> bytes:
    """The same for a value in which spaces may stay."""
    if value in STAND_INS:
        return escape(value)
    return _AGENT_TO_ESCAPE.sub(_hex_escape, value) if _AGENT_TO_ESCAPE.search(value) else value


def unescape(value: bytes) -> bytes:
    """What `escape` and `escape_agent` were given; stand-ins are the caller's to know."""
    return _ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), value)


def timestamp(seconds: float) -> bytes:
    """Seconds since the epoch as UTC with microseconds: `2026-11-23T13:03:24.123456Z`."""
    whole = int(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)).encode() + b".%06dZ" % ((seconds - whole) * 1e6)


def new_id() -> str:
    """A random UUID, version 4 (RFC 9562 5.4); uuid.uuid4 makes the same in four times the time."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


# -- Identity: what the client claims to be; each function returns it escaped, never a secret --------------------


def identify(authorization: bytes | None, certificate_name: bytes | None) -> bytes:
    """The user of an Authorization field (RFC 9110 11.6.2), else of a client certificate, else `anonymous`."""
    if not authorization:
        return escape(b"cert:" + certificate_name) if certificate_name is not None else b"anonymous"
    scheme, _, credentials = authorization.partition(b" ")
    known = _SCHEMES.get(scheme.lower())
    if known is None:
        return escape(scheme.lower() + b":-")
    user = known(credentials.strip(b" \t"))
    return b"malformed" if user is None else escape(user)


def _base64(text: bytes) -> bytes | None:
    """Base64 with or without its padding, as Java reads it; None for all else (binascii skips what it can't read)."""
    padded = text if text.endswith(b"=") else text + b"=" * (-len(text) % 4)
    try:
        return binascii.a2b_base64(padded) if _BASE64.fullmatch(padded) else None
    except ValueError:
        return None


def _basic(credentials: bytes) -> bytes | None:
    """RFC 7617: name, colon, password."""
    decoded = _base64(credentials)
    if decoded is None or b":" not in decoded:
        return None
    return decoded.partition(b":")[0]


def _api_key(credentials: bytes) -> bytes | None:
    """Elasticsearch: Base64 of ID, colon, key."""
    name = _basic(credentials)
    return None if name is None else b"apikey:" + name


def _bearer(credentials: bytes) -> bytes | None:
    """RFC 6750: a service account's token, a JWT, or a token that only the cluster can read."""
    if not credentials:
        return None
    return _service_account(credentials) or _jwt(credentials) or _token_digest(credentials)


def _token_digest(token: bytes) -> bytes:
    return b"bearer:" + hashlib.sha256(token).hexdigest()[:16].encode()


def _service_account(token: bytes) -> bytes | None:
    """Elasticsearch's service account token: 0x00 0x01 0x00 0x01, `namespace/service/token:secret`, in Base64."""
    if not token.startswith(b"AAEAA"):
        return None
    decoded = _base64(token) or b""
    name, colon, _ = decoded[4:].partition(b":")
    return b"service:" + name if decoded[:4] == b"\0\1\0\1" and colon and name.count(b"/") == 2 else None


def _jwt(token: bytes) -> bytes | None:
    """RFC 7519 4.1.2: the claim `sub` of a JSON Web Token; it is not verified here."""
    parts = token.split(b".")
    if len(parts) != 3:
        return None
    text = parts[1].translate(bytes.maketrans(b"-_", b"+/"))
    decoded = _base64(text)
    try:
        subject = json.loads(decoded or b"").get("sub")
    except (ValueError, AttributeError, RecursionError):
        return None
    return b"jwt:" + subject.encode("utf-8", "surrogatepass") if isinstance(subject, str) else None


def _aws(credentials: bytes) -> bytes | None:
    """AWS Signature version 4: Credential=KEY_ID/date/region/service/aws4_request."""
    match = re.search(rb"(?:^|[ ,])Credential=([^/, ]+)/", credentials)
    return b"aws:" + match[1] if match else None


_SCHEMES: dict[bytes, Callable[[bytes], bytes | None]] = {
    b"basic": _basic,
    b"apikey": _api_key,
    b"bearer": _bearer,
    b"aws4-hmac-sha256": _aws,
}

# -- Secrets -----------------------------------------------------------------------------------------------------
# Works on bytes alone and forwards nothing: what it returns is recorded, the upstream gets the original. Whatever it
# can't read it replaces whole: Elasticsearch's own reader is more lenient (comments, UTF-16, other formats), so only
# strict JSON in UTF-8 is certain to mean the same to both. It does not look at the method: a body is a body.

PLACEHOLDER = b"::es_redacted::"  # Elasticsearch's own, in GET responses
MAX_PARSE_BYTES = MIB  # A body that is parsed, or one line of a compressed _bulk; larger is replaced whole.
MAX_INFLATED_BYTES = 256 * MIB  # A compressed _bulk beyond it is replaced whole; Elasticsearch takes 100 MiB, inflated.

_QUOTED = b'"' + PLACEHOLDER + b'"'  # What stands for a value, a line of _bulk or a body: JSON either way.
_STEP_BYTES = MIB  # Piece in which bodies are inflated and recorded.
_COMPRESSED_STEP_BYTES = 64 * 1024  # Smaller, as what is left of it is copied for each piece that comes out.
_ACTION_BYTES = 64 * 1024  # An action line of _bulk that is parsed. Real ones have 100 bytes.
_SEARCH_BYTES = MIB  # A piece of _bulk that is searched at once, in under a millisecond.
_NAME_BYTES = 4096  # An index name, every character of it escaped and in UTF-32.
_SECRET_DOCUMENTS = 100_000  # In one _bulk; more is no client at work, and it is replaced whole.
_PATH_CHARS = 512  # Of a field's dotted path. Real ones have 100; a bound keeps the cost linear in the body.
_DECODINGS = 3  # %255f is %5f is _: how often a path is percent-decoded. Nothing in front of a cluster does more.


@dataclasses.dataclass(frozen=True, slots=True)
class Redaction:
    """What to record instead of a body: `pieces` may be iterated again as long as the body lives; `count` is >= 1."""

    pieces: Iterable[bytes]
    count: int  # values replaced


class _UnreadableError(Exception):
    """A body that can't be understood for certain, so nothing of it may be recorded."""


_WHOLE = Redaction((_QUOTED,), 1)

# The table. Fields are matched against the dotted path of a value, the end of it at any depth, so a key may be flat or
# nested; `*` stands for anything; `name.` means name only where it isn't an object. Case and `_` don't count, because
# old versions took camel case too (queryString). A path is matched after `_readings`.


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    begin: bytes  # what its paths begin with, literally
    path: re.Pattern[bytes]
    suffixes: tuple[str, ...]
    globs: tuple[tuple[str, ...], ...]  # what stands between the stars


def _fold(name: str) -> str:
    return name.lower().replace("_", "")


def _row(begin: bytes, path_end: bytes, fields: str) -> _Row:
    patterns = [tuple(_fold("." + field).split("*")) for field in fields.split()]
    return _Row(
        begin,
        re.compile(re.escape(begin) + path_end, re.DOTALL),
        tuple(parts[0] for parts in patterns if len(parts) == 1),
        tuple(parts for parts in patterns if len(parts) > 1),
    )


_TABLE = (
    _row(b"/_security/user/", rb".+", "password password_hash"),
    _row(
        b"/_security/oauth2/token",
        rb".*",
        "password kerberos_ticket refresh_token token service_account_token",
    ),
    _row(
        b"/_security/api_key/",
        rb"(?:grant|clone|_bulk_grant)",
        "password access_token api_key. client_authentication.value",  # grant's api_key is an object, and no secret
    ),
    _row(b"/_security/profile/_activate", rb"", "password access_token client_authentication.value"),
    _row(b"/_security/saml/", rb".+", "content token refresh_token query_string"),
    _row(b"/_security/oidc/", rb".+", "redirect_uri token refresh_token"),
    _row(b"/_security/delegate_pki", rb"", "x509_certificate_chain"),
    _row(b"/_security/named_credentials/", rb".+", "auth"),
    _row(b"/_nodes", rb"(?:/.*)?/reload_secure_settings", "secure_settings_password"),
    _row(b"/_reindex", rb".*", "source.remote.password source.remote.api_key source.remote.headers.*"),
    _row(
        b"/_watcher/watch/",
        rb".+",
        "auth.basic.password *input*.headers.* *input*.params.* actions*.headers.* actions*.params.*"
        " watch*.headers.* watch*.params.*",
    ),
    _row(
        b"/_inference/",
        rb".+",
        "service_settings.api_key service_settings.access_key service_settings.secret_key"
        " service_settings.service_account_json service_settings.entra_id service_settings.client_secret"
        " service_settings.secret_parameters.*",
    ),
    _row(b"/_snapshot/", rb".+", "settings*access_key settings*secret_key"),  # userinfo in URLs goes everywhere
    _row(
        b"/_query/data",  # beyond S3's two keys: session_token, Azure's key and sas_token, ...
        rb"(?:_source|set)/.+",
        "settings.*key settings.*token settings.*secret* settings.*password* settings.credentials"
        " settings.connection_string",
    ),
    _row(b"/_fleet/secret", rb".*", "value"),
    _row(b"/_connector/_secret", rb".*", "value"),
    _row(b"/_connector/", rb".+/_configuration", "configuration.*.value values.*"),
    _row(b"/_cluster/settings", rb"", "*password* *secret* *token*"),
    _row(b"/_license", rb"", "signature"),
    _row(b"/_plugins/_security/api/", rb"(?:internalusers|user).*", "password hash value"),  # value: JSON Patch
    _row(b"/_plugins/_security/api/account", rb"", "current_password password"),
    _row(
        b"/_plugins/_security/api/securityconfig",
        rb".*",
        "signing_key encryption_key exchange_key client_secret *password *private_key pemkey_content value.",
    ),
    _row(b"/_plugins/_ml/", rb"(?:connectors|models).*", "credential authorization"),
    _row(b"/_plugins/_query/_datasources", rb".*", "auth.password auth.access_key auth.secret_key"),
)

_BEGINNINGS = tuple(row.begin for row in _TABLE)

# Indices whose documents are secret, by the beginning of their names: aliases and numbered ones (.security-7) alike.
_SECRET_INDICES = (
    b".security",
    b".fleet-enrollment-api-keys",
    b".kibana",
    b".watches",
    b".fleet-secrets",  # where /_fleet/secret and the two like it keep theirs
    b".connector-secrets",
    b".secrets-inference",
    b".opendistro_security",  # where securityadmin.sh writes OpenSearch's users and keys
)
_SECRET_NAMES = b"|".join(map(re.escape, _SECRET_INDICES))
_DATE_MATH = (b"<.", b"<{")  # <.sec{now/d{'urity'}}-7> can spell anything: each that may begin with a dot counts.
_SECRET_INDEX = re.compile(
    rb"(?:/_arrow)?/(?:(?:[^/]*,)?(?:" + _SECRET_NAMES + rb")[^/]*|<[.{][^>]*>)(?P<rest>/.*|\Z)", re.DOTALL
)
_SECRET_WRITE = re.compile(rb"/(?:_doc|_create|_update|[^_/][^/]*)(?:/.*)?", re.DOTALL)  # [^_]: types, until 7
_OLD_PREFIXES = ((b"/_xpack/", b"/_"), (b"/_shield/", b"/_security/"), (b"/_opendistro/", b"/_plugins/"))
_ORIGIN = re.compile(rb"\A[A-Za-z][A-Za-z0-9+.-]*://[^/]*")
_SLASHES = re.compile(rb"/{2,}")
_BULK_ENDS = (b"/_bulk", b"/_bulk/stream")

# The one search every request pays: how the paths above begin, where _bulk may stand, how an index of ours may begin
# (/.security, /a,.security, /<.security-{now/d}>), and whatever makes a path read otherwise than it looks (%, // and
# dot segments). Without the leading slash, which a refused request may lack.
_MAY_BE_LISTED = re.compile(
    rb"%|//|[/,]\.|/<|\.(?:"
    + b"|".join(re.escape(name[1:]) for name in _SECRET_INDICES)
    + rb")|_(?:bulk|"
    + b"|".join(re.escape(begin[2:]) for begin in (*dict(_OLD_PREFIXES), *_BEGINNINGS))
    + rb")"
)
_MAY_READ_OTHERWISE = re.compile(rb"%|//|/\.|\A[^/]")


def _readings(path: bytes) -> set[bytes]:
    """Every path that Elasticsearch, or a proxy between it and us, may take `path` for.

    A set, because what one of them resolves another takes literally: POST /_security/user/%2e%2e/_password is the
    password of a user called `..` to Elasticsearch and /_security/_password to others.
    """
    if not _MAY_READ_OTHERWISE.search(path):
        return {_renamed(path.rstrip(b"/"))}
    decoded = [_ORIGIN.sub(b"", path)]
    while len(decoded) <= _DECODINGS and b"%" in decoded[-1]:
        decoded.append(unquote_to_bytes(decoded[-1]))
    literal = {_SLASHES.sub(b"/", b"/" + form).rstrip(b"/") for form in decoded}
    resolved = {posixpath.normpath(form) for form in literal}
    return {_renamed(form) for form in literal | resolved}


def _renamed(path: bytes) -> bytes:
    """The path as it is called since 7.0."""
    for old, new in _OLD_PREFIXES:
        if path.startswith(old):
            return new + path[len(old) :]
    return path


def redact_body(
    path: bytes,
    content_type: bytes,
    content_encoding: bytes,
    body: WireBody,
    max_parse_bytes: int = MAX_PARSE_BYTES,
) -> Redaction | None:
    """What to record instead of `body`; None when it holds no secret that is known of and is recorded as it came.

    A compressed body comes back inflated: that it no longer begins like gzip is how a reader sees it.
    """
    if not len(body) or _MAY_BE_LISTED.search(path) is None:
        return None
    readings = _readings(path)
    coding = content_encoding.strip(b" \t").lower()
    try:
        known = [reading for reading in readings if reading.startswith(_BEGINNINGS)]
        rows = [row for row in _TABLE if any(map(row.path.fullmatch, known))] if known else []
        if rows:  # before _bulk: /_security/user/_bulk is a user
            return _redact_json(b"".join(_inflated(body, coding, max_parse_bytes)), rows)
        if any(_is_secret_document(reading) for reading in readings):
            return _WHOLE
        if any(reading.endswith(_BULK_ENDS) for reading in readings):
            unnamed = any(map(_SECRET_INDEX.match, readings))
            return _redact_bulk(_Bulk(body, coding, unnamed, max_parse_bytes), content_type)
    except _UnreadableError:
        return _WHOLE
    return None


def _is_secret_document(path: bytes) -> bool:
    index = _SECRET_INDEX.match(path)
    return index is not None and _SECRET_WRITE.fullmatch(index["rest"]) is not None


# -- Compressed bodies


def _inflated(body: WireBody, coding: bytes, max_bytes: int) -> Iterator[bytes]:
    """The body without its content coding (RFC 9110 8.4), in pieces. Raises _UnreadableError, also past `max_bytes`."""
    if _is_plain(body, coding):
        if len(body) > max_bytes:
            raise _UnreadableError
        yield body[:]
        return
    wbits = -15 if _is_raw_deflate(coding, body[:2]) else 47  # 47: gzip or zlib, whichever it begins like
    size = 0
    try:
        for piece in _decompressed(body, wbits):
            size += len(piece)
            if size > max_bytes:
                raise _UnreadableError
            yield piece
    except zlib.error:
        raise _UnreadableError from None


def _is_plain(body: WireBody, coding: bytes) -> bool:
    """No coding, or one that Elasticsearch doesn't know and so ignores. Raises _UnreadableError for others."""
    if coding in (b"gzip", b"x-gzip", b"deflate", b"x-deflate"):
        return False
    if coding in (b"", b"identity") or (coding not in (b"br", b"snappy", b"zstd") and body[0] in b"{[ \t\r\n"):
        return True
    raise _UnreadableError


def _is_raw_deflate(coding: bytes, start: bytes) -> bool:
    """Whether `deflate` means what some take it for (RFC 9110 8.4.1.2): no zlib header (RFC 1950 2.2) in front."""
    return coding.endswith(b"deflate") and (int.from_bytes(start, "big") % 31 != 0 or start[0] & 15 != 8)


def _decompressed(body: WireBody, wbits: int) -> Iterator[bytes]:
    """Pieces of _STEP_BYTES at most, however much is packed into how little. Raises zlib.error, _UnreadableError."""
    inflater = zlib.decompressobj(wbits)
    for start in range(0, len(body), _COMPRESSED_STEP_BYTES):
        rest = body[start : start + _COMPRESSED_STEP_BYTES]
        while rest:
            if inflater.eof:  # gzip may have several members (RFC 1952 2.2)
                inflater = zlib.decompressobj(wbits)
            yield inflater.decompress(rest, _STEP_BYTES)
            rest = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    while not inflater.eof:  # All input is taken, but the last piece may have been full.
        piece = inflater.decompress(b"", _STEP_BYTES)
        if not piece:
            raise _UnreadableError
        yield piece


# -- JSON: replaced in place, every other byte stays


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse)
_MARK = re.compile(r"[ \t\n\r]*([,:\]}]?)[ \t\n\r]*")
_URL = re.compile(r"[ \t]*[A-Za-z][A-Za-z0-9+.-]{0,30}://")
_WORD = re.compile(r"[^\s\"'<>]+")


def _redact_json(body: bytes, rows: list[_Row]) -> Redaction | None:
    """The fields of `rows` replaced in a JSON text. Raises _UnreadableError for what isn't strict JSON (RFC 8259)."""
    try:
        text = body.decode()
        edits = _Walk(text, rows).edits
    except (ValueError, RecursionError):
        raise _UnreadableError from None
    if not edits:
        return None
    pieces: list[str] = []
    at = 0
    for start, end, replacement in edits:
        pieces += (text[at:start], replacement)
        at = end
    return Redaction(("".join((*pieces, text[at:])).encode(),), len(edits))


class _Walk:
    """One pass over a JSON text that knows where it is: json's own scanner reads strings and scalars, this the rest.

    Repeated keys are all seen, whichever of them a server goes by. Raises ValueError, RecursionError.
    """

    __slots__ = ("_text", "_rows", "edits")

    def __init__(self, text: str, rows: list[_Row]) -> None:
        self._text = text
        self._rows = rows
        self.edits: list[tuple[int, int, str]] = []  # start, end, replacement
        mark, at = self._mark(0)
        if not text.startswith(("{", "["), at):
            raise ValueError("a lone string may be a body that was encoded twice")
        end_mark, end = self._mark(self._value(at, ""))
        if mark or end_mark or end != len(text):
            raise ValueError("more than one value")

    def _mark(self, at: int) -> tuple[str, int]:
        """The punctuation at `at`, if any, and where what follows begins; white space around it is skipped."""
        match = _MARK.match(self._text, at)
        assert match is not None  # It matches the empty string as well.
        return match[1], match.end()

    def _value(self, at: int, path: str) -> int:
        """Read the value at `at`; where it ends."""
        if self._text.startswith(("{", "["), at):
            return self._container(at, path)
        value, end = _DECODER.raw_decode(self._text, at)
        if self._is_secret(path + "."):
            self._replace(at, end, value)
        elif isinstance(value, str) and "@" in value and (clean := _without_userinfo(value)) != value:
            self.edits.append((at, end, json.dumps(clean)))
        return end

    def _container(self, at: int, path: str) -> int:
        """Read the object or array at `at`; where it ends."""
        read, closing = (self._member, "}") if self._text[at] == "{" else (self._value, "]")
        mark, at = self._mark(at + 1)
        wanted = ""
        while mark == wanted:
            mark, at = self._mark(read(at, path))
            wanted = ","
        if mark != closing:
            raise ValueError(f"no {closing}")
        return at

    def _member(self, at: int, path: str) -> int:
        """Read a key and its value, or replace the value; where it ends."""
        key, at = _DECODER.raw_decode(self._text, at)
        mark, at = self._mark(at)
        if not isinstance(key, str) or mark != ":":
            raise ValueError("not a member of an object")
        path = f"{path}.{_fold(key)}"
        if len(path) > _PATH_CHARS:
            raise ValueError("a path nobody uses")
        if not self._is_secret(path):
            return self._value(at, path)
        value, end = _DECODER.raw_decode(self._text, at)
        self._replace(at, end, value)
        return end

    def _replace(self, start: int, end: int, value: object) -> None:
        if value is not None and not isinstance(value, bool):  # null resets, a switch is no secret: both stay
            self.edits.append((start, end, _QUOTED.decode()))

    def _is_secret(self, path: str) -> bool:
        for row in self._rows:
            if path.endswith(row.suffixes):
                return True
            for parts in row.globs:
                if _matches(path, parts):
                    return True
        return False


def _matches(path: str, parts: tuple[str, ...]) -> bool:
    """Whether `parts` stand in `path` one after the other, the last at its end; linear, as no regex with stars is."""
    if not path.endswith(parts[-1]):
        return False
    at = 0
    for part in parts[:-1]:
        at = path.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return len(path) - len(parts[-1]) >= at


def _without_userinfo(value: str) -> str:
    """A string without the userinfo (RFC 3986 3.2.1) of URLs in it, and more rather than less where it is malformed."""
    if _URL.match(value):
        return _cut_userinfo(value)
    return _WORD.sub(lambda word: _cut_userinfo(word[0]), value)


def _cut_userinfo(url: str) -> str:
    start, end = url.find("//") + 2, url.rfind("@")
    return url[:start] + PLACEHOLDER.decode() + url[end:] if 2 <= start <= end else url


# -- _bulk: the documents of secret indices, whatever else is in it
#
# Elasticsearch splits at \n, whatever the encoding, and reads an action line as JSON: the index it names stands in it
# literally or as \u escapes, between NULs in UTF-16. So one search for the names finds every line that matters, at the
# speed of memory; only where one is found is it asked which line that is. Which lines are actions is not counted, as
# one odd line would shift all that follow: whatever could be an action is taken for one.


def _spelled(literal: bytes) -> bytes:
    """A regex for an ASCII literal however a JSON text may spell it."""
    spelled = b""
    for byte in literal:
        high, low, upper = *(b"%02x" % byte), (b"%02X" % byte)[1]
        spelled += rb"\0*(?:%b|\\\0*u\0*0\0*0\0*%c\0*[%c%c])" % (re.escape(b"%c" % byte), high, low, upper)
    return spelled


# The lookaheads make it fast (1.2 GB/s, 0.1 without): of all quotes only those they let through are looked at closer.
_SECRET_INDEX_NAME = re.compile(
    rb'"(?=[.<\\\0])(?:%b(?=[%b\\\0])(?:%b)|%b)'
    % (
        _spelled(b"."),
        bytes({name[1] for name in _SECRET_INDICES}),
        b"|".join(_spelled(name[1:]) for name in _SECRET_INDICES),
        b"|".join(map(_spelled, _DATE_MATH)),
    )
)
# A line whose first key is plainly no action with a document: one, nearly always. `delete` has none.
_NO_ACTION = re.compile(
    rb"[ \t\r]*(?:\n|\Z|\{[ \t\r]*(?:\}|\"(?:[^icu\"\\\0\n]|(?!(?:index|create|update)\")[^\"\\\0\n]*\")))"
)
_ACTIONS = ("index", "create", "update")
_ACTION_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_int=str)  # pairs: a key may be repeated
_SECRET_BEGINNINGS = tuple(name.decode() for name in (*_SECRET_INDICES, *_DATE_MATH))
_BINARY = re.compile(rb"smile|cbor|yaml|arrow", re.IGNORECASE)  # what can't be split into lines
_SMILE_HEADER = b":)\n"


def _line_end(block: WireBody, at: int) -> int:
    """Where the line ends that `at` lies in: at its \n, or the end of the block."""
    end = block.find(b"\n", at)
    return len(block) if end < 0 else end


@dataclasses.dataclass(frozen=True, slots=True)
class _Bulk:
    """A _bulk body; iterating gives what to record of it. The first time it may raise _UnreadableError."""

    body: WireBody
    coding: bytes
    unnamed: bool  # Actions that name no index go to a secret one, which stands in the path.
    max_line_bytes: int  # in a compressed body, where a line has to be in memory

    def __iter__(self) -> Iterator[bytes]:
        for block, start, end, secret in self._spans():
            if secret:
                yield _QUOTED
            else:
                for at in range(start, end, _STEP_BYTES):
                    yield block[at : min(at + _STEP_BYTES, end)]

    def count(self) -> int:
        """How many documents are replaced. Raises _UnreadableError."""
        count = 0
        for _, _, _, secret in self._spans():
            count += secret
            if count > _SECRET_DOCUMENTS:
                raise _UnreadableError
        return count

    def mentions_secret_index(self) -> bool:
        """Whether a secret index is named anywhere, for formats that are not understood here."""
        return self.unnamed or any(re.search(_SECRET_NAMES, block) for block in self.blocks())

    def blocks(self) -> Iterator[WireBody]:
        """The body in whole lines: at once when it is plain, else inflated piece by piece."""
        if _is_plain(self.body, self.coding):
            yield self.body
            return
        rest = b""
        for piece in _inflated(self.body, self.coding, MAX_INFLATED_BYTES):
            lines, newline, last = piece.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = last
            else:
                rest += piece
            if len(rest) > self.max_line_bytes:
                raise _UnreadableError
        if rest:
            yield rest

    def _spans(self) -> Iterator[tuple[WireBody, int, int, bool]]:
        """All of every block in consecutive spans: block, start, end, and whether it is a document to replace."""
        carried = False  # The last line was an action, its document begins the next block.
        for block in self.blocks():
            at = 0
            if carried:
                at = _line_end(block, 0)
                yield block, 0, at, True
            carried = False
            for action_end in self._secret_actions(block):
                start, end = action_end + 1, _line_end(block, action_end + 1)
                yield block, at, min(start, len(block)), False
                if start < end:
                    yield block, start, end, True
                carried = start == len(block)
                at = end
            yield block, at, len(block), False

    def _secret_actions(self, block: WireBody) -> Iterator[int]:
        """Where the lines end whose document, the next line, is for a secret index."""
        for start, end in self._candidates(block):
            if not _NO_ACTION.match(block, start) and (
                end - start > _ACTION_BYTES or _goes_to_secret_index(block[start:end], self.unnamed)
            ):
                yield end

    def _candidates(self, block: WireBody) -> Iterator[tuple[int, int]]:
        """The lines that name a secret index, or all of them when naming none is enough: start and end."""
        start = 0
        while start < len(block):
            end = start
            if not self.unnamed:
                name = _find_secret_index_name(block, start)
                if name is None:
                    return
                start = max(start, block.rfind(b"\n", start, name.start()) + 1)
                end = name.end()
            end = _line_end(block, end)
            yield start, end
            start = end + 1


def _find_secret_index_name(block: WireBody, at: int) -> re.Match[bytes] | None:
    """The next one, searched for in steps: a search holds the interpreter's lock, and other threads have requests."""
    while at < len(block):
        if name := _SECRET_INDEX_NAME.search(block, at, at + _SEARCH_BYTES + _NAME_BYTES):
            return name
        at += _SEARCH_BYTES
    return None


def _goes_to_secret_index(line: bytes, unnamed: bool) -> bool:
    """Whether a line is an action for a secret index, or can't be read and may be one."""
    try:
        content = _ACTION_DECODER.decode(line.decode())
        action, details = content[0]
    except (ValueError, TypeError, LookupError, RecursionError):
        return True
    if action not in _ACTIONS or not isinstance(details, tuple):
        return False
    indices = [value for name, value in details if name == "_index"]
    return any(str(index).startswith(_SECRET_BEGINNINGS) for index in indices) or (unnamed and not indices)


def _redact_bulk(bulk: _Bulk, content_type: bytes) -> Redaction | None:
    """What to record of a _bulk body; a binary one that mentions a secret index is replaced whole."""
    start = next(bulk.blocks(), b"")[: len(_SMILE_HEADER)]
    if _BINARY.search(content_type) or start == _SMILE_HEADER:
        return _WHOLE if bulk.mentions_secret_index() else None
    count = bulk.count()
    return Redaction(bulk, count) if count else None


# -- Targets

_QUERY_SECRET = (  # no parameter of Elasticsearch's own, but of proxies and plugins in front of it
    rb"(?:(?:access|refresh|id|auth|x-amz-security)[-_]?)?token|jwt|password|passwd|(?:client[-_]?)?secret"
    rb"|api[-_]?key|x-amz-signature|authorization"
)
_QUERY_SECRET_NAME = re.compile(_QUERY_SECRET, re.IGNORECASE)
# OpenSearch takes a JWT from any parameter an operator names (jwt_url_parameter); such a token shows itself.
_JWT = re.compile(rb"(?:\A|(?<=[ +]))eyJ[\w-]+\.[\w-]+\.[\w-]*")
_MAY_BE_QUERY_SECRET = re.compile(rb"source|eyJ|%|" + _QUERY_SECRET, re.IGNORECASE)


def redact_query(path: bytes, query: bytes) -> tuple[bytes, int]:
    """The query to record, and how many values were replaced in it.

    `source` holds a whole body for endpoints that take one. Where it can't be read, all behind it goes as well: an
    & or ; that was not encoded ends it for Elasticsearch, but not what its author meant.
    """
    if not query or _MAY_BE_QUERY_SECRET.search(query) is None:
        return query, 0
    parts = re.split(rb"([&;])", query)  # Elasticsearch's separators
    count = 0
    for at in range(0, len(parts), 2):
        name, _, value = parts[at].partition(b"=")
        plain_name, plain_value = (unquote_to_bytes(text.replace(b"+", b" ")) for text in (name, value))
        if value and (_QUERY_SECRET_NAME.fullmatch(plain_name) or _JWT.search(plain_value)):
            parts[at] = name + b"=" + PLACEHOLDER
            count += 1
        elif plain_name == b"source" and (redaction := redact_body(path, b"", b"", plain_value)):
            count += redaction.count
            if redaction is _WHOLE:
                return b"".join(parts[:at]) + name + b"=" + PLACEHOLDER, count
            parts[at] = name + b"=" + quote_from_bytes(b"".join(redaction.pieces), safe=b":,").encode()
    return b"".join(parts), count


def redact_userinfo(line: bytes) -> tuple[bytes, int]:
    """A request target, or a line that holds one, without userinfo (RFC 3986 3.2.1), and 1 if there was any."""
    start, end = _userinfo(line)
    return (line[:start] + PLACEHOLDER + line[end:], 1) if start < end else (line, 0)


def _userinfo(line: bytes) -> tuple[int, int]:
    """Where userinfo is in a line; an empty span when it has none.

    Host and password may be malformed, full of slashes and spaces: it is all between // and the last @ of the line.
    """
    end = max(line.rfind(b"@"), 0)
    start = line.find(b"//", 0, end) + 2
    if start >= 2:
        return start, end
    start = max(line.rfind(b" ", 0, end), line.rfind(b"\t", 0, end)) + 1  # `user:password@host`, as CONNECT has it
    if line[start : start + 1] != b"/" and b":" in line[start:end]:  # a path may hold colons and @
        return start, end
    return end, end


# -- What was received of a request that is refused: broken in ways nobody foresaw, so judged line by line

_CREDENTIAL_NAME = re.compile(
    rb"auth|cookie|key|token|secret|passw|pwd|credential|session|signature|assertion|jwt", re.IGNORECASE
)
_CREDENTIAL_START = re.compile(rb"[^0-9A-Za-z]*(?:[0-9A-Za-z]+[-_]){0,3}(?:authori[sz]ation|cookie)", re.IGNORECASE)
_SECRET_IN_TARGET = re.compile(rb"[?&;](?:source|" + _QUERY_SECRET + rb")=", re.IGNORECASE)
_CREDENTIALS = re.compile(
    rb"\b(?:(?:basic|bearer|apikey|negotiate|ntlm)\s{1,8}(?!HTTP/)[^\s,;\"']{4,}|(?:digest|aws4-hmac-sha256)\s[^\r\n]+)",
    re.IGNORECASE,
)
_LINE_BREAK = re.compile(rb"(\r*\n|\r+)")
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))[ \t]*[\r\n]")
_CONTROLS = bytes((*range(0x21), 0x7F))


def redact_received(data: bytes) -> tuple[bytes, int]:
    """The beginning of a refused message without what may be a credential, and how many places were replaced.

    Rather too much than too little: all of a line behind a name, with the lines that go on with it, the text behind
    an authentication scheme wherever it stands, userinfo, and the body when its path may be a listed one.
    """
    count = 0
    listed = _MAY_BE_LISTED.search(data)
    blank = listed and _BLANK_LINE.search(data, listed.end())
    if blank and blank.end() < len(data):
        data = data[: blank.end()] + PLACEHOLDER
        count += 1
    parts = _LINE_BREAK.split(data)
    goes_on = False  # The line before was cut, and this one, folded or broken off, may belong to it.
    for at in range(0, len(parts), 2):
        line = parts[at]
        if goes_on and line and (line[:1] in b" \t" or b":" not in line):
            parts[at] = PLACEHOLDER
        elif len(line) > 3:  # less can't name anything
            parts[at], goes_on = _redact_line(line)
            count += parts[at] is not line
    target, version, rest = b"".join(parts).partition(b" HTTP/")
    target, users = redact_userinfo(target)  # again, as a line break may stand in a target
    rest, schemes = _CREDENTIALS.subn(PLACEHOLDER, target + version + rest)
    return rest, count + users + schemes


def _redact_line(line: bytes) -> tuple[bytes, bool]:
    """A line without credentials, and whether its end was cut off."""
    cut = _credential(line)
    start, end = _userinfo(line)
    if cut is not None:
        return line[: min(start, cut) if start < end else cut] + PLACEHOLDER, True
    if start < end:
        return line[:start] + PLACEHOLDER + line[end:], False
    return line, False


def _credential(line: bytes) -> int | None:
    """Where in a line begins what is or may be a credential and goes on to its end."""
    cuts = []
    if in_target := _SECRET_IN_TARGET.search(line):
        cuts.append(in_target.end())
    if name := _CREDENTIAL_NAME.search(line):
        cuts.append(line.find(b":", name.end()) + 1)
    elif _CREDENTIAL_NAME.search(line.translate(None, _CONTROLS)):
        cuts.append(line.find(b":") + 1)
    if start := _CREDENTIAL_START.match(line):  # without a colon
        cuts.append(start.end())
    return min((cut for cut in cuts if cut > 0), default=None)


# -- Exchange: what both records tell ----------------------------------------------------------------------------


class Exchange:
    """One request and its response, as far as the log wants to know. Values are bytes and already escaped."""

    __slots__ = (
        "id", "user", "path", "query", "method", "source", "agent", "run_as", "forwarded", "opaque_id", "coding",
        "details",
        "body_bytes", "body_sha256", "redacted", "rejected", "status", "error", "size", "attempts", "sent", "began",
        "started", "recorded", "_common",
    )  # fmt: skip

    def __init__(self, source: bytes, user: bytes = b"-", agent: bytes = b"-") -> None:
        self.id = new_id()
        self.user = user
        self.path = b"-"
        self.query = b"-"
        self.method = b"-"
        self.source = source
        self.agent = agent
        self.run_as = b""
        self.forwarded = b""
        self.opaque_id = b""
        self.coding = b""  # content coding of the body that is recorded
        self.details: dict[str, object] = {}  # what only ECS records tell, under its field names
        self.body_bytes = 0  # of the request's body as it came
        self.body_sha256 = ""  # of all of it, when less is recorded
        self.redacted = 0  # values replaced in the recorded body and query
        self.rejected: str | None = None  # code, when the request is not forwarded
        self.status = 0
        self.error: str | None = None  # code, when the response is not the upstream's whole one
        self.size = 0  # bytes of the response's body
        self.attempts = 1  # connections to the upstream that were tried
        self.sent: int | None = None  # bytes of the body delivered, when the client left early
        self.began = 0.0  # seconds since the epoch, when the request was recorded
        self.started: float | None = None  # monotonic, when forwarding began
        self.recorded = False  # the request's record is in the log, so a response's is owed
        self._common = b""

    def asks(self, method: bytes, target: bytes, redact: bool = True) -> None:
        """Note what is asked for, with `redact` without the secrets in it."""
        path, mark, query = target.partition(b"?")
        if redact:
            if query:
                query, self.redacted = redact_query(path, query)
            if b"@" in path and not path.startswith(b"/"):  # Only a URL has userinfo; in a path it means nothing.
                path, count = redact_userinfo(path)
                self.redacted += count
        self.method = escape(method)
        self.path = escape(path)
        self.query = escape(query) if mark else b"None"

    def common(self) -> bytes:
        """The part of a text record that both lines share, made once."""
        if not self._common:
            self._common = b" ID: %b User: %b Path: %b Query: %b Method: %b Source: %b Agent: %b " % (
                self.id.encode(), self.user, self.path, self.query, self.method, self.source, self.agent,
            )  # fmt: skip
        return self._common


# -- Records as text and as ECS: each function makes one line, in steps where a body may be large -----------------


def text_request(now: float, exchange: Exchange, content: Body | None) -> Iterator[bytes]:
    """The request's line; `now` in seconds since the epoch."""
    yield b"%b%bBody: " % (timestamp(now), exchange.common())
    if content is not None:
        yield from base64_steps(content.pieces())
    yield text_request_marks(exchange) + b"\n"


def text_request_marks(exchange: Exchange) -> bytes:
    """What is out of the ordinary about a request."""
    marks = b""
    if exchange.run_as:
        marks += b" Run-As: " + exchange.run_as
    if exchange.forwarded:
        marks += b" Forwarded: " + exchange.forwarded
    if exchange.opaque_id:
        marks += b" Opaque-Id: " + exchange.opaque_id
    if exchange.body_sha256:
        marks += b" Body-Bytes: %d Body-SHA256: %b" % (exchange.body_bytes, exchange.body_sha256.encode())
    if exchange.redacted:
        marks += b" Redacted: %d" % exchange.redacted
    if exchange.rejected is not None:
        marks += b" Rejected: " + exchange.rejected.encode()
    return marks


def text_response(now: float, exchange: Exchange, duration_seconds: float) -> bytes:
    """The response's line."""
    marks = b""
    if exchange.error is not None:
        marks += b" Error: " + exchange.error.encode()
    if exchange.attempts > 1:
        marks += b" Attempts: %d" % exchange.attempts
    if exchange.sent is not None:
        marks += b" Sent: %d" % exchange.sent
    return b"%b%bStatus: %d Duration: %.3fs Size: %d%b\n" % (
        timestamp(now), exchange.common(), exchange.status, duration_seconds, exchange.size, marks,
    )  # fmt: skip


def text_event(now: float, name: str, details: dict[str, object]) -> bytes:
    """A line about the log itself; `{"Lost": 3}` becomes ` Lost: 3`."""
    marks = b"".join(b" %b: %b" % (key.encode(), escape(str(value).encode())) for key, value in details.items())
    return b"%b Event: %b%b\n" % (timestamp(now), name.encode(), marks)


def base64_steps(pieces: Iterator[Buffer]) -> Iterator[bytes]:
    """Base64 of a body that comes in pieces: all but the last must be cut at a multiple of 3."""
    rest = b""
    for piece in pieces:
        whole = rest + piece if rest else piece
        count = len(whole) - len(whole) % 3
        yield binascii.b2a_base64(memoryview(whole)[:count], newline=False)
        rest = bytes(whole[count:])
    if rest:
        yield binascii.b2a_base64(rest, newline=False)


def ecs_request(now: float, exchange: Exchange, content: Body | None) -> Iterator[bytes]:
    """The request's event in Elastic Common Schema, one JSON object a line."""
    document = _ecs_document(now, exchange, "http-request", "start")
    document["event.start"] = document["@timestamp"]
    document["http.request.body.bytes"] = exchange.body_bytes
    document.update(exchange.details)
    if exchange.rejected is not None:
        document["event.reason"] = document["es_proxy.rejected"] = exchange.rejected
    if exchange.body_sha256:
        document["es_proxy.request.body.sha256"] = exchange.body_sha256
    if exchange.redacted:
        document["es_proxy.redacted"] = exchange.redacted
    text = json.dumps(document, separators=(",", ":"))[:-1].encode()
    if content is None or not content.size:
        yield text + b"}\n"
        return
    encoding = exchange.coding.lower().decode("latin-1")
    if _is_text(content.pieces(), encoding):
        yield text + b',"http.request.body.content":"'
        for part in _decoded(content.pieces(), encoding):
            yield json.dumps(part)[1:-1].encode()
    else:
        yield text + b',"es_proxy.request.body.base64":"'
        yield from base64_steps(content.pieces())
    yield b'"}\n'


def ecs_response(now: float, exchange: Exchange, duration_seconds: float) -> bytes:
    """The response's event in ECS."""
    document = _ecs_document(now, exchange, "http-response", "end")
    document["event.start"] = timestamp(exchange.began).decode()
    document["event.end"] = document["@timestamp"]
    document["event.duration"] = int(duration_seconds * 1e9)
    document["event.outcome"] = "success" if exchange.status < 400 and exchange.error is None else "failure"
    document["http.response.status_code"] = exchange.status
    document["http.response.body.bytes"] = exchange.size
    document.update(exchange.details)
    if exchange.error is not None:
        document["event.reason"] = exchange.error
    if exchange.attempts > 1:
        document["es_proxy.attempts"] = exchange.attempts
    if exchange.sent is not None:
        document["es_proxy.sent"] = exchange.sent
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def ecs_event(now: float, name: str, details: dict[str, object]) -> bytes:
    """An event of the log itself in ECS."""
    document: dict[str, object] = {
        "@timestamp": timestamp(now).decode(),
        "ecs.version": ECS_VERSION,
        "event.kind": "event",
        "event.category": ["process"],
        "event.type": [{"start": "start", "stop": "end"}.get(name, "info")],
        "event.action": name,
        "event.dataset": "es_proxy.audit",
        "event.id": new_id(),
        "observer.hostname": socketless_hostname(),
        "observer.type": "proxy",
        "observer.version": __version__,
    }
    document.update((f"es_proxy.{key.lower().replace('-', '_')}", value) for key, value in details.items())
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def socketless_hostname() -> str:
    """This machine's name, as uname has it."""
    return os.uname().nodename


def _ecs_document(now: float, exchange: Exchange, action: str, kind: str) -> dict[str, object]:
    document: dict[str, object] = {
        "@timestamp": timestamp(now).decode(),
        "ecs.version": ECS_VERSION,
        "event.kind": "event",
        "event.category": ["web", "database", "api"],
        "event.type": ["access", kind],
        "event.action": action,
        "event.dataset": "es_proxy.audit",
        "event.id": new_id(),
        "http.request.id": exchange.id,
        "observer.hostname": socketless_hostname(),
        "observer.type": "proxy",
        "observer.version": __version__,
    }
    for key, value in (
        ("http.request.method", exchange.method),
        ("url.path", exchange.path),
        ("url.query", exchange.query),
        ("user.name", exchange.user),
        ("user.effective.name", exchange.run_as),
        ("source.ip", exchange.source),
        ("user_agent.original", exchange.agent),
        (_forwarded_key(exchange.forwarded), exchange.forwarded),
        ("http.request.headers.x_opaque_id", exchange.opaque_id),
    ):
        if value not in STAND_INS and (value or key == "url.query"):
            document[key] = readable(unescape(value))
    return document


def _forwarded_key(value: bytes) -> str:
    """network.forwarded_ip takes one address; what is more, or none, goes into a field of our own."""
    try:
        ipaddress.ip_address(value.decode())
    except ValueError:
        return "es_proxy.forwarded"
    return "network.forwarded_ip"


def readable(value: bytes) -> str:
    """A value for JSON: UTF-8 where it is that, `\\xHH` for other bytes and a backslash, so that it can be undone."""
    return value.replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")


def _decoded(pieces: Iterator[Buffer], encoding: str) -> Iterator[str]:
    """A body as text, gunzipped. Raises ValueError when it is none, or when it unfolds to more than any real one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    unzip = zlib.decompressobj(31) if encoding == "gzip" else None
    total = 0
    for piece in pieces:
        data: Buffer = piece
        while data:
            plain: Buffer = data
            if unzip is not None:
                plain = unzip.decompress(data, RELAY_BYTES)
            data = unzip.unconsumed_tail if unzip is not None else b""
            total += len(plain)
            if total > UNZIPPED_BYTES:
                raise ValueError("it unfolds without end")
            yield decoder.decode(plain)
    if unzip is not None and not (unzip.eof and not unzip.unused_data):
        raise ValueError("it is not one gzip member")
    yield decoder.decode(b"", final=True)


def _is_text(pieces: Iterator[Buffer], encoding: str) -> bool:
    if encoding not in ("", "gzip", "identity"):
        return False
    try:
        for _ in _decoded(pieces, encoding):
            pass
    except (ValueError, zlib.error):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to write records; all functions take seconds since the epoch first."""

    request: Callable[[float, Exchange, Body | None], Iterator[bytes]]
    response: Callable[[float, Exchange, float], bytes]
    event: Callable[[float, str, dict[str, object]], bytes]


FORMS = {
    "text": Form(text_request, text_response, text_event),
    "ecs": Form(ecs_request, ecs_response, ecs_event),
}


# -- The log -----------------------------------------------------------------------------------------------------


class Gate:
    """Lets one process at a time append to the log, and tells the next one when the last died in the middle of a line.

    Made before the processes are forked, which inherit it. Within a process AuditLog's lock comes first.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="es-proxy-")
        self._flag = mmap.mmap(-1, 1)  # shared by all: 1 while a line is being written, or when one is torn
        self.torn = False  # what is left when the turn ends

    def __enter__(self) -> bool:
        """Wait for the turn; True when the last line may be torn."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        torn = self._flag[0] != 0
        self._flag[0] = 1
        return torn

    def __exit__(self, *_: object) -> None:
        self._flag[0] = self.torn
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release it."""
        self._file.close()
        self._flag.close()


class LogFile:
    """The file, pipe or terminal that lines are appended to, each whole or not at all. For one thread at a time.

    `gate` is there when other processes append to the same file; of those only the first is to `claim` it. `recovered`
    makes the line that tells of a torn one.
    Raises StartError when it can't be opened as a safe place, OSError when a line can't be appended.
    """

    def __init__(
        self,
        path: str,
        recovered: Callable[[], bytes],
        gate: Gate | None = None,
        claim: bool = True,
        instead_of: LogFile | None = None,
    ) -> None:
        self.path = path
        self.regular = False  # a file, not a pipe or a terminal
        self._gate = gate
        self._claims = claim
        self._recovered = recovered
        self._torn = False  # a piece of a line stands at the end and could not be dealt with
        self._instead_of = instead_of  # the one this replaces: its lock is ours
        self._end = 0  # its size behind our last line, or when we last looked
        self._shortened = False  # it was smaller than that
        self.fd = self._open_stdout() if path in ("-", "/dev/stdout") else self._open()

    @staticmethod
    def _open_stdout() -> int:
        try:
            return os.dup(1)
        except OSError as error:
            raise StartError(f"--audit-log -: standard output is closed ({error.strerror})") from None

    def _open(self) -> int:
        # O_NONBLOCK so that a FIFO nobody reads is an error instead of a start that hangs; it is taken off below.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags, 0o640)
        except OSError as error:
            hints = {errno.ELOOP: "it is a symbolic link, name the file itself", errno.ENXIO: "nobody reads this FIFO"}
            raise self._unfit(hints.get(error.errno or 0, str(error.strerror))) from None
        try:
            os.set_blocking(fd, True)
            self._inspect(fd)
        except OSError as error:
            os.close(fd)
            raise self._unfit(str(error.strerror)) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _unfit(self, why: str) -> StartError:
        return StartError(f"--audit-log {self.path}: {why}; nothing is served without a log")

    def _inspect(self, fd: int) -> None:
        """Refuse a file that others may change or that another es-proxy writes; end a last line that was torn."""
        status = os.fstat(fd)
        self.regular = stat.S_ISREG(status.st_mode)
        if not self.regular:
            return
        if status.st_mode & stat.S_IWOTH:
            raise self._unfit("everyone may write to it; chmod o-w it, then find out who did")
        folder = os.stat(os.path.dirname(os.path.abspath(self.path)))
        if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
            raise self._unfit("everyone may write to its directory and put another file in its place; chmod o-w that")
        if folder.st_mode & stat.S_IWOTH and status.st_uid != os.geteuid():
            raise self._unfit("it lies in a directory for everyone and belongs to another user")
        self._end = status.st_size
        if self._claims:
            self._claim(fd)
            self._close_torn_tail(fd)

    def _claim(self, fd: int) -> None:
        old = self._instead_of
        if old is not None and os.path.samestat(os.fstat(old.fd), os.fstat(fd)):
            fcntl.flock(old.fd, fcntl.LOCK_UN)  # Otherwise our own older descriptor would keep us out.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise self._unfit("another es-proxy is writing it, give each its own file") from None

    def _close_torn_tail(self, fd: int) -> None:
        """End a last line that a crash or a full disk left unfinished, so that the next record has its own."""
        size = os.fstat(fd).st_size
        if not size:
            return
        with open(self.path, "rb") as file:
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
        os.write(fd, b"\n" + self._recovered())
        say(f"{self.path} ended in the middle of a line (a crash, or a full disk); closed it off")

    def append(self, *lines: WireBody) -> None:
        """Write whole lines at once, or take back what was written of them. Raises OSError."""
        if self._gate is None:
            self._append(lines)
            return
        with self._gate as self._torn:
            try:
                if self._torn and self.regular:
                    self._close_torn_tail(self.fd)
                    self._torn = False
                self._append(lines)
            finally:
                self._gate.torn = self._torn

    def _append(self, lines: tuple[WireBody, ...]) -> None:
        if self._torn:
            lines = (b"\n", *lines)
        if self._gate is not None:
            self._look()  # Others write too: that it grew again behind a cut shows only from one line to the next.
        total = sum(map(len, lines))
        written = os.write(self.fd, lines[0]) if len(lines) == 1 else os.writev(self.fd, lines)
        if written < total:
            self._append_rest(lines, written)
        self._torn = False
        self._end += total

    def _append_rest(self, lines: tuple[WireBody, ...], written: int) -> None:
        try:
            skip = written
            for line in lines:
                with memoryview(line) as view:
                    while skip < len(line):
                        with view[skip:] as rest:
                            count = os.write(self.fd, rest)
                        written += count
                        skip += count
                skip -= len(line)
        except OSError:
            self._take_back(written)
            raise

    def _look(self) -> None:
        """Note that the file has become shorter than we left it."""
        if self.regular:
            size = os.fstat(self.fd).st_size
            self._shortened = self._shortened or size < self._end
            self._end = size

    def _take_back(self, written: int) -> None:
        """Cut a piece of a line off again; where that can't be done (a pipe), the next line closes it off."""
        try:
            if not self.regular:
                raise OSError
            os.ftruncate(self.fd, os.fstat(self.fd).st_size - written)
        except OSError:
            self._torn = True

    def missing(self) -> str | None:
        """What has become of the file behind our back: `removed`, `truncated`, or None."""
        if not self.regular:
            return None
        status = os.fstat(self.fd)
        if not status.st_nlink:
            return "removed"
        self._look()
        shortened, self._shortened = self._shortened, False
        return "truncated" if shortened else None

    def same_file(self) -> bool:
        """Whether the path still names the file that is open."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(status, os.fstat(self.fd))

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


class AuditLog:
    """Writes records and events to a LogFile, and knows what to do when that fails. Called by any thread.

    Raises AuditError when a record can't be written and --audit-on-failure is `block`; with `pass` it only counts. What
    was lost is told by an `Event: gap` line in front of the first line that can be written again.
    """

    def __init__(
        self, config: Config, gate: Gate | None = None, claim: bool = True, inherited: AuditLog | None = None
    ) -> None:
        self._config = config
        self._inherited = inherited
        self._form = FORMS[config.audit_format]
        self._open = functools.partial(LogFile, config.audit_log, self._recovered, gate, claim)
        self._lock = threading.Lock()  # guards all below
        self._file = self._open()
        self._broken = False  # the descriptor is of no use any more, the next line needs another
        self._lost = 0  # records since the last line that was written
        self._since = ""  # timestamp of the first of them
        self._written = 0  # lines, ever
        self._commits = GroupCommit(self)
        if config.audit_sync and not self._file.regular:
            raise StartError(f"--audit-sync always: {config.audit_log} is not a file on a disk")

    def _recovered(self) -> bytes:
        return self._form.event(time.time(), "recovered", {})

    # -- Records -------------------------------------------------------------------------------------------------

    def event(self, name: str, **details: object) -> bool:
        """Write a line about the log itself; False when it is lost. Raises AuditError."""
        if not self._lock.acquire(timeout=5.0):  # Somebody writes into a pipe that nobody reads.
            return False
        try:
            return self._append(self._form.event(time.time(), name, details))
        finally:
            self._lock.release()

    def request(self, exchange: Exchange, request: Request | None, received: bytes = b"") -> None:
        """Write the request's record, with `received` as body if it could not be read. Raises AuditError."""
        exchange.began = time.time()
        content = self._content(exchange, request, received)
        try:
            steps = self._form.request(exchange.began, exchange, content)
            if content is None or not content.spooled:
                self._write(exchange, b"".join(steps))
            else:
                self._write_large(exchange, steps)
        finally:
            if content is not None and (request is None or content is not request.body):
                content.close()

    def _content(self, exchange: Exchange, request: Request | None, received: bytes) -> Body | None:
        """What is recorded of a request's body: all of it, or the first --audit-body bytes."""
        body = request.body if request is not None else None
        if received:
            body = Body(MIB)
            body.append(received)
        if body is None or not body.size:
            return None
        exchange.body_bytes = body.size
        if self._config.redact and request is not None and not received:
            body = _redacted(exchange, request, body)
        limit = self._config.audit_body_bytes
        return body if limit is None or body.size <= limit else _cut(exchange, body, limit)

    def response(self, exchange: Exchange) -> None:
        """Write the response's record, once, if the request's was written. Raises AuditError."""
        if not exchange.recorded:
            return
        exchange.recorded = False
        duration = 0.0 if exchange.started is None else time.monotonic() - exchange.started
        line = self._form.response(time.time(), exchange, duration)
        with self._lock:
            self._append(line)

    def _write_large(self, exchange: Exchange, steps: Iterator[bytes]) -> None:
        """A line of any length without its length in heap: built in a temporary file, written from a map of it."""
        try:
            with tempfile.TemporaryFile(buffering=RELAY_BYTES, prefix="es-proxy-") as file:
                for step in steps:
                    file.write(step)
                file.flush()
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as line:
                    self._write(exchange, line)
        except OSError as error:
            with self._lock:
                self._lose(f"no room to build it in {tempfile.gettempdir()} ({error.strerror})")

    def _write(self, exchange: Exchange, line: WireBody) -> None:
        """Append a request's line, and see it on the disk where --audit-sync asks for that."""
        with self._lock:
            if not self._append(line):
                return
            number = self._written
        exchange.recorded = True
        if self._config.audit_sync:
            try:
                self._commits.commit(number)
            except OSError as error:
                # The line may be there or not; the gap says that it does not count.
                with self._lock:
                    self._lose(str(error.strerror))

    # -- Failure and recovery; the lock is held ------------------------------------------------------------------

    def _append(self, line: WireBody) -> bool:
        """Append a line, in front of it the gap if there is one; False when it is lost and that is accepted."""
        try:
            if self._broken:
                self._replace()
            if self._lost:
                gap = self._form.event(time.time(), "gap", {"Lost": self._lost, "Since": self._since})
                self._file.append(gap, line)
                self._lost = 0
                say(f"the audit log {self._file.path} can be written again")
            else:
                self._file.append(line)
        except OSError as error:
            return self._lose(str(error.strerror))
        except StartError as error:
            return self._lose(str(error))
        self._written += 1
        return True

    def _lose(self, reason: str) -> bool:
        if not self._lost and self._written:  # At the start it is said by the error that ends it.
            blocked = "requests go on unrecorded" if self._config.audit_pass else "requests are refused"
            say(f"the audit log {self._file.path} can't be written: {reason}; {blocked} until it can")
        if not self._lost:
            self._since = timestamp(time.time()).decode()
        self._lost += 1
        if self._config.audit_pass:
            return False
        raise AuditError("audit-unavailable", f"the audit record can't be written: {reason}")

    def _replace(self) -> None:
        """Open the file anew and use that from now on. Raises StartError, and the old one stays."""
        fresh = self._open(instead_of=self._file)
        with contextlib.suppress(OSError):  # Its last lines are on the disk or they are not: the new file can't help.
            if self._config.audit_sync:
                os.fsync(self._file.fd)
        self._file.close()
        self._file = fresh
        self._broken = False
        if self._inherited is not None:
            self._inherited.close()
            self._inherited = None

    # -- Called by the server's thread ---------------------------------------------------------------------------

    def reopen(self) -> bool:
        """After a rotation: go on in the file that has the name now; if it can't be opened, stay in the old one."""
        with self._lock:
            try:
                if not self._file.same_file():
                    self._replace()
            except StartError as error:
                say(f"{error}; still writing to the old file")
                return False
            with contextlib.suppress(AuditError):  # Counted; the next line that can be written tells of it.
                self._append(self._form.event(time.time(), "reopen", {"Pid": os.getpid()}))
        return True

    def check(self) -> None:
        """Notice, about once a second, that somebody removed the file or cut it short, and put that on record."""
        if not self._lock.acquire(blocking=False):  # Somebody writes, perhaps into a pipe that nobody reads.
            return
        try:
            with contextlib.suppress(AuditError):  # Counted.
                self._check()
        finally:
            self._lock.release()

    def _check(self) -> None:
        missing = None if self._broken else self._file.missing()
        if missing == "removed":
            self._broken = True
        if missing is not None:
            say(f"the audit log {self._file.path} was {missing} by somebody")
            self._append(self._form.event(time.time(), missing, {}))

    def snapshot(self) -> tuple[int, int]:
        """How many lines were written, and a descriptor of its own (to be closed) of the file they are in."""
        with self._lock:
            return self._written, os.dup(self._file.fd)

    def written(self) -> int:
        """How many lines were written."""
        with self._lock:
            return self._written

    def distrust(self) -> None:
        """A sync failed: what this descriptor says from now on proves nothing (Linux reports an error once)."""
        with self._lock:
            self._broken = True

    def close(self) -> None:
        """Close the file; a gap that no line has told of yet is told now."""
        if self._lost and self._lock.acquire(timeout=5.0):
            with contextlib.suppress(OSError):
                self._file.append(self._form.event(time.time(), "gap", {"Lost": self._lost, "Since": self._since}))
            self._lock.release()
        self._file.close()


class GroupCommit:
    """fsync for whoever waits: one at a time, and it counts for all lines that were written before it began."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._turn = threading.Condition()  # guards the three below
        self._syncing = False
        self._done = 0  # lines up to this number are on the disk
        self._failed: list[range] = []  # lines that were not when a sync failed: no later one makes that good

    def commit(self, number: int) -> None:
        """Return when line `number` is on the disk. Raises OSError when it may never be."""
        with self._turn:
            while True:
                if any(number in lines for lines in self._failed):
                    raise OSError(errno.EIO, "an fsync of the log failed")
                if self._done >= number:
                    return
                if self._syncing:
                    self._turn.wait()
                else:
                    self._sync()

    def _sync(self) -> None:
        """Sync without holding the lock, for all who have come so far."""
        self._syncing = True
        self._turn.release()
        fd = -1
        try:
            number, fd = self._log.snapshot()
            os.fsync(fd)
            failed = False
        except OSError:
            self._log.distrust()
            number = self._log.written()  # Lines written meanwhile share the doubt.
            failed = True
        finally:
            if fd >= 0:
                os.close(fd)
            self._turn.acquire()
            self._syncing = False
            self._turn.notify_all()
        if failed:
            self._failed.append(range(self._done + 1, number + 1))
        else:
            self._done = number


def _redacted(exchange: Exchange, request: Request, body: Body) -> Body:
    """The body without its secrets: itself when it has none."""
    whole = body.whole()
    try:
        content_type = request.value(b"content-type") or b""
        path = request.target.partition(b"?")[0]
        redaction = redact_body(path, content_type, request.value(b"content-encoding") or b"", whole)
        if redaction is None:
            return body
        clean = Body(MIB)
        for piece in redaction.pieces:
            clean.append(piece)
    finally:
        if isinstance(whole, mmap.mmap):
            whole.close()
    exchange.redacted += redaction.count
    exchange.coding = b""  # It is recorded unfolded.
    return clean


def _cut(exchange: Exchange, body: Body, limit: int) -> Body:
    """The first `limit` bytes of a body; the exchange learns the digest of all of it."""
    digest = hashlib.sha256()
    prefix = Body(MIB)
    for piece in body.pieces():
        digest.update(piece)
        if prefix.size < limit:
            prefix.append(piece[: limit - prefix.size])
    exchange.body_sha256 = digest.hexdigest()
    return prefix


# == Upstream ===================================================================================================
# Connections to the coordinator node: one a worker thread, kept and used again, with the rules for when that is safe
# and when a request may be sent a second time. It knows neither clients nor the log. Run by worker threads, each with
# connections of its own (threading.local), so that nothing is locked on the way of a request.

Watch = Callable[[], None]  # Called about every WATCH_SECONDS of silence; raises ProxyError to give up.

_REPEATABLE = frozenset((b"GET", b"HEAD", b"OPTIONS"))  # RFC 9110 9.2.1; never a write, idempotent or not


class UpstreamConnection:
    """One http.client connection that has been made, and what is known of it."""

    __slots__ = ("connection", "stream", "used", "idle_since")

    def __init__(self, connection: http.client.HTTPConnection, stream: WaitingStream) -> None:
        self.connection = connection
        self.stream = stream
        self.used = False  # it has carried a request before
        self.idle_since = 0.0  # monotonic

    def stale(self) -> bool:
        """Whether it was closed, or said something nobody asked for, while it was idle."""
        return time.monotonic() - self.idle_since > REUSE_SECONDS or self.stream.readable()

    def close(self) -> None:
        """Close it; Elasticsearch cancels a search whose connection goes."""
        self.connection.close()


class UpstreamResponse:
    """A response whose head is there and whose body is still coming. Close it, whatever happens."""

    __slots__ = ("head", "_reader", "_connection", "_upstream", "_watch", "_reusable")

    def __init__(
        self, upstream: Upstream, connection: UpstreamConnection, reader: ResponseReader, watch: Watch, reusable: bool
    ) -> None:
        assert reader.head is not None
        self.head = reader.head
        self._upstream = upstream
        self._connection: UpstreamConnection | None = connection
        self._reader = reader
        self._watch = watch
        self._reusable = reusable  # the whole request was sent

    def read(self) -> tuple[Buffer, bool]:
        """Wait for the next piece of the body; True with the last. Raises UpstreamError, and what `watch` raises."""
        reader = self._reader
        pieces = reader.body()
        while not pieces and not reader.complete:
            if isinstance(self.head.decoder, LengthDecoder) and self.head.decoder.remaining > RECEIVE_BYTES:
                pieces = [self._read_direct(self.head.decoder.remaining)]
            else:
                self._upstream.wait(self._stream, reader, self._watch)
                pieces = reader.body()
        if reader.complete:
            self._release()
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), reader.complete

    @property
    def _stream(self) -> WaitingStream:
        assert self._connection is not None
        return self._connection.stream

    def _read_direct(self, remaining: int) -> Buffer:
        """A large body's bytes go through one buffer of the thread, not through new bytes each time."""
        view = self._upstream.buffer()[:remaining]
        count = self._upstream.wait_into(self._stream, view, self._watch)
        if not count:
            self._reader.end()
        self._reader.direct(count)
        return view[:count]

    def _release(self) -> None:
        """Keep the connection, if both sides and the response's bytes agree that it can be used again."""
        connection, self._connection = self._connection, None
        assert connection is not None
        if self._reusable and self.head.keep_alive and not self._reader.surplus and self._delimited():
            self._upstream.keep(connection)
        else:
            connection.close()

    def _delimited(self) -> bool:
        return not isinstance(self.head.decoder, UntilCloseDecoder)

    def close(self) -> None:
        """Let go of a response that was not read to its end: its connection is of no use any more."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Upstream:
    """The coordinator node, as seen from the worker threads."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._local = threading.local()  # .connection: UpstreamConnection | None, .buffer: memoryview
        self._context = upstream_context(config) if config.upstream_tls else None
        self._pinned: ssl.SSLContext | None = None  # the context for --ca-fingerprint, once its certificate was seen
        default_port = 443 if config.upstream_tls else 80
        name = f"[{config.upstream_host}]" if ":" in config.upstream_host else config.upstream_host
        port = "" if config.upstream_port == default_port else f":{config.upstream_port}"
        self.authority = f"{name}{port}".encode("idna" if not name.isascii() else "ascii")  # what Host says to it
        self._where = f"{name}:{config.upstream_port}"  # for people

    # -- A request, there and back -------------------------------------------------------------------------------

    def request(self, request: Request, watch: Watch, attempt: Callable[[int], None]) -> UpstreamResponse:
        """Send a whole request and wait for the head of its response.

        `attempt` is told the number of each attempt. Raises UpstreamError, and what `watch` raises.
        """
        head = request_head(request, self.authority)
        tries = 1
        connection = self._kept()
        while True:
            if connection is None:
                connection, tries = self._connect(tries, attempt)
            reader = ResponseReader(self._config.limits, request.method)
            reused = connection.used
            try:
                return self._send_and_wait(connection, head, request, reader, watch)
            except BaseException as error:
                connection.close()
                # RFC 9110 9.2.2: only what reads may be sent again, only once, only where an idle connection was lost.
                if not (isinstance(error, UpstreamError) and reused and not reader.started) or tries > 1:
                    raise
                if request.method not in _REPEATABLE or error.code not in _LOST:
                    raise
            connection = None
            tries += 1
            attempt(tries)

    def _send_and_wait(
        self, connection: UpstreamConnection, head: bytes, request: Request, reader: ResponseReader, watch: Watch
    ) -> UpstreamResponse:
        connection.used = True
        try:
            sent_all = self._send(connection.stream, head, request, reader, watch)
            while reader.head is None:
                self.wait(connection.stream, reader, watch)
        except OSError as error:
            raise self._broken(error) from None
        return UpstreamResponse(self, connection, reader, watch, sent_all)

    def _send(self, stream: WaitingStream, head: bytes, request: Request, reader: ResponseReader, watch: Watch) -> bool:
        """Send the request; False when the upstream answered, or stopped listening, before it had all of it."""
        for data in _wire(head, request):
            view: Buffer = data
            while True:
                try:
                    count = stream.send_some(view)
                except OSError:
                    return False  # It may have said why before it closed: the caller reads on.
                if count == len(view):
                    break
                view = memoryview(view)[count:]
                if not count:
                    watch()
                if self._answered(stream, reader):
                    return False
            if len(data) >= SEND_JOIN_BYTES and self._answered(stream, reader):
                return False
        return True

    @staticmethod
    def _answered(stream: WaitingStream, reader: ResponseReader) -> bool:
        """Whether the answer begins already; in TLS what is there may be a session ticket and no answer."""
        if not stream.readable():
            return False
        data = stream.receive()
        if data:
            reader.feed(data)
        return data is not None

    def wait(self, stream: WaitingStream, reader: ResponseReader, watch: Watch) -> None:
        """Feed `reader` the next bytes. Raises UpstreamError after --upstream-timeout of silence."""
        deadline: Deadline | None = None
        try:
            while (data := stream.receive()) is None:
                deadline = self._silent(deadline, watch)
        except OSError as error:
            raise self._broken(error) from None
        if data:
            reader.feed(data)
        else:
            self._ended(reader)

    def wait_into(self, stream: WaitingStream, view: memoryview, watch: Watch) -> int:
        """The same, straight into a buffer; the number of bytes, 0 at the end of the stream."""
        deadline: Deadline | None = None
        try:
            while (count := stream.receive_into(view)) is None:
                deadline = self._silent(deadline, watch)
        except OSError as error:
            raise self._broken(error) from None
        return count

    def _silent(self, deadline: Deadline | None, watch: Watch) -> Deadline:
        """After a slice of silence: is it worth waiting on?"""
        watch()
        if deadline is None:
            deadline = Deadline(self._config.upstream_timeout_seconds - WATCH_SECONDS)
        if not deadline.remaining():
            raise UpstreamError(
                "upstream-timeout",
                f"{self._where} said nothing for {self._config.upstream_timeout_seconds:g} seconds"
                " (--upstream-timeout); the request may still be running there",
                504,
            )
        return deadline

    def _ended(self, reader: ResponseReader) -> None:
        if reader.head is None:
            what = "in the middle of a response's head" if reader.started else "without an answer"
            raise UpstreamError("upstream-closed", f"{self._where} closed the connection {what}")
        reader.end()

    def _broken(self, error: OSError) -> UpstreamError:
        if isinstance(error, ssl.SSLEOFError):
            return UpstreamError("upstream-closed", f"{self._where} cut the TLS connection off without closing it")
        return UpstreamError("upstream-reset", f"the connection to {self._where} broke: {error.strerror or error}")

    # -- Connections ---------------------------------------------------------------------------------------------

    def _kept(self) -> UpstreamConnection | None:
        """This thread's idle connection, if there is one that can be used."""
        connection: UpstreamConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            return None
        self._local.connection = None
        if connection.stale():
            connection.close()
            return None
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        """Put a connection back for this thread's next request."""
        connection.idle_since = time.monotonic()
        self._local.connection = connection

    def tidy(self, leaving: bool) -> None:
        """Close this thread's connection if it is stale, or if the thread ends."""
        connection = self._kept()
        if connection is not None:
            if leaving:
                connection.close()
            else:
                self._local.connection = connection

    def buffer(self) -> memoryview:
        """This thread's buffer for large bodies, RELAY_BYTES long; valid until the next read."""
        view: memoryview | None = getattr(self._local, "buffer", None)
        if view is None:
            view = self._local.buffer = memoryview(bytearray(RELAY_BYTES))
        return view

    def _connect(self, tries: int, attempt: Callable[[int], None]) -> tuple[UpstreamConnection, int]:
        """A new connection, with one more try where the first fails. Raises UpstreamError."""
        try:
            return self._connect_once(), tries
        except UpstreamError as error:
            if tries > 1 or error.code not in _WORTH_ANOTHER_TRY:
                raise
        attempt(tries + 1)
        return self._connect_once(), tries + 1

    def _connect_once(self) -> UpstreamConnection:
        config = self._config
        connection = self._new_connection(self._pinned or self._context)
        try:
            # Tries each address of the name in turn, sets TCP_NODELAY, sends SNI, checks the certificate.
            connection.connect()
            if config.ca_fingerprint is not None and self._pinned is None:
                connection = self._pin(connection, config.ca_fingerprint)
        except (OSError, ValueError) as error:
            connected = connection.sock is not None  # so it is the handshake that failed
            connection.close()
            raise self._unreachable(error, connected) from None
        except BaseException:
            connection.close()
            raise
        connection.auto_open = 0
        sock = connection.sock
        if isinstance(sock, ssl.SSLSocket):
            # A cut-off response must not look like a whole one.
            sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        return UpstreamConnection(connection, WaitingStream(sock, config.portable))

    def _new_connection(self, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
        config = self._config
        if context is None:
            return http.client.HTTPConnection(config.upstream_host, config.upstream_port, timeout=CONNECT_SECONDS)
        if config.ca_fingerprint is not None and self._pinned is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Only to be shown a chain: nothing is sent through it.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection(
            config.upstream_host, config.upstream_port, timeout=CONNECT_SECONDS, context=context
        )

    def _pin(self, shown: http.client.HTTPConnection, fingerprint: str) -> http.client.HTTPConnection:
        """Make the certificate with the fingerprint the only authority, and connect again under it."""
        assert isinstance(shown.sock, ssl.SSLSocket)
        pinned = pinned_context(shown.sock, fingerprint)
        if pinned is None:
            raise UpstreamError(
                "upstream-certificate",
                f"no certificate that {self._where} shows has the SHA-256 of --ca-fingerprint; compare it with"
                " openssl x509 -fingerprint -sha256, or name the CA's file with --ca",
            )
        shown.close()
        connection = http.client.HTTPSConnection(
            self._config.upstream_host, self._config.upstream_port, timeout=CONNECT_SECONDS, context=pinned
        )
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        self._pinned = pinned
        return connection

    def _unreachable(self, error: OSError | ValueError, connected: bool) -> UpstreamError:
        where = self._where
        if isinstance(error, socket.gaierror):
            return UpstreamError("upstream-unknown-name", f"the name in {where} can't be resolved: {error.strerror}")
        if isinstance(error, ssl.SSLCertVerificationError):
            return UpstreamError(
                "upstream-certificate",
                f"the certificate of {where} is not trusted: {error.verify_message}; see --ca and --ca-fingerprint",
            )
        if connected:
            reason = getattr(error, "reason", None) or error
            return UpstreamError("upstream-tls", f"no TLS with {where}: {reason}; if it speaks plain HTTP, see --tls")
        if isinstance(error, TimeoutError):
            return UpstreamError("upstream-unreachable", f"{where} did not answer within {CONNECT_SECONDS:g} seconds")
        if isinstance(error, ConnectionRefusedError):
            return UpstreamError("upstream-refused", f"{where} refused the connection; is Elasticsearch running?")
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return UpstreamError("upstream-unreachable", f"{where} can't be reached: {reason}")


_LOST = frozenset(("upstream-closed", "upstream-reset"))
_WORTH_ANOTHER_TRY = frozenset(("upstream-refused", "upstream-unreachable", "upstream-tls"))


def _wire(head: bytes, request: Request) -> Iterator[Buffer]:
    """A request's bytes as they go out: in one piece when small, framed as the client framed it."""
    body = request.body
    if body is None or (not body.size and not request.chunked):
        yield head
    elif request.chunked:
        yield head
        for piece in body.pieces():
            for start in range(0, len(piece), RELAY_BYTES):
                yield chunk(memoryview(piece)[start : start + RELAY_BYTES])
        yield LAST_CHUNK
    elif body.size <= SEND_JOIN_BYTES:
        yield head + bytes(body.whole())
    else:
        yield head
        yield from body.pieces()


# == Relay ======================================================================================================
# The straight line a request is driven along, and the only room that knows HTTP, Audit and Upstream. It does not know
# how connections are accepted, parked or scheduled: it is told when there is something to do. Run by worker threads.


class Relay:
    """What all connections share: configuration, log, upstream, and whether to give up."""

    def __init__(self, config: Config, audit: AuditLog) -> None:
        self.config = config
        self.audit = audit
        self.upstream = Upstream(config)
        self.budget = MemoryBudget(config.limits.memory_total_bytes)
        self.listener_tls = listener_context(config) if config.listen_tls else None
        self.handshake_failures = Notice(60.0)
        self.draining = False  # idle connections are closed, others after their response
        self.aborting = False  # what is still in flight is cut off

    def open(self, sock: socket.socket, address: tuple[str, int], refusal: ProxyError | None) -> Session:
        """A session for a new client connection; with `refusal` each of its requests is answered so."""
        return Session(self, sock, address, refusal)

    def thread_idle(self, leaving: bool) -> None:
        """A worker thread has nothing to do, or ends."""
        self.upstream.tidy(leaving)

    def tick(self) -> None:
        """About once a second: is the log still where it was?"""
        self.audit.check()

    # -- The way of a request ------------------------------------------------------------------------------------

    def exchange(self, reply: Reply, exchange: Exchange, request: Request | None, refusal: ProxyError | None,
                 received: bytes = b"") -> None:  # fmt: skip
        """Record, forward, relay, record: the whole of it, for sound requests and for refused ones."""
        body = request.body if request is not None else None
        try:
            if refusal is not None:
                exchange.rejected = refusal.code
            self.audit.request(exchange, request, received)
            if refusal is not None:
                raise refusal
            assert request is not None
            self._forward(reply, exchange, request)
        except ProxyError as error:
            self._answer(reply, exchange, error)
        except Exception as bug:  # The client still gets an answer, the log its record, and the operator one line.
            where = bug.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = where.tb_lineno if where is not None else 0
            say(f"internal error in request {exchange.id}, line {line}: {type(bug).__name__}: {bug}; please report it")
            self._answer(reply, exchange, InternalError("internal-error", "es-proxy failed; its log names the cause"))
        finally:
            if body is not None:
                body.close()

    def _forward(self, reply: Reply, exchange: Exchange, request: Request) -> None:
        exchange.started = time.monotonic()

        def watch() -> None:
            if self.aborting:
                raise OverloadError("shutting-down", "es-proxy was stopped before the response came")
            if reply.stream.gone():
                raise ClientGoneError("client-gone", "the client left before its response came")
            reply.flush()

        def attempt(number: int) -> None:
            exchange.attempts = number

        response = self.upstream.request(request, watch, attempt)
        try:
            self._relay_response(reply, exchange, response)
        finally:
            response.close()

    def _relay_response(self, reply: Reply, exchange: Exchange, response: UpstreamResponse) -> None:
        exchange.status = response.head.status
        reply.keep_alive = reply.keep_alive and not self.draining
        reply.begin(response.head)
        while True:
            piece, last = response.read()
            exchange.size += len(piece)
            if last:
                self._record_response(exchange)
                reply.finish(piece)
                return
            reply.write(piece)

    def _record_response(self, exchange: Exchange) -> None:
        try:
            self.audit.response(exchange)
        except AuditError as error:
            # The upstream has acted. Clients send a request again after 502, 503, 504, never after 500.
            error.status = 500
            error.code = "audit-response-lost"
            raise

    def _answer(self, reply: Reply, exchange: Exchange, error: ProxyError) -> None:
        """Turn an error into a response, or cut off one that has begun; the only place that does."""
        if error.status >= 400:
            exchange.error = error.code
        if reply.begun:
            if isinstance(error, ClientGoneError):
                exchange.sent = reply.body_sent
            reply.break_off()
            head = body = b""
        else:
            exchange.status = error.status
            reply.keep_alive = reply.keep_alive and not self.draining
            head, body = error_response(error, exchange.id, reply.head_only, not reply.keep_alive)
            exchange.size = len(body)
        with contextlib.suppress(
            AuditError
        ):  # Counted by the log; what the client gets holds nothing of the upstream's.
            self.audit.response(exchange)
        if head and not isinstance(error, ClientGoneError):
            reply.send_own(head + body)


class Reply:
    """The response side of one exchange: frames what comes from the upstream for this client.

    Raises ClientGoneError when the client does not take it.
    """

    __slots__ = ("stream", "head_only", "keep_alive", "begun", "body_sent", "_minor", "_chunked", "_head", "_held",
                 "_hold")  # fmt: skip

    def __init__(self, stream: ParkedStream, minor: int, head_only: bool, keep_alive: bool) -> None:
        self.stream = stream
        self.head_only = head_only  # the answer to HEAD
        self.keep_alive = keep_alive  # whether the connection can take another request afterwards
        self.begun = False  # bytes of a response went out
        self.body_sent = 0  # bytes of the body that the kernel has taken
        self._minor = minor  # of the client's HTTP version
        self._chunked = False
        self._head = b""  # not sent yet: it goes out with the first piece
        self._hold = False  # the end of the body is the end of the connection: its last byte must wait
        self._held: Buffer = b""

    def begin(self, response: Response) -> None:
        """Prepare the head, with the framing this client can read."""
        self.stream.new_pace()
        decoder = response.decoder
        framing = None  # the upstream's own
        if isinstance(decoder, (ChunkedDecoder, UntilCloseDecoder)):
            self._chunked = bool(self._minor)
            if not self._minor:
                framing = b""
                self.keep_alive = False
                self._hold = True
            elif isinstance(decoder, UntilCloseDecoder):
                framing = b"Transfer-Encoding: chunked\r\n"
        connection = b""
        if not self.keep_alive:
            connection = b"Connection: close\r\n"
        elif not self._minor:
            connection = b"Connection: keep-alive\r\n"
        self._head = response_head(response, framing, connection)

    def write(self, piece: Buffer) -> None:
        """Send a piece of the body that is not the last."""
        if self._hold:
            # Hold back one piece: whoever has all bytes of such a body has the whole response.
            piece, self._held = self._held, bytes(piece)
        self._send(piece, b"")

    def flush(self) -> None:
        """Send the head if it still waits for the first piece of the body, which takes its time."""
        if self._head:
            self._send(b"", b"")

    def finish(self, piece: Buffer) -> None:
        """Send the last piece, after the response's record is in the log."""
        if self._held:
            piece = b"".join((self._held, piece))
        self._send(piece, LAST_CHUNK if self._chunked else b"")

    def _send(self, piece: Buffer, end: bytes) -> None:
        head, self._head = self._head, b""
        if not piece and not head and not end:
            return
        self.begun = True
        count = len(piece)
        framed = (chunk(piece) if count else b"") if self._chunked else piece
        stream = self.stream
        before = stream.sent
        overhead = len(head)
        try:
            if len(framed) <= SEND_JOIN_BYTES:
                stream.send(b"".join((head, framed, end)) if head or end else framed)
            else:
                if head:
                    stream.send(head)
                stream.send(framed)
                if end:
                    stream.send(end)
        except OSError as error:
            self.body_sent += min(count, max(0, stream.sent - before - overhead))
            raise ClientGoneError("client-gone", f"the client did not take its response: {error}") from None
        self.body_sent += count

    def send_own(self, data: bytes) -> None:
        """Send a whole response of our own; a client that does not take it is left alone."""
        self.begun = True
        try:
            self.stream.send(data)
        except OSError:
            self.keep_alive = False

    def break_off(self) -> None:
        """End a response that can't be completed so that nobody takes it for a whole one."""
        self.keep_alive = False
        self.stream.break_off()


_MARKED = frozenset(
    (
        b"es-security-runas-user",
        b"opendistro_security_impersonate_as",
        b"forwarded",
        b"x-forwarded-for",
        b"x-opaque-id",
    )
)
_DETAILS = {b"content-type": "http.request.mime_type", b"content-encoding": "es_proxy.request.content_encoding"}
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")  # W3C Trace Context 3.2
_TLS_EXPECTED, _TLS_BEGUN, _TLS_DONE = range(3)
_OVERDUE = OverloadError("no-thread", "no thread became free in time; see --threads, or the upstream is too slow")
_PLAIN_HTTP = RequestError("plain-http", "this port speaks TLS: use https:// (or start es-proxy with --tls)")


class Session:
    """One client connection: what has arrived of its next request, and how long the rest may take.

    The server parks it while it waits, looks at `deadline` (monotonic seconds), and calls `advance` when there is
    something to do. One thread at a time.
    """

    __slots__ = (
        "deadline", "stream", "_relay", "_reader", "_source", "_port", "_refusal", "_tls_state", "_tls", "_started",
        "_body_started", "_lingering", "_certificate_name", "_credentials", "_user",
    )  # fmt: skip

    def __init__(self, relay: Relay, sock: socket.socket, address: tuple[str, int], refusal: ProxyError | None) -> None:
        config = relay.config
        self.stream = ParkedStream(sock, config.limits)
        self.deadline = time.monotonic() + config.limits.keepalive_seconds
        self._relay = relay
        self._reader = RequestReader(config.limits, config.max_body_bytes, relay.budget)
        host = address[0].removeprefix("::ffff:").partition("%")[0]  # IPv4 on an IPv6 socket; a link-local zone
        self._source = escape(host.encode())
        self._port = address[1]
        self._tls: dict[str, object] = {}  # what ECS records tell of the handshake
        self._refusal = refusal
        self._tls_state = _TLS_EXPECTED if relay.listener_tls is not None else _TLS_DONE
        self._started: float | None = None  # monotonic; the first byte of the request (or handshake) in hand
        self._body_started = 0.0  # monotonic; its head was complete
        self._lingering = False  # all is said: only reading on until the client closes
        self._certificate_name: bytes | None = None
        self._credentials: bytes | None = b""  # of the last request, and the user they name: clients repeat them
        self._user = b"anonymous"

    def advance(self, wake: Wake) -> bool:
        """Do what can be done without waiting for the client; False when the connection is to be closed."""
        try:
            if wake in (Wake.EXPIRED, Wake.STOPPED):
                return self._give_up(wake)
            if self._lingering:
                return self._linger()
            if self._tls_state is not _TLS_DONE and not self._handshake():
                return True
            return self._converse(_OVERDUE if wake is Wake.OVERDUE else self._refusal)
        except ProxyError as error:  # Of reading a request; those of answering one never get here.
            return self._refuse(error)
        except OSError as error:
            return self._broken(error)

    def _converse(self, refusal: ProxyError | None) -> bool:
        """Read and serve requests as long as bytes are there."""
        reader = self._reader
        receives = 0
        while True:
            request = reader.next()
            if request is not None:
                if not self._serve(request, refusal):
                    return self._part(reader.buffered)
                if reader.buffered or self.stream.pending():
                    continue
                if self._relay.draining:
                    return self._part(False)
                break
            if receives == RECEIVES_PER_TURN and not self.stream.pending():
                break
            data = self.stream.receive()
            if data is None:
                break
            if not data:
                reader.end()
                return False
            receives += 1
            reader.feed(data)
        return self._park()

    def _park(self) -> bool:
        """Wait for more, until the deadline of whatever it is that is awaited."""
        reader = self._reader
        limits = self._relay.config.limits
        now = time.monotonic()
        if reader.idle:
            self._started = None
            self.deadline = now + limits.keepalive_seconds
            return not self._relay.draining
        if self._started is None:
            self._started = now
        body = reader.body
        if body is None:
            self.deadline = self._started + limits.head_seconds
            return True
        if reader.expects_continue:
            reader.expects_continue = False
            self.stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._body_started:
            self._body_started = now
        slowest = self._body_started + limits.body_silence_seconds + body.size / limits.body_rate_bytes
        self.deadline = min(now + limits.body_silence_seconds, slowest)
        return True

    def _serve(self, request: Request, refusal: ProxyError | None) -> bool:
        """One whole request; True when the connection can take another."""
        self._started = None
        self._body_started = 0.0
        exchange = self._describe(request)
        keep_alive = request.keep_alive and not self._relay.draining and refusal is None
        reply = Reply(self.stream, request.minor, request.method == b"HEAD", keep_alive)
        self._relay.exchange(reply, exchange, request, refusal)
        return reply.keep_alive

    def _describe(self, request: Request) -> Exchange:
        value = request.value
        agent = value(b"user-agent")
        exchange = Exchange(self._source, self._identify(request), escape_agent(agent) if agent else b"")
        exchange.asks(request.method, request.target, self._relay.config.redact)
        exchange.coding = value(b"content-encoding") or b""
        if not _MARKED.isdisjoint(request.values):
            run_as = value(b"es-security-runas-user") or value(b"opendistro_security_impersonate_as")
            exchange.run_as = escape(run_as or b"")
            exchange.forwarded = escape(value(b"forwarded") or value(b"x-forwarded-for") or b"")
            exchange.opaque_id = escape(value(b"x-opaque-id") or b"")
        if self._relay.config.audit_format == "ecs":
            exchange.details = self._details(request)
        return exchange

    def _details(self, request: Request) -> dict[str, object]:
        """What only ECS records tell."""
        details: dict[str, object] = {"source.port": self._port, "http.version": f"1.{request.minor}", **self._tls}
        for name, key in _DETAILS.items():
            text = request.value(name)
            if text:
                details[key] = readable(text)
        parent = _TRACEPARENT.fullmatch(request.value(b"traceparent") or b"")
        if parent:
            details["trace.id"] = parent[1].decode()
        return details

    def _identify(self, request: Request) -> bytes:
        credentials = request.value(b"authorization")
        if credentials != self._credentials:
            self._user = identify(credentials, self._certificate_name)
            self._credentials = credentials
        return self._user

    def _broken(self, error: OSError) -> bool:
        if self._tls_state is not _TLS_DONE:
            self._relay.handshake_failures.say(f"no TLS with {self._source.decode()}: {error}")
        elif not self._lingering and not self._reader.idle:
            return self._refuse(RequestError("incomplete-request", "the connection broke in the middle of a request"))
        return False

    # -- Refusing and leaving ------------------------------------------------------------------------------------

    def _refuse(self, error: ProxyError) -> bool:
        """Answer and record a request that can't be read to its end; nothing behind it is read as a request."""
        request = self._reader.salvage()
        if request is not None and request.fields:
            exchange = self._describe(request)
        else:
            exchange = Exchange(self._source)
            if request is not None:
                exchange.asks(request.method, request.target, self._relay.config.redact)
        method = request.method if request is not None else b""
        reply = Reply(self.stream, 1, method == b"HEAD", keep_alive=False)
        received = self._reader.received
        if self._relay.config.redact:
            received, count = redact_received(received)
            exchange.redacted += count
        self._relay.exchange(reply, exchange, None, error, received)
        if self._reader.body is not None:
            self._reader.body.close()
        return self._part(True)

    def _part(self, unread: bool) -> bool:
        """End the connection so that the last response arrives; with bytes `unread` a plain close would destroy it."""
        if not unread:
            return False
        self.stream.finish()
        self._lingering = True
        self.deadline = time.monotonic() + self._relay.config.limits.linger_seconds
        return True

    def _linger(self) -> bool:
        while data := self.stream.receive():
            pass
        return data is None

    def _give_up(self, wake: Wake) -> bool:
        """A deadline has passed, or the process stops."""
        if self._lingering or self._reader.idle or self._tls_state is not _TLS_DONE:
            return False
        if wake is Wake.STOPPED:
            return self._refuse(OverloadError("shutting-down", "es-proxy was stopped before the request was complete"))
        what = "head" if self._reader.body is None else "body"
        return self._refuse(RequestError("request-timeout", f"the request's {what} did not arrive in time", 408))

    # -- TLS -----------------------------------------------------------------------------------------------------

    def _handshake(self) -> bool:
        """Carry the handshake on; True when it is complete. Raises OSError when there will be none."""
        context = self._relay.listener_tls
        assert context is not None
        if self._tls_state is _TLS_EXPECTED:
            self._started = time.monotonic()
            self.deadline = self._started + self._relay.config.limits.head_seconds
            first = self.stream.peek()
            if first is None:
                return False
            if first and first != b"\x16":  # No TLS record of a handshake: a client that was told http.
                self._tls_state = _TLS_DONE
                self._refusal = _PLAIN_HTTP
                return True
            self.stream.start_tls(context)
            self._tls_state = _TLS_BEGUN
        if not self.stream.handshake():
            return False
        self._tls_state = _TLS_DONE
        self._certificate_name = self.stream.certificate_name()
        if self._relay.config.audit_format == "ecs":
            self._tls = self.stream.tls_facts()
        self._credentials = b""  # Whoever has no credentials is the certificate's subject from now on.
        return True

    # -- For the server ------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.stream.sock.fileno()

    @property
    def idle(self) -> bool:
        """Whether nothing of a request has arrived, so that closing loses nothing."""
        return self._reader.idle

    def cut(self) -> None:
        """From another thread: make whoever waits for this client fail at once."""
        self.stream.cut()

    def close(self) -> None:
        """Let go of the connection and of what had arrived."""
        if self._reader.body is not None:
            self._reader.body.close()
        self.stream.close()


# == Server =====================================================================================================
# Accepts connections, parks them, and hands those with something to do to worker threads, first come first served. It
# does not know what is said on a connection: it is given a service that opens sessions, and sessions that advance.


class Visitor(Protocol):
    """A session as the server sees it; Session of the room above is one."""

    deadline: float  # monotonic seconds

    @property
    def idle(self) -> bool:
        """Whether closing it loses nothing."""

    def advance(self, wake: Wake) -> bool:
        """Do what can be done; False to be closed. Called by one thread at a time."""

    def fileno(self) -> int:
        """The descriptor to watch."""

    def cut(self) -> None:
        """From another thread: let `advance` fail soon."""

    def close(self) -> None:
        """Release everything."""


class Service(Protocol):
    """What the server serves; Relay of the room above is one."""

    draining: bool
    aborting: bool

    def open(self, sock: socket.socket, address: tuple[str, int], refusal: ProxyError | None) -> Visitor:
        """A session for a new connection."""

    def thread_idle(self, leaving: bool) -> None:
        """Called in a worker thread that has nothing to do, or ends."""

    def tick(self) -> None:
        """Called about once a second in the poller's thread."""


class EpollPoller:
    """Tells which descriptors became readable, each once (EPOLLONESHOT); `arm` may be called from any thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, fd: int) -> None:
        """Watch a new descriptor, once."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def arm(self, fd: int) -> None:
        """Watch a known descriptor once more."""
        self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def disarm(self, fd: int) -> None:
        """Stop watching, for now."""
        self._epoll.modify(fd, 0)

    def wait(self, seconds: float) -> list[int]:
        """Descriptors that are readable, or broken; none after `seconds`."""
        return [fd for fd, _ in self._epoll.poll(seconds, 256)]

    def close(self) -> None:
        """Release the descriptor."""
        self._epoll.close()


class SelectorPoller:
    """The same on any system (selectors): other threads leave word through a pipe of their own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._words: collections.deque[tuple[int, bool]] = collections.deque()  # descriptor, watch it?
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)

    def add(self, fd: int) -> None:
        """Watch a new descriptor, once."""
        self._tell(fd, True)

    def arm(self, fd: int) -> None:
        """Watch a known descriptor once more."""
        self._tell(fd, True)

    def disarm(self, fd: int) -> None:
        """Stop watching, for now."""
        self._tell(fd, False)

    def _tell(self, fd: int, watch: bool) -> None:
        self._words.append((fd, watch))
        with contextlib.suppress(BlockingIOError):  # Full: then the poller has been told already.
            self._mouth.send(b"!")

    def wait(self, seconds: float) -> list[int]:
        """Descriptors that are readable, or broken; none after `seconds`."""
        self._listen()
        ready = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._ear:
                with contextlib.suppress(BlockingIOError):
                    self._ear.recv(4096)
            else:
                self._selector.unregister(key.fileobj)
                ready.append(key.fd)
        return ready

    def _listen(self) -> None:
        while self._words:
            fd, watch = self._words.popleft()
            with contextlib.suppress(KeyError, ValueError, OSError):  # It is closed by now, or was not watched.
                self._selector.unregister(fd)
            if watch:
                with contextlib.suppress(KeyError, ValueError, OSError):
                    self._selector.register(fd, selectors.EVENT_READ)

    def close(self) -> None:
        """Release the descriptors."""
        self._selector.close()
        self._ear.close()
        self._mouth.close()


class Ready:
    """Sessions with something to do, first in first out, and the workers who wait for one, last in first out.

    The most recently idle worker is woken first, so that the others can go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the three below
        self._dismissed = False
        self._waiting: collections.deque[tuple[float, Visitor, Wake]] = collections.deque()
        self._idle: list[Worker] = []

    def put(self, session: Visitor, wake: Wake) -> None:
        """Give a session to an idle worker, or queue it."""
        with self._lock:
            if not self._idle:
                self._waiting.append((time.monotonic(), session, wake))
                return
            worker = self._idle.pop()
        worker.hand(session, wake)

    def take(self, worker: Worker) -> tuple[Visitor, Wake] | None:
        """The oldest session; None puts the worker among the idle, to be handed one."""
        with self._lock:
            if self._waiting:
                _, session, wake = self._waiting.popleft()
                return session, wake
            if self._dismissed:
                worker.hand(None, Wake.STOPPED)
            else:
                self._idle.append(worker)
            return None

    def leave(self, worker: Worker) -> bool:
        """Take a worker back from the idle; False when it was handed a session meanwhile."""
        with self._lock:
            if worker in self._idle:
                self._idle.remove(worker)
                return True
            return False

    def dismiss(self) -> None:
        """Send every worker home, now or when it has finished what it has."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._dismissed = True
        for worker in idle:
            worker.hand(None, Wake.STOPPED)

    def oldest(self) -> float | None:
        """Since when (monotonic seconds) the oldest session has waited; None when none waits."""
        try:
            return self._waiting[0][0]
        except IndexError:
            return None

    def take_older(self, than: float) -> Visitor | None:
        """A session that has waited since before `than` (monotonic seconds), if there is one."""
        with self._lock:
            if self._waiting and self._waiting[0][0] < than:
                return self._waiting.popleft()[1]
            return None


class Worker(threading.Thread):
    """A thread that advances one session after another, and leaves when it is idle for long and not needed."""

    def __init__(self, server: Server) -> None:
        super().__init__(name="worker", daemon=True)
        self._server = server
        self._handed: tuple[Visitor, Wake] | None = None
        self._signal = threading.Semaphore(0)
        self.session: Visitor | None = None  # the one in hand, for a stop that can't wait

    def hand(self, session: Visitor | None, wake: Wake) -> None:
        """From another thread, to a worker that Ready took from the idle: here is work, or (None) go."""
        self._handed = None if session is None else (session, wake)
        self._signal.release()

    def run(self) -> None:
        """The life of the thread."""
        server = self._server
        try:
            while (work := server.ready.take(self) or self._wait()) is not None:
                self.session, wake = work
                server.advance(self.session, wake)
                self.session = None
        finally:
            server.service.thread_idle(leaving=True)
            server.workers.discard(self)

    def _wait(self) -> tuple[Visitor, Wake] | None:
        while not self._signal.acquire(timeout=THREAD_IDLE_SECONDS):
            if len(self._server.workers) > THREADS_AT_START and self._server.ready.leave(self):
                return None
            self._server.service.thread_idle(leaving=False)
        return self._handed


class Server(socketserver.ThreadingTCPServer):
    """socketserver's server with its thread per connection replaced, because that starves under the GIL.

    Measured at 200 keep-alive clients, a thread each answers 13 100 requests/s with a p99 of 1.3 s; parked connections
    and a few workers 27 300 with 10 ms. Also replaced: the backlog of 5, the accept loop that spins on EMFILE, the TLS
    handshake inside accept, and `shutdown`, which deadlocks when a signal handler calls it in the serving thread.
    """

    def __init__(self, config: Config, service: Service, listener: socket.socket) -> None:
        self._config = config
        self.service = service
        self.ready = Ready()
        self.workers: set[Worker] = set()
        self._sessions: set[Visitor] = set()  # all that are open
        self._parked: dict[int, Visitor] = {}  # by descriptor; whoever pops one owns it
        self._accept_again: float | None = None  # monotonic; set while no connections are taken
        self._considered = (0.0, 0.0)  # monotonic and processor seconds when growing was last considered
        self._overdue: threading.Thread | None = None
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._lifeline = -1
        self._stopping = 0  # how often `stop` was called
        self._full = Notice(60.0)
        super().__init__(listener.getsockname(), socketserver.BaseRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self._ear, self._mouth = socket.socketpair()  # `stop` is heard by the poller through it
        self._mouth.setblocking(False)
        self._poller = SelectorPoller() if config.portable or not hasattr(select, "epoll") else EpollPoller()
        limits = config.limits
        shortest = min(
            limits.head_seconds,
            limits.body_silence_seconds,
            limits.keepalive_seconds,
            limits.linger_seconds,
            limits.queue_seconds,
        )
        self._tick_seconds = min(1.0, shortest / 4)  # no deadline is missed by more than a quarter of the shortest
        self._limit = config.max_connections or descriptors_for_connections(config)

    # -- The loop: one thread -------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.0) -> None:  # noqa: ARG002  socketserver's signature
        """Accept, park and hand out until `stop`; then finish what is in flight, within --drain."""
        self._poller.add(self._ear.fileno())
        self._poller.add(self.socket.fileno())
        try:
            self._turns_until(lambda: self._stopping > 0)
            self._drain()
        finally:
            self.end()

    def start(self) -> None:
        """Start the first workers. Raises StartError."""
        self._start_workers(min(THREADS_AT_START, self._config.threads))

    def call(self, task: Callable[[], None]) -> None:
        """From any thread or a signal handler: have the poller's thread do something."""
        self._tasks.append(task)
        self._ring()

    def stop_when_closed(self, fd: int) -> None:
        """Stop when this pipe's other end is closed: the process that holds it has died."""
        self._lifeline = fd
        self._poller.add(fd)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # Full, or closed: it has been heard.
            self._mouth.send(b"!")

    def stop(self) -> None:
        """From any thread or a signal handler: stop; a second time: at once."""
        self._stopping += 1
        self._ring()

    def _turns_until(self, done: Callable[[], bool]) -> None:
        next_sweep = 0.0
        while not done():
            self._turn(self._tick_seconds)
            now = time.monotonic()
            if now >= next_sweep:
                self._sweep(now)
                next_sweep = now + self._tick_seconds

    def _turn(self, patience: float) -> None:
        """Wait for something to happen, `patience` seconds at most, and see to it."""
        listener, ear = self.socket.fileno(), self._ear.fileno()
        if self.ready.oldest() is not None:
            patience = min(patience, GROW_WAIT_SECONDS)
        elif self._accept_again is not None:
            patience = min(patience, ACCEPT_PAUSE_SECONDS)
        for fd in self._poller.wait(patience):
            session = self._parked.pop(fd, None)
            if session is not None:
                self.ready.put(session, Wake.READABLE)
            elif fd == listener:
                self._accept()
            elif fd == ear:
                self._hear()
            elif fd == self._lifeline:
                self._stopping += 1
        self._grow()
        if self._accept_again is not None and time.monotonic() >= self._accept_again:
            self._accept()

    def _hear(self) -> None:
        """Somebody rang: do what was asked for."""
        self._ear.recv(64)
        self._poller.arm(self._ear.fileno())
        while self._tasks:
            self._tasks.popleft()()

    def _accept(self) -> None:
        """Take what waits at the listener; when there is no room, look again after a pause instead of spinning."""
        self._accept_again = None
        if self.socket.fileno() < 0:
            return
        for _ in range(LISTEN_BACKLOG):
            if len(self._sessions) >= self._limit + OVERFLOW_CONNECTIONS:
                self._pause(f"{self._limit} connections are open (--max-connections); the next wait")
                return
            try:
                request, address = self.get_request()
            except BlockingIOError:
                break
            except ConnectionError:
                continue  # It left before it was taken.
            except OSError as error:
                self._pause(f"no more connections can be taken: {error.strerror}; raise LimitNOFILE or ulimit -n")
                return
            self.process_request(request, address)
        self._poller.arm(self.socket.fileno())

    def _pause(self, why: str) -> None:
        self._full.say(why)
        self._accept_again = time.monotonic() + ACCEPT_PAUSE_SECONDS

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Open a session for an accepted connection and park it; no thread is started."""
        assert isinstance(request, socket.socket)
        assert isinstance(client_address, tuple)
        try:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            refusal = _CROWDED if len(self._sessions) >= self._limit else None
            session = self.service.open(request, client_address[:2], refusal)
        except (OSError, MemoryError):
            request.close()
            return
        fd = session.fileno()
        self._sessions.add(session)
        self._parked[fd] = session
        self._poller.add(fd)

    def _sweep(self, now: float) -> None:
        """Hand out sessions whose deadline has passed, and those that have waited too long for a worker."""
        self.service.tick()
        for fd, session in list(self._parked.items()):
            if session.deadline <= now and self._parked.pop(fd, None) is session:
                self._poller.disarm(fd)
                self.ready.put(session, Wake.EXPIRED)
        oldest = self.ready.oldest()
        busy = self._overdue is not None and self._overdue.is_alive()
        if oldest is not None and oldest < now - self._config.limits.queue_seconds and not busy:
            self._overdue = threading.Thread(target=self._refuse_overdue, name="overdue", daemon=True)
            with contextlib.suppress(RuntimeError):  # No thread for it either: the next sweep tries again.
                self._overdue.start()

    def _refuse_overdue(self) -> None:
        """A thread of its own, because all workers are held."""
        while (session := self.ready.take_older(time.monotonic() - self._config.limits.queue_seconds)) is not None:
            self.advance(session, Wake.OVERDUE)

    # -- Workers ---------------------------------------------------------------------------------------------------

    def advance(self, session: Visitor, wake: Wake) -> None:
        """In a worker: let a session go on, then park or close it."""
        try:
            keep = session.advance(wake)
        except Exception as bug:
            say(f"internal error on a connection: {type(bug).__name__}: {bug}; please report it")
            keep = False
        if keep:
            fd = session.fileno()
            self._parked[fd] = session
            # From here on it is not ours: the poller may have closed it already, at its deadline or at a stop.
            with contextlib.suppress(OSError, ValueError):
                self._poller.arm(fd)
        else:
            self._sessions.discard(session)
            session.close()
            if self.service.draining:
                self._ring()  # The poller may be waiting for just this one.

    def _grow(self) -> None:
        """Add workers when sessions wait although the processor has time: then workers wait for the upstream."""
        oldest = self.ready.oldest()
        if oldest is None or len(self.workers) >= self._config.threads:
            return
        now, cpu = time.monotonic(), time.process_time()
        elapsed = now - self._considered[0]
        if now - oldest < GROW_WAIT_SECONDS or elapsed < GROW_WAIT_SECONDS:
            return
        used = (cpu - self._considered[1]) / elapsed
        self._considered = (now, cpu)
        if used < GROW_BELOW_CPU and elapsed < 20 * GROW_WAIT_SECONDS:  # an older figure says nothing of now
            self._start_workers(min(max(1, len(self.workers) // 2), self._config.threads - len(self.workers)))

    def _start_workers(self, count: int) -> None:
        for _ in range(count):
            worker = Worker(self)
            self.workers.add(worker)  # Before it runs: it takes itself out when it ends.
            try:
                worker.start()
            except RuntimeError:
                self.workers.discard(worker)
                if not self.workers:
                    raise StartError("no thread can be started; raise TasksMax or ulimit -u") from None
                self._full.say("no more threads can be started; requests wait for the ones there are")
                return

    # -- The end ---------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """No new connections, idle ones closed, the others given --drain seconds; then what is left is cut off."""
        self._accept()
        self.socket.close()
        self.service.draining = True
        self._turn(0.0)  # Requests that have just arrived are not lost with an idle connection.
        for fd, session in list(self._parked.items()):
            if session.idle and self._parked.pop(fd, None) is session:
                self._sessions.discard(session)
                session.close()
        deadline = Deadline(self._config.drain_seconds)
        self._turns_until(lambda: not self._sessions or not deadline.remaining() or self._stopping > 1)
        if not self._sessions:
            return
        say(f"{len(self._sessions)} connections are cut off")
        self.service.aborting = True
        for fd, session in list(self._parked.items()):
            if self._parked.pop(fd, None) is session:
                self.ready.put(session, Wake.STOPPED)
        for patience in (2 * WATCH_SECONDS, 1.0):
            deadline = Deadline(patience)
            self._turns_until(lambda at=deadline: not self._sessions or not at.remaining())  # type: ignore[misc]
            for worker in list(self.workers):
                if worker.session is not None:
                    worker.session.cut()

    def end(self) -> None:
        """Let the workers go and release everything."""
        workers = list(self.workers)
        self.ready.dismiss()
        deadline = Deadline(1.0)
        for worker in workers:
            worker.join(deadline.remaining())
        for session in list(self._sessions):
            session.close()
        self.server_close()
        self._poller.close()
        self._ear.close()
        self._mouth.close()


_CROWDED = OverloadError("too-many-connections", "too many connections are open; see --max-connections")


def listen(config: Config) -> socket.socket:
    """The listening socket, non-blocking. Raises StartError."""
    where = f"{config.listen_host} port {config.listen_port}"
    try:
        found = socket.getaddrinfo(
            config.listen_host, config.listen_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # `::` is IPv4 as well
        listener = socket.create_server(address[:2], family=family, backlog=LISTEN_BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        raise StartError(f"can't listen on {where}: {getattr(error, 'strerror', None) or error}") from None
    listener.setblocking(False)
    return listener


def descriptors_for_connections(config: Config) -> int:
    """How many client connections the file descriptors allow, after one a thread for the upstream and some to spare."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft - config.threads - SPARE_FILES - OVERFLOW_CONNECTIONS)


# == Supervisor =================================================================================================
# Running proxies from start to end: opens the log, listens, forks, reacts to signals. Run by the main thread of each
# process; the only room that knows there is more than one.


@dataclasses.dataclass(frozen=True)
class Share:
    """What the processes of one proxy have in common, made before they are forked."""

    listener: socket.socket
    gate: Gate
    first_log: AuditLog  # the first process's: it has the lock, which lasts as long as any of us keeps it open
    lifeline: int  # read end of a pipe that the first process holds open as long as it lives
    ready: int  # write end of a pipe; a byte says that one more process serves


class Proxy:
    """Everything that a Config stands for, in one process. Raises StartError when it can't be served.

    With a `share` it is one of several: the first process says and records when they start and stop.
    """

    def __init__(self, config: Config, share: Share | None = None) -> None:
        self.config = config
        self._share = share
        self.audit = (
            AuditLog(config) if share is None else AuditLog(config, share.gate, claim=False, inherited=share.first_log)
        )
        try:
            self.relay = Relay(config, self.audit)
            self.server = Server(config, self.relay, listen(config) if share is None else share.listener)
        except BaseException:
            self.audit.close()
            raise
        self.address: tuple[str, int] = self.server.server_address[:2]  # type: ignore[assignment]

    def serve(self) -> None:
        """Serve until `stop`, in the calling thread, then close everything. Raises StartError."""
        try:
            try:
                self.server.start()
                self._begin()
            except BaseException:
                self.server.end()
                raise
            self.server.serve_forever()
            if self._share is None:
                with contextlib.suppress(AuditError):  # Counted; there is nobody left to tell.
                    self.audit.event("stop", Pid=os.getpid())
        finally:
            self.audit.close()

    def _begin(self) -> None:
        if self._share is None:
            record_start(self.audit, self.config)
            say(description(self.config, self.address))
        else:
            self.server.stop_when_closed(self._share.lifeline)
            os.write(self._share.ready, b"!")

    def reopen(self) -> None:
        """From any thread or a signal handler: go on in the file that has the log's name now."""
        self.server.call(self._reopen)

    def _reopen(self) -> None:
        self.audit.reopen()

    def stop(self) -> None:
        """From any thread or a signal handler: finish what is in flight; a second time: at once."""
        self.server.stop()


def record_start(audit: AuditLog, config: Config) -> None:
    """The first lines of the log. Raises StartError when there can be none: nothing is served unrecorded."""
    facts = {"Version": __version__, "Config-SHA256": config.digest(), "Pid": os.getpid()}
    try:
        written = audit.event("start", **facts)
        if config.upstream_tls and config.insecure:
            audit.event("insecure-upstream")
        if not config.redact:
            audit.event("no-redact")
    except AuditError as error:
        raise StartError(f"--audit-log {config.audit_log}: {error.reason}") from None
    if not written:
        raise StartError(f"--audit-log {config.audit_log}: it can't be written")


def authority(host: str, port: int) -> str:
    """Host and port as a URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def description(config: Config, address: tuple[str, int]) -> str:
    """One line: what listens where, upstream, TLS, log."""
    clients = "; client certificates required" if config.listen_tls and config.client_ca else ""
    if not config.upstream_tls:
        trust = ""
    elif config.insecure:
        trust = " (NOT VERIFIED: --insecure)"
    else:
        anchor = f"pinned to {config.ca_fingerprint[:16]}..." if config.ca_fingerprint else config.ca
        trust = f" (verified: {anchor or 'system store'})"
    log = "standard output" if config.audit_log == "-" else config.audit_log
    workers = f", {config.workers} workers" if config.workers > 1 else ""
    return (
        f"{__version__} listening on http{'s' * config.listen_tls}://{authority(*address)}{clients}, upstream"
        f" http{'s' * config.upstream_tls}://{authority(config.upstream_host, config.upstream_port)}{trust},"
        f" audit log {log}{workers}"
    )


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """The first of several processes: it forks the others, which serve, and starts another for one that ends.

    Raises StartError when it can't be served.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        if config.listen_tls:
            listener_context(config)  # A bad certificate is said once, here, and not by every process.
        try:
            self._gate = Gate()
        except OSError as error:
            raise StartError(f"no temporary file can be made: {error.strerror}; set TMPDIR") from None
        self._audit = AuditLog(config, self._gate)
        self._listener = listen(config)
        self._lifeline, self._held = os.pipe()
        self._ready, self._announce = os.pipe()
        self._share = Share(self._listener, self._gate, self._audit, self._lifeline, self._announce)
        self._ear, self._mouth = socket.socketpair()  # signals arrive through it, a byte each
        self._mouth.setblocking(False)
        self._children: dict[int, float] = {}  # process id: monotonic time of its start
        self._missing = 0  # processes to start again
        self._stopping = 0  # how often we were told to

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT and until every process has ended. Raises StartError."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # What matters is the byte that set_wakeup_fd writes.
        signal.set_wakeup_fd(self._mouth.fileno())
        try:
            record_start(self._audit, self._config)
            for _ in range(self._config.workers):
                self._fork()
            self._wait_until_ready()
            say(description(self._config, self._listener.getsockname()[:2]))
            while self._children or not self._stopping:
                self._turn()
            with contextlib.suppress(AuditError):  # Counted; there is nobody left to tell.
                self._audit.event("stop", Pid=os.getpid())
        finally:
            signal.set_wakeup_fd(-1)
            self._end()

    def _fork(self) -> None:
        # Held back until the child has handlers of its own: ours would swallow a stop that comes in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid:
            self._children[pid] = time.monotonic()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            return
        status = 1
        try:
            os.close(self._held)
            signal.set_wakeup_fd(-1)
            self._ear.close()
            self._mouth.close()
            status = serve(Proxy(self._config, self._share))
        except StartError as error:
            say(str(error))
        except BaseException as bug:  # A traceback is of no use to an operator, and nothing may return into the parent.
            say(f"internal error in worker {os.getpid()}: {type(bug).__name__}: {bug}; please report it")
        finally:
            os._exit(status)

    def _wait_until_ready(self) -> None:
        deadline = Deadline(30.0)
        ready = 0
        while ready < self._config.workers:
            if select.select([self._ready], [], [], min(0.1, deadline.remaining()))[0]:
                ready += len(os.read(self._ready, 64))
            self._reap()
            if self._missing or not deadline.remaining():
                self._signal_all(signal.SIGTERM)
                raise StartError("a worker process did not start; the lines above say why")

    def _turn(self) -> None:
        """Wait a second, or for a signal, and see to it."""
        if select.select([self._ear], [], [], 1.0)[0]:
            for number in self._ear.recv(64):
                self._react(number)
        self._reap()
        self._audit.check()
        while self._missing and not self._stopping:
            self._missing -= 1
            self._fork()

    def _react(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stopping += 1
            self._signal_all(signal.SIGTERM)
        elif number == signal.SIGHUP and self._audit.reopen():  # Ours first: it claims the new file for all.
            self._signal_all(signal.SIGHUP)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):  # It has just ended and is reaped next.
                os.kill(pid, number)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            lived = time.monotonic() - self._children.pop(pid)
            if self._stopping:
                continue
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            say(f"worker {pid} {how} after {lived:.0f} seconds; another is started")
            with contextlib.suppress(AuditError):  # Counted.
                self._audit.event("worker-lost", Pid=pid)
            self._missing += 1

    def _end(self) -> None:
        for pid in list(self._children):
            os.waitpid(pid, 0)
        self._audit.close()
        self._gate.close()
        for thing in (self._listener, self._ear, self._mouth):
            thing.close()
        for fd in (self._lifeline, self._held, self._ready, self._announce):
            os.close(fd)


def serve(proxy: Proxy) -> int:
    """Serve in this process until SIGTERM or SIGINT; the exit status. Raises StartError."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: proxy.stop())
    signal.signal(signal.SIGHUP, lambda *_: proxy.reopen())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    proxy.serve()
    return 0


def run(config: Config) -> int:
    """Serve with --workers processes until SIGTERM or SIGINT; the exit status. Raises StartError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):  # Fewer connections then; the limit follows from what there is.
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if config.workers == 1:
        return serve(Proxy(config))
    Supervisor(config).serve()
    return 0


# == Command line ===============================================================================================
# Words to Config, and Config to an exit status. The only place that knows option names' types and defaults.

_SIZE = re.compile(r"([0-9]{1,15})(b|kb|mb|gb|tb)?", re.IGNORECASE)
_UNITS = {"b": 1, "kb": KIB, "mb": MIB, "gb": 1024 * MIB, "tb": 1024 * 1024 * MIB}


def as_size(text: str) -> int:
    """A size in Elasticsearch's units (`512kb`, `100mb`), in bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512kb, 100mb, 1gb")
    return int(match[1]) * _UNITS[(match[2] or "b").lower()]


def as_body_size(text: str) -> int | None:
    """`full`, `none` or a size."""
    return None if text == "full" else 0 if text == "none" else as_size(text)


def as_port(text: str) -> int:
    """A TCP port; 0 is any free one."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def as_count(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def as_workers(text: str) -> int:
    """A number of processes; `auto` is the number of processors this process may use."""
    if text == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return as_count(text)


def as_seconds(text: str) -> float:
    """Seconds, a fraction allowed."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def as_fingerprint(text: str) -> str:
    """A SHA-256 in hex, with or without colons, as elasticsearch-py takes it."""
    digits = text.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise argparse.ArgumentTypeError("a SHA-256 fingerprint has 64 hexadecimal digits")
    return digits


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with which option, and end with 2."""
        self.exit(2, f"es-proxy: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="es_proxy.py",
        description="Relay Elasticsearch requests unchanged and record every one of them.",
        epilog="Sizes take Elasticsearch's units: 512kb, 100mb, 1gb. The file's first lines are the manual.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("upstream_host", metavar="REMOTE_HOST", help="name or address of the coordinator node")
    add("upstream_port", metavar="REMOTE_PORT", type=as_port)
    add("listen_host", metavar="LOCAL_HOST", help="name or address to listen on")
    add("listen_port", metavar="LOCAL_PORT", type=as_port, help="0: any free one, named at start")
    tls = parser.add_argument_group("TLS")
    add = tls.add_argument
    add("--no-tls", action="store_true", help="plain HTTP on both sides, the same as --tls none")
    add("--tls", choices=("both", "listen", "upstream", "none"), help="which side speaks TLS (default: both)")
    add("--cert", metavar="PATH", default=DEFAULT_CERT, help="listener's certificate chain (default: %(default)s)")
    add("--key", metavar="PATH", default=DEFAULT_KEY, help="its private key (default: %(default)s)")
    add("--client-ca", metavar="PATH", help="require client certificates signed by these CAs")
    add("--ca", metavar="PATH", help="CAs the upstream is verified against (default: the system's store)")
    add("--ca-fingerprint", metavar="SHA256", type=as_fingerprint, help="pin the upstream's CA or certificate")
    add("--insecure", action="store_true", help="do not verify the upstream's certificate")
    audit = parser.add_argument_group("audit log")
    add = audit.add_argument
    add("--audit-log", metavar="PATH", default="-", help="where records go (default: -, standard output)")
    add("--audit-format", choices=tuple(FORMS), default="text", help="form of the records (default: %(default)s)")
    add("--audit-body", metavar="full|none|SIZE", dest="audit_body_bytes", type=as_body_size, default="full",
        help="how much of a request body is recorded (default: full)")  # fmt: skip
    add(
        "--audit-on-failure",
        choices=("block", "pass"),
        default="block",
        help="a record can't be written: refuse the request, or relay it and count the loss (default: %(default)s)",
    )
    add(
        "--audit-sync",
        choices=("none", "always"),
        default="none",
        help="fsync each request's record before forwarding (default: %(default)s)",
    )
    add("--no-redact", action="store_true", help="record secrets in bodies too")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--workers", metavar="N|auto", type=as_workers, default=1,
        help="processes; auto: one a processor (default: %(default)s)")  # fmt: skip
    add("--threads", metavar="N", type=as_count, default=256, help="most requests in flight (default: %(default)s)")
    add("--max-connections", metavar="N", type=as_count, default=0,
        help="most client connections (default: what the file descriptors allow)")  # fmt: skip
    add("--max-body", metavar="SIZE", dest="max_body_bytes", type=as_size, default="100mb",
        help="largest request body (default: %(default)s)")  # fmt: skip
    add("--upstream-timeout", metavar="S", dest="upstream_timeout_seconds", type=as_seconds, default="300",
        help="silence allowed while waiting for the response (default: %(default)s)")  # fmt: skip
    add("--drain", metavar="S", dest="drain_seconds", type=as_seconds, default="30",
        help="how long a stop waits for requests in flight (default: %(default)s)")  # fmt: skip
    parser.add_argument("--version", action="version", version=f"es-proxy {__version__}")
    return parser


def parse_args(argv: list[str]) -> Config:
    """The command line as Config. Bad words end the process with status 2 and one line."""
    parser = _parser()
    words = vars(parser.parse_args(argv))
    no_tls, tls = words.pop("no_tls"), words.pop("tls")
    words["audit_pass"] = words.pop("audit_on_failure") == "pass"
    words["audit_sync"] = words.pop("audit_sync") == "always"
    words["redact"] = not words.pop("no_redact")
    if no_tls and tls not in (None, "none"):
        parser.error(f"argument --no-tls: contradicts --tls {tls}")
    tls = "none" if no_tls else tls or "both"
    config = Config(listen_tls=tls in ("both", "listen"), upstream_tls=tls in ("both", "upstream"), **words)
    trust = [name for name in ("insecure", "ca", "ca_fingerprint") if getattr(config, name)]
    options = " and ".join("--" + name.replace("_", "-") for name in trust)
    if len(trust) > 1:
        parser.error(f"argument {options}: only one of them says whom to trust")
    if trust and not config.upstream_tls:
        parser.error(f"argument {options}: the upstream is spoken to without TLS, there is nothing to verify")
    if not config.listen_tls and config.client_ca:
        parser.error("argument --client-ca: clients are spoken to without TLS, they can't show certificates")
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit status."""
    config = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return run(config)
    except StartError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
