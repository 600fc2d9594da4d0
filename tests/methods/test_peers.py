"""Each peer against its paper's equation, or scikit-learn on all features, written out again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.methods import METHODS, build, get_method
from hypdefect.methods.adapters import ZipAdapterF, ZipAdapterFConfig, zip_slope
from hypdefect.methods.fitting import full_batch
from hypdefect.methods.relation_head import RelationHead, means_of_others
from hypdefect.methods.support import SupportRows, joined, span_basis
from hypdefect.types import Batch, FewShotClassifier
from tests.toy_features import toy_pool

DIM = 20  # E = 40: more features than support rows
TRAINED = ("clip_adapter", "tip_adapter_f", "zip_adapter_f", "relation")
WITH_TEXT = ("clip_adapter", "clip_protonet", "tip_adapter", "tip_adapter_f")


def task(n_way: int = 3, k_shot: int = 3, copies: int = 2, text: int = 0, spread: float = 0.15) -> tuple[Batch, Batch]:
    pool = toy_pool(n_way=n_way, per_class=20, copies=copies, dim=DIM, spread=spread)
    chosen = np.concatenate([np.flatnonzero(pool.labels == way)[:k_shot] for way in range(n_way)])
    support = pool.batch(chosen, copies=copies)
    if text:
        support = replace(support, text=torch.randn(n_way, text, generator=torch.Generator().manual_seed(5)))
    return support, pool.batch(np.setdiff1d(np.arange(len(pool)), chosen))


def fitted(name: str, support: Batch, **values: Any) -> Any:
    classifier: FewShotClassifier = build(name, get_method(name).config(**values), DIM)
    classifier.adapt(support, int(support.labels.max()) + 1)
    return classifier


def rows_of(batch: Batch) -> np.ndarray:
    return joined(batch).numpy()


def unit_keys(support: Batch) -> tuple[Tensor, Tensor]:
    """Unit mean over the copies of each image, one by one, and one-hot labels."""
    f, ids = joined(support), sorted(set(support.image_ids))
    where = [[n for n, other in enumerate(support.image_ids) if other == name] for name in ids]
    keys = torch.stack([f[rows].mean(0) for rows in where])
    return F.normalize(keys, dim=1), F.one_hot(torch.stack([support.labels[rows[0]] for rows in where])).double()


def class_means(support: Batch) -> Tensor:
    f = joined(support)
    return torch.stack([f[support.labels == way].mean(0) for way in range(int(support.labels.max()) + 1)])


# ---- linear heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_way", [2, 3])
def test_logistic_regression_in_the_span_is_that_on_all_features(n_way: int) -> None:
    support, queries = task(n_way)
    model = LogisticRegression(C=3.0, max_iter=5000, tol=1e-8).fit(rows_of(support), support.labels.numpy())
    ours = fitted("logistic_regression", support, inverse_penalty=3.0).logits(queries).softmax(1)
    np.testing.assert_allclose(ours.numpy(), model.predict_proba(rows_of(queries)), atol=1e-3)


@pytest.mark.parametrize("n_way", [2, 3])
def test_the_linear_svm_in_the_span_is_that_on_all_features(n_way: int) -> None:
    support, queries = task(n_way)
    model = LinearSVC(C=2.0, dual=False, tol=1e-8).fit(rows_of(support), support.labels.numpy())
    expected = model.decision_function(rows_of(queries)) / 0.25
    ours = fitted("linear_svm", support, inverse_penalty=2.0, temperature=0.25).logits(queries).numpy()
    ours = ours[:, 1] - ours[:, 0] if n_way == 2 else ours
    np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n_way", [2, 3])
@pytest.mark.parametrize("share", [None, 0.4])
def test_lda_in_the_span_is_that_on_all_features(n_way: int, share: float | None) -> None:
    support, queries = task(n_way)
    x, labels = rows_of(support), support.labels.numpy()
    used = share or ledoit_wolf(x - class_means(support).numpy()[labels], assume_centered=True)[1]
    assert 0.01 < used < 0.99
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=used).fit(x, labels)
    ours = fitted("shrinkage_lda", support, shrinkage=share).logits(queries).softmax(1)
    np.testing.assert_allclose(ours.numpy(), model.predict_proba(rows_of(queries)), atol=1e-6)


def test_lda_of_one_row_a_class_is_the_nearest_mean() -> None:
    support, queries = task(k_shot=1, copies=0)
    expected = -torch.cdist(joined(queries), class_means(support)).square() / 2
    ours = fitted("shrinkage_lda", support).logits(queries)
    torch.testing.assert_close(ours.log_softmax(1), expected.log_softmax(1))


def test_the_shrinkage_of_a_few_rows_acts_up_to_1_minus_1_in_e() -> None:
    pool = toy_pool(n_way=5, per_class=30, copies=2, dim=1000, spread=0.2)  # E = 2000
    chosen = np.concatenate([np.flatnonzero(pool.labels == way)[:3] for way in range(5)])
    support, queries = pool.batch(chosen, copies=2), pool.batch(np.setdiff1d(np.arange(len(pool)), chosen))
    answers = {}
    for share in (0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0):
        head = build("shrinkage_lda", get_method("shrinkage_lda").config(shrinkage=share), pool.dim)
        head.adapt(support, 5)
        answers[share] = head.logits(queries).softmax(1)
    for less, more in ((0.9, 0.99), (0.99, 0.999), (0.999, 0.9999)):
        assert (answers[less] - answers[more]).abs().max() > 0.05
    assert (answers[0.9].argmax(1) != answers[0.999].argmax(1)).any()
    assert (answers[0.99999] - answers[1.0]).abs().max() < 0.01


def test_feature_noise_of_length_0_is_logistic_regression_and_noise_shrinks_its_weights() -> None:
    support, queries = task()
    plain = fitted("logistic_regression", support, inverse_penalty=3.0)
    without = fitted("feature_noise", support, noise=0.0, inverse_penalty=3.0)
    torch.testing.assert_close(without.logits(queries), plain.logits(queries), atol=1e-2, rtol=1e-2)
    sure = fitted("logistic_regression", support, inverse_penalty=1e4)  # separable rows: next to no penalty
    noisy = fitted("feature_noise", support, noise=3.0, inverse_penalty=1e4)
    assert noisy.weight_WE.norm() < 0.8 * sure.weight_WE.norm()
    other = fitted("feature_noise", support, noise=3.0, inverse_penalty=1e4, seed=1)
    assert not torch.allclose(other.logits(queries), noisy.logits(queries))


def test_the_span_keeps_inner_products_and_drops_what_is_not_there() -> None:
    rows = torch.randn(5, DIM, dtype=torch.float64)
    doubled = torch.cat([rows, 2 * rows])
    basis = span_basis(doubled)
    assert basis.shape == (DIM, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(doubled @ basis @ basis.T, doubled)


# ---- training ------------------------------------------------------------------------------------------------------


def test_full_batch_is_adamw_with_a_cosine_schedule() -> None:
    x, target = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([torch.ones(5, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)] for _ in range(2))

    def loss(parameters: list[Tensor]) -> Tensor:
        return F.mse_loss((x @ parameters[0] + parameters[1]).tanh(), target)

    full_batch(ours, lambda: loss(ours), steps=40, lr=0.1, weight_decay=0.3)
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in theirs], lr=0.1, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for _ in range(40):
        optimizer.zero_grad()
        loss(theirs).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(ours, [p.detach() for p in theirs])
    assert all(p.grad is None and not p.requires_grad for p in ours)


def test_training_that_leaves_the_finite_numbers_says_so() -> None:
    x = torch.ones(1, dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"loss at step 0 is inf with lr 0.1: lower method\.lr"):
        full_batch([x], lambda: x.sum() / 0, steps=3, lr=0.1, weight_decay=0.0)


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, DIM, 2 * DIM])
def test_clip_adapter_follows_its_equations(text: int) -> None:
    support, queries = task(text=text)
    head = fitted("clip_adapter", support, ratio=0.3, hidden=8, text_scale=50.0, prototype_scale=7.0)
    parts, f = head.export(), F.normalize(joined(queries), dim=1)
    w1, w2 = parts["basis"] @ parts["down"], parts["up"] @ parts["basis"].T
    adapted = 0.3 * F.relu(f @ w1) @ w2 + 0.7 * f
    weights, scale = classifier_weights(support), 50.0 if text else 7.0
    torch.testing.assert_close(head.logits(queries), scale * F.normalize(adapted, dim=1) @ weights.T)


@pytest.mark.parametrize("text", [0, DIM, 2 * DIM])
def test_tip_adapter_follows_its_equation(text: int) -> None:
    support, queries = task(text=text)
    keys, values = unit_keys(support)
    f, scale = F.normalize(joined(queries), dim=1), 50.0 if text else 7.0
    cache = torch.exp(-4.0 * (1 - f @ keys.T)) @ values
    expected = 2.0 * cache + scale * f @ classifier_weights(support).T
    head = fitted("tip_adapter", support, alpha=2.0, beta=4.0, text_scale=50.0, prototype_scale=7.0)
    torch.testing.assert_close(head.logits(queries), expected)


def test_zip_adapter_follows_its_equation_and_reads_no_text() -> None:
    support, queries = task()
    keys, values = unit_keys(support)
    expected = torch.exp(-4.0 * (1 - F.normalize(joined(queries), dim=1) @ keys.T)) @ values / 0.2
    head = fitted("zip_adapter", support, beta=4.0, temperature=0.2)
    torch.testing.assert_close(head.logits(queries), expected)
    told = fitted("zip_adapter", task(text=DIM)[0], beta=4.0, temperature=0.2)
    assert torch.equal(told.logits(queries), head.logits(queries))


def test_a_trained_zip_adapter_projects_queries_and_keys_alike() -> None:
    support, queries = task()
    head = fitted("zip_adapter_f", support, beta=2.0, lr=0.05)
    parts, f = head.export(), F.normalize(joined(queries), dim=1)
    basis = parts["basis"]

    def projected(x: Tensor) -> Tensor:  # ZIP in the span, the identity outside of it
        return F.silu(x @ basis @ parts["weight"].T + parts["bias"]) @ basis.T + x

    cosine = F.normalize(projected(f), dim=1) @ F.normalize(projected(parts["keys"] @ basis.T), dim=1).T
    torch.testing.assert_close(head.logits(queries), torch.exp(-2.0 * (1 - cosine)) @ parts["values"] / 0.11)
    assert parts["weight"].abs().max() > 0.05


def test_the_gradient_of_the_zip_adapter_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    x, keys, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 7), (6, 7), (7, 7), (7,))
    )
    labels, values = torch.arange(12) % 3, F.one_hot(torch.arange(6) % 3).double()
    parameters = [p.requires_grad_() for p in (keys, weight, bias)]
    head = ZipAdapterF(ZipAdapterFConfig(beta=1.7, temperature=0.3), DIM)
    loss = F.cross_entropy(head.scores(x, x.new_zeros(12), keys, values, weight, bias), labels)
    with torch.no_grad():
        ours, gradients = zip_slope(x, labels, values, keys, weight, bias, beta=1.7, temperature=0.3)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(loss, parameters)))


def test_clip_protonet_is_the_mean_of_unit_images_mixed_with_text() -> None:
    support, queries = task(text=DIM)
    keys, values = unit_keys(support)
    f = F.normalize(joined(queries), dim=1)
    image = (f @ F.normalize(values.T @ keys, dim=1).T / 0.2).softmax(1)
    text = (30.0 * f @ classifier_weights(support).T).softmax(1)
    head = fitted("clip_protonet", support, temperature=0.2, text_share=0.25, text_scale=30.0)
    torch.testing.assert_close(head.logits(queries).softmax(1), 0.75 * image + 0.25 * text)
    silent = fitted("clip_protonet", replace(support, text=None), temperature=0.2)
    torch.testing.assert_close(silent.logits(queries).softmax(1), image)
    for share, expected in ((0.0, image), (1.0, text)):
        edge = fitted("clip_protonet", support, temperature=0.2, text_share=share, text_scale=30.0)
        torch.testing.assert_close(edge.logits(queries).softmax(1), expected)


def classifier_weights(support: Batch) -> Tensor:
    """Unit class weights of a row's length: text beside itself, or the class means."""
    if support.text is None:
        return F.normalize(class_means(support), dim=1)
    text = F.normalize(support.text.double(), dim=1)
    return torch.cat([text, text], 1) / 2**0.5 if text.shape[1] == DIM else text


def test_text_beside_itself_gives_the_mean_of_the_views_cosines() -> None:
    support, queries = task(text=DIM)
    text, f = F.normalize(support.text.double(), dim=1), F.normalize(joined(queries), dim=1)  # type: ignore[union-attr]
    weights = SupportRows.read(support, 3).text_WE
    assert weights is not None
    mean = (queries.views["whole"].double() @ text.T + queries.views["crop"].double() @ text.T) / 2
    torch.testing.assert_close(f @ weights.T, mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_counts_and_survives_a_restart(name: str) -> None:
    (support, queries), (silent, _) = task(text=DIM), task()
    head = fitted(name, support)
    assert not torch.allclose(head.logits(queries), fitted(name, silent).logits(queries))
    again = build(name, get_method(name).config(), DIM)
    again.restore(head.export())
    assert torch.equal(again.logits(queries), head.logits(queries))


def test_text_of_another_width_is_refused() -> None:
    with pytest.raises(DataError, match="text embeddings have 7 numbers and features 20 a view"):
        fitted("tip_adapter", task(text=7)[0])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("text", [0, DIM])
def test_training_fits_the_support(name: str, text: int) -> None:
    support, _ = task(spread=0.6, text=text)
    before, after = (
        F.cross_entropy(fitted(name, support, steps=steps).logits(support), support.labels) for steps in (0, 30)
    )
    assert after < 0.99 * before


def test_untrained_fine_tuning_is_the_training_free_adapter() -> None:
    support, queries = task()
    for name in ("tip_adapter", "zip_adapter"):
        torch.testing.assert_close(
            fitted(f"{name}_f", support, steps=0, beta=2.0).logits(queries),
            fitted(name, support, beta=2.0).logits(queries),
        )


# ---- relation head and hyperbolic prototype ------------------------------------------------------------------------


def test_relation_scores_compare_a_query_with_each_class_mean() -> None:
    support, queries = task()
    head = fitted("relation", support, hidden=6, steps=0, temperature=1.0)
    assert isinstance(head, RelationHead)
    parts, f = head.export(), F.normalize(joined(queries), dim=1)
    unit = F.normalize(joined(support), dim=1)
    for way in range(3):
        mean = unit[support.labels == way].mean(0)
        distance = F.relu((f - mean) @ parts["of_query"].T).sum(1)  # at the start: both signs of three projections
        expected = torch.sigmoid(3.0 - 4.0 / 3 * distance)
        torch.testing.assert_close(head.logits(queries)[:, way], expected)


def test_a_row_is_not_compared_with_its_own_image() -> None:
    """With one image a class its copies are the class; with two, each image meets the other one only."""
    x = torch.arange(6, dtype=torch.float64)[:, None]
    image, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    means = means_of_others(x, image, F.one_hot(labels).double())
    assert means.flatten().tolist() == [2.0, 2.0, 0.5, 4.0, 4.0, 4.0]


def test_the_hyperbolic_prototype_without_curvature_is_the_euclidean_one() -> None:
    support, queries = task(spread=0.6)
    head = fitted("hyperbolic_prototype", support, curvature=0.0, feature_scale=2.0, temperature=0.5)
    expected = -2 * torch.cdist(2 * joined(queries), 2 * class_means(support)) / 0.5
    torch.testing.assert_close(head.logits(queries), expected)
    euclidean = fitted("prototype", support, metric="euclidean").logits(queries)
    assert torch.equal(head.logits(queries).argsort(1), euclidean.argsort(1))
    curved = fitted("hyperbolic_prototype", support, curvature=0.5, feature_scale=2.0, temperature=0.5)
    assert not torch.allclose(curved.logits(queries), expected, rtol=0.05)


def test_hyperbolic_prototypes_of_one_row_are_its_point() -> None:
    support, _ = task(k_shot=1, copies=0)
    head = fitted("hyperbolic_prototype", support, curvature=0.5, feature_scale=1.0)
    norm = joined(support).norm(dim=1, keepdim=True) * 0.5**0.5
    torch.testing.assert_close(head.tensors("logits")["prototypes"], torch.tanh(norm) / norm * joined(support))


# ---- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("logistic_regression", "inverse_penalty", 0.0),
        ("linear_svm", "temperature", -1.0),
        ("shrinkage_lda", "shrinkage", 0.0),
        ("feature_noise", "noisy_copies", -1),
        ("clip_adapter", "ratio", 1.5),
        ("clip_adapter", "hidden", 0),
        ("clip_protonet", "text_share", -0.1),
        ("tip_adapter", "beta", 0.0),
        ("tip_adapter_f", "alpha", -1.0),
        ("tip_adapter_f", "lr", 0.0),
        ("zip_adapter", "temperature", 0.0),
        ("zip_adapter_f", "beta", 0.0),
        ("zip_adapter_f", "steps", -1),
        ("relation", "hidden", 1),
        ("hyperbolic_prototype", "curvature", -1.0),
        ("hyperbolic_prototype", "max_norm", 0.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}|curvature c"):
        METHODS[name].config(**{field: value})
