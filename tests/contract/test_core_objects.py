"""Values on their way: arrays in shared memory, identity, types, refs that travel or die."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import gc
import math
import operator
import pathlib
import pickle
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_implementation import better_than_reference, gate_at, get, ray, start_runtime
from executor_support import Gate

SMALL = 5
# Well over the size up to which values travel inside messages.
LARGE = 1_000_000


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
def call(function: Any, *args: Any) -> Any:
    return function(*args)


# --- arrays ------------------------------------------------------------------------------------


def describe(array: np.ndarray) -> tuple[Any, ...]:
    return array.flags.writeable, array.flags.owndata, array.dtype, array.shape, array.sum()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_array_is_read_only_wherever_it_arrives(size: int) -> None:
    array = np.arange(size)
    expected = (False, False, array.dtype, array.shape, array.sum())
    assert get(call.remote(describe, array)) == expected
    assert get(call.remote(describe, ray.put(array))) == expected
    assert describe(get(ray.put(array))) == expected
    assert describe(get(ray.put({"inside": [array]}))["inside"][0]) == expected
    assert describe(get(call.remote(np.arange, size))) == expected
    assert array.flags.writeable


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_writing_into_an_argument_fails_the_task(size: int) -> None:
    with pytest.raises(ValueError, match="read-only"):
        get(call.remote(operator.setitem, np.zeros(size), 0, 1.0))


def test_gets_of_one_array_share_its_memory() -> None:
    ref = ray.put(np.arange(LARGE))
    first, second = get(ref), get(ref)
    assert first is not second
    assert np.shares_memory(first, second)


def test_put_is_a_snapshot() -> None:
    array = np.zeros(LARGE)
    ref = ray.put(array)
    array[0] = 1
    assert get(ref)[0] == 0


def test_a_view_outlives_its_ref() -> None:
    view = get(ray.put(np.arange(LARGE)))[-1:]
    gc.collect()
    # Whatever might be given the range if it were free.
    others = [ray.put(np.zeros(LARGE)) for _ in range(5)]
    assert view[0] == LARGE - 1
    del others


ARRAYS: dict[str, Any] = {
    "0-d": np.array(3),
    "empty": np.zeros((0, 3)),
    "fortran": np.asfortranarray(np.arange(200_000).reshape(400, 500)),
    "strided": np.arange(200_000)[::2],
    "reversed": np.arange(200_000)[::-1],
    "text": np.array(["text", "of", "width"]),
    "records": np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
    "objects": np.array([1, "a", None], dtype=object),
    "masked": np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]),
    "dates": np.array(["2024-01-01"], dtype="datetime64[D]"),
    "scalar": np.float32(1.5),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_kind_arrive(kind: str) -> None:
    array = ARRAYS[kind]
    for arrived in (get(ray.put(array)), get(echo.remote(array))):
        assert type(arrived) is type(array)
        assert arrived.dtype == array.dtype
        assert arrived.shape == array.shape
        assert repr(arrived) == repr(array)


def test_an_array_keeps_its_order_in_memory() -> None:
    array = get(ray.put(np.asfortranarray(np.ones((300, 400)))))
    assert array.flags.f_contiguous
    assert not array.flags.c_contiguous


# --- identity ----------------------------------------------------------------------------------


def test_an_array_that_occurs_twice_in_an_object_is_one_array() -> None:
    array = np.arange(LARGE)
    arrived = get(ray.put([array] * 3))
    assert arrived[0] is arrived[1] is arrived[2]


def test_an_object_may_contain_itself() -> None:
    circle: list[Any] = []
    circle.append(circle)
    arrived = get(echo.remote(circle))
    assert arrived[0] is arrived


@better_than_reference("it packs plain containers without a memory of what it has seen")
def test_identity_inside_an_object_is_kept() -> None:
    arrived = get(echo.remote([[0]] * 5))
    assert all(item is arrived[0] for item in arrived)


def test_each_get_and_each_argument_is_a_copy() -> None:
    ref = ray.put([1])
    assert get(ref) is not get(ref)
    # Two arguments that are one object to the caller are two in the reference, which pickles them
    # one by one; whether they are stays open.
    assert get(call.remote(operator.is_, ref, ref)) is False


# --- types -------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


Point = collections.namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Record:
    name: str
    parts: tuple[int, ...] = ()


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        10**100,
        -1.5,
        math.inf,
        1 + 2j,
        "text",
        "\N{SNOWMAN}" * 100_000,
        b"bytes",
        b"x" * 200_000,
        (1, (2,)),
        {1, 2},
        frozenset({1}),
        {"a": {"b": [1, 2, (3,)]}},
        {(1, 2): 3, None: 4},
        range(3),
        slice(1, 2),
        ...,
        NotImplemented,
        len,
        int,
        decimal.Decimal("1.10"),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
        pathlib.PurePosixPath("/a/b"),
        re.compile("a+", re.I),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=3),
        types.SimpleNamespace(a=1),
        Colour.RED,
        Number.ONE,
        Point(1, 2),
        Record("name", (1, 2)),
        Text("subclass"),
        math,
    ],
    ids=lambda value: f"{type(value).__name__} {value!r:.20}",
)
def test_values_arrive_as_what_they_are(value: Any) -> None:
    for arrived in (get(ray.put(value)), get(echo.remote(value))):
        assert arrived == value
        assert type(arrived) is type(value)


def test_functions_and_classes_are_values() -> None:
    def closure(x: int, offset: int = LARGE) -> int:
        return x + offset

    assert get(ray.put(closure))(1) == LARGE + 1
    assert get(ray.put(lambda x: x * 2))(4) == 8
    assert get(ray.put(Record)) is Record


@better_than_reference("it becomes bytes")
@pytest.mark.parametrize("size", [3, 200_000])
def test_a_bytearray_stays_one(size: int) -> None:
    arrived = get(echo.remote(bytearray(size)))
    assert type(arrived) is bytearray
    assert arrived == bytearray(size)
    arrived[0] = 1


def test_an_exception_that_is_returned_is_a_value() -> None:
    arrived = get(echo.remote(ValueError("just a value")))
    assert type(arrived) is ValueError
    assert arrived.args == ("just a value",)


def test_pickle_methods_of_a_class_are_used() -> None:
    class Counted:
        def __init__(self, count: int) -> None:
            self.count = count

        def __reduce__(self) -> Any:
            return Counted, (self.count + 1,)

    # Once on its way there and once on its way back.
    assert get(echo.remote(Counted(0))).count == 2


class RefusesToUnpickle:
    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_a_value_that_cannot_be_loaded_is_an_error_of_get() -> None:
    for ref in (ray.put(RefusesToUnpickle()), call.remote(RefusesToUnpickle)):
        with pytest.raises(ray.exceptions.RayError, match="not a number"):
            get(ref)


# --- refs that travel --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_task_may_return_a_ref(size: int) -> None:
    inner = get(call.remote(lambda: ray.put(np.ones(size))))
    assert isinstance(inner, ray.ObjectRef)
    assert get(inner).sum() == size


def test_a_task_may_return_the_ref_of_a_task_that_still_runs(gate: Gate) -> None:
    def start(gate: Gate) -> Any:
        return call.remote(lambda: gate.wait() or "finished later")

    inner = get(call.remote(start, gate))
    assert ray.wait([inner], timeout=0) == ([], [inner])
    gate.open()
    assert get(inner) == "finished later"


def test_a_task_may_return_refs_inside_anything() -> None:
    refs = get(call.remote(lambda: {"refs": [ray.put(i) for i in range(3)]}))["refs"]
    assert get(refs) == [0, 1, 2]


def test_a_ref_passes_through_several_tasks() -> None:
    array = ray.put(np.arange(LARGE))
    boxed: Any = [array]
    for _ in range(4):
        boxed = get(echo.remote(boxed))
    assert boxed == [array]
    assert get(boxed[0])[-1] == LARGE - 1


def test_a_ref_inside_an_object_keeps_its_object() -> None:
    outer = ray.put([ray.put(np.arange(LARGE))])
    gc.collect()
    inner = get(outer)[0]
    del outer
    gc.collect()
    assert get(inner)[-1] == LARGE - 1


def test_a_ref_inside_a_ref_inside_a_ref() -> None:
    ref = ray.put("bottom")
    for _ in range(5):
        ref = ray.put([ref])
    for _ in range(5):
        (ref,) = get(ref)
    assert get(ref) == "bottom"


def test_refs_may_sit_in_keys_sets_and_objects() -> None:
    ref = ray.put(1)
    arrived = get(echo.remote({ref: {ref}, "record": Record("holder", (ref,))}))
    assert list(arrived) == [ref, "record"]
    assert arrived[ref] == {ref}
    assert get(arrived["record"].parts[0]) == 1


def test_a_closure_may_hold_a_ref() -> None:
    def make() -> Any:
        ref = ray.put(np.arange(LARGE))
        return ray.remote(lambda: int(ray.get(ref)[-1]))

    last = make()
    gc.collect()
    assert get([last.remote(), last.remote()]) == [LARGE - 1, LARGE - 1]


@better_than_reference("plain pickle leaves out who owns the object, and get hangs", run=False)
def test_a_pickled_ref_is_usable_in_a_task() -> None:
    ref = ray.put("sent by hand")
    pickled = pickle.dumps(ref)
    assert get(call.remote(lambda: ray.get(pickle.loads(pickled)))) == "sent by hand"


# --- refs that die -----------------------------------------------------------------------------


def test_refs_that_are_dropped_early_disturb_nobody(gate: Gate) -> None:
    argument = ray.put(np.arange(LARGE))

    @ray.remote
    def last(gate: Gate, array: np.ndarray) -> int:
        gate.wait()
        return int(array[-1])

    # The argument's ref goes before the task has run, some results' refs before they are there.
    kept = last.remote(gate, argument)
    for _ in range(3):
        last.remote(gate, argument)
    del argument
    gc.collect()
    gate.open(4)
    assert get(kept) == LARGE - 1


def test_the_middle_of_a_chain_may_be_dropped() -> None:
    ref = ray.put(np.zeros(LARGE))
    for _ in range(10):
        ref = call.remote(lambda array: array + 1, ref)
    gc.collect()
    assert get(ref)[0] == 10


def test_many_objects_that_are_dropped_make_room_for_more() -> None:
    # Over 3 GB in all, of which 16 MB are alive at any time.
    for i in range(400):
        array = np.full(LARGE, i)
        assert get(ray.put(array))[0] == i


def test_a_task_without_anybody_to_look_at_its_result_still_runs(gate: Gate) -> None:
    def announce(gate: Gate) -> None:
        gate.open()

    call.remote(announce, gate)
    gc.collect()
    gate.wait()
