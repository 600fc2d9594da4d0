"""Normal images that should not be among them are named."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hypdefect.errors import ConfigError
from hypdefect.families.image_files import ImageFile
from hypdefect.families.suspects import SHOWN, constant, named, suspects
from hypdefect.files import file_sha256
from hypdefect.methods.normal_patches import sample_patches
from hypdefect.types import Batch
from tests.methods.test_detectors import DIM, images


@dataclass(frozen=True)
class Normals:
    batch: Batch
    files: tuple[ImageFile, ...] = ()

    def select(self, positions: Any) -> list[Batch]:
        return [self.batch.select(torch.tensor(positions))]


def test_images_unlike_the_others_are_named_the_most_unlike_first() -> None:
    normals = Normals(images(40, 0, odd=3))
    found = suspects(normals, range(0, 40, 2), range(1, 40, 2), DIM)
    assert set(found) == {37, 38, 39}
    clean = Normals(images(40, 0))
    assert suspects(clean, range(0, 40, 2), range(1, 40, 2), DIM) == []
    assert suspects(Normals(images(8, 0, odd=1)), range(4), range(4, 8), DIM) == []


def test_images_of_one_colour_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(SHOWN + 3):
        pixels = np.full((40, 40, 3), 7 * i, np.uint8) if i else rng.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    files = tuple(ImageFile(str(path), file_sha256(path)) for path in sorted(tmp_path.glob("*.png")))
    normals = Normals(images(1, 0), files)
    assert constant(normals) == list(range(1, SHOWN + 3))
    text = named(normals, constant(normals))
    assert "01.png" in text
    assert text.endswith("and 2 more")


def test_patches_that_do_not_fit_are_refused_before_they_are_read() -> None:
    class Many:
        def __iter__(self) -> Any:
            yield images(2, 0)
            raise AssertionError("the second slice was read")

        def __len__(self) -> int:
            return 10**9

    with pytest.raises(ConfigError, match=r"patches of 1000000000 images take .* GiB .* set method.candidates"):
        sample_patches(Many(), 0, seed=0)
    few = [replace(images(2, 0), views={"patch": torch.zeros(2, 2, 2, DIM)})]
    assert sample_patches(few, 0, seed=0)[1] == 8
