"""Remote functions: their arguments, their options, what a call gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from typing_extensions import assert_type

import poolray
from poolray import ObjectRef

T = TypeVar("T")


@poolray.remote
def nothing() -> None: ...


@poolray.remote
def scale(x: int, factor: float = 1.0) -> float:
    return x * factor


@poolray.remote
def join(first: str, *rest: str, separator: str = "") -> str:
    return separator.join((first, *rest))


@poolray.remote
def total(values: Sequence[float], /, *, start: float) -> float:
    return sum(values, start)


@poolray.remote
def eight(a: int, b: str, c: int, d: str, e: int, f: str, g: int, h: str) -> bytes:
    return f"{a}{b}{c}{d}{e}{f}{g}{h}".encode()


@poolray.remote
def same(x: T) -> T:
    return x


@poolray.remote
def of_refs(refs: list[ObjectRef[int]]) -> int:
    return sum(poolray.get(refs))


@poolray.remote
def maybe(x: int | None = None, **named: str) -> int | None:
    return x


@poolray.remote(num_cpus=2, max_retries=0, retry_exceptions=[OSError], max_calls=3, name="two")
def with_options(x: int) -> tuple[int, str]:
    return x, str(x)


@poolray.remote(num_returns=2)
def pair(x: int) -> tuple[int, str]:
    return x, str(x)


@poolray.remote(num_returns=0)
def silent(x: int) -> None: ...


@poolray.remote(resources={"licence": 1})
def licensed(x: int) -> int:
    return x


def a_ref_of_what_the_function_returns() -> None:
    assert_type(nothing.remote(), ObjectRef[None])
    assert_type(scale.remote(1), ObjectRef[float])
    assert_type(scale.remote(x=1, factor=2), ObjectRef[float])
    assert_type(join.remote("a", "b", "c", separator="-"), ObjectRef[str])
    assert_type(total.remote([1, 2], start=0.5), ObjectRef[float])
    assert_type(eight.remote(1, "b", 3, "d", 5, "f", 7, "h"), ObjectRef[bytes])
    assert_type(maybe.remote(), ObjectRef[int | None])
    assert_type(same.remote("text"), ObjectRef[str])
    assert_type(with_options.remote(1), ObjectRef[tuple[int, str]])
    assert_type(licensed.remote(1), ObjectRef[int])


def refs_in_the_place_of_arguments(
    number: ObjectRef[int], truth: ObjectRef[bool], text: ObjectRef[str], anything: ObjectRef[Any]
) -> None:
    assert_type(scale.remote(number), ObjectRef[float])
    assert_type(scale.remote(truth, 2.0), ObjectRef[float])
    assert_type(scale.remote(number, scale.remote(1)), ObjectRef[float])
    assert_type(scale.remote(1, scale.remote(1)), ObjectRef[float])
    assert_type(scale.remote(number, factor=2.0), ObjectRef[float])
    assert_type(scale.remote(anything), ObjectRef[float])
    assert_type(join.remote(text, "b", "c", separator="-"), ObjectRef[str])
    assert_type(join.remote("a", text), ObjectRef[str])
    assert_type(total.remote(poolray.put([1.0]), start=0), ObjectRef[float])
    assert_type(maybe.remote(number, note="a"), ObjectRef[int | None])
    assert_type(maybe.remote(maybe.remote(1)), ObjectRef[int | None])
    assert_type(
        eight.remote(number, text, number, text, number, text, number, text), ObjectRef[bytes]
    )
    assert_type(eight.remote(1, text, 3, "d", e=5, f="f", g=7, h="h"), ObjectRef[bytes])
    assert_type(of_refs.remote([number, number]), ObjectRef[int])


def what_num_returns_makes_of_a_call(number: ObjectRef[int], how_many: int) -> None:
    assert_type(pair.remote(number), list[ObjectRef[Any]])
    first, second = pair.remote(1)
    assert_type(first, ObjectRef[Any])
    assert_type(second, ObjectRef[Any])
    assert_type(silent.remote(number), None)
    assert_type(with_options.options(num_returns=2).remote(1), list[ObjectRef[Any]])
    assert_type(with_options.options(num_returns=how_many).remote(1), list[ObjectRef[Any]])
    assert_type(with_options.options(num_returns=0).remote(1), None)
    assert_type(with_options.options(num_returns=1).remote(1), ObjectRef[tuple[int, str]])
    assert_type(pair.options(num_returns=None).remote(1), ObjectRef[tuple[int, str]])
    assert_type(pair.options(num_returns=1).remote(number), ObjectRef[tuple[int, str]])
    assert_type(pair.options(num_cpus=2).remote(number), list[ObjectRef[Any]])


def options_keep_the_parameters(number: ObjectRef[int]) -> None:
    assert_type(scale.options(num_cpus=0.5).remote(1, 2.0), ObjectRef[float])
    assert_type(scale.options(name="a", resources={"gate": 0.5}).remote(number), ObjectRef[float])
    assert_type(scale.options(max_retries=-1, num_gpus=0).remote(1), ObjectRef[float])
    assert_type(scale.options(retry_exceptions=True).remote(1), ObjectRef[float])
    assert_type(scale.options(retry_exceptions=(OSError,)).remote(1), ObjectRef[float])
    assert_type(scale.options(scheduling_strategy="SPREAD").remote(1), ObjectRef[float])


def a_function_made_remote_later(function: Callable[[int], str]) -> None:
    assert_type(poolray.remote(function).remote(1), ObjectRef[str])
    assert_type(poolray.remote(num_cpus=1)(function).remote(1), ObjectRef[str])
    assert_type(poolray.remote(lambda: 3).remote(), ObjectRef[int])


def wrong_arguments(number: ObjectRef[int], text: ObjectRef[str]) -> None:
    nothing.remote(1)  # type: ignore[call-arg]
    scale.remote()  # type: ignore[call-overload]
    scale.remote("1")  # type: ignore[call-overload]
    scale.remote(text)  # type: ignore[arg-type]
    scale.remote(1, text)  # type: ignore[arg-type]
    scale.remote(1, 2.0, 3)  # type: ignore[call-overload]
    scale.remote(1, faktor=2.0)  # type: ignore[call-overload]
    scale.remote(number, factor="2")  # type: ignore[call-overload]
    join.remote("a", 1)  # type: ignore[call-overload]
    join.remote(text, number)  # type: ignore[arg-type]
    total.remote([1.0])  # type: ignore[call-overload]
    total.remote(values=[1.0], start=0)  # type: ignore[call-overload]
    total.remote(text, start=0)  # type: ignore[arg-type]
    eight.remote(1, "b", 3, "d", 5, "f", 7)  # type: ignore[call-overload]
    eight.remote(number, text, number, text, number, text, number, number)  # type: ignore[arg-type]
    of_refs.remote([text])  # type: ignore[list-item]


def wrong_results(number: ObjectRef[int]) -> None:
    wrong: ObjectRef[str] = scale.remote(number)  # type: ignore[assignment]
    value: float = scale.remote(number)  # type: ignore[assignment]


def wrong_options() -> None:
    scale.options(num_cpu=1)  # type: ignore[call-overload]
    scale.options(num_cpus="1")  # type: ignore[call-overload]
    scale.options(resources=["gate"])  # type: ignore[call-overload]
    scale.options(retry_exceptions=OSError)  # type: ignore[call-overload]
    scale.options(max_calls=1)  # type: ignore[call-overload]
    scale.options(runtime_env={})  # type: ignore[call-overload]
    poolray.remote(num_cpu=1)  # type: ignore[call-overload]
    poolray.remote(3)  # type: ignore[call-overload]
    poolray.remote(num_returns="2")  # type: ignore[call-overload]


def a_remote_function_is_not_called_directly() -> None:
    scale(1)  # type: ignore[operator]
    list(map(scale, [1]))  # type: ignore[call-overload]
    scale.options(num_cpus=1).options(num_cpus=2)  # type: ignore[attr-defined]


def right_but_beyond_what_types_can_say(number: ObjectRef[int]) -> None:
    """The run time takes these; whoever writes them has to mark them."""
    scale.remote(x=number)  # type: ignore[call-overload]
    total.remote([1.0], start=number)  # type: ignore[call-overload]
