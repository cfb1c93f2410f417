"""Collective groups on torch's process groups: NCCL's where there are GPUs, else gloo's.

The group is the one that backend "nccl" makes; only what it moves data with is another where there
is no GPU.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

import poolray
from poolray.util import collective
from poolray.util.collective import (
    CollectiveError,
    CollectiveTimeoutError,
    ReduceOp,
    process_group,
)
from tests.integration.support import wait_until

# Workers are forks, so they need not import it again.
torch: Any = pytest.importorskip("torch", reason="torch is not installed")

LONG_MS = 60_000
#: Who is longer about it has not noticed what happened.
QUICK_S = 20.0


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    poolray.shutdown()
    with poolray.init(num_cpus=2):
        yield


@pytest.fixture
def _no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of this process, and of the workers that are forked from it, are on the CPU."""
    monkeypatch.setattr(process_group, "NCCL", process_group.GLOO)


class Member:
    def __init__(self) -> None:
        process_group.NCCL = process_group.GLOO  # type: ignore[misc]

    def pid(self) -> int:
        return os.getpid()

    def join(self, size: int, rank: int, timeout_ms: float = LONG_MS, name: str = "group") -> None:
        collective.init_collective_group(
            size, rank, backend="nccl", group_name=name, gloo_timeout=timeout_ms
        )

    def leave(self, name: str = "group") -> None:
        collective.destroy_collective_group(name)


def make_members(size: int, **options: Any) -> list[Any]:
    return [poolray.remote(Member).options(num_cpus=0, **options).remote() for _ in range(size)]


def make_group(size: int, timeout_ms: float = LONG_MS, **options: Any) -> list[Any]:
    members = make_members(size, **options)
    joined = [m.join.remote(size, rank, timeout_ms) for rank, m in enumerate(members)]
    poolray.get(joined, timeout=QUICK_S)
    return members


def call(member: Any, function: Callable[..., Any], *args: Any) -> Any:
    return member.__ray_call__.remote(lambda _, *given: function(*given), *args)


def on_all(members: list[Any], function: Callable[[int], Any]) -> list[Any]:
    refs = [call(member, function, rank) for rank, member in enumerate(members)]
    return poolray.get(refs, timeout=QUICK_S)


def handle() -> Any:
    return collective.get_group_handle("group")


def reduce_ones(size: int = 1000) -> float:
    tensor = torch.ones(size, device=handle().device)
    collective.allreduce(tensor, "group")
    return float(tensor[0])


# ---- operations ----------------------------------------------------------------------------------

VALUES = torch.tensor([[1.0, -2.0, 3.0], [-3.0, 6.0, -9.0], [2.0, 2.0, 2.0]])
EXPECTED = {
    "SUM": VALUES.sum(dim=0).tolist(),
    "PRODUCT": VALUES.prod(dim=0).tolist(),
    "MIN": VALUES.amin(dim=0).tolist(),
    "MAX": VALUES.amax(dim=0).tolist(),
}


def values(rank: int) -> Any:
    return VALUES[rank].clone().to(handle().device)


def reductions(rank: int) -> list[Any]:
    found = []
    for name in EXPECTED:
        op = getattr(ReduceOp, name)
        everywhere, at_one = values(rank), values(rank)
        collective.allreduce(everywhere, "group", op)
        collective.reduce(at_one, 1, "group", op)
        scattered, parts = values(rank), [values(rank) * n for n in (1, 10, 100)]
        collective.reducescatter(scattered, parts, "group", op)
        kept = all(bool((part == values(rank) * n).all()) for part, n in zip(parts, (1, 10, 100)))
        found.append((everywhere.tolist(), at_one.tolist(), scattered.tolist(), kept))
    return found


def expected_reductions(rank: int) -> list[Any]:
    found = []
    for name in EXPECTED:
        everywhere = EXPECTED[name]
        at_one = everywhere if rank == 1 else VALUES[rank].tolist()
        factor = 10**rank if name != "PRODUCT" else 10 ** (3 * rank)
        found.append((everywhere, at_one, [value * factor for value in everywhere], True))
    return found


def test_reductions_in_place_with_each_operation() -> None:
    members = make_group(3)
    assert on_all(members, reductions) == [expected_reductions(rank) for rank in range(3)]


def copies(rank: int) -> Any:
    tensor = values(rank)
    collective.broadcast(tensor, 2, "group")
    gathered = [torch.zeros_like(tensor) for _ in range(3)]
    collective.allgather(gathered, values(rank), "group")
    collective.barrier("group")
    return tensor.tolist(), [part.tolist() for part in gathered]


def test_broadcast_and_allgather() -> None:
    assert on_all(make_group(3), copies) == [(VALUES[2].tolist(), VALUES.tolist())] * 3


def ring(rank: int) -> list[int]:
    seen = []
    for number in range(5):
        mine = torch.full((7,), 10 * number + rank, device=handle().device)
        other = torch.zeros_like(mine)
        if rank == 0:
            collective.send(mine, 1, "group")
            collective.recv(other, 2, "group")
        else:
            collective.recv(other, rank - 1, "group")
            collective.send(mine, (rank + 1) % 3, "group")
        seen.append(int(other[0]))
    return seen


def test_messages_go_round() -> None:
    expected = [[10 * number + (rank - 1) % 3 for number in range(5)] for rank in range(3)]
    assert on_all(make_group(3), ring) == expected


def odd_tensors(rank: int) -> Any:
    device = handle().device
    table = torch.zeros((4, 4), device=device)
    table[:, 1] = 1.0
    collective.allreduce(table[:, 1], "group")
    target = torch.zeros((2, 4), device=device).T
    collective.broadcast(target if rank else torch.ones((4, 2), device=device), 0, "group")
    low = torch.ones(3, dtype=torch.bfloat16, device=device)
    collective.allreduce(low, "group")
    whole = torch.full((2,), rank + 1, dtype=torch.int64, device=device)
    collective.allreduce(whole, "group", ReduceOp.MAX)
    collective.allreduce(torch.zeros(0, device=device), "group")
    learns = torch.ones(2, requires_grad=True, device=device)
    collective.allreduce(learns, "group")
    large = torch.ones(3_000_000, device=device)
    collective.allreduce(large, "group")
    return (
        table.sum(dim=0).tolist(),
        float(target.sum()),
        low.tolist(),
        whole.tolist(),
        learns.tolist(),
        bool((large == 2).all()),
    )


def test_tensors_of_all_kinds() -> None:
    found = on_all(make_group(2), odd_tensors)
    expected = ([0.0, 8.0, 0.0, 0.0], 8.0, [2.0] * 3, [2, 2], [2.0, 2.0], True)
    assert found == [(expected[0], 0.0, *expected[2:]), expected]


def test_a_group_of_one() -> None:
    assert on_all(make_group(1), lambda rank: reduce_ones()) == [1.0]


def several(rank: int) -> Any:
    first, second = torch.ones(2), torch.ones(2)
    collective.allreduce(second, "second")
    collective.allreduce(first, "group")
    collective.allreduce(second, "second")
    array = numpy.ones(2)
    collective.allreduce(array, "shared")
    return first.tolist(), second.tolist(), array.tolist(), torch.distributed.is_initialized()


def test_an_actor_may_be_in_several_groups_of_either_backend() -> None:
    members = make_group(2)
    poolray.get([m.join.remote(2, 1 - r, LONG_MS, "second") for r, m in enumerate(members)])

    def join_shared(rank: int) -> None:
        collective.init_collective_group(2, rank, backend="gloo", group_name="shared")

    on_all(members, join_shared)
    assert on_all(members, several) == [([2.0, 2.0], [4.0, 4.0], [2.0, 2.0], False)] * 2
    poolray.get([m.leave.remote("second") for m in members])
    assert on_all(members, lambda rank: reduce_ones()) == [2.0, 2.0]


@pytest.mark.usefixtures("_no_nccl")
def test_a_declared_group_forms_at_its_first_operation() -> None:
    members = make_members(2)
    collective.create_collective_group(members, 2, [1, 0], backend="nccl", group_name="group")
    assert on_all(members, lambda rank: reduce_ones()) == [2.0, 2.0]
    told = on_all(members, lambda rank: (collective.get_rank("group"), handle().backend()))
    assert told == [(1, "NCCL"), (0, "NCCL")]


def test_a_group_can_be_destroyed_and_made_again() -> None:
    members = make_group(2)
    for _ in range(3):
        assert on_all(members, lambda rank: reduce_ones()) == [2.0, 2.0]
        poolray.get([m.leave.remote() for m in members], timeout=QUICK_S)
        poolray.get([m.join.remote(2, r) for r, m in enumerate(members)], timeout=QUICK_S)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: numpy.ones(3), r"A ndarray cannot take part: group 'group' is for torch.Tensor"),
        (lambda: torch.ones(3, device="meta"), r"A tensor on meta cannot take part"),
        (lambda: [1.0], "Unrecognized tensor type"),
    ],
)
def test_what_is_not_on_the_device_is_refused_at_once(make: Callable[[], Any], text: str) -> None:
    members = make_group(2)
    with pytest.raises(RuntimeError, match=text):
        poolray.get(call(members[0], lambda: collective.allreduce(make(), "group")))
    assert on_all(members, lambda rank: reduce_ones()) == [2.0, 2.0]  # it is as it was


def test_members_must_agree_on_the_backend() -> None:
    members = make_members(2)
    host = members[0].join.remote(2, 0)

    def join_other() -> None:
        collective.init_collective_group(2, 1, backend="gloo", group_name="group")

    with pytest.raises(CollectiveError, match="rank 0 makes a group on NCCL, this one on GLOO"):
        poolray.get(call(members[1], join_other), timeout=QUICK_S)
    poolray.get([host, members[1].join.remote(2, 1)], timeout=QUICK_S)


def test_members_that_call_different_things_are_told_so() -> None:
    members = make_group(2)
    refs = [
        call(members[0], reduce_ones),
        call(members[1], lambda: collective.broadcast(torch.ones(3), 1, "group")),
    ]
    with pytest.raises(CollectiveError, match="rank 1 called broadcast of 12 bytes of float32"):
        poolray.get(refs[0], timeout=QUICK_S)
    with pytest.raises(CollectiveError, match=r"rank 0 called allreduce \(SUM\) of 4000 bytes"):
        poolray.get(refs[1], timeout=QUICK_S)


def test_a_message_of_another_type_is_refused_on_both_sides() -> None:
    members = make_group(2)
    refs = [
        call(members[0], lambda: collective.send(torch.ones(2), 1, "group")),
        call(members[1], lambda: collective.recv(torch.ones(2, dtype=torch.int32), 0, "group")),
    ]
    with pytest.raises(CollectiveError, match="rank 1 has found that rank 0 called something"):
        poolray.get(refs[0], timeout=QUICK_S)
    with pytest.raises(CollectiveError, match="sends 8 bytes of float32, and this one receives 8"):
        poolray.get(refs[1], timeout=QUICK_S)


# ---- members that die, come late, or leave -------------------------------------------------------


def dies_in_the_middle(function: Callable[[], Any]) -> None:
    """Take part, and die when all are agreed and the others wait for data."""
    handle()._move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    function()


def sticks_in_the_middle(function: Callable[[], Any]) -> None:
    handle()._move = lambda *_: threading.Event().wait(QUICK_S)
    function()


def test_the_death_of_a_member_ends_the_waiting_of_all_others() -> None:
    members = make_group(3)
    waiting = [call(members[rank], reduce_ones) for rank in (0, 2)]
    os.kill(poolray.get(members[1].pid.remote()), signal.SIGKILL)
    for ref in waiting:
        with pytest.raises(CollectiveError, match="rank 1 has died"):
            poolray.get(ref, timeout=QUICK_S)


def test_the_death_of_a_member_in_the_middle_ends_the_operation() -> None:
    members = make_group(3)
    waiting = [call(members[rank], reduce_ones) for rank in (0, 2)]
    call(members[1], dies_in_the_middle, reduce_ones)
    for ref in waiting:
        with pytest.raises(CollectiveError, match=r"allreduce: .*rank 1 has died"):
            poolray.get(ref, timeout=QUICK_S)


def send_to_one() -> None:
    collective.send(torch.ones(1_000_000), 1, "group")


def receive_from_one() -> None:
    collective.recv(torch.ones(1_000_000), 1, "group")


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("receives", [True, False])
def test_the_death_of_a_partner_ends_a_message(receives: bool, is_late: bool) -> None:
    members = make_group(2)
    waiting = call(members[0], receive_from_one if receives else send_to_one)

    def answer() -> None:
        one = torch.ones(1_000_000)
        if receives:
            collective.send(one, 0, "group")
        else:
            collective.recv(one, 0, "group")

    if is_late:
        call(members[1], dies_in_the_middle, answer)
    else:
        os.kill(poolray.get(members[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(CollectiveError, match="rank 1 has died"):
        poolray.get(waiting, timeout=QUICK_S)


def test_a_late_member_is_a_timeout() -> None:
    members = make_group(2, timeout_ms=1500)
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 did not come within 1.5 s"):
        poolray.get(call(members[0], reduce_ones), timeout=QUICK_S)
    with pytest.raises(CollectiveError, match="rank 0 has found that rank 1 did not come"):
        poolray.get(call(members[1], reduce_ones), timeout=QUICK_S)


def test_a_member_that_is_stuck_in_the_middle_is_a_timeout() -> None:
    members = make_group(2, timeout_ms=1500)
    call(members[1], sticks_in_the_middle, reduce_ones)
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 did not come within 1.5 s"):
        poolray.get(call(members[0], reduce_ones), timeout=QUICK_S)


def test_a_member_that_has_left_is_not_waited_for() -> None:
    members = make_group(2)
    waiting = call(members[0], reduce_ones)
    poolray.get(members[1].leave.remote())
    with pytest.raises(CollectiveError, match="rank 1 has destroyed the group"):
        poolray.get(waiting, timeout=QUICK_S)


def test_who_leaves_after_an_operation_has_not_spoilt_it() -> None:
    members = make_group(3)

    def reduce_and_leave(rank: int) -> float:
        found = reduce_ones(200_000)
        collective.destroy_collective_group("group")
        return found

    assert on_all(members, reduce_and_leave) == [3.0] * 3


def test_a_broken_group_can_be_made_anew() -> None:
    members = make_group(2, max_restarts=1)
    waiting = call(members[0], reduce_ones)
    call(members[1], dies_in_the_middle, reduce_ones)
    for ref in (waiting, call(members[0], reduce_ones)):
        with pytest.raises(CollectiveError, match="has died"):
            poolray.get(ref, timeout=QUICK_S)
    poolray.get(members[0].leave.remote())
    wait_until(lambda: answers(members[1]))
    poolray.get([m.join.remote(2, r) for r, m in enumerate(members)], timeout=QUICK_S)
    assert on_all(members, lambda rank: reduce_ones()) == [2.0, 2.0]


def answers(member: Any) -> bool:
    try:
        poolray.get(member.pid.remote())
    except poolray.exceptions.ActorError:
        return False
    return True


# ---- members that cannot connect -----------------------------------------------------------------


def joins_with(connect: Callable[..., Any], size: int, rank: int) -> None:
    process_group.NCCL = dataclasses.replace(  # type: ignore[misc]
        process_group.GLOO, connect=connect
    )
    collective.init_collective_group(size, rank, backend="nccl", group_name="group")


def dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(*_: Any) -> None:
    raise RuntimeError("Duplicate GPU detected")


def test_a_member_that_dies_while_it_connects_ends_the_joining_of_the_others() -> None:
    members = make_members(3)
    waiting = [members[rank].join.remote(3, rank) for rank in (0, 2)]
    call(members[1], joins_with, dies, 3, 1)
    for ref in waiting:
        with pytest.raises(CollectiveError, match=r"init_collective_group: .*rank 1 has died"):
            poolray.get(ref, timeout=QUICK_S)


def test_why_a_member_cannot_connect_is_told() -> None:
    members = make_members(2)
    waiting = members[0].join.remote(2, 0)
    with pytest.raises(CollectiveError, match="RuntimeError: Duplicate GPU detected"):
        poolray.get(call(members[1], joins_with, fails, 2, 1), timeout=QUICK_S)
    with pytest.raises(CollectiveError, match="rank 1 has failed in the middle"):
        poolray.get(waiting, timeout=QUICK_S)


# ---- what is left behind -------------------------------------------------------------------------


def open_things() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the listing's own
        if "poolray-collective" in name or "pidfd" in name or name.startswith("socket:"):
            found.append(name)
    return sorted(found) + [t.name for t in threading.enumerate() if "collective" in t.name]


def settles(member: Any, expected: list[str]) -> bool:
    return bool(poolray.get(call(member, open_things)) == expected)


def has_store(member: Any) -> bool:
    """Whether it has the file of a process group, which is closed when that has been let go of."""
    return any("collective-store" in name for name in poolray.get(call(member, open_things)))


def test_a_destroyed_group_leaves_nothing_open() -> None:
    members = make_members(2)
    before = [poolray.get(call(member, open_things)) for member in members]
    poolray.get([m.join.remote(2, rank) for rank, m in enumerate(members)], timeout=QUICK_S)
    on_all(members, lambda rank: reduce_ones())
    assert has_store(members[0])
    poolray.get([m.leave.remote() for m in members], timeout=QUICK_S)
    assert [poolray.get(call(member, open_things)) for member in members] == before


def test_nor_does_a_broken_one() -> None:
    members = make_members(2)
    before = poolray.get(call(members[0], open_things))
    poolray.get([m.join.remote(2, rank) for rank, m in enumerate(members)], timeout=QUICK_S)
    waiting = call(members[0], reduce_ones)
    call(members[1], dies_in_the_middle, reduce_ones)
    with pytest.raises(CollectiveError):
        poolray.get(waiting, timeout=QUICK_S)
    # The process group is aborted at once: on a GPU its work would go on until somebody leaves.
    wait_until(lambda: not has_store(members[0]))
    poolray.get(members[0].leave.remote(), timeout=QUICK_S)
    wait_until(lambda: settles(members[0], before))


# ---- real GPUs -----------------------------------------------------------------------------------


def gpus() -> int:
    return int(poolray.cluster_resources().get("GPU", 0))


class GpuMember(Member):
    def __init__(self) -> None:
        pass


def test_the_same_on_gpus() -> None:
    size = min(gpus(), 3)
    if not size or not collective.nccl_available():
        pytest.skip("no GPU here, or torch is a build without NCCL")
    members = [
        poolray.remote(GpuMember).options(num_cpus=0, num_gpus=1).remote() for _ in range(size)
    ]
    poolray.get([m.join.remote(size, rank) for rank, m in enumerate(members)], timeout=120)
    assert on_all(members, lambda rank: reduce_ones()) == [float(size)] * size
    if size == 3:
        assert on_all(members, reductions) == [expected_reductions(rank) for rank in range(3)]
        assert on_all(members, copies) == [(VALUES[2].tolist(), VALUES.tolist())] * 3
        assert on_all(members, ring)
    if size > 1:
        waiting = [call(member, reduce_ones) for member in members[:-1]]
        call(members[-1], dies_in_the_middle, reduce_ones)
        for ref in waiting:
            with pytest.raises(CollectiveError, match="has died"):
                poolray.get(ref, timeout=QUICK_S)
    poolray.get([m.leave.remote() for m in members[: max(size - 1, 1)]], timeout=QUICK_S)
