"""`Executor.submit`: what goes in, what comes out, and how errors come back."""

from __future__ import annotations

import functools
import inspect
import math
import multiprocessing
import operator
import os
import sys
import threading
import traceback
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from executor_support import (
    DEADLINE_S,
    ExecutorClass,
    Gate,
    add,
    announce_and_hold,
    capture,
    causes,
    describes_pickling,
    double,
    forking,
    identity,
    raise_error,
    run_script,
    type_name,
)

INHERITED = "as it was at import"


# --- the call ----------------------------------------------------------------------------------


def test_executor_is_a_standard_executor_and_its_futures_are_standard_futures(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert isinstance(executor, Executor)
        assert isinstance(executor.submit(add, 1), Future)


@pytest.mark.parametrize("method", ["submit", "map", "shutdown"])
def test_methods_take_the_standard_parameters(
    executor_implementation: ExecutorClass, method: str
) -> None:
    standard = inspect.signature(getattr(ProcessPoolExecutor, method)).parameters
    ours = inspect.signature(getattr(executor_implementation, method)).parameters
    for name, parameter in standard.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default


def test_constructor_takes_the_standard_parameters_in_the_standard_order(
    executor_implementation: ExecutorClass,
) -> None:
    parameters = inspect.signature(executor_implementation).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["max_workers", "mp_context", "initializer", "initargs"]
    assert parameters["initargs"].default == ()


def test_positional_and_keyword_arguments_arrive(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(pow, 2, 8).result() == 256
        assert executor.submit(add, 2, b=8).result() == 10
        assert executor.submit(capture).result() == ((), {})


def test_keywords_named_fn_and_self_go_to_the_function(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(capture, 1, self=2, fn=3, timeout=4, args=5, kwargs=6)
        expected = {"self": 2, "fn": 3, "timeout": 4, "args": 5, "kwargs": 6}
        assert future.result() == ((1,), expected)


def test_submit_without_a_positional_function_is_a_type_error(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        with pytest.raises(TypeError):
            executor.submit()
        with pytest.raises(TypeError):
            executor.submit(fn=capture, arg=1)


def test_calling_what_is_not_callable_fails_the_future(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(42).exception()
        assert type(error) is TypeError
        assert "not callable" in str(error)


class Account:
    """Something with every kind of method."""

    rate = 3

    def __init__(self, balance: int) -> None:
        self.balance = balance

    def __call__(self, amount: int) -> int:
        return self.balance + amount

    def deposit(self, amount: int) -> int:
        self.balance += amount
        return self.balance

    @classmethod
    def interest(cls, amount: int) -> int:
        return cls.rate * amount

    @staticmethod
    def fee(amount: int) -> int:
        return amount // 10


@pytest.mark.parametrize(
    ("function", "argument", "expected"),
    [
        (abs, -3, 3),
        (math.factorial, 20, 2432902008176640000),
        (operator.itemgetter(1), "ab", "b"),
        (functools.partial(add, b=5), 1, 6),
        (str.upper, "a", "A"),
        ("a-b".split, "-", ["a", "b"]),
        (Account(10), 5, 15),
        (Account(10).deposit, 5, 15),
        (Account.interest, 5, 15),
        (Account.fee, 50, 5),
        (int, "7", 7),
    ],
)
def test_every_kind_of_callable_can_be_submitted(
    executor_implementation: ExecutorClass, function: Any, argument: Any, expected: Any
) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(function, argument).result() == expected


def test_changes_made_by_a_task_stay_in_the_worker(executor_implementation: ExecutorClass) -> None:
    account, items = Account(10), [3, 1, 2]
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(account.deposit, 5).result() == 15
        assert executor.submit(items.sort).result() is None
    assert account.balance == 10
    assert items == [3, 1, 2]


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        Ellipsis,
        -(2**200),
        "snowman \u2603, nul \x00, lone surrogate \udc80",
        b"\x00\xff" * 10,
        bytearray(b"ab"),
        {"a": [1, (2.5, {3})], None: frozenset({4})},
        ValueError("an error as a value"),
        Account,
        add,
        range(3),
        [1] * 100_000,
    ],
    ids=type_name,
)
def test_values_make_the_round_trip(executor_implementation: ExecutorClass, value: Any) -> None:
    with executor_implementation(max_workers=1) as executor:
        result = executor.submit(identity, value).result()
    assert type(result) is type(value)
    assert repr(result) == repr(value)


def test_an_exception_that_is_returned_is_a_result(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(identity, ValueError("fine"))
        assert future.exception() is None
        assert str(future.result()) == "fine"


def test_shared_structure_within_one_value_is_kept(executor_implementation: ExecutorClass) -> None:
    inner = [1]
    cycle: list[Any] = [inner, inner]
    cycle.append(cycle)
    with executor_implementation(max_workers=1) as executor:
        result = executor.submit(identity, cycle).result()
    assert result[0] is result[1]
    assert result[2] is result


def overwrite(array: np.ndarray, value: float) -> tuple[np.ndarray, bool]:
    writable = array.flags.writeable
    array[...] = value
    return array, writable


@pytest.mark.parametrize("length", [0, 10, 1_000_000])
def test_arrays_are_writable_on_arrival_on_both_sides(
    executor_implementation: ExecutorClass, length: int
) -> None:
    sent = np.arange(length, dtype=np.float64)
    with executor_implementation(max_workers=1) as executor:
        received, was_writable = executor.submit(overwrite, sent, 7.0).result()
    assert was_writable
    assert np.array_equal(received, np.full(length, 7.0))
    assert np.array_equal(sent, np.arange(length))
    received[...] = 8.0
    assert (received == 8.0).all()


def test_two_arrivals_of_one_array_do_not_share_memory(
    executor_implementation: ExecutorClass,
) -> None:
    sent = np.zeros(200_000)
    with executor_implementation(max_workers=1) as executor:
        first, _ = executor.submit(overwrite, sent, 1.0).result()
        second = executor.submit(identity, sent).result()
        first[...] = 2.0
        assert (second == 0.0).all()
        second[...] = 3.0
        assert (first == 2.0).all()


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(400_000, dtype=np.int32).reshape(400, 1000)),
        np.arange(400_000)[::2],
        np.array(3.5),
        np.array([(1, "a"), (2, "b")], dtype=[("number", "i8"), ("text", "U5")]),
        np.array([{"a": 1}, None, "text"], dtype=object),
        np.array(["2024-01-01"], dtype="datetime64[D]"),
    ],
    ids=["fortran", "strided", "scalar", "record", "object", "datetime"],
)
def test_arrays_of_every_layout_make_the_round_trip(
    executor_implementation: ExecutorClass, array: np.ndarray
) -> None:
    with executor_implementation(max_workers=1) as executor:
        result = executor.submit(identity, array).result()
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    assert np.array_equal(result, array)
    assert result.flags.writeable


def test_large_bytes_make_the_round_trip(executor_implementation: ExecutorClass) -> None:
    value = os.urandom(1 << 10) * (8 << 10)
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(identity, value).result() == value


# --- errors ------------------------------------------------------------------------------------


class PaymentError(Exception):
    """A user's exception with fields of its own."""

    def __init__(self, message: str, amount: int) -> None:
        super().__init__(message, amount)
        self.amount = amount


def charge(amount: int) -> NoReturn:
    raise PaymentError("declined", amount)  # the line to be seen


def charge_and_wrap(amount: int) -> NoReturn:
    try:
        charge(amount)
    except PaymentError as error:
        raise RuntimeError("wrapped") from error


def test_an_error_keeps_its_class_arguments_and_fields(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(charge, 7)
        with pytest.raises(PaymentError) as caught:
            future.result()
    assert type(caught.value) is PaymentError
    assert caught.value.args == ("declined", 7)
    assert caught.value.amount == 7
    assert future.exception() is caught.value


def test_an_error_has_the_remote_traceback_as_its_cause(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(charge, 7).exception()
    assert error is not None
    text = str(error.__cause__)
    assert "in charge" in text
    assert 'raise PaymentError("declined", amount)  # the line to be seen' in text
    assert text in "".join(traceback.format_exception(type(error), error, None))


def test_the_remote_traceback_tells_what_the_error_was_raised_from(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(charge_and_wrap, 7).exception()
    assert type(error) is RuntimeError
    text = str(error.__cause__)
    assert "direct cause of the following exception" in text
    assert "in charge\n" in text
    assert "in charge_and_wrap\n" in text


@pytest.mark.parametrize(
    "error_class", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration]
)
def test_errors_that_end_programs_and_loops_only_end_the_task(
    executor_implementation: ExecutorClass, error_class: type[BaseException]
) -> None:
    with executor_implementation(max_workers=1) as executor:
        before = executor.submit(os.getpid).result()
        error = executor.submit(raise_error, error_class(3)).exception()
        assert type(error) is error_class
        assert error.args == (3,)
        assert executor.submit(os.getpid).result() == before


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_exception_groups_and_notes_arrive(executor_implementation: ExecutorClass) -> None:
    group = ExceptionGroup("both", [ValueError("one"), TypeError("two")])  # noqa: F821 (3.11)
    group.add_note("seen twice")
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(raise_error, group).exception()
    assert [type(inner) for inner in error.exceptions] == [ValueError, TypeError]
    assert error.__notes__ == ["seen twice"]


def test_one_failing_task_leaves_the_others_alone(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = [executor.submit(operator.floordiv, 12, n) for n in (1, 0, 3, 0, 4)]
        outcomes = [future.exception() or future.result() for future in futures]
    assert [type(outcome) for outcome in outcomes] == [
        int,
        ZeroDivisionError,
        int,
        ZeroDivisionError,
        int,
    ]


# --- what cannot be pickled --------------------------------------------------------------------


class RefusesPickling:
    """Raises an error of its own when it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise PaymentError("not this one", 1)


class ErrorWithLock(Exception):
    """An error that cannot travel, because of what it holds."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


def return_lock() -> Any:
    return threading.Lock()


def return_refusal() -> RefusesPickling:
    return RefusesPickling()


def raise_error_with_lock() -> NoReturn:
    raise ErrorWithLock("the text of the error")


@pytest.mark.parametrize("make_value", [threading.Lock, lambda: (n for n in "ab"), Future])
def test_an_argument_that_cannot_be_pickled_fails_its_future_only(
    executor_implementation: ExecutorClass, make_value: Any
) -> None:
    with executor_implementation(max_workers=1) as executor:
        future = executor.submit(identity, make_value())
        with pytest.raises(TypeError, match="cannot pickle"):
            future.result()
        assert executor.submit(add, 1, 2).result() == 3


def test_an_error_raised_while_pickling_an_argument_is_the_answer(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(identity, [RefusesPickling()]).exception()
        assert type(error) is PaymentError
        assert error.args == ("not this one", 1)
        assert executor.submit(add, 1, 2).result() == 3


def test_a_result_that_cannot_be_pickled_fails_its_future_only(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        with pytest.raises(TypeError, match="cannot pickle"):
            executor.submit(return_lock).result()
        assert type(executor.submit(return_refusal).exception()) is PaymentError
        assert executor.submit(add, 1, 2).result() == 3


def test_an_error_that_cannot_be_pickled_still_fails_its_future(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        error = executor.submit(raise_error_with_lock).exception()
        assert isinstance(error, Exception)
        told = "".join(str(part) for part in causes(error))
        assert describes_pickling(error) or "the text of the error" in told
        assert executor.submit(add, 1, 2).result() == 3


# --- many --------------------------------------------------------------------------------------


def test_ten_thousand_futures_in_bulk(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=2) as executor:
        futures = [executor.submit(double, n) for n in range(10_000)]
        assert [future.result() for future in futures] == list(range(0, 20_000, 2))


def test_one_worker_runs_in_the_order_of_submission(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with executor_implementation(max_workers=1) as executor:
        for n in range(50):
            executor.submit(append_line, log, n)
    assert log.read_text().split() == [str(n) for n in range(50)]


def append_line(path: Path, n: int) -> None:
    with open(path, "a") as file:
        file.write(f"{n}\n")


def test_submitting_from_several_threads(executor_implementation: ExecutorClass) -> None:
    answers: dict[int, list[int]] = {}

    def submit_many(start: int) -> None:
        futures = [executor.submit(double, n) for n in range(start, start + 50)]
        answers[start] = [future.result() for future in futures]

    with executor_implementation(max_workers=2) as executor:
        threads = [threading.Thread(target=submit_many, args=(n * 50,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert answers == {
        start: list(range(2 * start, 2 * start + 100, 2)) for start in range(0, 400, 50)
    }


def test_two_executors_at_once_work_side_by_side(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    with (
        executor_implementation(max_workers=1) as busy,
        executor_implementation(max_workers=1) as free,
        Gate(tmp_path / "started") as started,
        Gate(tmp_path / "release") as release,
    ):
        held = busy.submit(announce_and_hold, started, release, "held")
        started.wait()
        assert free.submit(add, 1, 2).result(DEADLINE_S) == 3
        release.open()
        assert held.result() == "held"


# --- the worker's world ------------------------------------------------------------------------


def read_inherited() -> str:
    return INHERITED


def test_forked_workers_see_globals_set_before_the_first_submit(
    executor_implementation: ExecutorClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Something has run before: what the workers see is fixed by this executor's first submit, not
    # by the first executor of the process.
    with forking(executor_implementation, max_workers=1) as earlier:
        assert earlier.submit(read_inherited).result() == "as it was at import"
    with forking(executor_implementation, max_workers=1) as executor:
        monkeypatch.setattr(sys.modules[__name__], "INHERITED", "set after the executor was made")
        assert executor.submit(read_inherited).result() == "set after the executor was made"


def test_forked_workers_inherit_directory_and_environment(
    executor_implementation: ExecutorClass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTRACT_OF_THE_EXECUTOR", "kept")
    with forking(executor_implementation, max_workers=1) as executor:
        assert executor.submit(os.getcwd).result() == os.path.realpath(tmp_path)
        assert executor.submit(os.getenv, "CONTRACT_OF_THE_EXECUTOR").result() == "kept"


def sum_in_a_nested_executor(module: str, class_name: str, numbers: list[int]) -> int:
    executor_class = getattr(sys.modules[module], class_name)
    with executor_class(max_workers=1) as executor:
        return sum(executor.map(double, numbers))


def test_a_task_can_use_an_executor_of_its_own(executor_implementation: ExecutorClass) -> None:
    names = executor_implementation.__module__, executor_implementation.__qualname__
    with executor_implementation(max_workers=2) as executor:
        futures = [executor.submit(sum_in_a_nested_executor, *names, [n, n + 1]) for n in range(3)]
        assert [future.result() for future in futures] == [2, 6, 10]


def square_in_a_child_process(n: int) -> int:
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=put_square, args=(queue, n))
    child.start()
    answer = queue.get()
    child.join()
    return answer


def put_square(queue: Any, n: int) -> None:
    queue.put(n * n)


def test_a_task_can_start_processes_of_its_own(executor_implementation: ExecutorClass) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(square_in_a_child_process, 5).result() == 25


def start_thread_and_join(n: int) -> list[int]:
    found: list[int] = []
    thread = threading.Thread(target=found.append, args=(n,))
    thread.start()
    thread.join()
    return found


def test_a_task_can_start_threads_and_runs_in_the_main_thread(
    executor_implementation: ExecutorClass,
) -> None:
    with executor_implementation(max_workers=1) as executor:
        assert executor.submit(start_thread_and_join, 5).result() == [5]
        assert executor.submit(runs_in_main_thread).result()


def runs_in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_functions_of_main_and_of_the_interactive_kind_run(
    executor_implementation: ExecutorClass, tmp_path: Path
) -> None:
    result = run_script(
        executor_implementation,
        tmp_path / "script.py",
        """
        class Point:
            def __init__(self, x):
                self.x = x

        def shift(point, by):
            return Point(point.x + by)

        if __name__ == "__main__":
            with Executor(max_workers=2) as executor:
                points = executor.map(shift, [Point(1), Point(2)], [10, 20])
                print([point.x for point in points])
                print(all(type(point) is Point for point in executor.map(shift, [Point(1)], [1])))
        """,
    )
    assert (result.stdout, result.stderr) == ("[11, 22]\nTrue\n", "")
    assert result.exit_code == 0
