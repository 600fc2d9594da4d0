"""One Ray head per checkout, on loopback: start it, submit to it, look at it and stop it, never another one.

`ray stop` ends every Ray on the host and a bare `ray.init()` joins whichever it finds, so this module keeps its own
record in `.ray/`. A process counts as ours when its start time is the recorded one or when it carries the mark (a
random id in its environment) that everything started here inherits; nothing else is ever signalled.
"""

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

from hypdefect import command_line, config, files
from hypdefect.errors import HypdefectError

PROJECT = Path(__file__).resolve().parents[1]
MARK = "HYPDEFECT_CLUSTER_MARK"
HEAD = "head"
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}  # started by this very process, which then has to reap them
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the order in which Ray's own tools read them


class ClusterError(HypdefectError):
    """The local head, a helper process or a cluster named by the user does not do what was asked of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One process that this checkout started, as written to `.ray/<name>.json`."""

    name: str
    pid: int
    pgid: int
    started: str
    """Boot id and start tick: together with the pid they name one process for ever."""
    mark: str
    argv: list[str]
    url: str
    log: str
    gcs_address: str = ""
    temp_dir: str = ""
    session: str = ""
    """Ray's session name once the head answers; the dashboard must report the same one."""
    auth_mode: str = ""


def state_dir() -> Path:
    """Where the records and logs lie: `$HYPDEFECT_CLUSTER_STATE`, else `.ray/` in the checkout."""
    return Path(os.environ.get("HYPDEFECT_CLUSTER_STATE") or PROJECT / ".ray").resolve()


def record_path(name: str) -> Path:
    return state_dir() / f"{name}.json"


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


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One start or stop at a time per checkout: two `make sweep` share one head."""
    state_dir().mkdir(parents=True, exist_ok=True)
    with (state_dir() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- processes -------------------------------------------------------------------------------------------------------


def start_time(pid: int) -> str | None:
    """What tells a process from a later one with the same pid; None when there is no such process (or a zombie)."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        if not Path("/proc/self/stat").exists():
            raise ClusterError("the local head needs Linux (/proc); set RAY_ADDRESS to use a cluster") from None
        return None
    return None if state in "ZX" else f"{boot}:{fields[18]}"


def alive(record: Record) -> bool:
    return start_time(record.pid) == record.started


def members(record: Record) -> dict[int, str]:
    """pid -> start time of every living process of a record, also of those whose parent is gone."""
    parents: dict[int, int] = {}
    leader, mark = alive(record), f"{MARK}={record.mark}".encode()
    marked = {record.pid} if leader else set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        try:
            _, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            parents[pid] = int(parent)
            if (leader and int(session) == record.pid) or mark in (entry / "environ").read_bytes().split(b"\0"):
                marked.add(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    grown = True
    while grown:  # Ray's agents overwrite their environment with a title: they are found through session and parent
        children = {pid for pid, parent in parents.items() if parent in marked} - marked
        marked |= children
        grown = bool(children)
    times = {pid: start_time(pid) for pid in marked}
    return {pid: started for pid, started in times.items() if started is not None}


def _signal(processes: dict[int, str], number: signal.Signals) -> None:
    for pid, started in processes.items():
        if start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _wait_gone(processes: dict[int, str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(start_time(pid) == started for pid, started in processes.items()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def stop_record(record: Record) -> int:
    """End a recorded process and all it started; remove its record and temporary directory. Returns how many ended."""
    ended = members(record)
    if record.name == HEAD and alive(record):  # `ray start --block` takes its children down itself, in good order
        _signal({record.pid: record.started}, signal.SIGTERM)
        _wait_gone(ended, 8)
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 5), (signal.SIGKILL, 5)):
        left = {pid: s for pid, s in (ended | members(record)).items() if start_time(pid) == s}
        ended |= left
        _signal(left, number)
        if _wait_gone(left, seconds) and not members(record):
            break
    left = members(record)
    if left:
        raise ClusterError(f"{record.name}: processes {sorted(left)} do not end, not even by SIGKILL")
    if record.pid in _CHILDREN:
        _CHILDREN.pop(record.pid).wait()
    record_path(record.name).unlink(missing_ok=True)
    if record.temp_dir:
        shutil.rmtree(record.temp_dir, ignore_errors=True)
    return len(ended)


def _spawn(record_of: Callable[[int, str], Record], argv: list[str], log: Path, env: dict[str, str]) -> Record:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, cwd=PROJECT, start_new_session=True
        )
    _CHILDREN[process.pid] = process
    record = record_of(process.pid, start_time(process.pid) or "ended at once")
    files.write_json(record_path(record.name), asdict(record))
    return record


def _wait_ready(record: Record, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until `ready()`; a process that ends or never answers is stopped and its last words are shown."""
    deadline = time.monotonic() + seconds
    try:
        while not ready():
            if not alive(record):
                raise ClusterError(f"{record.name} ended while starting. Its log ends:\n{tail(Path(record.log))}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{record.name} did not answer at {record.url} within {seconds:.0f} s. Its log ends:\n"
                    f"{tail(Path(record.log))}"
                )
            time.sleep(0.2)
    except BaseException:  # also Ctrl-C: a half-started process must not stay behind
        stop_record(record)
        raise


def tail(path: Path, lines: int = 25) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return f"(no log at {path})"


def free_port(preferred: int, taken: set[int] | None = None) -> int:
    """The preferred port when nobody listens on it on any interface, else one the kernel gives."""
    for port in (preferred, 0, 0, 0, 0):
        with socket.socket() as everywhere, socket.socket() as loopback:
            everywhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            loopback.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                loopback.bind(("127.0.0.1", port))
                found = loopback.getsockname()[1]
                loopback.close()
                everywhere.bind(("", found))
            except OSError:
                continue
            if found not in (taken or set()):
                if taken is not None:
                    taken.add(found)
                return found
    raise ClusterError(f"no free port found (wanted {preferred})")


# --- talking to a dashboard ------------------------------------------------------------------------------------------


def _token() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else ""


def get(url: str, timeout: float = 5) -> bytes | None:
    """The body of a 200 answer, else None. Proxies are not asked: these are our own or the user's cluster's ports."""
    request = urllib.request.Request(url)
    if _token() and os.environ.get("RAY_AUTH_MODE") == "token":
        request.add_header("Authorization", f"Bearer {_token()}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return answer.read() if answer.status == 200 else None
    except (urllib.error.URLError, OSError, ValueError):
        return None


def session_name(dashboard: str) -> str | None:
    """Ray's session name as its dashboard tells it, or None when no dashboard answers there."""
    body = get(f"{dashboard}/api/version")
    try:
        return str(json.loads(body)["session_name"]) if body else None
    except (ValueError, KeyError, TypeError):
        return None


# --- the head --------------------------------------------------------------------------------------------------------


def data_root() -> Path:
    """`files.data_root()` as seen from the checkout: jobs run in a copy elsewhere, where `../shared` means nothing."""
    with contextlib.chdir(Path.cwd() if os.environ.get("HYPDEFECT_DATA") else PROJECT):
        return files.data_root()


def _environment(mark: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ADDRESS_VARIABLES}
    defaults = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Ray replaces 127.0.0.1 by the machine's public address except on macOS and Windows. Asked to behave as there,
        # it binds GCS, raylet and agents to loopback too; all of them execute code for whoever reaches them.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    env = defaults | env
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["HYPDEFECT_DATA"] = str(data_root())
    if env.get("HYPDEFECT_HOME"):
        env["HYPDEFECT_HOME"] = str(files.home())
    return env | {MARK: mark}


def _object_store_bytes() -> int:
    with contextlib.suppress(FileNotFoundError):
        room = int(0.8 * shutil.disk_usage("/dev/shm").free)
        if room >= 100 * 2**20:
            return min(2**30, room)
    return 256 * 2**20  # too little shared memory: Ray then keeps the store in its temporary directory


def _temp_dir() -> str:
    base = tempfile.gettempdir()  # Ray adds up to 75 characters to it, and a socket's path ends at 107
    return tempfile.mkdtemp(prefix="hd-ray-", dir=base if len(base) <= 12 else "/tmp")


def ensure_head(num_cpus: int | None = None, timeout_s: float = 90) -> Record:
    """The running head of this checkout; started when there is none."""
    with locked():
        record = read_record(HEAD)
        if record is not None:
            if alive(record) and session_name(record.url) == record.session:
                return record
            print(f"the recorded head (pid {record.pid}) no longer answers: cleaning up", file=sys.stderr)
            stop_record(record)
        try:
            # Only the dashboard's port is one that people type. Every Ray wants 6379, and two that take it at the same
            # moment both fail, the second only after a minute: the others are free ones from the kernel.
            return _start_head((0, 8265, 0, 0), num_cpus, timeout_s)
        except ClusterError as error:
            if not any(words in str(error) for words in _PORT_TAKEN):
                raise
            print("another Ray took a port at the same moment: trying other ports", file=sys.stderr)
            return _start_head((0, 0, 0, 0), num_cpus, timeout_s)


# How Ray's log ends when somebody else binds a port between our look at it and Ray's own use of it.
_PORT_TAKEN = (
    "does not match persisted value",
    "ddress already in use",
    "is already in use",
    "occupied",
    "Failed to connect to GCS",
)


def _start_head(preferred: tuple[int, int, int, int], num_cpus: int | None, timeout_s: float) -> Record:
    taken: set[int] = set()
    gcs, dashboard, client, agent = (free_port(port, taken) for port in preferred)
    temp_dir, mark = _temp_dir(), secrets.token_hex(16)
    env = _environment(mark)
    argv = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    argv += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    argv += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temp_dir}"]
    argv += [f"--object-store-memory={_object_store_bytes()}", "--disable-usage-stats", "--log-color=false"]
    argv += [f"--num-cpus={num_cpus}"] if num_cpus else []
    url = f"http://127.0.0.1:{dashboard}"
    log = state_dir() / f"{HEAD}.log"

    def record_of(pid: int, started: str) -> Record:
        return Record(
            name=HEAD, pid=pid, pgid=pid, started=started, mark=mark, argv=argv, url=url, log=str(log),
            gcs_address=f"127.0.0.1:{gcs}", temp_dir=temp_dir, auth_mode=env["RAY_AUTH_MODE"],
        )  # fmt: skip

    print(f"starting a local Ray head (log: {log})", file=sys.stderr)
    record = _spawn(record_of, argv, log, env)

    def ready() -> bool:  # the session link lies in our own directory: another cluster's answer is not taken for ours
        latest = Path(temp_dir, "session_latest")
        return latest.exists() and session_name(url) == latest.resolve().name

    with _auth(record):
        _wait_ready(record, ready, timeout_s)
        record = Record(**asdict(record) | {"session": session_name(url) or ""})
    files.write_json(record_path(HEAD), asdict(record))
    return record


@contextlib.contextmanager
def _auth(record: Record) -> Iterator[None]:
    """Talk to our head in the mode it was started with, whatever this shell says."""
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = record.auth_mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


def named_cluster() -> str | None:
    """The address the user set, if any. `local` means ours, as it does in `ray.init`."""
    for name in ADDRESS_VARIABLES:
        address = os.environ.get(name, "").strip()
        if address and address != "local":
            return address
    return None


@contextlib.contextmanager
def target() -> Iterator[tuple[str, Record | None]]:
    """Dashboard URL of the user's cluster (`RAY_ADDRESS`) or of our own head, which is started when needed."""
    address = named_cluster()
    if address is None:
        record = ensure_head()
        with _auth(record):
            yield record.url, record
        return
    if not address.startswith(("http://", "https://")):
        from ray.dashboard.utils import get_address_for_submission_client  # what `ray job submit` itself asks

        try:
            address = get_address_for_submission_client(address)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"no cluster answers at RAY_ADDRESS={address}: {error}") from error
    address = address.rstrip("/")
    if session_name(address) is None:
        raise ClusterError(
            f"no Ray dashboard answers at {address} (from RAY_ADDRESS); if it asks for a token "
            "set RAY_AUTH_MODE=token. Unset RAY_ADDRESS to use a local head"
        )
    yield address, None


# --- subcommands -----------------------------------------------------------------------------------------------------


def _print_head(record: Record) -> None:
    print(f"Ray head       pid {record.pid}, GCS {record.gcs_address}, logs {record.temp_dir}/session_latest/logs")
    print(f"Ray dashboard  {record.url}   (stop it with: make stop)")


def start(num_cpus: int | None = None, timeout_s: float = 90) -> int:
    """Start the local head, or print where the running one is.

    Args:
        num_cpus: CPUs to announce to Ray; all of the machine by default. Only read when the head starts.
        timeout_s: How long to wait for the dashboard's job API.
    """
    _print_head(ensure_head(num_cpus, timeout_s))
    return 0


def status() -> int:
    """Print what this checkout has running. Exit status 1 when the head does not run."""
    running = False
    for path in sorted(state_dir().glob("*.json")):
        record = read_record(path.stem)
        if record is None:
            continue
        with _auth(record):
            answers = alive(record) and (record.name != HEAD or session_name(record.url) == record.session)
        running |= answers and record.name == HEAD
        print(f"{record.name:<18} {'running' if answers else 'dead':<8} pid {record.pid:<8} {record.url}")
    if not running:
        print("no local Ray head of this checkout runs")
    return 0 if running else 1


def stop() -> int:
    """Stop the head and the dashboards that this checkout started, and nothing else."""
    with locked():
        names = sorted((p.stem for p in state_dir().glob("*.json")), key=lambda name: name == HEAD)
        for name in names:
            record = read_record(name)
            if record is not None:
                print(f"stopped {name} (pid {record.pid}, {stop_record(record)} processes)")
        if not names:
            print("nothing of this checkout was running")
        (state_dir() / "serve.yaml").unlink(missing_ok=True)
    return 0


def _absolute(entrypoint: list[str], local: bool) -> list[str]:
    """Existing paths after `--root`, and on our own head those after `--json`, as seen from here, not from the copy."""
    words = list(entrypoint)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("--root", "--json") or not (equals or i + 1 < len(words)):
            continue
        path = Path(value if equals else words[i + 1]).expanduser()
        if path.exists() if flag == "--root" else local:
            if equals:
                words[i] = f"{flag}={path.resolve()}"
            else:
                words[i + 1] = str(path.resolve())
    return words


def _runtime_env(local: bool) -> dict[str, Any]:
    runtime_env = config.load_yaml(PROJECT / "cluster" / "runtime_env.yaml")
    variables = dict(runtime_env.get("env_vars") or {})
    # Our head may have been started from another shell: the submitting shell's places count. On the user's cluster
    # only what was set on purpose is passed on; the rest is for its nodes to say.
    if local or os.environ.get("HYPDEFECT_HOME"):
        variables["HYPDEFECT_HOME"] = str(files.home())
    if local or os.environ.get("HYPDEFECT_DATA"):
        variables["HYPDEFECT_DATA"] = str(data_root())
    return runtime_env | {"env_vars": variables}


def _client_environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ADDRESS_VARIABLES}
    return env | {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def submit(*, entrypoint: tyro.conf.Suppress[tuple[str, ...]] = (), working_dir: Path = PROJECT) -> int:
    """Run a command as a Ray job and stream its output: `submit -- python jobs/sweep.py --trials 20`.

    Uses RAY_API_SERVER_ADDRESS or RAY_ADDRESS when set, else the local head of this checkout. The exit status is 0 when
    the job succeeded, 1 when it failed and 130 when it was stopped by Ctrl-C.

    Args:
        working_dir: What the job gets a copy of; .gitignore, .rayignore and cluster/runtime_env.yaml leave things out.
    """
    if not entrypoint:
        raise ClusterError("nothing to submit: put the command after `--`, e.g. submit -- python jobs/sweep.py")
    with target() as (url, record):
        verb = next((Path(word).stem for word in entrypoint if word.endswith(".py")), "job")
        job = f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        print(f"job page: {url}/#/jobs/{job}", flush=True)
        ray = [str(Path(sys.executable).parent / "ray"), "job"]
        command = [*ray, "submit", f"--address={url}", f"--submission-id={job}", f"--working-dir={working_dir}"]
        command += [] if sys.stdout.isatty() else ["--log-color=false"]
        command += [f"--runtime-env-json={json.dumps(_runtime_env(record is not None))}", "--"]
        command += _absolute(list(entrypoint), record is not None)
        env = _client_environment()
        # In a session of its own, so that Ctrl-C reaches us alone and the last log lines still arrive.
        client = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            with _terminate_as_interrupt():
                return 0 if client.wait() == 0 else 1
        except KeyboardInterrupt:
            print(f"\nstopping job {job} (press Ctrl-C again to leave it running)", file=sys.stderr, flush=True)
            try:
                subprocess.run([*ray, "stop", f"--address={url}", job], env=env, stdin=subprocess.DEVNULL, check=False)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    client.wait(timeout=15)
            except KeyboardInterrupt:
                print(f"left running: {shlex.join([*ray, 'stop', f'--address={url}', job])} stops it", file=sys.stderr)
            return 130
        finally:
            client.terminate()


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A SIGTERM (from make, a CI runner, a closing terminal) stops the job just as Ctrl-C does."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_background(name: str, argv: list[str], port: int, path: str = "/", timeout_s: float = 60) -> Record:
    """Start a helper with a web page (`{port}` in argv is replaced), or return the one that runs with the same argv."""
    with locked():
        record = read_record(name)
        if record is not None:
            mine = [word.replace("{port}", record.url.rpartition(":")[2]) for word in argv]
            if alive(record) and record.argv == mine:
                return record
            stop_record(record)
        port, mark = free_port(port), secrets.token_hex(16)
        argv = [word.replace("{port}", str(port)) for word in argv]
        url, log = f"http://127.0.0.1:{port}", state_dir() / f"{name}.log"

        def record_of(pid: int, started: str) -> Record:
            return Record(name=name, pid=pid, pgid=pid, started=started, mark=mark, argv=argv, url=url, log=str(log))

        record = _spawn(record_of, argv, log, os.environ | {MARK: mark})
        _wait_ready(record, lambda: get(url + path) is not None, timeout_s)
        return record


def dashboard(study: str = "", logdir: Path | None = None) -> int:
    """Open the sweep's pages: optuna-dashboard on its study, TensorBoard on its trials. They run until `stop`.

    Args:
        study: Storage URL of the study; `sqlite:///<home>/sweeps/study.db` by default.
        logdir: Directory with the trials' event files; `<home>/sweeps` by default.
    """
    study = study or f"sqlite:///{files.home()}/sweeps/study.db"
    logdir = (logdir or files.home() / "sweeps").resolve()
    file = study.removeprefix("sqlite:///")
    if file != study and not Path(file).is_file():
        raise ClusterError(f"there is no study at {file} yet: run `make sweep` first, or name one with --study")
    bin_dir = Path(sys.executable).parent
    optuna = [str(bin_dir / "optuna-dashboard"), study, "--host", "127.0.0.1", "--port", "{port}"]
    board = [str(bin_dir / "tensorboard"), "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "{port}"]
    for program in (optuna[0], board[0]):
        if not Path(program).exists():
            raise ClusterError(f"{program} is missing: pip install -c constraints.txt -e '.[dashboard]'")
    print(f"optuna-dashboard  {run_background('optuna-dashboard', optuna, 8080).url}   ({study})", flush=True)
    print(f"TensorBoard       {run_background('tensorboard', board, 6006).url}   ({logdir})", flush=True)
    record = read_record(HEAD)
    if record is not None and alive(record):
        print(f"Ray dashboard     {record.url}")
    print("stop them with: make stop")
    return 0


def _serve_details(url: str) -> dict[str, Any]:
    body = get(f"{url}/api/serve/applications/", timeout=30)
    try:
        return dict(json.loads(body)) if body else {}
    except ValueError:
        return {}


def serve(
    model: str = "hypdefect-elpv@champion",
    config_file: Path = PROJECT / "serve" / "config" / "dev.yaml",
    ready: str = "/v1/health/ready",
    timeout_s: float = 180,
) -> int:
    """Deploy a registered model on the local head (or RAY_ADDRESS) and wait until it answers.

    Args:
        model: Registry name and alias or version, NAME@ALIAS.
        config_file: Serve config to deploy; `model` and `home` are put into its applications' args.
        ready: Path, or full URL, that answers 200 once the model is loaded.
        timeout_s: How long to wait for that.
    """
    rendered = config.load_yaml(config_file)
    for application in rendered.get("applications", []):
        application["args"] = (application.get("args") or {}) | {"model": model, "home": str(files.home())}
    with target() as (url, record):
        http = rendered.setdefault("http_options", {})
        http.setdefault("host", "127.0.0.1")
        http.setdefault("port", 8000)
        details = _serve_details(url)
        if details.get("proxies"):  # the proxy keeps the port it was started with
            http["port"] = (details.get("http_options") or {}).get("port", http["port"])
        elif record is not None:
            http["port"] = free_port(http["port"])
        path = state_dir() / "serve.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(rendered, sort_keys=False))
        command = [str(Path(sys.executable).parent / "serve"), "deploy", "-a", url, str(path)]
        done = subprocess.run(command, env=_client_environment(), stdin=subprocess.DEVNULL, text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        if done.returncode != 0:
            raise ClusterError(f"serve deploy refused {path}:\n{done.stdout}")
        host = "127.0.0.1" if record is not None else url.split("://")[1].rpartition(":")[0]
        base = f"http://{host}:{http['port']}"
        names = [str(application.get("name", "default")) for application in rendered.get("applications", [])]
        _wait_served(url, names, ready if "://" in ready else base + ready, timeout_s)
        if record is not None:
            _print_head(record)
        print(f"serving        {model} at {base}   (status: {url}/#/serve)")
        print(f"try            curl -sS -F image=@IMAGE.png {base}/v1/classify")
    return 0


def _wait_served(url: str, names: list[str], ready: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        applications = _serve_details(url).get("applications") or {}
        states = {name: str(applications.get(name, {}).get("status", "NOT_STARTED")) for name in names}
        messages = "\n".join(_serve_messages(applications, names)) or "(no message; see the dashboard's Serve page)"
        if any(state in ("DEPLOY_FAILED", "UNHEALTHY") for state in states.values()):
            raise ClusterError(f"deployment failed, {states}:\n{messages}")
        if all(state == "RUNNING" for state in states.values()) and get(ready) is not None:
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{ready} does not answer 200 after {timeout_s:.0f} s, {states}:\n{messages}")
        time.sleep(0.5)


def _serve_messages(applications: dict[str, Any], names: list[str]) -> Iterator[str]:
    for name in names:
        application = applications.get(name) or {}
        if application.get("message"):
            yield f"{name}: {application['message']}"
        for deployment, details in (application.get("deployments") or {}).items():
            if details.get("message"):
                yield f"{name}/{deployment}: {details['message']}"


def main(argv: list[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    cut = args.index("--") if "--" in args else len(args)
    commands: dict[str, Callable[..., int]] = {
        "start": start,
        "stop": stop,
        "status": status,
        "submit": functools.partial(submit, entrypoint=tuple(args[cut + 1 :])),
        "dashboard": dashboard,
        "serve": serve,
    }
    raise SystemExit(tyro.extras.subcommand_cli_from_dict(commands, args=args[:cut], description=__doc__))


if __name__ == "__main__":
    command_line.run_job(main)
