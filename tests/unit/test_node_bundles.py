"""The node's bundles, fed with messages: set aside, opened to calls, closed again."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from poolray.ids import ClassId, NodeId, ObjectId, PlacementGroupId, TaskId
from poolray.node.effects import SendHead, TerminateWorker
from poolray.objects.directory import READY
from poolray.protocol.placement import (
    AwaitPlacementGroup,
    BundlesPrepared,
    CommitBundles,
    GroupChanged,
    GroupRow,
    GroupSpec,
    GroupState,
    PrepareBundles,
    ReturnBundles,
    WatchGroup,
)
from poolray.protocol.values import Placement
from tests.unit.node_harness import CPU, DRIVER, NODE, Bench, result_of

GROUP = PlacementGroupId(b"G" * 18)


class BundleBench(Bench):
    """A node, and the head's part played by hand."""

    def prepare(self, *cpus: float, attempt: int = 1, wait: bool = False) -> list[bool]:
        bundles = {index: {"CPU": int(each * CPU)} for index, each in enumerate(cpus)}
        message = PrepareBundles(group_id=GROUP, attempt=attempt, bundles=bundles, may_wait=wait)
        self.tell(message)
        return self.answers()

    def answers(self) -> list[bool]:
        sent = [effect.message for effect in self.take(SendHead)]
        return [message.done for message in sent if isinstance(message, BundlesPrepared)]

    def changed(self, state: GroupState, cpus: Iterable[float] = (), node: NodeId = NODE) -> None:
        bundles = [{"CPU": int(each * CPU)} for each in cpus]
        spec = GroupSpec(group_id=GROUP, bundles=bundles)
        row = GroupRow(spec=spec, state=state, nodes=[node] * len(bundles))
        self.tell(GroupChanged(row=row))

    def open(self, *cpus: float) -> None:
        assert self.prepare(*cpus) == [True]
        self.tell(CommitBundles(group_id=GROUP, attempt=1))
        self.changed(GroupState.CREATED, cpus)

    def class_in_group(self, cpus: float = 1, bundle: int = -1) -> ClassId:
        placement = Placement(group=GROUP, bundle=bundle)
        return self.task_class(f"in {cpus} {bundle}", cpus=cpus, placement=placement)

    def running(self, *tasks: TaskId) -> list[bool]:
        return [self.state(task) == "RUNNING" for task in tasks]

    def finish_first(self) -> None:
        """The worker that was sent something first runs that."""
        worker_id = self.busy()[0]
        self.finish(worker_id, self.read(worker_id), elapsed_s=1.0)

    def is_ready(self, object_id: ObjectId) -> bool:
        return self.node.state.objects[object_id].state is READY

    def error_of(self, task: TaskId) -> bytes:
        value = self.value_of(result_of(task))
        assert isinstance(value, bytes)
        return value


@pytest.fixture
def bench() -> BundleBench:
    made = BundleBench(cpus=4)
    made.group()
    return made


def test_what_is_set_aside_is_not_available_to_others(bench: BundleBench) -> None:
    assert bench.prepare(1, 2) == [True]
    assert bench.node.statistics().resources_available["CPU"] == 1.0
    assert bench.prepare(2, attempt=2) == [False], "all or none"
    bench.tell(ReturnBundles(group_id=GROUP, attempt=1))
    assert bench.node.statistics().resources_available == {"CPU": 4.0}


def test_an_order_that_may_wait_is_carried_out_once_there_is_room(bench: BundleBench) -> None:
    bench.submit(bench.task_class(cpus=4))
    bench.start_all()
    assert bench.prepare(1, wait=True) == []
    bench.finish_first()
    assert bench.answers() == [True]


def test_an_order_is_not_passed_over_for_ever_by_calls_that_need_less(bench: BundleBench) -> None:
    class_id = bench.task_class(cpus=1)
    bench.submit_many(class_id, 1000)
    bench.start_all()
    assert bench.prepare(4, wait=True) == []
    for _ in range(400):
        bench.finish_first()
        if bench.answers() == [True]:
            return
    raise AssertionError("the bundle was never set aside")


def test_calls_of_a_group_wait_for_it_and_run_in_its_bundles(bench: BundleBench) -> None:
    class_id = bench.class_in_group()
    asked = [effect.message for effect in bench.take(SendHead)]
    assert asked == [WatchGroup(group_id=GROUP)]
    first, second, third = (bench.submit(class_id) for _ in range(3))
    assert bench.start_all() == []
    bench.open(1, 1)
    bench.start_all()
    assert bench.running(first, second, third) == [True, True, False]
    bench.finish_first()
    assert bench.running(second, third) == [True, True]


def test_a_call_in_a_bundle_does_not_use_the_others(bench: BundleBench) -> None:
    bench.open(1, 1)
    class_id = bench.class_in_group(bundle=1)
    first, second = bench.submit(class_id), bench.submit(class_id)
    bench.start_all()
    anywhere = bench.submit(bench.class_in_group())
    bench.start_all()
    assert bench.running(first, second, anywhere) == [True, False, True]


def test_a_call_that_asks_for_nothing_runs_in_the_group_all_the_same(bench: BundleBench) -> None:
    class_id = bench.class_in_group(cpus=0)
    task = bench.submit(class_id)
    assert bench.start_all() == []
    bench.open(1)
    bench.start_all()
    assert bench.running(task) == [True]


def test_removal_kills_what_runs_and_fails_what_waits(bench: BundleBench) -> None:
    bench.open(1)
    class_id = bench.class_in_group()
    running, waiting = bench.submit(class_id), bench.submit(class_id)
    (worker,) = bench.start_all()
    bench.changed(GroupState.REMOVED)
    assert [effect.worker_id for effect in bench.take(TerminateWorker)] == [worker]
    for task in (running, waiting):
        assert b"TaskPlacementGroupRemoved" in bench.error_of(task)
    # The process lives for a moment yet: until then its CPU is nobody's.
    assert bench.node.statistics().resources_available["CPU"] == 3.0
    bench.lose(worker)
    assert bench.node.statistics().resources_available == {"CPU": 4.0}
    late = bench.submit(class_id)
    assert b"TaskPlacementGroupRemoved" in bench.error_of(late)
    assert bench.node.statistics().bundles == 0


def test_what_becomes_ready_by_the_removal_does_not_run_in_the_group(bench: BundleBench) -> None:
    bench.open(1, 1)
    class_id = bench.class_in_group()
    bench.submit(class_id)
    first = bench.submit(class_id)
    workers = bench.start_all()
    bench.finish_first()  # so that a worker is idle
    assert bench.state(first) == "RUNNING"
    behind = bench.submit(class_id, dependencies=[result_of(first)])
    other = bench.submit(bench.task_class("other"), dependencies=[result_of(first)])
    bench.changed(GroupState.REMOVED)
    assert b"TaskPlacementGroupRemoved" in bench.error_of(behind)
    for worker in workers:
        bench.lose(worker)
    bench.start_all()
    assert bench.running(other) == [True]


def test_a_ref_that_stands_for_a_group_is_ready_with_it_or_an_error(bench: BundleBench) -> None:
    ids = [ObjectId(b"O%027d" % number) for number in range(2)]
    bench.tell(AwaitPlacementGroup(object_id=ids[0], group_id=GROUP, value=b"it"), DRIVER)
    assert not bench.is_ready(ids[0])
    bench.open(1)
    assert bench.value_of(ids[0]) == b"it"
    bench.changed(GroupState.REMOVED)
    bench.tell(AwaitPlacementGroup(object_id=ids[1], group_id=GROUP, value=b"it"), DRIVER)
    bench.changed(GroupState.REMOVED)
    assert bench.value_of(ids[1]).startswith(b"TaskPlacementGroupRemoved")  # type: ignore[union-attr]


def test_devices_of_a_bundle_are_given_to_its_calls(bench: BundleBench) -> None:
    bench = BundleBench(cpus=4, devices={"GPU": ["0", "1"]})
    bench.group()
    bundles = {0: {"GPU": CPU}, 1: {"GPU": CPU // 2}}
    bench.tell(PrepareBundles(group_id=GROUP, attempt=1, bundles=bundles))
    bench.tell(CommitBundles(group_id=GROUP, attempt=1))
    account = bench.node.state.resources
    name = f"GPU_group_0_{GROUP.hex()}"
    taken = account.pools[name].take(CPU)
    assert [account.pools[name].ids[index] for index, _ in taken] == ["0"]
    account.pools[name].give(taken)
    assert not account.pools[f"GPU_group_1_{GROUP.hex()}"].fits(CPU)
    bench.changed(GroupState.REMOVED)
    assert account.available["GPU"] == 2 * CPU
    assert set(account.pools) == {"GPU"}
