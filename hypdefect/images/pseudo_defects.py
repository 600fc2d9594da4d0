"""Pseudo-defects on images of good parts: the classes that meta-training tells apart.

A pseudo class is a law of shape crossed with a texture. Laws are drawn at random, one from each stratum of size (small,
medium, large) x elongation (round, long) x place (anywhere, at the border); nothing in them knows a real class. An
image of the class has a region by its law, a level set of anisotropic noise in which everything varies a little, and
in it a random place of the texture, pasted with random opacity. It is AMC's generator (noise mask x texture with
opacity 1 - beta, beta uniform in [0, 0.5); arXiv 2406.05645), whose class is the texture alone, with the single law of
shape replaced by a stratified family of them.

Shapes: H W rows and columns of the part's image, h w of a texture.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from hypdefect.config import digest
from hypdefect.errors import ConfigError
from hypdefect.files import data_root
from hypdefect.images import read_bytes, read_image

T = TypeVar("T")
VERSION = 1
"""Raise when the same settings give other images."""
MIN_PIXELS = 12
"""A region of fewer pixels is drawn again: too little for a defect."""
MIN_OPACITY = 0.5
JITTER = 0.15
"""Standard deviation of the logarithm of each size of one image round its law's."""
MIN_WAVE = 10.0
"""Shortest waves of the noise in pixels: of shorter ones hardly a piece has MIN_PIXELS."""
TRIES = 20
PATCH = 160
"""Side in pixels of the pieces that photographs are cut into where they stand for textures."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
SIZES = {"small": (0.002, 0.006), "medium": (0.015, 0.05), "large": (0.12, 0.35)}
"""Shares of the image that a region covers at most."""
ELONGATIONS = {"round": (1.0, 2.0), "long": (8.0, 14.0)}
STRATA = [
    (size, elongation, border)
    for border, elongation, size in itertools.product((False, True), ELONGATIONS, SIZES)
    if (size, elongation) != ("large", "long")  # such a region is a band across the image
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """A set of pseudo classes: every law of shape with every texture."""

    textures: int = 24
    """Textures used, evenly spread over those there are."""
    per_class: int = 4
    """Images of each class."""
    texture_folder: Path | None = None
    """Folder of pictures to paste from (searched with its sub-folders); default: dtd under $HYPDEFECT_DATA where it is,
    else pieces of the two photographs that come with scikit-learn."""
    kind: Literal["textures", "marks", "perlin", "poisson", "polygons"] = "textures"
    """textures: a region of each class's law and texture, which classifiers learn to tell apart; marks: also lines and
    spots, most of them darker or brighter than the part, which detectors learn to find (images.marks); the others are
    AMC's: a class is a texture under a noise mask, or a texture and a number of corners (images.pasted_textures)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("textures", 1), ("per_class", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"synthesis.{name} must be at least {least}, got {getattr(self, name)}")


def load_textures(config: SynthesisConfig) -> tuple[str, list[UInt8[np.ndarray, "_ _ 3"]]]:
    """Pictures to paste from, and the digest of what they are.

    Raises:
        ConfigError: the folder holds fewer pictures than are asked for.
    """
    folder = config.texture_folder
    if folder is None and (data_root() / "dtd" / "images").is_dir():
        folder = data_root() / "dtd" / "images"
    pictures: list[np.ndarray] = []
    if folder is None:
        from sklearn.datasets import load_sample_images  # takes a second to import

        for photograph in load_sample_images().images:
            corners = itertools.product(*(range(0, n - PATCH + 1, PATCH) for n in photograph.shape[:2]))
            pictures += [np.ascontiguousarray(photograph[y : y + PATCH, x : x + PATCH]) for y, x in corners]
        pictures = _spread(pictures, config.textures)
        return digest([hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]), pictures
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < config.textures:
        raise ConfigError(
            f"{len(files)} pictures below {folder}, but synthesis.textures={config.textures}: name a folder with more "
            "(synthesis.texture_folder), or ask for fewer"
        )
    data = {path: read_bytes(path) for path in _spread(files, config.textures)}
    pictures = [read_image(content, name=str(path)) for path, content in data.items()]
    return digest([hashlib.sha256(content).hexdigest() for content in data.values()]), pictures


def _spread(items: Sequence[T], count: int) -> list[T]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A law of shape."""

    name: str
    coverage: float
    """Share of the image that is covered at most; most regions are smaller."""
    stretch: float
    """How much longer the noise's waves are along one direction, another one in every image."""
    at_border: bool
    """Regions that touch the image's border are preferred."""

    @property
    def grain(self) -> float:
        """Length of the noise's short waves as a share of the image's shorter side: a region has a few of them."""
        return max(0.6 * math.sqrt(self.coverage / self.stretch), 0.025)


def draw_laws(seed: int) -> list[Law]:
    """One law from each stratum."""
    rng = np.random.default_rng([seed, 0])

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    return [
        Law(
            name=f"{size} {elongation}{' at the border' if border else ''}",
            coverage=between(*SIZES[size]),
            stretch=between(*ELONGATIONS[elongation]),
            at_border=border,
        )
        for size, elongation, border in STRATA
    ]


def noise_field(size: tuple[int, int], law: Law, rng: np.random.Generator) -> Float[np.ndarray, "H W"]:
    """Noise with a Gaussian spectrum, its waves stretched along a random direction; mean 0, variance 1."""
    height, width = size
    angle = rng.uniform(0, math.pi)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    along, across = math.cos(angle) * fx + math.sin(angle) * fy, math.cos(angle) * fy - math.sin(angle) * fx
    length = max(law.grain * min(size), MIN_WAVE)
    spectrum = np.fft.rfft2(rng.standard_normal(size))
    spectrum *= np.exp(-((along * length * law.stretch) ** 2 + (across * length) ** 2) / 2)
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=size)
    return np.asarray(field / max(float(field.std()), 1e-12))


def draw_region(
    size: tuple[int, int],
    law: Law,
    rng: np.random.Generator,
    allowed: Bool[np.ndarray, "H W"] | None = None,
) -> Bool[np.ndarray, "H W"] | None:
    """A region by a law, inside `allowed`; None where `TRIES` draws gave none of `MIN_PIXELS`."""
    coverage, stretch = law.coverage, law.stretch
    own = replace(
        law,
        coverage=min(coverage * math.exp(JITTER * rng.standard_normal()), 0.5),
        stretch=max(stretch * math.exp(JITTER * rng.standard_normal()), 1.0),
    )
    for _ in range(TRIES):
        height = noise_field(size, own, rng)
        share = min(max(2.5 * own.coverage, 0.004), 0.6)  # of several pieces one is taken
        chosen = height > np.quantile(height, 1 - share)
        region = _piece(chosen if allowed is None else chosen & allowed, own, rng)
        if int(region.sum()) >= MIN_PIXELS:
            return region
    return None


def _piece(chosen: Bool[np.ndarray, "H W"], law: Law, rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """One of the larger connected pieces; of one that is too large, what lies nearest to a random point of it."""
    labels, count = ndimage.label(chosen, structure=np.ones((3, 3)))
    if not count:
        return chosen
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(float)
    rank = sizes * np.exp(0.5 * rng.standard_normal(count))
    if law.at_border:
        rim = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        rank = np.where(np.isin(np.arange(1, count + 1), rim), rank + 10 * sizes.max(), rank)
    ys, xs = np.nonzero(labels == rank.argmax() + 1)
    most = max(int(law.coverage * chosen.size), MIN_PIXELS)
    at = int(rng.integers(len(ys)))
    near = np.argsort(np.hypot(ys - ys[at], xs - xs[at]), kind="stable")[:most]
    region = np.zeros_like(chosen)
    region[ys[near], xs[near]] = True
    return region


def pseudo_defect(
    image: UInt8[np.ndarray, "H W 3"],
    law: Law,
    texture: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    allowed: Bool[np.ndarray, "H W"] | None = None,
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]] | None:
    """One image of a pseudo class and its mask; None where no region of `MIN_PIXELS` fits. A grey image stays grey.

    Args:
        allowed: where the pseudo-defect may lie; None: anywhere.
    """
    size = (image.shape[0], image.shape[1])
    region = draw_region(size, law, rng, allowed)
    if region is None:
        return None
    grey = bool((image == image[..., :1]).all())
    ys, xs = np.nonzero(region)
    from_y, from_x = (int(rng.integers(n)) for n in texture.shape[:2])
    pasted = texture[mirrored(ys + from_y, texture.shape[0]), mirrored(xs + from_x, texture.shape[1])]
    pasted = (pasted.mean(1, keepdims=True).repeat(3, 1) if grey else pasted).astype(np.float32)
    opacity = rng.uniform(MIN_OPACITY, 1)
    out = image.copy()
    out[region] = np.rint((1 - opacity) * image[region].astype(np.float32) + opacity * pasted).astype(np.uint8)
    return out, region


def mirrored(at: np.ndarray, length: int) -> np.ndarray:
    """Positions beyond a texture's end run back into it."""
    at = at % (2 * length)
    return np.where(at < length, at, 2 * length - 1 - at)
