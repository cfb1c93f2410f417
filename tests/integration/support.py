"""What the integration tests share: scripts, gates between processes, and counts of what is there.

Nothing here sleeps to let something happen: what must be seen announces itself through a `Gate` or
a line of output, and every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import poolray
from poolray.local import runtime as local_runtime

REPOSITORY = Path(__file__).resolve().parents[2]

# Long enough for a loaded machine that starts interpreters, short enough to wait for once.
DEADLINE_S = 30.0

#: How long a process may outlive its parent.
DEATH_S = 1.0


# --- conditions ----------------------------------------------------------------------------------


def wait_until(
    condition: Callable[[], bool], what: str = "the condition", timeout_s: float = DEADLINE_S
) -> float:
    """Poll for what only the operating system knows, as a death; gives the seconds it took."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"{what} did not come true within {timeout_s} s")
        time.sleep(0.002)
    return time.monotonic() - started


def is_alive(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process that may have ended; False if it has."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Gate:
    """A counting semaphore over a named pipe, for any process that is given it as an argument.

    Leaving the `with` block opens the gate for everyone, so that a test that has failed ends.
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

    def close(self) -> None:
        """Let go of the pipe; any number of times."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # half made, or the end of all
            self.close()

    def open(self, count: int = 1) -> None:
        """Let `count` waiters through, those to come included."""
        os.write(self._fd, b"." * count)

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        """Take one token.

        Raises
        ------
        TimeoutError
            None came in time.
        """
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            # Another process may take the token between the poll and the read.
            with contextlib.suppress(BlockingIOError):
                if os.read(self._fd, 1):
                    return
        raise TimeoutError(f"nobody opened {self._path} within {timeout_s} s")


# --- tasks ---------------------------------------------------------------------------------------


def successor(number: int) -> int:
    return number + 1


def own_pid(_: object = None) -> int:
    return os.getpid()


def announce_and_hold(started: Gate, release: Gate, value: Any = None) -> Any:
    """Say that the task runs, then keep its worker busy until the test lets go."""
    started.open()
    release.wait()
    return value


def die(how: str) -> None:
    """End this process in one of three ways."""
    if how == "exit":
        os._exit(7)
    # No core file: the death is meant.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), getattr(signal, how))
    signal.pause()


def leave_mark(directory: Path, name: object) -> None:
    """Leave a trace of having run: a line with this process's pid per run."""
    with open(directory / str(name), "a") as file:
        file.write(f"{os.getpid()}\n")


def marks(directory: Path, name: object) -> list[int]:
    """Pids of the processes that left this mark, in order."""
    path = directory / str(name)
    return [int(line) for line in path.read_text().split()] if path.exists() else []


# --- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Census:
    """What a process has of things that can leak."""

    children: tuple[str, ...]
    descriptors: tuple[str, ...]
    threads: tuple[str, ...]
    arenas: int
    shared_memory: tuple[str, ...]


def _named_shared_memory() -> list[str]:
    """Ours alone: other test processes come and go with semaphores of `multiprocessing`."""
    folder = Path("/dev/shm")
    return [path.name for path in folder.glob("*poolray*")] if folder.is_dir() else []


def census() -> Census:
    """Count what this process has."""
    return Census(
        children=tuple(sorted(_describe(child) for child in children_of(os.getpid()))),
        descriptors=tuple(sorted(_descriptors())),
        threads=tuple(sorted(thread.name for thread in threading.enumerate())),
        arenas=Path("/proc/self/maps").read_text().count("poolray-arena"),
        shared_memory=tuple(sorted(_named_shared_memory())),
    )


def children_of(pid: int) -> list[psutil.Process]:
    """Living descendants, apart from the helper that `multiprocessing` keeps for spawned ones."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE and not any(
                    "resource_tracker" in word for word in child.cmdline()
                ):
                    found.append(child)
    return found


def _describe(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    return f"{process.pid} gone"


def _descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed the folder
        # Sockets and pipes are told apart by their inodes, which change with each run, and the
        # numbers of descriptors by what was open before.
        if not target.startswith(("/tmp/", "/dev/null")):
            yield target.partition(":")[0]


def statistics() -> Any:
    """The node's, of this process's runtime."""
    runtime = local_runtime.current()
    assert runtime is not None, "there is no runtime"
    return runtime.statistics()


def assert_nothing_is_left_over() -> None:
    """No task, no object and no request remains with the node once nobody holds a ref."""
    import gc

    seen: Any = None

    def is_clean() -> bool:
        nonlocal seen
        gc.collect()
        runtime = local_runtime.current()
        assert runtime is not None
        runtime.client.sync_references()
        seen = runtime.statistics()
        return (
            seen.tasks == seen.queued_calls == seen.objects == seen.open_requests == 0
            and seen.busy_workers == 0
            and seen.arena.used_bytes == 0
            and seen.resources_available == seen.resources_total
        )

    try:
        wait_until(is_clean, timeout_s=5)
    except AssertionError:
        raise AssertionError(f"the node still has something: {seen}") from None


def fork_server_pids() -> list[int]:
    """The fork servers of this process's runtime, by group."""
    runtime = local_runtime.current()
    assert runtime is not None
    return [host.server_pid for host in runtime._hosts.values()]


def worker_pids() -> list[int]:
    """All workers of this process's runtime that have been forked."""
    runtime = local_runtime.current()
    assert runtime is not None
    with runtime.guard:
        return [
            worker.pid
            for host in runtime._hosts.values()
            for worker in host.workers.values()
            if worker.pid
        ]


# --- scripts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScriptResult:
    """How a script ended, and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str

    def lines(self) -> list[str]:
        """Of its standard output; it must have succeeded."""
        assert self.exit_code == 0, self.stderr
        return self.stdout.splitlines()


_HEADER = """\
import faulthandler, os, signal, sys, threading, time
faulthandler.enable()
import poolray
from poolray import Executor, Pool
from tests.integration.support import *
"""


class Script:
    """A program in a session of its own, which is ended with all its processes.

    Its standard output is read line by line while it runs.
    """

    def __init__(
        self,
        path: Path,
        body: str,
        *options: str,
        environment: dict[str, str] | None = None,
        header: str = _HEADER,
    ) -> None:
        path.write_text(header + textwrap.dedent(body))
        self._process = subprocess.Popen(
            [sys.executable, *options, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**script_environment(path.parent), **(environment or {})},
            cwd=path.parent,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._seen: list[str] = []
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.append(self._process.stderr.read())

    def read_line(self, timeout_s: float = DEADLINE_S) -> str:
        """The next line that it prints."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._abort()
            raise AssertionError(f"no line came within {timeout_s} s; {self._all()}") from None
        assert line is not None, f"the script has ended; {self._all()}"
        self._seen.append(line)
        return line

    def _all(self) -> str:
        self._readers[1].join(2)
        return f"stdout: {self._seen}\nstderr: {''.join(self._errors)}"

    def signal(self, number: int) -> None:
        """Send it a signal, and nobody else."""
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Send a signal to all its processes, as a terminal does."""
        os.killpg(self.pid, number)

    def finish(self, timeout_s: float = 1.5 * DEADLINE_S) -> ScriptResult:
        """Wait for its end; fails the test when it does not come, or when it leaves processes
        that hold its output open."""
        try:
            self._process.wait(timeout_s)
            for reader in self._readers:
                reader.join(timeout_s)
                if reader.is_alive():
                    raise AssertionError(f"processes of the script live on; {self._all()}")
        except subprocess.TimeoutExpired:
            self._abort()
            raise AssertionError(f"the script did not end; {self._all()}") from None
        finally:
            self.kill()
        while (line := self._lines.get()) is not None:
            self._seen.append(line)
        assert self._process.returncode is not None
        output = "".join(f"{line}\n" for line in self._seen)
        return ScriptResult(self._process.returncode, output, "".join(self._errors))

    def _abort(self) -> None:
        """Have it say where it hangs, and end it."""
        kill(self.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self.kill()

    def kill(self) -> None:
        """End it and its processes by force, if they are still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for reader in self._readers:
            reader.join(5)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()


def script_environment(folder: Path) -> dict[str, str]:
    """Output is buffered as usual; temporary files go where a test can count them."""
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment["TMPDIR"] = str(folder)
    return environment


def run_script(
    path: Path, body: str, *options: str, environment: dict[str, str] | None = None
) -> ScriptResult:
    """Run a program to its end."""
    with Script(path, body, *options, environment=environment) as script:
        return script.finish()


@poolray.remote
def remote_successor(number: int) -> int:
    return number + 1


@poolray.remote
def remote_hold(started: Gate, release: Gate, value: Any = None) -> Any:
    return announce_and_hold(started, release, value)


@poolray.remote
def remote_pid() -> int:
    return os.getpid()


@poolray.remote
def remote_die(how: str, directory: Path) -> None:
    leave_mark(directory, how)
    die(how)
