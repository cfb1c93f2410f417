"""How much memory is in use: of the machine, of its container, of processes.

What: reads the figures that the node machine asks for with `MeasureMemory`.
Who calls: `local/node_shell.py`, under the runtime's lock; so it reads a few small files, and more
of them only when memory is short.
May touch: `/proc`, `/sys/fs/cgroup`; elsewhere than on Linux, psutil.
Invariants: a container's limit counts where it is lower than what the machine has; pages of files
that the system may drop are not in use; a process that is gone is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import final

from poolray.ids import WorkerId
from poolray.node.effects import MeasureMemory
from poolray.protocol.node import MemoryReport, ProcessMemory

#: Processes that are named in an error.
_NAMED_MAX = 10
_NAME_CHARS_MAX = 100
_KIB = 1024


def is_supported() -> bool:
    """Whether memory can be measured here."""
    return _has_proc() or sys.platform == "darwin"


def _has_proc() -> bool:
    return os.path.exists("/proc/meminfo")


@final
class CgroupFiles:
    """Where one level of control groups tells of its memory."""

    __slots__ = ("cache_keys", "limit", "stat", "usage")

    def __init__(self, folder: str, is_v2: bool) -> None:
        names = ("max", "current") if is_v2 else ("limit_in_bytes", "usage_in_bytes")
        self.limit, self.usage = (os.path.join(folder, f"memory.{name}") for name in names)
        self.stat = os.path.join(folder, "memory.stat")
        prefix = "" if is_v2 else "total_"
        #: Pages of files, which the system drops when it needs room.
        self.cache_keys = (f"{prefix}inactive_file", f"{prefix}active_file")

    def read(self, below_bytes: int) -> tuple[int, int] | None:
        """Bytes in use and the limit; None where that is not below so much, or not to be read."""
        try:
            limit = int(_read(self.limit))  # "max" is no number: there is none
            if not 0 < limit < below_bytes:
                return None
            usage = int(_read(self.usage))
            stat = dict(line.split(" ", 1) for line in _read(self.stat).splitlines())
            cache = sum(int(stat.get(key, 0)) for key in self.cache_keys)
        except (OSError, ValueError):
            return None
        return max(0, usage - cache), limit


@final
class MemoryMonitor:
    """Reads what is in use.

    Parameters
    ----------
    root : str
        Where `proc` and `sys` are; another one for tests.
    """

    def __init__(self, root: str = "/") -> None:
        self._proc = os.path.join(root, "proc")
        self._cgroups = list(_find_cgroups(root))
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def measure(self, wanted: MeasureMemory, pid_of: Callable[[WorkerId], int]) -> MemoryReport:
        """What the machine asks for; `pid_of` gives 0 for workers that are gone."""
        used, total = self.usage()
        workers = []
        for worker_id, exact_above in wanted.workers:
            pid = pid_of(worker_id)
            size = self.private_bytes(pid, exact_above) if pid else None
            if size is not None:
                workers.append((worker_id, size))
        return MemoryReport(
            used_bytes=used,
            total_bytes=total,
            workers=workers,
            is_detailed=wanted.is_detailed,
            processes=self.largest_processes() if wanted.is_detailed else [],
        )

    # ---- the machine -----------------------------------------------------------------------------

    def usage(self) -> tuple[int, int]:
        """Bytes in use and in all: the machine's or a container's, whichever is fuller."""
        fullest = self._machine()
        for files in self._cgroups:
            found = files.read(below_bytes=fullest[1])
            if found is not None and found[0] * fullest[1] > fullest[0] * found[1]:
                fullest = found
        return fullest

    def _machine(self) -> tuple[int, int]:
        try:
            lines = _read(os.path.join(self._proc, "meminfo")).splitlines()
        except OSError:
            import psutil

            memory = psutil.virtual_memory()
            return int(memory.total - memory.available), int(memory.total)
        values = dict(line.split(":", 1) for line in lines)
        total = int(values["MemTotal"].split()[0]) * _KIB
        available = int(values["MemAvailable"].split()[0]) * _KIB
        return max(0, total - available), total

    # ---- processes -------------------------------------------------------------------------------

    def private_bytes(self, pid: int, exact_above: int = 0) -> int | None:
        """What a process uses that it does not share; None when it is gone.

        A forked worker shares what its driver had, so its resident size says little. To tell shared
        pages from its own costs a walk through all of them: up to `exact_above`, a figure that is
        never too low will do.
        """
        try:
            fields = _read(os.path.join(self._proc, str(pid), "statm")).split()
            rough = max(0, int(fields[1]) - int(fields[2])) * self._page_bytes
            if rough <= exact_above:
                return rough
            return self._exact_bytes(pid, rough)
        except (OSError, ValueError, IndexError):
            return _psutil_private_bytes(pid)

    def _exact_bytes(self, pid: int, rough: int) -> int:
        try:
            text = _read(os.path.join(self._proc, str(pid), "smaps_rollup"))
        except OSError:
            return rough  # another user's, or an old kernel
        private = 0
        for line in text.splitlines():
            if line.startswith(("Private_", "Swap:")):
                private += int(line.split()[1]) * _KIB
        return private

    def largest_processes(self) -> list[ProcessMemory]:
        """The processes that use most by themselves."""
        rough: list[tuple[int, int]] = []
        try:
            names = os.listdir(self._proc)
        except OSError:
            return []
        for name in names:
            if name.isdecimal():
                # Not `private_bytes`: psutil need not be asked about all of them.
                try:
                    fields = _read(os.path.join(self._proc, name, "statm")).split()
                    size = (int(fields[1]) - int(fields[2])) * self._page_bytes
                except (OSError, ValueError, IndexError):
                    continue  # gone
                rough.append((size, int(name)))
        rough.sort(reverse=True)
        found = [(self._exact_bytes(pid, size), pid) for size, pid in rough[: 2 * _NAMED_MAX]]
        found.sort(reverse=True)
        return [
            ProcessMemory(pid=pid, used_bytes=size, name=self._name(pid))
            for size, pid in found[:_NAMED_MAX]
        ]

    def _name(self, pid: int) -> str:
        folder = os.path.join(self._proc, str(pid))
        try:
            words = _read(os.path.join(folder, "cmdline")).replace("\0", " ").split()
            name = " ".join(words) or _read(os.path.join(folder, "comm")).strip()
        except OSError:
            return "(it has ended)"
        return name if len(name) <= _NAME_CHARS_MAX else name[: _NAME_CHARS_MAX - 1] + "…"


def _psutil_private_bytes(pid: int) -> int | None:
    if _has_proc():
        return None  # that has said that it is gone
    import psutil

    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return None


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _find_cgroups(root: str) -> Iterator[CgroupFiles]:
    """The levels of control groups that this process is in, whether they have a limit or not."""
    try:
        lines = _read(os.path.join(root, "proc/self/cgroup")).splitlines()
    except OSError:
        return
    base = os.path.join(root, "sys/fs/cgroup")
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if "memory" in controllers.split(","):
            yield from _levels(os.path.join(base, "memory"), path, is_v2=False)
        elif not controllers:
            yield from _levels(base, path, is_v2=True)


def _levels(base: str, path: str, is_v2: bool) -> Iterator[CgroupFiles]:
    """A group and those that it is in; of a path that only the host knows, what there is."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        files = CgroupFiles(os.path.join(base, *parts[:count]), is_v2)
        if os.path.exists(files.limit):
            yield files


__all__ = ["MemoryMonitor", "is_supported"]
