"""Channels: `SOCK_SEQPACKET` pairs, one packet a message.

What: makes pairs, sends and receives without blocking, polls briefly before it sleeps.
Who calls: the reactor, the fork server, the worker's main loop.
May touch: sockets.
Invariants: a packet arrives whole, once and in order; what is unread can be taken back by whoever
holds the reading end (the kernel gives each packet to exactly one reader).
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from typing import final

#: Larger than any packet we send (see `Config.packet_bytes_max` and `inline_max_bytes`).
RECEIVE_BYTES = 1 << 20
_SEND_BUFFER_BYTES = 1 << 20
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


@final
class Spinner:
    """Decides whether to poll before sleeping, from whether that paid lately.

    A sleeping core takes ten times as long to wake as a polling one takes to notice (131 against
    14 µs on virtual machines), but polling for an answer that is milliseconds away burns a core
    that a worker could use.
    """

    __slots__ = ("_credit", "_skipped", "spin_s")

    _CREDIT_MAX = 8
    _TRY_EVERY = 32

    def __init__(self, spin_s: float) -> None:
        self.spin_s = spin_s
        self._credit = self._CREDIT_MAX
        self._skipped = 0

    def worth_it(self) -> bool:
        """Whether to poll this time."""
        if self._credit > 0:
            return self.spin_s > 0
        self._skipped += 1
        if self._skipped >= self._TRY_EVERY:
            self._skipped = 0
            return self.spin_s > 0
        return False

    def report(self, found: bool) -> None:
        """Polling found something, or it did not."""
        if found:
            self._credit = self._CREDIT_MAX
        elif self._credit > 0:
            self._credit -= 1


@final
class SpinningReader:
    """Reads one channel, polling before it sleeps."""

    __slots__ = ("_channel", "_poll", "_spinner")

    def __init__(self, channel: socket.socket, spin_s: float) -> None:
        self._channel = channel
        self._spinner = Spinner(spin_s)
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        self._poll = poller.poll

    def poll_soon(self) -> bool:
        """Poll; False when nothing came in time."""
        poll, spinner = self._poll, self._spinner
        end = time.perf_counter() + spinner.spin_s
        while not poll(0):
            if time.perf_counter() > end:
                spinner.report(False)
                return False
            _YIELD()
        spinner.report(True)
        return True

    def receive_soon(self) -> bytes | None:
        """Poll; None when nothing came in time, b"" when the other side is gone."""
        # Another process that reads the channel may have been faster: then nothing is there.
        return receive_nowait(self._channel) if self.poll_soon() else None

    def receive(self) -> bytes:
        """The next packet: poll first if that is worth it, then sleep until it is there."""
        if self._spinner.worth_it():
            packet = self.receive_soon()
            if packet is not None:
                return packet
        try:
            return self._channel.recv(RECEIVE_BYTES)
        except ConnectionResetError:
            return b""


def wait_readable(channel: socket.socket, timeout_s: float | None) -> bool:
    """Whether the channel has something to read within a time (None: however long it takes)."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000.0))
