"""Values of refs among a call's arguments, as its worker puts them in their places.

What: loads what came with the packet, asks for what did not fit.
Who calls: `local/worker.py`, `local/actor_worker.py`.
May touch: the arena and the node, through the worker's client.
Invariants: an argument that cannot be had is the call's error, and names its cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from poolray.exceptions import ObjectLostError
from poolray.local.worker_errors import DependencyFailed
from poolray.protocol.worker import TaskCall

if TYPE_CHECKING:
    from poolray.local.worker import Worker


def fill_slots(worker: Worker, task: TaskCall, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Put the values of refs among the arguments in their places.

    Raises
    ------
    DependencyFailed
        One of them is an error, or is lost.
    """
    positional = list(args)
    for index in task.error_arguments:
        raise DependencyFailed(worker.load(task.arguments[index], False))
    values: Iterator[Any] = (_loaded(worker, value) for value in task.arguments)
    if task.fetch:
        try:
            values = iter(worker.client.fetch(task.fetch))
        except Exception as error:
            raise DependencyFailed(error) from error
    for slot, loaded in zip(task.slots, values, strict=True):
        if isinstance(slot, int):
            positional[slot] = loaded
        else:
            kwargs[slot] = loaded
    return positional, kwargs


def _loaded(worker: Worker, value: Any) -> Any:
    try:
        return worker.load(value, False)
    except ObjectLostError as lost:
        raise DependencyFailed(lost) from lost
