"""Faces beyond the core calls, each a module of its own that users import by name.

What: conveniences under the module paths that Ray Core users know: `register_serializer`,
`deregister_serializer`, `inspect_serializability`, `memory_summary`.
Who calls it: user code.
May touch: what `poolray.api` offers, how values are written (`poolray.objects.serialization`,
`poolray.objects.reducers`) and what the runtime tells of itself; a util has no private way into the
machines.
Invariants: nothing here is imported by `import poolray` itself, so that the start stays short.
"""

from __future__ import annotations

from poolray.util.check_serialize import inspect_serializability
from poolray.util.memory import memory_summary
from poolray.util.serialization import deregister_serializer, register_serializer

__all__ = [
    "deregister_serializer",
    "inspect_serializability",
    "memory_summary",
    "register_serializer",
]
