"""UCF-EL: electroluminescence images of solar cells (Fioresi et al., IEEE J. Photovoltaics 2022).

Regions are drawn with the VGG Image Annotator; its CSV export names an image by its file name alone, so the images are
looked for in all folders. The families are the four classes of the authors' segmentation model.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.shapes import Box, Ellipse, Polygon, Shape, draw
from hypdefect.datasets.readers.tables import read_rows
from hypdefect.errors import DataError
from hypdefect.files import data_root

ANNOTATIONS = "AnnotationsCombined.csv"
COLUMNS = ("filename", "region_shape_attributes", "region_attributes")
READ = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
NORMAL = "No_Defect"
UNKNOWN = "Unknown"
FAMILIES = {
    "Crack_Closed": "crack",
    "Crack_Isolated": "crack",
    "Crack_Resistive": "crack",
    "Contact_FrontGridInterruption": "contact",
    "Contact_NearSolderPad": "contact",
    "Interconnect_BrightSpot": "interconnect",
    "Interconnect_Disconnected": "interconnect",
    "Interconnect_HighlyResistive": "interconnect",
    "Contact_BeltMarks": "corrosion",
    "Contact_Corrosion": "corrosion",
}


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image and class, with all its regions; an image that is listed without regions is normal."""
    table = root / ANNOTATIONS
    if not table.is_file():
        raise DataError(f"{root} is not a UCF-EL folder: {ANNOTATIONS} missing; expected {CARD.layout}")
    files = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in READ and path.is_file():
            files[path.name].append(path)

    regions: dict[str, dict[str, list[Shape]]] = defaultdict(dict)
    refused: dict[tuple[str, str], str] = {}
    for row in read_rows(table, COLUMNS, CARD.layout):
        name = row["filename"]
        place = f"{table}: {name}"
        shape, attributes = _object(row["region_shape_attributes"]), _object(row["region_attributes"])
        if shape == {}:
            regions[name].setdefault(NORMAL, [])
            continue
        defect = str((attributes or {}).get("Defect_Class") or UNKNOWN)
        shapes = regions[name].setdefault(defect, [])
        try:
            shapes.append(_shape(shape or {}, place))
        except DataError as error:
            refused[name, defect] = str(error)

    for name, classes in regions.items():
        found = files.get(name, [])
        reason = ""
        if len(found) != 1:
            places = ", ".join(map(str, found)) or f"no image file under {root}"
            reason = f"{table}: {name!r} is {places}; it must lie in one folder of the data set"
        for defect, shapes in classes.items():
            is_defect = defect != NORMAL
            if not is_defect and len(classes) > 1:
                continue
            yield ManifestRow(
                path=found[0] if found else table,
                product="solar_cell",
                family=FAMILIES.get(defect, ""),
                defect=defect,
                is_defect=is_defect,
                draw_mask=partial(draw, shapes, name=f"{table}: {name}") if is_defect else None,
                label_file=table,
                refused=reason or refused.get((name, defect), ""),
            )


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object of a cell, {} for an empty cell, None for anything else."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _shape(shape: dict[str, Any], place: str) -> Shape:
    def number(key: str) -> float:
        return float(shape[key])

    try:
        match shape.get("name"):
            case "polygon":
                points = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
                return Polygon(points=tuple((float(x), float(y)) for x, y in points))
            case "rect":
                x, y = number("x"), number("y")
                return Box(x, y, x + number("width"), y + number("height"))
            case "circle":
                return Ellipse(number("cx"), number("cy"), number("r"), number("r"))
            case "ellipse":
                turn = math.degrees(float(shape.get("theta", 0)))
                return Ellipse(number("cx"), number("cy"), number("rx"), number("ry"), turn)
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(f"{place}: region {str(shape)[:60]} is no polygon, rect, circle or ellipse of the annotator")


CARD = DatasetCard(
    name="ucf_el",
    title="UCF-EL: solar cells under electroluminescence, 11 labelled defects",
    licence="none stated by the authors; ask them before commercial use",
    source="https://github.com/ucf-photovoltaics/UCF-EL-Defect. A cell with several defects is one row per class. "
    "Unknown is a label of the authors. Counts of Mueez et al. (Solar Energy 2026). Neither a split is published "
    "nor which cells are of one module.",
    layout="<root>/AnnotationsCombined.csv (filename, region_shape_attributes, region_attributes with Defect_Class) "
    "and the images in any folders below",
    expected={
        "Contact_BeltMarks": 14,
        "Contact_Corrosion": 67,
        "Contact_FrontGridInterruption": 8692,
        "Contact_NearSolderPad": 5582,
        "Crack_Closed": 2640,
        "Crack_Isolated": 1755,
        "Crack_Resistive": 3087,
        "Interconnect_BrightSpot": 247,
        "Interconnect_Disconnected": 230,
        "Interconnect_HighlyResistive": 247,
        "No_Defect": 855,
        "Unknown": 83,
    },
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "ucf_el",
)
