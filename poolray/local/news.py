"""News: what libraries in workers tell the driver beside results, as progress and metrics.

    worker: tell() ──WorkerNews──▶ shell ──▶ driver: the module that takes news of the topic

What: sends news; finds who takes them.
Who calls: `util.metrics` and `experimental.tqdm_ray`; the runtime, with what has come; workers,
before they report.
May touch: the worker's report channel; imports of the modules that take news.
Invariants: news sent before a result arrives before it. The sender waits for room in the channel
only where it is about to report a result, for which it would wait as well.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable

__all__ = ["NEWS_BYTES_MAX", "before_reports", "flush", "hand_over", "install", "tell"]

_log = logging.getLogger(__name__)

#: News are one packet.
NEWS_BYTES_MAX = 64 * 1024

#: Topic -> the module whose `on_news` takes its news. By name, for these are faces, above this
#: room; imported when the first come, for few programs use them.
_TAKERS = {"metrics": "poolray.util.metrics", "progress": "poolray.experimental.tqdm_ray"}

#: Called before each report of results, in a worker.
_flushers: list[Callable[[], object]] = []
#: Sends news, and waits for room or not; None: this process is no worker.
_send: Callable[[str, bytes, bool], bool] | None = None


def install(send: Callable[[str, bytes, bool], bool]) -> None:
    """This process is a worker, which sends news so."""
    global _send
    _send = send


def tell(topic: str, data: bytes, *, wait: bool = False) -> bool:
    """In a worker: send news to the driver; False: there is no room now, or no driver."""
    return _send is not None and _send(topic, data, wait)


def before_reports(call: Callable[[], object]) -> None:
    """Call this before results are reported, so that whoever has these has the news too.

    It may run in a signal handler, on top of any code of this process.
    """
    _flushers.append(call)


def flush() -> None:
    """Results are about to be reported."""
    for call in _flushers:
        call()


def hand_over(topic: str, data: bytes, address: str = "") -> None:
    """In the driver: news have come, from a worker of the node with this address; empty: ours."""
    try:
        importlib.import_module(_TAKERS[topic]).on_news(data, address)
    except Exception:
        # Whoever waits for results in this thread has nothing to do with it.
        _log.exception("News on %s could not be taken.", topic)


def _after_fork_in_child() -> None:
    global _send
    _send = None
    _flushers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
