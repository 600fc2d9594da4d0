"""AMC's pretraining by Ray Train: the same for any number of workers, killed or not; then a task starts from it."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.datasets.synthetic import stored
from hypdefect.distributed import reproduce_amc as reproduce_amc_module
from hypdefect.distributed.extract import fill
from hypdefect.distributed.pseudo import enough_images, pretrain, worth
from hypdefect.distributed.reproduce_amc import ReproduceAMCConfig, amc_tables, reproduce_amc, task_of
from hypdefect.distributed.train import train
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot_patches
from hypdefect.families.amc_training import (
    AMCTrainConfig,
    PretrainConfig,
    ValidatedAMCTraining,
    residual_pool,
    training_of,
)
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.families.starts import load_start
from hypdefect.features.extract import RecipeConfig
from hypdefect.files import home
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.amc import AMCConfig
from hypdefect.results import ledger
from hypdefect.results.amc_figure import plot_amc
from hypdefect.training import fit
from tests.families.test_amc_training import residuals
from tests.ray.test_train import kill_one_worker
from tests.tiny_dataset import make_mtd_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]
SMALL = AMCTrainConfig(
    method=AMCConfig(grid=4, hidden=16, width=16),
    steps=60,
    n_way=4,
    n_query=2,
    report_every=5,
    lr=3e-3,
    patience=20,
    maml=True,
)


@pytest.mark.long
def test_two_workers_one_of_them_killed_learn_what_one_process_does(ray_local: Any, tmp_path: Path) -> None:
    config = replace(SMALL, steps=30, lr=3e-4)  # rounding grows with the steps, and faster with the rate
    training = training_of(residuals(), config)
    assert isinstance(training, ValidatedAMCTraining)
    alone = training.model()
    begun = {name: value.clone() for name, value in alone.trained().items()}
    expected = fit(alone, training.item, config, lambda metrics, write: None, validation=training)
    training.finish(alone)
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(tmp_path, killed))
    killer.start()
    model: Any
    model, losses = train(training, workers=2, name="run", folder=tmp_path)
    killer.join()
    training.finish(model)
    assert len(killed) == 1
    assert losses == pytest.approx(expected, abs=1e-3)
    assert any(
        (value - begun[name]).abs().max() > 3e-3 for name, value in alone.trained().items() if "running" not in name
    )
    for name, value in alone.trained().items():
        torch.testing.assert_close(model.trained()[name], value, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small image set, and a home in which its features are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=12)


@pytest.mark.long
def test_pseudo_defects_of_a_product_are_made_and_learned_from(ray_local: Any, tree: Path, tmp_path: Path) -> None:
    job = TaskConfig(
        dataset="mtd",
        root=tree,
        backbone="patchcore:test_efficientnet@random",
        recipe=RecipeConfig(whole_size=64),
        k_shot=1,
    )
    config = PretrainConfig(
        synthesis=SynthesisConfig(kind="perlin", textures=8, per_class=4),
        train=replace(SMALL, steps=8, maml=False),
    )
    plan = prepare(few_shot_patches, job)
    fill(plan)
    fitting, _ = few_shot_patches.load(plan, home())
    folder = pretrain(plan, fitting, config)
    start, known = load_start(folder)
    assert known == config
    before, after = worth(fitting, config, start, 1, "random", 3)
    assert before != after
    transform = few_shot_patches.transform_of(RunConfig(name="amc"), fitting)
    plot_amc(tmp_path, few_shot_patches.transformed(fitting, transform), config.train.method, start.core)
    assert {path.name for path in tmp_path.glob("*.png")} == {"residuals.png", "tsne.png"}
    assert pretrain(plan, fitting, config) == folder  # it is there already
    made = stored(plan.manifest, plan.label, home(), enough_images(plan, config.synthesis))
    assert made is not None
    plain = replace(config, transform=replace(config.transform, residuals=False))
    pools = [
        residual_pool(plan, fitting, made.manifest, home(), one).table.views["patch"]
        for one in (config, plain, replace(config, residuals="searched"))
    ]
    assert len({pool.tobytes() for pool in pools}) == 3
    size = [float(np.abs(pool).mean()) for pool in pools]
    assert size[0] < size[1]  # what the source has, too, is gone
    with pytest.raises(ConfigError, match="exists with other settings"):
        pretrain(plan, fitting, replace(config, train=SMALL), name=folder.name)


@pytest.mark.long
def test_tables_show_every_row_with_the_spread_of_the_bank(
    ray_local: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce_amc_module, "task_of", small_task)
    config = ReproduceAMCConfig(
        datasets=("mvtec_ad", "mtd"),
        roots={"mtd": tree},
        rows=("full", "scratch", "direct", "good_class"),
        shots=(1, 2),
        bank_seeds=(1, 2),
        backbone="patchcore:test_efficientnet@random",
        pretraining=PretrainConfig(
            synthesis=SynthesisConfig(kind="perlin", textures=8, per_class=4),
            train=replace(SMALL, steps=4, maml=False),
        ),
    )
    figures, missing = reproduce_amc(config)
    assert "mvtec_ad is not here" in missing[0]
    assert {(one.row, one.k_shot) for one in figures} == {(row, k) for row in config.rows for k in (1, 2)}
    assert all(len(one.accuracies) == 2 for one in figures)
    direct = [one for one in figures if one.row == "direct"]
    assert all(one.accuracies[0] == one.accuracies[1] for one in direct)  # the first K, and no bank
    *published, own, minus = amc_tables(config, figures)
    assert own.row_count == 4
    assert minus.row_count == 2
    assert all(table.row_count for table in published)
    classes = {row["variant"]: row["class_names"] for row in ledger.read(home()).to_pylist()}
    assert len(classes["contrastive classifier, pretrained, with normal images"]) == 6


def small_task(config: ReproduceAMCConfig, dataset: str) -> TaskConfig:
    task = task_of(config, dataset)
    return replace(task, recipe=RecipeConfig(whole_size=64))
