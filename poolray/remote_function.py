"""Remote functions: what `@remote` makes of a function.

What: checks options, exports the function at its first call, submits calls.
Who calls: users, through `poolray.remote`.
May touch: nothing; all goes through the process's client.
Invariants: every option is checked when it is given, never later in a worker; a function's closure
is captured at its first `.remote()` and shared by its `.options()`.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, final

from poolray import binding
from poolray.client import Client
from poolray.exceptions import NotSupportedError
from poolray.generators import (
    check_backpressure,
    check_mode,
    check_per_yield,
    stream_mode,
    submit_stream,
)
from poolray.ids import ClassId, FunctionId, PlacementGroupId
from poolray.objects.object_ref import ObjectRef
from poolray.plain_values import plain_options
from poolray.protocol.streams import StreamMode
from poolray.protocol.values import NUM_RETURNS_MAX, CallKind, Delivery, TaskClass, identified
from poolray.remote_placement import (
    check_group,
    check_strategy,
    make_placement,
    parse_fallbacks,
    parse_selector,
)
from poolray.remote_signature import F_co, Given_co, RemoteCall, RemoteSignature
from poolray.scheduling.resources import UNIT, to_fixed

P = ParamSpec("P")
R = TypeVar("R")

#: Option -> types that it takes, in the reference's order.
_TYPES: dict[str, tuple[type, ...]] = {
    "label_selector": (dict, type(None)),
    "fallback_strategy": (list, type(None)),
    "accelerator_type": (str, type(None)),
    "memory": (float, int, type(None)),
    "name": (str, type(None)),
    "num_cpus": (float, int, type(None)),
    "num_gpus": (float, int, type(None)),
    "object_store_memory": (int, type(None)),
    "placement_group": (object,),
    "placement_group_bundle_index": (int,),
    "placement_group_capture_child_tasks": (bool, type(None)),
    "resources": (dict, type(None)),
    "runtime_env": (dict, type(None)),
    "scheduling_strategy": (object,),
    "enable_task_events": (bool,),
    "_labels": (dict, type(None)),
    "max_calls": (int, type(None)),
    "max_retries": (int, type(None)),
    "num_returns": (int, str, type(None)),
    "retry_exceptions": (bool, list, tuple),
    "_generator_backpressure_num_objects": (int, type(None)),
    "_num_objects_per_yield": (int, type(None)),
}

#: Names that `resources={}` cannot have: an option or a placement group has them.
_NOT_CUSTOM = ("memory", "object_store_memory", "bundle")

#: Options that change what a task does and that this version does not carry out yet.
_NOT_YET = (
    "runtime_env",
    "_labels",
)


def check_options(options: Mapping[str, Any], from_options: bool = False) -> None:
    """Check task options as they are given.

    Raises
    ------
    ValueError
        An unknown option, or a value out of range.
    TypeError
        A value of the wrong type.
    NotSupportedError
        An option that this version does not carry out.
    """
    for name, value in options.items():
        types = _TYPES.get(name)
        if types is None:
            raise ValueError(
                f"Invalid option keyword {name} for remote functions. "
                f"Valid ones are {list(_TYPES)}."
            )
        if types != (object,) and not isinstance(value, types):
            raise TypeError(
                f"The type of keyword '{name}' must be {types}, but received type {type(value)}"
            )
        _check_value(name, value, from_options)
    for name in _NOT_YET:
        if options.get(name) is not None and options[name] != {}:
            raise NotSupportedError(
                f"The option {name}={options[name]!r} is not supported by this version of poolray."
            )


def _check_value(name: str, value: Any, from_options: bool) -> None:
    if value is None and name != "max_calls":
        return
    if name in ("num_cpus", "num_gpus", "memory"):
        to_fixed(name, value)
    elif name == "resources":
        _check_resources(value)
    elif name == "num_returns":
        _check_num_returns(value)
    elif name == "_generator_backpressure_num_objects":
        check_backpressure(value)
    elif name == "_num_objects_per_yield" and value < 1:
        raise ValueError(
            "_num_objects_per_yield is a private streaming generator option that must be set to a "
            "positive integer."
        )
    elif name == "max_retries" and value < -1:
        raise ValueError(
            "The keyword 'max_retries' only accepts None, 0, -1 or a positive integer, where -1 "
            "represents infinity."
        )
    elif name == "max_calls":
        if from_options:
            raise ValueError("Setting 'max_calls' is not supported in '.options()'.")
        if value is not None and value < 0:
            raise ValueError("The keyword 'max_calls' only accepts None, 0 or a positive integer.")
    elif name == "retry_exceptions" and not isinstance(value, bool):
        if not all(isinstance(c, type) and issubclass(c, Exception) for c in value):
            raise ValueError("retry_exceptions must be either a boolean or a list of exceptions")
    elif name == "object_store_memory":
        raise ValueError("Setting 'object_store_memory' is not implemented for tasks")
    elif name == "placement_group":
        check_group(value)
    elif name == "scheduling_strategy":
        check_strategy(value)
    elif name == "label_selector":
        parse_selector(value)
    elif name == "fallback_strategy":
        parse_fallbacks(value)


def _check_resources(value: dict[Any, Any]) -> None:
    for key, amount in value.items():
        if key in ("CPU", "GPU"):
            raise ValueError(
                "Use the 'num_cpus' and 'num_gpus' keyword instead of 'CPU' and 'GPU' in "
                "'resources' keyword"
            )
        if not isinstance(key, str):
            raise TypeError(f"The name of a resource must be a string: {key!r}")
        if not isinstance(amount, (int, float)):
            raise TypeError(f"The quantity of resource {key} must be a number: {amount!r}")
        to_fixed(key, amount)


def _check_num_returns(value: int | str) -> None:
    if isinstance(value, str):
        if value in ("streaming", "dynamic"):
            return  # whether the function generates is checked where the function is known
        raise TypeError(
            "The keyword 'num_returns' only accepts None, a non-negative integer, 'streaming' "
            f"(for generators), or 'dynamic': {value!r}"
        )
    if value < 0:
        raise ValueError(
            "Default None. When None is passed, The default value is 1 for a task. The keyword "
            "'num_returns' only accepts None, a non-negative integer, 'streaming' (for "
            "generators), or 'dynamic'."
        )
    if value > NUM_RETURNS_MAX:
        raise ValueError(
            f"'num_returns' may be {NUM_RETURNS_MAX} at most, not {value}: return one list, or "
            "generate."
        )


@final
class RemoteFunction(RemoteSignature[P, R, Callable[P, R], ObjectRef[R]], Generic[P, R]):
    """A function that runs in a worker. Made by `poolray.remote`.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... def square(x: int) -> int:
    ...     return x * x
    >>> poolray.get(square.remote(3))
    9
    """

    def __init__(
        self, function: Callable[P, R], options: dict[str, Any], find_client: Callable[[], Client]
    ) -> None:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ValueError(
                "'async def' should not be used for remote tasks. You can wrap the async function "
                "with `asyncio.run(f())`."
            )
        self._function = function
        if options.get("num_gpus") and options.get("max_calls") is None:
            # What its libraries hold of a device goes with the process.
            options = {**options, "max_calls": 1}
        self._options = plain_options(options)
        self._find_client = find_client
        generates = inspect.isgeneratorfunction(function)
        count = options.get("num_returns")
        check_mode(generates, count, options.get("_generator_backpressure_num_objects"))
        self._mode = stream_mode(generates, count)
        if self._mode in (StreamMode.ITEMS, StreamMode.DYNAMIC):
            # (An attribute of the object hides the method, which plain functions go on calling
            # without asking what they are.)
            self.__dict__["remote"] = self._remote_stream
        self._name = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__
        self._signature: inspect.Signature | None = None
        #: Shared with the objects that `.options()` makes: the client that knows the function,
        #: and what keeps it known there.
        self._export: list[Any] = [None, None]
        #: The task class of the current client, for calls of tasks in this placement group.
        self._prepared: tuple[Client, TaskClass, PlacementGroupId] | None = None
        self._simple = _takes_anything_positional(function)

    # The face that type checkers see is `RemoteSignature`'s; to them it cannot be called at all.
    if not TYPE_CHECKING:

        def __call__(self, /, *args, **kwargs):
            """Refused: a remote function is called with `.remote()`."""
            raise TypeError(
                "Remote functions cannot be called directly. Instead of running "
                f"'{self._name}()', try '{self._name}.remote()'."
            )

        def options(self, /, **options):
            check_per_yield(self._options, options)
            check_options(options, from_options=True)
            # `max_calls` is the definition's, also where GPUs come in here only.
            merged = {"max_calls": 0, **self._options, **options}
            made = RemoteFunction(self._function, merged, self._find_client)
            made._export = self._export
            return OptionedFunction(made, options)

        def remote(self, /, *args, **kwargs):
            client = self._find_client()
            prepared = self._prepared
            if prepared is None or prepared[0] is not client or prepared[2] != client.captured:
                prepared = self._prepare(client)
            if kwargs or len(args) not in self._simple:
                self._bind(args, kwargs)
            refs = client.submit(prepared[1], args, kwargs)
            if len(refs) == 1:
                return refs[0]
            return refs or None

    def _remote_stream(self, /, *args: Any, **kwargs: Any) -> Any:
        """`remote` of a generator's function."""
        client = self._find_client()
        prepared = self._prepared
        if prepared is None or prepared[0] is not client or prepared[2] != client.captured:
            prepared = self._prepare(client)
        if kwargs or len(args) not in self._simple:
            self._bind(args, kwargs)
        return submit_stream(client, prepared[1], args, kwargs)

    def __repr__(self) -> str:
        return f"RemoteFunction({self._name})"

    def __reduce__(self) -> Any:
        return _rebuild, (self._function, self._options)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that the function could not take."""
        if self._signature is None:
            self._signature = inspect.signature(self._function)
        self._signature.bind(*args, **kwargs)

    def _prepare(self, client: Client) -> tuple[Client, TaskClass, PlacementGroupId]:
        """Make the function and its class known to the node."""
        if self._export[0] is not client:
            self._export[1] = client.definitions.define_function(self._function, self._name)
            self._export[0] = client
        task_class = self._make_class(self._export[1].function_id, client)
        client.definitions.define_class(task_class)
        self._prepared = (client, task_class, client.captured)
        return self._prepared

    def _make_class(self, function_id: FunctionId, client: Client) -> TaskClass:
        options = self._options
        demand = demand_of(options)
        name = options.get("name") or self._function.__qualname__.rpartition(".")[2]
        count = options.get("num_returns")
        retries = options.get("max_retries")
        made = TaskClass(
            class_id=ClassId(b""),
            function_id=function_id,
            name=name,
            kind=CallKind.CALL,
            delivery=Delivery.OBJECTS,
            num_returns=int(count) if isinstance(count, int) else 1,
            resources=demand,
            group_id=client.tasks_group,
            max_retries=client.config.max_retries if retries is None else int(retries),
            retry_exceptions=retry_spec(options.get("retry_exceptions", False)),
            max_calls=int(options.get("max_calls") or 0),
            placement=make_placement(options, demand, name, client.captured),
            is_listed=options.get("enable_task_events", True),
            stream=self._mode,
            backpressure=max(0, options.get("_generator_backpressure_num_objects") or 0),
            per_yield=int(options.get("_num_objects_per_yield") or 1),
        )
        return identified(made)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """A call of the function in a lazy graph; nothing runs before the graph's `execute`.

        Returns
        -------
        FunctionNode
            May be an argument of other calls that are bound; see `poolray.dag`.

        Raises
        ------
        TypeError
            The arguments do not fit the function's parameters.
        """
        return binding.find_binder().bind_function(self, args, kwargs, {})


@final
class OptionedFunction(RemoteCall[P, F_co, Given_co]):
    """A remote function with other options: has `.remote` and `.bind` only."""

    def __init__(self, function: RemoteFunction[P, Any], options: Mapping[str, Any]) -> None:
        self._function = function
        self._options = options

    if not TYPE_CHECKING:

        def remote(self, /, *args, **kwargs):
            return self._function.remote(*args, **kwargs)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """A call of the function in a lazy graph; see `RemoteFunction.bind`."""
        return binding.find_binder().bind_function(self._function, args, kwargs, self._options)


def _takes_anything_positional(function: Callable[..., Any]) -> range:
    """Numbers of positional arguments that certainly fit, so that the slow check is skipped."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return range(0)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return range(0)
    least = sum(p.default is p.empty for p in positional)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return range(least, 1 << 30)
    return range(least, len(positional) + 1)


def demand_of(options: Mapping[str, Any]) -> dict[str, int]:
    """The resources that options ask for, in units of 1/10,000."""
    cpus = options.get("num_cpus")
    demand = {"CPU": UNIT if cpus is None else to_fixed("CPU", cpus)}
    gpus = options.get("num_gpus")
    if gpus:
        _check_devices("GPU", gpus)
        demand["GPU"] = to_fixed("GPU", gpus)
    if options.get("memory"):
        demand["memory"] = to_fixed("memory", int(options["memory"]))
    for name, amount in (options.get("resources") or {}).items():
        if name in _NOT_CUSTOM:
            raise ValueError(
                f"The resources dictionary must not contain the key '{name}', which is reserved."
            )
        _check_devices(name, amount)
        demand[name] = to_fixed(name, amount)
    if options.get("accelerator_type") is not None:
        # Next to nothing of what a node with such devices has once.
        demand[f"accelerator_type:{options['accelerator_type']}"] = UNIT // 1000
    return {name: amount for name, amount in demand.items() if amount}


def _check_devices(name: str, amount: float) -> None:
    if amount != int(amount) or name == "TPU":
        from poolray.scheduling.accelerators import check_devices  # few programs need it

        check_devices(name, amount)


def retry_spec(value: bool | list[Any] | tuple[Any, ...]) -> bytes:
    """`retry_exceptions` as a task class has it."""
    if value is True:
        return b"*"
    if not value:
        return b""
    try:
        return pickle.dumps(tuple(value))
    except Exception:
        import cloudpickle

        return bytes(cloudpickle.dumps(tuple(value)))


def _rebuild(function: Callable[..., Any], options: dict[str, Any]) -> RemoteFunction[Any, Any]:
    from poolray.session import find_client

    return RemoteFunction(function, options, find_client)


__all__ = ["OptionedFunction", "RemoteFunction", "check_options"]
