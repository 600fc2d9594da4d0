"""PatchCore and the discriminator of pseudo-defects together: what looks unlike good parts, or like a defect.

The two miss different defects. The bank finds what no normal image shows, such as a missing edge. The discriminator
finds small marks that are near some normal patch. Both answers are measured in deviations of the normal images, and
the answer is their weighted sum.

Shapes: N images, h w rows and columns of the patch grid, H W pixels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect.methods.anomaly_maps import units_of, weighted_sum
from hypdefect.methods.patch_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig
from hypdefect.methods.ranges import require_share
from hypdefect.types import AnomalyMaps, Batch, Batches, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class BankAndDiscriminatorConfig:
    bank: PatchCoreConfig = PatchCoreConfig(score="top")
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig()
    weight: float = 0.25
    """Of the discriminator; the bank has the rest."""

    def __post_init__(self) -> None:
        require_share(self, "weight")


class BankAndDiscriminator:
    """Weighted sum of two detectors' answers, each standardised on the normal images."""

    needs: ClassVar[Needs] = "patches"

    def __init__(self, config: BankAndDiscriminatorConfig, dim: int) -> None:
        self.config = config
        self.parts: dict[str, Any] = {
            "bank": PatchCore(config.bank, dim),
            "discriminator": PatchDiscriminator(config.discriminator, dim),
        }
        self.weights = {"bank": 1 - config.weight, "discriminator": config.weight}
        self.units: dict[str, Float[Tensor, 4]] = {}
        """Of each part (`units_of`)."""

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Fit both, then look at the normal images once more.

        Raises:
            DataError, NumericsError: as the parts.
        """
        for name, part in self.parts.items():
            part.fit(normals, pseudo)
            self.units[name] = units_of([part.anomaly(batch) for batch in normals])

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        answers = [part.anomaly(batch) for part in self.parts.values()]
        return weighted_sum(answers, [self.units[name] for name in self.parts], list(self.weights.values()))

    def export(self) -> dict[str, Tensor]:
        """Raises RuntimeError before `fit`."""
        tensors = {f"{name}.{key}": x for name, part in self.parts.items() for key, x in part.export().items()}
        return tensors | {f"{name}.units": x for name, x in self.units.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            own = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
            self.units[name] = own.pop("units")
            part.restore(own)


METHODS = {
    "bank_and_discriminator": Method(config=BankAndDiscriminatorConfig, build=BankAndDiscriminator, family="detection")
}
