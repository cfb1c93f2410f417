"""Every test here starts without a runtime, ends without one, and must leave nothing behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import poolray
from tests.integration.support import Gate, ScriptResult, census, run_script, wait_until

# A test that takes this long hangs, unless it says otherwise.
TIMEOUT_S = 60


def pytest_itemcollected(item: pytest.Item) -> None:
    has_plugin = item.config.pluginmanager.hasplugin("timeout")
    if has_plugin and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    # From Python 3.12 on every fork beside a thread warns, also those that a test asks for.
    item.add_marker(pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"))


@pytest.fixture(scope="session", autouse=True)
def helper_of_multiprocessing() -> None:
    """Start the process that the standard library keeps, before anything is counted."""
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Compare this process before and after: processes, descriptors, threads, mappings."""
    poolray.shutdown()
    gc.collect()  # what an earlier test of this process left to the collector is not ours
    before = census()
    yield
    poolray.shutdown()
    gc.collect()
    wait_until(lambda: set(census().children) <= set(before.children), "the end of processes", 10)
    after = census()
    # Fewer is no leak: another test's rest may have been collected meanwhile.
    assert not Counter(after.descriptors) - Counter(before.descriptors)
    assert not Counter(after.threads) - Counter(before.threads)
    assert after.arenas <= before.arenas


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Callable[[str], Gate]]:
    """Make gates, which open when the test ends."""
    made: list[Gate] = []

    def make(name: str) -> Gate:
        made.append(Gate(tmp_path / f"gate-{name}"))
        return made[-1]

    yield make
    for gate in made:
        gate.open(1024)
        gate.close()


@pytest.fixture
def started(gates: Callable[[str], Gate]) -> Gate:
    return gates("started")


@pytest.fixture
def release(gates: Callable[[str], Gate]) -> Gate:
    return gates("release")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., ScriptResult]:
    """Run a program to its end."""
    return lambda body, *options, **keywords: run_script(
        tmp_path / "script.py", body, *options, **keywords
    )
