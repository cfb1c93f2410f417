"""`poolray status` and `poolray drain-node`, asked of a cluster with work on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import poolray
from poolray.__main__ import main
from poolray.cluster_utils import Cluster
from poolray.util.placement_group import placement_group
from poolray.util.state import list_jobs
from tests.integration.support import Gate, announce_and_hold, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed."""
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_status_tells_what_waits_by_the_resources_that_it_asks_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    poolray.init(address=cluster.address)

    @poolray.remote
    def nothing() -> None: ...

    @poolray.remote
    class Kept: ...

    waiting = [nothing.options(num_cpus=4).remote() for _ in range(3)]
    kept = Kept.options(num_cpus=1, resources={"x": 0.5}).remote()
    group = placement_group([{"CPU": 3}] * 2, strategy="SPREAD")
    wanted = [
        " {'CPU': 4.0}: 3+ pending tasks/actors",
        " {'CPU': 1.0, 'x': 0.5}: 1+ pending tasks/actors",
        " {'CPU': 3.0} * 2 (SPREAD): 1+ pending placement groups",
    ]
    said = ""

    def is_told() -> bool:
        nonlocal said
        said = run(capsys, "status", f"--address={cluster.address}")
        return all(line in said.splitlines() for line in wanted)

    wait_until(is_told, "all demands in the status")
    lines = said.splitlines()
    assert lines.index("Total Usage:") < lines.index(" 0.0/1.0 CPU")
    assert f" 1 node_{cluster.head_node.node_id} " in said  # type: ignore[union-attr]
    for ref in waiting:
        poolray.cancel(ref)
    del kept, group
    poolray.shutdown()
    wait_until(
        lambda: " (no resource demands)" in run(capsys, "status", f"--address={cluster.address}"),
        "the end of all demands",
    )


def test_a_drained_node_ends_what_it_runs_and_leaves(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], started: Gate, release: Gate
) -> None:
    node = cluster.add_node(num_cpus=1, resources={"here": 1})
    poolray.init(address=cluster.address)
    hold = poolray.remote(announce_and_hold).options(resources={"here": 1}, max_retries=0)
    running = hold.remote(started, release, "kept")
    started.wait()
    drain = ("drain-node", f"--address={cluster.address}", f"--node-id={node.node_id}")
    why = "--reason-message=maintenance"
    idle = "--reason=DRAIN_NODE_REASON_IDLE_TERMINATION"
    # (The node itself is asked: the head may not have heard yet that it works.)
    assert "not idle" in refusal(capsys, *drain, idle, why)
    assert node.is_alive()
    preempted = "--reason=DRAIN_NODE_REASON_PREEMPTION"
    assert node.node_id in run(capsys, *drain, preempted, why)
    assert node.node_id in run(capsys, *drain, preempted, why)  # told once, asked twice
    assert "Draining:\n 1 node_" in run(capsys, "status", f"--address={cluster.address}")
    release.open()
    assert poolray.get(running, timeout=30) == "kept"
    wait_until(lambda: not node.is_alive(), "the end of the drained node")
    said = run(capsys, "status", f"--address={cluster.address}")
    assert "left the cluster: maintenance" in said
    assert "left the cluster" in refusal(capsys, *drain, preempted, why)


def test_jobs_of_all_drivers_are_listed(cluster: Cluster) -> None:
    poolray.init(address=cluster.address)
    code = f"import poolray; poolray.init(address={cluster.address!r})"
    token = {"POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path}
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **token}, check=True, timeout=60
    )
    wait_until(
        lambda: sorted(job.status for job in list_jobs()) == ["RUNNING", "SUCCEEDED"],
        "both jobs in the list",
    )
    mine = list_jobs(filters=[("status", "=", "RUNNING")])[0]
    seen = poolray.get(poolray.remote(list_jobs).remote(), timeout=30)
    assert mine.job_id in {job.job_id for job in seen if job.status == "RUNNING"}
    assert len(seen) == 2


def test_a_node_that_is_not_there_cannot_be_drained(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drain = ("drain-node", f"--address={cluster.address}", "--reason-message=x")
    preempted = "--reason=DRAIN_NODE_REASON_PREEMPTION"
    assert "no such node" in refusal(capsys, *drain, preempted, f"--node-id={'ab' * 28}")
    assert "Invalid hex ID" in refusal(capsys, *drain, preempted, "--node-id=here")
    assert "more than 0" in refusal(capsys, *drain, preempted, "--deadline-remaining-seconds=0")
