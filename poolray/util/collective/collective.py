"""The calls of `poolray.util.collective`: groups of actors, and what they do together.

What: checks what users pass in, keeps the groups of this process, joins those that the driver has
declared.
Who calls: user code, in actors and tasks; `create_collective_group` in the driver.
May touch: what `group.py` and `torch_group.py` touch; a named actor for each declared group.
Invariants: a process is once in a group; a call that is refused has taken no part, so the others
wait for it (until their timeout).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from poolray.actor import ActorHandle, get_actor, kill
from poolray.api import get, remote
from poolray.local import process_state
from poolray.session import ids_of_process
from poolray.util.collective import process_group
from poolray.util.collective.group import SharedMemoryGroup
from poolray.util.collective.membership import Elements
from poolray.util.collective.operands import check_tensor
from poolray.util.collective.torch_group import TorchGroup
from poolray.util.collective.types import Backend, ReduceOp

__all__ = [
    "allgather",
    "allgather_multigpu",
    "allreduce",
    "allreduce_multigpu",
    "barrier",
    "broadcast",
    "broadcast_multigpu",
    "create_collective_group",
    "destroy_collective_group",
    "get_collective_group_size",
    "get_group_handle",
    "get_rank",
    "gloo_available",
    "init_collective_group",
    "is_backend_available",
    "is_group_initialized",
    "nccl_available",
    "recv",
    "recv_multigpu",
    "reduce",
    "reduce_multigpu",
    "reducescatter",
    "reducescatter_multigpu",
    "send",
    "send_multigpu",
]

Group: TypeAlias = SharedMemoryGroup | TorchGroup

#: Guards the two below.
_lock = threading.Lock()
#: Name -> this process's part in the group.
_groups: dict[str, Group] = {}
#: Name -> held while this process joins the group, which may take long.
_join_locks: dict[str, threading.Lock] = {}


# ---- backends ------------------------------------------------------------------------------------


def nccl_available() -> bool:
    """Whether groups can be made with backend "nccl": torch is there, and a build with NCCL.

    Notes
    -----
    Imports torch, where it is installed. A GPU is looked for in the member, when it joins.
    """
    return is_backend_available("NCCL")


def gloo_available() -> bool:
    """Whether groups can be made with backend "gloo": always."""
    return is_backend_available("GLOO")


def is_backend_available(backend: str) -> bool:
    """Whether groups can be made with a backend.

    Examples
    --------
    >>> from poolray.util import collective
    >>> collective.is_backend_available("gloo"), collective.is_backend_available("mpi")
    (True, False)
    """
    try:
        return not _objection_to(backend)
    except ValueError:
        return False


def _objection_to(backend: str) -> str:
    """Why there is no group with a backend; empty: there may be one."""
    return "" if Backend(backend) == Backend.GLOO else process_group.NCCL.objection()


# ---- groups --------------------------------------------------------------------------------------


def init_collective_group(
    world_size: int,
    rank: int,
    backend: str = Backend.NCCL,
    group_name: str = "default",
    gloo_timeout: float = 30000,
) -> None:
    """Join a group, in an actor or a task.

    Parameters
    ----------
    world_size : int
        Members of the group. All of them make this call, each with a rank of its own.
    rank : int
        From 0 to `world_size - 1`.
    backend : str, default "NCCL", as in the reference
        "gloo" for arrays in the machine's memory, "nccl" for tensors of torch on GPUs: one GPU for
        each member, the current one when it joins.
    group_name : str, default "default"
    gloo_timeout : float, milliseconds, default 30000
        How long a member may keep the others waiting, in this call and in each operation; with
        either backend.

    Raises
    ------
    RuntimeError
        This is a driver, or the process is in the group already, or it has no GPU for "nccl".
    ValueError
        There is no such backend here (for "nccl": torch is missing), or no name.
    CollectiveError
        The members do not agree on ranks and size.
    CollectiveTimeoutError
        Not all of them came in time.

    Notes
    -----
    Blocks until all members are there. They must be on one machine.

    Examples
    --------
    >>> import numpy, poolray
    >>> from poolray.util import collective
    >>> @poolray.remote
    ... class Member:
    ...     def sum(self, rank: int) -> list[float]:
    ...         collective.init_collective_group(2, rank, backend="gloo", group_name="sums")
    ...         array = numpy.full(3, rank + 1.0)
    ...         collective.allreduce(array, "sums")
    ...         return array.tolist()
    >>> members = [Member.remote() for _ in range(2)]
    >>> poolray.get([member.sum.remote(rank) for rank, member in enumerate(members)])
    [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
    """
    _check_inside_actor()
    if not group_name:
        raise ValueError(f"group_name '{group_name}' needs to be a string.")
    objection = _objection_to(backend)
    if objection:
        raise ValueError(objection)
    if is_group_initialized(group_name):
        raise RuntimeError("Trying to initialize a group a second time.")
    assert world_size > 0, f"world_size is {world_size}: a group has members"
    assert 0 <= rank < world_size, f"rank is {rank}: it must be from 0 to {world_size - 1}"
    with _joining(group_name):
        if is_group_initialized(group_name):
            raise RuntimeError("Trying to initialize a group a second time.")
        _join(group_name, world_size, rank, backend, gloo_timeout)


def create_collective_group(
    actors: Sequence[ActorHandle[Any]],
    world_size: int,
    ranks: Sequence[int],
    backend: str = Backend.NCCL,
    group_name: str = "default",
    gloo_timeout: float = 30000,
) -> None:
    """Declare a group of actors, in the driver; each joins at its first operation.

    Parameters
    ----------
    actors : sequence of ActorHandle
    world_size : int
        How many they are.
    ranks : sequence of int
        The rank of each: all from 0 to `world_size - 1`, in any order.
    backend, group_name, gloo_timeout
        As in `init_collective_group`.

    Raises
    ------
    RuntimeError
        There is a group of this name; ranks, sizes and actors do not fit; there is no such backend
        here.

    Examples
    --------
    >>> import numpy, poolray
    >>> from poolray.util import collective
    >>> @poolray.remote
    ... class Member:
    ...     def largest(self, values: list[float]) -> list[float]:
    ...         array = numpy.array(values)
    ...         collective.allreduce(array, "declared", collective.ReduceOp.MAX)
    ...         return array.tolist()
    >>> members = [Member.remote() for _ in range(2)]
    >>> collective.create_collective_group(
    ...     members, 2, [0, 1], backend="gloo", group_name="declared"
    ... )
    >>> poolray.get([members[0].largest.remote([1.0, 5.0]), members[1].largest.remote([4.0, 2.0])])
    [[4.0, 5.0], [4.0, 5.0]]
    """
    name = _declaration_name(group_name)
    if _find_declaration(group_name) is not None:
        raise RuntimeError("Trying to initialize a group twice.")
    _check_ranks(actors, world_size, ranks)
    try:
        objection = _objection_to(backend)
    except ValueError as error:
        objection = str(error)
    if objection:
        raise RuntimeError(objection)
    ids = [actor._ray_actor_id for actor in actors]
    made = remote(_Declaration).options(name=name, lifetime="detached", num_cpus=0).remote()
    get(made.set_info.remote(ids, world_size, list(ranks), backend, gloo_timeout))


def _check_ranks(actors: Sequence[Any], world_size: int, ranks: Sequence[int]) -> None:
    if len(ranks) != len(actors):
        raise RuntimeError(
            f"Each actor should correspond to one rank. Got '{len(ranks)}' ranks but "
            f"'{len(actors)}' actors"
        )
    if set(ranks) != set(range(len(ranks))):
        raise RuntimeError(
            f"Ranks must be a permutation from 0 to '{len(ranks) - 1}'. Got '{list(ranks)}'."
        )
    if world_size <= 0:
        raise RuntimeError(f"World size must be greater than zero. Got '{world_size}'.")
    if world_size != len(actors):
        raise RuntimeError(f"World size is '{world_size}', and there are '{len(actors)}' actors.")


def destroy_collective_group(group_name: str = "default") -> None:
    """Leave a group for good: operations of the other members fail from now on.

    Nothing happens when the process is in no group of this name.

    Raises
    ------
    RuntimeError
        This is a driver.
    """
    _check_inside_actor()
    with _lock:
        group = _groups.pop(group_name, None)
    if group is None:
        return
    group.destroy()
    declaration = _find_declaration(group_name)
    if declaration is not None:
        kill(declaration)


def is_group_initialized(group_name: str) -> bool:
    """Whether this process has joined a group."""
    with _lock:
        return group_name in _groups


def get_rank(group_name: str = "default") -> int:
    """The rank of this process in a group; -1: it is in no group of this name.

    Raises
    ------
    RuntimeError
        This is a driver.
    """
    found = _find_part(group_name)
    return -1 if found is None else found[0]


def get_collective_group_size(group_name: str = "default") -> int:
    """How many members a group has; -1: this process is in no group of this name.

    Raises
    ------
    RuntimeError
        This is a driver.
    """
    found = _find_part(group_name)
    return -1 if found is None else found[1]


def get_group_handle(group_name: str = "default") -> Group:
    """This process's part in a group; joins a declared one.

    Raises
    ------
    RuntimeError
        This is a driver, or the process is in no group of this name.
    """
    _check_inside_actor()
    group = _groups.get(group_name)
    if group is not None:
        return group
    with _joining(group_name):
        group = _groups.get(group_name)
        if group is not None:
            return group
        part = _declared_part(group_name)
        if part is None:
            raise RuntimeError(
                f"The collective group '{group_name}' is not initialized in the process: call "
                "init_collective_group() in each member, or create_collective_group() in the "
                "driver, first."
            )
        rank, world_size, backend, gloo_timeout = part
        return _join(group_name, world_size, rank, backend, gloo_timeout)


def _joining(group_name: str) -> threading.Lock:
    with _lock:
        return _join_locks.setdefault(group_name, threading.Lock())


def _join(group_name: str, world_size: int, rank: int, backend: str, gloo_timeout: float) -> Group:
    if not gloo_timeout > 0:
        raise ValueError(f"gloo_timeout is {gloo_timeout!r}: it must be above 0 milliseconds")
    node_id, job_id = ids_of_process()
    make = SharedMemoryGroup if Backend(backend) == Backend.GLOO else TorchGroup
    group: Group = make(node_id + job_id, world_size, rank, group_name, gloo_timeout / 1000)
    with _lock:
        _groups[group_name] = group
    return group


def _find_part(group_name: str) -> tuple[int, int] | None:
    """Rank and size, of a group that this process is in, or is declared to be in."""
    _check_inside_actor()
    group = _groups.get(group_name)
    if group is not None:
        return group.rank, group.world_size
    part = _declared_part(group_name)
    return None if part is None else part[:2]


# ---- declared groups -----------------------------------------------------------------------------


class _Declaration:
    """What the driver has declared of a group, for its members to ask."""

    def __init__(self) -> None:
        self._info: tuple[Any, ...] = ()

    def set_info(self, *info: Any) -> None:
        """Actors' ids, size, ranks, backend, timeout."""
        self._info = info

    def get_info(self) -> tuple[Any, ...]:
        """The same."""
        return self._info


def _declaration_name(group_name: str) -> str:
    return f"info_{group_name}"


def _find_declaration(group_name: str) -> ActorHandle[Any] | None:
    try:
        return get_actor(_declaration_name(group_name))
    except ValueError:
        return None


def _declared_part(group_name: str) -> tuple[int, int, str, float] | None:
    """Rank, size, backend and timeout of this actor in a declared group."""
    setup = process_state.actor()
    declaration = _find_declaration(group_name) if setup is not None else None
    if setup is None or declaration is None:
        return None
    ids, world_size, ranks, backend, gloo_timeout = get(declaration.get_info.remote())
    if setup.actor_id not in ids:
        return None
    return ranks[ids.index(setup.actor_id)], world_size, backend, gloo_timeout


# ---- operations ----------------------------------------------------------------------------------


def barrier(group_name: str = "default") -> None:
    """Wait until all members have come here."""
    get_group_handle(group_name).barrier()


def allreduce(tensor: Any, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Reduce the members' tensors to one, which replaces that of each.

    Parameters
    ----------
    tensor : numpy.ndarray, or torch.Tensor on the group's device
        Of one type and size in all members; written to.
    group_name : str, default "default"
    op : ReduceOp, default SUM

    Raises
    ------
    RuntimeError
        It is no tensor; there is no such group.
    ValueError
        The array is read-only, as the arguments of a call are.
    CollectiveError
        A member has died or left, or called something else.
    CollectiveTimeoutError
        A member did not come in time.

    Notes
    -----
    Blocks. Every member gets the same bits.
    """
    check_tensor(tensor)
    group = get_group_handle(group_name)
    operand: Any = group.open(tensor, writes=True)
    group.allreduce(operand, op)
    operand.finish()


def reduce(
    tensor: Any, dst_rank: int = 0, group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> None:
    """Reduce the members' tensors to one, which replaces that of one member.

    Parameters
    ----------
    tensor, group_name, op
        As in `allreduce`.
    dst_rank : int, default 0
        Whose tensor the result replaces; those of the others stay as they are.

    Raises
    ------
    RuntimeError, ValueError, CollectiveError
        As in `allreduce`; ValueError: there is no such rank.
    """
    check_tensor(tensor)
    group = get_group_handle(group_name)
    _check_rank(group, dst_rank)
    operand: Any = group.open(tensor, writes=group.rank == dst_rank)
    group.reduce(operand, dst_rank, op)
    operand.finish()


def broadcast(tensor: Any, src_rank: int = 0, group_name: str = "default") -> None:
    """Copy one member's tensor into those of the others.

    Parameters
    ----------
    tensor, group_name
        As in `allreduce`.
    src_rank : int, default 0
        Whose tensor it is.

    Raises
    ------
    RuntimeError, ValueError, CollectiveError
        As in `reduce`.
    """
    check_tensor(tensor)
    group = get_group_handle(group_name)
    _check_rank(group, src_rank)
    operand: Any = group.open(tensor, writes=group.rank != src_rank)
    group.broadcast(operand, src_rank)
    operand.finish()


def allgather(tensor_list: list[Any], tensor: Any, group_name: str = "default") -> None:
    """Copy the members' tensors into a list of tensors, by rank, in each member.

    Parameters
    ----------
    tensor_list : list of tensors
        One for each member, as large as `tensor`; written to.
    tensor : numpy.ndarray, or torch.Tensor on the group's device
        What this member gives.
    group_name : str, default "default"

    Raises
    ------
    RuntimeError
        The list has another length; and as in `allreduce`.
    ValueError, CollectiveError
        As in `allreduce`.
    """
    check_tensor(tensor)
    _check_tensor_list(tensor_list)
    group = get_group_handle(group_name)
    if len(tensor_list) != group.world_size:
        raise RuntimeError(
            "The length of the tensor list operands to allgather must be equal to world_size."
        )
    operand: Any = group.open(tensor)
    targets: list[Any] = [group.open(target, writes=True) for target in tensor_list]
    _check_alike(operand, targets)
    group.allgather(targets, operand)
    for target in targets:
        target.finish()


def reducescatter(
    tensor: Any,
    tensor_list: list[Any],
    group_name: str = "default",
    op: ReduceOp = ReduceOp.SUM,
) -> None:
    """Reduce the members' lists of tensors to one list, of which each member gets one tensor.

    Parameters
    ----------
    tensor : numpy.ndarray, or torch.Tensor on the group's device
        For the result, the one at this member's rank; written to.
    tensor_list : list of tensors
        One for each member; they stay as they are.
    group_name, op
        As in `allreduce`.

    Raises
    ------
    RuntimeError
        The list has another length; and as in `allreduce`.
    ValueError, CollectiveError
        As in `allreduce`.
    """
    check_tensor(tensor)
    _check_tensor_list(tensor_list)
    group = get_group_handle(group_name)
    if len(tensor_list) != group.world_size:
        raise RuntimeError(
            "The length of the tensor list operands to reducescatter must be equal to world_size."
        )
    target: Any = group.open(tensor, writes=True)
    operands: list[Any] = [group.open(part) for part in tensor_list]
    _check_alike(target, operands)
    group.reducescatter(target, operands, op)
    target.finish()


def send(tensor: Any, dst_rank: int, group_name: str = "default") -> None:
    """Send a tensor to one member, which calls `recv`.

    Raises
    ------
    RuntimeError
        The rank is this member's own; and as in `allreduce`.
    ValueError, CollectiveError
        As in `reduce`.

    Notes
    -----
    Blocks until the other member has the tensor: two that send to each other first and receive
    afterwards wait until their timeout.
    """
    check_tensor(tensor)
    group = get_group_handle(group_name)
    _check_rank(group, dst_rank)
    if dst_rank == group.rank:
        raise RuntimeError(f"The destination rank '{dst_rank}' is self.")
    operand: Any = group.open(tensor)
    group.send(operand, dst_rank)


def recv(tensor: Any, src_rank: int, group_name: str = "default") -> None:
    """Receive a tensor that one member sends, into one of the same type and size.

    Raises
    ------
    RuntimeError
        The rank is this member's own; and as in `allreduce`.
    ValueError, CollectiveError
        As in `reduce`.
    """
    check_tensor(tensor)
    group = get_group_handle(group_name)
    _check_rank(group, src_rank)
    if src_rank == group.rank:
        raise RuntimeError(f"The destination rank '{src_rank}' is self.")
    operand: Any = group.open(tensor, writes=True)
    group.receive(operand, src_rank)
    operand.finish()


# ---- GPUs ----------------------------------------------------------------------------------------


def synchronize(gpu_id: int) -> None:
    """Wait for all that this process has begun on one of its GPUs.

    Parameters
    ----------
    gpu_id : int
        From 0, of those that this process sees.

    Raises
    ------
    RuntimeError
        There is no torch, or no such GPU.
    """
    objection = process_group.NCCL.objection()
    if objection:
        raise RuntimeError(f"synchronize call requires CUDA and NCCL. {objection}")
    import torch

    torch.cuda.synchronize(gpu_id)


def _on_gpus(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: Multigpu calls requires NCCL and Cupy; this version of poolray has one GPU "
            "for each member of a group. Make an actor with num_gpus=1 for each GPU, and use "
            f"{name.removesuffix('_multigpu')}."
        )

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = "Refused: a member of a group has one GPU in this version."
    return refuse


allreduce_multigpu = _on_gpus("allreduce_multigpu")
reduce_multigpu = _on_gpus("reduce_multigpu")
broadcast_multigpu = _on_gpus("broadcast_multigpu")
allgather_multigpu = _on_gpus("allgather_multigpu")
reducescatter_multigpu = _on_gpus("reducescatter_multigpu")
send_multigpu = _on_gpus("send_multigpu")
recv_multigpu = _on_gpus("recv_multigpu")


# ---- checks --------------------------------------------------------------------------------------


def _check_inside_actor() -> None:
    if not process_state.is_worker():
        raise RuntimeError("The collective APIs shall be only used inside a Ray actor or task.")


def _check_rank(group: Group, rank: int) -> None:
    if rank < 0:
        raise ValueError(f"rank '{rank}' is negative.")
    if rank >= group.world_size:
        raise ValueError(f"rank '{rank}' must be less than world size '{group.world_size}'")


def _check_tensor_list(tensors: Any) -> None:
    if not isinstance(tensors, list):
        raise RuntimeError(f"The input must be a list of tensors. Got '{type(tensors)}'.")
    if not tensors:
        raise RuntimeError("Got an empty list of tensors.")
    for tensor in tensors:
        check_tensor(tensor)


def _check_alike(one: Elements, others: Sequence[Elements]) -> None:
    for place, other in enumerate(others):
        if (other.size_bytes, other.name) != (one.size_bytes, one.name):
            raise ValueError(
                f"The tensor at {place} of the list has {other.size_bytes} bytes of {other.name}, "
                f"the single one {one.size_bytes} bytes of {one.name}: all must be alike."
            )
