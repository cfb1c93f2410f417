"""How fast are calls, beside the standard library's pools and beside Ray?

What: two workers each, a trivial function, all in one run: rounds in turn, medians, ratios, and
whether each ratio reaches its target.
Who calls: `python -m benchmarks.pools`, by hand and in `make bench`.
May touch: processes, the clock.
Invariants: both sides do the same calls and have their answers checked.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import poolray
from benchmarks._harness import (
    COMPARISON_HEAD,
    Comparison,
    Samples,
    alternate,
    commit,
    machine,
    make_parser,
    print_table,
    rate,
    show,
    write_json,
)
from benchmarks._ray_side import RaySide

WORKERS = 2
#: What an idle machine with two cores is to reach, in tasks a second.
BULK_RATE_TARGET = 30_000
ARRAY_BYTES = 8 << 20
_TASK_S = 1e-3

_array = np.zeros(0)


def successor(number: int) -> int:
    """The trivial function."""
    return number + 1


@poolray.remote
def remote_successor(number: int) -> int:
    """The same, for the runtime API."""
    return number + 1


def work(steps: int) -> int:
    """Compute for a while."""
    total = 0
    for step in range(steps):
        total += step
    return total


def steps_for(duration_s: float) -> int:
    """How many steps of `work` take so long here."""
    steps = 20_000
    taken = min(_seconds(lambda: work(steps)) for _ in range(20))
    return int(steps * duration_s / taken)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def large_array(number: int) -> np.ndarray[Any, Any]:
    """An array of 8 MB that each worker makes once: what is measured is its way to the caller."""
    global _array
    if not _array.size:
        _array = np.full(ARRAY_BYTES // 8, 7.0)
    _array[0] = number
    return _array


# --- what a round does; `count` calls each -------------------------------------------------------


def apply(pool: Any, count: int) -> None:
    for number in range(count):
        assert pool.apply(successor, (number,)) == number + 1


def apply_async(pool: Any, count: int) -> None:
    results = [pool.apply_async(successor, (number,)) for number in range(count)]
    assert [result.get() for result in results] == list(range(1, count + 1))


def map_by_default(pool: Any, count: int) -> None:
    assert pool.map(successor, range(count)) == list(range(1, count + 1))


def map_one_by_one(pool: Any, count: int) -> None:
    assert pool.map(successor, range(count), chunksize=1) == list(range(1, count + 1))


def imap_unordered(pool: Any, count: int) -> None:
    assert sum(pool.imap_unordered(successor, range(count))) == count * (count + 1) // 2


def map_work(steps: int) -> Callable[[Any, int], None]:
    """Calls that take a millisecond each."""

    def run(pool: Any, count: int) -> None:
        assert len(pool.map(work, [steps] * count, chunksize=1)) == count

    return run


def map_arrays(pool: Any, count: int) -> None:
    for number, array in enumerate(pool.map(large_array, range(count), chunksize=1)):
        assert array.nbytes == ARRAY_BYTES
        assert (array[0], array[-1]) == (number, 7.0)


def submit_one_at_a_time(executor: Any, count: int) -> None:
    for number in range(count):
        assert executor.submit(successor, number).result() == number + 1


def submit_in_bulk(executor: Any, count: int) -> None:
    futures = [executor.submit(successor, number) for number in range(count)]
    assert [future.result() for future in futures] == list(range(1, count + 1))


def remote_one_at_a_time(count: int) -> None:
    for number in range(count):
        assert poolray.get(remote_successor.remote(number)) == number + 1


def remote_in_bulk(count: int) -> None:
    refs = [remote_successor.remote(number) for number in range(count)]
    assert poolray.get(refs) == list(range(1, count + 1))


# --- the comparisons -----------------------------------------------------------------------------


def _scaled(count: int, scale: float) -> int:
    return max(4, int(count * scale))


def compare_pools(rounds: int, scale: float) -> list[Comparison]:
    """`Pool` beside `multiprocessing.Pool`."""
    cases: list[tuple[str, Callable[[Any, int], None], int, float]] = [
        ("Pool.apply", apply, 2_000, 6.0),
        ("Pool.apply_async", apply_async, 10_000, 3.0),
        ("Pool.map, default chunks", map_by_default, 200_000, 1.0),
        ("Pool.map, chunksize=1", map_one_by_one, 10_000, 3.0),
        ("Pool.imap_unordered", imap_unordered, 10_000, 4.0),
        ("Pool.map of 1 ms tasks", map_work(steps_for(_TASK_S)), 400, 1.0),
        ("Pool.map returning 8 MB arrays", map_arrays, 16, 5.0),
    ]
    found = []
    with multiprocessing.Pool(WORKERS) as theirs, poolray.Pool(WORKERS) as ours:
        for name, run, count, target in cases:
            samples = _side_by_side(rounds, run, _scaled(count, scale), ours, theirs)
            found.append(Comparison(name, *samples, "multiprocessing.Pool", "/s", target))
    return found


def compare_executors(rounds: int, scale: float) -> list[Comparison]:
    """`Executor` beside `concurrent.futures.ProcessPoolExecutor`."""
    cases: list[tuple[str, Callable[[Any, int], None], int, float]] = [
        ("Executor.submit, one at a time", submit_one_at_a_time, 1_500, 6.0),
        ("Executor.submit, in bulk", submit_in_bulk, 5_000, 8.0),
    ]
    found = []
    theirs = concurrent.futures.ProcessPoolExecutor(WORKERS)
    with theirs, poolray.Executor(WORKERS) as ours:
        for name, run, count, target in cases:
            samples = _side_by_side(rounds, run, _scaled(count, scale), ours, theirs)
            found.append(Comparison(name, *samples, "ProcessPoolExecutor", "/s", target))
    return found


def _side_by_side(
    rounds: int, run: Callable[[Any, int], None], count: int, ours: Any, theirs: Any
) -> tuple[Samples, Samples]:
    samples = alternate(
        rounds,
        {
            "theirs": lambda: rate(count, lambda: run(theirs, count)),
            "ours": lambda: rate(count, lambda: run(ours, count)),
        },
    )
    return samples["ours"], samples["theirs"]


#: name, case of ours and of Ray's side, calls a round of ours and of Ray's, target.
_REMOTE_CASES = [
    ("f.remote, one at a time", remote_one_at_a_time, "one_at_a_time", 5_000, 300, 25.0),
    ("f.remote, in bulk", remote_in_bulk, "in_bulk", 20_000, 1_500, 20.0),
]


def compare_remote(
    rounds: int, scale: float, ray_python: str | None
) -> tuple[list[Comparison], dict[str, Samples], str]:
    """`f.remote` beside Ray's, where there is one; also our rates alone, and Ray's version."""
    poolray.init(num_cpus=WORKERS)
    try:
        if ray_python is None:
            return [], _measure_remote_alone(rounds, scale), ""
        return _compare_with_ray(rounds, scale, ray_python)
    finally:
        poolray.shutdown()


def _measure_remote_alone(rounds: int, scale: float) -> dict[str, Samples]:
    alone = {}
    for name, run, _, count, _, _ in _REMOTE_CASES:
        calls = _scaled(count, scale)
        contestant = {"ours": lambda run=run, calls=calls: rate(calls, lambda: run(calls))}
        alone[name] = alternate(rounds, contestant)["ours"]
    return alone


def _compare_with_ray(
    rounds: int, scale: float, ray_python: str
) -> tuple[list[Comparison], dict[str, Samples], str]:
    found, alone = [], _measure_remote_alone(rounds, scale)
    with RaySide(ray_python) as ray:
        for name, run, case, count, ray_count, target in _REMOTE_CASES:
            calls, ray_calls = _scaled(count, scale), _scaled(ray_count, scale)
            samples = alternate(
                rounds,
                {
                    "theirs": lambda c=case, n=ray_calls: ray.rate(c, n),
                    "ours": lambda run=run, n=calls: rate(n, lambda: run(n)),
                },
            )
            rival = f"Ray {ray.version}"
            pair = samples["ours"], samples["theirs"]
            found.append(Comparison(name, *pair, rival, "/s", target))
        return found, alone, ray.version


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="calls per round, times this; default 1"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    arguments: argparse.Namespace = parser.parse_args()
    rounds, scale = arguments.rounds, arguments.scale
    where = machine()
    print(
        f"{WORKERS} workers, {rounds} rounds; {where['cores']} cores, {where['processor']}, "
        f"{where['python']}, load {where['load_average'][0]:.2f}, commit {commit()}"
    )
    found = [*compare_pools(rounds, scale), *compare_executors(rounds, scale)]
    poolray.shutdown()
    with_ray, alone, _ = compare_remote(rounds, scale, arguments.ray_python)
    found += with_ray
    print_table(COMPARISON_HEAD, [comparison.row() for comparison in found])
    if not with_ray:
        print("f.remote beside Ray: not measured, there is no Ray (see --ray-python)")
    for name, samples in alone.items():
        print(f"{name}, with nothing beside it: {show(samples.median)} /s")
    bulk = alone["f.remote, in bulk"]
    met = bulk.median >= BULK_RATE_TARGET
    print(f"in bulk at least {BULK_RATE_TARGET:,} /s on an idle machine: {'yes' if met else 'NO'}")
    figures: dict[str, Any] = {comparison.name: comparison.as_json() for comparison in found}
    for name, samples in alone.items():
        figures[f"{name}, alone"] = {"unit": "/s", "ours": samples.as_json()}
    figures["f.remote, in bulk, alone"].update(target=BULK_RATE_TARGET, met=met)
    write_json(arguments.json, "pools", figures)
    missed = [comparison.name for comparison in found if not comparison.met]
    if missed:
        print(f"targets missed: {'; '.join(missed)}")
    if arguments.strict and (missed or not met):
        sys.exit(1)


if __name__ == "__main__":
    main()
