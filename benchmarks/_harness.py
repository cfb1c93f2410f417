"""What the benchmarks share: alternating rounds, medians, tables and JSON.

What: times contestants turn by turn in one run, so that a busy neighbour meets all of them; says on
which machine and commit.
Who calls: the other files here.
May touch: the clock, git, files named by `--json`.
Invariants: a ratio is taken between medians of one run; the spread is that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the rounds gave for one contestant."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        """Median and spread, and all that was measured."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "rounds": list(self.values),
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One figure: ours beside theirs, higher is better."""

    name: str
    ours: Samples
    theirs: Samples
    #: Whose figure `theirs` is.
    rival: str
    unit: str
    #: The ratio to reach.
    target: float

    @property
    def ratio(self) -> float:
        """Ours over theirs, of medians."""
        return self.ours.median / self.theirs.median

    @property
    def met(self) -> bool:
        """Whether the ratio reaches its target."""
        return self.ratio >= self.target

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each round; how far the ratio is to be trusted."""
        return tuple(a / b for a, b in zip(self.ours.values, self.theirs.values, strict=True))

    def row(self) -> list[str]:
        """Its line of a table."""
        return [
            self.name,
            f"{show(self.ours.median)} {self.unit}",
            f"{show(self.theirs.median)} {self.unit}",
            self.rival,
            f"{self.ratio:.1f} x",
            f"{min(self.ratios):.1f} .. {max(self.ratios):.1f}",
            f"{self.target:g} x",
            "yes" if self.met else "NO",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything about it."""
        return {
            "unit": self.unit,
            "rival": self.rival,
            "ours": self.ours.as_json(),
            "theirs": self.theirs.as_json(),
            "ratio": self.ratio,
            "round_ratios": list(self.ratios),
            "target": self.target,
            "met": self.met,
        }


COMPARISON_HEAD = ["figure", "poolray", "rival", "", "ratio", "of rounds", "target", "met"]


def alternate(
    rounds: int, contestants: dict[str, Callable[[], float]], warm_up: bool = True
) -> dict[str, Samples]:
    """Run each contestant once per round; who begins changes from round to round."""
    values: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    if warm_up:
        for run in contestants.values():
            run()
    for _ in range(rounds):
        for name in order:
            values[name].append(contestants[name]())
        order.append(order.pop(0))
    return {name: Samples(tuple(found)) for name, found in values.items()}


def rate(count: int, run: Callable[[], object]) -> float:
    """How many a second, when `run` does `count` of them."""
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


def show(value: float) -> str:
    """A number with three significant digits, or all of its whole ones."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns, aligned; numbers to the right would be nicer for some, but units differ."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for index, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    """Where this runs, as far as figures depend on it."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_average": list(os.getloadavg()),
        "switch_interval_s": sys.getswitchinterval(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that was measured, marked when files differ from it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=_positive, default=rounds, help=f"default {rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--ray-python",
        metavar="PATH",
        default=sys.executable if _has_ray() else None,
        help="a Python that has Ray, to compare with; default: this one, if it has",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _has_ray() -> bool:
    import importlib.util

    return importlib.util.find_spec("ray") is not None


def write_json(path: Path | None, benchmark: str, figures: dict[str, Any]) -> None:
    """Keep what was measured, with where and what of."""
    if path is None:
        return
    record = {
        "benchmark": benchmark,
        "commit": commit(),
        "machine": machine(),
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "figures": figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")
