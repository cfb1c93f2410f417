"""Actors: classes whose instances live in workers of their own.

What: what `@remote` makes of a class, handles, methods, and what finds or ends actors.
Who calls: users, through `poolray.remote`, `poolray.get_actor`, `poolray.kill`, `poolray.actor`.
May touch: nothing; all goes through the process's client.
Invariants: options and arguments are checked where they are given; a handle holds its actor, so
that one without handles ends; handles compare by the actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, final

from poolray import actor_calls, binding
from poolray.actor_methods import (
    NO_OPTIONS,
    ActorFace,
    CallOptions,
    Description,
    MethodFace,
    constructor_of,
    encode_description,
    face_of,
    methods_of,
    unknown_group,
)
from poolray.actor_options import (
    CALL_OPTIONS,
    check_actor_options,
    check_method_options,
    check_names,
    check_together,
    method,
)
from poolray.client import Client
from poolray.exceptions import (
    ActorAlreadyExistsError,
    PendingCallsLimitExceeded,
)
from poolray.generators import check_generates, submit_stream
from poolray.ids import ActorId, ClassId, handle_of
from poolray.local import process_state
from poolray.local.actor_worker import ActorExit, has_coroutines
from poolray.objects.object_ref import ObjectRef
from poolray.objects.serialization import note_reference
from poolray.plain_values import plain_options, plain_string
from poolray.protocol.actors import ActorSetup
from poolray.protocol.streams import StreamMode
from poolray.protocol.values import CallKind, TaskClass, identified
from poolray.remote_function import demand_of, retry_spec
from poolray.remote_placement import make_placement
from poolray.scheduling.resources import UNIT
from poolray.session import find_client, namespace_of_driver

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from poolray.remote_signature import ActorOptions

C = TypeVar("C")

_ASYNC_CONCURRENCY = 1000
#: Options of actors that keep a CPU unless `num_cpus` says otherwise.
_TAKES_A_CPU = ("num_gpus", "resources", "accelerator_type")


# ---- handles -------------------------------------------------------------------------------------


@final
class ActorMethod:
    """A method of an actor: call it with `.remote(...)`.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Counter:
    ...     def add(self, n: int) -> int:
    ...         return n + 1
    >>> counter = Counter.remote()
    >>> poolray.get(counter.add.remote(1))
    2
    """

    __slots__ = ("_face", "_handle", "_options")

    def __init__(
        self, handle: ActorHandle[Any], face: MethodFace, options: CallOptions = NO_OPTIONS
    ) -> None:
        self._handle = handle
        self._face = face
        self._options = options

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method in the actor.

        Parameters
        ----------
        *args, **kwargs
            Arguments. A ref among them is replaced by its value once that is there; a ref inside
            of another object stays a ref.

        Returns
        -------
        ObjectRef
            Of the return value; with `num_returns=n` a list of n refs, with 0 None. Of a generator
            an `ObjectRefGenerator`.

        Raises
        ------
        TypeError
            The arguments do not fit the method's parameters, or cannot be serialized.
        PendingCallsLimitExceeded
            `max_pending_calls` calls of this process wait already.

        Notes
        -----
        Does not block. Calls of one process begin in the order in which they were made, unless
        the actor runs several at once. What goes wrong with the actor, `get` raises.
        """
        handle, face = self._handle, self._face
        actor = handle._face
        client = find_client()
        options = self._options
        # (Hashing the options costs more than all the rest of this look-up.)
        key = face.method.name if options is NO_OPTIONS else (face.method.name, options)
        task_class = actor.prepared.get(key)
        if task_class is None or actor.client is not client:
            task_class = actor.prepare(client, face.method, options, key)
        if kwargs or len(args) not in face.positional:
            face.check(args, kwargs)
        if actor.description.max_pending_calls > 0:
            self._check_pending(client, actor.description)
        if task_class.stream and task_class.stream != StreamMode.RETURNS:
            return submit_stream(client, task_class, args, kwargs, handle._actor_id)
        refs = client.submit(task_class, args, kwargs, handle._actor_id)
        if len(refs) == 1:
            return refs[0]
        return refs or None

    def _check_pending(self, client: Client, description: Description) -> None:
        limit = description.max_pending_calls
        if actor_calls.count_calls(client, self._handle._actor_id) >= limit:
            raise PendingCallsLimitExceeded(
                f"The task {self._face.method.name} could not be submitted to {self._handle!r} "
                f"because more than {limit} tasks are queued on the actor. This limit can be "
                "adjusted with the `max_pending_calls` actor option."
            )

    def options(self, **options: Any) -> ActorMethod:
        """The same method with other options: `num_returns`, `name`, `concurrency_group`,
        `max_task_retries`, `retry_exceptions`.

        Raises
        ------
        TypeError, ValueError
            An unknown option, or a bad value.
        NotSupportedError
            An option that this version does not carry out.
        """
        for name in options:
            if name not in CALL_OPTIONS:
                raise TypeError(
                    f"Invalid option {name} for methods of actors. Valid ones are "
                    f"{list(CALL_OPTIONS)}."
                )
        if "_num_objects_per_yield" in options:
            raise ValueError(
                "_num_objects_per_yield cannot be overridden per actor method call. Use "
                "@ray.method(_num_objects_per_yield=...) instead."
            )
        check_method_options(options)
        check_generates(self._face.method.generates, options.get("num_returns"))
        options = plain_options(options)
        made = CallOptions(
            name=options.get("name") or "",
            num_returns=options.get("num_returns"),
            max_retries=options.get("max_task_retries"),
            retry_exceptions=retry_spec(options.get("retry_exceptions") or False),
            concurrency_group=options.get("concurrency_group") or "",
            backpressure=options.get("_generator_backpressure_num_objects"),
        )
        return ActorMethod(self._handle, self._face, made)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """A call of the method in a lazy graph; nothing runs before the graph's `execute`.

        Returns
        -------
        ClassMethodNode
            With `num_returns` over 1 a tuple, with a node for each value.

        Raises
        ------
        TypeError
            The arguments do not fit the method's parameters.
        """
        return binding.find_binder().bind_method(self, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a method is called with `.remote()`."""
        name = self._face.method.name
        raise TypeError(
            "Actor methods cannot be called directly. Instead of running "
            f"'object.{name}()', try 'object.{name}.remote()'."
        )

    def __repr__(self) -> str:
        return f"ActorMethod({self._handle!r}, {self._face.method.name})"


@final
class ActorHandle(Generic[C]):
    """An actor as others see it: its methods, each with `.remote(...)`.

    Made by `Class.remote(...)` and `get_actor`. Pass it to tasks and actors, return it, store it:
    the actor ends when the last handle is gone, after the calls already made. Handles compare and
    hash by the actor.
    """

    __slots__ = ("__weakref__", "_actor_id", "_face", "_ref")

    _actor_id: ActorId
    _face: ActorFace
    _ref: ObjectRef[Any]

    def __new__(cls, *_: Any) -> ActorHandle[C]:
        raise TypeError(
            "ActorHandle cannot be constructed: handles come from Class.remote() and get_actor()"
        )

    def __getattr__(self, name: str) -> ActorMethod:
        face = self._face.methods.get(name)
        if face is None:
            raise AttributeError(f"'ActorHandle' object has no attribute '{name}'")
        return ActorMethod(self, face)

    @property
    def _ray_actor_id(self) -> ActorId:
        return self._actor_id

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self._face.methods]

    def __repr__(self) -> str:
        return f"Actor({self._face.description.class_name}, {self._actor_id.hex()})"

    def __hash__(self) -> int:
        return hash(self._actor_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and self._actor_id == other._actor_id

    def __copy__(self) -> ActorHandle[C]:
        return self

    def __deepcopy__(self, memo: object) -> ActorHandle[C]:
        return self

    def __reduce__(self) -> Any:
        if not note_reference(self._ref._id):
            self._ref._client.pin_forever(self._ref)
        return _rebuild_handle, (self._actor_id, self._face.data, self._ref._id)


def _make_handle(actor_id: ActorId, description: bytes, ref: ObjectRef[Any]) -> ActorHandle[Any]:
    handle: ActorHandle[Any] = object.__new__(ActorHandle)
    handle._actor_id = actor_id
    handle._face = face_of(description)
    handle._ref = ref
    return handle


def _rebuild_handle(actor_id: ActorId, description: bytes, object_id: Any) -> ActorHandle[Any]:
    return _make_handle(actor_id, description, find_client().adopt(object_id))


# ---- classes -------------------------------------------------------------------------------------


@final
class ActorClass(Generic[C]):
    """A class whose instances live in workers. Made by `poolray.remote`.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Counter:
    ...     def __init__(self, start: int = 0) -> None:
    ...         self.value = start
    ...     def add(self, n: int = 1) -> int:
    ...         self.value += n
    ...         return self.value
    >>> counter = Counter.remote(10)
    >>> poolray.get([counter.add.remote() for _ in range(3)])
    [11, 12, 13]
    """

    def __init__(self, actor_class: type[C], options: Mapping[str, Any], *more: Any) -> None:
        if more or not isinstance(actor_class, type):  # a class statement with one of us for a base
            raise TypeError(
                "An actor class cannot be inherited from: inherit from the plain class, and make "
                "that remote with poolray.remote(...)."
            )
        self._class = actor_class
        self._options = plain_options(options)
        self.__doc__ = actor_class.__doc__
        self.__name__ = actor_class.__name__
        self.__qualname__ = actor_class.__qualname__
        self.__module__ = actor_class.__module__
        #: Shared with what `.options()` makes: the client that knows the class, and what keeps it
        #: known there.
        self._export: list[Any] = [None, None]
        self._methods = methods_of(actor_class)
        self._is_async = has_coroutines(actor_class)
        self._constructor = MethodFace(constructor_of(actor_class))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._class, name)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: an actor is made with `.remote()`."""
        name = self._class.__name__
        raise TypeError(
            f"Actors cannot be instantiated directly. Instead of '{name}()', use '{name}.remote()'."
        )

    def __repr__(self) -> str:
        return f"ActorClass({self._class.__name__})"

    def __reduce__(self) -> Any:
        return _rebuild_class, (self._class, dict(self._options))

    def options(self, **options: Unpack[ActorOptions]) -> OptionedClass[C]:
        """The same class with other options.

        Parameters
        ----------
        num_cpus : float, default 0, with num_gpus, resources or accelerator_type 1
            CPUs that the actor keeps for its life.
        num_gpus : float
            The same for GPUs: its devices are its own.
        memory, resources
            The same for memory in bytes, and for custom resources.
        name : str
            A name by which `get_actor` finds it, once in a namespace.
        namespace : str, default the job's
            Where the name holds.
        get_if_exists : bool
            Give a handle to the actor that has the name, if there is one.
        lifetime : str
            "detached": it lives without handles, until it is killed or the runtime ends.
        max_restarts : int, default 0
            How often it is made again after its process has died; -1 for ever.
        max_task_retries : int, default 0
            How often a call is tried again after that; -1 for ever.
        max_pending_calls : int
            Calls of one process that may wait; one more raises `PendingCallsLimitExceeded`.
        max_concurrency : int, default 1, with coroutine methods 1000
            Calls that run at once, on threads or in the actor's event loop.
        allow_out_of_order_execution : bool
            A call that waits for an argument does not hold back later ones.

        Raises
        ------
        ValueError, TypeError
            An unknown option or a bad value, at once.

        Examples
        --------
        >>> import poolray
        >>> @poolray.remote
        ... class Store:
        ...     def ping(self) -> str:
        ...         return "here"
        >>> store = Store.options(name="store", max_restarts=1).remote()
        >>> poolray.get(poolray.get_actor("store").ping.remote())
        'here'
        """
        if "concurrency_groups" in options:
            raise ValueError("Setting 'concurrency_groups' is not supported in '.options()'.")
        check_actor_options(options)
        merged = {**self._options, **options}
        check_together(merged)
        made: ActorClass[C] = ActorClass(self._class, merged)
        made._export = self._export
        return OptionedClass(made, options)

    def remote(self, /, *args: Any, **kwargs: Any) -> ActorHandle[C]:
        """Make an actor.

        Parameters
        ----------
        *args, **kwargs
            Arguments of the constructor; refs as in calls of tasks.

        Returns
        -------
        ActorHandle
            At once, while the actor is being made. What its constructor raises shows in its first
            call, as `ActorDiedError`.

        Raises
        ------
        TypeError
            The arguments do not fit the constructor, or cannot be serialized.
        ActorAlreadyExistsError
            An actor has the name.
        """
        options = self._options
        check_names(options)
        if kwargs or len(args) not in self._constructor.positional:
            self._constructor.check(args, kwargs)
        client = find_client()
        name, namespace = options.get("name") or "", _namespace(options.get("namespace"))
        pending_max = options.get("max_pending_calls")
        groups: dict[str, int] = dict(options.get("concurrency_groups") or {})
        for each in self._methods:
            if each.concurrency_group and each.concurrency_group not in groups:
                raise ValueError(unknown_group(self.__name__, each.name, each.concurrency_group))
        description = Description(
            class_name=self._class.__name__,
            methods=self._methods,
            max_task_retries=int(options.get("max_task_retries") or 0),
            max_pending_calls=-1 if pending_max is None else int(pending_max),
            groups=list(groups),
            backpressure=max(0, options.get("_actor_generator_backpressure_num_objects") or 0),
        )
        concurrency = int(options.get("max_concurrency") or 0) or (
            _ASYNC_CONCURRENCY if self._is_async else 1
        )
        setup = ActorSetup(
            actor_id=ActorId(b""),
            class_name=self._class.__name__,
            description=encode_description(description),
            name=name,
            namespace=namespace,
            concurrency=concurrency,
            groups=groups,
        )
        is_serial = not self._is_async and concurrency == 1 and not groups
        made = actor_calls.create_actor(
            client,
            self._prepare(client),
            args,
            kwargs,
            setup,
            get_if_exists=bool(options.get("get_if_exists")),
            detached=options.get("lifetime") == "detached",
            max_restarts=int(options.get("max_restarts") or 0),
            ordered=is_serial and not options.get("allow_out_of_order_execution"),
            counted=description.max_pending_calls > 0,
            serial=is_serial,
            groups=groups,
        )
        if made is None:
            raise ActorAlreadyExistsError(name=name, namespace=namespace)
        return _make_handle(*made)

    def _prepare(self, client: Client) -> TaskClass:
        """Make the class known to the node."""
        name = f"{self._class.__module__}.{self._class.__qualname__}"
        if self._export[0] is not client:
            self._export[1] = client.definitions.define_function(self._class, name)
            self._export[0] = client
        options = self._options
        cpus = options.get("num_cpus")
        keeps_cpus = cpus is not None or any(options.get(n) is not None for n in _TAKES_A_CPU)
        if cpus is None:  # as in the reference: one that keeps other resources keeps a CPU too
            cpus = 1 if keeps_cpus else 0
        demand = demand_of({**options, "num_cpus": cpus})
        placed_with = {} if keeps_cpus else {"CPU": UNIT}
        class_name = self._class.__name__
        task_class = identified(
            TaskClass(
                class_id=ClassId(b""),
                function_id=self._export[1].function_id,
                name=f"{class_name}.__init__",
                kind=CallKind.CREATE,
                num_returns=0,
                resources=demand,
                placed_with=placed_with,
                group_id=client.tasks_group,
                max_retries=int(options.get("max_restarts") or 0),
                placement=make_placement(
                    options, demand | placed_with, class_name, client.captured
                ),
                is_listed=options.get("enable_task_events", True),
                max_calls=1,  # a worker becomes one actor, and nothing waits behind the constructor
            )
        )
        client.definitions.define_class(task_class)
        return task_class

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """An actor in a lazy graph, whose methods have `bind` too; see `poolray.dag`.

        Returns
        -------
        ClassNode

        Raises
        ------
        TypeError
            The arguments do not fit the constructor.
        """
        return binding.find_binder().bind_class(self, args, kwargs, {})


@final
class OptionedClass(Generic[C]):
    """An actor class with other options: has `.remote` and `.bind` only."""

    def __init__(self, actor_class: ActorClass[C], options: Mapping[str, Any]) -> None:
        self._actor_class = actor_class
        self._options = options

    def remote(self, /, *args: Any, **kwargs: Any) -> ActorHandle[C]:
        """Make an actor; see `ActorClass.remote`."""
        return self._actor_class.remote(*args, **kwargs)

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        """An actor in a lazy graph; see `ActorClass.bind`."""
        return binding.find_binder().bind_class(self._actor_class, args, kwargs, self._options)


def make_actor_class(actor_class: type[C], options: Mapping[str, Any]) -> ActorClass[C]:
    """What `@remote` makes of a class.

    Raises
    ------
    ValueError, TypeError
        An option that actors do not have, or a bad value.
    """
    check_actor_options(options)
    check_together(options)
    return ActorClass(actor_class, options)


def _rebuild_class(actor_class: type[C], options: dict[str, Any]) -> ActorClass[C]:
    return ActorClass(actor_class, options)


# ---- finding and ending actors -------------------------------------------------------------------


def _namespace(given: str | None) -> str:
    """A namespace, by default that of the job."""
    if given is not None:
        return plain_string(given)
    find_client()
    setup = process_state.setup()
    return setup.namespace if setup is not None else namespace_of_driver()


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """A handle to the actor with a name.

    Parameters
    ----------
    name : str
        As given to `Class.options(name=...)`.
    namespace : str, default the job's
        Where the name holds.

    Raises
    ------
    ValueError
        There is no such actor (any more); an empty name.
    TypeError
        The name is no string.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Guest:
    ...     def greet(self) -> str:
    ...         return "hello"
    >>> guest = Guest.options(name="guest").remote()
    >>> poolray.get(poolray.get_actor("guest").greet.remote())
    'hello'
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of an actor must be a string, not {type(name).__name__}")
    if not name:
        raise ValueError("Please supply a non-empty value to get_actor")
    if namespace is not None and not isinstance(namespace, str):
        raise TypeError("namespace must be None or a string.")
    if namespace == "":
        raise ValueError('"" is not a valid namespace. Pass None to not specify a namespace.')
    found = actor_calls.look_up_actor(find_client(), _namespace(namespace), plain_string(name))
    if found is None:
        raise ValueError(
            f"Failed to look up actor with name '{name}'. This could because 1. You are trying to "
            "look up a named actor you didn't create. 2. The named actor died. 3. You did not use "
            "a namespace matching the namespace of the actor."
        )
    return _make_handle(*found)


def kill(actor: ActorHandle[Any], *, no_restart: bool = True) -> None:
    """End an actor by force, at once: the call that it runs and all that wait fail.

    Parameters
    ----------
    actor : ActorHandle
    no_restart : bool, default True
        False: it counts as a crash, after which it is restarted if `max_restarts` allows.

    Raises
    ------
    ValueError
        Something else than a handle was passed.

    Notes
    -----
    Does not block. Nothing happens to an actor that is dead.

    Examples
    --------
    >>> import poolray
    >>> @poolray.remote
    ... class Idle:
    ...     def ping(self) -> None: ...
    >>> idle = Idle.remote()
    >>> poolray.kill(idle)
    >>> try:
    ...     poolray.get(idle.ping.remote())
    ... except poolray.exceptions.ActorDiedError:
    ...     print("dead")
    dead
    """
    if not isinstance(actor, ActorHandle):
        raise ValueError(
            "ray.kill() only supported for actors. For tasks, try ray.cancel(). "
            f"Got: {type(actor)}."
        )
    actor_calls.kill_actor(find_client(), actor._actor_id, no_restart)


def exit_actor() -> NoReturn:
    """End the actor that runs this, politely and for good; its running call fails.

    Raises
    ------
    TypeError
        This is no actor.

    Notes
    -----
    Works by an exception that must not be caught. Exit handlers and `__ray_shutdown__` run.
    """
    if process_state.actor() is None:
        raise TypeError(
            "exit_actor API is called on a non-actor worker. Call this API inside an actor "
            "method if you'd like to exit the actor gracefully."
        )
    raise ActorExit(0)


def current_actor() -> ActorHandle[Any]:
    """A handle to the actor that runs this.

    Raises
    ------
    RuntimeError
        This is no actor.
    """
    setup = process_state.actor()
    if setup is None:
        raise RuntimeError("This method is only available in an actor.")
    return _make_handle(
        setup.actor_id, setup.description, find_client().adopt(handle_of(setup.actor_id))
    )


def named_actors(all_namespaces: bool) -> list[tuple[str, str]]:
    """Namespaces and names of actors that live."""
    return actor_calls.named_actors(find_client(), None if all_namespaces else _namespace(None))


__all__ = [
    "ActorClass",
    "ActorHandle",
    "ActorMethod",
    "OptionedClass",
    "exit_actor",
    "get_actor",
    "kill",
    "method",
]
