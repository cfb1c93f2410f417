"""What detached actors are made of, where the node that made them may be gone.

    keeper: class, arguments ──SendCreation──▶ shell reads them ──StoreCreation──▶ head, its storage
    next keeper ◀──KeepActor, with all of it── head            (when the first one is dead)

What: when a detached actor's large class, large arguments, and the values of refs among these are
given to the head; how they find room here when this node is to keep such an actor.
Who calls: `node/hosting.py`, `node/actors.py` when an actor is made; the store with places.
May touch: nothing.
Invariants: a small actor without refs travels in its entry and never comes here; what is being
brought here is held until the actor is kept; an actor is kept when all of it is here, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, final

import msgspec

from poolray.actors.lifecycle import DEAD
from poolray.ids import ActorId, ClientId, GroupId, ObjectId
from poolray.node.actor_record import Actor
from poolray.node.effects import SealFile, SendCreation, Warn, WriteChunk
from poolray.node.objects import Objects
from poolray.node.state import NodeState
from poolray.node.store import Store
from poolray.objects.directory import READY, ObjectRecord
from poolray.protocol.actors import CreateActor
from poolray.protocol.client import AllocateRange, RangeGranted
from poolray.protocol.directory import ActorEntry, Creation, CreationPart, KillKept
from poolray.protocol.node import FileSealed
from poolray.protocol.values import FunctionDefinition, InArena, TaskClass, Value

if TYPE_CHECKING:
    from poolray.node.actors import Actors

#: The client in whose name places are asked for.
IMPORTER = ClientId(b"importer")
_NOBODY = ClientId(b"")


@final
class _Import:
    """A detached actor that this node is about to keep."""

    __slots__ = ("creation", "entry", "held", "kill", "missing")

    def __init__(self, entry: ActorEntry, creation: Creation) -> None:
        self.entry = entry
        self.creation = creation
        #: Its parts, each held once.
        self.held: list[ObjectId] = []
        #: Those of them that have no place yet.
        self.missing: dict[ObjectId, None] = {}
        #: Somebody wants it killed as soon as it is kept.
        self.kill: KillKept | None = None


@final
class Creations:
    """What it takes to make detached actors: offered to the head, and taken over from it."""

    __slots__ = (
        "_awaited",
        "_imports",
        "_objects",
        "_placing",
        "_requests",
        "_state",
        "_store",
        "keep",
        "local",
    )

    def __init__(self, state: NodeState, store: Store, objects: Objects) -> None:
        self._state = state
        self._store = store
        self._objects = objects
        self.local: Actors
        #: Told of actors all of whose parts are here.
        self.keep: Callable[[ActorEntry, Creation, KillKept | None], None]
        #: part that is on another node -> actors whose creation waits for it.
        self._awaited: dict[ObjectId, dict[ActorId, None]] = {}
        self._imports: dict[ActorId, _Import] = {}
        #: part without a place -> its value, and whether that is an error.
        self._placing: dict[ObjectId, tuple[bytes, bool]] = {}
        #: request for a place -> the part it is for.
        self._requests: dict[int, ObjectId] = {}
        store.on_granted[IMPORTER] = self._on_granted

    # ---- giving it to the head -------------------------------------------------------------------

    def recipe(self, message: CreateActor) -> Creation | None:
        """All that it takes to make an actor, where that is small and refers to nothing."""
        found = self._class_of(message)
        if found is None or message.task.dependencies:
            return None
        task_class, definition = found
        if _places(message, definition):
            return None
        return Creation(message=message, task_class=task_class, function=definition)

    def _class_of(self, message: CreateActor) -> tuple[TaskClass, FunctionDefinition] | None:
        queue = self._state.classes.get(message.task.class_id)
        if queue is None:
            return None
        definition = self._state.functions.get(queue.task_class.function_id)
        return None if definition is None else (queue.task_class, definition)

    def offer(self, actor: Actor) -> None:
        """Give the head what an actor is made of, unless its entry has that or it is not here."""
        message = actor.message
        if (
            not message.detached
            or not self._state.has_head
            or actor.is_durable
            or actor.hosted_for is not None
            or actor.creation is None
            or actor.life.state is DEAD
        ):
            return
        found = self._class_of(message)
        if found is None:
            return
        task_class, definition = found
        names = [*_places(message, definition), *message.task.dependencies]
        if not names:
            actor.is_durable = True  # its entry says it all
            return
        parts = self._parts(message.actor_id, dict.fromkeys(names))
        if parts is None:
            return
        actor.is_durable = True
        size = sum(_size_of(part.value) for part in parts)
        limit = self._state.config.detached_actor_bytes_max
        if size > limit:
            self._state.effects.append(Warn(_too_large(actor, size, limit)))
            return
        creation = Creation(
            message=message, task_class=task_class, function=definition, parts=parts
        )
        self._state.effects.append(SendCreation(message.actor_id, creation))

    def _parts(self, actor_id: ActorId, names: dict[ObjectId, None]) -> list[CreationPart] | None:
        """Objects with their values; None when some of them are not here (yet)."""
        parts: list[CreationPart] = []
        for object_id in names:
            record = self._state.objects.get(object_id)
            if record is None or record.state is not READY:
                return None
            if record.location() is not None:
                self._awaited.setdefault(object_id, {})[actor_id] = None
                self._objects.pull(object_id)
                return None
            parts.append(
                CreationPart(object_id=object_id, value=record.value, is_error=record.is_error)
            )
        return parts

    def on_local(self, object_id: ObjectId) -> None:
        """An object that was elsewhere is here, or was freed."""
        if self._awaited:
            for actor_id in self._awaited.pop(object_id, ()):
                actor = self.local.actors.get(actor_id)
                if actor is not None:
                    self.offer(actor)

    def on_asked(self, actor_id: ActorId) -> None:
        """The head does not know what an actor of ours is made of."""
        actor = self.local.actors.get(actor_id)
        if actor is not None:
            actor.is_durable = False
            self.offer(actor)

    # ---- taking it over --------------------------------------------------------------------------

    def take_over(self, entry: ActorEntry, creation: Creation) -> None:
        """This node is to keep an actor: what it is made of is brought to its places first."""
        if entry.actor_id in self._imports:
            return
        work = self._imports[entry.actor_id] = _Import(entry, creation)
        for part in creation.parts:
            self._objects_hold(work, part)
        for part in creation.parts:
            if part.object_id in self._placing:
                work.missing[part.object_id] = None
        if not work.missing:
            self._finish(work)

    def _objects_hold(self, work: _Import, part: CreationPart) -> None:
        object_id, value = part.object_id, part.value
        assert isinstance(value, bytes)
        objects = self._state.objects
        record = objects.get(object_id)
        is_lost = record is not None and record.state is READY and record.is_error
        if record is None:
            record = objects[object_id] = ObjectRecord()
        self._objects.hold(object_id)
        work.held.append(object_id)
        if is_lost and not part.is_error:
            # It was borrowed from the node that is dead.
            if not isinstance(record.value, bytes):
                self._store.forget(object_id)
            self._objects.lose(object_id, record)
            record.is_error = False
        elif record.state is READY or record.holders > 1:
            return  # it is here, on its way, or owned by another node that lives
        if len(value) <= self._state.config.inline_max_bytes:
            self._objects.seal(object_id, record, value, part.is_error, [], _NOBODY)
            return
        self._placing[object_id] = (value, part.is_error)
        number = self._store.next_number()
        self._requests[number] = object_id
        message = AllocateRange(request_id=number, object_id=object_id, size_bytes=len(value))
        self._store.on_allocate(IMPORTER, self._objects.client(IMPORTER), message)

    def _on_granted(self, granted: RangeGranted) -> None:
        """The store has found a place for a part, in memory or on disk, or has none at all."""
        object_id = self._requests.pop(granted.request_id)
        value, _ = self._placing[object_id]
        effects = self._state.effects
        if granted.refusal:
            self._on_placed(object_id, value)
        elif granted.file_number:
            effects.append(WriteChunk(0, granted.file_number, value))
            effects.append(SealFile(granted.file_number, object_id, len(value)))
        else:
            effects.append(WriteChunk(granted.offset, 0, value))
            place = InArena(object_id=object_id, offset=granted.offset, size_bytes=len(value))
            self._on_placed(object_id, place)

    def on_file_sealed(self, message: FileSealed) -> bool:
        """A part is in a file, or could not be written; False: it is none of ours."""
        if message.object_id not in self._placing:
            return False
        place = message.place
        self._on_placed(
            message.object_id, self._placing[message.object_id][0] if place is None else place
        )
        return True

    def _on_placed(self, object_id: ObjectId, value: Value) -> None:
        _, is_error = self._placing.pop(object_id)
        record = self._state.objects[object_id]
        self._objects.seal(object_id, record, value, is_error, [], IMPORTER)
        for work in list(self._imports.values()):
            if work.missing.pop(object_id, 0) is None and not work.missing:
                self._finish(work)

    def _finish(self, work: _Import) -> None:
        """All parts are here."""
        actor_id, creation = work.entry.actor_id, work.creation
        del self._imports[actor_id]
        message, function = creation.message, creation.function
        calls = [c if isinstance(c, bytes) else self._store.place_of(c) for c in message.task.calls]
        task = msgspec.structs.replace(message.task, calls=calls)
        if not isinstance(function.blob, bytes):
            blob = self._store.place_of(function.blob)
            if isinstance(blob, InArena):
                self._store.keep_in_memory(function.blob.object_id)
            function = msgspec.structs.replace(function, blob=blob)
        made = msgspec.structs.replace(
            creation, message=msgspec.structs.replace(message, task=task), function=function
        )
        self.keep(work.entry, made, work.kill)
        self._objects.release_all(work.held)

    def put_off(self, message: KillKept) -> bool:
        """Somebody wants an actor killed; False: it is not on its way here."""
        work = self._imports.get(message.actor_id)
        if work is not None and (work.kill is None or message.no_restart):
            work.kill = message
        return work is not None

    # ---- looking in ------------------------------------------------------------------------------

    def expects(self, actor_id: ActorId) -> bool:
        """Whether an actor is on its way here."""
        return actor_id in self._imports

    def expects_in(self, group_id: GroupId) -> bool:
        """Whether an actor is about to live among these workers."""
        return any(work.creation.task_class.group_id == group_id for work in self._imports.values())

    def holds(self) -> Iterator[ObjectId]:
        """What is held for actors that are on their way here."""
        for work in self._imports.values():
            yield from work.held

    def check_invariants(self) -> None:
        """Raise AssertionError when parts are missing that nobody waits for."""
        missing = {o for work in self._imports.values() for o in work.missing}
        assert missing == self._placing.keys(), "a part of an actor is on no way"
        assert all(work.missing for work in self._imports.values())


def _places(message: CreateActor, definition: FunctionDefinition) -> list[ObjectId]:
    """Objects that large arguments and code are in."""
    values = [*message.task.calls, definition.blob]
    return [value.object_id for value in values if not isinstance(value, bytes)]


def _size_of(value: Value) -> int:
    return len(value) if isinstance(value, bytes) else value.size_bytes


def _too_large(actor: Actor, size: int, limit: int) -> str:
    name = actor.message.name or actor.message.actor_id.hex()[:12]
    return (
        f"Detached actor {actor.message.class_name} ({name}) was made with {size >> 20} MiB of "
        f"code and arguments, and the head keeps {limit >> 20} MiB at most: it ends with its node. "
        "Let it read large input itself, or raise POOLRAY_detached_actor_bytes_max."
    )
