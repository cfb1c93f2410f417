"""A short run of `make chaos`, which see: everything but the driver is killed once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support import REPOSITORY, script_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")


@pytest.mark.timeout(300)
def test_answers_are_right_and_nothing_is_left_while_everything_is_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--minutes=0.5", "--seed=6", "--every=2"],
        cwd=REPOSITORY,
        env=script_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "everything is right and nothing is left" in done.stdout
