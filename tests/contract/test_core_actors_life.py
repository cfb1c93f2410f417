"""Actors: their ends, restarts and names."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_implementation import (
    DEADLINE_S,
    IS_REFERENCE,
    better_than_reference,
    gate_at,
    get,
    ray,
    start_runtime,
)
from executor_support import Gate

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"actor-{os.getpid()}-{next(_numbers)}"


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what follows an end in its own time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@ray.remote
class Worker:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, n: int = 1) -> int:
        self.value += n
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def hold(self, started: Gate, release: Gate, value: Any = None) -> Any:
        started.open()
        release.wait(DEADLINE_S)
        return value

    def die(self) -> None:
        os._exit(7)

    def die_once(self, mark: str) -> str:
        if not os.path.exists(mark):
            Path(mark).touch()
            os._exit(7)
        return "alive"

    def fail_once(self, mark: str) -> str:
        if not os.path.exists(mark):
            Path(mark).touch()
            raise OSError("once")
        return "well"

    def leave(self) -> None:
        ray.actor.exit_actor()

    def system_exit(self, code: int) -> None:
        sys.exit(code)


class Fails:
    def __init__(self) -> None:
        raise LookupError("no way to make this")

    def ping(self) -> int:
        return 1


class Hooked:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def ping(self) -> int:
        return 1

    def __ray_shutdown__(self) -> None:
        Path(self.mark).write_text("bye")


@ray.remote
class Maker:
    def make(self) -> Any:
        self.made = Worker.remote()
        ray.get(self.made.add.remote())
        return self.made

    def die(self) -> None:
        os._exit(1)


def restarted(actor: Any) -> None:
    """Wait until an actor that was killed answers again."""

    def answers() -> bool:
        try:
            get(actor.pid.remote())
        except ray.exceptions.ActorUnavailableError:
            return False
        return True

    eventually(answers)


# --- ends ----------------------------------------------------------------------------------------


def test_what_a_constructor_raises_is_in_every_call() -> None:
    actor = ray.remote(Fails).remote()
    for _ in range(2):
        with pytest.raises(ray.exceptions.ActorDiedError, match="no way to make this") as raised:
            get(actor.ping.remote())
        assert raised.value.actor_init_failed


def test_a_dead_process_fails_its_calls_now_and_later() -> None:
    actor = Worker.remote()
    pid = get(actor.pid.remote())
    for ref in (actor.die.remote(), actor.add.remote()):
        with pytest.raises(ray.exceptions.ActorDiedError, match=str(pid)):
            get(ref)
    with pytest.raises(ray.exceptions.RayActorError) as raised:
        get(actor.add.remote())
    assert raised.value.actor_id == actor._actor_id.hex()


def test_the_last_handle_ends_the_process_after_the_calls_before() -> None:
    actor = Worker.remote()
    pid = get(actor.pid.remote())
    refs = [actor.add.remote() for _ in range(100)]
    del actor
    assert get(refs)[-1] == 100
    eventually(lambda: not is_alive(pid))


def test_a_kill_ends_the_process_and_all_calls(tmp_path: Path) -> None:
    with gate_at(tmp_path / "started") as started, gate_at(tmp_path / "release") as release:
        actor = Worker.remote()
        pid = get(actor.pid.remote())
        refs = [actor.hold.remote(started, release), actor.add.remote()]
        started.wait(DEADLINE_S)
        ray.kill(actor)
        for ref in refs:
            with pytest.raises(ray.exceptions.ActorDiedError):
                get(ref)
        eventually(lambda: not is_alive(pid))
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.add.remote())
    ray.kill(actor)


def test_only_actors_are_killed() -> None:
    with pytest.raises(ValueError, match="actors"):
        ray.kill(ray.put(1))


@pytest.mark.parametrize("how", ["leave", "system_exit"])
def test_an_actor_that_ends_itself_is_not_restarted(how: str) -> None:
    actor = Worker.options(max_restarts=3).remote()
    arguments = (0,) if how == "system_exit" else ()
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(getattr(actor, how).remote(*arguments))
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.add.remote())


def test_another_exit_code_is_a_crash() -> None:
    actor = Worker.options(max_restarts=1).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        get(actor.system_exit.remote(1))
    restarted(actor)


def test_the_hook_runs_when_handles_are_gone_and_on_terminate(tmp_path: Path) -> None:
    hooked = ray.remote(Hooked)
    for how in ("handles", "terminate"):
        mark = tmp_path / how
        actor = hooked.remote(str(mark))
        assert get(actor.ping.remote()) == 1
        if how == "terminate":
            with pytest.raises(ray.exceptions.ActorDiedError):
                get(actor.__ray_terminate__.remote())
        del actor
        eventually(mark.exists)


def test_the_hook_does_not_run_on_a_kill(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    actor = ray.remote(Hooked).remote(str(mark))
    pid = get(actor.__ray_call__.remote(lambda self: os.getpid()))
    ray.kill(actor)
    eventually(lambda: not is_alive(pid))
    assert not mark.exists()


def test_an_actor_dies_with_the_process_that_made_it() -> None:
    maker = Maker.remote()
    made = get(maker.make.remote())
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(maker.die.remote())

    def is_dead() -> bool:
        try:
            get(made.add.remote())
        except ray.exceptions.RayActorError:
            return True
        return False

    eventually(is_dead)


# --- restarts ------------------------------------------------------------------------------------


def test_a_restarted_actor_begins_anew() -> None:
    actor = Worker.options(max_restarts=1).remote(10)
    assert get(actor.add.remote()) == 11
    pid = get(actor.pid.remote())
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        get(actor.die.remote())
    restarted(actor)
    assert get(actor.pid.remote()) != pid
    assert get(actor.add.remote()) == 11
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.die.remote())


def test_calls_with_retries_outlive_a_restart_in_their_order(tmp_path: Path) -> None:
    actor = Worker.options(max_restarts=1, max_task_retries=1).remote()
    killer = actor.die_once.remote(str(tmp_path / "mark"))
    later = [actor.add.remote() for _ in range(20)]
    assert get(killer) == "alive"
    if IS_REFERENCE:
        assert sorted(get(later)) == list(range(1, 21))
    else:
        assert get(later) == list(range(1, 21))


def test_a_kill_may_allow_a_restart() -> None:
    actor = Worker.options(max_restarts=1).remote()
    pid = get(actor.pid.remote())
    ray.kill(actor, no_restart=False)
    eventually(lambda: not is_alive(pid))
    restarted(actor)
    assert get(actor.pid.remote()) != pid


def test_named_exceptions_are_tried_again(tmp_path: Path) -> None:
    class Flaky:
        @ray.method(max_task_retries=1, retry_exceptions=[OSError])
        def work(self, mark: str) -> str:
            if not os.path.exists(mark):
                Path(mark).touch()
                raise OSError("once")
            return "well"

    actor = ray.remote(Flaky).remote()
    assert get(actor.work.remote(str(tmp_path / "mark"))) == "well"


def test_exceptions_are_not_tried_again_unless_they_are_named(tmp_path: Path) -> None:
    actor = Worker.options(max_task_retries=3).remote()
    with pytest.raises(OSError, match="once"):
        get(actor.fail_once.remote(str(tmp_path / "mark")))


# --- names ---------------------------------------------------------------------------------------


def test_a_name_finds_the_actor(name: str) -> None:
    actor = Worker.options(name=name).remote()
    found = ray.get_actor(name)
    assert found == actor
    assert get([actor.add.remote(), found.add.remote()]) == [1, 2]
    assert name in ray.util.list_named_actors()


def test_a_task_finds_it_too(name: str) -> None:
    @ray.remote
    def find() -> int:
        return ray.get(ray.get_actor(name).add.remote())

    actor = Worker.options(name=name).remote()
    assert get(find.remote()) == 1
    assert get(actor.add.remote()) == 2


def test_a_name_is_given_once(name: str) -> None:
    actor = Worker.options(name=name).remote()
    get(actor.add.remote())
    with pytest.raises(ValueError, match=name) as raised:
        Worker.options(name=name).remote()
    assert isinstance(raised.value, ray.exceptions.ActorAlreadyExistsError)
    assert Worker.options(name=name, get_if_exists=True).remote() == actor
    assert get(actor.add.remote()) == 2


def test_get_if_exists_makes_what_does_not_exist(name: str) -> None:
    actor = Worker.options(name=name, get_if_exists=True).remote()
    assert ray.get_actor(name) == actor


def test_namespaces_are_apart(name: str) -> None:
    here = Worker.options(name=name).remote()
    there = Worker.options(name=name, namespace="another").remote()
    get([here.add.remote(), there.add.remote()])
    assert ray.get_actor(name) == here
    assert ray.get_actor(name, namespace="another") == there
    everywhere = ray.util.list_named_actors(all_namespaces=True)
    assert {"name": name, "namespace": "another"} in everywhere
    assert len([entry for entry in everywhere if entry["name"] == name]) == 2


@pytest.mark.parametrize("wrong", ["", "nobody"])
def test_a_name_without_an_actor_is_a_value_error(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"get_actor|look up"):
        ray.get_actor(wrong)


@pytest.mark.parametrize("how", ["kill", "handles", "leave"])
def test_the_end_frees_the_name(name: str, how: str) -> None:
    actor = Worker.options(name=name).remote()
    get(actor.add.remote())
    if how == "kill":
        ray.kill(actor)
    elif how == "leave":
        with pytest.raises(ray.exceptions.ActorDiedError):
            get(actor.leave.remote())
    del actor

    def is_free() -> bool:
        try:
            ray.get_actor(name)
        except ValueError:
            return True
        return False

    eventually(is_free)
    assert get(Worker.options(name=name).remote().add.remote()) == 1


@better_than_reference("the name of a crashed actor stays taken while somebody has a handle")
def test_a_crash_without_restart_frees_the_name(name: str) -> None:
    actor = Worker.options(name=name).remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        get(actor.die.remote())
    assert get(Worker.options(name=name).remote().add.remote()) == 1


def test_a_detached_actor_needs_no_handle(name: str) -> None:
    actor = Worker.options(name=name, lifetime="detached").remote()
    assert get(actor.add.remote()) == 1
    del actor
    assert get(ray.get_actor(name).add.remote()) == 2
    ray.kill(ray.get_actor(name))


def test_a_detached_actor_outlives_its_maker(name: str) -> None:
    @ray.remote
    class Parent:
        def make(self) -> None:
            child = Worker.options(name=name, lifetime="detached").remote()
            ray.get(child.add.remote())

    parent = Parent.remote()
    get(parent.make.remote())
    ray.kill(parent)
    child = ray.get_actor(name)
    assert get(child.add.remote()) == 2
    ray.kill(child)


# --- limits --------------------------------------------------------------------------------------


def test_too_many_pending_calls_are_refused(tmp_path: Path) -> None:
    with gate_at(tmp_path / "started") as started, gate_at(tmp_path / "release") as release:
        actor = Worker.options(max_pending_calls=3).remote()
        refs = [actor.hold.remote(started, release)]
        started.wait(DEADLINE_S)
        with pytest.raises(ray.exceptions.PendingCallsLimitExceeded):
            for _ in range(10):
                refs.append(actor.add.remote())
        release.open()
        get(refs)
        assert get(actor.add.remote()) > 0


# --- what a restart leaves ---------------------------------------------------------------------


@ray.remote(max_restarts=1, max_task_retries=1)
class Restarted:
    def was_restarted(self) -> bool:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def die(self) -> None:
        os._exit(1)


def test_a_restarted_actor_knows_that_it_was() -> None:
    actor = Restarted.remote()
    assert get(actor.was_restarted.remote()) is False
    with pytest.raises(ray.exceptions.RayActorError):
        get(actor.die.options(max_task_retries=0).remote())
    assert get(actor.was_restarted.remote()) is True


@ray.remote
def was_restarted() -> bool:
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def test_a_task_was_never_restarted_as_an_actor() -> None:
    assert get(was_restarted.remote()) is False


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Checkpointed:
    """Writes down what it has done, and goes on from there after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: list[int] = []
        if path.exists():
            self.done = [int(line) for line in path.read_text().split()]

    def work(self, number: int, crash: bool = False) -> list[int]:
        if number not in self.done:  # a call that is repeated may have done its work already
            self.done.append(number)
            with self.path.open("a") as file:
                file.write(f"{number}\n")
            if crash:
                os._exit(1)
        return self.done


def test_an_actor_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    actor = Checkpointed.remote(tmp_path / "checkpoint")
    refs = [actor.work.remote(number, crash=number in (3, 7)) for number in range(10)]
    results = get(refs)
    assert results[-1] == list(range(10))
    # (A call that had ended just before the crash may have been repeated, its result being lost.)
    assert all(number in done for number, done in enumerate(results))
