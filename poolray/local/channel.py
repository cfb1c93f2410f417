"""Channels: `SOCK_SEQPACKET` pairs, one packet a message.

What: makes pairs, sends and receives without blocking, polls briefly before it sleeps; cuts what is
too large for a packet.
Who calls: the reactor, the fork server, the worker's main loop.
May touch: sockets.
Invariants: a packet arrives whole, once and in order; what is unread can be taken back by whoever
holds the reading end (the kernel gives each packet to exactly one reader).
"""

from __future__ import annotations

import array
import itertools
import mmap
import os
import select
import socket
import time
from collections.abc import Callable
from typing import final

from poolray.ids import WORKER_ID_BYTES, WorkerId

#: Larger than any packet we send (see `Config.packet_bytes_max` and `inline_max_bytes`).
RECEIVE_BYTES = 1 << 20
_SEND_BUFFER_BYTES = 1 << 20
#: Most systems take no larger packet, whatever buffer is asked for.
PART_BYTES_MAX = 256 << 10
#: How a part begins: no message does, as msgpack leaves this byte out.
_PART_MARK = b"\xc1"
PART_MARK = _PART_MARK[0]
_SENDER_END = 1 + WORKER_ID_BYTES
_NUMBER_END = _SENDER_END + 8
_part_numbers = itertools.count()
_DONT_WAIT = socket.MSG_DONTWAIT
_YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))


def make_channel() -> tuple[socket.socket, socket.socket]:
    """A connected pair; what one end sends the other receives, packet by packet."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (left, right):
        # As much as the system allows: the kernel caps the request silently.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return left, right


def receive_nowait(channel: socket.socket) -> bytes | None:
    """The next packet, None when there is none; b"" when the other side is gone."""
    try:
        return channel.recv(RECEIVE_BYTES, _DONT_WAIT)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


@final
class PacketBuffer:
    """Takes packets out of channels, for one thread at a time.

    `recv` would make a buffer for the largest packet each time: a system call to get the memory and
    two to give it back (measured: 14 of 45 µs of a call there and back).
    """

    __slots__ = ("_view",)

    def __init__(self) -> None:
        # Private: a forked child has its own. Pages that no packet reaches are never taken.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._view = memoryview(mmap.mmap(-1, RECEIVE_BYTES, flags=flags))

    def receive(self, channel: socket.socket, flags: int = 0) -> bytes:
        """The next packet; as `socket.recv`."""
        view = self._view
        return view[: channel.recv_into(view, 0, flags)].tobytes()

    def receive_nowait(self, channel: socket.socket) -> bytes | None:
        """The next packet, None when there is none; b"" when the other side is gone."""
        try:
            return self.receive(channel, _DONT_WAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""


def send_whole(channel: socket.socket, packet: bytes, sender: WorkerId) -> None:
    """Send a packet of any size: a large one in parts, between which others' may come."""
    if len(packet) <= PART_BYTES_MAX:
        channel.send(packet)
        return
    head = _PART_MARK + sender + next(_part_numbers).to_bytes(8, "big")
    view = memoryview(packet)
    for start in range(0, len(packet), PART_BYTES_MAX):
        stop = start + PART_BYTES_MAX
        mark = b"\x00" if stop < len(packet) else b"\x01"
        channel.send(b"".join((head, mark, view[start:stop])))


@final
class PartJoiner:
    """Puts packets together that were sent in parts, of many senders."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        #: sender -> number of the packet -> what has come of it.
        self._parts: dict[bytes, dict[bytes, list[bytes]]] = {}

    def join(self, part: bytes) -> bytes | None:
        """The packet that this was the last part of, or None."""
        sender, number = part[1:_SENDER_END], part[_SENDER_END:_NUMBER_END]
        packets = self._parts.setdefault(sender, {})
        parts = packets.setdefault(number, [])
        parts.append(part[_NUMBER_END + 1 :])
        if part[_NUMBER_END : _NUMBER_END + 1] != b"\x01":
            return None
        del packets[number]
        if not packets:
            del self._parts[sender]
        return b"".join(parts)

    def forget(self, sender: WorkerId) -> None:
        """A sender is gone, maybe in the middle of a packet."""
        self._parts.pop(sender, None)


def send_nowait(channel: socket.socket, packet: bytes) -> bool:
    """Send a packet; False when the channel is full. A dead reader is not an error here: its
    death is reported by the fork server.
    """
    try:
        channel.send(packet, _DONT_WAIT)
    except BlockingIOError:
        return False
    except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
        return True
    return True


def send_descriptors(channel: socket.socket, packet: bytes, descriptors: list[int]) -> None:
    """Send a packet together with open files."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    channel.sendmsg([packet], [rights])


def receive_descriptors(channel: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Receive a packet with up to `count` open files."""
    received = array.array("i")
    packet, ancillary, _, _ = channel.recvmsg(
        RECEIVE_BYTES, socket.CMSG_SPACE(count * received.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return packet, list(received)


#: Weight of a new wait among those before it.
_NEW_WEIGHT = 0.25
#: A wait counts as so many times the longest polling at the most: one pause of the program must not
#: outweigh all the calls before it.
_LONGEST_WAIT = 6.0
#: Polling is tried while waits last up to so many times what it may last: of a wait of two sleepers
#: the most is spent waking up.
_WORTH_TRYING = 2.0
#: What is left of the time for polling when others have work for every core.
_CROWDED_SHARE = 0.2


@final
class Spinner:
    """Decides for how long to poll before sleeping, from how long recent waits were.

    A sleeping core takes ten times as long to wake as a polling one takes to notice (131 against
    14 µs on virtual machines), but polling for an answer that is milliseconds away burns a core
    that a worker could use.
    """

    __slots__ = ("_expected_s", "_spin_s")

    def __init__(self, spin_s: float) -> None:
        self._spin_s = spin_s
        self._expected_s = 0.0

    def limit_s(self, crowded: bool = False) -> float:
        """Seconds to poll this time; 0: sleep at once."""
        limit_s = self._spin_s * _CROWDED_SHARE if crowded else self._spin_s
        return limit_s if self._expected_s <= _WORTH_TRYING * limit_s else 0.0

    def note(self, waited_s: float) -> None:
        """A wait has lasted so long, polling and sleeping together."""
        sample_s = min(waited_s, _LONGEST_WAIT * self._spin_s)
        self._expected_s += _NEW_WEIGHT * (sample_s - self._expected_s)

    def wait(
        self,
        poll: Callable[[float | None], list[tuple[int, int]]],
        timeout_ms: float | None,
        may_poll: bool = True,
    ) -> list[tuple[int, int]]:
        """What is ready: poll first if that is worth it, then sleep until something is, or the time
        is up.
        """
        ready = poll(0)
        if ready:
            self.note(0.0)
            return ready
        started_s = time.perf_counter()
        if may_poll:
            end_s = started_s + self.limit_s()
            while time.perf_counter() < end_s:
                _YIELD()
                ready = poll(0)
                if ready:
                    self.note(time.perf_counter() - started_s)
                    return ready
        ready = poll(timeout_ms)
        self.note(time.perf_counter() - started_s)
        return ready


@final
class SpinningReader:
    """Reads one channel, polling before it sleeps."""

    __slots__ = ("_buffer", "_channel", "_poll", "_spinner", "_started_s", "_waker")

    def __init__(self, channel: socket.socket, spin_s: float) -> None:
        self._channel = channel
        self._buffer = PacketBuffer()
        self._spinner = Spinner(spin_s)
        self._started_s = 0.0
        self._waker: select.poll | None = None
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        self._poll = poller.poll

    def poll_soon(self) -> bool:
        """Poll if that is worth it; False when nothing came: then `note_slept` after sleeping."""
        poll, spinner = self._poll, self._spinner
        if poll(0):
            spinner.note(0.0)
            return True
        started_s = self._started_s = time.perf_counter()
        end_s = started_s + spinner.limit_s()
        while time.perf_counter() < end_s:
            _YIELD()
            if poll(0):
                spinner.note(time.perf_counter() - started_s)
                return True
        return False

    def take_nowait(self) -> bytes | None:
        """The next packet, None when there is none; b"" when the other side is gone."""
        return self._buffer.receive_nowait(self._channel)

    def note_slept(self) -> None:
        """The wait that `poll_soon` began, and that went on asleep, is over."""
        self._spinner.note(time.perf_counter() - self._started_s)

    def receive_or_wake(self, descriptor: int) -> bytes | None:
        """The next packet, as `receive`; None as soon as there is something to read from a
        descriptor.
        """
        if self.poll_soon():
            packet = self.take_nowait()
            if packet is not None:
                return packet
        poller = self._waker
        if poller is None:
            poller = self._waker = select.poll()
            poller.register(self._channel, select.POLLIN)
            poller.register(descriptor, select.POLLIN)
        while True:
            events = poller.poll()
            self.note_slept()
            if any(ready == descriptor for ready, _ in events):
                return None
            packet = self.take_nowait()
            if packet is not None:
                return packet

    def receive(self) -> bytes:
        """The next packet: poll first if that is worth it, then sleep until it is there; b"" when
        the other side is gone.
        """
        if self.poll_soon():
            # Another process that reads the channel may have been faster: then nothing is there.
            packet = self.take_nowait()
            if packet is not None:
                return packet
            self._started_s = time.perf_counter()
        try:
            packet = self._buffer.receive(self._channel)
        except ConnectionResetError:
            return b""
        self.note_slept()
        return packet


def wait_readable(channel: socket.socket, timeout_s: float | None) -> bool:
    """Whether the channel has something to read within a time (None: however long it takes)."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000.0))
