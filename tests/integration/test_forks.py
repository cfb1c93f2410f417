"""Processes that a program forks by itself, beside and around a runtime."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import poolray
from poolray import Executor, Pool
from poolray.exceptions import PoolrayError
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    ScriptResult,
    announce_and_hold,
    assert_nothing_is_left_over,
    census,
    children_of,
    is_alive,
    own_pid,
    remote_hold,
    remote_successor,
    successor,
    wait_until,
)


def in_child(call: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
    """Run something in a fork of this process, which must succeed, and in time."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(int(timeout_s) - 2)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status: list[int] = []

    def has_ended() -> bool:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status.append(code)
        return ended == pid

    wait_until(has_ended, "the child's end", timeout_s)
    assert os.waitstatus_to_exitcode(status[-1]) == 0


def use_afresh() -> None:
    """All faces, as in a program that has just begun."""
    assert not poolray.is_initialized()
    with Pool(2) as pool, Executor(1) as executor:
        assert pool.map(successor, range(50), chunksize=1) == list(range(1, 51))
        assert executor.submit(successor, 1).result(DEADLINE_S) == 2
        assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2
    poolray.shutdown()
    assert not children_of(os.getpid())


def test_a_fork_uses_poolray_afresh_and_its_parent_goes_on() -> None:
    poolray.init(num_cpus=2)
    with Pool(2) as pool, Executor(2) as executor:
        pids = {pool.apply(own_pid), executor.submit(own_pid).result()}
        for number in range(3):
            in_child(use_afresh)
            assert pool.apply(successor, (number,)) == number + 1
            assert executor.submit(successor, number).result(DEADLINE_S) == number + 1
            assert poolray.get(remote_successor.remote(number), timeout=DEADLINE_S) == number + 1
        assert all(is_alive(pid) for pid in pids), "a child has ended its parent's workers"


def test_a_fork_that_does_nothing_disturbs_nobody() -> None:
    with Pool(2) as pool:
        results = [pool.apply_async(successor, (number,)) for number in range(2000)]
        in_child(lambda: None)
        assert [result.get(DEADLINE_S) for result in results] == list(range(1, 2001))


def test_a_fork_that_ends_as_a_program_does_disturbs_nobody(
    script: Callable[..., ScriptResult],
) -> None:
    """Without `os._exit`: exit handlers run, and finalizers of all that was inherited."""
    result = script(
        """
        import gc

        if __name__ == "__main__":
            poolray.init(num_cpus=2)
            pool, executor = Pool(2), Executor(2)
            result = pool.map_async(successor, range(5000), chunksize=1)
            futures = [executor.submit(successor, number) for number in range(100)]
            refs = [remote_successor.remote(number) for number in range(100)]
            pids = set(worker_pids())
            if os.fork() == 0:
                del result, futures, refs
                gc.collect()
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
            assert result.get(20) == list(range(1, 5001))
            assert [future.result(20) for future in futures] == list(range(1, 101))
            assert poolray.get(refs, timeout=20) == list(range(1, 101))
            assert pids <= set(worker_pids())
            print("undisturbed")
        """
    )
    assert result.lines() == ["undisturbed"]


def test_what_was_inherited_says_so_instead_of_hanging(started: Gate, release: Gate) -> None:
    """Each face of the parent says whose it is; what the parent waits for still comes to it."""
    poolray.init(num_cpus=1)
    with Pool(2) as pool, Executor(2) as executor:
        held = (started, release, 2)
        result = pool.apply_async(announce_and_hold, held)
        mapped = pool.map_async(partial(announce_and_hold, started, release), [2])
        iterator = pool.imap(partial(announce_and_hold, started, release), [2])
        future = executor.submit(announce_and_hold, *held)
        ref = remote_hold.remote(*held)
        for _ in range(4):
            started.wait()  # the iterator's call waits for a worker
        uses: dict[str, Callable[[], object]] = {
            "apply": lambda: pool.apply(successor, (1,)),
            "map": lambda: pool.map(successor, range(10)),
            "imap": lambda: next(pool.imap(successor, range(10))),
            "with": pool.__enter__,
            "submit": lambda: executor.submit(successor, 1).result(),
            "Executor.map": lambda: next(executor.map(successor, [1])),
            "pending result": result.get,
            "pending map": mapped.get,
            "pending iterator": lambda: next(iterator),
            "pending future": future.result,
            "exception of a future": future.exception,
            "ref": lambda: poolray.get(ref),
            "future of a ref": lambda: ref.future().result(),
            "wait": lambda: poolray.wait([ref]),
            "argument": lambda: remote_successor.remote(ref),
            "inside a value": lambda: poolray.put([ref]),
        }

        def use_inherited() -> None:
            for name, use in uses.items():
                with pytest.raises(
                    (PoolrayError, ValueError, RuntimeError),
                    match=r"parent process|another runtime",
                ):
                    use()
                    print(f"{name} worked with processes of the parent", file=sys.stderr)
            pool.close()
            pool.terminate()
            pool.join()
            executor.shutdown()
            poolray.shutdown()

        in_child(use_inherited)
        assert pool.apply_async(successor, (1,)).ready() is False
        release.open(count=8)
        assert result.get(DEADLINE_S) == future.result(DEADLINE_S) == 2
        assert mapped.get(DEADLINE_S) == [next(iterator)] == [2]
        assert poolray.get(ref, timeout=DEADLINE_S) == 2
        assert pool.apply(successor, (1,)) == 2


def test_values_got_before_a_fork_stay_readable_in_it() -> None:
    import numpy as np

    poolray.init(num_cpus=1)
    arrays = [poolray.get(poolray.put(np.arange(300_000)))]
    with Pool(1) as pool:
        arrays.append(pool.apply(np.arange, (300_000,)))

        def look() -> None:
            assert [array.sum() for array in arrays] == [sum(range(300_000))] * 2
            arrays[1][:] = 0

        in_child(look)
        assert [array.sum() for array in arrays] == [sum(range(300_000))] * 2
    arrays.clear()
    assert_nothing_is_left_over()


def run_in_process(queue: Any) -> None:
    try:
        use_afresh()
        queue.put("fine")
    except BaseException:
        queue.put(traceback.format_exc())


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_of_multiprocessing_use_poolray_afresh(start_method: str) -> None:
    context = multiprocessing.get_context(start_method)
    poolray.init(num_cpus=2)
    with Pool(2) as pool:
        queue = context.SimpleQueue()
        processes = [context.Process(target=run_in_process, args=(queue,)) for _ in range(2)]
        for process in processes:
            process.start()
        assert pool.map(successor, range(1000), chunksize=1) == list(range(1, 1001))
        assert [queue.get(), queue.get()] == ["fine", "fine"]
        for process in processes:
            process.join(DEADLINE_S)
            assert process.exitcode == 0
            process.close()
        queue.close()
        assert pool.apply(successor, (1,)) == 2


def test_a_process_with_a_pool_that_is_killed_takes_its_pool_along() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def live() -> None:
        with Pool(2) as pool:
            sender.send([process.pid for process in pool._pool])
            signal.pause()

    process = context.Process(target=live)
    process.start()
    pids = receiver.recv()
    process.kill()
    assert len(pids) == 2
    process.join(DEADLINE_S)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "the workers' end", 1)
    process.close()
    receiver.close()
    sender.close()


def test_forks_by_a_thread_while_others_submit_and_wait() -> None:
    """A fork may come at any moment of ours: no lock of ours may be needed in the child."""
    poolray.init(num_cpus=2)
    stop = threading.Event()
    errors: list[BaseException] = []
    with Pool(2) as pool, Executor(2) as executor:

        def keep_busy() -> None:
            try:
                while not stop.is_set():
                    assert pool.map(successor, range(50), chunksize=1)[-1] == 50
                    assert executor.submit(successor, 1).result(DEADLINE_S) == 2
                    assert poolray.get(remote_successor.remote(1), timeout=DEADLINE_S) == 2
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=keep_busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                in_child(use_afresh)
        finally:
            stop.set()
            for thread in threads:
                thread.join(DEADLINE_S)
    assert errors == []


def test_a_fork_after_shutdown_keeps_the_programs_files() -> None:
    """Numbers of descriptors that were ours belong to others afterwards."""
    for _ in range(3):
        with Pool(2) as pool:
            pool.apply(successor, (1,))
        poolray.shutdown()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]

    def look() -> None:
        for file in files:
            os.fstat(file)

    try:
        in_child(look)
    finally:
        for file in files:
            os.close(file)


def test_a_fork_has_none_of_its_parents_channels() -> None:
    """Else workers would not notice their driver's death while the child lives."""
    before = census().descriptors.count("socket")
    with Pool(3) as pool, Executor(2) as executor:
        pool.map(successor, range(10))
        list(executor.map(successor, range(10)))

        def look() -> None:
            assert census().descriptors.count("socket") == before

        in_child(look)


def test_an_interrupt_reaches_a_forked_child(script: Callable[..., ScriptResult]) -> None:
    result = script(
        """
        if __name__ == "__main__":
            with Pool(1) as pool:
                pool.apply(successor, (1,))
                pid = os.fork()
                if pid == 0:
                    try:
                        with Pool(1) as own:
                            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                            own.apply(signal.sigtimedwait, ([signal.SIGUSR1], 20))
                    except KeyboardInterrupt:
                        poolray.shutdown()
                        os._exit(5)
                    os._exit(1)
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pool.apply(successor, (1,)))
        """
    )
    assert result.lines() == ["5 2"]


def test_a_program_that_becomes_a_daemon_first_works(script: Callable[..., ScriptResult]) -> None:
    """Two forks and a new session, as daemons do, with a runtime before and one after."""
    result = script(
        """
        if __name__ == "__main__":
            reader, writer = os.pipe()
            with Pool(1) as pool:
                pool.apply(successor, (1,))
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    with Pool(2) as pool:
                        os.write(writer, str(pool.map(successor, range(3))).encode())
                    poolray.shutdown()
                    os._exit(0)
                os._exit(0)
            os.wait()
            os.close(writer)
            print(os.read(reader, 100).decode())
        """
    )
    assert result.lines() == ["[1, 2, 3]"]
