"""Identifiers: one type per kind of id, all plain bytes on the wire.

What: the id types, their sizes, and the arithmetic between them (a return value's id follows from
its task's id, so a client names results without asking anyone).
Who calls: every room.
May touch: nothing; randomness comes in as an argument.
Invariants: `len(id)` is the size given here; ids made by one `TaskIdSource` never repeat; the
return ids of a task share its 24 first bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import NewType, final

JobId = NewType("JobId", bytes)
NodeId = NewType("NodeId", bytes)
WorkerId = NewType("WorkerId", bytes)
ClientId = NewType("ClientId", bytes)
TaskId = NewType("TaskId", bytes)
ObjectId = NewType("ObjectId", bytes)
FunctionId = NewType("FunctionId", bytes)
ClassId = NewType("ClassId", bytes)
ActorId = NewType("ActorId", bytes)
GroupId = NewType("GroupId", int)
PlacementGroupId = NewType("PlacementGroupId", bytes)

#: The workers of plain tasks, where there is one job only.
PLAIN_TASKS = GroupId(0)

#: Numbers of jobs' workers, where there are several jobs, begin here.
_FIRST_GROUP = 1 << 40

JOB_ID_BYTES = 4
NODE_ID_BYTES = 28
WORKER_ID_BYTES = 28
TASK_ID_BYTES = 24
OBJECT_ID_BYTES = 28
ACTOR_ID_BYTES = 16
PLACEMENT_GROUP_ID_BYTES = 18
PREFIX_BYTES = TASK_ID_BYTES - 8

_HANDLE_SUFFIX = b"actor-handle"
#: Bit of the counter in a task id that says: it is a call of an actor.
_CALL_BIT = 1 << 63
_INDEX_SUFFIX = tuple(index.to_bytes(4, "little") for index in range(1024))


def group_of_job(job_id: bytes) -> GroupId:
    """The workers of a job, where there are several."""
    return GroupId(_FIRST_GROUP + int.from_bytes(job_id, "big"))


def job_of_group(group_id: GroupId) -> bytes:
    """The job of these workers; empty where there is one job only."""
    if group_id < _FIRST_GROUP:
        return b""
    return (group_id - _FIRST_GROUP).to_bytes(JOB_ID_BYTES, "big")


def return_id(task_id: TaskId, index: int) -> ObjectId:
    """The id of the `index`-th return value of a task (0-based)."""
    if index < 1024:
        # Twice for every task; calling a NewType would cost as much as all the rest.
        return task_id + _INDEX_SUFFIX[index]  # type: ignore[return-value]
    return ObjectId(task_id + index.to_bytes(4, "little"))


def task_of(object_id: ObjectId) -> TaskId:
    """The task that makes this object (for a `put`, an id that names no task)."""
    return TaskId(object_id[:TASK_ID_BYTES])


def is_handle(object_id: ObjectId) -> bool:
    """Whether an object stands for the handles of an actor."""
    return object_id.endswith(_HANDLE_SUFFIX)


def handle_of(actor_id: ActorId) -> ObjectId:
    """The object, without a value, that whoever has a handle to the actor holds."""
    return ObjectId(actor_id + _HANDLE_SUFFIX)


def actor_of(task_id: TaskId) -> ActorId:
    """The actor that a constructor's task makes."""
    return ActorId(hashlib.blake2b(task_id, digest_size=ACTOR_ID_BYTES).digest())


def is_actor_call(task_id: TaskId) -> bool:
    """Whether a task is a call of an actor; its id says so."""
    return task_id[PREFIX_BYTES] & 0x80 != 0


def actor_of_handle(object_id: ObjectId) -> ActorId | None:
    """The actor that an object stands for, or None for an ordinary object."""
    if object_id.endswith(_HANDLE_SUFFIX):
        return ActorId(object_id[:ACTOR_ID_BYTES])
    return None


@final
class TaskIdSource:
    """Makes task ids that no other source makes: a random prefix, then a counter.

    Parameters
    ----------
    prefix : bytes
        16 random bytes, drawn by the shell once per process (again after a fork).
    """

    __slots__ = ("_counter", "_prefix")

    def __init__(self, prefix: bytes) -> None:
        if len(prefix) != PREFIX_BYTES:
            raise ValueError(f"a task id prefix has {PREFIX_BYTES} bytes, not {len(prefix)}")
        self._prefix = prefix
        self._counter = itertools.count(1)  # next() is atomic under the GIL: no lock is needed

    def next_task_id(self) -> TaskId:
        """A new task id; safe from any thread."""
        return self._prefix + next(self._counter).to_bytes(8, "big")  # type: ignore[return-value]

    def next_call_id(self) -> TaskId:
        """The same for a call of an actor."""
        number = next(self._counter) | _CALL_BIT
        return self._prefix + number.to_bytes(8, "big")  # type: ignore[return-value]
