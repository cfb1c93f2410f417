"""Progress bars in tasks and actors, drawn by the driver, in a terminal or a notebook.

    worker: tqdm.update() ──BarState, now and then──▶ driver: one real bar of `tqdm` for each

What: `tqdm`, with which any process of a job reports progress, and `safe_print`, which prints above
the bars.
Who calls: user code, in any process.
May touch: news to the driver; there the package `tqdm`, which is imported with the first bar
(`pip install poolray[tqdm]`), and `builtins.print` while bars are shown.
Invariants: only the driver draws, so bars of many processes do not overwrite each other; the last
state of a bar is always sent; bars of processes that have died are taken away.
"""

from __future__ import annotations

import builtins
import itertools
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar, final

import msgspec

from poolray.local import news, process_state
from poolray.local import runtime as local_runtime

T = TypeVar("T")

__all__ = ["safe_print", "tqdm"]

#: A bar tells of its progress so often.
_FLUSH_EVERY_S = 0.1
#: Whether the processes that bars belong to live is looked at so often.
_LOOK_EVERY_S = 1.0
#: Ends of bars that wait for room in the channel to a driver that does nothing.
_UNSENT_MAX = 1000


class _BarState(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A bar, as its process last said."""

    pid: int
    number: int  #: tells bars of one process apart
    position: int
    description: str
    unit: str
    total: int | float | None
    count: int | float
    closed: bool
    address: str = ""  #: of its process's node, where that is another one than the driver's

    @property
    def source(self) -> tuple[str, int]:
        """Whose bar it is."""
        return self.address, self.pid


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_BarState).decode
_numbers = itertools.count()


@final
class tqdm(Generic[T]):  # the name that everybody knows
    """A progress bar that may be used in any process of a job.

    Parameters
    ----------
    iterable : iterable, optional
        Iterating over the bar iterates over this, and counts.
    desc : str, optional
        Stands in front of the bar.
    total : int, optional
        How many there will be; taken from `iterable` if that has a length.
    unit : str, default "it"
    position : int, default 0
        The line of the bar, among those of its process.
    flush_interval_s : float, seconds, default 0.1
        The driver is told of changes so often at the most; of the end always.

    Notes
    -----
    Nothing is shown where the driver lacks the package `tqdm`. What workers print themselves may
    tear bars in a terminal for a moment; use few lines, or log to files.

    Examples
    --------
    >>> import poolray
    >>> from poolray.experimental import tqdm_ray
    >>> @poolray.remote
    ... def work(items: int) -> int:
    ...     return sum(1 for _ in tqdm_ray.tqdm(range(items), desc="working"))
    >>> poolray.get(work.remote(1000))
    1000
    """

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        desc: str | None = None,
        total: int | None = None,
        unit: str | None = None,
        position: int | None = None,
        flush_interval_s: float | None = None,
    ) -> None:
        if total is None and iterable is not None:
            try:
                total = len(iterable)  # type: ignore[arg-type]
            except (TypeError, AttributeError):
                total = None
        self._iterable = iterable
        self._description = desc or ""
        self._total: float | None = total
        self._unit = unit or "it"
        self._position = position or 0
        self._flush_every_s = _FLUSH_EVERY_S if flush_interval_s is None else flush_interval_s
        self._number = next(_numbers)
        self._pid = os.getpid()
        self._count: float = 0
        self._closed = False
        self._shown_at = 0.0
        self._shown: _BarState | None = None

    def __iter__(self) -> Iterator[T]:
        if self._iterable is None:
            raise ValueError("No iterable provided")
        try:
            for item in self._iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def __enter__(self) -> tqdm[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """So many more are done."""
        self._count += n
        self._tell()

    def set_description(self, desc: str) -> None:
        """Another text in front of the bar."""
        self._description = desc
        self._tell()

    def refresh(self) -> None:
        """Show what was set by `n` and `total`."""
        self._tell()

    def close(self) -> None:
        """The bar is done: show its last state, and take no line for it any more."""
        if not self._closed:
            self._closed = True
            self._tell(at_once=True)

    @property
    def total(self) -> float | None:
        """How many there will be."""
        return self._total

    @total.setter
    def total(self, total: float | None) -> None:
        self._total = total

    @property
    def n(self) -> float:
        """How many are done."""
        return self._count

    @n.setter
    def n(self, n: float) -> None:
        self._count = n

    def _tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._shown_at < self._flush_every_s:
            return
        self._shown_at = now
        state = _BarState(
            pid=self._pid,
            number=self._number,
            position=self._position,
            description=self._description,
            unit=self._unit,
            total=self._total,
            count=self._count,
            closed=self._closed,
        )
        if process_state.is_worker():
            _unsent.tell(_encode(state), at_once)
        else:
            _board.show(state)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A progress bar belongs to the process that made it: make one in each task."
        )


@final
class _Unsent:
    """In a worker: what the driver must be told and there was no room for."""

    def __init__(self) -> None:
        #: Ends of bars; when there are too many, the oldest bars stay on the screen.
        self._ends: deque[bytes] = deque(maxlen=_UNSENT_MAX)
        self._goes_before_reports = False

    def tell(self, state: bytes, must_arrive: bool) -> None:
        """Tell the driver now, without waiting; else later, if it must arrive."""
        if self._send_ends() and news.tell("progress", state):
            return
        if must_arrive:
            self._ends.append(state)
            if not self._goes_before_reports:
                self._goes_before_reports = True
                news.before_reports(self._send_ends)

    def _send_ends(self) -> bool:
        """Send what waits; whether nothing waits any more."""
        while self._ends:
            try:
                end = self._ends.popleft()
            except IndexError:
                break  # another thread was faster
            if not news.tell("progress", end):
                self._ends.appendleft(end)
                return False
        return True


_unsent = _Unsent()


def safe_print(*values: Any, **options: Any) -> None:
    """`print`, above the bars.

    While bars are shown in a driver, `print` does this by itself; `POOLRAY_tqdm_patch_print=0` in
    the environment leaves `print` alone.

    Examples
    --------
    >>> from poolray.experimental.tqdm_ray import safe_print
    >>> safe_print("between", "bars")
    between bars
    """
    if options.get("file") not in (sys.stdout, sys.stderr, None):
        _print(*values, **options)
        return
    with _board.hidden():
        _print(*values, **options)


_print = builtins.print


def on_news(data: bytes, address: str) -> None:
    """In the driver: a bar in a worker has changed."""
    _board.show(msgspec.structs.replace(_decode(data), address=address))


# ---- the driver's side ---------------------------------------------------------------------------


@final
class _Shown:
    """A bar that the driver shows."""

    def __init__(self, state: _BarState, bar: Any) -> None:
        self.state = state
        self.bar = bar


@final
class _Board:
    """All bars that are shown, each on a line of its own."""

    def __init__(self) -> None:
        #: Guards all below; taken again by `print` in the middle of a redraw.
        self._lock = threading.RLock()
        #: (source, number) -> its bar, in the order of the lines.
        self._bars: dict[tuple[tuple[str, int], int], _Shown] = {}
        self._looked_at = 0.0
        self._has_patched = False
        #: `tqdm.auto.tqdm`; None: not looked for yet, or not there.
        self._make: Any = None
        self._is_missing = False

    def show(self, state: _BarState) -> None:
        """Draw a bar as it is now."""
        with self._lock:
            if not self._find_tqdm():
                return
            key = state.source, state.number
            shown = self._bars.get(key)
            if shown is None:
                shown = self._open(state)
            self._draw(shown, state)
            if state.closed:
                self._close(key)
            self._remove_dead()

    def _find_tqdm(self) -> bool:
        if self._make is None and not self._is_missing:
            try:
                with warnings.catch_warnings():
                    # In a notebook without ipywidgets it says that the bars will be text.
                    warnings.simplefilter("ignore")
                    from tqdm.auto import tqdm as make
            except ImportError:
                self._is_missing = True
                warnings.warn(
                    "tqdm is not installed. Progress bars will be disabled: "
                    "pip install 'poolray[tqdm]'",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self._make = make
        return self._make is not None

    def _open(self, state: _BarState) -> _Shown:
        bar = self._make(
            desc=_label(state),
            total=state.total,
            unit=state.unit,
            position=self._line_of(state),
            dynamic_ncols=True,
            unit_scale=True,
        )
        shown = self._bars[state.source, state.number] = _Shown(state, bar)
        self._sort()
        self._patch_print(True)
        return shown

    def _draw(self, shown: _Shown, state: _BarState) -> None:
        bar, before = shown.bar, shown.state
        if _label(state) != _label(before):
            bar.set_description(_label(state), refresh=False)
        if state.total != before.total:
            if hasattr(bar, "reset") and hasattr(bar, "container"):  # of a notebook
                bar.container.children[1].max = state.total
            bar.total = state.total
        bar.n = state.count
        shown.state = state
        bar.refresh()

    def _close(self, key: tuple[tuple[str, int], int]) -> None:
        shown = self._bars.pop(key)
        shown.bar.close()
        self._sort()
        if not self._bars:
            self._patch_print(False)

    def _line_of(self, state: _BarState) -> int:
        """Bars of one process stand together, in the order that it wants."""
        first = 0
        for source, height in self._heights().items():
            if source == state.source:
                break
            first += height
        return first + state.position

    def _heights(self) -> dict[tuple[str, int], int]:
        heights: dict[tuple[str, int], int] = {}
        for shown in self._bars.values():
            source, height = shown.state.source, shown.state.position + 1
            heights[source] = max(heights.get(source, 0), height)
        return heights

    def _sort(self) -> None:
        """Bars have come or gone: those below move."""
        for shown in self._bars.values():
            line = -self._line_of(shown.state)
            if getattr(shown.bar, "pos", line) != line:
                shown.bar.clear()
                shown.bar.pos = line
                shown.bar.refresh()

    def _remove_dead(self) -> None:
        """Take away the bars of processes that have ended without closing them."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        for source in list(self._heights()):
            address, pid = source
            # (Of processes of other machines nothing is known here.)
            if not address and pid != os.getpid() and not _is_alive(pid):
                for key in [key for key in self._bars if key[0] == source]:
                    self._close(key)

    def count(self) -> int:
        """How many bars are shown."""
        return len(self._bars)

    # ---- printing between bars -------------------------------------------------------------------

    def hidden(self) -> _Hidden:
        """What hides the bars while it is entered."""
        return _Hidden(self, self._lock)

    def clear(self) -> None:
        """Make room for text."""
        for shown in self._bars.values():
            shown.bar.clear()

    def refresh(self) -> None:
        """Draw all again."""
        for shown in self._bars.values():
            shown.bar.refresh()

    def _patch_print(self, patched: bool) -> None:
        runtime = local_runtime.current()
        wanted = patched and (runtime is None or bool(runtime.config.tqdm_patch_print))
        if wanted and not self._has_patched and builtins.print is _print:
            builtins.print = safe_print
            self._has_patched = True
        elif not patched and self._has_patched:
            self._has_patched = False
            if builtins.print is safe_print:
                builtins.print = _print


@final
class _Hidden:
    """Hides the bars while it is entered."""

    def __init__(self, board: _Board, lock: Any) -> None:
        self._board = board
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()
        self._board.clear()

    def __exit__(self, *_: object) -> None:
        try:
            self._board.refresh()
        finally:
            self._lock.release()


def _label(state: _BarState) -> str:
    if state.source == ("", os.getpid()):
        return state.description
    where = f", ip={state.address}" if state.address else ""
    return f"(pid={state.pid}{where}) {state.description}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is somebody else's
    return True


_board = _Board()


def _after_fork_in_child() -> None:
    """The bars are the parent's; so is what it made of `print`."""
    global _board, _unsent
    _board = _Board()
    _unsent = _Unsent()
    if builtins.print is safe_print:
        builtins.print = _print


os.register_at_fork(after_in_child=_after_fork_in_child)
