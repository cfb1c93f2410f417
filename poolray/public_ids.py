"""Ids as users hold them: one class per kind, with the names that Ray Core's have.

What: bytes that know what they name; on the wire and in the machines they are plain bytes.
Who calls: users, through `ObjectRef.task_id()`, `get_runtime_context()` and `poolray.TaskID(...)`.
May touch: randomness, for `from_random`.
Invariants: an id has the size of its kind; one whose bits are all set names nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, final

from poolray.ids import (
    ACTOR_ID_BYTES,
    JOB_ID_BYTES,
    NODE_ID_BYTES,
    PLACEMENT_GROUP_ID_BYTES,
    TASK_ID_BYTES,
    WORKER_ID_BYTES,
    PlacementGroupId,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ActorID", "JobID", "NodeID", "PlacementGroupID", "TaskID", "WorkerID"]


class _Id(bytes):
    """Bytes with a kind; compares and hashes as the bytes do."""

    __slots__ = ()
    _SIZE: ClassVar[int]

    def __new__(cls, id_bytes: bytes) -> Self:
        if not isinstance(id_bytes, bytes):
            raise TypeError(f"Unsupported type: {type(id_bytes)}, expected bytes")
        if len(id_bytes) != cls._SIZE:
            raise ValueError(f"a {cls.__name__} has {cls._SIZE} bytes, not {len(id_bytes)}")
        return super().__new__(cls, id_bytes)

    @classmethod
    def size(cls) -> int:
        """Bytes of such an id."""
        return cls._SIZE

    @classmethod
    def nil(cls) -> Self:
        """The id of nothing."""
        return cls(b"\xff" * cls._SIZE)

    @classmethod
    def from_hex(cls, digits: str) -> Self:
        """The id that is written so."""
        return cls(bytes.fromhex(digits))

    @classmethod
    def from_random(cls) -> Self:
        """An id that nothing has yet."""
        return cls(os.urandom(cls._SIZE))

    def __reduce__(self) -> Any:
        return type(self), (self.binary(),)

    def binary(self) -> bytes:
        """Its bytes."""
        return bytes(self)

    def is_nil(self) -> bool:
        """Whether it names nothing."""
        return self == b"\xff" * self._SIZE

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()})"

    __str__ = __repr__


@final
class JobID(_Id):
    """The id of a job: what one driver started.

    Examples
    --------
    >>> import poolray
    >>> context = poolray.init(ignore_reinit_error=True)
    >>> poolray.JobID.from_hex(poolray.get_runtime_context().get_job_id()).size()
    4
    """

    __slots__ = ()
    _SIZE = JOB_ID_BYTES


@final
class NodeID(_Id):
    """The id of a node.

    Examples
    --------
    >>> import poolray
    >>> poolray.NodeID.nil().is_nil(), poolray.NodeID.from_random().is_nil()
    (True, False)
    """

    __slots__ = ()
    _SIZE = NODE_ID_BYTES


@final
class WorkerID(_Id):
    """The id of a worker, or of a driver among the workers.

    Examples
    --------
    >>> import poolray
    >>> context = poolray.init(ignore_reinit_error=True)
    >>> poolray.WorkerID.from_hex(poolray.get_runtime_context().get_worker_id()).is_nil()
    False
    """

    __slots__ = ()
    _SIZE = WORKER_ID_BYTES


@final
class TaskID(_Id):
    """The id of a task; its attempts share it.

    Examples
    --------
    >>> import poolray
    >>> task = poolray.remote(lambda: poolray.get_runtime_context().get_task_id())
    >>> ref = task.remote()
    >>> poolray.get(ref) == ref.task_id().hex()
    True
    """

    __slots__ = ()
    _SIZE = TASK_ID_BYTES


@final
class ActorID(_Id):
    """The id of an actor; it keeps it when it is restarted.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Named:
    ...     def who(self) -> str:
    ...         return poolray.get_runtime_context().get_actor_id()
    >>> digits = poolray.get(Named.remote().who.remote())
    >>> poolray.ActorID.from_hex(digits).hex() == digits
    True
    """

    __slots__ = ()
    _SIZE = ACTOR_ID_BYTES


@final
class PlacementGroupID(_Id):
    """The id of a placement group.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.placement_group import placement_group, remove_placement_group
    >>> group = placement_group([{"CPU": 1}])
    >>> isinstance(group.id, poolray.PlacementGroupID)
    True
    >>> remove_placement_group(group)
    """

    __slots__ = ()
    _SIZE = PLACEMENT_GROUP_ID_BYTES

    def binary(self) -> PlacementGroupId:
        """Its bytes."""
        return PlacementGroupId(bytes(self))
