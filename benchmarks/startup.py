"""How long until the first result, what an import costs, what idleness costs.

What: first results from process start beside the standard library (and Ray where it is given),
import time, memory of idle workers, CPU time of an idle runtime.
Who calls: `make bench`.
May touch: subprocesses, psutil, files named by `--json`.
Invariants: each figure is a median over fresh processes, contestants in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

FIRST_RESULTS = {
    "poolray.Pool": "from poolray import Pool\nwith Pool(2) as p: p.apply(abs, (1,))",
    "poolray.Executor": "from poolray import Executor as E\n"
    "with E(2) as e: e.submit(abs, 1).result()",
    "poolray tasks": "import poolray\nf = poolray.remote(lambda: 1)\npoolray.get(f.remote())",
    "multiprocessing.Pool": "from multiprocessing import Pool\n"
    "with Pool(2) as p: p.apply(abs, (1,))",
    "ProcessPoolExecutor": "from concurrent.futures import ProcessPoolExecutor as E\n"
    "with E(2) as e: e.submit(abs, 1).result()",
    "an empty program": "pass",
}
RAY = "import ray\nray.init(num_cpus=2, include_dashboard=False, logging_level='error')\n"
RAY += "f = ray.remote(lambda: 1)\nray.get(f.remote())"
IMPORTS = ("poolray", "poolray.pool", "poolray.executor", "multiprocessing.pool")
IDLE_PROGRAM = """
import sys, poolray
from poolray import Pool
poolray.init(num_cpus=2)
f = poolray.remote(lambda: 1)
poolray.get([f.remote() for _ in range(10)])
pool = Pool(2)
pool.map(abs, range(10))
print("ready", flush=True)
sys.stdin.readline()
"""


def seconds_of(python: str, program: str) -> float:
    """Run a program to its end in a fresh interpreter."""
    started = time.perf_counter()
    subprocess.run([python, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - started


def medians(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, once in contestants.items():
            taken[name].append(once())
    return {name: statistics.median(values) for name, values in taken.items()}


def idle(seconds: float) -> dict[str, float]:
    """CPU time of a runtime with nothing to do, and the memory of its processes."""
    program = subprocess.Popen(
        [sys.executable, "-c", IDLE_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdout.readline()
    time.sleep(1.0)  # the background thread goes to sleep
    family = [psutil.Process(program.pid)]
    family += family[0].children(recursive=True)

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    before = used()
    time.sleep(seconds)
    spent = used() - before
    memory = [process.memory_full_info().uss / 2**20 for process in family[1:]]
    program.communicate(b"\n")
    return {
        f"idle for {seconds:.0f} s, CPU seconds": spent,
        "child process, MiB of its own, median": statistics.median(memory),
        "child process, MiB of its own, most": max(memory),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--idle", type=float, default=10.0, help="seconds of idleness")
    parser.add_argument("--ray-python", help="interpreter of an environment that has Ray")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    contestants = {
        name: (lambda program=program: seconds_of(sys.executable, program))
        for name, program in FIRST_RESULTS.items()
    }
    figures = {
        f"first result, s: {name}": value
        for name, value in medians(contestants, options.rounds).items()
    }
    if options.ray_python:
        figures["first result, s: Ray"] = seconds_of(options.ray_python, RAY)
    imports = {
        name: (lambda name=name: seconds_of(sys.executable, f"import {name}")) for name in IMPORTS
    }
    empty = figures["first result, s: an empty program"]
    for name, value in medians(imports, options.rounds).items():
        figures[f"import beyond an empty program, s: {name}"] = value - empty
    figures.update(idle(options.idle))
    for name, value in figures.items():
        print(f"{name:<58} {value:8.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
