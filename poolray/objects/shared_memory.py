"""The arena's memory: one unnamed file, mapped once per process in two ways.

What: creates, maps, reads and writes. The file has no name (a memfd; elsewhere an unlinked
temporary file), so that nothing can be left behind however a process ends, and the size of
/dev/shm, 64 MB in most containers, does not matter.
Who calls: the runtime creates it, clients and workers map it.
May touch: files and memory mappings.
Invariants: a range is written only between its allocation and its sealing, through the shared
mapping or, where there are no pages yet, through the file. Reading for writing goes through a
private mapping of the whole arena: pages that a reader changes become its own, and are dropped when
its last view dies.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, final

from poolray.objects.allocator import PAGE_BYTES
from poolray.objects.serialization import Serialized, deserialize, is_frame, load_views

#: Bytes at the start of the file for the workers' progress words, one cache line each.
CONTROL_BYTES = 64 * 1024
_SLOT_BYTES = 64
SLOTS = CONTROL_BYTES // _SLOT_BYTES

#: Words beside the progress word, written by the worker alone and only when somebody wants to know.
#: Times are nanoseconds of the monotonic clock.
CALL_BEGAN = 1  # when the running call of limited time began; 0: none runs
PROCESS_BEGAN = 2
WORKER_READY = 3  # when its state was set up
CALLS_DONE = 4
WORKING_NS = 5  # the time that these took
EXIT_NS = 6  # the time that winding its state up took
_SLOT_WORDS = _SLOT_BYTES // 8

#: A process remembers in steps of this which parts of the arena it has mapped.
_STEP_BYTES = 256 * 1024
#: Since Linux 5.14; Python has no name for it.
_MADV_POPULATE_READ = 22
_SEEK_DATA = getattr(os, "SEEK_DATA", 3)
#: Pages of a range that are looked at to tell whether it has any.
_SAMPLES = 4
#: The most pieces that one system call writes.
_PIECES_MAX = 512

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def create_arena_file(capacity_bytes: int) -> int:
    """A descriptor of a new sparse file for the control page and the arena.

    Raises
    ------
    OSError
        No file of that size can be made.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("poolray-arena", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp(prefix="poolray-arena-")
        os.unlink(path)
    try:
        os.ftruncate(descriptor, CONTROL_BYTES + capacity_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _steps(offset: int, size_bytes: int) -> slice:
    return slice(offset // _STEP_BYTES, (offset + size_bytes - 1) // _STEP_BYTES + 1)


@final
class Arena:
    """One process's view of the arena.

    Parameters
    ----------
    descriptor : int
        The file; this object owns it from now on.
    capacity_bytes : int
        Bytes of the arena proper.
    """

    def __init__(self, descriptor: int, capacity_bytes: int) -> None:
        self.descriptor = descriptor
        self.capacity_bytes = capacity_bytes
        self._control = mmap.mmap(descriptor, CONTROL_BYTES)
        #: Progress words: two unsigned 64-bit numbers per slot would need two writes, so one
        #: word holds both the packet's sequence number and the index of the call begun.
        self.progress = memoryview(self._control).cast("Q")
        self._shared: mmap.mmap | None = None
        self._private: mmap.mmap | None = None
        #: id(view base) -> weak reference that reports the base's death.
        self._views: dict[int, weakref.ref[Any]] = {}
        #: Starts of ranges that a writable view of this process exists of.
        self._writable: dict[int, None] = {}
        #: Step -> whether this process has mapped its pages.
        self._mapped = bytearray(-(-capacity_bytes // _STEP_BYTES))

    def store(self, offset: int, frame: Serialized) -> None:
        """Write a value to its range, before it is sealed.

        Raises
        ------
        OSError
            The system has no memory for it.

        Notes
        -----
        A page that nobody has used yet is faster made by the kernel, which writes to the file, than
        by a fault of ours (measured: 2.9 against 1.2 GB/s). Pages that are there are mapped many at
        a time first (15 GB/s), not fault by fault (2 GB/s); what this process has mapped, it writes
        to as fast as to any memory (8 GB/s; through the file: 4.5).
        """
        size = frame.size_bytes
        if not self.has_pages(offset, size):
            self.fill(offset, frame.pieces())
            self.map_range(offset, size)
            return
        self.map_range(offset, size)
        target = self.write(offset, size)
        frame.write_into(target)
        target.release()

    def _is_mapped(self, offset: int, size_bytes: int) -> bool:
        return 0 not in self._mapped[_steps(offset, size_bytes)]

    def has_pages(self, offset: int, size_bytes: int) -> bool:
        """Whether a range has been used before, by what some of its pages say."""
        if self._is_mapped(offset, size_bytes):
            return True
        start = CONTROL_BYTES + offset
        first = -(-start // PAGE_BYTES) * PAGE_BYTES
        step = max(PAGE_BYTES, size_bytes // _SAMPLES // PAGE_BYTES * PAGE_BYTES)
        try:
            # (Not the next hole: to find one after much that is used takes 8 ns a page.)
            return all(
                os.lseek(self.descriptor, page, _SEEK_DATA) == page
                for page in range(first, start + size_bytes, step)
            )
        except OSError:  # there is nothing from there on, or the system does not tell
            return False

    def map_range(self, offset: int, size_bytes: int) -> None:
        """Have pages of a range mapped in this process, before they are written or read."""
        if self._is_mapped(offset, size_bytes):
            return
        steps = _steps(offset, size_bytes)
        self._mapped[steps] = b"\1" * (steps.stop - steps.start)
        start = (CONTROL_BYTES + offset) // PAGE_BYTES * PAGE_BYTES
        try:
            # For reading: in a shared mapping such a page can be written as well.
            self._map_shared().madvise(
                _MADV_POPULATE_READ, start, CONTROL_BYTES + offset + size_bytes - start
            )
        except OSError:
            pass  # an older system, or one short of memory: then fault by fault

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes to a part of a range, by the same two ways as `store`."""
        size = len(data)
        if not self.has_pages(offset, size):
            self.fill(offset, [data])
            return
        self.map_range(offset, size)
        target = self.write(offset, size)
        target[:] = data
        target.release()

    def fill(self, offset: int, pieces: list[bytes | memoryview]) -> None:
        """Write to a range through the file, which makes its pages.

        Raises
        ------
        OSError
            The system has no memory for it.
        """
        position = CONTROL_BYTES + offset
        for first in range(0, len(pieces), _PIECES_MAX):
            left = [memoryview(piece) for piece in pieces[first : first + _PIECES_MAX]]
            while left:
                count = os.pwritev(self.descriptor, left, position)
                position += count
                # Almost always all of it; the kernel takes no more than 2 GiB in one go.
                while left and count >= left[0].nbytes:
                    count -= left.pop(0).nbytes
                if left and count:
                    left[0] = left[0][count:]

    def write(self, offset: int, size_bytes: int) -> memoryview:
        """The range for writing, before it is sealed."""
        start = CONTROL_BYTES + offset
        return memoryview(self._map_shared())[start : start + size_bytes]

    def load(
        self, offset: int, size_bytes: int, *, writable: bool, on_release: Callable[[], None]
    ) -> Any:
        """The value of a sealed range; `on_release` is called when nobody can see it any more.

        Notes
        -----
        `on_release` runs in finalizers: it may only append to a deque. A value without
        out-of-band buffers is copied out by pickle, and `on_release` is called at once.
        """
        start = CONTROL_BYTES + offset
        mapping = self._map_private() if writable else self._map_shared()
        whole = memoryview(mapping)[start : start + size_bytes]
        if not is_frame(whole):
            try:
                return deserialize(whole)
            finally:
                on_release()
        if writable and start in self._writable:
            # A second writable value of the same object must not share the first one's changes.
            try:
                return deserialize(
                    bytes(memoryview(self._map_shared())[start : start + size_bytes]), True
                )
            finally:
                on_release()
        import numpy

        # Only an object with a weak reference can report its death, and of the buffer types only
        # numpy's arrays have both; every view of the value keeps this one alive.
        base: Any = numpy.frombuffer(whole, dtype=numpy.uint8)
        if not writable:
            base.flags.writeable = False
        key = id(base)
        views = self._views
        writable_starts = self._writable if writable else None
        if writable_starts is not None:
            writable_starts[start] = None
        # Worked out now: the interpreter's end may have cleared this module before the base dies.
        length = (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
        forget_changes = partial(mapping.madvise, mmap.MADV_DONTNEED, start, length)

        def report(_: Any) -> None:
            views.pop(key, None)
            if writable_starts is not None:
                # Forget what this process wrote there: the range will hold another value.
                writable_starts.pop(start, None)
                forget_changes()
            on_release()

        views[key] = weakref.ref(base, report)
        return load_views(base, writable)

    def forget_parent(self) -> None:
        """In a forked child: what the parent changed in its private mapping stays visible in the
        values that were inherited, but must not show in values that are read from now on.
        """
        self._private = None
        self._writable = {}
        self._mapped = bytearray(len(self._mapped))  # a child maps each page anew
        self._views.clear()  # their ends are the parent's affair

    def _map_shared(self) -> mmap.mmap:
        if self._shared is None:
            self._shared = mmap.mmap(self.descriptor, CONTROL_BYTES + self.capacity_bytes)
        return self._shared

    def _map_private(self) -> mmap.mmap:
        if self._private is None:
            self._private = mmap.mmap(
                self.descriptor,
                CONTROL_BYTES + self.capacity_bytes,
                # Not reserved: most pages are only read, and a strict overcommit policy would
                # refuse a private mapping of the whole capacity.
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        return self._private

    def set_progress(self, slot: int, sequence: int, index: int) -> None:
        """Say which call of which packet begins now."""
        self.progress[slot * 8] = sequence << 24 | index

    def get_progress(self, slot: int) -> tuple[int, int]:
        """The packet and the call that a worker began last."""
        word = self.progress[slot * 8]
        return word >> 24, word & 0xFFFFFF

    def look_at_call(self, slot: int) -> tuple[int, int, float]:
        """The packet and the call that a worker began last, and for how many seconds that has
        run; below 0 when it is between two calls.
        """
        first = slot * _SLOT_WORDS
        word, began_ns = self.progress[first], self.progress[first + CALL_BEGAN]
        is_one_call = began_ns and self.progress[first] == word
        running_s = (time.monotonic_ns() - began_ns) * 1e-9 if is_one_call else -1.0
        return word >> 24, word & 0xFFFFFF, running_s

    def words(self, slot: int) -> list[int]:
        """A copy of all words of a worker's slot."""
        return self.progress[slot * _SLOT_WORDS : (slot + 1) * _SLOT_WORDS].tolist()

    def clear_slot(self, slot: int) -> None:
        """The worker of a slot is gone: the next one begins anew."""
        for word in range(slot * _SLOT_WORDS, (slot + 1) * _SLOT_WORDS):
            self.progress[word] = 0

    def close(self) -> None:
        """Release what nobody looks at; a mapping that has views goes with its last view."""
        self.progress.release()
        self._control.close()
        for mapping in (self._shared, self._private):
            if mapping is not None:
                try:
                    mapping.close()
                except BufferError:
                    # A user still holds an array in it: it stays mapped until that dies.
                    pass
        self._shared = self._private = None
        os.close(self.descriptor)
