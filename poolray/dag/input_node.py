"""Where input enters a graph.

What: `InputNode`, its parts, and the record of several arguments.
Who calls: users build graphs with it.
May touch: nothing.
Invariants: a part of an input is one node, however often it is named.
"""

from __future__ import annotations

from typing import Any, NoReturn, final

from poolray.dag.dag_node import DAGNode

_IN_CONTEXT = "__in_context_manager__"
_TYPE = "result_type_string"


@final
class InputNode(DAGNode):
    """Stands for what `execute` is given. Used in a `with` statement.

    Parameters
    ----------
    input_type : type or dict of key to type, optional
        Of the input, or of its parts; only for those who show the graph.

    Examples
    --------
    >>> import poolray
    >>> from poolray.dag import InputNode
    >>> @poolray.remote
    ... def power(base: int, exponent: int) -> int:
    ...     return base**exponent
    >>> with InputNode() as given:
    ...     graph = power.bind(given[0], given.exponent)
    >>> poolray.get(graph.execute(2, exponent=5))
    32
    """

    _is_input = True

    def __init__(
        self,
        *args: Any,
        input_type: type | dict[int | str, type] | None = None,
        **kwargs: Any,
    ) -> None:
        if args or kwargs:
            raise ValueError("InputNode should not take any args or kwargs.")
        self.input_type = input_type
        #: key -> the node of that part.
        self.input_attribute_nodes: dict[int | str, InputAttributeNode] = {}
        other = {_TYPE: input_type.__name__} if isinstance(input_type, type) else {}
        super().__init__((), {}, {}, other)

    def __enter__(self) -> InputNode:
        self._bound_other_args_to_resolve[_IN_CONTEXT] = True
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__") or "_stable_uuid" not in self.__dict__:  # it is being read
            raise AttributeError(f"'InputNode' object has no attribute {key!r}")
        return self._part(key, "__getattr__")

    def __getitem__(self, key: int | str) -> InputAttributeNode:
        if not isinstance(key, (int, str)):
            raise AssertionError(
                "Please only use int index or str as first-level key to access fields of dag "
                f"input, not {key!r}."
            )
        return self._part(key, "__getitem__")

    def __iter__(self) -> NoReturn:
        # Else Python would ask for part 0, 1, 2, … for ever: any part can be bound.
        raise TypeError("An InputNode cannot be iterated over: bind its parts, as in input[0].")

    def _part(self, key: int | str, accessor: str) -> InputAttributeNode:
        if key not in self.input_attribute_nodes:
            types = self.input_type if isinstance(self.input_type, dict) else {}
            name = types[key].__name__ if key in types else None
            InputAttributeNode(self, key, accessor, name)  # enters itself
        return self.input_attribute_nodes[key]

    def get_result_type(self) -> str | None:
        """The name of the input's type, if it was given."""
        name: str | None = self._bound_other_args_to_resolve.get(_TYPE)
        return name

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> Any:
        if not other.get(_IN_CONTEXT):
            raise AssertionError(
                "InputNode is to be used in a context manager: build the graph in "
                "`with InputNode() as given: ...`."
            )
        if len(given_args) == 1 and not given_kwargs:
            return given_args[0]
        return DAGInputData(*given_args, **given_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Parts enter themselves again: they are read after the whole.
        return {**super().__getstate__(), "input_attribute_nodes": {}}


@final
class InputAttributeNode(DAGNode):
    """A part of the input: `given[0]`, `given["key"]` or `given.name`."""

    _is_input = True

    def __init__(
        self,
        dag_input_node: InputNode,
        key: int | str,
        accessor_method: str,
        input_type: str | None = None,
    ) -> None:
        other = {
            "dag_input_node": dag_input_node,
            "key": key,
            "accessor_method": accessor_method,
            _TYPE: input_type,
        }
        super().__init__((), {}, {}, other)

    def _link(self) -> None:
        super()._link()
        whole = self._bound_other_args_to_resolve["dag_input_node"]
        if isinstance(whole, InputNode):
            whole.input_attribute_nodes.setdefault(self.key, self)

    @property
    def key(self) -> int | str:
        """What it is named by."""
        key: int | str = self._bound_other_args_to_resolve["key"]
        return key

    def get_result_type(self) -> str | None:
        """The name of the part's type, if it was given."""
        name: str | None = self._bound_other_args_to_resolve.get(_TYPE)
        return name

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> Any:
        whole, key = other["dag_input_node"], other["key"]
        if isinstance(whole, DAGInputData) or other["accessor_method"] == "__getitem__":
            return whole[key]
        return getattr(whole, key)

    def _title(self) -> str:
        return repr(self.key)


@final
class DAGInputData:
    """What an `InputNode` gives when `execute` has other than one positional argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args = args
        self._kwargs = kwargs

    def __getitem__(self, key: int | str) -> Any:
        """A positional argument by its number, or a keyword argument by its name.

        Raises
        ------
        IndexError, KeyError
            It was not given.
        """
        if isinstance(key, int):
            try:
                return self._args[key]
            except IndexError:
                raise IndexError(
                    f"the graph uses input[{key}], and execute() was given {len(self._args)} "
                    "positional argument(s)"
                ) from None
        try:
            return self._kwargs[key]
        except KeyError:
            raise KeyError(
                f"the graph uses input.{key}, and execute() was not given {key}=...; "
                f"it was given {list(self._kwargs)}"
            ) from None


__all__ = ["DAGInputData", "InputAttributeNode", "InputNode"]
