"""Which files with the output of its workers a node keeps, and how much of each.

    begin ──▶ LIVING ──end──▶ ENDED ──(too many, or too much)──▶ removed
                 └──(longer than its share)──▶ cut: its older half goes

What: knows the files, their sizes and the part of them that each attempt of a task has written;
says which file is to be cut or removed.
Who calls: `cluster/worker_logs.py`, which measures, cuts and removes.
May touch: nothing.
Invariants: once what was ordered is done no file that was measured is longer than its share, no
more than `ended_max` are of ended workers, and all together have at most `total_max_bytes` (as long
as every living file can have `_SHARE_MIN_BYTES`). Parts are named by places, which no cut changes
(`local/log_files.py`).
"""

from __future__ import annotations

from typing import TypeAlias, final

import msgspec

from poolray.ids import TaskId

#: A file is left so much, however many there are.
_SHARE_MIN_BYTES = 64 << 10
_NO_TASK = TaskId(b"")


class Cut(msgspec.Struct, frozen=True):
    """Cut a file that is longer than this; tell what is left with `measured`."""

    name: str
    max_bytes: int


class Remove(msgspec.Struct, frozen=True):
    """Remove a file."""

    name: str


Order: TypeAlias = Cut | Remove


@final
class _File:
    """A file with what a worker writes."""

    __slots__ = ("size_bytes",)

    def __init__(self) -> None:
        self.size_bytes = 0


@final
class LogBook:
    """The files of one node's workers.

    Parameters
    ----------
    file_max_bytes : int
        Of one file, at the most.
    total_max_bytes : int
        Of all of them.
    ended_max : int
        Files of workers that have ended.
    parts_max : int
        Parts of files that are remembered by their tasks.
    """

    __slots__ = (
        "_empty",
        "_ended",
        "_ended_max",
        "_file_max_bytes",
        "_living",
        "_parts",
        "_parts_max",
        "_total_bytes",
        "_total_max_bytes",
    )

    def __init__(
        self, file_max_bytes: int, total_max_bytes: int, ended_max: int, parts_max: int
    ) -> None:
        self._file_max_bytes = file_max_bytes
        self._total_max_bytes = total_max_bytes
        self._ended_max = ended_max
        self._parts_max = parts_max
        #: name -> file that somebody may write to.
        self._living: dict[str, _File] = {}
        #: name -> file that nobody will, in the order of their ends.
        self._ended: dict[str, _File] = {}
        #: Those of them in which there is nothing: they make room first.
        self._empty: dict[str, None] = {}
        #: Of all files.
        self._total_bytes = 0
        #: (file, task, attempt) -> places of its first byte and behind its last one; those that
        #: grew last at the end.
        self._parts: dict[tuple[str, TaskId, int], tuple[int, int]] = {}

    # ---- what happens ----------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """A worker may write to this file from now on; again is no more."""
        if name not in self._living and name not in self._ended:
            self._living[name] = _File()

    def wrote(self, name: str, task_id: TaskId, attempt: int, end: int, count: int) -> None:
        """An attempt of a task has written the `count` bytes before a place."""
        key = (name, task_id, attempt)
        known = self._parts.pop(key, None)
        self._parts[key] = (end - count if known is None else known[0], end)
        if len(self._parts) > self._parts_max:
            del self._parts[next(iter(self._parts))]

    def measured(self, name: str, size_bytes: int) -> None:
        """A file has this many bytes: others write to it as well."""
        file = self._living.get(name) or self._ended.get(name)
        if file is not None:
            self._total_bytes += size_bytes - file.size_bytes
            file.size_bytes = size_bytes

    def end(self, name: str, size_bytes: int) -> list[Order]:
        """Nobody will write to this file any more, which has so many bytes."""
        file = self._living.pop(name, None)
        if file is None:
            return []
        self._ended[name] = file
        self.measured(name, size_bytes)
        if not size_bytes:
            self._empty[name] = None
        return self.orders()

    # ---- what follows ----------------------------------------------------------------------------

    def orders(self) -> list[Order]:
        """What is to be cut and removed now."""
        share = self._share()
        found: list[Order] = [
            Cut(name, share) for name, file in self._living.items() if file.size_bytes > share
        ]
        # (A cut leaves half.)
        gained = sum(self._living[cut.name].size_bytes - share // 2 for cut in found)
        total = self._total_bytes - gained
        while self._ended and (len(self._ended) > self._ended_max or total > self._total_max_bytes):
            is_crowd = len(self._ended) > self._ended_max
            name = next(iter(self._empty if is_crowd and self._empty else self._ended))
            total -= self._ended[name].size_bytes
            self._total_bytes -= self._ended.pop(name).size_bytes
            self._empty.pop(name, None)
            found.append(Remove(name))
        return found

    def _share(self) -> int:
        """What one file may have."""
        equal = self._total_max_bytes // max(1, len(self._living))
        return max(_SHARE_MIN_BYTES, min(self._file_max_bytes, equal))

    # ---- looking in ------------------------------------------------------------------------------

    def living(self) -> list[str]:
        """Files that somebody may write to."""
        return list(self._living)

    def ended(self) -> list[str]:
        """Files that nobody will write to, the oldest first."""
        return list(self._ended)

    def is_ended(self, name: str) -> bool:
        """Whether nobody will write to a file any more."""
        return name in self._ended

    def part(self, name: str, task_id: TaskId, attempt: int) -> tuple[int, int]:
        """Places of the first byte that an attempt has written to a file, and behind the last;
        the same twice: it has written nothing there.
        """
        return self._parts.get((name, task_id, attempt), (0, 0))

    def check_invariants(self) -> None:
        """Raise AssertionError when sums and limits are wrong."""
        files = [*self._living.values(), *self._ended.values()]
        assert self._total_bytes == sum(file.size_bytes for file in files)
        assert not self._living.keys() & self._ended.keys()
        assert self._empty.keys() <= self._ended.keys()
        assert len(self._parts) <= self._parts_max
        assert all(0 <= start <= end for start, end in self._parts.values())
