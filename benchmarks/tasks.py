"""Tasks that make tasks, chains, waiting one by one, placement groups: beside Ray.

    python -m benchmarks.tasks [--ray-python PYTHON] [--json FILE]

What: the same program on poolray and, in an interpreter that has it, on Ray, each in a process of
its own with two CPUs, round by round in turns. Then, for poolray alone, what `wait` costs for each
of 1,000, 10,000 and 100,000 refs that are taken one by one: from the front, behind a ref that is
not ready, and while others are appended.
Who calls: by hand.
May touch: processes, the clock.
Invariants: both sides run this very file, so they do the same.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks._side import Side, serve

WORKERS = 2
#: Case -> what is counted, how many in a round, on both sides.
CASES = {
    "nested": ("tasks that a task makes and awaits, /s", 300),
    "chain": ("links of a chain of 200 tasks, /s", 200),
    "wait_one_by_one": ("refs of 1,000 taken one by one with wait, /s", 1000),
    "placement_groups": ("placement groups made, awaited and removed, /s", 50),
}
#: Case -> what is done for each ref, at each of the sizes.
WAITS = {
    "wait_one_by_one": "submit and wait, one by one",
    "wait_behind": "wait, one by one, behind a ref that is not ready",
    "wait_and_append": "wait for one and append one",
}
WAIT_SIZES = (1_000, 10_000, 100_000)
TARGET = 10.0


def cases(module: str) -> dict[str, Callable[[int], None]]:
    """What a side can do, by name."""
    ray: Any = importlib.import_module(module)
    groups: Any = importlib.import_module(f"{module}.util.placement_group")
    quiet = {"include_dashboard": False, "log_to_driver": False} if module == "ray" else {}
    ray.init(num_cpus=WORKERS, **quiet)

    @ray.remote
    def successor(number: int) -> int:
        return number + 1

    @ray.remote
    def family(count: int) -> int:
        return sum(ray.get([successor.remote(0) for _ in range(count)]))

    @ray.remote(num_cpus=0, max_retries=0)
    def slow() -> None:
        time.sleep(600)

    #: Ready refs, for cases that measure waiting alone.
    values = [ray.put(0) for _ in range(max(WAIT_SIZES))] if module == "poolray" else []

    def nested(count: int) -> None:
        assert ray.get([family.remote(10) for _ in range(count // 10)]) == [10] * (count // 10)

    def chain(count: int) -> None:
        ref = successor.remote(0)
        for _ in range(count - 1):
            ref = successor.remote(ref)
        assert ray.get(ref) == count

    def wait_one_by_one(count: int) -> None:
        refs = [successor.remote(0) for _ in range(count)]
        while refs:
            ready, refs = ray.wait(refs)
            assert len(ready) == 1

    def wait_behind(count: int) -> None:
        gate = slow.remote()
        refs = [gate, *values[:count]]
        while len(refs) > 1:
            _, refs = ray.wait(refs)
        ray.cancel(gate, force=True)

    def wait_and_append(count: int) -> None:
        refs = values[:count]
        for _ in range(count):
            ready, refs = ray.wait(refs)
            refs += ready

    def placement_groups(count: int) -> None:
        for _ in range(count):
            group = groups.placement_group([{"CPU": 0.5}])
            assert group.wait(30)
            groups.remove_placement_group(group)

    return {
        "nested": nested,
        "chain": chain,
        "wait_one_by_one": wait_one_by_one,
        "wait_behind": wait_behind,
        "wait_and_append": wait_and_append,
        "placement_groups": placement_groups,
    }


def start(module: str) -> tuple[str, dict[str, Callable[[int], None]]]:
    """One side, and what it is asked for."""
    known = cases(module)
    return importlib.import_module(module).__version__, known


def main() -> None:
    from benchmarks._harness import (
        COMPARISON_HEAD,
        Comparison,
        alternate,
        make_parser,
        print_table,
        write_json,
    )

    options = make_parser(__doc__, rounds=5).parse_args()
    ours = Side(sys.executable, __file__, ["--side", "poolray"])
    figures: dict[str, Any] = {}
    if options.ray_python:
        theirs = Side(options.ray_python, __file__, ["--side", "ray"])
        found = []
        for case, (name, count) in CASES.items():
            samples = alternate(
                options.rounds,
                {
                    "poolray": functools.partial(ours.rate, case, count),
                    "Ray": functools.partial(theirs.rate, case, count),
                },
            )
            figure = Comparison(
                name, samples["poolray"], samples["Ray"], f"Ray {theirs.version}", "/s", TARGET
            )
            found.append(figure)
            figures[case] = figure.as_json()
        theirs.close()
        print_table(COMPARISON_HEAD, [figure.row() for figure in found])
    else:
        for case, (name, count) in CASES.items():
            samples = alternate(options.rounds, {case: functools.partial(ours.rate, case, count)})
            figures[case] = samples[case].as_json()
            print(f"{name}: {samples[case].median:,.0f}")
    for size in WAIT_SIZES:
        for case, what in WAITS.items():
            each_us = 1e6 / ours.rate(case, size)
            figures[f"{case}_{size}"] = each_us
            print(f"{what}, for {size:,} refs: {each_us:.1f} us each")
    ours.close()
    write_json(options.json, "tasks", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--side")
    known, _ = parser.parse_known_args()
    if known.side:
        serve(functools.partial(start, known.side))
    else:
        main()
