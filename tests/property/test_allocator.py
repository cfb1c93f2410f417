"""The allocator against a model that knows only which bytes are taken."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from poolray.objects.allocator import PAGE_BYTES, RangeAllocator

PAGES = 24


class AllocatorMachine(RuleBasedStateMachine):
    """Allocates and frees at random."""

    ranges = Bundle("ranges")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = RangeAllocator(PAGES * PAGE_BYTES + 100)
        #: page -> the range that has it.
        self.pages: dict[int, int] = {}

    def free_runs(self) -> list[int]:
        """Lengths of the runs of free pages."""
        runs, length = [], 0
        for page in range(PAGES):
            if page in self.pages:
                runs.append(length)
                length = 0
            else:
                length += 1
        return [*runs, length]

    @rule(target=ranges, size=st.integers(0, 8 * PAGE_BYTES))
    def allocate(self, size: int) -> int:
        pages = max(1, -(-size // PAGE_BYTES))
        start = self.allocator.allocate(size)
        if start is None:
            assert max(self.free_runs()) < pages, "there was room"
            return -1
        assert start % PAGE_BYTES == 0
        assert self.allocator.size_of(start) == pages * PAGE_BYTES
        for page in range(start // PAGE_BYTES, start // PAGE_BYTES + pages):
            assert page < PAGES, "beyond the end"
            assert page not in self.pages, "taken already"
            self.pages[page] = start
        return start

    @rule(start=consumes(ranges))
    def free(self, start: int) -> None:
        if start >= 0:
            self.allocator.free(start)
            self.pages = {page: owner for page, owner in self.pages.items() if owner != start}

    @invariant()
    def agrees(self) -> None:
        self.allocator.check_invariants()
        statistics = self.allocator.statistics()
        assert statistics.used_bytes == len(self.pages) * PAGE_BYTES
        assert statistics.capacity_bytes == PAGES * PAGE_BYTES
        assert statistics.largest_free_bytes == max(self.free_runs()) * PAGE_BYTES


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def test_warm_ranges_are_used_before_untouched_ones() -> None:
    allocator = RangeAllocator(100 * PAGE_BYTES)
    offsets = [allocator.allocate(PAGE_BYTES) for _ in range(5)]
    assert offsets[1] is not None
    allocator.free(offsets[1])
    assert allocator.allocate(10) == offsets[1]


def test_the_best_fit_is_taken() -> None:
    allocator = RangeAllocator(100 * PAGE_BYTES)
    sizes = [3, 1, 2, 1, 1]
    offsets = [allocator.allocate(size * PAGE_BYTES) for size in sizes]
    for index in (0, 2):
        offset = offsets[index]
        assert offset is not None
        allocator.free(offset)
    assert allocator.allocate(2 * PAGE_BYTES) == offsets[2]
