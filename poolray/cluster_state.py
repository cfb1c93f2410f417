"""What there is and what goes on: resources, nodes, devices, the timeline.

What: asks the node and puts its answers in the form that Ray Core users know.
Who calls: users, as `poolray.nodes` and so on; `poolray.util.state` for its rows.
May touch: the clock, to turn the node's times into dates; a file that `timeline` is told to write.
Invariants: nothing is cached: an answer is what the node knew a moment ago.
"""

from __future__ import annotations

import time
from typing import Any, cast

from poolray.ids import NodeId, job_of_group
from poolray.local import process_state
from poolray.local.machine import NODE_ADDRESS
from poolray.protocol.state import NodeRow, StateKind, StateRow, TaskRow
from poolray.scheduling.resources import from_fixed
from poolray.session import find_client, ids_of_process
from poolray.survey import query, task_rows

#: How long `timeline` waits for other nodes.
_TIMELINE_TIMEOUT_S = 30.0

__all__ = ["available_resources", "cluster_resources", "get_gpu_ids", "nodes", "timeline"]


def ask(kind: StateKind) -> list[StateRow]:
    """What the node tells; starts the runtime if there is none."""
    return query(kind)[0]


def _nodes() -> list[NodeRow]:
    return cast("list[NodeRow]", ask(StateKind.NODES))


def _sum(tables: list[dict[str, int]]) -> dict[str, float]:
    total: dict[str, int] = {}
    for table in tables:
        for name, amount in table.items():
            total[name] = total.get(name, 0) + amount
    return from_fixed(total)


def wall_clock_offset_s() -> float:
    """What to add to a time of the node to make it one since 1970."""
    return time.time() - time.monotonic()


def cluster_resources() -> dict[str, float]:
    """What there is in all, by resource name.

    Examples
    --------
    >>> import poolray
    >>> poolray.cluster_resources()["CPU"] >= 1
    True
    """
    return _sum([row.total for row in _nodes() if row.is_alive])


def available_resources() -> dict[str, float]:
    """What of it is free at the moment; what is used up is left out.

    Examples
    --------
    >>> import poolray
    >>> poolray.available_resources().keys() <= poolray.cluster_resources().keys()
    True
    """
    return _sum([row.available for row in _nodes() if row.is_alive])


def nodes() -> list[dict[str, Any]]:
    """The machines: one without a cluster; those that have gone lately are among them.

    Returns
    -------
    list of dict
        `NodeID` (hex), `Alive`, `NodeManagerAddress`, `NodeManagerHostname`, `Resources`, `Labels`
        and further keys that Ray Core gives; ports and sockets that do not exist are 0 and empty.

    Examples
    --------
    >>> import poolray
    >>> [node["Alive"] for node in poolray.nodes()]
    [True]
    """
    import socket

    hostname = socket.gethostname()
    return [_describe(row, hostname) for row in _nodes()]


def _host_of(row: NodeRow) -> str:
    return row.address.rpartition(":")[0].strip("[]") or NODE_ADDRESS


def _describe(row: NodeRow, hostname: str) -> dict[str, Any]:
    port = row.address.rpartition(":")[2]
    address = _host_of(row)
    return {
        "NodeID": row.node_id.hex(),
        "Alive": row.is_alive,
        "NodeManagerAddress": address,
        "NodeManagerHostname": row.info.get("hostname", hostname),
        "NodeManagerPort": int(port or 0),
        "ObjectManagerPort": int(port or 0),
        "ObjectStoreSocketName": "",
        "RayletSocketName": row.info.get("socket", ""),
        "MetricsExportPort": 0,
        "MetricsAgentPort": 0,
        "DashboardAgentListenPort": 0,
        "NodeName": address,
        "RuntimeEnvAgentPort": 0,
        "DeathReason": 0,
        "DeathReasonMessage": "",
        "alive": row.is_alive,
        "Resources": from_fixed(row.total) if row.is_alive else {},
        "Labels": row.labels,
    }


def get_gpu_ids() -> list[int] | list[str]:
    """Ids of the GPUs that the running task was given; none in a driver.

    Returns
    -------
    list of int or list of str
        Numbers from 0 on; where `CUDA_VISIBLE_DEVICES` was set when the runtime was started, the
        ids that it names.

    Examples
    --------
    >>> import poolray
    >>> poolray.shutdown()
    >>> context = poolray.init(num_gpus=2)
    >>> poolray.get(poolray.remote(num_gpus=1)(poolray.get_gpu_ids).remote())
    [0]
    >>> poolray.shutdown()
    """
    find_client()
    ids = process_state.current_devices().get("GPU", [])
    return ids if process_state.are_named("GPU") else [int(each) for each in ids]


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """What ran where and when, for `chrome://tracing` or Perfetto.

    Parameters
    ----------
    filename : str, optional
        Where to write it, as JSON; None returns it.

    Returns
    -------
    list of dict or None
        One "X" event for each task that has ended, in microseconds since 1970, `pid` standing for
        the node and `tid` for the worker; then "M" events with the names of these.

    Notes
    -----
    Each node remembers the last `task_history_max` tasks that it ran or submitted. The events of
    all nodes are on one clock, as good as half of the time that asking them took. Tasks so short
    that several are reported together share the time that they took evenly.

    Examples
    --------
    >>> import poolray
    >>> poolray.get(poolray.remote(lambda: 1).options(name="one").remote())
    1
    >>> [event["ph"] for event in poolray.timeline() if event["name"] == "one"]
    ['X']
    """
    events = _trace([row for row in task_rows(_TIMELINE_TIMEOUT_S) if row.ended_s])
    if filename is None:
        return events
    import json

    with open(filename, "w", encoding="utf-8") as file:
        json.dump(events, file)
    return None


def _trace(rows: list[TaskRow]) -> list[dict[str, Any]]:
    offset_s = wall_clock_offset_s()
    own_node, own_job = ids_of_process()
    hosts = {row.node_id: _host_of(row) for row in _nodes()}
    #: node -> its number, in the order of first use; worker -> its number on its node.
    numbers: dict[NodeId, int] = {}
    threads: dict[NodeId, dict[str, int]] = {}
    events: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row.started_s):
        node_id = row.node_id or own_node
        number = numbers.setdefault(node_id, len(numbers))
        worker = f"worker:{row.worker_id.hex()}"
        mine = threads.setdefault(node_id, {})
        thread = mine.setdefault(worker, len(mine))
        failed = row.state == "FAILED"
        events.append(
            {
                "cat": f"task::{row.name}",
                "name": row.name,
                "ph": "X",
                "pid": number,
                "tid": thread,
                "ts": (row.started_s + offset_s) * 1e6,
                "dur": (row.ended_s - row.started_s) * 1e6,
                "cname": "terrible" if failed else "good",
                "args": {
                    "task_id": row.task_id.hex(),
                    "job_id": (job_of_group(row.group_id) or own_job).hex(),
                    "attempt_number": row.attempt,
                    "func_or_class_name": row.function_name,
                    "actor_id": row.actor_id.hex() or None,
                    "state": row.state,
                },
            }
        )
    for node_id, number in numbers.items():
        names: list[tuple[str, int | None, str]] = [
            ("process_name", None, f"Node {hosts.get(node_id, NODE_ADDRESS)}")
        ]
        names += [("thread_name", thread, worker) for worker, thread in threads[node_id].items()]
        events += [
            {"name": name, "ph": "M", "pid": number, "tid": thread, "args": {"name": text}}
            for name, thread, text in names
        ]
    return events
