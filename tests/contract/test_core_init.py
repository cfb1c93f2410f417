"""The life of a runtime: `init`, `shutdown`, `is_initialized`, and starting by first use.

Each test here starts runtimes of its own, and stops the one that other files share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_implementation import IS_REFERENCE, better_than_reference, gate_at, get, init, ray
from executor_support import Gate, is_alive, wait_until


@pytest.fixture(autouse=True)
def _no_runtime() -> Iterator[None]:
    ray.shutdown()
    yield
    ray.shutdown()


@ray.remote
def pid() -> int:
    return os.getpid()


@ray.remote
def echo(value: Any) -> Any:
    return value


# --- start and stop ----------------------------------------------------------------------------


def test_init_starts_and_shutdown_stops() -> None:
    assert not ray.is_initialized()
    init(num_cpus=1)
    assert ray.is_initialized()
    ray.shutdown()
    assert not ray.is_initialized()


def test_shutdown_may_be_called_at_any_time_and_any_number_of_times() -> None:
    assert ray.shutdown() is None
    init(num_cpus=1)
    assert ray.shutdown() is None
    assert ray.shutdown() is None


def test_shutdown_ends_the_workers() -> None:
    init(num_cpus=2)
    workers = set(get([pid.remote() for _ in range(20)]))
    assert os.getpid() not in workers
    ray.shutdown()
    wait_until(lambda: not any(map(is_alive, workers)))


def test_a_runtime_can_be_started_again_and_old_functions_still_run() -> None:
    for value in range(2):
        init(num_cpus=1)
        assert get(echo.remote(value)) == value
        ray.shutdown()


USES_OF_A_REF = {
    "get": lambda ref: ray.get(ref, timeout=5),
    "get of a list": lambda ref: ray.get([ref], timeout=5),
    "wait": lambda ref: ray.wait([ref], timeout=5),
    "argument": lambda ref: ray.get(echo.remote(ref), timeout=5),
    "keyword argument": lambda ref: ray.get(echo.remote(value=ref), timeout=5),
    "inside an argument": lambda ref: ray.get(echo.remote([ref]), timeout=5),
    "inside a value": lambda ref: ray.get(ray.put([ref]), timeout=5),
}


@pytest.mark.parametrize("again", [True, False], ids=["after init", "before init"])
@pytest.mark.parametrize("use", USES_OF_A_REF.values(), ids=USES_OF_A_REF.keys())
def test_a_ref_of_an_earlier_runtime_is_refused_and_does_not_hang(
    use: Callable[[Any], object], again: bool
) -> None:
    init(num_cpus=1)
    refs = [ray.put(1), echo.remote(1)]
    get(refs)
    ray.shutdown()
    if again:
        init(num_cpus=1)
    for ref in refs:
        with pytest.raises(
            ValueError, match=r"owner is unknown|has been shut down|another runtime"
        ):
            use(ref)


@better_than_reference("a future of an object that is gone waits for ever")
def test_a_future_of_an_earlier_runtime_is_refused_and_nothing_is_started_for_it() -> None:
    init(num_cpus=1)
    ref = echo.remote(1)
    ray.shutdown()
    with pytest.raises(ValueError, match="has been shut down"):
        ref.future().result(0.5)
    with pytest.raises(ValueError, match="has been shut down"):
        ray.get(ref)
    assert not ray.is_initialized()


def test_the_context_that_init_returns_describes_the_runtime_and_stops_it() -> None:
    with init(num_cpus=1) as context:
        assert context.address_info["node_id"] == ray.get_runtime_context().get_node_id()
        assert ray.is_initialized()
    assert not ray.is_initialized()


# --- a second start ----------------------------------------------------------------------------


def test_a_second_init_is_refused_and_says_how_to_allow_it() -> None:
    init(num_cpus=1)
    ref = echo.remote("first")
    for options in ({}, {"num_cpus": 2}):
        with pytest.raises(RuntimeError, match=r"twice.*ignore_reinit_error=True.*shutdown\(\)"):
            ray.init(**options)
    assert get(ref) == "first"


def test_ignore_reinit_error_keeps_the_runtime_as_it_is() -> None:
    first = init(num_cpus=1)
    ref = echo.remote("kept")
    # The options of the second call are ignored, also those that contradict the first.
    second = ray.init(num_cpus=2, ignore_reinit_error=True)
    assert second.address_info["node_id"] == first.address_info["node_id"]
    assert get(ref) == "kept"
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(echo.options(num_cpus=2).remote(1), timeout=0.2)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"no_such_option": 1}, RuntimeError, "no_such_option"),
        ({"num_cpus": -1}, ValueError, "nonnegative.*CPU|num_cpus.*negative"),
        ({"num_cpus": 1.5}, ValueError, "whole number"),
        # The reference asserts; a wrong type is a `TypeError` everywhere else.
        ({"num_cpus": "2"}, (AssertionError, TypeError), "CPU"),
        ({"resources": {"CPU": 2}}, (AssertionError, ValueError), "CPU.*default resource"),
        ({"resources": 3}, TypeError, None),
        ({"object_store_memory": 1}, ValueError, "object store memory|object_store_memory"),
        ({"namespace": ""}, ValueError, "namespace"),
        ({"namespace": 3}, TypeError, "namespace"),
    ],
    ids=repr,
)
def test_a_bad_option_is_refused(
    options: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        init(**options)


@pytest.mark.skipif(IS_REFERENCE, reason="they are the reference's own")
@pytest.mark.parametrize(
    "options", [{"runtime_env": {"pip": ["x"]}}, {"dashboard_port": 8265}, {"_temp_dir": "/x"}]
)
def test_what_only_the_reference_can_do_is_refused_in_words(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ray.exceptions.NotSupportedError, match=f"{name}=.*: "):
        init(**options)
    assert not ray.is_initialized()


def test_options_that_ask_for_nothing_are_accepted() -> None:
    init(num_cpus=1, runtime_env={}, logging_config=None, local_mode=False, job_config=None)
    assert get(echo.remote(1)) == 1


def test_a_local_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match="local_mode"):
        init(local_mode=True)


def test_a_refused_option_leaves_nothing_started() -> None:
    with pytest.raises(ValueError, match="namespace"):
        init(namespace="")
    assert not ray.is_initialized()
    init(num_cpus=1)
    assert get(echo.remote(1)) == 1


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        ray.init(None, 2)
    with pytest.raises(TypeError, match="positional"):
        ray.shutdown(True)
    assert not ray.is_initialized()


def test_resources_are_what_init_was_told() -> None:
    init(num_cpus=3, resources={"token": 2})
    assert get(echo.options(num_cpus=3, resources={"token": 2}).remote(1)) == 1
    for too_much in ({"num_cpus": 4}, {"resources": {"token": 3}}, {"resources": {"coin": 1}}):
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(echo.options(**too_much).remote(1), timeout=0.2)


def test_a_resource_is_held_by_one_task_at_a_time(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0, resources={"token": 1})
    def announce_and_hold(started: Gate, release: Gate) -> None:
        started.open()
        release.wait()

    init(num_cpus=2, resources={"token": 1})
    with gate_at(tmp_path / "started") as started, gate_at(tmp_path / "release") as release:
        refs = [announce_and_hold.remote(started, release) for _ in range(2)]
        started.wait()
        with pytest.raises(TimeoutError):
            started.wait(timeout_s=0.3)
        release.open()
        started.wait()
        release.open()
        get(refs)


def test_a_runtime_without_cpus_runs_only_what_needs_none() -> None:
    init(num_cpus=0)
    assert get(echo.options(num_cpus=0).remote(1)) == 1
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(echo.remote(2), timeout=0.2)


# --- first use ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda: get(echo.remote(1)),
        lambda: ray.put(1),
        lambda: ray.get([]),
        lambda: ray.wait([]),
        lambda: ray.get_runtime_context().get_node_id(),
    ],
    ids=["remote", "put", "get", "wait", "get_runtime_context"],
)
def test_first_use_starts_a_runtime(use: Callable[[], Any]) -> None:
    use()
    assert ray.is_initialized()


def test_defining_a_remote_function_starts_nothing() -> None:
    ray.remote(lambda: 1).options(num_cpus=2)
    with pytest.raises(TypeError):
        echo(1)
    assert not ray.is_initialized()
