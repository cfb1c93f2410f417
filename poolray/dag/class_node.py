"""Actors, and calls of their methods, in a graph.

What: `ClassNode`, an actor that each execution makes anew, and `ClassMethodNode`, a call on such
an actor or on one that is there already.
Who calls: `bind` of classes and methods, through the binder.
May touch: nothing.
Invariants: calls that were bound on one class node run in the order of their binding: each depends
on the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from poolray.actor import ActorClass, ActorHandle, ActorMethod
from poolray.actor_methods import MethodFace
from poolray.dag.constants import (
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
)
from poolray.dag.dag_node import DAGNode
from poolray.dag.input_node import InputNode


@final
class ClassNode(DAGNode):
    """An actor, to come. Made by `Class.bind(...)`; its methods have `bind`.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Counter:
    ...     def __init__(self, start: int) -> None:
    ...         self.value = start
    ...     def add(self, n: int) -> int:
    ...         self.value += n
    ...         return self.value
    >>> counter = Counter.bind(10)
    >>> graph = counter.add.bind(5)
    >>> [poolray.get(graph.execute()) for _ in range(2)]  # an actor of its own each time
    [15, 15]
    """

    def __init__(
        self,
        actor_class: ActorClass[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._actor_class = actor_class
        #: The call that was bound last.
        self._last_call: ClassMethodNode | None = None
        super().__init__(args, kwargs, options, {})
        if any(isinstance(node, InputNode) for node in self._in_order()):
            raise ValueError(
                "InputNode cannot be an argument of an actor's constructor, nor of what that "
                "depends on: pass the input to a method."
            )

    def __getattr__(self, name: str) -> Any:
        if name in ("bind", "remote") or name.startswith("__") or name == "_actor_class":
            return super().__getattr__(name)
        for method in self._actor_class._methods:
            if method.name == name:
                return _UnboundMethod(self, MethodFace(method), {})
        raise AttributeError(
            f"type object '{self._actor_class.__name__}' has no attribute '{name}'"
        )

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> ActorHandle[Any]:
        return self._actor_class.remote(*args, **kwargs)

    def _title(self) -> str:
        return self._actor_class.__name__

    def __getstate__(self) -> dict[str, Any]:
        # Calls enter themselves again, in their order: each is read after the one before.
        return {**super().__getstate__(), "_last_call": None}


@final
class _UnboundMethod:
    """A method of a class node."""

    def __init__(self, parent: ClassNode, face: MethodFace, options: Mapping[str, Any]) -> None:
        self._parent = parent
        self._face = face
        self._options = options

    def bind(self, /, *args: Any, **kwargs: Any) -> ClassMethodNode:
        """A call of the method, to come; it runs after those that were bound before.

        Raises
        ------
        TypeError
            The arguments do not fit the method's parameters.
        """
        self._face.check(args, kwargs)
        before = {
            PARENT_CLASS_NODE_KEY: self._parent,
            PREV_CLASS_METHOD_CALL_KEY: self._parent._last_call,
        }
        method = self._face.method
        return ClassMethodNode(method.name, args, kwargs, self._options, before, method.num_returns)

    def options(self, **options: Any) -> _UnboundMethod:
        """The same method with other options, as those of a handle's methods."""
        no_actor: Any = None
        ActorMethod(no_actor, self._face).options(**options)  # refuses what it would refuse later
        return _UnboundMethod(self._parent, self._face, options)

    def __getattr__(self, name: str) -> Any:
        if name == "remote":
            raise AttributeError(
                ".remote() cannot be used on ClassMethodNodes. Use .bind() instead to express a "
                "symbolic actor call."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@final
class ClassMethodNode(DAGNode):
    """A call of an actor's method, to come; or one of several values that such a call returns."""

    def __init__(
        self,
        method_name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
        other_args_to_resolve: Mapping[str, Any],
        num_returns: int,
        method: ActorMethod | None = None,
    ) -> None:
        self._method_name = method_name
        #: Of an actor that is there already.
        self._method = method
        #: Of the method as its class has it.
        self._default_returns = num_returns
        super().__init__(args, kwargs, options, other_args_to_resolve)

    def _link(self) -> None:
        super()._link()
        parent = self._bound_other_args_to_resolve.get(PARENT_CLASS_NODE_KEY)
        if isinstance(parent, ClassNode):
            parent._last_call = self

    def get_method_name(self) -> str:
        """The method's name."""
        return self._method_name

    @property
    def num_returns(self) -> int:
        """How many values the call returns."""
        given = self._bound_options.get("num_returns")
        return given if isinstance(given, int) else self._default_returns

    @property
    def is_class_method_call(self) -> bool:
        """Whether it is a call."""
        return not self.is_class_method_output

    @property
    def is_class_method_output(self) -> bool:
        """Whether it is one of several values that a call returns."""
        return bool(self._bound_other_args_to_resolve.get(IS_CLASS_METHOD_OUTPUT_KEY))

    @property
    def class_method_call(self) -> ClassMethodNode | None:
        """The call that returns this value; None for a call."""
        return self._bound_args[0] if self.is_class_method_output else None

    @property
    def output_idx(self) -> int | None:
        """Which of the call's values it is; None for a call."""
        return self._bound_args[1] if self.is_class_method_output else None

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> Any:
        if self.is_class_method_output:
            refs, index = args
            return refs[index]
        method = self._method
        if method is None:
            method = getattr(other[PARENT_CLASS_NODE_KEY], self._method_name)
            if self._bound_options:
                method = method.options(**self._bound_options)
        return method.remote(*args, **kwargs)

    def _title(self) -> str:
        return f"{self._method_name}()"

    def __repr__(self) -> str:
        return str(self)


def outputs_of(call: ClassMethodNode) -> tuple[ClassMethodNode, ...]:
    """A node for each value that a call returns."""
    return tuple(
        ClassMethodNode(
            f"return_idx_{index}",
            (call, index),
            {},
            {},
            {IS_CLASS_METHOD_OUTPUT_KEY: True},
            call.num_returns,
        )
        for index in range(call.num_returns)
    )


__all__ = ["ClassMethodNode", "ClassNode", "outputs_of"]
