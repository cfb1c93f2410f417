"""The command line of clusters: start, join, look, stop; what is left, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import poolray
from poolray.__main__ import main
from poolray.util.state import list_workers
from tests.integration.support import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons need Linux")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="poolray-cli-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def poolray_command(folder: Path) -> Iterator[Run]:
    """The command with folders, a home and daemons of its own."""
    variables = {**os.environ, "HOME": str(folder), "POOLRAY_TMPDIR": str(folder / "runs")}
    for name in ("POOLRAY_ADDRESS", "POOLRAY_AUTH_TOKEN", "POOLRAY_AUTH_TOKEN_PATH"):
        variables.pop(name, None)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "poolray", *arguments],
            env={**variables, **more},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    yield run
    run("stop", "--force", "--temp-dir", str(folder / "runs"))


def start_head(run: Run, *arguments: str, **variables: str) -> str:
    done = run("start", "--head", "--port=0", "--num-cpus=1", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    found = re.search(r"poolray start --address=(\S+)", done.stdout)
    assert found, done.stdout
    return found[1]


def daemons(folder: Path) -> list[str]:
    """Processes that the folder's daemons are, and their workers."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and f"HOME={folder}\0".encode() in environment:
            found.append(pid)
    return found


def test_a_cluster_is_started_joined_used_looked_at_and_stopped(
    folder: Path, poolray_command: Run
) -> None:
    run = poolray_command
    address = start_head(run)
    token = folder / ".poolray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    joined = run("start", f"--address={address}", "--num-cpus=2", '--resources={"disk": 3}')
    assert joined.returncode == 0, joined.stderr
    code = """
import poolray
poolray.init(address="auto")
task = poolray.remote(lambda: poolray.get_runtime_context().get_node_id())
print(len({poolray.get(task.remote()), poolray.get(task.options(num_cpus=2).remote())}))
"""
    program = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(folder), "POOLRAY_TMPDIR": str(folder / "runs")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert program.stdout.strip() == "2", program.stderr
    status = run("status", f"--address={address}")
    assert status.returncode == 0, status.stderr
    assert status.stdout.count(" 1 node_") == 2
    assert " 0.0/3.0 CPU\n" in status.stdout
    assert " 0.0/3.0 disk\n" in status.stdout
    logs = list((folder / "runs").glob("session_2*/logs/*.log"))
    assert len(logs) == 3
    stopped = run("stop", "--temp-dir", str(folder / "runs"))
    assert "Stopped 3 daemon(s)." in stopped.stdout
    wait_until(lambda: daemons(folder) == [], "the end of all processes", 10)
    assert "No daemons" in run("stop", "--temp-dir", str(folder / "runs")).stdout


def test_a_node_with_another_token_or_a_wrong_address_is_refused_in_words(
    folder: Path, poolray_command: Run
) -> None:
    run = poolray_command
    address = start_head(run)
    refused = run("start", f"--address={address}", POOLRAY_AUTH_TOKEN="not the cluster's token")
    assert refused.returncode == 1
    assert address in refused.stderr
    assert "token" in refused.stderr
    nobody = run("start", "--address=127.0.0.1:9")
    assert nobody.returncode == 1
    assert "127.0.0.1:9" in nobody.stderr
    nowhere = run("status", "--address=127.0.0.1:9")
    assert nowhere.returncode == 1
    assert "127.0.0.1:9" in nowhere.stderr


def test_without_a_token_the_cluster_stays_on_this_machine(
    folder: Path, poolray_command: Run
) -> None:
    run = poolray_command
    off = {"POOLRAY_AUTH_MODE": "disabled"}
    open_ = run("start", "--head", "--port=0", "--node-ip-address=0.0.0.0", **off)
    assert open_.returncode == 1
    assert "0.0.0.0" in open_.stderr
    address = start_head(run, **off)
    assert address.startswith("127.0.0.1:")
    assert not (folder / ".poolray").exists()
    assert run("status", f"--address={address}", **off).returncode == 0


@pytest.fixture
def blocking(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that has started a head and a node, and waits for their end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "poolray", "start", "--head", "--port=0", "--block"],
        env={**os.environ, "HOME": str(folder), "POOLRAY_TMPDIR": str(folder / "runs")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    process.stdout.close()
    yield process
    process.kill()
    process.wait()


def test_blocking_start_ends_with_its_daemons(
    folder: Path, poolray_command: Run, blocking: subprocess.Popen[str]
) -> None:
    poolray_command("stop", "--temp-dir", str(folder / "runs"))
    assert blocking.wait(20) == 0
    assert daemons(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_daemons_end_with_a_blocking_start(
    folder: Path, blocking: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert len(daemons(folder)) >= 2
    blocking.send_signal(number)
    assert blocking.wait(20) == (-number if number == signal.SIGKILL else 0)
    wait_until(lambda: daemons(folder) == [], "the end of its daemons")


@pytest.mark.parametrize("role", ["head", "node"])
def test_a_blocking_start_fails_with_any_of_its_daemons(
    folder: Path, blocking: subprocess.Popen[str], role: str
) -> None:
    found = map(psutil.Process, map(int, daemons(folder)))
    (daemon,) = (each for each in found if each.cmdline()[2:5][:2] == ["poolray.cluster", role])
    daemon.kill()
    assert blocking.wait(20) == 1
    wait_until(lambda: daemons(folder) == [], "the end of the others")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--head"),
        (["--head", "--address=127.0.0.1:1"], "--head"),
        (["--head", "--include-dashboard=true"], "dashboard"),
        (["--address=127.0.0.1:1", "--port=5"], "--port"),
        (["--address=here"], "HOST:PORT"),
        (["--head", "--resources=many"], "JSON"),
        (["--head", "--labels=a"], "KEY=VALUE"),
        (["--head", '--system-config={"no_such_field": 1}'], "no_such_field"),
        (["--head", "--min-worker-port=9", "--max-worker-port=8"], "no ports from"),
        (["--head", "--worker-port-list", "1,x"], "no list of ports, such as 10002,10003"),
        (["--head", "--dashboard-port=1"], "--dashboard-port: this version"),
        (["--head", "--enable-resource-isolation"], "--enable-resource-isolation: this version"),
        (["--head", "--include-log-monitor=false"], "log_to_driver"),
        (["--head", "--num-cpus=-1"], "Resource quantities must be nonnegative"),
        (["--head", "--num-gpus=-1"], "Resource quantities must be nonnegative"),
        (["--head", '--resources={"CPU": 3}'], "use `num_cpus` instead"),
        (["--head", '--resources={"disk": 1.5}'], "must all be whole numbers"),
        (["--head", '--resources={"disk": Infinity}'], "must all be whole numbers"),
        (["--head", '--resources={"disk": true}'], "JSON"),
        (["--head", "--labels=zone=@"], "Invalid label key value `@`"),
        (["--head", "--labels-file=/dev/null/none"], "/dev/null/none"),
        (["--head", "--object-store-memory=1000"], "minimum allowed"),
        (["--head", "--port=65536"], "is no port"),
        (["--head", "--port=-1"], "is no port"),
        (["--head", "--node-ip-address=no.such.host.invalid"], "--node-ip-address=no.such.host"),
    ],
)
def test_what_cannot_be_started_is_refused(
    poolray_command: Run, folder: Path, arguments: list[str], text: str
) -> None:
    done = poolray_command("start", *arguments)
    assert done.returncode != 0
    assert text in done.stderr
    assert daemons(folder) == []


def test_a_machine_joins_its_own_cluster_with_labels_of_a_file_and_in_json(
    folder: Path, poolray_command: Run
) -> None:
    labels = folder / "labels.yaml"
    labels.write_text("# of this machine\ngpu_type: A100\nregion: 'us'\n")
    address = start_head(
        poolray_command,
        *(f"--labels-file={labels}", '--labels={"region": "eu"}', "--node-ip-address=localhost"),
    )
    assert address.startswith("127.0.0.1:")
    joined = poolray_command("start", "--address=auto", "--num-cpus=1", "--labels=ray.io/tpu=x")
    assert joined.returncode == 0, joined.stderr
    assert address in joined.stdout
    shown = poolray_command("list", "nodes", "--detail", "--format=json", "--address=auto")
    rows = json.loads(shown.stdout)
    found = [row["labels"] for row in sorted(rows, key=lambda row: not row["is_head_node"])]
    assert found[0].items() >= {"gpu_type": "A100", "region": "eu"}.items()
    assert found[1]["ray.io/tpu"] == "x"
    status = poolray_command("status", "--address=auto")
    assert status.stdout.count(" 1 node_") == 2
    again = poolray_command(
        "start", "--head", "--node-ip-address=localhost", f"--port={address.rpartition(':')[2]}"
    )
    assert again.returncode == 1
    assert f"a cluster is running at {address} already" in again.stderr


def test_the_token_is_printed_when_there_is_one(folder: Path, poolray_command: Run) -> None:
    run = poolray_command
    assert run("get-auth-token").returncode == 1
    made = run("get-auth-token", "--generate")
    assert re.fullmatch(r"[0-9a-f]{64}\n", made.stdout)
    assert run("get-auth-token").stdout == made.stdout


def test_output_of_another_machine_names_its_address(poolray_command: Run, folder: Path) -> None:
    address = start_head(poolray_command)
    joined = poolray_command(
        "start",
        f"--address={address}",
        "--node-ip-address=127.0.0.2",
        "--num-cpus=1",
        '--resources={"far": 1}',
    )
    assert joined.returncode == 0, joined.stderr
    program = folder / "speaks.py"
    program.write_text(
        "import poolray\n"
        "poolray.init(address='auto')\n"
        "@poolray.remote(num_cpus=0.1)\n"
        "def speaks(word):\n"
        "    print('it says', word)\n"
        "far = speaks.options(resources={'far': 0.1})\n"
        "poolray.get([speaks.remote('near'), far.remote('distance')], timeout=30)\n"
        "poolray.shutdown()\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "HOME": str(folder), "POOLRAY_TMPDIR": str(folder / "runs")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(speaks pid=\d+\).* it says near", done.stdout), done.stdout
    assert re.search(r"\(speaks pid=\d+, ip=127\.0\.0\.2\).* it says distance", done.stdout)


# ---- what the page on clusters shows -------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
#: Commands in its blocks, and those in its text that say all that they need.
SHOWN = re.compile(
    r"^\$ poolray (?P<block>[^\n#]+)"
    r"|`poolray (?P<text>(?:list|get|summary|timeline|memory) [^`]+)`",
    re.MULTILINE,
)


@pytest.mark.timeout(120)
def test_the_commands_of_the_page_work_in_the_order_that_it_shows_them_in(
    folder: Path,
    poolray_command: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = [match["block"] or match["text"] for match in SHOWN.finditer(PAGE.read_text("utf-8"))]
    assert shown[0].strip() == "start --head"
    address = start_head(poolray_command)
    joined = poolray_command("start", f"--address={address}", "--num-cpus=1")
    assert joined.returncode == 0, joined.stderr
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("POOLRAY_TMPDIR", str(folder / "runs"))
    for name in ("POOLRAY_ADDRESS", "POOLRAY_AUTH_TOKEN", "POOLRAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)

    @poolray.remote
    class Speaker:
        def say(self) -> int:
            print("words")
            return os.getpid()

    poolray.init(address="auto", log_to_driver=False)
    try:
        speaker = Speaker.options(name="speaker", lifetime="detached").remote()
        pid = poolray.get(speaker.say.remote(), timeout=30)
        ref = poolray.remote(lambda: print("words")).remote()
        poolray.get(ref, timeout=30)
        task, actor = ref.task_id().hex(), speaker._actor_id.hex()
        (row,) = [row for row in list_workers() if row.pid == pid]
        (drained,) = [n["NodeID"] for n in poolray.nodes() if n["NodeID"] != row.node_id]
    finally:
        poolray.shutdown()
    told: dict[str, str] = {}
    # (What a drained node has printed cannot be asked for: that is last here.)
    for command in sorted(shown[1:], key=lambda command: "drain-node" in command):
        words = shlex.split(command)
        thing = actor if "actor" in words else task
        node = drained if words[0] == "drain-node" else row.node_id
        filled = {"--id=…": f"--id={thing}", "--node-id=…": f"--node-id={node}", "ID": task}
        filled |= {"--pid=4711": f"--pid={pid}", "--address=HOST:PORT": f"--address={address}"}
        capsys.readouterr()
        # (What goes on for ever is looked at up to now.)
        code = main([filled.get(word, word) for word in words if word != "--follow"])
        told[command.strip()], err = capsys.readouterr()
        assert code == 0, f"{command}: {err}"
    assert {command.split()[0] for command in told} == {
        *("drain-node", "list", "get", "summary", "timeline", "memory", "logs"),
    }
    assert told["logs task --id=…"] == "words\n"
    assert "words\n" in told["logs worker --pid=4711 --node-id=…"]
    assert "gcs_server:\n- head.err" in told["logs"]
    assert "the head listens" in told["logs head.log --tail=100 --follow"]
    assert '"FINISHED"' in told["get tasks ID"]
    assert (folder / "trace.json").exists()
