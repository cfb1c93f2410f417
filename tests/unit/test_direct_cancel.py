"""Calls that are cancelled while nobody has them: between a worker and the nodes."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from poolray.exceptions import TaskCancelledError
from poolray.ids import return_id
from poolray.objects.object_ref import ObjectRef
from poolray.protocol.client import ObjectValues, PutObject
from poolray.protocol.values import Outcome
from poolray.protocol.worker import InterruptTask, RunTasks
from tests.unit.direct_bench import DirectBench

HELD = Outcome(values=[])


def was_cancelled(bench: DirectBench, ref: ObjectRef[Any]) -> bool:
    error = bench.error_of(ref)
    return bool(error) and isinstance(pickle.loads(error), TaskCancelledError)


def when_given(bench: DirectBench, ref: ObjectRef[Any], act: Callable[[], object]) -> None:
    """Do this while a call is given to the node."""

    def look(message: Any) -> None:
        spec = getattr(message, "task", None) or getattr(message, "tasks", [None])[0]
        if spec is not None and spec.task_id == ref.task_id().binary():
            bench.on_send = None
            act()

    bench.on_send = look


def test_a_call_of_a_lost_way_that_was_not_sent_goes_nowhere_once_it_is_cancelled() -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way(is_together=True)
    calls = [bench.call(route) for _ in range(6)]
    behind, cancelled = calls[-2:]
    when_given(bench, behind, lambda: bench.cancel(cancelled))
    assert len(connection.outbox) >= 2
    bench.cut(connection, worker)
    assert was_cancelled(bench, cancelled)
    assert not bench.error_of(behind)
    given = [m.task.task_id for m in bench.sent if type(m).__name__ == "CallActor"]
    assert behind.task_id().binary() in given
    assert cancelled.task_id().binary() not in given


def test_an_order_that_comes_while_a_call_is_given_to_the_node_follows_it_there() -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way()
    sent, _, waiting = (bench.call(route) for _ in range(3))
    when_given(bench, waiting, lambda: bench.cancel(waiting))
    bench.cut(connection, worker)
    call, order = bench.sent[-2:]
    assert bench.kinds()[-2:] == ["CallActor", "CancelTask"]
    assert call.task.task_id == order.task_id == waiting.task_id().binary()
    assert (order.force, order.recursive) == (False, True)
    assert not was_cancelled(bench, sent)


@pytest.mark.parametrize("is_told", [True, False], ids=["before", "after"])
def test_a_call_that_its_actor_had_fails_as_cancelled_whenever_that_was(is_told: bool) -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way()
    ref, other = bench.call(route), bench.call(route)
    if is_told:
        bench.cancel(ref)
        assert [type(message) for message in worker.read()] == [RunTasks, RunTasks, InterruptTask]
    bench.cut(connection, worker)
    if not is_told:
        bench.cancel(ref)
    learn = bench.answers[-1]  # (the first is for the order to wait)
    learn(ObjectValues(request_id=0, values=[pickle.dumps(ValueError())], errors=[0]))
    assert was_cancelled(bench, ref)
    assert isinstance(pickle.loads(bench.error_of(other)), ValueError)


def test_a_call_that_is_to_bring_a_worker_goes_nowhere_once_it_is_cancelled() -> None:
    bench = DirectBench()
    _, ref = bench.ask()
    bench.cancel(ref)
    assert was_cancelled(bench, ref)
    bench.answers[0](ObjectValues(request_id=0, values=[b""], errors=[0]))
    assert bench.sent == []
    _, ref = bench.ask()
    _, worker = bench.come()
    assert [task.task_id for task in worker.read()[0].tasks] == [ref.task_id().binary()]


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_call_whose_worker_on_loan_was_lost_is_cancelled(moment: str) -> None:
    bench = DirectBench()
    _, ref = bench.ask()
    connection, worker = bench.come()
    forget = bench.direct.forget

    def cancel_after(lost: Any) -> Any:
        found = forget(lost)
        bench.direct.lock.release()
        bench.cancel(ref)
        bench.direct.lock.acquire()
        return found

    if moment == "before":
        bench.direct.forget = cancel_after  # type: ignore[method-assign]
    else:
        when_given(bench, ref, lambda: bench.cancel(ref, force=True))
    bench.cut(connection, worker)
    if moment == "before":
        assert was_cancelled(bench, ref)
        assert bench.sent == []
        return
    assert bench.kinds() == ["SubmitTasks", "CancelTask"]
    assert (bench.sent[1].task_id, bench.sent[1].force) == (ref.task_id().binary(), True)


def test_a_call_whose_result_the_worker_keeps_is_over_but_is_not_tried_again() -> None:
    bench = DirectBench()
    _, ref = bench.ask()
    connection, worker = bench.come()
    worker.read()
    worker.report({ref._id: HELD})
    connection.answer()
    bench.cancel(ref)
    assert not was_cancelled(bench, ref)
    (held,) = bench.direct.pending.values()
    bench.loans._bring(
        ObjectValues(request_id=0, values=[b""], errors=[0]),  # it was lost with the worker
        ref,
        held,
        None,
    )
    assert was_cancelled(bench, ref)
    assert bench.sent == []


def test_an_order_that_comes_while_a_kept_result_is_fetched_is_too_late() -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way()
    ref = bench.call(route)
    worker.read()
    worker.report({ref._id: HELD})
    when_given(bench, ref, lambda: bench.cancel(ref))
    connection.answer()
    assert bench.kinds() == ["CallActor"]
    assert not bench.direct.pending


def test_what_was_promised_of_a_cancelled_call_is_told() -> None:
    bench = DirectBench()
    _, ref = bench.ask()
    connection, worker = bench.come()
    bench.direct.tell_node([ref._id])
    bench.cancel(ref)
    bench.cut(connection, worker)
    told = bench.sent[-1]
    assert bench.kinds() == ["PromiseObjects", "PutObject"]
    assert type(told) is PutObject
    assert told.is_error
    assert isinstance(pickle.loads(bytes(told.value)), TaskCancelledError)  # type: ignore[arg-type]


def test_orders_are_forgotten_with_their_calls() -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way()
    ref = bench.call(route)
    bench.cancel(ref)
    worker.read()
    worker.report({ref._id: b"value"})
    connection.answer()
    assert not bench.direct._orders
    assert bench.prefetched == {ref._id: b"value"}


class _Counting(deque[Any]):
    """Counts steps, and cannot be searched."""

    steps = 0

    def popleft(self) -> Any:
        self.steps += 1
        return super().popleft()

    def extendleft(self, values: Iterable[Any]) -> None:
        for value in values:
            self.steps += 1
            self.appendleft(value)

    def remove(self, value: Any) -> None:
        raise AssertionError("a search takes as long as there are calls")

    def __iter__(self) -> Any:
        raise AssertionError("a search takes as long as there are calls")


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize("direction", [1, -1])
def test_to_cancel_calls_that_wait_takes_the_same_for_each(
    is_together: bool, direction: int
) -> None:
    bench = DirectBench()
    route, connection, worker = bench.open_way(is_together)
    connection.outbox = outbox = _Counting()
    refs = [bench.call(route) for _ in range(1_002)]
    unwanted = refs[2:][::direction][:900]  # (two are under way)
    for ref in unwanted:
        bench.cancel(ref)
    assert all(was_cancelled(bench, ref) for ref in unwanted)
    assert outbox.steps < 10 * len(refs)
    assert len(outbox) < 200
    begun: list[Any] = []
    while connection.is_busy:
        packets = worker.read()
        assert packets
        for packet in packets:
            begun += [task.task_id for task in packet.tasks]
            worker.report({return_id(task.task_id, 0): b"value" for task in packet.tasks})
            connection.answer()
    wanted = [ref for ref in refs if ref not in unwanted]
    assert begun == [ref.task_id().binary() for ref in wanted]
    assert not bench.direct.pending
