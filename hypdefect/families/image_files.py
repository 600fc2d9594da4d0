"""Images that methods see as pixels: decoded whenever they are needed, through the path of their features.

Shapes: S side of the network input.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from hypdefect.features.extract import pixels_of, resize
from hypdefect.images import read_image, read_unchanged
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
        rule = Intensity.from_json(self.intensity) if self.intensity else None
        data = read_unchanged(Path(self.uri), self.file_id)
        return resize(pixels_of(read_image(data, name=self.uri, intensity=rule)), side)
