"""Which backends of `util.collective` there are, and what a member is told who cannot have one."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from poolray.util import collective
from poolray.util.collective import process_group


def fake_torch(
    monkeypatch: pytest.MonkeyPatch, *, nccl: bool = True, gpus: int = 1, forked: bool = False
) -> None:
    """A torch that says what a machine has."""
    torch: Any = ModuleType("torch")
    torch.__path__ = []
    torch.__version__ = "9.9"
    torch.device = lambda *of: of
    torch.cuda = ModuleType("torch.cuda")
    torch.cuda.is_available = lambda: gpus > 0
    torch.cuda.current_device = lambda: gpus - 1
    torch.cuda._is_in_bad_fork = lambda: forked
    torch.distributed = ModuleType("torch.distributed")
    torch.distributed.is_available = lambda: True
    torch.distributed.is_nccl_available = lambda: nccl
    for module in (torch, torch.cuda, torch.distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "torch.distributed"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_no_torch")
def test_without_torch_the_extra_is_named() -> None:
    assert not collective.nccl_available()
    assert "pip install 'poolray[nccl]'" in process_group.NCCL.objection()
    with pytest.raises(RuntimeError, match=r"CUDA and NCCL.*pip install 'poolray\[nccl\]'"):
        collective.collective.synchronize(0)


def test_a_torch_for_cpus_is_told_from_one_with_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, nccl=False)
    assert not collective.nccl_available()
    assert "torch 9.9 is a build without NCCL" in process_group.NCCL.objection()


def test_nccl_is_there_with_torch_whether_or_not_this_process_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_torch(monkeypatch, gpus=0)
    assert collective.nccl_available()
    assert collective.is_backend_available("nccl")


def test_a_member_without_a_gpu_is_told_to_reserve_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, gpus=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match=r"sees none \(CUDA_VISIBLE_DEVICES is ''\).*num_gpus=1"):
        process_group.NCCL.find_device()


def test_a_worker_that_was_forked_from_a_user_of_cuda_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_torch(monkeypatch, forked=True)
    with pytest.raises(RuntimeError, match="used CUDA before this worker was forked"):
        process_group.NCCL.find_device()


def test_the_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, gpus=2)
    assert process_group.NCCL.find_device() == ("cuda", 1)


def test_variables_for_a_constructor_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POOLRAY_TEST_ONE", "before")
    monkeypatch.delenv("POOLRAY_TEST_TWO", raising=False)
    with process_group._environment(POOLRAY_TEST_ONE="1", POOLRAY_TEST_TWO="2"):
        assert (os.environ["POOLRAY_TEST_ONE"], os.environ["POOLRAY_TEST_TWO"]) == ("1", "2")
    assert os.environ["POOLRAY_TEST_ONE"] == "before"
    assert "POOLRAY_TEST_TWO" not in os.environ


def test_the_backend_on_memory_never_imports_torch() -> None:
    script = """
import sys
class Refuses:
    def find_spec(self, name, *_):
        assert name.partition(".")[0] != "torch", "torch is imported"
sys.meta_path.insert(0, Refuses())
import numpy
from poolray.util import collective
from poolray.util.collective.group import SharedMemoryGroup
assert collective.gloo_available()
group = SharedMemoryGroup(b"unit", 1, 0, "alone", 10.0)
group.allreduce(group.open(numpy.ones(3), writes=True), collective.ReduceOp.SUM)
group.destroy()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
