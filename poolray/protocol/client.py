"""The client protocol: a process that uses the API and the node it lives on.

What: requests (submit, put, get, wait, references, ranges) and their replies.
Who calls: `Client` in drivers and workers sends requests, the node machine answers.
May touch: nothing.
Invariants: ids are made by the client, so a submission needs no reply; a reply names its request.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.ids import ActorId, ClassId, FunctionId, ObjectId, TaskId, WorkerId
from poolray.protocol.actors import ActorReply, ActorRequest, CallCount, NamedActors
from poolray.protocol.inquiry import AskHead, AskHeadPart, HeadAnswer
from poolray.protocol.placement import PlacementGroupReply, PlacementRequest
from poolray.protocol.state import QueryState, StateRows
from poolray.protocol.streams import StreamReply, StreamRequest
from poolray.protocol.values import (
    FunctionDefinition,
    InArena,
    InFile,
    Outcome,
    TaskClass,
    TaskSpec,
)


class DefineFunction(msgspec.Struct, frozen=True, array_like=True, tag=101, kw_only=True):
    """A function that calls may name from now on."""

    definition: FunctionDefinition


class DefineClass(msgspec.Struct, frozen=True, array_like=True, tag=102, kw_only=True):
    """A task class that tasks may name from now on."""

    task_class: TaskClass


class ReleaseFunction(msgspec.Struct, frozen=True, array_like=True, tag=103, kw_only=True):
    """The client will not use this function again."""

    function_id: FunctionId


class SubmitTasks(msgspec.Struct, frozen=True, array_like=True, tag=104, kw_only=True, gc=False):
    """Run these. The client holds one reference to each return value from now on."""

    tasks: list[TaskSpec]


class PutObject(msgspec.Struct, frozen=True, array_like=True, tag=105, kw_only=True, gc=False):
    """Keep this value. The client holds one reference to it from now on."""

    object_id: ObjectId
    value: bytes | InArena | InFile
    contained: list[ObjectId] = []
    is_error: bool = False  #: what a call has failed with


class PromiseObjects(msgspec.Struct, frozen=True, array_like=True, tag=119, kw_only=True):
    """The client will put these, and holds one reference to each from now on."""

    object_ids: list[ObjectId]


class EndedCalls(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """Calls that a worker has answered to their caller directly, in one report."""

    actor_id: ActorId  #: empty: they are tasks
    worker_id: WorkerId
    task_ids: list[TaskId]
    class_ids: list[ClassId]
    errors: dict[int, str]  #: index -> class and text of what it raised
    elapsed_ns: int  #: of all together
    ended_s: float  #: on the client's clock


class NoteCalls(msgspec.Struct, frozen=True, array_like=True, tag=199, kw_only=True, gc=False):
    """For those who look on: these were made past the node."""

    calls: list[EndedCalls]
    now_s: float  #: on the same clock
    #: Classes among theirs that the node may have forgotten, and their functions' names.
    classes: list[TaskClass] = []
    function_names: list[str] = []


class GetObjects(msgspec.Struct, frozen=True, array_like=True, tag=106, kw_only=True, gc=False):
    """Answer with the values once all are ready."""

    request_id: int
    object_ids: list[ObjectId]


class WaitObjects(msgspec.Struct, frozen=True, array_like=True, tag=107, kw_only=True, gc=False):
    """Answer once at least `count` of these are ready."""

    request_id: int
    object_ids: list[ObjectId]
    count: int
    ahead: int = 0  #: so many behind those that it is answered with are looked at too
    fetch: bool = False  #: what is on another node is fetched, and ready when it is here
    #: Not 0: a list of this number is waited for, again and again. The objects are new in it, the
    #: answer counts all that it has been told of, and the lowest numbers come first.
    watch: int = 0
    left: list[int] = []  #: numbers of objects that have left that list


class EndWatches(msgspec.Struct, frozen=True, array_like=True, tag=136, kw_only=True, gc=False):
    """Nobody will wait for these lists any more."""

    watches: list[int]


class CancelRequest(msgspec.Struct, frozen=True, array_like=True, tag=108, kw_only=True):
    """Forget a request; a `WaitObjects` is answered with what is ready."""

    request_id: int


class AddReferences(msgspec.Struct, frozen=True, array_like=True, tag=109, kw_only=True):
    """The client now holds these (it had not before)."""

    object_ids: list[ObjectId]
    viewed: list[ObjectId] = []  #: of these, those that it has no ref to, only views of


class ReleaseReferences(
    msgspec.Struct, frozen=True, array_like=True, tag=110, kw_only=True, gc=False
):
    """The client no longer holds these, neither as refs nor as views of their memory."""

    object_ids: list[ObjectId]


class AllocateRange(msgspec.Struct, frozen=True, array_like=True, tag=111, kw_only=True):
    """The client wants to write a large object; answered once it is known where."""

    request_id: int
    object_id: ObjectId
    size_bytes: int


class NoteCallSite(msgspec.Struct, frozen=True, array_like=True, tag=113, kw_only=True):
    """Where these objects were made; sent only if `Config.record_ref_creation_sites` is set."""

    object_ids: list[ObjectId]
    call_site: str


class CancelTasks(msgspec.Struct, frozen=True, array_like=True, tag=112, kw_only=True):
    """Drop these caller-delivered tasks: what has not begun never runs, results are not sent."""

    task_ids: list[TaskId]


class ReturnRange(msgspec.Struct, frozen=True, array_like=True, tag=116, kw_only=True):
    """The client will not write the object for which it was granted a place."""

    object_id: ObjectId


class PinObjects(msgspec.Struct, frozen=True, array_like=True, tag=114, kw_only=True):
    """The client looks at the memory of these, which a task brought, after the task's end.

    Once per view. (For what a `GetObjects` or a call's result brings, the node knows.)
    """

    object_ids: list[ObjectId]


class UnpinObjects(msgspec.Struct, frozen=True, array_like=True, tag=115, kw_only=True):
    """Views of these have died, once for each; the client may still hold refs."""

    object_ids: list[ObjectId]


class CancelTask(msgspec.Struct, frozen=True, array_like=True, tag=117, kw_only=True):
    """Stop a task with objects for results, wherever it is; nothing happens when it has ended.

    What has not begun never runs; what runs is interrupted, and decides itself how it ends.
    """

    task_id: TaskId
    force: bool = False  #: do not ask: kill the worker that runs it
    recursive: bool = True  #: the same for the tasks that it submitted and that have not ended


class ObjectValues(msgspec.Struct, frozen=True, array_like=True, tag=151, kw_only=True, gc=False):
    """The values asked for, or a part of them.

    A reply too large for one packet comes in parts; `more` is true for all but the last.
    """

    request_id: int
    values: list[bytes | InArena | InFile]
    errors: list[int] = []  #: which of `values` are errors
    more: bool = False


class WaitReply(msgspec.Struct, frozen=True, array_like=True, tag=152, kw_only=True, gc=False):
    """Which of the objects asked for are ready, by index, ascending."""

    request_id: int
    ready: list[int]
    #: Of the objects behind those that the request wanted looked at: values that are here to stay.
    ahead: list[int] = []
    ahead_ids: list[ObjectId] = []  #: the same of a watch, by name


class RangeGranted(msgspec.Struct, frozen=True, array_like=True, tag=153, kw_only=True):
    """Write here, then name the place in a `PutObject` or a result."""

    request_id: int
    offset: int  #: in the arena; -1: in a file of its own
    file_number: int = 0  #: names that file
    path: str = ""  #: that file's, filled in by the shell
    #: Why neither memory nor disk has room, in words; empty: there is room.
    refusal: str = ""


class CallResults(msgspec.Struct, frozen=True, array_like=True, tag=154, kw_only=True):
    """Results of calls with `Delivery.CALLER`, from the call with index `start` on."""

    task_id: TaskId
    start: int
    results: list[bytes | Outcome]


ClientRequest: TypeAlias = (
    DefineFunction
    | DefineClass
    | ReleaseFunction
    | SubmitTasks
    | PutObject
    | PromiseObjects
    | NoteCalls
    | GetObjects
    | WaitObjects
    | EndWatches
    | CancelRequest
    | AddReferences
    | ReleaseReferences
    | AllocateRange
    | NoteCallSite
    | ReturnRange
    | PinObjects
    | UnpinObjects
    | CancelTasks
    | ActorRequest
    | CancelTask
    | QueryState
    | PlacementRequest
    | AskHead
    | AskHeadPart
    | StreamRequest
)

ClientReply: TypeAlias = (
    ObjectValues
    | WaitReply
    | RangeGranted
    | CallResults
    | ActorReply
    | NamedActors
    | CallCount
    | StateRows
    | PlacementGroupReply
    | HeadAnswer
    | StreamReply
)
