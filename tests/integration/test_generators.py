"""Generators with real processes: kills, memory, signals, ends; nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import poolray
from tests.integration.support import DEADLINE_S, Gate, statistics, wait_until

MEBIBYTE = 1 << 20


@poolray.remote
def count(n: int) -> Iterator[int]:
    yield from range(n)


@poolray.remote
def arrays(n: int, size_bytes: int = MEBIBYTE) -> Iterator[Any]:
    for number in range(n):
        yield np.full(size_bytes // 8, number)


@poolray.remote
def pids(gate: Gate, n: int) -> Iterator[int]:
    """Yields its process's number; before the last time it waits for the gate."""
    for number in range(n):
        if number == n - 1:
            gate.wait()
        yield os.getpid()


def used_bytes() -> int:
    return statistics().arena.used_bytes


def wait_until_empty() -> None:
    """Until the node has nothing of ours: no object, no stream, no memory."""
    gc.collect()

    def is_empty() -> bool:
        found = statistics()
        return (found.objects, found.streams, found.arena.used_bytes) == (0, 0, 0)

    wait_until(is_empty, "an empty store")


def test_memory_of_items_is_given_back_with_their_refs() -> None:
    poolray.init(num_cpus=1)
    total = 0
    for ref in arrays.remote(40):
        total += int(poolray.get(ref)[0])
        del ref
    assert total == sum(range(40))
    wait_until_empty()


def test_memory_of_items_that_nobody_took_is_given_back() -> None:
    poolray.init(num_cpus=1)
    generator = arrays.remote(10)
    poolray.get(generator.completed())
    assert used_bytes() >= 10 * MEBIBYTE
    first = next(generator)
    del generator
    wait_until(lambda: used_bytes() < 2 * MEBIBYTE)
    assert poolray.get(first)[0] == 0
    del first
    wait_until_empty()


def test_the_list_of_memory_says_that_items_wait() -> None:
    poolray.init(num_cpus=1)
    generator = arrays.remote(2)
    poolray.get(generator.completed())
    assert poolray.util.memory.memory_summary().count("WAITING_IN_STREAM") == 2
    assert len(list(generator)) == 2
    assert "nobody" not in poolray.util.memory.memory_summary()


def test_a_limit_keeps_the_memory_of_a_fast_generator_small() -> None:
    poolray.init(num_cpus=1)
    limited = arrays.options(_generator_backpressure_num_objects=2)
    most = 0
    for number, ref in enumerate(limited.remote(30)):
        assert poolray.get(ref)[0] == number
        del ref
        most = max(most, used_bytes())
    assert most <= 6 * MEBIBYTE


def test_items_that_memory_has_no_room_for_go_to_disk() -> None:
    poolray.init(num_cpus=1, object_store_memory=8 * MEBIBYTE)
    generator = arrays.remote(24)
    poolray.get(generator.completed())
    assert [int(poolray.get(ref)[0]) for ref in generator] == list(range(24))
    del generator
    wait_until_empty()


def test_a_killed_workers_stream_goes_on_in_another(gates: Callable[[str], Gate]) -> None:
    poolray.init(num_cpus=1)
    gate = gates("last")
    generator = pids.options(max_retries=1).remote(gate, 4)
    first = [poolray.get(next(generator)) for _ in range(3)]
    os.kill(first[0], signal.SIGKILL)
    gate.open(2)
    (last,) = [poolray.get(ref, timeout=DEADLINE_S) for ref in generator]
    assert len(set(first)) == 1
    assert last != first[0]


def test_a_killed_reader_leaves_nothing(gates: Callable[[str], Gate]) -> None:
    poolray.init(num_cpus=2)

    @poolray.remote(max_retries=0)
    def read(ready: Gate) -> None:
        generator = arrays.options(_generator_backpressure_num_objects=3).remote(10**6)
        held = [next(generator) for _ in range(2)]
        ready.open()
        time.sleep(DEADLINE_S)
        del held

    ready = gates("ready")
    ref = read.remote(ready)
    ready.wait()
    (reader,) = [p for p in worker_pids() if p in running("read")]
    os.kill(reader, signal.SIGKILL)
    with pytest.raises(poolray.exceptions.WorkerCrashedError):
        poolray.get(ref, timeout=DEADLINE_S)
    wait_until(lambda: statistics().streams == 0, "the end of the stream")
    wait_until(lambda: used_bytes() <= 2 * MEBIBYTE, "the memory of what was yielded")


def worker_pids() -> list[int]:
    from poolray.util.state import list_workers

    return [row.pid for row in list_workers(limit=100)]


def running(name: str) -> list[int]:
    from poolray.util.state import list_tasks

    rows = list_tasks(filters=[("name", "=", name)], detail=True)
    return [row.worker_pid for row in rows if row.worker_pid]


def test_ctrl_c_ends_a_wait_for_the_next_item(gates: Callable[[str], Gate]) -> None:
    poolray.init(num_cpus=1)
    gate = gates("last")
    generator = pids.remote(gate, 1)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(generator)
    gate.open()
    assert poolray.get(next(generator), timeout=DEADLINE_S)
    with pytest.raises(StopIteration):
        next(generator)


def test_a_shutdown_ends_a_wait_for_the_next_item(gates: Callable[[str], Gate]) -> None:
    poolray.init(num_cpus=1)
    gate = gates("last")
    generator = pids.remote(gate, 1)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            next(generator)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    poolray.shutdown()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert isinstance(caught[0], (poolray.exceptions.PoolrayError, ValueError))


def test_a_generator_of_a_runtime_that_has_ended_says_so() -> None:
    poolray.init(num_cpus=1)
    generator, read = count.remote(3), count.remote(1)
    poolray.get(next(read))
    poolray.shutdown()
    poolray.init(num_cpus=1)
    with pytest.raises(ValueError, match="shut down"):
        next(generator)
    del generator, read
    gc.collect()
    assert [poolray.get(ref) for ref in count.remote(2)] == [0, 1]


def test_threads_share_a_generator_without_losing_items() -> None:
    poolray.init(num_cpus=1)
    generator = count.remote(2000)
    found: list[int] = []

    def read() -> None:
        for ref in generator:
            found.append(poolray.get(ref))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(found) == list(range(2000))


def test_items_are_sent_although_the_generator_computes_on(gates: Callable[[str], Gate]) -> None:
    """Items that follow each other quickly go together, the last of them alone if need be."""
    poolray.init(num_cpus=1)

    @poolray.remote
    def burst(gate: Gate) -> Iterator[int]:
        yield from range(50)
        gate.wait()

    gate = gates("burst")
    generator = burst.remote(gate)
    assert [poolray.get(next(generator), timeout=DEADLINE_S) for _ in range(50)] == list(range(50))
    gate.open()
    with pytest.raises(StopIteration):
        next(generator)


def test_many_generators_in_one_event_loop() -> None:
    poolray.init(num_cpus=2)

    async def read(n: int) -> int:
        return len([await ref async for ref in count.remote(n)])

    async def main() -> list[int]:
        return await asyncio.gather(*(read(n) for n in range(40)))

    assert asyncio.run(main()) == list(range(40))


def test_an_idle_process_tells_a_waiting_generator_that_it_was_dropped(
    gates: Callable[[str], Gate],
) -> None:
    poolray.init(num_cpus=1)

    @poolray.remote(_generator_backpressure_num_objects=1)
    def tell_at_the_end(gate: Gate) -> Iterator[int]:
        yield 1
        yield 2
        gate.open()

    gate = gates("end")
    generator = tell_at_the_end.remote(gate)
    assert poolray.get(next(generator)) == 1
    del generator
    gc.collect()
    gate.wait()
