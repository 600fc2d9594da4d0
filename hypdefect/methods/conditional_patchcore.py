"""PatchCore, relative to what a normal image of the same look scores.

A bright or lively image of a good part lies further from the bank than a dark or smooth one: on magnetic tiles, which
are shot under six exposures, the score of a normal image follows its contrast more than anything else. So a dark tile
with a defect scores below a bright one without. Here the log of the score is regressed, on normal images alone, on
the spreads of an image's own patches, and each answer is divided by what the regression expects.

The normal images are those of the bank. That lowers their scores, but all alike: the slopes alone are used.
No paper; measured in docs/experiments.md. With `directions` 0 it is PatchCore.

Shapes: N images, h w rows and columns of the patch grid, D features of a patch, k directions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch import Tensor

from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig
from hypdefect.methods.ranges import require_at_least
from hypdefect.types import AnomalyMaps, Batch, Batches, Method

PENALTY = 10.0
"""Of the slopes, in images: a dozen normal images say little of them, hundreds decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionalPatchCoreConfig(PatchCoreConfig):
    directions: int = 3
    """k, principal directions of the images' spreads that the expected score depends on; 0: PatchCore."""

    def __post_init__(self) -> None:
        PatchCoreConfig.__post_init__(self)
        require_at_least(self, 0, "directions")


class ConditionalPatchCore(PatchCore):
    """PatchCore's score and map, divided by the score expected of the image."""

    def __init__(self, config: ConditionalPatchCoreConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.directions = config.directions
        self.given: dict[str, Tensor] = {
            "centre": torch.zeros(dim),
            "axes": torch.zeros(dim, 0),
            "limits": torch.zeros(2, 0),
            "slopes": torch.zeros(0),
        }
        """Mean log spread `[D]`, directions `[D k]`, the least and the largest coordinate of the normal images `[2 k]`,
        and the slope of the log score in each direction `[k]`."""

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Choose the bank, then score the normal images. Pseudo-defects play no part.

        Raises:
            DataError, ConfigError: as PatchCore.
        """
        super().fit(normals)
        answers = [(log_spreads(batch), super(ConditionalPatchCore, self).anomaly(batch).score) for batch in normals]
        spreads, scores = (torch.cat(of_all).double().numpy() for of_all in zip(*answers, strict=True))
        usable = scores > 0  # of an image that lies in the bank altogether nothing is known
        number = min(self.directions, int(usable.sum()) - 1, self.dim)
        if number < 1:
            return
        pca = PCA(number, whiten=True, svd_solver="full").fit(spreads[usable])
        x = pca.transform(spreads[usable])
        slopes = Ridge(alpha=PENALTY).fit(x, np.log(scores[usable])).coef_
        axes = pca.components_.T / np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
        limits = np.stack([x.min(0), x.max(0)])
        self.given = {
            name: torch.from_numpy(np.ascontiguousarray(value)).float()
            for name, value in (("centre", pca.mean_), ("axes", axes), ("limits", limits), ("slopes", slopes))
        }

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        answer = super().anomaly(batch)
        x = (log_spreads(batch) - self.given["centre"]) @ self.given["axes"]
        least, most = self.given["limits"]
        expected = (x.clamp(least, most) @ self.given["slopes"]).exp()
        return AnomalyMaps(score=answer.score / expected, map=answer.map / expected[:, None, None])

    def export(self) -> dict[str, Tensor]:
        """As PatchCore, and what the expected score is made of."""
        return super().export() | self.given

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.given = {name: tensors[name] for name in self.given}


def log_spreads(batch: Batch) -> Float[Tensor, "N D"]:
    """Log of the standard deviation of each feature over the patches of an image."""
    return batch.views["patch"].flatten(1, 2).std(1, correction=0).clamp_min(1e-6).log()


METHODS = {
    "conditional_patchcore": Method(config=ConditionalPatchCoreConfig, build=ConditionalPatchCore, family="detection")
}
