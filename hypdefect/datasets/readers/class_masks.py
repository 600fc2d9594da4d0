"""Masks whose pixel values are class indices, 0 for the background."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hypdefect.errors import DataError
from hypdefect.images import read_bytes, read_raw


def read_indices(path: Path, size_hw: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W"]:
    """The index of each pixel: the value of a grey image, the position in the palette of a palette image.

    Args:
        size_hw: height and width of the image that the mask belongs to; checked where given.

    Raises:
        DataError: unreadable, neither 8-bit grey nor palette, or not of the image's size.
    """
    data = read_bytes(path)
    pixels, _ = read_raw(data, name=str(path))
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
        indices = np.array(image) if mode == "P" else pixels[:, :, 0]
    if mode not in ("L", "P"):
        raise DataError(f"{path}: class indices are 8-bit grey or palette images, this one has mode {mode}")
    if size_hw is not None and indices.shape != size_hw:
        raise DataError(
            f"{path}: the mask is {indices.shape[1]} x {indices.shape[0]} pixels, its image {size_hw[1]} x "
            f"{size_hw[0]}; take both from one download"
        )
    return indices
