"""Labels of nodes: whether one is what a placement asks for.

What: conditions on labels, looked at for one node at a time; which names and values there may be.
Who calls: the node machine for tasks, the head machine for bundles; whoever is given labels.
May touch: nothing.
Invariants: no conditions are met by every node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from poolray.protocol.values import LabelMatch, LabelOperator

#: The label that every node has: its id. Named as in the reference, for programs that ask for it.
NODE_ID_LABEL = "ray.io/node-id"
#: A name or a value, and the same in words.
NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
NAME_RULE = (
    "must be 63 chars or less beginning and ending with an alphanumeric character ([a-z0-9A-Z]) "
    "with dashes (-), underscores (_),dots (.), and alphanumerics between."
)


def meets_all(conditions: Sequence[LabelMatch], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels meets each condition."""
    return all(_meets(condition, labels) for condition in conditions)


def meets_one(alternatives: Sequence[Sequence[LabelMatch]], labels: Mapping[str, str]) -> bool:
    """Whether it meets one of several sets of conditions; without any, every node does."""
    return not alternatives or any(meets_all(each, labels) for each in alternatives)


def _meets(match: LabelMatch, labels: Mapping[str, str]) -> bool:
    value = labels.get(match.key)
    match match.operator:
        case LabelOperator.IN:
            return value in match.values
        case LabelOperator.NOT_IN:
            return value not in match.values
        case LabelOperator.EXISTS:
            return value is not None
        case LabelOperator.NOT_EXISTS:
            return value is None


def describe_match(match: LabelMatch) -> str:
    """A condition on values as `label_selector` says it."""
    negation = "!" if match.operator is LabelOperator.NOT_IN else ""
    if len(match.values) == 1:
        return f"{negation}{match.values[0]}"
    return f"{negation}in({', '.join(match.values)})"


def describe(alternatives: Sequence[Sequence[LabelMatch]]) -> str:
    """The conditions, for people."""
    return " or ".join(
        " and ".join(
            f"{match.key} {match.operator.name.lower().replace('_', ' ')} "
            f"{match.values or ''}".strip()
            for match in alternative
        )
        for alternative in alternatives
    )


def check_labels(
    labels: Mapping[str, str] | None, *, may_be_reserved: bool = False
) -> dict[str, str]:
    """Labels of a node, checked; names that begin with ray.io/ are for who starts the machine.

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
        if key.startswith("ray.io/") and not may_be_reserved:
            raise ValueError(
                f"Custom label keys `{key}` cannot start with the prefix `ray.io/`. This is "
                "reserved for Ray defined labels."
            )
        check_key(key)
        if value and not re.fullmatch(NAME, value):
            raise ValueError(f"Invalid label key value `{value}`. Value {NAME_RULE}")
    return dict(labels)


def check_key(key: str) -> None:
    """Refuse what is no name of a label."""
    if not isinstance(key, str):
        raise TypeError(f"The name of a label must be a string: {key!r}")
    prefix, _, name = key.rpartition("/")
    if not re.fullmatch(NAME, name):
        raise ValueError(f"Invalid label key name `{name}`. Name {NAME_RULE}")
    if len(prefix) > 253 or not all(
        re.fullmatch(NAME, part) for part in prefix.split(".") if prefix
    ):
        raise ValueError(
            f"Invalid label key prefix `{prefix}`. Prefix must be a series of DNS labels separated "
            "by dots (.), not longer than 253 characters in total."
        )
