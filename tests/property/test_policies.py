"""Nodes at random: an index answers as one that looks at every node."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from poolray.ids import NodeId
from poolray.scheduling.policies import NodeIndex, is_half_full, score

NAMES = ["CPU", "GPU", "x"]
AMOUNTS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 8), max_size=3)
DEMANDS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 5), max_size=2)
#: (which node, what it has in all, tenths of it that are free); None for the last: it is gone.
CHANGES = st.lists(
    st.tuples(st.integers(0, 80), AMOUNTS, st.one_of(st.none(), st.integers(0, 10))), max_size=120
)


class Model:
    """All nodes in the order of their places."""

    def __init__(self) -> None:
        self.nodes: list[tuple[NodeId, dict[str, int], dict[str, int]] | None] = []

    def put(self, node_id: NodeId, total: dict[str, int], free: dict[str, int]) -> None:
        for place, known in enumerate(self.nodes):
            if known is not None and known[0] == node_id:
                self.nodes[place] = (node_id, total, free)
                return
        for place, known in enumerate(self.nodes):
            if known is None:
                self.nodes[place] = (node_id, total, free)
                return
        self.nodes.append((node_id, total, free))

    def remove(self, node_id: NodeId) -> None:
        self.nodes = [
            None if known is not None and known[0] == node_id else known for known in self.nodes
        ]

    def fitting(
        self, demand: dict[str, int]
    ) -> list[tuple[int, NodeId, dict[str, int], dict[str, int]]]:
        return [
            (place, *known)
            for place, known in enumerate(self.nodes)
            if known is not None and all(known[2].get(n, 0) >= q for n, q in demand.items())
        ]


def check(index: NodeIndex, model: Model, demand: dict[str, int]) -> None:
    fitting = model.fitting(demand)
    packed = [
        node_id
        for _, node_id, total, free in fitting
        if all(free[n] - q >= total[n] // 2 for n, q in demand.items())
    ]
    assert index.pack(demand) == (packed[0] if packed else None)
    assert all(
        is_half_full(total, free, demand) != (node_id in packed)
        for _, node_id, total, free in fitting
    )
    best = index.emptiest(demand)
    if not fitting:
        assert best is None
    else:
        scores = {node_id: score(total, free, demand) for _, node_id, total, free in fitting}
        assert best is not None
        assert scores[best] == max(scores.values())
        assert index.emptier_than(demand, scores[best] - 1) == best
        assert index.emptier_than(demand, scores[best]) is None
    later = [(place, node_id) for place, node_id, _, _ in fitting if place >= index.cursor]
    assert index.next_fit(demand) == (later[0][1] if later else None)
    assert index.cursor == (later[0][0] + 1 if later else 0)


@settings(max_examples=150, deadline=None)
@given(CHANGES, st.lists(DEMANDS, min_size=1, max_size=4))
def test_an_index_answers_as_if_it_had_looked_at_every_node(
    changes: list[tuple[int, dict[str, int], int | None]], demands: list[dict[str, int]]
) -> None:
    index, model = NodeIndex(), Model()
    for number, (node, total, tenths) in enumerate(changes):
        node_id = NodeId(b"%03d" % node)
        if tenths is None:
            index.remove(node_id)
            model.remove(node_id)
        else:
            free = {name: amount * tenths // 10 for name, amount in total.items()}
            index.put(node_id, total, free)
            model.put(node_id, total, free)
        if number % 7 == 0:
            check(index, model, demands[number % len(demands)])
    index.check_invariants()
    for demand in demands:
        check(index, model, demand)
    assert len(index) == sum(known is not None for known in model.nodes)


def test_rounds_visit_each_node_once() -> None:
    index = NodeIndex()
    names = [NodeId(b"%04d" % number) for number in range(500)]
    for name in names:
        index.put(name, {"CPU": 4}, {"CPU": 4})
    assert [index.next_fit({"CPU": 1}) for _ in names] == names
    assert index.next_fit({"CPU": 1}) is None, "the end of the round"
    assert index.next_fit({"CPU": 1}) == names[0]


def test_packing_fills_nodes_to_the_half_one_after_the_other() -> None:
    index = NodeIndex()
    free = {NodeId(b"%02d" % number): 4 for number in range(20)}
    for name, amount in free.items():
        index.put(name, {"CPU": 4}, {"CPU": amount})
    chosen = []
    for _ in range(60):
        found = index.pack({"CPU": 1}) or index.emptiest({"CPU": 1})
        assert found is not None
        chosen.append(found)
        free[found] -= 1
        index.put(found, {"CPU": 4}, {"CPU": free[found]})
    assert chosen[:40] == [name for name in free for _ in range(2)]
    assert sorted(chosen[40:]) == sorted(free), "then each gets one more"
