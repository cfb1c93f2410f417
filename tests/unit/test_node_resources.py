"""The node machine gives devices out, keeps their workers apart, and says what can never run."""

from __future__ import annotations

from poolray.ids import ClassId, NodeId, TaskId, WorkerId
from poolray.node.effects import Notice, StartWorker
from poolray.protocol.state import NodeRow, StateKind, TaskRow, WorkerRow
from poolray.protocol.values import LabelMatch, LabelOperator, Outcome, Placement
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import CPU, DRIVER, NODE, Bench, result_of

GPUS = {"GPU": ["0", "1"]}


def bench_with_gpus(**options: object) -> Bench:
    bench = Bench(cpus=4, devices=GPUS, **options)  # type: ignore[arg-type]
    bench.group()
    return bench


def gpu_class(bench: Bench, name: str, gpus: float, **options: object) -> ClassId:
    more = {"GPU": int(gpus * CPU)}
    return bench.task_class(name, cpus=0.1, more=more, **options)


def start(bench: Bench, class_id: ClassId) -> tuple[WorkerId, RunTasks]:
    """Submit a task; gives the worker that has it and the packet."""
    bench.submit(class_id)
    bench.start_all()
    (worker_id,) = bench.busy()
    return worker_id, bench.read(worker_id)


def devices_in(packet: RunTasks) -> dict[str, list[str]]:
    return packet.classes[0].devices


def free_gpus(bench: Bench) -> float:
    return bench.node.statistics().resources_available.get("GPU", 0.0)


# --- devices -----------------------------------------------------------------------------------


def test_each_lease_has_devices_of_its_own_and_gives_them_back() -> None:
    bench = bench_with_gpus()
    one = gpu_class(bench, "one", 1, max_calls=1)
    first, packet_1 = start(bench, one)
    second, packet_2 = start(bench, one)
    assert [devices_in(p)["GPU"] for p in (packet_1, packet_2)] == [["0"], ["1"]]
    third = bench.submit(one)
    assert bench.start_all() == []  # there is no device for it
    bench.finish(first, packet_1)
    assert bench.reads_stop(first)
    assert bench.state(third) == "QUEUED"
    bench.lose(first, signal=None)
    bench.start_all()
    (worker_id,) = bench.busy()
    packet = bench.read(worker_id)
    assert devices_in(packet) == {"GPU": ["0"]}
    bench.finish(worker_id, packet)
    bench.finish(second, packet_2)
    assert free_gpus(bench) == 2.0


def test_shares_fill_one_device_before_the_next() -> None:
    bench = bench_with_gpus()
    half = gpu_class(bench, "half", 0.5, max_calls=1)
    packets = [start(bench, half) for _ in range(3)]
    assert [devices_in(packet)["GPU"] for _, packet in packets] == [["0"], ["0"], ["1"]]
    whole = bench.submit(gpu_class(bench, "whole", 1))
    bench.start_all()
    assert bench.state(whole) == "QUEUED"
    worker_id, packet = packets[0]
    bench.finish(worker_id, packet)  # two halves of two devices are free now: that is no device
    bench.lose(worker_id, signal=None)
    bench.start_all()
    assert bench.state(whole) == "QUEUED"
    worker_id, packet = packets[1]
    bench.finish(worker_id, packet)
    bench.lose(worker_id, signal=None)
    bench.start_all()
    assert bench.state(whole) == "RUNNING"


def test_a_worker_that_had_devices_serves_no_calls_without_and_the_other_way_round() -> None:
    bench = bench_with_gpus()
    keeps = gpu_class(bench, "keeps", 1)
    plain = bench.task_class("plain")
    gpu_worker, packet = start(bench, keeps)
    bench.finish(gpu_worker, packet)
    plain_worker, packet = start(bench, plain)
    assert plain_worker != gpu_worker
    bench.finish(plain_worker, packet)
    again, packet = start(bench, keeps)
    assert again == gpu_worker
    assert devices_in(packet) == {"GPU": ["0"]}
    other, _ = start(bench, keeps)
    assert other not in (gpu_worker, plain_worker)


def test_an_unsuitable_worker_makes_room_when_there_may_be_no_more() -> None:
    bench = bench_with_gpus(workers_max=1)
    plain_worker, packet = start(bench, bench.task_class("plain"))
    bench.finish(plain_worker, packet)
    task = bench.submit(gpu_class(bench, "gpu", 1))
    assert bench.take(StartWorker) == []
    assert bench.reads_stop(plain_worker)
    bench.lose(plain_worker, signal=None)
    bench.start_all()
    assert bench.state(task) == "RUNNING"


def test_a_blocked_task_lends_its_cpus_and_keeps_its_devices() -> None:
    bench = bench_with_gpus()
    worker_id, packet = start(bench, gpu_class(bench, "gpu", 1))
    bench.block(worker_id)
    assert bench.cpus_free == 4.0
    assert free_gpus(bench) == 1.0
    bench.unblock(worker_id)
    assert bench.cpus_free == 3.9
    bench.block(worker_id)
    bench.lose(worker_id, packet.sequence)
    assert free_gpus(bench) == 2.0


def test_a_killed_workers_devices_are_free_at_once() -> None:
    bench = bench_with_gpus()
    worker_id, packet = start(bench, gpu_class(bench, "gpu", 2, max_retries=0))
    assert free_gpus(bench) == 0.0
    bench.lose(worker_id, packet.sequence)
    assert free_gpus(bench) == 2.0


# --- what can never run ------------------------------------------------------------------------


def notices(bench: Bench) -> list[str]:
    return [notice.text for notice in bench.take(Notice)]


def test_a_demand_that_no_node_meets_waits_and_is_told_once() -> None:
    bench = Bench(cpus=2)
    bench.group()
    large = bench.task_class("large", cpus=50)
    task = bench.submit(large)
    bench.submit(large)
    assert notices(bench) == []
    bench.after(bench.node.state.config.infeasible_notice_after_s)
    (text,) = notices(bench)
    assert text.startswith("Task large waits for {'CPU': 50.0}")
    bench.submit(large)
    bench.after(60)
    assert notices(bench) == []
    assert bench.state(task) == "QUEUED"


def test_a_demand_that_is_given_up_in_time_is_not_told_of() -> None:
    bench = Bench(cpus=2)
    bench.group()
    large = bench.task_class("large", cpus=50)
    bench.submit(large)
    bench.terminate(bench.node.state.groups[next(iter(bench.node.state.groups))].group_id)
    bench.after(60)
    assert notices(bench) == []


def test_what_can_never_run_does_not_hold_up_the_rest() -> None:
    bench = Bench(cpus=1)
    bench.group()
    nowhere = Placement(labels=[[LabelMatch("zone", LabelOperator.IN, ["b"])]])
    bench.submit_many(bench.task_class("barred", placement=nowhere), 3)
    tasks = bench.submit_many(bench.task_class("plain"), 200)
    bench.run_all()
    assert all(bench.state(task) is None for task in tasks)


def placed(bench: Bench, placement: Placement) -> TaskId:
    name = f"class-{len(bench.node.state.classes)}"
    task = bench.submit(bench.task_class(name, placement=placement))
    bench.start_all()
    return task


def test_labels_decide_where_a_task_runs() -> None:
    bench = Bench(cpus=8, labels={"zone": "a"})
    bench.group()

    def runs(*alternatives: list[LabelMatch]) -> bool:
        return bench.state(placed(bench, Placement(labels=list(alternatives)))) == "RUNNING"

    in_a = LabelMatch("zone", LabelOperator.IN, ["b", "a"])
    in_b = LabelMatch("zone", LabelOperator.IN, ["b"])
    assert runs([in_a])
    assert not runs([in_b])
    assert not runs([in_a, in_b])
    assert runs([in_b], [in_a])
    assert runs([LabelMatch("missing", LabelOperator.NOT_IN, ["a"])])
    assert not runs([LabelMatch("zone", LabelOperator.NOT_IN, ["a"])])
    assert runs([LabelMatch("zone", LabelOperator.EXISTS)])
    assert not runs([LabelMatch("zone", LabelOperator.NOT_EXISTS)])
    assert runs([LabelMatch("ray.io/node-id", LabelOperator.IN, [NODE.hex()])])


def test_affinity_to_this_node_runs_to_another_fails_unless_soft() -> None:
    bench = Bench(cpus=8)
    bench.group()
    other = NodeId(b"B" * 28)
    assert bench.state(placed(bench, Placement(node_id=NODE))) == "RUNNING"
    assert bench.state(placed(bench, Placement(node_id=other, is_soft=True))) == "RUNNING"
    gone = placed(bench, Placement(node_id=other))
    assert bench.state(gone) is None
    error = bench.value_of(result_of(gone))
    assert isinstance(error, bytes)
    assert error.startswith(b"TaskUnschedulableError: The task is not schedulable")
    assert other.hex().encode() in error


def test_many_unschedulable_tasks_and_their_dependents_all_fail() -> None:
    bench = Bench(cpus=8)
    bench.group()
    class_id = bench.task_class("gone", placement=Placement(node_id=NodeId(b"B" * 28)))
    first = bench.submit(class_id)
    chain = [bench.submit(class_id, dependencies=[result_of(first)]) for _ in range(3)]
    assert all(bench.state(task) is None for task in [first, *chain])


# --- what the node tells of itself -------------------------------------------------------------


def tasks_of(bench: Bench) -> list[TaskRow]:
    return [row for rows in bench.rows(StateKind.TASKS) for row in rows]  # type: ignore[misc]


def test_living_tasks_come_first_then_the_last_that_ended() -> None:
    bench = Bench(cpus=1)
    bench.group()
    class_id = bench.task_class("f")
    worker_id, packet = start(bench, class_id)
    bench.now = 10.0
    bench.finish(worker_id, packet, elapsed_s=2.0)
    bench.finish(*start(bench, class_id))
    running = bench.submit(class_id)
    waiting = bench.submit(class_id)
    dependent = bench.submit(class_id, dependencies=[result_of(waiting)])
    rows = tasks_of(bench)
    assert [(row.task_id, row.state) for row in rows[:3]] == [
        (running, "RUNNING"),
        (waiting, "PENDING_NODE_ASSIGNMENT"),
        (dependent, "PENDING_ARGS_AVAIL"),
    ]
    assert [row.state for row in rows[3:]] == ["FINISHED", "FINISHED"]
    assert (rows[4].started_s, rows[4].ended_s) == (8.0, 10.0)
    assert rows[4].worker_id == worker_id
    assert rows[4].name == rows[4].function_name == "f"


def test_tasks_that_are_reported_together_share_the_time() -> None:
    bench = Bench(cpus=1)
    bench.group()
    class_id = bench.task_class("f")
    bench.warm_up(class_id)
    bench.now = 5.0
    tasks = bench.submit_many(class_id, 4)
    bench.run_all(elapsed_s=0.0)
    rows = tasks_of(bench)[:4]
    assert {row.task_id for row in rows} == set(tasks)
    assert all(row.started_s <= row.ended_s for row in rows)
    starts = [row.started_s for row in rows]
    assert starts == sorted(starts, reverse=True)


def test_failed_tasks_are_told_with_what_went_wrong() -> None:
    bench = Bench(cpus=1)
    bench.group()
    class_id = bench.task_class("f", max_retries=0)
    worker_id, packet = start(bench, class_id)
    failure = Outcome(values=[b"pickled"], is_error=True, summary="ValueError: no")
    bench.finish(worker_id, packet, [failure])
    worker_id, packet = start(bench, class_id)
    bench.lose(worker_id, packet.sequence)
    lost, raised = tasks_of(bench)
    assert (raised.state, raised.error_type) == ("FAILED", "TASK_EXECUTION_EXCEPTION")
    assert raised.error_message == "ValueError: no"
    assert (lost.state, lost.error_type, lost.attempt) == ("FAILED", "WORKER_DIED", 0)
    assert lost.worker_id == worker_id


def test_the_history_is_bounded_and_can_be_switched_off() -> None:
    for limit in (3, 0):
        bench = Bench(cpus=1, task_history_max=limit)
        bench.group()
        class_id = bench.task_class("f", max_retries=0)
        failure = Outcome(values=[b"pickled"], is_error=True, summary="no")
        for _ in range(5):
            worker_id, packet = start(bench, class_id)
            bench.finish(worker_id, packet, [failure])
        assert len(tasks_of(bench)) == limit


def test_a_worker_is_answered_in_packets_that_its_channel_takes() -> None:
    bench = Bench(cpus=1)
    bench.group()
    class_id = bench.task_class("f", max_retries=0)
    failure = Outcome(values=[b"pickled"], is_error=True, summary="x" * 4000)
    for _ in range(20):
        worker_id, packet = start(bench, class_id)
        bench.finish(worker_id, packet, [failure])
    assert len(bench.rows(StateKind.TASKS, DRIVER)) == 1
    parts = bench.rows(StateKind.TASKS, worker_id)
    assert len(parts) > 1
    assert sum(len(rows) for rows in parts) == 20


def test_workers_are_told_alive_and_dead() -> None:
    bench = Bench(cpus=1)
    bench.group()
    worker_id, packet = start(bench, bench.task_class("f", max_retries=0))
    bench.lose(worker_id, packet.sequence, signal=11)
    alive, _ = start(bench, bench.task_class("g"))
    (rows,) = bench.rows(StateKind.WORKERS)
    found = [(r.worker_id, r.is_alive, r.signal) for r in rows if isinstance(r, WorkerRow)]
    assert found == [(worker_id, False, 11), (alive, True, None)]


def test_an_overdrawn_node_has_nothing_available() -> None:
    bench = Bench(cpus=1, resources={"gate": 2})
    bench.group()
    class_id = bench.task_class("f")
    blocked, _ = start(bench, class_id)
    bench.block(blocked)
    start(bench, class_id)
    bench.unblock(blocked)
    ((row,),) = bench.rows(StateKind.NODES)
    assert isinstance(row, NodeRow)
    assert row.available == {"CPU": 0, "gate": 2 * CPU}


def test_an_attempt_that_failed_is_listed_beside_the_one_that_runs() -> None:
    bench = Bench(cpus=1)
    bench.group()
    worker_id, packet = start(bench, bench.task_class("f", max_retries=1))
    failure = Outcome(values=[b"pickled"], is_error=True, retriable=True, summary="again")
    bench.finish(worker_id, packet, [failure])
    found = [(row.state, row.attempt, row.error_message) for row in tasks_of(bench)]
    assert found == [("RUNNING", 1, ""), ("FAILED", 0, "again")]
