"""Lazy graphs of calls: bound now, run later, as often as wanted.

What: the nodes that `bind` makes, and those that users make themselves.
Who calls: users; `bind` of functions, classes and methods, through `binder.py`.
May touch: nothing.
Invariants: nothing runs before `execute`.
"""

from __future__ import annotations

from poolray.dag.class_node import ClassMethodNode, ClassNode
from poolray.dag.constants import (
    BIND_INDEX_KEY,
    COLLECTIVE_OPERATION_KEY,
    DAGNODE_TYPE_KEY,
    IS_CLASS_METHOD_OUTPUT_KEY,
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
)
from poolray.dag.dag_node import DAGNode
from poolray.dag.function_node import FunctionNode
from poolray.dag.input_node import DAGInputData, InputAttributeNode, InputNode
from poolray.dag.output_node import MultiOutputNode

__all__ = [
    "BIND_INDEX_KEY",
    "COLLECTIVE_OPERATION_KEY",
    "ClassMethodNode",
    "ClassNode",
    "DAGInputData",
    "DAGNODE_TYPE_KEY",
    "DAGNode",
    "FunctionNode",
    "IS_CLASS_METHOD_OUTPUT_KEY",
    "InputAttributeNode",
    "InputNode",
    "MultiOutputNode",
    "PARENT_CLASS_NODE_KEY",
    "PREV_CLASS_METHOD_CALL_KEY",
]
