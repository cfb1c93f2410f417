"""What is taken is given back: processes, descriptors, threads, memory, references, files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import poolray
from poolray import Executor, Pool
from poolray.local.session_folder import sweep
from tests.integration.support import (
    DEADLINE_S,
    Census,
    Gate,
    Script,
    ScriptResult,
    announce_and_hold,
    assert_nothing_is_left_over,
    census,
    remote_successor,
    statistics,
    successor,
    wait_until,
)

# --- again and again -----------------------------------------------------------------------------


def init_and_shutdown() -> None:
    poolray.init(num_cpus=2)
    assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2
    assert poolray.get(poolray.put(np.ones(50_000))).sum() == 50_000
    poolray.shutdown()


def pool_and_shutdown() -> None:
    pool = Pool(2)
    assert pool.map(successor, range(10)) == list(range(1, 11))
    poolray.shutdown()


def executor_and_shutdown() -> None:
    with Executor(2) as executor:
        assert list(executor.map(successor, range(10))) == list(range(1, 11))
    poolray.shutdown()


def all_faces_with_work_under_way() -> None:
    poolray.init(num_cpus=2)
    pool, executor = Pool(2), Executor(2)
    results = [pool.apply_async(successor, (number,)) for number in range(300)]
    futures = [executor.submit(successor, number) for number in range(300)]
    refs = [remote_successor.remote(number) for number in range(300)]
    poolray.shutdown()
    del results, futures, refs


def memory_bytes() -> int:
    """What is this process's own, apart from pages that it shares or that the allocator keeps."""
    with contextlib.suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


#: Repetitions in a batch, and what all of them together may keep.
BATCH = 50
BATCH_KEEPS_BYTES = 750_000
#: The allocator's arenas fill in the first hundred repetitions, and in the first batches alone.
BATCHES_MAX = 6


def assert_repetition_keeps_nothing(once: Callable[[], None], settle: Callable[[], None]) -> None:
    """Repeat until a batch adds next to nothing to memory; a leak shows in every batch."""
    for _ in range(10):
        once()  # caches and lazy imports fill
    settle()
    gc.collect()
    before = census()
    growths: list[int] = []
    while not growths or growths[-1] >= BATCH_KEEPS_BYTES:
        assert len(growths) < BATCHES_MAX, f"each {BATCH} repetitions keep {growths} bytes"
        memory = memory_bytes()
        for _ in range(BATCH):
            once()
        settle()
        gc.collect()
        growths.append(memory_bytes() - memory)
    assert_same(before, census())


def assert_same(before: Census, after: Census) -> None:
    assert after.children == before.children
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.arenas == before.arenas
    assert after.shared_memory == before.shared_memory


@pytest.mark.parametrize(
    "once",
    [
        init_and_shutdown,
        pool_and_shutdown,
        executor_and_shutdown,
        all_faces_with_work_under_way,
    ],
)
@pytest.mark.timeout(300)
def test_fifty_runtimes_one_after_another_leave_nothing(once: Callable[[], None]) -> None:
    assert_repetition_keeps_nothing(once, settle=poolray.shutdown)


def test_a_leak_of_a_few_pages_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the tests above: 30 kB at each repetition are too much."""
    monkeypatch.setattr(sys.modules[__name__], "census", lambda: None)
    monkeypatch.setattr(sys.modules[__name__], "assert_same", lambda before, after: None)
    kept: list[bytes] = []
    with pytest.raises(AssertionError, match="repetitions keep"):
        assert_repetition_keeps_nothing(
            lambda: kept.append(os.urandom(30_000)), settle=lambda: None
        )
    assert_repetition_keeps_nothing(lambda: None, settle=lambda: None)


def pool_that_is_terminated() -> None:
    with Pool(2) as pool:
        assert pool.map(successor, range(100), chunksize=1)[-1] == 100


def pool_that_is_closed() -> None:
    pool = Pool(2)
    result = pool.map_async(successor, range(100), chunksize=1)
    pool.close()
    pool.join()
    assert result.get(DEADLINE_S)[-1] == 100


def pool_that_is_dropped() -> None:
    pool = Pool(1)
    assert pool.apply(successor, (1,)) == 2
    with pytest.warns(ResourceWarning):  # noqa: PT031 - the finalizer may need the collection
        del pool
        gc.collect()


def executor_that_is_dropped() -> None:
    executor = Executor(1)
    assert executor.submit(successor, 1).result(DEADLINE_S) == 2
    del executor
    gc.collect()


def executor_that_is_left() -> None:
    with Executor(2) as executor:
        executor.submit(successor, 1)


@pytest.mark.parametrize(
    "once",
    [
        pool_that_is_terminated,
        pool_that_is_closed,
        pool_that_is_dropped,
        executor_that_is_dropped,
        executor_that_is_left,
    ],
)
@pytest.mark.timeout(300)
def test_fifty_groups_in_one_runtime_leave_nothing(once: Callable[[], None]) -> None:
    poolray.init(num_cpus=1)
    assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2

    def wait_for_ends() -> None:
        wait_until(lambda: bool(statistics().groups == 1))

    once()
    wait_for_ends()
    before = statistics()
    assert_repetition_keeps_nothing(once, settle=wait_for_ends)
    after = statistics()
    assert after.functions <= before.functions
    assert after.workers <= before.workers
    assert_nothing_is_left_over()


def test_an_end_in_the_middle_of_calls_keeps_no_result_and_no_memory(
    started: Gate, release: Gate
) -> None:
    """Values that arrive after a pool's end, or never, occupy nothing."""
    poolray.init(num_cpus=1)
    for _ in range(10):
        pool = Pool(2)
        large = pool.map_async(np.ones, [200_000] * 20, chunksize=1)
        held = pool.apply_async(announce_and_hold, (started, release))
        given = pool.map_async(np.sum, [np.ones(50_000)] * 20, chunksize=1)
        pool.terminate()
        pool.join()
        del large, held, given
    assert_nothing_is_left_over()


# --- references ----------------------------------------------------------------------------------


@poolray.remote
def remote_ones(length: int) -> Any:
    return np.ones(length)


@poolray.remote
def remote_sum(*arrays: Any) -> float:
    return float(sum(array.sum() for array in arrays))


@poolray.remote
def remote_nested_refs(count: int) -> list[Any]:
    return [poolray.put(np.full(30_000, number)) for number in range(count)]


@poolray.remote(num_returns=3)
def remote_three(length: int) -> tuple[Any, Any, Any]:
    return np.ones(length), "small", [poolray.put(1)]


@poolray.remote
def remote_fail(array: Any) -> None:
    raise ValueError("on purpose", array.sum())


@poolray.remote
def remote_keep(refs: list[Any], seconds: float) -> Any:
    """A borrowed ref that is used after its owner has let go."""
    poolray.wait([remote_successor.remote(1)], timeout=seconds)
    return poolray.get(refs[0]).sum()


def test_references_of_all_kinds_are_given_back() -> None:
    poolray.init(num_cpus=2)
    for _ in range(5):
        array = poolray.put(np.ones(50_000))
        first = remote_ones.remote(50_000)
        total = remote_sum.remote(array, first, remote_ones.remote(50_000))
        nested = poolray.get(remote_nested_refs.remote(5), timeout=DEADLINE_S)
        assert [poolray.get(ref)[0] for ref in nested] == [0, 1, 2, 3, 4]
        three = remote_three.remote(50_000)
        failed = remote_fail.remote(array)
        with pytest.raises(ValueError, match="on purpose"):
            poolray.get(failed, timeout=DEADLINE_S)
        kept = remote_keep.remote([poolray.put(np.ones(50_000))], 0.01)
        assert poolray.get(total, timeout=DEADLINE_S) == 150_000
        assert poolray.get(three, timeout=DEADLINE_S)[1] == "small"
        assert poolray.get(kept, timeout=DEADLINE_S) == 50_000
        never_read = [remote_ones.remote(50_000) for _ in range(10)]
        del array, first, total, nested, three, failed, kept, never_read
    sys.exc_info()
    assert_nothing_is_left_over()


def test_views_keep_their_memory_and_nothing_else_does() -> None:
    poolray.init(num_cpus=1)
    ref = remote_ones.remote(200_000)
    array = poolray.get(ref, timeout=DEADLINE_S)
    part = array[1000:2000]
    del ref, array
    gc.collect()
    poolray.get(poolray.put(0))
    assert statistics().arena.used_bytes >= 1_600_000
    assert part.sum() == 1000
    del part
    assert_nothing_is_left_over()


@pytest.mark.parametrize("face", ["Pool", "Executor", "tasks"])
def test_large_results_give_their_memory_back_without_a_garbage_collection(face: str) -> None:
    poolray.init(num_cpus=2)
    gc.collect()
    gc.disable()
    try:
        with Pool(2) as pool, Executor(2) as executor:
            for _ in range(5):
                if face == "Pool":
                    results = pool.map(np.ones, [100_000] * 6, chunksize=1)
                    results += list(pool.imap(np.ones, [100_000] * 6))
                    results += [pool.apply(np.ones, (100_000,))]
                elif face == "Executor":
                    results = list(executor.map(np.ones, [100_000] * 6))
                    results += [executor.submit(np.ones, 100_000).result(DEADLINE_S)]
                else:
                    results = poolray.get([remote_ones.remote(100_000) for _ in range(6)])
                assert sum(result.sum() for result in results) == 100_000 * len(results)
                results.clear()

                def is_free() -> bool:
                    poolray.get(poolray.put(0))
                    return bool(statistics().arena.used_bytes == 0)

                wait_until(is_free, timeout_s=5)
    finally:
        gc.enable()


def test_small_calls_keep_nothing() -> None:
    """Memory of a driver that makes many calls stays where it is."""
    poolray.init(num_cpus=2)
    with Pool(2) as pool, Executor(2) as executor:

        def once() -> None:
            assert pool.map(successor, range(5000), chunksize=1)[-1] == 5000
            assert sum(1 for _ in pool.imap_unordered(successor, range(5000))) == 5000
            assert [executor.submit(successor, n) for n in range(3000)][-1].result() == 3000
            refs = [remote_successor.remote(number) for number in range(3000)]
            assert poolray.get(refs)[-1] == 3000

        for _ in range(3):
            once()
        gc.collect()
        before = memory_bytes()
        for _ in range(5):
            once()
        gc.collect()
        assert memory_bytes() - before < 3_000_000


@pytest.mark.timeout(180)
def test_lambdas_without_end_do_not_fill_anything() -> None:
    """Each is a function of its own: made known, used, forgotten by all who knew it."""
    with Pool(1) as pool:

        def use(count: int) -> None:
            for number in range(count):
                assert pool.apply(lambda x: x + number, (1,)) == number + 1  # noqa: B023
                assert statistics().functions < 600

        use(700)
        gc.collect()
        here, there = memory_bytes(), pool.apply(memory_bytes)
        use(2000)
        gc.collect()
        assert memory_bytes() - here < 2_000_000
        assert pool.apply(memory_bytes) - there < 2_000_000
    gc.collect()
    with Pool(1) as pool:
        assert pool.apply(successor, (1,)) == 2
        assert statistics().functions < 300


def test_remote_lambdas_without_end_do_not_fill_anything() -> None:
    poolray.init(num_cpus=1)
    for number in range(1000):
        chosen = poolray.remote(lambda number=number: number)
        assert poolray.get(chosen.remote()) == number
        assert statistics().functions < 300
    again = poolray.remote(lambda: "again")
    refs = [again.remote()]
    for number in range(600):
        refs.append(poolray.remote(lambda number=number: number).remote())
    refs.append(again.remote())
    assert poolray.get(refs) == ["again", *range(600), "again"]


@poolray.remote
def remote_many_lambdas(count: int) -> list[int]:
    return [poolray.get(poolray.remote(lambda n=n: n).remote()) for n in range(count)]


def test_lambdas_without_end_in_a_worker_do_not_fill_anything() -> None:
    poolray.init(num_cpus=2)
    assert poolray.get(remote_many_lambdas.remote(600), timeout=DEADLINE_S) == list(range(600))
    assert statistics().functions < 300


def test_large_functions_without_end_give_their_memory_back() -> None:
    """Their code travels through the store, and is there as long as the node knows them."""
    with Pool(1) as pool:
        for number in range(1200):
            data = number.to_bytes(4, "big") * 20_000
            assert pool.apply(lambda data=data: data[:4]) == data[:4]
            assert statistics().arena.used_bytes < 600 * 85_000


# --- programs that end ---------------------------------------------------------------------------

ENDINGS = {
    "falling off the end": "",
    "sys.exit": "sys.exit(0)",
    "shutdown": "poolray.shutdown()",
    "exit in a thread": "threading.Thread(target=sys.exit).start()",
    "os._exit": "sys.stdout.flush(); os._exit(0)",
    "killed": "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)",
    "exec": "sys.stdout.flush(); os.execv('/bin/true', ['true'])",
}
STATES = {
    "idle": "",
    "results nobody took": "kept = [pool.apply_async(numpy.ones, (100_000,)) for _ in range(9)]",
    "calls under way": "kept = [pool.apply_async(time.sleep, (60,)) for _ in range(9)]",
    "objects": "kept = [poolray.put(numpy.ones(100_000)) for _ in range(9)]",
    "a full store": "kept = [poolray.put(numpy.ones(3_000_000)) for _ in range(9)]",
    "an iterator half read": "kept = pool.imap(successor, iter(range(10**6))); next(kept)",
    "an unfinished executor": "kept = Executor(2).submit(successor, 1)",
}

PROGRAM = """
    import numpy

    if __name__ == "__main__":
        poolray.init(num_cpus=1, object_store_memory=128 << 20)
        pool = Pool(2)
        pool.apply(successor, (1,))
        poolray.get(remote_successor.remote(1))
        {state}
        print("end of the program", flush=True)
        {ending}
"""


def processes_marked(mark: str) -> list[psutil.Process]:
    """All living processes with this word in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get("POOLRAY_TEST_MARK") == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("state", STATES)
def test_a_program_that_ends_without_shutdown_leaves_nothing(
    state: str, ending: str, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    shared_memory = census().shared_memory
    body = PROGRAM.format(state=STATES[state], ending=ENDINGS[ending])
    environment = {"POOLRAY_TEST_MARK": mark}
    with Script(tmp_path / "script.py", body, environment=environment) as script:
        assert script.read_line() == "end of the program"
        wait_until(lambda: not processes_marked(mark), "the end of all processes", 10)
        result = script.finish()
    assert result.exit_code == (-signal.SIGKILL if ending == "killed" else 0), result
    assert "Traceback" not in result.stderr
    if state == "a full store" and ending in ("killed", "os._exit", "exec"):
        # Nobody was left who could have removed its files; the next runtime does, as it starts.
        (left,) = left_in(tmp_path) - {"script.py"}
        assert left.startswith("poolray-")
        sweep([str(tmp_path)])
    assert left_in(tmp_path) == {"script.py"}
    assert census().shared_memory == shared_memory


def test_files_of_a_killed_program_are_cleared_by_the_next_one(tmp_path: Path) -> None:
    """A killed driver cannot remove its overflow files; whoever comes next does."""
    body = PROGRAM.format(state=STATES["a full store"], ending=ENDINGS["killed"])
    with Script(tmp_path / "script.py", body) as script:
        script.finish()
    body = PROGRAM.format(state=STATES["a full store"], ending="")
    with Script(tmp_path / "script.py", body) as script:
        assert script.finish().exit_code == 0
    assert left_in(tmp_path) == {"script.py"}


def test_warnings_about_resources_are_not_earned(script: Callable[..., ScriptResult]) -> None:
    """With all warnings on: no unclosed socket or file, no finalizer that fails."""
    result = script(
        """
        if __name__ == "__main__":
            poolray.init(num_cpus=1)
            with Pool(2) as pool, Executor(2) as executor:
                pool.map(successor, range(10))
                executor.submit(successor, 1).result()
                poolray.get(remote_successor.remote(1))
            poolray.shutdown()
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""


def test_nothing_of_ours_is_open_in_programs_that_tasks_start() -> None:
    """Descriptors are closed at exec: a daemon that a task starts holds no channel."""
    with Pool(1) as pool:
        found = pool.apply(descriptors_of_a_program)
    assert set(found) <= {"0", "1", "2", "3"}, found


def descriptors_of_a_program() -> list[str]:
    import subprocess

    code = "import os; print(*os.listdir('/proc/self/fd'))"
    done = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_nothing_of_ours_is_open_in_programs_that_the_driver_starts() -> None:
    before = len(descriptors_of_a_program())
    with Pool(2) as pool:
        pool.map(successor, range(10))
        assert len(descriptors_of_a_program()) == before
