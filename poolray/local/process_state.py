"""What this process is: a driver, a worker, or neither yet.

What: the one place that knows the process's client and the task that runs; forgets all of it in a
forked child.
Who calls: the API to find its client, the worker to install one.
May touch: module state.
Invariants: after a fork nothing of the parent's runtime is reachable from here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, final

from poolray.client import Client
from poolray.ids import PlacementGroupId, TaskId
from poolray.protocol.actors import ActorSetup
from poolray.protocol.values import Placement

if TYPE_CHECKING:
    from poolray.local.fork_server import WorkerSetup


@final
class _State:
    """Facts of this process."""

    def __init__(self) -> None:
        #: The client that API calls use; None until `init`.
        self.client: Client | None = None
        #: How the worker was made; None in a driver.
        self.setup: WorkerSetup | None = None
        self.worker_id: bytes | None = None
        #: The task that runs (a worker's loop writes these).
        self.task_id: TaskId | None = None
        #: The task that was told to stop last.
        self.cancelled_task_id: TaskId | None = None
        #: Of calls that run at once in an actor, those that were told to stop.
        self.cancelled_calls: dict[TaskId, None] = {}
        self.task_name = ""
        self.function_name = ""
        self.task_resources: dict[str, int] = {}
        self.placement: Placement | None = None
        #: The actor that lives in this worker, if one does.
        self.actor: ActorSetup | None = None
        self.actor_label = ""
        self.is_reconstructed = False  #: its process had died
        self.is_async = False  #: it runs in event loops
        #: Resource name -> ids of the devices that this worker is to use.
        self.devices: dict[str, list[str]] = {}
        #: What the variables that name them were before; None: not set.
        self.variables_before: dict[str, str | None] = {}
        #: Those of which the driver's variable named the ids.
        self.named_devices: dict[str, None] = {}


_state = _State()
_NO_GROUP = PlacementGroupId(b"")
#: (task id, task name, function name) of the call that this thread or coroutine runs, in actors
#: that run several at once.
_concurrent_task: ContextVar[tuple[TaskId, str, str] | None] = ContextVar(
    "poolray_task", default=None
)
#: Guards the making of a runtime, so that two threads do not make two.
lock = threading.RLock()


def client() -> Client | None:
    """The process's client, if it has one."""
    return _state.client


def install_driver(made: Client | None) -> None:
    """API calls in this process use this client (None: none any more)."""
    _state.client = made


def install_worker(made: Client, setup: WorkerSetup) -> None:
    """This process is a worker with this client."""
    _state.client = made
    _state.setup = setup


def is_worker() -> bool:
    """Whether this process runs tasks."""
    return _state.setup is not None


def setup() -> WorkerSetup | None:
    """How this worker was made; None in a driver."""
    return _state.setup


def set_worker_id(worker_id: bytes) -> None:
    """The id of this worker."""
    _state.worker_id = worker_id


def worker_id() -> bytes | None:
    """The id of this worker; None in a driver."""
    return _state.worker_id


def begin_task(
    task_id: TaskId,
    name: str,
    function_name: str,
    resources: dict[str, int] | None,
    placement: Placement | None,
) -> None:
    """A worker's loop: this task runs now (without resources of its own: those stay)."""
    if placement is not _state.placement and _state.actor is None:
        set_placement(placement)
    _state.function_name = function_name
    _state.task_id = task_id
    _state.task_name = name
    if resources is not None:
        _state.task_resources = resources


def set_placement(placement: Placement | None) -> None:
    """What runs from now on is placed so: a task, or an actor with all its calls."""
    _state.placement = placement
    if _state.client is not None:
        captures = placement is not None and placement.captures
        _state.client.captured = placement.group if captures else _NO_GROUP  # type: ignore[union-attr]


def begin_concurrent_task(task_id: TaskId, name: str, function_name: str) -> None:
    """This thread or coroutine, of several, runs this task now."""
    _concurrent_task.set((task_id, name, function_name))


def become_actor(setup: ActorSetup) -> None:
    """An actor lives in this worker from now on."""
    _state.actor = setup


def become_async() -> None:
    """The actor runs in event loops."""
    _state.is_async = True


def is_async() -> bool:
    """Whether this worker's actor runs in event loops."""
    return _state.is_async


def set_reconstructed(is_reconstructed: bool) -> None:
    """Whether the actor's process has died before."""
    _state.is_reconstructed = is_reconstructed


def is_reconstructed() -> bool:
    """Whether this worker's actor has been restarted; False where there is none."""
    return _state.is_reconstructed


def actor() -> ActorSetup | None:
    """The actor that lives in this worker; None in drivers and in workers of tasks."""
    return _state.actor


def set_actor_label(label: str) -> None:
    """What lines that the actor prints begin with."""
    _state.actor_label = label


def output_label() -> str:
    """What lines that this worker prints begin with."""
    return _state.actor_label or current_task_name()


def current_task_id() -> TaskId | None:
    """The task that runs in this worker."""
    concurrent = _concurrent_task.get()
    return concurrent[0] if concurrent is not None else _state.task_id


def cancel_current_task() -> None:
    """A worker's loop: the task that runs was told to stop."""
    _state.cancelled_task_id = _state.task_id


def is_current_task_cancelled() -> bool:
    """Whether the task that runs was told to stop."""
    concurrent = _concurrent_task.get()
    if concurrent is not None:
        return concurrent[0] in _state.cancelled_calls
    return _state.task_id is not None and _state.task_id == _state.cancelled_task_id


def note_cancelled(task_id: TaskId) -> None:
    """One of several calls that run was told to stop."""
    _state.cancelled_calls[task_id] = None


def forget_cancelled(task_id: TaskId) -> None:
    """The call has ended."""
    _state.cancelled_calls.pop(task_id, None)


def current_task_name() -> str:
    """Its name; empty in a driver."""
    concurrent = _concurrent_task.get()
    return concurrent[1] if concurrent is not None else _state.task_name


def current_function_name() -> str:
    """Module and name of its function; empty in a driver."""
    concurrent = _concurrent_task.get()
    return concurrent[2] if concurrent is not None else _state.function_name


def current_task_resources() -> dict[str, int]:
    """What it was given, in units of 1/10,000."""
    return _state.task_resources


def current_placement() -> Placement | None:
    """Where it was to run: in which placement group, for one; None: anywhere."""
    return _state.placement


def use_devices(devices: dict[str, list[str]], variables: dict[str, str]) -> None:
    """A worker's loop: show user code these devices and no others.

    Parameters
    ----------
    devices : dict of str to list of str
        Resource name -> ids.
    variables : dict of str to str
        Resource name -> the variable for devices of that kind.
    """
    from poolray.scheduling.accelerators import is_left_alone, variables_for

    for name, value in _state.variables_before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _state.variables_before = {}
    if not _state.devices:
        named = (name for name, variable in variables.items() if variable in os.environ)
        _state.named_devices = dict.fromkeys(named)
    _state.devices = devices
    for resource, ids in devices.items():
        variable = variables.get(resource, "")
        if ids and not is_left_alone(variable, os.environ):
            for name, value in variables_for(resource, variable, ids).items():
                _state.variables_before[name] = os.environ.get(name)
                os.environ[name] = value


def current_devices() -> dict[str, list[str]]:
    """Resource name -> ids of the devices that the running task was given."""
    return _state.devices


def are_named(resource: str) -> bool:
    """Whether ids of devices are those of the driver's variable, not our numbers."""
    return resource in _state.named_devices


#: Called in a forked child, to close what belongs to the parent.
_forget: list[Callable[[], Any]] = []


def on_fork_in_child(call: Callable[[], Any]) -> None:
    """Register a clean-up for forked children of this process."""
    _forget.append(call)


def off_fork_in_child(call: Callable[[], Any]) -> None:
    """Take a clean-up back: what it closes has been closed."""
    if call in _forget:
        _forget.remove(call)


def _after_fork_in_child() -> None:
    global _state, lock
    _state = _State()
    lock = threading.RLock()
    calls, _forget[:] = list(_forget), []
    for call in calls:
        call()


os.register_at_fork(after_in_child=_after_fork_in_child)
