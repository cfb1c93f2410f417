"""`poolray.multiprocessing` stands in for `multiprocess`: each test passes with either of them."""

from __future__ import annotations

import builtins
import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from pool_support import run_script

import poolray
import poolray.multiprocessing

OURS = poolray.multiprocessing
#: What `poolray.multiprocessing` brings itself.
REPLACED = {"Pool", "TimeoutError", "get_context"}


@pytest.fixture(params=["multiprocess", "poolray.multiprocessing"])
def mp(request: pytest.FixtureRequest) -> Any:
    """The namespace under test."""
    return importlib.import_module(request.param)


def test_a_pool_maps_what_plain_pickle_cannot(mp: Any) -> None:
    by = 3
    with mp.Pool(2) as pool:
        assert pool.map(lambda x: x * by, range(5)) == [0, 3, 6, 9, 12]
        assert pool.apply_async(pow, (2, 5)).get(timeout=30) == 32


def test_pools_are_made_in_three_places(mp: Any) -> None:
    pool_module = importlib.import_module(f"{mp.__name__}.pool")
    for make in (mp.Pool, pool_module.Pool, mp.get_context("fork").Pool):
        with make(1, print, (), 10) as pool:
            assert pool.map(abs, [-1]) == [1]
            assert isinstance(pool, pool_module.Pool)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_pool_of_a_context_starts_workers_by_its_method(
    mp: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "inherited", True, raising=False)
    context = mp.get_context(method)
    assert context.get_start_method() == method
    with context.Pool(1) as pool:
        found = pool.apply(eval, ("hasattr(__import__('builtins'), 'inherited')",))
    assert found is (method == "fork")


def test_workers_see_themselves_as_daemons_of_this_process(mp: Any) -> None:
    with mp.Pool(1) as pool:
        worker = "__import__('multiprocess').current_process()"
        assert pool.apply(eval, (f"{worker}.daemon",)) is True
        parent = "__import__('multiprocess').parent_process()"
        assert pool.apply(eval, (f"{parent}.name",)) == mp.current_process().name


def test_a_late_result_raises_the_timeout_error_of_the_namespace(mp: Any) -> None:
    gate = mp.Event()
    with mp.Pool(1, remember, (gate,)) as pool:
        result, results = pool.apply_async(wait_for_gate), pool.imap(wait_for_gate_with, [1])
        with pytest.raises(mp.TimeoutError):
            result.get(timeout=0.01)
        with pytest.raises(mp.get_context("fork").TimeoutError):
            results.next(timeout=0.01)
        gate.set()
        # Killed while it holds the gate's lock, a worker would leave it locked for ever.
        assert (result.get(30), list(results)) == (True, [1])


def test_what_cannot_be_pickled_raises_the_error_of_the_pool_module(mp: Any) -> None:
    pool_module = importlib.import_module(f"{mp.__name__}.pool")
    with mp.Pool(1) as pool, pytest.raises(pool_module.MaybeEncodingError):
        pool.apply(make_unpicklable)


def test_a_pool_of_threads_is_there(mp: Any) -> None:
    pool_module = importlib.import_module(f"{mp.__name__}.pool")
    gate = mp.Event()
    with pool_module.ThreadPool(2) as pool:
        assert pool.map(lambda x: x + 1, [1, 2]) == [2, 3]
        with pytest.raises(mp.TimeoutError):
            pool.apply_async(gate.wait).get(timeout=0.01)
        gate.set()


def test_proxies_of_a_manager_are_arguments(mp: Any) -> None:
    with mp.Manager() as manager, mp.Pool(2) as pool:
        shared = manager.dict()
        pool.starmap(store, [(shared, key) for key in "abc"])
        assert dict(shared) == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_queues_and_locks_are_handed_to_the_initializer(
    mp: Any, method: str, tmp_path: Path
) -> None:
    pool_class = importlib.import_module(f"{mp.__name__}.pool").Pool
    result = run_script(
        pool_class,
        tmp_path / "script.py",
        f"""
        import {mp.__name__} as mp

        def remember(*primitives):
            global queue, lock, pipe
            queue, lock, pipe = primitives

        def note(number):
            with lock:
                queue.put(number)
                pipe.send(mp.current_process().name.rstrip("0123456789"))

        if __name__ == "__main__":
            mp.set_start_method("{method}")
            queue, lock = mp.Queue(), mp.Lock()
            here, there = mp.Pipe()
            with mp.Pool(2, remember, (queue, lock, there)) as pool:
                pool.map(note, range(4))
                print(sorted(queue.get(timeout=30) for _ in range(4)), here.recv())
        """,
    )
    expected = f"[0, 1, 2, 3] {method.capitalize()}PoolWorker-\n"
    assert (result.exit_code, result.stdout) == (0, expected), result.stderr


def test_an_unknown_start_method_is_refused(mp: Any) -> None:
    with pytest.raises(ValueError, match="cannot find context for 'sporn'"):
        mp.get_context("sporn")


def test_contexts_are_the_same_each_time_and_pickle(mp: Any) -> None:
    context = mp.get_context("spawn")
    assert mp.get_context("spawn") is context
    assert context.get_context() is context
    assert context.get_context("fork") is mp.get_context("fork")
    assert isinstance(context, multiprocess.context.SpawnContext)
    copy = pickle.loads(pickle.dumps(context))
    assert (type(copy), copy.get_start_method()) == (type(context), "spawn")


@pytest.mark.parametrize(
    "name", ["connection", "context", "dummy", "managers", "queues", "shared_memory", "synchronize"]
)
def test_modules_below_it_are_those_of_multiprocess(mp: Any, name: str) -> None:
    module = importlib.import_module(f"{mp.__name__}.{name}")
    assert module is importlib.import_module(f"multiprocess.{name}")
    assert getattr(mp, name) is module


def test_a_module_that_multiprocess_lacks_is_not_found(mp: Any) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named '[a-z.]*\.nothing'"):
        importlib.import_module(f"{mp.__name__}.nothing")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mp.nothing


def test_every_public_name_is_there_and_all_but_pools_are_the_same() -> None:
    assert set(OURS.__all__) == set(multiprocess.__all__)
    names: dict[str, Any] = {}
    exec("from poolray.multiprocessing import *", names)
    for name in multiprocess.__all__:
        assert names[name] is getattr(OURS, name)
        if name not in REPLACED:
            # Most are bound methods of multiprocess's default context.
            assert names[name] == getattr(multiprocess, name), name
    assert {
        name for name in multiprocess.__all__ if names[name] != getattr(multiprocess, name)
    } == (REPLACED)
    assert set(dir(multiprocess)) <= set(dir(OURS))


def test_its_pool_is_poolrays() -> None:
    assert issubclass(OURS.Pool, poolray.Pool)
    assert OURS.Pool is importlib.import_module("poolray.multiprocessing.pool").Pool
    with OURS.Pool(1, max_retries=0) as pool:
        assert repr(pool) == "<poolray.multiprocessing.pool.Pool state=RUN pool_size=1>"


def test_only_who_asks_for_it_pays_for_multiprocess() -> None:
    program = (
        "import sys, poolray; poolray.Pool; poolray.Executor;"
        "assert 'multiprocess' not in sys.modules;"
        "import poolray.multiprocessing; assert 'multiprocess' in sys.modules;"
        "assert 'multiprocess.managers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- tasks -------------------------------------------------------------------------------------


def remember(value: Any) -> None:
    global remembered
    remembered = value


def wait_for_gate() -> bool:
    return bool(remembered.wait(30))


def wait_for_gate_with(number: int) -> int:
    remembered.wait(30)
    return number


def make_unpicklable() -> Any:
    return (number for number in range(3))


def store(shared: Any, key: str) -> None:
    shared[key] = key
