"""Region-aware features of one image: views, augmentation, pooling. Extraction and serving share this path.

Recipe R*: the whole image and a fixed-size window round the region (fixed, because scale tells classes apart), the
stage and head maps of the backbone pooled under the mask, averaged over the four mirror images. Where there is no mask
the whole image is the region: its window would miss most of it, so the crop view is then the mean of the four quadrants
at twice the scale, each seen in one of the four mirrorings (the same cost, the whole region covered).

`context="multiview"` is the region context of MVREC (Lyu et al., AAAI 2025): windows of three sizes, each at nine
offsets of a third of its side about the region's centre, in place of one window; the crop view is their mean, and the
copies of an image are its single windows.

Backbones that give an embedding instead of a map (CLIP) are not pooled; AlphaCLIP sees the region itself.

Pooling under a mask forgets its outline: `region_shape` descriptors of the (augmented) mask end both views.

Shapes: A copies (0 the image itself, 1.. its augmentations), V inputs averaged to one view, D features of one view,
H W pixels, S network input side.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from hypdefect.errors import ConfigError
from hypdefect.features.backbones import BackboneSpec
from hypdefect.features.patches import patch_features
from hypdefect.features.region_shape import SHAPE_DIMS, region_shape
from hypdefect.types import VIEWS, Needs

EXTRACTOR_VERSION = 3
"""Raise when the same inputs and recipe give other numbers: stores made by another version are then other stores."""

PATCH_VIEWS = ("patch",)

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
    context: Literal["window", "multiview"] = "window"
    """One window round the region, or MVREC's 27."""
    context_sizes: tuple[int, ...] = (96, 128, 192)
    """Sides in source pixels of the windows of context "multiview"."""
    flips: bool = True
    """Average over the four mirror images; without, each view of a masked image is one forward instead of four."""
    shape: bool = True
    """End each view with descriptors of the region's shape (zeros without a region)."""
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
        if not self.context_sizes or min(self.context_sizes) < 32:
            raise ConfigError(f"recipe.context_sizes must be at least 32 pixels each, got {self.context_sizes}")


def dims_of(spec: BackboneSpec, recipe: RecipeConfig) -> tuple[tuple[int, ...], int]:
    """Lengths of the blocks of a feature, and how many numbers at their end describe the region's shape (0: none)."""
    shape_dims = SHAPE_DIMS if recipe.shape and spec.family != "patchcore" else 0
    return (*spec.dims, *([shape_dims] if shape_dims else [])), shape_dims


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
) -> dict[str, tuple[Float[Tensor, "_ 3 _ _"], Float[Tensor, "_ _ _"]]]:
    """View name -> (network inputs that are averaged, their region weight maps at source resolution)."""
    if recipe.context == "multiview":
        return context_views(pixels, mask, recipe)
    size = (pixels.shape[1], pixels.shape[2])
    whole = mirrored(resize(pixels, recipe.whole_size), recipe)
    if mask is None:
        quadrants = [resize(q.flip(f), recipe.crop_size) for q, f in zip(quarter(pixels), FLIPS, strict=True)]
        return {
            "whole": (whole, torch.ones(len(whole), 1, 1)),
            "crop": (torch.stack(quadrants), torch.ones(4, 1, 1)),
        }
    rows, columns = window_slices(region_center(mask), size, recipe.window)
    window = square(pixels[:, rows, columns], recipe.window, reflect=True)
    inside = square(mask[None, rows, columns].float(), recipe.window, reflect=False)[0]
    return {
        "whole": (whole, mirrored(mask.float(), recipe)),
        "crop": (mirrored(resize(window, recipe.crop_size), recipe), mirrored(inside, recipe)),
    }


def context_views(
    pixels: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"] | None, recipe: RecipeConfig
) -> dict[str, tuple[Float[Tensor, "_ 3 _ _"], Float[Tensor, "_ _ _"]]]:
    """As `views_of`, the crop view being windows of every size of `context_sizes` at nine offsets (size by size, row by
    row); a window that would leave the image is moved inside it."""
    size = (pixels.shape[1], pixels.shape[2])
    region = torch.ones(size, dtype=torch.bool) if mask is None else mask
    cy, cx = region_center(region)
    inputs, insides = [], []
    for side in recipe.context_sizes:
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                rows, columns = window_slices((cy + dy * side / 3, cx + dx * side / 3), size, side)
                inputs.append(resize(square(pixels[:, rows, columns], side, reflect=True), recipe.crop_size))
                inside = square(region[None, rows, columns].float(), side, reflect=False)
                insides.append(F.adaptive_avg_pool2d(inside, min(recipe.context_sizes))[0])
    return {
        "whole": (mirrored(resize(pixels, recipe.whole_size), recipe), mirrored(region.float(), recipe)),
        "crop": (torch.stack(inputs), torch.stack(insides)),
    }


def mirrored(x: Float[Tensor, "*C H W"], recipe: RecipeConfig) -> Float[Tensor, "V *C H W"]:
    """The image and its three mirror images, or the image alone."""
    return torch.stack([x.flip(f) for f in (FLIPS if recipe.flips else FLIPS[:1])])


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


def tensors_of(
    image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"] | None
) -> tuple[Float[Tensor, "3 H W"], Bool[Tensor, "H W"] | None]:
    return pixels_of(image), None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))


def copies_of(
    pixels: Float[Tensor, "3 H W"], mask: Bool[Tensor, "H W"] | None, recipe: RecipeConfig, image_id: str, n_aug: int
) -> list[tuple[Tensor, Tensor | None]]:
    """The image and its augmented copies, each with its mask."""
    generators = [augmentation_generator(image_id, copy, recipe) for copy in range(1, n_aug + 1)]
    return [(pixels, mask), *(augment(pixels, mask, recipe, generator) for generator in generators)]


def masked_pool(maps: Float[Tensor, "B C h w"], weight: Float[Tensor, "B H W"]) -> Float[Tensor, "B C"]:
    """Mean of a feature map under a region, each cell weighted by the share of it that the region covers.

    A window that misses the region (it can, for a region of several parts) is pooled as a whole.
    """
    cells = F.adaptive_avg_pool2d(weight[:, None], (maps.shape[2], maps.shape[3]))[:, 0]
    total = cells.sum((1, 2), keepdim=True)
    cells = torch.where(total > 0, cells, torch.ones_like(cells))
    return torch.einsum("bchw,bhw->bc", maps, cells / cells.sum((1, 2), keepdim=True))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Network inputs of one image: for each copy, view -> (inputs, region weight maps).

    The first `windows` inputs of the crop view become copies of their own. `shapes` `[A, _]` ends both views.
    """

    copies: list[dict[str, tuple[Tensor, Tensor]]]
    windows: int = 0
    shapes: Float[Tensor, "A _"] | None = None


def load_tower(spec: BackboneSpec) -> nn.Module:
    """The frozen network of a spec whose features are one vector a view."""
    if spec.family in ("openclip", "alphaclip"):
        from hypdefect.features import clip  # open_clip takes seconds to import

        return clip.ImageTower(spec)
    return network(spec)


def network(spec: BackboneSpec) -> nn.Module:
    """The frozen network of a spec of family timm or patchcore."""
    from hypdefect.features.timm_networks import Backbone  # timm takes seconds to import

    return Backbone(spec)


def at_rest(x: Tensor) -> Tensor:
    """Rounded to float16, as the store keeps them: features of a served image are then the stored ones, bit for bit."""
    return x.half().float().cpu()


class RegionExtractor:
    """The features described at the top of this file.

    Each image is a forward batch of its own, so that its features do not depend on its neighbours.
    """

    views: tuple[str, ...] = VIEWS

    def __init__(self, backbone: nn.Module, recipe: RecipeConfig, device: str | torch.device = "cpu") -> None:
        self.backbone, self.recipe, self.device = backbone.to(device), recipe, torch.device(device)

    @torch.inference_mode()
    def prepare(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Bool[np.ndarray, "H W"] | None,
        image_id: str = "",
        n_aug: int = 0,
    ) -> Prepared:
        """Network inputs of the image and of its copies.

        Raises:
            ConfigError: more copies than context "multiview" has windows.
        """
        if self.recipe.context == "multiview":
            windows = 9 * len(self.recipe.context_sizes)
            if n_aug > windows:
                raise ConfigError(f"context multiview has {windows} windows an image, not {n_aug}: lower --copies")
            copies, same = [tensors_of(image, mask)], n_aug
        else:
            copies, same = copies_of(*tensors_of(image, mask), self.recipe, image_id, n_aug), 0
        shapes = None
        if self.recipe.shape:
            shapeless = mask is None or bool(mask.all())  # a full region stays one where a copy is turned or shrunk
            regions = [None if shapeless or region is None else region.numpy() for _, region in copies]
            shapes = torch.from_numpy(np.stack([region_shape(region) for region in regions])).repeat(same + 1, 1)
        return Prepared([views_of(*copy, self.recipe) for copy in copies], same, shapes)

    @torch.inference_mode()
    def forward(self, prepared: Prepared) -> dict[str, Float[Tensor, "A D"]]:
        """Features of the image (row 0) and of its copies (rows 1..), float32 on the CPU."""
        rows: dict[str, list[Tensor]] = {view: [] for view in VIEWS}
        for views in prepared.copies:
            for view, (inputs, weight) in views.items():
                inputs, weight = inputs.to(self.device), weight.to(self.device)
                blocks = [x if x.dim() == 2 else masked_pool(x, weight) for x in self.backbone(inputs, weight)]
                single = torch.cat(blocks, 1)
                rows[view].append(single.mean(0))
                if prepared.windows:
                    alike = rows[view] * prepared.windows
                    rows[view] += list(single[: prepared.windows]) if view == "crop" else alike
        stacked = {view: torch.stack(features).cpu() for view, features in rows.items()}
        if prepared.shapes is not None:
            stacked = {view: torch.cat([features, prepared.shapes], 1) for view, features in stacked.items()}
        return {view: at_rest(features) for view, features in stacked.items()}

    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Bool[np.ndarray, "H W"] | None,
        image_id: str = "",
        n_aug: int = 0,
    ) -> dict[str, Float[Tensor, "A D"]]:
        """`forward` of `prepare`."""
        return self.forward(self.prepare(image, mask, image_id, n_aug))


class PatchExtractor:
    """PatchCore's patches of the whole image, `[A, h, w, D]`; a region plays no part in them.

    With `pixels` also the resized image that they come from, `[A, 3, S, S]` in [0, 1].
    """

    views: tuple[str, ...] = PATCH_VIEWS

    def __init__(
        self, backbone: nn.Module, recipe: RecipeConfig, device: str | torch.device = "cpu", pixels: bool = False
    ) -> None:
        self.backbone, self.recipe, self.device = backbone.to(device), recipe, torch.device(device)
        self.pixels = pixels

    @torch.inference_mode()
    def prepare(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Bool[np.ndarray, "H W"] | None,
        image_id: str = "",
        n_aug: int = 0,
    ) -> Prepared:
        """The resized image and its augmented copies."""
        copies = copies_of(*tensors_of(image, None), self.recipe, image_id, n_aug)
        inputs = [resize(pixels, self.recipe.whole_size)[None] for pixels, _ in copies]
        return Prepared([{"patch": (x, torch.ones(1, 1, 1))} for x in inputs])

    @torch.inference_mode()
    def forward(self, prepared: Prepared) -> dict[str, Float[Tensor, "A h w D"]]:
        """Patches of the image (row 0) and of its copies (rows 1..), float32 on the CPU."""
        inputs = [views["patch"][0] for views in prepared.copies]
        views = {"patch": self.patches(inputs)}
        return views | {"pixels": torch.cat(inputs).cpu()} if self.pixels else views

    def patches(self, inputs: list[Float[Tensor, "_ 3 S S"]]) -> Float[Tensor, "A h w D"]:
        """Of resized images. Each is a forward of its own: what it gives does not depend on its neighbours."""
        return torch.cat([at_rest(patch_features(self.backbone(x.to(self.device)))) for x in inputs])


class PixelExtractor:
    """The resized image itself, `[A, 3, S, S]` in [0, 1], for methods with a network of their own; never stored."""

    views: tuple[str, ...] = ("pixels",)

    def __init__(self, recipe: RecipeConfig) -> None:
        self.recipe = recipe

    def prepare(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Bool[np.ndarray, "H W"] | None,
        image_id: str = "",
        n_aug: int = 0,
    ) -> Prepared:
        """The image and its augmented copies, resized."""
        copies = copies_of(*tensors_of(image, None), self.recipe, image_id, n_aug)
        inputs = [resize(pixels, self.recipe.whole_size)[None] for pixels, _ in copies]
        return Prepared([{"pixels": (x, torch.ones(1, 1, 1))} for x in inputs])

    def forward(self, prepared: Prepared) -> dict[str, Float[Tensor, "A 3 S S"]]:
        """Pixels of the image (row 0) and of its copies (rows 1..)."""
        return {"pixels": torch.cat([views["pixels"][0] for views in prepared.copies])}


Extractor = RegionExtractor | PatchExtractor | PixelExtractor


def extractor_for(
    spec: BackboneSpec, recipe: RecipeConfig, device: str | torch.device = "cpu", needs: Needs | None = None
) -> Extractor:
    """Backbone and recipe together, or the recipe alone where pixels are needed.

    Args:
        needs: what a method reads; None: what the backbone gives.

    Raises:
        ConfigError: the backbone gives vectors where patches are needed, or the other way round.
        ArtifactError: the backbone's weights are absent, damaged or those of another network.
    """
    if needs == "pixels":
        return PixelExtractor(recipe)
    gives: Needs = "patches" if spec.family == "patchcore" else "vectors"
    if needs not in (None, gives) and (needs, gives) != ("patches+pixels", "patches"):
        raise ConfigError(f"backbone {spec.name} gives {gives}, the method needs {needs}: choose another backbone")
    if gives == "patches":
        return PatchExtractor(network(spec), recipe, device, pixels=needs == "patches+pixels")
    return RegionExtractor(load_tower(spec), recipe, device)
