"""Detached actors with large or named arguments outlive the node that made them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from poolray.ids import ActorId, ClientId, ObjectId, WorkerId
from poolray.node.effects import Reply, SealFile, SendHead, SendPeer, Warn, WriteChunk
from poolray.protocol.actors import CreateActor, KillActor, LookUpActor
from poolray.protocol.client import AllocateRange, RangeGranted
from poolray.protocol.directory import ActorFound, FindActor, KeepActor, KillActorEntry
from poolray.protocol.node import AskHandle, FileSealed, HandleLent
from poolray.protocol.values import InArena, InFile, TaskSpec, Value
from poolray.protocol.worker import RunTasks
from tests.unit.cluster_bench import A, B, C, MiniCluster
from tests.unit.node_harness import DRIVER, result_of

OTHER = ClientId(b"other client")
LARGE, SMALL = ObjectId(b"large".ljust(28)), ObjectId(b"small".ljust(28))
PAYLOAD = ObjectId(b"payload".ljust(28))
SIZE = 200_000


@pytest.fixture
def cluster() -> MiniCluster:
    """A has no CPU, B and C have two each."""
    return MiniCluster(0, 2, 2)


def put_large(cluster: MiniCluster, object_id: ObjectId) -> InArena:
    a = cluster.nodes[A]
    a.tell(AllocateRange(request_id=9, object_id=object_id, size_bytes=SIZE), DRIVER)
    granted = a.take(Reply)[-1].message
    assert isinstance(granted, RangeGranted)
    value = InArena(object_id=object_id, offset=granted.offset, size_bytes=SIZE)
    a.put(object_id, value)
    return value


def create(
    cluster: MiniCluster,
    *,
    calls: list[Value] | None = None,
    dependencies: list[ObjectId] | None = None,
    max_restarts: int = -1,
) -> ActorId:
    """A detached actor of A, with the name n; A lets go of its arguments."""
    a = cluster.nodes[A]
    payload: list[Value] = calls or [b"constructor"]
    names = [call.object_id for call in payload if not isinstance(call, bytes)]
    actor_id = ActorId(b"%016d" % 77)
    task = TaskSpec(
        task_id=a._task_id(),
        class_id=a.actor_class(cpus=1, restarts=max_restarts),
        calls=payload,
        dependencies=dependencies or [],
        slots=list(range(len(dependencies or []))),
        borrows=names,
    )
    a.tell(
        CreateActor(
            actor_id=actor_id,
            task=task,
            class_name="A",
            description=b"methods",
            max_restarts=max_restarts,
            request_id=1,
            name="n",
            namespace="s",
            detached=True,
        ),
        DRIVER,
    )
    cluster.carry()
    a.drop(*names, *(dependencies or []))
    return actor_id


def constructs(cluster: MiniCluster, node_id: bytes) -> tuple[WorkerId, list[Value], list[Value]]:
    """The constructor runs on a node: with which payload, and which arguments."""
    node = cluster.nodes[node_id]  # type: ignore[index]
    node.start_all()
    (worker_id,) = [w for w in node.busy() if node.queues[w]]
    packet = node.queues[worker_id][0]
    assert isinstance(packet, RunTasks)
    (task,) = packet.tasks
    node._is_constructor = lambda worker: worker == worker_id  # type: ignore[method-assign]
    cluster.construct(node_id)  # type: ignore[arg-type]
    return worker_id, task.calls, task.arguments


def answer_from(cluster: MiniCluster, node_id: bytes, actor_id: ActorId, worker: WorkerId) -> str:
    """What a call that C makes is answered."""
    c = cluster.nodes[C]
    c.tell(LookUpActor(request_id=5, namespace="s", name="n"), OTHER)
    cluster.carry()
    assert c.answers()[-1].actor_id == actor_id
    call = c.call(actor_id, client=OTHER)
    cluster.carry()
    cluster.run(node_id, worker)  # type: ignore[arg-type]
    return c.error_of(call)


def end(cluster: MiniCluster, actor_id: ActorId) -> None:
    """It is killed, and nothing of it is left."""
    c = cluster.nodes[C]
    c.tell(KillActor(actor_id=actor_id), OTHER)
    cluster.carry()
    assert cluster.head.statistics().actors == 0
    assert not cluster.tables["creations"], "what it was made with is dropped"
    c.lose(c.busy()[0] if c.busy() else next(iter(c.node.state.workers)))
    cluster.carry()


def test_one_that_lived_elsewhere_is_made_again_with_its_large_argument(
    cluster: MiniCluster,
) -> None:
    actor_id = create(cluster, calls=[put_large(cluster, PAYLOAD)])
    constructs(cluster, B)
    cluster.kill(A)
    assert cluster.head.statistics().actors == 1, "it lives on"
    cluster.kill(B)
    worker, calls, _ = constructs(cluster, C)
    assert [call.size_bytes for call in calls if isinstance(call, InArena)] == [SIZE]
    written = cluster.nodes[C].take(WriteChunk)
    assert [bytes(chunk.data) for chunk in written] == [b"D" * SIZE]
    assert answer_from(cluster, C, actor_id, worker) == "result"
    end(cluster, actor_id)


def test_refs_among_its_arguments_have_their_values_where_it_is_made_again(
    cluster: MiniCluster,
) -> None:
    put_large(cluster, LARGE)
    cluster.nodes[A].put(SMALL, b"small value")
    actor_id = create(cluster, dependencies=[SMALL, LARGE])
    constructs(cluster, B)
    cluster.kill(A)
    cluster.kill(B)
    worker, _, arguments = constructs(cluster, C)
    assert arguments[0] == b"small value"
    assert isinstance(arguments[1], InArena)
    assert (arguments[1].node_id, arguments[1].size_bytes) == (b"", SIZE)
    assert answer_from(cluster, C, actor_id, worker) == "result"
    end(cluster, actor_id)


def test_a_value_that_comes_late_is_given_to_the_head_when_the_actor_lives(
    cluster: MiniCluster,
) -> None:
    a = cluster.nodes[A]
    task = a.submit(a.task_class("late", cpus=2))
    cluster.refresh()
    cluster.carry()
    actor_id = create(cluster, dependencies=[result_of(task)])
    assert "creations" not in cluster.tables
    busy = next(n for n in (B, C) if cluster.nodes[n].start_all() or cluster.nodes[n].busy())
    node = cluster.nodes[busy]
    (worker_id,) = node.busy()
    node.finish(worker_id, node.read(worker_id), [b"late value"])
    cluster.refresh()
    host = next(n for n in (B, C) if cluster.nodes[n].start_all() or cluster.nodes[n].busy())
    constructs(cluster, host)
    assert list(cluster.tables["creations"]) == [actor_id]


def test_the_head_remembers_what_it_was_made_with_after_a_kill(cluster: MiniCluster) -> None:
    actor_id = create(cluster, calls=[put_large(cluster, PAYLOAD)])
    constructs(cluster, B)
    cluster.restart_head()
    cluster.kill(A)
    cluster.kill(B)
    worker, calls, _ = constructs(cluster, C)
    assert isinstance(calls[0], InArena)
    assert answer_from(cluster, C, actor_id, worker) == "result"


def test_a_head_that_has_forgotten_asks_what_it_is_made_with(cluster: MiniCluster) -> None:
    actor_id = create(cluster, calls=[put_large(cluster, PAYLOAD)])
    constructs(cluster, B)
    cluster.tables["creations"].clear()
    cluster.restart_head()
    assert list(cluster.tables["creations"]) == [actor_id]


def test_one_that_is_too_large_for_the_head_lives_on_but_is_not_made_again() -> None:
    cluster = MiniCluster(0, 2, 2, detached_actor_bytes_max=1000)
    actor_id = create(cluster, calls=[put_large(cluster, PAYLOAD)])
    (warning,) = cluster.nodes[A].take(Warn)
    assert "detached_actor_bytes_max" in warning.text
    worker, _, _ = constructs(cluster, B)
    cluster.kill(A)
    assert answer_from(cluster, B, actor_id, worker) == "result"
    cluster.nodes[B].lose(worker)
    cluster.carry()
    assert cluster.head.statistics().actors == 0


def test_one_that_died_as_its_keeper_did_and_cannot_be_made_again_is_dead() -> None:
    cluster = MiniCluster(0, 2, 2, detached_actor_bytes_max=1000)
    create(cluster, calls=[put_large(cluster, PAYLOAD)])
    worker, _, _ = constructs(cluster, B)
    cluster.nodes[B].lose(worker)
    cluster.nodes[B].effects.clear()  # what B says of that never arrives at A
    cluster.kill(A)
    assert cluster.head.statistics().actors == 0


def test_a_kill_that_comes_while_its_parts_find_room_ends_it_then(cluster: MiniCluster) -> None:
    c = cluster.nodes[C]
    filler = ObjectId(b"filler".ljust(28))
    actor_id = create(cluster, calls=[put_large(cluster, PAYLOAD)])
    constructs(cluster, B)
    cluster.kill(A)
    c.tell(AllocateRange(request_id=3, object_id=filler, size_bytes=1 << 20), DRIVER)
    cluster.kill(B)
    (seal,) = c.take(SealFile)
    assert seal.size_bytes == SIZE, "memory has no room: it goes to a file"
    assert c.node.statistics().actors == 0
    cluster._tell_head(C, KillActorEntry(actor_id=actor_id))
    c.tell(LookUpActor(request_id=5, namespace="s", name="n"), OTHER)
    cluster.carry()
    assert c.answers() == [], "whoever looks it up waits"
    assert cluster.head.statistics().actors == 1, "it is killed once it is there"
    place = InFile(object_id=PAYLOAD, path="/file", size_bytes=SIZE)
    c.tell(FileSealed(object_id=PAYLOAD, file_number=seal.file_number, place=place))
    cluster.carry()
    assert c.answers()[0].actor_id == actor_id
    assert cluster.head.statistics().actors == c.node.statistics().actors == 0


def test_a_keeper_that_has_not_heard_that_it_is_one_asks_the_head_before_it_says_no(
    cluster: MiniCluster,
) -> None:
    c = cluster.nodes[C]
    actor_id = create(cluster)
    entry = replace(
        cluster.head._actors._entries[actor_id],
        keeper=C,
        creation=cluster.head._actors._creations[actor_id],
    )
    c.effects.clear()
    c.tell(AskHandle(actor_id=actor_id, name="n", namespace="s"), B)
    (question,) = [e.message for e in c.take(SendHead) if isinstance(e.message, FindActor)]
    assert c.take(SendPeer) == []
    c.tell(KeepActor(entry=entry))
    c.tell(ActorFound(request_id=question.request_id, entry=replace(entry, creation=None)))
    answers = [e.message for e in c.take(SendPeer) if isinstance(e.message, HandleLent)]
    assert [len(answer.lent) for answer in answers] == [1]


def test_who_looks_one_up_as_its_keeper_dies_finds_it_at_the_next_one(
    cluster: MiniCluster,
) -> None:
    actor_id = create(cluster)
    worker = cluster.construct(B)
    c, a = cluster.nodes[C], cluster.nodes.pop(A)  # it is silent, and nobody knows why
    c.tell(LookUpActor(request_id=5, namespace="s", name="n"), OTHER)
    cluster.carry()
    assert c.answers() == []
    cluster.nodes[A] = a
    cluster.kill(A)
    assert [answer.actor_id for answer in c.answers()] == [actor_id]
    assert answer_from(cluster, B, actor_id, worker) == "result"
