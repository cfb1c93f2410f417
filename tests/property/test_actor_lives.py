"""Lives of actors against a small model: calls in order, once, and always with an end.

Workers of the model run what they are sent one step at a time, and may be killed between any two
steps. Whatever happens, a call ends with its result or a documented error; calls of one caller
begin in the order in which they were made, across restarts too; a call is tried as often as its
options allow and no more; one that was cancelled before it began never begins.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from poolray.ids import ActorId, ClientId, TaskId, WorkerId
from poolray.node.effects import Interrupt, SendHead, StartWorker, TerminateWorker
from poolray.protocol.actors import KillActor
from poolray.protocol.client import AddReferences
from poolray.protocol.values import Outcome
from poolray.protocol.worker import ActorExiting, ActorStarted, RunTasks, StopWorker, TaskCall
from tests.unit.node_harness import DRIVER, result_of
from tests.unit.test_node_actors import ActorBench

CALLERS = [DRIVER, ClientId(b"other")]
#: How an actor may be made.
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "restarted": {"max_restarts": 2},
    "always restarted": {"max_restarts": -1},
    "keeps a CPU": {"cpus": 1, "max_restarts": 1},
    "threads": {"ordered": False, "serial": False, "concurrency": 2, "max_restarts": 1},
    "detached": {"detached": True, "max_restarts": 1},
}
ENDS = ("ActorDiedError", "ActorUnavailableError", "TaskCancelledError", "raised")
index = st.integers(0, 10**6)


@dataclass
class Call:
    """A call that was made."""

    number: int
    actor: Actor
    caller: bytes
    retries: int
    began: int = 0
    never: bool = False  #: it was cancelled before it had been sent


@dataclass(eq=False)
class Actor:
    """An actor that was made, and which of its calls began last, by caller."""

    actor_id: ActorId
    is_ordered: bool
    is_held: bool = True
    last_begun: dict[bytes, int] = field(default_factory=dict)


class Worker:
    """A process: the packets it has read, and what it is at."""

    def __init__(self) -> None:
        self.sequence = 0
        self.place = -1  #: index in the packet of the call that began last
        self.calls: deque[tuple[int, int, TaskCall]] = deque()  #: (sequence, index, call)
        self.running: list[TaskCall] = []
        self.actor: Actor | None = None
        self.is_constructing = False
        self.cancelled: set[TaskId] = set()


class ActorMachine(RuleBasedStateMachine):
    """Actors are made, called, killed, cancelled, forgotten."""

    @initialize()
    def start(self) -> None:
        self.bench = ActorBench(slots=32, cpus=16)
        self.bench.tell(AddReferences(object_ids=[]), CALLERS[1])
        self.actors: list[Actor] = []
        self.calls: dict[TaskId, Call] = {}
        self.workers: dict[WorkerId, Worker] = {}
        self.creations: dict[TaskId, Actor] = {}
        self.sources: list[TaskId] = []
        self.task = self.bench.task_class(cpus=0, max_calls=1)
        for kind in ("always restarted", "threads"):
            self.create(kind, late=False)
        self.run(rounds=2)

    # ---- what programs do ------------------------------------------------------------------------

    @precondition(lambda self: len(self.actors) < 8)
    @rule(kind=st.sampled_from(sorted(KINDS)), late=st.booleans())
    def create(self, kind: str, late: bool) -> None:
        options = KINDS[kind]
        dependencies = [result_of(self.late())] if late else []
        before = set(self.bench.node.state.tasks)
        actor_id = self.bench.create(dependencies=dependencies, **options)  # type: ignore[arg-type]
        actor = Actor(actor_id, is_ordered=bool(options.get("ordered", True)))
        self.actors.append(actor)
        (creation,) = set(self.bench.node.state.tasks) - before
        self.creations[creation] = actor
        self.settle()

    def late(self) -> TaskId:
        task = self.bench.submit(self.task)
        self.sources.append(task)
        return task

    @precondition(lambda self: any(actor.is_held for actor in self.actors))
    @rule(
        which=index,
        caller=st.sampled_from(CALLERS),
        retries=st.sampled_from([0, 1, -1, -1]),
        late=st.integers(0, 7),
        count=st.integers(1, 8),
        steps=st.integers(0, 9),
    )
    def call(
        self, which: int, caller: bytes, retries: int, late: int, count: int, steps: int
    ) -> None:
        held = [actor for actor in self.actors if actor.is_held]
        actor = held[which % len(held) if which % 3 == 0 else 0]  # the first is called most
        method = self.bench.method(retries=retries)
        for number in range(count):
            dependencies = [result_of(self.late())] if late == number else []
            task = self.bench.call(actor.actor_id, method, client=caller, dependencies=dependencies)
            self.calls[task] = Call(len(self.calls), actor, caller, retries)
        self.settle()
        for _ in range(steps):
            for worker_id in [i for i, w in self.workers.items() if w.actor is actor]:
                self.run_worker(worker_id, raises=False)
                self.settle()

    @precondition(lambda self: self.calls)
    @rule(which=index)
    def cancel(self, which: int) -> None:
        task, call = list(self.calls.items())[which % len(self.calls)]
        if self.bench.state(task) in ("WAITING", "QUEUED"):
            call.never = call.began == 0
        self.bench.cancel(task)
        self.settle()

    @rule(which=index, how=st.sampled_from(["kill", "restart", "restart", "let go", "exit"]))
    def end(self, which: int, how: str) -> None:
        """Somebody ends an actor, or it does so itself."""
        actor = self.actors[which % len(self.actors) if how != "restart" else 0]
        if how == "exit":
            self.exit(actor)
        elif how != "let go":
            no_restart = how == "kill"
            message = KillActor(actor_id=actor.actor_id, no_restart=no_restart)
            self.bench.tell(message, DRIVER)
        elif actor.is_held:
            actor.is_held = False
            self.bench.let_go(actor.actor_id)
        self.settle()

    def exit(self, actor: Actor) -> None:
        for worker_id, worker in list(self.workers.items()):
            if worker.actor is actor and worker.running:
                exiting = ActorExiting(worker_id=worker_id, actor_id=actor.actor_id, reason="left")
                self.bench.tell(exiting)
                self.lose(worker_id, signal=None)

    # ---- what processes do -----------------------------------------------------------------------

    @precondition(lambda self: any(worker.running for worker in self.workers.values()))
    @rule(which=index)
    def crash(self, which: int) -> None:
        """A worker is killed by somebody."""
        busy = [worker_id for worker_id, worker in self.workers.items() if worker.running]
        able = busy or list(self.workers)
        self.lose(able[which % len(able)])
        self.settle()

    @precondition(lambda self: self.workers)
    @rule(which=index, raises=st.booleans())
    def step(self, which: int, raises: bool) -> None:
        self.run_worker(list(self.workers)[which % len(self.workers)], raises)
        self.settle()

    @precondition(lambda self: self.workers)
    @rule(rounds=st.integers(2, 5))
    def run(self, rounds: int) -> None:
        """All workers go on for a while."""
        for _ in range(rounds):
            for worker_id in list(self.workers):
                if worker_id in self.workers:
                    self.run_worker(worker_id, raises=False)
                    self.settle()

    # ---- workers ---------------------------------------------------------------------------------

    def settle(self) -> None:
        """The shell does what the node has asked for."""
        while True:
            started = [effect.worker_id for effect in self.bench.take(StartWorker)]
            for worker_id in started:
                self.workers[worker_id] = Worker()
                self.bench.ready(worker_id)
            for order in self.bench.take(Interrupt):
                worker = self.workers.get(order.worker_id)
                if worker is not None:
                    worker.cancelled.add(order.message.task_id)
            dead = [effect.worker_id for effect in self.bench.take(TerminateWorker)]
            for worker_id in dead:
                if worker_id in self.workers:
                    self.lose(worker_id)
            self.bench.take(SendHead)
            if not started and not dead:
                return

    def lose(self, worker_id: WorkerId, signal: int | None = 9) -> None:
        worker = self.workers.pop(worker_id)
        self.bench.lose(worker_id, worker.sequence, max(0, worker.place), signal)

    def run_worker(self, worker_id: WorkerId, raises: bool) -> None:
        """One step: begin a call, or end the one that runs."""
        worker = self.workers[worker_id]
        if worker.is_constructing:
            self.construct(worker_id, worker, raises)
        elif worker.running:
            self.finish_call(worker_id, worker, worker.running.pop(0), raises)
        elif worker.calls:
            self.begin(worker_id, worker)
        elif self.bench.queues.get(worker_id):
            self.read(worker_id, worker)

    def construct(self, worker_id: WorkerId, worker: Worker, raises: bool) -> None:
        worker.is_constructing = False
        if raises:
            self.bench.tell(ActorStarted(worker_id=worker_id, error=b"raised"))
            self.lose(worker_id, signal=None)
        else:
            self.bench.tell(ActorStarted(worker_id=worker_id))

    def read(self, worker_id: WorkerId, worker: Worker) -> None:
        message = self.bench.queues[worker_id].popleft()
        if isinstance(message, StopWorker):
            self.lose(worker_id, signal=None)
            return
        assert isinstance(message, RunTasks)
        first = message.tasks[0].task_id
        if first in self.creations:
            worker.actor = self.creations[first]
            worker.is_constructing = True
            worker.sequence, worker.place = message.sequence, 0
        elif worker.actor is None:
            worker.sequence, worker.place = message.sequence, len(message.tasks) - 1
            self.bench.finish(worker_id, message)
        else:
            for place, call in enumerate(message.tasks):
                worker.calls.append((message.sequence, place, call))

    def begin(self, worker_id: WorkerId, worker: Worker) -> None:
        sequence, place, task = worker.calls.popleft()
        call = self.calls[task.task_id]
        if task.task_id in worker.cancelled:
            outcome = Outcome(values=[b"TaskCancelledError: it was"], is_error=True)
            self.report(worker_id, worker, task, sequence, outcome)
            return
        worker.sequence, worker.place = sequence, place
        worker.running.append(task)
        self.check_begin(call)

    def check_begin(self, call: Call) -> None:
        """A call begins: it may, and its turn has come."""
        call.began += 1
        assert not call.never, "a call that was cancelled runs"
        assert call.retries < 0 or call.began <= 1 + call.retries, "tried too often"
        last = call.actor.last_begun.get(call.caller, -1)
        if call.actor.is_ordered:
            assert call.number >= last, "a call was overtaken"
        call.actor.last_begun[call.caller] = max(last, call.number)

    def finish_call(
        self, worker_id: WorkerId, worker: Worker, task: TaskCall, raises: bool
    ) -> None:
        result: bytes | Outcome = b"result"
        if raises:
            result = Outcome(values=[b"raised"], is_error=True)
        self.report(worker_id, worker, task, worker.sequence, result)

    def report(
        self,
        worker_id: WorkerId,
        worker: Worker,
        task: TaskCall,
        sequence: int,
        result: bytes | Outcome,
    ) -> None:
        """A call is over; with the last one of a packet, so is the packet."""
        is_last = not worker.calls or worker.calls[0][0] != sequence
        ended = sequence if is_last else sequence - 1
        self.bench.report(worker_id, task.task_id, 0, [result], ended=ended, elapsed_s=1e-6)

    # ---- the end ---------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.run_down()
        for task in self.calls:
            self.check_end(task)
        for actor in self.actors:
            self.bench.tell(KillActor(actor_id=actor.actor_id), DRIVER)
            if actor.is_held:
                self.bench.let_go(actor.actor_id)
        self.settle()
        self.run_down()
        self.bench.drop(*map(result_of, self.sources))
        for caller in CALLERS:
            mine = [result_of(t) for t, call in self.calls.items() if call.caller == caller]
            self.bench.drop(*mine, client=caller)
        self.bench.assert_empty()
        assert self.bench.node.statistics().actors == 0

    def run_down(self) -> None:
        """All workers run until there is nothing left to do."""
        for _ in range(10_000):
            busy = [
                worker_id
                for worker_id, worker in self.workers.items()
                if worker.is_constructing
                or worker.running
                or worker.calls
                or self.bench.queues.get(worker_id)
            ]
            if not busy:
                self.bench.after(1.0)
                self.settle()
                busy = [w for w in self.workers if self.bench.queues.get(w)]
                if not busy:
                    return
            for worker_id in busy:
                if worker_id in self.workers:
                    self.run_worker(worker_id, raises=False)
                    self.settle()
        raise AssertionError("the workers never come to rest")

    def check_end(self, task: TaskId) -> None:
        value = self.bench.value_of(result_of(task))
        assert isinstance(value, bytes)
        text = value.decode()
        assert text == "result" or text.startswith(ENDS), f"{text} is no end of a call"
        call = self.calls[task]
        assert text != "result" or call.began, "a result without a run"


TestActorLives = ActorMachine.TestCase
TestActorLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
