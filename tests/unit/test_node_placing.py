"""Which node gets a task: strategies, labels, arguments and bundles, with peers told of by hand."""

from __future__ import annotations

import pytest

from poolray.ids import NodeId, ObjectId, PlacementGroupId, TaskId
from poolray.node.effects import Notice, SendPeer
from poolray.protocol.directory import NodeStatus
from poolray.protocol.node import ClusterView, ForwardTasks, NodeDied, NodeView
from poolray.protocol.placement import GroupChanged, GroupRow, GroupSpec, GroupState
from poolray.protocol.values import InArena, LabelMatch, LabelOperator, Placement
from tests.unit.node_harness import CPU, DRIVER, NODE, Bench, result_of

B, C, D = (NodeId(name * 28) for name in (b"B", b"C", b"D"))
ZONE_B = LabelMatch("zone", LabelOperator.IN, ["b"])


def view(name: NodeId, free: float = 4, total: float = 4, **more: object) -> NodeView:
    return NodeView(
        node_id=name,
        total={"CPU": int(total * CPU)},
        available={"CPU": int(free * CPU)},
        queued_tasks=0,
        **more,  # type: ignore[arg-type]
    )


class PeerBench(Bench):
    """A node of four CPUs among others."""

    def __init__(self, *views: NodeView, **options: object) -> None:
        super().__init__(cpus=4, **options)  # type: ignore[arg-type]
        self.node.state.has_head = True
        self.group()
        self.see(*views)

    def see(self, *views: NodeView) -> None:
        self.tell(ClusterView(nodes=list(views)))

    def places(self, *tasks: TaskId) -> list[NodeId | None]:
        """Where each of these tasks is, if it was given away."""
        return [self.node.state.tasks[task].node_id for task in tasks]

    def submit_some(self, count: int, **options: object) -> list[TaskId]:
        class_id = self.task_class(**options)  # type: ignore[arg-type]
        tasks = []
        for _ in range(count):
            tasks.append(self.submit(class_id))
            self.start_all()
        return tasks


def test_by_default_nodes_are_filled_to_the_half_one_after_the_other_then_evenly() -> None:
    bench = PeerBench(view(B), view(C))
    tasks = bench.submit_some(12)
    assert bench.places(*tasks[:6]) == [None, None, B, B, C, C]
    rest = bench.places(*tasks[6:])
    assert sorted(str(place) for place in rest) == sorted(str(p) for p in [None, None, B, B, C, C])


def test_an_idle_node_takes_a_task_as_large_as_itself() -> None:
    bench = PeerBench(view(B, free=8, total=8))
    tasks = bench.submit_some(2, cpus=4)
    assert bench.places(*tasks) == [None, B]


def test_short_calls_stay_together_while_they_fit() -> None:
    bench = PeerBench(view(B))
    class_id = bench.task_class(cpus=1)
    bench.warm_up(class_id)
    tasks = [bench.submit(class_id) for _ in range(3)]
    assert bench.places(*tasks) == [None, None, None]


def test_spread_takes_turns_with_this_node() -> None:
    bench = PeerBench(view(B), view(C))
    tasks = bench.submit_some(9, placement=Placement(spread=True))
    places = bench.places(*tasks)
    assert {places.count(None), places.count(B), places.count(C)} == {3}


def test_spread_passes_over_nodes_without_room() -> None:
    bench = PeerBench(view(B, free=0), view(C, free=1))
    tasks = bench.submit_some(3, placement=Placement(spread=True))
    assert sorted(map(str, bench.places(*tasks))) == sorted(map(str, [None, None, C]))


@pytest.mark.parametrize("soft", [False, True])
def test_a_task_waits_for_the_node_that_it_names_though_that_is_busy(soft: bool) -> None:
    bench = PeerBench(view(B, free=0), view(C))
    tasks = bench.submit_some(2, placement=Placement(node_id=B, is_soft=soft))
    assert bench.places(*tasks) == [B, B]


def test_a_hard_wish_for_a_node_that_is_not_there_fails_and_a_soft_one_does_not() -> None:
    bench = PeerBench(view(C))
    (hard,) = bench.submit_some(1, name="hard", placement=Placement(node_id=B))
    assert b"TaskUnschedulableError" in bench.value_of(result_of(hard))  # type: ignore[operator]
    (soft,) = bench.submit_some(1, name="soft", placement=Placement(node_id=B, is_soft=True))
    assert bench.places(soft) == [None]
    assert bench.state(soft) == "RUNNING"


def test_a_hard_wish_waits_until_the_head_has_told_who_is_there() -> None:
    bench = Bench(cpus=4)
    bench.node.state.has_head = True
    bench.group()
    task = bench.submit(bench.task_class(placement=Placement(node_id=B)))
    assert bench.state(task) == "QUEUED"
    bench.tell(ClusterView(nodes=[view(B)]))
    assert bench.state(task) == "FORWARDED"


def test_a_hard_wish_for_a_node_that_dies_fails_although_it_may_be_retried() -> None:
    bench = PeerBench(view(B))
    (task,) = bench.submit_some(1, placement=Placement(node_id=B))
    assert bench.places(task) == [B]
    bench.tell(NodeDied(node_id=B))
    bench.after(60.0)
    assert b"TaskUnschedulableError" in bench.value_of(result_of(task))  # type: ignore[operator]


def test_labels_choose_among_the_nodes_that_have_them() -> None:
    bench = PeerBench(view(B, labels={"zone": "b"}), view(C), labels={"zone": "a"})
    tasks = bench.submit_some(2, placement=Placement(labels=[[ZONE_B]]))
    assert bench.places(*tasks) == [B, B]


def test_wishes_are_met_if_a_node_can_and_left_if_none_can() -> None:
    bench = PeerBench(view(B, free=1, labels={"zone": "b"}), view(C), labels={"zone": "a"})
    tasks = bench.submit_some(2, placement=Placement(wishes=[ZONE_B]))
    assert bench.places(*tasks) == [B, None]


def test_a_node_that_is_drained_gets_nothing() -> None:
    bench = PeerBench(view(B, status=NodeStatus.DRAINING))
    tasks = bench.submit_some(6)
    assert bench.places(*tasks) == [None] * 6


def test_a_task_goes_where_most_bytes_of_its_arguments_are() -> None:
    bench = PeerBench(view(B), view(C))
    ids = []
    for number, (node, size) in enumerate([(B, 10_000), (C, 500_000)]):
        object_id = ObjectId(b"O%027d" % number)
        place = InArena(object_id=object_id, offset=0, size_bytes=size, node_id=node)
        bench.put(object_id, b"")
        record = bench.node.state.objects[object_id]
        record.value = place
        ids.append(object_id)
    class_id = bench.task_class()
    task = bench.submit(class_id, dependencies=ids)
    assert bench.places(task) == [C]


def test_a_task_of_a_group_goes_to_a_node_with_a_bundle() -> None:
    bench = PeerBench(view(B), view(C))
    group = PlacementGroupId(b"G" * 18)
    spec = GroupSpec(group_id=group, bundles=[{"CPU": CPU}, {"CPU": CPU}])
    first = bench.submit_some(1, name="any", placement=Placement(group=group))
    assert bench.places(*first) == [None]
    assert bench.state(first[0]) == "QUEUED"
    row = GroupRow(spec=spec, state=GroupState.CREATED, nodes=[B, C])
    bench.tell(GroupChanged(row=row))
    assert bench.state(first[0]) == "FORWARDED"
    second = bench.submit_some(1, name="second", placement=Placement(group=group, bundle=1))
    assert set(bench.places(*first, *second)) <= {B, C}
    (indexed,) = bench.places(*second)
    assert indexed == C or bench.state(second[0]) == "QUEUED"


def test_what_is_sent_tells_the_other_node_where_the_task_wants_to_be() -> None:
    bench = PeerBench(view(B))
    bench.submit_some(1, placement=Placement(node_id=B))
    (sent,) = [effect.message for effect in bench.take(SendPeer)]
    assert isinstance(sent, ForwardTasks)
    assert sent.classes[0].placement == Placement(node_id=B)
    other = Bench(cpus=4, node_id=B)
    other.group()
    other.tell(sent, NODE)
    other.start_all()
    assert other.busy(), "the class says that it may run here"
    assert DRIVER


def test_a_task_that_waits_for_a_busy_peer_is_not_told_of_until_that_is_dead() -> None:
    bench = PeerBench(view(B, free=0, total=16), view(C))
    after_s = bench.node.state.config.infeasible_notice_after_s
    bench.submit(bench.task_class("large", cpus=16))
    for _ in range(3):
        bench.after(after_s)
        assert bench.take(Notice) == []
    bench.tell(NodeDied(node_id=B, reason="it was killed"))
    bench.after(after_s)
    (notice,) = bench.take(Notice)
    assert notice.text.startswith("Task large waits for {'CPU': 16.0}")


def test_a_task_that_no_peer_may_run_is_told_of() -> None:
    bench = PeerBench(view(B, free=16, total=16, labels={"zone": "a"}), view(C))
    bench.submit(bench.task_class("far", placement=Placement(labels=[[ZONE_B]])))
    bench.submit(bench.task_class("large", cpus=17))
    bench.after(bench.node.state.config.infeasible_notice_after_s)
    assert {notice.text.split()[1] for notice in bench.take(Notice)} == {"far", "large"}
