"""Methods of actors as their handles know them.

What: a description of a class's methods that travels with every handle, the checks of calls
against it, and the task classes under which the node knows the calls.
Who calls: `actor.py`.
May touch: nothing.
Invariants: a description says all that a call is checked against, so that a process that lacks the
class can call it; equal descriptions share one face in a process.
"""

from __future__ import annotations

import inspect
from typing import Any, cast, final

import msgspec

from poolray.actor_options import OPTIONS_ATTRIBUTE, generates
from poolray.client import Client
from poolray.generators import check_mode, stream_mode
from poolray.ids import ClassId, FunctionId, GroupId
from poolray.protocol.streams import StreamMode
from poolray.protocol.values import CallKind, TaskClass, identified
from poolray.remote_function import retry_spec


class _Parameter(msgspec.Struct, frozen=True, array_like=True):
    """A parameter of a method, as far as a call can be wrong about it."""

    name: str
    kind: int
    has_default: bool


class Method(msgspec.Struct, frozen=True, array_like=True):
    """A method as handles know it."""

    name: str
    #: Beside `self`; None: anything goes.
    parameters: list[_Parameter] | None = None
    num_returns: int = 1
    max_retries: int | None = None  #: None: the actor's own
    retry_exceptions: bytes = b""
    concurrency_group: str = ""
    generates: bool = False  #: it is a generator
    stream: int = 0  #: a `StreamMode`: what becomes of what it yields
    backpressure: int = 0  #: items that may wait to be taken; 0: any number
    per_yield: int = 1  #: items in what it yields at once


class Description(msgspec.Struct, frozen=True, array_like=True):
    """What handles to an actor need to know of it, in every process."""

    class_name: str
    methods: list[Method]
    max_task_retries: int = 0
    max_pending_calls: int = -1
    groups: list[str] = []
    backpressure: int = 0  #: items of all its generators that may wait to be taken; 0: any number


encode_description = msgspec.msgpack.Encoder().encode
_decode_description = msgspec.msgpack.Decoder(Description).decode

_ANYTHING = range(1 << 30)


@final
class MethodFace:
    """A method in this process: what its calls are checked against."""

    __slots__ = ("method", "positional", "signature")

    def __init__(self, method: Method) -> None:
        self.method = method
        self.signature: inspect.Signature | None = None
        #: Numbers of positional arguments that certainly fit, so that the slow check is skipped.
        self.positional = _positional_of(method.parameters)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that the method could not take."""
        if self.signature is None:
            self.signature = _signature_of(self.method.parameters)
        self.signature.bind(*args, **kwargs)


def _positional_of(parameters: list[_Parameter] | None) -> range:
    if parameters is None:
        return _ANYTHING
    kind = inspect.Parameter
    if any(p.kind == kind.KEYWORD_ONLY and not p.has_default for p in parameters):
        return range(0)
    places = [p for p in parameters if p.kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD)]
    least = sum(not p.has_default for p in places)
    if any(p.kind == kind.VAR_POSITIONAL for p in parameters):
        return range(least, 1 << 30)
    return range(least, len(places) + 1)


def _signature_of(parameters: list[_Parameter] | None) -> inspect.Signature:
    kind = inspect.Parameter
    if parameters is None:
        return inspect.Signature(
            [kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)]
        )
    kinds: list[Any] = list(cast("Any", type(kind.POSITIONAL_ONLY)))
    return inspect.Signature(
        [
            kind(p.name, kinds[p.kind], default=None if p.has_default else kind.empty)
            for p in parameters
        ]
    )


@final
class ActorFace:
    """A description in this process, with the task classes of methods that were called."""

    __slots__ = ("client", "data", "description", "methods", "prepared")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.description = _decode_description(data)
        self.methods = {m.name: MethodFace(m) for m in (*_BUILTINS, *self.description.methods)}
        #: The client that knows the classes.
        self.client: Client | None = None
        #: method, or (method, options) where a call has some -> class.
        self.prepared: dict[str | tuple[str, CallOptions], TaskClass] = {}

    def prepare(
        self,
        client: Client,
        method: Method,
        options: CallOptions,
        key: str | tuple[str, CallOptions],
    ) -> TaskClass:
        """The class of a method's calls, known to the node."""
        if self.client is not client:
            self.client = client
            self.prepared = {}
        made = self._make_class(method, options, client.tasks_group)
        client.definitions.define_class(made)
        self.prepared[key] = made
        return made

    def _make_class(self, method: Method, options: CallOptions, group_id: GroupId) -> TaskClass:
        retries = options.max_retries if options.max_retries is not None else method.max_retries
        count, mode = method.num_returns, StreamMode(method.stream)
        backpressure = method.backpressure if options.backpressure is None else options.backpressure
        if options.num_returns is not None:
            check_mode(method.generates, options.num_returns, options.backpressure)
            count = int(options.num_returns) if isinstance(options.num_returns, int) else 1
            mode = stream_mode(method.generates, options.num_returns)
        made = TaskClass(
            class_id=ClassId(b""),
            function_id=FunctionId(b""),
            name=options.name or f"{self.description.class_name}.{method.name}",
            kind=CallKind.METHOD,
            num_returns=count,
            group_id=group_id,
            max_retries=self.description.max_task_retries if retries is None else int(retries),
            retry_exceptions=options.retry_exceptions or method.retry_exceptions,
            method=method.name,
            concurrency_group=self._group_of(method, options),
            stream=mode,
            backpressure=max(0, backpressure),
            actor_backpressure=self.description.backpressure,
            per_yield=method.per_yield,
        )
        return identified(made)

    def _group_of(self, method: Method, options: CallOptions) -> str:
        group = options.concurrency_group or method.concurrency_group
        if group and group not in self.description.groups:
            raise ValueError(unknown_group(self.description.class_name, method.name, group))
        return group


class CallOptions(msgspec.Struct, frozen=True):
    """Options of one call; hashable."""

    name: str = ""
    num_returns: int | str | None = None
    max_retries: int | None = None
    retry_exceptions: bytes = b""
    concurrency_group: str = ""
    backpressure: int | None = None


NO_OPTIONS = CallOptions()

#: What every actor has.
_BUILTINS = tuple(
    Method(name=f"__{brand}_{name}__", parameters=parameters)
    for brand in ("ray", "poolray")
    for name, parameters in (("ready", []), ("terminate", []), ("call", None))
)

#: description -> its face in this process; the oldest go when there are many.
_faces: dict[bytes, ActorFace] = {}
_FACES_MAX = 4096


def face_of(data: bytes) -> ActorFace:
    face = _faces.get(data)
    if face is None:
        if len(_faces) >= _FACES_MAX:
            del _faces[next(iter(_faces))]
        face = _faces[data] = ActorFace(data)
    return face


def methods_of(actor_class: type) -> list[Method]:
    """What can be called: functions of the class and of those that it inherits from."""
    found = []
    for name, member in inspect.getmembers(actor_class, _is_method):
        if name == "__init__":
            continue
        static = inspect.getattr_static(actor_class, name)
        bound = isinstance(static, (staticmethod, classmethod))
        options = getattr(member, OPTIONS_ATTRIBUTE, {})
        count = options.get("num_returns")
        backpressure = options.get("_generator_backpressure_num_objects")
        is_generator = generates(member)
        check_mode(is_generator, count, backpressure)
        found.append(
            Method(
                name=name,
                parameters=_parameters_of(member, skip=0 if bound else 1),
                num_returns=int(count) if isinstance(count, int) else 1,
                max_retries=options.get("max_task_retries"),
                retry_exceptions=retry_spec(options.get("retry_exceptions") or False),
                concurrency_group=options.get("concurrency_group") or "",
                generates=is_generator,
                stream=stream_mode(is_generator, count),
                backpressure=max(0, backpressure or 0),
                per_yield=int(options.get("_num_objects_per_yield") or 1),
            )
        )
    return found


def unknown_group(class_name: str, method: str, group: str) -> str:
    """What is wrong with a call in a group that its actor does not have."""
    return (
        f"{class_name}.{method} is to run in the concurrency group {group!r}, which the actor does "
        f"not have: name it in @remote(concurrency_groups={{{group!r}: 1}})."
    )


def _is_method(member: object) -> bool:
    return inspect.isfunction(member) or inspect.ismethod(member) or _is_cython(member)


def _is_cython(member: object) -> bool:
    return type(member).__name__ == "cython_function_or_method"


def _parameters_of(function: Any, skip: int) -> list[_Parameter] | None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        parameters = parameters[skip:]
    return [_Parameter(p.name, int(p.kind), p.default is not empty) for p in parameters]


def constructor_of(actor_class: type) -> Method:
    constructor = cast("Any", actor_class).__init__
    if not _is_method(constructor):
        # `object`'s own takes nothing; of others, in C, it is not known.
        inherited: list[object] = [constructor, actor_class.__new__]
        plain = inherited == [object.__init__, object.__new__]
        return Method(name="__init__", parameters=[] if plain else None)
    return Method(name="__init__", parameters=_parameters_of(constructor, skip=1))
