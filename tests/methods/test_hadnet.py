"""HADNet: every part acts, the twin is the limit of curvature 0, and what is chosen is what the paper says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from hypdefect.errors import ConfigError
from hypdefect.methods.fpn import FPN, FPNConfig, name_regions
from hypdefect.methods.hadnet import (
    MAX_NORM,
    HADNet,
    HADNetConfig,
    HyperbolicScores,
    largest_channels,
    selection_losses,
)
from hypdefect.methods.pyramid import BACKBONE_RATE, pixel_loss
from hypdefect.training import SteppedConfig, fit, optimizer_of
from hypdefect.types import Batch

SIDE = 64
PLAIN = FPNConfig(network="tiny_random", width=16, lr=3e-3)
TINY = HADNetConfig(network="tiny_random", width=16, embedding=6, images=2, items_per_step=1, lr=3e-3)


def setup_module() -> None:
    torch.set_num_threads(1)


def test_the_finest_sum_is_smoothed_once() -> None:
    hadnet, plain = HADNet(TINY, 2).laterals, FPN(PLAIN, 2).laterals
    maps = [torch.randn(1, dim, 32 // 2**i, 32 // 2**i) for i, dim in enumerate(FPN(PLAIN, 2).pyramid.dims)]
    nudged = [maps[0].clone(), *maps[1:]]
    nudged[0][0, :, 9, 9] += 1
    touched = [(laterals(maps) != laterals(nudged)).any(1).sum() for laterals in (hadnet, plain)]
    assert touched[0] == 1  # HADNet's discriminator smooths; its neighbours are as they were
    assert touched[1] > 1


def marked(number: int, seed: int = 0, classes: int = 2) -> Batch:
    """Grey noise with a bright square of class 1 and a dark one of class 2."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 + 0.05 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    targets = torch.zeros(number, SIDE, SIDE, dtype=torch.long)
    for i in range(number):
        for label in range(1, classes + 1):
            y, x = (int(at) for at in torch.randint(0, SIDE - 24, (2,), generator=generator))
            pixels[i, :, y : y + 24, x : x + 24] += 0.4 if label == 1 else -0.4
            targets[i, y : y + 24, x : x + 24] = label
    none = torch.zeros(number, dtype=torch.long)
    return Batch(
        image_ids=tuple(f"{i}" for i in range(number)),
        views={"pixels": pixels.clamp(0, 1)},
        labels=none,
        aug_index=none,
        targets=targets,
    )


def painted() -> list[Batch]:
    batch = marked(6, seed=5, classes=1)
    clean = 0.5 + 0.05 * torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return [replace(batch, views=batch.views | {"clean": clean})]


def trained(config: Any, steps: int = 80) -> Any:
    model = (FPN if isinstance(config, FPNConfig) else HADNet)(config, 2)
    model.begin(painted())
    model.train()
    loop = SteppedConfig(steps=steps, items_per_step=1, lr=config.lr, report_every=steps)
    losses = fit(model, lambda number: marked(2, seed=number), loop, lambda metrics, write: None)
    model.finish()
    return model, losses


def right(model: Any) -> float:
    batch = marked(8, seed=999)
    assert batch.targets is not None
    found = model.logits(batch).argmax(1)
    defects = batch.targets > 0
    return float((found == batch.targets)[defects].double().mean())


@pytest.mark.parametrize("config", [TINY, replace(TINY, curvature=0.0), PLAIN])
def test_it_learns_which_pixels_are_which_class(config: Any) -> None:
    model, losses = trained(config)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert right(model) > 0.7


CHANGES: dict[str, dict[str, Any]] = {
    "curvature": {"curvature": 0.5},
    "random channels": {"selection": "random"},
    "random mixtures": {"selection": "projection"},
    "fewer channels": {"keep": 0.25},
    "no ARD": {"ard": "off"},
    "ARD as printed": {"ard": "sorted"},
    "fewer residuals": {"strongest": 0.25},
    "no HST": {"hst": False},
    "finest scale": {"scales": "finest"},
    "no reconstruction": {"reconstruction": 0.0},
    "no loss of HST": {"hyperbolic": 0.0},
    "teacher": {"teacher": 1.0},
    "stem and first stages": {"frozen": 0},
    "depthwise filters": {"depthwise": True},
    "regions named as wholes": {"regions": "whole"},
    "mirrored": {"mirrored": True},
}


@pytest.fixture(scope="module")
def usual() -> torch.Tensor:
    return torch.as_tensor(trained(TINY, steps=6)[0].logits(marked(2, seed=77)))


@pytest.mark.parametrize("name", CHANGES)
def test_every_part_changes_the_answer(name: str, usual: torch.Tensor) -> None:
    other = trained(replace(TINY, **CHANGES[name]), steps=6)[0].logits(marked(2, seed=77))
    assert (other - usual).abs().max() > 1e-3


MORE_CHANGES: dict[str, dict[str, Any]] = CHANGES | {
    "usual": {},
    "finest scale, no reconstruction": {"scales": "finest", "reconstruction": 0.0},
    "finest scale, ARD as printed": {"scales": "finest", "ard": "sorted"},
    "no reconstruction, no ARD": {"reconstruction": 0.0, "ard": "off"},
    "no HST, no loss of HST": {"hst": False, "hyperbolic": 0.0},
    "network whose norms have no statistics": {"network": "timm:test_convnext@random", "frozen": 0},
    "network whose norms are not folded": {"network": "timm:test_resnet@random", "frozen": 0},
}


@pytest.mark.parametrize("name", MORE_CHANGES)
def test_every_weight_that_is_trained_gets_a_gradient(name: str) -> None:
    """Workers wait for each of them."""
    plain = {key: value for key, value in MORE_CHANGES[name].items() if hasattr(PLAIN, key)}
    for model in (HADNet(replace(TINY, **MORE_CHANGES[name]), 2), FPN(replace(PLAIN, **plain), 2)):
        model.begin(painted())
        model.train()
        model.loss(marked(2), torch.Generator()).total.backward()
        wrong = [key for key, x in model.named_parameters() if x.requires_grad != (x.grad is not None)]
        assert not wrong


def test_what_no_map_comes_from_is_not_trained() -> None:
    for network, unread in (("tiny_random", "conv_head"), ("timm:test_convnext@random", "head.norm")):
        net = FPN(replace(PLAIN, network=network, frozen=0, depthwise=True), 2).pyramid.net
        frozen = [name for name, weights in net.named_parameters() if not weights.requires_grad]
        assert frozen == [f"{unread}.weight", f"{unread}.bias"]


def test_scales_that_nobody_reads_are_not_rebuilt() -> None:
    for reconstruction, number in ((0.1, 4), (0.0, 1)):
        model = HADNet(replace(TINY, scales="finest", reconstruction=reconstruction), 2)
        rebuilt = model.parts(marked(1).views["pixels"])[2]
        trained = [auto.net[0].weight.requires_grad for auto in model.autoencoders]
        assert (len(rebuilt), trained) == (number, [i < number for i in range(4)])


def test_mirrored_answers_are_the_mean_share_of_three() -> None:
    model = trained(PLAIN, steps=6)[0]
    pixels = marked(2, seed=77).views["pixels"]
    with torch.no_grad():
        once = model.scores(pixels).softmax(1)
        others = [model.scores(pixels.flip(axis)).flip(axis).softmax(1) for axis in (2, 3)]
        found = model.mirrored_scores(pixels).softmax(1)
    expected = torch.stack([once, *others]).mean(0)
    assert (found - expected).abs().max() < 1e-5
    assert (once - expected).abs().max() > 1e-2


def test_a_region_is_named_as_a_whole_by_its_mean_share() -> None:
    """Three locations, of which two touch at a corner alone, are a region of class 1; two others are one of class 2."""
    shares = torch.full((1, 3, 6, 6), 0.02)
    shares[:, 0] = 0.96
    for place, share in {
        (0, 0): (0.7, 0.1),
        (0, 1): (0.2, 0.5),
        (1, 2): (0.6, 0.3),
        (4, 4): (0.1, 0.5),
        (5, 4): (0.45, 0.2),
    }.items():
        shares[0, 1:, place[0], place[1]] = torch.tensor(share)
        shares[0, 0, place[0], place[1]] = 1 - sum(share)
    before, after = shares.argmax(1), name_regions(shares.log()).argmax(1)
    assert (before[0, 0, 1], before[0, 5, 4]) == (2, 1)
    expected = torch.zeros(6, 6, dtype=torch.long)
    expected[0, 0] = expected[0, 1] = expected[1, 2] = 1
    expected[4, 4] = expected[5, 4] = 2
    assert torch.equal(after[0], expected)


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3), classes=st.integers(1, 4))
def test_naming_regions_moves_no_share_to_or_from_background(seed: int, batch: int, classes: int) -> None:
    logits = 3 * torch.randn(batch, classes + 1, 5, 7, generator=torch.Generator().manual_seed(seed))
    shares, named = logits.softmax(1), name_regions(logits).softmax(1)
    torch.testing.assert_close(named[:, 0], shares[:, 0])
    found = shares[:, 0] < 0.5
    torch.testing.assert_close(named.movedim(1, 3)[~found], shares.movedim(1, 3)[~found])
    torch.testing.assert_close(named[:, 1:].amax(1)[found], (1 - shares[:, 0])[found])
    assert torch.equal(named.argmax(1) > 0, found)


def test_the_twin_is_the_limit_of_curvature_0() -> None:
    flat, near = HADNet(replace(TINY, curvature=0.0), 2), HADNet(replace(TINY, curvature=1e-8), 2)
    near.load_state_dict(flat.state_dict())
    pixels = marked(2).views["pixels"]
    with torch.no_grad():
        torch.testing.assert_close(near.scores(pixels), flat.scores(pixels), rtol=1e-4, atol=1e-4)
        assert flat.hst is not None
        x = torch.randn(1, 16, 4, 4)
        v = flat.hst.embed(x).movedim(1, 3)
        normals = flat.hst.normals / flat.hst.normals.norm(dim=1, keepdim=True)
        linear = 2 * ((v[..., None, :] - flat.hst.points) * normals).sum(-1) * flat.hst.scale
        torch.testing.assert_close(flat.hst(x), linear.movedim(3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curvature", [0.01, 0.5])
def test_tangent_vectors_stay_where_float32_tells_them_apart(curvature: float) -> None:
    hst = HyperbolicScores(8, 3, 8, curvature)
    with torch.no_grad():
        hst.embed.weight.copy_(torch.eye(8)[:, :, None, None])
        hst.embed.bias.zero_()
    x = nn.functional.normalize(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    limit = MAX_NORM / curvature**0.5
    inside, at, beyond = (hst(factor * limit * x) for factor in (0.9, 1.0, 100.0))
    torch.testing.assert_close(beyond, at, rtol=1e-4, atol=1e-3)
    assert (at - inside).abs().max() > 1e-2
    assert torch.isfinite(beyond).all()
    flat = HyperbolicScores(8, 3, 8, 0.0)
    flat.load_state_dict(hst.state_dict())
    assert (flat(100 * limit * x) - flat(limit * x)).abs().max() > 1


def test_both_optimisers_keep_their_rates_and_are_resumed() -> None:
    model = HADNet(replace(TINY, curvature=1.0), 2)
    optimizer = optimizer_of(model, SteppedConfig())
    assert {group["factor"] for group in optimizer.param_groups} == {1.0, BACKBONE_RATE}
    model.loss(marked(2), torch.Generator()).total.backward()
    optimizer.step()
    fresh = optimizer_of(model, SteppedConfig())
    fresh.load_state_dict(optimizer.state_dict())
    for own, other in zip(optimizer.parts, fresh.parts, strict=True):
        moments = [state["exp_avg"] for state in own.state.values()]
        assert moments
        for kept, found in zip(moments, [state["exp_avg"] for state in other.state.values()], strict=True):
            torch.testing.assert_close(found, kept, rtol=0, atol=0)


def test_points_are_trained_on_the_ball_and_stay_there() -> None:
    config = replace(TINY, curvature=1.0, lr=0.1)
    model = HADNet(config, 2)
    assert model.hst is not None
    for curvature, net in ((1.0, model), (0.0, HADNet(replace(config, curvature=0.0), 2))):
        adam, riemannian = optimizer_of(net, SteppedConfig()).parts
        assert isinstance(adam, torch.optim.AdamW)
        assert isinstance(riemannian, geoopt.optim.RiemannianAdam)
        (points,) = (p for group in riemannian.param_groups for p in group["params"])
        assert points is net.hst.points, curvature
    assert len(optimizer_of(FPN(PLAIN, 2), SteppedConfig()).parts) == 1
    begun = model.hst.points.detach().clone()
    loop = SteppedConfig(steps=20, items_per_step=1, lr=0.1, report_every=20)
    fit(model, lambda number: marked(2, seed=number), loop, lambda metrics, write: None)
    points = model.hst.points.detach()
    assert (points - begun).abs().max() > 1e-2
    assert points.norm(dim=1).max() < 1


def test_the_pretrained_network_is_trained_more_slowly() -> None:
    model = HADNet(TINY, 2)
    rest, network = model.parameter_groups()
    assert (rest["factor"], network["factor"]) == (1.0, 0.3)
    count = sum(p.numel() for group in (rest, network) for p in group["params"])
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in network["params"]} == {id(p) for p in model.pyramid.parameters() if p.requires_grad}


@pytest.mark.parametrize(("build", "config"), [(HADNet, TINY), (FPN, PLAIN)])
def test_a_step_leaves_the_statistics_of_batch_norms_that_are_not_folded(build: Any, config: Any) -> None:
    network = "timm:test_resnet@random"
    with pytest.raises(ConfigError, match=r"set method\.frozen to 0"):
        build(replace(config, network=network), 2)
    model = build(replace(config, network=network, frozen=0), 2)
    norms = [module for module in model.pyramid.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    statistics = [x.clone() for norm in norms for x in norm.buffers()]
    weights = [parameter.detach().clone() for parameter in model.pyramid.parameters()]
    model.begin(painted())
    model.train()
    assert model.training
    loop = SteppedConfig(steps=1, items_per_step=1, report_every=1)
    fit(model, lambda number: marked(2, seed=number), loop, lambda metrics, write: None)
    assert all(map(torch.equal, statistics, (x for norm in norms for x in norm.buffers())))
    assert not all(map(torch.equal, weights, model.pyramid.parameters()))


@pytest.mark.parametrize(("build", "config"), [(HADNet, TINY), (FPN, PLAIN)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_depthwise_filters_are_trained_where_that_is_asked_for(build: Any, config: Any, depthwise: bool) -> None:
    net = build(replace(config, frozen=0, depthwise=depthwise), 2).pyramid.net
    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    filters = [module for module in convolutions if module.groups > 1]
    assert filters
    assert all(module.weight.requires_grad == depthwise for module in filters)
    others = [module.weight.requires_grad for module in convolutions if module.groups == 1]
    assert sum(others) >= len(others) - 1  # no map comes from the head


def test_the_channels_chosen_are_those_that_change_where_something_was_painted() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[:, 4:16, 8:20] = True
    clean = torch.randn(2, 6, 8, 8, generator=generator)
    copy = clean + 0.05 * torch.randn(2, 6, 8, 8, generator=generator)
    copy[:, 3, 1:4, 2:5] += 5.0
    losses = selection_losses(clean, copy, mask, 0.01)
    assert losses.shape == (2, 6)
    assert losses.sum(0).argmin() == 3
    assert not torch.allclose(losses, selection_losses(clean, copy, mask, 2.0))


def test_afss_is_done_once_and_kept(tmp_path: Path) -> None:
    model = HADNet(TINY, 2)
    before = [getattr(model, f"channels_{i}").clone() for i in range(4)]
    model.begin(painted())
    after = [getattr(model, f"channels_{i}") for i in range(4)]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (batch,) = painted()
    assert batch.targets is not None
    fresh = HADNet(TINY, 2).pyramid
    with torch.no_grad():
        pairs = zip(fresh(batch.views["clean"]), fresh(batch.views["pixels"]), after, strict=True)
        for clean, copy, chosen in pairs:
            losses = selection_losses(clean, copy, batch.targets > 0, TINY.curvature).sum(0)
            left = [i for i in range(len(losses)) if i not in chosen.tolist()]
            assert losses[chosen].max() <= losses[left].min()
    assert all(len(set(chosen.tolist())) == len(chosen) for chosen in after)
    random = HADNet(replace(TINY, selection="random"), 2)
    random.begin(painted())
    assert all(torch.equal(getattr(random, f"channels_{i}"), before[i]) for i in range(4))
    model.finish()
    save_file({k: v.contiguous() for k, v in model.export().items()}, tmp_path / "m.safetensors")
    again = HADNet(replace(TINY, seed=7), 2)
    with pytest.raises(RuntimeError, match="needs a trained network"):
        again.logits(marked(1))
    again.restore(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(again.logits(marked(2)), model.logits(marked(2)))


def test_ard_takes_the_largest_of_each_image() -> None:
    residuals = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2, 2)]
    residuals[0][0, 1] = 0.5  # everywhere: the largest mean
    residuals[0][0, 2, 1, 1] = -3.0  # one place: the largest maximum, whatever its sign
    residuals[1][1, 0] = 1.0
    by_maximum, by_average = largest_channels(residuals, 1)
    assert by_maximum[:, 0].tolist() == [2, 3]
    assert by_average[:, 0].tolist() == [1, 3]


def test_gating_before_upsampling_is_gating_after_it() -> None:
    model = HADNet(TINY, 2)
    with torch.no_grad():
        residuals = [torch.randn(2, 8, side, side) for side in (16, 8, 4, 2)]
        total = sum(
            torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
            for x in model.filtered(residuals)
        )
        chosen = largest_channels(residuals, model.strongest)
        together = torch.cat(
            [
                torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
                for x in residuals
            ],
            1,
        )
        gates = [torch.zeros(2, 32).scatter(1, at, 1.0)[:, :, None, None] for at in chosen]
        assert all(0 < float(gate.mean()) < 1 for gate in gates)
        expected = model.enter(torch.cat([together * gate for gate in gates], 1))
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["afss", "projection"])
def test_channels_are_last_in_memory_throughout(selection: Any) -> None:
    """Sums of maps of different layouts are several times slower."""
    model = HADNet(replace(TINY, selection=selection), 2)
    seen: list[torch.Tensor] = []
    model.laterals.register_forward_pre_hook(lambda _, given: seen.extend([*given[0], *given[1]]))
    for part in (*model.autoencoders, *model.reduce):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.scores(marked(2).views["pixels"])
    assert len(seen) == 16
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_the_loss_is_cross_entropy_and_dice_of_the_classes_that_are_there() -> None:
    logits = torch.randn(1, 4, 4, 4)
    targets = torch.tensor([[[0, 1], [2, 1]]]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    shares = logits.softmax(1)[0].flatten(1).T
    truth = targets.flatten()
    entropy = -shares[torch.arange(16), truth].log().mean()
    one = torch.nn.functional.one_hot(truth, 4).float()
    dice = 2 * (shares * one).sum(0) / (shares.sum(0) + one.sum(0))
    assert float(pixel_loss(logits, targets)) == pytest.approx(float(entropy + 1 - dice[:3].mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"curvature": -1.0}, "curvature"),
        ({"keep": 1.5}, "method.keep"),
        ({"network": "openclip:ViT-B-32@random"}, "trains a timm network"),
        ({"steps": 0}, "method.steps must be positive"),
        ({"width": 20}, "method.width must be a multiple of 8, got 20; take 16 or 24"),
        ({"width": 4}, "method.width must be a multiple of 8, got 4; take 8"),
        ({"smallest": 0.0}, "method.smallest must be positive"),
        ({"frozen": 40}, "method.frozen must be below the"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HADNet(replace(TINY, **values), 2)


def test_it_has_fewer_weights_than_the_papers() -> None:
    model = HADNet(HADNetConfig(), 3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 11.35e6
