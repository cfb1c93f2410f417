"""The head's placement groups, fed with messages: two phases, new tries, new places."""

from __future__ import annotations

import itertools
from typing import TypeVar

import pytest

from poolray.config import Config
from poolray.head.head import Head
from poolray.ids import NodeId, PlacementGroupId
from poolray.protocol.directory import LeaveCluster
from poolray.protocol.node import FinishJob, Heartbeat, RegisterJob, RegisterNode, Tick
from poolray.protocol.placement import (
    BundlesPrepared,
    CommitBundles,
    DropGroup,
    FindGroups,
    GroupChanged,
    GroupsFound,
    GroupSpec,
    GroupState,
    KeptBundles,
    PrepareBundles,
    RegisterGroup,
    ReturnBundles,
    WatchGroup,
)
from poolray.protocol.values import LabelMatch, LabelOperator
from poolray.scheduling.bundles import Strategy

CONFIG = Config()
A, B, C = (NodeId(name * 28) for name in (b"A", b"B", b"C"))
M = TypeVar("M")


class Bench:
    """A head and nodes of two CPUs each, which answer when the test says so."""

    def __init__(self, *names: NodeId, cpus: int = 2, alone: bool = False) -> None:
        self.head = Head(CONFIG)
        self.now = 0.0
        self.said: list[tuple[NodeId, object]] = []
        self._numbers = itertools.count(1)
        for name in names:
            self.join(name, cpus, alone=alone)

    def tell(self, sender: bytes, message: object) -> None:
        for effect in self.head.handle(sender, message, self.now):  # type: ignore[arg-type]
            self.said.append((effect.node_id, effect.message))
        self.head.check_invariants()

    def join(self, name: NodeId, cpus: int = 2, *, alone: bool = False, zone: str = "") -> None:
        message = RegisterNode(
            node_id=name, total={"CPU": cpus}, labels={"zone": zone}, is_alone=alone
        )
        self.tell(name, message)

    def take(self, kind: type[M]) -> list[tuple[NodeId, M]]:
        found = [(node, m) for node, m in self.said if isinstance(m, kind)]
        self.said = [(node, m) for node, m in self.said if not isinstance(m, kind)]
        return found

    def create(
        self, *bundles: int, strategy: Strategy = Strategy.PACK, at: NodeId = A, **options: object
    ) -> PlacementGroupId:
        number = next(self._numbers)
        group_id = PlacementGroupId(b"G%017d" % number)
        spec = GroupSpec(
            group_id=group_id,
            bundles=[{"CPU": cpus} for cpus in bundles],
            strategy=strategy,
            **options,  # type: ignore[arg-type]
        )
        self.tell(at, RegisterGroup(request_id=number, spec=spec))
        return group_id

    def answer(self, done: bool = True) -> list[NodeId]:
        """All nodes that were asked answer; gives them."""
        asked = self.take(PrepareBundles)
        for node, message in asked:
            answer = BundlesPrepared(group_id=message.group_id, attempt=message.attempt, done=done)
            self.tell(node, answer)
        return [node for node, _ in asked]

    def row(self, group_id: PlacementGroupId, at: NodeId = A) -> object:
        self.tell(at, FindGroups(request_id=77, group_id=group_id))
        (reply,) = [m for _, m in self.take(GroupsFound) if m.request_id == 77]
        return reply.rows[0]

    def state(self, group_id: PlacementGroupId, at: NodeId = A) -> GroupState:
        return GroupState(self.row(group_id, at).state)  # type: ignore[attr-defined]

    def beat(self, name: NodeId, free: int) -> None:
        self.tell(name, Heartbeat(node_id=name, available={"CPU": free}, queued_tasks=0))

    def kill(self, name: NodeId, *living: NodeId) -> None:
        end = self.now + 2 * CONFIG.heartbeat_timeout_s
        while self.now < end:
            self.now += CONFIG.heartbeat_interval_s
            for other in living:
                self.beat(other, 2)
            self.tell(b"", Tick())


def test_bundles_are_committed_once_all_nodes_have_set_theirs_aside() -> None:
    bench = Bench(A, B)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    asked = bench.take(PrepareBundles)
    assert [(node, m.bundles) for node, m in asked] == [(A, {0: {"CPU": 2}}), (B, {1: {"CPU": 2}})]
    for node, message in asked:
        assert not bench.take(CommitBundles)
        bench.tell(node, BundlesPrepared(group_id=group, attempt=message.attempt, done=True))
    assert {node for node, _ in bench.take(CommitBundles)} == {A, B}
    assert bench.state(group) is GroupState.CREATED


def test_one_refusal_returns_what_the_others_have_set_aside() -> None:
    bench = Bench(A, B)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    (_, first), (_, second) = bench.take(PrepareBundles)
    bench.tell(A, BundlesPrepared(group_id=group, attempt=first.attempt, done=True))
    bench.tell(B, BundlesPrepared(group_id=group, attempt=second.attempt, done=False))
    assert [node for node, _ in bench.take(ReturnBundles)] == [A]
    assert not bench.take(CommitBundles)
    assert bench.state(group) is GroupState.PENDING
    bench.now += 2 * CONFIG.heartbeat_interval_s
    bench.beat(B, 2)
    assert bench.answer() == [A, B]
    assert bench.state(group) is GroupState.CREATED


def test_a_node_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    bench = Bench(A, B)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    (_, first), _ = bench.take(PrepareBundles)
    bench.tell(A, BundlesPrepared(group_id=group, attempt=first.attempt, done=True))
    while not bench.take(ReturnBundles):
        bench.now += CONFIG.heartbeat_interval_s
        bench.beat(A, 2)
        bench.beat(B, 2)
        bench.tell(b"", Tick())
        assert bench.now < 3 * CONFIG.heartbeat_timeout_s
    # What it says after that changes nothing, and is given back.
    bench.tell(B, BundlesPrepared(group_id=group, attempt=first.attempt, done=True))
    assert (B, first.attempt) in [(node, m.attempt) for node, m in bench.take(ReturnBundles)]


def test_a_group_that_waits_does_not_hold_up_smaller_ones() -> None:
    bench = Bench(A)
    large = bench.create(4)
    small = bench.create(1)
    bench.answer()
    assert bench.state(large) is GroupState.PENDING
    assert bench.state(small) is GroupState.CREATED


def test_groups_that_wait_are_tried_in_the_order_in_which_they_came() -> None:
    bench = Bench(A)
    first = bench.create(2)
    bench.answer()
    second, third = bench.create(2), bench.create(2)
    bench.tell(A, DropGroup(request_id=5, group_id=first))
    bench.now += 2 * CONFIG.heartbeat_interval_s
    bench.beat(A, 2)
    bench.answer()
    assert bench.state(second) is GroupState.CREATED
    assert bench.state(third) is GroupState.PENDING


def test_a_group_that_no_nodes_could_hold_says_so_until_one_comes() -> None:
    bench = Bench(A)
    group = bench.create(3)
    assert bench.row(group).is_infeasible  # type: ignore[attr-defined]
    bench.join(B, 4)
    assert bench.answer() == [B]
    assert not bench.row(group).is_infeasible  # type: ignore[attr-defined]


def test_bundles_of_a_dead_node_get_another_place_and_the_others_stay() -> None:
    bench = Bench(A, B, C)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    bench.answer()
    bench.take(GroupChanged)
    bench.kill(B, A, C)
    states = [GroupState(m.row.state) for _, m in bench.take(GroupChanged)]
    assert states[0] is GroupState.RESCHEDULING
    assert set(bench.answer()) == {C}
    row = bench.row(group)
    assert row.nodes == [A, C]  # type: ignore[attr-defined]
    assert bench.state(group) is GroupState.CREATED


def test_a_death_during_the_first_phase_starts_it_again() -> None:
    bench = Bench(A, B, C)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    for node, message in bench.take(PrepareBundles):
        if node == A:
            bench.tell(A, BundlesPrepared(group_id=group, attempt=message.attempt, done=True))
    bench.kill(B, A, C)
    assert A in [node for node, _ in bench.take(ReturnBundles)]
    assert bench.answer()[-2:] == [A, C]
    assert bench.state(group) is GroupState.CREATED


def test_a_removed_group_tells_its_nodes_and_those_that_watch_it() -> None:
    bench = Bench(A, B, C)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD, name="n")
    bench.answer()
    bench.tell(C, WatchGroup(group_id=group))
    bench.take(GroupChanged)
    bench.tell(A, DropGroup(request_id=9, group_id=group))
    told = bench.take(GroupChanged)
    assert {node for node, _ in told} == {A, B, C}
    assert {m.row.state for _, m in told} == {GroupState.REMOVED}
    assert bench.state(group) is GroupState.REMOVED
    bench.create(1, name="n")
    assert not any(m.refusal for _, m in bench.take(GroupsFound)), "the name is free again"


def test_a_name_is_taken_once() -> None:
    bench = Bench(A)
    bench.create(1, name="n", namespace="s")
    bench.create(1, name="n", namespace="other")
    assert not any(m.refusal for _, m in bench.take(GroupsFound))
    bench.create(1, name="n", namespace="s")
    ((_, reply),) = bench.take(GroupsFound)
    assert "already exists" in reply.refusal


@pytest.mark.parametrize("detached", [False, True])
def test_a_group_goes_with_its_job_unless_it_is_detached(detached: bool) -> None:
    bench = Bench(A)
    bench.tell(A, RegisterJob(job_id=b"job", node_id=A))
    group = bench.create(1, job_id=b"job", detached=detached)
    bench.answer()
    bench.tell(A, FinishJob(job_id=b"job"))
    expected = GroupState.CREATED if detached else GroupState.REMOVED
    assert bench.state(group) is expected


def test_a_group_of_a_job_that_nobody_has_told_of_goes_with_the_node_that_made_it() -> None:
    """An earlier life of the head may have been told of the job, and had no time to store that."""
    bench = Bench(A, B)
    mine = bench.create(1, job_id=b"mine", at=A)
    told = bench.create(1, job_id=b"told", at=A)
    bench.answer()
    bench.tell(B, RegisterJob(job_id=b"told", node_id=B))
    bench.tell(A, LeaveCluster(node_id=A))
    assert bench.state(mine, B) is GroupState.REMOVED
    assert bench.state(told, B) is not GroupState.REMOVED
    bench.tell(B, FinishJob(job_id=b"told"))
    assert bench.state(told, B) is GroupState.REMOVED


def test_a_group_that_is_made_after_the_end_of_its_job_is_removed() -> None:
    bench = Bench(A)
    bench.tell(A, RegisterJob(job_id=b"job", node_id=A))
    bench.tell(A, FinishJob(job_id=b"job"))
    assert bench.state(bench.create(1, job_id=b"job")) is GroupState.REMOVED


def test_a_bundle_goes_to_a_node_with_its_labels() -> None:
    bench = Bench(A)
    bench.join(B, zone="b")
    labels = [[LabelMatch("zone", LabelOperator.IN, ["b"])], []]
    bench.create(1, 1, strategy=Strategy.PACK, labels=labels)
    ((_, message),) = [each for each in bench.take(PrepareBundles) if 0 in each[1].bundles]
    assert bench.said is not None
    assert message.bundles[0] == {"CPU": 1}


def test_a_node_that_is_alone_with_the_head_is_told_to_keep_the_order() -> None:
    bench = Bench(A, alone=True)
    bench.create(2)
    bench.create(2)
    asked = bench.take(PrepareBundles)
    assert [m.may_wait for _, m in asked] == [True], "of the second it knows that it has no room"
    assert bench.head.next_deadline() is not None


def test_a_head_that_was_started_again_knows_its_groups_and_what_their_nodes_keep() -> None:
    bench = Bench(A, B)
    group = bench.create(2, 2, strategy=Strategy.STRICT_SPREAD)
    bench.answer()
    waits = bench.create(2)
    tables: dict[str, dict[bytes, bytes]] = {}
    for change in bench.head.take_changes():
        if change.value is not None:
            tables.setdefault(change.table, {})[change.key] = change.value
    bench.head = Head(CONFIG)
    bench.head.restore(tables, bench.now)
    lost = KeptBundles(group_id=group, attempt=1, indexes=[1], is_open=False)  # its commit was lost
    stray = KeptBundles(group_id=waits, attempt=9, indexes=[0], is_open=False)
    bench.take(CommitBundles)
    bench.tell(A, RegisterNode(node_id=A, total={"CPU": 2}, watched_groups=[group]))
    bench.tell(B, RegisterNode(node_id=B, total={"CPU": 2}, bundles=[lost, stray]))
    assert bench.take(CommitBundles) == [(B, CommitBundles(group_id=group, attempt=1))]
    assert [(node, m.attempt) for node, m in bench.take(ReturnBundles)] == [(B, 9)]
    assert bench.state(group) is GroupState.CREATED
    assert bench.state(waits) is GroupState.PENDING
