"""Watches: a client that takes refs one after another tells the node of each of them once."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from poolray.ids import ObjectId
from poolray.node.effects import Reply
from poolray.protocol.client import CancelRequest, EndWatches, WaitObjects, WaitReply
from tests.unit.node_harness import DRIVER, Bench, result_of
from tests.unit.test_node_peers import B, Pair, SendPeer

A = ObjectId(b"A" * 28)


class Taker:
    """A client that waits for a list again and again."""

    def __init__(self, bench: Bench, fetch: bool = False) -> None:
        self.bench = bench
        self.fetch = fetch
        self.requests = 1000 if fetch else 100

    def wait(
        self,
        object_ids: Iterable[ObjectId] = (),
        *,
        count: int = 1,
        left: Iterable[int] = (),
        ahead: int = 0,
        watch: int = 1,
    ) -> int:
        self.requests += 1
        message = WaitObjects(
            request_id=self.requests,
            object_ids=list(object_ids),
            count=count,
            watch=watch,
            left=list(left),
            ahead=ahead,
            fetch=self.fetch,
        )
        self.bench.tell(message, DRIVER)
        return self.requests

    def answers(self) -> dict[int, list[int]]:
        return self.bench.ready_indexes()

    def end(self) -> None:
        self.bench.tell(EndWatches(watches=[1, 2]), DRIVER)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(cpus=1)
    bench.group(workers=1)
    return bench


def run_one(bench: Bench) -> None:
    (worker,) = bench.busy()
    bench.finish(worker, bench.read(worker))


def test_a_watch_answers_with_the_first_that_are_ready(bench: Bench) -> None:
    taker = Taker(bench)
    results = [result_of(task) for task in bench.submit_many(bench.task_class(), 2)]
    bench.put(A, b"value")
    asked = taker.wait([*results, A])
    assert taker.answers() == {asked: [2]}
    asked = taker.wait(left=[2])
    assert taker.answers() == {}
    run_one(bench)
    assert taker.answers() == {asked: [0]}
    # Nobody said that this one was taken: it is still the first.
    asked = taker.wait()
    assert taker.answers() == {asked: [0]}
    asked = taker.wait([ObjectId(b"nobody knows it")], count=2, left=[0])
    run_one(bench)
    assert taker.answers() == {asked: [1, 3]}


def test_a_wait_on_a_watch_that_is_given_up_is_told_what_there_is(bench: Bench) -> None:
    taker = Taker(bench)
    bench.put(A, b"value")
    asked = taker.wait([A, result_of(bench.submit(bench.task_class()))], count=2)
    assert taker.answers() == {}
    bench.tell(CancelRequest(request_id=asked), DRIVER)
    assert taker.answers() == {asked: [0]}
    run_one(bench)
    assert taker.answers() == {}


def test_what_is_ready_next_is_told_ahead(bench: Bench) -> None:
    taker = Taker(bench)
    names = [ObjectId(b"%028d" % n) for n in range(5)]
    for name in names[1:]:
        bench.put(name, b"value")
    taker.wait([*names], ahead=2, left=[])
    taker.wait(ahead=9, left=[1])
    replies = [e.message for e in bench.effects if isinstance(e, Reply)]
    assert [r.ahead_ids for r in replies if isinstance(r, WaitReply)] == [names[1:3], names[2:]]


def test_a_watch_that_has_ended_leaves_nothing(bench: Bench) -> None:
    taker = Taker(bench)
    pending = result_of(bench.submit(bench.task_class()))
    asked = taker.wait([pending]), taker.wait([pending], watch=2)
    taker.end()
    taker.end()
    assert taker.answers() == {asked[0]: [], asked[1]: []}
    assert bench.node.state.objects[pending].waiters is None
    run_one(bench)
    bench.drop(pending)
    bench.assert_empty()


def test_a_watch_waits_for_what_is_elsewhere_until_it_is_here() -> None:
    pair = Pair()
    names = [result_of(task) for task in pair.a.submit_many(pair.kind, 2)]
    here, anywhere = Taker(pair.a, fetch=True), Taker(pair.a)
    brought = here.wait(names)
    made = anywhere.wait(names, watch=2)
    pair.carry()
    pair.run(large=True)
    for effect in pair.b.take(SendPeer):
        pair.a.tell(effect.message, B)
    assert here.answers() == {made: [0]}
    pair.carry()
    assert here.answers() == {brought: [0]}


def test_what_was_ready_and_is_lost_with_its_node_is_waited_for_again() -> None:
    pair = Pair()
    name = result_of(pair.a.submit(pair.kind))
    taker = Taker(pair.a)
    pair.carry()
    pair.run(large=True)
    for effect in pair.b.take(SendPeer):
        pair.a.tell(effect.message, B)
    asked = taker.wait([name])
    assert taker.answers() == {asked: [0]}
    pair.b_dies()
    taker.wait()
    assert taker.answers() == {}, "it is made again"


@pytest.mark.parametrize("seed", range(20))
def test_all_are_taken_in_the_order_in_which_they_are_ready(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    kind, taker = bench.task_class(), Taker(bench)
    names: list[ObjectId] = []
    left: list[int] = []
    taken: set[int] = set()
    for _ in range(60):
        new = [result_of(task) for task in bench.submit_many(kind, dice.randint(0, 2))]
        if dice.random() < 0.3:
            new.append(ObjectId(b"%028d" % len(names)))
            bench.put(new[-1], b"value")
        names += new
        asked = taker.wait(new, left=left)
        for _ in range(dice.randint(0, 3)):
            if bench.busy():
                run_one(bench)
        bench.tell(CancelRequest(request_id=asked), DRIVER)
        left = taker.answers()[asked]
        assert len(left) <= 1
        assert not taken.intersection(left)
        taken.update(left)
        for number in left:
            bench.drop(names[number])
    bench.run_all()
    while len(taken) < len(names):
        asked = taker.wait(left=left)
        (left,) = taker.answers().values()
        assert left == [min(set(range(len(names))) - taken)]
        taken.update(left)
        bench.drop(names[left[0]])
    taker.end()
    bench.assert_empty()
