"""Bundles and nodes at random: what is assigned holds, and is found where it exists at all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from poolray.ids import NodeId
from poolray.protocol.values import LabelMatch, LabelOperator
from poolray.scheduling.bundles import Room, Strategy, Wish, assign

AMOUNTS = st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), st.integers(1, 4), max_size=3)
ZONES = st.sampled_from(["a", "b"])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Wish, list[Room]]:
    rooms = [
        Room(NodeId(b"node %d" % number), amounts, {"zone": zone})
        for number, (amounts, zone) in enumerate(
            draw(st.lists(st.tuples(AMOUNTS, ZONES), min_size=1, max_size=4))
        )
    ]
    bundles = dict(enumerate(draw(st.lists(AMOUNTS, min_size=1, max_size=4))))
    labels = {
        index: [LabelMatch("zone", LabelOperator.IN, [zone])]
        for index, zone in draw(st.dictionaries(st.sampled_from(sorted(bundles)), ZONES)).items()
    }
    strategy = draw(st.sampled_from(Strategy))
    placed: dict[int, NodeId] = {}
    if strategy is not Strategy.STRICT_PACK and draw(st.booleans()):
        placed = {99: draw(st.sampled_from(rooms)).node_id}
    return Wish(strategy, bundles, labels, placed), rooms


def holds(wish: Wish, rooms: list[Room], found: Mapping[int, NodeId]) -> bool:
    """Whether an assignment keeps to all that was asked."""
    by_id = {room.node_id: room for room in rooms}
    used: dict[NodeId, dict[str, int]] = {}
    for index, node_id in found.items():
        sums = used.setdefault(node_id, {})
        for name, amount in wish.bundles[index].items():
            sums[name] = sums.get(name, 0) + amount
        for match in wish.labels.get(index, ()):
            if by_id[node_id].labels["zone"] not in match.values:
                return False
    if any(
        amount > by_id[node_id].free.get(name, 0)
        for node_id, sums in used.items()
        for name, amount in sums.items()
    ):
        return False
    if wish.strategy is Strategy.STRICT_SPREAD:
        nodes = [*found.values(), *wish.placed.values()]
        return len(set(nodes)) == len(nodes)
    return wish.strategy is not Strategy.STRICT_PACK or len(used) == 1


def all_assignments(wish: Wish, rooms: list[Room]) -> list[dict[int, NodeId]]:
    """Every one that holds, by trying all."""
    ids = [room.node_id for room in rooms]
    return [
        found
        for choice in itertools.product(ids, repeat=len(wish.bundles))
        if holds(wish, rooms, found := dict(zip(wish.bundles, choice, strict=True)))
    ]


@settings(max_examples=400, deadline=None)
@given(cases())
def test_an_assignment_holds_and_is_found_exactly_if_there_is_one(
    case: tuple[Wish, list[Room]],
) -> None:
    wish, rooms = case
    before = [dict(room.free) for room in rooms]
    found = assign(wish, rooms)
    assert [room.free for room in rooms] == before, "the rooms were left changed"
    possible = all_assignments(wish, rooms)
    if found is None:
        assert not possible
    else:
        assert found in possible


@settings(max_examples=300, deadline=None)
@given(cases())
def test_spread_uses_as_many_nodes_as_any_assignment_of_its_own_nodes_can(
    case: tuple[Wish, list[Room]],
) -> None:
    wish, rooms = case
    wish.strategy = Strategy.SPREAD
    wish.placed = {}
    found = assign(wish, rooms)
    if found is None:
        return
    widest = max(len(set(each.values())) for each in all_assignments(wish, rooms))
    if widest == len(wish.bundles):  # each on a node of its own: then it must be so
        assert len(set(found.values())) == widest


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 12))
def test_pack_of_equal_bundles_uses_as_few_nodes_as_possible(sizes: list[int], count: int) -> None:
    rooms = [Room(NodeId(b"node %d" % n), {"CPU": size}, {}) for n, size in enumerate(sizes)]
    wish = Wish(Strategy.PACK, {index: {"CPU": 1} for index in range(count)})
    found = assign(wish, rooms)
    if count > sum(sizes):
        assert found is None
        return
    assert found is not None
    left, fewest = count, 0
    for size in sorted(sizes, reverse=True):
        if left > 0:
            left, fewest = left - size, fewest + 1
    assert len(set(found.values())) == fewest


def test_strict_pack_leaves_large_gaps_alone_and_prefers_the_node_named() -> None:
    rooms = [Room(NodeId(b"large"), {"CPU": 8}, {}), Room(NodeId(b"small"), {"CPU": 2}, {})]
    bundles = {0: {"CPU": 1}, 1: {"CPU": 1}}
    assert assign(Wish(Strategy.STRICT_PACK, bundles), rooms) == {0: b"small", 1: b"small"}
    wish = Wish(Strategy.STRICT_PACK, bundles, preferred=NodeId(b"large"))
    assert assign(wish, rooms) == {0: b"large", 1: b"large"}


def test_what_died_goes_back_to_the_nodes_of_a_packed_group() -> None:
    rooms = [Room(NodeId(b"node %d" % n), {"CPU": 4}, {}) for n in range(3)]
    wish = Wish(Strategy.PACK, {1: {"CPU": 1}}, placed={0: NodeId(b"node 2")})
    assert assign(wish, rooms) == {1: b"node 2"}
    wish = Wish(Strategy.SPREAD, {1: {"CPU": 1}}, placed={0: NodeId(b"node 0")})
    assert assign(wish, rooms) == {1: b"node 1"}


def test_a_large_group_is_matched_without_recursion() -> None:
    rooms = [Room(NodeId(b"node %d" % n), {"CPU": n + 1}, {}) for n in range(600)]
    bundles = {n: {"CPU": 600 - n} for n in range(600)}
    found = assign(Wish(Strategy.STRICT_SPREAD, bundles), rooms)
    assert found is not None
    assert len(set(found.values())) == 600
