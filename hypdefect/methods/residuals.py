"""Residual patches: what is left of a patch without its nearest normal one (AMC, arXiv 2406.05645, eq. 2).

Shapes: N images, h w rows and columns of the grid, D features of a patch, B rows of the bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect.errors import DataError
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.methods.memory_bank import Neighbours, greedy_coreset
from hypdefect.methods.normal_patches import sample_patches
from hypdefect.progress import lines
from hypdefect.types import Batch

SLICE = 32
"""Images whose neighbours are searched at a time."""


@dataclass(frozen=True, slots=True)
class Residuals(FeatureTransform):
    """A transform of the view "patch" `[N h w D]`; `tensors` holds "bank" `[B D]`, or nothing: patches then stay."""

    @classmethod
    def of_patches(
        cls, normals: Float[np.ndarray, "N h w D"] | None, block_dims: Sequence[int], config: TransformConfig
    ) -> "Residuals":
        """The bank of some normal images, chosen as PatchCore's but from a random sample of their patches.

        The paper keeps 10 % of all patches, `bank_share` is a share of the sample.

        Raises:
            DataError: residuals without normal images.
        """
        if not config.residuals:
            return cls(tuple(block_dims), {})
        if normals is None or not len(normals):
            raise DataError("residuals need normal images; without any, set transform.residuals to false")
        none = torch.zeros(1, dtype=torch.long)
        batches = (
            Batch(image_ids=("",), views={"patch": torch.from_numpy(one)[None]}, labels=none, aug_index=none)
            for one in normals
        )
        patches, _ = sample_patches(batches, config.bank_candidates, config.bank_seed)
        num = max(1, round(config.bank_share * len(patches)))
        said = lines("bank of normal patches", quick=False)
        chosen = greedy_coreset(patches, num, seed=config.bank_seed, progress=said)
        return cls(tuple(block_dims), {"bank": patches[chosen]})

    def __call__(self, views: Mapping[str, Float[Tensor, "N h w D"]]) -> dict[str, Float[Tensor, "N h w D"]]:
        """Patches minus their nearest rows of the bank."""
        patches = views["patch"]
        if "bank" not in self.tensors:
            return {"patch": patches}
        nearest = Neighbours(self.tensors["bank"])
        return {"patch": torch.cat([_minus_nearest(part, nearest) for part in patches.split(SLICE)])}


def _minus_nearest(patches: Float[Tensor, "N h w D"], nearest: Neighbours) -> Float[Tensor, "N h w D"]:
    rows = patches.flatten(0, 2)
    _, at = nearest.search(rows, 1)
    return (rows - nearest.bank[at[:, 0]]).view_as(patches)
