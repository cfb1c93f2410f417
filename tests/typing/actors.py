"""Actors: classes, handles and methods as type checkers see them."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

import poolray
from poolray.actor import ActorClass, ActorHandle, ActorMethod


# mypy takes a decorated class for the class itself, whatever the decorator gives: there, the call
# is what has a type.
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, n: int = 1) -> int:
        return self.value + n

    @poolray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.value, self.value


RemoteCounter = poolray.remote(Counter)
WithCommonOptions = poolray.remote(num_cpus=1)(Counter)
WithGroups = poolray.remote(concurrency_groups={"io": 2}, max_concurrency=3)(Counter)
WithActorOptions = poolray.remote(max_restarts=2, lifetime="detached", name="n")(Counter)


class Plain:
    pass


def what_classes_give() -> None:
    assert_type(RemoteCounter.remote().add, ActorMethod)
    assert_type(RemoteCounter.options(name="a", get_if_exists=True).remote(1).pair, ActorMethod)
    assert_type(poolray.remote(Plain), ActorClass[Plain])
    assert_type(poolray.remote(Plain).remote(), ActorHandle[Plain])
    assert_type(poolray.remote(max_restarts=1)(Plain).remote(), ActorHandle[Plain])
    assert_type(poolray.remote(num_cpus=1)(Plain), ActorClass[Plain])
    assert_type(WithCommonOptions.remote(), ActorHandle[Counter])
    assert_type(WithGroups.remote(), ActorHandle[Counter])
    assert_type(WithActorOptions.remote(1), ActorHandle[Counter])


def what_handles_give(handle: ActorHandle[Plain]) -> None:
    assert_type(handle.anything, ActorMethod)
    handle.anything.options(num_returns=2).remote(1, named=2)
    assert_type(poolray.get_actor("name"), ActorHandle[Any])
    poolray.kill(handle, no_restart=False)


def what_is_wrong(handle: ActorHandle[Plain]) -> None:
    RemoteCounter.options(max_restart=1)  # type: ignore[call-arg]
    RemoteCounter.options(lifetime="short")  # type: ignore[arg-type]
    poolray.kill(3)  # type: ignore[arg-type]
    poolray.get_actor(3)  # type: ignore[arg-type]
