"""Actors and their calls in the state listings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import poolray
from poolray.util import state
from tests.integration.support import Gate, wait_until


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    poolray.shutdown()
    poolray.init(num_cpus=2, namespace="here")
    yield
    poolray.shutdown()


@poolray.remote
class Named:
    def __init__(self, *_: Any) -> None: ...

    def __repr__(self) -> str:
        return "Named(it)"

    def ping(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("no")

    def hold(self, started: Gate, release: Gate) -> None:
        started.open()
        release.wait()

    def die(self) -> None:
        os._exit(3)

    def ask(self) -> list[tuple[str, str]]:
        return [(a.name or "", a.state) for a in state.list_actors()]


@poolray.remote
class Broken:
    def __init__(self) -> None:
        raise RuntimeError("no")

    def ping(self) -> None: ...


def only(**wanted: object) -> state.ActorState:
    (actor,) = state.list_actors(filters=[(k, "=", v) for k, v in wanted.items()], detail=True)  # type: ignore[misc]
    return actor


def tasks(kind: str) -> list[tuple[str, str]]:
    rows = state.list_tasks(filters=[("type", "=", kind)])
    return [(row.name, row.state) for row in rows]


def test_a_living_actor_shows_what_it_is_and_keeps() -> None:
    actor = Named.options(name="it", num_cpus=1, lifetime="detached").remote()
    pid = poolray.get(actor.ping.remote())
    row = only(name="it")
    assert row.actor_id == actor._ray_actor_id.hex()
    assert (row.class_name, row.state, row.pid) == ("Named", "ALIVE", pid)
    assert (row.ray_namespace, row.is_detached, row.num_restarts) == ("here", True, 0)
    assert row.required_resources == {"CPU": 1.0}
    assert row.repr_name == "Named(it)"
    assert row.death_cause is None
    assert state.get_actor(row.actor_id) == row


def test_one_that_waits_says_for_what(started: Gate, release: Gate) -> None:
    @poolray.remote
    def late() -> int:
        release.wait()
        return 1

    needs_argument = Named.options(name="argument").remote(late.remote())
    needs_resource = Named.options(name="resource", resources={"nowhere": 1}).remote()
    assert only(name="argument").state == "DEPENDENCIES_UNREADY"
    assert only(name="resource").state == "PENDING_CREATION"
    assert tasks("ACTOR_CREATION_TASK") != []
    release.open()
    poolray.get(needs_argument.ping.remote())
    assert only(name="argument").state == "ALIVE"
    poolray.kill(needs_resource)
    assert only(name="resource").state == "DEAD"


@pytest.mark.parametrize(
    ("how", "cause"),
    [("kill", "killed by kill"), ("die", "exited with code 3"), ("forget", "out of scope")],
)
def test_a_dead_actor_says_why(how: str, cause: str) -> None:
    actor = Named.options(name="it").remote()
    poolray.get(actor.ping.remote())
    if how == "kill":
        poolray.kill(actor)
    elif how == "die":
        with pytest.raises(poolray.exceptions.ActorDiedError):
            poolray.get(actor.die.remote())
    del actor
    wait_until(lambda: only(name="it").state == "DEAD")
    death = only(name="it").death_cause
    assert death is not None
    assert cause in death["error_message"]


def test_restarts_are_counted() -> None:
    actor = Named.options(name="it", max_restarts=2, max_task_retries=2).remote()
    for number in (1, 2):
        with pytest.raises(poolray.exceptions.ActorUnavailableError):
            poolray.get(actor.die.options(max_task_retries=0).remote())
        poolray.get(actor.ping.remote())
        assert only(name="it").num_restarts == number


def test_calls_are_listed_with_their_actors(started: Gate, release: Gate) -> None:
    actor = Named.remote()
    poolray.get(actor.ping.remote())
    with pytest.raises(ValueError, match="no"):
        poolray.get(actor.fail.remote())
    held = actor.hold.remote(started, release)
    started.wait()
    rows = {row.name: row for row in state.list_tasks(detail=True)}
    actor_id = actor._ray_actor_id.hex()
    assert {row.actor_id for row in rows.values()} == {actor_id}
    found = {name: (row.type, row.state) for name, row in rows.items()}
    assert found == {
        "Named.__init__": ("ACTOR_CREATION_TASK", "FINISHED"),
        "Named.ping": ("ACTOR_TASK", "FINISHED"),
        "Named.fail": ("ACTOR_TASK", "FAILED"),
        "Named.hold": ("ACTOR_TASK", "RUNNING"),
    }
    assert rows["Named.fail"].error_message == "ValueError: no"
    poolray.kill(actor)
    with pytest.raises(poolray.exceptions.ActorDiedError):
        poolray.get(held)
    (row,) = state.list_tasks(filters=[("name", "=", "Named.hold")], detail=True)
    assert row.error_type == "ACTOR_DIED"
    assert "killed" in (row.error_message or "")


def test_actors_and_calls_are_counted() -> None:
    actors = [Named.remote() for _ in range(3)]
    poolray.get([actor.ping.remote() for actor in actors])
    broken = Broken.remote()
    with pytest.raises(poolray.exceptions.ActorDiedError):
        poolray.get(broken.ping.remote())
    summary = state.summarize_actors()["cluster"]
    assert summary["total_actors"] == 4
    assert summary["summary"]["Named"]["state_counts"] == {"ALIVE": 3}
    assert summary["summary"]["Broken"]["state_counts"] == {"DEAD": 1}
    counts = state.summarize_tasks()["cluster"]
    assert (counts["total_actor_tasks"], counts["total_actor_scheduled"]) == (4, 4)
    assert counts["total_tasks"] == 0


def test_an_actor_may_ask_too() -> None:
    actor = Named.options(name="it").remote()
    assert poolray.get(actor.ask.remote()) == [("it", "ALIVE")]


def test_an_actor_that_can_never_be_created_goes_with_its_last_handle() -> None:
    actor = Named.options(name="it", resources={"nowhere": 1}).remote()
    assert only(name="it").state == "PENDING_CREATION"
    del actor
    wait_until(lambda: only(name="it").state == "DEAD")
    Named.options(name="it").remote()  # the name is free
