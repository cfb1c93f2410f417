"""What a node tells of its memory, and the text that is made of it."""

from __future__ import annotations

import msgspec
import pytest

from poolray.ids import ObjectId
from poolray.node.effects import Reply
from poolray.protocol.client import AllocateRange, NoteCallSite, PutObject, RangeGranted
from poolray.protocol.memory import (
    HolderKind,
    MemoryTable,
    ObjectEntry,
    ObjectHolder,
    Place,
    PlaceUse,
    SpillingUse,
)
from poolray.protocol.values import InArena, InFile, Outcome
from poolray.protocol.worker import TasksFinished
from poolray.util.memory import format_table, memory_summary
from tests.unit.node_harness import DRIVER, Bench, result_of

A, B, C = (ObjectId(name * 28) for name in (b"a", b"b", b"c"))
PAGE = 4096
PID = 41


def put_large(bench: Bench, object_id: ObjectId, size: int) -> None:
    bench.tell(AllocateRange(request_id=9, object_id=object_id, size_bytes=size), DRIVER)
    (granted,) = [e.message for e in bench.take(Reply) if isinstance(e.message, RangeGranted)]
    bench.put(object_id, InArena(object_id=object_id, offset=granted.offset, size_bytes=size))


def entries(bench: Bench, limit: int | None = None) -> dict[ObjectId, ObjectEntry]:
    return {entry.object_id: entry for entry in bench.node.memory_table(PID, limit).objects}


def kinds(entry: ObjectEntry) -> list[tuple[HolderKind, int, str]]:
    return [(holder.kind, holder.pid, holder.name) for holder in entry.holders]


def test_sizes_and_places() -> None:
    bench = Bench()
    bench.put(A, b"12345")
    put_large(bench, B, 3 * PAGE - 1)
    bench.put(C, InFile(object_id=C, path="/spilled", size_bytes=7))
    bench.group(workers=1)
    pending = result_of(bench.submit(bench.task_class()))
    table = bench.node.memory_table(PID)
    found = {entry.object_id: (entry.place, entry.size_bytes) for entry in table.objects}
    assert found == {
        B: (Place.ARENA, 3 * PAGE - 1),
        C: (Place.FILE, 7),
        A: (Place.INLINE, 5),
        pending: (Place.PENDING, -1),
    }
    assert list(found) == [B, C, A, pending], "the largest first"
    assert table.places[Place.ARENA] == PlaceUse(objects=1, size_bytes=3 * PAGE - 1)
    assert (table.used_bytes, table.capacity_bytes) == (3 * PAGE, 1 << 20)
    assert table.largest_free_bytes == (1 << 20) - 3 * PAGE


def test_a_limit_keeps_the_largest_and_sums_over_all() -> None:
    bench = Bench()
    for size, object_id in enumerate((A, B, C), start=1):
        bench.put(object_id, b"x" * size)
    table = bench.node.memory_table(PID, 1)
    assert [entry.object_id for entry in table.objects] == [C]
    assert table.left_out == 2
    assert table.places[Place.INLINE] == PlaceUse(objects=3, size_bytes=6)


def test_every_kind_of_holder() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    bench.put(A, b"a")
    bench.tell(PutObject(object_id=B, value=b"b", contained=[A]), DRIVER)
    kind = bench.task_class("resize")
    task_id = bench.submit(kind, dependencies=[A])
    (worker,) = bench.busy()
    found = entries(bench)
    pid = bench.node.state.workers[worker].pid
    assert kinds(found[A]) == [
        (HolderKind.LOCAL_REFERENCE, PID, ""),
        (HolderKind.USED_BY_PENDING_TASK, pid, "resize"),
        (HolderKind.CAPTURED_IN_OBJECT, 0, B.hex()),
    ]
    assert pid != 0
    packet = bench.read(worker)
    bench.tell(
        TasksFinished(
            worker_id=worker,
            results=[],
            elapsed_ns=1,
            sequence=packet.sequence - 1,
            kept=[A, B],
            viewed=[A],
        )
    )
    found = entries(bench)
    assert (HolderKind.PINNED_IN_MEMORY, pid, "") in kinds(found[A])
    assert kinds(found[B]) == [
        (HolderKind.LOCAL_REFERENCE, PID, ""),
        (HolderKind.LOCAL_REFERENCE, pid, ""),
    ]
    bench.finish(worker, packet, [Outcome(values=[b"error"], is_error=True)])
    assert entries(bench)[result_of(task_id)].is_error


def test_call_sites_go_with_their_objects() -> None:
    bench = Bench(record_ref_creation_sites=1)
    bench.put(A, b"a")
    bench.tell(NoteCallSite(object_ids=[A, B], call_site="here"), DRIVER)
    assert entries(bench)[A].call_site == "here"
    bench.drop(A)
    bench.assert_empty()
    assert bench.node.memory_table(PID).objects == []


def test_a_worker_that_dies_holds_nothing() -> None:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    bench.put(A, b"a")
    bench.submit(bench.task_class())
    (worker,) = bench.busy()
    bench.tell(
        TasksFinished(worker_id=worker, results=[], elapsed_ns=1, sequence=0, kept=[A], viewed=[A])
    )
    assert len(entries(bench)[A].holders) == 2
    bench.lose(worker)
    assert len(entries(bench)[A].holders) == 1


def test_the_table_travels() -> None:
    bench = Bench()
    put_large(bench, A, PAGE)
    table = bench.node.memory_table(PID)
    data = msgspec.msgpack.encode(table)
    assert msgspec.msgpack.decode(data, type=MemoryTable) == table


# --- text ----------------------------------------------------------------------------------------


def table_of(*objects: ObjectEntry, **fields: object) -> MemoryTable:
    values = {
        "node_id": b"n" * 28,
        "pid": PID,
        "objects": list(objects),
        "left_out": 0,
        "places": {Place.ARENA: PlaceUse(objects=2, size_bytes=3_000_000)},
        "capacity_bytes": 10_000_000,
        "used_bytes": 4_000_000,
        "high_water_bytes": 5_000_000,
        "free_ranges": 2,
        "largest_free_bytes": 3_000_000,
        "records_call_sites": True,
    }
    return MemoryTable(**(values | fields))  # type: ignore[arg-type]


def entry_of(object_id: ObjectId, size: int, *holders: ObjectHolder, site: str = "") -> ObjectEntry:
    return ObjectEntry(
        object_id=object_id,
        size_bytes=size,
        place=Place.ARENA,
        is_error=False,
        holders=list(holders),
        call_site=site,
    )


def text_of(table: MemoryTable, **options: object) -> str:
    defaults = {
        "group_by": "NODE_ADDRESS",
        "sort_by": "OBJECT_SIZE",
        "units": "MB",
        "stats_only": False,
        "num_entries": None,
    }
    return format_table(table, **(defaults | options))  # type: ignore[arg-type]


MINE = ObjectHolder(kind=HolderKind.LOCAL_REFERENCE, pid=PID)
THEIRS = ObjectHolder(kind=HolderKind.PINNED_IN_MEMORY, pid=77)
PAIR = (
    entry_of(A, 2_000_000, MINE, THEIRS, site="(put object) | f.py:main:1"),
    entry_of(B, 1_000_000, MINE),
)


def test_each_object_has_a_line_for_each_of_its_holders() -> None:
    lines = text_of(table_of(*PAIR)).splitlines()
    assert len([line for line in lines if A.hex() in line]) == 2
    (line,) = [line for line in lines if B.hex() in line]
    assert line.split() == [
        str(PID), "ARENA", "1.000", "MB", "LOCAL_REFERENCE", "-", B.hex(), "-",
    ]  # fmt: skip
    assert any(line.startswith("3.000 MB ") for line in lines), "B counts once"


def test_the_store_is_described() -> None:
    text = text_of(table_of(), stats_only=True)
    assert "4.000 MB used of 10.000 MB (40.0 %)" in text
    assert "Fragmentation: 50.0 % (largest free range 3.000 MB of 6.000 MB free, 2 gaps)" in text
    assert "Object references" not in text
    assert "Spilled" not in text


def test_spilling_is_described_once_there_is_some() -> None:
    spilling = SpillingUse(
        spilled_objects=3, spilled_bytes=200_000_000, spill_s=0.5, restored_objects=1
    )
    text = text_of(table_of(spilling=spilling))
    assert "Spilled 200.000 MB, 3 objects, 400 MB/s" in text
    assert "Restored 0.000 MB, 1 objects" in text


@pytest.mark.parametrize(
    ("group_by", "names"),
    [
        ("node_address", ["127.0.0.1"]),
        ("STACK_TRACE", ["(put object) | f.py:main:1", "unknown"]),
        ("pid", [str(PID), "77"]),
        ("reference_type", ["LOCAL_REFERENCE", "PINNED_IN_MEMORY"]),
    ],
)
def test_objects_are_grouped(group_by: str, names: list[str]) -> None:
    lines = text_of(table_of(*PAIR), group_by=group_by).splitlines()
    what = group_by.lower().replace("_", " ")
    found = [line for line in lines if line.startswith("--- Summary")]
    assert found == [f"--- Summary for {what}: {name} ---" for name in names]


def test_lines_are_sorted_and_limited() -> None:
    rows = text_of(table_of(*reversed(PAIR))).splitlines()
    (first, *_) = [line for line in rows if "LOCAL_REFERENCE" in line]
    assert A.hex() in first
    text = text_of(table_of(*PAIR), sort_by="PID", num_entries=2)
    assert "77 " not in text
    assert "(1 more)" in text


def test_what_is_left_out_is_said() -> None:
    text = text_of(table_of(*PAIR, left_out=5, records_call_sites=False))
    assert "5 smaller objects are not shown" in text
    assert "POOLRAY_record_ref_creation_sites=1" in text


@pytest.mark.parametrize(
    "options",
    [
        {"group_by": "COLOUR"},
        {"sort_by": ""},
        {"units": "KiB"},
        {"units": None},
        {"num_entries": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        memory_summary(**options)  # type: ignore[arg-type]
