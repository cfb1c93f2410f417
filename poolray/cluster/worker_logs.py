"""A node's files of logs: what its workers write is kept within limits; others may read it.

    worker ══appends══▶ its files (`local/log_files.py`) ◀──measures, cuts, removes── WorkerLogs
       └──WorkerOutput(log_end=…)──▶ which part of a file which task has written ─────────┘

What: cuts and removes files as `node/log_book.py` says, lists and reads them for those who ask;
finds what was written there past Python, for the driver.
Who calls: the node's daemon, on its one thread.
May touch: the session's folder of logs, and nothing outside of it whatever is asked for.
Invariants: nothing here raises for a disk that is full or a folder that is gone: logs are lost
then, and no work. What a file has is given to the driver once, in its order.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import stat
from collections.abc import Callable, Iterable
from typing import final

import msgspec

from poolray.config import Config
from poolray.ids import TaskId, WorkerId
from poolray.local.fork_server import WorkerSetup
from poolray.local.log_files import cut, log_name, shift_of
from poolray.local.workers import WorkerHost
from poolray.node.effects import LookIntoLogs
from poolray.node.log_book import Cut, LogBook, Order
from poolray.protocol.node import LogsSeen
from poolray.protocol.state import LogRow, LogTextRow, LogWish, StateKind
from poolray.protocol.worker import WorkerOutput

_logger = logging.getLogger(__name__)

_SUFFIXES = {1: "out", 2: "err"}
#: Of a file in one answer: it fits a worker's channel.
_TEXT_BYTES_MAX = 64 << 10
#: Names in one answer, those written to last, and characters of a pattern.
_NAMES_MAX = 10_000
_PATTERN_CHARS_MAX = 1024
#: How often files are measured that workers write to by themselves.
_MEASURE_S = 5.0
#: How often it is looked for what programs have written.
_LOOK_S = 0.5
#: Of what came past Python before something else, the driver is shown so much, the last.
_STRAY_BYTES_MAX = 256 << 10
#: So much of a file is looked at, at the most: what is more waits for the next look.
_LOOK_BYTES_MAX = 1 << 20


def folder_of(session_folder: str) -> str:
    """Where the logs of a run are."""
    return os.path.join(session_folder, "logs")


@final
class _Told:
    """How much of a file its driver has been told, and in whose name."""

    __slots__ = ("last", "place", "seen", "size_bytes")

    def __init__(self, last: WorkerOutput) -> None:
        #: Who wrote last: what programs write is of the same task or actor, mostly.
        self.last = last
        #: Behind what was told.
        self.place = 0
        #: The end of the file when it was looked at last.
        self.seen = self.size_bytes = 0


@final
class WorkerLogs:
    """The files of one node's workers.

    Parameters
    ----------
    session_folder : str
        Of the run; it has a folder `logs`.
    kept : list of str
        Files of ended workers that an earlier life of this daemon has left.
    """

    def __init__(self, session_folder: str, config: Config, kept: Iterable[str]) -> None:
        self._folder = folder_of(session_folder)
        self._is_on = config.worker_log_max_bytes > 0
        self._book = LogBook(
            config.worker_log_max_bytes,
            config.worker_logs_total_max_bytes,
            config.worker_logs_ended_max,
            # As many as there are listed tasks that may be asked for, for both streams.
            parts_max=2 * config.task_history_max + 1_000,
        )
        self._measured_s = 0.0
        self._has_complained = False
        #: (worker, stream) -> what of a living worker's file was told.
        self._told: dict[tuple[WorkerId, int], _Told] = {}
        self._looked_s = 0.0
        for name in kept:
            self._book.begin(name)
            self._carry_out(self._book.end(name, self._size_of(name)))

    @property
    def worker_folder(self) -> str:
        """Where workers make their files; empty: they make none."""
        return self._folder if self._is_on else ""

    # ---- workers ---------------------------------------------------------------------------------

    def note(self, message: WorkerOutput, task_id: TaskId, attempt: int) -> None:
        """An attempt of a task has written something, which is in its worker's file."""
        if message.log_end:
            suffix = _SUFFIXES[message.stream]
            name = log_name(message.worker_id, message.job_id, message.pid, suffix)
            self._book.wrote(name, task_id, attempt, message.log_end, message.log_bytes)

    def in_order(self, message: WorkerOutput) -> list[WorkerOutput]:
        """A text that a worker has sent, for the driver, after what was written before it past
        Python; without what was told already. One without text says only that there is something.
        """
        if not message.log_end:
            return [message] if message.text else []
        told = self._told_of(message)
        start = message.log_end - message.log_bytes
        found = self._stray(told, start, message) if start > told.place else []
        if message.log_end > told.place:
            if start < told.place:  # the rest was read before this came
                rest = message.text.encode()[told.place - start :].decode(errors="replace")
                message = msgspec.structs.replace(message, text=rest)
            told.place = message.log_end
            if message.text:
                found.append(message)
        return found

    def _told_of(self, message: WorkerOutput) -> _Told:
        key = (message.worker_id, message.stream)
        told = self._told.get(key)
        if told is None:
            told = self._told[key] = _Told(msgspec.structs.replace(message, text=""))
        elif told.last.label != message.label:
            told.last = msgspec.structs.replace(message, text="")
        return told

    def strays(
        self, now: float, hosts: Iterable[WorkerHost], name_of: Callable[[WorkerId], str]
    ) -> list[WorkerOutput]:
        """What was written past Python and nobody has told of, now and then.

        A worker writes to its file before it tells; so only what was there at the last look too.
        What it tells may still come later: then it is told from the file, in order and all of it,
        and what comes is known to have been told.

        Parameters
        ----------
        name_of : callable
            What runs in a worker; empty: nothing, or nobody knows.
        """
        found: list[WorkerOutput] = []
        if not self._is_on or now - self._looked_s < _LOOK_S:
            return found
        self._looked_s = now
        for host in hosts:
            for worker_id, pid in host.pids():
                strays = self._look_at(host.setup, worker_id, pid, is_end=False)
                found += _named(strays, name_of(worker_id)) if strays else strays
        return found

    def _look_at(
        self, setup: WorkerSetup, worker_id: WorkerId, pid: int, *, is_end: bool
    ) -> list[WorkerOutput]:
        found: list[WorkerOutput] = []
        for stream, suffix in _SUFFIXES.items():
            name = log_name(worker_id, setup.job_id, pid, suffix)
            told, size_bytes = self._told.get((worker_id, stream)), self._size_of(name)
            if told is None:
                if not size_bytes:
                    continue
                other = self._told.get((worker_id, 3 - stream))
                told = self._told[worker_id, stream] = _Told(
                    WorkerOutput(
                        stream=stream,
                        text="",
                        source=0,
                        label="" if other is None else other.last.label,
                        pid=pid,
                        job_id=setup.job_id,
                        worker_id=worker_id,
                    )
                )
            if size_bytes == told.size_bytes and told.seen <= told.place:
                continue  # (most files, most of the time)
            told.size_bytes = size_bytes
            before, told.seen = told.seen, self._end_of(name)
            if is_end:
                before = told.seen
            if before > told.place:
                found += self._stray(told, before, told.last, is_end=is_end)
        return found

    def _stray(
        self, told: _Told, end: int, message: WorkerOutput, *, is_end: bool = True
    ) -> list[WorkerOutput]:
        """What a file has from what was told to a place; whole lines, unless that is their end."""
        suffix = _SUFFIXES[message.stream]
        name = log_name(message.worker_id, message.job_id, message.pid, suffix)
        if is_end:
            place = max(told.place, end - _STRAY_BYTES_MAX)
        else:
            place, end = told.place, min(end, told.place + _LOOK_BYTES_MAX)
        wish = LogWish(name=name, start=place, size_bytes=0)
        data, start = b"", wish.start
        while start < end:
            row = self._read(msgspec.structs.replace(wish, start=start, size_bytes=end - start))
            if not row.data:
                break
            data, start = data + row.data, row.start + len(row.data)
        if not is_end:
            whole = data.rfind(b"\n") + 1
            if whole or len(data) < _TEXT_BYTES_MAX:
                start, data = start - len(data) + whole, data[:whole]
        told.place = max(told.place, start)
        text = data.decode(errors="replace")
        if not text:
            return []
        if not text.endswith("\n"):
            text += "\n"
        return [msgspec.structs.replace(message, text=text, log_end=0, log_bytes=0)]

    def _end_of(self, name: str) -> int:
        """The place behind what a file has; 0: it cannot be read."""
        return self._read(LogWish(name=name, start=0, size_bytes=0)).end

    def end(
        self, setup: WorkerSetup, worker_id: WorkerId, pid: int, name: str
    ) -> list[WorkerOutput]:
        """A worker has ended, which ran what has that name; gives what it has left to tell."""
        if not self._is_on or not pid:
            return []
        left = _named(self._look_at(setup, worker_id, pid, is_end=True), name)
        for stream in _SUFFIXES:
            self._told.pop((worker_id, stream), None)
        for file in _names(setup, worker_id, pid):
            self._book.begin(file)  # it may not have lived long enough to be measured
            self._carry_out(self._book.end(file, self._size_of(file)))
        return left

    def tick(self, now: float, hosts: Iterable[WorkerHost]) -> None:
        """Time has passed: now and then look how much workers have written past us."""
        if not self._is_on or now - self._measured_s < _MEASURE_S:
            return
        self._measured_s = now
        for host in hosts:
            for worker_id, pid in host.pids():
                for name in _names(host.setup, worker_id, pid):
                    self._book.begin(name)
        for name in self._book.living():
            self._book.measured(name, self._size_of(name))
        self._carry_out(self._book.orders())

    def kept(self) -> list[str]:
        """Files that stay when this daemon ends."""
        return [*self._book.ended(), *self._book.living()]

    # ---- files -----------------------------------------------------------------------------------

    def _size_of(self, name: str) -> int:
        try:
            return os.lstat(os.path.join(self._folder, name)).st_size
        except OSError:
            return 0

    def _carry_out(self, orders: list[Order]) -> None:
        for order in orders:
            path = os.path.join(self._folder, order.name)
            try:
                if isinstance(order, Cut):
                    cut(path, order.max_bytes)
                    self._book.measured(order.name, self._size_of(order.name))
                else:
                    os.unlink(path)
            except FileNotFoundError:
                pass  # somebody cleaned up
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            _logger.warning("files of what workers print cannot be kept small: %s", error)

    # ---- those who ask ---------------------------------------------------------------------------

    def look(self, effect: LookIntoLogs) -> LogsSeen:
        """List files, or read a part of one."""
        if effect.kind is StateKind.LOGS:
            return LogsSeen(number=effect.number, rows=[*self._list(effect.wish.pattern)])
        return LogsSeen(number=effect.number, rows=[self._read(effect.wish)])

    def _list(self, pattern: str) -> list[LogRow]:
        if len(pattern) > _PATTERN_CHARS_MAX:
            return []
        found: list[tuple[int, str, int]] = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and fnmatch.fnmatchcase(
                        entry.name, pattern
                    ):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, entry.name, status.st_size))
        except OSError:
            pass  # the folder is gone, or a file while we looked
        found.sort()
        return [LogRow(name=name, size_bytes=size) for _, name, size in found[-_NAMES_MAX:]]

    def _read(self, wish: LogWish) -> LogTextRow:
        name = wish.name
        try:
            descriptor = self._open_to_read(name)
        except (OSError, ValueError):
            return _refusal(name, f"there is no file of logs with the name {name[:300]!r}")
        try:
            begin, shift = shift_of(descriptor)
            first, end = begin + shift, os.fstat(descriptor).st_size + shift
            if wish.task_id:
                part = self._book.part(name, wish.task_id, wish.attempt)
                end = max(first, min(end, part[1]))
                first = max(first, min(end, part[0]))
            start = max(first, min(end, wish.start if wish.start >= 0 else end + wish.start))
            size = max(0, min(wish.size_bytes, _TEXT_BYTES_MAX, end - start))
            data = os.pread(descriptor, size, start - shift)
        except OSError as error:
            return _refusal(name, f"{name} cannot be read: {error.strerror}")
        finally:
            os.close(descriptor)
        return LogTextRow(
            name=name,
            data=data,
            start=start,
            first=first,
            end=end,
            is_closed=self._book.is_ended(name),
        )

    def _open_to_read(self, name: str) -> int:
        """A descriptor of a file in the folder of logs; of no other, and of nothing but a file."""
        if not name or "/" in name or name in (os.curdir, os.pardir):
            raise FileNotFoundError(name)
        # (A pipe that somebody made there must not keep us waiting for its other end.)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(os.path.join(self._folder, name), flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(name)
        return descriptor


def _named(strays: list[WorkerOutput], label: str) -> list[WorkerOutput]:
    if not label:
        return strays
    return [msgspec.structs.replace(stray, label=label) for stray in strays]


def _names(setup: WorkerSetup, worker_id: WorkerId, pid: int) -> list[str]:
    return [log_name(worker_id, setup.job_id, pid, suffix) for suffix in _SUFFIXES.values()]


def _refusal(name: str, reason: str) -> LogTextRow:
    return LogTextRow(name=name[:300], data=b"", start=0, first=0, end=0, refusal=reason)
