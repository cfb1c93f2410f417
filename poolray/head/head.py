"""The head machine: one per cluster; membership, and what all nodes must agree on.

    nodes ──HeadRequest──▶ ┌─────────────────────────────────────┐ ──SendNode──▶ nodes
    clock ──────Tick─────▶ │ members  functions  jobs  names  kv │
                           └─────────────────────────────────────┘
What: who is a member and alive, what each has free, which functions, jobs and names there are, and
a small key-value store.
Who calls: its shell (in-process, later the head's daemon, the simulator).
May touch: nothing.
Invariants: a node is a member, dead, or unknown; what belongs to a node goes with it; a dead node's
id never becomes a member again; views are sent at most once per heartbeat interval.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import NoReturn, TypeAlias, final

import msgspec

from poolray.config import Config
from poolray.exceptions import InternalError
from poolray.head.key_value import KeyValueStore
from poolray.ids import FunctionId, NodeId
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.node import (
    ClusterView,
    FinishJob,
    FunctionFound,
    HeadGetFunction,
    HeadMessage,
    HeadPutFunction,
    HeadReply,
    HeadRequest,
    Heartbeat,
    KeyValueDelete,
    KeyValueGet,
    KeyValueList,
    KeyValuePut,
    ListNames,
    LookUpName,
    NamesFound,
    NodeDied,
    NodeView,
    Refused,
    RegisterJob,
    RegisterName,
    RegisterNode,
    ReleaseName,
    Tick,
)
from poolray.protocol.values import FunctionDefinition

#: Dead nodes remembered, so that they are refused; the first are forgotten when there are more.
_DEAD_MAX = 10_000
#: Functions kept; the one that was put first goes when there are more.
_FUNCTIONS_MAX = 100_000
#: Names at once; a claim beyond that is refused.
_NAMES_MAX = 100_000
#: Finished jobs remembered, for the record.
_FINISHED_JOBS_MAX = 1_000


class SendNode(msgspec.Struct, frozen=True, gc=False):
    """Send a message to a node, reliably and in order."""

    node_id: NodeId
    message: HeadMessage


#: All that the head may be told: a node's request, or that time has passed.
HeadInput: TypeAlias = HeadRequest | Tick


@dataclasses.dataclass(frozen=True, slots=True)
class HeadStatistics:
    """A snapshot of the head, for tests, the state API and metrics."""

    nodes: tuple[NodeId, ...]
    dead_nodes: tuple[NodeId, ...]
    functions: int
    jobs: int  #: running ones
    names: int
    keys: int


@final
class _Member:
    """A node that lives, as far as the head knows."""

    __slots__ = ("deadline_s", "functions", "jobs", "names", "view")

    def __init__(self, view: NodeView, deadline_s: float) -> None:
        self.view = view
        #: It is dead if it has not been heard of until then.
        self.deadline_s = deadline_s
        # What goes with it:
        self.functions: dict[FunctionId, None] = {}
        self.jobs: dict[bytes, None] = {}
        self.names: dict[tuple[str, str], None] = {}


@final
class Head:
    """The decisions of one cluster.

    Parameters
    ----------
    config : Config
        Limits and times.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._now = 0.0
        self._effects: list[SendNode] = []
        self._members: dict[NodeId, _Member] = {}
        self._dead: dict[NodeId, None] = {}
        #: (deadline, node), one entry per member; an entry may be too early, never too late.
        self._deadlines: list[tuple[float, NodeId]] = []
        #: Members whose view has changed since the last that was sent.
        self._changed: dict[NodeId, None] = {}
        #: When views may be sent again.
        self._next_view_s = 0.0
        self._functions: dict[FunctionId, FunctionDefinition] = {}
        #: function id -> how many members have put it.
        self._holders: dict[FunctionId, int] = {}
        #: job id -> the node of its driver.
        self._jobs: dict[bytes, NodeId] = {}
        self._finished_jobs: dict[bytes, None] = {}
        #: (namespace, name) -> (id, the node that it lives on).
        self._names: dict[tuple[str, str], tuple[bytes, NodeId]] = {}
        self._key_value = KeyValueStore()

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
        silence_s, self._now = now - self._now, now
        node_id = NodeId(sender)
        if isinstance(message, Tick):
            self._on_tick(silence_s)
        elif isinstance(message, RegisterNode):
            self._on_register(message)
        elif node_id in self._members:
            self._members[node_id].deadline_s = now + self._config.heartbeat_timeout_s
            self._on_member(node_id, message)
        else:
            self._refuse(node_id)
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float | None:
        """When to send `Tick` at the latest; None: no need."""
        deadline = self._deadlines[0][0] if self._deadlines else None
        if self._changed and (deadline is None or self._next_view_s < deadline):
            return self._next_view_s
        return deadline

    def _send(self, node_id: NodeId, message: HeadMessage) -> None:
        self._effects.append(SendNode(node_id, message))

    # ---- membership ------------------------------------------------------------------------------

    def _on_register(self, message: RegisterNode) -> None:
        node_id = message.node_id
        if node_id in self._dead:
            self._refuse(node_id)
            return
        if message.protocol_version != PROTOCOL_VERSION:
            self._send(
                node_id,
                Refused(
                    reason=f"node {node_id.hex()[:12]} speaks version {message.protocol_version} "
                    f"of the protocol, this cluster version {PROTOCOL_VERSION}: run the same "
                    "version of poolray on all machines"
                ),
            )
            return
        view = NodeView(
            node_id=node_id, total=message.total, available=message.total, queued_tasks=0
        )
        member = self._members.get(node_id)
        if member is None:
            deadline_s = self._now + self._config.heartbeat_timeout_s
            self._members[node_id] = _Member(view, deadline_s)
            heapq.heappush(self._deadlines, (deadline_s, node_id))
        else:  # it lost its link to us and is back before its time was up
            member.view = view
            member.deadline_s = self._now + self._config.heartbeat_timeout_s
        self._changed[node_id] = None
        self._send(node_id, ClusterView(nodes=[m.view for m in self._members.values()]))
        self._send_views()

    def _refuse(self, node_id: NodeId) -> None:
        if node_id in self._dead:
            reason = (
                f"node {node_id.hex()[:12]} was silent for more than "
                f"{self._config.heartbeat_timeout_s:g} s and was declared dead; its work has been "
                "given to others, so it has to join again as a new node"
            )
        else:
            reason = f"node {node_id.hex()[:12]} is not a member: it has to register first"
        self._send(node_id, Refused(reason=reason))

    def _on_heartbeat(self, node_id: NodeId, message: Heartbeat) -> None:
        member = self._members[node_id]
        view = NodeView(
            node_id=node_id,
            total=member.view.total,
            available=message.available,
            queued_tasks=message.queued_tasks,
        )
        if view != member.view:
            member.view = view
            self._changed[node_id] = None
            self._send_views()

    def _send_views(self) -> None:
        """Tell all members what has changed, but not more often than they report it."""
        if not self._changed or self._now < self._next_view_s:
            return
        self._next_view_s = self._now + self._config.heartbeat_interval_s
        views = ClusterView(nodes=[self._members[node_id].view for node_id in self._changed])
        self._changed.clear()
        for node_id in self._members:
            self._send(node_id, views)

    def _on_tick(self, silence_s: float) -> None:
        if silence_s > self._config.heartbeat_timeout_s / 2:
            # Maybe it was us who stood still, and what the nodes said meanwhile waits to be read.
            grace_s = self._now + 2 * self._config.heartbeat_interval_s
            for member in self._members.values():
                member.deadline_s = max(member.deadline_s, grace_s)
        while self._deadlines and self._deadlines[0][0] <= self._now:
            _, node_id = heapq.heappop(self._deadlines)
            member = self._members[node_id]
            if member.deadline_s <= self._now:
                self._bury(node_id)
            else:
                heapq.heappush(self._deadlines, (member.deadline_s, node_id))
        self._send_views()

    def _bury(self, node_id: NodeId) -> None:
        """A node was silent for too long: it and what belongs to it are gone, for good."""
        member = self._members.pop(node_id)
        self._dead[node_id] = None
        if len(self._dead) > _DEAD_MAX:
            del self._dead[next(iter(self._dead))]
        self._changed.pop(node_id, None)
        for function_id in member.functions:
            self._drop_function(function_id)
        for job_id in list(member.jobs):
            self._finish_job(job_id)
        for name in list(member.names):
            del self._names[name]
        for survivor in self._members:
            self._send(survivor, NodeDied(node_id=node_id))

    # ---- requests of members ---------------------------------------------------------------------

    def _on_member(self, node_id: NodeId, message: HeadRequest) -> None:
        match message:
            case Heartbeat():
                self._on_heartbeat(node_id, message)
            case HeadPutFunction():
                self._put_function(node_id, message.definition)
            case HeadGetFunction():
                found = self._functions.get(message.function_id)
                reply = FunctionFound(function_id=message.function_id, definition=found)
                self._send(node_id, reply)
            case RegisterJob():
                self._register_job(message)
            case FinishJob():
                self._finish_job(message.job_id)
            case RegisterName():
                self._register_name(node_id, message)
            case LookUpName():
                entry = self._names.get((message.namespace, message.name))
                self._reply(node_id, message.request_id, False, entry[0] if entry else None)
            case ReleaseName():
                self._release_name(message)
            case ListNames():
                space = message.namespace
                names = [name for name in self._names if space is None or name[0] == space]
                self._send(node_id, NamesFound(request_id=message.request_id, names=names))
            case KeyValuePut() | KeyValueGet() | KeyValueDelete() | KeyValueList():
                self._on_key_value(node_id, message)
            case RegisterNode():
                self._on_register(message)
            case _:
                _assert_never(message)

    def _reply(
        self, node_id: NodeId, request_id: int, done: bool, found: bytes | list[bytes] | None
    ) -> None:
        self._send(node_id, HeadReply(request_id=request_id, done=done, found=found))

    def _put_function(self, node_id: NodeId, definition: FunctionDefinition) -> None:
        function_id = definition.function_id
        member = self._members[node_id]
        if function_id in member.functions:
            return
        member.functions[function_id] = None
        self._holders[function_id] = self._holders.get(function_id, 0) + 1
        self._functions[function_id] = definition
        if len(self._functions) > _FUNCTIONS_MAX:
            oldest = next(iter(self._functions))
            del self._functions[oldest]
            del self._holders[oldest]
            for other in self._members.values():
                other.functions.pop(oldest, None)

    def _drop_function(self, function_id: FunctionId) -> None:
        self._holders[function_id] -= 1
        if self._holders[function_id] == 0:
            del self._holders[function_id]
            del self._functions[function_id]

    def _register_job(self, message: RegisterJob) -> None:
        host = self._members.get(message.node_id)
        if host is not None and message.job_id not in self._jobs:
            self._jobs[message.job_id] = message.node_id
            host.jobs[message.job_id] = None

    def _finish_job(self, job_id: bytes) -> None:
        node_id = self._jobs.pop(job_id, None)
        if node_id is None:
            return
        host = self._members.get(node_id)
        if host is not None:
            host.jobs.pop(job_id, None)
        self._finished_jobs[job_id] = None
        if len(self._finished_jobs) > _FINISHED_JOBS_MAX:
            del self._finished_jobs[next(iter(self._finished_jobs))]

    def _register_name(self, node_id: NodeId, message: RegisterName) -> None:
        name = (message.namespace, message.name)
        holder = self._members.get(message.node_id)
        entry = self._names.get(name)
        if entry is not None:
            self._reply(node_id, message.request_id, entry[0] == message.target, entry[0])
        elif holder is None or len(self._names) >= _NAMES_MAX:
            self._reply(node_id, message.request_id, False, None)
        else:
            self._names[name] = (message.target, message.node_id)
            holder.names[name] = None
            self._reply(node_id, message.request_id, True, message.target)

    def _release_name(self, message: ReleaseName) -> None:
        name = (message.namespace, message.name)
        entry = self._names.get(name)
        if entry is not None and entry[0] == message.target:
            del self._names[name]
            del self._members[entry[1]].names[name]

    def _on_key_value(
        self,
        node_id: NodeId,
        message: KeyValuePut | KeyValueGet | KeyValueDelete | KeyValueList,
    ) -> None:
        store = self._key_value
        space, request_id = message.namespace, message.request_id
        match message:
            case KeyValuePut():
                done = store.put(space, message.key, message.value, message.overwrite)
                self._reply(node_id, request_id, done, None)
            case KeyValueGet():
                self._reply(node_id, request_id, False, store.get(space, message.key))
            case KeyValueDelete():
                count = store.delete(space, message.key, message.by_prefix)
                self._reply(node_id, request_id, count > 0, None)
            case KeyValueList():
                self._reply(node_id, request_id, False, store.list(space, message.prefix))
            case _:
                _assert_never(message)

    # ---- looking in ------------------------------------------------------------------------------

    def statistics(self) -> HeadStatistics:
        """A snapshot of the tables."""
        return HeadStatistics(
            nodes=tuple(self._members),
            dead_nodes=tuple(self._dead),
            functions=len(self._functions),
            jobs=len(self._jobs),
            names=len(self._names),
            keys=self._key_value.count(),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError when tables do not agree; for tests and the simulator."""
        members = self._members
        assert not members.keys() & self._dead.keys()
        assert sorted(node_id for _, node_id in self._deadlines) == sorted(members)
        assert all(deadline <= members[node_id].deadline_s for deadline, node_id in self._deadlines)
        assert self._changed.keys() <= members.keys()
        holders: dict[FunctionId, int] = {}
        for node_id, member in members.items():
            for function_id in member.functions:
                holders[function_id] = holders.get(function_id, 0) + 1
            assert all(self._jobs[job_id] == node_id for job_id in member.jobs)
            assert all(self._names[name][1] == node_id for name in member.names)
        assert holders == self._holders
        assert holders.keys() == self._functions.keys()
        assert sum(len(member.jobs) for member in members.values()) == len(self._jobs)
        assert sum(len(member.names) for member in members.values()) == len(self._names)
        assert not self._jobs.keys() & self._finished_jobs.keys()
        self._key_value.check_invariants()


def _assert_never(message: NoReturn) -> NoReturn:  # typing's own is not in Python 3.10
    raise InternalError(f"the head cannot take {message!r}")
