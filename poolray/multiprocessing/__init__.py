"""The namespace of the `multiprocess` package, with poolray's `Pool` in the place of its own.

What: every public name of `multiprocess`; `Pool` and what belongs to it is ours, in this module, in
`.pool` and on the contexts that `get_context` gives.
Who calls: users; `import poolray.multiprocessing as mp` replaces `import multiprocess as mp`.
May touch: nothing by itself; nothing of `multiprocess` is changed.
Invariants: whatever is not about pools is the very object of `multiprocess`: a `Lock` made here and
one made there are of one class, `set_start_method` here and there set one thing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import multiprocess

from poolray.multiprocessing.pool import Pool, TimeoutError

__version__: str = multiprocess.__version__
__all__ = list(multiprocess.__all__)


class _PoolOfContext:
    """The part of a context that makes pools, or other contexts."""

    #: From the context's own class.
    get_start_method: Callable[[], str]
    TimeoutError = TimeoutError

    def Pool(
        self,
        processes: int | None = None,
        initializer: Any = None,
        initargs: Any = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> Pool:
        """A pool whose workers start by the method of this context."""
        return Pool(processes, initializer, initargs, maxtasksperchild, context=self, **options)

    def get_context(self, method: str | None = None) -> Any:
        """This context, or that of another start method."""
        return self if method is None else get_context(method)

    def __reduce__(self) -> Any:
        return get_context, (self.get_start_method(),)


#: Class of a context of multiprocess -> the same with our `Pool`.
_contexts: dict[type, Any] = {}


def get_context(method: str | None = None) -> Any:
    """A context of `multiprocess` whose `Pool` is poolray's.

    Parameters
    ----------
    method : str, optional
        "fork", "spawn" or "forkserver"; the one in force if left out.

    Raises
    ------
    ValueError
        An unknown method.

    Examples
    --------
    >>> import poolray.multiprocessing as mp
    >>> with mp.get_context("fork").Pool(2) as pool:
    ...     pool.map(abs, [-1, -2])
    [1, 2]
    """
    found = multiprocess.get_context(method)
    kind = type(found)
    if kind not in _contexts:
        ours = type(kind.__name__, (_PoolOfContext, kind), {"__module__": __name__})
        _contexts[kind] = ours()
    return _contexts[kind]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(multiprocess, name)
    except AttributeError:
        pass
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(multiprocess)})


_BELOW = f"{__name__}."


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `poolray.multiprocessing.managers` and its like: the modules of `multiprocess`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for names below this package that are not files of it."""
        if not fullname.startswith(_BELOW) or fullname == f"{_BELOW}pool":
            return None
        if importlib.util.find_spec(f"multiprocess.{fullname.removeprefix(_BELOW)}") is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of `multiprocess` in the place of the one that was made."""
        name = module.__name__.removeprefix(_BELOW)
        sys.modules[module.__name__] = importlib.import_module(f"multiprocess.{name}")


# Before the finders of files, which would load a second copy of what lies below `dummy`.
sys.meta_path.insert(0, _Submodules())
