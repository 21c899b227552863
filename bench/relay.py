"""A bare relay: a thread for each connection, no parsing, no log. The least that a proxy in Python can do.

python3 relay.py PORT UPSTREAM_PORT

Bytes go both ways between a client and a connection of its own to the upstream, both on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading

BACKLOG = 4096
PIECE_BYTES = 64 * 1024


def set_no_delay(sock: socket.socket) -> None:
    """Send small writes at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def pump(client: socket.socket, upstream: socket.socket) -> None:
    """Carry bytes both ways until both sides have ended."""
    sides = {client.fileno(): (client, upstream), upstream.fileno(): (upstream, client)}
    poll = select.poll()
    for fd in sides:
        poll.register(fd, select.POLLIN)
    while sides:
        for fd, _ in poll.poll():
            source, target = sides[fd]
            piece = source.recv(PIECE_BYTES)
            if piece:
                target.sendall(piece)
                continue
            poll.unregister(fd)
            del sides[fd]
            target.shutdown(socket.SHUT_WR)


def serve(client: socket.socket, upstream_port: int) -> None:
    """Connect to the upstream and relay; a reset on either side ends both."""
    with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", upstream_port)) as upstream:
        set_no_delay(client)
        set_no_delay(upstream)
        pump(client, upstream)


def main() -> None:
    """Accept for ever."""
    port, upstream_port = int(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", port), backlog=BACKLOG) as listener:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client, upstream_port), daemon=True).start()


if __name__ == "__main__":
    main()
