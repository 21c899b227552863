"""What the audit log promises. Each section opens with the promise in one sentence; its tests fail when it is broken.

    python3 test_audit.py --torture SECONDS [--seed N]

kills, starves, rotates and restarts a proxy under load for that long and checks the promises after every round; exit
status 1 and the evidence kept when one is broken. Faults are real ones (full file systems, resource limits, closed
pipes, killed processes); where only a replaced function can do it, the test says why. What needs root is skipped
without it.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.client
import ipaddress
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

import es_proxy
from mock_es import MockES, MockProcess, big_body
from test_es_proxy import (
    PATIENCE,
    Pki,
    Record,
    Running,
    background,
    basic,
    error_of,
    exchange,
    make_config,
    nothing_left,
    pairs,
    parse_line,
    pki,
    proxy_process,
    read_all,
    read_log,
    refused_start,
    running_proxy,
    wait_until,
)

__all__ = ["pki"]  # a fixture
HERE = Path(__file__).parent
POOL = random.Random(4).randbytes(1 << 16) * 400  # 25 MiB that bodies are cut from

# -- Tools -------------------------------------------------------------------------------------------------------


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


def words(port: int, log: Path | str, *more: str) -> tuple[str, ...]:
    """The command line of a plain HTTP proxy before an upstream on that port."""
    return ("127.0.0.1", str(port), "127.0.0.1", "0", "--no-tls", "--audit-log", str(log), *more)


def ask(port: int, mark: str, body: bytes = b"", target: str = "/_mock/sink") -> int:
    """One request with that X-Opaque-Id on a connection of its own; the status."""
    return answer(port, mark, body, target)[0]


def answer(port: int, mark: str, body: bytes = b"", target: str = "/_mock/sink") -> tuple[int, bytes]:
    """The same; status and body."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        return exchange(connection, "POST", target, body, {"X-Opaque-Id": mark})


def raw_request(mark: str, body: bytes = b"", length: int | None = None) -> bytes:
    """A request as bytes; `length` is what it claims its body has."""
    head = f"POST /_mock/sink HTTP/1.1\r\nHost: a\r\nX-Opaque-Id: {mark}\r\nContent-Length: "
    return head.encode() + b"%d\r\n\r\n" % (len(body) if length is None else length) + body


def marks_seen(mock: MockES) -> set[str]:
    """X-Opaque-Ids of the requests that reached the upstream."""
    return {value.decode() for request in mock.requests for value in request.values(b"x-opaque-id")}


def mark_of(record: Record) -> str:
    """A record's X-Opaque-Id."""
    return es_proxy.unescape(record.marks.get("Opaque-Id", "").encode()).decode()


def events(records: Iterable[Record], name: str) -> list[Record]:
    """The log's events of that name."""
    return [record for record in records if record.kind == "event" and record.id == name]


def children(pid: int) -> list[int]:
    """Processes that this one has forked."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="latin-1") as file:
                if file.read().rpartition(")")[2].split()[1] == str(pid):
                    found.append(int(entry))
    return found


@contextlib.contextmanager
def handles(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """A handle for each process that is still there: its number can't come to mean another one."""
    opened: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                opened[pid] = os.pidfd_open(pid)
        yield opened
    finally:
        for handle in opened.values():
            os.close(handle)


def wait_for_end(handle: int) -> None:
    """Wait until a process has ended."""
    assert select.select([handle], [], [], PATIENCE)[0], "a process does not end"


def command(*line: str) -> None:
    """Run a program of the system; the test is skipped where it is missing or may not do it."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        pytest.skip(f"{line[0]} is missing")
    if done.returncode:
        pytest.skip(f"{' '.join(line)}: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(place: Path, *line: str) -> Iterator[Path]:
    """A file system on `place` while the block lasts."""
    place.mkdir(exist_ok=True)
    command("mount", *line, str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], timeout=PATIENCE, check=True)


def small_disk(place: Path, size: str = "1m") -> contextlib.AbstractContextManager[Path]:
    """A file system of that size."""
    return mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def fill(ballast: Path) -> None:
    """Take all room that is left on a file system."""
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


class PipeReader:
    """Reads a pipe in a thread until `leave`; `text` is what came. A small `piece`, in bytes, makes it slow."""

    def __init__(self, pipe: Path | int, piece: int = 65536) -> None:
        self._fd = pipe if isinstance(pipe, int) else os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._fd, False)
        self._ear, self._mouth = os.pipe()
        self._piece = piece
        self._pieces: list[bytes] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def text(self) -> str:
        """All that was read so far."""
        return b"".join(self._pieces).decode("ascii")

    def leave(self) -> None:
        """Read what is there and close."""
        os.close(self._mouth)
        self._thread.join()

    def _run(self) -> None:
        leaving = False
        while True:
            leaving = leaving or bool(select.select([self._ear], [], [], 0)[0])
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._fd, self._piece)
            self._pieces.append(data)
            if not data and leaving:
                break
            if not data:  # Nothing yet, or no writer yet, which select does not tell apart.
                select.select([self._ear], [], [], 0.005)
        os.close(self._fd)
        os.close(self._ear)


@dataclasses.dataclass
class Arrival:
    """A request at the upstream: its X-Opaque-Id, and what the log held when the first byte came."""

    mark: str
    log: bytes


class Witness(socketserver.ThreadingTCPServer):
    """An upstream that reads the log when the first byte of a request comes, before it looks at that request.

    Each answer is up to `reply`, which gets the connection.
    """

    request_queue_size = 256
    allow_reuse_address = True

    def __init__(self, log: Path, reply: Callable[[Arrival, socket.socket], None] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _WitnessConnection)
        self.port = self.server_address[1]
        self.log = log
        self.reply = reply or (lambda _, sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
        self.arrivals: list[Arrival] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _WitnessConnection(socketserver.BaseRequestHandler):
    server: Witness

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := self.request.recv(65536):
                held = self.server.log.read_bytes()
                while b"\r\n\r\n" not in data:
                    data += self.request.recv(65536)
                head, _, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                missing = int(length[1]) - len(body) if length else 0
                while missing > 0:
                    missing -= len(self.request.recv(missing))
                mark = re.search(rb"(?i)\r\nx-opaque-id: (\S+)", head)
                arrival = Arrival(mark[1].decode() if mark else "", held)
                self.server.arrivals.append(arrival)
                self.server.reply(arrival, self.request)


class Load:
    """Clients that ask without pause; `outcomes` tells by X-Opaque-Id what each request came to, 0: no whole response.

    Nobody asks before `resume` has named a port.
    """

    TARGETS = ("/_mock/sink", "/_mock/sink", "/_mock/chunked?bytes=3000", "/_mock/slow?ms=5")

    def __init__(self, clients: int, seed: int, sizes: tuple[int, ...] = (0, 0, 20, 3000)) -> None:
        self.outcomes: dict[str, int] = {}
        self._sizes = sizes
        self._port = 0
        self._up = threading.Event()
        self._stopping = False
        seeds = random.Random(seed)
        self._threads = [
            threading.Thread(target=self._run, args=(f"{seed}-{number}", random.Random(seeds.random())))
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def resume(self, port: int) -> None:
        """Ask there."""
        self._port = port
        self._up.set()

    def pause(self) -> None:
        """Nobody is there: ask no more, what is under way excepted."""
        self._up.clear()

    def more(self, count: int) -> None:
        """Wait until so many more requests were begun."""
        goal = len(self.outcomes) + count
        wait_until(lambda: len(self.outcomes) >= goal, f"{count} more requests")

    def stop(self) -> None:
        """Wait for what is under way and end."""
        self._stopping = True
        self._up.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str, rng: random.Random) -> None:
        number = 0
        while not self._stopping:
            self._up.wait()
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
                with contextlib.closing(connection):
                    connection.connect()
                    while self._up.is_set() and not self._stopping:
                        mark = f"{name}-{number}"
                        number += 1
                        self.outcomes[mark] = 0
                        body, target = POOL[: rng.choice(self._sizes)], rng.choice(self.TARGETS)
                        self.outcomes[mark] = exchange(connection, "POST", target, body, {"X-Opaque-Id": mark})[0]


@dataclasses.dataclass
class Evidence:
    """What log files hold."""

    requests: dict[str, str] = dataclasses.field(default_factory=dict)  # X-Opaque-Id by UUID
    responses: set[str] = dataclasses.field(default_factory=set)  # UUIDs
    events: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    torn: int = 0

    def add(self, record: Record) -> None:
        """Count a whole line; no UUID stands on two lines of a kind."""
        if record.kind == "event":
            self.events[record.id] += 1
        elif record.kind == "request":
            assert record.id not in self.requests, f"recorded twice: {record.line[:300]}"
            self.requests[record.id] = mark_of(record)
        else:
            assert record.id not in self.responses, f"recorded twice: {record.line[:300]}"
            self.responses.add(record.id)

    def check(self, seen: set[str], outcomes: dict[str, int]) -> None:
        """What the upstream saw and what clients got is on record, once."""
        recorded = collections.Counter(self.requests.values())
        assert all(count == 1 for count in recorded.values()), "a request was recorded under two UUIDs"
        assert not seen - set(recorded), f"unrecorded requests reached the upstream: {sorted(seen - set(recorded))}"
        assert self.responses <= set(self.requests), "a response without its request"
        answered = {self.requests[identifier] for identifier in self.responses}
        got = {mark for mark, status in outcomes.items() if status == 200}
        assert not got - answered, f"unrecorded responses reached a client: {sorted(got - answered)}"
        refused = {mark for mark, status in outcomes.items() if status == 503}
        assert not refused & seen, f"refused, but forwarded: {sorted(refused & seen)}"
        orphans = set(recorded) - answered
        lost = {mark for mark, status in outcomes.items() if status in (0, 500)}
        assert not orphans - lost, f"a whole answer, but no response record: {sorted(orphans - lost)}"


_TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ")


def inspect(files: Iterable[Path]) -> Evidence:
    """Read log files; a torn line is the last of its file, or closed off by `Event: recovered`."""
    evidence = Evidence()
    for path in files:
        before: bytes | None = None  # a line of which it isn't known yet whether it is whole
        with open(path, "rb") as file:
            for line in file:
                assert len(_TIMESTAMP.findall(line)) <= 1, f"two records on one line of {path}: {line[:300]!r}"
                if b"Z Event: recovered" in line[:60]:
                    assert before is not None, "nothing was torn here"
                    evidence.torn += 1
                    before = None
                if before is not None:
                    evidence.add(parse_line(before.decode("ascii")[:-1]))
                before = line
        if before is not None and before.endswith(b"\n"):
            evidence.add(parse_line(before.decode("ascii")[:-1]))
        elif before is not None:
            evidence.torn += 1
    return evidence


class Storm:
    """A proxy that is killed, starved and rotated under load, and what came of it."""

    def __init__(self, directory: Path, workers: int, seed: int, sizes: tuple[int, ...] = (0, 0, 20, 3000)) -> None:
        self.log = directory / "audit.log"
        self.mock = MockES()
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.evidence = Evidence()
        self._directory = directory
        self._workers = workers
        self._seed = seed
        self._sizes = sizes
        self._life = contextlib.ExitStack()

    def __enter__(self) -> Storm:
        self.mock.start()
        self.load = Load(8, self._seed, self._sizes)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.load.stop()
            self._life.close()
        finally:
            self.mock.stop()

    def _start(self) -> None:
        more = ("--workers", str(self._workers), "--drain", "5")
        self.process, self.port, self.lines = self._life.enter_context(
            proxy_process(*words(self.mock.port, self.log, *more))
        )
        self.counts["starts"] += 1
        self.load.resume(self.port)

    def strike(self) -> None:
        """Kill, at some moment of the load, a worker or the first process, and see that it goes on."""
        self.load.more(self.rng.randrange(1, 40))
        if self._workers > 1 and self.rng.random() < 0.8:
            self._kill_worker()
        else:
            self._kill_first()

    def strike_in_line(self) -> None:
        """Kill all who write when a long line has begun to appear in the log; at times it is just complete."""
        mark = f"{self._seed}-long-{self.counts['kills']}"
        self.load.outcomes[mark] = 0
        with (
            handles(children(self.process.pid)) as workers,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock,
        ):
            sock.sendall(raw_request(mark, POOL[: 12 << 20]))
            goal = self.log.stat().st_size + (1 << 20)
            while not select.select([sock], [], [], 0)[0] and self.log.stat().st_size < goal:
                pass  # Within milliseconds it is over: a pause would miss it.
            for handle in workers.values():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        self._kill_first()

    def _kill_worker(self) -> None:
        wait_until(lambda: len(children(self.process.pid)) == self._workers, "all workers are there")
        with handles([self.rng.choice(children(self.process.pid))]) as opened:
            for handle in opened.values():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                self.counts["kills"] += 1
                wait_for_end(handle)

    def _kill_first(self) -> None:
        with handles(children(self.process.pid)) as workers:
            self.process.kill()
            self.process.wait()
            self.load.pause()
            self.counts["kills"] += 1
            for handle in workers.values():  # They see that it is gone, finish what they have, and end.
                wait_for_end(handle)
        self._life.close()
        self._start()

    def rotate(self) -> None:
        """Rename the log and tell the proxy."""
        self.counts["rotations"] += 1
        with contextlib.suppress(FileNotFoundError):  # The last one is still under way.
            self.log.rename(self.log.with_name(f"audit.log.{self.counts['rotations']}"))
        self.process.send_signal(signal.SIGHUP)

    def starve(self) -> None:
        """Fill the file system for a while."""
        self.counts["outages"] += 1
        ballast = self._directory / "ballast"
        fill(ballast)
        self.load.more(20)
        ballast.unlink()

    def finish(self) -> None:
        """End the load and the proxy, and check everything."""
        self.load.stop()
        self._life.close()
        assert self.process.returncode == 0
        self.evidence = inspect(self._directory.glob("audit.log*"))
        self.evidence.check(marks_seen(self.mock), self.load.outcomes)
        self.counts["requests"] = len(self.load.outcomes)
        self.counts["answered"] = sum(status == 200 for status in self.load.outcomes.values())
        self.counts["refused"] = sum(status == 503 for status in self.load.outcomes.values())
        self.counts["torn lines"] = self.evidence.torn
        self.counts["gaps"] = self.evidence.events["gap"]


# == Write ahead =================================================================================================
# A request's record is in the log before a byte of it goes upstream; a response's before its last byte goes to the
# client.


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("size", [0, 100, 3 << 20], ids=["empty", "small", "spooled"])
def test_the_upstream_finds_the_record_when_the_first_byte_comes(log: Path, size: int, workers: int) -> None:
    """An upstream that reads the log on the first byte finds the whole line of the request that it is about to read."""
    with Witness(log) as witness, proxy_process(*words(witness.port, log, "--workers", str(workers))) as (_, port, _):
        with ThreadPoolExecutor(8) as pool:
            statuses = list(
                pool.map(lambda number: ask(port, f"w{number}", POOL[:size]), range(40 if size < 999 else 8))
            )
        assert set(statuses) == {200}
    assert len(witness.arrivals) == len(statuses)
    for arrival in witness.arrivals:
        line = next(
            (each for each in arrival.log.split(b"\n") if b" Opaque-Id: %b" % arrival.mark.encode() in each), b""
        )
        assert parse_line(line.decode()).body == POOL[:size]


@pytest.mark.parametrize(
    "path",
    [
        "/_mock/sink", "/_mock/big?bytes=3000000", "/_mock/chunked?bytes=300000", "/_mock/no-length?bytes=1000",
        "/_mock/status?code=404", "/_mock/close-before-response", "/_mock/status?code=204",
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_with_the_last_byte_finds_the_record(upstream: MockES, log: Path, path: str, version: str) -> None:
    """Whoever has read to the end of a response, in any framing, finds its record in the log at once."""
    with running_proxy(upstream.port, log) as proxy, proxy.connect() as sock:
        for _ in range(1 if version == "1.0" else 5):
            sock.sendall(f"GET {path} HTTP/{version}\r\nHost: a\r\n\r\n".encode())
            response = http.client.HTTPResponse(sock, method="GET")
            response.begin()
            response.read()
            lines = log.read_bytes()
            response.close()
            assert parse_line(lines.decode().splitlines()[-1]).kind == "response"


def test_no_byte_of_the_last_piece_comes_before_the_record(log: Path) -> None:
    """While there is no room for the response's record, the client waits for the last piece of its response."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    go_on = threading.Event()

    def reply(_: Arrival, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        assert go_on.wait(PATIENCE)
        sock.sendall(b"67890")

    with (
        Witness(HERE / "README.md", reply) as witness,
        stopped(Running(make_config(witness.port, log))) as running,
        running.connect() as sock,
    ):
        sock.sendall(raw_request("held"))
        receive_until(sock, b"12345")
        stuff(log)
        go_on.set()
        try:
            wait_until(lambda: blocked_in_write(os.getpid()), "the record waits for room in the pipe")
            assert not select.select([sock], [], [], 0)[0], "the last piece came before its record"
        finally:
            text = PipeReader(reader)
        assert sock.recv(65536) == b"67890"
        wait_until(lambda: " Status: 200 " in text.text, "the record")
    text.leave()


@contextlib.contextmanager
def stopped(running: Running) -> Iterator[Running]:
    """A proxy in this process, stopped at the end; nothing is expected of its log."""
    try:
        yield running
    finally:
        running.stop()


def receive_until(sock: socket.socket, end: bytes) -> None:
    """Read until these bytes come last."""
    data = b""
    while not data.endswith(end):
        piece = sock.recv(65536)
        assert piece, data
        data += piece


def stuff(pipe: Path) -> None:
    """Leave no room in a pipe; what is in it stays when the writer goes, as long as others have it open."""
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"#" * 4096)
    os.close(writer)


def blocked_in_write(pid: int) -> bool:
    """Whether a thread of the process waits for room in a pipe."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/wchan", encoding="ascii") as file:
            if "pipe_w" in file.read():
                return True
    return False


# == Fail closed =================================================================================================
# What can't be recorded is refused with 503 and doesn't reach the upstream, unless --audit-on-failure is pass; it
# recovers by itself, and the outage is on record.


@dataclasses.dataclass
class Outage:
    """A way in which a log fails and recovers; both calls get the proxy's process."""

    log: Path
    begin: Callable[[subprocess.Popen[bytes]], None]
    end: Callable[[subprocess.Popen[bytes]], None]
    text: Callable[[], str]  # what was written, once the proxy has ended
    counts: bool = True  # nothing vanished with a removed file: the gap counts all that was lost


@contextlib.contextmanager
def full_disk(directory: Path) -> Iterator[Outage]:
    """A small file system that is filled and emptied again."""
    with small_disk(directory / "disk") as disk:
        log, ballast = disk / "audit.log", disk / "ballast"
        yield Outage(log, lambda _: fill(ballast), lambda _: ballast.unlink(), log.read_text)


@contextlib.contextmanager
def file_size_limit(directory: Path) -> Iterator[Outage]:
    """RLIMIT_FSIZE, lowered to the file's size: EFBIG, as Python ignores SIGXFSZ."""
    log = directory / "audit.log"
    endless = resource.RLIM_INFINITY

    def limit(process: subprocess.Popen[bytes]) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size + 1000, endless))

    def lift(process: subprocess.Popen[bytes]) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (endless, endless))

    yield Outage(log, limit, lift, log.read_text)


@contextlib.contextmanager
def closed_pipe(directory: Path) -> Iterator[Outage]:
    """A FIFO whose reader ends; another comes."""
    log = directory / "audit.log"
    os.mkfifo(log)
    readers = [PipeReader(log)]
    try:
        yield Outage(
            log,
            lambda _: readers[-1].leave(),
            lambda _: readers.append(PipeReader(log)),
            lambda: "".join(reader.text for reader in readers),
        )
    finally:
        readers[-1].leave()


@contextlib.contextmanager
def removed_directory(directory: Path) -> Iterator[Outage]:
    """The log's directory is removed with all that is in it; it comes back empty."""
    place = directory / "logs"
    place.mkdir()
    log = place / "audit.log"
    yield Outage(log, lambda _: shutil.rmtree(place), lambda _: place.mkdir(), log.read_text, counts=False)


@contextlib.contextmanager
def read_only_disk(directory: Path) -> Iterator[Outage]:
    """The log is removed, and what is mounted there now can only be read: so it can't be made anew."""
    place = directory / "logs"
    place.mkdir()
    log = place / "audit.log"
    cover = contextlib.ExitStack()

    def begin(_: object) -> None:
        log.unlink()
        cover.enter_context(mounted(place, "-t", "tmpfs", "-o", "ro", "tmpfs"))

    with cover:
        yield Outage(log, begin, lambda _: cover.close(), log.read_text, counts=False)


OUTAGES = (full_disk, file_size_limit, closed_pipe, removed_directory, read_only_disk)


@dataclasses.dataclass
class Aftermath:
    """What came of an outage: statuses by X-Opaque-Id, the log's records, what was said, what the upstream saw."""

    statuses: dict[str, int]
    reasons: list[str]
    records: list[Record]
    said: list[str]
    seen: set[str]

    @property
    def recorded(self) -> set[str]:
        """X-Opaque-Ids in the log."""
        return {mark_of(record) for record in self.records if record.kind == "request"}


def go_through(kind: Callable[[Path], contextlib.AbstractContextManager[Outage]], path: Path, mode: str) -> Aftermath:
    """Requests before, during and after an outage of that kind, with --audit-on-failure `mode`."""
    statuses: dict[str, int] = {}
    reasons: list[str] = []

    def send(phase: str) -> int:
        mark = f"{phase}-{len(statuses)}"
        status, body = answer(port, mark, POOL[:9000])
        statuses[mark] = status
        if status == 503:
            reasons.append(error_of(body)["reason"])
        return status

    with MockES() as mock, kind(path) as outage:
        with proxy_process(*words(mock.port, outage.log, "--audit-on-failure", mode)) as (process, port, lines):
            assert send("before") == 200
            outage.begin(process)
            failing = lambda: (send("begin") == 503) or any("can't be written" in line for line in lines)  # noqa: E731
            wait_until(failing, "the log fails")
            assert {send("during") for _ in range(20)} == {503 if mode == "block" else 200}
            outage.end(process)
            back = lambda: send("end") == 200 and any("written again" in line for line in lines)  # noqa: E731
            wait_until(back, "the log recovers")
            assert {send("after") for _ in range(3)} == {200}
        records = [parse_line(line) for line in outage.text().splitlines()]
        return Aftermath(statuses, reasons, records, lines, marks_seen(mock))


def check_outage(result: Aftermath) -> None:
    """In either mode: whole pairs, the gap on record in front of the first line that could be written, one message."""
    pairs(result.records)
    assert {mark for mark in result.statuses if mark.startswith("after")} <= result.recorded
    assert not any(mark.startswith("during") for mark in result.recorded)
    (gap,) = events(result.records, "gap")
    after = result.records[result.records.index(gap) + 1 :]
    assert mark_of(next(record for record in after if record.kind == "request")).startswith("end")
    assert sum("can't be written" in line for line in result.said) == 1, result.said
    assert sum("written again" in line for line in result.said) == 1, result.said
    assert sum(" by somebody" in line for line in result.said) <= 1, "said once a second"


@pytest.mark.parametrize("kind", OUTAGES)
def test_a_log_that_fails_blocks_and_recovers_by_itself(kind: Any, tmp_path: Path) -> None:
    """503 with the cause, nothing upstream, one message, a gap with the number lost, and no help needed afterwards."""
    result = go_through(kind, tmp_path, "block")
    check_outage(result)
    refused = {mark for mark, status in result.statuses.items() if status == 503}
    assert not refused & result.seen
    assert not refused & result.recorded
    causes = "No space|too large|Broken pipe|No such file|Read-only"
    assert all(re.search(f"the audit record can't be written: .*({causes})", reason) for reason in result.reasons)
    if kind not in (removed_directory, read_only_disk):  # there the `removed` event is lost as well
        assert events(result.records, "gap")[0].marks["Lost"] == str(len(refused))
        assert set(result.statuses) - refused == result.recorded


@pytest.mark.parametrize("kind", OUTAGES)
def test_a_log_that_fails_lets_pass_what_is_counted(kind: Any, tmp_path: Path) -> None:
    """With `pass` every request is relayed, what is not on record is counted, one message tells of it."""
    result = go_through(kind, tmp_path, "pass")
    check_outage(result)
    assert set(result.statuses.values()) == {200}
    assert result.seen == set(result.statuses)
    if kind not in (removed_directory, read_only_disk):
        lost = len(result.seen - result.recorded)
        assert events(result.records, "gap")[0].marks["Lost"] == str(lost)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_io_error_blocks(upstream: MockES, workers: int) -> None:
    """EIO, from a terminal that was hung up: refused with the cause, nothing upstream.

    No real file gives EIO at will and takes it back again without a kernel module of its own; this one never recovers.
    """
    master, slave = os.openpty()
    path = os.ttyname(slave)
    try:
        with proxy_process(*words(upstream.port, path, "--workers", str(workers))) as (_, port, lines):
            assert ask(port, "before") == 200
            os.close(master)
            for number in range(5):
                status, body = answer(port, f"during{number}")
                assert (status, error_of(body)["code"]) == (503, "audit-unavailable")
                assert "Input/output error" in error_of(body)["reason"]
        assert 1 <= sum("can't be written" in line for line in lines) <= workers + 1
    finally:
        os.close(slave)
    assert marks_seen(upstream) == {"before"}


def test_stdout_without_a_reader_blocks(upstream: MockES) -> None:
    """The program that reads standard output ends: 503, nothing upstream, no death by SIGPIPE."""
    with proxy_process(*words(upstream.port, "-"), stdout=subprocess.PIPE) as (process, port, lines):
        assert ask(port, "before") == 200
        assert process.stdout is not None
        process.stdout.close()
        assert {ask(port, f"during{number}") for number in range(5)} == {503}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert sum("can't be written" in line for line in lines) == 1
    assert marks_seen(upstream) == {"before"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [900_000, 3 << 20], ids=["memory", "spooled"])
def test_a_line_for_which_there_is_too_little_room_leaves_no_trace(
    upstream: MockES, tmp_path: Path, size: int, workers: int
) -> None:
    """The kernel takes a part of the line: it is taken back, the request refused, and smaller ones go on at once."""
    with small_disk(tmp_path / "disk") as disk:
        log = disk / "audit.log"
        with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (_, port, _):
            for number in range(3):
                assert ask(port, f"small{number}", b"x") == 200
                before = log.read_bytes()
                assert ask(port, f"large{number}", POOL[:size]) == 503
                assert log.read_bytes() == before
            assert ask(port, "last", b"x") == 200
        records = read_log(log)
    assert len(pairs(records)) == 4
    assert sum(int(gap.marks["Lost"]) for gap in events(records, "gap")) == 3
    assert marks_seen(upstream) == {"small0", "small1", "small2", "last"}


def test_a_response_that_cant_be_recorded_is_not_delivered(tmp_path: Path) -> None:
    """The disk fills up while the upstream works: 500, which no client answers by sending the request again."""
    arrived, go_on = threading.Event(), threading.Event()

    def reply(_: Arrival, sock: socket.socket) -> None:
        arrived.set()
        assert go_on.wait(PATIENCE)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")

    with small_disk(tmp_path / "disk") as disk, Witness(HERE / "README.md", reply) as witness:
        log = disk / "audit.log"
        with proxy_process(*words(witness.port, log)) as (process, port, _):
            with background(answer, port, "a") as future:
                assert arrived.wait(PATIENCE)
                size = log.stat().st_size
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                go_on.set()
                status, body = future.result()
            assert (status, error_of(body)["code"]) == (500, "audit-response-lost")
            assert b"secret" not in body
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert ask(port, "b") == 200
        records = read_log(log)
    assert [record.kind for record in records] == ["event", "request", "event", "request", "response", "event"]
    assert events(records, "gap")[0].marks["Lost"] == "1"


@contextlib.contextmanager
def unwritable(kind: str, directory: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A log that can't be written from the start: path, options of the process, a word of the cause."""
    with contextlib.ExitStack() as stack:
        if kind == "full-device":
            yield "/dev/full", {}, "No space left"
        elif kind == "io-error":  # /proc/self/mem at address 0
            yield "/proc/self/mem", {}, "Input/output error"
        elif kind == "file-size":
            limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
            # Without coverage, which could not write its data either, and says so at length.
            calm = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
            yield str(directory / "log"), {"preexec_fn": limit, "env": calm}, "too large|temporary"
        elif kind == "full-disk":
            disk = stack.enter_context(small_disk(directory / "disk"))
            fill(disk / "ballast")
            yield str(disk / "log"), {}, "No space left"
        elif kind == "read-only":
            disk = stack.enter_context(mounted(directory / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"))
            yield str(disk / "log"), {}, "Read-only"
        elif kind == "no-directory":
            yield str(directory / "missing" / "log"), {}, "No such file"
        else:
            os.mkfifo(directory / "fifo")
            yield str(directory / "fifo"), {}, "nobody reads"


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "kind", ["full-device", "io-error", "file-size", "full-disk", "read-only", "no-directory", "fifo"]
)
def test_nothing_is_served_without_a_log(kind: str, workers: str, tmp_path: Path) -> None:
    """A log that can't be written at the start: exit status 2 and one line with path and cause."""
    with unwritable(kind, tmp_path) as (path, options, cause):
        line = refused_start(*words(1, path, "--workers", workers), **options)
    assert f"--audit-log {path}" in line or "temporary" in line
    assert re.search(cause, line)


def test_nothing_is_served_into_a_closed_pipe() -> None:
    """Standard output is a pipe that nobody reads any more: exit status 2 and one line."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, str(HERE / "es_proxy.py"), *words(1, "-")]
    try:
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "Broken pipe" in done.stderr


# == Crash =======================================================================================================
# After kill -9 at any moment every request that the upstream saw has its line; what was torn is closed off, reported
# and never continued by another record.


@pytest.mark.parametrize(("workers", "kills"), [(1, 8), (4, 16)])
def test_kill_9_under_load_loses_no_record(workers: int, kills: int, tmp_path: Path) -> None:
    """Processes are killed at random moments; the upstream never saw what is not on record, in whole lines."""
    with Storm(tmp_path, workers, seed=workers, sizes=(0, 20, 3000, 200_000)) as storm:
        while storm.counts["kills"] < kills:
            storm.strike()
        storm.finish()
    assert storm.evidence.events["start"] == storm.counts["starts"]
    if workers > 1:
        assert storm.evidence.events["worker-lost"] == storm.counts["kills"] - storm.counts["starts"] + 1


class Steps:
    """A request through a proxy that stops at each step: what is done there, and what must be on record by then."""

    def __init__(self, port: int, body: bytes) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.body = body
        self.arrived, self.half, self.rest = threading.Event(), threading.Event(), threading.Event()

    def reply(self, _: Arrival, sock: socket.socket) -> None:
        """The upstream's side."""
        self.arrived.set()
        assert self.half.wait(PATIENCE)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        assert self.rest.wait(PATIENCE)
        sock.sendall(b"67890")

    def go(self, step: str) -> None:
        """Do everything up to that step."""
        whole = raw_request("x", self.body)
        if step == "half a head":
            self.sock.sendall(whole[:30])
        elif step == "half a body":
            self.sock.sendall(whole[:-10])
        elif step != "connected":
            self.sock.sendall(whole)
            assert self.arrived.wait(PATIENCE)
            if step in ("half a response", "answered"):
                self.half.set()
                receive_until(self.sock, b"12345")
            if step == "answered":
                self.rest.set()
                receive_until(self.sock, b"67890")

    def release(self) -> None:
        """Let everybody go."""
        self.half.set()
        self.rest.set()
        self.sock.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        ("connected", []),
        ("half a head", []),
        ("half a body", []),
        ("at the upstream", ["request"]),
        ("half a response", ["request"]),
        ("answered", ["request", "response"]),
    ],
)
def test_kill_9_at_each_step_of_a_request(step: str, kinds: list[str], workers: int, log: Path) -> None:
    """What is on record follows from how far the request came; the next start goes on behind it, with nothing torn."""
    steps: list[Steps] = []
    with Witness(log, lambda arrival, sock: steps[0].reply(arrival, sock)) as witness:
        more = words(witness.port, log, "--workers", str(workers))
        with proxy_process(*more) as (process, port, _), handles(children(process.pid)) as workers_there:
            steps.append(Steps(port, POOL[:100]))
            steps[0].go(step)
            for handle in workers_there.values():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            process.kill()
            process.wait()
            steps[0].release()
            for handle in workers_there.values():
                wait_for_end(handle)
        records = read_log(log)
        lost = len(events(records, "worker-lost"))
        assert [record.kind for record in records if record.id != "worker-lost"] == ["event", *kinds]
        with proxy_process(*more) as (_, port, _):
            assert ask(port, "next") == 200
    after = [record.kind for record in read_log(log)[len(kinds) + 1 + lost :]]
    assert after == ["event", "request", "response", "event"]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_line_torn_by_kill_9_is_closed_off_and_reported(workers: int, upstream: MockES, log: Path) -> None:
    """Killed in the middle of a line of 30 MB: nothing of that went upstream, and nobody writes behind its stump."""
    more = words(upstream.port, log, "--workers", str(workers))
    torn = 0
    for attempt in range(10):
        with proxy_process(*more) as (process, port, _), handles(children(process.pid)) as workers_there:
            assert ask(port, f"before{attempt}") == 200
            size = log.stat().st_size
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                sock.sendall(raw_request(f"torn{attempt}", POOL[: 20 << 20]))
                while log.stat().st_size == size:
                    pass  # It is written within milliseconds: a pause would miss it.
                victims = workers_there.values() if workers > 1 else [os.pidfd_open(process.pid)]
                for handle in victims:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                read_all(sock)
            if workers == 1:
                process.wait()
                os.close(*victims)
            else:
                for handle in victims:
                    wait_for_end(handle)
                wait_until(lambda at=attempt: after_death(port, f"after{at}"), "other workers go on")  # type: ignore[misc]
        with open(log, "rb") as file:
            whole = file.seek(-1, os.SEEK_END) and file.read() == b"\n"
        if workers == 1:
            torn += not whole
        if torn or (workers > 1 and events(tolerant(log), "recovered")):
            break
    with proxy_process(*more) as (_, port, lines):
        assert ask(port, "last") == 200
        if workers == 1:
            assert any("in the middle of a line" in line for line in lines)
    evidence = inspect([log])
    assert evidence.torn == evidence.events["recovered"] == 1, "never hit the middle of a line"
    evidence.check(marks_seen(upstream), {"last": 200, **dict.fromkeys((f"torn{at}" for at in range(10)), 0)})


def after_death(port: int, mark: str) -> bool:
    """Whether a worker answers again; one that is just starting may not."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(port, mark) == 200
    return False


def tolerant(log: Path) -> list[Record]:
    """The events of a log in which other lines may be torn."""
    lines = log.read_bytes().split(b"\n")
    return [parse_line(line.decode()) for line in lines if b"Z Event: " in line[:40]]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("audit_format", ["text", "ecs"])
def test_a_torn_tail_is_closed_off_at_the_start(workers: int, audit_format: str, upstream: MockES, log: Path) -> None:
    """The stump of a line, of whatever length, gets its end and an event behind it before anything else is written."""
    stumps = (b"2026-11-23T13:03:24.123456Z ID: 7f9c", b"\xff\0")
    for stump in stumps:
        size = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            file.write(stump)
        more = ("--workers", str(workers), "--audit-format", audit_format)
        with proxy_process(*words(upstream.port, log, *more)) as (_, port, lines):
            assert any(str(log) in line and "in the middle of a line" in line for line in lines)
            assert ask(port, "next") == 200
        with open(log, "rb") as file:
            file.seek(size)
            first, second, third = (file.readline() for _ in range(3))
        assert first == stump + b"\n"
        if audit_format == "text":
            assert [parse_line(line.decode()[:-1]).id for line in (second, third)] == ["recovered", "start"]
        else:
            assert [json.loads(line)["event.action"] for line in (second, third)] == ["recovered", "start"]


def test_a_stop_is_heard_by_workers_that_have_just_been_forked(upstream: MockES, log: Path) -> None:
    """SIGTERM while the successors of killed workers start: nobody misses it, and the log says `stop`."""
    with proxy_process(*words(upstream.port, log, "--workers", "4")) as (process, port, _):
        assert ask(port, "a") == 200
        with handles(children(process.pid)) as workers:
            for handle in workers.values():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            wait_until(lambda: bool(set(children(process.pid)) - set(workers)), "the first successor")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE / 2) == 0
    assert events(read_log(log), "stop")


def test_a_rotation_is_heard_by_workers_that_have_just_been_forked(upstream: MockES, log: Path) -> None:
    """SIGHUP while the successors of killed workers start: all go on in the new file."""
    with proxy_process(*words(upstream.port, log, "--workers", "4")) as (process, port, _):
        assert ask(port, "a") == 200
        with handles(children(process.pid)) as workers:
            for handle in workers.values():
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            wait_until(lambda: bool(set(children(process.pid)) - set(workers)), "the first successor")
            log.rename(log.with_suffix(".old"))
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: b"Event: reopen" in log.read_bytes() if log.exists() else False, "it is reopened")
        wait_until(lambda: len(children(process.pid)) == 4, "all are there")
        wait_until(lambda: all(str(log) in targets(pid) for pid in children(process.pid)), "all have the new file")
        assert ask(port, "b") == 200


def test_a_worker_killed_in_a_line_to_a_pipe_leaves_a_stump_of_its_own(upstream: MockES, log: Path) -> None:
    """A pipe can't be cut short: the next line, of whichever worker, begins behind a line end."""
    os.mkfifo(log)
    first = PipeReader(log)
    with proxy_process(*words(upstream.port, log, "--workers", "4")) as (process, port, _):
        assert ask(port, "before") == 200
        first.leave()  # nobody takes what a worker writes now, until the next one comes
        keep = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            sock.sendall(raw_request("torn", POOL[: 2 << 20]))
            wait_until(lambda: any(map(blocked_in_write, children(process.pid))), "a worker waits for room in the pipe")
            with handles([pid for pid in children(process.pid) if blocked_in_write(pid)]) as opened:
                for handle in opened.values():
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    wait_for_end(handle)
        second = PipeReader(log)
        os.close(keep)
        wait_until(lambda: all(after_death(port, f"after{number}") for number in range(8)), "others go on")
    second.leave()
    stumps = unreadable(second.text)
    assert len(stumps) == 1
    assert len(_TIMESTAMP.findall(stumps[0].encode())) == 1
    assert marks_seen(upstream) == {"before", *(f"after{number}" for number in range(8))}


def unreadable(text: str) -> list[str]:
    """Lines that are no records."""
    found = []
    for line in text.splitlines():
        try:
            record = parse_line(line)
        except (AssertionError, ValueError):
            found.append(line)
        else:
            if line.count(" ID: ") > 1 or (record.kind == "request" and not mark_of(record)):
                found.append(line)  # two records on one line, or one that is cut in its body
    return found


def test_a_pipe_whose_reader_left_in_a_line_goes_on_with_a_line_of_its_own(upstream: MockES, log: Path) -> None:
    """The next reader finds the stump of that line in the pipe, then a line end, whichever worker goes on."""
    os.mkfifo(log)
    first = PipeReader(log)
    with proxy_process(*words(upstream.port, log, "--workers", "4")) as (process, port, _):
        assert ask(port, "before") == 200
        first.leave()
        keep = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        with background(ask, port, "torn", POOL[: 2 << 20]) as status:
            wait_until(lambda: any(map(blocked_in_write, children(process.pid))), "a worker waits for room in the pipe")
            spare = os.open(log, os.O_WRONLY | os.O_NONBLOCK)  # keeps what is in the pipe
            os.close(keep)
            assert status.result() == 503
        second = PipeReader(log)
        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(lambda number: ask(port, f"after{number}", b"x"), range(64))) == {200}
        os.close(spare)
    second.leave()
    stumps = unreadable(second.text)
    assert len(stumps) == 1
    assert len(_TIMESTAMP.findall(stumps[0].encode())) == 1


# == --audit-sync always =========================================================================================
# A request's record is on the disk before the request is forwarded; requests that wait together share an fsync; an
# fsync that failed is never taken as made good by a later one.


class Syncs:
    """Stands around os.fsync: counts it, slows it down, remembers how much of a file it covered, fails when told to.

    A wrapper, as strace isn't everywhere and no disk fails exactly once at will; the real fsync is called as well.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.count = 0
        self.covered: dict[int, int] = {}  # bytes by inode
        self.fail: collections.deque[int] = collections.deque()  # errno of the next ones
        self._real = os.fsync
        self._pause = seconds
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, fd: int) -> None:
        status = os.fstat(fd)
        self.count += 1
        if self._pause:
            threading.Event().wait(self._pause)
        if self.fail:
            raise OSError(self.fail.popleft(), "made to fail")
        self._real(fd)
        self.covered[status.st_ino] = max(status.st_size, self.covered.get(status.st_ino, 0))


def test_fifty_clients_share_their_syncs(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 50 clients at least 10 requests a sync, and none forwarded before a sync has covered its line."""
    syncs = Syncs(monkeypatch, 0.05)
    early: list[str] = []

    def reply(arrival: Arrival, sock: socket.socket) -> None:
        line = arrival.log.find(b" Opaque-Id: %b\n" % arrival.mark.encode())
        if not 0 < line < syncs.covered.get(log.stat().st_ino, 0):
            early.append(arrival.mark)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def client(number: int) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=PATIENCE)) as connection:
            for turn in range(20):
                assert exchange(connection, "GET", "/", None, {"X-Opaque-Id": f"s{number}-{turn}"})[0] == 200

    with (
        Witness(log, reply) as witness,
        running_proxy(witness.port, log, audit_sync=True) as proxy,
        ThreadPoolExecutor(50) as pool,
    ):
        list(pool.map(client, range(50)))
    assert len(witness.arrivals) == 1000
    assert not early
    assert 0 < syncs.count <= 100


def test_without_the_option_nothing_is_synced(upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--audit-sync none` costs nothing."""
    syncs = Syncs(monkeypatch)
    with running_proxy(upstream.port, log) as proxy:
        assert ask(proxy.port, "a") == 200
    assert syncs.count == 0


@pytest.mark.parametrize("mode", ["block", "pass"])
def test_a_failed_sync_refuses_its_requests_and_the_file_is_opened_anew(
    mode: str, upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel reports a lost page once, to whoever holds the file: so another descriptor has to be taken."""
    syncs = Syncs(monkeypatch)
    opened: list[object] = []
    real = os.open

    def watched(path: Any, *given: Any, **named: Any) -> int:
        opened.append(path)
        return real(path, *given, **named)

    monkeypatch.setattr(os, "open", watched)
    with running_proxy(upstream.port, log, audit_sync=True, audit_pass=mode == "pass") as proxy:
        assert ask(proxy.port, "before") == 200
        syncs.fail.append(errno.EIO)
        status, body = answer(proxy.port, "during")
        assert status == (503 if mode == "block" else 200)
        if mode == "block":
            assert error_of(body)["code"] == "audit-unavailable"
        assert ask(proxy.port, "after") == 200
        records = proxy.records()
    assert marks_seen(upstream) == {"before", "after"} | ({"during"} if mode == "pass" else set())
    assert opened.count(str(log)) == 2
    assert events(records, "gap")[0].marks["Lost"] == "1"
    assert capfd.readouterr().err.count("can't be written") == 1


def test_a_failed_sync_is_not_made_good_by_a_later_one(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who waited for the failed one hear of it, even those who wake up when the next one has succeeded.

    A thread may wake up as late as the system likes; here it does, which no load brings about for certain.
    """
    late = threading.Event()
    began, go_on = threading.Event(), threading.Event()

    class LateCondition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            woken = super().wait(timeout)
            self.release()
            assert late.wait(PATIENCE)
            self.acquire()
            return woken

    with monkeypatch.context() as patched:
        patched.setattr(threading, "Condition", LateCondition)
        audit = es_proxy.AuditLog(make_config(1, log, audit_sync=True))

    def first(_: int) -> None:
        began.set()
        assert go_on.wait(PATIENCE)
        monkeypatch.setattr(os, "fsync", lambda _: None)
        raise OSError(errno.EIO, "made to fail")

    def record() -> bool:
        try:
            audit.request(es_proxy.Exchange(b"127.0.0.1"), None)
        except es_proxy.AuditError:
            return False
        return True

    monkeypatch.setattr(os, "fsync", first)
    with ThreadPoolExecutor(9) as pool:
        leader = pool.submit(lambda: (record(), record()))
        assert began.wait(PATIENCE)
        others = [pool.submit(record) for _ in range(8)]
        wait_until(lambda: log.read_bytes().count(b"\n") == 9, "all lines are written")
        go_on.set()
        assert leader.result(PATIENCE) == (False, True)
        late.set()
        assert [other.result(PATIENCE) for other in others] == [False] * 8
    audit.close()


def test_a_failed_sync_of_a_real_disk_refuses_until_there_is_room(upstream: MockES, tmp_path: Path) -> None:
    """A disk whose blocks can't be stored: writing works, as it goes into memory, and fsync fails."""
    with small_disk(tmp_path / "below", "2m") as below:
        disk = below / "disk"
        disk.touch()
        os.truncate(disk, 16 << 20)
        command("mkfs.ext4", "-q", "-O", "^has_journal", str(disk))
        with mounted(tmp_path / "above", "-o", "loop", str(disk)) as above:
            log = above / "audit.log"
            with proxy_process(*words(upstream.port, log, "--audit-sync", "always")) as (_, port, lines):
                assert ask(port, "before") == 200
                fill(below / "ballast")
                refused = {mark for mark in ("d0", "d1", "d2") if ask(port, mark, POOL[:300_000]) == 503}
                (below / "ballast").unlink()
                wait_until(lambda: ask(port, "after") == 200, "it recovers")
            gaps = events(tolerant(log), "gap")
    assert refused == {"d0", "d1", "d2"}
    assert not refused & marks_seen(upstream)
    assert sum(int(gap.marks["Lost"]) for gap in gaps) >= 3
    assert 1 <= sum("can't be written" in line for line in lines) <= 3


def test_a_sync_that_cant_begin_keeps_nobody_waiting(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is free for a moment (EMFILE): that request is refused, the next ones are not held up."""
    real = os.dup
    fail = [errno.EMFILE]

    def dup(fd: int) -> int:
        if fail:
            raise OSError(fail.pop(), "made to fail")
        return real(fd)

    with running_proxy(upstream.port, log, audit_sync=True) as proxy, monkeypatch.context() as patched:
        patched.setattr(os, "dup", dup)
        with proxy.connect() as sock:
            sock.sendall(raw_request("during"))
            assert b" 503 " in sock.recv(65536)[:20]
        with proxy.connect() as sock:
            sock.settimeout(5.0)
            sock.sendall(raw_request("after"))
            assert b" 200 " in sock.recv(65536)[:20]


def test_what_is_no_file_cant_be_synced() -> None:
    """A pipe is refused at the start with that option."""
    assert "--audit-sync" in refused_start(*words(1, "-", "--audit-sync", "always"))


# == Whole lines =================================================================================================
# Records are whole lines, whatever their length and number, to a file, a pipe or standard output, in bounded memory.

LARGE = 100 << 20  # bytes: the largest body there may be by default


def anonymous_bytes(pids: Iterable[int]) -> int:
    """Heap and stacks of the largest of these processes."""
    largest = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            largest = max(largest, int(match[1]) * 1024 if match else 0)
    return largest


class Peak:
    """Watches how large processes become while the block lasts."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.before = self.most = anonymous_bytes(pids)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, anonymous_bytes(self._pids))


@dataclasses.dataclass
class Lines:
    """What a stream of records held: SHA-256 of the body by X-Opaque-Id, and which had a response."""

    bodies: dict[str, str] = dataclasses.field(default_factory=dict)
    answered: int = 0

    def read(self, stream: IO[bytes]) -> None:
        """Take all lines up to the end."""
        with stream:
            for line in stream:
                assert line.endswith(b"\n") and line.count(b" ID: ") <= 1
                record = parse_line(line[:-1].decode("ascii"))
                if record.kind == "request":
                    assert mark_of(record) not in self.bodies
                    self.bodies[mark_of(record)] = hashlib.sha256(record.body).hexdigest()
                self.answered += record.kind == "response"


def crowd(port: int, sent: dict[str, str]) -> None:
    """64 clients with bodies from nothing to 5 MB."""
    sizes = [0, 1, 2, 3, 100, 4095, 4096, 65_536, 700_000]

    def client(number: int) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
            for turn in range(8):
                size = 5_000_000 if turn == 5 and number < 4 else sizes[(number + turn) % len(sizes)]
                mark, body = f"{number}-{turn}", POOL[number : number + size]
                sent[mark] = hashlib.sha256(body).hexdigest()
                assert exchange(connection, "POST", "/_mock/sink", body, {"X-Opaque-Id": mark})[0] == 200

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))


@pytest.mark.parametrize("sink", ["file", "pipe", "stdout"])
def test_lines_are_whole_whatever_is_written_at_once(sink: str, log: Path) -> None:
    """Four workers, 64 clients, bodies up to 100 MB, a slow reader: each body is on its line, memory stays bounded."""
    large = b"".join(big_body(LARGE))
    sent = {"large": hashlib.sha256(large).hexdigest()}
    lines = Lines()
    options: dict[str, Any] = {"stdout": subprocess.PIPE} if sink == "stdout" else {}
    place = "-" if sink == "stdout" else str(log)
    reader: Any = None
    if sink == "pipe":
        os.mkfifo(log)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    with MockProcess() as mock, contextlib.ExitStack() as stack:
        more = words(mock.port, place, "--workers", "4")
        process, port, _ = stack.enter_context(proxy_process(*more, **options))
        if sink != "file":
            if sink == "pipe":
                os.set_blocking(reader, True)
                stream: IO[bytes] = open(reader, "rb", buffering=4096)
            else:
                stream = open(os.dup(process.stdout.fileno()), "rb", buffering=4096)  # type: ignore[union-attr]
            reading = stack.enter_context(background(lines.read, stream))
        crowd(port, sent)
        with Peak([process.pid, *children(process.pid)]) as peak, background(ask, port, "large", large) as status:
            for number in range(40):
                sent[f"beside{number}"] = hashlib.sha256(b"x").hexdigest()
                assert ask(port, f"beside{number}", b"x") == 200
            assert status.result() == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        if sink == "file":
            lines.read(open(log, "rb"))
        else:
            reading.result(PATIENCE)
    assert lines.bodies == sent
    assert lines.answered == len(sent)
    assert peak.most - peak.before < 48 << 20


@pytest.mark.parametrize("workers", [("1", "1"), ("4", "1"), ("1", "4"), ("4", "4")], ids="-".join)
def test_a_second_proxy_on_the_same_file_says_so_and_ends(
    workers: tuple[str, str], upstream: MockES, log: Path
) -> None:
    """Exit status 2 with a reason, also after a rotation; the first one goes on, and the log shows nothing of it."""
    second = words(upstream.port, log, "--workers", workers[1])
    with proxy_process(*words(upstream.port, log, "--workers", workers[0])) as (process, port, _):
        before = log.read_bytes()
        assert "another es-proxy" in refused_start(*second)
        assert log.read_bytes() == before
        log.rename(log.with_suffix(".1"))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and b"Event: reopen" in log.read_bytes(), "it goes on in the new file")
        assert "another es-proxy" in refused_start(*second)
        assert ask(port, "a") == 200


# == Rotation ====================================================================================================
# Rename and SIGHUP lose and double nothing; when the new file can't be opened, the old one stays in use.


@pytest.mark.parametrize("workers", [1, 4])
def test_rotation_under_load_loses_and_doubles_nothing(workers: int, tmp_path: Path) -> None:
    """Every 50 ms: in all files together each UUID stands twice, once as request and once as response."""
    with Storm(tmp_path, workers, seed=50 + workers, sizes=(0, 20, 3000) * 6 + (1_500_000,)) as storm:
        for _ in range(30):
            storm.rotate()
            threading.Event().wait(0.05)
        storm.load.more(20)
        storm.finish()
    evidence = storm.evidence
    assert evidence.responses == set(evidence.requests)
    assert set(evidence.requests.values()) == set(storm.load.outcomes)
    assert set(storm.load.outcomes.values()) == {200}
    assert evidence.torn == 0
    assert evidence.events["reopen"] >= 2
    assert evidence.events["truncated"] == evidence.events["recovered"] == 0


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("obstacle", ["directory", "no directory", "symlink", "world-writable", "full device"])
def test_when_reopening_fails_the_old_file_stays_in_use(
    obstacle: str, workers: int, upstream: MockES, tmp_path: Path
) -> None:
    """It is said once; requests go on, on record in the old file; the next SIGHUP tries again."""
    place = tmp_path / "logs"
    place.mkdir()
    log, old = place / "audit.log", tmp_path / "old.log"
    with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (process, port, lines):
        assert ask(port, "before") == 200
        log.rename(old)
        put_in_place(obstacle, log)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("old file" in line for line in lines), "it is said")
        for number in range(20):
            assert ask(port, f"during{number}") == 200
        assert len(pairs(read_log(old))) == 21
        clear_away(log)
        process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: log.exists() and log.read_bytes().count(b"Event: reopen") > (workers if workers > 1 else 0), ""
        )
        assert ask(port, "after") == 200
    assert [mark_of(request) for request, _ in pairs(read_log(log))] == ["after"]
    assert sum("old file" in line for line in lines) == 1, lines


def put_in_place(obstacle: str, log: Path) -> None:
    """Something that can't be a log, under its name."""
    if obstacle == "directory":
        log.mkdir()
    elif obstacle == "no directory":
        log.parent.rename(log.parent.with_name("elsewhere"))
    elif obstacle == "symlink":
        log.symlink_to(log.with_name("target"))
    elif obstacle == "world-writable":
        log.touch()
        log.chmod(0o666)
    else:
        try:
            os.mknod(log, stat.S_IFSOCK | 0o600)
        except PermissionError:
            pytest.skip("no special file may be made here")


def clear_away(log: Path) -> None:
    """Make the name free again."""
    if not log.parent.exists():
        log.parent.with_name("elsewhere").rename(log.parent)
    elif log.is_dir():
        log.rmdir()
    else:
        log.unlink()


def test_the_logrotate_snippet_of_the_readme_works(upstream: MockES, log: Path) -> None:
    """The real logrotate with README's own lines, twice, under load: nothing lost, nothing doubled."""
    match = re.search(r"```logrotate\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert match, "README.md has no logrotate snippet"
    with proxy_process(*words(upstream.port, log, "--workers", "2")) as (process, port, _):
        text = match[1].replace("/var/log/es-proxy/audit.log", str(log))
        text = re.sub(r"(?m)^( *)systemctl kill .*$", rf"\1kill -HUP {process.pid}", text)
        text = re.sub(r"(?m)^ *su .*$", "    su root root", text)
        text = re.sub(r"(?m)^( *create 0640) .*$", r"\1 root root", text).replace(
            "dateext", "dateext\n    dateformat -%s"
        )
        assert f"kill -HUP {process.pid}" in text
        conf = log.with_name("logrotate.conf")
        conf.write_text(text)
        conf.chmod(0o600)
        log.parent.chmod(0o755)
        with Load(4, 1) as load:
            load.resume(port)
            for number in (1, 2):
                load.more(50)
                inode = log.stat().st_ino
                command("logrotate", "-f", "-s", str(log.with_name("state")), str(conf))
                assert log.stat().st_ino != inode, number
                wait_until(lambda: log.read_bytes().count(b"Event: reopen") == 3, "all go on in the new file")
                wait_until(lambda: not log.with_name(f"audit.log-{int(time.time())}").exists(), "another name is next")
            load.more(50)
    for packed in log.parent.glob("audit.log*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    files = [path for path in log.parent.iterdir() if path.name.startswith("audit.log")]
    assert len(files) == 3
    assert all(path.stat().st_mode & 0o137 == 0 or path.name != "audit.log" for path in files)
    evidence = inspect(files)
    assert evidence.responses == set(evidence.requests)
    assert set(evidence.requests.values()) == set(load.outcomes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_log_cut_short_is_noticed(workers: int, upstream: MockES, log: Path) -> None:
    """copytruncate: it is on record and said, once; records go on at the file's new end."""
    with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (_, port, lines):
        for number in range(20):
            assert ask(port, f"before{number}") == 200
        wait_until(lambda: stands_still(log), "it was looked at")
        os.truncate(log, 0)
        wait_until(lambda: b"Event: truncated" in log.read_bytes(), "it is noticed")
        assert ask(port, "after") == 200
    records = read_log(log)
    assert 1 <= len(events(records, "truncated")) <= workers + 1  # each process may say so, once
    assert len(pairs(records)) == 1
    assert 1 <= sum(" truncated by " in line for line in lines) <= workers + 1
    assert b"\0" not in log.read_bytes()


def stands_still(log: Path) -> bool:
    """Whether two looks of the proxy, a second apart at most, have passed over the log as it is now."""
    return time.time() - log.stat().st_mtime > 1.2


@pytest.mark.parametrize("workers", [1, 4])
def test_a_log_cut_short_under_load_is_noticed(workers: int, upstream: MockES, log: Path) -> None:
    """It was shorter than what had been written, even if it has grown beyond that until the next look."""
    with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (_, port, _):
        assert ask(port, "before", b"x") == 200
        wait_until(lambda: stands_still(log), "it was looked at")
        os.truncate(log, 0)
        for number in range(4):
            assert ask(port, f"after{number}", POOL[:500_000]) == 200
        size = log.stat().st_size
        with contextlib.suppress(AssertionError):
            wait_until(lambda: log.stat().st_size != size or stands_still(log), "it is looked at")
    assert 1 <= len(events(read_log(log), "truncated")) <= workers + 1


@pytest.mark.parametrize("workers", [1, 4])
def test_a_log_that_was_removed_is_noticed(workers: int, upstream: MockES, log: Path) -> None:
    """A new one takes its place by itself, and says why."""
    with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (process, port, lines):
        assert ask(port, "before") == 200
        log.unlink()
        wait_until(lambda: log.exists() and b"Event: removed" in log.read_bytes(), "it is noticed")
        everybody = {process.pid, *children(process.pid)}
        wait_until(lambda: all(str(log) in targets(pid) for pid in everybody), "by all")
        for number in range(20):
            assert ask(port, f"after{number}") == 200
    records = read_log(log)
    assert {mark_of(request) for request, _ in pairs(records)} == {f"after{number}" for number in range(20)}
    assert any(" removed by " in line for line in lines)
    assert sum(" removed by " in line for line in lines) <= workers + 1
    assert log.stat().st_mode & 0o7777 == 0o640


def targets(pid: int) -> list[str]:
    """What a process has open."""
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_rotated_file_is_let_go(workers: int, upstream: MockES, log: Path) -> None:
    """No process keeps the old file open: its room would be taken until the proxy ends, even if it is deleted."""
    old = log.with_suffix(".old")
    with proxy_process(*words(upstream.port, log, "--workers", str(workers))) as (process, port, _):
        assert ask(port, "before") == 200
        log.rename(old)
        process.send_signal(signal.SIGHUP)
        everybody = {process.pid, *children(process.pid)}
        wait_until(lambda: all(str(log) in targets(pid) for pid in everybody), "all go on in the new file")
        assert not [pid for pid in everybody if str(old) in targets(pid)]


def test_an_outage_after_a_removal_is_said_once(
    upstream: MockES, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log is looked at about once a second: that it is gone is no news the second time."""
    place = tmp_path / "logs"
    place.mkdir()
    log = place / "audit.log"
    looks = threading.Semaphore(0)
    with running_proxy(upstream.port, log, limits={"linger_seconds": 0.1}) as proxy:
        tick = proxy.proxy.relay.tick

        def counted() -> None:
            tick()
            looks.release()

        proxy.proxy.relay.tick = counted  # type: ignore[method-assign]
        shutil.rmtree(place)
        for _ in range(5):
            assert looks.acquire(timeout=PATIENCE)
        place.mkdir()
        wait_until(lambda: ask(proxy.port, "after") == 200, "it recovers")
    said = capfd.readouterr().err
    assert said.count(" removed by ") == 1, said
    assert said.count("can't be written") == 1


# == Unforgeable =================================================================================================
# Nobody can write into the log but through a request of their own, and no field of it can be forged: one ASCII line
# or one JSON object a record, from which the bytes that were sent can be read again.

FORGERIES = (
    b"\n", b"\r\n", b"\r", b"\t", b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xff",
    b"\x1b[31m", b"\x1b]0;x\x07", b"\x9b", b"\x7f", b" ", b":", b": ", b"\\", b"\\x3a", b"\\n", b'"',
    b'","user.name":"x',
    b"Status: 200 User: admin", b" Body: QUJD", b" Error: x", b"2026-11-23T13:03:24.123456Z ID: ", b"\xc3\xa9",
    b"\xed\xa0\x80", b"\xf0\x9f\x92\xa5", b"None", b"anonymous", b"malformed", b"-", b"", b"?", b"%00",
    b"\xc3", b"\xa9",
)  # fmt: skip


def hostile_values(seed: int, count: int) -> Iterator[bytes]:
    """Every byte, every forgery, and mixtures of them; the same ones in every run."""
    rng = random.Random(seed)
    yield from (bytes((code,)) for code in range(256))
    yield from FORGERIES
    yield bytes(range(256))
    for _ in range(count):
        yield (
            rng.randbytes(rng.randrange(12))
            if rng.random() < 0.3
            else b"".join(rng.choices(FORGERIES, k=rng.randrange(6)))
        )


@dataclasses.dataclass(frozen=True)
class Told:
    """What a client tells, one value a field of the record."""

    user: bytes
    path: bytes
    query: bytes | None
    method: bytes
    agent: bytes
    opaque_id: bytes
    run_as: bytes
    forwarded: bytes
    body: bytes

    def exchange(self) -> es_proxy.Exchange:
        """As the proxy notes it down."""
        user = es_proxy.identify(basic(self.user).encode(), None)
        made = es_proxy.Exchange(b"127.0.0.1", user, es_proxy.escape_agent(self.agent) if self.agent else b"")
        made.asks(self.method, self.path + (b"" if self.query is None else b"?" + self.query), False)
        made.run_as, made.forwarded = es_proxy.escape(self.run_as), es_proxy.escape(self.forwarded)
        made.opaque_id = es_proxy.escape(self.opaque_id)
        made.body_bytes = len(self.body)
        made.status, made.size, made.error, made.attempts, made.sent = 499, 7, "client-gone", 2, 3
        return made


def tellings(seed: int, count: int) -> Iterator[Told]:
    """Hostile values in every field."""
    values = hostile_values(seed, count)
    for value in values:
        path, query, agent, mark, other, body = (next(values, value) for _ in range(6))
        yield Told(
            value.replace(b":", b""), path.replace(b"?", b""), None if query == b"-" else query, value, agent, mark,
            other, value, body,
        )  # fmt: skip


def body_of(data: bytes) -> es_proxy.Body | None:
    """A request's body as the records get it."""
    if not data:
        return None
    body = es_proxy.Body(1 << 20)
    body.append(data)
    return body


def test_a_text_record_is_one_line_that_reads_back_as_what_was_sent() -> None:
    """parse(format(x)) == x for every field of both records, with values that try to forge fields and lines."""
    for told in tellings(1, 20_000):
        made = told.exchange()
        lines = [
            b"".join(es_proxy.text_request(1.5, made, body_of(told.body))),
            es_proxy.text_response(2.5, made, 0.25),
        ]
        for line in lines:
            assert re.fullmatch(rb"[ -~]+\n", line), line
            record = parse_line(line[:-1].decode("ascii"))
            assert (record.id, record.user, record.path, record.query) == (made.id, told.user, told.path, told.query)
            assert (record.method, record.agent, record.source) == (told.method, told.agent, "127.0.0.1")
            marks = {key: es_proxy.unescape(text.encode()) for key, text in record.marks.items()}
            if record.kind == "request":
                assert record.body == told.body
                sent = {"Run-As": told.run_as, "Forwarded": told.forwarded, "Opaque-Id": told.opaque_id}
                assert marks == {key: value for key, value in sent.items() if value}
            else:
                assert (record.status, record.duration, record.size) == (499, 0.25, 7)
                assert marks == {"Error": b"client-gone", "Attempts": b"2", "Sent": b"3"}


def test_two_records_on_one_line_are_none() -> None:
    """The grammar refuses what would be the work of a forger or of a torn line: no value holds `KEY: `."""
    for told in tellings(5, 200):
        made = told.exchange()
        request = b"".join(es_proxy.text_request(1.5, made, body_of(b"abc")))[:-1].decode()
        response = es_proxy.text_response(2.5, made, 0.25)[:-1].decode()
        for first in (request, response):
            for second in (request, response):
                for cut in (len(first), len(first) - 1, first.index(" Agent: ") + 9, 30):
                    assert not es_proxy.RECORD.fullmatch(first[:cut] + second), first[:cut] + second


def original(text: str) -> bytes:
    """The bytes that `readable` was given."""
    return es_proxy.unescape(text.encode())


def test_an_ecs_record_is_one_object_that_reads_back_as_what_was_sent() -> None:
    """The same through a JSON parser, which finds each key once; only what is missing is left out."""
    for told in tellings(2, 20_000):
        made = told.exchange()
        lines = [b"".join(es_proxy.ecs_request(1.5, made, body_of(told.body))), es_proxy.ecs_response(2.5, made, 0.25)]
        for line in lines:
            assert re.fullmatch(rb"[ -~]+\n", line), line
            document = json.loads(line, object_pairs_hook=only_once)
            sent = {
                "user.name": told.user, "url.path": told.path, "url.query": told.query,
                "http.request.method": told.method, "user_agent.original": told.agent or None,
                "user.effective.name": told.run_as or None, "http.request.headers.x_opaque_id": told.opaque_id or None,
            }  # fmt: skip
            for key, value in sent.items():
                if value is None:
                    assert key not in document
                elif value or key == "url.query":  # ECS: a query field exists where there is a `?`, even if empty
                    assert original(document[key]) == value, key
        document = json.loads(lines[0])
        if told.forwarded:
            assert (
                original(str(document.get("es_proxy.forwarded", document.get("network.forwarded_ip"))))
                == told.forwarded
            )
        assert ecs_body(document) == told.body


def only_once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key stands twice."""
    found = dict(items)
    assert len(found) == len(items)
    return found


def ecs_body(document: dict[str, Any]) -> bytes:
    """The body that a document holds."""
    if "es_proxy.request.body.base64" in document:
        return base64.b64decode(document["es_proxy.request.body.base64"], validate=True)
    text: str = document.get("http.request.body.content", "")
    return text.encode()


def test_readable_text_is_undone_by_unescape() -> None:
    """Whatever the bytes, as UTF-8 or not, the string in a JSON record leads back to them."""
    for value in hostile_values(3, 50_000):
        text = es_proxy.readable(value)
        assert original(json.loads(json.dumps(text))) == value
        try:
            assert text == value.decode().replace("\\", "\\x5c")
        except UnicodeDecodeError:
            assert "\\x" in text


def send_hostile(proxy: Running, head: bytes) -> Record:
    """Send a request made of these bytes and find its record: a pair on two ASCII lines, whatever it was."""
    size = proxy.log.stat().st_size
    with proxy.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(head)
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    with open(proxy.log, "rb") as file:
        file.seek(size)
        text = file.read()
    assert re.fullmatch(rb"(?:[ -~]+\n){2}", text), text
    request, _ = pairs([parse_line(line) for line in text.decode().splitlines()])[0]
    return request


PLACES = {
    "method": b"G%bT / HTTP/1.1\r\nHost: a\r\n\r\n",
    "path": b"GET /%bx HTTP/1.1\r\nHost: a\r\n\r\n",
    "query": b"GET /?%bx HTTP/1.1\r\nHost: a\r\n\r\n",
    "agent": b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: a%bx\r\n\r\n",
    "opaque": b"GET / HTTP/1.1\r\nHost: a\r\nX-Opaque-Id: a%bx\r\n\r\n",
    "runas": b"GET / HTTP/1.1\r\nHost: a\r\nes-security-runas-user: a%bx\r\n\r\n",
}


@pytest.mark.parametrize("place", PLACES)
def test_no_byte_of_a_request_forges_a_line(place: str, upstream: MockES, log: Path) -> None:
    """Every byte 0 to 255, and every forgery, through the proxy: recorded as it was sent, or refused on record."""
    template = PLACES[place]
    values = [bytes((code,)) for code in range(256)] + list(FORGERIES)
    with running_proxy(upstream.port, log) as proxy:
        assert ask(proxy.port, "first") == 200  # Now the log has its first line.
        for value in values:
            head = template % value
            request = send_hostile(proxy, head)
            if "Rejected" in request.marks:
                continue
            line, _, fields = head.partition(b"\r\n")
            method, target, _ = line.split(b" ")
            path, mark, query = target.partition(b"?")
            assert (request.method, request.path, request.query) == (method, path, query if mark else None)
            if place in ("agent", "opaque", "runas"):
                sent = fields.partition(b"\r\n")[2].partition(b": ")[2].partition(b"\r\n")[0]
                marks = {"opaque": "Opaque-Id", "runas": "Run-As"}
                seen = request.agent if place == "agent" else original(request.marks[marks[place]])
                assert seen == sent
    assert len(proxy.pairs()) == 1 + len(values)


def test_no_user_name_forges_a_line(upstream: MockES, log: Path) -> None:
    """Base64 carries any byte: every one of them, and every forgery, as name of a Basic user."""
    names = [bytes((code,)) for code in range(256) if code != ord(":")]
    names += [value.replace(b":", b"") for value in FORGERIES]
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        for name in names:
            exchange(connection, "GET", "/", None, {"Authorization": basic(name)})
        assert [request.user for request, _ in proxy.pairs()] == names


def test_no_reason_phrase_of_the_upstream_forges_a_line(
    upstream: MockES, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in a status line: relayed or refused, the pair is two lines and stderr stays clean."""
    with running_proxy(upstream.port, log) as proxy:
        assert ask(proxy.port, "first") == 200
        for value in (*(bytes((code,)) for code in range(256)), *FORGERIES):
            response = b"HTTP/1.1 200 O%bK\r\nContent-Length: 0\r\n\r\n" % value
            head = b"POST /_mock/raw HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(response)
            send_hostile(proxy, head + response)
    check_messages(capfd.readouterr().err)


def check_messages(text: str) -> None:
    """Each line of stderr is a message, in printable ASCII."""
    for line in text.split("\n")[:-1]:
        assert re.fullmatch("es-proxy: [ -~]+", line), line


def test_stderr_carries_no_raw_bytes_of_a_client(
    upstream: MockES, log: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Garbage instead of TLS, a bug whose text quotes the request: one line each, nothing raw in it."""
    text = "\x1b[31mred\n es-proxy: forged \u2028 \u202e \x00 \x9b é"

    def broken(*_: object) -> None:
        raise KeyError(text, text.encode("utf-8", "surrogateescape"))

    def bug(*_: object) -> None:
        raise ValueError(text)

    with running_proxy(upstream.port, log) as proxy:
        for fault in (broken, bug):
            with monkeypatch.context() as patched:
                patched.setattr(proxy.proxy.relay.upstream, "request", fault)
                assert ask(proxy.port, "a") == 500
    cert, key = pki.server
    with running_proxy(upstream.port, log.with_suffix(".2"), listen_tls=True, cert=cert, key=key) as proxy:
        for garbage in (b"\x16\x03\x01\x00\x30" + text.encode() * 4, b"GET /\x1b[31m\n HTTP/1.1\r\n\r\n"):
            proxy.ask(garbage)
    said = capfd.readouterr().err
    assert said.count("internal error") == 2
    check_messages(said)


# == Files =======================================================================================================
# The log can't be made to lie somewhere else, and nobody else can write into it.


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_new_log_has_mode_0640(mask: int, workers: str, upstream: MockES, log: Path) -> None:
    """Whatever the umask leaves of that; a log that was there keeps its mode."""
    more = words(upstream.port, log, "--workers", workers)
    with proxy_process(*more, preexec_fn=lambda: os.umask(mask)) as (_, port, _):
        assert ask(port, "a") == 200
    assert log.stat().st_mode & 0o7777 == 0o640 & ~mask
    log.chmod(0o600)
    with proxy_process(*more):
        assert log.stat().st_mode & 0o7777 == 0o600


def test_a_log_in_doubtful_hands_is_refused(tmp_path: Path) -> None:
    """A symbolic link, a file or a directory that everyone may write to, somebody else's file in a shared directory."""
    shared, sticky = tmp_path / "shared", tmp_path / "sticky"
    for place, mode in ((shared, 0o777), (sticky, 0o1777)):
        place.mkdir()
        place.chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "target").touch()
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o646)
    cases = {"link": "symbolic link", "dangling": "symbolic link", "open": "everyone", "shared/log": "everyone"}
    if os.geteuid() == 0:
        (sticky / "foreign").touch()
        os.chown(sticky / "foreign", 12345, 12345)
        cases["sticky/foreign"] = "another user"
    for name, cause in cases.items():
        assert cause in refused_start(*words(1, tmp_path / name)), name
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "target").read_bytes() == (tmp_path / "open").read_bytes() == b""


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "fifo", "file", "sticky"])
def test_pipes_and_ordinary_files_are_fine(path: str, upstream: MockES, tmp_path: Path) -> None:
    """A FIFO that is read, standard output by both names and as a file or a pipe, one's own file beside others'."""
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    places = {"fifo": tmp_path / "fifo", "file": tmp_path / "log", "sticky": tmp_path / "sticky" / "log"}
    reader = None
    if path == "fifo":
        os.mkfifo(places[path])
        reader = PipeReader(places[path])
    with open(tmp_path / "stdout", "wb") as stdout:
        more = words(upstream.port, places.get(path, path))
        with proxy_process(*more, stdout=stdout) as (_, port, _):
            assert ask(port, "a") == 200
    if reader is not None:
        reader.leave()
        text = reader.text
    else:
        text = places.get(path, tmp_path / "stdout").read_text()
    assert [parse_line(line).kind for line in text.splitlines()] == ["event", "request", "response", "event"]


# == --audit-body ================================================================================================
# How much of a body is recorded is a choice; its length and digest are on record in any case.


@pytest.mark.parametrize("audit_format", ["text", "ecs"])
@pytest.mark.parametrize("size", [1, 500, 5000, (3 << 20) + 5])
@pytest.mark.parametrize("limit", ["none", "0", "1b", "500b", "4kb", "3mb", "full"])
def test_of_a_body_as_much_is_recorded_as_was_asked_for(
    limit: str, size: int, audit_format: str, upstream: MockES, log: Path
) -> None:
    """The prefix, and of a cut body Body-Bytes and Body-SHA256 of the whole, in memory or spooled."""
    allowed = {"none": 0, "0": 0, "1b": 1, "500b": 500, "4kb": 4096, "3mb": 3 << 20, "full": size}[limit]
    config = es_proxy.parse_args([*words(upstream.port, log), "--audit-body", limit, "--audit-format", audit_format])
    body = POOL[:size]
    digest = hashlib.sha256(body).hexdigest()
    with stopped(Running(config)) as proxy:
        assert ask(proxy.port, "a", body) == 200
    assert upstream.requests[0].sha256 == digest
    line = next(line for line in log.read_text().splitlines() if "http-request" in line or " Body: " in line)
    if audit_format == "text":
        record = parse_line(line)
        cut = {"Body-Bytes": str(size), "Body-SHA256": digest} if size > allowed else {}
        assert (record.body, record.marks) == (body[:allowed], {"Opaque-Id": "a", **cut})
    else:
        document = json.loads(line)
        assert ecs_body(document) == body[:allowed]
        assert document["http.request.body.bytes"] == size
        assert document.get("es_proxy.request.body.sha256") == (digest if size > allowed else None)


# == ECS =========================================================================================================
# A record in ECS format is a document that Elasticsearch takes as it is: known fields of the right type.

# From the field list of ECS 8.11 (generated/csv/fields.csv in github.com/elastic/ecs, tag v8.11.0): what is used here.
ECS_FIELDS = {
    "@timestamp": "date", "ecs.version": "keyword", "event.action": "keyword", "event.category": "keyword",
    "event.dataset": "keyword", "event.duration": "long", "event.end": "date", "event.id": "keyword",
    "event.kind": "keyword", "event.outcome": "keyword", "event.reason": "keyword", "event.start": "date",
    "event.type": "keyword", "http.request.body.bytes": "long", "http.request.body.content": "wildcard",
    "http.request.id": "keyword", "http.request.method": "keyword", "http.request.mime_type": "keyword",
    "http.response.body.bytes": "long", "http.response.status_code": "long", "http.version": "keyword",
    "network.forwarded_ip": "ip", "observer.hostname": "keyword", "observer.type": "keyword",
    "observer.version": "keyword", "source.ip": "ip", "source.port": "long", "tls.cipher": "keyword",
    "tls.client.subject": "keyword", "tls.established": "boolean", "tls.version": "keyword",
    "tls.version_protocol": "keyword", "trace.id": "keyword", "url.path": "wildcard", "url.query": "keyword",
    "user.effective.name": "keyword", "user.name": "keyword", "user_agent.original": "keyword",
}  # fmt: skip
# Not ECS, but where Elastic's own agents put a request's header: X-Opaque-Id is found beside theirs.
ECS_FIELDS["http.request.headers.x_opaque_id"] = "keyword"
ECS_ALLOWED = {
    "event.kind": {"alert", "asset", "enrichment", "event", "metric", "state", "pipeline_error", "signal"},
    "event.outcome": {"failure", "success", "unknown"},
    "event.type": {
        "access", "admin", "allowed", "change", "connection", "creation", "deletion", "denied", "end", "error", "group",
        "indicator", "info", "installation", "protocol", "start", "user",
    },
}  # fmt: skip
# Categories, and the types that are expected with them.
ECS_CATEGORIES = {
    "api": {"access", "admin", "allowed", "change", "creation", "deletion", "denied", "end", "info", "start", "user"},
    "authentication": {"start", "end", "info"},
    "configuration": {"access", "change", "creation", "deletion", "info"},
    "database": {"access", "change", "info", "error"},
    "process": {"access", "change", "end", "info", "start"},
    "web": {"access", "error", "info"},
}
ECS_ARRAYS = {"event.category", "event.type"}


def check_ecs(document: dict[str, Any]) -> None:
    """Known fields or our own, types as published, allowed values, and what every document has."""
    for key, value in document.items():
        if key.startswith("es_proxy."):
            assert isinstance(value, (str, int, bool)), key
            continue
        assert key in ECS_FIELDS, f"{key} is no field of ECS"
        assert isinstance(value, list) == (key in ECS_ARRAYS), key
        for each in value if isinstance(value, list) else [value]:
            check_ecs_type(key, each)
            assert each in ECS_ALLOWED.get(key, {each}), key
    expected = set().union(*(ECS_CATEGORIES[category] for category in document["event.category"]))
    assert set(document["event.type"]) <= expected
    assert document["ecs.version"].startswith("8.11")
    assert document["event.dataset"] == "es_proxy.audit"
    assert document["observer.type"] == "proxy"
    assert not [key for key in document if any(other.startswith(key + ".") for other in document)], "object and value"


def check_ecs_type(key: str, value: object) -> None:
    """Whether a value can be indexed as what the field list says."""
    kind = ECS_FIELDS[key]
    if kind == "long":
        assert type(value) is int and -(2**63) <= value < 2**63, key
    elif kind == "boolean":
        assert type(value) is bool, key
    else:
        assert isinstance(value, str), key
        value.encode()  # no lone surrogates
        if kind == "ip":
            ipaddress.ip_address(value)
        elif kind == "date":
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3,9}Z", value), key


@contextlib.contextmanager
def ecs_proxy(port: int, log: Path, **changes: Any) -> Iterator[tuple[Running, Callable[[], list[dict[str, Any]]]]]:
    """A proxy that records in ECS, and a function that reads its documents, each of which is checked."""

    def documents() -> list[dict[str, Any]]:
        found = [json.loads(line, object_pairs_hook=only_once) for line in log.read_text("ascii").splitlines()]
        for document in found:
            check_ecs(document)
        return found

    with stopped(Running(make_config(port, log, audit_format="ecs", **changes))) as running:
        yield running, documents
    found = documents()
    assert len({document["event.id"] for document in found}) == len(found)
    starts = [each["http.request.id"] for each in found if each["event.action"] == "http-request"]
    ends = [each["http.request.id"] for each in found if each["event.action"] == "http-response"]
    assert sorted(starts) == sorted(ends)
    assert len(set(starts)) == len(starts)


def last_request(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The last request's document."""
    return next(document for document in reversed(documents) if document["event.action"] == "http-request")


def test_ecs_documents_have_known_fields_of_the_right_type(upstream: MockES, log: Path) -> None:
    """All kinds of requests, answers, refusals and events of the log itself."""
    headers = {
        "Authorization": basic("Zoë".encode()), "User-Agent": "elasticsearch-py/8.15.0 (Python/3.12)",
        "Content-Type": "application/json", "X-Opaque-Id": "o1", "es-security-runas-user": "bob",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Forwarded-For": "10.0.0.7",
    }  # fmt: skip
    with ecs_proxy(upstream.port, log, upstream_timeout_seconds=0.2, redact=False) as (proxy, documents):
        proxy.request("POST", "/a%20b/_search?size=1&q=x", b'{"query":{}}', headers)
        _, *_, request, response = documents()
        proxy.request("GET", "/", None, {"X-Forwarded-For": "10.0.0.7, 10.0.0.8", "Content-Encoding": "br"})
        proxy.request("POST", "/_bulk", gzip.compress(b'{"a":1}\n'), {"Content-Encoding": "gzip"})
        proxy.request("GET", "/_mock/status?code=404")
        proxy.request("GET", "/_mock/silence")
        proxy.request("GET", "/_mock/close-before-response")
        for broken in (
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01",
            b"GET /?a=\xff HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        ):
            proxy.ask(broken)
        log.with_suffix(".1").write_bytes(b"")
        proxy.proxy.audit.event("gap", Lost=3, Since="2026-11-23T13:03:24.123456Z")
        proxy.proxy.audit.event("worker-lost", Pid=7)
        documents()
    assert request["http.request.id"] == response["http.request.id"]
    assert uuid.UUID(request["http.request.id"]).version == 4
    expected = {
        "event.kind": "event", "event.category": ["web", "database", "api"], "http.request.method": "POST",
        "http.version": "1.1", "url.path": "/a%20b/_search", "url.query": "size=1&q=x", "user.name": "Zoë",
        "user.effective.name": "bob", "source.ip": "127.0.0.1", "network.forwarded_ip": "10.0.0.7",
        "user_agent.original": headers["User-Agent"], "http.request.headers.x_opaque_id": "o1",
        "trace.id": "0af7651916cd43dd8448eb211c80319c",
    }  # fmt: skip
    for document, action, kind in ((request, "http-request", "start"), (response, "http-response", "end")):
        assert document.items() >= expected.items()
        assert (document["event.action"], document["event.type"]) == (action, ["access", kind])
    assert (request["http.request.body.bytes"], request["http.request.body.content"]) == (12, '{"query":{}}')
    assert (response["http.response.status_code"], response["event.outcome"]) == (200, "success")
    assert response["event.start"] == request["@timestamp"] <= response["event.end"]
    assert response["event.duration"] > 0


def test_ecs_documents_tell_of_tls(upstream: MockES, log: Path, pki: Pki) -> None:
    """Version, cipher and the client's certificate."""
    cert, key = pki.server
    changes = {"listen_tls": True, "cert": cert, "key": key, "client_ca": pki.ca}
    with ecs_proxy(upstream.port, log, **changes) as (proxy, documents):
        proxy.context = pki.context(*pki.client)
        assert proxy.request("GET", "/")[0] == 200
        request = last_request(documents())
    assert request["tls.version"] in ("1.2", "1.3")
    assert request["tls.established"] is True
    assert request["tls.cipher"]
    assert "Alice Müller" in request["tls.client.subject"]


ECS_BODIES = {
    "text": (b'{"query":"caf\xc3\xa9 \xe2\x80\xa8 \\ \\x41"}', ""),
    "control": (bytes(range(32)) + b'"\\/\x7f', ""),
    "binary": (bytes(range(256)), ""),
    "invalid": (b"x" * 70_000 + b"\xc3", ""),
    "astral": ("\U0001f4a5".encode() * 100_000, ""),
    "gzip": (b'{"index":{}}\n{"a":1}\n' * 1000, "gzip"),
    "gzip of binary": (bytes(range(256)) * 10, "gzip"),
    "broken gzip": (b"\x1f\x8b\x08 no gzip", "broken"),
    "large": (b"".join(big_body(20 << 20)), ""),
    "large gzip": (b"".join(big_body(20 << 20)), "gzip"),
    "large binary": (POOL[: 20 << 20], ""),
}


@pytest.mark.parametrize("kind", ECS_BODIES)
def test_an_ecs_body_is_text_where_it_is_that_and_base64_otherwise(kind: str, upstream: MockES, log: Path) -> None:
    """gzip is unfolded where text comes out; nothing of the body is lost in either form."""
    plain, coding = ECS_BODIES[kind]
    sent = gzip.compress(plain, 1) if coding == "gzip" else plain
    headers = {"Content-Encoding": "gzip"} if coding else {}
    with ecs_proxy(upstream.port, log) as (proxy, documents):
        assert proxy.request("POST", "/_mock/sink", sent, headers)[0] == 200
        document = last_request(documents())
    assert document["http.request.body.bytes"] == len(sent)
    is_text = kind in ("text", "control", "astral", "gzip", "large", "large gzip")
    assert ("http.request.body.content" in document) == is_text
    assert ecs_body(document) == (plain if is_text else sent)
    assert upstream.requests[0].sha256 == hashlib.sha256(sent).hexdigest()


# == One pair each ===============================================================================================
# Every request record has exactly one response record, whatever happens to clock, clients, threads and memory.


@pytest.mark.parametrize("audit_format", ["text", "ecs"])
def test_a_clock_that_steps_backwards_harms_nothing(
    audit_format: str, upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall-clock time is only for timestamps: durations stay true, records stay pairs."""
    clock = [2_000_000_000.0]

    def step() -> float:
        clock[0] -= 3600.5
        return clock[0]

    with (
        stopped(Running(make_config(upstream.port, log, audit_format=audit_format))) as proxy,
        monkeypatch.context() as patched,
    ):
        patched.setattr(time, "time", step)
        for number in range(10):
            assert ask(proxy.port, f"a{number}") == 200
    if audit_format == "text":
        found = pairs(read_log(log))
        assert len(found) == 10
        assert all(0 <= response.duration < PATIENCE for _, response in found)
        assert all(response.line[:27] < request.line[:27] for request, response in found)
    else:
        documents = [json.loads(line) for line in log.read_text().splitlines()]
        durations = [each["event.duration"] for each in documents if each["event.action"] == "http-response"]
        assert len(durations) == 10
        assert all(0 <= duration < PATIENCE * 1e9 for duration in durations)


def test_uuids_are_distinct_in_all_processes(upstream: MockES, log: Path) -> None:
    """No two processes draw the same numbers after the fork: version 4, all distinct."""
    with proxy_process(*words(upstream.port, log, "--workers", "4")) as (_, port, _), ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda number: ask(port, f"u{number}"), range(400))) == {200}
    identifiers = [uuid.UUID(request.id) for request, _ in pairs(read_log(log))]
    assert len(set(identifiers)) == 400
    assert all(each.version == 4 and each.variant == uuid.RFC_4122 for each in identifiers)
    assert all(str(each) == request.id for each, (request, _) in zip(identifiers, pairs(read_log(log)), strict=True))


def test_a_client_that_leaves_while_its_line_is_written_has_its_pair(upstream: MockES, log: Path) -> None:
    """The pipe is full, the client goes away, then the line is written: a request record and a response record."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    with stopped(Running(make_config(upstream.port, log))) as proxy:
        with proxy.connect() as sock:
            sock.sendall(raw_request("left", POOL[: 1 << 20]))
            try:
                wait_until(lambda: blocked_in_write(os.getpid()), "the line waits for room in the pipe")
                sock.close()
            finally:
                pipe = PipeReader(reader)
        wait_until(lambda: " Status: " in pipe.text, "the response's record")
        assert ask(proxy.port, "next") == 200
    pipe.leave()
    (request, _), (following, _) = pairs([parse_line(line) for line in pipe.text.splitlines()])
    assert (mark_of(request), mark_of(following)) == ("left", "next")
    assert request.body == POOL[: 1 << 20]


def test_a_client_that_leaves_before_the_last_piece_has_one_response_record(log: Path) -> None:
    """Its record is written, then sending fails, or the other way round: it stands there once in any case."""
    gone = threading.Event()

    def reply(_: Arrival, sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        assert gone.wait(PATIENCE)
        sock.sendall(b"67890")

    with Witness(HERE / "README.md", reply) as witness, running_proxy(witness.port, log) as proxy:
        for number in range(10):
            gone.clear()
            with proxy.connect() as sock:
                sock.sendall(raw_request(f"left{number}"))
                receive_until(sock, b"12345")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            gone.set()
            wait_until(lambda at=number: log.read_bytes().count(b" Status: ") > at, "a response record")  # type: ignore[misc]
    assert len(pairs(read_log(log))) == 10


def test_a_reader_that_stops_reading_does_not_prevent_the_end(upstream: MockES, log: Path) -> None:
    """Records that nobody takes hold up requests, but not a second SIGTERM."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with (
            proxy_process(*words(upstream.port, log, "--drain", "1")) as (process, port, _),
            socket.create_connection(("127.0.0.1", port), PATIENCE) as sock,
        ):
            sock.sendall(raw_request("stuck", POOL[: 1 << 20]))
            wait_until(lambda: blocked_in_write(process.pid), "the line waits for room in the pipe")
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE / 2)
            finally:
                process.kill()
    finally:
        os.close(reader)


def test_without_new_threads_the_old_ones_do_all_the_work(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`can't start new thread` while requests wait for the upstream: they wait longer, each has its pair."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with running_proxy(upstream.port, log) as proxy:
        monkeypatch.setattr(es_proxy.Worker, "start", refuse)
        with ThreadPoolExecutor(40) as pool:
            statuses = pool.map(lambda number: ask(proxy.port, f"t{number}", b"", "/_mock/slow?ms=50"), range(80))
            assert set(statuses) == {200}
        assert len(proxy.pairs()) == 80
    said = capfd.readouterr().err
    assert said.count("no more threads can be started") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("fault", [MemoryError, KeyError, RecursionError, OSError], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", ["request", "first piece", "response record", "request record"])
def test_a_fault_inside_the_proxy_leaves_a_pair(
    place: str, fault: type[Exception], upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wherever it strikes: the client gets an error or is cut off, records are pairs, and the next request works."""
    strikes = [fault("made to fail")]

    def striking(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*given: Any, **named: Any) -> Any:
            if strikes:
                raise strikes.pop()
            return real(*given, **named)

        return function

    with running_proxy(upstream.port, log) as proxy:
        relay = proxy.proxy.relay
        owner, name = {
            "request": (relay.upstream, "request"),
            "first piece": (es_proxy.UpstreamResponse, "read"),
            "response record": (relay.audit, "response"),
            "request record": (relay.audit, "request"),
        }[place]
        monkeypatch.setattr(owner, name, striking(getattr(owner, name)))
        assert ask(proxy.port, "struck") == 500
        assert ask(proxy.port, "next") == 200
        found = {mark_of(request): response.status for request, response in proxy.pairs()}
    assert found == ({"next": 200} if place == "request record" else {"struck": 500, "next": 200})
    assert marks_seen(upstream) == ({"next"} if place in ("request", "request record") else {"struck", "next"})
    said = capfd.readouterr().err
    assert said.count("internal error") == 1
    assert "Traceback" not in said


def test_processes_that_end_one_after_the_other_under_load_end_in_pairs(upstream: MockES, log: Path) -> None:
    """SIGTERM under load, four times: what was recorded has its answer on record, nothing is said but that."""
    outcomes: dict[str, int] = {}
    for turn in range(4):
        with proxy_process(*words(upstream.port, log, "--workers", "2")) as (process, port, _), Load(8, turn) as load:
            load.resume(port)
            load.more(100)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            load.stop()
        outcomes |= load.outcomes
    evidence = inspect([log])
    evidence.check(marks_seen(upstream), outcomes)
    assert evidence.responses == set(evidence.requests)


# == Torture =====================================================================================================
# Everything at once, for as long as one likes; the promises are checked after every round.


def torture_round(directory: Path, workers: int, seed: int, until: float) -> Storm:
    """Kills, outages, rotations, large bodies and restarts on a small file system, until that monotonic time."""
    sizes = (0,) * 200 + (20,) * 200 + (3000,) * 200 + (200_000,) * 30 + (2_000_000,) * 6 + (20_000_000,)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(small_disk(directory, "700m"))
        except pytest.skip.Exception:
            print("  no file system of its own: outages are left out", flush=True)
            directory.mkdir(exist_ok=True)
        own_disk = os.path.ismount(directory)
        storm = Storm(directory, workers, seed, sizes)
        try:
            with storm:
                while time.monotonic() < until and shutil.disk_usage(directory).free > 100 << 20:
                    deed = storm.rng.random()
                    if deed < 0.55:
                        storm.strike()
                    elif deed < 0.7:
                        storm.strike_in_line()
                    elif deed < 0.9:
                        storm.rotate()
                        threading.Event().wait(0.05)
                    elif own_disk:
                        storm.starve()
                storm.finish()
        except BaseException:
            kept = Path(tempfile.mkdtemp(prefix="es-proxy-torture-"))
            for path in directory.glob("audit.log*"):
                shutil.copy(path, kept)
            (kept / "stderr").write_text("".join(storm.lines))
            (kept / "seen").write_text("\n".join(sorted(marks_seen(storm.mock))))
            (kept / "outcomes.json").write_text(json.dumps(storm.load.outcomes, indent=0))
            print(f"  broken with --seed {seed}; the evidence is in {kept}", flush=True)
            raise
    return storm


def torture(seconds: float, seed: int) -> int:
    """Rounds with one process and with four, in turn; the exit status."""
    end = time.monotonic() + seconds
    total: collections.Counter[str] = collections.Counter()
    number = 0
    while time.monotonic() < end:
        workers = 4 if number % 2 else 1
        until = min(end, time.monotonic() + 15.0)
        with tempfile.TemporaryDirectory(prefix="es-proxy-") as directory:
            try:
                storm = torture_round(Path(directory) / "disk", workers, seed + number, until)
            except (AssertionError, OSError) as error:
                print(f"  {type(error).__name__}: {error}", flush=True)
                return 1
        total += storm.counts
        number += 1
        told = ", ".join(f"{count} {what}" for what, count in sorted(storm.counts.items()))
        print(f"round {number}, workers {workers}, seed {seed + number - 1}: {told}", flush=True)
    told = ", ".join(f"{count} {what}" for what, count in sorted(total.items()))
    print(f"all promises held: {number} rounds, {told}")
    return 0


def main() -> int:
    """The command line of a torture run."""
    parser = argparse.ArgumentParser(description="Kill, starve and rotate es_proxy under load and check the log.")
    parser.add_argument("--torture", metavar="SECONDS", type=float, required=True)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the next ones count on")
    words_given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if words_given.seed is None else words_given.seed
    return torture(words_given.torture, seed)


if __name__ == "__main__":
    sys.exit(main())
