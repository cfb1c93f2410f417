"""Metrics: counters, gauges and histograms of a whole job, for Prometheus to read in the driver.

    worker: inc, set, observe ── changes, with the next results ──▶ driver: sums ──▶ /metrics

What: the classes that programs record with; what they have recorded, in the driver, as samples, as
Prometheus's text and over HTTP.
Who calls: user code, in any process of a job.
May touch: news to the driver; for the text and HTTP the package `prometheus_client`, which is
imported when one of them is asked for (`pip install poolray[metrics]`).
Invariants: what a task has recorded is counted in the driver when its result is there. Counters and
histograms add up over processes; of a gauge the last value counts. A worker keeps only what it has
not sent; a crash loses that, and nothing else.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import msgspec

from poolray.local import news, process_state
from poolray.local import runtime as local_runtime

__all__ = [
    "Counter",
    "Gauge",
    "Histogram",
    "Metric",
    "MetricSample",
    "MetricsServer",
    "metrics_text",
    "samples",
    "start_metrics_server",
]

_VALID_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
#: A call that records much and never ends tells the driver so often.
_SEND_EVERY_S = 0.25


# ---- what is kept --------------------------------------------------------------------------------


class _Update(msgspec.Struct, array_like=True):
    """A series, in news: what was added, or in the driver: what is."""

    kind: str  #: "counter", "gauge" or "histogram"
    name: str
    description: str
    tag_keys: tuple[str, ...]
    tags: tuple[str, ...]  #: values, in the order of the keys
    #: Sum of a counter or of a histogram's values, last value of a gauge.
    value: float = 0.0
    #: Upper ends of a histogram's buckets, without the infinite one.
    boundaries: tuple[float, ...] = ()
    #: How many values fell into each, and beyond.
    counts: list[int] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Update]).decode


@final
class _Store:
    """Series by name and tags: all of them in a driver, what was not sent in a worker."""

    def __init__(self) -> None:
        #: Guards the fields below.
        self.lock = threading.Lock()
        self.series: dict[tuple[str, tuple[str, ...], tuple[str, ...]], _Update] = {}
        #: Name -> kind: one name means one thing.
        self.kinds: dict[str, str] = {}
        self.sent_at = 0.0
        self.sends_before_reports = False

    def add(self, update: _Update) -> None:
        """Add a change, or take over a value; the caller holds the lock."""
        if self.kinds.setdefault(update.name, update.kind) != update.kind:
            return  # told of where the metric was made
        key = (update.name, update.tag_keys, update.tags)
        found = self.series.get(key)
        if found is None or found.boundaries != update.boundaries:
            self.series[key] = update
        elif update.kind == "gauge":
            found.value = update.value
        else:
            found.value += update.value
            for index, count in enumerate(update.counts):
                found.counts[index] += count


_store = _Store()


def _after_fork_in_child() -> None:
    """A worker, or a child of the user's: what was counted so far is its parent's affair."""
    global _store
    _store = _Store()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _record(update: _Update) -> None:
    store = _store
    with store.lock:
        store.add(update)
    if process_state.is_worker():
        if not store.sends_before_reports:
            store.sends_before_reports = True
            news.before_reports(_send_all)
        if time.monotonic() - store.sent_at > _SEND_EVERY_S:
            _send()


def _send_all() -> None:
    """A result is about to be reported: whoever has it shall have this too."""
    _send(wait=True)


def _send(*, wait: bool = False) -> None:
    """Tell the driver what was recorded; what there is no room for is kept for the next time."""
    store = _store
    # This may run in a signal handler, on top of whoever holds the lock.
    if not store.series or not store.lock.acquire(blocking=False):
        return
    try:
        store.sent_at = time.monotonic()
        for part in _parts(list(store.series.items())):
            if not news.tell("metrics", _encode([update for _, update in part]), wait=wait):
                return
            for key, _ in part:
                del store.series[key]
    finally:
        store.lock.release()


def _parts(items: list[tuple[Any, _Update]]) -> Iterator[list[tuple[Any, _Update]]]:
    """Series that fit one message."""
    part: list[tuple[Any, _Update]] = []
    size = 0
    for key, update in items:
        update_bytes = len(_encode(update))
        if part and size + update_bytes > news.NEWS_BYTES_MAX - 16:
            yield part
            part, size = [], 0
        part.append((key, update))
        size += update_bytes
    if part:
        yield part


def on_news(data: bytes, address: str) -> None:
    """In the driver: a worker has recorded something."""
    store = _store
    updates = _decode(data)
    with store.lock:
        for update in updates:
            store.add(update)


# ---- what users record with ----------------------------------------------------------------------


class Metric:
    """What counters, gauges and histograms have in common; not to be made itself.

    Examples
    --------
    >>> from poolray.util.metrics import Gauge, Metric
    >>> isinstance(Gauge("queue_length_of_an_example"), Metric)
    True
    """

    _kind = ""

    def __init__(
        self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None
    ) -> None:
        if type(self) is Metric:
            raise TypeError("make a Counter, a Gauge or a Histogram: a Metric records nothing")
        if not isinstance(description, str):
            raise TypeError(f"description should be a str, got: {type(description)}")
        self._is_discarded = not _check_name(name)
        self._name = name
        self._description = description
        self._tag_keys = tag_keys or ()
        self._default_tags: dict[str, str] = {}
        if not isinstance(self._tag_keys, tuple):
            raise TypeError(f"tag_keys should be a tuple type, got: {type(self._tag_keys)}")
        for key in self._tag_keys:
            if not isinstance(key, str):
                raise TypeError(f"Tag keys must be str, got {type(key)}.")
        with _store.lock:
            kind = _store.kinds.setdefault(name, self._kind)
        if kind != self._kind:
            raise ValueError(
                f"There is a {kind} named {name!r} already: give this {self._kind} another name."
            )

    def set_default_tags(self, default_tags: Mapping[str, str]) -> Any:
        """Tags that count where a record does not give them; gives the metric itself.

        Raises
        ------
        ValueError
            A key that is not among `tag_keys`.
        TypeError
            A value that is no string.
        """
        for key, value in default_tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key}.")
            _check_tag(value)
        self._default_tags = dict(default_tags)
        return self

    @property
    def info(self) -> dict[str, Any]:
        """`name`, `description`, `tag_keys` and `default_tags`."""
        return {
            "name": self._name,
            "description": self._description,
            "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }

    def _update(self, value: float, tags: Mapping[str, str] | None) -> _Update | None:
        """What a record changes; None: the metric has no valid name."""
        if self._is_discarded:
            return None
        if tags:
            for tag in tags.values():
                _check_tag(tag)
            given: Mapping[str, str] = {**self._default_tags, **tags}
        else:
            given = self._default_tags
        missing = [key for key in self._tag_keys if key not in given]
        if missing:
            raise ValueError(f"Missing value for tag key(s): {','.join(missing)}.")
        return _Update(
            self._kind,
            self._name,
            self._description,
            self._tag_keys,
            tuple(given[key] for key in self._tag_keys),
            float(value),
        )

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._arguments(), self._default_tags)

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._description, self._tag_keys


def _rebuild(kind: type[Metric], arguments: tuple[Any, ...], tags: dict[str, str]) -> Any:
    return kind(*arguments).set_default_tags(tags)


def _check_name(name: str) -> bool:
    """Whether a metric can have this name; a bad one is told of, and its records are dropped."""
    if len(name) == 0:
        raise ValueError("Empty name is not allowed. Please provide a metric name.")
    if not _VALID_NAME.fullmatch(name):
        warnings.warn(
            f"Invalid metric name: {name}. Metric will be discarded and data will not be collected "
            "or published. Metric names can only contain letters, numbers, _, and :. Metric names "
            "cannot start with numbers.",
            UserWarning,
            stacklevel=4,
        )
        return False
    if ":" in name:
        warnings.warn(
            f"Metric name {name} contains a : character, which is no longer allowed. Please "
            "migrate to the new metric name format. This will be an error in the future.",
            FutureWarning,
            stacklevel=4,
        )
    return True


def _check_tag(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Tag values must be str, got {type(value)}.")


def _check_number(value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"value must be int or float, got {type(value)}.")


@final
class Counter(Metric):
    """A number that only grows, summed over all processes of the job.

    Parameters
    ----------
    name : str
        Letters, digits and underscores; one name means one metric in the whole job.
    description : str, default ""
    tag_keys : tuple of str, optional
        What its values are told apart by; each record gives, or has by default, all of them.

    Examples
    --------
    >>> import poolray
    >>> from poolray.util.metrics import Counter, samples
    >>> @poolray.remote
    ... def work(size: int) -> None:
    ...     counter = Counter("handled_items", "Items that are done.", tag_keys=("kind",))
    ...     counter.inc(size, tags={"kind": "small" if size < 10 else "large"})
    >>> done = poolray.get([work.remote(size) for size in (1, 2, 30)])
    >>> for sample in samples():
    ...     print(sample.name, sample.tags, sample.value)
    handled_items {'kind': 'small'} 3.0
    handled_items {'kind': 'large'} 30.0
    """

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Add a number to it.

        Parameters
        ----------
        value : float, default 1
            Above 0.
        tags : dict of str to str, optional
            Beside the default ones, or in their place; those that are not declared are ignored.

        Raises
        ------
        ValueError
            The number is not above 0, or a declared tag has no value.
        TypeError
            That is no number, or a tag's value is no string.
        """
        _check_number(value)
        if value <= 0:
            raise ValueError(f"value must be >0, got {value}")
        update = self._update(value, tags)
        if update is not None:
            _record(update)


@final
class Gauge(Metric):
    """A number that goes up and down; the last one that any process has set counts.

    Parameters
    ----------
    name, description, tag_keys
        As for `Counter`. Give it a tag for the process if each has a value of its own.

    Examples
    --------
    >>> from poolray.util.metrics import Gauge, samples
    >>> temperature = Gauge("temperature", "Degrees.", tag_keys=("room",))
    >>> temperature.set(20.5, tags={"room": "1"})
    >>> temperature.set(21, tags={"room": "1"})
    >>> [(sample.tags, sample.value) for sample in samples() if sample.name == "temperature"]
    [({'room': '1'}, 21.0)]
    """

    _kind = "gauge"

    def set(self, value: float | None, tags: Mapping[str, str] | None = None) -> None:
        """Give it another value; None changes nothing.

        Raises
        ------
        ValueError
            A declared tag has no value.
        TypeError
            That is no number, or a tag's value is no string.
        """
        if value is None:
            return
        _check_number(value)
        update = self._update(value, tags)
        if update is not None:
            _record(update)


@final
class Histogram(Metric):
    """How many values fell into which bucket, summed over all processes of the job.

    Parameters
    ----------
    name, description, tag_keys
        As for `Counter`.
    boundaries : list of float
        Upper ends of the buckets, above 0 and ascending; values above the last are counted too.

    Examples
    --------
    >>> from poolray.util.metrics import Histogram, samples
    >>> latency = Histogram("latency_s", "Seconds.", boundaries=[0.1, 1.0])
    >>> for seconds in (0.05, 0.06, 0.5, 7.0):
    ...     latency.observe(seconds)
    >>> [sample.buckets for sample in samples() if sample.name == "latency_s"]
    [{0.1: 2, 1.0: 3, inf: 4}]
    """

    _kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys)
        if boundaries is None or len(boundaries) == 0:
            raise ValueError(
                "boundaries argument should be provided when using the Histogram class. e.g., "
                'Histogram("name", boundaries=[1.0, 2.0])'
            )
        for index, boundary in enumerate(boundaries):
            if boundary <= 0:
                raise ValueError(
                    f"Invalid `boundaries` argument at index {index}, {boundaries}. Use positive "
                    "values for the arguments."
                )
        if list(boundaries) != sorted(set(boundaries)):
            raise ValueError(f"Invalid `boundaries` argument: {boundaries} does not ascend.")
        self.boundaries = boundaries
        self._ends = tuple(map(float, boundaries))

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Count a value.

        Raises
        ------
        ValueError
            A declared tag has no value.
        TypeError
            That is no number, or a tag's value is no string.
        """
        _check_number(value)
        update = self._update(value, tags)
        if update is not None:
            update.boundaries = self._ends
            update.counts = [0] * (len(self._ends) + 1)
            update.counts[bisect.bisect_left(self._ends, value)] = 1
            _record(update)

    @property
    def info(self) -> dict[str, Any]:
        """As of other metrics, and `boundaries`."""
        return {**super().info, "boundaries": self.boundaries}

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._description, self.boundaries, self._tag_keys


# ---- what the driver shows -----------------------------------------------------------------------


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricSample:
    """A metric's value for some tags. Made by `samples`."""

    kind: str  #: "counter", "gauge" or "histogram"
    name: str
    description: str
    tags: dict[str, str]
    value: float  #: of a histogram: the sum of the values
    #: Of a histogram: upper end -> how many values are up to that; the last is `inf`.
    buckets: dict[float, int] | None = None


def samples() -> list[MetricSample]:
    """What this process and the workers of its job have recorded, by name.

    In a worker: what it has not sent to the driver.

    Examples
    --------
    >>> from poolray.util.metrics import Counter, samples
    >>> Counter("wheels").inc(4)
    >>> [sample.value for sample in samples() if sample.name == "wheels"]
    [4.0]
    """
    runtime = local_runtime.current()
    if runtime is not None and not process_state.is_worker():
        runtime.reactor.pump()  # while the program does nothing nobody reads what has come
    with _store.lock:
        found = [_sample_of(update) for update in _store.series.values()]
    return sorted(found, key=lambda sample: sample.name)


def _sample_of(update: _Update) -> MetricSample:
    buckets: dict[float, int] | None = None
    if update.kind == "histogram":
        buckets, total = {}, 0
        for end, count in zip((*update.boundaries, float("inf")), update.counts):
            total += count
            buckets[end] = total
    return MetricSample(
        kind=update.kind,
        name=update.name,
        description=update.description,
        tags=dict(zip(update.tag_keys, update.tags)),
        value=update.value,
        buckets=buckets,
    )


def metrics_text(prefix: str = "") -> str:
    """All samples in the text format that Prometheus reads.

    Parameters
    ----------
    prefix : str, default ""
        Put before each name: "ray_" gives the names that dashboards made for Ray expect.

    Raises
    ------
    ImportError
        The package `prometheus_client` is not there.

    Examples
    --------
    >>> from poolray.util.metrics import Counter, metrics_text
    >>> Counter("doors", "Doors that were opened.").inc()
    >>> "doors_total 1.0" in metrics_text()
    True
    """
    client = _prometheus()
    return str(client.generate_latest(_Collector(prefix)).decode())


def _prometheus() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise ImportError(
            "Metrics for Prometheus need the package prometheus_client: "
            "pip install 'poolray[metrics]'"
        ) from error
    return prometheus_client


@final
class _Collector:
    """The samples as `prometheus_client` wants them; also takes the part of its registry."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._core: Any = _prometheus().core

    def collect(self) -> Iterator[Any]:
        """A family for each name."""
        by_name: dict[str, list[MetricSample]] = {}
        for sample in samples():
            by_name.setdefault(sample.name, []).append(sample)
        for named in by_name.values():
            yield self._family(named)

    def _family(self, named: list[MetricSample]) -> Any:
        first = named[0]
        kinds = {
            "counter": self._core.CounterMetricFamily,
            "gauge": self._core.GaugeMetricFamily,
            "histogram": self._core.HistogramMetricFamily,
        }
        # Processes may have declared different tags for one name.
        keys = list(dict.fromkeys(key for sample in named for key in sample.tags))
        family = kinds[first.kind](self._prefix + first.name, first.description, labels=keys)
        for sample in named:
            labels = [sample.tags.get(key, "") for key in keys]
            if sample.buckets is None:
                family.add_metric(labels, sample.value)
            else:
                ends = [
                    ("+Inf" if end == float("inf") else str(end), count)
                    for end, count in sample.buckets.items()
                ]
                family.add_metric(labels, buckets=ends, sum_value=sample.value)
        return family


@final
class MetricsServer:
    """A small HTTP server that Prometheus reads from. Made by `start_metrics_server`.

    Attributes
    ----------
    port : int
    url : str
    """

    def __init__(self, server: Any, thread: threading.Thread, addr: str) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port
        self.url = f"http://{addr}:{self.port}/metrics"

    def stop(self) -> None:
        """End it; any number of times."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_metrics_server(port: int = 0, addr: str = "127.0.0.1", prefix: str = "") -> MetricsServer:
    """Serve the samples over HTTP, for Prometheus, from a thread of the driver.

    Parameters
    ----------
    port : int, default 0
        0: any that is free.
    addr : str, default "127.0.0.1"
        Where to listen; "0.0.0.0" lets other machines read.
    prefix : str, default ""
        As in `metrics_text`.

    Raises
    ------
    ImportError
        The package `prometheus_client` is not there.
    OSError
        The port is taken.

    Examples
    --------
    >>> import urllib.request
    >>> from poolray.util.metrics import Counter, start_metrics_server
    >>> Counter("visits").inc(2)
    >>> with start_metrics_server() as server:
    ...     text = urllib.request.urlopen(server.url).read().decode()
    >>> "visits_total 2.0" in text
    True
    """
    client = _prometheus()
    server, thread = client.start_http_server(port, addr, registry=_Collector(prefix))
    return MetricsServer(server, thread, addr)
