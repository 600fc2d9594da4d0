"""One Ray head per checkout, on loopback: start it, submit to it, look at it and stop it, never another one."""

import asyncio
import contextlib
import functools
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import tyro
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster import processes
from cluster.head import HEAD, answers, ensure_head, methods_of_your_own, named_cluster, target
from cluster.processes import PROJECT, ClusterError, Record
from hypdefect import command_line, config, files, registry

GRACE_S = 2.0
"""Between the first Ctrl-C and the end of the job."""


def _print_head(record: Record) -> None:
    address = record.details["gcs_address"]
    print(f"Ray head       pid {record.pid}, GCS {address}, logs {record.temp_dir}/session_latest/logs")
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
    head_runs = False
    for record in processes.records():
        runs = answers(record) if record.name == HEAD else processes.alive(record)
        head_runs |= runs and record.name == HEAD
        print(f"{record.name:<18} {'running' if runs else 'dead':<8} pid {record.pid:<8} {record.url}")
    if not head_runs:
        print("no local Ray head of this checkout runs")
    return 0 if head_runs else 1


def stop() -> int:
    """Stop the head and the dashboards that this checkout started, and nothing else."""
    with processes.locked():
        recorded = sorted(processes.records(), key=lambda record: record.name == HEAD)
        for record in recorded:
            print(f"stopped {record.name} (pid {record.pid}, {processes.stop(record)} processes)")
        if not recorded:
            print("nothing of this checkout was running")
    return 0


def submit(*, entrypoint: tyro.conf.Suppress[tuple[str, ...]] = (), working_dir: Path = PROJECT) -> int:
    """Run a command as a Ray job and stream its output: `submit -- python jobs/sweep.py --trials 20`.

    Uses RAY_API_SERVER_ADDRESS or RAY_ADDRESS when set, else the local head of this checkout. The exit status is 0 when
    the job succeeded, 1 when it failed and 130 when it was stopped by Ctrl-C. Relative paths among a job's options
    start at the folder in which this command is typed.

    Args:
        working_dir: What the job gets a copy of; .gitignore, .rayignore and cluster/runtime_env.yaml leave things out.
    """
    if not entrypoint:
        raise ClusterError("nothing to submit: put the command after `--`, e.g. submit -- python jobs/sweep.py")
    with target() as cluster:
        verb = next((Path(word).stem for word in entrypoint if word.endswith(".py")), "job")
        job = f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        runtime_env = config.load_yaml(PROJECT / "cluster" / "runtime_env.yaml") | {"working_dir": str(working_dir)}
        runtime_env["env_vars"] = (runtime_env.get("env_vars") or {}) | cluster.variables()
        print(f"job page: {cluster.url}/#/jobs/{job}", flush=True)
        with _explained(f"job {job} at {cluster.url}"), _terminate_as_interrupt():
            client = JobSubmissionClient(cluster.url, headers=cluster.headers)
            return _run(client, job, shlex.join(entrypoint), runtime_env)


def _run(client: JobSubmissionClient, job: str, entrypoint: str, runtime_env: dict[str, Any]) -> int:
    """Submit a job, print its log as it grows, and return its exit status; an interrupt stops it."""
    shown = 0  # characters of the log

    async def show() -> None:
        nonlocal shown
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
            shown += len(text)

    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env)
        asyncio.run(show())
        _wait_ended(client, job, 60)
        return _report(client, job)
    except KeyboardInterrupt:
        print(f"\nstopping job {job} in {GRACE_S:.0f} s (press Ctrl-C again to leave it running)", file=sys.stderr)
        try:
            time.sleep(GRACE_S)
        except KeyboardInterrupt:
            command = ["ray", "job", "stop", f"--address={client.get_address()}", job]
            print(f"left running: {shlex.join(command)} stops it", file=sys.stderr)
            return 130
        with contextlib.suppress(KeyboardInterrupt):  # it ends without us
            client.stop_job(job)
            _wait_ended(client, job, 15)
            print(client.get_job_logs(job)[shown:], end="", flush=True)
        return 130


def _wait_ended(client: JobSubmissionClient, job: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)


def _report(client: JobSubmissionClient, job: str) -> int:
    info = client.get_job_info(job)
    reason = (info.message or "").splitlines()[:1]  # the rest repeats the log
    print(f"job {job}: {' '.join([info.status.value, *reason])}", file=sys.stderr, flush=True)
    return 0 if info.status == JobStatus.SUCCEEDED else 1


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """What Ray's clients raise, as an error for the user."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our own output has gone
    except (RuntimeError, ValueError, OSError, RayError, aiohttp.ClientError) as error:
        raise ClusterError(f"{what}: {error}") from error


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A SIGTERM (from make, a CI runner, a closing terminal) stops the job just as Ctrl-C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    print(f"optuna-dashboard  {processes.start_page('optuna-dashboard', optuna, 8080).url}   ({study})", flush=True)
    print(f"TensorBoard       {processes.start_page('tensorboard', board, 6006).url}   ({logdir})", flush=True)
    record = processes.read_record(HEAD)
    if record is not None and processes.alive(record):
        print(f"Ray dashboard     {record.url}")
    print("stop them with: make stop")
    return 0


def serve(
    model: str = "hypdefect-elpv@champion",
    config_file: Path = PROJECT / "serve" / "config" / "dev.yaml",
    ready: str = "/v1/health/ready",
    timeout_s: float = 180,
) -> int:
    """Deploy a registered model on the local head (or RAY_ADDRESS) and wait until it answers.

    Ray Serve loads nothing anew where the config is the one that it has: on the local head the version is part of it,
    so that an alias that was moved is followed.

    Args:
        model: Registry name and alias or version, NAME@ALIAS.
        config_file: Serve config to deploy; `model`, `version` and `home` are put into its applications' args.
        ready: Path, or full URL, that answers 200 once the model is loaded.
        timeout_s: How long to wait for that.
    """
    rendered = config.load_yaml(config_file)
    applications = rendered.get("applications", [])
    meant: dict[str, Any] = {"model": model, "home": str(files.home())}
    if named_cluster() is None:  # another cluster may have another registry
        entry = registry.resolve(files.home(), model)
        registry.verify(entry)
        meant["version"] = entry.version
    for application in applications:
        application["args"] = (application.get("args") or {}) | meant
        if own := methods_of_your_own():
            runtime_env = application.get("runtime_env") or {}
            application["runtime_env"] = runtime_env | {"env_vars": own | (runtime_env.get("env_vars") or {})}
    http = rendered.setdefault("http_options", {})
    http.setdefault("host", "127.0.0.1")
    http.setdefault("port", 8000)
    with target() as cluster, _explained(f"deploying {config_file} at {cluster.url}"):
        client = ServeSubmissionClient(cluster.url, headers=cluster.headers)
        details = client.get_serve_details()
        if details.get("proxies"):  # the proxy keeps the port it was started with
            http["port"] = (details.get("http_options") or {}).get("port", http["port"])
        elif cluster.head is not None:
            http["port"] = processes.free_port(http["port"])
        client.deploy_applications(rendered)
        host = "127.0.0.1" if cluster.head is not None else cluster.url.split("://")[1].rpartition(":")[0]
        base = f"http://{host}:{http['port']}"
        names = [str(application.get("name", "default")) for application in applications]
        _wait_served(client, names, ready if "://" in ready else base + ready, timeout_s)
        if cluster.head is not None:
            _print_head(cluster.head)
        which = f", version {meant['version']}," if "version" in meant else ""
        print(f"serving        {model}{which} at {base}   (status: {cluster.url}/#/serve)")
        print(f"try            curl -sS -F image=@IMAGE.png {base}/v1/predict")
    return 0


def _wait_served(client: ServeSubmissionClient, names: list[str], ready: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        applications = client.get_serve_details().get("applications") or {}
        states = {name: str(applications.get(name, {}).get("status", "NOT_STARTED")) for name in names}
        messages = "\n".join(_serve_messages(applications)) or "(no message; see the dashboard's Serve page)"
        if any(state in ("DEPLOY_FAILED", "UNHEALTHY") for state in states.values()):
            raise ClusterError(f"deployment failed, {states}:\n{messages}")
        if all(state == "RUNNING" for state in states.values()) and processes.get(ready) is not None:
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{ready} does not answer 200 after {timeout_s:.0f} s, {states}:\n{messages}")
        time.sleep(0.5)


def _serve_messages(applications: dict[str, Any]) -> Iterator[str]:
    for application in applications.values():
        for part in (application, *(application.get("deployments") or {}).values()):
            if part.get("message"):
                yield f"{part['name']}: {part['message']}"


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
