"""The shells of the simulation: they carry out what the machines decide.

What: `SimNode` owns a `Node`, its workers and its memory; `SimHead` owns a `Head`.
Who calls: the run, drivers, workers and the network.
May touch: the machines.
Invariants: invariants of a machine are checked after each event; what is read from the arena is
allocated at that moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from poolray.config import Config
from poolray.exceptions import WorkerStartError
from poolray.head.head import Head
from poolray.ids import ClientId, NodeId, ObjectId, TaskId, WorkerId
from poolray.node import effects as fx
from poolray.node.node import Node
from poolray.protocol.actors import ActorReply
from poolray.protocol.client import CallResults, ObjectValues, RangeGranted, WaitReply
from poolray.protocol.directory import StoreCreation
from poolray.protocol.node import (
    ChunkArrived,
    ChunkData,
    ChunksLost,
    FileSealed,
    HeadBack,
    MemoryReport,
    NodeDied,
    PacketsTakenBack,
    RegisterJob,
    RegisterNode,
    RestoreDone,
    RestoreFailed,
    SpillDone,
    SpillFailed,
    Tick,
)
from poolray.protocol.placement import PlacementGroupReply
from poolray.protocol.values import InArena, InFile, Value
from poolray.protocol.worker import RunTasks
from tests.simulation.jobs import Ledger
from tests.simulation.network import HEAD, Endpoint, Network
from tests.simulation.worker import SimWorker
from tests.simulation.world import World

ClientMessages = (
    ObjectValues | WaitReply | RangeGranted | CallResults | ActorReply | PlacementGroupReply
)


def own_file(number: int) -> str:
    """Path of a file that a process was told to write."""
    return f"/own/{number}"


def _placed(data: bytes, offset: int, part: bytes) -> bytes:
    grown = bytearray(data.ljust(offset + len(part), b"?"))
    grown[offset : offset + len(part)] = part
    return bytes(grown)


#: Of chunks, so many go past the links, as over a daemon's bulk channel …
_PAST_LINKS = 0.7
#: … and of these, so many are lost with what they go by, beside what the network loses.
_CHANNEL_ENDS = 0.02


class Ids:
    """Ids that never repeat in a run."""

    def __init__(self) -> None:
        self._count = itertools.count(1)

    def next_task_id(self) -> TaskId:
        return TaskId(b"T%023d" % next(self._count))

    def next_worker_id(self) -> WorkerId:
        return WorkerId(b"W%027d" % next(self._count))

    def next_key(self) -> bytes:
        return b"job %d" % next(self._count)


class SimNode(Endpoint):
    """A machine: a node, its workers, its memory."""

    def __init__(
        self,
        world: World,
        ledger: Ledger,
        ids: Ids,
        network: Network | None,
        name: NodeId,
        config: Config,
        cpus: int,
        arena_bytes: int,
    ) -> None:
        self.world = world
        self.ledger = ledger
        self.ids = ids
        self.network = network
        self.name = name
        self.alive = True
        self.workers: dict[WorkerId, SimWorker] = {}
        self.driver_id = ClientId(b"driver of " + name)
        self.on_driver_reply: Callable[[ClientMessages], None] = lambda message: None
        self.on_group_event: Callable[[fx.GroupFailed | fx.GroupDrained], None]
        self.start_fate: Callable[[int], str] = lambda group_id: ""
        #: What is in memory and on disk.
        self._arena: dict[int, bytes] = {}
        self._files: dict[str, dict[int, bytes]] = {}
        #: number -> a chunk that may come past the links.
        self._expected: dict[int, fx.ExpectChunk] = {}
        #: Chances that a write or read of the disk fails, and that a file turns out to be damaged.
        self.disk_failures = self.damages = 0.0
        #: The chance that memory is found to be short.
        self.shortages = 0.0
        self._paths = itertools.count(1)
        self.node = Node(
            node_id=name,
            config=config,
            resources={"CPU": cpus * 10_000},
            arena_bytes=arena_bytes,
            encode_error=ledger.encode_error,
            next_worker_id=ids.next_worker_id,
            local_client=self.driver_id,
            slots=256,
            has_head=network is not None,
            watches_memory=True,
        )
        self._planned_tick: float | None = None
        self._echoes: list[Any] = []
        self._own_head: Head | None = None
        if network is not None:
            network.join(name, self)
            network.send(name, HEAD, self.node.register())
            network.send(name, HEAD, RegisterJob(job_id=name, node_id=name))

    # ---- the machine -----------------------------------------------------------------------------

    def tell(self, sender: bytes, message: Any) -> None:
        """Give the machine a message and carry out what it wants."""
        if not self.alive:
            return
        self._perform(self.node.handle(sender, message, self.world.now))
        while self._echoes and self.alive:
            echo = self._echoes.pop(0)
            self._perform(self.node.handle(b"", echo, self.world.now))
        if self.alive:
            self._plan_tick()

    def _perform(self, effects: list[fx.Effect]) -> None:
        self.node.check_invariants()
        for effect in effects:
            if self.alive:
                self._act(effect)

    def _plan_tick(self) -> None:
        deadline = self.node.next_deadline()
        if deadline is None or (self._planned_tick is not None and self._planned_tick <= deadline):
            return
        self._planned_tick = deadline
        self.world.at(deadline, self._tick)

    def _tick(self) -> None:
        if not self.alive:
            return
        self._planned_tick = None
        deadline = self.node.next_deadline()
        if deadline is not None and deadline <= self.world.now:
            self.tell(b"", Tick())
            again = self.node.next_deadline()
            assert again is None or again > self.world.now, "a tick that changes nothing"
        else:
            self._plan_tick()

    def _act(self, effect: fx.Effect) -> None:
        world = self.world
        match effect:
            case fx.SendWorker(worker_id=worker_id, message=message):
                worker = self.workers.get(worker_id)
                if worker is not None:
                    worker.queue.append(message)
                    worker.wake()
            case fx.Reply(client_id=client_id, message=reply):
                self._reply(client_id, reply)
            case fx.StartWorker(worker_id=worker_id, group_id=group_id):
                fate = self.start_fate(group_id)
                self.workers[worker_id] = SimWorker(self, worker_id, fate)
            case fx.TerminateWorker(worker_id=worker_id):
                if worker_id in self.workers:
                    killed = self.workers[worker_id]
                    world.after(world.between(1e-5, 1e-3), lambda: killed.die(signal=9))
            case fx.TakeBack(worker_id=worker_id):
                self._take_back(worker_id)
            case fx.Nudge(worker_id=worker_id):
                if worker_id in self.workers:
                    world.after(world.between(1e-6, 1e-4), self.workers[worker_id].on_nudge)
            case fx.Interrupt(worker_id=worker_id, message=order):
                if worker_id in self.workers:
                    ordered = self.workers[worker_id]
                    world.after(world.between(1e-6, 1e-4), lambda: ordered.on_order(order))
            case fx.LookAtCall(worker_id=worker_id):
                self._echoes.append(self.workers[worker_id].look_at_call())
            case fx.GroupFailed() | fx.GroupDrained():
                self.on_group_event(effect)
            case fx.MeasureMemory():
                self._echoes.append(self._measure(effect))
            case fx.Notice():
                pass
            case fx.UnhandledError(value=value):
                assert self.read(value).startswith(b"!")
            case fx.DeleteFile(path=path):
                del self._files[path]
            case fx.DeleteUnsealed(file_number=number):
                self._files.pop(own_file(number), None)
            case fx.SpillObjects():
                before = [self.read(place) for place in effect.places]
                world.after(world.between(1e-4, 1e-1), lambda: self._spill(effect, before))
            case fx.RestoreObject():
                world.after(world.between(1e-4, 1e-1), lambda: self._restore(effect))
            case _:
                self._act_on_network(effect)

    def _measure(self, effect: fx.MeasureMemory) -> MemoryReport:
        """A closer look finds what the first one has found."""
        is_short = effect.is_detailed or self.world.chance(self.shortages)
        self.ledger.shortages += is_short
        return MemoryReport(
            used_bytes=99 if is_short else 10,
            total_bytes=100,
            workers=[(worker_id, 50) for worker_id, _ in effect.workers],
            is_detailed=effect.is_detailed,
        )

    def _act_on_network(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SendPeer(node_id=node_id, message=message):
                assert self.network is not None
                self.network.send(self.name, node_id, message)
            case fx.SendHead(message=message):
                if self.network is not None:
                    self.network.send(self.name, HEAD, message)
                else:
                    self._ask_own_head(message)
            case fx.SendCreation(actor_id=actor_id, creation=creation):
                assert self.network is not None
                parts = [replace(part, value=self.read(part.value)) for part in creation.parts]
                stored = StoreCreation(actor_id=actor_id, creation=replace(creation, parts=parts))
                self.network.send(self.name, HEAD, stored)
            case fx.SendChunk():
                self._send_chunk(effect)
            case fx.ExpectChunk(number=number):
                self._expected[number] = effect
            case fx.ForgetChunks(numbers=numbers):
                for number in numbers:
                    self._expected.pop(number, None)
            case fx.WriteChunk(offset=offset, file_number=number, data=data):
                self._write_chunk(offset, number, data)
            case fx.SealFile():
                delay_s = self.world.between(1e-5, 1e-3)
                self.world.after(delay_s, lambda: self._seal_file(effect))
            case fx.Notice():
                pass  # what waits may find a node later
            case fx.Warn(text=text):
                if "refuses this node" in text:
                    self.crash()  # the head has given it up: going on would do work twice
                else:
                    assert not text.startswith("Objects cannot be spilled") or self.disk_failures
            case _:
                raise AssertionError(f"nobody acts on {effect}")

    def _ask_own_head(self, message: Any) -> None:
        """The head lives in the same process, as in local mode."""
        now = self.world.now
        if self._own_head is None:
            self._own_head = Head(self.node.state.config)
            self._own_head.handle(self.name, self.node.register(), now)
        for sent in self._own_head.handle(self.name, message, now):
            self._echoes.append(sent.message)
        self._own_head.check_invariants()

    # ---- chunks ----------------------------------------------------------------------------------

    def _send_chunk(self, effect: fx.SendChunk) -> None:
        """As a message, or past the links, from memory that is read when it arrives."""
        assert self.network is not None
        part = self._part(effect)
        if effect.by_message or not self.world.chance(_PAST_LINKS):
            chunk = ChunkData(
                object_id=effect.object_id, offset=effect.offset, data=part, number=effect.number
            )
            self.network.send(self.name, effect.node_id, chunk)
            return
        delay_s = self.world.between(1e-5, 1e-2)
        self.world.after(delay_s, lambda: self._carry_chunk(effect, part))

    def _carry_chunk(self, effect: fx.SendChunk, part: bytes) -> None:
        assert self.network is not None
        target = self.network.endpoint(effect.node_id)
        if not isinstance(target, SimNode) or effect.number not in target._expected:
            return  # it is gone, or does not want this any more
        if self.network.is_cut(self.name, effect.node_id):
            self.world.after(0.5, lambda: self._carry_chunk(effect, part))
            return
        expected = target._expected.pop(effect.number)
        if not self.alive or self.network.loses() or self.world.chance(_CHANNEL_ENDS):
            target.tell(b"", ChunksLost(numbers=[effect.number]))
            return
        assert self._part(effect) == part, "memory was used again while it was sent"
        assert (expected.size_bytes, expected.node_id) == (len(part), self.name)
        target._write_chunk(expected.offset, expected.file_number, part)
        target.tell(b"", ChunkArrived(number=effect.number))

    def _part(self, effect: fx.SendChunk) -> bytes:
        """What is to be sent; of a value that is not all here, it may be what is here."""
        place, end = effect.place, effect.offset + effect.size_bytes
        if isinstance(place, InArena):
            self.node.state.allocator.size_of(place.offset)  # raises if it was freed
            data = self._arena[place.offset]
        elif place.path in self._files:
            data = self._files[place.path][place.offset]
        else:
            # (It was deleted since, for whoever asked wants it no more; a shell sees that too.)
            data = b"?" * end
        assert len(data) >= end
        return data[effect.offset : end]

    def _seal_file(self, effect: fx.SealFile) -> None:
        """A thread has looked at a file, if it was not deleted meanwhile."""
        if not self.alive:
            return
        number, place = effect.file_number, None
        file = self._files.get(own_file(number))
        if file is not None:
            file[0] = file.pop(-1)
            assert len(file[0]) == effect.size_bytes
            place = InFile(
                object_id=effect.object_id, path=own_file(number), size_bytes=effect.size_bytes
            )
        message = FileSealed(object_id=effect.object_id, file_number=number, place=place)
        self.tell(b"", message)

    def _write_chunk(self, offset: int, number: int, data: bytes) -> None:
        """Bytes from another node; ranges are granted at page starts."""
        if number:
            file = self._files.setdefault(own_file(number), {-1: b""})
            file[-1] = _placed(file[-1], offset, data)
            return
        try:
            start = self.node.state.allocator.start_of(offset)
        except KeyError:
            # Let go of within the very turn that wrote it: an actor that was killed as soon as what
            # it is made of was here. Nobody can have been given the range since.
            return
        self._arena[start] = _placed(self._arena.get(start, b""), offset - start, data)

    def _reply(self, client_id: ClientId, reply: ClientMessages) -> None:
        if client_id == self.driver_id:
            self.on_driver_reply(reply)
            return
        worker = self.workers.get(WorkerId(client_id))
        if worker is not None:
            self.world.after(1e-5, lambda: worker.on_reply(reply))

    def _take_back(self, worker_id: WorkerId) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:
            return
        sequences = [m.sequence for m in worker.queue if isinstance(m, RunTasks)]
        worker.queue.clear()
        self._echoes.append(PacketsTakenBack(worker_id=worker_id, sequences=sequences))

    # ---- disk ------------------------------------------------------------------------------------

    def _spill(self, effect: fx.SpillObjects, before: list[bytes]) -> None:
        """A thread has written a batch, or could not."""
        if not self.alive:
            return
        assert [self.read(place) for place in effect.places] == before, "memory in use was reused"
        if self.world.chance(self.disk_failures):
            self.tell(b"", SpillFailed(batch=effect.batch, reason="no room", elapsed_s=1e-3))
            return
        path = f"/spilled/{next(self._paths)}"
        self._files[path] = dict(enumerate(before))
        places = [
            InFile(object_id=place.object_id, path=path, size_bytes=place.size_bytes, offset=offset)
            for offset, place in enumerate(effect.places)
        ]
        self.tell(b"", SpillDone(batch=effect.batch, places=places, elapsed_s=1e-3))

    def _restore(self, effect: fx.RestoreObject) -> None:
        """A thread has read a value, or could not."""
        if not self.alive:
            return
        number, place = effect.restore, effect.place
        is_there = place.path in self._files
        is_damaged = self.world.chance(self.damages)
        self.ledger.damages += is_damaged and is_there
        if is_damaged or not is_there or self.world.chance(self.disk_failures):
            self.tell(
                b"",
                RestoreFailed(
                    restore=number,
                    reason="its file is gone",
                    is_lost=is_damaged or not is_there,
                    elapsed_s=1e-3,
                ),
            )
            return
        self._arena[effect.offset] = self.read(place)
        self.tell(b"", RestoreDone(restore=number, elapsed_s=1e-3))

    # ---- memory ----------------------------------------------------------------------------------

    def read(self, value: Value) -> bytes:
        """A value's bytes, from wherever they are."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, InFile):
            return self._files[value.path][value.offset]
        assert value.node_id in (b"", self.name), "a value of another node"
        self.node.state.allocator.size_of(value.offset)  # raises if it was freed
        data = self._arena[value.offset]
        assert len(data) >= value.size_bytes
        return data[: value.size_bytes]

    def write(self, object_id: ObjectId, granted: RangeGranted, data: bytes) -> InArena | InFile:
        """A process writes a large value to the range it was given, or to a file."""
        assert not granted.refusal
        offset = granted.offset
        if offset < 0:
            path = own_file(granted.file_number)
            assert path not in self._files
            self._files[path] = {0: data}
            return InFile(object_id=object_id, path=path, size_bytes=len(data))
        assert self.node.state.allocator.size_of(offset) >= len(data)
        self._arena[offset] = data
        return InArena(object_id=object_id, offset=offset, size_bytes=len(data))

    def start_error(self) -> bytes:
        """What an initializer raises."""
        return self.ledger.encode_error(WorkerStartError(reason="the initializer raised"))

    # ---- the cluster -----------------------------------------------------------------------------

    def on_network(self, sender: NodeId, message: object) -> None:
        """A message of a peer or of the head."""
        self.tell(sender, message)

    def on_restarted(self, sender: NodeId) -> None:
        """The head was started again."""
        assert sender == HEAD
        self.tell(b"", HeadBack())
        if self.network is not None and self.alive:
            self.network.send(self.name, HEAD, RegisterJob(job_id=self.name, node_id=self.name))

    def crash(self) -> None:
        """The machine is gone, with all that is on it."""
        self.alive = False
        self.ledger.node_deaths += 1
        for worker in self.workers.values():
            worker.die()
        if self.network is not None:
            self.network.leave(self.name)

    def files_left(self) -> int:
        """Overflow files that were not deleted."""
        return len(self._files)


class SimHead(Endpoint):
    """The head and its clock."""

    def __init__(self, world: World, network: Network, config: Config, ledger: Ledger) -> None:
        self._ledger = ledger
        self._config = config
        self.head = Head(config)
        #: What is stored: table -> key -> value.
        self.tables: dict[str, dict[bytes, bytes]] = {}
        self.alive = True
        self._world = world
        self._network = network
        self._planned_tick: float | None = None
        network.join(HEAD, self)

    def on_network(self, sender: NodeId, message: object) -> None:
        """A node says something."""
        self._tell(sender, message)

    def crash(self) -> None:
        """The head's process is killed; what it has stored is left."""
        self.alive = False
        self._network.leave(HEAD)

    def restart(self) -> None:
        """Another process takes over what was stored."""
        self.alive = True
        self.head = Head(self._config)
        self.head.restore(self.tables, self._world.now)
        self.head.check_invariants()
        self._network.restart(HEAD, self)
        self._planned_tick = None
        self._plan_tick()

    def _tell(self, sender: bytes, message: Any) -> None:
        if isinstance(message, RegisterNode):
            assert message.node_id == sender
        effects = self.head.handle(sender, message, self._world.now)
        for change in self.head.take_changes():
            rows = self.tables.setdefault(change.table, {})
            if change.value is None:
                rows.pop(change.key, None)
            else:
                rows[change.key] = change.value
        for effect in effects:
            # Also a node that lives may be declared dead, when too many frames get lost.
            self._ledger.node_deaths += isinstance(effect.message, NodeDied)
            self._network.send(HEAD, effect.node_id, effect.message)
        # (Of a thousand nodes, a look at all of them after each word would take the day.)
        if len(self.head.statistics().nodes) < 50 or self._world.events % 101 == 0:
            self.head.check_invariants()
        self._plan_tick()

    def _tick(self, head: Head) -> None:
        if head is self.head and self.alive:
            self._tell(b"", Tick())

    def _plan_tick(self) -> None:
        deadline = self.head.next_deadline()
        if deadline is not None and (
            self._planned_tick is None
            or deadline < self._planned_tick
            or self._planned_tick <= self._world.now
        ):
            self._planned_tick = deadline
            head = self.head
            self._world.at(deadline, lambda: self._tick(head))
