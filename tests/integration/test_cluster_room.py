"""Room on other nodes that was taken and given back between two heartbeats is room again."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

import poolray
from poolray.cluster_utils import Cluster

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # (So seldom that nothing in these tests is told by a heartbeat.)
    config = {"heartbeat_interval_s": 1.0, "heartbeat_timeout_s": 5.0}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    try:
        made.add_node(num_cpus=1, resources={"second": 1})
        poolray.init(address=made.address)
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


@poolray.remote(num_cpus=1, resources={"second": 0.1})
def there() -> int:
    return 1


def test_actors_that_lived_shortly_leave_their_room(cluster: Cluster) -> None:
    @poolray.remote(num_cpus=1, resources={"second": 0.1})
    class Short:
        def ping(self) -> int:
            return 1

    for _ in range(2):
        short = Short.remote()
        assert poolray.get(short.ping.remote(), timeout=30) == 1
        poolray.kill(short)
        assert poolray.get(there.remote(), timeout=30) == 1


def test_actors_that_keep_no_cpu_are_made_one_after_the_other(cluster: Cluster) -> None:
    @poolray.remote(scheduling_strategy="SPREAD")
    class Idle:
        def where(self) -> str:
            return poolray.get_runtime_context().get_node_id()

    actors = [Idle.remote() for _ in range(8)]
    assert len(set(poolray.get([actor.where.remote() for actor in actors], timeout=30))) == 2
    assert poolray.get(there.remote(), timeout=30) == 1


@pytest.mark.parametrize("fetch_local", [True, False])
def test_what_was_waited_for_is_here(cluster: Cluster, fetch_local: bool) -> None:
    @poolray.remote(num_cpus=0.1, resources={"second": 0.1}, max_retries=0)
    def large(number: int) -> np.ndarray:
        return np.full(300_000, number)

    refs = [large.remote(number) for number in range(5)]
    ready, rest = poolray.wait(refs, num_returns=5, timeout=30, fetch_local=fetch_local)
    assert (ready, rest) == (refs, [])
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    if fetch_local:
        assert [int(value[-1]) for value in poolray.get(refs, timeout=90)] == list(range(5))
    else:
        with pytest.raises(poolray.exceptions.ObjectLostError):
            poolray.get(refs, timeout=90)
