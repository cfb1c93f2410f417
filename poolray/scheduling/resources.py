"""Resources of a node: exact amounts, taken and given back.

What: fixed-point quantities (1/10,000) and an account that never loses a fraction.
Who calls: the API converts demands, the node machine acquires and releases.
May touch: nothing.
Invariants: 0 <= available is guaranteed by `acquire`; only `acquire_anyway`, for a blocked task
that goes on, may go below; available equals total when nothing is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

UNIT = 10_000  #: one whole CPU


def to_fixed(name: str, quantity: float) -> int:
    """A quantity in units of 1/10,000.

    Raises
    ------
    ValueError
        It is negative, not a number, or finer than 0.0001.
    """
    if quantity != quantity or quantity in (float("inf"), float("-inf")):
        raise ValueError(f"The quantity of resource {name} must be a finite number: {quantity!r}")
    if quantity < 0:
        raise ValueError(f"The quantity of resource {name} cannot be negative")
    fixed = round(quantity * UNIT)
    if abs(fixed - quantity * UNIT) > 1e-6 * max(1.0, abs(fixed)):
        raise ValueError(
            f"The precision of the fractional quantity of resource {name} cannot go beyond 0.0001"
        )
    return fixed


def from_fixed(fixed: Mapping[str, int]) -> dict[str, float]:
    """Quantities as users see them."""
    return {name: quantity / UNIT for name, quantity in fixed.items() if quantity}


@final
class ResourceAccount:
    """What a node has, and what of it is free."""

    __slots__ = ("available", "total")

    def __init__(self, total: Mapping[str, int]) -> None:
        self.total = dict(total)
        self.available = dict(total)

    def fits_ever(self, demand: Mapping[str, int]) -> bool:
        """Whether the node has this much at all."""
        return all(self.total.get(name, 0) >= amount for name, amount in demand.items())

    def fits_now(self, demand: Mapping[str, int]) -> bool:
        """Whether this much is free."""
        available = self.available
        for name, amount in demand.items():  # noqa: SIM110 - a generator costs more than the loop
            if available.get(name, 0) < amount:
                return False
        return True

    def fits_times(self, demand: Mapping[str, int], count: int) -> bool:
        """Whether this much is free `count` times."""
        available = self.available
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

    def acquire(self, demand: Mapping[str, int]) -> bool:
        """Take this much, all or nothing."""
        available = self.available
        for name, amount in demand.items():
            if available.get(name, 0) < amount:
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

    def check_invariants(self, held: Mapping[str, int]) -> None:
        """Raise AssertionError unless total = available + held."""
        for name, amount in self.total.items():
            assert self.available[name] + held.get(name, 0) == amount, name
