"""Virtual time, chance, and the order of events."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable


class World:
    """A clock that only events move, and the one source of chance."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self._count = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something later."""
        self.at(self.now + delay_s, action)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time; at the same time, in the order of asking."""
        self._count += 1
        heapq.heappush(self._heap, (max(time_s, self.now), self._count, action))

    def step(self) -> bool:
        """The next event happens; False when there is none."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        self.events += 1
        action()
        return True

    def chance(self, probability: float) -> bool:
        """True as often as that."""
        return self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        """A number in a range, small ones as likely as large ones."""
        return float(low * (high / low) ** self.random.random())
