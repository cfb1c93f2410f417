"""Finding nodes inside of arguments, and putting values in their places."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from poolray.dag.nesting import find_nodes, replace_nodes


class Node:
    def __init__(self, number: int) -> None:
        self.number = number
        self.inner: Any = [self]  # is not entered


def numbers(value: Any) -> list[int]:
    return [node.number for node in find_nodes(value, Node)]


def replaced(value: Any) -> Any:
    return replace_nodes(value, Node, lambda node: node.number)


values = st.recursive(
    st.integers() | st.text() | st.none() | st.integers(0, 9).map(Node),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(values)
def test_after_replacing_no_node_is_left_and_what_holds_none_is_the_same_object(value: Any) -> None:
    made = replaced(value)
    assert find_nodes(made, Node) == []
    if not find_nodes(value, Node):
        assert made is value
    assert replaced(made) is made


def test_nodes_are_found_once_in_the_order_in_which_they_are_read() -> None:
    one, two, three = Node(1), Node(2), Node(3)
    assert numbers([one, {"a": two, "b": one}, (three, two)]) == [1, 2, 3]


def test_the_original_stays_as_it_was() -> None:
    node = Node(1)
    original = {"a": [node], "b": [2]}
    made = replaced(original)
    assert made == {"a": [1], "b": [2]}
    assert original["a"] == [node]
    assert made["b"] is original["b"]


def test_containers_keep_their_classes() -> None:
    defaults: Any = collections.defaultdict(list, {"x": Node(1)})
    ordered: Any = collections.OrderedDict(a=Node(2))
    assert replaced(defaults)["missing"] == []
    assert type(replaced(ordered)) is collections.OrderedDict
    assert replaced({Node(3)}) == {3}
    assert replaced(frozenset({Node(3)})) == frozenset({3})


def test_dataclasses_with_slots_are_entered() -> None:
    @dataclasses.dataclass(slots=True)
    class Slotted:
        content: Any

    assert replaced(Slotted(Node(4))) == Slotted(4)


def test_what_is_shared_stays_shared_and_circles_end() -> None:
    shared = [Node(1)]
    first, second = replaced([shared, shared])
    assert first is second
    circle: list[Any] = [Node(1)]
    circle.append(circle)
    made = replaced(circle)
    assert made[0] == 1
    assert made[1] is made


def test_what_cannot_be_copied_is_passed_on() -> None:
    lock = threading.Lock()
    assert replaced([lock, Node(1)]) == [lock, 1]
