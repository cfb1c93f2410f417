"""Where the calls of a class may run, as far as one node can tell.

What: compares what a class asks for with what this node is and has, once, when it is defined.
Who calls: `node/functions.py`.
May touch: nothing.
Invariants: what a node is and has never changes, so an answer holds for the life of the class.
"""

from __future__ import annotations

from collections.abc import Mapping

from poolray.exceptions import (
    ActorUnschedulableError,
    PoolrayError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
)
from poolray.ids import NodeId
from poolray.protocol.values import CallKind, Delivery, TaskClass
from poolray.scheduling.labels import describe, meets_one
from poolray.scheduling.resources import ResourceAccount, from_fixed
from poolray.tasks.class_queue import Obstacle

_UNSCHEDULABLE = (
    "The node specified via NodeAffinitySchedulingStrategy doesn't exist any more or is "
    "infeasible, and soft=False was specified. node_id={}"
)


def find_obstacle(
    task_class: TaskClass,
    node_id: NodeId,
    labels: Mapping[str, str],
    resources: ResourceAccount,
    has_peers: bool,
) -> Obstacle | None:
    """Why this node can never run calls of a class; None: it can."""
    placement = task_class.placement
    needed = dict(task_class.resources)
    for name, amount in task_class.placed_with.items():
        needed[name] = needed.get(name, 0) + amount
    demand = from_fixed(needed)
    fits = resources.fits_ever(needed)
    if placement is not None and placement.node_id and not placement.is_soft:
        if placement.node_id != node_id or not fits:
            text = _UNSCHEDULABLE.format(placement.node_id.hex())
            # (Whether another node lives the head knows.)
            return Obstacle(text, is_final=placement.node_id == node_id or not has_peers)
        return None
    if not fits:
        return Obstacle(
            f"{demand}, more than any node has (this one: {_described(resources, demand)})",
            is_final=False,
        )
    if placement is not None and not meets_one(placement.labels, labels):
        wanted = describe(placement.labels)
        return Obstacle(
            f"{demand} on a node with {wanted}; this one has the labels {dict(labels)}",
            is_final=False,
        )
    return None


def may_roam(task_class: TaskClass, node_id: NodeId) -> bool:
    """Whether calls of a class may be better off on another node although this one could run them.

    Calls of a placement group run here while a bundle is here.
    """
    placement = task_class.placement
    kinds = (CallKind.CALL, CallKind.CREATE, CallKind.LEND)
    if task_class.kind not in kinds or task_class.delivery is not Delivery.OBJECTS:
        return False
    if placement is None:
        return True
    elsewhere = bool(placement.node_id) and placement.node_id != node_id
    return not placement.group and (placement.spread or elsewhere or bool(placement.wishes))


def unschedulable(task_class: TaskClass, reason: str) -> PoolrayError:
    """What calls of a class that no node may ever run come to."""
    if task_class.kind is CallKind.CREATE:
        return ActorUnschedulableError(
            f"The actor is not schedulable: {reason}, name={task_class.name}"
        )
    text = f"The task is not schedulable: {reason}, name={task_class.name}"
    if task_class.placement is not None and task_class.placement.group:
        return TaskPlacementGroupRemoved(text)
    return TaskUnschedulableError(text)


def _described(resources: ResourceAccount, demand: Mapping[str, float]) -> str:
    total = from_fixed(resources.total)
    return ", ".join(f"{total.get(name, 0.0):g} {name}" for name in demand)
