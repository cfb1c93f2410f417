"""Questions about all nodes: put to each, the answers passed on as they come.

    client ──QueryState(everywhere)──▶ its node ──PeerQuery──▶ the others
           ◀──StateRows, in parts────           ◀──PeerRows───

What: tells a client of every node's tasks, workers, objects, actors or memory, and which nodes did
not answer in time; of one node's files of logs, which its shell reads (`LookIntoLogs`, `LogsSeen`).
Who calls: `node/node.py`, with questions of clients and peers, answers, deaths and ticks.
May touch: nothing.
Invariants: each question is answered with a last part once, in the time that it names at the
latest; times in rows of other nodes are on this node's clock, as good as half a round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import msgspec

from poolray.ids import ClientId, NodeId
from poolray.node.effects import LookIntoLogs, SendPeer
from poolray.node.memory import in_rows
from poolray.node.observer import Observer, in_parts
from poolray.node.state import NodeState
from poolray.protocol.directory import NodeStatus
from poolray.protocol.memory import MemoryTable
from poolray.protocol.node import LogsSeen, PeerQuery, PeerRows
from poolray.protocol.state import LogWish, QueryState, StateKind, StateRow

#: What every node knows of all the others: nobody else need be asked.
_KNOWN_EVERYWHERE = frozenset({StateKind.NODES})
#: What lies in files: of one node, and its shell is to look.
_IN_FILES = frozenset({StateKind.LOGS, StateKind.LOG_TEXT})


@final
class _Open:
    """A question that has not been answered by all."""

    __slots__ = ("asked_s", "client_id", "deadline_s", "missing", "request_id", "waiting")

    def __init__(
        self,
        client_id: ClientId,
        request_id: int,
        asked_s: float,
        deadline_s: float,
        waiting: dict[NodeId, None],
    ) -> None:
        self.client_id = client_id
        self.request_id = request_id
        self.asked_s = asked_s
        self.deadline_s = deadline_s
        #: Nodes of which the last part has not come.
        self.waiting = waiting
        #: Nodes that will not answer any more.
        self.missing: list[NodeId] = []


@final
class Survey:
    """The questions of this node's clients to all nodes."""

    __slots__ = ("_looks", "_memory_table", "_next", "_observer", "_open", "_state")

    def __init__(
        self,
        state: NodeState,
        observer: Observer,
        memory_table: Callable[[int, int | None], MemoryTable],
    ) -> None:
        self._state = state
        self._observer = observer
        #: Makes one, of the pid of the node's process and the number of objects (None: all).
        self._memory_table = memory_table
        self._next = 0
        #: our number -> question.
        self._open: dict[int, _Open] = {}
        #: our number -> the client or peer that our shell looks into files for, and its number.
        self._looks: dict[int, tuple[ClientId | NodeId, bool, int]] = {}

    def on_query(self, client_id: ClientId, message: QueryState) -> None:
        """A client asks: this node alone, or all of them, or another one."""
        if message.kind in _IN_FILES:
            self._on_query_of_files(client_id, message)
            return
        rows = self._rows(message)
        peers: dict[NodeId, None] = {}
        if message.everywhere and message.kind not in _KNOWN_EVERYWHERE:
            views = self._observer.peers.views.values()
            peers = {v.node_id: None for v in views if v.status is not NodeStatus.DEAD}
        self._observer.reply(client_id, message.request_id, rows, more=bool(peers))
        if peers:
            self._ask(client_id, message, peers)

    def _rows(self, message: QueryState | PeerQuery) -> list[StateRow]:
        if message.kind is not StateKind.MEMORY:
            return self._observer.rows(message.kind, message.limit, message.where)
        own = self._observer.peers.own
        pid = int(own.info.get("pid", 0)) if own is not None else 0
        return [*in_rows(self._memory_table(pid, message.limit or None))]

    def _on_query_of_files(self, client_id: ClientId, message: QueryState) -> None:
        node_id, number = message.of_node, message.request_id
        if not node_id or node_id == self._state.node_id:
            self._look(client_id, True, number, message.kind, message.log)
            return
        view = self._observer.peers.views.get(node_id)
        if view is None or view.status is NodeStatus.DEAD:
            self._observer.reply(client_id, number, [], more=False, missing=[node_id])
        else:
            self._ask(client_id, message, {node_id: None})

    def _ask(self, client_id: ClientId, message: QueryState, peers: dict[NodeId, None]) -> None:
        self._next = number = self._next + 1
        now = self._state.now
        self._open[number] = _Open(
            client_id, message.request_id, now, now + max(0.0, message.timeout_s), dict(peers)
        )
        question = PeerQuery(
            request_id=number,
            kind=message.kind,
            limit=message.limit,
            where=message.where,
            log=message.log,
        )
        self._state.effects.extend(SendPeer(node_id, question) for node_id in peers)

    def _look(
        self, sender: ClientId | NodeId, is_client: bool, number: int, kind: StateKind, log: LogWish
    ) -> None:
        """Have the shell look, for somebody who has given his question this number."""
        self._next += 1
        self._looks[self._next] = sender, is_client, number
        self._state.effects.append(LookIntoLogs(self._next, kind, log))

    def on_logs_seen(self, message: LogsSeen) -> None:
        """The shell has looked."""
        sender, is_client, number = self._looks.pop(message.number)
        if is_client:
            self._observer.reply(ClientId(sender), number, list(message.rows), more=False)
        else:
            self._tell_peer(NodeId(sender), number, list(message.rows))

    def on_peer_query(self, node_id: NodeId, message: PeerQuery) -> None:
        """A peer asks on behalf of one of its clients."""
        if message.kind in _IN_FILES:
            self._look(node_id, False, message.request_id, message.kind, message.log)
            return
        rows = self._rows(message)
        self._tell_peer(node_id, message.request_id, rows)

    def _tell_peer(self, node_id: NodeId, number: int, rows: list[StateRow]) -> None:
        for part, more in in_parts(rows):
            answer = PeerRows(request_id=number, now_s=self._state.now, rows=part, more=more)
            self._state.effects.append(SendPeer(node_id, answer))

    def on_rows(self, node_id: NodeId, message: PeerRows) -> None:
        """A peer has answered, or a part of it."""
        question = self._open.get(message.request_id)
        if question is None or node_id not in question.waiting:
            return  # too late
        # It answered halfway between the question and now, as far as anybody can tell.
        shift_s = (question.asked_s + self._state.now) / 2 - message.now_s
        rows = [_from(row, node_id, shift_s) for row in message.rows]
        if not message.more:
            del question.waiting[node_id]
        if rows:
            self._observer.reply(question.client_id, question.request_id, rows, more=True)
        if not question.waiting:
            self._end(message.request_id)

    def on_node_died(self, node_id: NodeId) -> None:
        """It will not answer."""
        for number, question in list(self._open.items()):
            if node_id in question.waiting:
                del question.waiting[node_id]
                question.missing.append(node_id)
                if not question.waiting:
                    self._end(number)

    def on_client_left(self, client_id: ClientId) -> None:
        """Nobody waits for its answers."""
        for number, question in list(self._open.items()):
            if question.client_id == client_id:
                del self._open[number]

    def on_tick(self) -> None:
        """Time is up for some."""
        for number, question in list(self._open.items()):
            if question.deadline_s <= self._state.now:
                self._end(number)

    def next_deadline(self) -> float | None:
        """When the first question's time is up; None: there is none."""
        if not self._open:
            return None  # nearly always
        return min(question.deadline_s for question in self._open.values())

    def _end(self, number: int) -> None:
        """The last part of an answer."""
        question = self._open.pop(number)
        missing = [*question.missing, *question.waiting]
        self._observer.reply(
            question.client_id, question.request_id, [], more=False, missing=missing
        )


def _from(row: StateRow, node_id: NodeId, shift_s: float) -> StateRow:
    """A row of another node, with times as of this node's clock."""
    changes: dict[str, object] = {}
    if not getattr(row, "node_id", b""):  # (of an actor that lives elsewhere it is known where)
        changes["node_id"] = node_id
    for name in ("started_s", "ended_s"):
        time_s = getattr(row, name, 0.0)
        if time_s:
            changes[name] = time_s + shift_s
    return msgspec.structs.replace(row, **changes)
