"""`get`, `put`, `wait` and `ObjectRef`: what they take, what they return, how long they block."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import operator
import pickle
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_implementation import DEADLINE_S, better_than_reference, gate_at, get, ray, start_runtime
from executor_support import Gate


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with gate_at(tmp_path / "gate") as gate:
        yield gate


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def when_opened(gate: Gate, value: Any = None) -> Any:
    gate.wait()
    return value


@ray.remote
def fail(message: str) -> None:
    raise ValueError(message)


@ray.remote
def call(function: Any, *args: Any) -> Any:
    return function(*args)


# --- get ---------------------------------------------------------------------------------------


def test_get_returns_one_value_or_a_list_in_order() -> None:
    refs = [echo.remote(i) for i in range(4)]
    assert ray.get(refs[2]) == 2
    assert ray.get(refs) == [0, 1, 2, 3]
    assert ray.get(refs[::-1]) == [3, 2, 1, 0]
    assert ray.get([refs[1], refs[1]]) == [1, 1]
    assert ray.get([]) == []


def test_get_again_gives_an_equal_value() -> None:
    ref = echo.remote([1, [2]])
    first = get(ref)
    first.append("changed here only")
    assert get(ref) == [1, [2]]


@pytest.mark.parametrize(
    "make",
    [
        lambda ref: 1,
        lambda ref: None,
        lambda ref: "text",
        lambda ref: (ref,),
        lambda ref: {ref},
        lambda ref: {"key": ref},
        lambda ref: iter([ref]),
        lambda ref: np.array([ref], dtype=object),
        lambda ref: echo,
    ],
    ids=["int", "None", "str", "tuple", "set", "dict", "iterator", "array", "function"],
)
def test_get_takes_a_ref_or_a_list(make: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid type.*is given.*ObjectRef.*list"):
        ray.get(make(ray.put(1)))


@pytest.mark.parametrize("wrong", [1, None, "text"], ids=repr)
def test_get_of_a_list_takes_only_refs(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{wrong}.*not an.*ObjectRef"):
        ray.get([ray.put(1), wrong])


def test_get_does_not_look_into_nested_lists() -> None:
    with pytest.raises(TypeError, match=r"not an.*ObjectRef"):
        ray.get([[ray.put(1)]])


@pytest.mark.parametrize("timeout", [0, 0.0, 0.05], ids=repr)
def test_get_gives_up_after_its_timeout(gate: Gate, timeout: float) -> None:
    pending = when_opened.remote(gate, "late")
    for refs in (pending, [ray.put(1), pending]):
        with pytest.raises(ray.exceptions.GetTimeoutError, match=r"timed out.*not ready") as caught:
            ray.get(refs, timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, ray.exceptions.RayError)
    gate.open()
    assert get(pending) == "late"


def test_get_of_what_is_ready_needs_no_time() -> None:
    ref = echo.remote(5)
    get(ref)
    assert ray.get(ref, timeout=0) == 5
    assert ray.get([ref, ray.put(6)], timeout=0) == [5, 6]
    assert ray.get(ref, timeout=None) == 5


def test_what_is_ready_needs_no_time_in_a_task_either() -> None:
    def get_at_once(refs: list[Any]) -> list[Any]:
        ray.wait(refs, num_returns=len(refs))
        return ray.get(refs, timeout=0)

    assert get(call.remote(get_at_once, [echo.remote(1), ray.put(2)])) == [1, 2]


def test_get_takes_minus_one_for_no_timeout(gate: Gate) -> None:
    # Undocumented, but programs that pass it wait for as long as it takes.
    pending = when_opened.remote(gate, "late")
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    assert ray.get(pending, timeout=-1) == "late"
    opener.join()


@better_than_reference("it aborts the process", run=False)
def test_other_negative_timeouts_of_get_are_refused(gate: Gate) -> None:
    with pytest.raises(ValueError, match=r"timeout.*negative.*-0\.5"):
        ray.get(when_opened.remote(gate), timeout=-0.5)


def test_the_timeout_of_get_is_a_keyword_and_a_number() -> None:
    with pytest.raises(TypeError, match="positional"):
        ray.get(ray.put(1), 1)
    # The reference multiplies by 1000 before it looks.
    with pytest.raises((TypeError, OverflowError)):
        ray.get(ray.put(1), timeout="1")


def test_get_of_a_list_raises_its_first_error() -> None:
    refs = [echo.remote(1), fail.remote("first"), fail.remote("second")]
    ray.wait(refs, num_returns=3)
    with pytest.raises(ValueError, match="first"):
        get(refs)


def test_get_of_a_list_does_not_wait_for_the_rest_after_an_error(gate: Gate) -> None:
    pending = when_opened.remote(gate)
    for refs in ([fail.remote("early"), pending], [pending, fail.remote("early")]):
        with pytest.raises(ValueError, match="early"):
            get(refs)


def test_get_works_in_every_thread() -> None:
    def work(thread: int) -> list[int]:
        return get([echo.remote(thread * 100 + i) for i in range(20)])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))
    assert results == [[thread * 100 + i for i in range(20)] for thread in range(8)]


def test_several_threads_may_get_one_ref(gate: Gate) -> None:
    pending = when_opened.remote(gate, "shared")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(get, pending) for _ in range(4)]
        gate.open()
        assert [future.result(DEADLINE_S) for future in futures] == ["shared"] * 4


# --- put ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": (1, 2)}, b"x" * 1_000_000], ids=type)
def test_put_stores_any_value(value: Any) -> None:
    ref = ray.put(value)
    assert isinstance(ref, ray.ObjectRef)
    assert get(ref) == value
    assert get(echo.remote(ref)) == value


def test_put_stores_a_copy() -> None:
    value = [1]
    ref = ray.put(value)
    value.append(2)
    assert get(ref) == [1]


def test_put_twice_makes_two_objects() -> None:
    assert ray.put(1) != ray.put(1)


def test_a_ref_is_put_only_inside_something() -> None:
    ref = ray.put(1)
    with pytest.raises(TypeError, match=r"put.*ObjectRef.*list"):
        ray.put(ref)
    assert get(get(ray.put([ref]))[0]) == 1


def test_put_of_what_cannot_be_pickled_is_refused() -> None:
    for value in (threading.Lock(), (i for i in range(3)), {"deep": [threading.Lock()]}):
        with pytest.raises(TypeError, match=r"(?s)serialize|pickle"):
            ray.put(value)


# --- wait --------------------------------------------------------------------------------------


def test_wait_returns_when_enough_is_ready(gate: Gate) -> None:
    pending = when_opened.remote(gate)
    refs = [pending, echo.remote(1)]
    assert ray.wait(refs, timeout=DEADLINE_S) == ([refs[1]], [pending])
    gate.open()
    assert ray.wait(refs, num_returns=2, timeout=DEADLINE_S) == (refs, [])


def test_wait_returns_exactly_num_returns_in_the_order_given() -> None:
    refs = [echo.remote(i) for i in range(20)]
    get(refs)
    for count in range(1, 21):
        ready, rest = ray.wait(refs, num_returns=count)
        assert len(ready) == count
        assert ready == [ref for ref in refs if ref in ready]
        assert rest == [ref for ref in refs if ref not in ready]


@better_than_reference("it picks any of them")
def test_wait_returns_the_first_of_those_that_are_ready() -> None:
    refs = [echo.remote(i) for i in range(50)]
    get(refs)
    assert ray.wait(refs, num_returns=10) == (refs[:10], refs[10:])


def test_wait_returns_input_order_and_not_order_of_completion(gate: Gate) -> None:
    slow, fast = when_opened.remote(gate), echo.remote(1)
    get(fast)
    gate.open()
    assert ray.wait([slow, fast], num_returns=2, timeout=DEADLINE_S) == ([slow, fast], [])


def test_wait_returns_what_there_is_at_its_timeout(gate: Gate) -> None:
    ready, pending = ray.put(1), when_opened.remote(gate)
    for timeout in (0, 0.05):
        refs = [pending, ready]
        assert ray.wait(refs, num_returns=2, timeout=timeout) == ([ready], [pending])
        assert ray.wait([pending], timeout=timeout) == ([], [pending])


def test_wait_gathers_results_one_by_one() -> None:
    remaining = [echo.remote(i) for i in range(20)]
    values = []
    while remaining:
        ready, remaining = ray.wait(remaining, timeout=DEADLINE_S)
        values += get(ready)
    assert sorted(values) == list(range(20))


def test_wait_counts_a_failed_task_as_ready() -> None:
    ref = fail.remote("failed")
    assert ray.wait([ref], timeout=DEADLINE_S) == ([ref], [])


def test_wait_may_leave_the_value_where_it_is() -> None:
    ref = echo.remote(np.zeros(1_000_000))
    assert ray.wait([ref], fetch_local=False, timeout=DEADLINE_S) == ([ref], [])
    assert ray.wait([ref], fetch_local=True, timeout=DEADLINE_S) == ([ref], [])


@pytest.mark.parametrize("num_returns", [0, 1, 5])
def test_wait_for_nothing_returns_at_once(num_returns: int) -> None:
    assert ray.wait([], num_returns=num_returns) == ([], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ref: ref, "list.*got a single"),
        (lambda ref: (ref,), "list.*tuple"),
        (lambda ref: {ref}, "list.*set"),
        (lambda ref: iter([ref]), "list.*iterator"),
        (lambda ref: None, "list.*NoneType"),
        (lambda ref: [ref, 1], "list.*int"),
    ],
    ids=["bare ref", "tuple", "set", "iterator", "None", "int inside"],
)
def test_wait_takes_a_list_of_refs(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ray.wait(make(ray.put(1)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_returns": 0}, ValueError, "0"),
        ({"num_returns": -1}, ValueError, "-1"),
        ({"num_returns": 3}, ValueError, "num_returns.*greater than"),
        ({"num_returns": "1"}, TypeError, None),
        ({"timeout": -1}, ValueError, "timeout.*negative.*-1"),
        ({"timeout": "1"}, TypeError, None),
    ],
    ids=repr,
)
def test_wait_refuses_bad_options(
    options: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        ray.wait([ray.put(1), ray.put(2)], **options)


def test_wait_refuses_duplicates() -> None:
    ref = ray.put(1)
    with pytest.raises(ValueError, match="unique"):
        ray.wait([ref, ref], num_returns=2)


def test_the_options_of_wait_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        ray.wait([ray.put(1)], 1)


def test_wait_takes_refs_one_by_one_from_a_long_list() -> None:
    refs = [echo.remote(i) for i in range(600)]
    remaining, values = list(refs), []
    while remaining:
        ready, remaining = ray.wait(remaining, timeout=DEADLINE_S)
        values += get(ready)
    assert sorted(values) == list(range(600))


def test_wait_takes_refs_from_the_far_end_of_a_long_list(gate: Gate) -> None:
    slow = [when_opened.options(num_cpus=0).remote(gate, i) for i in range(2)]
    remaining = slow + [ray.put(i) for i in range(400)]
    values = []
    while len(remaining) > len(slow):
        ready, remaining = ray.wait(remaining, num_returns=2, timeout=DEADLINE_S)
        values += get(ready)
    assert values == list(range(400))
    assert ray.wait(remaining, timeout=0) == ([], slow)
    gate.open()
    assert ray.wait(remaining, num_returns=2, timeout=DEADLINE_S) == (slow, [])


def test_what_wait_leaves_is_a_list_of_its_own() -> None:
    refs = [ray.put(i) for i in range(500)]
    _, second = ray.wait(refs)
    _, third = ray.wait(second)
    _, fourth = ray.wait(third, num_returns=100)
    _, beside = ray.wait(third)
    fourth.append(refs[0])
    assert fourth == [*refs[102:], refs[0]]
    assert second == refs[1:]
    assert third[:] == refs[2:]
    assert beside == refs[3:]
    assert [*fourth] == refs[102:] + refs[:1]
    assert isinstance(fourth, list)


def test_more_can_be_appended_to_what_wait_leaves() -> None:
    pending, values = [echo.remote(i) for i in range(300)], []
    for i in range(300, 600):
        ready, pending = ray.wait(pending, timeout=DEADLINE_S)
        values += get(ready)
        pending.append(echo.remote(i))
    assert len(pending) == 300
    values += get(pending)
    assert sorted(values) == list(range(600))


def test_what_is_appended_is_checked() -> None:
    refs = [ray.put(i) for i in range(300)]
    for _ in range(2):
        _, refs = ray.wait(refs)
    refs.append(refs[-1])
    with pytest.raises(ValueError, match="unique"):
        ray.wait(refs)
    refs[-1] = 1  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"list containing.*int"):
        ray.wait(refs)
    refs.pop()
    assert len(ray.wait(refs)[1]) == 297


def test_generators_and_refs_are_taken_from_a_long_list() -> None:
    @ray.remote
    def numbers(count: int) -> Any:
        yield from range(count)

    generators = [numbers.remote(3) for _ in range(5)]
    pending: list[Any] = [*generators, *(ray.put(None) for _ in range(300))]
    items = 0
    while pending:
        (ready,), pending = ray.wait(pending, timeout=DEADLINE_S)
        if ready in generators and next(ready, None) is not None:
            items += 1
            pending.append(ready)
    assert items == 15


def test_objects_are_freed_as_soon_as_no_list_has_them() -> None:
    refs = [ray.put(i) for i in range(400)]
    names = [weakref.ref(ref) for ref in refs]
    for taken in range(200):
        ready, refs = ray.wait(refs)
        assert names[taken]() is not None
        del ready
        assert names[taken]() is None, "the list before had it, and is gone"
    older = refs
    _, refs = ray.wait(older)
    _, refs = ray.wait(refs)
    del _
    assert names[201]() is not None, "the list before the last has it"
    del older
    assert names[200]() is None
    assert names[201]() is None
    assert names[202]() is not None
    del refs
    assert all(name() is None for name in names)


def test_a_long_history_of_lists_can_be_kept_and_dropped() -> None:
    history = [[ray.put(i) for i in range(3000)]]
    while len(history[-1]) > 200:
        history.append(ray.wait(history[-1])[1])
    oldest = history[5]
    history.clear()
    assert len(oldest) == 2995
    assert get(oldest[:2]) == [5, 6]


def test_two_threads_may_wait_for_one_list(gate: Gate) -> None:
    refs = [when_opened.options(num_cpus=0).remote(gate, 0), *(ray.put(i) for i in range(300))]
    for _ in range(3):
        _, refs = ray.wait(refs)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ray.wait(refs, timeout=DEADLINE_S), range(40)))
    assert all(len(ready) == 1 and len(rest) == 297 for ready, rest in found)
    gate.open()


def test_c_code_that_reads_memory_does_not_see_an_empty_list() -> None:
    refs = [ray.put(i) for i in range(300)]
    for _ in range(3):
        _, refs = ray.wait(refs)
    seen = operator.concat([], refs)
    if seen != refs:
        with pytest.raises(TypeError, match="ObjectRef"):
            ray.wait(seen)  # loudly, not as if there were nothing
    assert operator.concat(refs, [1])[-1] == 1
    assert len(operator.concat(refs, [1])) == 298


# --- the ref -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: echo.remote(1), lambda: ray.put(1)], ids=["task", "put"])
def test_a_ref_shows_its_id(make: Any) -> None:
    ref = make()
    assert isinstance(ref.binary(), bytes)
    assert len(ref.binary()) == 28
    assert ref.hex() == ref.binary().hex()
    assert repr(ref) == str(ref) == f"ObjectRef({ref.hex()})"
    assert ref.task_id().hex() in ref.hex()


def test_refs_compare_and_hash_by_their_object() -> None:
    ref, other = ray.put(1), ray.put(1)
    for same in (copy.copy(ref), copy.deepcopy(ref), get(ray.put([ref]))[0]):
        assert same == ref
        assert hash(same) == hash(ref)
        assert (same != ref) is False
    assert ref != other
    assert ref != ref.hex()
    assert ref != 1
    assert len({ref, copy.copy(ref), other}) == 2


def test_a_ref_is_not_its_value() -> None:
    ref = ray.put([1, 2])
    assert ref
    for misuse in (iter, len, lambda x: x + 1, lambda x: x < x, lambda x: x[0]):
        with pytest.raises(TypeError):
            misuse(ref)
    with pytest.raises(AttributeError):
        ref.note = "refs carry no attributes"


def test_refs_of_one_task_differ() -> None:
    refs = echo.options(num_returns=3).remote("abc")
    assert len(set(refs)) == 3
    assert len({ref.task_id() for ref in refs}) == 1


def test_a_pickled_ref_keeps_its_object() -> None:
    ref = echo.remote("kept")
    pickled = pickle.dumps(ref)
    del ref
    assert get(pickle.loads(pickled)) == "kept"


def test_a_ref_is_a_type_with_a_parameter() -> None:
    annotation = ray.ObjectRef[int]
    assert "ObjectRef" in repr(annotation)


# --- futures and asyncio -----------------------------------------------------------------------


def test_a_ref_gives_a_real_future(gate: Gate) -> None:
    pending = when_opened.remote(gate, "late")
    future = pending.future()
    assert isinstance(future, concurrent.futures.Future)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.05)
    called = threading.Event()
    future.add_done_callback(lambda done: called.set())
    gate.open()
    assert future.result(DEADLINE_S) == "late"
    assert called.wait(DEADLINE_S)
    assert pending.future().result(DEADLINE_S) == "late"


def test_a_ref_gives_a_future_of_the_running_loop() -> None:
    ref = ray.put("value")

    async def wait() -> Any:
        future = ref.as_future()
        assert isinstance(future, asyncio.Future)
        return await future

    assert asyncio.run(wait()) == "value"


def test_the_future_of_a_failed_task_has_its_error() -> None:
    future = fail.remote("in future").future()
    assert isinstance(future.exception(DEADLINE_S), ray.exceptions.RayTaskError)
    with pytest.raises(ValueError, match="in future"):
        future.result(DEADLINE_S)


def test_futures_of_refs_work_with_the_standard_helpers(gate: Gate) -> None:
    pending = when_opened.remote(gate, 0).future()
    futures = [echo.remote(i).future() for i in range(1, 4)]
    done = concurrent.futures.wait([pending, *futures], DEADLINE_S, return_when="FIRST_COMPLETED")
    assert pending in done.not_done
    gate.open()
    finished = concurrent.futures.as_completed([pending, *futures], DEADLINE_S)
    assert sorted(future.result() for future in finished) == [0, 1, 2, 3]


def test_refs_can_be_awaited_alone_and_together() -> None:
    async def main() -> list[Any]:
        ref = echo.remote(1)
        return [
            await ref,
            await ref,
            await ray.put(2),
            await asyncio.gather(echo.remote(3), echo.remote(4)),
            await asyncio.wait_for(echo.remote(5), DEADLINE_S),
            await asyncio.ensure_future(echo.remote(6)),
            await asyncio.wrap_future(echo.remote(7).future()),
        ]

    assert asyncio.run(main()) == [1, 1, 2, [3, 4], 5, 6, 7]


def test_awaiting_a_failed_task_raises_its_error() -> None:
    async def main() -> None:
        await fail.remote("awaited")

    with pytest.raises(ValueError, match="awaited") as caught:
        asyncio.run(main())
    assert isinstance(caught.value, ray.exceptions.RayTaskError)


def test_awaiting_does_not_block_the_loop(gate: Gate) -> None:
    async def main() -> str:
        awaited = asyncio.ensure_future(when_opened.remote(gate, "opened by the loop"))
        await asyncio.sleep(0)
        gate.open()
        return await asyncio.wait_for(awaited, DEADLINE_S)

    assert asyncio.run(main()) == "opened by the loop"


def test_an_await_can_time_out_and_the_task_goes_on(gate: Gate) -> None:
    pending = when_opened.remote(gate, "late")

    async def main() -> None:
        await asyncio.wait_for(pending, 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(main())
    gate.open()
    assert get(pending) == "late"


def test_a_task_may_run_a_loop_and_await() -> None:
    def loop() -> list[int]:
        async def main() -> list[int]:
            return list(await asyncio.gather(*(echo.remote(i) for i in range(3))))

        return asyncio.run(main())

    assert get(call.remote(loop)) == [0, 1, 2]


# --- time --------------------------------------------------------------------------------------


def test_timeouts_are_kept(gate: Gate) -> None:
    pending = when_opened.remote(gate)
    start = time.monotonic()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(pending, timeout=0.3)
    ray.wait([pending], timeout=0.3)
    assert 0.6 <= time.monotonic() - start < 0.6 + DEADLINE_S / 10
