"""`cluster_utils.Cluster`: who can connect to it, and what is there while it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

import poolray
from poolray.cluster.auth import read_token
from poolray.cluster_utils import Cluster

TOKEN = "POOLRAY_AUTH_TOKEN"
PROGRAM = """
import sys
import poolray
poolray.init(address=sys.argv[1])
print(poolray.get(poolray.remote(lambda: "it runs").remote()))
"""


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in (TOKEN, "POOLRAY_AUTH_TOKEN_PATH", "POOLRAY_AUTH_MODE", "POOLRAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def cluster(no_token: None) -> Iterator[Cluster]:
    made = Cluster(initialize_head=True)
    yield made
    poolray.shutdown()
    made.shutdown()


def run(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, address],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("prefix", ["", "poolray://"], ids=["here", "from outside"])
def test_a_program_that_we_start_can_connect(cluster: Cluster, prefix: str) -> None:
    found = run(prefix + cluster.address)
    assert found.stdout == "it runs\n", found.stderr


def test_a_program_with_another_token_cannot(cluster: Cluster) -> None:
    found = run(cluster.address, **{TOKEN: "another cluster's token"})
    assert found.returncode
    assert "AuthenticationError" in found.stderr


def test_a_program_without_a_token_cannot(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN)
    found = run(cluster.address)
    assert found.returncode
    assert "AuthenticationError" in found.stderr
    poolray.init(address=cluster.address)  # (we have made the cluster, and remember)


def test_the_token_is_in_the_environment_while_a_cluster_lives() -> None:
    first = Cluster(initialize_head=True)
    second = Cluster(initialize_head=True)
    assert os.environ[TOKEN] == read_token(first.auth_token_path)
    assert os.environ[TOKEN] == read_token(second.auth_token_path)
    first.shutdown()
    assert run(second.address).stdout == "it runs\n"
    second.shutdown()
    second.shutdown()
    assert TOKEN not in os.environ
    third = Cluster(initialize_head=True)
    assert TOKEN in os.environ
    third.shutdown()
    assert TOKEN not in os.environ


def test_a_token_of_the_environment_is_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "a token that was there before")
    made = Cluster(initialize_head=True)
    assert read_token(made.auth_token_path) == "a token that was there before"
    assert run(made.address).stdout == "it runs\n"
    made.shutdown()
    assert os.environ[TOKEN] == "a token that was there before"


def test_where_tokens_are_switched_off_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLRAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True)
    made.add_node(num_cpus=1)
    assert TOKEN not in os.environ
    assert not os.path.exists(made.auth_token_path)
    assert run(made.address).stdout == "it runs\n"
    poolray.init(address=made.address)
    assert len(poolray.nodes()) == 2
    poolray.shutdown()
    made.shutdown()
