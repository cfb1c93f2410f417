"""Ending work before memory runs out: when it is measured, who is ended, what is tried again."""

from __future__ import annotations

import random

import pytest

from poolray.ids import TaskId, WorkerId
from poolray.node.effects import MeasureMemory, Notice
from poolray.node.memory_protection import Candidate, choose
from poolray.protocol.node import ClusterView, MemoryReport, NodeView, ProcessMemory
from poolray.protocol.worker import RunTasks
from tests.unit.node_harness import CPU, Bench, GroupFailed, TerminateWorker, result_of
from tests.unit.test_node_actors import ActorBench
from tests.unit.test_node_peers import B, Pair

GIB = 1 << 30
MIB = 1 << 20
ANY = -1
OUT_OF_MEMORY = b"OutOfMemoryError"
CRASHED = b"WorkerCrashedError"


def bench_of(cpus: int = 4, **config: object) -> Bench:
    bench = Bench(cpus=cpus, watches_memory=True, resources={"memory": 8 * GIB}, **config)
    bench.group()
    return bench


def start(bench: Bench, task: TaskId) -> WorkerId:
    """The worker that begins a task that was submitted last."""
    bench.start_all()
    for worker in bench.busy():
        message = bench.queues[worker][0]
        if isinstance(message, RunTasks) and message.tasks[0].task_id == task:
            bench.read(worker)
            return worker
    raise AssertionError("nobody runs it")


def run(bench: Bench, kind: bytes, **options: object) -> tuple[TaskId, WorkerId]:
    """A task that runs, a second later than those before."""
    bench.now += 1
    task = bench.submit(kind, **options)  # type: ignore[arg-type]
    return task, start(bench, task)


def measure(bench: Bench) -> MeasureMemory:
    """Time passes until the node wants to know."""
    deadline = bench.node.next_deadline()
    assert deadline is not None
    bench.after(max(0.0, deadline - bench.now))
    (wanted,) = bench.take(MeasureMemory)
    return wanted


def shortage(bench: Bench, used: float = 9.9) -> list[WorkerId]:
    """Of 10 GiB so many are in use; gives the workers that are ended."""
    report = MemoryReport(used_bytes=int(used * GIB), total_bytes=10 * GIB)
    bench.take(MeasureMemory)
    bench.tell(report)
    for wanted in bench.take(MeasureMemory):
        assert wanted.is_detailed
        detailed = MemoryReport(
            used_bytes=report.used_bytes,
            total_bytes=report.total_bytes,
            workers=[(worker, 2 * GIB) for worker, _ in wanted.workers],
            is_detailed=True,
            processes=[ProcessMemory(pid=4, used_bytes=3 * GIB, name="browser")],
        )
        bench.tell(detailed)
    return [effect.worker_id for effect in bench.take(TerminateWorker)]


def lose(bench: Bench, worker: WorkerId) -> None:
    """The worker's end, while it runs the packet that it was sent last."""
    bench.lose(worker, bench.node.state.workers[worker].sequence, 0)


def error_of(bench: Bench, task: TaskId) -> bytes:
    value = bench.value_of(result_of(task))
    assert isinstance(value, bytes)
    return value


# ---- whom to end ---------------------------------------------------------------------------------


def candidate(name: str, owner: str, started_s: float, retriable: bool = True) -> Candidate:
    return Candidate(WorkerId(name.encode()), owner.encode(), retriable, started_s)


def chosen(*candidates: Candidate) -> tuple[str, bool]:
    """The victim whatever the order of the candidates, and whether it is alone."""
    found = set()
    for seed in range(5):
        shuffled = list(candidates)
        random.Random(seed).shuffle(shuffled)
        choice = choose(shuffled)
        assert choice is not None
        found.add((choice[0].worker_id.decode(), choice[1]))
    (answer,) = found
    return answer


def test_without_work_nobody_is_ended() -> None:
    assert choose([]) is None


def test_what_can_be_tried_again_goes_first_even_if_it_is_older() -> None:
    assert chosen(candidate("old", "a", 1), candidate("new", "a", 9, retriable=False)) == (
        "old",
        True,
    )


def test_of_an_owner_the_work_that_began_last_goes_first() -> None:
    assert chosen(*(candidate(str(n), "a", n) for n in range(4))) == ("3", False)


def test_the_owner_with_most_work_gives_some_up() -> None:
    many = [candidate(f"a{n}", "a", n) for n in range(3)]
    few = [candidate(f"b{n}", "b", 10 + n) for n in range(2)]
    assert chosen(*many, *few) == ("a2", False)


def test_of_owners_with_as_much_work_the_one_that_began_later_gives_up() -> None:
    older = [candidate("a1", "a", 1), candidate("a2", "a", 9)]
    younger = [candidate("b1", "b", 2), candidate("b2", "b", 3)]
    assert chosen(*older, *younger) == ("b2", False)


def test_of_what_cannot_be_tried_again_the_last_begun_goes_first_whoever_owns_it() -> None:
    several = [candidate(f"{n}", str(n), n, retriable=False) for n in range(3)]
    assert chosen(*several) == ("2", False)


# ---- when it is measured -------------------------------------------------------------------------


def test_nothing_is_measured_while_nothing_runs() -> None:
    bench = bench_of()
    assert bench.node.next_deadline() is None
    run(bench, bench.task_class())
    assert bench.node.next_deadline() == bench.now + 0.25
    assert measure(bench) == MeasureMemory([], False)
    assert bench.node.next_deadline() == bench.now + 0.25


def test_the_clock_stops_when_the_last_task_has_ended() -> None:
    bench = bench_of()
    task = bench.submit(bench.task_class())
    bench.start_all()
    assert bench.node.next_deadline() is not None
    bench.run_all(task)
    bench.after(100.0)
    while (deadline := bench.node.next_deadline()) is not None:
        bench.after(deadline - bench.now)  # (an idle worker that is too many goes as well)
    assert not bench.take(MeasureMemory)


@pytest.mark.parametrize(
    "options", [{"memory_monitor_refresh_ms": 0}, {"watches_memory": False}], ids=repr
)
def test_it_can_be_switched_off(options: dict[str, object]) -> None:
    bench = Bench(cpus=1, **{"watches_memory": True, **options})  # type: ignore[arg-type]
    bench.group()
    run(bench, bench.task_class())
    bench.after(60.0)
    assert not bench.take(MeasureMemory)


def test_a_task_that_can_run_nowhere_is_no_reason_to_measure() -> None:
    bench = bench_of()
    bench.submit(bench.task_class(more={"unheard of": 10_000}))
    bench.after(60.0)
    assert not bench.take(MeasureMemory)


def test_calls_of_actors_are_measured_too() -> None:
    bench = ActorBench(watches_memory=True)
    actor, _ = bench.live()
    bench.call(actor)
    assert measure(bench) == MeasureMemory([], False)


# ---- memory is short -----------------------------------------------------------------------------


def test_below_the_threshold_nobody_is_ended() -> None:
    bench = bench_of()
    run(bench, bench.task_class())
    assert shortage(bench, used=9.4) == []


@pytest.mark.parametrize(
    ("config", "used", "ends"),
    [
        ({"memory_usage_threshold": 0.5}, 5.1, True),
        ({"memory_usage_threshold": 0.5}, 4.9, False),
        ({"min_memory_free_bytes": 100 * MIB}, 9.8, False),
        ({"min_memory_free_bytes": 100 * MIB}, 9.95, True),
        ({"min_memory_free_bytes": 2 * GIB}, 9.4, False),
    ],
)
def test_the_threshold_is_a_share_unless_enough_is_free(
    config: dict[str, object], used: float, ends: bool
) -> None:
    bench = bench_of(**config)
    run(bench, bench.task_class())
    assert bool(shortage(bench, used)) is ends


def test_one_is_ended_at_a_time_and_tried_again_after_a_pause() -> None:
    bench = bench_of()
    kind = bench.task_class()
    (first, _), (second, worker) = run(bench, kind), run(bench, kind)
    assert shortage(bench) == [worker]
    assert shortage(bench) == []  # what it frees may be enough
    lose(bench, worker)
    assert bench.state(second) == "DELAYED"
    bench.after(0.9)
    assert bench.state(second) == "DELAYED"
    bench.after(0.2)
    assert bench.state(second) in ("QUEUED", "RUNNING")
    assert bench.state(first) == "RUNNING"


def test_each_pause_is_twice_as_long_up_to_a_limit() -> None:
    bench = bench_of(task_oom_retry_delay_max_ms=3000)
    kind = bench.task_class()
    run(bench, kind)
    task, worker = run(bench, kind)
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        assert shortage(bench) == [worker]
        lose(bench, worker)
        bench.after(pause_s - 0.01)
        assert bench.state(task) == "DELAYED"
        bench.after(0.02)
        worker = start(bench, task)


def test_work_that_was_alone_fails_for_it_would_have_no_more_memory_next_time() -> None:
    bench = bench_of()
    task, worker = run(bench, bench.task_class())
    assert shortage(bench) == [worker]
    lose(bench, worker)
    assert error_of(bench, task).startswith(OUT_OF_MEMORY)


def test_a_budget_says_how_often_it_is_tried_again_alone_or_not() -> None:
    bench = bench_of(task_oom_retries=2)
    task, worker = run(bench, bench.task_class())
    for _ in range(2):
        assert shortage(bench) == [worker]
        lose(bench, worker)
        bench.after(10.0)
        worker = start(bench, task)
    assert shortage(bench) == [worker]
    lose(bench, worker)
    assert error_of(bench, task).startswith(OUT_OF_MEMORY)


def test_the_two_budgets_are_apart() -> None:
    bench = bench_of(task_oom_retries=5)
    task, worker = run(bench, bench.task_class(max_retries=1))
    for _ in range(3):
        assert shortage(bench) == [worker]
        lose(bench, worker)
        bench.after(10.0)
        worker = start(bench, task)
    lose(bench, worker)  # a crash of its own
    bench.after(10.0)
    worker = start(bench, task)
    lose(bench, worker)
    assert error_of(bench, task).startswith(CRASHED)


def test_a_task_that_may_not_be_retried_is_ended_last_and_fails() -> None:
    bench = bench_of()
    (older, older_worker), (newer, newer_worker) = (
        run(bench, bench.task_class("f")),
        run(bench, bench.task_class("g", max_retries=0)),
    )
    assert shortage(bench) == [older_worker]
    lose(bench, older_worker)
    assert error_of(bench, older).startswith(OUT_OF_MEMORY)  # alone among what can be retried
    assert shortage(bench) == [newer_worker]
    lose(bench, newer_worker)
    assert error_of(bench, newer).startswith(OUT_OF_MEMORY)


def test_a_task_without_budget_left_is_spared_like_one_without_retries() -> None:
    bench = bench_of(task_oom_retries=1)
    kind = bench.task_class()
    _, first_worker = run(bench, kind)
    task, worker = run(bench, kind)
    assert shortage(bench) == [worker]
    lose(bench, worker)
    bench.after(10.0)
    start(bench, task)
    assert shortage(bench) == [first_worker]


def test_tasks_of_a_worker_are_its_own_group() -> None:
    bench = bench_of()
    kind = bench.task_class()
    _, parent = run(bench, kind)
    bench.block(parent)
    workers = [run(bench, kind, client=parent)[1] for _ in range(3)]
    assert shortage(bench) == [workers[-1]]


def test_a_worker_that_is_ended_gets_nothing_more() -> None:
    bench = bench_of(cpus=1)
    kind = bench.task_class()
    task = bench.submit(kind)
    bench.start_all()
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert shortage(bench) == [worker]
    bench.finish(worker, packet)  # it was faster than its end
    other = bench.submit(kind)
    assert bench.state(other) == "QUEUED"
    lose(bench, worker)
    bench.run_all()
    assert bench.value_of(result_of(task)) == b"result"
    assert bench.value_of(result_of(other)) == b"result"


def test_only_the_call_that_ran_is_charged() -> None:
    bench = Bench(cpus=1, watches_memory=True, task_oom_retries=0)
    group = bench.group(1, workers=1)
    kind = bench.caller_class(group_id=group)
    bench.warm_up(kind)
    bench.submit(kind, calls=6)
    (worker,) = bench.busy()
    packet = bench.read(worker)
    assert len(packet.tasks[0].calls) > 1
    assert shortage(bench) == [worker]
    bench.lose(worker, packet.sequence, 0)
    failed = [result for _, _, results in bench.delivered() for result in results]
    assert len(failed) == 1
    assert bench.node.statistics().tasks  # the others wait for the next worker


def test_a_group_that_breaks_is_told_why() -> None:
    bench = Bench(cpus=2, watches_memory=True)
    group = bench.group(1, workers=1, break_on_death=True)
    bench.submit(bench.caller_class(group_id=group))
    (worker,) = bench.busy()
    bench.read(worker)
    assert shortage(bench) == [worker]
    lose(bench, worker)
    (failed,) = bench.take(GroupFailed)
    assert b"memory_usage_threshold" in failed.error


def test_the_user_is_told_and_not_over_and_over() -> None:
    bench = bench_of(cpus=8)
    kind = bench.task_class(name="resize_images")
    for worker in [run(bench, kind)[1] for _ in range(6)][::-1]:
        assert shortage(bench) == [worker]
        lose(bench, worker)
    (notice,) = bench.take(Notice)
    assert "resize_images" in notice.text
    assert "9.90 GiB of 10.00 GiB" in notice.text


def test_when_nothing_can_be_ended_the_user_is_told_who_uses_memory() -> None:
    bench = bench_of()
    for _ in range(3):
        assert shortage(bench) == []
    (notice,) = bench.take(Notice)
    assert "pid 4 3.00 GiB browser" in notice.text


def test_everything_is_back_afterwards() -> None:
    bench = bench_of()
    kind = bench.task_class()
    tasks = [run(bench, kind) for _ in range(3)]
    for _, worker in tasks[::-1]:
        assert shortage(bench) == [worker]
        lose(bench, worker)
    bench.after(5.0)
    bench.run_all()
    bench.drop(*(result_of(task) for task, _ in tasks))
    bench.assert_empty()


def test_a_cancelled_task_stays_cancelled() -> None:
    bench = bench_of()
    kind = bench.task_class()
    run(bench, kind)
    task, worker = run(bench, kind)
    bench.cancel(task)
    assert shortage(bench) == [worker]
    lose(bench, worker)
    assert error_of(bench, task).startswith(b"TaskCancelledError")


def test_idle_workers_that_keep_memory_go_before_any_work() -> None:
    bench = bench_of()
    kind = bench.task_class()
    idle = run(bench, kind)[1]
    _, worker = run(bench, kind)
    bench.report(
        idle, bench.node.state.workers[idle].packets[0].records[0].task_id, 0, [b"r"], ended=1
    )
    assert shortage(bench) == []
    assert bench.reads_stop(idle)
    bench.lose(idle, signal=None)
    assert shortage(bench) == [worker]


def test_idle_workers_of_a_pool_and_those_that_keep_little_stay() -> None:
    bench = bench_of(idle_worker_killing_memory_threshold_bytes=3 * GIB)
    kind = bench.task_class()
    idle = run(bench, kind)[1]
    _, worker = run(bench, kind)
    bench.report(
        idle, bench.node.state.workers[idle].packets[0].records[0].task_id, 0, [b"r"], ended=1
    )
    assert shortage(bench) == [worker]
    pool = Bench(watches_memory=True)
    group = pool.group(1, workers=2)
    pool.submit(pool.caller_class(group_id=group))
    (worker,) = pool.busy()
    assert shortage(pool) == [worker]


# ---- one task uses too much ----------------------------------------------------------------------


def over_limit(bench: Bench, worker: WorkerId, used_bytes: int) -> list[WorkerId]:
    report = MemoryReport(used_bytes=0, total_bytes=10 * GIB, workers=[(worker, used_bytes)])
    bench.tell(report)
    return [effect.worker_id for effect in bench.take(TerminateWorker)]


def test_a_task_over_its_limit_fails_at_once() -> None:
    bench = bench_of()
    kind = bench.task_class(more={"memory": 100 * MIB * 10_000})
    (task, worker), (_, neighbour) = run(bench, kind), run(bench, kind)
    wanted = measure(bench)
    assert wanted.workers == [(worker, 164 * MIB), (neighbour, 164 * MIB)]
    assert over_limit(bench, worker, 164 * MIB) == []
    assert over_limit(bench, worker, 165 * MIB) == [worker]
    lose(bench, worker)
    error = error_of(bench, task)
    assert error.startswith(OUT_OF_MEMORY)
    assert b"memory=104857600" in error


def test_a_limit_holds_in_a_placement_group_too() -> None:
    bench = bench_of()
    amount = 100 * MIB * 10_000
    names = [f"memory_group_{place}5e6f" for place in ("", "0_")]
    for name in names:
        bench.node.state.resources.total[name] = amount
        bench.node.state.resources.available[name] = amount
    _, worker = run(bench, bench.task_class(more=dict.fromkeys(names, amount)))
    assert measure(bench).workers == [(worker, 164 * MIB)]


def test_tasks_without_a_limit_are_not_measured_one_by_one() -> None:
    bench = bench_of()
    run(bench, bench.task_class())
    assert measure(bench).workers == []


def test_limits_can_be_for_scheduling_only() -> None:
    bench = bench_of(enforce_memory_limits=0)
    _, worker = run(bench, bench.task_class(more={"memory": 100 * MIB * 10_000}))
    assert measure(bench).workers == []
    assert over_limit(bench, worker, 5 * GIB) == []


# ---- on another node -----------------------------------------------------------------------------


def test_its_owner_tries_a_task_again_that_another_node_has_ended() -> None:
    pair = Pair(max_retries=1)
    tasks = []
    view = NodeView(node_id=B, total={}, available={"CPU": 2 * CPU}, queued_tasks=0)
    for _ in range(2):
        pair.b.now += 1
        pair.a.tell(ClusterView(nodes=[view]))
        tasks.append(pair.a.submit(pair.kind))
        pair.carry()
        pair.b.start_all()
    for _ in range(3):  # more often than it may crash
        workers = pair.b.busy()
        for worker in workers:
            pair.b.read(worker)
        (worker,) = shortage(pair.b)
        lose(pair.b, worker)
        pair.carry()
        states = [pair.a.state(task) for task in tasks]
        assert sorted(map(str, states)) == ["DELAYED", "FORWARDED"]
        pair.b.now += 120
        pair.a.tell(ClusterView(nodes=[view]))
        pair.a.after(120)
        pair.carry()
        pair.b.start_all()
    assert [pair.a.state(task) for task in tasks] == ["FORWARDED"] * 2


def test_a_task_that_was_alone_on_another_node_fails() -> None:
    pair = Pair()
    task = pair.a.submit(pair.kind)
    pair.carry()
    pair.b.start_all()
    (worker,) = pair.b.busy()
    pair.b.read(worker)
    assert shortage(pair.b) == [worker]
    lose(pair.b, worker)
    pair.carry()
    assert error_of(pair.a, task).startswith(OUT_OF_MEMORY)


# ---- actors --------------------------------------------------------------------------------------


def test_actors_that_may_not_be_restarted_are_spared_until_the_last() -> None:
    bench = ActorBench(cpus=4, watches_memory=True)
    bench.live()
    _, worker = run(bench, bench.task_class())
    assert shortage(bench) == [worker]


def test_the_call_of_an_actor_that_was_ended_says_why_and_so_do_later_ones() -> None:
    bench = ActorBench(cpus=4, watches_memory=True)
    actor, worker = bench.live()
    call = bench.call(actor)
    packet = bench.read(worker)
    assert shortage(bench) == [worker]
    bench.lose(worker, packet.sequence, 0)
    assert error_of(bench, call).startswith(OUT_OF_MEMORY)
    later = error_of(bench, bench.call(actor))
    assert later.startswith(b"ActorDiedError")
    assert b"memory_usage_threshold" in later


def test_an_actor_that_may_be_restarted_is_ended_like_a_task() -> None:
    bench = ActorBench(cpus=4, watches_memory=True)
    actor, worker = bench.live(max_restarts=1)
    run(bench, bench.task_class("g", max_retries=0))
    assert shortage(bench) == [worker]
    lose(bench, worker)
    bench.construct()
    call = bench.call(actor)
    assert bench.state(call) == "RUNNING"
