"""MVTec-FS (Lyu et al., MVREC, AAAI 2025): the defect images of MVTec AD with each region outlined and labelled anew.

As in the paper, toothbrush (one class) is left out, and so are regions labelled combined.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow, inside
from hypdefect.datasets.readers.shapes import Polygon, draw
from hypdefect.datasets.readers.tables import read_rows
from hypdefect.errors import DataError
from hypdefect.files import data_root

COMBINED = "combined"
SPLITS = {"train": "train", "valid": "test"}
IMAGES = {
    "bottle": 63,
    "cable": 92,
    "capsule": 109,
    "carpet": 89,
    "grid": 57,
    "hazelnut": 70,
    "leather": 92,
    "metal_nut": 93,
    "pill": 141,
    "screw": 119,
    "tile": 84,
    "transistor": 40,
    "wood": 60,
    "zipper": 119,
}


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image and class, with all its regions."""
    tables = {product: root / "CONFIG" / f"{product}_config1" for product in IMAGES}
    products = [product for product, folder in tables.items() if folder.is_dir()]
    images = root / "image"
    missing = ["CONFIG/<product>_config1"] * (not products) + ["image"] * (not images.is_dir())
    if missing:
        raise DataError(f"{root} is not an MVTec-FS folder: {', '.join(missing)} missing; expected {CARD.layout}")
    for product in products:
        for part, split in SPLITS.items():
            table = tables[product] / f"{part}.csv"
            regions: dict[tuple[str, str], list[str]] = {}
            for row in read_rows(table, ("img_rel_path", "label", "points"), CARD.layout):
                if row["label"] != COMBINED:
                    regions.setdefault((row["img_rel_path"], row["label"]), []).append(row["points"])
            for (relative, defect), points in regions.items():
                path, shapes, refused = table, [], ""
                try:
                    path = inside(images / product, relative)
                    shapes = [_polygon(text, f"{table}: {relative}") for text in points]
                except DataError as error:
                    refused = str(error)
                yield ManifestRow(
                    path=path,
                    product=product,
                    defect=defect,
                    is_defect=True,
                    draw_mask=partial(draw, shapes, name=f"{table}: {relative}"),
                    label_file=table,
                    split=split,
                    refused=refused,
                )


def _polygon(text: str, name: str) -> Polygon:
    try:
        return Polygon(points=tuple((float(x), float(y)) for x, y in json.loads(text)))
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{name}: points {text[:40]!r} are not [[x, y], ...]") from None


CARD = DatasetCard(
    name="mvtec_fs",
    title="MVTec-FS: 14 products, 46 kinds of defects, regions outlined",
    licence="CC BY-NC-SA 4.0, no commercial use",
    source="https://github.com/ShuaiLYU/MVTec-FS; join and unpack image.tar.* there. An image that shows several "
    "classes is one row per class. Regions labelled combined and toothbrush are left out, as in the paper.",
    layout="<root>/image/<product>/training|testing/<defect>/*.png and CONFIG/<product>_config1/train.csv|valid.csv "
    "(img_rel_path, label, points)",
    expected=IMAGES,
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "mvtec_fs",
)
