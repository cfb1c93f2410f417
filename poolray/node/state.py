"""What the parts of the node machine share.

What: the tables and the list of effects under construction.
Who calls: the parts of the node machine.
May touch: nothing.
Invariants: each table has one part that writes it, named beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from poolray.config import Config
from poolray.exceptions import PoolrayError
from poolray.ids import ClassId, ClientId, FunctionId, GroupId, NodeId, ObjectId, TaskId, WorkerId
from poolray.node.effects import Effect
from poolray.node.workers import Group, WorkerRecord
from poolray.objects.allocator import RangeAllocator
from poolray.objects.directory import ClientRecord, ObjectRecord
from poolray.protocol.values import FunctionDefinition
from poolray.scheduling.resources import ResourceAccount
from poolray.tasks.class_queue import ClassQueue
from poolray.tasks.lifecycle import TaskRecord


@final
class NodeState:
    """The tables of one node."""

    __slots__ = (
        "allocator",
        "classes",
        "clients",
        "config",
        "effects",
        "encode_error",
        "functions",
        "groups",
        "has_head",
        "labels",
        "local_client",
        "node_id",
        "now",
        "objects",
        "pids",
        "resources",
        "tasks",
        "workers",
    )

    def __init__(
        self,
        node_id: NodeId,
        config: Config,
        resources: ResourceAccount,
        allocator: RangeAllocator,
        encode_error: Callable[[PoolrayError], bytes],
        local_client: ClientId,
        labels: Mapping[str, str],
    ) -> None:
        self.node_id = node_id
        #: What placements may ask for; never changes.
        self.labels = dict(labels)
        self.config = config
        self.resources = resources  # dispatcher
        self.allocator = allocator  # objects
        #: Turns an error into the bytes that a reader gets as the value.
        self.encode_error = encode_error
        #: The client that lives in the node's own process: its replies are never cut up.
        self.local_client = local_client
        self.now = 0.0
        #: Whether there is a head in a process of its own, so that there may be other nodes.
        self.has_head = False
        #: What the shell is to do, in order; handed over after each event.
        self.effects: list[Effect] = []
        #: Tasks that have not ended.  (tasks)
        self.tasks: dict[TaskId, TaskRecord] = {}
        #: Objects owned here, and copies of others' that local tasks need.  (objects)
        self.objects: dict[ObjectId, ObjectRecord] = {}
        self.clients: dict[ClientId, ClientRecord] = {}  # objects
        self.workers: dict[WorkerId, WorkerRecord] = {}  # groups
        #: Processes of drivers that live elsewhere, for those who look on.  (the shell)
        self.pids: dict[ClientId, int] = {}
        self.groups: dict[GroupId, Group] = {}  # groups
        self.classes: dict[ClassId, ClassQueue] = {}  # functions
        self.functions: dict[FunctionId, FunctionDefinition] = {}  # functions
