"""LabelMe: a JSON file beside each image (https://github.com/wkentaro/labelme, labelme/label_file.py).

An image whose file has no shapes is labelled by the image flags that are set, and is normal where none is. One without
a file of its own counts as normal in a folder called good, normal, free or ok, and as not yet looked at elsewhere.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.annotated import (
    AnnotatedImage,
    image_size,
    is_normal,
    locate,
    positions,
    product_of,
    read_json,
    refused,
    text,
)
from hypdefect.datasets.readers.folder import READ
from hypdefect.datasets.readers.shapes import Box, Ellipse, Polygon, Shape
from hypdefect.errors import DataError


def scan(root: Path) -> Iterator[ManifestRow]:
    """One row per image and class."""
    files = sorted(root.rglob("[!.]*.json"))
    if not files:
        raise DataError(f"{root} holds no LabelMe files; expected {CARD.layout}")
    product = product_of(root)
    seen = set()
    for file in files:
        content = read_json(file, CARD.layout)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise DataError(f"{file} has no list 'shapes': not a LabelMe file; expected {CARD.layout}")
        path = file
        try:
            path = _image(root, file, content)
            yield from _annotated(path, file, content, product).rows()
        except DataError as error:
            yield refused(path, file, f"{file}: {error}", product)
        seen |= {path, *(file.with_suffix(suffix) for suffix in READ)}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in READ and path not in seen:
            if is_normal(path.parent.name):
                yield ManifestRow(path=path, product=product, defect=path.parent.name, is_defect=False)
            else:
                reason = f"{path} has no LabelMe file; save one (without shapes where nothing is wrong)"
                yield refused(path, path, reason, product)


def _image(root: Path, file: Path, content: dict[str, Any]) -> Path:
    """`imagePath` from the file's folder or, as LabelMe does, the image of that name beside the file."""
    name = PurePosixPath(text(content.get("imagePath"), "imagePath").replace("\\", "/"))
    folder = file.parent.relative_to(root)
    if name.is_absolute():
        raise DataError(f"imagePath {str(name)!r} is absolute; write it relative to the file")
    return locate(root, [os.path.normpath(folder / name), str(folder / name.name)])


def _annotated(path: Path, file: Path, content: dict[str, Any], product: str) -> AnnotatedImage:
    annotated = AnnotatedImage(
        path=path,
        label_file=file,
        entry=path.name,
        product=product,
        size=image_size(content.get("imageHeight"), content.get("imageWidth")),
    )
    for index, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict):
            raise DataError(f"shape {index} is not an object; save the file again")
        label = text(shape.get("label"), f"shape {index}: label")
        annotated.regions.append((label, _shape(shape, f"shape {index} ({label})")))
    flags = content.get("flags")
    if not annotated.regions and isinstance(flags, dict):
        annotated.labels += [text(name, "a flag") for name, is_set in flags.items() if is_set is True]
    return annotated


def _shape(shape: dict[str, Any], what: str) -> Shape:
    kind = shape.get("shape_type") or "polygon"
    points = positions(shape.get("points"), f"{what}: points")
    if kind in ("polygon", "oriented_rectangle"):
        return Polygon(points)
    if kind == "rectangle" and len(points) == 2:
        (xa, ya), (xb, yb) = points
        return Box(min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb))
    if kind == "circle" and len(points) == 2:
        (cx, cy), rim = points
        radius = math.dist((cx, cy), rim)
        return Ellipse(cx, cy, radius, radius)
    raise DataError(f"{what}: {kind!r} of {len(points)} points marks no area; draw a polygon, rectangle or circle")


CARD = DatasetCard(
    name="labelme",
    title="LabelMe annotations of your own",
    licence="yours",
    source="your own files; format: https://github.com/wkentaro/labelme",
    layout="<root>/**/<name>.json beside <name>.png|jpg|bmp|tif, with shapes (polygon, rectangle, circle) and "
    "imagePath; images without shapes, or without a file in a folder called good, are normal",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
