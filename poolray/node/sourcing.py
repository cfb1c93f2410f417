"""Who pulls a large object of ours from whom.

    AskSource ──▶ free source? ──yes──▶ UseSource ──▶ it pulls, and serves others meanwhile
                      │ no: waits                        │
                      └──────────── SourceDone ◀─────────┘ it has all of it: one source more

What: the keeper of a large object tells each node that wants it from whom to pull: from a node that
serves nobody yet if there is one. A node that is still pulling is a source too: it passes on each
part as it comes, so that a broadcast takes hardly longer than one transfer. Who comes when others
have all of it is told of several.
Who calls: `node/transfers.py`, with peers' messages.
May touch: nothing.
Invariants: no source serves more than `transfer_fanout` at once by our word; nobody is told to wait
for himself, directly or through others.
"""

from __future__ import annotations

from collections import deque
from typing import final

from poolray.ids import NodeId, ObjectId
from poolray.node.effects import SendPeer
from poolray.node.state import NodeState
from poolray.objects.directory import READY
from poolray.protocol.node import AskSource, SourceDone, UseSource
from poolray.protocol.values import InArena

#: Nodes in a row that pass parts on while they pull: more of them would be late for the last one,
#: and a node that dies would cost more of them what has come.
_DEPTH_MAX = 8


@final
class Sources:
    """Who has a large object of ours, and who wants it."""

    __slots__ = ("copies", "given", "waiting")

    def __init__(self) -> None:
        #: Nodes that have all of it, beside the place that its record names.
        self.copies: dict[NodeId, None] = {}
        #: who pulls -> from whom: the first is its source, parts may come from the others.
        self.given: dict[NodeId, tuple[NodeId, ...]] = {}
        #: Who waits for a source to be free.
        self.waiting: deque[NodeId] = deque()

    def forget(self, node_id: NodeId) -> None:
        """A node has no copy, and wants none."""
        self.copies.pop(node_id, None)
        self.given.pop(node_id, None)
        if node_id in self.waiting:
            self.waiting.remove(node_id)

    def loads(self, location: NodeId) -> dict[NodeId, int]:
        """Who could serve -> how many it serves; complete ones first."""
        loads = dict.fromkeys((location, *self.copies, *self.given), 0)
        for sources in self.given.values():
            for source in sources:
                if source in loads:
                    loads[source] += 1
        return loads

    def depth(self, node_id: NodeId, puller: NodeId) -> int:
        """How many nodes in a row pass parts on to this one; -1: the puller is among them."""
        depth = 0
        while node_id not in self.copies and node_id in self.given:
            if node_id == puller:
                return -1
            depth += 1
            node_id = self.given[node_id][0]
        return -1 if node_id == puller else depth


@final
class Sourcing:
    """The objects that we keep and others pull."""

    __slots__ = ("_dead", "_sources", "_state")

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._sources: dict[ObjectId, Sources] = {}
        #: Peers that are dead, shared with `node/peers.py`.
        self._dead: dict[NodeId, None] = {}

    def share(self, dead: dict[NodeId, None]) -> dict[ObjectId, Sources]:
        """Learn where the dead are listed; gives the table, for others to look at."""
        self._dead = dead
        return self._sources

    def on_ask(self, node_id: NodeId, message: AskSource) -> None:
        """A peer wants the bytes of a large object of ours."""
        if message.object_id not in self._state.objects:
            return  # it has given it back, as we shall hear
        sources = self._sources.setdefault(message.object_id, Sources())
        sources.forget(node_id)
        sources.waiting.append(node_id)
        self.assign(message.object_id)

    def on_done(self, node_id: NodeId, message: SourceDone) -> None:
        """A peer is done with a source that it was given."""
        sources = self._sources.get(message.object_id)
        if sources is None:
            return
        if message.node_id in sources.given.get(node_id, ()):
            del sources.given[node_id]
        if message.is_copied:
            sources.copies[node_id] = None
        else:
            sources.copies.pop(message.node_id, None)
        self.assign(message.object_id)

    def assign(self, object_id: ObjectId) -> None:
        """Give sources to those who wait, as far as there are free ones."""
        sources = self._sources[object_id]
        record = self._state.objects[object_id]
        if record.state is not READY:
            return  # it was lost: who wants it will ask again
        value = record.value
        location = record.location() or self._state.node_id
        name = value.object_id if isinstance(value, InArena) and value.node_id else object_id
        while sources.waiting:
            puller = sources.waiting[0]
            found = self._choose(sources, location, puller)
            if not found:
                return
            sources.waiting.popleft()
            sources.given[puller] = tuple(found)
            best = found[0]
            where = name if best == location else object_id
            # (The place that the record names may know it by another name: it is a first source.)
            more = [node_id for node_id in found[1:] if node_id != location or name == object_id]
            message = UseSource(object_id=object_id, node_id=best, name=where, more=more)
            self._state.effects.append(SendPeer(puller, message))

    def _choose(self, sources: Sources, location: NodeId, puller: NodeId) -> list[NodeId]:
        """The best source for a node, and others that have all of it and nothing to do."""
        config = self._state.config
        loads = sources.loads(location)
        best: NodeId | None = None
        best_rank = (config.transfer_fanout, 0)
        for node_id, load in loads.items():
            depth = 0 if node_id == location else sources.depth(node_id, puller)
            if node_id == puller or not 0 <= depth < _DEPTH_MAX:
                continue
            if (load, depth) < best_rank:
                best, best_rank = node_id, (load, depth)
        if best is None:
            return []
        idle = [
            node_id
            for node_id in (location, *sources.copies)
            if not loads[node_id] and node_id not in (best, puller)
        ]
        is_complete = best == location or best in sources.copies
        return [best, *idle[: config.transfer_sources - 1]] if is_complete else [best]

    def copy_of(self, object_id: ObjectId, not_at: NodeId | None) -> NodeId | None:
        """A node that has told us of a copy, which is not counted on again."""
        sources = self._sources.get(object_id)
        while sources is not None and sources.copies:
            node_id = next(reversed(sources.copies))
            del sources.copies[node_id]
            if node_id != not_at and node_id not in self._dead:
                return node_id
        return None

    def on_forgotten(self, object_id: ObjectId) -> None:
        """An object was freed here."""
        self._sources.pop(object_id, None)

    def on_given_back(self, node_id: NodeId, object_id: ObjectId) -> None:
        """A peer does not need an object any more."""
        sources = self._sources.get(object_id)
        if sources is not None:
            sources.forget(node_id)
            if object_id in self._state.objects:
                self.assign(object_id)

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: it serves nobody, and wants nothing."""
        for object_id, sources in list(self._sources.items()):
            sources.forget(node_id)
            for puller, given in list(sources.given.items()):
                left = tuple(source for source in given if source != node_id)
                if not left:
                    del sources.given[puller]  # it asks again
                elif left != given:
                    sources.given[puller] = left
            if object_id in self._state.objects:
                self.assign(object_id)

    def check_invariants(self) -> None:
        """Raise AssertionError when somebody waits for himself, or is counted twice."""
        for sources in self._sources.values():
            assert not sources.given.keys() & set(sources.waiting)
            for puller, given in sources.given.items():
                assert given
                assert puller not in given, "it is told to pull from itself"
                assert sources.depth(given[0], puller) >= 0, "nodes wait for each other"
