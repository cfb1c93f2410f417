"""Resources of a node: exact amounts, taken and given back, and devices that have a number each.

What: fixed-point quantities (1/10,000) and an account that never loses a fraction.
Who calls: the API converts demands, the node machine acquires and releases.
May touch: nothing.
Invariants: 0 <= available is guaranteed by `acquire`; only `acquire_anyway`, for a blocked task
that goes on, may go below; available equals total when nothing is held. What is available of a
resource with devices is the sum of what is free of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

UNIT = 10_000  #: one whole CPU

#: No node has this much; more would not fit into the 64 bits that messages have for it.
_MOST = 1 << 62


def to_fixed(name: str, quantity: float) -> int:
    """A quantity in whole units of 1/10,000; what is left over is dropped.

    (Rounded up, three thirds of a device would be more than the device.)

    Raises
    ------
    ValueError
        It is negative, not a number, or less than 0.0001 without being 0.
    """
    if quantity != quantity or quantity in (float("inf"), float("-inf")):
        raise ValueError(f"The quantity of resource {name} must be a finite number: {quantity!r}")
    if quantity < 0:
        raise ValueError(f"The quantity of resource {name} cannot be negative")
    # (What decimal fractions lose in binary is far less than a millionth of a unit.)
    fixed = min(int(quantity * UNIT + 1e-6), _MOST)
    if quantity and not fixed:
        raise ValueError(
            f"The precision of the fractional quantity of resource {name} cannot go beyond 0.0001"
        )
    return fixed


def from_fixed(fixed: Mapping[str, int]) -> dict[str, float]:
    """Quantities as users see them."""
    return {name: quantity / UNIT for name, quantity in fixed.items() if quantity}


@final
class DevicePool:
    """Devices of one kind: whole ones, or shares of one."""

    __slots__ = ("free", "ids", "resource")

    def __init__(self, ids: Sequence[str], resource: str) -> None:
        #: What programs call them, in the order in which they are handed out.
        self.ids = list(ids)
        #: What programs call the resource, also where a placement group has some of it.
        self.resource = resource
        #: What is free of each.
        self.free = [UNIT] * len(self.ids)

    def fits(self, amount: int) -> bool:
        """Whether this much is free: so many whole devices, or a share of a single one."""
        if amount < UNIT:
            return any(free >= amount for free in self.free)
        return self.free.count(UNIT) * UNIT >= amount

    def take(self, amount: int) -> list[tuple[int, int]]:
        """Take what `fits`; gives (index, amount) of each device.

        A share comes from the fullest device that has room for it: the others stay whole for those
        that want whole ones.
        """
        taken: list[tuple[int, int]] = []
        if 0 < amount < UNIT:
            index = min((free, index) for index, free in enumerate(self.free) if free >= amount)[1]
            taken.append((index, amount))
        else:
            whole = [index for index, free in enumerate(self.free) if free == UNIT]
            taken.extend((index, UNIT) for index in whole[: amount // UNIT])
        for index, share in taken:
            self.free[index] -= share
        return taken

    def give(self, taken: Sequence[tuple[int, int]]) -> None:
        """Give devices or shares back."""
        for index, share in taken:
            self.free[index] += share

    def add(self, device: str, amount: int) -> int:
        """One more device, or a share of one; gives its index."""
        self.ids.append(device)
        self.free.append(amount)
        return len(self.ids) - 1


@final
class DevicePart:
    """Some of the devices of a pool: those of one bundle, among its group's."""

    __slots__ = ("_slots", "whole")

    def __init__(self, whole: DevicePool, slots: Sequence[int]) -> None:
        self.whole = whole
        self._slots = tuple(slots)

    @property
    def ids(self) -> list[str]:
        """What programs call the devices of the pool."""
        return self.whole.ids

    @property
    def resource(self) -> str:
        """What programs call the resource."""
        return self.whole.resource

    @property
    def free(self) -> list[int]:
        """What is free of each device of this part."""
        return [self.whole.free[slot] for slot in self._slots]

    def fits(self, amount: int) -> bool:
        """See `DevicePool.fits`."""
        if amount < UNIT:
            return any(free >= amount for free in self.free)
        return self.free.count(UNIT) * UNIT >= amount

    def take(self, amount: int) -> list[tuple[int, int]]:
        """See `DevicePool.take`; indexes are those of the pool."""
        free = self.whole.free
        if 0 < amount < UNIT:
            slot = min((free[slot], slot) for slot in self._slots if free[slot] >= amount)[1]
            taken = [(slot, amount)]
        else:
            whole = [slot for slot in self._slots if free[slot] == UNIT]
            taken = [(slot, UNIT) for slot in whole[: amount // UNIT]]
        for slot, share in taken:
            free[slot] -= share
        return taken

    def give(self, taken: Sequence[tuple[int, int]]) -> None:
        """See `DevicePool.give`."""
        self.whole.give(taken)

    def forget(self) -> None:
        """Its devices are not the pool's any more; the numbers of the others stay."""
        for slot in self._slots:
            self.whole.free[slot] = 0


#: Resource name -> (index, amount) of each device of it that a worker has.
Devices: TypeAlias = dict[str, list[tuple[int, int]]]


@final
class ResourceAccount:
    """What a node has, and what of it is free.

    Parameters
    ----------
    total : mapping of str to int
        What there is, in units of 1/10,000.
    devices : mapping of str to sequence of str
        Ids of the devices of those resources that have some: as many as `total` says.
    """

    __slots__ = ("available", "pools", "total")

    def __init__(
        self, total: Mapping[str, int], devices: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.total = dict(total)
        self.available = dict(total)
        self.pools: dict[str, DevicePool | DevicePart] = {
            name: DevicePool(ids, name) for name, ids in (devices or {}).items()
        }

    def grow(self, name: str, amount: int) -> None:
        """There is more of something from now on."""
        self.total[name] = self.total.get(name, 0) + amount
        self.available[name] = self.available.get(name, 0) + amount

    def shrink(self, name: str, amount: int) -> None:
        """There is less of something, of which this much is free."""
        self.available[name] -= amount
        self.total[name] -= amount
        if not self.total[name]:
            del self.total[name], self.available[name]

    def fits_ever(self, demand: Mapping[str, int]) -> bool:
        """Whether the node has this much at all."""
        return all(self.total.get(name, 0) >= amount for name, amount in demand.items())

    def fits_now(self, demand: Mapping[str, int]) -> bool:
        """Whether this much is free."""
        available = self.available
        if self.pools and not self._fits_devices(demand):
            return False
        for name, amount in demand.items():  # noqa: SIM110 - a generator costs more than the loop
            if available.get(name, 0) < amount:
                return False
        return True

    def fits_times(self, demand: Mapping[str, int], count: int) -> bool:
        """Whether this much is free `count` times."""
        available = self.available
        if self.pools and not self._fits_devices(demand):
            return False
        return all(available.get(name, 0) >= amount * count for name, amount in demand.items())

    def fits_with(self, demand: Mapping[str, int], returned: Mapping[str, int]) -> bool:
        """Whether this much would be free if something else were given back."""
        available = self.available
        return all(
            available.get(name, 0) + returned.get(name, 0) >= amount
            for name, amount in demand.items()
        )

    def is_overdrawn(self, demand: Mapping[str, int]) -> bool:
        """Whether more is in use than there is, of something that this demand names."""
        for name in demand:  # noqa: SIM110 - a generator costs more than the loop
            if self.available.get(name, 0) < 0:
                return True
        return False

    def _fits_devices(self, demand: Mapping[str, int]) -> bool:
        """Whether single devices have room: two halves of two are not a whole."""
        pools = self.pools
        return all(pools[name].fits(amount) for name, amount in demand.items() if name in pools)

    def acquire(self, demand: Mapping[str, int]) -> bool:
        """Take this much, all or nothing."""
        available = self.available
        for name, amount in demand.items():
            if available.get(name, 0) < amount:
                return False
        if self.pools and not self._fits_devices(demand):
            return False
        for name, amount in demand.items():
            if amount:
                available[name] -= amount
        return True

    def acquire_anyway(self, demand: Mapping[str, int]) -> None:
        """Take it even if that goes below zero: nothing new starts until it is above again."""
        for name, amount in demand.items():
            self.available[name] = self.available.get(name, 0) - amount

    def release(self, demand: Mapping[str, int]) -> None:
        """Give it back."""
        available = self.available
        for name, amount in demand.items():
            if amount:
                available[name] += amount

    def take_devices(self, demand: Mapping[str, int]) -> Devices:
        """Choose the devices of a demand that was acquired."""
        pools = self.pools
        wanted = {name: pools[name] for name, amount in demand.items() if amount and name in pools}
        #: Pools of which a part is asked for as well: the part's devices are meant.
        wholes = [pool.whole for pool in wanted.values() if isinstance(pool, DevicePart)]
        return {
            name: pool.take(demand[name]) for name, pool in wanted.items() if pool not in wholes
        }

    def give_devices(self, devices: Devices) -> None:
        """Give devices back; the amounts are released beside."""
        for name, taken in devices.items():
            self.pools[name].give(taken)

    def ids_of(self, devices: Devices) -> dict[str, list[str]]:
        """What programs call these devices."""
        return {
            self.pools[name].resource: [self.pools[name].ids[index] for index, _ in taken]
            for name, taken in devices.items()
        }

    def check_invariants(self, held: Mapping[str, int]) -> None:
        """Raise AssertionError unless total = available + held."""
        for name, amount in self.total.items():
            assert self.available[name] + held.get(name, 0) == amount, name
        for name, pool in self.pools.items():
            assert all(0 <= free <= UNIT for free in pool.free), name
            if isinstance(pool, DevicePart):  # calls in any bundle take from it too
                assert sum(pool.free) <= self.available[name], name
            else:
                assert sum(pool.free) == self.available[name], name
