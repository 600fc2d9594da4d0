"""Processes that outlive the command that started them: recorded, found again with all they started, and stopped.

A process counts as ours when it has the pid and start time of a record in `.ray/`, or carries that record's mark (a
random id in its environment, which everything started by it inherits), or descends from such a process, or is in its
session. Nothing else is ever signalled.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import requests

from hypdefect.errors import HypdefectError
from hypdefect.files import write_json

PROJECT = Path(__file__).resolve().parents[1]
MARK = "HYPDEFECT_CLUSTER_MARK"
CLOCK_SLACK_S = 2.0
"""A start time is told from the boot time, which moves by up to a second when the clock is set."""
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}  # started by this very process, which then has to reap them


class ClusterError(HypdefectError):
    """The local head, a helper process or a cluster named by the user does not do what was asked of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One process that this checkout started, as written to `.ray/<name>.json`."""

    name: str
    pid: int
    started: float
    """Seconds since the epoch: together with the pid they name one process for ever."""
    mark: str
    argv: list[str]
    url: str
    temp_dir: str = ""
    """Removed when the process is stopped."""
    details: dict[str, str] = field(default_factory=dict)
    """What else its starter needs to know later."""


def state_dir() -> Path:
    """Where the records and logs lie: `$HYPDEFECT_CLUSTER_STATE`, else `.ray/` in the checkout."""
    return Path(os.environ.get("HYPDEFECT_CLUSTER_STATE") or PROJECT / ".ray").resolve()


def record_path(name: str) -> Path:
    return state_dir() / f"{name}.json"


def log_path(name: str) -> Path:
    return state_dir() / f"{name}.log"


def read_record(name: str) -> Record | None:
    """The record of a process, or None when there is none.

    Raises:
        ClusterError: the file is damaged; nothing can be stopped safely from half a record.
    """
    path = record_path(name)
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ClusterError(f"{path} is damaged ({error}); stop that process by hand and delete the file") from error


def records() -> Iterator[Record]:
    """All records, by name."""
    for path in sorted(state_dir().glob("*.json")):
        record = read_record(path.stem)
        if record is not None:
            yield record


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One start or stop at a time per checkout: two `make sweep` share one head."""
    state_dir().mkdir(parents=True, exist_ok=True)
    with (state_dir() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lives(process: psutil.Process) -> bool:
    """Whether this very process runs: not a later one with its pid, not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def alive(record: Record) -> bool:
    """Whether the recorded process itself runs."""
    try:
        return _leads(psutil.Process(record.pid), record)
    except psutil.Error:
        return False


def _leads(process: psutil.Process, record: Record) -> bool:
    return (
        process.pid == record.pid
        and abs(process.create_time() - record.started) < CLOCK_SLACK_S
        and process.status() != psutil.STATUS_ZOMBIE
    )


def members(record: Record) -> set[psutil.Process]:
    """Every living process of a record, also those whose parent is gone.

    Ray's agents overwrite their environment with a title: they are found as descendants, or by their session.
    """
    others = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    marked = {process for process in others if _carries_mark(process, record)}
    if any(_session(process) == record.pid for process in marked):  # then the session is still the one we opened
        marked |= {process for process in others if _session(process) == record.pid}
    family = set(marked)
    for process in marked:
        with contextlib.suppress(psutil.Error):
            family.update(process.children(recursive=True))
    return {process for process in family if process.pid != os.getpid() and lives(process)}


def _carries_mark(process: psutil.Process, record: Record) -> bool:
    try:
        return _leads(process, record) or process.environ().get(MARK) == record.mark
    except (psutil.Error, OSError):
        return False


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def stop(record: Record) -> int:
    """End a recorded process and all it started; remove its record and temporary directory. Returns how many ended.

    Raises:
        ClusterError: some process does not end, not even by SIGKILL.
    """
    ended = members(record)
    leader = {process for process in ended if process.pid == record.pid}
    _signal(leader, signal.SIGTERM)  # `ray start --block` takes its children down itself, in good order
    _wait_ended(leader, 8)
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 5), (signal.SIGKILL, 5)):
        ended |= members(record)
        left = {process for process in ended if lives(process)}
        if not left:
            break
        _signal(left, number)
        _wait_ended(left, seconds)
    left = members(record)
    if left:
        raise ClusterError(f"{record.name}: processes {sorted(p.pid for p in left)} do not end, not even by SIGKILL")
    if record.pid in _CHILDREN:
        _CHILDREN.pop(record.pid).wait()
    record_path(record.name).unlink(missing_ok=True)
    if record.temp_dir:
        shutil.rmtree(record.temp_dir, ignore_errors=True)
    return len(ended)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)  # psutil looks again whether the pid is still that process's


def _wait_ended(processes: Iterable[psutil.Process], seconds: float) -> None:
    """`psutil.wait_procs` would also wait for zombies, which a container's first process may never reap."""
    deadline = time.monotonic() + seconds
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def start(
    name: str,
    argv: list[str],
    env: dict[str, str],
    *,
    url: str,
    ready: Callable[[], bool],
    timeout_s: float,
    temp_dir: str = "",
    details: dict[str, str] | None = None,
) -> Record:
    """Start a process in a session of its own, record it, and wait until it is ready.

    Raises:
        ClusterError: it ended or was not ready in time; it is stopped, and its last words are in the message.
    """
    mark = secrets.token_hex(16)
    state_dir().mkdir(parents=True, exist_ok=True)
    with log_path(name).open("wb") as file:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env | {MARK: mark}, cwd=PROJECT,
            start_new_session=True,
        )  # fmt: skip
    _CHILDREN[process.pid] = process
    record = Record(
        name=name, pid=process.pid, started=psutil.Process(process.pid).create_time(), mark=mark, argv=argv, url=url,
        temp_dir=temp_dir, details=details or {},
    )  # fmt: skip
    try:
        write_json(record_path(name), asdict(record))
        _wait_ready(record, ready, timeout_s)
    except BaseException:  # also Ctrl-C: a half-started process must not stay behind
        stop(record)
        raise
    return record


def _wait_ready(record: Record, ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if not alive(record) or time.monotonic() > deadline:
            fault = (
                f"did not answer at {record.url} within {seconds:.0f} s" if alive(record) else "ended while starting"
            )
            log_end = "\n".join(log_path(record.name).read_text(errors="replace").splitlines()[-25:])
            raise ClusterError(f"{record.name} {fault}. Its log ends:\n{log_end}")
        time.sleep(0.2)


def start_page(name: str, argv: list[str], port: int, timeout_s: float = 60) -> Record:
    """Start a helper with a web page (`{port}` in argv is replaced), or return the one that runs with the same argv.

    Raises:
        ClusterError: as `start`.
    """
    with locked():
        record = read_record(name)
        if record is not None:
            same = [word.replace("{port}", record.url.rpartition(":")[2]) for word in argv]
            if alive(record) and record.argv == same:
                return record
            stop(record)
        port = free_port(port)
        url = f"http://127.0.0.1:{port}"
        argv = [word.replace("{port}", str(port)) for word in argv]
        return start(name, argv, dict(os.environ), url=url, ready=lambda: get(url) is not None, timeout_s=timeout_s)


def free_port(preferred: int, taken: set[int] | None = None) -> int:
    """The preferred port (0: any) when nobody listens on it on any interface, else one the kernel gives.

    Args:
        taken: Ports to avoid; the port is added to them.
    """
    taken = set() if taken is None else taken
    for wanted in (preferred, 0, 0, 0, 0):
        with socket.socket() as everywhere, contextlib.suppress(OSError):
            everywhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            everywhere.bind(("", wanted))
            port = int(everywhere.getsockname()[1])
            if port not in taken:
                taken.add(port)
                return port
    raise ClusterError(f"no free port (wanted {preferred})")


def get(url: str, headers: dict[str, str] | None = None, timeout_s: float = 5) -> requests.Response | None:
    """A 200 answer, else None. Proxies are not asked: the ports are our own or the user's cluster's."""
    with requests.Session() as session:
        session.trust_env = False
        try:
            answer = session.get(url, headers=headers, timeout=timeout_s)
        except requests.RequestException:
            return None
    return answer if answer.status_code == 200 else None
