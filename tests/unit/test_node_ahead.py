"""Short tasks that a peer keeps in stock: how many, when, and how they come back."""

from __future__ import annotations

from poolray.ids import NodeId, TaskId
from poolray.node.effects import SendPeer
from poolray.node.peers import absorb
from poolray.protocol.node import (
    ClusterView,
    ForwardedResult,
    ForwardedResults,
    ForwardTasks,
    NodeDied,
    ReturnTasks,
)
from poolray.protocol.values import Outcome
from tests.unit.node_harness import result_of
from tests.unit.test_node_peers import B, Pair


def states(pair: Pair, tasks: list[TaskId]) -> list[str | None]:
    return [pair.a.state(task) for task in tasks]


def run_two(pair: Pair, elapsed_s: float) -> None:
    """B runs two tasks, so that A knows how long they take: the second answer says it."""
    tasks = pair.a.submit_many(pair.kind, 2)
    pair.carry()
    pair.b.start_all()
    for worker in pair.b.busy():
        pair.b.finish(worker, pair.b.read(worker), [b"done"], elapsed_s=elapsed_s)
    pair.carry()
    for task in tasks:
        assert pair.a.value_of(result_of(task)) == b"done"
    pair.a.drop(*(result_of(task) for task in tasks))


def run_all(pair: Pair, elapsed_s: float) -> None:
    """B runs what it has, to the end."""
    while workers := pair.b.busy():
        for worker in workers:
            packet = pair.b.read(worker)
            results: list[bytes | Outcome] = [b"done"] * len(packet.tasks)
            pair.b.finish(worker, packet, results, elapsed_s=elapsed_s * len(packet.tasks))
        pair.carry()


def test_of_short_tasks_a_peer_gets_more_than_it_has_room_for() -> None:
    pair = Pair()
    run_two(pair, 1e-3)
    tasks = pair.a.submit_many(pair.kind, 20)
    assert states(pair, tasks) == ["FORWARDED"] * 8 + ["QUEUED"] * 12, "4 ms for each CPU"
    pair.carry()
    assert pair.b.node.statistics().queued_calls > 0
    run_all(pair, 1e-3)
    assert all(pair.a.value_of(result_of(task)) == b"done" for task in tasks)
    pair.a.drop(*(result_of(task) for task in tasks))
    pair.a.assert_empty()
    pair.b.assert_empty()


def test_long_tasks_go_one_at_a_time() -> None:
    pair = Pair()
    run_two(pair, 0.5)
    tasks = pair.a.submit_many(pair.kind, 5)
    assert states(pair, tasks) == ["FORWARDED"] * 2 + ["QUEUED"] * 3


def test_room_goes_before_stock() -> None:
    pair = Pair()
    run_two(pair, 1e-3)
    other = NodeId(b"C" * 28)
    pair.a.tell(ClusterView(nodes=[pair.view(B, 2), pair.view(other, 2)]))
    tasks = pair.a.submit_many(pair.kind, 4)
    targets = [pair.a.node.state.tasks[task].node_id for task in tasks]
    assert sorted(targets) == [B, B, other, other]


def test_tasks_that_go_to_one_peer_at_once_travel_in_one_message() -> None:
    pair = Pair()
    run_two(pair, 1e-3)
    pair.a.submit_many(pair.kind, 8)
    (message,) = [effect.message for effect in pair.a.take(SendPeer)]
    assert isinstance(message, ForwardTasks)
    assert len(message.tasks) == 8
    assert len(message.classes) == len(message.functions) == 1


def test_stock_behind_a_long_task_comes_back_and_is_given_to_who_has_room() -> None:
    pair = Pair(max_retries=3)
    run_two(pair, 1e-3)
    tasks = pair.a.submit_many(pair.kind, 8)
    pair.carry()
    other = NodeId(b"C" * 28)
    pair.a.tell(ClusterView(nodes=[pair.view(other, 2)]))
    waiting = pair.b.node.statistics().queued_calls
    assert waiting > 2
    pair.a.after(1.0)
    assert [e.message for e in pair.a.effects if isinstance(e, SendPeer)] == [
        ReturnTasks(class_id=pair.kind)
    ]
    pair.carry(only=B)
    now = [pair.a.node.state.tasks[task].node_id for task in tasks]
    assert now.count(other) == waiting
    assert pair.b.node.statistics().queued_calls == 0
    pair.a.tell(NodeDied(node_id=other))
    assert states(pair, tasks).count("QUEUED") == waiting, "B gets no stock until it has run one"


def test_stock_is_forgotten_with_its_peer() -> None:
    pair = Pair(max_retries=3)
    run_two(pair, 1e-3)
    tasks = pair.a.submit_many(pair.kind, 8)
    pair.carry()
    pair.a.tell(NodeDied(node_id=B))
    assert states(pair, tasks) == ["QUEUED"] * 8
    pair.a.after(10.0)
    assert pair.a.take(SendPeer) == []


def test_messages_of_other_kinds_are_kept_apart() -> None:
    first = ForwardedResults(results=[ForwardedResult(task_id=TaskId(b"1"), result=b"")])
    second = ForwardedResults(results=[ForwardedResult(task_id=TaskId(b"2"), result=b"")])
    assert absorb(first, second)
    assert [item.task_id for item in first.results] == [b"1", b"2"]
    assert not absorb(first, ForwardTasks(tasks=[], classes=[], functions=[]))
