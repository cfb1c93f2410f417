"""Pools and executors on clusters: the standard library's semantics on many machines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import poolray
from poolray import Executor, Pool
from poolray.cluster_utils import Cluster
from poolray.exceptions import NotSupportedError

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


def test_what_a_pool_on_a_cluster_cannot_do_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="only has 3 CPUs"):
        Pool(4, address=cluster.address)
    with pytest.raises(NotSupportedError, match="maxtasksperchild"):
        Pool(1, maxtasksperchild=2, address=cluster.address)
    poolray.shutdown()
    monkeypatch.setenv("POOLRAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        Pool(1, address="127.0.0.1:9")
