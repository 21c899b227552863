"""What is measured, and what the project asks of it. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ES_PROXY_KINDS = ("es-proxy", "es-proxy-ecs", "es-proxy-sync", "es-proxy-workers2")
KINDS = ("direct", *ES_PROXY_KINDS, "nginx", "haproxy", "mitmproxy", "relay")
USUAL_KINDS = tuple(kind for kind in KINDS if kind != "es-proxy-workers2")
THREADED = "a thread for each connection: nothing to be learnt from ten thousand of them"
NO_TLS = "relays bytes: it has no TLS of its own"

SEARCH_PATH = "/logs-2026.11/_search"
SMALL_BYTES = 100 * 1000
LARGE_BYTES = 100 * 1000 * 1000
UPLOAD_BYTES = 20 * 1000 * 1000
UPLOADS_AT_MOST = 40  # in one round, so that the records of 27 MB each don't fill the disk


@dataclass(frozen=True)
class Workload:
    """One kind of traffic, sent through every proxy in turn."""

    name: str
    title: str
    connections: int
    method: str = "POST"
    path: str = SEARCH_PATH
    body: str = "search"  # a file in the temporary directory
    tool: str = "wrk"  # or what transfer.py calls it
    upstream: str = "fast"  # nginx or mock_es; `delay`, `sink`: upstream.py
    bulk: bool = False  # measured in MB/s
    close: bool = False  # a new connection for each request
    tls: bool = False  # on both sides
    idle: int = 0  # connections that are open beside it
    fresh: bool = False  # every round starts the proxies anew, with an empty log
    most: int = 0  # exchanges in a round; 0: as many as there is time for
    kinds: tuple[str, ...] = USUAL_KINDS
    without: Mapping[str, str] = field(default_factory=dict)  # kind: why not
    remark: str = ""


def search(connections: int) -> Workload:
    """Small requests, small answers, connections kept."""
    clients = "1 client" if connections == 1 else f"{connections} clients"
    return Workload(f"search-{connections}", f"small _search, {clients}", connections)


WORKLOADS = (
    search(1),
    search(8),
    search(50),
    search(200),
    search(1000),
    Workload("connect", "a new connection for each request, 50 clients", 50, close=True),
    Workload("slow-200", "upstream takes 10 ms, 200 clients", 200, upstream="delay"),
    Workload("medium", "responses of 100 KB, 50 clients", 50, "GET", f"/_mock/big?bytes={SMALL_BYTES}"),
    Workload(
        "download", "response of 100 MB", 1, "GET", f"/_mock/big?bytes={LARGE_BYTES}", "", tool="download", bulk=True
    ),
    Workload(
        "upload",
        "_bulk upload of 20 MB",
        1,
        path="/_bulk",
        body="bulk",
        tool="upload",
        upstream="sink",
        bulk=True,
        fresh=True,
        most=UPLOADS_AT_MOST,
        remark="nginx and HAProxy record nothing of a body this large, es-proxy and mitmproxy all of it",
    ),
    Workload("tls-50", "TLS on both sides, 50 clients", 50, tls=True, without={"relay": NO_TLS}),
    Workload(
        "tls-connect",
        "TLS on both sides, a new connection for each request, 50 clients",
        50,
        tls=True,
        close=True,
        without={"relay": NO_TLS},
    ),
    Workload(
        "tls-download",
        "response of 100 MB, TLS on both sides",
        1,
        "GET",
        f"/_mock/big?bytes={LARGE_BYTES}",
        "",
        tool="download",
        bulk=True,
        tls=True,
        without={"relay": NO_TLS},
    ),
    Workload(
        "idle",
        "50 clients beside 10 000 idle connections",
        50,
        idle=10_000,
        without={"relay": THREADED, "mitmproxy": "opening them takes it minutes"},
    ),
    Workload(
        "workers", "small _search, 200 clients, two workers on two cores", 200, kinds=("es-proxy", "es-proxy-workers2")
    ),
)


@dataclass(frozen=True)
class Floor:
    """A promise about one figure of es-proxy: its ratio to another proxy's, or (against nothing) itself."""

    workload: str
    figure: str
    bound: float
    at_least: bool = True
    against: str = "nginx"
    kind: str = "es-proxy"


FLOORS = (
    Floor("search-50", "rate", 0.45),
    Floor("search-50", "rate", 0.8, against="haproxy"),
    Floor("search-50", "rate", 20, against="mitmproxy"),
    Floor("search-200", "rate", 0.55),
    Floor("search-200", "p99_ms", 2, at_least=False),
    Floor("search-1000", "errors", 0, at_least=False, against=""),
    Floor("search-1000", "p99_ms", 3, at_least=False),
    Floor("search-1", "p50_ms", 1.4, at_least=False),
    Floor("slow-200", "rate", 0.95),
    Floor("slow-200", "p99_ms", 1.3, at_least=False),
    Floor("connect", "rate", 0.4),
    Floor("download", "rate", 1.5),
    Floor("download", "cpu_us", 0.3, at_least=False),
    Floor("tls-download", "rate", 0.8),
    Floor("upload", "rate", 0.4),
    Floor("tls-50", "rate", 0.4),
    Floor("idle", "idle_more_mib", 60, at_least=False, against=""),
    Floor("idle", "idle_rate_ratio", 0.8, against=""),
    Floor("search-50", "start_mib", 25, at_least=False, against=""),
    Floor("workers", "rate", 1.7, against="es-proxy", kind="es-proxy-workers2"),
)
