"""Every part of HypDFS acts by default: on features of real images, a fit without it is another one.

24 solar cells, three supports and three queries of each class, through the default backbone.
"""

from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from hypdefect.datasets.readers.elpv import default_root, scan
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import RecipeConfig, RegionExtractor, dims_of
from hypdefect.features.timm_networks import Backbone
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.geometry import expmap0
from hypdefect.images import read_image
from hypdefect.methods import hypdfs
from hypdefect.methods.hypdfs import Core, HypDFS, HypDFSConfig, Moments, Noise, spread_loss, whole_crop_contrast
from hypdefect.methods.support import by_image
from hypdefect.types import VIEWS, Batch, Episode

N_WAY, K_SHOT, N_QUERY = 4, 3, 3


@pytest.fixture(scope="session")
def cells() -> Episode:
    """The first cells of each class, as a run sees them that has no normal images."""
    root = default_root()
    assert root is not None
    spec, recipe = get_backbone("efficientnet_lite0"), RecipeConfig(flips=False)
    extract = RegionExtractor(Backbone(spec), recipe)
    rows = sorted(scan(root), key=lambda row: (row.defect, row.path))
    names, ids, features = [], [], []
    for defect, own in groupby(rows, key=lambda row: row.defect):
        names.append(defect)
        for _, row in zip(range(K_SHOT + N_QUERY), own, strict=False):
            ids.append(row.path.stem)
            features.append(extract(read_image(row.path), None))
    block_dims, shape_dims = dims_of(spec, recipe)
    transform = FeatureTransform.fit(None, block_dims, TransformConfig(), shape_dims)
    views = transform({view: torch.cat([f[view] for f in features]) for view in VIEWS})
    batch = Batch(
        image_ids=tuple(ids),
        views=views,
        labels=torch.arange(N_WAY).repeat_interleave(K_SHOT + N_QUERY),
        aug_index=torch.zeros(len(ids), dtype=torch.long),
    )
    first = torch.arange(len(ids)) % (K_SHOT + N_QUERY) < K_SHOT
    support, query = (batch.select(torch.nonzero(chosen).flatten()) for chosen in (first, ~first))
    return Episode(support=support, query=query, class_names=tuple(names))


def fitted(cells: Episode, **values: Any) -> HypDFS:
    model = HypDFS(HypDFSConfig(**values), cells.support.views["whole"].shape[1])
    model.adapt(cells.support, N_WAY)
    return model


def log_probabilities(cells: Episode, **values: Any) -> Tensor:
    return fitted(cells, **values).logits(cells.query).log_softmax(1)


@pytest.fixture(scope="session")
def default(cells: Episode) -> Tensor:
    return log_probabilities(cells)


def test_the_cells_are_a_task_that_can_be_learned(cells: Episode, default: Tensor) -> None:
    assert cells.class_names == ("mono_defect", "mono_good", "poly_defect", "poly_good")
    assert default.shape == (12, 4)
    assert float((default.argmax(1) == cells.query.labels).double().mean()) > 0.6


def nudged(cells: Episode, share: float, **values: Any) -> list[Tensor]:
    defaults = HypDFSConfig()
    names = ("alpha", "beta", "penalty")
    return [log_probabilities(cells, **values, **{n: getattr(defaults, n) * (1 + share)}) for n in names]


def test_what_rounding_makes_of_a_fit_is_next_to_nothing(cells: Episode, default: Tensor) -> None:
    """A weight off by 1e-12 stands for rounding: 7e-13 measured; one off by 1e-6: 7e-7."""
    assert max(float((x - default).abs().max()) for x in nudged(cells, 1e-12)) < 1e-8
    assert max(float((x - default).abs().max()) for x in nudged(cells, 1e-6)) < 1e-5


WITHOUT: dict[str, dict[str, Any]] = {
    "L_s": {"alpha": 0.0},
    "L_cl": {"beta": 0.0},
    "synthesis": {"synthesis": False},
    "adapter": {"adapter": False},
    "ODE": {"ode": "none"},
    "curvature": {"curvature": 0.0},
    "origin": {"origin": "features"},
    "unit": {"unit": "features"},
    "hyperplanes": {"head": "centers"},
    "spread penalty": {"spread_penalty": 0.0},
}


@pytest.mark.parametrize("part", WITHOUT)
def test_every_part_acts_by_default(part: str, cells: Episode, default: Tensor) -> None:
    """Thousands of times what a weight off by 1e-6 makes of a fit. L_s acts least: 0.015 and 0.005 measured."""
    change = (log_probabilities(cells, **WITHOUT[part]) - default).abs()
    assert float(change.max()) > 0.005
    assert float(change.mean()) > 0.002


def spread_of(cells: Episode, model: HypDFS, core: Core) -> float:
    """L_s of a core on the support's moments and on the noise that `adapt` draws."""
    config, support = model.config, by_image(cells.support)
    moments: Moments = model.moments(core, model.tangents(support, core), support.labels, N_WAY)
    noise = Noise.draw(moments, config.n_syn, torch.Generator().manual_seed(config.seed))
    z, reach = model.synthesize(core, moments, model.evolve(core, moments), noise)
    length = config.noise_scale * (2 * moments.log_scale_WPE).exp().sum(2).sqrt()
    return float(spread_loss(z, reach, length, config.curvature, config.margin).detach())


def test_the_head_is_fitted_alone_before_all_parts_together(cells: Episode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real optimiser, listened to: what it is given, and by how much each call lowers the objective."""
    calls: list[tuple[int, float, float]] = []
    real = hypdfs.minimize

    def listened(parameters: Any, objective: Any, steps: int) -> Any:
        before = float(objective().total.detach())
        terms = real(parameters, objective, steps)
        calls.append((len(parameters), before, float(objective().total.detach())))
        return terms

    monkeypatch.setattr(hypdfs, "minimize", listened)
    fitted(cells)
    (alone, start, middle), (together, again, end) = calls
    assert alone == 2 < together  # normals and offsets
    assert again == pytest.approx(middle)
    assert start > middle > end


def test_the_spread_loss_is_above_0_at_the_start_and_what_a_fit_lowers(cells: Episode) -> None:
    """0.32 at the start; 0.13 with its weight, 0.29 without, where the cross-entropy alone moves the ODE."""
    weighed, ignored = fitted(cells), fitted(cells, alpha=0.0)
    assert weighed.fitted is not None
    assert ignored.fitted is not None
    start = spread_of(cells, weighed, weighed.task_core(by_image(cells.support), N_WAY).double())
    assert 0.2 < start < 0.6
    with_it, without = spread_of(cells, weighed, weighed.fitted), spread_of(cells, ignored, ignored.fitted)
    assert with_it < 0.7 * without
    assert 0.05 < without < 0.95 * start


def contrast_of(cells: Episode, model: HypDFS, core: Core) -> float:
    support = by_image(cells.support)
    both = expmap0(model.adapted(core, model.tangents(support, core)), model.config.curvature)
    found = whole_crop_contrast(
        both[:, 0], both[:, 1], support.labels, model.config.curvature, model.config.contrast_temperature
    )
    return float(found.detach())


def test_the_contrast_is_above_0_at_the_start_and_what_a_fit_lowers(cells: Episode) -> None:
    """Where it moves the adapter: 1.28 at the start, 1.19 with its weight, 1.23 without."""
    weighed, ignored = fitted(cells), fitted(cells, beta=0.0)
    assert weighed.fitted is not None
    assert ignored.fitted is not None
    assert weighed.last_loss is not None
    start = contrast_of(cells, weighed, weighed.task_core(by_image(cells.support), N_WAY).double())
    end, without = contrast_of(cells, weighed, weighed.fitted), contrast_of(cells, ignored, ignored.fitted)
    assert end == pytest.approx(weighed.last_loss.parts["contrast"], abs=0.01)  # of the last evaluation
    assert 0.5 < end < 0.98 * start
    assert end < without - 0.02
