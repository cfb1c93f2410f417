"""Functions by value and pools inside workers: what the standard pool refuses or needs help for."""

from __future__ import annotations

import functools
import multiprocessing
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from executor_support import DEADLINE_S, capture
from pool_support import IMAPS, MAPS, MakePool, Pool, PoolClass, collect, square

by_value = pytest.mark.poolray_only

base = 100


def set_base(value: int) -> None:
    global base
    base = value


# --- lambdas, closures, local classes ----------------------------------------------------------


@by_value
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
@pytest.mark.parametrize("chunksize", [1, 3])
def test_a_lambda_can_be_mapped(pool: Pool, method: str, chunksize: int) -> None:
    results = collect(pool, method, lambda x: x + 1, range(10), chunksize=chunksize)
    assert results == list(range(1, 11))


@by_value
def test_a_lambda_can_be_applied(pool: Pool) -> None:
    assert pool.apply(lambda *args, **kwds: (args, kwds), (1,), {"x": 2}) == ((1,), {"x": 2})
    assert pool.apply_async(lambda: "value").get(DEADLINE_S) == "value"


@by_value
def test_a_closure_takes_its_variables_along(pool: Pool) -> None:
    def scale_by(factor: int) -> Callable[[int], int]:
        def scale(x: int) -> int:
            return factor * x

        return scale

    assert pool.map(scale_by(2), range(5)) == [0, 2, 4, 6, 8]
    assert pool.map(scale_by(3), range(5)) == [0, 3, 6, 9, 12]


@by_value
def test_a_local_function_may_call_itself(pool: Pool) -> None:
    def factorial(x: int) -> int:
        return x * factorial(x - 1) if x else 1

    assert pool.map(factorial, range(6)) == [1, 1, 2, 6, 24, 120]


@by_value
def test_lambdas_are_arguments_and_results(pool: Pool) -> None:
    assert pool.map(call, [lambda: 1, lambda: 2]) == [1, 2]
    add_two = pool.apply(make_adder, (2,))
    assert add_two(1) == 3
    assert pool.map(functools.partial(map_call, lambda x: -x), [1, 2]) == [-1, -2]


def call(function: Callable[[], Any]) -> Any:
    return function()


def map_call(function: Callable[[int], int], x: int) -> int:
    return function(x)


def make_adder(step: int) -> Callable[[int], int]:
    return lambda x: x + step


@by_value
def test_objects_of_local_classes_are_arguments_and_results(pool: Pool) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def double(self) -> Point:
            return Point(2 * self.x)

    assert pool.apply(Point(3).double).x == 6
    assert [point.x for point in pool.map(Point.double, [Point(1), Point(2)])] == [2, 4]
    assert isinstance(pool.apply(Point, (3,)), Point)


@by_value
def test_a_function_by_value_sees_what_the_initializer_set(make_pool: MakePool) -> None:
    pool = make_pool(2, set_base, (1_000,))
    assert pool.map(lambda x: base + x, range(4), 1) == [1_000, 1_001, 1_002, 1_003]
    assert base == 100


@by_value
def test_a_lambda_can_be_the_initializer(make_pool: MakePool) -> None:
    value = 7
    assert make_pool(1, lambda: set_base(value)).apply(lambda: base) == 7


@by_value
def test_the_same_lambda_keeps_working_as_its_closure_changes(pool: Pool) -> None:
    factor = 1

    def scale(x: int) -> int:
        return factor * x

    assert pool.map(scale, [3]) == [3]
    factor = 2
    assert pool.map(scale, [3]) == [6]


# The standard worker cannot find it, and dies of that.
@by_value
def test_a_function_that_is_newer_than_the_pool_can_be_applied(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.map(square, range(10), 1)
    module = types.ModuleType("made_up_after_the_pool")
    exec("def add_one(x):\n    return x + 1\n", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert pool.map(module.add_one, range(5)) == [1, 2, 3, 4, 5]


# --- pools in workers --------------------------------------------------------------------------


def sum_of_squares(pool_class: PoolClass, count: int) -> int:
    with pool_class(2) as inner:
        total = sum(inner.map(square, range(count)))
    inner.join()
    return total


# Standard workers are daemons, which may have no children.
@pytest.mark.poolray_only
def test_a_worker_may_have_a_pool_of_its_own(
    make_pool: MakePool, pool_implementation: PoolClass
) -> None:
    task = functools.partial(sum_of_squares, pool_implementation)
    assert make_pool(2).map(task, [3, 4, 5, 6], 1) == [5, 14, 30, 55]


@pytest.mark.poolray_only
def test_pools_nest_three_deep(make_pool: MakePool, pool_implementation: PoolClass) -> None:
    task = functools.partial(sum_of_squares, pool_implementation)
    assert make_pool(1).apply(apply_in_a_pool, (pool_implementation, task, 4)) == 14


def apply_in_a_pool(pool_class: PoolClass, task: Callable[[int], int], x: int) -> int:
    with pool_class(1) as inner:
        return inner.apply(task, (x,))


class UndaemonicProcess(multiprocessing.get_context("fork").Process):
    """A process that cannot be made a daemon."""

    @property
    def daemon(self) -> bool:
        return False

    @daemon.setter
    def daemon(self, value: bool) -> None:
        pass


class UndaemonicContext(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
    """The context of the widespread recipe for pools whose workers may have children."""

    Process = UndaemonicProcess


def test_the_recipe_for_nested_pools_works(pool_implementation: Any) -> None:
    class NestablePool(pool_implementation):  # type: ignore[misc]
        """The recipe."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["context"] = UndaemonicContext()
            super().__init__(*args, **kwargs)

    task = functools.partial(sum_of_squares, pool_implementation)
    with NestablePool(2) as pool:
        assert pool.map(task, [3, 4, 5, 6], 1) == [5, 14, 30, 55]
        assert pool.apply(capture, (1,), {"x": 2}) == ((1,), {"x": 2})
        pool.close()
        pool.join()
