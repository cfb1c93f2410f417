"""Files of logs of a cluster's nodes: which there are, and what is in them.

What: the calls of `ray.util.state` that list and read log files.
Who calls: user code, through `poolray.util.state`; the command line.
May touch: the clock, to wait for more.
Invariants: whatever is asked for, only files in nodes' folders of logs are read, in parts of a
bounded size; each wait ends with the timeout, with the end of who writes, or with the generator.
"""

from __future__ import annotations

import codecs
import os
import re
import time
from collections.abc import Iterator
from typing import Literal, cast, overload

import msgspec

from poolray import cluster_connection
from poolray.cluster_state import ask
from poolray.exceptions import NotSupportedError, StateApiError
from poolray.ids import ActorId, NodeId, TaskId
from poolray.local import process_state
from poolray.local.machine import NODE_ADDRESS
from poolray.protocol.state import (
    Condition,
    LogTextRow,
    LogWish,
    NodeRow,
    StateKind,
    TaskRow,
)
from poolray.protocol.values import CallKind
from poolray.session import find_client
from poolray.survey import actor_rows, log_rows, log_text, task_rows

__all__ = ["get_log", "list_logs"]

_NO_CLUSTER = (
    "There are no files of logs: a runtime on one machine without a cluster keeps none. What its "
    "workers print goes straight to the driver's terminal (or its replaced sys.stdout), and "
    "log_to_driver=False drops it. A cluster keeps files: `poolray start --head`, then "
    "init(address='auto')."
)
#: Bytes asked for at once.
_PART_BYTES = 64 << 10
#: Seconds until a file is looked at again that is followed.
_INTERVAL_S = 1.0
_STREAMS = ("out", "err")
#: A sequence that colours text or moves the cursor, and the beginning of one.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
_ANSI_BEGUN = re.compile(r"\x1b(?:\[[0-?]*[ -/]*)?\Z")


class _Log(msgspec.Struct, frozen=True):
    """A file of a node, or the part of it that an attempt of a task has written."""

    node_id: NodeId
    name: str
    timeout_s: float
    task_id: TaskId = TaskId(b"")
    attempt: int = 0

    def read(self, start: int, size_bytes: int = _PART_BYTES) -> LogTextRow:
        """A part of it."""
        wish = LogWish(
            name=self.name,
            start=start,
            size_bytes=size_bytes,
            task_id=self.task_id,
            attempt=self.attempt,
        )
        return log_text(self.node_id, wish, self.timeout_s)


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: int = 30,
) -> dict[str, list[str]]:
    """Files of logs of one node of a cluster.

    Parameters
    ----------
    address : str, optional
        None or "auto": the cluster of this process.
    node_id, node_ip : str
        The node, by its id in hexadecimal digits or by its host; one of them is needed.
    glob_filter : str, default "*"
        Names of files, as in a shell; no folders.
    timeout : int, seconds
        How long to wait for the node.

    Returns
    -------
    dict of str to list of str
        Names by what writes them: `worker_out` and `worker_err` (a file each per worker,
        `worker-<worker id>-<job id>-<pid>.out` and `.err`), `raylet` (the node's daemon),
        `gcs_server` (the head's), `internal` (anything else). Those of them that there are.

    Raises
    ------
    NotSupportedError
        This process uses one machine without a cluster, which keeps no such files.
    StateApiError
        The node is dead, or does not answer in time; no living node has that host.
    ValueError
        Another address; no node is named; a filter with a folder in it.

    Examples
    --------
    >>> import poolray
    >>> from poolray.cluster_utils import Cluster
    >>> from poolray.util.state import list_logs
    >>> poolray.shutdown()
    >>> cluster = Cluster(initialize_head=True, connect=True)
    >>> found = list_logs(node_id=cluster.head_node.node_id, glob_filter="head.log")
    >>> poolray.shutdown()
    >>> cluster.shutdown()
    >>> found
    {'gcs_server': ['head.log']}
    """
    if node_id is None and node_ip is None:
        raise ValueError("At least one of node ip and node id is required: node_id=, node_ip=")
    pattern = glob_filter or "*"
    if "/" in pattern:
        raise ValueError(f"glob_filter={pattern!r}: names of files have no folders")
    _check_cluster(address)
    found: dict[str, list[str]] = {}
    rows = log_rows(_node_of(node_id, node_ip), pattern, timeout)
    for name in sorted(row.name for row in rows):
        found.setdefault(_component(name), []).append(name)
    return found


def _component(name: str) -> str:
    """What has written a file; the names are the reference's."""
    if name.startswith("worker-"):
        return "worker_err" if name.endswith(".err") else "worker_out"
    if name.startswith("node-"):
        return "raylet"
    return "gcs_server" if name.startswith("head.") else "internal"


@overload
def get_log(
    *,
    encoding: Literal[None],
    address: str | None = ...,
    node_id: str | None = ...,
    node_ip: str | None = ...,
    filename: str | None = ...,
    actor_id: str | None = ...,
    task_id: str | None = ...,
    pid: int | None = ...,
    follow: bool = ...,
    tail: int = ...,
    timeout: int = ...,
    suffix: str = ...,
    errors: str | None = ...,
    submission_id: str | None = ...,
    attempt_number: int = ...,
    _interval: float | None = ...,
    filter_ansi_code: bool = ...,
) -> Iterator[bytes]: ...
@overload
def get_log(
    address: str | None = ...,
    node_id: str | None = ...,
    node_ip: str | None = ...,
    filename: str | None = ...,
    actor_id: str | None = ...,
    task_id: str | None = ...,
    pid: int | None = ...,
    follow: bool = ...,
    tail: int = ...,
    timeout: int = ...,
    suffix: str = ...,
    encoding: str = ...,
    errors: str | None = ...,
    submission_id: str | None = ...,
    attempt_number: int = ...,
    _interval: float | None = ...,
    filter_ansi_code: bool = ...,
) -> Iterator[str]: ...
def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: int = 30,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str | None = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
    _interval: float | None = None,
    filter_ansi_code: bool = False,
) -> Iterator[str] | Iterator[bytes]:
    r"""What is in a file of logs of a cluster, in parts.

    Parameters
    ----------
    address : str, optional
        None or "auto": the cluster of this process.
    node_id, node_ip : str
        The node, by its id or host: needed with `filename` and `pid`.
    filename : str
        One of the names that `list_logs` gives. This, or one of the next three:
    actor_id : str
        What an actor has printed, in the process that it lives in or lived in last.
    task_id : str
        What a task has printed; of actors' calls ask for the actor's.
    pid : int
        What a worker has printed, by its process id.
    follow : bool, default False
        Wait for more, until who writes has ended.
    tail : int, lines, default -1
        So many of the last ones; -1: all that are kept.
    timeout : int, seconds
        How long to wait for an answer of the node, each time.
    suffix : "out" or "err"
        Standard output or standard error, unless a `filename` says.
    encoding : str, default "utf-8"
        None gives bytes.
    errors : str, default "strict"
        What to do with bytes that are none of the encoding's, as `bytes.decode` has it.
    submission_id : str
        Refused: there are no submitted jobs in this version.
    attempt_number : int, default 0
        Which attempt of the task.
    filter_ansi_code : bool, default False
        Leave sequences out that colour text.

    Returns
    -------
    iterator of str, or of bytes
        Parts of at most 64 KiB, in order.

    Raises
    ------
    NotSupportedError
        This process uses one machine without a cluster, which keeps no such files.
    StateApiError
        There is no such file, task or actor, or not any more; its node is dead or does not answer.
    ValueError
        Another address; none or several of `filename`, `actor_id`, `task_id` and `pid`; a value
        that makes no sense.
    LookupError
        An unknown encoding.

    Notes
    -----
    A node keeps the last 8 to 16 MiB of each file (`worker_log_max_bytes`) and the latest thousand
    files of workers that have ended. Of tasks it knows which part of a file they have written: what
    they print. What programs that they start write is in the worker's file, and in that part if
    it came between.

    Examples
    --------
    >>> import poolray
    >>> from poolray.cluster_utils import Cluster
    >>> from poolray.util.state import get_log
    >>> poolray.shutdown()
    >>> cluster = Cluster(initialize_head=True)
    >>> context = poolray.init(address=cluster.address, log_to_driver=False)
    >>> ref = poolray.remote(lambda: print("some words")).remote()
    >>> poolray.get(ref)
    >>> text = "".join(get_log(task_id=ref.task_id().hex()))
    >>> poolray.shutdown()
    >>> cluster.shutdown()
    >>> text
    'some words\n'
    """
    if submission_id is not None:
        raise NotSupportedError("submission_id: this version of poolray has no submitted jobs.")
    if sum(each is not None for each in (filename, actor_id, task_id, pid)) != 1:
        raise ValueError("exactly one of filename, actor_id, task_id and pid is needed")
    if suffix not in _STREAMS:
        raise ValueError(f"Suffix {suffix!r} is not supported: it must be 'out' or 'err'")
    if (filename is not None or pid is not None) and node_id is None and node_ip is None:
        raise ValueError("At least one of node ip and node id is required: node_id=, node_ip=")
    if not isinstance(tail, int) or tail < -1:
        raise ValueError(f"tail must be a number of lines, or -1 for all: {tail!r}")
    if encoding is not None:
        codecs.lookup_error(errors or "strict")
        codecs.lookup(encoding)
    _check_cluster(address)
    if filename is not None:
        log = _Log(_node_of(node_id, node_ip), filename, timeout)
    elif actor_id is not None:
        log = _of_actor(actor_id, suffix, timeout)
    elif task_id is not None:
        log = _of_task(_text_id(task_id), attempt_number, suffix, timeout)
    else:
        pattern = f"worker-*-{_number(pid)}.{suffix}"
        log = _of_worker(_node_of(node_id, node_ip), pattern, f"pid {pid}", timeout)
    interval_s = _INTERVAL_S if _interval is None else _interval
    parts = _parts(log, log.read(0, 0), tail, interval_s if follow else None)
    if encoding is None:
        return (part for part, _ in parts)
    return _decoded(parts, encoding, errors or "strict", filter_ansi_code)


# ---- which file ----------------------------------------------------------------------------------


def _check_cluster(address: str | None) -> None:
    if address not in (None, "auto", os.environ.get(cluster_connection.ADDRESS_VARIABLE)):
        raise ValueError(f"address={address!r}: only the cluster of this process can be asked.")
    find_client()
    setup = process_state.setup()
    in_cluster = setup.head_address if setup is not None else cluster_connection.runtime()
    if not in_cluster:
        raise NotSupportedError(_NO_CLUSTER)


def _node_of(node_id: str | None, node_ip: str | None) -> NodeId:
    if node_id is not None:
        return NodeId(_bytes_of("node_id", node_id))
    rows = [row for row in cast("list[NodeRow]", ask(StateKind.NODES)) if row.is_alive]
    hosts = {row.node_id: row.address.rpartition(":")[0].strip("[]") for row in rows}
    for row in sorted(rows, key=lambda row: not row.info.get("is_head")):
        if (hosts[row.node_id] or NODE_ADDRESS) == node_ip:
            return row.node_id
    raise StateApiError(
        f"No living node has the host {node_ip}: those that live are at "
        f"{', '.join(sorted(set(hosts.values())))}."
    )


def _of_actor(actor_id: str, suffix: str, timeout_s: float) -> _Log:
    """The file of the process that an actor lives in, or of the last one that has left a file."""
    wanted = ActorId(_bytes_of("actor_id", actor_id)).hex()
    where = [Condition(field="actor_id", equal=True, value=wanted)]
    made = [*where, Condition(field="kind", equal=True, value=CallKind.CREATE.name)]
    failures: list[StateApiError] = []
    for row in task_rows(timeout_s, where=made, strict=False):
        if row.worker_id:
            try:
                return _of_process(row, f"actor {wanted}", suffix, timeout_s)
            except StateApiError as error:  # its node may be dead, and an earlier one alive
                failures.append(error)
    for actor in actor_rows(timeout_s, where=where, strict=False):
        if actor.pid:  # it was made so long ago that nobody remembers the call
            pattern = f"worker-*-{actor.pid}.{suffix}"
            return _of_worker(actor.node_id, pattern, f"actor {wanted}", timeout_s)
    raise (
        failures[0]
        if failures
        else StateApiError(f"Nothing is known of actor {wanted}, or it has no process yet.")
    )


def _of_task(task_id: str, attempt: int, suffix: str, timeout_s: float) -> _Log:
    wanted = TaskId(_bytes_of("task_id", task_id))
    rows = _rows_of_task(wanted, timeout_s)
    for row in rows:
        if row.kind is CallKind.METHOD:
            actor_id = row.actor_id.hex()
            raise StateApiError(
                f"Task {task_id} is a call of an actor, whose output is that of all its calls: ask "
                f"for it with actor_id={actor_id!r}, or `poolray logs actor --id {actor_id}`."
            )
        if row.attempt == attempt and row.worker_id:
            what = f"task {task_id}, attempt {attempt}"
            log = _of_process(row, what, suffix, timeout_s)
            return msgspec.structs.replace(log, task_id=wanted, attempt=attempt)
    known = sorted(row.attempt for row in rows if row.worker_id)
    raise StateApiError(
        f"Task {task_id} has had no worker in attempt {attempt}"
        + (f"; it has in attempts {known}." if known else ", or is not known any more.")
    )


def _rows_of_task(task_id: TaskId, timeout_s: float) -> list[TaskRow]:
    where = [Condition(field="task_id", equal=True, value=task_id.hex())]
    return task_rows(timeout_s, where=where, strict=False)


def _of_process(row: TaskRow, what: str, suffix: str, timeout_s: float) -> _Log:
    """The file of the worker that ran a task."""
    pattern = f"worker-{row.worker_id.hex()}-*.{suffix}"
    return _of_worker(row.node_id, pattern, what, timeout_s)


def _of_worker(node_id: NodeId, pattern: str, what: str, timeout_s: float) -> _Log:
    # (An id is not used twice; of a process id the file counts that was written to last.)
    rows = log_rows(node_id, pattern, timeout_s)
    if not rows:
        raise StateApiError(
            f"There is no file of logs of {what}: there was no such worker on its node, or its "
            "file had to make room for later ones."
        )
    return _Log(rows[-1].node_id or node_id, rows[-1].name, timeout_s)


def _text_id(task_id: object) -> str:
    return task_id if isinstance(task_id, str) else task_id.hex()  # type: ignore[attr-defined]


def _bytes_of(name: str, value: object) -> bytes:
    try:
        return bytes.fromhex(_text_id(value))
    except (ValueError, AttributeError):
        raise ValueError(f"{name}={value!r}: an id is a text of hexadecimal digits") from None


def _number(pid: object) -> int:
    try:
        return int(pid)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ValueError(f"pid={pid!r}: a process id is a number") from None


# ---- what is in it -------------------------------------------------------------------------------


def _parts(
    log: _Log, facts: LogTextRow, tail: int, interval_s: float | None
) -> Iterator[tuple[bytes, bool]]:
    """Bytes in order, and whether what was before them is missing; with an interval also what is
    written meanwhile.
    """
    place = facts.first if tail < 0 else _start_of_lines(log, facts, tail)
    is_over = False
    while interval_s is not None or place < facts.end:
        row = log.read(place, _PART_BYTES if interval_s is not None else facts.end - place)
        if row.data:
            yield row.data, row.start != place
            place = row.start + len(row.data)
        elif interval_s is None or row.is_closed or is_over:
            return
        elif log.task_id and not _is_running(log):
            is_over = True  # what it printed last is there by now
        else:
            time.sleep(interval_s)


def _start_of_lines(log: _Log, facts: LogTextRow, count: int) -> int:
    """Where the last lines begin; one that is not complete counts."""
    place = end = facts.end
    if not count:
        return end
    missing = count
    while place > facts.first:
        start = max(facts.first, place - _PART_BYTES)
        row = log.read(start, place - start)
        if row.start != start or not row.data:
            return row.first  # all before has gone meanwhile
        data = row.data
        at = len(data) - 1 if place == end and data.endswith(b"\n") else len(data)
        while (at := data.rfind(b"\n", 0, at)) >= 0:
            missing -= 1
            if not missing:
                return start + at + 1
        place = start
    return facts.first


def _is_running(log: _Log) -> bool:
    rows = _rows_of_task(log.task_id, log.timeout_s)
    return any(row.attempt == log.attempt and not row.ended_s for row in rows)


def _decoded(
    parts: Iterator[tuple[bytes, bool]], encoding: str, errors: str, without_ansi: bool
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    held = ""
    for part, is_after_gap in parts:
        if is_after_gap:
            decoder.reset()
        text = held + decoder.decode(part)
        held = ""
        if without_ansi:
            begun = _ANSI_BEGUN.search(text)
            if begun is not None:
                text, held = text[: begun.start()], begun.group()
            text = _ANSI.sub("", text)
        if text:
            yield text
    text = held + decoder.decode(b"", final=True)
    if text:
        yield text
