"""Which node of a cluster gets a task: nodes indexed by what they have free.

What: `NodeIndex` finds, among many nodes, one with room for a demand: the first that would be at
most half full (pack), the one with the largest share free (spread), the next one by turns. Nodes
are leaves of a tree whose blocks know the most that any node below them has of each resource, so
that a search looks at a few blocks, however many nodes there are.
Who calls: the node machine.
May touch: nothing.
Invariants: a block's numbers are never less than any of its nodes' (a node that got fuller may
leave them too large, until a search comes by); a search finds a node if there is one. `pack` and
`next_fit` answer as if they had looked at every node, `emptiest` does so among a hundred or so.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, final

from poolray.ids import NodeId

Amounts: TypeAlias = Mapping[str, int]

#: Children of a block.
_WIDTH = 8
#: Blocks that a search for the emptiest node looks into; then the best that it has seen will do.
#: Up to a hundred nodes that is all of them.
_LOOKS_MAX = 16
#: The same among more nodes, where a look at 16 would cost as much as all the rest of a decision.
_LOOKS_OF_MANY_MAX = 9
#: Shares of a resource that are free, as whole numbers.
_WHOLE = 1 << 20

_Kind: TypeAlias = Callable[["_Leaf | _Block"], dict[str, int]]
_free: _Kind = operator.attrgetter("free")
_half: _Kind = operator.attrgetter("half")
_share: _Kind = operator.attrgetter("share")
_ALL = (_free, _half, _share)


@final
class _Leaf:
    """One node."""

    __slots__ = ("free", "half", "node_id", "share", "total")

    def __init__(self, node_id: NodeId, total: Amounts, free: Amounts) -> None:
        self.node_id = node_id
        self.total = total
        self.set_free(free)

    def set_free(self, free: Amounts) -> None:
        """It has this much free now."""
        total = self.total
        self.free = free
        #: What may be taken until half of the resource is in use.
        self.half = {name: free.get(name, 0) - amount // 2 for name, amount in total.items()}
        self.share = {
            name: free.get(name, 0) * _WHOLE // amount for name, amount in total.items() if amount
        }

    def score(self, demand: Amounts) -> int:
        """The smallest share that is free of a resource that is asked for."""
        return _least(self.share, demand)


@final
class _Block:
    """Some nodes, or blocks of them."""

    __slots__ = ("children", "free", "half", "share")

    def __init__(self, children: list[_Block | _Leaf | None]) -> None:
        self.children = children
        self.free: dict[str, int] = {}
        self.half: dict[str, int] = {}
        self.share: dict[str, int] = {}

    def raise_to(self, item: _Leaf | _Block) -> bool:
        """What is below has this much; False when that is no news."""
        is_news = False
        for of in _ALL:
            mine = of(self)
            for name, amount in of(item).items():
                if amount > mine.get(name, -1):
                    mine[name] = amount
                    is_news = True
        return is_news

    def tighten(self, names: Iterable[str], *kinds: _Kind) -> None:
        """Work numbers out anew."""
        children = [child for child in self.children if child is not None]
        for of in kinds:
            mine = of(self)
            for name in names:
                most = -1
                for child in children:
                    amount = of(child).get(name, -1)
                    if amount > most:
                        most = amount
                if most < 0:
                    mine.pop(name, None)
                else:
                    mine[name] = most


def _least(shares: Amounts, demand: Amounts) -> int:
    least = _WHOLE
    for name, amount in demand.items():
        if amount:
            share = shares.get(name, 0)
            if share < least:
                least = share
    return least


def _has(amounts: Amounts, demand: Amounts) -> bool:
    for name, amount in demand.items():  # noqa: SIM110 - a generator costs more than the loop
        if amounts.get(name, 0) < amount:
            return False
    return True


@final
class NodeIndex:
    """Nodes and what each has free.

    Examples
    --------
    >>> index = NodeIndex()
    >>> index.put(NodeId(b"a"), {"CPU": 4}, {"CPU": 2})
    >>> index.put(NodeId(b"b"), {"CPU": 4}, {"CPU": 4})
    >>> index.pack({"CPU": 2}), index.emptiest({"CPU": 2}), index.pack({"CPU": 3})
    (b'b', b'b', None)
    """

    __slots__ = ("_free_places", "_leaves", "_levels", "_places", "cursor")

    def __init__(self) -> None:
        #: Node -> its place among the leaves.
        self._places: dict[NodeId, int] = {}
        self._leaves: list[_Leaf | None] = []
        self._free_places: list[int] = []
        #: Blocks of leaves, blocks of these, up to a single one.
        self._levels: list[list[_Block]] = []
        #: Where `next_fit` goes on.
        self.cursor = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._places

    # ---- changes ---------------------------------------------------------------------------------

    def put(self, node_id: NodeId, total: Amounts, free: Amounts) -> None:
        """A node is new, or has another amount free."""
        place = self._places.get(node_id)
        if place is None:
            if self._free_places:
                place = heapq.heappop(self._free_places)
            else:
                place = len(self._leaves)
                self._grow()
            self._places[node_id] = place
        leaf = self._leaves[place]
        if leaf is None or leaf.total != total:
            leaf = _Leaf(node_id, total, free)
            self._set(place, leaf)
        else:
            leaf.set_free(free)
        for level in self._levels:
            place //= _WIDTH
            if not level[place].raise_to(leaf):
                break  # what is above knows at least as much

    def remove(self, node_id: NodeId) -> None:
        """A node is gone."""
        place = self._places.pop(node_id, None)
        if place is not None:
            self._set(place, None)
            heapq.heappush(self._free_places, place)

    def _set(self, place: int, leaf: _Leaf | None) -> None:
        self._leaves[place] = leaf
        self._levels[0][place // _WIDTH].children[place % _WIDTH] = leaf

    def _grow(self) -> None:
        """Room for one more leaf, and blocks above it."""
        place = len(self._leaves)
        self._leaves.append(None)
        if not self._levels:
            self._levels.append([])
        child: _Block | _Leaf | None = None
        for level in self._levels:
            place, within = divmod(place, _WIDTH)
            if place < len(level):
                if within < len(level[place].children):
                    return
                level[place].children.append(child)
                return
            made = _Block([child])
            level.append(made)
            child = made
        while len(self._levels[-1]) > 1:
            top = self._levels[-1]
            blocks = []
            for start in range(0, len(top), _WIDTH):
                block = _Block(list(top[start : start + _WIDTH]))
                for below in top[start : start + _WIDTH]:
                    block.raise_to(below)
                blocks.append(block)
            self._levels.append(blocks)

    # ---- searches --------------------------------------------------------------------------------

    def pack(self, demand: Amounts) -> NodeId | None:
        """The first node that would be at most half full of anything that is asked for."""
        found = self._first(demand, 0, _half)
        return None if found is None else found[1]

    def next_fit(self, demand: Amounts) -> NodeId | None:
        """The next node by turns that has room; None at the end of a round, after which the next
        one begins.
        """
        found = self._first(demand, self.cursor, _free)
        if found is None:
            self.cursor = 0
            return None
        self.cursor = found[0] + 1
        return found[1]

    def _first(self, demand: Amounts, start: int, of: _Kind) -> tuple[int, NodeId] | None:
        """The first node from a place on whose amounts cover a demand."""
        if not self._levels:
            return None
        return self._first_below(self._levels[-1][0], len(self._levels), 0, start, demand, of)

    def _first_below(
        self,
        block: _Block,
        height: int,
        first: int,
        start: int,
        demand: Amounts,
        of: _Kind,
    ) -> tuple[int, NodeId] | None:
        height -= 1
        span = _WIDTH**height  # leaves below each child
        place = first - span
        for child in block.children:
            place += span
            if child is None or place + span <= start or not _has(of(child), demand):
                continue
            if isinstance(child, _Leaf):
                return place, child.node_id
            found = self._first_below(child, height, place, start, demand, of)
            if found is not None:
                return found
            child.tighten(demand, of)
        return None

    def emptiest(self, demand: Amounts) -> NodeId | None:
        """The node with room that has the largest share free of what is asked for, or nearly so."""
        best = self._best(demand)
        return None if best is None else best[1]

    def emptier_than(self, demand: Amounts, share: int) -> NodeId | None:
        """The same, if it has more than such a share free."""
        best = self._best(demand)
        return best[1] if best is not None and best[0] > share else None

    def _best(self, demand: Amounts) -> tuple[int, NodeId] | None:
        if not self._levels:
            return None
        #: (-the most that may be left, place, height, what), the best first.
        heap: list[tuple[int, int, int, _Block | _Leaf]] = []
        top, height = self._levels[-1][0], len(self._levels)
        heap.append((-_WHOLE, 0, height, top))
        found: tuple[int, int, NodeId] | None = None  # (-share, place, node): the best so far
        looks = 0
        looks_max = _LOOKS_MAX if len(self._levels[0]) < _LOOKS_MAX else _LOOKS_OF_MANY_MAX
        while heap:
            bound, place, height, item = heapq.heappop(heap)
            if isinstance(item, _Leaf):
                return -bound, item.node_id
            looks += 1
            if looks > looks_max and found is not None:
                return -found[0], found[2]
            height -= 1
            span = _WIDTH**height
            best = -1
            place -= span
            for child in item.children:
                place += span
                if child is None:
                    continue
                # (`_has` and `_least` in one: this is where many nodes cost more than few.)
                free, share = child.free, child.share
                score = _WHOLE
                for name, amount in demand.items():
                    if free.get(name, 0) < amount:
                        break
                    if amount and share.get(name, 0) < score:
                        score = share.get(name, 0)
                else:
                    if score > best:
                        best = score
                    if found is not None and -score > found[0]:
                        continue  # a node with more is known
                    if not height and (found is None or -score < found[0]):
                        found = (-score, place, child.node_id)  # type: ignore[union-attr]
                    heapq.heappush(heap, (-score, place, height, child))
            if best < -bound:
                item.tighten(demand, _free, _share)  # it promised more than it had
        return None

    # ---- checks ----------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when a block knows less than a node below it has."""
        for place, leaf in enumerate(self._leaves):
            if leaf is None:
                continue
            assert self._places[leaf.node_id] == place
            number = place
            for level in self._levels:
                number //= _WIDTH
                block = level[number]
                for mine, its in (
                    (block.free, leaf.free),
                    (block.half, leaf.half),
                    (block.share, leaf.share),
                ):
                    for name, amount in its.items():
                        assert amount < 0 or amount <= mine.get(name, -1), name


def score(total: Amounts, free: Amounts, demand: Amounts) -> int:
    """The smallest share that a node has free of what is asked for, for `emptier_than`."""
    return _Leaf(NodeId(b""), total, free).score(demand)


def is_half_full(total: Amounts, free: Amounts, demand: Amounts) -> bool:
    """Whether a node would be more than half full of something that is asked for."""
    return any(
        free.get(name, 0) - amount < total.get(name, 0) // 2
        for name, amount in demand.items()
        if amount
    )
