"""Faces beyond the core calls, each a module of its own that users import by name.

What: conveniences under the module paths that Ray Core users know: `ActorPool`, placement groups,
`as_completed`, `map_unordered`, `register_serializer`, `deregister_serializer`,
`inspect_serializability`, `memory_summary`, `log_once`.
Who calls it: user code.
May touch: what `poolray.api` offers, how values are written (`poolray.objects.serialization`,
`poolray.objects.reducers`) and what the runtime tells of itself; a util has no private way into the
machines.
Invariants: nothing here is imported by `import poolray` itself, so that the start stays short.
"""

from __future__ import annotations

from poolray.actor import named_actors
from poolray.cluster_state import nodes
from poolray.runtime_context import get_runtime_context
from poolray.util.actor_pool import ActorPool
from poolray.util.check_serialize import inspect_serializability
from poolray.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
from poolray.util.helpers import as_completed, map_unordered
from poolray.util.memory import memory_summary
from poolray.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from poolray.util.serialization import deregister_serializer, register_serializer

__all__ = [
    "ActorPool",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "memory_summary",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
]


def list_named_actors(all_namespaces: bool = False) -> list[str] | list[dict[str, str]]:
    """Names of actors that live.

    Parameters
    ----------
    all_namespaces : bool, default False
        Those of all namespaces, each as a dict of `namespace` and `name`; else the names in the
        job's own.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util import list_named_actors
    >>> @poolray.remote
    ... class Named:
    ...     def ping(self) -> None: ...
    >>> actor = Named.options(name="listed").remote()
    >>> "listed" in list_named_actors()
    True
    """
    found = named_actors(all_namespaces)
    if all_namespaces:
        return [{"name": name, "namespace": namespace} for namespace, name in found]
    return [name for _, name in found]


def get_node_ip_address() -> str:
    """The address of this process's node, as `nodes()` has it; starts the runtime if there is none.

    Examples
    --------
    >>> import poolray
    >>> poolray.util.get_node_ip_address()
    '127.0.0.1'
    """
    node_id = get_runtime_context().get_node_id()
    return next(str(n["NodeManagerAddress"]) for n in nodes() if n["NodeID"] == node_id)
