"""Placement groups, as programs see them."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from core_implementation import IMPLEMENTATION, get, init, ray

strategies = pytest.importorskip(f"{IMPLEMENTATION}.util.scheduling_strategies")
util = pytest.importorskip(f"{IMPLEMENTATION}.util")

CPUS = 4


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    ray.shutdown()
    init(num_cpus=CPUS, num_gpus=2, resources={"gate": 2}, labels={"zone": "a"})
    yield
    ray.shutdown()


@pytest.fixture
def group() -> Iterator[Any]:
    """Two bundles of one CPU each."""
    made = util.placement_group([{"CPU": 1}, {"CPU": 1}])
    assert made.wait(30)
    yield made
    util.remove_placement_group(made)


def within(group: Any, index: int = -1, capture: bool | None = None) -> Any:
    return strategies.PlacementGroupSchedulingStrategy(group, index, capture)


@ray.remote
def where() -> str | None:
    current = util.get_current_placement_group()
    return None if current is None else str(current.id.hex())


@ray.remote
def parent() -> tuple[str | None, str | None]:
    here = ray.get(where.remote())
    apart = ray.get(where.options(scheduling_strategy="DEFAULT").remote())
    return here, apart


@ray.remote
class Member:
    def group(self) -> str | None:
        current = util.get_current_placement_group()
        return None if current is None else str(current.id.hex())

    def child(self) -> str | None:
        found: str | None = ray.get(where.remote())
        return found

    def pid(self) -> int:
        return os.getpid()


# --- made, awaited, looked at ------------------------------------------------------------------


def test_a_group_is_ready_and_its_resources_are_not_available_to_others(group: Any) -> None:
    assert get(group.ready()) == group
    assert ray.available_resources()["CPU"] == CPUS - 2
    assert ray.available_resources()[f"CPU_group_{group.id.hex()}"] == 2.0
    assert ray.cluster_resources()[f"CPU_group_1_{group.id.hex()}"] == 1.0
    assert ray.cluster_resources()["CPU"] == CPUS


def test_a_handle_tells_its_bundles_and_travels(group: Any) -> None:
    assert group.bundle_specs == [{"CPU": 1.0}, {"CPU": 1.0}]
    assert group.bundle_count == 2
    copy = pickle.loads(pickle.dumps(group))
    assert copy == group
    assert hash(copy) == hash(group)
    specs = ray.remote(num_cpus=0)(lambda handle: handle.bundle_specs).remote(group)
    assert get(specs) == group.bundle_specs


def test_the_table_tells_what_a_group_is(group: Any) -> None:
    table = util.placement_group_table(group)
    assert table["state"] == "CREATED"
    assert table["strategy"] == "PACK"
    assert table["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}
    here = ray.get_runtime_context().get_node_id()
    assert table["bundles_to_node_id"] == {0: here, 1: here}
    assert table["stats"]["scheduling_state"] == "FINISHED"
    assert util.placement_group_table()[group.id.hex()]["placement_group_id"] == group.id.hex()


def test_a_group_without_room_waits_until_there_is_some(group: Any) -> None:
    large = util.placement_group([{"CPU": 3}])
    small = util.placement_group([{"CPU": 1}])
    assert not large.wait(0.2)
    assert small.wait(30), "it fits, whatever waits before it"
    util.remove_placement_group(small)
    util.remove_placement_group(group)
    assert large.wait(30)
    util.remove_placement_group(large)


def test_a_group_that_nothing_can_hold_says_so() -> None:
    made = util.placement_group([{"CPU": 100}])
    assert not made.wait(0.1)
    table = util.placement_group_table(made)
    assert table["state"] == "PENDING"
    assert table["stats"]["scheduling_state"] == "INFEASIBLE"
    util.remove_placement_group(made)


def test_strict_spread_needs_as_many_nodes_as_bundles() -> None:
    made = util.placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")
    assert not made.wait(0.1)
    util.remove_placement_group(made)


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK"])
def test_the_other_strategies_are_content_with_one_node(strategy: str) -> None:
    made = util.placement_group([{"CPU": 1}, {"CPU": 1}], strategy=strategy)
    assert made.wait(30)
    util.remove_placement_group(made)


def test_bundles_go_where_their_labels_are() -> None:
    here = util.placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": "a"}])
    nowhere = util.placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": "b"}])
    assert here.wait(30)
    assert not nowhere.wait(0.1)
    util.remove_placement_group(here)
    util.remove_placement_group(nowhere)


def test_names_are_found_taken_and_free_again() -> None:
    made = util.placement_group([{"CPU": 1}], name="named", lifetime="detached")
    assert util.get_placement_group("named") == made
    assert get(ray.remote(num_cpus=0)(lambda: util.get_placement_group("named")).remote()) == made
    with pytest.raises(Exception, match="already exists"):
        util.placement_group([{"CPU": 1}], name="named")
    util.remove_placement_group(made)
    with pytest.raises(ValueError, match="Failed to look up"):
        util.get_placement_group("named")


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundles", "options", "text"),
    [
        ([], {}, "non-empty list"),
        ([{}], {}, "only 0 values"),
        ([{"CPU": 0}], {}, "only 0 values"),
        ({"CPU": 1}, {}, "must be a list"),
        (["CPU"], {}, "non-empty list"),
        ([{"CPU": "1"}], {}, "non-empty list"),
        ([{"CPU": 1}], {"strategy": "BEST"}, "Invalid placement group strategy"),
        ([{"CPU": 1}], {"lifetime": "long"}, "either `None` or 'detached'"),
        ([{"CPU": 1}], {"bundle_label_selector": [{}, {}]}, "should equal the length"),
        ([{"CPU": 1}], {"bundle_label_selector": []}, "should equal the length"),
        ([{"CPU": 1}], {"bundle_label_selector": [{"a": "in("}]}, "Invalid label selector"),
        ([{"CPU": 1}], {"_soft_target_node_id": "x"}, "STRICT_PACK|Invalid hex"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(bundles: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        util.placement_group(bundles, **options)


def test_the_names_of_strategies_are_known() -> None:
    names = {"PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"}
    module = importlib.import_module(f"{IMPLEMENTATION}.util.placement_group")
    assert names == module.VALID_PLACEMENT_GROUP_STRATEGIES


def test_a_reserved_name_is_refused() -> None:
    # (The reference's is a system error.)
    with pytest.raises((ValueError, ray.exceptions.RaySystemError), match="system reserved"):
        util.placement_group([{"bundle": 1}])


@pytest.mark.parametrize("name", ["", None])
def test_no_name_finds_no_group(name: Any) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        util.get_placement_group(name)


@pytest.mark.parametrize("index", [2, -2])
def test_a_bundle_that_is_not_there_is_refused_at_the_call(group: Any, index: int) -> None:
    with pytest.raises(ValueError, match="bundle index"):
        where.options(scheduling_strategy=within(group, index)).remote()
    with pytest.raises(ValueError, match="bundle index"):
        Member.options(scheduling_strategy=within(group, index)).remote()


@pytest.mark.parametrize("options", [{"num_cpus": 2}, {"num_gpus": 1}, {"memory": 100}])
def test_what_fits_no_bundle_is_refused_at_the_call(group: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="cannot fit into any bundles"):
        where.options(scheduling_strategy=within(group), **options).remote()
    with pytest.raises(ValueError, match="cannot fit into any bundles"):
        Member.options(scheduling_strategy=within(group), **options).remote()


def test_options_that_contradict_each_other_are_refused(group: Any) -> None:
    with pytest.raises(ValueError, match="deprecated"):
        where.options(placement_group=group, scheduling_strategy="SPREAD").remote()
    with pytest.raises(ValueError, match="must be -1"):
        where.options(placement_group_bundle_index=1).remote()
    with pytest.raises(AssertionError):
        where.options(placement_group="some").remote()


# --- what runs in one --------------------------------------------------------------------------


def test_a_task_knows_the_group_that_it_runs_in(group: Any) -> None:
    inside = where.options(scheduling_strategy=within(group))
    assert get(inside.remote()) == group.id.hex()
    assert get(where.options(scheduling_strategy=within(group, 1)).remote()) == group.id.hex()
    assert get(where.options(num_cpus=0, scheduling_strategy=within(group)).remote())
    assert get(where.remote()) is None
    assert get(where.options(scheduling_strategy=within(None)).remote()) is None
    assert util.get_current_placement_group() is None


def test_the_old_options_mean_the_same(group: Any) -> None:
    assert get(where.options(placement_group=group).remote()) == group.id.hex()
    inside = where.options(placement_group=group, placement_group_bundle_index=0)
    assert get(inside.remote()) == group.id.hex()
    assert get(where.options(placement_group=None).remote()) is None
    assert get(where.options(placement_group="default").remote()) is None


def test_assigned_resources_have_their_usual_names(group: Any) -> None:
    @ray.remote(num_cpus=1)
    def assigned() -> dict[str, float]:
        return dict(ray.get_runtime_context().get_assigned_resources())

    assert get(assigned.options(scheduling_strategy=within(group, 0)).remote()) == {"CPU": 1.0}


def test_child_tasks_run_in_the_group_if_they_are_captured(group: Any) -> None:
    inside = parent.options(scheduling_strategy=within(group, 0, True))
    assert get(inside.remote()) == (group.id.hex(), None)
    assert get(parent.options(scheduling_strategy=within(group, 0)).remote()) == (None, None)


def test_an_actor_and_its_calls_are_in_the_group(group: Any) -> None:
    member = Member.options(num_cpus=1, scheduling_strategy=within(group, 0, True)).remote()
    assert get(member.group.remote()) == group.id.hex()
    assert get(member.child.remote()) == group.id.hex()
    assert ray.available_resources().get(f"CPU_group_0_{group.id.hex()}", 0.0) == 0.0


def test_no_more_runs_in_a_bundle_than_it_has_room_for(group: Any) -> None:
    @ray.remote(num_cpus=1)
    def meet(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        count = os.path.getsize(path)
        os.truncate(path, 0)
        return count

    import tempfile

    with tempfile.NamedTemporaryFile() as shared:
        inside = meet.options(scheduling_strategy=within(group, 0))
        assert set(get([inside.remote(shared.name) for _ in range(20)])) == {1}


def test_gpus_of_a_bundle_are_given_to_its_tasks() -> None:
    made = util.placement_group([{"GPU": 1, "CPU": 1}, {"GPU": 1, "CPU": 1}])
    assert made.wait(30)

    @ray.remote(num_gpus=1, num_cpus=1)
    def ids() -> tuple[list[int], str | None]:
        return ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")

    first = get(ids.options(scheduling_strategy=within(made, 0)).remote())
    second = get(ids.options(scheduling_strategy=within(made, 1)).remote())
    assert sorted([first[0], second[0]]) == [[0], [1]]
    assert first[1] == str(first[0][0])
    util.remove_placement_group(made)


def test_a_task_that_waits_lends_its_cpu_to_the_group_alone(group: Any) -> None:
    """Both bundles' parents wait for children that fit nowhere but in the group."""
    inside = parent.options(scheduling_strategy=within(group, -1, True))
    assert get([inside.remote() for _ in range(4)]) == [(group.id.hex(), None)] * 4


# --- the end -----------------------------------------------------------------------------------


def test_removal_gives_the_resources_back_and_can_be_repeated() -> None:
    made = util.placement_group([{"CPU": CPUS}])
    assert made.wait(30)
    util.remove_placement_group(made)
    util.remove_placement_group(made)
    again = util.placement_group([{"CPU": CPUS}])
    assert again.wait(30)
    util.remove_placement_group(again)
    assert not any("_group_" in name for name in ray.cluster_resources())


def test_removal_ends_what_runs_and_fails_what_waits(tmp_path: Any) -> None:
    made = util.placement_group([{"CPU": 1}])
    path = tmp_path / "pid"

    @ray.remote(num_cpus=1)
    def endless() -> None:
        path.write_text(str(os.getpid()))
        signal.pause()

    inside = endless.options(scheduling_strategy=within(made))
    running, waiting = inside.remote(), inside.remote()
    while not (path.exists() and path.read_text()):
        ray.wait([running], timeout=0.01)
    util.remove_placement_group(made)
    if IMPLEMENTATION == "ray":
        return  # it lets both wait for ever
    for ref in (running, waiting, inside.remote()):
        with pytest.raises(ray.exceptions.TaskPlacementGroupRemoved, match="was removed"):
            get(ref)
    with pytest.raises(ray.exceptions.TaskPlacementGroupRemoved):
        get(made.ready())
    with pytest.raises(Exception, match="does not exist"):
        made.wait(1)
    # The worker is gone before its CPU is anybody's.
    assert util.placement_group_table(made)["state"] == "REMOVED"
    again = util.placement_group([{"CPU": CPUS}])
    assert again.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)
    util.remove_placement_group(again)


def test_removal_ends_actors_and_refuses_those_that_were_not_made() -> None:
    made = util.placement_group([{"CPU": 1}])
    inside = Member.options(num_cpus=1, scheduling_strategy=within(made))
    lives = inside.remote()
    get(lives.pid.remote())
    waits = inside.remote()
    call = waits.pid.remote()
    util.remove_placement_group(made)
    with pytest.raises(ray.exceptions.RayActorError):
        get(lives.pid.remote())
    with pytest.raises(ray.exceptions.ActorUnschedulableError):
        get(call)


def test_a_group_that_was_never_placed_can_be_removed() -> None:
    made = util.placement_group([{"CPU": 100}])
    ready = made.ready()
    util.remove_placement_group(made)
    with pytest.raises(ray.exceptions.RayError):
        get(ready)
