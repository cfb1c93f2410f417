"""Tasks given to a node whose room somebody else took: they do not wait there for ever."""

from __future__ import annotations

import pytest

from poolray.ids import NodeId, TaskId
from poolray.node.effects import SendPeer
from poolray.protocol.directory import DrainNode
from poolray.protocol.inquiry import AskHead
from poolray.protocol.node import ForwardTasks
from poolray.protocol.values import Placement
from tests.unit.cluster_bench import A, B, C, MiniCluster
from tests.unit.node_harness import DRIVER


@pytest.fixture
def cluster() -> MiniCluster:
    """A has no CPU; B, which is full before A hears of it, and C have one each."""
    cluster = MiniCluster(0, 1, 1)
    b = cluster.nodes[B]
    b.submit_many(b.task_class("own"), 1)
    b.start_all()
    assert b.node.state.resources.available["CPU"] == 0
    return cluster


def give(cluster: MiniCluster, **options: object) -> TaskId:
    """A gives a task to B and one to C; gives B's."""
    a = cluster.nodes[A]
    tasks = a.submit_many(a.task_class(**options), 2)  # type: ignore[arg-type]
    to = {task: a.node.state.tasks[task].node_id for task in tasks}
    cluster.carry()
    (stranded,) = (task for task, node_id in to.items() if node_id == B)
    return stranded


def pass_time(cluster: MiniCluster, seconds: int) -> None:
    for _ in range(seconds):
        for node in cluster.nodes.values():
            node.after(1.0)
        cluster.carry()
        cluster.pass_time(1.0)  # of the head


def where(cluster: MiniCluster, task: TaskId) -> NodeId | None:
    return cluster.nodes[A].node.state.tasks[task].node_id


def test_a_task_that_does_not_fit_any_more_runs_where_it_does(cluster: MiniCluster) -> None:
    task = give(cluster)
    assert where(cluster, task) == B
    c = cluster.nodes[C]
    c.run_all()
    cluster.carry()
    pass_time(cluster, 3)
    assert where(cluster, task) == C
    c.run_all()
    cluster.carry()
    assert cluster.nodes[A].state(task) is None
    assert cluster.nodes[A].node.state.classes, "its class is known, its task has ended"


def test_where_nobody_has_room_it_waits_with_its_owner_and_is_not_sent_to_and_fro(
    cluster: MiniCluster,
) -> None:
    task = give(cluster)
    cluster.nodes[C].start_all()
    pass_time(cluster, 3)
    assert where(cluster, task) is None
    a, b = cluster.nodes[A], cluster.nodes[B]
    sent = 0
    for _ in range(10):
        for node in cluster.nodes.values():
            node.after(1.0)
        sent += sum(
            isinstance(e, SendPeer) and isinstance(e.message, ForwardTasks) for e in a.effects
        )
        cluster.carry()
        cluster.pass_time(1.0)
    assert sent == 0
    assert a.node.state.tasks[task].attempts == 0
    b.run_all()  # what has taken the room ends
    pass_time(cluster, 2)
    assert where(cluster, task) == B


def test_a_task_that_is_about_to_begin_is_left_where_it_is() -> None:
    cluster = MiniCluster(0, 1)
    a = cluster.nodes[A]
    (task,) = a.submit_many(a.task_class(), 1)
    cluster.carry()
    pass_time(cluster, 5)  # (B's first worker takes its time)
    assert where(cluster, task) == B
    assert a.state(task) == "FORWARDED"


def test_a_task_that_asks_for_that_node_waits_there(cluster: MiniCluster) -> None:
    a = cluster.nodes[A]
    (task,) = a.submit_many(a.task_class(placement=Placement(node_id=B)), 1)
    cluster.carry()
    pass_time(cluster, 5)
    assert where(cluster, task) == B


def test_an_actor_that_does_not_fit_any_more_is_made_where_it_does(cluster: MiniCluster) -> None:
    a, b = cluster.nodes[A], cluster.nodes[B]
    actors = [a.create(cpus=1) for _ in range(2)]
    cluster.carry()
    assert len(b.node.state.tasks) == 2, "its own task, and one of the actors"
    calls = {a.call(actor_id): actor_id for actor_id in actors}
    cluster.run(C, cluster.construct(C))
    (lucky,) = (call for call in calls if a.state(call) is None)
    pass_time(cluster, 3)
    assert len(b.node.state.tasks) == 1, "it went back"
    assert not b.node.register().actors
    a.let_go(calls.pop(lucky))
    cluster.carry()
    pass_time(cluster, 3)
    cluster.run(C, cluster.construct(C))
    (call,) = calls
    assert a.error_of(call) == "result"


def test_a_node_that_is_drained_lets_go_of_an_actor_that_it_has_not_made(
    cluster: MiniCluster,
) -> None:
    a, b = cluster.nodes[A], cluster.nodes[B]
    actors = [a.create(cpus=1) for _ in range(2)]
    cluster.carry()
    assert len(b.node.state.tasks) == 2, "its own task, and one of the actors"
    drain = DrainNode(request_id=0, node_id=B, reason="test")
    a.tell(AskHead(request_id=1, question=drain), DRIVER)
    cluster.carry()
    b.run_all()
    cluster.carry()
    assert B in cluster.head.statistics().dead_nodes
    calls = {a.call(actor_id): actor_id for actor_id in actors}
    while calls:  # both are made on C, one after the other
        cluster.run(C, cluster.construct(C))
        (call,) = (call for call in calls if a.state(call) is None)
        assert a.error_of(call) == "result"
        a.let_go(calls.pop(call))
        cluster.carry()
        pass_time(cluster, 3)
