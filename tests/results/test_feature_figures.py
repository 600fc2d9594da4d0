"""Pictures of a task's features: of the points the classifier scores, on the features the ledger's run had."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hypdefect.config import to_mapping
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig, override
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting, TaskConfig
from hypdefect.features.imported import import_features
from hypdefect.features.transform import TransformConfig
from hypdefect.geometry import pairwise_dist
from hypdefect.results.feature_figures import draw_features, plot_disk, plot_radius
from hypdefect.results.figures import Album
from hypdefect.results.fitted_points import fitted_points
from hypdefect.results.sections import Section, current_sections
from hypdefect.types import VIEWS
from tests.ledger_rows import as_table, row
from tests.toy_features import DIM, toy_pool

QUICK = RunConfig(method={"adapter_rank": 2, "n_syn": 3, "steps": 2}, support_copies=0)


def toy_task(copies: int = 1, dim: int = DIM) -> tuple[Fitting, Reported]:
    pool = toy_pool(n_way=3, per_class=6, copies=copies, dim=dim)
    queries = toy_pool(n_way=3, per_class=4, dim=dim, seed=0)
    return Fitting(pool=pool, normals=None, block_dims=(dim,)), Reported(queries=queries)


@pytest.mark.parametrize(("curvature", "dim"), [(0.05, DIM), (0.0, DIM), (0.05, 40)])  # 40: fitted in its span
def test_the_points_are_those_the_classifier_scores(curvature: float, dim: int) -> None:
    config = RunConfig(
        method={"curvature": curvature, "adapter_rank": 2, "n_syn": 3, "head": "centers"}, support_copies=1
    )
    points = fitted_points(*toy_task(dim=dim), config, Setting(k_shot=2), 0)
    nearest = pairwise_dist(points.ball[6:], points.prototypes, curvature).argmin(1)
    assert float((nearest == points.labels[6:]).double().mean()) == pytest.approx(points.accuracy)
    assert points.num_supports == 3 * 2
    assert len(points.synthetic) == 3 * config.method.n_syn


def test_points_of_meta_features_need_the_projection() -> None:
    config = RunConfig(features="meta")
    with pytest.raises(ConfigError, match="projection"):
        fitted_points(*toy_task(), config, Setting(k_shot=2), 0)
    means = {view: torch.zeros(DIM) for view in VIEWS}
    start = MetaStart(method="hypdfs", projection={view: torch.eye(DIM)[:, :4] for view in VIEWS}, core={}, mean=means)
    assert fitted_points(*toy_task(), config, Setting(k_shot=2), 0, start).plain.shape[1] == 2 * 4


def test_the_fitted_disk_shows_distances_no_worse_than_a_given_one(tmp_path: Path) -> None:
    points = fitted_points(*toy_task(), QUICK, Setting(k_shot=2), 0)
    given, fitted = plot_disk(tmp_path / "disk.png", points)
    assert fitted.stress <= given.stress + 1e-3
    plot_radius(tmp_path / "radius.png", points, ["one", "one", "two"])  # with a level of families
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_rows_are_shown_in_the_unit_of_the_task() -> None:
    own, features = (
        fitted_points(*toy_task(), override(QUICK, {"method.unit": unit}), Setting(k_shot=2), 0).plain
        for unit in ("rows", "features")
    )
    ratio = own.norm() / features.norm()
    assert abs(ratio - 1) > 0.05
    torch.testing.assert_close(own, ratio * features, rtol=1e-4, atol=1e-5)


def section_of(dataset: str, split: str, run: RunConfig = QUICK) -> Section:
    """A task of which HypDFS was run at K = 2."""
    config = json.dumps(to_mapping(run))
    rows = [
        row(dataset=dataset, label="set", split=split, method="hypdfs", k_shot=2, draw=draw, method_config=config)
        for draw in range(2)
    ]
    (section,) = current_sections(as_table(rows))
    return section


def import_split_set(home: Path) -> None:
    """Imported features with an official split: "made" of three classes, seven images each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["crack", "pit", "stain"], 7)
    features = rng.normal(size=(3, 8))[np.repeat(np.arange(3), 7)] + 0.2 * rng.normal(size=(21, 8))
    path = home / "made.npz"
    np.savez(path, features=features.astype(np.float32), labels=labels, splits=np.tile(["train"] * 4 + ["test"] * 3, 3))
    import_features([path], home)


def draw(section: Section, home: Path) -> Album:
    album = Album(home, section.slug)
    draw_features(album, section, TaskConfig(), seed=0, find_start=lambda *_: None)
    return album


def test_features_of_an_official_split_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    import_split_set(tmp_path)
    album = draw(section_of("imported:made", "official"), tmp_path)
    assert album.notes == []
    names = [picture.path.name.removeprefix("set-official-tiny_random-") for picture in album.pictures]
    assert names == ["tsne.png", "disk.png", "radius.png"]
    assert all(picture.path.is_file() for picture in album.pictures)


def test_of_a_blend_the_member_that_counts_most_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    import_split_set(tmp_path)
    other = replace(QUICK, transform=TransformConfig(centring="supports"))
    alone = [picture.path.read_bytes() for picture in draw(section_of("imported:made", "official"), tmp_path).pictures]
    album = draw(section_of("imported:made", "official", replace(other, blend=(QUICK, other))), tmp_path)
    assert "draw 0, K = 2, the first of a blend of 2." in album.pictures[0].caption
    assert [picture.path.read_bytes() for picture in album.pictures] == alone


@pytest.mark.parametrize("split", ["grouped", "random"])
def test_imported_features_that_cannot_be_drawn_are_not_asked_for_as_images(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither an audit nor an extraction can be run on features without images."""
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    caplog.set_level("INFO", logger="hypdefect")
    import_split_set(tmp_path)
    name = "made" if split == "grouped" else "absent"  # it has no groups
    album = draw(section_of(f"imported:{name}", split), tmp_path)
    assert album.pictures == []
    (note,) = album.notes
    assert f"Made by python jobs/extract.py --import FILE... --name {name}" in note
    assert "not drawn" in caplog.text
    assert "--audit" not in note + caplog.text


def test_the_points_of_a_centred_configuration_are_those_it_scores() -> None:
    config = RunConfig(method={"adapter_rank": 2, "n_syn": 3}, transform=TransformConfig(centring="supports"))
    fitting, reported = toy_task()
    setting = Setting(k_shot=2)
    points = fitted_points(fitting, reported, config, setting, 0)
    transform = few_shot.transform_of(config, fitting)
    seen = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform)
    assert points.accuracy == pytest.approx(few_shot.score(config, *seen, setting, 0).metrics["acc"])
    bare = fitted_points(fitting, reported, replace(config, transform=TransformConfig()), setting, 0)
    assert not torch.allclose(points.plain, bare.plain)


def test_a_temperature_moves_no_point() -> None:
    plain, mild = (fitted_points(*toy_task(), replace(QUICK, temperature=t), Setting(k_shot=2), 0) for t in (1.0, 3.0))
    assert torch.equal(plain.ball, mild.ball)
    assert plain.accuracy == mild.accuracy
