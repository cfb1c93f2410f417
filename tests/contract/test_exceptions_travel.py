"""Exceptions of every shape, from a worker to whoever asks: class, arguments, attributes, chain."""

from __future__ import annotations

import builtins
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import IS_REFERENCE

import poolray
from poolray import Executor, Pool

pytestmark = pytest.mark.skipif(IS_REFERENCE, reason="also about Pool and Executor")

DEADLINE_S = 40.0
ExceptionGroup: Any = getattr(builtins, "ExceptionGroup", None)
needs_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with Python 3.11")


class NeedsArguments(Exception):
    def __init__(self, first: object, second: object, *, code: int = 1) -> None:
        super().__init__(f"{first} and {second}")
        self.first, self.second, self.code = first, second, code


class KeywordsOnly(Exception):
    def __init__(self, *, code: int) -> None:
        self.code = code


class HoldsLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()
        self.kept = 5


class RefusesToPickle(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


class RefusesToLoad(Exception):
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("not here")


class HasNoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def throw(kind: type[Exception], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    raise kind(*args, **options)


def throw_lock() -> None:
    raise HoldsLock("text")


def throw_refused(kind: type[Exception]) -> None:
    raise kind("text")


def throw_lock_as_argument() -> None:
    raise ValueError("text", threading.Lock())


def throw_from() -> None:
    try:
        raise NeedsArguments(1, 2)
    except NeedsArguments as error:
        raise ValueError("outer") from error


def throw_while_handling() -> None:
    try:
        raise KeyError("inner")
    except KeyError:
        raise ValueError("outer")  # noqa: B904 (the context is what is tested)


def throw_from_none() -> None:
    try:
        raise KeyError("inner")
    except KeyError:
        raise ValueError("outer") from None


def throw_from_lock() -> None:
    try:
        raise HoldsLock("inner")
    except HoldsLock as error:
        raise ValueError("outer") from error


def throw_circle() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    raise first


def throw_long_chain() -> None:
    error: Exception | None = None
    for number in range(500):
        made = ValueError(number)
        made.__cause__ = error
        error = made
    assert error is not None
    raise error


def throw_with_notes() -> None:
    error = ValueError("text")
    error.__notes__ = ["first", "second"]  # type: ignore[attr-defined]
    raise error


@pytest.fixture(scope="module", autouse=True)
def _runtime() -> Iterator[None]:
    poolray.shutdown()
    poolray.init(num_cpus=2)
    yield
    poolray.shutdown()


@pytest.fixture(scope="module")
def pool(_runtime: None) -> Iterator[Pool]:
    with Pool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def executor(_runtime: None) -> Iterator[Executor]:
    with Executor(1) as executor:
        yield executor


def error_of_task(function: Any, *args: Any) -> poolray.exceptions.TaskError:
    with pytest.raises(poolray.exceptions.TaskError) as caught:
        poolray.get(poolray.remote(function).remote(*args), timeout=DEADLINE_S)
    return caught.value


def errors_of_calls(pool: Pool, executor: Executor, function: Any, *args: Any) -> list[Any]:
    """What a Pool and an Executor raise."""
    found: list[Any] = []
    for ask in (
        lambda: pool.apply_async(function, args).get(DEADLINE_S),
        lambda: executor.submit(function, *args).result(DEADLINE_S),
    ):
        with pytest.raises(BaseException) as caught:
            ask()
        found.append(caught.value)
    return found


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        (NeedsArguments, (1, "b"), {"code": 3}),
        (KeywordsOnly, (), {"code": 4}),
        (OSError, (2, "No such file", "name"), {}),
        (UnicodeDecodeError, ("utf8", b"\xff", 0, 1, "invalid"), {}),
        (StopIteration, (5,), {}),
        (ValueError, ("x" * 500_000,), {}),
        (ValueError, (), {}),
    ],
)
def test_class_arguments_and_attributes_arrive(
    kind: type[Exception],
    args: tuple[Any, ...],
    options: dict[str, Any],
    pool: Pool,
    executor: Executor,
) -> None:
    error = kind(*args, **options)
    raised = error_of_task(throw, kind, args, options)
    for arrived in (raised.cause, *errors_of_calls(pool, executor, throw, kind, args, options)):
        assert type(arrived) is type(error)
        assert arrived.args == error.args
        for name, value in vars(error).items():
            assert getattr(arrived, name) == value
    assert isinstance(raised, kind)


def test_an_attribute_that_cannot_travel_is_left_out() -> None:
    error = error_of_task(throw_lock)
    assert isinstance(error, HoldsLock)
    assert error.cause.args == ("text",)
    assert vars(error.cause) == {"kept": 5}


def test_an_argument_that_cannot_travel_arrives_as_its_text() -> None:
    error = error_of_task(throw_lock_as_argument)
    assert isinstance(error, ValueError)
    text, lock = error.cause.args
    assert text == "text"
    assert "_thread.lock" in lock


@pytest.mark.parametrize("kind", [RefusesToPickle, RefusesToLoad, HasNoText])
def test_an_exception_that_cannot_pickle_itself_arrives(kind: type[Exception]) -> None:
    error = error_of_task(throw_refused, kind)
    assert isinstance(error, kind)
    assert error.cause.args == ("text",)


def test_the_cause_arrives(pool: Pool, executor: Executor) -> None:
    error = error_of_task(throw_from).cause
    assert isinstance(error.__cause__, NeedsArguments)
    assert (error.__cause__.first, error.__cause__.code) == (1, 1)
    assert error.__context__ is error.__cause__
    # In a Pool and an Executor the text of the remote traceback is the cause, as in the standard
    # library; what it was raised from is the context.
    for arrived in errors_of_calls(pool, executor, throw_from):
        assert type(arrived.__cause__).__name__.endswith("RemoteTraceback")
        assert isinstance(arrived.__context__, NeedsArguments)


def test_the_context_arrives(pool: Pool, executor: Executor) -> None:
    error = error_of_task(throw_while_handling).cause
    assert error.__cause__ is None
    assert not error.__suppress_context__
    for arrived in (error, *errors_of_calls(pool, executor, throw_while_handling)):
        assert isinstance(arrived.__context__, KeyError)
    printed = "".join(traceback.format_exception(error))
    assert "During handling of the above exception" in printed


def test_a_context_that_was_hidden_stays_hidden() -> None:
    error = error_of_task(throw_from_none).cause
    assert error.__suppress_context__
    assert isinstance(error.__context__, KeyError)


def test_a_cause_that_cannot_pickle_arrives() -> None:
    error = error_of_task(throw_from_lock).cause
    assert isinstance(error.__cause__, HoldsLock)
    assert error.__cause__.kept == 5


def test_a_chain_in_a_circle_arrives() -> None:
    error = error_of_task(throw_circle).cause
    assert isinstance(error.__context__, KeyError)
    assert error.__context__.__context__ is error


def test_of_a_chain_without_end_the_newest_arrive() -> None:
    error: BaseException | None = error_of_task(throw_long_chain).cause
    numbers = []
    while error is not None:
        numbers.append(error.args[0])
        error = error.__cause__
    assert numbers == list(range(499, 499 - len(numbers), -1))
    assert len(numbers) == 64


def test_the_chain_passes_through_a_dependent_task() -> None:
    @poolray.remote
    def never(value: object) -> None:
        raise AssertionError("its argument has failed")

    with pytest.raises(ValueError, match="outer") as caught:
        poolray.get(never.remote(poolray.remote(throw_from).remote()), timeout=DEADLINE_S)
    assert isinstance(caught.value.cause.__cause__, NeedsArguments)  # type: ignore[attr-defined]


def test_notes_arrive(pool: Pool, executor: Executor) -> None:
    error = error_of_task(throw_with_notes).cause
    for arrived in (error, *errors_of_calls(pool, executor, throw_with_notes)):
        assert arrived.__notes__ == ["first", "second"]


@needs_groups
def test_a_group_arrives_with_its_members(pool: Pool, executor: Executor) -> None:
    def throw_group() -> None:
        inner = ExceptionGroup("inner", [KeyError("k"), NeedsArguments(1, 2)])
        inner.exceptions[0].__cause__ = OSError("why")
        raise ExceptionGroup("outer", [ValueError(1), inner])

    raised = error_of_task(throw_group)
    assert isinstance(raised, ExceptionGroup)
    for arrived in (raised.cause, *errors_of_calls(pool, executor, throw_group)):
        number, inner = arrived.exceptions
        assert number.args == (1,)
        key, arguments = inner.exceptions
        assert (arguments.first, arguments.second) == (1, 2)
        assert isinstance(key.__cause__, OSError)


@needs_groups
def test_a_group_with_a_member_that_cannot_pickle_arrives() -> None:
    def throw_group() -> None:
        raise ExceptionGroup("group", [HoldsLock("member"), ValueError(2)])

    error = error_of_task(throw_group).cause
    assert isinstance(error, ExceptionGroup)
    member, number = error.exceptions
    assert isinstance(member, HoldsLock)
    assert member.kept == 5
    assert number.args == (2,)


@needs_groups
def test_except_star_splits_what_a_task_raises() -> None:
    def throw_group() -> None:
        raise ExceptionGroup("group", [ValueError(1), KeyError(2)])

    error = error_of_task(throw_group)
    assert isinstance(error, ExceptionGroup)
    matched, rest = error.split(ValueError)
    assert matched is not None
    assert rest is not None
    assert len(matched.exceptions) == len(rest.exceptions) == 1
