"""What the readers of annotation files share: reading one, and turning an image's labels and regions into rows."""

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from hypdefect.datasets.card import ManifestRow, inside
from hypdefect.datasets.readers.folder import GOOD
from hypdefect.datasets.readers.shapes import Shape, draw
from hypdefect.errors import DataError
from hypdefect.images import read_bytes

NORMAL = "good"
"""The class of an image that was looked at and has nothing marked."""
UNKNOWN = "(unknown)"
"""Stands for the class of a refused image where none can be told."""
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)


@dataclass(kw_only=True, slots=True)
class AnnotatedImage:
    """One image as an annotation file describes it."""

    path: Path
    label_file: Path
    entry: str
    """Names the image in messages."""
    product: str
    size: tuple[int, int] | None
    """(height, width) as the annotation states it."""
    labels: list[str] = field(default_factory=list)
    """Of the image as a whole."""
    regions: list[tuple[str, Shape]] = field(default_factory=list)
    families: Mapping[str, str] = field(default_factory=dict)
    """By class."""
    split: str = ""

    def rows(self) -> Iterator[ManifestRow]:
        """One row per class, or one of a normal class; regions of a normal class say nothing about the others."""
        shapes_of: dict[str, list[Shape]] = {label: [] for label in self.labels if not is_normal(label)}
        for label, shape in self.regions:
            if not is_normal(label):
                shapes_of.setdefault(label, []).append(shape)
        normal = [label for label in self.labels if is_normal(label)]
        name = f"{self.label_file}: {self.entry}"
        drawn = [shapes for shapes in shapes_of.values() if shapes]
        doubled = [label for label, shapes in shapes_of.items() if drawn.count(shapes) > 1]
        if doubled or (normal and shapes_of):
            classes = ", ".join(doubled or [*normal, *shapes_of])
            reason = f"the same {'region' if doubled else 'image'} is labelled {classes}; keep one label"
            yield refused(self.path, self.label_file, f"{name}: {reason}", self.product, min(shapes_of))
            return
        if not shapes_of:
            normal += [label for label, _ in self.regions]
            shapes_of[normal[0] if normal else NORMAL] = []
        for label, shapes in shapes_of.items():
            if not shapes and len(shapes_of) > 1:
                reason = f"{name}: labelled {', '.join(shapes_of)}, without a region of {label}; mark where it is"
                yield refused(self.path, self.label_file, reason, self.product, label)
                continue
            drawing = functools.partial(draw, tuple(shapes), name=f"{name}, class {label}", annotated=self.size)
            yield ManifestRow(
                path=self.path,
                product=self.product,
                family=self.families.get(label, ""),
                defect=label,
                is_defect=not is_normal(label),
                draw_mask=drawing if shapes else None,
                label_file=self.label_file,
                split=self.split,
            )


def refused(path: Path, label_file: Path, reason: str, product: str, defect: str = UNKNOWN) -> ManifestRow:
    return ManifestRow(
        path=path,
        product=product,
        defect=defect,
        is_defect=not is_normal(defect),
        label_file=label_file,
        refused=reason,
    )


def is_normal(label: str) -> bool:
    return label.lower() in GOOD


def product_of(root: Path) -> str:
    return root.resolve().name or "product"


def split_named(name: str) -> str:
    """The split that a file, folder or subset is named after ("instances_train2017"), "" where it is none."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def is_official(splits: Iterable[str]) -> bool:
    """Whether a set is split by its names: every part has a split, and there are train and test."""
    found = set(splits)
    return "" not in found and {"train", "test"} <= found


def locate(root: Path, places: Sequence[str]) -> Path:
    """The first of some relative paths that is a file under `root`.

    Raises:
        DataError: none is, or one leads out of `root`.
    """
    paths = [inside(root, place) for place in places]
    try:
        for path in paths:
            if path.is_file():
                return path
    except OSError as error:
        raise DataError(f"{error.strerror}: {places[0][:60]!r}; give the image another name") from error
    looked = ", ".join(dict.fromkeys(str(path.relative_to(root)) for path in paths))
    raise DataError(f"no such image in {root} (looked for {looked}); put it there or delete the entry")


def read_json(path: Path, layout: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: unreadable, too large, not JSON or nested too deeply.
    """
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path} is not a readable JSON file ({reason}); expected {layout}") from error


def is_text(value: object) -> TypeGuard[str]:
    """Whether it can name something: not empty, and no half of a surrogate pair, which JSON can hold."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def text(value: object, what: str) -> str:
    if not is_text(value):
        raise DataError(f"{what} is {_short(value)}, not a text")
    return value


def number(value: object, what: str) -> float:
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{what} is {_short(value)}, not a number")


def numbers(value: object, what: str, count: int | None = None) -> list[float]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise DataError(f"{what} is {_short(value)}, not a list of {count or ''} numbers".replace("  ", " "))
    return [number(item, what) for item in value]


def positions(value: object, what: str) -> tuple[tuple[float, float], ...]:
    """Points from a list of pairs."""
    if not isinstance(value, list):
        raise DataError(f"{what} is {_short(value)}, not a list of points")
    pairs = [numbers(pair, f"a point of {what}", 2) for pair in value]
    return tuple((x, y) for x, y in pairs)


def image_size(height: object, width: object) -> tuple[int, int] | None:
    """(height, width) that an annotation states; None where it states neither."""
    if height is None and width is None:
        return None
    return int(number(height, "the image's height")), int(number(width, "the image's width"))


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
