"""Memory that runs short: what goes to disk, what waits, what comes back, what is lost."""

from __future__ import annotations

from poolray.ids import ObjectId
from poolray.node.effects import (
    DeleteFile,
    DeleteUnsealed,
    Reply,
    RestoreObject,
    SpillObjects,
    Warn,
)
from poolray.node.store_records import StoreStatistics
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    PinObjects,
    PutObject,
    RangeGranted,
    ReturnRange,
    UnpinObjects,
)
from poolray.protocol.node import (
    ClientLeft,
    RestoreDone,
    RestoreFailed,
    SpillDone,
    SpillFailed,
)
from poolray.protocol.values import FunctionDefinition, InArena, InFile, Outcome, Value
from tests.unit.node_harness import DRIVER, Bench, result_of

PAGE = 4096
A, B, C, D, E = (ObjectId(name * 28) for name in (b"a", b"b", b"c", b"d", b"e"))


def small_bench(pages: int = 4, **config: object) -> Bench:
    """A node that spills only when a value finds no room."""
    config.setdefault("object_spilling_threshold", 1.0)
    config.setdefault("min_spilling_size_bytes", 1 << 20)
    return Bench(arena_bytes=pages * PAGE, **config)  # type: ignore[arg-type]


def ask(bench: Bench, object_id: ObjectId, pages: int = 1, client: bytes = DRIVER) -> int:
    """Ask for a range; gives the number of the request."""
    request_id = ask.count = getattr(ask, "count", 1000) + 1  # type: ignore[attr-defined]
    size = pages * PAGE
    bench.tell(AllocateRange(request_id=request_id, object_id=object_id, size_bytes=size), client)
    return int(request_id)


def granted(bench: Bench) -> dict[int, RangeGranted]:
    """Answers to `ask` since the last call, by request."""
    replies = [e.message for e in bench.take(Reply)]
    return {m.request_id: m for m in replies if isinstance(m, RangeGranted)}


def seal(
    bench: Bench, object_id: ObjectId, grant: RangeGranted, pages: int = 1, client: bytes = DRIVER
) -> None:
    """Write what was granted a place."""
    place: Value
    if grant.offset < 0:
        path = f"/own/{grant.file_number}"
        place = InFile(object_id=object_id, path=path, size_bytes=pages * PAGE)
    else:
        place = InArena(object_id=object_id, offset=grant.offset, size_bytes=pages * PAGE)
    bench.tell(PutObject(object_id=object_id, value=place), client)


def put(bench: Bench, object_id: ObjectId, pages: int = 1, client: bytes = DRIVER) -> RangeGranted:
    """Put a value for which there is room."""
    request = ask(bench, object_id, pages, client)
    grant = granted(bench)[request]
    seal(bench, object_id, grant, pages, client)
    return grant


def spills(bench: Bench) -> list[SpillObjects]:
    return bench.take(SpillObjects)


def names(effect: SpillObjects) -> list[ObjectId]:
    return [place.object_id for place in effect.places]


def write(bench: Bench, effect: SpillObjects) -> str:
    """The thread has written a batch; gives the file."""
    path = f"/spilled/{effect.batch}"
    places = [
        InFile(object_id=place.object_id, path=path, size_bytes=place.size_bytes, offset=index)
        for index, place in enumerate(effect.places)
    ]
    bench.tell(SpillDone(batch=effect.batch, places=places, elapsed_s=0.5))
    return path


def fail(bench: Bench, effect: SpillObjects) -> None:
    bench.tell(SpillFailed(batch=effect.batch, reason="No space left on device", elapsed_s=0.5))


def spill(bench: Bench, *object_ids: ObjectId) -> None:
    """Push objects out of memory by asking for all of it."""
    request = ask(bench, ObjectId(b"!" * 28), bench.node.state.allocator.capacity_bytes // PAGE)
    for effect in spills(bench):
        assert set(names(effect)) >= set(object_ids)
        write(bench, effect)
    grant = granted(bench)[request]
    assert grant.offset == 0
    bench.tell(ReturnRange(object_id=ObjectId(b"!" * 28)), DRIVER)


def statistics(bench: Bench) -> StoreStatistics:
    return bench.node.statistics().store


def deleted(bench: Bench) -> list[str]:
    return [effect.path for effect in bench.take(DeleteFile)]


# --- making room ---------------------------------------------------------------------------------


def test_a_value_without_room_waits_until_an_older_one_is_on_disk() -> None:
    bench = small_bench(4)
    first = put(bench, A, 2)
    put(bench, B, 2)
    request = ask(bench, C, 2)
    (effect,) = spills(bench)
    assert names(effect) == [A]
    assert granted(bench) == {}
    assert statistics(bench).pending_allocations == 1
    write(bench, effect)
    assert granted(bench)[request].offset == first.offset
    assert statistics(bench).pending_allocations == 0
    assert statistics(bench).objects_on_disk == 1
    assert statistics(bench).spilled_bytes == 2 * PAGE
    assert statistics(bench).spill_s == 0.5


def test_beyond_the_mark_the_least_recently_used_go_and_the_others_stay() -> None:
    bench = small_bench(10, object_spilling_threshold=0.8)
    for number in range(8):
        put(bench, ObjectId(b"%028d" % number))
    assert spills(bench) == []
    bench.value_of(ObjectId(b"%028d" % 0))
    bench.tell(UnpinObjects(object_ids=[ObjectId(b"%028d" % 0)]), DRIVER)
    put(bench, A)
    (effect,) = spills(bench)
    assert names(effect) == [ObjectId(b"%028d" % 1)]


def test_what_is_being_written_is_not_asked_for_twice() -> None:
    bench = small_bench(4)
    for object_id in (A, B, C, D):
        put(bench, object_id)
    ask(bench, E)
    assert len(spills(bench)) == 1
    bench.hold(A)
    assert spills(bench) == []


def test_objects_share_a_file_up_to_its_size_and_threads_up_to_their_number() -> None:
    bench = small_bench(6, min_spilling_size_bytes=2 * PAGE, max_io_workers=2)
    for number in range(6):
        put(bench, ObjectId(b"%028d" % number))
    ask(bench, A, 6)
    batches = spills(bench)
    assert [len(effect.places) for effect in batches] == [2, 2]
    write(bench, batches[0])
    assert [len(effect.places) for effect in spills(bench)] == [2]


def test_who_waits_is_served_in_order() -> None:
    bench = small_bench(4)
    put(bench, A, 2)
    put(bench, B, 2)
    large, little = ask(bench, C, 3), ask(bench, D, 1)
    bench.drop(A)
    assert granted(bench) == {}, "there is room for the second, but the first came first"
    for effect in spills(bench):
        write(bench, effect)
    assert list(granted(bench)) == [large, little]


def test_a_value_that_can_never_fit_goes_to_a_file_at_once() -> None:
    bench = small_bench(4)
    put(bench, A, 4)
    request = ask(bench, B, 5)
    grant = granted(bench)[request]
    assert grant.offset == -1
    assert grant.file_number > 0
    assert spills(bench) == []
    seal(bench, B, grant, 5)
    assert isinstance(bench.value_of(B), InFile)
    bench.drop(B)
    assert deleted(bench) == [f"/own/{grant.file_number}"]


def test_a_file_that_is_granted_and_never_sealed_is_deleted() -> None:
    bench = small_bench(4)
    ask(bench, A, 5, client=b"other")
    ask(bench, B, 5, client=b"other")
    numbers = [grant.file_number for grant in granted(bench).values()]
    bench.tell(ReturnRange(object_id=A), b"other")
    bench.tell(ClientLeft(client_id=b"other"))
    assert [effect.file_number for effect in bench.take(DeleteUnsealed)] == numbers


def test_who_no_longer_waits_is_not_served() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    first, second, third = ask(bench, B), ask(bench, C, client=b"other"), ask(bench, D)
    bench.tell(CancelRequest(request_id=first), DRIVER)
    bench.tell(ClientLeft(client_id=b"other"))
    (effect,) = spills(bench)
    write(bench, effect)
    assert set(granted(bench)) == {third}
    assert second


def test_a_freed_value_makes_room_at_once() -> None:
    bench = small_bench(4)
    put(bench, A, 2)
    put(bench, B, 2)
    request = ask(bench, C, 2)
    (effect,) = spills(bench)
    bench.drop(B)
    assert granted(bench)[request].offset == 2 * PAGE
    write(bench, effect)
    assert statistics(bench).objects_on_disk == 1


# --- who looks -----------------------------------------------------------------------------------


def test_what_a_process_looks_at_stays_and_values_go_to_files_instead() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    bench.value_of(A)
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    assert spills(bench) == []


def test_a_view_that_dies_frees_its_object_to_move_although_the_ref_lives() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    bench.value_of(A)
    bench.value_of(A)
    bench.tell(UnpinObjects(object_ids=[A]), DRIVER)
    assert granted(bench) == {}
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    bench.tell(ReturnRange(object_id=B), DRIVER)
    bench.tell(UnpinObjects(object_ids=[A]), DRIVER)
    ask(bench, B)
    assert len(spills(bench)) == 1


def test_what_was_looked_at_while_it_was_written_stays_and_goes_later_without_a_write() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    first = ask(bench, B)
    (effect,) = spills(bench)
    assert isinstance(bench.value_of(A), InArena)
    write(bench, effect)
    assert granted(bench)[first].offset == -1, "nothing else can make room"
    bench.tell(UnpinObjects(object_ids=[A]), DRIVER)
    second = ask(bench, C)
    assert granted(bench)[second].offset == 0
    assert spills(bench) == []
    assert statistics(bench).spilled_objects == 1


def test_arguments_are_pinned_as_long_as_their_packet_is_under_way() -> None:
    bench = small_bench(2)
    bench.group(workers=1)
    put(bench, A, 2)
    bench.submit(bench.task_class(), dependencies=[A])
    (worker,) = bench.busy()
    assert granted(bench) == {}
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    packet = bench.read(worker)
    assert isinstance(packet.tasks[0].arguments[0], InArena)
    bench.finish(worker, packet)
    ask(bench, C)
    assert len(spills(bench)) == 1


def test_an_array_that_a_task_keeps_is_pinned_for_its_worker_until_it_dies() -> None:
    bench = small_bench(2)
    bench.group(workers=1)
    put(bench, A, 2)
    bench.submit(bench.task_class(), dependencies=[A])
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker), kept=[A], pinned=[A])
    bench.drop(A)
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    bench.lose(worker)
    request = ask(bench, C)
    assert granted(bench)[request].offset == 0


def test_a_packet_that_is_taken_back_or_lost_pins_nothing() -> None:
    bench = small_bench(2)
    bench.group(workers=1)
    put(bench, A, 2)
    bench.submit(bench.task_class(max_retries=0), dependencies=[A])
    (worker,) = bench.busy()
    assert statistics(bench).pinned_objects == 1
    bench.lose(worker, 1, 0)
    assert statistics(bench).pinned_objects == 0


def test_a_ref_is_no_view() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    bench.hold(A, client=b"other")
    ask(bench, B)
    assert len(spills(bench)) == 1


def test_a_result_for_a_caller_is_looked_at_until_it_is_released() -> None:
    bench = small_bench(2)
    group = bench.group(1, workers=1)
    bench.submit(bench.caller_class(group_id=group))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    request = ask(bench, A, 2, client=worker)
    grant = granted(bench)[request]
    place = InArena(object_id=A, offset=grant.offset, size_bytes=2 * PAGE)
    bench.finish(worker, packet, [Outcome(values=[place])])
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    bench.drop(A)
    request = ask(bench, C)
    assert granted(bench)[request].offset == 0


def test_large_payloads_are_sent_from_where_they_are_at_that_time() -> None:
    bench = small_bench(2, packets_per_worker_max=1)
    kind = bench.caller_class(group_id=bench.group(1, workers=1))
    bench.submit(kind)
    (worker,) = bench.busy()
    grant = put(bench, A, 2)
    place = InArena(object_id=A, offset=grant.offset, size_bytes=2 * PAGE)
    bench.submit(kind, calls=[place], borrows=[A])
    spill(bench, A)
    bench.finish(worker, bench.read(worker))
    (payload,) = bench.read(worker).tasks[0].calls
    assert isinstance(payload, InFile)
    assert payload.path.startswith("/spilled/")


def test_code_that_workers_load_at_some_later_call_stays_in_memory() -> None:
    from poolray.protocol.client import DefineFunction

    bench = small_bench(2)
    grant = put(bench, A, 2)
    blob = InArena(object_id=A, offset=grant.offset, size_bytes=2 * PAGE)
    definition = FunctionDefinition(function_id=b"large", blob=blob, name="large")  # type: ignore[arg-type]
    bench.tell(DefineFunction(definition=definition), DRIVER)
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1


def test_a_pin_for_something_unknown_means_nothing() -> None:
    bench = small_bench(2)
    bench.tell(PinObjects(object_ids=[A]), DRIVER)
    bench.tell(UnpinObjects(object_ids=[A, B]), DRIVER)
    assert statistics(bench).pinned_objects == 0


# --- coming back ---------------------------------------------------------------------------------


def test_get_brings_a_value_back_and_wait_does_not() -> None:
    bench = small_bench(4)
    put(bench, A)
    spill(bench, A)
    request = bench.wait(1, A)
    assert bench.ready_indexes() == {request: [0]}
    assert bench.take(RestoreObject) == []
    request = bench.get(A)
    assert bench.values() == {}
    (effect,) = bench.take(RestoreObject)
    assert effect.place.path.startswith("/spilled/")
    bench.tell(RestoreDone(restore=effect.restore, elapsed_s=0.25))
    (value,) = bench.values()[request].values
    assert value == InArena(object_id=A, offset=effect.offset, size_bytes=PAGE)
    assert statistics(bench).restored_bytes == PAGE
    assert statistics(bench).restore_s == 0.25
    assert statistics(bench).objects_on_disk == 0
    assert deleted(bench) == [], "it can leave again without being written again"
    bench.drop(A)
    assert len(deleted(bench)) == 1
    bench.assert_empty()


def test_a_value_for_which_memory_has_no_room_is_read_from_its_file() -> None:
    bench = small_bench(2)
    put(bench, A, 2)
    spill(bench, A)
    put(bench, B, 2)
    value = bench.value_of(A)
    assert isinstance(value, InFile)
    assert statistics(bench).mapped_bytes == 2 * PAGE


def test_several_requests_for_a_value_read_it_once() -> None:
    bench = small_bench(2)
    put(bench, A)
    spill(bench, A)
    requests = [bench.get(A), bench.get(A, A), bench.get(A, client=b"other")]
    (effect,) = bench.take(RestoreObject)
    bench.tell(RestoreDone(restore=effect.restore, elapsed_s=0.1))
    assert list(bench.values()) == requests
    assert statistics(bench).pinned_objects == 1


def test_a_task_waits_for_arguments_that_fit_below_the_mark_and_maps_the_others() -> None:
    bench = small_bench(4, object_spilling_threshold=0.6)
    bench.group(workers=1)
    put(bench, A)
    put(bench, B, 2)
    ask(bench, ObjectId(b"!" * 28), 4)
    for effect in spills(bench):
        write(bench, effect)
    bench.tell(ReturnRange(object_id=ObjectId(b"!" * 28)), DRIVER)
    task = bench.submit(bench.task_class(), dependencies=[A, B])
    assert bench.state(task) == "WAITING"
    (effect,) = bench.take(RestoreObject)
    assert effect.place.object_id == A
    bench.tell(RestoreDone(restore=effect.restore, elapsed_s=0.1))
    (worker,) = bench.busy()
    first, second = bench.read(worker).tasks[0].arguments
    assert isinstance(first, InArena)
    assert isinstance(second, InFile)


def test_a_task_that_is_tried_again_does_not_wait_for_what_it_mapped_before() -> None:
    bench = small_bench(3)
    bench.group(workers=1)
    put(bench, A)
    spill(bench, A)
    put(bench, B, 3)
    bench.submit(bench.task_class(retry_exceptions=b"*"), dependencies=[A])
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert isinstance(packet.tasks[0].arguments[0], InFile)
    bench.drop(B)
    failed = Outcome(values=[b"!"], is_error=True, retriable=True)
    bench.finish(worker, packet, [failed])
    assert bench.read(worker).tasks[0].arguments == packet.tasks[0].arguments


def test_a_value_that_is_freed_while_it_is_written_or_read_leaves_nothing() -> None:
    bench = small_bench(2)
    put(bench, A)
    put(bench, B)
    ask(bench, C, 2)
    (effect,) = spills(bench)
    bench.drop(A)
    bench.drop(B)
    assert granted(bench) == {}, "the thread still reads the range"
    path = write(bench, effect)
    assert deleted(bench) == [path]
    assert len(granted(bench)) == 1
    bench.tell(ReturnRange(object_id=C), DRIVER)

    put(bench, D)
    spill(bench, D)
    bench.tell(ReturnRange(object_id=ObjectId(b"!" * 28)), DRIVER)
    bench.get(D, client=b"other")
    (restore,) = bench.take(RestoreObject)
    bench.drop(D)
    bench.tell(RestoreDone(restore=restore.restore, elapsed_s=0.1))
    bench.tell(ClientLeft(client_id=b"other"))
    bench.assert_empty()


def test_a_damaged_file_is_an_error_that_names_it_and_the_object() -> None:
    bench = small_bench(2)
    put(bench, A)
    spill(bench, A)
    request = bench.get(A)
    (effect,) = bench.take(RestoreObject)
    reason = f"its file {effect.place.path} was damaged"
    bench.tell(RestoreFailed(restore=effect.restore, reason=reason, is_lost=True, elapsed_s=0.1))
    reply = bench.values()[request]
    assert reply.errors == [0]
    assert isinstance(reply.values[0], bytes)
    text = reply.values[0].decode()
    assert text.startswith("ObjectLostError")
    assert A.hex() in text
    assert effect.place.path in text
    bench.drop(A)
    bench.assert_empty()


def test_a_file_that_cannot_be_read_now_is_left_to_the_reader() -> None:
    bench = small_bench(2)
    put(bench, A)
    spill(bench, A)
    request = bench.get(A)
    (effect,) = bench.take(RestoreObject)
    failed = RestoreFailed(
        restore=effect.restore, reason="Too many open files", is_lost=False, elapsed_s=0.1
    )
    bench.tell(failed)
    assert bench.values()[request].values == [effect.place]


def test_a_file_goes_with_the_last_of_its_objects() -> None:
    bench = small_bench(2)
    put(bench, A)
    put(bench, B)
    spill(bench, A, B)
    assert statistics(bench).files == 1
    bench.drop(A)
    assert deleted(bench) == []
    assert statistics(bench).disk_bytes == 2 * PAGE
    bench.drop(B)
    assert len(deleted(bench)) == 1
    assert statistics(bench).disk_bytes == 0


# --- disks that are full -------------------------------------------------------------------------


def test_a_full_disk_is_told_once_and_values_stay_in_memory() -> None:
    bench = small_bench(2, spill_retry_s=10.0)
    put(bench, A, 2)
    request = ask(bench, B)
    (effect,) = spills(bench)
    fail(bench, effect)
    assert granted(bench)[request].offset == -1, "its writer finds out whether a file can be made"
    (warning,) = bench.take(Warn)
    assert "No space left on device" in warning.text
    assert "object_spilling_directory" in warning.text
    assert isinstance(bench.value_of(A), InArena)
    bench.tell(UnpinObjects(object_ids=[A]), DRIVER)
    ask(bench, C)
    assert spills(bench) == [], "not again so soon"
    bench.now += 11.0
    ask(bench, D)
    (effect,) = spills(bench)
    fail(bench, effect)
    assert bench.take(Warn) == []


def test_the_disk_is_used_up_to_its_limit() -> None:
    bench = small_bench(2, object_spilling_max_bytes=2 * PAGE)
    put(bench, A, 2)
    ask(bench, B, 2)
    (effect,) = spills(bench)
    write(bench, effect)
    (grant,) = granted(bench).values()
    seal(bench, B, grant, 2)
    request = ask(bench, C, 2)
    assert spills(bench) == []
    refused = granted(bench)[request]
    assert refused.offset == -1
    assert "object_spilling_max_bytes" in refused.refusal
    bench.drop(A)
    ask(bench, D, 2)
    assert len(spills(bench)) == 1, "there is room again"


# --- errors that share memory --------------------------------------------------------------------


def test_an_error_that_stands_for_several_return_values_stays_where_they_find_it() -> None:
    bench = small_bench(2)
    bench.group(workers=1)
    task = bench.submit(bench.task_class(num_returns=2))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    request = ask(bench, A, 2, client=worker)
    grant = granted(bench)[request]
    place = InArena(object_id=A, offset=grant.offset, size_bytes=2 * PAGE)
    bench.finish(worker, packet, [Outcome(values=[place], is_error=True)])
    request = ask(bench, B)
    assert granted(bench)[request].offset == -1
    bench.drop(result_of(task, 1))
    ask(bench, C)
    (effect,) = spills(bench)
    assert names(effect) == [result_of(task, 0)]


def test_a_worker_that_waits_for_room_and_dies_is_forgotten() -> None:
    bench = small_bench(2)
    bench.group(workers=1)
    put(bench, A, 2)
    bench.submit(bench.task_class(max_retries=0))
    (worker,) = bench.busy()
    packet = bench.read(worker)
    ask(bench, B, client=worker)
    (effect,) = spills(bench)
    bench.lose(worker, packet.sequence, 0)
    write(bench, effect)
    assert granted(bench) == {}
    assert statistics(bench).pending_allocations == 0
