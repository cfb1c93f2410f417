"""The client: what a process that uses the API knows of its objects and functions.

What: turns calls into messages to the node (submit, put, get, wait, references), maps the arena;
what it holds is counted in `client_references.py`. It decides nothing.
Who calls: `api.py`, `remote_function.py`; one per process, in drivers and in workers.
May touch: the arena; the node through its `Link`.
Invariants: those of `client_references.py`; a message that names an object follows the one that
tells the node of it.
"""

from __future__ import annotations

import itertools
import pickle
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec

from poolray import client_futures
from poolray.client_functions import Definitions, level_of_caller
from poolray.client_link import Link
from poolray.client_references import References, taken
from poolray.client_values import load_from_disk, named, ready_to_raise, write_value
from poolray.config import Config
from poolray.direct.calls import DirectCalls
from poolray.direct.loans import Loan
from poolray.exceptions import (
    GetTimeoutError,
    InternalError,
    ObjectLostError,
    PoolrayError,
)
from poolray.ids import (
    PLAIN_TASKS,
    ActorId,
    ClassId,
    GroupId,
    ObjectId,
    PlacementGroupId,
    TaskId,
    TaskIdSource,
    return_id,
    task_of,
)
from poolray.objects import object_ref
from poolray.objects.object_ref import ObjectRef, make_ref
from poolray.objects.serialization import (
    Serialized,
    Serializer,
    deserialize,
)
from poolray.objects.shared_memory import Arena
from poolray.protocol.actors import CallActor
from poolray.protocol.client import (
    AddReferences,
    CancelTask,
    EndWatches,
    NoteCallSite,
    ObjectValues,
    PinObjects,
    PutObject,
    ReleaseReferences,
    SubmitTasks,
    UnpinObjects,
)
from poolray.protocol.streams import DropStream, OpenStream, item_id
from poolray.protocol.values import InArena, InFile, TaskClass, TaskSpec

if TYPE_CHECKING:
    import asyncio

#: An actor's route, or a loan.
R = TypeVar("R")

_REF = ObjectRef
#: Refs among the arguments of one call (refs inside of other objects do not count).
_REFS_MAX = 10_000
#: Tasks that a call has submitted and that are stopped with it, at the most.
_CHILDREN_MAX = 10_000
_NO_TASK = TaskId(b"")
_NO_OBJECT = ObjectId(b"")
#: Most tasks name no objects; these lists are shared and never changed.
_NO_IDS: list[ObjectId] = []
_NO_SLOTS: list[int | str] = []
#: Handles that have died of which the node may be told after the next task that is submitted.
_DROPS_MAX = 8


@final
class Client(References):
    """One process's side of the client protocol."""

    def __init__(
        self,
        link: Link,
        arena: Arena | None,
        config: Config,
        task_ids: TaskIdSource,
        serializer: Serializer,
        is_worker: bool = False,
        tasks_group: GroupId = PLAIN_TASKS,
    ) -> None:
        super().__init__()
        self.link = link
        #: The workers that run plain tasks and actors of this process.
        self.tasks_group = tasks_group
        #: Handles of the driver, among a worker's inherited globals, are as good as its own.
        self._is_worker = is_worker
        #: Why handles of this client are of no use any more; empty: they are.
        self.ended = ""
        self.config = config
        self.task_ids = task_ids
        #: In a worker: the placement group that the running task's own tasks run in; empty: none.
        self.captured = PlacementGroupId(b"")
        #: In a worker: gives the task that runs.
        self.current_task: Callable[[], TaskId | None] | None = None
        #: In a worker: (call, task that it has submitted), for calls whose caller has come past
        #: the node, which else remembers them.
        self.children: deque[tuple[TaskId, TaskId]] = deque(maxlen=_CHILDREN_MAX)
        self._arena = arena
        #: Writes large values instead of us, where the arena is another machine's.
        self.upload: Callable[[ObjectId, Serialized], InArena | InFile] | None = None
        self._serializer = serializer
        #: (task, items taken, items given) of generators' handles that died; drained by the next
        #: call.
        self.dropped_streams: deque[tuple[TaskId, int, int]] = deque()
        #: Numbers of such records of lists that are gone; drained by the next call.
        self.dropped_watches: deque[int] = deque()
        self._watches = itertools.count(1)
        #: Makes somebody look at those soon: a generator may be waiting for its items to be taken.
        self.ring_for_streams: Callable[[], None] | None = None
        #: Handles that went where nobody can follow: kept for good.
        self._pinned: dict[ObjectId, ObjectRef[Any]] = {}
        self.definitions = Definitions(self)

    # ---- references ------------------------------------------------------------------------------

    def own(self, object_id: ObjectId) -> ObjectRef[Any]:
        """A handle to an object that the node counts us for from its making on."""
        self.counts[object_id] = 1  # (without the lock: nobody else knows the id yet)
        return make_ref(object_id, self)

    def adopt(self, object_id: ObjectId) -> ObjectRef[Any]:
        """A handle to an object that this process may not know yet."""
        self._adopted.append(object_id)
        return make_ref(object_id, self)

    def use_serializer(self, serializer: Serializer) -> None:
        """Serialize for other readers from now on."""
        self._serializer = serializer

    def let_go(self, values: Iterable[tuple[bytes | InArena | InFile, ObjectRef[Any]]]) -> None:
        """Nobody will look at these values, that the node has told us of."""
        near = [ref._id for value, ref in values if type(value) is InArena and not value.node_id]
        if near:
            self.link.send(UnpinObjects(object_ids=near))

    def sync_references(self) -> None:
        """Tell the node what changed."""
        if (
            not self.dropped
            and not self._adopted
            and not self._fresh
            and not self._released_early
            and not self._unviewed
            and not self._fresh_views
            and not self.dropped_streams
            and not self.dropped_watches
            and not self._syncing.locked()  # else what another thread has taken is not sent yet
        ):
            return
        self.link.enter()
        try:
            with self._syncing:
                self._send_changes()
        finally:
            self.link.leave()

    def _send_changes(self) -> None:
        if self.dropped_streams:
            self.sync_streams()
        self.sync_watches()
        viewed, unviewed = self.take_view_changes()
        added, released = self.take_reference_changes()
        if added:
            only_viewed = self.viewed_only(added)
            self.link.send(AddReferences(object_ids=added, viewed=only_viewed))
        if viewed:
            self.link.send(PinObjects(object_ids=viewed))
        if released:
            self.link.send(ReleaseReferences(object_ids=released))
        if unviewed:
            self.link.send(UnpinObjects(object_ids=unviewed))
        if self.direct is not None and self.direct.gone:
            self.direct.forget_gone()

    def _tell_node(self, object_ids: Iterable[ObjectId]) -> None:
        """The node is to know of these, that are named to somebody."""
        if self.direct is not None and self.direct.unknown:
            self.link.enter()
            try:
                self.direct.tell_node(object_ids)
            finally:
                self.link.leave()

    def sync_watches(self) -> None:
        """Tell the node of lists that nobody waits for any more."""
        watches = list(taken(self.dropped_watches)) if self.dropped_watches else None
        if watches:
            self.link.send(EndWatches(watches=watches))

    def sync_streams(self) -> None:
        """Tell the node of generators' handles that died."""
        while True:
            try:
                task_id, taken, given = self.dropped_streams.popleft()
            except IndexError:
                return
            for index in range(taken, given):
                self.prefetched.pop(item_id(task_id, index), None)
            self.link.send(DropStream(task_id=task_id, taken=taken))

    def pin_forever(self, ref: ObjectRef[Any]) -> None:
        """A handle was pickled outside of poolray: whoever unpickles it must find its object."""
        if ref._id in self._pinned:
            return
        if not self.config.allow_out_of_band_object_ref_serialization:
            raise PoolrayError(
                "It is not allowed to serialize ray.ObjectRef "
                f"{ref._id.hex()} outside of poolray "
                "(POOLRAY_allow_out_of_band_object_ref_serialization is 0): pass it as an argument "
                "or return it instead."
            )
        import warnings

        self._tell_node([ref._id])
        self._pinned[ref._id] = self.adopt(ref._id)
        warnings.warn(
            f"{ref!r} was pickled outside of poolray, so its object can never be freed: pass refs "
            "as arguments, or return them, instead of pickling them yourself.",
            stacklevel=3,
        )

    # ---- functions and tasks ---------------------------------------------------------------------

    # ---- handles of others -----------------------------------------------------------------------

    def _refuse(self, ref: ObjectRef[Any]) -> None:
        """A handle was not made by this client.

        Raises
        ------
        ValueError
            Its runtime is not that of this process.
        """
        if not self._is_worker:
            raise stale_ref_error(ref)

    def _ids_of(self, refs: Sequence[ObjectRef[Any]]) -> list[ObjectId]:
        ids = []
        for ref in refs:
            if ref._client is not self:
                self._refuse(ref)
            ids.append(ref._id)
        return ids

    def _inner_refs(self, data: bytes | Serialized) -> list[ObjectId]:
        """The refs inside a value; each is held here."""
        if isinstance(data, bytes) or not data.refs:
            return []
        inner = list(dict.fromkeys(data.refs))
        if not self._is_worker:
            with self._lock:
                self._count_adopted()
            for object_id in inner:
                if object_id not in self.counts:
                    raise _stale(object_id, "inside the value belongs to another runtime")
        self._tell_node(inner)
        return inner

    def submit(
        self,
        task_class: TaskClass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        actor_id: ActorId | None = None,
        stream: OpenStream | None = None,
    ) -> list[ObjectRef[Any]]:
        """Submit one call, of an actor or not; gives a handle per return value.

        With `stream` (its task id is filled in here) items come as well.

        Raises
        ------
        TypeError
            An argument cannot be serialized.
        ValueError
            A function among the arguments captures more than `Config.function_max_bytes`.
        """
        # (What was let go of can be told later: in a `get`, while the task runs already.)
        if self._adopted or self._fresh or len(self.dropped) > _DROPS_MAX:
            self.sync_references()
        direct = self.direct
        loan: Loan | None = None
        if direct is not None:
            if actor_id is not None:
                route = direct.routes.get(actor_id)
                if route is not None and direct.takes(route, task_class):
                    ref = self._call_directly(direct.call, route, task_class, args, kwargs)
                    if ref is not None:
                        return [ref]
            elif direct.loans is not None:
                loan = direct.loans.loan_for(task_class)
                if loan is not None and direct.loans.takes(loan):
                    ref = self._call_directly(direct.loans.call, loan, task_class, args, kwargs)
                    if ref is not None:
                        return [ref]
        dependencies, slots = _NO_IDS, _NO_SLOTS
        for value in args:
            if type(value) is _REF:
                dependencies, slots = [], []
                args = self._take_refs(args, dependencies, slots)
                break
        if kwargs:
            if dependencies is _NO_IDS:
                dependencies, slots = [], []
            kwargs = self._take_keyword_refs(kwargs, dependencies, slots)
        try:
            data = self._serializer.dumps_call(args, kwargs)
        except _PICKLING_ERRORS as error:
            raise self._argument_error(task_class.name, args, kwargs, error) from error
        if type(data) is not bytes or len(data) > self.config.function_warn_bytes:
            self.definitions.check_captured(task_class.name, data, args, kwargs, self._serializer)
        link = self.link
        if dependencies:
            _check_count(dependencies)
            self._tell_node(dependencies)
        link.enter()
        try:
            if direct is not None and actor_id is not None:
                direct.before_other_call(actor_id)
            payload: bytes | InArena | InFile
            if type(data) is bytes and len(data) <= self.config.inline_max_bytes:
                payload, borrows, temporary = data, _NO_IDS, None
            else:
                payload, borrows, temporary = self._payload(data)
            ids = self.task_ids
            task_id = ids.next_task_id() if actor_id is None else ids.next_call_id()
            if task_class.num_returns == 1:
                refs = [self.own(return_id(task_id, 0))]
            else:
                refs = [self.own(return_id(task_id, i)) for i in range(task_class.num_returns)]
            if stream is not None:
                link.send(msgspec.structs.replace(stream, task_id=task_id))
            parent = (self.current_task and self.current_task()) or _NO_TASK
            spec = TaskSpec(
                task_id=task_id,
                class_id=task_class.class_id,
                calls=[payload],
                dependencies=dependencies,
                slots=slots,
                borrows=borrows,
                parent=parent,
            )
            route = None
            if direct is not None and actor_id is not None:
                route = direct.begin_other_call(actor_id)
            link.submit(
                SubmitTasks(tasks=[spec])
                if actor_id is None
                else CallActor(actor_id=actor_id, task=spec)
            )
            if direct is not None and route is not None:
                direct.after_other_call(route, refs[-1]._id if refs else _NO_OBJECT)
            elif loan is not None and direct is not None and direct.loans is not None:
                direct.loans.after_other_call(loan, refs[0]._id)
            if self._is_worker:
                self.children.append((parent, task_id))
            if self.config.record_ref_creation_sites:
                self._note_call_site([ref._id for ref in refs], "(task call)")
                if temporary is not None:
                    self._note_call_site([temporary], "(task argument)")
            if temporary is not None:
                link.send(ReleaseReferences(object_ids=[temporary]))
        finally:
            link.leave()
        return refs

    def _call_directly(
        self,
        call: Callable[[R, TaskClass, bytes], ObjectRef[Any] | None],
        route: R,
        task_class: TaskClass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> ObjectRef[Any] | None:
        """Call past the node, if nothing among the arguments is its business."""
        for value in args:
            if type(value) is _REF:
                return None
        if kwargs and any(type(value) is _REF for value in kwargs.values()):
            return None
        try:
            data = self._serializer.dumps_call(args, kwargs)
        except _PICKLING_ERRORS:
            return None  # told in full the other way
        if type(data) is not bytes:
            return None
        return call(route, task_class, data)

    def _take_refs(
        self, args: tuple[Any, ...], dependencies: list[ObjectId], slots: list[int | str]
    ) -> tuple[Any, ...]:
        """Arguments with None in place of top-level refs, which become dependencies."""
        plain = list(args)
        for index, value in enumerate(args):
            if type(value) is _REF:
                if value._client is not self:
                    self._refuse(value)
                dependencies.append(value._id)
                slots.append(index)
                plain[index] = None
        return tuple(plain)

    def _take_keyword_refs(
        self, kwargs: dict[str, Any], dependencies: list[ObjectId], slots: list[int | str]
    ) -> dict[str, Any]:
        plain = kwargs
        for name, value in kwargs.items():
            if type(value) is _REF:
                if value._client is not self:
                    self._refuse(value)
                if plain is kwargs:
                    plain = dict(kwargs)
                dependencies.append(value._id)
                slots.append(name)
                plain[name] = None
        return plain

    # ---- actors ----------------------------------------------------------------------------------

    def serialize_call(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], more: Any
    ) -> tuple[TaskSpec, ObjectId | None]:
        """A call that carries more than its arguments, without ids of task and class.

        Returns
        -------
        task : TaskSpec
        temporary : ObjectId or None
            An object that was made for large arguments: to be released once the task is sent.

        Raises
        ------
        TypeError
            An argument cannot be serialized.
        """
        self.sync_references()
        dependencies: list[ObjectId] = []
        slots: list[int | str] = []
        args = self._take_refs(args, dependencies, slots)
        kwargs = self._take_keyword_refs(kwargs, dependencies, slots)
        _check_count(dependencies)
        try:
            data = self._serializer.dumps((args, kwargs, more))
        except _PICKLING_ERRORS as error:
            raise self._argument_error(name, args, kwargs, error) from error
        payload, borrows, temporary = self._payload(data)
        task = TaskSpec(
            task_id=TaskId(b""),
            class_id=ClassId(b""),
            calls=[payload],
            dependencies=dependencies,
            slots=slots,
            borrows=borrows,
        )
        return task, temporary

    # ---- arguments -------------------------------------------------------------------------------

    def _payload(
        self, data: bytes | Serialized
    ) -> tuple[bytes | InArena | InFile, list[ObjectId], ObjectId | None]:
        """Serialized arguments, the refs inside them, and the object made for them if large."""
        size = len(data) if isinstance(data, bytes) else data.size_bytes
        borrows = self._inner_refs(data)
        if size <= self.config.inline_max_bytes:
            return (data if isinstance(data, bytes) else data.to_bytes()), borrows, None
        if self.dropped:
            self.sync_references()  # it needs the room of what was let go of
        object_id = self.next_object_id()
        value = self.store(object_id, data)
        self.link.send(PutObject(object_id=object_id, value=value))
        return value, [*borrows, object_id], object_id

    def cancel(self, ref: ObjectRef[Any], force: bool, recursive: bool) -> None:
        """Stop the task that makes an object; see `poolray.cancel`."""
        message = CancelTask(task_id=task_of(ref._id), force=force, recursive=recursive)
        self.link.enter()
        try:
            if self.direct is None or not self.direct.cancel(ref._id, force, recursive):
                self.link.send(message)
        finally:
            self.link.leave()

    def cancel_children(self, parent: TaskId) -> None:
        """Stop what a call that runs has submitted, and what that has."""
        for submitter, task_id in list(self.children):
            if submitter == parent:
                self.link.send(CancelTask(task_id=task_id, force=False, recursive=True))

    def _argument_error(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> TypeError:
        """Name the first argument that cannot be serialized."""
        for label, value in [*((str(i), a) for i, a in enumerate(args)), *kwargs.items()]:
            try:
                self._serializer.dumps(value)
            except Exception as reason:
                return TypeError(
                    f"Could not serialize the argument {value!r:.200} (argument {label}) for a "
                    f"task or actor {name}:\n{type(reason).__name__}: {reason}\nSend what can be "
                    "pickled: plain data, arrays, functions; make locks, files and connections "
                    "in the task."
                )
        return TypeError(f"Could not serialize the arguments of {name}: {error}")

    # ---- values ----------------------------------------------------------------------------------

    def next_object_id(self) -> ObjectId:
        """An id for an object that no task makes."""
        return return_id(self.task_ids.next_task_id(), 0)

    def store(self, object_id: ObjectId, data: bytes | Serialized) -> InArena | InFile:
        """Write a large value to the arena, or to a file when that has no room.

        Raises
        ------
        ObjectStoreFullError
            There is room neither in the arena nor on disk (`OutOfDiskError`), or no file can be
            made.
        """
        serialized = data if isinstance(data, Serialized) else Serialized(data, [], [])
        if self.upload is not None:
            return self.upload(object_id, serialized)
        assert self._arena is not None
        return write_value(self.link, self._arena, object_id, serialized)

    def _note_call_site(self, object_ids: list[ObjectId], what: str) -> None:
        """Tell the node where the running call was made."""
        lines = [what]
        frame: types.FrameType | None = sys._getframe(level_of_caller() - 1)
        while frame is not None and len(lines) <= _CALL_SITE_FRAMES:
            code = frame.f_code
            lines.append(f"{code.co_filename}:{code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        self.link.send(NoteCallSite(object_ids=object_ids, call_site=" | ".join(lines)))

    def load(
        self,
        value: bytes | memoryview | InArena | InFile,
        writable: bool,
        *,
        is_counted: bool = True,
    ) -> Any:
        """A value from where it is.

        Parameters
        ----------
        is_counted : bool
            The node counts this process among those who look at the value (it does not count a
            worker for what its packets bring, which is pinned by the packet).

        Raises
        ------
        ObjectLostError
            The value was on disk, and its file is gone or damaged.
        """
        if isinstance(value, bytes):
            return deserialize(value, writable)
        if isinstance(value, InFile):
            return load_from_disk(value, writable)
        if isinstance(value, memoryview):  # it was brought here, and is nobody else's
            return deserialize(value if writable else value.toreadonly(), writable)
        assert self._arena is not None
        object_id = value.object_id
        self._count(object_id, is_view=True)
        if not is_counted:
            with self._lock:
                self._fresh_views[object_id] = self._fresh_views.get(object_id, 0) + 1
        dropped, dropped_views, unviewed = self.dropped, self._dropped_views, self._unviewed

        def on_release() -> None:
            dropped_views.append(object_id)
            unviewed.append(object_id)  # before `dropped`, which rings
            dropped.append(object_id)

        return self._arena.load(
            value.offset, value.size_bytes, writable=writable, on_release=on_release
        )

    def inline(self, value: Any) -> bytes:
        """A small value without refs, as `put` would write it."""
        data = self._serializer.dumps_flat(value)
        return data if isinstance(data, bytes) else data.to_bytes()

    def put(self, value: Any) -> ObjectRef[Any]:
        """Store a value; see `poolray.put`."""
        self.sync_references()
        try:
            data = self._serializer.dumps_flat(value)
        except _PICKLING_ERRORS as error:
            raise TypeError(
                f"Could not serialize the put value {value!r:.200}:\n"
                f"{type(error).__name__}: {error}"
            ) from error
        object_id = self.next_object_id()
        self.link.enter()
        try:
            self.link.send(self._put_message(object_id, data))
            if self.config.record_ref_creation_sites:
                self._note_call_site([object_id], "(put object)")
            return self.own(object_id)
        finally:
            self.link.leave()

    def put_message(self, object_id: ObjectId, value: Any) -> PutObject:
        """What makes a value that of an object, as `put` would."""
        return self._put_message(object_id, self._serializer.dumps_flat(value))

    def _put_message(self, object_id: ObjectId, data: bytes | Serialized) -> PutObject:
        contained = self._inner_refs(data)
        size = len(data) if isinstance(data, bytes) else data.size_bytes
        stored: bytes | InArena | InFile
        if size > self.config.inline_max_bytes:
            stored = self.store(object_id, data)
        else:
            stored = data if isinstance(data, bytes) else data.to_bytes()
        return PutObject(object_id=object_id, value=stored, contained=contained)

    def get(
        self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None, writable: bool = False
    ) -> list[Any]:
        """Values of refs; see `poolray.get`."""
        if self.prefetched:
            values = [self.prefetched.get(ref._id) for ref in refs]
            if None not in values:  # nothing to wait for; what was dropped is told at a later call
                return [deserialize(value, writable) for value in values if value is not None]
        object_ids = self._ids_of(refs)
        direct = self.direct
        if direct is not None and direct.unknown:
            own = self._direct_values(direct, object_ids, timeout_s)
            if own is not None:
                return [deserialize(value, writable) for value in own]
        self.sync_references()
        found: Sequence[bytes | InArena | InFile] | None = self.link.peek(object_ids)
        if found is None:
            found = self._await_values(object_ids, refs, timeout_s)
        if direct is not None and direct.lasts:
            direct.note_values(object_ids)
        pairs = zip(found, refs, strict=True)
        try:
            return [
                deserialize(value, writable)
                if type(value) is bytes
                else self._load_as(value, ref._id, writable)
                for value, ref in pairs
            ]
        except BaseException as error:
            self.let_go(pairs)  # those that it has not come to
            if isinstance(error, ObjectLostError) or not isinstance(error, Exception):
                raise
            raise InternalError(
                f"System error: a value could not be loaded: {type(error).__name__}: {error}\n"
                f"traceback: {traceback.format_exc()}"
            ) from error

    def _direct_values(
        self, direct: DirectCalls, object_ids: list[ObjectId], timeout_s: float | None
    ) -> list[bytes] | None:
        """Values that this process alone has, or will have; None: the node knows of some."""
        known = sum(map(direct.unknown.__contains__, object_ids))
        if known < len(object_ids):
            if known:  # all are waited for together, and an error among them ends that at once
                self._tell_node(object_ids)
            return None
        try:
            values = direct.values(object_ids, timeout_s)
        except TimeoutError:
            raise GetTimeoutError("Get timed out: some object(s) not ready.") from None
        if type(values) is bytes:
            raise self.load_error(values)
        if values is None:
            self._tell_node(object_ids)  # of the others too: it is asked for all
        return values  # type: ignore[return-value]

    def _await_values(
        self, object_ids: list[ObjectId], refs: Sequence[ObjectRef[Any]], timeout_s: float | None
    ) -> list[bytes | InArena | InFile]:
        """Where values are, once all are ready; raises the first error that arrives."""
        reply = self.link.get(object_ids, timeout_s)
        if reply is None:
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        if reply.errors:
            first = reply.errors[0]
            pairs = zip(reply.values, refs, strict=True)
            self.let_go(pair for index, pair in enumerate(pairs) if index != first)
            raise self.load_error(named(reply.values[first], refs[first]._id))
        return reply.values

    def _load_as(self, value: bytes | InArena | InFile, object_id: ObjectId, writable: bool) -> Any:
        """Load under the name by which we hold it (a copy of a remote object has two)."""
        return self.load(named(value, object_id), writable)

    def load_error(self, value: bytes | InArena | InFile) -> BaseException:
        """The exception to raise for an object that is an error."""
        try:
            error = self.load(value, False)
        except Exception as reason:
            return InternalError(f"System error: an error could not be read: {reason!r}")
        return ready_to_raise(error)

    def next_watch(self) -> int:
        """A number for the node's record of a list that is waited for again and again."""
        return next(self._watches)

    # ---- futures ---------------------------------------------------------------------------------

    def future_of(self, ref: ObjectRef[Any]) -> Future[Any]:
        """A future of an object's value."""
        if self.ended:
            raise stale_ref_error(ref)
        self._tell_node([ref._id])
        return client_futures.future_of(self, ref)

    def read_reply(
        self, reply: ObjectValues, ref: ObjectRef[Any], writable: bool = False
    ) -> tuple[BaseException | None, Any]:
        """The error to raise for an object, or None and its value."""
        try:
            if reply.errors:
                return self.load_error(named(reply.values[0], ref._id)), None
            return None, self._load_as(reply.values[0], ref._id, writable)
        except Exception as error:
            return error, None

    def loop_future_of(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        """The same, of the running event loop."""
        import asyncio

        asyncio.get_running_loop()
        return asyncio.ensure_future(ref)

    def await_value(self, ref: ObjectRef[Any]) -> Generator[Any, None, Any]:
        """What `await ref` runs, in any event loop."""
        self._tell_node([ref._id])
        return client_futures.await_value(self, ref)

    def install(self) -> None:
        """Unpickled handles belong to this client from now on."""
        object_ref.adopt_for(self, self._adopted)


def _check_count(dependencies: list[ObjectId]) -> None:
    if len(dependencies) > _REFS_MAX:
        raise ValueError(
            f"{len(dependencies):,} refs are too many for the arguments of one call, which takes "
            f"{_REFS_MAX:,}: pass them in a list, and `get` them in the task."
        )


def stale_ref_error(ref: ObjectRef[Any]) -> ValueError:
    """What whoever uses a handle of another runtime is told."""
    owner = ref._client
    ended = owner.ended if isinstance(owner, Client) else ""
    return _stale(ref._id, ended or "belongs to another runtime")


def _stale(object_id: ObjectId, why: str) -> ValueError:
    return ValueError(
        f"ObjectRef({object_id.hex()}) {why}, so its value is not to be had: make the object "
        "again, with put() or by calling its task."
    )


#: Frames of the program that a call site consists of.
_CALL_SITE_FRAMES = 3


_PICKLING_ERRORS = (TypeError, AttributeError, pickle.PicklingError)
