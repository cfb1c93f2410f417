"""A whole cluster on a bench: nodes, their head, and links that carry when they are told to.

What: `MiniCluster` wires `ActorBench`es and a `Head`; messages wait until `carry`; a node is killed
with `kill`; the head with `restart_head`.
Who calls: `test_cluster_*.py`.
May touch: nothing.
Invariants: links deliver once and in order; invariants of every machine hold after every message.
"""

from __future__ import annotations

import itertools

from msgspec.structs import replace

from poolray.config import Config
from poolray.head.head import Head
from poolray.head.state import SendNode
from poolray.ids import ActorId, NodeId, TaskId, WorkerId
from poolray.node.effects import SendChunk, SendCreation, SendHead, SendPeer
from poolray.protocol.directory import StoreCreation
from poolray.protocol.node import ChunkData, Heartbeat, RegisterNode, Tick
from poolray.protocol.node import HeadBack as HeadBackMessage
from poolray.protocol.values import Outcome
from poolray.protocol.worker import ActorStarted, RunTasks
from tests.unit.node_harness import CPU
from tests.unit.test_node_actors import ActorBench

CONFIG = Config()
A, B, C, D = (NodeId(letter * 28) for letter in (b"A", b"B", b"C", b"D"))


class MiniCluster:
    """Nodes with so many CPUs each, in the order A, B, C, …."""

    def __init__(self, *cpus: float, **config: object) -> None:
        self.head = Head(CONFIG)
        self.now = 100.0
        self.tables: dict[str, dict[bytes, bytes]] = {}
        self.nodes: dict[NodeId, ActorBench] = {}
        self._config = config
        self._links: list[tuple[NodeId, NodeId]] = []
        counter = itertools.count(1)
        for node_id, count in zip((A, B, C, D), cpus, strict=False):
            self.add(node_id, count, counter)
        self.refresh()

    def add(self, node_id: NodeId, cpus: float, ids: itertools.count[int] | None = None) -> None:
        """A node joins."""
        first = 1 + 100_000 * (1 + len(self.nodes))
        node = ActorBench(
            cpus=cpus,
            node_id=node_id,
            has_head=True,
            ids=ids or itertools.count(10_000 * first),
            first_id=first,
            **self._config,
        )
        self.nodes[node_id] = node
        self._tell_head(node_id, node.node.register())

    # ---- links -----------------------------------------------------------------------------------

    def _tell_head(self, sender: bytes, message: object) -> None:
        sent = self.head.handle(sender, message, self.now)  # type: ignore[arg-type]
        self.head.check_invariants()
        for change in self.head.take_changes():
            rows = self.tables.setdefault(change.table, {})
            if change.value is None:
                rows.pop(change.key, None)
            else:
                rows[change.key] = change.value
        self.deliver(sent)

    def deliver(self, sent: list[SendNode]) -> None:
        """What the head says arrives."""
        for effect in sent:
            if effect.node_id in self.nodes:
                self.nodes[effect.node_id].tell(effect.message, b"")

    def carry(self, *, head: bool = True) -> None:
        """All that was sent arrives, and what that leads to."""
        while any(self._carry_from(node_id, head) for node_id in list(self.nodes)):
            pass

    def _carry_from(self, node_id: NodeId, head: bool) -> bool:
        node, moved = self.nodes[node_id], False
        for effect in node.effects[:]:
            if isinstance(effect, SendHead) and head:
                node.effects.remove(effect)
                self._tell_head(node_id, effect.message)
            elif isinstance(effect, SendPeer):
                node.effects.remove(effect)
                if effect.node_id in self.nodes:
                    self.nodes[effect.node_id].tell(effect.message, node_id)
            elif isinstance(effect, SendChunk):
                node.effects.remove(effect)
                data = b"D" * effect.size_bytes
                chunk = ChunkData(
                    object_id=effect.object_id,
                    offset=effect.offset,
                    data=data,
                    number=effect.number,
                )
                if effect.node_id in self.nodes:
                    self.nodes[effect.node_id].tell(chunk, node_id)
            elif isinstance(effect, SendCreation) and head:
                node.effects.remove(effect)
                self._store_creation(node_id, effect)
            else:
                continue
            moved = True
        return moved

    def _store_creation(self, node_id: NodeId, effect: SendCreation) -> None:
        """As a shell that reads the parts where they are."""
        parts = [
            p if isinstance(p.value, bytes) else replace(p, value=b"D" * p.value.size_bytes)
            for p in effect.creation.parts
        ]
        creation = replace(effect.creation, parts=parts)
        self._tell_head(node_id, StoreCreation(actor_id=effect.actor_id, creation=creation))

    # ---- time and death --------------------------------------------------------------------------

    def refresh(self) -> None:
        """Every node reports what it has free."""
        self.pass_time(2 * CONFIG.heartbeat_interval_s)

    def pass_time(self, seconds: float) -> None:
        """Time passes; nodes that live say so."""
        end = self.now + seconds
        while self.now < end:
            self.now += CONFIG.heartbeat_interval_s
            for node_id, node in list(self.nodes.items()):
                if node_id in self.nodes:
                    available = dict(node.node.state.resources.available)
                    beat = Heartbeat(node_id=node_id, available=available, queued_tasks=0)
                    self._tell_head(node_id, beat)
            self._tell_head(b"", Tick())
            self.carry()

    def kill(self, node_id: NodeId) -> None:
        """A machine is gone, and declared dead."""
        del self.nodes[node_id]
        for _ in range(60):
            self.pass_time(CONFIG.heartbeat_interval_s)
            if node_id in self.head.statistics().dead_nodes:
                return
        raise AssertionError("a silent node is not declared dead")

    def restart_head(self) -> None:
        """The head is killed; another one takes over what was stored; nodes come back to it."""
        for node in self.nodes.values():  # what was on its way is lost
            node.take(SendHead)
        self.head = Head(CONFIG)
        self.now += 1.0
        self.head.restore(self.tables, self.now)
        self.head.check_invariants()
        for node in self.nodes.values():
            node.tell(HeadBackMessage(), b"")
        self.carry()

    # ---- work ------------------------------------------------------------------------------------

    def construct(self, node_id: NodeId) -> WorkerId:
        """A worker of a node runs the constructor that it was sent."""
        worker_id = self.nodes[node_id].construct()
        self.carry()
        return worker_id

    def fail_construct(self, node_id: NodeId, error: bytes) -> None:
        """The constructor raises."""
        node = self.nodes[node_id]
        node.start_all()
        (worker_id,) = node.busy()
        node.read(worker_id)
        node.tell(ActorStarted(worker_id=worker_id, error=error))
        self.carry()

    def run(self, node_id: NodeId, worker_id: WorkerId, *results: bytes | Outcome) -> list[bytes]:
        """A worker runs all that it was sent; gives the payloads, in order."""
        node, seen = self.nodes[node_id], []
        while node.queues.get(worker_id):
            packet = node.queues[worker_id].popleft()
            if isinstance(packet, RunTasks):
                seen += [bytes(call) for task in packet.tasks for call in task.calls]  # type: ignore[arg-type]
                node.finish(worker_id, packet, list(results))
            self.carry()
        return seen

    def live_on_b(self, **options: object) -> tuple[ActorId, WorkerId]:
        """An actor of A that lives on B, for A has no CPU."""
        actor_id = self.nodes[A].create(cpus=1, **options)  # type: ignore[arg-type]
        self.carry()
        return actor_id, self.construct(B)

    def value_at(self, node_id: NodeId, task_id: TaskId) -> str:
        """The value or error of a call, as its caller's node has it."""
        return self.nodes[node_id].error_of(task_id)


__all__ = ["CPU", "A", "B", "C", "D", "MiniCluster", "RegisterNode"]
