"""Cancelling tasks, as programs see it: `cancel`, and what becomes of refs, workers, children."""

from __future__ import annotations

import concurrent.futures
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from core_implementation import (
    IS_REFERENCE,
    better_than_reference,
    gate_at,
    get,
    ray,
    start_runtime,
)
from executor_support import DEADLINE_S, Gate, is_alive, leave_mark, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def echo(value: Any) -> Any:
    return value


def spin() -> None:
    """Run for long, in steps that an interrupt ends."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        time.sleep(0.01)


@ray.remote
def run_long(directory: Path, name: str = "begun") -> str:
    leave_mark(directory, name)
    spin()
    return "ran to its end"


def begin(directory: Path, name: str = "begun", **options: Any) -> Any:
    """A task that runs."""
    ref = run_long.options(**options).remote(directory, name)
    wait_until((directory / name).exists)
    return ref


def marks(directory: Path, name: str = "begun") -> int:
    path = directory / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_cancelled(ref: Any) -> None:
    with pytest.raises(ray.exceptions.TaskCancelledError) as caught:
        get(ref)
    assert isinstance(caught.value, ray.exceptions.RayError)
    assert not isinstance(caught.value, KeyboardInterrupt)


# --- what can be cancelled ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [5, "ref", None, [1], object()], ids=lambda wrong: type(wrong).__name__
)
def test_only_refs_can_be_cancelled(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"ray\.cancel\(\) only supported for object refs"):
        ray.cancel(wrong)


def test_a_list_of_refs_and_a_future_are_no_refs() -> None:
    ref = echo.remote(1)
    for wrong in ([ref], ref.future()):
        with pytest.raises(TypeError, match="only supported for object refs"):
            ray.cancel(wrong)


def test_options_are_keywords() -> None:
    ref = echo.remote(1)
    with pytest.raises(TypeError):
        ray.cancel(ref, True)
    with pytest.raises(TypeError):
        ray.cancel(ref, hard=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_task_that_has_ended_stays_as_it_is(force: bool) -> None:
    ref = echo.remote("value")
    assert get(ref) == "value"
    assert ray.cancel(ref, force=force) is None
    assert get(ref) == "value"


def test_an_object_of_put_stays_as_it_is() -> None:
    ref = ray.put("value")
    assert ray.cancel(ref) is None
    assert get(ref) == "value"


# --- tasks that have not begun -----------------------------------------------------------------


def test_a_task_that_waits_for_a_cpu_never_runs(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        blockers = [hold.remote(gate) for _ in range(4)]
        queued = run_long.remote(tmp_path, "queued")
        ray.cancel(queued)
        assert_cancelled(queued)
        gate.open(count=4)
        get(blockers)
    assert get(echo.remote(1)) == 1
    assert marks(tmp_path, "queued") == 0


@ray.remote
def hold(gate: Gate) -> str:
    gate.wait()
    return "held"


def test_a_task_that_can_run_nowhere_can_be_cancelled() -> None:
    ref = echo.options(resources={"unheard of": 1}).remote(1)
    ray.cancel(ref)
    assert_cancelled(ref)


@better_than_reference("it aborts when the argument is there afterwards", run=False)
def test_a_task_that_waits_for_an_argument_never_runs(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        argument = hold.remote(gate)
        waiting = run_long.remote(tmp_path, argument)
        ray.cancel(waiting)
        assert_cancelled(waiting)
        gate.open()
        assert get(argument) == "held"
    assert marks(tmp_path, "held") == 0


# --- tasks that run ----------------------------------------------------------------------------


def test_a_running_task_is_interrupted(tmp_path: Path) -> None:
    ref = begin(tmp_path)
    ray.cancel(ref)
    assert_cancelled(ref)
    assert get(echo.remote(1)) == 1


def test_it_may_be_cancelled_twice(tmp_path: Path) -> None:
    ref = begin(tmp_path)
    ray.cancel(ref)
    ray.cancel(ref)
    assert_cancelled(ref)
    ray.cancel(ref)
    assert_cancelled(ref)


def test_a_cancelled_task_is_not_tried_again(tmp_path: Path) -> None:
    ref = begin(tmp_path, max_retries=3, retry_exceptions=True)
    ray.cancel(ref)
    assert_cancelled(ref)
    assert marks(tmp_path) == 1


def test_a_task_may_catch_the_interrupt_and_return(tmp_path: Path) -> None:
    @ray.remote
    def catch(directory: Path) -> str:
        try:
            leave_mark(directory, "begun")
            spin()
        except KeyboardInterrupt:
            return "cleaned up"
        return "not interrupted"

    ref = catch.remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    assert get(ref) == "cleaned up"


@pytest.mark.parametrize("options", [{}, {"retry_exceptions": True, "max_retries": 2}], ids=repr)
def test_an_error_raised_instead_of_the_interrupt_is_the_tasks_error(
    options: dict[str, Any], tmp_path: Path
) -> None:
    @ray.remote
    def replace(directory: Path) -> None:
        try:
            leave_mark(directory, "begun")
            spin()
        except KeyboardInterrupt:
            raise ValueError("instead") from None

    ref = replace.options(**options).remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    with pytest.raises(ValueError, match="instead"):
        get(ref)
    assert marks(tmp_path) == 1


def test_a_task_can_ask_whether_it_was_cancelled(tmp_path: Path) -> None:
    @ray.remote
    def ask(directory: Path) -> tuple[bool, bool]:
        context = ray.get_runtime_context()
        before = context.is_canceled()
        try:
            leave_mark(directory, "begun")
            spin()
        except KeyboardInterrupt:
            pass
        return before, context.is_canceled()

    ref = ask.remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    assert get(ref) == (False, True)
    assert get(ray.remote(lambda: ray.get_runtime_context().is_canceled()).remote()) is False


def test_a_task_that_waits_in_get_is_interrupted_there(tmp_path: Path) -> None:
    @ray.remote
    def wait_for(directory: Path, refs: list[Any]) -> Any:
        leave_mark(directory, "waits")
        return ray.get(refs[0])

    with gate_at(tmp_path / "gate") as gate:
        inner = hold.remote(gate)
        ref = wait_for.remote(tmp_path, [inner])
        wait_until((tmp_path / "waits").exists)
        ray.cancel(ref)
        assert_cancelled(ref)
        gate.open()
        assert get(inner) == "held"


@better_than_reference("its interrupt waits until the sleep is over", run=False)
def test_a_task_that_sleeps_is_woken(tmp_path: Path) -> None:
    @ray.remote
    def sleep(directory: Path) -> None:
        leave_mark(directory, "begun")
        time.sleep(10 * DEADLINE_S)

    ref = sleep.remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    assert_cancelled(ref)


def test_all_return_values_of_a_task_are_cancelled_by_any(tmp_path: Path) -> None:
    first, second = run_long.options(num_returns=2).remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(second)
    assert_cancelled(first)
    assert_cancelled(second)


def test_tasks_that_need_the_cancelled_one_fail_as_it_does(tmp_path: Path) -> None:
    ref = begin(tmp_path)
    dependent = echo.remote(echo.remote(ref))
    ray.cancel(ref)
    assert_cancelled(dependent)


def test_the_error_names_the_task_and_where_it_was(tmp_path: Path) -> None:
    ref = run_long.options(name="resize_images").remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    with pytest.raises(ray.exceptions.TaskCancelledError, match=r"(?s)resize_images.*in run_long"):
        get(ref)


# --- by force ----------------------------------------------------------------------------------


def test_force_kills_the_worker(tmp_path: Path) -> None:
    @ray.remote(max_retries=3)
    def resist(directory: Path) -> None:
        leave_mark(directory, str(os.getpid()))
        leave_mark(directory, "begun")
        while True:
            try:
                spin()
            except KeyboardInterrupt:
                continue

    ref = resist.remote(tmp_path)
    wait_until(lambda: marks(tmp_path) == 1)
    (pid,) = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    ray.cancel(ref, force=True)
    with pytest.raises(ray.exceptions.TaskCancelledError) as caught:
        get(ref)
    assert not isinstance(caught.value, ray.exceptions.WorkerCrashedError)
    wait_until(lambda: not is_alive(pid))
    assert marks(tmp_path) == 1
    assert get(echo.remote(1)) == 1


def test_force_after_asking(tmp_path: Path) -> None:
    @ray.remote
    def resist(directory: Path) -> None:
        leave_mark(directory, "begun")
        try:
            spin()
        except KeyboardInterrupt:
            leave_mark(directory, "asked")
            spin()

    ref = resist.remote(tmp_path)
    wait_until((tmp_path / "begun").exists)
    ray.cancel(ref)
    wait_until((tmp_path / "asked").exists)
    ray.cancel(ref, force=True)
    assert_cancelled(ref)


# --- families ----------------------------------------------------------------------------------


@ray.remote(num_cpus=0.5)
def have_child(directory: Path) -> list[Any]:
    """Gives the ref of its child when it is interrupted."""
    child = catch_interrupt.remote(directory)
    try:
        spin()
    except KeyboardInterrupt:
        return [child]
    return []


@ray.remote(num_cpus=0.5)
def catch_interrupt(directory: Path) -> str:
    try:
        leave_mark(directory, "child")
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and not (directory / "enough").exists():
            time.sleep(0.01)
    except KeyboardInterrupt:
        return "interrupted"
    return "left alone"


@pytest.mark.parametrize("recursive", [True, False])
def test_children_are_cancelled_unless_told_otherwise(recursive: bool, tmp_path: Path) -> None:
    parent = have_child.remote(tmp_path)
    wait_until((tmp_path / "child").exists)
    ray.cancel(parent, recursive=recursive)
    (child,) = get(parent)
    if not recursive:
        leave_mark(tmp_path, "enough")
    assert get(child) == ("interrupted" if recursive else "left alone")


def test_grandchildren_are_cancelled_too(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0.1)
    def descend(directory: Path, depth: int) -> Any:
        if depth == 0:
            try:
                leave_mark(directory, "bottom")  # (the order may come before the next line)
                spin()
            except KeyboardInterrupt:
                leave_mark(directory, "interrupted")
                raise
        return ray.get(descend.remote(directory, depth - 1))

    ref = descend.remote(tmp_path, 3)
    wait_until((tmp_path / "bottom").exists)
    ray.cancel(ref)
    assert_cancelled(ref)
    wait_until((tmp_path / "interrupted").exists)


def test_a_task_cancels_what_it_has_submitted(tmp_path: Path) -> None:
    @ray.remote
    def change_its_mind(directory: Path) -> str:
        ref = run_long.remote(directory)
        wait_until((directory / "begun").exists)
        ray.cancel(ref)
        try:
            ray.get(ref)
        except ray.exceptions.TaskCancelledError:
            return "cancelled"
        return "too late"

    assert get(change_its_mind.options(num_cpus=0.5).remote(tmp_path)) == "cancelled"


def test_a_task_cancels_what_it_was_given(tmp_path: Path) -> None:
    ref = begin(tmp_path)
    get(ray.remote(lambda refs: ray.cancel(refs[0])).remote([ref]))
    assert_cancelled(ref)


# --- races -------------------------------------------------------------------------------------


@pytest.fixture
def dice() -> random.Random:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("force", [False, True])
def test_cancelling_tiny_tasks_at_any_moment_harms_no_other(
    force: bool, dice: random.Random
) -> None:
    rounds, count = (2, 40) if IS_REFERENCE else (20, 200)
    if force:
        rounds = 1 if IS_REFERENCE else 4
    for _ in range(rounds):
        refs = [echo.options(max_retries=-1).remote(n) for n in range(count)]
        victims = dice.sample(range(count), 5 if force else count // 4)
        for victim in victims:
            ray.cancel(refs[victim], force=force)
        for n, ref in enumerate(refs):
            if n not in victims:
                assert get(ref) == n
                continue
            try:
                assert get(ref) == n
            except ray.exceptions.TaskCancelledError:
                pass


def test_cancelling_many_at_once_from_several_threads(tmp_path: Path) -> None:
    refs = [run_long.remote(tmp_path) for _ in range(20)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(ray.cancel, refs))
    for ref in refs:
        assert_cancelled(ref)
    assert get(echo.remote(1)) == 1


def test_the_cancellation_of_a_child_may_become_its_parents_error(tmp_path: Path) -> None:
    @ray.remote
    def wait_for_child(directory: Path) -> Any:
        ref = run_long.remote(directory)
        wait_until((directory / "begun").exists)
        ray.cancel(ref)
        return ray.get(ref)

    parent = wait_for_child.remote(tmp_path)
    assert_cancelled(parent)
    with pytest.raises(ray.exceptions.RayTaskError):
        get(parent)
