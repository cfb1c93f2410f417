"""A window through which other processes of the same user look at a driver's memory.

    poolray memory ──connect──▶ listener (abstract Unix socket) ──▶ whoever leads the reactor
                   ◀─ descriptor of an unnamed file that holds the table ─┘

What: `Inspection`, the driver's end; `drivers` and `ask`, the end of the command line.
Who calls: the runtime; `poolray/__main__.py`.
May touch: sockets, unnamed files, /proc.
Invariants: the driver reads nothing that a caller sends, and never waits for one, so there is no
request that could hurt it; it answers processes of its own user (and root's) only. The socket has
no name in the file system and goes with the driver, however that ends.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from collections.abc import Callable
from typing import final

import msgspec

from poolray.exceptions import PoolrayError
from poolray.protocol.memory import MEMORY_TABLE_VERSION, MemoryTable

#: Objects that are listed at the most: the driver does nothing else while it makes the table.
LIMIT = 10_000

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_TIME = struct.Struct("@ll")  # seconds, microseconds; all zero would mean: no limit
_GREETING = b"poolray-memory-%d" % MEMORY_TABLE_VERSION
_REFUSAL = b"poolray-refused"
#: Callers that may wait in line; those after them wait to be let in.
_LINE_MAX = 16
#: Callers that are answered before other work gets its turn.
_CALLERS_MAX = 4


def is_supported() -> bool:
    """Whether the system has sockets without a place in the file system."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


@final
class Inspection:
    """Answers who asks for the memory of this process's runtime.

    Parameters
    ----------
    suffix : str
        Tells the runtimes of a process apart.
    make_table : callable
        Gives the table; called in the thread that leads the reactor.

    Raises
    ------
    OSError
        There is no socket to be had.
    """

    def __init__(self, suffix: str, make_table: Callable[[], MemoryTable]) -> None:
        self._make_table = make_table
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.listener.setblocking(False)
            self.listener.bind(f"\0poolray-{os.getuid()}-{os.getpid()}-{suffix}")
            self.listener.listen(_LINE_MAX)
        except BaseException:
            self.listener.close()
            raise

    def answer(self) -> None:
        """Answer some of those who wait; under no lock."""
        for _ in range(_CALLERS_MAX):
            try:
                caller, _ = self.listener.accept()
            except OSError:
                return  # nobody (any more), or it was closed
            with caller:
                self._answer(caller)

    def _answer(self, caller: socket.socket) -> None:
        try:
            caller.setblocking(False)
            if _uid_of(caller) not in (os.getuid(), 0):
                caller.send(_REFUSAL)
                return
            descriptor = _unnamed_file(msgspec.msgpack.encode(self._make_table()))
            try:
                socket.send_fds(caller, [_GREETING], [descriptor])
            finally:
                os.close(descriptor)
        except (OSError, RuntimeError, PoolrayError):
            # The caller has gone, or there are no descriptors left, or the runtime ends: whoever
            # leads waits for something else, and must not fail for this.
            pass

    def close(self) -> None:
        """Answer nobody any more."""
        self.listener.close()


def _uid_of(peer: socket.socket) -> int:
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid


def _unnamed_file(data: bytes) -> int:
    descriptor = os.memfd_create("poolray-table", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


# ---- the caller's end ----------------------------------------------------------------------------


def drivers() -> dict[int, list[str]]:
    """Process ids of this user's drivers on this machine, with the names of their sockets."""
    found: dict[int, list[str]] = {}
    pattern = re.compile(rf" @(poolray-{os.getuid()}-(\d+)-[0-9a-f]+)$")
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            for line in table:
                if match := pattern.search(line.rstrip("\n")):
                    names = found.setdefault(int(match[2]), [])
                    if match[1] not in names:  # a connection has its listener's name
                        names.append(match[1])
    except FileNotFoundError:
        pass  # not Linux: no drivers can be found
    return dict(sorted(found.items()))


def ask(name: str, timeout_s: float) -> MemoryTable:
    """The table of the driver whose socket has this name.

    Raises
    ------
    PoolrayError
        It does not answer in time, refuses, belongs to somebody else, or is of another version.
    """
    pid = name.split("-")[2]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            # Not `settimeout`: without blocking, `connect` fails at once while others wait in line.
            limit = _TIME.pack(*divmod(max(1, int(timeout_s * 1e6)), 1_000_000))
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, limit)
            connection.connect("\0" + name)
            if _uid_of(connection) != os.getuid():
                raise PoolrayError(f"What answers for process {pid} belongs to another user.")
            text, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
    except (BlockingIOError, TimeoutError):
        raise PoolrayError(
            f"Process {pid} did not answer within {timeout_s:g} s: it is stopped, or runs code "
            "that does not let go of the interpreter."
        ) from None
    except OSError as error:
        raise PoolrayError(f"Process {pid} cannot be asked: {error}") from error
    return _read_answer(pid, text, descriptors)


def _read_answer(pid: str, text: bytes, descriptors: list[int]) -> MemoryTable:
    try:
        if text != _GREETING or not descriptors:
            raise PoolrayError(
                f"Process {pid} gave no table of version {MEMORY_TABLE_VERSION}"
                + (f" but said {text.decode(errors='replace')!r}." if text else ".")
            )
        with open(os.dup(descriptors[0]), "rb") as file:
            return msgspec.msgpack.decode(file.read(), type=MemoryTable)
    except (OSError, msgspec.MsgspecError) as error:
        raise PoolrayError(f"The answer of process {pid} cannot be read: {error}") from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
