"""Remote functions: making them, their options, what goes in, how many refs come out."""

from __future__ import annotations

import enum
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import (
    DEADLINE_S,
    better_than_reference,
    gate_at,
    get,
    ray,
    start_runtime,
)
from executor_support import Gate


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


def add(a: int, b: int = 10) -> int:
    return a + b


remote_add = ray.remote(add)


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Callable:
    def __call__(self) -> int:
        return 1

    def method(self) -> int:
        return 2


# --- the decorator -----------------------------------------------------------------------------


def test_remote_decorates_bare_with_options_and_as_a_call() -> None:
    @ray.remote
    def bare() -> str:
        return "bare"

    @ray.remote(num_cpus=0.5, max_retries=0)
    def with_options() -> str:
        return "options"

    assert get([bare.remote(), with_options.remote()]) == ["bare", "options"]
    assert get(ray.remote(lambda: "lambda").remote()) == "lambda"
    assert get(ray.remote(num_cpus=2)(add).remote(1)) == 11


@pytest.mark.parametrize(
    "args",
    [(), (3,), ("text",), (None,), (add, add)],
    ids=["nothing", "int", "str", "None", "two functions"],
)
def test_remote_takes_one_function_or_only_options(args: tuple[Any, ...]) -> None:
    # The reference asserts, also for `@ray.remote()`; an ordinary `TypeError` is as good.
    with pytest.raises((AssertionError, TypeError), match=r"remote.*decorator|@ray\.remote"):
        ray.remote(*args)


def test_a_function_and_options_in_one_call_are_refused() -> None:
    with pytest.raises((AssertionError, TypeError), match=r"remote.*decorator|@ray\.remote"):
        ray.remote(add, num_cpus=1)


@pytest.mark.parametrize(
    "thing",
    [len, functools.partial(add, 1), Callable().method, Callable(), remote_add],
    ids=["builtin", "partial", "bound method", "callable object", "remote function"],
)
def test_only_plain_functions_and_classes_become_remote(thing: Any) -> None:
    with pytest.raises(TypeError, match="function or a class"):
        ray.remote(thing)


def test_a_coroutine_function_is_refused_and_told_the_way() -> None:
    async def coroutine() -> int:
        return 1

    with pytest.raises(ValueError, match=r"async.*asyncio\.run"):
        ray.remote(coroutine)


def test_a_remote_function_cannot_be_called_like_a_local_one() -> None:
    with pytest.raises(TypeError, match=r"called directly.*add.*\.remote\(\)"):
        remote_add(1)
    with pytest.raises(TypeError, match=r"not callable|called directly"):
        remote_add.options(num_cpus=1)(1)


def test_the_original_function_stays_within_reach() -> None:
    # Unit tests of user code call the plain function this way, without a runtime.
    assert remote_add._function is add


def test_a_method_taken_from_its_class_is_a_plain_function() -> None:
    assert get(ray.remote(Callable.method).remote(Callable())) == 2


# --- options -----------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str | None]] = [
    ({"no_such_option": 1}, ValueError, "no_such_option.*num_cpus.*num_returns"),
    # Options of actors are unknown to functions.
    ({"max_restarts": 1}, ValueError, "max_restarts"),
    ({"max_task_retries": 1}, ValueError, "max_task_retries"),
    ({"max_concurrency": 2}, ValueError, "max_concurrency"),
    ({"lifetime": "detached"}, ValueError, "lifetime"),
    ({"num_cpus": -1}, ValueError, "num_cpus.*negative"),
    ({"num_cpus": "1"}, TypeError, "num_cpus.*str"),
    ({"num_cpus": 0.00001}, ValueError, r"num_cpus.*0\.0001"),
    ({"num_gpus": -1}, ValueError, "num_gpus.*negative"),
    ({"num_returns": -1}, ValueError, "num_returns"),
    ({"num_returns": 1.5}, TypeError, "num_returns.*float"),
    ({"num_returns": "two"}, TypeError, None),
    ({"num_returns": "streaming"}, ValueError, "streaming.*generator"),
    ({"max_retries": -2}, ValueError, "max_retries.*-1"),
    ({"max_retries": 1.5}, TypeError, "max_retries.*float"),
    ({"retry_exceptions": 1}, TypeError, "retry_exceptions.*int"),
    ({"retry_exceptions": None}, TypeError, "retry_exceptions.*NoneType"),
    ({"retry_exceptions": ValueError}, TypeError, "retry_exceptions.*type"),
    ({"retry_exceptions": [1]}, ValueError, "retry_exceptions.*exceptions"),
    ({"retry_exceptions": [KeyboardInterrupt]}, ValueError, "retry_exceptions.*exceptions"),
    ({"name": 1}, TypeError, "name.*int"),
    ({"max_calls": -1}, ValueError, "max_calls"),
    ({"max_calls": 1.5}, TypeError, "max_calls.*float"),
    ({"resources": 3}, TypeError, "resources.*int"),
    ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
    ({"resources": {"GPU": 1}}, ValueError, "num_gpus"),
    ({"resources": {"token": -1}}, ValueError, "token.*negative"),
    ({"resources": {"token": 0.00001}}, ValueError, r"token.*0\.0001"),
    ({"resources": {"token": "1"}}, TypeError, None),
    ({"memory": -1}, ValueError, "memory.*negative"),
    ({"memory": "1"}, TypeError, "memory.*str"),
    ({"object_store_memory": 1}, ValueError, "object_store_memory"),
    ({"runtime_env": 3}, TypeError, "runtime_env.*int"),
    ({"scheduling_strategy": 3}, TypeError, "scheduling_strategy.*int"),
    ({"accelerator_type": 1}, TypeError, "accelerator_type.*int"),
    ({"label_selector": 3}, TypeError, "label_selector.*int"),
    ({"label_selector": {1: "a"}}, TypeError, None),
    ({"fallback_strategy": [{}]}, ValueError, "[Ee]mpty"),
    ({"placement_group": 3}, TypeError, None),
    ({"enable_task_events": 3}, TypeError, "enable_task_events.*int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=repr)
def test_a_bad_option_is_refused_where_it_is_written(
    options: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        ray.remote(**options)(add)
    with pytest.raises(error, match=message):
        remote_add.options(**options)


def test_max_calls_belongs_to_the_definition() -> None:
    with pytest.raises(ValueError, match=r"max_calls.*options"):
        remote_add.options(max_calls=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheduling_strategy": "NEAREST"}, ValueError, "NEAREST.*DEFAULT.*SPREAD"),
        ({"num_gpus": 1.5}, ValueError, "whole number"),
        ({"resources": {"memory": 1}}, ValueError, "must not contain the key 'memory'"),
        ({"resources": {"object_store_memory": 1}}, ValueError, "object_store_memory"),
        ({"resources": {"bundle": 1}}, ValueError, "reserved"),
    ],
    ids=repr,
)
def test_some_bad_values_are_refused_only_at_the_call(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    function = remote_add.options(**options)
    # The reference's error for GPUs has two arguments, which its text shows with a comma between.
    with pytest.raises(error, match=message):
        function.remote(1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_cpus": 0},
        {"num_cpus": 0.5},
        {"num_cpus": 2},
        {"num_cpus": True},
        {"num_cpus": 1 / 3},
        {"num_cpus": 0.12345},
        {"num_cpus": None},
        {"num_gpus": 0},
        {"num_gpus": None},
        {"num_returns": 1},
        {"num_returns": None},
        {"num_returns": True},
        {"max_retries": 0},
        {"max_retries": True},
        {"max_retries": -1},
        {"retry_exceptions": True},
        {"retry_exceptions": False},
        {"retry_exceptions": []},
        {"retry_exceptions": [ValueError, KeyError]},
        {"retry_exceptions": (ValueError,)},
        {"name": "a name"},
        {"name": ""},
        {"name": None},
        {"resources": {}},
        {"resources": None},
        {"memory": 0},
        {"memory": 1024},
        {"runtime_env": {}},
        {"runtime_env": None},
        {"scheduling_strategy": "DEFAULT"},
        {"scheduling_strategy": "SPREAD"},
        {"scheduling_strategy": None},
        {"accelerator_type": None},
        {"label_selector": None},
        {"enable_task_events": False},
        {"num_cpus": 1, "max_retries": 1, "name": "several"},
        {},
    ],
    ids=repr,
)
def test_a_good_option_is_accepted(options: dict[str, Any]) -> None:
    assert get(remote_add.options(**options).remote(1)) == 11
    if options:
        assert get(ray.remote(**options)(add).remote(2)) == 12


@pytest.mark.parametrize("max_calls", [0, 1])
def test_max_calls_is_accepted_by_the_decorator(max_calls: int) -> None:
    assert get(ray.remote(max_calls=max_calls)(add).remote(1)) == 11


@better_than_reference(
    "it accepts both, then fails to submit the one and kills its workers over the other"
)
@pytest.mark.parametrize("options", [{"max_retries": None}, {"max_calls": None}], ids=repr)
def test_none_means_the_default(options: dict[str, None]) -> None:
    assert get(ray.remote(**options)(add).remote(1)) == 11


class Text(str):
    """A string of a class of its own, as numpy's are."""

    __slots__ = ()


class Word(str, enum.Enum):
    STREAMING = "streaming"
    TWO = "2"


class Number(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    "options",
    [
        {"name": Text("named")},
        {"name": Word.TWO},
        {"resources": {Text("CPUs"): 0}},
        {"scheduling_strategy": Text("SPREAD")},
        {"label_selector": {Text("missing"): Text("!a")}},
        {"num_cpus": Number.TWO},
        {"max_retries": Number.TWO},
    ],
    ids=repr,
)
def test_options_may_be_of_classes_of_their_own(options: dict[str, Any]) -> None:
    assert get(remote_add.options(**options).remote(1)) == 11


def test_numbers_of_returns_may_be_of_classes_of_their_own() -> None:
    pair = ray.remote(num_returns=Number.TWO)(lambda: (1, 2))
    assert get(pair.remote()) == [1, 2]

    @ray.remote(num_returns=Word.STREAMING)
    def items() -> Iterator[int]:
        yield 1

    assert [get(ref) for ref in items.remote()] == [1]


def test_names_of_actors_and_groups_may_be_of_classes_of_their_own() -> None:
    @ray.remote(concurrency_groups={Text("io"): Number.TWO})
    class Named:
        @ray.method(concurrency_group=Text("io"))
        def ping(self) -> str:
            return "here"

    named = Named.options(name=Text("of its own"), namespace=Text("space"), max_restarts=True)
    named = named.remote()
    assert get(named.ping.options(name=Text("call")).remote()) == "here"
    assert ray.get_actor(Text("of its own"), namespace=Text("space")) == named
    group = ray.util.placement_group([{Text("CPU"): Number.TWO}], name=Text("group"))
    assert group.wait(DEADLINE_S)
    assert ray.util.get_placement_group(Text("group")) == group
    ray.util.remove_placement_group(group)


def test_options_change_one_use_and_not_the_function() -> None:
    @ray.remote(num_returns=2)
    def pair() -> tuple[int, int]:
        return 1, 2

    assert get(pair.options(num_returns=1).remote()) == (1, 2)
    assert get(pair.options(num_cpus=0).remote()) == [1, 2]
    assert get(pair.remote()) == [1, 2]


def test_a_prepared_use_can_be_called_many_times() -> None:
    cheap = remote_add.options(num_cpus=0.1)
    assert get([cheap.remote(i) for i in range(5)]) == [10, 11, 12, 13, 14]


# --- arguments ---------------------------------------------------------------------------------


@ray.remote
def every_kind(
    a: Any, /, b: Any, c: Any = "c", *rest: Any, d: Any, e: Any = "e", **more: Any
) -> Any:
    return a, b, c, rest, d, e, more


def test_arguments_of_every_kind_arrive() -> None:
    assert get(every_kind.remote(1, 2, d=3)) == (1, 2, "c", (), 3, "e", {})
    assert get(every_kind.remote(1, b=2, d=3, x=4)) == (1, 2, "c", (), 3, "e", {"x": 4})
    arrived = get(every_kind.remote(1, 2, 3, 4, 5, d=6, e=7, a=8))
    assert arrived == (1, 2, 3, (4, 5), 6, 7, {"a": 8})


def test_keywords_may_have_any_name() -> None:
    @ray.remote
    def names(**keywords: int) -> dict[str, int]:
        return keywords

    keywords = dict.fromkeys(
        ["self", "args", "kwargs", "function", "task", "name", "num_returns"], 1
    )
    assert get(names.remote(**keywords)) == keywords


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing.*'a'"),
        ((1, 2, 3), {}, "too many positional"),
        ((1,), {"c": 1}, "unexpected keyword.*'c'"),
        ((1,), {"a": 1}, "multiple values.*'a'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_the_caller(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        remote_add.remote(*args, **kwargs)


def test_a_positional_only_argument_is_no_keyword() -> None:
    @ray.remote
    def positional(a: int, /) -> int:
        return a

    with pytest.raises(TypeError, match="positional"):
        positional.remote(a=1)


def test_hundreds_of_arguments_arrive_in_order() -> None:
    @ray.remote
    def collect(*values: int) -> list[int]:
        return list(values)

    refs = [ray.put(i) if i % 2 else i for i in range(400)]
    assert get(collect.remote(*refs)) == list(range(400))


def test_refs_resolve_at_the_top_and_stay_refs_inside() -> None:
    @ray.remote
    def kinds(*args: Any, **kwargs: Any) -> list[str]:
        return [type(value).__name__ for value in (*args, *kwargs.values())]

    ref = ray.put(1)
    names = get(kinds.remote(ref, [ref], (ref,), {"key": ref}, top=ref, inside=[ref]))
    assert names == ["int", "list", "tuple", "dict", "int", "list"]

    inner = get(echo.remote({"deep": [(ref,)]}))["deep"][0][0]
    assert inner == ref
    assert get(inner) == 1


def test_one_ref_may_be_several_arguments() -> None:
    ref = ray.put(4)
    assert get(remote_add.remote(ref, ref)) == 8
    assert get(remote_add.remote(ref, b=ref)) == 8


def test_the_task_has_a_copy_of_its_arguments() -> None:
    @ray.remote
    def extend(values: list[int]) -> list[int]:
        values.append(99)
        return values

    values = [1]
    assert get(extend.remote(values)) == [1, 99]
    assert values == [1]
    stored = ray.put(values)
    assert get([extend.remote(stored), extend.remote(stored)]) == [[1, 99], [1, 99]]
    assert get(stored) == [1]


def test_arguments_are_read_when_the_task_is_submitted(tmp_path: Any) -> None:
    @ray.remote
    def when_opened(gate: Gate, values: list[int]) -> list[int]:
        gate.wait()
        return values

    values = [1]
    with gate_at(tmp_path / "gate") as gate:
        ref = when_opened.remote(gate, values)
        values.append(2)
    assert get(ref) == [1]


def test_an_argument_that_cannot_be_pickled_is_refused_by_the_caller() -> None:
    with pytest.raises(TypeError, match=r"(?s)serialize.*echo|pickle"):
        echo.remote(threading.Lock())
    with pytest.raises(TypeError, match=r"(?s)serialize|pickle"):
        remote_add.remote(1, b=[threading.Lock()])


class RefusesToPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class RefusesToUnpickle:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_an_error_of_the_arguments_own_pickling_reaches_the_caller_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="not today"):
        echo.remote(RefusesToPickle())


def test_an_argument_that_cannot_be_loaded_fails_the_task() -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="not a number"):
        get(echo.remote(RefusesToUnpickle()))


# --- returns -----------------------------------------------------------------------------------


def test_one_ref_comes_back_by_default_and_none_for_no_return() -> None:
    assert isinstance(echo.remote(1), ray.ObjectRef)
    assert isinstance(echo.options(num_returns=1).remote((1, 2)), ray.ObjectRef)
    assert echo.options(num_returns=0).remote(1) is None


def test_a_task_without_returns_runs(tmp_path: Any) -> None:
    @ray.remote(num_returns=0)
    def announce(gate: Gate) -> None:
        gate.open()

    with gate_at(tmp_path / "ran") as gate:
        assert announce.remote(gate) is None
        gate.wait()


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ((1, 2, 3), [1, 2, 3]),
        ([1, 2, 3], [1, 2, 3]),
        ("abc", ["a", "b", "c"]),
        ({"a": 1, "b": 2, "c": 3}, ["a", "b", "c"]),
        (range(3), [0, 1, 2]),
    ],
    ids=repr,
)
def test_several_returns_take_any_sized_iterable_apart(value: Any, parts: list[Any]) -> None:
    refs = echo.options(num_returns=3).remote(value)
    assert isinstance(refs, list)
    assert len(set(refs)) == 3
    assert get(refs) == parts
    assert get(refs[1]) == parts[1]


@pytest.mark.parametrize("value", [(), (1, 2), (1, 2, 3, 4)], ids=repr)
def test_the_wrong_number_of_returns_fails_every_ref(value: Any) -> None:
    for ref in echo.options(num_returns=3).remote(value):
        with pytest.raises(ValueError, match=f"returned {len(value)}.*num_returns=3"):
            get(ref)


@pytest.mark.parametrize("value", [5, None], ids=repr)
def test_one_value_for_several_returns_fails_every_ref(value: Any) -> None:
    for ref in echo.options(num_returns=2).remote(value):
        with pytest.raises(TypeError, match=type(value).__name__):
            get(ref)


def test_an_error_fails_every_ref_of_the_task() -> None:
    @ray.remote(num_returns=2)
    def fail() -> None:
        raise KeyError("both")

    for ref in fail.remote():
        with pytest.raises(KeyError, match="both"):
            get(ref)


@better_than_reference("it hands out the first item and loses the others")
def test_a_generator_object_is_no_value() -> None:
    @ray.remote
    def iterate() -> Any:
        return (i for i in range(3))

    with pytest.raises(TypeError, match=r"generator"):
        get(iterate.remote())


# --- functions ---------------------------------------------------------------------------------

SETTING = "at definition"


def test_a_function_is_captured_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    @ray.remote
    def setting() -> str:
        return SETTING

    monkeypatch.setitem(globals(), "SETTING", "at the first call")
    assert get(setting.remote()) == "at the first call"
    monkeypatch.setitem(globals(), "SETTING", "later")
    # Also for another use of it: the function is the same.
    assert get(setting.remote()) == "at the first call"
    assert get(setting.options(num_cpus=0).remote()) == "at the first call"


def test_a_closure_is_captured_at_its_first_call() -> None:
    seen = ["defined"]

    @ray.remote
    def closure() -> list[str]:
        return seen

    seen.append("called")
    assert get(closure.remote()) == ["defined", "called"]
    seen.append("called again")
    assert get(closure.remote()) == ["defined", "called"]


def test_each_definition_has_a_closure_of_its_own() -> None:
    def make(value: int) -> Any:
        @ray.remote
        def closure() -> int:
            return value

        return closure

    assert get([make(i).remote() for i in range(5)]) == [0, 1, 2, 3, 4]


COUNTER = 0


def test_globals_changed_in_a_task_stay_in_the_worker() -> None:
    @ray.remote
    def count() -> tuple[int, int]:
        global COUNTER
        COUNTER += 1
        return os.getpid(), COUNTER

    results = get([count.remote() for _ in range(20)])
    by_worker: dict[int, list[int]] = {}
    for worker, counted in results:
        by_worker.setdefault(worker, []).append(counted)
    # Workers live on from task to task, and each counts for itself.
    assert all(sorted(counts) == list(range(1, len(counts) + 1)) for counts in by_worker.values())
    assert COUNTER == 0


def test_functions_and_classes_of_every_origin_run() -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def doubled(self) -> int:
            return self.value * 2

    def outer(value: int) -> int:
        def inner() -> int:
            return Local(value).doubled()

        return inner()

    namespace: dict[str, Any] = {}
    exec("def made_by_exec(x): return x + 1", namespace)

    @functools.wraps(add)
    def wrapped(*args: int, **kwargs: int) -> int:
        return -add(*args, **kwargs)

    assert get(ray.remote(outer).remote(4)) == 8
    assert get(ray.remote(namespace["made_by_exec"]).remote(1)) == 2
    assert get(ray.remote(wrapped).remote(1)) == -11
    assert get(call.remote(lambda x: x * 3, 2)) == 6
    assert get(call.remote(functools.partial(add, 1), b=2)) == 3
    assert get(call.remote(len, "four")) == 4


def test_a_local_class_comes_back_as_the_same_class() -> None:
    class Local:
        pass

    assert type(get(echo.remote(Local()))) is Local
    assert get(echo.remote(Local)) is Local


@ray.remote
def factorial(n: int) -> int:
    return 1 if n <= 1 else n * ray.get(factorial.remote(n - 1))


@ray.remote
def is_even(n: int) -> bool:
    return n == 0 or ray.get(is_odd.remote(n - 1))


@ray.remote
def is_odd(n: int) -> bool:
    return n != 0 and ray.get(is_even.remote(n - 1))


def test_remote_functions_call_themselves_and_each_other() -> None:
    assert get(factorial.remote(6)) == 720
    assert get(is_even.remote(5)) is False


def test_a_remote_function_is_a_value() -> None:
    def submit(function: Any, *args: Any) -> Any:
        return ray.get(function.remote(*args))

    assert get(call.remote(submit, remote_add, 1)) == 11
    assert get(get(ray.put(remote_add)).remote(2)) == 12
    assert get(call.remote(lambda: submit(remote_add, 3))) == 13
    assert get(call.remote(submit, remote_add.options(num_cpus=0), 4)) == 14


def test_a_task_may_define_remote_functions() -> None:
    def define() -> int:
        @ray.remote
        def inner(x: int) -> int:
            return x + 1

        return sum(ray.get([inner.remote(i) for i in range(3)]))

    assert get(call.remote(define)) == 6


def test_a_function_that_cannot_be_pickled_is_refused_by_the_caller() -> None:
    lock = threading.Lock()

    @ray.remote
    def locked() -> bool:
        return lock.locked()

    with pytest.raises(TypeError, match=r"(?s)serialize.*locked|pickle"):
        locked.remote()


def test_a_function_may_capture_much_but_not_everything() -> None:
    def measure(size_bytes: int) -> Any:
        block = bytes(size_bytes)
        return ray.remote(lambda: len(block)).remote()

    assert get(measure(20_000_000)) == 20_000_000
    with pytest.raises(ValueError, match=r"too large.*put\(\)"):
        measure(110_000_000)


def test_what_cannot_run_here_waits() -> None:
    too_big = remote_add.options(num_cpus=100).remote(1)
    unknown = remote_add.options(resources={"no_such_resource": 1}).remote(1)
    ready, waiting = ray.wait([too_big, unknown], num_returns=2, timeout=0.2)
    assert (ready, waiting) == ([], [too_big, unknown])
    # They are in nobody's way.
    assert ray.get(remote_add.remote(1), timeout=DEADLINE_S) == 11
