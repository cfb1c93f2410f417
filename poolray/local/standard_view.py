"""Where the standard library's view of processes meets ours.

What: start methods that programs ask for, worker processes as programs look at them.
Who calls: `pool.py`, `executor.py`.
May touch: processes, by signals.
Invariants: what `multiprocessing` would answer is answered.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any, final


@final
class WorkerView:
    """A worker process as `Pool._pool` shows it."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid = pid
        self.ident = pid
        self.name = name
        self.daemon = True

    def is_alive(self) -> bool:
        """Whether the process is there."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return True

    @property
    def exitcode(self) -> int | None:
        """None while it lives."""
        return None if self.is_alive() else 0

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_alive() and (deadline is None or time.monotonic() < deadline):
            time.sleep(0.001)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        import signal

        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        import signal

        os.kill(self.pid, signal.SIGKILL)

    def __repr__(self) -> str:
        return f"<{self.name} pid={self.pid}>"


def workers_are_daemons(context: Any) -> bool:
    """Whether workers may have no children of `multiprocessing`: true, unless the context's own
    process class says otherwise (a widespread recipe).
    """
    from multiprocessing.process import BaseProcess

    process_class: Any = getattr(context, "Process", None)
    daemon: Any = getattr(process_class, "daemon", None)
    if not isinstance(daemon, property) or daemon is BaseProcess.daemon or daemon.fget is None:
        return True
    try:
        return bool(daemon.fget(object.__new__(process_class)))
    except Exception:
        return True  # it needs more than we can give it: the usual answer


def start_method(context: Any) -> str:
    """The start method that a context, or the program, asks for.

    Raises
    ------
    ValueError
        An unknown start method.
    """
    if context is not None:
        method = context.get_start_method()
    else:
        method = multiprocessing.get_start_method(allow_none=True) or "fork"
    if method not in ("fork", "spawn", "forkserver"):
        raise ValueError(f"unknown start method {method!r}: use fork, spawn or forkserver")
    return str(method)


def streams_are_replaced() -> bool:
    """Whether `sys.stdout` is something else than the process's own (a notebook, a capture)."""
    import sys

    return sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__
