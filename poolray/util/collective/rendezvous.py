"""How the members of a group find each other and come by its shared memory.

    rank 0    listens ──── Join ◀──── rank 1, 2, …        (a socket with a name and no file)
       │ all are there
       └──── Welcome + the files' descriptors ────▶ each

What: collects the members at rank 0, hands each the files and the others' process ids.
Who calls: `membership.py`.
May touch: Unix sockets, the clock.
Invariants: nothing is left behind however a member ends: names of such sockets go with their last
descriptor, the files have none. Whoever dies while the group forms may come again, restarted, until
the time is up.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import struct
import time
from typing import final

import msgspec

from poolray.util.collective.types import CollectiveError, CollectiveTimeoutError

__all__ = ["meet"]

_VERSION = 2
_MESSAGE_BYTES_MAX = 64 * 1024
#: Rank 0 may be late: knock again after this long.
_KNOCK_AGAIN_S = 0.01
#: Files that a group has at the most.
_FILES_MAX = 2
#: Process, user and group at the other end of a socket.
_CREDENTIALS = struct.Struct("3i")


class Join(msgspec.Struct, frozen=True, tag="join", kw_only=True):
    """Member to rank 0: I am here."""

    rank: int
    world_size: int
    pid: int
    backend: str
    version: int = _VERSION


class Welcome(msgspec.Struct, frozen=True, tag="welcome", kw_only=True):
    """Rank 0 to member, with descriptors: all are here."""

    pids: list[int]  #: by rank


class Refused(msgspec.Struct, frozen=True, tag="refused", kw_only=True):
    """Rank 0 to member: this cannot be."""

    reason: str


_encode = msgspec.msgpack.Encoder().encode
_decode_join = msgspec.msgpack.Decoder(Join).decode
_decode_reply = msgspec.msgpack.Decoder(Welcome | Refused).decode


def meet(
    scope: bytes,
    group_name: str,
    world_size: int,
    rank: int,
    backend: str,
    descriptors: list[int],
    timeout_s: float,
) -> tuple[list[int], list[int]]:
    """Wait for all members.

    Parameters
    ----------
    scope : bytes
        What tells this job from others on the machine.
    backend : str
        What this member takes the group for.
    descriptors : list of int
        In rank 0: the files of the group; else none.

    Returns
    -------
    descriptors, pids
        The files, and the members' processes by rank.

    Raises
    ------
    CollectiveTimeoutError
        Not all came in time.
    CollectiveError
        Two members have one rank, or they speak of groups of different sizes or backends.
    """
    deadline = time.monotonic() + timeout_s
    digest = hashlib.blake2b(group_name.encode(), key=scope[:64], digest_size=20).hexdigest()
    address = f"\0poolray-collective-{digest}"
    if rank == 0:
        host = _Host(group_name, world_size, backend, timeout_s)
        try:
            return descriptors, host.gather(address, descriptors, deadline)
        finally:
            host.close()
    join = Join(rank=rank, world_size=world_size, pid=os.getpid(), backend=backend)
    return _join(address, group_name, join, deadline, timeout_s)


# ---- rank 0 --------------------------------------------------------------------------------------


@final
class _Host:
    """Rank 0, while the group forms."""

    def __init__(self, group_name: str, world_size: int, backend: str, timeout_s: float) -> None:
        self._group_name = group_name
        self._world_size = world_size
        self._backend = backend
        self._timeout_s = timeout_s
        self._listener: socket.socket | None = None
        #: Descriptor -> connection whose rank is not known yet.
        self._unknown: dict[int, socket.socket] = {}
        #: Rank -> (connection, process id).
        self._joined: dict[int, tuple[socket.socket, int]] = {}

    def gather(self, address: str, descriptors: list[int], deadline: float) -> list[int]:
        """Wait for all others, hand them the files; gives process ids by rank."""
        self._listener = self._listen(address, deadline)
        while len(self._joined) + 1 < self._world_size:
            self._wait(deadline)
        pids = [os.getpid(), *(self._joined[r][1] for r in range(1, self._world_size))]
        welcome = _encode(Welcome(pids=pids))
        for connection, _ in self._joined.values():
            try:
                socket.send_fds(connection, [welcome], descriptors)
            except OSError:
                pass  # it has died in this moment: the first call of the group finds out
        return pids

    def _listen(self, address: str, deadline: float) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        while True:
            try:
                listener.bind(address)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    listener.close()
                    raise CollectiveError(
                        group_name=self._group_name,
                        rank=0,
                        reason="another process is making a group of this name as rank 0",
                    ) from error
                time.sleep(_KNOCK_AGAIN_S)
        listener.listen(self._world_size)
        return listener

    def _wait(self, deadline: float) -> None:
        """One round: take new connections, read what has come, drop who has died."""
        assert self._listener is not None
        poll = select.poll()
        sockets = {self._listener.fileno(): self._listener, **self._unknown}
        sockets.update((c.fileno(), c) for c, _ in self._joined.values())
        for number in sockets:
            poll.register(number, select.POLLIN)
        left_s = deadline - time.monotonic()
        ready = poll.poll(left_s * 1000) if left_s > 0 else []
        if not ready:
            missing = [r for r in range(1, self._world_size) if r not in self._joined]
            raise CollectiveTimeoutError(
                group_name=self._group_name,
                rank=0,
                reason=f"after {self._timeout_s:g} s rank(s) {missing} have not joined. All "
                f"{self._world_size} members must call init_collective_group at about the same "
                "time, on one machine",
            )
        for number, _ in ready:
            if number == self._listener.fileno():
                self._accept()
            else:
                self._read(number, sockets[number])

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        if not _is_ours(connection):
            connection.close()
            return
        self._unknown[connection.fileno()] = connection

    def _read(self, number: int, connection: socket.socket) -> None:
        try:
            data = connection.recv(_MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
            join = _decode_join(data) if data else None
        except (OSError, msgspec.DecodeError):
            join = None
        is_known = self._unknown.pop(number, None) is None
        if is_known or join is None:  # it has died, or talks nonsense
            self._joined = {r: (c, p) for r, (c, p) in self._joined.items() if c is not connection}
            connection.close()
            return
        reason = self._objection(join)
        if reason:
            connection.send(_encode(Refused(reason=reason)))
            connection.close()
        else:
            self._joined[join.rank] = (connection, join.pid)

    def _objection(self, join: Join) -> str:
        if join.version != _VERSION:
            return "rank 0 runs another version of poolray"
        if join.world_size != self._world_size:
            return f"rank 0 makes a group of {self._world_size}, this one of {join.world_size}"
        if join.backend != self._backend:
            return f"rank 0 makes a group on {self._backend}, this one on {join.backend}"
        if join.rank in self._joined or not 0 < join.rank < self._world_size:
            return f"another process has rank {join.rank} already"
        return ""

    def close(self) -> None:
        """The group is complete, or will not be."""
        if self._listener is not None:
            self._listener.close()
        for connection in [*self._unknown.values(), *(c for c, _ in self._joined.values())]:
            connection.close()


def _is_ours(connection: socket.socket) -> bool:
    """Whether the other end is of this user: names of such sockets have no permissions."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.getuid())


# ---- the others ----------------------------------------------------------------------------------


def _join(
    address: str, group_name: str, join: Join, deadline: float, timeout_s: float
) -> tuple[list[int], list[int]]:
    message = _encode(join)
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            answer = _knock(connection, address, message, deadline)
            if isinstance(answer, tuple):
                return answer
        if isinstance(answer, Refused):
            raise CollectiveError(group_name=group_name, rank=join.rank, reason=answer.reason)
        if time.monotonic() > deadline:
            raise CollectiveTimeoutError(
                group_name=group_name,
                rank=join.rank,
                reason=f"after {timeout_s:g} s not all of the {join.world_size} members "
                "have joined, or rank 0 has not. They must call init_collective_group at about "
                "the same time, on one machine",
            )
        time.sleep(_KNOCK_AGAIN_S)


def _knock(
    connection: socket.socket, address: str, join: bytes, deadline: float
) -> tuple[list[int], list[int]] | Refused | None:
    """Join once; None: rank 0 was not there, or has died, or the time is up."""
    try:
        connection.connect(address)
        if not _is_ours(connection):
            return None
        connection.send(join)
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES_MAX, _FILES_MAX)
    except OSError:
        return None
    if not data:
        return None
    reply = _decode_reply(data)
    if isinstance(reply, Refused):
        return reply
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors, reply.pids
