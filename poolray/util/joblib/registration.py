"""What makes the backend known to joblib.

What: the functions that users call.
Who calls it: user code.
May touch: joblib's table of backends.
Invariants: both names stand for one backend; registering twice is the same as once.
"""

from __future__ import annotations

__all__ = ["register", "register_ray"]


def register() -> None:
    """Let joblib run on poolray, as backend "poolray", and "ray" for programs that were written
    for Ray.

    Raises
    ------
    ImportError
        joblib is not there, or older than 1.3.

    Notes
    -----
    `n_jobs=-1` means the CPUs of the runtime. Each `Parallel` call has a pool of its own, and forks
    its workers in milliseconds. Large arrays are stored once for all calls, and read-only views of
    them are what calls get. Nested calls run on threads, as in joblib's other backends.

    Examples
    --------
    >>> from joblib import Parallel, delayed, parallel_backend
    >>> from poolray.util import joblib
    >>> joblib.register()
    >>> with parallel_backend("poolray", n_jobs=2):
    ...     Parallel()(delayed(pow)(number, 2) for number in range(5))
    [0, 1, 4, 9, 16]
    """
    try:
        from joblib.parallel import register_parallel_backend

        from poolray.util.joblib.backend import PoolrayBackend
    except ImportError as error:
        raise ImportError(
            "The joblib backend needs the package joblib, 1.3 or later: "
            "pip install 'poolray[joblib]'"
        ) from error
    for name in ("poolray", "ray"):
        register_parallel_backend(name, PoolrayBackend)


#: The name that programs written for Ray call.
register_ray = register
