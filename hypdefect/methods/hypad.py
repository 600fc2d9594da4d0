"""HypAD: anomaly detection by hyperbolic distances of a student and an autoencoder from a teacher, CVPR 2024.

The recipe is EfficientAD's (Batzner et al., WACV 2024) with hyperbolic distances in place of Euclidean ones.

| paper | here |
| --- | --- |
| frozen teacher P1, normalised on normal images | view "patch", by `HypAD.begin` |
| student P2 with two heads; autoencoder | `student_network`, `Autoencoder` |
| EM module: exp_0 at curvature c of each location | `HypAD.distances`; its points are never formed |
| loss: teacher and student, teacher and autoencoder, second head and autoencoder | `HypAD.loss` |
| hard-feature mining, penalty on images of other things | `HypAD.loss` |
| map: mean of two, each rescaled by quantiles of held-out normal images | `HypAD.fit`, `HypAD.anomaly` |

A location's vectors are scaled so that those of the teacher have the root mean square length `feature_scale`, and are
clipped to `clip` times that (Guo et al., CVPR 2022). Distances are given in the units of one normalised channel,
d / (2 feature_scale). At c = 0 that is the root mean square difference of the channels, so that c = 0 is EfficientAD.

Deviations: the student is smaller than EfficientAD's (a location sees 31 pixels, there 33; strides in place of
pooling), and so is the autoencoder, which sees the image at half its size; both fit a CPU. Locations are mined, not
single channels, since a distance has none.

Shapes: N images, S their side, D channels of the teacher, h w rows and columns of its grid, H W pixels.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hypdefect import geometry
from hypdefect.errors import DataError
from hypdefect.methods.anomaly_maps import pixel_maps, top_mean
from hypdefect.methods.expected_score import ExpectedScore
from hypdefect.methods.normal_patches import standardisation
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.types import AnomalyMaps, Batch, Batches, LossTerms, Method, Needs

LOW, HIGH = 0.9, 0.995
"""Quantiles of a map on normal images that become 0 and 0.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HypADConfig:
    curvature: float = 0.05
    """c >= 0, sectional curvature -c; 0 is the Euclidean twin."""
    feature_scale: float = 1.0
    """Root mean square length of the teacher's vectors before the exponential map."""
    clip: float = 3.0
    """Longest vector before the exponential map, in units of `feature_scale`."""
    width: int = 64
    """Channels of the student's first layer; its others have twice as many."""
    bottleneck: int = 64
    """Numbers that the autoencoder keeps of an image."""
    hard: float = 0.1
    """Share of locations, those of the largest distance, that the student learns from; the paper's is 0.001, of far
    longer training."""
    penalty: float = 1.0
    """Weight of the student's answer to images of other things; 0: none."""
    steps: int = 600
    items_per_step: int = 2
    images: int = 4
    """Normal images of an item; among their locations the hard ones are mined."""
    lr: float = 1e-3
    """AdamW; a tenth after 95 % of the steps. The paper's is 1e-4, of far longer training."""
    weight_decay: float = 1e-5
    jitter: float = 0.2
    """Chance that an image's brightness, contrast and saturation are changed."""
    whole: float = 0.1
    """Weight of the map of the autoencoder and the second head; the other map has the rest. The paper's is 0.5, after
    far longer training: an autoencoder that was trained briefly finds little (docs/experiments.md)."""
    top: int = 1
    """An image's score is the mean of its so many highest locations; 1, the maximum, is the paper's."""
    sigma: float = 0.0
    """Of a Gaussian that smooths the map, in pixels of the network input; the paper has none."""
    directions: int = 0
    """Not in the paper: the score is divided by what a normal image of the same look scores (`expected_score`), which
    depends on so many principal directions of the images' looks; 0: it is not."""
    seed: int = 0

    def __post_init__(self) -> None:
        geometry.validate_curvature(self.curvature)
        require_positive(self, "feature_scale", "clip", "width", "bottleneck", "hard", "steps", "items_per_step")
        require_positive(self, "images", "lr", "top")
        require_at_least(self, 0, "penalty", "weight_decay", "sigma", "directions")
        require_share(self, "hard", "jitter", "whole")


def student_network(width: int, dim: int) -> nn.Sequential:
    """A location at stride 8 sees 31 pixels; the first `dim` channels predict the teacher, the rest the autoencoder."""
    return nn.Sequential(
        nn.Conv2d(3, width, 7, stride=4, padding=3),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * dim, 1),
    )


class Autoencoder(nn.Module):
    """Predicts the teacher's grid from a few numbers that describe the whole image."""

    def __init__(self, bottleneck: int, dim: int) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(8), nn.Conv2d(64, bottleneck, 8))
        self.decoder = nn.ModuleList(nn.Conv2d(before, 64, 3, padding=1) for before in (bottleneck, 64, 64))
        self.head = nn.Conv2d(64, dim, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "N 3 S S"], grid: tuple[int, int]) -> Float[Tensor, "N D h w"]:
        x = self.encoder(F.avg_pool2d(pixels, 2))
        for layer, share in zip(self.decoder, (4, 2, 1), strict=True):
            size = [max(1, side // share) for side in grid]
            x = F.relu(layer(F.interpolate(x, size=size, mode="bilinear", align_corners=False)))
        answer: Tensor = self.head(x)
        return answer


class HypAD(nn.Module):
    """Anomaly of a location: how far the student's answers are from the teacher's and from the autoencoder's."""

    needs: ClassVar[Needs] = "patches+pixels"
    mean: Tensor
    deviation: Tensor
    quantiles: Tensor

    def __init__(self, config: HypADConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.student = student_network(config.width, dim)
            self.autoencoder = Autoencoder(config.bottleneck, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.zeros(dim))
        self.register_buffer("quantiles", torch.full((2, 2), torch.nan))
        self.expected = ExpectedScore(dim, config.directions) if config.directions else None

    def begin(self, normals: Batches) -> None:
        """Take the teacher's mean and deviation of each channel on normal images.

        Raises:
            DataError: no normal image.
        """
        self.mean, self.deviation, _ = standardisation(normals, self.dim)

    def teacher(self, batch: Batch) -> Float[Tensor, "N D h w"]:
        """The teacher's answer, each channel in deviations from its mean."""
        return ((batch.views["patch"] - self.mean) / self.deviation).permute(0, 3, 1, 2)

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The student's prediction of the teacher, its prediction of the autoencoder, and the autoencoder's answer."""
        pixels = (batch.views["pixels"] - 0.5) * 4
        local, whole = self.student(pixels).float().chunk(2, 1)
        _, rows, columns, _ = batch.views["patch"].shape
        return local, whole, self.autoencoder(pixels, (rows, columns)).float()

    def distances(self, x: Float[Tensor, "N D h w"], y: Float[Tensor, "N D h w"]) -> Float[Tensor, "N h w"]:
        """Squared distance at each location, in units of one channel: at c = 0 the mean square of the differences."""
        scale = self.config.feature_scale
        return geometry.tangent_dist2(self.tangent(x), self.tangent(y), self.config.curvature, dim=1) / scale**2

    def tangent(self, x: Float[Tensor, "N D h w"]) -> Float[Tensor, "N D h w"]:
        """Vectors as exp_0 takes them: scaled, and clipped."""
        scale = self.config.feature_scale
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True) * (scale / self.dim**0.5)
        factor = (self.config.clip * scale / norm.clamp_min(1e-12)).clamp_max(1)
        return x * (factor * (scale / self.dim**0.5))

    def loss(self, item: Batch, generator: torch.Generator) -> LossTerms:
        """Mean squared distances: of the hard locations between student and teacher, of all between autoencoder and
        teacher and between the second head and the autoencoder; and the first head's answer to the view "unrelated"."""
        teacher = self.teacher(item)
        local, whole, coarse = self.answers(item)
        missed = self.distances(teacher, local).flatten()
        parts = {
            "student": missed.topk(max(1, round(self.config.hard * len(missed)))).values.mean(),
            "autoencoder": self.distances(teacher, coarse).mean(),
            "whole": self.distances(coarse, whole).mean(),
        }
        if self.config.penalty:
            other = self.student((item.views["unrelated"] - 0.5) * 4).float().chunk(2, 1)[0]
            parts["penalty"] = self.config.penalty * self.distances(torch.zeros_like(other), other).mean()
        total = torch.stack(list(parts.values())).sum()
        return LossTerms(total=total, parts={name: float(value.detach()) for name, value in parts.items()})

    @torch.no_grad()
    def maps(self, batch: Batch) -> Float[Tensor, "2 N h w"]:
        """Distance of teacher and student, and of autoencoder and second head, at each location."""
        local, whole, coarse = self.answers(batch)
        return torch.stack([self.distances(self.teacher(batch), local), self.distances(coarse, whole)]).sqrt()

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Take the quantiles of both maps on normal images that the networks were not trained on. Pseudo-defects play
        no part.

        Raises:
            DataError: no normal image. RuntimeError: the networks were not trained.
        """
        maps = []
        for batch in normals:
            if not self.deviation.any():
                raise RuntimeError("fit needs trained networks: families.detector_training trains them")
            maps.append(self.maps(batch).flatten(1))
        if not maps:
            raise DataError("a detector needs at least one normal image")
        low, high = np.quantile(torch.cat(maps, 1).numpy(force=True), [LOW, HIGH], axis=1)
        self.quantiles = torch.from_numpy(np.stack([low, np.maximum(high, low + 1e-6)])).to(self.mean)
        if self.expected is not None:
            self.expected.fit(normals, lambda batch: top_mean(self._scores(batch), self.config.top))

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        self._check("anomaly")
        scores = self._scores(batch)
        score = top_mean(scores, self.config.top)
        if self.expected is not None:
            score = score / self.expected(batch)
        return AnomalyMaps(score=score, map=pixel_maps(scores, self.config.sigma))

    def _scores(self, batch: Batch) -> Float[Tensor, "N h w"]:
        """Both maps, rescaled and added."""
        low, high = self.quantiles[:, :, None, None, None]
        local, whole = 0.1 * (self.maps(batch) - low) / (high - low)
        return (1 - self.config.whole) * local + self.config.whole * whole

    def _check(self, what: str) -> None:
        if self.quantiles.isnan().any():
            raise RuntimeError(f"{what} needs fit, or restore, before")

    def export(self) -> dict[str, Tensor]:
        """Both networks, the teacher's statistics, the quantiles. Raises RuntimeError before `fit`."""
        self._check("export")
        return dict(self.state_dict())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors)


def flat_twin(config: HypADConfig, *_: Any) -> HypADConfig:
    """The same at c = 0: distances are in the units of the features at any c, and so need no other scale."""
    return replace(config, curvature=0.0)


METHODS = {
    "hypad": Method(config=HypADConfig, build=HypAD, family="detection", hyperbolic=True, flat_twin=flat_twin),
}
