"""Actors and real processes: kills, restarts, and nothing left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

import poolray
from poolray.exceptions import ActorDiedError, ActorError, ActorUnavailableError
from tests.integration.support import (
    DEADLINE_S,
    Gate,
    ScriptResult,
    assert_nothing_is_left_over,
    die,
    fork_server_pids,
    is_alive,
    kill,
    statistics,
    wait_until,
)


@poolray.remote
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, n: int = 1) -> int:
        self.value += n
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def die(self, how: str) -> None:
        die(how)

    def hold(self, started: Gate, release: Gate) -> None:
        started.open()
        release.wait()

    def take(self, value: Any) -> int:
        return len(value)


@poolray.remote
class Slow:
    def __init__(self, started: Gate, release: Gate) -> None:
        started.open()
        release.wait()

    def ping(self) -> int:
        return os.getpid()


@poolray.remote
class Loop:
    async def add(self, n: int) -> int:
        return n + 1


@poolray.remote
class Relay:
    def __init__(self, target: Any) -> None:
        self.target = target

    def send(self, count: int) -> list[int]:
        return poolray.get([self.target.add.remote() for _ in range(count)])


def get(refs: Any) -> Any:
    return poolray.get(refs, timeout=DEADLINE_S)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "exit"])
def test_each_way_to_die_is_named_and_leaves_nothing_behind(how: str) -> None:
    poolray.init(num_cpus=1)
    actor = Counter.remote()
    pid = get(actor.pid.remote())
    refs = [actor.die.remote(how), *(actor.add.remote() for _ in range(50))]
    for ref in refs:
        with pytest.raises(ActorDiedError, match=f"pid {pid}") as raised:
            get(ref)
        assert raised.value.pid == pid
    # (The error keeps its traceback, and that the refs.)
    del actor, refs, ref, raised
    assert_nothing_is_left_over()


def test_a_kill_from_outside_while_calls_wait(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1)
    actor = Counter.options(max_restarts=1, max_task_retries=1).remote()
    pid = get(actor.pid.remote())
    held = actor.hold.remote(started, release)
    later = [actor.add.remote() for _ in range(30)]
    started.wait()
    kill(pid)
    release.open()
    get(held)
    assert get(later) == list(range(1, 31))
    assert get(actor.pid.remote()) != pid
    wait_until(lambda: not is_alive(pid), "the end of the first process")


def test_kills_again_and_again_while_calls_are_made() -> None:
    poolray.init(num_cpus=2)
    actor = Counter.options(max_restarts=-1, max_task_retries=-1).remote()
    refs = []
    for _ in range(5):
        pid = get(actor.pid.remote())
        refs += [actor.add.remote() for _ in range(200)]
        kill(pid)
    assert len(get(refs)) == 1000
    del actor, refs
    assert_nothing_is_left_over()
    assert statistics().actors == 0


def test_calls_without_retries_fail_or_succeed_and_never_hang() -> None:
    poolray.init(num_cpus=2)
    actor = Counter.options(max_restarts=-1).remote()
    outcomes: dict[str, int] = {"value": 0, "unavailable": 0}
    for _ in range(3):
        wait_until(lambda: is_up(actor), "the restart")
        pid = get(actor.pid.remote())
        refs = [actor.add.remote() for _ in range(100)]
        kill(pid)
        for ref in refs:
            try:
                get(ref)
                outcomes["value"] += 1
            except ActorUnavailableError:
                outcomes["unavailable"] += 1
    assert sum(outcomes.values()) == 300


def is_up(actor: Any) -> bool:
    try:
        get(actor.pid.remote())
    except ActorUnavailableError:
        return False
    return True


def test_a_kill_reaches_a_constructor_that_does_not_end(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1)
    actor = Slow.options(max_restarts=5).remote(started, release)
    ref = actor.ping.remote()
    started.wait()
    poolray.kill(actor)
    with pytest.raises(ActorDiedError, match="killed"):
        get(ref)
    del actor, ref
    wait_until(lambda: statistics().actors == 0, "the end of the actor")


def test_a_fork_server_that_dies_takes_its_actors_along() -> None:
    poolray.init(num_cpus=1)
    actor = Counter.options(max_restarts=-1).remote()
    get(actor.add.remote())
    for pid in fork_server_pids():
        kill(pid)
    with pytest.raises(poolray.exceptions.PoolrayError):
        while True:
            get(actor.add.remote())


def test_shutdown_ends_actors_and_those_who_wait_for_them(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1)
    actor = Counter.options(lifetime="detached", name="kept").remote()
    pid = get(actor.pid.remote())
    ref = actor.hold.remote(started, release)
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            poolray.get(ref)
        except BaseException as error:
            seen.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    started.wait()
    poolray.shutdown()
    waiting.join(DEADLINE_S)
    assert len(seen) == 1
    wait_until(lambda: not is_alive(pid), "the end of the process")


def test_a_program_that_ends_with_actors_leaves_no_process(
    script: Callable[..., ScriptResult],
) -> None:
    result = script(
        """
        import os
        import poolray

        @poolray.remote
        class Actor:
            def pid(self):
                return os.getpid()

        if __name__ == "__main__":
            actors = [Actor.remote() for _ in range(3)]
            print(len(set(poolray.get([actor.pid.remote() for actor in actors]))))
        """
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == ["3"]
    assert result.stderr == ""


def test_large_arguments_and_results_are_freed() -> None:
    poolray.init(num_cpus=1)
    actor = Counter.remote()
    assert get([actor.take.remote(bytes(1 << 20)) for _ in range(20)]) == [1 << 20] * 20
    del actor
    assert_nothing_is_left_over()


def test_threads_and_actors_call_one_actor() -> None:
    poolray.init(num_cpus=2)
    actor = Counter.remote()
    relays = [Relay.remote(actor) for _ in range(2)]
    refs = [relay.send.remote(100) for relay in relays]
    made: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: made.append(get([actor.add.remote() for _ in range(100)])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    made += get(refs)
    assert all(values == sorted(values) for values in made)
    assert sorted(value for values in made for value in values) == list(range(1, 501))


def test_an_event_loop_takes_thousands_of_calls() -> None:
    poolray.init(num_cpus=1)
    actor = Loop.remote()
    assert get([actor.add.remote(n) for n in range(3000)]) == list(range(1, 3001))
    del actor
    assert_nothing_is_left_over()


def test_many_actors_come_and_go() -> None:
    poolray.init(num_cpus=2)
    for _ in range(3):
        actors = [Counter.remote(n) for n in range(10)]
        assert get([actor.add.remote() for actor in actors]) == list(range(1, 11))
        del actors
    assert_nothing_is_left_over()
    wait_until(lambda: statistics().actors == 0, "the end of the actors")


def test_handles_of_a_runtime_that_has_ended_are_refused() -> None:
    poolray.init(num_cpus=1)
    actor = Counter.remote()
    get(actor.add.remote())
    poolray.shutdown()
    poolray.init(num_cpus=1)
    with pytest.raises(ActorError, match="not known here"):
        get(actor.add.remote())


@poolray.remote
class Leaving:
    def __init__(self, done: Gate) -> None:
        self.done = done

    async def leave(self) -> None:
        poolray.actor.exit_actor()

    async def __ray_shutdown__(self) -> None:
        import asyncio

        await asyncio.sleep(0)
        self.done.open()


def test_a_coroutine_that_ends_its_actor_awaits_its_hook(started: Gate) -> None:
    actor = Leaving.remote(started)
    with pytest.raises(ActorDiedError, match="ended itself"):
        poolray.get(actor.leave.remote())
    started.wait()


@pytest.mark.parametrize("options", [{}, {"max_concurrency": 2}], ids=["plain", "threads"])
def test_what_every_actor_has_goes_by_our_name_too(options: dict[str, Any]) -> None:
    counter = Counter.options(**options).remote(5)
    assert poolray.get(counter.__poolray_ready__.remote()) is True
    assert poolray.get(counter.__poolray_call__.remote(lambda actor, n: actor.value + n, 2)) == 7
    with pytest.raises(ActorDiedError):
        poolray.get(counter.__poolray_terminate__.remote())
    with pytest.raises(ActorDiedError):
        poolray.get(counter.add.remote())


@poolray.remote
class Speaker:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Speaker({self.name})"

    def say(self, text: str) -> None:
        print(text)


def test_lines_of_an_actor_begin_with_what_it_says_of_itself(
    script: Callable[..., ScriptResult],
) -> None:
    result = script(
        """
        import poolray
        from tests.integration.test_actors import Counter, Speaker

        poolray.init(num_cpus=1)
        speaker = Speaker.remote("it")
        poolray.get(speaker.say.remote("hello"))
        poolray.get(Counter.remote().__poolray_call__.remote(lambda actor: print("plain")))
        """
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any("(Speaker(it) pid=" in line and line.endswith(" hello") for line in lines)
    assert any("(Counter pid=" in line and line.endswith(" plain") for line in lines)
