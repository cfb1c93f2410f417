"""The runtime under test as `ray`: poolray, or the reference whose programs it must run unchanged.

The tests in `test_core_*.py` describe tasks and objects as programs see them. The reference is the
oracle: they pass on it too, apart from those marked `better_than_reference`, which it must fail.

    POOLRAY_TEST_CORE=ray python -m pytest -p no:xdist tests/contract/test_core_*.py
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from executor_support import Gate

IMPLEMENTATION = os.environ.get("POOLRAY_TEST_CORE", "poolray")
IS_REFERENCE = IMPLEMENTATION == "ray"

# Long enough for the reference, which starts a new worker process in a second or two and retries
# failures after another; short enough for a test run to survive a hang.
DEADLINE_S = 40.0

# What the shared runtime of a test process has; the tests count on it.
CPUS = 2

if IS_REFERENCE:
    # By default it writes an access token into the home directory, and a test leaves nothing there.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # It also merges equal lines of different workers, so that a test could not count them.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Its workers are new interpreters, which do not find the test modules as forked ones do.
    _SEARCH_PATH = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _SEARCH_PATH))

# Without its dashboard the reference starts in half the time; its log says nothing a test needs.
_START_OPTIONS: dict[str, Any] = (
    {"include_dashboard": False, "logging_level": "error"} if IS_REFERENCE else {}
)

# Of any type: half of the tests are about calls that a type checker refuses.
ray: Any = importlib.import_module(IMPLEMENTATION)


_shared_node_id: str | None = None


def start_runtime() -> None:
    """Have a runtime of `CPUS` CPUs in this process; tests share it, for a start is slow."""
    global _shared_node_id
    if ray.is_initialized():
        # Pools and tests of `init` in this process may have started another one meanwhile.
        running = ray.init(ignore_reinit_error=True).address_info["node_id"]
        if running == _shared_node_id:
            return
        ray.shutdown()
    _shared_node_id = init(num_cpus=CPUS).address_info["node_id"]


def init(**options: Any) -> Any:
    """`ray.init`, with what makes the reference start faster."""
    return ray.init(**_START_OPTIONS, **options)


def get(refs: Any) -> Any:
    """`ray.get` that fails a test instead of hanging it."""
    return ray.get(refs, timeout=DEADLINE_S)


# A pipe forgets its tokens when the last process closes it, and a task may start after its test.
_gates_left_open: list[Gate] = []


@contextlib.contextmanager
def gate_at(path: Path) -> Iterator[Gate]:
    """What holds tasks back until the test opens it; its end opens it for good."""
    gate = Gate(path)
    _gates_left_open.append(gate)
    with gate:
        yield gate


def better_than_reference(
    reason: str, *, always: bool = True, run: bool = True
) -> pytest.MarkDecorator:
    """Mark a promise that poolray makes and the reference breaks, in the way that `reason` tells.

    The reference has to fail the test, so that the mark goes when the difference does. With
    `always=False` it fails only sometimes; with `run=False` it would hang or end the test process.
    """
    return pytest.mark.xfail(IS_REFERENCE, reason=reason, strict=always, run=run)


@dataclass(frozen=True)
class ScriptResult:
    exit_code: int
    stdout: str
    stderr: str

    def lines(self) -> list[str]:
        """What the script and its workers printed, line by line."""
        return self.stdout.splitlines()


# `linger` gives what goes on behind the script the time to be seen: the reference reads the logs of
# its workers now and then.
_SCRIPT_HEADER = """
import {implementation} as ray

def linger():
    import time
    time.sleep({linger_s})
"""


def run_script(path: Path, body: str, *, environment: dict[str, str] | None = None) -> ScriptResult:
    """Run `body` as the main file of a new interpreter, where `ray` is the runtime under test.

    For what only a whole interpreter shows: functions of `__main__`, its output, its end.
    """
    linger_s = 2 if IS_REFERENCE else 0.5
    header = _SCRIPT_HEADER.format(implementation=IMPLEMENTATION, linger_s=linger_s)
    path.write_text(header + textwrap.dedent(body))
    search_path = os.pathsep.join(filter(None, sys.path))
    # A session of its own, so that a script that hangs is ended with all of its workers: they hold
    # the pipes open, and reading these would go on for as long as they live.
    script = subprocess.Popen(
        [sys.executable, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path} | (environment or {}),
        cwd=path.parent,
        start_new_session=True,
    )
    try:
        stdout, stderr = script.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        stdout, stderr = script.communicate()
        pytest.fail(f"the script did not end; stdout: {stdout!r}, stderr: {stderr!r}")
    return ScriptResult(script.returncode, stdout, stderr)
