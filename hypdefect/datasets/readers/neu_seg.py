"""NEU-Seg: defects of hot-rolled steel strip, labelled by pixel (Dong et al., IEEE TII 2020; as it is on GitHub)."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.class_masks import read_indices
from hypdefect.errors import DataError
from hypdefect.files import data_root

PRODUCT = "hot_rolled_strip"
CLASSES = {1: "inclusion", 2: "patches", 3: "scratches"}
SPLITS = {"training": "train", "test": "test"}


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image and class it shows."""
    parts = [part for part in SPLITS if (root / "images" / part).is_dir()]
    missing = [f"annotations/{p}" for p in parts if not (root / "annotations" / p).is_dir()]
    if missing or not parts:
        raise DataError(
            f"{root} is not a NEU-Seg folder: {', '.join(missing) or 'images/training'} missing; expected {CARD.layout}"
        )
    for part in parts:
        split = SPLITS[part] if len(parts) == len(SPLITS) else ""
        for path in sorted((root / "images" / part).glob("*.jpg")):
            labels = root / "annotations" / part / f"{path.stem}.png"
            try:
                shown = _classes(labels)
            except DataError as error:
                yield ManifestRow(
                    path=path, product=PRODUCT, defect="unlabelled", is_defect=True, split=split, refused=str(error)
                )
                continue
            for index in shown:
                yield ManifestRow(
                    path=path,
                    product=PRODUCT,
                    defect=CLASSES[index],
                    is_defect=True,
                    draw_mask=partial(_region, labels, index),
                    label_file=labels,
                    split=split,
                )


def _classes(path: Path) -> list[int]:
    """The indices of the classes that an image shows."""
    counts = np.bincount(read_indices(path).ravel())
    shown = [index for index in np.flatnonzero(counts).tolist() if index]
    if not shown:
        raise DataError(f"{path}: no pixel of a class")
    if shown[-1] not in CLASSES:
        raise DataError(f"{path}: class index {shown[-1]}; known are 0 (background) to {max(CLASSES)}")
    return shown


def _region(path: Path, index: int, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    return read_indices(path, (height, width)) == index


CARD = DatasetCard(
    name="neu_seg",
    title="NEU-Seg: hot-rolled steel strip, three defects, class of each pixel",
    licence="none stated by the authors; ask them before commercial use",
    source="https://github.com/DHW-Master/NEU_Seg: 3630 training and 840 test images of 200 x 200 pixels, about one in "
    "five with several classes: such an image is one row per class. The images are rotated copies of about 1123 "
    "originals, which the official split tears apart. Where one of the two parts is missing, the other has no split.",
    layout="<root>/images/training|test/*.jpg and annotations/training|test/*.png of the same stem (0 background, "
    "1 inclusion, 2 patches, 3 scratches)",
    expected={PRODUCT: 4470},
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "neu_seg",
    always_audit=True,
)
