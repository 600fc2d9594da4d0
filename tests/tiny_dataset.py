"""Small image trees in the layouts of the real sets, for tests: deterministic, each class with a look of its own.

Every "tile" (group) has its own grain and is seen under several exposures; a defect class is a pattern in a marked
region on top of it.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.annotated_trees import ANNOTATED_TREES
from tests.trees import READER_TREES

HEIGHT, WIDTH = 80, 96
MTD_CLASSES = ("Blowhole", "Break", "Crack", "Fray", "Uneven", "Free")
FOLDER_CLASSES = ("dent", "scratch", "stain", "chip", "rust", "burr")


def make_mtd_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`MT_<Class>/Imgs/exp<e>_num_<n>.jpg` and masks: tiles of up to three exposures, at least two tiles a class."""
    per_tile = min(3, -(-per_class // 2))
    number = 1000
    for kind, name in enumerate(MTD_CLASSES):
        folder = root / f"MT_{name}" / "Imgs"
        folder.mkdir(parents=True)
        for i in range(per_class):
            tile, exposure = divmod(i, per_tile)
            number += 1000 if exposure == 0 else 20
            pixels, mask = draw(kind, tile=1000 * seed + 100 * kind + tile, exposure=exposure, defect=name != "Free")
            stem = f"exp{exposure + 1}_num_{number}"
            Image.fromarray(pixels).save(folder / f"{stem}.jpg", quality=95)
            Image.fromarray(mask).save(folder / f"{stem}.png")
    return root


def make_folder_tree(
    root: Path, classes: int = 3, per_class: int = 8, with_masks: bool = True, with_good: bool = True, seed: int = 0
) -> Path:
    """`<class>/<class>_<i>.png`; masks under `masks/` in every second class, beside the images in the others."""
    names = list(FOLDER_CLASSES[:classes]) + ["good"] * with_good
    for kind, name in enumerate(names):
        folder = root / name
        (folder / "masks").mkdir(parents=True)
        for i in range(per_class):
            pixels, mask = draw(kind, tile=5000 + 1000 * seed + 100 * kind + i, exposure=0, defect=name != "good")
            Image.fromarray(pixels).save(folder / f"{name}_{i}.png")
            if with_masks and name != "good":
                place = folder / "masks" / f"{name}_{i}.png" if kind % 2 == 0 else folder / f"{name}_{i}_mask.png"
                Image.fromarray(mask).save(place)
    return root


def make_elpv_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`labels.csv` and `images/*.png`: `per_class` cells of each type x {0, 1}, and one undecided cell a type."""
    (root / "images").mkdir(parents=True)
    lines = []
    for kind, (cell, probability) in enumerate([(c, p) for c in ("mono", "poly") for p in (0.0, 1.0, 1 / 3)]):
        for i in range(per_class if probability in (0.0, 1.0) else 1):
            pixels, _ = draw(kind, tile=9000 + 1000 * seed + 100 * kind + i, exposure=0, defect=probability > 0)
            path = f"images/cell{len(lines) + 1:04d}.png"
            Image.fromarray(pixels).save(root / path)
            lines.append(f"{path}  {probability}    {cell}\n")
    (root / "labels.csv").write_text("".join(lines))
    return root


TREES = {"elpv": make_elpv_tree, "mtd": make_mtd_tree, "folder": make_folder_tree, **READER_TREES, **ANNOTATED_TREES}
"""A builder for each entry of DATASETS."""


def draw(kind: int, tile: int, exposure: int, defect: bool) -> tuple[np.ndarray, np.ndarray]:
    """A greyscale image and its mask (0/255), both uint8."""
    rng = np.random.default_rng([kind, tile])
    coarse = rng.normal(size=(HEIGHT // 8 + 2, WIDTH // 8 + 2)).astype(np.float32)
    picture = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    x = 110 + 22 * np.asarray(picture, dtype=np.float64)

    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    if defect:
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        cy, cx = rng.uniform(0.35, 0.65) * HEIGHT, rng.uniform(0.35, 0.65) * WIDTH
        ry, rx = 14 + 4 * (kind % 3), 14 + 4 * (kind // 2 % 3)
        mask = ((rows - cy) / ry) ** 2 + ((columns - cx) / rx) ** 2 < 1
        angle, period = kind * np.pi / 6, 5 + 2 * (kind % 3)
        wave = np.sin(2 * np.pi * (rows * np.cos(angle) + columns * np.sin(angle)) / period)
        x = np.where(mask, x + 45 * wave + 20 * (-1) ** kind, x)

    noise = np.random.default_rng([kind, tile, exposure]).normal(scale=2, size=x.shape)
    x = (0.8 + 0.15 * exposure) * x + noise
    return np.clip(x, 0, 255).round().astype(np.uint8), mask.astype(np.uint8) * 255
