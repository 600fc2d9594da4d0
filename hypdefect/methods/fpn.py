"""The plain peer of segmenters: a feature pyramid and a linear layer (Lin et al., CVPR 2017), trained in the same way.

Shapes: N images, K outputs, one a defect class and background, H W pixels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor, nn

from hypdefect.errors import ConfigError
from hypdefect.methods.pyramid import BACKBONE_RATE, GROUPS, Laterals, Pyramid, pixel_loss
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.types import Batch, Batches, LossTerms, Method, Needs

FAR = 30.0
"""How far below the named class the others of a region are, in logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """What every segmenter has: its network and how it is trained."""

    network: str = "efficientnet_lite0"
    """A backbone of timm; its weights are trained with the rest."""
    width: int = 48
    """Channels of the pyramid; a multiple of 8."""
    frozen: int = 2
    """Stages of the network, from the first, whose weights stay as they are: a quarter less time a step."""
    depthwise: bool = False
    """Whether depthwise filters of the other stages are trained: on a CPU a quarter more time a step, and no gain on
    NEU-Seg."""
    steps: int = 8000
    items_per_step: int = 2
    images: int = 2
    """Images of an item; a step has `items_per_step` of these, shared out over the workers. The paper's steps have 8
    images. Of the same number of images, steps of 4 learn more than steps of 8 (docs/experiments.md)."""
    lr: float = 1e-3
    """AdamW's, at step 0; the pretrained network's is 0.3 of it."""
    decay: Literal["cosine", "steps"] = "cosine"
    """cosine: the rate falls to 0; steps: to a tenth after 0.6 of the steps, to a hundredth after 0.85. HADNet's paper
    has steps and does not say where."""
    weight_decay: float = 1e-4
    jitter: float = 0.25
    """Chance that an image's brightness, contrast and saturation are changed."""
    smallest: float = 1.0
    """Least side of the piece of an image that is learned from, as a share of the image's; 1: the whole image."""
    pasted: float = 0.0
    """Chance that an image gets the defects of another image that is learned from (copy-paste augmentation)."""
    rare: float = 0.3
    """Of a class that a share f < `rare` of the images shows, the images come sqrt(rare / f) times an epoch (repeat
    factor sampling; Gupta et al., CVPR 2019); 0: every image comes once."""
    mirrored: bool = False
    """Answer with the mean of the shares of the image and of two mirrored ones: three times the time. Training stays
    what it is: a finished run is published anew."""
    regions: Literal["validated", "whole", "pixels"] = "validated"
    """Not in the papers. whole: a connected region is one defect and gets one name (`name_regions`); pixels: each
    location is named by itself; validated: what the trained network does better on the images of validation."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "width", "steps", "items_per_step", "images", "lr")
        require_at_least(self, 0, "weight_decay", "frozen")
        require_share(self, "jitter", "smallest", "pasted", "rare")
        require_positive(self, "smallest")
        if rest := self.width % GROUPS:
            near = f"{self.width - rest} or {self.width - rest + GROUPS}" if self.width > GROUPS else f"{GROUPS}"
            raise ConfigError(f"method.width must be a multiple of {GROUPS}, got {self.width}; take {near}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FPNConfig(SegmenterConfig):
    """The pyramid has no settings of its own."""


class TrainedSegmenter(nn.Module, ABC):
    """A network of pixels: `scores` of a subclass, its loss, and what the registry keeps, all of its tensors."""

    needs: ClassVar[Needs] = "pixels"
    whole_regions: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.trained = False
        self.register_buffer("whole_regions", torch.tensor(config.regions == "whole"))

    def begin(self, painted: Batches) -> None:
        """What is decided before step 0; `painted` are images (view "clean"), the same with pseudo-defects painted on
        (view "pixels") and `targets`, 1 where they are."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The pretrained network and the rest."""
        pretrained = {id(p) for module in self.children() if isinstance(module, Pyramid) for p in module.parameters()}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[id(parameter) in pretrained].append(parameter)
        return [{"params": groups[0], "factor": 1.0}, {"params": groups[1], "factor": BACKBONE_RATE}]

    @abstractmethod
    def scores(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K h w"]:
        """Logits on the grid of the finest map."""

    def loss(self, item: Batch, generator: torch.Generator) -> LossTerms:
        """Of the pixels of some images."""
        assert item.targets is not None
        total = pixel_loss(self.scores(item.views["pixels"]), item.targets)
        return LossTerms(total, {"pixels": float(total.detach())})

    @torch.no_grad()
    def logits(self, batch: Batch) -> Float[Tensor, "N K H W"]:
        """At the size of the images. Raises RuntimeError before training."""
        if not self.trained:
            raise RuntimeError(f"{type(self).__name__}.logits needs a trained network")
        pixels = batch.views["pixels"]
        scores = self.mirrored_scores(pixels) if self.config.mirrored else self.scores(pixels)
        if self.whole_regions:
            scores = name_regions(scores)
        return nn.functional.interpolate(scores, size=pixels.shape[2:], mode="bilinear", align_corners=False)

    def mirrored_scores(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K h w"]:
        """Logits of the mean share over the images, the same upside down, and left to right."""
        turned = [self.scores(pixels.flip(axis)).flip(axis) for axis in (2, 3)]
        shares = torch.stack([self.scores(pixels), *turned]).float().log_softmax(2)
        return shares.logsumexp(0)

    def finish(self) -> None:
        """Training is over."""
        self.trained = True
        self.eval()

    def export(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors)
        self.finish()


def name_regions(logits: Float[Tensor, "N K h w"]) -> Float[Tensor, "N K h w"]:
    """Give all of a connected region's share of defects to one class: that of the largest mean share.

    A region is 8-connected. It holds the locations where background has less than half of the share. The shares of
    background do not change, nor do locations outside the regions.
    """
    shares = logits.float().softmax(1)
    found = (shares[:, 0] < 0.5).numpy(force=True)
    defects = shares[:, 1:].numpy(force=True)
    winners = np.zeros(found.shape, dtype=np.int64)
    for number in np.flatnonzero(found.any((1, 2))):
        regions, count = ndimage.label(found[number], np.ones((3, 3)))
        means = np.stack([ndimage.mean(share, regions, range(1, count + 1)) for share in defects[number]])
        winners[number] = np.concatenate([[0], 1 + means.argmax(0)])[regions]
    winner = torch.from_numpy(winners).to(logits.device)[:, None]
    together = logits[:, 1:].logsumexp(1, keepdim=True)
    classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    named = torch.where(classes == winner, together, together - FAR)
    return torch.cat([logits[:, :1], torch.where(winner > 0, named, logits[:, 1:])], 1)


class FPN(TrainedSegmenter):
    """A linear layer on the finest level of a feature pyramid."""

    def __init__(self, config: FPNConfig, num_classes: int) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.pyramid = Pyramid(config.network, config.frozen, config.depthwise)
            self.laterals = Laterals(self.pyramid.dims, config.width)
            self.head = nn.Conv2d(config.width, num_classes + 1, 1)

    def scores(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K h w"]:
        answer: Tensor = self.head(self.laterals(self.pyramid(pixels)))
        return answer


METHODS = {"fpn": Method(config=FPNConfig, build=FPN, family="segmentation")}
