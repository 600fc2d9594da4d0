"""elpv: electroluminescence images of solar cells (Deitsch et al., Solar Energy 185, 2019), as packaged on PyPI."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError

LABELS = "labels.csv"
TYPES = ("mono", "poly")


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per cell whose defect probability is 0 (good) or 1 (defect); the undecided 1/3 and 2/3 are left out."""
    labels = root / LABELS
    if not labels.is_file():
        raise DataError(f"{root} is not an elpv data folder: no {LABELS} in it; expected {CARD.layout}")
    for number, line in enumerate(labels.read_text().splitlines(), start=1):
        fields = line.replace(",", " ").split()
        if not fields or fields[0] == "path":
            continue
        try:
            path, probability, kind = fields[0], float(fields[1]), fields[2]
        except (IndexError, ValueError):
            raise DataError(f"{labels} line {number}: expected 'path probability type', got {line!r}") from None
        if kind not in TYPES:
            raise DataError(f"{labels} line {number}: cell type {kind!r} is not one of {', '.join(TYPES)}")
        if not 0 <= probability <= 1:
            raise DataError(f"{labels} line {number}: probability {probability} is not in [0, 1]")
        if probability in (0.0, 1.0):
            defective = probability == 1.0
            yield ManifestRow(
                path=root / path,
                product="solar_cell",
                defect=f"{kind}_{'defect' if defective else 'good'}",
                is_defect=defective,
            )


def default_root() -> Path | None:
    """The data folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec("elpv_dataset")
    return Path(spec.origin).parent / "data" if spec is not None and spec.origin is not None else None


CARD = DatasetCard(
    name="elpv",
    title="elpv: solar cells under electroluminescence, cell type x {good, defect}",
    licence="CC BY-NC-SA 4.0 (images), no commercial use",
    source="PyPI package elpv-dataset (https://github.com/zae-bayern/elpv-dataset): 2624 cells of 300 x 300 pixels "
    "from 44 modules. 401 cells that the experts were unsure of (probability 1/3: 295, 2/3: 106) are left out. No "
    "masks, and no record of which module a cell was cut from.",
    layout="labels.csv (path, probability, type) and images/*.png",
    expected={"mono_defect": 313, "mono_good": 588, "poly_defect": 402, "poly_good": 920},
    good_is_class=True,
    scan=scan,
    default_root=default_root,
)
