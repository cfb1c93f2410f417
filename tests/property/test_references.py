"""References against a small model: an object lives exactly while something leads to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from poolray.ids import ObjectId, TaskId
from poolray.protocol.client import CancelTasks, PutObject
from poolray.protocol.node import ClientLeft
from poolray.protocol.values import Outcome
from tests.unit.node_harness import DRIVER, Bench, TerminateWorker, result_of

CLIENTS = [b"one", b"two"]
some_client = st.sampled_from(CLIENTS)
some_index = st.integers(0, 10**6)


class ReferenceMachine(RuleBasedStateMachine):
    """Clients, tasks and values that hold objects, let go, and end."""

    @initialize()
    def start(self) -> None:
        self.bench = Bench(cpus=1)
        self.bench.group(workers=1)
        self.batch_group = self.bench.group(1, workers=1)
        self.kind = self.bench.task_class()
        self.batches = self.bench.caller_class(group_id=self.batch_group)
        self.count = 0
        #: client -> what it holds.
        self.held: dict[bytes, set[ObjectId]] = {client: set() for client in CLIENTS}
        #: object -> what its value contains.
        self.contained: dict[ObjectId, list[ObjectId]] = {}
        #: task -> what it holds.
        self.tasks: dict[TaskId, list[ObjectId]] = {}

    def alive(self) -> set[ObjectId]:
        """What something leads to."""
        return self.reached_from(set().union(*self.held.values(), *self.tasks.values()))

    def reached_from(self, start: set[ObjectId]) -> set[ObjectId]:
        """These objects, what they contain, what that contains."""
        found = set(start)
        queue = list(start)
        while queue:
            for inner in self.contained.get(queue.pop(), []):
                if inner not in found:
                    found.add(inner)
                    queue.append(inner)
        return found

    def choose(self, indexes: list[int]) -> list[ObjectId]:
        living = sorted(self.alive())
        return [living[index % len(living)] for index in indexes] if living else []

    @rule(client=some_client, inside=st.lists(some_index, max_size=3))
    def put(self, client: bytes, inside: list[int]) -> None:
        self.count += 1
        object_id = ObjectId(b"put%025d" % self.count)
        contained = self.choose(inside)
        message = PutObject(object_id=object_id, value=b"value", contained=contained)
        self.bench.tell(message, client)
        self.held[client].add(object_id)
        self.contained[object_id] = contained

    @rule(client=some_client, wanted=st.lists(some_index, max_size=3))
    def hold(self, client: bytes, wanted: list[int]) -> None:
        ids = self.choose(wanted)
        self.bench.hold(*ids, client=client)
        self.held[client].update(ids)

    @rule(client=some_client, wanted=st.lists(some_index, max_size=3))
    def drop(self, client: bytes, wanted: list[int]) -> None:
        ids = self.choose(wanted)
        self.bench.drop(*ids, client=client)
        self.held[client].difference_update(ids)

    @rule(
        client=some_client,
        arguments=st.lists(some_index, max_size=3),
        refs=st.lists(some_index, max_size=2),
    )
    def submit(self, client: bytes, arguments: list[int], refs: list[int]) -> None:
        dependencies, borrows = self.choose(arguments), self.choose(refs)
        task = self.bench.submit(
            self.kind, dependencies=dependencies, borrows=borrows, client=client
        )
        self.tasks[task] = [*dependencies, *borrows]
        self.held[client].add(result_of(task))

    @rule(refs=st.lists(some_index, max_size=2), calls=st.integers(1, 6))
    def submit_batch(self, refs: list[int], calls: int) -> None:
        borrows = self.choose(refs)
        task = self.bench.submit(self.batches, calls=calls, borrows=borrows)
        self.tasks[task] = borrows

    @precondition(lambda self: self.tasks)
    @rule(inside=st.lists(some_index, max_size=2), kept=st.booleans())
    def finish_one(self, inside: list[int], kept: bool) -> None:
        """A worker runs the first packet that waits for it."""
        for worker in self.bench.busy():
            packet = self.bench.read(worker)
            results: list[bytes | Outcome] = []
            for call in packet.tasks:
                root = TaskId(call.task_id[:24])
                if root in self.tasks:
                    # (A value that contains itself would live for ever, as counting goes.)
                    contained = [
                        o
                        for o in self.choose(inside)
                        if result_of(root) not in self.reached_from({o})
                    ]
                    is_object = result_of(root) in self.bench.node.state.objects
                    outcome = Outcome(values=[b"v"], contained=[contained])
                    results.extend([outcome if is_object else b"r"] * len(call.calls))
                    if is_object:
                        self.contained[result_of(root)] = contained
                else:
                    results.extend([b"r"] * len(call.calls))
            self.bench.finish(worker, packet, results)
            self.settle()
            return

    @precondition(lambda self: self.tasks)
    @rule(which=some_index)
    def cancel(self, which: int) -> None:
        """Only batches can be cancelled; what a worker may read stays until it reports."""
        tasks = sorted(self.tasks)
        task = tasks[which % len(tasks)]
        record = self.bench.node.state.tasks.get(task)
        queued = record is not None and record.state.name == "QUEUED"
        if queued and record is not None and record.class_queue.task_class.name == "g":
            parts = [t for t in self.bench.node.state.tasks if t[:24] == task]
            if len(parts) == 1:
                self.bench.tell(CancelTasks(task_ids=[task]), DRIVER)
                self.settle()

    @rule(client=some_client)
    def leave(self, client: bytes) -> None:
        self.bench.tell(ClientLeft(client_id=client))
        self.held[client].clear()
        # What it submitted, and nobody else has a ref to, ends.
        for effect in self.bench.take(TerminateWorker):
            self.bench.lose(effect.worker_id)
        self.bench.start_all()
        self.settle()

    def settle(self) -> None:
        """Tasks that have ended hold nothing."""
        roots = {TaskId(task[:24]) for task in self.bench.node.state.tasks}
        self.tasks = {task: holds for task, holds in self.tasks.items() if task in roots}

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "bench"):
            self.settle()
            assert set(self.bench.node.state.objects) == self.alive()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            for client in CLIENTS:
                self.leave(client)
            self.bench.run_all()
            self.bench.assert_empty()


TestReferences = ReferenceMachine.TestCase
TestReferences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
