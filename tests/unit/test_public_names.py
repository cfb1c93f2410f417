"""What users may rely on: the names of each plain module, and errors that travel whole."""

from __future__ import annotations

import builtins
import copy
import importlib
import inspect
import itertools
import pickle
import re
import types
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

import poolray
from poolray import exceptions
from poolray.exceptions import PoolrayError, TaskError

# Changing one of these lists changes what users can write: it needs a changelog fragment.
PUBLIC_NAMES = {
    "poolray": [
        "ActorID",
        "DynamicObjectRefGenerator",
        "Executor",
        "JobID",
        "NodeID",
        "PlacementGroupID",
        "TaskID",
        "WorkerID",
        "ObjectRef",
        "ObjectRefGenerator",
        "Pool",
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
    ],
    "poolray.dag": [
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
    ],
    "poolray.cluster_utils": [
        "Cluster",
        "ClusterNode",
    ],
    "poolray.cluster_state": [
        "available_resources",
        "cluster_resources",
        "get_gpu_ids",
        "nodes",
        "timeline",
    ],
    "poolray.util.placement_group": [
        "VALID_PLACEMENT_GROUP_STRATEGIES",
        "PlacementGroup",
        "PlacementGroupID",
        "get_current_placement_group",
        "get_placement_group",
        "placement_group",
        "placement_group_table",
        "remove_placement_group",
    ],
    "poolray.util.scheduling_strategies": [
        "DoesNotExist",
        "Exists",
        "In",
        "LabelMatchExpressionsT",
        "NodeAffinitySchedulingStrategy",
        "NodeLabelSchedulingStrategy",
        "NotIn",
        "PlacementGroupSchedulingStrategy",
        "SchedulingStrategyT",
    ],
    "poolray.util.state": [
        "PlacementGroupState",
        "get_log",
        "get_placement_group",
        "list_logs",
        "list_placement_groups",
        "ClusterEventState",
        "JobState",
        "ActorState",
        "NodeState",
        "ObjectState",
        "RuntimeEnvState",
        "TaskState",
        "WorkerState",
        "get_job",
        "get_actor",
        "get_node",
        "get_objects",
        "get_task",
        "get_worker",
        "list_cluster_events",
        "list_jobs",
        "list_actors",
        "list_nodes",
        "list_objects",
        "list_runtime_envs",
        "list_tasks",
        "list_workers",
        "summarize_actors",
        "summarize_objects",
        "summarize_tasks",
    ],
    "poolray.exceptions": [
        "AsyncioActorExit",
        "LocalRayletDiedError",
        "ObjectFetchTimedOutError",
        "PlasmaObjectNotAvailable",
        "CrossLanguageError",
        "UnserializableException",
        "ActorHandleNotFoundError",
        "ActorAlreadyExistsError",
        "ActorDiedError",
        "ActorError",
        "ActorPlacementGroupRemoved",
        "ActorUnavailableError",
        "ActorUnschedulableError",
        "AuthenticationError",
        "CallTimeoutError",
        "ClusterConnectionError",
        "GetTimeoutError",
        "IllegalTransition",
        "InternalError",
        "NodeDiedError",
        "NotSupportedError",
        "ObjectFreedError",
        "ObjectLostError",
        "ObjectReconstructionFailedError",
        "ObjectStoreFullError",
        "OutOfDiskError",
        "OutOfMemoryError",
        "OwnerDiedError",
        "PendingCallsLimitExceeded",
        "PoolrayError",
        "RayActorError",
        "RayError",
        "RaySystemError",
        "RayTaskError",
        "RuntimeEnvSetupError",
        "StateApiError",
        "TaskCancelledError",
        "TaskError",
        "TaskPlacementGroupRemoved",
        "TaskUnschedulableError",
        "WorkerCrashedError",
        "WorkerStartError",
    ],
    "poolray.pool": [
        "ApplyResult",
        "AsyncResult",
        "IMapIterator",
        "IMapUnorderedIterator",
        "MapResult",
        "Pool",
    ],
    "poolray.executor": ["Executor", "WorkerDiedError"],
    "poolray.remote_function": ["OptionedFunction", "RemoteFunction", "check_options"],
    "poolray.actor": [
        "ActorClass",
        "ActorHandle",
        "ActorMethod",
        "OptionedClass",
        "exit_actor",
        "get_actor",
        "kill",
        "method",
    ],
    "poolray.actor_options": ["check_actor_options", "method"],
    "poolray.remote_signature": [
        "ActorDefinitionOptions",
        "ActorOptions",
        "DefinitionOptions",
        "RemoteCall",
        "RemoteSignature",
        "TaskOptions",
    ],
    "poolray.runtime_context": ["RuntimeContext", "get_runtime_context"],
    "poolray.public_ids": [
        "ActorID",
        "JobID",
        "NodeID",
        "PlacementGroupID",
        "TaskID",
        "WorkerID",
    ],
    "poolray.util.state_logs": ["get_log", "list_logs"],
    "poolray.util.debug": ["disable_log_once_globally", "enable_periodic_logging", "log_once"],
    "poolray.util.helpers": ["as_completed", "map_unordered"],
    "poolray.util": [
        "ActorPool",
        "as_completed",
        "disable_log_once_globally",
        "enable_periodic_logging",
        "get_node_ip_address",
        "log_once",
        "map_unordered",
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
    ],
    "poolray.__main__": ["main"],
    "poolray.util.actor_pool": ["ActorPool"],
    "poolray.util.collective": [
        "Backend",
        "CollectiveError",
        "CollectiveTimeoutError",
        "ReduceOp",
        "allgather",
        "allgather_multigpu",
        "allreduce",
        "allreduce_multigpu",
        "barrier",
        "broadcast",
        "broadcast_multigpu",
        "create_collective_group",
        "destroy_collective_group",
        "get_collective_group_size",
        "get_group_handle",
        "get_rank",
        "gloo_available",
        "init_collective_group",
        "is_backend_available",
        "is_group_initialized",
        "nccl_available",
        "recv",
        "recv_multigpu",
        "reduce",
        "reduce_multigpu",
        "reducescatter",
        "reducescatter_multigpu",
        "send",
        "send_multigpu",
    ],
    "poolray.util.collective.collective": [
        "allgather",
        "allgather_multigpu",
        "allreduce",
        "allreduce_multigpu",
        "barrier",
        "broadcast",
        "broadcast_multigpu",
        "create_collective_group",
        "destroy_collective_group",
        "get_collective_group_size",
        "get_group_handle",
        "get_rank",
        "gloo_available",
        "init_collective_group",
        "is_backend_available",
        "is_group_initialized",
        "nccl_available",
        "recv",
        "recv_multigpu",
        "reduce",
        "reduce_multigpu",
        "reducescatter",
        "reducescatter_multigpu",
        "send",
        "send_multigpu",
    ],
    "poolray.util.collective.types": [
        "Backend",
        "CollectiveError",
        "CollectiveTimeoutError",
        "ReduceOp",
    ],
    "poolray.experimental.internal_kv": [
        "_internal_kv_del",
        "_internal_kv_exists",
        "_internal_kv_get",
        "_internal_kv_initialized",
        "_internal_kv_list",
        "_internal_kv_put",
        "_internal_kv_reset",
    ],
    "poolray.experimental.tqdm_ray": ["safe_print", "tqdm"],
    "poolray.util.metrics": [
        "Counter",
        "Gauge",
        "Histogram",
        "Metric",
        "MetricSample",
        "MetricsServer",
        "metrics_text",
        "samples",
        "start_metrics_server",
    ],
    "poolray.util.multiprocessing": ["JoinableQueue", "Pool", "TimeoutError"],
    "poolray.util.multiprocessing.pool": [
        "ApplyResult",
        "AsyncResult",
        "IMapIterator",
        "IMapUnorderedIterator",
        "MapResult",
        "Pool",
        "TimeoutError",
    ],
    "poolray.util.joblib": ["register", "register_ray"],
    "poolray.util.queue": ["Empty", "Full", "Queue"],
    "poolray.util.memory": ["format_table", "memory_summary"],
    "poolray.util.check_serialize": ["FailureTuple", "inspect_serializability"],
    "poolray.util.serialization": ["deregister_serializer", "register_serializer"],
    "poolray.multiprocessing.pool": [
        "ApplyResult",
        "AsyncResult",
        "IMapIterator",
        "IMapUnorderedIterator",
        "MapResult",
        "MaybeEncodingError",
        "Pool",
        "RemoteTraceback",
        "ThreadPool",
        "TimeoutError",
    ],
}


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_the_public_names_of_a_module_are_pinned(module: str) -> None:
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == sorted(PUBLIC_NAMES[module])
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'poolray' has no attribute 'Pol'"):
        _ = poolray.Pol  # type: ignore[attr-defined]


def test_the_version_is_one_that_installers_can_read() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|a\d+|b\d+|rc\d+)?", poolray.__version__)


# Errors

ERROR_CLASSES = sorted(
    {
        value
        for module in (exceptions, importlib.import_module("poolray.executor"))
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PoolrayError) and value.__name__[0] != "_"
    },
    key=lambda cls: cls.__name__,
)
#: A value for each parameter that the constructors of errors have.
SAMPLES: dict[str, Any] = {
    "actor_id": "5e6f" * 8,
    "attempts": 4,
    "class_name": "Counter",
    "cause": ValueError("inner", 3),
    "event": "WorkerReady",
    "exit_code": None,
    "function_name": "resize",
    "history": ("QUEUED", "RUNNING"),
    "limit_bytes": 0,
    "name": "counter",
    "namespace": "job",
    "node_id": "b71d" * 8,
    "object_id": "0a1b" * 14,
    "pid": 4121,
    "processes": ((4121, 6 << 30, "python train.py"),),
    "reason": "why it happened",
    "signal": 9,
    "size_bytes": 1 << 20,
    "state": "IDLE",
    "task_id": "3f2a" * 12,
    "task_name": "resize_images",
    "threshold": 0.95,
    "total_bytes": 24 << 30,
    "timeout_s": 2.5,
    "traceback_str": "Traceback …",
    "used_bytes": 23 << 30,
    "what": "worker 7",
    "worker_bytes": 6 << 30,
}


def make(cls: type[PoolrayError]) -> PoolrayError:
    """An error with every field set."""
    names = parameters_of(cls)
    return cls(**{name: SAMPLES[name] for name in names}) if names else cls("what happened")


def parameters_of(cls: type[PoolrayError]) -> list[str]:
    """Names of the constructor's parameters; none if it takes just a text. What programs that raise
    an error themselves say instead, as Ray's classes take it, is not among them.
    """
    if not isinstance(cls.__init__, types.FunctionType):
        return []
    theirs = ("message", "error_message", "error_msg", "object_ref_hex", "owner_address")
    return [p for p in inspect.signature(cls).parameters if p not in (*theirs, "call_site")]


def copies(error: BaseException) -> Iterator[BaseException]:
    """The error after each way to travel."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(error, protocol))
    yield pickle.loads(cloudpickle.dumps(error))
    yield copy.copy(error)
    yield copy.deepcopy(error)


def fields(error: BaseException) -> dict[str, Any]:
    """What an error carries; exceptions among it by their text, for they do not compare."""
    return {
        name: repr(value) if isinstance(value, BaseException) else value
        for name, value in vars(error).items()
    }


@pytest.mark.parametrize("cls", ERROR_CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_travels_with_its_fields(cls: type[PoolrayError]) -> None:
    error = make(cls)
    for arrived in copies(error):
        assert type(arrived) is cls
        assert str(arrived) == str(error)
        assert arrived.args == error.args
        assert fields(arrived) == fields(error)


@pytest.mark.parametrize("cls", ERROR_CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_keeps_what_it_was_made_of(cls: type[PoolrayError]) -> None:
    error = make(cls)
    for name in parameters_of(cls):
        assert getattr(error, name) == SAMPLES[name]
    assert str(error)


class Refused(Exception):
    """An exception with a constructor of its own."""

    def __init__(self, code: int, *, path: str) -> None:
        super().__init__(f"{path} refused with {code}")
        self.code = code
        self.path = path

    def __reduce__(self) -> Any:
        return _make_refused, (self.code, self.path)


def _make_refused(code: int, path: str) -> Refused:
    return Refused(code, path=path)


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("inner", 3),
        KeyError("name"),
        MemoryError("none left"),
        FileNotFoundError(2, "No such file", "a.txt"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        StopIteration(5),
        Refused(3, path="/a"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_a_task_error_is_of_its_causes_class_wherever_it_travels(cause: Exception) -> None:
    error = TaskError(
        function_name="f", traceback_str="Traceback …", cause=cause, pid=1
    ).as_instanceof_cause()
    for arrived in itertools.chain([error], copies(error)):
        assert isinstance(arrived, TaskError)
        assert isinstance(arrived, type(cause))
        assert type(arrived.cause) is type(cause)
        assert arrived.cause.args == cause.args
        assert str(arrived) == "Traceback …"
        for name, value in vars(cause).items():
            assert getattr(arrived, name) == value


def test_a_group_is_a_task_error_and_a_group() -> None:
    group_class = getattr(builtins, "ExceptionGroup", None)
    if group_class is None:
        pytest.skip("this Python has no exception groups")
    error = TaskError(
        function_name="f",
        traceback_str="…",
        cause=group_class("two", [OSError(1), KeyError(2)]),
        pid=1,
    ).as_instanceof_cause()
    for arrived in itertools.chain([error], copies(error)):
        assert isinstance(arrived, group_class)
        assert [type(part) for part in arrived.exceptions] == [OSError, KeyError]


def test_a_task_error_whose_class_cannot_be_doubled_is_itself() -> None:
    class Closed(type):
        def __call__(cls, *args: Any) -> Any:
            raise RuntimeError("no more of these")

    cause = BaseException.__new__(Closed("Odd", (Exception,), {}))
    error = TaskError(function_name="f", traceback_str="…", cause=cause, pid=1)
    assert error.as_instanceof_cause() is error


@pytest.mark.parametrize("cls", ERROR_CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_of_ours_that_a_task_raised_is_a_task_error_and_itself(
    cls: type[PoolrayError],
) -> None:
    inner = make(cls)
    error = TaskError(function_name="f", traceback_str="…", cause=inner, pid=1)
    raised = error.as_instanceof_cause()
    for arrived in itertools.chain([raised], copies(raised)):
        assert isinstance(arrived, TaskError)
        assert isinstance(arrived, cls)
        assert type(arrived.cause) is cls
        assert str(arrived.cause) == str(inner)


def test_the_tree_on_top_of_the_module_is_the_tree() -> None:
    assert exceptions.__doc__ is not None
    drawn: dict[str, str | None] = {}
    path: list[str] = []
    for line in exceptions.__doc__.splitlines():
        if found := re.match(
            r"^(    (?:[│ ] {3})*(?:[├└]── )?)"
            r"(\w+Error|IllegalTransition|PendingCallsLimitExceeded|\w+PlacementGroupRemoved"
            r"|AsyncioActorExit|PlasmaObjectNotAvailable|UnserializableException)\b",
            line,
        ):
            depth = len(found[1]) // 4 - 1
            path[depth:] = [found[2]]
            drawn[found[2]] = path[depth - 1] if depth else None
    names = [name for name in exceptions.__all__ if not name.startswith("Ray")]
    real = {
        name: getattr(exceptions, name).__bases__[0].__name__ if name != "PoolrayError" else None
        for name in names
    }
    assert drawn == real


def test_the_references_names_are_the_same_classes() -> None:
    assert exceptions.RayError is PoolrayError
    assert exceptions.RayTaskError is TaskError
    assert exceptions.RaySystemError is exceptions.InternalError


def test_errors_of_time_and_options_are_caught_by_their_usual_classes() -> None:
    assert issubclass(exceptions.GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.NotSupportedError, ValueError)


def test_an_error_for_want_of_memory_says_who_used_how_much_and_what_to_do() -> None:
    error = make(exceptions.OutOfMemoryError)
    for part in ("resize_images", "4121", "6.00 GiB", "23.00 GiB of 24.00 GiB", "95.8%", "0.95"):
        assert part in str(error)
    assert "  pid 4121       6.00 GiB  python train.py" in str(error)
    assert "POOLRAY_memory_monitor_refresh_ms=0" in str(error)


def test_an_error_for_too_much_memory_names_what_was_asked_for() -> None:
    fields = {n: SAMPLES[n] for n in parameters_of(exceptions.OutOfMemoryError)}
    error = exceptions.OutOfMemoryError(**{**fields, "limit_bytes": 100 << 20})
    assert "used 6.00 GiB, and it had asked for memory=104857600 (100.0 MiB)" in str(error)
    assert "POOLRAY_enforce_memory_limits=0" in str(error)


def test_a_crash_says_how_the_worker_ended_and_what_to_do() -> None:
    known = {name: SAMPLES[name] for name in ("task_name", "task_id", "pid", "attempts")}
    killed = exceptions.WorkerCrashedError(**known, exit_code=None, signal=9)
    for part in ("resize_images", "3f2a3f2a3f2a", "4121", "signal 9 (SIGKILL)", "4 time(s)"):
        assert part in str(killed)
    assert "max_retries=" in str(killed)
    left = exceptions.WorkerCrashedError(**known, exit_code=3, signal=None)
    assert "exited with code 3" in str(left)
    strange = exceptions.WorkerCrashedError(**known, exit_code=None, signal=200)
    assert "signal 200 (unknown signal)" in str(strange)
