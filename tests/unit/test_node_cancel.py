"""Cancelling tasks on one node and between two, and pauses before further attempts."""

from __future__ import annotations

import pytest

from poolray.config import Config
from poolray.ids import TaskId, WorkerId
from poolray.node.effects import Interrupt, SendPeer, UnhandledError
from poolray.protocol.client import CancelTasks
from poolray.protocol.node import CancelForwarded, ClientLeft, NodeDied
from poolray.protocol.values import Outcome, Value
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import (
    DRIVER,
    Bench,
    StartWorker,
    TakeBack,
    TerminateWorker,
    result_of,
)
from tests.unit.test_node_peers import A, B, Pair

GROUP = 7
CANCELLED = b"TaskCancelledError"


def failed_as(value: Value, name: bytes) -> bool:
    return isinstance(value, bytes) and value.startswith(name + b":")


def is_cancelled(bench: Bench, task: TaskId) -> bool:
    return failed_as(bench.value_of(result_of(task)), CANCELLED)


def running(bench: Bench, task: TaskId) -> tuple[WorkerId, RunTasks]:
    """The worker that has the task, and the packet it has read."""
    for worker in bench.busy():
        packet = bench.read(worker)
        if any(call.task_id == task for call in packet.tasks):
            return worker, packet
    raise AssertionError("nobody runs it")


def packet_of_three(bench: Bench) -> tuple[WorkerId, RunTasks, list[TaskId]]:
    """A worker that has read three short tasks in one packet."""
    kind = bench.task_class()
    bench.warm_up(kind)
    bench.submit_many(kind, 6)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    tasks = [call.task_id for call in packet.tasks]
    assert len(tasks) == 3
    return worker, packet, tasks


# ---- tasks that have not begun -------------------------------------------------------------------


def test_a_queued_task_never_runs_and_its_neighbours_do() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    first, second, third = (bench.submit(kind) for _ in range(3))
    bench.cancel(second)
    assert bench.state(second) is None
    assert is_cancelled(bench, second)
    bench.run_all()
    assert bench.value_of(result_of(first)) == b"result"
    assert bench.value_of(result_of(third)) == b"result"
    bench.drop(*map(result_of, (first, second, third)))
    bench.assert_empty()


def test_a_task_that_waits_for_an_argument_lets_go_of_it() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    source = bench.submit(kind)
    waiting = bench.submit(kind, dependencies=[result_of(source)])
    bench.drop(result_of(source))
    bench.cancel(waiting)
    assert is_cancelled(bench, waiting)
    bench.run_all()
    assert result_of(source) not in bench.node.state.objects
    bench.drop(result_of(waiting))
    bench.assert_empty()


def test_the_tasks_that_wait_for_a_cancelled_one_get_its_error() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    blocker = bench.submit(kind)
    source = bench.submit(kind, dependencies=[result_of(blocker)])
    dependent = bench.submit(kind, dependencies=[result_of(source)])
    bench.cancel(source)
    _, packet = running(bench, dependent)
    (call,) = packet.tasks
    assert call.error_arguments == [0]
    assert failed_as(call.arguments[0], CANCELLED)


@pytest.mark.parametrize("force", [False, True])
def test_a_task_that_has_ended_stays_as_it_is(force: bool) -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    bench.run_all()
    bench.take(TakeBack)
    assert bench.cancel(task, force=force) == []
    assert bench.value_of(result_of(task)) == b"result"


def test_calls_of_a_pool_are_not_for_this() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    batch = bench.submit(bench.caller_class(group_id=group), calls=2)
    assert bench.cancel(batch) == []
    bench.run_all()
    assert sum(len(results) for _, _, results in bench.delivered()) == 2


def test_nobody_is_told_of_an_unseen_cancellation() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.submit(kind)
    task = bench.submit(kind)
    bench.cancel(task)
    bench.drop(result_of(task))
    assert bench.take(UnhandledError) == []


def test_nor_of_that_of_a_running_task_whose_ref_is_gone() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    worker, packet = running(bench, task)
    bench.cancel(task)
    bench.drop(result_of(task))
    bench.finish(worker, packet, [Outcome(values=[b"TaskCancelledError: here"], is_error=True)])
    assert bench.take(UnhandledError) == []


# ---- tasks that a worker has ---------------------------------------------------------------------


def test_a_running_task_is_interrupted_by_an_order_for_this_attempt_of_it() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    worker, packet = running(bench, task)
    bench.cancel(task)
    (interrupt,) = bench.take(Interrupt)
    assert interrupt.worker_id == worker
    order = interrupt.message
    assert (order.task_id, order.sequence, order.force) == (task, packet.sequence, False)
    assert bench.state(task) == "RUNNING"
    bench.finish(worker, packet, [Outcome(values=[b"TaskCancelledError: here"], is_error=True)])
    assert is_cancelled(bench, task)


def test_what_a_task_returns_in_spite_of_the_order_is_its_result() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    worker, packet = running(bench, task)
    bench.cancel(task)
    bench.finish(worker, packet, [b"caught it"])
    assert bench.value_of(result_of(task)) == b"caught it"


def test_a_cancelled_task_is_not_tried_again_for_an_error_that_would_be_retried() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(retry_exceptions=b"*"))
    worker, packet = running(bench, task)
    bench.cancel(task)
    error = Outcome(values=[b"ValueError: mine"], is_error=True, retriable=True)
    bench.finish(worker, packet, [error])
    assert bench.state(task) is None
    assert bench.value_of(result_of(task)) == b"ValueError: mine"


def test_a_task_in_an_unread_packet_is_taken_back_and_its_neighbours_run() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    tasks = bench.submit_many(kind, 3)
    (worker,) = bench.busy()
    bench.cancel(tasks[1])
    assert [effect.worker_id for effect in bench.take(TakeBack)] == [worker]
    bench.take_back(worker)
    assert is_cancelled(bench, tasks[1])
    bench.run_all()
    assert bench.value_of(result_of(tasks[0])) == b"result"
    assert bench.value_of(result_of(tasks[2])) == b"result"
    bench.drop(*map(result_of, tasks))


def test_a_task_behind_the_running_one_is_handed_back_and_ends_there() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    worker, packet, tasks = packet_of_three(bench)
    bench.cancel(tasks[1])
    bench.hand_back(worker, (tasks[1], 0), (tasks[2], 0))
    assert is_cancelled(bench, tasks[1])
    bench.report(worker, tasks[0], 0, [b"first"], ended=packet.sequence)
    bench.run_all()
    assert bench.value_of(result_of(tasks[2])) == b"result"


def test_a_cancelled_task_whose_worker_dies_is_not_tried_again() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(max_retries=-1))
    worker, packet = running(bench, task)
    bench.cancel(task)
    bench.lose(worker, packet.sequence, 0)
    assert is_cancelled(bench, task)


def test_arguments_are_kept_while_the_interrupted_task_may_read_them() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class()
    bench.put(result_of(TaskId(b"p" * 24)), b"value")
    task = bench.submit(kind, dependencies=[result_of(TaskId(b"p" * 24))])
    bench.drop(result_of(TaskId(b"p" * 24)))
    worker, packet = running(bench, task)
    bench.cancel(task)
    assert result_of(TaskId(b"p" * 24)) in bench.node.state.objects
    bench.finish(worker, packet)
    assert result_of(TaskId(b"p" * 24)) not in bench.node.state.objects


# ---- by force ------------------------------------------------------------------------------------


def test_force_kills_the_worker_and_the_task_is_cancelled_not_crashed() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(max_retries=3))
    worker, packet = running(bench, task)
    bench.cancel(task, force=True)
    assert [effect.worker_id for effect in bench.take(TerminateWorker)] == [worker]
    bench.lose(worker, packet.sequence, 0)
    assert is_cancelled(bench, task)
    assert bench.take(StartWorker)  # another one takes its place


def test_a_worker_that_is_killed_for_a_task_gets_no_other() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    task = bench.submit(kind)
    worker, packet = running(bench, task)
    bench.cancel(task, force=True)
    late = bench.submit(kind)
    assert bench.busy() == []
    bench.lose(worker, packet.sequence, 0)
    bench.run_all()
    assert bench.value_of(result_of(late)) == b"result"


def test_force_asks_first_where_neighbours_would_die_too_and_then_kills() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    worker, packet, tasks = packet_of_three(bench)
    bench.cancel(tasks[0], force=True)
    assert bench.take(TerminateWorker) == []
    (interrupt,) = bench.take(Interrupt)
    assert interrupt.message.force
    bench.after(Config().force_after_s)
    assert [effect.worker_id for effect in bench.take(TerminateWorker)] == [worker]
    bench.lose(worker, packet.sequence, 0)
    assert is_cancelled(bench, tasks[0])
    bench.run_all()
    assert bench.value_of(result_of(tasks[1])) == b"result"
    assert bench.value_of(result_of(tasks[2])) == b"result"


def test_nobody_is_killed_for_a_task_that_has_stopped_in_time() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    worker, packet, tasks = packet_of_three(bench)
    bench.cancel(tasks[0], force=True)
    bench.finish(worker, packet)
    bench.after(Config().force_after_s)
    assert bench.take(TerminateWorker) == []


# ---- families ------------------------------------------------------------------------------------


def parent_and_child(bench: Bench) -> tuple[TaskId, TaskId]:
    kind = bench.task_class()
    parent = bench.submit(kind)
    worker, _ = running(bench, parent)
    child = bench.submit(kind, client=worker, parent=parent)
    return parent, child


def test_what_a_task_has_submitted_is_cancelled_with_it() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    parent, child = parent_and_child(bench)
    bench.cancel(parent)
    assert bench.state(child) is None
    assert bench.state(parent) == "RUNNING"


def test_unless_it_is_to_live_on() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    parent, child = parent_and_child(bench)
    bench.cancel(parent, recursive=False)
    assert bench.state(child) == "QUEUED"


def test_a_finished_task_has_no_children_to_cancel() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    parent = bench.submit(kind)
    worker, packet = running(bench, parent)
    child = bench.submit(kind, client=worker, parent=parent)
    bench.hold(result_of(child))
    bench.finish(worker, packet)
    bench.cancel(parent)
    bench.run_all()
    assert bench.value_of(result_of(child)) == b"result"


# ---- two nodes -----------------------------------------------------------------------------------


def test_a_task_that_waits_on_another_node_is_cancelled_there() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.carry()
    assert pair.a.state(task) == "FORWARDED"
    pair.a.cancel(task)
    assert pair.a.state(task) == "FORWARDED"
    pair.carry()
    assert pair.b.state(task) is None
    assert is_cancelled(pair.a, task)


def test_a_task_that_runs_on_another_node_is_interrupted_there() -> None:
    pair = Pair(max_retries=-1)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    worker, packet = running(pair.b, task)
    pair.a.cancel(task)
    pair.carry()
    (interrupt,) = pair.b.take(Interrupt)
    assert interrupt.message.task_id == task
    pair.b.lose(worker, packet.sequence, 0)
    pair.carry()
    assert is_cancelled(pair.a, task)


def test_a_cancelled_task_whose_node_dies_is_not_tried_again() -> None:
    pair = Pair(max_retries=-1)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.a.cancel(task)
    pair.b_dies()
    assert is_cancelled(pair.a, task)


def test_by_force_a_task_is_stopped_and_not_the_one_that_its_worker_runs_before_it() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class(max_retries=0)
    bench.warm_up(kind)
    first, second = bench.submit(kind), bench.submit(kind)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert [call.task_id for call in packet.tasks] == [first]
    bench.cancel(second, force=True)
    assert bench.take(TerminateWorker) == []
    bench.take_back(worker)
    assert is_cancelled(bench, second)
    bench.finish(worker, packet)
    assert bench.value_of(result_of(first)) == b"result"


def test_what_runs_for_a_node_that_dies_is_ended_and_so_is_what_it_submitted() -> None:
    pair = Pair()
    pair.b.warm_up(pair.b.task_class("before"))  # (Both benches count tasks from 0.)
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    worker, packet = running(pair.b, task)
    child = pair.b.submit(pair.b.task_class("child"), client=worker, parent=task)
    pair.b.start_all()
    helper, read = running(pair.b, child)
    pair.b.tell(NodeDied(node_id=A))
    ended = [effect.worker_id for effect in pair.b.take(TerminateWorker)]
    assert ended == [helper, worker]
    pair.b.lose(helper, read.sequence, 0)
    pair.b.lose(worker, packet.sequence, 0)
    assert pair.b.state(child) is None
    assert pair.b.state(task) is None


@pytest.mark.parametrize("is_first", [True, False])
def test_a_worker_with_more_to_do_is_told_to_stop_what_runs_for_a_dead_node(is_first: bool) -> None:
    pair = Pair()
    kind = pair.b.task_class()
    pair.b.warm_up(kind)
    slow = pair.b.submit_many(pair.b.task_class("slow"), 2)
    pair.b.start_all()
    occupied = [running(pair.b, task) for task in slow]
    own = None if is_first else pair.b.submit(kind)
    foreign = pair.a.submit(pair.kind)  # (Its id is that of the first task here, which has ended.)
    pair.carry()
    own = own or pair.b.submit(kind)
    for worker, packet in occupied:
        pair.b.finish(worker, packet)
    (worker,) = pair.b.busy()
    packet = pair.b.read(worker)
    pair.b.tell(NodeDied(node_id=A))
    assert pair.b.take(TerminateWorker) == []
    orders = [effect.message.task_id for effect in pair.b.take(Interrupt)]
    assert orders == [call.task_id for call in packet.tasks if call.task_id != own]
    assert (foreign in orders) is is_first
    assert pair.b.state(foreign) is None
    assert pair.b.state(own) == "RUNNING"


def test_what_a_driver_that_leaves_submitted_ends_unless_another_has_a_ref_to_its_result() -> None:
    bench = Bench(cpus=2)
    bench.group()
    kind = bench.task_class()
    alone, shared = (bench.submit(kind, client=b"leaver") for _ in range(2))
    for task in (alone, shared):
        bench.hold(result_of(task), client=b"leaver")
    bench.hold(result_of(shared))
    bench.start_all()
    begun = {task: running(bench, task) for task in (alone, shared)}
    bench.tell(ClientLeft(client_id=b"leaver"))
    ended = [effect.worker_id for effect in bench.take(TerminateWorker)]
    assert ended == [begun[alone][0]]
    bench.finish(*begun[shared])
    assert bench.value_of(result_of(shared)) == b"result"


def test_a_node_stops_a_task_for_its_owner_alone() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.carry()
    order = CancelForwarded(task_id=task, force=False, recursive=True)
    assert pair.a.tell(order, B) == []
    assert pair.b.tell(order, b"C" * 28) == []
    assert pair.b.state(task) == "QUEUED"
    pair.b.tell(order, A)
    assert pair.b.state(task) is None
    assert any(isinstance(effect, SendPeer) for effect in pair.b.effects)


# ---- pauses --------------------------------------------------------------------------------------


def killed_again(bench: Bench, task: TaskId) -> None:
    bench.start_all()
    worker, packet = running(bench, task)
    bench.lose(worker, packet.sequence, 0)


def test_the_first_retry_goes_at_once_and_the_others_wait_ever_longer() -> None:
    bench = Bench(cpus=1)
    bench.group()
    task = bench.submit(bench.task_class(max_retries=-1))
    killed_again(bench, task)
    assert bench.state(task) == "QUEUED"
    pauses = []
    for _ in range(12):
        killed_again(bench, task)
        assert bench.state(task) == "DELAYED"
        due_s = bench.node.next_deadline()
        assert due_s is not None
        pauses.append(due_s - bench.now)
        bench.after(pauses[-1] * 0.9)
        assert bench.state(task) == "DELAYED"
        bench.after(pauses[-1] * 0.2)
        assert bench.state(task) == "QUEUED"
    config = Config()
    assert pauses[:3] == pytest.approx([config.retry_delay_s * factor for factor in (1, 2, 4)])
    assert pauses[-1] == pytest.approx(config.retry_delay_max_s)


def test_others_run_while_a_killer_of_workers_waits() -> None:
    bench = Bench(cpus=1)
    bench.group()
    kind = bench.task_class(max_retries=-1)
    killer = bench.submit(kind)
    killed_again(bench, killer)
    killed_again(bench, killer)
    other = bench.submit(kind)
    bench.run_all()
    assert bench.value_of(result_of(other)) == b"result"
    assert bench.state(killer) == "DELAYED"


def test_a_task_that_waits_for_its_time_can_be_cancelled() -> None:
    bench = Bench(cpus=1)
    bench.group()
    task = bench.submit(bench.task_class(max_retries=-1))
    killed_again(bench, task)
    killed_again(bench, task)
    bench.cancel(task)
    assert is_cancelled(bench, task)
    bench.after(100.0)
    bench.drop(result_of(task))


def test_a_group_that_ends_takes_the_waiting_along() -> None:
    bench = Bench(cpus=1)
    group = bench.group(GROUP, workers=1)
    task = bench.submit(bench.task_class(max_retries=-1, group_id=group))
    killed_again(bench, task)
    killed_again(bench, task)
    assert bench.state(task) == "DELAYED"
    bench.terminate(group)
    assert bench.state(task) is None
    bench.after(100.0)


def test_an_exception_is_tried_again_without_a_pause() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    task = bench.submit(bench.task_class(max_retries=-1, retry_exceptions=b"*"))
    for _ in range(5):
        worker, packet = running(bench, task)
        error = Outcome(values=[b"ValueError: again"], is_error=True, retriable=True)
        bench.finish(worker, packet, [error])
    assert bench.state(task) == "RUNNING"
    assert bench.node.state.local_client == DRIVER


def test_a_batch_after_a_stuck_queue_was_emptied_is_sent_all_the_same() -> None:
    bench = Bench(cpus=1)
    group = bench.group(GROUP, workers=1)
    kind = bench.caller_class(group_id=group)
    other = bench.caller_class("other", group_id=group)
    bench.submit(other)
    stuck = bench.submit(kind)
    bench.tell(CancelTasks(task_ids=[stuck]), DRIVER)
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker))
    bench.submit(kind, calls=5)
    assert bench.busy() == [worker]
