"""`apply`, `apply_async`, and the result objects that the asynchronous calls return."""

from __future__ import annotations

import functools
import inspect
import multiprocessing.pool
import operator
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from executor_support import DEADLINE_S, Gate, capture, hold, identity, raise_error
from pool_support import Failure, Pool, PoolClass, Unpicklable, fail_if_odd, square


class Scale:
    """Callables of every kind."""

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scale) and other.factor == self.factor

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: int) -> int:
        return self.factor * x

    def method(self, x: int) -> int:
        return self.factor * x

    @classmethod
    def of_class(cls, x: int) -> str:
        return f"{cls.__name__}{x}"

    @staticmethod
    def of_nobody(x: int) -> int:
        return -x


def append_in_place(items: list[int]) -> list[int]:
    items.append(1)
    return items


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((), {}, ((), {})),
        (((1, 2),), {}, ((1, 2), {})),
        (([1, 2],), {}, ((1, 2), {})),
        (("ab",), {}, (("a", "b"), {})),
        ((range(3),), {}, ((0, 1, 2), {})),
        (({"a": 1},), {}, (("a",), {})),
        (((), {"x": 1}), {}, ((), {"x": 1})),
        (((1,), {"x": 2}), {}, ((1,), {"x": 2})),
        ((), {"args": (1,), "kwds": {"x": 2}}, ((1,), {"x": 2})),
        ((), {"kwds": {"self": 1, "func": 2, "args": 3, "kwds": 4, "callback": 5}}, None),
    ],
)
def test_apply_passes_positional_and_keyword_arguments(
    pool: Pool, arguments: Any, options: Any, expected: Any
) -> None:
    expected = expected or ((), options["kwds"])
    assert pool.apply(capture, *arguments, **options) == expected
    assert pool.apply_async(capture, *arguments, **options).get(DEADLINE_S) == expected


def test_the_function_can_be_named_too(pool: Pool) -> None:
    assert pool.apply(func=capture, args=(1,), kwds={"x": 2}) == ((1,), {"x": 2})
    result = pool.apply_async(
        func=capture, args=(1,), kwds={"x": 2}, callback=None, error_callback=None
    )
    assert result.get(timeout=DEADLINE_S) == ((1,), {"x": 2})


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(abs, 3, id="builtin"),
        pytest.param(square, 9, id="function"),
        pytest.param(functools.partial(operator.mul, 7), -21, id="partial"),
        pytest.param(Scale(2), -6, id="callable object"),
        pytest.param(Scale(2).method, -6, id="bound method"),
        pytest.param(Scale.of_class, "Scale-3", id="class method"),
        pytest.param(Scale.of_nobody, 3, id="static method"),
        pytest.param(Scale, Scale(-3), id="class"),
        pytest.param(operator.methodcaller("bit_length"), 2, id="methodcaller"),
        pytest.param("%05d".__mod__, "-0003", id="method of a builtin"),
        pytest.param(numpy.square, 9, id="ufunc"),
    ],
)
def test_every_kind_of_callable_can_be_applied(pool: Pool, function: Any, expected: Any) -> None:
    assert pool.apply(function, (-3,)) == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        False,
        0,
        "",
        Ellipsis,
        NotImplemented,
        int,
        1 << 100,
        {"a": [(1, {2})]},
        b"x" * 300_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_any_value_can_be_passed_and_returned(pool: Pool, value: Any) -> None:
    assert pool.apply(identity, (value,)) == value


def test_an_exception_that_is_returned_is_a_value(pool: Pool) -> None:
    result = pool.apply_async(ValueError, ("a value",))
    assert isinstance(result.get(DEADLINE_S), ValueError)
    assert result.successful()


def test_the_call_runs_in_another_process(pool: Pool) -> None:
    assert pool.apply(os.getpid) != os.getpid()


def test_what_a_task_does_to_its_arguments_stays_there(pool: Pool) -> None:
    items = [0]
    assert pool.apply(append_in_place, (items,)) == [0, 1]
    assert items == [0]


def test_many_results_may_be_outstanding(pool: Pool) -> None:
    results = [pool.apply_async(square, (x,)) for x in range(2_000)]
    assert [result.get(DEADLINE_S) for result in reversed(results)] == [
        x * x for x in reversed(range(2_000))
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((square, (1, 2)), id="too many"),
        pytest.param((square,), id="too few"),
        pytest.param((square, (), {"y": 1}), id="unknown keyword"),
        pytest.param((5, ()), id="not callable"),
        pytest.param((square, 5), id="args not iterable"),
        pytest.param((square, (1,), None), id="kwds not a mapping"),
    ],
)
def test_a_wrong_call_fails_in_the_result_and_the_pool_goes_on(pool: Pool, arguments: Any) -> None:
    result = pool.apply_async(*arguments)
    with pytest.raises(TypeError):
        result.get(DEADLINE_S)
    assert not result.successful()
    assert pool.apply(square, (3,)) == 9


def test_methods_take_the_parameters_of_the_standard_class(pool_implementation: PoolClass) -> None:
    for name in (
        *("apply", "apply_async", "map", "map_async", "starmap", "starmap_async"),
        *("imap", "imap_unordered", "close", "terminate", "join"),
    ):
        expected = inspect.signature(getattr(multiprocessing.pool.Pool, name)).parameters
        found = inspect.signature(getattr(pool_implementation, name)).parameters
        # What is more is for those who ask for it by name.
        extra = list(found.values())[len(expected) :]
        assert list(found)[: len(expected)] == list(expected), name
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra), name
        for parameter, theirs in expected.items():
            required = theirs.default is inspect.Parameter.empty
            assert (found[parameter].default is inspect.Parameter.empty) == required, name


def test_the_class_takes_the_arguments_of_the_standard_class(
    pool_implementation: PoolClass,
) -> None:
    expected = list(inspect.signature(multiprocessing.pool.Pool).parameters)
    parameters = inspect.signature(pool_implementation).parameters
    assert list(parameters)[: len(expected)] == expected
    assert all(p.default is not inspect.Parameter.empty for p in parameters.values())


# --- results -----------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    with Gate(tmp_path / "gate") as gate:
        yield gate


def test_a_result_is_not_ready_while_the_task_runs(pool: Pool, gate: Gate) -> None:
    result = pool.apply_async(hold, (gate, "value"))
    assert result.ready() is False
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    gate.open()
    assert result.wait() is None
    assert result.ready() is True
    assert result.successful() is True
    assert result.get() == "value"


@pytest.mark.parametrize("timeout_s", [0, 0.0, 0.01, -1])
def test_get_times_out_and_can_be_called_again(pool: Pool, gate: Gate, timeout_s: float) -> None:
    result = pool.apply_async(hold, (gate, "value"))
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout_s)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=timeout_s)
    gate.open()
    assert result.get(DEADLINE_S) == "value"


@pytest.mark.parametrize("timeout_s", [0, 0.01, -1])
def test_wait_with_a_timeout_returns_nothing_and_raises_nothing(
    pool: Pool, gate: Gate, timeout_s: float
) -> None:
    result = pool.apply_async(hold, (gate,))
    assert result.wait(timeout_s) is None
    assert result.wait(timeout=timeout_s) is None
    assert not result.ready()
    gate.open()
    result.wait(DEADLINE_S)
    assert result.ready()


@pytest.mark.parametrize("timeout_s", [0, -1, 0.5, None])
def test_a_ready_result_needs_no_time(pool: Pool, timeout_s: float | None) -> None:
    result = pool.apply_async(square, (3,))
    result.wait()
    assert result.get(timeout_s) == 9


def test_get_returns_the_same_object_each_time(pool: Pool) -> None:
    result = pool.apply_async(identity, ([1, 2],))
    assert result.get(DEADLINE_S) is result.get(DEADLINE_S)


def test_get_raises_the_same_exception_each_time(pool: Pool) -> None:
    result = pool.apply_async(raise_error, (KeyError("gone"),))
    result.wait()
    assert result.ready()
    assert result.successful() is False
    with pytest.raises(KeyError) as first:
        result.get()
    with pytest.raises(KeyError) as second:
        result.get()
    assert first.value is second.value


@pytest.mark.parametrize("ending", ["close", "terminate"])
def test_a_ready_result_outlives_its_pool(pool: Pool, ending: str) -> None:
    right = pool.apply_async(square, (3,))
    wrong = pool.apply_async(fail_if_odd, (3,))
    several = pool.map_async(square, [1, 2, 3])
    for result in (right, wrong, several):
        result.wait(DEADLINE_S)
    getattr(pool, ending)()
    pool.join()
    assert right.get() == 9
    assert several.get() == [1, 4, 9]
    with pytest.raises(ValueError, match="3 is odd"):
        wrong.get()


def test_several_threads_may_wait_for_one_result(pool: Pool, gate: Gate) -> None:
    result = pool.apply_async(hold, (gate, "value"))
    everybody_waits = threading.Barrier(5)

    def wait_for_it(_: int) -> Any:
        everybody_waits.wait(DEADLINE_S)
        return result.get(DEADLINE_S)

    with ThreadPoolExecutor(4) as threads:
        values = threads.map(wait_for_it, range(4))
        everybody_waits.wait(DEADLINE_S)
        gate.open()
        assert list(values) == ["value"] * 4


@pytest.mark.parametrize("start", ["map_async", "starmap_async"])
def test_map_results_have_the_same_methods(pool: Pool, gate: Gate, start: str) -> None:
    items: list[Any] = [gate, gate]
    result = getattr(pool, start)(hold, zip(items) if start == "starmap_async" else items)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)
    assert result.wait(0.01) is None
    gate.open(2)
    assert result.get(timeout=DEADLINE_S) == [None, None]
    assert result.ready()
    assert result.successful()
    assert result.get() is result.get()


def test_results_that_nobody_reads_do_no_harm(pool: Pool) -> None:
    for x in range(100):
        pool.apply_async(fail_if_odd, (x,))
        pool.map_async(fail_if_odd, [x])
    assert pool.apply(square, (3,)) == 9


# --- unpicklable calls -------------------------------------------------------------------------

UNPICKLABLE_CALLS = {
    "argument": (identity, (Unpicklable(),), {}),
    "keyword argument": (capture, (), {"x": Unpicklable()}),
    "nested argument": (identity, ({"a": [Unpicklable()]},), {}),
    "function": (functools.partial(identity, Unpicklable()), (), {}),
}


@pytest.mark.parametrize("what", UNPICKLABLE_CALLS)
def test_an_unpicklable_call_fails_in_the_result_and_the_pool_goes_on(
    pool: Pool, what: str
) -> None:
    seen = SimpleNamespace(error=None)
    result = pool.apply_async(
        *UNPICKLABLE_CALLS[what], error_callback=lambda error: setattr(seen, "error", error)
    )
    with pytest.raises(Failure, match="I cannot be pickled"):
        result.get(DEADLINE_S)
    assert isinstance(seen.error, Failure)
    assert pool.apply(square, (3,)) == 9


@pytest.mark.parametrize(
    ("unpicklable", "its_type"),
    [
        pytest.param(threading.Lock, "lock", id="lock"),
        pytest.param(lambda: (x for x in ()), "generator", id="generator"),
    ],
)
def test_the_error_names_the_type_that_cannot_be_pickled(
    pool: Pool, unpicklable: Callable[[], object], its_type: str
) -> None:
    with pytest.raises(TypeError, match=its_type):
        pool.apply(identity, (unpicklable(),))
