"""What `init` was given, checked before anything is started.

What: raises for options that are unknown, out of range or of no use together.
Who calls: `session.py`.
May touch: the file system, for folders that objects may be spilled to.
Invariants: nothing is started when it raises.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from poolray.config import Config
from poolray.exceptions import NotSupportedError
from poolray.local.machine import check_amounts
from poolray.objects import spill_urls


def check_no_node(
    labels: object, spill_directories: object, memory: object, options: dict[str, Any]
) -> None:
    """A cluster's nodes are started already: what they are made with cannot be said here."""
    given = {
        "labels": labels,
        "object_spilling_directory": spill_directories,
        "_memory": memory,
        **options,
    }
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"When connecting to an existing cluster, {', '.join(names)} must not be provided: "
            "give it to `poolray start`."
        )


#: Parameters that the reference's `init` has beyond ours -> why they mean nothing here.
_REFERENCE_ONLY = {
    **dict.fromkeys(("dashboard_host", "dashboard_port"), "there is no dashboard"),
    **dict.fromkeys(
        ("logging_config", "logging_format"),
        "poolray logs to the standard logger 'poolray': configure that",
    ),
    **dict.fromkeys(
        (
            "enable_resource_isolation",
            "cgroup_path",
            "system_reserved_cpu",
            "system_reserved_memory",
        ),
        "workers are not put into control groups",
    ),
    "runtime_env": "there are no runtime environments",
    "job_config": "a job is configured with the parameters of init()",
    "proxy_server_url": "nothing is behind a proxy",
    "_temp_dir": "files go below TMPDIR, values to object_spilling_directory",
    "_node_ip_address": "without a cluster nothing listens, on no address",
}


def without_reference_only(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `init` without those that the reference alone has, where they ask for nothing.

    Raises
    ------
    NotSupportedError
        One of them asks for something.
    RuntimeError
        `local_mode`, as in the reference.
    """
    if options.get("local_mode"):
        raise RuntimeError("`local_mode` is not supported: start with num_cpus=1 to debug.")
    for name, why in _REFERENCE_ONLY.items():
        if options.get(name):
            raise NotSupportedError(f"init({name}={options[name]!r}): {why}.")
    left_out = ("local_mode", *_REFERENCE_ONLY)
    return {name: value for name, value in options.items() if name not in left_out}


def check_init(
    address: str | None,
    num_cpus: float | None,
    num_gpus: float | None,
    resources: dict[str, float] | None,
    object_store_memory: int | None,
    namespace: str | None,
    options: dict[str, Any],
) -> None:
    unknown = [name for name in options if name not in Config.__dataclass_fields__]
    if unknown:
        raise RuntimeError(f"Unknown keyword argument(s): {', '.join(unknown)}")
    if address is not None:
        if num_cpus is not None or num_gpus is not None:
            raise ValueError(
                "When connecting to an existing cluster, num_cpus and num_gpus must not be "
                "provided."
            )
        if resources is not None:
            raise ValueError(
                "When connecting to an existing cluster, resources must not be provided."
            )
        if object_store_memory is not None:
            raise ValueError(
                "When connecting to an existing cluster, object_store_memory must not be provided."
            )
    check_amounts(num_cpus, num_gpus, resources, object_store_memory)
    if namespace is not None and not isinstance(namespace, str):
        raise TypeError("namespace must be None or a string.")
    if namespace == "":
        raise ValueError('"" is not a valid namespace. Pass None to not specify a namespace.')


def checked_system_config(given: dict[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"_system_config must be a dictionary of settings: {given!r}")
    unknown = [str(name) for name in given if name not in Config.__dataclass_fields__]
    if unknown:
        raise ValueError(
            f"_system_config names settings that there are none of: {', '.join(unknown)}. Those "
            "that there are, with their reasons, are the fields of poolray.config.Config."
        )
    return given


def find_spill_directories(
    given: str | os.PathLike[str] | Sequence[str] | None,
) -> tuple[str, ...]:
    """The folders that objects may be spilled to, by full path or URL; they are there and can be
    used.
    """
    if given is None:
        return ()
    names = [given] if isinstance(given, str | os.PathLike) else list(given)
    directories = []
    for name in names:
        text = os.fspath(name)
        if spill_urls.is_url(text):
            spill_urls.check(text)
            directories.append(text)
            continue
        if not text:
            raise ValueError("object_spilling_directory names no folder.")
        path = os.path.abspath(text)
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"object_spilling_directory {path} cannot be made: {error}. Name a folder that "
                "this user may write to."
            ) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(
                f"object_spilling_directory {path} cannot be written to by this user: change its "
                "permissions, or name another folder."
            )
        directories.append(path)
    if not directories:
        raise ValueError("object_spilling_directory names no folder.")
    return tuple(dict.fromkeys(directories))
