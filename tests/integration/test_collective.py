"""Collective groups whose members die, come late, leave, or do not agree."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import poolray
from poolray.util import collective
from poolray.util.collective import CollectiveError, CollectiveTimeoutError
from tests.integration.support import wait_until

#: Longer than any of the tests should wait: who runs into it has not noticed what happened.
LONG_MS = 60_000
QUICK_S = 10.0


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    poolray.shutdown()
    with poolray.init(num_cpus=2):
        yield


class Member:
    def pid(self) -> int:
        return os.getpid()

    def join(self, size: int, rank: int, timeout_ms: float = LONG_MS) -> None:
        collective.init_collective_group(
            size, rank, backend="gloo", group_name="group", gloo_timeout=timeout_ms
        )

    def leave(self) -> None:
        collective.destroy_collective_group("group")


def make_group(size: int, timeout_ms: float = LONG_MS, **options: Any) -> list[Any]:
    members = [poolray.remote(Member).options(**options).remote() for _ in range(size)]
    poolray.get([m.join.remote(size, rank, timeout_ms) for rank, m in enumerate(members)])
    return members


def call(member: Any, function: Callable[[], Any]) -> Any:
    return member.__ray_call__.remote(lambda _: function())


def reduce_ones() -> float:
    array = numpy.ones(1000)
    collective.allreduce(array, "group")
    return float(array[0])


def test_the_death_of_a_member_ends_the_waiting_of_all_others() -> None:
    members = make_group(3)
    victim = poolray.get(members[1].pid.remote())
    waiting = [call(members[rank], reduce_ones) for rank in (0, 2)]
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    for ref in waiting:
        with pytest.raises(CollectiveError, match="rank 1 has died"):
            poolray.get(ref, timeout=QUICK_S)
    assert time.monotonic() - started < QUICK_S


def test_a_member_that_dies_before_it_is_waited_for_is_noticed_too() -> None:
    members = make_group(2)
    victim = poolray.get(members[0].pid.remote())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(CollectiveError, match="rank 0 has died"):
        poolray.get(call(members[1], reduce_ones), timeout=QUICK_S)


@pytest.mark.parametrize("receives", [True, False])
def test_the_death_of_a_partner_ends_a_message(receives: bool) -> None:
    members = make_group(2)
    victim = poolray.get(members[1].pid.remote())

    def exchange() -> None:
        array = numpy.ones(1_000_000)
        if receives:
            collective.recv(array, 1, "group")
        else:
            collective.send(array, 1, "group")

    waiting = call(members[0], exchange)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(CollectiveError, match="rank 1 has died"):
        poolray.get(waiting, timeout=QUICK_S)


def test_a_late_member_is_named_and_told_when_it_comes() -> None:
    members = make_group(3, timeout_ms=2000)
    for ref in [call(members[rank], reduce_ones) for rank in (0, 2)]:
        with pytest.raises(CollectiveError, match=r"rank 1 did not come within 2 s"):
            poolray.get(ref, timeout=QUICK_S)
    with pytest.raises(CollectiveError, match=r"rank \d has found that rank 1 did not come"):
        poolray.get(call(members[1], reduce_ones), timeout=QUICK_S)


def test_a_timeout_is_a_timeout_error() -> None:
    members = make_group(2, timeout_ms=2000)
    with pytest.raises(TimeoutError) as caught:
        poolray.get(call(members[0], reduce_ones), timeout=QUICK_S)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value.cause, CollectiveTimeoutError)  # type: ignore[attr-defined]


def test_errors_travel_with_their_fields() -> None:
    for kind in (CollectiveError, CollectiveTimeoutError):
        error = kind(group_name="g", rank=3, reason="why")
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == str(error)
        assert (copy.group_name, copy.rank, copy.reason) == ("g", 3, "why")
        assert isinstance(error, poolray.exceptions.PoolrayError)


def test_a_broken_group_stays_broken_until_it_is_made_anew() -> None:
    members = make_group(2, timeout_ms=LONG_MS, max_restarts=1)
    os.kill(poolray.get(members[1].pid.remote()), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(CollectiveError, match="has died"):
            poolray.get(call(members[0], reduce_ones), timeout=QUICK_S)
    poolray.get(members[0].leave.remote())
    wait_until(lambda: answers(members[1]))
    poolray.get([m.join.remote(2, rank) for rank, m in enumerate(members)], timeout=QUICK_S)
    assert poolray.get([call(m, reduce_ones) for m in members], timeout=QUICK_S) == [2.0, 2.0]


def answers(member: Any) -> bool:
    try:
        poolray.get(member.pid.remote())
    except poolray.exceptions.ActorError:
        return False
    return True


def test_a_member_that_has_left_is_not_waited_for() -> None:
    members = make_group(2)
    waiting = call(members[0], reduce_ones)
    poolray.get(members[1].leave.remote())
    with pytest.raises(CollectiveError, match="rank 1 has destroyed the group"):
        poolray.get(waiting, timeout=QUICK_S)
    poolray.get(members[0].leave.remote())


def test_members_that_call_different_things_are_told_so() -> None:
    members = make_group(2)
    refs = [
        call(members[0], reduce_ones),
        call(members[1], lambda: collective.broadcast(numpy.ones(3), 1, "group")),
    ]
    with pytest.raises(CollectiveError, match=r"rank 1 called broadcast of 24 bytes of <f8"):
        poolray.get(refs[0], timeout=QUICK_S)
    with pytest.raises(CollectiveError, match=r"rank 0 called allreduce \(SUM\) of 8000 bytes"):
        poolray.get(refs[1], timeout=QUICK_S)


def test_a_message_of_another_size_is_refused_on_both_sides() -> None:
    members = make_group(2)
    refs = [
        call(members[0], lambda: collective.send(numpy.ones(3), 1, "group")),
        call(members[1], lambda: collective.recv(numpy.ones(4), 0, "group")),
    ]
    with pytest.raises(CollectiveError, match="rank 1 has found that rank 0 called something"):
        poolray.get(refs[0], timeout=QUICK_S)
    with pytest.raises(CollectiveError, match="rank 0 sends 24 bytes of <f8, and this one"):
        poolray.get(refs[1], timeout=QUICK_S)


def test_a_group_does_not_form_without_all_of_its_members() -> None:
    first, second = (poolray.remote(Member).remote() for _ in range(2))
    refs = [first.join.remote(3, 0, 200), second.join.remote(3, 1, 200)]
    with pytest.raises(CollectiveTimeoutError, match=r"rank\(s\) \[.*2\] have not joined"):
        poolray.get(refs[0], timeout=QUICK_S)
    with pytest.raises(CollectiveTimeoutError, match="not all of the 3 members"):
        poolray.get(refs[1], timeout=QUICK_S)


def test_two_members_of_one_rank_are_refused() -> None:
    members = [poolray.remote(Member).remote() for _ in range(3)]
    first = members[1].join.remote(3, 1)
    host = members[0].join.remote(3, 0)
    double = members[2].join.remote(3, 1)
    ready, _ = poolray.wait([first, double], timeout=QUICK_S)
    with pytest.raises(CollectiveError, match="another process has rank 1 already"):
        poolray.get(ready[0])
    other = members[2] if ready[0] == double else members[1]
    poolray.get([other.join.remote(3, 2), host], timeout=QUICK_S)


def test_members_must_agree_on_the_size() -> None:
    members = [poolray.remote(Member).remote() for _ in range(2)]
    host = members[0].join.remote(2, 0)
    with pytest.raises(CollectiveError, match="rank 0 makes a group of 2, this one of 3"):
        poolray.get(members[1].join.remote(3, 1), timeout=QUICK_S)
    poolray.get([members[1].join.remote(2, 1), host], timeout=QUICK_S)


def test_a_member_that_dies_while_the_group_forms_may_come_again() -> None:
    members = [poolray.remote(Member).options(max_restarts=1).remote() for _ in range(3)]
    waiting = [members[0].join.remote(3, 0), members[1].join.remote(3, 1)]
    pid = poolray.get(members[2].pid.remote())
    doomed = members[2].join.remote(4, 2)  # refused at once: rank 0 is there
    with pytest.raises(CollectiveError, match="of 4"):
        poolray.get(doomed, timeout=QUICK_S)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: answers(members[2]))
    poolray.get([members[2].join.remote(3, 2), *waiting], timeout=QUICK_S)
    assert poolray.get([call(m, reduce_ones) for m in members]) == [3.0] * 3


def test_tasks_may_be_members() -> None:
    @poolray.remote
    def take_part(rank: int) -> float:
        collective.init_collective_group(2, rank, backend="gloo", group_name="group")
        try:
            return reduce_ones()
        finally:
            collective.barrier("group")
            collective.destroy_collective_group("group")

    for _ in range(3):
        assert poolray.get([take_part.remote(rank) for rank in range(2)]) == [2.0, 2.0]


def test_a_destroyed_group_leaves_nothing_open() -> None:
    members = make_group(2)
    poolray.get([m.leave.remote() for m in members])

    def open_files() -> list[str]:
        found = []
        for number in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{number}"))
            except FileNotFoundError:
                pass  # the listing's own
        return found

    def memory_map() -> str:
        return Path("/proc/self/maps").read_text()

    for member in members:
        for text in [*poolray.get(call(member, open_files)), poolray.get(call(member, memory_map))]:
            assert "poolray-collective" not in text
            assert "pidfd" not in text


def test_without_torch_a_member_of_a_group_on_gpus_is_told_what_to_install() -> None:
    def join() -> None:
        for name in ("torch", "torch.distributed"):
            sys.modules[name] = None  # type: ignore[assignment]
        collective.init_collective_group(1, 0, backend="nccl", group_name="gpus")

    member = poolray.remote(Member).remote()
    with pytest.raises(ValueError, match=r"pip install 'poolray\[nccl\]'"):
        poolray.get(call(member, join))
