"""Looking at the memory of a runtime: who keeps which object, as text."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import poolray
from poolray.exceptions import NotSupportedError, PoolrayError, TaskError
from poolray.local import runtime as local_runtime
from poolray.protocol.memory import HolderKind, MemoryTable, ObjectEntry
from tests.integration.support import DEADLINE_S, Gate, wait_until

LARGE = 200_000

kept: list[Any] = []


def _keep(value: Any) -> int:
    kept.append(value)
    return os.getpid()


def _forget() -> None:
    kept.clear()


# Under names of their own the functions go by reference, and see the same list.
keep, forget = poolray.remote(_keep), poolray.remote(_forget)


@poolray.remote
def pass_through(value: Any, started: Gate, release: Gate) -> Any:
    started.open()
    release.wait()
    return value


def get(refs: Any) -> Any:
    return poolray.get(refs, timeout=DEADLINE_S)


def table() -> MemoryTable:
    runtime = local_runtime.current()
    assert runtime is not None
    return runtime.memory_table()


def entry(ref: poolray.ObjectRef[Any]) -> ObjectEntry:
    (found,) = [entry for entry in table().objects if entry.object_id == ref.binary()]
    return found


def kinds(found: ObjectEntry) -> list[tuple[HolderKind, int]]:
    return [(holder.kind, holder.pid) for holder in found.holders]


def test_a_ref_is_a_local_reference_and_its_view_pins() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(np.zeros(LARGE))
    view = get(ref)
    mine = [(HolderKind.LOCAL_REFERENCE, os.getpid())]
    assert kinds(entry(ref)) == mine
    object_id = ref.binary()
    del ref
    (found,) = [e for e in table().objects if e.object_id == object_id]
    assert kinds(found) == [(HolderKind.PINNED_IN_MEMORY, os.getpid())]
    assert found.size_bytes > view.nbytes
    del view
    gc.collect()
    assert all(e.object_id != object_id for e in table().objects)


def test_what_a_worker_keeps_is_told_with_its_pid() -> None:
    poolray.init(num_cpus=1)
    ref, other = poolray.put(np.zeros(LARGE)), poolray.put("small")
    pid = get(keep.remote(ref))
    assert get(keep.remote([other])) == pid
    assert (HolderKind.PINNED_IN_MEMORY, pid) in kinds(entry(ref))
    assert (HolderKind.LOCAL_REFERENCE, pid) in kinds(entry(other))
    text = poolray.util.memory_summary(group_by="PID", units="KB")
    assert f"--- Summary for pid: {pid} ---" in text
    get(forget.remote())
    wait_until(lambda: not any(p == pid for _, p in kinds(entry(ref))), "the release")


def test_a_running_task_holds_its_arguments(started: Gate, release: Gate) -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(1)
    result = pass_through.remote(ref, started, release)
    started.wait()
    (task,) = [h for h in entry(ref).holders if h.kind is HolderKind.USED_BY_PENDING_TASK]
    assert task.name.endswith("pass_through")
    assert task.pid not in (0, os.getpid())
    assert entry(result).size_bytes == -1
    release.open()
    assert get(result) == 1


def test_an_object_that_holds_another_is_named() -> None:
    poolray.init(num_cpus=1)
    inner = poolray.put(1)
    outer = poolray.put({"deep": [inner]})
    (captured,) = [h for h in entry(inner).holders if h.kind is HolderKind.CAPTURED_IN_OBJECT]
    assert captured.name == outer.hex()


def test_call_sites_are_recorded_when_asked_for() -> None:
    poolray.init(num_cpus=1, record_ref_creation_sites=1)
    put = poolray.put(1)
    called = keep.remote(np.zeros(LARGE))
    get(called)
    here = f"{__file__}:test_call_sites_are_recorded_when_asked_for:"
    assert entry(put).call_site.startswith(f"(put object) | {here}")
    assert entry(called).call_site.startswith(f"(task call) | {here}")
    argument = table().objects[0]
    assert argument.call_site.startswith(f"(task argument) | {here}")
    assert f"stack trace: {entry(put).call_site} ---" in poolray.util.memory_summary(
        group_by="STACK_TRACE"
    )


def test_call_sites_are_not_recorded_by_default() -> None:
    poolray.init(num_cpus=1)
    ref = poolray.put(1)
    assert entry(ref).call_site == ""
    assert "POOLRAY_record_ref_creation_sites=1" in poolray.util.memory_summary()


def test_a_large_function_is_named() -> None:
    poolray.init(num_cpus=1)
    captured = b"x" * 300_000

    @poolray.remote
    def capturing() -> int:
        return len(captured)

    assert get(capturing.remote()) == len(captured)
    (function,) = [
        holder
        for found in table().objects
        for holder in found.holders
        if holder.kind is HolderKind.FUNCTION_DEFINITION
    ]
    assert function.name.endswith("capturing")


def test_arrays_from_a_pool_pin_their_memory() -> None:
    with poolray.Pool(1) as pool:
        array = pool.apply_async(np.zeros, (LARGE,)).get(DEADLINE_S)
        (found,) = table().objects
        assert kinds(found) == [(HolderKind.PINNED_IN_MEMORY, os.getpid())]
        assert "PINNED_IN_MEMORY" in poolray.util.memory_summary()
    assert array.sum() == 0


def test_without_a_runtime_there_is_nothing_to_look_at() -> None:
    with pytest.raises(PoolrayError, match=r"call poolray\.init"):
        poolray.util.memory_summary()


def test_a_task_is_told_to_ask_the_driver() -> None:
    poolray.init(num_cpus=1)
    with pytest.raises(TaskError, match="poolray memory") as caught:
        get(poolray.remote(poolray.util.memory_summary).remote())
    assert isinstance(caught.value.cause, NotSupportedError)


def test_a_store_that_is_full_of_gaps_says_so(tmp_path: Path) -> None:
    poolray.init(num_cpus=1, object_store_memory=8 << 20)
    refs = [poolray.put(np.zeros(120_000)) for _ in range(8)]
    del refs[::2]
    gc.collect()
    seen = table()
    assert seen.free_ranges >= 3
    assert seen.largest_free_bytes < seen.capacity_bytes - seen.used_bytes
    text = poolray.util.memory_summary(stats_only=True, units="MB")
    assert "Fragmentation: 0.0 %" not in text
    assert "Object references" not in text
