"""Region-aware features of one image: views, augmentation, masked pooling. Extraction and serving share this path.

Recipe R*: the whole image and a fixed-size window round the region (fixed, because scale tells classes apart), the
stage and head maps of the backbone pooled under the mask, averaged over the four mirror images. Where there is no mask
the whole image is the region: its window would miss most of it, so the crop view is then the mean of the four quadrants
at twice the scale, each seen in one of the four mirrorings (the same cost, the whole region covered).

Shapes: A copies (0 the image itself, 1.. its augmentations), D features of one view, H W pixels.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hypdefect.backbones import Backbone
from hypdefect.errors import ConfigError
from hypdefect.types import VIEWS

EXTRACTOR_VERSION = 1
"""Raise when the same inputs and recipe give other numbers: stores made by another version are then other stores."""

FULL_REGION = "full"
"""Mask id of an image without a mask in a set whose other images have one: everything is region, seen as they are."""

FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig:
    """How an image becomes features. Everything here is part of the feature store's key."""

    whole_size: int = 224
    """Side in pixels to which the whole image is resized."""
    window: int = 128
    """Side in source pixels of the window round the region."""
    crop_size: int = 224
    """Side in pixels to which the window is resized."""
    rotation: float = 10.0
    """Augmentation: rotation about the region's centre, degrees to either side."""
    scale: float = 0.1
    """Augmentation: relative change of scale to either side."""
    translation: float = 0.05
    """Augmentation: shift to either side, as a fraction of the image side."""
    aug_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("whole_size", "window", "crop_size"):
            if getattr(self, name) < 32:
                raise ConfigError(f"recipe.{name} must be at least 32 pixels, got {getattr(self, name)}")
        if not 0 <= self.scale < 1:
            raise ConfigError(f"recipe.scale must lie in [0, 1), got {self.scale}")


def pixels_of(image: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "3 H W"]:
    """RGB bytes as floats in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def region_center(mask: Bool[Tensor, "H W"]) -> tuple[float, float]:
    """Centre (y, x) of the region's bounding box, in pixels."""
    ys, xs = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
    return (int(ys[0]) + int(ys[-1]) + 1) / 2, (int(xs[0]) + int(xs[-1]) + 1) / 2


def window_slices(center: tuple[float, float], size: tuple[int, int], side: int) -> tuple[slice, slice]:
    """The `side` x `side` window round a centre, moved inside the image; an image shorter than it gives all it has."""

    def along(middle: float, length: int) -> slice:
        start = min(max(round(middle - side / 2), 0), max(length - side, 0))
        return slice(start, min(start + side, length))

    return along(center[0], size[0]), along(center[1], size[1])


def square(x: Float[Tensor, "C H W"], side: int, *, reflect: bool) -> Float[Tensor, "C H2 W2"]:
    """Pad bottom and right up to `side`: mirrored for pixels, with zeros for masks."""
    pad_h, pad_w = max(side - x.shape[-2], 0), max(side - x.shape[-1], 0)
    if not pad_h and not pad_w:
        return x
    if not reflect:
        return F.pad(x, (0, pad_w, 0, pad_h))
    rows = _mirror(x.shape[-2], x.shape[-2] + pad_h)
    columns = _mirror(x.shape[-1], x.shape[-1] + pad_w)
    return x[:, rows][:, :, columns]


def _mirror(length: int, wanted: int) -> Tensor:
    index = torch.arange(wanted) % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)


def resize(pixels: Float[Tensor, "3 H W"], side: int) -> Float[Tensor, "3 S S"]:
    """Antialiased bicubic resampling to a square."""
    out = F.interpolate(pixels[None], size=(side, side), mode="bicubic", antialias=True, align_corners=False)[0]
    return out.clamp_(0, 1)


def views_of(
    pixels: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"] | None, recipe: RecipeConfig
) -> dict[str, tuple[Float[Tensor, "4 3 S S"], Float[Tensor, "4 h w"]]]:
    """View name -> (four mirrored network inputs, their region weight maps at source resolution)."""
    size = (pixels.shape[1], pixels.shape[2])
    if mask is None:
        everything = torch.ones(4, 1, 1)
        quadrants = [resize(q.flip(f), recipe.crop_size) for q, f in zip(quarter(pixels), FLIPS, strict=True)]
        return {
            "whole": (mirrored(resize(pixels, recipe.whole_size)), everything),
            "crop": (torch.stack(quadrants), everything),
        }
    rows, columns = window_slices(region_center(mask), size, recipe.window)
    window = square(pixels[:, rows, columns], recipe.window, reflect=True)
    inside = square(mask[None, rows, columns].float(), recipe.window, reflect=False)[0]
    return {
        "whole": (mirrored(resize(pixels, recipe.whole_size)), mirrored(mask.float())),
        "crop": (mirrored(resize(window, recipe.crop_size)), mirrored(inside)),
    }


def mirrored(x: Float[Tensor, "*C H W"]) -> Float[Tensor, "4 *C H W"]:
    """The image and its three mirror images."""
    return torch.stack([x.flip(f) for f in FLIPS])


def quarter(pixels: Float[Tensor, "3 H W"]) -> list[Tensor]:
    """The four quadrants, row by row; those of an odd side share its middle line."""
    h, w = (pixels.shape[1] + 1) // 2, (pixels.shape[2] + 1) // 2
    return [pixels[:, :h, :w], pixels[:, :h, -w:], pixels[:, -h:, :w], pixels[:, -h:, -w:]]


def augment(
    pixels: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"] | None, recipe: RecipeConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """One random rotation, scaling and translation about the region's centre, same for image and mask."""
    _, height, width = pixels.shape
    turn, zoom, dy, dx = (torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1).tolist()
    angle, factor = math.radians(turn * recipe.rotation), 1 + zoom * recipe.scale
    cy, cx = region_center(mask) if mask is not None else (height / 2, width / 2)
    ny, nx = 2 * cy / height - 1, 2 * cx / width - 1
    cos, sin, aspect = math.cos(angle) / factor, math.sin(angle) / factor, height / width
    matrix = torch.tensor([[cos, -sin * aspect, 0.0], [sin / aspect, cos, 0.0]])
    shift = torch.tensor([nx + 2 * dx * recipe.translation, ny + 2 * dy * recipe.translation])
    matrix[:, 2] = torch.tensor([nx, ny]) - matrix[:, :2] @ shift
    grid = F.affine_grid(matrix[None], [1, 3, height, width], align_corners=False)
    moved = F.grid_sample(pixels[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]
    if mask is None:
        return moved, None
    inside = F.grid_sample(mask[None, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    moved_mask = inside[0, 0] > 0.5
    return (moved, moved_mask) if moved_mask.any() else (pixels, mask)  # a sliver that fell between pixels


def augmentation_generator(image_id: str, copy: int, recipe: RecipeConfig) -> torch.Generator:
    """The same copy of the same image is drawn alike on every worker, whatever the order."""
    text = f"{image_id}/{copy}/{recipe.aug_seed}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def masked_pool(maps: Float[Tensor, "B C h w"], weight: Float[Tensor, "B H W"]) -> Float[Tensor, "B C"]:
    """Mean of a feature map under a region, each cell weighted by the share of it that the region covers.

    A window that misses the region (it can, for a region of several parts) is pooled as a whole.
    """
    cells = F.adaptive_avg_pool2d(weight[:, None], (maps.shape[2], maps.shape[3]))[:, 0]
    total = cells.sum((1, 2), keepdim=True)
    cells = torch.where(total > 0, cells, torch.ones_like(cells))
    return torch.einsum("bchw,bhw->bc", maps, cells / cells.sum((1, 2), keepdim=True))


class RegionExtractor:
    """Backbone and recipe together: image and mask in, features of both views out.

    Each image is a forward batch of its own, so that its features do not depend on its neighbours.
    """

    def __init__(self, backbone: Backbone, recipe: RecipeConfig, device: str | torch.device = "cpu") -> None:
        self.backbone, self.recipe, self.device = backbone.to(device), recipe, torch.device(device)
        self.block_dims = backbone.spec.dims

    @torch.inference_mode()
    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Bool[np.ndarray, "H W"] | None,
        image_id: str = "",
        n_aug: int = 0,
    ) -> dict[str, Float[Tensor, "A D"]]:
        """Features of the image (row 0) and of `n_aug` augmented copies (rows 1..), float32 on the CPU."""
        pixels = pixels_of(image)
        region = None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))
        copies = [(pixels, region)]
        for copy in range(1, n_aug + 1):
            generator = augmentation_generator(image_id, copy, self.recipe)
            copies.append(augment(pixels, region, self.recipe, generator))
        rows: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
        for copy_pixels, copy_mask in copies:
            for view, (inputs, weight) in views_of(copy_pixels, copy_mask, self.recipe).items():
                blocks = [
                    masked_pool(maps, weight.to(self.device)).mean(0) for maps in self.backbone(inputs.to(self.device))
                ]
                rows[view].append(torch.cat(blocks).cpu())
        return {view: torch.stack(features) for view, features in rows.items()}
