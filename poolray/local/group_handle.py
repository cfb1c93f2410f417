"""A group of workers, as those know it who made it.

What: a record, and a way to wait for the group's end.
Who calls: `local/node_shell.py` makes it; Pool, Executor and the runtime hold it.
May touch: nothing.
Invariants: it is done when the group has no task and no worker any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

from poolray.ids import GroupId
from poolray.local.reactor import Waitable
from poolray.local.workers import WorkerHost
from poolray.objects.serialization import Serializer

if TYPE_CHECKING:
    from poolray.local.pool_insights import GroupWatch


@final
class GroupHandle(Waitable):
    """A group of workers; done when it has ended."""

    __slots__ = (
        "error",
        "group_id",
        "host",
        "on_failed",
        "serializer",
        "shared_globals",
        "watch",
    )

    def __init__(self, group_id: GroupId, host: WorkerHost, serializer: Serializer) -> None:
        super().__init__()
        self.group_id = group_id
        self.host = host
        #: For arguments of calls that its workers run.
        self.serializer = serializer
        self.shared_globals: str | None = None
        #: Why its workers do not start, if they do not.
        self.error: bytes | None = None
        #: Called once, from some thread, when its workers do not start.
        self.on_failed: Callable[[bytes], None] | None = None
        #: Who is told what its workers note, if somebody wants to know.
        self.watch: GroupWatch | None = None
