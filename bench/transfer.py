"""The load that wrk isn't made for: large bodies, and many idle connections.

python3 transfer.py download HOST:PORT PATH --seconds 4 [--tls] [--digest] [--body FILE]
python3 transfer.py upload   HOST:PORT PATH --seconds 4 [--tls] --body FILE
python3 transfer.py idle     HOST:PORT PATH --count 10000 [--body FILE]

download and upload repeat one exchange on one connection until the time is over (or --most exchanges are done), finish
the one they are at, and print one line of JSON, the same as load.lua prints. A plain response is dropped in the kernel
(MSG_TRUNC), so that the client doesn't limit what is measured; --digest reads it and adds its SHA-256.
idle opens the connections, has one request answered on each, prints `ready N` and holds them until standard input ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import ssl
import statistics
import sys
import time
from collections.abc import Callable
from typing import Protocol

PIECE_BYTES = 1024 * 1024
HEAD_BYTES = 64 * 1024
SILENCE_SECONDS = 30.0
AUTHORIZATION = "Basic YmVuY2g6c2VjcmV0"  # bench:secret
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)


class Hash(Protocol):
    """What hashlib returns."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class BadAnswerError(Exception):
    """The peer closed early, or answered with another status than 200."""


class Client:
    """One connection that repeats one request."""

    def __init__(self, address: tuple[str, int], tls: bool, head: bytes, body: str, buffer: memoryview) -> None:
        self._address = address
        self._tls = tls
        self._head = head
        self._body = body
        self._buffer = buffer  # may be shared: it holds nothing between two exchanges
        self._sock = self._connect()

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, SILENCE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._tls:
            return sock
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # as wrk does: the proxy's own verification is what is measured
        return context.wrap_socket(sock)

    def reconnect(self) -> None:
        """Start anew after an error."""
        self._sock.close()
        self._sock = self._connect()

    def exchange(self, digest: Hash | None = None) -> int:
        """One request and its response; returns how many bytes of body went up or came down, whichever is more."""
        self._sock.sendall(self._head)
        sent = 0
        if self._body:
            with open(self._body, "rb") as file:
                sent = self._sock.sendfile(file)
        return max(sent, self._receive(digest))

    def _receive(self, digest: Hash | None) -> int:
        count, end = 0, -1
        while end < 0:
            size = self._sock.recv_into(self._buffer[count:HEAD_BYTES])
            if not size:
                raise BadAnswerError("closed before a response")
            count += size
            end = bytes(self._buffer[:count]).find(b"\r\n\r\n")
        end += 4
        head = bytes(self._buffer[:end])
        length = LENGTH.search(head)
        if head.split(b" ", 2)[1] != b"200" or length is None:
            raise BadAnswerError(head.partition(b"\r\n")[0].decode("latin-1"))
        if digest:
            digest.update(self._buffer[end:count])
        self._receive_body(int(length[1]) - (count - end), digest)
        return int(length[1])

    def _receive_body(self, left: int, digest: Hash | None) -> None:
        flags = 0 if digest or self._tls else socket.MSG_TRUNC
        while left > 0:
            size = self._sock.recv_into(self._buffer, min(left, PIECE_BYTES), flags)
            if not size:
                raise BadAnswerError("closed in the middle of a response")
            if digest:
                digest.update(self._buffer[:size])
            left -= size


def percentile(sorted_values: list[float], share: float) -> float:
    """The value that so large a share of them doesn't exceed."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))] if sorted_values else 0.0


def repeat(client: Client, seconds: float, most: int) -> dict[str, object]:
    """Exchange until the time is over; the outcome as load.lua words it."""
    micros: list[float] = []
    failures = size = 0
    begin = now = time.monotonic()
    while now - begin < seconds and (not most or len(micros) < most) and failures < 10:
        try:
            size += client.exchange()
        except (OSError, BadAnswerError) as error:
            failures += 1
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            client.reconnect()
        else:
            micros.append((time.monotonic() - now) * 1e6)
        now = time.monotonic()
    micros.sort()
    return {
        "requests": len(micros),
        "seconds": now - begin,
        "bytes": size,
        "p50_us": statistics.median(micros) if micros else 0.0,
        "p90_us": percentile(micros, 0.90),
        "p99_us": percentile(micros, 0.99),
        "max_us": micros[-1] if micros else 0.0,
        "errors": {"read": failures},
    }


def digested(client: Client) -> dict[str, object]:
    """One exchange, its response read and hashed."""
    digest: Hash = hashlib.sha256()
    client.exchange(digest)
    return {"sha256": digest.hexdigest()}


def hold(make_client: Callable[[], Client], count: int) -> None:
    """Open connections, use each once, and keep them until standard input ends."""
    clients = []
    for _ in range(count):
        client = make_client()
        client.exchange()
        clients.append(client)
    print(f"ready {len(clients)}", flush=True)
    sys.stdin.read()


def request_head(method: str, host: str, path: str, length: int) -> bytes:
    """The head of the request, as an Elasticsearch client writes it."""
    fields = {
        "Host": host,
        "Authorization": AUTHORIZATION,
        "User-Agent": "elasticsearch-py/8.15.0 (Python/3.12.3; elastic-transport/8.15.0)",
        "Content-Type": "application/json",
        "Content-Length": str(length),
    }
    return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n").encode()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["download", "upload", "idle"])
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("path")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long (default: 4)")
    parser.add_argument("--most", type=int, default=0, help="most exchanges (default: no limit)")
    parser.add_argument("--count", type=int, default=10_000, help="idle connections (default: 10000)")
    parser.add_argument("--body", default="", help="file with the request's body")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--digest", action="store_true", help="one exchange only, with its SHA-256")
    return parser.parse_args()


def main() -> None:
    """Do what was asked for."""
    options = parse_args()
    host, _, port = options.address.rpartition(":")
    with open(options.body or "/dev/null", "rb") as file:
        length = file.seek(0, 2)
    method = "GET" if options.what == "download" else "POST"
    head = request_head(method, options.address, options.path, length)

    buffer = memoryview(bytearray(PIECE_BYTES))

    def make_client() -> Client:
        return Client((host, int(port)), options.tls, head, options.body, buffer)

    if options.what == "idle":
        hold(make_client, options.count)
    elif options.digest:
        print(json.dumps(digested(make_client())))
    else:
        print(json.dumps(repeat(make_client(), options.seconds, options.most)))


if __name__ == "__main__":
    main()
