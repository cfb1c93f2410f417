"""`poolray.util.state` and `timeline`: what goes on, row by row."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.exceptions import NotSupportedError, TaskCancelledError, TaskError, WorkerCrashedError
from poolray.util import placement_group, remove_placement_group, state
from tests.integration.support import DEADLINE_S, Gate, announce_and_hold, successor, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> None:
    poolray.init(num_cpus=2)


@poolray.remote
def echo(value: Any) -> Any:
    return value


@poolray.remote(max_retries=0)
def fail() -> None:
    raise ValueError("no such thing")


@poolray.remote(max_retries=0)
def die_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(3)


@poolray.remote
class Counter:
    def add(self, number: int) -> int:
        return number + 1


def names(rows: list[Any]) -> list[str]:
    return [row.name for row in rows]


# ---- tasks ---------------------------------------------------------------------------------------


def test_tasks_are_listed_in_every_state(started: Gate, release: Gate) -> None:
    hold = poolray.remote(announce_and_hold)
    running = [hold.options(name="running").remote(started, release) for _ in range(2)]
    for _ in running:
        started.wait()
    queued = echo.options(name="queued").remote(1)
    waiting = echo.options(name="waiting").remote(running[0])
    states = {row.name: row.state for row in state.list_tasks()}
    assert states == {
        "running": "RUNNING",
        "queued": "PENDING_NODE_ASSIGNMENT",
        "waiting": "PENDING_ARGS_AVAIL",
    }
    release.open(2)
    poolray.get([*running, queued, waiting], timeout=DEADLINE_S)
    assert {row.state for row in state.list_tasks()} == {"FINISHED"}
    assert names(state.list_tasks(limit=1)) == [names(state.list_tasks())[0]]


def test_a_failed_task_says_why() -> None:
    with pytest.raises(TaskError):
        poolray.get(fail.remote())
    with pytest.raises(WorkerCrashedError):
        poolray.get(die_after.remote(0.05))
    crashed, raised = state.list_tasks(filters=[("state", "=", "failed")], detail=True)
    assert (raised.error_type, raised.error_message) == (
        "TASK_EXECUTION_EXCEPTION",
        "ValueError: no such thing",
    )
    assert crashed.error_type == "WORKER_DIED"
    assert "exited with code 3" in str(crashed.error_message)
    assert crashed.end_time_ms is not None
    assert crashed.start_time_ms is not None
    assert crashed.end_time_ms - crashed.start_time_ms >= 50
    assert raised.runtime_env_info == {}


def test_a_cancelled_task_says_so(started: Gate, release: Gate) -> None:
    running = poolray.remote(announce_and_hold).options(name="running").remote(started, release)
    started.wait(1)
    poolray.cancel(running)
    with pytest.raises(TaskCancelledError):
        poolray.get(running, timeout=DEADLINE_S)
    (row,) = state.list_tasks(filters=[("name", "=", "running")])
    assert (row.state, row.error_type) == ("FAILED", "TASK_CANCELLED")


def test_each_attempt_of_a_task_has_a_row(tmp_path: Path) -> None:
    @poolray.remote(max_retries=3, retry_exceptions=True)
    def third_time(path: Path) -> str:
        before = len(path.read_text()) if path.exists() else 0
        path.write_text("x" * (before + 1))
        if before == 0:
            raise ValueError("no such luck")
        if before == 1:
            os._exit(3)
        return "at last"

    ref = third_time.remote(tmp_path / "attempts")
    assert poolray.get(ref, timeout=DEADLINE_S) == "at last"
    rows = state.get_task(ref.task_id().hex())
    assert isinstance(rows, list)
    found = [(row.attempt_number, row.state, row.error_type) for row in rows]
    assert found == [
        (2, "FINISHED", None),
        (1, "FAILED", "WORKER_DIED"),
        (0, "FAILED", "TASK_EXECUTION_EXCEPTION"),
    ]
    assert "no such luck" in str(rows[2].error_message)
    assert "exited with code 3" in str(rows[1].error_message)
    assert rows[1].worker_pid != rows[0].worker_pid
    assert len({row.task_id for row in rows}) == 1


def test_each_attempt_of_an_actors_call_has_a_row(tmp_path: Path) -> None:
    @poolray.remote(max_restarts=1, max_task_retries=1)
    class Fragile:
        def work(self, path: Path) -> int:
            if not path.exists():
                path.touch()
                os._exit(4)
            return 1

    fragile = Fragile.remote()
    ref = fragile.work.remote(tmp_path / "once")
    assert poolray.get(ref, timeout=DEADLINE_S) == 1
    rows = state.list_tasks(filters=[("task_id", "=", ref.task_id().hex())], detail=True)
    found = [(row.attempt_number, row.state) for row in rows]
    assert found == [(1, "FINISHED"), (0, "FAILED")]


def test_calls_of_actors_name_their_actor() -> None:
    actor = Counter.remote()
    poolray.get(actor.add.remote(1))
    (call,) = state.list_tasks(filters=[("type", "=", "ACTOR_TASK")])
    assert call.name == "Counter.add"
    assert call.actor_id == actor._actor_id.hex()
    summary = state.summarize_tasks()["cluster"]
    assert (summary["total_tasks"], summary["total_actor_tasks"]) == (0, 1)
    assert summary["summary"]["Counter.add"]["type"] == "ACTOR_TASK"


def test_tasks_of_a_task_name_their_parent() -> None:
    @poolray.remote
    def parent() -> tuple[str, str]:
        ref = echo.options(name="child").remote(1)
        poolray.get(ref)
        me = poolray.get_runtime_context().get_task_id()
        (row,) = state.list_tasks(filters=[("name", "=", "child")])
        return me, row.parent_task_id

    me, seen_inside = poolray.get(parent.options(name="parent").remote(), timeout=DEADLINE_S)
    assert seen_inside == me
    rows = {row.name: row for row in state.list_tasks()}
    assert rows["child"].parent_task_id == me
    assert rows["parent"].parent_task_id is None
    assert state.get_task(me).name == "parent"
    assert state.get_task("00" * 24) is None


def test_filters_limits_and_columns_are_checked() -> None:
    poolray.get([echo.options(name=f"task {n}").remote(n) for n in range(5)])
    assert names(state.list_tasks(filters=[("name", "=", "TASK 3")])) == ["task 3"]
    assert len(state.list_tasks(filters=[("name", "!=", "task 3")])) == 4
    assert len(state.list_tasks(filters=[("attempt_number", "=", 0), ("state", "!=", "x")])) == 5
    assert state.list_tasks(limit=0) == []
    for wrong in ([("name", ">", "x")], [("no column", "=", 1)], [("error_message", "=", "x")]):
        with pytest.raises(ValueError, match=r"filter"):
            state.list_tasks(filters=wrong)
    with pytest.raises(ValueError, match="10000"):
        state.list_tasks(limit=10_001)
    with pytest.raises(ValueError, match="limit"):
        state.list_tasks(limit=-1)
    with pytest.raises(ValueError, match="address"):
        state.list_tasks(address="192.0.2.1:6379")
    brief, full = state.list_tasks()[0], state.list_tasks(detail=True)[0]
    assert brief.required_resources is None
    assert full.required_resources == {"CPU": 1.0}
    assert full["name"] == full.get("name") == full.asdict()["name"] == full.name


# ---- the rest ------------------------------------------------------------------------------------


def test_objects_are_listed_and_handles_of_actors_are_none() -> None:
    actor = Counter.remote()
    poolray.get(actor.add.remote(1))
    small, large = poolray.put(1), poolray.put(np.zeros(1 << 20, np.uint8))
    rows = {row.object_id: row for row in state.list_objects()}
    assert rows.keys() == {small.hex(), large.hex()}
    assert rows[large.hex()].object_size > 1 << 20
    assert rows[large.hex()].reference_type == "PINNED_IN_MEMORY"
    assert rows[small.hex()].call_site == "disabled"
    summary = state.summarize_objects()["cluster"]
    assert summary["total_objects"] == 2
    assert summary["ref_type_counts"] == {"LOCAL_REFERENCE": 1, "PINNED_IN_MEMORY": 1}
    assert summary["callsite_enabled"] is False
    (row,) = state.get_objects(small.hex())
    assert row.task_status == "FINISHED"


def test_objects_are_counted_by_the_line_that_made_them() -> None:
    poolray.shutdown()
    poolray.init(num_cpus=1, record_ref_creation_sites=1)
    refs = [poolray.put(n) for n in range(3)]
    summary = state.summarize_objects()["cluster"]
    assert summary["callsite_enabled"] is True
    ((site, counts),) = summary["summary"].items()
    assert "test_state.py" in site
    assert counts["total_objects"] == len(refs)


def test_workers_and_what_became_of_them() -> None:
    with pytest.raises(WorkerCrashedError):
        poolray.get(die_after.remote(0))
    poolray.get(echo.remote(1))
    (dead,) = state.list_workers(filters=[("is_alive", "=", False)], detail=True)
    assert dead.exit_type == "SYSTEM_ERROR"
    assert dead.exit_detail == "The worker exited with code 3"
    alive = state.list_workers(filters=[("is_alive", "=", True)])
    assert alive
    assert state.get_worker(alive[0].worker_id).pid == alive[0].pid
    (event,) = state.list_cluster_events()
    assert event.severity == "ERROR"
    assert f"pid {dead.pid}" in event.message
    assert "exited with code 3" in event.message


# ---- placement groups ----------------------------------------------------------------------------


def test_placement_groups_are_listed_with_their_bundles() -> None:
    made = placement_group(
        [{"CPU": 1}, {"CPU": 0.5}], name="listed", bundle_label_selector=[{}, {"zone": "!in(a, b)"}]
    )
    assert made.wait(DEADLINE_S)
    (row,) = state.list_placement_groups(filters=[("name", "=", "listed")])
    assert (row.state, row.bundles, row.is_detached) == ("CREATED", None, None)
    found = state.get_placement_group(made.id.hex())
    assert found is not None
    assert found.is_detached is False
    assert found.bundles is not None
    node_id = poolray.get_runtime_context().get_node_id()
    assert found.bundles[1] == {
        "bundle_id": {"placement_group_id": made.id.hex(), "bundle_index": 1},
        "unit_resources": {"CPU": 0.5},
        "node_id": node_id,
        "label_selector": {"zone": "!in(a, b)"},
    }
    remove_placement_group(made)
    assert state.list_placement_groups(filters=[("name", "=", "listed")])[0].state == "REMOVED"
    assert state.get_placement_group("ab" * 18) is None


def test_there_are_no_logs_of_workers() -> None:
    with pytest.raises(NotSupportedError, match="straight to the driver's terminal"):
        state.list_logs(node_ip="127.0.0.1")
    with pytest.raises(NotSupportedError, match="straight to the driver's terminal"):
        state.get_log(task_id="ab" * 24)


# ---- jobs and nodes ------------------------------------------------------------------------------


def test_the_job_is_this_program() -> None:
    (job,) = state.list_jobs(detail=True)
    context = poolray.get_runtime_context()
    assert job.job_id == context.get_job_id()
    assert (job.type, job.status) == ("DRIVER", "RUNNING")
    assert job.driver_info["pid"] == str(os.getpid())
    assert job.driver_node_id == context.get_node_id()
    assert state.get_job(job.job_id) == job
    assert state.get_job("ffffffff") is None
    assert state.list_jobs(filters=[("status", "=", "FAILED")]) == []
    in_task = poolray.get(poolray.remote(lambda: state.list_jobs()[0].job_id).remote())
    assert in_task == job.job_id


def test_there_are_no_runtime_environments() -> None:
    assert state.list_runtime_envs() == []


def test_the_node_is_this_machine() -> None:
    (node,) = state.list_nodes()
    assert node.state == "ALIVE"
    assert node.resources_total["CPU"] == 2
    assert state.get_node(node.node_id).node_ip == node.node_ip


def test_a_worker_gets_long_lists_too() -> None:
    poolray.get([poolray.remote(successor).remote(n) for n in range(600)])

    def count() -> int:
        return len(state.list_tasks(limit=10_000, filters=[("state", "=", "FINISHED")]))

    assert poolray.get(poolray.remote(count).remote(), timeout=DEADLINE_S) == 600


# ---- the timeline --------------------------------------------------------------------------------


def test_the_timeline_is_a_trace_of_chrome(tmp_path: Path) -> None:
    @poolray.remote
    def nap() -> None:
        time.sleep(0.02)

    before = time.time()
    actor = Counter.remote()
    poolray.get([*(nap.remote() for _ in range(4)), actor.add.remote(1)])
    with pytest.raises(TaskError):
        poolray.get(fail.remote())
    with pytest.raises(WorkerCrashedError):
        poolray.get(die_after.remote(0.05))
    after = time.time()
    path = tmp_path / "trace.json"
    assert poolray.timeline(str(path)) is None
    events = json.loads(path.read_text())
    spans = [event for event in events if event["ph"] == "X"]
    by_name: dict[str, list[Any]] = {}
    for span in spans:
        by_name.setdefault(span["name"], []).append(span)
        assert before <= span["ts"] / 1e6 <= (span["ts"] + span["dur"]) / 1e6 <= after + 0.001
    assert len(by_name["nap"]) == 4
    assert all(span["dur"] >= 20_000 for span in by_name["nap"])
    assert by_name["Counter.add"][0]["args"]["actor_id"] == actor._actor_id.hex()
    assert by_name["die_after"][0]["dur"] >= 50_000
    assert by_name["fail"][0]["cname"] == "terrible"
    lanes: dict[int, list[Any]] = {}
    for span in spans:
        lanes.setdefault(span["tid"], []).append((span["ts"], span["ts"] + span["dur"]))
    for lane in lanes.values():  # a worker does one thing at a time
        lane.sort()
        assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(lane))
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads.keys() == lanes.keys()
    assert all(name.startswith("worker:") for name in threads.values())


def test_history_has_a_limit() -> None:
    poolray.shutdown()
    poolray.init(num_cpus=2, task_history_max=10)
    poolray.get([echo.remote(n) for n in range(50)])
    wait_until(lambda: len(state.list_tasks()) == 10, "the last ten")
    poolray.shutdown()
    poolray.init(num_cpus=2, task_history_max=0)
    poolray.get([echo.remote(n) for n in range(5)])
    assert state.list_tasks() == []
    assert poolray.timeline() == []
