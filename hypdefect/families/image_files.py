"""Images that methods see as pixels: decoded whenever they are needed, through the path of their features.

Shapes: S side of the network input.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from hypdefect.features.extract import pixels_of, resize
from hypdefect.images import read_bytes, read_image
from hypdefect.images.intensity import Intensity


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Where an image lies, and the rule by which its deep pixels become 8-bit."""

    uri: str
    intensity: str = ""

    def read(self, side: int) -> Float[Tensor, "3 S S"]:
        """The image in [0, 1], resized to a square.

        Raises:
            DataError: the file is missing or damaged.
        """
        rule = Intensity.from_json(self.intensity) if self.intensity else None
        return resize(pixels_of(read_image(read_bytes(Path(self.uri)), name=self.uri, intensity=rule)), side)
