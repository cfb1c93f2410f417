"""The head's daemon: the Head machine behind a port.

    nodes ──RegisterNode, Heartbeat, …──▶ Switch ──▶ ┌──────┐ ──SendNode──▶ Switch ──▶ nodes
    anybody with the token ──questions──▶   "        │ Head │
                                                     └──────┘
What: feeds the machine, carries its messages, tells nodes where other nodes are, answers questions.
Who calls: `poolray start --head` starts it as a process of its own.
May touch: sockets, the clock, files.
Invariants: it never looks into a user's value; one thread does everything.
"""

from __future__ import annotations

import logging
import os
import platform
import select
import sys
import time
from typing import final

import msgspec

from poolray._version import __version__
from poolray.cluster import daemon, places
from poolray.cluster.auth import Credentials
from poolray.cluster.options import HeadOptions, Ready
from poolray.cluster.switch import Switch
from poolray.config import Config
from poolray.exceptions import PoolrayError
from poolray.head.head import Change, Head, HeadInput, SendNode
from poolray.head.storage_open import Storage, open_storage
from poolray.ids import NodeId
from poolray.local.reactor import Doorbell
from poolray.protocol import PROTOCOL_VERSION
from poolray.protocol.cluster import (
    Answer,
    AskDrain,
    AskWho,
    Nodes,
    Question,
    Who,
)
from poolray.protocol.node import HeadRequest, NodeDied, RegisterNode, Tick

_logger = logging.getLogger(__name__)

HEAD_ID = b"head"

#: A storage that fails is tried again for so long; then the head ends, and another may be started.
_STORAGE_PATIENCE_S = 30.0
_STORAGE_AGAIN_S = 0.2


@final
class HeadDaemon:
    """One cluster's head."""

    def __init__(self, options: HeadOptions) -> None:
        self._options = options
        self.config = Config.load(None, **options.config)
        self._head = Head(self.config)
        self._storage: Storage | None = None
        if options.storage:
            self._storage = open_storage(options.storage, options.storage_namespace)
            self._head.restore(self._storage.load(), time.monotonic())
        self._stopped = False
        self._bell = Doorbell()
        #: Nodes whose deaths have been logged.
        self._dead: dict[NodeId, None] = {}
        self._decode = msgspec.msgpack.Decoder(HeadRequest).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._switch = Switch(
            own_id=HEAD_ID,
            session=time.time_ns(),
            credentials=Credentials.of(options.token) if options.token else None,
            resend_after_s=self.config.resend_after_s,
            on_message=self._on_message,
        )
        self._switch.answer = self._answer
        port = self._switch.listen(options.host, options.port)
        self.address = f"{options.host}:{port}"
        self._socket_name = places.socket_name("head", options.temp_dir, self.address)
        # Nobody signs on here: it only tells that there is a head on this machine.
        self._presence = places.listen(self._socket_name)

    def ready(self) -> Ready:
        """What to tell who started us."""
        return Ready(pid=os.getpid(), address=self.address, socket_name=self._socket_name)

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped."""
        _logger.info("the head listens at %s", self.address)
        poller = select.poll()
        owner_pid = self._options.owner_pid
        owner = daemon.owner_pidfd(owner_pid, self.stop) if owner_pid else -1
        for descriptor in (*self._switch.descriptors(), self._bell.descriptor, owner):
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        while not self._stopped:
            if not self._switch.service(time.monotonic()):
                timeout_s = self._timeout()
                timeout_ms = None if timeout_s is None else max(0.0, timeout_s) * 1000.0 + 0.5
                if any(descriptor == owner for descriptor, _ in poller.poll(timeout_ms)):
                    _logger.info("whoever started this daemon is gone: it ends")
                    break
            self._switch.tick(time.monotonic())
            deadline = self._head.next_deadline()
            if deadline is not None and deadline <= time.monotonic():
                self._feed(b"", Tick())
        self._presence.close()
        self._switch.service(time.monotonic())
        self._switch.close(linger_s=0.2)
        if self._storage is not None:
            self._storage.close()
        _logger.info("the head has ended")

    def stop(self) -> None:
        """End the loop; safe in a signal handler."""
        self._stopped = True
        self._bell.ring()

    def _timeout(self) -> float | None:
        deadlines = [d for d in (self._switch.next_deadline(), self._head.next_deadline()) if d]
        return min(deadlines) - time.monotonic() if deadlines else None

    # ---- the machine -----------------------------------------------------------------------------

    def _on_message(self, peer: bytes, payload: bytes) -> None:
        message = self._decode(payload)
        if isinstance(message, RegisterNode):
            _logger.info("node=%s registers, at %s", peer.hex()[:12], message.address)
        self._feed(peer, message)

    def _feed(self, sender: bytes, message: HeadInput) -> None:
        try:
            effects = self._head.handle(sender, message, time.monotonic())
        except Exception:
            # A message that makes no sense, or a bug of ours: the other nodes go on.
            _logger.exception("the head cannot take %s", type(message).__name__)
            return
        self._carry_out(effects)

    def _carry_out(self, effects: list[SendNode]) -> None:
        if self._storage is not None:
            changes = self._head.take_changes()
            if changes:
                self._store(self._storage, changes)
        for effect in effects:
            self._act(effect)

    def _store(self, storage: Storage, changes: list[Change]) -> None:
        """Nobody may hear of changes before they are stored: a storage that is away for a moment is
        waited for. Nodes go on meanwhile, as they do without a head.
        """
        deadline_s = time.monotonic() + _STORAGE_PATIENCE_S
        while True:
            try:
                storage.write(changes)
                return
            except PoolrayError as error:
                if self._stopped or time.monotonic() > deadline_s:
                    raise
                _logger.error("%s It is tried again.", error)
                time.sleep(_STORAGE_AGAIN_S)

    def _act(self, effect: SendNode) -> None:
        message = effect.message
        if isinstance(message, NodeDied) and message.node_id not in self._dead:
            self._dead[message.node_id] = None
            _logger.warning("node=%s %s", message.node_id.hex()[:12], message.reason)
        self._switch.send(effect.node_id, self._encode(message))

    # ---- questions -------------------------------------------------------------------------------

    def _answer(self, question: Question) -> Answer:
        if isinstance(question, AskWho):
            return Who(
                role="head",
                pid=os.getpid(),
                version=__version__,
                python=platform.python_version(),
                protocol_version=PROTOCOL_VERSION,
                session_folder=self._options.session_folder,
            )
        if isinstance(question, AskDrain):
            started, effects = self._head.drain(
                question.node_id,
                question.reason,
                question.patience_s,
                question.only_if_idle,
                time.monotonic(),
            )
            self._carry_out(effects)
            return started
        return Nodes(
            nodes=self._head.nodes(),
            jobs=self._head.statistics().jobs,
            pending_groups=self._head.pending_groups(),
            session_folder=self._options.session_folder,
        )


def main() -> int:
    """The whole life of a head's daemon; gives its exit code."""
    pipe = int(sys.argv[2])
    options = daemon.read_options(HeadOptions)
    daemon.detach(options.session_folder, "head")
    try:
        head = HeadDaemon(options)
    except BaseException as error:
        daemon.report_failure(pipe, error)
        return 1
    daemon.on_stop(head.stop)
    daemon.report(pipe, head.ready())
    head.run()
    return 0
