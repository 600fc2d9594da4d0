"""HypDFS: hyperbolic defect feature synthesis for few-shot defect classification (CVPR 2026).

| paper | here |
| --- | --- |
| f_w, f_c (whole and crop features) | `views["whole"]`, `views["crop"]`; their concatenation is f |
| h = exp_0(f) (eq. 1) | `geometry.expmap0` |
| prototypes, "sparse" | `Moments.proto_WPE`, farthest-point sampling |
| P(z | c, h, mu, Sigma) (eq. 5), sampling (eq. 4) | `geometry.WrappedNormal`; `synthesize`, in its coordinates |
| ODE_mu, ODE_Sigma, RK (eq. 7) | `MomentODE`, `torchdiffeq.odeint(method="rk4")` |
| W, f_out = SiLU(W f_in) + f_in (eq. 8) | `ResidualAdapter` |
| L_s, m_d (eq. 9) | `HypDFS.spread_loss`, `margin` |
| L_hdcl = L_ce + alpha L_s + beta L_cl (eq. 10) | `HypDFS.terms`, `alpha`, `beta` |
| L_cl, tau (eq. 11) | `whole_crop_contrast`, `contrast_temperature` |

Deviations:
- The conformal factor has a minus sign and the volume term the exponent n-1 (`geometry`): the document's are slips.
- W is low-rank by default (`adapter_rank=0`: full, as printed) and shared by the two views, which makes whole and
  crop comparable in L_cl and keeps a fit under a second; the ODE's networks have one hidden layer of `ode_hidden`.
- Real and synthetic features are stacked along the sample axis: along channels a query would lack its synthetic half.
- A class centre is the midpoint of its adapted real points and of its adapted synthetic mean, so that what the ODE
  learned about the mean reaches the queries; `learn_centers` adds an offset to it.
- A task is fitted in coordinates of its support rows' span (`axes="features"`: all features), several times faster.
  Prototypes, centres and gradients lie in it, distances to them stay what they are; but the diagonal of Sigma is then
  one of principal directions, and noise stays in the span.
- The whole support is one batch (at most K x N x views rows) instead of minibatches of 32.

Shapes: R rows, S synthetic points of a class, W ways, P prototypes a class, D features of one view, E = 2 D, Q queries.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchdiffeq import odeint

from hypdefect import geometry
from hypdefect.config import digest
from hypdefect.errors import ConfigError, NumericsError
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.methods.support import check_every_class, span_basis
from hypdefect.types import VIEWS, Batch, Episode, LossTerms, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class HypDFSConfig:
    """Every ablation of the paper is one field."""

    curvature: float = 0.05
    """c >= 0, sectional curvature -c; 0 is the Euclidean twin."""
    learn_curvature: bool = False
    """Train c with the rest, starting from `curvature` (> 0)."""
    feature_scale: float = 3.0
    """Multiplies each unit-norm view before the exponential map."""
    max_norm: float = 10.0
    """Tangent vectors are clipped to this norm (feature clipping)."""
    prototypes: int = 1
    """P, prototypes a class from which features are synthesised; 1 is the class midpoint."""
    center: Literal["einstein", "frechet"] = "einstein"
    """Class centre: closed-form midpoint, or iterated Karcher mean."""
    match_radius: bool = True
    """Put each centre at the mean radius of its real points: a midpoint of K scattered points sinks towards the
    origin, by an amount that depends on K and on the scatter, and then attracts too few or too many queries."""
    learn_centers: bool = True
    """Fit an offset to each class centre, per task; with `match_radius` it only turns the centre."""
    center_lr: float = 0.01
    """Rate of the offsets, which act on few coordinates, where `lr` is that of adapter and ODE."""
    n_syn: int = 8
    """Synthetic points a class and step."""
    noise_scale: float = 1.0
    """Multiplies the standard deviation of the wrapped normal."""
    shrinkage: float = 0.5
    """Share of the variance pooled over classes in each class's own (1: all pooled)."""
    covariance: Literal["diagonal", "low_rank"] = "diagonal"
    axes: Literal["span", "features"] = "span"
    """What a task is fitted along: principal directions of its support rows, where these are fewer than the features
    and nothing was trained for the features' own axes; or these axes."""
    ode: Literal["fc", "sa", "none"] = "fc"
    """Network of the neural ODE: fully connected, self-attention across classes, or plain moments."""
    ode_steps: int = 1
    """Runge-Kutta steps from 0 to 1; 0 is plain moments."""
    ode_hidden: int = 32
    adapter: Literal["none", "real", "real+synthetic"] = "real+synthetic"
    adapter_rank: int = 32
    """Rank of W; 0 is a full matrix."""
    loss: Literal["euclidean", "hyperbolic", "hdcl"] = "hdcl"
    """Cross-entropy on Euclidean distances, on hyperbolic ones, or with the synthesis and contrast terms."""
    alpha: float = 0.1
    """Weight of the synthesis term L_s."""
    beta: float = 0.1
    """Weight of the whole-to-crop contrast L_cl."""
    margin: float = 1.0
    """m_d: synthetic points stay this far from their prototype and from one another (hyperbolic length)."""
    max_spread: float = 0.0
    """Synthetic points stay within this multiple of the margin of their prototype; 0 leaves them free."""
    temperature: float = 1.0
    """tau of the cross-entropy."""
    contrast_temperature: float = 0.3
    """tau of the contrast (eq. 11)."""
    contrast_same_class: bool = False
    """Count other images of the same class as negatives in the contrast."""
    steps: int = 30
    """Optimisation steps of a task; 0 uses the starting weights as they are."""
    lr: float = 1e-4
    """AdamW, cosine schedule to 0."""
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        geometry.validate_curvature(self.curvature)
        require_positive(self, "feature_scale", "max_norm", "temperature", "contrast_temperature", "lr", "center_lr")
        require_at_least(self, 0, "noise_scale", "alpha", "beta", "margin", "max_spread", "weight_decay")
        require_at_least(self, 0, "ode_steps", "steps", "adapter_rank")
        require_at_least(self, 1, "prototypes", "n_syn", "ode_hidden")
        require_share(self, "shrinkage")
        if self.learn_curvature and self.curvature == 0:
            raise ConfigError("method.learn_curvature needs a curvature above 0 to start from")


@dataclass(frozen=True, slots=True)
class Moments:
    """Prototypes of each class and the state (mean, log standard deviation) of the wrapped normal at each of them.

    `factor` holds the low-rank part of the covariance, None for a diagonal one.
    """

    proto_WPE: Tensor
    mu_WPE: Tensor
    log_scale_WPE: Tensor
    factor_WPER: Tensor | None


class ResidualAdapter(nn.Module):
    """f_out = SiLU(W f_in) + f_in (eq. 8), the identity at the start."""

    def __init__(self, dim: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inner = rank or dim
        self.down = nn.Parameter(torch.randn(inner, dim, generator=generator) / dim**0.5) if rank else None
        self.up = nn.Parameter(torch.zeros(dim, inner))

    def forward(self, f: Float[Tensor, "*R D"]) -> Float[Tensor, "*R D"]:
        return f + F.silu((f if self.down is None else f @ self.down.T) @ self.up.T)


class MomentODE(nn.Module):
    """d(mu, log sigma)/dt = net([mu, log sigma, t]) (eq. 7). The last layer starts at zero, training from the moments.

    "fc" treats every prototype on its own; "sa" lets the classes attend to one another, whatever their order.
    """

    def __init__(self, dim: int, hidden: int, kind: Literal["fc", "sa"], generator: torch.Generator) -> None:
        super().__init__()
        self.enter = nn.Linear(2 * dim, hidden)
        self.clock = nn.Parameter(torch.randn(hidden, generator=generator))
        self.attend = nn.Linear(hidden, 3 * hidden) if kind == "sa" else None
        self.leave = nn.Linear(hidden, 2 * dim)
        with torch.no_grad():
            for layer in (self.enter, self.attend):
                if layer is not None:
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
                    layer.bias.zero_()
            self.leave.weight.zero_()
            self.leave.bias.zero_()

    def forward(self, t: Tensor, state: Float[Tensor, "T E2"]) -> Float[Tensor, "T E2"]:
        x = F.silu(self.enter(state) + t * self.clock)
        if self.attend is not None:
            q, k, v = self.attend(x).chunk(3, dim=1)
            x = x + F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self.leave(x)


class Projection(nn.Module):
    """z = (f - m) P of each view, at unit norm: the representation that is meta-trained on pseudo-defects.

    m is the mean of the classes it is trained on, so that the ball's origin is a defect of no kind in particular. What
    features have beyond P's rows (the region's shape descriptors) follows unchanged, as in `FeatureTransform`.
    """

    mean: Tensor

    def __init__(self, weight: Float[Tensor, "V E d"], mean: Float[Tensor, "V E"], rest: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("mean", mean.clone())
        self.dim = int(weight.shape[2]) + rest

    def forward(self, f: Float[Tensor, "*R V D"]) -> Float[Tensor, "*R V d"]:
        width = self.weight.shape[1]
        mapped = torch.einsum("...vd,vde->...ve", f[..., :width] - self.mean, self.weight)
        return torch.cat([F.normalize(mapped, dim=-1), f[..., width:]], -1)


def principal_projection(f: Float[Tensor, "R V D"], dim: int, rest: int = 0) -> Projection:
    """Each view's directions of largest variance, `dim` of them: where meta-training starts.

    Args:
        rest: trailing numbers of each view that are not projected.
    """
    f = f[..., : f.shape[2] - rest]
    mean = f.mean(0)
    weights = []
    for view in (f - mean).unbind(1):
        directions = torch.linalg.svd(view, full_matrices=False)[2][:dim]
        largest = directions.abs().argmax(1, keepdim=True)
        weights.append((directions * directions.gather(1, largest).sign()).T)  # one sign, on every machine
    return Projection(torch.stack(weights), mean, rest)


class Core(nn.Module):
    """What is meta-trained: projection (fixed after that), and adapter, ODE and curvature, then fitted per task.

    A core with a `frame` works in a task's own coordinates (`in_frame`).
    """

    frame: Tensor | None

    def __init__(
        self,
        config: HypDFSConfig,
        dim: int,
        projection: Projection | None = None,
        frame: Float[Tensor, "V D R"] | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("frame", frame)
        if projection is not None:
            dim = projection.dim
        if frame is not None:
            dim = frame.shape[2] + 1
        generator = torch.Generator().manual_seed(config.seed)
        wants_ode = config.ode != "none" and config.ode_steps > 0
        self.adapter = None if config.adapter == "none" else ResidualAdapter(dim, config.adapter_rank, generator)
        self.ode = MomentODE(2 * dim, config.ode_hidden, config.ode, generator) if wants_ode else None  # type: ignore[arg-type]
        self.log_c = nn.Parameter(torch.tensor(config.curvature).log()) if config.learn_curvature else None

    def is_fresh(self) -> bool:
        """Whether adapter and ODE change nothing yet: then no coordinates are special to them."""
        last: list[Tensor] = [] if self.adapter is None else [self.adapter.up]
        last += [] if self.ode is None else [self.ode.leave.weight, self.ode.leave.bias]
        return not any(bool(x.any()) for x in last)


def span_frame(tangents: Float[Tensor, "R V D"]) -> Float[Tensor, "V D r"]:
    """Orthonormal principal directions of each view's rows, r the larger rank of both; the lower one's last are 0."""
    bases = [span_basis(view.double()) for view in tangents.unbind(1)]
    rank = max(basis.shape[1] for basis in bases)
    frame = torch.stack([F.pad(basis, (0, rank - basis.shape[1])) for basis in bases])
    largest = frame.abs().argmax(1, keepdim=True)
    return (frame * frame.gather(1, largest).sign()).to(tangents)  # one sign, on every machine


def in_frame(tangents: Float[Tensor, "*R V D"], frame: Float[Tensor, "V D r"]) -> Float[Tensor, "*R V r1"]:
    """Coordinates in each view's frame, and the length of what lies outside of it.

    Norms, and distances to all points of the frame's span, are those of the rows themselves.
    """
    x = torch.einsum("...vd,vdr->...vr", tangents, frame)
    outside = tangents - torch.einsum("...vr,vdr->...vd", x, frame)
    return torch.cat([x, outside.norm(dim=-1, keepdim=True)], -1)


class HypDFS(nn.Module):
    """Few-shot classifier: prototypes, synthesis, adapter and loss in the Poincare ball.

    `core` holds the starting weights (zero-effect initialisation, or meta-trained ones); `adapt` fits a copy of it.
    """

    needs: ClassVar[Needs] = "vectors"

    def __init__(self, config: HypDFSConfig, dim: int, projection: Projection | None = None) -> None:
        super().__init__()
        self.core = Core(config, dim, projection)
        self.config, self.dim = config, dim if projection is None else projection.dim
        self.fitted: Core | None = None
        self.register_buffer("centers_WE", torch.zeros(0, 2 * self.dim))
        self.last_loss: LossTerms | None = None

    # -- the FewShotClassifier protocol ------------------------------------------------------------------------------

    def adapt(self, support: Batch, n_way: int) -> None:
        """Fit to a support set from the starting weights (a second call starts afresh).

        Raises:
            DataError: a class without support rows. NumericsError: the loss or the ODE left the finite numbers.
        """
        check_every_class(support, n_way)
        config, device = self.config, support.labels.device
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            core = self.task_core(self.tangents(support)).to(device)
            tangents = self.tangents(support, core)
        width = tangents.shape[2]
        offset = torch.zeros(n_way, 2 * width, device=device, requires_grad=config.learn_centers)
        groups = [
            {"params": [p for p in core.parameters() if p.requires_grad], "lr": config.lr},
            {"params": [offset] if config.learn_centers else [], "lr": config.center_lr},
        ]
        if config.steps and any(group["params"] for group in groups):
            optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
            moments = None if config.learn_curvature else self.moments(core, tangents, support.labels, n_way)
            for step in range(config.steps):
                terms = self.terms(core, tangents, support.labels, offset, generator, moments)
                if not torch.isfinite(terms.total):
                    raise NumericsError(
                        f"loss at step {step} is {terms.parts}; curvature {config.curvature}, "
                        f"config {digest(config)[:12]}: lower lr or feature_scale"
                    )
                optimizer.zero_grad(set_to_none=True)
                terms.total.backward()
                optimizer.step()
                schedule.step()
                self.last_loss = terms
        with torch.no_grad():
            evolved = self.evolve(core, self.moments(core, tangents, support.labels, n_way))
            adapted, (h, means) = self.points(core, tangents, self.synthetic_means(core, evolved))
            radii = adapted[: len(h)].flatten(1).norm(dim=1)
            centers = self.centers(core, h, means, radii, support.labels, offset)
        if not torch.isfinite(centers).all():
            raise NumericsError(
                f"class centres are not finite after {config.steps} steps; curvature {config.curvature}, "
                f"config {digest(config)[:12]}: lower lr or feature_scale"
            )
        self.centers_WE = centers
        self.fitted = core.requires_grad_(False)

    @torch.no_grad()
    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """-d(h, centre)/tau in float64 (the rule the loss trains).

        Raises:
            RuntimeError: called before `adapt`.
        """
        if self.fitted is None:
            raise RuntimeError("HypDFS.logits needs adapt() first")
        h = self.to_ball(self.fitted, self.adapted(self.fitted, self.tangents(query, self.fitted)).double())
        return (
            -geometry.pairwise_dist(h, self.centers_WE.double(), self.scoring_c(self.fitted)) / self.config.temperature
        )

    def export(self) -> dict[str, Tensor]:
        """Every tensor a fitted classifier needs, for `restore`."""
        if self.fitted is None:
            raise RuntimeError("HypDFS.export needs adapt() first")
        state = {f"core.{name}": value.detach().cpu() for name, value in self.fitted.state_dict().items()}
        return state | {"centers": self.centers_WE.cpu()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become the classifier that `export` described."""
        core = self.framed(tensors["core.frame"]) if "core.frame" in tensors else copy.deepcopy(self.core)
        core.load_state_dict({k.removeprefix("core."): v for k, v in tensors.items() if k.startswith("core.")})
        self.fitted = core.requires_grad_(False)
        self.centers_WE = tensors["centers"]

    # -- meta-training -----------------------------------------------------------------------------------------------

    def loss(self, item: Episode, generator: torch.Generator) -> LossTerms:
        """Cross-entropy of an episode's queries against centres made from its support, plus the support's own terms."""
        offset = torch.zeros(len(item.class_names), 2 * self.dim, device=item.support.labels.device)
        queries = (self.tangents(item.query), item.query.labels)
        tangents = self.tangents(item.support)
        return self.terms(self.core, tangents, item.support.labels, offset, generator, None, queries)

    def trained(self) -> dict[str, Tensor]:
        """The weights that meta-training changes, by the names `start_from` takes."""
        return {f"core.{name}": value.detach().cpu().contiguous() for name, value in self.core.state_dict().items()}

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin every task at trained weights. A curvature that was trained is left out where it is fixed here.

        Raises:
            ConfigError: they are those of another configuration.
        """
        wanted = {name for name in self.state_dict() if name.startswith("core.")}
        given = {name: value for name, value in weights.items() if name != "core.log_c" or self.config.learn_curvature}
        if odd := sorted(wanted ^ set(given)):
            raise ConfigError(f"starting weights do not fit this configuration: {', '.join(odd)} on one side only")
        try:
            self.load_state_dict({**self.state_dict(), **given})
        except RuntimeError as error:
            raise ConfigError(f"starting weights do not fit this configuration: {error}") from error

    # -- the parts ---------------------------------------------------------------------------------------------------

    def c(self, core: Core) -> float | Tensor:
        """Curvature magnitude in use."""
        return self.config.curvature if core.log_c is None else core.log_c.exp()

    def scoring_c(self, core: Core) -> float | Tensor:
        """The classification geometry: c, or 0 where the loss is the Euclidean ablation."""
        return 0.0 if self.config.loss == "euclidean" else self.c(core)

    def task_core(self, tangents: Float[Tensor, "R V D"]) -> Core:
        """A copy of the starting weights to fit to a task.

        Prototypes, centres and gradients lie in the span of the support rows. Where these are fewer than the features
        and no weights were trained for the features' own axes, the task is fitted in coordinates of that span.
        """
        if self.config.axes == "span" and len(tangents) + 1 < tangents.shape[2] and self.core.is_fresh():
            return self.framed(span_frame(tangents))
        core = copy.deepcopy(self.core)
        core.projection = None  # a task does not change it
        return core

    def framed(self, frame: Float[Tensor, "V D r"]) -> Core:
        """Fresh weights for a task's own coordinates."""
        core = Core(self.config, self.dim, frame=frame)
        core.log_c = copy.deepcopy(self.core.log_c)
        return core

    def tangents(self, batch: Batch, core: Core | None = None) -> Float[Tensor, "R V D"]:
        """Projected, scaled and clipped features of both views, in the frame of a core that has one."""
        stacked = torch.stack([batch.views[view] for view in VIEWS], dim=1)
        if self.core.projection is not None:
            stacked = self.core.projection(stacked)
        clipped = geometry.clip_norm(stacked * self.config.feature_scale, self.config.max_norm)
        return clipped if core is None or core.frame is None else in_frame(clipped, core.frame)

    def adapted(self, core: Core, tangents: Float[Tensor, "*R V D"]) -> Float[Tensor, "*R V D"]:
        return tangents if core.adapter is None else core.adapter(tangents)

    def to_ball(self, core: Core, tangents: Float[Tensor, "*R V D"]) -> Float[Tensor, "*R E"]:
        return geometry.expmap0(tangents.flatten(-2), self.scoring_c(core))

    def moments(self, core: Core, tangents: Float[Tensor, "R V D"], labels: Int[Tensor, "R"], n_way: int) -> Moments:
        """Prototypes and shrunken empirical moments of the coordinates around them (section 1, items 2 and 3)."""
        config, c = self.config, self.c(core)
        h = geometry.expmap0(tangents.flatten(1), c)
        protos = []
        for way in range(n_way):
            own = h[labels == way]
            if config.prototypes == 1 or len(own) == 1:
                protos.append(geometry.einstein_midpoint(own, c)[None].expand(config.prototypes, -1))
            else:
                chosen = geometry.farthest_point_sample(own.detach(), min(config.prototypes, len(own)), c)
                protos.append(own[chosen][torch.arange(config.prototypes, device=h.device) % len(chosen)])
        proto = torch.stack(protos)
        share = F.one_hot(labels, n_way).T.to(h)  # W R
        if config.prototypes > 1:  # a row belongs to the nearest prototype of its class
            distance = geometry.pairwise_dist(h, proto.flatten(0, 1), c).unflatten(1, (n_way, config.prototypes))
            nearest = F.one_hot(distance.argmin(2), config.prototypes).to(h)  # R W P
            member = (share.T[:, :, None] * nearest).flatten(1)  # R WP
        else:
            member = share.T
        count = member.sum(0).clamp_min(1)  # WP
        flat = proto.flatten(0, 1)
        own_proto = member.argmax(1)  # R
        v = geometry.coords(flat[own_proto], h, c)  # R E
        mu = (member.T @ v) / count[:, None]
        centred = v - mu[own_proto]
        variance = (member.T @ centred.square()) / (count[:, None] - 1).clamp_min(1)
        degrees = (count - 1).sum().clamp_min(1)
        pooled = centred.square().sum(0) / degrees
        floor = 1e-4 * config.feature_scale**2 / v.shape[1]
        weight = torch.where(count > 1, 1 - config.shrinkage, 0.0)[:, None]
        variance = (weight * variance + (1 - weight) * pooled).clamp_min(floor)
        shape = (n_way, config.prototypes, -1)
        factor = None
        if config.covariance == "low_rank":
            largest = int(count.max())
            columns = torch.zeros(len(flat), largest, v.shape[1], dtype=v.dtype, device=v.device)
            for i in range(len(flat)):
                rows = centred[own_proto == i] / max(len(centred[own_proto == i]) - 1, 1) ** 0.5
                columns[i, : len(rows)] = rows * (1 - config.shrinkage) ** 0.5
            factor = columns.transpose(1, 2).unflatten(0, (n_way, config.prototypes))
            variance = (config.shrinkage * variance).clamp_min(floor)
        log_scale = 0.5 * variance.log()
        return Moments(proto, mu.view(shape), log_scale.view(shape), factor)

    def evolve(self, core: Core, moments: Moments) -> Moments:
        """Moments carried from t = 0 to 1 by the neural ODE with fixed-step RK4 (eq. 7).

        Raises:
            NumericsError: the solver failed, or its state is not finite.
        """
        if core.ode is None:
            return moments
        scale = self.config.feature_scale  # the network sees coordinates of order one
        start = torch.cat([moments.mu_WPE / scale, moments.log_scale_WPE], -1).flatten(0, 1)
        times = torch.tensor([0.0, 1.0], dtype=start.dtype, device=start.device)
        options = {"step_size": 1 / self.config.ode_steps}
        try:
            end = odeint(core.ode, start, times, method="rk4", options=options)[-1]
        except (AssertionError, RuntimeError) as error:
            raise NumericsError(f"the neural ODE failed (rk4, {options}): {error}") from error
        if not torch.isfinite(end).all():
            raise NumericsError(
                f"the neural ODE left the finite numbers (rk4, {options}, started at norm {float(start.norm()):.3g}, "
                f"config {digest(self.config)[:12]}): lower lr or feature_scale"
            )
        mu, log_scale = end.view(*moments.mu_WPE.shape[:2], -1).chunk(2, dim=-1)
        return Moments(moments.proto_WPE, mu * scale, log_scale, moments.factor_WPER)

    def synthesize(
        self, core: Core, moments: Moments, generator: torch.Generator
    ) -> tuple[Float[Tensor, "W S E"], Float[Tensor, "W S"]]:
        """Reparameterised draws (eq. 4), `n_syn` a class, spread evenly over its prototypes; and d(z, prototype)."""
        config = self.config
        n_way, n_proto, width = moments.mu_WPE.shape
        of = torch.arange(config.n_syn, device=moments.mu_WPE.device) % n_proto
        eps = torch.randn(n_way, config.n_syn, width, generator=generator).to(moments.mu_WPE)
        v = moments.mu_WPE[:, of] + config.noise_scale * moments.log_scale_WPE.exp()[:, of] * eps
        if moments.factor_WPER is not None:
            factor = moments.factor_WPER[:, of]
            noise = torch.randn(n_way, config.n_syn, factor.shape[-1], generator=generator).to(v)
            v = v + config.noise_scale * (factor @ noise[..., None])[..., 0]
        return geometry.from_coords(moments.proto_WPE[:, of], v, self.c(core)), v.norm(dim=-1)

    def points(
        self, core: Core, *tangents: Float[Tensor, "_ V D"]
    ) -> tuple[Float[Tensor, "N V D"], list[Float[Tensor, "_ E"]]]:
        """Adapted tangents of all groups of rows together, and the points of each group on the ball (eq. 8)."""
        adapted = self.adapted(core, torch.cat(tangents))
        return adapted, list(self.to_ball(core, adapted).split([len(t) for t in tangents]))

    def synthetic_means(self, core: Core, evolved: Moments) -> Float[Tensor, "_ V D"]:
        """Tangents f_sd of the synthetic means, one a prototype; none without synthesis."""
        if self.config.adapter != "real+synthetic":
            return evolved.mu_WPE.new_zeros(0, 2, evolved.mu_WPE.shape[2] // 2)
        mean = geometry.from_coords(evolved.proto_WPE, evolved.mu_WPE, self.c(core)).flatten(0, 1)
        return geometry.logmap0(mean, self.c(core)).unflatten(1, (2, -1))

    def centers(
        self,
        core: Core,
        h: Float[Tensor, "R E"],
        means: Float[Tensor, "_ E"],
        radii: Float[Tensor, "R"],
        labels: Int[Tensor, "R"],
        offset: Float[Tensor, "W E"],
    ) -> Float[Tensor, "W E"]:
        """Class centres: midpoint of the adapted real points and the adapted synthetic means, moved by the offset.

        `radii` are the norms of the real points' tangents.
        """
        c, n_way = self.scoring_c(core), len(offset)
        real = F.one_hot(labels, n_way).T.to(h)  # W R
        real = real / real.sum(1, keepdim=True)
        points, weights = h, real
        if len(means):
            per_class = len(means) // n_way
            own = torch.eye(n_way, device=h.device, dtype=h.dtype).repeat_interleave(per_class, 1) / per_class
            points, weights = torch.cat([h, means]), torch.cat([real, own], 1)
        if self.config.center == "frechet":
            middle = geometry.frechet_mean(points.expand(n_way, -1, -1), c, weights)
        else:
            middle = geometry.weighted_midpoints(points, c, weights)
        tangent = geometry.logmap0(middle, c)
        if not self.config.match_radius:
            return geometry.expmap0(tangent + offset, c)
        radius = (real @ radii)[:, None]
        return geometry.expmap0(F.normalize(F.normalize(tangent, dim=1) * radius + offset, dim=1) * radius, c)

    def terms(
        self,
        core: Core,
        tangents: Float[Tensor, "R V D"],
        labels: Int[Tensor, "R"],
        offset: Float[Tensor, "W E"],
        generator: torch.Generator,
        moments: Moments | None = None,
        queries: tuple[Float[Tensor, "Q V D"], Int[Tensor, "Q"]] | None = None,
    ) -> LossTerms:
        """L = L_ce + alpha L_s + beta L_cl (eq. 10). With `queries`, their cross-entropy replaces the support's own."""
        config, n_way = self.config, len(offset)
        evolved = self.evolve(core, self.moments(core, tangents, labels, n_way) if moments is None else moments)
        asked = tangents[:0] if queries is None else queries[0]
        spread = contrast = torch.zeros((), device=tangents.device)
        made = tangents[:0]
        if config.adapter == "real+synthetic":
            z, reach = self.synthesize(core, evolved, generator)
            made = geometry.logmap0(z, self.c(core)).flatten(0, 1).unflatten(1, (2, -1))  # f_sd
            if config.loss == "hdcl" and config.alpha:
                spread = self.spread_loss(core, z, reach)
        means = self.synthetic_means(core, evolved)
        adapted, (h, h_made, h_means, h_asked) = self.points(core, tangents, made, means, asked)
        radii = adapted[: len(h)].flatten(1).norm(dim=1)
        centers = self.centers(core, h, h_means, radii, labels, offset)
        ways = torch.arange(n_way, device=labels.device).repeat_interleave(len(made) // n_way)
        targets = torch.cat([labels if queries is None else queries[1], ways])
        scored = torch.cat([h if queries is None else h_asked, h_made])
        distance = geometry.pairwise_dist(scored, centers, self.scoring_c(core))
        cross_entropy = F.cross_entropy(-distance / config.temperature, targets)
        if config.loss == "hdcl" and config.beta:
            both = geometry.expmap0(adapted[: len(h)], self.c(core))
            contrast = whole_crop_contrast(
                both[:, 0], both[:, 1], labels, self.c(core), config.contrast_temperature, config.contrast_same_class
            )
        total = cross_entropy + config.alpha * spread + config.beta * contrast
        parts = {"ce": cross_entropy, "synthesis": spread, "contrast": contrast, "total": total}
        return LossTerms(total, {name: float(value.detach()) for name, value in parts.items()})

    def spread_loss(self, core: Core, z: Float[Tensor, "W S E"], reach: Float[Tensor, "W S"]) -> Tensor:
        """L_s (eq. 9): hinges that keep synthetic points off their prototype (at distance `reach`) and off one another,
        and, with `max_spread`, not too far out."""
        config = self.config
        loss = F.relu(config.margin - reach).mean()
        if z.shape[1] > 1:
            rows, columns = torch.triu_indices(z.shape[1], z.shape[1], 1, device=z.device)
            apart = geometry.pairwise_dist(z, z, self.c(core))[:, rows, columns]
            loss = loss + F.relu(config.margin - apart).mean()
        if config.max_spread:
            loss = loss + F.relu(reach - config.max_spread * config.margin).mean()
        return loss


def whole_crop_contrast(
    whole: Float[Tensor, "R D"],
    crop: Float[Tensor, "R D"],
    labels: Int[Tensor, "R"],
    c: float | Tensor,
    temperature: float,
    same_class_negatives: bool = False,
) -> Float[Tensor, ""]:
    """L_cl (eq. 11): InfoNCE between the whole image and its own crop, logits -d/tau, both directions."""
    logits = -geometry.pairwise_dist(whole, crop, c) / temperature
    if not same_class_negatives:
        same = labels[:, None] == labels[None, :]
        same = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(labels), device=labels.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def flat_twin(
    config: HypDFSConfig, dim: int, batch: Batch, weights: Mapping[str, Tensor] | None = None
) -> HypDFSConfig:
    """The Euclidean twin at matched distance scale: c = 0, everything else equal.

    At c = 0 distances are 2|u - v| of the tangents; curvature stretches them, more so away from the origin. The lengths
    of the configuration (temperatures, margin) are therefore multiplied by the ratio of mean distances between the
    rows of a batch at c = 0 and at c, before anything is fitted: both see distances of the same size.

    Args:
        weights: what a task starts from, as `HypDFS.start_from` takes them.
    """
    flat = replace(config, curvature=0.0, learn_curvature=False)
    sums = []
    for one in (flat, config):
        model = HypDFS(one, dim)
        if weights is not None:
            model.start_from(weights)
        with torch.no_grad():
            points = model.to_ball(model.core, model.tangents(batch).double())
            sums.append(float(geometry.pairwise_dist(points, points, model.scoring_c(model.core)).sum()))
    lengths = ("temperature", "contrast_temperature", "margin")
    return replace(flat, **{name: getattr(config, name) * sums[0] / sums[1] for name in lengths})


METHODS = {"hypdfs": Method(config=HypDFSConfig, build=HypDFS, hyperbolic=True, flat_twin=flat_twin)}
