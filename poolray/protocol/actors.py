"""Actors in the client protocol: created, called, killed, looked up.

What: requests about actors and their replies, and what a worker is told that becomes one.
Who calls: `Client` sends the requests, the node machine answers; a worker reads `ActorSetup`.
May touch: nothing.
Invariants: a client makes an actor's id, so creating one without a name and calling it need no
reply. Who holds the object `handle_of(actor_id)` holds a handle; no message counts handles.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from poolray.ids import ActorId
from poolray.protocol.values import TaskSpec


class ActorSetup(msgspec.Struct, frozen=True, array_like=True, tag=120, kw_only=True):
    """What a worker needs to know of the actor that it becomes, beside class and arguments."""

    actor_id: ActorId
    class_name: str
    #: What handles are made of: opaque to the machines.
    description: bytes
    name: str = ""
    namespace: str = ""
    #: Calls that run at once, on threads or, where the class has coroutine methods, in its loop.
    concurrency: int = 1
    #: Concurrency group -> the same for its calls; `concurrency` is for all others.
    groups: dict[str, int] = {}


class CreateActor(msgspec.Struct, frozen=True, array_like=True, tag=121, kw_only=True):
    """Make an actor. The client holds a handle from now on, or from the reply on if it has a name.

    An actor with a name needs a reply, for the name may be taken.
    """

    actor_id: ActorId
    task: TaskSpec  #: the constructor's call
    class_name: str
    description: bytes = b""
    request_id: int = 0  #: of an actor with a name
    name: str = ""
    namespace: str = ""
    get_if_exists: bool = False  #: answer with the actor that has the name, if there is one
    detached: bool = False  #: it lives on without handles
    max_restarts: int = 0  #: -1: no limit
    concurrency: int = 1  #: calls that run at once
    serial: bool = True  #: its worker ends a call before it looks at the next
    #: Calls of one caller begin in the order in which they were made.
    ordered: bool = True
    counted: bool = False  #: calls that have not ended are counted per caller, for `CountCalls`
    groups: dict[str, int] = {}  #: concurrency group -> its calls that run at once


class CallActor(msgspec.Struct, frozen=True, array_like=True, tag=122, kw_only=True, gc=False):
    """Call a method. The client holds one reference to each return value from now on."""

    actor_id: ActorId
    task: TaskSpec


class CallActors(msgspec.Struct, frozen=True, array_like=True, tag=127, kw_only=True, gc=False):
    """Several calls, of one actor or of several, in the order in which they were made."""

    calls: list[CallActor]


class KillActor(msgspec.Struct, frozen=True, array_like=True, tag=123, kw_only=True):
    """End an actor by force."""

    actor_id: ActorId
    no_restart: bool = True  #: False: it counts as a crash, after which it may be restarted


class LookUpActor(msgspec.Struct, frozen=True, array_like=True, tag=124, kw_only=True):
    """Which actor has this name?"""

    request_id: int
    namespace: str
    name: str


class ListActors(msgspec.Struct, frozen=True, array_like=True, tag=125, kw_only=True):
    """Which names have actors?"""

    request_id: int
    namespace: str | None = None  #: None: all namespaces


class CountCalls(msgspec.Struct, frozen=True, array_like=True, tag=126, kw_only=True):
    """How many calls of mine has the actor not ended?"""

    request_id: int
    actor_id: ActorId


class ActorReply(msgspec.Struct, frozen=True, array_like=True, tag=161, kw_only=True):
    """The actor asked for; the client holds a handle to it from now on."""

    request_id: int
    actor_id: ActorId = ActorId(b"")  #: empty: there is none, or the name is taken
    description: bytes = b""


class NamedActors(msgspec.Struct, frozen=True, array_like=True, tag=162, kw_only=True):
    """Names of actors."""

    request_id: int
    names: list[tuple[str, str]]  #: (namespace, name) pairs


class CallCount(msgspec.Struct, frozen=True, array_like=True, tag=163, kw_only=True):
    """Calls that have not ended."""

    request_id: int
    count: int


ActorRequest: TypeAlias = (
    CreateActor | CallActor | CallActors | KillActor | LookUpActor | ListActors | CountCalls
)
