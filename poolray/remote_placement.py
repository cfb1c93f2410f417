"""Where a task may run, as options say it: strategies and label selectors.

What: checks them as they are given and turns them into a `Placement`.
Who calls: `remote_function.py`; `init` for the labels of a node.
May touch: nothing.
Invariants: what cannot be understood is refused when it is given, never later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from poolray.exceptions import NotSupportedError
from poolray.ids import NodeId
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

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = rf"(!?)(?:in)?\(({_NAME}(?:, ?{_NAME})*)\)|(!?)({_NAME})"
_STRATEGIES = (
    type(None),
    str,
    PlacementGroupSchedulingStrategy,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
)
_NAME_RULE = (
    "must be 63 chars or less beginning and ending with an alphanumeric character ([a-z0-9A-Z]) "
    "with dashes (-), underscores (_),dots (.), and alphanumerics between."
)


def check_strategy(value: Any) -> None:
    """Refuse what is no scheduling strategy; a string is looked at when a task is submitted.

    Raises
    ------
    TypeError
        It is something else.
    NotSupportedError
        It is one that this version does not carry out.
    """
    if not isinstance(value, _STRATEGIES):
        raise TypeError(
            f"The type of keyword 'scheduling_strategy' must be {_STRATEGIES}, but received type "
            f"{type(value)}"
        )
    if isinstance(value, PlacementGroupSchedulingStrategy) and value.placement_group is not None:
        raise NotSupportedError(
            "Placement groups are not supported by this version of poolray: ask for resources."
        )


def make_placement(options: Mapping[str, Any]) -> Placement | None:
    """Where calls with these options may run; None: wherever their resources are.

    Raises
    ------
    ValueError
        `scheduling_strategy` is a string other than "DEFAULT" and "SPREAD".
    """
    strategy: SchedulingStrategyT = options.get("scheduling_strategy")
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
    if isinstance(strategy, NodeAffinitySchedulingStrategy):
        return Placement(
            node_id=NodeId(bytes.fromhex(strategy.node_id)),
            is_soft=strategy.soft,
            labels=selectors,
        )
    return Placement(labels=selectors) if selectors else None


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
        _check_key(key)
        if not isinstance(value, str):
            raise TypeError(f"expected string or bytes-like object, got '{type(value).__name__}'")
        match = re.fullmatch(_SELECTOR, value)
        if match is None:
            raise ValueError(
                f"Invalid label selector value `{value}`. The label selector value should contain "
                "optional operators and a label value. Supported operators are: ! and {'in'}. "
                f"Value {_NAME_RULE}"
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
        An option other than `label_selector`.
    """
    selectors = []
    for options in fallbacks:
        if not isinstance(options, dict):
            raise ValueError(f"Each fallback strategy must be a dictionary of options: {options!r}")
        for name in options:
            if name != "label_selector":
                raise ValueError(
                    f"Unsupported option found: '{name}'. Only ['label_selector'] is currently "
                    "supported."
                )
        selectors.append(parse_selector(options.get("label_selector") or {}))
    return selectors


def check_labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    """Labels of a node, checked.

    Raises
    ------
    ValueError
        A name or a value that is none.
    TypeError
        Not a dictionary of strings.
    """
    if labels is None:
        return {}
    if not isinstance(labels, dict):
        raise TypeError(f"labels must be a dictionary of strings: {labels!r}")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"labels must be a dictionary of strings: {key!r}: {value!r}")
        if key.startswith("ray.io/"):
            raise ValueError(
                f"Custom label keys `{key}` cannot start with the prefix `ray.io/`. This is "
                "reserved for Ray defined labels."
            )
        _check_key(key)
        if value and not re.fullmatch(_NAME, value):
            raise ValueError(f"Invalid label key value `{value}`. Value {_NAME_RULE}")
    return dict(labels)


def _check_key(key: str) -> None:
    prefix, _, name = key.rpartition("/")
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"Invalid label key name `{name}`. Name {_NAME_RULE}")
    if len(prefix) > 253 or not all(
        re.fullmatch(_NAME, part) for part in prefix.split(".") if prefix
    ):
        raise ValueError(
            f"Invalid label key prefix `{prefix}`. Prefix must be a series of DNS labels separated "
            "by dots (.), not longer than 253 characters in total."
        )
