"""Faces beyond the core calls, each a module of its own that users import by name.

What: conveniences under the module paths that Ray Core users know: `ActorPool`, placement groups,
`register_serializer`, `deregister_serializer`, `inspect_serializability`, `memory_summary`.
Who calls it: user code.
May touch: what `poolray.api` offers, how values are written (`poolray.objects.serialization`,
`poolray.objects.reducers`) and what the runtime tells of itself; a util has no private way into the
machines.
Invariants: nothing here is imported by `import poolray` itself, so that the start stays short.
"""

from __future__ import annotations

from poolray.actor import named_actors
from poolray.util.actor_pool import ActorPool
from poolray.util.check_serialize import inspect_serializability
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
    "deregister_serializer",
    "get_current_placement_group",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
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
