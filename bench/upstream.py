"""The upstream for what nginx can't be: an answer after a pause, and a cheap reader of large bodies.

python3 upstream.py PORT --delay-ms 10

One thread, one epoll. Every request, whatever it is, is read whole (a long body is dropped in the kernel, MSG_TRUNC)
and answered after the pause with the same small JSON. GET /_mock/stats answers at once: {"requests": N}, itself not
counted. It reads what the benchmark sends, not HTTP at large: Content-Length only, one request at a time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import select
import socket
import time
from dataclasses import dataclass, field

BACKLOG = 4096
RECEIVE_BYTES = 64 * 1024
DISCARD_BYTES = 1024 * 1024  # at once; the buffer is never written to
STATS = b"GET /_mock/stats "
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)
ANSWER = b'{"took":3,"timed_out":false,"errors":false,"hits":{"total":{"value":0,"relation":"eq"},"hits":[]}}'


def response(body: bytes) -> bytes:
    """A complete response with that body."""
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nX-elastic-product: Elasticsearch\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@dataclass(eq=False)
class Connection:
    """One client: what has arrived of a head, and how much of a body is still to come."""

    sock: socket.socket
    head: bytearray = field(default_factory=bytearray)
    left_bytes: int = 0


class Upstream:
    """The loop."""

    def __init__(self, port: int, delay_seconds: float) -> None:
        self._delay_seconds = delay_seconds
        self._listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._due: collections.deque[tuple[float, Connection]] = collections.deque()  # ordered: one delay for all
        self._scratch = bytearray(DISCARD_BYTES)
        self._answer = response(ANSWER)
        self._requests = 0

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for fd, _ in self._wait():
                connection = self._connections.get(fd)
                if connection is None:
                    self._accept()
                else:
                    self._read(connection)
            self._answer_due()

    def _wait(self) -> list[tuple[int, int]]:
        if self._due:  # epoll_wait counts in milliseconds, select in microseconds
            pause = self._due[0][0] - time.monotonic()
            if pause > 0:
                select.select([self._epoll], [], [], pause)
            return self._epoll.poll(0)
        return self._epoll.poll()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[sock.fileno()] = Connection(sock)
                self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _close(self, connection: Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()

    def _read(self, connection: Connection) -> None:
        try:
            self._take(connection)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)

    def _take(self, connection: Connection) -> None:
        if connection.left_bytes:
            wanted = min(connection.left_bytes, DISCARD_BYTES)
            count = connection.sock.recv_into(self._scratch, wanted, socket.MSG_TRUNC)
            if not count:
                raise ConnectionResetError
            connection.left_bytes -= count
            if not connection.left_bytes:
                self._complete(connection)
            return
        piece = connection.sock.recv(RECEIVE_BYTES)
        if not piece:
            raise ConnectionResetError
        connection.head += piece
        self._parse(connection)

    def _parse(self, connection: Connection) -> None:
        end = connection.head.find(b"\r\n\r\n")
        if end < 0:
            return
        if connection.head.startswith(STATS):
            connection.sock.sendall(response(json.dumps({"requests": self._requests}).encode()))
            connection.head.clear()
            return
        length = LENGTH.search(connection.head, 0, end)
        connection.left_bytes = (int(length[1]) if length else 0) - (len(connection.head) - end - 4)
        connection.head.clear()
        if connection.left_bytes <= 0:
            connection.left_bytes = 0
            self._complete(connection)

    def _complete(self, connection: Connection) -> None:
        self._requests += 1
        if self._delay_seconds:
            self._due.append((time.monotonic() + self._delay_seconds, connection))
        else:
            connection.sock.sendall(self._answer)

    def _answer_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            connection = self._due.popleft()[1]
            with contextlib.suppress(OSError):  # it left meanwhile: its socket is closed, or is about to be
                connection.sock.sendall(self._answer)


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="pause before each answer (default: none)")
    options = parser.parse_args()
    Upstream(options.port, options.delay_ms / 1000).run()


if __name__ == "__main__":
    main()
