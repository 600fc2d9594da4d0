"""What a normal image of the same look scores: a detector's score is divided by it.

A bright or lively image of a good part scores higher than a dark or smooth one: on magnetic tiles, which are shot under
six exposures, a normal image's score follows its contrast. So a dark tile with a defect scores below a bright one
without. Here the log of the score is regressed, on normal images alone, on the spreads of an image's own patches. No
paper; measured in docs/experiments.md.

Shapes: N images, D features of a patch, k directions.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from hypdefect.types import Batch, Batches

logger = logging.getLogger(__name__)
PENALTY = 10.0
"""Of the slopes, in images: a dozen normal images say little of them, hundreds decide."""


class ExpectedScore(nn.Module):
    """1 for a normal image of mean look; larger where normal images score higher. It is 1 for all before `fit`.

    Args:
        directions: k, principal directions of the images' spreads that it depends on.
    """

    centre: Tensor
    axes: Tensor
    limits: Tensor
    slopes: Tensor

    def __init__(self, dim: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("axes", torch.zeros(dim, directions))
        self.register_buffer("limits", torch.zeros(2, directions))
        self.register_buffer("slopes", torch.zeros(directions))

    def fit(self, normals: Batches, score: Callable[[Batch], Float[Tensor, "_"]]) -> None:
        """Regress the log of the scores of normal images on their looks. Images that score 0 or less are left out."""
        seen = [(log_spreads(batch), score(batch)) for batch in normals]
        spreads, scores = (torch.cat(part).double().cpu().numpy() for part in zip(*seen, strict=True))
        spreads, scores = spreads[scores > 0], scores[scores > 0]
        number = min(self.axes.shape[1], len(scores) - 1, len(self.centre))
        if number < 1:
            logger.warning("too few normal images with a score (%d) to learn what it depends on", len(scores))
            return
        pca = PCA(number, whiten=True, svd_solver="full").fit(spreads)
        x = pca.transform(spreads)
        self.centre.copy_(torch.from_numpy(pca.mean_))
        self.axes[:, :number] = torch.from_numpy(
            pca.components_.T / np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
        )
        self.limits[:, :number] = torch.from_numpy(np.stack([x.min(0), x.max(0)]))
        self.slopes[:number] = torch.from_numpy(Ridge(alpha=PENALTY).fit(x, np.log(scores)).coef_)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Float[Tensor, "N"]:
        """Of each image. One unlike all normal ones is taken for the outermost of these."""
        x = (log_spreads(batch) - self.centre) @ self.axes
        return (x.clamp(*self.limits) @ self.slopes).exp()


def log_spreads(batch: Batch) -> Float[Tensor, "N D"]:
    """Log of the standard deviation of each feature over the patches of an image."""
    return batch.views["patch"].flatten(1, 2).std(1, correction=0).clamp_min(1e-6).log()
