"""Tasks and calls with many refs among their arguments, whose values are small one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import poolray
from poolray.cluster_utils import Cluster


@poolray.remote
def lengths(*values: bytes, **named: bytes) -> list[int]:
    return [len(value) for value in (*values, *named.values())]


@poolray.remote
def fail() -> None:
    raise ValueError("no value")


@poolray.remote
class Measure:
    def __init__(self, *values: bytes) -> None:
        self.made_with = len(values)

    def measure(self, *values: bytes) -> tuple[int, list[int]]:
        return self.made_with, [len(value) for value in values]


@poolray.remote
class AsyncMeasure:
    async def measure(self, *values: bytes) -> list[int]:
        return [len(value) for value in values]


@pytest.mark.parametrize(("count", "size"), [(12, 95_000), (3_000, 1_000), (10_000, 10)])
def test_arguments_that_are_small_one_by_one_may_be_many(count: int, size: int) -> None:
    poolray.init(num_cpus=2)
    refs = [poolray.put(bytes(size)) for _ in range(count)]
    last = poolray.put(b"last")
    assert poolray.get(lengths.remote(*refs[1:], z=last), timeout=60) == [size] * (count - 1) + [4]


def test_calls_of_actors_take_many_as_well() -> None:
    poolray.init(num_cpus=2)
    refs = [poolray.put(bytes(90_000)) for _ in range(20)]
    actor = Measure.remote(*refs)
    assert poolray.get(actor.measure.remote(*refs), timeout=60) == (20, [90_000] * 20)
    threaded = Measure.options(max_concurrency=2).remote()
    assert poolray.get(threaded.measure.remote(*refs), timeout=60) == (0, [90_000] * 20)
    waiting = AsyncMeasure.remote()
    assert poolray.get(waiting.measure.remote(*refs), timeout=60) == [90_000] * 20


def test_an_error_among_many_fails_the_task() -> None:
    poolray.init(num_cpus=2)
    refs = [poolray.put(bytes(90_000)) for _ in range(20)]
    with pytest.raises(ValueError, match="no value"):
        poolray.get(lengths.remote(*refs, fail.remote()), timeout=60)


def test_more_refs_than_a_call_takes_are_refused_where_it_is_made() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(1)
    with pytest.raises(ValueError, match="pass them in a list"):
        lengths.remote(*[ref] * 10_001)


def test_a_task_of_another_node_takes_many(small_cluster: None) -> None:
    refs = [poolray.put(bytes(90_000)) for _ in range(20)]
    far: Any = lengths.options(resources={"far": 0.1})
    assert poolray.get(far.remote(*refs), timeout=60) == [90_000] * 20


@pytest.fixture
def small_cluster() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1, resources={"far": 1})
        poolray.init(address=cluster.address)
        yield
    finally:
        poolray.shutdown()
        cluster.shutdown()
