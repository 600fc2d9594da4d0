"""Shape descriptors of a region: what pooling under a mask loses, namely how large, long, thin and broken it is.

Moments' ellipse, box, area, perimeter and inscribed circle are what inspection tools measure of a blob. Sizes are in
pixels of the source image, because scale tells defects apart, and logarithmic, so that a doubling counts the same
everywhere.

Shapes: H W pixels, S descriptors.
"""

import numpy as np
from jaxtyping import Bool, Float32
from scipy import ndimage

STANDARD: dict[str, tuple[float, float]] = {
    "log area": (6.15, 2.51),
    "log share of the image": (-5.74, 2.43),
    "log major axis": (3.98, 1.26),
    "log minor axis": (2.65, 1.52),
    "log elongation": (1.33, 0.92),
    "log inscribed radius": (1.84, 1.23),
    "filling of the ellipse": (0.80, 0.15),
    "log perimeter^2 / area": (3.40, 0.79),
    "log number of pieces": (0.00, 0.69),
    "steepness": (0.66, 0.31),
    "log distance to the border": (1.37, 1.89),
    "at the border": (0.63, 0.48),
    "log box height": (3.62, 1.36),
    "log box width": (3.53, 1.36),
}
"""Descriptor -> centre and scale: mean and standard deviation over the regions of 400 pseudo-defects, by the laws that
`pseudo_defects.draw_laws` gives for seeds 0 to 39 on images of 128 to 1024 pixels a side (evenly in log): a population
that knows no image set. Its regions are of one piece mostly, so pieces are counted in doublings instead."""

SHAPE_DIMS = len(STANDARD)
LIMIT = 2.5
"""Standardised descriptors are clipped to this on either side: no single odd region outweighs all else."""

_EIGHT = np.ones((3, 3), dtype=bool)
_CENTRE, _SCALE = np.array(list(STANDARD.values())).T


def region_shape(mask: Bool[np.ndarray, "H W"] | None) -> Float32[np.ndarray, "S"]:
    """Standardised descriptors of a region in the order of `STANDARD`; zeros, the population's mean, where there is no
    region to speak of: no mask, an empty one, or one that covers the whole image."""
    if mask is None or mask.all() or not mask.any():
        return np.zeros(SHAPE_DIMS, dtype=np.float32)
    return np.clip((descriptors(mask) - _CENTRE) / _SCALE, -LIMIT, LIMIT).astype(np.float32)


def descriptors(mask: Bool[np.ndarray, "H W"]) -> np.ndarray:
    """Raw descriptors `[S]` of a region that has a pixel and leaves one out.

    The axes are those of the ellipse with the region's second moments (4 standard deviations long; each pixel is a
    square of variance 1/12), its perimeter the number of pixels with a 4-neighbour outside, pieces are 8-connected.
    Steepness is |sin| of the major axis' angle: 0 lying, 1 standing.
    """
    [(rows, columns)] = ndimage.find_objects(mask.view(np.uint8))
    border = min(rows.start, columns.start, mask.shape[0] - rows.stop, mask.shape[1] - columns.stop)
    around = mask[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1]
    at = np.argwhere(around)
    area = len(at)
    variances, axes = np.linalg.eigh(np.cov(at.T, bias=True) + np.eye(2) / 12)
    minor, major = 4 * np.sqrt(variances)
    perimeter = int((around & ~ndimage.binary_erosion(around)).sum())
    return np.array(
        [
            np.log(area),
            np.log(area / mask.size),
            np.log(major),
            np.log(minor),
            np.log(major / minor),
            np.log(ndimage.distance_transform_edt(around).max()),
            area / (np.pi / 4 * major * minor),
            np.log(perimeter**2 / area),
            np.log(ndimage.label(around, _EIGHT)[1]),
            abs(axes[0, 1]),
            np.log1p(border),
            float(border <= 1),
            np.log(rows.stop - rows.start),
            np.log(columns.stop - columns.start),
        ]
    )
