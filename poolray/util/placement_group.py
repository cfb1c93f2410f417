"""Resources that are reserved in bundles, for groups of tasks and actors.

What: placement groups, under the path that Ray Core users know.
Who calls it: user code.
May touch: nothing.
Invariants: none.
"""

from __future__ import annotations

from poolray.remote_groups import (
    VALID_PLACEMENT_GROUP_STRATEGIES,
    PlacementGroup,
    PlacementGroupID,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

__all__ = [
    "VALID_PLACEMENT_GROUP_STRATEGIES",
    "PlacementGroup",
    "PlacementGroupID",
    "get_current_placement_group",
    "get_placement_group",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
]
