"""What a process knows better than its node: whether it holds an object by refs, or by views only.

What: marks such objects in a table of memory.
Who calls: the runtime; `poolray.util.memory`.
May touch: nothing.
Invariants: a table is a snapshot, and a new one is given.
"""

from __future__ import annotations

import msgspec

from poolray.client import Client
from poolray.protocol.memory import HolderKind, MemoryTable, ObjectEntry, ObjectHolder


def with_views(table: MemoryTable, client: Client, pid: int) -> MemoryTable:
    """A table of this process's node, as the process knows it: `client` is its, `pid` its own."""
    viewed = dict.fromkeys(client.viewed_only(entry.object_id for entry in table.objects))
    if not viewed:
        return table
    objects = [_pinned(e, pid) if e.object_id in viewed else e for e in table.objects]
    return msgspec.structs.replace(table, objects=objects)


def _pinned(entry: ObjectEntry, pid: int) -> ObjectEntry:
    """An object that a process holds by views only."""
    holders = [
        ObjectHolder(kind=HolderKind.PINNED_IN_MEMORY, pid=pid)
        if holder.pid == pid and holder.kind is HolderKind.LOCAL_REFERENCE
        else holder
        for holder in entry.holders
    ]
    return msgspec.structs.replace(entry, holders=holders)
