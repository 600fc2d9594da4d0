"""A small segmenter: a linear map of each pixel and its smoothed surroundings.

Shapes: N images, H W pixels, C defect classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from hypdefect.types import Batch, LossTerms, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    window: int = 9
    """Side of the surroundings in pixels; odd."""


class Segmenter(nn.Module):
    """Two classes: background and defect."""

    needs: ClassVar[Needs] = "pixels"

    def __init__(self, config: SegmenterConfig, dim: int) -> None:
        super().__init__()
        self.window = config.window
        self.head = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.head.weight.zero_()
            assert self.head.bias is not None
            self.head.bias.zero_()

    def start_from(self, weights: dict[str, Tensor]) -> None:
        self.load_state_dict(weights)

    def loss(self, item: Batch, generator: torch.Generator) -> LossTerms:
        assert item.targets is not None
        total = cross_entropy(self.scores(item), item.targets, weight=torch.tensor([0.2, 0.8]))
        return LossTerms(total, {"total": float(total.detach())})

    def scores(self, batch: Batch) -> Tensor:
        grey = batch.views["pixels"].mean(1, keepdim=True)
        near = avg_pool2d(grey, self.window, 1, self.window // 2, count_include_pad=False)
        spread = avg_pool2d((grey - near).square(), self.window, 1, self.window // 2, count_include_pad=False).sqrt()
        return self.head(torch.cat([grey, near, 10 * spread, 100 * spread.square()], 1))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        return self.scores(batch)

    def export(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors)


METHODS: dict[str, Any] = {
    "small_segmenter": Method(config=SegmenterConfig, build=Segmenter, family="tests.elsewhere.segmentation")
}
