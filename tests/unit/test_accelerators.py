"""Accelerators are found in `dev` and `sys`, limited by variables, and told to processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from poolray.scheduling import accelerators
from poolray.scheduling.accelerators import (
    Found,
    check_devices,
    discover,
    is_left_alone,
    variables_for,
)


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def find(root: Path, **environment: str) -> list[Found]:
    return discover({}, environment, root=str(root))


def test_without_devices_nothing_is_found(tmp_path: Path) -> None:
    assert find(tmp_path) == []
    assert find(tmp_path, CUDA_VISIBLE_DEVICES="0,1") == []


@pytest.mark.parametrize(
    ("paths", "resource", "variable"),
    [
        (
            ["dev/davinci0", "dev/davinci1", "dev/davinci_manager"],
            "NPU",
            "ASCEND_RT_VISIBLE_DEVICES",
        ),
        (["dev/accel0", "dev/accel1"], "TPU", "TPU_VISIBLE_CHIPS"),
        (["dev/hl0", "dev/hl1", "dev/hl_controlD0"], "HPU", "HABANA_VISIBLE_MODULES"),
        (["dev/rbln0", "dev/rbln1"], "RBLN", "RBLN_DEVICES"),
        (["dev/aries0", "dev/aries1"], "MBLT", "QBRUNTIME_VISIBLE_DEVICES"),
        (["dev/tenstorrent/0", "dev/tenstorrent/1"], "TTNPU", "TT_VISIBLE_DEVICES"),
        (
            ["dev/rngd/npu0mgmt", "dev/rngd/npu1mgmt", "dev/rngd/npu0pe0"],
            "FURIOSA",
            "FURIOSA_DEVICES",
        ),
        (["dev/mxc0", "dev/mxc1"], "GPU", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_devices_are_counted_by_their_files(
    tmp_path: Path, paths: list[str], resource: str, variable: str
) -> None:
    for path in paths:
        write(tmp_path, path)
    (found,) = find(tmp_path)
    assert (found.resource, found.ids, found.variable) == (resource, ("0", "1"), variable)


def test_a_neuron_device_counts_by_its_cores(tmp_path: Path) -> None:
    write(tmp_path, "dev/neuron0")
    write(tmp_path, "sys/class/neuron_device/neuron0/core_count", "4\n")
    (found,) = find(tmp_path)
    assert found == Found(
        "neuron_cores", ("0", "1", "2", "3"), "NEURON_RT_VISIBLE_CORES", "aws-neuron-core"
    )


def test_amd_counts_what_computes_and_no_processors(tmp_path: Path) -> None:
    write(tmp_path, "dev/kfd")
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path, f"{nodes}/0/properties", "simd_count 0\ndevice_id 0\n")
    write(tmp_path, f"{nodes}/1/properties", f"simd_count 304\ndevice_id {0x74A1}\n")
    (found,) = find(tmp_path)
    assert found == Found("GPU", ("0",), "HIP_VISIBLE_DEVICES", "AMD-Instinct-MI300X-OAM")


def test_intel_counts_data_centre_cards_and_no_screens(tmp_path: Path) -> None:
    (tmp_path / "dev" / "dri").mkdir(parents=True)
    for number, device in enumerate(["0x0bd5", "0x9a49"]):
        write(tmp_path, f"sys/class/drm/renderD{128 + number}/device/vendor", "0x8086\n")
        write(tmp_path, f"sys/class/drm/renderD{128 + number}/device/device", f"{device}\n")
    (found,) = find(tmp_path)
    assert found == Found("GPU", ("0",), "ZE_AFFINITY_MASK", "Intel-GPU-Max-1550")


def test_a_tpu_behind_vfio_is_known_by_its_vendor(tmp_path: Path) -> None:
    for group, vendor in (("5", "0x1ae0"), ("96", "0x8086")):
        write(tmp_path, f"dev/vfio/{group}")
        write(tmp_path, f"sys/kernel/iommu_groups/{group}/devices/0000:00:05.0/vendor", vendor)
    (found,) = find(tmp_path)
    assert (found.resource, found.ids) == ("TPU", ("0",))


def test_nvidia_is_asked_for_where_its_driver_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask() -> list[str]:
        asked.append(True)
        return ["NVIDIA A100-SXM4-40GB"] * 3

    monkeypatch.setattr(accelerators, "ask_nvml", ask)
    assert find(tmp_path) == []
    assert not asked
    write(tmp_path, "dev/nvidiactl")
    assert find(tmp_path) == [Found("GPU", ("0", "1", "2"), "CUDA_VISIBLE_DEVICES", "A100")]


def test_a_driver_that_is_broken_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerators, "ask_nvml", list)
    write(tmp_path, "dev/nvidiactl")
    assert find(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "type_name"),
    [
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
    ],
)
def test_a_product_name_becomes_a_type(name: str, type_name: str) -> None:
    assert accelerators.nvidia_type(name) == type_name


def test_a_variable_limits_and_names_the_devices(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path, f"dev/davinci{number}")
    (found,) = find(tmp_path, ASCEND_RT_VISIBLE_DEVICES="3,1")
    assert found.ids == ("3", "1")
    assert find(tmp_path, ASCEND_RT_VISIBLE_DEVICES="") == []


def test_what_the_user_says_counts_seen_or_not(tmp_path: Path) -> None:
    (found,) = discover({"GPU": 2}, {}, root=str(tmp_path))
    assert found == Found("GPU", ("0", "1"), "CUDA_VISIBLE_DEVICES")
    write(tmp_path, "dev/davinci0")
    assert discover({"NPU": 0}, {}, root=str(tmp_path)) == []
    (found,) = discover({"NPU": 3}, {}, root=str(tmp_path))
    assert found.ids == ("0", "1", "2")


def test_more_devices_than_are_visible_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 GPU, but CUDA_VISIBLE_DEVICES contains"):
        discover({"GPU": 3}, {"CUDA_VISIBLE_DEVICES": "0,1"}, root=str(tmp_path))


def test_processes_are_told_in_the_vendors_words() -> None:
    assert variables_for("GPU", "CUDA_VISIBLE_DEVICES", ["1", "3"]) == {
        "CUDA_VISIBLE_DEVICES": "1,3"
    }
    assert variables_for("FURIOSA", "FURIOSA_DEVICES", ["1", "3"]) == {
        "FURIOSA_DEVICES": "npu:1,npu:3"
    }
    assert variables_for("TPU", "TPU_VISIBLE_CHIPS", ["2"]) == {
        "TPU_VISIBLE_CHIPS": "2",
        "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
        "TPU_HOST_BOUNDS": "1,1,1",
    }
    assert variables_for("GPU", "", ["0"]) == {}


def test_shares_are_for_devices_that_can_be_shared() -> None:
    check_devices("GPU", 0.5)
    check_devices("gate", 1.5)
    check_devices("TPU", 4)
    with pytest.raises(ValueError, match="must be whole numbers"):
        check_devices("GPU", 1.5)
    with pytest.raises(ValueError, match="must be whole numbers"):
        check_devices("HPU", 0.5)
    with pytest.raises(ValueError, match="not a supported chip configuration"):
        check_devices("TPU", 3)


def test_a_variable_that_programs_set_themselves_is_left_alone() -> None:
    name = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    assert is_left_alone("CUDA_VISIBLE_DEVICES", {name: "1"})
    assert not is_left_alone("CUDA_VISIBLE_DEVICES", {name: "0"})
    assert not is_left_alone("TPU_VISIBLE_CHIPS", {name: "1"})
    assert is_left_alone("RBLN_DEVICES", {"RAY_EXPERIMENTAL_NOSET_RBLN_RT_VISIBLE_DEVICES": "true"})
