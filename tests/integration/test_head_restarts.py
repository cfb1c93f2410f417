"""The head is killed and started again on what it had stored: all is there, and work went on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import poolray
from poolray.api import find_client
from poolray.cluster_utils import Cluster
from poolray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from poolray.local.session_folder import sweep
from poolray.protocol.directory import JobsFound, ListJobs
from poolray.protocol.inquiry import AskHead, read_answer
from poolray.util import get_placement_group, placement_group, placement_group_table
from poolray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.integration.conftest import RedisServer
from tests.integration.support import Gate, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

FAST = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.5}
THERE: dict[str, Any] = {"num_cpus": 0, "resources": {"there": 0.1}}


@pytest.fixture
def start() -> Iterator[Callable[..., Cluster]]:
    """Start a cluster with a node beside the driver's, and connect to it."""
    made: list[Cluster] = []

    def make(**head: Any) -> Cluster:
        arguments = {"num_cpus": 1, "_system_config": FAST, **head}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        made.append(cluster)
        cluster.add_node(num_cpus=1, resources={"there": 1})
        poolray.init(address=cluster.address, namespace="tests")
        return cluster

    yield make
    poolray.shutdown()
    for cluster in made:
        cluster.shutdown()


@poolray.remote(**THERE)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


@pytest.mark.parametrize("storage", ["sqlite", "redis"])
def test_all_that_the_head_knew_is_there_and_work_never_noticed(
    start: Callable[..., Cluster],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    storage: str,
    started: Gate,
    release: Gate,
) -> None:
    url = request.getfixturevalue("redis_url") if storage == "redis" else ""
    cluster = start(storage=url)

    @poolray.remote(**THERE, max_retries=0)
    def hold(number: int) -> int:
        started.open(1)
        release.wait()
        with open(tmp_path / "ends", "a") as file:
            file.write(f"{number}\n")
        return number

    detached = Counter.options(name="detached", lifetime="detached").remote()
    named = Counter.options(name="named").remote()
    group = placement_group([{"there": 0.3}, {"there": 0.2}], name="group")
    poolray.get([detached.add.remote(), named.add.remote(), group.ready()], timeout=20)
    inside = PlacementGroupSchedulingStrategy(group)
    _internal_kv_put("key", b"value")
    running = [hold.remote(0), hold.options(scheduling_strategy=inside).remote(1)]
    started.wait()
    started.wait()
    nodes = sorted(node["NodeID"] for node in poolray.nodes())
    jobs = known_jobs()

    # A runtime that starts sweeps what killed ones have left, not what is in use for long.
    folder = os.path.dirname(cluster.session_folder)
    os.utime(folder, (1, 1))
    sweep([os.path.dirname(folder)])
    cluster.kill_head()
    assert poolray.get([detached.add.remote(), named.add.remote()], timeout=20) == [2, 2]
    assert poolray.get(poolray.remote(**THERE)(lambda: "new").remote(), timeout=20) == "new"
    found: list[Any] = []
    later: list[Any] = []
    asking = [
        threading.Thread(target=lambda: found.append(poolray.get_actor("detached"))),
        threading.Thread(target=lambda: later.append(placement_group([{"there": 0.1}]))),
    ]
    for thread in asking:
        thread.start()
    cluster.restart_head()

    cluster.wait_for_nodes()
    for thread in asking:
        thread.join(20)
    assert poolray.get(found[0].add.remote(), timeout=20) == 3
    assert poolray.get(poolray.get_actor("named").add.remote(), timeout=20) == 3
    with pytest.raises(ValueError, match="named"):
        Counter.options(name="named").remote()
    assert _internal_kv_get("key") == b"value"
    assert sorted(node["NodeID"] for node in poolray.nodes() if node["Alive"]) == nodes
    assert known_jobs() == jobs
    assert len(jobs) == 1
    assert get_placement_group("group").id == group.id
    assert placement_group_table(group)["state"] == "CREATED"
    poolray.get(later[0].ready(), timeout=20)
    where = poolray.remote(num_cpus=0, resources={"there": 0.1})(lambda: "inside")
    assert poolray.get(where.options(scheduling_strategy=inside).remote(), timeout=20) == "inside"
    release.open(2)
    assert poolray.get(running, timeout=20) == [0, 1]
    assert sorted((tmp_path / "ends").read_text().split()) == ["0", "1"], "each ran once"
    poolray.kill(detached)


def test_a_driver_that_leaves_while_the_head_is_away_leaves_what_is_detached_and_nothing_else(
    start: Callable[..., Cluster],
) -> None:
    cluster = start()
    detached = Counter.options(name="detached", lifetime="detached").remote()
    named = Counter.options(name="named").remote()
    groups = [
        placement_group([{"there": 0.1}], name="stays", lifetime="detached"),
        placement_group([{"there": 0.1}], name="goes"),
    ]
    poolray.get([detached.add.remote(), named.add.remote(), *(g.ready() for g in groups)])
    cluster.kill_head()
    poolray.shutdown()
    cluster.restart_head()
    poolray.init(address=cluster.address, namespace="tests")
    assert poolray.get(poolray.get_actor("detached").add.remote(), timeout=20) == 2

    def states() -> dict[str, str]:
        return {row["name"]: row["state"] for row in placement_group_table().values()}

    wait_until(lambda: states() == {"stays": "CREATED", "goes": "REMOVED"}, "the group's end")
    wait_until(lambda: not has_actor("named"), "the actor's end")
    assert sorted(known_jobs().values()) == [False, True]
    poolray.kill(poolray.get_actor("detached"))


def known_jobs() -> dict[bytes, bool]:
    """Jobs, as the head lists them: whether each runs."""
    answer = find_client().link.ask(
        lambda number: AskHead(request_id=number, question=ListJobs(request_id=0))
    )
    found = read_answer([answer])
    assert isinstance(found, JobsFound)
    return {job.job_id: job.is_running for job in found.jobs}


def has_actor(name: str) -> bool:
    try:
        poolray.get_actor(name)
    except ValueError:
        return False
    return True


def test_a_head_waits_for_a_storage_that_is_away_for_a_moment(
    start: Callable[..., Cluster], redis_server: RedisServer
) -> None:
    cluster = start(storage=redis_server.url)
    counter = Counter.options(name="before", lifetime="detached").remote()
    assert poolray.get(counter.add.remote(), timeout=20) == 1
    redis_server.kill()
    made: list[Any] = []
    asking = threading.Thread(
        target=lambda: made.append(Counter.options(name="during", lifetime="detached").remote())
    )
    asking.start()
    assert poolray.get(counter.add.remote(), timeout=20) == 2, "calls go on"
    redis_server.start()
    asking.join(20)
    assert poolray.get(made[0].add.remote(), timeout=20) == 1
    cluster.kill_head()
    cluster.restart_head()
    for name, count in (("before", 3), ("during", 2)):
        actor = poolray.get_actor(name)
        assert poolray.get(actor.add.remote(), timeout=20) == count
        poolray.kill(actor)
