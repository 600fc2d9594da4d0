"""Adapters of CLIP features: CLIP-Adapter, CLIP-ProtoNet, Tip-Adapter(-F), Zip-Adapter(-F).

| paper | here |
| --- | --- |
| Gao et al., "CLIP-Adapter", IJCV 2024 (arXiv 2021): W1, W2 (eq. 4), residual ratio alpha (eq. 6) | `CLIPAdapter` |
| MVREC's prototype row; with text, Proto-CLIP (IROS 2024), eq. 3 to 5 | `CLIPProtoNet` |
| Zhang et al., "Tip-Adapter", ECCV 2022: F_train, L_train, alpha, beta (eq. 3 to 6) | `TipAdapter`, `TipAdapterF` |
| Lyu et al., "MVREC", AAAI 2025: ZIP, SDPA, beta, tau | `ZipAdapter`, `ZipAdapterF` |

Both views are joined, each row has unit length, and a cache holds one key an image: the mean over its copies, as
Tip-Adapter and MVREC average theirs. Training rows are all copies.

Text: where the backbone has a text tower, class-name embeddings are CLIP's classifier weights, at CLIP's logit scale.
Without, the normalised class means stand in their place, at a scale that suits whitened features. Zip-Adapter reads no
text in its paper, nor here.

Deviations, common to all that train: full batches; what is trained lives in the span of the support rows and class
weights (`span_basis`), outside of which no gradient points. A query's part outside of it counts in its length only.
AdamW scales each coordinate, so that as many of its steps go less far in the span's R coordinates than in all E.

Shapes: N support rows, I images, Q queries, W ways, E = features of both views together, R <= N + W, H hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hypdefect.methods.fitting import descend, full_batch
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.methods.support import Fitted, SupportRows, joined, span_basis
from hypdefect.types import Batch, Method


def unit(batch: Batch) -> Float[Tensor, "N E"]:
    return F.normalize(joined(batch), dim=1)


def inside(f: Float[Tensor, "N E"], basis: Float[Tensor, "E R"]) -> tuple[Float[Tensor, "N R"], Float[Tensor, "N"]]:
    """Coordinates of rows in a span, and the squared length of what lies outside of it."""
    x = f @ basis
    return x, (f.square().sum(1) - x.square().sum(1)).clamp_min(0)


def affinity(cosine: Tensor, beta: float) -> Tensor:
    """exp(-beta (1 - cosine)): Tip-Adapter's eq. 4, MVREC's activation."""
    return (beta * (cosine - 1)).exp()


# ---- CLIP-Adapter --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CLIPAdapterConfig:
    ratio: float = 0.2
    """alpha: share of the adapted feature."""
    hidden: int = 64
    """Width of the bottleneck."""
    text_scale: float = 100.0
    """CLIP's logit scale."""
    prototype_scale: float = 10.0
    """Logit scale where class means stand for the text."""
    steps: int = 30
    lr: float = 1e-2
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        require_share(self, "ratio")
        require_positive(self, "text_scale", "prototype_scale", "lr")
        require_at_least(self, 1, "hidden")
        require_at_least(self, 0, "steps", "weight_decay")


class CLIPAdapter(Fitted):
    """f* = alpha ReLU(f W1) W2 + (1 - alpha) f; logits are scaled cosines of f* with the classes' weights.

    Deviations: W1 and W2 start as Gaussians; the released code has a second ReLU behind W2, which the paper has not.
    H is 64, not D / 4, and 30 steps of 1e-2 stand for 200 epochs of 1e-5.
    """

    def __init__(self, config: CLIPAdapterConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        config, rows = self.config, SupportRows.read(support, n_way)
        weights = rows.class_weights(config.text_scale, config.prototype_scale)
        f = F.normalize(rows.f_NE, dim=1)
        basis = span_basis(torch.cat([f, F.normalize(weights, dim=1)]))
        generator = torch.Generator().manual_seed(config.seed)
        width, hidden = basis.shape[1], config.hidden
        down = torch.randn(width, hidden, generator=generator, dtype=torch.float64)
        up = torch.randn(hidden, width, generator=generator, dtype=torch.float64) / (hidden * width) ** 0.5
        in_span, x = weights @ basis, inside(f, basis)
        full_batch(
            [down, up],
            lambda: F.cross_entropy(self.scores(*x, in_span, down, up), rows.labels_N),
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        self.fitted = {"basis": basis, "weights": in_span, "down": down, "up": up}

    def scores(
        self,
        x: Float[Tensor, "N R"],
        outside: Float[Tensor, "N"],
        weights: Float[Tensor, "W R"],
        down: Float[Tensor, "R H"],
        up: Float[Tensor, "H R"],
    ) -> Float[Tensor, "N W"]:
        ratio = self.config.ratio
        adapted = ratio * (x @ down).relu() @ up + (1 - ratio) * x
        norm = (adapted.square().sum(1) + (1 - ratio) ** 2 * outside).clamp_min(1e-24).sqrt()  # of a row of zeros, too
        return adapted @ weights.T / norm[:, None]

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        fitted = self.tensors("logits")
        return self.scores(*inside(unit(query), fitted["basis"]), fitted["weights"], fitted["down"], fitted["up"])


# ---- CLIP-ProtoNet -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CLIPProtoNetConfig:
    temperature: float = 0.11
    """tau of MVREC."""
    text_share: float = 0.5
    """Share of the text prototypes' probabilities, where there is text."""
    text_scale: float = 100.0
    """CLIP's logit scale."""

    def __post_init__(self) -> None:
        require_positive(self, "temperature", "text_scale")
        require_share(self, "text_share")


class CLIPProtoNet(Fitted):
    """Prototypes of CLIP features, without training: the comparison row of MVREC and HypDFS.

    Neither paper defines it further; MVREC's code averages the copies and views of an image, then the unit images of a
    class, and scores by cosine/tau. With text, as Proto-CLIP, probabilities of the image prototypes are mixed with
    those of the text: p = (1 - s) softmax(cos/tau) + s softmax(scale cos).

    Deviation: whole and crop are joined, not averaged (their whitened spaces are not one); text probabilities are
    CLIP's own, where Proto-CLIP takes a second distance softmax.
    """

    def __init__(self, config: CLIPProtoNetConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        rows = SupportRows.read(support, n_way)
        f, labels = rows.image_means()
        share = F.one_hot(labels, n_way).T.to(f)
        prototypes = F.normalize(share @ F.normalize(f, dim=1), dim=1)
        self.fitted = {"prototypes": prototypes} | ({} if rows.text_WE is None else {"text": rows.text_WE})

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        fitted = self.tensors("logits")
        config, f = self.config, unit(query)
        image = f @ fitted["prototypes"].T / config.temperature
        if "text" not in fitted:
            return image
        text = config.text_scale * f @ fitted["text"].T
        shares = torch.tensor([1 - config.text_share, config.text_share], dtype=f.dtype, device=f.device)
        both = torch.stack([image.log_softmax(1), text.log_softmax(1)]) + shares.log()[:, None, None]
        return both.logsumexp(0)


# ---- Tip-Adapter ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TipAdapterConfig:
    alpha: float = 1.0
    """Weight of the cache against the classes' weights."""
    beta: float = 5.5
    """Sharpness of the affinities."""
    text_scale: float = 100.0
    """CLIP's logit scale."""
    prototype_scale: float = 10.0
    """Logit scale where class means stand for the text."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "alpha")
        require_positive(self, "beta", "text_scale", "prototype_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class TipAdapterFConfig(TipAdapterConfig):
    steps: int = 20
    """Tip-Adapter-F's epochs."""
    lr: float = 1e-2
    """1e-3 in the paper, in CLIP's coordinates: steps in those of the span are shorter."""
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        TipAdapterConfig.__post_init__(self)
        require_positive(self, "lr")
        require_at_least(self, 0, "steps", "weight_decay")


class TipAdapter(Fitted):
    """logits = alpha exp(-beta (1 - f F_train^T)) L_train + scale f W_c^T (eq. 6), without training."""

    def __init__(self, config: TipAdapterConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        rows = SupportRows.read(support, n_way)
        means, labels = rows.image_means()
        weights = rows.class_weights(self.config.text_scale, self.config.prototype_scale)
        values = F.one_hot(labels, n_way).to(means)
        keys = self.keys(rows, F.normalize(means, dim=1), values, weights)
        self.fitted = {"keys": keys, "values": values, "weights": weights}

    def keys(self, rows: SupportRows, keys_IE: Tensor, values_IW: Tensor, weights_WE: Tensor) -> Tensor:
        return keys_IE

    def scores(
        self,
        f: Float[Tensor, "N _"],
        keys: Float[Tensor, "I _"],
        values: Float[Tensor, "I W"],
        weights: Float[Tensor, "W _"],
    ) -> Float[Tensor, "N W"]:
        return self.config.alpha * affinity(f @ keys.T, self.config.beta) @ values + f @ weights.T

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        fitted = self.tensors("logits")
        return self.scores(unit(query), **fitted)


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys F_train are trained by cross-entropy (section 3.3), L_train and W_c fixed."""

    def __init__(self, config: TipAdapterFConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.training = config

    def keys(self, rows: SupportRows, keys_IE: Tensor, values_IW: Tensor, weights_WE: Tensor) -> Tensor:
        f, config = F.normalize(rows.f_NE, dim=1), self.training
        basis = span_basis(f)
        x, keys = f @ basis, keys_IE @ basis
        fixed = f @ weights_WE.T
        full_batch(
            [keys],
            lambda: F.cross_entropy(
                config.alpha * affinity(x @ keys.T, config.beta) @ values_IW + fixed, rows.labels_N
            ),
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        return keys @ basis.T


# ---- Zip-Adapter ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipAdapterConfig:
    beta: float = 3.0
    """Sharpness of the affinities; in MVREC 32, for CLIP's features, which are all alike."""
    temperature: float = 0.11
    """tau, which divides the logits."""

    def __post_init__(self) -> None:
        require_positive(self, "beta", "temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipAdapterFConfig(ZipAdapterConfig):
    beta: float = 1.0
    """Sharpness of the affinities, MVREC's where trained."""
    steps: int = 30
    """500 in MVREC."""
    lr: float = 1e-2
    """1e-4 in MVREC."""
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        ZipAdapterConfig.__post_init__(self)
        require_positive(self, "lr")
        require_at_least(self, 0, "steps", "weight_decay")


class ZipAdapter(Fitted):
    """logits = exp(-beta (1 - cos(ZIP(q), ZIP(K)))) V / tau with ZIP(x) = SiLU(W x + b) + x, W = b = 0, V one-hot.

    The zero-initialised projection (ZIP) is the identity without training, so that this is a cache of one key an
    image.
    """

    def __init__(self, config: ZipAdapterConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        rows = SupportRows.read(support, n_way)
        f = F.normalize(rows.f_NE, dim=1)
        basis = span_basis(f)
        means, labels = rows.image_means()
        width = basis.shape[1]
        fitted = {
            "keys": F.normalize(means, dim=1) @ basis,
            "values": F.one_hot(labels, n_way).to(f),
            "weight": f.new_zeros(width, width),
            "bias": f.new_zeros(width),
        }
        self.train(f @ basis, rows.labels_N, fitted)
        self.fitted = fitted | {"basis": basis}

    def train(self, x: Tensor, labels: Tensor, fitted: dict[str, Tensor]) -> None:
        """Nothing to do: the projection stays the identity."""

    def scores(
        self,
        x: Float[Tensor, "N R"],
        outside: Float[Tensor, "N"],
        keys: Float[Tensor, "I R"],
        values: Float[Tensor, "I W"],
        weight: Float[Tensor, "R R"],
        bias: Float[Tensor, "R"],
    ) -> Float[Tensor, "N W"]:
        query, key = (F.silu(y @ weight.T + bias) + y for y in (x, keys))
        norm = (query.square().sum(1) + outside).sqrt().clamp_min(1e-12)
        cosine = query @ F.normalize(key, dim=1).T / norm[:, None]
        return affinity(cosine, self.config.beta) @ values / self.config.temperature

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        fitted = self.tensors("logits")
        return self.scores(*inside(unit(query), fitted.pop("basis")), **fitted)


class ZipAdapterF(ZipAdapter):
    """Zip-Adapter whose keys and projection are trained by cross-entropy.

    As in MVREC's released configuration, without its optional triplet term. Deviation: that takes 500 AdamW steps at
    1e-4; the defaults are fewer and longer, a tenth of the time and as accurate on MTD. A search tries MVREC's first.
    """

    def __init__(self, config: ZipAdapterFConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.training = config

    def train(self, x: Tensor, labels: Tensor, fitted: dict[str, Tensor]) -> None:
        config, values = self.training, fitted["values"]
        parameters = [fitted["keys"], fitted["weight"], fitted["bias"]]
        descend(
            parameters,
            lambda: zip_slope(x, labels, values, *parameters, beta=config.beta, temperature=config.temperature),
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
        )


def zip_slope(
    x: Float[Tensor, "N R"],
    labels: Int[Tensor, "N"],
    values: Float[Tensor, "I W"],
    keys: Float[Tensor, "I R"],
    weight: Float[Tensor, "R R"],
    bias: Float[Tensor, "R"],
    *,
    beta: float,
    temperature: float,
) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """Cross-entropy of `ZipAdapter.scores` at rows inside the span, and its gradient by keys, weight and bias.

    By hand, which saves up to half of autograd's time: queries and keys go through the projection as one matrix, and
    nothing is asked of the rows themselves.
    """
    count, values = len(x), values / temperature
    rows = torch.cat([x, keys])
    before = torch.addmm(bias, rows, weight.T)
    gate = before.sigmoid()
    silu = before * gate
    projected = silu + rows
    norm = torch.linalg.vector_norm(projected, dim=1, keepdim=True).clamp_min(1e-12)
    unit_rows = projected / norm
    query, key = unit_rows[:count], unit_rows[count:]
    affinities = affinity(query @ key.T, beta)
    log_p = (affinities @ values).log_softmax(1)
    loss = F.nll_loss(log_p, labels)
    by_scores = (log_p.exp() - F.one_hot(labels, values.shape[1])) / count
    by_cosine = beta * affinities * (by_scores @ values.T)
    by_unit = torch.cat([by_cosine @ key, by_cosine.T @ query])
    by_projected = (by_unit - unit_rows * (unit_rows * by_unit).sum(1, keepdim=True)) / norm
    by_before = by_projected * torch.addcmul(gate, silu, 1 - gate)
    by_keys = torch.addmm(by_projected[count:], by_before[count:], weight)
    return loss, [by_keys, by_before.T @ rows, by_before.sum(0)]


METHODS = {
    "clip_adapter": Method(config=CLIPAdapterConfig, build=CLIPAdapter),
    "clip_protonet": Method(config=CLIPProtoNetConfig, build=CLIPProtoNet),
    "tip_adapter": Method(config=TipAdapterConfig, build=TipAdapter),
    "tip_adapter_f": Method(config=TipAdapterFConfig, build=TipAdapterF),
    "zip_adapter": Method(config=ZipAdapterConfig, build=ZipAdapter),
    "zip_adapter_f": Method(config=ZipAdapterFConfig, build=ZipAdapterF),
}
