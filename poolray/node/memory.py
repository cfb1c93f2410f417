"""A look at the node's memory: which objects there are, where they are, who holds them.

What: makes a `MemoryTable` of the machine's tables.
Who calls: `node/node.py`, when somebody asks.
May touch: nothing; it changes nothing either.
Invariants: each holder that the counts know appears; totals are over all objects.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from poolray.ids import ClientId, ObjectId
from poolray.node.borrowing import is_peer, node_of
from poolray.node.state import NodeState
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.memory import (
    HolderKind,
    MemoryTable,
    ObjectEntry,
    ObjectHolder,
    Place,
    PlaceUse,
    SpillingUse,
)
from poolray.protocol.state import MemoryRow
from poolray.protocol.values import InArena, InFile
from poolray.tasks.lifecycle import TaskRecord

if TYPE_CHECKING:
    from poolray.node.parts import Parts

_OBJECTS_PER_ROW = 500


def memory_table(state: NodeState, parts: Parts, pid: int, limit: int | None) -> MemoryTable:
    """The table of a node.

    Parameters
    ----------
    pid : int
        The node's own process, where its local client lives.
    limit : int or None
        Objects to list: the largest ones.
    """
    objects = state.objects
    places = dict.fromkeys(Place, (0, 0))
    for record in objects.values():
        place, size = _place_of(record)
        count, total = places[place]
        places[place] = count + 1, total + max(0, size)
    ids = list(objects)
    if limit is not None and limit < len(ids):
        ids = heapq.nlargest(limit, ids, key=lambda o: _place_of(objects[o])[1])
    else:
        ids.sort(key=lambda o: -_place_of(objects[o])[1])
    holders: dict[ObjectId, list[ObjectHolder]] = {object_id: [] for object_id in ids}
    _add_clients(state, pid, holders)
    _add_functions(state, holders)
    kept = [record for record in parts.tasks.lineage.tasks.values() if record.owner_pins]
    _add_tasks(state, _reading(state), HolderKind.USED_BY_PENDING_TASK, holders)
    _add_tasks(state, kept, HolderKind.USED_BY_LINEAGE, holders)
    for object_id in parts.streams.holds():  # items of generators that nobody has taken
        if (known := holders.get(object_id)) is not None:
            known.append(ObjectHolder(kind=HolderKind.WAITING_IN_STREAM, name="generator"))
    _add_containers(objects, holders)
    arena, store = state.allocator.statistics(), parts.store.statistics()
    call_sites = parts.objects.call_sites
    return MemoryTable(
        node_id=state.node_id,
        pid=pid,
        objects=[_entry(o, objects[o], holders[o], call_sites.get(o, "")) for o in ids],
        left_out=len(objects) - len(ids),
        places={
            place: PlaceUse(objects=count, size_bytes=size)
            for place, (count, size) in places.items()
        },
        capacity_bytes=arena.capacity_bytes,
        used_bytes=arena.used_bytes,
        high_water_bytes=arena.high_water_bytes,
        free_ranges=arena.free_ranges,
        largest_free_bytes=arena.largest_free_bytes,
        records_call_sites=bool(state.config.record_ref_creation_sites),
        spilling=SpillingUse(
            spilled_objects=store.spilled_objects,
            spilled_bytes=store.spilled_bytes,
            spill_s=store.spill_s,
            restored_objects=store.restored_objects,
            restored_bytes=store.restored_bytes,
            restore_s=store.restore_s,
        ),
    )


def _reading(state: NodeState) -> list[TaskRecord]:
    """Tasks that workers may still read the arguments of, and whose refs they borrow."""
    found = [record for record in state.tasks.values() if record.owner_pins]
    for worker in state.workers.values():
        for packet in worker.packets:
            found.extend(packet.cancelled or ())
    return found


def in_rows(table: MemoryTable) -> list[MemoryRow]:
    """A table as rows, each with so many of its objects that it is no large message."""
    starts = range(0, max(1, len(table.objects)), _OBJECTS_PER_ROW)
    return [
        MemoryRow(
            table=msgspec.structs.replace(
                table, objects=table.objects[start : start + _OBJECTS_PER_ROW]
            )
        )
        for start in starts
    ]


def _place_of(record: ObjectRecord) -> tuple[Place, int]:
    """Where a value is, and its bytes."""
    value = record.value
    if record.state is not READY:
        return Place.PENDING, -1
    if isinstance(value, InArena):
        return Place.ELSEWHERE if value.node_id else Place.ARENA, value.size_bytes
    if isinstance(value, InFile):
        return Place.FILE, value.size_bytes
    return Place.INLINE, len(value)


def _entry(
    object_id: ObjectId, record: ObjectRecord, holders: list[ObjectHolder], call_site: str
) -> ObjectEntry:
    place, size = _place_of(record)
    return ObjectEntry(
        object_id=object_id,
        size_bytes=size,
        place=place,
        is_error=record.is_error,
        holders=holders,
        call_site=call_site,
    )


def _add_clients(
    state: NodeState, local_pid: int, holders: dict[ObjectId, list[ObjectHolder]]
) -> None:
    pid_by_client: dict[ClientId, int] = {w.client_id: w.pid for w in state.workers.values()}
    pid_by_client.update(state.pids)
    pid_by_client[state.local_client] = local_pid
    for client_id, client in state.clients.items():
        pid = pid_by_client.get(client_id, 0)
        name = f"node {node_of(client_id).hex()[:12]}" if is_peer(client_id) else ""
        for object_id in client.held:
            if (known := holders.get(object_id)) is not None:
                viewed = object_id in client.viewed
                kind = HolderKind.PINNED_IN_MEMORY if viewed else HolderKind.LOCAL_REFERENCE
                known.append(ObjectHolder(kind=kind, pid=pid, name=name))


def _add_functions(state: NodeState, holders: dict[ObjectId, list[ObjectHolder]]) -> None:
    for definition in state.functions.values():
        blob = definition.blob
        if not isinstance(blob, bytes) and (known := holders.get(blob.object_id)) is not None:
            known.append(ObjectHolder(kind=HolderKind.FUNCTION_DEFINITION, name=definition.name))


def _add_tasks(
    state: NodeState,
    records: Iterable[TaskRecord],
    kind: HolderKind,
    holders: dict[ObjectId, list[ObjectHolder]],
) -> None:
    for record in records:
        worker = state.workers.get(record.worker_id) if record.worker_id is not None else None
        holder = ObjectHolder(
            kind=kind,
            pid=worker.pid if worker is not None else 0,
            name=record.class_queue.task_class.name,
        )
        for object_id in dict.fromkeys((*record.dependencies, *record.borrows)):
            if (known := holders.get(object_id)) is not None:
                known.append(holder)


def _add_containers(
    objects: Mapping[ObjectId, ObjectRecord], holders: dict[ObjectId, list[ObjectHolder]]
) -> None:
    for object_id, record in objects.items():
        for inner in record.contained:
            if (known := holders.get(inner)) is not None:
                known.append(ObjectHolder(kind=HolderKind.CAPTURED_IN_OBJECT, name=object_id.hex()))
