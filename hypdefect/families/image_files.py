"""Images that methods see as pixels, and their masks: decoded whenever they are needed, as for their features.

Shapes: H W pixels of an image, S side of the network input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hypdefect.features.extract import pixels_of, resize
from hypdefect.images import exif_orientation, read_bytes, read_image, read_mask, read_unchanged
from hypdefect.images.intensity import Intensity


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image lies, the hash of its bytes, and the rule by which its deep pixels become 8-bit."""

    uri: str
    file_id: str
    intensity: str = ""

    def read(self, side: int) -> Float[Tensor, "3 S S"]:
        """The image in [0, 1], resized to a square.

        Raises:
            DataError: the file is missing, damaged, or another one than its features were made of.
        """
        return resize(pixels_of(self.pixels()), side)

    def pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image as it is. Raises DataError as `read`."""
        rule = Intensity.from_json(self.intensity) if self.intensity else None
        data = read_unchanged(Path(self.uri), self.file_id)
        return read_image(data, name=self.uri, intensity=rule)


@dataclass(frozen=True, slots=True)
class MaskFile:
    """Where a mask lies, the hash of its bytes, and what it takes to read it."""

    uri: str
    mask_id: str
    image_uri: str
    size: tuple[int, int]

    def read(self) -> Bool[np.ndarray, "H W"]:
        """The marked pixels.

        Raises:
            DataError: the file is missing, damaged, of another size than its image, or another one than was ingested.
        """
        turned = exif_orientation(read_bytes(Path(self.image_uri)), name=self.image_uri)
        data = read_unchanged(Path(self.uri), self.mask_id)
        return read_mask(data, self.size, name=self.uri, orientation=turned)[0]


def full_mask(files: Sequence[MaskFile], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Everything that is marked of an image."""
    marked = np.zeros(size, dtype=bool)
    for file in files:
        marked |= file.read()
    return marked


def image_file(row: dict[str, Any]) -> ImageFile:
    """The image of a row of a manifest."""
    return ImageFile(row["uri"], row["file_id"], row["intensity"])


def mask_file(row: dict[str, Any]) -> MaskFile:
    """The mask of a row of a manifest."""
    return MaskFile(row["mask_uri"], row["mask_id"], row["uri"], (row["height"], row["width"]))
