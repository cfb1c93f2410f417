"""How a driver outside of the cluster speaks with the daemon that serves it.

    send ──▶ Outlet ──┐                       ┌──▶ inbox ──bell──▶ the driver's reactor ──read──▶
                      └─▶ Switch, in a thread ┘
                             ║ TCP, CURVE; numbered, acknowledged, sent again after a cut
                             ╚══▶ the daemon's Switch ──▶ RemoteSession

What: the line (see `line.py`) over a reliable link, kept by a thread of its own, so that the daemon
hears from us whatever the program does.
Who calls: the driver's runtime.
May touch: ZeroMQ sockets, a thread, the clock.
Invariants: only the thread touches the switch; the line is lost for good once nothing was heard for
the grace period, when the daemon knows us no more, or when it says so.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from typing import final

import msgspec

from poolray.cluster.auth import Credentials
from poolray.cluster.outlet import Outlet
from poolray.cluster.switch import OUTSIDE, Switch
from poolray.config import Config
from poolray.exceptions import ClusterConnectionError
from poolray.local.reactor import Doorbell
from poolray.protocol.cluster import Farewell, Hello, Welcome
from poolray.protocol.remote import StillThere

_encode = msgspec.msgpack.Encoder().encode
_decode_welcome = msgspec.msgpack.Decoder(Welcome | Farewell).decode

_SIGN_ON_S = 10.0
#: Who produces much waits while this much has not been given to the link.
_WAITING_BYTES_MAX = 16 << 20
#: After so much silence we say something, so that the daemon hears from us, and we from it.
_SILENCE_S = 1.0
#: And at least so many times within the grace period.
_PER_GRACE = 5
#: At the end what was sent may take so long to arrive.
_LINGER_S = 2.0
#: The thread did not run for this long: the machine or the process slept, and nobody's silence can
#: be told from that.
_SLEPT_S = 1.0


@final
class RemoteLine:
    """A line to a daemon on another machine.

    Parameters
    ----------
    node_id : bytes
        The daemon's node.
    host, port
        Where it listens.
    credentials : Credentials or None
        Keys of the cluster, if it has some.

    Raises
    ------
    ClusterConnectionError
        It does not answer in time, or will not speak with us.
    """

    arena = None

    def __init__(
        self, node_id: bytes, host: str, port: int, credentials: Credentials | None, hello: Hello
    ) -> None:
        self._node_id = node_id
        self._address = (host, port)
        self._credentials = credentials
        self.lost = ""
        self._grace_s = _SIGN_ON_S
        #: Rung for the reactor: something has come …
        self._news = Doorbell()
        #: … and for the thread: something is to be sent.
        self._work = Doorbell()
        self._inbox: deque[bytes] = deque()
        #: Guards `_unsent` and `_unsent_bytes`; told when there is room again.
        self._room = threading.Condition()
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._closing = False
        self._poller = select.poll()
        self._poller.register(self._work.descriptor, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="poolray-line", daemon=True)
        self._thread.start()
        try:
            self.welcome = self._sign_on(hello)
        except BaseException:
            self.close()
            raise
        given = self.welcome.config.get("client_reconnect_grace_period_s")
        self._grace_s = Config().client_reconnect_grace_period_s if given is None else given

    def _sign_on(self, hello: Hello) -> Welcome:
        self.send(_encode(hello))
        deadline = time.monotonic() + _SIGN_ON_S
        while not self._inbox:
            left_s = deadline - time.monotonic()
            if self.lost or left_s <= 0:
                reason = self.lost or f"nothing came back for {_SIGN_ON_S:g} s"
                host, port = self._address
                raise ClusterConnectionError(
                    f"The node's daemon at {host}:{port} does not take this driver in: {reason}."
                )
            self._news.wait(left_s)
        try:
            welcome: Welcome | Farewell = _decode_welcome(self._inbox.popleft())
        except msgspec.MsgspecError as error:
            raise ClusterConnectionError(
                f"The node's daemon is not understood: {error}."
            ) from error
        if isinstance(welcome, Farewell):
            raise ClusterConnectionError(f"The node's daemon refuses: {welcome.reason}.")
        if self._inbox or self.lost:
            self._news.ring()
        return welcome

    # ---- what the runtime calls ------------------------------------------------------------------

    def fileno(self) -> int:
        """What to poll."""
        return self._news.descriptor

    def read(self) -> list[bytes] | None:
        """What has come, without waiting; None: the line is lost."""
        self._news.clear()
        found = []
        while self._inbox:
            found.append(self._inbox.popleft())
        if not found and self.lost:
            return None
        if self.lost:
            self._news.ring()  # that it is lost is told next
        return found

    def send(self, body: bytes, may_wait: bool = False) -> None:
        """Send a message; what is sent while the connection is cut goes out later."""
        with self._room:
            while may_wait and self._unsent_bytes > _WAITING_BYTES_MAX and not self.lost:
                self._room.wait(1.0)
            if self.lost:
                raise ConnectionError(self.lost)
            self._unsent.append(body)
            self._unsent_bytes += len(body)
        self._work.ring()

    def close(self) -> None:
        """The end: the daemon is told, if it can be reached within a moment."""
        if not self.lost:
            try:
                self.send(_encode(Farewell(reason="it has ended")))
            except OSError:
                pass  # lost just now
        self._closing = True
        self._work.ring()
        self._thread.join()
        self._news.close()
        self._work.close()

    def abandon(self) -> None:
        """In a forked child: the thread, and what it had, are the parent's."""
        self._closing = True
        self._news.close()
        self._work.close()

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        switch = Switch(
            own_id=OUTSIDE + os.urandom(16),
            session=time.time_ns(),
            credentials=self._credentials,
            resend_after_s=Config().resend_after_s,
            on_message=self._on_message,
        )
        switch.on_refused = lambda _, reason: self._lose(reason)
        switch.on_restarted = lambda *_: self._lose("its daemon was started again")
        switch.on_socket = lambda descriptor: self._poller.register(descriptor, select.POLLIN)
        outlet = Outlet(switch, self._node_id)
        try:
            switch.connect(self._node_id, *self._address)
            self._serve(switch, outlet)
        except Exception as error:
            self._lose(f"its link has failed: {error!r}")
        finally:
            switch.close(linger_s=0.2 if not self.lost else 0.0)

    def _serve(self, switch: Switch, outlet: Outlet) -> None:
        looked_s = awake_since_s = time.monotonic()
        close_at_s = float("inf")
        everywhere = True
        while True:
            now = time.monotonic()
            if now - looked_s > _SLEPT_S:
                awake_since_s = now
            looked_s = now
            quiet_s = min(_SILENCE_S, self._grace_s / _PER_GRACE)
            self._take_unsent(outlet)
            switch.tick(now)
            more = switch.service(now, everywhere)  # last of what sends: that may swallow news
            more = outlet.flush() or more
            silence_s = now - max(switch.heard_s(self._node_id), awake_since_s)
            if self._closing:
                close_at_s = min(close_at_s, now + _LINGER_S)
                is_done = outlet.is_empty and not self._unsent
                if self.lost or is_done or now >= close_at_s or silence_s > _LINGER_S:
                    return
            elif self.lost:
                everywhere = self._sleep(switch, None)
                continue
            elif silence_s > self._grace_s:
                self._lose(
                    f"nothing was heard of its node's daemon for {self._grace_s:g} s "
                    "(client_reconnect_grace_period_s), which has let go of what this program held"
                )
            elif silence_s >= quiet_s and outlet.is_empty:
                outlet.put(_encode(StillThere()))
                more = outlet.flush()
            if more:
                everywhere = False
                continue
            due = switch.next_deadline()
            timeout_s = quiet_s / 2 if due is None else min(due - now, quiet_s / 2)
            everywhere = self._sleep(switch, 0.02 if self._closing else max(0.0, timeout_s))

    def _sleep(self, switch: Switch, timeout_s: float | None) -> bool:
        """Until there is something to do; True when that is the clock's wish."""
        ready = self._poller.poll(None if timeout_s is None else timeout_s * 1000.0)
        for descriptor, _ in ready:
            if descriptor == self._work.descriptor:
                self._work.clear()
            else:
                switch.note_readable(descriptor)
        return not ready

    def _take_unsent(self, outlet: Outlet) -> None:
        if not self._unsent or outlet.waiting_bytes > _WAITING_BYTES_MAX:
            return
        with self._room:
            unsent, self._unsent = self._unsent, deque()
            self._unsent_bytes = 0
            self._room.notify_all()
        for body in unsent:
            outlet.put(body)

    def _on_message(self, _: bytes, body: bytes) -> None:
        self._inbox.append(body)
        self._news.ring()

    def _lose(self, reason: str) -> None:
        with self._room:
            self.lost = self.lost or reason
            self._unsent.clear()
            self._unsent_bytes = 0
            self._room.notify_all()
        self._news.ring()
