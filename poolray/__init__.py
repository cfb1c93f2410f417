"""poolray: parallel and distributed Python, from a Pool to a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolray import actor, binding, exceptions
from poolray._version import __version__
from poolray.actor import get_actor, kill, method
from poolray.api import cancel, get, init, is_initialized, put, remote, shutdown, wait
from poolray.cluster_state import (
    available_resources,
    cluster_resources,
    get_gpu_ids,
    nodes,
    timeline,
)
from poolray.generators import ObjectRefGenerator
from poolray.objects.object_ref import ObjectRef
from poolray.objects.ref_list import DynamicObjectRefGenerator
from poolray.public_ids import ActorID, JobID, NodeID, PlacementGroupID, TaskID, WorkerID
from poolray.runtime_context import get_runtime_context

if TYPE_CHECKING:
    from poolray import dag, util
    from poolray.executor import Executor
    from poolray.pool import Pool

__all__ = [
    "ActorID",
    "DynamicObjectRefGenerator",
    "Executor",
    "JobID",
    "NodeID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "Pool",
    "TaskID",
    "WorkerID",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "cluster_resources",
    "dag",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "util",
    "wait",
]


def _find_binder() -> binding.Binder:
    from poolray.dag import binder

    return binder


binding.find_binder = _find_binder

if not TYPE_CHECKING:  # checkers know the faces from the import above, and misspelt names from none

    def __getattr__(name: str) -> object:
        """Faces are imported at their first use: a program pays for what it uses."""
        if name == "Pool":
            from poolray.pool import Pool

            return Pool
        if name == "Executor":
            from poolray.executor import Executor

            return Executor
        if name == "dag":
            import poolray.dag

            return poolray.dag
        if name == "util":
            import poolray.util

            return poolray.util
        raise AttributeError(f"module 'poolray' has no attribute {name!r}")
