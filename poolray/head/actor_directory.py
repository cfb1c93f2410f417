"""The cluster's actors: which there are, what they are called, where they live.

    RegisterActor ──▶ PENDING ──▶ ALIVE ──▶ DEAD      as their keepers report
                                  │   ▲
              their node died ──▶ RESTARTING          the head decides, the keeper makes it again

What: entries, names, who wants to know where an actor is, and what a node's death means for actors:
made again elsewhere, kept by another node, or dead.
Who calls: `head/head.py`.
May touch: nothing.
Invariants: a name belongs to one actor that is not dead; keeper and host of an actor that is not
dead are members, or empty; who watches an actor hears of every change once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import msgspec

from poolray.head.state import HeadState
from poolray.ids import ActorId, NodeId
from poolray.protocol.directory import (
    ActorAt,
    ActorChanged,
    ActorEntry,
    ActorFound,
    ActorsFound,
    ActorStage,
    AskCreation,
    Creation,
    DropActor,
    FindActor,
    KeepActor,
    KillActorEntry,
    KillKept,
    ListActorEntries,
    RegisterActor,
    RestartActor,
    StoreCreation,
    UnwatchActor,
    WatchActor,
)
from poolray.protocol.node import ListNames, NamesFound, RegisterNode

#: Actors that are not dead, at once; further ones with names are refused theirs.
_ACTORS_MAX = 1_000_000
#: Dead actors remembered, for those who ask where they are.
_DEAD_MAX = 10_000

_TABLE = "actors"
_CREATIONS = "creations"
_decode_entry = msgspec.msgpack.Decoder(ActorEntry).decode
_decode_creation = msgspec.msgpack.Decoder(Creation).decode
_replace = msgspec.structs.replace

_NOWHERE = NodeId(b"")
_ALIVE, _DEAD = ActorStage.ALIVE, ActorStage.DEAD


@final
class ActorDirectory:
    """The actors of the cluster."""

    __slots__ = (
        "_by_node",
        "_creation_bytes",
        "_creations",
        "_dead",
        "_entries",
        "_names",
        "_orphans",
        "_state",
        "_watched",
        "_watchers",
        "find_node",
    )

    def __init__(self, state: HeadState) -> None:
        self._state = state
        #: A node that has room for these resources.
        self.find_node: Callable[[Mapping[str, int]], NodeId | None]
        #: Actors that are not dead.
        self._entries: dict[ActorId, ActorEntry] = {}
        self._dead: dict[ActorId, ActorEntry] = {}
        #: (namespace, name) -> actor that is not dead.
        self._names: dict[tuple[str, str], ActorId] = {}
        #: node -> actors that it keeps or hosts.
        self._by_node: dict[NodeId, dict[ActorId, None]] = {}
        #: detached actor that is not dead -> what it is made with, as far as that is known.
        self._creations: dict[ActorId, Creation] = {}
        self._creation_bytes = 0
        #: Detached actors that wait for a node to keep them.
        self._orphans: dict[ActorId, None] = {}
        #: actor -> nodes that want to know where it is -> who named it to them.
        self._watchers: dict[ActorId, dict[NodeId, NodeId]] = {}
        #: The same the other way round.
        self._watched: dict[NodeId, dict[ActorId, None]] = {}

    # ---- entries ---------------------------------------------------------------------------------

    def restore(
        self, rows: Mapping[bytes, bytes], creations: Mapping[bytes, bytes] | None = None
    ) -> None:
        """Actors as they were in an earlier life of the head."""
        for actor_id, row in (creations or {}).items():
            creation = self._creations[ActorId(actor_id)] = _decode_creation(row)
            self._creation_bytes += _bytes_of(creation)
        for entry in map(_decode_entry, rows.values()):
            if entry.stage is _DEAD:
                self._dead[entry.actor_id] = entry
                continue
            self._enter(entry)
            if not entry.keeper:
                self._orphans[entry.actor_id] = None

    def _enter(self, entry: ActorEntry) -> None:
        """Note an actor that is not dead as it is now."""
        old = self._entries.get(entry.actor_id)
        if old is not None:
            self._leave_nodes(old)
        self._entries[entry.actor_id] = entry
        for node_id in (entry.keeper, entry.host):
            if node_id:
                self._by_node.setdefault(node_id, {})[entry.actor_id] = None
        if entry.name:
            self._names[entry.namespace, entry.name] = entry.actor_id

    def _leave_nodes(self, entry: ActorEntry) -> None:
        for node_id in (entry.keeper, entry.host):
            actors = self._by_node.get(node_id)
            if actors is not None:
                actors.pop(entry.actor_id, None)
                if not actors:
                    del self._by_node[node_id]

    def _change(self, entry: ActorEntry) -> None:
        """An actor that is not dead has changed: note it, keep it, tell who watches."""
        if entry.creation is not None:
            self._keep_creation(entry.actor_id, entry.creation)
            entry = _replace(entry, creation=None)
        self._enter(entry)
        self._state.store(_TABLE, entry.actor_id, entry)
        self._publish(entry)

    def _keep_creation(self, actor_id: ActorId, creation: Creation) -> None:
        """What an actor is made with outlasts its node, as far as there is room for it."""
        size = _bytes_of(creation)
        if (
            actor_id in self._creations
            or size + self._creation_bytes > self._state.config.detached_actors_bytes_max
        ):
            return
        self._creations[actor_id] = creation
        self._creation_bytes += size
        self._state.store(_CREATIONS, actor_id, creation)

    def _drop_creation(self, actor_id: ActorId) -> None:
        creation = self._creations.pop(actor_id, None)
        if creation is not None:
            self._creation_bytes -= _bytes_of(creation)
            self._state.drop(_CREATIONS, actor_id)

    def _bury(self, entry: ActorEntry, death: bytes, reason: str = "") -> None:
        """An actor is dead: its name is free."""
        del self._entries[entry.actor_id]
        self._leave_nodes(entry)
        self._orphans.pop(entry.actor_id, None)
        if entry.name:
            del self._names[entry.namespace, entry.name]
        self._drop_creation(entry.actor_id)
        gone = _replace(entry, stage=_DEAD, death=death, creation=None, description=b"")
        self._note_dead(gone, reason)

    def _note_dead(self, gone: ActorEntry, reason: str) -> None:
        """Who asks for an actor later is told that it is dead, also by the next head."""
        self._dead[gone.actor_id] = gone
        self._state.store(_TABLE, gone.actor_id, gone)
        if len(self._dead) > _DEAD_MAX:
            oldest = next(iter(self._dead))
            del self._dead[oldest]
            self._state.drop(_TABLE, oldest)
        self._publish(gone, reason)

    # ---- what keepers say ------------------------------------------------------------------------

    def on_register(self, sender: NodeId, message: RegisterActor) -> None:
        """There is a new actor."""
        entry = message.entry
        taken = self._names.get((entry.namespace, entry.name)) if entry.name else None
        if taken is not None and taken != entry.actor_id:
            self._reply(sender, message.request_id, self._entries[taken])
            return
        if entry.actor_id in self._dead:  # asked again, after it was made and has died
            self._reply(sender, message.request_id, None)
            return
        if entry.actor_id not in self._entries:
            if len(self._entries) >= _ACTORS_MAX:
                self._reply(sender, message.request_id, None)
                return
            self._change(_replace(entry, keeper=sender))
        self._reply(sender, message.request_id, self._entries[entry.actor_id])

    def _reply(self, node_id: NodeId, request_id: int, entry: ActorEntry | None) -> None:
        if request_id:
            self._state.send(node_id, ActorFound(request_id=request_id, entry=entry))

    def on_changed(self, sender: NodeId, message: ActorChanged) -> None:
        """An actor is at another point of its life."""
        entry = self._entries.get(message.actor_id)
        if entry is None or entry.keeper != sender:
            return  # it was given to another keeper meanwhile, or declared dead
        if message.stage is _DEAD:
            self._bury(entry, message.death)
            return
        if message.host and message.host not in self._state.members:
            return  # it is about to hear of that
        self._change(
            _replace(
                entry,
                stage=message.stage,
                host=message.host,
                pid=message.pid or entry.pid,
                restarts=max(message.restarts, entry.restarts),
            )
        )

    def on_node_back(self, message: RegisterNode) -> None:
        """A node is a member, maybe again: what it has is so, whatever was noted of it here."""
        node_id = message.node_id
        listed = {entry.actor_id: entry for entry in message.actors}
        dead = dict.fromkeys(message.dead_actors)
        for actor_id in list(self._by_node.get(node_id, ())):
            entry = self._entries[actor_id]
            if entry.keeper != node_id or actor_id in listed:
                continue
            if entry.detached and actor_id in self._creations and actor_id not in dead:
                # An earlier head gave it this actor to keep, and had no time to say so.
                self._send_keep(entry)
            else:
                self._bury(entry, b"", "ended while the head was away.")
        for actor_id in message.dead_actors:
            if actor_id not in self._entries and actor_id not in self._dead:
                gone = ActorEntry(actor_id=actor_id, class_name="", keeper=node_id, stage=_DEAD)
                self._note_dead(gone, "ended while the head was away.")
        for entry in message.actors:
            self._take_in(node_id, entry)
        for actor_id in message.watched:
            self.on_watch(node_id, WatchActor(actor_id=actor_id))
        for actor_id in list(self._orphans):
            self._adopt(self._entries[actor_id])

    def _take_in(self, node_id: NodeId, entry: ActorEntry) -> None:
        """A node keeps this actor, which may have been noted otherwise, or not at all."""
        known = self._entries.get(entry.actor_id)
        if known is not None and known.keeper != node_id:
            return
        host = entry.host
        if known is None:
            if entry.actor_id in self._dead:
                return
            if entry.name and (entry.namespace, entry.name) in self._names:
                return
        if not host or host in self._state.members:
            restarts = entry.restarts if known is None else max(entry.restarts, known.restarts)
            self._change(_replace(entry, restarts=restarts))
            if entry.detached and entry.actor_id not in self._creations:
                self._state.send(node_id, AskCreation(actor_id=entry.actor_id))
        elif known is not None and known.restarts > entry.restarts:
            # An earlier head had decided that already, and had no time to say so.
            again = RestartActor(actor_id=entry.actor_id, restarts=known.restarts)
            self._state.send(node_id, again)
        else:
            waiting = _replace(entry, host=_NOWHERE, stage=ActorStage.RESTARTING)
            self._enter(waiting)
            self._lose_host(waiting, host, polite=False)

    def on_creation(self, sender: NodeId, message: StoreCreation) -> None:
        """What a detached actor is made with has come from its keeper."""
        entry = self._entries.get(message.actor_id)
        if entry is not None and entry.detached and entry.keeper == sender:
            self._keep_creation(message.actor_id, message.creation)

    def on_kill(self, message: KillActorEntry) -> None:
        """Somebody wants an actor killed."""
        entry = self._entries.get(message.actor_id)
        if entry is None:
            return
        if entry.keeper:
            kill = KillKept(actor_id=message.actor_id, no_restart=message.no_restart)
            self._state.send(entry.keeper, kill)
        elif message.no_restart:
            self._bury(entry, b"", "was killed by kill().")

    # ---- questions -------------------------------------------------------------------------------

    def on_find(self, sender: NodeId, message: FindActor) -> None:
        """Which actor has this name?"""
        actor_id = self._names.get((message.namespace, message.name))
        entry = None if actor_id is None else self._entries[actor_id]
        self._state.send(
            sender,
            ActorFound(
                request_id=message.request_id,
                entry=entry,
            ),
        )

    def on_list_names(self, sender: NodeId, message: ListNames) -> None:
        """Which names are taken?"""
        space = message.namespace
        names = [name for name in self._names if space is None or name[0] == space]
        self._state.send(sender, NamesFound(request_id=message.request_id, names=names))

    def on_list(self, sender: NodeId, message: ListActorEntries) -> None:
        """Somebody wants to see the actors."""
        entries = [*self._entries.values(), *self._dead.values()]
        rows = [_replace(entry, description=b"") for entry in entries]
        self._state.send(sender, ActorsFound(request_id=message.request_id, actors=rows))

    # ---- where they are --------------------------------------------------------------------------

    def on_watch(self, sender: NodeId, message: WatchActor) -> None:
        """A node wants to know where an actor is."""
        actor_id = message.actor_id
        entry = self._entries.get(actor_id) or self._dead.get(actor_id)
        named_by = message.named_by
        if entry is None and named_by and named_by not in self._state.members:
            self._send_unknown(sender, actor_id)
            return
        if entry is None or entry.stage is not _DEAD:
            self._watchers.setdefault(actor_id, {})[sender] = named_by
            self._watched.setdefault(sender, {})[actor_id] = None
        if entry is not None:
            self._state.send(sender, _place_of(entry))

    def on_unwatch(self, sender: NodeId, message: UnwatchActor) -> None:
        """A node does not care any more."""
        self._unwatch(sender, message.actor_id)

    def _unwatch(self, node_id: NodeId, actor_id: ActorId) -> None:
        watchers = self._watchers.get(actor_id)
        if watchers is None or node_id not in watchers:
            return
        del watchers[node_id]
        if not watchers:
            del self._watchers[actor_id]
        watched = self._watched[node_id]
        del watched[actor_id]
        if not watched:
            del self._watched[node_id]

    def _publish(self, entry: ActorEntry, reason: str = "") -> None:
        place = _place_of(entry, reason)
        for node_id in list(self._watchers.get(entry.actor_id, ())):
            self._state.send(node_id, place)
            if entry.stage is _DEAD:
                self._unwatch(node_id, entry.actor_id)

    def _send_unknown(self, node_id: NodeId, actor_id: ActorId) -> None:
        reason = "is not known: the node that made it has died."
        self._state.send(node_id, ActorAt(actor_id=actor_id, stage=_DEAD, reason=reason))

    # ---- nodes that go ---------------------------------------------------------------------------

    def on_gone(self, node_id: NodeId, polite: bool) -> None:
        """A node is gone: what it kept or hosted is decided again."""
        for actor_id in list(self._watched.get(node_id, ())):
            self._unwatch(node_id, actor_id)
        for actor_id, watchers in list(self._watchers.items()):
            if actor_id not in self._entries:
                for watcher in [w for w, named_by in watchers.items() if named_by == node_id]:
                    self._unwatch(watcher, actor_id)
                    self._send_unknown(watcher, actor_id)
        for actor_id in list(self._by_node.get(node_id, ())):
            entry = self._entries[actor_id]
            if entry.keeper == node_id:
                self._lose_keeper(entry, node_id, polite)
            else:
                self._lose_host(entry, node_id, polite)

    def _lose_keeper(self, entry: ActorEntry, node_id: NodeId, polite: bool) -> None:
        is_host = entry.host == node_id
        if not entry.detached:
            if entry.host and not is_host:
                reason = f"died with its owner: node {node_id.hex()[:12]} is gone."
                self._state.send(entry.host, DropActor(actor_id=entry.actor_id, reason=reason))
            self._bury(entry, b"", _died_with(node_id))
        elif entry.host and not is_host:
            self._adopt(_replace(entry, keeper=entry.host))
        elif entry.actor_id not in self._creations:
            reason = f"{_died_with(node_id)[:-1]}, where alone was what it was made with."
            self._bury(entry, b"", reason)
        elif entry.stage is ActorStage.PENDING:
            self._adopt(_replace(entry, keeper=_NOWHERE, host=_NOWHERE))
        elif is_host and not _may_restart(entry, polite):
            self._bury(entry, b"", _died_with(node_id))
        else:
            # (One that was being restarted by its keeper has been counted already.)
            restarts = entry.restarts + (is_host and not polite)
            self._adopt(
                _replace(
                    entry,
                    keeper=_NOWHERE,
                    host=_NOWHERE,
                    stage=ActorStage.RESTARTING,
                    restarts=restarts,
                )
            )

    def _adopt(self, entry: ActorEntry) -> None:
        """Find a node that keeps a detached actor from now on."""
        keeper = entry.keeper
        if not keeper:
            resources = self._creations[entry.actor_id].task_class.resources
            keeper = self.find_node(resources) or _NOWHERE
        if not keeper:
            self._orphans[entry.actor_id] = None
            self._change(entry)
            return
        self._orphans.pop(entry.actor_id, None)
        kept = _replace(entry, keeper=keeper)
        self._change(kept)
        self._send_keep(kept)

    def _send_keep(self, entry: ActorEntry) -> None:
        creation = self._creations.get(entry.actor_id)
        self._state.send(entry.keeper, KeepActor(entry=_replace(entry, creation=creation)))

    def _lose_host(self, entry: ActorEntry, node_id: NodeId, polite: bool) -> None:
        if not _may_restart(entry, polite):
            place = ActorAt(
                actor_id=entry.actor_id,
                stage=_DEAD,
                reason=_died_with(node_id),
                class_name=entry.class_name,
            )
            if entry.keeper not in self._watchers.get(entry.actor_id, ()):
                self._state.send(entry.keeper, place)
            self._bury(entry, b"", _died_with(node_id))
            return
        restarts = entry.restarts + (not polite)
        self._change(_replace(entry, host=_NOWHERE, stage=ActorStage.RESTARTING, restarts=restarts))
        message = RestartActor(actor_id=entry.actor_id, restarts=restarts)
        self._state.send(entry.keeper, message)

    # ---- looking in ------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """Actors that are not dead, and names."""
        return len(self._entries), len(self._names)

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree."""
        members = self._state.members
        by_node: dict[NodeId, set[ActorId]] = {}
        for actor_id, entry in self._entries.items():
            assert entry.stage is not _DEAD
            assert (entry.stage is _ALIVE) <= bool(entry.host)
            assert (actor_id in self._orphans) == (not entry.keeper)
            for node_id in (entry.keeper, entry.host):
                if node_id:
                    assert node_id in members, "an actor belongs to a node that is gone"
                    by_node.setdefault(node_id, set()).add(actor_id)
            assert entry.creation is None
            assert actor_id not in self._orphans or actor_id in self._creations
            if entry.name:
                assert self._names[entry.namespace, entry.name] == actor_id
        assert self._creations.keys() <= self._entries.keys()
        assert self._creation_bytes == sum(map(_bytes_of, self._creations.values()))
        assert {n: set(actors) for n, actors in self._by_node.items()} == by_node
        assert all(actor_id in self._entries for actor_id in self._names.values())
        assert not self._entries.keys() & self._dead.keys()
        for actor_id, watchers in self._watchers.items():
            assert watchers
            assert actor_id not in self._dead, "a dead actor is watched"
            for node_id in watchers:
                assert node_id in members
                assert actor_id in self._watched[node_id]


def _may_restart(entry: ActorEntry, polite: bool) -> bool:
    """Whether an actor may be made again; what a node took along that left politely is free."""
    limit = entry.max_restarts
    return limit < 0 or entry.restarts < limit or (polite and limit > 0)


def _bytes_of(creation: Creation) -> int:
    """About how much a head keeps of it."""
    values = [*creation.message.task.calls, creation.function.blob]
    values += [part.value for part in creation.parts]
    return sum(len(value) for value in values if isinstance(value, bytes))


def _died_with(node_id: NodeId) -> str:
    return f"died with its node {node_id.hex()[:12]}."


def _place_of(entry: ActorEntry, reason: str = "") -> ActorAt:
    return ActorAt(
        actor_id=entry.actor_id,
        stage=entry.stage,
        host=entry.host,
        death=entry.death,
        reason=reason,
        class_name=entry.class_name,
        ordered=entry.ordered,
    )
