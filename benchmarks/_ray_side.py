"""Ray's side of the comparisons: a program of its own, for Ray may live in another environment.

What: starts Ray with two CPUs, then answers each line `<case> <count>` with the seconds it took.
Who calls: `RaySide` below, from the benchmarks.
May touch: Ray, standard input and output, the clock.
Invariants: imports Ray only when it runs as a program; ends with its input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

WORKERS = 2


class RaySide:
    """A running Ray in a process of its own: this program, or one that answers as it does."""

    def __init__(self, python: str, program: str = __file__) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment.update(
            RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", RAY_AUTH_MODE="disabled"
        )
        self._process = subprocess.Popen(
            [python, str(Path(program).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.version = self._read()

    def _read(self) -> str:
        output: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = output.readline().strip()
        if not line:
            raise SystemExit("Ray did not start: does the Python given with --ray-python have it?")
        return line

    def rate(self, case: str, count: int) -> float:
        """Calls a second."""
        commands: IO[str] = self._process.stdin  # type: ignore[assignment]
        commands.write(f"{case} {count}\n")
        commands.flush()
        return count / float(self._read())

    def __enter__(self) -> RaySide:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Serve until the input ends."""
    # Ray prints to standard output; the answers go to a copy that only this program knows.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
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

    cases: dict[str, Any] = {"one_at_a_time": one_at_a_time, "in_bulk": in_bulk}
    in_bulk(100)
    print(ray.__version__, file=answers, flush=True)
    for line in sys.stdin:
        case, count = line.split()
        started = time.perf_counter()
        cases[case](int(count))
        print(time.perf_counter() - started, file=answers, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
