"""Where an actor's worker lets a caller in: one door for one caller, for a moment.

What: makes the door (a Unix socket without a file for callers of this machine, a TCP port for
others) and finds the way to it.
Who calls: the worker's `local/direct_server.py` makes doors, `direct/calls.py` comes to them.
May touch: sockets, randomness.
Invariants: who comes has to prove that he was told the door's key, over the nodes' links; nobody
but the machine's administrator can listen to a Unix socket, so only TCP is sealed.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

from poolray.direct.seal import ID_BYTES, KEY_BYTES, Handshake

#: A name, or host and port; the connection's id; its key. (Pickled as a call's result.)
Offer = tuple[str, str, int, bytes, bytes]

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
#: Whoever connects, and the system, may take so long.
CONNECT_S = 3.0
#: A machine that vanished without a word is noticed after about so many seconds.
_SILENCE_S = 6


def make_door(
    is_near: bool, host: str, ports: Sequence[int] = ()
) -> tuple[socket.socket, Offer] | None:
    """A listening socket, and what the caller is told of it; None: there is no way here.

    Parameters
    ----------
    is_near : bool
        The caller is on this machine.
    host : str
        The node's own address; empty: nobody comes from elsewhere.
    ports : sequence of int
        By which they may come; empty: by any.

    Raises
    ------
    OSError
        The system has no sockets left.
    """
    connection_id, key = os.urandom(ID_BYTES), os.urandom(KEY_BYTES)
    if is_near:
        if sys.platform != "linux":
            return None  # names without files are Linux's
        name = f"poolray-direct-{os.getuid()}-{os.getpid()}-{connection_id[:8].hex()}"
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            door.bind(f"\0{name}")
            door.listen(1)
        except BaseException:
            door.close()
            raise
        return door, (name, "", 0, connection_id, key)
    if not host:
        return None
    listener = _listen(host, ports)
    if listener is None:
        return None
    return listener, ("", host, listener.getsockname()[1], connection_id, key)


def _listen(host: str, ports: Sequence[int]) -> socket.socket | None:
    """A socket at one of these ports; None: none of them is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # (Not with `random`, whose state is the program's.)
    start = int.from_bytes(os.urandom(4), "big") % len(ports) if ports else 0
    for port in (*ports[start:], *ports[:start]) or (0,):
        try:
            return socket.create_server((host, port), family=family, backlog=4)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    return None


def come_to(offer: Offer) -> socket.socket:
    """A connection to a door.

    Raises
    ------
    OSError
        It cannot be reached, or is not there any more.
    """
    name, host, port, _, _ = offer
    if name:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            made.connect(f"\0{name}")
        except BaseException:
            made.close()
            raise
        return made
    return socket.create_connection((host, port), CONNECT_S)


def handshake_for(offer: Offer) -> Handshake:
    """What either end has to say first."""
    name, _, _, connection_id, key = offer
    return Handshake(connection_id, key, is_local=bool(name))


def settle_in(channel: socket.socket) -> None:
    """What both ends want of a connection."""
    channel.settimeout(None)
    if channel.family == socket.AF_UNIX:
        return
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", _SILENCE_S - 2)):
        option: Any = getattr(socket, name, None)
        if option is not None:
            channel.setsockopt(socket.IPPROTO_TCP, option, value)
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        channel.setsockopt(socket.IPPROTO_TCP, option, _SILENCE_S * 1000)


def peer_of(channel: socket.socket) -> tuple[int, int] | None:
    """Process and user at the other end of a Unix socket; None: it is none."""
    if channel.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid
