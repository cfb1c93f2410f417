"""Actors: classes, handles, calls and their order, what goes in and what comes out."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from core_implementation import DEADLINE_S, better_than_reference, gate_at, get, ray, start_runtime
from executor_support import Gate


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
class Counter:
    limit = 10

    def __init__(self, value: int = 0, *, step: int = 1) -> None:
        self.value = value
        self.step = step

    def add(self, n: int = 1) -> int:
        self.value += n * self.step
        return self.value

    def read(self) -> int:
        return self.value

    @ray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.value, self.step

    def fail(self, error: Exception) -> None:
        raise error

    def take(self, value: Any) -> Any:
        return value

    def hold(self, gate: Gate, value: Any = None) -> Any:
        gate.wait(DEADLINE_S)
        return value

    def pid(self) -> int:
        return os.getpid()

    def add_to(self, other: Any, n: int) -> Any:
        return ray.get(other.add.remote(n))

    def make(self, value: int) -> Any:
        return Counter.remote(value)

    def facts(self) -> tuple[Any, ...]:
        context = ray.get_runtime_context()
        return context.get_actor_id(), context.get_actor_name(), context.get_task_name()

    def me(self) -> Any:
        return ray.get_runtime_context().current_actor

    @staticmethod
    def still(x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> int:
        return x + cls.limit


class Plain:
    def hello(self) -> str:
        return "hello"

    def name(self) -> str:
        return type(self).__name__


class Inherits(Plain):
    def hello(self) -> str:
        return super().hello() + " again"


@ray.remote
def add_in_task(counter: Any, n: int) -> int:
    return ray.get(counter.add.remote(n))


@ray.remote
def identity(value: Any) -> Any:
    return value


@ray.remote
def held(gate: Gate, value: Any) -> Any:
    gate.wait(DEADLINE_S)
    return value


@ray.remote
def broken() -> None:
    raise KeyError("broken")


# --- classes -------------------------------------------------------------------------------------


def test_an_actor_keeps_its_state_between_calls() -> None:
    counter = Counter.remote(10)
    assert get([counter.add.remote() for _ in range(5)]) == [11, 12, 13, 14, 15]


def test_constructors_take_positional_and_keyword_arguments() -> None:
    assert get(Counter.remote(1, step=3).add.remote(2)) == 7
    assert get(Counter.remote(value=4).read.remote()) == 4


def test_classes_are_made_remote_with_options_later_or_by_call() -> None:
    optioned = ray.remote(num_cpus=0)(Plain)
    assert get(optioned.remote().hello.remote()) == "hello"
    assert get(ray.remote(Plain).options(num_cpus=0).remote().hello.remote()) == "hello"


def test_inherited_methods_are_methods() -> None:
    actor = ray.remote(Inherits).remote()
    assert get([actor.hello.remote(), actor.name.remote()]) == ["hello again", "Inherits"]


def test_a_class_without_a_constructor_takes_no_arguments() -> None:
    with pytest.raises(TypeError):
        ray.remote(Plain).remote(1)


def test_an_actor_class_is_not_instantiated_directly() -> None:
    with pytest.raises(TypeError, match=r"Counter.remote\(\)"):
        Counter()


def test_an_actor_class_is_not_inherited_from() -> None:
    with pytest.raises(TypeError):

        class _More(Counter):
            pass


def test_wrong_arguments_of_a_constructor_are_refused_at_once() -> None:
    with pytest.raises(TypeError):
        Counter.remote(1, 2, 3)
    with pytest.raises(TypeError):
        Counter.remote(nothing=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nothing": 1}, ValueError),
        ({"num_returns": 1}, ValueError),
        ({"max_calls": 1}, ValueError),
        ({"max_retries": 1}, ValueError),
        ({"max_restarts": -2}, ValueError),
        ({"max_task_retries": -2}, ValueError),
        ({"max_pending_calls": -2}, ValueError),
        ({"max_restarts": "1"}, TypeError),
        ({"lifetime": "short"}, ValueError),
        ({"name": 3}, TypeError),
        ({"num_cpus": -1}, ValueError),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Counter.options(**options)


@pytest.mark.parametrize("options", [{"name": ""}, {"namespace": ""}, {"get_if_exists": True}])
def test_options_that_make_no_sense_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name"):
        Counter.options(**options).remote()


# --- methods -------------------------------------------------------------------------------------


def test_a_method_is_not_called_directly() -> None:
    with pytest.raises(TypeError, match=r"add.remote\(\)"):
        Counter.remote().add(1)


def test_what_is_no_method_is_an_attribute_error() -> None:
    counter = Counter.remote()
    for name in ("nothing", "limit", "value"):
        with pytest.raises(AttributeError, match=name):
            getattr(counter, name)


def test_wrong_arguments_of_a_method_are_refused_at_once() -> None:
    counter = Counter.remote()
    with pytest.raises(TypeError):
        counter.add.remote(1, 2)
    with pytest.raises(TypeError):
        counter.add.remote(m=1)
    with pytest.raises(TypeError):
        counter.take.remote()


def test_static_and_class_methods_are_called_as_others() -> None:
    counter = Counter.remote()
    assert get([counter.still.remote(1), counter.of_class.remote(1)]) == [1, 11]


def test_num_returns_comes_from_the_method_or_the_call() -> None:
    counter = Counter.remote(1)
    assert get(counter.pair.remote()) == [1, 1]
    assert get(counter.pair.options(num_returns=1).remote()) == (1, 1)
    assert counter.add.options(num_returns=0).remote() is None
    assert get(counter.read.remote()) == 2


def test_unknown_options_of_the_method_decorator_are_refused() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        ray.method(nothing=1)


def test_an_error_is_of_its_own_class_and_the_actor_lives_on() -> None:
    counter = Counter.remote()
    ref = counter.fail.remote(ZeroDivisionError("no"))
    with pytest.raises(ZeroDivisionError, match="no") as raised:
        get(ref)
    assert isinstance(raised.value, ray.exceptions.RayTaskError)
    assert "Counter.fail" in str(raised.value)
    assert get(counter.add.remote()) == 1


def test_what_every_actor_has() -> None:
    counter = Counter.remote(5)
    assert get(counter.__ray_ready__.remote()) is True
    assert get(counter.__ray_call__.remote(lambda self, n: self.value + n, 2)) == 7
    with pytest.raises(ray.exceptions.RayActorError):
        get(counter.__ray_terminate__.remote())


def test_a_call_may_have_a_name() -> None:
    counter = Counter.remote()
    _, name, task = get(counter.facts.remote())
    assert (name, task) == ("", "Counter.facts")
    assert get(counter.facts.options(name="mine").remote())[2] == "mine"


# --- arguments and order -------------------------------------------------------------------------


def test_refs_are_replaced_at_the_top_and_kept_inside() -> None:
    counter = Counter.remote(identity.remote(3))
    ref = ray.put(4)
    assert get(counter.add.remote(n=ref)) == 7
    (inner,) = get(counter.take.remote([ref]))
    assert get(inner) == 4


def test_an_argument_that_failed_fails_the_call_and_not_the_actor() -> None:
    counter = Counter.remote()
    with pytest.raises(KeyError):
        get(counter.take.remote(broken.remote()))
    assert get(counter.add.remote()) == 1


def test_a_late_argument_keeps_the_order_of_one_callers_calls(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        counter = Counter.remote()
        late = counter.add.remote(held.remote(gate, 5))
        after = counter.add.remote(1)
        assert ray.wait([after], timeout=0.3)[0] == []
        gate.open()
        assert get([late, after]) == [5, 6]


def test_a_late_argument_holds_no_other_caller_back(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        counter = Counter.remote()
        late = counter.add.remote(held.remote(gate, 5))
        assert get(add_in_task.remote(counter, 1)) == 1
        gate.open()
        assert get(late) == 6


def test_calls_may_be_allowed_to_overtake_a_late_argument(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        counter = Counter.options(allow_out_of_order_execution=True).remote()
        late = counter.add.remote(held.remote(gate, 5))
        assert get(counter.add.remote(1)) == 1
        gate.open()
        assert get(late) == 6


def test_many_calls_run_in_order() -> None:
    counter = Counter.remote()
    assert get([counter.add.remote() for _ in range(2000)]) == list(range(1, 2001))


def test_a_result_does_not_wait_for_the_calls_behind_it(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        counter = Counter.remote()
        get([counter.add.remote() for _ in range(200)])
        quick = [counter.add.remote() for _ in range(20)]
        slow = counter.hold.remote(gate, "slow")
        assert get(quick)[-1] == 220
        gate.open()
        assert get(slow) == "slow"


def test_nor_when_another_one_before_it_took_long(tmp_path: Path) -> None:
    with gate_at(tmp_path / "first") as first, gate_at(tmp_path / "second") as second:
        counter = Counter.remote()
        get([counter.add.remote() for _ in range(200)])
        before = [counter.add.remote() for _ in range(3)]
        slow = [counter.hold.remote(first, "first")]
        quick = [counter.add.remote() for _ in range(20)]
        slow.append(counter.hold.remote(second, "second"))
        get(before)
        assert ray.wait([slow[0]], timeout=0.05)[0] == []
        first.open()
        assert get(quick)[-1] == 223
        second.open()
        assert get(slow) == ["first", "second"]


def test_large_values_go_in_and_out() -> None:
    data = bytes(range(256)) * 4096
    assert get(Counter.remote().take.remote(data)) == data


def test_what_cannot_be_pickled_is_refused_at_once() -> None:
    counter = Counter.remote()
    with pytest.raises(TypeError, match="serialize"):
        counter.take.remote(sys._getframe())


# --- handles -------------------------------------------------------------------------------------


def test_handles_go_to_tasks_and_other_actors() -> None:
    counter, other = Counter.remote(), Counter.remote()
    assert get(add_in_task.remote(counter, 1)) == 1
    assert get(other.add_to.remote(counter, 2)) == 3
    assert get(counter.read.remote()) == 3


def test_handles_come_back_nested_put_and_equal() -> None:
    counter = Counter.remote()
    box = get(identity.remote({"here": [counter]}))
    stored = get(ray.put(counter))
    assert box["here"][0] == counter == stored
    assert hash(stored) == hash(counter)
    assert len({counter, stored}) == 1
    assert counter != Counter.remote()
    assert get(stored.add.remote()) == 1


def test_actors_make_actors_that_end_with_them() -> None:
    made = get(Counter.remote().make.remote(7))
    deadline = time.monotonic() + DEADLINE_S
    with pytest.raises(ray.exceptions.RayActorError):
        # Its maker went out of scope, and it with its maker.
        while time.monotonic() < deadline:
            get(made.read.remote())


def test_an_actor_with_a_living_maker_lives() -> None:
    maker = Counter.remote()
    made = get(maker.make.remote(7))
    assert get(made.add.remote()) == 8
    assert get(maker.read.remote()) == 0


def test_an_actor_knows_itself() -> None:
    counter = Counter.remote()
    actor_id, _, _ = get(counter.facts.remote())
    assert actor_id == counter._actor_id.hex()
    assert len(actor_id) == 32
    assert get(counter.me.remote()) == counter


def test_the_driver_is_no_actor() -> None:
    context = ray.get_runtime_context()
    assert context.get_actor_id() is None
    assert context.get_actor_name() is None
    with pytest.raises(RuntimeError):
        _ = context.current_actor
    with pytest.raises(TypeError):
        ray.actor.exit_actor()


def test_a_handle_says_what_it_is() -> None:
    counter = Counter.remote()
    assert repr(counter) == f"Actor(Counter, {counter._actor_id.hex()})"


def test_each_actor_has_a_process_of_its_own() -> None:
    actors = [Counter.remote() for _ in range(3)]
    pids = get([actor.pid.remote() for actor in actors])
    assert len({*pids, os.getpid()}) == 4


def test_an_actor_starts_while_tasks_have_all_cpus(tmp_path: Path) -> None:
    with gate_at(tmp_path / "gate") as gate:
        busy = [held.remote(gate, None) for _ in range(2)]
        assert get(Counter.remote(3).read.remote()) == 3
        gate.open(2)
        get(busy)


def test_an_actor_keeps_the_cpus_that_it_asks_for(tmp_path: Path) -> None:
    actors = [Counter.options(num_cpus=1).remote() for _ in range(2)]
    get([actor.__ray_ready__.remote() for actor in actors])
    waiting = identity.remote(1)
    assert ray.wait([waiting], timeout=0.3)[0] == []
    ray.kill(actors.pop())
    assert get(waiting) == 1


@better_than_reference("it ignores unknown options of a call until that is made")
def test_unknown_options_of_a_call_are_refused_at_once() -> None:
    with pytest.raises(TypeError):
        Counter.remote().add.options(nothing=1)
