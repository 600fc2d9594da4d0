"""What segmenters share: a pretrained network that is trained on, its maps of several scales, and the loss of pixels.

Batch norms are folded into the convolutions (timm's own) or keep the statistics of the pretrained network (others):
there are no statistics that would depend on the number of workers.

Shapes: N images, H W pixels, C defect classes, D channels of a scale, h w its rows and columns.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hypdefect.errors import ConfigError
from hypdefect.features.backbones import get_backbone, normalised

STRIDES = (4, 8, 16, 32)
"""Of the maps that are read."""
SCALES = len(STRIDES)
BACKBONE_RATE = 0.3
"""Learning rate of the pretrained network, as a share of that of the rest."""
GROUPS = 8
"""Of the channels of a pyramid, each of which is normalised by itself."""


class Pyramid(nn.Module):
    """A backbone of FAMILY timm whose maps of four strides are read and whose weights are trained.

    Args:
        frozen: stages, from the first, that are not trained; 0: all are.
        depthwise: whether the depthwise filters of the others are trained.

    What no map comes from, such as a classifier's last layers, is never trained.
    """

    def __init__(self, name: str, frozen: int, depthwise: bool = False) -> None:
        from hypdefect.features.timm_networks import PROBE_SIDE, Backbone  # timm takes seconds to import

        super().__init__()
        self.spec = get_backbone(name)
        if self.spec.family not in ("timm", "patchcore"):
            raise ConfigError(f"{name}: a segmenter trains a timm network; {self.spec.family} has no pyramid of maps")
        self.net = Backbone(self.spec).net
        infos = self.net.feature_info  # a list of what each stage gives
        self.layers = [place for place, info in enumerate(infos) if info["reduction"] in STRIDES]
        if len(self.layers) != SCALES:
            raise ConfigError(f"{name}: a segmenter needs maps of strides {STRIDES}; this network has not all of them")
        self.dims = tuple(int(infos[place]["num_chs"]) for place in self.layers)
        self.net.requires_grad_(True)
        self._freeze_unread(PROBE_SIDE)
        if not depthwise:
            for module in self.net.modules():
                if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                    module.requires_grad_(False)
        if frozen:
            self._freeze(frozen)

    def _freeze(self, stages: int) -> None:
        blocks = getattr(self.net, "blocks", None)
        if not isinstance(blocks, nn.Sequential):
            raise ConfigError(f"{self.spec.name}: the stages of this network are not known; set method.frozen to 0")
        if stages >= len(blocks):
            raise ConfigError(f"method.frozen must be below the {len(blocks)} stages of the network, got {stages}")
        for module in [self.net.conv_stem, *list(blocks)[:stages]]:
            module.requires_grad_(False)

    def _freeze_unread(self, side: int) -> None:
        """Freeze the parameters that no map of a `side` x `side` input depends on: workers would wait for their
        gradients."""
        with torch.inference_mode(False), torch.enable_grad():
            total = torch.stack([x.sum() for x in self(torch.zeros(1, 3, side, side))]).sum()
        parameters = list(self.net.parameters())
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def train(self, mode: bool = True) -> "Pyramid":
        """As of every module, but batch norms keep their statistics."""
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> list[Float[Tensor, "N _ _ _"]]:
        """Maps of RGB pixels in [0, 1], the finest first."""
        x = normalised(pixels, self.spec).contiguous(memory_format=torch.channels_last)
        maps: list[Tensor] = self.net.forward_intermediates(x, indices=self.layers, intermediates_only=True)
        return maps


class Separable(nn.Sequential):
    """A depthwise 3 x 3 and a pointwise convolution; `after` is a multiple of `GROUPS`."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
            nn.Conv2d(before, after, 1),
            nn.GroupNorm(GROUPS, after),
            nn.ReLU(),
        )


class Laterals(nn.Module):
    """A pyramid's maps, each brought to the same channels, added from the coarsest to the finest (FPN).

    Args:
        smooth_finest: whether the finest sum is smoothed, too; not where what comes after smooths it.
    """

    def __init__(self, dims: Sequence[int], width: int, smooth_finest: bool = True) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        coarser = [Separable(width, width) for _ in dims[1:]]
        self.smooth = nn.ModuleList([Separable(width, width) if smooth_finest else nn.Identity(), *coarser])

    def forward(
        self, maps: Sequence[Float[Tensor, "N _ _ _"]], more: Sequence[Float[Tensor, "N E _ _"]] = ()
    ) -> Float[Tensor, "N E h w"]:
        """`more` is added to the maps of as many of the finest scales."""
        total: Tensor | None = None
        for place, (step, smooth, x) in reversed(list(enumerate(zip(self.steps, self.smooth, maps, strict=True)))):
            own = step(x)
            if place < len(more):
                own = own + more[place]
            total = smooth(own if total is None else own + upsampled(total, own))
        assert total is not None
        return total


def upsampled(x: Float[Tensor, "N D h w"], like: Float[Tensor, "N _ H W"]) -> Float[Tensor, "N D H W"]:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def pixel_loss(logits: Float[Tensor, "N K h w"], targets: Int[Tensor, "N H W"]) -> Float[Tensor, ""]:
    """Cross-entropy, and one minus the soft Dice coefficient of the classes that are there, at the size of the
    targets."""
    full = F.interpolate(logits.contiguous(), size=targets.shape[1:], mode="bilinear", align_corners=False).float()
    logs = full.log_softmax(1)
    entropy, shares = F.nll_loss(logs, targets), logs.exp()
    truth = targets[:, None] == torch.arange(full.shape[1], device=targets.device)[:, None, None]
    counts = truth.sum((0, 2, 3))
    both = (shares * truth).sum((0, 2, 3))
    dice = 2 * both / (shares.sum((0, 2, 3)) + counts).clamp_min(1e-6)
    return entropy + (1 - dice[counts > 0]).mean()
