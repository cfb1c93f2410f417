"""`ObjectRef`: what a user holds of a value that may not exist yet.

What: a typed handle; its death and its pickling are reported to the client that made it.
Who calls: users hold it, clients make it.
May touch: nothing; its finalizer appends an id to a deque and returns.
Invariants: one local reference is counted per living handle; users cannot construct one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, final

from poolray.ids import OBJECT_ID_BYTES, ObjectId, task_of
from poolray.objects.serialization import note_reference
from poolray.public_ids import TaskID

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class RefOwner(Protocol):
    """What a handle needs of the client that made it."""

    #: Ids of handles that died, in order; appended to from finalizers.
    dropped: deque[ObjectId]

    def future_of(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of the object's value."""

    def loop_future_of(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        """The same, of the running event loop."""

    def await_value(self, ref: ObjectRef[Any]) -> Generator[Any, None, Any]:
        """What `await ref` runs."""

    def pin_forever(self, ref: ObjectRef[Any]) -> None:
        """The handle was pickled where nobody can follow it: keep its object."""


@final
class ObjectRef(Generic[T_co]):
    """A handle to a value that a task makes or `put` stored.

    Pass it to other tasks, to `get` for the value, or `await` it. Handles compare and hash by the
    object they name. As a top-level argument of a task it is replaced by its value; inside another
    object it stays a handle.

    Examples
    --------
    >>> import poolray
    >>> ref = poolray.put([1, 2])
    >>> poolray.get(ref)
    [1, 2]
    """

    __slots__ = ("__weakref__", "_client", "_id")

    _client: RefOwner
    _id: ObjectId

    def __new__(cls, *_: Any) -> ObjectRef[T_co]:
        raise TypeError(
            "ObjectRef cannot be constructed: refs come from .remote(), put() and tasks' arguments"
        )

    def binary(self) -> bytes:
        """The object's id, 28 bytes."""
        return self._id

    def hex(self) -> str:
        """The object's id, 56 hexadecimal digits."""
        return self._id.hex()

    def task_id(self) -> TaskID:
        """The id of the task that makes the object."""
        return TaskID(task_of(self._id))

    def is_nil(self) -> bool:
        """Whether this names no object; never true of a ref that users get."""
        return self._id == bytes(OBJECT_ID_BYTES)

    @classmethod
    def size(cls) -> int:
        """Bytes of an object id."""
        return OBJECT_ID_BYTES

    def future(self) -> Future[T_co]:
        """A `concurrent.futures.Future` of the value; it fails with the task's error.

        Notes
        -----
        Does not block. Several calls give several futures of the same value.
        """
        return self._client.future_of(self)

    def as_future(self) -> asyncio.Future[T_co]:
        """The same as a future of the running event loop.

        Raises
        ------
        RuntimeError
            No event loop runs in this thread.
        """
        return self._client.loop_future_of(self)

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._client.await_value(self)

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and self._id == other._id

    def __repr__(self) -> str:
        return f"ObjectRef({self._id.hex()})"

    def __copy__(self) -> ObjectRef[T_co]:
        return self

    def __deepcopy__(self, memo: object) -> ObjectRef[T_co]:
        return self

    def __reduce__(self) -> Any:
        if not note_reference(self._id):
            self._client.pin_forever(self)
        return _rebuild_ref, (self._id,)

    def __del__(self) -> None:
        self._client.dropped.append(self._id)


_new = object.__new__


def make_ref(object_id: ObjectId, client: RefOwner) -> ObjectRef[Any]:
    """A handle whose local reference the client has counted already."""
    ref: ObjectRef[Any] = _new(ObjectRef)
    ref._client = client
    ref._id = object_id
    return ref


def _rebuild_ref(object_id: ObjectId) -> ObjectRef[Any]:
    raise RuntimeError(
        "an ObjectRef was unpickled in a process that does not run poolray: call poolray.init()"
    )


def adopt_for(client: RefOwner, adopted: deque[ObjectId]) -> None:
    """Handles that are unpickled from now on are a client's, which finds their ids in a deque.

    Notes
    -----
    Pickles name `_rebuild_ref`, so what has that name is replaced itself: a second call per handle
    would take as long as all the rest.
    """

    def rebuild(
        object_id: ObjectId,
        note: Callable[[ObjectId], None] = adopted.append,
        new: Callable[[type[ObjectRef[Any]]], ObjectRef[Any]] = object.__new__,
    ) -> ObjectRef[Any]:
        note(object_id)
        ref = new(ObjectRef)
        ref._client = client
        ref._id = object_id
        return ref

    global _rebuild_ref
    rebuild.__name__ = rebuild.__qualname__ = "_rebuild_ref"
    _rebuild_ref = rebuild
