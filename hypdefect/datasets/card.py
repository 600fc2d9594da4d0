"""What a reader of an image set gives: a card, and rows as they are found."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from hypdefect.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """One image of one class as a scanner finds it, before anything is read.

    A file that shows several classes is several rows, each with the mask of its class.
    """

    path: Path
    product: str
    defect: str
    is_defect: bool
    family: str = ""
    """The defect's family; "" where the set has no such level."""
    mask_path: Path | None = None
    """A mask file: above 127 is marked."""
    draw_mask: Callable[[int, int], Bool[np.ndarray, "H W"]] | None = None
    """Instead of a mask file: the mask of an image of (height, width), or DataError. Ingestion stores it as a file."""
    label_file: Path | None = None
    """The annotation this row was read from: when it changes, the set is read again."""
    split: str = ""
    group: str | None = None
    refused: str = ""
    """Why the annotation of this image cannot be used; such a row goes straight to the quarantine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCard:
    """What is known of a data set, and how to read it."""

    name: str
    title: str
    licence: str
    source: str
    layout: str
    expected: dict[str, int]
    """Images in the published set, by product, class or product/class; empty where there is no such thing."""
    good_is_class: bool
    """Whether normal images form few-shot classes of their own."""
    scan: Callable[[Path], Iterable[ManifestRow]]
    default_root: Callable[[], Path | None]
    group: Callable[[pa.Table], list[str]] | None = None
    """Group id of each row, where it must be computed from the images read."""
    always_audit: bool = False
    """Look for near-duplicates whenever the set is read: no honest split exists without."""
    keep_empty_masks: bool = False
    """Keep a defect image whose mask is all zero, with the whole image as its region, instead of quarantining it."""

    def place(self) -> str:
        """Where the set is looked for."""
        root = self.default_root()
        return "pass --root" if root is None else f"{root}{'' if root.is_dir() else ' (not there)'}"

    def about(self) -> dict[str, str]:
        """What is known of the set, a line each."""
        if self.always_audit:
            groups = "near-duplicates, found whenever the set is read"
        else:
            groups = "found from the images" if self.group is not None else "as the set names them; --audit finds more"
        return {
            "title": self.title,
            "licence": self.licence,
            "source": self.source,
            "layout": self.layout,
            "default root": self.place(),
            "expected": ", ".join(f"{name} {n}" for name, n in self.expected.items()) or "whatever is there",
            "normal images": f"{'' if self.good_is_class else 'not '}classes of the few-shot task",
            "groups": groups,
        }


def inside(root: Path, relative: str) -> Path:
    """A path that an annotation or archive names, resolved under `root`.

    Raises:
        DataError: it is empty, absolute or leads out of `root`, by `..` or by a link.
    """
    path = PurePosixPath(relative.replace("\\", "/"))
    drive = re.match(r"[A-Za-z]:", relative)
    if not relative or "\0" in relative or path.is_absolute() or drive or ".." in path.parts:
        raise DataError(f"{relative!r} does not name a file under {root}: paths are relative and without '..'")
    full = root.joinpath(path)
    if not full.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{relative!r} leads out of {root} by a link: copy the file into the folder")
    return full
