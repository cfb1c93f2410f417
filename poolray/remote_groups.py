"""Placement groups as programs handle them: made, awaited, looked at, removed.

What: the handle, and the calls behind `poolray.util.placement_group`.
Who calls: users; `remote_placement.py` for calls that are to run in a group.
May touch: nothing; all goes through the process's client.
Invariants: what can be seen to be wrong with a group is refused before the node hears of it; a
handle knows its bundles, or asks for them once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, final

from poolray.client import Client
from poolray.exceptions import NotSupportedError, TaskPlacementGroupRemoved
from poolray.ids import PLACEMENT_GROUP_ID_BYTES, NodeId, PlacementGroupId
from poolray.local import process_state
from poolray.objects.object_ref import ObjectRef
from poolray.plain_values import plain, plain_string
from poolray.protocol.placement import (
    AwaitPlacementGroup,
    CreatePlacementGroup,
    DescribePlacementGroups,
    GroupRow,
    GroupSpec,
    GroupState,
    PlacementGroupReply,
    RemovePlacementGroup,
)
from poolray.public_ids import PlacementGroupID
from poolray.remote_placement import parse_selector
from poolray.scheduling.bundles import Strategy
from poolray.scheduling.resources import from_fixed, to_fixed

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

#: Names that `strategy` may have.
VALID_PLACEMENT_GROUP_STRATEGIES = frozenset(Strategy.__members__)
#: Bundles that travel inside a handle's `ready()`; of a larger group they are asked for.
_CACHED_MAX = 64
_EXAMPLE = (
    "Bundles must be a non-empty list of resource dictionaries. For example: "
    '`[{"CPU": 1.0}, {"GPU": 1.0}]`.'
)


@final
class PlacementGroup:
    """A handle to a placement group. Made by `placement_group`; it can be sent anywhere.

    Parameters
    ----------
    id : PlacementGroupID
        Whose handle it is.
    bundle_cache : list of dict, optional
        The bundles, where they are known; else they are asked for when they are needed.
    """

    def __init__(
        self, id: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None
    ) -> None:
        self.id = id
        self.bundle_cache = bundle_cache

    @staticmethod
    def empty() -> PlacementGroup:
        """A handle to no group: calls with it run where there is room."""
        return PlacementGroup(PlacementGroupID.nil())

    @property
    def is_empty(self) -> bool:
        """Whether it is a handle to no group."""
        return self.id.is_nil()

    def ready(self) -> ObjectRef[PlacementGroup]:
        """A ref that is ready once all bundles are reserved; its value is this handle.

        Where the group is removed before, `get` raises `TaskPlacementGroupRemoved`. No worker is
        started for it.

        Examples
        --------
        >>> import poolray
        >>> from poolray.util.placement_group import placement_group, remove_placement_group
        >>> group = placement_group([{"CPU": 1}])
        >>> poolray.get(group.ready()) == group
        True
        >>> remove_placement_group(group)
        """
        client = _client()
        if self.is_empty:
            return client.put(self)
        object_id = client.next_object_id()
        small = self if len(self.bundle_cache or ()) <= _CACHED_MAX else PlacementGroup(self.id)
        message = AwaitPlacementGroup(
            object_id=object_id, group_id=self.id.binary(), value=client.inline(small)
        )
        client.link.enter()
        try:
            client.link.send(message)
            return client.own(object_id)
        finally:
            client.link.leave()

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait until all bundles are reserved.

        Parameters
        ----------
        timeout_seconds : float, default 30
            Less than 0 is 0.

        Returns
        -------
        bool
            Whether they are.

        Raises
        ------
        ValueError
            The group has been removed.
        """
        from poolray.api import get, wait

        ready, _ = wait([self.ready()], timeout=max(0.0, timeout_seconds))
        if not ready:
            return False
        try:
            get(ready[0])
        except TaskPlacementGroupRemoved as error:
            raise ValueError(f"Placement group {self.id} does not exist.") from error
        return True

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """The bundles: one dict of resources each."""
        if self.bundle_cache is None:
            rows = [] if self.is_empty else _describe(group_id=self.id.binary())
            self.bundle_cache = [from_fixed(each) for row in rows for each in row.spec.bundles]
        return self.bundle_cache

    @property
    def bundle_count(self) -> int:
        """How many there are."""
        return len(self.bundle_specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"

    def __reduce__(self) -> Any:
        return PlacementGroup, (self.id, self.bundle_cache)


def _client() -> Client:
    from poolray.session import find_client

    return find_client()


def _namespace() -> str:
    from poolray.session import namespace_of_driver

    setup = process_state.setup()
    return namespace_of_driver() if setup is None else setup.namespace


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str | None = None,
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
    topology_strategy: dict[str, str] | None = None,
) -> PlacementGroup:
    """Reserve resources in bundles, each of them on one node.

    Parameters
    ----------
    bundles : list of dict
        What each bundle has: `{"CPU": 2, "GPU": 0.5, "license": 1}`.
    strategy : str, default "PACK"
        "PACK": on few nodes if possible; "SPREAD": on many if possible; "STRICT_PACK": on one node;
        "STRICT_SPREAD": each on a node of its own.
    name : str, optional
        For `get_placement_group`, in the job's namespace.
    lifetime : str, optional
        "detached": it lives on when the driver ends; else it goes with the driver.
    _soft_target_node_id : str, optional
        With "STRICT_PACK", the node that is tried first.
    bundle_label_selector : list of dict, optional
        One `label_selector` per bundle: conditions on the labels of its node.

    Returns
    -------
    PlacementGroup
        At once; the bundles are reserved, all together, when there is room for all of them.

    Raises
    ------
    ValueError
        The bundles, the strategy or the selectors make no sense, or the name is taken.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.placement_group import placement_group, remove_placement_group
    >>> from poolray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    >>> group = placement_group([{"CPU": 1}], strategy="PACK")
    >>> group.wait(timeout_seconds=10)
    True
    >>> where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    >>> square = poolray.remote(lambda x: x * x).options(scheduling_strategy=where)
    >>> poolray.get(square.remote(7))
    49
    >>> remove_placement_group(group)
    """
    bundles, bundle_label_selector = plain(bundles), plain(bundle_label_selector)
    fixed = _check_bundles(bundles)
    chosen = _check_strategy(strategy, _soft_target_node_id)
    if not isinstance(name, str):
        raise TypeError(f"the name of a placement group must be a string, not {type(name)}")
    if lifetime not in (None, "detached"):
        raise ValueError(
            "Placement group `lifetime` argument must be either `None` or 'detached'. Got "
            f"{lifetime}."
        )
    if topology_strategy is not None:
        raise NotSupportedError(
            "topology_strategy is not supported by this version of poolray: use "
            "bundle_label_selector with the labels of the nodes."
        )
    labels = _check_selectors(bundle_label_selector, len(bundles))
    from poolray.session import ids_of_process

    client = _client()
    job_id = ids_of_process()[1]
    seed = client.task_ids.next_task_id()
    unique = hashlib.blake2b(seed, digest_size=PLACEMENT_GROUP_ID_BYTES - len(job_id)).digest()
    spec = GroupSpec(
        group_id=PlacementGroupId(unique + job_id),
        bundles=fixed,
        strategy=chosen,
        name=plain_string(name),
        namespace=_namespace(),
        detached=lifetime == "detached",
        job_id=job_id,
        labels=labels,
        preferred=NodeId(bytes.fromhex(_soft_target_node_id or "")),
    )
    reply: PlacementGroupReply = client.link.ask(
        lambda number: CreatePlacementGroup(request_id=number, spec=spec)
    )
    if reply.refusal:
        raise ValueError(reply.refusal)
    return PlacementGroup(PlacementGroupID(spec.group_id), [from_fixed(each) for each in fixed])


def _check_bundles(bundles: Any) -> list[dict[str, int]]:
    from poolray.scheduling.accelerators import check_devices  # few programs need it

    if not isinstance(bundles, list):
        raise ValueError(f"Placement group bundles must be a list, got {type(bundles)}.")
    if not bundles:
        raise ValueError(f"{_EXAMPLE} Got empty list instead.")
    for bundle in bundles:
        if not isinstance(bundle, dict) or not all(
            isinstance(name, str) and isinstance(amount, (int, float))
            for name, amount in bundle.items()
        ):
            raise ValueError(_EXAMPLE)
        if "bundle" in bundle:
            raise ValueError(
                "bundle is a system reserved resource, which is not allowed to be used in "
                "placement groups."
            )
        if not any(bundle.values()):
            raise ValueError(
                "Bundles cannot be an empty dictionary or resources with only 0 values. Bundles: "
                f"{bundles}"
            )
    made = [
        {name: fixed for name, amount in bundle.items() if (fixed := to_fixed(name, amount))}
        for bundle in bundles
    ]
    for bundle in bundles:
        for name, amount in bundle.items():
            if amount != int(amount):
                check_devices(name, amount)
    return made


def _check_strategy(strategy: Any, target: str | None) -> Strategy:
    name = "PACK" if strategy is None else strategy
    if name not in Strategy.__members__:
        raise ValueError(
            f"Invalid placement group strategy {name}. Supported strategies are: "
            f"{set(Strategy.__members__)}."
        )
    if target:
        if name != "STRICT_PACK":
            raise ValueError(
                f"_soft_target_node_id currently only works with STRICT_PACK but got {name}"
            )
        try:
            bytes.fromhex(target)
        except ValueError:
            raise ValueError(f"Invalid hex ID of _soft_target_node_id, got {target}") from None
    return Strategy[name]


def _check_selectors(selectors: Any, count: int) -> list[Any]:
    if selectors is None:
        return []
    if not isinstance(selectors, list) or len(selectors) != count:
        raise ValueError(
            f"Invalid bundle label selector {selectors}. The length of `bundle_label_selector` "
            "should equal the length of `bundles`."
        )
    try:
        return [parse_selector(selector) for selector in selectors]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "Invalid label selector provided in bundle_label_selector list. Detailed error: "
            f"'{error}'"
        ) from error


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Give a group's resources back. What runs in it is killed, what asks for it fails.

    Nothing happens if it has been removed already.

    Notes
    -----
    Tasks of it raise `TaskPlacementGroupRemoved`, actors that live in it `ActorDiedError`, actors
    that were not made yet `ActorUnschedulableError`; none of them is tried again.

    Examples
    --------
    >>> from poolray.util.placement_group import placement_group, placement_group_table
    >>> from poolray.util.placement_group import remove_placement_group
    >>> group = placement_group([{"CPU": 1}])
    >>> remove_placement_group(group)
    >>> placement_group_table(group)["state"]
    'REMOVED'
    """
    assert placement_group is not None
    group_id = placement_group.id.binary()
    if placement_group.is_empty:
        return
    _client().link.ask(lambda number: RemovePlacementGroup(request_id=number, group_id=group_id))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """A handle to the group that has this name in the job's namespace.

    Raises
    ------
    ValueError
        There is none.

    Examples
    --------
    >>> from poolray.util.placement_group import get_placement_group, placement_group
    >>> from poolray.util.placement_group import remove_placement_group
    >>> group = placement_group([{"CPU": 1}], name="workers")
    >>> get_placement_group("workers") == group
    True
    >>> remove_placement_group(group)
    """
    if not placement_group_name:
        raise ValueError("Please supply a non-empty value to get_placement_group")
    rows = _describe(name=plain(placement_group_name), namespace=_namespace())
    if not rows:
        raise ValueError(f"Failed to look up placement group with name: {placement_group_name}")
    spec = rows[0].spec
    bundles = [from_fixed(each) for each in spec.bundles]
    return PlacementGroup(PlacementGroupID(spec.group_id), bundles)


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """What there is to know of a group, or of all groups by their ids in hexadecimal digits.

    Returns
    -------
    dict
        `placement_group_id`, `name`, `bundles`, `bundles_to_node_id`, `strategy`, `state`
        ("PENDING", "CREATED", "RESCHEDULING", "REMOVED") and `stats`; empty for a group that has
        long been removed.

    Examples
    --------
    >>> from poolray.util.placement_group import placement_group, placement_group_table
    >>> from poolray.util.placement_group import remove_placement_group
    >>> group = placement_group([{"CPU": 1}, {"CPU": 0.5}])
    >>> placement_group_table(group)["bundles"]
    {0: {'CPU': 1.0}, 1: {'CPU': 0.5}}
    >>> remove_placement_group(group)
    """
    if placement_group is not None:
        rows = _describe(group_id=placement_group.id.binary())
        return table_of(rows[0]) if rows else {}
    return {row.spec.group_id.hex(): table_of(row) for row in group_rows()}


def group_rows() -> list[GroupRow]:
    """All groups, as the head tells of them; the oldest first."""
    found: list[GroupRow] = []
    while rows := _describe(start=len(found)):
        found += rows
    return found


def _describe(**wanted: Any) -> list[GroupRow]:
    reply: PlacementGroupReply = _client().link.ask(
        lambda number: DescribePlacementGroups(request_id=number, **wanted)
    )
    return reply.rows


def table_of(row: GroupRow) -> dict[str, Any]:
    state = GroupState(row.state)
    if row.is_infeasible:
        scheduling = "INFEASIBLE"
    else:
        scheduling = {"CREATED": "FINISHED", "REMOVED": "REMOVED"}.get(state.name, "QUEUED")
    latency_ms = round(row.created_after_s * 1e3, 3)
    nodes = row.nodes or [NodeId(b"")] * len(row.spec.bundles)
    return {
        "placement_group_id": row.spec.group_id.hex(),
        "name": row.spec.name,
        "bundles": {n: from_fixed(bundle) for n, bundle in enumerate(row.spec.bundles)},
        "bundles_to_node_id": {n: node_id.hex() for n, node_id in enumerate(nodes)},
        "strategy": Strategy(row.spec.strategy).name,
        "state": state.name,
        "stats": {
            "end_to_end_creation_latency_ms": latency_ms,
            "scheduling_latency_ms": latency_ms,
            "scheduling_attempt": row.attempts,
            "highest_retry_delay_ms": 0.0,
            "scheduling_state": scheduling,
        },
    }


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the running task or actor is in; None outside of one, and in drivers.

    Examples
    --------
    >>> from poolray.util.placement_group import get_current_placement_group
    >>> get_current_placement_group() is None
    True
    """
    placement = process_state.current_placement()
    if placement is None or not placement.group:
        return None
    return PlacementGroup(PlacementGroupID(placement.group))


def check_fits(group: PlacementGroup, index: int, demand: Mapping[str, int], name: str) -> None:
    """Refuse a call that no bundle of its group has room for.

    Raises
    ------
    ValueError
        There is no bundle of that index, or no bundle that may be meant has as much.
    """
    bundles = group.bundle_specs
    if index != -1 and not 0 <= index < len(bundles):
        raise ValueError(
            f"placement group bundle index {index} is invalid. Valid placement group indexes: "
            f"0-{len(bundles) - 1}"
        )
    meant = bundles if index < 0 else [bundles[index]]
    if any(
        all(to_fixed(r, bundle.get(r, 0)) >= amount for r, amount in demand.items())
        for bundle in meant
    ):
        return
    raise ValueError(
        f"Cannot schedule {name} with the placement group because the resource request "
        f"{from_fixed(demand)} cannot fit into any bundles for the placement group, {bundles}."
    )
