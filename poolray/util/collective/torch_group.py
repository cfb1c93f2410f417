"""A collective group whose data goes through a process group of torch: on GPUs, NCCL's.

    step: all call the same ──▶ the process group moves the data ──▶ step: all are done
              (shared memory)       (looked after every 50 ms)

What: tensors on this process's device, through torch's process groups; in place.
Who calls: `collective.py`.
May touch: what `membership.py` and `process_group.py` touch.
Invariants: an operation begins when all members have called it, and ends when all have done it, so
nobody who has returned from it is needed any more. Whoever dies, leaves or is late is found by the
steps, or while the data moves; the process group is aborted then, and nobody waits on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, final

from poolray.util.collective import process_group
from poolray.util.collective import segment as shared
from poolray.util.collective.membership import Membership
from poolray.util.collective.process_group import Connection, Kind
from poolray.util.collective.types import Backend, ReduceOp

__all__ = ["DeviceOperand", "TorchGroup"]

#: Look again without sleeping for this long, then sleep longer and longer, but no longer than this.
_SPIN_S, _PAUSE_MIN_S, _PAUSE_MAX_S = 50e-6, 20e-6, 1e-3
#: Look after the other members this often.
_LOOK_S = 0.05
#: A process that is dying closes its sockets before it is dead.
_DYING_S = 2.0


@final
class TorchGroup(Membership):
    """One member of a group on GPUs.

    Parameters
    ----------
    scope, world_size, rank, group_name, timeout_s
        As in `Membership`.
    kind : Kind, optional
        What process group it is; NCCL's, if None. Tests pass gloo's.

    Raises
    ------
    ValueError
        There is no such kind here.
    RuntimeError
        This process has no GPU.
    CollectiveError
        The group did not form.
    """

    _BACKEND = Backend.NCCL
    _HAS_STORE = True

    def __init__(
        self,
        scope: bytes,
        world_size: int,
        rank: int,
        group_name: str,
        timeout_s: float,
        kind: Kind | None = None,
    ) -> None:
        self._kind = process_group.NCCL if kind is None else kind
        objection = self._kind.objection()
        if objection:
            raise ValueError(objection)
        self.device = self._kind.find_device()
        super().__init__(scope, world_size, rank, group_name, timeout_s)
        self._connection = Connection(
            self._kind, self._store_descriptor, rank, world_size, timeout_s, self.device
        )
        try:
            with self._explaining("init_collective_group"):
                self._wait_for(self._connection.is_made, self._segment.check_next_step)
                error = self._connection.error
                if error is not None:
                    self._explain(error, "init_collective_group", self._segment.check_next_step)
                self._step()
        except BaseException:
            self.destroy()
            raise

    def open(self, tensor: Any, *, writes: bool = False) -> DeviceOperand:
        """A user's tensor, to take part in an operation.

        Raises
        ------
        RuntimeError
            It is not torch's, or not on this process's device.
        """
        return _open_on_device(tensor, self.device, self.group_name, writes)

    # ---- operations ------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all members."""
        with self._taking_part("barrier"):
            self._step()

    def allreduce(self, operand: DeviceOperand, op: ReduceOp) -> None:
        """Reduce over all members, for all members."""
        options = _distributed().AllreduceOptions()
        options.reduceOp = _reduce_op(op)
        with self._taking_part("allreduce", operand, op=op):
            self._run("allreduce", operand, lambda pg: pg.allreduce([operand.data], options))

    def reduce(self, operand: DeviceOperand, root: int, op: ReduceOp) -> None:
        """Reduce over all members, for one."""
        options = _distributed().ReduceOptions()
        options.reduceOp, options.rootRank = _reduce_op(op), root
        with self._taking_part("reduce", operand, op=op, root=root):
            data = operand.data
            if self.rank != root and self._kind.reduces_in_sources:
                data = data.clone()
            self._run("reduce", operand, lambda pg: pg.reduce([data], options))

    def broadcast(self, operand: DeviceOperand, root: int) -> None:
        """Copy one member's tensor to all."""
        options = _distributed().BroadcastOptions()
        options.rootRank = root
        with self._taking_part("broadcast", operand, root=root):
            self._run("broadcast", operand, lambda pg: pg.broadcast([operand.data], options))

    def allgather(self, targets: Sequence[DeviceOperand], operand: DeviceOperand) -> None:
        """Copy every member's tensor to all, in the order of ranks."""
        out = [target.data for target in targets]
        with self._taking_part("allgather", operand):
            self._run("allgather", operand, lambda pg: pg.allgather([out], [operand.data]))

    def reducescatter(
        self, target: DeviceOperand, operands: Sequence[DeviceOperand], op: ReduceOp
    ) -> None:
        """Reduce a tensor for each member over all members; each keeps its own."""
        options = _distributed().ReduceScatterOptions()
        options.reduceOp = _reduce_op(op)
        parts = [operand.data for operand in operands]
        with self._taking_part("reducescatter", target, op=op):
            self._run(
                "reducescatter",
                target,
                lambda pg: pg.reduce_scatter([target.data], [parts], options),
            )

    def _run(self, name: str, operand: DeviceOperand, start: Callable[[Any], Any]) -> None:
        self._step()
        if operand.size_bytes:
            self._move(name, start, self._segment.check_next_step)
        self._step()

    # ---- messages --------------------------------------------------------------------------------

    def send(self, operand: DeviceOperand, to: int) -> None:
        """Send a tensor to one member; returns when it has been received."""
        segment = self._segment
        with self._lock, self._explaining("send"):
            done = self._sent[to] + 2
            self._write_message_header(operand, to)
            segment.tell_sent(to, done - 1)
            segment.wait_taken(to, done - 1)
            if operand.size_bytes:
                self._move(
                    "send",
                    lambda pg: pg.send([operand.data], to, 0),
                    lambda deadline: segment.check_taken(to, done, deadline),
                )
            segment.tell_sent(to, done)
            segment.wait_taken(to, done)
            self._sent[to] = done

    def receive(self, operand: DeviceOperand, source: int) -> None:
        """Receive a tensor from one member."""
        segment = self._segment
        with self._lock, self._explaining("recv"):
            done = self._taken[source] + 2
            segment.wait_sent(source, done - 1)
            self._check_message(operand, source)
            segment.tell_taken(source, done - 1)
            if operand.size_bytes:
                self._move(
                    "recv",
                    lambda pg: pg.recv([operand.data], source, 0),
                    lambda deadline: segment.check_sent(source, done, deadline),
                )
            segment.tell_taken(source, done)
            segment.wait_sent(source, done)
            self._taken[source] = done

    # ---- the process group -----------------------------------------------------------------------

    def _move(self, name: str, start: Callable[[Any], Any], check: Callable[[float], None]) -> None:
        """Move data; all who take part have come."""
        try:
            work = self._kind.follow(start(self._connection.group))
        except (RuntimeError, ValueError, TypeError) as error:
            self._explain(error, name, check)
        self._wait_for(work.is_completed, check)
        try:
            # It is done, or has failed: this tells, and lets what the caller does next on its
            # device come after it.
            work.wait()
        except RuntimeError as error:
            self._explain(error, name, check)

    def _wait_for(self, is_done: Callable[[], bool], check: Callable[[float], None]) -> None:
        """Wait, and look after those who are needed.

        Parameters
        ----------
        check : callable
            Given a deadline, raises `Lost` if one of them will not do its part.
        """
        started = time.monotonic()
        deadline, looked, pause = started + self._timeout_s, started, _PAUSE_MIN_S
        while not is_done():
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                check(deadline)
                if now > deadline:  # all others have done theirs
                    raise self._segment.break_up(shared.TIMED_OUT, self.rank)
            if now - started > _SPIN_S:
                time.sleep(pause)
                pause = min(pause * 1.5, _PAUSE_MAX_S)

    def _explain(self, error: BaseException, name: str, check: Callable[[float], None]) -> NoReturn:
        """Raise for a failure of the process group: most likely a member has died."""
        end = time.monotonic() + _DYING_S
        if not isinstance(error, (ValueError, TypeError)):
            while time.monotonic() < end:
                check(end + self._timeout_s)
                time.sleep(_PAUSE_MAX_S)
        self._segment.break_up(shared.FAILED, self.rank)
        self._fail(f"{name}: {type(error).__name__}: {str(error).strip()}")

    def _break(self, reason: str) -> None:
        super()._break(reason)
        # Nobody waits for a member that does not come, on a GPU neither.
        self._connection.let_go(is_whole=False)

    def destroy(self) -> None:
        """This member takes no part any more; the others are told, and what it has is freed."""
        self._connection.let_go(is_whole=not self._broken)
        super().destroy()


# ---- tensors -------------------------------------------------------------------------------------


@final
class DeviceOperand:
    """A tensor while it takes part in an operation."""

    __slots__ = ("_target", "data", "name", "size_bytes")

    def __init__(self, tensor: Any, writes: bool) -> None:
        plain = tensor.detach()
        #: Contiguous, as process groups want it; the user's memory if that is.
        self.data = plain.contiguous()
        self.name = str(plain.dtype).removeprefix("torch.")
        self.size_bytes = int(plain.numel() * plain.element_size())
        self._target = plain if writes and not plain.is_contiguous() else None

    def finish(self) -> None:
        """The operation is over: what was written is the user's."""
        if self._target is not None:
            self._target.copy_(self.data)


def _open_on_device(tensor: Any, device: Any, group_name: str, writes: bool) -> DeviceOperand:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise RuntimeError(
            f"A {type(tensor).__name__} cannot take part: group '{group_name}' is for torch.Tensor "
            f"on {device}. Pass torch.as_tensor(value, device='{device}'), or use a group with "
            "backend='gloo' for arrays in the machine's memory."
        )
    if tensor.device != device:
        raise RuntimeError(
            f"A tensor on {tensor.device} cannot take part: group '{group_name}' is for tensors on "
            f"{device}, this process's device when it joined. Pass tensor.to('{device}'), or use "
            "a group with backend='gloo' for tensors in the machine's memory."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"A tensor of layout {tensor.layout} cannot take part; pass a dense one.")
    return DeviceOperand(tensor, writes)


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _reduce_op(op: ReduceOp) -> Any:
    if not isinstance(op, ReduceOp):
        raise TypeError(f"op must be a ReduceOp, not {op!r:.100}")
    return getattr(_distributed().ReduceOp, op.name)
