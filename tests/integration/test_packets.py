"""Packets between a node and its workers: too large for the kernel, or nonsense."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

import poolray
from poolray.exceptions import WorkerCrashedError
from poolray.local import process_state, runtime
from tests.integration.support import is_alive, wait_until

#: Their ids are more than a packet takes.
COUNT = 20_000
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _runtime() -> Iterator[None]:
    poolray.init(num_cpus=2)
    yield
    poolray.shutdown()


@poolray.remote(max_retries=0)
def count_values(refs: list[Any]) -> int:
    return len(poolray.get(refs))


@poolray.remote(max_retries=0)
def make_refs(count: int) -> list[Any]:
    return [poolray.put(i) for i in range(count)]


@poolray.remote(max_retries=0)
def wait_for_all(count: int) -> int:
    refs = [poolray.put(i) for i in range(count)]
    ready, _ = poolray.wait(refs, num_returns=count)
    return len(ready)


@poolray.remote(max_retries=0)
def pid() -> int:
    return os.getpid()


def test_a_task_may_get_more_refs_than_a_packet_takes() -> None:
    refs = [poolray.put(i) for i in range(COUNT)]
    assert poolray.get(count_values.remote(refs), timeout=DEADLINE_S) == COUNT


def test_a_task_may_return_more_refs_than_a_packet_takes() -> None:
    refs = poolray.get(make_refs.remote(COUNT), timeout=DEADLINE_S)
    assert poolray.get([refs[0], refs[-1]]) == [0, COUNT - 1]


def test_a_task_may_wait_for_and_drop_more_refs_than_a_packet_takes() -> None:
    assert poolray.get(wait_for_all.remote(COUNT), timeout=DEADLINE_S) == COUNT


@poolray.remote(max_retries=0)
def talk(packet: bytes) -> None:
    client = process_state.client()
    assert client is not None
    client.link._reports.send(packet)  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_worker_that_talks_nonsense_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    for packet in (b"nonsense", b"\x92\x01", b"\xc7"):
        caplog.clear()
        with pytest.raises(WorkerCrashedError):
            poolray.get(talk.remote(packet), timeout=DEADLINE_S)
        assert "cannot be read" in caplog.text
        assert poolray.get(pid.options(max_retries=3).remote(), timeout=DEADLINE_S)


def tell_all_workers(queue: str, packet: bytes) -> None:
    shell: Any = runtime.current()
    for host in list(shell._hosts.values()):
        for handle in list(host.workers.values()):
            getattr(handle, queue).send(packet)


def test_a_worker_whose_next_packet_is_nonsense_ends() -> None:
    first = poolray.get(pid.remote())
    tell_all_workers("queue_in", b"\xc7")
    wait_until(lambda: not is_alive(first), "the end of a worker")
    assert poolray.get(pid.options(max_retries=3).remote(), timeout=DEADLINE_S) != first


def test_a_worker_that_waits_for_an_answer_which_is_nonsense_ends() -> None:
    @poolray.remote(max_retries=0)
    def ask_for_ever() -> None:
        while True:
            poolray.get(poolray.put(1))

    asking = ask_for_ever.remote()
    poolray.get(pid.remote())
    tell_all_workers("control", b"\xc7")
    with pytest.raises(WorkerCrashedError, match="exited with code 1"):
        poolray.get(asking, timeout=DEADLINE_S)
    assert poolray.get(pid.options(max_retries=3).remote(), timeout=DEADLINE_S)
