"""What workers record arrives in the driver, added up, and Prometheus can read it."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

import poolray
from poolray.util.metrics import (
    Counter,
    Gauge,
    Histogram,
    metrics_text,
    samples,
    start_metrics_server,
)
from tests.integration.support import wait_until


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    poolray.shutdown()
    with poolray.init(num_cpus=2):
        yield


def value_of(name: str, **tags: str) -> float:
    """0: nothing was recorded."""
    return sum(s.value for s in samples() if s.name == name and s.tags == tags)


def test_what_a_task_has_recorded_is_there_with_its_result() -> None:
    @poolray.remote
    def work(number: int) -> None:
        Counter("tasks_done", tag_keys=("parity",)).inc(tags={"parity": str(number % 2)})

    for done in range(1, 21):
        poolray.get(work.remote(0))
        assert value_of("tasks_done", parity="0") == done
    poolray.get([work.remote(n) for n in range(100)])
    assert value_of("tasks_done", parity="0") == 70
    assert value_of("tasks_done", parity="1") == 50


def test_actors_of_every_kind_count() -> None:
    counter = Counter("actors_done")

    class Plain:
        def work(self) -> None:
            counter.inc()

    class Async:
        async def work(self) -> None:
            counter.inc()

    plain, threaded = (poolray.remote(Plain).options(max_concurrency=n).remote() for n in (1, 3))
    on_loop = poolray.remote(Async).remote()
    poolray.get([actor.work.remote() for actor in (plain, threaded, on_loop) for _ in range(10)])
    assert value_of("actors_done") == 30


def test_pools_and_executors_count_beside_the_driver() -> None:
    counter = Counter("pools_done")
    counter.inc(1000)
    with poolray.Pool(2) as pool:
        pool.map(lambda _: counter.inc(), range(10))
    with poolray.Executor(2) as executor:
        list(executor.map(lambda _: counter.inc(10), range(10)))
    assert value_of("pools_done") == 1110


def test_a_worker_does_not_count_again_what_its_driver_had_counted() -> None:
    counter = Counter("counted_once")
    counter.inc(5)
    poolray.shutdown()  # the next workers are forked with this count in their memory

    @poolray.remote
    def work() -> None:
        counter.inc()

    poolray.get([work.remote() for _ in range(4)])
    assert value_of("counted_once") == 9


def test_histograms_add_up_bucket_by_bucket() -> None:
    histogram = Histogram("sizes", boundaries=[1, 10, 100], tag_keys=("kind",))

    @poolray.remote
    def work(value: float) -> None:
        histogram.observe(value, tags={"kind": "x"})

    poolray.get([work.remote(value) for value in (0.5, 1, 2, 10, 11, 1000)])
    (sample,) = (s for s in samples() if s.name == "sizes")
    assert sample.buckets == {1.0: 2, 10.0: 4, 100.0: 5, float("inf"): 6}
    assert sample.value == 1024.5


def test_of_a_gauge_the_last_value_counts() -> None:
    gauge = Gauge("level")

    @poolray.remote
    def work(value: float) -> None:
        gauge.set(value)

    for value in (1, 5, 3):
        poolray.get(work.remote(value))
    assert value_of("level") == 3


def test_a_call_that_does_not_end_is_heard_of_too() -> None:
    @poolray.remote
    class Server:
        def __init__(self) -> None:
            threading.Thread(target=self.serve, daemon=True).start()

        def serve(self) -> None:
            counter, pause = Counter("served"), threading.Event()
            while not pause.wait(0.01):
                counter.inc()

        def pid(self) -> int:
            return os.getpid()

    server = Server.remote()
    poolray.get(server.pid.remote())
    # The driver does nothing but look.
    wait_until(lambda: value_of("served") > 50)


def test_a_crash_costs_only_what_was_not_sent() -> None:
    @poolray.remote(max_retries=0)
    def work(crash: bool) -> None:
        Counter("before_crash").inc()
        if crash:
            os.kill(os.getpid(), signal.SIGKILL)

    poolray.get([work.remote(False) for _ in range(10)])
    with pytest.raises(poolray.exceptions.WorkerCrashedError):
        poolray.get(work.remote(True))
    poolray.get(work.remote(False))
    assert 11 <= value_of("before_crash") <= 12


def test_many_series_take_several_messages() -> None:
    @poolray.remote
    def work() -> None:
        gauge = Gauge("many", tag_keys=("which",))
        for number in range(5000):
            gauge.set(number, tags={"which": f"series number {number}"})

    poolray.get(work.remote())
    assert sum(1 for sample in samples() if sample.name == "many") == 5000


def test_prometheus_reads_them_as_text_and_over_http() -> None:
    pytest.importorskip("prometheus_client")
    Counter("read_items", "Items.", tag_keys=("kind",)).inc(3, tags={"kind": 'a"b'})
    Histogram("read_s", "Seconds.", boundaries=[0.5]).observe(0.2)
    Gauge("read_level").set(-1.5)
    with start_metrics_server(prefix="ray_") as server:
        served = urllib.request.urlopen(server.url, timeout=10).read().decode()
    assert served == metrics_text("ray_")
    for line in (
        "# HELP ray_read_items_total Items.",
        "# TYPE ray_read_items_total counter",
        'ray_read_items_total{kind="a\\"b"} 3.0',
        'ray_read_s_bucket{le="0.5"} 1.0',
        'ray_read_s_bucket{le="+Inf"} 1.0',
        "ray_read_s_sum 0.2",
        "ray_read_level -1.5",
    ):
        assert line in served.splitlines()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.url, timeout=10)


def test_without_prometheus_client_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"poolray\[metrics\]"):
        metrics_text()


def test_processes_that_declare_different_tags_share_a_name() -> None:
    pytest.importorskip("prometheus_client")

    @poolray.remote
    def work() -> None:
        Counter("shared_name", tag_keys=("a",)).inc(tags={"a": "x"})

    Counter("shared_name", tag_keys=("b",)).inc(tags={"b": "y"})
    poolray.get(work.remote())
    lines = metrics_text().splitlines()
    assert 'shared_name_total{a="x",b=""} 1.0' in lines or (
        'shared_name_total{b="",a="x"} 1.0' in lines
    )


def test_recording_needs_no_runtime() -> None:
    poolray.shutdown()
    counter: Any = Counter("no_runtime")
    counter.inc(2)
    assert value_of("no_runtime") == 2
    assert not poolray.is_initialized()
