"""How fast are ActorPool, Queue and collective operations? Beside Ray, and beside copying memory.

    python -m benchmarks.utilities [--ray-python PYTHON]

What: the same program on poolray and, in an interpreter that has it, on Ray; each in a process of
its own. Rates of tiny calls and items; an allreduce of 100 MB among two, three and four actors as
a multiple of what copying the array takes in each of them at the same time.
Who calls: by hand.
May touch: processes.
Invariants: both sides run this very file, so they do the same; a ratio to a copy is taken within
one round, in which all members copy, and then reduce. Ray needs torch for its collective part.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = 2000
BATCH = 100
#: Bytes that are reduced.
LARGE_BYTES = 100_000_000
SMALL_OPERATIONS = 500
GROUP_SIZES = (2, 3, 4)


def measure(module: str, rounds: int) -> dict[str, Any]:
    """All figures of one side."""
    ray: Any = importlib.import_module(module)
    quiet = {"include_dashboard": False, "logging_level": "error"} if module == "ray" else {}
    ray.init(num_cpus=4, **quiet)
    found: dict[str, Any] = {**measure_pool(ray, rounds), **measure_queue(ray, module, rounds)}
    if module != "ray" or importlib.util.find_spec("torch") is not None:
        for size in GROUP_SIZES:
            found.update(measure_group(ray, module, size, rounds))
    ray.shutdown()
    return found


def per_second(count: int, rounds: int, work: Callable[[], Any]) -> float:
    """Median of all rounds, after one that does not count."""
    work()
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        rates.append(count / (time.perf_counter() - started))
    return round(statistics.median(rates))


def measure_pool(ray: Any, rounds: int) -> dict[str, float]:
    """Tiny calls through an ActorPool of two."""
    actor_pool = importlib.import_module(f"{ray.__name__}.util.actor_pool")

    class Doubler:
        def double(self, value: int) -> int:
            return 2 * value

    pool = actor_pool.ActorPool([ray.remote(Doubler).remote() for _ in range(2)])

    def call(actor: Any, value: int) -> Any:
        return actor.double.remote(value)

    return {
        "actor_pool_map_per_s": per_second(
            CALLS, rounds, lambda: list(pool.map(call, range(CALLS)))
        ),
        "actor_pool_map_unordered_per_s": per_second(
            CALLS, rounds, lambda: list(pool.map_unordered(call, range(CALLS)))
        ),
    }


def measure_queue(ray: Any, module: str, rounds: int) -> dict[str, float]:
    """Small items through a Queue: by the driver, in batches, from one task to another."""
    queues = importlib.import_module(f"{module}.util.queue")
    queue = queues.Queue()

    def one_by_one() -> None:
        for number in range(CALLS):
            queue.put(number)
        for _ in range(CALLS):
            queue.get()

    def in_batches() -> None:
        for start in range(0, CALLS, BATCH):
            queue.put_nowait_batch(list(range(start, start + BATCH)))
        for _ in range(0, CALLS, BATCH):
            queue.get_nowait_batch(BATCH)

    def produce(queue: Any, count: int) -> None:
        for number in range(count):
            queue.put(number)

    def consume(queue: Any, count: int) -> None:
        for _ in range(count):
            queue.get()

    producer, consumer = ray.remote(produce), ray.remote(consume)

    def through_tasks() -> None:
        ray.get([producer.remote(queue, CALLS), consumer.remote(queue, CALLS)])

    return {
        "queue_items_per_s": per_second(CALLS, rounds, one_by_one),
        "queue_items_in_batches_per_s": per_second(CALLS, rounds, in_batches),
        "queue_items_between_tasks_per_s": per_second(CALLS, rounds, through_tasks),
    }


def measure_group(ray: Any, module: str, size: int, rounds: int) -> dict[str, Any]:
    """Large and small allreduces among some actors."""

    class Member:
        def run(self, rank: int) -> tuple[list[float], list[float], float]:
            import numpy

            collective: Any = importlib.import_module(f"{module}.util.collective")
            name = "default"
            collective.init_collective_group(size, rank, backend="gloo", group_name=name)
            source = numpy.ones(LARGE_BYTES // 4, numpy.float32)
            target = source.copy()
            copies, reductions = [], []
            for _ in range(rounds + 1):
                collective.barrier(name)
                started = time.perf_counter()
                target[:] = source
                copies.append(time.perf_counter() - started)
                collective.barrier(name)
                started = time.perf_counter()
                collective.allreduce(target, name)
                reductions.append(time.perf_counter() - started)
            assert float(target[0]) == size
            small = numpy.zeros(4, numpy.float32)
            collective.barrier(name)
            started = time.perf_counter()
            for _ in range(SMALL_OPERATIONS):
                collective.allreduce(small, name)
            one_s = (time.perf_counter() - started) / SMALL_OPERATIONS
            collective.barrier(name)
            return copies[1:], reductions[1:], one_s

    members = [ray.remote(Member).options(num_cpus=0).remote() for _ in range(size)]
    found = ray.get([member.run.remote(rank) for rank, member in enumerate(members)])
    # What counts is the member that is done last.
    copies = [max(times) for times in zip(*(times for times, _, _ in found))]
    reductions = [max(times) for times in zip(*(times for _, times, _ in found))]
    ratios = [reduction / copy for reduction, copy in zip(reductions, copies)]
    return {
        f"allreduce_100_mb_{size}_ms": round(1e3 * statistics.median(reductions), 1),
        f"allreduce_100_mb_{size}_to_copy": round(statistics.median(ratios), 2),
        f"allreduce_100_mb_{size}_to_copy_of_rounds": [
            round(min(ratios), 2),
            round(max(ratios), 2),
        ],
        f"allreduce_16_bytes_{size}_us": round(1e6 * max(one for _, _, one in found), 1),
    }


def run(python: str, module: str, rounds: int) -> dict[str, Any]:
    """One side, in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--side", module, "--rounds", str(rounds)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled"},
    )
    side: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return side


def main() -> None:
    """Both sides, a table, and JSON if wanted."""
    from benchmarks import _harness as harness

    parser = harness.make_parser(__doc__, rounds=5)
    options = parser.parse_args()
    sides = {"poolray": run(sys.executable, "poolray", options.rounds)}
    if options.ray_python:
        sides["ray"] = run(options.ray_python, "ray", options.rounds)
    theirs = sides.get("ray", {})
    rows = []
    for name, value in sides["poolray"].items():
        other = theirs.get(name)
        ratio = ""
        if isinstance(value, float | int) and isinstance(other, float | int):
            is_rate = name.endswith("_per_s")
            ratio = f"{value / other if is_rate else other / value:.1f} x"
        rows.append([name, str(value), "" if other is None else str(other), ratio])
    harness.print_table(["figure", "poolray", "Ray", "better by"], rows)
    harness.write_json(options.json, "utilities", sides)


if __name__ == "__main__":
    if "--side" in sys.argv:
        arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        print(json.dumps(measure(arguments["--side"], int(arguments["--rounds"]))))
    else:
        main()
