"""Calls of remote functions in a graph.

What: `FunctionNode`.
Who calls: `RemoteFunction.bind`, through the binder.
May touch: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from poolray.dag.dag_node import DAGNode
from poolray.remote_function import RemoteFunction


@final
class FunctionNode(DAGNode):
    """A call of a remote function, to come. Made by `function.bind(...)`."""

    def __init__(
        self,
        function: RemoteFunction[Any, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._function = function
        super().__init__(args, kwargs, options, {})

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> Any:
        function: Any = self._function
        return function.remote(*args, **kwargs)

    def _title(self) -> str:
        return self._function.__qualname__.rpartition(".")[2]


__all__ = ["FunctionNode"]
