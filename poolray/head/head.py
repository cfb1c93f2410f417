"""The head machine: one per cluster; membership, and what all nodes must agree on.

    nodes ──HeadRequest──▶ ┌─────────────────────────────────────────┐ ──SendNode──▶ nodes
    clock ──────Tick─────▶ │ members  jobs  actors  functions  keys  │
                           └─────────────────────────────────────────┘ ──Change────▶ storage
What: who is a member and alive, what each has free, which jobs, actors, names and functions there
are, and a small key-value store; what a node's death means for all of these.
Who calls: its shell (in-process, the head's daemon, the simulator).
May touch: nothing.
Invariants: a node is a member, dead, or unknown; what belongs to a node goes with it, or is given
to another; a shell with a storage stores `take_changes()` before it sends what `handle` gave it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NoReturn, TypeAlias, final

import msgspec

from poolray.config import Config
from poolray.exceptions import InternalError
from poolray.head.actor_directory import ActorDirectory
from poolray.head.jobs import Jobs
from poolray.head.key_value import KeyValueStore
from poolray.head.members import Members
from poolray.head.placement import PlacementGroups
from poolray.head.state import Change, HeadState, SendNode
from poolray.ids import FunctionId, NodeId
from poolray.protocol.cluster import DrainStarted
from poolray.protocol.directory import (
    ActorChanged,
    DrainAnswer,
    DrainNode,
    FindActor,
    KillActorEntry,
    LeaveCluster,
    ListActorEntries,
    ListJobs,
    ListNodes,
    NodeRow,
    RegisterActor,
    StoreCreation,
    UnwatchActor,
    WatchActor,
)
from poolray.protocol.node import (
    FinishJob,
    FunctionFound,
    HeadGetFunction,
    HeadPutFunction,
    HeadReply,
    HeadRequest,
    Heartbeat,
    KeyValueDelete,
    KeyValueExists,
    KeyValueGet,
    KeyValueList,
    KeyValuePut,
    ListNames,
    RegisterJob,
    RegisterNode,
    Tick,
)
from poolray.protocol.placement import (
    BundlesPrepared,
    DropGroup,
    FindGroups,
    GroupRow,
    RegisterGroup,
    WatchGroup,
)
from poolray.protocol.values import FunctionDefinition

__all__ = ["Change", "Head", "HeadInput", "HeadStatistics", "SendNode"]

#: Functions kept; the one that was put first goes when there are more.
_FUNCTIONS_MAX = 100_000

_encode_key = msgspec.msgpack.Encoder().encode
_decode_key = msgspec.msgpack.Decoder(tuple[str, bytes]).decode
_decode_value = msgspec.msgpack.Decoder(bytes).decode
_KEYS = "keys"

#: All that the head may be told: a node's request, or that time has passed.
HeadInput: TypeAlias = HeadRequest | Tick

_KeyValueRequest: TypeAlias = (
    KeyValuePut | KeyValueGet | KeyValueDelete | KeyValueList | KeyValueExists
)


@dataclasses.dataclass(frozen=True, slots=True)
class HeadStatistics:
    """A snapshot of the head, for tests, the state API and metrics."""

    nodes: tuple[NodeId, ...]
    dead_nodes: tuple[NodeId, ...]
    functions: int
    jobs: int  #: running ones
    actors: int  #: that are not dead
    names: int
    keys: int
    placement_groups: int


@final
class Head:
    """The decisions of one cluster.

    Parameters
    ----------
    config : Config
        Limits and times.
    """

    def __init__(self, config: Config) -> None:
        self._state = state = HeadState(config)
        self._members = Members(state)
        self._jobs = Jobs(state)
        self._actors = ActorDirectory(state)
        self._placement = PlacementGroups(state)
        self._members.on_gone = self._on_gone
        self._jobs.on_finished = self._placement.on_job_finished
        self._actors.find_node = self._members.roomiest
        self._functions: dict[FunctionId, FunctionDefinition] = {}
        #: node -> functions that it has put; a function goes with the last node that has.
        self._put_by: dict[NodeId, dict[FunctionId, None]] = {}
        self._holders: dict[FunctionId, int] = {}
        self._key_value = KeyValueStore()

    def restore(self, tables: Mapping[str, Mapping[bytes, bytes]], now: float) -> None:
        """Take over what an earlier life of the head stored; before any `handle`.

        Parameters
        ----------
        tables : mapping of str to mapping of bytes to bytes
            What the storage has: table -> key -> value of the last `Change` of that row.
        now : float
            Seconds on the shell's monotonic clock.
        """
        self._state.now = now
        self._members.restore(tables.get("nodes", {}))
        self._jobs.restore(tables.get("jobs", {}))
        self._actors.restore(tables.get("actors", {}), tables.get("creations", {}))
        self._placement.restore(tables.get("placement_groups", {}))
        for key, value in tables.get(_KEYS, {}).items():
            space, name = _decode_key(key)
            self._key_value.put(space, name, _decode_value(value), overwrite=True)

    def handle(self, sender: bytes, message: HeadInput, now: float) -> list[SendNode]:
        """Take one message in.

        Parameters
        ----------
        sender : bytes
            The node that says it; empty for the shell's `Tick`.
        message : HeadInput
            What is said.
        now : float
            Seconds on the shell's monotonic clock.

        Returns
        -------
        list of SendNode
            Messages for nodes, in order.
        """
        state = self._state
        silence_s, state.now = now - state.now, now
        node_id = NodeId(sender)
        if isinstance(message, Tick):
            self._members.on_tick(silence_s)
            self._placement.on_tick()
        elif isinstance(message, RegisterNode):
            if self._members.register(message):
                self._actors.on_node_back(message)
                self._placement.on_node_back(message)
        elif self._members.heard(node_id):
            self._on_member(node_id, message)
        else:
            self._members.refuse(node_id)
        effects, state.effects = state.effects, []
        return effects

    def take_changes(self) -> list[Change]:
        """Rows to store, in order; a shell without a storage need not ask.

        Until they are stored, nobody may hear of them: a head that forgot what it had promised
        would promise the same to another.
        """
        changes, self._state.changes = self._state.changes, []
        return changes

    def next_deadline(self) -> float | None:
        """When to send `Tick` at the latest; None: no need."""
        deadline, placement = self._members.next_deadline(), self._placement.next_deadline()
        if placement is not None and (deadline is None or placement < deadline):
            return placement
        return deadline

    def _on_gone(self, node_id: NodeId, polite: bool) -> None:
        """A node is gone: what belongs to it goes, or is given to others."""
        for function_id in self._put_by.pop(node_id, {}):
            self._drop_function(function_id)
        self._placement.on_node_died(node_id)
        self._jobs.on_gone(node_id)
        self._actors.on_gone(node_id, polite)

    # ---- requests of members ---------------------------------------------------------------------

    def _on_member(self, node_id: NodeId, message: HeadRequest) -> None:
        match message:
            case Heartbeat():
                self._members.on_heartbeat(node_id, message)
                self._placement.on_heartbeat(node_id)
            case DrainNode():
                self._members.on_drain(node_id, message)
            case DrainAnswer():
                self._members.on_drain_answer(node_id, message.is_idle)
            case LeaveCluster():
                self._members.on_leave(node_id, message.reason)
            case ListNodes():
                self._members.on_list(node_id, message)
            case HeadPutFunction():
                self._put_function(node_id, message.definition)
            case HeadGetFunction():
                found = self._functions.get(message.function_id)
                reply = FunctionFound(function_id=message.function_id, definition=found)
                self._state.send(node_id, reply)
            case RegisterJob():
                self._jobs.register(message)
            case FinishJob():
                self._jobs.finish(message)
            case ListJobs():
                self._jobs.on_list(node_id, message)
            case RegisterGroup():
                self._register_group(node_id, message)
            case DropGroup() | FindGroups() | WatchGroup() | BundlesPrepared():
                self._placement.on_request(node_id, message)
            case _:
                self._on_actor_or_key(node_id, message)

    def _on_actor_or_key(self, node_id: NodeId, message: HeadRequest) -> None:
        actors = self._actors
        match message:
            case RegisterActor():
                actors.on_register(node_id, message)
            case ActorChanged():
                actors.on_changed(node_id, message)
            case StoreCreation():
                actors.on_creation(node_id, message)
            case FindActor():
                actors.on_find(node_id, message)
            case WatchActor():
                actors.on_watch(node_id, message)
            case UnwatchActor():
                actors.on_unwatch(node_id, message)
            case KillActorEntry():
                actors.on_kill(message)
            case ListNames():
                actors.on_list_names(node_id, message)
            case ListActorEntries():
                actors.on_list(node_id, message)
            case KeyValuePut() | KeyValueGet() | KeyValueDelete():
                self._on_key_value(node_id, message)
            case KeyValueList() | KeyValueExists():
                self._on_key_value(node_id, message)
            case _:
                raise InternalError(f"the head cannot take {message!r}")

    def _register_group(self, node_id: NodeId, message: RegisterGroup) -> None:
        self._placement.on_request(node_id, message)
        job_id = message.spec.job_id
        if not job_id or message.spec.detached or self._state.members[node_id].is_alone:
            return
        if not self._jobs.imply(job_id, node_id):
            self._placement.on_job_finished(job_id)

    def _put_function(self, node_id: NodeId, definition: FunctionDefinition) -> None:
        function_id = definition.function_id
        put = self._put_by.setdefault(node_id, {})
        if function_id in put:
            return
        put[function_id] = None
        self._holders[function_id] = self._holders.get(function_id, 0) + 1
        self._functions[function_id] = definition
        if len(self._functions) > _FUNCTIONS_MAX:
            oldest = next(iter(self._functions))
            del self._functions[oldest]
            del self._holders[oldest]
            for others in self._put_by.values():
                others.pop(oldest, None)

    def _drop_function(self, function_id: FunctionId) -> None:
        self._holders[function_id] -= 1
        if self._holders[function_id] == 0:
            del self._holders[function_id]
            del self._functions[function_id]

    # ---- keys ------------------------------------------------------------------------------------

    def _on_key_value(self, node_id: NodeId, message: _KeyValueRequest) -> None:
        store = self._key_value
        space, done, count = message.namespace, False, 0
        found: bytes | list[bytes] | None = None
        match message:
            case KeyValuePut():
                count = int(store.get(space, message.key) is not None)
                done = store.put(space, message.key, message.value, message.overwrite)
                if done:
                    self._state.store(_KEYS, _encode_key((space, message.key)), message.value)
            case KeyValueGet():
                found = store.get(space, message.key)
            case KeyValueExists():
                done = store.get(space, message.key) is not None
            case KeyValueDelete():
                removed = store.delete(space, message.key, message.by_prefix)
                for key in removed:
                    self._state.drop(_KEYS, _encode_key((space, key)))
                done, count = bool(removed), len(removed)
            case KeyValueList():
                found = store.list(space, message.prefix)
            case _:
                _assert_never(message)
        reply = HeadReply(request_id=message.request_id, done=done, found=found, count=count)
        self._state.send(node_id, reply)

    # ---- asked by those who are no members -------------------------------------------------------

    def drain(
        self, node_id: NodeId, reason: str, patience_s: float, only_if_idle: bool, now: float
    ) -> tuple[DrainStarted, list[SendNode]]:
        """Begin to take a node out politely.

        Returns
        -------
        started : DrainStarted
            What has become of that.
        effects : list of SendNode
            Messages for nodes, in order.
        """
        state = self._state
        state.now = now
        started = self._members.drain(node_id, reason, patience_s, only_if_idle)
        effects, state.effects = state.effects, []
        return started, effects

    # ---- looking in ------------------------------------------------------------------------------

    def pending_groups(self) -> list[GroupRow]:
        """Placement groups with bundles that have no place."""
        return self._placement.pending()

    def nodes(self) -> list[NodeRow]:
        """Living nodes in the order in which they came, then dead ones."""
        return self._members.rows()

    def statistics(self) -> HeadStatistics:
        """A snapshot of the tables."""
        actors, names = self._actors.counts()
        return HeadStatistics(
            nodes=tuple(self._state.members),
            dead_nodes=tuple(self._members.dead),
            functions=len(self._functions),
            jobs=self._jobs.count(),
            actors=actors,
            names=names,
            keys=self._key_value.count(),
            placement_groups=self._placement.count(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree; for tests and the simulator."""
        self._members.check_invariants()
        self._jobs.check_invariants()
        self._actors.check_invariants()
        holders: dict[FunctionId, int] = {}
        for node_id, put in self._put_by.items():
            assert node_id in self._state.members
            for function_id in put:
                holders[function_id] = holders.get(function_id, 0) + 1
        assert holders == self._holders
        assert holders.keys() == self._functions.keys()
        self._key_value.check_invariants()
        self._placement.check_invariants()


def _assert_never(message: NoReturn) -> NoReturn:  # typing's own is not in Python 3.10
    raise InternalError(f"the head cannot take {message!r}")
