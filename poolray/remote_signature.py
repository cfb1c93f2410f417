"""What type checkers know of a remote function: its arguments, its options, what a call gives.

What: the typed face of `RemoteFunction`, and of what its `.options(...)` gives.
Who calls: nobody at run time; `RemoteFunction` and `OptionedFunction` bring their own methods.
May touch: nothing.
Invariants: what a checker accepts, the run time accepts, but for classes in the place of functions.
Not the reverse: Python's types have no words for a ref that is passed by keyword or after the
eighth argument, nor for what a generic function makes of a ref to its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    TypedDict,
    TypeVar,
    overload,
)

from poolray.generators import ObjectRefGenerator
from poolray.objects.object_ref import ObjectRef
from poolray.remote_strategies import SchedulingStrategyT

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
#: What a call gives: a ref, a list of refs, or None.
Given = TypeVar("Given")
Given_co = TypeVar("Given_co", covariant=True)
#: `Callable[P, R]`. Checkers match the first parameters of a callable, not those of a `ParamSpec`.
F_co = TypeVar("F_co", covariant=True)
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")
T7 = TypeVar("T7")
T8 = TypeVar("T8")

__all__ = [
    "ActorDefinitionOptions",
    "ActorOptions",
    "DefinitionOptions",
    "RemoteCall",
    "RemoteSignature",
    "TaskOptions",
]


class TaskOptions(TypedDict, total=False):
    """Options of a task beside `num_returns`; see `RemoteSignature.options`."""

    name: str | None
    num_cpus: float | None
    num_gpus: float | None
    memory: float | None
    resources: dict[str, float] | None
    max_retries: int | None
    retry_exceptions: bool | list[type[BaseException]] | tuple[type[BaseException], ...]
    accelerator_type: str | None
    scheduling_strategy: SchedulingStrategyT
    label_selector: dict[str, str] | None
    fallback_strategy: list[dict[str, Any]] | None
    enable_task_events: bool
    _generator_backpressure_num_objects: int | None


class ActorOptions(TypedDict, total=False):
    """Options of an actor; see `poolray.actor.ActorClass.options`."""

    name: str | None
    num_cpus: float | None
    num_gpus: float | None
    memory: float | None
    resources: dict[str, float] | None
    scheduling_strategy: str | None
    enable_task_events: bool
    namespace: str | None
    get_if_exists: bool
    lifetime: Literal["detached", "non_detached"] | None
    max_restarts: int | None
    max_task_retries: int | None
    max_pending_calls: int | None
    max_concurrency: int | None
    allow_out_of_order_execution: bool | None
    _actor_generator_backpressure_num_objects: int | None


class ActorDefinitionOptions(ActorOptions, total=False):
    """Options that `@remote(...)` takes on classes."""

    concurrency_groups: dict[str, int] | None


class DefinitionOptions(TaskOptions, total=False):
    """Options that `@remote(...)` takes on functions beside `num_returns`."""

    max_calls: int | None


class RemoteCall(Generic[P, F_co, Given_co]):
    """How a remote function is called: with values, or with refs in the place of values."""

    # The first form keeps names, defaults and generics. Of the n-th other form the first n
    # arguments may be refs, and the rest is as the function has it.

    @overload
    def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> Given_co: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, T4, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, T4, T5, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, T4, T5, T6, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, T4, T5, T6, T7, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        a7: T7 | ObjectRef[T7],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    @overload
    def remote(
        self: RemoteCall[..., Callable[Concatenate[T1, T2, T3, T4, T5, T6, T7, T8, Q], Any], Given],
        a1: T1 | ObjectRef[T1],
        a2: T2 | ObjectRef[T2],
        a3: T3 | ObjectRef[T3],
        a4: T4 | ObjectRef[T4],
        a5: T5 | ObjectRef[T5],
        a6: T6 | ObjectRef[T6],
        a7: T7 | ObjectRef[T7],
        a8: T8 | ObjectRef[T8],
        /,
        *args: Q.args,
        **kwargs: Q.kwargs,
    ) -> Given: ...

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the function in a worker.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the function. A ref among them is replaced by its value once that is
            there; a ref inside of another object stays a ref.

        Returns
        -------
        ObjectRef
            Of the return value; with `num_returns=n` a list of n refs, with 0 None.

        Raises
        ------
        TypeError
            The arguments do not fit the function's parameters, or cannot be serialized.

        Notes
        -----
        Does not block.

        Examples
        --------
        >>> import poolray
        >>> @poolray.remote
        ... def add(a: int, b: int) -> int:
        ...     return a + b
        >>> poolray.get(add.remote(add.remote(1, 2), b=4))
        7
        """
        raise NotImplementedError


class RemoteSignature(RemoteCall[P, F_co, Given_co], Generic[P, R, F_co, Given_co]):
    """A remote function: what can be called, and called with other options."""

    # A number that is only known to be an int may be 0 or 1 as well, hence the overlaps; whoever
    # computes `num_returns` gets the list that it almost always is.

    @overload
    def options(  # type: ignore[overload-overlap]
        self, *, num_returns: Literal[0], **options: Unpack[TaskOptions]
    ) -> RemoteCall[P, F_co, None]: ...

    @overload
    def options(  # type: ignore[overload-overlap]
        self, *, num_returns: Literal[1] | None, **options: Unpack[TaskOptions]
    ) -> RemoteCall[P, F_co, ObjectRef[R]]: ...

    @overload
    def options(
        self, *, num_returns: int, **options: Unpack[TaskOptions]
    ) -> RemoteCall[P, F_co, list[ObjectRef[Any]]]: ...

    @overload
    def options(
        self, *, num_returns: Literal["streaming"], **options: Unpack[TaskOptions]
    ) -> RemoteCall[P, F_co, ObjectRefGenerator[Any]]: ...

    @overload
    def options(
        self, *, num_returns: Literal["dynamic"], **options: Unpack[TaskOptions]
    ) -> RemoteCall[P, F_co, ObjectRef[Any]]: ...

    @overload
    def options(self, **options: Unpack[TaskOptions]) -> RemoteCall[P, F_co, Given_co]: ...

    def options(self, **options: Any) -> Any:
        """The same function with other options.

        Parameters
        ----------
        num_returns : int or str
            Return values; `.remote()` gives a list of so many refs (0: None). Of a generator by
            default "streaming": `.remote()` gives an `ObjectRefGenerator`; or "dynamic".
        _generator_backpressure_num_objects : int
            Items of a generator that may wait to be taken; then it pauses. -1: any number.
        num_cpus : float
            CPUs that a running call takes, to four decimals.
        memory : float, bytes
            Memory that it reserves.
        resources : dict of str to float
            Custom resources that it takes.
        max_retries : int
            Further attempts when the worker dies; -1 for ever.
        retry_exceptions : bool or list of exception classes
            Whether, or for which exceptions, the function's own errors are retried too.
        name : str
            Name of the task in messages.
        scheduling_strategy : str
            "DEFAULT" or "SPREAD"; on one machine they are the same.

        Raises
        ------
        ValueError, TypeError
            An unknown option or a bad value, at once.

        Examples
        --------
        >>> import poolray
        >>> @poolray.remote
        ... def divide(a: int, b: int) -> tuple[int, int]:
        ...     return divmod(a, b)
        >>> quotient, rest = divide.options(num_returns=2).remote(17, 5)
        >>> poolray.get([quotient, rest])
        [3, 2]
        """
        raise NotImplementedError
