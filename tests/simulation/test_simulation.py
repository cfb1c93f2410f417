"""The simulator over a thousand seeds. What it found is in `tests/unit`, as messages."""

from __future__ import annotations

import pytest

from tests.simulation.actors import run_actors
from tests.simulation.run import run, run_churn

#: Seeds per test, so that tests spread over processes.
_CHUNK = 20


@pytest.mark.parametrize("first", range(0, 320, _CHUNK))
def test_one_node_keeps_its_promises(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        run(seed, steps=60, nodes=1)


@pytest.mark.parametrize("first", range(0, 200, _CHUNK))
def test_three_nodes_keep_their_promises(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        run(seed, steps=60, nodes=3)


def test_nodes_come_and_go_among_a_hundred() -> None:
    report = run_churn(1, steps=150, nodes=100)
    assert report.node_deaths > 100, "each death is told to all the others"
    assert report.values_checked > 50


def test_a_seed_decides_everything() -> None:
    for nodes in (1, 3):
        assert run(7, steps=60, nodes=nodes) == run(7, steps=60, nodes=nodes)


def test_values_errors_and_deaths_of_nodes_all_come_up() -> None:
    reports = [run(seed, steps=60, nodes=3) for seed in range(500, 510)]
    assert sum(report.values_checked for report in reports) > 100
    assert sum(report.errors_checked for report in reports) > 100
    assert sum(report.node_deaths for report in reports) > 0


@pytest.mark.parametrize("first", range(0, 480, _CHUNK))
def test_actors_keep_their_promises_on_four_nodes(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        run_actors(seed)


def test_calls_errors_and_restarts_of_heads_all_come_up() -> None:
    assert run_actors(11) == run_actors(11), "a seed decides everything"
    reports = [run_actors(seed) for seed in range(500, 510)]
    assert sum(report.values for report in reports) > 100
    assert sum(report.errors for report in reports) > 10
    assert sum(report.head_restarts for report in reports) > 0
    assert sum(report.node_deaths for report in reports) > 0
