"""How many items of a generator arrive in a second? Beside Ray.

    python -m benchmarks.generators [--ray PYTHON] [--rounds N]

What: the same program on poolray and, in an interpreter that has it, on Ray, in turns within one
run. Prints a line of JSON: medians in items a second, and their ratios.
Who calls: by hand.
May touch: processes.
Invariants: both sides run this very file, so they do the same; a round times each side once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ITEMS = 5000
LARGE_ITEMS = 200
LARGE_BYTES = 1 << 20
SMALL_STREAMS = 100


def make_cases(ray: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> what to run, and the items that it reads."""

    @ray.remote
    def count(n: int) -> Iterator[int]:
        for number in range(n):  # noqa: UP028 - Ray takes generators only
            yield number

    @ray.remote
    def blocks(n: int, size: int) -> Iterator[bytes]:
        block = bytes(size)
        for _ in range(n):
            yield block

    @ray.remote
    def total(n: int) -> int:
        return sum(ray.get(ref) for ref in count.remote(n))

    class Source:
        def count(self, n: int) -> Iterator[int]:
            for number in range(n):  # noqa: UP028 - Ray takes generators only
                yield number

    class AsyncSource:
        async def count(self, n: int) -> Any:
            for number in range(n):
                yield number

    source, async_source = ray.remote(Source).remote(), ray.remote(AsyncSource).remote()
    limited = count.options(_generator_backpressure_num_objects=16)

    def read(generator: Any) -> None:
        for ref in generator:
            ray.get(ref)

    return {
        "items": (lambda: read(count.remote(ITEMS)), ITEMS),
        "refs_only": (lambda: list(count.remote(ITEMS)), ITEMS),
        "in_a_task": (lambda: ray.get(total.remote(ITEMS)), ITEMS),
        "back_pressure_16": (lambda: read(limited.remote(ITEMS // 5)), ITEMS // 5),
        "actor": (lambda: read(source.count.remote(ITEMS)), ITEMS),
        "async_actor": (lambda: read(async_source.count.remote(ITEMS)), ITEMS),
        "large_items": (lambda: read(blocks.remote(LARGE_ITEMS, LARGE_BYTES)), LARGE_ITEMS),
        "short_streams": (lambda: [read(count.remote(1)) for _ in range(100)], SMALL_STREAMS),
    }


def serve(module: str) -> None:
    """One side: run the case that each line names, answer with items a second."""
    answers = os.fdopen(os.dup(1), "w")  # Ray prints to standard output
    os.dup2(2, 1)
    ray: Any = importlib.import_module(module)
    quiet = {"include_dashboard": False, "logging_level": "error"} if module == "ray" else {}
    ray.init(num_cpus=4, **quiet)
    cases = make_cases(ray)
    for work, _ in cases.values():
        work()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        work, items = cases[line.strip()]
        started = time.perf_counter()
        work()
        print(items / (time.perf_counter() - started), file=answers, flush=True)
    ray.shutdown()


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, python: str, module: str) -> None:
        root = Path(__file__).resolve().parents[1]
        self._process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--side", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled"},
        )
        if not self._read():
            raise SystemExit(f"{module} did not start: does {python} have it?")

    def _read(self) -> str:
        output: IO[str] = self._process.stdout  # type: ignore[assignment]
        return output.readline().strip()

    def rate(self, case: str) -> float:
        """Items a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", metavar="PYTHON", help="an interpreter that has Ray")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side)
        return
    sides = {"poolray": Side(sys.executable, "poolray")}
    if options.ray:
        sides["ray"] = Side(options.ray, "ray")
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    names = ["items", "refs_only", "in_a_task", "back_pressure_16", "actor", "async_actor"]
    names += ["large_items", "short_streams"]
    for _ in range(options.rounds):
        for case in names:
            for name, side in sides.items():
                rates[name].setdefault(case, []).append(side.rate(case))
    for side in sides.values():
        side.close()
    report: dict[str, Any] = {
        name: {case: round(statistics.median(found)) for case, found in cases.items()}
        for name, cases in rates.items()
    }
    if options.ray:
        report["ratio"] = {c: round(report["poolray"][c] / report["ray"][c], 1) for c in names}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
