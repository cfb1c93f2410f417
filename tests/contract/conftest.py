"""Choose what the contract tests run on: the standard library's class, then poolray's.

A test that takes `pool_implementation` or `executor_implementation` runs once for each class, and
must see the same answers and the same exceptions. One marked `poolray_only` shows what poolray adds
where the standard class hangs, refuses or promises nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# A test that takes this long hangs: the slowest needs a few seconds, most need milliseconds.
TIMEOUT_S = 60

# Fixture -> the classes it stands for, each by its test id, module and name in there.
# `multiprocessing.Pool` is no class but a function that makes a `multiprocessing.pool.Pool`.
IMPLEMENTATIONS = {
    "pool_implementation": {
        "multiprocessing": ("multiprocessing.pool", "Pool"),
        "poolray": ("poolray", "Pool"),
    },
    "executor_implementation": {
        "concurrent.futures": ("concurrent.futures", "ProcessPoolExecutor"),
        "poolray": ("poolray", "Executor"),
    },
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "poolray_only: what the standard class does not promise")


def pytest_itemcollected(item: pytest.Item) -> None:
    has_plugin = item.config.pluginmanager.hasplugin("timeout")
    if has_plugin and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    # From Python 3.12 on every fork beside a thread warns; the standard pools do that by design.
    item.add_marker(pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    poolray_only = metafunc.definition.get_closest_marker("poolray_only") is not None
    for fixture, candidates in IMPLEMENTATIONS.items():
        if fixture in metafunc.fixturenames:
            names = [
                name
                for name, (module, attribute) in candidates.items()
                if (name == "poolray" or not poolray_only) and exists(module, attribute)
            ]
            metafunc.parametrize(fixture, names, indirect=True, scope="session")


def exists(module: str, attribute: str) -> bool:
    return hasattr(importlib.import_module(module), attribute)


def implementation_class(request: pytest.FixtureRequest) -> Any:
    module, attribute = IMPLEMENTATIONS[str(request.fixturename)][request.param]
    return getattr(importlib.import_module(module), attribute)


@pytest.fixture(scope="session")
def pool_implementation(request: pytest.FixtureRequest) -> Any:
    """The `Pool` class under test."""
    return implementation_class(request)


@pytest.fixture(scope="session")
def executor_implementation(request: pytest.FixtureRequest) -> Any:
    """The `Executor` class under test."""
    return implementation_class(request)


@pytest.fixture
def make_pool(pool_implementation: Any) -> Iterator[Callable[..., Any]]:
    """Make pools, of two processes unless told otherwise, that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(processes: int | None = 2, *args: Any, **kwargs: Any) -> Any:
            pool = pool_implementation(processes, *args, **kwargs)
            stack.callback(pool.join)
            stack.callback(pool.terminate)
            return pool

        yield make


@pytest.fixture
def pool(make_pool: Callable[..., Any]) -> Any:
    """A running pool of two processes."""
    return make_pool()
