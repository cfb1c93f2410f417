"""Collective operations among actors and tasks of one machine: allreduce, broadcast, send, ….

    collective.py ── what users call ──▶ group.py ── blocks and steps ──▶ segment.py
                                             └───── at first ──▶ rendezvous.py

What: the names of the reference's `ray.util.collective`.
Who calls: user code.
May touch: nothing by itself.
Invariants: see the modules.
"""

from __future__ import annotations

from poolray.util.collective.collective import (
    allgather,
    allgather_multigpu,
    allreduce,
    allreduce_multigpu,
    barrier,
    broadcast,
    broadcast_multigpu,
    create_collective_group,
    destroy_collective_group,
    get_collective_group_size,
    get_group_handle,
    get_rank,
    gloo_available,
    init_collective_group,
    is_backend_available,
    is_group_initialized,
    nccl_available,
    recv,
    recv_multigpu,
    reduce,
    reduce_multigpu,
    reducescatter,
    reducescatter_multigpu,
    send,
    send_multigpu,
)
from poolray.util.collective.types import (
    Backend,
    CollectiveError,
    CollectiveTimeoutError,
    ReduceOp,
)

__all__ = [
    "Backend",
    "CollectiveError",
    "CollectiveTimeoutError",
    "ReduceOp",
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
