"""`insights=` and `progress=` of pools and executors: what users are shown of the work."""

from __future__ import annotations

import io
import sys
import time
from typing import Any, ClassVar

import pytest
from executor_support import DEADLINE_S, wait_until
from pool_support import IMAPS, MAPS, MakePool, Pool, collect, fail_if_odd, square

import poolray

pytestmark = pytest.mark.poolray_only

tqdm_auto = pytest.importorskip("tqdm.auto")


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# Insights


def test_tasks_and_times_of_each_worker_are_told(make_pool: MakePool) -> None:
    pool = make_pool(2, initializer=nap, initargs=(0.05,), insights=True)
    pool.map(nap, [0.02] * 10, chunksize=1)
    found = pool.insights()
    assert len(found.workers) == 2
    assert all(worker.alive and worker.pid > 0 for worker in found.workers)
    assert found.tasks == sum(worker.tasks for worker in found.workers) == 10
    assert sum(worker.working_s for worker in found.workers) >= 0.2
    for worker in found.workers:
        assert worker.init_s >= 0.05
        assert worker.start_up_s > 0
        assert worker.waiting_s >= 0
        assert worker.exit_s == 0
    assert 0 < found.working_ratio < 1


def test_the_slowest_items_are_told_with_their_arguments(make_pool: MakePool) -> None:
    pool = make_pool(2, insights=True)
    pool.map(nap, [0.0, 0.15, 0.0, 0.1, *[0.0] * 40], chunksize=2)
    found = pool.insights().slowest
    assert [call.arguments for call in found[:2]] == ["0.15", "0.1"]
    assert found[0].seconds >= 0.15
    assert len(found) == 5


def test_what_describes_arguments_is_cut_and_may_fail(make_pool: MakePool) -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ValueError("no")

    pool = make_pool(1, insights=True)
    pool.apply(lambda *args, **kwargs: None, ("x" * 1000,), {"k": 1})
    pool.apply(lambda *args: None, (Odd(),))
    texts = {call.arguments for call in pool.insights().slowest}
    assert any(len(text) == 200 and text.startswith("'xxx") for text in texts)
    assert any("ValueError" in text for text in texts)


def test_workers_that_have_ended_are_remembered(make_pool: MakePool) -> None:
    pool = make_pool(1, insights=True, worker_exit=lambda: nap(0.05), maxtasksperchild=2)
    pool.map(square, range(6), chunksize=1)
    pool.close()
    pool.join()
    found = pool.insights()
    assert found.tasks == 6
    assert not any(worker.alive for worker in found.workers)
    assert all(worker.exit_s >= 0.05 for worker in found.workers)
    assert "slowest calls" in str(found)


def test_calls_that_fail_count_too(make_pool: MakePool) -> None:
    pool = make_pool(1, insights=True)
    with pytest.raises(ValueError, match="odd"):
        pool.map(fail_if_odd, [1, 3], chunksize=1)
    wait_until(lambda: pool.insights().tasks == 2)


def test_a_pool_that_measures_nothing_says_so(pool: Pool) -> None:
    with pytest.raises(ValueError, match="insights=True"):
        pool.insights()


# Progress


class Recorder(tqdm_auto.tqdm):  # type: ignore[misc, name-defined]
    """A bar that tells what becomes of it."""

    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["file"] = io.StringIO()
        super().__init__(*args, **kwargs)
        self.closed = 0
        Recorder.made.append(self)

    def close(self) -> None:
        self.closed = getattr(self, "closed", 0) + 1
        super().close()


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    Recorder.made = []
    monkeypatch.setattr(tqdm_auto, "tqdm", Recorder)
    return Recorder.made


@pytest.mark.parametrize("chunksize", [1, 7])
@pytest.mark.parametrize("method", [*MAPS, *IMAPS])
def test_a_bar_advances_with_each_item_and_is_closed_at_the_end(
    pool: Pool, bars: list[Any], method: str, chunksize: int
) -> None:
    found = collect(pool, method, square, list(range(20)), chunksize=chunksize, progress=True)
    assert found == [x * x for x in range(20)]
    (bar,) = bars
    wait_until(lambda: bar.closed)
    assert bar.n == 20
    assert bar.total == 20


def test_a_bar_of_an_input_without_a_length_learns_it_at_the_end(
    pool: Pool, bars: list[Any]
) -> None:
    assert list(pool.imap(square, iter(range(5)), progress=True)) == [0, 1, 4, 9, 16]
    (bar,) = bars
    wait_until(lambda: bar.closed)
    assert (bar.n, bar.total) == (5, 5)


def test_options_go_to_tqdm(pool: Pool, bars: list[Any]) -> None:
    pool.map(square, range(3), progress={"desc": "squares", "total": 30})
    (bar,) = bars
    assert bar.desc.startswith("squares")
    assert bar.total == 30


def test_items_that_fail_advance_the_bar(pool: Pool, bars: list[Any]) -> None:
    with pytest.raises(ValueError, match="odd"):
        pool.map(fail_if_odd, range(10), chunksize=3, progress=True)
    (bar,) = bars
    wait_until(lambda: bar.closed)
    assert bar.n == 10


def test_an_empty_map_has_a_bar_that_is_closed(pool: Pool, bars: list[Any]) -> None:
    assert pool.map(square, [], progress=True) == []
    assert [bar.closed for bar in bars] == [1]


def test_a_function_that_cannot_be_pickled_leaves_no_bar_open(pool: Pool, bars: list[Any]) -> None:
    stream = (x for x in range(3))
    with pytest.raises(TypeError, match="pickle"):
        pool.map(lambda x: next(stream), [1], progress=True)
    assert [bar.closed for bar in bars] == [1]


def test_terminate_closes_bars(make_pool: MakePool, bars: list[Any]) -> None:
    pool = make_pool(1)
    pool.map_async(time.sleep, [DEADLINE_S] * 3, progress=True)
    pool.imap(time.sleep, [DEADLINE_S] * 3, progress=True)
    pool.terminate()
    assert [bar.closed for bar in bars] == [1, 1]


def test_a_bar_that_cannot_be_drawn_costs_no_result(
    pool: Pool, bars: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, n: int = 1) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(Recorder, "update", fail)
    with pytest.warns(RuntimeWarning, match="cannot be drawn"):
        assert pool.map(square, range(4), chunksize=1, progress=True) == [0, 1, 4, 9]


def test_progress_goes_with_timeouts(pool: Pool, bars: list[Any]) -> None:
    results = pool.imap(nap, [0.0, DEADLINE_S, 0.0], timeout=0.2, progress=True)
    assert next(results) == 0.0
    with pytest.raises(TimeoutError):
        next(results)
    assert next(results) == 0.0
    wait_until(lambda: bars[0].n == 3)


def test_an_executor_shows_its_map(bars: list[Any]) -> None:
    with poolray.Executor(2) as executor:
        assert list(executor.map(square, range(10), chunksize=3, progress=True)) == [
            x * x for x in range(10)
        ]
        (bar,) = bars
        wait_until(lambda: bar.closed)
    assert (bar.n, bar.total) == (10, 10)


def test_without_tqdm_the_error_says_what_to_install(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'poolray\[progress\]'"):
        pool.map(square, [1], progress=True)
    with pytest.raises(ImportError, match="tqdm"):
        pool.imap(square, [1], progress=True)
    assert pool.map(square, [2]) == [4]


def test_a_bad_value_is_refused(pool: Pool) -> None:
    with pytest.raises(TypeError, match="progress must be"):
        pool.map(square, [1], progress=3)
