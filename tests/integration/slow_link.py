"""A line that is slow and loses frames, in a process of its own, where the kernel has no netem.

    machine ═veth═▶ socket ──some are lost, the others wait──▶ socket ═veth═▶ bridge
            ◀══════ socket ◀───────────── at once ──────────── socket ◀══════

Called by `test_cluster_networks.py`: DEVICE DEVICE DELAY_MS LOSS_PERCENT SEED. It ends when its
standard input does.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque

_ALL_PROTOCOLS = 3
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_PACKET_OUTGOING = 4
#: The largest that a device without segmentation of its own is given, with what comes before it.
_FRAME_BYTES_MAX = 80_000
#: As many as netem keeps; more are lost.
_WAITING_MAX = 1000


def _open(device: str) -> socket.socket:
    """All frames of a device, with what the kernel has still to do to them (checksums, cutting)."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.bind((device, _ALL_PROTOCOLS))
    made.setblocking(False)
    return made


def _frames(channel: socket.socket) -> list[bytes]:
    """Those that have come; not those that we have sent."""
    found = []
    while True:
        try:
            frame, sender = channel.recvfrom(_FRAME_BYTES_MAX)
        except BlockingIOError:
            return found
        if sender[2] != _PACKET_OUTGOING:
            found.append(frame)


def _send(channel: socket.socket, frame: bytes) -> None:
    try:
        channel.send(frame)
    except OSError:
        pass  # there is no room, or the cable was pulled out: it is lost


def run(machine: str, bridge: str, delay_s: float, loss: float, seed: int) -> None:
    """Pass frames on, as long as whoever has started this lives."""
    draw = random.Random(seed)
    near, far = _open(machine), _open(bridge)
    waiting: deque[tuple[float, bytes]] = deque()
    poller = select.poll()
    poller.register(near, select.POLLIN)
    poller.register(far, select.POLLIN)
    poller.register(0, select.POLLIN)
    print("ready", flush=True)
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if any(ready == 0 for ready, _ in poller.poll(left_s and left_s * 1000.0)):
            return
        now = time.monotonic()
        for frame in _frames(near):
            if draw.random() >= loss and len(waiting) < _WAITING_MAX:
                waiting.append((now + delay_s, frame))
        for frame in _frames(far):
            _send(near, frame)
        while waiting and waiting[0][0] <= now:
            _send(far, waiting.popleft()[1])


if __name__ == "__main__":
    run(*sys.argv[1:3], float(sys.argv[3]) / 1000.0, float(sys.argv[4]) / 100.0, int(sys.argv[5]))
