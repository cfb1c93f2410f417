"""What was lost with a node is made again, or named: chains, several returns, items, actors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.cluster_utils import Cluster, ClusterNode
from poolray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OwnerDiedError,
)
from poolray.util import placement_group
from poolray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.integration.support import Gate, is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

FAST = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 1.0}
THERE: dict[str, Any] = {"num_cpus": 0, "resources": {"there": 0.1}}
NUMBERS = 30_000  # of eight bytes: more than travels inside a message


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The driver's node, where nothing of this runs."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": FAST})
    try:
        poolray.init(address=made.address)
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


def add(cluster: Cluster) -> ClusterNode:
    return cluster.add_node(num_cpus=1, resources={"there": 1})


def lose(cluster: Cluster, node: ClusterNode) -> ClusterNode:
    """The node dies, and another one takes its place."""
    spare = add(cluster)
    cluster.remove_node(node, allow_graceful=False)
    return spare


def runs(folder: Path, name: str) -> int:
    """How often something ran."""
    path = folder / name
    return path.stat().st_size if path.exists() else 0


def note(folder: Path, name: str) -> None:
    with open(folder / name, "ab") as file:
        file.write(b"x")


@poolray.remote(**THERE)
def grow(folder: Path, name: str, before: Any = None) -> Any:
    """A large array, one more than the one before."""
    note(folder, name)
    return np.zeros(NUMBERS) if before is None else before + 1


@poolray.remote(**THERE, num_returns=3)
def several(folder: Path, name: str) -> tuple[Any, Any, Any]:
    note(folder, name)
    return np.full(NUMBERS, 1), "small", np.full(NUMBERS, 3)


@poolray.remote(**THERE)
def items(folder: Path, name: str, count: int, until: Gate | None = None) -> Iterator[Any]:
    note(folder, name)
    for number in range(count):
        yield np.full(NUMBERS, number)
    if until is not None:
        until.wait()
        yield np.full(NUMBERS, count)


@poolray.remote(**THERE, max_restarts=-1)
class Maker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        note(folder, "made")

    def array(self, number: int) -> Any:
        note(self.folder, f"array-{number}")
        return np.full(NUMBERS, number)

    def stream(self, count: int) -> Iterator[Any]:
        note(self.folder, "stream")
        for number in range(count):
            yield np.full(NUMBERS, number)


# Each of these loses one node only, and looks at many things: clusters take their time to start.


def test_what_tasks_made_is_made_again_with_all_that_it_needs(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = add(cluster)
    refs = [grow.remote(tmp_path, "0")]
    for number in range(1, 5):
        refs.append(grow.remote(tmp_path, str(number), refs[-1]))
    last = refs.pop()
    first, small, third = several.remote(tmp_path, "several")
    argument = grow.remote(tmp_path, "argument")
    dynamic = items.options(num_returns="dynamic").remote(tmp_path, "dynamic", 3)
    once = grow.options(max_retries=0).remote(tmp_path, "once")
    after = grow.remote(tmp_path, "after", once)
    made = [last, first, small, third, argument, dynamic, after]
    poolray.wait(made, num_returns=len(made), timeout=20, fetch_local=False)
    of_dynamic = list(poolray.get(dynamic, timeout=20))
    del refs, made
    lose(cluster, node)
    # A chain, from its beginning.
    assert int(poolray.get(last, timeout=40)[0]) == 4
    assert [runs(tmp_path, str(number)) for number in range(5)] == [2] * 5
    # All that one task returned, by one run.
    assert int(poolray.get(third, timeout=40)[0]) == 3
    assert int(poolray.get(first, timeout=40)[0]) == 1
    assert poolray.get(small, timeout=40) == "small"
    assert runs(tmp_path, "several") == 2
    # An argument, for the task that needs it.
    use = poolray.remote(**THERE)(lambda array: len(array))
    assert poolray.get(use.remote(argument), timeout=40) == NUMBERS
    assert runs(tmp_path, "argument") == 2
    # What a generator gave all at once.
    assert [int(poolray.get(ref, timeout=40)[0]) for ref in of_dynamic] == [0, 1, 2]
    # What may not run again is lost with words, and so is what was made of it.
    with pytest.raises(ObjectReconstructionFailedError, match="was tried 1 time"):
        poolray.get(once, timeout=40)
    with pytest.raises(ObjectLostError):
        poolray.get(after, timeout=40)


def test_items_of_generators_are_made_again_and_come_once(
    cluster: Cluster, tmp_path: Path, release: Gate
) -> None:
    node = add(cluster)
    ended = items.remote(tmp_path, "ended", 4)
    of_ended = [next(ended), next(ended)]
    running = items.remote(tmp_path, "running", 3, release)
    of_running = [next(running) for _ in range(3)]
    maker = Maker.options(max_task_retries=2).remote(tmp_path)
    actors = maker.stream.options(num_returns="streaming").remote(3)
    of_actors = [next(actors)]
    poolray.wait([ended.completed(), actors.completed()], num_returns=2, timeout=20)
    lose(cluster, node)
    release.open(10)
    assert int(poolray.get(of_ended[1], timeout=40)[0]) == 1
    assert int(poolray.get(of_ended[0], timeout=40)[0]) == 0
    assert [int(poolray.get(ref, timeout=40)[0]) for ref in ended] == [2, 3]
    assert runs(tmp_path, "ended") == 2
    assert [int(poolray.get(ref, timeout=40)[0]) for ref in of_running] == [0, 1, 2]
    assert [int(poolray.get(ref, timeout=40)[0]) for ref in running] == [3]
    assert runs(tmp_path, "running") == 2
    of_actors += list(actors)
    assert [int(poolray.get(ref, timeout=40)[0]) for ref in of_actors] == [0, 1, 2]


def test_results_of_actors_are_made_again_as_their_retries_and_restarts_allow(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = add(cluster)
    folders = [tmp_path / name for name in ("both", "restarts", "retries")]
    for folder in folders:
        folder.mkdir()
    both = Maker.options(max_task_retries=1).remote(folders[0])
    restarts = Maker.options(max_task_retries=0).remote(folders[1])
    retries = Maker.options(max_restarts=0, max_task_retries=3).remote(folders[2])
    arrays = [maker.array.remote(7) for maker in (both, restarts, retries)]
    poolray.wait(arrays, num_returns=3, timeout=20, fetch_local=False)
    lose(cluster, node)
    assert int(poolray.get(arrays[0], timeout=40)[0]) == 7
    with pytest.raises(ObjectLostError):
        poolray.get(arrays[1], timeout=40)
    with pytest.raises((ObjectLostError, ActorDiedError)):
        poolray.get(arrays[2], timeout=40)
    wait_until(lambda: runs(folders[1], "made") == 2, "the actor is made again")
    assert [runs(folder, "array-7") for folder in folders] == [2, 1, 1]


def test_what_a_dead_node_owned_or_ran_for_the_last_time_is_an_error_that_names_it(
    cluster: Cluster, tmp_path: Path, started: Gate, release: Gate
) -> None:
    node = add(cluster)

    @poolray.remote(**THERE)
    def put() -> list[Any]:
        return [poolray.put(np.zeros(NUMBERS)), grow.remote(tmp_path, "inner")]

    @poolray.remote(**THERE, max_retries=0)
    def hold() -> None:
        started.open(1)
        release.wait()

    refs = poolray.get(put.remote(), timeout=20)
    running = hold.remote()
    started.wait()
    lose(cluster, node)
    for ref in refs:
        with pytest.raises(OwnerDiedError, match=node.node_id[:12]):
            poolray.get(ref, timeout=40)
    with pytest.raises(NodeDiedError, match=node.node_id[:12]):
        poolray.get(running, timeout=40)


def test_a_placement_group_finds_another_node_and_what_runs_in_it_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = add(cluster)
    group = placement_group([{"there": 0.5}], strategy="STRICT_PACK")
    poolray.get(group.ready(), timeout=20)
    strategy = PlacementGroupSchedulingStrategy(group)
    maker = Maker.options(scheduling_strategy=strategy, max_task_retries=-1).remote(tmp_path)
    array = maker.array.remote(1)
    made = grow.options(scheduling_strategy=strategy).remote(tmp_path, "grow")
    poolray.wait([array, made], num_returns=2, timeout=20)
    spare = lose(cluster, node)
    assert int(poolray.get(array, timeout=40)[0]) == 1
    assert len(poolray.get(made, timeout=40)) == NUMBERS
    where = poolray.remote(**THERE)(lambda: poolray.get_runtime_context().get_node_id())
    found = where.options(scheduling_strategy=strategy).remote()
    assert poolray.get(found, timeout=40) == spare.node_id
    assert os.path.exists(tmp_path / "made")


# ---- detached actors -----------------------------------------------------------------------------

_MAKER = """
import numpy as np
import poolray
poolray.init(address={address!r}, namespace="n")

class Sums:
    def __init__(self, nested, direct):
        self.sums = [int(poolray.get(nested[0]).sum()), int(direct.sum())]
    def read(self):
        import os
        return os.getpid(), self.sums

refs = [poolray.put(np.ones({count})), poolray.put(np.arange({count}))]
kind = poolray.remote(Sums).options(name="sums", lifetime="detached", max_restarts=-1)
print(poolray.get(kind.remote([refs[0]], refs[1]).read.remote())[1])
"""


def test_what_a_detached_actor_was_given_is_there_when_it_is_made_again_without_its_driver(
    cluster: Cluster,
) -> None:
    """(In the reference it is gone with the driver, and so is the actor.)"""
    code = _MAKER.format(address=cluster.address, count=NUMBERS)
    token = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **token}, check=True, timeout=60
    )
    actor = poolray.get_actor("sums", namespace="n")
    pid, sums = poolray.get(actor.read.remote(), timeout=30)
    assert sums == [NUMBERS, NUMBERS * (NUMBERS - 1) // 2]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the death of the actor's process")
    again: list[Any] = []

    def is_back() -> bool:
        with contextlib.suppress(poolray.exceptions.ActorUnavailableError):
            again[:] = poolray.get(actor.read.remote(), timeout=30)
        return bool(again)

    wait_until(is_back, "the actor")
    assert again[0] != pid
    assert again[1] == sums
    poolray.kill(actor)
