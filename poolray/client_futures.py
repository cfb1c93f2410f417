"""Values of objects as futures, and for `await`.

What: asks the node to say when an object is there, and reads it then.
Who calls: `client.py`.
May touch: the node, through the client's link; the caller's event loop.
Invariants: an await that is given up is forgotten, and what comes for it is let go; its value is
read in the loop's thread, for unpickling runs user code.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from poolray.objects.object_ref import ObjectRef
from poolray.protocol.client import ObjectValues

if TYPE_CHECKING:
    import asyncio

    from poolray.client import Client


def future_of(client: Client, ref: ObjectRef[Any]) -> Future[Any]:
    """A future of an object's value."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def settle(reply: ObjectValues) -> None:
        error, value = client.read_reply(reply, ref)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    client.sync_references()
    client.link.when_ready(ref._id, settle)
    return future


def await_value(client: Client, ref: ObjectRef[Any]) -> Generator[Any, None, Any]:
    """What `await ref` runs, in any event loop.

    An await that is cancelled is forgotten; the task goes on, for others may wait for it.
    """
    import asyncio

    loop = asyncio.get_running_loop()
    arrival: asyncio.Future[ObjectValues] = loop.create_future()

    def note(reply: ObjectValues) -> None:
        if not arrival.done():
            arrival.set_result(reply)
        else:
            client.let_go([(reply.values[0], ref)])

    def tell_loop(reply: ObjectValues) -> None:
        try:
            loop.call_soon_threadsafe(note, reply)
        except RuntimeError:  # the loop was closed: nobody waits any more
            client.let_go([(reply.values[0], ref)])

    client.sync_references()
    forget = client.link.when_ready(ref._id, tell_loop)
    try:
        reply = yield from arrival
    except BaseException:
        if not arrival.done() or arrival.cancelled():
            forget()
        else:  # it came while the await was being cancelled
            client.let_go([(arrival.result().values[0], ref)])
        raise
    # Read in the loop's thread: unpickling runs user code.
    error, value = client.read_reply(reply, ref)
    if error is not None:
        raise error
    return value
