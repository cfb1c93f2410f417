"""The fork server: a single-threaded child of the driver that forks every worker of one group.

    driver ──ForkWorker + 2 descriptors──▶ fork server ──fork──▶ worker ──▶ …
    driver ◀──WorkerStarted, WorkerExited── fork server          │
    driver ◀────────────── results, on the report channel ───────┘

What: forks on request in a few milliseconds, reports exits, and kills its workers when the driver
dies. A forked server has the driver's modules and globals as they were when it was made; a spawned
one is a fresh interpreter that has imported the driver's `__main__` as multiprocessing does.
Who calls: `local/workers.py` starts it; it runs `serve` and never returns.
May touch: processes, sockets, signals.
Invariants: it has one thread and imports nothing that makes others; all its children die with it
(`PR_SET_PDEATHSIG`); it dies within a poll of its driver.
"""

from __future__ import annotations

import _thread
import gc
import io
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, final

import msgspec

from poolray.config import Config
from poolray.ids import PLAIN_TASKS, GroupId, WorkerId
from poolray.local.channel import make_channel, receive_descriptors
from poolray.objects.serialization import descriptor_reducers, dumps_function
from poolray.objects.shared_memory import Arena
from poolray.protocol.worker import (
    ForkServerFailed,
    ForkServerReady,
    ForkWorker,
    KillWorker,
    StopForkServer,
    ToForkServer,
    WorkerExited,
    WorkerStarted,
)

_PR_SET_PDEATHSIG = 1
_POLL_FALLBACK_MS = 200
#: A handler that blocks for longer (a slow network) is not waited for.
_HANDLERS_WAIT_S = 0.5


class WorkerExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of workers does beyond running calls; see `local/worker_extras.py`."""

    #: Makes a worker's state, which its calls are given before their own arguments; None: no state.
    make_state: Callable[[], Any] | None = None
    #: Called with the state, if there is one, before the first call …
    init: Callable[..., object] | None = None
    #: … and after the last one, when the worker leaves politely; the driver gets what it gives.
    exit: Callable[..., Any] | None = None
    measures: bool = False  #: note how long calls take


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker of a group is made with; inherited by a fork, pickled to a spawned one."""

    config: Config
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    extras: WorkerExtras | None = None  #: None, the usual case: nothing but calls
    #: Prefix of the names of workers as `multiprocessing.current_process()` shows them; empty for
    #: the workers of plain tasks.
    name_prefix: str = ""
    #: What `multiprocessing.current_process().daemon` says in a worker.
    daemon: bool = True
    first_number: int = 1
    #: Lines that tasks print carry the task's name and the worker's pid.
    prefix_output: bool = False
    discard_output: bool = False  #: what tasks print goes nowhere
    #: Send what is written to `sys.stdout` and `sys.stderr` to the driver's, which are not the
    #: process's own descriptors (a notebook, a captured stream).
    forward_output: bool = False
    #: With `forward_output`: say which task or actor wrote it, in which process, for which job.
    label_output: bool = False
    #: Where each worker has files of its own for what it writes; empty: it has none, and the fork
    #: server's descriptors are its.
    log_folder: str = ""
    #: The workers that run the plain tasks which this group's workers submit.
    tasks_group: GroupId = PLAIN_TASKS
    shared_globals: str | None = None
    #: Log what the initializer raised to `concurrent.futures`, as the standard executor does,
    #: instead of printing it.
    log_initializer_error: bool = False
    node_id: bytes = b""
    job_id: bytes = b""
    namespace: str = ""
    labels: dict[str, str] = {}  #: of the node
    head_address: str = ""  #: of the cluster; empty without one
    #: Tells this machine from others, and the address by which callers elsewhere come directly to
    #: actors; both empty without a cluster, where there is nothing elsewhere.
    machine: str = ""
    direct_host: str = ""
    direct_ports: list[int] = []  #: that they may come by; empty: any
    #: Resource name -> the variable that makes devices of it visible; empty where none does.
    accelerators: dict[str, str] = {}


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies (Linux; elsewhere sockets tell)."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@final
class _Child:
    """A worker process of this server."""

    __slots__ = ("descriptor", "pid", "worker_id")

    def __init__(self, worker_id: WorkerId, pid: int) -> None:
        self.worker_id = worker_id
        self.pid = pid
        self.descriptor = _open_pid(pid)


def _open_pid(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 where there are none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


@final
class ForkServer:
    """The server's loop."""

    def __init__(
        self,
        commands: socket.socket,
        reports: socket.socket,
        arena: Arena,
        setup: WorkerSetup,
        driver_pid: int,
    ) -> None:
        self._commands = commands
        self._reports = reports
        self._arena = arena
        self._setup = setup
        self._driver_pid = driver_pid
        self._driver_descriptor = _open_pid(driver_pid)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToForkServer).decode
        self._children: dict[WorkerId, _Child] = {}
        self._forked = 0
        self._stop_asked = False

    def serve(self) -> NoReturn:
        """Fork on request until told to stop or until the driver is gone."""
        signal.signal(signal.SIGINT, _ignore_interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.freeze()  # what is inherited stays shared: no collection writes to its pages
        while not self._stop_asked:
            self._wait()
        self._kill_all()
        os._exit(0)

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._commands, select.POLLIN)
        children = {c.descriptor: c for c in self._children.values() if c.descriptor >= 0}
        for descriptor in children:
            poller.register(descriptor, select.POLLIN)
        if self._driver_descriptor >= 0:
            poller.register(self._driver_descriptor, select.POLLIN)
        complete = len(children) == len(self._children) and self._driver_descriptor >= 0
        for descriptor, _ in poller.poll(None if complete else _POLL_FALLBACK_MS):
            if descriptor == self._commands.fileno():
                self._on_command()
            elif descriptor in children:
                self._reap(children[descriptor])
            else:
                self._stop_asked = True  # the driver is gone
        if not complete:
            self._look_around()

    def _look_around(self) -> None:
        """Where there are no pid descriptors: ask about each process in turn."""
        if os.getppid() != self._driver_pid:
            self._stop_asked = True
        for child in [c for c in self._children.values() if c.descriptor < 0]:
            self._reap(child)

    def _on_command(self) -> None:
        try:
            packet, descriptors = receive_descriptors(self._commands, 2)
        except ConnectionResetError:
            packet, descriptors = b"", []  # the driver died with commands or news unread
        if not packet:
            self._stop_asked = True
            return
        match self._decode(packet):
            case ForkWorker() as command:
                self._fork(command, descriptors)
            case KillWorker(worker_id=worker_id):
                child = self._children.get(worker_id)
                if child is not None:
                    os.kill(child.pid, signal.SIGKILL)
            case StopForkServer():
                self._stop_asked = True

    def _fork(self, command: ForkWorker, descriptors: list[int]) -> None:
        self._forked += 1
        number = self._setup.first_number + self._forked - 1
        server_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            sys.stderr.write(f"poolray: cannot fork a worker: {error}\n")
            self._tell(WorkerExited(worker_id=command.worker_id, pid=0, exit_code=255))
            return
        if pid == 0:
            self._become_worker(command, descriptors, number, server_pid)
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[command.worker_id] = _Child(command.worker_id, pid)
        self._tell(WorkerStarted(worker_id=command.worker_id, pid=pid))

    def _become_worker(
        self, command: ForkWorker, descriptors: list[int], number: int, server_pid: int
    ) -> NoReturn:
        """In the child. It inherits all that the server has and closes what is the server's."""
        code = 1
        try:
            die_with_parent()
            if os.getppid() != server_pid:
                os._exit(1)  # the server died before the kernel knew our wish
            self._commands.close()
            for child in self._children.values():
                if child.descriptor >= 0:
                    os.close(child.descriptor)
            if self._driver_descriptor >= 0:
                os.close(self._driver_descriptor)
            from poolray.local.worker import run_worker

            tasks, control = (socket.socket(fileno=descriptor) for descriptor in descriptors)
            code = run_worker(
                command, tasks, control, self._reports, self._arena, self._setup, number
            )
        except BaseException:
            traceback.print_exc()
        finally:
            _flush_streams()
            os._exit(code)

    def _reap(self, child: _Child) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid == 0:
            return
        del self._children[child.worker_id]
        if child.descriptor >= 0:
            os.close(child.descriptor)
        code = os.waitstatus_to_exitcode(status)
        self._tell(
            WorkerExited(
                worker_id=child.worker_id,
                pid=child.pid,
                exit_code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
            )
        )

    def _tell(self, message: WorkerStarted | WorkerExited) -> None:
        try:
            self._commands.send(self._encode(message))
        except OSError:
            self._stop_asked = True  # the driver closed its end: nobody wants workers any more

    def _kill_all(self) -> None:
        for child in self._children.values():
            os.kill(child.pid, signal.SIGTERM)
        give_up_ms = 500 if os.getppid() == self._driver_pid else 100
        for child in self._children.values():
            if not _ended_within(child, give_up_ms):
                os.kill(child.pid, signal.SIGKILL)
                give_up_ms = 10
                os.waitpid(child.pid, 0)


def _ended_within(child: _Child, timeout_ms: int) -> bool:
    """Wait for a child's end for a short time; reaps it."""
    if child.descriptor >= 0:
        poller = select.poll()
        poller.register(child.descriptor, select.POLLIN)
        poller.poll(timeout_ms)
    pid, _ = os.waitpid(child.pid, os.WNOHANG)
    return pid != 0


def _ignore_interrupt(signal_number: int, frame: object) -> None:
    """Ctrl-C is the driver's affair. A handler, not SIG_IGN: programs that a task starts must not
    inherit the deafness.
    """


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed or absent: there is nothing to lose


def fork_from_driver(arena: Arena, setup: WorkerSetup) -> tuple[int, socket.socket, socket.socket]:
    """Fork a server off the calling process.

    Returns
    -------
    pid : int
    commands : socket
        Commands to the server and its news.
    reports : socket
        What its workers say.

    Notes
    -----
    Only the calling thread lives on in the child, so locks that other threads hold stay held
    there. The interpreter makes its own anew (import, threading, logging, streams); ours are not
    used by the server, which is why this is safe in a driver that runs threads.
    """
    commands, server_commands = make_channel()
    reports, server_reports = make_channel()
    driver_pid = os.getpid()
    _flush_streams()  # or both processes would write what is buffered
    pid = _fork_quietly()
    if pid == 0:
        code = 1
        try:
            commands.close()
            reports.close()
            _detach_from_terminal_input()
            _renew_output_streams()
            ForkServer(server_commands, server_reports, arena, setup, driver_pid).serve()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    server_commands.close()
    server_reports.close()
    return pid, commands, reports


def _fork_quietly() -> int:
    """Fork without the warning about threads: see the note on `fork_from_driver`."""
    import warnings

    held = _hold_log_handlers()
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        if os.getpid() == parent:  # in the child logging has made its locks anew
            for lock in held:
                lock.release()


def _hold_log_handlers() -> list[Any]:
    """Locks of all log handlers, held so that no thread is in the middle of writing a record: the
    lock inside its file object, which nobody can make anew, would stay held in the child.
    """
    logging = sys.modules.get("logging")
    if logging is None or not _has_threads():
        return []
    held = []
    deadline = time.monotonic() + _HANDLERS_WAIT_S
    for reference in list(logging._handlerList):
        handler = reference()
        lock = getattr(handler, "lock", None)
        if lock is not None and lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            held.append(lock)
    return held


def _has_threads() -> bool:
    """Whether another thread runs, or may.

    `sys._current_frames` would know for sure; but up to CPython 3.11 a collection of garbage may
    begin in it, and wait for ever for a thread that is about to end (gh-106883).
    """
    # (A thread that was not made by Python is known once it has logged something.)
    return _thread._count() > 0 or threading.active_count() > 1


def _detach_from_terminal_input() -> None:
    """Workers have no standard input: two processes must not read one terminal."""
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as we do
    except OSError:
        pass  # no /dev/null in this container: tasks that read input fail on their own


#: Streams that were replaced below; were they collected, they would write what they hold.
_inherited_streams: list[Any] = []


def _renew_output_streams() -> None:
    """Output of this process has a buffer and a lock of its own: a thread of the driver may have
    held the inherited lock at the fork, and what it had buffered must not be written twice.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue  # replaced by the program
        try:
            raw = io.FileIO(stream.fileno(), "w", closefd=False)
            renewed = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=True,
                write_through=stream.write_through,
            )
        except (AttributeError, OSError, ValueError):
            continue  # closed, or no descriptor behind it
        _inherited_streams.append(stream)
        setattr(sys, name, renewed)
        setattr(sys, f"__{name}__", renewed)


def spawn_from_driver(
    arena: Arena, setup: WorkerSetup, preparation: dict[str, Any]
) -> tuple[int, socket.socket, socket.socket]:
    """Start a server in a fresh interpreter, as `multiprocessing`'s spawn does.

    Parameters
    ----------
    preparation : dict
        What `multiprocessing.spawn.get_preparation_data` says of this process.

    Notes
    -----
    Everything in `setup` is pickled; locks and queues of multiprocessing may be among it.
    """
    import subprocess

    commands, server_commands = make_channel()
    reports, server_reports = make_channel()
    passed = [server_commands.fileno(), server_reports.fileno(), arena.descriptor]
    payload, inherited = _pickle_for_child(setup, preparation, arena.capacity_bytes, passed)
    _flush_streams()
    # The search path first: the program may have found poolray by a path that it added itself.
    code = f"import sys; sys.path[:] = {sys.path!r}; {_SPAWN_CODE}"
    process = subprocess.Popen(
        [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", code],  # type: ignore[attr-defined]
        stdin=subprocess.PIPE,
        pass_fds=[*passed, *inherited],
        env={**os.environ, "POOLRAY_SPAWNED_SERVER": "1"},
    )
    assert process.stdin is not None
    try:
        process.stdin.write(payload)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once: the end of its command channel tells
    server_commands.close()
    server_reports.close()
    process.returncode = 0  # the runtime reaps it by its pid: Popen must not warn or wait
    return process.pid, commands, reports


_SPAWN_CODE = "from poolray.local.fork_server import main; main()"


@final
class _SpawningPopen:
    """Stands for the process being made while `multiprocessing` primitives are pickled."""

    def __init__(self) -> None:
        self.inherited: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        """The number under which the child has a descriptor: the same."""
        self.inherited.append(descriptor)
        return descriptor

    def DupFd(self, descriptor: int) -> Any:
        """What is pickled in the place of a descriptor that was duplicated."""
        from multiprocessing import popen_spawn_posix

        return popen_spawn_posix._DupFd(descriptor)


def _pickle_for_child(
    setup: WorkerSetup, preparation: dict[str, Any], capacity_bytes: int, passed: list[int]
) -> tuple[bytes, list[int]]:
    from multiprocessing import context, reduction

    popen = _SpawningPopen()
    # A program may share primitives of `multiprocess` as well.
    contexts: list[Any] = [context, sys.modules.get("multiprocess.context")]
    for each in filter(None, contexts):
        each.set_spawning_popen(popen)
    try:
        work = (setup.initializer, setup.initargs, setup.extras)
        stream = io.BytesIO()
        pickler: Any = reduction.ForkingPickler(stream)
        pickler.dispatch_table.update(descriptor_reducers())
        try:
            pickler.dump(work)
            body = stream.getvalue()
            has_main = not preparation.keys().isdisjoint(
                ("init_main_from_path", "init_main_from_name")
            )
            if b"__main__" in body and not has_main:
                raise pickle.PicklingError("the child has no __main__ to refer to")
        except (AttributeError, pickle.PicklingError, TypeError):
            # A lambda, a closure, or a program on standard input.
            body = dumps_function(work, setup.shared_globals)
        plain = msgspec.structs.replace(setup, initializer=None, initargs=(), extras=None)
        head = pickle.dumps((plain, preparation, capacity_bytes, passed, os.getpid()))
    finally:
        for each in filter(None, contexts):
            each.set_spawning_popen(None)
    return len(head).to_bytes(8, "little") + head + body, popen.inherited


def main() -> NoReturn:
    """The whole life of a spawned server."""
    data = sys.stdin.buffer.read()
    head_bytes = int.from_bytes(data[:8], "little")
    setup, preparation, capacity_bytes, passed, driver_pid = pickle.loads(data[8 : 8 + head_bytes])
    commands, reports = socket.socket(fileno=passed[0]), socket.socket(fileno=passed[1])
    for descriptor in passed:
        os.set_inheritable(descriptor, False)
    encode = msgspec.msgpack.Encoder().encode
    _detach_from_terminal_input()
    try:
        names = _prepare(preparation)
        initializer, initargs, extras = pickle.loads(data[8 + head_bytes :])
    except BaseException:
        commands.send(encode(ForkServerFailed(reason=traceback.format_exc(limit=20)[-4000:])))
        os._exit(1)
    setup = msgspec.structs.replace(
        setup, initializer=initializer, initargs=initargs, extras=extras
    )
    arena = Arena(passed[2], capacity_bytes)
    commands.send(encode(ForkServerReady(pid=os.getpid(), main_names=names)))
    ForkServer(commands, reports, arena, setup, driver_pid).serve()


def _prepare(preparation: dict[str, Any]) -> list[str]:
    """Become like the driver as far as a fresh interpreter can, and say what `__main__` offers."""
    from multiprocessing import process, spawn

    from poolray.objects.serialization import main_definitions

    process.current_process()._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare(preparation)
    finally:
        del process.current_process()._inheriting  # type: ignore[attr-defined]
    main = sys.modules["__main__"]
    return sorted(
        name
        for name, value in vars(main).items()
        if getattr(value, "__module__", None) in ("__main__", "__mp_main__")
    ) or sorted(main_definitions())
