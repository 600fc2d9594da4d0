"""Scores from Ray tasks are those of plain calls, whatever runs where and when."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.config import override
from hypdefect.distributed import tournament
from hypdefect.distributed.evaluate import CHUNK, calibrate, compare, evaluate, validate
from hypdefect.distributed.tournament import EvaluateConfig, evaluate_methods
from hypdefect.errors import NumericsError
from hypdefect.evaluation import TWIN, Entrant, RunConfig, Score, Scored
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.features.imported import import_features
from hypdefect.metrics import calibration_error, chance_calibration_error
from hypdefect.results import ledger
from hypdefect.types import VIEWS
from tests.ray.search_script import BASE, SETTING, make_task
from tune_spaces import get_space

pytestmark = pytest.mark.ray
CONFIGS = {
    "curved": override(BASE, {"method.curvature": 0.5, "transform.whitening": 0.1}),
    "flat": override(BASE, {"method.curvature": 0.0}),
    "prototype": RunConfig(name="prototype", support_copies=0),
}
TIMES = {"fit_seconds", "predict_seconds"}


Task = tuple[Fitting, Reported]


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


@pytest.fixture(scope="module")
def start(task: Task) -> dict[str, torch.Tensor]:
    """Weights other than those a fit starts from on its own."""
    model: Any = BASE.model(task[0].dim)
    generator = torch.Generator().manual_seed(5)
    return {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in model.trained().items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in a worker: the number of threads changes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sides(task: Task, config: RunConfig, meta: MetaStart | None = None) -> Task:
    transform = few_shot.transform_of(config, task[0], meta)
    return few_shot.transformed(task[0], transform), few_shot.transformed(task[1], transform)


def setting_of(k_shot: int) -> Setting:
    return Setting(k_shot=k_shot, seed=2)


def in_process(task: Task, config: RunConfig, k_shot: int, number: int, meta: MetaStart | None = None) -> Score:
    return few_shot.score(config, *sides(task, config, meta), setting_of(k_shot), number, meta)


def assert_same(found: Score, expected: Score) -> None:
    assert found.number == expected.number
    assert found.image_ids == expected.image_ids
    for name in ("probabilities", "predicted", "confusion"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.metrics.keys() == expected.metrics.keys()
    for metric in found.metrics.keys() - TIMES:
        assert found.metrics[metric] == expected.metrics[metric]


def test_draws_are_those_of_plain_calls_in_any_order(
    ray_local: Any, task: Task, start: dict[str, torch.Tensor]
) -> None:
    steps: list[tuple[int, int]] = []
    meta = MetaStart(method="hypdfs", projection={}, core=start)
    configs = CONFIGS | {"flat": replace(CONFIGS["flat"], pretrained=False)}
    settings = setting_of(3), CHUNK + 2
    scores = evaluate(*task, configs, *settings, start=meta, progress=lambda *step: steps.append(step))
    again = evaluate(*task, dict(reversed(configs.items())), *settings, start=meta)
    assert steps == [(i, 6) for i in range(1, 7)]
    assert list(scores) == list(configs)
    for name, own in scores.items():
        assert len(own) == CHUNK + 2
        for number in (6, 0, 3):
            expected = in_process(task, configs[name], 3, number, meta)
            assert expected.image_ids == tuple(task[1].queries.image_ids)
            assert_same(own[number], expected)
            assert_same(again[name][number], expected)
    scratch = in_process(task, CONFIGS["curved"], 3, 0)
    assert not np.array_equal(scores["curved"][0].probabilities, scratch.probabilities)
    assert len({s.metrics["acc"] for own in scores.values() for s in own}) > 2  # draws and methods differ


def test_metrics_of_a_draw_agree_with_its_predictions(task: Task) -> None:
    score = in_process(task, CONFIGS["prototype"], 3, 0)
    assert score.predicted is not None
    assert score.probabilities is not None
    assert score.confusion is not None
    truth = task[1].queries.labels
    assert score.metrics.keys() == {"acc", "balanced_acc", "macro_f1", "ece", "ece_by_chance", *TIMES}
    assert score.metrics["acc"] == (score.predicted == truth).mean() == score.confusion.trace() / len(truth)
    for label in range(4):
        assert score.confusion[label].tolist() == np.bincount(score.predicted[truth == label], minlength=4).tolist()
    confidence = score.probabilities.max(1)
    assert score.metrics["ece"] == calibration_error(confidence, score.predicted == truth)
    assert score.metrics["ece_by_chance"] == pytest.approx(chance_calibration_error(confidence), rel=1e-4)


def entrants() -> list[Entrant]:
    """The second candidate of the first diverges, that of the next makes no label likelier, that of the third does."""
    broken = override(CONFIGS["curved"], {"method.contrast_temperature": 1e-310})
    cosine = CONFIGS["prototype"]
    return [
        Entrant(candidates=(CONFIGS["curved"], broken)),
        Entrant(candidates=(cosine, override(cosine, {"transform.centring": "supports"}))),
        Entrant(candidates=(cosine, replace(cosine, support_copies=2)), variant="copies"),
        Entrant(candidates=(override(CONFIGS["curved"], {"method.adapter": False}),), variant="no adapter"),
    ]


def test_members_of_a_blend_see_their_own_features(ray_local: Any, task: Task) -> None:
    cosine = CONFIGS["prototype"]
    parts = [override(cosine, {"transform.parts": number}) for number in ("0", "1")]
    tried = [Entrant(candidates=(parts[0], parts[1], replace(cosine, support_copies=2)))]
    (scored,) = compare(*task, tried, {3: setting_of(3)}, 2, episodes=6)
    assert len({member.transform for member in scored.config.blend}) > 1
    for number, draw in enumerate(scored.draws):
        assert_same(draw, in_process(task, scored.config, 3, number))


def compared(task: Task, **changes: Any) -> list[Scored]:
    settings = {k: setting_of(k) for k in (1, 3)}
    return compare(*task, entrants(), settings, 2, **{"episodes": 6} | changes)


def test_every_entrant_is_tuned_on_the_same_episodes_of_the_pool(
    ray_local: Any, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("hypdefect.distributed.evaluate.EPISODES", 4)
    found = compared(task, progress=lambda *step: steps.append(step))
    names = ["", TWIN, "", "copies", "no adapter"]
    assert [(s.k_shot, s.variant) for s in found] == [(k, name) for k in (1, 3) for name in names]
    assert steps == [(i, 2 * (2 * 7 + 1 + 5)) for i in range(1, 41)]  # trials, the twin's temperature, chunks of draws
    for k_shot, own in ((1, found[:5]), (3, found[5:])):
        setting = setting_of(k_shot)
        for entrant, scored in zip(entrants(), (own[0], *own[2:]), strict=True):
            answered: list[Any] = []
            for config in entrant.candidates:
                try:
                    answered.append(few_shot.answers(config, sides(task, config)[0], setting, range(6)))
                except NumericsError:
                    answered.append(None)
            config, scores = few_shot.settle(entrant.candidates, answered, setting)
            assert scored.config == config
            assert scored.validation == np.mean(scores)
            assert scored.seconds > 0
            if entrant.variant == "copies":  # a gain beyond one standard error
                assert [member.support_copies for member in config.blend] == [2, 0]
                continue
            usual = entrant.candidates[0]
            assert config == few_shot.calibrated(usual, sides(task, usual)[0], setting, range(6))
            assert replace(config, temperature=1.0) == usual != config
        curved, twin, *_ = own
        seen, _ = sides(task, curved.config)
        flat = few_shot.twin(curved.config, seen)
        assert flat is not None
        assert twin.config == few_shot.calibrated(flat, seen, setting, range(6))
        assert twin.config.temperature != curved.config.temperature
        assert math.isnan(twin.validation)
    for scored in found:
        for number, draw in enumerate(scored.draws):
            assert_same(draw, in_process(task, scored.config, scored.k_shot, number))


def test_the_query_side_decides_nothing(ray_local: Any, task: Task) -> None:
    """The leak test: with shuffled query labels every choice and every prediction stays."""
    fitting, reported = task
    labels = np.random.default_rng(0).permutation(reported.queries.labels)
    honest = compared(task)
    leaky = compared((fitting, Reported(queries=replace(reported.queries, labels=labels))))
    moved = 0
    for a, b in zip(honest, leaky, strict=True):
        assert (a.config, a.variant) == (b.config, b.variant)
        for x, y in zip(a.draws, b.draws, strict=True):
            np.testing.assert_array_equal(x.probabilities, y.probabilities)
            moved += x.metrics["acc"] != y.metrics["acc"]
    assert moved


def test_without_episodes_the_first_candidate_is_taken_as_it_is(ray_local: Any, task: Task) -> None:
    found = compared(task, episodes=0, twins=False)
    assert [s.config for s in found] == 2 * [e.candidates[0] for e in entrants()]
    assert all(math.isnan(s.validation) for s in found)


def test_meta_trained_features_are_projected_and_hypdfs_starts_from_its_weights(ray_local: Any, task: Task) -> None:
    generator = torch.Generator().manual_seed(3)
    narrow = 5
    projection = {view: torch.randn(task[0].dim, narrow, generator=generator) for view in VIEWS}
    curved = replace(CONFIGS["curved"], features="meta")
    core = curved.model(narrow).trained()
    core = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in core.items()}
    mean = {view: torch.randn(task[0].dim, generator=generator) / 10 for view in VIEWS}
    meta = MetaStart(method="hypdfs", projection=projection, core=core, mean=mean)
    configs = [CONFIGS["prototype"], replace(CONFIGS["prototype"], features="meta"), curved]
    configs += [replace(curved, pretrained=False)]
    chosen = [Entrant(candidates=(config,), variant=str(i)) for i, config in enumerate(configs)]
    found = compare(*task, chosen, {3: setting_of(3)}, 2, episodes=3, start=meta)
    for config, scored in zip(configs, found, strict=True):
        seen, _ = sides(task, config, meta)
        assert seen.dim == (narrow if config.features == "meta" else task[0].dim)
        scores = few_shot.validation_scores(config, seen, setting_of(3), range(3), meta)
        assert scored.validation == np.mean(list(scores))
        assert scored.config == few_shot.calibrated(config, seen, setting_of(3), range(3), meta)
        assert_same(scored.draws[1], in_process(task, scored.config, 3, 1, meta))
    first = [s.draws[0].probabilities for s in found]
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[2], first[3])


def test_a_configuration_that_is_chosen_twice_is_fitted_once(ray_local: Any, task: Task) -> None:
    own = Entrant(candidates=(CONFIGS["curved"],))
    curve = Entrant(candidates=(CONFIGS["curved"],), variant="c = 0.5")
    other = Entrant(candidates=(CONFIGS["prototype"],))
    steps: list[tuple[int, int]] = []
    settings = {k: setting_of(k) for k in (1, 3)}
    found = compare(
        *task, [own, curve, other], settings, 2, episodes=0, twins=False, progress=lambda *step: steps.append(step)
    )
    at = {(one.config.name, one.variant, one.k_shot): one for one in found}
    for k_shot in settings:
        first, second = at["hypdfs", "", k_shot], at["hypdfs", "c = 0.5", k_shot]
        assert all(x is y for x, y in zip(first.draws, second.draws, strict=True))
        assert_same(at["prototype", "", k_shot].draws[1], in_process(task, CONFIGS["prototype"], k_shot, 1))
    assert steps[-1] == (4, 4)


def test_validation_is_that_of_plain_calls(ray_local: Any, task: Task, start: dict[str, torch.Tensor]) -> None:
    configs = [CONFIGS["flat"], CONFIGS["curved"], override(CONFIGS["curved"], {"pretrained": False})]
    meta = MetaStart(method="hypdfs", projection={}, core=start)
    found = validate(task[0], configs, SETTING, range(5, 9), meta)
    for config, own in zip(configs, found, strict=True):
        seen, _ = sides(task, config)
        assert own == list(few_shot.validation_scores(config, seen, SETTING, range(5, 9), meta))
        # an episode is the same alone
        assert own[2:3] == validate(task[0], [config], SETTING, range(7, 8), meta)[0]


def test_a_numerical_failure_counts_as_zero_and_has_no_temperature(ray_local: Any, task: Task) -> None:
    broken = override(BASE, {"method.contrast_temperature": 1e-310})
    assert calibrate(task[0], [broken], SETTING, range(3)) == [broken]
    scores = validate(task[0], [broken, CONFIGS["prototype"]], SETTING, range(3))
    assert scores[0] == [0.0] * 3
    assert min(scores[1]) > 0


def test_a_comparison_that_was_killed_goes_on_with_the_partitions_that_are_missing(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    labels = np.repeat(["a", "b"], 20)
    features = np.random.default_rng(0).normal(size=(40, 6)) + (labels == "b")[:, None]
    np.savez(tmp_path / "killed.npz", features=features, labels=labels)
    import_features([tmp_path / "killed.npz"], tmp_path)
    monkeypatch.setattr(ledger, "commit", lambda: "0" * 40)
    settings: dict[str, Any] = {"dataset": "imported:killed", "methods": ("prototype",), "features": "plain"}
    job = EvaluateConfig(**settings, shots=(1,), partitions=3, draws=2, trials=1, episodes=2)
    scored: list[int] = []

    def counted(*args: Any, **options: Any) -> list[Scored]:
        scored.append(1)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return compare(*args, **options)

    monkeypatch.setattr(tournament, "compare", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_methods(job, get_space)
    assert not ledger.read(tmp_path).num_rows
    other = evaluate_methods(replace(job, draws=3, partitions=1), get_space)
    assert len(scored) == 3  # another job takes nothing up
    found = evaluate_methods(job, get_space)
    assert len(scored) == 5
    whole = evaluate_methods(job, get_space)  # nothing is left to take up
    assert len(scored) == 8
    tables = [ledger.read_part(done.part) for done in (found, whole)]
    assert other.run["run_id"] != found.run["run_id"]
    for done, table in zip((found, whole), tables, strict=True):
        assert set(table["run_id"].to_pylist()) == {done.run["run_id"]}
        assert set(ledger.read_part(done.ceiling)["partition"].to_pylist()) == {0, 1, 2}
    columns = ["method", "variant", "partition", "draw", "confusion"]
    assert tables[0].select(columns).equals(tables[1].select(columns))
    assert not list((tmp_path / "unfinished").iterdir())
