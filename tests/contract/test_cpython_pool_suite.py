"""CPython's own tests of `multiprocessing.Pool`, run on the standard class and on poolray's.

The tests are those of the interpreter that runs this file, so they differ a little from one version
of Python to the next. They reach the pool as `self.Pool`, `multiprocessing.Pool` or
`multiprocessing.pool.Pool`, which all become the class under test, or import it in scripts that
they write, which are changed on their way to the disk.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.pool
import os
import unittest
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from pool_support import python_path

NO_SUITE = "this Python comes without its test package"
suite: Any = pytest.importorskip("test._test_multiprocessing", reason=NO_SUITE)
main_suite: Any = pytest.importorskip("test.test_multiprocessing_main_handling", reason=NO_SUITE)

# Class of the suite -> the tests of it that concern pools; None for all of them.
POOL_TESTS: dict[str, tuple[str, ...] | None] = {
    "_TestPool": None,
    "_TestPoolWorkerErrors": None,
    "_TestPoolWorkerLifetime": None,
    "TestPoolNotLeakOnFailure": None,
    "TestInitializers": ("test_pool_initializer",),
    "TestStdinBadfiledescriptor": ("test_pool_in_process",),
}

# Pools in scripts, packages and zip files, by start method.
MAIN_TESTS = ["ForkCmdLineTest", "SpawnCmdLineTest"]

# Tests that cannot be asked of another class than the standard one. All else must pass.
EXCLUDED = {
    "test_release_unused_processes": (
        "a fake context counts the Process objects that it is asked for;"
        " poolray's workers come from its own fork server"
    ),
    "test_worker_finalization_via_atexit_handler_of_multiprocessing": (
        "its script names multiprocessing.Pool in a literal inside the test;"
        " test_pool_scripts.py runs the same script"
    ),
}


def unpicklable_result() -> Iterator[None]:
    """What no pickler takes, where the suite returns a lambda, which can go by value."""
    return (None for _ in ())


def class_under_test(pool_class: Any) -> Any:
    """The class with the one private method that the suite calls and no user does.

    `test_pool_worker_lifetime` starts the replacements itself instead of waiting for them.
    """
    if hasattr(pool_class, "_repopulate_pool"):
        return pool_class
    return type("Pool", (pool_class,), {"_repopulate_pool": lambda self: None})


def substituting_base(pool_class: Any) -> type:
    """A first base class that makes `pool_class` the pool of all its tests."""

    class Substituted:
        Pool = staticmethod(pool_class)

        @classmethod
        def setUpClass(cls) -> None:
            for patch in (
                mock.patch.object(multiprocessing, "Pool", pool_class),
                mock.patch.object(multiprocessing.pool, "Pool", pool_class),
                mock.patch.object(suite, "unpickleable_result", unpicklable_result),
            ):
                patch.start()
                cls.addClassCleanup(patch.stop)  # type: ignore[attr-defined]
            super().setUpClass()  # type: ignore[misc]

    return Substituted


def importing_base(pool_class: Any) -> type:
    """A first base class that lets the scripts of its tests import `pool_class`."""
    standard_import = "from multiprocessing import Pool, set_start_method\n"
    # The interpreters of these tests ignore PYTHONPATH.
    new_import = (
        f"sys.path += {python_path().split(os.pathsep)!r}\n"
        "from multiprocessing import set_start_method\n"
        f"from {pool_class.__module__} import Pool\n"
    )

    def with_new_import(make: Callable[..., Any], source_index: int) -> Callable[..., Any]:
        def make_with_new_import(*args: Any) -> Any:
            source = args[source_index].replace(standard_import, new_import)
            return make(*args[:source_index], source, *args[source_index + 1 :])

        return make_with_new_import

    class Importing:
        @classmethod
        def setUpClass(cls) -> None:
            for writer, source_index in (("make_script", 2), ("make_zip_pkg", 4)):
                write = with_new_import(getattr(main_suite, writer), source_index)
                patch = mock.patch.object(main_suite, writer, write)
                patch.start()
                cls.addClassCleanup(patch.stop)  # type: ignore[attr-defined]
            super().setUpClass()  # type: ignore[misc]

    return Importing


def bases_in_suite(name: str) -> tuple[type, ...]:
    """What the suite itself would derive the test case from."""
    found = getattr(suite, name)
    if issubclass(found, unittest.TestCase):
        return (found,)
    return (found, suite.ProcessesMixin, unittest.TestCase)


def restrictions(bases: tuple[type, ...], wanted: tuple[str, ...] | None) -> dict[str, None]:
    """Attributes that hide every test but those wanted."""
    names = {name for base in bases for name in dir(base) if name.startswith("test_")}
    return {name: None for name in sorted(names) if wanted is not None and name not in wanted}


def exclusions(bases: tuple[type, ...]) -> dict[str, Callable[..., None]]:
    """The excluded tests of these classes, each as one that says why it is skipped."""
    return {
        name: unittest.skip(reason)(lambda self: None)
        for name, reason in EXCLUDED.items()
        if any(hasattr(base, name) for base in bases)
    }


def make_test_cases(label: str, pool_class: Any, excluding: bool) -> Iterator[type]:
    """The test cases of the suite, named after what they run on."""
    first = substituting_base(class_under_test(pool_class))
    for name, wanted in POOL_TESTS.items():
        bases = bases_in_suite(name)
        attributes = {**restrictions(bases, wanted), **(exclusions(bases) if excluding else {})}
        yield type(f"{name.lstrip('_')}On{label}", (first, *bases), attributes)
    for name in MAIN_TESTS:
        bases = (importing_base(pool_class), getattr(main_suite, name))
        yield type(f"{name}On{label}", bases, {})


def add_to_module(case: type) -> None:
    # Workers find the class methods that are tasks through the name of their class.
    case.__module__ = __name__
    globals()[case.__name__] = case


for _case in make_test_cases("Multiprocessing", multiprocessing.pool.Pool, excluding=False):
    add_to_module(_case)

if hasattr(importlib.import_module("poolray"), "Pool"):
    for _case in make_test_cases(
        "Poolray", importlib.import_module("poolray").Pool, excluding=True
    ):
        add_to_module(_case)
del _case
