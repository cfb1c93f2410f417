"""Nodes that leave politely: nothing new, objects move, then goodbye."""

from __future__ import annotations

import pytest

from poolray.ids import WorkerId
from poolray.node.effects import SendHead
from poolray.protocol.client import AllocateRange
from poolray.protocol.cluster import DrainStarted
from poolray.protocol.directory import DrainNode, LeaveCluster
from poolray.protocol.inquiry import AskHead
from poolray.protocol.node import ClusterView, NodeView
from poolray.protocol.values import InArena, Outcome
from tests.unit.cluster_bench import CPU, A, B, C, MiniCluster
from tests.unit.node_harness import DRIVER, result_of

LARGE = 200_000


@pytest.fixture
def cluster() -> MiniCluster:
    """A has no CPU, B has one, C two."""
    return MiniCluster(0, 1, 2)


def drain(cluster: MiniCluster, patience_s: float = 0.0) -> None:
    """A's driver wants B to leave."""
    question = DrainNode(request_id=0, node_id=B, reason="test", patience_s=patience_s)
    cluster.nodes[A].tell(AskHead(request_id=1, question=question), DRIVER)
    cluster.carry()


def has_left(cluster: MiniCluster) -> bool:
    return B in cluster.head.statistics().dead_nodes


def run_large(cluster: MiniCluster, worker_id: WorkerId) -> None:
    """A worker of B makes a large value."""
    b = cluster.nodes[B]
    packet = b.read(worker_id)
    name = result_of(packet.tasks[0].task_id)
    b.say(worker_id, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
    offset = b.node.state.clients[worker_id].ranges[name]  # type: ignore[index]
    place = InArena(object_id=name, offset=offset, size_bytes=LARGE)
    b.finish(worker_id, packet, [Outcome(values=[place])])
    cluster.carry()


def test_an_idle_node_leaves_at_once(cluster: MiniCluster) -> None:
    drain(cluster)
    assert has_left(cluster)


def ask_if_idle(cluster: MiniCluster) -> DrainStarted:
    """Somebody wants B to leave if it is idle."""
    started, effects = cluster.head.drain(B, "test", 0.0, True, cluster.now)
    cluster.deliver(effects)
    return started


def test_only_the_node_itself_knows_whether_it_is_idle() -> None:
    cluster = MiniCluster(0, 1)
    a, b = cluster.nodes[A], cluster.nodes[B]
    cluster.refresh()
    a.submit_many(a.task_class(), 1)
    cluster.carry()
    b.start_all()
    (worker_id,) = b.busy()
    packet = b.read(worker_id)
    # The head has not heard of it: there was no heartbeat since.
    assert ask_if_idle(cluster).is_pending
    assert ask_if_idle(cluster).is_pending
    cluster.carry()
    assert ask_if_idle(cluster) == DrainStarted(refusal="it is not idle")
    assert not has_left(cluster)
    b.finish(worker_id, packet)
    cluster.carry()
    assert ask_if_idle(cluster).is_pending
    cluster.carry()
    assert ask_if_idle(cluster).has_left


def test_what_runs_ends_first_and_what_waits_goes_elsewhere(cluster: MiniCluster) -> None:
    a, b, c = (cluster.nodes[n] for n in (A, B, C))
    kind = a.task_class()
    cluster.refresh()
    tasks = a.submit_many(kind, 3)
    cluster.carry()
    b.start_all()
    (worker_id,) = b.busy()
    packet = b.read(worker_id)
    drain(cluster)
    assert not has_left(cluster)
    cluster.refresh()
    more = a.submit_many(kind, 2)
    cluster.carry()
    b.finish(worker_id, packet)
    cluster.carry()
    assert has_left(cluster)
    for _ in range(6):
        c.run_all()
        cluster.carry()
        free = NodeView(node_id=C, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
        a.tell(ClusterView(nodes=[free]), b"")
        cluster.carry()
    assert {a.error_of(task) for task in (*tasks, *more)} == {"result"}


def test_values_that_it_keeps_for_others_are_fetched_first(cluster: MiniCluster) -> None:
    a, b = cluster.nodes[A], cluster.nodes[B]
    kind = a.task_class(max_retries=0)
    cluster.refresh()
    tasks = a.submit_many(kind, 3)
    cluster.carry()
    b.start_all()
    (worker_id,) = b.busy()
    run_large(cluster, worker_id)
    (made,) = [t for t in tasks if a.state(t) is None]
    assert a.node.statistics().arena.used_bytes == 0
    drain(cluster)
    assert a.node.statistics().arena.used_bytes > 0
    assert has_left(cluster)
    assert isinstance(a.value_of(result_of(made)), InArena)


def test_patience_has_an_end(cluster: MiniCluster) -> None:
    a, b = cluster.nodes[A], cluster.nodes[B]
    kind = a.task_class(max_retries=1)
    cluster.refresh()
    a.submit_many(kind, 3)
    cluster.carry()
    b.start_all()
    drain(cluster, patience_s=5.0)
    assert not has_left(cluster)
    b.after(4.0)
    assert not any(
        isinstance(e.message, LeaveCluster) for e in b.effects if isinstance(e, SendHead)
    )
    b.after(2.0)
    cluster.carry()
    assert has_left(cluster)


def test_an_actor_that_may_be_made_again_moves_without_being_charged() -> None:
    cluster = MiniCluster(0, 2, 2)
    actor_id, _ = cluster.live_on_b(max_restarts=1)
    drain(cluster)
    assert has_left(cluster)
    cluster.refresh()
    worker_id = cluster.construct(C)
    a = cluster.nodes[A]
    call = a.call(actor_id)
    cluster.carry()
    cluster.run(C, worker_id)
    assert a.error_of(call) == "result"
    entries = a.node.register().actors
    assert [entry.restarts for entry in entries] == [0]


def test_an_actor_that_could_not_be_made_again_keeps_its_node() -> None:
    cluster = MiniCluster(0, 2, 1)
    actor_id, _ = cluster.live_on_b()
    drain(cluster)
    assert not has_left(cluster)
    cluster.nodes[A].let_go(actor_id)
    cluster.carry()
    assert has_left(cluster)
