"""What libraries in workers of other nodes tell the driver: metrics, progress bars, large keys."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import poolray
from poolray.cluster_utils import Cluster
from poolray.experimental import internal_kv as kv
from poolray.util.metrics import Counter, samples
from tests.integration.support import DEADLINE_S, script_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=1, resources={"second": 1})
        yield made
    finally:
        poolray.shutdown()
        made.shutdown()


def test_what_a_task_on_another_node_has_recorded_is_there_with_its_result(
    cluster: Cluster,
) -> None:
    poolray.init(address=cluster.address)

    @poolray.remote
    def work() -> str:
        Counter("on_nodes").inc()
        return poolray.get_runtime_context().get_node_id()

    def total() -> float:
        return sum(sample.value for sample in samples() if sample.name == "on_nodes")

    before = total()
    for done in range(1, 11):
        where = work.options(resources={"second": 1} if done % 2 else None).remote()
        node_id = poolray.get(where, timeout=30)
        assert node_id != cluster.head_node.node_id or not done % 2  # type: ignore[union-attr]
        assert total() - before == done


def test_a_value_that_a_worker_of_another_node_puts_may_be_large(cluster: Cluster) -> None:
    poolray.init(address=cluster.address)
    value = bytes(range(256)) * 16384

    @poolray.remote(resources={"second": 1})
    def put() -> bool:
        return kv._internal_kv_put("large", value)

    assert poolray.get(put.remote(), timeout=30) is False
    assert kv._internal_kv_get("large") == value


def run(cluster: Cluster, folder: Path, *command: str) -> str:
    """What a program of its own prints."""
    done = subprocess.run(
        [sys.executable, *command],
        env={
            **script_environment(folder),
            "POOLRAY_AUTH_TOKEN_PATH": cluster.auth_token_path,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_progress_bars_of_another_node_reach_their_end(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import poolray
            from poolray.experimental import tqdm_ray

            @poolray.remote(resources={{"second": 1}})
            def work(count):
                bar = tqdm_ray.tqdm(range(count), desc="far", flush_interval_s=0)
                return sum(1 for _ in bar)

            poolray.init(address={cluster.address!r})
            assert poolray.get(work.remote(40)) == 40
            """
        )
    )
    assert "40.0/40.0" in run(cluster, tmp_path, str(script))


def test_the_word_count_runs_unchanged_on_three_nodes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text("spam " * number + "eggs\n")
    example = str(_EXAMPLES / "word_frequencies.py")
    far = run(cluster, tmp_path, example, str(texts), "--address", cluster.address)
    near = run(cluster, tmp_path, example, str(texts), "--workers", "2")
    counted = [line for line in near.splitlines() if "spam" in line or "eggs" in line]
    assert counted
    assert [line for line in far.splitlines() if "spam" in line or "eggs" in line] == counted
