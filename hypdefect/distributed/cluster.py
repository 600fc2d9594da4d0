"""Connecting a job to Ray: the cluster it was submitted to, the one the user named, or one of its own."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hypdefect.errors import HypdefectError
from hypdefect.files import data_root, home

logger = logging.getLogger(__name__)

_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # loopback only; the same value in every shell (see cluster/README.md)
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks for up to this long
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[str]:
    """Join the cluster of `RAY_ADDRESS` (a submitted job has it set), else run a private one for the block's duration.

    Gives the address of the dashboard, "" where there is none. Workers are told absolute places: those of Ray Train and
    Ray Tune run in folders of their own, where `../shared/data` means nothing.

    Raises:
        HypdefectError: the named cluster does not answer, or a private one does not start.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["HYPDEFECT_DATA"], os.environ["HYPDEFECT_HOME"] = str(data_root()), str(home())
    import ray  # after the settings: Ray reads them once

    if ray.is_initialized():
        yield ""
        return
    named = os.environ.get("RAY_ADDRESS")
    try:
        if named:
            context = ray.init(address=named, log_to_driver=False, logging_level=logging.WARNING)
        else:
            context = ray.init(
                address="local",
                num_cpus=num_cpus or os.cpu_count(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # of a head that does not start Ray raises a plain one
        raise HypdefectError(
            f"no Ray cluster answers at RAY_ADDRESS={named}: {error}. Unset RAY_ADDRESS to run on this machine alone"
            if named
            else f"Ray did not start on this machine: {error} Try again when less runs here"
        ) from error
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def num_workers(wanted: int = 0) -> int:
    """`wanted`, or as many as the cluster has free CPUs: ask before starting anything."""
    import ray

    for _ in range(10):  # a cluster that has just started says so a moment later
        if free := int(ray.available_resources().get("CPU", 0)):
            break
        time.sleep(0.2)
    if not free:
        logger.warning("no CPU of the cluster is free: this job waits until another one ends")
    return wanted or max(1, free)
