"""Lazy graphs: `bind` and `execute`, input, outputs, shared nodes, actors, inspection."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
from collections import namedtuple
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    better_than_reference,
    get,
    ray,
    start_runtime,
)

dag: Any = importlib.import_module(f"{IMPLEMENTATION}.dag")
InputNode, MultiOutputNode = dag.InputNode, dag.MultiOutputNode

pytestmark = pytest.mark.filterwarnings("ignore:DAGNode.execute:Warning")


@pytest.fixture(autouse=True)
def _runtime() -> None:
    start_runtime()


@ray.remote
def add(a: Any, b: Any = 1) -> Any:
    return a + b


@ray.remote
def same(value: Any) -> Any:
    return value


@ray.remote
def draw(*_: Any) -> str:
    return os.urandom(8).hex()


@ray.remote(num_returns=2)
def halves(value: int) -> tuple[int, int]:
    return value // 2, value - value // 2


@ray.remote
class Counter:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, n: int = 1) -> int:
        self.value += n
        return self.value

    def read(self) -> int:
        return self.value

    @ray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.value, -self.value


# Functions


def test_nothing_runs_before_execute_and_execute_gives_what_remote_gives() -> None:
    node = add.bind(1, b=2)
    assert isinstance(node, dag.FunctionNode)
    assert isinstance(node, dag.DAGNode)
    ref = node.execute()
    assert isinstance(ref, ray.ObjectRef)
    assert get(ref) == 3
    assert get(node.execute()) == 3


def test_a_node_is_an_argument_of_others_by_position_and_by_name() -> None:
    assert get(add.bind(add.bind(1, 2), b=add.bind(3, 4)).execute()) == 10


def test_refs_are_arguments_too() -> None:
    assert get(add.bind(ray.put(3), 4).execute()) == 7


def test_several_return_values_come_as_a_list_of_refs() -> None:
    refs = halves.bind(7).execute()
    assert [get(ref) for ref in refs] == [3, 4]


def test_options_come_before_bind() -> None:
    node = add.options(num_cpus=0, name="sum").bind(1)
    assert node.get_options() == {"num_cpus": 0, "name": "sum"}
    assert get(node.execute()) == 2
    assert add.bind(1).get_options() == {}


def test_a_node_that_others_share_runs_once_in_an_execution() -> None:
    shared = draw.bind()
    first, second = get(MultiOutputNode([same.bind(shared), same.bind(shared)]).execute())
    assert first == second
    third, _ = get(MultiOutputNode([same.bind(shared), same.bind(shared)]).execute())
    assert third != first


def test_a_diamond_of_many_layers_runs_each_node_once() -> None:
    node = draw.bind()
    top = same.bind(node)
    for _ in range(30):  # 2 ** 30 paths
        top = draw.bind(top, top, node)
    assert len(get(top.execute())) == 16


@better_than_reference("it recurses, a few times for each layer", run=False)
def test_a_long_chain_runs() -> None:
    node = add.bind(0)
    for _ in range(1999):
        node = add.bind(node)
    assert get(node.execute()) == 2000


def test_an_error_of_a_node_is_the_error_of_those_that_use_it() -> None:
    node = same.bind(add.bind(1, "a"))
    with pytest.raises(TypeError, match="unsupported operand"):
        get(node.execute())


# Nested nodes

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Box:
    content: Any
    label: str = "box"


class Plain:
    def __init__(self, content: Any) -> None:
        self.content = content


def test_nested_nodes_become_refs_in_lists_tuples_and_dicts() -> None:
    nested = {"a": add.bind(1), "b": [add.bind(2), (add.bind(3), 4)]}
    given = get(same.bind(nested).execute())
    assert get([given["a"], given["b"][0], given["b"][1][0]]) == [2, 3, 4]
    assert given["b"][1][1] == 4
    assert isinstance(nested["a"], dag.FunctionNode)  # the argument itself is as it was


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda node: Pair(node, 1), lambda value: value.left),
        (Box, lambda value: value.content),
        (Plain, lambda value: value.content),
        (lambda node: [[[node]]], lambda value: value[0][0][0]),
        (lambda node: {"x": {"y": (node,)}}, lambda value: value["x"]["y"][0]),
    ],
    ids=["named tuple", "frozen dataclass", "object", "deep list", "deep dict"],
)
def test_nested_nodes_are_found_in(wrap: Any, unwrap: Any) -> None:
    given = get(same.bind(wrap(add.bind(1))).execute())
    assert get(unwrap(given)) == 2


def test_the_same_nested_node_is_the_same_ref() -> None:
    node = draw.bind()
    first, second = get(same.bind([node, node]).execute())
    assert first == second
    assert get(first) == get(second)


def test_nested_input_is_the_input_itself() -> None:
    with InputNode() as given:
        node = same.bind([given, {"x": given}])
    assert get(node.execute(3)) == [3, {"x": 3}]


# Input


def test_one_argument_is_the_input() -> None:
    with InputNode() as given:
        node = add.bind(given, given)
    assert get(node.execute(4)) == 8
    assert get(node.execute("a")) == "aa"
    assert get(node.execute(ray.put(5))) == 10


def test_parts_of_several_arguments_by_number_and_name() -> None:
    with InputNode() as given:
        node = add.bind(given[0], given.x)
    assert get(node.execute(4, x=5)) == 9


def test_parts_of_one_argument_by_index_key_and_attribute() -> None:
    with InputNode() as given:
        by_index = add.bind(given[0], given[1])
    with InputNode() as given:
        by_key = add.bind(given["left"], given["right"])
    with InputNode() as given:
        by_attribute = add.bind(given.left, given.right)
    assert get(by_index.execute([1, 2])) == 3
    assert get(by_index.execute(1, 2)) == 3
    assert get(by_key.execute({"left": 1, "right": 2})) == 3
    assert get(by_key.execute(left=1, right=2)) == 3
    assert get(by_attribute.execute(Pair(1, 2))) == 3


def test_a_part_is_one_node_however_often_it_is_named() -> None:
    with InputNode() as given:
        assert given.x is given.x is given["x"]
        assert given[0] is given[0]
    assert isinstance(given.x, dag.InputAttributeNode)
    assert (given.x.key, given[0].key) == ("x", 0)
    assert given.x.execute(x=4) == 4
    assert given.execute(4) == 4
    assert given.execute(4, 5)[1] == 5


def test_types_of_input_are_noted() -> None:
    assert InputNode(input_type=int).get_result_type() == "int"
    assert InputNode(input_type={0: int, "x": str})["x"].get_result_type() == "str"
    assert InputNode().get_result_type() is None


def test_a_missing_part_is_an_error_at_execute() -> None:
    with InputNode() as given:
        node = add.bind(given[0], given.x)
    with pytest.raises(KeyError, match="x"):
        node.execute(1, y=2)
    with pytest.raises(IndexError):
        node.execute(x=1)
    with pytest.raises(AttributeError, match="'x'"):
        node.execute([1, 2])
    with pytest.raises(TypeError, match="not subscriptable"):
        node.execute(1)


@better_than_reference("it runs the function with an empty record for input")
def test_a_graph_with_an_input_is_not_executed_without() -> None:
    with InputNode() as given:
        node = same.bind(given)
    with pytest.raises(ValueError, match=r"execute\(value\)"):
        node.execute()


@better_than_reference("it calls what stands before the part in the graph")
def test_nothing_runs_when_the_input_lacks_a_part() -> None:
    counter = Counter.remote()
    with InputNode() as given:
        node = MultiOutputNode([counter.add.bind(), same.bind(given.x)])
    with pytest.raises(KeyError):
        node.execute(1, y=2)
    assert get(counter.read.remote()) == 0


def test_two_inputs_in_one_graph_are_refused() -> None:
    with InputNode() as first, InputNode() as second:
        node = add.bind(first, second)
    with pytest.raises(AssertionError, match="one unique InputNode"):
        node.execute(1)


def test_an_input_outside_of_a_with_statement_is_refused() -> None:
    node = add.bind(InputNode(), 1)
    with pytest.raises(AssertionError, match="context manager"):
        node.execute(1)


def test_input_nodes_take_no_arguments_and_simple_keys() -> None:
    with pytest.raises(ValueError, match="should not take any args"):
        InputNode(1)
    with InputNode() as given, pytest.raises(AssertionError, match="int index or str"):
        given[1.5]


# Several results


def test_multi_output_gives_a_list() -> None:
    with InputNode() as given:
        first = add.bind(given, 1)
        node = MultiOutputNode([first, add.bind(first, 10), given])
    one, two, three = node.execute(1)
    assert get([one, two]) == [2, 12]
    assert three == 1
    assert get(MultiOutputNode((add.bind(1),)).execute()) == [2]
    assert MultiOutputNode([]).execute() == []


def test_multi_output_takes_a_list() -> None:
    with pytest.raises(ValueError, match="Invalid input type"):
        MultiOutputNode(add.bind(1))


# Actors


def test_a_class_node_is_an_actor_of_its_own_in_each_execution() -> None:
    counter = Counter.bind(10)
    assert isinstance(counter, dag.ClassNode)
    node = counter.add.bind(1)
    assert isinstance(node, dag.ClassMethodNode)
    assert [get(node.execute()) for _ in range(3)] == [11, 11, 11]


def test_a_class_node_alone_gives_a_handle() -> None:
    handle = Counter.bind(10).execute()
    assert get(handle.add.remote(1)) == 11


def test_methods_of_one_class_node_share_an_actor_and_run_in_the_order_of_binding() -> None:
    counter = Counter.bind(10)
    first = counter.add.bind(1)
    second = counter.add.bind(5)
    assert get(MultiOutputNode([second, first]).execute()) == [16, 11]
    assert get(second.execute()) == 16  # the call that was bound before runs too
    assert get(first.execute()) == 11


def test_a_handle_is_the_same_actor_in_each_execution() -> None:
    counter = Counter.remote(100)
    with InputNode() as given:
        node = counter.add.bind(given)
    assert [get(node.execute(1)) for _ in range(3)] == [101, 102, 103]
    assert get(counter.read.remote()) == 103
    assert get(add.bind(counter.read.bind(), counter.add.bind(1)).execute()) == 207


def test_class_nodes_take_other_nodes_and_are_arguments_themselves() -> None:
    counter = Counter.bind(add.bind(1, 2))
    assert get(counter.read.bind().execute()) == 3

    @ray.remote
    def use(handle: Any, more: list[Any]) -> list[int]:
        return [ray.get(handle.add.remote()), ray.get(more[0].read.remote())]

    assert get(use.bind(counter, [counter]).execute()) == [4, 4]


def test_several_return_values_of_a_handles_method_are_nodes_each() -> None:
    counter = Counter.remote(3)
    left, right = counter.pair.bind()
    assert get(MultiOutputNode([left, right]).execute()) == [3, -3]
    assert get(right.execute()) == -3
    assert (left.is_class_method_output, left.is_class_method_call) == (True, False)
    assert (left.output_idx, right.output_idx, left.num_returns) == (0, 1, 2)
    call = left.class_method_call
    assert call is right.class_method_call
    assert (call.get_method_name(), call.num_returns, call.is_class_method_call) == (
        "pair",
        2,
        True,
    )
    assert get(Counter.bind(4).pair.bind().execute()) == [4, -4]


def test_options_of_classes_and_methods() -> None:
    counter = Counter.options(num_cpus=0).bind(1)
    assert counter.get_options() == {"num_cpus": 0}
    named = counter.add.options(name="plus").bind(2)
    assert named.get_options() == {"name": "plus"}
    assert get(named.execute()) == 3


def test_input_is_not_for_constructors() -> None:
    with InputNode() as given, pytest.raises(ValueError, match="InputNode"):
        Counter.bind([given])


# Wrong use


def test_nodes_have_neither_bind_nor_remote() -> None:
    node, counter = add.bind(1), Counter.bind()
    with pytest.raises(AttributeError, match=r"\.bind\(\) cannot be used again"):
        node.bind()
    with pytest.raises(AttributeError, match=r"use .execute\(\)"):
        node.remote()
    with pytest.raises(AttributeError, match=r"\.bind\(\) cannot be used again"):
        counter.bind()
    with pytest.raises(AttributeError, match=r"Use .bind\(\) instead"):
        counter.add.remote(1)
    with pytest.raises(AttributeError, match="nope"):
        counter.nope  # noqa: B018
    with pytest.raises(TypeError):
        node()


def test_arguments_that_do_not_fit_are_a_type_error_at_execute_at_the_latest() -> None:
    with pytest.raises(TypeError):
        add.bind(1, 2, 3).execute()
    with pytest.raises(TypeError):
        Counter.bind(1, 2).execute()
    with pytest.raises(TypeError):
        Counter.bind().add.bind(1, 2).execute()
    with pytest.raises(TypeError, match="too many positional arguments"):
        Counter.remote().add.bind(1, 2)


@better_than_reference("it tells of them at execute")
def test_arguments_that_do_not_fit_are_a_type_error_at_bind() -> None:
    for bind in (
        lambda: add.bind(),
        lambda: add.bind(1, c=3),
        lambda: Counter.bind(1, 2),
        lambda: Counter.bind().add.bind(1, 2),
    ):
        with pytest.raises(TypeError):
            bind()


@better_than_reference("it takes them, and the actor never starts")
def test_parts_of_an_input_are_not_for_constructors_either() -> None:
    with InputNode() as given, pytest.raises(ValueError, match="InputNode"):
        Counter.bind(given.start)


@pytest.mark.skipif(IS_REFERENCE, reason="it compiles graphs")
def test_compiled_graphs_are_refused_in_words() -> None:
    for call in (add.bind(1).experimental_compile, add.bind(1).with_tensor_transport):
        with pytest.raises(ray.exceptions.NotSupportedError, match=r"[Cc]ompiled graphs"):
            call()


# Looking at graphs, and passing them on


def test_what_was_bound_can_be_read() -> None:
    node = add.bind(1, b=2)
    assert list(node.get_args()) == [1]
    assert node.get_kwargs() == {"b": 2}
    assert node.get_other_args_to_resolve() == {}
    counter = Counter.bind()
    first, second = counter.add.bind(1), counter.add.bind(2)
    others = second.get_other_args_to_resolve()
    assert others[dag.PARENT_CLASS_NODE_KEY] is counter
    assert others[dag.PREV_CLASS_METHOD_CALL_KEY] is first
    handle = Counter.remote()
    handle.add.bind()
    assert handle.add.bind().get_other_args_to_resolve()[dag.BIND_INDEX_KEY] == 1
    assert "FunctionNode" in str(node)


def test_apply_recursive_visits_each_node_once_children_first() -> None:
    with InputNode() as given:
        shared = same.bind(given[0])
        node = add.bind(shared, [shared])
    seen: list[str] = []

    def look(node: Any) -> Any:
        seen.append(type(node).__name__)
        return node

    copied = node.apply_recursive(look)
    assert seen == ["InputNode", "InputAttributeNode", "FunctionNode", "FunctionNode"]
    assert copied is not node
    assert copied.get_stable_uuid() == node.get_stable_uuid()


def test_apply_recursive_puts_results_in_the_places_of_children() -> None:
    node = add.bind(add.bind(1, 2), add.bind(3, 4))
    assert node.apply_recursive(lambda node: sum(node.get_args())) == 10


def test_apply_functional_replaces_the_nodes_that_are_accepted() -> None:
    first, second = add.bind(1), same.bind(2)
    replaced = first.apply_functional(
        [first, 1, {"k": (second,)}], lambda node: True, lambda node: list(node.get_args())
    )
    assert replaced == [[1], 1, {"k": ([2],)}]


def test_traverse_and_apply_visits_all_that_is_connected() -> None:
    with InputNode() as given:
        first = same.bind(given)
        second = add.bind(given, 1)
    output = MultiOutputNode([first, second])
    seen: list[Any] = []
    first.traverse_and_apply(seen.append)
    assert {id(node) for node in seen} == {id(node) for node in (given, first, second, output)}
    assert len(seen) == 4
    with pytest.raises(ValueError, match="Found 1 DAGNodes"):
        same.bind([first]).traverse_and_apply(seen.append)


def test_what_nodes_gave_can_be_kept() -> None:
    with InputNode() as given:
        first = add.bind(given, 1)
        node = add.bind(first, 2)
    node.execute(1, _ray_cache_refs=True)
    kept = asyncio.run(node.get_object_refs_from_last_execute())
    assert get(kept[first.get_stable_uuid()]) == 2
    assert get(kept[node.get_stable_uuid()]) == 4
    assert kept[given.get_stable_uuid()] == 1
    node.clear_cache()
    assert asyncio.run(node.get_object_refs_from_last_execute()) == {}


def test_a_graph_travels_and_runs_in_a_task() -> None:
    counter = Counter.bind(1)
    with InputNode() as given:
        first = counter.add.bind(given.x)
        shared = draw.bind()
        node = MultiOutputNode([counter.add.bind(given.x), first, shared, same.bind(shared)])

    @ray.remote
    def run(graph: Any) -> Any:
        return ray.get(graph.execute(x=10)), graph.get_stable_uuid()

    values, name = get(run.remote(node))
    assert values[:2] == [21, 11]
    assert values[2] == values[3]
    assert name == node.get_stable_uuid()


@better_than_reference("it goes on for ever", run=False)
def test_an_input_cannot_be_iterated_over() -> None:
    with InputNode() as given:
        with pytest.raises(TypeError, match="cannot be iterated over"):
            list(given)
        with pytest.raises(TypeError, match="cannot be iterated over"):
            _, _ = given
