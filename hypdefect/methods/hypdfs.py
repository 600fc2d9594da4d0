"""HypDFS: hyperbolic defect feature synthesis for few-shot defect classification (CVPR 2026).

| paper | here |
| --- | --- |
| f_w, f_c (whole and crop features) | `views["whole"]`, `views["crop"]`; their concatenation is f |
| h = exp_0(f) (eq. 1) | `geometry.expmap0` |
| prototypes, "sparse" | `Moments.proto_WPE`, farthest-point sampling |
| P(z | c, h, mu, Sigma) (eq. 5), sampling (eq. 4) | `geometry.WrappedNormal`; `synthesize`, in its coordinates |
| ODE_mu, ODE_Sigma, RK (eq. 7) | `MomentODE`, `torchdiffeq.odeint(method="rk4")` |
| W, f_out = SiLU(W f_in) + f_in (eq. 8) | `ResidualAdapter` |
| L_s, m_d (eq. 9) | `spread_loss`, `margin` |
| L_hdcl = L_ce + alpha L_s + beta L_cl (eq. 10) | `HypDFS.terms`, `alpha`, `beta` |
| L_cl, tau (eq. 11) | `whole_crop_contrast`, `contrast_temperature` |

Deviations. Those with a field in brackets can be undone; docs/experiments.md says what each is worth:
- The conformal factor has a minus sign and the volume term the exponent n-1 (`geometry`): the document's are slips.
- The ball's origin is the mean of the task's class means (`origin="features"`: where the transform leaves it), its unit
  the distance of the task's rows from there (`unit="features"`: the features' own).
- Classes are scored by the signed distance to Poincare hyperplanes (Ganea et al., NeurIPS 2018, eq. 25;
  `head="centers"`: by the distance to class centres, as printed).
- A normal is penalised more along directions in which points of one class differ (`spread_penalty=0`: alike).
- A task is one batch, fitted by L-BFGS on noise drawn once, where the paper takes AdamW steps of 1e-4, which hardly
  move anything. Penalties on hyperplanes, adapter and ODE keep them near where they start. The head is fitted alone
  first, then all parts.
- Class centres may move, lie at the mean radius of their points (`match_radius=False`: where the midpoint
  sinks to), and their midpoint counts synthetic means as much as all real rows together.
- The covariance is that of the rows round their prototypes, shared between the classes in part, and not diagonal
  (`covariance="diagonal"`): its factor are the rows themselves.
- Synthetic points count as one image more of each class, however many there are (`synthesis_weight` over K).
- The margin counts in units of the class's own spread: a length of 1 means nothing where points lie 3 to 6 apart.
- W is shared by the two views, which makes whole and crop comparable in L_cl, and has rank 32 (`adapter_rank=0`: full).
- Meta-training scores by class centres, tasks by hyperplanes. It also learns from how likely queries are under their
  class's evolved normal with a diagonal covariance (`density=0`: not); synthetic points combine rows.
- Real and synthetic features are stacked along the sample axis: along channels a query would lack its synthetic half.
- A task is fitted in coordinates of its support rows' span (`axes="features"`: all features), several times faster.
  Both views have one frame, so that distances between them stay what they are.

Shapes: R rows, S synthetic points of a class, W ways, P prototypes a class, D features of one view, E = 2 D, Q queries.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn
from torchdiffeq import odeint

from hypdefect import geometry
from hypdefect.config import digest
from hypdefect.errors import ConfigError, NumericsError
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.methods.support import by_image, check_every_class, class_means, span_basis
from hypdefect.types import VIEWS, Batch, Episode, LossTerms, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class HypDFSConfig:
    """Every ablation of the paper is one field."""

    curvature: float = 0.05
    """c >= 0, sectional curvature -c; 0 is the Euclidean twin."""
    learn_curvature: bool = False
    """Train c with the rest, starting from `curvature` (> 0)."""
    origin: Literal["classes", "features"] = "classes"
    """What the ball's origin stands for: the mean of the task's class means, or what the features' transform left."""
    feature_scale: float = 1.0
    """Length of a view's rows before the exponential map, in the `unit`."""
    unit: Literal["rows", "features"] = "rows"
    """What a length of 1 stands for: the root mean square distance of the task's support rows from the origin, or a
    length of 1 of the features. Rows of some features differ by a sixth of their length, others by all of it; in their
    own unit penalties, curvature and clipping mean the same for all."""
    max_norm: float = 10.0
    """Tangent vectors are clipped to this norm (feature clipping)."""
    prototypes: int = 1
    """P, prototypes a class from which features are synthesised; 1 is the class midpoint."""
    center: Literal["einstein", "frechet"] = "einstein"
    """Midpoint of a class: closed-form, or iterated Karcher mean."""
    head: Literal["hyperplanes", "centers"] = "hyperplanes"
    """What a class is scored by: the signed distance to its Poincare hyperplane, or minus that to its centre."""
    penalty: float = 2.0
    """Weight of half the squared length of the hyperplanes' normals (of the centres' offsets), against the sum of the
    rows' cross-entropies: few rows are held more."""
    spread_penalty: float = 20.0
    """How much more a normal's length counts along directions in which points of one class differ: its square is
    <a, (1 + spread_penalty S / tr S) a>, S the pooled covariance of the rows round their class means."""
    match_radius: bool = True
    """Of centres: put each at the mean radius of its real points. A midpoint of K scattered points sinks towards the
    origin, by an amount that depends on K and on the scatter, and then attracts too few or too many queries."""
    synthesis: bool = True
    """Draw synthetic points from the wrapped normals and train on them."""
    n_syn: int = 8
    """Synthetic points a class, drawn once a task."""
    synthesis_weight: float = 1.0
    """Weight of the synthetic points' cross-entropy, over K, beside that of the real rows: they count as one image more
    of each class. Many images need them less. In meta-training, whose queries are real, it is not over K."""
    noise_scale: float = 1.0
    """Multiplies the standard deviation of the wrapped normal; at 0 every synthetic point is a mean, and L_s is 0."""
    shrinkage: float = 0.5
    """Share of the covariance pooled over classes in each class's own (1: all pooled)."""
    covariance: Literal["rows", "diagonal"] = "rows"
    """rows: noise is a random combination of the rows round their prototypes; diagonal: coordinates are independent."""
    axes: Literal["span", "features"] = "span"
    """What a task is fitted along: principal directions of its support rows, where these are fewer than the features
    and nothing was trained for the features' own axes; or these axes."""
    ode: Literal["fc", "sa", "none"] = "fc"
    """Network of the neural ODE: fully connected, self-attention across classes, or plain moments."""
    ode_steps: int = 1
    """Runge-Kutta steps from 0 to 1; 0 is plain moments."""
    ode_hidden: int = 32
    ode_penalty: float = 1.0
    """Weight of half the squared distance of the ODE's weights from where a task starts."""
    adapter: bool = True
    """Adapt features, real and synthetic ones, by the residual adapter."""
    adapter_rank: int = 32
    """Rank of W; 0 is a full matrix."""
    adapter_penalty: float = 1.0
    """Weight of half the squared distance of W from where a task starts."""
    loss: Literal["euclidean", "hyperbolic", "hdcl"] = "hdcl"
    """Cross-entropy on Euclidean distances, on hyperbolic ones, or with the synthesis and contrast terms."""
    alpha: float = 0.1
    """Weight of the synthesis term L_s. What it moves is the ODE."""
    beta: float = 0.1
    """Weight of the whole-to-crop contrast L_cl. What it moves is the adapter."""
    margin: float = 1.0
    """m_d in units of the class's spread at the start: synthetic points stay this far from their prototype, and sqrt(2)
    times as far from one another."""
    max_spread: float = 2.0
    """Synthetic points stay within this multiple of the margin of their prototype; 0 leaves them free."""
    density: float = 0.1
    """Weight, in meta-training alone, of the queries' negative log likelihood a coordinate under their class's evolved
    wrapped normal: how the ODE learns what a few rows do not show of a class's spread."""
    temperature: float = 0.3
    """Divides distances to class centres, by which meta-training scores whatever `head` is. Hyperplanes have their
    `penalty` instead."""
    contrast_temperature: float = 0.3
    """tau of the contrast (eq. 11)."""
    contrast_same_class: bool = False
    """Count other images of the same class as negatives in the contrast."""
    steps: int = 10
    """Most L-BFGS iterations of the head alone, and as many of all parts; 0 uses the starting weights as they are."""
    seed: int = 0

    def __post_init__(self) -> None:
        geometry.validate_curvature(self.curvature)
        require_positive(self, "feature_scale", "max_norm", "temperature", "contrast_temperature")
        require_at_least(self, 0, "noise_scale", "alpha", "beta", "margin", "max_spread", "synthesis_weight", "density")
        require_at_least(
            self, 0, "penalty", "spread_penalty", "adapter_penalty", "ode_penalty", "ode_steps", "steps", "adapter_rank"
        )
        require_at_least(self, 1, "prototypes", "n_syn", "ode_hidden")
        require_share(self, "shrinkage")
        if self.learn_curvature and self.curvature == 0:
            raise ConfigError("method.learn_curvature needs a curvature above 0 to start from")


@dataclass(frozen=True, slots=True)
class Moments:
    """Prototypes of each class and the state (mean, log standard deviation) of the wrapped normal at each of them.

    The covariance is sum_r share_r v_r v_r^T with `rows_RE` the coordinates v of the rows round their means, None for
    a diagonal one.
    """

    proto_WPE: Tensor
    mu_WPE: Tensor
    log_scale_WPE: Tensor
    rows_RE: Tensor | None
    share_WPR: Tensor


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard normal numbers of the synthetic points: of their coordinates, and of the rows they combine."""

    coords_WSE: Tensor
    rows_WSR: Tensor | None

    @classmethod
    def draw(cls, moments: Moments, n_syn: int, generator: torch.Generator) -> "Noise":
        """`generator` is one of the CPU: the same numbers on every device."""
        n_way, like = len(moments.mu_WPE), moments.mu_WPE
        coords = torch.randn(n_way, n_syn, like.shape[2], generator=generator).to(like)
        if moments.rows_RE is None:
            return cls(coords, None)
        return cls(coords, torch.randn(n_way, n_syn, len(moments.rows_RE), generator=generator).to(like))


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

    A core with a `frame` works in a task's own coordinates (`in_frame`), one with an `origin` on rows minus it, and one
    with a `length` on these over it.
    """

    frame: Tensor | None
    origin: Tensor | None
    length: Tensor | None

    def __init__(
        self,
        config: HypDFSConfig,
        dim: int,
        projection: Projection | None = None,
        frame: Float[Tensor, "D r"] | None = None,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.register_buffer("frame", frame)
        self.register_buffer("origin", None)
        self.register_buffer("length", None)
        if projection is not None:
            dim = projection.dim
        if frame is not None:
            dim = frame.shape[1] + 1
        generator = torch.Generator().manual_seed(config.seed)
        wants_ode = config.synthesis and config.ode != "none" and config.ode_steps > 0
        self.adapter = ResidualAdapter(dim, config.adapter_rank, generator) if config.adapter else None
        self.ode = MomentODE(2 * dim, config.ode_hidden, config.ode, generator) if wants_ode else None  # type: ignore[arg-type]
        self.log_c = nn.Parameter(torch.tensor(config.curvature).log()) if config.learn_curvature else None

    def is_fresh(self) -> bool:
        """Whether adapter and ODE change nothing yet: then no coordinates are special to them."""
        last: list[Tensor] = [] if self.adapter is None else [self.adapter.up]
        last += [] if self.ode is None else [self.ode.leave.weight, self.ode.leave.bias]
        return not any(bool(x.any()) for x in last)


def joint_frame(tangents: Float[Tensor, "R V D"]) -> Float[Tensor, "D r"]:
    """Orthonormal principal directions of the rows of all views together, by decreasing variance."""
    frame = span_basis(tangents.flatten(0, 1).double())
    largest = frame.abs().argmax(0, keepdim=True)
    return (frame * frame.gather(0, largest).sign()).to(tangents)  # one sign, on every machine


def in_frame(tangents: Float[Tensor, "*R D"], frame: Float[Tensor, "D r"]) -> Float[Tensor, "*R r1"]:
    """Coordinates in a frame, and the length of what lies outside of it.

    Norms, and distances to all points of the frame's span, are those of the rows themselves.
    """
    x = tangents @ frame
    outside = tangents - x @ frame.T
    return torch.cat([x, outside.norm(dim=-1, keepdim=True)], -1)


class Hyperplanes(nn.Module):
    """Poincare hyperplanes, one a class: the one of class k has normal a_k and foot exp_0(b_k a_k / |a_k|).

    Logits are |a_k| d(h, H_k), signed: multinomial logistic regression in the ball (Ganea et al., "Hyperbolic Neural
    Networks", NeurIPS 2018, eq. 25, without its factor lambda_p); at c = 0 they are 2 (<a_k, h> - b_k |a_k|).
    """

    axes: Tensor
    shrink: Tensor

    def __init__(self, means_WE: Float[Tensor, "W E"], rows_RE: Float[Tensor, "R E"], spread_penalty: float) -> None:
        """Starts at small normals from the mean of the class means towards each of them.

        Args:
            rows_RE: rows round the means of their classes, whose covariance `spread_penalty` counts.
        """
        super().__init__()
        _, lengths, axes = torch.linalg.svd(rows_RE, full_matrices=False)
        share = lengths.square() / lengths.square().sum().clamp_min(1e-30)  # of S in tr S; single rows do not vary
        self.register_buffer("axes", axes.T)
        self.register_buffer("shrink", 1 - (1 + spread_penalty * share).rsqrt())
        self.free_WE = nn.Parameter(0.1 * (means_WE - means_WE.mean(0)))
        self.offset_W = nn.Parameter(means_WE.new_zeros(len(means_WE)))

    def forward(self, h: Float[Tensor, "N E"], c: float | Tensor) -> Float[Tensor, "N W"]:
        return hyperplane_scores(h, self.normals(), self.offsets(), c)

    def normals(self) -> Float[Tensor, "W E"]:
        """(1 + spread_penalty S / tr S)^(-1/2) of what is fitted, whose plain length the penalty then counts."""
        return self.free_WE - ((self.free_WE @ self.axes) * self.shrink) @ self.axes.T

    def offsets(self) -> Float[Tensor, "W"]:
        """Distances with mean 0: hyperplanes that all move out alike would steepen their logits at no penalty."""
        return self.offset_W - self.offset_W.mean()


def hyperplane_scores(
    h: Float[Tensor, "N E"], normal: Float[Tensor, "W E"], offset: Float[Tensor, "W"], c: float | Tensor
) -> Float[Tensor, "N W"]:
    length = normal.norm(dim=1)
    feet = geometry.expmap0(offset[:, None] * F.normalize(normal, dim=1), c)
    return length * geometry.hyperplane_dist(h, feet, normal, c)


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
        self.classes: dict[str, Tensor] = {}
        """Of a fitted task: `normal` [W E] and `offset` [W] of its hyperplanes, or its `centers` [W E]."""
        self.last_loss: LossTerms | None = None

    # -- the FewShotClassifier protocol ------------------------------------------------------------------------------

    def adapt(self, support: Batch, n_way: int) -> None:
        """Fit to a support set from the starting weights (a second call starts afresh).

        Raises:
            DataError: a class without support rows. NumericsError: the loss or the ODE left the finite numbers.
        """
        check_every_class(support, n_way)
        support = by_image(support)  # noise belongs to rows: the same, whatever their order
        config, device, labels = self.config, support.labels.device, support.labels
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            core = self.task_core(support, n_way).to(device).double()
            tangents = self.tangents(support, core)
            moments = self.moments(core, tangents, labels, n_way)
            noise = Noise.draw(moments, config.n_syn, generator)
        shots = len(set(support.image_ids)) / n_way
        f = tangents.flatten(1)
        head: Hyperplanes | Tensor = torch.zeros(n_way, f.shape[1], dtype=f.dtype, device=device, requires_grad=True)
        if config.head == "hyperplanes":
            means = class_means(f, labels, n_way)
            head = Hyperplanes(means, f - means[labels], config.spread_penalty)
        start = [(p, p.detach().clone(), weight) for p, weight in self.penalised(core)]
        own = list(head.parameters()) if isinstance(head, Hyperplanes) else [head]

        def objective() -> LossTerms:
            now = self.moments(core, tangents, labels, n_way) if config.learn_curvature else moments
            terms = self.terms(core, tangents, labels, now, noise, head, shots=shots)
            size = (head.free_WE if isinstance(head, Hyperplanes) else head).square().sum()
            held = sum((weight * (p - p0).square().sum() for p, p0, weight in start), torch.zeros_like(size))
            return LossTerms(terms.total + (config.penalty / len(tangents) * size + held) / 2, terms.parts)

        if config.steps:
            minimize(own, objective, config.steps)  # alone first: the ODE runs ahead of a head that is still on its way
            self.last_loss = minimize([*core.parameters(), *own], objective, config.steps)
        with torch.no_grad():
            if isinstance(head, Hyperplanes):
                classes = {"normal": head.normals(), "offset": head.offsets()}
            else:
                evolved = self.evolve(core, self.moments(core, tangents, labels, n_way))
                classes = {"centers": self.centers(core, tangents, labels, evolved, head)}
        total = torch.zeros(()) if self.last_loss is None else self.last_loss.total
        if not all(bool(torch.isfinite(x).all()) for x in (total, *core.parameters(), *classes.values())):
            raise NumericsError(
                f"the fit left the finite numbers (loss {self.last_loss and self.last_loss.parts}); curvature "
                f"{config.curvature}, config {digest(config)[:12]}: lower feature_scale or noise_scale"
            )
        self.fitted, self.classes = core.requires_grad_(False), classes

    @torch.no_grad()
    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Scores in float64, by the rule the loss trains.

        Raises:
            RuntimeError: called before `adapt`.
        """
        if self.fitted is None:
            raise RuntimeError("HypDFS.logits needs adapt() first")
        core, classes = self.fitted, self.classes
        h = self.to_ball(core, self.adapted(core, self.tangents(query, core)))
        if "centers" in classes:
            return -geometry.pairwise_dist(h, classes["centers"], self.scoring_c(core)) / self.config.temperature
        return hyperplane_scores(h, classes["normal"], classes["offset"], self.scoring_c(core))

    def export(self) -> dict[str, Tensor]:
        """Every tensor a fitted classifier needs, for `restore`."""
        if self.fitted is None:
            raise RuntimeError("HypDFS.export needs adapt() first")
        state = {f"core.{name}": value.detach().cpu() for name, value in self.fitted.state_dict().items()}
        return state | {f"classes.{name}": value.cpu() for name, value in self.classes.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become the classifier that `export` described.

        Raises:
            KeyError: the tensors are of an earlier version of HypDFS, which scored otherwise.
        """
        classes = {k.removeprefix("classes."): v for k, v in tensors.items() if k.startswith("classes.")}
        if not classes:
            raise KeyError("no classes.* among the tensors: published by an earlier version; fit and publish it again")
        frame = tensors.get("core.frame")
        core = copy.deepcopy(self.core) if frame is None else self.framed(torch.empty_like(frame))
        core.projection = None
        for name in ("origin", "length"):
            if f"core.{name}" in tensors:
                setattr(core, name, torch.empty_like(tensors[f"core.{name}"]))
        core = core.double()  # as fitted: weights loaded before this would be rounded
        core.load_state_dict({k.removeprefix("core."): v for k, v in tensors.items() if k.startswith("core.")})
        self.fitted = core.requires_grad_(False)
        # in memory of their own: sums of tensors that lie askew in a file's buffer differ in the last bits
        self.classes = {name: value.to(torch.float64, copy=True) for name, value in classes.items()}

    # -- meta-training -----------------------------------------------------------------------------------------------

    def loss(self, item: Episode, generator: torch.Generator) -> LossTerms:
        """Cross-entropy of an episode's queries against centres made from its support, plus the support's own terms."""
        n_way, labels = len(item.class_names), item.support.labels
        rows = self.projected(item.support)
        origin = self.origin_of(rows, labels, n_way)
        length = self.length_of(rows, origin)
        tangents = self.scaled(rows, origin, length)
        queries = (self.scaled(self.projected(item.query), origin, length), item.query.labels)
        moments = self.moments(self.core, tangents, labels, n_way)
        noise = Noise.draw(moments, self.config.n_syn, generator)
        offset = tangents.new_zeros(n_way, tangents[0].numel())
        terms = self.terms(self.core, tangents, labels, moments, noise, offset, queries)
        if self.core.ode is None or not self.config.density:
            return terms
        unlikely = self.surprise(self.core, moments, *queries)
        total = terms.total + self.config.density * unlikely
        return LossTerms(total, terms.parts | {"density": float(unlikely.detach()), "total": float(total.detach())})

    def surprise(
        self, core: Core, moments: Moments, queries: Float[Tensor, "Q V D"], labels: Int[Tensor, "Q"]
    ) -> Float[Tensor, ""]:
        """Mean -log p(z) a coordinate of queries under the likeliest evolved wrapped normal of their class (eq. 5)."""
        evolved, c = self.evolve(core, moments), self.c(core)
        normal = geometry.WrappedNormal(
            h=evolved.proto_WPE[labels], mu=evolved.mu_WPE[labels], log_scale=evolved.log_scale_WPE[labels], c=c
        )
        z = geometry.expmap0(queries.flatten(1), c)
        return -normal.log_prob(z[:, None]).amax(1).mean().to(z) / z.shape[1]

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

    def penalised(self, core: Core) -> list[tuple[Tensor, float]]:
        """What is held near its start, and how strongly."""
        held: list[tuple[Tensor, float]] = []
        if core.adapter is not None:
            held += [(p, self.config.adapter_penalty) for p in core.adapter.parameters()]
        if core.ode is not None:
            held += [(p, self.config.ode_penalty) for p in core.ode.parameters()]
        return held

    def task_core(self, support: Batch, n_way: int) -> Core:
        """A copy of the starting weights to fit to a task.

        What is fitted lies in the span of the support rows. Where these are fewer than the features and no weights were
        trained for the features' own axes, the task is fitted in coordinates of that span.

        Raises:
            NumericsError: a row is not finite.
        """
        rows = self.projected(support)
        if not torch.isfinite(rows).all():
            raise NumericsError("features of the support are not finite")
        origin = self.origin_of(rows, support.labels, n_way)
        length = self.length_of(rows, origin)
        if self.config.axes == "span" and 2 * len(rows) + 1 < rows.shape[2] and self.core.is_fresh():
            core = self.framed(joint_frame(self.scaled(rows, origin, length)))
        else:
            core = copy.deepcopy(self.core)
            core.projection = None  # a task does not change it
        core.origin, core.length = origin, length
        return core

    def framed(self, frame: Float[Tensor, "D r"]) -> Core:
        """Fresh weights for a task's own coordinates."""
        core = Core(self.config, self.dim, frame=frame)
        core.log_c = copy.deepcopy(self.core.log_c)
        return core

    def projected(self, batch: Batch) -> Float[Tensor, "R V D"]:
        """Features of both views, behind the projection where there is one."""
        stacked = torch.stack([batch.views[view] for view in VIEWS], dim=1)
        return stacked if self.core.projection is None else self.core.projection(stacked)

    def origin_of(self, rows: Float[Tensor, "R V D"], labels: Int[Tensor, "R"], n_way: int) -> Tensor | None:
        """`[V D]`, the mean of the class means of a task's support rows."""
        return class_means(rows, labels, n_way).mean(0) if self.config.origin == "classes" else None

    def length_of(self, rows: Float[Tensor, "R V D"], origin: Tensor | None) -> Float[Tensor, ""] | None:
        """Root mean square distance of a task's support rows from its origin; None where they all lie there."""
        if self.config.unit == "features":
            return None
        moved = rows if origin is None else rows - origin
        length, least = (x.square().sum(-1).mean().sqrt() for x in (moved, 1e-6 * rows))
        return length if length > least else None

    def scaled(
        self, rows: Float[Tensor, "R V D"], origin: Tensor | None, length: Tensor | None = None
    ) -> Float[Tensor, "R V D"]:
        """Tangents at the ball's origin: rows seen from the task's origin, scaled and clipped."""
        moved = rows if origin is None else rows - origin
        scale = self.config.feature_scale if length is None else self.config.feature_scale / length
        return geometry.clip_norm(moved * scale, self.config.max_norm)

    def tangents(self, batch: Batch, core: Core) -> Float[Tensor, "R V D"]:
        """Tangents of a batch as a task's core sees them, in float64, in its frame where it has one."""
        rows = self.scaled(self.projected(batch).double(), core.origin, core.length)
        return rows if core.frame is None else in_frame(rows, core.frame)

    def adapted(self, core: Core, tangents: Float[Tensor, "*R V D"]) -> Float[Tensor, "*R V D"]:
        return tangents if core.adapter is None else core.adapter(tangents)

    def to_ball(self, core: Core, tangents: Float[Tensor, "*R V D"]) -> Float[Tensor, "*R E"]:
        return geometry.expmap0(tangents.flatten(-2), self.scoring_c(core))

    def moments(self, core: Core, tangents: Float[Tensor, "R V D"], labels: Int[Tensor, "R"], n_way: int) -> Moments:
        """Prototypes and shrunken empirical moments of the coordinates around them (section 1, items 2 and 3)."""
        config, c = self.config, self.c(core)
        h = geometry.expmap0(tangents.flatten(1), c)
        share = F.one_hot(labels, n_way).T.to(h)  # W R
        protos = []
        for way in range(n_way):
            own = h[labels == way]
            if config.prototypes == 1 or len(own) == 1:
                middle = self.middle(own, torch.ones_like(own[None, :, 0]), c)
                protos.append(middle.expand(config.prototypes, -1))
            else:
                chosen = geometry.farthest_point_sample(own.detach(), min(config.prototypes, len(own)), c)
                protos.append(own[chosen][torch.arange(config.prototypes, device=h.device) % len(chosen)])
        proto = torch.stack(protos)
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
        pooled = 1 / (count - 1).sum().clamp_min(1)
        weight = torch.where(count > 1, 1 - config.shrinkage, 0.0)[:, None].to(h)
        shares = weight * member.T / (count - 1).clamp_min(1)[:, None] + (1 - weight) * pooled  # WP R
        variance = shares @ centred.square() + self.floor(v)
        shape = (n_way, config.prototypes, -1)
        rows = centred if config.covariance == "rows" else None
        return Moments(proto, mu.view(shape), 0.5 * variance.log().view(shape), rows, shares.view(shape))

    def floor(self, v: Float[Tensor, "_ E"]) -> float:
        """Variance that every coordinate has at least: of all together a hundredth of a feature's length, squared."""
        return 1e-4 * self.config.feature_scale**2 / v.shape[1]

    def middle(self, h: Float[Tensor, "N E"], weights: Float[Tensor, "W N"], c: float | Tensor) -> Float[Tensor, "W E"]:
        """Midpoints of the same points, one per row of weights."""
        if self.config.center == "frechet":
            return geometry.frechet_mean(h.expand(len(weights), -1, -1), c, weights)
        return geometry.weighted_midpoints(h, c, weights)

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
                f"the neural ODE left the finite numbers (rk4, {options}, started at norm "
                f"{float(start.detach().norm()):.3g}, config {digest(self.config)[:12]}): "
                "raise ode_penalty, or lower feature_scale"
            )
        mu, log_scale = end.view(*moments.mu_WPE.shape[:2], -1).chunk(2, dim=-1)
        return replace(moments, mu_WPE=mu * scale, log_scale_WPE=log_scale)

    def synthesize(
        self, core: Core, moments: Moments, evolved: Moments, noise: Noise
    ) -> tuple[Float[Tensor, "W S E"], Float[Tensor, "W S"]]:
        """Reparameterised draws (eq. 4), `n_syn` a class, spread evenly over its prototypes; and d(z, prototype).

        Rows are combined as they lie round their prototypes, and stretched by what the ODE did to each coordinate.
        """
        n_proto, n_syn = evolved.mu_WPE.shape[1], noise.coords_WSE.shape[1]
        of = torch.arange(n_syn, device=evolved.mu_WPE.device) % n_proto
        if moments.rows_RE is None or noise.rows_WSR is None:
            around = evolved.log_scale_WPE.exp()[:, of] * noise.coords_WSE
        else:
            around = (noise.rows_WSR * moments.share_WPR.sqrt()[:, of]) @ moments.rows_RE
            around = around + self.floor(moments.rows_RE) ** 0.5 * noise.coords_WSE
            around = around * (evolved.log_scale_WPE - moments.log_scale_WPE).exp()[:, of]
        v = evolved.mu_WPE[:, of] + self.config.noise_scale * around
        return geometry.from_coords(evolved.proto_WPE[:, of], v, self.c(core)), v.norm(dim=-1)

    def centers(
        self,
        core: Core,
        tangents: Float[Tensor, "R V D"],
        labels: Int[Tensor, "R"],
        evolved: Moments,
        offset: Float[Tensor, "W E"],
    ) -> Float[Tensor, "W E"]:
        """Class centres: midpoint of the adapted real points and the adapted synthetic means, moved by the offset."""
        c, n_way = self.scoring_c(core), len(offset)
        adapted = self.adapted(core, tangents)
        radii = adapted.flatten(1).norm(dim=1)
        points = self.to_ball(core, adapted)
        real = F.one_hot(labels, n_way).T.to(points)  # W R
        real = weights = real / real.sum(1, keepdim=True)
        if self.config.synthesis:
            mean = geometry.from_coords(evolved.proto_WPE, evolved.mu_WPE, self.c(core)).flatten(0, 1)
            means = geometry.logmap0(mean, self.c(core)).unflatten(1, (2, -1))
            per_class = len(means) // n_way
            own = torch.eye(n_way, device=points.device, dtype=points.dtype).repeat_interleave(per_class, 1) / per_class
            points = torch.cat([points, self.to_ball(core, self.adapted(core, means))])
            weights = torch.cat([real, own], 1)
        tangent = geometry.logmap0(self.middle(points, weights, c), c)
        if not self.config.match_radius:
            return geometry.expmap0(tangent + offset, c)
        radius = (real @ radii)[:, None]
        return geometry.expmap0(F.normalize(F.normalize(tangent, dim=1) * radius + offset, dim=1) * radius, c)

    def terms(
        self,
        core: Core,
        tangents: Float[Tensor, "R V D"],
        labels: Int[Tensor, "R"],
        moments: Moments,
        noise: Noise,
        head: Hyperplanes | Float[Tensor, "W E"],
        queries: tuple[Float[Tensor, "Q V D"], Int[Tensor, "Q"]] | None = None,
        shots: float = 1.0,
    ) -> LossTerms:
        """L = L_ce + alpha L_s + beta L_cl (eq. 10). With `queries`, their cross-entropy replaces the support's own.

        Args:
            head: what classes are scored by: hyperplanes, or centres moved by these offsets.
            shots: images a class beside which the synthetic points count as `synthesis_weight` of one.
        """
        config, n_way = self.config, len(moments.mu_WPE)
        evolved = self.evolve(core, moments)
        spread = contrast = torch.zeros((), dtype=tangents.dtype, device=tangents.device)
        scored, targets = (tangents, labels) if queries is None else queries
        adapted, made = self.adapted(core, scored), scored[:0]
        if config.synthesis:
            z, reach = self.synthesize(core, moments, evolved, noise)
            made = geometry.logmap0(z, self.c(core)).flatten(0, 1).unflatten(1, (2, -1))  # f_sd
            made = self.adapted(core, made)
            if config.loss == "hdcl" and config.alpha and config.noise_scale:
                unit = config.noise_scale * (2 * moments.log_scale_WPE).exp().sum(2).sqrt()  # W P
                spread = spread_loss(z, reach, unit, self.c(core), config.margin, config.max_spread)
        h = self.to_ball(core, torch.cat([adapted, made]))
        if isinstance(head, Hyperplanes):
            scores = head(h, self.scoring_c(core))
        else:
            centers = self.centers(core, tangents, labels, evolved, head)
            scores = -geometry.pairwise_dist(h, centers, self.scoring_c(core)) / config.temperature
        cross_entropy = F.cross_entropy(scores[: len(targets)], targets)
        if config.synthesis:
            ways = torch.arange(n_way, device=labels.device).repeat_interleave(config.n_syn)
            weight = config.synthesis_weight / shots
            cross_entropy = (cross_entropy + weight * F.cross_entropy(scores[len(targets) :], ways)) / (1 + weight)
        if config.loss == "hdcl" and config.beta:
            both = geometry.expmap0(adapted if queries is None else self.adapted(core, tangents), self.c(core))
            contrast = whole_crop_contrast(
                both[:, 0], both[:, 1], labels, self.c(core), config.contrast_temperature, config.contrast_same_class
            )
        total = cross_entropy + config.alpha * spread + config.beta * contrast
        parts = {"ce": cross_entropy, "synthesis": spread, "contrast": contrast, "total": total}
        return LossTerms(total, {name: float(value.detach()) for name, value in parts.items()})


@cache
def blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def minimize(parameters: Sequence[Tensor], objective: Callable[[], LossTerms], steps: int) -> LossTerms:
    """L-BFGS in place (scipy's L-BFGS-B, whose line search does not run away), in float64; the terms at its end.

    Raises:
        NumericsError: the objective raises it where it ends, as it does where it starts there.
    """
    sizes = [p.numel() for p in parameters]

    def put(x: np.ndarray) -> None:
        with torch.no_grad():
            for p, values in zip(parameters, torch.from_numpy(x).split(sizes), strict=True):
                p.copy_(values.view_as(p))

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        put(x)
        try:
            total = objective().total
        except NumericsError:
            total = torch.tensor(math.nan)
        if not torch.isfinite(total):  # a step too far: the line search comes back from there
            return 1e10, np.zeros_like(x)
        slopes = torch.autograd.grad(total, list(parameters), allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)]
        return float(total.detach()), torch.cat([g.flatten() for g in flat]).double().cpu().numpy()

    start = torch.cat([p.detach().flatten() for p in parameters]).double().cpu().numpy()
    options = {"maxiter": steps, "maxfun": 2 * steps + 1, "ftol": 1e-12, "gtol": 1e-8}
    with blas().limit(limits=1):  # its vectors are short: threads would spend three times the CPU time
        found = scipy.optimize.minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options=options)
    put(found.x)
    with torch.no_grad():
        return objective()


def spread_loss(
    z: Float[Tensor, "W S E"],
    reach: Float[Tensor, "W S"],
    unit: Float[Tensor, "W P"],
    c: float | Tensor,
    margin: float,
    max_spread: float = 0.0,
) -> Float[Tensor, ""]:
    """L_s (eq. 9): hinges that keep synthetic points off their prototype (at distance `reach`) and off one another and,
    with `max_spread`, not too far out.

    Args:
        unit: of each prototype, the length that `margin` counts; two points of it lie sqrt(2) units apart on average.
    """
    unit = unit[:, torch.arange(z.shape[1], device=z.device) % unit.shape[1]]
    loss = F.relu(margin - reach / unit).mean()
    if z.shape[1] > 1:
        rows, columns = torch.triu_indices(z.shape[1], z.shape[1], 1, device=z.device)
        apart = geometry.pairwise_dist(z, z, c)[:, rows, columns]
        loss = loss + F.relu(margin - apart / (unit[:, rows].square() + unit[:, columns].square()).sqrt()).mean()
    if max_spread:
        loss = loss + F.relu(reach / unit - max_spread * margin).mean()
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

    At c = 0 distances are 2|u - v| of the tangents; curvature stretches them, more so away from the origin. The
    temperatures are therefore multiplied by the ratio of mean distances between the rows of a batch at c = 0 and at c,
    before anything is fitted, and the penalty on hyperplanes by its square: normals that are longer by as much score
    alike. Both see distances of the same size.

    Args:
        weights: what a task starts from, as `HypDFS.start_from` takes them.
    """
    flat = replace(config, curvature=0.0, learn_curvature=False)
    n_way = int(batch.labels.max()) + 1
    sums = []
    for one in (flat, config):
        model = HypDFS(one, dim)
        if weights is not None:
            model.start_from(weights)
        with torch.no_grad():
            rows = model.projected(batch).double()
            origin = model.origin_of(rows, batch.labels, n_way)
            tangents = model.scaled(rows, origin, model.length_of(rows, origin))
            points = model.to_ball(model.core, tangents)
            sums.append(float(geometry.pairwise_dist(points, points, model.scoring_c(model.core)).sum()))
    ratio = sums[0] / sums[1]
    return replace(
        flat,
        temperature=config.temperature * ratio,
        contrast_temperature=config.contrast_temperature * ratio,
        penalty=config.penalty * (ratio**2 if config.head == "hyperplanes" else 1),
    )


METHODS = {"hypdfs": Method(config=HypDFSConfig, build=HypDFS, hyperbolic=True, flat_twin=flat_twin)}
