"""Objects: refs, `get`, `put`, `wait`, `init`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from typing_extensions import assert_type

import poolray
from poolray import ObjectRef


def put_and_get(
    number: ObjectRef[int], text: ObjectRef[str], anything: ObjectRef[Any], none: ObjectRef[None]
) -> None:
    assert_type(poolray.put(3), ObjectRef[int])
    assert_type(poolray.put({"a": [1.5]}), ObjectRef[dict[str, list[float]]])
    assert_type(poolray.get(number), int)
    assert_type(poolray.get(number, timeout=1), int)
    assert_type(poolray.get(number, timeout=None, writable=True), int)
    assert_type(poolray.get([number, number]), list[int])
    assert_type(poolray.get([number] * 3, timeout=0.5), list[int])
    assert_type(poolray.get([poolray.put(i) for i in range(3)]), list[int])
    assert_type(poolray.get(anything), Any)
    poolray.get(none)
    mixed: list[ObjectRef[int | str]] = [number, text]
    assert_type(poolray.get(mixed), list[int | str])


def waiting(refs: list[ObjectRef[int]]) -> None:
    ready, rest = poolray.wait(refs)
    assert_type(ready, list[ObjectRef[int]])
    assert_type(rest, list[ObjectRef[int]])
    assert_type(
        poolray.wait(refs, num_returns=2, timeout=1.5, fetch_local=False),
        tuple[list[ObjectRef[int]], list[ObjectRef[int]]],
    )


async def awaiting(number: ObjectRef[int]) -> None:
    assert_type(await number, int)


def handles(number: ObjectRef[int], truth: ObjectRef[bool]) -> None:
    assert_type(number.future(), Future[int])
    assert_type(number.hex(), str)
    assert_type(number.binary(), bytes)
    assert_type({number: 1}, dict[ObjectRef[int], int])
    assert_type(number == truth, bool)
    wider: ObjectRef[int] = truth


def life() -> None:
    with poolray.init(num_cpus=2, resources={"gate": 1}, object_store_memory=1 << 30) as context:
        assert_type(context.address_info["node_id"], Any)
    poolray.init("local", ignore_reinit_error=True, namespace="a")
    assert_type(poolray.is_initialized(), bool)
    poolray.shutdown()


def wrong_calls(number: ObjectRef[int], text: ObjectRef[str]) -> None:
    poolray.get(3)  # type: ignore[call-overload]
    poolray.get("text")  # type: ignore[call-overload]
    poolray.get([3])  # type: ignore[arg-type]
    poolray.get((number, number))  # type: ignore[call-overload]
    poolray.get(number, 1.0)  # type: ignore[call-overload]
    poolray.get(number, timeout="1")  # type: ignore[call-overload]
    poolray.get()  # type: ignore[call-overload]
    poolray.put()  # type: ignore[call-arg]
    poolray.wait(number)  # type: ignore[arg-type]
    poolray.wait([1])  # type: ignore[type-var]
    poolray.wait([number], 2)  # type: ignore[call-arg]
    poolray.wait([number], num_returns="1")  # type: ignore[arg-type]
    poolray.init(num_cpus="2")  # type: ignore[arg-type]
    poolray.init(resources=["gate"])  # type: ignore[arg-type]
    poolray.gett(number)  # type: ignore[attr-defined]


def wrong_results(number: ObjectRef[int], truth: ObjectRef[bool]) -> None:
    a: str = poolray.get(number)  # type: ignore[assignment]
    b: list[str] = poolray.get([number])  # type: ignore[list-item]
    c: int = poolray.put(3)  # type: ignore[assignment]
    d: ObjectRef[bool] = number  # type: ignore[assignment]
    number + 1  # type: ignore[operator]
