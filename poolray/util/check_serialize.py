"""Finds the part of a value that cannot be serialized.

What: `inspect_serializability` tries a value, then its parts, as deep as it is told to.
Who calls: users, after an error that says that something cannot be pickled.
May touch: the value; prints to a stream.
Invariants: each object is looked at once, so values that contain themselves end the search too.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, final

from poolray.objects.serialization import Serializer, dumps_function, main_definitions

__all__ = ["FailureTuple", "inspect_serializability"]

_LINE_CHARACTERS = 80


@final
class FailureTuple:
    """A part that cannot be serialized.

    Attributes
    ----------
    obj : object
        The part.
    path : tuple of str
        Names that lead to it, outermost first.
    parent : object
        What refers to it; None for the inspected value itself.
    """

    def __init__(self, obj: Any, path: tuple[str, ...], parent: Any) -> None:
        self.obj = obj
        self.path = path
        self.parent = parent

    @property
    def name(self) -> str:
        """The last name on the path."""
        return self.path[-1] if self.path else "unknown"

    def __repr__(self) -> str:
        path = " -> ".join(self.path)
        return (
            f"FailTuple({self.name} [path={path}, obj={_text(self.obj)}, "
            f"parent={_text(self.parent)}])"
        )


def inspect_serializability(
    base_obj: Any,
    name: str | None = None,
    depth: int = 3,
    print_file: TextIO | None = None,
) -> tuple[bool, set[FailureTuple]]:
    """Find out which parts of a value keep it from being sent to a worker.

    Parameters
    ----------
    base_obj : object
        A function, or any value.
    name : str, optional
        What to call it.
    depth : int, default 3
        How many steps to go into it: variables of functions, attributes of objects, items of
        containers.
    print_file : file, default `sys.stdout`
        Where the tree of what was tried is printed.

    Returns
    -------
    serializable : bool
    failures : set of FailureTuple
        The innermost parts found that cannot be serialized.

    Examples
    --------
    >>> import io, threading
    >>> import poolray
    >>> lock = threading.Lock()
    >>> def locked():
    ...     return lock
    >>> good, failures = poolray.util.inspect_serializability(locked, print_file=io.StringIO())
    >>> good, [failure.name for failure in failures]
    (False, ['lock'])
    """
    inspector = _Inspector(print_file)
    title = f"Checking Serializability of {_text(base_obj)}"
    line = "=" * min(len(title), _LINE_CHARACTERS)
    for text in (line, title, line):
        inspector.say(0, text)
    error = _error_of(base_obj)
    if error is not None:
        inspector.say(0, f"!!! FAIL serialization: {error}")
        inspector.explore(base_obj, () if name is None else (name,), None, depth, 0)
        inspector.say(0, line)
        inspector.say(0, "Variable:\n")
        for failure in inspector.failures:
            inspector.say(1, repr(failure))
        inspector.say(
            0,
            "\nwas found to be non-serializable: make it where it is used, inside of the function "
            "or of the task, or register a serializer for its class "
            "(poolray.util.register_serializer).",
        )
        inspector.say(0, line)
    return error is None, set(inspector.failures)


def _error_of(value: object) -> Exception | None:
    """Why a value cannot be serialized; None if it can."""
    try:
        if isinstance(value, types.FunctionType):
            dumps_function(value)
        else:
            Serializer(main_definitions=main_definitions(), out_of_band_all=True).dumps(value)
    except Exception as error:
        return error
    return None


@final
class _Inspector:
    """Goes into a value that failed."""

    def __init__(self, print_file: TextIO | None) -> None:
        self._file = print_file
        #: id -> object that failed; kept alive, so that ids stay theirs.
        self._failed: dict[int, Any] = {}
        #: Ids of those that are being looked into now.
        self._open: dict[int, None] = {}
        self.failures: list[FailureTuple] = []

    def say(self, level: int, text: str) -> None:
        """Print a line of the tree."""
        print("    " * level + text, file=self._file)

    def explore(
        self, value: Any, path: tuple[str, ...], parent: Any, depth: int, level: int
    ) -> None:
        """Look for the parts that make a value fail; it is one itself if none is found."""
        self._failed[id(value)] = value
        self._open[id(value)] = None
        found = False
        if depth > 0:
            for kind, parts in _parts_of(value):
                if not parts:
                    continue
                self.say(level, f"Inspecting {len(parts)} {kind} of {_text(value)}:")
                for name, part in parts.items():
                    found = self._try(name, part, path, value, depth, level + 1) or found
        if not found:
            if depth > 0:
                self.say(level, "None of its parts fails alone: it is the value itself.")
            self.failures.append(FailureTuple(value, path, parent))
        del self._open[id(value)]

    def _try(
        self, name: str, part: Any, path: tuple[str, ...], parent: Any, depth: int, level: int
    ) -> bool:
        """Whether a part fails; looks into it if so."""
        if id(part) in self._failed:
            return id(part) not in self._open  # what contains itself does not fail for that
        error = _error_of(part)
        if error is None:
            return False
        self.say(level, f"'{name}' {_text(part)}: !!! FAIL serialization: {error}")
        self.explore(part, (*path, name), parent, depth - 1, level)
        return True


def _parts_of(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a value consists of, by kind: names and parts."""
    if isinstance(value, functools.partial):
        arguments = {f"argument {i}": item for i, item in enumerate(value.args)}
        yield "parts", {"func": value.func, **arguments, **value.keywords}
    elif isinstance(value, types.MethodType):
        yield "parts", {"__self__": value.__self__, "__func__": value.__func__}
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, Mapping):
        yield "items", {f"[{_text(key)}]": item for key, item in value.items()}
        yield "keys", {f"key {_text(key)}": key for key in value}
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield "items", {f"[{index}]": item for index, item in enumerate(value)}
    if isinstance(value, type):
        own = {n: m for n, m in vars(value).items() if not n.startswith("__") or callable(m)}
        yield "members", {name: getattr(m, "__func__", m) for name, m in own.items()}
    elif not isinstance(value, (types.FunctionType, types.MethodType, types.ModuleType)):
        yield from _parts_of_object(value)


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        variables = inspect.getclosurevars(function)
    except ValueError:  # a variable of the closure has no value yet
        return
    yield "global variables", dict(variables.globals)
    yield "nonlocal variables", dict(variables.nonlocals)
    yield (
        "default values",
        dict(function.__kwdefaults__ or {})
        | {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())},
    )
    yield "attributes", dict(vars(function))


def _parts_of_object(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    attributes = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                attributes.setdefault(name, getattr(value, name))
    yield "attributes", attributes
    if type(value).__module__ == "__main__" or "<locals>" in type(value).__qualname__:
        yield "classes", {type(value).__qualname__: type(value)}  # goes along by value


def _text(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__qualname__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= 200 else text[:200] + "…"
