"""How fast are calls of actors, their creation, and what does an idle one cost? Beside Ray.

    python -m benchmarks.actors [--ray-python PYTHON]

What: the same program on poolray and on Ray, each in a process of its own, round by round in turn:
calls one at a time and in bulk, of one actor and of several by several callers, of coroutine
actors; creation. Then, on poolray alone, a thousand idle actors and the memory of each.
Who calls: by hand, and `make bench`.
May touch: processes, the clock.
Invariants: both sides run this very file, so they do the same; two CPUs on each.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks._harness import (
    COMPARISON_HEAD,
    Comparison,
    alternate,
    make_parser,
    print_table,
    show,
    write_json,
)
from benchmarks._side import Side, serve

CPUS = 2
#: Case -> (calls in a round, the ratio to reach).
CASES = {
    "one to one, one at a time": (1000, 10.0),
    "one to one, in bulk": (4000, 15.0),
    "n to n, in bulk": (4000, 10.0),
    "coroutine actor, one at a time": (1000, 10.0),
    "coroutine actor, in bulk": (4000, 15.0),
    "threaded actor, in bulk": (4000, 10.0),
}
CREATION = "creation"
CREATION_TARGET = 20.0
IDLE = 1000


# ---- one side ------------------------------------------------------------------------------------


class Counter:
    """The actor of all cases."""

    def __init__(self) -> None:
        self.value = 0

    def add(self) -> int:
        self.value += 1
        return self.value


class Loop:
    """The same with a coroutine."""

    async def add(self) -> int:
        return 1


class Caller:
    """Calls others."""

    def __init__(self, module: str, actors: list[Any]) -> None:
        self.ray: Any = importlib.import_module(module)
        self.actors = actors

    def call(self, count: int) -> int:
        refs = [self.actors[n % len(self.actors)].add.remote() for n in range(count)]
        return len(self.ray.get(refs))


def start(module: str) -> tuple[str, dict[str, Callable[[int], None]]]:
    """A runtime, and what it is asked for."""
    ray: Any = importlib.import_module(module)
    quiet: dict[str, Any] = {}
    if module == "ray":
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=CPUS, **quiet)
    return ray.__version__, make_cases(ray, module)


def make_cases(ray: Any, module: str) -> dict[str, Callable[[int], None]]:
    """What is measured, by name."""
    counter = ray.remote(Counter).remote()
    loop = ray.remote(Loop).remote()
    threaded = ray.remote(Counter).options(max_concurrency=4).remote()
    called = [ray.remote(Counter).remote() for _ in range(CPUS)]
    callers = [ray.remote(Caller).remote(module, called) for _ in range(CPUS)]

    def alone(actor: Any) -> Callable[[int], None]:
        def run(count: int) -> None:
            for _ in range(count):
                ray.get(actor.add.remote())

        return run

    def bulk(actor: Any) -> Callable[[int], None]:
        return lambda count: ray.get([actor.add.remote() for _ in range(count)])

    def create(count: int) -> None:
        made = [ray.remote(Counter).remote() for _ in range(count)]
        ray.get([actor.add.remote() for actor in made])
        for actor in made:
            ray.kill(actor)

    return {
        "one to one, one at a time": alone(counter),
        "one to one, in bulk": bulk(counter),
        "n to n, in bulk": lambda count: ray.get([c.call.remote(count // CPUS) for c in callers]),
        "coroutine actor, one at a time": alone(loop),
        "coroutine actor, in bulk": bulk(loop),
        "threaded actor, in bulk": bulk(threaded),
        CREATION: create,
    }


# ---- both sides ----------------------------------------------------------------------------------


def side(python: str, module: str) -> Side:
    """A runtime in a process of its own."""
    return Side(python, __file__, ["--side", module])


def compare(arguments: argparse.Namespace) -> list[Comparison]:
    """Both sides, case by case, round by round in turn."""
    ours, theirs = side(sys.executable, "poolray"), side(arguments.ray_python, "ray")
    rival = f"Ray {theirs.version}"
    cases = {**CASES, CREATION: (arguments.created, CREATION_TARGET)}
    found = []
    for name, (count, target) in cases.items():
        unit = "actors/s" if name == CREATION else "calls/s"
        rounds = min(arguments.rounds, 2) if name == CREATION else arguments.rounds
        samples = alternate(
            rounds,
            {
                "ours": lambda name=name, count=count: ours.rate(name, count),
                "theirs": lambda name=name, count=count: theirs.rate(name, count),
            },
            warm_up=name != CREATION,
        )
        found.append(Comparison(name, samples["ours"], samples["theirs"], rival, unit, target))
    ours.close()
    theirs.close()
    return found


def ours_alone(arguments: argparse.Namespace) -> dict[str, float]:
    """Medians of poolray's figures, where there is no Ray."""
    ours = side(sys.executable, "poolray")
    cases = {**CASES, CREATION: (arguments.created, CREATION_TARGET)}
    found = {}
    for name, (count, _) in cases.items():
        ours.rate(name, count)
        found[name] = statistics.median(ours.rate(name, count) for _ in range(arguments.rounds))
    ours.close()
    return found


def measure_idle(count: int) -> dict[str, float]:
    """Many idle actors: seconds to make them, and mean memory of each in MB."""
    import psutil

    import poolray

    poolray.init(num_cpus=CPUS)
    actor_class = poolray.remote(Counter)
    started = time.perf_counter()
    actors = [actor_class.remote() for _ in range(count)]
    poolray.get([actor.add.remote() for actor in actors])
    seconds = time.perf_counter() - started
    pids = poolray.get([actor.__ray_call__.remote(_pid) for actor in actors])
    memory = [psutil.Process(pid).memory_full_info() for pid in pids]
    started = time.perf_counter()
    poolray.get([actor.add.remote() for actor in actors])
    again_s = time.perf_counter() - started
    poolray.shutdown()
    return {
        "actors": count,
        "seconds_to_make": seconds,
        "uss_mb": statistics.mean(found.uss for found in memory) / 1e6,
        "pss_mb": statistics.mean(found.pss for found in memory) / 1e6,
        "rss_mb": statistics.mean(found.rss for found in memory) / 1e6,
        "seconds_to_call_each": again_s,
    }


def _pid(_: Any) -> int:
    return os.getpid()


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--created", type=int, default=100, help="actors that are created at once")
    parser.add_argument("--idle", type=int, default=IDLE, help="idle actors; 0: leave that out")
    arguments = parser.parse_args()
    if arguments.side:
        serve(functools.partial(start, arguments.side))
        return
    figures: dict[str, Any] = {}
    if arguments.ray_python:
        comparisons = compare(arguments)
        print_table(COMPARISON_HEAD, [comparison.row() for comparison in comparisons])
        figures["beside Ray"] = {each.name: each.as_json() for each in comparisons}
    else:
        print("beside Ray: not measured, there is no Ray (see --ray-python)")
        alone = figures["alone"] = ours_alone(arguments)
        print_table(["figure", "a second"], [[name, show(rate)] for name, rate in alone.items()])
    if arguments.idle:
        idle = figures["idle actors"] = measure_idle(arguments.idle)
        print_table(["idle actors", ""], [[name, show(value)] for name, value in idle.items()])
    write_json(arguments.json, "actors", figures)


if __name__ == "__main__":
    # A class that comes from `__main__` would go by value, in another way on each side.
    from benchmarks import actors

    actors.main()
