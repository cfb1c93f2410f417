"""What the executor contract tests share: gates between processes, tasks, and scripts of their own.

A test here never sleeps to let something happen. A task that must be seen running announces itself
through one `Gate` and waits at another, and every wait has a deadline, so a broken executor fails a
test and does not hang it.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Long enough for a loaded machine that starts interpreters, short enough to wait for once.
DEADLINE_S = 30.0

# The class under test and an object of it: private attributes that users know are looked at too.
ExecutorClass = Any
Executor = Any


class Gate:
    """A counting semaphore over a named pipe, for any process that is given it as an argument.

    Unlike the primitives of `multiprocessing` it can be pickled anywhere, so that a test of the
    executor does not lean on how the executor passes such primitives. Leaving the `with` block
    opens the gate for everyone: the executor around it can shut down even when the test has failed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self._path)
        # Read *and* write: opening never blocks, and tokens stay in the pipe while nobody reads.
        self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)

    def __reduce__(self) -> tuple[type[Gate], tuple[str]]:
        return Gate, (self._path,)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open(count=1024)

    def __del__(self) -> None:
        with contextlib.suppress(
            AttributeError, OSError
        ):  # half made, or the interpreter is ending
            os.close(self._fd)

    def open(self, count: int = 1) -> None:
        """Let `count` waiters through, those to come included."""
        os.write(self._fd, b"." * count)

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        """Take one token; raise `TimeoutError` when none comes in time."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            # Another process may take the token between the poll and the read.
            with contextlib.suppress(BlockingIOError):
                if os.read(self._fd, 1):
                    return
        raise TimeoutError(f"nobody opened {self._path} within {timeout_s} s")


def wait_until(condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    """Poll `condition` until it holds: for what only the operating system knows, as a death."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{inspect.getsource(condition)} never became true"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- tasks -------------------------------------------------------------------------------------


def add(a: int, b: int = 0) -> int:
    return a + b


def double(x: Any) -> Any:
    return x * 2


def identity(x: Any) -> Any:
    return x


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def type_name(x: object) -> str:
    return type(x).__qualname__


def raise_error(error: BaseException) -> NoReturn:
    raise error


def announce_and_hold(started: Gate, release: Gate, value: Any = None) -> Any:
    """Say that the task runs, then keep its worker busy until the test lets go."""
    started.open()
    release.wait()
    return value


def announce_pid_and_hold(pid_file: Path, started: Gate, release: Gate) -> int:
    pid_file.write_text(str(os.getpid()))
    return announce_and_hold(started, release, os.getpid())


def hold(release: Gate, value: Any = None) -> Any:
    release.wait()
    return value


def meet(mine: Gate, theirs: Gate) -> int:
    """Return only when the other party runs at the same time."""
    theirs.open()
    mine.wait()
    return os.getpid()


def leave_mark(directory: Path, name: object) -> object:
    """Leave a trace of having run; more than one run of the same name is visible too."""
    with open(directory / str(name), "a") as file:
        file.write(f"{os.getpid()}\n")
    return name


def marks(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def kill_own_worker() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


# --- executors ---------------------------------------------------------------------------------


def is_standard(executor_class: ExecutorClass) -> bool:
    return executor_class is ProcessPoolExecutor


def that_breaks(executor_class: ExecutorClass, *args: Any, **kwargs: Any) -> Executor:
    """An executor that a worker's death breaks as a whole: the standard's only way."""
    if not is_standard(executor_class):
        kwargs["break_on_worker_death"] = True
    return executor_class(*args, **kwargs)


def forking(executor_class: ExecutorClass, *args: Any, **kwargs: Any) -> Executor:
    """An executor whose workers inherit this process, also where that is not the default."""
    return executor_class(*args, mp_context=multiprocessing.get_context("fork"), **kwargs)


def require_max_tasks_per_child(executor_class: ExecutorClass) -> None:
    if "max_tasks_per_child" not in inspect.signature(executor_class).parameters:
        pytest.skip("this Python's executor has no max_tasks_per_child (new in 3.11)")


def worker_pids(executor: Executor) -> list[int]:
    return list(executor._processes)


def causes(error: BaseException | None) -> Iterable[BaseException]:
    """The error and everything it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def describes_pickling(error: BaseException) -> bool:
    """Whether a user can see from the error that something could not be pickled."""
    return isinstance(error, pickle.PicklingError) or "pickle" in str(error)


# --- scripts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScriptResult:
    exit_code: int
    stdout: str
    stderr: str


def run_script(executor_class: ExecutorClass, path: Path, body: str, *options: str) -> ScriptResult:
    """Run `body` as the main file of a new interpreter, where `Executor` is the class under test.

    For what only a whole interpreter shows: functions of `__main__`, its end, its warnings. The
    script runs in its own directory and may import this module.
    """
    module, name = executor_class.__module__, executor_class.__qualname__
    header = f"from {module} import {name} as Executor\n"
    path.write_text(header + textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # A session of its own, so that a script that hangs is ended with all of its workers: they hold
    # the pipes open, and reading these would go on for as long as they live.
    script = subprocess.Popen(
        [sys.executable, *options, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=path.parent,
        start_new_session=True,
    )
    try:
        stdout, stderr = script.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        stdout, stderr = script.communicate()
        pytest.fail(f"the script did not end; stdout: {stdout!r}, stderr: {stderr!r}")
    return ScriptResult(script.returncode, stdout, stderr)
