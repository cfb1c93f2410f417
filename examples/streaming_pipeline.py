"""Read, parse and measure thousands of source files in a pipeline whose stages run at once.

    python examples/streaming_pipeline.py                     # the standard library's own sources
    python examples/streaming_pipeline.py ~/project --lanes 4 --ahead 8

Each stage is a remote generator that iterates over the one before it:

    read ──batches of files──▶ parse ──facts about functions──▶ this program
    read ──batches of files──▶ parse ──facts about functions──▶      "

A lane is one such chain, for its share of the files. Back-pressure keeps every stage at most
`--ahead` items in front of the next, so memory stays small however large the folder is: the program
says how many batches the readers were ahead at the most. At the end it does the same work in a
plain loop and compares.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import poolray

FOLDERS_LEFT_OUT = {"__pycache__", "site-packages", "node_modules"}
BATCH_BYTES = 256 * 1024
LONGEST_SHOWN = 5

#: Path and text of some files.
Batch = list[tuple[str, str]]


@dataclass(frozen=True, order=True)
class Function:
    """A function's size and place; more lines are greater."""

    lines: int
    path: str
    name: str


@dataclass
class Facts:
    """What is known of some files; facts can be added up in any order."""

    files: int = 0
    unreadable: int = 0
    lines: int = 0
    functions: int = 0
    documented: int = 0
    longest: list[Function] = field(default_factory=list)

    def add(self, other: Facts) -> None:
        """Take in what is known of other files."""
        self.files += other.files
        self.unreadable += other.unreadable
        self.lines += other.lines
        self.functions += other.functions
        self.documented += other.documented
        self.longest = sorted(self.longest + other.longest, reverse=True)[:LONGEST_SHOWN]


def find_sources(folder: Path) -> list[str]:
    """Paths of the Python files below a folder, in order."""
    return sorted(
        str(path)
        for path in folder.rglob("*.py")
        if not FOLDERS_LEFT_OUT.intersection(path.relative_to(folder).parts) and path.is_file()
    )


def batches(paths: list[str]) -> Iterator[Batch]:
    """Files in batches of about the same size."""
    batch: Batch = []
    size = 0
    for path in paths:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        batch.append((path, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def examine(batch: Batch) -> Facts:
    """Parse the files of a batch and measure their functions."""
    facts = Facts()
    for path, text in batch:
        facts.files += 1
        facts.lines += text.count("\n")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # files that tests keep because they are wrong
            facts.unreadable += 1
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                facts.functions += 1
                facts.documented += ast.get_docstring(node, clean=False) is not None
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                facts.longest.append(Function(length, path, node.name))
    facts.longest = sorted(facts.longest, reverse=True)[:LONGEST_SHOWN]
    return facts


# ---- the same as stages --------------------------------------------------------------------------


@poolray.remote
class Gauge:
    """How many batches were read and not examined, at the most."""

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0

    def change(self, by: int) -> None:
        """A batch was read (1) or examined (-1)."""
        self.waiting += by
        self.most = max(self.most, self.waiting)

    def look(self) -> int:
        """The largest number so far."""
        return self.most


def read(paths: list[str], gauge: Any) -> Iterator[Batch]:
    """First stage: batches of files."""
    for batch in batches(paths):
        poolray.get(gauge.change.remote(1))
        yield batch


def parse(paths: list[str], ahead: int, gauge: Any) -> Iterator[Facts]:
    """Second stage: starts a first one of its own, and works on what that yields."""
    reader = poolray.remote(read).options(_generator_backpressure_num_objects=ahead)
    for ref in reader.remote(paths, gauge):
        facts = examine(poolray.get(ref))
        gauge.change.remote(-1)
        yield facts


def run_lanes(paths: list[str], lanes: int, ahead: int) -> tuple[Facts, int]:
    """Facts of all files, and how many batches were ahead at the most."""
    gauge = Gauge.remote()
    parser = poolray.remote(parse).options(_generator_backpressure_num_objects=ahead)
    open_lanes = [parser.remote(paths[lane::lanes], ahead, gauge) for lane in range(lanes)]
    total = Facts()
    while open_lanes:
        ready, _ = poolray.wait(open_lanes)
        for lane in ready:
            try:
                total.add(poolray.get(next(lane)))
            except StopIteration:
                open_lanes.remove(lane)
    return total, poolray.get(gauge.look.remote())


def run_loop(paths: list[str]) -> Facts:
    """The same in one process."""
    total = Facts()
    for batch in batches(paths):
        total.add(examine(batch))
    return total


def main() -> int:
    """Run both, compare, and say what was found."""
    parser = argparse.ArgumentParser(description="Measure the functions of source files.")
    standard_library = sysconfig.get_paths()["stdlib"]
    parser.add_argument("folder", type=Path, nargs="?", default=Path(standard_library))
    parser.add_argument("--lanes", type=int, default=2, help="chains of stages")
    parser.add_argument("--ahead", type=int, default=4, help="items that a stage may be ahead")
    options = parser.parse_args()
    if options.lanes < 1 or options.ahead < 1:
        parser.error("--lanes and --ahead are at least 1")
    paths = find_sources(options.folder)
    if not paths:
        parser.error(f"no Python files below {options.folder}")

    # A stage that waits for the one before lends its CPU to others.
    poolray.init(num_cpus=options.lanes)
    started = time.perf_counter()
    streamed, most = run_lanes(paths, options.lanes, options.ahead)
    streamed_s = time.perf_counter() - started
    poolray.shutdown()
    started = time.perf_counter()
    looped = run_loop(paths)
    looped_s = time.perf_counter() - started

    print(f"{streamed.files} files, {streamed.lines} lines, {streamed.unreadable} with errors")
    print(f"{streamed.functions} functions, {streamed.documented} of them with a docstring")
    for function in streamed.longest:
        print(f"{function.lines:7} lines  {function.name}  {function.path}")
    print(f"pipeline of {options.lanes} lanes: {streamed_s:.2f} s; plain loop: {looped_s:.2f} s")
    print(f"at most {most} batches were read and not yet examined")
    # Each lane has `ahead` batches waiting, one being read and one being examined.
    limit = options.lanes * (options.ahead + 2)
    if streamed != looped or most > limit:
        print("the pipeline and the loop do not agree", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
