"""PatchCore, relative to what a normal image of the same look scores (`expected_score`).

The normal images that say so are those of the bank. That lowers their scores, but all alike: slopes alone are used. The
map is PatchCore's: divided, too, it finds regions less well.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hypdefect.methods.expected_score import ExpectedScore
from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig
from hypdefect.methods.ranges import require_at_least
from hypdefect.types import AnomalyMaps, Batch, Batches, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionalPatchCoreConfig(PatchCoreConfig):
    score: Literal["reweighted", "top"] = "top"
    """As PatchCore's. Relative to the look, the ten highest patches find more (docs/experiments.md)."""
    directions: int = 3
    """Principal directions of the images' looks that the expected score depends on; 0: PatchCore."""

    def __post_init__(self) -> None:
        PatchCoreConfig.__post_init__(self)
        require_at_least(self, 0, "directions")


class ConditionalPatchCore(PatchCore):
    """PatchCore's map, and its score divided by the one expected of the image."""

    def __init__(self, config: ConditionalPatchCoreConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.expected = ExpectedScore(dim, config.directions)

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Choose the bank, then score the normal images. Pseudo-defects play no part.

        Raises:
            DataError, ConfigError: as PatchCore.
        """
        super().fit(normals)
        self.expected.fit(normals, lambda batch: PatchCore.anomaly(self, batch).score)

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        answer = super().anomaly(batch)
        return replace(answer, score=answer.score / self.expected(batch))

    def export(self) -> dict[str, Tensor]:
        """As PatchCore, and what the expected score is made of."""
        return super().export() | {f"expected.{name}": x for name, x in self.expected.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises RuntimeError where the tensors do not fit one another."""
        super().restore(tensors)
        self.expected.load_state_dict({name: tensors[f"expected.{name}"] for name in self.expected.state_dict()})


METHODS = {
    "conditional_patchcore": Method(config=ConditionalPatchCoreConfig, build=ConditionalPatchCore, family="detection")
}
