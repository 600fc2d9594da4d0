"""Configurations that answer together: likelihood says how much each counts, and each sees what it would alone."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ConfigError, NumericsError
from hypdefect.evaluation import RunConfig, choose
from hypdefect.families import few_shot
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.features.spec import FeatureTable
from hypdefect.features.transform import SideBySide, TransformConfig
from hypdefect.methods import blended as blended_module
from hypdefect.methods.blended import BlendedClassifier, columns, fitted_weights, worths
from hypdefect.methods.tempered import fitted_temperature, likelihood_loss
from hypdefect.types import VIEWS
from tests.toy_features import unit

SETTING = Setting(k_shot=2, seed=1)
SMALL = {"steps": 4, "adapter_rank": 4, "ode_hidden": 8}


def drawn(*factors: float, episodes: int = 6, queries: int = 300, ways: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Logits of members, and labels drawn with the probabilities of their sum with these factors."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(episodes):
        logits = 2 * torch.randn(len(factors), queries, ways, generator=generator, dtype=torch.float64)
        chances = torch.tensordot(torch.tensor(factors, dtype=torch.float64), logits, 1).softmax(1)
        found.append((logits, torch.multinomial(chances, 1, generator=generator)[:, 0]))
    return found


def blended(episodes: list[tuple[Tensor, Tensor]], weights: list[float]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensordot(torch.tensor(weights, dtype=torch.float64), x, 1), y) for x, y in episodes]


def test_the_weights_behind_the_labels_are_found() -> None:
    episodes = drawn(1.5, 0.5, 0.0)
    found = fitted_weights(episodes)
    assert found[:2] == pytest.approx([1.5, 0.5], rel=0.15)
    assert found[2] == 0
    smoothing = 1 / (1 + 6 * 300)
    best = likelihood_loss(blended(episodes, found), 1.0, smoothing)
    for moved in ([1.6, 0.5, 0.0], [1.5, 0.6, 0.0], [1.3, 0.4, 0.0], [1.5, 0.0, 0.0]):
        scale = [a / b if b else a for a, b in zip(moved, [1.5, 0.5, 1.0], strict=True)]
        other = [w * s if w else s for w, s in zip(found, scale, strict=True)]
        assert best < likelihood_loss(blended(episodes, other), 1.0, smoothing)


@pytest.mark.parametrize("scale", [1e-2, 1e3])
def test_a_member_counts_as_much_whatever_the_scale_of_its_logits(scale: float) -> None:
    episodes = drawn(1.5, 0.5)
    factors = torch.tensor([1.0, scale], dtype=torch.float64)[:, None, None]
    first, second = fitted_weights([(factors * x, y) for x, y in episodes])
    assert [first, second * scale] == pytest.approx(fitted_weights(episodes), rel=1e-3)


def test_a_member_that_speaks_rarely_and_loudly_drives_no_other_out() -> None:
    """Its weight, in units of its own spread, is many times that of the member which the blend lives of."""
    episodes = []
    for logits, labels in drawn(1.0, 0.0):
        quiet = torch.zeros_like(logits[1])
        quiet[::25] = 10 * torch.eye(3, dtype=torch.float64)[labels[::25]]
        quiet[1::5] = 0.01 * torch.eye(3, dtype=torch.float64)[labels[1::5]]
        episodes.append((torch.stack([logits[0], quiet, 0 * quiet]), labels))
    found = fitted_weights(episodes)
    assert found[0] == pytest.approx(1.0, rel=0.2)
    assert found[1] > 100
    assert found[2] == 0
    assert worths(episodes, found)[0] > 0.1


def test_what_lowers_the_loss_by_next_to_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = drawn(1.0, 0.0, 0.0, 0.0, 0.0)
    kept, *left = fitted_weights(episodes)
    alone = fitted_weights([(x[:1], y) for x, y in episodes])
    assert kept == pytest.approx(alone[0], rel=1e-4)
    assert left == [0.0] * 4
    monkeypatch.setattr(blended_module, "LEAST_WORTH", 0.0)
    assert any(fitted_weights(episodes)[1:])  # by chance some noise is of use to these labels
    two = [(x[:2], y) for x, y in episodes]
    loss, without = (likelihood_loss(blended(two, w), 1.0, 1 / 1801) for w in ([1.0, 0.5], [1.0, 0.0]))
    assert worths(two, [1.0, 0.5])[1] == pytest.approx(without - loss, rel=1e-9)


def test_a_single_member_gets_its_temperature() -> None:
    episodes = drawn(0.7)
    alone = fitted_temperature([(x[0], y) for x, y in episodes])
    assert fitted_weights(episodes) == pytest.approx([1 / alone], rel=1e-3)


def test_logits_that_are_not_finite_have_no_weights() -> None:
    episodes = drawn(1.0, 1.0)
    episodes[2][0][1, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        fitted_weights(episodes)


# --- blends as configurations -------------------------------------------------------------------------------------


def parts_task(noise: int = 1, text: bool = False) -> tuple[Fitting, Reported]:
    """Four classes: the first block of 6 numbers tells 0, 1 and {2, 3} apart, the second {0, 1}, 2 and 3, the others
    nothing."""
    rng = np.random.default_rng(0)
    sides = []
    centres = [{view: unit(rng.normal(size=(4, 6))) for view in VIEWS} for _ in range(2)]
    for views in centres[0].values():
        views[3] = views[2]
    for views in centres[1].values():
        views[1] = views[0]
    for side in ("pool", "query"):
        labels = np.repeat(np.arange(4), 24)
        ids = np.array([f"{side}-{i:03d}" for i in range(len(labels))])
        aug = np.tile(np.arange(3), len(labels))
        views = {}
        for view in VIEWS:
            means = [block[view][labels] for block in centres] + noise * [np.zeros((len(labels), 6))]
            rows = np.concatenate([x + 0.25 * rng.normal(size=x.shape) for x in means], 1).repeat(3, 0)
            views[view] = (rows + 0.02 * rng.normal(size=rows.shape)).astype(np.float32)
        table = FeatureTable(image_ids=ids.repeat(3), aug_index=aug, views=views)
        sides.append(
            LabelledFeatures(
                class_names=("a", "b", "c", "d"),
                image_ids=ids,
                labels=labels,
                groups=ids,
                table=table,
                text=rng.normal(size=(4, 12 + 6 * noise)).astype(np.float32) if text else None,
            )
        )
    fitting = Fitting(pool=sides[0], normals=None, block_dims=(6,) * (2 + noise))
    return fitting, Reported(queries=sides[1])


def part(number: str | None, name: str = "prototype", **changes: Any) -> RunConfig:
    method = SMALL if name == "hypdfs" else {}
    return RunConfig(name=name, method=method, transform=TransformConfig(parts=number), **changes)


def blend(*members: RunConfig) -> RunConfig:
    return replace(members[0], temperature=1.0, blend=members)


def seen(fitting: Fitting, *runs: RunConfig) -> list[Fitting]:
    return [few_shot.transformed(fitting, few_shot.transform_of(run, fitting)) for run in runs]


@pytest.mark.parametrize("name", ["prototype", "hypdfs", "zip_adapter", "logistic_regression"])
def test_a_blend_answers_with_the_sum_of_what_its_members_answer_alone(name: str) -> None:
    fitting, reported = parts_task(text=name == "zip_adapter")
    members = (
        part("1", name, support_copies=2, temperature=0.5),
        part("0", name, support_copies=0, temperature=2.0),
    )
    run = blend(*members)
    assert run.copies(2) == 2
    expected, answers = [], []
    for member in members:
        transform = few_shot.transform_of(member, fitting)
        side, queries = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform)
        batch = queries.queries.batch(np.arange(len(queries.queries)))
        answers.append(few_shot.fit(member, side, SETTING, 3).logits(batch).double())
        expected.append(few_shot.score(member, side, queries, SETTING, 3))
    transform = few_shot.transform_of(run, fitting)
    assert isinstance(transform, SideBySide)
    assert transform.dim == (6, 6)
    side, queries = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform)
    assert side.dim == (6, 6)
    found = few_shot.score(run, side, queries, SETTING, 3)
    torch.testing.assert_close(torch.from_numpy(found.probabilities), sum(answers).softmax(1), atol=1e-9, rtol=1e-6)
    assert found.metrics["acc"] > max(one.metrics["acc"] for one in expected)  # each alone confuses two classes
    views = {view: torch.from_numpy(x) for view, x in reported.queries.table.views.items()}
    for view, rows in transform(views).items():
        np.testing.assert_array_equal(rows.numpy(), queries.queries.table.views[view])


def test_a_member_learns_from_as_many_copies_as_it_wants() -> None:
    fitting, _ = parts_task()

    support = fitting.pool.batch(np.arange(0, 96, 8), copies=2)
    found = []
    for most in (0, 1, 2):
        model = BlendedClassifier([part("0").model(6)], (6,), (most,))
        model.adapt(support, 4)
        alone = part("0").model(6)
        alone.adapt(columns(support.select(torch.nonzero(support.aug_index <= most).flatten()), (6,), 0), 4)
        assert model.export().keys() == {f"0/{name}" for name in alone.export()}
        found.append(next(iter(model.export().values())))
        torch.testing.assert_close(found[-1], next(iter(alone.export().values())))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_columns_of_text_are_those_of_both_views() -> None:
    fitting, _ = parts_task(text=True)
    run = blend(part("0", support_copies=0), part("0+1", support_copies=0))
    side = few_shot.transformed(fitting, few_shot.transform_of(run, fitting))
    batch = side.pool.batch(np.arange(4))
    for number, alone in enumerate(seen(fitting, *run.blend)):
        own, cut = alone.pool.batch(np.arange(4)), columns(batch, side.widths, number)
        assert own.text is not None
        assert cut.text is not None
        torch.testing.assert_close(cut.text, own.text)
        for view in VIEWS:
            torch.testing.assert_close(cut.views[view], own.views[view])


def test_a_blend_is_written_and_read_as_any_configuration() -> None:
    run = blend(part("1", "hypdfs", support_copies=2, temperature=0.5), part(None, "hypdfs", support_copies=0))
    assert from_mapping(RunConfig, json.loads(json.dumps(to_mapping(run)))) == run
    alone = part("1", support_copies=2)
    with pytest.raises(ConfigError, match="the members of a blend have temperatures, it has none; got 2"):
        replace(alone, temperature=2.0, blend=(alone, alone))
    for members in [(alone, part("1", "hypdfs", support_copies=0)), (alone, part("1")), (alone, blend(alone, alone))]:
        with pytest.raises(
            ConfigError, match="a blend holds configurations of prototype, each with its support_copies"
        ):
            replace(alone, blend=members)


def test_each_member_starts_from_what_training_gave_to_it() -> None:
    """One member on a projection and with trained weights, one on plain features, from scratch."""
    fitting, reported = parts_task()
    generator = torch.Generator().manual_seed(0)
    projection = {view: torch.randn(18, 5, generator=generator) for view in VIEWS}
    mean = {view: torch.randn(18, generator=generator) / 10 for view in VIEWS}
    learned = replace(part(None, "hypdfs", support_copies=0), features="meta")
    core = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in learned.model(5).trained().items()}
    start = MetaStart(method="hypdfs", projection=projection, core=core, mean=mean)
    members = (learned, part("0", "hypdfs", support_copies=0), replace(learned, pretrained=False))
    weights = start.weights(blend(*members))
    assert [own is None for own in weights] == [False, True, True]

    def scored(run: RunConfig) -> Any:
        transform = few_shot.transform_of(run, fitting, start)
        sides = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform)
        return few_shot.score(run, *sides, SETTING, 0, start)

    alone = [np.log(scored(member).probabilities.astype(np.float64)) for member in members]
    assert not np.allclose(alone[0], alone[2], atol=1e-3)
    expected = torch.from_numpy(sum(alone)).softmax(1).numpy()
    np.testing.assert_allclose(scored(blend(*members)).probabilities, expected, atol=1e-5)


def test_the_twin_of_a_blend_is_the_blend_of_the_twins() -> None:
    fitting, _ = parts_task()
    run = blend(part("1", "hypdfs", support_copies=2, temperature=0.5), part("0", "hypdfs", support_copies=0))
    side = few_shot.transformed(fitting, few_shot.transform_of(run, fitting))
    twin = few_shot.twin(run, side)
    assert twin is not None
    assert twin.blend == tuple(few_shot.twin(m, s) for m, s in zip(run.blend, seen(fitting, *run.blend), strict=True))
    assert {m.method.curvature for m in twin.blend} == {0.0}
    alone = blend(part("1", support_copies=0), part("0", support_copies=0))
    assert few_shot.twin(alone, few_shot.transformed(fitting, few_shot.transform_of(alone, fitting))) is None


# --- what is taken of the finalists -------------------------------------------------------------------------------


def settled(fitting: Fitting, runs: list[RunConfig], numbers: range) -> tuple[RunConfig, list[float]]:
    sides = seen(fitting, *runs)
    answered = [few_shot.answers(run, side, SETTING, numbers) for run, side in zip(runs, sides, strict=True)]
    return few_shot.settle(runs, answered, SETTING)


def accuracy(run: RunConfig, fitting: Fitting, numbers: range) -> list[float]:
    (side,) = seen(fitting, run)
    return list(few_shot.validation_scores(run, side, SETTING, numbers))


def test_parts_that_know_different_classes_are_blended_and_noise_is_left_out() -> None:
    fitting, _ = parts_task(noise=3)
    runs = [part("0"), part("1"), part("2")]
    numbers = range(4, 12)
    found, scores = settled(fitting, runs, numbers)
    assert sorted(str(member.transform.parts) for member in found.blend) == ["0", "1"]
    assert {member.support_copies for member in found.blend} == {2}
    assert replace(found, blend=(), temperature=found.blend[0].temperature) == found.blend[0]
    assert np.mean(scores) > max(np.mean(accuracy(run, fitting, numbers)) for run in runs) + 0.05
    assert len(scores) == len(numbers)
    assert choose([accuracy(runs[0], fitting, numbers), scores]) == 1
    again = few_shot.calibrated(found, seen(fitting, found)[0], SETTING, numbers)
    assert [m.transform.parts for m in again.blend] == [m.transform.parts for m in found.blend]
    for one, other in zip(again.blend, found.blend, strict=True):
        assert one.temperature == pytest.approx(other.temperature, rel=1e-3)


def test_an_episode_is_answered_with_weights_that_others_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting, _ = parts_task()
    runs = [part("0"), part("1")]
    real, fitted_on = few_shot.fitted_weights, []

    def noted(episodes: Any) -> list[float]:
        fitted_on.append([labels for _, labels in episodes])
        return real(episodes)

    monkeypatch.setattr(few_shot, "fitted_weights", noted)
    settled(fitting, runs, range(5))
    assert [len(labels) for labels in fitted_on] == [2, 3, 5]
    (side,) = seen(fitting, runs[0])
    of_episode = [build_episode(side.pool, SETTING.episodes, number, copies=2).query.labels for number in range(5)]
    for labels, numbers in zip(fitted_on, ([1, 3], [0, 2, 4], [0, 1, 2, 3, 4]), strict=True):
        assert all(torch.equal(a, of_episode[n]) for a, n in zip(labels, numbers, strict=True))


def test_the_defaults_stay_where_the_others_add_nothing() -> None:
    fitting, _ = parts_task(noise=3)
    runs = [part("0+1"), part("2"), part("3")]
    found, scores = settled(fitting, runs, range(6))
    assert found == few_shot.calibrated(runs[0], seen(fitting, runs[0])[0], SETTING, range(6)) != runs[0]
    assert scores == accuracy(runs[0], fitting, range(6))
    assert settled(fitting, runs[:1], range(6)) == (found, scores)
    # where one of them has all the weight, it stands alone
    noise, both = (few_shot.answers(run, *seen(fitting, run), SETTING, range(6)) for run in runs[1::-1])
    alone, _ = few_shot.settle(runs[1::-1], [[(0 * x, y) for x, y in noise], both], SETTING)
    assert replace(alone, temperature=found.temperature) == found
    assert alone.temperature == pytest.approx(found.temperature, rel=1e-3)


def drawn_answers(seed: int, *strengths: float) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of trials that know the labels this well, and are wrong in other places: 12 episodes of 8 queries."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(8) % 4
    truth = torch.eye(4)[labels]
    return [[(s * truth + torch.randn(8, 4, generator=generator), labels) for _ in range(12)] for s in strengths]


def test_a_gain_that_accuracy_is_too_coarse_to_show_is_taken() -> None:
    answered = drawn_answers(2, 1.0, 1.0)
    found, scores = few_shot.settle([part("0"), part("1")], answered, SETTING)
    usual = [float((logits.argmax(1) == labels).double().mean()) for logits, labels in answered[0]]
    assert np.mean(scores) > np.mean(usual)
    assert choose([usual, scores]) == 0
    assert [member.transform.parts for member in found.blend] == ["0", "1"]


def test_a_gain_in_likelihood_that_may_be_chance_is_not_taken() -> None:
    """Of these three draws the labels are a little likelier under the blend, by less than a standard error."""
    for seed in (2, 4, 9):
        answered = drawn_answers(seed, 1.0, 0.2)
        both = [(torch.stack([a, b]).double(), labels) for (a, labels), (b, _) in zip(*answered, strict=True)]
        lost = [0.0, 0.0]
        for half in (0, 1):  # answered with the weights, or the temperature, of the other half
            weights = torch.tensor(fitted_weights(both[1 - half :: 2]), dtype=torch.float64)
            blend = [(torch.tensordot(weights, logits, 1), labels) for logits, labels in both[half::2]]
            lost[0] += likelihood_loss(answered[0][half::2], fitted_temperature(answered[0][1 - half :: 2]))
            lost[1] += likelihood_loss(blend, 1.0)
        assert lost[1] < lost[0]
        found, _ = few_shot.settle([part("0"), part("1")], answered, SETTING)
        assert found == replace(part("0"), temperature=fitted_temperature(answered[0]))


def test_a_trial_that_answers_as_another_does_is_in_no_blend() -> None:
    fitting, _ = parts_task()
    runs = [part("0"), part("1"), replace(part("1"), transform=TransformConfig(parts="1", whitening=None)), part("0")]
    found, scores = settled(fitting, runs, range(6))  # without normals nothing is whitened
    assert (found, scores) == settled(fitting, runs[:2], range(6))
    assert len(found.blend) == 2


def test_finalists_that_fail_take_no_part() -> None:
    fitting, _ = parts_task()
    broken = part("1", "hypdfs")
    broken = replace(broken, method=replace(broken.method, contrast_temperature=1e-310))
    runs = [broken, part("0", "hypdfs"), part("0+1", "hypdfs")]
    sides = seen(fitting, *runs)
    with pytest.raises(NumericsError):
        few_shot.answers(broken, sides[0], SETTING, range(4))
    answered = [few_shot.answers(run, side, SETTING, range(4)) for run, side in zip(runs[1:], sides[1:], strict=True)]
    found, scores = few_shot.settle(runs, [None, *answered], SETTING)
    assert np.mean(scores) > 0.5
    assert all(member.method == runs[1].method for member in found.blend or (found,))
    assert few_shot.settle([broken], [None], SETTING) == (broken, [0.0])
