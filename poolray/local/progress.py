"""Progress bars of maps.

What: a bar of tqdm that items advance as their results come, in a terminal or a notebook.
Who calls: `pool.py` and `executor.py` when `progress=` was given.
May touch: standard streams, through tqdm.
Invariants: nothing here is imported before somebody asks for a bar; a bar that cannot be drawn (its
stream was closed) costs no result.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

#: What `progress=` takes.
Progress: TypeAlias = "bool | Mapping[str, Any] | None"


@final
class ProgressBar:
    """One bar, closed when as many chunks have ended as there are.

    Parameters
    ----------
    options : mapping
        For tqdm.
    items : int or None
        How many items there are, where that is known.
    """

    def __init__(self, options: Mapping[str, Any], items: int | None) -> None:
        self._lock = threading.Lock()
        self._bar: Any = _tqdm()(**{"total": items, **options})
        self._chunks = 0
        self._expected: int | None = None

    def advance(self, items: int) -> None:
        """A chunk of so many items has ended."""
        with self._lock:
            self._chunks += 1
            self._draw(lambda bar: bar.update(items))
            self._close_if_complete()

    def expect(self, chunks: int, items: int | None = None) -> None:
        """It is known now how many there are; all may have ended already."""
        with self._lock:
            self._expected = chunks
            if self._bar is not None and self._bar.total is None and items is not None:
                self._bar.total = items
            self._close_if_complete()

    def close(self) -> None:
        """No more will come."""
        with self._lock:
            self._draw(lambda bar: bar.close())
            self._bar = None

    def _close_if_complete(self) -> None:
        if self._expected is not None and self._chunks >= self._expected:
            self._draw(lambda bar: bar.close())
            self._bar = None

    def _draw(self, draw: Callable[[Any], object]) -> None:
        if self._bar is None:
            return
        try:
            draw(self._bar)
        except Exception as error:
            self._bar = None
            warnings.warn(f"the progress bar cannot be drawn: {error!r}", RuntimeWarning, 2)

    def watching(
        self, on_chunk: Callable[[int, bool, Any], None], chunksize: int, items: int | None
    ) -> Callable[[int, bool, Any], None]:
        """`on_chunk`, and the bar advances; before it, for what that does may end the wait."""

        def watched(index: int, success: bool, value: Any) -> None:
            count = len(value) if success else chunksize
            self.advance(count if items is None else min(count, items - index * chunksize))
            on_chunk(index, success, value)

        return watched

    def advancing(self, items: int) -> Callable[[object], None]:
        """For the end of a future that stands for so many items."""
        return lambda _: self.advance(items)

    def expecting(
        self, on_exhausted: Callable[[int], None], chunksize: int
    ) -> Callable[[int], None]:
        """`on_exhausted`, and the bar knows how many chunks there are."""

        def exhausted(chunks: int) -> None:
            self.expect(chunks, chunks if chunksize == 1 else None)
            on_exhausted(chunks)

        return exhausted

    @property
    def is_closed(self) -> bool:
        """Whether there is nothing left to draw."""
        return self._bar is None


def make_bar(progress: Progress, items: int | None) -> ProgressBar | None:
    """The bar that `progress=` asks for, if it does.

    Raises
    ------
    ImportError
        tqdm is not installed.
    TypeError
        It is neither a bool nor options.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return ProgressBar({}, items)
    if isinstance(progress, Mapping):
        return ProgressBar(progress, items)
    raise TypeError(f"progress must be True, False or a dict of options for tqdm, not {progress!r}")


def _tqdm() -> Any:
    try:
        with warnings.catch_warnings():
            # A notebook without ipywidgets gets a bar of text.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress= draws its bar with tqdm, which is not installed: "
            "pip install 'poolray[progress]'"
        ) from None
    return tqdm


__all__ = ["Progress", "ProgressBar", "make_bar"]
