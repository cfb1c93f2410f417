"""Logs of workers: there are none to read, and these calls say so.

What: the calls of `ray.util.state` that read log files.
Who calls: user code, through `poolray.util.state`.
May touch: nothing.
Invariants: the answer is always the same error.
"""

from __future__ import annotations

from typing import NoReturn

from poolray.exceptions import NotSupportedError

__all__ = ["get_log", "list_logs"]

_NO_LOGS = (
    "This version of poolray keeps no log files of workers: what they print goes to the driver (to "
    "its terminal, or its replaced sys.stdout), and log_to_driver=False drops it. Logs of a "
    "cluster's daemons lie in the folder that `poolray start` names."
)


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: int = 30,
) -> dict[str, list[str]]:
    """Refused: there are no log files of workers.

    Raises
    ------
    NotSupportedError
        Always; its text says where output goes.
    """
    raise NotSupportedError(_NO_LOGS)


def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: int = 30,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str | None = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
) -> NoReturn:
    """Refused: there are no log files of workers.

    Raises
    ------
    NotSupportedError
        Always; its text says where output goes.
    """
    raise NotSupportedError(_NO_LOGS)
