"""The search with Ray Tune and Optuna: what it records, what it survives, and what it never sees."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

import hypdefect
import tune_spaces
from hypdefect.config import override, to_mapping
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.evaluate import validate
from hypdefect.distributed.sweep import Choice, named, running, select, sweep
from hypdefect.distributed.tune import SearchConfig, default_point, finished, search, storage
from hypdefect.errors import ConfigError, HypdefectError
from hypdefect.evaluation import RunConfig, TrialResult, with_parts
from hypdefect.families import few_shot, get_family
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.imported import import_features
from hypdefect.files import write_json
from hypdefect.predictor import Predictor
from hypdefect.types import VIEWS
from jobs.sweep import SweepJob
from tests.ray.search_script import BASE, NAME, SETTING, as_space, make_task, small_space
from tests.tiny_dataset import make_folder_tree

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
REPOSITORY = Path(hypdefect.__file__).parents[1]
SPACES = sorted(p.stem for p in Path(tune_spaces.__file__).parent.glob("[a-z]*.py"))
SMALL_SPACE = as_space(small_space)
SMALL_RECIPE = RecipeConfig(whole_size=64, window=48, crop_size=64)


@pytest.fixture(scope="module")
def task() -> tuple[Fitting, Reported]:
    return make_task()


@pytest.fixture(scope="module")
def data(task: tuple[Fitting, Reported]) -> Fitting:
    return task[0]


def study_of(folder: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name=NAME, storage=storage(folder / "study.db")).get_trials()


def run(
    folder: Path,
    data: Fitting,
    space: ModuleType = SMALL_SPACE,
    base: RunConfig = BASE,
    setting: Setting = SETTING,
    notify: Any = None,
    start: MetaStart | None = None,
    **settings: int,
) -> list[TrialResult]:
    """A search on one actor: a second one would import everything again."""
    config = SearchConfig(**{"trials": 6, "episodes": 4, "rungs": 1, "concurrency": 1, **settings})
    return search(space, data, base, setting, config, name=NAME, folder=folder, start=start, notify=notify)


@dataclass(frozen=True)
class Searched:
    folder: Path
    results: list[TrialResult]
    seen: list[tuple[int, float]]

    @property
    def rows(self) -> list[Any]:
        return [(r.number, r.params, r.value, r.rungs) for r in self.results]


def search_alone(data: Fitting, folder: Path) -> Searched:
    """One trial at a time, which makes a search repeatable."""
    seen: list[tuple[int, float]] = []
    results = run(folder, data, notify=lambda n, v: seen.append((n, v)), trials=6, episodes=4)
    return Searched(folder, results, seen)


@pytest.fixture(scope="module")
def searched(ray_local: Any, data: Fitting, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return search_alone(data, tmp_path_factory.mktemp("search"))


def test_exactly_the_trials_asked_for_the_defaults_first(searched: Searched, data: Fitting) -> None:
    trials, results = study_of(searched.folder), searched.results
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 6
    assert trials[0].params == default_point(SMALL_SPACE, BASE)
    assert override(BASE, trials[0].params) == BASE
    assert sorted(r.number for r in results) == list(range(6))
    assert [r.value for r in results] == sorted((t.value for t in trials), reverse=True)
    assert [n for n, _ in searched.seen] == [1, 2, 3, 4, 5, 6]
    assert sorted(v for _, v in searched.seen) == sorted(t.value for t in trials)
    assert [r.rungs for r in results] == [1] * 6  # none was stopped early: each may become a finalist
    assert results == finished(searched.folder / "study.db", NAME, 1)
    assert run(searched.folder, data) == results  # nothing is left to do


def test_values_are_those_of_the_same_episodes_in_process(searched: Searched, data: Fitting) -> None:
    for result in searched.results:
        config = override(BASE, result.params)
        seen = few_shot.transformed(data, few_shot.transform_of(config, data))
        scores = list(few_shot.validation_scores(config, seen, SETTING, range(4)))
        assert result.value == pytest.approx(float(np.mean(scores)), abs=1e-12)


def test_early_stopping_is_recorded_and_full_trials_come_first(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    results = run(tmp_path, data, trials=12, episodes=9, rungs=3)
    rungs = [r.rungs for r in results]
    assert len(rungs) == 12
    assert max(rungs) == 3
    assert min(rungs) < 3, "ASHA stopped no trial"
    assert rungs == sorted(rungs, reverse=True)
    for _, group in itertools.groupby(results, key=lambda r: r.rungs):
        values = [r.value for r in group]
        assert values == sorted(values, reverse=True)


def exploding_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("method.contrast_temperature", [0.3, 1e-310])


def test_a_numerical_failure_scores_zero(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    base = override(BASE, {"method.steps": 8})
    results = run(tmp_path, data, as_space(exploding_space), base, trials=8, episodes=4, rungs=2)
    assert len(results) == 8
    exploded = [r for r in results if r.params["method.contrast_temperature"] == 1e-310]
    assert exploded
    assert [r.value for r in exploded] == [0.0] * len(exploded)
    assert all(r.value > 0 for r in results if r.params["method.contrast_temperature"] == 0.3)


@pytest.mark.slow
def test_where_every_trial_fails_the_reason_is_one_line(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    with pytest.raises(HypdefectError, match="class 'crack' has 12 images") as caught:
        run(tmp_path, data, setting=Setting(k_shot=12), trials=2)
    assert "\n" not in str(caught.value)
    assert f"every trial of {NAME} failed" in str(caught.value)
    assert [t.state for t in study_of(tmp_path)] == [TrialState.FAIL] * 2


def half_impossible_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("transform.parts", [None, "7"])


def test_trials_that_fail_are_said(
    ray_local: Any, data: Fitting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space = as_space(half_impossible_space)
    space.FIRST = [{"transform.parts": "7"}]
    assert [r.number for r in run(tmp_path, data, space, trials=2)] == [0]
    assert f"1 of 2 trials of {NAME} failed; first: " in caplog.text
    assert "these features have" in caplog.text


def unknown_space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.curvatur", 0.1, 1.0)


def test_a_space_of_an_unknown_field_is_refused(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'method\.curvatur', which is no field"):
        run(tmp_path, data, as_space(unknown_space))


# --- selection never sees a query --------------------------------------------------------------------------------


def selected(data: Fitting, trials: list[TrialResult]) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a sweep chooses and publishes."""
    job = SweepJob(k_shot=SETTING.k_shot, episodes=4, finalists=3, rungs=1)
    references = [RunConfig(name="prototype", method={"metric": metric}) for metric in ("cosine", "euclidean")]
    choice = select(job, get_family("hypdfs"), data, NO_FIRST, BASE, trials, references, None)
    seen = few_shot.transformed(data, few_shot.transform_of(choice.run, data))
    model = few_shot.fit(choice.run, seen, few_shot.setting(job), 0)
    return ([trial.number for trial in choice.trials], choice.run, choice.reference), model.export()


@pytest.mark.slow
def test_a_search_and_a_selection_repeat_themselves(searched: Searched, data: Fitting, tmp_path: Path) -> None:
    """They are handed what may be looked at and nothing else: no query can change them."""
    again = search_alone(data, tmp_path)
    assert again.rows == searched.rows
    chosen, tensors = selected(data, searched.results)
    chosen_2, tensors_2 = selected(data, again.results)
    assert chosen_2 == chosen
    assert tensors_2.keys() == tensors.keys()
    assert all(torch.equal(tensors_2[name], value) for name, value in tensors.items())


def trial(number: int, value: float, rungs: int = 2, **params: Any) -> TrialResult:
    point = {"support_copies": 0, "transform.whitening": 3.0, "transform.parts": None} | params
    return TrialResult(number, point, value, rungs, 1.0)


NO_FIRST = as_space(lambda trial: None, "prototype")
POINTS: list[dict[str, Any]] = [{"transform.parts": "1"}, {"transform.whitening": 0.1}]


def test_a_sweep_leaves_the_defaults_for_a_gain_on_fresh_episodes_alone(ray_local: Any, data: Fitting) -> None:
    """Whitening that led in the search gains nothing there; copies do, beside the part alone."""
    base, setting, fresh = RunConfig(name="prototype", support_copies=0), SETTING, range(4, 8)
    defaults, whitened = trial(0, 0.5), trial(1, 0.99, **{"transform.whitening": 1.0})
    part, copies = trial(2, 0.7, **{"transform.parts": "1"}), trial(3, 0.6, support_copies=2)
    job = SweepJob(k_shot=SETTING.k_shot, episodes=4, finalists=2, rungs=2)
    seen = few_shot.transformed(data, few_shot.transform_of(base, data))

    def chosen(*trials: TrialResult) -> Choice:
        return select(job, get_family("prototype"), data, NO_FIRST, base, list(trials), [base], None)

    ours, other = validate(data, [base, override(base, whitened.params)], setting, fresh)
    assert np.mean(other) < np.mean(ours)
    kept = chosen(whitened, defaults)
    assert kept.trials == (defaults,)
    assert kept.run == kept.reference == few_shot.calibrated(base, seen, setting, fresh) != base
    assert kept.twin is None
    found = chosen(part, copies, replace(part, number=9), defaults)  # the same point again takes no place
    assert found.trials == (copies, part)
    assert [(m.support_copies, m.transform.parts) for m in found.run.blend] == [(2, None), (0, "1")]
    runs = [override(base, t.params) for t in (defaults, part, copies)]
    answered = [
        few_shot.answers(r, few_shot.transformed(data, few_shot.transform_of(r, data)), setting, fresh) for r in runs
    ]
    assert found.run == few_shot.settle(runs, answered, setting)[0]
    # one that was stopped early is no finalist; the defaults always are
    assert chosen(replace(defaults, rungs=1), replace(part, rungs=1), replace(copies, rungs=1)).trials[0].number == 0
    with pytest.raises(HypdefectError, match="the trial of the defaults did not finish"):
        chosen(part, copies)


def test_what_a_search_tries_first_belongs_to_the_blend_though_it_was_stopped_early(
    ray_local: Any, data: Fitting
) -> None:
    base = RunConfig(name="prototype", support_copies=0)
    job = SweepJob(k_shot=SETTING.k_shot, episodes=4, finalists=1, rungs=2)
    defaults, copies = trial(0, 0.5), trial(3, 0.6, support_copies=2)
    part, whitened = (trial(n, 0.1, rungs=1, **point) for n, point in enumerate(POINTS, 1))

    def taken(*first: dict[str, Any]) -> list[int]:
        space = as_space(informative_space, "prototype")
        space.FIRST = list(first)
        trials = [copies, defaults, whitened, part]
        choice = select(job, get_family("prototype"), data, space, base, trials, [base], None)
        return [t.number for t in choice.trials]

    assert taken(*POINTS)[:2] == [3, 1]
    assert 1 not in taken(POINTS[1])


def test_references_are_settled_as_trials_are(ray_local: Any, data: Fitting) -> None:
    base = RunConfig(name="prototype", support_copies=0)
    job = SweepJob(k_shot=SETTING.k_shot, episodes=4, rungs=1)
    references = [base, override(base, {"transform.parts": "1"}), replace(base, support_copies=2)]
    choice = select(job, get_family("prototype"), data, NO_FIRST, base, [trial(0, 0.5)], references, None)
    answered = [
        few_shot.answers(r, few_shot.transformed(data, few_shot.transform_of(r, data)), SETTING, range(4, 8))
        for r in references
    ]
    assert choice.reference == few_shot.settle(references, answered, SETTING)[0]
    assert choice.reference.blend


def test_the_twin_of_a_sweep_has_a_temperature_of_its_own(ray_local: Any, data: Fitting) -> None:
    job = SweepJob(k_shot=SETTING.k_shot, episodes=3, rungs=1)
    only = TrialResult(0, {"support_copies": None}, 0.5, 1, 1.0)
    choice = select(job, get_family("hypdfs"), data, NO_FIRST, BASE, [only], [RunConfig(name="prototype")], None)
    seen = few_shot.transformed(data, few_shot.transform_of(BASE, data))
    flat = few_shot.twin(BASE, seen)
    assert flat is not None
    assert choice.twin == few_shot.calibrated(flat, seen, SETTING, range(3, 6))
    assert len({1.0, choice.run.temperature, choice.twin.temperature}) == 3


def test_what_may_be_looked_at_holds_no_query(task: tuple[Fitting, Reported]) -> None:
    fitting, reported = task
    assert {f.name for f in fields(Fitting)} == {"pool", "normals", "block_dims", "shape_dims", "uri_of", "widths"}
    held = {*fitting.pool.image_ids.tolist(), *fitting.pool.table.image_ids.tolist()}
    assert held.isdisjoint(reported.queries.image_ids.tolist())


def meta_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("features", ["plain", "meta"])


def test_a_search_uses_what_was_learned(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    """Trials on meta-trained features see the projection: a projection to noise costs accuracy."""
    generator = torch.Generator().manual_seed(0)
    views = {view: torch.randn(data.dim, 1, generator=generator) for view in VIEWS}
    start = MetaStart("hypdfs", projection=views, core={}, mean={view: torch.zeros(data.dim) for view in VIEWS})
    base = RunConfig(name="prototype", method={}, support_copies=0)
    results = run(tmp_path, data, as_space(meta_space, "prototype"), base, trials=4, episodes=6, start=start)
    values = {r.params["features"]: r.value for r in results}
    assert set(values) == {"plain", "meta"}
    assert values["meta"] < values["plain"] - 0.1


# --- a killed driver ---------------------------------------------------------------------------------------------


def complete(folder: Path) -> dict[int, tuple[dict[str, Any], float | None, Any]]:
    try:
        trials = study_of(folder)
    except KeyError:  # the study is not there yet
        return {}
    return {t.number: (t.params, t.value, t.datetime_complete) for t in trials if t.state is TrialState.COMPLETE}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def start_script(folder: Path, trials: int, env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ray.search_script", str(folder), str(trials)],
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_continues_with_what_is_missing(
    ray_local: Any, data: Fitting, tmp_path: Path, private_env: dict[str, str]
) -> None:
    with start_script(tmp_path, 200, private_env) as process:
        wait_for(lambda: len(complete(tmp_path)) >= 3 or process.poll() is not None, "three trials")
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
    before = complete(tmp_path)
    total = len(before) + 6
    run(tmp_path, data, trials=total, episodes=8, rungs=2)
    after = complete(tmp_path)
    assert len(after) == total
    assert {number: after[number] for number in before} == before
    new = [params for number, (params, _, _) in after.items() if number not in before]
    assert not [params for params in new if params in [known for known, _, _ in before.values()]]
    assert {t.state for t in study_of(tmp_path)} <= {TrialState.COMPLETE, TrialState.FAIL}


@pytest.mark.slow
def test_the_defaults_are_tried_though_a_kill_came_first(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    """The driver died before the default point had finished, or even before it was handed out."""
    for state in (TrialState.RUNNING, TrialState.WAITING):
        folder = tmp_path / state.name
        study = optuna.create_study(study_name=NAME, storage=storage(folder / "study.db"), direction="maximize")
        study.enqueue_trial(default_point(SMALL_SPACE, BASE))
        if state is TrialState.RUNNING:
            small_space(study.ask())
        results = run(folder, data, trials=2)
        assert len(results) == 2
        assert [r.params for r in results].count(default_point(SMALL_SPACE, BASE)) == 1


def test_what_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest unfinished sweep that does not run and was started with the settings that are given."""
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    sweeps = tmp_path / "sweeps"
    asked = SweepJob(dataset="folder", resume=True)
    for started, (name, changes) in enumerate({"a": {"k_shot": 1}, "b": {"root": Path("/b")}, "c": {}}.items()):
        job = named(SweepJob(dataset="folder", name=name, trials=30, workers=2, **changes))
        write_json(sweeps / name / "sweep.json", {"job": to_mapping(job), "finished": False, "started": started})
    found = named(asked)
    assert (found.name, found.trials, found.workers, found.resume) == ("c", 30, 2, True)
    assert named(replace(asked, trials=40, workers=1)) == replace(found, trials=40, workers=1)
    assert named(replace(asked, root=Path("/b"))).name == "b"
    assert named(replace(asked, name="a")).k_shot == 1
    with running(sweeps / "c"):
        assert named(asked).name == "b"
        with pytest.raises(ConfigError, match="'c' still runs"):
            named(replace(asked, name="c"))
        with pytest.raises(ConfigError, match="'c' still runs"), running(sweeps / "c"):
            pass
    with pytest.raises(ConfigError, match="'a' was started with other settings than these of --k-shot: leave them out"):
        named(replace(asked, name="a", k_shot=3))
    with pytest.raises(ConfigError, match=r"no unfinished sweep of 'folder' .*; b was started with other settings"):
        named(replace(asked, k_shot=3))


def test_a_sweep_varies_nothing_that_changes_nothing(ray_local: Any, hypdefect_home: Path, tmp_path: Path) -> None:
    """Imported features have no normals, by which whitening is fitted, no shape of a region, and here no copies."""
    labels = np.repeat(["a", "b"], 20)
    features = np.random.default_rng(0).normal(size=(40, 6)) + (labels == "b")[:, None]
    np.savez(tmp_path / "plain.npz", features=features, labels=labels)
    import_features([tmp_path / "plain.npz"], hypdefect_home)
    settings = {"trials": 3, "episodes": 2, "rungs": 1, "finalists": 1, "draws": 2, "workers": 1}
    job = SweepJob(dataset="imported:plain", space="prototype", k_shot=1, name="plain", **settings)
    result = sweep(named(job), tune_spaces.get_space("prototype"), RunConfig(name="prototype"))
    assert [set(trial.params) for trial in result.trials] == [{"method.metric"}] * 3


@pytest.mark.slow
def test_what_is_published_may_learn_from_all_that_is_labelled(
    ray_local: Any, hypdefect_home: Path, tmp_path: Path
) -> None:
    tree = make_folder_tree(tmp_path / "own", classes=2, per_class=6, with_good=False)
    next((tree / "dent").glob("*.png")).unlink()
    settings: dict[str, Any] = {"trials": 2, "episodes": 2, "rungs": 1, "finalists": 1, "draws": 2, "workers": 1}
    settings |= {"dataset": "folder", "root": tree, "backbone": "tiny_random", "recipe": SMALL_RECIPE}
    job = named(SweepJob(**settings, space="prototype", k_shot=1, name="all", publish_shots=100))
    result = sweep(job, tune_spaces.get_space("prototype"), RunConfig(name="prototype"))
    assert result.entry is not None
    predictor = Predictor.load(result.entry)
    about = predictor.card.provenance
    assert len(set(about["fitted_on"])) == 10  # the smallest class has five images
    assert set(about["fitted_on"]) & set(result.plan.partition.query)
    assert "test/episode/acc_of_this_fit" not in about["metrics"]  # no image is left to measure it on
    plan, setting = few_shot.after_the_test(result.plan, few_shot.setting(job), 100)
    fitting, _ = few_shot.load(plan, hypdefect_home)
    run = replace(result.choice.run, support_copies=result.choice.run.copies(1))  # as many as were validated
    expected = few_shot.fit(run, few_shot.transformed(fitting, predictor.transform), setting, 0).export()
    assert predictor.model.export().keys() == expected.keys()
    for name, value in predictor.model.export().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
def test_a_ray_that_does_not_start_is_one_line(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    for name in ("HYPDEFECT_DATA", "HYPDEFECT_HOME"):  # which `connected` makes absolute
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    message = f"no Ray cluster answers at RAY_ADDRESS={address}" if address else "Ray did not start on this machine"
    with pytest.raises(HypdefectError, match=f"{message}: The current node timed out"), connected():
        pass


# --- cost and spaces ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_are_packed(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    space = importlib.import_module("tune_spaces.prototype")
    run(tmp_path, data, space, RunConfig(name=space.METHOD), trials=24, episodes=1)
    logs = [json.loads(path.read_text().splitlines()[-1]) for path in tmp_path.rglob("result.json")]
    assert len(logs) == 24
    assert len({log["pid"] for log in logs}) == 1  # one actor ran them all: starting one a trial takes seconds


def informative_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("support_copies", [None, 0])


def test_a_search_over_parts_finds_the_one_that_counts(ray_local: Any, data: Fitting, tmp_path: Path) -> None:
    """The first block is made noise; the second still tells the classes apart."""
    rng = np.random.default_rng(5)
    noise = {
        view: np.concatenate([rng.normal(size=(len(x), 4)), x[:, 4:]], 1).astype(np.float32)
        for view, x in data.pool.table.views.items()
    }
    pool = replace(data.pool, table=replace(data.pool.table, views=noise))
    space = with_parts(as_space(informative_space, "prototype"), 2)
    searched = replace(data, pool=pool, normals=None)
    results = run(tmp_path, searched, space, RunConfig(name="prototype"), trials=6, episodes=12)
    by_point = {(r.params["transform.parts"], r.params["transform.centring"]): r.value for r in results}
    assert by_point.keys() >= {(None, "none"), ("0", "supports"), ("1", "supports"), ("0", "none"), ("1", "none")}
    assert results[0].params["transform.parts"] == "1"
    assert results[0].value > max(by_point[None, "none"], by_point["0", "supports"])


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("name", SPACES)
def test_every_point_of_a_space_is_a_configuration(name: str, num_parts: int) -> None:
    space = with_parts(importlib.import_module(f"tune_spaces.{name}"), num_parts)
    base = RunConfig(name=space.METHOD)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first = default_point(space, base)
    points = [first | changes for changes in ({}, *getattr(space, "FIRST", ()))]
    for point in points:
        study.enqueue_trial(point)
    for number in range(len(points) + 25):
        trial = study.ask()
        space.space(trial)
        assert trial.params.keys() == first.keys()
        if number < len(points):
            assert trial.params == points[number]
        config = override(base, trial.params)
        assert config.name == space.METHOD
        assert number or config == base
