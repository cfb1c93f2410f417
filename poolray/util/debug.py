"""Say something once.

What: `log_once` and its switches.
Who calls it: user code, around a warning that would repeat.
May touch: the clock.
Invariants: what was said is remembered per process.
"""

from __future__ import annotations

import time

__all__ = ["disable_log_once_globally", "enable_periodic_logging", "log_once"]

_PERIOD_S = 60.0

#: Keys that were asked about, as an ordered set.
_seen: dict[str, None] = {}
_is_disabled = False
_is_periodic = False
_last_s = 0.0


def log_once(key: str) -> bool:
    """Whether this is the first time that this process asks about a key.

    Parameters
    ----------
    key : str
        Which place asks.

    Returns
    -------
    bool
        False from the second time on; always False after `disable_log_once_globally()`.

    Examples
    --------
    >>> from poolray.util import log_once
    >>> [log_once("shape of the input") for _ in range(3)]
    [True, False, False]
    """
    global _last_s
    if _is_disabled:
        return False
    if key not in _seen:
        _seen[key] = None
        _last_s = time.monotonic()
        return True
    if _is_periodic and time.monotonic() - _last_s > _PERIOD_S:
        _seen.clear()
        _last_s = time.monotonic()
    return False


def disable_log_once_globally() -> None:
    """`log_once` is False from now on, in this process.

    Examples
    --------
    >>> from poolray.util import disable_log_once_globally, log_once
    >>> disable_log_once_globally()  # doctest: +SKIP
    >>> log_once("a new key")  # doctest: +SKIP
    False
    """
    global _is_disabled
    _is_disabled = True


def enable_periodic_logging() -> None:
    """`log_once` forgets what it was asked when nothing new was said for a minute.

    Examples
    --------
    >>> from poolray.util import enable_periodic_logging
    >>> enable_periodic_logging()
    """
    global _is_periodic
    _is_periodic = True
