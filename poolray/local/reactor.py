"""Who runs the node in a driver: the thread that waits is the one that works.

      get() ──▶ leader? ──yes──▶ poll the workers' channels, feed the node, until done ──▶ value
                  │ no                                   ▲
                  ▼                                      │ takes over when nobody leads
      follower: sleep until done or elected      background thread (sleeps while idle)

Handing each result from a background thread to the caller would cost two changes of the
interpreter's lock per call (measured: 2.4 to 2.9 times the latency).

What: leadership, polling, spinning, the background thread, Ctrl-C.
Who calls: the runtime; through it every blocked caller.
May touch: threads, locks, sockets, the clock, the SIGINT handler.
Invariants: one thread at a time receives from the workers; while the machine is being fed, a
KeyboardInterrupt waits; idle means that every thread sleeps without a timeout.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
import types
from _signal import getsignal as _getsignal  # type: ignore[import-not-found]
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, final

from poolray.exceptions import PoolrayError
from poolray.local.channel import PacketBuffer, Spinner

T = TypeVar("T")

_DONT_WAIT = socket.MSG_DONTWAIT
_YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))

#: Rounds without work before the background thread sleeps for good.
_IDLE_ROUNDS = 20
#: Packets of one channel that are dealt with together, at the most.
_TOGETHER_MAX = 16
#: Polls of a thread that submits, at the most.
_PUMP_MAX = 64
#: A leader that never sleeps, for there is always something to read, looks at the clock this often.
_LOOK_AT_CLOCK_S = 0.05
#: The longest round of the background thread while others lead.
_ROUND_MAX_S = 0.01


@final
class Doorbell:
    """Wakes a thread that polls; rings that come before it looks count as one."""

    __slots__ = ("_writer", "descriptor")

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._writer = self.descriptor
        else:
            self.descriptor, self._writer = os.pipe()
            os.set_blocking(self.descriptor, False)
            os.set_blocking(self._writer, False)

    def ring(self) -> None:
        """Wake whoever polls."""
        try:
            os.write(self._writer, b"\1\0\0\0\0\0\0\0")
        except (BlockingIOError, OSError):
            pass  # rung already, or closed: nobody is left to wake

    def clear(self) -> None:
        """The ring has been heard."""
        try:
            os.read(self.descriptor, 8)
        except BlockingIOError:
            pass

    def wait(self, timeout_s: float) -> None:
        """Sleep until rung or the time is up."""
        self.wait_with([], timeout_s)

    def wait_with(self, others: list[int], timeout_s: float | None) -> list[int]:
        """Sleep until rung, or one of other descriptors is readable: gives those."""
        poller = select.poll()
        for descriptor in (self.descriptor, *others):
            poller.register(descriptor, select.POLLIN)
        ready = poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000.0)
        heard = [d for d, events in ready if d != self.descriptor and not events & select.POLLNVAL]
        if len(heard) < len(ready):
            self.clear()
        return heard

    def close(self) -> None:
        """Let go of the descriptors."""
        for descriptor in {self.descriptor, self._writer}:
            os.close(descriptor)


class Waitable:
    """Something that a thread may wait for: becomes done once, and wakes who waits."""

    __slots__ = ("__weakref__", "done", "sleepers")

    def __init__(self) -> None:
        self.done = False
        #: Locks of threads that sleep until it is done.
        self.sleepers: list[Any] | None = None

    def finish(self) -> None:
        """It is done."""
        self.done = True
        sleepers = self.sleepers
        if sleepers is not None:
            for lock in list(sleepers):
                _release(lock)


#: Two threads may begin to wait for the same thing at once.
_sleepers_lock = threading.Lock()


def _release(lock: Any) -> None:
    try:
        lock.release()
    except RuntimeError:
        pass  # awake already


class Pumped(Protocol):
    """What the reactor drives."""

    #: What has become of it, as a verb; empty: nothing.
    ended: str

    def on_packet(self, host: Any, packet: bytes) -> bool:
        """A worker's report; True: it is best dealt with together with those that follow it."""

    def on_all_read(self) -> None:
        """No more of them follow for now."""

    def on_server_news(self, host: Any) -> None:
        """A channel that is not for reports (a fork server's, or another) has something, or is
        closed.
        """

    def settle(self) -> None:
        """After packets: hand results over, flush what waits; runs user code. Ctrl-C is held back
        by whoever calls this.
        """

    def is_unsettled(self) -> bool:
        """Whether `settle` has something to hand over."""

    def has_notes(self) -> bool:
        """Whether finalizers have noted what `settle` would tell the node: nobody sleeps on it."""

    def next_timeout(self) -> float | None:
        """Seconds until the machine wants a tick; None: it does not."""

    def tick(self) -> None:
        """The machine's time has come."""

    def has_work(self) -> bool:
        """Whether workers will report something."""

    def is_crowded(self) -> bool:
        """Whether workers have use for every core."""


class Guard:
    """Holds the runtime's lock, and Ctrl-C back while it does.

    A KeyboardInterrupt between two steps of the machine would leave its tables torn; one between
    receiving a result and handing it over would lose it. So Ctrl-C is held back from the moment a
    caller of the main thread begins to wait, except while it sleeps.
    """

    __slots__ = ("depth", "install", "interrupted", "lock")

    def __init__(self) -> None:
        #: Puts our handler of Ctrl-C in the place of the interpreter's own, which holds nothing
        #: back. Programs and notebooks may put that back at any time.
        self.install: Callable[[], None] = _do_nothing
        #: The runtime's lock alone, for who holds Ctrl-C back already.
        self.lock = threading.Lock()
        #: Guarded sections that the main thread is in.
        self.depth = 0
        #: Ctrl-C came meanwhile.
        self.interrupted = False

    def __enter__(self) -> None:
        if _get_ident() == _MAIN:
            if self.depth == 0 and _getsignal(_SIGINT) is _DEFAULT_HANDLER:
                self.install()
            self.depth += 1
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.leave()

    def enter(self) -> None:
        """Hold Ctrl-C back without the lock; matters in the main thread only."""
        if _get_ident() == _MAIN:
            if self.depth == 0 and _getsignal(_SIGINT) is _DEFAULT_HANDLER:
                self.install()
            self.depth += 1

    def leave(self) -> None:
        """The end of `enter`: an interrupt that came meanwhile is raised now."""
        if _get_ident() == _MAIN:
            self.depth -= 1
            if self.interrupted and self.depth == 0:
                self._interrupt()

    def check(self) -> None:
        """Raise an interrupt that came meanwhile, where only the caller holds it back."""
        if self.interrupted and self.depth == 1 and threading.get_ident() == _MAIN:
            self._interrupt()

    def sleep(self, wait: Callable[..., T], *args: Any) -> T:
        """Call what blocks; Ctrl-C ends it, where only the caller holds it back."""
        if self.depth != 1 or threading.get_ident() != _MAIN:
            return wait(*args)
        self.depth = 0
        try:
            if self.interrupted:
                self._interrupt()
            return wait(*args)
        finally:
            self.depth = 1

    def _interrupt(self) -> None:
        self.interrupted = False
        signal.default_int_handler(signal.SIGINT, None)

    def reset(self) -> None:
        """In a forked child, where no section is under way."""
        self.depth = 0
        self.interrupted = False


_MAIN = threading.main_thread().ident
_SIGINT = int(signal.SIGINT)
_DEFAULT_HANDLER = signal.default_int_handler
_get_ident = threading.get_ident


def _do_nothing() -> None:
    """Leave the handler alone."""


def _after_fork_in_child() -> None:
    """The thread that forked is the main one there, and nobody holds our lock."""
    global _MAIN, _sleepers_lock
    _MAIN = threading.main_thread().ident
    _sleepers_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


@final
class Interrupts:
    """Puts our SIGINT handler in the place of the interpreter's own.

    It does the same (KeyboardInterrupt in the main thread), except that it waits for the end of a
    guarded section. A handler that the program installed itself is left alone.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._installed = False
        guard.install = self.install

    def install(self) -> None:
        """Take the default handler's place; does nothing in other threads."""
        # `_signal`'s own function: signal.getsignal looks its answer up among enums, which costs a
        # microsecond.
        if _get_ident() == _MAIN and _getsignal(_SIGINT) is _DEFAULT_HANDLER:
            try:
                signal.signal(signal.SIGINT, self._on_interrupt)
            except ValueError:
                return  # a sub-interpreter: signals are not ours
            self._installed = True

    def restore(self) -> None:
        """Give the place back, for good."""
        self._guard.install = _do_nothing
        if (
            self._installed
            and threading.get_ident() == _MAIN
            and signal.getsignal(signal.SIGINT) == self._on_interrupt
        ):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._installed = False

    def _on_interrupt(self, signal_number: int, frame: Any) -> None:
        if self._guard.depth > 0 or _is_in_finalizer(frame):
            self._guard.interrupted = True
        else:
            signal.default_int_handler(signal_number, frame)


#: Names of our functions that the interpreter calls as objects die. An exception there is printed
#: and lost: Ctrl-C waits for the program's next call.
_FINALIZERS = ("__del__", "report", "on_release")


def _is_in_finalizer(frame: types.FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if frame.f_code.co_name in _FINALIZERS and name.startswith("poolray."):
            return True
        frame = frame.f_back
    return False


@final
class Reactor:
    """Leads and follows."""

    def __init__(self, target: Pumped, guard: Guard, spin_s: float, takeover_s: float) -> None:
        self._target = target
        self._guard = guard
        self._spinner = Spinner(spin_s)
        self._buffer = PacketBuffer()  # for the leader
        #: When the leader last found nothing to receive.
        self._wait_started_s = 0.0
        self._takeover_s = takeover_s
        #: Held by the thread that receives from the workers.
        self._lead = threading.Lock()
        self._leader: int | None = None  # its ident
        #: It sleeps, or is about to: it looks around once more after setting this.
        self._asleep = False
        #: Locks of threads that wait without leading, oldest first.
        self._followers: deque[Any] = deque()
        #: A caller wants to lead: the background thread makes way.
        self._foreground = 0
        #: A caller submits much and would receive meanwhile: the background thread makes way too.
        self._pump_wanted = False
        self._last_pump_s = 0.0
        #: When a leader that does not sleep looks whether the machine wants a tick.
        self._look_at_clock_s = 0.0
        #: Wakes a leader that sleeps in `poll`.
        self._bell = Doorbell()
        self._poller = select.poll()
        self._poller.register(self._bell.descriptor, select.POLLIN)
        #: file descriptor -> (channel or None for a server's channel, host).
        self._watched: dict[int, tuple[socket.socket | None, Any]] = {}
        #: descriptor -> channel that is watched, and not polled for now.
        self._paused: dict[int, socket.socket] = {}
        self._background: threading.Thread | None = None
        #: One caller waits for as long as there is anything to do: no background thread is needed.
        self.is_always_led = False
        #: Wakes the background thread; it sleeps on this and, while parked, on servers' news.
        self._park = Doorbell()
        self._parked = False
        #: The background thread was the last to lead: callers do not wait by themselves.
        self._background_led = False
        self._stopped = False

    # ---- what is watched -------------------------------------------------------------------------

    def watch(self, host: Any) -> None:
        """Poll a host's channels from now on."""
        self._watched[host.reports.fileno()] = (host.reports, host)
        self._watched[host.commands.fileno()] = (None, host)
        self._poller.register(host.reports, select.POLLIN)
        self._poller.register(host.commands, select.POLLIN)
        self.wake()

    def watch_other(self, channel: socket.socket, owner: Any) -> None:
        """Poll a channel that is no worker's; its owner's news goes where that of servers goes."""
        self._watched[channel.fileno()] = (None, owner)
        self._poller.register(channel, select.POLLIN)
        self.wake()

    def unwatch_other(self, channel: socket.socket) -> None:
        """Stop polling a channel that `watch_other` was given, before it is closed."""
        self._forget(channel)

    def _forget(self, channel: socket.socket) -> None:
        descriptor = channel.fileno()
        is_paused = self._paused.pop(descriptor, None) is not None
        if self._watched.pop(descriptor, None) is not None and not is_paused:
            self._poller.unregister(channel)

    def pause(self, channels: Iterable[socket.socket]) -> None:
        """Do not read these for now, if they are watched: whoever writes there waits."""
        for channel in channels:
            descriptor = channel.fileno()
            if descriptor in self._watched and descriptor not in self._paused:
                self._paused[descriptor] = channel
                self._poller.unregister(channel)

    def resume(self) -> None:
        """Read what was paused."""
        for channel in self._paused.values():
            self._poller.register(channel, select.POLLIN)
        self._paused.clear()

    def unwatch(self, host: Any) -> None:
        """Stop polling a host's channels, before they are closed."""
        self.unwatch_server(host)
        self.wake()

    def unwatch_server(self, host: Any) -> None:
        """A server is gone, and its workers with it: their channels would be readable for ever."""
        for channel in (host.reports, host.commands):
            self._forget(channel)

    def ring(self) -> None:
        """From finalizers: let whoever reads look at what they have noted, should he sleep."""
        if self._parked:
            self._park.ring()
        elif self._asleep:
            self._bell.ring()

    def wake(self) -> None:
        """Make a leader that sleeps look around."""
        self._bell.ring()

    # ---- waiting ---------------------------------------------------------------------------------

    def wait(self, waited: Waitable, timeout_s: float | None) -> bool:
        """Block until `waited` is done; False when the time is up first.

        Raises
        ------
        KeyboardInterrupt
            Ctrl-C, in the main thread; the runtime stays usable.
        """
        if waited.done:
            return True
        if self._stopped:
            raise PoolrayError(f"The runtime that would answer {self._target.ended}.")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._guard.enter()
        try:
            return self._wait(waited, deadline)
        finally:
            self._guard.leave()

    def _wait(self, waited: Waitable, deadline: float | None) -> bool:
        nested = self._leader == threading.get_ident()
        if nested:  # user code that a leader runs (a callback) waits: it goes on leading
            self._run(waited, deadline)
            return waited.done
        self._foreground += 1
        self._background_led = False  # callers wait by themselves, and soon again
        try:
            while not waited.done:
                if self._lead.acquire(False):
                    self._lead_until(waited, deadline)
                elif not self._follow(waited, deadline):
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    break
        finally:
            self._foreground -= 1
            # It may have been elected and not need to lead any more: the next one must know.
            if self._followers and not self._lead.locked():
                self._elect()
        return waited.done

    def _lead_until(self, waited: Waitable, deadline: float | None) -> None:
        self._background_led = False
        self._leader = threading.get_ident()
        try:
            self._run(waited, deadline)
        finally:
            self._leader = None
            self._lead.release()
            self._elect()

    def _elect(self) -> None:
        """Wake one follower: it may lead now."""
        if self._followers:
            try:
                lock = self._followers[0]
            except IndexError:
                return
            _release(lock)

    def _follow(self, waited: Waitable, deadline: float | None) -> bool:
        """Sleep until done, elected or out of time; False in the last case."""
        lock = threading.Lock()
        lock.acquire()
        with _sleepers_lock:
            if waited.sleepers is None:
                waited.sleepers = []
            waited.sleepers.append(lock)
        self._followers.append(lock)
        try:
            # Between the failed try to lead and this line the leader may have left, or the
            # result may have come.
            if waited.done or not self._lead.locked():
                return True
            if self._leader is not None and self._leader == self._background_ident():
                self.wake()  # the background thread makes way
            if deadline is None:
                return self._guard.sleep(lock.acquire)
            left = max(0.0, deadline - time.monotonic())
            return self._guard.sleep(lock.acquire, True, left)
        finally:
            self._followers.remove(lock)
            waited.sleepers.remove(lock)

    def _background_ident(self) -> int | None:
        return self._background.ident if self._background is not None else None

    def _run(self, waited: Waitable, deadline: float | None) -> None:
        """Lead until done or out of time."""
        guard, target = self._guard, self._target
        while not waited.done:
            if target.is_unsettled() or self._receive_spinning(waited):
                target.settle()
                if guard.interrupted:
                    guard.check()
                continue
            if waited.done:
                return  # type: ignore[unreachable] # another thread did it
            timeout = self._timeout(deadline)
            if timeout is not None and timeout <= 0:
                if deadline is not None and time.monotonic() >= deadline:
                    return
                self._tick()
                continue
            timeout_ms = None if timeout is None else timeout * 1000.0 + 0.05
            self._asleep = True
            if target.has_notes():
                target.settle()
            elif not waited.done and not target.is_unsettled():
                self._handle_ready(guard.sleep(self._poller.poll, timeout_ms))
                self._spinner.note(time.perf_counter() - self._wait_started_s)
            self._asleep = False

    def _timeout(self, deadline: float | None) -> float | None:
        timeout = self._target.next_timeout()
        if deadline is not None:
            left = deadline - time.monotonic()
            if timeout is None or left < timeout:
                return left
        return timeout

    def _tick(self) -> None:
        self._target.tick()
        self._target.settle()

    def _handle_ready(self, ready: list[tuple[int, int]]) -> None:
        if ready:
            self._receive(ready)
            self._target.settle()

    def _receive(self, ready: list[tuple[int, int]]) -> bool:
        """What the poller has found: a packet of each channel; False when there was nothing.

        One packet, for what it brings is handed over before the next one is read, and a poll costs
        less than a `recv` that finds nothing.
        """
        found = False
        watched, target = self._watched, self._target
        for descriptor, _ in ready:
            channel, host = watched.get(descriptor, (None, None))
            if host is None:
                if descriptor == self._bell.descriptor:
                    self._bell.clear()
                    found = True
            elif channel is None:
                target.on_server_news(host)
                found = True
            else:
                try:
                    packet = self._buffer.receive(channel, _DONT_WAIT)
                except OSError:
                    continue
                if packet:  # else its workers are gone: the server's news are on their way
                    if target.on_packet(host, packet):
                        self._receive_more(channel, host)
                    found = True
        self._last_pump_s = now = time.monotonic()
        if now >= self._look_at_clock_s:
            self._look_at_clock_s = now + _LOOK_AT_CLOCK_S
            timeout = target.next_timeout()
            if timeout is not None and timeout <= 0:
                target.tick()
        return found

    def _receive_more(self, channel: socket.socket, host: Any) -> None:
        """Packets that are best dealt with together."""
        target = self._target
        for _ in range(_TOGETHER_MAX):
            packet = self._buffer.receive_nowait(channel)
            if not packet or not target.on_packet(host, packet):
                break
        target.on_all_read()

    def receive_all(self, host: Any) -> None:
        """All packets that a host's workers have sent; for the thread that leads."""
        while packet := self._buffer.receive_nowait(host.reports):
            self._target.on_packet(host, packet)
        self._target.on_all_read()

    def _receive_spinning(self, waited: Waitable) -> bool:
        """Receive what is there; poll for a moment if that has paid lately."""
        poll, spinner, guard = self._poller.poll, self._spinner, self._guard
        ready = poll(0)
        if ready:
            spinner.note(0.0)
            return self._receive(ready)
        started_s = self._wait_started_s = time.perf_counter()
        end_s = started_s + spinner.limit_s(self._target.is_crowded())
        while time.perf_counter() < end_s:
            if waited.done or guard.interrupted:
                return False
            _YIELD()
            ready = poll(0)
            if ready:
                spinner.note(time.perf_counter() - started_s)
                return self._receive(ready)
        return False

    def pump(self) -> None:
        """Receive what is there without waiting, if nobody leads; called now and then by threads
        that submit.
        """
        if self._leader is not None and self._leader == self._background_ident():
            # Two threads that work at once take the interpreter's lock from each other all the
            # time; one that does both is faster (measured: 1.7 times).
            self._pump_wanted = True
            self.wake()
            return
        self._lead_once(self._pump)

    def pump_servers(self, host: Any) -> None:
        """Read a fork server's news now, if nobody leads."""
        self._lead_once(self._target.on_server_news, host)

    def _lead_once(self, call: Callable[..., object], *args: Any) -> None:
        """Do something that only the leader may do, if nobody leads."""
        self._guard.enter()
        try:
            if not self._lead.acquire(False):
                return
            self._leader = threading.get_ident()
            try:
                call(*args)
            finally:
                self._leader = None
                self._lead.release()
                self._elect()
        finally:
            self._guard.leave()

    def _pump(self) -> None:
        for _ in range(_PUMP_MAX):
            ready = self._poller.poll(0)
            if not ready or not self._receive(ready):
                break
            self._target.settle()
        self._last_pump_s = time.monotonic()

    def wake_if_other(self) -> None:
        """Make the leader look around, if it sleeps and is not the calling thread."""
        if self._asleep and self._leader != threading.get_ident():
            self._asleep = False  # one ring is enough
            self.wake()

    # ---- the background thread -------------------------------------------------------------------

    def ensure_background(self) -> None:
        """Make sure that somebody will lead although no caller waits."""
        if self._parked:
            self._parked = False
            self._park.ring()
        elif self._background is None and not self._stopped and not self.is_always_led:
            thread = threading.Thread(
                target=self._run_background, name="poolray-reactor", daemon=True
            )
            self._background = thread
            thread.start()

    def _run_background(self) -> None:
        idle_rounds = 0
        round_s = self._takeover_s
        never = Waitable()
        while not self._stopped:
            if self._target.has_work():
                idle_rounds = 0
                quiet = (
                    self._background_led and not self._foreground
                ) or time.monotonic() - self._last_pump_s > self._takeover_s
                # Also while callers wait: if an election was lost, this holds the next one.
                if quiet and self._lead.acquire(False):
                    self._lead_in_background(never)
                    round_s = self._takeover_s
                    continue
                self._park.wait(round_s)
                round_s = min(_ROUND_MAX_S, 2 * round_s) if self._foreground else self._takeover_s
                continue
            idle_rounds += 1
            if self._lead.acquire(False):  # else whoever leads does it
                self._leader = threading.get_ident()
                try:
                    self._target.settle()  # what finalizers have noted meanwhile
                finally:
                    self._leader = None
                    self._lead.release()
                    self._elect()
            # Where nobody waits by leading (callbacks, awaits), the next submission rings at once;
            # a loop of calls that lead themselves is spared the bell.
            if self._background_led or idle_rounds > _IDLE_ROUNDS:
                self._park_until_needed()
                idle_rounds = 0
                round_s = self._takeover_s
            else:
                self._park.wait(_ROUND_MAX_S)

    def _park_until_needed(self) -> None:
        """Sleep until a submission or a server's news; costs nothing meanwhile."""
        self._parked = True
        if self._target.has_work() or self._target.has_notes() or self._stopped:
            self._parked = False
            return
        watched = list(self._watched.items())  # (other threads add to it)
        servers = {d: host for d, (channel, host) in watched if channel is None}
        heard = self._park.wait_with(list(servers), self._target.next_timeout())
        self._parked = False
        for descriptor in heard:
            if self._lead.acquire(False):  # else whoever leads hears it too
                self._leader = threading.get_ident()
                try:
                    self._target.on_server_news(servers[descriptor])
                    self._target.settle()
                finally:
                    self._leader = None
                    self._lead.release()
                    self._elect()
        timeout = self._target.next_timeout()
        if timeout is not None and timeout <= 0:
            self._target.tick()
            self._target.settle()

    def _lead_in_background(self, never: Waitable) -> None:
        """Lead until a caller wants to, or there is nothing left to wait for."""
        self._background_led = True
        self._leader = threading.get_ident()
        try:
            while self._target.has_work() and not self._foreground and not self._stopped:
                if self._pump_wanted:
                    self._pump_wanted = self._background_led = False
                    self._last_pump_s = time.monotonic()
                    return
                if self._target.is_unsettled():
                    self._target.settle()
                    continue
                timeout = self._target.next_timeout()
                if timeout is not None and timeout <= 0:
                    self._tick()
                    continue
                timeout_ms = None if timeout is None else timeout * 1000.0 + 0.05
                self._asleep = True
                if self._target.has_notes():
                    self._target.settle()
                elif not self._target.is_unsettled():
                    self._handle_ready(self._poller.poll(timeout_ms))
                self._asleep = False
        finally:
            self._leader = None
            self._lead.release()
            self._elect()

    def stop(self) -> None:
        """End the background thread."""
        self._stopped = True
        self._park.ring()
        self.wake()
        thread = self._background
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def wait_for_callers(self, timeout_s: float) -> None:
        """After `stop`: let threads that still wait here notice that it is over."""
        deadline = time.monotonic() + timeout_s
        me = 1 if self._leader == threading.get_ident() else 0
        while self._foreground > me and time.monotonic() < deadline:
            self.wake()
            self._elect()
            time.sleep(0.001)

    def close(self) -> None:
        """Let go of descriptors, after `stop`, or in a forked child, where nothing runs."""
        self._stopped = True
        self._bell.close()
        self._park.close()
