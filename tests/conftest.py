"""What every test shares: an isolated home, checked tensor shapes and one Ray instance per run."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# Before anything imports numpy: its threads wait for each other on a busy machine.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Before anything imports ray: it reads these once.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every port on loopback: there is no authentication
}
# The methods of tests/elsewhere are known to every process of the run, wherever it is started.
os.environ["HYPDEFECT_METHODS"] = "tests.elsewhere.segmenter"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
)
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # tests never join a cluster that runs here already
    os.environ.pop(name, None)

# Before anything imports hypdefect: beartype then checks every jaxtyping signature.
jaxtyping.install_import_hook("hypdefect", "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--order-seed N`: no test may depend on what ran before it."""
    parser.addoption("--order-seed", type=int, help="run the files, and the tests of each, in the order of this seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first, then those on the shared Ray instance, then slow and end-to-end ones."""
    seed = config.getoption("--order-seed")
    if seed is not None:
        rng = random.Random(seed)
        places = {path: rng.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (places[item.path], rng.random()))
    items.sort(key=lambda item: [item.get_closest_marker(mark) is not None for mark in ("e2e", "slow", "ray")])


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # small tensors: two threads wait for each other on a busy machine


@pytest.fixture(scope="session", autouse=True)
def hypdefect_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$HYPDEFECT_HOME` of the whole run, also seen by Ray's workers: no test touches the user's own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The image sets, or a skip that says how to name them."""
    from hypdefect import files

    root = files.data_root()
    if not root.is_dir():
        pytest.skip(f"no image sets at {root}: set HYPDEFECT_DATA")
    return root


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    """The module `ray`, connected to an instance of this run alone. 4 CPUs are accounting only: no deadlocks."""
    import ray

    temp_dir = tempfile.mkdtemp(prefix="hd-", dir="/tmp")  # short: socket paths end at 107 characters
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=temp_dir,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)
