"""Defects of one image on another: copy-paste augmentation (Ghiasi et al., CVPR 2021).

Shapes: H W of the image that gets them, h w of the one they come from.
"""

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from scipy import ndimage

RIM = 3
"""Pixels round a defect that come with it."""
SOFT = 2.0
"""Deviation of the Gaussian, in pixels, over which the two images merge."""
SMALLEST = 0.7
"""Least side, as a share of the largest that fits."""
LEAST_DEVIATION = 2.0
"""Grey values: a plain image is no reason to magnify its noise."""


def paste_regions(
    image: UInt8[np.ndarray, "H W 3"],
    target: Int[np.ndarray, "H W"],
    other: UInt8[np.ndarray, "h w 3"],
    other_target: Int[np.ndarray, "h w"],
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "H W"]]:
    """The image with the defects of another one, and its classes of pixels; both as they were where there are none.

    The other image is made to fit, its size and place are random, and its brightness and contrast are those that the
    place has.
    """
    height, width = target.shape
    share = min(height / other.shape[0], width / other.shape[1], 1.0) * rng.uniform(SMALLEST, 1)
    size = (max(1, round(other.shape[0] * share)), max(1, round(other.shape[1] * share)))
    defects = Image.fromarray(other_target.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    labels = np.asarray(defects).astype(target.dtype)
    if not labels.any():
        return image, target
    pixels = np.asarray(Image.fromarray(other).resize(size[::-1], Image.Resampling.BILINEAR)).astype(np.float32)
    top, left = rng.integers(0, height - size[0] + 1), rng.integers(0, width - size[1] + 1)
    place = np.s_[top : top + size[0], left : left + size[1]]
    below = image[place].astype(np.float32)
    taken = ndimage.binary_dilation(labels > 0, np.ones((2 * RIM + 1, 2 * RIM + 1)))
    around = pixels if taken.all() else pixels[~taken]
    wanted = below if taken.all() else below[~taken]
    contrast = max(wanted.std(), LEAST_DEVIATION) / max(around.std(), LEAST_DEVIATION)
    pixels = (pixels - around.mean()) * contrast + wanted.mean()
    weight = ndimage.gaussian_filter(taken.astype(np.float32), SOFT)[..., None]
    image, target = image.copy(), target.copy()
    image[place] = np.rint(np.clip(weight * pixels + (1 - weight) * below, 0, 255)).astype(np.uint8)
    target[place] = np.where(labels > 0, labels, target[place])
    return image, target
