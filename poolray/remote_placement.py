"""Where a task may run, as options say it: strategies and label selectors.

What: checks them as they are given and turns them into a `Placement`.
Who calls: `remote_function.py`.
May touch: nothing.
Invariants: what cannot be understood is refused when it is given, never later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from poolray.ids import NodeId, PlacementGroupId
from poolray.protocol.values import LabelMatch, LabelOperator, Placement
from poolray.remote_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
    SchedulingStrategyT,
)
from poolray.scheduling.labels import NAME, NAME_RULE, NODE_ID_LABEL, check_key

if TYPE_CHECKING:
    from poolray.remote_groups import PlacementGroup

_SELECTOR = rf"(!?)(?:in)?\(({NAME}(?:, ?{NAME})*)\)|(!?)({NAME})"
_STRATEGIES = (
    type(None),
    str,
    PlacementGroupSchedulingStrategy,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
)


def check_strategy(value: Any) -> None:
    """Refuse what is no scheduling strategy; a string is looked at when a task is submitted.

    Raises
    ------
    TypeError
        It is something else.
    AssertionError
        Its placement group is something else, as in the reference.
    """
    if not isinstance(value, _STRATEGIES):
        raise TypeError(
            f"The type of keyword 'scheduling_strategy' must be {_STRATEGIES}, but received type "
            f"{type(value)}"
        )
    if isinstance(value, PlacementGroupSchedulingStrategy):
        check_group(value.placement_group)


def make_placement(
    options: Mapping[str, Any],
    demand: Mapping[str, int],
    name: str,
    captured: PlacementGroupId,
) -> Placement | None:
    """Where calls with these options may run; None: wherever their resources are.

    Parameters
    ----------
    demand : mapping of str to int
        What a call asks for.
    name : str
        What the calls are called, for errors.
    captured : PlacementGroupId
        The group of the task that submits them, if its own tasks run there too.

    Raises
    ------
    ValueError
        `scheduling_strategy` is a string other than "DEFAULT" and "SPREAD", no bundle of the
        placement group has room, or options contradict each other.
    """
    strategy: SchedulingStrategyT = options.get("scheduling_strategy")
    group = _group_of(options, captured)
    if group is not None:
        return _in_group(group, demand, name)
    if isinstance(strategy, str) and strategy not in ("DEFAULT", "SPREAD"):
        raise ValueError(
            f"Invalid scheduling_strategy value {strategy}. Valid values are "
            '["DEFAULT" | "SPREAD" | PlacementGroupSchedulingStrategy | '
            "NodeAffinitySchedulingStrategy]"
        )
    selectors = [parse_selector(options.get("label_selector") or {})]
    if selectors[0] or options.get("fallback_strategy"):
        selectors += parse_fallbacks(options.get("fallback_strategy") or [])
    if isinstance(strategy, NodeLabelSchedulingStrategy):
        hard = [_of_operator(each.key, each.operator) for each in strategy.hard]
        selectors = [[*hard, *selector] for selector in selectors]
    if not all(selectors):
        selectors = []  # one of them asks for nothing: any node will do
    named = _node_named(selectors) if strategy in (None, "DEFAULT") else None
    if named is not None:
        return Placement(node_id=named, is_soft=False, labels=selectors)
    if isinstance(strategy, NodeAffinitySchedulingStrategy):
        return Placement(
            node_id=NodeId(bytes.fromhex(strategy.node_id)),
            is_soft=strategy.soft,
            labels=selectors,
        )
    if isinstance(strategy, NodeLabelSchedulingStrategy):
        wishes = [_of_operator(each.key, each.operator) for each in strategy.soft]
        return Placement(labels=selectors, wishes=wishes)
    spread = strategy == "SPREAD"
    return Placement(labels=selectors, spread=spread) if selectors or spread else None


def _node_named(selectors: list[list[LabelMatch]]) -> NodeId | None:
    """The node that is asked for by the label that is its id: without it the call fails."""
    if len(selectors) != 1:
        return None
    for match in selectors[0]:
        if match.key == NODE_ID_LABEL and match.operator is LabelOperator.IN:
            digits = match.values[0]
            if len(match.values) == 1 and re.fullmatch(r"[0-9a-f]{56}", digits):
                return NodeId(bytes.fromhex(digits))
    return None


def _group_of(
    options: Mapping[str, Any], captured: PlacementGroupId
) -> tuple[PlacementGroup, int, bool] | None:
    """Placement group, bundle and whether child tasks are captured; None: no group."""
    from poolray.remote_groups import PlacementGroup, PlacementGroupID

    strategy = options.get("scheduling_strategy")
    group = options.get("placement_group", "default")
    index = options.get("placement_group_bundle_index", -1)
    captures = options.get("placement_group_capture_child_tasks")
    if strategy is not None and group != "default":
        raise ValueError(
            "Placement groups should be specified via the scheduling_strategy option. The "
            "placement_group option is deprecated."
        )
    if isinstance(strategy, PlacementGroupSchedulingStrategy):
        group = strategy.placement_group
        index = strategy.placement_group_bundle_index
        captures = strategy.placement_group_capture_child_tasks
    elif strategy is None and group == "default" and captured and captures is not False:
        return PlacementGroup(PlacementGroupID(captured)), -1, True
    if isinstance(group, PlacementGroup) and not group.is_empty:
        return group, index, bool(captured) if captures is None else captures
    if index != -1:
        raise ValueError("If placement group is not set, the value of bundle index must be -1.")
    return None


def _in_group(
    wanted: tuple[PlacementGroup, int, bool], demand: Mapping[str, int], name: str
) -> Placement:
    from poolray.remote_groups import check_fits

    group, index, captures = wanted
    check_fits(group, index, demand, name)
    return Placement(group=group.id.binary(), bundle=index, captures=captures)


def check_group(group: Any) -> None:
    """Refuse what is no placement group, where one may be named.

    Raises
    ------
    TypeError
        It is neither a group nor a string.
    AssertionError
        It is another string than "default", as in the reference.
    """
    from poolray.remote_groups import PlacementGroup

    if group is not None and not isinstance(group, str | PlacementGroup):
        raise TypeError(f"A placement group is wanted, not {group!r}")
    assert group is None or group == "default" or isinstance(group, PlacementGroup), (
        f"not a placement group: {group!r}"
    )


def _of_operator(key: str, operator: In | NotIn | Exists | DoesNotExist) -> LabelMatch:
    match operator:
        case In():
            return LabelMatch(key, LabelOperator.IN, operator.values)
        case NotIn():
            return LabelMatch(key, LabelOperator.NOT_IN, operator.values)
        case Exists():
            return LabelMatch(key, LabelOperator.EXISTS)
        case DoesNotExist():
            return LabelMatch(key, LabelOperator.NOT_EXISTS)


def parse_selector(selector: Mapping[str, str]) -> list[LabelMatch]:
    """A `label_selector`: label -> "value", "!value", "in(a, b)" or "!in(a, b)".

    Raises
    ------
    ValueError
        A key or a value that is none of that.
    TypeError
        A value that is no string.
    """
    matches = []
    for key, value in selector.items():
        check_key(key)
        if not isinstance(value, str):
            raise TypeError(f"expected string or bytes-like object, got '{type(value).__name__}'")
        match = re.fullmatch(_SELECTOR, value)
        if not value:  # nodes may have a label without a value
            matches.append(LabelMatch(key, LabelOperator.IN, [""]))
            continue
        if match is None:
            raise ValueError(
                f"Invalid label selector value `{value}`. The label selector value should contain "
                "optional operators and a label value. Supported operators are: ! and {'in'}. "
                f"Value {NAME_RULE}"
            )
        negated = match.group(1) or match.group(3)
        values = re.split(", ?", match.group(2) or match.group(4))
        operator = LabelOperator.NOT_IN if negated else LabelOperator.IN
        matches.append(LabelMatch(key, operator, values))
    return matches


def parse_fallbacks(fallbacks: list[Any]) -> list[list[LabelMatch]]:
    """A `fallback_strategy`: options to try in turn where `label_selector` finds no node.

    Raises
    ------
    ValueError
        An option other than `label_selector`, or none.
    """
    selectors = []
    for options in fallbacks:
        if not isinstance(options, dict):
            raise ValueError(f"Each fallback strategy must be a dictionary of options: {options!r}")
        if not options:
            raise ValueError("Empty dictionary found in `fallback_strategy`.")
        for name in options:
            if name != "label_selector":
                raise ValueError(
                    f"Unsupported option found: '{name}'. Only ['label_selector'] is currently "
                    "supported."
                )
        selectors.append(parse_selector(options.get("label_selector") or {}))
    return selectors
