"""A side of a comparison in a process of its own, for Ray may live in another environment.

What: starts a program, asks it for one case at a time; what such a program does with its input.
Who calls: benchmarks that compare; their programs.
May touch: processes, standard input and output, the clock.
Invariants: imports nothing of either side; a program ends with its input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

_ROOT = Path(__file__).resolve().parents[1]
_S = TypeVar("_S", bound="Side")


class Side:
    """A running side.

    Parameters
    ----------
    python : str
        The interpreter that has what is measured.
    program : str
        A file that calls `serve`.
    arguments : sequence of str
        What the program is given.
    """

    def __init__(self, python: str, program: str, arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(program).resolve()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=_ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(_ROOT),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_DEDUP_LOGS": "0",
                "RAY_AUTH_MODE": "disabled",
            },
        )
        self._name = f"{python} {program}"
        self.version = self._read()

    def _read(self) -> str:
        output: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = output.readline().strip()
        if not line:
            raise SystemExit(f"{self._name} did not start, or died: has it what is compared?")
        return line

    def rate(self, case: str, count: int) -> float:
        """How many a second."""
        commands: IO[str] = self._process.stdin  # type: ignore[assignment]
        commands.write(f"{case} {count}\n")
        commands.flush()
        return count / float(self._read())

    def close(self) -> None:
        """It ends with its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(start: Callable[[], tuple[str, Mapping[str, Callable[[int], object]]]]) -> None:
    """Be a side: answer each line `<case> <count>` with the seconds it took, until the input ends.

    Parameters
    ----------
    start : callable
        Gives a version and the cases by name; one that only times a part of what it does gives
        the seconds.
    """
    # Ray prints to standard output; the answers go to a copy that only this program knows.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    version, cases = start()
    print(version, file=answers, flush=True)
    for line in sys.stdin:
        case, _, count = line.strip().rpartition(" ")
        started = time.perf_counter()
        took = cases[case](int(count))
        if not isinstance(took, float):
            took = time.perf_counter() - started
        print(took, file=answers, flush=True)
