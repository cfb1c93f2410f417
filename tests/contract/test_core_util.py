"""Serializers that users register, and the search for what cannot be serialized."""

from __future__ import annotations

import functools
import inspect
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import IS_REFERENCE, better_than_reference, get, ray, start_runtime


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


class Account:
    """Cannot be pickled."""

    def __init__(self, balance: int) -> None:
        self.balance = balance
        self.lock = threading.Lock()


class SavingsAccount(Account):
    pass


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def balance_of(account: Any) -> Any:
    return account.balance


@pytest.fixture
def registered() -> Iterator[None]:
    ray.util.register_serializer(
        Account, serializer=lambda account: account.balance, deserializer=lambda b: Account(b)
    )
    yield
    ray.util.deregister_serializer(Account)


# --- register_serializer -------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_a_registered_class_travels_by_its_serializer() -> None:
    assert get(ray.put(Account(3))).balance == 3
    assert get(balance_of.remote(Account(4))) == 4
    assert get(balance_of.remote(ray.put(Account(5)))) == 5
    assert [a.balance for a in get(ray.put([Account(1), Account(2)]))] == [1, 2]


@pytest.mark.usefixtures("registered")
@better_than_reference("a worker knows nothing of the driver's registrations")
def test_a_worker_that_was_given_a_value_can_give_it_back() -> None:
    assert get(echo.remote({"account": Account(5)}))["account"].balance == 5


@pytest.mark.usefixtures("registered")
def test_a_subclass_is_not_registered() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        ray.put(SavingsAccount(1))


def test_without_its_registration_the_class_does_not_travel() -> None:
    ray.util.register_serializer(Account, serializer=vars, deserializer=Account)
    ray.util.deregister_serializer(Account)
    ray.util.deregister_serializer(Account)
    with pytest.raises(TypeError, match="cannot pickle"):
        ray.put(Account(1))


@pytest.mark.usefixtures("registered")
def test_a_second_registration_replaces_the_first() -> None:
    ray.util.register_serializer(
        Account, serializer=lambda account: -account.balance, deserializer=lambda b: Account(b)
    )
    assert get(ray.put(Account(3))).balance == -3


@pytest.mark.usefixtures("registered")
def test_an_object_that_occurs_twice_is_one_object() -> None:
    account = Account(1)
    first, second = get(ray.put([account, account]))
    assert first is second


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(IS_REFERENCE, reason="its Pool is another matter")
def test_pools_and_executors_use_it_too() -> None:
    with ray.Pool(1) as pool, ray.Executor(1) as executor:
        assert pool.map_async(balance, [Account(2)]).get(40) == [2]
        assert pool.apply_async(same, (Account(3),)).get(40).balance == 3
        assert executor.submit(same, Account(4)).result(40).balance == 4


def same(value: Any) -> Any:
    return value


def balance(account: Account) -> int:
    return account.balance


@pytest.mark.skipif(IS_REFERENCE, reason="it cannot be told from a mistake there")
def test_a_serializer_that_cannot_travel_still_writes() -> None:
    lock = threading.Lock()

    def serialize(account: Account) -> int:
        with lock:
            return account.balance

    ray.util.register_serializer(Account, serializer=serialize, deserializer=Account)
    try:
        assert get(balance_of.remote(Account(6))) == 6
    finally:
        ray.util.deregister_serializer(Account)


@better_than_reference("it finds out when a value is written")
@pytest.mark.parametrize(
    "arguments",
    [
        (3, vars, Account),
        (Account, 3, Account),
        (Account, vars, "Account"),
    ],
)
def test_what_is_no_class_or_function_is_refused(arguments: tuple[Any, Any, Any]) -> None:
    cls, serializer, deserializer = arguments
    try:
        with pytest.raises(TypeError):
            ray.util.register_serializer(cls, serializer=serializer, deserializer=deserializer)
    finally:
        ray.util.deregister_serializer(cls)


def test_signatures_are_those_of_the_reference() -> None:
    def names(function: Any) -> list[tuple[str, Any, Any]]:
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    empty, keyword, plain = (
        inspect.Parameter.empty,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    assert names(ray.util.register_serializer) == [
        ("cls", plain, empty),
        ("serializer", keyword, empty),
        ("deserializer", keyword, empty),
    ]
    assert names(ray.util.deregister_serializer) == [("cls", plain, empty)]
    assert names(ray.util.inspect_serializability) == [
        ("base_obj", plain, empty),
        ("name", plain, None),
        ("depth", plain, 3),
        ("print_file", plain, None),
    ]


# --- inspect_serializability ---------------------------------------------------------------------


def failures_of(value: Any, **options: Any) -> tuple[bool, list[Any], str]:
    """The answer, the failures by path, and what was printed."""
    stream = io.StringIO()
    good, failures = ray.util.inspect_serializability(value, print_file=stream, **options)
    assert isinstance(failures, set)
    return good, sorted(failures, key=lambda failure: failure.path), stream.getvalue()


def test_a_value_that_can_travel() -> None:
    good, failures, printed = failures_of([1, {"a": 2}])
    assert (good, failures) == (True, [])
    assert "Checking Serializability of [1, {'a': 2}]" in printed


GLOBAL_LOCK = threading.Lock()


def test_a_variable_of_a_function_is_found() -> None:
    lock = threading.Lock()

    def function() -> Any:
        return lock

    good, (failure,), printed = failures_of(function, name="function")
    assert not good
    assert failure.obj is lock
    assert failure.parent is function
    assert failure.path == ("function", "lock")
    assert "FailTuple(lock [path=function -> lock" in repr(failure)
    assert "serialization: cannot pickle '_thread.lock' object" in printed
    assert repr(failure) in printed


def test_an_attribute_is_found() -> None:
    account = Account(1)
    _, (failure,), _ = failures_of(account)
    assert failure.obj is account.lock
    assert failure.path == ("lock",)
    assert failure.parent is account


def test_depth_limits_the_search() -> None:
    account = Account(1)
    _, (failure,), _ = failures_of(account, depth=0)
    assert failure.obj is account


@pytest.mark.skipif(IS_REFERENCE, reason="it does not look into these")
def test_every_part_that_fails_is_found_wherever_it_is() -> None:
    first, second = threading.Lock(), threading.RLock()

    class Slotted:
        __slots__ = ("hidden",)

        def method(self) -> None:
            pass

    slotted = Slotted()
    slotted.hidden = second
    good, failures, _ = failures_of(
        [{"key": (1, first)}, functools.partial(print, slotted.method)], depth=10
    )
    assert not good
    assert [failure.path for failure in failures] == [
        ("[0]", "['key']", "[1]"),
        ("[1]", "argument 0", "__self__", "hidden"),
    ]
    assert [failure.obj for failure in failures] == [first, second]


@pytest.mark.skipif(IS_REFERENCE, reason="it does not end")
def test_a_value_that_contains_itself_is_searched_once() -> None:
    circle: list[Any] = [GLOBAL_LOCK, GLOBAL_LOCK]
    circle.append(circle)
    _, (failure,), _ = failures_of(circle, depth=100)
    assert failure.obj is GLOBAL_LOCK


@pytest.mark.skipif(IS_REFERENCE, reason="it pins such objects for good")
def test_refs_can_travel() -> None:
    assert failures_of({"ref": ray.put(1)})[:2] == (True, [])


@pytest.mark.skipif(IS_REFERENCE, reason="it raises what the repr raises")
def test_what_has_no_repr_is_searched_all_the_same() -> None:
    class Silent:
        def __init__(self) -> None:
            self.lock = GLOBAL_LOCK

        def __repr__(self) -> str:
            raise RuntimeError("silent")

    good, failures, printed = failures_of(Silent())
    assert not good
    assert GLOBAL_LOCK in [failure.obj for failure in failures]
    assert "whose repr raises RuntimeError" in printed


# --- large functions -----------------------------------------------------------------------------


@ray.remote
def ask(function: Any) -> int:
    return len(function())


@pytest.mark.skipif(IS_REFERENCE, reason="it looks at the functions of tasks only")
def test_a_function_that_captures_much_earns_a_warning_on_the_line_of_its_use() -> None:
    captured = bytes(2 << 20)

    @ray.remote
    def task() -> int:
        return len(captured)

    with pytest.warns(UserWarning, match=r"function .*task is large \(2\.0 MiB\)") as caught:
        assert get(task.remote()) == 2 << 20
    assert caught[0].filename == __file__

    def argument() -> bytes:
        return captured

    for send in (
        lambda: ask.remote(argument),
        lambda: ask.remote(function=functools.partial(argument)),
    ):
        with pytest.warns(UserWarning, match=r"\(argument (0|function) of .*ask\) is large") as got:
            assert get(send()) == 2 << 20
        assert got[0].filename == __file__


@pytest.mark.skipif(IS_REFERENCE, reason="it looks at the functions of tasks only")
def test_an_argument_that_captures_too_much_is_an_error() -> None:
    ray.shutdown()
    ray.init(num_cpus=1, function_max_bytes=1 << 21)
    try:
        captured = bytes(3 << 20)
        with pytest.raises(ValueError, match=r"argument 0 of .*ask\) is too large \(3 MiB > 2 MiB"):
            ask.remote(lambda: captured)
        ref = ray.put(captured)
        assert get(ask.remote(lambda: ray.get(ref))) == 3 << 20
    finally:
        ray.shutdown()


# --- results as they come ------------------------------------------------------------------------


@ray.remote
def after(seconds: float, fails: bool = False) -> float:
    time.sleep(seconds)
    if fails:
        raise ValueError("no")
    return seconds


def test_results_are_given_as_they_come() -> None:
    refs = [after.remote(seconds) for seconds in (0.5, 0.0)]
    assert list(ray.util.as_completed(refs, chunk_size=1)) == [0.0, 0.5]
    assert list(ray.util.as_completed(refs)) == [0.5, 0.0]
    ready = ray.util.as_completed(refs, chunk_size=1, yield_obj_refs=True)
    assert sorted(refs.index(ref) for ref in ready) == [0, 1]
    assert list(ray.util.as_completed([])) == []


def test_no_more_calls_are_under_way_than_said() -> None:
    started = []

    def numbers() -> Iterator[float]:
        for number in range(6):
            started.append(number)
            yield 0.0

    results = ray.util.map_unordered(after, numbers(), backpressure_size=2, chunk_size=1)
    assert next(results) == 0.0
    assert len(started) == 2
    assert list(results) == [0.0] * 5


def test_what_a_call_raised_ends_the_iteration() -> None:
    with pytest.raises(ValueError, match="no"):
        list(ray.util.as_completed([after.remote(0.0, fails=True)]))


@pytest.mark.parametrize(
    "options", [{"chunk_size": 0}, {"num_returns": 2}, {"backpressure_size": 0}], ids=repr
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        list(ray.util.map_unordered(after, [0.0], **options))


def test_something_is_said_once() -> None:
    assert [ray.util.log_once("said here") for _ in range(3)] == [True, False, False]
    assert ray.util.log_once("said there")


def test_the_nodes_address_is_that_of_its_row() -> None:
    (node,) = ray.nodes()
    assert ray.util.get_node_ip_address() == node["NodeManagerAddress"]
