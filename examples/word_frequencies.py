"""Count the words of thousands of files, four ways, and check that all four agree.

    python examples/word_frequencies.py                    # the standard library's own files
    python examples/word_frequencies.py ~/notes --workers 4

The work is `count_file`, an ordinary function. Around it stand four ways to apply it to every file:
a loop, `Pool.imap_unordered`, `Executor.submit` and plain tasks. Each starts from nothing, so its
time includes the start of its workers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import poolray
from poolray import Executor, Pool

WORD = re.compile(r"[A-Za-z_]\w*")
LONGEST_KEPT = 5
WORDS_SHOWN = 10
# Enough tasks in flight to keep every worker busy, few enough that finished reports do not pile up.
IN_FLIGHT_PER_WORKER = 16
FOLDERS_LEFT_OUT = {"__pycache__", "site-packages", "node_modules"}


@dataclass(frozen=True, order=True)
class Line:
    """A line's place and length; longer is greater, then later in the alphabet of paths."""

    length: int
    path: str
    number: int


@dataclass
class Report:
    """What is known about one file, or about all files seen so far: reports can be added up."""

    words: Counter[str] = field(default_factory=Counter)
    longest: list[Line] = field(default_factory=list)
    size_bytes: int = 0
    files: int = 0
    skipped: int = 0

    def add(self, other: Report) -> None:
        """Take in another report. The order in which reports arrive does not show in the sum."""
        self.words.update(other.words)
        self.longest = sorted(self.longest + other.longest, reverse=True)[:LONGEST_KEPT]
        self.size_bytes += other.size_bytes
        self.files += other.files
        self.skipped += other.skipped


def count_file(path: str) -> Report:
    """Count one file's words and find its longest lines; skip it if binary or unreadable."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return Report(skipped=1)
    if b"\0" in content[:8192]:
        return Report(skipped=1)
    text = content.decode("utf-8", errors="replace")
    lines = [Line(len(line), path, n) for n, line in enumerate(text.split("\n"), start=1)]
    return Report(
        words=Counter(WORD.findall(text)),
        longest=sorted(lines, reverse=True)[:LONGEST_KEPT],
        size_bytes=len(content),
        files=1,
    )


# Four ways to do it


def with_a_loop(paths: list[str], options: argparse.Namespace) -> Iterator[Report]:
    """One after the other, in this process."""
    return map(count_file, paths)


def with_pool(paths: list[str], options: argparse.Namespace) -> Iterator[Report]:
    """As with `multiprocessing.Pool`; small tasks need no `chunksize`."""
    with Pool(options.workers, **where(options)) as pool:
        yield from pool.imap_unordered(count_file, paths)


def with_executor(paths: list[str], options: argparse.Namespace) -> Iterator[Report]:
    """As with `ProcessPoolExecutor`; the futures are the standard ones."""
    with Executor(options.workers, **where(options)) as executor:
        for future in as_completed([executor.submit(count_file, path) for path in paths]):
            yield future.result()


def with_tasks(paths: list[str], options: argparse.Namespace) -> Iterator[Report]:
    """Tasks and object refs, a window of them in flight, reports taken as they become ready."""
    poolray.init(**(where(options) or {"num_cpus": options.workers}))
    count = poolray.remote(count_file)
    waiting = iter(paths)
    pending: list[Any] = []
    while True:
        for path in waiting:
            pending.append(count.remote(path))
            if len(pending) >= options.workers * IN_FLIGHT_PER_WORKER:
                break
        if not pending:
            return
        ready, pending = poolray.wait(pending, num_returns=1)
        yield from poolray.get(ready)


WAYS: dict[str, Callable[[list[str], argparse.Namespace], Iterator[Report]]] = {
    "a plain loop": with_a_loop,
    "Pool.imap_unordered": with_pool,
    "Executor.submit": with_executor,
    "f.remote and wait": with_tasks,
}


def where(options: argparse.Namespace) -> dict[str, Any]:
    """The cluster to work on, as keyword arguments: none means this machine."""
    address = options.address or os.environ.get("POOLRAY_ADDRESS")
    return {"address": address} if address else {}


# Files in, tables out


def find_files(folder: Path) -> list[str]:
    """Every file below a folder, in a fixed order, without caches, packages and hidden folders."""
    found: list[str] = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in FOLDERS_LEFT_OUT and not name.startswith(".")
        )
        paths = (os.path.join(base, name) for name in sorted(names))
        found += [path for path in paths if os.path.isfile(path)]
    return found


def bring_into_memory(paths: list[str]) -> None:
    """Read every file once: else the first way would be the only one to wait for the disk."""
    for path in paths:
        with contextlib.suppress(OSError):
            Path(path).read_bytes()


class Progress:
    """A bar on standard error that redraws itself; silent where nobody watches a terminal."""

    WIDTH = 30
    REDRAW_AFTER_S = 0.05

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.visible = sys.stderr.isatty()
        self.redraw_at_s = 0.0

    def step(self) -> None:
        self.done += 1
        if self.visible and (time.monotonic() >= self.redraw_at_s or self.done == self.total):
            self.redraw_at_s = time.monotonic() + self.REDRAW_AFTER_S
            bar = "#" * (self.WIDTH * self.done // self.total)
            text = f"{self.label:<20} [{bar:<{self.WIDTH}}] {self.done:,}/{self.total:,}"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def measure(label: str, paths: list[str], options: argparse.Namespace) -> tuple[Report, float]:
    """Run one way over all files; returns the sum of its reports and the seconds it took."""
    total, progress, started = Report(), Progress(label, len(paths)), time.perf_counter()
    try:
        for report in WAYS[label](paths, options):
            total.add(report)
            progress.step()
    finally:
        progress.clear()
        poolray.shutdown()
    return total, time.perf_counter() - started


def print_findings(report: Report, folder: Path) -> None:
    """What the files say."""
    print(
        f"{report.files:,} files, {report.size_bytes / 1e6:.1f} MB,"
        f" {report.words.total():,} words, {len(report.words):,} different"
        + (f" ({report.skipped:,} binary or unreadable files skipped)" if report.skipped else "")
    )
    # `most_common` breaks ties by arrival, which differs between ways and runs.
    ranked = sorted(report.words.items(), key=lambda item: (-item[1], item[0]))[:WORDS_SHOWN]
    print("\nmost frequent words")
    for word, count in ranked:
        print(f"  {count:>10,}  {word}")
    print("\nlongest lines, in characters")
    for line in report.longest:
        print(f"  {line.length:>10,}  {os.path.relpath(line.path, folder)}:{line.number}")


def print_times(seconds_by_way: dict[str, float], files: int) -> None:
    """How long each way took, beside the first of them."""
    serial_s = next(iter(seconds_by_way.values()))
    print(f"\n{'way':<20} {'seconds':>9} {'files/s':>9} {'speed-up':>9}")
    for label, seconds in seconds_by_way.items():
        print(f"{label:<20} {seconds:>9.2f} {files / seconds:>9,.0f} {serial_s / seconds:>8.2f}x")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count the words of many files, four ways.")
    parser.add_argument("folder", nargs="?", type=Path, help="default: the standard library")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--address", help="work on the cluster at this address")
    parser.add_argument("--limit", type=int, help="take no more than this many files")
    options = parser.parse_args(arguments)
    options.folder = options.folder or Path(sysconfig.get_paths()["stdlib"])
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.limit is not None and options.limit < 1:
        parser.error("--limit must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    paths = find_files(options.folder)[: options.limit]
    if not paths:
        print(f"There is no file to read below {options.folder}.", file=sys.stderr)
        return 2
    bring_into_memory(paths)
    outcomes = {label: measure(label, paths, options) for label in WAYS}
    expected, _ = next(iter(outcomes.values()))
    print_findings(expected, options.folder)
    print_times({label: seconds for label, (_, seconds) in outcomes.items()}, len(paths))
    wrong = [label for label, (report, _) in outcomes.items() if report != expected]
    if wrong:
        print(f"\nNOT the answer of the plain loop: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"\nAll {len(outcomes)} ways gave the same answer.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
