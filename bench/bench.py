#!/usr/bin/env python3
"""es-proxy beside nginx, HAProxy, mitmproxy, a bare relay, and nothing in between: one script, one run.

Every proxy records whole requests as well as it can and runs on one core; the load generator (wrk; transfer.py for
large bodies) and the upstream run on the others. For each workload all proxies are started, warmed up, and then
measured in turn, A B C, A B C, so that what disturbs the machine disturbs all of them. The figures are medians of the
rounds; `x nginx` is the ratio to nginx's. CPU is the proxy's processor time for each request: on a busy machine it
says more than the rate does.

After each round of es-proxy its log is read: every answer that the load generator counted must have its two records,
paired by id, with the user, path, method and body that were sent, and no request may have reached the upstream without.

Linux only. It installs nothing: what is missing is named, with the package that has it, and its row is left out.
Everything listens on 127.0.0.1, lives in a temporary directory, and is gone afterwards.
Exit status: 0, 1 when records were wrong, 2 for a mistake in the command line, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import chart
import report
from launch import (
    ENDING,
    HERE,
    Contender,
    Cores,
    FailedError,
    MissingError,
    Proxy,
    Stage,
    Upstream,
    Upstreams,
    busy_seconds,
    cpu_seconds,
    ended_seconds,
    help_of,
    start_proxy,
    unavailable,
    which,
)
from records import Checker, Expected
from report import Result, Row, Sample
from workloads import ES_PROXY_KINDS, KINDS, WORKLOADS, Workload

ROOT = HERE.parent
GRACE_SECONDS = 30.0  # for a load generator beyond the time it was given
TRANSFER_GRACE_SECONDS = 90.0  # an exchange of 100 MB through the slowest proxy
IDLE_OPEN_SECONDS = 120.0
WARM_UP_SECONDS = 1.0
VERSION_OPTION = {"nginx": "-v", "haproxy": "-v", "wrk": "-v", "mitmdump": "--version", "openssl": "version"}


@dataclass(frozen=True)
class Outcome:
    """What a load generator reports."""

    requests: int
    seconds: float
    size: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int

    @classmethod
    def parse(cls, output: str) -> Outcome:
        """From the one line of JSON in it. Raises FailedError."""
        found = re.search(r'(\{"requests".*\})\s*$', output, re.MULTILINE)
        if not found:
            raise FailedError("the load generator printed no result")
        values = json.loads(found[1])
        return cls(
            requests=values["requests"],
            seconds=values["seconds"],
            size=values["bytes"],
            p50_ms=values["p50_us"] / 1000,
            p99_ms=values["p99_us"] / 1000,
            max_ms=values["max_us"] / 1000,
            errors=sum(values["errors"].values()),
        )


def apply_load(stage: Stage, workload: Workload, port: int, seconds: float) -> Outcome:
    """One round of it. Raises MissingError, FailedError."""
    body = str(stage.body(workload.body))
    scheme, address = ("https" if workload.tls else "http"), f"127.0.0.1:{port}"
    if workload.tool == "wrk":
        argv = [which("wrk"), "-t1", f"-c{workload.connections}", f"-d{seconds:.0f}s", "--timeout", "10s"]
        argv += ["-s", str(HERE / "load.lua"), f"{scheme}://{address}{workload.path}", "--", workload.method, body]
        argv += ["close" if workload.close else "keep"]
        return Outcome.parse(stage.run(argv, seconds + GRACE_SECONDS))
    argv = [*transfer(stage, workload, address), "--seconds", str(seconds), "--most", str(workload.most)]
    return Outcome.parse(stage.run(argv, seconds + TRANSFER_GRACE_SECONDS))


def transfer(stage: Stage, workload: Workload, address: str) -> list[str]:
    """The command that sends large bodies."""
    argv = [sys.executable, str(HERE / "transfer.py"), workload.tool, address, workload.path]
    argv += ["--body", str(stage.body(workload.body))] if workload.body else []
    return argv + (["--tls"] if workload.tls else [])


def digest(stage: Stage, workload: Workload, port: int) -> str:
    """SHA-256 of one response as it arrives."""
    output = stage.run([*transfer(stage, workload, f"127.0.0.1:{port}"), "--digest"], TRANSFER_GRACE_SECONDS)
    return str(json.loads(output)["sha256"])


@contextlib.contextmanager
def idle_connections(stage: Stage, workload: Workload, port: int) -> Iterator[int]:
    """Hold open connections; gives how many. Raises FailedError."""
    count = idle_count(stage, workload)
    directory = stage.subdirectory("idle")
    argv = [sys.executable, str(HERE / "transfer.py"), "idle", f"127.0.0.1:{port}", workload.path]
    argv += ["--count", str(count), "--body", str(stage.body(workload.body))]
    process = stage.spawn(argv, stage.cores.load, directory, pipes=True)
    try:
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], IDLE_OPEN_SECONDS)
        if not ready or not process.stdout.readline().startswith(b"ready"):
            raise FailedError(f"{count} idle connections could not be opened")
        yield count
    finally:
        stage.end(process)
        time.sleep(0.2)  # their ends are dealt with


class Runner:
    """Measures one proxy in one workload, round by round."""

    def __init__(self, stage: Stage, workload: Workload, proxy: Proxy, upstream: Upstream) -> None:
        self._stage = stage
        self._workload = workload
        self._upstream = upstream
        self._size: int | None = None
        self.proxy = proxy
        self.checker = Checker(proxy.log, proxy.form) if proxy.log else None

    def warm_up(self, seconds: float) -> None:
        """A first load that doesn't count. Raises FailedError when what arrives isn't what was sent."""
        workload = self._workload
        if workload.tool == "download":
            if digest(self._stage, workload, self.proxy.port) != digest(self._stage, workload, self._upstream.port):
                raise FailedError("the response was damaged")
        else:
            apply_load(self._stage, workload, self.proxy.port, seconds)
        if self.checker:
            self.checker.skip()

    def round(self, seconds: float) -> Sample:
        """One round; with idle connections it is two, without and with them."""
        if not self._workload.idle:
            return self._measure(seconds)
        alone = self._measure(seconds)
        before_kib = self.proxy.resident_kib()
        with idle_connections(self._stage, self._workload, self.proxy.port):
            more_kib = self.proxy.resident_kib() - before_kib
            if self.checker:
                self.checker.skip()
            sample = self._measure(seconds)
        sample.idle_more_mib = more_kib / 1024
        sample.idle_rate_ratio = sample.rate / alone.rate if alone.rate else 0.0
        sample.problems = alone.problems + sample.problems
        return sample

    def _measure(self, seconds: float) -> Sample:
        stage, cores = self._stage, self._cores() | self._stage.cores.load
        forwarded = self._upstream.requests()
        cpu, load, busy = self.proxy.cpu_seconds(), self._load_seconds(), busy_seconds(cores)
        begin = time.monotonic()
        outcome = apply_load(stage, self._workload, self.proxy.port, seconds)
        elapsed = time.monotonic() - begin
        cpu, load = self.proxy.cpu_seconds() - cpu, self._load_seconds() - load
        others = busy_seconds(cores) - busy - cpu - load
        amount = outcome.size / 1e6 if self._workload.bulk else outcome.requests
        sample = Sample(
            requests=outcome.requests,
            seconds=outcome.seconds,
            rate=amount / outcome.seconds,
            p50_ms=outcome.p50_ms,
            p99_ms=outcome.p99_ms,
            max_ms=outcome.max_ms,
            errors=outcome.errors,
            cpu_us=cpu * 1e6 / max(1, outcome.requests),
            rss_mib=self.proxy.resident_kib() / 1024,
            load_percent=100 * load / (elapsed * len(stage.cores.load)),
            others_percent=max(0.0, 100 * others / (elapsed * len(cores))),
        )
        self._check(outcome, forwarded, sample)
        return sample

    def _load_seconds(self) -> float:
        """Processor time of upstream and load generators so far."""
        return ended_seconds() + cpu_seconds(self._upstream.process.pid)

    def _cores(self) -> frozenset[int]:
        workers = self.proxy.contender.kind == "es-proxy-workers2"
        return self._stage.cores.two if workers else self._stage.cores.proxy

    def _check(self, outcome: Outcome, forwarded_before: int, sample: Sample) -> None:
        if not self.checker:
            return
        workload = self._workload
        cut_off = outcome.errors + (workload.connections if workload.tool == "wrk" else 0)
        self.checker.settle()
        expected = Expected(
            method=workload.method,
            path=workload.path,
            body=self._stage.body(workload.body).read_bytes(),
            answered=outcome.requests,
            cut_off=cut_off,
            forwarded=self._upstream.requests() - forwarded_before,
            size=None,
        )
        found, sample.problems = self.checker.check(expected)
        sample.recorded = found.requests


class Bench:
    """The whole run."""

    def __init__(self, stage: Stage, upstreams: Upstreams, options: argparse.Namespace) -> None:
        self._stage = stage
        self._upstreams = upstreams
        self._options = options
        self._contenders: list[Contender] = options.contenders
        self._missing = {entry.label: why for entry in self._contenders if (why := unavailable(entry))}

    def run(self, workload: Workload) -> Result:
        """One workload through all proxies."""
        result = Result(workload)
        try:
            if workload.tool == "wrk":
                which("wrk")
            upstream = self._upstreams.get(workload)
        except (MissingError, FailedError) as error:
            result.left_out["all"] = str(error)
            return result
        result.remarks = remarks(self._stage, workload)
        entries = [entry for entry in self._contenders if self._takes_part(entry, result)]
        rows = {entry.label: Row(entry.label, entry.kind, 0.0) for entry in entries}
        rounds = self._options.rounds
        for number in range(rounds if workload.fresh else 1):
            self._play(
                workload, upstream, entries, rows, result, range(number, number + 1 if workload.fresh else rounds)
            )
        result.rows = [row for row in rows.values() if row.samples]
        result.settle()
        return result

    def _takes_part(self, entry: Contender, result: Result) -> bool:
        workload = result.workload
        if entry.kind not in workload.kinds:
            return False
        why = self._missing.get(entry.label) or workload.without.get(entry.kind)
        if why:
            result.left_out[entry.label] = why
        return not why

    def _play(
        self,
        workload: Workload,
        upstream: Upstream,
        entries: Sequence[Contender],
        rows: dict[str, Row],
        result: Result,
        rounds: range,
    ) -> None:
        """Start the proxies, warm them up, measure them in turn, end them."""
        with contextlib.ExitStack() as stack:
            runners = []
            for entry in entries:
                with self._leaving_out(entry.label, result):
                    runner = self._start(entry, workload, upstream, stack)
                    rows[entry.label].start_mib = runner.proxy.start_kib / 1024
                    runners.append(runner)
            for number in rounds:
                for runner in runners:
                    label = runner.proxy.contender.label
                    tell(f"{workload.name}: round {number + 1} of {self._options.rounds}, {label}")
                    with self._leaving_out(label, result):
                        rows[label].samples.append(runner.round(self._options.seconds))
        tell("")

    def _start(self, entry: Contender, workload: Workload, upstream: Upstream, stack: contextlib.ExitStack) -> Runner:
        tell(f"{workload.name}: starting {entry.label}")
        pair = self._upstreams.pair() if workload.tls else None
        proxy = start_proxy(self._stage, entry, upstream, pair)
        stack.callback(self._end, proxy)
        runner = Runner(self._stage, workload, proxy, upstream)
        runner.warm_up(min(WARM_UP_SECONDS, self._options.seconds))
        return runner

    def _end(self, proxy: Proxy) -> None:
        if proxy.process:
            self._stage.end(proxy.process)
            shutil.rmtree(proxy.directory, ignore_errors=True)  # its log may be large

    @staticmethod
    @contextlib.contextmanager
    def _leaving_out(label: str, result: Result) -> Iterator[None]:
        """What fails is left out, with the reason; the others go on."""
        try:
            yield
        except (MissingError, FailedError, OSError, subprocess.SubprocessError) as error:
            result.left_out[label] = str(error)


def idle_count(stage: Stage, workload: Workload) -> int:
    """As many idle connections as are wanted, or as descriptors allow."""
    return min(workload.idle, stage.connections(2) - 2 * workload.connections)


def remarks(stage: Stage, workload: Workload) -> list[str]:
    """Where this machine falls short of what the workload wants."""
    out = []
    if workload.idle and idle_count(stage, workload) < workload.idle:
        out.append(f"{idle_count(stage, workload)} idle connections: more descriptors are not allowed (ulimit -n)")
    if "es-proxy-workers2" in workload.kinds and stage.cores.two & stage.cores.load:
        out.append("fewer than four cores: the second worker shares one with the load, which limits the gain")
    if stage.cores.proxy & stage.cores.load:
        out.append("one core only: proxy and load share it")
    return out


def tell(text: str) -> None:
    """Progress, where somebody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


# -- Command line ------------------------------------------------------------------------------------------------


def comma_list(text: str, known: Sequence[str], option: str) -> list[str]:
    """Names separated by commas. Raises argparse.ArgumentTypeError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{option} has no {name!r}: {', '.join(known)}")
    return names


def workload_list(text: str) -> list[str]:
    """For --only."""
    return comma_list(text, [workload.name for workload in WORKLOADS], "the list of workloads")


def kind_list(text: str) -> list[str]:
    """For --proxies."""
    return comma_list(text, KINDS, "the list of proxies")


def epilog() -> str:
    """The workloads and proxies."""
    lines = ["workloads:", *(f"  {workload.name:<13} {workload.title}" for workload in WORKLOADS)]
    return "\n".join([*lines, "", f"proxies: {', '.join(KINDS)}"])


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=epilog(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", type=workload_list, metavar="NAME,...", help="these workloads only (default: all)")
    add("--proxies", type=kind_list, metavar="NAME,...", help="these proxies only (default: all)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds for each proxy (default: 3)")
    add("--seconds", type=int, default=4, metavar="N", help="length of a round, whole seconds (default: 4)")
    add("--quick", action="store_true", help="one round of one second: to see that it works, not how fast")
    add(
        "--es-proxy",
        action="append",
        type=Path,
        metavar="FILE",
        help="es_proxy.py to measure; more than once: side by side, named by file (default: this repository's)",
    )
    add(
        "--python",
        action="append",
        metavar="PATH",
        help="interpreter for es-proxy and the relay; more than once: side by side (default: the one that runs this)",
    )
    add("--json", type=Path, metavar="FILE", default=ROOT / "build" / "bench.json", help="default: build/bench.json")
    add("--chart", type=Path, metavar="FILE", default=ROOT / "build" / "bench.svg", help="default: build/bench.svg")
    return parser


def distinct(names: Sequence[Path]) -> list[str]:
    """File names, with as many parent directories as it takes to tell them apart."""
    paths = [path.absolute() for path in names]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def contenders(kinds: Sequence[str], files: Sequence[Path], pythons: Sequence[str]) -> list[Contender]:
    """The rows of every table. Raises FailedError when an es_proxy.py doesn't even show its help."""
    file_names = distinct(files)
    python_names = distinct([Path(python) for python in pythons])
    out = []
    for kind in kinds:
        if kind not in ES_PROXY_KINDS:
            out.append(Contender(kind, kind, python=pythons[0]))
            continue
        for file, file_name in zip(files, file_names, strict=True):
            for python, python_name in zip(pythons, python_names, strict=True):
                label = kind + (f":{file_name}" if len(files) > 1 else "")
                label += f":{python_name}" if len(pythons) > 1 else ""
                out.append(Contender(label, kind, file, python, help_of(python, file)))
    return out


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; adds `workloads` and `contenders`."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds are at least 1")
    if options.quick:
        options.rounds = options.seconds = 1
    files = [file.resolve() for file in options.es_proxy or [ROOT / "es_proxy.py"]]
    pythons = [shutil.which(python) or python for python in options.python or [sys.executable]]
    kinds = [kind for kind in KINDS if not options.proxies or kind in options.proxies]
    options.workloads = [workload for workload in WORKLOADS if not options.only or workload.name in options.only]
    try:
        options.contenders = contenders(kinds, files, pythons)
    except FailedError as error:
        parser.error(str(error))
    return options


def version_of(tool: str) -> str:
    """The first line that has a number in it; empty when the tool isn't there."""
    try:
        argv = [which(tool), VERSION_OPTION[tool]]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=GRACE_SECONDS)
    except (MissingError, OSError, subprocess.SubprocessError):
        return ""
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"[0-9]\.[0-9]", line)), "")


def processor() -> str:
    """Its name."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def describe(stage: Stage, upstreams: Upstreams, options: argparse.Namespace) -> dict[str, object]:
    """What was measured where, when and how."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["bench/bench.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "processor": processor(),
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "cores": {"proxy": sorted(stage.cores.proxy), "load": sorted(stage.cores.load), "two": sorted(stage.cores.two)},
        "upstream": upstreams.name,
        "versions": {tool: version for tool in VERSION_OPTION if (version := version_of(tool))},
        "pythons": sorted({python_version(entry.python) for entry in options.contenders}),
    }


def python_version(python: str) -> str:
    """Of an interpreter."""
    argv = [python, "-c", "import sys; print(sys.version.replace(chr(10), ' '))"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=GRACE_SECONDS, check=False).stdout.strip()


def write(path: Path, text: str) -> None:
    """A file and the directory it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    print(f"written: {os.path.relpath(path)}")


def publish(results: Sequence[Result], about: dict[str, object], options: argparse.Namespace) -> None:
    """The promises on the screen, everything in the files."""
    print(report.floor_table(results))
    whole = {**about, "floors": report.floors(results), "workloads": report.as_json(results)}
    write(options.json, json.dumps(whole, indent=1) + "\n")
    subtitle = f"{about['date']}, {about['processor']}: median of rounds ({options.rounds}) of {options.seconds} s"
    write(options.chart, chart.draw(results, subtitle))


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """A polite end is the same as Ctrl-C."""
    del number, frame
    raise KeyboardInterrupt


def measure(options: argparse.Namespace) -> int:
    """Everything; returns the exit status."""
    results: list[Result] = []
    with Stage(Cores.of_this_machine()) as stage:
        stage.write_bodies()
        upstreams = Upstreams(stage, ROOT / "mock_es.py")
        about = describe(stage, upstreams, options)
        print(f"{about['date']}  {about['processor']}, {about['processors']} cores, upstream {upstreams.name}")
        bench = Bench(stage, upstreams, options)
        try:
            for workload in options.workloads:
                results.append(bench.run(workload))
                print(report.table(results[-1]), flush=True)
        except KeyboardInterrupt:
            tell("")
            print("\ninterrupted: ending what runs")
            return 130
        finally:
            if results:
                publish(results, about, options)
    return 1 if any(row.problems() for result in results for row in result.rows) else 0


def main() -> int:
    """Run what the command line asks for."""
    options = parse_args()
    if not sys.platform.startswith("linux"):
        print("bench.py needs Linux: it pins processes to cores and reads /proc", file=sys.stderr)
        return 2
    for number in ENDING:  # SIGINT too: a shell starts what runs in the background with that one ignored
        signal.signal(number, interrupt)
    try:
        return measure(options)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
