"""The interpreter's own tests of `ProcessPoolExecutor`, run on poolray's `Executor`.

`cpython_executor_runner.py` runs them; it lists the few that are left out, each with its reason,
and the few that need an executor which a dead worker breaks. To see whether a failure is poolray's
or the interpreter's, run the suite on the standard class:

    POOLRAY_TEST_SUITE_EXECUTOR=concurrent.futures:ProcessPoolExecutor pytest <this file>
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cpython_executor_runner import GROUPS, STANDARD, SUITE

RUNNER = Path(__file__).with_name("cpython_executor_runner.py")
TIMEOUT_S = 50.0

# How processes are started has no part in how futures are waited for, and these groups sleep much.
GROUPS_FOR_ONE_START_METHOD = ("as_completed", "wait")

RUNS = [
    (group, start_method)
    for group in GROUPS
    for start_method in ("fork", "spawn", "forkserver")
    if start_method == "fork" or group not in GROUPS_FOR_ONE_START_METHOD
]


def executor_under_test() -> str:
    spec = os.environ.get("POOLRAY_TEST_SUITE_EXECUTOR", "poolray:Executor")
    module, _, name = spec.partition(":")
    if not hasattr(importlib.import_module(module), name):
        pytest.skip(f"there is no {name} in {module}")
    return spec


def run_group(spec: str, group: str, start_method: str, report: Path) -> str:
    """Run the group in a process of its own and return what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, str(RUNNER), spec, group, start_method, str(report)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=report.parent,
        env=environment,
        # One session for it and its workers, so that a hang ends with all of them.
        start_new_session=True,
    ) as runner:
        try:
            output, _ = runner.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(runner.pid, signal.SIGKILL)
            output, _ = runner.communicate()
            output += f"\nkilled: it took longer than {TIMEOUT_S} s"
    return output + f"\nexit code {runner.returncode}"


@pytest.mark.skipif(
    importlib.util.find_spec(SUITE) is None,
    reason=f"this Python was installed without {SUITE}",
)
@pytest.mark.parametrize(("group", "start_method"), RUNS)
def test_executor_passes_the_suite_of_the_interpreter(
    group: str, start_method: str, tmp_path: Path
) -> None:
    spec = executor_under_test()
    report = tmp_path / "report.json"
    output = run_group(spec, group, start_method, report)
    records = json.loads(report.read_text()) if report.exists() else []
    print(*(f"{record['outcome']:<9}{record['test']}" for record in records), sep="\n")

    failed = [f"{r['test']}\n{r['detail']}" for r in records if r["outcome"] == "failed"]
    assert not failed, "\n".join([*failed, output])
    assert output.endswith("exit code 0"), f"after {records[-1:]}:\n{output}"
    assert any(record["outcome"] == "passed" for record in records)
    if spec == STANDARD:
        assert not [record for record in records if record["outcome"] == "excluded"]
