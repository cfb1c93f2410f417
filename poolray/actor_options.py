"""Options of actors and of their methods: which there are, and what is wrong with a value.

What: checks, and `method`, which attaches options to a method.
Who calls: `actor.py`; users, `poolray.method`.
May touch: nothing.
Invariants: an option is carried out or refused, never ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from poolray.exceptions import NotSupportedError
from poolray.generators import check_generates
from poolray.plain_values import plain_options
from poolray.remote_function import check_options

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["check_actor_options", "method"]

#: Options that actors share with tasks; they are checked as those of tasks are.
_COMMON = (
    "label_selector",
    "fallback_strategy",
    "accelerator_type",
    "memory",
    "name",
    "num_cpus",
    "num_gpus",
    "object_store_memory",
    "placement_group",
    "placement_group_bundle_index",
    "placement_group_capture_child_tasks",
    "resources",
    "runtime_env",
    "scheduling_strategy",
    "enable_task_events",
    "_labels",
)
#: Option that only actors have -> types that it takes.
ACTOR_ONLY: dict[str, tuple[type, ...]] = {
    "concurrency_groups": (list, dict, type(None)),
    "enable_tensor_transport": (bool, type(None)),
    "lifetime": (str, type(None)),
    "max_concurrency": (int, type(None)),
    "max_restarts": (int, type(None)),
    "max_task_retries": (int, type(None)),
    "max_pending_calls": (int, type(None)),
    "namespace": (str, type(None)),
    "get_if_exists": (bool,),
    "allow_out_of_order_execution": (bool, type(None)),
    "_actor_generator_backpressure_num_objects": (int, type(None)),
}
#: Options that change what an actor does and that this version does not carry out yet.
_NOT_YET = ("enable_tensor_transport",)
_METHOD_OPTIONS = (
    "num_returns",
    "concurrency_group",
    "max_task_retries",
    "retry_exceptions",
    "_generator_backpressure_num_objects",
    "_num_objects_per_yield",
    "enable_task_events",
    "tensor_transport",
)
#: The same for one call; it may have a name.
CALL_OPTIONS = ("name", *_METHOD_OPTIONS)
_METHODS_NOT_YET = ("tensor_transport",)
#: Where `method` leaves its options.
OPTIONS_ATTRIBUTE = "__ray_method_options__"


def check_actor_options(options: Mapping[str, Any]) -> None:
    """Check an actor's options as they are given.

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
        if name in _COMMON:
            if name == "object_store_memory":
                if value is not None:
                    raise NotSupportedError(
                        "object_store_memory is not supported for actors: it would reserve "
                        "nothing. The store spills to disk when it is full."
                    )
            else:
                check_options({name: value})
            continue
        types = ACTOR_ONLY.get(name)
        if types is None:
            raise ValueError(
                f"Invalid option keyword {name} for actors. "
                f"Valid ones are {[*_COMMON, *ACTOR_ONLY]}."
            )
        if not isinstance(value, types):
            raise TypeError(
                f"The type of keyword '{name}' must be {types}, but received type {type(value)}"
            )
        if value is not None:
            _check_value(name, value)
        if name in _NOT_YET and value:
            raise NotSupportedError(
                f"The option {name}={value!r} is not supported by this version of poolray."
            )


def _check_value(name: str, value: Any) -> None:
    if name == "lifetime" and value not in ("detached", "non_detached"):
        raise ValueError(
            "actor `lifetime` argument must be one of 'detached', 'non_detached' and 'None'."
        )
    if name in ("max_restarts", "max_task_retries", "max_pending_calls") and value < -1:
        raise ValueError(
            f"The keyword '{name}' only accepts None, 0, -1 or a positive integer, where -1 "
            "represents infinity."
        )
    if name == "concurrency_groups":
        _check_groups(value)
    if name == "_actor_generator_backpressure_num_objects" and value < 1 and value != -1:
        raise ValueError(
            "_actor_generator_backpressure_num_objects must be > 0 to cap the actor's total "
            f"unconsumed generator objects, or -1 to disable. Got {value}."
        )
    if name == "max_concurrency" and value < 0:
        raise ValueError(
            "The keyword 'max_concurrency' only accepts None, 0 or a positive integer."
        )


def _check_groups(groups: Any) -> None:
    """Names of groups, and calls that run at once in each; an empty list is no groups."""
    if not isinstance(groups, dict):
        if groups:
            raise TypeError(
                "concurrency_groups must be a dictionary of the groups' names and numbers of calls "
                f"that run at once in each, not {groups!r}"
            )
        return
    for name, count in groups.items():
        if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(
                f"concurrency_groups maps strings to integers, not {name!r} to {count!r}"
            )
        if not name or count < 1:
            raise ValueError(
                f"A concurrency group has a name and runs at least 1 call, not {name!r}: {count}"
            )


def check_names(options: Mapping[str, Any]) -> None:
    """Names that no actor can have; found when one is made, as in the reference."""
    if options.get("name") == "":
        raise ValueError("Actor name cannot be an empty string.")
    if options.get("namespace") == "":
        raise ValueError('"" is not a valid namespace. Pass None to not specify a namespace.')


def check_together(options: Mapping[str, Any]) -> None:
    """What is only known to be wrong beside the other options."""
    if options.get("get_if_exists") and not options.get("name"):
        raise ValueError("The actor name must be specified to use `get_if_exists`.")


@overload
def method(function: F, /) -> F: ...


@overload
def method(
    *,
    num_returns: int | str | None = None,
    concurrency_group: str | None = None,
    max_task_retries: int | None = None,
    retry_exceptions: bool | list[type[BaseException]] | None = None,
    enable_task_events: bool = True,
    _generator_backpressure_num_objects: int | None = None,
    _num_objects_per_yield: int | None = None,
) -> Callable[[F], F]: ...


def method(*args: Any, **options: Any) -> Any:
    """Options of an actor's method: `@poolray.method(num_returns=2)`.

    Parameters
    ----------
    num_returns : int or str
        Return values; `.remote()` gives a list of so many refs (0: None). Of a generator by default
        "streaming": `.remote()` gives an `ObjectRefGenerator`; or "dynamic".
    concurrency_group : str
        The group of the actor's `concurrency_groups` in which its calls run.
    max_task_retries : int
        Further attempts after the actor's process has died; default: the actor's own.
    retry_exceptions : bool or list of exception classes
        Whether, or for which exceptions, what the method raises is tried again too.
    _generator_backpressure_num_objects : int
        Items of a generator that may wait to be taken; then it pauses. -1: any number.
    _num_objects_per_yield : int
        Items in the tuple or list that each `yield` of a generator gives.

    Raises
    ------
    ValueError, TypeError
        A bad value; `num_returns="streaming"` or "dynamic" where nothing is yielded.
    AssertionError
        An unknown option, as in the reference.
    NotSupportedError
        An option that this version does not carry out.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Divider:
    ...     @poolray.method(num_returns=2)
    ...     def divide(self, a: int, b: int) -> tuple[int, int]:
    ...         return divmod(a, b)
    >>> divider = Divider.remote()
    >>> poolray.get(divider.divide.remote(17, 5))
    [3, 2]
    """
    if len(args) == 1 and not options and callable(args[0]):
        return args[0]
    for name in options:
        assert name in _METHOD_OPTIONS, (
            f"Unexpected keyword argument to @ray.method: '{name}'. The supported keyword "
            f"arguments are {list(_METHOD_OPTIONS)}"
        )
    check_method_options(options)

    def annotate(function: Any) -> Any:
        check_generates(generates(function), options.get("num_returns"))
        setattr(function, OPTIONS_ATTRIBUTE, plain_options(options))
        return function

    return annotate


def generates(function: Any) -> bool:
    """Whether calls of a method yield."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def check_method_options(options: Mapping[str, Any]) -> None:
    for name in _METHODS_NOT_YET:
        if options.get(name) is not None:
            raise NotSupportedError(
                f"The option {name}={options[name]!r} of methods is not supported by this version "
                "of poolray."
            )
    group = options.get("concurrency_group")
    if group is not None and not isinstance(group, str):
        raise TypeError(f"concurrency_group is the name of a group, not {group!r}")
    same = (
        "num_returns",
        "name",
        "_generator_backpressure_num_objects",
        "_num_objects_per_yield",
    )
    known = {name: options[name] for name in same if name in options}
    if options.get("retry_exceptions") is not None:
        known["retry_exceptions"] = options["retry_exceptions"]
    check_options(known)
    if options.get("max_task_retries") is not None:
        check_actor_options({"max_task_retries": options["max_task_retries"]})
