"""Where tasks are to run: values for the option `scheduling_strategy`.

What: descriptions, checked when they are made; beside them the strings "DEFAULT" and "SPREAD".
Who calls: user code, as `poolray.util.scheduling_strategies`; `remote_placement.py` reads them.
May touch: nothing.
Invariants: a strategy never changes.
"""

from __future__ import annotations

from typing import Any, TypeAlias, final

from poolray.exceptions import NotSupportedError
from poolray.plain_values import plain_string

__all__ = [
    "DoesNotExist",
    "Exists",
    "In",
    "LabelMatchExpressionsT",
    "NodeAffinitySchedulingStrategy",
    "NodeLabelSchedulingStrategy",
    "NotIn",
    "PlacementGroupSchedulingStrategy",
    "SchedulingStrategyT",
]

_NODE_ID_DIGITS = 56


@final
class PlacementGroupSchedulingStrategy:
    """Run in a bundle of a placement group.

    Parameters
    ----------
    placement_group : PlacementGroup or None
        None: in none.
    placement_group_bundle_index : int, default -1
        Which bundle; -1: any.
    placement_group_capture_child_tasks : bool, optional
        Whether tasks that the task submits run in the group as well.
    """

    def __init__(
        self,
        placement_group: Any,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks


@final
class NodeAffinitySchedulingStrategy:
    """Run on one node.

    Parameters
    ----------
    node_id : str
        Its id, 56 hexadecimal digits.
    soft : bool
        Whether another one will do where that node is gone or can never run the task; else the task
        fails with `TaskUnschedulableError`. A node that is merely busy is waited for.

    Raises
    ------
    ValueError
        That is no node's id.
    NotSupportedError
        What is to become of the task while the node is busy.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    >>> here = poolray.get_runtime_context().get_node_id()
    >>> task = poolray.remote(lambda: poolray.get_runtime_context().get_node_id())
    >>> strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    >>> poolray.get(task.options(scheduling_strategy=strategy).remote()) == here
    True
    """

    def __init__(
        self,
        node_id: str | bytes,
        soft: bool,
        _spill_on_unavailable: bool = False,
        _fail_on_unavailable: bool = False,
    ) -> None:
        if _spill_on_unavailable or _fail_on_unavailable:
            raise NotSupportedError(
                "_spill_on_unavailable and _fail_on_unavailable are not supported by this version "
                "of poolray: a node that is busy is waited for."
            )
        if not isinstance(node_id, str):
            node_id = node_id.hex()
        self.node_id = plain_string(node_id)
        self.soft = soft
        try:
            is_valid = len(bytes.fromhex(node_id)) * 2 == len(node_id) == _NODE_ID_DIGITS
        except ValueError:
            is_valid = False
        if not is_valid or set(node_id.lower()) == {"f"}:
            raise ValueError(
                f"Invalid node_id '{node_id}'. Node ID must be a valid hex string. To get a list "
                "of all nodes and their IDs in your cluster, use ray.nodes()."
            )


class _Values:
    """Values of a label."""

    def __init__(self, *values: str) -> None:
        operator = type(self).__name__
        if not values:
            raise ValueError(
                f"The variadic parameter of the {operator} operator must be a non-empty tuple: "
                f'e.g. {operator}("value1", "value2").'
            )
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(
                    f"Type of value in position {index} for the {operator} operator must be str "
                    f'(e.g. {operator}("value1", "value2")) but got {value} of type {type(value)}.'
                )
        self.values = [plain_string(value) for value in values]


@final
class In(_Values):
    """The label has one of these values."""


@final
class NotIn(_Values):
    """The label has none of these values; a node without the label will do."""


@final
class Exists:
    """The label is there."""


@final
class DoesNotExist:
    """The label is not there."""


LabelMatchExpressionsT: TypeAlias = dict[str, In | NotIn | Exists | DoesNotExist]


@final
class _LabelMatchExpression:
    """A condition on one label."""

    def __init__(self, key: str, operator: In | NotIn | Exists | DoesNotExist) -> None:
        self.key = plain_string(key)
        self.operator = operator


@final
class NodeLabelSchedulingStrategy:
    """Run on a node with such labels.

    Parameters
    ----------
    hard : dict of str to In, NotIn, Exists or DoesNotExist
        What the node must have; without such a node the task waits for one.
    soft : dict, optional
        What it should have beyond that. On one machine there is nothing to choose from.

    Raises
    ------
    ValueError
        Both are empty, or something else is in them.

    Examples
    --------
    >>> from poolray.util.scheduling_strategies import In, NodeLabelSchedulingStrategy
    >>> NodeLabelSchedulingStrategy({"zone": In("a", "b")}).hard[0].operator.values
    ['a', 'b']
    """

    def __init__(
        self, hard: LabelMatchExpressionsT, *, soft: LabelMatchExpressionsT | None = None
    ) -> None:
        self.hard = _to_expressions(hard, "hard")
        self.soft = _to_expressions(soft, "soft")
        if not (self.hard or self.soft):
            raise ValueError(
                "The `hard` and `soft` parameter of NodeLabelSchedulingStrategy cannot both be "
                "empty."
            )


def _to_expressions(given: LabelMatchExpressionsT | None, name: str) -> list[_LabelMatchExpression]:
    if given is None:
        return []
    if not isinstance(given, dict):
        raise ValueError(
            f'The {name} parameter must be a map (e.g. {{"key1": In("value1")}}) but got type '
            f"{type(given)}."
        )
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(
                f"The map key of the {name} parameter must be of type str (e.g. "
                f'{{"key1": In("value1")}}) but got {key} of type {type(key)}.'
            )
        if not isinstance(value, In | NotIn | Exists | DoesNotExist):
            raise ValueError(
                f"The map value for key {key} of the {name} parameter must be one of the `In`, "
                '`NotIn`, `Exists` or `DoesNotExist` operator (e.g. {"key1": In("value1")}) but '
                f"got {value} of type {type(value)}."
            )
    return [_LabelMatchExpression(key, value) for key, value in given.items()]


SchedulingStrategyT: TypeAlias = (
    str
    | PlacementGroupSchedulingStrategy
    | NodeAffinitySchedulingStrategy
    | NodeLabelSchedulingStrategy
    | None
)
