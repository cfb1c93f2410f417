"""What the head's and the nodes' daemons have in common: start, log, end.

What: reads options, reports that the daemon is up, ends it on a signal, watches who started it.
Who calls: `main` of each daemon.
May touch: the process's streams, signals, files.
Invariants: whoever starts a daemon hears exactly once of it: that it is up, or why not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, TypeVar, final

import msgspec

from poolray.cluster import places
from poolray.cluster.options import Ready
from poolray.exceptions import PoolrayError

if TYPE_CHECKING:
    from poolray.local.reactor import Reactor

T = TypeVar("T")
_logger = logging.getLogger(__name__)


def read_options(kind: type[T]) -> T:
    """What the daemon is to do, from its standard input."""
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)


def detach(session_folder: str, name: str) -> None:
    """No terminal: what is printed goes to files, and nothing is read."""
    logs = os.path.join(session_folder, "logs")
    os.makedirs(logs, mode=0o700, exist_ok=True)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, suffix in ((1, "out"), (2, "err")):
        path = os.path.join(logs, f"{name}.{suffix}")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    places.log_to(session_folder, name)
    # Where a daemon hangs, `kill -USR1` writes to its .err file.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def report(descriptor: int, ready: Ready) -> None:
    """Tell who started us, if anybody waits for it."""
    if descriptor < 0:
        return
    with contextlib.suppress(BrokenPipeError):  # it did not wait
        os.write(descriptor, msgspec.json.encode(ready) + b"\n")
    os.close(descriptor)


def report_failure(descriptor: int, error: BaseException) -> None:
    """Tell who started us that it failed, and why."""
    _logger.error("the daemon does not start: %s", error, exc_info=True)
    text = str(error)
    if not isinstance(error, (PoolrayError, OSError, ValueError)):
        text = "".join(traceback.format_exception(error))[-4000:]
    kind = type(error).__name__
    report(
        descriptor, Ready(pid=os.getpid(), address="", socket_name="", error=text, error_kind=kind)
    )


def start_again(options: msgspec.Struct) -> None:
    """Become a new daemon with the same options: a dead node's id is dead for good."""
    descriptor = os.memfd_create("poolray-options", 0)
    os.write(descriptor, msgspec.json.encode(options))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    os.execv(sys.executable, [sys.executable, "-m", "poolray.cluster", "node", "-1"])


def on_stop(stop: Callable[[], None]) -> None:
    """Call this once, from the main thread, when the daemon is asked to end."""

    def handle(number: int, frame: FrameType | None) -> None:
        _logger.info("signal %d: the daemon ends", number)
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal that it was started in
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; -1 where there are none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def wait_readable(descriptors: list[int], timeout_s: float | None) -> list[int]:
    """Which of these can be read, after waiting."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    timeout_ms = None if timeout_s is None else max(0.0, timeout_s) * 1000.0
    return [descriptor for descriptor, _ in poller.poll(timeout_ms)]


def owner_pidfd(pid: int, stop: Callable[[], None]) -> int:
    """As `pidfd`, of whoever started this daemon; calls `stop` if that one has ended already, for
    nothing would ever tell of it.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        _logger.info("whoever started this daemon is gone already: it ends")
        stop()
    except (AttributeError, OSError):
        pass  # where there are none, `poolray stop` ends it
    return -1


@final
class Polled:
    """A descriptor among what the reactor polls, whose owner looks himself what it has."""

    def __init__(self, descriptor: int, on_news: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._on_news = on_news

    def fileno(self) -> int:
        """What to poll."""
        return self._descriptor

    def answer(self) -> None:
        """It may have something."""
        self._on_news(self._descriptor)


@final
class Owner:
    """Whoever started this daemon, and whose end is its end."""

    def __init__(self, pid: int, reactor: Reactor, stop: Callable[[], None]) -> None:
        self._descriptor = owner_pidfd(pid, stop)
        self._reactor = reactor
        self._stop = stop
        if self._descriptor >= 0:
            reactor.watch_other(self, self)  # type: ignore[arg-type]

    def fileno(self) -> int:
        """What to poll."""
        return self._descriptor

    def answer(self) -> None:
        """It has ended."""
        _logger.info("whoever started this daemon is gone: it ends")
        self._reactor.unwatch_other(self)  # type: ignore[arg-type]
        self._stop()


def close_network_sockets() -> None:
    """A fork server must not keep connections of the daemon open: peers see its end by theirs."""
    for name in os.listdir("/proc/self/fd"):
        try:
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket, or gone: it was the listing's own
        with duplicate:
            if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                os.close(int(name))
