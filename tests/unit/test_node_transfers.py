"""Objects between nodes: lent, pulled by chunks, from several sources, made again, given back."""

from __future__ import annotations

import pytest

from poolray.ids import ClientId, NodeId, ObjectId, TaskId
from poolray.node.effects import (
    DeleteFile,
    ExpectChunk,
    ForgetChunks,
    SealFile,
    SendChunk,
    SendPeer,
    SpillObjects,
    WriteChunk,
)
from poolray.protocol.client import AllocateRange, PutObject, UnpinObjects
from poolray.protocol.node import (
    AskSource,
    ChunkArrived,
    ChunkData,
    ChunksLost,
    ClusterView,
    FileSealed,
    NodeDied,
    NodeView,
    PeerReleases,
    PullChunk,
    PullEnded,
    SourceDone,
    UseSource,
)
from poolray.protocol.values import InArena, InFile, Outcome
from tests.unit.cluster_bench import CPU, A, B, C, D, MiniCluster
from tests.unit.node_harness import DRIVER, Bench, result_of
from tests.unit.test_node_spilling import fail, write

LARGE = 200_000
CHUNK = 50_000


def put_large(bench: Bench, object_id: ObjectId, size: int = LARGE) -> None:
    """The driver of a node stores a large value."""
    bench.tell(AllocateRange(request_id=99, object_id=object_id, size_bytes=size), DRIVER)
    offset = bench.node.state.clients[DRIVER].ranges[object_id]
    bench.put(object_id, InArena(object_id=object_id, offset=offset, size_bytes=size))


def show_room(cluster: MiniCluster, at: NodeId) -> None:
    """A sees that one node has room, and no other."""
    views = [
        NodeView(node_id=n, total={}, available={"CPU": 2 * CPU * (n == at)}, queued_tasks=0)
        for n in cluster.nodes
        if n != A
    ]
    cluster.nodes[A].tell(ClusterView(nodes=views))


def lend(cluster: MiniCluster, object_id: ObjectId, to: NodeId) -> TaskId:
    """A gives a node a task with a ref inside its arguments, which the node's driver keeps."""
    a, node = cluster.nodes[A], cluster.nodes[to]
    show_room(cluster, to)
    kind = a.task_class("keeps", cpus=2)
    task = a.submit(kind, borrows=[object_id])
    cluster.carry()
    node.start_all()
    (worker_id,) = node.busy()
    packet = node.read(worker_id)
    node.hold(object_id)
    node.finish(worker_id, packet)
    cluster.carry()
    a.drop(result_of(task))
    cluster.carry()
    return task


VALUE = ObjectId(b"v" * 28)


def peer_messages(bench: Bench, kind: type, to: NodeId) -> list[object]:
    taken = [e for e in bench.effects if isinstance(e, SendPeer) and e.node_id == to]
    return [e.message for e in taken if isinstance(e.message, kind)]


def asked_of(bench: Bench, source: NodeId) -> list[PullChunk]:
    """Chunks that a node has asked another one for."""
    return [m for m in peer_messages(bench, PullChunk, source) if isinstance(m, PullChunk)]


def answer(pull: PullChunk) -> ChunkData:
    """The chunk that was asked for."""
    data = b"x" * pull.size_bytes
    return ChunkData(object_id=pull.object_id, offset=pull.offset, data=data, number=pull.number)


# ---- refs ----------------------------------------------------------------------------------------


def test_a_ref_inside_an_argument_can_be_read_and_kept_on_another_node() -> None:
    cluster = MiniCluster(0, 2)
    a, b = cluster.nodes[A], cluster.nodes[B]
    a.put(VALUE, b"small")
    lend(cluster, VALUE, B)
    a.drop(VALUE)
    cluster.carry()
    assert a.node.statistics().objects == 1, "B counts on it"
    request = b.get(VALUE)
    cluster.carry()
    assert b.values()[request].values == [b"small"]
    b.drop(VALUE)
    cluster.carry()
    for node in (a, b):
        node.assert_empty()


def test_a_ref_to_what_is_not_there_yet_is_answered_when_it_is() -> None:
    cluster = MiniCluster(0, 2)
    a, b = cluster.nodes[A], cluster.nodes[B]
    pending = a.submit(a.task_class("elsewhere", more={"GPU": 10_000}))
    lend(cluster, result_of(pending), B)
    request = b.get(result_of(pending))
    cluster.carry()
    assert b.values() == {}
    a.cancel(pending)
    cluster.carry()
    assert b.values()[request].errors == [0]


def test_what_a_value_refers_to_is_lent_with_it() -> None:
    cluster = MiniCluster(0, 2)
    a, b = cluster.nodes[A], cluster.nodes[B]
    inner = ObjectId(b"i" * 28)
    a.put(inner, b"inner")
    a.tell(PutObject(object_id=VALUE, value=b"outer", contained=[inner]), DRIVER)
    a.drop(inner)
    lend(cluster, VALUE, B)
    a.drop(VALUE)
    cluster.carry()
    b.hold(inner)
    b.drop(VALUE)
    cluster.carry()
    request = b.get(inner)
    cluster.carry()
    assert b.values()[request].values == [b"inner"]
    b.drop(inner)
    cluster.carry()
    for node in (a, b):
        node.assert_empty()


def test_a_borrowed_object_is_lost_with_its_owner_unless_it_is_here() -> None:
    cluster = MiniCluster(0, 2)
    b = cluster.nodes[B]
    other = ObjectId(b"o" * 28)
    for object_id in (VALUE, other):
        put_large(cluster.nodes[A], object_id)
        lend(cluster, object_id, B)
    b.get(VALUE)
    cluster.carry()
    cluster.kill(A)
    request = b.get(VALUE)
    assert b.values()[request].errors == []
    request = b.get(other)
    reply = b.values()[request]
    assert reply.errors == [0]
    assert bytes(reply.values[0]).startswith(b"OwnerDiedError")  # type: ignore[arg-type]


# ---- chunks --------------------------------------------------------------------------------------


def test_no_more_chunks_are_under_way_than_the_window_has() -> None:
    cluster = MiniCluster(0, 2, transfer_chunk_bytes=CHUNK, transfer_window_chunks=2)
    b = cluster.nodes[B]
    put_large(cluster.nodes[A], VALUE)
    lend(cluster, VALUE, B)
    b.get(VALUE)
    b.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    asked = asked_of(b, A)
    assert [(pull.offset, pull.size_bytes) for pull in asked] == [(0, CHUNK), (CHUNK, CHUNK)]
    b.tell(answer(asked[1]), A)
    assert len(peer_messages(b, PullChunk, A)) == 3
    b.tell(answer(asked[1]), A)
    b.tell(ChunkData(object_id=VALUE, offset=0, data=b"too short", number=asked[0].number), A)
    b.tell(answer(asked[0]), C)
    assert len(peer_messages(b, PullChunk, A)) == 3, "neither twice, nor by half, nor of others"
    cluster.carry()
    written = [e.offset for e in b.take(WriteChunk)]
    assert sorted(written) == [written[0] - CHUNK + i * CHUNK for i in range(4)]


def test_a_source_keeps_in_memory_what_it_sends() -> None:
    cluster = MiniCluster(0, 2, transfer_chunk_bytes=CHUNK)
    a = cluster.nodes[A]
    put_large(a, VALUE)
    lend(cluster, VALUE, B)
    a.tell(PullChunk(object_id=VALUE, offset=0, size_bytes=CHUNK), B)
    assert a.node.statistics().store.pinned_objects == 1
    (sent,) = a.take(SendChunk)
    assert (sent.offset, sent.size_bytes) == (0, CHUNK)
    a.tell(PullEnded(object_id=VALUE), B)
    assert a.node.statistics().store.pinned_objects == 0
    a.tell(PullChunk(object_id=VALUE, offset=0, size_bytes=CHUNK), B)
    a.tell(NodeDied(node_id=B))
    assert a.node.statistics().store.pinned_objects == 0


def test_what_was_spilled_is_served_from_its_file() -> None:
    cluster = MiniCluster(0, 2, transfer_chunk_bytes=CHUNK)
    a = cluster.nodes[A]
    place = InFile(object_id=VALUE, path="/spilled/1", size_bytes=LARGE)
    a.put(VALUE, place)
    lend(cluster, VALUE, B)
    a.tell(PullChunk(object_id=VALUE, offset=CHUNK, size_bytes=CHUNK), B)
    (sent,) = a.take(SendChunk)
    assert (sent.place, sent.offset) == (place, CHUNK)


def test_chunks_outside_of_a_value_are_missing() -> None:
    cluster = MiniCluster(0, 2)
    a = cluster.nodes[A]
    put_large(a, VALUE)
    for offset, size in ((-1, 10), (0, 0), (LARGE - 5, 10), (0, LARGE + 1)):
        a.tell(PullChunk(object_id=VALUE, offset=offset, size_bytes=size), B)
        (reply,) = peer_messages(a, ChunkData, B)
        assert isinstance(reply, ChunkData)
        assert reply.missing
        a.take(SendPeer)
    a.tell(PullChunk(object_id=ObjectId(b"?" * 28), offset=0, size_bytes=1), B)
    assert peer_messages(a, ChunkData, B)


def test_pulls_wait_for_each_other_when_they_are_large_together() -> None:
    cluster = MiniCluster(0, 2, transfer_chunk_bytes=1 << 20)
    a, b = cluster.nodes[A], cluster.nodes[B]
    names = [ObjectId(letter * 28) for letter in (b"x", b"y", b"z")]
    for name in names:
        put_large(a, name)
        lend(cluster, name, B)
    for name in names:
        b.get(name)
    assert len(peer_messages(b, PullChunk, A)) == 1, "a quarter of the arena"
    cluster.carry()
    assert b.node.statistics().arena.used_bytes >= 3 * LARGE
    assert len(b.values()) == 3


def test_without_room_in_memory_a_value_goes_to_a_file() -> None:
    cluster = MiniCluster(0, 2, arena_bytes=1 << 17)
    a, b = cluster.nodes[A], cluster.nodes[B]
    place = InFile(object_id=VALUE, path="/spilled/1", size_bytes=LARGE)
    a.put(VALUE, place)
    lend(cluster, VALUE, B)
    request = b.get(VALUE)
    cluster.carry()
    (write,) = b.take(WriteChunk)
    (seal,) = b.take(SealFile)
    assert write.file_number == seal.file_number > 0
    sealed = InFile(object_id=VALUE, path="/own/1", size_bytes=LARGE)
    b.tell(FileSealed(object_id=VALUE, file_number=seal.file_number, place=sealed))
    assert b.values()[request].values == [sealed]


def written_twice() -> tuple[MiniCluster, list[SpillObjects]]:
    """B was lent a value, gave it back while it was written to disk, and was lent it again: it has
    come to another range, and that is being written as well.
    """
    cluster = MiniCluster(0, 2, object_spilling_threshold=0.1)
    a, b = cluster.nodes[A], cluster.nodes[B]
    a.put(VALUE, InFile(object_id=VALUE, path="/spilled/a", size_bytes=LARGE))
    batches = []
    for _ in range(2):
        b.drop(VALUE)
        lend(cluster, VALUE, B)
        b.get(VALUE)
        cluster.carry()
        assert b.values()
        b.tell(UnpinObjects(object_ids=[VALUE]), DRIVER)
        batches += b.take(SpillObjects)
    first, second = (batch.places[0] for batch in batches)
    assert first.object_id == second.object_id == VALUE
    assert first.offset != second.offset, "a thread still reads the first range"
    return cluster, batches


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_value_that_is_lent_again_while_it_is_written_leaves_nothing(
    order: tuple[int, int],
) -> None:
    cluster, batches = written_twice()
    a, b = cluster.nodes[A], cluster.nodes[B]
    used = b.node.statistics().arena.used_bytes
    paths = {index: write(b, batches[index]) for index in order[:1]}
    assert b.node.statistics().arena.used_bytes == used // 2, "each batch frees its own range"
    paths |= {index: write(b, batches[index]) for index in order[1:]}
    assert b.node.statistics().arena.used_bytes == 0
    assert [effect.path for effect in b.take(DeleteFile)] == [paths[0]]
    assert b.node.state.objects[VALUE].value == InFile(
        object_id=VALUE, path=paths[1], size_bytes=LARGE
    )
    b.drop(VALUE)
    a.drop(VALUE)
    cluster.carry()
    assert [effect.path for effect in b.take(DeleteFile)] == [paths[1]]
    for node in (a, b):
        node.assert_empty()


def test_a_value_that_is_lent_again_stays_when_what_was_begun_before_is_not_written() -> None:
    cluster, batches = written_twice()
    b = cluster.nodes[B]
    used = b.node.statistics().arena.used_bytes
    fail(b, batches[0])
    assert b.node.statistics().arena.used_bytes == used // 2
    assert b.node.state.objects[VALUE].value == batches[1].places[0]
    fail(b, batches[1])
    assert b.node.statistics().arena.used_bytes == used // 2, "it stays in memory"
    b.drop(VALUE)
    b.assert_empty()


# ---- several sources -----------------------------------------------------------------------------


def broadcast() -> MiniCluster:
    """A value of A's that B, C and D have refs to."""
    cluster = MiniCluster(0, 2, 2, 2, transfer_chunk_bytes=CHUNK, transfer_fanout=1)
    put_large(cluster.nodes[A], VALUE)
    for node_id in (B, C, D):
        lend(cluster, VALUE, node_id)
    return cluster


def sources(bench: Bench) -> list[tuple[NodeId, NodeId]]:
    return [
        (e.node_id, e.message.node_id)
        for e in bench.take(SendPeer)
        if isinstance(e.message, UseSource)
    ]


def test_who_is_still_pulling_serves_the_next() -> None:
    cluster = broadcast()
    a = cluster.nodes[A]
    for node_id in (B, C, D):
        a.tell(AskSource(object_id=VALUE), node_id)
    assert sources(a) == [(B, A), (C, B), (D, C)], "each passes on what it gets"


def test_no_source_serves_more_than_the_fanout() -> None:
    cluster = broadcast()
    a = cluster.nodes[A]
    a.tell(AskSource(object_id=VALUE), B)
    a.tell(SourceDone(object_id=VALUE, node_id=A, is_copied=True), B)
    for node_id in (C, D):
        a.tell(AskSource(object_id=VALUE), node_id)
    assert sources(a) == [(B, A), (C, A), (D, C)], "A and B both serve C"


def test_nobody_is_told_to_wait_for_himself() -> None:
    cluster = broadcast()
    a = cluster.nodes[A]
    for node_id in (B, C, D):
        a.tell(AskSource(object_id=VALUE), node_id)
    assert sources(a) == [(B, A), (C, B), (D, C)]
    a.tell(AskSource(object_id=VALUE), B)  # its pull was given up; C and D depend on the next one
    assert sources(a) == [(B, A)]


def test_parts_are_passed_on_as_they_come() -> None:
    cluster = broadcast()
    b = cluster.nodes[B]
    request = b.get(VALUE)
    b.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    asked = asked_of(b, A)
    b.tell(PullChunk(object_id=VALUE, offset=CHUNK, size_bytes=CHUNK, number=7), C)
    b.tell(ChunkArrived(number=asked[0].number))
    assert b.take(SendChunk) == [], "that is not the part that C wants"
    b.tell(ChunkArrived(number=asked[1].number))
    (sent,) = b.take(SendChunk)
    assert (sent.node_id, sent.number, sent.offset) == (C, 7, CHUNK)
    b.tell(PullChunk(object_id=VALUE, offset=0, size_bytes=CHUNK, number=8), C)
    (sent,) = b.take(SendChunk)
    assert sent.number == 8, "what is here goes at once"
    for pull in asked[2:]:
        b.tell(ChunkArrived(number=pull.number))
    assert b.values()[request].errors == []


def test_what_waits_for_a_pull_that_is_given_up_is_missing() -> None:
    cluster = broadcast()
    b = cluster.nodes[B]
    b.get(VALUE)
    b.tell(PullChunk(object_id=VALUE, offset=0, size_bytes=CHUNK, number=7), C)
    assert peer_messages(b, ChunkData, C) == []
    b.drop(VALUE)
    (reply,) = peer_messages(b, ChunkData, C)
    assert isinstance(reply, ChunkData)
    assert (reply.missing, reply.number) == (True, 7)


def test_memory_that_a_peer_reads_from_is_not_used_again_before_it_is_done() -> None:
    cluster = broadcast()
    b = cluster.nodes[B]
    b.get(VALUE)
    b.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    b.tell(ChunkArrived(number=asked_of(b, A)[0].number))
    b.tell(PullChunk(object_id=VALUE, offset=0, size_bytes=CHUNK, number=7), C)
    assert b.take(SendChunk)
    b.drop(VALUE)
    used = b.node.statistics().arena.used_bytes
    assert used >= LARGE, "a thread may be sending it this moment"
    b.tell(PullEnded(object_id=VALUE), C)
    assert b.node.statistics().arena.used_bytes <= used - LARGE


def test_nothing_is_written_to_a_range_that_was_given_back() -> None:
    cluster = broadcast()
    b = cluster.nodes[B]
    b.get(VALUE)
    b.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    expected = {effect.number for effect in b.take(ExpectChunk)}
    assert len(expected) == LARGE // CHUNK
    b.drop(VALUE)
    (forgotten,) = b.take(ForgetChunks)
    assert set(forgotten.numbers) == expected


def test_chunks_that_are_lost_with_their_connection_are_asked_for_again() -> None:
    cluster = broadcast()
    b = cluster.nodes[B]
    request = b.get(VALUE)
    b.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    asked = asked_of(b, A)
    b.take(SendPeer)
    b.tell(ChunkArrived(number=asked[0].number))
    b.tell(ChunksLost(numbers=[pull.number for pull in asked[1:]]))
    again = asked_of(b, A)
    assert sorted(p.offset for p in again) == [p.offset for p in asked[1:]]
    assert not {p.number for p in again} & {p.number for p in asked}
    b.tell(ChunkArrived(number=asked[1].number))  # (said before it was lost: it is not counted)
    for pull in again:
        assert b.values() == {}
        b.tell(ChunkArrived(number=pull.number))
    assert b.values()[request].errors == []


def two_sources() -> tuple[MiniCluster, dict[NodeId, list[PullChunk]]]:
    """D pulls a value of A's that B has too; and what it has asked each for."""
    cluster = broadcast()
    d = cluster.nodes[D]
    d.get(VALUE)
    d.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE, more=[B]), A)
    return cluster, {source: asked_of(d, source) for source in (A, B)}


def test_who_comes_when_others_have_it_is_told_of_several() -> None:
    cluster = broadcast()
    a = cluster.nodes[A]
    a.tell(AskSource(object_id=VALUE), B)
    a.tell(SourceDone(object_id=VALUE, node_id=A, is_copied=True), B)
    a.take(SendPeer)
    a.tell(AskSource(object_id=VALUE), D)
    (use,) = peer_messages(a, UseSource, D)
    assert isinstance(use, UseSource)
    assert (use.node_id, use.more) == (A, [B])


def test_parts_come_from_several_sources() -> None:
    _, asked = two_sources()
    assert [len(pulls) for pulls in asked.values()] == [2, 2]
    offsets = [pull.offset for pulls in asked.values() for pull in pulls]
    assert sorted(offsets) == list(range(0, LARGE, CHUNK))


def test_of_several_sources_one_may_die() -> None:
    cluster, asked = two_sources()
    d = cluster.nodes[D]
    d.take(SendPeer)
    d.tell(NodeDied(node_id=B))
    again = asked_of(d, A)
    assert sorted(p.offset for p in again) == sorted(p.offset for p in asked[B])
    for pull in (*asked[A], *again):
        d.tell(ChunkArrived(number=pull.number))
    (done,) = peer_messages(d, SourceDone, A)
    assert isinstance(done, SourceDone)
    assert done.is_copied


def test_of_several_sources_one_may_have_lost_it() -> None:
    cluster, asked = two_sources()
    d = cluster.nodes[D]
    d.take(SendPeer)
    first = asked[B][0]
    missing = ChunkData(object_id=VALUE, offset=first.offset, missing=True, number=first.number)
    d.tell(missing, B)
    assert len(asked_of(d, A)) == 2
    assert peer_messages(d, PullEnded, B), "it need not keep anything for us"


def test_everybody_gets_it_in_the_end() -> None:
    cluster = broadcast()
    requests = {n: cluster.nodes[n].get(VALUE) for n in (B, C, D)}
    cluster.carry()
    for node_id, request in requests.items():
        (value,) = cluster.nodes[node_id].values()[request].values
        assert isinstance(value, InArena)
        assert not value.node_id


def test_a_source_that_dies_is_replaced() -> None:
    cluster = broadcast()
    c = cluster.nodes[C]
    c.get(VALUE)
    c.tell(UseSource(object_id=VALUE, node_id=B, name=VALUE), A)
    assert peer_messages(c, PullChunk, B)
    c.take(SendPeer)
    c.tell(NodeDied(node_id=B))
    assert peer_messages(c, AskSource, A)


def test_a_pull_whose_only_source_dies_begins_anew_and_mixes_no_two_makings() -> None:
    cluster = broadcast()
    c = cluster.nodes[C]
    request = c.get(VALUE)
    c.tell(UseSource(object_id=VALUE, node_id=B, name=VALUE), A)
    asked = asked_of(c, B)
    c.tell(ChunkArrived(number=asked[0].number))
    c.take(SendPeer)
    c.tell(NodeDied(node_id=B))
    (forgotten,) = c.take(ForgetChunks)
    assert forgotten.numbers == [pull.number for pull in asked[1:]]
    c.tell(UseSource(object_id=VALUE, node_id=A, name=VALUE), A)
    again = asked_of(c, A)
    # (A value that was made again may have other bytes: what came of the first is not used.)
    assert sorted(pull.offset for pull in again) == list(range(0, LARGE, CHUNK))
    c.tell(ChunkArrived(number=asked[1].number))
    for pull in again:
        assert c.values() == {}
        c.tell(ChunkArrived(number=pull.number))
    assert c.values()[request].errors == []


def make_large(cluster: MiniCluster, node_id: NodeId, name: ObjectId) -> bool:
    """A worker of a node makes a large value, if it has been told to."""
    bench = cluster.nodes[node_id]
    bench.start_all()
    for worker_id in bench.busy():
        packet = bench.read(worker_id)
        bench.say(worker_id, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
        offset = bench.node.state.clients[ClientId(worker_id)].ranges[name]
        place = InArena(object_id=name, offset=offset, size_bytes=LARGE)
        bench.finish(worker_id, packet, [Outcome(values=[place])])
        cluster.carry()
        return True
    return False


def test_a_pull_whose_source_dies_ends_well_when_the_value_was_made_again() -> None:
    cluster = MiniCluster(0, 2, 2, 2, transfer_chunk_bytes=CHUNK)
    a, c = cluster.nodes[A], cluster.nodes[C]
    show_room(cluster, B)
    task = a.submit(a.task_class(max_retries=1))
    name = result_of(task)
    cluster.carry()
    assert make_large(cluster, B, name)
    lend(cluster, name, C)
    request = c.get(name)
    c.tell(UseSource(object_id=name, node_id=B, name=name), A)
    first = asked_of(c, B)
    c.tell(ChunkArrived(number=first[0].number))
    show_room(cluster, D)
    cluster.kill(B)  # the only one that has it, while it comes
    cluster.carry()
    assert c.values() == {}
    assert make_large(cluster, D, name)
    (value,) = c.values()[request].values
    assert isinstance(value, InArena)
    assert not value.node_id


def test_a_copy_elsewhere_saves_making_it_again() -> None:
    cluster = MiniCluster(0, 2, 2, transfer_chunk_bytes=CHUNK)
    a, b = cluster.nodes[A], cluster.nodes[B]
    task = a.submit(a.task_class(max_retries=1))
    cluster.carry()
    b.start_all()
    (worker_id,) = b.busy()
    packet = b.read(worker_id)
    name = result_of(task)
    b.say(worker_id, AllocateRange(request_id=1, object_id=name, size_bytes=LARGE))
    offset = b.node.state.clients[ClientId(worker_id)].ranges[name]
    place = InArena(object_id=name, offset=offset, size_bytes=LARGE)
    b.finish(worker_id, packet, [Outcome(values=[place])])
    cluster.carry()
    lend(cluster, name, C)
    cluster.nodes[C].get(name)
    cluster.carry()
    cluster.kill(B)
    assert a.state(task) is None, "it does not run again"
    request = a.get(name)
    cluster.carry()
    (value,) = a.values()[request].values
    assert isinstance(value, InArena)
    assert not value.node_id


def test_what_is_lent_twice_is_given_back_twice() -> None:
    cluster = MiniCluster(0, 2)
    a, b = cluster.nodes[A], cluster.nodes[B]
    a.put(VALUE, b"small")
    lend(cluster, VALUE, B)
    lend(cluster, VALUE, B)
    a.drop(VALUE)
    b.drop(VALUE)
    returned = [e.message for e in b.effects if isinstance(e, SendPeer)]
    assert returned == [PeerReleases(object_ids=[VALUE])], "the second was given back at once"
    cluster.carry()
    for node in (a, b):
        node.assert_empty()
