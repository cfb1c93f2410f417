"""Objects on one node: values, requests, references, ranges."""

from __future__ import annotations

import itertools

from poolray.ids import FunctionId, ObjectId, WorkerId
from poolray.node.effects import Reply
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    DefineFunction,
    PutObject,
    RangeGranted,
    ReleaseFunction,
)
from poolray.protocol.node import ClientLeft
from poolray.protocol.values import FunctionDefinition, InArena, InFile, Outcome
from tests.unit.node_harness import DRIVER, Bench, DeleteFile, result_of

A, B, C = (ObjectId(name * 28) for name in (b"a", b"b", b"c"))
PAGE = 4096


def allocate(bench: Bench, object_id: ObjectId, size: int, client: bytes = DRIVER) -> int:
    """Offset of a new range."""
    bench.tell(AllocateRange(request_id=9, object_id=object_id, size_bytes=size), client)
    (granted,) = [e.message for e in bench.take(Reply) if isinstance(e.message, RangeGranted)]
    return granted.offset


def put_large(bench: Bench, object_id: ObjectId, size: int = PAGE) -> None:
    offset = allocate(bench, object_id, size)
    bench.put(object_id, InArena(object_id=object_id, offset=offset, size_bytes=size))


def test_a_value_that_is_put_can_be_read_and_is_freed_with_its_last_handle() -> None:
    bench = Bench()
    bench.put(A, b"value")
    assert bench.value_of(A) == b"value"
    bench.drop(A)
    bench.assert_empty()


def test_get_answers_when_the_last_value_is_there() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class()
    one, two = bench.submit(kind), bench.submit(kind)
    request = bench.get(result_of(one), result_of(two), result_of(one))
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [b"1"])
    assert bench.values() == {}
    bench.finish(worker, bench.read(worker), [b"2"])
    assert bench.values()[request].values == [b"1", b"2", b"1"]


def test_get_answers_at_the_first_error() -> None:
    bench = Bench()
    bench.group(workers=1)
    kind = bench.task_class()
    one, two = bench.submit(kind), bench.submit(kind)
    request = bench.get(result_of(two), result_of(one))
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), [Outcome(values=[b"boom"], is_error=True)])
    assert bench.values()[request].errors == [1]
    bench.finish(worker, bench.read(worker))
    assert bench.values() == {}, "a request is answered once"
    request = bench.get(result_of(two), result_of(one))
    assert bench.values()[request].errors == [1]


def test_get_of_an_unknown_object_is_an_error_in_its_place() -> None:
    bench = Bench()
    bench.put(A, b"value")
    request = bench.get(A, B)
    reply = bench.values()[request]
    assert reply.errors == [1]
    assert isinstance(reply.values[1], bytes)
    assert b"ObjectLostError" in reply.values[1]


def test_wait_answers_once_enough_are_ready_with_all_that_are() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    kind = bench.task_class()
    tasks = [result_of(bench.submit(kind)) for _ in range(3)]
    bench.put(A, b"value")
    request = bench.wait(2, tasks[0], A, tasks[1], tasks[2])
    assert bench.ready_indexes() == {}
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker))
    assert bench.ready_indexes() == {request: [0, 1]}
    assert bench.ready_indexes() == {}
    request = bench.wait(1, A)
    assert bench.ready_indexes() == {request: [0]}


def test_a_cancelled_get_is_forgotten_and_a_cancelled_wait_is_answered() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = result_of(bench.submit(bench.task_class()))
    bench.put(A, b"value")
    get, wait = bench.get(task), bench.wait(2, A, task)
    bench.tell(CancelRequest(request_id=get), DRIVER)
    bench.tell(CancelRequest(request_id=wait), DRIVER)
    bench.tell(CancelRequest(request_id=12345), DRIVER)
    assert bench.ready_indexes() == {wait: [0]}
    bench.run_all()
    assert bench.values() == {}
    assert bench.node.statistics().open_requests == 0


def test_a_reply_to_a_worker_comes_in_parts_that_fit_its_channel() -> None:
    bench = Bench()
    bench.group(workers=1)
    worker = WorkerId(b"w%027d" % 1)
    ids = [ObjectId(b"%028d" % i) for i in range(5)]
    for object_id in ids[:4]:
        bench.put(object_id, b"x" * 60_000)
    request = bench.get(*ids, client=worker)
    parts = [e.message for e in bench.take(Reply) if getattr(e.message, "request_id", 0) == request]
    assert [part.more for part in parts] == [True, True, True, False]  # type: ignore[union-attr]
    values = [value for part in parts for value in part.values]  # type: ignore[union-attr]
    assert values[:4] == [b"x" * 60_000] * 4
    assert parts[-1].errors == [len(parts[-1].values) - 1]  # type: ignore[union-attr]


def test_a_client_counts_once_however_often_it_says_so() -> None:
    bench = Bench()
    bench.put(A, b"value")
    bench.hold(A)
    bench.hold(A, client=b"other")
    bench.drop(A)
    assert bench.value_of(A) == b"value"
    bench.drop(A)
    bench.drop(A, client=b"stranger")
    assert bench.node.statistics().objects == 1
    bench.drop(A, client=b"other")
    bench.assert_empty()


def test_what_a_value_contains_lives_as_long_as_it_does() -> None:
    bench = Bench()
    bench.put(A, b"inner")
    bench.tell(PutObject(object_id=B, value=b"outer", contained=[A]), DRIVER)
    bench.tell(PutObject(object_id=C, value=b"outermost", contained=[B, B]), DRIVER)
    bench.drop(A)
    bench.drop(B)
    assert bench.value_of(A) == b"inner"
    bench.drop(C)
    bench.assert_empty()


def test_a_long_chain_of_values_is_freed_without_recursion() -> None:
    bench = Bench()
    ids = [ObjectId(b"%028d" % i) for i in range(3000)]
    state = bench.node
    state.handle(DRIVER, PutObject(object_id=ids[0], value=b"x"), 0.0)
    for inner, outer in itertools.pairwise(ids):
        state.handle(DRIVER, PutObject(object_id=outer, value=b"x", contained=[inner]), 0.0)
    bench.drop(*ids[:-1])
    assert bench.node.statistics().objects == 3000
    bench.drop(ids[-1])
    bench.assert_empty()


def test_refs_in_a_result_are_counted_before_the_worker_lets_go_of_them() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    (worker,) = bench.busy()
    packet = bench.read(worker)
    bench.put(A, b"inner", client=worker)
    outcome = Outcome(values=[b"outer"], contained=[[A]])
    bench.finish(worker, packet, [outcome], released=[A])
    assert bench.value_of(A) == b"inner"
    bench.drop(result_of(task))
    bench.assert_empty()


def test_an_argument_that_a_worker_keeps_outlives_its_task() -> None:
    bench = Bench()
    bench.group(workers=1)
    bench.put(A, b"value")
    task = bench.submit(bench.task_class(), borrows=[A])
    bench.drop(A)
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), kept=[A])
    bench.drop(result_of(task))
    assert bench.value_of(A) == b"value"
    bench.drop(A, client=worker)
    bench.assert_empty()


def test_a_range_belongs_to_its_object_and_is_freed_with_it() -> None:
    bench = Bench()
    put_large(bench, A, 3 * PAGE)
    assert bench.node.statistics().arena.used_bytes == 3 * PAGE
    bench.drop(A)
    bench.assert_empty()


def test_a_range_for_which_there_is_no_room_is_refused() -> None:
    bench = Bench(arena_bytes=2 * PAGE, object_spilling_threshold=1.0)
    put_large(bench, A, 2 * PAGE)
    bench.value_of(A)  # somebody looks at it, so it cannot make way
    assert allocate(bench, B, 1) == -1
    bench.drop(A)
    assert allocate(bench, B, 1) == 0


def test_ranges_that_were_never_sealed_go_with_their_client() -> None:
    bench = Bench()
    allocate(bench, A, PAGE, client=b"other")
    allocate(bench, A, PAGE, client=b"other")
    assert bench.node.statistics().arena.used_bytes == PAGE
    bench.hold(B, client=b"other")
    bench.tell(ClientLeft(client_id=b"other"))
    bench.tell(ClientLeft(client_id=b"other"))
    bench.assert_empty()


def test_a_large_result_is_kept_in_the_range_that_the_worker_wrote() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    (worker,) = bench.busy()
    packet = bench.read(worker)
    name = result_of(task)
    offset = allocate(bench, name, PAGE, client=worker)
    place = InArena(object_id=name, offset=offset, size_bytes=PAGE)
    bench.finish(worker, packet, [Outcome(values=[place])])
    assert bench.value_of(name) == place
    bench.drop(name)
    bench.assert_empty()


def test_a_large_result_for_a_caller_is_held_by_it_until_it_lets_go() -> None:
    bench = Bench()
    group = bench.group(1, workers=1)
    bench.submit(bench.caller_class(group_id=group))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    offset = allocate(bench, A, PAGE, client=worker)
    place = InArena(object_id=A, offset=offset, size_bytes=PAGE)
    bench.finish(worker, packet, [Outcome(values=[place])])
    assert bench.delivered()[0][2] == [Outcome(values=[place])]
    bench.lose(worker, packet.sequence, 0)
    assert bench.node.statistics().arena.used_bytes == PAGE
    bench.drop(A)
    bench.assert_empty()


def test_a_large_result_for_a_caller_that_has_gone_is_freed() -> None:
    bench = Bench()
    group = bench.group(1, workers=1)
    bench.submit(bench.caller_class(group_id=group), client=b"other")
    (worker,) = bench.busy()
    packet = bench.read(worker)
    offset = allocate(bench, A, PAGE, client=worker)
    bench.tell(ClientLeft(client_id=b"other"))
    place = InArena(object_id=A, offset=offset, size_bytes=PAGE)
    bench.finish(worker, packet, [Outcome(values=[place])])
    bench.assert_empty()


def test_a_file_is_deleted_with_its_object() -> None:
    bench = Bench()
    bench.put(A, InFile(object_id=A, path="/spill/a", size_bytes=10))
    bench.drop(A)
    assert [effect.path for effect in bench.take(DeleteFile)] == ["/spill/a"]


def test_the_range_of_a_failed_attempt_is_freed() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(retry_exceptions=b"*"))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    offset = allocate(bench, A, PAGE, client=worker)
    place = InArena(object_id=A, offset=offset, size_bytes=PAGE)
    bench.finish(worker, packet, [Outcome(values=[place], is_error=True, retriable=True)])
    assert bench.node.statistics().arena.used_bytes == 0
    bench.finish(worker, bench.read(worker), [b"well"])
    assert bench.value_of(result_of(task)) == b"well"


def test_the_code_of_a_large_function_is_kept_as_long_as_the_function() -> None:
    bench = Bench()
    bench.group(workers=1)
    put_large(bench, A)
    blob = InArena(object_id=A, offset=0, size_bytes=PAGE)
    definition = FunctionDefinition(function_id=FunctionId(b"f"), blob=blob, name="f")
    bench.tell(DefineFunction(definition=definition), DRIVER)
    bench.drop(A)
    assert bench.value_of(A) == blob
    task = bench.submit(bench.task_class("f"))
    bench.tell(ReleaseFunction(function_id=FunctionId(b"f")), DRIVER)
    assert bench.value_of(A) == blob, "a worker has yet to read it"
    bench.run_all(task)
    bench.drop(result_of(task))
    bench.assert_empty()


def test_requests_of_a_client_that_left_are_not_answered() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class())
    bench.get(result_of(task), client=b"other")
    bench.tell(ClientLeft(client_id=b"other"))
    bench.run_all()
    assert bench.values() == {}


def test_a_large_error_of_several_return_values_has_one_owner() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(num_returns=3))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    offset = allocate(bench, A, PAGE, client=worker)
    place = InArena(object_id=A, offset=offset, size_bytes=PAGE)
    bench.drop(result_of(task, 0))
    bench.finish(worker, packet, [Outcome(values=[place], is_error=True)])
    bench.drop(result_of(task, 1))
    assert bench.node.statistics().arena.used_bytes == PAGE
    assert bench.value_of(result_of(task, 2)) == place
    bench.drop(result_of(task, 2))
    bench.assert_empty()


def test_the_file_of_an_error_of_several_return_values_is_deleted_once() -> None:
    bench = Bench()
    bench.group(workers=1)
    task = bench.submit(bench.task_class(num_returns=2))
    (worker,) = bench.busy()
    place = InFile(object_id=A, path="/spill/a", size_bytes=10)
    bench.finish(worker, bench.read(worker), [Outcome(values=[place], is_error=True)])
    bench.drop(result_of(task, 0))
    assert bench.take(DeleteFile) == []
    bench.drop(result_of(task, 1))
    assert len(bench.take(DeleteFile)) == 1
    bench.assert_empty()
