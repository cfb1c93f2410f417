"""Where tasks are to run: values for the option `scheduling_strategy`.

What: the strategies and label operators, under the path that Ray Core users know.
Who calls it: user code.
May touch: nothing.
Invariants: none.
"""

from __future__ import annotations

from poolray.remote_strategies import (
    DoesNotExist,
    Exists,
    In,
    LabelMatchExpressionsT,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
    SchedulingStrategyT,
)

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
