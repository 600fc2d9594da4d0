"""PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022; and on the Poincare ball.

| paper | here |
| --- | --- |
| locally aware patch features (section 3.1) | view "patch", made by `features.patches` |
| memory bank M, greedy coreset (section 3.2, algorithm 1) | `PatchCore.fit`, `memory_bank.greedy_coreset` |
| s* (eq. 6), its reweighting over N_b(m*) (eq. 7) | `reweighted` |
| map: bilinear upsampling, Gaussian of sigma 4 (section 3.3) | `anomaly_maps.pixel_maps` |

Hyperbolic PatchCore measures the same distances between points of the ball: patches are centred on the mean of the
normal ones, scaled so that their root mean square length is `feature_scale`, and mapped by exp_0. Distances are given
in the units of the features, d / (2 scale), so that c = 0 is PatchCore.

Deviations: the coreset is chosen from at most `candidates` patches, drawn at random from all, and has at most
`bank_size` rows: 700 images of 1024 patches would otherwise take hours. An image may also be scored by the mean of its
`top` highest patches.

Shapes: N images, h w rows and columns of the patch grid, D features of a patch, B rows of the bank, M patches, b
neighbours.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect import geometry
from hypdefect.errors import ConfigError, DataError
from hypdefect.methods.anomaly_maps import pixel_maps, top_mean
from hypdefect.methods.memory_bank import Neighbours, greedy_coreset
from hypdefect.methods.normal_patches import sample_patches
from hypdefect.methods.ranges import require_positive
from hypdefect.progress import lines
from hypdefect.types import AnomalyMaps, Batch, Batches, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchCoreConfig:
    bank_share: float = 0.1
    """Share of the normal patches that the coreset keeps."""
    bank_size: int = 2000
    """At most so many rows; 0: no limit."""
    candidates: int = 100_000
    """The coreset is chosen from at most so many patches, a random sample of all; 0: from all."""
    projection: int = 0
    """The coreset is chosen by distances after a random projection to so many numbers; 0: by exact ones."""
    score: Literal["reweighted", "top"] = "reweighted"
    """reweighted: the highest patch, less where its surroundings in the bank are sparse (eq. 7); top: the mean of the
    `top` highest patches."""
    neighbours: int = 9
    """b, rows of the bank round the nearest one that the reweighting looks at; 1 is the maximum as it is."""
    top: int = 10
    sigma: float = 4.0
    """Of the Gaussian that smooths the map, in pixels of the network input; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "neighbours", "top")
        if not 0 < self.bank_share <= 1:
            raise ConfigError(f"method.bank_share must lie in (0, 1], got {self.bank_share}")
        for name in ("bank_size", "candidates", "projection", "sigma"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"method.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperbolicPatchCoreConfig(PatchCoreConfig):
    curvature: float = 0.1
    """c >= 0, sectional curvature -c; 0 is PatchCore."""
    feature_scale: float = 1.0
    """Root mean square length of the centred normal patches before the exponential map."""

    def __post_init__(self) -> None:
        PatchCoreConfig.__post_init__(self)
        geometry.validate_curvature(self.curvature)
        require_positive(self, "feature_scale")


class PatchCore:
    """Anomaly of a patch: its distance to the nearest patch of the bank."""

    needs: ClassVar[Needs] = "patches"

    def __init__(self, config: PatchCoreConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.curvature = config.curvature if isinstance(config, HyperbolicPatchCoreConfig) else 0.0
        self.nearest: Neighbours | None = None
        self.mean, self.scale = torch.zeros(dim), torch.ones(())

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Choose the bank. Pseudo-defects play no part.

        Raises:
            DataError: no normal image, or patches that are all alike. ConfigError: a bank that does not fit in memory.
        """
        patches, total = sample_patches(normals, self.config.candidates, self.config.seed)
        if isinstance(self.config, HyperbolicPatchCoreConfig):
            self.mean = patches.mean(0)
            length = (patches - self.mean).square().sum(1).mean().sqrt()
            if not length > 0:
                raise DataError("the patches of the normal images are all alike: give different images")
            self.scale = self.config.feature_scale / length
        num = max(1, round(self.config.bank_share * total))
        num = min(num, self.config.bank_size or num, len(patches))
        projection = self.config.projection or None
        said = lines(f"memory bank of {total} patches", quick=False)
        chosen = greedy_coreset(patches, num, seed=self.config.seed, projection=projection, progress=said)
        self._keep(self.embedded(patches[chosen]))

    def _keep(self, bank: Float[Tensor, "B D"]) -> None:
        self.nearest = Neighbours(bank, curvature=self.curvature)

    def embedded(self, patches: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """Patches as they are at c = 0, else as points of the ball."""
        if not self.curvature:
            return patches
        return geometry.expmap0((patches - self.mean) * self.scale, self.curvature)

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        nearest = self._fitted("anomaly")
        patches = batch.views["patch"]
        rows = self.embedded(patches.flatten(0, 2))
        distances, indices = nearest.search(rows, 1)
        scores = self.unit() * distances[:, 0].view(patches.shape[:3])
        if self.config.score == "top":
            score = top_mean(scores, self.config.top)
        else:
            score = self.reweighted(scores.flatten(1), rows.view(len(patches), -1, self.dim), indices)
        return AnomalyMaps(score=score, map=pixel_maps(scores, self.config.sigma))

    def unit(self) -> float:
        """Features' units of one unit of distance: the ball's are `scale` times smaller."""
        return 1 / float(self.scale) if self.curvature else 1.0

    def reweighted(
        self, scores: Float[Tensor, "N M"], rows: Float[Tensor, "N M D"], indices: Tensor
    ) -> Float[Tensor, "N"]:
        """Eq. 6 and 7: the highest patch's distance to its nearest row m* of the bank, times 1 - softmax of the
        distances to the b rows nearest to m*, taken at m* itself."""
        nearest = self._fitted("anomaly")
        best, at = scores.max(1)
        if self.config.neighbours == 1 or len(nearest.bank) == 1:
            return best
        own = rows[torch.arange(len(rows)), at]
        stars = indices.view(scores.shape)[torch.arange(len(rows)), at]
        _, around = nearest.search(nearest.bank[stars], min(self.config.neighbours, len(nearest.bank)))
        distances = torch.stack(
            [self._distances(one, nearest.bank[near]) for one, near in zip(own, around, strict=True)]
        )
        return best * (1 - torch.softmax(distances, 1)[:, 0])  # the row nearest to m* is m* itself

    def _distances(self, row: Float[Tensor, "D"], bank: Float[Tensor, "b D"]) -> Float[Tensor, "b"]:
        if not self.curvature:
            return torch.linalg.vector_norm(bank - row, dim=1)
        return self.unit() * geometry.dist(bank, row, self.curvature) / 2

    def _fitted(self, what: str) -> Neighbours:
        if self.nearest is None:
            raise RuntimeError(f"{what} needs fit, or restore, before")
        return self.nearest

    def export(self) -> dict[str, Tensor]:
        """The bank, the centre and the scale. Raises RuntimeError before `fit`."""
        return {"bank": self._fitted("export").bank, "mean": self.mean, "scale": self.scale}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises RuntimeError where the tensors do not fit one another."""
        if tensors["bank"].ndim != 2 or tensors["bank"].shape[1:] != tensors["mean"].shape:
            raise RuntimeError(f"a bank {tuple(tensors['bank'].shape)} beside a mean {tuple(tensors['mean'].shape)}")
        self.mean, self.scale = tensors["mean"], tensors["scale"]
        self._keep(tensors["bank"])


def flat_twin(config: HyperbolicPatchCoreConfig, *_: Any) -> HyperbolicPatchCoreConfig:
    """The same bank and score at c = 0: distances are in the units of the features at any c."""
    return replace(config, curvature=0.0)


METHODS = {
    "patchcore": Method(config=PatchCoreConfig, build=PatchCore, family="detection"),
    "hyperbolic_patchcore": Method(
        config=HyperbolicPatchCoreConfig, build=PatchCore, family="detection", hyperbolic=True, flat_twin=flat_twin
    ),
}
