"""Writing values to shared memory: every way gives the same bytes, and touches nothing else.

A value goes through the file where there are no pages yet, else through the mapping; which of the
two must not show. Two arenas over one file stand for two processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from poolray.objects.serialization import Serializer
from poolray.objects.shared_memory import Arena, create_arena_file

CAPACITY_BYTES = 32 << 20
SERIALIZER = Serializer(main_definitions=None, out_of_band_all=True)


@pytest.fixture
def arenas() -> Iterator[tuple[Arena, Arena]]:
    descriptor = create_arena_file(CAPACITY_BYTES)
    pair = Arena(descriptor, CAPACITY_BYTES), Arena(os.dup(descriptor), CAPACITY_BYTES)
    yield pair
    for arena in pair:
        arena.close()


def arrays(count: int, size: int) -> list[np.ndarray]:
    return [np.full(size, index % 251, dtype=np.uint8) for index in range(count)]


def surroundings(arena: Arena, offset: int, size_bytes: int) -> bool:
    """Whether what lies beside a range is as it was made: zero."""
    before = arena.write(max(offset - 8192, 0), min(offset, 8192))
    after = arena.write(offset + size_bytes, 8192)
    return not any(before) and not any(after)


@pytest.mark.parametrize(
    "value",
    [
        arrays(1, 5_000_000),
        arrays(3, 99_999),
        arrays(2_000, 101),  # more pieces than one system call takes
        [b"x" * 300_000, np.arange(7), "text"],
    ],
    ids=["one", "several", "thousands", "mixed"],
)
@pytest.mark.parametrize("offset", [64, 4096, (256 << 10) + 128])
def test_a_value_reads_the_same_whichever_way_it_was_written(
    arenas: tuple[Arena, Arena], value: list[object], offset: int
) -> None:
    frame = SERIALIZER.dumps(value)
    assert not isinstance(frame, bytes)
    mine, other = arenas
    wanted = frame.to_bytes()
    for writer in (mine, mine, other, other):  # no pages; mapped; others' pages; mapped
        writer.store(offset, frame)
        assert bytes(mine.write(offset, frame.size_bytes)) == wanted
        assert bytes(other.write(offset, frame.size_bytes)) == wanted
        assert surroundings(mine, offset, frame.size_bytes)
        if writer is mine:
            continue
        mine.write(offset, frame.size_bytes)[:] = bytes(frame.size_bytes)


def test_what_one_process_writes_the_other_sees_where_it_has_looked_before(
    arenas: tuple[Arena, Arena],
) -> None:
    mine, other = arenas
    first, second = SERIALIZER.dumps(arrays(1, 1 << 20)), SERIALIZER.dumps(arrays(2, 1 << 19))
    assert not isinstance(first, bytes)
    assert not isinstance(second, bytes)
    mine.store(0, first)
    assert bytes(other.write(0, first.size_bytes)) == first.to_bytes()
    mine.store(0, second)
    assert bytes(other.write(0, second.size_bytes)) == second.to_bytes()


def test_a_range_has_pages_once_anybody_has_written_to_it(arenas: tuple[Arena, Arena]) -> None:
    mine, other = arenas
    assert not mine.has_pages(1 << 20, 1 << 20)
    other.fill(1 << 20, [b"x" * (1 << 20)])
    assert mine.has_pages(1 << 20, 1 << 20)
    assert not mine.has_pages((1 << 20) + 4096, 2 << 20), "its second half was never written to"
    assert not mine.has_pages(4096, (1 << 20) - 4096)
    assert not mine.has_pages(CAPACITY_BYTES - (1 << 20), 1 << 20)


def test_a_range_that_lies_within_a_page_can_be_filled(arenas: tuple[Arena, Arena]) -> None:
    mine, other = arenas
    other.fill(5000, [b"ab", b"cd"])
    assert mine.has_pages(5000, 4)
    assert bytes(mine.write(4999, 6)) == b"\0abcd\0"


def test_to_tell_whether_a_range_has_pages_takes_no_look_at_all_that_follows(
    arenas: tuple[Arena, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = arenas
    other.fill(0, [bytes(CAPACITY_BYTES)])
    ways: list[int] = []
    seek = os.lseek

    def look(descriptor: int, position: int, way: int) -> int:
        ways.append(way)
        return seek(descriptor, position, way)

    monkeypatch.setattr(os, "lseek", look)
    assert mine.has_pages(0, 8 << 20)
    assert set(ways) == {os.SEEK_DATA}
    assert len(ways) <= 8
