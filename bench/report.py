"""From samples to medians, ratios, tables and promises."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workloads import ES_PROXY_KINDS, FLOORS, Floor, Workload

REFERENCE = "nginx"
RATIOS = ("rate", "p50_ms", "p99_ms", "cpu_us")
NOISE_PERCENT = 10.0  # of the cores in use taken by others: such a round says little
FULL_PERCENT = 95.0  # of the load's cores: then it is the load generator that limits


@dataclass
class Sample:
    """One proxy, one round."""

    requests: int
    seconds: float
    rate: float  # requests/s, or MB/s where that says more
    p50_ms: float
    p99_ms: float
    max_ms: float
    errors: int
    cpu_us: float  # processor time of the proxy for each request
    rss_mib: float  # resident memory right after
    load_percent: float  # of their cores: what load and upstream used
    others_percent: float  # of all cores in use: what none of ours used
    recorded: int | None = None  # request records in es-proxy's log
    idle_more_mib: float | None = None  # memory that the idle connections take
    idle_rate_ratio: float | None = None  # rate beside them, to the rate without them
    problems: list[str] = field(default_factory=list)  # with the records


@dataclass
class Row:
    """One proxy in one workload: medians, and their ratios to nginx's."""

    label: str
    kind: str
    start_mib: float
    samples: list[Sample] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def settle(self) -> None:
        """Work out the medians."""
        self.figures = {"start_mib": self.start_mib}
        for name in (item.name for item in dataclasses.fields(Sample) if item.name != "problems"):
            values = [value for sample in self.samples if (value := getattr(sample, name)) is not None]
            if values:
                self.figures[name] = max(values) if name == "errors" else statistics.median(values)

    def problems(self) -> list[str]:
        """Everything that was wrong with the records."""
        return [text for sample in self.samples for text in sample.problems]


@dataclass
class Result:
    """One workload."""

    workload: Workload
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # label: why
    remarks: list[str] = field(default_factory=list)  # what the figures don't say

    def settle(self) -> None:
        """Work out medians and ratios."""
        for row in self.rows:
            row.settle()
        reference = self.row(REFERENCE)
        for row in self.rows if reference else ():
            row.ratios = {name: ratio for name in RATIOS if (ratio := self.ratio(row, reference, name)) is not None}

    def row(self, kind: str) -> Row | None:
        """The first of that kind."""
        return next((row for row in self.rows if row.kind == kind and row.samples), None)

    @staticmethod
    def ratio(row: Row, other: Row | None, figure: str) -> float | None:
        """Of two medians; None where there is none."""
        if other is None or not other.figures.get(figure) or figure not in row.figures:
            return None
        return row.figures[figure] / other.figures[figure]


def number(value: float | None) -> str:
    """Three significant digits, thousands set apart."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def rate_unit(workload: Workload) -> str:
    """What `rate` counts."""
    return "MB/s" if workload.bulk else "requests/s"


def cells(row: Row) -> list[str]:
    """A line of the table."""
    get, ratio = row.figures.get, row.ratios.get
    return [
        row.label,
        number(get("rate")),
        number(ratio("rate")),
        number(get("p50_ms")),
        number(get("p99_ms")),
        number(ratio("p99_ms")),
        number(get("cpu_us") or None),
        number(ratio("cpu_us") or None),
        number(get("rss_mib") or None),
        f"{get('errors', 0):.0f}",
        f"{get('load_percent', 0):.0f} %",
        notes(row),
    ]


def notes(row: Row) -> str:
    """What else is to be said about a row."""
    said = []
    if row.kind in ES_PROXY_KINDS:
        said.append(f"RECORDS WRONG: {row.problems()[0]}" if row.problems() else "records ok")
    if "idle_more_mib" in row.figures and row.kind != "direct":
        said.append(f"idle: +{number(row.figures['idle_more_mib'])} MiB")
    if "idle_rate_ratio" in row.figures:
        said.append(f"x {number(row.figures['idle_rate_ratio'])} of its rate without them")
    if row.figures.get("others_percent", 0) > NOISE_PERCENT:
        said.append(f"noise: others used {row.figures['others_percent']:.0f} % of the cores")
    if row.figures.get("load_percent", 0) > FULL_PERCENT:
        said.append("the load limits")
    return "; ".join(said)


def aligned(lines: Sequence[Sequence[str]], left: Iterable[int]) -> list[str]:
    """Columns under each other; those in `left` are not numbers."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    flush = set(left)
    out = []
    for line in lines:
        parts = (
            cell.ljust(width) if column in flush else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        out.append("  ".join(parts).rstrip())
    return out


def table(result: Result) -> str:
    """One workload for people."""
    head = ["", rate_unit(result.workload), "x nginx", "p50 ms", "p99 ms", "x nginx", "CPU us/request", "x nginx"]
    head += ["RSS MiB", "errors", "load core", ""]
    lines = [f"\n{result.workload.name}: {result.workload.title}"]
    if result.rows:
        lines += aligned([head, *(cells(row) for row in result.rows)], left=(0, len(head) - 1))
    lines += [f"  note: {text}" for text in (result.workload.remark, *result.remarks) if text]
    lines += [f"  left out: {label}: {why}" for label, why in result.left_out.items()]
    return "\n".join(lines)


def judge(floor: Floor, results: Sequence[Result]) -> float | None:
    """What was measured of a promise; None: nothing."""
    result = next((result for result in results if result.workload.name == floor.workload), None)
    row = result.row(floor.kind) if result else None
    if result is None or row is None:
        return None
    if not floor.against:
        return row.figures.get(floor.figure)
    return result.ratio(row, result.row(floor.against), floor.figure)


def floors(results: Sequence[Result]) -> list[dict[str, str | float | bool | None]]:
    """Every promise with what was measured."""
    out: list[dict[str, str | float | bool | None]] = []
    for floor in FLOORS:
        value = judge(floor, results)
        kept = None if value is None else (value >= floor.bound if floor.at_least else value <= floor.bound)
        out.append({**dataclasses.asdict(floor), "measured": value, "kept": kept})
    return out


def floor_table(results: Sequence[Result]) -> str:
    """The promises for people; those that were not measured are left out."""
    lines = [["workload", "figure", "bound", "measured", ""]]
    for floor, judged in zip(FLOORS, floors(results), strict=True):
        if judged["kept"] is None:
            continue
        against = f" x {floor.against}" if floor.against else ""
        bound = f"{'>=' if floor.at_least else '<='} {floor.bound:g}{against}"
        measured = judged["measured"]
        assert isinstance(measured, float | int)
        lines.append([floor.workload, floor.figure, bound, number(measured), "kept" if judged["kept"] else "NOT KEPT"])
    if len(lines) == 1:
        return ""
    return "\nPromises of es-proxy\n" + "\n".join(aligned(lines, left=(0, 1, 2, 4)))


def as_json(results: Sequence[Result]) -> list[dict[str, object]]:
    """All of it."""
    out: list[dict[str, object]] = []
    for result in results:
        workload = {**dataclasses.asdict(result.workload), "unit": rate_unit(result.workload)}
        rows = [dataclasses.asdict(row) for row in result.rows]
        out.append({"workload": workload, "rows": rows, "left_out": result.left_out, "remarks": result.remarks})
    return out
