"""Meta-training with Ray Train: the same run for any number of workers, however often it is interrupted."""

import contextlib
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypdefect.distributed.cluster import connected
from hypdefect.distributed.train import told, train
from hypdefect.errors import ConfigError, DataError, HypdefectError, NumericsError
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.episodic import EpisodicConfig, EpisodicTraining
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.training import fit
from tests.ray.search_script import SMALL, make_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
CONFIG = EpisodicConfig(
    method=HypDFSConfig(**SMALL), steps=6, items_per_step=4, n_way=3, k_shot=2, n_query=3, lr=1e-2, report_every=2
)


@pytest.fixture(scope="module")
def pool() -> LabelledFeatures:
    return make_task()[0].pool


def in_process(pool: LabelledFeatures, config: EpisodicConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = HypDFS(config.method, pool.dim)
    losses = fit(model, EpisodicTraining(pool=pool, config=config).item, config, lambda metrics, write: None)
    return model.trained(), losses


def assert_same(model: Any, losses: list[float], expected: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    weights, stream = expected
    assert losses == pytest.approx(stream, abs=1e-5)
    assert len(losses) == len(stream)
    found = model.trained()
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def kill_one_worker(folder: Path, killed: list[int]) -> None:
    """Once the first checkpoint lies there."""
    import psutil  # Ray brings its own

    end = time.monotonic() + 300
    while not list(folder.rglob("state.json")) and time.monotonic() < end:
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one has ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()[:1]):
                process.kill()
                killed.append(process.pid)
                return


@pytest.mark.slow
def test_two_workers_one_of_them_killed_learn_what_one_process_does(
    ray_local: Any, pool: LabelledFeatures, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=40, report_every=4, lr=1e-3)  # rounding grows with the steps
    expected = in_process(pool, config)
    started = HypDFS(CONFIG.method, pool.dim).trained()
    assert any((started[name] - value).abs().max() > 1e-3 for name, value in expected[0].items())
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(tmp_path, killed))
    killer.start()
    model, losses = train(EpisodicTraining(pool=pool, config=config), workers=2, name="run", folder=tmp_path)
    killer.join()
    assert len(killed) == 1
    assert_same(model, losses, expected)


def test_what_cannot_run_is_refused_at_once(ray_local: Any, pool: LabelledFeatures, tmp_path: Path) -> None:
    def refuse(error: type[HypdefectError], match: str, config: EpisodicConfig, workers: int) -> None:
        with pytest.raises(error, match=match):
            train(EpisodicTraining(pool=pool, config=config), workers=workers, name="run", folder=tmp_path)

    refuse(ConfigError, "workers must be at least 1, got 0", CONFIG, 0)
    refuse(ConfigError, "64 training workers need as many CPUs", replace(CONFIG, items_per_step=64), 64)
    refuse(ConfigError, "items_per_step=4 is no multiple of 3 workers.* set --workers to 2, or", CONFIG, 3)
    refuse(DataError, "class 'crack' has 12 images", replace(CONFIG, k_shot=12, n_way=4), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_error_of_the_run(ray_local: Any, pool: LabelledFeatures, tmp_path: Path) -> None:
    config = replace(CONFIG, lr=1e30)
    with pytest.raises(NumericsError, match=r"finite numbers|loss at step"):
        train(EpisodicTraining(pool=pool, config=config), workers=2, name="run", folder=tmp_path, max_failures=0)


def test_workers_are_told_absolute_places(ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYPDEFECT_DATA", "sets")
    monkeypatch.setenv("HYPDEFECT_HOME", "home")
    with connected():
        assert os.environ["HYPDEFECT_DATA"] == str(tmp_path / "sets")
        assert os.environ["HYPDEFECT_HOME"] == str(tmp_path / "home")


def test_how_far_a_run_is_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint_1").mkdir()
    with caplog.at_level("INFO", "hypdefect"), told(tmp_path, 8, "training x"):
        (tmp_path / "checkpoint_1" / "state.json").write_text('{"step": 8, "best": {"value": 0.5, "reports": 0}}')
        end = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.05)
    assert caplog.messages[0].startswith("training x: 8/8 ")
    assert caplog.messages[0].endswith(", best validation 50.00 %")
