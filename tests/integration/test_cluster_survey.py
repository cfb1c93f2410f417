"""What a program sees of all nodes: tasks, actors, workers, objects, the timeline."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import poolray
from poolray.__main__ import main
from poolray.cluster_utils import Cluster, ClusterNode
from poolray.exceptions import StateApiError
from poolray.util import memory, memory_summary
from poolray.util.state import (
    get_task,
    list_actors,
    list_objects,
    list_tasks,
    list_workers,
    summarize_actors,
    summarize_tasks,
)
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1, resources={"second": 1})
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    poolray.init(address=two_nodes.address)
    yield two_nodes
    poolray.shutdown()


def second(cluster: Cluster) -> str:
    """The id of the other node."""
    (found,) = [n["NodeID"] for n in poolray.nodes() if "second" in n["Resources"]]
    return str(found)


@poolray.remote(num_cpus=0.1, resources={"second": 0.1})
def there(value: Any) -> Any:
    return value


@poolray.remote(num_cpus=0.1)
def here(value: Any) -> Any:
    return value


def test_a_task_that_ran_elsewhere_is_listed_once_with_its_node(cluster: Cluster) -> None:
    poolray.get([there.options(name="far").remote(n) for n in range(3)], timeout=30)
    began_ms = time.time() * 1000
    poolray.get(there.options(name="timed").remote(1), timeout=30)
    rows = list_tasks(filters=[("name", "=", "far")], detail=True)
    assert [row.state for row in rows] == ["FINISHED"] * 3
    assert {row.node_id for row in rows} == {second(cluster)}
    assert len({row.task_id for row in rows}) == 3
    job_id = poolray.get_runtime_context().get_job_id()
    assert {row.job_id for row in rows} == {job_id}
    (timed,) = list_tasks(filters=[("name", "=", "timed")], detail=True)
    assert timed.end_time_ms is not None
    assert began_ms - 1000 < timed.end_time_ms < time.time() * 1000 + 1000
    found = get_task(timed.task_id)
    assert found is not None
    assert not isinstance(found, list)
    assert found.node_id == timed.node_id


def test_a_task_that_runs_elsewhere_is_running(cluster: Cluster) -> None:
    @poolray.remote(resources={"second": 0.1}, name="slow")
    def slow() -> None:
        time.sleep(60)

    ref = slow.remote()
    wait_until(
        lambda: [t.state for t in list_tasks(filters=[("name", "=", "slow")])] == ["RUNNING"],
        "the task to run",
    )
    (row,) = list_tasks(filters=[("name", "=", "slow")], detail=True)
    assert row.node_id == second(cluster)
    assert row.worker_pid is not None
    poolray.cancel(ref, force=True)


def test_a_task_that_failed_elsewhere_says_why(cluster: Cluster) -> None:
    @poolray.remote(resources={"second": 0.1}, name="bad", max_retries=0)
    def bad() -> None:
        raise KeyError("no such thing")

    with pytest.raises(KeyError):
        poolray.get(bad.remote(), timeout=30)
    (row,) = list_tasks(filters=[("name", "=", "bad")], detail=True)
    assert (row.state, row.error_type) == ("FAILED", "TASK_EXECUTION_EXCEPTION")
    assert "no such thing" in (row.error_message or "")
    assert row.node_id == second(cluster)


def test_an_actor_is_listed_once_where_it_lives(cluster: Cluster) -> None:
    @poolray.remote(resources={"second": 0.1})
    class Keeper:
        def pid(self) -> int:
            return os.getpid()

    keeper = Keeper.options(name="far keeper").remote()
    pid = poolray.get(keeper.pid.remote(), timeout=30)
    (row,) = list_actors(filters=[("name", "=", "far keeper")])
    assert (row.state, row.pid, row.node_id) == ("ALIVE", pid, second(cluster))
    assert summarize_actors()["cluster"]["summary"]["Keeper"]["state_counts"] == {"ALIVE": 1}
    assert pid in {worker.pid for worker in list_workers(filters=[("is_alive", "=", True)])}
    poolray.kill(keeper)
    wait_until(
        lambda: [a.state for a in list_actors(filters=[("name", "=", "far keeper")])] == ["DEAD"],
        "the actor's end",
    )
    (row,) = list_actors(filters=[("name", "=", "far keeper")])
    assert row.node_id == second(cluster)


def test_workers_and_objects_are_those_of_all_nodes(cluster: Cluster) -> None:
    large = poolray.get(there.remote(np.ones(300_000)), timeout=30)
    assert large.sum() == 300_000
    poolray.get(here.remote(1), timeout=30)
    nodes = {worker.node_id for worker in list_workers()}
    assert nodes == {node["NodeID"] for node in poolray.nodes()}
    assert {worker.ip for worker in list_workers()} == {
        node["NodeManagerAddress"] for node in poolray.nodes()
    }
    ref = there.remote(np.ones(300_000))
    poolray.wait([ref], timeout=30)
    assert [row.task_status for row in list_objects(filters=[("object_id", "=", ref.hex())])]


def test_the_memory_of_all_nodes_is_told_with_who_holds_what(cluster: Cluster) -> None:
    mine = poolray.put(np.ones(400_000))
    theirs = there.remote(np.ones(300_000))
    poolray.wait([theirs], timeout=30)
    viewed = poolray.get(poolray.put(np.ones(200_000)))
    text = memory_summary()
    addresses = {n.address for n in cluster.list_all_nodes()}
    for address in addresses:
        assert f"node address: {address} ---" in text
        assert f"Object store of {address} ---" in text
    lines = text.splitlines()

    def kinds(object_id: str) -> list[tuple[str, str]]:
        rows = [line.split() for line in lines if object_id in line]
        return sorted((row[0], row[4]) for row in rows)

    assert kinds(mine.hex()) == [(str(os.getpid()), "LOCAL_REFERENCE")]
    assert (str(os.getpid()), "LOCAL_REFERENCE") in kinds(theirs.hex())
    own = poolray.get_runtime_context().get_node_id()
    assert any(theirs.hex() in line and f"node {own[:12]}" in line for line in lines)
    assert any("PINNED_IN_MEMORY" in line and str(os.getpid()) in line for line in lines)
    assert f"pid: {os.getpid()} at " in memory_summary(group_by="PID", units="MB")
    assert mine.hex() not in memory_summary(stats_only=True)
    del viewed


def test_numbers_count_each_task_once(cluster: Cluster) -> None:
    before = summarize_tasks()["cluster"]["summary"].get("there", {"state_counts": {}})
    poolray.get([there.remote(n) for n in range(7)], timeout=30)
    after = summarize_tasks()["cluster"]["summary"]["there"]["state_counts"]
    assert after["FINISHED"] - before["state_counts"].get("FINISHED", 0) == 7


def test_the_timeline_has_a_row_for_each_node(cluster: Cluster) -> None:
    poolray.get([there.options(name="line").remote(1), here.options(name="line").remote(1)])
    events = poolray.timeline() or []
    numbers = {event["pid"] for event in events if event["name"] == "line"}
    assert len(numbers) == 2
    names = {e["pid"] for e in events if e["name"] == "process_name"}
    assert numbers <= names


def test_a_worker_sees_the_same(cluster: Cluster) -> None:
    poolray.get([there.options(name="seen by all").remote(n) for n in range(200)], timeout=30)

    @poolray.remote(num_cpus=0.1)
    def look() -> int:
        return len(list_tasks(filters=[("name", "=", "seen by all")], limit=1000))

    assert poolray.get([look.remote(), look.options(resources={"second": 0.1}).remote()]) == [
        200,
        200,
    ]


def test_a_node_that_does_not_answer_is_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    poolray.get(there.remote(1), timeout=30)  # the second node has a worker to tell of
    third: ClusterNode = cluster.add_node(num_cpus=1, resources={"third": 1})
    wait_until(
        lambda: any("third" in node["Resources"] for node in poolray.nodes()), "the third node"
    )
    (node_id,) = [n["NodeID"] for n in poolray.nodes() if "third" in n["Resources"]]
    daemon = psutil.Process(third.pid)
    os.kill(daemon.pid, signal.SIGSTOP)
    failures: list[str] = []

    def ask_patiently() -> None:
        try:
            list_tasks()
        except StateApiError as error:
            failures.append(str(error))

    patient = threading.Thread(target=ask_patiently)
    patient.start()
    try:
        began_s = time.monotonic()
        with pytest.raises(StateApiError, match=node_id):
            list_tasks(timeout=1)
        assert time.monotonic() - began_s < 20
        with pytest.warns(UserWarning, match=node_id):
            rows = list_workers(timeout=1, raise_on_missing_output=False)
        monkeypatch.setattr(memory, "_TIMEOUT_S", 1.0)
        with pytest.warns(UserWarning, match=node_id):
            text = memory.memory_summary()
        assert cluster.head_node is not None
        assert cluster.head_node.address in text
        assert second(cluster) in {row.node_id for row in rows}
    finally:
        cluster.remove_node(third, allow_graceful=False)  # SIGKILL, while it is asked
    patient.join(25)  # its time is up after 30 s: the node's death ends it
    assert not patient.is_alive()
    assert len(failures) == 1
    assert node_id in failures[0]
    wait_until(
        lambda: not any(n["Alive"] and "third" in n["Resources"] for n in poolray.nodes()),
        "the third node's end",
    )
    list_tasks(timeout=10)  # nobody waits for it any more


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints, in a process that has no runtime yet; it must succeed."""
    poolray.shutdown()
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_the_same_from_a_shell(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    poolray.get([there.options(name="by shell").remote(n) for n in range(3)], timeout=30)
    node_id, address = second(cluster), f"--address={cluster.address}"
    wanted = ("--filter", "name=by shell", "-f", "state!=RUNNING")
    table = said(capsys, "list", "tasks", address, *wanted, "--detail").splitlines()
    assert table[0] == "tasks: 3"
    assert all("FINISHED" in line and node_id in line for line in table[2:])
    rows = json.loads(said(capsys, "list", "tasks", address, *wanted, "--format=json"))
    assert [row["name"] for row in rows] == ["by shell"] * 3
    (one,) = json.loads(said(capsys, "get", "tasks", rows[0]["task_id"], address))
    assert one["node_id"] == node_id
    counts = json.loads(said(capsys, "summary", "tasks", address))["summary"]["there"]
    assert counts["state_counts"]["FINISHED"] >= 3
    assert "ALIVE" in said(capsys, "list", "nodes", address)
    assert said(capsys, "list", "objects", address, "--limit=0") == "objects: 0\n"
    assert "--- Object store of " in said(capsys, "memory", address, "--stats-only")
    trace = tmp_path / "trace.json"
    said(capsys, "timeline", address, "-o", str(trace))
    assert "by shell" in {event["name"] for event in json.loads(trace.read_text())}
    poolray.shutdown()
    assert main(["list", "tasks", address, "--filter", "nonsense"]) == 1
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["list", "tasks", address, "--filter", "nonsense=1"]) == 1
    assert "nonsense" in capsys.readouterr().err
    assert main(["get", "actors", "00" * 16, address]) == 1
    assert "nothing is known" in capsys.readouterr().err
