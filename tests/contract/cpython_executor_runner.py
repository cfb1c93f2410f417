"""Run part of the interpreter's own executor tests, with another class as `ProcessPoolExecutor`.

Started by `test_cpython_executor_suite.py` as a program, for one group of test classes at a time:

    python cpython_executor_runner.py MODULE:CLASS GROUP START_METHOD REPORT

A process of its own keeps what these tests do to a process (they reap children, look for stray
threads, set alarms) away from pytest, and a hang can be ended. REPORT becomes a JSON list with one
object per test.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import pkgutil
import sys
import unittest
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

STANDARD = "concurrent.futures:ProcessPoolExecutor"
SUITE = "test.test_concurrent_futures"

# Group -> the classes of the suite that hold its tests. The suite combines each of them with every
# start method, in one module up to Python 3.11 and in a package from 3.12 on.
GROUPS = {
    "executor": ("ProcessPoolExecutorTest",),
    "initializer": ("InitializerMixin", "FailingInitializerMixin"),
    "shutdown": ("ProcessPoolShutdownTest",),
    "deadlock": ("ExecutorDeadlockTest",),
    "as_completed": ("AsCompletedTests",),
    "wait": ("WaitTests",),
}

# Tests of the standard reaction to a dead worker: pattern of Class.test -> why. They run with
# `break_on_worker_death=True`.
BREAKING = {
    "*.test_killed_child": "kills a worker and expects the executor to be broken",
}

# Tests that poolray's executor does not take: pattern of Class.test -> why.
EXCLUDED = {
    "*.test_del_shutdown": "reads the private _executor_manager_thread and _call_queue",
    "*.test_shutdown_no_wait": "reads the private _executor_manager_thread and _call_queue",
    "*.test_shutdown_deadlock_pickle": "reads the private _executor_manager_thread",
    "*.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "patches private classes",
    "*.test_python_finalization_error": "counts on which private thread is started second",
    # A task or a result that cannot be unpickled fails alone, with its own error; the standard
    # executor loses a worker or its manager thread to it and breaks.
    "*.test_error_at_task_unpickle": "expects BrokenProcessPool for a bad argument",
    "*.test_exit_at_task_unpickle": "expects BrokenProcessPool for a bad argument",
    "*.test_error_during_result_unpickle_in_result_handler": "the same for a bad result",
    "*.test_exit_during_result_unpickle_in_result_handler": "the same for a bad result",
    # The standard executor would fork beside its own threads; poolray's never does.
    "*.test_max_tasks_per_child_defaults_to_spawn_context": "poolray replaces forked workers too",
    "ProcessPoolForkProcess*.test_max_tasks_per_child": "expects forked workers not to be replaced",
    # A semaphore cannot be an argument; the standard executor starts a worker for such a call.
    "ProcessPoolSpawn*.test_processes_terminate": "counts workers started for unpicklable calls",
    "ProcessPoolForkserver*.test_processes_terminate": "counts workers of unpicklable calls",
    "ProcessPoolSpawn*.test_saturation": "counts workers started for unpicklable calls",
    "ProcessPoolForkserver*.test_saturation": "counts workers started for unpicklable calls",
}


def reason_for(test_name: str, patterns: dict[str, str]) -> str | None:
    """Why one of the patterns names this test, or None when none does."""
    for pattern, reason in patterns.items():
        if fnmatch.fnmatchcase(test_name, pattern):
            return reason
    return None


def stand_in(spec: str, *, breaking: bool) -> type:
    """The class under test, under the name by which the suite's scripts import it."""
    module, _, name = spec.partition(":")
    executor_class = getattr(importlib.import_module(module), name)
    if spec == STANDARD:
        return executor_class

    class ProcessPoolExecutor(executor_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if breaking:
                kwargs["break_on_worker_death"] = True
            super().__init__(*args, **kwargs)

    return ProcessPoolExecutor


def substitute(spec: str, *, breaking: bool = False) -> type:
    """Make `concurrent.futures` offer the class under test as `ProcessPoolExecutor`."""
    executor_class = stand_in(spec, breaking=breaking)
    futures.ProcessPoolExecutor = executor_class
    return executor_class


def suite_modules() -> Iterator[ModuleType]:
    suite = importlib.import_module(SUITE)
    yield suite
    for info in pkgutil.iter_modules(getattr(suite, "__path__", ())):
        yield importlib.import_module(f"{SUITE}.{info.name}")


def substitute_in_scripts(module: ModuleType, spec: str) -> None:
    """Let the scripts that the module starts see the substitute too.

    They run isolated from the environment, so all they need to know is put in front of them.
    """
    if not hasattr(module, "assert_python_ok"):
        return
    run_script: Callable[..., Any] = module.assert_python_ok
    prologue = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import {Path(__file__).stem} as runner; runner.substitute({spec!r})\n"
    )

    def run_with_substitute(option: str, script: str) -> Any:
        assert option == "-c"
        return run_script(option, prologue + script)

    module.assert_python_ok = run_with_substitute


def cases(group: str, start_method: str, spec: str) -> Iterator[unittest.TestCase]:
    """The tests of a group, for one way to start processes."""
    seen: set[type] = set()
    for module in suite_modules():
        substitute_in_scripts(module, spec)
        for candidate in vars(module).values():
            if not isinstance(candidate, type) or not issubclass(candidate, unittest.TestCase):
                continue
            bases = {base.__name__ for base in candidate.__mro__}
            if f"ProcessPool{start_method.capitalize()}Mixin" not in bases or candidate in seen:
                continue
            if bases.intersection(GROUPS[group]):
                seen.add(candidate)
                yield from unittest.defaultTestLoader.loadTestsFromTestCase(candidate)


def run_case(case: unittest.TestCase, spec: str) -> dict[str, str]:
    test_name = ".".join(case.id().rsplit(".", 2)[-2:])
    if spec != STANDARD and (reason := reason_for(test_name, EXCLUDED)):
        return {"test": test_name, "outcome": "excluded", "detail": reason}
    breaking = spec != STANDARD and reason_for(test_name, BREAKING) is not None
    case.executor_type = substitute(spec, breaking=breaking)
    result = unittest.TestResult()
    case.run(result)
    problems = [text for _, text in [*result.failures, *result.errors]]
    if problems:
        return {"test": test_name, "outcome": "failed", "detail": "\n".join(problems)}
    if result.skipped:
        return {"test": test_name, "outcome": "skipped", "detail": result.skipped[0][1]}
    return {"test": test_name, "outcome": "passed", "detail": ""}


def main(spec: str, group: str, start_method: str, report: str) -> None:
    from test import support

    # Leaves out what waits for seconds on purpose; the contract tests show the same with a gate.
    support.use_resources = ()
    support.verbose = False
    substitute(spec)
    records = []
    for case in cases(group, start_method, spec):
        records.append(run_case(case, spec))
        # After each test: a report is there also when a later one hangs or crashes.
        Path(report).write_text(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
