"""Pseudo-defects: they follow their law, change nothing outside their region, and depend on nothing but the seed."""

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypdefect.config import from_mapping
from hypdefect.distributed.synthesize import GENERATORS, _make
from hypdefect.errors import ConfigError
from hypdefect.images import read_image
from hypdefect.images.marks import marked
from hypdefect.images.pseudo_defects import (
    ELONGATIONS,
    MIN_PIXELS,
    SIZES,
    STRATA,
    Law,
    SynthesisConfig,
    draw_laws,
    draw_region,
    load_textures,
    pseudo_defect,
)

TEXTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def part(height: int = 120, width: int = 150, grey: bool = True) -> np.ndarray:
    noise = np.random.default_rng(1).integers(100, 140, (height, width, 1 if grey else 3), dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(noise, (height, width, 3)))


def law(coverage: float = 0.03, stretch: float = 1.5, at_border: bool = False) -> Law:
    return Law(name="test", coverage=coverage, stretch=stretch, at_border=at_border)


def regions(own: Law, count: int = 20, size: tuple[int, int] = (160, 200)) -> list[np.ndarray]:
    found = [draw_region(size, own, np.random.default_rng(i)) for i in range(count)]
    return [region for region in found if region is not None]


def elongation(region: np.ndarray) -> float:
    values = np.linalg.eigvalsh(np.cov(np.stack(np.nonzero(region))))
    return float(np.sqrt(values[1] / max(values[0], 1e-9)))


def touches(region: np.ndarray) -> bool:
    return bool(region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any())


def test_there_is_one_law_of_each_stratum_and_the_seed_decides_it() -> None:
    laws = draw_laws(0)
    assert len(laws) == len(STRATA) == 10
    assert len({own.name for own in laws}) == 10
    for own, (size, shape, border) in zip(laws, STRATA, strict=True):
        assert SIZES[size][0] <= own.coverage <= SIZES[size][1]
        assert ELONGATIONS[shape][0] <= own.stretch <= ELONGATIONS[shape][1]
        assert own.at_border == border
    assert draw_laws(0) == laws != draw_laws(1)


def test_a_region_covers_at_most_what_its_law_says_and_larger_laws_give_larger_ones() -> None:
    medians = []
    for coverage in (0.003, 0.03, 0.2):
        shares = [float(region.mean()) for region in regions(law(coverage))]
        assert max(shares) <= coverage * 1.8  # images of a class differ
        assert len(set(shares)) > 5
        medians.append(np.median(shares))
    assert medians == sorted(medians)
    assert medians[2] > 20 * medians[0]


def test_long_laws_give_long_regions() -> None:
    long, compact = (np.median([elongation(r) for r in regions(law(0.02, s))]) for s in (12.0, 1.0))
    assert long > 2 * compact


def test_regions_at_the_border_mostly_touch_it() -> None:
    """A piece that touches it is preferred; not every noise has one."""
    at_border, anywhere = (np.mean([touches(r) for r in regions(law(0.01, at_border=b))]) for b in (True, False))
    assert at_border > 0.75
    assert anywhere < 0.5


def test_a_region_keeps_to_where_it_is_allowed() -> None:
    allowed = np.zeros((80, 90), dtype=bool)
    allowed[20:60, 10:50] = True
    for i in range(10):
        region = draw_region((80, 90), law(0.02), np.random.default_rng(i), allowed)
        assert region is not None
        assert not (region & ~allowed).any()
    assert draw_region((80, 90), law(), np.random.default_rng(0), np.zeros((80, 90), dtype=bool)) is None
    tight = np.zeros((80, 90), dtype=bool)
    tight[:2, :4] = True  # fewer than MIN_PIXELS
    assert draw_region((80, 90), law(), np.random.default_rng(0), tight) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(12, 90), st.integers(12, 90), st.booleans(), st.integers(0, 99))
def test_only_the_region_changes_and_grey_stays_grey(
    number: int, height: int, width: int, grey: bool, seed: int
) -> None:
    image = part(height, width, grey)
    before = image.copy()
    made = pseudo_defect(image, draw_laws(0)[number], TEXTURE, np.random.default_rng(seed))
    assert np.array_equal(image, before)
    if made is None:
        return
    painted, region = made
    assert painted.shape == image.shape
    assert region.sum() >= MIN_PIXELS
    assert np.array_equal(painted[~region], image[~region])
    assert (painted[region] != image[region]).any()
    assert not grey or (painted == painted[..., :1]).all()
    again = pseudo_defect(image, draw_laws(0)[number], TEXTURE, np.random.default_rng(seed))
    assert again is not None
    assert np.array_equal(again[0], painted)


def test_textures_come_from_a_folder_or_with_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path))  # no dtd there
    named, photographs = load_textures(SynthesisConfig(textures=7))
    assert len(photographs) == 7
    assert len({picture.tobytes() for picture in photographs}) == 7
    for i in range(5):
        (tmp_path / "own" / "sub").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), 40 * i, dtype=np.uint8)).save(tmp_path / "own" / "sub" / f"{i}.png")
    config = SynthesisConfig(textures=3, texture_folder=tmp_path / "own")
    other, pictures = load_textures(config)
    assert [int(picture[0, 0, 0]) for picture in pictures] == [0, 40, 120]
    assert named != other == load_textures(config)[0]
    with pytest.raises(ConfigError, match=r"5 pictures below .*, but synthesis.textures=9"):
        load_textures(SynthesisConfig(textures=9, texture_folder=tmp_path / "own"))


@pytest.mark.parametrize("values", [{"textures": 0}, {"per_class": 1}])
def test_settings_that_give_no_classes_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        SynthesisConfig(**values)


def test_a_set_is_painted_by_the_generator_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(part()).save(tmp_path / "part.png")
    row = {"image_id": "part", "uri": str(tmp_path / "part.png"), "intensity": "", "is_defect": False, "dataset": "own"}
    assert set(GENERATORS) == set(get_args(get_type_hints(SynthesisConfig)["kind"]))
    painted = []
    for kind, (shapes, paint) in GENERATORS.items():
        config = from_mapping(SynthesisConfig, {"kind": kind})
        for shape in shapes(0)[:2]:
            (made,) = _make(TEXTURE, shape, 7, [row], config, str(tmp_path), "own")
            expected = paint(part(), shape, TEXTURE, np.random.default_rng([0, 2, 7, 0]), None)
            assert expected is not None
            assert np.array_equal(read_image(Path(made["uri"])), expected[0])
            assert made["family"] == shape.name
            painted.append(made["image_id"])
    assert GENERATORS["marks"][1] is marked
    assert GENERATORS["textures"][1] is pseudo_defect
    assert len(set(painted)) == len(painted) == 8
