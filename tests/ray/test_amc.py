"""AMC from normal images and a few defects to a published classifier that answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hypdefect.distributed.extract import fill
from hypdefect.distributed.sweep import publish_fitted
from hypdefect.distributed.tournament import EvaluateConfig, evaluate_methods
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot_patches as family
from hypdefect.families.few_shot import Setting, TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.transform import TransformConfig
from hypdefect.images import read_image
from hypdefect.predictor import Predictor
from hypdefect.results.ledger import read_part
from hypdefect.results.tables import evaluation_tables
from tests.tiny_dataset import make_mtd_tree
from tune_spaces import get_space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


def test_it_is_scored_published_and_answers(ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    job = TaskConfig(
        dataset="mtd",
        root=make_mtd_tree(tmp_path / "mtd", per_class=12),
        backbone="patchcore:test_efficientnet@random",
        recipe=RecipeConfig(whole_size=64),
        k_shot=2,
        copies=1,
    )
    plan = prepare(family, job)
    fill(plan)
    fitting, reported = family.load(plan, tmp_path / "home")
    setting = Setting(k_shot=2)
    (direct,) = family.references(plan, job)
    scores = {}
    for run in (RunConfig(name="amc"), RunConfig(name="amc", method={"head": "relation"}), direct):
        transform = family.transform_of(run, fitting)
        assert ("bank" in transform.tensors) is (run is not direct)
        (kept,) = (tmp_path / "home" / "banks").iterdir()
        again = family.transform_of(run, fitting)
        assert all(torch.equal(value, again.tensors[name]) for name, value in transform.tensors.items())
        seen = family.transformed(fitting, transform)
        scores[run.method.head] = family.score(run, seen, family.transformed(reported, transform), setting, 0)
        assert list(family.validation_scores(run, seen, setting, range(1)))
    kept.write_bytes(kept.read_bytes()[:40])  # a damaged one is made again
    again = family.transform_of(RunConfig(name="amc"), fitting)
    assert again.tensors["bank"].shape == load_file(kept)["bank"].shape
    other = family.transform_of(RunConfig(name="amc", transform=TransformConfig(bank_seed=1)), fitting)
    assert not torch.equal(other.tensors["bank"], again.tensors["bank"])
    assert len({score.probabilities.tobytes() for score in scores.values() if score.probabilities is not None}) == 3

    run = RunConfig(name="amc", temperature=1.5)
    transform = family.transform_of(run, fitting)
    model = family.fit(run, family.transformed(fitting, transform), setting, 0)
    entry = publish_fitted(plan, run, model, transform, plan.provenance(), {}, "tried")
    predictor = Predictor.load(entry)
    seen = family.transformed(fitting, transform)
    expected = family.score(run, seen, family.transformed(reported, transform), setting, 0)
    assert expected.probabilities is not None
    uris = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["uri"].to_pylist(), strict=True))
    for number, image_id in enumerate(expected.image_ids[:4]):
        (answer,) = predictor.predict([(read_image(Path(uris[image_id])), None)])
        assert list(answer.probabilities.values()) == pytest.approx(expected.probabilities[number].tolist(), abs=1e-4)
    Image.new("RGB", (90, 60), (80, 80, 80)).save(tmp_path / "grey.png")
    (blank,) = predictor.predict([(read_image(tmp_path / "grey.png"), None)])
    assert sum(blank.probabilities.values()) == pytest.approx(1)


@pytest.mark.long
def test_it_stands_in_a_comparison_beside_methods_of_vectors(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    job = EvaluateConfig(
        dataset="mtd",
        root=make_mtd_tree(tmp_path / "mtd", per_class=12),
        backbone="tiny_random",
        patch_backbone="patchcore:test_efficientnet@random",
        recipe=RecipeConfig(whole_size=64, window=48, crop_size=64),
        methods=("prototype", "amc"),
        shots=(1,),
        draws=2,
        trials=2,
        episodes=2,
        features="plain",
    )
    result = evaluate_methods(job, get_space)
    rows = read_part(result.part)
    named = set(zip(rows["method"].to_pylist(), rows["features"].to_pylist(), strict=True))
    assert named == {("prototype", "plain"), ("amc", "patches")}
    assert rows.num_rows == 4
    assert len(set(rows["num_queries"].to_pylist())) == 1
    (table, *_) = evaluation_tables(rows, "draws")
    assert table.row_count == 2
    with pytest.raises(ConfigError, match="fpn is a method of segmentation; those of few_shot"):
        replace(job, methods=("fpn",))
