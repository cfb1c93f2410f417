"""Generators: what a call gives, with the number of returns by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import assert_type

import poolray
from poolray import ObjectRef, ObjectRefGenerator


@poolray.remote(num_returns="streaming", _generator_backpressure_num_objects=2)
def count(n: int) -> Iterator[int]:
    yield from range(n)


@poolray.remote(num_returns="dynamic")
def listed(n: int) -> Iterator[int]:
    yield from range(n)


def what_a_call_gives() -> None:
    assert_type(count.remote(3), ObjectRefGenerator[Any])
    assert_type(listed.remote(3), ObjectRef[Any])
    assert_type(count.options(num_returns="dynamic").remote(3), ObjectRef[Any])
    assert_type(listed.options(num_returns="streaming").remote(3), ObjectRefGenerator[Any])
    assert_type(count.options(num_returns=2).remote(2), list[ObjectRef[Any]])
    count.remote("three")  # type: ignore[call-overload]


def what_a_generator_gives() -> None:
    for ref in count.remote(2):
        assert_type(ref, ObjectRef[Any])
    assert_type(count.remote(1).completed(), ObjectRef[Any])
    poolray.cancel(count.remote(1))


async def what_a_generator_gives_in_a_loop() -> None:
    async for ref in count.remote(2):
        assert_type(ref, ObjectRef[Any])


def waiting(number: ObjectRef[int]) -> None:
    ready, rest = poolray.wait([count.remote(1), count.remote(2)])
    assert_type(ready, list[ObjectRefGenerator[Any]])
    assert_type(poolray.wait([number])[0], list[ObjectRef[int]])
    mixed: list[ObjectRef[int] | ObjectRefGenerator[Any]] = [number, *rest]
    poolray.wait(mixed)
