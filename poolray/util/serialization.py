"""Serializers of one's own, for classes that cannot be pickled or not well.

What: `register_serializer` and `deregister_serializer`.
Who calls: users.
May touch: this process's table of registered classes, in `poolray/objects/reducers.py`.
Invariants: what a registered serializer wrote can be read by any process; a reader learns of the
registration with the first value, so that it can send such values on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from poolray.objects import reducers

T = TypeVar("T")

__all__ = ["deregister_serializer", "register_serializer"]


def register_serializer(
    cls: type[T], *, serializer: Callable[[T], Any], deserializer: Callable[[Any], T]
) -> None:
    """Write instances of a class by a function of one's own.

    Parameters
    ----------
    cls : type
        Instances of exactly this class; a subclass needs a registration of its own.
    serializer : callable
        Turns an instance into something that can be pickled.
    deserializer : callable
        Turns that into an instance; must itself be serializable.

    Raises
    ------
    TypeError
        `cls` is not a class; a function is not callable.

    Notes
    -----
    Holds in this process, for `put`, tasks, pools and executors, from the next value on; a second
    registration replaces the first. Workers that are forked later have it too, and any worker has
    it once it has read such a value. May be called before `init`. A type that pickle knows by
    heart (`int`, `str`, `bytes`, `list`, `dict`, `tuple`, `set`, functions and classes) keeps its
    own way.

    Examples
    --------
    >>> import threading
    >>> import poolray
    >>> class Counter:
    ...     def __init__(self, count):
    ...         self.count, self.lock = count, threading.Lock()
    >>> poolray.util.register_serializer(
    ...     Counter, serializer=lambda counter: counter.count, deserializer=Counter
    ... )
    >>> poolray.get(poolray.put(Counter(3))).count
    3
    >>> poolray.util.deregister_serializer(Counter)
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, not {cls!r:.200}")
    for name, function in (("serializer", serializer), ("deserializer", deserializer)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, not {function!r:.200}")
    reducers.register(cls, serializer, deserializer)


def deregister_serializer(cls: type) -> None:
    """Take a registration back, in this process; does nothing if there is none."""
    reducers.deregister(cls)
