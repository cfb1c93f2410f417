"""`get_runtime_context()`: what the running code may know of where it runs.

What: ids, names and resources of the process's node, job and task.
Who calls: users.
May touch: nothing.
Invariants: in a driver whatever belongs to a task is None.
"""

from __future__ import annotations

from typing import Any, final

from poolray.actor import ActorHandle, current_actor
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.public_ids import ActorID, JobID, NodeID, PlacementGroupID, TaskID
from poolray.scheduling.resources import from_fixed
from poolray.session import (
    cluster_runtime,
    find_client,
    ids_of_process,
    namespace_of_driver,
    runtime_of_driver,
)

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
        return ids_of_process()

    def get(self) -> dict[str, Any]:
        """What there is, by name: `job_id`, `node_id`, `namespace`, in a worker `task_id` and
        `actor_id`.
        """
        facts: dict[str, Any] = {
            "job_id": self.job_id,
            "node_id": self.node_id,
            "namespace": self.namespace,
        }
        if process_state.is_worker():
            facts["task_id"] = self.task_id
            if self.actor_id is not None:
                facts["actor_id"] = self.actor_id
        return facts

    @property
    def job_id(self) -> JobID:
        """The id behind `get_job_id()`."""
        return JobID(self._ids()[1])

    @property
    def node_id(self) -> NodeID:
        """The id behind `get_node_id()`."""
        return NodeID(self._ids()[0])

    @property
    def task_id(self) -> TaskID | None:
        """The id behind `get_task_id()`.

        Raises
        ------
        AssertionError
            In a driver, as in the reference.
        """
        self._check_worker()
        task_id = process_state.current_task_id()
        return TaskID(task_id) if task_id is not None else None

    @property
    def actor_id(self) -> ActorID | None:
        """The id behind `get_actor_id()`.

        Raises
        ------
        AssertionError
            In a driver, as in the reference.
        """
        self._check_worker()
        actor = process_state.actor()
        return ActorID(actor.actor_id) if actor is not None else None

    @property
    def current_placement_group_id(self) -> PlacementGroupID:
        """The id behind `get_placement_group_id()`; outside of a group it is nil."""
        placement = process_state.current_placement()
        if placement is None or not placement.group:
            return PlacementGroupID.nil()
        return PlacementGroupID(placement.group)

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        """Whether tasks that the running task submits run in its placement group as well."""
        placement = process_state.current_placement()
        return placement is not None and placement.captures

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether the running actor was restarted after its process had died; False in tasks.

        Raises
        ------
        AssertionError
            In a driver, as in the reference.
        """
        self._check_worker()
        return process_state.is_reconstructed()

    def _check_worker(self) -> None:
        assert process_state.is_worker(), (
            "This method is only available when the process is a worker."
        )

    def get_node_labels(self) -> dict[str, str]:
        """The node's labels: those that `init` was given, and its id."""
        setup = process_state.setup()
        if setup is not None:
            return dict(setup.labels)
        connection = cluster_runtime()
        if connection is not None:
            return dict(connection.welcome.labels)
        runtime = local_runtime.current()
        assert runtime is not None  # `get_runtime_context` has started it
        return dict(runtime.node.state.labels)

    def get_temp_dir(self) -> str:
        """The folder for temporary files, in which runtimes make folders of their own."""
        import tempfile

        return tempfile.gettempdir()

    def get_session_name(self) -> str:
        """A name for this run of the runtime."""
        return f"session_{self.get_job_id()}"

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Ids of the devices that the running task was given, by resource name.

        Every kind of device is there; a driver has none of any.
        """
        from poolray.scheduling import accelerators  # few programs ask

        devices = process_state.current_devices()
        return {name: list(devices.get(name, [])) for name in accelerators.RESOURCES}

    def get_resource_ids(self) -> dict[str, list[str]]:
        """The same as `get_accelerator_ids()`."""
        return self.get_accelerator_ids()

    def get_worker_id(self) -> str:
        """The id of this process among the workers, 56 hexadecimal digits; a driver has one too."""
        worker_id = process_state.worker_id()
        if worker_id is not None:
            return worker_id.hex()
        return runtime_of_driver().driver_id.hex()

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
        """The placement group's id, 36 hexadecimal digits; None outside of one."""
        placement = process_state.current_placement()
        return placement.group.hex() if placement is not None and placement.group else None

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

        In a task the KeyboardInterrupt tells it too; this is for code that has caught that and
        cleans up. Calls of actors are not interrupted: one that may take long asks now and then.

        Raises
        ------
        RuntimeError
            In a driver; in an actor with coroutine methods, whose calls are cancelled as asyncio
            does it.
        """
        if not process_state.is_worker():
            raise RuntimeError("is_canceled is for tasks, not for a driver")
        if process_state.is_async():
            raise RuntimeError("This method is not supported in an async actor.")
        return process_state.is_current_task_cancelled()

    @property
    def namespace(self) -> str:
        """The namespace of the job."""
        setup = process_state.setup()
        return setup.namespace if setup is not None else namespace_of_driver()

    @property
    def gcs_address(self) -> str:
        """Where the head is: "local" without a cluster."""
        setup = process_state.setup()
        if setup is not None:
            return setup.head_address or "local"
        connection = cluster_runtime()
        return connection.welcome.head_address if connection is not None else "local"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment: none."""
        return {}

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
