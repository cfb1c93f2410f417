"""Rows of all nodes, put together: one for each task and actor, wherever it was made and runs.

What: asks all nodes; of a task or actor that several nodes know, keeps what each knows best.
Who calls: `poolray.util.state`, `poolray.timeline`.
May touch: nothing.
Invariants: the order of rows is that of their first mention, this process's own node first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeAlias, TypeVar, cast

import msgspec

from poolray.exceptions import StateApiError
from poolray.ids import NodeId
from poolray.protocol.memory import MemoryTable
from poolray.protocol.state import (
    ActorRow,
    Condition,
    LogRow,
    LogTextRow,
    LogWish,
    MemoryRow,
    ObjectRow,
    QueryState,
    StateKind,
    StateRow,
    StateRows,
    TaskRow,
    WorkerRow,
)
from poolray.session import find_client

T = TypeVar("T", TaskRow, ActorRow)
Merge: TypeAlias = Callable[[T, T], T]
#: States of attempts that are over.
_ENDED = ("FINISHED", "FAILED")
#: Of a task that no worker has yet.
_GIVEN_AWAY = "SUBMITTED_TO_WORKER"


def query(
    kind: StateKind,
    *,
    everywhere: bool = False,
    timeout_s: float = 30.0,
    limit: int = 0,
    where: Sequence[Condition] = (),
    of_node: NodeId = NodeId(b""),  # noqa: B008 (bytes do not change)
    log: LogWish = LogWish(),  # noqa: B008 (frozen)
) -> tuple[list[StateRow], list[NodeId]]:
    """What this process's node tells, or all nodes do that answer in time: `limit` rows each at
    the most, unless that is 0, and those only that meet the conditions. Starts the runtime if
    there is none. `of_node` and `log` are for files of logs.

    Returns
    -------
    rows : list
    missing : list of NodeId
        Nodes that were asked and have not answered, or died.
    """
    found = find_client().link.ask(
        lambda request_id: QueryState(
            request_id=request_id,
            kind=kind,
            everywhere=everywhere,
            timeout_s=timeout_s,
            limit=limit,
            where=list(where),
            of_node=of_node,
            log=log,
        )
    )
    parts: list[StateRows] = found if isinstance(found, list) else [found]
    return [row for part in parts for row in part.rows], parts[-1].missing


def _ask_all(
    kind: StateKind,
    timeout_s: float,
    *,
    limit: int,
    where: Sequence[Condition],
    strict: bool,
) -> list[StateRow]:
    """What all nodes tell.

    Raises
    ------
    StateApiError
        A node did not answer in time, or died, and `strict` is true; else a warning
        names it.
    """
    rows, missing = query(kind, everywhere=True, timeout_s=timeout_s, limit=limit, where=where)
    if missing:
        names = ", ".join(node_id.hex() for node_id in missing)
        text = (
            f"What nodes know is not complete: no answer came from {names} within {timeout_s:g} s, "
            "or they have died. Ask again, give them more time (timeout=), or take what there is "
            "(raise_on_missing_output=False)."
        )
        if strict:
            raise StateApiError(text)
        warnings.warn(text, stacklevel=4)
    return rows


def task_rows(
    timeout_s: float, *, limit: int = 0, where: Sequence[Condition] = (), strict: bool = True
) -> list[TaskRow]:
    """Attempts of tasks: those that have not ended, then the ended ones, newest first."""
    rows = cast(
        "list[TaskRow]",
        _ask_all(StateKind.TASKS, timeout_s, limit=limit, where=where, strict=strict),
    )
    merged = _merged(rows, [(row.task_id, row.attempt) for row in rows], _of_task)
    if all(not row.node_id for row in rows):
        return merged
    # (Each node has told of its own in that order.)
    return sorted(merged, key=lambda row: (row.ended_s > 0, -row.ended_s))


def actor_rows(
    timeout_s: float, *, limit: int = 0, where: Sequence[Condition] = (), strict: bool = True
) -> list[ActorRow]:
    """Actors: those that are not dead, then the dead ones."""
    rows = cast(
        "list[ActorRow]",
        _ask_all(StateKind.ACTORS, timeout_s, limit=limit, where=where, strict=strict),
    )
    merged = _merged(rows, [row.actor_id for row in rows], _of_actor)
    return sorted(merged, key=lambda row: row.state == "DEAD")


def worker_rows(
    timeout_s: float, *, limit: int = 0, where: Sequence[Condition] = (), strict: bool = True
) -> list[WorkerRow]:
    """Workers of all nodes."""
    rows = _ask_all(StateKind.WORKERS, timeout_s, limit=limit, where=where, strict=strict)
    return cast("list[WorkerRow]", rows)


def object_rows(
    timeout_s: float, *, limit: int = 0, where: Sequence[Condition] = (), strict: bool = True
) -> list[ObjectRow]:
    """Objects of all nodes: of one that several nodes hold, a row of each."""
    rows = _ask_all(StateKind.OBJECTS, timeout_s, limit=limit, where=where, strict=strict)
    return cast("list[ObjectRow]", rows)


def memory_tables(timeout_s: float, limit: int) -> list[MemoryTable]:
    """The memory of each node, this process's first: its `limit` largest objects."""
    rows = _ask_all(StateKind.MEMORY, timeout_s, limit=limit, where=(), strict=False)
    found: dict[NodeId, MemoryTable] = {}
    for row in cast("list[MemoryRow]", rows):
        known = found.get(row.table.node_id)
        if known is None:
            found[row.table.node_id] = row.table
        else:
            known.objects.extend(row.table.objects)
    return list(found.values())


def log_rows(node_id: NodeId, pattern: str, timeout_s: float) -> list[LogRow]:
    """Files of logs of one node, those that were written to last at the end.

    Raises
    ------
    StateApiError
        The node is dead or not known, or does not answer in time.
    """
    rows = _ask_one(StateKind.LOGS, node_id, LogWish(pattern=pattern), timeout_s)
    return cast("list[LogRow]", rows)


def log_text(node_id: NodeId, wish: LogWish, timeout_s: float) -> LogTextRow:
    """A part of a file of logs of one node.

    Raises
    ------
    StateApiError
        The node is dead or not known, or does not answer in time; there is no such file.
    """
    (row,) = cast("list[LogTextRow]", _ask_one(StateKind.LOG_TEXT, node_id, wish, timeout_s))
    if row.refusal:
        raise StateApiError(f"Node {node_id.hex()} says: {row.refusal}.")
    return row


def _ask_one(kind: StateKind, node_id: NodeId, log: LogWish, timeout_s: float) -> list[StateRow]:
    rows, missing = query(kind, timeout_s=timeout_s, of_node=node_id, log=log)
    if missing:
        raise StateApiError(
            f"Node {node_id.hex()} does not tell of its logs: it is dead, or not of this cluster, "
            f"or has not answered within {timeout_s:g} s. What it has written is on its machine, "
            "in the folder that `poolray start` named there."
        )
    return rows


def _merged(rows: list[T], keys: Iterable[Hashable], of: Merge[T]) -> list[T]:
    found: dict[Hashable, T] = {}
    for key, row in zip(keys, rows, strict=True):
        known = found.get(key)
        found[key] = row if known is None else of(known, row)
    return list(found.values())


def _of_task(one: TaskRow, other: TaskRow) -> TaskRow:
    """The same attempt, as the node that submitted it and the one that ran it know it."""
    # (Where no worker has it yet, the one that submitted it says that another node has.)
    is_first = bool(one.worker_id) or (not other.worker_id and other.state == _GIVEN_AWAY)
    ran, made = (one, other) if is_first else (other, one)
    last = made if made.state in _ENDED else ran
    return msgspec.structs.replace(
        ran,
        state=last.state,
        ended_s=ran.ended_s or made.ended_s,
        error_type=last.error_type,
        error_message=last.error_message,
        parent_id=ran.parent_id or made.parent_id,
    )


def _of_actor(one: ActorRow, other: ActorRow) -> ActorRow:
    """The same actor, as the node that keeps it and the one that it lives on know it."""
    lives, keeps = (one, other) if one.pid and one.state == "ALIVE" else (other, one)
    return msgspec.structs.replace(
        lives,
        restarts=max(one.restarts, other.restarts),
        death_cause=lives.death_cause or keeps.death_cause,
        repr_name=lives.repr_name or keeps.repr_name,
    )
