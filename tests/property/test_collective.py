"""A collective group against numpy: any operations, in any order, on arrays of any size.

Members are threads here, so that one process runs them all; slots are small, so that most arrays
take several blocks.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolray.util.collective import group as groups
from poolray.util.collective import segment
from poolray.util.collective.group import SharedMemoryGroup
from poolray.util.collective.operands import open_operand
from poolray.util.collective.types import ReduceOp

UFUNCS = {
    ReduceOp.SUM: numpy.add,
    ReduceOp.PRODUCT: numpy.multiply,
    ReduceOp.MIN: numpy.minimum,
    ReduceOp.MAX: numpy.maximum,
}

names = itertools.count()


@pytest.fixture(autouse=True, scope="module")
def _small_slots() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "_SLOT_BYTES_MAX", 4096)
        patch.setattr(segment, "_SLOT_BYTES_MIN", 4096)
        patch.setattr(segment, "_OUTBOX_BYTES", 4096)
        patch.setattr(groups, "_SMALL_BYTES", 512)
        yield


calls = st.tuples(
    st.sampled_from(["allreduce", "reduce", "broadcast", "allgather", "reducescatter", "ring"]),
    st.sampled_from(["float64", "int16", "uint8", "complex64"]),
    st.integers(0, 3000),
    st.sampled_from(list(ReduceOp)),
    st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 4), steps=st.lists(calls, min_size=1, max_size=8))
def test_members_get_what_numpy_says(size: int, steps: list[Any]) -> None:
    name = f"group-{next(names)}"
    with ThreadPoolExecutor(size) as pool:
        for done in [pool.submit(take_part, name, size, rank, steps) for rank in range(size)]:
            done.result(60)


def take_part(name: str, size: int, rank: int, steps: list[Any]) -> None:
    group = SharedMemoryGroup(b"property", size, rank, name, 30.0)
    for number, (call, dtype, length, op, root) in enumerate(steps):
        arrays = [values(dtype, length, number * 10 + peer) for peer in range(size)]
        CHECKS[call](group, arrays, op, root % size)
    group.barrier()
    group.destroy()


def values(dtype: str, length: int, seed: int) -> Any:
    return numpy.random.default_rng(seed).integers(1, 5, length).astype(dtype)


def reduced(arrays: list[Any], op: ReduceOp) -> Any:
    result = arrays[0]
    for array in arrays[1:]:
        result = UFUNCS[op](result, array, dtype=array.dtype)
    return result


def check_allreduce(group: SharedMemoryGroup, arrays: list[Any], op: ReduceOp, _: int) -> None:
    mine = arrays[group.rank].copy()
    group.allreduce(open_operand(mine, writes=True), op)
    assert numpy.array_equal(mine, reduced(arrays, op))


def check_reduce(group: SharedMemoryGroup, arrays: list[Any], op: ReduceOp, root: int) -> None:
    mine = arrays[group.rank].copy()
    group.reduce(open_operand(mine, writes=True), root, op)
    expected = reduced(arrays, op) if group.rank == root else arrays[group.rank]
    assert numpy.array_equal(mine, expected)


def check_broadcast(group: SharedMemoryGroup, arrays: list[Any], _: ReduceOp, root: int) -> None:
    mine = arrays[group.rank].copy()
    group.broadcast(open_operand(mine, writes=True), root)
    assert numpy.array_equal(mine, arrays[root])


def check_allgather(group: SharedMemoryGroup, arrays: list[Any], _: ReduceOp, __: int) -> None:
    found = [numpy.zeros_like(array) for array in arrays]
    targets = [open_operand(array, writes=True) for array in found]
    group.allgather(targets, open_operand(arrays[group.rank]))
    assert all(map(numpy.array_equal, found, arrays))


def check_reducescatter(
    group: SharedMemoryGroup, arrays: list[Any], op: ReduceOp, in_place: int
) -> None:
    """Member `r` gives array `r` for itself, and array `r + d` for the one `d` further on."""
    size, me = len(arrays), group.rank
    parts = [arrays[(me + peer) % size].copy() for peer in range(size)]
    expected = reduced([arrays[(giver + me) % size] for giver in range(size)], op)
    target = parts[me] if in_place else numpy.zeros_like(arrays[0])
    group.reducescatter(
        open_operand(target, writes=True), [open_operand(part) for part in parts], op
    )
    assert numpy.array_equal(target, expected)


def check_ring(group: SharedMemoryGroup, arrays: list[Any], _: ReduceOp, root: int) -> None:
    """Each sends to the next; one of them receives first."""
    size, me = len(arrays), group.rank
    if size == 1:
        return
    before, after = (me - 1) % size, (me + 1) % size
    found = numpy.zeros_like(arrays[0])
    if me == root:
        group.receive(open_operand(found, writes=True), before)
        group.send(open_operand(arrays[me]), after)
    else:
        group.send(open_operand(arrays[me]), after)
        group.receive(open_operand(found, writes=True), before)
    assert numpy.array_equal(found, arrays[before])


CHECKS = {
    "allreduce": check_allreduce,
    "reduce": check_reduce,
    "broadcast": check_broadcast,
    "allgather": check_allgather,
    "reducescatter": check_reducescatter,
    "ring": check_ring,
}
