"""What those who look on know the errors of tasks as.

What: the reference's names of kinds of failures, by the error's class.
Who calls: the node's tasks and actors when one fails, its observer.
May touch: nothing.
Invariants: an error that is none of the runtime's own is one that user code raised.
"""

from __future__ import annotations

from poolray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    PoolrayError,
    TaskCancelledError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)

ACTOR_DIED = "ACTOR_DIED"
CANCELLED = "TASK_CANCELLED"
OTHER_ERROR = "TASK_EXECUTION_EXCEPTION"
_CANCELLED_PREFIX = f"{TaskCancelledError.__name__}: "
_BY_CLASS: dict[type[PoolrayError], str] = {
    WorkerCrashedError: "WORKER_DIED",
    OutOfMemoryError: "OUT_OF_MEMORY",
    NodeDiedError: "NODE_DIED",
    ObjectLostError: "OBJECT_LOST",
    ObjectReconstructionFailedError: "OBJECT_UNRECONSTRUCTABLE",
    TaskCancelledError: CANCELLED,
    TaskUnschedulableError: "TASK_UNSCHEDULABLE_ERROR",
    ActorUnschedulableError: "ACTOR_UNSCHEDULABLE_ERROR",
    TaskPlacementGroupRemoved: "TASK_PLACEMENT_GROUP_REMOVED",
    ActorDiedError: ACTOR_DIED,
    ActorUnavailableError: "ACTOR_UNAVAILABLE",
}


def error_type_of(error: PoolrayError) -> str:
    """The kind of failure that an error tells of."""
    return _BY_CLASS.get(type(error), OTHER_ERROR)


def error_type_in(summary: str) -> str:
    """The kind of failure that a worker tells of: its user's, unless the call was cancelled."""
    return CANCELLED if summary.startswith(_CANCELLED_PREFIX) else OTHER_ERROR
