"""The head: membership, views, functions, jobs, names, keys."""

from __future__ import annotations

import pytest

from poolray.config import Config
from poolray.head.head import Head, HeadInput, SendNode
from poolray.head.key_value import KeyValueStore
from poolray.ids import FunctionId, NodeId
from poolray.protocol.node import (
    ClusterView,
    FinishJob,
    FunctionFound,
    HeadGetFunction,
    HeadMessage,
    HeadPutFunction,
    HeadReply,
    Heartbeat,
    KeyValueDelete,
    KeyValueGet,
    KeyValueList,
    KeyValuePut,
    NodeDied,
    Refused,
    RegisterJob,
    RegisterNode,
    Tick,
)
from poolray.protocol.values import FunctionDefinition

A, B, C = (NodeId(letter * 28) for letter in (b"A", b"B", b"C"))
CONFIG = Config()
TIMEOUT = CONFIG.heartbeat_timeout_s


class HeadBench:
    """A head and a clock."""

    def __init__(self, *members: NodeId) -> None:
        self.head = Head(CONFIG)
        self.now = 100.0
        for node_id in members:
            self.join(node_id)
        self.now += 2 * CONFIG.heartbeat_interval_s
        self.tick()
        self.now += CONFIG.heartbeat_interval_s

    def tell(self, sender: bytes, message: HeadInput) -> list[tuple[NodeId, HeadMessage]]:
        effects: list[SendNode] = self.head.handle(sender, message, self.now)
        self.head.check_invariants()
        return [(effect.node_id, effect.message) for effect in effects]

    def join(self, node_id: NodeId, version: int = 1) -> list[tuple[NodeId, HeadMessage]]:
        message = RegisterNode(node_id=node_id, total={"CPU": 1}, protocol_version=version)
        return self.tell(node_id, message)

    def tick(self) -> list[tuple[NodeId, HeadMessage]]:
        return self.tell(b"", Tick())

    def beat(self, node_id: NodeId, free: int = 1) -> list[tuple[NodeId, HeadMessage]]:
        message = Heartbeat(node_id=node_id, available={"CPU": free}, queued_tasks=0)
        return self.tell(node_id, message)

    def pass_time_with(self, *living: NodeId, seconds: float) -> list[tuple[NodeId, HeadMessage]]:
        """Time passes while these send heartbeats."""
        said = []
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + CONFIG.heartbeat_interval_s)
            for node_id in living:
                said += self.beat(node_id)
            said += self.tick()
        return said


def deaths(said: list[tuple[NodeId, HeadMessage]]) -> list[tuple[NodeId, NodeId]]:
    """Who was told of whose death."""
    return [(node_id, m.node_id) for node_id, m in said if isinstance(m, NodeDied)]


def test_a_newcomer_is_told_of_all_members_and_they_of_it() -> None:
    bench = HeadBench(A)
    said = bench.join(B)
    newcomer = [m for node_id, m in said if node_id == B]
    assert isinstance(newcomer[0], ClusterView)
    assert {view.node_id for view in newcomer[0].nodes} == {A, B}
    (told,) = (m for node_id, m in said if node_id == A)
    assert isinstance(told, ClusterView)
    assert [view.node_id for view in told.nodes] == [B]


def test_only_changes_are_sent_and_not_more_often_than_heartbeats() -> None:
    bench = HeadBench(A, B)
    assert bench.beat(A, free=1) == []
    said = bench.beat(A, free=0)
    assert {node_id for node_id, _ in said} == {A, B}
    assert bench.beat(B, free=0) == [], "too soon"
    deadline = bench.head.next_deadline()
    assert deadline is not None
    assert deadline <= bench.now + CONFIG.heartbeat_interval_s
    bench.now = deadline
    (view, _) = (m for _, m in bench.tick())
    assert isinstance(view, ClusterView)
    assert [v.node_id for v in view.nodes] == [B]


def test_silent_node_is_declared_dead_after_its_timeout() -> None:
    bench = HeadBench(A, B)
    said = bench.pass_time_with(A, seconds=TIMEOUT + 1.0)
    assert deaths(said) == [(A, B)]
    assert bench.head.statistics().dead_nodes == (B,)
    assert bench.head.statistics().nodes == (A,)


def test_a_dead_node_that_speaks_again_is_told_so_and_stays_dead() -> None:
    bench = HeadBench(A, B)
    bench.pass_time_with(A, seconds=TIMEOUT + 1.0)
    for said in (bench.beat(B), bench.join(B)):
        ((node_id, refusal),) = said
        assert node_id == B
        assert isinstance(refusal, Refused)
        assert "declared dead" in refusal.reason
        assert refusal.is_dead
    assert bench.head.statistics().nodes == (A,)


def test_all_hear_at_once_of_the_first_few_nodes_that_join_and_of_many_together() -> None:
    bench = HeadBench(A)
    told = 0
    for number in range(20):
        joined = NodeId(bytes([number]) * 28)
        effects = bench.join(joined)
        views = [message for node_id, message in effects if node_id == A]
        told += len(views)
        if number < 5:
            (view,) = views
            assert isinstance(view, ClusterView)
            assert [node.node_id for node in view.nodes] == [joined]
    assert told < 12
    bench.now += CONFIG.heartbeat_interval_s
    (late,) = [message for node_id, message in bench.tick() if node_id == A]
    assert isinstance(late, ClusterView)
    assert len(late.nodes) + told == 20


def test_a_stranger_has_to_register_first() -> None:
    bench = HeadBench()
    ((_, refusal),) = bench.beat(C)
    assert isinstance(refusal, Refused)
    assert "register" in refusal.reason


def test_another_protocol_version_is_refused_in_words() -> None:
    bench = HeadBench()
    ((_, refusal),) = bench.join(A, version=99)
    assert isinstance(refusal, Refused)
    assert "99" in refusal.reason
    assert bench.head.statistics().nodes == ()


def test_any_word_of_a_member_counts_as_a_sign_of_life() -> None:
    bench = HeadBench(A)
    for _ in range(20):
        bench.now += TIMEOUT / 2
        bench.tell(A, KeyValueGet(request_id=1, namespace="", key=b"k"))
        bench.tick()
    assert bench.head.statistics().nodes == (A,)


def test_after_a_standstill_of_the_head_itself_nodes_are_heard_first() -> None:
    bench = HeadBench(A, B)
    bench.now += 10 * TIMEOUT
    assert not any(isinstance(m, NodeDied) for _, m in bench.tick())
    bench.beat(A)
    said = bench.pass_time_with(A, seconds=2 * CONFIG.heartbeat_interval_s)
    assert deaths(said) == [(A, B)]


def test_functions_live_as_long_as_a_member_that_put_them() -> None:
    bench = HeadBench(A, B, C)
    definition = FunctionDefinition(function_id=FunctionId(b"f"), blob=b"code", name="f")
    for node_id in (A, B, A):
        bench.tell(node_id, HeadPutFunction(definition=definition))
    ask = HeadGetFunction(function_id=FunctionId(b"f"))
    assert bench.tell(C, ask) == [(C, FunctionFound(function_id=b"f", definition=definition))]
    bench.pass_time_with(B, C, seconds=TIMEOUT + 1)
    assert bench.head.statistics().functions == 1
    bench.pass_time_with(C, seconds=TIMEOUT + 1)
    assert bench.tell(C, ask) == [(C, FunctionFound(function_id=b"f", definition=None))]


def test_jobs_end_when_told_or_with_their_node() -> None:
    bench = HeadBench(A, B)
    for number, node_id in enumerate((A, A, B)):
        bench.tell(node_id, RegisterJob(job_id=b"%d" % number, node_id=node_id))
    bench.tell(A, FinishJob(job_id=b"0"))
    bench.tell(A, FinishJob(job_id=b"0"))
    assert bench.head.statistics().jobs == 2
    bench.pass_time_with(A, seconds=TIMEOUT + 1)
    assert bench.head.statistics().jobs == 1


def test_keys_are_put_listed_and_deleted() -> None:
    bench = HeadBench(A)

    def ask(message: HeadInput) -> HeadReply:
        ((_, reply),) = bench.tell(A, message)
        assert isinstance(reply, HeadReply)
        return reply

    def put(key: bytes, value: bytes, overwrite: bool = True) -> bool:
        return ask(
            KeyValuePut(request_id=1, namespace="s", key=key, value=value, overwrite=overwrite)
        ).done

    def get(key: bytes, space: str = "s") -> object:
        return ask(KeyValueGet(request_id=1, namespace=space, key=key)).found

    assert put(b"ab", b"1")
    assert not put(b"ab", b"2", overwrite=False)
    assert put(b"ab", b"three")
    assert put(b"ac", b"4")
    assert put(b"b", b"5")
    assert get(b"ab") == b"three"
    assert get(b"ab", space="other") is None
    assert ask(KeyValueList(request_id=1, namespace="s", prefix=b"a")).found == [b"ab", b"ac"]
    assert ask(KeyValueDelete(request_id=1, namespace="s", key=b"b")).done
    assert not ask(KeyValueDelete(request_id=1, namespace="s", key=b"b")).done
    assert ask(KeyValueDelete(request_id=1, namespace="s", key=b"a", by_prefix=True)).done
    assert bench.head.statistics().keys == 0


def test_the_store_refuses_what_does_not_fit() -> None:
    store = KeyValueStore(size_bytes_max=10)
    assert store.put("", b"k", b"12345678", overwrite=True)
    assert not store.put("", b"l", b"12", overwrite=True)
    assert store.put("", b"k", b"1", overwrite=True)
    assert store.put("", b"l", b"12", overwrite=True)
    store.check_invariants()


@pytest.mark.parametrize("count", [10, 1000])
def test_a_heartbeat_costs_the_same_in_a_large_cluster(count: int) -> None:
    bench = HeadBench()
    nodes = [NodeId(b"%028d" % number) for number in range(count)]
    for node_id in nodes:
        bench.head.handle(node_id, RegisterNode(node_id=node_id, total={"CPU": 1}), bench.now)
    bench.now += CONFIG.heartbeat_interval_s
    bench.tick()
    said = [effect for node_id in nodes[:10] for effect in bench.beat(node_id, free=0)]
    assert len(said) <= count, "one round of views, whoever changes"
