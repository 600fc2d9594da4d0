"""Tables and page of detectors, from ledger rows: whose differences, over which draws, and what is left out."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from hypdefect.evaluation import TWIN
from hypdefect.results import ledger
from hypdefect.results.detection_page import write_detection_page
from hypdefect.results.detection_tables import curves, detector_tables, detector_tasks, detector_values
from tests.ledger_rows import row

PLAIN = {"patchcore": 0.80, "hyperbolic_patchcore": 0.90}


def detector(method: str, partition: int, auroc: float, masks: bool = True, **changes: Any) -> dict[str, Any]:
    value = auroc + 0.01 * partition
    metrics = {"auroc": value, "aupr": value, "f1_max": 0.8, "false_alarms": 0.05, "detected": 0.6}
    metrics |= {"auroc crack": value - 0.1, "auroc dent": value, "fit_seconds": 1.0, "predict_seconds": 2.0}
    metrics |= {"pixel_auroc": 0.9, "pixel_aupr": 0.3, "aupro": value - 0.2, "aupimo": 0.1} if masks else {}
    same = {"family": "detection", "k_shot": 0, "class_names": [], "confusion": [], "metrics": metrics}
    return row(**same | {"method": method, "partition": partition, "features": "plain"} | changes)


def rows(masks: bool = True, **changes: Any) -> list[dict[str, Any]]:
    found = []
    for partition in range(3):
        found += [detector(method, partition, auroc, masks, **changes) for method, auroc in PLAIN.items()]
        found.append(detector("hyperbolic_patchcore", partition, 0.86, masks, variant=TWIN, **changes))
        for c, auroc in ((0.1, 0.85), (0.0, 0.82), (10.0, 0.7)):
            variant = {"variant": f"c = {c:g}", "study": "curvature", "run_id": "run1"}
            found.append(detector("hyperbolic_patchcore", partition, auroc, masks, **variant | changes))
    return found


def table_of(given: list[dict[str, Any]], home: Path) -> pa.Table:
    by_run: dict[str, list[dict[str, Any]]] = {}
    for one in given:
        by_run.setdefault(one["run_id"], []).append(one)
    for of_run in by_run.values():
        ledger.append(of_run, home)
    return ledger.read(home)


def test_differences_are_to_patchcore_and_to_the_own_twin(tmp_path: Path) -> None:
    (task,) = detector_tasks(table_of(rows(), tmp_path))
    best, twin, plain = task.rows()
    assert [row.name for row in (best, twin, plain)] == [
        "hyperbolic_patchcore",
        f"hyperbolic_patchcore, {TWIN}",
        "patchcore",
    ]
    assert best.to_reference is not None
    assert best.to_twin is not None
    assert best.to_reference.interval.mean == pytest.approx(0.10)
    assert best.to_twin.interval.mean == pytest.approx(0.04)
    assert (best.to_twin.verdict, twin.to_twin, plain.to_reference) == ("ahead", None, None)
    assert best.metrics["auroc"].mean == pytest.approx(0.91)


def test_curves_begin_at_0_and_are_paired_to_it(tmp_path: Path) -> None:
    (task,) = detector_tasks(table_of(rows(), tmp_path))
    for metric in ("auroc", "aupro"):
        points = curves(task, metric)["hyperbolic_patchcore"]
        assert [point.c for point in points] == [0, 0.1, 10]
        assert points[0].to_0 is None
        assert [point.to_0.interval.mean for point in points[1:] if point.to_0] == pytest.approx([0.03, -0.12])


def test_without_masks_there_are_no_metrics_of_pixels(tmp_path: Path) -> None:
    (task,) = detector_tasks(table_of(rows(masks=False), tmp_path))
    titles = [str(table.title) for table in detector_tables([task])]
    assert not any("where" in title for title in titles)
    (with_masks,) = detector_tasks(table_of(rows(run_id="run2", created="2026-02-01T00:00:00+00:00"), tmp_path / "b"))
    assert any("where" in str(table.title) for table in detector_tables([with_masks]))


def test_backbones_are_not_mixed(tmp_path: Path) -> None:
    usual = rows(backbone="patchcore_lite0")
    other = [
        one | {"run_id": f"other {one['run_id']}", "backbone": "patchcore_resnet50"}
        for one in rows()
        if one["variant"] == "" and one["study"] == "main"
    ]
    for one in other:
        one["metrics"] = one["metrics"] | {"auroc": one["metrics"]["auroc"] - 0.2}
    tasks = detector_tasks(table_of([*usual, *other], tmp_path))
    best = {task.title: (task.rows()[0].metrics["auroc"].mean, task.curve is not None) for task in tasks}
    title = "mtd, grouped split, 3 partitions x 1 draw"
    assert best == {title: (pytest.approx(0.91), True), f"{title}, patchcore_resnet50": (pytest.approx(0.71), False)}
    assert not [table.title for table in detector_tables(tasks) if "mean over" in str(table.title)]
    write_detection_page(tmp_path, tasks, tmp_path)
    assert len({path.name for path in tmp_path.glob("*classes*.png")}) == 2


def test_products_are_averaged(tmp_path: Path) -> None:
    given = rows(run_id="run1", study="main")
    main = [one for one in given if not one["variant"].startswith("c =")]
    other = [one | {"run_id": "run2", "label": "mtd-b", "product": "b"} for one in main]
    tasks = detector_tasks(table_of([*main, *other], tmp_path))
    assert [task.label for task in tasks] == ["mtd", "mtd-b"]
    (mean,) = [table for table in detector_tables(tasks) if "mean over 2 products" in str(table.title)]
    assert next(iter(mean.columns[1].cells)) == "91.00"
    assert len(detector_tasks(ledger.read(tmp_path), "mtd-b")) == 1


def test_the_page_holds_its_pictures_and_few_shot_rows_are_none_of_it(tmp_path: Path) -> None:
    table = table_of([*rows(), row(run_id="few")], tmp_path)
    tasks = detector_tasks(table)
    page = write_detection_page(tmp_path / "report", tasks, tmp_path)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "hyperbolic_patchcore, c = 0 twin" in text
    assert "prototype" not in text
    for picture in (tmp_path / "report").glob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 500
    (values,) = detector_values(tasks)
    assert [point["c"] for point in values["curves"]["hyperbolic_patchcore"]] == [0, 0.1, 10]
    assert {row["name"] for row in values["detectors"]} >= set(PLAIN)
