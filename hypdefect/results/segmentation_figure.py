"""Pictures of what a published segmenter says: of each class the images it marks best and worst."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hypdefect.evaluation import Score
from hypdefect.families.segmentation import SegmentationPlan, load
from hypdefect.files import home
from hypdefect.images.regions import as_values
from hypdefect.predictor import Predictor
from hypdefect.registry import ModelEntry

PANELS = ("image", "truth", "prediction", "errors")
MOST_CLASSES = 12
COLOURS = (
    *("#3566a8", "#d9822b", "#4d9a5b", "#b04a5a", "#7a5aa6", "#8a8a3c", "#4aa3a3", "#a66a3a"),
    *("#9ec1ea", "#f3c79a", "#a8d8b4", "#e6a9b4"),
)
ERRORS = ListedColormap(["white", "#000000", "#a8a8a8", "#d63fd6"])
"""Colours that no class has."""


@dataclass(frozen=True, slots=True)
class Example:
    title: str
    image: UInt8[np.ndarray, "H W 3"]
    truth: Int[np.ndarray, "H W"]
    predicted: Int[np.ndarray, "H W"]


def errors_of(example: Example) -> Int[np.ndarray, "H W"]:
    """0 right, 1 missed, 2 marked where nothing is, 3 another class."""
    missed = (example.truth > 0) & (example.predicted == 0)
    false = (example.truth == 0) & (example.predicted > 0)
    other = (example.truth > 0) & (example.predicted > 0) & (example.truth != example.predicted)
    return np.asarray(missed * 1 + false * 2 + other * 3)


def plot_examples(path: Path, examples: list[Example], classes: tuple[str, ...]) -> None:
    """Four panels an image: itself, its classes, those that were found, and where the two differ."""
    colours = ["white", *(COLOURS[i % len(COLOURS)] for i in range(len(classes)))]
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(8.5, 1.9 * len(examples) + 0.7), layout="constrained")
        rows = figure.subplots(len(examples), len(PANELS), squeeze=False)
        for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
            named: dict[str, Any] = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": len(classes)}
            wrong: dict[str, Any] = {"cmap": ERRORS, "vmin": 0, "vmax": 3}
            row[0].imshow(example.image)
            row[1].imshow(example.truth, interpolation="nearest", **named)
            row[2].imshow(example.predicted, interpolation="nearest", **named)
            row[3].imshow(errors_of(example), interpolation="nearest", **wrong)
            for axes, title in zip(row, PANELS, strict=True):
                axes.set_xticks([])
                axes.set_yticks([])
                if place == 0:
                    axes.set_title(title)
            row[0].text(-0.05, 0.5, example.title, transform=row[0].transAxes, ha="right", va="center")
        handles = [Patch(color=colours[i], label=name) for i, name in enumerate(classes, 1)]
        handles += [
            Patch(color=ERRORS(i), label=name) for i, name in ((1, "missed"), (2, "nothing there"), (3, "other class"))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
        figure.savefig(path, dpi=110)


def plot_segmentations(plan: SegmentationPlan, entry: ModelEntry, draw: Score, path: Path) -> None:
    """Draw what a published model says of the reported images: of each class the highest and the lowest IoU.

    Of the classes that these show, those beyond the first `MOST_CLASSES` are left out. Two images of a class are held
    at a time.
    """
    images = load(plan, home())[1].images
    predictor = Predictor.load(entry)
    best: dict[int, tuple[float, Example]] = {}
    worst: dict[int, tuple[float, Example]] = {}
    for number in range(len(images)):
        image, truth = images.read(number)
        (answer,) = predictor.predict([(image, None)])
        predicted = np.rint(as_values(answer.map_png) * 255).astype(np.int64)
        for label, _ in images.masks[number]:
            both = int(((truth == label) & (predicted == label)).sum())
            either = int(((truth == label) | (predicted == label)).sum())
            iou = both / max(either, 1)
            title = f"{plan.classes[label - 1]}\nIoU {iou:.2f}"
            one = (iou, Example(title, image, truth, predicted))
            best[label] = max(best.get(label, one), one, key=lambda pair: pair[0])
            worst[label] = min(one, worst.get(label, one), key=lambda pair: pair[0])  # the last of several
    examples: list[Example] = []
    for label in sorted(best)[:MOST_CLASSES]:
        examples.append(best[label][1])
        if worst[label] is not best[label]:  # as where there is one image
            examples.append(worst[label][1])
    plot_examples(path, examples, plan.classes)
