"""Values of every kind on every way: put and get, tasks, Pool, Executor; there and back.

What arrives equals what was sent, is of the same type, and large data is not copied where its type
allows it. From `get` it is read-only, everywhere else it can be written to.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import gc
import operator
import pickle
import threading
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_implementation import IS_REFERENCE

import poolray
from poolray import Executor, Pool

pytestmark = pytest.mark.skipif(IS_REFERENCE, reason="also about Pool and Executor")

DEADLINE_S = 40.0
#: Elements of arrays that travel inside a message, inside it but beside its pickle, and not.
SMALL, MEDIUM, LARGE = 10, 6_000, 100_000


def same(value: Any) -> Any:
    return value


@poolray.remote
def echo(value: Any) -> Any:
    return value


@poolray.remote
def call(function: Any, *args: Any) -> Any:
    return function(*args)


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


def get(refs: Any, **options: Any) -> Any:
    return poolray.get(refs, timeout=DEADLINE_S, **options)


READ_ONLY_WAYS: dict[str, Callable[..., Any]] = {
    "put": lambda value, pool, executor: get(poolray.put(value)),
    "put in a list": lambda value, pool, executor: get([poolray.put([value])])[0][0],
    "task": lambda value, pool, executor: get(echo.remote(value)),
    "ref as argument": lambda value, pool, executor: get(echo.remote(poolray.put(value))),
}
WRITABLE_WAYS: dict[str, Callable[..., Any]] = {
    "writable get": lambda value, pool, executor: get(poolray.put(value), writable=True),
    "writable list": lambda value, pool, executor: get([echo.remote(value)], writable=True)[0],
    "apply": lambda value, pool, executor: pool.apply_async(same, (value,)).get(DEADLINE_S),
    "map": lambda value, pool, executor: pool.map_async(same, [value]).get(DEADLINE_S)[0],
    "submit": lambda value, pool, executor: executor.submit(same, value).result(DEADLINE_S),
}
WAYS = READ_ONLY_WAYS | WRITABLE_WAYS


# --- arrays --------------------------------------------------------------------------------------

RECORDS = np.dtype([("number", "i4"), ("day", "M8[D]")])

ARRAYS: dict[str, Callable[[int], Any]] = {
    "plain": lambda n: np.arange(n, dtype="f8"),
    "no dimensions": lambda n: np.array(b"x" * n),
    "fortran": lambda n: np.asfortranarray(np.arange(n * 2).reshape(2, n)),
    "other axes": lambda n: np.arange(n * 6).reshape(n, 2, 3).transpose(2, 0, 1),
    "with gaps": lambda n: np.arange(2 * n)[::2],
    "backwards": lambda n: np.arange(n)[::-1],
    "broadcast": lambda n: np.broadcast_to(np.arange(4.0), (n, 4)),
    "structured": lambda n: np.zeros(n, dtype=[("a", "i4"), ("b", "f8")]),
    "structured dates": lambda n: np.zeros(n, dtype=RECORDS),
    "records": lambda n: np.zeros(n, dtype=[("a", "i4"), ("b", "f8")]).view(np.recarray),
    "masked": lambda n: np.ma.masked_array(np.arange(n), mask=np.arange(n) % 3 == 0),
    "dates": lambda n: np.arange(n).astype("datetime64[s]"),
    "time spans in fortran order": lambda n: np.asfortranarray(
        np.arange(n * 2).reshape(2, n).astype("timedelta64[ms]")
    ),
    "other byte order": lambda n: np.arange(n, dtype=">i4"),
    "text": lambda n: np.array(["abc"] * n),
    "read-only": lambda n: np.frombuffer(b"x" * 8 * n, dtype="i8"),
}


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_arrives_as_it_was_on_every_way(
    kind: str, size: int, pool: Pool, executor: Executor
) -> None:
    value = ARRAYS[kind](size)
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        assert type(arrived) is type(value), way
        assert arrived.dtype == value.dtype, way
        assert arrived.shape == value.shape, way
        assert np.array_equal(arrived, value), way
        if type(value) is np.ma.MaskedArray:
            assert np.array_equal(arrived.mask, value.mask), way
            assert arrived.fill_value == value.fill_value, way


@pytest.mark.parametrize("kind", ARRAYS)
def test_large_arrays_are_not_copied(kind: str, pool: Pool, executor: Executor) -> None:
    value = ARRAYS[kind](LARGE)
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        if type(value) is np.ma.MaskedArray:
            arrived = arrived.data
        assert not arrived.flags.owndata, way
        assert arrived.flags.writeable == (way in WRITABLE_WAYS), way


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize("kind", ARRAYS)
def test_what_comes_from_a_pool_an_executor_or_a_writable_get_can_be_written_to(
    kind: str, size: int, pool: Pool, executor: Executor
) -> None:
    value = ARRAYS[kind](size)
    for way, send in WRITABLE_WAYS.items():
        arrived = send(value, pool, executor)
        arrived[...] = arrived[..., :1] if arrived.ndim else arrived
        assert arrived.flags.writeable, way


def clear(value: Any) -> Any:
    value[...] = 0
    return value.sum()


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
def test_arguments_of_a_pool_and_an_executor_can_be_written_to(
    size: int, pool: Pool, executor: Executor
) -> None:
    for value in (np.ones(size), get(poolray.put(np.ones(size)))):
        assert pool.apply_async(clear, (value,)).get(DEADLINE_S) == 0
        assert pool.map_async(clear, [value]).get(DEADLINE_S) == [0]
        assert executor.submit(clear, value).result(DEADLINE_S) == 0
        assert value.sum() == size, "the caller's own array is its own"


def test_what_one_reader_writes_no_other_sees() -> None:
    ref = poolray.put(get(poolray.put(np.zeros(LARGE))))
    first, second = get([ref, ref], writable=True)
    first[:] = 1
    assert second.sum() == 0
    assert get(ref).sum() == 0
    second[0] = 5
    assert first.sum() == LARGE


def test_a_file_on_disk_that_is_mapped_arrives_as_an_array(
    tmp_path: Path, pool: Pool, executor: Executor
) -> None:
    path = tmp_path / "numbers"
    np.arange(LARGE, dtype="i8").tofile(path)
    value = np.memmap(path, dtype="i8", mode="r")
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        assert type(arrived) is np.memmap, way
        assert np.array_equal(arrived, value), way
        assert arrived.flags.writeable == (way in WRITABLE_WAYS), way


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.datetime64("2024-02-29T12:00", "m"),
        np.zeros(1, dtype=RECORDS)[0],
        np.array(3.5),
        np.array([1, "a", None], dtype=object),
        np.zeros((0, 3)),
        np.dtype("i4"),
        np.random.default_rng(7).bit_generator.state,
    ],
    ids=lambda value: type(value).__name__,
)
def test_scalars_and_odd_arrays_arrive(value: Any, pool: Pool, executor: Executor) -> None:
    for send in WAYS.values():
        arrived = send(value, pool, executor)
        assert type(arrived) is type(value)
        assert repr(arrived) == repr(value)


def test_an_array_of_objects_arrives_with_what_is_in_it(pool: Pool, executor: Executor) -> None:
    inner = np.arange(LARGE)
    value = np.array([inner, "text", {"inner": inner}, None], dtype=object)
    for send in WAYS.values():
        arrived = send(value, pool, executor)
        assert np.array_equal(arrived[0], inner)
        assert arrived[2]["inner"] is arrived[0]


class Temperature(np.ndarray):
    unit = "K"

    def __reduce__(self) -> Any:
        return _temperature, (np.asarray(self), self.unit)


def _temperature(values: Any, unit: str) -> Temperature:
    made = values.view(Temperature)
    made.unit = unit
    return made


def test_a_subclass_of_array_goes_its_own_way(pool: Pool, executor: Executor) -> None:
    value = _temperature(np.arange(LARGE), "C")
    for send in WAYS.values():
        arrived = send(value, pool, executor)
        assert type(arrived) is Temperature
        assert arrived.unit == "C"
        assert np.array_equal(arrived, value)


# --- buffers -------------------------------------------------------------------------------------

BUFFERS: dict[str, Callable[[int], Any]] = {
    "bytes": lambda n: b"x" * n,
    "bytearray": lambda n: bytearray(b"x" * n),
    "array": lambda n: array.array("d", range(n)),
    "text": lambda n: "ä" * n,
}


@pytest.mark.parametrize("size", [SMALL, MEDIUM * 8, LARGE * 8])
@pytest.mark.parametrize("kind", BUFFERS)
def test_bytes_arrays_and_text_arrive_as_what_they_were(
    kind: str, size: int, pool: Pool, executor: Executor
) -> None:
    value = BUFFERS[kind](size)
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        assert type(arrived) is type(value), way
        assert arrived == value, way


VIEWS: dict[str, Callable[[int], memoryview]] = {
    "of bytes": lambda n: memoryview(b"x" * n),
    "writable": lambda n: memoryview(bytearray(n)),
    "numbers": lambda n: memoryview(np.arange(n)),
    "two dimensions": lambda n: memoryview(np.arange(2 * n).reshape(2, n)),
    "characters": lambda n: memoryview(b"x" * n).cast("c"),
    "with gaps": lambda n: memoryview(bytes(range(256)) * n)[::3],
}


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_memoryview_arrives_as_one(kind: str, size: int, pool: Pool, executor: Executor) -> None:
    value = VIEWS[kind](size)
    for way, send in WAYS.items():
        if size == SMALL and way in READ_ONLY_WAYS:
            continue  # whether its own small memory can be written to matters to nobody
        arrived = send(value, pool, executor)
        assert type(arrived) is memoryview, way
        assert (arrived.format, arrived.shape) == (value.format, value.shape), way
        assert arrived.tolist() == value.tolist(), way
        if way != "writable list":  # the task had a read-only one, and returned that
            assert arrived.readonly == (way in READ_ONLY_WAYS or value.readonly), way


# --- containers ----------------------------------------------------------------------------------


def test_a_container_of_a_thousand_arrays_arrives(pool: Pool, executor: Executor) -> None:
    value = {i: [np.full(i % 50 * 200, i), {"again": np.arange(3)}] for i in range(1000)}
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        assert list(arrived) == list(value), way
        for index, (filled, _) in arrived.items():
            assert filled.size == index % 50 * 200, way
            assert np.all(filled == index), way
    del arrived
    gc.collect()


def test_views_of_a_thousand_objects_at_once() -> None:
    refs = [poolray.put(np.full(20_000, i)) for i in range(300)]
    views = get(refs)
    del refs
    assert all(view[0] == view[-1] == i for i, view in enumerate(views))


@dataclasses.dataclass
class Point:
    x: float
    y: float
    values: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    tags: tuple[str, ...] = ()


class Colour(enum.Enum):
    RED = 1
    GREEN = "g"


class Permission(enum.Flag):
    READ = 1
    WRITE = 2


class Pair(typing.NamedTuple):
    left: int
    right: Any


class Slotted:
    __slots__ = ("__weakref__", "a", "b")

    def __init__(self) -> None:
        self.a = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and self.a == other.a and not hasattr(other, "b")

    __hash__ = None  # type: ignore[assignment]


Triple = collections.namedtuple("Triple", "a b c")


@pytest.mark.parametrize(
    "value",
    [
        Point(1, 2),
        Frozen("a", ("b",)),
        Colour.GREEN,
        Permission.READ | Permission.WRITE,
        Pair(1, Pair(2, None)),
        Triple(1, 2, 3),
        Slotted(),
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, a=[1]),
        collections.deque([1, 2], maxlen=3),
        collections.Counter("aab"),
        types.SimpleNamespace(a=1),
        frozenset({1, 2}),
        range(3),
        slice(1, None),
        complex(1, 2),
        ...,
        NotImplemented,
        int,
        operator.itemgetter(1),
        10**1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_of_every_kind_arrive(value: Any, pool: Pool, executor: Executor) -> None:
    for way, send in WAYS.items():
        arrived = send(value, pool, executor)
        assert type(arrived) is type(value), way
        # An itemgetter has no equality.
        assert arrived == value or repr(arrived) == repr(value), way


def test_an_enum_arrives_as_itself(pool: Pool, executor: Executor) -> None:
    assert all(send(Colour.RED, pool, executor) is Colour.RED for send in WAYS.values())


def test_a_dataclass_with_an_array_shares_its_memory() -> None:
    ref = poolray.put(Point(1, 2, np.arange(LARGE)))
    assert np.shares_memory(get(ref).values, get(ref).values)


def test_classes_of_the_moment_travel_with_their_values(pool: Pool, executor: Executor) -> None:
    @dataclasses.dataclass
    class Local:
        values: Any

    class Mode(enum.Enum):
        ON = 1

    for way, send in WAYS.items():
        arrived, mode = send((Local([1]), Mode.ON), pool, executor)
        assert arrived.values == [1], way
        assert type(arrived).__qualname__ == Local.__qualname__, way
        assert mode.name == "ON", way


# --- refs in deep places -------------------------------------------------------------------------


def dig(value: Any) -> Any:
    """Get the refs of `deep`."""
    (pair,) = value.values
    return poolray.get(pair.right["ref"], timeout=DEADLINE_S)


def test_a_ref_deep_inside_keeps_its_object_alive(pool: Pool, executor: Executor) -> None:
    def deep() -> Any:
        return Point(0, 0, [Pair(1, {"ref": poolray.put(np.arange(LARGE))})])

    total = int(np.arange(LARGE).sum())
    for way, send in WAYS.items():
        arrived = send(deep(), pool, executor)
        gc.collect()
        assert dig(arrived).sum() == total, way
    assert get(call.remote(dig, deep())).sum() == total
    assert pool.apply_async(dig, (deep(),)).get(DEADLINE_S).sum() == total
    assert executor.submit(dig, deep()).result(DEADLINE_S).sum() == total


# --- what others make ----------------------------------------------------------------------------


def test_what_is_refused_says_which_part_it_was() -> None:
    with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
        poolray.put({"lock": threading.Lock()})


def test_a_frame_of_something_else_is_refused() -> None:
    from poolray.objects.serialization import deserialize

    with pytest.raises(pickle.UnpicklingError, match="not a poolray frame"):
        deserialize(b"\x01XYZ" + bytes(64))


def test_arrow_tables_share_their_memory(pool: Pool, executor: Executor) -> None:
    arrow = pytest.importorskip("pyarrow")
    value = arrow.table({"a": np.arange(LARGE), "b": [str(i) for i in range(LARGE)]})
    for way, send in WAYS.items():
        assert send(value, pool, executor).equals(value), way
    ref = poolray.put(value)
    first, second = (get(ref).column("a").chunk(0).buffers()[1].address for _ in range(2))
    assert first == second


def test_pandas_frames_share_their_memory(pool: Pool, executor: Executor) -> None:
    pandas = pytest.importorskip("pandas")
    value = pandas.DataFrame(
        {
            "number": np.arange(LARGE),
            "day": np.arange(LARGE).astype("datetime64[s]"),
            "name": [str(i) for i in range(LARGE)],
        },
        index=pandas.Index(range(LARGE), name="index"),
    )
    for way, send in WAYS.items():
        pandas.testing.assert_frame_equal(send(value, pool, executor), value, obj=way)
    numbers = poolray.put(value[["number", "day"]])
    for column in ("number", "day"):
        first, second = (get(numbers)[column].to_numpy() for _ in range(2))
        assert np.shares_memory(first, second), column
    changed = get(numbers, writable=True)
    changed.loc[0, "number"] = 7
    assert get(numbers)["number"][0] == 0


def test_polars_frames_arrive(pool: Pool, executor: Executor) -> None:
    polars = pytest.importorskip("polars")
    value = polars.DataFrame({"a": np.arange(LARGE), "b": ["text"] * LARGE})
    for way, send in WAYS.items():
        if way in ("put", "writable get"):  # polars' threads do not survive a fork
            assert send(value, pool, executor).equals(value), way


def test_tensors_arrive_and_can_be_written_to(pool: Pool, executor: Executor) -> None:
    torch = pytest.importorskip("torch")
    for kind in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        value = torch.arange(LARGE).reshape(2, -1).to(kind)
        ref = poolray.put(value)
        first, second = get(ref), get(ref, writable=True)
        for arrived in (first, second):
            assert arrived.dtype == kind
            assert torch.equal(arrived, value)
            arrived.zero_()
        assert torch.equal(get(ref), value)
    weights = torch.nn.Parameter(torch.ones(LARGE))
    assert torch.equal(get(poolray.put([weights, weights[::2]]))[1], weights[::2])
