"""Resources, devices, placement and the runtime context, as programs see them.

The machines of these tests have GPUs because `init` says so: none has to be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from core_implementation import IMPLEMENTATION, get, init, ray, run_script

strategies = pytest.importorskip(f"{IMPLEMENTATION}.util.scheduling_strategies")

CPUS = 4
GPUS = 2


@pytest.fixture(scope="module", autouse=True)
def _machine() -> Iterator[None]:
    ray.shutdown()
    init(num_cpus=CPUS, num_gpus=GPUS, resources={"gate": 3}, labels={"zone": "a"})
    yield
    ray.shutdown()


@ray.remote
def where() -> str:
    return str(ray.get_runtime_context().get_node_id())


@ray.remote
def devices() -> tuple[Any, Any, Any]:
    accelerators = ray.get_runtime_context().get_accelerator_ids()
    return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids(), accelerators["GPU"]


# --- what there is -----------------------------------------------------------------------------


def test_cluster_resources_are_what_init_said_and_what_was_found() -> None:
    resources = ray.cluster_resources()
    assert resources["CPU"] == CPUS
    assert resources["GPU"] == GPUS
    assert resources["gate"] == 3.0
    assert resources["memory"] > 0
    assert resources["object_store_memory"] > 0
    assert resources["node:__internal_head__"] == 1.0


def test_the_only_node_has_all_the_resources() -> None:
    (node,) = ray.nodes()
    assert node["Alive"] is True
    assert node["NodeID"] == ray.get_runtime_context().get_node_id()
    assert node["Resources"] == ray.cluster_resources()
    assert node["Resources"][f"node:{node['NodeManagerAddress']}"] == 1.0
    assert node["Labels"] == {"zone": "a", "ray.io/node-id": node["NodeID"]}


def test_what_a_task_has_is_not_available_meanwhile() -> None:
    @ray.remote(num_cpus=1, resources={"gate": 3})
    def look() -> dict[str, float]:
        return dict(ray.get_runtime_context().get_assigned_resources())

    assert get(look.remote()) == {"CPU": 1.0, "gate": 3.0}
    assert ray.cluster_resources()["gate"] == 3.0


def test_a_task_can_ask_what_there_is() -> None:
    assert get(ray.remote(lambda: ray.cluster_resources()["gate"]).remote()) == 3.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resources": {"gate": 1.5}}, ValueError),
        ({"resources": {"CPU": 1}}, (ValueError, AssertionError)),
        ({"resources": {"gate": -1}}, ValueError),
        ({"num_gpus": 1.5}, ValueError),
        ({"num_gpus": -1}, ValueError),
    ],
)
def test_amounts_that_init_cannot_take_are_refused(options: Any, error: Any) -> None:
    ray.shutdown()
    try:
        with pytest.raises(error):
            init(**options)
    finally:
        ray.shutdown()
        init(num_cpus=CPUS, num_gpus=GPUS, resources={"gate": 3}, labels={"zone": "a"})


# --- devices -----------------------------------------------------------------------------------


def test_a_task_is_given_its_devices_and_shown_no_others() -> None:
    assert get(devices.options(num_gpus=1).remote()) == ("0", [0], ["0"])
    visible, ids, names = get(devices.options(num_gpus=2).remote())
    assert sorted(visible.split(",")) == sorted(names) == ["0", "1"]
    assert sorted(ids) == [0, 1]


def test_three_thirds_of_a_device_are_on_one() -> None:
    @ray.remote(num_gpus=1 / 3)
    class Holder:
        def look(self) -> tuple[Any, Any]:
            context = ray.get_runtime_context()
            return context.get_accelerator_ids()["GPU"], context.get_assigned_resources()["GPU"]

    holders = [Holder.remote() for _ in range(3)]
    assert get([holder.look.remote() for holder in holders]) == [(["0"], 0.3333)] * 3


def test_a_task_without_devices_is_left_alone() -> None:
    assert get(devices.remote()) == (os.environ.get("CUDA_VISIBLE_DEVICES"), [], [])
    assert get(devices.options(num_gpus=0).remote())[1:] == ([], [])
    assert ray.get_gpu_ids() == []


def test_a_program_may_set_the_variables_of_devices_itself(tmp_path: Path) -> None:
    script = """
        import os

        ray.init(num_cpus=1, num_gpus=1)
        name = "CUDA_VISIBLE_DEVICES"
        look = ray.remote(num_gpus=1)(lambda: (os.environ.get(name), ray.get_gpu_ids()))
        print(*ray.get(look.remote()))
    """
    environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    result = run_script(tmp_path / "script.py", script, environment=environment)
    assert "None [0]" in result.stdout


def test_a_worker_with_other_devices_than_before_is_not_shown_those(tmp_path: Path) -> None:
    script = """
        import os

        ray.init(num_cpus=1, resources={"TPU": 1, "HPU": 1})
        names = ("TPU_VISIBLE_CHIPS", "HABANA_VISIBLE_MODULES")
        look = ray.remote(lambda: [os.environ.get(name) for name in names])
        for resource in ("TPU", "HPU", "TPU"):
            print(ray.get(look.options(resources={resource: 1}).remote()))
    """
    lines = run_script(tmp_path / "script.py", script).lines()
    tpu, hpu = "['0', None]", "[None, '0']"
    assert [line for line in lines if line in (tpu, hpu)] == [tpu, hpu, tpu]


def test_chips_that_cannot_work_together_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="not a supported chip configuration"):
        devices.options(resources={"TPU": 3}).remote()


def test_a_worker_with_devices_serves_one_call_and_nobody_else() -> None:
    @ray.remote(num_gpus=1)
    def with_gpu() -> int:
        return os.getpid()

    @ray.remote
    def without() -> int:
        return os.getpid()

    first = get(with_gpu.remote())
    assert get(with_gpu.remote()) != first
    assert get(without.remote()) != first


def test_with_max_calls_0_a_worker_keeps_its_devices_for_the_next_call() -> None:
    @ray.remote(num_gpus=1, max_calls=0)
    def with_gpu() -> int:
        return os.getpid()

    assert get(with_gpu.remote()) == get(with_gpu.remote())


def test_more_than_one_gpu_must_be_whole() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        devices.options(num_gpus=1.5).remote()


@pytest.mark.parametrize(
    "options",
    [{"accelerator_type": "A100"}, {"accelerator_type": ""}, {"num_cpus": 1e30}],
    ids=repr,
)
def test_what_no_node_has_is_waited_for(options: dict[str, Any]) -> None:
    ref = where.options(**options).remote()
    assert ray.wait([ref], timeout=0.2) == ([], [ref])


# --- where -------------------------------------------------------------------------------------


def affinity(node_id: str, soft: bool) -> Any:
    return strategies.NodeAffinitySchedulingStrategy(node_id, soft=soft)


@pytest.mark.parametrize("strategy", ["DEFAULT", "SPREAD"])
def test_a_named_strategy_runs_the_task(strategy: str) -> None:
    get(where.options(scheduling_strategy=strategy).remote())


def test_affinity_to_this_node_runs_the_task_here() -> None:
    here = ray.get_runtime_context().get_node_id()
    for soft in (True, False):
        assert get(where.options(scheduling_strategy=affinity(here, soft)).remote()) == here


def test_hard_affinity_to_a_node_that_is_not_there_fails() -> None:
    strategy = affinity("ab" * 28, soft=False)
    with pytest.raises(ray.exceptions.TaskUnschedulableError, match="doesn't exist any more"):
        get(where.options(scheduling_strategy=strategy).remote())


def test_soft_affinity_to_a_node_that_is_not_there_runs_elsewhere() -> None:
    get(where.options(scheduling_strategy=affinity("ab" * 28, soft=True)).remote())


def test_hard_affinity_that_can_never_fit_fails() -> None:
    here = ray.get_runtime_context().get_node_id()
    strategy = affinity(here, soft=False)
    with pytest.raises(ray.exceptions.TaskUnschedulableError):
        get(where.options(num_cpus=99, scheduling_strategy=strategy).remote())


@pytest.mark.parametrize("node_id", ["zz", "f" * 56, "ab" * 27])
def test_an_id_that_is_no_nodes_is_refused(node_id: str) -> None:
    with pytest.raises(ValueError, match="Invalid node_id"):
        affinity(node_id, soft=True)


@pytest.mark.parametrize(
    "selector", [{"zone": "a"}, {"zone": "in(b,a)"}, {"zone": "!b"}, {"missing": "!in(a)"}]
)
def test_a_label_selector_that_this_node_meets_runs_the_task(selector: dict[str, str]) -> None:
    get(where.options(label_selector=selector).remote())


@pytest.mark.parametrize(
    "selector", [{"zone": "b"}, {"zone": "!in(a)"}, {"missing": "a"}, {"zone": ""}]
)
def test_a_label_selector_that_no_node_meets_is_waited_for(selector: dict[str, str]) -> None:
    ref = where.options(label_selector=selector).remote()
    assert ray.wait([ref], timeout=0.2) == ([], [ref])


def test_a_node_that_is_named_by_its_label_must_be_there() -> None:
    here = ray.get_runtime_context().get_node_id()
    assert get(where.options(label_selector={"ray.io/node-id": here}).remote()) == here
    gone = where.options(label_selector={"ray.io/node-id": "ab" * 28}).remote()
    with pytest.raises(ray.exceptions.TaskUnschedulableError):
        get(gone)


def test_a_fallback_takes_the_place_of_a_selector_that_no_node_meets() -> None:
    options = {"fallback_strategy": [{"label_selector": {"zone": "a"}}]}
    get(where.options(label_selector={"zone": "b"}, **options).remote())


@pytest.mark.parametrize("selector", [{"zone": "in(a"}, {"zone": "-a"}])
def test_a_label_selector_that_means_nothing_is_refused(selector: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="Invalid label selector value"):
        where.options(label_selector=selector)


def test_label_operators_decide() -> None:
    labels = strategies.NodeLabelSchedulingStrategy
    for hard in (
        {"zone": strategies.In("a", "b")},
        {"zone": strategies.NotIn("b")},
        {"zone": strategies.Exists()},
        {"missing": strategies.DoesNotExist()},
    ):
        get(where.options(scheduling_strategy=labels(hard)).remote())
    refused = where.options(scheduling_strategy=labels({"zone": strategies.In("b")})).remote()
    assert ray.wait([refused], timeout=0.2) == ([], [refused])
    preferred = labels({}, soft={"zone": strategies.In("b")})
    get(where.options(scheduling_strategy=preferred).remote())


def test_strategies_without_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot both be empty"):
        strategies.NodeLabelSchedulingStrategy({})
    with pytest.raises(ValueError, match="non-empty tuple"):
        strategies.In()


def test_a_demand_that_no_node_meets_is_told_of_on_standard_error(tmp_path: Path) -> None:
    script = """
        import sys, time

        ray.init(num_cpus=1)
        refs = [ray.remote(num_cpus=50)(lambda: 1).remote() for _ in range(2)]
        ray.wait(refs, timeout={seconds})
    """.replace("{seconds}", "12" if IMPLEMENTATION == "ray" else "4")
    result = run_script(tmp_path / "script.py", script)
    assert (result.stdout + result.stderr).count("{'CPU': 50.0}") == 1


# --- the runtime context -----------------------------------------------------------------------


def test_the_context_of_a_driver() -> None:
    context = ray.get_runtime_context()
    assert context.get_task_id() is None
    assert context.get_actor_id() is None
    assert set(context.get()) == {"job_id", "node_id", "namespace"}
    assert context.get_accelerator_ids()["GPU"] == []
    assert context.get_node_labels()["zone"] == "a"
    assert context.get_runtime_env_string() == "{}"
    assert not context.should_capture_child_tasks_in_placement_group
    for name in ("task_id", "actor_id", "was_current_actor_reconstructed"):
        with pytest.raises(AssertionError):
            getattr(context, name)
    with pytest.raises(RuntimeError):
        _ = context.current_actor
    assert context.current_placement_group_id.is_nil()
    assert context.get()["node_id"] == context.node_id == ray.NodeID.from_hex(context.get_node_id())
    assert context.job_id.hex() == context.get_job_id()
    assert repr(context.job_id) == f"JobID({context.get_job_id()})"


def test_the_context_of_a_task() -> None:
    @ray.remote(name="named", num_gpus=0.5)
    def look() -> dict[str, Any]:
        context = ray.get_runtime_context()
        return {
            "name": context.get_task_name(),
            "function": context.get_task_function_name().rpartition(".")[2],
            "resources": context.get_assigned_resources(),
            "gpus": context.get_accelerator_ids()["GPU"],
            "keys": sorted(context.get()),
            "labels": context.get_node_labels()["zone"],
            "actor": context.get_actor_id(),
            "cancelled": context.is_canceled(),
        }

    assert get(look.remote()) == {
        "name": "named",
        "function": "look",
        "resources": {"CPU": 1.0, "GPU": 0.5},
        "gpus": ["0"],
        "keys": ["job_id", "namespace", "node_id", "task_id"],
        "labels": "a",
        "actor": None,
        "cancelled": False,
    }


def test_the_ids_of_an_actor_and_its_calls() -> None:
    @ray.remote
    class Looker:
        def look(self) -> dict[str, Any]:
            context = ray.get_runtime_context()
            hexes = {"actor_id": context.get_actor_id(), "task_id": context.get_task_id()}
            facts = context.get()
            assert {name: facts[name].hex() for name in hexes} == hexes
            assert facts["actor_id"] == context.actor_id
            return dict(facts)

    looker = Looker.remote()
    ref = looker.look.remote()
    facts = get(ref)
    assert sorted(facts) == ["actor_id", "job_id", "namespace", "node_id", "task_id"]
    assert facts["task_id"] == ref.task_id()
    assert isinstance(facts["actor_id"], ray.ActorID)
    assert facts["task_id"] == ray.TaskID(facts["task_id"].binary())
    assert not facts["task_id"].is_nil()
    assert ray.TaskID.nil().is_nil()
    with pytest.raises(TypeError):
        ray.TaskID("text")
    with pytest.raises(ValueError):
        ray.JobID(b"too many bytes")


# --- the timeline ------------------------------------------------------------------------------


@pytest.mark.skipif(IMPLEMENTATION == "ray", reason="the reference shows it seconds later")
def test_the_timeline_shows_what_ran(tmp_path: Path) -> None:
    get([where.options(name="timed").remote() for _ in range(3)])
    events = [event for event in ray.timeline() if event["name"] == "timed"]
    assert [event["ph"] for event in events] == ["X"] * 3
    assert all(event["dur"] >= 0 and event["args"]["state"] == "FINISHED" for event in events)
    assert ray.timeline(str(tmp_path / "trace.json")) is None
    written = json.loads((tmp_path / "trace.json").read_text())
    assert {event["ph"] for event in written} == {"X", "M"}
