"""Places in the arena: which ranges are taken, which are free, which to hand out next.

What: allocation by best fit among ranges that were used before (their pages are warm: writing to
them is ten times as fast as to cold ones), and only then from the untouched end.
Who calls: the node machine.
May touch: nothing; it deals in offsets and never sees the memory.
Invariants: taken and free ranges do not overlap and together are exactly [0, high water); no two
free ranges touch; every offset and size is a multiple of the page size.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import final

PAGE_BYTES = 4096


def range_bytes(size_bytes: int) -> int:
    """Bytes of the range that a value of a size takes."""
    return max(PAGE_BYTES, (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class AllocatorStatistics:
    """A snapshot of the arena's use, in bytes and counts."""

    capacity_bytes: int
    used_bytes: int
    high_water_bytes: int
    free_ranges: int
    largest_free_bytes: int  #: the largest value that fits now


@final
class RangeAllocator:
    """Hands out page-aligned ranges of `[0, capacity_bytes)`."""

    __slots__ = (
        "_by_size",
        "_end_by_start",
        "_high_water",
        "_start_by_end",
        "_taken",
        "capacity_bytes",
        "used_bytes",
    )

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        #: Bytes of all ranges handed out.
        self.used_bytes = 0
        self._high_water = 0
        #: Sorted (size, start) of the free ranges below the high-water mark.
        self._by_size: list[tuple[int, int]] = []
        #: start -> end of each free range, and the other way round, to join neighbours.
        self._end_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        #: start -> size of each range handed out.
        self._taken: dict[int, int] = {}

    def start_of(self, offset: int) -> int:
        """Start of the range that an offset lies in; for tests, it looks at all of them.

        Raises
        ------
        KeyError
            It is in none.
        """
        for start, size in self._taken.items():
            if start <= offset < start + size:
                return start
        raise KeyError(offset)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a free range of at least `size_bytes`, or None when there is none."""
        size = range_bytes(size_bytes)
        index = bisect.bisect_left(self._by_size, (size, -1))
        if index < len(self._by_size):
            _, start = self._by_size[index]
            end = self._end_by_start[start]
            self._remove_free(start, end)
            if start + size < end:
                self._add_free(start + size, end)
        elif self._high_water + size <= self.capacity_bytes:
            start = self._high_water
            self._high_water += size
        else:
            return self._allocate_across_the_mark(size)
        self._taken[start] = size
        self.used_bytes += size
        return start

    def _allocate_across_the_mark(self, size: int) -> int | None:
        """A free range that ends at the high-water mark may grow beyond it."""
        start = self._start_by_end.get(self._high_water)
        if start is None or start + size > self.capacity_bytes:
            return None
        self._remove_free(start, self._high_water)
        self._high_water = start + size
        self._taken[start] = size
        self.used_bytes += size
        return start

    def free(self, start: int) -> None:
        """Give a range back; it joins free neighbours."""
        size = self._taken.pop(start)
        self.used_bytes -= size
        end = start + size
        before = self._start_by_end.get(start)
        if before is not None:
            self._remove_free(before, start)
            start = before
        after = self._end_by_start.get(end)
        if after is not None:
            self._remove_free(end, after)
            end = after
        self._add_free(start, end)

    def size_of(self, start: int) -> int:
        """Bytes of a range that is taken."""
        return self._taken[start]

    def _add_free(self, start: int, end: int) -> None:
        bisect.insort(self._by_size, (end - start, start))
        self._end_by_start[start] = end
        self._start_by_end[end] = start

    def _remove_free(self, start: int, end: int) -> None:
        del self._by_size[bisect.bisect_left(self._by_size, (end - start, start))]
        del self._end_by_start[start]
        del self._start_by_end[end]

    def statistics(self) -> AllocatorStatistics:
        """Use and fragmentation as of now."""
        largest = self._by_size[-1][0] if self._by_size else 0
        tail = self.capacity_bytes - (self._start_by_end.get(self._high_water, self._high_water))
        return AllocatorStatistics(
            capacity_bytes=self.capacity_bytes,
            used_bytes=self.used_bytes,
            high_water_bytes=self._high_water,
            free_ranges=len(self._by_size),
            largest_free_bytes=max(largest, tail),
        )

    def check_invariants(self) -> None:
        """Raise AssertionError when ranges overlap, leave gaps or are not joined."""
        ranges = [(start, start + size, True) for start, size in self._taken.items()]
        ranges += [(start, end, False) for start, end in self._end_by_start.items()]
        position = 0
        previous_taken = True
        for start, end, taken in sorted(ranges):
            assert start == position, f"gap or overlap at {position}"
            assert end > start, f"empty range at {start}"
            assert taken or previous_taken, f"free ranges not joined at {start}"
            position, previous_taken = end, taken
        assert position == self._high_water <= self.capacity_bytes
        assert self.used_bytes == sum(self._taken.values())
        assert sorted((e - s, s) for s, e in self._end_by_start.items()) == self._by_size
