"""Does a queue of a million tasks go in and out as fast as one of a thousand? How large is it?

    python -m benchmarks.pending [--json FILE]

What: a node machine with two workers in this process, fed with messages: tasks are submitted while
both workers are busy, all of them drain afterwards. Rates of both for 1,000, 100,000 and 1,000,000
pending tasks, by turns; and the bytes that a pending task takes.
Who calls: by hand.
May touch: the clock, tracemalloc.
Invariants: results are one small value each, let go of at once, as by a driver that drops its refs.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
import tracemalloc
from typing import Any

from benchmarks._harness import alternate, make_parser, print_table, show, write_json
from poolray.config import Config
from poolray.ids import ClassId, ClientId, FunctionId, GroupId, NodeId, TaskId, WorkerId, return_id
from poolray.node.effects import SendWorker, StartWorker
from poolray.node.node import Node
from poolray.protocol.client import DefineClass, DefineFunction, ReleaseReferences, SubmitTasks
from poolray.protocol.node import CreateGroup
from poolray.protocol.values import FunctionDefinition, TaskClass, TaskSpec
from poolray.protocol.worker import RunTasks, TaskResult, TasksFinished, WorkerReady

SIZES = (1_000, 100_000, 1_000_000)
#: Tasks in a message, as a driver in a loop sends them at the most.
BATCH = 100
DRIVER = ClientId(b"driver")


class Queue:
    """A node whose workers are busy until they are let go."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        self.node = Node(
            node_id=NodeId(b"N" * 28),
            config=Config(task_history_max=0),
            resources={"CPU": 20_000},
            arena_bytes=1 << 20,
            encode_error=lambda error: str(error).encode(),
            next_worker_id=lambda: WorkerId(b"w%027d" % next(numbers)),
            local_client=DRIVER,
            slots=16,
        )
        self.now = 0.0
        self.sent: list[tuple[WorkerId, RunTasks]] = []
        self._tell(CreateGroup(group_id=GroupId(0)))
        definition = FunctionDefinition(function_id=FunctionId(b"f"), blob=b"code", name="f")
        self._tell(DefineFunction(definition=definition), DRIVER)
        made = TaskClass(
            class_id=ClassId(b"c"),
            function_id=FunctionId(b"f"),
            name="f",
            resources={"CPU": 10_000},
        )
        self._tell(DefineClass(task_class=made), DRIVER)
        self._ids = itertools.count(1)
        self.submit(1)  # starts a worker
        self.drain()

    def _tell(self, message: Any, sender: bytes = b"") -> None:
        effects = self.node.handle(sender, message, self.now)
        for effect in effects:
            if isinstance(effect, SendWorker) and isinstance(effect.message, RunTasks):
                self.sent.append((effect.worker_id, effect.message))
            elif isinstance(effect, StartWorker):
                self._tell(WorkerReady(worker_id=effect.worker_id, pid=1))

    def submit(self, count: int) -> None:
        """So many tasks, which nobody runs yet."""
        for start in range(0, count, BATCH):
            specs = [
                TaskSpec(
                    task_id=TaskId(b"t%023d" % next(self._ids)),
                    class_id=ClassId(b"c"),
                    calls=[b"a payload of a task"],
                )
                for _ in range(min(BATCH, count - start))
            ]
            self._tell(SubmitTasks(tasks=specs), DRIVER)

    def drain(self) -> None:
        """Workers run all there is."""
        while self.sent:
            sent, self.sent = self.sent, []
            for worker_id, message in sent:
                results = [
                    TaskResult(task_id=task.task_id, start=0, results=[b"result"])
                    for task in message.tasks
                ]
                finished = TasksFinished(
                    worker_id=worker_id,
                    results=results,
                    elapsed_ns=len(results) * 5_000,
                    sequence=message.sequence,
                )
                self._tell(finished)
                ids = [return_id(task.task_id, 0) for task in message.tasks]
                self._tell(ReleaseReferences(object_ids=ids), DRIVER)


def measure(size: int, rates: dict[str, list[float]]) -> float:
    """Fill and drain once; gives the rate of both together."""
    queue = Queue()
    gc.collect()
    gc.disable()  # what is measured is the machine, not walks over all that lives
    try:
        # A small queue is filled and drained as often as it takes to be measured.
        submitting = draining = 0.0
        repeats = max(1, 20_000 // size)
        for _ in range(repeats):
            started = time.perf_counter()
            queue.submit(size)
            middle = time.perf_counter()
            queue.drain()
            submitting += middle - started
            draining += time.perf_counter() - middle
    finally:
        gc.enable()
    total = size * repeats
    rates["submit"].append(total / submitting)
    rates["drain"].append(total / draining)
    return total / (submitting + draining)


def bytes_per_task(size: int) -> float:
    """What a pending task adds to the machine's tables."""
    queue = Queue()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    queue.submit(size)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return grown / size


def main() -> None:
    options = make_parser(__doc__, rounds=3).parse_args()
    rates: dict[int, dict[str, list[float]]] = {s: {"submit": [], "drain": []} for s in SIZES}
    samples = alternate(
        options.rounds,
        {str(size): functools.partial(measure, size, rates[size]) for size in SIZES},
        warm_up=False,
    )
    base = samples[str(SIZES[0])].median
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    for size in SIZES:
        submit, drain = (
            sorted(rates[size][k])[len(rates[size][k]) // 2] for k in ("submit", "drain")
        )
        both = samples[str(size)].median
        rows.append([f"{size:,}", show(submit), show(drain), show(both), f"{both / base:.2f}"])
        figures[str(size)] = {
            "submit": submit,
            "drain": drain,
            "both": both,
            "to_1000": both / base,
        }
    print_table(["pending", "submitted /s", "drained /s", "both /s", "to 1,000"], rows)
    size = 100_000
    figures["bytes_per_task"] = bytes_per_task(size)
    print(f"a pending task takes {figures['bytes_per_task']:.0f} bytes")
    write_json(options.json, "pending", figures)


if __name__ == "__main__":
    main()
