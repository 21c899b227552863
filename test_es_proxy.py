"""Functional tests of es-proxy, and the few tools that all test files share (the first section).

Every test starts what it needs on port 0 of loopback and takes it down again; `nothing_left_behind` holds it to that.
"""

from __future__ import annotations

import ast
import base64
import bisect
import configparser
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.client
import importlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import es_proxy
from mock_es import MockES, big_sha256

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
    """Request and response records joined by id, in order of the requests; fails unless each has one partner."""
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
        self.context: ssl.SSLContext | None = None  # what `client` speaks TLS with, where the proxy does
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

    def client(self) -> http.client.HTTPConnection:
        """A connection by http.client, over TLS where `context` is set."""
        if self.context is not None:
            return http.client.HTTPSConnection(self.host, self.port, timeout=PATIENCE, context=self.context)
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

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
        with contextlib.closing(self.client()) as connection:
            return exchange(connection, method, target, body, headers)

    def stop(self) -> None:
        """Stop it and wait until it has."""
        self.proxy.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the proxy did not stop"


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """One request on an open connection: status and body."""
    connection.request(method, target, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()


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
    """es_proxy.py as a program: the process, its port, and the lines of stderr so far. Ended by SIGTERM at the end.

    Whatever happens to it, a traceback on its stderr is a failure.
    """
    process = subprocess.Popen([sys.executable, str(HERE / "es_proxy.py"), *words], stderr=subprocess.PIPE, **options)
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
        assert not any("Traceback" in line for line in lines), "".join(lines)


def run_program(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """es_proxy.py as a program that ends by itself; its stderr never holds a traceback."""
    command = [sys.executable, str(HERE / "es_proxy.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refused_start(*words: str, **options: Any) -> str:
    """The one line of a program that can't serve: exit status 2, nothing on stdout, nothing claimed to listen."""
    done = run_program(*words, **options)
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines), done.stdout) == (2, 1, ""), (done.returncode, done.stdout, done.stderr)
    assert lines[0].startswith("es-proxy: ")
    assert " listening on " not in lines[0]
    return lines[0]


@contextlib.contextmanager
def background(function: Callable[..., Any], *words: Any) -> Iterator[Any]:
    """A call in a thread of its own, as a future; its end is waited for."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *words)


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait for what no event announces: another process's log, a port that closes."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        threading.Event().wait(0.005)


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def basic(name: bytes, password: bytes = b"secret") -> str:
    """The value of an Authorization field (RFC 7617)."""
    return "Basic " + base64.b64encode(name + b":" + password).decode()


@dataclasses.dataclass(frozen=True)
class Pki:
    """Certificates of tests, all by one authority unless said otherwise; paths of PEM files."""

    ca: str
    ca_key: str
    other_ca: str  # an authority that signed nothing here
    server: tuple[str, str]  # localhost, 127.0.0.1, ::1; the file holds the CA's certificate too
    leaf_only: tuple[str, str]  # the same without the CA's certificate
    wrong_host: tuple[str, str]  # elsewhere.example
    expired: tuple[str, str]
    client: tuple[str, str]  # CN=Alice Müller
    stranger: tuple[str, str]  # a client's by other_ca
    encrypted_key: str

    def context(self, *identity: str) -> ssl.SSLContext:
        """For a client that trusts `ca` and shows `identity` (certificate, key) if there is one."""
        context = ssl.create_default_context(cafile=self.ca)
        if identity:
            context.load_cert_chain(*identity)
        return context

    @staticmethod
    def fingerprint(path: str, number: int) -> str:
        """SHA-256 in hex of the certificate with that number in a PEM file."""
        blocks = re.findall(
            "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", Path(path).read_text(), re.DOTALL
        )
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(blocks[number])).hexdigest()


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Certificates, made once."""
    trustme = pytest.importorskip("trustme", reason="trustme makes the certificates: pip install trustme")
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    directory = tmp_path_factory.mktemp("pki")
    ca, other = trustme.CA(), trustme.CA()

    def write(name: str, data: bytes) -> str:
        path = directory / f"{name}.pem"
        path.write_bytes(data)
        return str(path)

    def pair(name: str, issued: Any, *more: bytes) -> tuple[str, str]:
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems) + b"".join(more)
        return write(name, chain), write(name + "-key", issued.private_key_pem.bytes())

    names = ("localhost", "127.0.0.1", "::1")
    past = importlib.import_module("datetime").datetime(2001, 1, 1)
    server = ca.issue_cert(*names)
    key = serialization.load_pem_private_key(server.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    return Pki(
        ca=write("ca", ca.cert_pem.bytes()),
        ca_key=write("ca-key", ca.private_key_pem.bytes()),
        other_ca=write("other-ca", other.cert_pem.bytes()),
        server=pair("server", server, ca.cert_pem.bytes()),
        leaf_only=pair("leaf", server),
        wrong_host=pair("wrong-host", ca.issue_cert("elsewhere.example"), ca.cert_pem.bytes()),
        expired=pair("expired", ca.issue_cert(*names, not_before=past, not_after=past.replace(year=2002))),
        client=pair("client", ca.issue_cert("alice@example.org", common_name="Alice Müller")),
        stranger=pair("stranger", other.issue_cert("mallory@example.org", common_name="Mallory")),
        encrypted_key=write("locked-key", locked),
    )


@pytest.fixture(params=["plain", "tls"])
def front(request: pytest.FixtureRequest, log: Path) -> Iterator[tuple[Running, MockES]]:
    """A proxy and its upstream, in plain HTTP and in TLS on both sides."""
    tls: tuple[str, str] | None = None
    changes: dict[str, Any] = {}
    context = None
    if request.param == "tls":
        certificates: Pki = request.getfixturevalue("pki")
        tls, context = certificates.server, certificates.context()
        changes = {"listen_tls": True, "upstream_tls": True, "ca": certificates.ca}
        changes |= {"cert": tls[0], "key": tls[1]}
    with MockES(tls=tls) as mock, running_proxy(mock.port, log, **changes) as proxy:
        proxy.context = context
        yield proxy, mock


def plain_words(upstream: MockES, log: Path, *more: str) -> tuple[str, ...]:
    """A command line in plain HTTP."""
    return ("127.0.0.1", str(upstream.port), "127.0.0.1", "0", "--no-tls", "--audit-log", str(log), *more)


def ask_once(port: int, target: str = "/") -> int:
    """The status of a GET in plain HTTP on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        return exchange(connection, "GET", target)[0]


@contextlib.contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that hands its connections to `serve`, one after the other; its port."""
    ended = threading.Event()

    def accept(listening: socket.socket) -> None:
        while True:
            sock, _ = listening.accept()
            with sock:
                if ended.is_set():
                    return
                sock.settimeout(PATIENCE)
                serve(sock)

    with socket.create_server(("127.0.0.1", 0)) as listening, background(accept, listening) as accepting:
        port = listening.getsockname()[1]
        try:
            yield port
        finally:
            ended.set()
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            accepting.result(PATIENCE)


def error_of(body: bytes) -> dict[str, Any]:
    """The `error` object of a response of the proxy's own; fails unless it has the shape of Elasticsearch's."""
    document = json.loads(body)
    assert set(document) == {"error", "status"}
    error: dict[str, Any] = document["error"]
    assert error["type"] == "es_proxy_exception"
    assert error["root_cause"] == [{"type": error["type"], "reason": error["reason"]}]
    assert error["reason"]
    return {**error, "status": document["status"]}


def check_own_answer(proxy: Running, answer: tuple[int, bytes], status: int, code: str, rejected: bool) -> None:
    """A response of the proxy's own: status, shape, code, and its pair, the last one in the log."""
    error = error_of(answer[1])
    request, response = proxy.pairs()[-1]
    assert (answer[0], error["status"], error["code"]) == (status, status, code)
    assert (response.status, response.size, response.marks["Error"]) == (status, len(answer[1]), code)
    assert error["audit_id"] == request.id
    assert request.marks.get("Rejected") == (code if rejected else None)


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


# -- Command line ------------------------------------------------------------------------------------------------

PLACES = ("es.example", "9201", "127.0.0.1", "0")
FINGERPRINT = "0123456789abcdef" * 4
# Option and words behind it: the field of Config, its default, its value then.
OPTIONS: dict[tuple[str, ...], tuple[str, object, object]] = {
    ("--no-tls",): ("listen_tls", True, False),
    ("--tls", "listen"): ("upstream_tls", True, False),
    ("--cert", "/c"): ("cert", "/usr/local/tls/cert_wildcard.pem", "/c"),
    ("--key", "/k"): ("key", "/usr/local/tls/keys/cert_wildcard_key.pem", "/k"),
    ("--client-ca", "/a"): ("client_ca", None, "/a"),
    ("--ca", "/a"): ("ca", None, "/a"),
    ("--ca-fingerprint", FINGERPRINT.upper()): ("ca_fingerprint", None, FINGERPRINT),
    ("--insecure",): ("insecure", False, True),
    ("--audit-log", "/l"): ("audit_log", "-", "/l"),
    ("--audit-format", "ecs"): ("audit_format", "text", "ecs"),
    ("--audit-on-failure", "pass"): ("audit_pass", False, True),
    ("--audit-sync", "always"): ("audit_sync", False, True),
    ("--no-redact",): ("redact", True, False),
    ("--workers", "3"): ("workers", 1, 3),
    ("--audit-body", "none"): ("audit_body_bytes", None, 0),
    ("--threads", "7"): ("threads", 256, 7),
    ("--max-connections", "7"): ("max_connections", 0, 7),
    ("--max-body", "1gb"): ("max_body_bytes", 100 * 2**20, 2**30),
    ("--upstream-timeout", "1.5"): ("upstream_timeout_seconds", 300.0, 1.5),
    ("--drain", "0.25"): ("drain_seconds", 30.0, 0.25),
}


@pytest.mark.parametrize("words", OPTIONS, ids=lambda words: words[0])
def test_an_option_has_its_documented_default_and_takes_a_value(words: tuple[str, ...]) -> None:
    """Each option of DESIGN section 2, left out and given."""
    field, default, given = OPTIONS[words]
    assert getattr(es_proxy.parse_args([*PLACES]), field) == default
    assert getattr(es_proxy.parse_args([*PLACES, *words]), field) == given


def test_the_four_places_are_in_the_order_of_the_original() -> None:
    """REMOTE_HOST REMOTE_PORT LOCAL_HOST LOCAL_PORT."""
    config = es_proxy.parse_args(["up", "1", "here", "2"])
    assert (config.upstream_host, config.upstream_port, config.listen_host, config.listen_port) == ("up", 1, "here", 2)


def test_help_and_readme_list_every_option_and_its_default() -> None:
    """`--help` names the options of the parser, README has a row for each, and both agree on the defaults."""
    text = " ".join(run_program("--help").stdout.split())
    known = {words[0] for words in OPTIONS} | {"--help", "--version"}
    assert set(re.findall(r"(?<!\S)(--[a-z][a-z-]+)", text)) == known
    for default in (es_proxy.DEFAULT_CERT, es_proxy.DEFAULT_KEY, "both", "full", "256", "100mb", "300", "30"):
        assert f"(default: {default})" in text
    section = (HERE / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `--")]
    assert {option for row in rows for option in re.findall(r"(--[a-z-]+)", row.split(" | ")[0])} == known
    for option, default in (("--threads", "256"), ("--drain", "30"), ("--max-body", "100mb"), ("--audit-body", "full")):
        assert any(row.startswith(f"| `{option}") and default in row.split(" | ")[1] for row in rows)


def test_workers_auto_is_one_a_processor() -> None:
    """Of those that this process may use."""
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert es_proxy.parse_args([*PLACES, "--workers", "auto"]).workers == expected


def test_version_and_help_end_with_status_0() -> None:
    """Both go to stdout and nothing to stderr."""
    for words in (["--version"], ["--help"], ["-h"]):
        done = run_program(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    assert run_program("--version").stdout == f"es-proxy {es_proxy.__version__}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("7", 7),
        ("7b", 7),
        ("512kb", 524288),
        ("512KB", 524288),
        ("100mb", 104857600),
        ("1gb", 2**30),
        ("2TB", 2**41),
    ],
)
def test_sizes_have_the_units_of_elasticsearch(text: str, expected: int) -> None:
    """Powers of 1024, in any case, bytes without a unit."""
    assert es_proxy.parse_args([*PLACES, "--max-body", text]).max_body_bytes == expected
    assert es_proxy.parse_args([*PLACES, "--audit-body", text]).audit_body_bytes == expected


NO_COUNT = ("0", "-1", "1.5", "x", "", "\u00b2", "+3")
NO_SIZE = ("-1", "1.5mb", "10xb", "10 mb", "mb", "", "\u0661kb", "1_0")
NO_SECONDS = ("-1", "x", "", "nan", "inf", "1e3", "5s", "1_0")
NO_FINGERPRINT = ("", "ab", FINGERPRINT + "ab", "x" * 64)
BAD_VALUES: list[tuple[str, tuple[str, ...]]] = [
    ("REMOTE_PORT", ("h", "x", "l", "0")),
    ("REMOTE_PORT", ("h", "65536", "l", "0")),
    ("REMOTE_PORT", ("h", "+1", "l", "0")),
    ("REMOTE_PORT", ("h", "\u0661", "l", "0")),
    ("LOCAL_PORT", ("h", "1", "l", "1_0")),
    ("LOCAL_PORT", ("h", "1", "l", "")),
    ("REMOTE_HOST", ()),
    ("LOCAL_PORT", ("h", "1", "l")),
    ("surplus", (*PLACES, "surplus")),
    ("--nope", (*PLACES, "--nope")),
    ("--thr", (*PLACES, "--thr", "4")),
    ("--tls", (*PLACES, "--tls", "maybe")),
    ("--audit-format", (*PLACES, "--audit-format", "xml")),
    ("--audit-on-failure", (*PLACES, "--audit-on-failure", "ignore")),
    ("--audit-sync", (*PLACES, "--audit-sync", "sometimes")),
    ("--workers", (*PLACES, "--workers", "many")),
    ("--cert", (*PLACES, "--cert")),
    *((name, (*PLACES, f"{name}={value}")) for name in ("--threads", "--max-connections") for value in NO_COUNT),
    *((name, (*PLACES, f"{name}={value}")) for name in ("--max-body", "--audit-body") for value in NO_SIZE),
    *((name, (*PLACES, f"{name}={value}")) for name in ("--upstream-timeout", "--drain") for value in NO_SECONDS),
    *(("--ca-fingerprint", (*PLACES, f"--ca-fingerprint={value}")) for value in NO_FINGERPRINT),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_the_option(
    name: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, one line on stderr, nothing on stdout."""
    with pytest.raises(SystemExit) as ended:
        es_proxy.main(list(words))
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("es-proxy: ")
    assert name in err


@pytest.mark.parametrize(
    "words",
    [
        ("--no-tls", "--tls", "both"),
        ("--no-tls", "--tls", "listen"),
        ("--insecure", "--ca", "/a"),
        ("--insecure", "--ca-fingerprint", FINGERPRINT),
        ("--ca-fingerprint", FINGERPRINT, "--ca", "/a"),
        ("--no-tls", "--ca", "/a"),
        ("--no-tls", "--ca-fingerprint", FINGERPRINT),
        ("--no-tls", "--insecure"),
        ("--tls", "listen", "--ca", "/a"),
        ("--no-tls", "--client-ca", "/a"),
        ("--tls", "upstream", "--client-ca", "/a"),
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Options that can't both be meant: one line that names one of them, exit status 2."""
    with pytest.raises(SystemExit) as ended:
        es_proxy.main([*PLACES, *words])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert any(word in err for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    ("words", "sides"),
    [
        ((), (True, True)),
        (("--tls", "both"), (True, True)),
        (("--tls", "listen"), (True, False)),
        (("--tls", "upstream"), (False, True)),
        (("--tls", "none"), (False, False)),
        (("--no-tls",), (False, False)),
        (("--no-tls", "--tls", "none"), (False, False)),
    ],
)
def test_tls_is_on_both_sides_unless_said_otherwise(words: tuple[str, ...], sides: tuple[bool, bool]) -> None:
    """`--tls` and `--no-tls` as (listener, upstream)."""
    config = es_proxy.parse_args([*PLACES, *words])
    assert (config.listen_tls, config.upstream_tls) == sides


def test_a_bad_option_of_the_program_is_one_line_and_status_2() -> None:
    """The same through the program itself, as an operator sees it."""
    assert "--threads" in refused_start(*PLACES, "--threads", "none")


def test_missing_certificates_are_one_clear_line(pki: Pki, tmp_path: Path) -> None:
    """Each PEM file that is missing, garbage, mismatched or encrypted: the option, the file, the cause."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    cert, key = pki.server
    places = ("127.0.0.1", "1", "127.0.0.1", "0")
    missing = str(tmp_path / "missing.pem")
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("--cert", missing, ("--cert", missing, "--key", key)),
        ("--key", missing, ("--cert", cert, "--key", missing)),
        ("--cert", str(garbage), ("--cert", str(garbage), "--key", key)),
        ("--key", pki.client[1], ("--cert", cert, "--key", pki.client[1])),
        ("encrypted", pki.encrypted_key, ("--cert", cert, "--key", pki.encrypted_key)),
        ("--cert", str(tmp_path), ("--cert", str(tmp_path), "--key", key)),
        ("--client-ca", missing, ("--cert", cert, "--key", key, "--client-ca", missing)),
        ("--client-ca", str(garbage), ("--cert", cert, "--key", key, "--client-ca", str(garbage))),
        ("--ca", missing, ("--tls", "upstream", "--ca", missing)),
        ("--ca", str(garbage), ("--tls", "upstream", "--ca", str(garbage))),
    ]
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda case: refused_start(*places, *case[2]), cases))
    for (option, path, _), line in zip(cases, lines, strict=True):
        assert option in line
        assert path in line


def test_the_default_certificate_is_named_when_it_is_missing() -> None:
    """TLS is the default, so the first start without a certificate must say what to do."""
    if Path(es_proxy.DEFAULT_CERT).exists():
        pytest.skip(f"{es_proxy.DEFAULT_CERT} exists here")
    line = refused_start("127.0.0.1", "1", "127.0.0.1", "0")
    assert es_proxy.DEFAULT_CERT in line
    assert "--no-tls" in line


def test_an_address_that_cant_be_listened_on_is_one_clear_line() -> None:
    """A port in use, an unknown name, an address of another machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = str(taken.getsockname()[1])
        line = refused_start("127.0.0.1", "1", "127.0.0.1", used, "--no-tls")
        assert used in line
        assert "in use" in line
    for host in ("nonexistent.invalid", "192.0.2.1"):
        assert host in refused_start("127.0.0.1", "1", host, "0", "--no-tls")


def unusable_logs(directory: Path) -> dict[str, tuple[str, str]]:
    """Paths that can't be an audit log: path, and a word of the cause."""
    (directory / "link").symlink_to(directory / "target")
    (directory / "target").touch()
    (directory / "open").touch()
    (directory / "open").chmod(0o666)
    os.mkfifo(directory / "fifo")
    return {
        "missing directory": (str(directory / "missing" / "log"), "No such file"),
        "full disk": ("/dev/full", "No space left"),
        "symbolic link": (str(directory / "link"), "symbolic link"),
        "world-writable": (str(directory / "open"), "everyone"),
        "directory": (str(directory), "directory"),
        "FIFO without a reader": (str(directory / "fifo"), "FIFO"),
        "no name": ("", "--audit-log"),
    }


def test_a_log_that_cant_be_trusted_prevents_the_start(tmp_path: Path) -> None:
    """Each kind: exit status 2, one line that names the file and the cause."""
    logs = unusable_logs(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        run = lambda path: refused_start("127.0.0.1", "1", "127.0.0.1", "0", "--no-tls", "--audit-log", path)  # noqa: E731
        lines = dict(zip(logs, pool.map(run, [path for path, _ in logs.values()]), strict=True))
    for name, (path, cause) in logs.items():
        assert f"--audit-log {path}" in lines[name], name
        assert cause in lines[name], name
    assert (tmp_path / "target").read_bytes() == b""
    assert (tmp_path / "open").read_bytes() == b""


def test_a_closed_stdout_prevents_the_start() -> None:
    """Records would go nowhere, or into whatever file gets descriptor 1 next."""
    words = ["127.0.0.1", "1", "127.0.0.1", "0", "--no-tls"]
    command = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, str(HERE / "es_proxy.py"), *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output" in done.stderr


def test_two_proxies_dont_share_a_log(upstream: MockES, log: Path) -> None:
    """The second one is told so, the first one's log stays as it was; afterwards the log is free."""
    words = ("127.0.0.1", str(upstream.port), "127.0.0.1", "0", "--no-tls", "--audit-log", str(log))
    with proxy_process(*words):
        before = log.read_bytes()
        assert "another es-proxy" in refused_start(*words)
        assert log.read_bytes() == before
    with running_proxy(upstream.port, log) as proxy:
        assert proxy.request("GET", "/")[0] == 200


def test_a_new_log_is_closed_to_others_and_an_old_one_is_continued(upstream: MockES, log: Path) -> None:
    """Mode 0640 at most; what was there stays."""
    for count in (1, 2):
        with running_proxy(upstream.port, log) as proxy:
            proxy.request("GET", "/")
            assert len(proxy.pairs()) == count
    assert log.stat().st_mode & 0o7777 & ~0o640 == 0


def test_records_on_stdout_are_never_mixed_with_messages(upstream: MockES, pki: Pki) -> None:
    """With the log on stdout every line there is a record, every line on stderr a message."""
    cert, key = pki.server
    words = ("127.0.0.1", str(upstream.port), "127.0.0.1", "0", "--tls", "listen", "--cert", cert, "--key", key)
    with proxy_process(*words, stdout=subprocess.PIPE) as (process, port, lines):
        with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", port, context=pki.context())) as connection:
            assert exchange(connection, "GET", "/")[0] == 200
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as broken:  # a message: no TLS
            broken.sendall(b"\x16\x03\x01\x00\x05hello")
            read_all(broken)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        output = process.stdout.read().decode("ascii")
        assert process.wait(PATIENCE) == 0
    records = [parse_line(line) for line in output.splitlines()]
    assert [record.kind for record in records] == ["event", "request", "response", "event"]
    assert [record.id for record in records if record.kind == "event"] == ["start", "stop"]
    assert len(lines) >= 2
    assert all(line.startswith("es-proxy: ") for line in lines)
    assert any("TLS" in line for line in lines[1:])


def test_a_log_can_be_a_fifo_that_is_read(upstream: MockES, log: Path) -> None:
    """A pipe to another program gets whole lines."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        running = Running(make_config(upstream.port, log))
        try:
            assert running.request("GET", "/")[0] == 200
        finally:
            running.stop()
        text = os.read(reader, 65536).decode()
    finally:
        os.close(reader)
    assert [parse_line(line).kind for line in text.splitlines()] == ["event", "request", "response", "event"]


def test_the_start_line_comes_once_it_serves_and_says_what(upstream: MockES, log: Path) -> None:
    """One line: address, upstream, TLS, log. Whoever read it can connect, and the log knows of the start."""
    words = ("127.0.0.1", str(upstream.port), "127.0.0.1", "0", "--no-tls", "--audit-log", str(log))
    with proxy_process(*words) as (process, port, lines):
        (event,) = read_log(log)
        assert (event.kind, event.id) == ("event", "start")
        assert event.marks["Version"] == es_proxy.__version__
        assert event.marks["Pid"] == str(process.pid)
        assert re.fullmatch("[0-9a-f]{64}", event.marks["Config-SHA256"])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            assert exchange(connection, "GET", "/")[0] == 200
        line = (
            f"es-proxy: {es_proxy.__version__} listening on http://127.0.0.1:{port}, upstream"
            f" http://127.0.0.1:{upstream.port}, audit log {log}\n"
        )
        assert lines == [line]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"listen_tls": True}, ["listening on https://127.0.0.1:", "upstream http://127.0.0.1:1,"]),
        ({"listen_tls": True, "client_ca": "CA"}, ["client certificates required"]),
        ({"upstream_tls": True}, ["upstream https://127.0.0.1:1 (verified: system store)"]),
        ({"upstream_tls": True, "ca": "CA"}, ["(verified: ", "ca.pem)"]),
        ({"upstream_tls": True, "ca_fingerprint": FINGERPRINT}, ["(verified: pinned to 0123456789abcdef"]),
        ({"upstream_tls": True, "insecure": True}, ["NOT VERIFIED: --insecure"]),
        ({"upstream_host": "::1"}, ["upstream http://[::1]:1,"]),
        ({"listen_host": "::1"}, ["listening on http://[::1]:"]),
        ({"audit_log": "-"}, ["audit log standard output"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_start_line_names_tls_and_trust(changes: dict[str, Any], expected: list[str], pki: Pki, log: Path) -> None:
    """Each way to configure TLS, in words."""
    files = {key: pki.ca if value == "CA" else value for key, value in changes.items()}
    cert, key = pki.server
    config = make_config(1, log, **{"cert": cert, "key": key, **files})
    line = es_proxy.description(config, (config.listen_host, 9200))
    assert all(part in line for part in expected), line


# -- The record --------------------------------------------------------------------------------------------------

STAND_INS = {b"None", b"anonymous", b"malformed", b"-"}


def test_the_two_lines_have_the_documented_form(upstream: MockES, log: Path) -> None:
    """DESIGN section 5, letter by letter."""
    with running_proxy(upstream.port, log) as proxy:
        headers = {"Authorization": basic(b"alice"), "User-Agent": "test client/1"}
        status, answer = proxy.request("POST", "/books/_search?size=1", b"{}", headers)
    lines = log.read_text().splitlines()
    uuid = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    common = (
        rf"[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}T[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}\.[0-9]{{6}}Z ID: ({uuid}) User: alice"
        " Path: /books/_search Query: size=1 Method: POST Source: 127.0.0.1 Agent: test client/1 "
    )
    first = re.fullmatch(common + "Body: e30=", lines[1])
    second = re.fullmatch(common + rf"Status: {status} Duration: [0-9]+\.[0-9]{{3}}s Size: {len(answer)}", lines[2])
    assert first
    assert second
    assert first[1] == second[1]


def test_stand_ins_say_what_is_missing(upstream: MockES, log: Path) -> None:
    """No credentials, no query, no agent, no body; and a request that has no field at all."""
    with running_proxy(upstream.port, log) as proxy:
        proxy.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        proxy.ask(b"\0\r\n\r\n")
        (plain, _), (broken, refused) = proxy.pairs()
    assert " User: anonymous Path: / Query: None Method: GET Source: 127.0.0.1 Agent:  Body: " in plain.line
    assert plain.line.endswith(" Body: ")
    assert " User: - Path: - Query: - Method: - Source: 127.0.0.1 Agent: - Body: AA0KDQo= Rejected: " in broken.line
    assert refused.status == 400


def test_an_empty_query_is_not_no_query(upstream: MockES, log: Path) -> None:
    """`/a?` has a query that is empty, `/a` has none, `/a?None` is spelled so that it isn't none."""
    with running_proxy(upstream.port, log) as proxy:
        for target in ("/a", "/a?", "/a?None", "/a?b?c"):
            proxy.request("GET", target)
        assert [request.query for request, _ in proxy.pairs()] == [None, b"", b"None", b"b?c"]
        assert " Query: \\x4eone " in proxy.pairs()[2][0].line


def jwt(payload: object) -> str:
    """An unsigned JSON Web Token."""
    parts = [json.dumps(part).encode() if not isinstance(part, bytes) else part for part in ({"alg": "none"}, payload)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in [*parts, b"sig"])


def digest_user(token: str) -> str:
    """The user of a token that only the cluster can read."""
    return "bearer:" + hashlib.sha256(token.encode()).hexdigest()[:16]


SERVICE = base64.b64encode(b"\0\1\0\1elastic/kibana/token1:secret").decode()
CREDENTIALS: list[tuple[str | None, str]] = [
    (None, "anonymous"),
    (basic(b"alice"), "alice"),
    (basic(b"alice").replace("Basic", "bAsIc"), "alice"),
    (basic(b"alice").replace(" ", "   "), "alice"),
    (basic(b"alice", b"pass:word"), "alice"),
    (basic(b""), ""),
    (basic(b"a b\n\x00\xff\\"), "a\\x20b\\x0a\\x00\\xff\\x5c"),
    (basic("Müller".encode()), "M\\xc3\\xbcller"),
    (basic(b"anonymous"), "\\x61nonymous"),
    (basic(b"malformed"), "\\x6dalformed"),
    (basic(b"-"), "\\x2d"),
    (basic(b"None"), "\\x4eone"),
    (basic(b"x User"), "x\\x20User"),
    ("Basic", "malformed"),
    ("Basic " + base64.b64encode(b"no colon").decode(), "malformed"),
    ("Basic !!!!", "malformed"),
    ("Basic YTpi=YTpi", "malformed"),
    ("ApiKey " + base64.b64encode(b"id-1:key").decode(), "apikey:id-1"),
    ("apikey " + base64.b64encode(b"id-1:key").decode(), "apikey:id-1"),
    ("ApiKey bm9jb2xvbg==", "malformed"),
    ("ApiKey ****", "malformed"),
    ("Bearer opaque-token", digest_user("opaque-token")),
    ("Bearer", "malformed"),
    ("Bearer " + jwt({"sub": "carol", "iss": "x"}), "jwt:carol"),
    ("Bearer " + jwt({"sub": "c d: e"}), "jwt:c\\x20d:\\x20e"),
    ("Bearer " + jwt({"iss": "x"}), digest_user(jwt({"iss": "x"}))),
    ("Bearer " + jwt({"sub": 7}), digest_user(jwt({"sub": 7}))),
    ("Bearer " + jwt(["sub"]), digest_user(jwt(["sub"]))),
    ("Bearer " + jwt(b"[" * 100_000), digest_user(jwt(b"[" * 100_000))),
    ("Bearer " + jwt(b"\xff"), digest_user(jwt(b"\xff"))),
    ("Bearer a.b.c", digest_user("a.b.c")),
    ("Bearer " + SERVICE, "service:elastic/kibana/token1"),
    ("Bearer " + SERVICE.rstrip("="), "service:elastic/kibana/token1"),
    ("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20261123/eu-west-1/es/aws4_request, SignedHeaders=host, Signature=f",
     "aws:AKIDEXAMPLE"),
    ("AWS4-HMAC-SHA256 SignedHeaders=host, Signature=f", "malformed"),
    ('Digest username="dave", realm="x"', "digest:-"),
    ("Negotiate YIIabc", "negotiate:-"),
    ("SharedSecret elastic", "sharedsecret:-"),
    ("justatoken", "justatoken:-"),
]  # fmt: skip


@pytest.mark.parametrize(("authorization", "user"), CREDENTIALS)
def test_the_user_is_what_the_credentials_name(authorization: str | None, user: str) -> None:
    """Every scheme, as it stands in the record: never a secret, never a field of its own."""
    value = None if authorization is None else authorization.encode()
    assert es_proxy.identify(value, None).decode() == user


@pytest.mark.parametrize(
    ("authorization", "user"),
    [
        ("Basic " + base64.b64encode(b"al:x").decode().rstrip("="), "al"),
        ("ApiKey " + base64.b64encode(b"id:x").decode().rstrip("="), "apikey:id"),
    ],
)
def test_base64_without_padding_is_decoded_as_elasticsearch_does(authorization: str, user: str) -> None:
    """java.util.Base64 takes it, so a user could authenticate and still be recorded as malformed."""
    assert authorization[-1] != "="
    assert es_proxy.identify(authorization.encode(), None).decode() == user


def test_the_user_changes_with_the_credentials_on_one_connection(upstream: MockES, log: Path) -> None:
    """Credentials are decoded once and remembered, which must not stick to the next request."""
    values = [None, basic(b"alice"), basic(b"alice"), basic(b"bob"), None, "Negotiate x", basic(b"alice")]
    with running_proxy(upstream.port, log) as proxy:
        with contextlib.closing(proxy.client()) as connection:
            for value in values:
                exchange(connection, "GET", "/", None, {"Authorization": value} if value else {})
        users = [request.user for request, _ in proxy.pairs()]
    assert users == [b"anonymous", b"alice", b"alice", b"bob", b"anonymous", b"negotiate:-", b"alice"]


def test_a_client_certificate_names_the_user_where_nothing_else_does(upstream: MockES, log: Path, pki: Pki) -> None:
    """`cert:CN`, escaped; credentials go before it, and leave no trace on the next request."""
    cert, key = pki.server
    changes = {"listen_tls": True, "cert": cert, "key": key, "client_ca": pki.ca}
    with running_proxy(upstream.port, log, **changes) as proxy:
        proxy.context = pki.context(*pki.client)
        with contextlib.closing(proxy.client()) as connection:
            for value in (None, basic(b"bob"), None):
                assert exchange(connection, "GET", "/", None, {"Authorization": value} if value else {})[0] == 200
        users = [request.line.split(" User: ")[1].split(" ")[0] for request, _ in proxy.pairs()]
    assert users == ["cert:Alice\\x20M\\xc3\\xbcller", "bob", "cert:Alice\\x20M\\xc3\\xbcller"]


def hostile_values(count: int) -> Iterator[bytes]:
    """Values made to be taken for something else; the same ones in every run."""
    rng = random.Random(5)
    pieces = [
        b" ",
        b":",
        b": ",
        b"\\",
        b"\\x3a",
        b"\n",
        b"\r\n",
        *STAND_INS,
        b" Body: QUJD",
        b" User: root",
        b" Error: x",
    ]
    pieces += [
        b" Status: 200 Duration: 0.001s Size: 1",
        "é".encode(),
        b"\0",
        b"\xff",
        b"\x85",
        b"\x1c",
        b"Agent",
        b"\t",
    ]
    for _ in range(count):
        if rng.random() < 0.3:
            yield rng.randbytes(rng.randrange(12))
        else:
            yield b"".join(rng.choices(pieces, k=rng.randrange(5)))


@pytest.mark.parametrize("spaces", [False, True], ids=["word", "agent"])
def test_no_byte_at_any_place_survives_as_a_delimiter(spaces: bool) -> None:
    """Bytes 0 to 255 first, in the middle, last, alone, before a space: escaped as documented, and back."""
    function = es_proxy.escape_agent if spaces else es_proxy.escape
    for code in range(256):
        byte = bytes((code,))
        for value in (byte, byte + b"a", b"a" + byte + b"b", b"a" + byte, b"a" + byte + b" b", b"a :" + byte):
            text = function(value)
            assert re.fullmatch(rb"[\x20-\x7e]*" if spaces else rb"[\x21-\x7e]*", text)
            assert b": " not in text
            assert text[-1:] not in (b":", b" ")
            assert es_proxy.unescape(text) == value
            if 0x21 <= code <= 0x7E and code not in b"\\:-":
                assert function(b"a" + byte + b"b") == b"a" + byte + b"b"
    for value in STAND_INS:
        assert function(value) == b"\\x%02x" % value[0] + value[1:]
        assert function(b"x" + value) == b"x" + value


def through_the_log(audit: es_proxy.AuditLog, fields: dict[str, bytes], body: bytes) -> None:
    """Write an exchange with these values as its two records."""
    agent = fields["agent"]
    user = es_proxy.identify(basic(fields["user"]).encode(), None)
    made = es_proxy.Exchange(b"127.0.0.1", user, es_proxy.escape_agent(agent) if agent else b"")
    made.asks(fields["method"], fields["path"] + b"?" + fields["query"], redact=False)
    made.run_as = es_proxy.escape(fields["mark"])
    audit.request(made, None, body)
    made.status, made.size, made.error = 200, 7, "client-gone"
    audit.response(made)


def test_what_is_parsed_is_what_was_sent_whatever_it_is(log: Path) -> None:
    """parse(format(x)) == x for every field, with values that try to forge fields, lines and stand-ins."""
    values = hostile_values(6000)
    sent = []
    with contextlib.closing(es_proxy.AuditLog(make_config(1, log))) as audit:
        for value in values:
            user, path, query, agent, mark = value.replace(b":", b""), *(next(values) for _ in range(4))
            path = path.replace(b"?", b"")
            fields = {"user": user, "path": path, "query": query, "method": value, "agent": agent, "mark": mark}
            through_the_log(audit, fields, value)
            sent.append((fields, value))
    for (fields, body), (request, response) in zip(sent, pairs(read_log(log)), strict=True):
        for record in (request, response):
            found = {name: getattr(record, name) for name in ("user", "path", "query", "method", "agent")}
            assert {**found, "mark": fields["mark"]} == fields
            assert record.source == "127.0.0.1"
        marks = {key: es_proxy.unescape(text.encode()) for key, text in request.marks.items()}
        assert (request.body, marks) == (body, {"Run-As": fields["mark"]} if fields["mark"] else {})
        assert (response.status, response.duration, response.size) == (200, 0.0, 7)
        assert response.marks == {"Error": "client-gone"}


def test_whatever_gets_over_the_wire_is_recorded_and_relayed_as_it_came(upstream: MockES, log: Path) -> None:
    """Every byte that HTTP allows in a field and in a target."""
    value = bytes(range(0x21, 0x7F)) + b" \t" + bytes(range(0x80, 0x100)) + b" Body: QUJD Status: 200 x:"
    target = b"/" + bytes(code for code in range(0x21, 0x7F) if code not in b"#")
    head = b"GET %b HTTP/1.1\r\nHost: a\r\nUser-Agent: %b\r\nX-Opaque-Id: %b\r\n\r\n" % (target, value, value)
    with running_proxy(upstream.port, log) as proxy:
        proxy.ask(head)
        ((request, response),) = proxy.pairs()
    path, _, query = target.partition(b"?")
    for record in (request, response):
        assert (record.agent, record.path, record.query) == (value, path, query)
    assert es_proxy.unescape(request.marks["Opaque-Id"].encode()) == value
    (seen,) = upstream.requests
    assert (seen.target, seen.values(b"user-agent"), seen.values(b"x-opaque-id")) == (target, [value], [value])


def test_timestamps_are_utc_with_microseconds() -> None:
    """No rounding up into a seventh digit."""
    assert es_proxy.timestamp(1795439004.25) == b"2026-11-23T13:03:24.250000Z"
    assert es_proxy.timestamp(0.0) == b"1970-01-01T00:00:00.000000Z"
    assert es_proxy.timestamp(1.9999999) == b"1970-01-01T00:00:01.999999Z"


def test_ids_are_random_uuids() -> None:
    """Version 4, variant 10, none twice."""
    made = [es_proxy.new_id() for _ in range(2000)]
    assert len(set(made)) == len(made)
    pattern = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert all(pattern.fullmatch(text) for text in made)


def test_marks_of_a_request_stand_in_their_order(upstream: MockES, log: Path) -> None:
    """Run-As, Forwarded, Opaque-Id, Body-Bytes, Body-SHA256; Rejected is the last."""
    fields = b"X-Opaque-Id: op 1\r\nX-Forwarded-For: 1.2.3.4\r\nes-security-runas-user: bob\r\n"
    with running_proxy(upstream.port, log, audit_body_bytes=3, max_body_bytes=100) as proxy:
        proxy.ask(b"POST /a/_doc HTTP/1.1\r\nHost: a\r\n%bContent-Length: 4\r\n\r\n{ } " % fields)
        proxy.ask(b"POST /a/_doc HTTP/1.1\r\nHost: a\r\n%bContent-Length: 101\r\n\r\n" % fields)
        (cut, _), (rejected, _) = proxy.pairs()
    digest = hashlib.sha256(b"{ } ").hexdigest()
    common = r" Run-As: bob Forwarded: 1\.2\.3\.4 Opaque-Id: op\\x201 Body-Bytes: "
    assert re.search(rf" Body: eyB9{common}4 Body-SHA256: {digest}$", cut.line)
    assert re.search(rf" Body: UE9T{common}[0-9]+ Body-SHA256: [0-9a-f]+ Rejected: body-too-large$", rejected.line)


def test_marks_of_a_response_stand_in_their_order(log: Path) -> None:
    """Error, Attempts, Sent; none of them when all went well."""
    with contextlib.closing(es_proxy.AuditLog(make_config(1, log))) as audit:
        for error, attempts, sent in ((None, 1, None), ("client-gone", 2, 5)):
            made = es_proxy.Exchange(b"::1")
            audit.request(made, None)
            made.status, made.error, made.attempts, made.sent = 200, error, attempts, sent
            audit.response(made)
    (_, plain), (_, marked) = pairs(read_log(log))
    assert plain.line.endswith(" Status: 200 Duration: 0.000s Size: 0")
    assert marked.line.endswith(" Size: 0 Error: client-gone Attempts: 2 Sent: 5")


@pytest.mark.parametrize("field", [b"opendistro_security_impersonate_as: bob", b"es-security-runas-user: bob"])
def test_acting_as_another_user_is_marked(upstream: MockES, log: Path, field: bytes) -> None:
    """Both security plugins' way to ask for it."""
    with running_proxy(upstream.port, log) as proxy:
        proxy.ask(b"GET / HTTP/1.1\r\nHost: a\r\n" + field + b"\r\n\r\n")
        assert proxy.pairs()[0][0].marks == {"Run-As": "bob"}


@pytest.mark.parametrize("spooled", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("limit", [None, 0, 10, 1 << 20, 1 << 30], ids=["full", "none", "10", "1mb", "1gb"])
def test_bodies_are_recorded_as_far_as_asked_for(upstream: MockES, log: Path, limit: int | None, spooled: bool) -> None:
    """`--audit-body`: what is cut off leaves its length and digest; the upstream gets all of it in any case."""
    body = random.Random(1).randbytes((2 << 20) + 7 if spooled else 5000)
    with running_proxy(upstream.port, log, audit_body_bytes=limit) as proxy:
        assert json.loads(proxy.request("PUT", "/_mock/sink", body)[1])["length"] == len(body)
        ((request, _),) = proxy.pairs()
    digest = hashlib.sha256(body).hexdigest()
    assert upstream.requests[0].sha256 == digest
    if limit is None or limit >= len(body):
        assert request.marks == {}
        assert request.body == body
    else:
        assert request.marks == {"Body-Bytes": str(len(body)), "Body-SHA256": digest}
        assert request.body == body[:limit]


def test_no_body_is_not_a_cut_one(upstream: MockES, log: Path) -> None:
    """`--audit-body none` marks only what there was."""
    with running_proxy(upstream.port, log, audit_body_bytes=0) as proxy:
        proxy.request("GET", "/")
        proxy.request("POST", "/a/_refresh", b"")
        assert [(request.body, request.marks) for request, _ in proxy.pairs()] == [(b"", {}), (b"", {})]


def test_bodies_beyond_the_memory_of_all_go_to_files(upstream: MockES, log: Path) -> None:
    """Small bodies too, once all unfinished ones together hold more than their budget."""
    with running_proxy(upstream.port, log, limits={"memory_total_bytes": 1000}) as proxy:
        with proxy.connect() as holder:  # takes most of the budget, and leaves
            holder.sendall(b"POST /half HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n" + b"x" * 900)
            assert proxy.request("POST", "/_mock/echo", b"y" * 800) == (200, b"y" * 800)
        wait_until(lambda: len(read_log(log)) == 5, "the unfinished request's records")
        assert proxy.request("POST", "/_mock/echo", b"z" * 800) == (200, b"z" * 800)
        found = {request.path: request.body for request, _ in proxy.pairs()[:2]}
    assert found[b"/_mock/echo"] == b"y" * 800


@pytest.mark.parametrize("size", [0, 1, 2, 3, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20], ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_of_any_size_is_recorded_and_relayed_bit_by_bit(
    upstream: MockES, log: Path, size: int, chunked: bool
) -> None:
    """Around the border between memory and file, in both framings."""
    body = random.Random(size).randbytes(size)
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        if chunked:
            pieces = (body[start : start + 70_000] for start in range(0, size, 70_000))
            connection.request("POST", "/_mock/echo", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        else:
            connection.request("POST", "/_mock/echo", body)
        assert connection.getresponse().read() == body
        ((request, response),) = proxy.pairs()
    assert (request.body, response.size) == (body, size)
    assert upstream.requests[0].sha256 == hashlib.sha256(body).hexdigest()


def test_a_compressed_body_is_recorded_as_it_came(upstream: MockES, log: Path) -> None:
    """gzip stays gzip, in the log and on the way."""
    body = gzip.compress(b'{"query":{"match_all":{}}}')
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    with running_proxy(upstream.port, log) as proxy:
        assert proxy.request("POST", "/a/_search", body, headers)[0] == 200
        assert proxy.pairs()[0][0].body == body
    assert upstream.requests[0].body == body


def test_the_duration_covers_the_wait_for_the_upstream(upstream: MockES, log: Path) -> None:
    """In seconds with milliseconds, and 0.000 where nothing was forwarded."""
    with running_proxy(upstream.port, log) as proxy:
        proxy.request("GET", "/_mock/slow?ms=120")
        proxy.ask(b"GET / HTTP/1.1\r\n\r\n")
        (_, slow), (_, refused) = proxy.pairs()
    assert slow.duration >= 0.12
    assert " Duration: 0.000s " in refused.line


def test_a_log_starts_and_stops_with_events(upstream: MockES, log: Path) -> None:
    """`start` with version, configuration and process, `stop` as the last line; a changed configuration shows."""
    digests = set()
    for drain in (1.0, 2.0):
        with running_proxy(upstream.port, log, drain_seconds=drain) as proxy:
            proxy.request("GET", "/")
        start, *_, stop = read_log(log)[-4:]
        assert (start.id, stop.id) == ("start", "stop")
        assert start.marks["Pid"] == stop.marks["Pid"] == str(os.getpid())
        digests.add(start.marks["Config-SHA256"])
    assert len(digests) == 2


def test_no_redact_is_on_record_at_every_start(upstream: MockES, log: Path) -> None:
    """Whoever reads the log must know that it holds secrets."""
    with running_proxy(upstream.port, log, redact=False):
        pass
    assert [record.id for record in read_log(log)] == ["start", "no-redact", "stop"]


def test_a_torn_line_is_closed_off_at_the_start(upstream: MockES, log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a crash left unfinished stays a line of its own, an event and a message tell of it."""
    log.write_bytes(b"2026-11-23T13:03:24.123456Z ID: torn")
    with running_proxy_of_torn_log(upstream.port, log) as lines:
        pass
    assert lines[0] == "2026-11-23T13:03:24.123456Z ID: torn"
    records = [parse_line(line) for line in lines[1:]]
    assert [record.id for record in records if record.kind == "event"] == ["recovered", "start", "stop"]
    assert str(log) in capfd.readouterr().err


@contextlib.contextmanager
def running_proxy_of_torn_log(upstream_port: int, log: Path) -> Iterator[list[str]]:
    """One request through a proxy on a log with a broken line; the log's lines, filled in at the end."""
    lines: list[str] = []
    running = Running(make_config(upstream_port, log))
    try:
        assert running.request("GET", "/")[0] == 200
        yield lines
    finally:
        running.stop()
        lines.extend(log.read_text().splitlines())


def test_without_a_log_nothing_is_forwarded_and_the_gap_is_on_record(
    upstream: MockES, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pipe whose reader leaves: 503, nothing upstream; when one is back, a gap with the number of lost records."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    running = Running(make_config(upstream.port, log))
    try:
        assert running.request("GET", "/first")[0] == 404
        os.read(reader, 65536)
        os.close(reader)
        for _ in range(3):
            status, body = running.request("GET", "/lost")
            assert (status, error_of(body)["code"]) == (503, "audit-unavailable")
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        assert running.request("GET", "/again")[0] == 404
        records = [parse_line(line) for line in os.read(reader, 65536).decode().splitlines()]
    finally:
        running.stop()
        os.close(reader)
    assert [(record.kind, record.path) for record in records[1:]] == [("request", b"/again"), ("response", b"/again")]
    assert (records[0].kind, records[0].id, records[0].marks["Lost"]) == ("event", "gap", "3")
    assert [seen.target for seen in upstream.requests] == [b"/first", b"/again"]
    messages = capfd.readouterr().err
    assert messages.count("can't be written") == 1
    assert "can be written again" in messages


def test_a_response_whose_record_is_lost_is_not_delivered(upstream: MockES, log: Path) -> None:
    """The log fails while the upstream works: 500, which no official client answers by sending the request again."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    running = Running(make_config(upstream.port, log))
    try:
        with background(running.request, "GET", "/_mock/slow?ms=300") as answer:
            upstream.wait_for_requests(1)
            os.close(reader)
            status, body = answer.result()
    finally:
        running.stop()
    assert (status, error_of(body)["code"]) == (500, "audit-response-lost")


# -- Error responses ---------------------------------------------------------------------------------------------


def test_a_refused_upstream_is_502(log: Path) -> None:
    """Elasticsearch is down."""
    with running_proxy(free_port(), log) as proxy:
        check_own_answer(proxy, proxy.request("GET", "/"), 502, "upstream-refused", rejected=False)
        assert proxy.pairs()[0][1].marks == {"Error": "upstream-refused", "Attempts": "2"}


def test_an_unknown_name_is_502(log: Path) -> None:
    """REMOTE_HOST can't be resolved; that prevents no start, it may be resolved later."""
    with running_proxy(9200, log, upstream_host="nonexistent.invalid") as proxy:
        check_own_answer(proxy, proxy.request("GET", "/"), 502, "upstream-unknown-name", rejected=False)


def test_a_name_no_resolver_takes_is_502(log: Path) -> None:
    """A label of 64 characters raises UnicodeError in the resolver, not OSError."""
    with running_proxy(9200, log, upstream_host="a" * 64 + ".invalid") as proxy:
        status, body = proxy.request("GET", "/")
        assert status == 502
        assert error_of(body)["code"].startswith("upstream-")


def test_silence_is_504(upstream: MockES, log: Path) -> None:
    """`--upstream-timeout` of silence before the response's head."""
    with running_proxy(upstream.port, log, upstream_timeout_seconds=1.0) as proxy:
        check_own_answer(proxy, proxy.request("POST", "/_mock/silence", b"x"), 504, "upstream-timeout", rejected=False)
        assert proxy.request("GET", "/")[0] == 200
    assert len(upstream.requests) == 2


def test_silence_inside_a_body_cuts_the_response_off(upstream: MockES, log: Path) -> None:
    """The head has gone out with its 200; what follows can't look like a whole response."""
    with running_proxy(upstream.port, log, upstream_timeout_seconds=1.0) as proxy:
        with contextlib.closing(proxy.client()) as connection:
            script = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"
            connection.request("POST", "/_mock/raw?close=0", script)
            response = connection.getresponse()
            assert response.status == 200
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
        ((_, record),) = proxy.pairs()
    assert (record.status, record.marks["Error"]) == (200, "upstream-timeout")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_over_the_limit_is_413(upstream: MockES, log: Path, framing: str) -> None:
    """`--max-body`; nothing of it goes upstream."""
    fields, body = ("Content-Length: 1001\r\n", "x" * 1001)
    if framing == "chunked":
        fields, body = ("Transfer-Encoding: chunked\r\n", "3e9\r\n" + "x" * 1001 + "\r\n0\r\n\r\n")
    with running_proxy(upstream.port, log, max_body_bytes=1000) as proxy:
        answer = proxy.ask(f"POST /a/_bulk HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}".encode())
        head, _, document = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        check_own_answer(proxy, (413, document), 413, "body-too-large", rejected=True)
        assert proxy.request("POST", "/_mock/sink", b"x" * 1000)[0] == 200
    assert len(upstream.requests) == 1


def test_one_connection_too_many_is_503(upstream: MockES, log: Path) -> None:
    """`--max-connections`; when one leaves there is room again."""
    with running_proxy(upstream.port, log, max_connections=1) as proxy:
        with contextlib.closing(proxy.client()) as first:
            assert exchange(first, "GET", "/")[0] == 200
            check_own_answer(proxy, proxy.request("GET", "/"), 503, "too-many-connections", rejected=True)
            assert exchange(first, "GET", "/")[0] == 200
        wait_until(lambda: proxy.request("GET", "/")[0] == 200, "room for another connection")


def test_far_too_many_connections_wait_outside(upstream: MockES, log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Beyond those that are told 503 nobody is accepted, the operator is told once, and it recovers."""
    count = 1 + es_proxy.OVERFLOW_CONNECTIONS
    with running_proxy(upstream.port, log, max_connections=1) as proxy:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(proxy.connect())
            outside = stack.enter_context(proxy.connect())
            outside.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            said = ""
            while "--max-connections" not in said:
                said += capfd.readouterr().err
                threading.Event().wait(0.01)
            assert not select.select([outside], [], [], 0)[0]
        with contextlib.closing(proxy.client()) as connection:
            assert exchange(connection, "GET", "/")[0] in (200, 503)
        wait_until(lambda: proxy.request("GET", "/")[0] == 200, "room for another connection")
    assert said.count("--max-connections") == 1


def test_no_free_thread_is_503(upstream: MockES, log: Path) -> None:
    """`--threads`: a request that waited too long for one is refused, and served when there is one again."""
    with running_proxy(upstream.port, log, threads=1, limits={"queue_seconds": 0.3}) as proxy:
        with background(proxy.request, "GET", "/_mock/slow?ms=1500") as slow:
            upstream.wait_for_requests(1)
            check = proxy.request("GET", "/")
            assert (check[0], error_of(check[1])["code"]) == (503, "no-thread")
            assert slow.result()[0] == 200
        assert proxy.request("GET", "/")[0] == 200
        assert [response.status for _, response in proxy.pairs()] == [200, 503, 200]


def test_an_upstream_that_never_shakes_hands_is_502(log: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts, and no TLS handshake comes within the time for connecting."""
    monkeypatch.setattr(es_proxy, "CONNECT_SECONDS", 0.2)

    def serve(sock: socket.socket) -> None:
        read_all(sock)

    with raw_server(serve) as port, running_proxy(port, log, upstream_tls=True, ca=pki.ca) as proxy:
        check_own_answer(proxy, proxy.request("GET", "/"), 502, "upstream-tls", rejected=False)


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(errno.EHOSTUNREACH, "No route to host")])
def test_an_upstream_that_cant_be_reached_is_502(log: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """No answer to the connection, no route; tried twice, as nothing was sent."""
    port, real = free_port(), socket.create_connection

    def connect(address: tuple[str, int], *words: Any, **more: Any) -> socket.socket:
        if address[1] == port:
            raise error
        return real(address, *words, **more)

    monkeypatch.setattr(socket, "create_connection", connect)
    with running_proxy(port, log) as proxy:
        check_own_answer(proxy, proxy.request("GET", "/"), 502, "upstream-unreachable", rejected=False)
        assert proxy.pairs()[0][1].marks["Attempts"] == "2"


def test_a_client_that_breaks_off_its_request_is_on_record(upstream: MockES, log: Path) -> None:
    """A reset in the middle of a body: refused, nothing upstream, a pair."""
    with running_proxy(upstream.port, log) as proxy:
        with proxy.connect() as sock:
            sock.sendall(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
            assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: len(read_log(log)) == 3, "the pair")
        ((request, response),) = proxy.pairs()
    assert (request.marks["Rejected"], response.marks["Error"]) == ("incomplete-request", "incomplete-request")
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nBroken\r\n\r\n", 400, "bad-field"),
        (b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabc", 408, "request-timeout"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "target-too-long"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 20000 + b"\r\n\r\n", 431, "head-too-large"),
    ],
)
def test_a_broken_request_is_4xx(upstream: MockES, log: Path, data: bytes, status: int, code: str) -> None:
    """One of each status; test_protocol.py has the rest."""
    with running_proxy(upstream.port, log, limits={"body_silence_seconds": 0.2}) as proxy:
        with proxy.connect() as sock:
            sock.sendall(data)
            head, _, document = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nConnection: close" in head
        check_own_answer(proxy, (status, document), status, code, rejected=True)
    assert upstream.requests == []


def test_an_error_answers_head_without_a_body(log: Path) -> None:
    """RFC 9110 9.3.2: the fields as for GET, the body left out; the record says what was sent."""
    with running_proxy(free_port(), log) as proxy:
        with contextlib.closing(proxy.client()) as connection:
            connection.request("HEAD", "/")
            response = connection.getresponse()
            assert (response.status, response.read()) == (502, b"")
        assert proxy.pairs()[0][1].size == 0


def test_no_room_for_a_large_body_is_503(upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary directory is full: the request is refused, smaller ones go on."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with running_proxy(upstream.port, log) as proxy:
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        status, body = proxy.request("POST", "/_mock/sink", b"x" * (1 << 21))
        assert (status, error_of(body)["code"]) == (503, "no-room-for-body")
        assert "TMPDIR" in error_of(body)["reason"]
        assert proxy.request("POST", "/_mock/sink", b"x")[0] == 200
    assert len(upstream.requests) == 1


def test_a_bug_is_500_on_record_and_one_line(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever breaks inside: an answer, a pair, a line for the operator, and the proxy goes on."""

    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    with running_proxy(upstream.port, log) as proxy:
        with monkeypatch.context() as patched:
            patched.setattr(proxy.proxy.relay.upstream, "request", broken)
            check_own_answer(proxy, proxy.request("GET", "/"), 500, "internal-error", rejected=False)
        assert proxy.request("GET", "/")[0] == 200
    said = [line for line in capfd.readouterr().err.splitlines() if "internal error" in line]
    assert len(said) == 1
    assert "KeyError" in said[0]


def elastic_client(version: int, proxy: Running, **options: Any) -> Any:
    """An official client in front of a proxy that tries everything once; it and its exceptions' module."""
    name = {0: "opensearchpy", 8: "elasticsearch8", 9: "elasticsearch9"}[version]
    package = {0: "opensearch-py"}.get(version, name)
    module = pytest.importorskip(name, reason=f"the official client: pip install {package}")
    scheme = "https" if proxy.config.listen_tls else "http"
    if version:
        url = f"{scheme}://{proxy.host}:{proxy.port}"
        return module.Elasticsearch(url, max_retries=0, request_timeout=PATIENCE, **options), module
    hosts = [{"host": proxy.host, "port": proxy.port}]
    tls = {"use_ssl": True} if scheme == "https" else {}
    return module.OpenSearch(hosts, max_retries=0, timeout=PATIENCE, **tls, **options), module


CLIENTS = pytest.mark.parametrize("version", [8, 9, 0], ids=["elasticsearch8", "elasticsearch9", "opensearch-py"])
# What is wrong, the fields a client sends then, its status and code.
CAUSES: dict[str, tuple[dict[str, str], int, str]] = {
    "refused": ({}, 502, "upstream-refused"),
    "silent": ({}, 504, "upstream-timeout"),
    "large": ({}, 413, "body-too-large"),
    "crowded": ({}, 503, "too-many-connections"),
    "broken": ({"connection": "host"}, 400, "bad-connection"),
}


@CLIENTS
@pytest.mark.parametrize("cause", CAUSES)
def test_official_clients_raise_their_ordinary_exceptions(
    upstream: MockES, log: Path, version: int, cause: str
) -> None:
    """ApiError or TransportError with status and body, for what the proxy itself answers."""
    fields, status, code = CAUSES[cause]
    port = free_port() if cause == "refused" else upstream.port
    limit = 1 if cause == "crowded" else 9
    changes = {"max_body_bytes": 100, "upstream_timeout_seconds": 0.5, "max_connections": limit}
    path = "/_mock/silence" if cause == "silent" else "/a/_doc/1"
    body = {"field": "x" * (200 if cause == "large" else 5)}
    headers = {"content-type": "application/json", "accept": "application/json", **fields}
    with running_proxy(port, log, **changes) as proxy, contextlib.ExitStack() as stack:
        client, module = elastic_client(version, proxy)
        stack.callback(client.close)
        if cause == "crowded":
            first = stack.enter_context(contextlib.closing(proxy.client()))
            assert exchange(first, "GET", "/")[0] in (200, 502)
        perform = client.perform_request if version else client.transport.perform_request
        ordinary = (module.BadRequestError if status == 400 else module.ApiError) if version else module.TransportError
        with pytest.raises(ordinary) as raised:
            perform("PUT", path, headers=headers, body=body)
        found = raised.value.body if version else raised.value.info
        assert (raised.value.status_code, found["error"]["code"], found["status"]) == (status, code, status)
        assert (proxy.pairs()[-1][1].status, proxy.pairs()[-1][1].marks["Error"]) == (status, code)


@CLIENTS
def test_a_client_that_loses_patience_raises_its_timeout(upstream: MockES, log: Path, version: int) -> None:
    """ConnectionTimeout, as without a proxy; the pair is whole once the proxy knows."""
    with running_proxy(upstream.port, log, drain_seconds=0.1) as proxy:
        client, module = elastic_client(version, proxy)
        with contextlib.closing(client):
            patient = client.options(request_timeout=0.3) if version else client.transport
            words = {"headers": {"accept": "application/json"}} if version else {"params": {"request_timeout": 0.3}}
            with pytest.raises(module.ConnectionTimeout):
                patient.perform_request("GET", "/_mock/silence", **words)
        assert [seen.target for seen in upstream.wait_for_requests(1)] == [b"/_mock/silence"]
    ((_, response),) = pairs(read_log(log))
    assert response.marks["Error"] in ("client-gone", "shutting-down")


# -- TLS ---------------------------------------------------------------------------------------------------------


def listener(pki: Pki, **changes: Any) -> dict[str, Any]:
    """Configuration of a listener that speaks TLS."""
    cert, key = pki.server
    return {"listen_tls": True, "cert": cert, "key": key, **changes}


def check_status(proxy: Running, context: ssl.SSLContext | None, status: int = 200, code: str = "") -> None:
    """One request: its status, in the response and in the record, and the code of the proxy's own error, if any."""
    proxy.context = context
    answer, body = proxy.request("GET", "/")
    assert answer == status, body
    assert proxy.pairs()[-1][1].status == status
    assert proxy.pairs()[-1][1].marks.get("Error", "") == code


def test_tls_on_the_clients_side_only(upstream: MockES, log: Path, pki: Pki) -> None:
    """`--tls listen`: TLS 1.2 and 1.3, nothing older, and only ciphers of the list."""
    with running_proxy(upstream.port, log, **listener(pki)) as proxy:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = pki.context()
            context.minimum_version = context.maximum_version = version
            check_status(proxy, context)
        weak = pki.context()
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers("AES128-SHA:ECDHE+AES+SHA")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            check_status(proxy, weak)


def test_tls_on_the_upstreams_side_only(log: Path, pki: Pki) -> None:
    """`--tls upstream` with `--ca`, twice on one connection."""
    with MockES(tls=pki.server) as mock, running_proxy(mock.port, log, upstream_tls=True, ca=pki.ca) as proxy:
        with contextlib.closing(proxy.client()) as connection:
            assert exchange(connection, "GET", "/")[0] == exchange(connection, "GET", "/")[0] == 200
        assert len(mock.requests) == 2


def test_tls_on_both_sides(log: Path, pki: Pki) -> None:
    """The default."""
    with (
        MockES(tls=pki.server) as mock,
        running_proxy(mock.port, log, **listener(pki, upstream_tls=True, ca=pki.ca)) as proxy,
    ):
        check_status(proxy, pki.context())


@pytest.mark.parametrize(
    ("server", "ca"),
    [("server", "other_ca"), ("wrong_host", "ca"), ("expired", "ca"), ("server", None)],
    ids=["wrong CA", "wrong host", "expired", "system store"],
)
def test_an_upstream_that_cant_be_trusted_is_502(log: Path, pki: Pki, server: str, ca: str | None) -> None:
    """Nothing of the request is sent to it."""
    with MockES(tls=getattr(pki, server)) as mock:
        authority = getattr(pki, ca) if ca else None
        with running_proxy(mock.port, log, upstream_tls=True, ca=authority) as proxy:
            answer = proxy.request("GET", "/")
            check_own_answer(proxy, answer, 502, "upstream-certificate", rejected=False)
            assert "--ca" in error_of(answer[1])["reason"]
        assert mock.requests == []


@pytest.mark.parametrize("colons", [False, True], ids=["plain", "colons"])
@pytest.mark.parametrize("pinned", ["leaf", "ca"])
def test_a_fingerprint_pins_the_certificate_or_its_ca(log: Path, pki: Pki, pinned: str, colons: bool) -> None:
    """As elasticsearch-py takes it; kept-alive and new connections."""
    digits = Pki.fingerprint(pki.server[0], 0 if pinned == "leaf" else -1)
    text = ":".join(digits[at : at + 2] for at in range(0, 64, 2)).upper() if colons else digits
    with MockES(tls=pki.server) as mock:
        digits = str(es_proxy.parse_args([*PLACES, "--ca-fingerprint", text]).ca_fingerprint)
        changes = {"upstream_tls": True, "ca_fingerprint": digits}
        with running_proxy(mock.port, log, **changes) as proxy:
            for _ in range(2):
                check_status(proxy, None)
            assert json.loads(proxy.request("POST", "/_mock/sink", b"x" * 300_000)[1])["length"] == 300_000


def test_a_pinned_leaf_may_have_any_name_a_pinned_ca_may_not(log: Path, pki: Pki) -> None:
    """The certificate itself is proof enough; a CA signs for others as well."""
    path = pki.wrong_host[0]
    with MockES(tls=pki.wrong_host) as mock:
        leaf, authority = Pki.fingerprint(path, 0), Pki.fingerprint(path, -1)
        with running_proxy(mock.port, log, upstream_tls=True, ca_fingerprint=leaf) as proxy:
            check_status(proxy, None)
        with running_proxy(mock.port, log, upstream_tls=True, ca_fingerprint=authority) as proxy:
            check_status(proxy, None, 502, "upstream-certificate")
    assert len(mock.requests) == 1


@pytest.mark.parametrize("server", ["server", "leaf_only"])
def test_a_wrong_fingerprint_is_502(log: Path, pki: Pki, server: str) -> None:
    """Also the CA's own, where the server doesn't show the CA."""
    digits = FINGERPRINT if server == "server" else Pki.fingerprint(pki.ca, 0)
    with MockES(tls=getattr(pki, server)) as mock:
        with running_proxy(mock.port, log, upstream_tls=True, ca_fingerprint=digits) as proxy:
            check_status(proxy, None, 502, "upstream-certificate")
        assert mock.requests == []


def test_a_pin_survives_the_upstreams_new_certificate_only_if_it_is_still_there(log: Path, pki: Pki) -> None:
    """After the first connection the pin is remembered: another certificate by another authority is refused."""
    digits = Pki.fingerprint(pki.server[0], 0)
    with MockES(tls=pki.server) as mock:
        port = mock.port
        running = Running(make_config(port, log, upstream_tls=True, ca_fingerprint=digits))
        check_status(running, None)
    try:
        with MockES(port, tls=pki.wrong_host) as mock:
            check_status(running, None, 502, "upstream-certificate")
            assert mock.requests == []
    finally:
        running.stop()


def test_insecure_takes_any_certificate_and_says_so(log: Path, pki: Pki) -> None:
    """An event in the log at every start, words in the start line."""
    with MockES(tls=pki.wrong_host) as mock:
        words = plain_words(mock, log, "--insecure")
        words = tuple("--tls=upstream" if word == "--no-tls" else word for word in words)
        with proxy_process(*words) as (_, port, lines):
            assert ask_once(port) == 200
        assert "NOT VERIFIED: --insecure" in lines[0]
    events = [record.id for record in read_log(log) if record.kind == "event"]
    assert events == ["start", "insecure-upstream", "stop"]


def test_a_client_certificate_is_required_with_client_ca(
    upstream: MockES, log: Path, pki: Pki, capfd: pytest.CaptureFixture[str]
) -> None:
    """With one of the CA's: served. Without, or with a stranger's: no TLS, no request, a message."""
    with running_proxy(upstream.port, log, **listener(pki, client_ca=pki.ca)) as proxy:
        check_status(proxy, pki.context(*pki.client))
        for context in (pki.context(), pki.context(*pki.stranger)):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                check_status(proxy, context)
        assert len(proxy.pairs()) == 1
    assert len(upstream.requests) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "no TLS with 127.0.0.1" in line]
    assert len(said) == 1


def test_plain_http_to_a_tls_port_is_told_so(upstream: MockES, log: Path, pki: Pki) -> None:
    """400 in plain HTTP, on record; not a closed connection that leaves everybody guessing."""
    with running_proxy(upstream.port, log, **listener(pki)) as proxy:
        answer = proxy.request("GET", "/")
        check_own_answer(proxy, answer, 400, "plain-http", rejected=True)
        assert "https" in error_of(answer[1])["reason"]
    assert upstream.requests == []


def test_an_upstream_that_speaks_plain_http_is_502(log: Path, pki: Pki) -> None:
    """`--tls` doesn't fit the upstream, which answers the handshake in HTTP, as Elasticsearch does."""

    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        read_all(sock)

    with raw_server(serve) as port, running_proxy(port, log, upstream_tls=True, ca=pki.ca) as proxy:
        answer = proxy.request("GET", "/")
        check_own_answer(proxy, answer, 502, "upstream-tls", rejected=False)
        assert "--tls" in error_of(answer[1])["reason"]


def test_an_upstream_that_speaks_tls_is_502_in_plain_http(log: Path, pki: Pki) -> None:
    """`--no-tls` before an Elasticsearch with TLS."""
    with MockES(tls=pki.server) as mock, running_proxy(mock.port, log) as proxy:
        status, body = proxy.request("GET", "/")
        assert status == 502
        assert error_of(body)["code"] in ("upstream-closed", "upstream-reset", "upstream-malformed")


@contextlib.contextmanager
def sni_server(pki: Pki) -> Iterator[tuple[int, list[tuple[str | None, bytes]]]]:
    """A TLS server for one request: its port, and the name asked for with the head that came."""
    seen: list[tuple[str | None, bytes]] = []
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pki.server)
    context.sni_callback = lambda _sock, name, _context: names.append(name)

    def serve(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as sock:
            seen.append((names[-1], sock.recv(65536)))
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            read_all(sock)

    with raw_server(serve) as port:
        yield port, seen


@pytest.mark.parametrize(("host", "name"), [("localhost", "localhost"), ("127.0.0.1", None)])
def test_sni_and_host_name_the_upstream(log: Path, pki: Pki, host: str, name: str | None) -> None:
    """By name: SNI and Host have it. By address: no SNI (RFC 6066 3), the address in Host."""
    changes = {"upstream_host": host, "upstream_tls": True, "ca": pki.ca}
    with sni_server(pki) as (port, seen), running_proxy(port, log, **changes) as proxy:
        check_status(proxy, None)
    ((asked, head),) = seen
    assert asked == name
    assert f"\r\nHost: {host}:{port}\r\n".encode() in head


def test_large_bodies_go_through_both_ways(front: tuple[Running, MockES]) -> None:
    """10 MB up, 10 MB back, byte-equal, and one of a length that no power of two divides."""
    proxy, mock = front
    for size in (10_000_000, 1_234_567):
        body = random.Random(size).randbytes(size)
        assert proxy.request("POST", "/_mock/echo", body) == (200, body)
        request, response = proxy.pairs()[-1]
        assert (request.body, response.size) == (body, size)
        assert mock.requests[-1].sha256 == hashlib.sha256(body).hexdigest()
    for path in ("/_mock/big", "/_mock/chunked", "/_mock/no-length"):
        _, answer = proxy.request("GET", f"{path}?bytes=10000001")
        assert hashlib.sha256(answer).hexdigest() == big_sha256(10_000_001)
        assert proxy.pairs()[-1][1].size == 10_000_001


def test_a_request_in_many_tls_records_and_one_record_with_many_requests(upstream: MockES, log: Path, pki: Pki) -> None:
    """Bytes that are already decrypted don't make a socket readable; they must be looked for."""
    one = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
    with running_proxy(upstream.port, log, **listener(pki)) as proxy:
        with pki.context().wrap_socket(proxy.connect(), server_hostname="localhost") as sock:
            for byte in one % 0:
                sock.sendall(bytes((byte,)))
            sock.sendall(b"".join(one % number for number in range(1, 400)))
            sock.sendall(b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            answers = read_all(sock)
        assert answers.count(b"HTTP/1.1 404 ") == 401
        assert [request.path for request, _ in proxy.pairs()] == [b"/%d" % n for n in range(400)] + [b"/last"]


def test_a_silent_client_of_a_tls_port_is_let_go(upstream: MockES, log: Path, pki: Pki) -> None:
    """Half a handshake, then nothing: the deadline of the head closes it, without a record."""
    with running_proxy(upstream.port, log, **listener(pki, limits={"head_seconds": 0.2})) as proxy:
        with proxy.connect() as sock:
            sock.sendall(b"\x16\x03\x01\x02\x00")
            assert read_all(sock) == b""
        check_status(proxy, pki.context())
        assert len(proxy.pairs()) == 1


# -- Addresses ---------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    """Whether ::1 can be bound here."""
    try:
        free_port("::1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_ipv6_on_both_sides(log: Path) -> None:
    """Listening on ::1, upstream on ::1: Source and Host have the address in its form."""
    with MockES(host="::1") as mock, running_proxy(mock.port, log, upstream_host="::1", listen_host="::1") as proxy:
        assert proxy.request("GET", "/")[0] == 200
        ((request, _),) = proxy.pairs()
        assert request.source == "::1"
        assert mock.requests[0].values(b"host") == [b"[::1]:%d" % mock.port]


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_an_ipv4_client_of_a_dual_stack_listener_has_its_ipv4_address(upstream: MockES, log: Path) -> None:
    """Not ::ffff:127.0.0.1."""
    with running_proxy(upstream.port, log, listen_host="::") as proxy:
        proxy.host = "127.0.0.1"
        assert proxy.request("GET", "/")[0] == 200
        assert proxy.pairs()[0][0].source == "127.0.0.1"


def resolve_to(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """Let a name resolve to these addresses, in this order."""
    real = socket.getaddrinfo

    def resolve(host: Any, *words: Any, **more: Any) -> Any:
        if host != name:
            return real(host, *words, **more)
        return [found for address in addresses for found in real(address, *words, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("first", ["::1", "127.0.0.2"])
def test_the_next_address_of_a_name_is_tried(
    upstream: MockES, log: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with several addresses of which the first is refused; the client notices nothing."""
    resolve_to(monkeypatch, "es.test", first, "127.0.0.1")
    with running_proxy(upstream.port, log, upstream_host="es.test") as proxy:
        assert proxy.request("PUT", "/a/_doc/1", b"{}")[0] == 201
        ((_, response),) = proxy.pairs()
    assert response.marks == {}
    assert upstream.requests[0].values(b"host") == [b"es.test:%d" % upstream.port]


def test_all_addresses_of_a_name_refused_is_502(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last address's error counts."""
    resolve_to(monkeypatch, "es.test", "127.0.0.1", "127.0.0.2")
    with running_proxy(free_port(), log, upstream_host="es.test") as proxy:
        check_own_answer(proxy, proxy.request("GET", "/"), 502, "upstream-refused", rejected=False)


def test_localhost_as_a_name_on_both_sides(upstream: MockES, log: Path) -> None:
    """The commonest name of all."""
    with running_proxy(upstream.port, log, upstream_host="localhost", listen_host="localhost") as proxy:
        assert proxy.request("GET", "/")[0] == 200
        assert upstream.requests[0].values(b"host") == [b"localhost:%d" % upstream.port]


# -- Stopping ----------------------------------------------------------------------------------------------------


def is_refused(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def test_a_stop_finishes_what_is_in_flight(upstream: MockES, log: Path) -> None:
    """SIGTERM: nobody new is let in, the slow request gets its response, `Event: stop`, exit status 0."""
    with proxy_process(*plain_words(upstream, log)) as (process, port, _):
        idle = socket.create_connection(("127.0.0.1", port), PATIENCE)
        with idle, contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
            connection.request("POST", "/_mock/slow?ms=1000", b"x")
            upstream.wait_for_requests(1)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(port), "new connections are refused")
            assert read_all(idle) == b""
            assert process.poll() is None
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"took":1000}')
        assert process.wait(PATIENCE) == 0
    records = read_log(log)
    assert (records[-1].kind, records[-1].id) == ("event", "stop")
    assert [response.marks for _, response in pairs(records)] == [{}]


def test_ctrl_c_stops_it_without_a_traceback(upstream: MockES, log: Path) -> None:
    """SIGINT is as good as SIGTERM; nothing but the start line on stderr."""
    with proxy_process(*plain_words(upstream, log)) as (process, _, lines):
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    assert len(lines) == 1
    assert [record.id for record in read_log(log)] == ["start", "stop"]


@pytest.mark.parametrize("path", ["/_mock/silence", "/_mock/drip?bytes=100&ms=1000"], ids=["no response", "half"])
def test_a_second_signal_cuts_off_at_once(upstream: MockES, log: Path, path: str) -> None:
    """What was in flight is on record as cut off; exit status 0, far sooner than --drain."""
    with proxy_process(*plain_words(upstream, log)) as (process, port, lines):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            upstream.wait_for_requests(1)
            if "drip" in path:
                assert sock.recv(17) == b"HTTP/1.1 200 OK\r\n"
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(port), "new connections are refused")
            process.send_signal(signal.SIGTERM)
            answer = read_all(sock)
        assert process.wait(PATIENCE) == 0
    ((_, response),) = pairs(read_log(log))
    assert response.marks["Error"] == "shutting-down"
    assert "connections are cut off" in lines[-1]
    if "drip" not in path:
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert error_of(answer.partition(b"\r\n\r\n")[2])["code"] == "shutting-down"


def test_drain_expires(upstream: MockES, log: Path) -> None:
    """`--drain 0.2`: a request without a response and half a request are cut off, both on record."""
    with proxy_process(*plain_words(upstream, log, "--drain", "0.2")) as (process, port, _):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as waiting:
            waiting.sendall(b"GET /_mock/silence HTTP/1.1\r\nHost: a\r\n\r\n")
            upstream.wait_for_requests(1)
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as half:
                half.sendall(b"POST /half HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
                assert half.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
                process.send_signal(signal.SIGTERM)
                assert read_all(half).startswith(b"HTTP/1.1 503 ")
            assert read_all(waiting).startswith(b"HTTP/1.1 503 ")
        assert process.wait(PATIENCE) == 0
    found = {request.path: (request.marks, response.marks) for request, response in pairs(read_log(log))}
    assert found[b"/_mock/silence"] == ({}, {"Error": "shutting-down"})
    assert found[b"/half"] == ({"Rejected": "shutting-down"}, {"Error": "shutting-down"})
    assert read_log(log)[-1].id == "stop"


def test_many_in_flight_at_a_stop_are_all_answered(upstream: MockES, log: Path) -> None:
    """50 slow requests on connections of their own: every one gets its 200 and its pair."""
    head = b"GET /_mock/slow?ms=700 HTTP/1.1\r\nHost: a\r\n\r\n"
    with proxy_process(*plain_words(upstream, log)) as (process, port, _), contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(50)]
        for sock in socks:
            sock.sendall(head)
        upstream.wait_for_requests(1)
        process.send_signal(signal.SIGTERM)
        answers = [read_all(sock) for sock in socks]
        assert process.wait(PATIENCE) == 0
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    assert [response.status for _, response in pairs(read_log(log))] == [200] * 50


# -- Relaying ----------------------------------------------------------------------------------------------------


def test_without_epoll_and_kernel_timeouts_it_works_the_same(upstream: MockES, log: Path, pki: Pki) -> None:
    """What macOS and BSD use: selectors and Python's timeouts, through keep-alive, silence, a stop."""
    with running_proxy(upstream.port, log, portable=True, limits={"keepalive_seconds": 0.5}) as proxy:
        with contextlib.closing(proxy.client()) as connection:
            for _ in range(3):
                assert exchange(connection, "GET", "/_mock/slow?ms=700")[0] == 200
            assert exchange(connection, "POST", "/_mock/echo", b"x" * 500_000) == (200, b"x" * 500_000)
        with proxy.connect() as idle:
            assert read_all(idle) == b""
    assert len(pairs(read_log(log))) == 4


def test_a_connection_is_used_again_on_both_sides(front: tuple[Running, MockES]) -> None:
    """Keep-alive: ten requests, one connection here, and no more than that upstream."""
    proxy, mock = front
    with contextlib.closing(proxy.client()) as connection:
        assert exchange(connection, "GET", "/")[0] == 200
        first = connection.sock
        for _ in range(9):
            assert exchange(connection, "GET", "/")[0] == 200
            assert connection.sock is first
    assert len(mock.requests) == 10
    assert len({seen.connection for seen in mock.requests}) <= es_proxy.THREADS_AT_START


@pytest.mark.parametrize("body", [b"", b'{"a":1}'], ids=["empty", "document"])
def test_head_has_the_fields_of_get_and_no_body(front: tuple[Running, MockES], body: bytes) -> None:
    """Content-Length stays, no byte follows, the connection goes on."""
    proxy, _ = front
    with contextlib.closing(proxy.client()) as connection:
        target = "/a/_doc/1" if body else "/a/_doc/none"
        if body:
            assert exchange(connection, "PUT", target, body)[0] == 201
        connection.request("GET", target)
        response = connection.getresponse()
        status, length = response.status, len(response.read())
        connection.request("HEAD", target)
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, b"")
        assert response.getheader("Content-Length") == str(length)
        assert exchange(connection, "GET", "/")[0] == 200
    assert proxy.pairs()[-2][1].size == 0


@pytest.mark.parametrize("code", [201, 204, 302, 304, 401, 404, 429, 500, 503])
def test_a_status_is_relayed_and_recorded(upstream: MockES, log: Path, code: int) -> None:
    """Also those without a body (204, 304); nothing of the upstream's is taken for an error of ours."""
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        status, body = exchange(connection, "GET", f"/_mock/status?code={code}")
        assert status == code
        assert bool(body) is (code not in (204, 304))
        assert exchange(connection, "GET", "/")[0] == 200
        response = proxy.pairs()[0][1]
        assert (response.status, response.size, response.marks) == (code, len(body), {})


@pytest.mark.parametrize(
    ("path", "chunked"),
    [("/_mock/big", False), ("/_mock/chunked", True), ("/_mock/chunked?chunk=1", True), ("/_mock/no-length", True),
     ("/_mock/http10", False)],
)  # fmt: skip
def test_framings_of_a_response(upstream: MockES, log: Path, path: str, chunked: bool) -> None:
    """Length, chunked, until close, HTTP/1.0: the bytes are the same, and the client's connection lasts."""
    target = path + ("&" if "?" in path else "?") + "bytes=3000"
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        for _ in range(2):
            connection.request("GET", target)
            response = connection.getresponse()
            assert (response.getheader("Transfer-Encoding") == "chunked") is chunked
            assert (response.getheader("Content-Length") == "3000") is not chunked
            assert hashlib.sha256(response.read()).hexdigest() == big_sha256(3000)
        assert [response.size for _, response in proxy.pairs()] == [3000, 3000]


@pytest.mark.parametrize("path", ["/_mock/big", "/_mock/chunked", "/_mock/no-length"])
@pytest.mark.parametrize("size", [0, 1, 3000, 500_000])
def test_an_http_1_0_client_gets_what_it_can_read(upstream: MockES, log: Path, path: str, size: int) -> None:
    """No chunks; where there is no length the end of the connection is the end of the body."""
    with running_proxy(upstream.port, log) as proxy:
        answer = proxy.ask(f"GET {path}?bytes={size} HTTP/1.0\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in head.lower()
        assert b"Connection: close" in head
        assert hashlib.sha256(body).hexdigest() == big_sha256(size)
        assert proxy.pairs()[0][1].size == size


def test_an_http_1_0_client_may_keep_its_connection(upstream: MockES, log: Path) -> None:
    """ApacheBench does that."""
    asked = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    with running_proxy(upstream.port, log) as proxy:
        answer = proxy.ask(asked + asked)
        assert answer.count(b"HTTP/1.1 200 ") == 2
        assert answer.lower().count(b"\r\nconnection: keep-alive") == 2


def test_a_compressed_response_stays_compressed(upstream: MockES, log: Path) -> None:
    """Bytes, Content-Encoding and Size are the upstream's."""
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        connection.request("GET", "/a/_search?size=50", headers={"Accept-Encoding": "gzip"})
        response = connection.getresponse()
        assert response.getheader("Content-Encoding") == "gzip"
        body = response.read()
        assert len(json.loads(gzip.decompress(body))["hits"]["hits"]) == 50
        assert proxy.pairs()[0][1].size == len(body)


def test_fields_of_a_response_keep_order_case_and_repeats(log: Path) -> None:
    """And nothing is added."""
    fields = (
        b"X-elastic-product: Elasticsearch\r\nWARNING: 299 one\r\nwarning: 299 two\r\ncontent-length: 2\r\nX-a:  b \r\n"
    )
    with MockES() as mock, running_proxy(mock.port, log) as proxy:
        script = b"HTTP/1.1 200 Very OK\r\n" + fields + b"\r\nok"
        answer = proxy.ask(
            b"POST /_mock/raw HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(script), script)
        )
    assert answer == script.replace(b"X-a:  b \r\n", b"X-a: b\r\n")


def test_pipelined_requests_are_answered_in_order(front: tuple[Running, MockES]) -> None:
    """One write, many requests, bodies among them."""
    proxy, mock = front
    asked = b"".join(
        b"POST /_mock/echo?%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (number, number, b"x" * number)
        for number in range(20)
    )
    sock = proxy.connect()
    if proxy.context is not None:
        sock = proxy.context.wrap_socket(sock, server_hostname="localhost")
    with sock:
        sock.sendall(asked + b"GET /?last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answers = read_all(sock)
    assert re.findall(rb"content-length: ([0-9]+)\r\n\r\n(?=(x*))", answers.lower())[:20] == [
        (b"%d" % number, b"x" * number) for number in range(20)
    ]
    queries = [b"%d" % number for number in range(20)] + [b"last"]
    assert [request.query for request, _ in proxy.pairs()] == queries
    assert [seen.target.partition(b"?")[2] for seen in mock.requests] == queries


def test_curl_waits_for_100_continue(front: tuple[Running, MockES], pki: Pki, tmp_path: Path) -> None:
    """Above 1 MB curl asks first, and would wait a second for nothing."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    proxy, mock = front
    body = random.Random(3).randbytes(3_000_000)
    (tmp_path / "body").write_bytes(body)
    scheme = "https" if proxy.context else "http"
    done = subprocess.run(
        [curl, "-sv", "--cacert", pki.ca, "--expect100-timeout", str(int(PATIENCE)), "-H", "Expect: 100-continue",
         "--data-binary", f"@{tmp_path / 'body'}", f"{scheme}://127.0.0.1:{proxy.port}/_mock/sink"],
        capture_output=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    digest = hashlib.sha256(body).hexdigest()
    assert json.loads(done.stdout) == {"length": len(body), "sha256": digest}
    assert b"< HTTP/1.1 100 Continue" in done.stderr
    ((request, _),) = proxy.pairs()
    assert request.body == body
    assert mock.requests[0].values(b"expect") == []


def test_get_with_a_body(front: tuple[Running, MockES]) -> None:
    """elasticdump and Kibana search so."""
    proxy, mock = front
    body = b'{"size":2}'
    status, answer = proxy.request("GET", "/a/_search", body, {"Content-Type": "application/json"})
    assert (status, len(json.loads(answer)["hits"]["hits"])) == (200, 2)
    assert mock.requests[0].body == proxy.pairs()[0][0].body == body


@pytest.mark.parametrize("path", ["/_mock/100", "/_mock/102?n=3&ms=20", "/_mock/103?n=5"])
def test_interim_responses_are_not_taken_for_the_final_one(upstream: MockES, log: Path, path: str) -> None:
    """1xx is left out; the final response, and the next one on the connection, are the right ones."""
    with running_proxy(upstream.port, log) as proxy, contextlib.closing(proxy.client()) as connection:
        status, body = exchange(connection, "GET", path)
        assert (status, set(json.loads(body))) == (200, {"interim"})
        assert exchange(connection, "POST", "/_mock/echo", b"next") == (200, b"next")
        assert [response.status for _, response in proxy.pairs()] == [200, 200]


@pytest.mark.parametrize(
    ("path", "codes"),
    [
        ("/_mock/close-mid-body?bytes=100000&sent=50000", {"upstream-closed"}),
        ("/_mock/chunked-truncated?bytes=100000", {"upstream-closed"}),
        ("/_mock/reset-mid-body?bytes=100000&sent=50000", {"upstream-reset", "upstream-closed"}),
    ],
)
def test_a_response_that_breaks_off_breaks_off_here(front: tuple[Running, MockES], path: str, codes: set[str]) -> None:
    """Never ended as if it were whole; Size says how much there was."""
    proxy, _ = front
    with contextlib.closing(proxy.client()) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionError, ssl.SSLError)):
            response.read()
    ((_, record),) = proxy.pairs()
    assert record.status == 200
    assert record.marks["Error"] in codes
    assert 0 < record.size <= 100_000
    assert proxy.request("GET", "/")[0] == 200


@pytest.mark.parametrize("path", ["/_mock/close-before-response", "/_mock/close-mid-head"])
def test_an_upstream_that_closes_without_a_response_is_502(upstream: MockES, log: Path, path: str) -> None:
    """A write is never sent twice."""
    with running_proxy(upstream.port, log) as proxy:
        check_own_answer(proxy, proxy.request("POST", path, b"{}"), 502, "upstream-closed", rejected=False)
    assert len(upstream.requests) == 1


def test_an_idle_connection_that_died_costs_a_read_nothing(upstream: MockES, log: Path) -> None:
    """GET is tried once more on a fresh connection, POST is not, and both are on record."""
    with running_proxy(upstream.port, log, threads=1) as proxy:
        for method, status in (("GET", 200), ("POST", 502)):
            assert proxy.request("GET", "/")[0] == 200
            assert proxy.request(method, "/_mock/close-reused")[0] == status
        marks = [response.marks for _, response in proxy.pairs()]
    assert marks == [{}, {"Attempts": "2"}, {}, {"Error": "upstream-closed"}]


def test_an_idle_connection_that_was_closed_is_not_used(upstream: MockES, log: Path) -> None:
    """The upstream closes it while it waits: noticed before anything is sent, even for a write."""
    with running_proxy(upstream.port, log, threads=1) as proxy:
        for _ in range(3):
            assert proxy.request("POST", "/_mock/close-after?ms=1")[0] == 200
            upstream.wait_for_open(0)
        assert [response.marks for _, response in proxy.pairs()] == [{}, {}, {}]


def test_a_client_that_leaves_in_the_middle_of_a_response(front: tuple[Running, MockES]) -> None:
    """`Error: client-gone`, and `Sent` says how much it got, as far as the kernel tells."""
    proxy, _ = front
    with contextlib.closing(proxy.client()) as connection:
        connection.request("GET", "/_mock/big?bytes=50000000")
        response = connection.getresponse()
        assert len(response.read(2_000_000)) == 2_000_000
        assert connection.sock is not None
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response.close()
    wait_until(lambda: len(read_log(proxy.log)) == 3, "the response's record")
    ((_, record),) = proxy.pairs()
    assert (record.status, record.marks["Error"]) == (200, "client-gone")
    # An SSL_write that fails does not tell how much of its piece went out before.
    untold = es_proxy.RELAY_BYTES if proxy.context else 0
    assert 2_000_000 - untold <= int(record.marks["Sent"]) <= record.size < 50_000_000


def test_a_client_that_leaves_before_its_response(upstream: MockES, log: Path) -> None:
    """499, client-gone, and the upstream's connection is closed so that Elasticsearch may cancel the search."""
    with running_proxy(upstream.port, log) as proxy:
        with proxy.connect() as sock:
            sock.sendall(b"GET /_mock/silence HTTP/1.1\r\nHost: a\r\n\r\n")
            upstream.wait_for_requests(1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        upstream.wait_for_open(0)
        wait_until(lambda: len(read_log(log)) == 3, "the response's record")
        ((_, record),) = proxy.pairs()
    assert (record.status, record.marks) == (499, {"Error": "client-gone"})


@pytest.mark.parametrize(
    "limits",
    [{"write_stall_seconds": 0.3}, {"write_grace_seconds": 0.2, "write_rate_bytes": 1e12}],
    ids=["does not read", "reads slowly"],
)
def test_a_client_that_does_not_take_its_response_is_let_go(
    upstream: MockES, log: Path, limits: dict[str, float]
) -> None:
    """It would hold a thread: after a while it is cut off, and `Sent` says how much it took."""
    with running_proxy(upstream.port, log, limits=limits) as proxy:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(PATIENCE)
            sock.connect((proxy.host, proxy.port))
            sock.sendall(b"GET /_mock/big?bytes=100000000 HTTP/1.1\r\nHost: a\r\n\r\n")
            if "write_grace_seconds" in limits:
                with contextlib.suppress(ConnectionError):
                    while sock.recv(65536):
                        threading.Event().wait(0.01)
            wait_until(lambda: len(read_log(log)) == 3, "the response's record")
        ((_, response),) = proxy.pairs()
    assert (response.status, response.marks["Error"]) == (200, "client-gone")
    assert int(response.marks["Sent"]) <= response.size < 100_000_000


def test_an_upstream_that_reads_slowly_gets_all_of_a_body(log: Path) -> None:
    """Sending waits for it, in slices, and what it answers is relayed."""
    body = random.Random(2).randbytes(8_000_000)
    digest: list[str] = []

    def serve(sock: socket.socket) -> None:
        data = bytearray()
        while b"\r\n\r\n" not in data:
            data += sock.recv(4096)
        threading.Event().wait(2.5 * es_proxy.WATCH_SECONDS)
        _, _, rest = bytes(data).partition(b"\r\n\r\n")
        with sock.makefile("rb") as file:
            digest.append(hashlib.sha256(rest + file.read(len(body) - len(rest))).hexdigest())
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    with raw_server(serve) as port, running_proxy(port, log) as proxy:
        assert proxy.request("POST", "/slow", body) == (200, b"ok")
    assert digest == [hashlib.sha256(body).hexdigest()]


def test_an_upstream_that_resets_during_a_body_is_502(log: Path) -> None:
    """It stops listening in the middle of a large body and says nothing."""

    def serve(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with raw_server(serve) as port, running_proxy(port, log) as proxy:
        status, answer = proxy.request("POST", "/reset", b"x" * 8_000_000)
        assert (status, error_of(answer)["code"][:9]) == (502, "upstream-")
        assert len(proxy.pairs()) == 1


def test_a_client_that_only_finished_sending_still_gets_its_response(upstream: MockES, log: Path) -> None:
    """Half a close is no leaving: `printf ... | nc` does that."""
    with running_proxy(upstream.port, log) as proxy:
        answer = proxy.ask(b"GET /_mock/slow?ms=700 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answer.endswith(b'{"took":700}')


def test_threads_come_with_waiting_requests_and_go_when_idle(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 requests that wait for the upstream take about as long as one; afterwards the extra threads leave."""
    monkeypatch.setattr(es_proxy, "THREAD_IDLE_SECONDS", 0.05)
    with running_proxy(upstream.port, log) as proxy:
        workers = proxy.proxy.server.workers
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: proxy.request("GET", "/_mock/slow?ms=300")[0], range(40)))
            assert answers == [200] * 40
        assert len(upstream.requests) == 40
        wait_until(lambda: len(workers) <= es_proxy.THREADS_AT_START, "the extra threads leave")
        assert proxy.request("GET", "/")[0] == 200


def test_without_any_thread_it_does_not_start(upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, not a proxy that accepts and never answers."""

    def refuse(worker: es_proxy.Worker) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(es_proxy.Worker, "start", refuse)
    with pytest.raises(es_proxy.StartError, match="thread"):
        es_proxy.Proxy(make_config(upstream.port, log)).serve()


def test_without_more_threads_it_goes_on_with_those_it_has(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system's limit is reached: requests wait for the ones there are, and the operator is told once."""
    start = es_proxy.Worker.start

    def limited(worker: es_proxy.Worker) -> None:
        if sum(thread.name == "worker" for thread in threading.enumerate()) >= es_proxy.THREADS_AT_START:
            raise RuntimeError("can't start new thread")
        start(worker)

    monkeypatch.setattr(es_proxy.Worker, "start", limited)
    with running_proxy(upstream.port, log) as proxy, ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(lambda _: proxy.request("GET", "/_mock/slow?ms=100")[0], range(24)))
    assert statuses == [200] * 24
    assert capfd.readouterr().err.count("no more threads") == 1


def test_a_bug_on_a_connection_ends_only_that_connection(
    upstream: MockES, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Outside of a request there is nobody to answer: the connection is closed, one line says why."""

    def broken(*_: Any) -> bool:
        raise ZeroDivisionError("a bug")

    with running_proxy(upstream.port, log) as proxy:
        with monkeypatch.context() as patched:
            patched.setattr(es_proxy.Session, "advance", broken)
            assert proxy.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        assert proxy.request("GET", "/")[0] == 200
    said = [line for line in capfd.readouterr().err.splitlines() if "internal error" in line]
    assert len(said) == 1
    assert "ZeroDivisionError" in said[0]


def test_the_limit_of_descriptors_is_raised_as_far_as_it_goes(upstream: MockES, log: Path) -> None:
    """A shell's soft limit of 256 must not decide how many clients there may be."""
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2000))  # noqa: E731
    with proxy_process(*plain_words(upstream, log), preexec_fn=few) as (process, _, _):
        text = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(r"^Max open files +2000 +2000 ", text, re.MULTILINE)


def test_several_processes_share_listener_and_log(upstream: MockES, log: Path) -> None:
    """`--workers 2`: every request is served and on record once, a stop ends all of them with status 0."""
    with proxy_process(*plain_words(upstream, log, "--workers", "2")) as (process, port, lines):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda number: ask_once(port, f"/?{number}"), range(100))) == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert "2 workers" in lines[0]
    assert len(lines) == 1
    records = read_log(log)
    assert sorted(request.query or b"" for request, _ in pairs(records)) == sorted(b"%d" % at for at in range(100))
    assert [record.id for record in records if record.kind == "event"] == ["start", "stop"]


def test_out_of_descriptors_it_waits_and_goes_on(upstream: MockES, log: Path) -> None:
    """EMFILE in accept: one message, no spinning, and service as soon as descriptors are free."""
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))  # noqa: E731
    words = plain_words(upstream, log, "--max-connections", "1000", "--threads", "2")
    with proxy_process(*words, preexec_fn=few) as (process, port, lines):
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            wait_until(lambda: len(lines) > 1, "a message")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
            assert exchange(connection, "GET", "/")[0] == 200
        assert process.poll() is None
    assert [line for line in lines[1:] if "Too many open files" not in line] == []


# -- What the original's suite covers ----------------------------------------------------------------------------


def ask_json(proxy: Running, method: str, target: str, document: object = None) -> tuple[int, Any]:
    """A request with a JSON body, or without; status and JSON of the answer."""
    body = None if document is None else json.dumps(document).encode()
    status, answer = proxy.request(method, target, body, {"Content-Type": "application/json"})
    return status, json.loads(answer)


@pytest.mark.parametrize(("size", "start"), [(0, 0), (1, 0), (10, 0), (5, 20), (100, 50)])
def test_search_honours_size_and_from(front: tuple[Running, MockES], size: int, start: int) -> None:
    """In the body and in the query: so many hits, from there on."""
    proxy, _ = front
    query = {"query": {"match_all": {}}, "size": size, "from": start}
    status, by_body = ask_json(proxy, "POST", "/a/_search", query)
    assert status == 200
    _, by_query = ask_json(proxy, "GET", f"/a/_search?size={size}&from={start}")
    hits = by_body["hits"]["hits"]
    assert len(hits) == size
    assert [hit["_id"] for hit in hits] == [hit["_id"] for hit in by_query["hits"]["hits"]]
    assert json.loads(proxy.pairs()[0][0].body) == query
    assert proxy.pairs()[1][0].query == f"size={size}&from={start}".encode()


@pytest.mark.parametrize("count", [1, 10, 500])
def test_bulk_answers_one_item_an_action(front: tuple[Running, MockES], count: int) -> None:
    """Counts, indices and ids; all four actions."""
    proxy, mock = front
    actions = ["index", "create", "update", "delete"]
    lines, expected = [], []
    for number in range(count):
        action = actions[number % 4]
        lines.append(json.dumps({action: {"_index": f"i{number % 3}", "_id": f"d{number}"}}))
        if action != "delete":
            lines.append(json.dumps({"doc": {"n": number}} if action == "update" else {"n": number}))
        expected.append((action, f"i{number % 3}", f"d{number}"))
    body = ("\n".join(lines) + "\n").encode()
    status, answer = proxy.request("POST", "/_bulk", body, {"Content-Type": "application/x-ndjson"})
    items = [
        (action, item["_index"], item["_id"]) for entry in json.loads(answer)["items"] for action, item in entry.items()
    ]
    assert (status, items) == (200, expected)
    assert mock.requests[0].body == proxy.pairs()[0][0].body == body


def test_a_document_keeps_its_id(front: tuple[Running, MockES]) -> None:
    """Created, read, updated, deleted under the id it was given, also one that needs escaping."""
    proxy, _ = front
    for name, path in (("1", "1"), ("a b/c:ü", "a%20b%2Fc%3A%C3%BC")):
        for method, body, status in (("PUT", {"n": 1}, 201), ("PUT", {"n": 2}, 200), ("GET", None, 200),
                                     ("DELETE", None, 200), ("GET", None, 404)):  # fmt: skip
            answer = ask_json(proxy, method, f"/a/_doc/{path}", body)
            assert (answer[0], answer[1]["_id"]) == (status, name)
        assert {request.path for request, _ in proxy.pairs()[-5:]} == {f"/a/_doc/{path}".encode()}


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "kind"),
    [
        ("POST", "/a/_search", b"{broken", 400, "parse_exception"),
        ("GET", "/missing/_mapping", None, 404, "index_not_found_exception"),
        ("DELETE", "/missing", None, 404, "index_not_found_exception"),
        ("GET", "/_mock/status?code=500", None, 500, "mock_exception"),
    ],
)
def test_errors_of_elasticsearch_are_relayed_as_they_are(
    front: tuple[Running, MockES], method: str, target: str, body: bytes | None, status: int, kind: str
) -> None:
    """Shape, status and type are the upstream's; its record has no Error."""
    proxy, _ = front
    answer, document = proxy.request(method, target, body, {"Content-Type": "application/json"})
    assert (answer, json.loads(document)["error"]["type"]) == (status, kind)
    response = proxy.pairs()[0][1]
    assert (response.status, response.size, response.marks) == (status, len(document), {})


def test_a_wrong_password_is_recorded_with_its_401(log: Path) -> None:
    """The user is what the client claims; the status beside it says whether it was believed."""
    with MockES(users={"elastic": "right"}) as mock, running_proxy(mock.port, log) as proxy:
        for password, status in ((b"wrong", 401), (b"right", 200)):
            assert proxy.request("GET", "/", None, {"Authorization": basic(b"elastic", password)})[0] == status
        assert [(request.user, response.status) for request, response in proxy.pairs()] == [
            (b"elastic", 401), (b"elastic", 200),
        ]  # fmt: skip
        assert b"wrong" not in log.read_bytes()
        assert base64.b64encode(b"elastic:") not in log.read_bytes()


def test_100_concurrent_requests_of_10_clients(front: tuple[Running, MockES]) -> None:
    """Each answer is its own request's, each pair its own request's."""
    proxy, mock = front

    def client(number: int) -> None:
        with contextlib.closing(proxy.client()) as connection:
            for turn in range(10):
                body = f"{number}.{turn} ".encode() * (1 + 300 * turn)
                assert exchange(connection, "POST", f"/_mock/echo?{number}.{turn}", body) == (200, body)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(client, range(10)))
    found = {request.query: (request.body.split(b" ")[0], response.size) for request, response in proxy.pairs()}
    assert len(found) == len(mock.requests) == 100
    for query, (body, size) in found.items():
        assert query == body
        assert size == len(body + b" ") * (1 + 300 * int(body.split(b".")[1]))


# -- Real clients and real servers -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def noida(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that no one here wrote, ended by its process id."""
    module = pytest.importorskip("noida_db", reason="a real server: pip install noida-db")
    binary = Path(module.__file__).parent / "noida-db"
    if not binary.exists():
        pytest.skip(f"noida-db has no {binary}")
    port = free_port()
    words = ["start", "--only", "elasticsearch", "--elasticsearch-port", str(port), "--host", "127.0.0.1"]
    directory = tmp_path_factory.mktemp("noida")
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [str(binary), *words, "--data-dir", str(directory / "data")], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: process.poll() is not None or not is_refused(port), "noida-db listens")
        if process.poll() is not None:
            pytest.skip(f"noida-db ended: {(directory / 'output').read_text()[-200:]}")
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)


@dataclasses.dataclass
class Step:
    """What a client did, and what its record must say; `body` is compared decoded, as JSON values line by line."""

    method: bytes
    path: bytes
    status: int
    body: list[Any] = dataclasses.field(default_factory=list)
    query: bytes | None = None


def decoded(body: bytes) -> list[Any]:
    """A recorded body: gunzipped if need be, as JSON values line by line."""
    plain = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
    return [json.loads(line) for line in plain.splitlines()]


def use_client(client: Any, module: Any, index: str) -> list[Step]:
    """Index, bulk, search, scan, exists, errors, GET with body, delete; what that must have looked like on the wire."""
    elastic = hasattr(module, "Elasticsearch")
    place = index.encode()
    documents = [{"n": number, "text": "x" * 50} for number in range(30)]
    steps = []

    def document(value: object) -> dict[str, object]:
        return {"document": value} if elastic else {"body": value}

    client.indices.create(index=index)
    steps.append(Step(b"PUT", b"/" + place, 200))
    assert client.index(index=index, id="1", **document({"n": 1}))["_id"] == "1"
    steps.append(Step(b"PUT", b"/" + place + b"/_doc/1", 201, [{"n": 1}]))
    assert client.exists(index=index, id="1")
    steps.append(Step(b"HEAD", b"/" + place + b"/_doc/1", 200))
    assert not client.exists(index=index, id="none")
    steps.append(Step(b"HEAD", b"/" + place + b"/_doc/none", 404))
    actions = [{"_index": index, "_id": f"b{at}", "_source": value} for at, value in enumerate(documents)]
    assert module.helpers.bulk(client, actions, refresh=True)[0] == 30
    lines = [
        item for at, value in enumerate(documents) for item in ({"index": {"_id": f"b{at}", "_index": index}}, value)
    ]
    steps.append(Step(b"PUT" if elastic else b"POST", b"/_bulk", 200, lines, b"refresh=true"))
    found = client.search(index=index, **({"query": {"match_all": {}}, "size": 5} if elastic
                                          else {"body": {"query": {"match_all": {}}, "size": 5}}))  # fmt: skip
    assert len(found["hits"]["hits"]) == 5
    steps.append(Step(b"POST", b"/" + place + b"/_search", 200, [{"query": {"match_all": {}}, "size": 5}]))
    with pytest.raises(module.NotFoundError):
        client.get(index=index, id="none")
    steps.append(Step(b"GET", b"/" + place + b"/_doc/none", 404))
    with pytest.raises(module.ConflictError):
        client.create(index=index, id="1", **document({"n": 2}))
    steps.append(Step(b"PUT", b"/" + place + b"/_create/1", 409, [{"n": 2}]))
    return steps


def check_steps(steps: list[Step], records: list[tuple[Record, Record]]) -> None:
    """Each record compared with what the client did."""
    for step, (request, response) in zip(steps, records, strict=True):
        assert (request.method, request.path, request.query) == (step.method, step.path, step.query)
        assert (decoded(request.body), response.status) == (step.body, step.status)
        assert (request.marks, response.marks) == ({}, {})
        assert request.agent.startswith((b"elasticsearch-py/", b"opensearch-py/"))


def check_scan(client: Any, module: Any, index: str, proxy: Running) -> None:
    """A scroll of several pages: all documents once, and each page is on record."""
    before = len(proxy.pairs())
    hits = list(module.helpers.scan(client, index=index, size=10, query={"query": {"match_all": {}}}))
    assert len({hit["_id"] for hit in hits}) == len(hits) == 31
    asked = [(request.method, request.path) for request, _ in proxy.pairs()[before:]]
    assert asked[0] == (b"POST", f"/{index}/_search".encode())
    assert asked[-1] == (b"DELETE", b"/_search/scroll")
    assert set(asked[1:-1]) == {(b"POST", b"/_search/scroll")}
    assert {response.status for _, response in proxy.pairs()[before:]} == {200}


def check_get_with_body(client: Any, module: Any, index: str, proxy: Running) -> None:
    """A GET with a body, and a body that the server can't parse: 400 as BadRequestError."""
    elastic = hasattr(module, "Elasticsearch")
    perform = client.perform_request if elastic else client.transport.perform_request
    headers = {"accept": "application/json", "content-type": "application/json"}
    perform("GET", f"/{index}/_search", headers=headers, body={"size": 1})
    with pytest.raises(module.BadRequestError if elastic else module.RequestError):
        perform("POST", f"/{index}/_search", headers=headers, body='{"query":' if elastic else b'{"query":')
    (good, _), (bad, refused) = proxy.pairs()[-2:]
    assert (good.method, decoded(good.body)) == (b"GET", [{"size": 1}])
    assert refused.status == 400
    plain = gzip.decompress(bad.body) if bad.body[:2] == b"\x1f\x8b" else bad.body
    assert b'{"query":' in plain or b'{\\"query\\":' in plain


@pytest.fixture(params=["mock", "noida"])
def real_port(request: pytest.FixtureRequest) -> Iterator[int]:
    """The stand-in, and a real server."""
    if request.param == "noida":
        yield request.getfixturevalue("noida")
    else:
        with MockES() as mock:
            yield mock.port


@CLIENTS
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_official_clients_work_and_their_records_say_what_they_did(
    real_port: int, log: Path, pki: Pki, version: int, tls: bool, compressed: bool
) -> None:
    """elasticsearch-py 8 and 9 and opensearch-py, in plain HTTP and TLS with ca_certs, with and without gzip."""
    changes = listener(pki) if tls else {}
    options: dict[str, Any] = {"http_compress": compressed}
    if tls:
        options["ca_certs"] = pki.ca
    with running_proxy(real_port, log, **changes) as proxy:
        client, module = elastic_client(version, proxy, **options)
        importlib.import_module(module.__name__ + ".helpers")
        with contextlib.closing(client):
            index = f"real-{version}-{tls}-{compressed}".lower()
            check_steps(use_client(client, module, index), proxy.pairs())
            check_scan(client, module, index, proxy)
            check_get_with_body(client, module, index, proxy)
        requests = [request for request, _ in proxy.pairs() if request.body]
        assert all((request.body[:2] == b"\x1f\x8b") is compressed for request in requests)


def test_official_clients_work_with_tls_on_both_sides(log: Path, pki: Pki) -> None:
    """The default set-up, with `--ca` towards the upstream and ca_certs in the client."""
    with (
        MockES(tls=pki.server) as mock,
        running_proxy(mock.port, log, **listener(pki, upstream_tls=True, ca=pki.ca)) as proxy,
    ):
        for version in (8, 9, 0):
            client, module = elastic_client(version, proxy, ca_certs=pki.ca)
            importlib.import_module(module.__name__ + ".helpers")
            with contextlib.closing(client):
                before = len(proxy.pairs())
                check_steps(use_client(client, module, f"both-{version}"), proxy.pairs()[before:])


# -- The file itself ---------------------------------------------------------------------------------------------

SOURCE = (HERE / "es_proxy.py").read_text()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# == (.+?) =+$", re.MULTILINE)
FORBIDDEN = {  # room: modules it must not mention (DESIGN section 4)
    "HTTP messages": {"socket", "threading", "time", "logging", "ssl", "select"},
    "Audit": {"socket", "ssl", "select", "http"},
    "Configuration": {"argparse", "socket", "ssl"},
    "Server": {"http", "json", "binascii", "ssl"},
}


ROOMS = [(match[1], SOURCE[: match.start()].count("\n") + 1) for match in BANNER.finditer(SOURCE)]  # title, line


def room_of(line: int) -> int:
    """The number of the room a line is in, -1 above the first."""
    return bisect.bisect_right([start for _, start in ROOMS], line) - 1


def defined_at_module_level() -> dict[str, int]:
    """Names that the file defines, with the number of their room."""
    found: dict[str, int] = {}
    for node in TREE.body:
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
        found.update({name: room_of(node.lineno) for name in names})
    return found


class GlobalNames(ast.NodeVisitor):
    """Collects what is read from module level: every name that no enclosing function binds, and quoted annotations."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []  # name, line
        self._bound: list[set[str]] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function binds its arguments and whatever it assigns to."""
        arguments = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        leaves = [leaf for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)]
        self._bound.append(arguments | {leaf.id for leaf in leaves})
        self.generic_visit(node)
        self._bound.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """The same for a function without a name."""
        self._bound.append({argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)})
        self.generic_visit(node)
        self._bound.pop()

    def visit_Name(self, node: ast.Name) -> None:
        """A name that is read."""
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self._bound):
            self.found.append((node.id, node.lineno))

    def visit_arg(self, node: ast.arg) -> None:
        """An argument, whose annotation may be quoted."""
        if isinstance(node.annotation, ast.Constant) and isinstance(node.annotation.value, str):
            self.found.append((node.annotation.value, node.lineno))
        self.generic_visit(node)


def names_read() -> list[tuple[str, int]]:
    """Names read from module level anywhere in the file, with their lines."""
    visitor = GlobalNames()
    visitor.visit(TREE)
    return visitor.found


def functions() -> list[tuple[str, int, ast.FunctionDef]]:
    """Every function with its name and its length in lines."""
    nodes = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.name, (node.end_lineno or 0) - node.lineno + 1, node) for node in nodes]  # type: ignore[misc]


def test_the_file_imports_nothing_but_the_standard_library() -> None:
    """Copy it, run it."""
    modules = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add((node.module or "").partition(".")[0])
    assert modules <= sys.stdlib_module_names
    assert modules


def test_the_map_in_the_docstring_is_the_banners() -> None:
    """In the same order; an operator's manual that lies about the file is worse than none."""
    manual = ast.get_docstring(TREE) or ""
    promised = manual.split("Map of this file\n")[1].split("\n", 1)[1].split("\n\n")[0]
    rooms = [" ".join(name.split()) for name in promised.partition(".")[0].split(",")]
    assert rooms == [title for title, _ in ROOMS]


def test_no_room_names_what_a_lower_room_defines() -> None:
    """Annotations included: a room can be read knowing only what is above it."""
    home = defined_at_module_level()
    wrong = [f"line {line}: {name}" for name, line in names_read() if home.get(name, -1) > room_of(line)]
    assert wrong == []


def test_no_name_is_used_above_its_definition_at_module_level() -> None:
    """A name stands above its use: in the order of reading, what a class or a constant is made of comes first."""
    lines: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            for base in node.bases if isinstance(node, ast.ClassDef) else []:
                names = [leaf.id for leaf in ast.walk(base) if isinstance(leaf, ast.Name)]
                assert all(lines.get(name, 0) <= node.lineno for name in names)
    assert lines


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_mention_what_it_must_not_know(room: str) -> None:
    """Forbidden modules per room, as names in its code."""
    number = [title for title, _ in ROOMS].index(room)
    assert {name for name, line in names_read() if room_of(line) == number} & FORBIDDEN[room] == set()


def test_functions_are_short() -> None:
    """None over 60 lines, median at most 12, 90th percentile at most 35."""
    lengths = sorted(length for _, length, _ in functions())
    median, p90 = statistics.median(lengths), lengths[len(lengths) * 9 // 10]
    print(f"{len(lengths)} functions: median {median} lines, 90th percentile {p90}, longest {lengths[-1]}")
    assert [name for name, length, _ in functions() if length > 60] == []
    assert median <= 12
    assert p90 <= 35


def test_every_function_has_types() -> None:
    """A return type and a type for every argument but self and cls."""
    for name, _, node in functions():
        assert node.returns is not None, name
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        assert set(bare) <= {"self", "cls"}, name


# -- README, unit, Makefile --------------------------------------------------------------------------------------


@functools.cache
def error_family() -> set[str]:
    """ProxyError and what derives from it."""
    family = {"ProxyError"}
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    for node in classes:  # a base stands above what derives from it
        if any(isinstance(base, ast.Name) and base.id in family for base in node.bases):
            family.add(node.name)
    return family


def codes_in_source() -> dict[str, set[int]]:
    """Every stable code that is raised or assigned, with the statuses it is raised with."""
    codes: dict[str, set[int]] = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in error_family():
            status = getattr(es_proxy, node.func.id).status
            if len(node.args) > 2:
                status = ast.literal_eval(node.args[2])
            for code in ast.walk(node.args[0]):  # one code, or one of two
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    codes.setdefault(code.value, set()).add(status)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            attributes = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
            if "code" in attributes and isinstance(node.value.value, str):
                codes.setdefault(node.value.value, set())
    return codes


def test_readme_lists_every_error_code_and_no_other() -> None:
    """With its status: what an operator finds in a record can be looked up."""
    section = re.split(r"^#+ Error codes$", (HERE / "README.md").read_text(), flags=re.MULTILINE)[1].split("\n#")[0]
    listed: dict[str, str] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, status, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            listed.update(dict.fromkeys(re.findall("`([a-z0-9-]+)`", names), status))
    codes = codes_in_source()
    assert set(codes) - set(listed) == set()
    assert set(listed) - set(codes) == set()
    wrong = {code: (listed[code], found) for code, found in codes.items() if not found <= {int(listed[code])}}
    assert wrong == {}


def test_readme_prints_the_expression_that_parses_records() -> None:
    """The very one that es_proxy.RECORD is, up to white space."""
    text = "".join((HERE / "README.md").read_text().split())
    assert "".join(es_proxy.RECORD.pattern.split()) in text


def test_readme_s_example_records_parse() -> None:
    """What it shows is what it does: a pair, with an id of version 4."""
    lines = [line for line in (HERE / "README.md").read_text().splitlines() if re.match(r"[0-9-]{10}T\S+Z ID: ", line)]
    ((request, response),) = pairs([parse_line(line) for line in lines])
    assert json.loads(request.body) is not None
    assert response.status


def unit() -> configparser.ConfigParser:
    """es-proxy.service; systemd allows keys twice, and so does this."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(HERE / "es-proxy.service")
    return parser


def test_the_unit_starts_the_proxy_with_options_that_exist() -> None:
    """Its command line is one that parse_args takes; the log is a file; the service comes back by itself."""
    service = unit()["Service"]
    program, *words = service["ExecStart"].split()
    assert program.endswith("/bin/es-proxy")
    defaults = dict(pair.split("=", 1) for pair in service["Environment"].split())
    filled = [re.sub(r"\$\{?([A-Z_]+)\}?", lambda match: defaults[match[1]], word) for word in words]
    config = es_proxy.parse_args([word for word in filled if word])
    assert config.audit_log.startswith("/var/log/es-proxy/")
    assert service["Restart"] in ("always", "on-failure")
    assert set(unit().sections()) == {"Unit", "Service", "Install"}
    assert int(re.match("[0-9]+", service["TimeoutStopSec"])[0]) > config.drain_seconds  # type: ignore[index]


def clean_environment() -> dict[str, str]:
    """Without coverage's variables: a copy of es_proxy.py elsewhere is not what is measured."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COV") and key != "MAKEFLAGS"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What make needs, in a directory of its own."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    directory = tmp_path / "copy"
    directory.mkdir()
    for name in ("Makefile", "es_proxy.py", "mock_es.py", "es-proxy.service"):
        shutil.copy2(HERE / name, directory)
    return directory


def make(directory: Path, *words: str) -> str:
    """Run make there; its output, or a failure with it."""
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", *words], cwd=directory, env=clean_environment(), check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=4 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


TARGETS = (
    "help demo run test test-functional test-memory test-stress coverage lint bench install uninstall build deps clean"
)


def test_make_help_lists_every_target(copy: Path) -> None:
    """And each that the issue asks for exists."""
    text = make(copy, "help")
    listed = set(re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE))
    assert set(TARGETS.split()) <= listed
    rules = set(re.findall(r"^([a-z-]+):", (copy / "Makefile").read_text(), re.MULTILINE))
    assert listed <= rules


def test_make_build_makes_a_program(copy: Path) -> None:
    """build/es-proxy runs by itself."""
    make(copy, "build")
    done = subprocess.run(
        [copy / "build" / "es-proxy", "--version"], capture_output=True, text=True, check=True, env=clean_environment()
    )
    assert done.stdout == f"es-proxy {es_proxy.__version__}\n"


def test_make_install_honours_destdir_and_prefix_and_uninstall_takes_it_back(copy: Path, tmp_path: Path) -> None:
    """bin/es-proxy, executable, and a unit whose ExecStart is that file."""
    words = (f"DESTDIR={tmp_path}/root", "PREFIX=/usr")
    make(copy, "install", *words)
    installed = sorted(path for path in (tmp_path / "root").rglob("*") if path.is_file())
    assert [path.name for path in installed] == ["es-proxy", "es-proxy.service"]
    assert installed[0] == tmp_path / "root/usr/bin/es-proxy"
    assert os.access(installed[0], os.X_OK)
    assert "ExecStart=/usr/bin/es-proxy " in installed[1].read_text()
    assert installed[1].stat().st_mode & 0o777 == 0o644
    make(copy, "uninstall", *words)
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_systemd_takes_the_unit(copy: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about it."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    make(copy, "install", f"DESTDIR={tmp_path}/root", "PREFIX=/usr")
    (unit_file,) = (tmp_path / "root").rglob("es-proxy.service")
    text = unit_file.read_text().replace("ExecStart=/usr/bin/es-proxy", f"ExecStart={tmp_path}/root/usr/bin/es-proxy")
    checked = tmp_path / "es-proxy.service"
    checked.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", checked], capture_output=True, text=True, check=False)
    about_us = [line for line in done.stderr.splitlines() if "es-proxy" in line]
    if done.returncode and not about_us:
        pytest.skip(f"systemd-analyze can't work here: {done.stderr.strip()[-200:]}")
    assert (done.returncode, about_us) == (0, [])


def test_make_demo_shows_records_and_ends(copy: Path) -> None:
    """`make demo ONCE=1`: no installation, real requests, their records."""
    text = make(copy, "demo", "ONCE=1")
    assert "curl" in text
    for expected in ("_search", "_bulk", "401", "400"):
        assert expected in text
    assert len(set(re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text))) >= 4
