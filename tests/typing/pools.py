"""`Pool`, as the standard library's stubs have it."""

from __future__ import annotations

import multiprocessing

from typing_extensions import assert_type

from poolray import Pool
from poolray.pool import ApplyResult, AsyncResult, IMapIterator


def length(text: str) -> int:
    return len(text)


def times(a: int, b: int = 2) -> int:
    return a * b


def show(value: object) -> None: ...


def note(error: BaseException) -> None: ...


def making() -> None:
    Pool()
    Pool(2, show, ("a",), 10)
    Pool(processes=2, initializer=show, initargs=["a"], maxtasksperchild=None)
    Pool(context=multiprocessing.get_context("spawn"), max_retries=0)
    with Pool(2) as pool:
        assert_type(pool, Pool)
        pool.close()
        pool.terminate()
        pool.join()


def one_call(pool: Pool) -> None:
    assert_type(pool.apply(length, ("a",)), int)
    assert_type(pool.apply(times, [2], {"b": 3}), int)
    result = pool.apply_async(length, ("a",), callback=show, error_callback=note)
    assert_type(result, ApplyResult[int])
    assert_type(result.get(), int)
    assert_type(result.get(timeout=1), int)
    assert_type(result.ready(), bool)
    assert_type(result.successful(), bool)
    result.wait(1.5)
    alias: AsyncResult[int] = result


def many_calls(pool: Pool) -> None:
    assert_type(pool.map(length, ["a", "b"]), list[int])
    assert_type(pool.map(length, (word for word in {"a", "b"}), chunksize=10), list[int])
    assert_type(pool.map(str, range(3)), list[str])
    assert_type(pool.map(lambda n: n * 1.5, [1, 2]), list[float])
    assert_type(pool.map_async(length, ["a"], 1, show, note).get(), list[int])
    assert_type(pool.starmap(times, [(1, 2), (3, 4)]), list[int])
    assert_type(pool.starmap_async(times, [(1, 2)], callback=show).get(1.5), list[int])


def results_one_by_one(pool: Pool) -> None:
    assert_type(pool.imap(length, ["a"]), IMapIterator[int])
    assert_type(next(pool.imap(length, ["a"], chunksize=2)), int)
    assert_type(pool.imap(length, ["a"]).next(timeout=1), int)
    assert_type(list(pool.imap_unordered(length, ["a"])), list[int])
    for found in pool.imap_unordered(times, range(3)):
        assert_type(found, int)


def wrong_calls(pool: Pool) -> None:
    Pool("2")  # type: ignore[arg-type]
    Pool(2, initializer=3)  # type: ignore[arg-type]
    Pool(processes=2, workers=2)  # type: ignore[call-arg]
    pool.apply(3)  # type: ignore[arg-type]
    pool.map(length, [1, 2])  # type: ignore[arg-type]
    pool.map(length, 3)  # type: ignore[arg-type]
    pool.map(length)  # type: ignore[call-arg]
    pool.map(length, ["a"], chunksize="2")  # type: ignore[arg-type]
    pool.map(lambda a, b: a, [1])  # type: ignore[arg-type,misc]
    pool.imap(length, [1])  # type: ignore[arg-type]
    pool.starmap(times, [1, 2])  # type: ignore[list-item]
    pool.apply_async(length, ("a",), callback=3)  # type: ignore[arg-type]
    pool.submit(length, "a")  # type: ignore[attr-defined]


def wrong_results(pool: Pool) -> None:
    a: list[str] = pool.map(length, ["a"])  # type: ignore[arg-type]
    b: str = pool.apply(length, ("a",))  # type: ignore[assignment]
    c: str = pool.apply_async(length, ("a",)).get()  # type: ignore[assignment]
    d: list[int] = pool.map_async(length, ["a"])  # type: ignore[assignment]
