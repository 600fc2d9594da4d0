"""A small anomaly detector: how badly a patch is rebuilt from the few directions in which normal patches vary.

Shapes: N images, h w rows and columns of a patch grid, D features of a patch, r directions.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hypdefect.errors import ConfigError
from hypdefect.types import AnomalyMaps, Batch, Batches, LossTerms, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    rank: int = 2
    """r."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"method.rank must be at least 1, got {self.rank}")


class Detector(nn.Module):
    """Anomaly of a patch: its squared distance to the span of `basis` round `mean`."""

    needs: ClassVar[Needs] = "patches"
    mean: Tensor

    def __init__(self, config: DetectorConfig, dim: int) -> None:
        super().__init__()
        self.rank = min(config.rank, dim)
        self.basis = nn.Parameter(torch.eye(dim)[:, : self.rank].clone())
        self.register_buffer("mean", torch.zeros(dim))
        self.started = False

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        patches = torch.cat([batch.views["patch"].flatten(0, 2) for batch in normals])
        self.mean = patches.mean(0)
        if not self.started:
            directions = torch.linalg.svd(patches - self.mean, full_matrices=False)[2]
            self.basis = nn.Parameter(directions[: self.rank].T.contiguous())

    def start_from(self, weights: dict[str, Tensor]) -> None:
        if weights["basis"].shape != self.basis.shape:
            raise ConfigError("starting weights do not fit this configuration: another rank")
        self.basis, self.started = nn.Parameter(weights["basis"].clone()), True

    def loss(self, item: Batch, generator: torch.Generator) -> LossTerms:
        total = self.errors(item.views["patch"]).mean()
        return LossTerms(total, {"total": float(total.detach())})

    def errors(self, patches: Tensor) -> Tensor:
        """`[N h w]`."""
        x = patches - self.mean
        frame = torch.linalg.qr(self.basis).Q
        return (x - (x @ frame) @ frame.T).square().sum(-1)

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        errors = self.errors(batch.views["patch"])
        maps = interpolate(errors[:, None], scale_factor=8, mode="bilinear")[:, 0]
        return AnomalyMaps(score=errors.flatten(1).amax(1), map=maps)

    def export(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis.detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.mean, self.basis = tensors["mean"], nn.Parameter(tensors["basis"])


METHODS: dict[str, Any] = {
    "small_detector": Method(config=DetectorConfig, build=Detector, family="tests.elsewhere.detection")
}
