"""Whether es-proxy's log holds what it must after a round of load. Written from the format's description, not its code.

Every request record has its response record, later and under the same id, and no id comes twice; what is recorded is
what was sent; nothing reached the upstream unrecorded; nothing was recorded that nobody sent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SETTLE_SECONDS = 10.0  # that the last responses have to be recorded after the load is gone
QUIET_SECONDS = 0.2
USER = "bench"
TEXT = re.compile(
    rb"\S+Z ID: (?P<id>[0-9a-f-]{36}) User: (?P<user>\S*) Path: (?P<path>\S*) Query: (?P<query>\S*)"
    rb" Method: (?P<method>\S*) Source: (?P<source>\S*) Agent: (?P<agent>.*?)"
    rb" (?:Body: (?P<body>[A-Za-z0-9+/=]*)|Status: (?P<status>[0-9]{3}) Duration: [0-9.]+s Size: (?P<size>[0-9]+))"
    rb"(?P<marks>(?: [A-Z][A-Za-z0-9-]*: \S+)*)\n"
)
EVENT = re.compile(rb"\S+Z Event: (\S+)")


@dataclass(slots=True)
class Record:
    """One line, in either form."""

    id: str
    user: str
    path: str
    query: str
    method: str
    body: bytes | None = None  # base64; None in a response
    status: int = 0
    size: int = 0
    marks: str = ""


@dataclass(frozen=True)
class Expected:
    """What the load did."""

    method: str
    path: str
    body: bytes
    answered: int  # by the load generator's count
    cut_off: int  # at most: connections that it closed in the middle, and its errors
    forwarded: int | None  # by the upstream's count, where it counts
    size: int | None  # of each response's body, where it is known


@dataclass
class Found:
    """What the log says."""

    requests: int = 0
    responses: int = 0
    answered: int = 0  # responses with status 200 and nothing odd
    forwarded: int = 0  # requests that weren't rejected
    ids: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)  # those without a response record
    problems: Counter[str] = field(default_factory=Counter)


def parse_text(line: bytes) -> Record | None:
    """A record of the text form; None: an event of the log itself. Raises ValueError: neither."""
    match = TEXT.fullmatch(line)
    if match is None:
        if EVENT.match(line):
            return None
        raise ValueError("neither record nor event")
    words = {name: (value or b"").decode("ascii") for name, value in match.groupdict().items() if name != "body"}
    return Record(
        id=words["id"],
        user=words["user"],
        path=words["path"],
        query=words["query"],
        method=words["method"],
        body=match["body"],
        status=int(words["status"] or 0),
        size=int(words["size"] or 0),
        marks=words["marks"],
    )


def ecs_body(event: dict[str, object]) -> bytes:
    """The body in an ECS event, as base64."""
    text = event.get("http.request.body.content")
    if isinstance(text, str):
        return base64.b64encode(text.encode())
    return str(event.get("es_proxy.request.body.base64", "")).encode()


def parse_ecs(line: bytes) -> Record | None:
    """A record of the ECS form; None: an event of the log itself. Raises ValueError: neither."""
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("no object")
    if "http.request.id" not in event:
        return None
    is_request = event.get("event.action") == "http-request"
    return Record(
        id=str(event["http.request.id"]),
        user=str(event.get("user.name", "")),
        path=str(event.get("url.path", "")),
        query=str(event.get("url.query", "None")),
        method=str(event.get("http.request.method", "")),
        body=ecs_body(event) if is_request else None,
        status=int(event.get("http.response.status_code", 0)),
        size=int(event.get("http.response.body.bytes", 0)),
        marks=str(event.get("event.reason", "")),
    )


class Checker:
    """Reads one log round by round."""

    def __init__(self, log: Path, form: str) -> None:
        self._log = log
        self._parse = parse_ecs if form == "ecs" else parse_text
        self._offset = 0

    def settle(self) -> None:
        """Wait until nothing is written any more, so that the upstream's count is final too."""
        deadline = time.monotonic() + SETTLE_SECONDS
        size = -1
        while size != (now := self._log.stat().st_size) and time.monotonic() < deadline:
            size = now
            time.sleep(QUIET_SECONDS)

    def skip(self) -> None:
        """Leave out what has been written so far."""
        self._read(Expected("", "", b"", 0, 0, None, None))

    def check(self, expected: Expected) -> tuple[Found, list[str]]:
        """What was written since the last call, and everything that is wrong with it."""
        found = self._read(expected)
        problems = [f"{text} ({count} times)" for text, count in found.problems.items()]
        if found.open:
            problems.append(f"{len(found.open)} requests without a response record")
        if not expected.answered <= found.answered <= expected.answered + expected.cut_off:
            problems.append(f"{found.answered} answers recorded, {expected.answered} received")
        if found.requests > expected.answered + expected.cut_off:
            problems.append(f"{found.requests} requests recorded, about {expected.answered} sent")
        if expected.forwarded is not None:
            if expected.forwarded > found.forwarded:
                problems.append(f"{expected.forwarded} requests upstream, {found.forwarded} recorded")
            elif found.forwarded - expected.forwarded > expected.cut_off:
                problems.append(f"{found.forwarded} requests recorded, {expected.forwarded} upstream")
        return found, problems

    def _read(self, expected: Expected) -> Found:
        found = Found()
        encoded = base64.b64encode(expected.body)
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            grown = self._read_more(found, expected, encoded)
            if not grown and (not found.open or time.monotonic() > deadline):
                return found
            time.sleep(0.05)

    def _read_more(self, found: Found, expected: Expected, encoded: bytes) -> bool:
        before = self._offset
        with open(self._log, "rb") as log:
            log.seek(before)
            for line in log:
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._offset += len(line)
                self._count(line, found, expected, encoded)
        return self._offset > before

    def _count(self, line: bytes, found: Found, expected: Expected, encoded: bytes) -> None:
        try:
            record = self._parse(line)
        except ValueError:
            found.problems["a line that is no record"] += 1
            return
        if record is None:
            return
        if record.body is not None:
            self._count_request(record, found, encoded)
        else:
            self._count_response(record, found, expected)
        if expected.method:
            found.problems.update(faults(record, expected))

    @staticmethod
    def _count_request(record: Record, found: Found, encoded: bytes) -> None:
        found.requests += 1
        found.forwarded += "Rejected:" not in record.marks
        if record.id in found.ids:
            found.problems["an id that comes twice"] += 1
        found.ids.add(record.id)
        found.open.add(record.id)
        if encoded and record.body != encoded:
            found.problems["another body recorded than sent"] += 1
        if found.requests == 1 and encoded and record.body is not None and not same(record.body, encoded):
            found.problems["a body that doesn't decode to what was sent"] += 1

    @staticmethod
    def _count_response(record: Record, found: Found, expected: Expected) -> None:
        found.responses += 1
        if record.id not in found.open:
            found.problems["a response record without its request"] += 1
        found.open.discard(record.id)
        if record.status == 200 and "Error:" not in record.marks and "Sent:" not in record.marks:
            found.answered += 1
            if expected.size is not None and record.size != expected.size:
                found.problems["another size recorded than sent"] += 1


def same(left: bytes, right: bytes) -> bool:
    """Whether both decode to the same bytes."""
    try:
        digests = {hashlib.sha256(base64.b64decode(part, validate=True)).digest() for part in (left, right)}
    except binascii.Error:
        return False
    return len(digests) == 1


def faults(record: Record, expected: Expected) -> list[str]:
    """Fields that differ from what was sent."""
    path, _, query = expected.path.partition("?")
    wanted = {"user": USER, "path": path, "query": query or "None", "method": expected.method}
    return [f"another {name} recorded than sent" for name, value in wanted.items() if getattr(record, name) != value]
