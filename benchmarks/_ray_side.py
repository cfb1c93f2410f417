"""Ray's side of the comparisons: a program of its own, for Ray may live in another environment.

What: starts Ray with two CPUs, then answers as `_side.py` says.
Who calls: `RaySide` below, from the benchmarks.
May touch: Ray, standard input and output, the clock.
Invariants: imports Ray only when it runs as a program; ends with its input.
"""

from __future__ import annotations

from typing import Any

from benchmarks._side import Side, serve

WORKERS = 2


class RaySide(Side):
    """A running Ray: this program, or one that answers as it does."""

    def __init__(self, python: str, program: str = __file__) -> None:
        super().__init__(python, program)


def start() -> tuple[str, dict[str, Any]]:
    """Ray, and what it is asked for."""
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)

    @ray.remote
    def successor(number: int) -> int:
        return number + 1

    def one_at_a_time(count: int) -> None:
        for number in range(count):
            assert ray.get(successor.remote(number)) == number + 1

    def in_bulk(count: int) -> None:
        values = ray.get([successor.remote(number) for number in range(count)])
        assert values == list(range(1, count + 1))

    in_bulk(100)
    return ray.__version__, {"one_at_a_time": one_at_a_time, "in_bulk": in_bulk}


if __name__ == "__main__":
    serve(start)
