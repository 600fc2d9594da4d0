"""Images that stand among the normal ones and perhaps should not: they look unlike the others, or show nothing.

Each half of the normal images is scored by a small PatchCore that learned from the other half. An image is suspect
whose score is more than LIMIT robust deviations (1.4826 times the median distance from the median) above the median.
On magnetic tiles with 15 defects hidden among 761 good parts, 5 of the 11 suspects are such defects.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from hypdefect.families.image_files import ImageFile
from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig
from hypdefect.types import Batches

LIMIT = 5.0
SMALL = PatchCoreConfig(bank_size=500, candidates=20_000)
LEAST = 10
"""Fewer images say nothing of what is usual."""
SHOWN = 10
SIDE = 32


@runtime_checkable
class Halves(Protocol):
    """Normal images of which some can be chosen by their positions."""

    @property
    def files(self) -> tuple[ImageFile, ...]: ...

    def select(self, positions: Sequence[int]) -> Batches: ...


def suspects(normals: Halves, first: Sequence[int], second: Sequence[int], dim: int) -> list[int]:
    """Positions of the suspects, the most unlike first; none where there are fewer than LEAST images.

    Args:
        first, second: positions of the halves, of which no part stands on both. dim: numbers of a patch.
    """
    if len(first) + len(second) < LEAST:
        return []
    scores = np.zeros(len(first) + len(second))
    for learned, scored in ((first, second), (second, first)):
        model = PatchCore(SMALL, dim)
        model.fit(normals.select(learned))
        found = [model.anomaly(batch).score.double().numpy() for batch in normals.select(scored)]
        scores[list(scored)] = np.concatenate(found)
    middle = np.median(scores)
    deviation = 1.4826 * np.median(np.abs(scores - middle))
    order = np.argsort(-scores, kind="stable")
    return [int(i) for i in order if scores[i] > middle + LIMIT * deviation]


def constant(normals: Halves) -> list[int]:
    """Positions of the images all of whose pixels are alike."""
    flat = []
    for position, file in enumerate(normals.files):
        pixels = file.read(SIDE).flatten(1)
        if float((pixels.amax(1) - pixels.amin(1)).max()) < 1 / 255:
            flat.append(position)
    return flat


def named(normals: Halves, positions: Sequence[int]) -> str:
    """The files, the first few of many."""
    names = [normals.files[i].uri for i in positions[:SHOWN]]
    more = f" and {len(positions) - SHOWN} more" if len(positions) > SHOWN else ""
    return ", ".join(names) + more
