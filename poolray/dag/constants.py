"""Keys under which nodes keep what they depend on beside their arguments.

What: the reference's names, for programs that look into `get_other_args_to_resolve()`.
Who calls: the nodes of this room, and users.
May touch: nothing.
"""

from __future__ import annotations

#: The actor that a method is called on: a `ClassNode` or a handle.
PARENT_CLASS_NODE_KEY = "parent_class_node"
#: The call that was bound before on the same `ClassNode`: it runs first.
PREV_CLASS_METHOD_CALL_KEY = "prev_class_method_call"
#: How many calls were bound before on the same handle.
BIND_INDEX_KEY = "bind_index"
#: Whether a node stands for one of several return values of a call.
IS_CLASS_METHOD_OUTPUT_KEY = "is_class_method_output"
#: Kept for compiled graphs.
COLLECTIVE_OPERATION_KEY = "collective_operation"
DAGNODE_TYPE_KEY = "__dag_node_type__"

__all__ = [
    "BIND_INDEX_KEY",
    "COLLECTIVE_OPERATION_KEY",
    "DAGNODE_TYPE_KEY",
    "IS_CLASS_METHOD_OUTPUT_KEY",
    "PARENT_CLASS_NODE_KEY",
    "PREV_CLASS_METHOD_CALL_KEY",
]
