"""VisA (Zou et al., ECCV 2022), as published, with the classes of its defects.

`image_anno.csv` names the defects of an image, `CLASSES` their ids, the pixel values of its mask. An image with one
label is one row, marked wherever its mask is not 0. An image with several labels is one row per label, marked where
the mask has the label's id.

The authors resized the masks with interpolation (amazon-science/spot-diff issue 7), so a border of a region of id k
runs through the ids below k, and the labels of capsules and macaroni2 seem to be counted from such masks: they only
occur as bubble / bubble, discolor / bubble, discolor, scratch / ... Ids of an image with several labels therefore count
only where a square of `SOLID` pixels has them; a label of which nothing is left goes to the quarantine.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from scipy.ndimage import binary_opening

from hypdefect.datasets.card import DatasetCard, ManifestRow, inside
from hypdefect.datasets.readers.class_masks import read_indices
from hypdefect.datasets.readers.tables import read_rows
from hypdefect.errors import DataError
from hypdefect.files import data_root

ANNOTATIONS = "image_anno.csv"
SPLIT = "split_csv/1cls.csv"
NORMAL = "normal"
COMBINED = "combined"
SOLID = 3

CLASSES = {
    "candle": (
        "chunk of wax missing",
        "damaged corner of packaging",
        "weird candle wick",
        "different colour spot",
        "extra wax in candle",
        "foreign particals on candle",
        "wax melded out of the candle",
        "other",
    ),
    "capsules": ("bubble", "discolor", "scratch", "leak", "misshape"),
    "cashew": (
        "burnt",
        "corner or edge breakage",
        "different colour spot",
        "middle breakage",
        "small holes",
        "small scratches",
        "stuck together",
        "same colour spot",
        "other",
    ),
    "chewinggum": (
        "chunk of gum missing",
        "corner missing",
        "scratches",
        "similar colour spot",
        "small cracks",
        "other",
    ),
    "fryum": (
        "burnt",
        "corner or edge breakage",
        "different colour spot",
        "fryum stuck together",
        "middle breakage",
        "similar colour spot",
        "small scratches",
        "other",
    ),
    "macaroni1": (
        "chip around edge and corner",
        "different colour spot",
        "middle breakage",
        "similar colour spot",
        "small cracks",
        "small scratches",
        "other",
    ),
    "macaroni2": (
        "breakage down the middle",
        "color spot similar to the object",
        "different color spot",
        "small chip around edge",
        "small cracks",
        "small scratches",
        "other",
    ),
    "pcb1": ("bent", "melt", "scratch", "missing"),
    "pcb2": ("bent", "melt", "scratch", "missing"),
    "pcb3": ("bent", "melt", "scratch", "missing"),
    "pcb4": ("burnt", "scratch", "missing", "damage", "extra", "wrong place", "dirt"),
    "pipe_fryum": (
        "burnt",
        "corner and edge breakage",
        "different colour spot",
        "middle breakage",
        "similar colour spot",
        "small scratches",
        "stuck together",
        "small cracks",
        "other",
    ),
}
"""The classes of each product in the order of their ids, from 1 (utils/id2class.py of the authors)."""


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image and label."""
    products = sorted(p for p in root.iterdir() if (p / "Data" / "Images").is_dir())
    if not products:
        raise DataError(f"{root} is not a VisA folder: no <product>/Data/Images in it; expected {CARD.layout}")
    split_of = None
    if (root / SPLIT).is_file():
        split_of = {row["image"]: row["split"] for row in read_rows(root / SPLIT, ("image", "split"), CARD.layout)}
    for product in products:
        annotations = product / ANNOTATIONS
        for row in read_rows(annotations, ("image", "label", "mask"), CARD.layout):
            try:
                path = inside(root, row["image"])
                mask = inside(root, row["mask"]) if row["mask"] else None
                if split_of is not None and row["image"] not in split_of:
                    raise DataError(f"{path}: not listed in {root / SPLIT}; take the files of one download")
            except DataError as error:
                yield ManifestRow(
                    path=annotations,
                    product=product.name,
                    defect=row["label"],
                    is_defect=row["label"] != NORMAL,
                    refused=str(error),
                )
                continue
            split = split_of[row["image"]] if split_of is not None else ""
            labels = list(dict.fromkeys(filter(None, map(str.strip, row["label"].split(","))))) or [""]
            yield from _rows(path, product.name, labels, mask, split)


def _rows(path: Path, product: str, labels: list[str], mask: Path | None, split: str) -> Iterable[ManifestRow]:
    ids = {label: i for i, label in enumerate(CLASSES.get(product, ()), start=1)}
    if len(labels) > 1 and (mask is None or not set(labels) <= set(ids)):
        labels = [COMBINED]
    for label in labels:
        draw = None
        if mask is not None:
            draw = partial(_marked, mask) if len(labels) == 1 else partial(_region, mask, ids[label], label)
        yield ManifestRow(
            path=path,
            product=product,
            defect=label,
            is_defect=label != NORMAL,
            draw_mask=draw,
            label_file=mask,
            split=split,
        )


def _marked(path: Path, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    return read_indices(path, (height, width)) > 0


def _region(path: Path, index: int, label: str, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    region = binary_opening(read_indices(path, (height, width)) == index, np.ones((SOLID, SOLID)))
    if not region.any():
        raise DataError(
            f"{path}: labelled {label}, but its id {index} fills no square of {SOLID} x {SOLID} pixels: at most the "
            f"resampled border of another defect"
        )
    return region


CARD = DatasetCard(
    name="visa",
    title="VisA: 12 products, with defect classes",
    licence="CC BY 4.0",
    source="https://github.com/amazon-science/spot-diff (VisA_20220922.tar; not the copy sorted into good and bad, "
    "which has no classes). An image with several labels is one row per label, its mask cut by the ids in the mask "
    "without the borders that resampling left; one whose labels have no ids is of class combined. All defects are in "
    "the test part of the official split 1cls.",
    layout="<root>/<product>/Data/Images/Normal|Anomaly/*.JPG, Data/Masks/Anomaly/*.png, image_anno.csv (image, label, "
    "mask); optional <root>/split_csv/1cls.csv (object, split, label, image, mask)",
    expected={
        "candle": 1100,
        "capsules": 702,
        "cashew": 600,
        "chewinggum": 603,
        "fryum": 600,
        "macaroni1": 1100,
        "macaroni2": 1100,
        "pcb1": 1104,
        "pcb2": 1101,
        "pcb3": 1106,
        "pcb4": 1105,
        "pipe_fryum": 600,
    },
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "visa",
)
