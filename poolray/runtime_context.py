"""`get_runtime_context()`: what the running code may know of where it runs.

What: ids, names and resources of the process's node, job and task.
Who calls: users.
May touch: nothing.
Invariants: in a driver whatever belongs to a task is None.
"""

from __future__ import annotations

from typing import Any, final

from poolray.actor import ActorHandle, current_actor
from poolray.api import find_client, namespace_of_driver
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.scheduling.resources import from_fixed

__all__ = ["RuntimeContext", "get_runtime_context"]


@final
class RuntimeContext:
    """Facts of the running code. Made by `get_runtime_context`."""

    def get_node_id(self) -> str:
        """The node's id, 56 hexadecimal digits."""
        return self._ids()[0].hex()

    def get_job_id(self) -> str:
        """The job's id, 8 hexadecimal digits; a job is what one driver started."""
        return self._ids()[1].hex()

    def _ids(self) -> tuple[bytes, bytes]:
        setup = process_state.setup()
        if setup is not None:
            return setup.node_id, setup.job_id
        runtime = local_runtime.current()
        assert runtime is not None  # `get_runtime_context` has started it
        return runtime.node_id, runtime.job_id

    def get_worker_id(self) -> str:
        """The id of this process among the workers, 56 hexadecimal digits; a driver has one too."""
        worker_id = process_state.worker_id()
        if worker_id is not None:
            return worker_id.hex()
        runtime = local_runtime.current()
        assert runtime is not None
        return runtime.driver_id.hex()

    def get_task_id(self) -> str | None:
        """The running task's id, 48 hexadecimal digits; None in a driver."""
        task_id = process_state.current_task_id()
        return task_id.hex() if task_id is not None else None

    def get_task_name(self) -> str | None:
        """The running task's name; None in a driver."""
        return process_state.current_task_name() or None

    def get_task_function_name(self) -> str | None:
        """Module and name of the running task's function; None in a driver."""
        return process_state.current_function_name() or None

    def get_actor_id(self) -> str | None:
        """The running actor's id, 32 hexadecimal digits; None in drivers and tasks."""
        actor = process_state.actor()
        return actor.actor_id.hex() if actor is not None else None

    def get_actor_name(self) -> str | None:
        """The running actor's name, empty if it has none; None in drivers and tasks."""
        actor = process_state.actor()
        return actor.name if actor is not None else None

    @property
    def current_actor(self) -> ActorHandle[Any]:
        """A handle to the running actor.

        Raises
        ------
        RuntimeError
            In drivers and tasks.
        """
        return current_actor()

    def get_placement_group_id(self) -> str | None:
        """None: the task is in no placement group."""
        return None

    def get_assigned_resources(self) -> dict[str, float]:
        """What the running task was given, by resource name.

        Raises
        ------
        AssertionError
            In a driver, as in the reference.
        """
        assert process_state.is_worker(), "get_assigned_resources is for tasks, not for a driver"
        return from_fixed(process_state.current_task_resources())

    def is_canceled(self) -> bool:
        """Whether the running task was told to stop by `cancel`.

        The KeyboardInterrupt tells it too; this is for code that has caught that and cleans up.

        Raises
        ------
        RuntimeError
            In a driver.
        """
        if not process_state.is_worker():
            raise RuntimeError("is_canceled is for tasks, not for a driver")
        return process_state.is_current_task_cancelled()

    @property
    def namespace(self) -> str:
        """The namespace of the job."""
        setup = process_state.setup()
        return setup.namespace if setup is not None else namespace_of_driver()

    @property
    def gcs_address(self) -> str:
        """Where the head is: "local" without a cluster."""
        return "local"

    def get_runtime_env_string(self) -> str:
        """The runtime environment as JSON: none."""
        return "{}"


_context = RuntimeContext()


def get_runtime_context() -> RuntimeContext:
    """Facts of the running code; starts the runtime if there is none.

    Examples
    --------
    >>> import poolray
    >>> poolray.get_runtime_context().get_task_id() is None
    True
    """
    find_client()
    return _context
