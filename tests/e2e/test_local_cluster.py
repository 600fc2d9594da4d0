"""`cluster/local.py` as make uses it: its head runs jobs, and stopping it leaves every other process alone."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import local

pytestmark = pytest.mark.e2e
BIN = Path(sys.executable).parent


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of this test's own, as if in a checkout of its own; what it names is stopped at the end."""
    monkeypatch.setenv("HYPDEFECT_CLUSTER_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    local.stop()


def command(*words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.local", *words],
        cwd=local.PROJECT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def record(pid: int, started: str, mark: str = "a mark nobody carries") -> local.Record:
    return local.Record(name="helper", pid=pid, pgid=pid, started=started, mark=mark, argv=[], url="", log="")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_stop_leaves_a_process_that_reuses_a_recorded_pid(state: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.mkdir()
    local.record_path("helper").write_text(json.dumps(asdict(record(sleeper.pid, "another boot:1"))))
    assert local.stop() == 0
    assert sleeper.poll() is None
    assert not local.record_path("helper").exists()


def test_stop_ends_what_it_recorded(state: Path, sleeper: subprocess.Popen[bytes]) -> None:
    started = local.start_time(sleeper.pid)
    assert started is not None
    assert local.stop_record(record(sleeper.pid, started)) == 1
    assert sleeper.wait(5) != 0


def test_stop_without_anything_running_is_fine(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.stop() == 0
    assert "nothing" in capsys.readouterr().out


def test_a_damaged_record_is_named(state: Path) -> None:
    state.mkdir()
    local.record_path("helper").write_text("{")
    with pytest.raises(local.ClusterError, match=r"helper\.json is damaged"):
        local.stop()
    local.record_path("helper").unlink()


def test_helpers_run_until_stop(state: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    first = local.run_background("pages", argv, 8123)
    assert local.get(first.url) is not None
    assert local.run_background("pages", argv, 8123) == first
    local.stop()
    assert local.get(first.url) is None


def test_a_helper_that_fails_shows_its_log(state: Path) -> None:
    with pytest.raises(local.ClusterError, match="no such luck"):
        local.run_background("broken", [sys.executable, "-c", "raise SystemExit('no such luck')"], 8123)
    assert not local.record_path("broken").exists()


def test_paths_after_root_and_json_survive_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["python", "jobs/x.py", "--root", "images", "--root=images", "--root", "absent", "--json", "out.json"]
    images, out = str(tmp_path / "images"), str(tmp_path / "out.json")
    here = ["python", "jobs/x.py", "--root", images, f"--root={images}", "--root", "absent", "--json", out]
    assert local._absolute(words, local=True) == here
    assert local._absolute(words, local=False) == [*here[:-1], "out.json"]


def test_the_pages_need_a_sweep_first(state: Path) -> None:
    with pytest.raises(local.ClusterError, match="make sweep"):
        local.dashboard(study="sqlite:////nowhere/study.db")


def test_a_named_cluster_that_is_away_is_an_error(state: Path) -> None:
    process = command("submit", "--", "python", "x.py", RAY_ADDRESS=f"http://127.0.0.1:{local.free_port(0)}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no Ray dashboard answers" in output
    assert not local.record_path(local.HEAD).exists()


@pytest.fixture
def foreign_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Record]:
    """Somebody else's Ray, on the ports everybody wants, started by hand as the manual says."""
    temp_dir, mark = local._temp_dir(), "foreign"
    argv = [str(BIN / "ray"), "start", "--head", "--block", f"--temp-dir={temp_dir}", "--include-dashboard=false"]
    argv += [f"--port={local.free_port(6379)}", f"--ray-client-server-port={local.free_port(10001)}"]
    argv += [f"--dashboard-agent-listen-port={local.free_port(52365)}", f"--object-store-memory={100 * 2**20}"]
    log = tmp_path_factory.mktemp("foreign") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=file, start_new_session=True)
    port = int(next(word for word in argv if word.startswith("--port=")).removeprefix("--port="))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:  # theirs runs before ours starts
        with socket.socket() as probe:
            if probe.connect_ex(("", port)) == 0:
                break
        time.sleep(0.2)
    theirs = local.Record(
        name=local.HEAD, pid=process.pid, pgid=process.pid, started=local.start_time(process.pid) or "", mark=mark,
        argv=argv, url="", log=str(log), temp_dir=temp_dir,
    )  # fmt: skip
    yield theirs
    local.stop_record(theirs)
    process.wait(10)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_jobs_run_on_our_head_and_stop_spares_others(state: Path, tmp_path: Path, foreign_head: local.Record) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "good.py").write_text("import os, ray, sys\nray.init()\nprint('seen from', os.environ['HYPDEFECT_HOME'])\n")
    (code / "bad.py").write_text("import sys\nsys.exit('on purpose')\n")

    start = command("start")
    output, _ = start.communicate(timeout=240)
    assert start.returncode == 0, output
    ours = local.read_record(local.HEAD)
    assert ours is not None
    assert ours.url in output

    jobs = [command("submit", "--working-dir", str(code), "--", "python", name) for name in ("good.py", "bad.py")]
    (good, _), (bad, _) = (job.communicate(timeout=120) for job in jobs)
    assert jobs[0].returncode == 0, good
    assert jobs[1].returncode == 1, bad
    assert f"{ours.url}/#/jobs/good-" in good
    assert f"seen from {os.environ['HYPDEFECT_HOME']}" in good
    assert "on purpose" in bad
    assert local.read_record(local.HEAD) == ours, "a second start must find the first head"

    before, theirs = local.members(ours), local.members(foreign_head)
    assert len(before) > 5
    assert len(theirs) > 3
    assert not set(before) & set(theirs)
    stop = command("stop")
    output, _ = stop.communicate(timeout=60)
    assert stop.returncode == 0, output
    assert not local.members(ours)
    assert [pid for pid, started in before.items() if local.start_time(pid) == started] == []
    assert not Path(ours.temp_dir).exists()
    assert [pid for pid, started in theirs.items() if local.start_time(pid) != started] == []
