"""The memory that the members of a group share, and how they wait for each other in it.

    words    per member: step ── how many steps it has made; left ── it has destroyed the group
             per group:  broken ── who found what wrong
             per pair:   sent, taken ── parts of messages
    headers  per member, two in turns: what it calls with
    slots    per member, three in turns: its part of the data
    outboxes per member, two in turns: parts of a message to one other

What: lays out one unnamed file, maps it, reads and writes counters, sleeps until one moves.
Who calls: `group.py`.
May touch: shared memory, futexes, the clock, descriptors of processes.
Invariants: each word has one writer, but for `broken`, of which any writer's reason will do. A
counter is written after the data that it tells of. What is written in one turn is read before the
reader makes its second step from there, so nobody overwrites it three turns later.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, final

import numpy

__all__ = ["Lost", "Member", "Segment", "create_file"]

#: Slots of each member: one that is read, one that is reduced, and one that is written.
TURNS = 3

#: Members at the most: ranks must fit in the word that tells what broke a group.
WORLD_SIZE_MAX = 1024

_WORD = 4
_MASK = 0xFFFFFFFF
_HALF = 0x80000000
#: A member's words, and each of its headers, have cache lines of their own.
_LINE = 64
_HEADER_BYTES = 64
_PAGE = 4096

#: Bytes of a member's slot: few steps for a large tensor, and all slots of one turn together fit a
#: processor's last cache, where they are from their writing until they have been read.
_SLOT_BYTES_MAX = 4 * 1024 * 1024
_SLOTS_BYTES_MAX = 32 * 1024 * 1024
_SLOT_BYTES_MIN = 64 * 1024
_OUTBOX_BYTES = 512 * 1024

#: Look again without sleeping for about this long; a sleeping processor takes far longer to wake.
_SPIN_S = 50e-6
#: Sleep at the most this long before looking whether who is waited for lives.
_SLICE_S = 0.05

_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
#: Machine -> number of the system call.
_FUTEX_NUMBER = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "ppc64le": 221,
    "s390x": 238,
}.get(platform.machine())
#: Stores of one processor are seen in their order by all others.
_IS_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")


@final
class Lost(Exception):
    """Who is waited for does not come."""

    def __init__(self, code: int, peer: int, finder: int) -> None:
        super().__init__(code, peer, finder)
        self.code = code
        self.peer = peer
        #: The rank that found it out.
        self.finder = finder


#: What may be wrong; the codes in `broken`.
TIMED_OUT, DIED, LEFT, DIFFERS, FAILED = 1, 2, 3, 4, 5


@final
class Member:
    """Another member's process, to be asked whether it lives."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = -1
        self._started = _start_time(pid)
        try:
            self._descriptor = os.pidfd_open(pid)
        except (AttributeError, OSError):
            pass  # an old kernel, or it is gone already: /proc tells
        self._poll = select.poll()
        if self._descriptor >= 0:
            self._poll.register(self._descriptor, select.POLLIN)

    def is_dead(self) -> bool:
        """Whether the process has ended."""
        if self._descriptor >= 0:
            return bool(self._poll.poll(0))
        return not self._started or _start_time(self.pid) != self._started

    def close(self) -> None:
        """Let go of the process."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _start_time(pid: int) -> str:
    """When a process began, in the system's ticks; empty: it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _slot_bytes(world_size: int) -> int:
    share = _SLOTS_BYTES_MAX // world_size // _PAGE * _PAGE
    return max(min(share, _SLOT_BYTES_MAX), _SLOT_BYTES_MIN)


def create_file(world_size: int) -> int:
    """A descriptor of a new unnamed file for a group; its pages are taken as they are used.

    Raises
    ------
    OSError
        There is no memory for it.
    """
    descriptor = os.memfd_create("poolray-collective", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _Layout(world_size).size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def close_file(descriptor: int) -> None:
    """The group did not form."""
    os.close(descriptor)


@final
class _Layout:
    """Where what is, in bytes from the start."""

    def __init__(self, world_size: int) -> None:
        self.slot_bytes = _slot_bytes(world_size)
        self.members = _LINE  # the first line is the group's
        self.pairs = self.members + world_size * _LINE
        self.headers = self.pairs + world_size * world_size * _LINE
        end = self.headers + world_size * 2 * _HEADER_BYTES
        self.slots = (end + _PAGE - 1) // _PAGE * _PAGE
        self.outboxes = self.slots + world_size * TURNS * self.slot_bytes
        self.size_bytes = self.outboxes + world_size * 2 * _OUTBOX_BYTES


@final
class Segment:
    """One member's view of the shared memory.

    Parameters
    ----------
    descriptor : int
        The file; this object owns it from now on.
    world_size, rank : int
    members : dict of int to Member
        The other members by rank.
    timeout_s : float
        How long a member may keep the others waiting.
    """

    def __init__(
        self,
        descriptor: int,
        world_size: int,
        rank: int,
        members: dict[int, Member],
        timeout_s: float,
    ) -> None:
        layout = self._layout = _Layout(world_size)
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, layout.size_bytes)
        self._whole = numpy.frombuffer(self._mapping, dtype=numpy.uint8)
        self._address = self._whole.ctypes.data
        self._words = memoryview(self._mapping).cast("I")
        self._world_size = world_size
        self._rank = rank
        self._members = members
        self._timeout_s = timeout_s
        self._wake = _make_wake()
        self._sleep = _make_sleep()
        # With more members than processors, whoever spins keeps away those that it waits for.
        cores = len(os.sched_getaffinity(0))
        self._spin_s = _SPIN_S if world_size <= cores else 0.0
        self.slot_bytes = layout.slot_bytes
        self.outbox_bytes = _OUTBOX_BYTES
        self._steps = 0
        self._peers = [peer for peer in range(world_size) if peer != rank]

    # ---- places ----------------------------------------------------------------------------------

    def slot(self, rank: int, turn: int) -> Any:
        """A member's part of the data, as bytes."""
        start = self._layout.slots + (TURNS * rank + turn) * self.slot_bytes
        return self._whole[start : start + self.slot_bytes]

    def outbox(self, rank: int, turn: int) -> Any:
        """A part of a member's message to one other, as bytes."""
        start = self._layout.outboxes + (2 * rank + turn) * _OUTBOX_BYTES
        return self._whole[start : start + _OUTBOX_BYTES]

    def write_header(self, turn: int, header: bytes) -> None:
        """Tell the others what is called here; at most 64 bytes."""
        self._write(self._layout.headers + (2 * self._rank + turn) * _HEADER_BYTES, header)

    def read_header(self, rank: int, turn: int) -> bytes:
        """What a member calls."""
        start = self._layout.headers + (2 * rank + turn) * _HEADER_BYTES
        return self._mapping[start : start + _HEADER_BYTES]

    def _write(self, start: int, data: bytes) -> None:
        self._mapping[start : start + _HEADER_BYTES] = data.ljust(_HEADER_BYTES, b"\0")

    def write_message_header(self, to: int, header: bytes) -> None:
        """What the next message to a member is like; at most 48 bytes."""
        start = self._pair(self._rank, to) + 16
        self._mapping[start : start + 48] = header.ljust(48, b"\0")

    def read_message_header(self, source: int) -> bytes:
        """What the next message of a member is like."""
        start = self._pair(source, self._rank) + 16
        return self._mapping[start : start + 48]

    def _pair(self, source: int, to: int) -> int:
        return self._layout.pairs + (source * self._world_size + to) * _LINE

    # ---- steps -----------------------------------------------------------------------------------

    def step(self) -> None:
        """Wait until all members have made as many steps as this one makes with this.

        Raises
        ------
        Lost
            One of them does not come.
        """
        self._steps = (self._steps + 1) & _MASK
        base = self._layout.members // _WORD
        stride = _LINE // _WORD
        self._publish(base + self._rank * stride, self._steps)
        for peer in self._peers:
            self._wait(base + peer * stride, self._steps, peer)

    def leave(self) -> None:
        """This member takes no part any more: tell those who wait for it, or will."""
        base = self._layout.members + self._rank * _LINE
        self._publish(base // _WORD + 1, 1)
        self._wake(self._address + base)

    def tell_sent(self, to: int, count: int) -> None:
        """So many parts of messages to a member are, or were, in the outbox."""
        self._publish(self._pair(self._rank, to) // _WORD, count & _MASK)

    def tell_taken(self, source: int, count: int) -> None:
        """So many parts of a member's messages have been copied out."""
        self._publish(self._pair(source, self._rank) // _WORD + 1, count & _MASK)

    def wait_sent(self, source: int, count: int) -> None:
        """Wait for that many parts of a member's messages."""
        self._wait(self._pair(source, self._rank) // _WORD, count & _MASK, source)

    def wait_taken(self, to: int, count: int) -> None:
        """Wait until a member has taken that many."""
        self._wait(self._pair(self._rank, to) // _WORD + 1, count & _MASK, to)

    # ---- looking ahead, while other things are waited for ----------------------------------------

    def check_next_step(self, deadline: float) -> None:
        """Raise `Lost` if a member that has yet to make the next step will not make it."""
        base, stride = self._layout.members // _WORD, _LINE // _WORD
        for peer in self._peers:
            self._check(base + peer * stride, (self._steps + 1) & _MASK, peer, deadline)

    def check_sent(self, source: int, count: int, deadline: float) -> None:
        """Raise `Lost` if a member will not send that many parts."""
        self._check(self._pair(source, self._rank) // _WORD, count & _MASK, source, deadline)

    def check_taken(self, to: int, count: int, deadline: float) -> None:
        """Raise `Lost` if a member will not take that many."""
        self._check(self._pair(self._rank, to) // _WORD + 1, count & _MASK, to, deadline)

    # ---- words -----------------------------------------------------------------------------------

    def _publish(self, index: int, value: int) -> None:
        _fence()
        self._words[index] = value
        self._wake(self._address + index * _WORD)

    def _wait(self, index: int, target: int, peer: int) -> None:
        words = self._words
        if self._spin_s and (words[index] - target) & _MASK >= _HALF:
            self._spin(index, target)
        deadline: float | None = None
        while True:
            seen = words[index]
            if (seen - target) & _MASK < _HALF:
                _fence()
                return
            if deadline is None:
                deadline = time.monotonic() + self._timeout_s
            self._check(index, target, peer, deadline)
            self._sleep(self._address + index * _WORD, seen)

    def _spin(self, index: int, target: int) -> None:
        words = self._words
        end = time.perf_counter() + self._spin_s
        while time.perf_counter() < end:
            for _ in range(20):
                if (words[index] - target) & _MASK < _HALF:
                    return

    def _check(self, index: int, target: int, peer: int, deadline: float) -> None:
        """Raise if there is no point in waiting on."""
        self.check_whole()
        words = self._words
        left = self._layout.members // _WORD + peer * (_LINE // _WORD) + 1
        code = 0
        if words[left]:
            code = LEFT
        elif self._members[peer].is_dead():
            code = DIED
        elif time.monotonic() > deadline:
            code = TIMED_OUT
        # It may have done its part and ended since we looked.
        if code and (words[index] - target) & _MASK >= _HALF:
            raise self.break_up(code, peer)

    def check_whole(self) -> None:
        """Raise `Lost` if somebody has found that the group is of no use any more."""
        broken = self._words[0]
        if broken:
            raise Lost(broken >> 24, broken >> 12 & 0xFFF, broken & 0xFFF)

    def break_up(self, code: int, peer: int) -> Lost:
        """Nobody is to wait in this group any more; gives what to raise."""
        self._words[0] = code << 24 | peer << 12 | self._rank
        base, stride = self._layout.members, _LINE
        for rank in range(self._world_size):
            self._wake(self._address + base + rank * stride)
        return Lost(code, peer, self._rank)

    def late_ranks(self) -> list[int]:
        """Members that have made fewer steps than this one."""
        base, stride = self._layout.members // _WORD, _LINE // _WORD
        words, steps = self._words, self._steps
        return [p for p in self._peers if (words[base + p * stride] - steps) & _MASK >= _HALF]

    def close(self) -> None:
        """Unmap; the memory goes with the last member."""
        for member in self._members.values():
            member.close()
        self._words.release()
        self._whole = numpy.empty(0, dtype=numpy.uint8)
        try:
            self._mapping.close()
        except BufferError:
            pass  # another thread is in the middle of a call: it goes with that
        os.close(self._descriptor)


# ---- the system ----------------------------------------------------------------------------------

_fence_lock = threading.Lock()


def _fence() -> None:
    """What was written before is seen by others before what is written after."""
    if _IS_ORDERED:
        return
    for _ in range(2):  # a release and the acquisition after it let nothing pass
        _fence_lock.acquire()
        _fence_lock.release()


def _futex() -> Callable[..., int] | None:
    if _FUTEX_NUMBER is None:
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = [
        *(ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32),
    ]
    call.restype = ctypes.c_long
    return call


def _make_wake() -> Callable[[int], None]:
    """What wakes all who sleep on the word at an address."""
    call = _futex()

    def wake(address: int) -> None:
        if call is not None:
            call(_FUTEX_NUMBER, address, _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)

    return wake


def _make_sleep() -> Callable[[int, int], None]:
    """What sleeps for a slice, or until the word at an address is no longer a value."""
    call = _futex()
    seconds = int(_SLICE_S)
    slice_bytes = struct.pack("qq", seconds, int((_SLICE_S - seconds) * 1e9))
    buffer = ctypes.create_string_buffer(slice_bytes, len(slice_bytes))
    pointer = ctypes.addressof(buffer)

    def sleep(address: int, seen: int) -> None:
        if call is None:
            time.sleep(0.0005)
        else:
            # In `buffer`'s closure: the system reads it.
            assert buffer is not None
            call(_FUTEX_NUMBER, address, _FUTEX_WAIT, seen, pointer, None, 0)

    return sleep
