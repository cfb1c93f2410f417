"""Files of workers' output: which are kept, cut, removed; which part each task has written."""

from __future__ import annotations

import random

from poolray.ids import TaskId
from poolray.node.log_book import Cut, LogBook, Order, Remove

TASK, OTHER = TaskId(b"T" * 24), TaskId(b"O" * 24)
KIB = 1 << 10


def book(
    file_kib: int = 1024, total_kib: int = 1 << 20, ended_max: int = 10, parts_max: int = 100
) -> LogBook:
    return LogBook(file_kib * KIB, total_kib * KIB, ended_max, parts_max)


def measure(made: LogBook, name: str, size: int) -> list[Order]:
    made.measured(name, size)
    made.check_invariants()
    return made.orders()


def test_a_part_reaches_from_the_first_to_the_last_byte_of_its_attempt() -> None:
    made = book()
    made.wrote("a", OTHER, 0, end=10, count=10)
    made.wrote("a", TASK, 0, end=15, count=5)
    made.wrote("a", TASK, 0, end=40, count=20)  # a program had written five between
    assert made.part("a", TASK, 0) == (10, 40)
    assert made.part("a", TASK, 1) == (0, 0)
    assert made.part("b", TASK, 0) == (0, 0)


def test_a_file_longer_than_its_share_is_cut() -> None:
    made = book(file_kib=100)
    made.begin("a")
    assert measure(made, "a", 100 * KIB) == []
    assert measure(made, "a", 101 * KIB) == [Cut("a", 100 * KIB)]
    assert measure(made, "a", 50 * KIB) == []


def test_files_of_ended_workers_go_when_there_are_too_many_empty_ones_first() -> None:
    made = book(ended_max=2)
    for name, size in (("a", 5), ("b", 0), ("c", 5)):
        made.begin(name)
        orders = made.end(name, size)
    assert orders == [Remove("b")]
    made.begin("d")
    assert made.end("d", 5) == [Remove("a")]
    assert made.ended() == ["c", "d"]
    made.check_invariants()


def test_files_of_ended_workers_go_when_all_have_too_much() -> None:
    made = book(file_kib=1024, total_kib=1024)
    for name in "abc":
        made.begin(name)
        assert made.end(name, 300 * KIB) == []
    made.begin("d")
    assert measure(made, "d", 500 * KIB) == [Remove("a"), Remove("b")]
    assert made.ended() == ["c"]


def test_many_living_files_share_what_there_may_be() -> None:
    made = book(file_kib=1024, total_kib=1024)
    made.begin("a")
    assert measure(made, "a", 900 * KIB) == []
    for name in "bcd":
        made.begin(name)
    assert made.orders() == [Cut("a", 256 * KIB)]
    for number in range(1000):  # but each has something
        made.begin(f"more {number}")
    assert {order.max_bytes for order in made.orders() if isinstance(order, Cut)} == {64 * KIB}


def test_only_so_many_parts_are_remembered_the_latest() -> None:
    made = book(parts_max=2)
    for number in (1, 2, 1, 3):
        made.wrote("a", TaskId(bytes([number])), 0, end=10 * number, count=5)
    assert made.part("a", TaskId(b"\2"), 0) == (0, 0)
    assert made.part("a", TaskId(b"\1"), 0) != (0, 0)
    assert made.part("a", TaskId(b"\3"), 0) == (25, 30)


class Disk:
    """Files as a shell keeps them."""

    def __init__(self, made: LogBook) -> None:
        self.book = made
        self.sizes: dict[str, int] = {}

    def carry_out(self, orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, Cut):
                self.sizes[order.name] = min(self.sizes[order.name], order.max_bytes // 2)
                self.book.measured(order.name, self.sizes[order.name])
            else:
                del self.sizes[order.name]


def test_what_is_ordered_keeps_the_limits_whatever_happens() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        made = book(file_kib=200, total_kib=1000, ended_max=3)
        disk = Disk(made)
        for number in range(60):
            living = made.living()
            name = draw.choice(living) if living else ""
            match draw.randrange(4) if living else 0:
                case 0 if len(living) < 8:
                    made.begin(f"{number}")
                    disk.sizes[f"{number}"] = 0
                case 0 | 1:
                    disk.sizes[name] += draw.randrange(500 * KIB)
                    made.measured(name, disk.sizes[name])
                case 2:
                    disk.carry_out(made.orders())
                case 3:
                    disk.carry_out(made.end(name, disk.sizes[name]))
            made.check_invariants()
        disk.carry_out(made.orders())
        made.check_invariants()
        assert sum(disk.sizes.values()) <= 1000 * KIB, seed
        assert len(made.ended()) <= 3, seed
        assert sorted(disk.sizes) == sorted([*made.living(), *made.ended()]), seed
