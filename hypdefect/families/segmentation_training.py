"""Training of segmenters: marked images, what an item holds, and the validation that chooses the weights that are kept.

An item is a few images, each with its target: a piece of the image or all of it, turned and mirrored at random, perhaps
with another brightness, contrast and saturation. It depends on its number alone.

Shapes: H W pixels of an image, S side of the network input, C defect classes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy import ndimage
from torch import Tensor, nn

from hypdefect.errors import DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families.detector_training import in_epochs, jittered, shuffled_order
from hypdefect.families.image_files import ImageFile, MaskFile
from hypdefect.features.extract import pixels_of, resize
from hypdefect.images.pasted_regions import paste_regions
from hypdefect.images.pasted_textures import PERLIN, pasted
from hypdefect.images.pseudo_defects import SynthesisConfig, load_textures
from hypdefect.images.regions import EIGHT, cleaned_classes
from hypdefect.methods.fpn import TrainedSegmenter
from hypdefect.metrics import SegmentationMetrics
from hypdefect.precision import fast_products
from hypdefect.training import TrainConfig
from hypdefect.types import Batch, Segmenter

PAINTED = 32
"""Images that pseudo-defects are painted on before step 0."""
REPORT_EVERY = 400
"""Steps between validations: on NEU-Seg one takes as long as some 50 steps."""
DECAYS = (0.6, 0.85)
"""Shares of the steps after each of which a rate that falls in steps is a tenth of what it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """Images with the class of each pixel: `masks[i]` has one mask a class, in the order of the classes, or none."""

    files: tuple[ImageFile, ...]
    masks: tuple[tuple[tuple[int, MaskFile], ...], ...]
    """Of each image: number of the class, from 1, and where it is."""
    image_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def select(self, positions: list[int]) -> "Marked":
        return Marked(
            files=tuple(self.files[i] for i in positions),
            masks=tuple(self.masks[i] for i in positions),
            image_ids=tuple(self.image_ids[i] for i in positions),
        )

    def read(self, number: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "H W"]]:
        """The image, and the number of the class of each pixel, 0 for background.

        Raises:
            DataError: a file is missing, damaged or changed, or its mask of another size.
        """
        image = self.files[number].pixels()
        target = np.zeros(image.shape[:2], dtype=np.int64)
        marks = [(label, mask.read()) for label, mask in self.masks[number]]
        for label, mark in sorted(marks, key=lambda pair: -int(pair[1].sum())):  # a smaller one lies on a larger one
            target[mark] = label
        return image, target


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterTrainConfig(TrainConfig):
    """As the loop wants it; a GPU computes in bfloat16 where that is safe, a CPU in float32 with `fast_products`."""

    patience: int = 0
    """Reports without a better validation after which training ends; 0: all steps."""
    decay: Literal["cosine", "steps"] = "cosine"
    """As `fpn.SegmenterConfig.decay`."""

    def rate(self, step: int) -> float:
        if self.decay == "cosine":
            return TrainConfig.rate(self, step)
        return self.lr * 0.1 ** sum(step >= share * self.steps for share in DECAYS)

    def precision(self, device: str | torch.device) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()

    def products(self) -> AbstractContextManager[None]:
        return fast_products()

    def is_stale(self, reports: int) -> bool:
        return 0 < self.patience <= reports


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterTraining:
    """A `training.ValidatedTraining`."""

    run: RunConfig
    classes: tuple[str, ...]
    learned: Marked
    validated: Marked
    epoch: tuple[int, ...]
    """Numbers of the images of an epoch (`epoch_of`)."""
    side: int
    """S."""
    report_every: int = REPORT_EVERY
    patience: int = 0

    @property
    def config(self) -> SegmenterTrainConfig:
        """The steps and rates of the method's own configuration."""
        method: Any = self.run.method
        return SegmenterTrainConfig(
            steps=method.steps,
            items_per_step=method.items_per_step,
            lr=method.lr,
            weight_decay=method.weight_decay,
            report_every=min(self.report_every, method.steps),
            seed=method.seed,
            patience=self.patience,
            decay=method.decay,
        )

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """Images that are learned from."""
        return self.learned.files

    @property
    def settings(self) -> dict[str, object]:
        """What decides the outcome beside the run and the images."""
        return {"side": self.side, "patience": self.patience, "classes": list(self.classes)}

    def model(self) -> nn.Module:
        """The segmenter before step 0: it has seen images with pseudo-defects painted on."""
        model: Any = self.run.model(len(self.classes))
        model.begin(Painted(self))
        trained: nn.Module = model.train()
        return trained

    def item(self, number: int) -> Batch:
        """Group `number` of the images, in epochs."""
        method: Any = self.run.method
        generator = torch.Generator().manual_seed(method.seed * 1_000_003 + number)
        chosen = [self.epoch[i] for i in in_epochs(number, method.images, len(self.epoch), method.seed)]
        pieces = [self._piece(i, method, generator) for i in chosen]
        return batch_of([self.learned.image_ids[i] for i in chosen], pieces)

    def _piece(self, number: int, method: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image, target = self._with_pasted(*self.learned.read(number), method, generator)
        share, y, x, mirror, turns = torch.rand(5, generator=generator).tolist()
        height, width = (max(1, round(n * (method.smallest + (1 - method.smallest) * share))) for n in target.shape)
        top, left = round(y * (target.shape[0] - height)), round(x * (target.shape[1] - width))
        part = np.s_[top : top + height, left : left + width]
        pixels, marked = sized(image[part], target[part], self.side)
        if mirror < 0.5:
            pixels, marked = pixels.flip(2), marked.flip(1)
        quarter = int(4 * turns)
        pixels, marked = pixels.rot90(quarter, (1, 2)), marked.rot90(quarter, (0, 1))
        return jittered(pixels, method.jitter, generator), marked

    def _with_pasted(
        self, image: np.ndarray, target: np.ndarray, method: Any, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The image, or by chance the same with the defects of another image, drawn as an epoch has them."""
        if not method.pasted:
            return image, target
        draw, which = torch.rand(2, generator=generator).tolist()
        if draw >= method.pasted:
            return image, target
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        givers = [i for i in self.epoch if self.learned.masks[i]]
        return paste_regions(image, target, *self.learned.read(givers[int(which * len(givers))]), rng)

    def seen(self, model: nn.Module, share: slice) -> Float[Tensor, "_"]:
        """Counts of (true, predicted) classes of the pixels of images that are not learned from."""
        assert isinstance(model, TrainedSegmenter)
        model.finish()
        images = self.validated.select(list(range(len(self.validated))[share]))
        counts = measured(model, images, self.classes, self.side).counts
        model.trained = False
        model.train()
        return torch.from_numpy(counts).double().flatten()

    def value(self, seen: Float[Tensor, "_"]) -> float:
        """Mean IoU of the defect classes."""
        metrics = SegmentationMetrics(self.classes)
        metrics.counts += seen.view(metrics.counts.shape).long().numpy()
        return metrics.compute()["miou"]


@dataclass(frozen=True, slots=True)
class Painted:
    """A `types.Batches`: images as they are (view "clean"), the same with pseudo-defects painted on, which `targets`
    show. Textures are read when the first image is asked for, since most methods ask for none."""

    training: SegmenterTraining

    def __iter__(self) -> Iterator[Batch]:
        own = self.training
        _, textures = load_textures(SynthesisConfig())
        order = shuffled_order(len(own.learned), own.config.seed, 0)
        done = 0
        for place, number in enumerate(order):
            if done == PAINTED:
                return
            image, target = own.learned.read(number)
            rng = np.random.default_rng([own.config.seed, place])
            texture = textures[place % len(textures)]
            made = pasted(image, PERLIN, texture, rng, target == 0)
            if made is None:
                continue
            done += 1
            painted, region = made
            pixels, marked = sized(painted, region.astype(np.int64), own.side)
            batch = batch_of([own.learned.image_ids[number]], [(pixels, marked)])
            clean = resize(pixels_of(image), own.side)[None]
            yield replace(batch, views=batch.views | {"clean": clean})
        if not done:
            raise DataError(f"of {len(order)} images none has a place where a pseudo-defect could be painted")


def epoch_of(images: Marked, rare: float, seed: int) -> tuple[int, ...]:
    """Numbers of the images of an epoch: each comes as often as its rarest class asks for (`SegmenterConfig.rare`).
    Where that is 1.4 times, four in ten of them, drawn by the seed, come twice and the others once."""
    shown = [{label for label, _ in masks} for masks in images.masks]
    counts = Counter(label for labels in shown for label in labels)
    shares = [min((counts[label] / len(images) for label in labels), default=1.0) for labels in shown]
    times = np.sqrt(np.maximum(rare / np.array(shares), 1.0))
    drawn = np.floor(times + np.random.default_rng(seed).random(len(images))).astype(int)
    numbers: list[int] = np.repeat(np.arange(len(images)), drawn).tolist()
    return tuple(numbers)


def sized(image: UInt8[np.ndarray, "H W 3"], target: Int[np.ndarray, "H W"], side: int) -> tuple[Tensor, Tensor]:
    """Both as the network sees them: `[3 S S]` in [0, 1] and `[S S]`."""
    height, width = target.shape
    marked = torch.from_numpy(shrunk(np.ascontiguousarray(target), (min(side, height), min(side, width))))
    marked = marked[None, None].float()
    near = nn.functional.interpolate(marked, size=(side, side), mode="nearest-exact")
    return resize(pixels_of(np.ascontiguousarray(image)), side), near[0, 0].long()


def shrunk(target: Int[np.ndarray, "H W"], size: tuple[int, int]) -> Int[np.ndarray, "h w"]:
    """The target in fewer cells: each has the class with the largest share of its area.

    A connected mark that has the largest share of no cell would vanish. It gets the cells that no other mark has, and
    that it covers at least half as much as any of the eight cells round them.
    """
    if size == target.shape:
        return target

    rows_hH, columns_wW = (overlaps(n, cells) for n, cells in zip(target.shape, size, strict=True))

    def shares(where: np.ndarray) -> np.ndarray:
        return rows_hH @ where.astype(np.float32) @ columns_wW.T

    labels = np.flatnonzero(np.bincount(target.ravel()))[::-1]  # of equal shares the defect's counts
    small = labels[np.stack([shares(target == label) for label in labels]).argmax(0)]
    y, x = ((2 * np.arange(n) + 1) * cells // (2 * n) for n, cells in zip(target.shape, size, strict=True))
    large = small[np.ix_(y, x)]
    for label in labels[labels > 0]:
        marks, count = ndimage.label(target == label, EIGHT)
        gone = np.arange(count + 1) > 0
        gone[marks[large == label]] = False
        if gone.any():
            covered = shares(gone[marks])
            small[(small == 0) & (covered > 0) & (covered >= ndimage.maximum_filter(covered, 3) / 2)] = label
    return small


def overlaps(n: int, cells: int) -> Float[np.ndarray, "cells n"]:
    """How much of each of some equal cells lies over each of `n` pixels; a row's sum is 1. (Adaptive average pooling
    gives whole pixels to cells that they overlap: marks grow.)"""
    edges = np.arange(cells + 1) * n / cells
    pixel = np.arange(n)
    inside = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.asarray(inside.clip(0) * cells / n, dtype=np.float32)


def batch_of(image_ids: list[str], pieces: list[tuple[Tensor, Tensor]]) -> Batch:
    none = torch.zeros(len(pieces), dtype=torch.long)
    pixels, targets = (torch.stack(parts) for parts in zip(*pieces, strict=True))
    return Batch(
        image_ids=tuple(image_ids), views={"pixels": pixels}, labels=none, aug_index=none, targets=targets.contiguous()
    )


@torch.no_grad()
def measured(model: Segmenter, images: Marked, classes: tuple[str, ...], side: int) -> SegmentationMetrics:
    """Every pixel of every image, at the image's own size and as it is answered, counted once. An image is forgotten
    when it was seen."""
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    metrics = SegmentationMetrics(classes)
    for number in range(len(images)):
        image, target = images.read(number)
        found = scores_of(model, image, side, device).argmax(0).to(torch.uint8)
        metrics.update(cleaned_classes(found.numpy(force=True)), target)
    return metrics


def scores_of(
    model: Segmenter, image: UInt8[np.ndarray, "H W 3"], side: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "K H W"]:
    """Logits of each pixel of an image, background first, at the image's own size."""
    none = torch.zeros(1, dtype=torch.long)
    pixels = resize(pixels_of(image), side)[None].to(device)
    logits = model.logits(Batch(image_ids=("",), views={"pixels": pixels}, labels=none, aug_index=none))
    full = nn.functional.interpolate(logits.float(), size=image.shape[:2], mode="bilinear", align_corners=False)
    return full[0]


@torch.no_grad()
def foreground(model: Segmenter, image: UInt8[np.ndarray, "H W 3"], side: int) -> Float[np.ndarray, "H W"]:
    """How likely each pixel shows a defect, of whatever class."""
    return np.asarray(1 - scores_of(model, image, side).softmax(0)[0].numpy())
