"""From anomaly scores of patches to maps of pixels and scores of images, shared by detectors that read patches.

Shapes: N images, h w rows and columns of the patch grid, H W pixels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from hypdefect.types import AnomalyMaps

STRIDE = 8
"""Pixels of a network input that a patch stands for, along each side: the grid is that of the stage at stride 8."""


def pixel_maps(scores: Float[Tensor, "N h w"], sigma: float) -> Float[Tensor, "N H W"]:
    """Patch scores as maps of the network input: bilinear upsampling, then a Gaussian of `sigma` pixels.

    PatchCore (Roth et al., CVPR 2022), section 3.3, smooths with sigma = 4. 0 leaves the upsampled map as it is.
    """
    maps = interpolate(scores[:, None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return blurred(maps, sigma)[:, 0]


def blurred(maps: Float[Tensor, "N C H W"], sigma: float) -> Float[Tensor, "N C H W"]:
    """Gaussian blur, cut off at 4 sigma; beyond the border the map goes on as its outermost pixel."""
    if not sigma:
        return maps
    radius = max(1, round(4 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel /= kernel.sum()
    channels = maps.shape[1]
    rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    maps = torch.conv2d(pad(maps, (0, 0, radius, radius), mode="replicate"), rows, groups=channels)
    return torch.conv2d(pad(maps, (radius, radius, 0, 0), mode="replicate"), columns, groups=channels)


def top_mean(scores: Float[Tensor, "N h w"], top: int) -> Float[Tensor, "N"]:
    """Mean of the `top` highest patch scores of each image; 1 is their maximum."""
    flat = scores.flatten(1)
    return flat.topk(min(top, flat.shape[1]), dim=1).values.mean(1)


def units_of(answers: Sequence[AnomalyMaps]) -> Float[Tensor, "4"]:
    """Median and deviation of a detector's scores of normal images, then of every 8th pixel of their maps."""
    scores = torch.cat([answer.score for answer in answers])
    pixels = torch.cat([answer.map[:, ::8, ::8].flatten() for answer in answers])
    return torch.stack([*median_and_deviation(scores), *median_and_deviation(pixels)])


def weighted_sum(
    answers: Sequence[AnomalyMaps], units: Sequence[Float[Tensor, "4"]], weights: Sequence[float]
) -> AnomalyMaps:
    """Of several detectors' answers to the same images, each in deviations of normal images (`units_of`)."""
    score, anomaly_map = torch.zeros(()), torch.zeros(())
    for answer, (middle, deviation, pixel_middle, pixel_deviation), weight in zip(answers, units, weights, strict=True):
        score = score + weight * (answer.score - middle) / deviation
        anomaly_map = anomaly_map + weight * (answer.map - pixel_middle) / pixel_deviation
    return AnomalyMaps(score=score, map=anomaly_map)


def median_and_deviation(x: Float[Tensor, "N"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Median, and 1.4826 times the median distance from it, as of a normal distribution; at least 1e-6."""
    middle = x.median()
    return middle, (1.4826 * (x - middle).abs().median()).clamp_min(1e-6)
