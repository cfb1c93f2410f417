"""Who is a member of the cluster, and lives.

    RegisterNode ──▶ ALIVE ──DrainNode──▶ DRAINING ──LeaveCluster──▶ gone
                       │                     │
                       └────── silence ──────┴──▶ DEAD (for good: it may join again as another)

What: registers nodes, hears their heartbeats, declares the silent ones dead, spreads what each has
free, and takes nodes out politely.
Who calls: `head/head.py`.
May touch: nothing.
Invariants: a node is a member, dead, or unknown; a dead node's id never becomes a member again;
views are sent at most once per heartbeat interval, but for those of the first few nodes that join
in one, which all hear of at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import final

import msgspec

from poolray.head.state import HeadState
from poolray.ids import NodeId
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import DrainStarted
from poolray.protocol.directory import (
    Demand,
    Drain,
    DrainNode,
    ListNodes,
    NodeRow,
    NodesFound,
    NodeStatus,
)
from poolray.protocol.node import (
    ClusterView,
    HeadReply,
    Heartbeat,
    NodeDied,
    NodeView,
    Refused,
    RegisterNode,
)

#: Dead nodes remembered, so that they are refused and listed; the first are forgotten when there
#: are more.
_DEAD_MAX = 10_000
#: Nodes that may join in one heartbeat interval and are told of at once: a thousand nodes that
#: start together would be a million messages.
_AT_ONCE_MAX = 8

_TABLE = "nodes"
_decode_row = msgspec.msgpack.Decoder(NodeRow).decode


@final
class Member:
    """A node that lives, as far as the head knows."""

    __slots__ = ("deadline_s", "demands", "is_alone", "is_asked", "is_busy", "view")

    def __init__(self, view: NodeView, deadline_s: float, is_alone: bool) -> None:
        self.view = view
        #: What waits there, for those who look on (`view` goes around, and is kept small).
        self.demands: list[Demand] = []
        #: It lives in one process with the head, and sends no heartbeats.
        self.is_alone = is_alone
        #: It is to leave if it is idle, and has not said whether it is …
        self.is_asked = False
        #: … or has, and whoever wants to know has not asked again.
        self.is_busy: bool | None = None
        #: It is dead if it has not been heard of until then.
        self.deadline_s = deadline_s


@final
class Members:
    """The nodes of the cluster."""

    __slots__ = (
        *("_at_once", "_changed", "_deadlines", "_next_view_s", "_state"),
        *("dead", "on_gone"),
    )

    def __init__(self, state: HeadState) -> None:
        self._state = state
        #: Told of each node that is gone, after it was taken out and before the others hear of it;
        #: with whether it left politely.
        self.on_gone: Callable[[NodeId, bool], None]
        #: Nodes that died or left, as they were then.
        self.dead: dict[NodeId, NodeRow] = {}
        #: (deadline, node), one entry per member; an entry may be too early, never too late.
        self._deadlines: list[tuple[float, NodeId]] = []
        #: Members whose view has changed since the last that was sent.
        self._changed: dict[NodeId, None] = {}
        #: When views may be sent again …
        self._next_view_s = 0.0
        #: … and how many nodes may join until then and be told of before.
        self._at_once = _AT_ONCE_MAX

    def restore(self, rows: Mapping[bytes, bytes]) -> None:
        """Members as they were in an earlier life of the head: they have time to say that they
        live.
        """
        for row in map(_decode_row, rows.values()):
            if row.status is NodeStatus.DEAD:
                self.dead[row.node_id] = row
                continue
            view = NodeView(
                node_id=row.node_id,
                total=row.total,
                available={},  # nothing is placed there before it is heard of
                queued_tasks=0,
                labels=row.labels,
                address=row.address,
                info=row.info,
                status=row.status,
            )
            self._enter(view, 2 * self._state.config.heartbeat_timeout_s)

    def _enter(self, view: NodeView, patience_s: float, is_alone: bool = False) -> None:
        deadline_s = self._state.now + patience_s
        self._state.members[view.node_id] = Member(view, deadline_s, is_alone)
        heapq.heappush(self._deadlines, (deadline_s, view.node_id))

    # ---- joining ---------------------------------------------------------------------------------

    def register(self, message: RegisterNode) -> bool:
        """A node joins, or is back; False when it is refused."""
        state, node_id = self._state, message.node_id
        if node_id in self.dead:
            self.refuse(node_id)
            return False
        if message.protocol_version != PROTOCOL_VERSION:
            reason = (
                f"node {node_id.hex()[:12]} speaks version {message.protocol_version} of the "
                f"protocol, this cluster version {PROTOCOL_VERSION}: run the same version of "
                "poolray on all machines"
            )
            state.send(node_id, Refused(reason=reason))
            return False
        member = state.members.get(node_id)
        view = NodeView(
            node_id=node_id,
            total=message.total,
            available=message.total,
            queued_tasks=0,
            labels=message.labels,
            address=message.address,
            info=message.info,
            status=NodeStatus.ALIVE if member is None else member.view.status,
        )
        if member is None:
            self._enter(view, state.config.heartbeat_timeout_s, message.is_alone)
        else:  # it lost its link to us, or we were started again, and its time is not up
            member.view = view
            self.heard(node_id)
        self._store(view)
        self._changed[node_id] = None
        state.send(node_id, ClusterView(nodes=[m.view for m in state.members.values()]))
        for peer in message.peers:  # an earlier head may have had no time to say so
            if peer not in state.members:
                state.send(node_id, NodeDied(node_id=peer, reason="is no member"))
        if member is None and self._at_once > 0 and state.now < self._next_view_s:
            # Whoever started it looks for it next, and by way of any node.
            self._at_once -= 1
            self._spread()
        else:
            self.send_views()
        return True

    def _store(self, view: NodeView) -> None:
        row = _row_of(msgspec.structs.replace(view, available={}, queued_tasks=0))
        self._state.store(_TABLE, view.node_id, row)

    def refuse(self, node_id: NodeId) -> None:
        """Tell who is no member why."""
        row = self.dead.get(node_id)
        if row is not None:
            reason = f"node {node_id.hex()[:12]} {row.reason}; it has to join again as a new node"
        else:
            reason = f"node {node_id.hex()[:12]} is not a member: it has to register first"
        self._state.send(node_id, Refused(reason=reason, is_dead=row is not None))

    # ---- health ----------------------------------------------------------------------------------

    def heard(self, node_id: NodeId) -> bool:
        """Any word is a sign of life; False when the speaker is no member."""
        member = self._state.members.get(node_id)
        if member is None:
            return False
        deadline_s = self._state.now + self._state.config.heartbeat_timeout_s
        member.deadline_s = max(member.deadline_s, deadline_s)
        return True

    def on_heartbeat(self, node_id: NodeId, message: Heartbeat) -> None:
        """A member says what it has free."""
        member = self._state.members[node_id]
        member.demands = message.demands
        old = member.view
        if old.available == message.available and old.queued_tasks == message.queued_tasks:
            return
        member.view = msgspec.structs.replace(
            old, available=message.available, queued_tasks=message.queued_tasks
        )
        self._changed[node_id] = None
        self.send_views()

    def send_views(self) -> None:
        """Tell all members what has changed, but not more often than they report it."""
        state = self._state
        if not self._changed or state.now < self._next_view_s:
            return
        self._next_view_s = state.now + state.config.heartbeat_interval_s
        self._at_once = _AT_ONCE_MAX
        self._spread()

    def _spread(self) -> None:
        """Tell all members what has changed."""
        state = self._state
        views = ClusterView(nodes=[state.members[node_id].view for node_id in self._changed])
        self._changed.clear()
        for node_id in state.members:
            state.send(node_id, views)

    def on_tick(self, silence_s: float) -> None:
        """Time has passed; `silence_s` of it since the last event."""
        state = self._state
        if silence_s > state.config.heartbeat_timeout_s / 2:
            # Maybe it was us who stood still, and what the nodes said meanwhile waits to be read.
            grace_s = state.now + 2 * state.config.heartbeat_interval_s
            for member in state.members.values():
                member.deadline_s = max(member.deadline_s, grace_s)
        while self._deadlines and self._deadlines[0][0] <= state.now:
            _, node_id = heapq.heappop(self._deadlines)
            if node_id not in state.members:
                continue  # it has left
            deadline_s = state.members[node_id].deadline_s
            if deadline_s <= state.now:
                reason = (
                    f"was silent for more than {state.config.heartbeat_timeout_s:g} s and was "
                    "declared dead; its work has been given to others"
                )
                self._bury(node_id, reason, polite=False)
            else:
                heapq.heappush(self._deadlines, (deadline_s, node_id))
        self.send_views()

    def next_deadline(self) -> float | None:
        """When to look again."""
        deadline = self._deadlines[0][0] if self._deadlines else None
        if self._changed and (deadline is None or self._next_view_s < deadline):
            return self._next_view_s
        return deadline

    # ---- leaving ---------------------------------------------------------------------------------

    def on_drain(self, sender: NodeId, message: DrainNode) -> None:
        """A member wants a node to end politely."""
        done = not self.drain(message.node_id, message.reason, message.patience_s).refusal
        self._state.send(sender, HeadReply(request_id=message.request_id, done=done))

    def drain(
        self, node_id: NodeId, reason: str, patience_s: float, only_if_idle: bool = False
    ) -> DrainStarted:
        """Begin to take a node out politely; gives what has become of that.

        Parameters
        ----------
        patience_s : float
            Seconds that what it runs may take to end; 0: as long as it wants.
        only_if_idle : bool
            Leave a node alone that runs something, or on which something waits. It is asked: what
            it has begun since its last heartbeat nobody else knows.
        """
        state = self._state
        member = state.members.get(node_id)
        if member is None:
            known = self.dead.get(node_id)
            if known is None:
                return DrainStarted(refusal="the cluster has no such node")
            return DrainStarted(refusal=f"it {known.reason}", has_left=True)
        view = member.view
        if view.status is not NodeStatus.ALIVE:
            return DrainStarted()  # it has been told
        drain = Drain(reason=reason, patience_s=patience_s, only_if_idle=only_if_idle)
        if not only_if_idle:
            self._begin_drain(member)
            state.send(node_id, drain)
            return DrainStarted()
        is_busy, member.is_busy = member.is_busy, None
        if is_busy or view.available != view.total or view.queued_tasks:
            return DrainStarted(refusal="it is not idle")
        if not member.is_asked:  # (an answer cannot get lost: links repeat, and lives end it)
            member.is_asked = True
            state.send(node_id, drain)
        return DrainStarted(is_pending=True)

    def on_drain_answer(self, node_id: NodeId, is_idle: bool) -> None:
        """A node that was to leave if it was idle knows whether it is."""
        member = self._state.members[node_id]
        member.is_asked = False
        if is_idle:
            self._begin_drain(member)
        else:
            member.is_busy = True

    def _begin_drain(self, member: Member) -> None:
        member.view = msgspec.structs.replace(member.view, status=NodeStatus.DRAINING)
        self._changed[member.view.node_id] = None
        self._store(member.view)
        self.send_views()

    def on_leave(self, node_id: NodeId, reason: str) -> None:
        """A member has ended what it had, and goes."""
        self._bury(node_id, f"left the cluster{': ' + reason if reason else ''}", polite=True)

    def _bury(self, node_id: NodeId, reason: str, polite: bool) -> None:
        """A node is gone: it and what belongs to it, for good."""
        state = self._state
        view = state.members.pop(node_id).view
        row = _row_of(view, NodeStatus.DEAD, reason)
        self.dead[node_id] = row
        state.store(_TABLE, node_id, row)
        if len(self.dead) > _DEAD_MAX:
            oldest = next(iter(self.dead))
            del self.dead[oldest]
            state.drop(_TABLE, oldest)
        self._changed.pop(node_id, None)
        for survivor in state.members:
            state.send(survivor, NodeDied(node_id=node_id, reason=reason))
        self.on_gone(node_id, polite)

    # ---- looking in ------------------------------------------------------------------------------

    def on_list(self, sender: NodeId, message: ListNodes) -> None:
        """Somebody wants to see the nodes."""
        self._state.send(sender, NodesFound(request_id=message.request_id, nodes=self.rows()))

    def rows(self) -> list[NodeRow]:
        """Nodes: living ones in the order in which they came, then dead ones."""
        rows = [
            msgspec.structs.replace(_row_of(member.view), demands=member.demands)
            for member in self._state.members.values()
        ]
        rows.extend(self.dead.values())
        return rows

    def roomiest(self, demand: Mapping[str, int]) -> NodeId | None:
        """A member that has room for this now, or could have; None: no node lives."""
        best: tuple[bool, bool, int] | None = None
        found: NodeId | None = None
        for node_id, member in self._state.members.items():
            view = member.view
            if view.status is not NodeStatus.ALIVE:
                continue
            fits = all(view.available.get(name, 0) >= q for name, q in demand.items())
            could = all(view.total.get(name, 0) >= q for name, q in demand.items())
            score = (fits, could, view.available.get("CPU", 0))
            if best is None or score > best:
                best, found = score, node_id
        return found

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree."""
        members = self._state.members
        assert not members.keys() & self.dead.keys()
        watched = [node_id for _, node_id in self._deadlines if node_id in members]
        assert sorted(watched) == sorted(members)
        for deadline, node_id in self._deadlines:
            assert node_id not in members or deadline <= members[node_id].deadline_s
        assert self._changed.keys() <= members.keys()


def _row_of(view: NodeView, status: NodeStatus | None = None, reason: str = "") -> NodeRow:
    return NodeRow(
        node_id=view.node_id,
        status=view.status if status is None else status,
        total=view.total,
        available=view.available,
        labels=view.labels,
        address=view.address,
        info=view.info,
        queued_tasks=view.queued_tasks,
        reason=reason,
    )
