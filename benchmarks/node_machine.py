"""What does the node machine cost per task?

What: feeds the machine alone (no processes, no sockets) with the messages of a run, one task at a
time, in bulk, and in batches for a caller, and reports microseconds per task.
Who calls: `python -m benchmarks.node_machine`, by hand and in `make bench`.
May touch: the clock.
Invariants: what a node is told in a run is recorded and played to fresh nodes, so the figures are
the machine's alone; they are CPU time, so other processes disturb them little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

from poolray.config import Config
from poolray.exceptions import PoolrayError
from poolray.ids import (
    ClassId,
    ClientId,
    FunctionId,
    GroupId,
    NodeId,
    TaskId,
    WorkerId,
)
from poolray.node.effects import Effect, SendWorker, StartWorker
from poolray.node.node import Node, NodeInput
from poolray.protocol.client import DefineClass, DefineFunction, SubmitTasks
from poolray.protocol.node import CreateGroup
from poolray.protocol.values import Delivery, FunctionDefinition, TaskClass, TaskSpec
from poolray.protocol.worker import RunTasks, TaskResult, TasksFinished, WorkerReady

_DRIVER = ClientId(b"driver")
_SHELL = b""
_WORKERS = 2
_BATCH_CALLS = 256
_PAYLOAD = b"p" * 40
_RESULT = b"r" * 20
#: What the calls seem to take: short enough for full packets.
_CALL_NS = 2_000


def _encode_error(error: PoolrayError) -> bytes:
    return repr(error).encode()


def make_node(delivery: Delivery) -> tuple[Node, ClassId]:
    """A node with idle workers, and a class of tiny tasks."""
    ids = itertools.count(1)
    node = Node(
        node_id=NodeId(b"n" * 28),
        config=Config(),
        resources={"CPU": _WORKERS * 10_000},
        arena_bytes=1 << 30,
        encode_error=_encode_error,
        next_worker_id=lambda: WorkerId(next(ids).to_bytes(28, "big")),
        local_client=_DRIVER,
        slots=16,
    )
    class_id = ClassId(b"class")
    function_id = FunctionId(b"function")
    group_id = GroupId(1)
    node.handle(_SHELL, CreateGroup(group_id=group_id, size=_WORKERS, start_now=True), 0.0)
    for worker_id in list(node.state.workers):
        node.handle(_SHELL, WorkerReady(worker_id=worker_id, pid=1), 0.0)
    definition = FunctionDefinition(function_id=function_id, blob=b"f", name="f")
    node.handle(_DRIVER, DefineFunction(definition=definition), 0.0)
    task_class = TaskClass(
        class_id=class_id,
        function_id=function_id,
        name="f",
        delivery=delivery,
        resources={"CPU": 10_000} if delivery is Delivery.OBJECTS else {},
        group_id=group_id,
    )
    node.handle(_DRIVER, DefineClass(task_class=task_class), 0.0)
    return node, class_id


class _Recorder:
    """A node, and all that it was told."""

    def __init__(self, delivery: Delivery) -> None:
        self.node, self.class_id = make_node(delivery)
        self.told: list[tuple[bytes, NodeInput]] = []

    def tell(self, sender: bytes, message: NodeInput) -> list[Effect]:
        self.told.append((sender, message))
        return self.node.handle(sender, message, 0.0)

    def submit(self, task_id: TaskId, calls: int) -> list[Effect]:
        spec = TaskSpec(task_id=task_id, class_id=self.class_id, calls=[_PAYLOAD] * calls)
        return self.tell(_DRIVER, SubmitTasks(tasks=[spec]))

    def run_to_the_end(self, effects: list[Effect]) -> None:
        """Answer packets until there are none."""
        pending = effects
        while pending:
            produced: list[Effect] = []
            for effect in pending:
                assert not isinstance(effect, StartWorker)
                if isinstance(effect, SendWorker) and isinstance(effect.message, RunTasks):
                    report = _finish(effect.message, effect.worker_id)
                    produced.extend(self.tell(_SHELL, report))
            pending = produced
        assert not self.node.state.tasks


def _finish(packet: RunTasks, worker_id: WorkerId) -> TasksFinished:
    """A worker's report about a packet."""
    calls = sum(len(task.calls) for task in packet.tasks)
    return TasksFinished(
        worker_id=worker_id,
        results=[
            TaskResult(task_id=task.task_id, start=0, results=[_RESULT] * len(task.calls))
            for task in packet.tasks
        ],
        elapsed_ns=calls * _CALL_NS,
        sequence=packet.sequence,
    )


def _task_ids(count: int) -> list[TaskId]:
    return [TaskId(b"t" * 16 + number.to_bytes(8, "big")) for number in range(count)]


def objects_one_at_a_time(count: int) -> _Recorder:
    """Tasks that are submitted and finished one by one."""
    recorder = _Recorder(Delivery.OBJECTS)
    for task_id in _task_ids(count):
        recorder.run_to_the_end(recorder.submit(task_id, 1))
    return recorder


def objects_in_bulk(count: int) -> _Recorder:
    """Tasks that are all submitted, one message each, before results come."""
    recorder = _Recorder(Delivery.OBJECTS)
    effects: list[Effect] = []
    for task_id in _task_ids(count):
        effects.extend(recorder.submit(task_id, 1))
    recorder.run_to_the_end(effects)
    return recorder


def caller_in_batches(count: int) -> _Recorder:
    """Calls whose results go to the caller, 256 in a task."""
    recorder = _Recorder(Delivery.CALLER)
    effects: list[Effect] = []
    for task_id in _task_ids(count // _BATCH_CALLS):
        effects.extend(recorder.submit(task_id, _BATCH_CALLS))
    recorder.run_to_the_end(effects)
    return recorder


def replay(recorder: _Recorder, delivery: Delivery) -> float:
    """CPU seconds that a fresh node takes for what the recorded one was told."""
    node, _ = make_node(delivery)
    handle = node.handle
    began = time.process_time()
    for sender, message in recorder.told:
        handle(sender, message, 0.0)
    spent = time.process_time() - began
    assert not node.state.tasks
    return spent


_CASES: dict[str, tuple[Callable[[int], _Recorder], Delivery]] = {
    "objects, one at a time": (objects_one_at_a_time, Delivery.OBJECTS),
    "objects, in bulk": (objects_in_bulk, Delivery.OBJECTS),
    "calls in batches of 256": (caller_in_batches, Delivery.CALLER),
}


def main() -> None:
    """Print a JSON object with the median and spread of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_480, help="tasks or calls per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures = {}
    for name, (record, delivery) in _CASES.items():
        recorder = record(arguments.count)
        rounds = sorted(
            replay(recorder, delivery) / arguments.count * 1e6 for _ in range(arguments.rounds)
        )
        figures[name] = {
            "us_per_task_median": round(statistics.median(rounds), 3),
            "us_per_task_min": round(rounds[0], 3),
            "us_per_task_max": round(rounds[-1], 3),
        }
    print(
        json.dumps(
            {
                "benchmark": "node_machine",
                "python": platform.python_version(),
                "machine": platform.machine(),
                "count": arguments.count,
                "figures": figures,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
