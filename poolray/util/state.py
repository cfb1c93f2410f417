"""What goes on in the runtime, row by row: tasks, workers, objects, nodes.

What: the calls and columns of `ray.util.state`, over what the node knows.
Who calls it: user code.
May touch: nothing beyond what `poolray.cluster_state` offers.
Invariants: a row is a snapshot; columns that exist in a cluster only are None.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from poolray.cluster_state import ask, wall_clock_offset_s
from poolray.ids import NodeId, job_of_group
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.local.machine import NODE_ADDRESS
from poolray.protocol.directory import JobRow, JobsFound, ListJobs
from poolray.protocol.inquiry import AskHead, read_answer
from poolray.protocol.placement import GroupRow
from poolray.protocol.state import (
    ActorRow,
    NodeRow,
    ObjectRow,
    StateKind,
    TaskRow,
    WorkerRow,
)
from poolray.protocol.values import CallKind
from poolray.remote_groups import group_rows, table_of
from poolray.scheduling.labels import describe_match
from poolray.scheduling.resources import from_fixed
from poolray.session import find_client, ids_of_process
from poolray.survey import actor_rows, object_rows, task_rows, worker_rows
from poolray.util.state_logs import get_log, list_logs
from poolray.util.state_rows import (
    ActorState,
    ClusterEventState,
    JobState,
    NodeState,
    ObjectState,
    PlacementGroupState,
    RuntimeEnvState,
    TaskState,
    WorkerState,
)
from poolray.util.state_select import Filter, at_nodes, select

__all__ = [
    "ActorState",
    "ClusterEventState",
    "JobState",
    "NodeState",
    "ObjectState",
    "PlacementGroupState",
    "RuntimeEnvState",
    "TaskState",
    "WorkerState",
    "get_actor",
    "get_job",
    "get_log",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_cluster_events",
    "list_jobs",
    "list_logs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_runtime_envs",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
]

_LIMIT = 100
_LIMIT_MAX = 10_000

_TASK_TYPES = {CallKind.CREATE: "ACTOR_CREATION_TASK", CallKind.METHOD: "ACTOR_TASK"}
_NORMAL = "NORMAL_TASK"
T = TypeVar("T")


def list_tasks(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[TaskState]:
    """Tasks of all nodes: those that have not ended, then the last that have, newest first.

    Parameters
    ----------
    address : str, optional
        None or "auto": the runtime of this process.
    filters : sequence of (column, "=" or "!=", value)
        All must hold; strings compare without regard to case.
    limit : int, default 100
        Rows at the most, up to 10,000.
    timeout : int, seconds
        How long to wait for other nodes; on one machine the answer comes at once.
    detail : bool, default False
        Fill in all columns.
    raise_on_missing_output : bool
        Whether it is an error if a node has not answered in time, or died meanwhile; else a
        warning names it. On one machine nothing is ever missing.

    Raises
    ------
    StateApiError
        A node has not answered.
    ValueError
        Another address, an unknown column or predicate, a limit out of range.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.state import list_tasks
    >>> poolray.get(poolray.remote(lambda: 1).options(name="listed").remote())
    1
    >>> [task.state for task in list_tasks(filters=[("name", "=", "listed")])]
    ['FINISHED']
    """
    _check(address, limit)
    rows = task_rows(
        timeout, **at_nodes(StateKind.TASKS, limit, filters), strict=raise_on_missing_output
    )
    node_id, job_id = ids_of_process()
    offset_s = wall_clock_offset_s()
    return select(
        (_task(row, node_id, job_id, offset_s) for row in rows),
        TaskState,
        filters,
        limit,
        detail,
    )


def _task(row: TaskRow, own_node: NodeId, own_job: bytes, offset_s: float) -> TaskState:
    return TaskState(
        task_id=row.task_id.hex(),
        attempt_number=row.attempt,
        name=row.name,
        state=row.state,
        job_id=(job_of_group(row.group_id) or own_job).hex(),
        type=_TASK_TYPES.get(row.kind, _NORMAL),
        func_or_class_name=_function_of(row),
        actor_id=row.actor_id.hex() or None,
        parent_task_id=row.parent_id.hex() or None,
        node_id=(row.node_id or own_node).hex() if row.worker_id else None,
        worker_id=row.worker_id.hex() if row.worker_id else None,
        worker_pid=row.pid or None,
        error_type=row.error_type or None,
        language="PYTHON",
        required_resources=from_fixed(row.required),
        start_time_ms=_date_ms(row.started_s, offset_s),
        end_time_ms=_date_ms(row.ended_s, offset_s),
        error_message=row.error_message or None,
        runtime_env_info={},
    )


def _function_of(row: TaskRow) -> str:
    """A function's name without its module; of an actor's call with its class."""
    if row.kind == CallKind.METHOD:
        return row.function_name
    name = row.function_name.rpartition(".")[2]
    return f"{name}.__init__" if row.kind == CallKind.CREATE else name


def list_actors(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ActorState]:
    """Actors: those that are not dead, then the last that died, newest first; see `list_tasks`.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.state import list_actors
    >>> @poolray.remote
    ... class Seen:
    ...     def ping(self) -> None: ...
    >>> seen = Seen.options(name="seen").remote()
    >>> poolray.get(seen.ping.remote())
    >>> [actor.state for actor in list_actors(filters=[("name", "=", "seen")])]
    ['ALIVE']
    """
    _check(address, limit)
    rows = actor_rows(
        timeout, **at_nodes(StateKind.ACTORS, limit, filters), strict=raise_on_missing_output
    )
    node_id, job_id = ids_of_process()
    return select(
        (_actor(row, node_id, job_id) for row in rows),
        ActorState,
        filters,
        limit,
        detail,
    )


def _actor(row: ActorRow, own_node: NodeId, own_job: bytes) -> ActorState:
    return ActorState(
        actor_id=row.actor_id.hex(),
        class_name=row.class_name,
        state=row.state,
        job_id=(job_of_group(row.group_id) or own_job).hex(),
        name=row.name,
        node_id=(row.node_id or own_node).hex() if row.pid else None,
        pid=row.pid,
        ray_namespace=row.namespace,
        required_resources=from_fixed(row.required),
        death_cause={"error_message": row.death_cause} if row.death_cause else None,
        is_detached=row.is_detached,
        repr_name=row.repr_name,
        num_restarts=row.restarts,
        num_restarts_due_to_lineage_reconstruction=0,
        num_restarts_due_to_node_preemption=0,
    )


def list_workers(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[WorkerState]:
    """Workers, also those that have ended not long ago; see `list_tasks`."""
    _check(address, limit)
    rows = worker_rows(
        timeout, **at_nodes(StateKind.WORKERS, limit, filters), strict=raise_on_missing_output
    )
    own = ids_of_process()[0]
    offset_s, hosts = wall_clock_offset_s(), _hosts()
    return select(
        (_worker(row, row.node_id or own, hosts, offset_s) for row in rows),
        WorkerState,
        filters,
        limit,
        detail,
    )


def _worker(
    row: WorkerRow, node_id: NodeId, hosts: Mapping[NodeId, str], offset_s: float
) -> WorkerState:
    from poolray.exceptions import describe_exit

    exit_type = detail = None
    if not row.is_alive:
        clean = row.was_told or row.exit_code == 0
        exit_type = "INTENDED_USER_EXIT" if clean else "SYSTEM_ERROR"
        if row.out_of_memory:
            exit_type = "NODE_OUT_OF_MEMORY"
        detail = f"The worker {describe_exit(row.exit_code, row.signal)}"
    return WorkerState(
        worker_id=row.worker_id.hex(),
        is_alive=row.is_alive,
        worker_type="WORKER",
        exit_type=exit_type,
        node_id=node_id.hex(),
        ip=hosts.get(node_id, NODE_ADDRESS),
        pid=row.pid,
        exit_detail=detail,
        start_time_ms=_date_ms(row.started_s, offset_s),
        end_time_ms=_date_ms(row.ended_s, offset_s),
    )


def list_objects(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ObjectState]:
    """Objects that somebody holds; see `list_tasks`."""
    _check(address, limit)
    rows = object_rows(
        timeout, **at_nodes(StateKind.OBJECTS, limit, filters), strict=raise_on_missing_output
    )
    return select(_objects(rows), ObjectState, filters, limit, detail)


def _objects(rows: Iterable[ObjectRow]) -> Iterator[ObjectState]:
    own, hosts = ids_of_process()[0], _hosts()
    for row in rows:
        yield _object(row, hosts.get(row.node_id or own, NODE_ADDRESS))


def _object(row: ObjectRow, host: str) -> ObjectState:
    return ObjectState(
        object_id=row.object_id.hex(),
        object_size=row.size_bytes,
        task_status="FINISHED" if row.is_ready else "PENDING",
        reference_type="PINNED_IN_MEMORY" if row.in_store else "LOCAL_REFERENCE",
        reference_count=row.holders,
        is_error=row.is_error,
        ip=host,
        call_site=row.call_site or "disabled",
    )


def list_nodes(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[NodeState]:
    """Machines; see `list_tasks`."""
    _check(address, limit)
    rows = cast("list[NodeRow]", ask(StateKind.NODES))
    return select((_node(row) for row in rows), NodeState, filters, limit, detail)


def _host_of(row: NodeRow) -> str:
    return row.address.rpartition(":")[0].strip("[]") or NODE_ADDRESS


def _hosts() -> dict[NodeId, str]:
    """Where the nodes are."""
    return {row.node_id: _host_of(row) for row in cast("list[NodeRow]", ask(StateKind.NODES))}


def _node(row: NodeRow) -> NodeState:
    address = _host_of(row)
    return NodeState(
        node_id=row.node_id.hex(),
        node_ip=address,
        is_head_node=not row.address or bool(row.info.get("is_head")),
        state="ALIVE" if row.is_alive else "DEAD",
        node_name=address,
        resources_total=from_fixed(row.total),
        labels=row.labels,
    )


def list_jobs(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[JobState]:
    """Jobs of the cluster: those that run, then those that have ended; see `list_tasks`.

    Examples
    --------
    >>> from poolray.util.state import list_jobs
    >>> [job.status for job in list_jobs()]
    ['RUNNING']
    """
    _check(address, limit)
    own = _job()
    question = ListJobs(request_id=0)
    found = find_client().link.ask(lambda n: AskHead(request_id=n, question=question))
    answer = read_answer(found if isinstance(found, list) else [found])
    assert isinstance(answer, JobsFound)
    rows = {row.job_id.hex(): _other_job(row) for row in answer.jobs}
    if not process_state.is_worker() or own.job_id not in rows:
        rows = {
            own.job_id: own,
            **{job_id: rows[job_id] for job_id in rows if job_id != own.job_id},
        }
    return select(rows.values(), JobState, filters, limit, detail)


def _other_job(row: JobRow) -> JobState:
    """The job of another driver, as the head tells of it."""
    status = "RUNNING" if row.is_running else "FAILED" if row.reason else "SUCCEEDED"
    return JobState(
        job_id=row.job_id.hex(),
        type="DRIVER",
        status=status,
        entrypoint=row.entrypoint,
        message=row.reason or None,
        driver_info={"id": row.job_id.hex(), **row.info},
        metadata={},
        runtime_env={},
        driver_node_id=row.node_id.hex(),
    )


def _job() -> JobState:
    find_client()
    node_id, job_id = ids_of_process()
    runtime = local_runtime.current()
    in_driver = not process_state.is_worker() and runtime is not None
    info: dict[str, Any] = {"id": job_id.hex(), "node_ip_address": NODE_ADDRESS}
    if in_driver:
        info["pid"] = str(os.getpid())
    # (A forked worker has the driver's command line; a spawned one its own.)
    return JobState(
        job_id=job_id.hex(),
        type="DRIVER",
        status="RUNNING",
        entrypoint=" ".join([os.path.basename(sys.executable), *sys.argv]),
        driver_info=info,
        metadata={},
        runtime_env={},
        driver_node_id=node_id.hex(),
    )


def list_runtime_envs(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[RuntimeEnvState]:
    """Runtime environments that were made: none, in this version; see `list_tasks`."""
    _check(address, limit)
    find_client()
    return select([], RuntimeEnvState, filters, limit, detail)


def list_cluster_events(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ClusterEventState]:
    """What happened to the cluster: ends of workers that were not asked for; see `list_tasks`."""
    _check(address, limit)
    offset_s = wall_clock_offset_s()
    rows = worker_rows(timeout, strict=raise_on_missing_output)
    events = (_event(row, offset_s) for row in rows if not row.is_alive and not row.was_told)
    return select(events, ClusterEventState, filters, limit, detail)


def _event(row: WorkerRow, offset_s: float) -> ClusterEventState:
    from poolray.exceptions import describe_exit

    how = describe_exit(row.exit_code, row.signal)
    why = " because memory was short" if row.out_of_memory else ""
    return ClusterEventState(
        severity="ERROR",
        time=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.ended_s + offset_s)),
        source_type="RAYLET",
        message=f"Worker {row.worker_id.hex()} (pid {row.pid}) {how}{why}.",
        event_id=row.worker_id.hex(),
        custom_fields={"pid": row.pid, "out_of_memory": row.out_of_memory},
    )


def list_placement_groups(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = _LIMIT,
    timeout: int = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[PlacementGroupState]:
    """Placement groups, also those that were removed not long ago; see `list_tasks`.

    Examples
    --------
    >>> from poolray.util.placement_group import placement_group, remove_placement_group
    >>> from poolray.util.state import list_placement_groups
    >>> group = placement_group([{"CPU": 1}], name="listed")
    >>> group.wait(10)
    True
    >>> [row.state for row in list_placement_groups(filters=[("name", "=", "listed")])]
    ['CREATED']
    >>> remove_placement_group(group)
    """
    _check(address, limit)
    return select(map(_group, group_rows()), PlacementGroupState, filters, limit, detail)


def _group(row: GroupRow) -> PlacementGroupState:
    spec, group_id = row.spec, row.spec.group_id.hex()
    table = table_of(row)
    return PlacementGroupState(
        placement_group_id=group_id,
        name=spec.name,
        creator_job_id=spec.job_id.hex(),
        state=table["state"],
        bundles=[
            {
                "bundle_id": {"placement_group_id": group_id, "bundle_index": index},
                "unit_resources": bundle,
                "node_id": table["bundles_to_node_id"][index],
                "label_selector": {
                    match.key: describe_match(match)
                    for match in (spec.labels[index] if spec.labels else [])
                },
            }
            for index, bundle in table["bundles"].items()
        ],
        is_detached=spec.detached,
        stats=table["stats"],
    )


def get_placement_group(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> PlacementGroupState | None:
    """The placement group with this id, with all columns; None if there is none."""
    rows = list_placement_groups(address, [("placement_group_id", "=", id)], detail=True)
    return _first(rows)


def get_job(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> JobState | None:
    """The job with this id, with all columns; None if there is none."""
    return _first(list_jobs(address, [("job_id", "=", id)], detail=True))


def get_task(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> TaskState | list[TaskState] | None:
    """The task with this id, with all columns; None if it is not known (any more).

    Of a task that was tried several times: a row for each attempt, the last one first.
    """
    rows = list_tasks(address, [("task_id", "=", _hex(id))], timeout=timeout, detail=True)
    return rows if len(rows) > 1 else _first(rows)


def get_actor(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> ActorState | None:
    """The actor with this id, with all columns; None if it is not known (any more)."""
    return _first(list_actors(address, [("actor_id", "=", _hex(id))], _LIMIT_MAX, detail=True))


def get_worker(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> WorkerState | None:
    """The worker with this id, with all columns; None if it is not known (any more)."""
    return _first(list_workers(address, [("worker_id", "=", id)], detail=True))


def get_node(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> NodeState | None:
    """The machine with this id, with all columns; None if there is none."""
    return _first(list_nodes(address, [("node_id", "=", id)], detail=True))


def get_objects(
    id: str,
    address: str | None = None,
    timeout: int = 30,
) -> list[ObjectState]:
    """What is known of the object with this id: one row, or none."""
    return list_objects(address, [("object_id", "=", id)], detail=True)


def summarize_tasks(
    address: str | None = None, timeout: int = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Numbers of tasks by function and state.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.state import summarize_tasks
    >>> sorted(summarize_tasks()["cluster"])
    ['summary', 'summary_by', 'total_actor_scheduled', 'total_actor_tasks', 'total_tasks']
    """
    _check(address, _LIMIT)
    summary: dict[str, dict[str, Any]] = {}
    totals = {_NORMAL: 0, "ACTOR_TASK": 0, "ACTOR_CREATION_TASK": 0}
    for row in task_rows(timeout, strict=raise_on_missing_output):
        kind = _TASK_TYPES.get(row.kind, _NORMAL)
        totals[kind] += 1
        name = _function_of(row)
        entry = summary.setdefault(
            name, {"func_or_class_name": name, "type": kind, "state_counts": {}}
        )
        counts = entry["state_counts"]
        counts[row.state] = counts.get(row.state, 0) + 1
    return {
        "cluster": {
            "summary": summary,
            "total_tasks": totals[_NORMAL],
            "total_actor_tasks": totals["ACTOR_TASK"],
            "total_actor_scheduled": totals["ACTOR_CREATION_TASK"],
            "summary_by": "func_name",
        }
    }


def summarize_actors(
    address: str | None = None, timeout: int = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Numbers of actors by class and state.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.state import summarize_actors
    >>> sorted(summarize_actors()["cluster"])
    ['summary', 'summary_by', 'total_actors']
    """
    _check(address, _LIMIT)
    rows = actor_rows(timeout, strict=raise_on_missing_output)
    summary: dict[str, dict[str, Any]] = {}
    for row in rows:
        fresh: dict[str, Any] = {"class_name": row.class_name, "state_counts": {}}
        counts = summary.setdefault(row.class_name, fresh)["state_counts"]
        counts[row.state] = counts.get(row.state, 0) + 1
    return {"cluster": {"summary": summary, "total_actors": len(rows), "summary_by": "class"}}


def summarize_objects(
    address: str | None = None, timeout: int = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Numbers and bytes of objects, by where their first refs were made if that is recorded."""
    _check(address, _LIMIT)
    rows = list(_objects(object_rows(timeout, strict=raise_on_missing_output)))
    sites = sorted({row.call_site for row in rows})
    by_site = {site: _object_counts([r for r in rows if r.call_site == site]) for site in sites}
    return {
        "cluster": {
            "summary": by_site,
            **_object_counts(rows),
            "callsite_enabled": any(site != "disabled" for site in sites),
            "summary_by": "callsite",
        }
    }


def _object_counts(rows: list[ObjectState]) -> dict[str, Any]:
    states: dict[str, int] = {}
    references: dict[str, int] = {}
    for row in rows:
        states[row.task_status] = states.get(row.task_status, 0) + 1
        references[row.reference_type] = references.get(row.reference_type, 0) + 1
    return {
        "total_objects": len(rows),
        "total_size_mb": sum(max(0, row.object_size) for row in rows) / 2**20,
        "task_state_counts": states,
        "ref_type_counts": references,
    }


# ---- what they share -----------------------------------------------------------------------------


def _check(address: str | None, limit: int) -> None:
    if address not in (None, "auto", "local", os.environ.get("RAY_ADDRESS")):
        raise ValueError(f"address={address!r}: only the runtime of this process can be asked.")
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a number of rows: {limit!r}")
    if limit > _LIMIT_MAX:
        raise ValueError(f"Given limit {limit} exceeds the supported limit {_LIMIT_MAX}.")


def _first(rows: list[T]) -> T | None:
    return rows[0] if rows else None


def _hex(task_id: Any) -> str:
    return task_id if isinstance(task_id, str) else task_id.hex()


def _date_ms(time_s: float, offset_s: float) -> int | None:
    return int((time_s + offset_s) * 1000) if time_s else None
