"""Tasks that share: primitives of `multiprocessing`, managers, connections, shared memory."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.managers
import multiprocessing.shared_memory
import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
from executor_support import DEADLINE_S, identity
from pool_support import MakePool, Pool, square

context = multiprocessing.get_context("fork")

# What the workers share: set by an initializer in each of them, or here before they are made.
shared = SimpleNamespace()


@pytest.fixture(autouse=True)
def _nothing_shared_before() -> Iterator[None]:
    shared.__dict__.clear()
    yield
    shared.__dict__.clear()


def share(things: dict[str, Any]) -> None:
    shared.__dict__.update(things)


@pytest.fixture(params=["initializer", "inheritance"])
def make_sharing_pool(request: pytest.FixtureRequest, make_pool: MakePool) -> MakePool:
    """Make a pool whose workers find the given things in `shared`."""

    def make(processes: int, **things: Any) -> Pool:
        if request.param == "initializer":
            return make_pool(processes, share, (things,))
        share(things)
        return make_pool(processes)

    return make


# --- primitives --------------------------------------------------------------------------------


def meet_at_barrier(asked: bool = True) -> int:
    """Return only when every party has come; at once if not asked to meet."""
    if asked:
        shared.barrier.wait(DEADLINE_S)
    return os.getpid()


@pytest.mark.parametrize("parties", [2, 4])
def test_tasks_meet_at_a_barrier(make_sharing_pool: MakePool, parties: int) -> None:
    pool = make_sharing_pool(parties, barrier=context.Barrier(parties))
    for _ in range(5):
        assert len(set(pool.map(meet_at_barrier, [True] * parties, 1))) == parties
    results = [pool.apply_async(meet_at_barrier) for _ in range(parties)]
    assert len({result.get(DEADLINE_S) for result in results}) == parties
    assert len(set(pool.imap_unordered(meet_at_barrier, [True] * parties))) == parties


@pytest.mark.parametrize("method", ["map", "imap", "imap_unordered", "apply_async"])
def test_tasks_meet_after_many_tasks_that_were_short(
    make_sharing_pool: MakePool, method: str
) -> None:
    """A pool that sends short tasks in batches must not put the two that meet in one batch."""
    pool = make_sharing_pool(2, barrier=context.Barrier(2))
    asked = [False] * 500 + [True, True] + [False] * 20 + [True, True]
    if method == "apply_async":
        results = [pool.apply_async(meet_at_barrier, (each,)) for each in asked]
        pids = [result.get(DEADLINE_S) for result in results]
    else:
        pids = list(getattr(pool, method)(meet_at_barrier, asked, chunksize=1))
    assert len(pids) == len(asked)


def wait_for_event(number: int) -> int:
    assert shared.event.wait(DEADLINE_S)
    return number


def set_event(number: int) -> int:
    shared.event.set()
    return number


def test_one_task_waits_for_an_event_that_another_sets(make_sharing_pool: MakePool) -> None:
    pool = make_sharing_pool(2, event=context.Event())
    waiting = pool.apply_async(wait_for_event, (1,))
    assert pool.apply_async(set_event, (2,)).get(DEADLINE_S) == 2
    assert waiting.get(DEADLINE_S) == 1


def test_this_process_sets_the_event_that_tasks_wait_for(make_sharing_pool: MakePool) -> None:
    event = context.Event()
    pool = make_sharing_pool(2, event=event)
    waiting = pool.map_async(wait_for_event, range(4), 1)
    assert not waiting.ready()
    event.set()
    assert waiting.get(DEADLINE_S) == [0, 1, 2, 3]


def add_under_lock(count: int) -> None:
    for _ in range(count):
        with shared.lock:
            shared.total.value += 1


@pytest.mark.parametrize("lock", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"])
def test_a_lock_guards_a_shared_number(make_sharing_pool: MakePool, lock: str) -> None:
    total = context.RawValue("i", 0)
    pool = make_sharing_pool(2, lock=getattr(context, lock)(), total=total)
    pool.map(add_under_lock, [100] * 8, 1)
    assert total.value == 800


def add_to_shared(count: int) -> None:
    for _ in range(count):
        with shared.value.get_lock():
            shared.value.value += 1
    with shared.array.get_lock():
        shared.array[count % len(shared.array)] += 1


def test_values_and_arrays_are_shared(make_sharing_pool: MakePool) -> None:
    value, array = context.Value("q", 0), context.Array("i", 4)
    pool = make_sharing_pool(2, value=value, array=array)
    pool.map(add_to_shared, [1, 2, 3, 4, 5, 6], 1)
    assert value.value == 21
    assert list(array) == [1, 2, 2, 1]


def move_from_queue_to_queue(count: int) -> int:
    for _ in range(count):
        shared.outgoing.put(square(shared.incoming.get(timeout=DEADLINE_S)))
    return count


@pytest.mark.parametrize("kind", ["Queue", "JoinableQueue"])
def test_tasks_use_queues(make_sharing_pool: MakePool, kind: str) -> None:
    incoming, outgoing = getattr(context, kind)(), getattr(context, kind)()
    pool = make_sharing_pool(2, incoming=incoming, outgoing=outgoing)
    moving = pool.map_async(move_from_queue_to_queue, [5, 5], 1)
    for number in range(10):
        incoming.put(number)
    assert moving.get(DEADLINE_S) == [5, 5]
    assert sorted(outgoing.get(timeout=DEADLINE_S) for _ in range(10)) == [x * x for x in range(10)]
    for queue in (incoming, outgoing):
        queue.close()
        queue.join_thread()


def put_to_simple_queue(number: int) -> None:
    shared.queue.put((number, os.getpid()))


def test_tasks_use_a_simple_queue(make_sharing_pool: MakePool) -> None:
    queue = context.SimpleQueue()
    pool = make_sharing_pool(2, queue=queue)
    pool.map(put_to_simple_queue, range(10), 1)
    assert sorted(queue.get()[0] for _ in range(10)) == list(range(10))
    queue.close()


def send_and_receive(number: int) -> Any:
    shared.connection.send(number)
    assert shared.connection.poll(DEADLINE_S)
    return shared.connection.recv()


def test_tasks_use_a_pipe(make_sharing_pool: MakePool) -> None:
    here, there = context.Pipe()
    with here, there:
        pool = make_sharing_pool(1, connection=there)
        result = pool.apply_async(send_and_receive, (1,))
        assert here.poll(DEADLINE_S)
        here.send(here.recv() + 1)
        assert result.get(DEADLINE_S) == 2


@pytest.mark.parametrize(
    "kind", ["Lock", "RLock", "Semaphore", "Event", "Condition", "Queue", "SimpleQueue", "Value"]
)
def test_primitives_are_refused_as_arguments(pool: Pool, kind: str) -> None:
    primitive = getattr(context, kind)(*(("i", 0) if kind == "Value" else ()))
    with pytest.raises(RuntimeError, match="through inheritance"):
        pool.apply(identity, (primitive,))
    with pytest.raises(RuntimeError, match="through inheritance"):
        pool.map(identity, [primitive])
    assert pool.apply(square, (3,)) == 9


# --- what may be an argument -------------------------------------------------------------------


def send_hello(connection: Connection) -> None:
    connection.send("hello")
    connection.close()


def test_a_connection_may_be_an_argument(pool: Pool) -> None:
    here, there = context.Pipe()
    with here, there:
        pool.apply(send_hello, (there,))
        assert here.poll(DEADLINE_S)
        assert here.recv() == "hello"


def send_bytes(stream: socket.socket) -> None:
    with stream:
        stream.sendall(b"hello")


def test_a_socket_may_be_an_argument(pool: Pool) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(DEADLINE_S)
        pool.apply(send_bytes, (there,))
        assert here.recv(5) == b"hello"


def reverse_in_place(memory: multiprocessing.shared_memory.SharedMemory) -> None:
    assert memory.buf is not None
    memory.buf[:4] = bytes(reversed(memory.buf[:4]))


def test_shared_memory_may_be_an_argument(pool: Pool) -> None:
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4)
    try:
        memory.buf[:4] = b"abcd"
        pool.apply(reverse_in_place, (memory,))
        assert bytes(memory.buf[:4]) == b"dcba"
    finally:
        memory.close()
        memory.unlink()


# --- managers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager() -> Iterator[multiprocessing.managers.SyncManager]:
    with context.Manager() as manager:
        yield manager


def write_to_proxies(results: Any, by_number: Any, lock: Any, number: int) -> None:
    with lock:
        results.append(number)
        by_number[number] = by_number.get(number, 0) + 1


def test_proxies_may_be_arguments(pool: Pool, manager: Any) -> None:
    results, by_number, lock = manager.list(), manager.dict(), manager.Lock()
    task = functools.partial(write_to_proxies, results, by_number, lock)
    pool.map(task, range(10), 1)
    pool.starmap(write_to_proxies, [(results, by_number, lock, x) for x in range(10)])
    assert sorted(results) == sorted([*range(10), *range(10)])
    assert dict(by_number) == dict.fromkeys(range(10), 2)


def pass_on(incoming: Any, outgoing: Any, event: Any) -> str:
    assert event.wait(DEADLINE_S)
    outgoing.put(incoming.get(timeout=DEADLINE_S) + 1)
    return type(incoming).__name__


def test_queues_and_events_of_a_manager_join_this_process_and_tasks(
    pool: Pool, manager: Any
) -> None:
    incoming, outgoing, event = manager.Queue(), manager.Queue(), manager.Event()
    results = [pool.apply_async(pass_on, (incoming, outgoing, event)) for _ in range(2)]
    incoming.put(1)
    incoming.put(2)
    event.set()
    assert {result.get(DEADLINE_S) for result in results} == {"AutoProxy[Queue]"}
    assert sorted(outgoing.get(timeout=DEADLINE_S) for _ in range(2)) == [2, 3]


def set_name(space: Any, value: str) -> None:
    space.name = value


def test_a_namespace_of_a_manager_is_shared(make_pool: MakePool, manager: Any) -> None:
    space = manager.Namespace()
    make_pool(1, set_name, (space, "by the initializer")).apply(square, (3,))
    assert space.name == "by the initializer"
    make_pool(1).apply(set_name, (space, "by a task"))
    assert space.name == "by a task"


def test_a_proxy_may_be_a_result(pool: Pool, manager: Any) -> None:
    proxy = pool.apply(identity, (manager.list([1, 2]),))
    proxy.append(3)
    assert list(proxy) == [1, 2, 3]
