"""The one Ray head of this checkout, on loopback, and the choice between it and a cluster that the user names.

`ray stop` ends every Ray on the host and a bare `ray.init()` joins whichever it finds, so the head is a recorded
process (`cluster/processes.py`), and it is believed to be ours only while it reports the session that it started.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray.dashboard.utils import get_address_for_submission_client  # what `ray job submit` itself asks

from cluster.processes import PROJECT, ClusterError, Record, alive, free_port, get, locked, read_record, start, stop
from hypdefect import command_line, files

HEAD = "head"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the order in which Ray's own tools read them


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The cluster to work on, by its dashboard."""

    url: str
    headers: dict[str, str]
    """What every request to it carries."""
    head: Record | None = None
    """Our own head; None on the user's cluster."""

    def variables(self) -> dict[str, str]:
        """Environment of its jobs: where things lie, as seen from the submitting shell, and methods of one's own.

        Our head may have been started from another shell. On the user's cluster only what was set on purpose is passed
        on; the rest is for its nodes to say.
        """
        places = {"HYPDEFECT_HOME": files.home(), "HYPDEFECT_DATA": data_root()}
        given = {name: str(place) for name, place in places.items() if self.head or os.environ.get(name)}
        return given | methods_of_your_own() | {command_line.TYPED_IN: str(Path.cwd())}


def methods_of_your_own() -> dict[str, str]:
    """The variable that names them, where it is set: a head may run that was started without it."""
    return {name: os.environ[name] for name in ("HYPDEFECT_METHODS",) if os.environ.get(name)}


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """The user's cluster (`RAY_ADDRESS`) or our own head, which is started when needed.

    Raises:
        ClusterError: the head does not start, or nothing answers at the user's address.
    """
    address = named_cluster()
    if address is None:
        head = ensure_head()
        with _plain_environment():
            yield Target(url=head.url, headers=auth_headers(head.details["auth_mode"]), head=head)
        return
    if not address.startswith(("http://", "https://")):
        try:
            address = get_address_for_submission_client(address)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"no cluster answers at RAY_ADDRESS={address}: {error}") from error
    named = Target(url=address.rstrip("/"), headers=auth_headers(os.environ.get("RAY_AUTH_MODE", "")))
    if session_name(named.url, named.headers) is None:
        raise ClusterError(
            f"no Ray dashboard answers at {named.url} (from RAY_ADDRESS); if it asks for a token "
            "set RAY_AUTH_MODE=token. Unset RAY_ADDRESS to use a local head"
        )
    with _plain_environment():
        yield named


def named_cluster() -> str | None:
    """The address the user set, if any. `local` means ours, as it does in `ray.init`."""
    for name in ADDRESS_VARIABLES:
        address = os.environ.get(name, "").strip()
        if address and address != "local":
            return address
    return None


@contextlib.contextmanager
def _plain_environment() -> Iterator[None]:
    """Ray's clients go to the address they are given, not to another one of the environment, and not by a proxy."""
    before = dict(os.environ)
    for name in ADDRESS_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(no_proxy="*", NO_PROXY="*")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def auth_headers(auth_mode: str) -> dict[str, str]:
    """What a head started in this mode wants to see. Ray's own clients know only the mode at their import."""
    if auth_mode != "token":
        return {}
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def session_name(url: str, headers: dict[str, str]) -> str | None:
    """Ray's session name as its dashboard tells it, or None when no dashboard answers there."""
    answer = get(f"{url}/api/version", headers)
    try:
        return str(answer.json()["session_name"]) if answer is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def answers(record: Record) -> bool:
    """Whether our head runs and its dashboard reports our session: another cluster's answer is not taken for ours."""
    return alive(record) and _our_session(record.url, record.temp_dir, record.details["auth_mode"])


def _our_session(url: str, temp_dir: str, auth_mode: str) -> bool:
    latest = Path(temp_dir, "session_latest")  # Ray's link, in a directory that only our head uses
    return latest.exists() and session_name(url, auth_headers(auth_mode)) == latest.resolve().name


def ensure_head(num_cpus: int | None = None, timeout_s: float = 90) -> Record:
    """The running head of this checkout; started when there is none."""
    with locked():
        record = read_record(HEAD)
        if record is not None:
            if answers(record):
                return record
            print(f"the recorded head (pid {record.pid}) no longer answers: cleaning up", file=sys.stderr)
            stop(record)
        try:
            # Only the dashboard's port is one that people type. Every Ray wants 6379, and two that take it at the same
            # moment both fail, the second only after a minute: the others are free ones from the kernel.
            return _start_head(8265, num_cpus, timeout_s)
        except ClusterError as error:
            if not any(words in str(error) for words in _PORT_TAKEN):
                raise
            print("another Ray took a port at the same moment: trying other ports", file=sys.stderr)
            return _start_head(0, num_cpus, timeout_s)


# How Ray's log ends when somebody else binds a port between our look at it and Ray's own use of it.
_PORT_TAKEN = (
    "does not match persisted value",
    "ddress already in use",
    "is already in use",
    "occupied",
    "Failed to connect to GCS",
)


def _start_head(preferred_port: int, num_cpus: int | None, timeout_s: float) -> Record:
    taken: set[int] = set()
    dashboard, gcs, client, agent = (free_port(port, taken) for port in (preferred_port, 0, 0, 0))
    env, temp_dir = _environment(), make_temp_dir()
    argv = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    argv += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    argv += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temp_dir}"]
    argv += [f"--object-store-memory={_object_store_bytes()}", "--disable-usage-stats", "--log-color=false"]
    argv += [f"--num-cpus={num_cpus}"] if num_cpus else []
    url, auth_mode = f"http://127.0.0.1:{dashboard}", env["RAY_AUTH_MODE"]
    print("starting a local Ray head", file=sys.stderr)
    return start(
        HEAD, argv, env, url=url, ready=lambda: _our_session(url, temp_dir, auth_mode), timeout_s=timeout_s,
        temp_dir=temp_dir, details={"gcs_address": f"127.0.0.1:{gcs}", "auth_mode": auth_mode},
    )  # fmt: skip


def data_root() -> Path:
    """`files.data_root()` as seen from the checkout: jobs run in a copy elsewhere, where `../shared` means nothing."""
    with contextlib.chdir(Path.cwd() if os.environ.get("HYPDEFECT_DATA") else PROJECT):
        return files.data_root()


def _environment() -> dict[str, str]:
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
    return env


def _object_store_bytes() -> int:
    with contextlib.suppress(FileNotFoundError):
        room = int(0.8 * shutil.disk_usage("/dev/shm").free)
        if room >= 100 * 2**20:
            return min(2**30, room)
    return 256 * 2**20  # too little shared memory: Ray then keeps the store in its temporary directory


def make_temp_dir() -> str:
    """A new directory for a Ray session with a short name: Ray adds up to 75 characters, and a socket's path ends at
    107."""
    base = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="hd-ray-", dir=base if len(base) <= 12 else "/tmp")
