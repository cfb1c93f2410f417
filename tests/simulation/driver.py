"""A simulated driver: a random program that submits, gets, waits, drops, cancels and closes.

What: makes random jobs and groups, asks for values, and remembers what it must get.
Who calls: the run.
May touch: its node, as a client and as the shell's owner.
Invariants: every request is answered once; every call of a batch has exactly one result, unless
the batch was cancelled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from poolray.ids import GroupId, ObjectId, TaskId, return_id, task_of
from poolray.node.effects import GroupDrained, GroupFailed
from poolray.objects.directory import ObjectState
from poolray.protocol.client import (
    AddReferences,
    AllocateRange,
    CallResults,
    CancelRequest,
    CancelTask,
    CancelTasks,
    DefineClass,
    DefineFunction,
    GetObjects,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReleaseFunction,
    ReleaseReferences,
    ReturnRange,
    SubmitTasks,
    UnpinObjects,
    WaitObjects,
    WaitReply,
)
from poolray.protocol.node import CloseGroup, CreateGroup, ResizeGroup, TerminateGroup
from poolray.protocol.placement import PlacementGroupReply
from poolray.protocol.streams import ItemsTaken
from poolray.protocol.values import InArena, InFile, Outcome, TaskSpec, Value
from tests.simulation.jobs import INLINE_MAX_BYTES, Job, Options
from tests.simulation.machines import SimNode
from tests.simulation.placement import PlacementPlayer
from tests.simulation.streams import Readers

PLAIN = GroupId(0)

#: The limit of calls that have one; those that do not hang are well below it.
_LIMIT_S = 0.5


@dataclasses.dataclass(frozen=True)
class Faults:
    """How much goes wrong in a run."""

    crashes: float = 0.0  #: probability that a job kills its worker
    kills_per_s: float = 0.0
    start_failures: float = 0.0
    disk_failures: float = 0.0  #: probability that a write or read of a file fails
    damages: float = 0.0  #: probability that a file that is read turns out to be damaged
    shortages: float = 0.0  #: probability that memory is found to be short
    loss: float = 0.0
    node_crashes: int = 0
    partitions: int = 0
    head_crashes: int = 0
    joins: bool = False  #: as many nodes join as crash
    pace_s: float = 0.0  #: between two actions of drivers, on average; 0: the seed decides


@dataclasses.dataclass
class Group:
    """A group of workers, as its owner knows it."""

    group_id: GroupId
    max_retries: int
    open: bool = True
    failed: bool = False
    terminated: bool = False
    #: Jobs of it whose values are objects.
    jobs: list[Job] = dataclasses.field(default_factory=list)
    drained: bool = False
    break_on_death: bool = False


@dataclasses.dataclass
class Batch:
    """Calls whose results come straight back."""

    group: Group
    jobs: list[Job]
    delivered: dict[int, None] = dataclasses.field(default_factory=dict)
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return self.cancelled or len(self.delivered) == len(self.jobs)


class Driver:
    """One program."""

    def __init__(self, node: SimNode, faults: Faults, max_cpus: int) -> None:
        self.node = node
        self.world = node.world
        self.ledger = node.ledger
        self._faults = faults
        self._max_cpus = max_cpus
        #: What tasks may want that some node can give in the end.
        self.burst_cpus = max_cpus
        self._request_ids = itertools.count(1)
        self._group_ids = itertools.count(1)
        #: Objects that it holds, in order.
        self.held: dict[ObjectId, None] = {}
        #: request -> (ids, whether it is a get).
        self.requests: dict[int, tuple[list[ObjectId], bool]] = {}
        self._cancelled_gets: dict[int, None] = {}
        #: request -> what to do once a place is granted.
        self.allocations: dict[int, Callable[[RangeGranted], None]] = {}
        #: object -> views of it in memory.
        self.views: dict[ObjectId, int] = {}
        self.groups: dict[GroupId, Group] = {}
        self.batches: dict[TaskId, Batch] = {}
        self._defined: dict[str, None] = {}
        self.placement = PlacementPlayer(self)
        #: All nodes of the run, for jobs that want to run on one of them.
        self.node_names: list[bytes] = [node.name]
        self.readers = Readers(self)
        node.on_driver_reply = self._on_reply
        node.on_group_event = self._on_group_event
        node.start_fate = self._start_fate
        self.tell_shell(CreateGroup(group_id=PLAIN))

    def tell(self, message: Any) -> None:
        """As a client."""
        self.node.tell(self.node.driver_id, message)

    def tell_shell(self, message: Any) -> None:
        """As the owner of the groups."""
        self.node.tell(b"", message)

    # ---- what comes ------------------------------------------------------------------------------

    def _on_reply(self, message: Any) -> None:
        match message:
            case ObjectValues():
                ids, is_get = self.requests.pop(message.request_id)
                assert is_get
                assert not message.more, "to a driver it comes whole"
                self._on_values(ids, message)
            case ItemsTaken():
                self.readers.on_taken(message)
            case WaitReply() if self.readers.on_there(message.request_id):
                pass
            case WaitReply():
                ids, is_get = self.requests.pop(message.request_id)
                assert not is_get
                assert message.ready == sorted(set(message.ready))
                assert all(0 <= index < len(ids) for index in message.ready)
            case PlacementGroupReply():
                self.placement.on_reply(message)
            case RangeGranted():
                self.allocations.pop(message.request_id)(message)
            case CallResults():
                self._on_results(message)
            case _:
                raise AssertionError(f"nobody asked for {message}")

    def _on_values(self, ids: list[ObjectId], message: ObjectValues) -> None:
        assert len(message.values) == len(ids)
        if message.errors:
            for index in message.errors:
                value = self.node.read(message.values[index])
                self.ledger.judge_object(ids[index], value, True)
            near = [
                object_id
                for object_id, value in zip(ids, message.values, strict=True)
                if isinstance(value, InArena) and not value.node_id
            ]
            self.tell(UnpinObjects(object_ids=near))
            return
        for object_id, value in zip(ids, message.values, strict=True):
            if object_id in self.ledger.job_by_object:
                self.ledger.judge_object(object_id, self.node.read(value), False)
                self._adopt_returned(self.ledger.job_by_object[object_id][0])
            elif object_id in self.ledger.group_of_object:
                self.ledger.judge_object(object_id, self.node.read(value), False)
            else:
                assert self.node.read(value).startswith(b"put " + object_id)
            if isinstance(value, InArena):
                self._look(object_id, value)

    def _look(self, object_id: ObjectId, value: InArena) -> None:
        """An array in memory lives for a while, and does not change."""
        data = self.node.read(value)
        self.views[object_id] = self.views.get(object_id, 0) + 1

        def end() -> None:
            if not self.node.alive or object_id not in self.views:
                return  # all was dropped meanwhile
            assert self.node.read(value) == data, "memory was reused under a view"
            self.views[object_id] -= 1
            if not self.views[object_id]:
                del self.views[object_id]
            self.tell(UnpinObjects(object_ids=[object_id]))

        self.world.after(self.world.between(1e-6, 1.0), end)

    def _adopt_returned(self, job: Job) -> None:
        """The ref inside a value is held from now on."""
        if job.returned_id is not None and job.returned_id not in self.held:
            self.held[job.returned_id] = None
            self.tell(AddReferences(object_ids=[job.returned_id]))

    def _on_results(self, message: CallResults) -> None:
        batch = self.batches[message.task_id]
        for index, result in enumerate(message.results, message.start):
            assert index not in batch.delivered, "a result came twice"
            assert not batch.cancelled, "a cancelled batch has results"
            batch.delivered[index] = None
            self._judge_result(batch, batch.jobs[index], result)

    def _judge_result(self, batch: Batch, job: Job, result: bytes | Outcome) -> None:
        if isinstance(result, bytes):
            self.ledger.judge(job, 0, result, False)
            return
        (value,) = result.values
        if result.is_error and batch.group.failed:
            job.cancelled = True
        self.ledger.judge(job, 0, self.node.read(value), result.is_error)
        if isinstance(value, InArena | InFile):
            data = self.node.read(value)

            def release() -> None:
                if self.node.alive:
                    assert self.node.read(value) == data, "memory was reused under a view"
                    self.tell(ReleaseReferences(object_ids=[value.object_id]))

            self.world.after(self.world.between(1e-5, 1.0), release)

    def _on_group_event(self, effect: GroupFailed | GroupDrained) -> None:
        group = self.groups.get(effect.group_id)
        if effect.group_id == PLAIN:
            return
        assert group is not None
        assert not group.drained, "nothing is said of a group that is drained"
        if isinstance(effect, GroupFailed):
            assert not group.failed
            group.failed = True
            for job in group.jobs:
                job.cancelled = True
        else:
            assert not group.open
            group.drained = True

    def _start_fate(self, group_id: int) -> str:
        if not self.world.chance(self._faults.start_failures):
            return ""
        return self.world.random.choice(["dies", "fails", "hangs", "dies"])

    # ---- what it does ----------------------------------------------------------------------------

    def act(self) -> None:
        """One random thing."""
        if not self.node.alive:
            return
        action = self.world.random.choices(
            [
                self._submit_plain,
                self._submit_batch,
                self._get,
                self._wait,
                self._drop,
                self._put,
                self._cancel_request,
                self._cancel_batch,
                self._make_group,
                self._end_group,
                self._resize_group,
                self._release_function,
                self._submit_burst,
                self._submit_and_cancel,
                self._close_and_cancel,
                self._cancel_task,
                self._submit_and_cancel_task,
                self.placement.make,
                self.placement.remove,
                self.placement.look,
                self._submit_stream,
                self.readers.act,
            ],
            weights=[12, 6, 8, 3, 5, 3, 1, 1, 1, 1, 1, 1, 3, 1, 1, 4, 3, 2, 1, 1, 4, 8],
        )[0]
        action()

    def _options(self, nested: bool = False) -> Options:
        world = self.world
        return Options(
            max_retries=world.random.choice([0, 0, 1, 2, 3, 3, -1] if not nested else [0, 3]),
            retry_exceptions=world.chance(0.3),
            num_returns=1 if nested or world.chance(0.7) else world.random.choice([0, 2, 3]),
            cpus=world.random.randint(0 if world.chance(0.1) else 1, self._max_cpus),
            max_calls=world.random.choice([0, 0, 0, 0, 2, 5]),
            variant=world.random.randint(0, 1),
        )

    def _job(self, options: Options, depth: int = 0) -> Job:
        world = self.world
        key = self.node.ids.next_key()
        job = Job(key=key, name=b"n" + key[4:], options=options)
        job.duration_s = world.between(1e-6, world.random.choice([1e-5, 1e-3, 1e-1, 2.0]))
        job.large = world.chance(0.3)
        endless = options.retry_exceptions and options.max_retries < 0
        if world.chance(0.1) and not endless:
            job.fails = True
        elif world.chance(0.1):
            job.raises_first = world.random.randint(1, 5)
        elif world.chance(self._faults.crashes):
            job.crashes_first = world.random.randint(1, 5)
            if options.max_retries < 0:
                job.crashes_first = min(job.crashes_first, 3)
        job.puts = world.chance(0.1)
        job.is_stubborn = world.chance(0.2)
        job.cancels_child = world.chance(0.1)
        job.keeps_arguments = world.chance(0.3)
        if not options.caller and depth < 2 and world.chance(0.2):
            for _ in range(world.random.randint(1, 3)):
                job.children.append(self._job(self._options(nested=True), depth + 1))
        elif not options.caller and depth == 0 and options.num_returns == 1 and world.chance(0.1):
            job.returned_child = self._job(self._options(nested=True), 2)
            job.returned_child.is_returned = True
        return job

    def _define(self, options: Options) -> None:
        if options.name not in self._defined:
            self._defined[options.name] = None
            self.tell(DefineFunction(definition=options.definition()))
            self.tell(DefineClass(task_class=options.task_class()))

    def _pick(self, count: int) -> list[ObjectId]:
        return self.world.random.sample(list(self.held), min(count, len(self.held)))

    def _ready(self) -> list[ObjectId]:
        """Objects whose values exist: the calls of a group of fixed size may wait for these alone,
        or all its workers would in the end wait for what only they can run."""
        objects = self.node.node.state.objects
        return [
            o
            for o in self.held
            if o in self.ledger.job_by_object and objects[o].state is ObjectState.READY
        ]

    def _submit_plain(self) -> None:
        world = self.world
        options = self.placement.place(self._options())
        usable = [group for group in self.groups.values() if group.open and not group.failed]
        group = world.random.choice(usable) if usable and world.chance(0.2) else None
        if group is not None:
            options = dataclasses.replace(
                options,
                group_id=group.group_id,
                fragile=group.break_on_death,
                node_id=b"",
                spread=False,
                group=b"",
                bundle=-1,
            )
        job = self._job(options)
        if group is not None:
            group.jobs.append(job)
        known = [o for o in self.held if o in self.ledger.job_by_object]
        dependencies = world.random.sample(
            known, min(len(known), world.random.choice([0, 0, 1, 3]))
        )
        if world.chance(0.1):
            usable_refs = known if group is None else self._ready()
            job.borrowed_ids = world.random.sample(usable_refs, min(len(usable_refs), 2))
        job.inputs = [self.ledger.job_by_object[o] for o in dependencies]
        job.borrowed = [self.ledger.job_by_object[o] for o in job.borrowed_ids]
        self._submit([job], dependencies)

    def _submit_stream(self) -> None:
        """A generator."""
        options = dataclasses.replace(
            self._options(),
            num_returns=1,
            items=self.world.random.randint(1, 8),
            backpressure=self.world.random.choice([0, 0, 1, 3]),
        )
        job = self._job(options, depth=9)
        known = [o for o in self.held if o in self.ledger.job_by_object]
        dependencies = self.world.random.sample(known, min(len(known), 1) * self.world.chance(0.3))
        job.inputs = [self.ledger.job_by_object[o] for o in dependencies]
        self._submit([job], dependencies)

    def next_request(self) -> int:
        """The number of a request of its own."""
        return next(self._request_ids)

    def _submit_burst(self) -> None:
        """Many tasks of one class in one message, short ones but for a few; some can run on the
        largest nodes only, which keep a stock of them.
        """
        world = self.world
        options = dataclasses.replace(self._options(), num_returns=1)
        if world.chance(0.5):
            options = dataclasses.replace(options, cpus=self.burst_cpus)
        jobs = []
        for _ in range(world.random.randint(5, 40)):
            job = self._job(options, depth=9)
            job.duration_s = world.between(1e-6, 2.0 if world.chance(0.05) else 1e-4)
            jobs.append(job)
        self._define(options)
        specs = []
        for job in jobs:
            task_id = self.node.ids.next_task_id()
            self.ledger.add(job, task_id)
            self.held[return_id(task_id, 0)] = None
            class_id = options.task_class().class_id
            specs.append(TaskSpec(task_id=task_id, class_id=class_id, calls=[job.key]))
        self.tell(SubmitTasks(tasks=specs))

    def _submit(self, jobs: list[Job], dependencies: list[ObjectId]) -> TaskId:
        options = jobs[0].options
        self._define(options)
        task_id = self.node.ids.next_task_id()
        for job in jobs:
            self.ledger.add(job, task_id)
        if not options.caller:
            for index in range(options.num_returns):
                self.held[return_id(task_id, index)] = None
        spec = TaskSpec(
            task_id=task_id,
            class_id=options.task_class().class_id,
            calls=[job.key for job in jobs],
            dependencies=dependencies,
            slots=list(range(len(dependencies))),
            borrows=jobs[0].borrowed_ids,
        )
        if options.items:
            self.readers.open(jobs[0], task_id)
        self.tell(SubmitTasks(tasks=[spec]))
        return task_id

    def _submit_batch(self) -> None:
        usable = [group for group in self.groups.values() if group.open and not group.failed]
        if not usable:
            self._make_group()
            return
        group = self.world.random.choice(usable)
        options = Options(
            group_id=group.group_id,
            caller=True,
            max_retries=group.max_retries,
            cpus=0,
            variant=self.world.random.randint(0, 3),
            fragile=group.break_on_death,
            timeout_s=_LIMIT_S if self.world.chance(0.3) else 0.0,
        )
        count = self.world.random.choice([1, 1, 5, 60])
        jobs = [self._job(options) for _ in range(count)]
        slow = self.world.chance(0.1)
        for job in jobs:
            job.duration_s = self.world.between(1e-6, 0.3 if slow else 1e-4)
            if options.timeout_s:
                job.puts = False  # which may wait for room
                if self.world.chance(0.1):
                    job.hangs = self.world.random.choice(["softly", "hard"])
        # The batch must be known before the first result may come.
        self._define(options)
        task_id = self.node.ids.next_task_id()
        for job in jobs:
            self.ledger.add(job, task_id)
        self.batches[task_id] = Batch(group, jobs)
        known = self._ready()
        borrows = self.world.random.sample(known, min(len(known), 2) * self.world.chance(0.3))
        for job in jobs:
            if borrows and not options.timeout_s and self.world.chance(0.3):
                job.borrowed_ids = borrows
                job.borrowed = [self.ledger.job_by_object[o] for o in borrows]
        spec = TaskSpec(
            task_id=task_id,
            class_id=options.task_class().class_id,
            calls=[job.key for job in jobs],
            borrows=borrows,
        )
        self.tell(SubmitTasks(tasks=[spec]))

    def _ask(self, ids: list[ObjectId], is_get: bool) -> None:
        request_id = next(self._request_ids)
        self.requests[request_id] = (ids, is_get)
        if is_get:
            self.tell(GetObjects(request_id=request_id, object_ids=ids))
        else:
            count = self.world.random.randint(1, len(ids))
            self.tell(WaitObjects(request_id=request_id, object_ids=ids, count=count))

    def _get(self) -> None:
        ids = self._pick(self.world.random.randint(1, 4))
        if ids:
            self._ask(ids, True)

    def _wait(self) -> None:
        ids = self._pick(self.world.random.randint(1, 6))
        if ids:
            self._ask(ids, False)

    def _cancel_request(self) -> None:
        if not self.requests:
            return
        request_id = self.world.random.choice(list(self.requests))
        if self.requests[request_id][1]:
            del self.requests[request_id]
        self.tell(CancelRequest(request_id=request_id))
        assert request_id not in self.requests, "a wait that is cancelled is answered"

    def _drop(self) -> None:
        asked = {object_id for ids, _ in self.requests.values() for object_id in ids}
        asked |= self.views.keys()  # a process lets go of an object with its last view
        ids = [object_id for object_id in self._pick(3) if object_id not in asked]
        for object_id in ids:
            del self.held[object_id]
        if ids:
            self.tell(ReleaseReferences(object_ids=ids))

    def _put(self) -> None:
        object_id = return_id(self.node.ids.next_task_id(), 0)
        if self.world.chance(0.3):
            self._put_value(object_id, b"put " + object_id)
            return
        # (Ranges are whole pages, which is what the size of an arena is counted in.)
        pages = self.world.random.choice([1, 1, 2, 3, 30])
        data = (b"put " + object_id).ljust(INLINE_MAX_BYTES + 4096 * (pages - 1) + 50, b".")
        request_id = next(self._request_ids)

        def write(granted: RangeGranted) -> None:
            if self.world.chance(0.05):
                self.tell(ReturnRange(object_id=object_id))  # the value could not be written
            else:
                self._put_value(object_id, self.node.write(object_id, granted, data))

        self.allocations[request_id] = write
        self.tell(AllocateRange(request_id=request_id, object_id=object_id, size_bytes=len(data)))
        if request_id in self.allocations and self.world.chance(0.1):
            # Ctrl-C while it waits for room
            del self.allocations[request_id]
            self.tell(CancelRequest(request_id=request_id))
            self.tell(ReturnRange(object_id=object_id))

    def _put_value(self, object_id: ObjectId, value: Value) -> None:
        contained = self._pick(2) if self.world.chance(0.3) else []
        self.held[object_id] = None
        self.tell(PutObject(object_id=object_id, value=value, contained=contained))
        if self.world.chance(0.2):
            self.tell(AddReferences(object_ids=contained))

    def _cancel_batch(self) -> None:
        pending = [task_id for task_id, batch in self.batches.items() if not batch.done]
        if pending:
            self._cancel(self.world.random.choice(pending))

    def _submit_and_cancel(self) -> None:
        """What was sent is most likely not read yet."""
        before = len(self.batches)
        self._submit_batch()
        if len(self.batches) > before:
            task_id = list(self.batches)[-1]
            if not self.batches[task_id].done:
                self.world.after(self.world.between(1e-7, 1e-3), lambda: self._cancel(task_id))

    def _close_and_cancel(self) -> None:
        """The last tasks of a closed group are cancelled."""
        usable = [group for group in self.groups.values() if group.open]
        if usable:
            group = self.world.random.choice(usable)
            self.end(group, False)
            for task_id, batch in self.batches.items():
                if batch.group is group and not batch.done:
                    self._cancel(task_id)

    def _cancel(self, task_id: TaskId) -> None:
        if self.batches[task_id].done or not self.node.alive:
            return
        self.batches[task_id].cancelled = True
        self.tell(CancelTasks(task_ids=[task_id]))

    def _cancel_task(self) -> None:
        """Of any object: its task may wait, run here or elsewhere, or have ended."""
        known = [o for o in self.held if o in self.ledger.job_by_object]
        if self.world.chance(0.6):  # most wait; those that are under way are of more interest
            state_of = self.node.node.task_state
            busy = [o for o in known if state_of(task_of(o)) in ("RUNNING", "FORWARDED", "DELAYED")]
            known = busy or known
        if known:
            self._stop(self.world.random.choice(known))

    def _submit_and_cancel_task(self) -> None:
        """In the middle of its first attempt, most likely."""
        before = len(self.held)
        self._submit_plain()
        if len(self.held) > before:
            object_id = list(self.held)[-1]
            job = self.ledger.job_by_object[object_id][0]
            delay_s = self.world.between(1e-6, 2 * max(job.duration_s, 1e-3))
            self.world.after(delay_s, lambda: self._stop(object_id))

    def _stop(self, object_id: ObjectId) -> None:
        if not self.node.alive:
            return
        job = self.ledger.job_by_object[object_id][0]
        task_id = task_of(object_id)
        recursive = self.world.chance(0.7)
        state = self.node.node.task_state(task_id)
        if state is not None:
            pending = state in ("WAITING", "QUEUED", "DELAYED")
            job.begun_max = min(job.begun_max, job.begun + (0 if pending else 1))
        job.cancelled = True
        force = self.world.chance(0.3)
        self.tell(CancelTask(task_id=task_id, force=force, recursive=recursive))

    # ---- groups ----------------------------------------------------------------------------------

    def _make_group(self) -> None:
        world = self.world
        if sum(not group.drained for group in self.groups.values()) > 4:
            return
        group_id = GroupId(next(self._group_ids))
        breaks = world.chance(0.1)
        group = Group(group_id, world.random.choice([0, 1, 3, -1]), break_on_death=breaks)
        self.groups[group_id] = group
        self.tell_shell(
            CreateGroup(
                group_id=group_id,
                size=world.random.randint(1, 4),
                start_now=world.chance(0.5),
                max_tasks_per_worker=world.random.choice([0, 0, 1, 7]),
                break_on_death=breaks,
            )
        )

    def _end_group(self) -> None:
        usable = [group for group in self.groups.values() if group.open]
        if usable and self.world.chance(0.5):
            self.end(self.world.random.choice(usable), self.world.chance(0.5))

    def end(self, group: Group, terminate: bool) -> None:
        """Close or terminate a group."""
        group.open = False
        if terminate:
            for batch in self.batches.values():
                if batch.group is group:
                    batch.cancelled = batch.cancelled or not batch.done
            for job in group.jobs:
                job.cancelled = True
            self.tell_shell(TerminateGroup(group_id=group.group_id))
        else:
            self.tell_shell(CloseGroup(group_id=group.group_id))

    def _resize_group(self) -> None:
        usable = [group for group in self.groups.values() if group.open and not group.failed]
        if usable:
            group = self.world.random.choice(usable)
            size = self.world.random.randint(1, 5)
            self.tell_shell(ResizeGroup(group_id=group.group_id, size=size))

    def _release_function(self) -> None:
        if self._defined:
            name = self.world.random.choice(list(self._defined))
            del self._defined[name]
            self.tell(ReleaseFunction(function_id=b"function " + name.encode()))  # type: ignore[arg-type]

    # ---- the end ---------------------------------------------------------------------------------

    def ask_for_all(self) -> None:
        """Get each object that is held, and read each stream to its end."""
        self.readers.read_to_the_end()
        for object_id in list(self.held):
            self._ask([object_id], True)

    def waits(self) -> bool:
        """Whether something is not answered yet."""
        return (
            bool(self.requests or self.allocations or self.placement.waits())
            or any(not batch.done for batch in self.batches.values())
            or self.readers.waits()
        )

    def describe_wait(self) -> str:
        """What it waits for."""
        lines = self.readers.describe()
        for ids, is_get in self.requests.values():
            for object_id in ids:
                job = self.ledger.job_by_object.get(object_id, (None, 0))[0]
                record = self.node.node.state.objects.get(object_id)
                task = self.node.node.state.tasks.get(TaskId(object_id[:24]))
                lines.append(
                    f"{'get' if is_get else 'wait'} {object_id!r}: job {job and job.key!r}, "
                    f"object {record and record.state.name}, task {task and task.state.name}"
                )
        for task_id, batch in self.batches.items():
            if not batch.done:
                missing = [i for i in range(len(batch.jobs)) if i not in batch.delivered]
                lines.append(f"batch {task_id!r} of group {batch.group}: calls {missing}")
        return "\n".join(lines)

    def drop_all(self) -> None:
        """Let go of everything."""
        self.views.clear()
        self.readers.drop_all()
        self.tell(ReleaseReferences(object_ids=list(self.held)))
        self.held.clear()
        for group in self.groups.values():
            if group.open:
                self.end(group, self.world.chance(0.3))
        self.tell_shell(CloseGroup(group_id=PLAIN))
