"""How long does a call of an actor take, one at a time and in bulk? Beside plain tasks and Ray.

    python -m benchmarks.actors [--ray PYTHON]

What: the same program on poolray and, in an interpreter that has it, on Ray; each in a process of
its own, in turns. Prints a line of JSON: medians in microseconds, and their ratios.
Who calls: by hand.
May touch: processes.
Invariants: both sides run this very file, so they do the same.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 5
ONE_AT_A_TIME = 1000
BULK = 5000


def measure(module: str) -> dict[str, float]:
    """Medians of all rounds, in microseconds per call."""
    ray: Any = importlib.import_module(module)
    quiet = {"include_dashboard": False, "logging_level": "error"} if module == "ray" else {}
    ray.init(num_cpus=2, **quiet)

    class Counter:
        def __init__(self) -> None:
            self.value = 0

        def add(self) -> int:
            self.value += 1
            return self.value

    class Loop:
        async def add(self) -> int:
            return 1

    def one() -> int:
        return 1

    counter = ray.remote(Counter).remote()
    loop = ray.remote(Loop).remote()
    task = ray.remote(one)
    calls: dict[str, Callable[[], Any]] = {
        "actor": counter.add.remote,
        "async_actor": loop.add.remote,
        "task": task.remote,
    }
    found: dict[str, float] = {}
    for name, call in calls.items():
        ray.get([call() for _ in range(100)])
        found[f"{name}_one_at_a_time"] = median_us(lambda c=call: alone(ray, c), ONE_AT_A_TIME)
        found[f"{name}_bulk"] = median_us(lambda c=call: together(ray, c), BULK)
    made = ray.remote(Counter)
    found["create_and_first_call"] = median_us(lambda: ray.get(made.remote().add.remote()), 1)
    ray.shutdown()
    return found


def alone(ray: Any, call: Callable[[], Any]) -> None:
    for _ in range(ONE_AT_A_TIME):
        ray.get(call())


def together(ray: Any, call: Callable[[], Any]) -> None:
    ray.get([call() for _ in range(BULK)])


def median_us(work: Callable[[], Any], calls: int) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) / calls * 1e6)
    return round(statistics.median(times), 1)


def run(python: str, module: str) -> dict[str, float]:
    """One side, in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--side", module],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled"},
    )
    side: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", metavar="PYTHON", help="an interpreter that has Ray")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side)))
        return
    report: dict[str, Any] = {"poolray": run(sys.executable, "poolray")}
    ours = report["poolray"]
    report["to_tasks"] = {
        kind: round(ours[f"actor_{kind}"] / ours[f"task_{kind}"], 2)
        for kind in ("one_at_a_time", "bulk")
    }
    if options.ray:
        theirs = report["ray"] = run(options.ray, "ray")
        report["to_ray"] = {name: round(ours[name] / theirs[name], 3) for name in ours}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
