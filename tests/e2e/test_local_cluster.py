"""`cluster/local.py` as make uses it: its head runs jobs, and stopping it leaves every other process alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import head, processes
from cluster.processes import PROJECT, Record, free_port
from tests.tiny_dataset import make_folder_tree

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
LONG = "import sys, time\nprint('ready', flush=True)\ntime.sleep(60)\n"


def command(*words: str, cwd: Path = PROJECT) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "cluster.local", *words]
    return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def submit(code: Path, name: str) -> subprocess.Popen[str]:
    return command("submit", "--working-dir", str(code), "--", "python", name)


@pytest.fixture(scope="module")
def foreign_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """Somebody else's Ray, on the ports everybody wants, started by hand as the manual says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_CLUSTER_STATE", str(tmp_path_factory.mktemp("foreign")))
        gcs, temp_dir = free_port(6379), head.make_temp_dir()
        argv = [str(BIN / "ray"), "start", "--head", "--block", f"--temp-dir={temp_dir}", "--include-dashboard=false"]
        argv += [f"--port={gcs}", f"--ray-client-server-port={free_port(10001)}"]
        argv += [f"--dashboard-agent-listen-port={free_port(52365)}", f"--object-store-memory={100 * 2**20}"]
        theirs = processes.start(
            "foreign", argv, dict(os.environ), url=f"127.0.0.1:{gcs}", ready=lambda: free_port(gcs) != gcs,
            timeout_s=60, temp_dir=temp_dir,
        )  # fmt: skip
        yield theirs
        processes.stop(theirs)


@pytest.fixture(scope="module")
def _state(foreign_head: Record, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state directory as in a checkout of our own, beside the foreign head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_CLUSTER_STATE", str(tmp_path_factory.mktemp("ours")))
        yield
        for record in processes.records():
            processes.stop(record)


@pytest.fixture
def ours(_state: None) -> Record:
    """Our head; the first test that asks for it starts it."""
    start = command("start")
    output, _ = start.communicate(timeout=300)
    assert start.returncode == 0, output
    record = processes.read_record(head.HEAD)
    assert record is not None
    assert record.url in output
    return record


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "good.py").write_text("import os, ray\nray.init()\nprint('seen from', os.environ['HYPDEFECT_HOME'])\n")
    (folder / "bad.py").write_text("import sys\nsys.exit('on purpose')\n")
    (folder / "long.py").write_text(LONG)
    return folder


def test_jobs_run_on_our_head_and_their_status_is_ours(ours: Record, code: Path) -> None:
    jobs = [submit(code, name) for name in ("good.py", "bad.py")]
    (good, _), (bad, _) = (job.communicate(timeout=300) for job in jobs)
    assert jobs[0].returncode == 0, good
    assert jobs[1].returncode == 1, bad
    assert f"job page: {ours.url}/#/jobs/good-" in good
    assert good.count(f"seen from {os.environ['HYPDEFECT_HOME']}") == 1
    assert "on purpose" in bad
    assert processes.read_record(head.HEAD) == ours, "a second start must find the first head"


def test_an_interrupt_stops_the_job_and_a_second_one_leaves_it(ours: Record, code: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    jobs = [submit(code, "long.py") for _ in range(3)]
    names = []
    for job in jobs:
        assert job.stdout is not None
        names.append(job.stdout.readline().strip().rpartition("/")[2])
        while job.stdout.readline().strip() != "ready":
            assert job.poll() is None
    jobs[0].send_signal(signal.SIGINT)
    jobs[1].send_signal(signal.SIGTERM)
    jobs[2].send_signal(signal.SIGINT)
    time.sleep(0.5)
    jobs[2].send_signal(signal.SIGINT)
    outputs = [job.communicate(timeout=180)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [130, 130, 130], outputs
    assert "left running" in outputs[2]
    client = JobSubmissionClient(ours.url)
    statuses = [client.get_job_status(name).value for name in names]
    client.stop_job(names[2])
    assert statuses == ["STOPPED", "STOPPED", "RUNNING"]


def test_relative_paths_mean_the_folder_of_the_user(ours: Record, tmp_path: Path) -> None:
    make_folder_tree(tmp_path / "images")
    (tmp_path / "c.yaml").write_text("root: images\n")
    words = ["python", "jobs/ingest.py", "--dataset", "folder", "--config", "c.yaml"]
    job = command("submit", "--", *words, "--out", "out/m.parquet", "--json=result.json", cwd=tmp_path)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert (tmp_path / "out" / "m.parquet").is_file()
    assert json.loads((tmp_path / "result.json").read_text())

    env = os.environ | {"RAY_ADDRESS": ours.url}
    ray = [str(BIN / "ray"), "job", "submit", "--working-dir", str(PROJECT)]
    ray += ["--runtime-env", str(PROJECT / "cluster" / "runtime_env.yaml"), "--"]
    plain = subprocess.run(
        [*ray, *words[:-2], "--root", str(tmp_path / "images"), "--json", "lost.json"],
        cwd=PROJECT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert plain.returncode == 1
    assert "lost.json: this Ray job runs in a copy" in plain.stdout


def test_stop_ends_ours_and_spares_others(ours: Record, foreign_head: Record) -> None:
    mine, theirs = processes.members(ours), processes.members(foreign_head)
    assert len(mine) > 5
    assert len(theirs) > 3
    assert not mine & theirs
    stop = command("stop")
    output, _ = stop.communicate(timeout=180)
    assert stop.returncode == 0, output
    assert not processes.members(ours)
    assert not any(map(processes.lives, mine))
    assert not Path(ours.temp_dir).exists()
    assert all(map(processes.lives, theirs))
