"""A store that is too small: values go to disk and come back, and nothing is lost or left."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray import Pool
from poolray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError
from poolray.local import session_folder, spilling
from poolray.local.session_folder import SessionFolders, sweep
from poolray.node.store_records import StoreStatistics
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    assert_nothing_is_left_over,
    statistics,
    wait_until,
)
from tests.integration.test_stress import killer

MIB = 1 << 20


def array_of(number: int, mib: int = 4) -> Any:
    """An array that tells by its content which one it is."""
    return np.full(mib * MIB // 8, number, dtype=np.int64)


def is_array_of(number: int, array: Any) -> bool:
    return bool(array[0] == number and array[-1] == number and (array == number).all())


@poolray.remote
def remote_array(number: int, mib: int = 4) -> Any:
    return array_of(number, mib)


@poolray.remote
def remote_numbers(*arrays: Any) -> list[int]:
    assert all(is_array_of(int(array[0]), array) for array in arrays)
    return [int(array[0]) for array in arrays]


@poolray.remote
def remote_puts(count: int) -> list[Any]:
    return [poolray.put(array_of(number)) for number in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "spill"
    made.mkdir()
    return made


@pytest.fixture
def small_store(folder: Path) -> None:
    poolray.init(num_cpus=2, object_store_memory=64 * MIB, object_spilling_directory=folder)


def store() -> StoreStatistics:
    return statistics().store


def files_in(folder: Path) -> list[Path]:
    """Files of values, in whatever folders runtimes have made."""
    return sorted(path for path in folder.glob("poolray-*/*") if path.name != "lock")


def nothing_is_written() -> bool:
    return store().spilling_objects == 0 and store().pending_allocations == 0


# --- more than there is room for ------------------------------------------------------------------


@pytest.mark.usefixtures("small_store")
def test_a_loop_that_puts_ten_times_the_capacity_keeps_every_value(folder: Path) -> None:
    refs = [poolray.put(array_of(number)) for number in range(160)]
    assert store().spilled_bytes > 500 * MIB
    for number, ref in enumerate(refs):
        assert is_array_of(number, poolray.get(ref))
    order = list(range(160))
    random.Random(1).shuffle(order)
    for number in order[:50]:
        assert is_array_of(number, poolray.get(refs[number]))
    assert store().restored_bytes > 0
    del ref
    refs.clear()
    assert_nothing_is_left_over()
    wait_until(lambda: not files_in(folder), "the end of all files")
    poolray.shutdown()
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("small_store")
def test_a_loop_that_drops_its_refs_spills_nothing_and_makes_no_folder(folder: Path) -> None:
    for number in range(100):
        assert is_array_of(number, poolray.get(poolray.put(array_of(number))))
    assert store().spilled_objects == 0
    assert statistics().arena.high_water_bytes < 20 * MIB
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("small_store")
def test_results_of_tasks_wait_for_room_too() -> None:
    refs = [remote_array.remote(number) for number in range(60)]
    for number, array in enumerate(poolray.get(refs, timeout=DEADLINE_S)):
        assert is_array_of(number, array)
    del array
    assert store().spilled_objects + store().objects_on_disk > 0


@pytest.mark.usefixtures("small_store")
def test_what_workers_put_waits_for_room_too() -> None:
    lists = [remote_puts.remote(10) for _ in range(4)]
    for refs in poolray.get(lists, timeout=DEADLINE_S):
        assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))


@pytest.mark.usefixtures("small_store")
def test_arguments_that_exceed_the_store_together_are_mapped_from_files() -> None:
    refs = [poolray.put(array_of(number)) for number in range(40)]
    assert poolray.get(remote_numbers.remote(*refs), timeout=DEADLINE_S) == list(range(40))
    made = [remote_array.remote(number) for number in range(40)]
    assert poolray.get(remote_numbers.remote(*made), timeout=DEADLINE_S) == list(range(40))


@pytest.mark.usefixtures("small_store")
def test_a_value_larger_than_the_store_goes_to_a_file(folder: Path) -> None:
    ref = poolray.put(array_of(7, 100))
    assert len(files_in(folder)) == 1
    assert is_array_of(7, poolray.get(ref))
    assert is_array_of(8, poolray.get(remote_array.remote(8, 100), timeout=DEADLINE_S))
    assert poolray.get(remote_numbers.remote(ref), timeout=DEADLINE_S) == [7]


@pytest.mark.usefixtures("small_store")
def test_arrays_outlive_their_refs_under_pressure() -> None:
    arrays = [poolray.get(poolray.put(array_of(number))) for number in range(10)]
    refs = [poolray.put(array_of(number)) for number in range(30)]
    assert all(is_array_of(number, array) for number, array in enumerate(arrays))
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))
    assert all(is_array_of(number, array) for number, array in enumerate(arrays))


@pytest.mark.usefixtures("small_store")
def test_an_array_that_was_read_and_dropped_makes_way_although_its_ref_lives() -> None:
    refs = [poolray.put(array_of(number)) for number in range(10)]
    for ref in refs:
        poolray.get(ref)
    del ref
    more = [poolray.put(array_of(number)) for number in range(16)]
    wait_until(nothing_is_written)
    assert store().pinned_objects == 0
    assert store().spilled_objects >= 10
    assert len(more) == 16


@pytest.mark.usefixtures("small_store")
def test_results_of_a_pool_that_exceed_the_store_all_arrive() -> None:
    with Pool(2) as pool:
        arrays = pool.map(array_of, range(30), chunksize=1)
        assert all(is_array_of(number, array) for number, array in enumerate(arrays))
        arrays[3][:] = 5  # they are the caller's own
        sums = pool.map(np.sum, arrays, chunksize=1)
        assert sums[4] == 4 * len(arrays[4])
        assert sums[3] == 5 * len(arrays[3])


def test_small_values_share_files(folder: Path) -> None:
    poolray.init(num_cpus=1, object_store_memory=64 * MIB, object_spilling_directory=folder)
    refs = [poolray.put(array_of(number, 1)) for number in range(150)]
    wait_until(nothing_is_written)
    assert store().spilled_objects >= 80
    assert store().files * 3 < store().spilled_objects
    assert is_array_of(0, poolray.get(refs[0]))


def test_several_folders_take_turns(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    poolray.init(
        num_cpus=1,
        object_store_memory=32 * MIB,
        object_spilling_directory=[os.fspath(folder) for folder in folders],
    )
    refs = [poolray.put(array_of(number)) for number in range(30)]
    wait_until(nothing_is_written)
    assert all(len(files_in(folder)) > 3 for folder in folders)
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))
    poolray.shutdown()
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


# --- while it waits -------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    event = threading.Event()
    write = spilling.write_objects

    def write_later(*arguments: Any) -> Any:
        event.wait()
        return write(*arguments)

    monkeypatch.setattr(spilling, "write_objects", write_later)
    yield event
    event.set()


@pytest.mark.usefixtures("small_store")
def test_ctrl_c_ends_a_put_that_waits_for_room(slow_disk: threading.Event) -> None:
    refs = [poolray.put(array_of(number, 15)) for number in range(4)]

    def interrupt() -> None:
        wait_until(lambda: store().pending_allocations == 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        poolray.put(array_of(9, 15))
    thread.join()
    assert store().pending_allocations == 0
    slow_disk.set()
    ref = poolray.put(array_of(9, 15))
    assert is_array_of(9, poolray.get(ref))
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))
    del ref
    refs.clear()
    assert_nothing_is_left_over()


@pytest.mark.usefixtures("small_store")
def test_tasks_go_on_while_a_put_waits_for_room(
    slow_disk: threading.Event, started: Gate, release: Gate
) -> None:
    refs = [poolray.put(array_of(number, 15)) for number in range(4)]
    done = remote_small.remote(started, release)
    started.wait()

    def let_go() -> None:
        wait_until(lambda: store().pending_allocations == 1)
        release.open()
        poolray.get(done, timeout=DEADLINE_S)
        slow_disk.set()

    thread = threading.Thread(target=let_go)
    thread.start()
    refs.append(poolray.put(array_of(4, 15)))
    thread.join()
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))


@poolray.remote
def remote_small(started: Gate, release: Gate) -> int:
    started.open()
    release.wait()
    return 1


@pytest.mark.usefixtures("small_store", "slow_disk")
def test_a_worker_that_dies_while_it_waits_for_room_leaves_nothing() -> None:
    refs = [poolray.put(array_of(number, 15)) for number in range(4)]
    pending = remote_array.options(max_retries=0).remote(1, 15)
    wait_until(lambda: store().pending_allocations == 1)
    (worker,) = [
        w for w in poolray.local.runtime.current().node.state.workers.values() if w.packets
    ]  # type: ignore[union-attr, attr-defined]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(poolray.exceptions.WorkerCrashedError):
        poolray.get(pending, timeout=DEADLINE_S)
    assert store().pending_allocations == 0
    assert len(refs) == 4


@pytest.mark.usefixtures("small_store", "slow_disk")
def test_an_end_while_files_are_written_is_an_end(slow_disk: threading.Event) -> None:
    refs = [poolray.put(array_of(number, 15)) for number in range(4)]
    wait_until(lambda: store().spilling_objects > 0)
    threading.Timer(0.1, slow_disk.set).start()
    poolray.shutdown()
    assert len(refs) == 4


# --- disks that fail ------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", os.fspath(mount)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield mount
    poolray.shutdown()
    subprocess.run(["umount", os.fspath(mount)], check=True)


@pytest.mark.filterwarnings("ignore:Objects cannot be spilled:RuntimeWarning")
def test_a_full_disk_is_an_error_only_when_memory_is_full_too(tiny_disk: Path) -> None:
    poolray.init(
        num_cpus=1,
        object_store_memory=32 * MIB,
        object_spilling_directory=tiny_disk,
        spill_retry_s=0.0,
    )
    refs = []
    with pytest.raises(OutOfDiskError, match="object_spilling_directory"):
        for number in range(40):
            refs.append(poolray.put(array_of(number)))
    assert len(refs) >= 8
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))
    del refs[:6]
    gc.collect()
    ref = poolray.put(array_of(99))
    assert is_array_of(99, poolray.get(ref))


def test_a_full_disk_is_told_as_a_warning(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spilling, "write_objects", fail)
    poolray.init(num_cpus=1, object_store_memory=32 * MIB, object_spilling_directory=folder)
    with pytest.warns(RuntimeWarning, match="No space left on device"):  # noqa: PT031 - the
        # warning comes with whatever the runtime hands over next.
        refs = [poolray.put(array_of(number)) for number in range(10)]
        wait_until(nothing_is_written)
        poolray.get(remote_numbers.remote(), timeout=DEADLINE_S)
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))


def test_the_share_of_the_disk_is_a_limit(folder: Path) -> None:
    poolray.init(
        num_cpus=1,
        object_store_memory=32 * MIB,
        object_spilling_directory=folder,
        object_spilling_max_bytes=20 * MIB,
    )
    refs = []
    with pytest.raises(OutOfDiskError, match="object_spilling_max_bytes") as caught:
        for number in range(40):
            refs.append(poolray.put(array_of(number)))
    assert isinstance(caught.value, ObjectStoreFullError)
    assert 8 <= len(refs) <= 14
    assert sum(path.stat().st_size for path in files_in(folder)) <= 21 * MIB
    assert all(is_array_of(n, poolray.get(ref)) for n, ref in enumerate(refs))


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.usefixtures("small_store")
@pytest.mark.parametrize("harm", [damage, cut_short, Path.unlink])
@pytest.mark.parametrize("reader", ["get", "task", "get without room"])
def test_a_damaged_file_is_an_error_that_names_file_and_object(
    harm: Callable[[Path], None], reader: str, folder: Path
) -> None:
    refs = [poolray.put(array_of(number, 15)) for number in range(8)]
    wait_until(nothing_is_written)
    for path in files_in(folder):
        harm(path)
    if reader == "get without room":
        # What is looked at cannot make way for what is read.
        kept = [poolray.get(ref) for ref in refs[-1:]]
        kept += [poolray.get(poolray.put(array_of(9, 15))) for _ in range(3)]
    reading = remote_numbers.remote(refs[0]) if reader == "task" else refs[0]
    with pytest.raises(ObjectLostError, match=r"its file .*poolray-.*spilled-") as caught:
        poolray.get(reading, timeout=DEADLINE_S)
    assert caught.value.object_id == refs[0].hex()
    assert is_array_of(7, poolray.get(refs[7])), "what is in memory is well"


# --- storage behind a URL -------------------------------------------------------------------------


def test_values_go_to_a_url_and_come_back_to_whoever_reads_them(folder: Path) -> None:
    poolray.init(
        num_cpus=2, object_store_memory=64 * MIB, object_spilling_directory=f"file://{folder}"
    )
    refs = [poolray.put(array_of(number)) for number in range(40)]
    assert store().spilled_bytes > 50 * MIB
    assert files_in(folder)
    for number, ref in enumerate(refs):
        assert is_array_of(number, poolray.get(ref))
    assert poolray.get(remote_numbers.remote(*refs), timeout=DEADLINE_S) == list(range(40))
    del ref
    refs.clear()
    assert_nothing_is_left_over()
    wait_until(lambda: not files_in(folder), "the end of all files")
    poolray.shutdown()
    assert list(folder.iterdir()) == []


def test_a_value_larger_than_the_store_goes_to_a_url(folder: Path) -> None:
    poolray.init(
        num_cpus=1, object_store_memory=16 * MIB, object_spilling_directory=f"file://{folder}"
    )
    value = np.arange(4 * MIB)
    assert np.array_equal(poolray.get(poolray.put(value)), value)


def test_a_file_that_is_gone_from_a_url_is_an_error_that_names_it(folder: Path) -> None:
    poolray.init(
        num_cpus=1, object_store_memory=16 * MIB, object_spilling_directory=f"file://{folder}"
    )
    ref = poolray.put(np.arange(4 * MIB))
    (file,) = files_in(folder)
    file.unlink()
    with pytest.raises(poolray.exceptions.ObjectLostError, match=f"file://.*{file.name} is gone"):
        poolray.get(ref)


def test_what_a_killed_runtime_has_left_at_a_url_is_removed_by_the_next_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    url = f"file://{folder}"
    dead = SessionFolders([url], "1-aa")
    (remote,) = dead.next_folders()
    (folder / remote.rpartition("/")[2] / "spilled-1").write_bytes(b"values")
    sweep([url])
    assert list(folder.iterdir()), "its owner lives"
    dead.abandon()  # as the end of its process does
    sweep([url])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", ["memory://spilled", "nothing-knows-this://x", "file:///proc/x"])
def test_a_url_that_cannot_be_used_is_refused_by_init(url: str) -> None:
    with pytest.raises(ValueError, match=f"object_spilling_directory {url}"):
        poolray.init(num_cpus=1, object_spilling_directory=url)
    assert not poolray.is_initialized()


# --- what init refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "directory",
    ["", [], "s3://bucket/spilled", "/proc/nowhere/spilled", "/dev/null/spilled"],
)
def test_a_folder_that_cannot_be_used_is_refused_by_init(directory: Any) -> None:
    with pytest.raises(ValueError, match="object_spilling_directory"):
        poolray.init(num_cpus=1, object_spilling_directory=directory)
    assert not poolray.is_initialized()


@pytest.mark.parametrize("capacity", [-1, 0, 4096, 1 << 60])
def test_an_absurd_capacity_is_refused_by_init(capacity: int) -> None:
    with pytest.raises(ValueError, match=r"object store memory|object_store_memory"):
        poolray.init(num_cpus=1, object_store_memory=capacity)
    assert not poolray.is_initialized()


# --- folders --------------------------------------------------------------------------------------


def test_folders_of_the_living_are_left_alone_and_those_of_the_dead_removed(
    tmp_path: Path,
) -> None:
    living = SessionFolders([os.fspath(tmp_path)], "1-aa")
    (folder,) = living.next_folders()
    dead = tmp_path / "poolray-2-bb-0"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "spilled-1").write_bytes(b"value")
    being_made = tmp_path / "poolray-3-cc-0"
    being_made.mkdir()
    forgotten = tmp_path / "poolray-4-dd-0"
    forgotten.mkdir()
    os.utime(forgotten, (1, 1))
    strange = tmp_path / "poolray-notes.txt"
    strange.touch()
    others = tmp_path / "poolray-of-somebody-else"
    others.mkdir()
    os.utime(others, (1, 1))
    sweep([os.fspath(tmp_path), os.fspath(tmp_path / "nowhere")])
    assert set(tmp_path.iterdir()) == {Path(folder), being_made, strange, others}
    living.remove()
    assert not Path(folder).exists()


def test_a_folder_that_somebody_else_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "poolray-2-bb-0"
    dead.mkdir()
    (dead / "lock").touch()
    monkeypatch.setattr(os, "listdir", lambda _: ["poolray-1-aa-0", "poolray-2-bb-0"])
    sweep([os.fspath(tmp_path)])
    assert not dead.exists()


def test_a_folder_that_is_swept_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = SessionFolders([os.fspath(tmp_path)], "1-aa")
    swept: list[bool] = []

    def flock_late(descriptor: int, operation: int) -> None:
        if not swept and operation == fcntl.LOCK_EX:
            swept.append(True)
            sweep([os.fspath(tmp_path)])
        fcntl.flock(descriptor, operation)

    class Racing:
        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB
        flock = staticmethod(flock_late)

    monkeypatch.setattr(session_folder, "fcntl", Racing)
    (folder,) = folders.next_folders()
    assert swept
    assert (Path(folder) / "lock").exists()
    sweep([os.fspath(tmp_path)])
    assert Path(folder).exists()
    folders.remove()


# --- torture --------------------------------------------------------------------------------------

TORTURE_S = float(os.environ.get("POOLRAY_TORTURE_S", "4"))


@poolray.remote(max_retries=-1)
def remote_mix(seed: int, *arrays: Any) -> tuple[Any, int]:
    """Random bytes that depend on the seed and on all of the arguments."""
    for array in arrays:
        assert zlib.crc32(array[:-8]) == int.from_bytes(array[-8:].tobytes(), "little")
    return signed(seed)


def signed(seed: int) -> Any:
    """Random bytes that end with their own checksum."""
    generator = np.random.default_rng(abs(seed))
    data = generator.integers(0, 256, int(generator.integers(100_000, 6_000_000)), dtype=np.uint8)
    check = zlib.crc32(data).to_bytes(8, "little")
    return np.concatenate([data, np.frombuffer(check, dtype=np.uint8)])


def is_whole(array: Any) -> bool:
    return zlib.crc32(array[:-8]) == int.from_bytes(array[-8:].tobytes(), "little")


@pytest.mark.timeout(120 + 10 * TORTURE_S)
@pytest.mark.usefixtures("small_store")
def test_nothing_is_lost_or_torn_while_workers_are_killed_and_memory_is_short() -> None:
    choice = random.Random(11)
    refs = [poolray.put(signed(-1 - number)) for number in range(25)]
    views: list[Any] = []
    chosen: list[Any] = []
    with Pool(2) as pool, killer(0.3):
        end = time.monotonic() + TORTURE_S
        step = 0
        while time.monotonic() < end or step < 60:
            step += 1
            kind = choice.randrange(6)
            if kind == 0:
                refs.append(poolray.put(signed(step)))
            elif kind in (1, 2):
                chosen = choice.sample(refs, min(len(refs), choice.randrange(4)))
                refs.append(remote_mix.remote(step, *chosen))
            elif kind == 3 and refs:
                array = poolray.get(choice.choice(refs), timeout=DEADLINE_S)
                assert is_whole(array)
                views.append(array)
                del array
            elif kind == 4:
                assert all(is_whole(a) for a in pool.map(signed, range(step, step + 4), 1))
            else:
                refs = choice.sample(refs, min(len(refs), 40))
                views = choice.sample(views, min(len(views), 8))
            assert all(is_whole(array) for array in views[-2:])
        assert all(is_whole(array) for array in views)
        for ref in refs:
            assert is_whole(poolray.get(ref, timeout=DEADLINE_S))
    assert store().spilled_objects > 0
    del ref, chosen
    refs.clear()
    views.clear()
    assert_nothing_is_left_over()
