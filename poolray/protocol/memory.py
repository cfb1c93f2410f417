"""What a node tells of its memory: which objects there are, where, and who holds them.

What: the table that `poolray.util.memory_summary` and `poolray memory` show.
Who calls: the node machine makes it, shells pass it on, the faces turn it into text.
May touch: nothing.
Invariants: a snapshot; sums are over all objects, also over those that a limit leaves out.
"""

from __future__ import annotations

import enum

import msgspec

from poolray.ids import NodeId, ObjectId

#: Raised when a field changes its meaning: the reader may be another installation.
MEMORY_TABLE_VERSION = 1


class HolderKind(enum.IntEnum):
    """Why an object is kept; the names are those that users of the reference know."""

    LOCAL_REFERENCE = 0  #: a process has refs to it
    PINNED_IN_MEMORY = 1  #: a process has no ref, but looks at its memory (an array from `get`)
    USED_BY_PENDING_TASK = 2  #: an argument, or a ref in one, of a task that has not ended
    USED_BY_LINEAGE = 3  #: an argument of an ended task that may have to run again
    CAPTURED_IN_OBJECT = 4  #: another object has a ref to it inside
    FUNCTION_DEFINITION = 5  #: a function's code and what it captured
    WAITING_IN_STREAM = 6  #: a generator has yielded it, and nobody has taken it


class Place(enum.IntEnum):
    """Where a value is."""

    PENDING = 0  #: nowhere yet
    INLINE = 1  #: in the node's own memory
    ARENA = 2  #: in shared memory
    FILE = 3  #: on disk
    ELSEWHERE = 4  #: on another node


class ObjectHolder(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One reason for which an object is kept."""

    kind: HolderKind
    pid: int = 0  #: the process; 0: none, or one on another node
    #: Of the task or function; of the containing object, its id; of another node, its id's start.
    name: str = ""


class ObjectEntry(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One object."""

    object_id: ObjectId
    size_bytes: int  #: -1 while pending
    place: Place
    is_error: bool
    holders: list[ObjectHolder]
    call_site: str = ""  #: where it was made; empty unless that is recorded


class PlaceUse(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Objects in one kind of place."""

    objects: int = 0
    size_bytes: int = 0


class SpillingUse(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What has moved between memory and disk since the start."""

    spilled_objects: int = 0
    spilled_bytes: int = 0
    spill_s: float = 0.0  #: seconds spent
    restored_objects: int = 0
    restored_bytes: int = 0
    restore_s: float = 0.0


class MemoryTable(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The memory of one node."""

    node_id: NodeId
    pid: int  #: the process that the node lives in
    #: Largest first, then in order of their making; see `left_out`.
    objects: list[ObjectEntry]
    left_out: int  #: objects beyond the limit that was asked for
    places: dict[Place, PlaceUse]
    capacity_bytes: int  #: of the arena
    used_bytes: int  #: of its pages, those of objects that are being written included
    high_water_bytes: int  #: of its pages that were ever used
    free_ranges: int
    largest_free_bytes: int  #: the largest object that fits now
    records_call_sites: bool
    spilling: SpillingUse = SpillingUse()
    version: int = MEMORY_TABLE_VERSION
