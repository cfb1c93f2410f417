"""Tasks on one node: submission, dependencies, results, errors, retries."""

from __future__ import annotations

import pytest

from poolray.exceptions import InternalError
from poolray.ids import ClassId, FunctionId, ObjectId, TaskId, WorkerId
from poolray.protocol.client import DefineClass, DefineFunction, SubmitTasks
from poolray.protocol.values import FunctionDefinition, Outcome, TaskClass, TaskSpec
from tests.unit.node_harness import DRIVER, PLAIN, Bench, GroupDrained, StartWorker, result_of


def test_a_task_goes_to_an_idle_worker_and_its_result_becomes_an_object() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert [call.task_id for call in packet.tasks] == [task]
    assert packet.tasks[0].calls == [b"call-0"]
    assert bench.state(task) == "RUNNING"
    bench.finish(worker, packet, [b"42"])
    assert bench.state(task) is None
    assert bench.value_of(result_of(task)) == b"42"
    bench.drop(result_of(task))
    bench.assert_empty()


def test_a_worker_learns_of_a_function_and_a_class_once() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class()
    bench.submit(kind)
    (worker,) = bench.busy()
    first = bench.read(worker)
    assert [f.function_id for f in first.functions] == [b"f"]
    assert [c.task_class.class_id for c in first.classes] == [kind]
    bench.finish(worker, first)
    bench.submit(kind)
    second = bench.read(worker)
    assert second.functions == []
    assert second.classes == []
    assert second.tasks[0].class_index == first.classes[0].index


def test_elastic_groups_start_as_many_workers_as_resources_allow() -> None:
    bench = Bench(cpus=3)
    bench.group()
    kind = bench.task_class()
    bench.submit_many(kind, 10)
    assert len(bench.take(StartWorker)) == 3
    bench.submit_many(kind, 10)
    assert bench.take(StartWorker) == []


def test_one_waiting_task_starts_one_worker() -> None:
    bench = Bench(cpus=8)
    bench.group()
    bench.submit(bench.task_class())
    assert len(bench.take(StartWorker)) == 1


def test_a_fixed_group_starts_no_more_workers_than_its_size() -> None:
    bench = Bench()
    group = bench.group(3, workers=2, start_now=False)
    bench.submit(bench.caller_class(group_id=group), calls=100)
    assert len(bench.take(StartWorker)) == 2


def test_tasks_run_in_the_order_of_their_submission() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    tasks = [bench.submit(kind) for _ in range(5)]
    order: list[TaskId] = []
    while bench.busy():
        (worker,) = bench.busy()
        packet = bench.read(worker)
        order.extend(call.task_id for call in packet.tasks)
        bench.finish(worker, packet, elapsed_s=1.0)
    assert order == tasks


def test_a_task_waits_for_its_argument_and_is_sent_with_its_value() -> None:
    bench = Bench()
    bench.group(workers=2)
    kind = bench.task_class()
    first = bench.submit(kind)
    second = bench.submit(kind, dependencies=[result_of(first), result_of(first)])
    assert bench.state(second) == "WAITING"
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [b"argument"])
    assert bench.state(second) == "RUNNING"
    (worker,) = bench.busy()
    (call,) = bench.read(worker).tasks
    assert call.arguments == [b"argument", b"argument"]
    assert call.slots == [0, 1]
    assert call.error_arguments == []


def test_an_argument_is_kept_for_the_task_after_its_owner_dropped_it() -> None:
    bench = Bench()
    bench.group(workers=2)
    kind = bench.task_class()
    first = bench.submit(kind)
    second = bench.submit(kind, dependencies=[result_of(first)])
    bench.drop(result_of(first))
    bench.run_all()
    assert bench.value_of(result_of(second)) == b"result"
    bench.drop(result_of(second))
    bench.assert_empty()


def test_a_failed_argument_is_sent_as_an_error() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class()
    first = bench.submit(kind)
    bench.submit(kind, dependencies=[result_of(first)])
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [Outcome(values=[b"boom"], is_error=True)])
    (call,) = bench.read(worker).tasks
    assert call.arguments == [b"boom"]
    assert call.error_arguments == [0]


def test_each_return_value_is_an_object_and_an_error_stands_for_all_of_them() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class(num_returns=3)
    good, bad = bench.submit(kind), bench.submit(kind)
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [Outcome(values=[b"0", b"1", b"2"])])
    bench.finish(worker, bench.read(worker), [Outcome(values=[b"boom"], is_error=True)])
    assert [bench.value_of(result_of(good, i)) for i in range(3)] == [b"0", b"1", b"2"]
    request = bench.get(*(result_of(bad, i) for i in range(3)))
    reply = bench.values()[request]
    assert reply.values == [b"boom"] * 3
    assert reply.errors == [0, 1, 2]


def test_a_task_without_return_values_leaves_nothing() -> None:
    bench = Bench()
    bench.group(workers=1)
    bench.submit(bench.task_class(num_returns=0))
    bench.run_all()
    bench.assert_empty()


def test_classes_take_turns() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kinds = [bench.task_class(name) for name in "abc"]
    for kind in kinds:
        bench.submit_many(kind, 3)
    order = []
    while bench.busy():
        (worker,) = bench.busy()
        packet = bench.read(worker)
        order.append(bench.node.state.workers[worker].runs.task_class.name)
        bench.finish(worker, packet, elapsed_s=1.0)
    assert "".join(order) == "a" + "abcabc" + "bc", "the first ran before the others came"


def test_short_calls_of_one_class_do_not_keep_a_worker_from_another_class() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    greedy, modest = bench.task_class("greedy"), bench.task_class("modest")
    bench.warm_up(greedy)
    bench.submit_many(greedy, 2000)
    waiting = bench.submit(modest)
    for _ in range(4):
        (worker,) = bench.busy()
        packet = bench.read(worker)
        if packet.tasks[0].task_id == waiting:
            return
        bench.finish(worker, packet, elapsed_s=1e-6)
    raise AssertionError("the other class never had its turn")


def test_a_class_that_lacks_resources_does_not_hold_up_the_others() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    large, small = bench.task_class("large", cpus=4), bench.task_class("small")
    bench.submit(large)
    task = bench.submit(small)
    assert bench.state(task) == "RUNNING"


def test_a_class_that_needs_the_whole_machine_is_not_passed_over_for_ever() -> None:
    bench = Bench(cpus=2)
    bench.group()
    small, large = bench.task_class("small", cpus=1), bench.task_class("large", cpus=2)
    bench.submit_many(small, 2)
    bench.start_all()
    wanted = bench.submit(large)
    for _ in range(300):
        bench.submit(small)
        for worker in bench.busy()[:1]:
            bench.finish(worker, bench.read(worker), elapsed_s=1.0)
        if bench.state(wanted) == "RUNNING":
            return
    raise AssertionError("the large task never ran")


def test_retry_exceptions_runs_a_task_again_up_to_its_limit() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(max_retries=3, retry_exceptions=b"*"))
    failure = Outcome(values=[b"boom"], is_error=True, retriable=True)
    (worker,) = bench.busy()
    attempts = 0
    while bench.busy():
        attempts += 1
        bench.finish(worker, bench.read(worker), [failure])
    assert attempts == 4
    assert bench.value_of(result_of(task)) == b"boom"


def test_an_exception_that_is_not_retriable_is_final() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(max_retries=3))
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [Outcome(values=[b"boom"], is_error=True)])
    assert bench.state(task) is None
    assert not bench.busy()


def test_the_result_of_a_task_that_nobody_holds_is_dropped() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    bench.drop(result_of(task))
    bench.run_all()
    bench.assert_empty()


def test_a_task_for_a_group_that_is_gone_fails_with_words() -> None:
    bench = Bench()
    kind = bench.task_class()
    task = bench.submit(kind)
    value = bench.value_of(result_of(task))
    assert isinstance(value, bytes)
    assert b"shut down" in value


def test_a_worker_that_comes_too_late_with_a_task_is_told_that_its_group_is_gone() -> None:
    bench = Bench()
    bench.group()
    bench.group(1, workers=1)
    (worker,) = bench.node.state.workers
    kind = _defined_by(bench, worker)
    bench.close(PLAIN)
    assert len(bench.take(GroupDrained)) == 1
    task = bench.submit(kind, client=worker)
    request = bench.get(result_of(task), client=worker)
    reply = bench.values()[request]
    assert reply.errors == [0]
    assert b"have been shut down" in bytes(reply.values[0])  # type: ignore[arg-type]
    bench.lose(worker)
    bench.assert_empty()
    assert bench.node.state.classes == bench.node.state.functions == {}


def test_a_class_of_a_group_that_is_gone_goes_with_the_last_worker_that_may_name_it() -> None:
    bench = Bench()
    bench.group()
    bench.group(1, workers=3)
    first, second, third = bench.node.state.workers
    kind = bench.task_class("f")  # by the driver too, which has ended the group itself
    _defined_by(bench, first)
    bench.close(PLAIN)
    _defined_by(bench, second)
    for worker in (first, second):
        assert kind in bench.node.state.classes
        bench.lose(worker)
    assert bench.node.state.classes == {}
    _defined_by(bench, third)  # it heard of the group and not of its end
    assert b"shut down" in bytes(bench.value_of(result_of(bench.submit(kind, client=third))))  # type: ignore[arg-type]
    bench.lose(third)
    assert bench.node.state.classes == {}
    assert list(bench.node.state.functions) == [b"f"], "the driver holds it"


def _defined_by(bench: Bench, worker: WorkerId) -> ClassId:
    """A class of plain tasks that a worker makes known; it is the one that the driver calls f."""
    definition = FunctionDefinition(function_id=FunctionId(b"f"), blob=b"code", name="f")
    known = TaskClass(class_id=ClassId(b"class-f"), function_id=FunctionId(b"f"), name="f")
    bench.say(worker, DefineFunction(definition=definition))
    bench.say(worker, DefineClass(task_class=known))
    return known.class_id


def test_a_task_of_an_unknown_class_is_refused() -> None:
    bench = Bench()
    bench.group(workers=1)
    spec = TaskSpec(task_id=TaskId(b"t" * 24), class_id=ClassId(b"?"), calls=[b"x"])
    with pytest.raises(InternalError, match="never defined"):
        bench.node.handle(DRIVER, SubmitTasks(tasks=[spec]), 0.0)
    empty = TaskSpec(task_id=TaskId(b"t" * 24), class_id=bench.task_class(), calls=[])
    with pytest.raises(InternalError, match="no calls"):
        bench.node.handle(DRIVER, SubmitTasks(tasks=[empty]), 0.0)
    bench.assert_empty()


def test_long_calls_are_sent_one_at_a_time_and_short_ones_together() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    slow, fast = bench.task_class("slow"), bench.task_class("fast")
    bench.warm_up(slow, elapsed_s=0.5)
    bench.submit_many(slow, 10)
    (worker,) = bench.busy()
    (packet,) = bench.packets(worker)
    assert len(packet.tasks) == 1
    bench = Bench(cpus=1)
    bench.group(workers=1)
    fast = bench.task_class("fast")
    bench.warm_up(fast, elapsed_s=1e-6)
    bench.submit_many(fast, 1000)
    (worker,) = bench.busy()
    packets = bench.packets(worker)
    assert len(packets) == 2, "one that runs, one that waits"
    assert len(packets[0].tasks) == 256


def test_the_end_of_a_queue_is_spread_over_the_workers() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.warm_up(kind)
    bench.submit_many(kind, 8)
    sizes = [len(p.tasks) for worker in bench.busy() for p in bench.packets(worker)]
    assert len(sizes) >= 2
    assert max(sizes) <= 2


def test_a_packet_is_limited_in_bytes_and_a_large_call_travels_alone() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    payload = b"x" * 40_000
    for _ in range(4):
        bench.submit(kind, calls=[payload])
    (worker,) = bench.busy()
    for packet in bench.packets(worker):
        assert len(packet.tasks) == 1


def test_arguments_count_towards_the_size_of_a_packet() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    bench.warm_up(kind)
    value = ObjectId(b"v" * 28)
    bench.put(value, b"x" * 90_000)
    for _ in range(3):
        bench.submit(kind, dependencies=[value])
    (worker,) = bench.busy()
    assert len(bench.packets(worker)) == 1, "a second packet would not fit the socket"


def test_statistics_tell_what_is_under_way() -> None:
    bench = Bench(cpus=2)
    bench.group(workers=2)
    kind = bench.task_class()
    bench.submit_many(kind, 5)
    statistics = bench.node.statistics()
    assert statistics.tasks == 5
    assert statistics.queued_calls == 3
    assert statistics.objects == 5
    assert statistics.busy_workers == statistics.workers == 2
    assert statistics.idle_workers == 0
    assert statistics.resources_available == {}
    assert statistics.resources_total == {"CPU": 2.0}
    assert statistics.functions == 1
    assert bench.node.has_work()
