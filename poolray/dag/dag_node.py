"""What all nodes of a lazy graph have in common.

    f.bind(x) ──▶ node ◀── arguments, perhaps nested ── other nodes ◀── … ── InputNode
                    └── execute(value): children first, each node once ──▶ ref, handle or list
What: keeps bound arguments, walks a graph, runs it.
Who calls: `bind` makes nodes, users execute and inspect them.
May touch: nothing; calls go through the remote functions and handles that nodes hold.
Invariants: a node does not change once it is bound; within one execution a node is run once,
however many others use it; children are run before those who use them, in the order in which
arguments name them, without recursion.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from poolray.dag.nesting import find_nodes, replace_nodes
from poolray.exceptions import NotSupportedError

T = TypeVar("T")


class DAGNode:
    """A call, an actor or an input in a graph that has not run. Made by `bind`.

    Examples
    --------
    >>> import poolray
    >>> from poolray.dag import InputNode
    >>> @poolray.remote
    ... def add(a: int, b: int) -> int:
    ...     return a + b
    >>> with InputNode() as number:
    ...     graph = add.bind(add.bind(number, 1), number)
    >>> poolray.get(graph.execute(10))
    21
    """

    def __init__(
        self,
        args: Iterable[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        other_args_to_resolve: Mapping[str, Any],
    ) -> None:
        self._bound_args = tuple(args)
        self._bound_kwargs = dict(kwargs)
        self._bound_options = dict(options)
        #: What it depends on beside its arguments, by the names of `constants.py`.
        self._bound_other_args_to_resolve = dict(other_args_to_resolve)
        #: The same in copies and in other processes.
        self._stable_uuid = uuid.uuid4().hex
        #: Filled by `execute(_ray_cache_refs=True)`: uuid of a node -> what it gave.
        self.cache_from_last_execute: dict[str, Any] = {}
        self._link()

    def _link(self) -> None:
        #: Nodes that use this one; they hold it, not the reverse.
        self._users: list[weakref.ref[DAGNode]] = []
        self._children = self._find_children()
        for child in self._children:
            child._users.append(weakref.ref(self))

    def _find_children(self) -> list[DAGNode]:
        bound = [self._bound_args, self._bound_kwargs, self._bound_other_args_to_resolve]
        return find_nodes(bound, DAGNode)

    # ---- what was bound --------------------------------------------------------------------------

    def get_args(self) -> tuple[Any, ...]:
        """The positional arguments that were bound."""
        return self._bound_args

    def get_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that were bound."""
        return self._bound_kwargs.copy()

    def get_options(self) -> dict[str, Any]:
        """What `.options(...)` was given before `bind`."""
        return self._bound_options.copy()

    def get_other_args_to_resolve(self) -> dict[str, Any]:
        """What the node depends on beside its arguments: an actor, the call before."""
        return self._bound_other_args_to_resolve.copy()

    def get_stable_uuid(self) -> str:
        """A name of the node that its copies share, in other processes too."""
        return self._stable_uuid

    # ---- running ---------------------------------------------------------------------------------

    def execute(self, *args: Any, _ray_cache_refs: bool = False, **kwargs: Any) -> Any:
        """Run the graph that ends in this node.

        Parameters
        ----------
        *args, **kwargs
            Input: a single positional argument is what `InputNode` stands for; of several,
            `input[0]` and `input.name` are the parts.
        _ray_cache_refs : bool, default False
            Keep what each node gave for `get_object_refs_from_last_execute`.

        Returns
        -------
        ObjectRef, list, or ActorHandle
            What `.remote()` gives for the call at the end; of a class node the handle, of
            `MultiOutputNode` the list of what its nodes give, of an input node the input.

        Raises
        ------
        AssertionError
            The graph has two input nodes, or one that was made outside of a `with` statement.
        ValueError
            The graph has an input, and none was given.
        KeyError, IndexError, AttributeError, TypeError
            The input lacks a part that the graph names.

        Notes
        -----
        Does not block. Each call makes the actors of class nodes anew; a handle that was bound
        is the same actor each time. Nothing is submitted when the input does not fit.
        """
        values: dict[str, Any] = {}
        nodes = self._in_order()
        _check_inputs(nodes, args, kwargs)

        def value_of(node: DAGNode) -> Any:
            return values[node._stable_uuid]

        # Inputs first: what is wrong with them shows before anything runs.
        for node in sorted(nodes, key=lambda node: not node._is_input):
            if node._stable_uuid not in values:
                bound = node._bound_values(value_of)
                values[node._stable_uuid] = node._run(*bound, args, kwargs)
        if _ray_cache_refs:
            self.cache_from_last_execute = values
        return values[self._stable_uuid]

    #: Whether its value is known without running anything.
    _is_input = False

    def _bound_values(
        self, value_of: Callable[[DAGNode], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """All that is bound, with values in the places of nodes."""
        bound = self._bound_args, self._bound_kwargs, self._bound_other_args_to_resolve
        if not self._children:
            return bound
        args, kwargs, other = bound
        return (
            tuple(replace_nodes(arg, DAGNode, value_of) for arg in args),
            {name: replace_nodes(arg, DAGNode, value_of) for name, arg in kwargs.items()},
            {name: replace_nodes(arg, DAGNode, value_of) for name, arg in other.items()},
        )

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> Any:
        """What the node gives for these bound values and this input."""
        raise NotImplementedError

    async def get_object_refs_from_last_execute(self) -> dict[str, Any]:
        """What each node gave in the last `execute(_ray_cache_refs=True)`, by uuid."""
        return dict(self.cache_from_last_execute)

    def clear_cache(self) -> None:
        """Forget what `execute(_ray_cache_refs=True)` kept."""
        self.cache_from_last_execute = {}

    def experimental_compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported by this version: compiled graphs.

        Raises
        ------
        NotSupportedError
            Always.
        """
        raise NotSupportedError(
            "Compiled graphs (`experimental_compile`) are not supported by this version of "
            "poolray: call `execute` on the node itself."
        )

    def with_tensor_transport(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported by this version: it is for compiled graphs.

        Raises
        ------
        NotSupportedError
            Always.
        """
        raise NotSupportedError(
            "with_tensor_transport() is for compiled graphs, which are not supported by this "
            "version of poolray: leave it out, values travel through shared memory."
        )

    # ---- walking ---------------------------------------------------------------------------------

    def _in_order(self) -> list[DAGNode]:
        """This node and all below it, each once, children first."""
        order: dict[str, DAGNode] = {}
        entered: set[str] = set()
        pending: list[tuple[DAGNode, bool]] = [(self, False)]
        while pending:
            node, children_done = pending.pop()
            if children_done:
                order.setdefault(node._stable_uuid, node)
            elif node._stable_uuid not in entered:
                entered.add(node._stable_uuid)
                pending.append((node, True))
                pending.extend((child, False) for child in reversed(node._children))
        return list(order.values())

    def apply_recursive(self, fn: Callable[[DAGNode], T]) -> T:
        """Call `fn` on each node of the graph once, children first.

        Parameters
        ----------
        fn : callable
            Is given a copy of a node in whose arguments the results of `fn` for the node's
            children stand in their places.

        Returns
        -------
        object
            What it gives for this node.

        Examples
        --------
        >>> import poolray
        >>> @poolray.remote
        ... def add(a: int, b: int) -> int:
        ...     return a + b
        >>> add.bind(add.bind(1, 2), 3).apply_recursive(lambda node: sum(node.get_args()))
        6
        """
        made: dict[str, Any] = {}
        order = self._in_order()
        _check_one_input(order)
        for node in order:
            made[node._stable_uuid] = fn(node._copy(lambda child: made[child._stable_uuid]))
        result: T = made[self._stable_uuid]
        return result

    def _copy(self, value_of: Callable[[DAGNode], Any]) -> DAGNode:
        """The same node with other things in the places of its children."""
        made: DAGNode = object.__new__(type(self))
        args, kwargs, other = self._bound_values(value_of)
        made.__dict__.update(self.__dict__)
        made._bound_args, made._bound_kwargs = args, dict(kwargs)
        made._bound_other_args_to_resolve = dict(other)
        made._bound_options = dict(self._bound_options)
        made.cache_from_last_execute = {}
        made._link()
        return made

    def apply_functional(
        self,
        source_input_list: Any,
        predicate_fn: Callable[[DAGNode], bool],
        apply_fn: Callable[[DAGNode], Any],
    ) -> Any:
        """`source_input_list` with `apply_fn(node)` in the place of each node in it that
        `predicate_fn` accepts.
        """
        made: dict[int, Any] = {}

        def replace(node: DAGNode) -> Any:
            if id(node) not in made:
                made[id(node)] = apply_fn(node) if predicate_fn(node) else node
            return made[id(node)]

        return replace_nodes(source_input_list, DAGNode, replace)

    def traverse_and_apply(self, fn: Callable[[DAGNode], Any]) -> None:
        """Call `fn` on each node that is connected with this one, users of nodes included.

        Raises
        ------
        ValueError
            A node has others nested in a container among its arguments.
        """
        visited: dict[int, DAGNode] = {}
        pending = [self]
        for node in pending:  # which grows meanwhile
            if id(node) in visited:
                continue
            node._refuse_nesting()
            visited[id(node)] = node
            fn(node)
            users = [user for reference in node._users if (user := reference()) is not None]
            pending.extend(other for other in [*users, *node._children] if id(other) not in visited)

    def _refuse_nesting(self) -> None:
        for arg in self._bound_args:
            if not isinstance(arg, DAGNode) and (nested := find_nodes(arg, DAGNode)):
                raise ValueError(
                    f"Found {len(nested)} DAGNodes from the arg {arg} in {self}. Please ensure "
                    "that the argument is a single DAGNode and that a DAGNode is not allowed to "
                    "be placed inside any type of container."
                )

    # ---- what it looks like, and how it travels --------------------------------------------------

    def _title(self) -> str:
        """What it stands for, in a word."""
        return ""

    def __str__(self) -> str:
        parts = [
            part
            for part in (
                self._title(),
                *(str(arg) for arg in self._bound_args),
                *(f"{name}={arg}" for name, arg in self._bound_kwargs.items()),
            )
            if part
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_users"], state["_children"]
        state["cache_from_last_execute"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._link()

    def __getattr__(self, name: str) -> Any:
        if name == "bind":
            raise AttributeError(f".bind() cannot be used again on {type(self)}")
        if name == "remote":
            raise AttributeError(
                f".remote() cannot be used on {type(self)}. To execute the task graph for this "
                "node, use .execute()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _check_one_input(nodes: list[DAGNode]) -> list[DAGNode]:
    """The input node, if there is one; not two."""
    from poolray.dag.input_node import InputNode

    inputs: list[DAGNode] = [node for node in nodes if isinstance(node, InputNode)]
    if len(inputs) > 1:
        raise AssertionError(
            f"Each DAG should only have one unique InputNode, and this one has {len(inputs)}: "
            "bind parts of one input, as in `input[0]` and `input.name`."
        )
    return inputs


def _check_inputs(nodes: list[DAGNode], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse input that is missing, before anything runs."""
    if _check_one_input(nodes) and not args and not kwargs:
        raise ValueError(
            "This graph has an InputNode, and execute() was given no input: pass it as in "
            "`execute(value)` or `execute(first, name=second)`."
        )


__all__ = ["DAGNode"]
