"""HypAD and the bank of PatchCore together, both relative to what a normal image of the same look scores.

The two miss different defects. Both answers are measured in deviations of normal images that neither learned from, and
the answer is their weighted sum. No paper; measured in docs/experiments.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hypdefect.methods.anomaly_maps import units_of, weighted_sum
from hypdefect.methods.conditional_patchcore import ConditionalPatchCore, ConditionalPatchCoreConfig
from hypdefect.methods.hypad import HypAD, HypADConfig, flat_twin
from hypdefect.methods.ranges import require_share
from hypdefect.types import AnomalyMaps, Batch, Batches, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class BankAndHypADConfig(HypADConfig):
    directions: int = 3
    """As HypAD's, and of HypAD's score alone; the bank has its own."""
    top: int = 10
    """As HypAD's, and of HypAD's score alone; the bank has its own."""
    bank: ConditionalPatchCoreConfig = ConditionalPatchCoreConfig()
    weight: float = 0.5
    """Of HypAD; the bank has the rest."""

    def __post_init__(self) -> None:
        HypADConfig.__post_init__(self)
        require_share(self, "weight")


class BankAndHypAD(HypAD):
    """HypAD, and a bank of the normal images that its networks are trained on."""

    units: Tensor
    """Of HypAD and of the bank (`units_of`)."""

    def __init__(self, config: BankAndHypADConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.bank = ConditionalPatchCore(config.bank, dim)
        self.weights = (config.weight, 1 - config.weight)
        self.learned: Batches = ()  # the images of `begin`; not kept with the tensors
        self.register_buffer("units", torch.full((2, 4), torch.nan))

    def begin(self, normals: Batches) -> None:
        """As HypAD. The bank is of the same images. `fit` chooses it, since a worker that trains needs none."""
        super().begin(normals)
        self.learned = normals

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Choose the bank, and take the scale of both on normal images that neither learned from.

        Raises:
            DataError, ConfigError, RuntimeError: as HypAD and PatchCore.
        """
        super().fit(normals)
        self.bank.fit(self.learned)
        answers = [self._of_each(batch) for batch in normals]
        self.units = torch.stack([units_of(of_one) for of_one in zip(*answers, strict=True)])

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        return weighted_sum(self._of_each(batch), list(self.units), self.weights)

    def _of_each(self, batch: Batch) -> tuple[AnomalyMaps, AnomalyMaps]:
        """HypAD's answer and the bank's."""
        return super().anomaly(batch), self.bank.anomaly(batch)

    def export(self) -> dict[str, Tensor]:
        """Raises RuntimeError before `fit`."""
        return super().export() | {f"bank.{name}": x for name, x in self.bank.export().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        own = {name.removeprefix("bank."): x for name, x in tensors.items() if name.startswith("bank.")}
        self.bank.restore(own)
        super().restore({name: x for name, x in tensors.items() if not name.startswith("bank.")})


METHODS = {
    "bank_and_hypad": Method(
        config=BankAndHypADConfig, build=BankAndHypAD, family="detection", hyperbolic=True, flat_twin=flat_twin
    ),
}
