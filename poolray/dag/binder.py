"""What `bind` makes.

What: checks arguments and makes nodes.
Who calls: `bind` of functions, classes and methods, through `poolray.binding`.
May touch: nothing.
Invariants: what could not be called with these arguments cannot be bound to them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from poolray.actor import ActorClass, ActorHandle, ActorMethod
from poolray.dag.class_node import ClassMethodNode, ClassNode, outputs_of
from poolray.dag.constants import (
    BIND_INDEX_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
)
from poolray.dag.function_node import FunctionNode
from poolray.remote_function import RemoteFunction

#: handle -> numbers of the calls that are bound on it.
_bind_indexes: weakref.WeakKeyDictionary[ActorHandle[Any], Iterator[int]] = (
    weakref.WeakKeyDictionary()
)


def bind_function(
    function: RemoteFunction[Any, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Mapping[str, Any],
) -> FunctionNode:
    """A call of a function, to come."""
    function._bind(args, kwargs)
    return FunctionNode(function, args, kwargs, options)


def bind_class(
    actor_class: ActorClass[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Mapping[str, Any],
) -> ClassNode:
    """An actor, to come."""
    actor_class._constructor.check(args, kwargs)
    return ClassNode(actor_class, args, kwargs, options)


def bind_method(
    method: ActorMethod, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ClassMethodNode | tuple[ClassMethodNode, ...]:
    """A call on an actor that is there, to come; of several return values a node for each."""
    face, handle, options = method._face, method._handle, method._options
    face.check(args, kwargs)
    given = options.num_returns
    count = given if isinstance(given, int) else face.method.num_returns
    streams = isinstance(given, str) or (given is None and face.method.stream)
    indexes = _bind_indexes.setdefault(handle, itertools.count())
    node = ClassMethodNode(
        face.method.name,
        args,
        kwargs,
        {} if streams else {"num_returns": count},
        {
            PARENT_CLASS_NODE_KEY: handle,
            PREV_CLASS_METHOD_CALL_KEY: None,
            BIND_INDEX_KEY: next(indexes),
        },
        count,
        method,
    )
    return outputs_of(node) if count > 1 else node


__all__ = ["bind_class", "bind_function", "bind_method"]
