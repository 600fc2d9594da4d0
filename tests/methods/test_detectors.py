"""What every detector promises, and PatchCore's own formulas."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

import tune_spaces
from hypdefect import geometry
from hypdefect.config import override
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.methods import build, get_method, methods_of
from hypdefect.methods.anomaly_maps import STRIDE, blurred, pixel_maps, top_mean
from hypdefect.methods.expected_score import ExpectedScore, log_spreads
from hypdefect.methods.normal_patches import sample_patches, standardisation
from hypdefect.methods.patch_discriminator import PatchDiscriminatorConfig, balanced_loss
from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig, flat_twin
from hypdefect.methods.simplenet import SimpleNet
from hypdefect.training import SteppedConfig
from hypdefect.training import fit as train
from hypdefect.types import AnomalyDetector, Batch, TrainableDetector

DIM, SIDE = 12, 6
NAMES = methods_of("detection")


def images(n: int, seed: int, *, odd: int = 0) -> Batch:
    """Patches near a plane of 3 directions; the last `odd` images have one patch far off it.

    The colours of a cell of pixels are its patch's place in the plane: a student can learn the patches from them.
    """
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(3, DIM, generator=torch.Generator().manual_seed(99))
    coordinates = torch.randn(n, SIDE, SIDE, 3, generator=generator)
    patches = coordinates @ plane
    patches += 0.1 * torch.randn(patches.shape, generator=generator)
    for i in range(n - odd, n):
        patches[i, 2, 3] += 6 * torch.randn(DIM, generator=generator)
    none = torch.zeros(n, dtype=torch.long)
    pixels = (0.5 + coordinates / 8).permute(0, 3, 1, 2).repeat_interleave(STRIDE, 2).repeat_interleave(STRIDE, 3)
    views = {"patch": patches, "pixels": pixels}
    return Batch(image_ids=tuple(map(str, range(n))), views=views, labels=none, aug_index=none)


def painted(n: int, seed: int) -> Batch:
    """Pseudo-defects: images with two odd patches each, marked."""
    batch, generator = images(n, seed), torch.Generator().manual_seed(seed)
    patches, targets = batch.views["patch"].clone(), torch.zeros(n, SIDE * STRIDE, SIDE * STRIDE, dtype=torch.long)
    for i in range(n):
        for y, x in torch.randint(SIDE, (2, 2), generator=generator).tolist():
            patches[i, y, x] += 6 * torch.randn(DIM, generator=generator)
            targets[i, y * STRIDE : (y + 1) * STRIDE, x * STRIDE : (x + 1) * STRIDE] = 1
    return replace(batch, views=batch.views | {"patch": patches}, targets=targets)


DISCRIMINATOR = {"context": 1, "epochs": 25, "dropout": 0.0, "lr": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "simplenet": {"epochs": 60, "lr": 1e-2, "noise": 1.0},
    "patch_discriminator": DISCRIMINATOR,
    "hypad": {"steps": 10, "width": 4, "bottleneck": 4, "lr": 1e-2},
    "bank_and_discriminator": {"discriminator": PatchDiscriminatorConfig(**DISCRIMINATOR)},
    "bank_and_hypad": {"steps": 10, "width": 4, "bottleneck": 4, "lr": 1e-2},
}
LONG: dict[str, dict[str, Any]] = {
    "hypad": {"steps": 120, "hard": 0.5},
    "bank_and_hypad": {"steps": 120, "hard": 0.5},
    "patch_discriminator": {"epochs": 100},
    "bank_and_discriminator": {"discriminator": PatchDiscriminatorConfig(**DISCRIMINATOR | {"epochs": 100})},
}
"""What it takes to find the odd patch."""


def fresh(name: str, **config: Any) -> AnomalyDetector:
    model: AnomalyDetector = build(name, get_method(name).config(**VARIANTS.get(name, {}) | config), DIM)
    return model


def fitted(name: str, **config: Any) -> AnomalyDetector:
    model = fresh(name, **config)
    learn(model, [images(8, 0), images(8, 1)])
    return model


def learn(model: AnomalyDetector, normals: list[Batch], seeds: range = range(20, 24)) -> None:
    """What `families.detection.fit` does, with toys in place of images."""
    if isinstance(model, TrainableDetector):
        config: Any = model.config  # type: ignore[attr-defined]
        model.begin(normals)
        steps = SteppedConfig(steps=config.steps, items_per_step=1, lr=config.lr)
        train(model, lambda number: unrelated(normals[number % len(normals)], number), steps, lambda *_: None)  # type: ignore[arg-type]
    model.fit(normals, [painted(16, seed) for seed in seeds])


def unrelated(batch: Batch, seed: int) -> Batch:
    noise = torch.rand(batch.views["pixels"].shape, generator=torch.Generator().manual_seed(seed))
    return replace(batch, views=batch.views | {"unrelated": noise})


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nothing_is_answered_before_fit(name: str) -> None:
    model = fresh(name)
    for ask in (model.export, lambda: model.anomaly(images(1, 0))):
        with pytest.raises(RuntimeError, match="needs fit"):
            ask()


def test_an_odd_patch_raises_score_and_map_where_it_is(name: str) -> None:
    answer = fitted(name, **LONG.get(name, {})).anomaly(images(12, 5, odd=6))
    assert answer.score.shape == (12,)
    assert answer.map.shape == (12, SIDE * STRIDE, SIDE * STRIDE)
    assert answer.score[6:].min() > answer.score[:6].max()
    for anomaly_map in answer.map[6:]:
        y, x = divmod(int(anomaly_map.argmax()), SIDE * STRIDE)
        assert (y // STRIDE, x // STRIDE) == (2, 3)


def test_an_answer_depends_on_no_neighbour_and_repeats_itself(name: str) -> None:
    model, again, batch = fitted(name), fitted(name), images(5, 7, odd=2)
    whole = model.anomaly(batch)
    assert torch.equal(whole.score, again.anomaly(batch).score)
    for i in range(5):
        alone = model.anomaly(batch.select(torch.tensor([i])))
        torch.testing.assert_close(alone.score[0], whole.score[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.map[0], whole.map[i], rtol=1e-4, atol=1e-5)


def test_what_is_exported_is_all_there_is(name: str) -> None:
    model, batch = fitted(name), images(5, 7, odd=2)
    other = fresh(name)
    other.restore(model.export())
    assert torch.equal(other.anomaly(batch).score, model.anomaly(batch).score)
    assert torch.equal(other.anomaly(batch).map, model.anomaly(batch).map)


def test_one_normal_image_is_enough_and_none_is_refused(name: str) -> None:
    model = fresh(name)
    learn(model, [images(1, 0)], range(1, 2))
    assert torch.isfinite(model.anomaly(images(2, 1)).score).all()
    with pytest.raises(DataError, match="at least one normal image"):
        fresh(name).fit([], [painted(2, 1)])


@pytest.mark.parametrize("name", ["patch_discriminator", "bank_and_discriminator"])
def test_a_discriminator_needs_pseudo_defects(name: str) -> None:
    for nothing in (None, []):
        with pytest.raises(DataError, match="needs pseudo-defects"):
            fresh(name).fit([images(4, 0)], nothing)


def test_a_loss_counts_defects_normal_cells_and_the_hardest_of_these() -> None:
    logits, cover = torch.tensor([[[0.0, 2.0], [-1.0, 3.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.4]]])
    clean = torch.nn.functional.softplus(torch.tensor([0.0, 2.0]))
    expected = clean.mean() / 2 + torch.nn.functional.softplus(torch.tensor(1.0)) / 2 + clean.max() / 2
    assert float(balanced_loss(logits, cover, 0.5)) == pytest.approx(float(expected))
    assert float(balanced_loss(logits, cover, 0.0)) == pytest.approx(float(expected - clean.max() / 2))
    only = balanced_loss(logits, torch.zeros(1, 2, 2), 0.0)
    assert float(only) == pytest.approx(float(torch.nn.functional.softplus(logits).mean() / 2))


@pytest.mark.parametrize("name", ["bank_and_discriminator", "bank_and_hypad"])
def test_both_parts_count_by_their_weight(name: str) -> None:
    batch = images(10, 5, odd=5)
    bank, both, other = (fitted(name, weight=weight).anomaly(batch) for weight in (0.0, 0.5, 1.0))
    torch.testing.assert_close(both.score, (bank.score + other.score) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.map, (bank.map + other.map) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.equal(bank.score.argsort(), other.score.argsort())


def test_hypad_and_the_bank_are_what_they_are_alone_in_units_of_normal_images() -> None:
    normals, later, batch = [images(8, 0), images(8, 1)], images(12, 2), images(10, 5, odd=5)
    models = {name: fresh(name, **config) for name, config in ALONE.items()}
    for name, model in models.items():
        learn(model, normals)
        if name != "conditional_patchcore":
            model.fit([later])  # the bank stays that of the images that were learned from
    both = models.pop("bank_and_hypad").anomaly(batch).score
    parts = []
    for model in models.values():
        of_normals = model.anomaly(later).score
        deviation = 1.4826 * (of_normals - of_normals.median()).abs().median()
        parts.append((model.anomaly(batch).score - of_normals.median()) / deviation)
    torch.testing.assert_close(both, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-4, atol=1e-4)


ALONE: dict[str, dict[str, Any]] = {
    "hypad": {"directions": 2, "top": 10},
    "conditional_patchcore": {"score": "top"},
    "bank_and_hypad": {"directions": 2, "weight": 0.75},
}


@pytest.mark.parametrize("score", ["reweighted", "top"])
def test_curvature_0_is_patchcore(score: str) -> None:
    plain, flat = fitted("patchcore", score=score), fitted("hyperbolic_patchcore", score=score, curvature=0.0)
    nearly = fitted("hyperbolic_patchcore", score=score, curvature=1e-9)
    expected = plain.anomaly(images(6, 3, odd=3))
    torch.testing.assert_close(flat.anomaly(images(6, 3, odd=3)).score, expected.score, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nearly.anomaly(images(6, 3, odd=3)).score, expected.score, rtol=1e-3, atol=1e-3)


def test_curvature_and_scale_change_the_answer_and_the_twin_undoes_them() -> None:
    batch = images(6, 3, odd=3)
    plain = fitted("patchcore").anomaly(batch).score
    answers = [
        fitted("hyperbolic_patchcore", **config).anomaly(batch).score
        for config in ({"curvature": 0.1}, {"curvature": 1.0}, {"curvature": 1.0, "feature_scale": 0.3})
    ]
    for answer in answers:
        assert (answer / plain - 1).abs().max() > 0.01
    twin = flat_twin(get_method("hyperbolic_patchcore").config(curvature=1.0, score="top"))
    assert (twin.curvature, twin.score) == (0.0, "top")


def test_distances_on_the_ball_are_those_of_geometry() -> None:
    config = get_method("hyperbolic_patchcore").config(curvature=0.5, feature_scale=0.8, score="top", top=1, sigma=0.0)
    model = PatchCore(config, DIM)
    model.fit([images(8, 0)])
    patches = images(3, 9, odd=1).views["patch"]
    tensors = {key: value.double() for key, value in model.export().items()}
    points = geometry.expmap0((patches.double() - tensors["mean"]) * tensors["scale"], 0.5).flatten(1, 2)
    nearest = geometry.pairwise_dist(points.flatten(0, 1), tensors["bank"], 0.5).amin(1).view(3, -1)
    expected = nearest.amax(1) / 2 / tensors["scale"]
    torch.testing.assert_close(model.anomaly(images(3, 9, odd=1)).score.double(), expected, rtol=1e-4, atol=1e-5)


def test_reweighting_is_equation_7() -> None:
    model = fitted("patchcore", neighbours=4, bank_share=0.2)
    assert isinstance(model, PatchCore)
    bank, batch = model.export()["bank"].double(), images(5, 3, odd=2)
    for patches, score in zip(batch.views["patch"].flatten(1, 2).double(), model.anomaly(batch).score, strict=True):
        distances = torch.cdist(patches, bank)
        highest = distances.amin(1).argmax()
        star = distances[highest].argmin()
        around = torch.cdist(bank[star][None], bank)[0].argsort()[:4]
        weight = 1 - distances[highest, star].exp() / distances[highest, around].exp().sum()
        assert float(score) == pytest.approx(float(weight * distances[highest, star]), rel=1e-4)


def test_the_bank_is_as_large_as_asked() -> None:
    total = 16 * SIDE * SIDE
    for config, size in (
        ({"bank_share": 0.1}, round(0.1 * total)),
        ({"bank_share": 1.0, "bank_size": 0}, total),
        ({"bank_size": 7}, 7),
        ({"bank_share": 1.0, "bank_size": 0, "candidates": 50}, 50),
        ({"projection": 4, "bank_size": 9}, 9),
    ):
        assert fitted("patchcore", **config).export()["bank"].shape == (size, DIM)


def test_samples_are_uniform_and_the_same_whatever_the_slices() -> None:
    batch = images(30, 0)
    rows = batch.views["patch"].flatten(0, 2)
    sample, total = sample_patches([batch], 200, seed=3)
    assert total == len(rows) == 30 * SIDE * SIDE
    slices = [batch.select(torch.arange(i, i + 3)) for i in range(0, 30, 3)]
    assert torch.equal(sample_patches(slices, 200, seed=3)[0], sample)
    assert not torch.equal(sample_patches([batch], 200, seed=4)[0], sample)
    everything, _ = sample_patches(slices, 0, seed=3)
    assert torch.equal(everything, rows)
    position = {tuple(row.tolist()): i for i, row in enumerate(rows)}
    places = torch.tensor([position[tuple(row.tolist())] for row in sample])
    assert len(set(places.tolist())) == 200
    assert abs(float(places.double().mean()) / len(rows) - 0.5) < 0.07


def test_patches_all_alike_are_refused_where_they_must_be_scaled() -> None:
    same = replace(images(4, 0), views={"patch": torch.ones(4, SIDE, SIDE, DIM)})
    with pytest.raises(DataError, match="all alike"):
        build("hyperbolic_patchcore", get_method("hyperbolic_patchcore").config(), DIM).fit([same])
    plain = build("patchcore", PatchCoreConfig(), DIM)
    plain.fit([same])
    assert float(plain.anomaly(same).score.max()) == 0


@pytest.mark.parametrize(
    "config", [{"bank_share": 0.0}, {"bank_share": 1.1}, {"neighbours": 0}, {"top": 0}, {"sigma": -1.0}]
)
def test_impossible_settings_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        PatchCoreConfig(**config)


def test_a_blurred_map_keeps_its_sum_inside_and_a_flat_one_is_left() -> None:
    point = torch.zeros(1, 1, 65, 65)
    point[0, 0, 32, 32] = 1
    soft = blurred(point, 4.0)[0, 0]
    assert float(soft.sum()) == pytest.approx(1, abs=1e-5)
    offsets = torch.arange(65.0) - 32
    expected = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 32)
    inside = offsets.abs() <= 16
    expected = torch.where(inside[:, None] & inside, expected, torch.zeros(()))
    torch.testing.assert_close(soft, expected / expected.sum(), atol=1e-6, rtol=1e-4)
    flat = torch.full((2, 3, 3), 5.0)
    torch.testing.assert_close(pixel_maps(flat, 4.0), torch.full((2, 24, 24), 5.0))


def test_top_mean_of_more_than_there_are_is_the_mean() -> None:
    scores: Tensor = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert top_mean(scores, 1).tolist() == [6]
    assert top_mean(scores, 2).tolist() == [4.5]
    assert top_mean(scores, 99).tolist() == [3]


def test_patches_are_standardised_by_those_of_normal_images() -> None:
    batches = [images(4, 0), images(3, 1)]
    mean, scale, slices = standardisation(batches, DIM)
    rows = torch.cat([batch.views["patch"].flatten(0, 2) for batch in batches])
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale, rows.std(0, correction=0), rtol=1e-4, atol=1e-5)
    assert slices == 2


def test_simplenets_loss_is_equation_6() -> None:
    model = fitted("simplenet")
    assert isinstance(model, SimpleNet)
    rows = model.standardised(images(2, 3))
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        adapted = model.adaptor(rows)
        clean = model.discriminator(adapted)[:, 0]
        noisy = model.discriminator(adapted + noise)[:, 0]
        loss = float(model.loss(rows, torch.Generator().manual_seed(4)))
    expected = (0.5 - clean).clamp_min(0).mean() + (0.5 + noisy).clamp_min(0).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert float(clean.mean()) > 0.2 > -0.2 > float(noisy.mean())


def searched() -> list[Any]:
    """(space, parameter, choices) of the detectors' spaces, but for sizes that these few patches do not reach."""
    found = []
    for path in sorted(Path(tune_spaces.__file__).parent.glob("[a-z]*.py")):
        space = tune_spaces.get_space(path.stem)
        if space.METHOD not in NAMES:
            continue
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        space.space(trial)
        for parameter, values in trial.distributions.items():
            if not parameter.endswith("bank_size"):
                choices = getattr(values, "choices", None) or (values.low, values.high)  # type: ignore[attr-defined]
                found.append(pytest.param(path.stem, parameter, choices, id=f"{path.stem}-{parameter}"))
    return found


@pytest.mark.parametrize(("space", "parameter", "choices"), searched())
def test_what_a_search_varies_of_a_detector_changes_what_it_answers(
    space: str, parameter: str, choices: tuple[Any, ...]
) -> None:
    name = tune_spaces.get_space(space).METHOD
    method = dict(VARIANTS.get(name, {})) | (
        {"score": "top"} if parameter == "method.top" and "patchcore" in name else {}
    )
    method.pop(parameter.removeprefix("method."), None)
    answers = []
    for choice in choices:
        run = override(RunConfig(name=name, method=get_method(name).config(**method)), {parameter: choice})
        model = run.model(DIM)
        learn(model, [images(8, 0), images(8, 1)])
        answers.append(model.anomaly(images(6, 3, odd=3)).score)
    for i, answer in enumerate(answers):
        for other in answers[:i]:
            assert (answer - other).abs().max() > 1e-4 * answer.abs().max()


def lively(batch: Batch, seed: int) -> Batch:
    """The same images, each enlarged round its mean by a random factor of 1/3 to 3: scores follow the factor."""
    factors = 3 ** (2 * torch.rand(len(batch), generator=torch.Generator().manual_seed(seed)) - 1)
    patches = batch.views["patch"] * factors[:, None, None, None]
    return replace(batch, views=batch.views | {"patch": patches})


@pytest.mark.parametrize("score", ["reweighted", "top"])
def test_a_score_is_relative_to_what_normal_images_of_the_same_look_score(score: str) -> None:
    normals = [lively(images(32, seed), seed) for seed in range(4)]
    held, odd = lively(images(64, 10), 10), lively(images(64, 11, odd=64), 11)
    names = ("patchcore", "conditional_patchcore")
    plain, conditional = (fresh(name, bank_size=40, score=score) for name in names)
    exact = fresh("conditional_patchcore", bank_size=40, score=score, directions=0)
    for model in (plain, conditional, exact):
        model.fit(normals)
    assert torch.equal(exact.anomaly(odd).score, plain.anomaly(odd).score)
    look = log_spreads(held).mean(1)
    of_plain, of_conditional = (
        abs(float(spearmanr(look, model.anomaly(held).score).statistic)) for model in (plain, conditional)
    )
    assert of_plain > 0.7
    assert of_conditional < 0.5 * of_plain
    found = [
        roc_auc_score([0] * 64 + [1] * 64, torch.cat([model.anomaly(batch).score for batch in (held, odd)]))
        for model in (plain, conditional)
    ]
    assert found[1] > found[0] + 0.05
    assert torch.equal(conditional.anomaly(odd).map, plain.anomaly(odd).map)


def test_hypads_score_may_be_relative_too_and_is_published_so() -> None:
    plain, relative, other = (fresh("hypad", directions=k) for k in (0, 2, 2))
    normals, batch = [lively(images(32, seed), seed) for seed in range(2)], lively(images(8, 5), 5)
    for model in (plain, relative):
        learn(model, normals)
    assert torch.equal(relative.anomaly(batch).map, plain.anomaly(batch).map)
    ratio = relative.anomaly(batch).score / plain.anomaly(batch).score
    assert ratio.std() > 0.01
    other.restore(relative.export())
    assert torch.equal(other.anomaly(batch).score, relative.anomaly(batch).score)


def test_one_image_says_nothing_of_what_scores_depend_on(caplog: pytest.LogCaptureFixture) -> None:
    expected, batch = ExpectedScore(DIM, 3), images(4, 0)
    expected.fit([batch], lambda batch: torch.tensor([0.0, -1.0, 0.0, 2.0]))
    assert "too few normal images with a score (1)" in caplog.text
    assert torch.equal(expected(batch), torch.ones(4))


def test_an_image_unlike_all_normal_ones_is_not_excused_further_than_these() -> None:
    model = fresh("conditional_patchcore", bank_size=40)
    model.fit([lively(images(32, seed), seed) for seed in range(4)])
    batch = images(4, 12)
    wild, wilder = (replace(batch, views={"patch": batch.views["patch"] * factor}) for factor in (50.0, 100.0))
    share = (model.anomaly(wilder).score / model.anomaly(wild).score).mean()
    assert share == pytest.approx(2, rel=0.1)  # its own spread, which doubled, explains nothing more
