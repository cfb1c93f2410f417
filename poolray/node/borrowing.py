"""Objects that nodes lend each other: who keeps what for whom.

    owner ──Lent──▶ borrower ──Lent──▶ borrower's borrower      (each keeps what it lent on)
      ◀─PeerReleases─┘   ◀─AwaitObject, ObjectReady─▶           (values come when they are there)

What: lends objects with tasks, results and values, counts how often, takes in what is lent here,
tells borrowers when a value is there, and decides what a node's death means for what was lent.
Who calls: `node/peers.py` with messages and with tasks that travel; `node/objects.py` when an
object of ours is freed or there.
May touch: nothing.
Invariants: what was lent is held until it was given back as often; a record here has at most one
keeper, so that keepers form no circle; a borrowed object is never made again here: that is its
owner's part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, final

from poolray.exceptions import OwnerDiedError
from poolray.ids import ClientId, NodeId, ObjectId, TaskId, actor_of_handle
from poolray.node.effects import SendPeer
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.objects.directory import READY, ObjectRecord, Request
from poolray.protocol.node import AwaitObject, Lent, ObjectReady, PeerMessage, PeerReleases
from poolray.protocol.values import InArena, InFile, Value
from poolray.tasks.lifecycle import WAITING

if TYPE_CHECKING:
    from poolray.node.tasks import Tasks
    from poolray.node.transfers import Transfers

_PEER_PREFIX = b"node:"

#: A value that nobody may ever read is sent along if it has no more bytes than this.
_EAGER_BYTES_MAX = 4096


def client_of(node_id: NodeId) -> ClientId:
    """A peer as a client: what it holds in our arena, whose tasks we run."""
    return ClientId(_PEER_PREFIX + node_id)


def node_of(client_id: ClientId) -> NodeId:
    """The peer that a client is."""
    return NodeId(client_id[len(_PEER_PREFIX) :])


def is_peer(client_id: ClientId) -> bool:
    """Whether a client is a peer."""
    return client_id.startswith(_PEER_PREFIX)


@final
class Borrowing:
    """What this node lent to others and borrowed from them."""

    __slots__ = (
        "_awaiting",
        "_leaving",
        "_lent",
        "_objects",
        "_requests",
        "_returns",
        "_state",
        "_store",
        "borrowed",
        "dead",
        "tasks",
        "transfers",
    )

    def __init__(
        self, state: NodeState, store: Store, objects: Objects, dead: dict[NodeId, None]
    ) -> None:
        self._state = state
        self._store = store
        self._objects = objects
        self.tasks: Tasks
        self.transfers: Transfers
        #: Peers that are dead for good.
        self.dead = dead
        #: peer -> object -> how often it was lent and not given back; no zeros. The peer holds it
        #: as a client meanwhile.
        self._lent: dict[NodeId, dict[ObjectId, int]] = {}
        #: Objects here that are not ours: `Objects.originals` says who keeps each for us.
        self.borrowed: dict[ObjectId, None] = {}
        #: (peer, object that it was lent) -> its wait for the object to be there.
        self._awaiting: dict[tuple[NodeId, ObjectId], Request] = {}
        #: Peers that are about to leave: what they keep for us is fetched and kept here.
        self._leaving: dict[NodeId, None] = {}
        #: Number of the last request in a peer's name.
        self._requests = 0
        #: peer -> what is given back to it with the next message.
        self._returns: dict[NodeId, list[ObjectId]] = {}
        objects.on_awaited = self._on_there
        objects.give_back = self.give_back
        objects.on_forgotten = self._on_forgotten

    def _send(self, node_id: NodeId, message: PeerMessage) -> None:
        self._state.effects.append(SendPeer(node_id, message))

    # ---- lending ---------------------------------------------------------------------------------

    def lend(self, node_id: NodeId, object_ids: Iterable[ObjectId], *, needed: bool) -> list[Lent]:
        """Let a peer name objects of ours, with all that their values refer to.

        Parameters
        ----------
        needed : bool
            The peer will read them: small values go along.
        """
        lent: list[Lent] = []
        done: dict[ObjectId, None] = {}
        for object_id in object_ids:
            self._lend(node_id, object_id, needed, lent, done)
        return lent

    def _lend(
        self,
        node_id: NodeId,
        object_id: ObjectId,
        needed: bool,
        lent: list[Lent],
        done: dict[ObjectId, None],
    ) -> None:
        # What a value refers to comes before it; chains of values may be long.
        pending = [(object_id, False)]
        while pending:
            current, is_ready = pending.pop()
            if is_ready:
                lent.append(self._described(node_id, current, needed and current == object_id))
            elif current not in done:
                done[current] = None
                self.count(node_id, current)
                pending.append((current, True))
                pending.extend((inner, False) for inner in self._state.objects[current].contained)

    def count(self, node_id: NodeId, object_id: ObjectId) -> None:
        """An object is lent to a peer, once more."""
        counts = self._lent.setdefault(node_id, {})
        counts[object_id] = count = counts.get(object_id, 0) + 1
        if count == 1:
            self._objects.add_references(client_of(node_id), [object_id])

    def _described(self, node_id: NodeId, object_id: ObjectId, needed: bool) -> Lent:
        record = self._state.objects[object_id]
        if record.state is not READY:
            if actor_of_handle(object_id) is None:
                self._subscribe(node_id, object_id)
            return Lent(object_id=object_id)
        if record.is_error:
            record.seen = True  # its reader is elsewhere
            needed = True
        limit = len(record.value) if needed and isinstance(record.value, bytes) else 0
        return Lent(
            object_id=object_id,
            value=self.portable(record.value, object_id, max(limit, _EAGER_BYTES_MAX)),
            is_error=record.is_error,
            contained=record.contained,
        )

    def portable(self, value: Value, object_id: ObjectId, inline_max: int) -> bytes | InArena:
        """A value as another node can use it: the bytes, or in whose arena it is under which name.
        What is in a file of ours counts as in our arena: we read it when it is asked for.
        """
        if isinstance(value, bytes):
            if len(value) <= inline_max:
                return value
            size_bytes = len(value)
        elif isinstance(value, InArena) and value.node_id:
            return value
        else:
            size_bytes = value.size_bytes
        return InArena(
            object_id=object_id, offset=0, size_bytes=size_bytes, node_id=self._state.node_id
        )

    def on_releases(self, node_id: NodeId, object_ids: list[ObjectId]) -> None:
        """A peer gives back what it was lent."""
        counts = self._lent.get(node_id)
        if counts is None:
            return
        over = []
        for object_id in object_ids:
            count = counts.get(object_id, 0)
            if count > 1:
                counts[object_id] = count - 1
            elif count:
                del counts[object_id]
                over.append(object_id)
                self._forget_await(node_id, object_id)
        if not counts:
            del self._lent[node_id]
        self.transfers.on_given_back(node_id, over)
        self._objects.release_references(client_of(node_id), over)

    # ---- values that are not there yet -----------------------------------------------------------

    def _subscribe(self, node_id: NodeId, object_id: ObjectId) -> None:
        """Tell a peer when an object is there: it waits for it like a client."""
        if (node_id, object_id) in self._awaiting:
            return
        self._requests += 1
        request = Request(client_of(node_id), self._requests, [object_id], 1, False)
        request.is_peers = True
        self._awaiting[node_id, object_id] = request
        self._objects.await_for(request)

    def _forget_await(self, node_id: NodeId, object_id: ObjectId) -> None:
        request = self._awaiting.pop((node_id, object_id), None)
        if request is not None:
            self._objects.forget_await(request)

    def _on_there(self, client_id: ClientId, object_id: ObjectId) -> None:
        """An object is there that a peer waits for."""
        node_id = node_of(client_id)
        self._awaiting.pop((node_id, object_id), None)
        record = self._state.objects.get(object_id)
        if record is None or object_id not in self._lent.get(node_id, ()):
            return
        inner = self.lend(node_id, record.contained, needed=False)
        described = self._described(node_id, object_id, needed=False)
        self._send(node_id, ObjectReady(object=described, lent=inner))

    def on_await(self, node_id: NodeId, message: AwaitObject) -> None:
        """A peer did not find what it was lent where we said."""
        object_id = message.object_id
        record = self._state.objects.get(object_id)
        if record is None or object_id not in self._lent.get(node_id, ()):
            return  # it gives it back, as we shall hear
        if record.state is READY and record.location() == message.lost_at:
            self.tasks.lineage.on_object_lost(object_id, record, "its node no longer has it")
        record = self._state.objects.get(object_id)
        if record is not None and record.state is READY:
            self._on_there(client_of(node_id), object_id)
        elif record is not None:
            self._subscribe(node_id, object_id)

    # ---- borrowing -------------------------------------------------------------------------------

    def adopt(self, node_id: NodeId, lent: list[Lent]) -> list[ObjectId]:
        """Take in what a peer lends.

        Returns
        -------
        list of ObjectId
            Those that are new here, held once for the caller, who lets go of them.
        """
        fresh: list[ObjectId] = []
        for item in lent:
            object_id = item.object_id
            record = self._state.objects.get(object_id)
            if record is None:
                record = self._state.objects[object_id] = ObjectRecord(1)
                fresh.append(object_id)
                self._objects.originals[object_id] = (node_id, object_id)
                self.borrowed[object_id] = None
                self._objects.on_handle(object_id, node_id)
            else:
                # It is known by another way already, which is enough: so nobody keeps in a circle.
                self._adopt_again(node_id, record, item)
            self._fill(record, item)
        return fresh

    def _adopt_again(self, node_id: NodeId, record: ObjectRecord, item: Lent) -> None:
        """Something is lent that is known here by another way, which is enough, mostly."""
        object_id = item.object_id
        originals = self._objects.originals
        was_lost = record.state is READY and record.is_error and not item.is_error
        if not was_lost or item.value is None or object_id in originals:
            self._return(node_id, object_id)
            return
        # Its bytes were lost here; who lends it has them (again).
        if not isinstance(record.value, bytes):
            self._store.forget(object_id)
        originals[object_id] = (node_id, object_id)
        self.borrowed[object_id] = None
        self._objects.lose(object_id, record)
        record.is_error = False

    def _fill(self, record: ObjectRecord, item: Lent) -> None:
        """What is said of a borrowed object, if nothing was known of it."""
        object_id, value = item.object_id, item.value
        if value is None or record.state is READY or object_id not in self.borrowed:
            return
        contained = item.contained
        if isinstance(value, InArena) and value.node_id == self._state.node_id:
            # Our own object comes back under another name.
            original = self._state.objects.get(value.object_id)
            if original is None or original.state is not READY or original.location() is not None:
                self._await(object_id, self._state.node_id)
                return
            contained = [*contained, value.object_id]
            for inner in contained:
                self._objects.hold(inner)
            record.seal(original.value, item.is_error, contained)
            self._store.share(object_id, value.object_id)
            self._objects.wake(record)
            return
        if isinstance(value, InArena) and value.node_id in self.dead:
            self._await(object_id, value.node_id)
            return
        self._objects.seal(object_id, record, value, item.is_error, contained, ClientId(b""))

    def on_ready(self, node_id: NodeId, message: ObjectReady) -> None:
        """Something that we borrowed is there."""
        fresh = self.adopt(node_id, message.lent)
        object_id = message.object.object_id
        record = self._state.objects.get(object_id)
        if record is not None and self._objects.originals.get(object_id, ())[:1] == (node_id,):
            self._fill(record, message.object)
        self._objects.release_all(fresh)

    def _await(self, object_id: ObjectId, lost_at: NodeId) -> None:
        keeper, name = self._objects.originals[object_id]
        self._send(keeper, AwaitObject(object_id=name, lost_at=lost_at))

    def on_lost(self, object_id: ObjectId, record: ObjectRecord, lost_at: NodeId) -> None:
        """The bytes of a borrowed object are not where they were: its keeper knows more."""
        keeper, _ = self._objects.originals[object_id]
        if keeper in self.dead:
            self._lose_owner(object_id, record)
            return
        self._objects.lose(object_id, record)
        if object_id in self._state.objects:
            self._await(object_id, lost_at)

    def take_over(self, node_id: NodeId, object_id: ObjectId) -> None:
        """The value of what we borrowed was made here, for its owner: now we keep it for him."""
        if self._objects.originals.get(object_id) == (node_id, object_id):
            del self._objects.originals[object_id]
            self.borrowed.pop(object_id, None)
            self._return(node_id, object_id)

    def keep_result(
        self, node_id: NodeId, value: InArena | InFile, writer: ClientId, inner: list[ObjectId]
    ) -> None:
        """A large result of a peer's task stays here, lent to the peer."""
        name = value.object_id
        record = self._state.objects.get(name)
        if record is not None and record.state is READY:
            # Known here already, as the argument of another task, and made once more.
            self._objects.discard(value, writer)
            self.count(node_id, name)
            return
        if record is None:
            record = self._state.objects[name] = ObjectRecord()
        self.count(node_id, name)
        self._objects.seal(name, record, value, False, inner, writer)
        self.take_over(node_id, name)

    # ---- giving back -----------------------------------------------------------------------------

    def give_back(self, node_id: NodeId, name: ObjectId) -> None:
        """What another node keeps for us is not needed any more."""
        if node_id not in self.dead:
            self._return(node_id, name)

    def _return(self, node_id: NodeId, name: ObjectId) -> None:
        self._returns.setdefault(node_id, []).append(name)

    def lent_count(self) -> int:
        """Objects that others were lent and have not given back."""
        return sum(len(counts) for counts in self._lent.values())

    def flush(self) -> None:
        """Send what is to be given back; once per event, after all else that it led to."""
        if self._returns:
            returns, self._returns = self._returns, {}
            for node_id, object_ids in returns.items():
                if node_id not in self.dead:
                    self._send(node_id, PeerReleases(object_ids=object_ids))

    def _on_forgotten(self, object_id: ObjectId) -> None:
        """An object was freed here."""
        self.transfers.on_forgotten(object_id)
        self.borrowed.pop(object_id, None)

    # ---- nodes that leave ------------------------------------------------------------------------

    def kept_for_peers(self) -> dict[NodeId, list[ObjectId]]:
        """Large values that are here and that others count on."""
        objects, kept = self._state.objects, {}
        for node_id, counts in self._lent.items():
            names = [
                object_id
                for object_id in counts
                if (record := objects[object_id]).state is READY
                and not isinstance(record.value, bytes)
                and record.location() is None
                and object_id not in self.borrowed
            ]
            if names:
                kept[node_id] = names
        return kept

    def on_take(self, node_id: NodeId, object_ids: list[ObjectId]) -> None:
        """A peer is about to leave: what it keeps for us comes here."""
        self._leaving[node_id] = None
        names = dict.fromkeys(object_ids)
        for object_id, (keeper, name) in list(self._objects.originals.items()):
            if keeper != node_id or name not in names:
                continue
            record = self._state.objects.get(object_id)
            if record is None or record.state is not READY:
                continue
            if record.location() is None:
                self.on_local(object_id)
            else:
                self.transfers.pull(object_id)

    def on_local(self, object_id: ObjectId) -> None:
        """A value is here: who is about to leave need not keep it."""
        if not self._leaving:
            return
        record = self._state.objects.get(object_id)
        original = self._objects.originals.get(object_id)
        if record is None or original is None or original[0] not in self._leaving:
            return
        if record.state is READY and record.location() is None:
            del self._objects.originals[object_id]
            self.borrowed.pop(object_id, None)
            self.give_back(*original)

    # ---- death -----------------------------------------------------------------------------------

    def on_node_died(self, node_id: NodeId) -> None:
        """A peer is dead: nothing is lent to it, and what it lent has no owner."""
        self._lent.pop(node_id, None)
        self._returns.pop(node_id, None)
        self._leaving.pop(node_id, None)
        for pair in [pair for pair in self._awaiting if pair[0] == node_id]:
            self._forget_await(*pair)
        originals = self._objects.originals
        for object_id in [o for o in self.borrowed if originals[o][0] == node_id]:
            record = self._state.objects.get(object_id)
            if record is None or object_id not in self.borrowed:
                continue
            location = record.location() if record.state is READY else None
            if actor_of_handle(object_id) is not None or (
                record.state is READY and location is None
            ):
                # (The fate of an actor is the head's to tell.)
                del originals[object_id]
                del self.borrowed[object_id]  # our copy is all there is
            else:
                self._lose_owner(object_id, record)

    def _lose_owner(self, object_id: ObjectId, record: ObjectRecord) -> None:
        node_id, _ = self._objects.originals.pop(object_id)
        self.borrowed.pop(object_id, None)
        if record.state is READY:
            self._objects.lose(object_id, record)
        for task_id in list(record.dependents or ()):
            waiting = self._state.tasks.get(TaskId(task_id))
            if waiting is not None and waiting.state is WAITING and waiting.is_foreign:
                self.tasks.give_back(waiting)  # its owner may know another way to the argument
        if object_id not in self._state.objects:
            return
        error = OwnerDiedError(
            object_id=object_id.hex(),
            reason=f"node {node_id.hex()[:12]}, which owned it, or lent it to this one, is dead",
        )
        encoded = self._state.encode_error(error)
        self._objects.seal(object_id, record, encoded, True, [], ClientId(b""))

    # ---- looking in ------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise AssertionError when what was lent and borrowed is not what is held."""
        clients = self._state.clients
        for node_id, counts in self._lent.items():
            assert node_id not in self.dead
            assert counts, "an empty table of what was lent"
            held = clients[client_of(node_id)].held
            for object_id, count in counts.items():
                assert count > 0
                assert object_id in held, "what was lent is not held"
        for object_id in self.borrowed:
            assert object_id in self._state.objects, "a borrowed object is gone"
            assert object_id in self._objects.originals, "a borrowed object has no keeper"
        assert not self._returns, "what is to be given back was not sent"
