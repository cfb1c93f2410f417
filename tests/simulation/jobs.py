"""What simulated tasks do, and what must come of them.

What: `Job` describes one call and knows its right value; `Ledger` counts how often calls began and
judges each value and each error that anybody gets.
Who calls: drivers and simulated workers.
May touch: nothing.
Invariants: a job is submitted once; its value depends on its name and its arguments alone, not on
how often or where it ran.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

from poolray.exceptions import (
    CallTimeoutError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    PoolrayError,
    TaskCancelledError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
    WorkerStartError,
)
from poolray.ids import (
    ClassId,
    FunctionId,
    GroupId,
    NodeId,
    ObjectId,
    PlacementGroupId,
    TaskId,
    return_id,
)
from poolray.node.streams import NOTHING
from poolray.protocol.streams import StreamMode
from poolray.protocol.values import Delivery, FunctionDefinition, Placement, TaskClass

#: Values larger than this go to the arena (`Config.inline_max_bytes` of the simulation).
INLINE_MAX_BYTES = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """A task class, in the words of the simulation."""

    group_id: int = 0
    caller: bool = False
    max_retries: int = 3
    retry_exceptions: bool = False
    num_returns: int = 1
    cpus: int = 1
    max_calls: int = 0
    fragile: bool = False  #: its group breaks at the first death
    node_id: bytes = b""  #: it wants to run there
    is_soft: bool = False
    spread: bool = False
    group: bytes = b""  #: in this placement group
    bundle: int = -1
    variant: int = 0  #: tells classes apart that are alike otherwise
    items: int = 0  #: that a generator yields; 0: it is none
    backpressure: int = 0
    timeout_s: float = 0.0  #: how long a call may run; 0: without end

    @property
    def name(self) -> str:
        """A name of its own for each combination."""
        return "-".join(str(field) for field in dataclasses.astuple(self))

    @property
    def placement(self) -> Placement | None:
        """Where it is to run; None: anywhere."""
        if not (self.node_id or self.spread or self.group):
            return None
        return Placement(
            node_id=NodeId(self.node_id),
            is_soft=self.is_soft,
            spread=self.spread,
            group=PlacementGroupId(self.group),
            bundle=self.bundle,
        )

    def task_class(self) -> TaskClass:
        """As the node knows it."""
        name = self.name.encode()
        return TaskClass(
            class_id=ClassId(b"class " + name),
            function_id=FunctionId(b"function " + name),
            name=self.name,
            delivery=Delivery.CALLER if self.caller else Delivery.OBJECTS,
            num_returns=self.num_returns,
            resources={} if self.caller else {"CPU": self.cpus * 10_000},
            group_id=GroupId(self.group_id),
            max_retries=self.max_retries,
            retry_exceptions=b"*" if self.retry_exceptions else b"",
            max_calls=self.max_calls,
            placement=self.placement,
            stream=int(StreamMode.ITEMS if self.items else StreamMode.NONE),
            backpressure=self.backpressure,
            timeout_s=self.timeout_s,
        )

    def definition(self) -> FunctionDefinition:
        """The function's code."""
        name = self.name.encode()
        return FunctionDefinition(
            function_id=FunctionId(b"function " + name), blob=b"code", name=self.name
        )


@dataclasses.dataclass
class Job:
    """One call."""

    key: bytes  #: its payload, unique
    name: bytes  #: what its value depends on
    options: Options
    duration_s: float = 1e-5
    large: bool = False
    fails: bool = False  #: raises, each time
    #: Raises, or kills its worker, at the first so many attempts.
    raises_first: int = 0
    crashes_first: int = 0
    #: Tasks that it submits and waits for.
    children: list[Job] = dataclasses.field(default_factory=list)
    #: A task that it submits and whose ref it returns inside its value.
    returned_child: Job | None = None
    #: The object of the child that its last attempt returned.
    returned_id: ObjectId | None = None
    is_returned: bool = False  #: it is such a child
    #: It puts a value and reads it again.
    puts: bool = False
    #: It catches the interrupt of a cancellation and returns its value all the same.
    is_stubborn: bool = False
    #: It never ends; interrupts reach it, or do not.
    hangs: Literal["", "softly", "hard"] = ""
    #: It cancels the first of its children.
    cancels_child: bool = False
    keeps_arguments: bool = False
    #: Values of dependencies and borrowed refs, as they must be; filled in at submission.
    inputs: list[tuple[Job, int]] = dataclasses.field(default_factory=list)
    borrowed: list[tuple[Job, int]] = dataclasses.field(default_factory=list)
    borrowed_ids: list[ObjectId] = dataclasses.field(default_factory=list)
    # What has happened to it:
    begun: int = 0
    deaths: int = 0
    cancelled: bool = False
    #: How often it may have begun in all, from a cancellation on.
    begun_max: float = float("inf")
    spawned: list[Job] = dataclasses.field(default_factory=list)
    spawned_by: Job | None = None

    def again(self, key: bytes) -> Job:
        """The same job as a submission of its own."""
        return dataclasses.replace(
            self,
            key=key,
            begun=0,
            deaths=0,
            cancelled=False,
            begun_max=float("inf"),
            spawned=[],
            spawned_by=None,
        )

    def may_be_cancelled(self) -> bool:
        """Whether it was cancelled, or one was that submitted it."""
        job: Job | None = self
        while job is not None:
            if job.cancelled:
                return True
            job = job.spawned_by
        return False

    def value(self, index: int = 0) -> bytes:
        """The right value; of a generator those of its items, from 1 on."""
        if self.options.items and index == 0:
            return NOTHING
        digest = hashlib.blake2b(digest_size=8)
        for job, at in (*self.inputs, *self.borrowed):
            digest.update(job.value(at))
        for child in self.children:
            digest.update(child.value())
        value = b"=%s.%d.%s" % (self.name, index, digest.hexdigest().encode())
        return value.ljust(INLINE_MAX_BYTES + 200, b".") if self.large else value

    def error(self) -> bytes:
        """What it raises, when it does."""
        error = b"!raised " + self.name
        return error.ljust(INLINE_MAX_BYTES + 100, b" ") if self.large else error

    def sources(self) -> list[Job]:
        """Jobs whose failure may become its own."""
        return [*(job for job, _ in (*self.inputs, *self.borrowed)), *self.spawned]


class ActorLedger:
    """What was asked of actors, and what their processes have begun."""

    def __init__(self) -> None:
        #: Chances that a constructor or a call kills its process, and that a constructor raises.
        self.crashes = self.refusals = 0.0
        #: payload -> how often it may be tried again; -1: no limit.
        self.retries: dict[bytes, int] = {}
        #: payload of a constructor's call -> the value that a ref among its arguments stands for.
        self.arguments: dict[bytes, bytes] = {}
        self._begun: dict[bytes, int] = {}
        #: (process, actor, caller) -> number of the call that it began last.
        self._last: dict[tuple[bytes, bytes, bytes], int] = {}
        self.executed = 0

    def begin(self, worker_id: bytes, payload: bytes) -> None:
        """A process begins a call."""
        self.executed += 1
        self._begun[payload] = begun = self._begun.get(payload, 0) + 1
        limit = self.retries[payload]
        assert limit < 0 or begun <= limit + 1, f"{payload!r} has begun {begun} times"
        actor, caller, number = payload.split(b":")
        key = (worker_id, actor, caller)
        # (Of one caller, with one actor, in one process: a call that is tried again is the last.)
        assert int(number) > self._last.get(key, -1), f"{payload!r} is out of order"
        self._last[key] = int(number)

    def value(self, payload: bytes) -> bytes:
        """The right answer."""
        return b"=" + payload


class Ledger:
    """Judges from outside."""

    def __init__(self, nodes: int) -> None:
        self.actors = ActorLedger()
        self.jobs: dict[bytes, Job] = {}
        #: Errors that machines made, in order; readers get `!E<index>`.
        self.errors: list[PoolrayError] = []
        self.job_by_task: dict[str, Job] = {}
        self.job_by_object: dict[ObjectId, tuple[Job, int]] = {}
        #: Objects that stand for placement groups.
        self.group_of_object: dict[ObjectId, PlacementGroupId] = {}
        #: Placement groups that were removed, or are about to be.
        self.removed_groups: dict[bytes, None] = {}
        self.node_deaths = 0
        #: Looks that found memory to be short.
        self.shortages = 0
        self.start_failures = 0
        #: Values whose files turned out to be damaged.
        self.damages = 0
        #: Groups are being closed, while tasks that nobody waits for may still submit others.
        self.ending = False
        self.nodes = nodes
        self.values_checked = 0
        self.errors_checked = 0

    def encode_error(self, error: PoolrayError) -> bytes:
        """An error on the wire."""
        self.errors.append(error)
        return b"!E%d" % (len(self.errors) - 1)

    def add(self, job: Job, task_id: bytes) -> None:
        """A job was submitted."""
        self.jobs[job.key] = job
        self.job_by_task.setdefault(task_id.hex(), job)
        for index in range(job.options.num_returns):
            self.job_by_object[return_id(TaskId(task_id), index)] = (job, index)

    def begin(self, key: bytes) -> Job:
        """A worker begins a call."""
        job = self.jobs[key]
        job.begun += 1
        limit = job.options.max_retries
        assert limit < 0 or job.begun <= limit + 1 or (limit and self.shortages), (
            f"{key!r} began {job.begun} times, with max_retries={limit}"
        )
        # A call of limited time has nobody's results but its own to lose.
        assert not job.options.timeout_s or job.begun - 1 <= job.deaths, f"{key!r} ran twice"
        assert job.begun <= job.begun_max or self.node_deaths, f"{key!r} was cancelled and begins"
        return job

    def judge(self, job: Job, index: int, value: bytes, is_error: bool) -> None:
        """Somebody got this as the value of a job."""
        if is_error:
            self.errors_checked += 1
            self._judge_error(job, value)
        else:
            self.values_checked += 1
            assert not job.hangs, f"{job.key!r} has a value and never ends"
            assert value == job.value(index), (
                f"{job.key!r} came to {value!r}, not {job.value(index)!r}"
            )

    def judge_object(self, object_id: ObjectId, value: bytes, is_error: bool) -> None:
        """Somebody got this as the value of an object."""
        if object_id in self.group_of_object:
            self._judge_group(self.group_of_object[object_id], value, is_error)
            return
        if object_id not in self.job_by_object:
            assert is_error, "values that were put are judged by who put them"
            self.judge_loss(value)
            return
        job, index = self.job_by_object[object_id]
        self.judge(job, index, value, is_error)

    def _judge_group(self, group_id: PlacementGroupId, value: bytes, is_error: bool) -> None:
        """Somebody got this for a placement group."""
        if not is_error:
            assert value == b"=group " + group_id
            return
        assert isinstance(self.errors[int(value[2:])], TaskPlacementGroupRemoved)
        assert group_id in self.removed_groups or self.node_deaths

    def judge_loss(self, error: bytes) -> None:
        """Somebody got this instead of a value that was put."""
        assert error.startswith(b"!E"), f"{error!r} is no error of ours"
        assert isinstance(self.errors[int(error[2:])], ObjectLostError)
        assert self.damages, "a value was lost for no reason"

    def _judge_error(self, job: Job, error: bytes) -> None:
        if error.startswith(b"!raised "):
            assert error == job.error(), f"{error!r} is not of {job.key!r}"
            assert job.fails or job.raises_first, f"{job.key!r} raised and should not"
            if not job.fails:
                limit = job.options.max_retries if job.options.retry_exceptions else 0
                assert (
                    job.raises_first + job.deaths > limit
                    or self.node_deaths
                    or job.may_be_cancelled()
                ), f"{job.key!r} was given up too early"
        elif error.startswith(b"!because "):
            rest = error[len(b"!because ") :]
            for source in job.sources():
                try:
                    self._judge_error(source, rest)
                except AssertionError:
                    continue
                return
            raise AssertionError(f"{job.key!r} failed for no reason of its own: {error!r}")
        else:
            assert error.startswith(b"!E"), f"{error!r} is no error"
            self._judge_ours(job, self.errors[int(error[2:])])

    def _judge_ours(self, job: Job, error: PoolrayError) -> None:
        match error:
            case WorkerCrashedError():
                assert job.deaths, f"{job.key!r} lost no worker: {error}"
                limit = job.options.max_retries
                if not job.options.fragile:
                    assert limit >= 0, "without limit it never crashes for good"
                    # (Attempts that were ended for memory are not charged.)
                    enough = error.attempts >= limit + 1
                    assert enough if self.shortages else error.attempts == limit + 1, str(error)
                assert self.job_by_task[error.task_id] is job or job.options.caller
            case OutOfMemoryError():
                assert self.shortages
                assert job.deaths, f"{job.key!r} lost no worker: {error}"
            case CallTimeoutError():
                assert job.hangs, f"{job.key!r} was not late: {error}"
            case TaskCancelledError():
                assert job.may_be_cancelled(), f"{job.key!r} was not cancelled"
            case TaskPlacementGroupRemoved():
                assert job.options.group in self.removed_groups or self.node_deaths, str(error)
            case TaskUnschedulableError():
                assert job.options.node_id, str(error)
                assert not job.options.is_soft, str(error)
            case NodeDiedError():
                assert self.node_deaths
                assert error.attempts >= job.options.max_retries + 1
            case ObjectReconstructionFailedError():
                assert self.node_deaths
            case ObjectLostError():
                # A ref that another node's task returned means nothing to the task's owner (yet).
                excuse = self.nodes > 1 and job.is_returned
                assert self.node_deaths or self.damages or excuse, str(error)
            case WorkerStartError():
                assert self.start_failures
            case _:
                # Tasks of a group that has ended say so in plain words.
                assert job.cancelled or job.options.group_id or self.ending, str(error)
