"""A cluster of many nodes: every task ends with its value, and a choice looks at few of them."""

from __future__ import annotations

from benchmarks.scheduling_scale import run
from poolray.ids import NodeId
from poolray.scheduling.policies import NodeIndex


def test_tasks_of_random_demands_end_on_hundreds_of_nodes_of_which_some_die() -> None:
    figures = run(nodes=200, tasks=1500, seed=3)
    assert figures["node_deaths"] == 2


class Counting(dict[str, int]):
    """What a search looks at."""

    looks = 0

    def items(self):  # type: ignore[no-untyped-def]
        Counting.looks += 1
        return super().items()


def test_a_choice_looks_at_few_of_ten_thousand_nodes() -> None:
    looks = []
    for nodes in (100, 10_000):
        index = NodeIndex()
        for number in range(nodes):
            cpus = 1 + number % 16
            index.put(NodeId(b"%06d" % number), {"CPU": 16}, {"CPU": cpus})
        Counting.looks = 0
        demand = Counting({"CPU": 9})
        for _ in range(50):
            assert index.emptiest(demand) is not None
            assert index.pack(demand) is None
            index.next_fit(demand)
        looks.append(Counting.looks)
    assert looks[1] < 3 * looks[0]
