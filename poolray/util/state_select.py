"""Which rows and columns of a list a caller gets.

What: filters, limits and details, the same for all kinds of rows.
Who calls: `poolray.util.state`.
May touch: nothing.
Invariants: what nodes have looked at already is looked at again: who answers may be of another
version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from poolray.protocol.state import Condition, StateKind
from poolray.util.state_rows import Row, columns

#: (column, "=" or "!=", value)
Filter: TypeAlias = tuple[str, str, str | bool | int | float | None]
#: Columns that only `detail=True` fills.
_DETAILS = frozenset(
    {
        "serialized_runtime_env",
        "death_cause",
        "is_detached",
        "num_restarts",
        "num_restarts_due_to_lineage_reconstruction",
        "num_restarts_due_to_node_preemption",
        "label_selector",
        "repr_name",
        "language",
        "required_resources",
        "placement_group_id",
        "start_time_ms",
        "end_time_ms",
        "error_message",
        "exit_detail",
        "runtime_env_info",
        "start_time",
        "end_time",
        "metadata",
        "runtime_env",
        "driver_node_id",
        "custom_fields",
        "bundles",
        "stats",
    }
)
#: But of these kinds of rows they are there always.
_KEPT = {"RuntimeEnvState": frozenset({"runtime_env"})}
#: Columns that cannot be compared with a value.
_NOT_FILTERABLE = frozenset(
    {
        "serialized_runtime_env",
        "death_cause",
        "is_detached",
        "num_restarts",
        "num_restarts_due_to_lineage_reconstruction",
        "num_restarts_due_to_node_preemption",
        "label_selector",
        "required_resources",
        "error_message",
        "exit_detail",
        "resources_total",
        "labels",
        "runtime_env_info",
        "driver_info",
        "metadata",
        "message",
        "time",
        "custom_fields",
        "bundles",
        "stats",
    }
)
#: Columns that nodes have under the same name, and of which all that know a row say the same.
_AT_NODES = {
    StateKind.TASKS: ("task_id", "name"),
    StateKind.ACTORS: ("actor_id", "class_name", "name"),
    StateKind.WORKERS: ("worker_id",),
    StateKind.OBJECTS: ("object_id",),
}
R = TypeVar("R", bound=Row)


def at_nodes(kind: StateKind, limit: int, filters: Sequence[Filter] | None) -> dict[str, Any]:
    """What nodes can look at themselves: they tell less then. All is looked at here again."""
    where = []
    for name, predicate, value in filters or ():
        if name in _AT_NODES.get(kind, ()) and isinstance(value, str):
            where.append(Condition(field=name, equal=predicate == "=", value=value))
    # (Rows that are sorted out here must not have taken the place of others.)
    return {"limit": 0 if len(where) < len(filters or ()) else limit, "where": where}


def select(
    rows: Iterable[R], kind: type[R], filters: Sequence[Filter] | None, limit: int, detail: bool
) -> list[R]:
    """The rows that all filters hold for, `limit` at the most; without details unless wanted.

    Raises
    ------
    ValueError
        An unknown column or predicate.
    """
    checked = [_checked(kind, each) for each in filters or ()]
    chosen: list[R] = []
    for row in rows:
        if len(chosen) >= limit:
            break
        if all(_holds(row, name, equal, value) for name, equal, value in checked):
            chosen.append(row if detail else _brief(row))
    return chosen


def _checked(kind: type[Row], given: Filter) -> tuple[str, bool, Any]:
    name, predicate, value = given
    if predicate not in ("=", "!="):
        raise ValueError(
            f"Unsupported filter predicate {predicate} is given. Available predicates: =, !=."
        )
    names = {field.name for field in columns(kind)} - _NOT_FILTERABLE
    if name not in names:
        raise ValueError(
            f"The given filter key {name} is not supported for filtering. Supported filter keys: "
            f"{sorted(names)}."
        )
    return name, predicate == "=", value


def _holds(row: Row, name: str, equal: bool, value: Any) -> bool:
    found = getattr(row, name)
    if isinstance(value, str):
        matches = found is not None and str(found).lower() == value.lower()
    else:
        matches = bool(found == value)
    return matches is equal


def _brief(row: R) -> R:
    hidden = _DETAILS - _KEPT.get(type(row).__name__, frozenset())
    details = {field.name: None for field in columns(type(row)) if field.name in hidden}
    return cast("R", dataclasses.replace(cast("Any", row), **details)) if details else row
