"""Pictures of what a published detector says: of each class the images it is surest and least sure of."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure

from hypdefect.evaluation import Score
from hypdefect.families.detection import DetectionPlan
from hypdefect.families.image_files import MaskFile, full_mask, mask_file
from hypdefect.images import read_raw
from hypdefect.images.regions import as_values, cleaned
from hypdefect.predictor import Predictor
from hypdefect.registry import ModelEntry

PANELS = ("image", "marked", "map", "found", "both")
MOST_CLASSES = 8


@dataclass(frozen=True, slots=True)
class Example:
    """An image, where it is marked (nowhere on a good part), and what the detector answered."""

    title: str
    image: UInt8[np.ndarray, "H W 3"]
    marked: Bool[np.ndarray, "H W"]
    answer: Any

    @property
    def anomaly_map(self) -> Float[np.ndarray, "H W"]:
        """1 where a region begins."""
        return 2 * as_values(self.answer.map_png)


def chosen(units: Mapping[str, str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Title and image id of the highest and the lowest score of each class; of good parts, class "", the highest first.

    Args:
        units: class of each image.
    """
    pairs = []
    for name in sorted(set(units.values()))[:MOST_CLASSES]:
        ranked = sorted((i for i, unit in units.items() if unit == name), key=lambda i: (-scores[i], i))
        for what, image_id in zip(("highest", "lowest"), dict.fromkeys((ranked[0], ranked[-1])), strict=False):
            pairs.append((f"{name or 'good'}, {what} score", image_id))
    return pairs


def plot_examples(path: Path, examples: Sequence[Example]) -> None:
    """Five panels an image: itself, what is marked, the map, what was found, and both outlines on it."""
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 1.9 * len(examples)), layout="constrained")
        rows = figure.subplots(len(examples), len(PANELS), squeeze=False)
        for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
            found = cleaned(example.anomaly_map > 1)
            pictures = (example.image, example.marked, example.anomaly_map, found, example.image)
            for axes, title, picture in zip(row, PANELS, pictures, strict=True):
                limits = {"vmin": 0, "vmax": 2, "cmap": "magma"} if title == "map" else {"vmin": 0, "vmax": 1}
                axes.imshow(picture, **({"cmap": "gray"} | limits))
                axes.set_axis_off()
                if place == 0:
                    axes.set_title(title)
            for mask, colour in ((example.marked, "#3566a8"), (found, "#d9822b")):
                if mask.any() and not mask.all():
                    row[-1].contour(mask, levels=[0.5], colors=colour, linewidths=1.2)
            verdict = "anomalous" if example.answer.anomalous else "good"
            text = f"{example.title}\n{verdict}, p = {example.answer.p_value:.3f}"
            row[0].text(-0.05, 0.5, text, transform=row[0].transAxes, ha="right", va="center")
        figure.savefig(path, dpi=110)


def plot_detections(plan: DetectionPlan, entry: ModelEntry, draw: Score, path: Path) -> None:
    """Draw what a published model says of the reported images that a draw scored highest and lowest."""
    assert draw.anomaly is not None
    rows = {row["image_id"]: row for row in plan.manifest.to_pylist()}
    marked: dict[str, list[MaskFile]] = defaultdict(list)
    for row in rows.values():
        if row["is_defect"] and row["mask_uri"]:
            marked[row["file_id"]].append(mask_file(row))
    units = {i: rows[i]["defect"] if rows[i]["is_defect"] else "" for i in draw.image_ids}
    predictor, examples = Predictor.load(entry), []
    for title, image_id in chosen(units, dict(zip(draw.image_ids, draw.anomaly.tolist(), strict=True))):
        row = rows[image_id]
        raw, _ = read_raw(Path(row["uri"]))
        image = predictor.rgb(raw)
        mask = full_mask(marked[row["file_id"]], (image.shape[0], image.shape[1]))
        (answer,) = predictor.predict([(image, None)])
        examples.append(Example(title, image, mask, answer))
    plot_examples(path, examples)
