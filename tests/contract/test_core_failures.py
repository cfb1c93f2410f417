"""What is tried again, how often, and what becomes of those who wait for what failed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from core_implementation import IS_REFERENCE, get, ray, start_runtime
from executor_support import DEADLINE_S, leave_mark


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


class Flaw(ValueError):
    """An error with a class of its own."""


def attempts(directory: Path) -> int:
    path = directory / "attempt"
    return len(path.read_text().splitlines()) if path.exists() else 0


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def raise_it(directory: Path, error: BaseException, until: int = 1000) -> str:
    leave_mark(directory, "attempt")
    if attempts(directory) < until:
        raise error
    return "done"


@ray.remote
def die(directory: Path, until: int = 1000) -> str:
    leave_mark(directory, "attempt")
    if attempts(directory) < until:
        os._exit(1)
    return "done"


def failure(ref: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:
        get(ref)
    return caught.value


# --- errors of functions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "count"),
    [
        ({}, ValueError(), 1),
        ({"retry_exceptions": False, "max_retries": 2}, ValueError(), 1),
        ({"retry_exceptions": True, "max_retries": 2}, ValueError(), 3),
        ({"retry_exceptions": True, "max_retries": 0}, ValueError(), 1),
        ({"retry_exceptions": [], "max_retries": 2}, ValueError(), 1),
        ({"retry_exceptions": [ValueError], "max_retries": 2}, ValueError(), 3),
        ({"retry_exceptions": [ValueError], "max_retries": 1}, Flaw(), 2),
        ({"retry_exceptions": [Flaw], "max_retries": 1}, ValueError(), 1),
        ({"retry_exceptions": (KeyError, Flaw), "max_retries": 1}, Flaw(), 2),
        ({"retry_exceptions": [ValueError], "max_retries": 2}, KeyError(), 1),
        ({"retry_exceptions": True, "max_retries": 1}, BaseException(), 2),
    ],
    ids=str,
)
def test_errors_that_are_named_are_tried_again(
    options: dict[str, Any], error: BaseException, count: int, tmp_path: Path
) -> None:
    raised = failure(raise_it.options(**options).remote(tmp_path, error))
    assert isinstance(raised, ray.exceptions.RayTaskError)
    assert attempts(tmp_path) == count


def test_errors_may_be_tried_again_for_ever(tmp_path: Path) -> None:
    task = raise_it.options(retry_exceptions=True, max_retries=-1)
    assert get(task.remote(tmp_path, ValueError(), 8)) == "done"
    assert attempts(tmp_path) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"retry_exceptions": "ValueError"},
        {"retry_exceptions": [1]},
        {"retry_exceptions": ValueError},
        {"max_retries": -2},
        {"max_retries": 1.5},
        {"max_retries": "3"},
        {"max_calls": -1},
        {"max_calls": "3"},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        ray.remote(**options)(abs_of)


def abs_of(number: int) -> int:
    return abs(number)


# --- deaths of workers -------------------------------------------------------------------------


def test_deaths_may_be_tried_again_for_ever(tmp_path: Path) -> None:
    assert get(die.options(max_retries=-1).remote(tmp_path, 7)) == "done"
    assert attempts(tmp_path) == 7


@pytest.mark.parametrize("status", [0, 1, "text"])
def test_the_exit_of_a_worker_is_a_death(status: Any, tmp_path: Path) -> None:
    @ray.remote(max_retries=1)
    def leave(directory: Path) -> None:
        leave_mark(directory, "attempt")
        sys.exit(status)

    assert isinstance(failure(leave.remote(tmp_path)), ray.exceptions.WorkerCrashedError)
    assert attempts(tmp_path) == 2


def test_a_crash_and_an_error_are_told_apart(tmp_path: Path) -> None:
    crashed = failure(die.options(max_retries=0).remote(tmp_path))
    assert isinstance(crashed, ray.exceptions.WorkerCrashedError)
    assert not isinstance(crashed, ray.exceptions.RayTaskError)
    raised = failure(raise_it.remote(tmp_path, ValueError()))
    assert isinstance(raised, ray.exceptions.RayTaskError)
    assert not isinstance(raised, ray.exceptions.WorkerCrashedError)


def test_all_return_values_of_a_crashed_task_are_its_error() -> None:
    @ray.remote(num_returns=2, max_retries=0)
    def two() -> None:
        os._exit(1)

    for ref in two.remote():
        assert isinstance(failure(ref), ray.exceptions.WorkerCrashedError)


def test_a_task_after_a_crash_gets_a_worker_of_its_own(tmp_path: Path) -> None:
    refs = [die.options(max_retries=0).remote(tmp_path) for _ in range(4)]
    assert get([echo.remote(n) for n in range(20)]) == list(range(20))
    assert all(isinstance(failure(ref), ray.exceptions.WorkerCrashedError) for ref in refs)


# --- those who wait ----------------------------------------------------------------------------


def test_a_crash_passes_through_dependents_as_an_error_of_theirs(tmp_path: Path) -> None:
    crashed = die.options(max_retries=0).remote(tmp_path)
    for ref in (echo.remote(crashed), echo.remote(echo.remote(crashed))):
        error = failure(ref)
        assert isinstance(error, ray.exceptions.WorkerCrashedError)
        assert isinstance(error, ray.exceptions.RayTaskError)
        assert isinstance(error.cause, ray.exceptions.WorkerCrashedError)


def test_dependents_of_what_fails_never_run(tmp_path: Path) -> None:
    @ray.remote(max_retries=3, retry_exceptions=True)
    def mark(directory: Path, _: Any) -> None:
        leave_mark(directory, "dependent")

    (tmp_path / "a").mkdir()
    error = failure(mark.remote(tmp_path, raise_it.remote(tmp_path / "a", Flaw("late"))))
    assert isinstance(error, Flaw)
    assert not (tmp_path / "dependent").exists()


def test_errors_of_the_runtime_that_a_task_meets_keep_their_class() -> None:
    @ray.remote
    def waits() -> None:
        ray.get(sleep.remote(30), timeout=0.01)

    error = failure(waits.remote())
    assert isinstance(error, ray.exceptions.GetTimeoutError)
    assert isinstance(error, TimeoutError)
    assert isinstance(error, ray.exceptions.RayTaskError)


@ray.remote
def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def test_a_get_that_times_out_leaves_the_task_alone() -> None:
    ref = sleep.remote(0.3)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(ref, timeout=0.01)
    assert ray.get(ref, timeout=DEADLINE_S) == "slept"
    assert ray.get(ref, timeout=0) == "slept"


# --- limits of calls ---------------------------------------------------------------------------


def test_max_calls_holds_for_tasks_that_are_tried_again(tmp_path: Path) -> None:
    @ray.remote(max_calls=2, max_retries=-1, retry_exceptions=True)
    def pid_after(directory: Path, failures: int) -> int:
        leave_mark(directory, "attempt")
        if attempts(directory) <= failures:
            raise ValueError
        return os.getpid()

    pids = [get(pid_after.remote(tmp_path, 3)) for _ in range(4)]
    assert len(set(pids)) >= 2


@pytest.mark.skipif(IS_REFERENCE, reason="the reference reads RAY_TASK_MAX_RETRIES")
def test_the_default_of_max_retries_is_a_setting(tmp_path: Path) -> None:
    ray.shutdown()
    ray.init(num_cpus=2, max_retries=1)
    assert isinstance(failure(die.remote(tmp_path)), ray.exceptions.WorkerCrashedError)
    assert attempts(tmp_path) == 2
