"""A process's part in a collective group, whatever its data goes through.

    call ── header ──▶ first step: do all call the same? ── data ──▶ more steps
                          │ one is dead, late, gone, or calls another thing
                          └──▶ all members are told, each raises; the group is of no use any more

What: meets the others, makes steps with them, compares what they call, turns what went wrong into
errors in words.
Who calls: `group.py`, whose data goes through shared memory; `torch_group.py`, whose data goes
through a process group of torch.
May touch: what `segment.py` and `rendezvous.py` touch.
Invariants: a group that failed once fails for good; every member makes the same steps.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

from poolray.util.collective import segment as shared
from poolray.util.collective.rendezvous import meet
from poolray.util.collective.segment import Lost, Member, Segment
from poolray.util.collective.types import CollectiveError, CollectiveTimeoutError, ReduceOp

__all__ = ["Elements", "Membership"]

#: What is called, with which root, operation, size and type of elements.
_HEADER = struct.Struct("<16siiq16s")
_MESSAGE_HEADER = struct.Struct("<q16s")
_REASONS = {
    shared.TIMED_OUT: "did not come within {timeout_s:g} s (it is late, stuck, or calls another "
    "operation)",
    shared.DIED: "has died",
    shared.LEFT: "has destroyed the group",
    shared.DIFFERS: "called something else",
    shared.FAILED: "has failed in the middle of it (its own error says why)",
}


class Elements(Protocol):
    """What members compare of a tensor."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""

    @property
    def name(self) -> str:
        """The type of an element."""


class Membership:
    """One member of a group; subclasses move the data.

    Parameters
    ----------
    scope : bytes
        What tells this job from others on the machine.
    world_size, rank : int
    group_name : str
    timeout_s : float
        How long a member may keep the others waiting, here and in each operation.

    Raises
    ------
    CollectiveError
        The group did not form.

    Notes
    -----
    Blocks until all members are there.
    """

    #: Its name, for users and for the other members.
    _BACKEND = ""
    #: Whether the members share one more file, for a subclass to use.
    _HAS_STORE = False

    def __init__(
        self, scope: bytes, world_size: int, rank: int, group_name: str, timeout_s: float
    ) -> None:
        if world_size > shared.WORLD_SIZE_MAX:
            raise ValueError(
                f"world_size is {world_size}: a group has {shared.WORLD_SIZE_MAX} members at most"
            )
        self.world_size = world_size
        self.rank = rank
        self.group_name = group_name
        self._timeout_s = timeout_s
        descriptors = self._create_files() if rank == 0 else []
        try:
            descriptors, pids = meet(
                scope, group_name, world_size, rank, self._BACKEND, descriptors, timeout_s
            )
        except BaseException:
            for descriptor in descriptors:
                shared.close_file(descriptor)
            raise
        members = {peer: Member(pid) for peer, pid in enumerate(pids) if peer != rank}
        self._segment = Segment(descriptors[0], world_size, rank, members, timeout_s)
        #: The other file, which the subclass closes.
        self._store_descriptor = descriptors[1] if self._HAS_STORE else -1
        #: One operation at a time.
        self._lock = threading.Lock()
        #: What is called, until all are known to call the same.
        self._header = b""
        self._calls = 0
        #: Peer -> parts of messages to it, and from it.
        self._sent = dict.fromkeys(members, 0)
        self._taken = dict.fromkeys(members, 0)
        #: Why the group is of no use any more; empty: it is.
        self._broken = ""

    def _create_files(self) -> list[int]:
        files = [shared.create_file(self.world_size)]
        if self._HAS_STORE:
            files.append(os.memfd_create("poolray-collective-store", os.MFD_CLOEXEC))
        return files

    def backend(self) -> str:
        """The name of the backend, as `Backend` has it."""
        return self._BACKEND

    # ---- calls -----------------------------------------------------------------------------------

    @contextmanager
    def _taking_part(
        self,
        name: str,
        operand: Elements | None = None,
        *,
        root: int = -1,
        op: ReduceOp | None = None,
    ) -> Iterator[None]:
        """Around an operation: one at a time, and the same in all members."""
        size, elements = (0, "") if operand is None else (operand.size_bytes, operand.name)
        with self._lock, self._explaining(name):
            self._calls += 1
            self._header = _HEADER.pack(
                name.encode(), root, -1 if op is None else op.value, size, elements.encode()
            )
            self._segment.write_header(self._calls % 2, self._header)
            yield

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        if self._broken:
            self._fail(self._broken)
        try:
            self._segment.check_whole()
            yield
        except Lost as lost:
            self._fail(self._reason_of(lost, name), lost)
        except CollectiveError:
            raise
        except BaseException:
            # Ctrl-C, most likely: the others have been left in the middle.
            self._break(f"{name} was interrupted here")
            self._segment.break_up(shared.LEFT, self.rank)
            raise

    def _reason_of(self, lost: Lost, name: str) -> str:
        what = _REASONS[lost.code].format(timeout_s=self._timeout_s)
        if lost.finder != self.rank:
            return f"{name}: rank {lost.finder} has found that rank {lost.peer} {what}"
        peers = [lost.peer]
        if lost.code == shared.TIMED_OUT and name not in ("send", "recv"):
            peers = self._segment.late_ranks() or peers
        return f"{name}: rank {', '.join(map(str, peers))} {what}"

    def _fail(self, reason: str, lost: Lost | None = None) -> NoReturn:
        self._break(reason)
        is_late = lost is not None and lost.code == shared.TIMED_OUT
        kind = CollectiveTimeoutError if is_late else CollectiveError
        raise kind(group_name=self.group_name, rank=self.rank, reason=reason) from None

    def _break(self, reason: str) -> None:
        """The group is of no use any more, here; a subclass may let go of what it has."""
        self._broken = reason

    # ---- steps -----------------------------------------------------------------------------------

    def _step(self) -> None:
        self._segment.step()
        if self._header:
            self._agree()

    def _agree(self) -> None:
        """Compare what the members call."""
        mine, self._header = self._header, b""
        for peer in range(self.world_size):
            theirs = self._segment.read_header(peer, self._calls % 2)[: _HEADER.size]
            if theirs != mine:
                self._segment.break_up(shared.DIFFERS, peer)
                self._fail(f"rank {peer} called {_describe(theirs)}, this one {_describe(mine)}")

    # ---- messages --------------------------------------------------------------------------------

    def _write_message_header(self, operand: Elements, to: int) -> None:
        header = _MESSAGE_HEADER.pack(operand.size_bytes, operand.name.encode())
        self._segment.write_message_header(to, header)

    def _check_message(self, operand: Elements, source: int) -> None:
        header = self._segment.read_message_header(source)
        size, name = _MESSAGE_HEADER.unpack_from(header)
        mine = operand.size_bytes, operand.name
        if (size, _text(name)) != mine:
            self._segment.break_up(shared.DIFFERS, source)
            self._fail(
                f"rank {source} sends {size} bytes of {_text(name)}, and this one receives "
                f"{mine[0]} bytes of {mine[1]}"
            )

    def destroy(self) -> None:
        """This member takes no part any more; the others are told."""
        self._segment.leave()
        self._broken = "the group has been destroyed here"
        self._segment.close()


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")


def _describe(header: bytes) -> str:
    """A call, in words."""
    name, root, op, size, elements = _HEADER.unpack(header)
    words = [_text(name)]
    if op >= 0:
        words.append(f"({ReduceOp(op).name})")
    if elements.strip(b"\0"):
        words.append(f"of {size} bytes of {_text(elements)}")
    if root >= 0:
        words.append(f"with rank {root} as the one")
    return " ".join(words)
