"""Two nodes wired back to back: forwarding, pulling, and what a node's death means."""

from __future__ import annotations

import pytest

from poolray.config import Config
from poolray.ids import (
    ClassId,
    FunctionId,
    NodeId,
    ObjectId,
    TaskId,
    WorkerId,
)
from poolray.node.effects import Reply, SendChunk, SendHead, SendPeer
from poolray.node.node import Node, NodeInput
from poolray.protocol.client import AllocateRange, WaitObjects, WaitReply
from poolray.protocol.node import (
    AwaitObject,
    ChunkData,
    ClusterView,
    ForwardedResult,
    ForwardedResults,
    ForwardedTask,
    ForwardTasks,
    Heartbeat,
    Lent,
    NodeDied,
    NodeView,
    ObjectReady,
    PeerReleases,
    PullChunk,
    Refused,
    Tick,
)
from poolray.protocol.values import FunctionDefinition, InArena, Outcome, TaskClass, TaskSpec
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import (
    CPU,
    DRIVER,
    NODE,
    PLAIN,
    Bench,
    GroupDrained,
    encode_error,
    result_of,
)

A, B = NODE, NodeId(b"B" * 28)
PAGE = 4096
LARGE = 200_000


class Pair:
    """A node that cannot run anything and one that can, and the wire between them."""

    def __init__(self, **options: object) -> None:
        self.a = Bench(cpus=0)
        self.b = Bench(cpus=2, node_id=B)
        for bench in (self.a, self.b):
            bench.group()
        view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
        self.a.tell(ClusterView(nodes=[view]))
        self.kind = self.a.task_class(**options)  # type: ignore[arg-type]

    @staticmethod
    def view(node_id: NodeId, cpus: int) -> NodeView:
        """A node that is empty, as the head sees it."""
        return NodeView(node_id=node_id, total={}, available={"CPU": cpus * CPU}, queued_tasks=0)

    def carry(self, only: NodeId | None = None) -> None:
        """All messages between the two arrive, in order; those for a third go nowhere."""
        while True:
            moved = False
            for sender, bench, other in ((A, self.a, self.b), (B, self.b, self.a)):
                for effect in bench.effects[:]:
                    if isinstance(effect, SendPeer):
                        bench.effects.remove(effect)
                        if only is not None and effect.node_id not in (A, only):
                            continue
                        other.tell(effect.message, sender)
                        moved = True
                    elif isinstance(effect, SendChunk):
                        bench.effects.remove(effect)
                        message = ChunkData(
                            object_id=effect.object_id,
                            offset=effect.offset,
                            data=b"D" * effect.size_bytes,
                            number=effect.number,
                        )
                        other.tell(message, sender)
                        moved = True
            if not moved:
                return

    def run(self, *results: bytes | Outcome, large: bool = False) -> WorkerId:
        """B's worker runs what it was sent."""
        self.b.start_all()
        worker = self.b.busy()[0]
        packet = self.b.read(worker)
        if large:
            self.finish_large(worker, packet)
        else:
            self.b.finish(worker, packet, list(results))
        return worker

    def finish_large(self, worker: WorkerId, packet: RunTasks) -> None:
        name = result_of(packet.tasks[0].task_id)
        self.b.say(worker, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
        offset = self.b.node.state.clients[worker].ranges[name]  # type: ignore[index]
        place = InArena(object_id=name, offset=offset, size_bytes=LARGE)
        self.b.finish(worker, packet, [Outcome(values=[place])])

    def b_dies(self) -> None:
        self.a.tell(NodeDied(node_id=B))

    def tell_b(self, message: NodeInput, sender: bytes) -> None:
        self.b.tell(message, sender)


def test_a_task_that_does_not_fit_runs_on_a_node_where_it_does() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    assert pair.a.state(task) == "FORWARDED"
    pair.carry()
    pair.run(b"42")
    pair.carry()
    assert pair.a.value_of(result_of(task)) == b"42"
    pair.a.drop(result_of(task))
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_no_more_is_forwarded_than_the_last_view_has_room_for() -> None:
    pair = Pair()
    tasks = pair.a.submit_many(pair.kind, 5)
    states = [pair.a.state(task) for task in tasks]
    assert states == ["FORWARDED"] * 2 + ["QUEUED"] * 3
    view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
    pair.a.tell(ClusterView(nodes=[view]))
    assert pair.a.state(tasks[3]) == "FORWARDED"


def test_what_was_given_counts_until_the_head_would_have_told_of_it() -> None:
    """A view comes only when a node has other amounts free than it last said: what was taken and
    given back between two heartbeats must not count for ever.
    """
    pair = Pair()
    tasks = pair.a.submit_many(pair.kind, 3)
    assert pair.a.state(tasks[2]) == "QUEUED"
    interval_s = pair.a.node.state.config.heartbeat_interval_s
    pair.a.after(3 * interval_s)
    assert pair.a.state(tasks[2]) == "QUEUED"
    pair.a.after(2 * interval_s)
    assert pair.a.state(tasks[2]) == "FORWARDED"


def wait_replies(pair: Pair) -> list[WaitReply]:
    found = [effect.message for effect in pair.a.effects if isinstance(effect, Reply)]
    return [message for message in found if isinstance(message, WaitReply)]


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_wait_that_fetches_ends_when_the_object_is_here(is_ready: bool) -> None:
    pair = Pair()
    name = result_of(pair.a.submit(pair.kind))
    wait = WaitObjects(request_id=1, object_ids=[name], count=1, fetch=True)
    if not is_ready:
        pair.a.tell(wait, DRIVER)
    pair.carry()
    pair.run(large=True)
    for effect in pair.b.take(SendPeer):
        pair.a.tell(effect.message, B)
    if is_ready:
        pair.a.tell(wait, DRIVER)
    pair.a.tell(WaitObjects(request_id=2, object_ids=[name], count=1), DRIVER)
    assert [reply.request_id for reply in wait_replies(pair)] == [2]
    pair.carry()
    assert [reply.request_id for reply in wait_replies(pair)] == [2, 1]
    record = pair.a.node.state.objects[name]
    assert record.location() is None
    pair.a.drop(name)
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_what_fits_here_stays_here() -> None:
    pair = Pair()
    bench = Bench(cpus=2)
    bench.group()
    view = NodeView(node_id=B, total={}, available={"CPU": 8 * CPU}, queued_tasks=0)
    bench.tell(ClusterView(nodes=[view]))
    kind = bench.task_class()
    tasks = bench.submit_many(kind, 2)
    assert {bench.state(task) for task in tasks} == {"QUEUED"}, "for workers that start"
    third = bench.submit(kind)
    assert "FORWARDED" in {bench.state(task) for task in (*tasks, third)}
    assert pair.a.node is not bench.node


def test_a_large_result_stays_where_it_was_made_and_is_fetched_once_asked_for() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.run(large=True)
    pair.carry()
    assert pair.b.node.statistics().arena.used_bytes > 0
    assert pair.a.node.statistics().arena.used_bytes == 0
    request = pair.a.get(result_of(task))
    assert pair.a.values() == {}
    pair.carry()
    (value,) = pair.a.values()[request].values
    assert isinstance(value, InArena)
    assert not value.node_id
    assert pair.a.node.statistics().arena.used_bytes > 0
    pair.a.drop(result_of(task))
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_a_large_result_that_nobody_wants_is_freed_where_it_is() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.a.drop(result_of(task))
    pair.carry()
    pair.run(large=True)
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_an_argument_in_the_runner_s_own_arena_is_not_moved() -> None:
    pair = Pair()
    first = pair.a.submit(pair.kind)
    second = pair.a.submit(pair.kind, dependencies=[result_of(first)])
    pair.a.tell(
        ClusterView(
            nodes=[NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)]
        )
    )
    pair.carry()
    pair.run(large=True)
    pair.carry()
    pair.b.start_all()
    (worker,) = pair.b.busy()
    (call,) = pair.b.read(worker).tasks
    (argument,) = call.arguments
    assert isinstance(argument, InArena)
    assert not argument.node_id
    pair.b.report(worker, call.task_id, 0, [b"done"], ended=2)
    pair.carry()
    assert pair.a.value_of(result_of(second)) == b"done"
    pair.a.drop(result_of(first), result_of(second))
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_a_crash_on_another_node_is_counted_by_the_owner() -> None:
    pair = Pair(max_retries=1)
    task = pair.a.submit(pair.kind)
    for attempt in range(2):
        pair.carry()
        pair.b.start_all()
        (worker,) = pair.b.busy()
        pair.b.lose(worker, pair.b.read(worker).sequence, 0)
        pair.carry()
        if attempt == 0:
            view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
            pair.a.tell(ClusterView(nodes=[view]))
    value = pair.a.value_of(result_of(task))
    assert isinstance(value, bytes)
    assert value.startswith(b"WorkerCrashedError")
    assert b"tried 2 time(s)" in value


def test_a_retriable_exception_elsewhere_is_retried_as_often_as_here() -> None:
    pair = Pair(max_retries=2, retry_exceptions=b"*")
    task = pair.a.submit(pair.kind)
    failure = Outcome(values=[b"boom"], is_error=True, retriable=True)
    attempts = 0
    while pair.a.state(task):
        pair.carry()
        if pair.b.start_all() or pair.b.busy():
            pair.run(failure)
            attempts += 1
        view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
        pair.carry()
        pair.a.tell(ClusterView(nodes=[view]))
    assert attempts == 3
    assert pair.a.value_of(result_of(task)) == b"boom"


def test_tasks_on_a_node_that_dies_are_tried_again_or_fail_with_its_name() -> None:
    for retries, state in ((1, "QUEUED"), (0, None)):
        pair = Pair(max_retries=retries)
        task = pair.a.submit(pair.kind)
        pair.carry()
        pair.b_dies()
        assert pair.a.state(task) == state
        if state is None:
            value = pair.a.value_of(result_of(task))
            assert isinstance(value, bytes)
            assert value.startswith(b"NodeDiedError")


def test_a_result_lost_with_its_node_is_made_again() -> None:
    pair = Pair(max_retries=1)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.run(large=True)
    pair.carry()
    request = pair.a.get(result_of(task))
    pair.b_dies()
    assert pair.a.state(task) == "QUEUED"
    c = NodeId(b"C" * 28)
    view = NodeView(node_id=c, total={}, available={"CPU": CPU}, queued_tasks=0)
    pair.a.tell(ClusterView(nodes=[view]))
    assert pair.a.state(task) == "FORWARDED"
    assert pair.a.values() == {}
    assert request


def test_all_return_values_lost_with_a_node_are_made_by_one_more_run() -> None:
    pair = Pair(max_retries=1, num_returns=2)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    (worker,) = pair.b.busy()
    packet = pair.b.read(worker)
    places = []
    for index in range(2):
        name = result_of(task, index)
        pair.b.say(worker, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
        offset = pair.b.node.state.clients[worker].ranges[name]  # type: ignore[index]
        places.append(InArena(object_id=name, offset=offset, size_bytes=LARGE))
    pair.b.finish(worker, packet, [Outcome(values=list(places))])
    pair.carry()
    pair.b_dies()
    assert pair.a.state(task) == "QUEUED"
    assert pair.a.node.statistics().tasks == 1


def test_a_large_error_of_several_return_values_is_let_go_with_the_last_of_them() -> None:
    """Also when the one that is read first is not the one whose memory it is."""
    pair = Pair(max_retries=0, num_returns=2)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    (worker,) = pair.b.busy()
    packet = pair.b.read(worker)
    name = result_of(task)
    pair.b.say(worker, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
    offset = pair.b.node.state.clients[worker].ranges[name]  # type: ignore[index]
    place = InArena(object_id=name, offset=offset, size_bytes=LARGE)
    pair.b.finish(worker, packet, [Outcome(values=[place], is_error=True)])
    pair.carry()
    pair.a.get(result_of(task, 1))
    pair.a.get(result_of(task, 0))
    pair.carry()
    assert len(pair.a.values()) == 2
    pair.a.drop(result_of(task, 0), result_of(task, 1))
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_a_result_that_may_not_be_made_again_is_lost_with_words() -> None:
    pair = Pair(max_retries=0)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.run(large=True)
    pair.carry()
    pair.b_dies()
    value = pair.a.value_of(result_of(task))
    assert isinstance(value, bytes)
    assert value.startswith(b"ObjectReconstructionFailedError")
    pair.a.drop(result_of(task))
    pair.a.assert_empty()


def test_a_result_lost_after_its_workers_were_closed_is_an_error_at_once() -> None:
    pair = Pair(max_retries=3)
    argument = pair.a.submit(pair.kind)
    task = pair.a.submit(pair.kind, dependencies=[result_of(argument)])
    pair.carry()
    pair.run(large=True)
    pair.carry()
    pair.carry()
    pair.run(large=True)
    pair.carry()
    pair.a.close(PLAIN)
    assert pair.a.take(GroupDrained)
    pair.b_dies()
    assert pair.a.node.statistics().tasks == 0
    value = pair.a.value_of(result_of(task))
    assert isinstance(value, bytes)
    assert value.startswith(b"ObjectReconstructionFailedError")
    pair.a.drop(result_of(argument), result_of(task))
    pair.a.assert_empty()


def test_lineage_is_let_go_with_the_last_object_that_needs_it() -> None:
    pair = Pair()
    value = ObjectId(b"v" * 28)
    pair.a.put(value, b"value")
    task = pair.a.submit(pair.kind, dependencies=[value])
    pair.a.drop(value)
    pair.carry()
    pair.run(large=True)
    pair.carry()
    assert pair.a.node.statistics().objects == 2, "the argument is needed to make it again"
    pair.a.drop(result_of(task))
    pair.carry()
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_what_a_dead_node_had_asked_for_is_dropped() -> None:
    pair = Pair()
    pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    (worker,) = pair.b.busy()
    packet = pair.b.read(worker)
    pair.b.tell(NodeDied(node_id=A))
    pair.finish_large(worker, packet)
    pair.b.assert_empty()
    assert pair.b.take(SendPeer) == []
    assert pair.b.node.state.functions == {}


def test_a_node_that_is_dead_is_not_heard() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.run(b"late")
    pair.b_dies()
    pair.carry()
    assert pair.a.state(task) == "QUEUED"


C = NodeId(b"C" * 28)


def chunk(pull: PullChunk) -> ChunkData:
    """What was asked for."""
    return ChunkData(object_id=pull.object_id, offset=0, data=b"x" * LARGE, number=pull.number)


def asked_of(pair: Pair, source: NodeId) -> PullChunk:
    """The chunk that A has asked a node for."""
    found = [e.message for e in pair.a.take(SendPeer) if e.node_id == source]
    (pull,) = [message for message in found if isinstance(message, PullChunk)]
    return pull


def remote_argument(pair: Pair, **options: object) -> tuple[TaskId, TaskId]:
    """A task whose large result is on C, and one that depends on it and was given to B."""
    first = pair.a.submit(pair.kind)
    forwarded = [e for e in pair.a.take(SendPeer) if e.node_id == B]
    assert len(forwarded) == 1
    # It went to C instead, for all that A knows.
    record = pair.a.node.state.tasks[first]
    record.node_id = C
    pair.a.node._peers.ahead.on_back(first, B, has_run=False)
    pair.a.node._peers.ahead.on_given(first, record.class_queue, C, False)
    place = InArena(object_id=result_of(first), offset=0, size_bytes=LARGE, node_id=C)
    item = ForwardedResult(task_id=first, result=Outcome(values=[place]))
    # A fetches it for nobody; the next task only names it.
    second_kind = pair.a.task_class("second", **options)  # type: ignore[arg-type]
    pair.a.tell(ForwardedResults(results=[item]), C)
    second = pair.a.submit(second_kind, dependencies=[result_of(first)])
    return first, second


def test_an_argument_on_another_node_is_fetched_before_its_task_may_run() -> None:
    pair = Pair()
    first, second = remote_argument(pair)
    assert pair.a.state(second) == "WAITING"
    pull = asked_of(pair, C)
    assert (pull.object_id, pull.offset, pull.size_bytes) == (result_of(first), 0, LARGE)
    pair.a.tell(chunk(pull), C)
    assert pair.a.state(second) == "FORWARDED"


def test_an_argument_that_is_gone_from_its_node_is_made_again() -> None:
    pair = Pair()
    first, second = remote_argument(pair)
    number = asked_of(pair, C).number
    pair.a.tell(ChunkData(object_id=result_of(first), offset=0, missing=True, number=number), C)
    assert pair.a.state(first) == "FORWARDED", "it runs again, on B"
    assert pair.a.state(second) == "WAITING"


def test_what_was_awaited_from_a_node_that_dies_is_made_again() -> None:
    pair = Pair()
    first, second = remote_argument(pair)
    pull = asked_of(pair, C)
    pair.a.tell(NodeDied(node_id=C))
    assert pair.a.state(first) == "FORWARDED"
    assert pair.a.state(second) == "WAITING"
    pair.a.tell(chunk(pull), C)
    assert pair.a.state(second) == "WAITING"


def test_what_a_lost_value_contained_is_let_go() -> None:
    pair = Pair(max_retries=0)
    inner = ObjectId(b"i" * 28)
    pair.a.put(inner, b"inner")
    task = pair.a.submit(pair.kind)
    pair.a.take(SendPeer)
    place = InArena(object_id=result_of(task), offset=0, size_bytes=LARGE, node_id=B)
    outcome = Outcome(values=[place], contained=[[inner]])
    pair.a.tell(ForwardedResults(results=[ForwardedResult(task_id=task, result=outcome)]), B)
    pair.a.drop(inner)
    assert pair.a.node.statistics().objects == 2
    pair.b_dies()
    assert pair.a.node.statistics().objects == 1, "the error"


def forwarded_to_b(value: InArena) -> tuple[Bench, TaskId]:
    """B is given a task of A's with this argument."""
    bench = Bench(cpus=2, node_id=B)
    bench.group()
    bench.tell(NodeDied(node_id=NodeId(b"X" * 28)))
    task_class = TaskClass(class_id=ClassId(b"c"), function_id=FunctionId(b"f"), name="f")
    definition = FunctionDefinition(function_id=FunctionId(b"f"), blob=b"code", name="f")
    task = TaskId(b"t" * 24)
    spec = TaskSpec(
        task_id=task,
        class_id=ClassId(b"c"),
        calls=[b"call"],
        dependencies=[value.object_id],
        slots=[0],
    )
    lent = Lent(object_id=value.object_id, value=value)
    forwarded = ForwardedTask(spec=spec, lent=[lent], attempts=0)
    message = ForwardTasks(tasks=[forwarded], classes=[task_class], functions=[definition])
    bench.tell(message, A)
    return bench, task


def awaited(bench: Bench) -> list[AwaitObject]:
    return [e.message for e in bench.take(SendPeer) if isinstance(e.message, AwaitObject)]


X = NodeId(b"X" * 28)


def test_an_argument_on_a_dead_node_is_asked_for_again_from_who_lent_it() -> None:
    value = InArena(object_id=ObjectId(b"v" * 28), offset=0, size_bytes=LARGE, node_id=X)
    bench, task = forwarded_to_b(value)
    assert awaited(bench) == [AwaitObject(object_id=value.object_id, lost_at=X)]
    assert bench.state(task) == "WAITING"
    bench.tell(ObjectReady(object=Lent(object_id=value.object_id, value=b"again")), A)
    assert bench.state(task) == "QUEUED"


def test_an_argument_whose_node_dies_meanwhile_is_asked_for_again() -> None:
    value = InArena(object_id=ObjectId(b"v" * 28), offset=0, size_bytes=LARGE, node_id=C)
    bench, task = forwarded_to_b(value)
    assert bench.state(task) == "WAITING"
    assert awaited(bench) == []
    bench.tell(NodeDied(node_id=C))
    assert awaited(bench) == [AwaitObject(object_id=value.object_id, lost_at=C)]
    bench.tell(NodeDied(node_id=A))
    bench.assert_empty()


def test_a_task_that_comes_back_waits_for_its_argument_again_and_is_not_charged() -> None:
    pair = Pair(max_retries=0)
    _, second = remote_argument(pair, max_retries=0)
    pair.a.tell(chunk(asked_of(pair, C)), C)
    assert pair.a.state(second) == "FORWARDED"
    item = ForwardedResult(task_id=second, result=b"", returned=True)
    pair.a.tell(ForwardedResults(results=[item]), B)
    assert pair.a.state(second) == "QUEUED"
    assert pair.a.node.state.tasks[second].attempts == 0


def test_a_large_error_on_another_node_is_fetched_like_a_value() -> None:
    pair = Pair(num_returns=2)
    task = pair.a.submit(pair.kind)
    pair.a.take(SendPeer)
    name = ObjectId(b"e" * 28)
    place = InArena(object_id=name, offset=0, size_bytes=LARGE, node_id=B)
    outcome = Outcome(values=[place], is_error=True)
    pair.a.tell(ForwardedResults(results=[ForwardedResult(task_id=task, result=outcome)]), B)
    request = pair.a.get(result_of(task, 1))
    assert pair.a.values() == {}
    pair.a.tell(chunk(asked_of(pair, B)), B)
    reply = pair.a.values()[request]
    assert reply.errors == [0]
    assert isinstance(reply.values[0], InArena)
    assert not reply.values[0].node_id
    pair.a.drop(result_of(task))
    pair.a.drop(result_of(task, 1))
    releases = [e.message for e in pair.a.take(SendPeer) if isinstance(e.message, PeerReleases)]
    assert releases == [PeerReleases(object_ids=[name])], "held there once, let go once"
    pair.a.assert_empty()


def test_heartbeats_go_to_the_head_while_there_is_one() -> None:
    node = Node(
        node_id=A,
        config=Config(),
        resources={"CPU": CPU},
        arena_bytes=PAGE,
        encode_error=encode_error,
        next_worker_id=lambda: WorkerId(b""),
        local_client=DRIVER,
        slots=1,
        has_head=True,
    )
    effects = node.handle(b"", Tick(), 1.0)
    assert [type(e.message) for e in effects if isinstance(e, SendHead)] == [Heartbeat]
    assert node.next_deadline() == 1.5
    assert node.handle(b"", Tick(), 1.2) == []
    (warning,) = node.handle(b"head", Refused(reason="dead"), 2.0)
    assert "dead" in repr(warning)
