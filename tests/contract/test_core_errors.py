"""What goes wrong in a task, and how the caller sees it: errors, dead workers, retries."""

from __future__ import annotations

import asyncio
import builtins
import faulthandler
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from core_implementation import better_than_reference, gate_at, get, ray, start_runtime
from executor_support import Gate, is_alive, leave_mark, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def call(function: Any, *args: Any) -> Any:
    return function(*args)


@ray.remote
def fail(error: BaseException) -> NoReturn:
    raise error


def failure(ref: Any) -> Any:
    """The error that `get` raises for the ref."""
    with pytest.raises(BaseException) as caught:
        get(ref)
    return caught.value


# --- the error of a task -----------------------------------------------------------------------


def test_an_error_is_a_task_error_and_of_its_own_class() -> None:
    error = failure(fail.remote(ValueError("boom", 3)))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, ray.exceptions.RayError)
    assert isinstance(error, ValueError)
    assert type(error.cause) is ValueError
    assert error.cause.args == ("boom", 3)
    assert "ValueError" in type(error).__name__


def test_the_text_of_an_error_is_the_remote_traceback() -> None:
    def deep() -> None:
        raise ValueError("deep inside")

    def outer() -> None:
        deep()

    text = str(failure(call.remote(outer)))
    assert re.search(r"test_core_errors\.py.*in outer", text)
    assert re.search(r"test_core_errors\.py.*in deep", text)
    assert 'raise ValueError("deep inside")' in text
    assert text.rstrip().endswith("ValueError: deep inside")
    assert re.search(r"call\(\).*pid=\d+", text)


def test_a_traceback_printed_by_the_driver_shows_the_remote_side() -> None:
    error = failure(fail.remote(ValueError("printed")))
    printed = "".join(traceback.format_exception(error))
    assert "in fail" in printed
    assert "ValueError: printed" in printed


def test_the_name_option_names_the_task_in_its_error() -> None:
    error = failure(fail.options(name="resize_images").remote(ValueError("boom")))
    assert "resize_images()" in str(error)


def test_an_error_behaves_as_its_cause() -> None:
    class Detailed(Exception):
        def __init__(self, code: int, detail: str) -> None:
            super().__init__(code, detail)
            self.code = code

    def fail_with_details() -> None:
        error = Detailed(7, "details")
        error.added = "afterwards"  # type: ignore[attr-defined]
        raise error

    error = failure(call.remote(fail_with_details))
    assert isinstance(error, Detailed)
    assert error.code == 7
    assert error.added == "afterwards"  # type: ignore[attr-defined]
    assert error.cause.args == (7, "details")
    assert vars(error.cause) == {"code": 7, "added": "afterwards"}


def test_every_get_raises_and_raises_the_same() -> None:
    ref = fail.remote(KeyError("again"))
    errors = [failure(ref) for _ in range(3)]
    assert [type(error.cause) for error in errors] == [KeyError] * 3
    assert len({str(error) for error in errors}) == 1


class Interrupted(BaseException):
    pass


class Slotted(Exception):
    __slots__ = ("extra",)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("key"),
        OSError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
        StopIteration("value"),
        StopAsyncIteration("value"),
        GeneratorExit("exit"),
        AssertionError(),
        MemoryError("none left"),
        RecursionError("too deep"),
        TimeoutError("late"),
        asyncio.CancelledError("cancelled"),
        subprocess.CalledProcessError(3, ["command"], b"out"),
        Interrupted("not an Exception"),
        Slotted("slots"),
        pickle.PicklingError("looks like one of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_every_class_arrive(error: BaseException) -> None:
    arrived = failure(fail.remote(error))
    assert isinstance(arrived, ray.exceptions.RayTaskError)
    assert isinstance(arrived, type(error))
    assert type(arrived.cause) is type(error)
    assert str(arrived.cause) == str(error)
    assert type(error).__name__ in str(arrived)


# Groups and notes came with it.
since_3_11 = pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")


@since_3_11
def test_an_error_may_carry_notes() -> None:
    def fail_with_note() -> None:
        error = ValueError("noted")
        error.add_note("remember this")
        raise error

    error = failure(call.remote(fail_with_note))
    assert error.cause.__notes__ == ["remember this"]
    assert "remember this" in str(error)


@since_3_11
def test_groups_can_be_caught_by_their_parts() -> None:
    group = builtins.ExceptionGroup("several", [ValueError("a"), TypeError("b")])
    error = failure(fail.remote(group))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, builtins.ExceptionGroup)
    assert [type(part) for part in error.exceptions] == [ValueError, TypeError]
    assert error.split(ValueError)[0].exceptions[0].args == ("a",)
    assert "ValueError: a" in str(error)


@since_3_11
def test_a_group_of_base_exceptions_keeps_its_text_and_cause() -> None:
    group = builtins.BaseExceptionGroup("several", [ValueError("a"), GeneratorExit("b")])
    error = failure(fail.remote(group))
    # The reference raises the plain task error here: no class can be of both kinds.
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert [type(part) for part in error.cause.exceptions] == [ValueError, GeneratorExit]
    assert "ValueError: a" in str(error)


@pytest.mark.parametrize("explicit", [True, False])
def test_the_text_has_the_whole_chain(explicit: bool) -> None:
    def chain() -> None:
        try:
            raise LookupError("first")
        except LookupError as first:
            if explicit:
                raise ValueError("second") from first
            raise ValueError("second")  # noqa: B904 - the implicit chain is what is tested

    error = failure(call.remote(chain))
    assert isinstance(error, ValueError)
    text = str(error)
    link = "direct cause" if explicit else "During handling"
    assert text.index("LookupError: first") < text.index(link) < text.index("ValueError: second")


# --- errors that do not travel well ------------------------------------------------------------


class TwoArguments(Exception):
    """Its own `__init__` does not take what it tells `Exception`: pickle rebuilds it wrongly."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.first = first


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__("keyword only")
        self.code = code


class HoldsALock(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class RefusesToPickle(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class RefusesToUnpickle(Exception):
    def __reduce__(self) -> Any:
        return int, ("not a number",)


class RefusesSubclasses(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


# Made in the task: most of these could not travel as an argument either.
UNTRAVELLED: dict[str, Callable[[], BaseException]] = {
    "custom init": lambda: TwoArguments(1, 2),
    "keyword only": lambda: KeywordOnly(code=3),
    "holds a lock": lambda: HoldsALock("locked"),
    "refuses to pickle": lambda: RefusesToPickle("stubborn"),
    "refuses to unpickle": lambda: RefusesToUnpickle("liar"),
    "refuses subclasses": lambda: RefusesSubclasses("final"),
}


def raise_made(make: Callable[[], BaseException]) -> NoReturn:
    raise make()


@pytest.mark.parametrize(
    "name",
    [
        "custom init",
        "keyword only",
        "holds a lock",
        pytest.param(
            "refuses to pickle",
            marks=better_than_reference("its worker dies of the attempt; the error is lost"),
        ),
        "refuses to unpickle",
        "refuses subclasses",
    ],
)
def test_the_text_of_every_error_arrives(name: str) -> None:
    make = UNTRAVELLED[name]
    error = failure(call.remote(raise_made, make))
    assert isinstance(error, ray.exceptions.RayError)
    assert not isinstance(error, ray.exceptions.WorkerCrashedError)
    assert f"{type(make()).__name__}: {make()}" in str(error)


@pytest.mark.parametrize("name", ["holds a lock", "refuses subclasses"])
def test_an_error_whose_class_cannot_travel_is_a_plain_task_error(name: str) -> None:
    error = failure(call.remote(raise_made, UNTRAVELLED[name]))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error.cause, Exception)
    assert str(UNTRAVELLED[name]()) in str(error.cause)


@better_than_reference("it gives up and raises an error of its own with the text")
@pytest.mark.parametrize("name", ["custom init", "keyword only"])
def test_an_error_with_an_init_of_its_own_arrives_as_its_class(name: str) -> None:
    expected = UNTRAVELLED[name]()
    error = failure(call.remote(raise_made, UNTRAVELLED[name]))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, type(expected))
    assert error.cause.args == expected.args
    assert vars(error.cause) == vars(expected)


@better_than_reference("it gives up and raises an error of its own with the text")
@pytest.mark.parametrize("name", ["refuses to pickle", "refuses to unpickle"])
def test_an_error_that_cannot_be_rebuilt_is_a_plain_task_error(name: str) -> None:
    error = failure(call.remote(raise_made, UNTRAVELLED[name]))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert str(UNTRAVELLED[name]()) in str(error)


@better_than_reference("the class it makes for each error cannot be found again")
def test_an_error_can_be_pickled_in_turn() -> None:
    error = failure(fail.remote(ValueError("sent on")))
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ray.exceptions.RayTaskError)
    assert isinstance(copy, ValueError)
    assert copy.cause.args == ("sent on",)
    assert str(copy) == str(error)


def test_a_result_that_cannot_be_pickled_fails_the_task() -> None:
    error = failure(call.remote(threading.Lock))
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error, TypeError)
    assert re.search(r"pickle.*lock", str(error))


def test_an_error_while_pickling_the_result_is_the_tasks_error() -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError("while pickling")

    assert isinstance(failure(call.remote(Hostile)), ZeroDivisionError)


# --- dependents --------------------------------------------------------------------------------


def test_an_error_passes_through_dependent_tasks(tmp_path: Path) -> None:
    def mark(_: Any) -> None:
        leave_mark(tmp_path, "ran")

    failed = fail.remote(KeyError("at the root"))
    last = echo.remote(call.remote(mark, echo.remote(failed)))
    error = failure(last)
    assert isinstance(error, KeyError)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert error.cause.args == ("at the root",)
    assert "in fail" in str(error)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_keyword_argument_fails_the_task() -> None:
    @ray.remote
    def keyword(*, value: Any) -> Any:
        return value

    assert isinstance(failure(keyword.remote(value=fail.remote(KeyError("k")))), KeyError)


def test_one_of_two_failed_arguments_is_the_error() -> None:
    @ray.remote
    def both(*_: Any) -> None:
        pass

    refs = [fail.remote(KeyError("a")), fail.remote(KeyError("b"))]
    assert isinstance(failure(both.remote(1, *refs)), KeyError)


def test_a_failed_ref_inside_a_list_fails_nobody() -> None:
    failed = fail.remote(KeyError("inside"))
    assert get(call.remote(len, [failed])) == 1


def test_an_error_got_inside_a_task_can_be_handled_there() -> None:
    def handle() -> str:
        try:
            ray.get(fail.remote(ValueError("inner")))
        except ValueError as error:
            return f"handled {type(error.cause).__name__}"  # type: ignore[attr-defined]
        return "nothing happened"

    assert get(call.remote(handle)) == "handled ValueError"


def test_an_error_got_inside_a_task_passes_out_of_it() -> None:
    def inner() -> Any:
        return ray.get(fail.remote(ValueError("inner")))

    error = failure(call.remote(inner))
    assert isinstance(error, ValueError)
    # The cause is the first error, not the error about it.
    assert type(error.cause) is ValueError
    assert error.cause.args == ("inner",)
    text = str(error)
    assert "in inner" in text
    assert "in fail" in text


def test_an_error_raised_from_another_tasks_error_has_both_texts() -> None:
    def wrap() -> None:
        try:
            ray.get(fail.remote(ValueError("inner")))
        except ValueError as error:
            raise KeyError("outer") from error

    error = failure(call.remote(wrap))
    assert isinstance(error, KeyError)
    assert "ValueError: inner" in str(error)


# --- workers that die --------------------------------------------------------------------------


def count_and_end(directory: Path, end: Callable[[], Any]) -> Any:
    leave_mark(directory, "attempts")
    return end()


def attempts(directory: Path) -> int:
    return len((directory / "attempts").read_text().splitlines())


def kill_myself(number: int) -> None:
    # Forked workers inherit the test runner's, which prints a traceback on SIGSEGV.
    faulthandler.disable()
    os.kill(os.getpid(), number)
    # Signals with a handler arrive a moment later.
    time.sleep(30)


ENDS: dict[str, Callable[[], Any]] = {
    "os._exit(5)": lambda: os._exit(5),
    "os._exit(0)": lambda: os._exit(0),
    "sys.exit(3)": lambda: sys.exit(3),
    # Also when it looks as if all was well.
    "sys.exit(0)": lambda: sys.exit(0),
    "sys.exit(text)": lambda: sys.exit("a reason"),
    "SIGKILL": lambda: kill_myself(signal.SIGKILL),
    "SIGTERM": lambda: kill_myself(signal.SIGTERM),
    "SIGSEGV": lambda: kill_myself(signal.SIGSEGV),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_worker_that_dies_is_an_error_of_its_task(name: str, tmp_path: Path) -> None:
    ref = call.options(max_retries=0).remote(count_and_end, tmp_path, ENDS[name])
    error = failure(ref)
    assert isinstance(error, ray.exceptions.WorkerCrashedError)
    assert isinstance(error, ray.exceptions.RayError)
    assert not isinstance(error, ray.exceptions.RayTaskError)
    assert attempts(tmp_path) == 1
    # The next task gets another worker.
    assert get(echo.remote(1)) == 1


@better_than_reference("it names neither the task nor the reason")
@pytest.mark.parametrize(("name", "reason"), [("SIGKILL", "SIGKILL"), ("os._exit(5)", "5")])
def test_the_error_of_a_dead_worker_names_task_process_and_reason(name: str, reason: str) -> None:
    ref = call.options(max_retries=0, name="resize_images").remote(ENDS[name])
    text = str(failure(ref))
    assert "resize_images" in text
    assert re.search(r"pid \d+", text)
    assert reason in text


@pytest.mark.parametrize("name", ["os._exit(5)", "sys.exit(0)"])
def test_a_task_whose_worker_dies_is_tried_four_times_by_default(name: str, tmp_path: Path) -> None:
    error = failure(call.remote(count_and_end, tmp_path, ENDS[name]))
    assert isinstance(error, ray.exceptions.WorkerCrashedError)
    assert attempts(tmp_path) == 4


def test_max_retries_counts_the_attempts_after_the_first(tmp_path: Path) -> None:
    ref = call.options(max_retries=1).remote(count_and_end, tmp_path, ENDS["os._exit(5)"])
    assert isinstance(failure(ref), ray.exceptions.WorkerCrashedError)
    assert attempts(tmp_path) == 2


@pytest.mark.parametrize("max_retries", [3, -1])
def test_a_retry_that_succeeds_is_the_result(max_retries: int, tmp_path: Path) -> None:
    def die_twice(directory: Path) -> str:
        leave_mark(directory, "attempts")
        if attempts(directory) < 3:
            os._exit(1)
        return "third time lucky"

    ref = call.options(max_retries=max_retries).remote(die_twice, tmp_path)
    assert get(ref) == "third time lucky"
    assert attempts(tmp_path) == 3


def test_a_task_that_kills_every_worker_leaves_the_others_their_turn(tmp_path: Path) -> None:
    killer = call.options(max_retries=-1).remote(count_and_end, tmp_path, ENDS["os._exit(5)"])
    wait_until(lambda: (tmp_path / "attempts").exists() and attempts(tmp_path) >= 2)
    assert get([echo.remote(n) for n in range(20)]) == list(range(20))
    ray.cancel(killer)
    assert isinstance(failure(killer), ray.exceptions.TaskCancelledError)


def test_a_dead_worker_passes_through_dependent_tasks() -> None:
    ref = echo.remote(call.options(max_retries=0).remote(os._exit, 1))
    assert isinstance(failure(ref), ray.exceptions.WorkerCrashedError)


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    @ray.remote
    def announce_and_hold(pid_file: Path, started: Gate, release: Gate) -> str:
        pid_file.write_text(str(os.getpid()))
        started.open()
        release.wait()
        return "finished"

    pid_file = tmp_path / "pid"
    with gate_at(tmp_path / "started") as started, gate_at(tmp_path / "release") as release:
        ref = announce_and_hold.remote(pid_file, started, release)
        started.wait()
        victim = int(pid_file.read_text())
        os.kill(victim, signal.SIGKILL)
        started.wait()
        assert int(pid_file.read_text()) != victim
        release.open()
        assert get(ref) == "finished"
    wait_until(lambda: not is_alive(victim))


def kill_and_wait(pid: int) -> None:
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


@pytest.mark.parametrize("size", [5, 1_000_000])
def test_results_outlive_the_worker_that_made_them(size: int) -> None:
    pid_ref, result = call.options(num_returns=2).remote(lambda: (os.getpid(), b"x" * size))
    kill_and_wait(get(pid_ref))
    assert get(result) == b"x" * size


@better_than_reference("the worker owns what it submits, and takes the result along")
def test_the_work_that_a_worker_submitted_outlives_it(tmp_path: Path) -> None:
    def submit(gate: Gate) -> tuple[int, list[Any]]:
        return os.getpid(), [call.remote(lambda: gate.wait() or "finished")]

    with gate_at(tmp_path / "gate") as gate:
        pid, refs = get(call.remote(submit, gate))
        kill_and_wait(pid)
        gate.open()
        assert get(refs) == ["finished"]


@pytest.mark.parametrize("size", [5, 1_000_000])
def test_what_a_worker_put_outlives_it(size: int) -> None:
    # The reference's values do so only for as long as the owner's death has not got about.
    pid, refs = get(call.remote(lambda: (os.getpid(), [ray.put(b"x" * size)])))
    kill_and_wait(pid)
    assert get(refs) == [b"x" * size]


# --- interrupts --------------------------------------------------------------------------------


def test_a_keyboard_interrupt_in_a_task_counts_as_its_cancellation(tmp_path: Path) -> None:
    def interrupt(directory: Path) -> NoReturn:
        leave_mark(directory, "attempts")
        raise KeyboardInterrupt("from user code")

    error = failure(call.remote(interrupt, tmp_path))
    assert isinstance(error, ray.exceptions.TaskCancelledError)
    assert not isinstance(error, KeyboardInterrupt)
    assert attempts(tmp_path) == 1
    assert get(echo.remote(1)) == 1


def test_an_interrupt_signal_does_not_disturb_a_worker() -> None:
    # Ctrl-C reaches every process of a terminal; what it means is for the driver to decide.
    def interrupted() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "went on"

    assert get(call.remote(interrupted)) == "went on"


# --- retries of errors -------------------------------------------------------------------------


def always_fail(directory: Path) -> NoReturn:
    leave_mark(directory, "attempts")
    raise FileNotFoundError("always")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # An error is the task's answer; only dead workers are retried by default.
        ({}, 1),
        ({"max_retries": 5}, 1),
        ({"retry_exceptions": False}, 1),
        ({"retry_exceptions": []}, 1),
        ({"retry_exceptions": True, "max_retries": 0}, 1),
        ({"retry_exceptions": True, "max_retries": 1}, 2),
        ({"retry_exceptions": True}, 4),
        ({"retry_exceptions": [FileNotFoundError], "max_retries": 1}, 2),
        ({"retry_exceptions": (KeyError, OSError), "max_retries": 1}, 2),
        ({"retry_exceptions": [KeyError], "max_retries": 1}, 1),
    ],
    ids=repr,
)
def test_errors_are_retried_only_on_request(
    options: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    error = failure(call.options(**options).remote(always_fail, tmp_path))
    assert isinstance(error, FileNotFoundError)
    assert attempts(tmp_path) == expected


def test_a_retried_error_that_goes_away_leaves_the_result(tmp_path: Path) -> None:
    def fail_twice(directory: Path) -> str:
        leave_mark(directory, "attempts")
        if attempts(directory) < 3:
            raise OSError("not yet")
        return "done"

    ref = call.options(retry_exceptions=[OSError]).remote(fail_twice, tmp_path)
    assert get(ref) == "done"
    assert attempts(tmp_path) == 3


def test_errors_and_deaths_share_the_attempts(tmp_path: Path) -> None:
    def alternate(directory: Path) -> NoReturn:
        leave_mark(directory, "attempts")
        if attempts(directory) % 2:
            os._exit(1)
        raise ValueError("even attempt")

    ref = call.options(max_retries=3, retry_exceptions=True).remote(alternate, tmp_path)
    assert isinstance(failure(ref), ValueError)
    assert attempts(tmp_path) == 4


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ActorDiedError", ()),
        ("ActorPlacementGroupRemoved", ()),
        ("ActorUnavailableError", ("it is busy", b"\x01" * 16)),
        ("GetTimeoutError", ()),
        ("LocalRayletDiedError", ()),
        ("NodeDiedError", ("it is gone",)),
        ("ObjectFetchTimedOutError", ("ab" * 28, None, "")),
        ("ObjectFreedError", ("ab" * 28, None, "")),
        ("ObjectLostError", ("ab" * 28, None, "")),
        ("ObjectReconstructionFailedError", ("ab" * 28,)),
        ("ObjectStoreFullError", ()),
        ("OutOfDiskError", ()),
        ("OutOfMemoryError", ("it was too much",)),
        ("OwnerDiedError", ("ab" * 28, None, "")),
        ("PendingCallsLimitExceeded", ()),
        ("RayActorError", ()),
        ("RayTaskError", ("f", "its traceback", ValueError("cause"))),
        ("RuntimeEnvSetupError", ()),
        ("TaskCancelledError", ()),
        ("TaskPlacementGroupRemoved", ()),
        ("WorkerCrashedError", ()),
    ],
)
def test_programs_can_raise_the_errors_themselves(name: str, args: tuple[Any, ...]) -> None:
    error = getattr(ray.exceptions, name)(*args)
    with pytest.raises(getattr(ray.exceptions, name)) as caught:
        raise error
    assert isinstance(caught.value, ray.exceptions.RayError)
    if args and name != "RayTaskError":
        assert args[0] in str(caught.value)
