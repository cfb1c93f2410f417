"""What does a task cost from 10 to 1,000 nodes? With random resources, and nodes that die.

    python -m benchmarks.scheduling_scale [--tasks N] [--nodes N ...] [--json FILE]

What: real node machines of one cluster in this process, one of them with a driver that submits
tasks of random demands; all of them run some. Messages arrive at once, views as often as a real
head sends them; a node in a hundred dies on the way. Prints the machines' time per task, and that
of the driver's node alone, in which nodes are chosen.
Who calls: by hand; a test, for a short one.
May touch: the clock.
Invariants: every task ends, with its value; all resources are free at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import json
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

from poolray.config import Config
from poolray.ids import ClassId, ClientId, FunctionId, GroupId, NodeId, TaskId, WorkerId, return_id
from poolray.node.effects import SendHead, SendPeer, SendWorker, StartWorker
from poolray.node.node import Node
from poolray.protocol.client import (
    DefineClass,
    DefineFunction,
    ReleaseReferences,
    SubmitTasks,
)
from poolray.protocol.node import (
    ClusterView,
    CreateGroup,
    Heartbeat,
    NodeDied,
    NodeView,
    Tick,
    WorkerLost,
)
from poolray.protocol.values import FunctionDefinition, TaskClass, TaskSpec
from poolray.protocol.worker import RunTasks, StopWorker, TaskResult, TasksFinished, WorkerReady

UNIT = 10_000
DRIVER = ClientId(b"driver")
#: Tasks that a driver has under way for each node.
PER_NODE = 3
HEARTBEAT_S = 1.0


@dataclasses.dataclass
class Cost:
    """Seconds in machines."""

    all_s: float = 0.0
    driver_s: float = 0.0
    handled: int = 0


class Cluster:
    """Node machines, and what is on its way between them."""

    def __init__(self, nodes: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.cost = Cost()
        self.deaths = 0
        self._workers = itertools.count(1)
        self._inbox: deque[tuple[NodeId, bytes, Any]] = deque()
        #: (when, node, worker, packet) of what runs, the first to end first.
        self._running: list[tuple[float, int, NodeId, WorkerId, RunTasks]] = []
        self._order = itertools.count()
        self.nodes: dict[NodeId, Node] = {}
        for number in range(nodes):
            name = NodeId(b"n%027d" % number)
            self.nodes[name] = self._make(name)
        self.driver = next(iter(self.nodes))
        self._views: dict[NodeId, NodeView] = {}
        for name, node in self.nodes.items():
            total = node.state.resources.total
            self._views[name] = NodeView(
                node_id=name, total=dict(total), available=dict(total), queued_tasks=0
            )
        self.tell(self.driver, b"", ClusterView(nodes=list(self._views.values())))
        self.settle()

    def _make(self, name: NodeId) -> Node:
        draw = self.random
        resources = {
            "CPU": draw.choice([2, 4, 8, 16]) * UNIT,
            "memory": draw.choice([8, 32, 128]) * UNIT,
        }
        if draw.random() < 0.3:
            resources["GPU"] = draw.choice([1, 2, 4, 8]) * UNIT
        node = Node(
            node_id=name,
            config=Config(task_history_max=0),
            resources=resources,
            arena_bytes=1 << 16,
            encode_error=lambda error: f"!{error}".encode(),
            next_worker_id=lambda: WorkerId(b"w%027d" % next(self._workers)),
            local_client=DRIVER,
            slots=256,
            has_head=True,
        )
        node.handle(b"", CreateGroup(group_id=GroupId(0)), 0.0)
        return node

    # ---- messages --------------------------------------------------------------------------------

    def tell(self, name: NodeId, sender: bytes, message: Any) -> None:
        """A message for a node, after those that are on their way."""
        self._inbox.append((name, sender, message))

    def settle(self) -> None:
        """All that is on its way arrives."""
        clock = time.perf_counter
        while self._inbox:
            name, sender, message = self._inbox.popleft()
            node = self.nodes.get(name)
            if node is None:
                continue
            started = clock()
            effects = node.handle(sender, message, self.now)
            spent = clock() - started
            self.cost.all_s += spent
            self.cost.handled += 1
            if name == self.driver:
                self.cost.driver_s += spent
            for effect in effects:
                self._act(name, effect)

    def _act(self, name: NodeId, effect: Any) -> None:
        match effect:
            case SendPeer(node_id=target, message=message):
                self._inbox.append((target, name, message))
            case StartWorker(worker_id=worker_id):
                self._inbox.append((name, b"", WorkerReady(worker_id=worker_id, pid=1)))
            case SendWorker(worker_id=worker_id, message=RunTasks() as packet):
                took = self.random.expovariate(1 / 0.5)
                entry = (self.now + took, next(self._order), name, worker_id, packet)
                heapq.heappush(self._running, entry)
            case SendWorker(worker_id=worker_id, message=StopWorker()):
                lost = WorkerLost(
                    worker_id=worker_id, pid=1, exit_code=0, signal=None, sequence=0, index=0
                )
                self._inbox.append((name, b"", lost))
            case SendHead(message=Heartbeat() as beat):
                view = self._views[name]
                self._views[name] = NodeView(
                    node_id=name,
                    total=view.total,
                    available=beat.available,
                    queued_tasks=beat.queued_tasks,
                )
            case _:
                pass

    def finish_next(self) -> None:
        """Time goes on to the next end of a packet."""
        self.now, _, name, worker_id, packet = heapq.heappop(self._running)
        results = [
            TaskResult(task_id=task.task_id, start=0, results=[b"result"]) for task in packet.tasks
        ]
        finished = TasksFinished(
            worker_id=worker_id,
            results=results,
            elapsed_ns=500_000_000 * len(results),
            sequence=packet.sequence,
        )
        self.tell(name, b"", finished)

    def beat(self) -> None:
        """All nodes report, and the driver's node hears of it."""
        for name in self.nodes:
            self.tell(name, b"", Tick())
        self.settle()
        views = [view for name, view in self._views.items() if name in self.nodes]
        self.tell(self.driver, b"", ClusterView(nodes=views))
        self.settle()

    def kill_one(self) -> None:
        """A node is gone."""
        names = [name for name in self.nodes if name != self.driver]
        if len(names) > 1:
            victim = self.random.choice(names)
            del self.nodes[victim]
            self._running = [entry for entry in self._running if entry[2] != victim]
            self._running.sort()
            self.deaths += 1
            for name in self.nodes:
                self.tell(name, b"", NodeDied(node_id=victim))
            self.settle()

    @property
    def is_busy(self) -> bool:
        return bool(self._running)


def define_classes(cluster: Cluster, count: int) -> list[ClassId]:
    """Classes of random demands that some node can meet."""
    draw = cluster.random
    made = []
    for number in range(count):
        demand = {"CPU": draw.choice([1, 1, 1, 2, 4]) * UNIT}
        if draw.random() < 0.3:
            demand["memory"] = draw.choice([1, 2, 8]) * UNIT
        if draw.random() < 0.2:
            demand["GPU"] = UNIT
        function_id = FunctionId(b"f%d" % number)
        class_id = ClassId(b"c%d" % number)
        definition = FunctionDefinition(function_id=function_id, blob=b"code", name="f")
        cluster.tell(cluster.driver, DRIVER, DefineFunction(definition=definition))
        task_class = TaskClass(
            class_id=class_id,
            function_id=function_id,
            name="f",
            resources=demand,
            max_retries=-1,
        )
        cluster.tell(cluster.driver, DRIVER, DefineClass(task_class=task_class))
        made.append(class_id)
    cluster.settle()
    return made


def run(nodes: int, tasks: int, seed: int = 1) -> dict[str, float]:
    """One cluster runs so many tasks; gives what they cost."""
    cluster = Cluster(nodes, seed)
    classes = define_classes(cluster, 20)
    ids = (TaskId(b"t%023d" % number) for number in itertools.count(1))
    cluster.cost = Cost()
    under_way: deque[TaskId] = deque()
    submitted, next_beat = 0, HEARTBEAT_S
    deaths = [tasks * (n + 1) // (nodes // 100 + 1) for n in range(nodes // 100)]
    driver = cluster.nodes[cluster.driver]
    while submitted < tasks or driver.state.tasks:
        while submitted < tasks and len(driver.state.tasks) < PER_NODE * nodes:
            task_id = next(ids)
            under_way.append(task_id)
            spec = TaskSpec(
                task_id=task_id, class_id=cluster.random.choice(classes), calls=[b"payload"]
            )
            cluster.tell(cluster.driver, DRIVER, SubmitTasks(tasks=[spec]))
            cluster.settle()
            submitted += 1
            if deaths and submitted >= deaths[0]:
                deaths.pop(0)
                cluster.kill_one()
        if cluster.is_busy:
            cluster.finish_next()
            cluster.settle()
        else:
            cluster.now = next_beat
        if cluster.now >= next_beat:
            cluster.beat()
            next_beat = cluster.now + HEARTBEAT_S
    for task_id in under_way:
        record = driver.state.objects[return_id(task_id, 0)]
        assert record.value == b"result", record.value
    cost = cluster.cost
    cluster.tell(
        cluster.driver,
        DRIVER,
        ReleaseReferences(object_ids=[return_id(task_id, 0) for task_id in under_way]),
    )
    cluster.settle()
    for node in cluster.nodes.values():
        statistics = node.statistics()
        assert statistics.resources_available == statistics.resources_total
        assert statistics.tasks == 0
    return {
        "nodes": nodes,
        "tasks": tasks,
        "node_deaths": cluster.deaths,
        "us_per_task": cost.all_s / tasks * 1e6,
        "driver_us_per_task": cost.driver_s / tasks * 1e6,
        "us_per_message": cost.all_s / cost.handled * 1e6,
        "virtual_s": cluster.now,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for nodes in options.nodes:
        figures = run(nodes, options.tasks)
        found.append(figures)
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
    ratio = found[-1]["us_per_task"] / found[0]["us_per_task"]
    print(f"a task costs {ratio:.2f} times as much with {options.nodes[-1]} nodes")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
