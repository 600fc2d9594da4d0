"""Hand-made features to import: histograms of 200 solar cells a class, four views, three parts of 64 numbers.

python docs/histograms.py hist_elpv.npz && python jobs/extract.py --import hist_elpv.npz --name hist_elpv
"""

import sys
from itertools import groupby, product

import numpy as np
from PIL import Image
from scipy.ndimage import sobel

from hypdefect.datasets.readers.elpv import default_root, scan

RING = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]


def describe(image: np.ndarray) -> np.ndarray:
    """`[3, 64]`: grey values and gradient directions in 4 x 4 cells of 4 bins, local binary patterns in 64."""
    dx, dy = sobel(image, 1), sobel(image, 0)
    length, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    grey, directions = [], []
    for rows, columns in product(*(np.array_split(np.arange(n), 4) for n in image.shape)):
        cell = np.ix_(rows, columns)
        grey.append(np.histogram(image[cell], 4, (0, 1))[0] / image[cell].size)
        directions.append(np.histogram(angle[cell], 4, (0, np.pi), weights=length[cell])[0] / (length.sum() + 1e-9))
    inner = image[1:-1, 1:-1]
    code = np.zeros(inner.shape, dtype=int)
    for bit, shift in enumerate(RING):
        code |= (np.roll(image, shift, (0, 1))[1:-1, 1:-1] > inner).astype(int) << bit
    return np.stack([np.concatenate(grey), np.concatenate(directions), np.histogram(code, 64, (0, 256))[0] / code.size])


def main(out: str) -> None:
    root = default_root()
    assert root is not None, "elpv-dataset is not installed"
    rng, features, labels, ids = np.random.default_rng(0), [], [], []
    for name, cells in groupby(sorted(scan(root), key=lambda row: (row.defect, row.path)), key=lambda row: row.defect):
        own = list(cells)
        for i in sorted(rng.choice(len(own), 200, replace=False)):
            grey = np.asarray(Image.open(own[i].path).convert("L"), dtype=float) / 255
            views = (grey, np.rot90(grey), np.rot90(grey, 2), grey[:, ::-1])
            features.append([describe(view) for view in views])
            labels.append(name)
            ids.append(own[i].path.name)
    np.savez(out, features=np.asarray(features, dtype=np.float32), labels=np.asarray(labels), ids=np.asarray(ids))


if __name__ == "__main__":
    main(sys.argv[1])
