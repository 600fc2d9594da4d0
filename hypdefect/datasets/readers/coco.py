"""COCO instance annotations, also as Roboflow exports them (one file per split, beside its images).

https://cocodataset.org/#format-data. The super-category is the family. An image without annotations is a normal one.
A crowd region (`iscrowd`) marks its pixels like any other; an annotation without segmentation marks its box.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.annotated import (
    AnnotatedImage,
    image_size,
    is_official,
    is_text,
    locate,
    numbers,
    product_of,
    read_json,
    refused,
    split_named,
    text,
)
from hypdefect.datasets.readers.shapes import Box, Polygon, Rle, Shape
from hypdefect.errors import DataError

BESIDE_IMAGES = "_annotations.coco.json"
PATTERNS = ("annotations/[!.]*.json", f"*/{BESIDE_IMAGES}", "[!.]*.json")
"""Where annotations may lie; the first place that has any. A Mac leaves ._NAME.json, which is none."""
NO_FAMILY = "none"
"""What Roboflow writes as super-category where there is none."""


def scan(root: Path) -> Iterator[ManifestRow]:
    """One row per image and class; splits where every file is named after one, train and test among them."""
    files = next((found for pattern in PATTERNS if (found := sorted(root.glob(pattern)))), [])
    if not files:
        raise DataError(f"{root} holds no COCO annotations; expected {CARD.layout}")
    splits = {file: split_named(_part(file)) for file in files}
    official = is_official(splits.values())
    listed: dict[Path, Path] = {}
    for file in files:
        for row in _read(root, file, splits[file] if official else ""):
            other = listed.setdefault(row.path, file)
            if other != file and not row.refused:
                reason = f"{file}: image {row.path} stands in {other} too; delete one of the entries"
                row = refused(row.path, file, reason, row.product, row.defect)
            yield row


def _part(file: Path) -> str:
    return file.parent.name if file.name == BESIDE_IMAGES else file.stem


def _read(root: Path, file: Path, split: str) -> Iterator[ManifestRow]:
    content = read_json(file, CARD.layout)
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise DataError(f"{file} has no lists {', '.join(parts)}: not a COCO instance file; expected {CARD.layout}")
    product = product_of(root)
    names, families = _categories(content["categories"])
    marks = defaultdict(list)
    known = Counter(_id(image, "id") for image in content["images"])
    for annotation in content["annotations"]:
        key = _id(annotation, "image_id")
        marks[key].append(annotation)
        if key is None or key not in known:
            reason = f"annotation {_shown(annotation, 'id')}: no image has the id {_shown(annotation, 'image_id')}"
            yield refused(file, file, f"{file}: {reason}; delete it or add the image", product)
    for image in content["images"]:
        entry = f"image {_shown(image, 'file_name')} (id {_shown(image, 'id')})"
        path = file
        try:
            key = _id(image, "id")
            if key is None or known[key] > 1:
                raise DataError("its id is missing or stands twice; number the images anew")
            path = locate(root, _places(root, file, text(image.get("file_name"), "file_name")))
            annotated = AnnotatedImage(
                path=path,
                label_file=file,
                entry=entry,
                product=product,
                size=image_size(image.get("height"), image.get("width")),
                families=families,
                split=split,
            )
            for annotation in marks[key]:
                name = names.get(_id(annotation, "category_id"))
                what = f"annotation {_shown(annotation, 'id')}"
                if name is None:
                    shown = _shown(annotation, "category_id")
                    raise DataError(f"{what}: category {shown} is missing, without a name or defined twice; mend it")
                annotated.regions += [(name, shape) for shape in _shapes(annotation, what)]
            yield from annotated.rows()
        except DataError as error:
            yield refused(path, file, f"{file}: {entry}: {error}", product)


def _categories(entries: list[Any]) -> tuple[dict[Any, str | None], dict[str, str]]:
    """Names by id, None where one id has two; and families by name."""
    names: dict[Any, str | None] = {}
    families: dict[str, str] = {}
    for entry in entries:
        key, name = _id(entry, "id"), entry.get("name") if isinstance(entry, dict) else None
        if key is None or not is_text(name):
            continue
        names[key] = name if names.setdefault(key, name) == name else None
        family = entry.get("supercategory")
        if is_text(family) and family.lower() != NO_FAMILY:
            families[name] = family
    return names, families


def _places(root: Path, file: Path, name: str) -> list[str]:
    if file.name == BESIDE_IMAGES:
        return [f"{file.parent.relative_to(root).as_posix()}/{name}"]
    part = file.stem.rpartition("_")[2]
    return [f"images/{part}/{name}", f"{part}/{name}", f"images/{name}", name]


def _shapes(annotation: dict[str, Any], what: str) -> Iterable[Shape]:
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        height, width = numbers(segmentation.get("size"), f"{what}: size", 2)
        counts = segmentation.get("counts")
        if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
            counts = tuple(counts)
        if not isinstance(counts, tuple | str):
            raise DataError(f"{what}: RLE without counts in whole numbers; export it again")
        return [Rle(counts, int(height), int(width))]
    if segmentation:
        if not isinstance(segmentation, list):
            raise DataError(f"{what}: segmentation is neither polygons nor RLE; export it again")
        polygons = [numbers(polygon, f"{what}: polygon") for polygon in segmentation]
        if any(len(polygon) % 2 for polygon in polygons):
            raise DataError(f"{what}: a polygon of an odd count of numbers; draw it again")
        return [Polygon(tuple(zip(polygon[::2], polygon[1::2], strict=True))) for polygon in polygons]
    x, y, width, height = numbers(annotation.get("bbox"), f"{what}: no segmentation, and bbox", 4)
    return [Box(x, y, x + width, y + height)]


def _id(entry: object, key: str) -> int | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _shown(entry: object, key: str) -> str:
    return repr(entry.get(key))[:80] if isinstance(entry, dict) else repr(entry)[:80]


CARD = DatasetCard(
    name="coco",
    title="COCO instance annotations of your own, also as exported by Roboflow, CVAT or Label Studio",
    licence="yours",
    source="your own files; format: https://cocodataset.org/#format-data",
    layout="<root>/annotations/*.json with the images in images/ (or images/<split>/, <split>/), or "
    "<root>/<split>/_annotations.coco.json beside the images, or <root>/*.json; lists images, annotations, "
    "categories; images without annotations are normal",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
