"""What the pool contract tests share: tasks, the map family behind one call, and scripts.

Tests take turns with tasks through the gates of `executor_support`: nothing here sleeps, and every
wait has a deadline, so that a pool that hangs fails its test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from executor_support import DEADLINE_S, Gate, ScriptResult, is_alive, leave_mark

# The standard class and poolray's have no base in common, and the tests use what both offer.
Pool: TypeAlias = Any
PoolClass: TypeAlias = Callable[..., Pool]
MakePool: TypeAlias = Callable[..., Pool]

MAPS = ["map", "map_async", "starmap", "starmap_async"]
IMAPS = ["imap", "imap_unordered"]


def collect(pool: Pool, method: str, function: Any, items: Iterable[Any], **options: Any) -> Any:
    """All results of one-argument calls, in order; sorted where the method promises no order."""
    if method.startswith("starmap"):
        items = zip(items)
    results = getattr(pool, method)(function, items, **options)
    if method.endswith("_async"):
        return results.get(DEADLINE_S)
    return sorted(results) if method == "imap_unordered" else list(results)


def processes_of(pool: Pool) -> list[int]:
    """The pids of the workers that the pool has now."""
    return [process.pid for process in pool._pool]


def all_dead(pids: Iterable[int]) -> bool:
    return not any(is_alive(pid) for pid in pids)


# --- tasks -------------------------------------------------------------------------------------


def square(x: Any) -> Any:
    return x * x


def current_pid(_: object = None) -> int:
    return os.getpid()


def fail_if_odd(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


def mark_then_fail_if_odd(directory: Path, x: int) -> int:
    leave_mark(directory, x)
    return fail_if_odd(x)


def hold_if_string(release: Gate, item: Any) -> Any:
    """Keep a worker busy with a string; let all else through."""
    if isinstance(item, str):
        release.wait()
    return item


def die_once(directory: Path, x: Any) -> Any:
    """Kill the worker at the first attempt, answer at the second."""
    with contextlib.suppress(FileExistsError):
        (directory / f"died-{x}").touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return x


class Failure(Exception):
    """What the inputs below raise."""


def failing_input(count: int) -> Iterator[int]:
    """Yield `count` numbers, then raise."""
    yield from range(count)
    raise Failure("no more input", count)


class FailingSizedInput:
    """The same, for an iterable that knows its length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count + 1

    def __iter__(self) -> Iterator[int]:
        return failing_input(self.count)


class Unpicklable:
    """Something that no pickler can take, with an error of its own."""

    def __reduce__(self) -> Any:
        raise Failure("I cannot be pickled")

    def __repr__(self) -> str:
        return "<an unpicklable thing>"


class Unloadable:
    """Something that can be pickled but not rebuilt."""

    def __reduce__(self) -> Any:
        return refuse_to_load, ()


def refuse_to_load() -> Any:
    raise Failure("I cannot be rebuilt")


# --- scripts -----------------------------------------------------------------------------------


def python_path() -> str:
    """What makes another interpreter find the modules that this one finds."""
    return os.pathsep.join(folder or os.getcwd() for folder in sys.path)


def run_script(pool_class: PoolClass, path: Path, body: str, *options: str) -> ScriptResult:
    """Run `body` as the main file of a new interpreter, where `Pool` is the class under test."""
    module = pool_class.__module__
    path.write_text(f"from {module} import Pool\n" + textwrap.dedent(body))
    # Output is buffered as usual, whatever the settings of the interpreter that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    environment["PYTHONPATH"] = python_path()
    # A session of its own, so that a script that hangs is ended together with its workers, which
    # hold the pipes open.
    script = subprocess.Popen(
        [sys.executable, *options, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        stdout, stderr = script.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        stdout, stderr = script.communicate()
        pytest.fail(f"the script did not end; stdout: {stdout!r}, stderr: {stderr!r}")
    return ScriptResult(script.returncode, stdout, stderr)
