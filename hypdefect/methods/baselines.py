"""Euclidean peers on the same features and draws: nearest prototype and linear heads.

Linear heads are fitted by scikit-learn, or as it would, in the at most N coordinates of the span of the support rows:
an L2-penalised or shrunken solution lies in it, so that the result is that on all E features (tests/methods/
test_peers.py), in a fraction of the time.

Shapes: N support rows, Q queries, W ways, E = features of both views together, R <= N rank of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import Tensor

from hypdefect.errors import ConfigError
from hypdefect.methods.ranges import require_at_least, require_positive
from hypdefect.methods.support import Fitted, SupportRows, joined, span_basis
from hypdefect.types import Batch, Method, Needs

Weights = tuple[np.ndarray, np.ndarray]  # [W, R] and [W]; one row [1, R], [1] where there are two classes


@dataclass(frozen=True, kw_only=True, slots=True)
class PrototypeConfig:
    metric: Literal["cosine", "euclidean"] = "cosine"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, "temperature")


class NearestPrototype(Fitted):
    """Nearest class mean (Snell et al., "Prototypical Networks", NeurIPS 2017), without training.

    Logits are cosine similarity, or minus the squared distance, over the temperature.
    """

    def __init__(self, config: PrototypeConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        self.fitted = {"prototypes": SupportRows.read(support, n_way).class_means()}

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        f, prototypes = joined(query), self.tensors("logits")["prototypes"]
        if self.config.metric == "cosine":
            return F.normalize(f, dim=1) @ F.normalize(prototypes, dim=1).T / self.config.temperature
        return -torch.cdist(f, prototypes).square() / self.config.temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticRegressionConfig:
    inverse_penalty: float = 10.0
    """scikit-learn's C: weight of the data against the L2 penalty."""

    def __post_init__(self) -> None:
        require_positive(self, "inverse_penalty")


def logistic_regression(config: LogisticRegressionConfig, x: np.ndarray, labels: np.ndarray, dim: int) -> Weights:
    """Multinomial logistic regression, min |w|^2 / 2 + C sum_n CE (scikit-learn, L-BFGS)."""
    return _logistic(x, labels, config.inverse_penalty)


def _logistic(x: np.ndarray, labels: np.ndarray, inverse_penalty: float) -> Weights:
    model = LogisticRegression(C=inverse_penalty, max_iter=2000).fit(x, labels)
    return model.coef_, model.intercept_


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSVMConfig:
    inverse_penalty: float = 1.0
    """scikit-learn's C."""
    temperature: float = 0.5
    """Divides the decision values, which are no log-odds, before the softmax."""

    def __post_init__(self) -> None:
        require_positive(self, "inverse_penalty", "temperature")


def linear_svm(config: LinearSVMConfig, x: np.ndarray, labels: np.ndarray, dim: int) -> Weights:
    """One-vs-rest support vector machines, squared hinge (scikit-learn's `LinearSVC`, primal).

    Deviation: probabilities are a softmax of decision values over a temperature, not Platt's calibration, for which
    K images a class are too few.
    """
    model = LinearSVC(C=config.inverse_penalty, dual=False, max_iter=10_000).fit(x, labels)
    return model.coef_ / config.temperature, model.intercept_ / config.temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class ShrinkageLDAConfig:
    shrinkage: float | None = None
    """Share of the isotropic covariance in the within-class covariance; None: Ledoit and Wolf's estimate."""

    def __post_init__(self) -> None:
        if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
            raise ConfigError(f"method.shrinkage must lie in (0, 1] or be None, got {self.shrinkage}")


def shrinkage_lda(config: ShrinkageLDAConfig, x: np.ndarray, labels: np.ndarray, dim: int) -> Weights:
    """Linear discriminant analysis with Sigma = (1 - a) S + a tr(S)/E I and equal class priors.

    S is the pooled covariance of rows around their class means; a is that of Ledoit and Wolf ("A well-conditioned
    estimator for large-dimensional covariance matrices", 2004), which scikit-learn's `ledoit_wolf(x - means,
    assume_centered=True)` gives on all E features. Rows that do not vary within classes leave Sigma = I.

    Deviation: scikit-learn's `shrinkage="auto"` estimates a for each class, on standardised features, which one image
    a class does not allow; with `shrinkage=a` it is this head.
    """
    means = np.stack([x[labels == way].mean(0) for way in np.unique(labels)])
    centred = x - means[labels]
    covariance = centred.T @ centred / len(x)
    isotropic = np.trace(covariance) / dim
    if not isotropic > 1e-12:
        share, isotropic = 1.0, 1.0
    else:
        share = ledoit_wolf_share(centred, dim) if config.shrinkage is None else config.shrinkage
    weight = np.linalg.solve((1 - share) * covariance + share * isotropic * np.eye(x.shape[1]), means.T).T
    bias = -(weight * means).sum(1) / 2
    return (weight, bias) if len(means) > 2 else (weight[1:] - weight[:1], bias[1:] - bias[:1])


def ledoit_wolf_share(centred: np.ndarray, dim: int) -> float:
    """Ledoit and Wolf's shrinkage of centred rows that span at most R of `dim` dimensions, from their Gram matrix."""
    n = len(centred)
    gram = centred @ centred.T
    squared = (gram**2).sum() / n**2  # |S|^2
    spread = (np.diag(gram) ** 2).sum() / n
    distance = squared - np.trace(gram / n) ** 2 / dim
    return float(min((spread - squared) / n, distance) / distance) if distance > 0 else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureNoiseConfig:
    noise: float = 0.5
    """Expected length of the noise as a share of the rows' mean norm; SimpleNet's 0.015 a coordinate is 0.6 at 1536."""
    noisy_copies: int = 8
    """Noisy copies of each row."""
    inverse_penalty: float = 10.0
    """scikit-learn's C of the logistic regression, of all copies of a row together."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "inverse_penalty")
        require_at_least(self, 0, "noise", "noisy_copies")


def feature_noise(config: FeatureNoiseConfig, x: np.ndarray, labels: np.ndarray, dim: int) -> Weights:
    """Logistic regression on rows and their copies under isotropic Gaussian noise.

    The noise is that of Liu et al., "SimpleNet", CVPR 2023, section 3.3: q~ = q + eps, eps ~ N(0, sigma^2), the
    Euclidean synthesis which HypDFS replaces.

    Deviations: SimpleNet has one class, its normal features, so that the noisy ones become the anomalies; here they
    keep their class. Its adaptor and discriminator make way for a linear head. Noise orthogonal to all rows has mean 0
    in the expected loss and is left out.
    """
    sigma = config.noise * np.linalg.norm(x, axis=1).mean() / dim**0.5
    rng = np.random.default_rng(config.seed)
    noisy = x + sigma * rng.standard_normal((config.noisy_copies, *x.shape))
    rows = np.concatenate([x, noisy.reshape(-1, x.shape[1])])
    times = config.noisy_copies + 1
    return _logistic(rows, np.tile(labels, times), config.inverse_penalty / times)


class LinearHead:
    """Logits f w + b, with w and b from `solve(config, rows in their span, labels, E)`."""

    needs: ClassVar[Needs] = "vectors"

    def __init__(self, solve: Callable[[Any, np.ndarray, np.ndarray, int], Weights], config: Any, dim: int) -> None:
        self.solve, self.config, self.dim = solve, config, dim
        self.weight_WE: Tensor | None = None
        self.bias_W: Tensor | None = None

    def adapt(self, support: Batch, n_way: int) -> None:
        rows = SupportRows.read(support, n_way)
        basis = span_basis(rows.f_NE)
        if not basis.shape[1]:  # rows of zeros tell no classes apart
            self.weight_WE, self.bias_W = basis.new_zeros(n_way, len(basis)), basis.new_zeros(n_way)
            return
        x, labels = (rows.f_NE @ basis).numpy(), rows.labels_N.numpy()
        weight, bias = (
            torch.from_numpy(np.ascontiguousarray(a)) for a in self.solve(self.config, x, labels, len(basis))
        )
        if n_way == 2:  # one discriminant: half of it for, half of it against
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        self.weight_WE, self.bias_W = weight @ basis.T, bias

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        if self.weight_WE is None or self.bias_W is None:
            raise RuntimeError(f"{self.solve.__name__}: logits needs adapt() first")
        return joined(query) @ self.weight_WE.T + self.bias_W

    def export(self) -> dict[str, Tensor]:
        if self.weight_WE is None or self.bias_W is None:
            raise RuntimeError(f"{self.solve.__name__}: export needs adapt() first")
        return {"weight": self.weight_WE, "bias": self.bias_W}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        # in memory of their own, as in `Fitted.restore`
        self.weight_WE, self.bias_W = (tensors[name].to(torch.float64, copy=True) for name in ("weight", "bias"))


METHODS = {
    "prototype": Method(config=PrototypeConfig, build=NearestPrototype),
    "logistic_regression": Method(config=LogisticRegressionConfig, build=partial(LinearHead, logistic_regression)),
    "linear_svm": Method(config=LinearSVMConfig, build=partial(LinearHead, linear_svm)),
    "shrinkage_lda": Method(config=ShrinkageLDAConfig, build=partial(LinearHead, shrinkage_lda)),
    "feature_noise": Method(config=FeatureNoiseConfig, build=partial(LinearHead, feature_noise)),
}
