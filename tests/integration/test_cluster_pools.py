"""Pools and executors on clusters: the standard library's semantics on many machines."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import poolray
from poolray import Executor, Pool
from poolray.cluster_utils import Cluster
from poolray.exceptions import ActorError, CallTimeoutError, NotSupportedError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=2)
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


_state: list[Any] = []


def _remember(value: Any) -> None:
    _state.append(value)


def _recall(_: Any) -> list[Any]:
    return list(_state)


def _where(_: Any) -> str:
    time.sleep(0.01)
    return poolray.get_runtime_context().get_node_id()


def test_a_pool_has_workers_on_all_nodes_and_answers_like_the_standard_one(
    cluster: Cluster,
) -> None:
    with Pool(address=cluster.address) as pool:
        assert pool.map(lambda n: n * n, range(50)) == [n * n for n in range(50)]
        assert pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9]
        assert list(pool.imap(str, range(5), chunksize=2)) == ["0", "1", "2", "3", "4"]
        assert sorted(pool.imap_unordered(abs, [-3, 1, -2])) == [1, 2, 3]
        assert pool.apply(pow, (2, 5), {"mod": 7}) == 4
        with pytest.raises(ZeroDivisionError):
            pool.map(lambda n: 1 / n, [1, 0])
        # (Asked until both have answered: a worker may still be starting.)
        nodes: set[str] = set()
        deadline = time.monotonic() + 20
        while len(nodes) < 2 and time.monotonic() < deadline:
            nodes.update(pool.map(_where, range(6), chunksize=1))
        assert len(nodes) == 2
        called: list[Any] = []
        pool.apply_async(abs, (-4,), callback=called.append).get(10)
        assert called == [4]
        assert len({*pool._runtime.worker_pids(pool._handle)}) == 3


def test_an_initializer_sets_globals_that_functions_of_its_module_see(cluster: Cluster) -> None:
    with Pool(2, initializer=_remember, initargs=(7,), address=cluster.address) as pool:
        assert pool.map(_recall, range(6), chunksize=1) == [[7]] * 6


def test_an_initializer_that_raises_fails_the_calls(cluster: Cluster) -> None:
    with Pool(1, initializer=lambda: 1 / 0, address=cluster.address) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.apply(abs, (1,))


def test_arrays_arrive_whole_and_writable(cluster: Cluster) -> None:
    with Pool(2, address=cluster.address) as pool:
        total, doubled = pool.apply(lambda a: (a.sum(), a * 2), (np.ones(200_000),))
        assert total == 200_000
        doubled[0] = 5
        assert doubled[0] == 5


def test_a_call_whose_worker_is_killed_runs_again(cluster: Cluster, tmp_path: Any) -> None:
    mark = tmp_path / "tried"

    def die_once(path: str) -> int:
        import os
        import signal

        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return 3

    with Pool(1, address=cluster.address) as pool:
        assert pool.apply(die_once, (str(mark),)) == 3


def test_an_executor_gives_standard_futures(cluster: Cluster) -> None:
    with Executor(address=cluster.address) as executor:
        futures = [executor.submit(lambda n: n + 1, n) for n in range(20)]
        assert [future.result(20) for future in futures] == list(range(1, 21))
        assert list(executor.map(abs, [-1, -2])) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            executor.submit(lambda: 1 / 0).result(20)


def test_workers_are_replaced_after_their_share_of_calls(cluster: Cluster) -> None:
    with Pool(1, maxtasksperchild=2, address=cluster.address) as pool:
        pids = pool.map(lambda _: os.getpid(), range(6), chunksize=1)
    assert [len(set(pids[n : n + 2])) for n in (0, 2, 4)] == [1, 1, 1]
    assert len(set(pids)) == 3
    with Executor(1, max_tasks_per_child=1, address=cluster.address) as executor:
        assert len({executor.submit(os.getpid).result(30) for _ in range(3)}) == 3


def _note(state: dict[str, int], number: int) -> int:
    state["calls"] = state.get("calls", state["first"]) + 1
    return number


def test_workers_keep_a_state_and_wind_it_up(cluster: Cluster) -> None:
    pool = Pool(
        2,
        context=multiprocessing.get_context("spawn"),
        worker_state=True,
        worker_init=lambda state: state.update(first=100),
        worker_exit=lambda state: state.get("calls", 100) - 100,
        address=cluster.address,
    )
    assert pool.map(_note, range(10), chunksize=1) == list(range(10))
    assert pool.apply(_note, (3,)) == 3
    pool.close()
    pool.join()
    left = pool.get_exit_results()
    assert len(left) == 2
    assert sum(left) == 11


def test_what_winding_up_raises_is_raised_where_it_is_asked_for(cluster: Cluster) -> None:
    pool = Pool(1, worker_exit=lambda: 1 / 0, address=cluster.address)
    assert pool.apply(abs, (-1,)) == 1
    pool.close()
    pool.join()
    with pytest.raises(ZeroDivisionError):
        pool.get_exit_results()


def test_a_late_call_is_ended_also_where_it_lets_nobody_else_run(cluster: Cluster) -> None:
    def match(text: str) -> bool:
        return re.match(r"(a+)+b", text) is not None

    with Pool(1, address=cluster.address) as pool:
        texts = ["ab", "a" * 60, "aab", "c"]
        late = [pool.apply_async(match, (text,), timeout=0.5) for text in texts]
        found: list[Any] = []
        for result in late:
            try:
                found.append(result.get(60))
            except CallTimeoutError as error:
                found.append(error.timeout_s)
        assert found == [True, 0.5, True, False]
        assert pool.map(abs, [-1, -2], timeout=20) == [1, 2]


def test_a_call_with_a_limit_whose_worker_is_killed_runs_again(
    cluster: Cluster, tmp_path: Any
) -> None:
    def die_twice(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.path.getsize(path)

    with Pool(1, address=cluster.address) as pool:
        assert pool.apply(die_twice, (str(tmp_path / "tried"),), timeout=60) == 3
    with Pool(1, max_retries=0, address=cluster.address) as pool:
        with pytest.raises(ActorError):
            pool.apply(die_twice, (str(tmp_path / "again"),), timeout=60)
        assert pool.apply(abs, (-1,)) == 1


def test_a_pool_on_a_cluster_tells_what_its_workers_do_with_their_time(cluster: Cluster) -> None:
    address = cluster.address
    with Pool(2, time.sleep, (0.05,), insights=True, address=address) as pool:
        pool.map(time.sleep, [0.02, 0.15, *[0.02] * 8], chunksize=2)
        found = pool.insights()
        assert found.tasks == 10
        assert len({worker.pid for worker in found.workers}) == 2
        for worker in found.workers:
            assert worker.alive
            assert worker.init_s >= 0.05
            assert worker.start_up_s > 0
            assert worker.waiting_s >= 0
            assert worker.exit_s == 0
        assert sum(worker.working_s for worker in found.workers) >= 0.33
        assert found.slowest[0].arguments == "0.15"
        assert found.slowest[0].seconds >= 0.15
        assert pool.apply(np.ones, (200_000,)).sum() == 200_000  # a result that is not small
        with pytest.raises(ZeroDivisionError):
            pool.apply(lambda n: 1 // n, (0,))
        assert pool.insights().tasks == 12
        pids = {worker.pid for worker in found.workers}

        def die(path: str) -> int:
            if not os.path.exists(path):
                open(path, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return os.getpid()

        pids.add(pool.apply(die, (os.path.join(cluster.session_folder, "died"),)))
        found = pool.insights()
        assert {worker.pid for worker in found.workers} == pids
        assert found.tasks == 13
    options = {"maxtasksperchild": 2, "worker_exit": lambda: time.sleep(0.05)}
    pool = Pool(1, insights=True, address=address, **options)
    pool.map(abs, range(6), chunksize=1)
    pool.close()
    pool.join()
    found = pool.insights()
    assert [worker.tasks for worker in found.workers if worker.tasks] == [2, 2, 2]
    assert not any(worker.alive for worker in found.workers)
    assert all(worker.exit_s >= 0.05 for worker in found.workers)
    assert "slowest calls" in str(found)
    with Pool(1, address=address) as plain, pytest.raises(ValueError, match="insights=True"):
        plain.insights()


def test_what_a_pool_on_a_cluster_cannot_do_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="only has 3 CPUs"):
        Pool(4, address=cluster.address)
    forks = multiprocessing.get_context("fork")
    with pytest.raises(NotSupportedError, match="forks of this process"):
        Pool(1, context=forks, address=cluster.address)
    with pytest.raises(NotSupportedError, match="forks of this process"):
        Executor(1, mp_context=forks, address=cluster.address)
    poolray.shutdown()
    monkeypatch.setenv("POOLRAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        Pool(1, address="127.0.0.1:9")
