"""What this checkout starts is found again and stopped with all it started; nothing else is ever signalled."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.processes import ClusterError, Record

NOBODY = "a mark nobody carries"
# Starts an ordinary child and one with options, writes the pid of that one, and waits.
PARENT = """
import pathlib, subprocess, sys, time
subprocess.Popen(["sleep", "60"])
child = subprocess.Popen([sys.executable, "-c", {child!r}], **{options!r})
pathlib.Path({file!r}).write_text(str(child.pid))
time.sleep(60)
"""
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def record_of(pid: int, started: float | None = None, mark: str = NOBODY) -> Record:
    started = psutil.Process(pid).create_time() if started is None else started
    return Record(name="helper", pid=pid, started=started, mark=mark, argv=[], url="")


def start(argv: list[str], ready: Callable[[], bool], timeout_s: float = 20, temp_dir: str = "") -> Record:
    return processes.start(
        "helper", argv, dict(os.environ), url="http://127.0.0.1:1", ready=ready, timeout_s=timeout_s, temp_dir=temp_dir
    )


def start_family(tmp_path: Path, child: str, **options: object) -> tuple[Record, psutil.Process]:
    """A recorded process with two children, and the second of them, which is started with `options`."""
    file, temp_dir = tmp_path / "child", tmp_path / "temp"
    temp_dir.mkdir()
    code = PARENT.format(child=child, file=str(file), options=options)
    record = start(
        [sys.executable, "-c", code], lambda: file.is_file() and file.stat().st_size > 0, temp_dir=str(temp_dir)
    )
    return record, psutil.Process(int(file.read_text()))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_reuses_a_recorded_pid_is_left_alone(state: Path, sleeper: subprocess.Popen[bytes]) -> None:
    past = record_of(sleeper.pid, psutil.Process(sleeper.pid).create_time() - 60)
    processes.record_path("helper").write_text(json.dumps(asdict(past)))
    (read,) = processes.records()
    assert read == past
    assert not processes.alive(read)
    assert processes.stop(read) == 0
    assert sleeper.poll() is None
    assert not processes.record_path("helper").exists()


def test_a_recorded_process_is_ended(state: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record = record_of(sleeper.pid)
    assert processes.alive(record)
    assert processes.stop(record) == 1
    assert sleeper.wait(5) != 0
    assert not processes.alive(record)


def test_all_that_a_process_started_ends_with_it(state: Path, tmp_path: Path) -> None:
    record, stubborn = start_family(tmp_path, STUBBORN, env={"no": "mark"}, start_new_session=True)
    members = processes.members(record)
    assert stubborn in members
    assert len(members) == 3
    assert processes.stop(record) == 3
    assert not any(map(processes.lives, members))
    assert not Path(record.temp_dir).exists()
    assert not psutil.pid_exists(record.pid), "the started process is reaped"


@pytest.mark.parametrize(
    "options", [{"start_new_session": True}, {"env": {"no": "mark"}}], ids=["found by its mark", "found by its session"]
)
def test_a_process_whose_parent_is_gone_is_ended(options: dict[str, object], state: Path, tmp_path: Path) -> None:
    record, orphan = start_family(tmp_path, SLEEP, **options)
    os.kill(record.pid, signal.SIGKILL)
    wait_for(lambda: not processes.alive(record))
    assert orphan in processes.members(record)
    assert processes.stop(record) == 2
    assert not processes.lives(orphan)


def test_a_process_that_ends_while_starting_shows_its_log(state: Path) -> None:
    with pytest.raises(ClusterError, match=r"ended while starting.*\n.*no such luck"):
        start([sys.executable, "-c", "raise SystemExit('no such luck')"], lambda: False)
    assert list(processes.records()) == []


def test_a_process_that_is_never_ready_is_stopped(state: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="did not answer at"):
        start([sys.executable, "-c", "import time; time.sleep(60)"], lambda: False, timeout_s=0.2)
    assert list(processes.records()) == []


def test_an_interrupt_leaves_no_half_started_process(state: Path) -> None:
    started: list[psutil.Process] = []

    def interrupt() -> bool:
        started.extend(psutil.Process(record.pid) for record in processes.records())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(["sleep", "60"], interrupt)
    assert len(started) == 1
    assert not psutil.pid_exists(started[0].pid)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "helper"}'])
def test_a_damaged_record_is_named(text: str, state: Path) -> None:
    processes.record_path("helper").write_text(text)
    with pytest.raises(ClusterError, match=r"helper\.json is damaged"):
        list(processes.records())
    processes.record_path("helper").unlink()


def test_a_page_runs_until_it_is_stopped(state: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    first = processes.start_page("pages", argv, 0)
    assert processes.get(first.url) is not None
    assert processes.start_page("pages", argv, 0) == first
    other = processes.start_page("pages", [*argv[:-1], str(state)], 0)
    assert other.pid != first.pid
    assert not processes.alive(first)
    processes.stop(other)
    assert processes.get(other.url) is None


def test_no_proxy_is_asked(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{processes.free_port(0)}")
    argv = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    assert processes.get(processes.start_page("pages", argv, 0).url) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_taken_port_is_replaced(host: str) -> None:
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert processes.free_port(taken) != taken
    assert processes.free_port(taken) == taken


def test_ports_given_together_differ() -> None:
    taken: set[int] = set()
    first = processes.free_port(0, taken)
    assert processes.free_port(first, taken) != first
    assert len(taken) == 2
