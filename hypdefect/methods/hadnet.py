"""HADNet: hyperbolic feature filtering, and which pixels are which defect; Feng et al., Sci. Rep. 15, 25668 (2025).

| paper | here |
| --- | --- |
| HST: maps of several scales to the ball of curvature rho, distances to hyperplanes (eq. 3, 7) | `HyperbolicScores` |
| AFSS: channels whose squared difference of an image and its painted copy is like the mask and like the distance to a
  hyperplane (eq. 8 to 10), chosen once | `HADNet.begin`, `selection_losses`, buffers `channels_i` |
| reconstruction by an autoencoder per scale, residual gamma = phi - Phi | `AutoEncoder` |
| ARD: the s/2 largest channels of each image by global maximum and by average (eq. 11 to 13) | `largest_channels` |
| discriminator with C + 1 outputs | `HADNet.discriminator` |
| teacher and student | `HADNet.loss` |

At rho = 0 the distances are Euclidean, and the network is its own twin.

Deviations, with their reasons. The residuals of a scale are brought to `width` / 2 channels and are upsampled with
the maps, so that a CPU can hold them; ARD looks at them between the two, at their absolute values. ARD keeps the chosen
channels where they are and sets the others to 0: sorted by size, as printed (`ard="sorted"`), channels lose what they
stand for, which costs 3.8 +- 3.4 points on NEU-Seg (docs/experiments.md). The discriminator also sees the maps, by a
feature pyramid, and the distances of HST, which are added to its answer: else HST would act on the choice of channels
alone. AFSS needs a hyperplane before there is a trained one: it takes the one half way between the mean of painted and
that of other locations. The stem, two stages and all depthwise filters of the network stay as they are (`frozen`,
`depthwise`): that is faster, and NEU-Seg loses nothing by it. Where the paper does not say, the autoencoders' own loss
is of background alone, and the teacher is the pretrained network.

Further deviations:

- HST acts on the sum of the pyramid and the residuals, not on each scale; it has C + 1 hyperplanes, one of background.
- AFSS brings the mask to each scale's grid, not the difference to the size of the score map.
- The teacher's term has weight 0 by default: it showed no gain (docs/experiments.md).
- Pixels are normalised by the mean and deviation of the pretrained network.
- Training is short: 8000 steps of 4 images, not 150 epochs of steps of 8; the rate falls as a cosine (`decay`).
- Images are mirrored and turned by quarters; those of rare classes come more often (`rare`).
- Tangent vectors are clipped to norm 3 / sqrt(rho), beyond which float32 loses them (`MAX_NORM`), and the signed
  distances to the hyperplanes are scaled, a number a class, which is learned.
- AFSS paints on images that may show defects, where a set has no good parts, and leaves these out of the mask. At its
  unit norm the hyperplane's distance hardly depends on rho: 0 and 0.01 choose the same channels of NEU-Seg.
- The autoencoders' own loss does not reach the network: they see its maps detached.
- The loss of pixels is Dice beside cross-entropy.
- `scales="finest"` leaves out residuals alone: the maps of all scales are seen.
- Regions may be named as wholes (`regions`), and answers be means over mirrored images (`mirrored`).

Shapes: N images, K outputs, background first, H W pixels, h w rows and columns of a scale, D its channels, E of what
the scales share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import geoopt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hypdefect import geometry
from hypdefect.errors import DataError
from hypdefect.methods.fpn import SegmenterConfig, TrainedSegmenter
from hypdefect.methods.pyramid import SCALES, Laterals, Pyramid, Separable, pixel_loss, upsampled
from hypdefect.methods.ranges import require_at_least, require_share
from hypdefect.precision import exact_products
from hypdefect.types import Batch, Batches, LossTerms, Method

MAX_NORM = 3.0
"""Of sqrt(rho) times a tangent vector: at it a point lies at 0.995 of the ball's radius."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HADNetConfig(SegmenterConfig):
    curvature: float = 0.01
    """rho >= 0, sectional curvature -rho; 0 is the Euclidean twin."""
    selection: Literal["afss", "random", "projection"] = "afss"
    """How channels are chosen: by AFSS, at random, or as random mixtures of all (a fixed linear map)."""
    keep: float = 0.5
    """r, as a share of the channels of a scale."""
    ard: Literal["gate", "sorted", "off"] = "gate"
    """gate: channels that are not among the largest become 0; sorted: the largest, in order of size; off: all."""
    strongest: float = 0.5
    """s, as a share of the residuals' channels: half of them by maximum, half by average."""
    hst: bool = True
    """Whether there are hyperbolic scores."""
    scales: Literal["all", "finest"] = "all"
    """Scales whose residuals are seen."""
    embedding: int = 16
    """Numbers of a location on the ball."""
    reconstruction: float = 0.1
    """Weight of the loss of reconstruction."""
    hyperbolic: float = 0.4
    """Weight of the loss of the hyperbolic scores alone."""
    teacher: float = 0.0
    """Weight of the distance to the maps of the pretrained network."""

    def __post_init__(self) -> None:
        SegmenterConfig.__post_init__(self)
        geometry.validate_curvature(self.curvature)
        require_share(self, "keep", "strongest")
        require_at_least(self, 1, "embedding")
        require_at_least(self, 0, "reconstruction", "hyperbolic", "teacher")


class HyperbolicScores(nn.Module):
    """HST: signed distances of each location to a hyperplane of each class; at curvature 0 linear scores."""

    def __init__(self, width: int, num_outputs: int, embedding: int, curvature: float) -> None:
        super().__init__()
        self.curvature = curvature
        self.embed = nn.Conv2d(width, embedding, 1)
        points = 0.01 * torch.randn(num_outputs, embedding)
        flat = geoopt.Euclidean(ndim=1)  # the twin is trained by the same optimiser
        manifold = geoopt.PoincareBall(c=curvature) if curvature > 0 else flat
        self.points = geoopt.ManifoldParameter(points, manifold=manifold)
        self.normals = nn.Parameter(torch.randn(num_outputs, embedding) / embedding**0.5)
        self.scale = nn.Parameter(torch.ones(num_outputs))

    def forward(self, x: Float[Tensor, "N E h w"]) -> Float[Tensor, "N K h w"]:
        v = self.embed(x).movedim(1, 3)
        with torch.autocast(v.device.type, enabled=False), exact_products():
            tangent = v.float().flatten(0, 2)
            if self.curvature > 0:
                tangent = geometry.clip_norm(tangent, MAX_NORM / self.curvature**0.5)
            z = geometry.expmap0(tangent, self.curvature)
            distances = geometry.hyperplane_dist(z, self.points, self.normals, self.curvature)
        return (distances * self.scale).unflatten(0, v.shape[:3]).movedim(3, 1)


class AutoEncoder(nn.Module):
    """Channels of a scale through a quarter of them and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(4, dim // 4)
        self.net = nn.Sequential(
            nn.Conv2d(dim, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
            nn.ReLU(),
            nn.Conv2d(inner, dim, 1),
        )

    def forward(self, x: Float[Tensor, "N D h w"]) -> Float[Tensor, "N D h w"]:
        answer: Tensor = self.net(x)
        return answer


class HADNet(TrainedSegmenter):
    """Logits of a location: what the discriminator says of the strongest residuals, and the hyperbolic scores."""

    def __init__(self, config: HADNetConfig, num_classes: int) -> None:
        super().__init__(config)
        outputs, width = num_classes + 1, config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.pyramid = Pyramid(config.network, config.frozen, config.depthwise)
            dims = self.pyramid.dims
            kept = [max(8, round(config.keep * dim)) for dim in dims]
            for i, (dim, number) in enumerate(zip(dims, kept, strict=True)):
                self.register_buffer(f"channels_{i}", torch.randperm(dim)[:number].sort().values)
                if config.selection == "projection":
                    self.register_buffer(f"mixture_{i}", torch.randn(number, dim) / dim**0.5)
            self.laterals = Laterals(dims, width, smooth_finest=False)  # the discriminator smooths
            self.autoencoders = nn.ModuleList(AutoEncoder(number) for number in kept)
            self.reduce = nn.ModuleList(nn.Conv2d(number, width // 2, 1) for number in kept)
            self.num_seen = SCALES if config.scales == "all" else 1
            self.num_rebuilt = SCALES if config.reconstruction else self.num_seen
            for unread in (self.reduce[self.num_seen :], self.autoencoders[self.num_rebuilt :]):
                unread.requires_grad_(False)
            seen = self.num_seen * (width // 2)
            self.strongest = max(1, round(config.strongest * seen / 2))
            self.enter: Any = nn.Conv2d(2 * (self.strongest if config.ard == "sorted" else seen), width, 1)
            self.hst = HyperbolicScores(width, outputs, config.embedding, config.curvature) if config.hst else None
            self.discriminator = nn.Sequential(
                Separable(width + (outputs if config.hst else 0), width),
                Separable(width, width),
                nn.Conv2d(width, outputs, 1),
            )
        self.teacher: list[Pyramid] = []
        """The pretrained network; in a list, since it is neither trained nor kept."""

    # -- AFSS --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, painted: Batches) -> None:
        """Choose the channels of each scale, once; nothing is chosen where they are random."""
        if self.config.selection != "afss":
            return
        losses: list[Tensor] = [torch.zeros(dim) for dim in self.pyramid.dims]
        count = 0
        for batch in painted:
            assert batch.targets is not None
            clean, copy = (self.pyramid(batch.views[view]) for view in ("clean", "pixels"))
            count += len(batch)
            for i, (a, b) in enumerate(zip(clean, copy, strict=True)):
                losses[i] += selection_losses(a, b, batch.targets > 0, self.config.curvature).sum(0)
        if not count:
            raise DataError("AFSS needs images with pseudo-defects")
        for i, of_scale in enumerate(losses):
            own: Tensor = getattr(self, f"channels_{i}")
            own.copy_(of_scale.topk(len(own), largest=False).indices.sort().values)

    def selected(self, maps: list[Float[Tensor, "N _ _ _"]]) -> list[Float[Tensor, "N _ _ _"]]:
        """The chosen channels of each scale, or the random mixtures; channels stay last in memory, as in the maps."""
        last = [x.movedim(1, 3) for x in maps]
        if self.config.selection == "projection":
            chosen = [x @ getattr(self, f"mixture_{i}").T for i, x in enumerate(last)]
        else:
            chosen = [x[..., getattr(self, f"channels_{i}")] for i, x in enumerate(last)]
        return [x.movedim(3, 1) for x in chosen]

    # -- the network -------------------------------------------------------------------------------------------------

    def scores(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K h w"]:
        return self.parts(pixels)[0]

    def parts(
        self, pixels: Float[Tensor, "N 3 H W"]
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Logits, hyperbolic scores, of each scale that is rebuilt its selected channels and their reconstruction, and
        of each scale its map."""
        maps = self.pyramid(pixels)
        chosen = zip(self.selected(maps)[: self.num_rebuilt], self.autoencoders[: self.num_rebuilt], strict=True)
        rebuilt = [(x, auto(x.detach())) for x, auto in chosen]
        pairs = zip(rebuilt[: self.num_seen], self.reduce[: self.num_seen], strict=True)
        residuals = [reduce(x - again) for (x, again), reduce in pairs]
        seen = self.laterals(maps, self.filtered(residuals))
        hyperbolic = None
        if self.hst is not None:
            hyperbolic = self.hst(seen)
            seen = torch.cat([seen, hyperbolic], 1)
        logits = self.discriminator(seen)
        return logits if hyperbolic is None else logits + hyperbolic, hyperbolic, rebuilt, maps

    def filtered(self, residuals: list[Float[Tensor, "N _ _ _"]]) -> list[Float[Tensor, "N E _ _"]]:
        """ARD and the first layer of the discriminator, of each scale. That layer is linear: its answers are upsampled
        and added with those of the maps, where the paper upsamples the residuals."""
        chosen = largest_channels(residuals, self.strongest)
        if self.config.ard == "sorted":
            together = torch.cat([upsampled(x, residuals[0]) for x in residuals], 1)
            places = torch.cat(chosen, 1)[:, :, None, None].expand(-1, -1, *together.shape[2:])
            return [self.enter(together.gather(1, places))]
        by_maximum, by_average = self.enter.weight[:, :, 0, 0].chunk(2, 1)
        weights = (by_maximum + by_average).expand(len(residuals[0]), -1, -1)
        if self.config.ard == "gate":
            none = torch.zeros(weights.shape[0], weights.shape[2], device=weights.device)
            gates = [none.scatter(1, places, 1.0)[:, None] for places in chosen]
            weights = by_maximum * gates[0] + by_average * gates[1]
        parts = weights.split([x.shape[1] for x in residuals], 2)
        pairs = zip(residuals, parts, strict=True)
        found = [torch.bmm(x.movedim(1, 3).flatten(1, 2), weight.mT.to(x.dtype)) for x, weight in pairs]
        found[0] = found[0] + self.enter.bias
        return [rows.unflatten(1, x.shape[2:]).movedim(3, 1) for rows, x in zip(found, residuals, strict=True)]

    def loss(self, item: Batch, generator: torch.Generator) -> LossTerms:
        """Of the pixels by all of the network and by the hyperbolic scores alone, of reconstruction on background, and
        the mean squared distance to the maps of the pretrained network, in units of their mean square. The autoencoders
        learn from that of the pixels, too, by way of the residuals."""
        assert item.targets is not None
        pixels = item.views["pixels"]
        logits, hyperbolic, rebuilt, maps = self.parts(pixels)
        parts = {"pixels": pixel_loss(logits, item.targets)}
        if hyperbolic is not None and self.config.hyperbolic:
            parts["hyperbolic"] = self.config.hyperbolic * pixel_loss(hyperbolic, item.targets)
        if self.config.reconstruction:
            missed = torch.stack([_missed(x.detach(), again, item.targets) for x, again in rebuilt])
            parts["reconstruction"] = self.config.reconstruction * missed.mean()
        if self.config.teacher:
            parts["teacher"] = self.config.teacher * self._from_teacher(pixels, maps)
        total = torch.stack(list(parts.values())).sum()
        return LossTerms(total, {name: float(value.detach()) for name, value in parts.items()})

    def _from_teacher(self, pixels: Tensor, maps: list[Tensor]) -> Tensor:
        if not self.teacher:
            self.teacher.append(Pyramid(self.config.network, 0).to(pixels.device))
        with torch.no_grad():
            expected = self.teacher[0](pixels)
        gaps = [F.mse_loss(x, y) / y.square().mean() for x, y in zip(maps, expected, strict=True)]
        return torch.stack(gaps).mean()


def _missed(x: Float[Tensor, "N D h w"], again: Float[Tensor, "N D h w"], targets: Int[Tensor, "N H W"]) -> Tensor:
    """Mean squared error of the locations without a defect, in units of the mean square of all."""
    good = F.adaptive_max_pool2d((targets > 0).float()[:, None], x.shape[2:]) == 0
    wrong = (x - again).square() * good
    return wrong.sum() / (good.sum() * x.shape[1]).clamp_min(1) / x.square().mean().clamp_min(1e-12)


def selection_losses(
    clean: Float[Tensor, "N D h w"],
    painted: Float[Tensor, "N D h w"],
    mask: Bool[Tensor, "N H W"],
    curvature: float,
) -> Float[Tensor, "N D"]:
    """How unlike the squared difference of each channel is to the mask of the pseudo-defect, and to the distance to a
    hyperplane (eq. 8 to 10): the mean of both squared differences. All three lie in [0, 1]."""
    truth = F.adaptive_avg_pool2d(mask.float()[:, None], (clean.shape[2], clean.shape[3]))
    difference = _to_unit((clean - painted).square())
    return ((difference - truth).square() + (difference - _agreement(painted, truth, curvature)).square()).mean((2, 3))


def _agreement(
    painted: Float[Tensor, "N D h w"], truth: Float[Tensor, "N 1 h w"], curvature: float
) -> Float[Tensor, "N 1 h w"]:
    """Distances to the hyperplane half way between the means of painted and other locations, in [0, 1]."""
    x = painted.movedim(1, 3)
    x = x / x.square().sum(3, keepdim=True).mean().sqrt().clamp_min(1e-12)
    weight = truth.movedim(1, 3)
    inside = (x * weight).sum((0, 1, 2)) / weight.sum().clamp_min(1e-12)
    outside = (x * (1 - weight)).sum((0, 1, 2)) / (1 - weight).sum().clamp_min(1e-12)
    point = geometry.expmap0(((inside + outside) / 2)[None], curvature)
    z = geometry.expmap0(x.flatten(0, 2), curvature)
    distance = geometry.hyperplane_dist(z, point, (inside - outside)[None], curvature)
    return _to_unit(distance.unflatten(0, x.shape[:3]).movedim(3, 1))


def _to_unit(x: Float[Tensor, "N D h w"]) -> Float[Tensor, "N D h w"]:
    """Min-max normalised over the locations of each image and channel."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def largest_channels(
    residuals: Sequence[Float[Tensor, "N _ _ _"]], number: int
) -> tuple[Int[Tensor, "N K"], Int[Tensor, "N K"]]:
    """ARD: of each image the `number` channels, of all scales, of the largest global maximum of the residuals' size,
    and those of the largest global average, the largest first."""
    size = [x.detach().abs() for x in residuals]
    strengths = (torch.cat([x.amax((2, 3)) for x in size], 1), torch.cat([x.mean((2, 3)) for x in size], 1))
    by_maximum, by_average = (strength.topk(number, 1).indices for strength in strengths)
    return by_maximum, by_average


def flat_twin(config: HADNetConfig, *_: Any) -> HADNetConfig:
    """The same at rho = 0."""
    return replace(config, curvature=0.0)


METHODS = {
    "hadnet": Method(config=HADNetConfig, build=HADNet, family="segmentation", hyperbolic=True, flat_twin=flat_twin)
}
