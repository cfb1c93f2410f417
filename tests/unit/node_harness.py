"""A node machine on a bench: feeds it messages, keeps its effects, plays its workers.

What: `Bench` wraps a `Node` with short names for the messages that tests send; `check_invariants`
runs after every one of them.
Who calls: `test_node_*.py`.
May touch: nothing.
Invariants: what a worker is sent waits in `queues` until a test reads it, as on a real socket.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TypeVar

from poolray.config import Config
from poolray.exceptions import PoolrayError
from poolray.ids import (
    ClassId,
    ClientId,
    FunctionId,
    GroupId,
    NodeId,
    ObjectId,
    TaskId,
    WorkerId,
    return_id,
)
from poolray.node.effects import (
    DeleteFile,
    Effect,
    GroupDrained,
    GroupFailed,
    Nudge,
    Reply,
    SendPeer,
    SendWorker,
    StartWorker,
    TakeBack,
    TerminateWorker,
)
from poolray.node.node import Node, NodeInput
from poolray.protocol.client import (
    AddReferences,
    CallResults,
    CancelTask,
    DefineClass,
    DefineFunction,
    GetObjects,
    ObjectValues,
    PutObject,
    ReleaseReferences,
    SubmitTasks,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.node import (
    CloseGroup,
    CreateGroup,
    PacketsTakenBack,
    TerminateGroup,
    Tick,
    WorkerLost,
)
from poolray.protocol.state import QueryState, StateKind, StateRow, StateRows
from poolray.protocol.values import (
    Delivery,
    FunctionDefinition,
    Outcome,
    TaskClass,
    TaskSpec,
    Value,
)
from poolray.protocol.worker import (
    ClientMessage,
    RunTasks,
    StopWorker,
    TaskResult,
    TasksFinished,
    TasksHandedBack,
    WorkerBlocked,
    WorkerReady,
    WorkerUnblocked,
)

DRIVER = ClientId(b"driver")
SHELL = b""
NODE = NodeId(b"A" * 28)
PLAIN = GroupId(0)
CPU = 10_000

E = TypeVar("E")


def encode_error(error: PoolrayError) -> bytes:
    """An error as readers of these tests see it: class and text."""
    return f"{type(error).__name__}: {error}".encode()


class Bench:
    """A node, its driver and its workers, in one hand."""

    def __init__(
        self,
        *,
        cpus: float = 2,
        arena_bytes: int = 1 << 20,
        slots: int = 16,
        node_id: NodeId = NODE,
        resources: dict[str, int] | None = None,
        devices: dict[str, list[str]] | None = None,
        labels: dict[str, str] | None = None,
        watches_memory: bool = False,
        has_head: bool = False,
        ids: itertools.count[int] | None = None,
        **config: object,
    ) -> None:
        counter = itertools.count(1) if ids is None else ids
        self.node = Node(
            node_id=node_id,
            config=Config(**config),  # type: ignore[arg-type]
            resources={
                "CPU": int(cpus * CPU),
                **{name: amount * CPU for name, amount in (resources or {}).items()},
                **{name: len(ids) * CPU for name, ids in (devices or {}).items()},
            },
            devices=devices,
            labels=labels,
            arena_bytes=arena_bytes,
            encode_error=encode_error,
            next_worker_id=lambda: WorkerId(b"w%027d" % next(counter)),
            local_client=DRIVER,
            slots=slots,
            has_head=has_head,
            watches_memory=watches_memory,
        )
        self.now = 0.0
        self.effects: list[Effect] = []
        #: worker -> what was sent and not read yet.
        self.queues: dict[WorkerId, deque[RunTasks | StopWorker]] = {}
        self._tasks = itertools.count(1) if ids is None else ids
        self._requests = itertools.count(1)
        self._classes: dict[ClassId, TaskClass] = {}

    # ---- messages --------------------------------------------------------------------------------

    def tell(self, message: NodeInput, sender: bytes = SHELL) -> list[Effect]:
        """One message; invariants are checked after it."""
        effects = self.node.handle(sender, message, self.now)
        self.node.check_invariants()
        self.effects.extend(effects)
        for effect in effects:
            if isinstance(effect, SendWorker):
                self.queues.setdefault(effect.worker_id, deque()).append(effect.message)
        return effects

    def take(self, kind: type[E]) -> list[E]:
        """The effects of one kind since the last call, in order; the others stay."""
        taken = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, kind)]
        return taken

    def after(self, seconds: float) -> list[Effect]:
        """Time passes; the node is told if it asked for it."""
        self.now += seconds
        deadline = self.node.next_deadline()
        return self.tell(Tick()) if deadline is not None and deadline <= self.now else []

    # ---- groups and workers ----------------------------------------------------------------------

    def group(self, group_id: int = 0, *, workers: int | None = None, **options: object) -> GroupId:
        """A group; with `workers`, of that size, started and ready."""
        size = 0 if workers is None else workers
        options.setdefault("start_now", workers is not None)
        message = CreateGroup(group_id=GroupId(group_id), size=size, **options)  # type: ignore[arg-type]
        self.tell(message)
        if options["start_now"]:
            self.start_all()
        return GroupId(group_id)

    def start_all(self) -> list[WorkerId]:
        """All workers that were asked for say hello."""
        started = [effect.worker_id for effect in self.take(StartWorker)]
        for worker_id in started:
            self.ready(worker_id)
        return started

    def ready(self, worker_id: WorkerId) -> None:
        """A worker says hello."""
        self.tell(WorkerReady(worker_id=worker_id, pid=1000 + worker_id[-1]))

    def lose(
        self, worker_id: WorkerId, sequence: int = 0, index: int = 0, signal: int | None = 9
    ) -> list[Effect]:
        """A worker is killed; it had begun the call `index` of the packet `sequence` last."""
        self.queues.pop(worker_id, None)
        return self.tell(
            WorkerLost(
                worker_id=worker_id,
                pid=77,
                exit_code=None if signal else 1,
                signal=signal,
                sequence=sequence,
                index=index,
            )
        )

    def close(self, group_id: GroupId) -> list[Effect]:
        return self.tell(CloseGroup(group_id=group_id))

    def terminate(self, group_id: GroupId) -> list[Effect]:
        return self.tell(TerminateGroup(group_id=group_id))

    # ---- work ------------------------------------------------------------------------------------

    def task_class(
        self,
        name: str = "f",
        *,
        cpus: float = 1,
        more: dict[str, int] | None = None,
        **options: object,
    ) -> ClassId:
        """A class of tasks, known to the node."""
        function_id = FunctionId(name.encode())
        class_id = ClassId(b"class-" + name.encode())
        definition = FunctionDefinition(function_id=function_id, blob=b"code", name=name)
        self.tell(DefineFunction(definition=definition), DRIVER)
        known = TaskClass(
            class_id=class_id,
            function_id=function_id,
            name=name,
            resources=({"CPU": int(cpus * CPU)} if cpus else {}) | (more or {}),
            **options,  # type: ignore[arg-type]
        )
        self._classes[class_id] = known
        self.tell(DefineClass(task_class=known), DRIVER)
        return class_id

    def caller_class(
        self, name: str = "g", group_id: GroupId = PLAIN, **options: object
    ) -> ClassId:
        """A class whose results go to the caller and that takes no resources."""
        return self.task_class(name, cpus=0, delivery=Delivery.CALLER, group_id=group_id, **options)

    def submit(
        self,
        class_id: ClassId,
        *,
        calls: list[Value] | int = 1,
        dependencies: list[ObjectId] | None = None,
        borrows: list[ObjectId] | None = None,
        client: bytes = DRIVER,
        parent: TaskId | None = None,
    ) -> TaskId:
        """One task of one or several calls."""
        task_id = TaskId(b"t%023d" % next(self._tasks))
        payloads: list[Value]
        payloads = [b"call-%d" % i for i in range(calls)] if isinstance(calls, int) else calls
        spec = TaskSpec(
            task_id=task_id,
            class_id=class_id,
            calls=payloads,
            dependencies=dependencies or [],
            slots=list(range(len(dependencies or []))),
            borrows=borrows or [],
            parent=parent or TaskId(b""),
        )
        self.tell(SubmitTasks(tasks=[spec]), client)
        return task_id

    def submit_many(self, class_id: ClassId, count: int) -> list[TaskId]:
        """Tasks of one call each, in one message."""
        ids = [TaskId(b"t%023d" % next(self._tasks)) for _ in range(count)]
        specs = [TaskSpec(task_id=i, class_id=class_id, calls=[b"call"]) for i in ids]
        self.tell(SubmitTasks(tasks=specs), DRIVER)
        return ids

    def cancel(
        self, task_id: TaskId, *, force: bool = False, recursive: bool = True
    ) -> list[Effect]:
        return self.tell(CancelTask(task_id=task_id, force=force, recursive=recursive), DRIVER)

    def packets(self, worker_id: WorkerId) -> list[RunTasks]:
        """What a worker's queue holds; it is read by this."""
        queue = self.queues.pop(worker_id, deque())
        return [message for message in queue if isinstance(message, RunTasks)]

    def read(self, worker_id: WorkerId) -> RunTasks:
        """The worker reads its next packet."""
        message = self.queues[worker_id].popleft()
        assert isinstance(message, RunTasks)
        return message

    def reads_stop(self, worker_id: WorkerId) -> bool:
        """Whether the next thing that the worker reads is the order to stop."""
        queue = self.queues.get(worker_id)
        return bool(queue) and isinstance(queue.popleft(), StopWorker)

    def busy(self) -> list[WorkerId]:
        """Workers with something in their queues."""
        return [worker_id for worker_id, queue in self.queues.items() if queue]

    def finish(
        self,
        worker_id: WorkerId,
        packet: RunTasks,
        results: list[bytes | Outcome] | None = None,
        *,
        elapsed_s: float = 1e-5,
        **more: list[ObjectId],
    ) -> list[Effect]:
        """The worker has run a whole packet."""
        reports = []
        given = iter(results or [])
        for task in packet.tasks:
            values = [next(given, b"result") for _ in task.calls]
            reports.append(TaskResult(task_id=task.task_id, start=0, results=values))
        calls = sum(len(task.calls) for task in packet.tasks)
        return self.tell(
            TasksFinished(
                worker_id=worker_id,
                results=reports,
                elapsed_ns=int(elapsed_s * calls * 1e9),
                sequence=packet.sequence,
                **more,
            )
        )

    def report(
        self,
        worker_id: WorkerId,
        task_id: TaskId,
        start: int,
        results: list[bytes | Outcome],
        *,
        ended: int,
        done: bool = True,
        elapsed_s: float = 1e-5,
    ) -> list[Effect]:
        """The worker reports a part of a packet; it has ended packets up to `ended`."""
        return self.tell(
            TasksFinished(
                worker_id=worker_id,
                results=[TaskResult(task_id=task_id, start=start, results=results, done=done)],
                elapsed_ns=int(elapsed_s * len(results) * 1e9),
                sequence=ended,
            )
        )

    def hand_back(self, worker_id: WorkerId, *tasks: tuple[TaskId, int]) -> list[Effect]:
        return self.tell(TasksHandedBack(worker_id=worker_id, tasks=list(tasks)))

    def take_back(self, worker_id: WorkerId) -> list[Effect]:
        """The shell empties a worker's queue, as a `TakeBack` asks for."""
        queue = self.queues.pop(worker_id, deque())
        sequences = [message.sequence for message in queue if isinstance(message, RunTasks)]
        return self.tell(PacketsTakenBack(worker_id=worker_id, sequences=sequences))

    def block(self, worker_id: WorkerId) -> list[Effect]:
        return self.tell(WorkerBlocked(worker_id=worker_id))

    def unblock(self, worker_id: WorkerId) -> list[Effect]:
        return self.tell(WorkerUnblocked(worker_id=worker_id))

    def warm_up(self, class_id: ClassId, elapsed_s: float = 1e-6) -> None:
        """Let the node learn that calls of a class are short; all workers are idle afterwards."""
        self.run_all(self.submit(class_id), elapsed_s=elapsed_s)
        self.effects.clear()
        self.queues.clear()

    def run_all(self, *_: TaskId, elapsed_s: float = 1e-5) -> None:
        """Workers run all that they are sent, until there is nothing left."""
        self.start_all()
        while self.busy():
            for worker_id in self.busy():
                message = self.queues[worker_id].popleft()
                if isinstance(message, RunTasks):
                    self.finish(worker_id, message, elapsed_s=elapsed_s)
            self.start_all()

    # ---- objects ---------------------------------------------------------------------------------

    def put(self, object_id: ObjectId, value: Value, client: bytes = DRIVER) -> None:
        self.tell(PutObject(object_id=object_id, value=value), client)

    def get(self, *object_ids: ObjectId, client: bytes = DRIVER) -> int:
        """Ask for values; gives the number of the request."""
        request_id = next(self._requests)
        self.tell(GetObjects(request_id=request_id, object_ids=list(object_ids)), client)
        return request_id

    def wait(self, count: int, *object_ids: ObjectId) -> int:
        request_id = next(self._requests)
        message = WaitObjects(request_id=request_id, object_ids=list(object_ids), count=count)
        self.tell(message, DRIVER)
        return request_id

    def hold(self, *object_ids: ObjectId, client: bytes = DRIVER) -> None:
        self.tell(AddReferences(object_ids=list(object_ids)), client)

    def drop(self, *object_ids: ObjectId, client: bytes = DRIVER) -> list[Effect]:
        return self.tell(ReleaseReferences(object_ids=list(object_ids)), client)

    def say(self, worker_id: WorkerId, message: object) -> list[Effect]:
        """A worker speaks as a client."""
        return self.tell(ClientMessage(worker_id=worker_id, message=message))  # type: ignore[arg-type]

    def values(self) -> dict[int, ObjectValues]:
        """Values that were sent since the last call, by request."""
        return {m.request_id: m for m in self._replies(ObjectValues)}

    def ready_indexes(self) -> dict[int, list[int]]:
        """Answers to `wait` since the last call, by request."""
        return {m.request_id: m.ready for m in self._replies(WaitReply)}

    def delivered(self) -> list[tuple[TaskId, int, list[bytes | Outcome]]]:
        """Results that went straight to the caller since the last call."""
        return [(m.task_id, m.start, m.results) for m in self._replies(CallResults)]

    def _replies(self, kind: type[E]) -> list[E]:
        taken = [e for e in self.effects if isinstance(e, Reply) and isinstance(e.message, kind)]
        self.effects = [effect for effect in self.effects if effect not in taken]
        return [effect.message for effect in taken]  # type: ignore[misc]

    def rows(self, kind: StateKind, client: bytes = DRIVER) -> list[list[StateRow]]:
        """What the node tells of itself, packet by packet."""
        request_id = next(self._requests)
        self.tell(QueryState(request_id=request_id, kind=kind), client)
        return [reply.rows for reply in self._replies(StateRows)]

    # ---- looking in ------------------------------------------------------------------------------

    def value_of(self, object_id: ObjectId) -> Value:
        """The value of an object that is ready."""
        self.get(object_id)
        (reply,) = self.values().values()
        return reply.values[0]

    def state(self, task_id: TaskId) -> str | None:
        return self.node.task_state(task_id)

    @property
    def cpus_free(self) -> float:
        return self.node.statistics().resources_available.get("CPU", 0.0)

    def assert_empty(self) -> None:
        """Nothing is left of any task, object or request, and all resources are free."""
        statistics = self.node.statistics()
        assert statistics.tasks == statistics.queued_calls == statistics.open_requests == 0
        assert statistics.objects == 0
        assert statistics.arena.used_bytes == 0
        assert statistics.resources_available == statistics.resources_total


def result_of(task_id: TaskId, index: int = 0) -> ObjectId:
    """The object that a task's return value becomes."""
    return return_id(task_id, index)


__all__ = [
    "CPU",
    "DRIVER",
    "NODE",
    "PLAIN",
    "SHELL",
    "Bench",
    "DeleteFile",
    "GroupDrained",
    "GroupFailed",
    "Nudge",
    "SendPeer",
    "StartWorker",
    "TakeBack",
    "TerminateWorker",
    "encode_error",
    "result_of",
]
