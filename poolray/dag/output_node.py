"""Where a graph has several results.

What: `MultiOutputNode`.
Who calls: users build graphs with it.
May touch: nothing.
"""

from __future__ import annotations

from typing import Any, final

from poolray.dag.dag_node import DAGNode


@final
class MultiOutputNode(DAGNode):
    """The end of a graph with several results: `execute` gives a list of what its nodes give.

    Parameters
    ----------
    args : list or tuple of DAGNode

    Raises
    ------
    ValueError
        It is neither.

    Examples
    --------
    >>> import poolray
    >>> from poolray.dag import InputNode, MultiOutputNode
    >>> @poolray.remote
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> with InputNode() as given:
    ...     first = double.bind(given)
    ...     both = MultiOutputNode([first, double.bind(first)])
    >>> poolray.get(both.execute(3))
    [6, 12]
    """

    def __init__(self, args: list[Any] | tuple[Any, ...]) -> None:
        if not isinstance(args, (list, tuple)):
            raise ValueError(
                f"Invalid input type for `args`, {type(args)}: MultiOutputNode takes a list of "
                "nodes."
            )
        super().__init__(args, {}, {}, {})

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: dict[str, Any],
        given_args: tuple[Any, ...],
        given_kwargs: dict[str, Any],
    ) -> list[Any]:
        return list(args)


__all__ = ["MultiOutputNode"]
