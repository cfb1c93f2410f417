"""Placement groups in three conversations: clients with their node, nodes with the head.

    client ──CreatePlacementGroup──▶ node ──RegisterGroup──▶ head
                                     node ◀──PrepareBundles── head      1: is there room?
                                     node ──BundlesPrepared─▶ head
                                     node ◀──CommitBundles─── head      2: it is yours
    client ◀──PlacementGroupReply─── node ◀──GroupChanged──── head      to all that watch it

What: requests, their answers, and the two phases of a reservation.
Who calls: clients, the node machine, the head machine.
May touch: nothing.
Invariants: a client makes a group's id; an attempt to place bundles has a number that is never
used again, and messages about an older attempt change nothing.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from poolray.ids import NodeId, ObjectId, PlacementGroupId
from poolray.protocol.values import LabelMatch


class GroupState(enum.IntEnum):
    """Where a placement group is in its life."""

    PENDING = 0  #: some of its bundles have no place yet, and never had
    CREATED = 1
    RESCHEDULING = 2  #: a node died with bundles of it
    REMOVED = 3


class GroupSpec(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A placement group as it is asked for."""

    group_id: PlacementGroupId
    #: One per bundle: resource name -> amount in units of 1/10,000.
    bundles: list[dict[str, int]]
    strategy: int = 0  #: a `scheduling.bundles.Strategy`
    name: str = ""
    namespace: str = ""
    detached: bool = False  #: it outlives its job
    job_id: bytes = b""  #: of whom it is, and with whom it goes
    #: One per bundle, or empty: conditions on the labels of its node.
    labels: list[list[LabelMatch]] = []
    preferred: NodeId = NodeId(b"")  #: where STRICT_PACK looks first


class GroupRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A placement group as it is."""

    spec: GroupSpec
    state: int  #: a `GroupState`
    nodes: list[NodeId]  #: of each bundle; empty: it has none
    attempts: int = 0
    #: Not even an empty cluster of the nodes that there are has room for it.
    is_infeasible: bool = False
    created_after_s: float = 0.0  #: from its registration on


class KeptBundles(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Bundles of one attempt that a node has, as it tells a head that was started again."""

    group_id: PlacementGroupId
    attempt: int
    indexes: list[int]
    is_open: bool  #: they were committed


# ---- client and node -----------------------------------------------------------------------------


class CreatePlacementGroup(msgspec.Struct, frozen=True, array_like=True, tag=141, kw_only=True):
    """Reserve bundles; the answer says that the head knows of it, or why not."""

    request_id: int
    spec: GroupSpec


class RemovePlacementGroup(msgspec.Struct, frozen=True, array_like=True, tag=142, kw_only=True):
    """Give them back, and end what runs there; answered when the node has done so."""

    request_id: int
    group_id: PlacementGroupId


class DescribePlacementGroups(msgspec.Struct, frozen=True, array_like=True, tag=143, kw_only=True):
    """What of these groups? By id, by name, or all of them."""

    request_id: int
    group_id: PlacementGroupId = PlacementGroupId(b"")
    name: str = ""
    namespace: str = ""
    start: int = 0  #: how many to leave out: the answer holds a limited number


class AwaitPlacementGroup(msgspec.Struct, frozen=True, array_like=True, tag=144, kw_only=True):
    """Make this object, with this value, once the group is placed; an error if it never will be.

    The client holds a reference to it from now on.
    """

    object_id: ObjectId
    group_id: PlacementGroupId
    value: bytes


class PlacementGroupReply(msgspec.Struct, frozen=True, array_like=True, tag=171, kw_only=True):
    """The groups asked for, and what is wrong in words."""

    request_id: int
    rows: list[GroupRow] = []
    refusal: str = ""


PlacementRequest: TypeAlias = (
    CreatePlacementGroup | RemovePlacementGroup | DescribePlacementGroups | AwaitPlacementGroup
)


# ---- node to head --------------------------------------------------------------------------------


class RegisterGroup(msgspec.Struct, frozen=True, array_like=True, tag=331, kw_only=True):
    """A client wants a group; the answer is a `GroupsFound`."""

    request_id: int
    spec: GroupSpec


class DropGroup(msgspec.Struct, frozen=True, array_like=True, tag=332, kw_only=True):
    """A client does not want it any more; answered as well."""

    request_id: int
    group_id: PlacementGroupId


class FindGroups(msgspec.Struct, frozen=True, array_like=True, tag=333, kw_only=True):
    """See `DescribePlacementGroups`."""

    request_id: int
    group_id: PlacementGroupId = PlacementGroupId(b"")
    name: str = ""
    namespace: str = ""
    start: int = 0


class WatchGroup(msgspec.Struct, frozen=True, array_like=True, tag=334, kw_only=True):
    """Tell me what becomes of this group: now, and at each change."""

    group_id: PlacementGroupId


class BundlesPrepared(msgspec.Struct, frozen=True, array_like=True, tag=335, kw_only=True):
    """The node has set the bundles of an attempt aside, or has no room."""

    group_id: PlacementGroupId
    attempt: int
    done: bool


PlacementHeadRequest: TypeAlias = (
    RegisterGroup | DropGroup | FindGroups | WatchGroup | BundlesPrepared
)


# ---- head to node --------------------------------------------------------------------------------


class PrepareBundles(msgspec.Struct, frozen=True, array_like=True, tag=371, kw_only=True):
    """Set these bundles aside, all or none."""

    group_id: PlacementGroupId
    attempt: int
    #: Index -> demand.
    bundles: dict[int, dict[str, int]]
    #: Keep the order until there is room, rather than refuse it: no other node is asked.
    may_wait: bool = False


class CommitBundles(msgspec.Struct, frozen=True, array_like=True, tag=372, kw_only=True):
    """All nodes have set theirs aside: tasks may use them from now on."""

    group_id: PlacementGroupId
    attempt: int


class ReturnBundles(msgspec.Struct, frozen=True, array_like=True, tag=373, kw_only=True):
    """Nothing comes of an attempt: what was set aside for it is free again."""

    group_id: PlacementGroupId
    attempt: int


class GroupChanged(msgspec.Struct, frozen=True, array_like=True, tag=374, kw_only=True):
    """What a group is now; a group that was removed leaves its nodes with this."""

    row: GroupRow


class GroupsFound(msgspec.Struct, frozen=True, array_like=True, tag=375, kw_only=True):
    """The answer to a numbered request."""

    request_id: int
    rows: list[GroupRow] = []
    refusal: str = ""


PlacementHeadMessage: TypeAlias = (
    PrepareBundles | CommitBundles | ReturnBundles | GroupChanged | GroupsFound
)
