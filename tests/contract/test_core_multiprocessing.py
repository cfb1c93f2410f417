"""`util.multiprocessing`: the module path at which programs find a pool."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    better_than_reference,
    ray,
    start_runtime,
)

module: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.multiprocessing")
submodule: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.multiprocessing.pool")


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    start_runtime()
    made = module.Pool(processes=2)
    yield made
    made.terminate()
    made.join()


def add(a: int, b: int = 100) -> int:
    return a + b


def test_names_of_the_modules() -> None:
    assert submodule.Pool is module.Pool
    assert module.TimeoutError is submodule.TimeoutError is multiprocessing.TimeoutError
    assert module.JoinableQueue is not None
    assert submodule.AsyncResult is not None
    assert submodule.IMapIterator is not None


def test_maps(pool: Any) -> None:
    assert pool.map(add, range(5)) == [100, 101, 102, 103, 104]
    assert pool.starmap(add, [(1, 2), (3, 4)]) == [3, 7]
    assert list(pool.imap(add, range(3))) == [100, 101, 102]
    assert sorted(pool.imap_unordered(add, range(3))) == [100, 101, 102]
    assert pool.map_async(add, range(2)).get(timeout=30) == [100, 101]


def test_apply_takes_keywords_by_either_name(pool: Any) -> None:
    assert pool.apply(add, (1,), {"b": 2}) == 3
    assert pool.apply(add, (1,), kwargs={"b": 2}) == 3
    assert pool.apply(add, args=(1, 5), kwargs=None) == 6
    assert pool.apply_async(add, args=(1,), kwargs={"b": 2}).get(timeout=30) == 3


@better_than_reference("it knows the one of its own only")
def test_apply_takes_keywords_as_the_standard_library_does(pool: Any) -> None:
    assert pool.apply(add, (1,), kwds={"b": 2}) == 3
    assert pool.apply_async(add, (1,), kwds={"b": 2}).get(timeout=30) == 3


def test_an_exception_comes_back_as_itself(pool: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        pool.map(lambda n: 1 // n, [1, 0])


def test_arguments_of_the_constructor() -> None:
    with module.Pool(1, initializer=None, initargs=None, ray_address=None) as pool:
        assert pool.map(add, [1]) == [101]
    with module.Pool(1, ray_remote_args={"num_cpus": 1}) as pool:
        assert pool.map(add, [1]) == [101]


@pytest.mark.skipif(IS_REFERENCE, reason="its workers are actors, which have options")
def test_options_that_cannot_be_carried_out_are_refused() -> None:
    with pytest.raises(ray.exceptions.NotSupportedError, match="num_gpus"):
        module.Pool(1, ray_remote_args={"num_gpus": 1})


@pytest.mark.skipif(IS_REFERENCE, reason="it asks for a name that there is none of")
def test_an_address_without_a_port_is_refused() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        module.Pool(1, ray_address="ray://elsewhere")
