"""The resources of a bundle under names of their own, beside those of the node.

What: a bundle that is reserved takes its amounts from the node's account, and gives them back
under the names `CPU_group_<index>_<id>` (this bundle's) and `CPU_group_<id>` (all bundles' of the
group on this node). A call in the group asks for these names in place of the plain ones.
Who calls: the node machine.
May touch: nothing.
Invariants: what is free under the names of a group is never more than what its bundles hold; every
call in a group also takes a trace of `bundle_group_<id>`, so it runs where a bundle is even if it
asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from poolray.ids import PlacementGroupId
from poolray.scheduling.resources import UNIT, DevicePart, DevicePool, Devices, ResourceAccount

#: A bundle brings this much of the resource that marks it, and a call takes this much of that.
_MARK_AMOUNT = 1000 * UNIT
_MARK_DEMAND = UNIT // 1000
_MARK = "bundle"
_INFIX = "_group_"


def is_of_group(name: str) -> bool:
    """Whether a resource is part of a placement group."""
    return _INFIX in name


def name_in_group(name: str, group_id: PlacementGroupId, index: int = -1) -> str:
    """What a resource is called inside a group, or inside one bundle of it."""
    bundle = "" if index < 0 else f"{index}_"
    return f"{name}{_INFIX}{bundle}{group_id.hex()}"


def demand_in_group(
    demand: Mapping[str, int], group_id: PlacementGroupId, index: int
) -> dict[str, int]:
    """What a call in a group asks of its node; `index` is -1 for any bundle."""
    made = {}
    for name, amount in (*demand.items(), (_MARK, _MARK_DEMAND)):
        made[name_in_group(name, group_id)] = amount
        if index >= 0:
            made[name_in_group(name, group_id, index)] = amount
    return made


def resources_of(
    group_id: PlacementGroupId, bundles: Mapping[int, Mapping[str, int]]
) -> dict[str, int]:
    """All that these bundles bring to their node, by name."""
    made: dict[str, int] = {}
    for index, bundle in bundles.items():
        for name, amount in (*bundle.items(), (_MARK, _MARK_AMOUNT)):
            for each in (name_in_group(name, group_id), name_in_group(name, group_id, index)):
                made[each] = made.get(each, 0) + amount
    return made


@final
class Reservation:
    """Bundles of one group that this node has set aside in one attempt."""

    __slots__ = ("bundles", "devices")

    def __init__(self, bundles: Mapping[int, Mapping[str, int]]) -> None:
        self.bundles = bundles
        #: Index -> devices that its bundle holds.
        self.devices: dict[int, Devices] = {}

    def total(self) -> dict[str, int]:
        """What all of them hold together."""
        made: dict[str, int] = {}
        for bundle in self.bundles.values():
            for name, amount in bundle.items():
                made[name] = made.get(name, 0) + amount
        return made

    def take(self, account: ResourceAccount) -> bool:
        """Take the bundles from what the node has free, all or none."""
        taken: list[int] = []
        for index, bundle in self.bundles.items():
            if not account.acquire(bundle):
                for each in taken:
                    self._give(account, each)
                return False
            self.devices[index] = account.take_devices(bundle)
            taken.append(index)
        return True

    def give(self, account: ResourceAccount) -> None:
        """Give them back to the node."""
        for index in self.bundles:
            self._give(account, index)

    def _give(self, account: ResourceAccount, index: int) -> None:
        account.release(self.bundles[index])
        account.give_devices(self.devices.pop(index))

    def open(self, account: ResourceAccount, group_id: PlacementGroupId) -> None:
        """Let calls use them, under the names of the group."""
        for name, amount in resources_of(group_id, self.bundles).items():
            account.grow(name, amount)
        for index, devices in self.devices.items():
            for name, taken in devices.items():
                whole = name_in_group(name, group_id)
                pool = account.pools.get(whole)
                if not isinstance(pool, DevicePool):
                    pool = account.pools[whole] = DevicePool((), account.pools[name].resource)
                ids = account.pools[name].ids
                slots = [pool.add(ids[number], share) for number, share in taken]
                account.pools[name_in_group(name, group_id, index)] = DevicePart(pool, slots)

    def close(self, account: ResourceAccount, group_id: PlacementGroupId) -> None:
        """No call uses them any more; the node does not have them back by this."""
        for name, amount in resources_of(group_id, self.bundles).items():
            account.shrink(name, amount)
        for index, devices in self.devices.items():
            for name in devices:
                whole = name_in_group(name, group_id)
                part = account.pools.pop(name_in_group(name, group_id, index))
                assert isinstance(part, DevicePart)
                part.forget()
                if whole not in account.total:
                    account.pools.pop(whole, None)
