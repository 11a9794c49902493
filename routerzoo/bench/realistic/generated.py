"""Generated text: arithmetic, log lines, JSON records, markup and tables of numbers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

_WORDS = re.findall(
    r"\w+",
    "alpha amber atlas basin birch cedar cloud copper coral delta drift ember falcon fern garnet glade harbor hazel "
    "indigo iris jade kestrel lagoon larch maple meadow nickel oak onyx opal pearl pine quartz raven ridge river "
    "saffron slate spruce stone summit talon thorn timber umber vale violet willow",
)
_SERVICES = ("auth", "billing", "cache", "gateway", "indexer", "mailer", "scheduler", "storage")
_START = datetime(2026, 1, 1, tzinfo=UTC)


def arithmetic(rng: random.Random) -> Iterator[str]:
    """Sums, differences, products and remainders, one a line: `47 + 385 = 432`."""
    while True:
        a, b = rng.randrange(1, 10 ** rng.randrange(1, 4)), rng.randrange(1, 10 ** rng.randrange(1, 4))
        sign, result = rng.choice([("+", a + b), ("-", a - b), ("*", a * b), ("%", a % b)])
        yield f"{a} {sign} {b} = {result}\n"


def logs(rng: random.Random) -> Iterator[str]:
    """Log lines of a few services in the order of time, with levels, requests and addresses."""
    time = _START + timedelta(seconds=rng.randrange(10**7))
    while True:
        time += timedelta(milliseconds=int(rng.expovariate(1 / 700)) + 1)
        service, level = rng.choice(_SERVICES), rng.choices(("INFO", "DEBUG", "WARN", "ERROR"), (6, 3, 1, 1))[0]
        address = f"10.{rng.randrange(8)}.{rng.randrange(256)}.{rng.randrange(256)}"
        message = {
            "INFO": f"GET /{rng.choice(_WORDS)}/{rng.randrange(1000)} from {address} status=200 {rng.randrange(300)}ms",
            "DEBUG": f"cache hit key={rng.choice(_WORDS)}:{rng.getrandbits(24):06x}",
            "WARN": f"retry {rng.randrange(1, 5)} of 5 for {address}: timed out after {rng.randrange(1, 31)}s",
            "ERROR": f"connection to {address} refused; request {rng.getrandbits(32):08x} dropped",
        }[level]
        yield f"{time.isoformat(timespec='milliseconds')[:23]}Z {level:5} [{service}] {message}\n"


def records(rng: random.Random) -> Iterator[str]:
    """JSON objects with nested lists and objects, indented by two."""
    while True:
        record = {
            "id": rng.randrange(10**6),
            "name": f"{rng.choice(_WORDS)}-{rng.choice(_WORDS)}",
            "active": rng.random() < 0.7,
            "parent": None if rng.random() < 0.3 else rng.randrange(10**6),
            "tags": rng.sample(_WORDS, rng.randrange(4)),
            "position": {"x": round(rng.uniform(-90, 90), 3), "y": round(rng.uniform(-180, 180), 3)},
        }
        yield json.dumps(record, indent=2) + ",\n"


def markup(rng: random.Random) -> Iterator[str]:
    """Nested elements with attributes and a little text, as in a page's source."""
    while True:
        yield from _element(rng, rng.choice(("section", "table", "ul")), 0)


def _element(rng: random.Random, tag: str, depth: int) -> Iterator[str]:
    indent = "\t" * depth
    children = {"section": ("h2", "p", "ul"), "table": ("tr",), "ul": ("li",), "tr": ("td",)}.get(tag, ())
    shown = f' class="{rng.choice(_WORDS)}"' if rng.random() < 0.4 else ""
    if not children:
        words = " ".join(rng.choices(_WORDS, k=rng.randrange(1, 6)))
        text = f'<a href="#{rng.choice(_WORDS)}">{words}</a>' if rng.random() < 0.3 else words
        yield f"{indent}<{tag}{shown}>{text}</{tag}>\n"
        return
    yield f"{indent}<{tag}{shown}>\n"
    for _ in range(rng.randrange(1, 5)):
        yield from _element(rng, rng.choice(children), depth + 1)
    yield f"{indent}</{tag}>\n"


def tables(rng: random.Random) -> Iterator[str]:
    """Comma-separated readings of sensors: a station, a day, and values that walk at random."""
    walks = {station: [rng.uniform(0, 30), rng.uniform(20, 90), 1000.0] for station in rng.sample(_WORDS, 6)}
    day = _START + timedelta(days=rng.randrange(3000))
    while True:
        day += timedelta(days=1)
        for station, values in walks.items():
            for place, size in enumerate((1.5, 4.0, 2.0)):
                values[place] += rng.gauss(0, size)
            readings = ",".join(f"{value:.1f}" for value in values)
            yield f"{station.upper()},{day:%d/%m/%Y},{readings},{'' if rng.random() < 0.1 else rng.randrange(100)}\n"


GENERATED: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "arithmetic": arithmetic,
    "logs": logs,
    "json": records,
    "markup": markup,
    "tables": tables,
}
"""Endless text by the domain's name."""


def generated_bytes(name: str, size: int, seed: int) -> bytes:
    """Return the first `size` bytes of a generated domain's text."""
    pieces: list[bytes] = []
    length = 0
    for text in GENERATED[name](random.Random(seed)):
        pieces.append(text.encode())
        length += len(pieces[-1])
        if length >= size:
            break
    return b"".join(pieces)[:size]
