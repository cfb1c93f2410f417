"""Process groups of torch, outside of `torch.distributed`'s global state.

    members share an unnamed file ── FileStore ──▶ NCCL's, or gloo's, process group

What: says whether there can be one, in words; makes it, with a file as the place to meet; lets go
of it.
Who calls: `torch_group.py`, `collective.py`.
May touch: torch (imported when asked for, never before), GPUs, sockets, a thread that connects.
Invariants: a process may have any number of them, beside those of `torch.distributed`. None of them
ends the process. Nothing here blocks the caller for longer than it says.
"""

from __future__ import annotations

import datetime
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

__all__ = ["GLOO", "NCCL", "Connection", "Kind"]

#: A process group's own limit comes after ours, whose error says more.
_OWN_TIMEOUT_FACTOR, _OWN_TIMEOUT_MORE_S = 2, 10
#: Letting go of a group that is whole may wait this long.
_FREE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of process group."""

    #: Why there cannot be one here, whatever the devices; empty: there can.
    objection: Callable[[], str]
    #: The device of this process, where its tensors must be.
    find_device: Callable[[], Any]
    #: Store, rank, size, timeout in seconds, device -> process group, connected.
    connect: Callable[[Any, int, int, float, Any], Any]
    #: What an operation gave -> something whose `is_completed` may be asked, before its `wait`.
    follow: Callable[[Any], Any]
    #: Whether a reduction writes to the tensors of members that do not get the result.
    reduces_in_sources: bool


# ---- NCCL ----------------------------------------------------------------------------------------


def _torch_objection() -> str:
    try:
        importlib.import_module("torch.distributed")
    except ImportError as error:
        return (
            "Backend NCCL is not available: it needs torch, whose builds for CUDA bring NCCL, and "
            f"which cannot be imported here ({error}). Install it with pip install "
            "'poolray[nccl]', or pass backend='gloo' for arrays in the machine's memory."
        )
    return ""


def _nccl_objection() -> str:
    objection = _torch_objection()
    if objection:
        return objection
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        return ""
    return (
        f"Backend NCCL is not available: torch {torch.__version__} is a build without NCCL, such "
        "as those for CPUs are. Install a build for CUDA, or pass backend='gloo' for arrays in "
        "the machine's memory."
    )


def _find_gpu() -> Any:
    """This process's GPU.

    Raises
    ------
    RuntimeError
        It has none, or may not use it.
    """
    import torch

    if torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            "Backend NCCL cannot be used in this process: the program used CUDA before this worker "
            "was forked from it, and CUDA does not survive a fork. Use GPUs in actors and tasks "
            "only, not in the driver."
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise RuntimeError(
            "Backend NCCL needs a GPU, and this process sees none (CUDA_VISIBLE_DEVICES is "
            f"{visible!r}). Reserve one for each member with @ray.remote(num_gpus=1), on a "
            "machine that has them."
        )
    return torch.device("cuda", torch.cuda.current_device())


_environment_lock = threading.Lock()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for a moment: what is read by a constructor has no argument of it."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _connect_nccl(store: Any, rank: int, world_size: int, timeout_s: float, device: Any) -> Any:
    import torch
    import torch.distributed

    torch.cuda.set_device(device)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    # By itself torch ends the process when an operation fails: its threads, not the caller, find
    # out. With BLOCKING_WAIT the caller is told by `wait`, and nobody else acts.
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ENABLE_MONITORING="0"):
        group = torch.distributed.ProcessGroupNCCL(store, rank, world_size, options)
    # Now, while all are known to be here; messages go through the same communicator then, instead
    # of one more for each pair.
    group.eager_connect_single_device(device)
    return group


NCCL = Kind(
    objection=_nccl_objection,
    find_device=_find_gpu,
    connect=_connect_nccl,
    follow=lambda work: work,
    reduces_in_sources=False,
)


# ---- gloo, on the CPU: what the tests run the same code on --------------------------------------


def _find_cpu() -> Any:
    import torch

    return torch.device("cpu")


def _connect_gloo(store: Any, rank: int, world_size: int, timeout_s: float, _: Any) -> Any:
    import torch.distributed

    options = torch.distributed.ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return torch.distributed.ProcessGroupGloo(store, rank, world_size, options)


@final
class _Waited:
    """An operation of gloo's: some of them are done only when somebody waits for them."""

    def __init__(self, work: Any) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="poolray-collective", daemon=True
        )
        self._thread.start()

    def _run(self, work: Any) -> None:
        try:
            work.wait()
        except BaseException as error:
            self._error = error.with_traceback(None)  # whose frames would keep the group

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


GLOO = Kind(
    objection=_torch_objection,
    find_device=_find_cpu,
    connect=_connect_gloo,
    follow=_Waited,
    reduces_in_sources=True,
)


# ---- from connecting to letting go ---------------------------------------------------------------


@final
class Connection:
    """A process group that a thread makes, and that is let go of without waiting for it.

    Parameters
    ----------
    kind : Kind
    descriptor : int
        The file in which members meet; this object owns it from now on.
    rank, world_size : int
    timeout_s : float
        Of the whole group; the process group's own is longer.
    device : torch.device

    Notes
    -----
    A thread, for connecting cannot be interrupted: where a member dies in the middle of it, the
    others leave theirs behind, which ends when the process group's own time is up.
    """

    def __init__(
        self,
        kind: Kind,
        descriptor: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        device: Any,
    ) -> None:
        own_timeout_s = timeout_s * _OWN_TIMEOUT_FACTOR + _OWN_TIMEOUT_MORE_S
        self._make = lambda store: kind.connect(store, rank, world_size, own_timeout_s, device)
        self._descriptor = descriptor
        self._world_size = world_size
        self._own_timeout_s = own_timeout_s
        #: The process group, once there is one.
        self.group: Any = None
        #: Why there is none.
        self.error: BaseException | None = None
        #: Guards the two below.
        self._lock = threading.Lock()
        self._is_made = False
        self._is_given_up = False
        self.thread = threading.Thread(target=self._run, name="poolray-collective", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        group = None
        try:
            group = self._make(self._open_store())
        except BaseException as error:
            self.error = error.with_traceback(None)  # whose frames would keep this
        with self._lock:
            self.group = group
            self._is_made = True
            is_given_up = self._is_given_up
        del group
        if is_given_up:
            self._free("abort")

    def _open_store(self) -> Any:
        import torch.distributed

        # It opens the file anew for each of its operations, so a descriptor's name will do; no
        # other user can come in here, as one could by a port.
        store = torch.distributed.FileStore(f"/proc/self/fd/{self._descriptor}", self._world_size)
        store.set_timeout(datetime.timedelta(seconds=self._own_timeout_s))
        return store

    def is_made(self) -> bool:
        """Whether there is a group, or an error."""
        with self._lock:
            return self._is_made

    def let_go(self, *, is_whole: bool) -> None:
        """The process group is not needed any more.

        Parameters
        ----------
        is_whole : bool
            All members have done all that they began: it is freed in good order, which is waited
            for. Else it is aborted, in the background.
        """
        with self._lock:
            if self._is_given_up:
                return
            self._is_given_up = True
            is_made = self._is_made
        if not is_made:
            return  # the thread that connects frees it
        how = "shutdown" if is_whole else "abort"
        thread = threading.Thread(
            target=self._free, args=(how,), name="poolray-collective", daemon=True
        )
        thread.start()
        if is_whole:
            thread.join(_FREE_S)

    def _free(self, how: str) -> None:
        group, self.group = self.group, None
        try:
            if group is not None:
                getattr(group, how)()
        except RuntimeError:
            pass  # it is broken, or of a kind that has no such method: the end of it follows
        del group  # it waits for its threads
        os.close(self._descriptor)
