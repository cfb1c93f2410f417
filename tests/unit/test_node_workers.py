"""Workers on one node: their deaths, packets that come back, blocking, cancelling, time."""

from __future__ import annotations

from collections import deque

import pytest

from poolray.config import Config
from poolray.ids import ObjectId, TaskId, WorkerId
from poolray.node.effects import SendWorker, Warn
from poolray.protocol.client import AllocateRange, CancelTasks, DefineFunction, ReleaseFunction
from poolray.protocol.node import CreateGroup, FailGroup, ResizeGroup
from poolray.protocol.values import FunctionDefinition, InArena, Outcome, Value
from poolray.protocol.worker import RunTasks, StopWorker, WorkerFailed, WorkerStopping
from tests.unit.node_harness import (
    DRIVER,
    Bench,
    GroupDrained,
    GroupFailed,
    Nudge,
    StartWorker,
    TakeBack,
    TerminateWorker,
    result_of,
)

GROUP = 7
#: Longer than any pause between two attempts.
PAUSE_S = Config().retry_delay_max_s


def crashed(result: Value | Outcome) -> bool:
    value = result.values[0] if isinstance(result, Outcome) else result
    return isinstance(value, bytes) and value.startswith(b"WorkerCrashedError")


# ---- death ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_retries", "attempts"), [(0, 1), (1, 2), (3, 4)])
def test_a_task_whose_worker_dies_is_tried_so_often(max_retries: int, attempts: int) -> None:
    bench = Bench(cpus=1)
    bench.group()
    task = bench.submit(bench.task_class(max_retries=max_retries))
    tried = 0
    while bench.state(task) is not None:
        bench.start_all()
        (worker,) = bench.busy()
        packet = bench.read(worker)
        tried += 1
        bench.lose(worker, packet.sequence, 0)
        bench.after(PAUSE_S)
    assert tried == attempts
    assert crashed(bench.value_of(result_of(task)))
    bench.drop(result_of(task))
    bench.assert_empty()


def test_without_limit_a_task_is_tried_for_ever() -> None:
    bench = Bench(cpus=1)
    bench.group()
    task = bench.submit(bench.task_class(max_retries=-1))
    for _ in range(20):
        bench.start_all()
        (worker,) = bench.busy()
        bench.lose(worker, bench.read(worker).sequence, 0)
        bench.after(PAUSE_S)
    assert bench.state(task) == "QUEUED"


def test_a_task_that_had_not_begun_when_its_worker_died_is_not_charged() -> None:
    bench = Bench(cpus=1)
    bench.group()
    task = bench.submit(bench.task_class(max_retries=0))
    for _ in range(5):
        bench.start_all()
        (worker,) = bench.busy()
        bench.lose(worker)
    bench.run_all()
    assert bench.value_of(result_of(task)) == b"result"


def test_of_a_packet_only_what_had_begun_is_charged() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class(max_retries=0)
    bench.warm_up(kind)
    tasks = bench.submit_many(kind, 16)
    (worker,) = bench.busy()
    first, _ = bench.packets(worker)
    assert len(first.tasks) > 3
    bench.report(worker, first.tasks[0].task_id, 0, [b"done"], ended=first.sequence - 1)
    # The second has been run without a report, the third runs, the others were never touched.
    bench.lose(worker, first.sequence, 2)
    states = [bench.state(task) for task in tasks]
    assert states[:3] == [None, None, None]
    assert set(states[3:]) == {"QUEUED"}
    assert bench.value_of(result_of(tasks[0])) == b"done"
    assert crashed(bench.value_of(result_of(tasks[1])))
    assert crashed(bench.value_of(result_of(tasks[2])))
    bench.run_all()
    assert all(bench.value_of(result_of(task)) == b"result" for task in tasks[3:])


def test_calls_of_a_lost_packet_run_again_in_their_order() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    tasks = bench.submit_many(kind, 20)
    (worker,) = bench.busy()
    first, _ = bench.packets(worker)
    bench.lose(worker, first.sequence, 1)
    bench.start_all()
    order: list[TaskId] = []
    while bench.busy():
        (worker,) = bench.busy()
        packet = bench.read(worker)
        order.extend(call.task_id for call in packet.tasks)
        bench.finish(worker, packet)
    assert order == tasks


def test_a_task_that_lost_a_worker_travels_alone() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    tasks = bench.submit_many(kind, 20)
    (worker,) = bench.busy()
    first, _ = bench.packets(worker)
    bench.lose(worker, first.sequence, 0)
    (worker,) = bench.start_all()
    assert [call.task_id for call in bench.read(worker).tasks] == tasks[:1]


def test_of_a_batch_each_begun_call_is_tried_again_alone() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    kind = bench.caller_class(group_id=group, max_retries=1)
    bench.warm_up(kind)
    bench.delivered()
    task = bench.submit(kind, calls=40)
    (worker,) = bench.busy()
    first, *_ = bench.packets(worker)
    bench.report(worker, task, 0, [b"0", b"1"], ended=first.sequence - 1, done=False)
    bench.lose(worker, first.sequence, 3)  # two reported, the third lost, the fourth killed it
    results: dict[int, bytes | Outcome] = {}
    for _, start, values in bench.delivered():
        results.update(enumerate(values, start))
    bench.start_all()
    alone: list[list[Value]] = []
    while bench.busy():
        (worker,) = bench.busy()
        packet = bench.read(worker)
        alone.append(packet.tasks[0].calls)
        bench.finish(worker, packet, [call for t in packet.tasks for call in t.calls])
    assert alone[:2] == [[b"call-2"], [b"call-3"]]
    for _, start, values in bench.delivered():
        for index, value in enumerate(values, start):
            assert index not in results, "a result was delivered twice"
            results[index] = value
    assert sorted(results) == list(range(40))
    bench.assert_empty()


def test_a_batch_without_retries_fails_exactly_what_had_begun() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    kind = bench.caller_class(group_id=group, max_retries=0)
    bench.warm_up(kind)
    bench.delivered()
    bench.submit(kind, calls=40)
    (worker,) = bench.busy()
    first, *_ = bench.packets(worker)
    bench.lose(worker, first.sequence, 1)
    failed = {start: values for _, start, values in bench.delivered()}
    assert sorted(failed) == [0, 1]
    assert all(crashed(value) for values in failed.values() for value in values)
    bench.run_all()
    assert sum(len(values) for _, _, values in bench.delivered()) == 38


def test_what_a_dead_worker_held_and_was_writing_is_let_go() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    bench.submit(bench.task_class(max_retries=0))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    kept = ObjectId(b"k" * 28)
    bench.put(kept, b"value")
    bench.hold(kept, client=worker)
    bench.drop(kept)
    bench.say(worker, AllocateRange(request_id=1, object_id=ObjectId(b"x" * 28), size_bytes=8192))
    assert bench.node.statistics().arena.used_bytes == 8192
    bench.lose(worker, packet.sequence, 0)
    assert bench.node.statistics().arena.used_bytes == 0
    assert bench.node.statistics().objects == 1, "only the task's result, for the driver"


def test_words_of_a_worker_that_is_dead_are_not_heard() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    worker = WorkerId(b"w%027d" % 1)
    bench.lose(worker)
    bench.say(worker, AllocateRange(request_id=1, object_id=ObjectId(b"x" * 28), size_bytes=8192))
    bench.hand_back(worker)
    bench.block(worker)
    bench.take_back(worker)
    bench.finish(worker, RunTasks(sequence=1, tasks=[]))
    assert bench.node.statistics().clients == 0


def test_workers_of_other_tasks_go_on_when_one_dies() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class(max_retries=0)
    tasks = bench.submit_many(kind, 2)
    one, other = bench.busy()
    bench.lose(one, bench.read(one).sequence, 0)
    bench.finish(other, bench.read(other))
    values = [bench.value_of(result_of(task)) for task in tasks]
    assert sorted(map(crashed, values)) == [False, True]


def test_a_dead_worker_of_a_fixed_group_is_replaced_at_once() -> None:
    bench = Bench()
    bench.group(GROUP, workers=2)
    bench.lose(WorkerId(b"w%027d" % 1))
    assert len(bench.take(StartWorker)) == 1


# ---- hand back, take back ------------------------------------------------------------------------


def batch_on_one_worker(calls: int = 40, **options: int) -> tuple[Bench, TaskId, WorkerId]:
    bench = Bench()
    group = bench.group(GROUP, workers=1, **options)
    kind = bench.caller_class(group_id=group)
    bench.warm_up(kind)
    bench.delivered()
    task = bench.submit(kind, calls=calls)
    (worker,) = bench.busy()
    return bench, task, worker


def assert_each_delivered_once(bench: Bench, calls: int) -> None:
    seen = [
        index
        for _, start, values in bench.delivered()
        for index in range(start, start + len(values))
    ]
    assert sorted(seen) == list(range(calls))
    bench.assert_empty()


def test_calls_that_are_handed_back_while_one_runs_go_elsewhere() -> None:
    bench, task, worker = batch_on_one_worker()
    first = bench.read(worker)
    bench.hand_back(worker, (task, 3))
    count = len(first.tasks[0].calls)
    bench.report(worker, task, 0, [b"r"] * 3, ended=first.sequence)
    assert count > 3
    bench.run_all()
    assert_each_delivered_once(bench, 40)


def test_a_batch_is_handed_back_whole_after_all_results_before_were_sent() -> None:
    bench, task, worker = batch_on_one_worker()
    first = bench.read(worker)
    bench.report(worker, task, 0, [b"r"] * 4, ended=first.sequence - 1, done=False)
    bench.hand_back(worker, (task, 4))
    # The worker says that its share is over: that is not the end of the task.
    bench.report(worker, task, 4, [], ended=first.sequence, done=True)
    bench.run_all()
    assert_each_delivered_once(bench, 40)


def test_nothing_waits_behind_a_worker_that_hands_back() -> None:
    bench = Bench(packets_per_worker_max=3)
    group = bench.group(GROUP, workers=1)
    kind = bench.caller_class(group_id=group)
    bench.warm_up(kind)
    task = bench.submit(kind, calls=4)
    (worker,) = bench.busy()
    first = bench.read(worker)
    assert len(first.tasks[0].calls) == 2
    waiting = len(bench.queues[worker])
    bench.hand_back(worker, (task, 1))
    assert len(bench.queues[worker]) == waiting
    bench.report(worker, task, 0, [b"r"], ended=first.sequence)
    assert len(bench.queues[worker]) > waiting, "now it takes more again"


def test_a_worker_that_hands_back_and_dies_is_charged_for_the_running_call_only() -> None:
    bench, task, worker = batch_on_one_worker()
    first = bench.read(worker)
    bench.hand_back(worker, (task, 1))
    bench.lose(worker, first.sequence, 0)
    bench.run_all()
    assert_each_delivered_once(bench, 40)


def test_packets_that_are_taken_back_are_sent_again_with_their_definitions() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    task = bench.submit(kind)
    (worker,) = bench.busy()
    bench.take_back(worker)
    assert bench.state(task) == "RUNNING", "it was sent again, the worker being idle"
    packet = bench.read(worker)
    assert packet.functions
    assert packet.classes
    bench.finish(worker, packet)
    assert bench.value_of(result_of(task)) == b"result"


def test_an_idle_worker_is_fed_from_packets_that_wait_behind_another() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.warm_up(kind, elapsed_s=2e-3)
    tasks = bench.submit_many(kind, 4)
    one, other = bench.busy()
    packets = {worker: bench.packets(worker) for worker in (one, other)}
    for packet in packets[one]:
        bench.finish(one, packet, elapsed_s=2e-3)
    assert [effect.worker_id for effect in bench.take(TakeBack)] == [other]
    bench.queues[other] = deque(packets[other][1:])
    bench.take_back(other)
    assert bench.busy() == [one], "the idle one has got it"
    bench.finish(one, bench.read(one))
    bench.finish(other, packets[other][0])
    assert all(bench.value_of(result_of(task)) == b"result" for task in tasks)


def test_what_waits_behind_a_long_call_is_found_when_a_worker_is_idle_later() -> None:
    """Its time was up while nobody was idle, and when somebody was it seemed too short to move."""
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.warm_up(kind, elapsed_s=1e-5)
    bench.submit_many(kind, 4)
    one, other = bench.busy()
    packets = bench.packets(other)
    assert len(packets) == 2
    assert all(len(packet.tasks) == 1 for packet in packets)
    bench.after(1.0)
    for packet in bench.packets(one):
        bench.finish(one, packet, elapsed_s=1e-5)
    assert bench.take(TakeBack) == []
    bench.after(1.0)
    assert [effect.worker_id for effect in bench.take(TakeBack)] == [other]


def test_nothing_is_taken_back_for_an_idle_worker_that_lacks_resources() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.warm_up(kind, elapsed_s=2e-3)
    bench.submit_many(kind, 2)
    bench.hand_back(bench.busy()[0])
    assert bench.take(TakeBack) == []


def test_a_silent_worker_is_nudged_once_per_packet() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.warm_up(kind)
    bench.submit_many(kind, 40)
    bench.after(1.0)
    nudged = [effect.worker_id for effect in bench.take(Nudge)]
    assert sorted(nudged) == sorted(bench.busy())
    bench.after(1.0)
    assert bench.take(Nudge) == []


def test_an_idle_node_has_no_deadline() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    bench.run_all(bench.submit(bench.task_class()))
    bench.after(1e6)
    assert bench.node.next_deadline() is None
    assert not bench.node.has_work()


def test_surplus_idle_workers_are_stopped_after_a_while() -> None:
    bench = Bench(cpus=1)
    bench.group()
    kind = bench.task_class()
    parent = bench.submit(kind)
    bench.start_all()
    (first,) = bench.busy()
    packet = bench.read(first)
    bench.block(first)
    child = bench.submit(kind)
    bench.run_all(child)
    bench.unblock(first)
    bench.finish(first, packet)
    bench.run_all(parent)
    assert bench.node.statistics().idle_workers == 2
    bench.after(11.0)
    assert bench.node.statistics().idle_workers == 1


# ---- blocking ------------------------------------------------------------------------------------


def test_a_blocked_task_gives_its_cpus_to_others_and_takes_them_again() -> None:
    bench = Bench(cpus=1)
    bench.group()
    kind = bench.task_class()
    bench.submit(kind)
    bench.start_all()
    (parent,) = bench.busy()
    packet = bench.read(parent)
    child = bench.submit(kind)
    assert bench.state(child) == "QUEUED"
    bench.block(parent)
    (worker,) = bench.start_all()
    assert bench.state(child) == "RUNNING"
    bench.unblock(parent)
    assert bench.cpus_free == -1.0, "both run for a while"
    bench.finish(worker, bench.read(worker))
    bench.finish(parent, packet)
    assert bench.cpus_free == 1.0


def test_while_too_much_runs_a_worker_gets_no_more_packets() -> None:
    bench = Bench(cpus=1)
    bench.group()
    kind = bench.task_class()
    bench.warm_up(kind)
    bench.submit(kind)
    bench.start_all()
    (parent,) = bench.busy()
    running = bench.read(parent)
    bench.block(parent)
    bench.submit_many(kind, 100)
    (other,) = bench.start_all()
    first, second = bench.packets(other)
    bench.unblock(parent)
    bench.finish(other, first)
    bench.finish(other, second)
    assert not bench.queues.get(other)
    bench.finish(parent, running)
    assert bench.busy(), "now there is room again"


def test_what_waits_behind_a_blocked_task_is_taken_back() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    bench.submit_many(kind, 2)
    (worker,) = bench.busy()
    bench.read(worker)
    bench.block(worker)
    assert [effect.worker_id for effect in bench.take(TakeBack)] == [worker]
    bench.take_back(worker)
    assert bench.node.statistics().queued_calls == 1


def test_a_blocked_worker_that_dies_gives_nothing_back_twice() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    bench.submit(bench.task_class(max_retries=0))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    bench.block(worker)
    bench.lose(worker, packet.sequence, 0)
    assert bench.cpus_free == 1.0


def test_a_worker_that_was_told_to_stop_still_gives_its_cpus_when_its_task_blocks() -> None:
    bench = Bench(cpus=1)
    bench.group(GROUP, workers=1)
    kind = bench.task_class(group_id=GROUP, cpus=1)
    parent = bench.submit(kind)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    bench.block(worker)
    bench.tell(CancelTasks(task_ids=[parent]), DRIVER)
    bench.close(GROUP)
    assert bench.cpus_free == 1.0
    bench.unblock(worker)
    assert bench.cpus_free == 0.0
    bench.finish(worker, packet)
    assert bench.cpus_free == 1.0
    bench.lose(worker, signal=None)
    assert bench.take(GroupDrained)


# ---- limits of calls per worker ------------------------------------------------------------------


def test_a_worker_is_replaced_after_its_number_of_tasks() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1, max_tasks_per_worker=3)
    kind = bench.caller_class(group_id=group)
    bench.submit(kind, calls=7)
    runs: dict[WorkerId, int] = {}
    while bench.busy():
        (worker,) = bench.busy()
        while bench.queues.get(worker):
            message = bench.queues[worker].popleft()
            if isinstance(message, RunTasks):
                calls = sum(len(task.calls) for task in message.tasks)
                runs[worker] = runs.get(worker, 0) + calls
                bench.finish(worker, message)
            else:
                bench.lose(worker, signal=None)
        bench.start_all()
    assert list(runs.values()) == [3, 3, 1]
    assert_each_delivered_once(bench, 7)


def test_calls_handed_back_do_not_count_towards_the_limit() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1, max_tasks_per_worker=10)
    kind = bench.caller_class(group_id=group)
    bench.warm_up(kind)
    bench.delivered()
    task = bench.submit(kind, calls=9)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert len(packet.tasks[0].calls) > 2
    for message in list(bench.queues.get(worker, ())):
        assert not isinstance(message, StopWorker)
    bench.take_back(worker)
    bench.hand_back(worker, (task, 1))
    bench.report(worker, task, 0, [b"r"], ended=packet.sequence)
    assert bench.node.state.workers[worker].state.name == "BUSY"
    bench.run_all()
    assert_each_delivered_once(bench, 9)
    assert bench.node.state.workers[worker].calls_sent == 10


def test_max_calls_counts_the_calls_of_its_function_alone() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    limited, other = bench.task_class("limited", max_calls=2), bench.task_class("other")
    for kind in (other, other, other, limited, other):
        bench.run_all(bench.submit(kind))
    assert bench.node.statistics().idle_workers == 1
    bench.submit(limited)
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker))
    assert bench.reads_stop(worker)


# ---- start and failure ---------------------------------------------------------------------------


def test_workers_that_do_not_start_fail_the_group_after_some_attempts() -> None:
    bench = Bench()
    bench.group(GROUP, workers=2, start_now=False)
    kind = bench.caller_class(group_id=GROUP)
    bench.submit(kind, calls=3)
    for _ in range(10):
        for effect in bench.take(StartWorker):
            bench.lose(effect.worker_id, signal=None)
    (failed,) = bench.take(GroupFailed)
    assert b"WorkerStartError" in failed.error
    ((_, start, results),) = bench.delivered()
    assert (start, len(results)) == (0, 3)
    bench.submit(kind)
    ((_, _, results),) = bench.delivered()
    assert isinstance(results[0], Outcome)
    assert results[0].values == [failed.error], "from now on as well"
    bench.terminate(GROUP)
    assert bench.take(GroupDrained)
    bench.assert_empty()


def test_an_initializer_that_raises_fails_the_group_with_its_error() -> None:
    bench = Bench()
    bench.tell(CreateGroup(group_id=GROUP, size=1, start_now=True))
    for _ in range(10):
        for effect in bench.take(StartWorker):
            failure = WorkerFailed(worker_id=effect.worker_id, error=b"boom", reason="boom")
            bench.tell(failure)
            bench.lose(effect.worker_id, signal=None)
    assert [effect.error for effect in bench.take(GroupFailed)] == [b"boom"]
    bench.close(GROUP)
    assert bench.take(GroupDrained)


def test_plain_tasks_fail_when_no_worker_starts_but_their_group_lives() -> None:
    bench = Bench(cpus=1)
    bench.group()
    kind = bench.task_class()
    task = bench.submit(kind)
    for _ in range(3):
        (effect,) = bench.take(StartWorker)
        bench.lose(effect.worker_id)
    value = bench.value_of(result_of(task))
    assert isinstance(value, bytes)
    assert b"WorkerStartError" in value
    later = bench.submit(kind)
    bench.run_all()
    assert bench.value_of(result_of(later)) == b"result"


def test_failures_to_start_do_not_fail_tasks_that_other_workers_serve() -> None:
    bench = Bench(cpus=2)
    bench.group()
    kind = bench.task_class()
    bench.run_all(bench.submit(kind), elapsed_s=1.0)
    tasks = bench.submit_many(kind, 3)
    for _ in range(3):
        for effect in bench.take(StartWorker):
            bench.lose(effect.worker_id)
    assert bench.take(StartWorker) == [], "a break before it is tried again"
    assert all(bench.state(task) for task in tasks)
    bench.after(2.0)
    assert len(bench.take(StartWorker)) == 1


def test_a_worker_that_hangs_at_its_start_is_killed() -> None:
    bench = Bench()
    bench.tell(CreateGroup(group_id=GROUP, size=1, start_now=True))
    bench.after(61.0)
    assert len(bench.take(TerminateWorker)) == 1
    assert bench.take(Warn)


def test_a_death_breaks_a_group_that_asks_for_it() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=2, break_on_death=True)
    kind = bench.caller_class(group_id=group)
    bench.submit(kind, calls=6)
    one, other = bench.busy()
    packet = bench.read(one)
    bench.lose(one, packet.sequence, 0)
    assert len(bench.take(GroupFailed)) == 1
    assert [effect.worker_id for effect in bench.take(TerminateWorker)] == [other]
    assert bench.node.statistics().tasks == 0
    assert sum(len(results) for _, _, results in bench.delivered()) == 6
    bench.lose(other)
    bench.close(GROUP)
    assert len(bench.take(GroupDrained)) == 1


def test_a_slot_that_comes_free_serves_a_group_that_waits_for_one() -> None:
    bench = Bench(slots=1)
    bench.group(1, workers=1)
    bench.tell(CreateGroup(group_id=2, size=1))
    bench.submit(bench.caller_class(group_id=2))
    assert bench.take(StartWorker) == []
    bench.close(1)
    bench.lose(WorkerId(b"w%027d" % 1), signal=None)
    assert len(bench.take(StartWorker)) == 1


def test_resources_that_come_free_serve_another_group() -> None:
    bench = Bench(cpus=1)
    bench.group(1, workers=1)
    bench.group(2, workers=1)
    first = bench.submit(bench.task_class("one", group_id=1))
    second = bench.submit(bench.task_class("two", group_id=2))
    assert bench.state(second) == "QUEUED"
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker))
    assert bench.state(first) is None
    assert bench.state(second) == "RUNNING"


# ---- end of a group ------------------------------------------------------------------------------


def test_a_closed_group_runs_its_tasks_and_then_stops_its_workers() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=2)
    bench.submit(bench.caller_class(group_id=group), calls=5)
    bench.close(GROUP)
    workers = list(bench.node.state.workers)
    while bench.node.statistics().tasks:
        for worker in bench.busy():
            bench.finish(worker, bench.read(worker))
    assert all(bench.reads_stop(worker) for worker in workers)
    assert bench.take(GroupDrained) == []
    for worker in workers:
        bench.lose(worker, signal=None)
    assert len(bench.take(GroupDrained)) == 1
    assert bench.node.statistics().groups == 0
    assert bench.node.state.classes == {}


def test_a_closed_group_waits_for_tasks_that_wait_for_arguments() -> None:
    bench = Bench()
    bench.group(workers=1)
    group = bench.group(GROUP, workers=1)
    first = bench.submit(bench.task_class())
    kind = bench.task_class("late", group_id=group, cpus=0)
    second = bench.submit(kind, dependencies=[result_of(first)])
    bench.close(GROUP)
    assert bench.take(GroupDrained) == []
    bench.run_all()
    assert bench.value_of(result_of(second)) == b"result"


def test_workers_of_a_closed_group_run_their_initializers_first() -> None:
    bench = Bench()
    bench.tell(CreateGroup(group_id=GROUP, size=1, start_now=True))
    bench.close(GROUP)
    assert bench.take(TerminateWorker) == []
    (worker,) = bench.start_all()
    assert bench.reads_stop(worker)


def test_terminating_a_group_drops_its_tasks_and_kills_its_workers() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=2)
    kind = bench.task_class(group_id=group, cpus=1)
    tasks = bench.submit_many(kind, 5)
    request = bench.get(*map(result_of, tasks))
    bench.terminate(GROUP)
    assert bench.values()[request].errors, "the first error ends a get"
    for task in tasks:
        assert b"TaskCancelledError" in bench.value_of(result_of(task))  # type: ignore[operator]
    killed = [effect.worker_id for effect in bench.take(TerminateWorker)]
    assert len(killed) == 2
    assert bench.cpus_free == 2.0
    for worker in killed:
        bench.lose(worker)
    assert bench.take(StartWorker) == []
    assert len(bench.take(GroupDrained)) == 1


@pytest.mark.parametrize("how", ["terminate", "fail"])
def test_tasks_that_wait_for_each_other_end_with_their_group(how: str) -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    kind = bench.task_class(group_id=group, cpus=1)
    first = bench.submit(kind)
    second = bench.submit(kind, dependencies=[result_of(first)])
    third = bench.submit(kind, dependencies=[result_of(first), result_of(second)])
    if how == "terminate":
        bench.terminate(GROUP)
    else:
        bench.tell(FailGroup(group_id=group, error=b"failed"))
    for task in (first, second, third):
        assert bench.state(task) is None
        request = bench.get(result_of(task))
        assert bench.values()[request].errors == [0]


def test_terminating_twice_or_what_is_gone_is_nothing() -> None:
    bench = Bench()
    bench.group(GROUP, workers=1)
    bench.terminate(GROUP)
    bench.terminate(GROUP)
    bench.lose(WorkerId(b"w%027d" % 1))
    assert len(bench.take(GroupDrained)) == 1
    assert bench.terminate(GROUP) == []
    assert bench.close(GROUP) == []


def test_resizing_starts_and_stops_workers() -> None:
    bench = Bench()
    bench.group(GROUP, workers=1)
    bench.tell(ResizeGroup(group_id=GROUP, size=3))
    assert len(bench.start_all()) == 2
    bench.tell(ResizeGroup(group_id=GROUP, size=1))
    bench.tell(ResizeGroup(group_id=GROUP, size=1))
    stopped = [worker for worker in bench.busy() if bench.reads_stop(worker)]
    assert len(stopped) == 2
    for worker in stopped:
        bench.lose(worker, signal=None)
    assert bench.take(StartWorker) == []
    assert bench.node.statistics().workers == 1


def test_a_busy_surplus_worker_stops_when_it_is_done() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=2)
    bench.submit(bench.caller_class(group_id=group), calls=2)
    bench.tell(ResizeGroup(group_id=GROUP, size=1))
    one, other = bench.busy()
    bench.finish(one, bench.read(one))
    assert bench.reads_stop(one)
    bench.finish(other, bench.read(other))
    assert not bench.busy()


# ---- cancelling ----------------------------------------------------------------------------------


def test_a_queued_batch_that_is_cancelled_never_runs() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1, start_now=False)
    kind = bench.caller_class(group_id=group)
    first, second = bench.submit(kind, calls=3), bench.submit(kind, calls=3)
    bench.tell(CancelTasks(task_ids=[first]), DRIVER)
    assert bench.node.statistics().queued_calls == 3
    bench.run_all()
    assert {task for task, _, _ in bench.delivered()} == {second}
    bench.assert_empty()


def test_cancelling_all_leaves_no_class_ready() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1, start_now=False)
    kind = bench.caller_class(group_id=group)
    tasks = [bench.submit(kind, calls=2) for _ in range(10)]
    for task in reversed(tasks):
        bench.tell(CancelTasks(task_ids=[task]), DRIVER)
    assert bench.node.state.groups[group].ready == {}
    bench.assert_empty()


def test_cancelling_a_batch_that_runs_gets_at_all_its_parts() -> None:
    bench, task, worker = batch_on_one_worker()
    first = bench.read(worker)
    bench.hand_back(worker, (task, 2))
    bench.tell(CancelTasks(task_ids=[task]), DRIVER)
    assert bench.node.statistics().tasks == 0
    assert bench.take(TakeBack)
    assert [effect.worker_id for effect in bench.take(Nudge)] == [worker]
    bench.take_back(worker)
    bench.hand_back(worker, (task, 2))
    bench.report(worker, task, 0, [b"r"] * 2, ended=first.sequence)
    assert bench.delivered() == []
    bench.assert_empty()
    assert bench.node.statistics().idle_workers == 1


def test_the_arguments_of_a_cancelled_task_stay_while_its_worker_may_read_them() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    kind = bench.caller_class(group_id=group)
    value = ObjectId(b"v" * 28)
    bench.tell(AllocateRange(request_id=1, object_id=value, size_bytes=9000), DRIVER)
    bench.put(value, InArena(object_id=value, offset=0, size_bytes=9000))
    task = bench.submit(kind, borrows=[value])
    bench.drop(value)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    bench.tell(CancelTasks(task_ids=[task]), DRIVER)
    assert bench.node.statistics().arena.used_bytes > 0
    bench.finish(worker, packet)
    bench.assert_empty()


def test_parts_of_a_batch_hold_its_references_until_the_last_has_ended() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=2)
    kind = bench.caller_class(group_id=group)
    value = ObjectId(b"v" * 28)
    bench.put(value, b"value")
    bench.submit(kind, calls=2, borrows=[value])
    bench.drop(value)
    one, other = bench.busy()
    bench.finish(one, bench.read(one))
    assert bench.node.statistics().objects == 1
    bench.finish(other, bench.read(other))
    bench.assert_empty()


def test_the_large_result_of_a_cancelled_task_is_freed() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    task = bench.submit(bench.caller_class(group_id=group))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    name = ObjectId(b"x" * 28)
    bench.say(worker, AllocateRange(request_id=1, object_id=name, size_bytes=5000))
    bench.tell(CancelTasks(task_ids=[task]), DRIVER)
    place = InArena(object_id=name, offset=0, size_bytes=5000)
    bench.finish(worker, packet, [Outcome(values=[place])])
    bench.assert_empty()


def test_an_order_to_stop_that_is_taken_back_is_given_again() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    task = bench.submit(bench.caller_class(group_id=group), calls=1)
    (worker,) = bench.busy()
    bench.tell(CancelTasks(task_ids=[task]), DRIVER)
    bench.close(GROUP)
    bench.take_back(worker)
    assert bench.reads_stop(worker)


def test_a_worker_that_says_it_stops_gets_nothing_more() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    worker = WorkerId(b"w%027d" % 1)
    bench.tell(WorkerStopping(worker_id=worker))
    bench.submit(bench.caller_class(group_id=group))
    sent = [e for e in bench.take(SendWorker) if isinstance(e.message, RunTasks)]
    assert sent == []
    bench.lose(worker, signal=None)
    bench.run_all()
    assert len(bench.delivered()) == 1


# ---- functions -----------------------------------------------------------------------------------


def test_a_released_function_is_forgotten_with_its_last_task_and_workers_are_told() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind, other = bench.task_class("gone"), bench.task_class("other")
    task = bench.submit(kind)
    bench.tell(ReleaseFunction(function_id=b"gone"), DRIVER)
    assert b"gone" in bench.node.state.functions, "its task may have to be sent again"
    bench.run_all(task)
    assert b"gone" not in bench.node.state.functions
    assert kind not in bench.node.state.classes
    bench.submit(other)
    (worker,) = bench.busy()
    assert bench.read(worker).forget == [b"gone"]


def test_a_function_that_two_clients_defined_stays_until_both_let_go() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    bench.task_class("f")
    worker = WorkerId(b"w%027d" % 1)
    definition = FunctionDefinition(function_id=b"f", blob=b"code", name="f")
    bench.say(worker, DefineFunction(definition=definition))
    bench.tell(ReleaseFunction(function_id=b"f"), DRIVER)
    assert b"f" in bench.node.state.functions
    bench.lose(worker)
    assert bench.node.state.functions == {}
    assert bench.node.state.classes == {}


def test_a_batch_finds_idle_workers_after_others_had_to_wait() -> None:
    """A queue that was stuck when a worker drained it is not stuck for the next batch."""
    bench = Bench()
    group = bench.group(1, workers=1)
    kind = bench.caller_class(group_id=group)
    for _ in range(3):
        bench.submit(kind, calls=[b"x", b"y"])  # the first is sent; the others wait behind it
    bench.run_all(elapsed_s=1.0)  # so long that nothing is sent ahead
    assert bench.busy() == []
    bench.submit(kind, calls=[b"a", b"b", b"c"])
    assert len(bench.busy()) == 1
    bench.run_all()
    bench.assert_empty()
