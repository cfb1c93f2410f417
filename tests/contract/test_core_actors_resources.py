"""What actors keep for their lives: CPUs, devices, custom resources.

The machines of these tests have GPUs because `init` says so: none has to be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import better_than_reference, get, init, ray
from executor_support import wait_until

CPUS = 4
GPUS = 2


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    ray.shutdown()
    init(num_cpus=CPUS, num_gpus=GPUS, resources={"gate": 3})
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _all_free() -> Iterator[None]:
    """What a test's actors kept is free again before the next one begins."""
    yield
    wait_until(lambda: (free("CPU"), free("GPU"), free("gate")) == (CPUS, GPUS, 3))


def free(name: str) -> float:
    return float(ray.available_resources().get(name, 0))


@ray.remote
class Keeper:
    def kept(self) -> dict[str, float]:
        return dict(ray.get_runtime_context().get_assigned_resources())

    def devices(self) -> tuple[Any, Any, Any]:
        accelerators = ray.get_runtime_context().get_accelerator_ids()
        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids(), accelerators["GPU"]

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(1)

    async def unused(self) -> None:
        """Makes it an actor with coroutine methods."""


@ray.remote
class ThreadedKeeper:
    def devices(self) -> tuple[Any, Any, Any]:
        accelerators = ray.get_runtime_context().get_accelerator_ids()
        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids(), accelerators["GPU"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {}),
        ({"num_cpus": 0}, {}),
        ({"num_cpus": 2}, {"CPU": 2}),
        ({"num_cpus": 0.5}, {"CPU": 0.5}),
        ({"resources": {"gate": 1}}, {"CPU": 1, "gate": 1}),
        ({"num_gpus": 1}, {"CPU": 1, "GPU": 1}),
        ({"num_gpus": 0}, {"CPU": 1}),
        ({"num_cpus": 0, "num_gpus": 0.5}, {"GPU": 0.5}),
        ({"num_cpus": 0, "resources": {"gate": 2}}, {"gate": 2}),
    ],
)
def test_one_that_keeps_something_keeps_a_cpu_unless_it_says_otherwise(
    options: dict[str, Any], kept: dict[str, float]
) -> None:
    actor = Keeper.options(**options).remote()
    assert get(actor.kept.remote()) == kept
    for name, total in (("CPU", CPUS), ("GPU", GPUS), ("gate", 3)):
        wait_until(lambda name=name, total=total: free(name) == total - kept.get(name, 0))


def test_it_keeps_its_devices_for_its_life_and_others_get_others() -> None:
    first = Keeper.options(num_gpus=1).remote()
    devices = get(first.devices.remote())
    second = Keeper.options(num_gpus=1).remote()
    others = get(second.devices.remote())
    assert {devices[0], others[0]} == {"0", "1"}
    assert get([first.devices.remote() for _ in range(3)]) == [devices] * 3
    third = Keeper.options(num_gpus=1).remote()
    waiting = third.devices.remote()
    assert ray.wait([waiting], timeout=0.2)[0] == []
    ray.kill(first)
    assert get(waiting) == devices
    del second, third


def test_parts_of_a_device_are_shared() -> None:
    actors = [Keeper.options(num_cpus=0, num_gpus=0.5).remote() for _ in range(4)]
    shown = sorted(visible for visible, _, _ in get([a.devices.remote() for a in actors]))
    assert shown == ["0", "0", "1", "1"]


@pytest.mark.parametrize("options", [{}, {"max_concurrency": 2}], ids=["plain", "threads"])
def test_the_actor_sees_its_devices_however_it_runs(options: dict[str, Any]) -> None:
    actor = ThreadedKeeper.options(num_gpus=2, **options).remote()
    visible, ids, names = get(actor.devices.remote())
    assert sorted(visible.split(",")) == ["0", "1"]
    assert sorted(ids) == [0, 1]
    assert sorted(names) == ["0", "1"]


def test_an_actor_without_devices_is_left_alone() -> None:
    actor = Keeper.remote()
    assert get(actor.devices.remote()) == (os.environ.get("CUDA_VISIBLE_DEVICES"), [], [])


def test_a_restarted_actor_has_its_devices_again() -> None:
    actor = Keeper.options(num_gpus=2, max_restarts=1, max_task_retries=1).remote()
    before = get(actor.pid.remote())
    with pytest.raises(ray.exceptions.RayActorError):
        get(actor.die.options(max_task_retries=0).remote())
    assert get(actor.pid.remote()) != before
    assert sorted(get(actor.devices.remote())[1]) == [0, 1]


def test_one_that_asks_for_more_than_there_is_waits() -> None:
    actor = Keeper.options(num_gpus=GPUS + 1).remote()
    ready, _ = ray.wait([actor.pid.remote()], timeout=0.2)
    assert ready == []
    ray.kill(actor)


@better_than_reference("its resources come free late", always=False)
def test_what_a_killed_actor_kept_is_free_at_once() -> None:
    actor = Keeper.options(num_cpus=CPUS).remote()
    get(actor.pid.remote())
    assert free("CPU") == 0
    ray.kill(actor)
    follower = Keeper.options(num_cpus=CPUS).remote()
    get(follower.pid.remote())
