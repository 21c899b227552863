"""Starting and ending what takes part: upstreams, proxies, load; each on its cores, all in one temporary directory.

Everything listens on 127.0.0.1. What is started here is ended here, by its process id.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from workloads import LARGE_BYTES, SMALL_BYTES, UPLOAD_BYTES, Workload

HERE = Path(__file__).resolve().parent
START_SECONDS = 20.0
STOP_SECONDS = 5.0
WANTED_FILES = 65_536  # descriptors: ten thousand clients, and as many connections to the upstream
CONNECTIONS_AT_MOST = 25_000
SYSTEM_DIRECTORIES = "/usr/sbin:/usr/local/sbin:/sbin"  # not on every user's PATH, nginx and haproxy live there
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
DELAY_MS = 10
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PACKAGES = {
    "wrk": "Debian package wrk",
    "nginx": "Debian package nginx-light",
    "haproxy": "Debian package haproxy",
    "openssl": "Debian package openssl",
    "mitmdump": "PyPI package mitmproxy, in a virtual environment whose bin directory is on PATH",
}
SEARCH_BODY = (
    b'{"size":10,"sort":[{"@timestamp":"desc"}],"query":{"bool":{"must":[{"match":{"message":"connection refused"}}],'
    b'"filter":[{"term":{"service.name":"checkout"}},{"range":{"@timestamp":{"gte":"now-15m","lt":"now"}}}]}}}'
)
SEARCH_ANSWER = (
    '{"took":3,"timed_out":false,"_shards":{"total":1,"successful":1,"skipped":0,"failed":0},"hits":{"total":{"value":1,'
    '"relation":"eq"},"max_score":null,"hits":[{"_index":"logs-2026.11","_id":"Xw1","_score":null,"_source":{"@timestamp"'
    ':"2026-11-23T13:03:24.123Z","service.name":"checkout","message":"connection refused"},"sort":[1795439004123]}]}}'
)


class MissingError(Exception):
    """Something isn't there: what, and how to get it. A row is left out."""


class FailedError(Exception):
    """Something didn't start, or gave no result. A row is left out."""


def which(tool: str) -> str:
    """Where the program is. Raises MissingError."""
    path = shutil.which(tool) or shutil.which(tool, path=SYSTEM_DIRECTORIES)
    if path is None:
        raise MissingError(f"{tool} is not installed: {PACKAGES[tool]}")
    return path


def raise_file_limit() -> int:
    """Allow ourselves and what we start as many descriptors as may be; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (WANTED_FILES, max(hard, WANTED_FILES)))
        except (OSError, ValueError):  # only root may go beyond the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(frozen=True)
class Cores:
    """Who runs where."""

    proxy: frozenset[int]
    load: frozenset[int]
    two: frozenset[int]  # for two workers: may share one with the load

    @classmethod
    def of_this_machine(cls) -> Cores:
        """The last core is the proxy's, the others are the load's and the upstream's."""
        cores = sorted(os.sched_getaffinity(0))
        proxy = frozenset(cores[-1:])
        load = frozenset(cores[:-1]) or proxy
        if len(cores) >= 4:
            return cls(proxy, frozenset(cores[:-2]), frozenset(cores[-2:]))
        return cls(proxy, load, frozenset(cores[-2:]))


# -- What the system knows of a process --------------------------------------------------------------------------


def stat_fields(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the third on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:  # grows while we walk
        found.extend(children.get(member, []))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of the process and its descendants, ended ones included."""
    ticks = sum(sum(map(int, fields[11:15])) for member in family(pid) if (fields := stat_fields(member)))
    return ticks / TICKS_PER_SECOND


def ended_seconds() -> float:
    """Processor time of all children that have ended: what a load generator used is the difference."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_kib(pid: int) -> int:
    """Resident memory of the process and its descendants."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError, AttributeError):  # gone meanwhile
            status = Path(f"/proc/{member}/status").read_text("ascii", "replace")
            total += int(re.search(r"^VmRSS:\s+([0-9]+) kB", status, re.MULTILINE)[1])  # type: ignore[index]
    return total


def busy_seconds(cores: Iterable[int]) -> float:
    """Time that the cores have not been idle since the machine started."""
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in Path("/proc/stat").read_text("ascii").splitlines():
        name, *values = line.split()
        if name in wanted:
            ticks += sum(map(int, values[:8])) - int(values[3]) - int(values[4])  # without idle and iowait
    return ticks / TICKS_PER_SECOND


# -- Processes and files -----------------------------------------------------------------------------------------


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """End it politely, then not."""
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)


class Stage:
    """The temporary directory, what runs in it, its files; as a context manager it leaves nothing behind."""

    def __init__(self, cores: Cores) -> None:
        self.cores = cores
        self.files = raise_file_limit()
        self.directory = Path(tempfile.mkdtemp(prefix="es-proxy-bench-"))
        self._running: list[subprocess.Popen[bytes]] = []
        self._names = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}  # a second one changes nothing
        for process in reversed(self._running):
            end(process)
        shutil.rmtree(self.directory, ignore_errors=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def subdirectory(self, name: str) -> Path:
        """A new one."""
        self._names += 1
        path = self.directory / f"{self._names}-{re.sub('[^A-Za-z0-9.-]', '_', name)}"
        path.mkdir(mode=0o700)
        return path

    def spawn(
        self,
        argv: Sequence[str],
        cores: Iterable[int],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        pipes: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start it on those cores, in a session of its own: a Ctrl-C is ours to deal with."""
        pipe = subprocess.PIPE if pipes else None
        with open(directory / "stdout", "ab") as out, open(directory / "stderr", "ab") as err:
            process = subprocess.Popen(
                argv,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or out,
                stderr=err,
                cwd=directory,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(directory), **(environment or {})},
                start_new_session=True,
                preexec_fn=functools.partial(os.sched_setaffinity, 0, set(cores)),
            )
        self._running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End one of them."""
        end(process)
        if process in self._running:
            self._running.remove(process)

    def run(self, argv: Sequence[str], seconds: float) -> str:
        """Run a load generator to its end and return what it printed. Raises FailedError."""
        directory = self.subdirectory("run")
        process = self.spawn(argv, self.cores.load, directory)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise FailedError(f"{Path(argv[0]).name} took more than {seconds:.0f} s") from None
        finally:
            self.end(process)
        output = (directory / "stdout").read_text("utf-8", "replace")
        if process.returncode:
            raise FailedError(f"{Path(argv[0]).name}: {last_line(directory)}")
        shutil.rmtree(directory, ignore_errors=True)
        return output

    def wait_for(self, process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        """Wait until something listens there. Raises FailedError."""
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.02)
        self.end(process)
        raise FailedError(f"did not start: {last_line(directory)}")

    def fill_in(self, template: str, target: Path, **values: str | int | Path) -> None:
        """Write a configuration: every @NAME@ of the template replaced."""
        text = (HERE / template).read_text("utf-8")
        target.write_text(re.sub("@([A-Z_]+)@", lambda match: str(values[match[1]]), text), "utf-8")

    def connections(self, files_each: int) -> int:
        """How many connections a proxy can have that needs so many descriptors for each."""
        return min(CONNECTIONS_AT_MOST, (self.files - 100) // files_each)

    def body(self, name: str) -> Path:
        """The file with that request body; none for an empty name."""
        return self.directory / name if name else Path("/dev/null")

    def write_bodies(self) -> None:
        """What is sent, and what the upstream answers from files."""
        self.body("search").write_bytes(SEARCH_BODY)
        pair = b'{"index":{"_index":"logs-2026.11"}}\n{"@timestamp":"2026-11-23T13:03:24.123Z","message":"%032x"}\n'
        count = UPLOAD_BYTES // len(pair % 0)
        self.body("bulk").write_bytes(b"".join(pair % number for number in range(count)))
        block = os.urandom(100_000)
        for size in (SMALL_BYTES, LARGE_BYTES):
            with open(self.directory / f"big-{size}", "wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)


def last_line(directory: Path) -> str:
    """The last thing it said on standard error."""
    lines = (directory / "stderr").read_text("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it said nothing"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, for both sides."""

    cert: Path
    key: Path
    both: Path  # in one file, for HAProxy and mitmproxy


def make_pair(directory: Path) -> Pair:
    """A self-signed certificate that is its own authority. Raises MissingError."""
    pair = Pair(directory / "cert.pem", directory / "key.pem", directory / "both.pem")
    command = f"{which('openssl')} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    extensions = ("subjectAltName=DNS:localhost,IP:127.0.0.1", "keyUsage=critical,digitalSignature,keyCertSign")
    argv = [*command.split(), "-subj", "/CN=localhost", "-keyout", str(pair.key), "-out", str(pair.cert)]
    for extension in extensions:
        argv += ["-addext", extension]
    subprocess.run(argv, check=True, capture_output=True, timeout=START_SECONDS)
    pair.both.write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
    return pair


# -- Upstreams ---------------------------------------------------------------------------------------------------


@dataclass
class Upstream:
    """Something that answers."""

    process: subprocess.Popen[bytes]
    port: int
    stats_port: int
    stats_tls: bool = False
    counts_stats: bool = False  # nginx counts the question as a request
    asked: int = 0

    def requests(self) -> int:
        """How many it has had."""
        connection: http.client.HTTPConnection
        if self.stats_tls:
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection("127.0.0.1", self.stats_port, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.stats_port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/_mock/stats")
            text = connection.getresponse().read()
        self.asked += 1
        if text.startswith(b"{"):
            return int(json.loads(text)["requests"])
        return int(text.split(b"requests", 1)[1].split()[2]) - (self.asked if self.counts_stats else 0)


class Upstreams:
    """All of them, started when first wanted."""

    def __init__(self, stage: Stage, mock: Path) -> None:
        self._stage = stage
        self._mock = mock
        self._started: dict[str, Upstream] = {}
        self._pair: Pair | None = None
        self.name = "nginx" if shutil.which("nginx") or shutil.which("nginx", path=SYSTEM_DIRECTORIES) else "mock_es"

    def pair(self) -> Pair:
        """The certificate of everybody. Raises MissingError."""
        if self._pair is None:
            self._pair = make_pair(self._stage.directory)
        return self._pair

    def get(self, workload: Workload) -> Upstream:
        """The one for that workload. Raises MissingError, FailedError."""
        name = f"{workload.upstream}-tls" if workload.tls else workload.upstream
        if name not in self._started:
            if workload.upstream != "fast":
                self._started[name] = self._start_own(DELAY_MS if workload.upstream == "delay" else 0)
            elif self.name == "nginx":
                self._started[name] = self._start_nginx(workload.tls)
            else:
                self._started[name] = self._start_mock(workload.tls)
        return self._started[name]

    def _spawn(self, argv: Sequence[str], port: int, directory: Path) -> subprocess.Popen[bytes]:
        process = self._stage.spawn(argv, self._stage.cores.load, directory)
        self._stage.wait_for(process, port, directory)
        return process

    def _start_own(self, delay_ms: int) -> Upstream:
        port = free_port()
        argv = [sys.executable, str(HERE / "upstream.py"), str(port), "--delay-ms", str(delay_ms)]
        return Upstream(self._spawn(argv, port, self._stage.subdirectory("upstream")), port, port)

    def _start_mock(self, tls: bool) -> Upstream:
        port = free_port()
        argv = [sys.executable, str(self._mock), "--port", str(port)]
        argv += ["--tls", str(self.pair().cert), str(self.pair().key)] if tls else []
        return Upstream(self._spawn(argv, port, self._stage.subdirectory("mock")), port, port, stats_tls=tls)

    def _start_nginx(self, tls: bool) -> Upstream:
        port, tls_port = free_port(), free_port()
        directory = self._stage.subdirectory("upstream")
        lines = ""
        if tls:
            lines = f"listen 127.0.0.1:{tls_port} backlog=4096 ssl; ssl_certificate {self.pair().cert};"
            lines += f" ssl_certificate_key {self.pair().key}; ssl_protocols TLSv1.2 TLSv1.3;"
        self._stage.fill_in(
            "upstream.conf.in",
            directory / "nginx.conf",
            DIR=directory,
            FILES=self._stage.directory,
            PORT=port,
            TLS=lines,
            ANSWER=SEARCH_ANSWER,
            CONNECTIONS=self._stage.connections(1),
        )
        argv = [which("nginx"), "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]
        return Upstream(self._spawn(argv, port, directory), tls_port if tls else port, port, counts_stats=True)


# -- Proxies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One row of the tables."""

    label: str
    kind: str
    file: Path = field(default_factory=Path)  # es_proxy.py, for its kinds
    python: str = sys.executable
    options: str = ""  # what its --help says


@dataclass
class Proxy:
    """One that runs (or none: `direct`)."""

    contender: Contender
    port: int
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None  # of es-proxy: to be checked
    form: str = ""
    directory: Path = field(default_factory=Path)
    start_kib: int = 0  # resident memory before any load

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        return cpu_seconds(self.process.pid) if self.process else 0.0

    def resident_kib(self) -> int:
        """Memory now."""
        return resident_kib(self.process.pid) if self.process else 0


@dataclass(frozen=True)
class Order:
    """What a proxy is started with."""

    stage: Stage
    contender: Contender
    directory: Path
    port: int
    upstream: Upstream
    pair: Pair | None  # TLS on both sides


def es_proxy_command(order: Order) -> list[str]:
    """es-proxy as it ships, one worker unless two are wanted."""
    contender, pair = order.contender, order.pair
    argv = [contender.python, str(contender.file), "127.0.0.1", str(order.upstream.port), "127.0.0.1", str(order.port)]
    argv += ["--audit-log", str(order.directory / "audit.log")]
    if pair:
        argv += ["--tls", "both", "--cert", str(pair.cert), "--key", str(pair.key), "--ca", str(pair.cert)]
    else:
        argv += ["--no-tls"]
    if contender.kind == "es-proxy-ecs":
        argv += ["--audit-format", "ecs"]
    if contender.kind == "es-proxy-sync":
        argv += ["--audit-sync", "always"]
    if "--workers" in contender.options:
        argv += ["--workers", "2" if contender.kind == "es-proxy-workers2" else "1"]
    return argv


def nginx_command(order: Order) -> list[str]:
    """nginx with its configuration."""
    pair, target = order.pair, order.directory / "nginx.conf"
    listener = upstream = ""
    if pair:
        listener = f"ssl_certificate {pair.cert}; ssl_certificate_key {pair.key}; ssl_protocols TLSv1.2 TLSv1.3;"
        upstream = f"proxy_ssl_verify on; proxy_ssl_trusted_certificate {pair.cert}; proxy_ssl_name localhost;"
        upstream += " proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.2 TLSv1.3;"
    order.stage.fill_in(
        "nginx.conf.in",
        target,
        DIR=order.directory,
        LOG=order.directory / "access.log",
        PORT=order.port,
        UPSTREAM=order.upstream.port,
        CONNECTIONS=order.stage.connections(1),
        SCHEME="https" if pair else "http",
        LISTEN="ssl" if pair else "",
        TLS_LISTEN=listener,
        TLS_UPSTREAM=upstream,
    )
    return [which("nginx"), "-e", "stderr", "-p", str(order.directory), "-c", str(target)]


def haproxy_command(order: Order) -> list[str]:
    """HAProxy with its configuration; its log goes to standard output, a file."""
    pair, target = order.pair, order.directory / "haproxy.cfg"
    order.stage.fill_in(
        "haproxy.cfg.in",
        target,
        PORT=order.port,
        UPSTREAM=order.upstream.port,
        CONNECTIONS=order.stage.connections(2),
        BIND=f"ssl crt {pair.both}" if pair else "",
        SERVER=f"ssl verify required ca-file {pair.cert} verifyhost localhost sni str(localhost)" if pair else "",
    )
    return [which("haproxy"), "-db", "-f", str(target)]


def mitmproxy_command(order: Order) -> list[str]:
    """mitmdump as a reverse proxy with the addon."""
    scheme = "https" if order.pair else "http"
    argv = [which("mitmdump"), "-q", "--mode", f"reverse:{scheme}://127.0.0.1:{order.upstream.port}"]
    argv += ["--listen-host", "127.0.0.1", "--listen-port", str(order.port), "-s", str(HERE / "mitm_addon.py")]
    argv += ["--set", f"confdir={order.directory}"]
    if order.pair:
        argv += ["--certs", f"*={order.pair.both}", "--set", f"ssl_verify_upstream_trusted_ca={order.pair.cert}"]
    return argv


def relay_command(order: Order) -> list[str]:
    """The bare relay."""
    return [order.contender.python, str(HERE / "relay.py"), str(order.port), str(order.upstream.port)]


COMMANDS: Mapping[str, Callable[[Order], list[str]]] = {
    "es-proxy": es_proxy_command,
    "es-proxy-ecs": es_proxy_command,
    "es-proxy-sync": es_proxy_command,
    "es-proxy-workers2": es_proxy_command,
    "nginx": nginx_command,
    "haproxy": haproxy_command,
    "mitmproxy": mitmproxy_command,
    "relay": relay_command,
}


def start_proxy(stage: Stage, contender: Contender, upstream: Upstream, pair: Pair | None) -> Proxy:
    """Start it and wait until it listens. Raises MissingError, FailedError."""
    if contender.kind == "direct":
        return Proxy(contender, upstream.port)
    directory = stage.subdirectory(contender.label)
    order = Order(stage, contender, directory, free_port(), upstream, pair)
    argv = COMMANDS[contender.kind](order)
    cores = stage.cores.two if contender.kind == "es-proxy-workers2" else stage.cores.proxy
    process = stage.spawn(argv, cores, directory, {"BENCH_LOG": str(directory / "mitm.log")})
    stage.wait_for(process, order.port, directory)
    proxy = Proxy(contender, order.port, process, directory=directory, start_kib=resident_kib(process.pid))
    if COMMANDS[contender.kind] is es_proxy_command:
        proxy.log = directory / "audit.log"
        proxy.form = "ecs" if contender.kind == "es-proxy-ecs" else "text"
    return proxy


def unavailable(contender: Contender) -> str | None:
    """Why it can't take part; None: it can."""
    needs = {"es-proxy-sync": "--audit-sync", "es-proxy-workers2": "--workers"}
    tools = {"nginx": "nginx", "haproxy": "haproxy", "mitmproxy": "mitmdump"}
    if contender.kind in tools:
        try:
            which(tools[contender.kind])
        except MissingError as error:
            return str(error)
    option = needs.get(contender.kind)
    if option and option not in contender.options:
        return f"{contender.file.name} has no {option}"
    if contender.kind == "es-proxy-ecs":
        formats = re.search(r"--audit-format\s+\{([^}]*)\}", contender.options)
        if not formats or "ecs" not in formats[1].split(","):
            return f"{contender.file.name} has no --audit-format ecs"
    return None


@functools.cache
def help_of(python: str, file: Path) -> str:
    """What es_proxy.py --help prints under that interpreter. Raises FailedError."""
    wide = {**os.environ, "COLUMNS": "200"}  # no option is broken over two lines
    try:
        done = subprocess.run(
            [python, str(file), "--help"], capture_output=True, text=True, timeout=START_SECONDS, env=wide
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedError(f"{python} {file} --help: {error}") from None
    if done.returncode:
        raise FailedError(f"{python} {file} --help: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout
