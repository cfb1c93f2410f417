"""What makes a forked process a worker, and what it does before it leaves.

What: signals, standard streams, the identity that `multiprocessing` shows, exit handlers.
Who calls: `run_worker`.
May touch: signals, standard streams, module state of the standard library.
Invariants: nothing of the driver's runtime stays usable by mistake; exit handlers that a worker's
own code registered run, those of the driver do not.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import itertools
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, final

import msgspec

from poolray.ids import TaskId, WorkerId
from poolray.local import news
from poolray.local.log_files import LogFile, log_name
from poolray.objects.serialization import remember_main
from poolray.protocol.worker import WorkerOutput

if TYPE_CHECKING:
    from poolray.local.fork_server import WorkerSetup
    from poolray.local.worker_client import WorkerClient


#: The standard library's module and the package that grew out of it, where a program uses it.
_FAMILIES = ("multiprocessing", "multiprocess")

#: Characters in a packet of forwarded text; four bytes each fit in any channel.
_OUTPUT_PART = 16 * 1024
#: Of a line that is not complete, so many characters are kept.
_LINE_CHARS_MAX = 1 << 20
_NO_TASK = TaskId(b"")


def settle(setup: WorkerSetup, number: int, reports: socket.socket, worker_id: WorkerId) -> None:
    """Turn a fresh fork into a worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()
    _set_streams(setup, reports, worker_id)
    if setup.name_prefix:
        name = f"{setup.name_prefix}-{number}"
        for family in _FAMILIES:
            if family == "multiprocessing" or f"{family}.process" in sys.modules:
                _set_multiprocessing_identity(family, name, number, setup.daemon)
    remember_main()


def leave() -> None:
    """What a process does at its end, apart from ending."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        for family in _FAMILIES:
            util = sys.modules.get(f"{family}.util")
            if util is not None:
                util._exit_function()  # flushes the queues that tasks wrote to
        atexit._run_exitfuncs()
    except BaseException:
        import traceback

        traceback.print_exc()


def _set_multiprocessing_identity(family: str, name: str, number: int, daemon: bool) -> None:
    """Look like a worker of `multiprocessing`: programs number their workers by this."""
    process: Any = importlib.import_module(f"{family}.process")
    util: Any = importlib.import_module(f"{family}.util")
    current: Any = process.BaseProcess.__new__(process.BaseProcess)
    parent: Any = process.current_process()
    current._identity = (*getattr(parent, "_identity", ()), number)
    current._config = {**parent._config, "daemon": daemon}
    current._parent_pid = os.getppid()
    current._parent_name = parent.name
    current._popen = None
    current._closed = False
    current._name = name
    current._target = None
    current._args = ()
    current._kwargs = {}
    process._current_process = current
    process._parent_process = process._ParentProcess(parent.name, os.getppid(), None)
    process._process_counter = itertools.count(1)
    process._children = set()
    util._finalizer_registry.clear()
    util._run_after_forkers()


def install_client(client: WorkerClient, setup: WorkerSetup) -> None:
    """User code in this process reaches the node through this client."""
    from poolray.local import process_state

    client.api.install()
    news.install(client.link.send_news)
    process_state.install_worker(client.api, setup)


def _set_streams(setup: WorkerSetup, reports: socket.socket, worker_id: WorkerId) -> None:
    if setup.discard_output:
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        return
    if setup.forward_output:
        writer = _Writer(setup, worker_id) if setup.label_output else None
        sys.stdout = _ForwardedStream(1, reports, writer)
        sys.stderr = _ForwardedStream(2, reports, writer)
        _forwarded[:] = [] if writer is None else [sys.stdout, sys.stderr]
        return
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        except (AttributeError, ValueError, io.UnsupportedOperation):
            pass  # replaced by the program: it knows what it wants
    if setup.prefix_output:
        sys.stdout = PrefixedStream(sys.stdout)
        sys.stderr = PrefixedStream(sys.stderr)


@final
class _Writer:
    """Who writes, where whoever shows the text has to be told: in a cluster."""

    def __init__(self, setup: WorkerSetup, worker_id: WorkerId) -> None:
        self.job_id = setup.job_id
        self.worker_id = worker_id
        #: stream -> the worker's own file for it, if it has one.
        self._files: dict[int, LogFile] = {}
        if setup.log_folder:
            self._open_files(setup)

    def _open_files(self, setup: WorkerSetup) -> None:
        """What libraries and programs write to the descriptors goes there as well."""
        for stream, suffix in ((1, "out"), (2, "err")):
            name = log_name(self.worker_id, self.job_id, os.getpid(), suffix)
            try:
                path = os.path.join(setup.log_folder, name)
                file = self._files[stream] = LogFile(path, setup.config.worker_log_max_bytes)
                file.stand_in_for(stream)
            except OSError:
                return  # the disk is full, or the folder is gone: work goes on without

    def stray(self, stream: int) -> WorkerOutput | None:
        """Word of what programs and libraries have written past us, if they have."""
        file = self._files.get(stream)
        end = 0 if file is None else file.stray_end()
        return self._said(stream, "", end, 0) if end else None

    def output(self, stream: int, text: str) -> WorkerOutput:
        """A text, once it is in the file."""
        file, data = self._files.get(stream), text.encode()
        return self._said(stream, text, 0 if file is None else file.write(data), len(data))

    def _said(self, stream: int, text: str, log_end: int, log_bytes: int) -> WorkerOutput:
        from poolray.local import process_state

        return WorkerOutput(
            stream=stream,
            text=text,
            source=threading.get_native_id(),
            label=process_state.output_label(),
            pid=os.getpid(),
            job_id=self.job_id,
            worker_id=self.worker_id,
            task_id=process_state.current_task_id() or _NO_TASK,
            log_end=log_end,
            log_bytes=log_bytes,
        )


@final
class _ForwardedStream(io.TextIOBase):
    """Text that belongs to the driver's stream object, line by line."""

    def __init__(self, number: int, reports: socket.socket, writer: _Writer | None) -> None:
        self._number = number
        self._reports = reports
        self._writer = writer
        self._pending = ""
        self._encode = msgspec.msgpack.Encoder().encode

    def write(self, text: str) -> int:
        """Keep text until its line is complete: `print` writes the end of a line by itself, and
        what others print must not come between.
        """
        self._pending += text
        if "\n" in text or len(self._pending) > _LINE_CHARS_MAX:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Send what there is."""
        text, self._pending = self._pending, ""
        if not text:
            return
        if self._writer is not None:
            output = self._writer.output(self._number, text)
        else:
            source = threading.get_native_id()
            output = WorkerOutput(stream=self._number, text=text, source=source)
        for start in range(0, len(text), _OUTPUT_PART):
            end = start + _OUTPUT_PART
            part = output
            if len(text) > _OUTPUT_PART:
                part = msgspec.structs.replace(
                    output, text=text[start:end], unfinished=end < len(text)
                )
            try:
                self._reports.send(self._encode(part))
            except OSError:
                return  # the driver is gone: nobody reads

    def tell_stray(self) -> None:
        """What was written past Python is to come before what is reported next."""
        said = None if self._writer is None else self._writer.stray(self._number)
        if said is not None:
            with contextlib.suppress(OSError):  # the daemon is gone: nobody reads
                self._reports.send(self._encode(said))

    def writable(self) -> bool:
        """Yes."""
        return True


#: Of this worker, where somebody else shows what is written to its descriptors.
_forwarded: list[_ForwardedStream] = []


def flush_output() -> None:
    """Before a result is sent: whoever has it may end this process at once."""
    for forwarded in _forwarded:
        forwarded.tell_stray()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass  # closed, absent, or replaced by the program: not worth its result
    news.flush()


@final
class PrefixedStream(io.TextIOBase):
    """Begins each line with the running task's name and the worker's pid.

    The lines go straight to the process's descriptor, whole, so that lines of several workers do
    not mix and nothing is lost when a worker dies.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pending = ""
        #: The last line that was written is not finished: what follows belongs to it.
        self._in_line = False

    def write(self, text: str) -> int:
        """Keep text until its line is complete."""
        self._pending += text
        if "\n" in text:
            lines, _, self._pending = self._pending.rpartition("\n")
            self._emit(lines + "\n")
            self._in_line = False
        return len(text)

    def flush(self) -> None:
        """Write an unfinished line out as far as it goes."""
        if self._pending:
            rest, self._pending = self._pending, ""
            self._emit(rest)
            self._in_line = True
        self._stream.flush()

    def _emit(self, text: str) -> None:
        from poolray.local import process_state

        name = process_state.output_label()
        head = f"\x1b[36m({name} pid={os.getpid()})\x1b[0m " if name else ""
        lines = text.splitlines(keepends=True)
        if self._in_line:
            first, lines = lines[:1], lines[1:]
        else:
            first = []
        self._stream.write("".join([*first, *(head + line for line in lines)]))
        self._stream.flush()

    def fileno(self) -> int:
        """The descriptor behind it."""
        return int(self._stream.fileno())

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return bool(self._stream.isatty())

    def writable(self) -> bool:
        """Yes."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return str(self._stream.encoding)

    @property
    def buffer(self) -> Any:
        """The binary stream behind it, without prefixes."""
        return self._stream.buffer


def exit_code_of(error: SystemExit) -> int:
    """The code that a process ends with."""
    if isinstance(error.code, int):
        return error.code & 0xFF
    if error.code is None:
        return 0
    sys.stderr.write(f"{error.code}\n")
    return 1


def end_by_force() -> None:
    """A task is stopped by force: what it has printed arrives."""
    flush_output()
    os.kill(os.getpid(), signal.SIGKILL)
