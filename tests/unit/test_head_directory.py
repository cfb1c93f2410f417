"""The head's directory: names, actors whose nodes die, drains, jobs, and what it stores."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest

from poolray.head.head import Head
from poolray.ids import ActorId, ClassId, FunctionId, NodeId, TaskId
from poolray.protocol.actors import CreateActor
from poolray.protocol.directory import (
    ActorAt,
    ActorChanged,
    ActorEntry,
    ActorFound,
    ActorsFound,
    ActorStage,
    Creation,
    Drain,
    DrainNode,
    DropActor,
    FindActor,
    JobEnded,
    JobsFound,
    KeepActor,
    LeaveCluster,
    ListActorEntries,
    ListJobs,
    ListNodes,
    NodesFound,
    NodeStatus,
    RegisterActor,
    RestartActor,
    UnwatchActor,
    WatchActor,
)
from poolray.protocol.node import (
    ClusterView,
    FinishJob,
    HeadMessage,
    HeadReply,
    KeyValueDelete,
    KeyValueGet,
    KeyValuePut,
    ListNames,
    NamesFound,
    NodeDied,
    Refused,
    RegisterJob,
    RegisterNode,
)
from poolray.protocol.values import FunctionDefinition, TaskClass, TaskSpec
from tests.unit.test_head import CONFIG, TIMEOUT, A, B, C, HeadBench

M = TypeVar("M")
ONE = ActorId(b"1" * 16)
TWO = ActorId(b"2" * 16)


def only(kind: type[M], said: list[tuple[NodeId, HeadMessage]]) -> list[tuple[NodeId, M]]:
    """What was said of one kind, and to whom."""
    return [(node_id, m) for node_id, m in said if isinstance(m, kind)]


def creation_of(actor_id: ActorId) -> Creation:
    spec = TaskSpec(task_id=TaskId(b"t" * 24), class_id=ClassId(b"c"), calls=[b"args"])
    return Creation(
        message=CreateActor(actor_id=actor_id, task=spec, class_name="K"),
        task_class=TaskClass(class_id=ClassId(b"c"), function_id=FunctionId(b"f"), name="K"),
        function=FunctionDefinition(function_id=FunctionId(b"f"), blob=b"code", name="K"),
    )


class Bench(HeadBench):
    """A head with actors."""

    def __init__(self, *members: NodeId) -> None:
        super().__init__(*members)
        #: What is stored.
        self.tables: dict[str, dict[bytes, bytes]] = {}

    def register(self, keeper: NodeId, actor_id: ActorId = ONE, **options: object) -> object:
        """A new actor; gives what its keeper is answered."""
        entry = ActorEntry(actor_id=actor_id, class_name="K", keeper=keeper, **options)  # type: ignore[arg-type]
        said = self.tell(keeper, RegisterActor(request_id=7, entry=entry))
        ((_, found),) = only(ActorFound, said)
        return found.entry.actor_id if found.entry is not None else None

    def alive(self, keeper: NodeId, host: NodeId, actor_id: ActorId = ONE) -> None:
        self.tell(keeper, ActorChanged(actor_id=actor_id, stage=ActorStage.ALIVE, host=host))

    def detached(self, keeper: NodeId, host: NodeId, **options: object) -> None:
        """A detached actor that lives."""
        self.register(keeper, detached=True, creation=creation_of(ONE), **options)
        self.alive(keeper, host)

    def entry(self) -> ActorEntry:
        """The only actor there is, or was."""
        (living, *_) = self.head.statistics().nodes
        ((_, found),) = only(ActorsFound, self.tell(living, ListActorEntries(request_id=1)))
        (entry,) = found.actors
        return entry

    def die(self, *living: NodeId) -> list[tuple[NodeId, HeadMessage]]:
        """All other nodes are declared dead."""
        return self.pass_time_with(*living, seconds=TIMEOUT + 1.0)

    def restart(self) -> Bench:
        """The head is killed; another one takes over what it has stored."""
        tables = self.tables
        for change in self.head.take_changes():
            rows = tables.setdefault(change.table, {})
            if change.value is None:
                rows.pop(change.key, None)
            else:
                rows[change.key] = change.value
        after = Bench()
        after.head = Head(CONFIG)
        after.now = 5.0
        after.head.restore(tables, after.now)
        after.head.check_invariants()
        return after


# ---- names ---------------------------------------------------------------------------------------


def test_a_name_belongs_to_the_first_actor_that_claims_it_until_that_is_dead() -> None:
    bench = Bench(A, B)
    assert bench.register(A, ONE, name="n", namespace="s") == ONE
    assert bench.register(A, ONE, name="n", namespace="s") == ONE, "asked again"
    assert bench.register(B, TWO, name="n", namespace="s") == ONE
    assert bench.register(B, TWO, name="n", namespace="other") == TWO
    ((_, found),) = bench.tell(B, FindActor(request_id=8, namespace="s", name="n"))
    assert isinstance(found, ActorFound)
    assert found.entry is not None
    assert found.entry.actor_id == ONE
    ((_, names),) = bench.tell(B, ListNames(request_id=9))
    assert names == NamesFound(request_id=9, names=[("s", "n"), ("other", "n")])
    bench.tell(B, ActorChanged(actor_id=ONE, stage=ActorStage.DEAD))
    assert bench.head.statistics().names == 2, "its keeper alone may say so"
    bench.tell(A, ActorChanged(actor_id=ONE, stage=ActorStage.DEAD))
    assert bench.register(B, ActorId(b"3" * 16), name="n", namespace="s") == b"3" * 16


def test_names_of_actors_go_with_their_node() -> None:
    bench = Bench(A, B)
    bench.register(A, name="n")
    bench.die(B)
    assert bench.register(B, TWO, name="n") == TWO


# ---- nodes that die ------------------------------------------------------------------------------


def test_an_actor_whose_node_dies_is_made_again_by_its_keeper_as_often_as_it_may() -> None:
    bench = Bench(A, B, C)
    bench.register(A, max_restarts=1)
    bench.alive(A, B)
    said = bench.die(A, C)
    assert only(RestartActor, said) == [(A, RestartActor(actor_id=ONE, restarts=1))]
    assert bench.entry().stage is ActorStage.RESTARTING
    bench.alive(A, C)
    ((node_id, place),) = only(ActorAt, bench.die(A))
    assert node_id == A
    assert place.stage is ActorStage.DEAD
    assert "died with its node" in place.reason
    assert bench.entry().stage is ActorStage.DEAD


def test_an_actor_dies_with_its_owners_node_and_its_host_is_told() -> None:
    bench = Bench(A, B)
    bench.register(A, max_restarts=-1)
    bench.alive(A, B)
    ((host, order),) = only(DropActor, bench.die(B))
    assert (host, order.actor_id) == (B, ONE)
    assert bench.entry().stage is ActorStage.DEAD


def test_a_detached_actor_that_lives_elsewhere_outlives_its_keeper_without_a_restart() -> None:
    bench = Bench(A, B)
    bench.detached(A, B)
    ((keeper, order),) = only(KeepActor, bench.die(B))
    assert keeper == B
    assert order.entry.host == B
    assert order.entry.restarts == 0
    assert bench.entry().stage is ActorStage.ALIVE


def test_a_detached_actor_that_dies_with_its_keeper_is_made_elsewhere() -> None:
    bench = Bench(A, B)
    bench.detached(A, A, max_restarts=1, name="n")
    ((keeper, order),) = only(KeepActor, bench.die(B))
    assert (keeper, order.entry.host, order.entry.restarts) == (B, b"", 1)
    assert order.entry.creation == creation_of(ONE)
    assert bench.head.statistics().names == 1


def test_a_detached_actor_waits_for_a_node_when_there_is_none() -> None:
    bench = Bench(A)
    bench.detached(A, A, max_restarts=-1)
    bench.die()
    ((keeper, order),) = only(KeepActor, bench.join(B))
    assert keeper == B
    assert order.entry.actor_id == ONE


def test_a_detached_actor_without_restarts_dies_with_its_node() -> None:
    bench = Bench(A, B)
    bench.detached(A, A)
    assert not only(KeepActor, bench.die(B))
    assert bench.entry().stage is ActorStage.DEAD


# ---- who wants to know ---------------------------------------------------------------------------


def test_who_watches_an_actor_hears_where_it_is_and_of_each_change() -> None:
    bench = Bench(A, B, C)
    assert bench.tell(C, WatchActor(actor_id=ONE, named_by=A)) == []
    entry = ActorEntry(actor_id=ONE, class_name="K", keeper=A, max_restarts=1)
    said = bench.tell(A, RegisterActor(request_id=0, entry=entry))
    assert [(n, m.stage) for n, m in only(ActorAt, said)] == [(C, ActorStage.PENDING)]
    said = bench.tell(A, ActorChanged(actor_id=ONE, stage=ActorStage.ALIVE, host=B))
    assert [(n, m.stage, m.host) for n, m in only(ActorAt, said)] == [(C, ActorStage.ALIVE, B)]
    places = [(n, m.stage) for n, m in only(ActorAt, bench.die(A, C))]
    assert places == [(C, ActorStage.RESTARTING)]
    bench.tell(C, UnwatchActor(actor_id=ONE))
    bench.tell(C, UnwatchActor(actor_id=ONE))
    said = bench.tell(A, ActorChanged(actor_id=ONE, stage=ActorStage.DEAD))
    assert only(ActorAt, said) == []
    ((_, place),) = bench.tell(C, WatchActor(actor_id=ONE))
    assert isinstance(place, ActorAt)
    assert place.stage is ActorStage.DEAD


def test_an_actor_that_nobody_will_register_any_more_is_said_to_be_dead() -> None:
    bench = Bench(A, B)
    assert bench.tell(B, WatchActor(actor_id=ONE, named_by=A)) == []
    ((node_id, place),) = only(ActorAt, bench.die(B))
    assert (node_id, place.stage) == (B, ActorStage.DEAD)
    ((_, again),) = bench.tell(B, WatchActor(actor_id=ONE, named_by=A))
    assert isinstance(again, ActorAt)
    assert again.stage is ActorStage.DEAD


# ---- drains --------------------------------------------------------------------------------------


def test_a_node_that_is_drained_is_given_nothing_new_and_leaves_without_costing_restarts() -> None:
    bench = Bench(A, B)
    bench.register(A, max_restarts=1)
    bench.alive(A, B)
    said = bench.tell(A, DrainNode(request_id=3, node_id=B, reason="idle", patience_s=9.0))
    assert (B, Drain(reason="idle", patience_s=9.0)) in said
    assert (A, HeadReply(request_id=3, done=True)) in said
    views = [v for _, m in only(ClusterView, [*said, *bench.die(A, B)]) for v in m.nodes]
    assert any(v.node_id == B and v.status is NodeStatus.DRAINING for v in views)
    said = bench.tell(B, LeaveCluster(node_id=B, reason="idle"))
    assert only(NodeDied, said) == [(A, NodeDied(node_id=B, reason="left the cluster: idle"))]
    assert only(RestartActor, said) == [(A, RestartActor(actor_id=ONE, restarts=0))]
    ((_, refusal),) = bench.beat(B)
    assert isinstance(refusal, Refused)
    ((_, found),) = only(NodesFound, bench.tell(A, ListNodes(request_id=4)))
    assert [(row.node_id, row.status) for row in found.nodes] == [
        (A, NodeStatus.ALIVE),
        (B, NodeStatus.DEAD),
    ]


def test_a_node_that_is_not_there_cannot_be_drained() -> None:
    bench = Bench(A)
    assert bench.tell(A, DrainNode(request_id=3, node_id=B)) == [
        (A, HeadReply(request_id=3, done=False))
    ]


# ---- jobs ----------------------------------------------------------------------------------------


def test_all_nodes_hear_of_the_end_of_a_job() -> None:
    bench = Bench(A, B)
    bench.tell(A, RegisterJob(job_id=b"j", node_id=A, entrypoint="python x.py", namespace="s"))
    said = bench.tell(A, FinishJob(job_id=b"j"))
    assert only(JobEnded, said) == [(A, JobEnded(job_id=b"j")), (B, JobEnded(job_id=b"j"))]
    assert bench.tell(A, FinishJob(job_id=b"j")) == [], "once"
    bench.tell(A, RegisterJob(job_id=b"k", node_id=A))
    assert only(JobEnded, bench.die(B)) == [(B, JobEnded(job_id=b"k"))]
    ((_, found),) = only(JobsFound, bench.tell(B, ListJobs(request_id=1)))
    assert [(row.job_id, row.is_running, row.reason) for row in found.jobs] == [
        (b"j", False, ""),
        (b"k", False, "its node died"),
    ]


# ---- another life --------------------------------------------------------------------------------


def test_a_head_that_is_started_again_knows_nodes_names_actors_jobs_and_keys() -> None:
    bench = Bench(A, B)
    bench.detached(A, B, name="n", namespace="s")
    bench.tell(A, RegisterJob(job_id=b"j", node_id=A))
    bench.tell(A, KeyValuePut(request_id=1, namespace="x", key=b"k", value=b"v"))
    bench.tell(A, KeyValuePut(request_id=1, namespace="x", key=b"gone", value=b"v"))
    bench.tell(A, KeyValueDelete(request_id=1, namespace="x", key=b"gone"))
    after = bench.restart()
    statistics = after.head.statistics()
    assert (set(statistics.nodes), statistics.names, statistics.jobs) == ({A, B}, 1, 1)
    assert statistics.keys == 1
    ((_, reply),) = after.tell(B, KeyValueGet(request_id=2, namespace="x", key=b"k"))
    assert reply == HeadReply(request_id=2, done=False, found=b"v")
    assert after.entry().host == B


def test_nodes_have_time_to_come_back_to_a_head_that_was_started_again() -> None:
    bench = Bench(A, B)
    after = bench.restart()
    after.pass_time_with(A, seconds=TIMEOUT)
    assert set(after.head.statistics().nodes) == {A, B}
    after.pass_time_with(A, seconds=2 * TIMEOUT)
    assert after.head.statistics().nodes == (A,)


def test_a_node_that_was_declared_dead_is_told_so_by_the_next_head_too() -> None:
    bench = Bench(A, B)
    bench.die(A)
    after = bench.restart()
    ((_, refusal),) = after.join(B)
    assert isinstance(refusal, Refused)
    assert refusal.is_dead


def test_what_ended_while_the_head_was_away_is_known_from_the_node_that_comes_back() -> None:
    bench = Bench(A, B)
    bench.detached(A, A, name="n")
    after = bench.restart()
    came = ActorEntry(actor_id=TWO, class_name="K", name="m", keeper=A)
    after.tell(
        A,
        RegisterNode(node_id=A, total={"CPU": 1}, actors=[came], dead_actors=[ONE], watched=[ONE]),
    )
    ((_, names),) = after.tell(A, ListNames(request_id=1))
    assert isinstance(names, NamesFound)
    assert names.names == [("", "m")]


def test_what_an_earlier_head_decided_and_had_no_time_to_say_is_said_again() -> None:
    bench = Bench(A, B, C)
    bench.detached(A, B, max_restarts=1)
    bench.register(C, TWO, max_restarts=1)
    bench.tell(C, ActorChanged(actor_id=TWO, stage=ActorStage.ALIVE, host=B))
    bench.die(A, C)
    after = bench.restart()
    lives_on_b = [
        ActorEntry(actor_id=TWO, class_name="K", keeper=C, host=B, stage=ActorStage.ALIVE)
    ]
    said = after.tell(C, RegisterNode(node_id=C, total={"CPU": 1}, actors=lives_on_b, peers=[A, B]))
    assert [m.node_id for _, m in only(NodeDied, said)] == [B]
    assert only(RestartActor, said) == [(C, RestartActor(actor_id=TWO, restarts=1))]
    bench.die(C)
    again = bench.restart()
    said = again.tell(C, RegisterNode(node_id=C, total={"CPU": 1}))
    assert [(n, m.entry.actor_id) for n, m in only(KeepActor, said)] == [(C, ONE)]


def test_rows_are_stored_again_only_when_they_change() -> None:
    bench = Bench(A, B)
    bench.head.take_changes()
    bench.pass_time_with(A, B, seconds=3.0)
    assert bench.head.take_changes() == [], "heartbeats cost no write"


@pytest.mark.parametrize("kind", [KeepActor, ActorAt, RegisterActor, NodesFound])
def test_messages_of_the_directory_travel(kind: type[msgspec.Struct]) -> None:
    entry = ActorEntry(actor_id=ONE, class_name="K", keeper=A, creation=creation_of(ONE))
    message = {
        KeepActor: KeepActor(entry=entry),
        ActorAt: ActorAt(actor_id=ONE, stage=ActorStage.ALIVE, host=A),
        RegisterActor: RegisterActor(request_id=1, entry=entry),
        NodesFound: NodesFound(request_id=1, nodes=[]),
    }[kind]
    encoded = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(encoded, type=kind) == message
