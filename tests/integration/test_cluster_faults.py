"""Clusters that lose parts: the head, nodes, drivers; and actors that live through it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

import poolray
from poolray.cluster import launch
from poolray.cluster.daemon import report
from poolray.cluster.options import Ready
from poolray.cluster_utils import Cluster
from poolray.exceptions import (
    ActorDiedError,
    ClusterConnectionError,
    NodeDiedError,
    ObjectLostError,
    OwnerDiedError,
)
from tests.integration.support import Gate, announce_and_hold, is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

FAST = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.5}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST})
    try:
        poolray.init(address=made.address, namespace="tests")
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


@poolray.remote(resources={"spot": 1}, num_cpus=0)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count

    def where(self) -> tuple[int, str]:
        return os.getpid(), poolray.get_runtime_context().get_node_id()


def test_a_head_that_is_killed_and_started_again_knows_what_it_knew(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.options(name="keeper", lifetime="detached").remote()
    assert poolray.get(actor.add.remote()) == 1
    running = poolray.remote(lambda: time.sleep(1) or "never noticed").remote()  # type: ignore[func-returns-value]
    cluster.kill_head()
    assert poolray.get(actor.add.remote(), timeout=10) == 2
    cluster.restart_head()
    cluster.wait_for_nodes()
    assert poolray.get(running, timeout=20) == "never noticed"
    assert poolray.get(poolray.get_actor("keeper").add.remote(), timeout=20) == 3
    assert len([node for node in poolray.nodes() if node["Alive"]]) == 2
    poolray.kill(actor)


def test_an_actor_is_restarted_on_another_node_when_its_own_is_killed(cluster: Cluster) -> None:
    first = cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.options(max_restarts=1, max_task_retries=2).remote()
    _, node_id = poolray.get(actor.where.remote())
    assert node_id == first.node_id
    spare = cluster.add_node(num_cpus=1, resources={"spot": 1})
    cluster.remove_node(first, allow_graceful=False)
    assert poolray.get(actor.where.remote(), timeout=30)[1] == spare.node_id
    assert poolray.get(actor.add.remote()) == 1


def test_actors_are_restarted_on_another_node_when_their_own_is_stopped_politely(
    cluster: Cluster,
) -> None:
    first = cluster.add_node(num_cpus=1, resources={"spot": 8})
    kind = Counter.options(max_restarts=1, max_task_retries=-1)
    actors = [kind.remote() for _ in range(8)]
    assert {poolray.get(actor.where.remote())[1] for actor in actors} == {first.node_id}
    spare = cluster.add_node(num_cpus=1, resources={"spot": 8})
    cluster.remove_node(first, allow_graceful=True)
    found = poolray.get([actor.where.remote() for actor in actors], timeout=30)
    assert {node_id for _, node_id in found} == {spare.node_id}


def test_an_actor_without_restarts_dies_with_its_node(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.remote()
    assert poolray.get(actor.add.remote()) == 1
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ActorDiedError):
        poolray.get(actor.add.remote(), timeout=30)


def test_a_lost_object_is_made_again_and_one_that_cannot_be_is_an_error(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, resources={"spot": 1})

    @poolray.remote(resources={"spot": 1}, num_cpus=0)
    def make() -> Any:
        return np.ones(300_000)

    again, lost = make.remote(), make.options(max_retries=0).remote()
    poolray.wait([again, lost], num_returns=2, timeout=20, fetch_local=False)
    cluster.add_node(num_cpus=1, resources={"spot": 1})
    cluster.remove_node(node, allow_graceful=False)
    assert poolray.get(again, timeout=30).sum() == 300_000
    with pytest.raises(ObjectLostError):
        poolray.get(lost, timeout=30)


def test_a_detached_actor_outlives_its_driver_and_its_name_is_found(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.options(name="stays", lifetime="detached").remote()
    assert poolray.get(actor.add.remote()) == 1
    poolray.shutdown()
    poolray.init(address=cluster.address, namespace="tests")
    found = poolray.get_actor("stays")
    assert poolray.get(found.add.remote(), timeout=20) == 2
    poolray.kill(found)


class Holder:
    """Keeps refs that others have made."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def keep(self, **refs: list[Any]) -> None:
        self.kept.update(refs)

    def read(self, name: str) -> int:
        return int(poolray.get(self.kept[name][0], timeout=20).sum())


@poolray.remote(num_cpus=0)
def ones(count: int) -> Any:
    return np.ones(count)


@poolray.remote(num_cpus=0)
def put_ones(holder: Any, name: str, count: int) -> None:
    poolray.get(holder.keep.remote(**{name: [poolray.put(np.ones(count))]}))


def test_what_a_detached_actor_was_given_inside_of_values_outlives_the_driver_that_made_it(
    cluster: Cluster,
) -> None:
    cluster.add_node(num_cpus=1, resources={"spot": 1})
    cluster.add_node(num_cpus=1, resources={"other": 1})
    kind = poolray.remote(num_cpus=0, resources={"spot": 0.1})(Holder)
    holder = kind.options(name="holder", lifetime="detached").remote()
    counts = {"small": 10, "large": 300_000}
    made = {}
    for name, count in counts.items():
        made[f"{name}_put"] = [poolray.put(np.ones(count))]
        for where in ("spot", "other"):
            made[f"{name}_on_{where}"] = [
                ones.options(resources={where: 0.1}).remote(count),
            ]
        put = put_ones.options(resources={"other": 0.1})
        poolray.get(put.remote(holder, f"{name}_put_by_a_task", count))
    poolray.get(holder.keep.remote(**made))
    names = [*made, *(f"{name}_put_by_a_task" for name in counts)]
    del made
    poolray.shutdown()
    poolray.init(address=cluster.address, namespace="tests")
    holder = poolray.get_actor("holder")
    found = poolray.get([holder.read.remote(name) for name in names], timeout=30)
    assert found == [counts[name.partition("_")[0]] for name in names]
    poolray.kill(holder)


def test_of_what_a_dead_node_owned_a_detached_actor_has_what_is_on_its_own_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOLRAY_AUTH_TOKEN_PATH", cluster.auth_token_path)
    cluster.add_node(num_cpus=1, resources={"spot": 1})
    drivers = cluster.add_node(num_cpus=1, resources={"drivers": 1})
    poolray.shutdown()
    poolray.init(address=f"poolray://{drivers.address}", namespace="tests")
    kind = poolray.remote(num_cpus=0, resources={"spot": 0.1})(Holder)
    holder = kind.options(name="holder", lifetime="detached").remote()
    here = ones.options(resources={"spot": 0.1})
    made = {"small": [poolray.put(np.ones(10))], "here": [here.remote(300_000)]}
    made["gone"] = [poolray.put(np.ones(300_000))]
    poolray.wait(made["here"], fetch_local=False)
    poolray.get(holder.keep.remote(**made))
    drivers.kill()
    poolray.shutdown()
    poolray.init(address=cluster.address, namespace="tests")
    holder = poolray.get_actor("holder")
    assert poolray.get(holder.read.remote("small"), timeout=20) == 10
    assert poolray.get(holder.read.remote("here"), timeout=20) == 300_000
    with pytest.raises(OwnerDiedError, match=drivers.node_id[:12]):
        poolray.get(holder.read.remote("gone"), timeout=30)
    poolray.kill(holder)


class Heavy:
    """Its code, its argument and what a ref stands for are all too large for a message."""

    code = bytes(300_000)

    def __init__(self, array: Any, again: Any, number: int) -> None:
        self.sums = int(array.sum()), int(again.sum()), number

    def get(self) -> tuple[tuple[int, int, int], str]:
        return self.sums, poolray.get_runtime_context().get_node_id()


@pytest.mark.parametrize("with_head", [False, True], ids=["", "and the head"])
def test_a_large_detached_actor_is_made_again_when_the_node_that_made_it_is_killed(
    cluster: Cluster, with_head: bool
) -> None:
    doomed = cluster.add_node(num_cpus=1, resources={"spot": 1})

    @poolray.remote(num_cpus=0, resources={"spot": 0.5})
    def make() -> Any:
        actor = (
            poolray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Heavy)
            .options(name="heavy", lifetime="detached", resources={"spot": 0.5})
            .remote(np.ones(200_000), poolray.put(np.full(100_000, 2)), poolray.put(3))
        )
        return poolray.get(actor.get.remote())

    assert poolray.get(make.remote(), timeout=20) == ((200_000, 200_000, 3), doomed.node_id)
    spare = cluster.add_node(num_cpus=1, resources={"spot": 1})
    if with_head:
        cluster.kill_head()
    cluster.remove_node(doomed, allow_graceful=False)
    if with_head:
        cluster.restart_head()
    found = poolray.get_actor("heavy")
    assert poolray.get(found.get.remote(), timeout=40) == ((200_000, 200_000, 3), spare.node_id)
    poolray.kill(found)


def test_work_of_a_driver_that_is_killed_ends_where_its_detached_actor_lives_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=4, resources={"spot": 9})
    script = tmp_path / "driver.py"
    script.write_text(
        """
import os, pathlib, signal, sys
import poolray

poolray.init(address=sys.argv[1], namespace="tests")


def hold(path):
    pathlib.Path(path).write_text(str(os.getpid()))
    signal.pause()


class Keeper:
    def keep(self, refs):
        self.refs = refs
        return os.getpid()

    def kept(self):
        return poolray.get(self.refs)

    def hold(self, path):
        hold(path)


def parent(path):
    return poolray.get(there(hold).remote(path))


def useful(path):
    open(path).read()
    return "was wanted"


def there(what):
    return poolray.remote(num_cpus=0, resources={"spot": 1})(what)


folder = sys.argv[2]
os.mkfifo(folder + "/go")
keeper = there(Keeper).options(name="keeper", lifetime="detached").remote()
poolray.get(keeper.keep.remote([there(useful).remote(folder + "/go")]))
other = there(Keeper).remote()
waiting = [
    there(hold).remote(folder + "/task"),
    there(parent).remote(folder + "/child"),
    other.hold.remote(folder + "/actor"),
]
signal.pause()
"""
    )
    driver = subprocess.Popen(
        [sys.executable, str(script), cluster.address, str(tmp_path)],
        env={**os.environ, "POOLRAY_AUTH_TOKEN": Path(cluster.auth_token_path).read_text()},
    )
    try:
        paths = [tmp_path / name for name in ("task", "child", "actor")]
        wait_until(
            lambda: all(p.exists() and p.read_text() for p in paths), "all that it has begun"
        )
    finally:
        driver.kill()
        driver.wait()
    pids = [int(path.read_text()) for path in paths]
    wait_until(lambda: not any(map(is_alive, pids)), "the end of their processes")
    (tmp_path / "go").write_text("x")
    keeper = poolray.get_actor("keeper")
    assert poolray.get(keeper.kept.remote(), timeout=20) == ["was wanted"]
    poolray.kill(keeper)


def test_what_runs_for_a_node_that_was_killed_is_ended(cluster: Cluster, tmp_path: Path) -> None:
    def hold(path: str) -> None:
        Path(path, str(os.getpid())).touch()
        signal.pause()

    def run_elsewhere(path: str) -> None:
        held = poolray.remote(hold).options(resources={"away": 1})
        poolray.get([held.remote(path) for _ in range(2)])

    owner = cluster.add_node(num_cpus=1, resources={"spot": 1})
    cluster.add_node(num_cpus=2, resources={"away": 2})
    cluster.wait_for_nodes()
    kind = poolray.remote(run_elsewhere).options(resources={"spot": 1}, max_retries=0)
    waiting = kind.remote(str(tmp_path))
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, "two tasks of a task")
    cluster.remove_node(owner, allow_graceful=False)
    with pytest.raises(NodeDiedError):
        poolray.get(waiting, timeout=20)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_alive, pids)), "the end of their processes")
    wait_until(lambda: poolray.available_resources().get("away") == 2, "the room that they had")


def test_a_node_that_was_taken_for_dead_joins_afresh(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.options(max_restarts=0).remote()
    _, node_id = poolray.get(actor.where.remote())
    os.kill(node.pid, signal.SIGSTOP)
    wait_until(
        lambda: any(not n["Alive"] for n in poolray.nodes()), "the end of the silent node", 20
    )
    os.kill(node.pid, signal.SIGCONT)
    wait_until(lambda: len([n for n in poolray.nodes() if n["Alive"]]) == 2, "its return", 20)
    fresh = Counter.remote()
    assert poolray.get(fresh.where.remote(), timeout=20)[1] != node_id


def test_a_fork_server_that_is_killed_is_made_again_and_nothing_fails(cluster: Cluster) -> None:
    """On the node that owns the tasks, and on one that runs some of them."""
    other = cluster.add_node(num_cpus=1, resources={"spot": 1})
    actor = Counter.options(max_restarts=1, max_task_retries=1).remote()
    assert poolray.get(actor.add.remote(), timeout=20) == 1

    @poolray.remote
    def square(number: int) -> int:
        time.sleep(0.05)
        return number * number

    refs = [square.remote(number) for number in range(40)]
    poolray.wait(refs, timeout=20)
    assert cluster.head_node is not None
    for node in (cluster.head_node, other):
        for server in psutil.Process(node.pid).children():
            server.kill()
    assert poolray.get(refs, timeout=40) == [number * number for number in range(40)]
    assert poolray.get(actor.add.remote(), timeout=20) == 1, "it is a new one"


def test_work_goes_on_while_workers_and_nodes_are_killed(cluster: Cluster) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    @poolray.remote(max_retries=-1)
    def square(number: int) -> int:
        time.sleep(0.02)
        return number * number

    refs = [square.remote(number) for number in range(150)]
    for node in nodes:
        poolray.wait(refs, num_returns=20, timeout=20)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert poolray.get(refs, timeout=40) == [number * number for number in range(150)]


def test_a_job_goes_on_where_it_was_first_heard_of_from_a_node_that_is_dead_now(
    tmp_path: Path,
) -> None:
    """That node had sent a task of a task; the driver speaks with another one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        middle = cluster.add_node(num_cpus=1, resources={"middle": 1})
        poolray.init(address=cluster.address)
        inner = poolray.remote(resources={"last": 0.1}, num_cpus=0)(lambda: "done")
        outer = poolray.remote(resources={"middle": 1})(lambda: poolray.get(inner.remote()))
        cluster.add_node(num_cpus=1, resources={"last": 1})
        assert poolray.get(outer.remote()) == "done"
        hold = poolray.remote(resources={"last": 0.1}, max_retries=0)(announce_and_hold)
        with Gate(tmp_path / "started") as started, Gate(tmp_path / "release") as release:
            running = hold.remote(started, release, "held")
            started.wait()
            cluster.remove_node(middle, allow_graceful=False)
            wait_until(lambda: len([n for n in poolray.nodes() if n["Alive"]]) == 2, "its death")
            assert poolray.get(inner.remote(), timeout=30) == "done"
            release.open()
            assert poolray.get(running, timeout=30) == "held"
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_a_daemon_whose_starter_is_gone_before_it_is_up_ends(cluster: Cluster) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert cluster._head_options is not None
    head = msgspec.structs.replace(cluster._head_options, port=0, owner_pid=gone.pid, storage="")
    node = msgspec.structs.replace(
        cluster._node_options(False, {"num_cpus": 1}), owner_pid=gone.pid
    )
    daemon = launch.start(head)
    wait_until(lambda: not daemon.is_alive(), "its end")
    with pytest.raises(ClusterConnectionError, match="was stopped before"):
        launch.start(node)


def test_actors_and_tasks_that_two_nodes_place_at_one_moment_all_get_their_room() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for name in ("left", "right"):
            cluster.add_node(num_cpus=0, resources={name: 1})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        poolray.init(address=cluster.address)

        @poolray.remote(num_cpus=1)
        class Keeper:
            def place(self) -> str:
                return str(poolray.get_runtime_context().get_node_id())

        @poolray.remote(num_cpus=0)
        def make(start: float) -> Any:
            time.sleep(max(0.0, start - time.time()))
            keeper = Keeper.remote()
            return poolray.get(keeper.place.remote(), timeout=30), keeper

        for _ in range(3):
            start = time.time() + 0.3
            asked = [make.options(resources={n: 1}).remote(start) for n in ("left", "right")]
            made = poolray.get(asked, timeout=60)
            assert len({place for place, _ in made}) == 2
            del asked, made
            wait_until(lambda: poolray.available_resources().get("CPU") == 2, "room again")
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_nodes_that_have_work_from_their_first_moment_on_are_known_to_be_up() -> None:
    """They may have forked workers before whoever starts them hears that they have joined."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        poolray.init(address=cluster.address)
        nap = poolray.remote(lambda: time.sleep(0.05))
        refs = [nap.remote() for _ in range(200)]
        for _ in range(4):
            cluster.add_node(num_cpus=1)
        assert len(poolray.get(refs, timeout=60)) == 200
    finally:
        poolray.shutdown()
        cluster.shutdown()


def test_a_daemon_is_up_when_it_says_so_whoever_else_holds_its_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_START_S", 5.0)
    reader, writer = os.pipe()
    forked = os.dup(writer)
    report(writer, Ready(pid=7, address="here", socket_name="name"))
    assert launch._await_ready(reader).pid == 7
    for descriptor in (reader, forked):
        os.close(descriptor)
