"""PatchCore's locally aware patch features (Roth et al., CVPR 2022, section 3.1), as AMC uses them.

Layers 2 and 3 of a convolutional network; every cell is replaced by its 3 x 3 neighbourhood; layer 3 is brought to
layer 2's grid; each layer's neighbourhoods, then both together, are pooled to layer 3's channel count (1024 for
ResNet-50: a 224 pixel image gives 28 x 28 patches of 1024). Pooling runs over channels and resizing over space, so they
commute, and pooling first is cheaper.

Shapes: N images, C channels, h w the grid of layer 2, D = layer 3's channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def patch_features(maps: list[Float[Tensor, "N _ _ _"]], neighbourhood: int = 3) -> Float[Tensor, "N h w D"]:
    """Patches of a pyramid, finest layer first; D is the channel count of the last layer."""
    dim, (height, width) = maps[-1].shape[1], maps[0].shape[2:]
    layers = []
    for x in maps:
        n, _, h, w = x.shape
        around = F.unfold(x, neighbourhood, padding=neighbourhood // 2)  # N, C * 9, h * w
        pooled = F.adaptive_avg_pool1d(around.transpose(1, 2), dim)  # N, h * w, D
        layer = pooled.transpose(1, 2).reshape(n, dim, h, w)
        if (h, w) != (height, width):
            layer = F.interpolate(layer, size=(height, width), mode="bilinear", align_corners=False)
        layers.append(layer.permute(0, 2, 3, 1))
    both = torch.stack(layers, -2).flatten(-2)  # N, h, w, layers * D
    return F.adaptive_avg_pool1d(both.flatten(0, 2), dim).unflatten(0, both.shape[:3])
