"""Which node gets which bundle of a placement group.

What: an assignment of bundles to nodes for each strategy, or None when there is none now.
Who calls: the head machine, when a group is new, when nodes have room, when a node died.
May touch: nothing.
Invariants: what is assigned to a node fits into what it has free, all of it together, and its
labels meet each bundle's conditions; one input has one answer; a `STRICT_` group is never broken.

    STRICT_SPREAD   nodes of their own for all bundles: a matching, exact in polynomial time
    SPREAD          as many nodes as a matching can give, the rest where fewest bundles are
    STRICT_PACK     one node for all
    PACK            few nodes: the one that takes most first; a search finds what greed misses
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

from poolray.ids import NodeId
from poolray.protocol.values import LabelMatch
from poolray.scheduling.labels import meets_all

Amounts: TypeAlias = Mapping[str, int]

#: Steps of the search for an assignment that greed has not found; it gives up after so many.
_SEARCH_MAX = 20_000
_NOWHERE = NodeId(b"")


class Strategy(enum.IntEnum):
    """How the bundles of a group lie to each other."""

    PACK = 0
    SPREAD = 1
    STRICT_PACK = 2
    STRICT_SPREAD = 3


@final
class Room:
    """A node as the assignment sees it."""

    __slots__ = ("free", "labels", "node_id")

    def __init__(self, node_id: NodeId, free: Amounts, labels: Mapping[str, str]) -> None:
        self.node_id = node_id
        self.free = dict(free)
        self.labels = labels

    def fits(self, bundle: Amounts) -> bool:
        """Whether a bundle fits beside what was put here."""
        free = self.free
        return all(free.get(name, 0) >= amount for name, amount in bundle.items())

    def put(self, bundle: Amounts) -> None:
        """A bundle comes here."""
        for name, amount in bundle.items():
            self.free[name] = self.free.get(name, 0) - amount

    def take(self, bundle: Amounts) -> None:
        """It goes again."""
        for name, amount in bundle.items():
            self.free[name] += amount


@final
class Wish:
    """The bundles that want places, and what they have to keep to.

    Parameters
    ----------
    strategy : Strategy
        How they lie to each other.
    bundles : mapping of int to mapping of str to int
        Index -> demand, in units of 1/10,000.
    labels : mapping of int to sequence of LabelMatch
        Index -> conditions on the labels of its node.
    placed : mapping of int to NodeId
        Bundles of the group that have their place already.
    preferred : NodeId
        Where `STRICT_PACK` looks first.
    """

    __slots__ = ("bundles", "labels", "placed", "preferred", "strategy")

    def __init__(
        self,
        strategy: Strategy,
        bundles: Mapping[int, Amounts],
        labels: Mapping[int, Sequence[LabelMatch]] | None = None,
        placed: Mapping[int, NodeId] | None = None,
        preferred: NodeId = _NOWHERE,
    ) -> None:
        self.strategy = strategy
        self.bundles = bundles
        self.labels = labels or {}
        self.placed = placed or {}
        self.preferred = preferred

    def suits(self, index: int, room: Room) -> bool:
        """Whether a bundle may go to a node, and fits there now."""
        return room.fits(self.bundles[index]) and meets_all(self.labels.get(index, ()), room.labels)


def assign(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId] | None:
    """Places for all bundles that want one; None: there is no such assignment now.

    `rooms` are changed while this looks, and left as they were.
    """
    if wish.strategy is Strategy.STRICT_PACK:
        return _on_one(wish, rooms)
    used = set(wish.placed.values())
    if wish.strategy is Strategy.STRICT_SPREAD:
        matched = _match(wish, [room for room in rooms if room.node_id not in used])
        return matched if len(matched) == len(wish.bundles) else None
    found = _spread(wish, rooms) if wish.strategy is Strategy.SPREAD else _pack(wish, rooms)
    return found if found is not None else _search(wish, rooms)


def _by_size(wish: Wish) -> list[int]:
    """Bundles, those that are hardest to place first."""
    scarce: dict[str, int] = {}
    for bundle in wish.bundles.values():
        for name, amount in bundle.items():
            scarce[name] = scarce.get(name, 0) + amount

    def key(index: int) -> tuple[int, float, int]:
        bundle = wish.bundles[index]
        share = max((amount / (scarce[name] or 1) for name, amount in bundle.items()), default=0.0)
        return -len(bundle) - len(wish.labels.get(index, ())), -share, index

    return sorted(wish.bundles, key=key)


def _on_one(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId] | None:
    """The preferred node, else the one with least left over afterwards: large gaps stay."""
    together: dict[str, int] = {}
    for bundle in wish.bundles.values():
        for name, amount in bundle.items():
            together[name] = together.get(name, 0) + amount
    stays = set(wish.placed.values())
    best: Room | None = None
    best_left = 0
    for room in rooms:
        if stays and room.node_id not in stays:
            continue
        if not room.fits(together) or not all(
            meets_all(conditions, room.labels) for conditions in wish.labels.values()
        ):
            continue
        if room.node_id == wish.preferred:
            best = room
            break
        left = sum(room.free.get(name, 0) - amount for name, amount in together.items())
        if best is None or left < best_left:
            best, best_left = room, left
    return None if best is None else dict.fromkeys(wish.bundles, best.node_id)


def _match(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId]:
    """As many bundles as possible on nodes of their own (augmenting paths)."""
    indexes = _by_size(wish)
    fitting = {
        index: [n for n, room in enumerate(rooms) if wish.suits(index, room)] for index in indexes
    }
    place: dict[int, int] = {}  # bundle -> node
    owner: dict[int, int] = {}  # node -> bundle
    for index in indexes:
        _augment(index, fitting, place, owner)
    return {index: rooms[number].node_id for index, number in place.items()}


def _augment(
    start: int, fitting: dict[int, list[int]], place: dict[int, int], owner: dict[int, int]
) -> None:
    """Find a node for one more bundle, moving others if need be. Breadth first: a group may be
    larger than what Python's recursion allows.
    """
    reached: dict[int, int] = {}  # node -> bundle that would move there
    queue = [start]
    for index in queue:
        for number in fitting[index]:
            if number in reached:
                continue
            reached[number] = index
            if number in owner:
                queue.append(owner[number])
                continue
            while True:  # everyone on the way moves on by one
                mover = reached[number]
                left = place.get(mover)
                place[mover], owner[number] = number, mover
                if left is None:
                    return
                number = left


def _spread(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId] | None:
    """Nodes of their own as far as possible; the others where fewest of the group are."""
    used = set(wish.placed.values())
    found = _match(wish, [room for room in rooms if room.node_id not in used])
    if len(found) == len(wish.bundles):
        return found
    by_id = {room.node_id: room for room in rooms}
    counts = dict.fromkeys(by_id, 0)
    for node_id in (*wish.placed.values(), *found.values()):
        if node_id in counts:
            counts[node_id] += 1
    for index, node_id in found.items():
        by_id[node_id].put(wish.bundles[index])
    for index in _by_size(wish):
        if index in found:
            continue
        candidates = [room for room in rooms if wish.suits(index, room)]
        if not candidates:
            break
        # (The first of equals: the order of the rooms decides.)
        room = min(candidates, key=lambda each: counts[each.node_id])
        room.put(wish.bundles[index])
        counts[room.node_id] += 1
        found[index] = room.node_id
    for index, node_id in found.items():
        by_id[node_id].take(wish.bundles[index])
    return found if len(found) == len(wish.bundles) else None


def _pack(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId] | None:
    """Fill the nodes that the group is on already, then whichever takes most of the rest."""
    left = _by_size(wish)
    found: dict[int, NodeId] = {}
    used = set(wish.placed.values())
    open_rooms = sorted(rooms, key=lambda room: room.node_id not in used)  # stable
    at = sum(room.node_id in used for room in open_rooms)
    for room in open_rooms[:at]:
        _fill(wish, room, left, found)
    candidates = open_rooms[at:]
    while left and candidates:
        best: dict[int, NodeId] = {}
        for room in candidates:
            taken: dict[int, NodeId] = {}
            _fill(wish, room, list(left), taken)
            for index in taken:
                room.take(wish.bundles[index])
            if len(taken) > len(best):
                best, chosen = taken, room
                if len(taken) == len(left):
                    break
        if not best:
            break
        _fill(wish, chosen, left, found)
        candidates.remove(chosen)
    by_id = {room.node_id: room for room in rooms}
    for index, node_id in found.items():
        by_id[node_id].take(wish.bundles[index])
    return None if left else found


def _fill(wish: Wish, room: Room, left: list[int], found: dict[int, NodeId]) -> None:
    """Put what fits on a node, hardest first."""
    for index in list(left):
        if wish.suits(index, room):
            room.put(wish.bundles[index])
            found[index] = room.node_id
            left.remove(index)


def _search(wish: Wish, rooms: Sequence[Room]) -> dict[int, NodeId] | None:
    """Try assignments one after the other, hardest bundles first, up to a limit."""
    indexes = _by_size(wish)
    chosen: list[int] = []  # positions in `rooms`, one per bundle that is placed
    at = 0
    steps = 0
    while len(chosen) < len(indexes):
        index = indexes[len(chosen)]
        while at < len(rooms) and not wish.suits(index, rooms[at]):
            at += 1
        steps += 1
        if at < len(rooms) and steps <= _SEARCH_MAX:
            rooms[at].put(wish.bundles[index])
            chosen.append(at)
            at = 0
            continue
        if not chosen or steps > _SEARCH_MAX:
            break
        at = chosen.pop()  # a step back
        rooms[at].take(wish.bundles[indexes[len(chosen)]])
        at += 1
    for position, number in enumerate(chosen):
        rooms[number].take(wish.bundles[indexes[position]])
    if len(chosen) < len(indexes):
        return None
    return {indexes[n]: rooms[number].node_id for n, number in enumerate(chosen)}
