"""What the node machine asks of its shell.

What: one struct per kind of act. The machine returns them in order, the shell carries them out in
order and feeds what comes of them back as messages.
Who calls: the node machine makes them; the in-process shell, the daemon and the simulator act.
May touch: nothing.
Invariants: an effect carries all that is needed to act; the shell looks nothing up in the machine.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.ids import ActorId, ClientId, GroupId, NodeId, ObjectId, WorkerId
from poolray.protocol.actors import ActorReply, CallCount, NamedActors
from poolray.protocol.client import CallResults, ObjectValues, RangeGranted, WaitReply
from poolray.protocol.directory import Creation
from poolray.protocol.inquiry import HeadAnswer
from poolray.protocol.node import HeadRequest, PeerMessage
from poolray.protocol.placement import PlacementGroupReply
from poolray.protocol.state import LogWish, StateKind, StateRows
from poolray.protocol.streams import StreamReply
from poolray.protocol.values import InArena, InFile
from poolray.protocol.worker import InterruptTask, RunTasks, StopWorker


class SendWorker(msgspec.Struct, frozen=True, gc=False):
    """Put a message in a worker's task queue."""

    worker_id: WorkerId
    message: RunTasks | StopWorker


class Reply(msgspec.Struct, frozen=True, gc=False):
    """Answer a client."""

    client_id: ClientId
    message: (
        ObjectValues
        | WaitReply
        | RangeGranted
        | CallResults
        | ActorReply
        | NamedActors
        | CallCount
        | StateRows
        | HeadAnswer
        | PlacementGroupReply
        | StreamReply
    )


class StartWorker(msgspec.Struct, frozen=True, gc=False):
    """Fork a worker of a group."""

    worker_id: WorkerId
    group_id: GroupId
    slot: int


class TerminateWorker(msgspec.Struct, frozen=True, gc=False):
    """Kill a worker by force; its exit is reported as usual."""

    worker_id: WorkerId


class TakeBack(msgspec.Struct, frozen=True, gc=False):
    """Empty a worker's task queue and report what was in it with `PacketsTakenBack`."""

    worker_id: WorkerId


class Nudge(msgspec.Struct, frozen=True, gc=False):
    """Signal a worker to hand back the calls of its packet that it has not begun."""

    worker_id: WorkerId


class Interrupt(msgspec.Struct, frozen=True, gc=False):
    """Send a worker the order to stop a task, and signal it to look."""

    worker_id: WorkerId
    message: InterruptTask


class LookAtCall(msgspec.Struct, frozen=True, gc=False):
    """Look at what a worker runs, and report it with `CallProgress`."""

    worker_id: WorkerId


class GroupFailed(msgspec.Struct, frozen=True, gc=False):
    """The workers of a group do not start; its tasks have been failed."""

    group_id: GroupId
    error: bytes


class GroupDrained(msgspec.Struct, frozen=True, gc=False):
    """A group that was closed has no task and no worker any more."""

    group_id: GroupId


class MeasureMemory(msgspec.Struct, frozen=True, gc=False):
    """Read how much memory is in use; report with `MemoryReport`."""

    #: Workers whose own memory is asked for -> below this a rough figure will do, in bytes.
    workers: list[tuple[WorkerId, int]]
    #: Name the processes of the machine that use most as well.
    is_detailed: bool


class SpillObjects(msgspec.Struct, frozen=True, gc=False):
    """Write these ranges to one file; report with `SpillDone` or `SpillFailed`."""

    batch: int
    places: list[InArena]


class RestoreObject(msgspec.Struct, frozen=True, gc=False):
    """Read a value into a range; report with `RestoreDone` or `RestoreFailed`."""

    restore: int
    place: InFile
    offset: int


class DeleteUnsealed(msgspec.Struct, frozen=True, gc=False):
    """A client that was granted the file of this number will not name it: delete what it wrote."""

    file_number: int


class DeleteFile(msgspec.Struct, frozen=True, gc=False):
    """Nobody holds the object in this file any more."""

    path: str


class LookIntoLogs(msgspec.Struct, frozen=True, gc=False):
    """List files of logs, or read a part of one; report with `LogsSeen`."""

    number: int
    kind: StateKind
    wish: LogWish


class SendPeer(msgspec.Struct, frozen=True, gc=False):
    """Send a message to another node, reliably and in order."""

    node_id: NodeId
    message: PeerMessage


class SendHead(msgspec.Struct, frozen=True, gc=False):
    """Send a message to the head, reliably and in order."""

    message: HeadRequest


class SendChunk(msgspec.Struct, frozen=True, gc=False):
    """Send some bytes of a value to another node: as `ChunkData`, or by a faster way.

    A range of the arena stays what it is until the node says `PullEnded`, or is dead: its memory
    may be sent without a copy. A value on disk that cannot be read is sent as `missing`.
    """

    node_id: NodeId
    object_id: ObjectId
    place: InArena | InFile
    offset: int  #: bytes from the start of the value
    size_bytes: int
    number: int  #: of the `PullChunk` that this answers
    by_message: bool = False  #: as `ChunkData` in any case


class ExpectChunk(msgspec.Struct, frozen=True, gc=False):
    """These bytes were asked for: if they come by another way than in `ChunkData`, write them there
    and say `ChunkArrived`.
    """

    node_id: NodeId
    number: int  #: of the `PullChunk`
    #: Bytes from the start of the arena, or of the file where there is one.
    offset: int
    file_number: int  #: 0: into the arena
    size_bytes: int


class ForgetChunks(msgspec.Struct, frozen=True, gc=False):
    """Chunks are not expected any more: once this was carried out nothing is written there."""

    node_id: NodeId
    numbers: list[int]


class SendCreation(msgspec.Struct, frozen=True, gc=False):
    """Send the head what an actor is made with, as `StoreCreation`, with the bytes of its parts.

    What cannot be read is not sent at all.
    """

    actor_id: ActorId
    creation: Creation


class WriteChunk(msgspec.Struct, frozen=True, gc=False):
    """Write bytes that came from another node."""

    #: Bytes from the start of the arena, or of the file where there is one.
    offset: int
    file_number: int  #: 0: into the arena; else into the file of this number, as clients name them
    data: bytes  #: whatever buffer the shell put into `ChunkData`


class SealFile(msgspec.Struct, frozen=True, gc=False):
    """All of a file that chunks were written to is there: report where, with `FileSealed`."""

    file_number: int
    object_id: ObjectId
    size_bytes: int


class Warn(msgspec.Struct, frozen=True, gc=False):
    """Tell the user, once."""

    text: str


class Notice(msgspec.Struct, frozen=True, gc=False):
    """Tell the user, on standard error."""

    text: str


class UnhandledError(msgspec.Struct, frozen=True, gc=False):
    """The last reference to an error went before anybody looked at it: show it to the user."""

    value: bytes | InArena | InFile


Effect: TypeAlias = (
    SendWorker
    | Reply
    | StartWorker
    | TerminateWorker
    | TakeBack
    | Nudge
    | Interrupt
    | LookAtCall
    | GroupFailed
    | GroupDrained
    | MeasureMemory
    | SpillObjects
    | RestoreObject
    | DeleteUnsealed
    | DeleteFile
    | LookIntoLogs
    | SendPeer
    | SendHead
    | SendChunk
    | SendCreation
    | ExpectChunk
    | ForgetChunks
    | WriteChunk
    | SealFile
    | Warn
    | Notice
    | UnhandledError
)
