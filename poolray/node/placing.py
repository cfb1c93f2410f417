"""Which node runs a task, as far as this one can tell from what the head says of the others.

What: for the class of a task, the peer that is to run it, before this node or in its place.
Who calls: `node/peers.py`, which sends the task there.
May touch: nothing.
Invariants: a peer that is chosen has room by its last view, less what was given to it since; only
a peer that a task asks for by its id is waited for.

    DEFAULT    this node until it is half full, then the first peer that is not; after these the
               emptiest of all. Short calls stay here while they fit: the way costs more.
    SPREAD     this node and all peers by turns
    affinity   that node, busy or not; a soft one only while the node lives and could run it
    labels     among the nodes that meet them; wishes first
    group      where its bundles are
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, final

import msgspec

from poolray.ids import NodeId, PlacementGroupId
from poolray.node.state import NodeState
from poolray.protocol.directory import NodeStatus
from poolray.protocol.node import NodeView
from poolray.protocol.placement import GroupRow
from poolray.protocol.values import LabelMatch, Placement
from poolray.scheduling.group_resources import is_of_group, resources_of
from poolray.scheduling.labels import meets_all, meets_one
from poolray.scheduling.policies import NodeIndex, is_half_full, score
from poolray.tasks.class_queue import ClassQueue

Key: TypeAlias = tuple[tuple[str, int, tuple[str, ...]], ...]

#: Sets of labels that nodes are indexed for at once; the one made first goes when there are more.
_INDEXES_MAX = 64
#: Groups of which the places are known; the first are forgotten (and known again with a change).
_GROUPS_MAX = 10_000
#: Nodes with more room that are looked at one by one; with more, all are searched again.
_GAINED_MAX = 8
#: So many heartbeats after something was given to a node, the head has told of it, or will not.
_CHARGE_HEARTBEATS = 4
_ANY: Sequence[LabelMatch] = ()


@final
class Placing:
    """The choice of nodes.

    Parameters
    ----------
    views : dict of NodeId to NodeView
        Live peers, as the head saw them last; charged with what is given to them.
    """

    __slots__ = (
        "_changed",
        "_charged_s",
        "_charges",
        "_gained",
        "_groups",
        "_indexes",
        "_reports",
        "_state",
        "_version",
        "_views",
        "is_informed",
        "watch_time",
    )

    def __init__(self, state: NodeState, views: dict[NodeId, NodeView]) -> None:
        self._state = state
        self._views = views
        #: The head has told of the cluster: who is not in the views is no member.
        self.is_informed = False
        #: Counts the moments at which there may be more room than before.
        self._version = 1
        #: Nodes that have more room although the version is the same.
        self._gained: dict[NodeId, None] = {}
        #: Node -> what was given to it since its last view.
        self._charges: dict[NodeId, dict[str, int]] = {}
        #: Node -> when it was given something last, of those.
        self._charged_s: dict[NodeId, float] = {}
        #: Makes the node tick at that time at the latest.
        self.watch_time: Callable[[float], None]
        #: Node -> how many views of it there were.
        self._reports: dict[NodeId, int] = {}
        #: Nodes whose views the indexes do not know.
        self._changed: dict[NodeId, None] = {}
        #: Conditions on labels -> these, and the nodes that meet them.
        self._indexes: dict[Key, tuple[Sequence[LabelMatch], NodeIndex]] = {}
        #: Placement group -> nodes with bundles of it.
        self._groups: dict[PlacementGroupId, dict[NodeId, None]] = {}

    # ---- what is known ---------------------------------------------------------------------------

    def note(self, node_id: NodeId) -> None:
        """A view is another one than it was, or gone."""
        self._changed[node_id] = None
        self._charges.pop(node_id, None)
        self._charged_s.pop(node_id, None)
        if node_id in self._views:
            self._reports[node_id] = self._reports.get(node_id, 0) + 1
        else:
            self._reports.pop(node_id, None)
        self._have_gained()

    def report_of(self, node_id: NodeId) -> int:
        """Number of the last view of a node: what was charged to it is void with the next."""
        return self._reports.get(node_id, 0)

    def _have_gained(self) -> None:
        self._version += 1
        self._gained.clear()

    def learn_bundles(self, row: GroupRow) -> None:
        """A group was placed: until its nodes say what is free in it, all of it is."""
        group_id = row.spec.group_id
        placed: dict[NodeId, dict[int, dict[str, int]]] = {}
        for index, node_id in enumerate(row.nodes):
            if node_id in self._views:
                placed.setdefault(node_id, {})[index] = row.spec.bundles[index]
        self._groups.pop(group_id, None)
        if placed:
            self._groups[group_id] = dict.fromkeys(placed)
            if len(self._groups) > _GROUPS_MAX:
                del self._groups[next(iter(self._groups))]
        for node_id, bundles in placed.items():
            view = self._views[node_id]
            available = {**resources_of(group_id, bundles), **view.available}
            self._views[node_id] = msgspec.structs.replace(view, available=available)
        self._have_gained()

    def charge(self, node_id: NodeId, demand: Mapping[str, int]) -> None:
        """A node was given a task: one report of its room is not spent twice."""
        charges = self._charges.setdefault(node_id, {})
        if not charges:
            self.watch_time(self._state.now + self._charge_s())
        self._charged_s[node_id] = self._state.now
        for name, amount in demand.items():
            charges[name] = charges.get(name, 0) + amount
        self._add(node_id, demand, -1)

    def discharge(self, node_id: NodeId, demand: Mapping[str, int]) -> None:
        """A task that was given to a node since its last report is over."""
        charges = self._charges[node_id]
        for name, amount in demand.items():
            charges[name] -= amount
        self._add(node_id, demand, 1)
        self._gained[node_id] = None
        if len(self._gained) > _GAINED_MAX:
            self._have_gained()

    def refuse(self, node_id: NodeId, demand: Mapping[str, int]) -> bool:
        """A node has sent a task back: it has no room for such ones, whatever it reported last.

        Returns
        -------
        bool
            It will not be chosen for one before its next report; False: it needs nothing that a
            node could lack.
        """
        view = self._views.get(node_id)
        if view is None:
            return True
        free = {n: view.available.get(n, 0) for n, amount in demand.items() if amount > 0}
        left = {name: amount for name, amount in free.items() if amount > 0}
        if left:
            self.charge(node_id, left)
        return bool(free)

    def _charge_s(self) -> float:
        return _CHARGE_HEARTBEATS * self._state.config.heartbeat_interval_s

    def on_tick(self) -> bool:
        """Charges that the head would have told of by now, if they were still in use, are void.

        It tells of a node when that has more or less free than it last said: what was taken and
        given back in between is no news, nor is what a task took just when another gave as much.

        Returns
        -------
        bool
            There may be more room.
        """
        now, found = self._state.now, False
        for node_id in list(self._charges):
            due_s = self._charged_s[node_id] + self._charge_s()
            if due_s > now:
                self.watch_time(due_s)
                continue
            self._add(node_id, self._charges[node_id], 1)
            self.note(node_id)
            found = True
        return found

    def _add(self, node_id: NodeId, demand: Mapping[str, int], sign: int) -> None:
        view = self._views[node_id]
        available = dict(view.available)
        for name, amount in demand.items():
            available[name] = available.get(name, 0) + sign * amount
        self._views[node_id] = msgspec.structs.replace(view, available=available)
        self._changed[node_id] = None

    def _index(self, conditions: Sequence[LabelMatch]) -> NodeIndex:
        """The nodes that meet conditions, up to date."""
        if self._changed:
            changed, self._changed = self._changed, {}
            for wanted, index in self._indexes.values():
                for node_id in changed:
                    self._enter(index, wanted, node_id)
        key = tuple((m.key, int(m.operator), tuple(m.values)) for m in conditions)
        known = self._indexes.get(key)
        if known is not None:
            return known[1]
        index = NodeIndex()
        for node_id in self._views:
            self._enter(index, conditions, node_id)
        self._indexes[key] = (conditions, index)
        if len(self._indexes) > _INDEXES_MAX:
            del self._indexes[next(iter(self._indexes))]
        return index

    def _enter(self, index: NodeIndex, conditions: Sequence[LabelMatch], node_id: NodeId) -> None:
        view = self._views.get(node_id)
        if (
            view is None
            or view.status is not NodeStatus.ALIVE
            or (conditions and not meets_all(conditions, view.labels))
        ):
            index.remove(node_id)
            return
        free = view.available
        if len(free) > len(view.total):
            free = {name: amount for name, amount in free.items() if not is_of_group(name)}
        index.put(node_id, view.total, free)

    # ---- choices ---------------------------------------------------------------------------------

    def before_here(self, queue: ClassQueue) -> NodeId | None:
        """A peer that is better than this node, which could run the task itself."""
        placement, demand = queue.task_class.placement, queue.wanted
        if placement is None:
            return None if queue.full_at == self._version else self._less_full(demand)
        if placement.node_id:
            return self._named(placement, demand)
        if placement.spread:
            return self._by_turns(queue, placement)
        if placement.wishes and not meets_all(placement.wishes, self._state.labels):
            for conditions in placement.labels or [[]]:
                found = self._fullest(self._index([*conditions, *placement.wishes]), demand)
                if found is not None:
                    return found
        return None

    def in_place_of_here(self, queue: ClassQueue) -> NodeId | None:
        """A peer for a task that this node cannot run now, or ever."""
        if queue.full_at == self._version:
            # A search has found nothing, and nothing but this may be new.
            if queue.task_class.placement is not None:
                return None
            return next((n for n in self._gained if self.has_room(n, queue)), None)
        found = self._search(queue)
        if found is None:
            queue.full_at = self._version
        return found

    def _search(self, queue: ClassQueue) -> NodeId | None:
        placement, demand = queue.task_class.placement, queue.wanted
        if placement is None:
            return self._fullest(self._index(_ANY), demand)
        if placement.group:
            return self._with_bundle(placement.group, demand)
        if placement.node_id:
            found = self._named(placement, demand)
            if found is not None or not placement.is_soft:
                return found
            if placement.node_id == self._state.node_id and queue.obstacle is None:
                return None  # it is waited for
        for conditions in placement.labels or [[]]:
            index = self._index(conditions)
            if placement.wishes:
                wished = self._fullest(self._index([*conditions, *placement.wishes]), demand)
                if wished is not None:
                    return wished
            if placement.spread:
                found = index.next_fit(demand) or index.next_fit(demand)
            else:
                found = self._fullest(index, demand)
            if found is not None:
                return found
        return None

    def _by_turns(self, queue: ClassQueue, placement: Placement) -> NodeId | None:
        """The next peer in the round; this node's turn comes at its end."""
        if queue.own_turn:
            return None
        found = self._index(_best_of(placement)).next_fit(queue.demand)
        queue.own_turn = found is None
        return found

    def _less_full(self, demand: Mapping[str, int]) -> NodeId | None:
        resources = self._state.resources
        total, free = resources.total, resources.available
        if not is_half_full(total, free, demand):
            return None
        if resources.fits_now(demand) and all(free[name] == total[name] for name in demand):
            return None  # an idle node takes one, be it as large as all of it
        index = self._index(_ANY)
        found = index.pack(demand)
        if found is not None or not resources.fits_now(demand):
            return found
        here = score(total, free, demand)
        return index.emptier_than(demand, here)

    def _fullest(self, index: NodeIndex, demand: Mapping[str, int]) -> NodeId | None:
        """Pack until half full, then spread."""
        return index.pack(demand) or index.emptiest(demand)

    def _named(self, placement: Placement, demand: Mapping[str, int]) -> NodeId | None:
        view = self._views.get(placement.node_id)
        return placement.node_id if view is not None and _could_run(view, demand) else None

    def _with_bundle(self, group_id: PlacementGroupId, demand: Mapping[str, int]) -> NodeId | None:
        best, best_free = None, -1
        for node_id in self._groups.get(group_id, ()):
            view = self._views.get(node_id)
            if view is None:
                continue
            free = view.available
            if all(free.get(name, 0) >= amount for name, amount in demand.items()):
                left = sum(free[name] for name in demand)
                if left > best_free:
                    best, best_free = node_id, left
        return best

    def is_open(self, node_id: NodeId) -> bool:
        """Whether a peer takes tasks."""
        view = self._views.get(node_id)
        return view is not None and view.status is NodeStatus.ALIVE

    def has_room(self, node_id: NodeId, queue: ClassQueue) -> bool:
        """Whether a peer could run a task of a class now."""
        view = self._views.get(node_id)
        return (
            view is not None
            and view.status is NodeStatus.ALIVE
            and all(view.available.get(name, 0) >= q for name, q in queue.wanted.items())
        )

    def may_run(self, queue: ClassQueue) -> bool:
        """Whether some living peer, were it empty, could run a task of a class."""
        placement = queue.task_class.placement
        if placement is not None and (
            placement.group or (placement.node_id and not placement.is_soft)
        ):
            return False  # of those others know
        conditions = placement.labels if placement is not None else []
        return any(
            view.status is NodeStatus.ALIVE
            and _could_run(view, queue.wanted)
            and meets_one(conditions, view.labels)
            for view in self._views.values()
        )

    def never(self, queue: ClassQueue) -> bool:
        """Whether a task waits for a node that is gone, or can never run it."""
        placement = queue.task_class.placement
        if placement is None or not placement.node_id or placement.is_soft:
            return False
        return self.is_informed and self._named(placement, queue.wanted) is None


def _best_of(placement: Placement) -> Sequence[LabelMatch]:
    return placement.labels[0] if placement.labels else _ANY


def _could_run(view: NodeView, demand: Mapping[str, int]) -> bool:
    """Whether an empty node could; of one that says nothing of itself it is assumed."""
    total = view.total
    return not total or all(total.get(name, 0) >= amount for name, amount in demand.items())
