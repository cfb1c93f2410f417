"""Placement groups at the head: which node keeps which bundle.

    RegisterGroup ─▶ PENDING ─PrepareBundles─▶ nodes ─all BundlesPrepared─▶ CommitBundles ─▶ CREATED
                        ▲                        │ one has no room, or dies                    │
                        └─────ReturnBundles──────┘         RESCHEDULING ◀──── a node dies ─────┘

What: assigns bundles to nodes, reserves them in two phases, tries again when there is more room,
finds new places for what died with a node, and tells nodes that watch a group what it is.
Who calls: `head/head.py`, with members' messages and what becomes of members.
May touch: nothing.
Invariants: a group that is CREATED has a live node for each bundle; at the most one attempt of a
group is under way; what was prepared in an attempt is committed or returned; a group that waits is
passed by smaller ones, and tried before those that came later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import msgspec

from poolray.head.state import HeadState
from poolray.ids import PLACEMENT_GROUP_ID_BYTES, NodeId, PlacementGroupId
from poolray.protocol.directory import NodeStatus
from poolray.protocol.node import NodeView, RegisterNode
from poolray.protocol.placement import (
    BundlesPrepared,
    CommitBundles,
    DropGroup,
    FindGroups,
    GroupChanged,
    GroupRow,
    GroupsFound,
    GroupSpec,
    GroupState,
    KeptBundles,
    PlacementHeadRequest,
    PrepareBundles,
    RegisterGroup,
    ReturnBundles,
    WatchGroup,
)
from poolray.scheduling.bundles import Room, Strategy, Wish, assign

#: Groups at once; one more is refused.
_GROUPS_MAX = 100_000
#: Groups that were removed and of which this can still be told; the first are forgotten.
_REMOVED_MAX = 1_000
#: Groups in one answer, so that it fits in a worker's packet.
_ROWS_MAX = 32
#: Groups that are tried in one go.
_TRIES_MAX = 200

_TABLE = "placement_groups"
_decode_row = msgspec.msgpack.Decoder(GroupRow).decode

_PENDING, _CREATED = GroupState.PENDING, GroupState.CREATED
_RESCHEDULING, _REMOVED = GroupState.RESCHEDULING, GroupState.REMOVED


@final
class _Attempt:
    """An assignment that the nodes are being asked for."""

    __slots__ = ("bundles", "deadline_s", "number", "open", "prepared", "refused")

    def __init__(
        self, number: int, bundles: dict[NodeId, dict[int, dict[str, int]]], deadline_s: float
    ) -> None:
        self.number = number
        self.bundles = bundles
        self.deadline_s = deadline_s
        #: Nodes that have not answered.
        self.open: dict[NodeId, None] = dict.fromkeys(bundles)
        self.prepared: dict[NodeId, None] = {}
        self.refused = False


@final
class _Group:
    """A placement group."""

    __slots__ = (
        "attempt",
        "attempts",
        "created_s",
        "is_infeasible",
        "nodes",
        "registered_s",
        "spec",
        "state",
        "watchers",
    )

    def __init__(self, spec: GroupSpec, now: float) -> None:
        self.spec = spec
        self.state = _PENDING
        #: Bundle -> its node, of those that have one for good.
        self.nodes: dict[int, NodeId] = {}
        self.attempt: _Attempt | None = None
        self.attempts = 0
        self.is_infeasible = False
        self.registered_s = now
        self.created_s: float | None = None
        #: Nodes that are told of each change.
        self.watchers: dict[NodeId, None] = {}

    def row(self) -> GroupRow:
        """As others see it."""
        none = NodeId(b"")
        created_s = self.registered_s if self.created_s is None else self.created_s
        return GroupRow(
            spec=self.spec,
            state=self.state,
            nodes=[self.nodes.get(index, none) for index in range(len(self.spec.bundles))],
            attempts=self.attempts,
            is_infeasible=self.is_infeasible,
            created_after_s=created_s - self.registered_s,
        )

    def wish(self) -> Wish:
        """The bundles that have no node."""
        spec = self.spec
        left = {n: bundle for n, bundle in enumerate(spec.bundles) if n not in self.nodes}
        labels = {n: spec.labels[n] for n in left} if spec.labels else {}
        return Wish(Strategy(spec.strategy), left, labels, self.nodes, spec.preferred)


@final
class PlacementGroups:
    """The placement groups of a cluster."""

    __slots__ = (
        "_by_name",
        "_charged",
        "_groups",
        "_is_stale",
        "_numbers",
        "_pending",
        "_removed",
        "_state",
        "_try_again_s",
    )

    def __init__(self, state: HeadState) -> None:
        self._state = state
        self._groups: dict[PlacementGroupId, _Group] = {}
        self._by_name: dict[tuple[str, str], PlacementGroupId] = {}
        #: Groups with bundles that have no node, in the order in which they are tried.
        self._pending: dict[PlacementGroupId, None] = {}
        #: Groups that were removed, oldest first.
        self._removed: dict[PlacementGroupId, GroupRow] = {}
        #: Node -> what it was asked to set aside since it last said what it has free; of a node
        #: without heartbeats, all that it has set aside.
        self._charged: dict[NodeId, dict[str, int]] = {}
        self._numbers = 0
        #: Heartbeats have come since groups were tried; these are tried again at that time.
        self._is_stale = False
        self._try_again_s = 0.0

    def restore(self, rows: Mapping[bytes, bytes]) -> None:
        """Groups as they were in an earlier life of the head; their nodes tell what they keep."""
        for row in map(_decode_row, rows.values()):
            group_id = row.spec.group_id
            if row.state == _REMOVED:
                self._removed[group_id] = row
                continue
            group = self._groups[group_id] = _Group(row.spec, self._state.now)
            group.nodes = {
                index: node_id
                for index, node_id in enumerate(row.nodes)
                if node_id in self._state.members
            }
            group.attempts = row.attempts
            if len(group.nodes) == len(row.spec.bundles):
                group.state = _CREATED
            else:
                group.state = _PENDING if row.state == _PENDING else _RESCHEDULING
                self._pending[group_id] = None
            group.created_s = group.registered_s + row.created_after_s
            if row.spec.name:
                self._by_name[row.spec.namespace, row.spec.name] = group_id

    def _store(self, group: _Group) -> None:
        self._state.store(_TABLE, group.spec.group_id, group.row())

    def _views(self) -> list[NodeView]:
        """Nodes that may get bundles, in the order in which they joined."""
        members = self._state.members.values()
        return [m.view for m in members if m.view.status is NodeStatus.ALIVE]

    def _is_alone(self, node_id: NodeId) -> bool:
        """Whether a node lives in one process with the head and sends no heartbeats."""
        member = self._state.members.get(node_id)
        return member is not None and member.is_alone

    # ---- requests --------------------------------------------------------------------------------

    def on_request(self, node_id: NodeId, message: PlacementHeadRequest) -> None:
        """What a member wants."""
        if isinstance(message, BundlesPrepared):
            self._on_prepared(node_id, message)
        elif isinstance(message, RegisterGroup):
            refusal = self._register(node_id, message.spec)
            self._state.send(node_id, GroupsFound(request_id=message.request_id, refusal=refusal))
        elif isinstance(message, DropGroup):
            group = self._groups.get(message.group_id)
            if group is not None:
                self._remove(group)
            self._state.send(node_id, GroupsFound(request_id=message.request_id))
        elif isinstance(message, WatchGroup):
            self._watch(node_id, message.group_id)
        else:
            self._state.send(
                node_id, GroupsFound(request_id=message.request_id, rows=self._find(message))
            )

    def _register(self, node_id: NodeId, spec: GroupSpec) -> str:
        """A new group; gives why it is refused, or nothing."""
        key = (spec.namespace, spec.name)
        flaw = _flaw_of(spec)
        if flaw:  # (clients look too: this one has not)
            return f"a placement group {flaw}"
        if spec.group_id in self._groups or spec.group_id in self._removed:
            self._watch(node_id, spec.group_id)
            return ""  # the request came twice
        if spec.name and key in self._by_name:
            return (
                f"Failed to create placement group '{spec.group_id.hex()}' because name "
                f"'{spec.name}' already exists."
            )
        if len(self._groups) >= _GROUPS_MAX:
            return f"there are {_GROUPS_MAX} placement groups already: remove some"
        group = self._groups[spec.group_id] = _Group(spec, self._state.now)
        if spec.name:
            self._by_name[key] = spec.group_id
        group.watchers[node_id] = None
        self._pending[spec.group_id] = None
        self._store(group)
        self._try(group)
        if group.attempt is None:
            self._tell(group)
        return ""

    def on_node_back(self, message: RegisterNode) -> None:
        """A node has joined, or is back: it tells what it keeps, and what it wants to hear of."""
        node_id = message.node_id
        for group_id in message.watched_groups:
            self._watch(node_id, group_id)
        for kept in message.bundles:
            self._numbers = max(self._numbers, kept.attempt)
            self._on_kept(node_id, kept)
        self.on_room()

    def _on_kept(self, node_id: NodeId, kept: KeptBundles) -> None:
        """Bundles that a node has: what was said of them last may have been lost."""
        group_id = kept.group_id
        group = self._groups.get(group_id)
        is_its = group is not None and all(group.nodes.get(n) == node_id for n in kept.indexes)
        attempt = None if group is None else group.attempt
        if kept.is_open:
            if group is None:
                self._watch(node_id, group_id)  # it was removed
        elif is_its:
            self._state.send(node_id, CommitBundles(group_id=group_id, attempt=kept.attempt))
        elif attempt is not None and attempt.number == kept.attempt:
            answer = BundlesPrepared(group_id=group_id, attempt=kept.attempt, done=True)
            self._on_prepared(node_id, answer)
        else:
            self._return(node_id, group_id, kept.attempt)

    def _watch(self, node_id: NodeId, group_id: PlacementGroupId) -> None:
        group = self._groups.get(group_id)
        if group is not None:
            group.watchers[node_id] = None
            row = group.row()
        else:
            gone = GroupRow(spec=GroupSpec(group_id=group_id, bundles=[]), state=_REMOVED, nodes=[])
            row = self._removed.get(group_id, gone)
        self._state.send(node_id, GroupChanged(row=row))

    def _find(self, message: FindGroups) -> list[GroupRow]:
        if message.name:
            group_id = self._by_name.get((message.namespace, message.name))
            return [] if group_id is None else [self._groups[group_id].row()]
        if message.group_id:
            group = self._groups.get(message.group_id)
            row = self._removed.get(message.group_id) if group is None else group.row()
            return [] if row is None else [row]
        rows = [*self._removed, *self._groups]
        wanted = rows[message.start : message.start + _ROWS_MAX]
        return [
            self._groups[group_id].row() if group_id in self._groups else self._removed[group_id]
            for group_id in wanted
        ]

    def _tell(self, group: _Group) -> None:
        """Whoever watches a group, or keeps bundles of it, hears what it is now."""
        self._store(group)
        message = GroupChanged(row=group.row())
        for node_id in dict.fromkeys((*group.watchers, *group.nodes.values())):
            self._state.send(node_id, message)

    # ---- placing ---------------------------------------------------------------------------------

    def on_heartbeat(self, node_id: NodeId) -> None:
        """A member has said what it has free. All of them do, so groups are not tried each time."""
        self._charged.pop(node_id, None)
        if self._pending:
            self._is_stale = True
            if self._try_again_s <= self._state.now:
                self.on_room()

    def on_room(self) -> None:
        """A node has joined, or something was given back."""
        self._is_stale = False
        if self._pending:
            self._try_again_s = self._state.now + self._state.config.heartbeat_interval_s
            self._try_pending()

    def _try_pending(self) -> None:
        """Each group that waits, in order; the first that cannot be placed does not stop others."""
        hopeless: list[Wish] = []
        tries = 0
        for group_id in list(self._pending):
            group = self._groups[group_id]
            if group.attempt is not None or any(_alike(group.wish(), wish) for wish in hopeless):
                continue
            tries += 1
            if tries > _TRIES_MAX:
                return
            self._try(group)
            if group.attempt is None:
                hopeless.append(group.wish())
                del hopeless[:-8]

    def _try(self, group: _Group) -> None:
        """Ask nodes for the bundles of a group that have none, if there is an assignment."""
        wish = group.wish()
        rooms = [self._room(view) for view in self._views()]
        found = assign(wish, rooms)
        was_infeasible, group.is_infeasible = group.is_infeasible, False
        if found is None:
            group.attempts += group.attempts == 0
            group.is_infeasible = not self._could_ever_fit(wish)
            if group.is_infeasible != was_infeasible:
                self._tell(group)
            return
        self._numbers += 1
        group.attempts += 1
        by_node: dict[NodeId, dict[int, dict[str, int]]] = {}
        for index in sorted(found):
            by_node.setdefault(found[index], {})[index] = group.spec.bundles[index]
        deadline_s = self._state.now + self._state.config.heartbeat_timeout_s
        group.attempt = _Attempt(self._numbers, by_node, deadline_s)
        for node_id, bundles in by_node.items():
            self._charge(node_id, bundles, 1)
            self._state.send(
                node_id,
                PrepareBundles(
                    group_id=group.spec.group_id,
                    attempt=self._numbers,
                    bundles=bundles,
                    may_wait=self._is_alone(node_id),
                ),
            )

    def _room(self, view: NodeView) -> Room:
        alone = self._is_alone(view.node_id)
        room = Room(view.node_id, view.total if alone else view.available, view.labels)
        room.put(self._charged.get(view.node_id, {}))
        return room

    def _could_ever_fit(self, wish: Wish) -> bool:
        """Whether nodes that ran nothing else could take the whole group."""
        rooms = [Room(v.node_id, v.total, v.labels) for v in self._views()]
        return assign(wish, rooms) is not None

    def _charge(self, node_id: NodeId, bundles: dict[int, dict[str, int]], sign: int) -> None:
        charged = self._charged.setdefault(node_id, {})
        for bundle in bundles.values():
            for name, amount in bundle.items():
                left = charged.get(name, 0) + sign * amount
                if left > 0:
                    charged[name] = left
                else:
                    charged.pop(name, None)

    def _on_prepared(self, node_id: NodeId, message: BundlesPrepared) -> None:
        group = self._groups.get(message.group_id)
        attempt = None if group is None else group.attempt
        if (
            group is None
            or attempt is None
            or attempt.number != message.attempt
            # (An earlier life of the head may have used the same number for another node.)
            or node_id not in attempt.bundles
        ):
            if message.done:  # too late: it was told so, or will be
                self._return(node_id, message.group_id, message.attempt)
            return
        if attempt.open.pop(node_id, 0) is None:
            if message.done:
                attempt.prepared[node_id] = None
            self._settle(group, attempt, not message.done)

    def _settle(self, group: _Group, attempt: _Attempt, refused: bool) -> None:
        """One more node has answered, or will not."""
        attempt.refused = attempt.refused or refused
        if attempt.open:
            return
        if attempt.refused:
            self._give_up(group, attempt)
            return
        group.attempt = None
        for node_id, bundles in attempt.bundles.items():
            group.nodes.update(dict.fromkeys(bundles, node_id))
        for node_id in attempt.bundles:
            commit = CommitBundles(group_id=group.spec.group_id, attempt=attempt.number)
            self._state.send(node_id, commit)
        if len(group.nodes) == len(group.spec.bundles):
            group.state = _CREATED
            del self._pending[group.spec.group_id]
            if group.created_s is None:
                group.created_s = self._state.now
        self._tell(group)

    def _give_up(self, group: _Group, attempt: _Attempt) -> None:
        """An attempt has failed: what was set aside is free again, the group waits."""
        group.attempt = None
        for node_id, bundles in attempt.bundles.items():
            if node_id in attempt.prepared or node_id in attempt.open:
                self._return(node_id, group.spec.group_id, attempt.number)
                self._charge(node_id, bundles, -1)

    def _return(self, node_id: NodeId, group_id: PlacementGroupId, number: int) -> None:
        self._state.send(node_id, ReturnBundles(group_id=group_id, attempt=number))

    # ---- ends ------------------------------------------------------------------------------------

    def _remove(self, group: _Group) -> None:
        """Nobody wants it any more: its nodes end what runs there and have their room back."""
        spec = group.spec
        if group.attempt is not None:
            self._give_up(group, group.attempt)
        group.state = _REMOVED
        self._tell(group)
        for index, node_id in group.nodes.items():
            if self._is_alone(node_id):
                self._charge(node_id, {index: spec.bundles[index]}, -1)
        del self._groups[spec.group_id]
        self._pending.pop(spec.group_id, None)
        if spec.name:
            del self._by_name[spec.namespace, spec.name]
        self._removed[spec.group_id] = group.row()
        if len(self._removed) > _REMOVED_MAX:
            oldest = next(iter(self._removed))
            del self._removed[oldest]
            self._state.drop(_TABLE, oldest)
        self.on_room()

    def on_job_finished(self, job_id: bytes) -> None:
        """A driver has gone, and with it the groups that are not detached."""
        for group in list(self._groups.values()):
            if group.spec.job_id == job_id and not group.spec.detached:
                self._remove(group)

    def on_node_died(self, node_id: NodeId) -> None:
        """A member is dead: what was on it needs another place."""
        self._charged.pop(node_id, None)
        for group in list(self._groups.values()):
            group.watchers.pop(node_id, None)
            attempt = group.attempt
            lost = [index for index, where in group.nodes.items() if where == node_id]
            for index in lost:
                del group.nodes[index]
            if lost:
                if group.state is _CREATED:
                    group.state = _RESCHEDULING
                    # Before those that have never run: work waits for it.
                    self._pending = {group.spec.group_id: None, **self._pending}
                self._tell(group)
            if attempt is not None and node_id in attempt.bundles:
                del attempt.bundles[node_id]
                attempt.open.pop(node_id, None)
                attempt.prepared.pop(node_id, None)
                self._settle(group, attempt, True)
        self.on_room()

    # ---- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When an attempt has to be over; None: none is under way."""
        deadlines = [
            group.attempt.deadline_s
            for group_id in self._pending
            if (group := self._groups[group_id]).attempt is not None and not self._waits(group)
        ]
        if self._pending and self._is_stale:
            deadlines.append(self._try_again_s)
        return min(deadlines, default=None)

    def _waits(self, group: _Group) -> bool:
        """Whether an attempt lasts until there is room: its only node takes its time."""
        assert group.attempt is not None
        return self._is_alone(next(iter(group.attempt.bundles)))

    def on_tick(self) -> None:
        """Attempts that a node has not answered in time fail."""
        late = [
            group
            for group_id in self._pending
            if (group := self._groups[group_id]).attempt is not None
            and group.attempt.deadline_s <= self._state.now
            and not self._waits(group)
        ]
        for group in late:
            assert group.attempt is not None
            self._give_up(group, group.attempt)
        if late or (self._is_stale and self._try_again_s <= self._state.now):
            self.on_room()

    # ---- looking in ------------------------------------------------------------------------------

    def pending(self) -> list[GroupRow]:
        """Groups with bundles that have no place, in the order in which they came."""
        return [self._groups[group_id].row() for group_id in self._pending]

    def count(self) -> int:
        """Groups that have not been removed."""
        return len(self._groups)

    def check_invariants(self) -> None:
        """Raise AssertionError when groups, nodes and attempts do not agree."""
        alive = self._state.members.keys()
        for group_id, group in self._groups.items():
            count = len(group.spec.bundles)
            assert set(group.nodes.values()) <= alive, "a bundle is on a dead node"
            assert (group.state is _CREATED) == (len(group.nodes) == count)
            assert (group_id in self._pending) == (group.state is not _CREATED)
            assert group.state is not _REMOVED
            if group.attempt is not None:
                asked = group.attempt.bundles
                assert group_id in self._pending
                assert group.attempt.open
                assert set(asked) <= alive
                assert not {n for each in asked.values() for n in each} & group.nodes.keys()
            if Strategy(group.spec.strategy) is Strategy.STRICT_SPREAD:
                assert len(set(group.nodes.values())) == len(group.nodes)
            if Strategy(group.spec.strategy) is Strategy.STRICT_PACK:
                assert len(set(group.nodes.values())) <= 1
            assert group.watchers.keys() <= alive
        assert self._pending.keys() <= self._groups.keys()
        assert not self._groups.keys() & self._removed.keys()
        assert self._charged.keys() <= alive


def _alike(one: Wish, other: Wish) -> bool:
    """Whether what stops one group also stops the other."""
    return (
        one.strategy is other.strategy
        and one.bundles == other.bundles
        and one.labels == other.labels
        and not one.placed
        and not other.placed
    )


def _flaw_of(spec: GroupSpec) -> str:
    """What makes no group of this; empty: nothing does."""
    if len(spec.group_id) != PLACEMENT_GROUP_ID_BYTES:
        return f"has an id of {PLACEMENT_GROUP_ID_BYTES} bytes"
    if not 0 <= spec.strategy < len(Strategy):
        return f"has no strategy {spec.strategy}"
    if not spec.bundles or not all(spec.bundles):
        return "has bundles, each with some resource"
    if any(amount <= 0 for bundle in spec.bundles for amount in bundle.values()):
        return "has more than nothing of each resource in a bundle"
    if spec.labels and len(spec.labels) != len(spec.bundles):
        return "has as many conditions on labels as bundles"
    return ""
