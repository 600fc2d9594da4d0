"""Write a set of pseudo-defects: image files with masks and a manifest, like any image set, made by Ray tasks."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Bool, UInt8
from PIL import Image

from hypdefect.datasets.manifest import MANIFEST_SCHEMA, write_manifest
from hypdefect.datasets.synthetic import SyntheticSet, set_folder, sources, stored
from hypdefect.errors import ConfigError
from hypdefect.families.plan import Plan
from hypdefect.files import home, replaced_file
from hypdefect.images import exif_orientation, read_bytes, read_image, read_mask
from hypdefect.images.intensity import Intensity
from hypdefect.images.marks import marked
from hypdefect.images.pasted_textures import PERLIN, POISSON, POLYGONS, pasted
from hypdefect.images.pseudo_defects import SynthesisConfig, draw_laws, load_textures, pseudo_defect
from hypdefect.progress import progress

logger = logging.getLogger(__name__)
GENERATORS: dict[str, tuple[Callable[[int], Sequence[Any]], Callable[..., Any]]] = {
    "textures": (draw_laws, pseudo_defect),
    "marks": (draw_laws, marked),
    "perlin": (lambda seed: [PERLIN], pasted),
    "poisson": (lambda seed: [POISSON], pasted),
    "polygons": (lambda seed: POLYGONS, pasted),
}
"""Of each kind, the shapes of a seed, each with a name, and what paints one."""


def synthesize(
    manifest: pa.Table,
    label: str,
    home: Path,
    config: SynthesisConfig,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSet:
    """The pseudo classes of one product's images, made once: the same settings and images give the stored set.

    Raises:
        DataError: no source images, or unreadable ones. ConfigError: the texture folder holds no picture.
    """
    if found := stored(manifest, label, home, config):
        return found
    named, textures = load_textures(config)
    shapes, _ = GENERATORS[config.kind]
    classes = [(shape, texture) for texture in textures for shape in shapes(config.seed)]
    chosen = sources(manifest)
    folder = set_folder(manifest, label, home, config, named)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng([config.seed, 1]).permutation(len(chosen)).tolist()
    waiting = []
    for number, (shape, texture) in enumerate(classes):
        first = number * config.per_class
        own = [chosen[order[(first + k) % len(order)]] for k in range(config.per_class)]
        waiting.append(_MAKE.remote(texture, shape, number, own, config, str(folder), label))
    rows: list[dict[str, Any]] = []
    total = len(waiting)
    while waiting:
        ready, waiting = ray.wait(waiting)
        rows += [row for reference in ready for row in ray.get(reference)]
        if progress is not None:
            progress(total - len(waiting), total)
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["uri"])), schema=MANIFEST_SCHEMA)
    write_manifest(table, folder / "manifest.parquet")
    return SyntheticSet(table, folder, False)


def _make(
    texture: UInt8[np.ndarray, "_ _ 3"],
    shape: Any,
    number: int,
    rows: list[dict[str, Any]],
    config: SynthesisConfig,
    folder: str,
    label: str,
) -> list[dict[str, Any]]:
    """The images of one pseudo class; an image too small for it is left out."""
    out = []
    for k, row in enumerate(rows):
        image, defect = _read(row)
        rng = np.random.default_rng([config.seed, 2, number, k])
        _, paint = GENERATORS[config.kind]
        made = paint(image, shape, texture, rng, None if defect is None else ~defect)
        if made is None:
            continue
        stem = Path(folder) / "images" / f"{number:04d}-{k:02d}"
        painted, region = made
        ids = [_store(painted, stem.with_suffix(".png")), _store(region, stem.with_name(f"{stem.name}_mask.png"))]
        ys, xs = np.nonzero(region)
        out.append(
            {
                "image_id": ids[0],
                "file_id": ids[0],
                "mask_id": ids[1],
                "uri": str(stem.with_suffix(".png")),
                "dataset": f"pseudo-{row['dataset']}",
                "product": label,
                "family": shape.name,
                "defect": f"pseudo-{number:04d}",
                "is_defect": True,
                "mask_uri": str(stem.with_name(f"{stem.name}_mask.png")),
                "bbox": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1],
                "height": image.shape[0],
                "width": image.shape[1],
                "split": "",
                "group_id": row["image_id"],
                "intensity": "",
                "note": "",
            }
        )
    return out


_MAKE = ray.remote(_make)


def _read(row: dict[str, Any]) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"] | None]:
    data = read_bytes(Path(row["uri"]))
    intensity = Intensity.from_json(row["intensity"]) if row["intensity"] else None
    image = read_image(data, name=row["uri"], intensity=intensity)
    if not (row["is_defect"] and row["mask_uri"]):
        return image, None
    turned = exif_orientation(data, name=row["uri"])
    mask, _ = read_mask(read_bytes(Path(row["mask_uri"])), image.shape[:2], name=row["mask_uri"], orientation=turned)
    return image, mask


def _store(pixels: np.ndarray, path: Path) -> str:
    """Write a PNG; the sha256 of its bytes."""
    buffer = io.BytesIO()
    grey = pixels.ndim == 3 and bool((pixels == pixels[..., :1]).all())
    plain = pixels[..., 0] if grey else pixels
    Image.fromarray(plain.astype(np.uint8) * (255 if plain.dtype == bool else 1)).save(buffer, "PNG", compress_level=1)
    with replaced_file(path) as file:
        file.write(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def pseudo_classes(plan: Plan, config: SynthesisConfig) -> SyntheticSet:
    """The pseudo classes of a task's product, stored or made now.

    Raises:
        ConfigError: the features were imported, so there are no images.
    """
    if plan.imported:
        raise ConfigError(f"{plan.config.dataset} has features and no images: nothing to put pseudo-defects on")
    return made_or_stored(plan.manifest, config, plan.label)


def made_or_stored(manifest: pa.Table, config: SynthesisConfig, label: str) -> SyntheticSet:
    """The pseudo-defects on these images, stored or made now behind a progress bar."""
    with progress(f"pseudo-defects of {label}") as advance:
        made = synthesize(manifest, label, home(), config, advance)
    state = "cached" if made.cached else "made"
    logger.info("pseudo-defects: %d images %s in %s", made.manifest.num_rows, state, made.folder)
    return made
