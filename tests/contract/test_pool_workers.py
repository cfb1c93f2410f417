"""The worker processes: initializers, lifetimes, what they inherit, and the start methods."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import string
import sys
import threading
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from executor_support import Gate, leave_mark, marks, meet, wait_until
from pool_support import (
    MAPS,
    MakePool,
    Pool,
    PoolClass,
    all_dead,
    collect,
    current_pid,
    fail_if_odd,
    processes_of,
    square,
)

# What initializers and the tests themselves change, and what tasks report.
state: Any = None


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    global state
    state = None
    yield
    state = None


def set_state(*values: Any) -> None:
    global state
    state = values


def get_state(_: object = None) -> Any:
    return state


def call_state() -> Any:
    return state[0]()


def count_up() -> int:
    global state
    state = (state or 0) + 1
    return state


def mark_pid(directory: Path) -> None:
    leave_mark(directory, os.getpid())


def pids_of_both_workers(pool: Pool, directory: Path) -> list[int]:
    """Run two tasks that end only together, so that each worker has one."""
    one, other = Gate(directory / "one"), Gate(directory / "other")
    pids = pool.starmap(meet, [(one, other), (other, one)], 1)
    assert len(set(pids)) == 2
    return pids


# --- what a worker is --------------------------------------------------------------------------


def test_the_processes_of_a_pool_can_be_inspected(pool: Pool) -> None:
    names = set()
    for process in pool._pool:
        assert process.pid > 0
        assert process.is_alive()
        assert process.exitcode is None
        assert process.daemon is True
        names.add(process.name)
    assert len(names) == 2
    assert all("PoolWorker-" in name for name in names)


def test_tasks_run_in_the_processes_of_the_pool(pool: Pool, tmp_path: Path) -> None:
    assert set(pids_of_both_workers(pool, tmp_path)) == set(processes_of(pool))
    pool.map(square, range(100), 1)
    assert set(pool.map(current_pid, range(100), 1)) <= set(processes_of(pool))


def describe_myself(_: object = None) -> tuple[int, str, bool, bool, bool]:
    me = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    main_thread = threading.current_thread() is threading.main_thread()
    return me.pid or 0, me.name, me.daemon, parent is not None, main_thread


def test_a_worker_knows_that_it_is_one(pool: Pool) -> None:
    for pid, name, daemon, has_parent, main_thread in pool.map(describe_myself, range(4), 1):
        assert pid in processes_of(pool)
        assert "PoolWorker-" in name
        assert (daemon, has_parent, main_thread) == (True, True, True)
    assert multiprocessing.parent_process() is None
    assert multiprocessing.current_process().name == "MainProcess"


def test_workers_of_one_pool_have_names_of_their_own(pool: Pool, tmp_path: Path) -> None:
    pids_of_both_workers(pool, tmp_path)
    names = {pid: name for pid, name, *_ in pool.map(describe_myself, range(20), 1)}
    assert len(set(names.values())) == len(names)


# --- initializers ------------------------------------------------------------------------------


def test_the_initializer_runs_once_in_every_worker(make_pool: MakePool, tmp_path: Path) -> None:
    (ran := tmp_path / "ran").mkdir()
    pool = make_pool(2, mark_pid, (ran,))
    pids = pids_of_both_workers(pool, tmp_path)
    pool.map(square, range(100), 1)
    assert marks(ran) == {str(pid) for pid in pids}
    assert all((ran / str(pid)).read_text().count("\n") == 1 for pid in pids)
    assert os.getpid() not in pids


@pytest.mark.parametrize("arguments", [(), (1,), (1, "a", None), [1, 2]])
def test_what_the_initializer_sets_is_there_for_every_task(
    make_pool: MakePool, tmp_path: Path, arguments: Any
) -> None:
    pool = make_pool(2, initializer=set_state, initargs=arguments)
    pids_of_both_workers(pool, tmp_path)
    assert pool.map(get_state, range(20), 1) == [tuple(arguments)] * 20
    assert pool.apply(get_state) == tuple(arguments)
    assert get_state() is None


def test_arguments_without_an_initializer_are_ignored(make_pool: MakePool) -> None:
    assert make_pool(1, None, (1, 2)).apply(get_state) is None


@pytest.mark.parametrize(
    ("initializer", "arguments", "expected"),
    [
        pytest.param(functools.partial(set_state, 1), (2,), (1, 2), id="partial"),
        pytest.param(lambda: set_state("lambda"), (), ("lambda",), id="lambda"),
        pytest.param(threading.Thread(target=set_state, args=(1,)).run, (), (1,), id="method"),
    ],
)
def test_an_initializer_is_any_callable(
    make_pool: MakePool, initializer: Any, arguments: Any, expected: Any
) -> None:
    assert make_pool(1, initializer, arguments).apply(get_state) == expected


def test_the_arguments_of_the_initializer_are_inherited_not_pickled(
    make_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    with open(tmp_path / "file") as file:
        assert make_pool(1, set_state, (file.read,)).apply(call_state) == "content"
    generator = itertools.chain.from_iterable(x for x in ([1], [2]))
    assert make_pool(1, set_state, (generator.__next__,)).apply(call_state) == 1
    assert make_pool(1, set_state, (threading.Lock().locked,)).apply(call_state) is False
    assert make_pool(1, set_state, (lambda: "lambda",)).apply(call_state) == "lambda"


def test_the_initializer_runs_without_any_task(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, leave_mark, (tmp_path, "ran"))
    pool.close()
    pool.join()
    assert marks(tmp_path) == {"ran"}


def refuse_to_start() -> None:
    raise LookupError("no database to connect to")


# The standard pool starts workers, which die, for ever.
@pytest.mark.poolray_only
@pytest.mark.parametrize("call", ["apply_async", "map_async"])
def test_an_initializer_that_raises_fails_the_calls(make_pool: MakePool, call: str) -> None:
    with pytest.raises(Exception) as caught:
        pool = make_pool(2, refuse_to_start)
        getattr(pool, call)(abs, [-3]).get(30)
    assert not isinstance(caught.value, multiprocessing.TimeoutError)
    assert "no database to connect to" in "".join(traceback.format_exception(caught.value))


# --- lifetimes ---------------------------------------------------------------------------------


def test_workers_are_replaced_after_so_many_tasks(make_pool: MakePool) -> None:
    pool = make_pool(1, maxtasksperchild=2)
    pids = [pool.apply(os.getpid) for _ in range(6)]
    assert list(Counter(pids).values()) == [2, 2, 2]
    wait_until(lambda: all_dead(pids))
    wait_until(lambda: [process.is_alive() for process in pool._pool] == [True])
    assert pool._processes == 1


@pytest.mark.parametrize("method", [*MAPS, "imap", "imap_unordered"])
def test_every_chunk_counts_as_one_task(make_pool: MakePool, method: str) -> None:
    pool = make_pool(2, maxtasksperchild=1)
    assert len(set(collect(pool, method, current_pid, range(6), chunksize=1))) == 6
    chunks = Counter(collect(pool, method, current_pid, range(8), chunksize=4))
    assert list(chunks.values()) == [4, 4]


def test_a_failed_task_counts(make_pool: MakePool) -> None:
    pool = make_pool(1, maxtasksperchild=2)
    before = pool.apply(os.getpid)
    with pytest.raises(ValueError, match="3 is odd"):
        pool.apply(fail_if_odd, (3,))
    assert pool.apply(os.getpid) != before


def test_a_replacement_is_initialized(make_pool: MakePool) -> None:
    pool = make_pool(2, set_state, ("value",), 1)
    assert pool.map(get_state, range(8), 1) == [("value",)] * 8


def test_without_a_limit_workers_stay(pool: Pool) -> None:
    before = processes_of(pool)
    pool.map(square, range(1_000), 1)
    assert processes_of(pool) == before


def test_closing_waits_for_work_that_needs_replacements(make_pool: MakePool) -> None:
    pool = make_pool(2, maxtasksperchild=1)
    results = [pool.apply_async(square, (x,)) for x in range(12)]
    pool.close()
    pool.join()
    assert [result.get(0) for result in results] == [x * x for x in range(12)]


# --- what workers inherit ----------------------------------------------------------------------


def test_each_pool_sees_the_globals_as_they_are_when_it_is_made(make_pool: MakePool) -> None:
    global state
    state = "first"
    first = make_pool(1)
    assert first.apply(get_state) == "first"
    state = "second"
    second = make_pool(1)
    state = "third"
    assert second.map(get_state, range(3)) == ["second"] * 3
    assert make_pool(1).apply(get_state) == "third"
    assert first.apply(get_state) == "first"


def test_each_worker_keeps_its_globals_to_itself(make_pool: MakePool) -> None:
    first, second = make_pool(1), make_pool(1)
    assert [first.apply(count_up) for _ in range(3)] == [1, 2, 3]
    assert second.apply(count_up) == 1
    assert first.apply(count_up) == 4
    assert state is None
    first.terminate()
    first.join()
    assert make_pool(1).apply(count_up) == 1, "a new pool starts from the globals of this process"


def test_replacements_inherit_the_globals_too(make_pool: MakePool) -> None:
    global state
    state = "value"
    pool = make_pool(2, maxtasksperchild=1)
    assert pool.map(get_state, range(6), 1) == ["value"] * 6


def test_workers_know_modules_that_were_made_up(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(1).apply(square, (3,))
    module = types.ModuleType("made_up_after_the_first_pool")
    exec("def add_one(x):\n    return x + 1\n", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert make_pool(2).map(module.add_one, range(5)) == [1, 2, 3, 4, 5]


def test_workers_see_patched_functions(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(1).apply(square, (3,))
    monkeypatch.setattr(math, "sqrt", lambda x: f"patched {x}")
    assert make_pool(1).apply(call_sqrt, (4,)) == "patched 4"


def call_sqrt(x: int) -> Any:
    return math.sqrt(x)


def test_workers_inherit_environment_and_directory(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_pool(1).apply(os.getcwd)
    monkeypatch.setenv("CONTRACT_TEST_VARIABLE", "value")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pool = make_pool(1)
    assert pool.apply(os.getenv, ("CONTRACT_TEST_VARIABLE",)) == "value"
    assert pool.apply(os.getcwd) == str(tmp_path.resolve())
    assert str(tmp_path / "modules") in pool.apply(get_sys_path)
    monkeypatch.delenv("CONTRACT_TEST_VARIABLE")
    assert make_pool(1).apply(os.getenv, ("CONTRACT_TEST_VARIABLE",)) is None


def get_sys_path() -> list[str]:
    return sys.path


def change_environment(directory: Path) -> None:
    os.environ["CONTRACT_TEST_VARIABLE"] = "changed"
    os.chdir(directory)


def test_what_a_task_does_to_the_environment_stays_in_its_worker(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(1)
    here = os.getcwd()
    pool.apply(change_environment, (tmp_path,))
    assert pool.apply(os.getenv, ("CONTRACT_TEST_VARIABLE",)) == "changed"
    assert pool.apply(os.getcwd) == str(tmp_path.resolve())
    assert os.getenv("CONTRACT_TEST_VARIABLE") is None
    assert os.getcwd() == here


# --- start methods -----------------------------------------------------------------------------

# The tasks here are builtins: a spawned worker need not import this file, which pytest loads.
METHODS = ["fork", "forkserver", "spawn"]
SET_MARKER = "import string; string.contract_marker = "
READ_MARKER = "getattr(__import__('string'), 'contract_marker', None)"


@pytest.mark.parametrize("method", METHODS)
def test_every_start_method_gives_the_same_answers(make_pool: MakePool, method: str) -> None:
    pool = make_pool(2, context=multiprocessing.get_context(method))
    assert pool.map(math.factorial, range(10)) == [math.factorial(x) for x in range(10)]
    assert list(pool.imap(abs, range(-3, 0))) == [3, 2, 1]
    with pytest.raises(ValueError, match="factorial"):
        pool.apply(math.factorial, (-1,))
    assert set(pool.map(eval, ["__import__('os').getpid()"] * 4)) <= set(processes_of(pool))
    assert multiprocessing.get_start_method() == "fork"


@pytest.mark.parametrize("method", METHODS)
def test_every_start_method_initializes(make_pool: MakePool, method: str) -> None:
    context = multiprocessing.get_context(method)
    pool = make_pool(1, exec, (f"{SET_MARKER}'set'",), context=context)
    assert pool.apply(eval, (READ_MARKER,)) == "set"
    assert not hasattr(string, "contract_marker")


@pytest.mark.parametrize("method", METHODS)
def test_every_start_method_replaces_workers(make_pool: MakePool, method: str) -> None:
    pool = make_pool(1, None, (), 1, multiprocessing.get_context(method))
    assert len({pool.apply(eval, ("__import__('os').getpid()",)) for _ in range(3)}) == 3


@pytest.mark.parametrize(("method", "inherited"), [("fork", "set"), ("spawn", None)])
def test_only_forked_workers_inherit_the_globals(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, method: str, inherited: str | None
) -> None:
    monkeypatch.setattr(string, "contract_marker", "set", raising=False)
    pool = make_pool(1, context=multiprocessing.get_context(method))
    assert pool.apply(eval, (READ_MARKER,)) == inherited


def test_spawned_workers_need_picklable_initializers(pool_implementation: PoolClass) -> None:
    with pytest.raises(TypeError, match="lock"):
        pool_implementation(
            1, print, (threading.Lock(),), context=multiprocessing.get_context("spawn")
        )


def test_the_start_method_set_for_the_program_is_the_default(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(string, "contract_marker", "set", raising=False)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert make_pool(1).apply(eval, (READ_MARKER,)) is None
    finally:
        multiprocessing.set_start_method("fork", force=True)
    assert make_pool(1).apply(eval, (READ_MARKER,)) == "set"
