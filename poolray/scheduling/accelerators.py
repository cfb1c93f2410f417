"""Accelerators of this machine: how many there are, what they are called, how a process is told.

What: one table of kinds; for each its resource name, the variable that makes devices visible to a
process, and a way to count devices without loading a vendor's libraries into the program.
Who calls: the local shell at `init`; a worker that was given devices.
May touch: `/dev`, `/sys`, the environment that it is handed, the driver's management library.
Invariants: without devices nothing is loaded and nothing printed; a driver that is broken counts
as absent.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

GPU = "GPU"


class Found(msgspec.Struct, frozen=True):
    """The devices of one kind that this machine has."""

    resource: str
    ids: tuple[str, ...]
    variable: str  #: empty: nothing selects devices of this kind
    #: What `accelerator_type=` calls them; empty: unknown.
    type_name: str = ""


class Kind(msgspec.Struct, frozen=True):
    """One kind of accelerator.

    `count` is given the names in `/dev` and a root folder (other than "/" in tests), and gives the
    number of devices and their type.
    """

    resource: str
    variable: str
    count: Callable[[Sequence[str], str], tuple[int, str]]
    #: Whether tasks may share a device.
    may_share: bool = True


# ---- counting ------------------------------------------------------------------------------------


def _matching(pattern: str, names: Sequence[str]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _entries(root: str, *path: str) -> list[str]:
    try:
        return sorted(os.listdir(os.path.join(root, *path)))
    except OSError:
        return []  # there is none, or it is not for us to see


def _read(root: str, *path: str) -> str:
    try:
        with open(os.path.join(root, *path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _count_nvidia(names: Sequence[str], root: str) -> tuple[int, str]:
    if "nvidiactl" not in names and "dxg" not in names:  # (dxg: Windows' subsystem for Linux)
        return 0, ""
    found = ask_nvml()
    return len(found), nvidia_type(found[0]) if found else ""


def ask_nvml() -> list[str]:
    """Names of NVIDIA's devices, as its management library gives them."""
    import ctypes

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return []
    except (OSError, AttributeError):
        return []  # no driver, or one of another world
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        names = []
        for index in range(count.value):
            handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            known = (
                library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
                and library.nvmlDeviceGetName(handle, name, len(name)) == 0
            )
            names.append(name.value.decode(errors="replace") if known else "")
        return names
    finally:
        library.nvmlShutdown()


def nvidia_type(name: str) -> str:
    """What `accelerator_type=` calls a device: "NVIDIA A100-SXM4-40GB" is an "A100"."""
    match = re.match(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)", name)
    if match and len(match.group(1)) > 1:
        return match.group(1).replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", name).strip().replace(" ", "-")


#: PCI device ids of AMD's accelerators -> their types.
_AMD_TYPES = {
    "0x66a1": "AMD-Radeon-R9-200-HD-7900",
    "0x738c": "AMD-Instinct-MI100",
    "0x7408": "AMD-Instinct-MI250X",
    "0x740c": "AMD-Instinct-MI250X-MI250",
    "0x740f": "AMD-Instinct-MI210",
    "0x74a0": "AMD-Instinct-MI300A",
    "0x74a1": "AMD-Instinct-MI300X-OAM",
    "0x74a2": "AMD-Instinct-MI308X-OAM",
    "0x74a5": "AMD-Instinct-MI325X-OAM",
}


def _count_amd(names: Sequence[str], root: str) -> tuple[int, str]:
    if "kfd" not in names:
        return 0, ""
    folder = ("sys", "class", "kfd", "kfd", "topology", "nodes")
    count, type_name = 0, ""
    for node in _entries(root, *folder):
        lines = _read(root, *folder, node, "properties").splitlines()
        facts = dict(line.split(" ", 1) for line in lines if " " in line)
        if int(facts.get("simd_count", "0")) > 0:  # the others are CPUs
            count += 1
            type_name = type_name or _AMD_TYPES.get(hex(int(facts.get("device_id", "0"))), "")
    return count, type_name


#: PCI device ids of Intel's data-centre GPUs, which are no screens' -> their types.
_INTEL_TYPES = {"0x0bd5": "Intel-GPU-Max-1550", "0x0bda": "Intel-GPU-Max-1100"}


def _count_intel(names: Sequence[str], root: str) -> tuple[int, str]:
    if "dri" not in names:
        return 0, ""
    cards = [name for name in _entries(root, "sys", "class", "drm") if name.startswith("renderD")]
    types = []
    for card in cards:
        device = ("sys", "class", "drm", card, "device")
        if _read(root, *device, "vendor").strip() == "0x8086":
            types.append(_INTEL_TYPES.get(_read(root, *device, "device").strip(), ""))
    types = [type_name for type_name in types if type_name]
    return len(types), types[0] if types else ""


def _count_apple(names: Sequence[str], root: str) -> tuple[int, str]:
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        return 1, "Apple-Silicon"
    return 0, ""


def _count_tpu(names: Sequence[str], root: str) -> tuple[int, str]:
    chips = _matching(r"accel[0-9]+", names)
    if not chips and "vfio" in names:
        groups = [name for name in _entries(root, "dev", "vfio") if name.isdecimal()]
        chips = sum(_is_google(root, group) for group in groups)
    return chips, ""


def _is_google(root: str, group: str) -> bool:
    folder = ("sys", "kernel", "iommu_groups", group, "devices")
    return any(
        _read(root, *folder, device, "vendor").strip() == "0x1ae0"
        for device in _entries(root, *folder)
    )


def _count_neuron(names: Sequence[str], root: str) -> tuple[int, str]:
    devices = [name for name in names if re.fullmatch(r"neuron[0-9]+", name)]
    cores = 0
    for device in devices:
        text = _read(root, "sys", "class", "neuron_device", device, "core_count").strip()
        cores += int(text) if text.isdecimal() else 2
    return cores, "aws-neuron-core" if cores else ""


def _count_habana(names: Sequence[str], root: str) -> tuple[int, str]:
    count = _matching(r"hl[0-9]+", names)
    if not count and "accel" in names:
        count = sum(
            _read(root, "sys", "class", "accel", name, "device", "vendor").strip() == "0x1da3"
            for name in _entries(root, "sys", "class", "accel")
        )
    return count, "Intel-GAUDI" if count else ""


def _count_mobilint(names: Sequence[str], root: str) -> tuple[int, str]:
    aries, regulus = _matching(r"aries[0-9]+", names), _matching(r"regulus-npu.*", names)
    return aries + regulus, ("MOBILINT_ARIES" if aries else "MOBILINT_REGULUS" if regulus else "")


def _count_furiosa(names: Sequence[str], root: str) -> tuple[int, str]:
    count = _matching(r"npu[0-9]+mgmt", _entries(root, "dev", "rngd")) if "rngd" in names else 0
    return count, "FURIOSA_RNGD" if count else ""


def _count_tenstorrent(names: Sequence[str], root: str) -> tuple[int, str]:
    return len(_entries(root, "dev", "tenstorrent")) if "tenstorrent" in names else 0, ""


def _count_named(pattern: str) -> Callable[[Sequence[str], str], tuple[int, str]]:
    return lambda names, root: (_matching(pattern, names), "")


#: Every kind there is. Of those with one resource name the first that has devices counts.
KINDS = (
    Kind(GPU, "CUDA_VISIBLE_DEVICES", _count_nvidia),
    Kind(GPU, "HIP_VISIBLE_DEVICES", _count_amd),
    Kind(GPU, "ZE_AFFINITY_MASK", _count_intel),
    Kind(GPU, "", _count_apple),
    Kind(GPU, "CUDA_VISIBLE_DEVICES", _count_named(r"mxc[0-9]+")),  # MetaX
    Kind("TPU", "TPU_VISIBLE_CHIPS", _count_tpu, may_share=False),
    Kind("neuron_cores", "NEURON_RT_VISIBLE_CORES", _count_neuron, may_share=False),
    Kind("NPU", "ASCEND_RT_VISIBLE_DEVICES", _count_named(r"davinci[0-9]+")),
    Kind("HPU", "HABANA_VISIBLE_MODULES", _count_habana, may_share=False),
    Kind("RBLN", "RBLN_DEVICES", _count_named(r"rbln[0-9]+"), may_share=False),
    Kind("FURIOSA", "FURIOSA_DEVICES", _count_furiosa, may_share=False),
    Kind("MBLT", "QBRUNTIME_VISIBLE_DEVICES", _count_mobilint, may_share=False),
    Kind("TTNPU", "TT_VISIBLE_DEVICES", _count_tenstorrent),
)

#: How names in `dev` begin that mean any of them: with none there is nothing to look for.
_HINTS = (
    *("accel", "aries", "davinci", "dri", "dxg", "hl", "kfd", "mxc", "neuron", "nvidiactl"),
    *("rbln", "regulus", "rngd", "tenstorrent", "vfio"),
)
#: Names of resources that have devices.
RESOURCES = tuple(dict.fromkeys(kind.resource for kind in KINDS))
#: Those of which a task takes whole devices only.
WHOLE_ONLY = frozenset(kind.resource for kind in KINDS if not kind.may_share)


def check_devices(name: str, amount: float) -> None:
    """Refuse shares of devices that tasks cannot share, one and a half of any, three TPU chips.

    Raises
    ------
    ValueError
        The amount is of that sort.
    """
    if name == "TPU" and amount and amount not in _TPU_CHIPS:
        raise ValueError(
            f"The number of requested 'TPU' was set to {amount} which is not a supported chip "
            f"configuration. Supported configs: {_TPU_CHIPS}"
        )
    if name not in RESOURCES or amount == int(amount):
        return
    if name in WHOLE_ONLY:
        raise ValueError(
            f"{name} resource quantity must be whole numbers. The specified quantity {amount} is "
            "invalid."
        )
    if amount > 1:
        raise ValueError(
            f"{name} resource quantities >1 must be whole numbers. The specified quantity {amount} "
            "is invalid."
        )


# ---- what a machine has --------------------------------------------------------------------------


def discover(
    given: Mapping[str, float],
    environment: Mapping[str, str],
    *,
    root: str = "/",
    device_names: Sequence[str] | None = None,
) -> list[Found]:
    """The devices that this process may use.

    Parameters
    ----------
    given : mapping of str to float
        Amounts that the user names, by resource; they take the place of what would be found.
    environment : mapping of str to str
        Where a variable such as `CUDA_VISIBLE_DEVICES` limits the devices.
    root : str, default "/"
        Where `dev` and `sys` are.
    device_names : sequence of str, optional
        Names in `dev`, where they are known already.

    Raises
    ------
    ValueError
        The user names more devices than the variable makes visible.
    """
    known = _entries(root, "dev") if device_names is None else device_names
    names = [name for name in known if name.startswith(_HINTS)]
    found: dict[str, Found] = {}
    for kind in KINDS:
        if kind.resource in found or given.get(kind.resource) == 0:
            continue
        count, type_name = kind.count(names, root)
        if count:
            found[kind.resource] = _limited(kind, count, type_name, given, environment)
    for kind in KINDS:
        # What the user says is there counts, seen or not: as the first kind of that name.
        if kind.resource not in found and given.get(kind.resource):
            found[kind.resource] = _limited(kind, 0, "", given, environment)
    return [devices for devices in found.values() if devices.ids]


def _limited(
    kind: Kind,
    count: int,
    type_name: str,
    given: Mapping[str, float],
    environment: Mapping[str, str],
) -> Found:
    visible = visible_ids(kind.variable, environment)
    wanted = given.get(kind.resource)
    if wanted is not None and visible is not None and wanted > len(visible):
        raise ValueError(
            f"Attempting to start raylet with {int(wanted)} {kind.resource}, but {kind.variable} "
            f"contains {visible}."
        )
    size = int(wanted) if wanted is not None else count
    ids = visible if visible is not None else [str(index) for index in range(size)]
    return Found(kind.resource, tuple(ids[:size]), kind.variable, type_name)


def visible_ids(variable: str, environment: Mapping[str, str]) -> list[str] | None:
    """The ids that a variable names; None when it is not set, so that all are visible."""
    text = environment.get(variable) if variable else None
    if text is None:
        return None
    if text in ("", "NoDevFiles"):
        return []
    return [part.strip().removeprefix("npu:") for part in text.split(",")]


# ---- what a process is told ----------------------------------------------------------------------


#: Variables that the reference's users know by another name where they say "leave it alone".
_ALSO_CALLED = {
    "RBLN_DEVICES": "RBLN_RT_VISIBLE_DEVICES",
    "QBRUNTIME_VISIBLE_DEVICES": "MBLT_RT_VISIBLE_DEVICES",
    "TT_VISIBLE_DEVICES": "TENSTORRENT_VISIBLE_DEVICES",
}


def is_left_alone(variable: str, environment: Mapping[str, str]) -> bool:
    """Whether the user wants to set a variable himself, in each process.

    He says so with `RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1` and the like, as libraries that
    run on the reference do.
    """
    name = f"RAY_EXPERIMENTAL_NOSET_{_ALSO_CALLED.get(variable, variable)}"
    return environment.get(name, "").lower() in ("1", "true")


def variables_for(resource: str, variable: str, ids: Sequence[str]) -> dict[str, str]:
    """The environment of a process that is to use these devices of a kind, and no others."""
    if not variable:
        return {}
    if resource == "FURIOSA":
        return {variable: ",".join(f"npu:{each}" for each in ids)}
    made = {variable: ",".join(ids)}
    if resource == "TPU" and len(ids) in _TPU_BOUNDS:
        # A part of a host's chips is a topology of its own.
        made["TPU_CHIPS_PER_HOST_BOUNDS"] = _TPU_BOUNDS[len(ids)]
        made["TPU_HOST_BOUNDS"] = "1,1,1"
    return made


_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1"}
#: How many chips of a host can work together.
_TPU_CHIPS = (1, 2, 4, 8)
