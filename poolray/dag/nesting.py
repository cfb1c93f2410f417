"""Nodes inside of arguments: finding them, and putting other things in their places.

What: walks lists, tuples, dicts, sets, dataclasses and plain objects; all else is a leaf.
Who calls: `dag_node.py`.
May touch: nothing.
Invariants: what holds no node is passed on as it is, never copied; what holds one is copied along
the way to it, and the original stays as it was. Nodes are not entered.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterable
from typing import Any

#: Without attributes of interest, or without end.
_LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type(None),
)
_CONTAINERS = (list, tuple, dict, set, frozenset)


def find_nodes(value: Any, node_type: type) -> list[Any]:
    """The nodes in a value, each once, in the order in which they are read."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, node_type):
            found.setdefault(id(current), current)
            continue
        if isinstance(current, _LEAVES) or id(current) in seen:
            continue
        seen[id(current)] = current  # kept, so that its id stays its own
        pending.extend(reversed(list(_parts_of(current))))
    return list(found.values())


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, _CONTAINERS):
        return value
    return _attributes_of(value).values()


def _attributes_of(value: Any) -> dict[str, Any]:
    """What a plain object or a dataclass holds; of objects in C nothing is known."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if hasattr(value, field.name)
        }
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else {}


def replace_nodes(value: Any, node_type: type, replace: Callable[[Any], Any]) -> Any:
    """The value with `replace(node)` in the place of each node; itself when it holds none."""
    if isinstance(value, node_type):
        return replace(value)
    return _Replacement(node_type, replace).of(value)


class _Replacement:
    """One pass over a value that may name the same thing many times, or itself."""

    def __init__(self, node_type: type, replace: Callable[[Any], Any]) -> None:
        self._node_type = node_type
        self._replace = replace
        #: id of an original -> (the original, what takes its place).
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, self._node_type):
            return self._replace(value)
        if isinstance(value, _LEAVES):
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        self._made[id(value)] = value, value  # for one that holds itself
        if not find_nodes(value, self._node_type):
            return value
        made = self._rebuilt(value)
        self._made[id(value)] = value, made
        return made

    def _rebuilt(self, value: Any) -> Any:
        made: Any
        if isinstance(value, dict):
            made = copy.copy(value)  # keeps its class, and what a defaultdict makes
            made.clear()
            self._made[id(value)] = value, made
            made.update((self.of(key), self.of(part)) for key, part in value.items())
            return made
        if isinstance(value, list):
            made = copy.copy(value)
            self._made[id(value)] = value, made
            made[:] = [self.of(part) for part in value]
            return made
        if isinstance(value, tuple):
            parts = [self.of(part) for part in value]
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        if isinstance(value, (set, frozenset)):
            return type(value)(self.of(part) for part in value)
        made = copy.copy(value)
        self._made[id(value)] = value, made
        for name, part in _attributes_of(value).items():
            changed = self.of(part)
            if changed is not part:
                object.__setattr__(made, name, changed)  # a frozen dataclass too
        return made


__all__ = ["find_nodes", "replace_nodes"]
