"""The page of segmenters, from ledger rows: what is compared to what, which curve is drawn, whose pictures it shows."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypdefect.evaluation import TWIN
from hypdefect.files import write_json
from hypdefect.results import ledger
from hypdefect.results.detection_page import newest_pictures
from hypdefect.results.segmentation_page import segmenter_tasks, segmenter_values, write_segmentation_page
from tests.ledger_rows import row

RHO = {"HADNet": 0.01, TWIN: 0.0, "rho = 0.1": 0.1, "no HST": 0.01}
VALUES = {"HADNet": 0.70, TWIN: 0.66, "rho = 0.1": 0.68, "no HST": 0.64}


def segmenter(variant: str, draw: int, value: float, **changes: Any) -> dict[str, Any]:
    miou = value + 0.01 * draw
    metrics = {"miou": miou, "miou_background": miou, "macro_f1": 0.8, "weighted_f1": 0.8, "pixel_acc": 0.9}
    metrics |= {"image_acc": 0.9, "image_missed": 1 - miou}
    metrics |= {"iou crack": miou, "fit_seconds": 1.0, "predict_seconds": 2.0}
    config = json.dumps({"method": {"curvature": RHO.get(variant, 0.01)}})
    same = {"family": "segmentation", "k_shot": 0, "class_names": [], "confusion": [], "study": "paper/hadnet"}
    same |= {"method": "hadnet", "variant": variant, "draw": draw, "metrics": metrics, "method_config": config}
    return row(**same | changes)


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    rows = [segmenter(name, draw, value) for name, value in VALUES.items() for draw in range(3)]
    rows += [segmenter("FPN", draw, 0.6, method="fpn") for draw in range(3)]
    swept = {"study": "sweep", "run_id": "run1", "variant": "", "class_names": ["crack", "fray", "uneven"]}
    ledger.append(rows, tmp_path)
    plain = segmenter("", 0, 0.6, method="fpn") | swept
    plain["metrics"] = {k: v for k, v in plain["metrics"].items() if k != "iou crack"}  # no such pixel was reported on
    ledger.append([plain], tmp_path)
    ledger.append([row(run_id="few")], tmp_path)
    return segmenter_tasks(ledger.read(tmp_path))


def test_rows_are_compared_to_the_full_method_and_the_curve_begins_at_0(tasks: Any) -> None:
    paper, swept = tasks
    assert (paper.reference, swept.reference) == ("hadnet, HADNet", None)
    assert "iou crack" in paper.shown
    assert "iou crack" not in swept.shown
    (points,) = paper.curve().values()
    assert [point.c for point in points] == [0, 0.01, 0.1]
    assert points[0].to_0 is None
    assert [point.to_0.interval.mean for point in points[1:] if point.to_0] == pytest.approx([0.04, 0.02])
    assert swept.curve() == {}
    values = segmenter_values([paper])[0]
    assert values["segmenters"]["hadnet, HADNet"]["iou crack"]["mean"] == pytest.approx(0.71)
    assert json.loads(json.dumps(values)) == values


def test_the_page_holds_every_row_and_its_pictures(tasks: Any, tmp_path: Path) -> None:
    pictures = tmp_path / "runs" / "hadnet-mtd" / "pictures.png"
    pictures.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(pictures)
    about = {"label": "mtd", "split": "grouped"}
    write_json(pictures.parent / "record.json", {"task": about | {"learned_images": 3}})
    assert newest_pictures("mtd", "grouped", "learned_images", tmp_path) == pictures
    assert newest_pictures("mtd", "grouped", "tested_normals", tmp_path) is None
    assert newest_pictures("mtd", "random", "learned_images", tmp_path) is None
    assert newest_pictures("mtd-other", "grouped", "learned_images", tmp_path) is None
    write_json(pictures.parent / "record.json", {"task": {"dataset": "mtd", "split": "grouped", "learned_images": 3}})
    assert newest_pictures("mtd", "grouped", "learned_images", tmp_path) == pictures  # made before records had labels
    text = write_segmentation_page(tmp_path / "report", tasks, tmp_path).read_text()
    assert text.count("data:image/png;base64,") == 3  # a curve, and the pictures in both chapters
    best = text[text.index(">hadnet, HADNet<") :].split("</tr>")[0]
    assert re.search(r'class="best"[^>]*>29.00', best)  # of what is missed the least
    for name in (
        "hadnet, HADNet",
        f"hadnet, {TWIN}",
        "hadnet, no HST",
        "fpn, FPN",
        "−4.00",
        "behind",
        "images named right",
    ):
        assert name in text
    assert "prototype" not in text
