"""Near-duplicate images of a set: copies, turned or mirrored ones, and several shots of one part.

1. `flatten` leaves the grain of a picture: reduced, high-passed, without straight lines along the sides, and without
   what it shares with many pictures of its size in the same place (the busbars of a cell, the outline of a part).
2. `candidates` compares fingerprints, the speckle of the amplitude spectrum. A shift leaves it as it is and a turned
   picture turns it, so four versions of it cover the eight symmetries of the square. One matrix product does it.
3. `find_pairs` confirms a candidate by normalised cross-correlation over small shifts: from `SAME` up, or from
   `SAME_UPRIGHT` up where nothing is turned. What lies a little below is doubtful, and is reported as such.
4. `twin_groups` unites pairs, the best first. Below `SURE`, two groups join only where at least half of the pairs
   between them are twins: one weak link never chains two parts.

What this does not see: shots from another side or at another scale, shots that overlap by less than half, pictures
without grain, and parts that differ in nothing but their number.

Thresholds were set by eye, on two dozen pairs drawn near them from each set. Pairs drawn at random correlate by 0.29 at
most in all four sets.

- Solar cells (elpv): from 0.60 up, all polycrystalline pairs show one crystal: neighbouring wafers of one ingot, often
  built in upside down. The few monocrystalline ones show the same finger gaps: one printing screen.
- Steel (NEU-Seg): mirrored pairs, of which the set has none, end at 0.4. From 0.4 to 0.5 lie composites that share half
  a picture; from 0.55 up those that share most of it, and other shots of one place; from 0.85 up turned copies.
- Tiles (MTD): all pairs from 0.30 up are true, also those that the card's rules keep apart (free and defective shots of
  one tile, and shots whose numbers are far apart).
- Upright pairs from 0.45 to 0.52, ten drawn from solar cells and ten from steel: all show one crystal, one printing
  screen or one place.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.fft
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from hypdefect.images import read_image
from hypdefect.images.intensity import Intensity

SAME = 0.60
"""Correlation from which two pictures are twins, one of them turned or mirrored."""
SAME_UPRIGHT = 0.45
"""The same for two upright pictures: other shots of a part, under another light."""
DOUBTFUL = 0.30
"""Correlation from which a pair that is no twin is reported as doubtful; unlike pictures stay below."""
SURE = 0.80
"""Correlation from which a single pair of twins joins two groups."""
COPY = 0.95
"""Correlation from which an upright twin is called a copy and not another shot."""
MAX_SHIFT = 16
"""Largest shift in reduced pixels. With more, two cracks that cross at one angle pass for one part."""
MIN_OVERLAP = 0.5
"""Smallest overlap of a shifted pair, as a part of the smaller picture."""
SIDE = 100
"""Reduced pixels of the longer side of the middle picture of a set."""
NEIGHBOURS = 12
"""Candidates of a picture."""
MIN_LIKENESS = 0.2
"""Cosine between fingerprints from which a pair is a candidate; unlike pictures rarely pass 0.15, twins rarely miss."""
BACKGROUND = 50
"""Pictures that the shared background is averaged over; a quarter of those of one size where they are few."""
MIN_BACKGROUND = 8
"""Fewer make no background: a twin among them would be taken off instead."""
FRAME = 128
"""Side of the square that spectra are taken on; larger pictures are cut to their middle."""
BAND = 40
"""Highest frequency of a fingerprint, in cycles a frame."""

SYMMETRIES = tuple(f"{mirror}{angle}°" for mirror in ("", "mirrored ") for angle in (0, 90, 180, 270))
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Twin:
    """Two positions; turning the second picture by `SYMMETRIES[symmetry]` gives the first."""

    first: int
    second: int
    symmetry: int
    correlation: float

    @property
    def accepted(self) -> bool:
        """Whether the pair counts as twins; else it is doubtful."""
        return self.correlation >= (SAME if self.symmetry else SAME_UPRIGHT)

    @property
    def kind(self) -> str:
        if self.symmetry >= 4:
            return "mirrored"
        if self.symmetry:
            return "rotated"
        return "copy" if self.correlation >= COPY else "shot"


def turn(picture: Shaped[np.ndarray, "*B h w"], symmetry: int) -> Shaped[np.ndarray, "*B h2 w2"]:
    """One of the eight symmetries of the square: quarter turns counter-clockwise, then from 4 on a mirror."""
    picture = np.rot90(picture, symmetry % 4, axes=(-2, -1))
    return picture[..., ::-1] if symmetry >= 4 else picture


# --- an image set ----------------------------------------------------------------------------------------------------


def find_manifest_pairs(manifest: pa.Table, progress: Advance | None = None) -> tuple[Twin, ...]:
    """Twins and doubtful pairs among the files of a manifest, by the first row of each file."""
    rows = list({file: row for row, file in reversed(list(enumerate(manifest["file_id"].to_pylist())))}.values())[::-1]
    records = manifest.take(rows).select(["uri", "height", "width", "intensity"]).to_pylist()
    reduction = max(1.0, float(np.median([max(r["height"], r["width"]) for r in records])) / SIDE)
    steps = 2 * len(rows)
    pictures = []
    for done, record in enumerate(records, start=1):
        intensity = Intensity.from_json(record["intensity"]) if record["intensity"] else None
        rgb = read_image(Path(record["uri"]), intensity=intensity)
        pictures.append(high_pass(np.asarray(Image.fromarray(rgb).convert("L")), reduction))
        if progress is not None:
            progress(done, steps)
    found = find_pairs(pictures, progress and (lambda done, _: progress(len(rows) + done, steps)))
    return tuple(Twin(rows[t.first], rows[t.second], t.symmetry, t.correlation) for t in found)


def unite(manifest: pa.Table, twins: Sequence[Twin]) -> list[str]:
    """Group id of each row: its group in the manifest, its twins and the other rows of its file made one.

    Every row gets a group id, one without twins its own. It is the first of the manifest's where there is one, and is
    otherwise named after the file with the smallest hash.
    """
    known: list[str] = manifest["group_id"].to_pylist()
    files: list[str] = manifest["file_id"].to_pylist()
    sets = DisjointSets(manifest.num_rows)
    for labels in (known, files):
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, label in enumerate(labels):
            rows_of[label].append(row)
        for label, rows in rows_of.items():
            if label:
                sets.union(rows)
    for group in twin_groups(twins):
        sets.union(group)
    names = [""] * manifest.num_rows
    for rows in sets.groups():
        labels = sorted({known[row] for row in rows} - {""})
        name = labels[0] if labels else f"twins/{min(files[row] for row in rows)[:16]}"
        for row in rows:
            names[row] = name
    return names


# --- pictures --------------------------------------------------------------------------------------------------------


def find_twins(pictures: Sequence[Float32[np.ndarray, "_ _"]], progress: Advance | None = None) -> list[Twin]:
    """`find_pairs` without the doubtful ones."""
    return [pair for pair in find_pairs(pictures, progress) if pair.accepted]


def find_pairs(pictures: Sequence[Float32[np.ndarray, "_ _"]], progress: Advance | None = None) -> list[Twin]:
    """Twins and doubtful pairs among pictures that went through `high_pass` with one reduction; of any sizes."""
    if len(pictures) < 2:
        return []
    flat = flatten(pictures)
    partners: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, second, version in candidates(np.stack([fingerprint(x) for x in flat])):
        partners[first].append((second, version))
    longest = max(max(x.shape) for x in flat) + MAX_SHIFT
    frame = (scipy.fft.next_fast_len(longest, real=True),) * 2
    best: dict[tuple[int, int], Twin] = {}
    for first in range(len(flat)):
        x = Plate.of(flat[first], frame) if partners[first] else None
        for second, version in partners[first]:
            assert x is not None
            for symmetry in (version, version ^ 2):  # a half turn does not show in the fingerprint
                y = Plate.of(turn(flat[second], symmetry), frame)
                twin = Twin(first, second, symmetry, correlation(x, y, frame, MAX_SHIFT))
                pair = first, second
                if twin.correlation >= DOUBTFUL and (pair not in best or best[pair].correlation < twin.correlation):
                    best[pair] = twin
        if progress is not None:
            progress(first + 1, len(flat))
    return [best[pair] for pair in sorted(best)]


def twin_groups(twins: Sequence[Twin]) -> list[list[int]]:
    """Positions that belong together, each group sorted; those without twins are in none. Doubtful pairs unite none."""
    twins = [twin for twin in twins if twin.accepted]
    partners: dict[int, set[int]] = defaultdict(set)
    for twin in twins:
        partners[twin.first].add(twin.second)
        partners[twin.second].add(twin.first)
    members: dict[int, list[int]] = {i: [i] for i in partners}
    group_of = {i: i for i in members}
    for twin in sorted(twins, key=lambda t: (-t.correlation, t.first, t.second)):
        a, b = sorted((group_of[twin.first], group_of[twin.second]))
        if a == b:
            continue
        few, many = sorted((a, b), key=lambda group: len(members[group]))
        between = sum(group_of[j] == many for i in members[few] for j in partners[i])
        if twin.correlation >= SURE or 2 * between >= len(members[a]) * len(members[b]):
            for i in members[b]:
                group_of[i] = a
            members[a] += members.pop(b)
    return sorted(sorted(group) for group in members.values() if len(group) > 1)


def high_pass(picture: UInt8[np.ndarray, "H W"], reduction: float) -> Float32[np.ndarray, "h w"]:
    """Reduced, without slow shading and with even local contrast: what is left is the grain of the surface.

    Args:
        reduction: pixels of the picture for one pixel of the result.
    """
    height, width = picture.shape
    size = (max(1, round(width / reduction)), max(1, round(height / reduction)))
    x = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX), dtype=np.float32)
    x = x - gaussian_filter(x, 3, mode="reflect")
    x = x / (np.sqrt(gaussian_filter(x * x, 4, mode="reflect")) + 0.5 * x.std() + 1e-3)
    return np.clip(x / (x.std() + 1e-6), -3, 3)


def flatten(pictures: Sequence[Float32[np.ndarray, "_ _"]]) -> list[Float32[np.ndarray, "_ _"]]:
    """Take straight lines off each picture, and then the mean of the pictures of its size that are most like it."""
    flat = [x - x.mean(0) - x.mean(1, keepdims=True) + x.mean() for x in pictures]
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, x in enumerate(flat):
        rows_of[x.shape].append(i)
    for shape, rows in rows_of.items():
        num = min(BACKGROUND, len(rows) // 4)
        if num < MIN_BACKGROUND:
            continue
        all_ND = np.stack([flat[i] for i in rows]).reshape(len(rows), -1)
        blurred = [gaussian_filter(flat[i], 1)[::2, ::2].ravel() for i in rows]
        unit_ND = _unit(np.stack(blurred))
        for start in range(0, len(rows), 512):
            like = unit_ND[start : start + 512] @ unit_ND.T
            like[np.arange(len(like)), start + np.arange(len(like))] = -2
            for own, near in enumerate(np.argpartition(-like, num, axis=1)[:, :num], start=start):
                x_D, mean_D = all_ND[own], all_ND[near].mean(0)
                share = np.clip(x_D @ mean_D / (mean_D @ mean_D + 1e-9), 0, 1)  # above 1 would take off a twin
                flat[rows[own]] = (x_D - share * mean_D).reshape(shape)
    return flat


def fingerprint(flat: Float32[np.ndarray, "_ _"]) -> Float32[np.ndarray, "f f"]:
    """The logarithm of the amplitude spectrum less its own local mean, low frequencies in the middle."""
    top, left = (max(0, (n - FRAME) // 2) for n in flat.shape)
    part = flat[top : top + FRAME, left : left + FRAME]
    window = np.outer(*(np.hanning(n + 2)[1:-1].astype(np.float32) for n in part.shape))
    spectrum = np.abs(scipy.fft.fft2(part * window, (FRAME, FRAME)))
    log = scipy.fft.fftshift(np.log(spectrum + 0.1 * spectrum.mean() + 1e-6))
    speckle = gaussian_filter(log - gaussian_filter(log, 4, mode="wrap"), 0.7, mode="wrap")
    band = slice(FRAME // 2 - BAND, FRAME // 2 + BAND + 1)
    return speckle[band, band]


def candidates(fingerprints: Float32[np.ndarray, "n f f"]) -> list[tuple[int, int, int]]:
    """(i, j, symmetry 0, 1, 4 or 5) with i < j: turned so, or by a half turn more, j may be like i."""
    n = len(fingerprints)
    versions = (0, 1, 4, 5)

    def rows(symmetry: int) -> np.ndarray:
        half = turn(fingerprints, symmetry)[:, : BAND + 1].reshape(n, -1)  # the other half mirrors it
        return _unit(half)

    all_VD = np.concatenate([rows(symmetry) for symmetry in versions])
    found = set()
    for start in range(0, n, 256):
        like = all_VD[start : min(start + 256, n)] @ all_VD.T
        for version in range(len(versions)):
            like[np.arange(len(like)), version * n + start + np.arange(len(like))] = -1
        num = min(NEIGHBOURS, like.shape[1] - 1)
        near = np.argpartition(-like, num, axis=1)[:, :num]
        own, rank = np.nonzero(np.take_along_axis(like, near, axis=1) >= MIN_LIKENESS)
        for i, column in zip((start + own).tolist(), near[own, rank].tolist(), strict=True):
            version, j = divmod(column, n)
            found.add((min(i, j), max(i, j), versions[version]))  # each undoes itself, but for a half turn
    return sorted(found)


def _unit(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)


# --- correlation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plate:
    """What the correlation of a picture with others needs of it: size, spectrum and summed squares."""

    shape: tuple[int, ...]
    spectrum: np.ndarray
    energy: np.ndarray

    @classmethod
    def of(cls, flat: Float32[np.ndarray, "_ _"], frame: tuple[int, int]) -> "Plate":
        energy = np.pad((flat.astype(np.float64) ** 2).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        return cls(flat.shape, scipy.fft.rfft2(flat, frame), energy)


def correlation(x: Plate, y: Plate, frame: tuple[int, int], max_shift: int) -> float:
    """Highest normalised cross-correlation of two pictures over all shifts up to `max_shift` that overlap enough.

    For a shift s, with sums over the overlap of x and the shifted y:
    `ncc(s) = sum_t x(t + s) y(t) / sqrt(sum_t x(t + s)^2 sum_t y(t)^2)`.
    The numerator comes from one FFT per picture, the energies from summed-area tables.
    """
    sy, y_low, y_high = _overlap(x.shape[0], y.shape[0], max_shift)
    sx, x_low, x_high = _overlap(x.shape[1], y.shape[1], max_shift)
    product = scipy.fft.irfft2(x.spectrum * y.spectrum.conj(), frame)[np.ix_(sy, sx)]
    of_x = _box_sums(x.energy, y_low, y_high, x_low, x_high)
    of_y = _box_sums(y.energy, y_low - sy, y_high - sy, x_low - sx, x_high - sx)
    ncc = product / np.sqrt(np.maximum(of_x * of_y, 1e-9))
    area = np.outer(y_high - y_low, x_high - x_low)
    ncc[area < MIN_OVERLAP * min(np.prod(x.shape), np.prod(y.shape))] = -1
    return float(ncc.max())


def _overlap(n: int, m: int, max_shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Allowed shifts of a length m along a length n, and the overlap `[low, high)` of each."""
    shifts = np.arange(-min(max_shift, m - 1), min(max_shift, n - 1) + 1)
    return shifts, np.maximum(0, shifts), np.minimum(n, m + shifts)


def _box_sums(table: np.ndarray, y0: np.ndarray, y1: np.ndarray, x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    return table[np.ix_(y1, x1)] - table[np.ix_(y0, x1)] - table[np.ix_(y1, x0)] + table[np.ix_(y0, x0)]


class DisjointSets:
    """Union-find over 0..n-1; the smallest member stands for its set."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def union(self, members: Sequence[int]) -> None:
        roots = {self.find(i) for i in members}
        for root in roots:
            self._parent[root] = min(roots)

    def groups(self) -> list[list[int]]:
        """The sets, each sorted, by their smallest member."""
        members: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self._parent)):
            members[self.find(i)].append(i)
        return list(members.values())
