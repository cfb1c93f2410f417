"""A node in numbers.

What: the record of a node's tables, and how it is taken.
Who calls: `node/node.py`, for tests, the state API and metrics.
May touch: nothing.
Invariants: a snapshot: what becomes of the node changes nothing in it.
"""

from __future__ import annotations

import dataclasses

from poolray.node.parts import Parts
from poolray.node.state import NodeState
from poolray.node.store_records import StoreStatistics
from poolray.objects.allocator import AllocatorStatistics
from poolray.protocol.directory import Demand
from poolray.protocol.node import Heartbeat
from poolray.scheduling.resources import from_fixed

#: Shapes in one heartbeat: those of which most calls wait.
_DEMANDS_MAX = 100


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStatistics:
    """A snapshot of a node, for tests, the state API and metrics."""

    tasks: int  #: tasks that have not ended
    queued_calls: int
    objects: int
    clients: int
    workers: int
    idle_workers: int
    busy_workers: int
    groups: int
    functions: int
    open_requests: int
    actors: int  #: that are not dead
    bundles: int  #: of placement groups, kept here
    streams: int  #: of generators, that somebody may take items of
    resources_total: dict[str, float]
    resources_available: dict[str, float]
    arena: AllocatorStatistics
    store: StoreStatistics


def statistics_of(state: NodeState, parts: Parts) -> NodeStatistics:
    """A snapshot of the tables."""
    groups = state.groups.values()
    return NodeStatistics(
        tasks=len(state.tasks),
        queued_calls=sum(queue.queued_calls for queue in state.classes.values()),
        objects=len(state.objects),
        clients=len(state.clients),
        workers=len(state.workers),
        idle_workers=sum(len(group.idle) for group in groups),
        busy_workers=sum(bool(worker.packets) for worker in state.workers.values()),
        groups=len(state.groups),
        functions=len(state.functions),
        open_requests=sum(len(client.requests) for client in state.clients.values()),
        actors=parts.actors.count(),
        bundles=parts.bundles.count(),
        streams=parts.streams.count(),
        resources_total=from_fixed(state.resources.total),
        resources_available=from_fixed(state.resources.available),
        arena=state.allocator.statistics(),
        store=parts.store.statistics(),
    )


def demands_of(state: NodeState) -> list[Demand]:
    """What waits, by the resources of one call; of most calls first."""
    counts: dict[tuple[tuple[str, int], ...], int] = {}
    for queue in state.classes.values():
        if queue.queued_calls:
            shape = tuple(sorted(queue.task_class.resources.items()))
            counts[shape] = counts.get(shape, 0) + queue.queued_calls
    found = [Demand(resources=dict(shape), count=count) for shape, count in counts.items()]
    found.sort(key=lambda demand: -demand.count)
    return found[:_DEMANDS_MAX]


def heartbeat_of(state: NodeState) -> Heartbeat:
    """What a node says of itself now and then."""
    return Heartbeat(
        node_id=state.node_id,
        available=dict(state.resources.available),
        queued_tasks=sum(queue.queued_calls for queue in state.classes.values()),
        demands=demands_of(state),
    )
