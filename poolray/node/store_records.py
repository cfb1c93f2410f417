"""What the store keeps of files, of what moves between memory and disk, and of how much did.

What: records without behaviour.
Who calls: `node/store.py`; shells and the state API read the statistics.
May touch: nothing.
Invariants: those of `Store.check_invariants`.
"""

from __future__ import annotations

import dataclasses
from typing import final

from poolray.ids import ObjectId


@dataclasses.dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What has moved between memory and disk, and what waits."""

    spilled_objects: int
    spilled_bytes: int
    spill_s: float  #: seconds that threads spent writing; of several at once, the sum
    restored_objects: int
    restored_bytes: int
    restore_s: float
    #: Bytes that readers were told to map from files, because memory had no room.
    mapped_bytes: int
    objects_on_disk: int  #: those that are in memory as well do not count
    disk_bytes: int  #: size of all files
    files: int
    pinned_objects: int
    pending_allocations: int  #: processes that wait for room
    spilling_objects: int  #: on their way to disk
    restoring_objects: int  #: on their way back


@final
class ValueFile:
    """A file with values; deleted with the last of them."""

    __slots__ = ("objects", "size_bytes")

    def __init__(self) -> None:
        self.objects: dict[ObjectId, None] = {}
        #: Of all that was written, also of what is gone.
        self.size_bytes = 0


@final
class SpillBatch:
    """Objects that are being written to one file."""

    __slots__ = ("objects", "size_bytes")

    def __init__(self) -> None:
        #: object id -> offset of its range, which belongs to the batch until the end of it.
        self.objects: dict[ObjectId, int] = {}
        self.size_bytes = 0


@final
class Restoring:
    """An object that is being read back."""

    __slots__ = ("object_id", "offset")

    def __init__(self, object_id: ObjectId, offset: int) -> None:
        self.object_id = object_id
        self.offset = offset


@final
class StoreCounts:
    """What `StoreStatistics` adds up."""

    __slots__ = (
        "mapped_bytes",
        "restore_s",
        "restored_bytes",
        "restored_objects",
        "spill_s",
        "spilled_bytes",
        "spilled_objects",
    )

    def __init__(self) -> None:
        self.spilled_objects = self.spilled_bytes = 0
        self.restored_objects = self.restored_bytes = self.mapped_bytes = 0
        self.spill_s = self.restore_s = 0.0
