"""What do a pool's extras cost: limits of time, worker states, insights, progress bars?

What: the shortest calls there are, with each extra and without, in one run: rounds in turn,
medians, and the share of the plain rate that is left. Without extras nothing is to be paid;
these are the prices of those who ask.
Who calls: `python -m benchmarks.pool_extras`, by hand and in `make bench`.
May touch: processes, the clock.
Invariants: each contestant does the same calls and has its answers checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import poolray
from benchmarks._harness import (
    alternate,
    commit,
    machine,
    make_parser,
    print_table,
    rate,
    show,
    write_json,
)

WORKERS = 2
_LIMIT_S = 60.0


def successor(number: int) -> int:
    """The trivial function."""
    return number + 1


def successor_with_state(state: dict[str, Any], number: int) -> int:
    """The same, in a pool with a state."""
    return number + 1


def run(pool: Any, function: Callable[..., int], count: int, **extras: Any) -> None:
    """Calls one by one, as `imap_unordered` has them."""
    total = sum(pool.imap_unordered(function, range(count), **extras))
    assert total == count * (count + 1) // 2


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--calls", type=int, default=10_000, help="per round; default 10000")
    arguments = parser.parse_args()
    count = arguments.calls
    where = machine()
    print(f"{WORKERS} workers, {where['processor']}, {where['python']}, commit {commit()}")
    with (
        poolray.Pool(WORKERS) as plain,
        poolray.Pool(WORKERS, worker_state=True) as stateful,
        poolray.Pool(WORKERS, insights=True) as measured,
        open(os.devnull, "w") as nowhere,
    ):
        bar = {"file": nowhere}
        contestants: dict[str, Callable[[], object]] = {
            "plain": lambda: run(plain, successor, count),
            "timeout=": lambda: run(plain, successor, count, timeout=_LIMIT_S),
            "worker_state=": lambda: run(stateful, successor_with_state, count),
            "insights=": lambda: run(measured, successor, count),
            "progress=": lambda: run(plain, successor, count, progress=bar),
        }
        samples = alternate(
            arguments.rounds,
            {name: lambda each=each: rate(count, each) for name, each in contestants.items()},
        )
    base = samples["plain"].median
    rows = [
        [name, f"{show(found.median)} /s", f"{found.median / base:.2f}"]
        for name, found in samples.items()
    ]
    print_table(["calls of microseconds", "rate", "of plain"], rows)
    figures = {name: {"unit": "/s", **found.as_json()} for name, found in samples.items()}
    write_json(arguments.json, "pool_extras", figures)
    poolray.shutdown()


if __name__ == "__main__":
    main()
