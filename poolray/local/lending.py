"""A worker on loan: instead of one call it runs those that its driver sends it, for a moment.

    the node's packet: LEND ──▶ comes to the driver's door ══ calls, results ══▶ the driver
                                  until it idles, its time is up, or the node wants something

What: the worker's side of `direct/loans.py`.
Who calls: `local/worker.py`, in the place of a function.
May touch: sockets.
Invariants: to its node it is a worker that runs one task, with what that task asked for; whatever
the node wants of it ends the loan after the call at hand; what was not begun by then is not begun.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any, final

from poolray.direct.addresses import CONNECT_S, Offer, come_to, settle_in
from poolray.direct.seal import HandshakeError
from poolray.ids import ActorId, ClassId, TaskId
from poolray.local import process_state
from poolray.local.channel import Spinner
from poolray.local.direct_server import Caller
from poolray.protocol.client import EndedCalls, NoteCalls
from poolray.protocol.values import Outcome
from poolray.protocol.worker import RunTasks, TasksFinished

if TYPE_CHECKING:
    from poolray.local.worker import Worker
    from poolray.local.worker_functions import Function

#: A loan ends after so long, so that others get their turn ...
_LOAN_S = 0.1
#: ... or when no call has come for so long.
_IDLE_S = 0.01
#: The driver's last word of the handshake comes within so long, unless it is stopped.
_PROOF_S = 1.0
#: Ended calls that the node is told of at once.
_NOTES_MAX = 256
_NOTHING: Any = object()


def lend(worker: Worker, arguments: tuple[str, list[Offer]]) -> tuple[bool, Any]:
    """Work for the driver that this worker's task came from.

    Returns
    -------
    is_held : bool
        One of the calls returned what only the nodes can bring.
    result : object
        That; else whether there was a way to the driver.
    """
    machine, offers = arguments
    # What came in the same packet, and was to run after this, must not wait for it.
    worker.enter_user_code()
    worker.prepare_to_block()
    worker.leave_user_code(True)
    if worker.former is not None:
        worker.former.close()
        worker.former = None
    is_near = machine == worker.setup.machine
    offer = next((offer for offer in offers if bool(offer[0]) == is_near), None)
    if offer is None:
        return False, False
    try:
        channel = come_to(offer)
    except OSError:
        return False, False
    try:
        settle_in(channel)
        caller = Caller(channel, offer, listens=False)
    except (HandshakeError, OSError):
        channel.close()
        return False, False
    process_state.on_fork_in_child(caller.close)
    lending = Lending(worker, caller)
    worker.lending = lending
    try:
        return lending.run()
    finally:
        worker.lending = None
        worker.former = Former(caller)
        if not caller.is_open or caller.is_gone or caller.has_unsent:
            # There was nothing to say; or the driver was stopped, and nobody sends the rest when it
            # goes on, so it is to find us gone.
            worker.former.close()
            worker.former = None


@final
class Former:
    """The way to a driver that this worker is not on loan to any more.

    The driver closes it when it has read all: if we did, what it sends just now would come back as
    an error, before what we have sent. One that is stopped does not.

    Parameters
    ----------
    caller : Caller
        The driver.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._until_s = time.monotonic() + CONNECT_S

    def wait(self, worker: Worker) -> None:
        """Until the node has something to say, or the driver has left, or has had its time."""
        caller = self._caller
        poller = select.poll()
        poller.register(worker.tasks, select.POLLIN)
        poller.register(caller.channel, select.POLLIN)
        while not caller.is_gone and (left_s := self._until_s - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poller.poll(left_s * 1000.0)]
            if caller.channel.fileno() in ready:
                caller.read()  # (calls that it gives to its node, now that it reads of our end)
            elif ready:
                return
        self.close()
        worker.former = None

    def close(self) -> None:
        """Its end."""
        process_state.off_fork_in_child(self._caller.close)
        self._caller.close()


@final
class Lending:
    """One loan.

    Parameters
    ----------
    worker : Worker
    caller : Caller
        The driver.
    """

    def __init__(self, worker: Worker, caller: Caller) -> None:
        self._worker = worker
        self._caller = caller
        self._held = _NOTHING
        self._poller = select.poll()
        self._poller.register(caller.channel, select.POLLIN)
        self._spinner = Spinner(worker.config.spin_s)
        #: Calls that have ended, of which the node has not been told.
        self._notes: list[EndedCalls] = []
        self._noted: dict[ClassId, Function] = {}

    def hold(self, task_id: TaskId, result: Any) -> Outcome:
        """Keep a result: it becomes the loan's own; what the driver is told instead."""
        self._held = result
        return Outcome(values=[])

    def has(self, task_id: TaskId) -> bool:
        """Whether a call that runs is the driver's: no others run meanwhile."""
        return True

    def run(self) -> tuple[bool, Any]:
        """Run calls until the loan ends."""
        worker, caller = self._worker, self._caller
        classes = worker.functions.classes
        known = set(classes)
        nudges = worker.nudges
        until_s = time.monotonic() + _LOAN_S
        idle_s = _PROOF_S
        while worker.nudges == nudges:
            left_s = until_s - time.monotonic()
            if (caller.is_open and left_s <= 0) or not self._wait(idle_s):
                break
            caller.read()
            if caller.is_gone:
                break
            if caller.is_open:
                idle_s = _IDLE_S
            while (packet := caller.next_packet()) is not None:
                worker.run_direct(packet, caller)
                # The last call's values must not live on while we wait.
                packet = None
            if self._held is not _NOTHING:
                break
        for index in classes.keys() - known:
            del classes[index]
        self._send_notes()
        if caller.is_open:
            caller.give_back()
        held, self._held = self._held, _NOTHING
        return (False, True) if held is _NOTHING else (True, held)

    def note(self, packet: RunTasks, report: TasksFinished) -> None:
        """Calls of a packet have ended: whoever lists tasks is to know."""
        worker = self._worker
        if not worker.config.task_history_max:
            return
        classes, results = worker.functions.classes, {r.task_id: r for r in report.results}
        for task in packet.tasks:
            result = results.get(task.task_id)
            function = classes[task.class_index]
            task_class = function.task_class
            if result is None or not task_class.is_listed:
                continue
            self._noted[task_class.class_id] = function
            outcome = result.results[0] if result.results else b""
            failed = isinstance(outcome, Outcome) and outcome.is_error
            self._notes.append(
                EndedCalls(
                    actor_id=ActorId(b""),
                    worker_id=worker.worker_id,
                    task_ids=[task.task_id],
                    class_ids=[task_class.class_id],
                    errors={0: outcome.summary} if failed else {},  # type: ignore[union-attr]
                    elapsed_ns=report.elapsed_ns,
                    ended_s=time.monotonic(),
                )
            )
        if len(self._notes) >= _NOTES_MAX:
            self._send_notes()

    def _send_notes(self) -> None:
        notes, self._notes = self._notes, []
        noted, self._noted = list(self._noted.values()), {}
        if notes:
            message = NoteCalls(
                calls=notes,
                now_s=time.monotonic(),
                classes=[function.task_class for function in noted],
                function_names=[function.name for function in noted],
            )
            self._worker.client.api.link.send(message)

    def _wait(self, idle_s: float) -> bool:
        """Wait for the driver; False when it has said nothing for so long."""
        return bool(self._spinner.wait(self._poller.poll, idle_s * 1000.0))
