"""joblib and scikit-learn on the runtime, through `util.joblib`."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

import pytest
from core_implementation import (
    IMPLEMENTATION,
    IS_REFERENCE,
    ray,
    start_runtime,
)

joblib: Any = pytest.importorskip("joblib")
numpy: Any = pytest.importorskip("numpy")
backend: Any = pytest.importorskip(f"{IMPLEMENTATION}.util.joblib")

Parallel, delayed = joblib.Parallel, joblib.delayed

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _backend() -> None:
    start_runtime()
    backend.register_ray()


def test_calls_run_in_other_processes_and_answer_in_order() -> None:
    with joblib.parallel_backend("ray", n_jobs=2):
        found = Parallel()(delayed(lambda n: (n * n, os.getpid()))(n) for n in range(20))
    assert [value for value, _ in found] == [n * n for n in range(20)]
    assert os.getpid() not in {pid for _, pid in found}


def test_an_exception_comes_back_as_itself() -> None:
    with joblib.parallel_backend("ray", n_jobs=2):
        with pytest.raises(ZeroDivisionError):
            Parallel()(delayed(lambda n: 1 // n)(n) for n in range(3))
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]


def test_large_arrays_are_arguments() -> None:
    array = numpy.arange(200_000.0).reshape(100, 2000)
    with joblib.parallel_backend("ray", n_jobs=2):
        found = Parallel()(delayed(lambda a, n: float(a[n].sum()))(array, n) for n in range(100))
    assert found == [float(row.sum()) for row in array]


def test_all_processors_are_those_of_the_runtime() -> None:
    with joblib.parallel_backend("ray", n_jobs=-1):
        assert joblib.effective_n_jobs() == int(ray.cluster_resources()["CPU"])
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]


def test_grid_search_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    images, digits = datasets.load_digits(return_X_y=True)
    grid = {"C": [0.01, 10], "gamma": [1e-3]}
    search = GridSearchCV(SVC(), grid, cv=2)
    with joblib.parallel_backend("ray", n_jobs=2):
        search.fit(images[:600], digits[:600])
    assert search.best_params_ == {"C": 10, "gamma": 1e-3}
    assert search.best_score_ > 0.8


if not IS_REFERENCE:

    def test_its_own_name_is_poolray() -> None:
        backend.register()
        with joblib.parallel_backend("poolray", n_jobs=2):
            assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]

    def test_results_come_one_by_one() -> None:
        with joblib.parallel_backend("poolray", n_jobs=2):
            for mode, order in (("generator", list), ("generator_unordered", sorted)):
                found = Parallel(return_as=mode)(delayed(pow)(n, 2) for n in range(10))
                assert order(found) == [n * n for n in range(10)]

    def test_a_late_call_is_a_timeout_and_the_backend_goes_on() -> None:
        with joblib.parallel_backend("poolray", n_jobs=2):
            with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
                Parallel(timeout=0.2)(delayed(time.sleep)(30) for _ in range(2))
            assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]

    def test_calls_inside_of_calls_run_on_threads() -> None:
        def outer(number: int) -> tuple[int, int]:
            inner = Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(4))
            assert set(inner) == {os.getpid()}
            return number, len(inner)

        with joblib.parallel_backend("poolray", n_jobs=2):
            assert Parallel()(delayed(outer)(n) for n in range(3)) == [(0, 4), (1, 4), (2, 4)]

    def test_a_large_array_is_stored_once_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
        from poolray.util.joblib import backend as module

        stored = []

        def put(value: Any) -> Any:
            stored.append(value)
            return ray.put(value)

        monkeypatch.setattr(module, "put", put)
        large, small = numpy.zeros(1_000_000), numpy.zeros(10)
        with joblib.parallel_backend("poolray", n_jobs=2) as (used, _):
            found = Parallel(batch_size=1)(delayed(max)(large, small, key=len) for _ in range(20))
            assert [len(longest) for longest in found] == [1_000_000] * 20
            assert len(stored) == 1
            assert used._stored == {}

    def test_a_worker_that_dies_is_no_hang(tmp_path: Any) -> None:
        def die_once(path: str) -> str:
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(9)
            return "done"

        with joblib.parallel_backend("poolray", n_jobs=2):
            path = str(tmp_path / "mark")
            assert Parallel()(delayed(die_once)(path) for _ in range(3)) == ["done"] * 3

    def test_libraries_share_the_processors() -> None:
        pytest.importorskip("threadpoolctl")

        def threads() -> list[int]:
            import threadpoolctl

            return [library["num_threads"] for library in threadpoolctl.threadpool_info()]

        with joblib.parallel_backend("poolray", n_jobs=2, inner_max_num_threads=1):
            for found in Parallel()(delayed(threads)() for _ in range(2)):
                assert set(found) <= {1}

    def test_options_that_it_cannot_carry_out_are_refused() -> None:
        with pytest.raises(ray.exceptions.NotSupportedError, match="num_gpus"):
            joblib.parallel_backend("poolray", ray_remote_args={"num_gpus": 1})


def test_one_job_needs_no_workers() -> None:
    with joblib.parallel_backend("ray", n_jobs=1):
        assert Parallel()(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
