"""A collective group on the memory of one machine: the operations, as one member runs them.

    allreduce of a block, with three members; each reduces one third of it, and writes the next
    block before it waits for the others:

    member 0   write parts 1 2 │      │ sum part 0, write the next │      │ read parts 1 2 …
    member 1   write parts 0 2 │ step │ sum part 1, write the next │ step │ read parts 0 2 …
    member 2   write parts 0 1 │      │ sum part 2, write the next │      │ read parts 0 1 …

What: moves and reduces data in blocks that fit the processor's cache.
Who calls: `collective.py`.
May touch: shared memory, through `segment.py`.
Invariants: every member makes the same steps; what is written to a slot in one turn is read before
the next step of the reader. All members get the same bits, for each part is reduced once, by ranks
in order (a small tensor: by each, in the same order).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy

from poolray.util.collective.membership import Membership
from poolray.util.collective.operands import Combine, Operand, open_operand
from poolray.util.collective.segment import TURNS
from poolray.util.collective.types import Backend, ReduceOp

__all__ = ["SharedMemoryGroup"]

#: Up to so many bytes each member reads everything and reduces it for itself: one step, not two.
_SMALL_BYTES = 32 * 1024
_ALIGNMENT = 64


@final
class SharedMemoryGroup(Membership):
    """One member of a group on the machine's memory.

    Parameters
    ----------
    scope, world_size, rank, group_name, timeout_s
        As in `Membership`.

    Notes
    -----
    Blocks until all members are there. Operations are called by all members, in one order; in one
    process one after the other.
    """

    _BACKEND = Backend.GLOO

    def __init__(
        self, scope: bytes, world_size: int, rank: int, group_name: str, timeout_s: float
    ) -> None:
        super().__init__(scope, world_size, rank, group_name, timeout_s)
        #: Messages go beside operations, each way one at a time.
        self._send_lock, self._receive_lock = threading.Lock(), threading.Lock()
        self._turn = 0

    def open(self, tensor: Any, *, writes: bool = False) -> Operand:
        """A user's tensor, to take part in an operation."""
        return open_operand(tensor, writes=writes)

    # ---- operations ------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all members."""
        with self._taking_part("barrier"):
            self._step()

    def allreduce(self, operand: Operand, op: ReduceOp) -> None:
        """Reduce over all members, for all members."""
        combine = operand.combine(op)
        with self._taking_part("allreduce", operand, op=op):
            self._reduce(operand.data, operand.data, combine)

    def reduce(self, operand: Operand, root: int, op: ReduceOp) -> None:
        """Reduce over all members, for one."""
        combine = operand.combine(op)
        target = operand.data if self.rank == root else None
        with self._taking_part("reduce", operand, op=op, root=root):
            self._reduce(operand.data, target, combine)

    def broadcast(self, operand: Operand, root: int) -> None:
        """Copy one member's tensor to all."""
        data = operand.data
        with self._taking_part("broadcast", operand, root=root):
            for start, end in self._blocks(operand.size_bytes, self._segment.slot_bytes):
                slot = self._next_slots(root)[: end - start]
                if self.rank == root:
                    slot[:] = data[start:end]
                self._step()
                if self.rank != root:
                    data[start:end] = slot

    def allgather(self, targets: Sequence[Operand], operand: Operand) -> None:
        """Copy every member's tensor to all, in the order of ranks."""
        data = operand.data
        with self._taking_part("allgather", operand):
            for start, end in self._blocks(operand.size_bytes, self._segment.slot_bytes):
                self._next_slots(self.rank)[: end - start] = data[start:end]
                self._step()
                for peer, target in enumerate(targets):
                    source = self._segment.slot(peer, self._turn)[: end - start]
                    target.data[start:end] = source

    def reducescatter(self, target: Operand, operands: Sequence[Operand], op: ReduceOp) -> None:
        """Reduce a tensor for each member over all members; each keeps its own."""
        combine = target.combine(op)
        me, segment = self.rank, self._segment
        room = segment.slot_bytes // self.world_size // _ALIGNMENT * _ALIGNMENT
        own = operands[me].data
        if numpy.may_share_memory(own, target.data):
            own = own.copy()
        with self._taking_part("reducescatter", target, op=op):
            for start, end in self._blocks(target.size_bytes, room):
                size = end - start
                slot = self._next_slots(me)
                for peer, operand in enumerate(operands):
                    if peer != me:
                        slot[peer * room : peer * room + size] = operand.data[start:end]
                self._step()
                parts = [
                    own[start:end]
                    if peer == me
                    else segment.slot(peer, self._turn)[me * room : me * room + size]
                    for peer in range(self.world_size)
                ]
                _accumulate(parts, target.data[start:end], combine)

    def _reduce(self, source: Any, target: Any, combine: Combine) -> None:
        """Reduce `source` over all members; who wants the result passes a target for it."""
        if source.size <= _SMALL_BYTES:
            size = source.size
            self._next_slots(self.rank)[:size] = source
            self._step()
            if target is not None:
                parts = [self._segment.slot(p, self._turn)[:size] for p in range(self.world_size)]
                _accumulate(parts, target, combine)
            return
        blocks = list(self._blocks(source.size, self._segment.slot_bytes))
        self._write_for_others(source[slice(*blocks[0])])
        self._step()
        for (start, end), following in zip(blocks, [*blocks[1:], None]):
            turn = self._turn
            self._reduce_own_part(source[start:end], combine)
            if following is not None:
                self._write_for_others(source[slice(*following)])
            self._step()
            if target is not None:
                self._read_results(target[start:end], turn)

    def _write_for_others(self, block: Any) -> None:
        """Write all of a block but the part that this member reduces itself."""
        low, high = self._part(self.rank, block.size)
        slot = self._next_slots(self.rank)
        slot[:low] = block[:low]
        slot[high : block.size] = block[high:]

    def _reduce_own_part(self, block: Any, combine: Combine) -> None:
        me, segment = self.rank, self._segment
        low, high = self._part(me, block.size)
        if high == low:
            return
        parts = [
            block[low:high] if peer == me else segment.slot(peer, self._turn)[low:high]
            for peer in range(self.world_size)
        ]
        # This stretch of the own slot was not written: it takes the result.
        _accumulate(parts, segment.slot(me, self._turn)[low:high], combine)

    def _read_results(self, block: Any, turn: int) -> None:
        for peer in range(self.world_size):
            low, high = self._part(peer, block.size)
            if high > low:
                block[low:high] = self._segment.slot(peer, turn)[low:high]

    def _part(self, rank: int, size: int) -> tuple[int, int]:
        """Where the part of a block lies that a member reduces."""
        share = -(-size // self.world_size)
        share = -(-share // _ALIGNMENT) * _ALIGNMENT
        return min(rank * share, size), min((rank + 1) * share, size)

    # ---- messages --------------------------------------------------------------------------------

    def send(self, operand: Operand, to: int) -> None:
        """Send a tensor to one member; returns when it has been received."""
        segment, data = self._segment, operand.data
        with self._send_lock, self._explaining("send"):
            count = self._sent[to]
            self._write_message_header(operand, to)
            for number, (start, end) in enumerate(
                self._blocks(operand.size_bytes, segment.outbox_bytes)
            ):
                segment.wait_taken(to, count + number - 1)
                segment.outbox(self.rank, number % 2)[: end - start] = data[start:end]
                segment.tell_sent(to, count + number + 1)
            self._sent[to] = count + number + 1
            segment.wait_taken(to, self._sent[to])

    def receive(self, operand: Operand, source: int) -> None:
        """Receive a tensor from one member."""
        segment, data = self._segment, operand.data
        with self._receive_lock, self._explaining("recv"):
            count = self._taken[source]
            for number, (start, end) in enumerate(
                self._blocks(operand.size_bytes, segment.outbox_bytes)
            ):
                segment.wait_sent(source, count + number + 1)
                if number == 0:
                    self._check_message(operand, source)
                data[start:end] = segment.outbox(source, number % 2)[: end - start]
                segment.tell_taken(source, count + number + 1)
            self._taken[source] = count + number + 1

    # ---- blocks ----------------------------------------------------------------------------------

    def _next_slots(self, rank: int) -> Any:
        """The slot of a member for the next block."""
        self._turn = (self._turn + 1) % TURNS
        return self._segment.slot(rank, self._turn)

    def _blocks(self, size: int, block: int) -> Iterator[tuple[int, int]]:
        """Start and end of each block; at least one, for all members make a step."""
        for start in range(0, max(size, 1), block):
            yield start, min(start + block, size)


def _accumulate(parts: Sequence[Any], out: Any, combine: Combine) -> None:
    if len(parts) == 1:
        out[:] = parts[0]
        return
    combine(parts[0], parts[1], out)
    for part in parts[2:]:
        combine(out, part, out)
