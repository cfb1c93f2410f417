"""Clusters of real daemons: handles and refs travel, heads come back, nodes leave politely."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.cluster.asking import ask
from poolray.cluster.auth import Credentials
from poolray.cluster_utils import Cluster
from poolray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from poolray.protocol.cluster import AskNodes, Nodes
from poolray.protocol.directory import DrainNode
from poolray.protocol.inquiry import AskHead
from poolray.session import find_client
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

CONFIG = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.0}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The head's node, where the driver is, without CPUs for others."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": CONFIG})
    try:
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


@poolray.remote(resources={"there": 1}, num_cpus=0)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count

    def where(self) -> tuple[str, int]:
        return poolray.get_runtime_context().get_node_id(), os.getpid()


@poolray.remote(resources={"there": 1}, num_cpus=0, max_retries=2)
def large(value: int) -> np.ndarray[Any, Any]:
    return np.full(1_000_000, value)


def test_the_head_counts_a_node_as_soon_as_it_is_said_to_be_up(cluster: Cluster) -> None:
    with open(cluster.auth_token_path, encoding="ascii") as file:
        credentials = Credentials.of(file.read().strip())
    for _ in range(5):
        node = cluster.add_node(wait=False)  # (as `poolray start`: nobody else is waited for)
        rows = ask(cluster.address, AskNodes(), Nodes, credentials).nodes
        assert node.node_id in {row.node_id.hex() for row in rows}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_cpus": -1}, "must be nonnegative"),
        ({"num_gpus": 0.5}, "must all be whole numbers"),
        ({"resources": {"GPU": 1}}, "use `num_gpus` instead"),
        ({"resources": {"disk": -1}}, "must be nonnegative"),
        ({"labels": {"zone": "@"}}, "Invalid label key value"),
        ({"object_store_memory": 1000}, "minimum allowed"),
    ],
)
def test_what_no_node_can_have_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Cluster(initialize_head=True, head_node_args=arguments)


def test_a_head_that_is_killed_is_missed_by_nobody_and_comes_back_with_all_it_knew(
    cluster: Cluster,
) -> None:
    cluster.add_node(num_cpus=1, resources={"there": 4})
    poolray.init(address=cluster.address, namespace="n")
    counter = Counter.options(name="counter", lifetime="detached").remote()
    assert poolray.get(counter.add.remote(), timeout=20) == 1
    _internal_kv_put("key", b"value")
    slow = poolray.remote(resources={"there": 1}, num_cpus=0)(
        lambda: time.sleep(1.5) or "never noticed"
    ).remote()
    cluster.kill_head()
    assert poolray.get(counter.add.remote(), timeout=20) == 2, "calls go on without a head"
    assert int(poolray.get(large.remote(7), timeout=20)[0]) == 7
    cluster.restart_head()
    assert poolray.get(slow, timeout=20) == "never noticed"
    assert _internal_kv_get("key") == b"value"
    again = poolray.get_actor("counter")
    assert poolray.get(again.add.remote(), timeout=20) == 3
    cluster.wait_for_nodes()


def test_callers_follow_an_actor_that_moves_after_the_head_was_started_again(
    cluster: Cluster,
) -> None:
    doomed = cluster.add_node(num_cpus=1, resources={"there": 1})
    cluster.add_node(num_cpus=1, resources={"caller": 1})
    poolray.init(address=cluster.address)
    counter = Counter.options(max_restarts=1, max_task_retries=-1).remote()

    @poolray.remote(num_cpus=0, resources={"caller": 1})
    class Caller:
        def __init__(self, counter: Any) -> None:
            self.counter = counter

        def call(self) -> str:
            return str(poolray.get(self.counter.where.remote())[0])

    caller = Caller.remote(counter)
    assert poolray.get(caller.call.remote(), timeout=20) == doomed.unique_id
    cluster.kill_head()
    cluster.restart_head()
    spare = cluster.add_node(num_cpus=1, resources={"there": 1})
    cluster.remove_node(doomed, allow_graceful=False)
    assert poolray.get(caller.call.remote(), timeout=30) == spare.unique_id


def test_a_killed_process_of_an_actor_elsewhere_is_made_again(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, resources={"there": 2})
    poolray.init(address=cluster.address)
    counter = Counter.options(max_restarts=1, max_task_retries=2).remote()
    assert poolray.get(counter.add.remote(), timeout=20) == 1
    _, pid = poolray.get(counter.where.remote(), timeout=20)
    os.kill(pid, signal.SIGKILL)
    assert poolray.get(counter.add.remote(), timeout=20) == 1, "it is a new one"


def test_handles_and_refs_inside_arguments_work_on_other_nodes(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=2, resources={"there": 2})
    poolray.init(address=cluster.address)
    counter = Counter.remote()
    ref = poolray.put(np.arange(1_000_000))

    @poolray.remote(resources={"there": 1}, num_cpus=0)
    def use(box: dict[str, Any]) -> tuple[int, int]:
        return poolray.get(box["counter"].add.remote()), int(poolray.get(box["ref"])[-1])

    assert poolray.get(use.remote({"counter": counter, "ref": ref}), timeout=20) == (1, 999_999)


def test_a_node_that_is_drained_leaves_with_nothing_lost(cluster: Cluster) -> None:
    leaving = cluster.add_node(num_cpus=1, resources={"there": 2})
    poolray.init(address=cluster.address)
    made = large.options(max_retries=0).remote(5)
    poolray.wait([made], timeout=20)
    question = DrainNode(request_id=0, node_id=bytes.fromhex(leaving.unique_id))  # type: ignore[arg-type]
    find_client().link.ask(lambda n: AskHead(request_id=n, question=question))
    wait_until(lambda: not leaving.is_alive(), "the end of the drained node", 10)
    assert int(poolray.get(made, timeout=20)[0]) == 5
