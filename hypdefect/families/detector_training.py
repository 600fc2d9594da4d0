"""Training of detectors that are networks: what an item holds, for this process and for Ray Train alike.

An item is a few normal images, each perhaps with another brightness, contrast and saturation, the teacher's patches of
them as they then are, and as many pieces of pictures of other things, half as wide. It depends on its number alone. The
patches of an image as it is are the stored ones; the teacher computes those of the others.

Shapes: N images of an item, S side of the network input.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from hypdefect.evaluation import RunConfig
from hypdefect.families.image_files import ImageFile
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import PatchExtractor, RecipeConfig, extractor_for, pixels_of, resize
from hypdefect.training import SteppedConfig
from hypdefect.types import Batch, Batches

AMOUNT = 0.2
"""Brightness, contrast and saturation are multiplied by 1 - AMOUNT to 1 + AMOUNT."""
GREY = 0.3
"""Chance that a picture of something else loses its colours, as in EfficientAD."""
LUMA = (0.299, 0.587, 0.114)


class StoredImages(Batches, Protocol):
    """Images whose patches are stored, in the order of their files."""

    def select(self, positions: Sequence[int]) -> Batches:
        """Some of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorTraining:
    """A `training.Training`: the networks of a detector on normal images."""

    run: RunConfig
    dim: int
    normals: StoredImages
    """The stored patches of the images in `files`."""
    files: tuple[ImageFile, ...]
    backbone: str
    recipe: RecipeConfig
    pictures: tuple[UInt8[np.ndarray, "_ _ 3"], ...]
    """Of other things: none shows a part."""
    report_every: int

    @property
    def config(self) -> SteppedConfig:
        """The steps and rates of the method's own configuration."""
        method: Any = self.run.method
        return SteppedConfig(
            steps=method.steps,
            items_per_step=method.items_per_step,
            lr=method.lr,
            weight_decay=method.weight_decay,
            report_every=min(self.report_every, method.steps),
            seed=method.seed,
        )

    @property
    def settings(self) -> dict[str, object]:
        """What decides the outcome beside the run and the images: nothing."""
        return {}

    def model(self) -> nn.Module:
        """The detector before step 0: it has seen the teacher's patches of all normal images."""
        model: Any = self.run.model(self.dim)
        model.begin(self.normals)
        trained: nn.Module = model.train()
        return trained

    def item(self, number: int) -> Batch:
        """Group `number` of the images (`in_epochs`)."""
        method: Any = self.run.method
        generator = torch.Generator().manual_seed(method.seed * 1_000_003 + number)
        chosen = in_epochs(number, method.images, len(self.files), method.seed)
        side = self.recipe.whole_size
        images = [self.files[i].read(side) for i in chosen]
        seen = [jittered(image, method.jitter, generator) for image in images]
        patches = torch.cat([batch.views["patch"] for batch in self.normals.select(chosen)])
        changed = [row for row, (image, own) in enumerate(zip(images, seen, strict=True)) if own is not image]
        if changed:
            inputs = [seen[row][None] for row in changed]
            with torch.no_grad():
                patches[changed] = _teacher(self.backbone, self.recipe).patches(inputs)
        views = {"patch": patches, "pixels": torch.stack(seen)}
        views["unrelated"] = torch.stack([unrelated(self.pictures, side // 2, generator) for _ in chosen])
        none = torch.zeros(len(chosen), dtype=torch.long)
        return Batch(image_ids=tuple(self.files[i].uri for i in chosen), views=views, labels=none, aug_index=none)


def in_epochs(number: int, size: int, total: int, seed: int) -> list[int]:
    """Group `number` of `size` images of an endless stream, in which every one of `total` comes once before any comes
    again."""
    places = range(number * size, (number + 1) * size)
    return [shuffled_order(total, seed, at // total)[at % total] for at in places]


@functools.lru_cache(maxsize=2)
def shuffled_order(total: int, seed: int, epoch: int) -> list[int]:
    """Numbers of `total` images in the order of an epoch."""
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed + 7919 * epoch)).tolist()
    return order


@functools.lru_cache(maxsize=1)
def _teacher(backbone: str, recipe: RecipeConfig) -> PatchExtractor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = extractor_for(get_backbone(backbone), recipe, device, needs="patches")
    assert isinstance(extractor, PatchExtractor)
    return extractor


def jittered(pixels: Float[Tensor, "3 S S"], chance: float, generator: torch.Generator) -> Float[Tensor, "3 S S"]:
    """The image, or by chance one of another brightness, contrast and saturation (in this order)."""
    draw, brightness, contrast, saturation = torch.rand(4, generator=generator).tolist()
    if draw >= chance:
        return pixels
    brightness, contrast, saturation = (1 + AMOUNT * (2 * x - 1) for x in (brightness, contrast, saturation))
    pixels = (pixels * brightness).clamp(0, 1)
    middle = _grey(pixels).mean()
    pixels = (middle + contrast * (pixels - middle)).clamp(0, 1)
    return (_grey(pixels) + saturation * (pixels - _grey(pixels))).clamp(0, 1)


def unrelated(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], side: int, generator: torch.Generator
) -> Float[Tensor, "3 S S"]:
    """A square piece, a quarter to all of the shorter side long, of one of the pictures."""
    which, size, top, left, grey = torch.rand(5, generator=generator).tolist()
    picture = pictures[int(which * len(pictures))]
    length = max(8, int(min(picture.shape[:2]) * (0.25 + 0.75 * size)))
    y, x = (int(share * (whole - length + 1)) for share, whole in zip((top, left), picture.shape[:2], strict=True))
    piece = resize(pixels_of(picture[y : y + length, x : x + length]), side)
    return _grey(piece).expand_as(piece).contiguous() if grey < GREY else piece


def _grey(pixels: Float[Tensor, "3 S S"]) -> Float[Tensor, "1 S S"]:
    weights = pixels.new_tensor(LUMA)[:, None, None]
    return (pixels * weights).sum(0, keepdim=True)
