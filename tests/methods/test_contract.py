"""What every few-shot method promises, whatever is inside it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

import tune_spaces
from hypdefect.config import override
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Reported, Setting
from hypdefect.methods import METHODS, build, get_method, methods_of
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.types import FewShotClassifier
from tests.toy_features import DIM, permuted, toy_batch, toy_fitting, toy_pool

VARIANTS: dict[str, dict[str, Any]] = {"hypdfs": {"steps": 8, "adapter_rank": 4, "ode_hidden": 8}}


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


@pytest.fixture(params=sorted(methods_of("few_shot")))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fresh(name: str) -> FewShotClassifier:
    return build(name, get_method(name).config(**VARIANTS.get(name, {})), DIM)


def test_logits_before_adapt_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="needs adapt"):
        fresh(name).logits(toy_batch())
    with pytest.raises(RuntimeError, match="needs adapt"):
        fresh(name).export()


@pytest.mark.parametrize(("n_way", "k_shot"), [(2, 1), (3, 1), (4, 5)])
def test_logits_are_finite_float64_one_row_a_query_one_column_a_class(name: str, n_way: int, k_shot: int) -> None:
    classifier = fresh(name)
    classifier.adapt(toy_batch(n_way, k_shot), n_way)
    for queries in (toy_batch(n_way, 7), toy_batch(n_way, 7).select(torch.tensor([0]))):
        logits = classifier.logits(queries)
        assert logits.shape == (len(queries), n_way)
        assert logits.dtype == torch.float64
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad


def test_a_class_without_support_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"rows per class are \[4, 4, 4, 0\]; every one of 4 classes"):
        fresh(name).adapt(toy_batch(), 4)


def test_the_same_support_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    a, b = fresh(name), fresh(name)
    a.adapt(toy_batch(), 3)
    torch.rand(5)  # whatever else draws numbers
    b.adapt(toy_batch(), 3)
    assert torch.equal(a.logits(toy_batch(k_shot=9)), b.logits(toy_batch(k_shot=9)))
    assert torch.equal(a.logits(toy_batch(k_shot=9)), a.logits(toy_batch(k_shot=9)))


def test_a_second_adapt_starts_afresh(name: str) -> None:
    used, new = fresh(name), fresh(name)
    used.adapt(toy_batch(4, 2, seed=9), 4)
    used.logits(toy_batch())
    for classifier in (used, new):
        classifier.adapt(toy_batch(), 3)
    assert torch.equal(used.logits(toy_batch(k_shot=9)), new.logits(toy_batch(k_shot=9)))


def test_adapt_leaves_the_support_as_it_was(name: str) -> None:
    support = toy_batch()
    before = {view: x.clone() for view, x in support.views.items()}
    fresh(name).adapt(support, 3)
    assert all(torch.equal(support.views[view], x) for view, x in before.items())


def test_an_exported_classifier_is_restored_exactly(name: str, tmp_path: Path) -> None:
    fitted, restored = fresh(name), fresh(name)
    fitted.adapt(toy_batch(), 3)
    save_file({k: v.contiguous() for k, v in fitted.export().items()}, tmp_path / "c.safetensors")
    restored.restore(load_file(tmp_path / "c.safetensors"))
    queries = toy_batch(k_shot=9, seed=4)
    assert torch.equal(restored.logits(queries), fitted.logits(queries))
    assert {k: v.shape for k, v in restored.export().items()} == {k: v.shape for k, v in fitted.export().items()}
    fitted.adapt(toy_batch(seed=8), 3)  # an export is a snapshot of its own
    assert not torch.equal(restored.logits(queries), fitted.logits(queries))


@pytest.mark.parametrize("zeros", [1, 12])
def test_rows_of_zeros_are_no_reason_to_fail(name: str, zeros: int) -> None:
    """As of an imported part that some images, or all of them, lack."""
    support = toy_batch()
    for rows in support.views.values():
        rows[:zeros] = 0
    classifier = fresh(name)
    classifier.adapt(support, 3)
    assert torch.isfinite(classifier.logits(toy_batch(k_shot=9))).all()


def test_a_restored_classifier_has_memory_of_its_own(name: str) -> None:
    """Products with tensors that lie askew in a file's buffer differ in the last bits from those before publishing."""
    fitted, restored = fresh(name), fresh(name)
    fitted.adapt(toy_batch(), 3)
    given = {k: v.clone() for k, v in fitted.export().items()}
    restored.restore(given)
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(restored.logits(toy_batch(k_shot=9)), fitted.logits(toy_batch(k_shot=9)))


@pytest.mark.parametrize("k_shot", [1, 5])
def test_classes_that_lie_apart_are_told_apart(name: str, k_shot: int) -> None:
    pool = toy_pool(n_way=3, per_class=20, spread=0.1)
    support = np.concatenate([np.flatnonzero(pool.labels == label)[:k_shot] for label in range(3)])
    queries = pool.batch(np.setdiff1d(np.arange(60), support))
    classifier = fresh(name)
    classifier.adapt(pool.batch(support), 3)
    assert torch.equal(classifier.logits(queries).argmax(1), queries.labels)


def test_the_order_of_support_rows_changes_next_to_nothing(name: str) -> None:
    a, b = fresh(name), fresh(name)
    a.adapt(toy_batch(k_shot=5), 3)
    b.adapt(permuted(toy_batch(k_shot=5)), 3)
    queries = toy_batch(k_shot=30)
    ours, theirs = a.logits(queries), b.logits(queries)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_query_is_judged_alone(name: str) -> None:
    classifier = fresh(name)
    classifier.adapt(toy_batch(), 3)
    queries = toy_batch(k_shot=9, seed=4)
    rows = torch.tensor([7, 3])
    torch.testing.assert_close(
        classifier.logits(queries.select(rows)), classifier.logits(queries)[rows], rtol=1e-6, atol=1e-6
    )


def test_renumbering_the_classes_renumbers_the_logits_of_methods_without_noise() -> None:
    support, queries = toy_batch(), toy_batch(k_shot=9, seed=4)
    noiseless = [
        (name, {})
        for name, method in METHODS.items()
        if method.family == "few_shot" and "seed" not in {f.name for f in fields(method.config)}
    ]
    hypdfs: list[tuple[str, dict[str, Any]]] = [
        ("hypdfs", {"synthesis": False, "head": head, "steps": steps})
        for head in ("hyperplanes", "centers")
        for steps in (0, 8)
    ]
    assert len(noiseless) > 8
    for name, values in [*noiseless, *hypdfs]:
        a, b = (build(name, get_method(name).config(**values), DIM) for _ in range(2))
        a.adapt(support, 3)
        b.adapt(replace(support, labels=(support.labels + 1) % 3), 3)
        torch.testing.assert_close(b.logits(queries).roll(-1, 1), a.logits(queries), rtol=1e-4, atol=1e-4)


def test_both_views_count(name: str) -> None:
    classifier = fresh(name)
    classifier.adapt(toy_batch(), 3)
    queries = toy_batch(k_shot=9, seed=4)
    plain = classifier.logits(queries)
    for view in queries.views:
        changed = replace(queries, views=queries.views | {view: queries.views[view].flip(0)})
        assert not torch.allclose(classifier.logits(changed), plain)


def test_unknown_methods_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown method 'svm'; known: hypdfs, prototype, logistic_regression"):
        get_method("svm")


# ---- the protocol round a method -----------------------------------------------------------------------------------


def test_a_run_config_reads_the_config_of_its_method_strictly(name: str) -> None:
    run = RunConfig(name=name, method=VARIANTS.get(name))
    assert isinstance(run.method, get_method(name).config)
    with pytest.raises(ConfigError, match="no field 'nonsense'"):
        RunConfig(name=name, method={"nonsense": 1})


def test_validation_scores_and_draws_are_repeatable(name: str) -> None:
    fitting, reported = toy_fitting(per_class=8, copies=2), Reported(queries=toy_pool(per_class=5))
    run, setting = RunConfig(name=name, method=VARIANTS.get(name)), Setting(k_shot=2, seed=1)
    scores = list(few_shot.validation_scores(run, fitting, setting, range(4)))
    assert scores == list(few_shot.validation_scores(run, fitting, setting, range(4)))
    assert scores[2:] == list(few_shot.validation_scores(run, fitting, setting, range(2, 4)))
    assert all(0 <= s <= 1 for s in scores)
    a, b = (few_shot.score(run, fitting, reported, setting, 3) for _ in range(2))
    assert a.probabilities is not None
    np.testing.assert_array_equal(a.probabilities, b.probabilities)
    np.testing.assert_allclose(a.probabilities.sum(1), 1)
    assert a.image_ids == tuple(reported.queries.image_ids)
    assert a.metrics["acc"] == (a.predicted == reported.queries.labels).mean()
    assert a.metrics["acc"] == pytest.approx(a.metrics["balanced_acc"])  # as many queries of each class


def test_query_labels_change_no_prediction(name: str) -> None:
    """The leak test: a method that peeks at them would answer otherwise."""
    fitting, queries = toy_fitting(per_class=8), toy_pool(per_class=5)
    run = RunConfig(name=name, method=VARIANTS.get(name))
    other = replace(queries, labels=np.random.default_rng(0).permutation(queries.labels))
    a, b = (few_shot.score(run, fitting, Reported(queries=q), Setting(k_shot=2), 3) for q in (queries, other))
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_starting_weights_need_a_method_that_has_some() -> None:
    start = HypDFS(HypDFSConfig(), DIM).trained() | {"core.adapter.up": torch.ones(DIM, 32)}
    with pytest.raises(ConfigError, match="'prototype' has no weights to start from; drop --init"):
        RunConfig(name="prototype").model(DIM, start)
    started = RunConfig(name="hypdfs").model(DIM, start)
    assert torch.equal(started.core.adapter.up, start["core.adapter.up"])  # type: ignore[attr-defined]
    scratch = RunConfig(name="hypdfs", pretrained=False).model(DIM, start)
    assert not scratch.core.adapter.up.any()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="do not fit this configuration"):
        RunConfig(name="hypdfs", method={"adapter_rank": 3}).model(DIM, start)
    with pytest.raises(ConfigError, match=r"core\.ode\.clock.* on one side only"):
        RunConfig(name="hypdfs", method={"ode": "none"}).model(DIM, start)


# ---- search spaces -------------------------------------------------------------------------------------------------

WITH_TEXT = {("clip_protonet", "method.text_share"): "it mixes the text prototypes in"}
"""Parameters that act only where the backbone has a text tower, and why."""


TO_ITS_END = {"hypdfs": {"steps": 100, "synthesis_weight": 3.0}}
"""A fit that stops early moves by up to 4e-3 with any change, as small as it is; one to its end by 2e-4.

Three shots divide the weight of the synthetic points by three. The default of one would hide what acts on them: at
three shots and more a search moves answers by them little, by 7e-4 here over all of `alpha`'s range.
"""


def searched() -> list[Any]:
    """(space, parameter, what it may be: the ends of a range, every choice), of the methods' own parameters."""
    found: dict[tuple[Any, ...], Any] = {}
    for path in sorted(Path(tune_spaces.__file__).parent.glob("[a-z]*.py")):
        space = tune_spaces.get_space(path.stem)
        if get_method(space.METHOD).family != "few_shot":
            continue
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        space.space(trial)
        for parameter, values in trial.distributions.items():
            if parameter.startswith("method."):
                choices = getattr(values, "choices", None) or (values.low, values.high)  # type: ignore[attr-defined]
                marks = [pytest.mark.slow] if space.METHOD in TO_ITS_END else []
                case = pytest.param(path.stem, parameter, choices, id=f"{path.stem}-{parameter}", marks=marks)
                found.setdefault((space.METHOD, parameter, choices), case)  # spaces of one method share most
    return list(found.values())


@pytest.mark.parametrize(("space", "parameter", "choices"), searched())
def test_what_a_search_varies_of_a_method_changes_what_it_answers(
    space: str, parameter: str, choices: tuple[Any, ...]
) -> None:
    """As in practice: far more features than rows, copies, classes that overlap."""
    pool = toy_pool(n_way=5, per_class=20, copies=2, dim=1000, spread=0.2)
    chosen = np.concatenate([np.flatnonzero(pool.labels == label)[:3] for label in range(5)])
    support, queries = pool.batch(chosen, copies=2), pool.batch(np.setdiff1d(np.arange(len(pool)), chosen))
    if (space, parameter) in WITH_TEXT:
        support = replace(support, text=torch.randn(5, pool.dim, generator=torch.Generator().manual_seed(1)))
    answers = []
    name = tune_spaces.get_space(space).METHOD
    for choice in choices:
        run = override(RunConfig(name=name, method=TO_ITS_END.get(name)), {parameter: choice})
        classifier = run.model(pool.dim)
        classifier.adapt(support, 5)
        answers.append(classifier.logits(queries).softmax(1))
    for i, answer in enumerate(answers):
        for other in answers[:i]:
            assert (answer - other).abs().max() > 1e-3
