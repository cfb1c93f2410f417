"""Actors as a process asks its node for them: made, found, counted, killed.

What: turns what `actor.py` wants into messages, and replies into what handles are made of.
Who calls: `actor.py`.
May touch: the node, through the process's client.
Invariants: with a name, the node counts this process as a holder before it answers; without one it
does so as it takes the message, which needs no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from poolray.client import Client
from poolray.ids import ActorId, actor_of, handle_of
from poolray.objects.object_ref import ObjectRef
from poolray.protocol.actors import (
    ActorReply,
    ActorSetup,
    CallCount,
    CountCalls,
    CreateActor,
    KillActor,
    ListActors,
    LookUpActor,
    NamedActors,
)
from poolray.protocol.client import ReleaseReferences
from poolray.protocol.values import TaskClass

#: An actor's id, what its handles are made of, and the ref that keeps it alive.
Found: TypeAlias = tuple[ActorId, bytes, ObjectRef[Any]]


def create_actor(
    client: Client,
    task_class: TaskClass,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    setup: ActorSetup,
    **options: Any,
) -> Found | None:
    """Make an actor; None: its name is taken.

    Parameters
    ----------
    setup : ActorSetup
        What its worker is told; the id in it is made here.
    **options
        Fields of `CreateActor`.

    Raises
    ------
    TypeError
        An argument cannot be serialized.
    """
    task_id = client.task_ids.next_task_id()
    actor_id = actor_of(task_id)
    setup = msgspec.structs.replace(setup, actor_id=actor_id)
    client.link.enter()
    try:
        task, temporary = client.serialize_call(task_class.name, args, kwargs, setup)
        message = CreateActor(
            actor_id=actor_id,
            task=msgspec.structs.replace(task, task_id=task_id, class_id=task_class.class_id),
            class_name=setup.class_name,
            description=setup.description,
            name=setup.name,
            namespace=setup.namespace,
            concurrency=setup.concurrency,
            **options,
        )
        found: Found | None
        if setup.name:
            found = _ask(client, lambda n: msgspec.structs.replace(message, request_id=n))
        else:
            client.link.send(message)
            found = actor_id, setup.description, client.own(handle_of(actor_id))
        if temporary is not None:
            client.link.send(ReleaseReferences(object_ids=[temporary]))
        return found
    finally:
        client.link.leave()


def look_up_actor(client: Client, namespace: str, name: str) -> Found | None:
    """The actor with a name; None when there is none."""
    return _ask(client, lambda n: LookUpActor(request_id=n, namespace=namespace, name=name))


def _ask(client: Client, make: Callable[[int], Any]) -> Found | None:
    with client.looking_up():
        reply: ActorReply = client.link.ask(make)
        if not reply.actor_id:
            return None
        handle = handle_of(reply.actor_id)
        ref = client.adopt(handle)
        client.forget_fresh(handle)  # the node has counted us with its answer
    return reply.actor_id, reply.description, ref


def named_actors(client: Client, namespace: str | None) -> list[tuple[str, str]]:
    """Namespaces and names of actors; None: of all namespaces."""
    reply: NamedActors = client.link.ask(lambda n: ListActors(request_id=n, namespace=namespace))
    return reply.names


def count_calls(client: Client, actor_id: ActorId) -> int:
    """Calls of this process that the actor has not ended."""
    if client.direct is not None:
        client.direct.turn_off(actor_id)  # the node counts
    reply: CallCount = client.link.ask(lambda n: CountCalls(request_id=n, actor_id=actor_id))
    return reply.count


def kill_actor(client: Client, actor_id: ActorId, no_restart: bool) -> None:
    """End an actor by force."""
    if client.direct is not None:
        client.direct.on_kill(actor_id)
    client.link.send(KillActor(actor_id=actor_id, no_restart=no_restart))
