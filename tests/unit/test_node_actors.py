"""The node's actors: made, called in order, restarted, ended."""

from __future__ import annotations

import itertools

import pytest

from poolray.exceptions import InternalError
from poolray.ids import (
    ActorId,
    ClassId,
    ClientId,
    FunctionId,
    NodeId,
    ObjectId,
    TaskId,
    WorkerId,
    handle_of,
)
from poolray.node.effects import Nudge, Reply, SendHead
from poolray.protocol.actors import (
    ActorReply,
    CallActor,
    CallCount,
    CountCalls,
    CreateActor,
    KillActor,
    LookUpActor,
)
from poolray.protocol.client import DefineClass, DefineFunction, PutObject
from poolray.protocol.directory import (
    ActorChanged,
    ActorEntry,
    ActorFound,
    FindActor,
    RegisterActor,
)
from poolray.protocol.values import CallKind, FunctionDefinition, Outcome, TaskClass, TaskSpec
from poolray.protocol.worker import ActorExiting, ActorStarted, RunTasks
from tests.unit.node_harness import DRIVER, PLAIN, Bench, TerminateWorker, result_of

CPU = 10_000


class ActorBench(Bench):
    """A bench with actors on it."""

    def __init__(self, *, first_id: int = 1, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.group()
        self._ids = itertools.count(first_id)

    def _task_id(self) -> TaskId:
        return TaskId(b"a%023d" % next(self._ids))

    def actor_class(self, *, cpus: float = 0, restarts: int = 0) -> ClassId:
        definition = FunctionDefinition(function_id=FunctionId(b"A"), blob=b"code", name="A")
        self.tell(DefineFunction(definition=definition), DRIVER)
        class_id = ClassId(b"create-%d-%d" % (cpus * CPU, restarts))
        known = TaskClass(
            class_id=class_id,
            function_id=FunctionId(b"A"),
            name="A.__init__",
            kind=CallKind.CREATE,
            num_returns=0,
            resources={"CPU": int(cpus * CPU)} if cpus else {},
            max_retries=restarts,
            max_calls=1,
        )
        self.tell(DefineClass(task_class=known), DRIVER)
        return class_id

    def method(self, name: str = "m", *, retries: int = 0) -> ClassId:
        class_id = ClassId(b"method-%s-%d" % (name.encode(), retries))
        known = TaskClass(
            class_id=class_id,
            function_id=FunctionId(b""),
            name=f"A.{name}",
            kind=CallKind.METHOD,
            max_retries=retries,
            method=name,
        )
        self.tell(DefineClass(task_class=known), DRIVER)
        return class_id

    def create(
        self,
        *,
        cpus: float = 0,
        max_restarts: int = 0,
        client: bytes = DRIVER,
        dependencies: list[ObjectId] | None = None,
        **options: object,
    ) -> ActorId:
        actor_id = ActorId(b"%016d" % next(self._ids))
        task = TaskSpec(
            task_id=self._task_id(),
            class_id=self.actor_class(cpus=cpus, restarts=max_restarts),
            calls=[b"constructor"],
            dependencies=dependencies or [],
            slots=list(range(len(dependencies or []))),
        )
        message = CreateActor(
            actor_id=actor_id,
            task=task,
            class_name="A",
            description=b"methods",
            max_restarts=max_restarts,
            **options,  # type: ignore[arg-type]
        )
        self.tell(message, client)
        return actor_id

    def construct(self) -> WorkerId:
        """A worker starts if one was asked for, and runs the constructor that was sent last."""
        self.start_all()
        (worker_id,) = [w for w in self.busy() if self._is_constructor(w)]
        self.read(worker_id)
        self.tell(ActorStarted(worker_id=worker_id))
        return worker_id

    def _is_constructor(self, worker_id: WorkerId) -> bool:
        message = self.queues[worker_id][0]
        return isinstance(message, RunTasks) and message.tasks[0].calls == [b"constructor"]

    def live(self, **options: object) -> tuple[ActorId, WorkerId]:
        """An actor that has been constructed."""
        actor_id = self.create(**options)  # type: ignore[arg-type]
        return actor_id, self.construct()

    def call(
        self,
        actor_id: ActorId,
        class_id: ClassId | None = None,
        *,
        client: bytes = DRIVER,
        payload: bytes = b"call",
        dependencies: list[ObjectId] | None = None,
        parent: bytes = b"",
    ) -> TaskId:
        task_id = self._task_id()
        task = TaskSpec(
            task_id=task_id,
            class_id=class_id or self.method(),
            calls=[payload],
            dependencies=dependencies or [],
            slots=list(range(len(dependencies or []))),
            parent=TaskId(parent),
        )
        self.tell(CallActor(actor_id=actor_id, task=task), client)
        return task_id

    def error_of(self, task_id: TaskId) -> str:
        value = self.value_of(result_of(task_id))
        assert isinstance(value, bytes)
        return value.decode()

    def let_go(self, actor_id: ActorId, client: bytes = DRIVER) -> None:
        self.drop(handle_of(actor_id), client=client)

    def asked_head(self) -> list[object]:
        return [effect.message for effect in self.take(SendHead)]

    def answers(self) -> list[ActorReply]:
        taken = [e for e in self.effects if isinstance(e, Reply)]
        self.effects = [e for e in self.effects if e not in taken]
        return [e.message for e in taken if isinstance(e.message, ActorReply)]


@pytest.fixture
def bench() -> ActorBench:
    return ActorBench()


def payloads(packet: RunTasks) -> list[object]:
    return [task.calls[0] for task in packet.tasks]


# --- creation ------------------------------------------------------------------------------------


def test_calls_wait_for_the_constructor_and_then_go_in_order(bench: ActorBench) -> None:
    actor_id = bench.create()
    calls = [bench.call(actor_id, payload=b"%d" % i) for i in range(3)]
    worker_id = bench.construct()
    seen: list[object] = []
    while bench.busy():
        packet = bench.read(worker_id)
        seen += payloads(packet)
        bench.finish(worker_id, packet)
    assert seen == [b"0", b"1", b"2"]
    assert [bench.value_of(result_of(c)) for c in calls] == [b"result"] * 3


def test_an_actor_without_cpus_starts_while_all_cpus_are_taken(bench: ActorBench) -> None:
    task = bench.task_class(cpus=2)
    bench.submit(task)
    bench.start_all()
    assert bench.cpus_free == 0
    _, worker_id = bench.live()
    assert worker_id is not None


def test_explicit_cpus_are_held_for_life_also_while_a_call_waits(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(cpus=1)
    assert bench.cpus_free == 1
    bench.call(actor_id)
    bench.block(worker_id)
    assert bench.cpus_free == 1
    bench.unblock(worker_id)
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    bench.lose(worker_id)
    assert bench.cpus_free == 2


def test_a_constructor_waits_for_its_arguments(bench: ActorBench) -> None:
    source = bench.submit(bench.task_class())
    actor_id = bench.create(dependencies=[result_of(source)])
    call = bench.call(actor_id)
    bench.start_all()
    (task_worker,) = bench.busy()
    bench.finish(task_worker, bench.read(task_worker), [b"argument"])
    bench.start_all()
    (worker_id,) = bench.busy()
    assert bench.read(worker_id).tasks[0].arguments == [b"argument"]
    bench.tell(ActorStarted(worker_id=worker_id))
    assert bench.state(call) == "RUNNING"


def test_a_constructor_that_raises_is_the_answer_to_every_call(bench: ActorBench) -> None:
    actor_id = bench.create()
    before = bench.call(actor_id)
    bench.start_all()
    (worker_id,) = bench.busy()
    bench.read(worker_id)
    bench.tell(ActorStarted(worker_id=worker_id, error=b"no"))
    assert bench.error_of(before) == "no"
    assert bench.error_of(bench.call(actor_id)) == "no"
    bench.lose(worker_id, signal=None)
    assert bench.node.statistics().workers == 0


def test_a_worker_that_dies_in_the_constructor_is_replaced_while_restarts_are_left(
    bench: ActorBench,
) -> None:
    actor_id = bench.create(max_restarts=1)
    call = bench.call(actor_id)
    bench.start_all()
    (first,) = bench.busy()
    sequence = bench.read(first).sequence
    bench.lose(first, sequence, 0)
    bench.start_all()
    (second,) = bench.busy()
    bench.lose(second, bench.read(second).sequence, 0)
    text = bench.error_of(call)
    assert text.startswith("ActorDiedError")
    assert "in its constructor" in text
    assert "pid 77" in text


# --- order ---------------------------------------------------------------------------------------


def test_a_late_argument_holds_back_later_calls_of_its_caller_only(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    late = bench.submit(bench.task_class())
    other = ClientId(b"other")
    bench.call(actor_id, payload=b"late", dependencies=[result_of(late)])
    bench.call(actor_id, payload=b"behind")
    bench.call(actor_id, payload=b"other", client=other)
    packet = bench.read(worker_id)
    assert payloads(packet) == [b"other"]
    bench.finish(worker_id, packet)
    bench.start_all()
    (task_worker,) = bench.busy()
    bench.finish(task_worker, bench.read(task_worker))
    seen: list[object] = []
    while bench.busy():
        packet = bench.read(worker_id)
        seen += payloads(packet)
        bench.finish(worker_id, packet)
    assert seen == [b"late", b"behind"]


def test_without_promised_order_a_late_argument_holds_nobody_back(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(ordered=False, serial=False, concurrency=2)
    late = bench.submit(bench.task_class())
    bench.call(actor_id, payload=b"late", dependencies=[result_of(late)])
    bench.call(actor_id, payload=b"behind")
    assert payloads(bench.read(worker_id)) == [b"behind"]


def test_short_calls_travel_in_packets_of_any_methods(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    m, n = bench.method("m"), bench.method("n")
    for index in range(40):
        bench.call(actor_id, (m, n)[index % 2])
    sizes = []
    while bench.busy():
        packet = bench.read(worker_id)
        sizes.append(len(packet.tasks))
        bench.finish(worker_id, packet, elapsed_s=1e-6)
    assert sum(sizes) == 40
    assert max(sizes) > 10
    assert len(sizes) < 8


def test_a_worker_that_is_silent_over_a_packet_is_asked_for_the_results_it_has(
    bench: ActorBench,
) -> None:
    actor_id, worker_id = bench.live()
    for _ in range(10):
        bench.call(actor_id)
    bench.finish(worker_id, bench.read(worker_id), elapsed_s=1e-6)
    bench.finish(worker_id, bench.read(worker_id), elapsed_s=1e-6)
    assert len(bench.read(worker_id).tasks) > 1
    bench.effects.clear()
    bench.after(1.0)
    assert [effect.worker_id for effect in bench.take(Nudge)] == [worker_id]
    bench.after(1.0)
    assert bench.take(Nudge) == []


def test_the_time_of_a_packet_begins_when_the_one_before_it_has_ended(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    for _ in range(3):  # short calls travel together
        bench.call(actor_id)
        bench.finish(worker_id, bench.read(worker_id), elapsed_s=1e-6)
    for _ in range(12):
        bench.call(actor_id)
    bench.finish(worker_id, bench.read(worker_id), elapsed_s=1e-6)
    alone = bench.read(worker_id)
    assert len(alone.tasks) == 1
    bench.effects.clear()
    bench.after(1.0)  # nothing waits behind the one call of this packet
    assert bench.take(Nudge) == []
    bench.finish(worker_id, alone, elapsed_s=1e-6)
    assert len(bench.read(worker_id).tasks) > 1
    bench.after(1.0)
    assert [effect.worker_id for effect in bench.take(Nudge)] == [worker_id]


def test_several_calls_run_at_once_up_to_the_limit_and_some_wait_at_hand() -> None:
    bench = ActorBench()
    actor_id, worker_id = bench.live(ordered=False, serial=False, concurrency=3)
    for _ in range(20):
        bench.call(actor_id)
    sent = [task for packet in bench.packets(worker_id) for task in packet.tasks]
    assert len(sent) == 6
    bench.report(worker_id, sent[2].task_id, 0, [b"r"], ended=0)
    assert sum(len(packet.tasks) for packet in bench.packets(worker_id)) == 1


# --- ends ----------------------------------------------------------------------------------------


def test_the_last_handle_ends_an_actor_after_the_calls_before(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id)
    bench.let_go(actor_id)
    packet = bench.read(worker_id)
    assert not bench.reads_stop(worker_id)
    bench.finish(worker_id, packet)
    assert bench.reads_stop(worker_id)
    bench.lose(worker_id, signal=None)
    bench.drop(result_of(call))
    bench.assert_empty()
    assert bench.node.statistics().actors == 0


def test_an_actor_that_nobody_wants_is_not_created(bench: ActorBench) -> None:
    waiting = bench.create(dependencies=[result_of(bench.submit(bench.task_class()))])
    bench.let_go(waiting)
    queued = bench.create(cpus=1000)
    call = bench.call(queued)
    bench.let_go(queued)
    assert bench.node.statistics().actors == 1  # somebody waits for its call
    bench.cancel(call)
    assert bench.node.statistics().actors == 0


def test_an_actor_that_nobody_wanted_ends_once_it_is_constructed(bench: ActorBench) -> None:
    actor_id = bench.create()
    bench.start_all()
    bench.let_go(actor_id)
    worker_id = bench.construct()
    assert bench.reads_stop(worker_id)
    bench.lose(worker_id, signal=None)
    bench.assert_empty()


def test_a_handle_inside_a_value_keeps_the_actor(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    box = ObjectId(b"box".ljust(28, b"."))
    bench.tell(PutObject(object_id=box, value=b"v", contained=[handle_of(actor_id)]), DRIVER)
    bench.let_go(actor_id)
    assert not bench.reads_stop(worker_id)
    bench.drop(box)
    assert bench.reads_stop(worker_id)


def test_a_kill_fails_all_calls_at_once(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    late = bench.submit(bench.task_class())
    calls = [bench.call(actor_id) for _ in range(5)]
    calls.append(bench.call(actor_id, dependencies=[result_of(late)]))
    bench.effects.clear()
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    assert [e.worker_id for e in bench.take(TerminateWorker)] == [worker_id]
    for call in [*calls, bench.call(actor_id)]:
        assert "was killed by kill()" in bench.error_of(call)
    bench.lose(worker_id)
    bench.tell(KillActor(actor_id=actor_id), DRIVER)


def test_a_kill_before_the_constructor_has_returned(bench: ActorBench) -> None:
    actor_id = bench.create(max_restarts=-1)
    call = bench.call(actor_id)
    bench.start_all()
    (worker_id,) = bench.busy()
    bench.read(worker_id)
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    assert "was killed" in bench.error_of(call)
    bench.tell(ActorStarted(worker_id=worker_id))
    bench.lose(worker_id)
    bench.let_go(actor_id)
    bench.drop(result_of(call))
    bench.assert_empty()


def test_an_actor_that_ends_itself_is_not_restarted(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(max_restarts=5)
    calls = [bench.call(actor_id), bench.call(actor_id)]
    bench.tell(ActorExiting(worker_id=worker_id, actor_id=actor_id, reason="ended itself"))
    bench.lose(worker_id, signal=None)
    for call in calls:
        assert "ended itself" in bench.error_of(call)
    assert bench.start_all() == []


def test_a_death_names_pid_and_signal(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id)
    bench.lose(worker_id, bench.read(worker_id).sequence, 0)
    text = bench.error_of(call)
    assert text.startswith("ActorDiedError")
    assert "pid 77" in text
    assert "signal 9" in text


def test_the_death_of_its_maker_ends_an_actor_whoever_has_handles(bench: ActorBench) -> None:
    bench.submit(bench.task_class())
    bench.start_all()
    (maker,) = bench.busy()
    bench.read(maker)
    actor_id = bench.create(client=ClientId(maker), max_restarts=-1)
    worker_id = bench.construct()
    bench.hold(handle_of(actor_id))
    bench.lose(maker, 1, 0)
    assert "died with its owner" in bench.error_of(bench.call(actor_id))
    assert worker_id in [e.worker_id for e in bench.take(TerminateWorker)]


def test_a_detached_actor_needs_neither_handle_nor_maker(bench: ActorBench) -> None:
    bench.submit(bench.task_class())
    bench.start_all()
    (maker,) = bench.busy()
    bench.read(maker)
    actor_id = bench.create(client=ClientId(maker), detached=True)
    worker_id = bench.construct()
    bench.lose(maker, 1, 0)
    assert not bench.reads_stop(worker_id)
    assert bench.node.statistics().actors == 1
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    assert bench.node.statistics().actors == 0


# --- restarts ------------------------------------------------------------------------------------


def test_a_restart_fails_calls_without_retries_and_repeats_the_others_in_order(
    bench: ActorBench,
) -> None:
    actor_id, worker_id = bench.live(max_restarts=1)
    once, again = bench.method("once"), bench.method("again", retries=1)
    bench.call(actor_id, again, payload=b"1")
    refused = bench.call(actor_id, once)
    bench.call(actor_id, again, payload=b"2")
    bench.call(actor_id, again, payload=b"3")
    bench.lose(worker_id, bench.read(worker_id).sequence, 0)
    assert bench.error_of(refused).startswith("ActorUnavailableError")
    during = bench.call(actor_id, once)
    assert bench.error_of(during).startswith("ActorUnavailableError")
    second = bench.construct()
    seen: list[object] = []
    while bench.busy():
        packet = bench.read(second)
        seen += payloads(packet)
        bench.finish(second, packet)
    assert seen == [b"1", b"2", b"3"]


def test_only_a_call_that_had_begun_uses_up_an_attempt(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(max_restarts=-1)
    again = bench.method("again", retries=1)
    killer = bench.call(actor_id, again, payload=b"killer")
    innocent = bench.call(actor_id, again, payload=b"innocent")
    for _ in range(2):
        packet = bench.read(worker_id)
        assert payloads(packet)[0] == b"killer"
        bench.lose(worker_id, packet.sequence, 0)
        worker_id = bench.construct()
    assert bench.error_of(killer).startswith("ActorUnavailableError")
    packet = bench.read(worker_id)
    assert payloads(packet) == [b"innocent"]
    bench.finish(worker_id, packet)
    assert bench.value_of(result_of(innocent)) == b"result"


def test_a_death_after_the_last_restart_is_final(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(max_restarts=1)
    bench.lose(worker_id)
    second = bench.construct()
    call = bench.call(actor_id)
    bench.lose(second, bench.read(second).sequence, 0)
    assert "after 1 restart(s)" in bench.error_of(call)
    assert bench.start_all() == []


def test_a_kill_that_allows_a_restart_is_a_crash(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(max_restarts=1)
    bench.effects.clear()
    bench.tell(KillActor(actor_id=actor_id, no_restart=False), DRIVER)
    assert [e.worker_id for e in bench.take(TerminateWorker)] == [worker_id]
    bench.lose(worker_id)
    assert bench.construct() != worker_id


def test_an_error_that_may_be_tried_again_is_without_a_restart(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    call = bench.call(actor_id, bench.method("again", retries=1))
    error = Outcome(values=[b"error"], is_error=True, retriable=True)
    bench.finish(worker_id, bench.read(worker_id), [error])
    assert bench.state(call) == "RUNNING"
    bench.finish(worker_id, bench.read(worker_id), [error])
    assert bench.error_of(call) == "error"


def test_arguments_of_a_constructor_live_as_long_as_it_may_run_again(bench: ActorBench) -> None:
    argument = ObjectId(b"argument".ljust(28, b"."))
    bench.put(argument, b"value")
    actor_id, worker_id = bench.live(max_restarts=1, dependencies=[argument])
    bench.drop(argument)
    bench.lose(worker_id)
    bench.start_all()
    (second,) = bench.busy()
    assert bench.read(second).tasks[0].arguments == [b"value"]
    bench.tell(ActorStarted(worker_id=second))
    bench.let_go(actor_id)
    bench.lose(second, signal=None)
    bench.assert_empty()


# --- names ---------------------------------------------------------------------------------------


def entry_of(actor_id: ActorId) -> ActorEntry:
    """The directory's entry of an actor on the bench's node."""
    return ActorEntry(
        actor_id=actor_id, class_name="A", name="n", namespace="s", keeper=NodeId(b"A" * 28)
    )


def test_a_name_is_asked_for_before_the_actor_is_made(bench: ActorBench) -> None:
    actor_id = bench.create(name="n", namespace="s", request_id=7)
    (question,) = bench.asked_head()
    assert isinstance(question, RegisterActor)
    assert question.entry.actor_id == actor_id
    assert bench.node.statistics().actors == 0
    bench.tell(ActorFound(request_id=question.request_id, entry=question.entry))
    assert bench.answers() == [ActorReply(request_id=7, actor_id=actor_id, description=b"methods")]
    bench.construct()
    bench.tell(KillActor(actor_id=actor_id), DRIVER)
    assert [type(m) for m in bench.asked_head()] == [ActorChanged]


def test_a_taken_name_is_refused_or_gives_the_actor_that_has_it(bench: ActorBench) -> None:
    holder, _ = bench.live()
    for get_if_exists, expected in ((False, b""), (True, holder)):
        bench.create(name="n", namespace="s", request_id=8, get_if_exists=get_if_exists)
        (question,) = bench.asked_head()
        assert isinstance(question, RegisterActor)
        bench.tell(ActorFound(request_id=question.request_id, entry=entry_of(holder)))
        (answer,) = bench.answers()
        assert answer.actor_id == expected
    assert bench.node.statistics().actors == 1


def test_who_looks_up_a_name_holds_a_handle_with_the_answer(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live()
    other = ClientId(b"other")
    bench.tell(LookUpActor(request_id=3, namespace="s", name="n"), other)
    (question,) = bench.asked_head()
    assert isinstance(question, FindActor)
    bench.tell(ActorFound(request_id=question.request_id, entry=entry_of(actor_id)))
    bench.let_go(actor_id)
    assert not bench.reads_stop(worker_id)
    bench.let_go(actor_id, other)
    assert bench.reads_stop(worker_id)


# --- the rest ------------------------------------------------------------------------------------


def test_calls_are_counted_per_caller_where_that_is_asked_for(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(counted=True)
    bench.call(actor_id)
    bench.call(actor_id, client=b"other")
    bench.tell(CountCalls(request_id=1, actor_id=actor_id), DRIVER)
    (count,) = [e.message for e in bench.take(Reply) if isinstance(e.message, CallCount)]
    assert count.count == 1
    bench.finish(worker_id, bench.read(worker_id))
    bench.tell(CountCalls(request_id=2, actor_id=actor_id), DRIVER)
    (count,) = [e.message for e in bench.take(Reply) if isinstance(e.message, CallCount)]
    assert count.count == 0


def test_a_call_of_an_actor_that_was_never_here_fails(bench: ActorBench) -> None:
    assert "is not known here" in bench.error_of(bench.call(ActorId(b"?" * 16)))


def test_an_actor_is_made_once(bench: ActorBench) -> None:
    actor_id, _ = bench.live()
    task = TaskSpec(task_id=TaskId(b"z" * 24), class_id=bench.actor_class(), calls=[b""])
    with pytest.raises(InternalError, match="exists already"):
        bench.tell(CreateActor(actor_id=actor_id, task=task, class_name="A"), DRIVER)


def test_the_end_of_the_group_ends_its_actors(bench: ActorBench) -> None:
    actor_id, worker_id = bench.live(max_restarts=-1)
    call = bench.call(actor_id)
    bench.terminate(PLAIN)
    bench.lose(worker_id)
    assert bench.error_of(call)
    assert bench.node.statistics().workers == 0
