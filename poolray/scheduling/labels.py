"""Labels of nodes: whether one is what a placement asks for.

What: conditions on labels, looked at for one node at a time.
Who calls: the node machine for tasks, the head machine for bundles.
May touch: nothing.
Invariants: no conditions are met by every node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from poolray.protocol.values import LabelMatch, LabelOperator

#: The label that every node has: its id. Named as in the reference, for programs that ask for it.
NODE_ID_LABEL = "ray.io/node-id"


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
