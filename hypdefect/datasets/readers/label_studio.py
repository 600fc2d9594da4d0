"""Label Studio: its JSON export and the images (https://labelstud.io/guide/export, https://labelstud.io/tags).

Regions are in percent of the image's sides. A rectangle turns about its upper left corner, an ellipse about its centre.
A task that was submitted without a result is a normal image.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.annotated import (
    AnnotatedImage,
    image_size,
    is_text,
    locate,
    number,
    positions,
    product_of,
    read_json,
    refused,
    text,
)
from hypdefect.datasets.readers.folder import READ, REFUSED
from hypdefect.datasets.readers.shapes import Box, Brush, Ellipse, Polygon, Shape
from hypdefect.errors import DataError

REGIONS = ("polygonlabels", "rectanglelabels", "ellipselabels", "brushlabels")
REMARKS = ("textarea", "rating", "number", "datetime", "relation")
"""Results that label nothing."""


def scan(root: Path) -> Iterator[ManifestRow]:
    """One row per image and class."""
    files = sorted(root.glob("[!.]*.json"))
    if not files:
        raise DataError(f"{root} holds no Label Studio export; expected {CARD.layout}")
    product = product_of(root)
    tasks = [(file, task) for file in files for task in _tasks(file)]
    paths: list[Path | DataError] = []
    for _, task in tasks:
        try:
            paths.append(_image(root, task["data"]))
        except DataError as error:
            paths.append(error)
    count = Counter(path for path in paths if isinstance(path, Path))
    for (file, task), path in zip(tasks, paths, strict=True):
        entry = f"task {task.get('id')!r}"
        try:
            if isinstance(path, DataError):
                raise path
            if count[path] > 1:
                raise DataError(f"{count[path]} tasks are of {path}; keep one, or give the images names of their own")
            yield from _annotated(path, file, f"{entry} ({path.name})", task["annotations"], product).rows()
        except DataError as error:
            yield refused(path if isinstance(path, Path) else file, file, f"{file}: {entry}: {error}", product)


def _tasks(file: Path) -> list[dict[str, Any]]:
    tasks = read_json(file, CARD.layout)
    if not isinstance(tasks, list) or not all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list)
        for task in tasks
    ):
        raise DataError(f"{file} is not a list of tasks with data and annotations; expected {CARD.layout}")
    return tasks


def _image(root: Path, data: dict[str, Any]) -> Path:
    """The file a task shows: the longest tail of its URL that is one, or one of its name, with or without upload id."""
    urls = [url for url in data.values() if is_text(url) and _path(url).suffix.lower() in READ | REFUSED]
    if len(urls) != 1:
        raise DataError(f"data has {len(urls)} values that name an image; one is needed")
    path = _path(urls[0])
    if ".." in path.parts:
        raise DataError(f"image {urls[0]!r} leads out of {root}; write it without '..'")
    parts = [part for part in path.parts if part != "/"]
    original = re.sub("^[0-9a-f]{8}-", "", path.name)
    places = ["/".join(parts[start:]) for start in range(len(parts))]
    return locate(root, [*places, f"images/{path.name}", original, f"images/{original}"])


def _path(url: str) -> PurePosixPath:
    local = url.partition("?d=")[2] if url.startswith("/data/local-files/") else urlsplit(url).path
    return PurePosixPath(unquote(local).replace("\\", "/"))


def _annotated(path: Path, file: Path, entry: str, annotations: list[Any], product: str) -> AnnotatedImage:
    submitted = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    chosen = [a for a in submitted if a.get("ground_truth")] or submitted
    if len(chosen) != 1:
        reason = f"{len(chosen)} annotations" if chosen else "not annotated, or skipped"
        raise DataError(f"{reason}; submit one, or mark one of them as ground truth")
    results = chosen[0].get("result")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise DataError("the annotation has no list 'result'; export it again")
    annotated = AnnotatedImage(path=path, label_file=file, entry=entry, product=product, size=None)
    region_ids = [result.get("id") for result in results if result.get("type") in REGIONS]
    for result in results:
        kind, what = result.get("type"), f"result {result.get('id')!r}"
        if kind in REMARKS or (kind == "choices" and result.get("id") in region_ids):
            continue
        value = result.get("value")
        if kind not in (*REGIONS, "choices") or not isinstance(value, dict):
            raise DataError(f"{what}: {kind!r} is not read; use one of {', '.join(REGIONS)}, choices")
        labels = value.get(kind)
        if not isinstance(labels, list) or not labels:
            raise DataError(f"{what}: no label; choose one")
        names = [text(label, f"{what}: label") for label in labels]
        if kind == "choices":
            annotated.labels += names
            continue
        size = image_size(result.get("original_height"), result.get("original_width"))
        if size is None or size != (annotated.size or size) or result.get("image_rotation"):
            raise DataError(f"{what}: drawn on a turned image or one of unknown size; turn it back and submit again")
        annotated.size = size
        annotated.regions += [(name, _shape(kind, value, *size, what)) for name in names]
    return annotated


def _shape(kind: str, value: dict[str, Any], height: int, width: int, what: str) -> Shape:
    def pixels(key: str, side: int) -> float:
        return number(value.get(key), f"{what}: {key}") / 100 * side

    if kind == "brushlabels":
        rle = value.get("rle")
        if not isinstance(rle, list) or not all(isinstance(byte, int) and 0 <= byte < 256 for byte in rle):
            raise DataError(f"{what}: brush RLE is not a list of bytes; export it again")
        return Brush(bytes(rle), height, width)
    if kind == "polygonlabels":
        points = positions(value.get("points"), f"{what}: points")
        return Polygon(tuple((x / 100 * width, y / 100 * height) for x, y in points))
    x, y = pixels("x", width), pixels("y", height)
    rotation = number(value.get("rotation", 0), f"{what}: rotation")
    if kind == "ellipselabels":
        return Ellipse(x, y, pixels("radiusX", width), pixels("radiusY", height), rotation)
    w, h = pixels("width", width), pixels("height", height)
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    moved_x = (w * cos - h * sin - w) / 2  # of the centre, by the turn about the corner
    moved_y = (w * sin + h * cos - h) / 2
    return Box(x + moved_x, y + moved_y, x + w + moved_x, y + h + moved_y, rotation)


CARD = DatasetCard(
    name="label_studio",
    title="Label Studio annotations of your own, as its JSON export",
    licence="yours",
    source="your own files; format: https://labelstud.io/guide/export (JSON, not JSON-MIN)",
    layout="<root>/*.json (Label Studio export format JSON: a list of tasks with data and annotations) and the "
    "images under <root> or <root>/images; tasks submitted without a result are normal",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
