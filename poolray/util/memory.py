"""What keeps memory: the objects of a runtime as text.

What: `memory_summary`; `format_table`, which `poolray memory` uses as well.
Who calls: users; the command line.
May touch: this process's runtime, which makes the table, or asks all nodes of its cluster.
Invariants: a snapshot; nothing is changed or kept by looking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from poolray import cluster_connection
from poolray.cluster_state import ask
from poolray.exceptions import NotSupportedError, PoolrayError
from poolray.local import process_state
from poolray.local import runtime as local_runtime
from poolray.local.machine import NODE_ADDRESS
from poolray.local.memory_views import with_views
from poolray.protocol.memory import HolderKind, MemoryTable, ObjectEntry, ObjectHolder, Place
from poolray.protocol.state import NodeRow, StateKind
from poolray.survey import memory_tables

if TYPE_CHECKING:
    from poolray.cluster.driver import DriverRuntime

__all__ = ["format_table", "memory_summary"]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

#: One line of the table: an object, one reason for which it is kept, and the node that says so.
_Row = tuple[ObjectEntry, ObjectHolder, str]
#: Objects of each node that are asked for; these do nothing else while they make their tables.
_OBJECTS_MAX = 10_000
_TIMEOUT_S = 30.0

_NOBODY = ObjectHolder(kind=HolderKind.LOCAL_REFERENCE, name="nobody: it is being freed")

GROUPS: dict[str, Callable[[_Row], str]] = {
    "NODE_ADDRESS": lambda row: row[2] or NODE_ADDRESS,
    "STACK_TRACE": lambda row: row[0].call_site or "unknown",
    "PID": lambda row: _pid(row[1]) + (f" at {row[2]}" if row[2] and row[1].pid else ""),
    "REFERENCE_TYPE": lambda row: row[1].kind.name,
}
ORDERS: dict[str, Callable[[_Row], Any]] = {
    "OBJECT_SIZE": lambda row: -row[0].size_bytes,
    "PID": lambda row: row[1].pid,
    "REFERENCE_TYPE": lambda row: row[1].kind.name,
}
_KINDS = {
    HolderKind.LOCAL_REFERENCE: "Local References",
    HolderKind.PINNED_IN_MEMORY: "Pinned",
    HolderKind.USED_BY_PENDING_TASK: "Used by task",
    HolderKind.USED_BY_LINEAGE: "Used by lineage",
    HolderKind.CAPTURED_IN_OBJECT: "Captured in Objects",
    HolderKind.FUNCTION_DEFINITION: "Functions",
    HolderKind.WAITING_IN_STREAM: "Waiting in Streams",
}


def memory_summary(
    *,
    group_by: str = "NODE_ADDRESS",
    sort_by: str = "OBJECT_SIZE",
    units: str = "B",
    stats_only: bool = False,
    num_entries: int | None = None,
) -> str:
    """The objects of this process's runtime, or of all nodes of its cluster: sizes, places, and who
    holds them.

    Parameters
    ----------
    group_by : "NODE_ADDRESS", "STACK_TRACE", "PID" or "REFERENCE_TYPE"
        What objects are put together by. `STACK_TRACE` needs
        `init(record_ref_creation_sites=1)` or `POOLRAY_record_ref_creation_sites=1`.
    sort_by : "OBJECT_SIZE", "PID" or "REFERENCE_TYPE"
        Order within a group; the largest first.
    units : "B", "KB", "MB" or "GB"
        Of sizes; a KB is 1,000 bytes.
    stats_only : bool, default False
        Leave the objects out: only the sums.
    num_entries : int, optional
        Lines per group at the most; all by default.

    Returns
    -------
    str
        Lines of text: per object and holder one, then the use of the object store; on a cluster of
        each node's.

    Raises
    ------
    ValueError
        An unknown name; a negative `num_entries`.
    PoolrayError
        There is no runtime in this process.
    NotSupportedError
        Called in a task: ask the driver.

    Warns
    -----
    UserWarning
        A node of the cluster has not answered within 30 s, or died meanwhile: it is named, and the
        others' objects are shown.

    Notes
    -----
    On a cluster each node tells of its 10,000 largest objects, also of those of other programs. An
    object that a node keeps for another one, or has a copy of, is in the lists of both.

    A process holds an object by refs (`LOCAL_REFERENCE`) or only by looking at its memory, as an
    array from `get` does (`PINNED_IN_MEMORY`). What a worker holds is told when its task ends.

    Examples
    --------
    >>> import poolray
    >>> ref = poolray.put(bytes(1_000_000))
    >>> text = poolray.util.memory_summary(units="MB")
    >>> ref.hex() in text, "LOCAL_REFERENCE" in text
    (True, True)
    """
    check_options(group_by, sort_by, units, num_entries)
    if process_state.is_worker():
        raise NotSupportedError(
            "memory_summary() in a task: the table is the driver's, ask there, or run "
            "`poolray memory` beside it."
        )
    connection = cluster_connection.runtime()
    runtime = local_runtime.current()
    if connection is not None:
        title, tables = _of_cluster(connection, 1 if stats_only else _OBJECTS_MAX)
    elif runtime is not None:
        table = runtime.memory_table(0 if stats_only else None)
        title, tables = _title(table), {"": table}
    else:
        raise PoolrayError("There is no runtime to look at: call poolray.init() first.")
    return _format(
        title,
        tables,
        group_by=group_by,
        sort_by=sort_by,
        units=units,
        stats_only=stats_only,
        num_entries=num_entries,
    )


def _of_cluster(connection: DriverRuntime, limit: int) -> tuple[str, dict[str, MemoryTable]]:
    """A headline; and the tables of all nodes by their addresses."""
    connection.client.sync_references()
    rows = cast("list[NodeRow]", ask(StateKind.NODES))
    addresses = {row.node_id: row.address for row in rows}
    tables = {}
    for table in memory_tables(_TIMEOUT_S, limit):
        if table.node_id == connection.node_id:
            table = with_views(table, connection.client, connection.pid)
        tables[addresses.get(table.node_id) or table.node_id.hex()] = table
    return f"Objects of the cluster at {connection.welcome.head_address}", tables


def check_options(group_by: str, sort_by: str, units: str, num_entries: int | None) -> None:
    """Refuse names that mean nothing."""
    for name, value, known in (
        ("group_by", group_by, GROUPS),
        ("sort_by", sort_by, ORDERS),
        ("units", units, UNITS),
    ):
        if not isinstance(value, str) or value.upper() not in known:
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
    if num_entries is not None and num_entries < 0:
        raise ValueError(f"num_entries is {num_entries}: it must not be negative")


def format_table(
    table: MemoryTable,
    *,
    group_by: str,
    sort_by: str,
    units: str,
    stats_only: bool,
    num_entries: int | None,
) -> str:
    """A table as text; the parameters are those of `memory_summary`, checked."""
    return _format(
        _title(table),
        {"": table},
        group_by=group_by,
        sort_by=sort_by,
        units=units,
        stats_only=stats_only,
        num_entries=num_entries,
    )


def _title(table: MemoryTable) -> str:
    return f"Objects of the runtime in process {table.pid}"


def _format(
    title: str,
    tables: Mapping[str, MemoryTable],
    *,
    group_by: str,
    sort_by: str,
    units: str,
    stats_only: bool,
    num_entries: int | None,
) -> str:
    """Tables by the addresses of their nodes (empty: there is one machine) as text."""
    lines = [f"======== {title} ========"]
    if not stats_only:
        key, order = GROUPS[group_by.upper()], ORDERS[sort_by.upper()]
        shown = "all" if num_entries is None else str(num_entries)
        what = group_by.lower().replace("_", " ")
        lines.append(
            f"Grouping by {what}...        "
            f"Sorting by {sort_by.lower().replace('_', ' ')}...        "
            f"Display {shown} entries per group..."
        )
        groups: dict[str, list[_Row]] = {}
        for node, table in tables.items():
            for entry in table.objects:
                for holder in entry.holders or (_NOBODY,):
                    row = entry, holder, node
                    groups.setdefault(key(row), []).append(row)
        for name, rows in groups.items():
            rows.sort(key=order)
            lines += _group_lines(name, what, rows, units.upper(), num_entries)
        if left_out := sum(table.left_out for table in tables.values()):
            lines += ["", f"{left_out} smaller objects are not shown."]
        if groups and not any(table.records_call_sites for table in tables.values()):
            lines += ["", "Call sites: set POOLRAY_record_ref_creation_sites=1 to record them."]
    for node, table in tables.items():
        lines += ["", *_store_lines(node, table, units.upper())]
    return "\n".join([*lines, ""])


def _group_lines(
    name: str, what: str, rows: list[_Row], units: str, num_entries: int | None
) -> list[str]:
    # (Of one that several nodes have each has its own.)
    sizes = {(entry.object_id, node): max(0, entry.size_bytes) for entry, _, node in rows}
    counts = []
    for kind, title in _KINDS.items():
        ids = {(entry.object_id, node) for entry, holder, node in rows if holder.kind is kind}
        total = _size(sum(sizes[each] for each in ids), units)
        counts.append((title, f"{len(ids)}, ({total})"))
    summary = [("Mem Used by Objects", _size(sum(sizes.values()), units)), *counts]
    columns = [("PID", "Place", "Size", "Reference Type", "Holder", "Object Ref", "Call Site")]
    columns += [
        (
            _pid(holder),
            "ERROR" if entry.is_error else entry.place.name,
            "?" if entry.size_bytes < 0 else _size(entry.size_bytes, units),
            holder.kind.name,
            holder.name or "-",
            entry.object_id.hex(),
            entry.call_site or "-",
        )
        for entry, holder, _ in rows[:num_entries]
    ]
    hidden = len(rows) - (len(columns) - 1)
    return [
        "",
        f"--- Summary for {what}: {name} ---",
        *_aligned(list(zip(*summary, strict=True))),
        "",
        f"--- Object references for {what}: {name} ---",
        *_aligned(columns),
        *([f"({hidden} more)"] if hidden else []),
    ]


def _store_lines(node: str, table: MemoryTable, units: str) -> list[str]:
    free = table.capacity_bytes - table.used_bytes
    percent = 100 * table.used_bytes / table.capacity_bytes if table.capacity_bytes else 0.0
    torn = 100 * (1 - table.largest_free_bytes / free) if free else 0.0
    lines = [
        f"--- Object store of {node} ---" if node else "--- Object store ---",
        f"Shared memory: {_size(table.used_bytes, units)} used of "
        f"{_size(table.capacity_bytes, units)} ({percent:.1f} %); "
        f"{_size(table.high_water_bytes, units)} touched so far",
        f"Fragmentation: {torn:.1f} % (largest free range {_size(table.largest_free_bytes, units)} "
        f"of {_size(free, units)} free, {table.free_ranges} gaps)",
    ]
    lines += [
        f"{place.name:<9}: {use.objects} objects, {_size(use.size_bytes, units)}"
        for place, use in table.places.items()
        if use.objects or place in (Place.INLINE, Place.ARENA)
    ]
    spilling = table.spilling
    for what, count, size, seconds in (
        ("Spilled", spilling.spilled_objects, spilling.spilled_bytes, spilling.spill_s),
        ("Restored", spilling.restored_objects, spilling.restored_bytes, spilling.restore_s),
    ):
        if count:
            speed = f", {size / seconds / 1e6:.0f} MB/s" if seconds else ""
            lines.append(f"{what} {_size(size, units)}, {count} objects{speed}")
    return lines


def _pid(holder: ObjectHolder) -> str:
    return str(holder.pid) if holder.pid else "-"


def _size(size_bytes: int, units: str) -> str:
    if units == "B":
        return f"{size_bytes} B"
    return f"{size_bytes / UNITS[units]:.3f} {units}"


def _aligned(rows: list[Any]) -> list[str]:
    """Rows of cells as lines with columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
