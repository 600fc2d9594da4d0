"""What an audit for near-duplicates found, counted and drawn."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from hypdefect.datasets.twins import SYMMETRIES, Twin, turn
from hypdefect.images import read_image
from hypdefect.images.intensity import Intensity

SHOWN_PAIRS = 6
"""Strongest, weakest and doubtful pairs in the picture, each."""


def twin_summary(manifest: pa.Table, twins: Iterable[Twin]) -> dict[str, object]:
    """What the groups of an audited manifest are, and what they mean for a split."""
    members: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in manifest.select(["group_id", "file_id", "defect", "split"]).to_pylist():
        members[row["group_id"]].append(row)
    files = {group: {row["file_id"] for row in rows} for group, rows in members.items()}
    several = [group for group in members if len(files[group]) > 1]
    torn = [group for group in several if {"train", "test"} <= {row["split"] for row in members[group]}]
    tests = {row["file_id"] for rows in members.values() for row in rows if row["split"] == "test"}
    leaked = tests & {file for group in torn for file in files[group]}
    grouped: dict[str, set[str]] = defaultdict(set)
    for group in several:
        for row in members[group]:
            grouped[row["defect"]].add(row["file_id"])
    return {
        "groups": len(several),
        "images in groups": sum(len(files[group]) for group in several),
        "images alone": len(members) - len(several),
        "largest group": max((len(files[group]) for group in several), default=0),
        "groups of several classes": sum(len({row["defect"] for row in members[group]}) > 1 for group in several),
        **({"groups in train and test": len(torn), "test images with a twin in train": len(leaked)} if tests else {}),
        "pairs": dict(sorted(Counter(twin.kind for twin in twins if twin.accepted).items())),
        "doubtful pairs": sum(not twin.accepted for twin in twins),
        "images in groups by class": {name: len(ids) for name, ids in sorted(grouped.items())},
    }


def draw_twins(manifest: pa.Table, twins: tuple[Twin, ...], path: Path) -> None:
    """The strongest and weakest twins and the strongest doubtful pairs, the second picture turned upon the first."""
    ordered = sorted((twin for twin in twins if twin.accepted), key=lambda twin: -twin.correlation)
    doubtful = sorted((twin for twin in twins if not twin.accepted), key=lambda twin: -twin.correlation)
    weakest = ordered[max(SHOWN_PAIRS, len(ordered) - SHOWN_PAIRS) :]
    figure = Figure(figsize=(4.4 * SHOWN_PAIRS, 8.4), layout="constrained")
    axes = figure.subplots(3, 2 * SHOWN_PAIRS)
    for panel in axes.flat:
        panel.axis("off")
    for line, pairs in zip(axes, (ordered[:SHOWN_PAIRS], weakest, doubtful[:SHOWN_PAIRS]), strict=True):
        for i, twin in enumerate(pairs):
            kind = twin.kind if twin.accepted else "doubtful"
            for panel, row, symmetry in (
                (line[2 * i], twin.first, 0),
                (line[2 * i + 1], twin.second, twin.symmetry),
            ):
                panel.imshow(turn(_pixels(manifest, row).transpose(2, 0, 1), symmetry).transpose(1, 2, 0))
                panel.set_title(f"{manifest['defect'][row].as_py()}\n{Path(manifest['uri'][row].as_py()).stem}", size=8)
            line[2 * i].text(
                0, -0.05, f"{kind} {SYMMETRIES[twin.symmetry]}, {twin.correlation:.2f}", size=9, va="top",
                transform=line[2 * i].transAxes,
            )  # fmt: skip
    figure.savefig(path, dpi=80)


def _pixels(manifest: pa.Table, row: int) -> np.ndarray:
    text = manifest["intensity"][row].as_py()
    return read_image(Path(manifest["uri"][row].as_py()), intensity=Intensity.from_json(text) if text else None)
