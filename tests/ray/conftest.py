"""Drivers in processes of their own, which some tests kill."""

import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

MARK = "HYPDEFECT_TEST_MARK"


@pytest.fixture
def private_env() -> Iterator[dict[str, str]]:
    """Environment of a driver with a Ray of its own; whatever still runs with it at the end is killed.

    Ray's processes leave the driver's process group, but they inherit its environment.
    """
    mark = uuid.uuid4().hex
    temp_dir = tempfile.mkdtemp(prefix="hd-", dir="/tmp")  # short: socket paths end at 107 characters
    yield os.environ | {MARK: mark, "RAY_TMPDIR": temp_dir, "OMP_NUM_THREADS": "1"}
    end = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(temp_dir, ignore_errors=True)
    assert not left, f"processes {left} survived"


def _marked(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it ended, or is someone else's
            continue
    return found
