"""MTD: surface defects of magnetic tiles (Huang, Qiu, Yuan: Surface defect saliency of magnetic tile, 2018).

The images show far fewer tiles than there are files: each tile was photographed under up to six exposures, and some
photographs were stored several times. `tiles` finds them, by two rules united:

a. runs of file names `exp<e>_num_<n>`: sorted by n, the exposure rises and the gap in n stays below `MAX_GAP`. The
   defect classes are sorted together: three tiles carry another label in some of their exposures. The free images are
   sorted by themselves. All images are sorted together once more: some tiles are called free in exposures in which
   their defect does not show (31 photographs in 18 runs; where they show the same place, they correlate from 0.7 up).
b. inside a defect class, normalised cross-correlation of high-passed images over small shifts, best pairs first: merge
   from `SAME_TILE` up, at most one image per exposure in a tile; from `SAME_PHOTO` up it is one photograph stored
   twice, whatever its name says.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.fft
from jaxtyping import Float32, UInt8

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.twins import DisjointSets, Plate, correlation, high_pass
from hypdefect.errors import DataError
from hypdefect.files import data_root
from hypdefect.images import read_image
from hypdefect.images.intensity import Intensity

CLASSES = {name: f"MT_{name.capitalize()}" for name in ("blowhole", "break", "crack", "fray", "uneven", "free")}
NORMAL = "free"

MAX_GAP = 150
SAME_TILE = 0.45
SAME_PHOTO = 0.90
REDUCTION = 4.0
"""Pixels of the file for one pixel of the correlation."""
MAX_SHIFT = 40
"""Largest shift in reduced pixels; the exposures of a tile were cropped separately."""

_NAME = re.compile(r"exp(\d+)_num_(\d+)")


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per photograph; the masks of the free images are all zero and are not read."""
    missing = [folder for folder in CLASSES.values() if not (root / folder / "Imgs").is_dir()]
    if missing:
        raise DataError(
            f"{root} is not an MTD folder: {', '.join(f'{m}/Imgs' for m in missing)} missing; expected {CARD.layout}"
        )
    for defect, folder in CLASSES.items():
        paths = sorted((root / folder / "Imgs").glob("*.jpg"))
        if not paths:
            raise DataError(f"{root / folder / 'Imgs'} holds no *.jpg; expected {CARD.layout}")
        is_defect = defect != NORMAL
        for path in paths:
            yield ManifestRow(
                path=path,
                product="magnetic_tile",
                defect=defect,
                is_defect=is_defect,
                mask_path=path.with_suffix(".png") if is_defect else None,
            )


def tiles(manifest: pa.Table) -> list[str]:
    """The tile each row shows, named after its first photograph, of a defect where there is one."""
    stems = [Path(uri).stem for uri in manifest["uri"].to_pylist()]
    classes: list[str] = manifest["defect"].to_pylist()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, defect in enumerate(classes):
        rows_of[defect].append(row)

    tile = DisjointSets(len(stems))
    defective = [row for row, defect in enumerate(classes) if defect != NORMAL]
    for rows in (defective, rows_of[NORMAL], list(range(len(stems)))):
        for run in name_runs([stems[r] for r in rows]):
            tile.union([rows[i] for i in run])
    for defect in sorted(set(classes) - {NORMAL}):
        rows = rows_of[defect]
        pictures = [_picture(manifest["uri"][r].as_py(), manifest["intensity"][r].as_py()) for r in rows]
        for group in correlation_groups(pictures, [exposure(stems[r]) for r in rows]):
            tile.union([rows[i] for i in group])

    names = [""] * len(stems)
    for rows in tile.groups():
        first = min(rows, key=lambda r: (classes[r] == NORMAL, _number(stems[r]), classes[r], stems[r]))
        for row in rows:
            names[row] = f"{classes[first]}/{stems[first]}"
    return names


def _picture(uri: str, intensity: str) -> UInt8[np.ndarray, "H W"]:
    return read_image(Path(uri), intensity=Intensity.from_json(intensity) if intensity else None)[:, :, 0]


def name_runs(stems: Sequence[str]) -> list[list[int]]:
    """Rule a: positions of the stems that form one run. A stem of another pattern stands alone."""
    runs: list[list[int]] = []
    previous: tuple[int, int] | None = None
    for i in sorted(range(len(stems)), key=lambda i: (_number(stems[i]), stems[i])):
        match = _NAME.fullmatch(stems[i])
        current = (int(match[1]), int(match[2])) if match else None
        if current and previous and current[0] > previous[0] and current[1] - previous[1] < MAX_GAP:
            runs[-1].append(i)
        else:
            runs.append([i])
        previous = current
    return runs


def correlation_groups(
    pictures: Sequence[UInt8[np.ndarray, "_ _"]], exposures: Sequence[int | None]
) -> list[list[int]]:
    """Rule b: positions of the greyscale pictures that show one tile."""
    n = len(pictures)
    first, second = np.triu_indices(n, 1)
    values = correlate(pictures)[first, second]
    order = [int(k) for k in np.argsort(-values, kind="stable") if values[k] >= SAME_TILE]
    sets = DisjointSets(n)
    seen = {i: {e} - {None} for i, e in enumerate(exposures)}
    for k in order:
        a, b = sets.find(int(first[k])), sets.find(int(second[k]))
        if a == b or (seen[a] & seen[b] and values[k] < SAME_PHOTO):
            continue
        sets.union([a, b])
        seen[sets.find(a)] = seen[a] | seen[b]
    return sets.groups()


def correlate(pictures: Sequence[UInt8[np.ndarray, "_ _"]]) -> Float32[np.ndarray, "N N"]:
    """`twins.correlation` of each pair of high-passed pictures, float32 `[N, N]`, 1 on the diagonal."""
    flat = [high_pass(picture, REDUCTION) for picture in pictures]
    result = np.eye(len(flat), dtype=np.float32)
    sizes = [max((x.shape[axis] for x in flat), default=0) + MAX_SHIFT for axis in (0, 1)]
    frame = (scipy.fft.next_fast_len(sizes[0], real=True), scipy.fft.next_fast_len(sizes[1], real=True))
    plates = [Plate.of(x, frame) for x in flat]
    for i, x in enumerate(plates):
        for j in range(i + 1, len(plates)):
            result[i, j] = result[j, i] = correlation(x, plates[j], frame, MAX_SHIFT)
    return result


def exposure(stem: str) -> int | None:
    """The exposure a file name states, None where it states none."""
    match = _NAME.fullmatch(stem)
    return int(match[1]) if match else None


def _number(stem: str) -> int:
    match = _NAME.fullmatch(stem)
    return int(match[2]) if match else -1


CARD = DatasetCard(
    name="mtd",
    title="MTD: magnetic tile surfaces, five defects and free",
    licence="none stated by the authors; cite Huang et al. 2018 and ask them before commercial use",
    source="https://github.com/abin24/Magnetic-tile-defect-datasets. 392 defect images of about 70 tiles and 952 free "
    "ones of about 176. Groups are tiles, found from file names and image correlation. Four masks of uneven are all "
    "zero: the whole image stands for the region.",
    layout="<root>/MT_<Class>/Imgs/*.jpg with a .png mask of the same stem; classes Blowhole, Break, Crack, Fray, "
    "Uneven, Free",
    expected={"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103, "free": 952},
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "mtd",
    group=tiles,
    keep_empty_masks=True,
)
