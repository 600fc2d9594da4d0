"""HypAD's own formulas: its distances, each term of its loss, the scale of its maps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypdefect import geometry
from hypdefect.methods.hypad import HypAD, HypADConfig, flat_twin
from hypdefect.training import SteppedConfig
from hypdefect.types import Batch
from tests.methods.test_detectors import DIM, fitted, images, unrelated

SMALL: dict[str, Any] = {"width": 4, "bottleneck": 4}


def begun(**config: Any) -> HypAD:
    model = HypAD(HypADConfig(**SMALL | config), DIM)
    model.begin([images(8, 0)])
    return model


def item(seed: int = 3) -> Batch:
    return unrelated(images(4, seed), seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def euclidean_loss(model: HypAD, batch: Batch) -> tuple[Tensor, ...]:
    """EfficientAD's four terms, written down without any geometry."""
    patches = batch.views["patch"]
    teacher = ((patches - model.mean) / model.deviation).permute(0, 3, 1, 2)
    pixels, other = ((batch.views[view] - 0.5) * 4 for view in ("pixels", "unrelated"))
    local, whole = model.student(pixels).chunk(2, 1)
    coarse = model.autoencoder(pixels, patches.shape[1:3])
    missed = (teacher - local).square().mean(1).flatten().sort(descending=True).values
    hard = missed[: max(1, round(model.config.hard * len(missed)))].mean()
    penalty = model.config.penalty * model.student(other)[:, :DIM].square().mean()
    return hard, (teacher - coarse).square().mean(), (coarse - whole).square().mean(), penalty


@pytest.mark.parametrize("config", [{}, {"hard": 1.0}, {"penalty": 3.0}, {"feature_scale": 0.5}])
def test_curvature_0_is_efficientad(config: dict[str, Any]) -> None:
    model = begun(curvature=0.0, clip=1e6, **config)
    terms = model.loss(item(), torch.Generator())
    expected = euclidean_loss(model, item())
    assert list(terms.parts.values()) == pytest.approx([float(x.detach()) for x in expected], rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(sum(terms.parts.values()), rel=1e-5)


def test_the_twin_is_the_method_at_curvature_0() -> None:
    config = HypADConfig(curvature=0.5, hard=0.3)
    assert flat_twin(config) == replace(config, curvature=0.0)
    batch = images(6, 3, odd=3)
    bent, flat = (fitted("hypad", curvature=c).anomaly(batch) for c in (0.5, 0.0))
    assert (bent.score - flat.score).abs().max() > 1e-3
    nearly = fitted("hypad", curvature=1e-9).anomaly(batch)
    torch.testing.assert_close(nearly.score, flat.score, rtol=1e-3, atol=1e-4)


def test_distances_are_those_of_geometry() -> None:
    model, (x, y) = begun(curvature=0.4, feature_scale=0.8, clip=1.5), noise(2, 3, DIM, 2, 2).unbind()
    rows = [v.permute(0, 2, 3, 1).double() * (0.8 / DIM**0.5) for v in (x, y)]
    points = [geometry.expmap0(geometry.clip_norm(v, 1.5 * 0.8), 0.4) for v in rows]
    expected = (geometry.dist(*points, 0.4) / 2 / 0.8).square()
    torch.testing.assert_close(model.distances(x, y).double(), expected, rtol=1e-4, atol=1e-6)


def test_long_vectors_are_clipped_and_short_ones_are_not() -> None:
    model, x = begun(clip=1.2), noise(1, DIM, 3, 3)
    length = torch.linalg.vector_norm(x, dim=1) / DIM**0.5
    clipped = torch.linalg.vector_norm(model.tangent(x), dim=1)
    torch.testing.assert_close(clipped, length.clamp_max(1.2), rtol=1e-4, atol=1e-6)
    assert (length > 1.2).any()
    assert (length < 1.2).any()


@pytest.mark.parametrize("config", [{"penalty": 0.0}, {"hard": 1.0}, {"clip": 0.5}, {"feature_scale": 3.0}])
def test_every_option_of_the_loss_changes_the_gradient(config: dict[str, Any]) -> None:
    def gradients(model: HypAD) -> Tensor:
        model.loss(item(), torch.Generator()).total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    usual = gradients(begun(curvature=0.3))
    assert (gradients(begun(curvature=0.3, **config)) - usual).abs().max() > 1e-3 * usual.abs().max()


def test_the_teacher_is_normalised_on_normal_images() -> None:
    answer = begun().teacher(images(8, 0))
    torch.testing.assert_close(answer.mean((0, 2, 3)), torch.zeros(DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(answer.std((0, 2, 3), correction=0), torch.ones(DIM), atol=1e-3, rtol=0)


def test_maps_are_rescaled_by_their_quantiles_on_held_out_normals() -> None:
    model, held = begun(whole=0.5), [images(8, 5), images(8, 6)]
    model.fit(held)
    maps = torch.cat([model.maps(batch).flatten(1) for batch in held], 1)
    low, high = (torch.quantile(maps, q, dim=1)[:, None] for q in (0.9, 0.995))
    batch = images(3, 9, odd=2)
    raw = model.maps(batch)
    expected = (0.1 * (raw.flatten(1) - low) / (high - low)).mean(0).view(raw.shape[1:])
    torch.testing.assert_close(model.anomaly(batch).score, expected.flatten(1).amax(1), rtol=1e-4, atol=1e-5)


def test_both_maps_count() -> None:
    """The score changes where only one of the two maps does."""
    model, batch = begun(), images(3, 9)
    model.fit([images(8, 5)])
    before = model.anomaly(batch).score
    with torch.no_grad():
        for p in model.autoencoder.parameters():
            p.mul_(1.5)
    assert (model.anomaly(batch).score - before).abs().max() > 1e-4


def test_networks_must_be_trained_first() -> None:
    with pytest.raises(RuntimeError, match="needs trained networks"):
        HypAD(HypADConfig(**SMALL), DIM).fit([images(2, 0)])


def test_a_place_sees_31_pixels() -> None:
    """Of the student; the autoencoder sees them all."""
    model = begun(width=32)
    pixels = torch.full((1, 3, 96, 96), 0.5, requires_grad=True)
    model.student(pixels)[0, :, 6, 6].sum().backward()
    assert pixels.grad is not None
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 31
    coarse = model.autoencoder(pixels, (12, 12))
    (grad,) = torch.autograd.grad(coarse[0, :, 6, 6].sum(), pixels)
    assert float((F.avg_pool2d(grad.abs(), 8) > 0).float().mean()) > 0.9


def test_the_rate_falls_once_and_a_cpu_computes_in_float32() -> None:
    config = SteppedConfig(steps=100, lr=1e-3)
    assert [config.rate(step) for step in (0, 94, 95, 99)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    with config.precision("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
