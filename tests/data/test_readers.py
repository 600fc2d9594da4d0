"""The readers of published image sets: made-up trees in their layouts, then the real NEU-Seg and DTD where they are."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypdefect.datasets import get_dataset
from hypdefect.datasets.card import ManifestRow
from hypdefect.datasets.ingest import IngestResult, ingest, ingested
from hypdefect.datasets.readers import visa as visa_module
from hypdefect.errors import DataError
from hypdefect.images import read_mask
from tests.trees import (
    HEIGHT,
    READER_TREES,
    WIDTH,
    indices,
    marked,
    photo,
    rectangle,
    save,
    save_csv,
)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Ingest a set from a root, masks to a folder of this test."""
    return lambda name, root: ingest(name, root, mask_folder=tmp_path / "masks")


def listed(result: IngestResult, *columns: str) -> Counter[tuple[str, ...]]:
    return Counter(tuple(row[column] for column in columns) for row in result.manifest.to_pylist())


def mask_of(row: dict[str, Any]) -> np.ndarray:
    return read_mask(Path(row["mask_uri"]), (HEIGHT, WIDTH))[0]


def one(result: IngestResult, defect: str, end: str) -> dict[str, Any]:
    """The row of a class whose path ends so."""
    rows = [row for row in result.manifest.to_pylist() if row["defect"] == defect and row["uri"].endswith(end)]
    assert len(rows) == 1
    return rows[0]


def refusals(result: IngestResult) -> list[str]:
    return result.quarantine["reason"].to_pylist()


# --- what all have in common


@pytest.mark.parametrize("name", READER_TREES)
def test_wrong_layout_names_the_right_one(name: str, tmp_path: Path) -> None:
    card = get_dataset(name)
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match=r"missing|no ") as error:
        list(card.scan(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert str(error.value).endswith(f"expected {card.layout}")


@pytest.mark.parametrize("name", READER_TREES)
def test_counts_are_of_products_or_classes(name: str, tmp_path: Path) -> None:
    card = get_dataset(name)
    rows = list(card.scan(READER_TREES[name](tmp_path / "tree")))
    assert {row.product for row in rows} <= set(card.expected) or {row.defect for row in rows} <= set(card.expected)
    assert not any(row.refused for row in rows)


# --- MVTec AD and MVTec 3D-AD


def test_mvtec_ad(tmp_path: Path, read: Any) -> None:
    root = READER_TREES["mvtec_ad"](tmp_path / "tree")
    result = read("mvtec_ad", root)
    assert listed(result, "product", "defect", "split", "family") == {
        ("bottle", "broken_large", "test", "broken_large"): 6,
        ("bottle", "good", "test", "good"): 1,
        ("bottle", "good", "train", "good"): 2,
        ("carpet", "cut", "test", "cut"): 6,
        ("carpet", "good", "test", "good"): 1,
        ("carpet", "good", "train", "good"): 2,
    }
    assert {row["is_defect"] for row in result.manifest.to_pylist() if row["defect"] == "good"} == {False}
    assert (mask_of(one(result, "cut", "004.png")) == marked(rectangle(1, 4))).all()

    alone = read("mvtec_ad", root / "carpet")
    assert listed(alone, "product", "defect") == {("carpet", "cut"): 6, ("carpet", "good"): 3}
    shutil.rmtree(root / "bottle" / "train")
    with pytest.raises(DataError, match="bottle/train is missing or has no class folders; expected <root>/<product>"):
        read("mvtec_ad", root)
    shutil.rmtree(root / "bottle")
    assert read("mvtec_ad", root).manifest.num_rows == 9


def test_mvtec_3d_ad(tmp_path: Path, read: Any) -> None:
    root = READER_TREES["mvtec_3d_ad"](tmp_path / "tree")
    save(root / "rope" / "calibration" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    result = read("mvtec_3d_ad", root)
    good = {("bagel", "good", split): 1 for split in ("train", "val", "test")}
    assert {k: n for k, n in listed(result, "product", "defect", "split").items() if k[0] == "bagel"} == good | {
        ("bagel", "contamination", "test"): 6
    }
    assert (mask_of(one(result, "contamination", "002.png")) == marked(rectangle(0, 2))).all()
    assert {row["mask_uri"] for row in result.manifest.to_pylist() if row["defect"] == "good"} == {""}
    shutil.rmtree(root / "bagel" / "validation")
    with pytest.raises(DataError, match="bagel/validation is missing or has no <defect>/rgb folder"):
        read("mvtec_3d_ad", root)


# --- VisA


@pytest.fixture
def visa(tmp_path: Path) -> Path:
    return READER_TREES["visa"](tmp_path / "tree")


def relabel(root: Path, end: str, /, **values: str) -> None:
    """Change the line of the image whose path ends so in pcb1/image_anno.csv."""
    path = root / "pcb1" / "image_anno.csv"
    _, *lines = [line[1:-1].split('","') for line in path.read_text().splitlines()]
    rows = [dict(zip(("image", "label", "mask"), line, strict=True)) for line in lines]
    save_csv(path, [row | values if row["image"].endswith(end) else row for row in rows])


def test_visa(visa: Path, read: Any) -> None:
    result = read("visa", visa)
    assert listed(result, "product", "defect", "split") == {
        ("candle", "normal", "test"): 1,
        ("candle", "normal", "train"): 2,
        ("candle", "weird candle wick", "test"): 6,
        ("pcb1", "bent", "test"): 6,
        ("pcb1", "melt", "test"): 6,
        ("pcb1", "normal", "test"): 1,
        ("pcb1", "normal", "train"): 2,
        ("pcb1", "scratch", "test"): 6,
    }
    melt, scratch = (one(result, defect, "pcb1/Data/Images/Anomaly/007.JPG") for defect in ("melt", "scratch"))
    assert (mask_of(melt) == marked(rectangle(0, 7))).all()
    assert (mask_of(scratch) == marked(rectangle(1, 7))).all()
    assert melt["file_id"] == scratch["file_id"]

    shutil.rmtree(visa / "split_csv")
    shutil.rmtree(visa / "candle")
    assert set(listed(read("visa", visa), "product", "split")) == {("pcb1", "")}


def test_visa_is_read_again_where_its_split_came_later(visa: Path, tmp_path: Path) -> None:
    (visa / "split_csv").rename(tmp_path / "later")
    assert set(ingested("visa", visa, tmp_path / "home").table["split"].to_pylist()) == {""}
    (tmp_path / "later").rename(visa / "split_csv")
    again = ingested("visa", visa, tmp_path / "home")
    assert (again.cached, set(again.table["split"].to_pylist())) == (False, {"train", "test"})
    assert ingested("visa", visa, tmp_path / "home").cached


def test_visa_border_of_a_resampled_region_is_no_defect(visa: Path, read: Any) -> None:
    """A region of id 3 whose border runs through 2 and 1: only the third of its labels is there."""
    region = marked(rectangle(0, 0))
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for index, inset in enumerate((0, 1, 2), start=1):
        y, x = np.nonzero(region)
        ids[y.min() + inset : y.max() + 1 - inset, x.min() + inset : x.max() + 1 - inset] = index
    save(visa / "pcb1/Data/Masks/Anomaly/000.png", ids)
    relabel(visa, "Anomaly/000.JPG", label="bent, melt,scratch,scratch,")
    result = read("visa", visa)
    assert (mask_of(one(result, "scratch", "pcb1/Data/Images/Anomaly/000.JPG")) == (ids == 3)).all()
    assert len(refusals(result)) == 2
    assert "labelled bent, but its id 1 fills no square of 3 x 3 pixels" in refusals(result)[0]


def test_visa_labels_without_ids_are_one_class(visa: Path, read: Any) -> None:
    relabel(visa, "Anomaly/007.JPG", label="melt,unheard of")
    relabel(visa, "Anomaly/001.JPG", label="unheard of")
    result = read("visa", visa)
    combined = one(result, "combined", "pcb1/Data/Images/Anomaly/007.JPG")
    assert (mask_of(combined) == marked(rectangle(0, 7)) | marked(rectangle(1, 7))).all()
    assert (mask_of(one(result, "unheard of", "001.JPG")) == marked(rectangle(0, 1))).all()


def test_visa_hostile_and_wrong_lines(visa: Path, read: Any) -> None:
    relabel(visa, "Anomaly/000.JPG", image="../../secret.JPG")
    relabel(visa, "Anomaly/001.JPG", mask="/etc/passwd")
    relabel(visa, "Anomaly/002.JPG", image="pcb1/Data/Images/Anomaly/unlisted.JPG")
    save(visa / "pcb1/Data/Masks/Anomaly/003.png", np.ones((9, 9), dtype=np.uint8))
    save(visa / "pcb1/Data/Masks/Anomaly/004.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    result = read("visa", visa)
    assert listed(result, "product", "defect")["pcb1", "bent"] == 1
    assert result.manifest.num_rows == 25
    text = " | ".join(refusals(result))
    for reason in (
        "'../../secret.JPG' does not name a file under",
        "'/etc/passwd' does not name a file under",
        "unlisted.JPG: not listed in",
        "003.png: the mask is 9 x 9 pixels, its image 48 x 40",
        "004.png: the mask has no marked pixel",
    ):
        assert reason in text
    (visa / "pcb1" / "image_anno.csv").write_text("image,name\n")
    with pytest.raises(DataError, match=r"image_anno.csv: no column label, mask; expected <root>"):
        read("visa", visa)
    (visa / "pcb1" / "image_anno.csv").unlink()
    with pytest.raises(DataError, match=r"image_anno.csv: cannot be read as CSV \(.*No such file"):
        read("visa", visa)


def test_visa_classes_are_those_of_the_paper() -> None:
    counts = {product: len(names) for product, names in visa_module.CLASSES.items()}
    assert set(counts) == set(get_dataset("visa").expected)
    assert (counts["candle"], counts["pcb4"], counts["cashew"]) == (8, 7, 9)
    assert sum(get_dataset("visa").expected.values()) == 10_821


# --- MVTec-FS


@pytest.fixture
def mvtec_fs(tmp_path: Path) -> Path:
    return READER_TREES["mvtec_fs"](tmp_path / "tree")


def test_mvtec_fs(mvtec_fs: Path, read: Any) -> None:
    for folder in (mvtec_fs / "CONFIG" / "toothbrush_config1", mvtec_fs / "image" / "toothbrush"):
        folder.mkdir()
    result = read("mvtec_fs", mvtec_fs)
    assert listed(result, "product", "defect", "split") == {
        (product, defect, split): 3
        for product, defect in (("bottle", "broken_large"), ("carpet", "color"), ("carpet", "cut"))
        for split in ("train", "test")
    }
    both = one(result, "broken_large", "bottle/training/broken_large/003.png")
    assert (mask_of(both) == marked(rectangle(0, 3)) | marked(rectangle(1, 3))).all()
    assert (mask_of(one(result, "cut", "carpet/testing/color/002.png")) == marked(rectangle(1, 2))).all()
    assert sum(get_dataset("mvtec_fs").expected.values()) == 1228


def test_mvtec_fs_hostile_and_wrong_lines(mvtec_fs: Path, read: Any) -> None:
    def line(path: str, points: object) -> dict[str, str]:
        return {"img_rel_path": path, "label": "broken_large", "points": json.dumps(points)}

    square = [(1, 1), (9, 1), (9, 9)]
    for i in (1, 3, 5):
        photo(mvtec_fs / "image" / "bottle" / f"training/broken_large/new{i}.png", (0,), i, place=9)
    lines = [
        line("../../../etc/passwd", square),
        line("training/broken_large/new1.png", [(1, 1), (99, 1), (9, 9)]),
        line("training/broken_large/new3.png", "nonsense"),
        line("training/broken_large/new5.png", square),
        line("training/broken_large/gone.png", square),
    ]
    save_csv(mvtec_fs / "CONFIG" / "bottle_config1" / "train.csv", lines)
    result = read("mvtec_fs", mvtec_fs)
    assert listed(result, "product", "split")["bottle", "train"] == 1
    text = " | ".join(refusals(result))
    assert len(refusals(result)) == 4
    for reason in (
        "'../../../etc/passwd' does not name a file under",
        "new1.png: polygon outside the image",
        "new3.png: points '\"nonsense\"' are not [[x, y], ...]",
        "gone.png: cannot be read",
    ):
        assert reason in text
    (mvtec_fs / "CONFIG" / "bottle_config1" / "valid.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"valid.csv: cannot be read as CSV"):
        read("mvtec_fs", mvtec_fs)


# --- NEU-Seg


@pytest.fixture
def neu_seg(tmp_path: Path) -> Path:
    return READER_TREES["neu_seg"](tmp_path / "tree")


def test_neu_seg(neu_seg: Path, read: Any) -> None:
    result = read("neu_seg", neu_seg)
    assert set(listed(result, "product", "split")) == {("hot_rolled_strip", "train"), ("hot_rolled_strip", "test")}
    for kind, defect in enumerate(("inclusion", "patches", "scratches")):
        row = one(result, defect, "training/000015.jpg")
        assert row["split"] == "train"
        assert (mask_of(row) == marked(rectangle(kind, 15))).all()
    shutil.rmtree(neu_seg / "images" / "test")
    assert set(listed(read("neu_seg", neu_seg), "split")) == {("",)}
    shutil.rmtree(neu_seg / "annotations" / "training")
    with pytest.raises(DataError, match="annotations/training missing; expected"):
        read("neu_seg", neu_seg)


def test_neu_seg_palette_image_gives_its_indices(neu_seg: Path, read: Any) -> None:
    path = neu_seg / "annotations" / "training" / "000015.png"
    with Image.open(path) as grey:
        palette = Image.fromarray(np.asarray(grey)).convert("P")
        palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 255, 0])
    assert palette.mode == "P"
    palette.save(path)
    save(neu_seg / "annotations" / "training" / "000013.png", np.ones((HEIGHT, WIDTH, 3), dtype=np.uint8))
    result = read("neu_seg", neu_seg)
    assert (mask_of(one(result, "scratches", "training/000015.jpg")) == marked(rectangle(2, 15))).all()
    assert ["this one has mode RGB" in reason for reason in refusals(result)] == [True]


def test_neu_seg_refuses_wrong_labels(neu_seg: Path, read: Any) -> None:
    folder = neu_seg / "annotations" / "test"
    save(folder / "000000.png", indices({0: 7}, 0))
    save(folder / "000002.png", indices({}, 2))
    save(folder / "000004.png", np.ones((3, 3), dtype=np.uint8))
    (folder / "000006.png").unlink()
    result = read("neu_seg", neu_seg)
    assert result.manifest.num_rows == 14
    reasons = " | ".join(refusals(result))
    for reason in ("class index 7", "no pixel of a class", "the mask is 3 x 3 pixels", "000006.png: cannot be read"):
        assert reason in reasons


# --- FSSD-12, DTD, UCF-EL


def test_fssd_12(tmp_path: Path, read: Any) -> None:
    root = READER_TREES["fssd_12"](tmp_path / "tree")
    photo(root / "Steel_Am" / "Nd" / "Steel_Am_1.jpg", (), 0)
    result = read("fssd_12", root)
    assert listed(result, "product", "defect", "split") == {
        ("strip_steel", defect, ""): 6 for defect in ("abrasion_mask", "inclusion", "punching")
    }
    assert (mask_of(one(result, "inclusion", "Steel_Se_4.jpg")) == marked(rectangle(2, 4))).all()


def test_dtd(tmp_path: Path, read: Any) -> None:
    root = READER_TREES["dtd"](tmp_path / "tree")
    result = read("dtd", root)
    assert listed(result, "product", "defect", "split", "mask_uri") == {
        ("texture", name, split, ""): 2
        for name in ("banded", "polka-dotted", "zigzagged")
        for split in ("train", "val", "test")
    }
    assert get_dataset("dtd").good_is_class
    assert not any(result.manifest["is_defect"].to_pylist())

    photo(root / "images" / "banded" / "banded_0099.jpg", (), 99)
    result = read("dtd", root)
    assert result.manifest.num_rows == 18
    assert "banded_0099.jpg: in none of the lists" in refusals(result)[0]
    (root / "labels" / "val1.txt").unlink()
    with pytest.raises(DataError, match=r"val1.txt missing; expected"):
        read("dtd", root)
    shutil.rmtree(root / "labels")
    assert set(listed(read("dtd", root), "split")) == {("",)}


def test_ucf_el(tmp_path: Path, read: Any) -> None:
    result = read("ucf_el", READER_TREES["ucf_el"](tmp_path / "tree"))
    assert listed(result, "product", "family", "defect", "is_defect") == {
        ("solar_cell", "crack", "Crack_Closed", True): 6,
        ("solar_cell", "corrosion", "Contact_Corrosion", True): 6,
        ("solar_cell", "interconnect", "Interconnect_BrightSpot", True): 6,
        ("solar_cell", "No_Defect", "No_Defect", False): 6,
    }
    assert (mask_of(one(result, "Crack_Closed", "M0002C000001.png")) == marked(rectangle(0, 2))).all()
    assert (mask_of(one(result, "Contact_Corrosion", "M0008C000001.png")) == marked(rectangle(0, 8))).all()
    spot = one(result, "Interconnect_BrightSpot", "M0008C000001.png")
    assert spot["bbox"] == [32, 17, 44, 23]


def test_ucf_el_wrong_lines(tmp_path: Path, read: Any) -> None:
    root = READER_TREES["ucf_el"](tmp_path / "tree", per_class=2)
    columns = ("filename", "region_shape_attributes", "region_attributes")
    circle = {"name": "circle", "cx": 20, "cy": 20, "r": 4}

    def line(name: str, shape: object, defect: str = "Crack_Closed") -> dict[str, str]:
        return dict(zip(columns, (name, json.dumps(shape), json.dumps({"Defect_Class": defect})), strict=True))

    shutil.copy(root / "Mono" / "M0003C000001.png", root / "Multi")
    lines = [
        line("M0000C000001.png", circle),
        line("M0000C000001.png", {}),
        line("M0001C000001.png", circle | {"name": "point"}),
        line("M0002C000001.png", circle | {"r": "wide"}),
        line("M0002C000001.png", circle, defect=""),
        line("M0003C000001.png", circle),
        line("../secret.png", circle),
    ]
    save_csv(root / "AnnotationsCombined.csv", lines)
    result = read("ucf_el", root)
    assert listed(result, "defect") == {("Crack_Closed",): 1, ("Unknown",): 1}
    assert one(result, "Crack_Closed", "M0000C000001.png")["bbox"] == [16, 16, 24, 24]
    text = " | ".join(refusals(result))
    assert len(refusals(result)) == 4
    for reason in (
        "M0001C000001.png: region {'name': 'point'",
        "M0002C000001.png: region {'name': 'circle'",
        "Mono/M0003C000001.png, ",
        "'../secret.png' is no image file under",
    ):
        assert reason in text


# --- the real sets


def rows_of(name: str, data_dir: Path) -> list[ManifestRow]:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} at {data_dir / name}: set HYPDEFECT_DATA")
    return list(get_dataset(name).scan(data_dir / name))


@pytest.mark.data
def test_real_neu_seg(data_dir: Path) -> None:
    rows = [row for row in rows_of("neu_seg", data_dir) if row.path.parent.name == "training"]
    assert not any(row.refused for row in rows)
    assert len({row.path for row in rows}) == 3630
    assert Counter(row.defect for row in rows) == {"inclusion": 1460, "patches": 1448, "scratches": 1429}
    for row in rows[::500]:
        assert row.draw_mask is not None
        assert row.draw_mask(200, 200).sum() >= 42  # the smallest region of all: no stray pixels


@pytest.mark.data
def test_real_dtd(data_dir: Path) -> None:
    rows = rows_of("dtd", data_dir)
    counts = Counter(row.defect for row in rows)
    assert set(counts) <= set(get_dataset("dtd").expected)
    assert set(counts.values()) <= {40, 120}
    with Image.open(rows[0].path) as image:
        assert image.format == "JPEG"
