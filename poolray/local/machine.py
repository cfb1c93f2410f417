"""What this machine offers to tasks: its resources, devices and labels.

What: checks what the user says, and makes of it and of what is found what a node is made with.
Who calls: the local runtime and daemons, once, before they make their node; who is told by users.
May touch: the environment, `/dev` and `/sys` (through `scheduling/accelerators.py`).
Invariants: of a resource with devices there is as much as there are devices.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import msgspec

from poolray.config import Config
from poolray.scheduling.resources import to_fixed

if TYPE_CHECKING:
    from poolray.scheduling.accelerators import Found

#: Where the node is, as far as anybody has to know: nothing listens in local mode.
NODE_ADDRESS = "127.0.0.1"
HEAD_RESOURCE = "node:__internal_head__"
#: Resources that every node may have -> what they are given as.
_DEFAULT_RESOURCES = {
    "CPU": "num_cpus",
    "GPU": "num_gpus",
    "memory": "memory",
    "object_store_memory": "object_store_memory",
}
_STORE_MIN_BYTES = 1 << 20


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the user says of this machine; None: find out."""

    num_gpus: int | None = None
    memory_bytes: int | None = None
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is made with."""

    #: Resource name -> amount, in units of 1/10,000.
    total: dict[str, int]
    #: Resource name -> ids of its devices, of those that have devices.
    devices: dict[str, tuple[str, ...]]
    #: Resource name -> the variable that makes such devices visible to a process.
    variables: dict[str, str]
    labels: dict[str, str]


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 4 << 30


def check_amounts(
    num_cpus: float | None,
    num_gpus: float | None,
    resources: dict[str, float] | None,
    object_store_memory: int | None,
    memory: int | None = None,
) -> None:
    """Refuse what no node can be made with.

    Raises
    ------
    ValueError, TypeError
        An amount that is negative, fractional, too small, too large or no number; a custom resource
        with a name that is taken.
    """
    for name, amount in (("CPU", num_cpus), ("GPU", num_gpus), ("memory", memory)):
        _check_whole(name, amount)
    if resources is not None:
        _check_custom(resources)
    if object_store_memory is None:
        return
    if object_store_memory < _STORE_MIN_BYTES:
        raise ValueError(
            f"Attempting to cap object store memory usage at {object_store_memory} bytes, but the "
            f"minimum allowed is {_STORE_MIN_BYTES} bytes."
        )
    if object_store_memory > memory_bytes():
        raise ValueError(
            f"object_store_memory is {object_store_memory} bytes, and this machine has "
            f"{memory_bytes()} bytes of memory: what the store has no room for goes "
            "to disk, so a smaller one will do."
        )


def _check_whole(name: str, amount: float | None) -> None:
    if amount is None:
        return
    if not isinstance(amount, (int, float)):
        raise TypeError(f"The quantity of {name} must be a number: {amount!r}")
    if amount < 0:
        raise ValueError(
            f"Resource quantities must be nonnegative. Violated by resource '{name}' in "
            f"{{'{name}': {amount}}}."
        )
    if not math.isfinite(amount) or amount != int(amount):
        raise ValueError(
            f"Resource quantities must all be whole numbers. Violated by resource '{name}' in "
            f"{{'{name}': {amount}}}."
        )


def _check_custom(resources: dict[str, float]) -> None:
    if not isinstance(resources, dict):
        raise TypeError(f"resources must be a dictionary of names to quantities: {resources!r}")
    for name, amount in resources.items():
        if name in _DEFAULT_RESOURCES:
            raise ValueError(
                f"`{name}` cannot be a custom resource because it is one of the default resources: "
                f"use `{_DEFAULT_RESOURCES[name]}` instead."
            )
        if not isinstance(amount, (int, float)) or isinstance(amount, bool):
            raise TypeError(f"The quantity of resource {name} must be a number: {amount!r}")
        if name == HEAD_RESOURCE:
            raise ValueError(f"{name} is a reserved resource name, use another name instead.")
        _check_whole(name, amount)


def describe(
    config: Config,
    wishes: Wishes,
    store_bytes: int,
    address: str = NODE_ADDRESS,
    is_head: bool = True,
) -> Machine:
    """What this machine offers, at its address; with or without what only the head's node has.

    Raises
    ------
    ValueError
        The user names more devices than a variable such as `CUDA_VISIBLE_DEVICES` allows.
    """
    from poolray.scheduling import accelerators  # not for programs that only import

    given = dict(wishes.resources)
    if wishes.num_gpus is not None:
        given[accelerators.GPU] = wishes.num_gpus
    found = accelerators.discover(given, os.environ)
    cpus = config.num_cpus if config.num_cpus >= 0 else float(usable_cpus())
    memory = wishes.memory_bytes
    amounts = {
        "CPU": cpus,
        **wishes.resources,
        **{devices.resource: len(devices.ids) for devices in found},
        **{f"accelerator_type:{d.type_name}": 1 for d in found if d.type_name},
        "memory": memory if memory is not None else max(0, memory_bytes() - store_bytes),
        "object_store_memory": store_bytes,
        f"node:{address}": 1,
        HEAD_RESOURCE: int(is_head),
    }
    return Machine(
        total={name: to_fixed(name, amount) for name, amount in amounts.items() if amount},
        devices={devices.resource: devices.ids for devices in found},
        variables={devices.resource: devices.variable for devices in found},
        labels={**_found_labels(found), **wishes.labels},
    )


def _found_labels(found: list[Found]) -> dict[str, str]:
    types = [devices.type_name for devices in found if devices.type_name]
    return {"ray.io/accelerator-type": types[0]} if types else {}


__all__ = [
    "HEAD_RESOURCE",
    "NODE_ADDRESS",
    "Machine",
    "Wishes",
    "check_amounts",
    "describe",
    "memory_bytes",
    "usable_cpus",
]
