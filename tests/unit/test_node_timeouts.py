"""Calls of limited time: when they are looked at, and what becomes of one that is late."""

from __future__ import annotations

from poolray.ids import ClassId, TaskId, WorkerId
from poolray.node.effects import Interrupt, LookAtCall
from poolray.protocol.node import CallProgress
from poolray.protocol.values import Outcome
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import Bench, StartWorker, TakeBack, TerminateWorker

GROUP = 7
LIMIT_S = 2.0
LATE = b"CallTimeoutError: "


def limited(bench: Bench, workers: int = 1, **options: object) -> ClassId:
    """A class of calls with a limit, of which the node knows that they are short."""
    group = bench.group(GROUP, workers=workers)
    kind = bench.caller_class(group_id=group, timeout_s=LIMIT_S, **options)
    bench.warm_up(kind)
    return kind


def running(bench: Bench, calls: int) -> tuple[WorkerId, RunTasks, TaskId]:
    """A worker that has read a packet of so many calls of one task."""
    (kind,) = bench._classes
    task = bench.submit(kind, calls=2 * calls)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert [len(call.calls) for call in packet.tasks] == [calls]
    return worker, packet, task


def look(bench: Bench, worker: WorkerId, sequence: int, index: int, running_s: float) -> None:
    bench.tell(CallProgress(worker_id=worker, sequence=sequence, index=index, running_s=running_s))


def make_late(bench: Bench, worker: WorkerId, packet: RunTasks, index: int) -> None:
    bench.after(LIMIT_S)
    assert LookAtCall(worker) in bench.take(LookAtCall)
    look(bench, worker, packet.sequence, index, LIMIT_S)


def outcomes(bench: Bench, task: TaskId) -> dict[int, bytes]:
    """Index of a call of the task -> its result, or the beginning of its error."""
    found = {}
    for task_id, start, results in bench.delivered():
        assert task_id == task
        for index, result in enumerate(results, start):
            assert index not in found, "a result came twice"
            value = result.values[0] if isinstance(result, Outcome) else result
            assert isinstance(value, bytes)
            found[index] = value
    return found


def test_calls_without_a_limit_are_never_looked_at() -> None:
    bench = Bench()
    group = bench.group(GROUP, workers=1)
    bench.submit(bench.caller_class(group_id=group))
    bench.after(1e6)
    assert bench.take(LookAtCall) == []


def test_a_call_is_looked_at_when_it_may_be_late_and_not_before() -> None:
    bench = Bench()
    limited(bench)
    worker, packet, _ = running(bench, 1)
    bench.after(LIMIT_S - 0.1)
    assert bench.take(LookAtCall) == []
    bench.after(0.1)
    assert bench.take(LookAtCall) == [LookAtCall(worker)]
    look(
        bench, worker, packet.sequence, 0, running_s=LIMIT_S - 0.5
    )  # it was read half a second late
    bench.after(0.4)
    assert bench.take(LookAtCall) == []
    bench.after(0.1)
    assert bench.take(LookAtCall) == [LookAtCall(worker)]


def test_a_worker_between_two_calls_has_all_the_time_of_the_next_one() -> None:
    bench = Bench()
    limited(bench)
    worker, packet, _ = running(bench, 2)
    bench.after(LIMIT_S)
    bench.take(LookAtCall)
    look(bench, worker, packet.sequence, 1, running_s=-1.0)
    bench.after(LIMIT_S - 0.1)
    assert bench.take(LookAtCall) == []
    bench.after(0.1)
    assert bench.take(LookAtCall) == [LookAtCall(worker)]


def test_the_word_of_an_earlier_packet_says_nothing_of_this_one() -> None:
    bench = Bench()
    limited(bench)
    worker, packet, _ = running(bench, 1)
    bench.after(LIMIT_S)
    look(bench, worker, packet.sequence - 1, 0, running_s=LIMIT_S)
    assert bench.take(Interrupt) == []


def test_a_worker_without_calls_is_not_looked_at() -> None:
    bench = Bench()
    limited(bench)
    bench.run_all()
    bench.after(10 * LIMIT_S)
    assert bench.take(LookAtCall) == []


def test_a_late_call_is_told_to_stop_and_its_worker_gets_no_more() -> None:
    bench = Bench()
    limited(bench)
    worker, packet, task = running(bench, 3)
    bench.report(worker, task, 0, [b"0"], ended=packet.sequence - 1, done=False)
    make_late(bench, worker, packet, 1)
    (order,) = bench.take(Interrupt)
    assert (order.message.sequence, order.message.index) == (packet.sequence, 1)
    assert bench.take(TakeBack)
    bench.take_back(worker)
    assert bench.reads_stop(worker)
    # It obeys: the rest comes back, the late call reports its error, the process ends.
    bench.hand_back(worker, (task, 2))
    late = Outcome(values=[LATE], is_error=True)
    bench.report(worker, task, 1, [late], ended=packet.sequence)
    bench.lose(worker, packet.sequence, 1, signal=None)
    bench.run_all()
    assert outcomes(bench, task) == {0: b"0", 1: LATE, **dict.fromkeys(range(2, 6), b"result")}
    bench.assert_empty()


def test_the_worker_of_a_call_that_does_not_stop_is_killed_once_and_only_that_call_fails() -> None:
    bench = Bench(force_after_s=1.0)
    limited(bench)
    worker, packet, task = running(bench, 3)
    bench.report(worker, task, 0, [b"0"], ended=packet.sequence - 1, done=False)
    make_late(bench, worker, packet, 1)
    bench.take_back(worker)
    bench.after(0.9)
    assert bench.take(TerminateWorker) == []
    bench.after(0.1)
    assert bench.take(TerminateWorker) == [TerminateWorker(worker)]
    bench.after(1.0)
    assert bench.take(TerminateWorker) == []
    bench.lose(worker, packet.sequence, 1)
    assert len(bench.take(StartWorker)) == 1
    found = outcomes(bench, task)
    assert found[0] == b"0"
    assert found[1].startswith(LATE)
    bench.effects.clear()
    bench.ready(max(bench.node.state.workers))
    bench.run_all()
    assert outcomes(bench, task) == dict.fromkeys(range(2, 6), b"result")
    bench.assert_empty()


def test_a_worker_that_has_ended_its_late_call_is_not_killed() -> None:
    bench = Bench(force_after_s=1.0)
    limited(bench)
    worker, packet, task = running(bench, 1)
    make_late(bench, worker, packet, 0)
    bench.report(worker, task, 0, [Outcome(values=[LATE], is_error=True)], ended=packet.sequence)
    bench.after(1.0)  # its exit handlers take their time
    assert bench.take(TerminateWorker) == []


def test_a_worker_that_dies_in_another_call_than_the_late_one_costs_that_a_retry() -> None:
    bench = Bench()
    limited(bench, max_retries=1)
    worker, packet, task = running(bench, 2)
    make_late(bench, worker, packet, 0)
    bench.take_back(worker)
    bench.report(worker, task, 0, [Outcome(values=[LATE], is_error=True)], ended=0, done=False)
    bench.lose(worker, packet.sequence, 1)
    bench.run_all()
    assert outcomes(bench, task) == {0: LATE, **dict.fromkeys(range(1, 4), b"result")}


def test_the_other_workers_of_a_group_take_what_was_behind_a_late_call() -> None:
    bench = Bench()
    kind = limited(bench, workers=2)
    task = bench.submit(kind, calls=12)
    first, second = bench.busy()
    packet = bench.read(first)
    make_late(bench, first, packet, 0)
    bench.take_back(first)
    bench.hand_back(first, (packet.tasks[0].task_id, 1))
    assert second in bench.busy()
    bench.run_all()
    assert len(outcomes(bench, task)) == 11  # all but the late one


def test_a_group_that_is_terminated_forgets_its_limits() -> None:
    bench = Bench()
    limited(bench)
    worker, packet, _ = running(bench, 2)
    make_late(bench, worker, packet, 0)
    bench.terminate(bench.node.state.workers[worker].group.group_id)
    bench.lose(worker, packet.sequence, 0)
    bench.after(100.0)
    bench.assert_empty()
