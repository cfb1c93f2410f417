"""Actors of a cluster: hosted, called, restarted and ended across nodes."""

from __future__ import annotations

import pytest

from poolray.ids import ActorId, ClientId, TaskId, handle_of
from poolray.node.effects import SendPeer, TerminateWorker
from poolray.protocol.actors import CountCalls, KillActor, LookUpActor
from poolray.protocol.directory import ActorStage
from poolray.protocol.node import NodeDied
from poolray.protocol.worker import ActorExiting
from tests.unit.cluster_bench import A, B, C, MiniCluster
from tests.unit.node_harness import DRIVER, result_of

OTHER = ClientId(b"other client")


@pytest.fixture
def cluster() -> MiniCluster:
    """A has no CPU, B and C have two each."""
    return MiniCluster(0, 2, 2)


def lend_to_c(cluster: MiniCluster, actor_id: ActorId) -> None:
    """A task of A's that has the handle runs on C and keeps it."""
    a, c = cluster.nodes[A], cluster.nodes[C]
    kind = a.task_class("keeps", cpus=2)
    cluster.refresh()
    task = a.submit(kind, borrows=[handle_of(actor_id)])
    cluster.carry()
    c.start_all()
    (worker_id,) = c.busy()
    packet = c.read(worker_id)
    c.finish(worker_id, packet, kept=[handle_of(actor_id)])
    c.hold(handle_of(actor_id), client=DRIVER)
    c.drop(handle_of(actor_id), client=worker_id)
    cluster.carry()
    a.drop(result_of(task))
    cluster.carry()


def test_an_actor_that_does_not_fit_lives_on_a_node_where_it_does(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    a = cluster.nodes[A]
    call = a.call(actor_id)
    cluster.carry()
    assert cluster.run(B, worker_id, b"answer") == [b"call"]
    assert cluster.value_at(A, call) == "answer"


def test_calls_made_before_it_lives_go_in_order_once_it_does(cluster: MiniCluster) -> None:
    a = cluster.nodes[A]
    actor_id = a.create(cpus=1)
    calls = [a.call(actor_id, payload=b"%d" % i) for i in range(3)]
    cluster.carry()
    worker_id = cluster.construct(B)
    later = a.call(actor_id, payload=b"3")
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"0", b"1", b"2", b"3"]
    assert {cluster.value_at(A, call) for call in (*calls, later)} == {"result"}


def test_the_last_handle_ends_it_where_it_is_after_its_calls(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    a, b = cluster.nodes[A], cluster.nodes[B]
    call = a.call(actor_id)
    a.let_go(actor_id)
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"call"]
    assert cluster.value_at(A, call) == "result"
    a.drop(result_of(call))
    cluster.carry()
    b.lose(worker_id, signal=None)
    cluster.carry()
    for node in (a, b):
        node.assert_empty()
        assert node.node.statistics().actors == 0
    assert cluster.head.statistics().actors == 0


def test_a_constructor_that_raises_elsewhere_is_what_calls_get(cluster: MiniCluster) -> None:
    a = cluster.nodes[A]
    actor_id = a.create(cpus=1)
    call = a.call(actor_id)
    cluster.carry()
    cluster.fail_construct(B, b"no luck")
    assert cluster.value_at(A, call) == "no luck"
    assert cluster.value_at(A, a.call(actor_id)) == "no luck"


def test_a_constructor_whose_node_dies_runs_elsewhere(cluster: MiniCluster) -> None:
    a = cluster.nodes[A]
    actor_id = a.create(cpus=1, max_restarts=1)
    cluster.carry()
    call = a.call(actor_id)
    cluster.kill(B)
    worker_id = cluster.construct(C)
    assert cluster.run(C, worker_id, b"from C") == [b"call"]
    assert cluster.value_at(A, call) == "from C"


# ---- handles on other nodes ----------------------------------------------------------------------


def test_a_third_node_with_a_handle_calls_the_host_directly(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    lend_to_c(cluster, actor_id)
    c = cluster.nodes[C]
    call = c.call(actor_id, payload=b"from C")
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"from C"]
    assert cluster.value_at(C, call) == "result"


def test_a_handle_elsewhere_keeps_the_actor_alive(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    lend_to_c(cluster, actor_id)
    cluster.nodes[A].let_go(actor_id)
    cluster.carry()
    assert cluster.nodes[B].node.statistics().actors == 1
    cluster.nodes[C].let_go(actor_id)
    cluster.carry()
    assert cluster.nodes[B].node.statistics().actors == 0
    assert cluster.nodes[B].reads_stop(worker_id)


def test_a_handle_that_comes_to_the_host_calls_it_there(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    a, b = cluster.nodes[A], cluster.nodes[B]
    kind = a.task_class("keeps", cpus=1)
    cluster.pass_time(1.0)
    task = a.submit(kind, borrows=[handle_of(actor_id)])
    cluster.carry()
    b.start_all()
    (runner,) = [w for w in b.busy() if w != worker_id] or cluster.nodes[C].start_all() or [b""]
    node = b if runner in b.queues else cluster.nodes[C]
    call = node.call(actor_id, client=runner)
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"call"]
    assert node.error_of(call) == "result"
    assert a.state(task) is not None


def test_calls_of_one_caller_keep_their_order_on_the_way(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    lend_to_c(cluster, actor_id)
    c = cluster.nodes[C]
    late = c.submit(c.task_class("late"))
    held = c.call(actor_id, payload=b"1", dependencies=[result_of(late)])
    behind = c.call(actor_id, payload=b"2")
    free = c.call(actor_id, payload=b"3", client=OTHER)
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"3"]
    c.run_all(late)
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"1", b"2"]
    for call in (held, behind, free):
        assert c.error_of(call) == "result"


# ---- processes that die --------------------------------------------------------------------------


def test_a_crash_on_the_host_restarts_it_by_its_keeper(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b(max_restarts=1)
    a, b = cluster.nodes[A], cluster.nodes[B]
    again = a.method("again", retries=1)
    begun = a.call(actor_id, again, payload=b"begun")
    refused = a.call(actor_id, payload=b"refused")
    waits = a.call(actor_id, again, payload=b"waits")
    cluster.carry()
    packet = b.read(worker_id)
    b.lose(worker_id, packet.sequence, 0)
    cluster.carry()
    cluster.refresh()
    assert "is unavailable" in cluster.value_at(A, refused)
    (host,) = [n for n in (B, C) if cluster.nodes[n].start_all() or cluster.nodes[n].busy()]
    second = cluster.construct(host)
    assert cluster.run(host, second) == [b"begun", b"waits"]
    for call in (begun, waits):
        assert cluster.value_at(A, call) == "result"
    cluster.nodes[host].lose(second)
    cluster.carry()
    assert "died" in cluster.value_at(A, a.call(actor_id, again))


def test_an_actor_whose_node_dies_is_made_again_elsewhere(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b(max_restarts=1)
    a = cluster.nodes[A]
    again = a.method("again", retries=1)
    begun, lost = a.call(actor_id, again, payload=b"1"), a.call(actor_id, payload=b"2")
    waits = a.call(actor_id, again, payload=b"3")
    cluster.carry()
    cluster.kill(B)
    assert "is unavailable" in cluster.value_at(A, lost)
    worker_id = cluster.construct(C)
    assert cluster.run(C, worker_id) == [b"1", b"3"]
    assert {cluster.value_at(A, call) for call in (begun, waits)} == {"result"}
    cluster.kill(C)
    assert "died with its node" in cluster.value_at(A, a.call(actor_id, again))


def test_an_actor_without_restarts_dies_with_its_node(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b()
    a = cluster.nodes[A]
    call = a.call(actor_id)
    cluster.carry()
    cluster.kill(B)
    assert "died with its node" in cluster.value_at(A, call)
    assert cluster.head.statistics().actors == 0


def test_callers_on_third_nodes_follow_an_actor_to_its_next_node() -> None:
    cluster = MiniCluster(0, 2, 2, 2)
    actor_id, _ = cluster.live_on_b(max_restarts=-1)
    lend_to_c(cluster, actor_id)
    c = cluster.nodes[C]
    again = c.method("again", retries=-1)
    calls = [c.call(actor_id, again, payload=b"%d" % i) for i in range(3)]
    cluster.carry()
    cluster.kill(B)
    (host,) = [n for n in cluster.nodes if cluster.nodes[n].start_all() or cluster.nodes[n].busy()]
    worker_id = cluster.construct(host)
    late = c.call(actor_id, again, payload=b"3")
    cluster.carry()
    assert cluster.run(host, worker_id) == [b"0", b"1", b"2", b"3"]
    assert {c.error_of(call) for call in (*calls, late)} == {"result"}


def test_an_actor_ends_with_the_node_that_owns_it(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b(max_restarts=-1)
    lend_to_c(cluster, actor_id)
    b, c = cluster.nodes[B], cluster.nodes[C]
    call = c.call(actor_id)
    cluster.carry()
    cluster.kill(A)
    assert any(e.worker_id == worker_id for e in b.take(TerminateWorker))
    assert "owner" in c.error_of(call)
    assert cluster.head.statistics().actors == 0


# ---- names and detached actors -------------------------------------------------------------------


def test_a_name_is_found_from_every_node(cluster: MiniCluster) -> None:
    a, c = cluster.nodes[A], cluster.nodes[C]
    actor_id = a.create(cpus=1, name="n", namespace="s", request_id=1)
    cluster.carry()
    worker_id = cluster.construct(B)
    c.tell(LookUpActor(request_id=5, namespace="s", name="n"), OTHER)
    cluster.carry()
    (answer,) = c.answers()
    assert (answer.request_id, answer.actor_id, answer.description) == (5, actor_id, b"methods")
    call = c.call(actor_id, client=OTHER)
    cluster.carry()
    cluster.run(B, worker_id)
    assert c.error_of(call) == "result"
    a.let_go(actor_id)
    cluster.carry()
    assert cluster.head.statistics().names == 1, "C has a handle"
    c.let_go(actor_id, OTHER)
    c.drop(result_of(call), client=OTHER)
    cluster.carry()
    assert cluster.head.statistics().names == 0


def test_a_detached_actor_outlives_the_node_that_made_it(cluster: MiniCluster) -> None:
    a, b, c = (cluster.nodes[n] for n in (A, B, C))
    actor_id = a.create(
        cpus=1, name="n", namespace="s", request_id=1, detached=True, max_restarts=1
    )
    cluster.carry()
    worker_id = cluster.construct(B)
    cluster.kill(A)
    assert b.take(TerminateWorker) == []
    c.tell(LookUpActor(request_id=5, namespace="s", name="n"), OTHER)
    cluster.carry()
    assert c.answers()[0].actor_id == actor_id
    call = c.call(actor_id, client=OTHER)
    cluster.carry()
    assert cluster.run(B, worker_id) == [b"call"]
    assert c.error_of(call) == "result"
    # Now its host, which keeps it, dies too: it is made again on C.
    cluster.kill(B)
    second = cluster.construct(C)
    after = c.call(actor_id, client=OTHER)
    assert cluster.run(C, second) == [b"call"]
    assert c.error_of(after) == "result"
    c.tell(KillActor(actor_id=actor_id), OTHER)
    cluster.carry()
    assert cluster.head.statistics().actors == 0


def test_a_kill_from_a_third_node_reaches_the_actor(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b()
    lend_to_c(cluster, actor_id)
    b, c = cluster.nodes[B], cluster.nodes[C]
    running = c.call(actor_id)
    cluster.carry()
    c.tell(KillActor(actor_id=actor_id), DRIVER)
    cluster.carry()
    assert any(e.worker_id == worker_id for e in b.take(TerminateWorker))
    assert "killed" in c.error_of(running)
    assert "killed" in c.error_of(c.call(actor_id))


def test_a_kill_with_restart_is_a_crash(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b(max_restarts=1)
    cluster.nodes[A].tell(KillActor(actor_id=actor_id, no_restart=False), DRIVER)
    cluster.carry()
    b = cluster.nodes[B]
    assert any(e.worker_id == worker_id for e in b.take(TerminateWorker))
    b.lose(worker_id)
    cluster.carry()
    assert cluster.nodes[A].node.statistics().actors == 1


def test_an_actor_that_ends_itself_elsewhere_is_not_made_again(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b(max_restarts=-1)
    exiting = ActorExiting(worker_id=worker_id, actor_id=actor_id, reason="called exit_actor()")
    cluster.nodes[B].tell(exiting)
    cluster.carry()
    assert "exit_actor" in cluster.value_at(A, cluster.nodes[A].call(actor_id))


def test_calls_of_actors_elsewhere_are_counted(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b(counted=True)
    a = cluster.nodes[A]
    a.call(actor_id)
    a.call(actor_id)
    a.call(actor_id, client=OTHER)
    a.tell(CountCalls(request_id=1, actor_id=actor_id), DRIVER)
    assert [e.message.count for e in a.effects if hasattr(e, "client_id")][-1:] == [2]  # type: ignore[union-attr]


# ---- the head ------------------------------------------------------------------------------------


def test_calls_go_on_while_the_head_is_away_and_after(cluster: MiniCluster) -> None:
    actor_id, worker_id = cluster.live_on_b(max_restarts=1)
    a = cluster.nodes[A]
    call = a.call(actor_id)
    cluster.carry(head=False)
    cluster.run(B, worker_id)
    assert cluster.value_at(A, call) == "result"
    cluster.restart_head()
    assert cluster.head.statistics().actors == 1
    again = a.call(actor_id, a.method("again", retries=1))
    cluster.carry()
    cluster.kill(B)
    second = cluster.construct(C)
    cluster.run(C, second)
    assert cluster.value_at(A, again) == "result"


def test_a_name_that_was_asked_for_when_the_head_went_is_asked_for_again(
    cluster: MiniCluster,
) -> None:
    a = cluster.nodes[A]
    a.create(cpus=1, name="n", namespace="s", request_id=1)
    cluster.restart_head()
    assert len(a.answers()) == 1
    assert cluster.head.statistics().names == 1


def test_a_death_that_the_head_missed_is_known_when_it_is_back(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b()
    a = cluster.nodes[A]
    a.tell(KillActor(actor_id=actor_id), DRIVER)
    cluster.restart_head()
    assert cluster.head.statistics().actors == 0


def test_late_messages_of_a_dead_host_change_nothing(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b(max_restarts=1)
    a = cluster.nodes[A]
    call = a.call(actor_id, a.method("again", retries=1))
    cluster.carry()
    b = cluster.nodes[B]
    cluster.kill(B)
    a.tell(NodeDied(node_id=B), b"")
    for effect in b.effects:
        if isinstance(effect, SendPeer) and effect.node_id == A:
            a.tell(effect.message, B)
    worker_id = cluster.construct(C)
    cluster.run(C, worker_id)
    assert cluster.value_at(A, call) == "result"


def stage_of(cluster: MiniCluster, actor_id: ActorId) -> ActorStage:
    entries = cluster.nodes[A].node.register().actors
    return next(entry.stage for entry in entries if entry.actor_id == actor_id)


def test_a_node_that_registers_says_which_actors_it_keeps(cluster: MiniCluster) -> None:
    actor_id, _ = cluster.live_on_b()
    assert stage_of(cluster, actor_id) is ActorStage.ALIVE
    assert isinstance(TaskId(b""), bytes)
