"""The rows of `poolray.util.state`, and their columns.

What: one record for each kind of thing that is listed.
Who calls: `poolray/util/state.py`, which hands them to users.
May touch: nothing.
Invariants: a row is a snapshot; columns have the names of the reference's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast, final


class Row:
    """A row that can also be read like a dictionary."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """A column, or `default` if there is none of that name."""
        return getattr(self, name, default)

    def asdict(self) -> dict[str, Any]:
        """All columns."""
        return {field.name: getattr(self, field.name) for field in columns(type(self))}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskState(Row):
    """A task that has not ended, or one of the last `task_history_max` that have.

    Attributes
    ----------
    type : str
        "NORMAL_TASK", "ACTOR_CREATION_TASK" or "ACTOR_TASK".
    attempt_number : int
        How often it was tried before.
    state : str
        "PENDING_ARGS_AVAIL", "PENDING_NODE_ASSIGNMENT", "SUBMITTED_TO_WORKER", "RUNNING",
        "FINISHED" or "FAILED".
    error_type, error_message : str or None
        Of a failed one, "WORKER_DIED" or "TASK_EXECUTION_EXCEPTION" for example.
    start_time_ms, end_time_ms : int or None
        Milliseconds since 1970.
    """

    task_id: str
    attempt_number: int
    name: str
    state: str
    job_id: str
    type: str
    func_or_class_name: str
    node_id: str | None
    worker_id: str | None
    worker_pid: int | None
    error_type: str | None
    actor_id: str | None = None
    parent_task_id: str | None = None
    language: str | None = None
    required_resources: dict[str, float] | None = None
    placement_group_id: str | None = None
    start_time_ms: int | None = None
    end_time_ms: int | None = None
    error_message: str | None = None
    runtime_env_info: dict[str, Any] | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorState(Row):
    """An actor, alive or dead for not long.

    Attributes
    ----------
    state : str
        "DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING" or "DEAD".
    name : str
        Empty if it has none.
    pid : int
        Of its process, or of the last one it had; 0: it was never created.
    required_resources : dict or None
        What it keeps for its life.
    death_cause : dict or None
        `error_message`: why a dead one died.
    repr_name : str or None
        What it says of itself, if its class defines `__repr__`; else empty.
    """

    actor_id: str
    class_name: str
    state: str
    job_id: str
    name: str | None
    node_id: str | None
    pid: int | None
    ray_namespace: str | None
    serialized_runtime_env: str | None = None
    required_resources: dict[str, float] | None = None
    death_cause: dict[str, Any] | None = None
    is_detached: bool | None = None
    placement_group_id: str | None = None
    repr_name: str | None = None
    num_restarts: int | None = None
    num_restarts_due_to_lineage_reconstruction: int | None = None
    num_restarts_due_to_node_preemption: int | None = None
    call_site: str | None = None
    label_selector: dict[str, str] | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerState(Row):
    """A worker, alive or dead for not long."""

    worker_id: str
    is_alive: bool
    worker_type: str  #: "WORKER"
    exit_type: str | None  #: "INTENDED_USER_EXIT", "SYSTEM_ERROR" or "NODE_OUT_OF_MEMORY"
    node_id: str
    ip: str
    pid: int
    exit_detail: str | None = None
    start_time_ms: int | None = None
    end_time_ms: int | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectState(Row):
    """An object that somebody holds."""

    object_id: str
    object_size: int  #: bytes as serialized; -1: it is not there yet
    task_status: str  #: "FINISHED" or "PENDING", of what makes it
    reference_type: str  #: "PINNED_IN_MEMORY" when in shared memory, else "LOCAL_REFERENCE"
    reference_count: int  #: processes, tasks and objects that hold it
    is_error: bool
    ip: str
    call_site: str  #: where its first ref was made; "disabled" unless that is recorded


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeState(Row):
    """A machine."""

    node_id: str
    node_ip: str
    is_head_node: bool
    state: str
    node_name: str
    resources_total: dict[str, float]
    labels: dict[str, str]
    state_message: str | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class JobState(Row):
    """What one driver has started."""

    job_id: str
    type: str  #: "DRIVER"
    status: str  #: "RUNNING", "SUCCEEDED" or "FAILED"
    entrypoint: str  #: the driver's command line
    submission_id: str | None = None
    message: str | None = None
    error_type: str | None = None
    driver_info: dict[str, Any] | None = None  #: `id` of the job, `node_ip_address`, `pid`
    start_time: int | None = None  #: milliseconds since 1970
    end_time: int | None = None
    metadata: dict[str, str] | None = None
    runtime_env: dict[str, Any] | None = None
    driver_node_id: str | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeEnvState(Row):
    """A runtime environment that was made."""

    runtime_env: dict[str, Any]
    success: bool
    node_id: str
    creation_time_ms: float | None = None
    ref_cnt: int | None = None
    error: str | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterEventState(Row):
    """Something that happened to the cluster: here, the death of a worker."""

    severity: str  #: "ERROR", or "INFO" where the worker had been told to end
    time: str  #: local date and time
    source_type: str  #: "RAYLET"
    message: str
    event_id: str
    custom_fields: dict[str, Any] | None = None


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementGroupState(Row):
    """A placement group, or one of the last that were removed."""

    placement_group_id: str
    name: str
    creator_job_id: str
    state: str  #: "PENDING", "CREATED", "RESCHEDULING" or "REMOVED"
    #: Of each its `bundle_id`, `unit_resources`, `node_id` and `label_selector`.
    bundles: list[dict[str, Any]] | None = None
    is_detached: bool | None = None
    stats: dict[str, Any] | None = None  #: as `placement_group_table` has them


def columns(kind: type[Row]) -> tuple[dataclasses.Field[Any], ...]:
    """The columns of a kind of rows."""
    return dataclasses.fields(cast("Any", kind))
