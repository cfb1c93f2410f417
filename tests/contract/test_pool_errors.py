"""What becomes of exceptions: their class, their traceback, and what cannot be sent at all."""

from __future__ import annotations

import functools
import io
import multiprocessing
import multiprocessing.pool
import pickle
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from executor_support import DEADLINE_S, Gate, causes, hold, identity, raise_error
from pool_support import (
    MakePool,
    Pool,
    Unloadable,
    Unpicklable,
    collect,
    fail_if_odd,
    processes_of,
    square,
)


class Detailed(Exception):
    """An exception with more to it than its arguments."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code
        self.details = {"where": "worker"}


class HoldsLock(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class NeedsTwoArguments(Exception):
    """An exception that can be pickled but not rebuilt: a widespread mistake."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"{message} ({code})")


def raise_detailed() -> NoReturn:
    raise Detailed("something", 7)


def raise_from_another() -> NoReturn:
    try:
        int("not a number")
    except ValueError as error:
        raise KeyError("the second") from error


def raise_new(make_error: Callable[..., BaseException], *args: Any) -> NoReturn:
    raise make_error(*args)


def return_new(make: Callable[[], object]) -> object:
    return make()


def make_generator() -> Any:
    return (x for x in ())


def raise_at_2(make_error: Callable[..., BaseException], x: int) -> int:
    if x == 2:
        raise make_error("at 2")
    return x


# --- exceptions of tasks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KeyError("key"),
        ValueError("a", 1, None),
        FileNotFoundError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        StopIteration("value"),
        TimeoutError("a task's own"),
        multiprocessing.TimeoutError("a task's own"),
        pickle.PicklingError("a task's own"),
        EOFError(),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_arrives_as_its_own_class(pool: Pool, error: Exception) -> None:
    result = pool.apply_async(raise_error, (error,))
    with pytest.raises(type(error)) as caught:
        result.get(DEADLINE_S)
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert not result.successful()


def test_the_attributes_of_an_exception_arrive(pool: Pool) -> None:
    with pytest.raises(Detailed) as caught:
        pool.apply(raise_detailed)
    assert type(caught.value) is Detailed
    assert (caught.value.code, caught.value.details) == (7, {"where": "worker"})


@pytest.mark.parametrize("method", ["map", "starmap", "map_async", "imap", "imap_unordered"])
def test_an_exception_in_a_map_arrives_as_its_own_class(pool: Pool, method: str) -> None:
    with pytest.raises(Detailed) as caught:
        collect(pool, method, functools.partial(raise_new, Detailed, "x"), [7])
    assert type(caught.value) is Detailed
    assert caught.value.code == 7
    assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback


def test_the_cause_holds_the_traceback_of_the_worker(pool: Pool) -> None:
    with pytest.raises(Detailed) as caught:
        pool.apply(raise_detailed)
    cause = caught.value.__cause__
    assert type(cause) is multiprocessing.pool.RemoteTraceback
    assert cause.tb == str(cause)
    assert cause.tb.startswith('\n"""\nTraceback (most recent call last):\n')
    assert cause.tb.endswith('\n"""')
    assert "in raise_detailed\n" in cause.tb
    assert __file__ in cause.tb
    assert 'raise Detailed("something", 7)' in cause.tb
    assert "test_pool_errors.Detailed: ('something', 7)\n" in cause.tb


def test_the_printed_error_shows_both_sides(pool: Pool) -> None:
    with pytest.raises(Detailed) as caught:
        pool.apply(raise_detailed)
    text = "".join(traceback.format_exception(caught.value))
    assert "in raise_detailed" in text
    assert "in test_the_printed_error_shows_both_sides" in text
    assert "The above exception was the direct cause of the following exception" in text


def test_the_remote_traceback_shows_the_chain_of_exceptions(pool: Pool) -> None:
    with pytest.raises(KeyError) as caught:
        pool.apply(raise_from_another)
    remote = str(caught.value.__cause__)
    assert "invalid literal for int()" in remote
    assert "The above exception was the direct cause of the following exception" in remote
    assert "KeyError: 'the second'" in remote


@pytest.mark.parametrize("method", ["apply", "map"])
def test_a_failing_task_costs_no_worker(make_pool: MakePool, method: str) -> None:
    pool = make_pool(1)
    before = processes_of(pool)
    for _ in range(20):
        with pytest.raises(ValueError, match="3 is odd"):
            getattr(pool, method)(fail_if_odd, [3])
    assert processes_of(pool) == before


# --- results and exceptions that cannot be sent ------------------------------------------------

UNPICKLABLE_RESULTS = {"lock": threading.Lock, "generator": make_generator, "own": Unpicklable}


@pytest.mark.parametrize("kind", UNPICKLABLE_RESULTS)
def test_a_result_that_cannot_be_pickled_is_an_error(pool: Pool, kind: str) -> None:
    errors: list[Any] = []
    make = UNPICKLABLE_RESULTS[kind]
    result = pool.apply_async(return_new, (make,), error_callback=errors.append)
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        result.get(DEADLINE_S)
    assert errors == [caught.value]
    assert not result.successful()


def test_the_encoding_error_describes_value_and_reason(pool: Pool) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        pool.apply(return_new, (Unpicklable,))
    error = caught.value
    assert error.value == "<an unpicklable thing>"
    assert error.exc == "Failure('I cannot be pickled')"
    assert str(error) == (
        "Error sending result: '<an unpicklable thing>'. Reason: 'Failure('I cannot be pickled')'"
    )
    assert repr(error) == f"<MaybeEncodingError: {error}>"


@pytest.mark.parametrize("method", ["map", "starmap", "map_async", "imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [1, 3])
def test_an_unpicklable_result_in_a_map_is_an_error(
    pool: Pool, method: str, chunksize: int
) -> None:
    makes = [int, Unpicklable, str]
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        collect(pool, method, return_new, makes, chunksize=chunksize)
    assert "<an unpicklable thing>" in caught.value.value


def test_the_results_beside_an_unpicklable_one_arrive(pool: Pool) -> None:
    results = pool.imap(return_new, [int, Unpicklable, str])
    assert next(results) == 0
    with pytest.raises(multiprocessing.pool.MaybeEncodingError):
        next(results)
    assert next(results) == ""


def test_an_unpicklable_result_costs_no_worker(make_pool: MakePool) -> None:
    pool = make_pool(1)
    before = processes_of(pool)
    for _ in range(20):
        with pytest.raises(multiprocessing.pool.MaybeEncodingError):
            pool.apply(return_new, (threading.Lock,))
    assert processes_of(pool) == before
    assert pool.apply(square, (3,)) == 9


def test_an_exception_that_cannot_be_pickled_is_an_encoding_error(pool: Pool) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        pool.apply(raise_new, (HoldsLock, "the text"))
    assert "lock" in caught.value.exc
    assert pool.apply(square, (3,)) == 9


# --- beyond the standard class -----------------------------------------------------------------


# The standard pool shows the address of an object of its own instead.
@pytest.mark.poolray_only
def test_an_exception_that_cannot_be_pickled_arrives_with_its_text(pool: Pool) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        pool.apply(raise_new, (HoldsLock, "the text"))
    assert "the text" in caught.value.value


def everything_shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# The standard pool hangs: rebuilding the exception ends the thread that reads the results.
@pytest.mark.poolray_only
@pytest.mark.parametrize("method", ["map", "imap", "imap_unordered"])
def test_an_exception_that_cannot_be_rebuilt_arrives_with_its_text(pool: Pool, method: str) -> None:
    task = functools.partial(raise_new, NeedsTwoArguments, "the text")
    with pytest.raises(Exception) as caught:
        pool.apply_async(task, (7,)).get(DEADLINE_S)
    assert "the text (7)" in everything_shown(caught.value)
    with pytest.raises(Exception) as caught:
        collect(pool, method, task, [7])
    assert "the text (7)" in everything_shown(caught.value)
    assert pool.apply(square, (3,)) == 9


# The standard pool hangs.
@pytest.mark.poolray_only
def test_a_result_that_cannot_be_rebuilt_is_an_error(pool: Pool) -> None:
    with pytest.raises(Exception) as caught:
        pool.apply_async(return_new, (Unloadable,)).get(DEADLINE_S)
    assert "I cannot be rebuilt" in everything_shown(caught.value)
    results = pool.imap(return_new, [int, Unloadable, str])
    assert next(results) == 0
    with pytest.raises(Exception) as caught:
        next(results)
    assert "I cannot be rebuilt" in everything_shown(caught.value)
    assert next(results) == ""
    assert pool.map(square, [3]) == [9]


# The standard pool loses the worker and the task with it, and hangs.
@pytest.mark.poolray_only
def test_an_argument_that_cannot_be_rebuilt_is_an_error(pool: Pool) -> None:
    with pytest.raises(Exception) as caught:
        pool.apply_async(identity, (Unloadable(),)).get(DEADLINE_S)
    assert "I cannot be rebuilt" in everything_shown(caught.value)
    with pytest.raises(Exception) as caught:
        pool.map_async(identity, [1, Unloadable(), 3], 1).get(DEADLINE_S)
    assert "I cannot be rebuilt" in everything_shown(caught.value)
    assert pool.map(square, [3]) == [9]


# The standard pool loses the task: `get` hangs.
@pytest.mark.poolray_only
@pytest.mark.parametrize("error_class", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_task_that_exits_is_an_error(pool: Pool, error_class: type[BaseException]) -> None:
    for result in (
        pool.apply_async(raise_new, (error_class, "at 2")),
        pool.map_async(functools.partial(raise_at_2, error_class), range(4), 1),
    ):
        with pytest.raises(BaseException) as caught:
            result.get(DEADLINE_S)
        assert not isinstance(caught.value, multiprocessing.TimeoutError)
    assert pool.map(square, [3]) == [9]


@pytest.mark.parametrize("error_class", [SystemExit, KeyboardInterrupt])
def test_the_pool_goes_on_after_a_task_that_exits(
    make_pool: MakePool, error_class: type[BaseException]
) -> None:
    pool = make_pool(1)
    pool.apply_async(raise_new, (error_class,))
    assert pool.apply_async(square, (3,)).get(DEADLINE_S) == 9
    assert len(pool._pool) == 1


# Only a pickler that goes by value can send a class that no module holds.
@pytest.mark.poolray_only
def test_an_exception_of_a_local_class_arrives(pool: Pool) -> None:
    class Local(Exception):
        pass

    with pytest.raises(Exception, match="the text") as caught:
        pool.apply(raise_new, (Local, "the text"))
    assert type(caught.value).__name__ == "Local"


# The standard pool leaves it waiting for ever.
@pytest.mark.poolray_only
def test_terminating_the_pool_fails_what_was_outstanding(pool: Pool, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        results = [pool.apply_async(hold, (gate,)) for _ in range(4)]
        results.append(pool.map_async(hold, [gate] * 4))
        pool.terminate()
        for result in results:
            with pytest.raises(Exception) as caught:
                result.get(DEADLINE_S)
            assert not isinstance(caught.value, multiprocessing.TimeoutError)


def test_an_error_can_be_printed_more_than_once(pool: Pool) -> None:
    with pytest.raises(Detailed) as caught:
        pool.apply(raise_detailed)
    texts = []
    for _ in range(2):
        stream = io.StringIO()
        traceback.print_exception(caught.value, file=stream)
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]
    assert any(isinstance(e, multiprocessing.pool.RemoteTraceback) for e in causes(caught.value))
