"""The backend: calls of joblib's `Parallel` in a poolray `Pool`.

    Parallel ── batch of calls ──▶ large arrays replaced by refs ──▶ Pool ──▶ worker: refs read

What: starts and ends the pool of a `Parallel` call, sends batches, stores what is large once.
Who calls: joblib, and only it.
May touch: the public API; in workers the numbers of threads of numerical libraries.
Invariants: a pool lives as long as the `Parallel` call, or the `with Parallel()` block, that it was
made for. A stored array is what it was when it was first met in the call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, final

from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from poolray.api import get, put
from poolray.cluster_state import cluster_resources
from poolray.objects.object_ref import ObjectRef
from poolray.util.multiprocessing.pool import Pool, check_remote_args

__all__ = ["PoolrayBackend"]

#: Smaller arguments travel with each call.
_STORED_BYTES_MIN = 100 * 1024
#: Packages whose values may be large and say how large they are.
_PACKAGES = ("numpy", "pandas", "scipy", "polars", "pyarrow")


@final
class _Failure:
    """What a call raised, on its way through joblib's callback."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@final
class _Stored:
    """A large argument, in a batch: stored once, read by each worker."""

    def __init__(self, ref: ObjectRef[Any]) -> None:
        self.ref = ref


@final
class PoolrayBackend(AutoBatchingMixin, ParallelBackendBase):
    """Calls of joblib in a pool of poolray. Made by joblib.

    Parameters
    ----------
    nesting_level, inner_max_num_threads
        Given by joblib.
    ray_remote_args : dict, optional
        As for `poolray.util.multiprocessing.Pool`.
    **options
        As for `poolray.Pool`.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_return_generator = True
    supports_timeout = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        check_remote_args(ray_remote_args)
        self._options = options
        self._pool: Pool | None = None
        #: id of an argument -> the argument, which keeps the id its own, and where it is stored.
        self._stored: dict[int, tuple[Any, _Stored]] = {}

    # ---- life ------------------------------------------------------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many calls run at once."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        cpus = int(cluster_resources().get("CPU", 1))
        return max(cpus + 1 + n_jobs, 1)

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> int:
        """Start the workers; gives how many."""
        check_remote_args(ray_remote_args)
        count = self.effective_n_jobs(n_jobs)
        if count == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        environment = self._prepare_worker_env(count)
        self._pool = Pool(count, _settle, (environment,), **self._options)
        self.parallel = parallel
        return count

    def stop_call(self) -> None:
        """The call is over: arrays may change until the next one."""
        self._stored.clear()

    def terminate(self) -> None:
        """End the workers."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()
            pool.join()
        self._stored.clear()
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A call has failed: end the others."""
        self.terminate()
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    # ---- calls -----------------------------------------------------------------------------------

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> Any:
        """Run a batch; joblib's callback gets its outcome."""
        assert self._pool is not None

        def on_error(error: BaseException) -> None:
            if callback is not None:
                callback(_Failure(error))

        return self._pool.apply_async(
            _run_batch, (self._with_refs(func),), callback=callback, error_callback=on_error
        )

    #: What joblib before 1.5 calls it.
    apply_async = submit

    def retrieve_result_callback(self, out: Any) -> Any:
        """The results of a batch, from what its callback got."""
        if isinstance(out, _Failure):
            raise out.error
        return out

    # ---- large arguments -------------------------------------------------------------------------

    def _with_refs(self, batch: Any) -> Any:
        items = getattr(batch, "items", None)
        if not isinstance(items, list):
            return batch
        replaced = copy.copy(batch)
        replaced.items = [
            (
                function,
                [self._store(value) for value in args],
                {name: self._store(value) for name, value in kwargs.items()},
            )
            for function, args, kwargs in items
        ]
        return replaced

    def _store(self, value: Any) -> Any:
        if not _is_large(value):
            return value
        known = self._stored.get(id(value))
        if known is None:
            known = self._stored[id(value)] = value, _Stored(put(value))
        return known[1]


def _is_large(value: Any) -> bool:
    if type(value).__module__.partition(".")[0] not in _PACKAGES:
        return False
    if hasattr(value, "memory_usage"):  # tables of pandas
        size = value.memory_usage()
        return bool(getattr(size, "sum", lambda: size)() >= _STORED_BYTES_MIN)
    data = getattr(value, "data", None) if type(value).__module__.startswith("scipy") else value
    size = getattr(data, "nbytes", 0)
    return isinstance(size, int) and size >= _STORED_BYTES_MIN


# ---- in workers ----------------------------------------------------------------------------------


def _settle(environment: dict[str, str]) -> None:
    """A worker begins: numerical libraries share the processors with those of the other workers."""
    global _limits
    os.environ.update(environment)
    try:
        import threadpoolctl
    except ImportError:
        return  # the variables hold for libraries that are loaded from here on
    _limits = threadpoolctl.threadpool_limits(int(environment["OMP_NUM_THREADS"]))


#: Kept, for with it the limits would go.
_limits: Any = None


def _run_batch(batch: Any) -> Any:
    items = getattr(batch, "items", None)
    if isinstance(items, list):
        batch.items = [
            (
                function,
                [_read(value) for value in args],
                {name: _read(value) for name, value in kwargs.items()},
            )
            for function, args, kwargs in items
        ]
    return batch()


def _read(value: Any) -> Any:
    return get(value.ref) if isinstance(value, _Stored) else value
