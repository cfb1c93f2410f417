"""`util.collective` on arrays in memory: what a group of actors does together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from core_implementation import IMPLEMENTATION, better_than_reference, get, ray, start_runtime

numpy: Any = pytest.importorskip("numpy")
collective: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.collective")
types: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.collective.types")
ReduceOp = types.ReduceOp

# The reference's members import torch, one after the other on a busy machine.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


class Member:
    """Of a group of two."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def join(self, name: str) -> None:
        collective.init_collective_group(2, self.rank, backend="gloo", group_name=name)

    def leave(self, name: str) -> None:
        collective.destroy_collective_group(name)


@pytest.fixture(scope="module")
def members() -> Iterator[list[Any]]:
    """Two actors, in the group "default"."""
    start_runtime()
    made = [ray.remote(Member).options(num_cpus=0).remote(rank) for rank in range(2)]
    get([member.join.remote("default") for member in made])
    yield made
    for member in made:
        ray.kill(member)


def on_all(members: list[Any], function: Callable[[int], Any]) -> list[Any]:
    """What a function of the rank gives in each member."""

    def call(member: Member) -> Any:
        return function(member.rank)

    return get([member.__ray_call__.remote(call) for member in members])


def values(rank: int) -> Any:
    return numpy.array([1.0, -2.0, 3.0], dtype=numpy.float32) * (1 if rank == 0 else -3)


ALL = numpy.stack([values(0), values(1)])
EXPECTED = {
    "SUM": ALL.sum(axis=0).tolist(),
    "PRODUCT": ALL.prod(axis=0).tolist(),
    "MIN": ALL.min(axis=0).tolist(),
    "MAX": ALL.max(axis=0).tolist(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_allreduce_leaves_the_result_in_every_member(members: list[Any], name: str) -> None:
    def run(rank: int) -> Any:
        array = values(rank)
        collective.allreduce(array, op=getattr(ReduceOp, name))
        return array.tolist()

    assert on_all(members, run) == [EXPECTED[name]] * 2


@pytest.mark.parametrize("root", [0, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_reduce_changes_only_the_destination(members: list[Any], name: str, root: int) -> None:
    def run(rank: int) -> Any:
        array = values(rank)
        collective.reduce(array, dst_rank=root, op=getattr(ReduceOp, name))
        return array.tolist()

    expected = [values(0).tolist(), values(1).tolist()]
    expected[root] = EXPECTED[name]
    assert on_all(members, run) == expected


@pytest.mark.parametrize("root", [0, 1])
def test_broadcast_copies_from_the_source(members: list[Any], root: int) -> None:
    def run(rank: int) -> Any:
        array = values(rank)
        collective.broadcast(array, src_rank=root)
        return array.tolist()

    assert on_all(members, run) == [values(root).tolist()] * 2


def test_allgather_fills_a_list_by_rank(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        gathered = [numpy.zeros(3, dtype=numpy.float32) for _ in range(2)]
        collective.allgather(gathered, values(rank))
        return [array.tolist() for array in gathered]

    assert on_all(members, run) == [[values(0).tolist(), values(1).tolist()]] * 2


def test_reducescatter_gives_each_member_its_part(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        result = numpy.zeros(3, dtype=numpy.float32)
        collective.reducescatter(result, [values(rank), 10 * values(rank)])
        return result.tolist()

    total = numpy.array(EXPECTED["SUM"])
    assert on_all(members, run) == [total.tolist(), (10 * total).tolist()]


@better_than_reference("the list is changed too")
def test_reducescatter_leaves_its_input_alone(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        parts = [values(rank), values(rank)]
        collective.reducescatter(numpy.zeros(3, dtype=numpy.float32), parts)
        return all((part == values(rank)).all() for part in parts)

    assert on_all(members, run) == [True, True]


@pytest.mark.parametrize("source", [0, 1])
def test_what_one_sends_the_other_receives(members: list[Any], source: int) -> None:
    def run(rank: int) -> Any:
        array = values(rank)
        if rank == source:
            collective.send(array, dst_rank=1 - source)
        else:
            collective.recv(array, src_rank=source)
        return array.tolist()

    assert on_all(members, run) == [values(source).tolist()] * 2


def test_messages_keep_their_order(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        seen = []
        for number in range(20):
            array = numpy.full(5, number)
            if rank == 0:
                collective.send(array, 1)
            else:
                array[:] = -1
                collective.recv(array, 0)
            seen.append(int(array[0]))
        return seen

    assert on_all(members, run) == [list(range(20))] * 2


def test_a_barrier_lets_nobody_pass_alone(members: list[Any]) -> None:
    def run(rank: int) -> bool:
        for _ in range(10):
            collective.barrier()
        return True

    assert on_all(members, run) == [True, True]


def test_arrays_larger_than_any_buffer(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        array = numpy.arange(3_000_000, dtype=numpy.float64) * (rank + 1)
        collective.allreduce(array)
        total = float(array.sum())
        collective.broadcast(array, 1)
        message = numpy.full(1_000_000, float(rank))
        if rank == 0:
            collective.send(message, 1)
        else:
            collective.recv(message, 0)
        return total, float(message.sum())

    assert on_all(members, run) == [(3.0 * sum(range(3_000_000)), 0.0)] * 2


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float64"])
def test_types_of_elements(members: list[Any], dtype: str) -> None:
    def run(rank: int) -> Any:
        array = numpy.arange(10, dtype=dtype)
        collective.allreduce(array)
        return array.dtype.name, array.tolist()

    assert on_all(members, run) == [(dtype, [2 * n for n in range(10)])] * 2


def test_shapes_are_kept(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        array = numpy.ones((2, 3, 4))
        collective.allreduce(array)
        scalar = numpy.array(5.0)
        collective.allreduce(scalar)
        return array.shape, float(array.sum()), float(scalar)

    assert on_all(members, run) == [((2, 3, 4), 48.0, 10.0)] * 2


@better_than_reference("its tensors must be contiguous", always=False)
def test_arrays_that_are_not_contiguous(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        array = numpy.zeros((4, 4))
        array[:, 1] = 1.0
        collective.allreduce(array[:, 1])
        transposed = numpy.arange(6.0).reshape(2, 3).T
        collective.allreduce(transposed)
        return array.sum(axis=0).tolist(), transposed.tolist()

    expected = ([0.0, 8.0, 0.0, 0.0], (2 * numpy.arange(6.0).reshape(2, 3).T).tolist())
    assert on_all(members, run) == [expected] * 2


def test_tensors_of_torch(members: list[Any]) -> None:
    pytest.importorskip("torch")

    def run(rank: int) -> Any:
        import torch

        tensor = torch.ones(3) * (rank + 1)
        collective.allreduce(tensor)
        gathered = [torch.zeros(1) for _ in range(2)]
        collective.allgather(gathered, torch.tensor([float(rank)]))
        low = torch.ones(3, dtype=torch.bfloat16)
        collective.allreduce(low)
        return tensor.tolist(), [part.tolist() for part in gathered], low.tolist()

    assert on_all(members, run) == [([3.0] * 3, [[0.0], [1.0]], [2.0] * 3)] * 2


def test_rank_and_size_of_a_group_and_of_an_unknown_one(members: list[Any]) -> None:
    def run(rank: int) -> Any:
        return (
            collective.get_rank(),
            collective.get_collective_group_size(),
            collective.is_group_initialized("default"),
            collective.get_rank("unknown"),
            collective.get_collective_group_size("unknown"),
            collective.is_group_initialized("unknown"),
        )

    assert on_all(members, run) == [(r, 2, True, -1, -1, False) for r in range(2)]


def test_an_actor_may_be_in_several_groups(members: list[Any]) -> None:
    get([member.join.remote("second") for member in members])

    def run(rank: int) -> Any:
        array = numpy.ones(2)
        collective.allreduce(array, "second")
        collective.allreduce(array)
        return array.tolist()

    assert on_all(members, run) == [[4.0, 4.0]] * 2
    get([member.leave.remote("second") for member in members])
    assert on_all(members, lambda rank: collective.is_group_initialized("second")) == [False] * 2
    get([member.leave.remote("second") for member in members])


def test_a_group_that_was_destroyed_can_be_made_again(members: list[Any]) -> None:
    for _ in range(2):
        get([member.join.remote("again") for member in members])
        on_all(members, lambda rank: collective.barrier("again"))
        get([member.leave.remote("again") for member in members])


def test_a_declared_group_forms_at_its_first_operation(members: list[Any]) -> None:
    collective.create_collective_group(members, 2, [0, 1], backend="gloo", group_name="declared")

    def run(rank: int) -> Any:
        array = numpy.full(2, float(rank))
        collective.broadcast(array, 0, "declared")
        return collective.get_rank("declared"), array.tolist()

    assert on_all(members, run) == [(0, [0.0, 0.0]), (1, [0.0, 0.0])]
    with pytest.raises(RuntimeError, match="twice"):
        collective.create_collective_group(
            members, 2, [0, 1], backend="gloo", group_name="declared"
        )
    get([member.leave.remote("declared") for member in members])


@better_than_reference("the group has no rank before its first operation")
def test_a_declared_group_has_ranks_at_once(members: list[Any]) -> None:
    collective.create_collective_group(members, 2, [1, 0], backend="gloo", group_name="ranked")
    ranks = on_all(members, lambda rank: collective.get_rank("ranked"))
    on_all(members, lambda rank: collective.barrier("ranked"))
    get([member.leave.remote("ranked") for member in members])
    assert ranks == [1, 0]


@pytest.mark.parametrize(
    ("world_size", "ranks", "text"),
    [
        (2, [0], "Each actor should correspond to one rank"),
        (2, [0, 2], "permutation"),
        (2, [0, 0], "permutation"),
        (0, [0, 1], "greater than zero"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(
    members: list[Any], world_size: int, ranks: list[int], text: str
) -> None:
    with pytest.raises(RuntimeError, match=text):
        collective.create_collective_group(
            members, world_size, ranks, backend="gloo", group_name="wrong"
        )


def error_of(member: Any, function: Callable[[], Any]) -> tuple[str, str]:
    """Class and text of what a call raises in a member."""

    def call(_: Member) -> tuple[str, str]:
        try:
            function()
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return " ".join(kinds), str(error)
        return "", ""

    return get(member.__ray_call__.remote(call))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: collective.allreduce([1, 2]), "RuntimeError", "Unrecognized tensor type"),
        (lambda: collective.allreduce(numpy.ones(1), "none"), "RuntimeError", "not initialized"),
        (lambda: collective.reduce(numpy.ones(1), 2), "ValueError", "less than world size"),
        (lambda: collective.broadcast(numpy.ones(1), -1), "ValueError", "negative"),
        (lambda: collective.allgather([], numpy.ones(1)), "RuntimeError", "empty list"),
        (
            lambda: collective.allgather([numpy.ones(1)], numpy.ones(1)),
            "RuntimeError",
            "The length of the tensor list",
        ),
        (
            lambda: collective.reducescatter(numpy.ones(1), [numpy.ones(1)]),
            "RuntimeError",
            "The length of the tensor list",
        ),
        (lambda: collective.send(numpy.ones(1), 0), "RuntimeError", "is self"),
        (lambda: collective.recv(numpy.ones(1), 0), "RuntimeError", "is self"),
        (
            lambda: collective.init_collective_group(2, 0, backend="gloo"),
            "RuntimeError",
            "a second time",
        ),
        (
            lambda: collective.init_collective_group(2, 0, backend="gloo", group_name=""),
            "ValueError",
            "needs to be a string",
        ),
        (
            lambda: collective.init_collective_group(2, 2, backend="gloo", group_name="x"),
            "AssertionError",
            "",
        ),
        (
            lambda: collective.init_collective_group(1, 0, backend="nccl", group_name="x"),
            "ValueError",
            "NCCL",
        ),
    ],
)
def test_calls_that_cannot_be_are_refused_at_once(
    members: list[Any], call: Callable[[], Any], kind: str, text: str
) -> None:
    kinds, found = error_of(members[0], call)
    assert kind in kinds.split()
    assert text in found
    on_all(members, lambda rank: collective.barrier())  # the group is as it was


@better_than_reference("torch writes to memory that is read-only", run=False)
def test_an_array_that_is_read_only_is_refused(members: list[Any]) -> None:
    array = numpy.ones(100_000)
    array.flags.writeable = False
    kinds, text = error_of(members[0], lambda: collective.allreduce(array))
    assert "ValueError" in kinds
    assert "copy" in text


@pytest.mark.parametrize(
    "call",
    [
        lambda: collective.init_collective_group(1, 0, backend="gloo"),
        lambda: collective.allreduce(numpy.ones(1)),
        lambda: collective.get_rank(),
        lambda: collective.destroy_collective_group(),
    ],
)
def test_a_driver_is_no_member(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="only used inside"):
        call()


def test_the_driver_knows_which_backends_there_are() -> None:
    assert collective.gloo_available()
    assert collective.is_backend_available("gloo")
    assert not collective.nccl_available()
    assert not collective.is_backend_available("no such thing")
    assert types.Backend("gloo") == "GLOO"
    with pytest.raises(ValueError, match="Unrecognized backend"):
        types.Backend("mpi")


def test_an_nccl_group_cannot_be_declared_without_nccl(members: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="NCCL"):
        collective.create_collective_group(members, 2, [0, 1], backend="nccl", group_name="on-gpus")


def test_several_gpus_in_a_process_are_refused_without_gpus() -> None:
    with pytest.raises(RuntimeError, match="Cupy"):
        collective.allreduce_multigpu([numpy.ones(1)])
